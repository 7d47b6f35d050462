"""Cursor pagination: a page of things and where the next one begins."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson

from guestpass.errors import Invalid

T = TypeVar("T")

# What one answer carries when nothing is said, and at most: a share with its recipients is some kilobytes.
DEFAULT_LIMIT = 50
MAX_LIMIT = 200


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """`next` is the cursor of the page after this one; None at the end."""

    items: list[T]
    next: str | None = None


def check_limit(limit: int) -> int:
    """Raises Invalid."""
    if not 1 <= limit <= MAX_LIMIT:
        raise Invalid(f"limit must be between 1 and {MAX_LIMIT}")
    return limit


def to_cursor(*position: float | int | str) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(position)).decode().rstrip("=")


def from_cursor(cursor: str, *types: type) -> tuple[Any, ...]:
    """The position; its parts have these types. Raises Invalid."""
    try:
        position = orjson.loads(base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4)))
    except ValueError:
        position = None
    if not isinstance(position, list) or [type(part) for part in position] != list(types):
        raise Invalid(
            "the cursor is not one of ours",
            hint="Pass the `next` of the page before, unchanged, or no cursor for the first page.",
            code="cursor_invalid",
        )
    return tuple(position)
