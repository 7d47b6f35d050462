"""`smtp`: hands messages to a mail server.

A server's 5xx about the recipient or the message is final: the owner sees its words. Everything else (4xx, a broken
connection, a wrong password, a sender that the server does not want) may be repaired meanwhile and is tried again.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

import aiosmtplib
from pydantic import AfterValidator, model_validator

from guestpass.plugin import (
    ConfigPath,
    Host,
    Message,
    NotDelivered,
    Notifier,
    PluginConfig,
    Secret,
    is_loopback,
)
from guestpass_plugins.notify.letter import KEY_PURPOSE, address_of, check_sender, letter

__all__ = ["Smtp"]

# For each step of the dialogue. RFC 5321 (4.5.3.2) allows minutes, for relays that queue; who waits here is a person.
TIMEOUT_SECONDS = 20.0

Tls = Literal["starttls", "none", "tls"]
DEFAULT_PORTS: dict[Tls, int] = {"starttls": 587, "none": 25, "tls": 465}


@dataclass(frozen=True, slots=True)
class Server:
    """What an smtp[s]:// URL says."""

    host: str
    port: int
    tls: Tls
    user: str | None
    password: str | None


def parse_url(url: str) -> Server:
    """`smtp[s]://[user:password@]host[:port][?tls=starttls|none|tls]`. Without `tls`, smtp:// must be able to STARTTLS,
    except to this machine. Raises ValueError, which does not repeat the URL: it may hold a password."""
    parts = urlsplit(url)
    if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
        raise ValueError("the mail server is not of the form smtp://USER:PASSWORD@HOST:587?tls=starttls")
    if parts.path.strip("/") or parts.fragment:
        raise ValueError(
            "the mail server's URL has a path; encode '/', '?' and '#' in a password as %2F, %3F, %23"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    asked = options.pop("tls", None)
    if options:
        raise ValueError(
            f"the mail server's URL has an unknown option {next(iter(options))!r}; the only one is tls"
        )
    tls: Tls
    if asked is None:
        tls = "tls" if parts.scheme == "smtps" else "none" if is_loopback(parts.hostname) else "starttls"
    elif asked == "starttls":
        tls = "starttls"
    elif asked == "none":
        tls = "none"
    elif asked == "tls":
        tls = "tls"
    else:
        raise ValueError(f"tls={asked} is unknown; use one of {', '.join(get_args(Tls))}")
    if parts.scheme == "smtps" and tls != "tls":
        raise ValueError("smtps:// is TLS from the first byte; use smtp:// with tls=starttls or tls=none")
    try:
        port = parts.port
    except ValueError as exc:
        raise ValueError("the mail server's port is not a number up to 65535") from exc
    return Server(
        host=parts.hostname,
        port=DEFAULT_PORTS[tls] if port is None else port,
        tls=tls,
        user=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
    )


class Smtp(Notifier):
    class Config(PluginConfig):
        url: Secret
        sender: Annotated[str, AfterValidator(check_sender)]
        password: Secret | None = None  # instead of one in the URL
        ca: ConfigPath | None = None  # trust only this CA for the server

        @model_validator(mode="after")
        def _consistent(self) -> Smtp.Config:
            server = parse_url(self.url.get_secret_value())
            if (self.password is not None or server.password is not None) and server.user is None:
                raise ValueError("there is a password but no user: smtp://USER@HOST")
            if server.user is not None and server.tls == "none" and not is_loopback(server.host):
                raise ValueError("tls=none would send the password in the clear; use tls=starttls or tls=tls")
            return self

    async def start(self, host: Host) -> None:
        """Raises OSError for a CA file that does not load. The server itself may be down now and up later."""
        await super().start(host)
        self._key = host.derive_key(KEY_PURPOSE)
        ca: Path | None = self.config.ca
        self._server = parse_url(self.config.url.get_secret_value())
        self._tls = None if self._server.tls == "none" else ssl.create_default_context(cafile=ca)
        if self.config.password is not None:
            self._password: str | None = self.config.password.get_secret_value()
        else:
            self._password = self._server.password
        self._from = address_of(self.config.sender)

    async def deliver(self, message: Message) -> str:
        mail, server = letter(message, self.config.sender, self._key), self._server
        client = aiosmtplib.SMTP(
            hostname=server.host,
            port=server.port,
            username=server.user,
            password=self._password,
            use_tls=server.tls == "tls",
            start_tls=server.tls == "starttls",
            tls_context=self._tls,
            timeout=TIMEOUT_SECONDS,
            # The default asks the resolver for this machine's name, and tells it to everybody.
            local_hostname=self._from.rpartition("@")[2],
        )
        try:
            async with client:
                _, receipt = await client.send_message(mail, sender=self._from, recipients=[message.to])
        except aiosmtplib.SMTPRecipientsRefused as exc:
            refused = exc.recipients[0]
            raise _refused(refused.code, refused.message) from exc
        except (aiosmtplib.SMTPRecipientRefused, aiosmtplib.SMTPDataError) as exc:
            raise _refused(exc.code, exc.message) from exc
        except aiosmtplib.SMTPAuthenticationError as exc:
            raise NotDelivered(
                f"{server.host} refused the user or password: {exc.code} {exc.message}", permanent=False
            ) from exc
        except aiosmtplib.SMTPResponseException as exc:
            raise NotDelivered(f"{server.host}: {exc.code} {exc.message}", permanent=False) from exc
        except (aiosmtplib.SMTPException, OSError) as exc:
            raise NotDelivered(f"{server.host}:{server.port}: {exc}", permanent=False) from exc
        return receipt


def _refused(code: int, said: str) -> NotDelivered:
    return NotDelivered(f"{code} {said}", permanent=500 <= code < 600)
