"""`guestpass keys …`: the keys that sign assertions."""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from guestpass.cli.output import Output, table, when
from guestpass.cli.parser import Parser, add_command

if TYPE_CHECKING:
    from guestpass.cli.parser import Commands
    from guestpass.edge.signing_keys import KeyRing


def add(commands: Commands) -> None:
    keys = add_command(
        commands,
        "keys",
        "list and rotate the keys that sign assertions",
        about="On the edge's machine, as the edge's user. An edge that runs follows within a minute.",
        example="guestpass keys list --config edge.toml",
    )
    actions = keys.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    add_command(
        actions,
        "list",
        "list the keys, and say which one signs",
        example="guestpass keys list --config edge.toml",
        run=_list,
        parents=[_config_option()],
    )
    rotate = add_command(
        actions,
        "rotate",
        "have another key sign",
        about=(
            "The new key is published now and signs in an hour; the old one stays published until the last assertion\n"
            "that it signed has expired. By itself the edge does so every `assertion_key_days`."
        ),
        example="guestpass keys rotate --config edge.toml",
        run=_rotate,
        parents=[_config_option()],
    )
    rotate.add_argument(
        "--compromised",
        action="store_true",
        help="the old keys are known to others: drop them, and sign with the new one at once",
    )


def _config_option() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="edge.toml")
    return parser


def _ring(path: Path) -> KeyRing:
    """Raises GuestpassError."""
    from guestpass.config import load_edge
    from guestpass.edge.signing_keys import KeyRing

    config = load_edge(path)
    ring = KeyRing(config.database.parent, days=config.edge.assertion_key_days)
    ring.open(time.time())
    return ring


def _list(args: argparse.Namespace, output: Output) -> int:
    _show(_ring(args.config), output)
    return 0


def _rotate(args: argparse.Namespace, output: Output) -> int:
    ring = _ring(args.config)
    ring.rotate(time.time(), compromised=args.compromised)
    _show(ring, output)
    return 0


def _show(ring: KeyRing, output: Output) -> None:
    now = time.time()
    current = ring.current(now)
    facts = [
        {
            "id": key.id,
            "signs_from": datetime.fromtimestamp(key.signs_from, UTC).isoformat(timespec="seconds"),
            "state": "signs" if key is current else "waits" if key.signs_from > now else "published",
        }
        for key in ring.keys
    ]
    rows = [(fact["id"], fact["state"], when(fact["signs_from"])) for fact in facts]
    output.result({"keys": facts}, table(("key", "state", "signs from"), rows))
