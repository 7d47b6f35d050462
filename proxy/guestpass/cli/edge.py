"""`guestpass edge`: the public reverse proxy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guestpass.cli.output import Output
from guestpass.cli.parser import add_command, log_option

if TYPE_CHECKING:
    from guestpass.cli.parser import Commands
    from guestpass.config import LogLevel


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "edge",
        "run the edge: the public reverse proxy",
        about="SIGTERM and SIGINT drain and end it, SIGHUP reloads the configuration; live streams stay. "
        "With several workers, SIGUSR2 replaces them one after the other.",
        example="guestpass edge --config edge.toml",
        run=run,
        parents=[log_option()],
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="edge.toml")
    parser.add_argument(
        "--restored",
        action="store_true",
        help="the database is a backup that was restored: revoke in it again what was revoked since it was made",
    )


def run(args: argparse.Namespace, output: Output) -> int:
    """Raises GuestpassError when it cannot start."""
    from guestpass import loop
    from guestpass.config import load_edge
    from guestpass.daemon import notify_systemd, set_up_logging
    from guestpass.edge.app import serve
    from guestpass.edge.supervisor import supervise

    log_level: LogLevel = getattr(args, "log_level", "info")
    set_up_logging(log_level)
    config = load_edge(args.config)

    def ready(facts: dict[str, Any]) -> None:
        output.result(
            facts,
            f"The edge {facts['edge']} is ready on {', '.join(facts['listen'])} (process {facts['pid']}).",
            *([f"Mail is written to {facts['outbox']}."] if facts.get("outbox") else []),
        )
        notify_systemd("READY=1", f"STATUS=Serving {facts['edge']}")

    if config.edge.workers == 1:
        loop.run(serve(config, ready=ready, restored=args.restored))
    else:
        loop.run(supervise(config, ready=ready, log_level=log_level, restored=args.restored))
    return 0
