"""Hostile visitors, as a process of their own so that they do not slow down the ones that are measured.

    python flood.py KIND PORT COUNT SECONDS HOST TOKEN

COUNT connections from 127.0.0.2 to 127.0.0.1:PORT behave badly for SECONDS; then one line of JSON says how they were
answered: `{"408 head_seconds": 50, "cut": 3}`, "cut" being a connection that ended without an answer and "kept" one
that the visitor had to end itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable

import uvloop

SOURCE = ("127.0.0.2", 0)
RESET = struct.pack("ii", 1, 0)
PING = b"\x89\x84\x01\x02\x03\x04" + bytes(4)

# Connections come at this rate when they are what is flooded with, a second; all others come during the first half.
ARRIVALS = 400.0

# Whoever is not answered so long after the end was kept.
GRACE_SECONDS = 8.0


class Visitor:
    def __init__(self, port: int, host: str, token: str, until: float) -> None:
        self.port, self.host, self.token, self.until = port, host, token, until
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    @property
    def going(self) -> bool:
        return asyncio.get_running_loop().time() < self.until

    async def connect(self, window: int = 0) -> None:
        """`window`: what the kernel takes for a visitor who does not read."""
        sock = socket.socket()
        sock.setblocking(False)
        if window:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        sock.bind(SOURCE)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=4096)

    def head(self, method: str = "GET", path: str = "/", *lines: str) -> bytes:
        first = (f"{method} {path} HTTP/1.1", f"Host: {self.host}", f"Authorization: Bearer {self.token}")
        return "\r\n".join((*first, *lines, "", "")).encode()

    async def answer(self) -> str:
        """How this connection ends."""
        data = b""
        try:
            async with asyncio.timeout_at(self.until + GRACE_SECONDS):
                while part := await self.reader.read(4096):
                    data = (data + part)[:8192]
        except TimeoutError:
            return outcome(data) if data else "kept"
        except OSError:
            pass
        return outcome(data)

    async def gone(self) -> str:
        """How the connection ends for one that does not read."""
        sock = self.writer.get_extra_info("socket")
        deadline = self.until + GRACE_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            # TCP_INFO: its first byte is the state, and CLOSE is 7 (tcp(7)): a reset is noticed without reading.
            if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 1:
                return "cut"
            await asyncio.sleep(0.1)
        return "kept"

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.writer.transport.abort()


def outcome(data: bytes) -> str:
    if not data:
        return "cut"
    limit = re.search(rb"limit: (\w+)", data)
    return data[9:12].decode() + (f" {limit[1].decode()}" if limit else "")


async def slow_head(visitor: Visitor) -> str:
    await visitor.connect()
    answer = asyncio.ensure_future(visitor.answer())
    for byte in visitor.head():
        if answer.done():
            break
        visitor.writer.write(bytes((byte,)))
        await asyncio.sleep(0.1)
    return await answer


async def slow_body(visitor: Visitor) -> str:
    await visitor.connect()
    visitor.writer.write(visitor.head("POST", "/", "Content-Length: 1000000") + b"x")
    return await visitor.answer()


async def slow_reader(visitor: Visitor) -> str:
    await visitor.connect(window=4096)
    visitor.writer.write(visitor.head("GET", "/forever"))
    head = await visitor.reader.read(100)
    if not head.startswith(b"HTTP/1.1 200 "):
        return outcome(head + await visitor.reader.read(4096))
    visitor.writer.transport.pause_reading()  # type: ignore[attr-defined]
    return await visitor.gone()


async def connections(visitor: Visitor) -> str:
    await visitor.connect()
    visitor.writer.write(visitor.head())
    return await visitor.answer()


async def giant_head(visitor: Visitor) -> str:
    while True:
        await visitor.connect()
        with contextlib.suppress(ConnectionError):
            visitor.writer.write(visitor.head()[:-2] + b"X-Giant: " + b"x" * 200_000)
            await visitor.writer.drain()
        found = await visitor.answer()
        visitor.writer.transport.abort()
        if not visitor.going or not found.startswith("431"):
            return found


async def endless_upload(visitor: Visitor) -> str:
    await visitor.connect()
    visitor.writer.write(visitor.head("POST", "/", "Transfer-Encoding: chunked"))
    answer = asyncio.ensure_future(visitor.answer())
    piece = b"4000\r\n" + bytes(0x4000) + b"\r\n"
    with contextlib.suppress(ConnectionError):
        while not answer.done():
            visitor.writer.write(piece)
            await visitor.writer.drain()
            await asyncio.sleep(0.01)
    return await answer


async def resets(visitor: Visitor) -> str:
    while visitor.going:
        await visitor.connect()
        visitor.writer.write(visitor.head("GET", "/never"))
        await asyncio.sleep(0.2)
        visitor.reset()
        await asyncio.sleep(0.2)
    return "reset"


async def upgraded(visitor: Visitor) -> bool:
    await visitor.connect()
    lines = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    visitor.writer.write(
        visitor.head(
            "GET",
            "/",
            *lines,
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            f"Origin: http://{visitor.host}",
        )
    )
    return (await visitor.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")


async def pings(visitor: Visitor) -> str:
    if not await upgraded(visitor):
        return "no upgrade"
    with contextlib.suppress(ConnectionError):
        while visitor.going:
            visitor.writer.write(PING * 100)
            await visitor.writer.drain()
            await asyncio.sleep(0.01)
    return await visitor.answer()


async def idle_upgrades(visitor: Visitor) -> str:
    if not await upgraded(visitor):
        return "no upgrade"
    return await visitor.answer()


async def too_many_streams(visitor: Visitor) -> str:
    await visitor.connect()
    visitor.writer.write(visitor.head("POST", "/", "Content-Length: 1000000"))
    return await visitor.answer()


KINDS: dict[str, Callable[[Visitor], Awaitable[str]]] = {
    kind.__name__: kind
    for kind in (
        slow_head,
        slow_body,
        slow_reader,
        connections,
        giant_head,
        endless_upload,
        resets,
        pings,
        idle_upgrades,
        too_many_streams,
    )
}


async def main(kind: str, port: int, count: int, seconds: float, host: str, token: str) -> None:
    until = asyncio.get_running_loop().time() + seconds

    async def one(number: int) -> str:
        visitor = Visitor(port, host, token, until)
        await asyncio.sleep(number / ARRIVALS if kind == "connections" else number / count * seconds / 2)
        try:
            return await KINDS[kind](visitor)
        except (OSError, EOFError):
            return "cut"
        finally:
            if hasattr(visitor, "writer"):
                visitor.writer.transport.abort()

    print(json.dumps(Counter(await asyncio.gather(*(one(number) for number in range(count))))), flush=True)


if __name__ == "__main__":
    kind, port, count, seconds, host, token = sys.argv[1:]
    uvloop.run(main(kind, int(port), int(count), float(seconds), host, token))
