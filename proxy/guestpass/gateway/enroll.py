"""Enrolment: a key of the gateway's own, and a join token that registers its public half at the edge, once.

The key is on disk before the edge hears of it: if the answer is lost, the same command registers the same key again,
which the edge takes for what it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h11
import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from guestpass.errors import (
    ConfigError,
    Conflict,
    EdgeUnreachable,
    GuestpassError,
    Invalid,
    JoinTokenRejected,
)
from guestpass.gateway import dial
from guestpass.mux.handshake import SOFTWARE, encode_bytes

PATH = "/api/v1/gateways/enroll"

# From the request to the last byte of the answer, after the connection is there.
ANSWER_TIMEOUT = 20.0

# An answer is three names, or a problem; more is not from an edge.
MAX_ANSWER = 64 * 1024


@dataclass(frozen=True, slots=True)
class EnrollResult:
    site: str
    edge_name: str
    key_id: str
    """First half of the public key's SHA-256, hex: for people who compare."""


async def enroll(
    edge_url: str,
    join_token: str,
    name: str,
    key_path: Path,
    ca: Path | None = None,
    http_proxy: str | None = None,
) -> EnrollResult:
    """Register this gateway as `name`. Raises ConfigError, EdgeUnreachable, JoinTokenRejected, Conflict, Invalid."""
    edge = dial.edge_at(edge_url, ca=ca, http_proxy=http_proxy)
    public = load_or_create_key(key_path).public_key().public_bytes_raw()
    body = orjson.dumps({"join_token": join_token, "name": name, "public_key": encode_bytes(public)})
    status, answer = await _post(edge, urlsplit(edge_url).path.rstrip("/") + PATH, body)
    if status not in (200, 201):
        raise _problem(status, answer, edge)
    try:
        site, edge_name = answer["site"], answer["edge"]
    except (KeyError, TypeError) as exc:
        raise _not_an_edge(edge, status) from exc
    if not isinstance(site, str) or not isinstance(edge_name, str):
        raise _not_an_edge(edge, status)
    return EnrollResult(site, edge_name, key_id(public))


def key_id(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()[:32]


def load_key(path: Path) -> Ed25519PrivateKey:
    """Raises ConfigError."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError as exc:
        raise ConfigError(
            f"{path}: there is no such key",
            hint="`guestpass gateway enroll` makes it and registers it at the edge.",
        ) from exc
    except OSError as exc:
        raise ConfigError(
            f"{path}: the key cannot be read: {exc.strerror}", hint="Check its owner and rights."
        ) from exc
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise ConfigError(f"{path} is not a private key in PEM without a password") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key", hint="`guestpass gateway enroll` makes one.")
    return key


def load_or_create_key(path: Path) -> Ed25519PrivateKey:
    """The key in `path`, made if there is no such file; never overwrites. Raises ConfigError."""
    if path.exists():
        return load_key(path)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # Complete under another name first, so that no half-written key is ever found; link() refuses to overwrite.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:  # another process was quicker: theirs counts
            return load_key(path)
        finally:
            partial.unlink()
        _sync_folder(path.parent)
    except OSError as exc:
        raise ConfigError(f"{path}: the key cannot be written: {exc.strerror}") from exc
    return key


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


async def _post(edge: dial.Edge, path: str, body: bytes) -> tuple[int, Any]:
    """(status, JSON) of the answer. Raises EdgeUnreachable."""
    reader = asyncio.StreamReader()
    transport, _ = await dial.connect(edge, lambda: asyncio.StreamReaderProtocol(reader))
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_ANSWER)
    request = h11.Request(
        method="POST",
        target=path,
        headers=[
            ("Host", edge.authority),
            ("User-Agent", SOFTWARE),
            ("Accept", "application/json"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ],
    )
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            for event in (request, h11.Data(data=body), h11.EndOfMessage()):
                transport.write(parser.send(event) or b"")
            return await _answer(reader, parser, edge)
    except TimeoutError as exc:
        raise EdgeUnreachable(
            f"{edge.url}: no answer within {ANSWER_TIMEOUT:.0f} s", hint="Try again."
        ) from exc
    except h11.RemoteProtocolError as exc:
        raise _not_an_edge(edge, None) from exc
    except OSError as exc:
        raise dial.translate(exc, edge) from exc
    finally:
        transport.abort()


async def _answer(reader: asyncio.StreamReader, parser: h11.Connection, edge: dial.Edge) -> tuple[int, Any]:
    status = 0
    content = bytearray()
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            parser.receive_data(await reader.read(MAX_ANSWER))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > MAX_ANSWER:
                raise _not_an_edge(edge, status)
        elif isinstance(event, h11.EndOfMessage):
            break
        elif not isinstance(event, h11.InformationalResponse):
            raise h11.RemoteProtocolError("the connection was closed before the answer's end")
    try:
        return status, orjson.loads(bytes(content))
    except orjson.JSONDecodeError:
        return status, None


def _problem(status: int, answer: Any, edge: dial.Edge) -> GuestpassError:
    """The edge's problem details (RFC 9457) as the exception that it was there."""
    if not isinstance(answer, dict) or not isinstance(answer.get("code"), str):
        return _not_an_edge(edge, status)
    message = str(answer.get("detail") or answer.get("title") or f"status {status}")
    kind: type[GuestpassError] = Invalid
    if status == JoinTokenRejected.status:
        kind = JoinTokenRejected
    elif status == Conflict.status:
        kind = Conflict
    elif status >= 500:
        kind = EdgeUnreachable
    return kind(message, hint=str(answer.get("hint") or ""), code=answer["code"])


def _not_an_edge(edge: dial.Edge, status: int | None) -> EdgeUnreachable:
    what = f"the answer ({status})" if status is not None else "the answer"
    return EdgeUnreachable(
        f"{edge.url}: {what} is not from a Guestpass edge",
        hint="Check the URL: it is the edge's public one, without a path.",
        code="not_an_edge",
    )
