"""WebSockets through the tunnel: the verdict of every case of `websocket_cases` is the verdict without the tunnel.

An upgraded connection is opaque to the edge and the gateway, so whatever a server says of a client's frames must come
back as it is. What is compared: the server's handshake, its messages, its pongs, its Close and that the connection
ended. Messages and control frames are compared apart: their order depends on how TCP cut the stream. After a violation
a server may still have had messages to echo; one side may then have got more of them than the other, never others.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest
import websockets
from aiohttp import WSMsgType, web
from conformance.websocket_cases import CLOSE, CONTINUATION, PING, PONG, TEXT, Case, all_cases, close, frame
from support.programs import free_port
from support.scoreboard import LONG, row
from support.stack import Stack, running
from websockets.asyncio import messages
from websockets.asyncio.server import ServerConnection, serve

KEY = base64.b64encode(bytes(16)).decode()

# A server that has not closed by now does not. Nothing is decided by it in a run that is as it should be.
PATIENCE = 30.0

# Cases at a time: each has a connection of its own.
AT_ONCE = 8


@dataclass
class Verdict:
    handshake: tuple[str, str, str] = ("", "", "")
    messages: list[str] = field(default_factory=list)
    """Opcode, reserved bits, length and hash of each."""
    control: list[str] = field(default_factory=list)
    ended: bool = False


class Client:
    """Sends bytes and writes down what comes back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, case: Case) -> None:
        self.reader, self.writer, self.case = reader, writer, case
        self.verdict = Verdict()
        # the client's own Close is the answer to it
        self.closed_first = not case.closes and any(piece[:1] == b"\x88" for piece in case.pieces)
        self.wanted = case.messages if case.closes else -1
        self.all_seen = asyncio.Event()
        self.count()

    def count(self) -> None:
        if len(self.verdict.messages) == self.wanted:
            self.all_seen.set()

    async def shake_hands(self, head: bytes) -> bool:
        self.writer.write(head)
        answer = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in answer[1:])}
        self.verdict.handshake = (
            answer[0],
            fields.get("sec-websocket-extensions", ""),
            fields.get("sec-websocket-protocol", ""),
        )
        return " 101 " in answer[0]

    async def read(self) -> None:
        opcode, rsv, message = 0, 0, b""
        try:
            while True:
                first, second = await self.reader.readexactly(2)
                size = second & 0x7F
                if size == 126:
                    (size,) = struct.unpack("!H", await self.reader.readexactly(2))
                elif size == 127:
                    (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
                payload = await self.reader.readexactly(size)
                code = first & 0x0F
                if code in (CLOSE, PING, PONG):
                    self.verdict.control.append(f"{first:02x} {payload.hex()}")
                    if code == CLOSE and not self.closed_first:
                        self.closed_first = True
                        self.writer.write(frame(CLOSE, payload[:2]))
                    continue
                if code != CONTINUATION:
                    opcode, rsv, message = code, first & 0x70, b""
                message += payload
                if first & 0x80:
                    digest = hashlib.sha256(message).hexdigest()[:16]
                    self.verdict.messages.append(f"{opcode} {rsv:02x} {len(message)} {digest}")
                    self.count()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.verdict.ended = True
        finally:
            self.all_seen.set()

    async def say(self) -> None:
        for piece in self.case.pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)  # so that the next write is one of its own
        if self.case.closes:
            # a server answers a Close at once, and drops what it has not echoed yet
            await self.all_seen.wait()
            if self.writer.is_closing():  # the other end was first; uvloop would raise
                return
            self.closed_first = True
            self.writer.write(close(1000))


async def verdict(port: int, head: bytes, case: Case) -> Verdict:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = Client(reader, writer, case)
    try:
        async with asyncio.timeout(PATIENCE):
            if await client.shake_hands(head):
                reading = asyncio.create_task(client.read())
                with contextlib.suppress(ConnectionError):
                    await client.say()
                await reading
    except TimeoutError:
        pass
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return client.verdict


def differences(case: Case, direct: Verdict, tunnelled: Verdict) -> list[str]:
    found = []
    for name in ("handshake", "control", "ended"):
        a, b = getattr(direct, name), getattr(tunnelled, name)
        if a != b:
            found.append(f"{case.id} ({case.about}): {name} {a} direct, {b} through the tunnel")
    a, b = direct.messages, tunnelled.messages
    if a != b and (case.closes or a[: len(b)] != b[: len(a)]):
        found.append(f"{case.id} ({case.about}): messages {a[:3]}… direct, {b[:3]}… through the tunnel")
    return found


# ── servers that nobody here wrote ───────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def websockets_server() -> AsyncIterator[int]:
    async def echo(connection: ServerConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in connection:
                await connection.send(message)

    quiet = logging.getLogger("tests.websockets")
    quiet.propagate = False
    # Newer versions refuse what group 9 sends: 16,384 fragments. No argument of `serve` says so.
    unlimited = patch.object(messages, "MAX_FRAGMENTS", 1 << 15, create=True)
    with unlimited:
        async with serve(echo, "127.0.0.1", 0, max_size=None, ping_interval=None, logger=quiet) as server:
            yield next(iter(server.sockets)).getsockname()[1]


@contextlib.asynccontextmanager
async def aiohttp_server() -> AsyncIterator[int]:
    async def echo(request: web.Request) -> web.WebSocketResponse:
        answer = web.WebSocketResponse(max_msg_size=0, protocols=("chat", "v2"))
        await answer.prepare(request)
        async for message in answer:
            if message.type is WSMsgType.TEXT:
                await answer.send_str(message.data)
            elif message.type is WSMsgType.BINARY:
                await answer.send_bytes(message.data)
        return answer

    app = web.Application()
    app.router.add_get("/ws", echo)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield port
    finally:
        await runner.cleanup()


SERVERS: dict[str, Callable[[], contextlib.AbstractAsyncContextManager[int]]] = {
    "websockets": websockets_server,
    "aiohttp": aiohttp_server,
}


def handshake(host: str, *lines: str) -> bytes:
    head = (
        "GET /ws HTTP/1.1",
        f"Host: {host}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {KEY}",
        *lines,
    )
    return "\r\n".join((*head, "", "")).encode("latin-1")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
@pytest.mark.parametrize("server", SERVERS)
async def test_verdicts_are_those_of_the_direct_connection(tmp_path: Path, server: str, lane: str) -> None:
    cases = [case for case in all_cases() if LONG or not case.large]
    if not LONG and (server, lane) != ("websockets", "fast"):
        cases = cases[::4]
    async with SERVERS[server]() as port, running(tmp_path, f"http://127.0.0.1:{port}", lane=lane) as stack:
        found: list[str] = []
        completed = 0
        turn = asyncio.Semaphore(AT_ONCE)

        async def compare(case: Case) -> None:
            nonlocal completed
            offer = (f"Sec-WebSocket-Extensions: {case.offer}",) if case.offer else ()
            async with turn:
                direct = await verdict(port, handshake(f"127.0.0.1:{port}", *offer), case)
                lines = (f"Authorization: Bearer {stack.token}", *offer)
                through = await verdict(stack.port, handshake(stack.host, *lines), case)
            found.extend(differences(case, direct, through))
            assert direct.handshake[0].startswith("HTTP/1.1 101"), case
            if case.closes:
                assert len(direct.messages) == case.messages, f"{case.id}: no verdict to compare with"
            completed += direct.ended

        await asyncio.gather(*map(compare, cases))
        row(
            f"WebSocket cases, {server}, {lane} lane",
            f"{len(cases)} cases of Autobahn's groups, direct and through the tunnel",
            f"{len({f.partition(' ')[0] for f in found})} verdicts differ"
            + "".join(f"; {f}" for f in found[:5]),
            "none",
            ok=not found,
            figure=4,
        )
        # each ended, so that each had a verdict
        assert completed == len(cases)
        await no_stream_is_left(stack)


HANDSHAKES: dict[str, tuple[tuple[str, ...], int]] = {
    "a subprotocol": (("Sec-WebSocket-Protocol: v2, chat",), 101),
    "no subprotocol that the server knows": (("Sec-WebSocket-Protocol: unknown",), 101),
    "an extension that nobody knows": (("Sec-WebSocket-Extensions: x-unknown; a=1",), 101),
    "two offers in two fields": (
        ("Sec-WebSocket-Extensions: x-unknown", "Sec-WebSocket-Extensions: permessage-deflate"),
        101,
    ),
}


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
@pytest.mark.parametrize("what", HANDSHAKES)
async def test_handshakes(tmp_path: Path, what: str, lane: str) -> None:
    lines, status = HANDSHAKES[what]
    case = Case("handshake", what, (frame(TEXT, b"hello"),))
    async with aiohttp_server() as port, running(tmp_path, f"http://127.0.0.1:{port}", lane=lane) as stack:
        direct = await verdict(port, handshake(f"127.0.0.1:{port}", *lines), case)
        token = f"Authorization: Bearer {stack.token}"
        through = await verdict(stack.port, handshake(stack.host, token, *lines), case)
        assert direct.handshake[0].split()[1] == str(status)
        assert differences(case, direct, through) == []


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
@pytest.mark.parametrize(
    ("replaced", "by"),
    [
        ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 99"),
        (f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Key: short"),
        (f"Sec-WebSocket-Key: {KEY}", "X-No: key"),
    ],
)
async def test_handshakes_that_the_server_refuses(tmp_path: Path, replaced: str, by: str, lane: str) -> None:
    async with aiohttp_server() as port, running(tmp_path, f"http://127.0.0.1:{port}", lane=lane) as stack:

        async def status(to: int, head: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", to)
            writer.write(head.replace(replaced.encode(), by.encode()))
            line = await reader.readline()
            writer.close()
            await writer.wait_closed()
            return line

        direct = await status(port, handshake(f"127.0.0.1:{port}"))
        token = f"Authorization: Bearer {stack.token}"
        assert await status(stack.port, handshake(stack.host, token)) == direct
        assert direct.split()[1] in (b"400", b"426")


async def no_stream_is_left(stack: Stack) -> None:
    await stack.until(lambda: not stack.edge.grants.all_streams, "no stream is left")
