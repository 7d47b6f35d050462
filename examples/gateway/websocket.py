"""What mux/SPEC.md, 1. asks of RFC 6455, for asyncio: both ends, as one sequence of bytes each way.

Any WebSocket library would do in its place. This one has no dependencies, and lets conformance.py see and write bytes.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import ssl
import struct
from urllib.parse import urlsplit

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
GOING_AWAY, PROTOCOL_ERROR = 1001, 1002


class Refused(ConnectionError):
    """The answer to the upgrade is not 101."""


def accept(key: bytes) -> bytes:
    return base64.b64encode(hashlib.sha1(key + GUID, usedforsecurity=False).digest())


def field(head: bytes, name: bytes) -> bytes:
    """The value of a field of a head; b"" when there is none."""
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return b""


class Carrier:
    """One connection after its upgrade. `client`: this end masks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, client: bool) -> None:
        self._reader, self._writer, self._client = reader, writer, client
        self._bytes = asyncio.StreamReader()
        self._task = asyncio.create_task(self._unwrap())
        self.heard = asyncio.get_running_loop().time()
        """When the last bytes came, by the loop's clock."""
        self.close_code: int | None = None
        self.reason = "the peer hung up"
        """Why `read` has come to an end."""

    @property
    def certificate(self) -> bytes:
        """The peer's, DER; b"" without TLS."""
        tls = self._writer.get_extra_info("ssl_object")
        return tls.getpeercert(True) or b"" if tls is not None else b""

    async def read(self, size: int) -> bytes:
        """Exactly so many bytes. ConnectionError at the end."""
        try:
            return await self._bytes.readexactly(size)
        except EOFError:
            raise ConnectionError(self.reason) from None

    def write(self, data: bytes) -> None:
        """One binary message; `drain` waits until the transport has room."""
        if not self._writer.is_closing():
            self._writer.write(self.frame(0x80 | BINARY, data))

    async def drain(self) -> None:
        await self._writer.drain()

    def raw(self, data: bytes) -> None:
        """Bytes without any framing."""
        self._writer.write(data)

    def close(self, code: int = 1000) -> None:
        if not self._writer.is_closing():
            self._writer.write(self.frame(0x80 | CLOSE, struct.pack(">H", code)))
        self.abort("closed here")

    def abort(self, reason: str) -> None:
        """What waits in `read` gets ConnectionError(reason)."""
        self._task.cancel()
        self._end(reason)
        self._writer.close()

    def _end(self, reason: str) -> None:
        self.reason = reason
        self._bytes.feed_eof()  # what has come before is still to be read

    def frame(self, first: int, payload: bytes) -> bytes:
        size, mask = len(payload), 0x80 if self._client else 0
        if size < 126:
            head = bytes((first, mask | size))
        elif size < 65_536:
            head = struct.pack(">BBH", first, mask | 126, size)
        else:
            head = struct.pack(">BBQ", first, mask | 127, size)
        if not self._client:
            return head + payload
        key = os.urandom(4)
        return head + key + masked(payload, key)

    async def _unwrap(self) -> None:
        try:
            while True:
                first, size = await self._reader.readexactly(2)
                opcode, size, must_mask = first & 15, size & 127, not self._client
                if first & 0x70 or opcode not in (CONTINUATION, BINARY, CLOSE, PING, PONG):
                    raise ConnectionError("the peer broke RFC 6455")
                if size > 125:
                    size = int.from_bytes(await self._reader.readexactly(2 if size == 126 else 8), "big")
                key = await self._reader.readexactly(4) if must_mask else bytes(4)
                payload = masked(await self._reader.readexactly(size), key)
                self.heard = asyncio.get_running_loop().time()
                if opcode == CLOSE:
                    self.close_code = int.from_bytes(payload[:2], "big") if payload else 1005
                    raise ConnectionError(f"the peer closed the tunnel ({self.close_code})")
                if opcode == PING:
                    self._writer.write(self.frame(0x80 | PONG, payload))
                elif opcode != PONG:
                    self._bytes.feed_data(payload)
        except EOFError:
            self._end("the peer hung up")
        except OSError as exc:
            self._end(str(exc))


def masked(payload: bytes, key: bytes) -> bytes:
    """XOR with the key, over and over; as one big number, because that is fast in Python."""
    size = len(payload)
    mask = int.from_bytes((key * (size // 4 + 1))[:size], "big")
    return (int.from_bytes(payload, "big") ^ mask).to_bytes(size, "big")


async def connect(url: str, path: str, subprotocol: str, ca: str | None = None) -> Carrier:
    """Dial `url` (http or https). OSError; Refused when the answer is not the right one."""
    parts = urlsplit(url)
    context = ssl.create_default_context(cafile=ca) if parts.scheme == "https" else None
    port = parts.port or (443 if context else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
    key = base64.b64encode(os.urandom(16))
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key.decode()}\r\n"
        f"Sec-WebSocket-Protocol: {subprotocol}\r\n\r\n".encode("ascii")
    )
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        status = head.split(b" ", 2)[1:2]
        agreed = field(head, b"sec-websocket-protocol") == subprotocol.encode()
        if status != [b"101"] or field(head, b"sec-websocket-accept") != accept(key) or not agreed:
            raise Refused(f"the edge answers {head.splitlines()[0].decode('latin-1')}")
    except (EOFError, asyncio.LimitOverrunError, OSError) as exc:
        writer.close()
        raise exc if isinstance(exc, OSError) else Refused("the answer is not HTTP") from exc
    return Carrier(reader, writer, client=True)


async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[bytes, Carrier]:
    """The server's side of the same: (request head, carrier). Takes whatever subprotocol was asked for."""
    head = await reader.readuntil(b"\r\n\r\n")
    writer.write(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %b\r\nSec-WebSocket-Protocol: %b\r\n\r\n"
        % (accept(field(head, b"sec-websocket-key")), field(head, b"sec-websocket-protocol"))
    )
    return head, Carrier(reader, writer, client=False)
