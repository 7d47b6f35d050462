"""What the bundled webhooks have in common: how a message is signed, sent, sent again, and verified.

The form is that of Standard Webhooks (https://www.standardwebhooks.com), for which many languages have a library:

    webhook-id: msg_2b…             the same when a message is sent again: what to look for repetitions by
    webhook-timestamp: 1785585600   seconds since the epoch, of this attempt
    webhook-signature: v1,K5oZ…     base64 of HMAC-SHA256 over "ID.TIMESTAMP.BODY" with the decoded secret

The body is JSON: `type`, `timestamp` (RFC 3339) and `data`. docs/webhooks.md tells people who write receivers.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from random import SystemRandom
from typing import Annotated, Any
from urllib.parse import urlsplit

import aiohttp
import orjson
from pydantic import AfterValidator, Field, SecretStr

from guestpass.plugin import Host, Incoming, PluginConfig, Secret, is_loopback

__all__ = ["Endpoint", "NotSent", "Response", "Signer", "Url", "in_rfc3339", "new_id", "pauses", "send"]

SECRET_PREFIX = "whsec_"
# Standard Webhooks asks for 24 to 64 bytes.
SECRET_BYTES = (24, 64)
# Older or newer messages are refused: whoever records one cannot use it later.
TOLERANCE = 300.0

# An answer says yes, no, or why not.
MAX_RESPONSE = 64 * 1024

# Pauses before a message is sent again: 1, 4, 16, 64, 256 seconds and so on, each shortened by chance to between a half
# and the whole, so that the messages of an outage do not come back all at once.
FIRST_PAUSE, GROWTH, LONGEST_PAUSE = 1.0, 4.0, 600.0

_random = SystemRandom()


def _url(value: str) -> str:
    parts = urlsplit(value)
    host = parts.hostname  # which is not what stands before an "@"
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))):
        raise ValueError("must be https:// (http:// only on this machine)")
    return value


def _key(secret: SecretStr) -> SecretStr:
    _decoded(secret)
    return secret


def _decoded(secret: SecretStr) -> bytes:
    try:
        text = secret.get_secret_value().removeprefix(SECRET_PREFIX)
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not SECRET_BYTES[0] <= len(key) <= SECRET_BYTES[1]:
        low, high = SECRET_BYTES
        raise ValueError(f"must be {low} to {high} bytes in base64, as of: openssl rand -base64 32")
    return key


Url = Annotated[str, AfterValidator(_url)]
Key = Annotated[Secret, AfterValidator(_key)]


class Endpoint(PluginConfig):
    """Settings of everything that sends."""

    url: Url
    secret: Key
    timeout: float = Field(default=10.0, gt=0, le=30)


class NotSent(Exception):
    """It did not arrive, or the receiver did not take it. `status` is None when there was no answer."""

    def __init__(self, detail: str, status: int | None = None) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes


class Signer:
    """Signs and verifies with one secret."""

    def __init__(self, secret: SecretStr) -> None:
        self._key = _decoded(secret)

    def signature(self, message_id: str, timestamp: int, body: bytes) -> str:
        signed = f"{message_id}.{timestamp}.".encode() + body
        return "v1," + base64.b64encode(hmac.digest(self._key, signed, "sha256")).decode("ascii")

    def headers(self, message_id: str, now: float, body: bytes) -> dict[str, str]:
        timestamp = int(now)
        return {
            "Content-Type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": self.signature(message_id, timestamp, body),
        }

    def verify(self, call: Incoming, now: float) -> str | None:
        """The message's id; None when it was not signed with this secret, or not within the last minutes."""
        message_id, timestamp = call.header("webhook-id"), call.header("webhook-timestamp")
        signatures = (call.header("webhook-signature") or "").split(" ")
        if not message_id or len(message_id) > 200 or timestamp is None:
            return None
        if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 12):
            return None
        if abs(now - int(timestamp)) > TOLERANCE:
            return None
        expected = self.signature(message_id, int(timestamp), call.body).encode("ascii")
        # Several may be sent while a secret is being changed.
        good = [hmac.compare_digest(given.encode(), expected) for given in signatures[:10]]
        return message_id if any(good) else None


def new_id() -> str:
    return "msg_" + secrets.token_hex(16)


def in_rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def pauses(total: float) -> Iterator[float]:
    """Between attempts, until they add up to `total` seconds."""
    spent, pause = 0.0, FIRST_PAUSE
    while spent < total:
        shortened = pause * _random.uniform(0.5, 1.0)
        yield shortened
        spent += shortened
        pause = min(pause * GROWTH, LONGEST_PAUSE)


async def send(
    host: Host,
    endpoint: Endpoint,
    signer: Signer,
    kind: str,
    data: Mapping[str, Any],
    message_id: str,
    at: float,
) -> Response:
    """One attempt. `at`: when what it tells happened. Raises NotSent for anything but a 2xx within the timeout;
    redirects are not followed, so what is sent goes where it was configured to go."""
    body = orjson.dumps({"type": kind, "timestamp": in_rfc3339(at), "data": data})
    try:
        async with asyncio.timeout(endpoint.timeout):
            async with host.http.post(
                endpoint.url,
                data=body,
                headers=signer.headers(message_id, host.now(), body),
                allow_redirects=False,
            ) as response:
                answer = b""
                while len(answer) <= MAX_RESPONSE and (more := await response.content.read(MAX_RESPONSE)):
                    answer += more
    except TimeoutError as exc:
        raise NotSent(f"no answer within {endpoint.timeout:g} seconds") from exc
    except aiohttp.ClientError as exc:
        raise NotSent(f"{type(exc).__name__}: {exc}") from exc
    if len(answer) > MAX_RESPONSE:
        raise NotSent(f"the answer is larger than {MAX_RESPONSE} bytes")
    if not 200 <= response.status < 300:
        raise NotSent(f"the answer was {response.status}", response.status)
    return Response(response.status, answer)
