"""What is said before streams may be opened: the WebSocket upgrade, HELLO, and the gateway's proof. No I/O.

    gateway                                        edge
      GET /.guestpass/tunnel, Upgrade ───────────▶
      ◀─────────────────────────── 101 Switching Protocols
      HELLO {nonce, epoch, …} ───────────────────▶        both speak at once, neither waits
      ◀──────────────────────────── HELLO {nonce, edge, …}
      AUTH {step: proof, key, signature, …} ─────▶        signs both nonces, both names and the certificate it saw
      ◀──────────────────── AUTH {step: verdict, ok}

The formats are those of SPEC.md, chapters 1 and 7.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import h11
import orjson
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from guestpass._version import VERSION
from guestpass_speedups.session import FLOOR, MAX_STREAMS, ErrorCode

PATH = "/.guestpass/tunnel"
SUBPROTOCOL = "guestpass.v1"
PROTOCOL_VERSION = 1
SOFTWARE = f"guestpass/{VERSION}"

# RFC 6455 section 1.3.
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

LABEL = b"guestpass tunnel v1\0"
NONCE_SIZE = 32
MAX_EPOCH = 2**64 - 1

# A proof names a site and a gateway, as the configuration allows them (63); this leaves room for other software's.
MAX_NAME = 255

# A handshake's response head has a dozen fields; proxies on the way add some.
MAX_UPGRADE_HEAD = 16 * 1024


class HandshakeError(Exception):
    """The peer's handshake is wrong. `code` ends the tunnel; `reason` is for the log."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class UpgradeRefused(Exception):
    """The upgrade request, or its answer, is not what it must be. `status` is the HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


# ── WebSocket upgrade (RFC 6455 section 4) ───────────────────────────────────────────────────────────────────────


def new_websocket_key() -> str:
    return base64.b64encode(secrets.token_bytes(16)).decode("ascii")


def accept_key(key: str) -> str:
    """Sec-WebSocket-Accept for a Sec-WebSocket-Key."""
    return base64.b64encode(
        hashlib.sha1(key.encode("ascii") + WEBSOCKET_GUID, usedforsecurity=False).digest()
    ).decode("ascii")


def upgrade_request(host: str, key: str) -> bytes:
    """`host` is the authority of the edge's URL."""
    return (
        f"GET {PATH} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n"
        f"User-Agent: {SOFTWARE}\r\n\r\n"
    ).encode("ascii")


def upgrade_response(key: str) -> bytes:
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept_key(key)}\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
    ).encode("ascii")


def check_upgrade_request(head: bytes) -> str:
    """The Sec-WebSocket-Key of a good handshake. Raises UpgradeRefused (400, 426)."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_UPGRADE_HEAD)
    try:
        parser.receive_data(head)
        request = parser.next_event()
    except h11.RemoteProtocolError as exc:
        raise UpgradeRefused(400, f"malformed request: {exc}") from exc
    if not isinstance(request, h11.Request):
        raise UpgradeRefused(400, "the request head is not complete")
    if request.method != b"GET" or request.target != PATH.encode("ascii") or request.http_version != b"1.1":
        raise UpgradeRefused(400, f"a tunnel begins with GET {PATH} HTTP/1.1")
    if b"content-length" in _names(request.headers) or b"transfer-encoding" in _names(request.headers):
        raise UpgradeRefused(400, "a handshake has no body")
    if "websocket" not in _tokens(request.headers, b"upgrade") or "upgrade" not in _tokens(
        request.headers, b"connection"
    ):
        raise UpgradeRefused(426, "the Upgrade is missing: an HTTP proxy on the way may have dropped it")
    if _values(request.headers, b"sec-websocket-version") != ["13"]:
        raise UpgradeRefused(426, "WebSocket version 13 is spoken here")
    if SUBPROTOCOL not in _tokens(request.headers, b"sec-websocket-protocol"):
        raise UpgradeRefused(400, f"the WebSocket subprotocol is {SUBPROTOCOL}")
    keys = _values(request.headers, b"sec-websocket-key")
    try:
        if len(keys) != 1 or len(base64.b64decode(keys[0], validate=True)) != 16:
            raise UpgradeRefused(400, "Sec-WebSocket-Key is not 16 bytes in base64")
    except binascii.Error as exc:
        raise UpgradeRefused(400, "Sec-WebSocket-Key is not base64") from exc
    return keys[0]


def check_upgrade_response(head: bytes, key: str) -> None:
    """Whether the answer to `upgrade_request` opens the tunnel. Raises UpgradeRefused with the status of the answer,
    or 0 if it is not HTTP."""
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_UPGRADE_HEAD)
    parser.send(
        h11.Request(
            method="GET",
            target=PATH,
            headers=[("Host", "edge"), ("Upgrade", "websocket"), ("Connection", "Upgrade")],
        )
    )
    try:
        parser.receive_data(head)
        response = parser.next_event()
    except h11.RemoteProtocolError as exc:
        raise UpgradeRefused(0, f"the answer is not HTTP: {exc}") from exc
    if not isinstance(response, h11.InformationalResponse | h11.Response):
        raise UpgradeRefused(0, "the answer is not an HTTP response")
    if response.status_code != 101:
        raise UpgradeRefused(
            response.status_code, f"the answer is {response.status_code} instead of 101 Switching Protocols"
        )
    if "websocket" not in _tokens(response.headers, b"upgrade") or _values(
        response.headers, b"sec-websocket-accept"
    ) != [accept_key(key)]:
        raise UpgradeRefused(101, "the answer does not fit the WebSocket handshake")
    if _values(response.headers, b"sec-websocket-protocol") != [SUBPROTOCOL]:
        raise UpgradeRefused(101, f"the answer does not agree on the subprotocol {SUBPROTOCOL}")
    if _values(response.headers, b"sec-websocket-extensions"):
        raise UpgradeRefused(101, "the answer has a WebSocket extension that nobody asked for")


def _names(headers: Any) -> frozenset[bytes]:
    return frozenset(name for name, _ in headers)


def _values(headers: Any, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in headers if key == name]


def _tokens(headers: Any, name: bytes) -> list[str]:
    found = [token.strip() for value in _values(headers, name) for token in value.split(",")]
    return found if name == b"sec-websocket-protocol" else [token.lower() for token in found]


# ── HELLO ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Hello:
    """HELLO of either side. `edge` is empty in a gateway's."""

    role: str
    epoch: int
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(NONCE_SIZE))
    edge: str = ""
    version: int = PROTOCOL_VERSION
    software: str = SOFTWARE
    max_streams: int = MAX_STREAMS
    floor: int = FLOOR

    def encode(self) -> bytes:
        fields: dict[str, Any] = {
            "version": self.version,
            "role": self.role,
            "software": self.software,
            "max_streams": self.max_streams,
            "floor": self.floor,
            "epoch": str(self.epoch),
            "nonce": encode_bytes(self.nonce),
        }
        if self.role == "edge":
            fields["edge"] = self.edge
        return orjson.dumps(fields)

    @classmethod
    def decode(cls, payload: bytes, *, role: str) -> Hello:
        """The peer's, which must be a `role`. Raises HandshakeError."""
        fields = decode_object(payload, "HELLO")
        version = _integer(fields, "version", 1, 1 << 31)
        if version < PROTOCOL_VERSION:
            raise HandshakeError(
                ErrorCode.PROTOCOL_ERROR,
                f"the peer speaks version {version} of the protocol, this one {PROTOCOL_VERSION}",
            )
        if _text(fields, "role", 16) != role:
            raise HandshakeError(
                ErrorCode.PROTOCOL_ERROR, f"the peer is not a{'n' if role == 'edge' else ''} {role}"
            )
        epoch = _text(fields, "epoch", 20)
        if not re.fullmatch(r"0|[1-9][0-9]*", epoch, re.ASCII) or int(epoch) > MAX_EPOCH:
            raise HandshakeError(ErrorCode.PROTOCOL_ERROR, "the epoch in HELLO is not a number of 64 bits")
        nonce = decode_bytes(fields, "nonce")
        if len(nonce) != NONCE_SIZE:
            raise HandshakeError(ErrorCode.PROTOCOL_ERROR, f"the nonce in HELLO is not {NONCE_SIZE} bytes")
        return cls(
            role=role,
            epoch=int(epoch),
            nonce=nonce,
            edge=_text(fields, "edge", MAX_NAME) if role == "edge" else "",
            version=version,
            software=_text(fields, "software", MAX_NAME) if "software" in fields else "",
            max_streams=_integer(fields, "max_streams", 1, 1 << 20)
            if "max_streams" in fields
            else MAX_STREAMS,
            floor=_integer(fields, "floor", 1024, 1 << 30) if "floor" in fields else FLOOR,
        )


# ── AUTH ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Proof:
    """The gateway's AUTH. `certificate` is the hash of the certificate that it saw, empty without TLS."""

    site: str
    name: str
    key: bytes
    certificate: bytes
    signature: bytes

    def encode(self) -> bytes:
        return orjson.dumps(
            {
                "step": "proof",
                "site": self.site,
                "name": self.name,
                "key": encode_bytes(self.key),
                "certificate": encode_bytes(self.certificate),
                "signature": encode_bytes(self.signature),
            }
        )

    @classmethod
    def decode(cls, fields: Mapping[str, Any]) -> Proof:
        """Raises HandshakeError."""
        return cls(
            site=_text(fields, "site", MAX_NAME),
            name=_text(fields, "name", MAX_NAME),
            key=decode_bytes(fields, "key"),
            certificate=decode_bytes(fields, "certificate") if "certificate" in fields else b"",
            signature=decode_bytes(fields, "signature"),
        )

    @classmethod
    def sign(
        cls,
        private: Ed25519PrivateKey,
        *,
        site: str,
        name: str,
        certificate: bytes,
        edge: Hello,
        gateway: Hello,
    ) -> Proof:
        key = private.public_key().public_bytes_raw()
        signature = private.sign(_transcript(edge, gateway, site, name, key, certificate))
        return cls(site, name, key, certificate, signature)

    def holds(self, edge: Hello, gateway: Hello) -> bool:
        """Whether the signature is by `key` over this very handshake."""
        try:
            public = Ed25519PublicKey.from_public_bytes(self.key)
            public.verify(
                self.signature, _transcript(edge, gateway, self.site, self.name, self.key, self.certificate)
            )
        except (InvalidSignature, ValueError):
            return False
        return True


def _transcript(edge: Hello, gateway: Hello, site: str, name: str, key: bytes, certificate: bytes) -> bytes:
    parts = (
        edge.edge.encode(),
        edge.nonce,
        gateway.nonce,
        site.encode(),
        name.encode(),
        key,
        str(gateway.epoch).encode("ascii"),
        certificate,
    )
    return LABEL + b"".join(len(part).to_bytes(2, "big") + part for part in parts)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The edge's AUTH. `code` is for scripts, `message` for people; both empty if it is a yes."""

    ok: bool
    code: str = ""
    message: str = ""

    def encode(self) -> bytes:
        fields: dict[str, Any] = {"step": "verdict", "ok": self.ok}
        if not self.ok:
            fields |= {"code": self.code, "message": self.message}
        return orjson.dumps(fields)

    @classmethod
    def decode(cls, fields: Mapping[str, Any]) -> Verdict:
        """Raises HandshakeError."""
        ok = fields.get("ok")
        if not isinstance(ok, bool):
            raise HandshakeError(ErrorCode.PROTOCOL_ERROR, 'the verdict has no "ok"')
        return cls(
            ok,
            code="" if ok else _text(fields, "code", MAX_NAME) if "code" in fields else "refused",
            message="" if ok else _text(fields, "message", 1024) if "message" in fields else "",
        )


def certificate_hash(der: bytes) -> bytes:
    """`tls-server-end-point` of a certificate (RFC 5929 section 4.1): its hash by the function of its own signature,
    but SHA-256 where that is MD5, SHA-1, or unknown (as for Ed25519)."""
    try:
        algorithm = x509.load_der_x509_certificate(der).signature_hash_algorithm
        name = algorithm.name if algorithm is not None else "sha256"
    except (ValueError, UnsupportedAlgorithm):
        name = "sha256"
    if name not in ("sha256", "sha384", "sha512"):
        name = "sha256"
    return hashlib.new(name, der).digest()


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def decode_object(payload: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises HandshakeError."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError as exc:
        raise HandshakeError(ErrorCode.PROTOCOL_ERROR, f"{what} is not JSON") from exc
    if not isinstance(value, dict):
        raise HandshakeError(ErrorCode.PROTOCOL_ERROR, f"{what} is not a JSON object")
    return value


def encode_bytes(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode("ascii")


def decode_bytes(fields: Mapping[str, Any], name: str) -> bytes:
    """base64url with or without padding. Raises HandshakeError."""
    text = _text(fields, name, 512).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as exc:
        raise HandshakeError(ErrorCode.PROTOCOL_ERROR, f'"{name}" is not base64url') from exc


def _text(fields: Mapping[str, Any], name: str, limit: int) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or len(value) > limit:
        raise HandshakeError(ErrorCode.PROTOCOL_ERROR, f'"{name}" is missing, too long, or not a string')
    return value


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise HandshakeError(
            ErrorCode.PROTOCOL_ERROR, f'"{name}" is missing or not a number from {low} to {high}'
        )
    return value
