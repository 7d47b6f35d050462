"""A real SMTP server (aiosmtpd) that keeps what it is sent, for a test to read as the recipient would."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

from aiosmtpd.controller import Controller
from support.programs import free_port

LINK = re.compile(r"https?://[^\s<>\"]+/s/[^\s<>\"]+")
CODE = re.compile(r"(?<!\d)(\d{4})[ -]?(\d{4})(?!\d)")


class MailServer:
    """Mailboxes by recipient. `take` gives each mail once, in the order of arrival."""

    def __init__(self) -> None:
        self.port = 0
        self._arrived = threading.Condition()
        self._boxes: dict[str, list[EmailMessage]] = {}

    @property
    def url(self) -> str:
        return f"smtp://127.0.0.1:{self.port}?tls=none"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        message = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        with self._arrived:
            for recipient in envelope.rcpt_tos:
                self._boxes.setdefault(recipient, []).append(message)
            self._arrived.notify_all()
        return "250 kept"

    def take(self, recipient: str, *, seconds: float = 15) -> EmailMessage:
        """The next mail to this address; waits for it."""
        with self._arrived:
            arrived = self._arrived.wait_for(lambda: self._boxes.get(recipient), timeout=seconds)
            assert arrived, f"no mail to {recipient} within {seconds:g} s"
            return self._boxes[recipient].pop(0)

    def is_empty(self) -> bool:
        with self._arrived:
            return not any(self._boxes.values())


def text_of(message: EmailMessage) -> str:
    body = message.get_body(("plain",))
    assert body is not None
    return str(body.get_content())


def link_in(message: EmailMessage) -> str:
    found = LINK.search(text_of(message))
    assert found is not None, f"no link in the mail {message['Subject']!r}"
    return found[0]


def code_in(message: EmailMessage) -> str:
    found = CODE.search(text_of(message))
    assert found is not None, f"no code in the mail {message['Subject']!r}"
    return found[1] + found[2]


@contextmanager
def mail_server() -> Iterator[MailServer]:
    server = MailServer()
    server.port = free_port()
    controller = Controller(server, hostname="127.0.0.1", port=server.port)
    controller.start()
    try:
        yield server
    finally:
        controller.stop()
