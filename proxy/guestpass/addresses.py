"""Email addresses in one canonical form, so that two of them are the same person exactly when the texts are equal.

The canonical form is ASCII and lower-case: a plain local part, one `@`, the domain as IDNA A-labels. Whatever could be
read as two different addresses by two programs (comments, quotes, display names, address lists, characters that only
*become* ASCII when case or width is folded) is refused, never repaired.
"""

from __future__ import annotations

import re
import unicodedata

import idna
from email_validator import EmailNotValidError, validate_email

from guestpass.errors import InvalidEmail

# RFC 5321, 4.5.3.1.3: a path is at most 256 octets with its angle brackets.
MAX_ADDRESS = 254
# RFC 5321, 4.5.3.1.1.
MAX_LOCAL_PART = 64

HINT = "Write it like name@example.org."


def canonical(text: str) -> str:
    """The canonical form of one address; white space around it is ignored.

    Raises InvalidEmail, which says what is wrong with it.
    """
    given = text.strip(" \t\r\n")
    if not given:
        raise InvalidEmail("the email address is empty", hint=HINT)
    if len(given) > MAX_ADDRESS:
        raise InvalidEmail(f"the email address is longer than {MAX_ADDRESS} characters")
    local, at, domain = given.rpartition("@")
    if not at:
        raise InvalidEmail(f"{_shown(given)} is not an email address: it has no '@'", hint=HINT)
    if len(local) > MAX_LOCAL_PART:
        raise InvalidEmail(
            f"{_shown(given)}: the part before the '@' is longer than {MAX_LOCAL_PART} characters"
        )
    try:
        valid = validate_email(
            given,
            check_deliverability=False,
            allow_smtputf8=False,
            allow_quoted_local=False,
            allow_domain_literal=False,
            allow_display_name=False,
        )
    except EmailNotValidError as exc:
        raise InvalidEmail(f"{_shown(given)} is not an email address: {exc}", hint=HINT) from exc
    address = f"{local}@{valid.ascii_domain}".lower()
    if not address.isascii() or not _same_domain(domain, valid.ascii_domain):
        raise InvalidEmail(
            f"{_shown(given)}: the domain is written with characters that only resemble it",
            hint=f"If you mean {valid.ascii_domain}, type it in plain letters.",
        )
    return address


def split_addresses(text: str) -> list[str]:
    """Canonical addresses from a text that separates them by commas, semicolons or white space, without repeats.

    Raises InvalidEmail for the first one that is not an address.
    """
    return list(dict.fromkeys(canonical(part) for part in re.split(r"[\s,;]+", text) if part))


def _same_domain(given: str, ascii_domain: str) -> bool:
    """Whether `given` is the domain as one would write it, not a text that mapping turned into it: UTS 46 makes the
    full-width dot a dot, and both it and NFC make the Kelvin sign a `k`."""
    if any(not c.isascii() and unicodedata.normalize("NFKC", c).lower().isascii() for c in given):
        return False
    return unicodedata.normalize("NFC", given).lower() in (ascii_domain, idna.decode(ascii_domain))


def _shown(text: str) -> str:
    """`text` quoted for a message, with everything that does not print escaped."""
    return ascii(text) if not text.isprintable() else repr(text)
