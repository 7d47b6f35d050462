"""A `Message` as a mail (RFC 5322), the same for every notifier that speaks mail."""

from __future__ import annotations

import hmac
import re
import unicodedata
from email.header import Header
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime

from guestpass.plugin import Message, NotDelivered

# 7-bit throughout: no server on the way has a reason to rewrite the body.
POLICY = SMTP.clone(cte_type="7bit")

# What `Host.derive_key` is asked for.
KEY_PURPOSE = "message id"

# RFC 2047, 2: a line with an encoded word has at most 76 characters.
MAX_ENCODED_LINE = 76


def check_sender(value: str) -> str:
    """`Name <address@domain>` or `address@domain`. Raises ValueError."""
    _refuse_control(value, "the sender")
    message = EmailMessage(policy=POLICY)
    message["From"] = value
    header = message["From"]
    if len(header.addresses) == 1 and not header.addresses[0].addr_spec.isascii():
        raise ValueError(f"{value!r}: the sender's address must be ASCII")
    if "=?" in value or header.defects or len(header.addresses) != 1 or not header.addresses[0].domain:
        raise ValueError(f"{value!r} is not a sender: write it like 'Guestpass <share@example.com>'")
    return value


def address_of(sender: str) -> str:
    """The bare address of a checked sender."""
    message = EmailMessage(policy=POLICY)
    message["From"] = sender
    return str(message["From"].addresses[0].addr_spec)


def letter(message: Message, sender: str, key: bytes) -> EmailMessage:
    """The mail to `message.to` alone. The same message gives the same Message-ID, so that a mail that went out twice
    (the process died before it knew that the first was taken) is shown once. It is made with a secret `key`: mail
    servers log it, and a code has so few digits that a plain digest would tell it.

    Raises NotDelivered (permanent) when a header could carry a second one.
    """
    try:
        for text, what in ((message.subject, "the subject"), (message.to, "the address")):
            _refuse_control(text, what)
        to = Address(addr_spec=message.to)
        mail = EmailMessage(policy=POLICY)
        mail["From"] = sender
        mail["To"] = to
        _set_subject(mail, message.subject)
        mail["Date"] = localtime()
        mail["Message-ID"] = f"<{identity_of(message, key)}@{address_of(sender).rpartition('@')[2]}>"
        mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: no vacation replies
        mail.set_content(message.text, cte=None if _plain(message.text) else "quoted-printable")
        if message.html is not None:
            mail.add_alternative(message.html, subtype="html", cte="quoted-printable")
        _check_head(mail)
    except (ValueError, IndexError) as exc:
        raise NotDelivered(f"the mail cannot be written: {exc}", permanent=True) from exc
    return mail


def _set_subject(mail: EmailMessage, subject: str) -> None:
    """As it is read. `EmailMessage` would decode an encoded word that stands in the text, and write the line break
    that may be hidden in it (`=?utf-8?q?x=0D=0ABcc:_eve?=`) as a line break: such a text is encoded here, as a whole.
    """
    if "=?" not in subject:
        mail["Subject"] = subject
        return
    encoded = Header(subject, "utf-8", maxlinelen=MAX_ENCODED_LINE, header_name="Subject")
    mail.set_raw("Subject", encoded.encode(linesep="\r\n"))


def _check_head(mail: EmailMessage) -> None:
    """What goes out has the headers that were set, and no others. Raises ValueError."""
    head, _, _ = mail.as_bytes().partition(b"\r\n\r\n")
    lines = [line for line in re.split(rb"\r\n|\r|\n", head) if not line.startswith((b" ", b"\t"))]
    names = sorted(line.partition(b":")[0].decode("ascii").lower() for line in lines)
    if names != sorted(name.lower() for name in mail.keys()):  # noqa: SIM118 - repeated names count
        raise ValueError("a header would bring another one")


def identity_of(message: Message, key: bytes) -> str:
    """32 hexadecimal digits that are the same for the same message, and tell nothing of it to who has not the key."""
    parts = (message.kind, message.to, message.subject, message.text, message.share_id or "")
    whole = "\0".join((*parts, str(message.expires)))
    return hmac.digest(key, whole.encode(), "sha256").hex()[:32]


def _plain(text: str) -> bool:
    """Goes as it is: readable in an .eml file, links unbroken."""
    return text.isascii() and all(len(line) <= 998 for line in text.splitlines())


def _refuse_control(text: str, what: str) -> None:
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise ValueError(f"{what} has a control character")
