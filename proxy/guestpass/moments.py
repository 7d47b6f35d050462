"""Times as text: RFC 3339 in UTC on the outside, seconds since the epoch inside."""

from __future__ import annotations

from datetime import UTC, datetime

from guestpass.config import duration
from guestpass.errors import Invalid

# Later than this `datetime` overflows on the way back; a share that outlives its owner's career is a typing error.
LATEST = datetime(2200, 1, 1, tzinfo=UTC).timestamp()


def to_text(at: float) -> str:
    """`2026-08-02T10:00:00.000Z`"""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_moment(text: str, now: float) -> float:
    """A time from `90s`, `15m`, `12h`, `7d` (counted from `now`) or an RFC 3339 time. Raises Invalid."""
    text = text.strip()
    try:
        return now + duration(text)
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text)
    except ValueError as exc:
        raise Invalid(
            f"{text!r} is not a time",
            hint="Use a duration (90s, 15m, 12h, 7d) or an RFC 3339 time such as 2026-12-31T18:00:00Z.",
        ) from exc
    if at.tzinfo is None:
        raise Invalid(
            f"{text!r} has no time zone", hint=f"Write {text}Z for UTC, or an offset such as +02:00."
        )
    try:
        seconds = at.timestamp()
    except OverflowError:
        seconds = LATEST + 1
    if not 0 <= seconds <= LATEST:
        raise Invalid(f"{text!r} is out of range")
    return seconds
