"""What commands print: sentences and small tables for people, one JSON object for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from guestpass.errors import GuestpassError

# Names and messages come from other people: none of their characters may drive the terminal.
UNPRINTABLE = dict.fromkeys((*range(32), *range(127, 160), *range(8234, 8239)), "�")

UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


class Output:
    """Standard output of one command, and its errors."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        self._answered = False
        for stream in (sys.stdout, sys.stderr):
            # A terminal that cannot show a character gets an escape, never an exception.
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="backslashreplace")

    def result(self, data: Mapping[str, Any], *lines: str) -> None:
        """The command's one answer: `data` with --json, else the lines."""
        self._answered = True
        if self.json:
            print(json.dumps(data), flush=True)
        else:
            print("\n".join(lines), flush=True)

    def say(self, line: str = "") -> None:
        """A line on the way, for people only."""
        if not self.json:
            print(line, flush=True)

    def warn(self, message: str) -> None:
        """On standard error, with --json as well."""
        print(f"guestpass: warning: {message}", file=sys.stderr, flush=True)

    def error(self, error: GuestpassError) -> None:
        """As the one JSON object; what goes wrong after the answer (of something that keeps running) is for people."""
        if self.json and not self._answered:
            print(json.dumps({"error": error.as_json()}), flush=True)
            return
        hint = f"\n  {error.hint}" if error.hint else ""
        print(f"guestpass: {error.message}{hint}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stdout.flush()


def plain(value: object) -> str:
    """Text of a cell: without control characters and direction overrides."""
    return str(value).translate(UNPRINTABLE)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, two spaces apart; the last one is as long as it likes."""
    cells = [[plain(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [[h.upper() for h in headers], *cells]
    )


def fields(rows: Sequence[tuple[str, object]]) -> str:
    """`Label  value` lines, aligned; empty values are left out."""
    shown = [(label, plain(value)) for label, value in rows if value not in (None, "")]
    width = max((len(label) for label, _ in shown), default=0)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in shown)


def count(number: int, noun: str) -> str:
    """`1 session`, `2 sessions`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def when(text: str | None, *, never: str = "never") -> str:
    """An RFC 3339 time as a person reads it: local time and how far away."""
    if not text:
        return never
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    seconds = (moment - datetime.now(UTC)).total_seconds()
    size = abs(seconds)
    name, unit = next(((n, u) for n, u in UNITS if size >= u), UNITS[-1])
    # What lies ahead is rounded up, so that "7 days" does not read "6 days" a moment later.
    amount = count(int(-(-size // unit)) if seconds > 0 and unit > 1 else int(size // unit), name)
    relative = "now" if size < 1 else f"in {amount}" if seconds > 0 else f"{amount} ago"
    return f"{moment.astimezone():%Y-%m-%d %H:%M} ({relative})"
