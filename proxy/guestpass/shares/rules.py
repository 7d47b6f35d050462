"""What a share may look like: texts, limits, times. Each function returns the accepted form or raises Invalid."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence

from guestpass.addresses import canonical
from guestpass.config import NAME
from guestpass.errors import Invalid
from guestpass.model import Scope
from guestpass.moments import LATEST, to_text
from guestpass.scope import admits, check_path

# Fits a subject line and a table cell; the owner's longest real names were dashboard titles of about 150.
MAX_NAME = 200

# A page of text: an invitation carries a note, not a document.
MAX_MESSAGE = 2000

# Invitations are written in one transaction and mailed one by one; a list longer than this is a mailing list.
MAX_RECIPIENTS = 100

# Each rule is a regular expression that a request without a match runs through.
MAX_RULES = 100

# More live sessions of one share than an edge is built for.
MAX_SESSIONS = 100_000

# A sign-in page with more buttons than this is no choice any more.
MAX_WAYS = 50

# Letters that change the direction of what follows: harmless in a document, a disguise in a subject line.
# (Marks such as U+200E and joiners in emoji are no such thing and pass.)
DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def name(text: str) -> str:
    """The name of a share: any text in one line."""
    return _line(text, "the name of a share")


def owner(text: str) -> str:
    """Who shares, as recipients read it."""
    return _line(text, "the owner's name")


def default_name(service: str, path: str) -> str:
    """`SERVICE PATH`, without a query: it may hold what is nobody's business."""
    return f"{service} {path.partition('?')[0]}"[:MAX_NAME]


def message(text: str) -> str:
    """The owner's note: lines of text."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if len(text) > MAX_MESSAGE:
        raise Invalid(f"the message is longer than {MAX_MESSAGE} characters ({len(text)})")
    _refuse_control(text.replace("\n", "").replace("\t", ""), "the message")
    return text


def site(text: str) -> str:
    return _identifier(text, "site")


def service(text: str) -> str:
    return _identifier(text, "service")


def gateway(text: str) -> str:
    return _identifier(text, "gateway")


def landing(path: str, scope: Sequence[Scope]) -> str:
    """The path where recipients land: well-formed, and inside the scope."""
    check_path(path, what=f"path {path!r}")
    if scope and not admits(scope, "GET", path):
        raise Invalid(
            f"the scope does not admit the share's own path {path!r}",
            hint=f"Add the rule 'GET {path.partition('?')[0]}', or choose a path inside the scope.",
        )
    return path


def rules(scope: Sequence[Scope]) -> tuple[Scope, ...]:
    if len(scope) > MAX_RULES:
        raise Invalid(f"the scope has more than {MAX_RULES} rules ({len(scope)})")
    return tuple(dict.fromkeys(scope))


def addresses(given: Sequence[str]) -> list[str]:
    """Canonical, without repeats."""
    found = list(dict.fromkeys(canonical(address) for address in given))
    if len(found) > MAX_RECIPIENTS:
        raise Invalid(f"a share has at most {MAX_RECIPIENTS} recipients ({len(found)} given)")
    return found


def expiry(at: float | None, now: float) -> float | None:
    if at is None:
        return None
    if not at > now:  # refuses NaN as well
        raise Invalid(
            "the share would expire in the past",
            hint="Choose a later time, or delete the share to end it now.",
        )
    if at > LATEST:
        raise Invalid(
            f"the share would expire after {to_text(LATEST)}",
            hint="Leave the expiry out: it then never does.",
        )
    return at


def max_sessions(count: int | None) -> int | None:
    if count is not None and not 1 <= count <= MAX_SESSIONS:
        raise Invalid(f"max_sessions must be between 1 and {MAX_SESSIONS}, or absent for no limit")
    return count


def sign_in(names: Sequence[str], offered: Collection[str]) -> tuple[str, ...]:
    """Names of authenticators; `offered` are those that visitors can choose."""
    if len(names) > MAX_WAYS:
        raise Invalid(f"sign_in names more than {MAX_WAYS} ways of signing in")
    for way in names:
        if way not in offered:
            raise Invalid(
                f"sign_in: there is no way of signing in named {way!r}",
                hint=f"Visitors can choose among: {', '.join(offered) or 'none'}.",
            )
    return tuple(dict.fromkeys(names))


def one_line(text: str, limit: int) -> str:
    """Foreign text (a user agent, a mail server's words) made fit to be kept and shown; never refused."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[: limit * 2]).split())[:limit]


def _line(text: str, what: str) -> str:
    text = text.strip()
    if not text:
        raise Invalid(f"{what} is empty")
    if len(text) > MAX_NAME:
        raise Invalid(f"{what} is longer than {MAX_NAME} characters ({len(text)})")
    _refuse_control(text, what)
    return text


def _refuse_control(text: str, what: str) -> None:
    for character in text:
        # Control, surrogate, line and paragraph separator.
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in DIRECTION:
            raise Invalid(f"{what} has a control character (U+{ord(character):04X})", hint="Remove it.")


def _identifier(text: str, what: str) -> str:
    if not NAME.fullmatch(text):
        raise Invalid(
            f"{text!r} is not the name of a {what}",
            hint="Names have 1 to 63 of a-z, 0-9, '.', '_', '-', and begin and end with a letter or digit.",
        )
    return text
