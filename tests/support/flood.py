"""Hostile visitors, as a process of their own so that they do not slow down the ones that are measured.

    python flood.py KIND PORT COUNT SECONDS HOST TOKEN [back]

COUNT visitors from 127.0.0.2 behave badly towards 127.0.0.1:PORT, each again and again, for SECONDS. The line `begun`
says that the first one is there; then one line of JSON how they were answered and what they did:

    {"answers": {"408 head_seconds": 50, "cut": 3}, "connections": 53, "bytes": 9000, "cpu": 0.2}

"cut" is a connection that ended without an answer, "kept" one that the visitor had to end itself.

What an attack costs the attacker is no part of what it does to others, but here both run on the same processors. So
with `back` this process lets others go first. It is paced, and a flood that was held up shows in what it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import ssl
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

SOURCE = ("127.0.0.2", 0)
RESET = struct.pack("ii", 1, 0)
PING = b"\x89\x84\x01\x02\x03\x04" + bytes(4)

# Visitors come within so many seconds; those who come once do so at this rate, a second.
RAMP = 0.5
ARRIVALS = 400.0

# Whoever is not answered so long after the end was kept.
GRACE_SECONDS = 8.0

# Of an endless download so much is read by those who stop later.
READ_FIRST = 2_000_000

DONE: Counter[str] = Counter()


class Visitor:
    def __init__(self, port: int, host: str, token: str, until: float) -> None:
        self.port, self.host, self.token, self.until = port, host, token, until
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    @property
    def going(self) -> bool:
        return asyncio.get_running_loop().time() < self.until

    async def connect(self, window: int = 0, limit: int = 4096) -> None:
        """`window`: what the kernel takes for a visitor who does not read."""
        sock = socket.socket()
        sock.setblocking(False)
        if window:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        sock.bind(SOURCE)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=limit)
        DONE["connections"] += 1

    def send(self, data: bytes) -> None:
        DONE["bytes"] += len(data)
        self.writer.write(data)

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
        visitor.send(bytes((byte,)))
        await asyncio.sleep(0.1)
    return await answer


async def slow_body(visitor: Visitor) -> str:
    await visitor.connect()
    visitor.send(visitor.head("POST", "/", "Content-Length: 1000000") + b"x")
    return await visitor.answer()


async def _unread(visitor: Visitor, first: int) -> str:
    visitor.send(visitor.head("GET", "/forever"))
    head = await visitor.reader.read(100)
    if not head.startswith(b"HTTP/1.1 200 "):
        return outcome(head + await visitor.reader.read(4096))
    if first:
        await visitor.reader.readexactly(first)
    visitor.writer.transport.pause_reading()  # type: ignore[attr-defined]
    return await visitor.gone()


async def slow_reader(visitor: Visitor) -> str:
    await visitor.connect(window=4096)
    return await _unread(visitor, 0)


async def late_reader(visitor: Visitor) -> str:
    await visitor.connect(limit=1 << 18)
    return await _unread(visitor, READ_FIRST)


async def connections(visitor: Visitor) -> str:
    await visitor.connect()
    visitor.send(visitor.head())
    return await visitor.answer()


async def giant_head(visitor: Visitor) -> str:
    await visitor.connect()
    with contextlib.suppress(ConnectionError):
        visitor.send(visitor.head()[:-2] + b"X-Giant: " + b"x" * 200_000)
        await visitor.writer.drain()
    return await visitor.answer()


async def endless_upload(visitor: Visitor) -> str:
    await visitor.connect()
    visitor.send(visitor.head("POST", "/", "Transfer-Encoding: chunked"))
    answer = asyncio.ensure_future(visitor.answer())
    piece = b"4000\r\n" + bytes(0x4000) + b"\r\n"
    with contextlib.suppress(ConnectionError):
        while not answer.done():
            visitor.send(piece)
            await visitor.writer.drain()
            await asyncio.sleep(0.01)
    return await answer


async def resets(visitor: Visitor) -> str:
    await visitor.connect()
    visitor.send(visitor.head("GET", "/never"))
    await asyncio.sleep(0.2)
    visitor.reset()
    return "reset"


async def upgraded(visitor: Visitor) -> bool:
    await visitor.connect()
    lines = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    visitor.send(
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
            visitor.send(PING * 100)
            await visitor.writer.drain()
            await asyncio.sleep(0.01)
    return await visitor.answer()


async def idle_upgrades(visitor: Visitor) -> str:
    if not await upgraded(visitor):
        return "no upgrade"
    return await visitor.answer()


async def too_many_streams(visitor: Visitor) -> str:
    await visitor.connect()
    visitor.send(visitor.head("POST", "/", "Content-Length: 1000000"))
    return await visitor.answer()


def client_hello() -> bytes:
    """The same for all: making a fresh one costs as much as answering it."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


HELLO = client_hello()


async def handshakes(visitor: Visitor) -> str:
    """Has the server compute, and goes."""
    await visitor.connect()
    visitor.send(HELLO)
    answered = await visitor.reader.read(1)
    visitor.reset()
    return "answered" if answered else "cut"


async def slow_handshakes(visitor: Visitor) -> str:
    await visitor.connect()
    visitor.send(HELLO[:3])
    return await visitor.answer()


@dataclass(frozen=True, slots=True)
class Kind:
    attempt: Callable[[Visitor], Awaitable[str]]
    rest: float | None = 0.1
    """Seconds between two attempts of one visitor; None: each comes once."""


KINDS: dict[str, Kind] = {
    kind.attempt.__name__: kind
    for kind in (
        Kind(slow_head),
        Kind(slow_body),
        Kind(slow_reader),
        Kind(late_reader),
        Kind(connections, None),
        Kind(giant_head, 0.02),
        Kind(endless_upload),
        Kind(resets, 0.2),
        Kind(pings),
        Kind(idle_upgrades),
        Kind(too_many_streams),
        Kind(handshakes, 0.02),
        Kind(slow_handshakes),
    )
}


def stand_back() -> None:
    """Take a tenth of a processor that others want. Where the kernel groups sessions, it weighs these (sched(7))."""
    os.nice(10)
    with contextlib.suppress(OSError):  # it does not
        Path("/proc/self/autogroup").write_text("10")


async def main(kind: Kind, port: int, count: int, seconds: float, host: str, token: str) -> None:
    until = asyncio.get_running_loop().time() + seconds
    answers: Counter[str] = Counter()

    async def attempt() -> None:
        visitor = Visitor(port, host, token, until)
        try:
            answers[await kind.attempt(visitor)] += 1
        except (OSError, EOFError):
            answers["cut"] += 1
        finally:
            if hasattr(visitor, "writer"):
                visitor.writer.transport.abort()

    async def visit(number: int) -> None:
        if kind.rest is None:
            await asyncio.sleep(number / ARRIVALS)
            await attempt()
            return
        await asyncio.sleep(number / count * RAMP)
        while asyncio.get_running_loop().time() < until:
            await attempt()
            await asyncio.sleep(kind.rest)

    print("begun", flush=True)
    await asyncio.gather(*(visit(number) for number in range(count)))
    print(json.dumps({"answers": answers, **DONE, "cpu": time.process_time()}), flush=True)


if __name__ == "__main__":
    kind, port, count, seconds, host, token, *back = sys.argv[1:]
    if back:
        stand_back()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(main(KINDS[kind], int(port), int(count), float(seconds), host, token))
