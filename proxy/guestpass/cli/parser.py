"""argparse with our manners: errors are raised as UsageError, and every command shows an example."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from guestpass.errors import Invalid, UsageError

if TYPE_CHECKING:
    from guestpass.cli.output import Output

    Commands = argparse._SubParsersAction["Parser"]

Run = Callable[[argparse.Namespace, "Output"], int]


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print and exit. Abbreviated options are errors: they would become
    ambiguous, and scripts with them would break, whenever an option is added."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"See `{self.prog} --help`.")


def add_command(
    commands: Commands,
    name: str,
    purpose: str,
    *,
    example: str,
    run: Run | None = None,
    about: str = "",
    parents: Sequence[Parser] = (),
) -> Parser:
    """A sub-command. `purpose` is one line, `example` one or more whole command lines, `run` does the work."""
    text = f"{purpose[0].upper()}{purpose[1:]}."
    parser = commands.add_parser(
        name,
        help=purpose,
        description=f"{text}\n\n{about}" if about else text,
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        parents=[json_option(), *parents],
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def json_option() -> Parser:
    """`--json`, which every command takes."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print one JSON object, also for an error",
    )
    return parser


def log_option() -> Parser:
    """`--log-level`, for what keeps running."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=argparse.SUPPRESS,
        help="how much to log on standard error (default: info)",
    )
    return parser


def addresses(text: str) -> list[str]:
    """The parts of `a@example.org,b@example.org`; the edge checks each."""
    return [part.strip() for part in text.split(",") if part.strip()]


def names(text: str) -> list[str]:
    """The parts of `email-code,google`; the edge checks each."""
    return addresses(text)


def flatten(lists: Sequence[Sequence[str]] | None) -> list[str]:
    """What a repeatable option with `type=addresses` collected."""
    return [item for items in lists or () for item in items]


def expires(text: str) -> str:
    """argparse type: `90s`, `15m`, `12h`, `7d`, or an RFC 3339 time. Passed on as it is: the edge's clock counts."""
    from guestpass.moments import parse_moment

    now = time.time()
    try:
        at = parse_moment(text, now)
    except Invalid as exc:
        raise argparse.ArgumentTypeError(f"{exc.message}. {exc.hint}".rstrip(". ")) from exc
    if at <= now:
        raise argparse.ArgumentTypeError(f"{text!r} is past")
    return text.strip()


def number(low: int, high: int) -> Callable[[str], int]:
    """argparse type: a whole number within limits."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value

    return parse


def read_secret(path: str, what: str) -> str:
    """The text of a file, or of standard input for `-`, stripped. Raises UsageError."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
    except OSError as exc:
        raise UsageError(f"cannot read the {what} from {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"cannot read the {what} from {path}: it is not text") from exc
    if not text.strip():
        raise UsageError(f"the {what} from {'standard input' if path == '-' else path} is empty")
    return text.strip()
