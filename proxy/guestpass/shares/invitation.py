"""The mail that brings a recipient their link."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from guestpass.model import Recipient, Share
from guestpass.plugin import Message


def invitation(share: Share, recipient: Recipient, link: str) -> Message:
    """`link` is a secret: the message is kept only until it is delivered or given up."""
    context = {
        "owner": share.owner,
        "name": share.name,
        "message": share.message,
        "email": recipient.email,
        "link": link,
        "expires": None if share.expires is None else _readable(share.expires),
    }
    return Message(
        kind="invitation",
        to=recipient.email,
        subject=f"{share.owner} shared “{share.name}” with you",
        text=_templates().get_template("invitation.txt").render(context),
        html=_templates().get_template("invitation.html").render(context),
        share_id=share.id,
        recipient_id=recipient.id,
        expires=share.expires,
    )


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("guestpass.shares", "templates"),
        autoescape=lambda template: template is not None and template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _readable(at: float) -> str:
    """The same in every language and time zone."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
