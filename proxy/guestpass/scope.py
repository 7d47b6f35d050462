"""Path limits: which requests a share, or a gateway's service, admits.

A pattern is matched segment by segment on the bytes that will be forwarded, without the query: `*` is any part of one
segment, `**` (a whole segment) is any number of segments, none included. Where a limit applies, a path whose meaning
depends on who decodes it is refused: see `ambiguous`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from guestpass.errors import Invalid
from guestpass.model import Scope

# Longer patterns have no use and would make the regular expressions slow to build.
MAX_PATTERN = 1024

METHOD = re.compile(r"[A-Z][A-Z-]{0,31}|\*")

# What servers disagree on: encoded dots, slashes, backslashes, percent signs and NULs, path parameters, empty and dot
# segments, backslashes; what only a decoder that takes overlong UTF-8 would read as one of these; and percent signs
# that begin no byte: %u002e is a dot to some.
AMBIGUOUS = re.compile(
    r"%2e|%2f|%5c|%25|%00|%c[01]|%e0%[89]|%f0%8|%(?![0-9a-f]{2})|[;\\]|//|(?:^|/)\.\.?(?:/|$)", re.IGNORECASE
)


def ambiguous(path: str) -> bool:
    """Whether servers may disagree on what `path` (raw, without the query) names."""
    return AMBIGUOUS.search(path) is not None


def parse_scope(text: str) -> Scope:
    """`GET /x/**` or `/x/**` (any method). Raises Invalid."""
    method, _, path = text.strip().rpartition(" ")
    method = method.strip().upper() or "*"
    if not METHOD.fullmatch(method):
        raise Invalid(
            f"scope {text!r}: {method!r} is not a method", hint="Write it like 'GET /x/**' or '* /x/**'."
        )
    check_path(path, what=f"scope {text!r}")
    return Scope(method, path)


def check_path(path: str, *, what: str) -> None:
    """Whether `path` may stand in a share or a pattern. Raises Invalid."""
    if not path.startswith("/"):
        raise Invalid(f"{what}: the path must begin with '/'")
    if len(path) > MAX_PATTERN:
        raise Invalid(f"{what}: the path is longer than {MAX_PATTERN} characters")
    if not path.isascii() or any(c <= " " or c in '"<>\\^`{|}\x7f#' for c in path):
        raise Invalid(f"{what}: the path has a character that must be percent-encoded")
    if ambiguous(path.partition("?")[0]):
        raise Invalid(
            f"{what}: the path is ambiguous",
            hint="Write it without '..', '//', ';', '%2e', '%2f', '%5c' and '%25'.",
        )


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Regular expression for a path pattern; matches with `fullmatch` on the raw path."""
    out: list[str] = []
    for index, segment in enumerate(pattern.split("/")):
        if index == 0:
            continue
        if segment == "**":
            out.append("(?:/[^/]*)*")
        else:
            out.append("/" + "[^/]*".join(re.escape(part) for part in segment.split("*")))
    return re.compile("".join(out) or "/")


def admits(scope: Iterable[Scope], method: str, target: str) -> bool:
    """Whether any rule admits the request. `target` is the raw request target (path and query)."""
    path = target.partition("?")[0]
    if ambiguous(path):
        return False
    return any(
        (rule.method in ("*", method) or (rule.method == "GET" and method == "HEAD"))
        and compile_pattern(rule.path).fullmatch(path)
        for rule in scope
    )
