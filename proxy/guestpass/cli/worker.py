"""One worker of an edge of several: started by the supervisor, of no use to anybody else.

`python -m guestpass.cli.worker` gets the supervisor's end of a socket pair and the listening sockets as inherited file
descriptors. It follows the supervisor's word only: signals that a terminal or a service manager sends to everybody are
ignored.
"""

from __future__ import annotations

import argparse
import signal
import socket
from pathlib import Path


def main() -> None:
    from guestpass import loop
    from guestpass.daemon import set_up_logging

    parser = argparse.ArgumentParser(prog="guestpass.cli.worker")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--control", required=True, type=int)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--path", required=True)
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        # Not SIG_IGN, which children would inherit: whoever starts one could not end it by SIGTERM.
        signal.signal(number, lambda number, frame: None)
    set_up_logging(args.log_level)
    loop.run(_work(args))


async def _work(args: argparse.Namespace) -> None:
    from guestpass.config import load_edge
    from guestpass.edge.app import work
    from guestpass.edge.origins import Origins
    from guestpass.edge.worker import Seat
    from guestpass.errors import GuestpassError

    sockets = [socket.socket(fileno=int(number)) for number in args.listen.split(",")]
    control = socket.socket(fileno=args.control)
    for sock in (*sockets, control):
        sock.set_inheritable(False)
    seat = Seat(sockets, args.path)
    try:
        await seat.connect(control)
        config = seat.as_started(load_edge(args.config))
    except GuestpassError as exc:
        await seat.failed(exc)
        return
    seat.configure(
        memory_budget=config.edge.memory_budget // config.edge.workers,
        share_origin=Origins(config.edge.public_url, config.edge.share_domain).share_origin,
    )
    await work(config, seat)
    await seat.channel.flushed()


if __name__ == "__main__":
    main()
