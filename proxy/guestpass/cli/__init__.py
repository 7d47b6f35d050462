"""The `guestpass` command.

A file per command holds its arguments and what it does; the pieces that they share are `parser`, `output` and
`client`. What is slow to import is imported by the command that needs it, so that `--help` and `version` are quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from guestpass.cli import doctor, edge, gateway, keys, plugin, share, up, version
from guestpass.cli.output import Output
from guestpass.cli.parser import Parser, json_option
from guestpass.errors import GuestpassError, UsageError

# What a shell reports for a program that SIGINT ended.
INTERRUPTED = 130

EPILOG = """\
examples:
  guestpass up http://127.0.0.1:3000 --to alice@example.org
  guestpass share list --edge https://share.example.com --api-key-file api.key

Every command has --help with an example, and takes --json.
"""


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="guestpass",
        description="Share a private web application with one person, by email address.",
        epilog=EPILOG,
        parents=[json_option()],
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for module in (up, edge, gateway, share, plugin, keys, doctor, version):
        module.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. 0 done, 1 refused or failed, 2 usage."""
    argv = sys.argv[1:] if argv is None else argv
    output = Output(json="--json" in argv)
    try:
        try:
            status = _run(argv, output)
        except GuestpassError as error:
            output.error(error)
            return error.exit_status
        output.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`). Nothing more can be said there, also not at the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str], output: Output) -> int:
    """Raises GuestpassError, also for what the operating system or the installation refuses."""
    try:
        args = build_parser().parse_args(argv)
        if not hasattr(args, "run"):
            raise UsageError("say which command", hint="See `guestpass --help`.")
        status: int = args.run(args, output)
    except BrokenPipeError:
        raise
    except OSError as exc:
        about = f": {exc.filename}" if exc.filename else ""
        raise GuestpassError(f"{exc.strerror or exc}{about}", code="os_error") from exc
    except ImportError as exc:
        if not (exc.name or "").startswith("guestpass_speedups"):
            raise
        raise GuestpassError(
            f"the compiled core is missing: {exc}",
            hint="Install the wheel, or build it in a checkout: python setup.py build_ext --inplace",
            code="core_missing",
        ) from exc
    return status
