"""What both ends of a tunnel write and read: mux/SPEC.md, 1., 2., 7., 9. and 11. For gateway.py and conformance.py."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import struct
from typing import Any, Protocol

PATH, SUBPROTOCOL = "/.guestpass/tunnel", "guestpass.v1"

DATA, OPEN, HEAD, TRAILERS, CREDIT, RESET, RESET_ACK, PING, PONG, GOAWAY, HELLO, AUTH, INFO = range(13)
FIN, INTERIM = 1, 2
LAST_ID = 2**30 - 1

# Least and most payload of each type; those from PING on belong to the tunnel, stream 0.
LEAST = (0, 4, 2, 0, 8, 4, 0, 8, 8, 8, 0, 0, 0)
MOST = (16_368, 65_535, 65_535, 32_768, 8, 4, 0, 8, 8, 8, 16_384, 16_384, 65_535)
SIZES = tuple(zip(LEAST, MOST, strict=True))
MAX_DATA, MAX_HEAD, FLOOR = 16_368, 32_768, 32_768

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, LIMIT_EXCEEDED, CANCEL, REVOKED = range(7)
REFUSED, UNREACHABLE, BAD_UPSTREAM, TIMEOUT, AUTH_FAILED, REPLACED, DRAINING, OVERLOADED = range(7, 15)

PING_AFTER, DEAD_AFTER = 3.0, 6.0

# Certificates are hashed by the function of their signature; these are its algorithms (OIDs, in DER). Others: SHA-256.
HASHES = {
    "2a864886f70d01010c": "sha384",  # sha384WithRSAEncryption
    "2a864886f70d01010d": "sha512",  # sha512WithRSAEncryption
    "2a8648ce3d040303": "sha384",  # ecdsa-with-SHA384
    "2a8648ce3d040304": "sha512",  # ecdsa-with-SHA512
}

FIELD = re.compile(rb"[!#-'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")
# Fields of one connection only; and Host, in whose place a service sees its own name.
DROPPED = re.compile(
    rb"(connection|keep-alive|proxy-[^:]*|te|transfer-encoding|upgrade|host):", re.IGNORECASE
)


class Wrong(Exception):
    """The peer broke a rule: error code, reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Carrier(Protocol):
    """See websocket.py."""

    heard: float

    async def read(self, size: int) -> bytes: ...
    def write(self, data: bytes) -> None: ...
    def abort(self, reason: str) -> None: ...


def require(rule: object, code: int, reason: str) -> None:
    if not rule:
        raise Wrong(code, reason)


def frame(kind: int, number: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">HBBI", len(payload), kind, flags, number) + payload


def document(kind: int, fields: dict[str, Any]) -> bytes:
    """HELLO, AUTH or INFO."""
    return frame(kind, 0, json.dumps(fields).encode())


def u64(kind: int, value: int, number: int = 0) -> bytes:
    return frame(kind, number, struct.pack(">Q", value))


def goaway(last: int, code: int) -> bytes:
    return frame(GOAWAY, 0, struct.pack(">II", last, code))


def reset(number: int, code: int) -> bytes:
    return frame(RESET, number, struct.pack(">I", code))


async def read_frame(carrier: Carrier) -> tuple[int, int, int, bytes]:
    """(type, flags, stream id, payload) of the next frame, its header checked before its payload is waited for."""
    size, kind, flags, number = struct.unpack(">HBBI", await carrier.read(8))
    require(not number >> 31, PROTOCOL_ERROR, "bit 31 of a stream id is set")
    if kind <= INFO:
        require(
            SIZES[kind][0] <= size <= SIZES[kind][1], PROTOCOL_ERROR, "a frame's length is wrong for its type"
        )
        require((kind >= PING) == (number == 0), PROTOCOL_ERROR, "a frame's stream id is wrong for its type")
    return kind, flags, number, await carrier.read(size)


def read_open(payload: bytes) -> tuple[str, bytes, bytes]:
    """(service, request head, first body bytes) of OPEN."""
    at = payload[0] + 4
    name, size = payload[1 : at - 3], int.from_bytes(payload[at - 2 : at], "big")
    require(size <= MAX_HEAD, LIMIT_EXCEEDED, "a head that is too long")
    require(len(payload) >= at + size and re.fullmatch(rb"[ -~]+", name), PROTOCOL_ERROR, "a malformed OPEN")
    return name.decode(), payload[at : at + size], payload[at + size :]


def read_head(head: bytes) -> list[bytes]:
    """The lines of a head, down to its empty one, without the fields of one connection only. ValueError."""
    lines = head.split(b"\r\n")
    if lines[-2:] != [b"", b""] or not 3 <= len(lines) <= 131 or not all(map(FIELD.fullmatch, lines[1:-2])):
        raise ValueError("a malformed head")
    return [line for line in lines if not DROPPED.match(line)]


async def stay_alive(carrier: Carrier) -> None:
    """PING after 3 s of silence, the end after 6."""
    clock = asyncio.get_running_loop().time
    while True:
        before = clock()
        await asyncio.sleep(1)
        if clock() - before > PING_AFTER:  # it was this end that did not run
            carrier.heard = clock() - PING_AFTER
        if clock() - carrier.heard >= DEAD_AFTER:
            carrier.abort(f"nothing was heard for {DEAD_AFTER:.0f} s")
        elif clock() - carrier.heard >= PING_AFTER:
            carrier.write(u64(PING, 1))


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unbase64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4))


def certificate_hash(der: bytes) -> bytes:
    """Empty without TLS."""
    name = next((name for oid, name in HASHES.items() if bytes.fromhex(oid) in der), "sha256")
    return hashlib.new(name, der).digest() if der else b""


def hello(role: str, nonce: bytes, epoch: str, floor: int, max_streams: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"version": 1, "role": role, "software": "examples", "epoch": epoch}
    return {**fields, "nonce": base64url(nonce), "floor": floor, "max_streams": max_streams}


def proof(
    key: Any, hello: dict[str, Any], nonce: bytes, site: str, name: str, epoch: str, der: bytes
) -> dict[str, Any]:
    """The gateway's AUTH. `key`: an Ed25519PrivateKey; `hello`: the edge's; `nonce`, `epoch`: as in the own HELLO;
    `der`: the edge's certificate."""
    public, hashed = key.public_key().public_bytes_raw(), certificate_hash(der)
    parts = (hello["edge"].encode(), unbase64url(hello["nonce"]), nonce, site.encode(), name.encode(), public)
    signed = b"guestpass tunnel v1\0"
    for part in (*parts, epoch.encode(), hashed):
        signed += struct.pack(">H", len(part)) + part
    fields = {"step": "proof", "site": site, "name": name, "key": base64url(public)}
    return {**fields, "certificate": base64url(hashed), "signature": base64url(key.sign(signed))}
