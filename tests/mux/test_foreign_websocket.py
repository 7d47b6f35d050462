"""Our links against WebSocket software of other people (`websockets`, which checks RFC 6455 strictly): as a server and
as a client, with messages in fragments, pings on the way, frames of every form of length, and both ways to close."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import websockets
from speedups import model
from speedups.pair import End, Recorder
from support import tunnel
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from guestpass.gateway import dial
from guestpass.mux.handshake import PATH, SUBPROTOCOL, Hello, Proof, Verdict
from guestpass.mux.link import GatewayLink
from guestpass_speedups.session import Budget, ErrorCode

OURS = Subprotocol(SUBPROTOCOL)
BODY = os.urandom(1 << 20)
OK = b"HTTP/1.1 200 OK\r\n\r\n"


class Foreign:
    """A session behind a foreign WebSocket connection. What it writes goes out in fragments of odd sizes, whose
    boundaries mean nothing, with empty ones and pings between."""

    def __init__(self, connection: Any, *, edge: bool, answer: Callable[[Foreign], None]) -> None:
        self.connection = connection
        self.end = End(edge=edge, budget=Budget())
        self.session = self.end.session
        self.answer = answer
        self.pongs = 0
        self.fragments = 0
        self.finished: set[int] = set()
        self.random = random.Random(5)
        self.longest = 0

    async def run(self) -> None:
        """Until the other end closes."""
        loop = asyncio.get_running_loop()
        self.session.set_peer_limits(floor=32_768, max_streams=16_384)
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in self.connection:
                assert isinstance(message, bytes)
                self.longest = max(self.longest, len(message))
                self.session.receive(message, loop.time())
                self.answer(self)
                await self.flush()

    async def flush(self) -> None:
        loop = asyncio.get_running_loop()
        while data := self.session.fill(65_536, loop.time()):
            pong = await self.connection.ping()
            await self.connection.send(self.cut(data))
            pong.add_done_callback(self._ponged)

    def _ponged(self, pong: asyncio.Future[float]) -> None:
        if not pong.cancelled() and pong.exception() is None:
            self.pongs += 1

    async def cut(self, data: bytes) -> AsyncIterator[bytes]:
        """One message in fragments: an async iterable, so that other things may come between."""
        at = 0
        while at < len(data):
            size = self.random.choice((0, 1, 7, 125, 126, 127, 4000, 65_536))
            yield data[at : at + size]
            self.fragments += 1
            at += size


def speak_as_gateway(foreign: Foreign, key: Any, hello: Hello) -> None:
    """Prove who it is, and serve: the request's body comes back."""
    for entry in foreign.end.owner.log:
        if entry[0] == "hello":
            edge = Hello.decode(entry[1], role="edge")
            proof = Proof.sign(
                key, site=tunnel.SITE, name=tunnel.NAME, certificate=b"", edge=edge, gateway=hello
            )
            foreign.session.send_auth(proof.encode())
        elif entry[0] == "auth":
            foreign.session.send_info(b'{"services":{"dash":{"healthy":true}}}')
    foreign.end.owner.log.clear()
    for stream, _, _, _, _, handler in foreign.end.owner.opened:
        if not handler.heads:
            stream.send_head(OK)
            handler.heads.append(OK)
        if stream.id not in foreign.finished and (handler.body or handler.fin):
            stream.send(bytes(handler.body), fin=handler.fin)
            handler.body.clear()
            if handler.fin:
                foreign.finished.add(stream.id)


async def test_as_server(tmp_path: Path) -> None:
    async with tunnel.edge(tmp_path, tls=False) as edge:
        gateway = tunnel.TestGateway()
        edge.enrol(gateway.key)
        hello = Hello(role="gateway", epoch=1)
        url = edge.url.replace("http", "ws") + PATH
        async with connect(url, subprotocols=[OURS], compression=None, max_size=None) as connection:
            assert connection.subprotocol == SUBPROTOCOL
            foreign = Foreign(
                connection, edge=False, answer=lambda foreign: speak_as_gateway(foreign, gateway.key, hello)
            )
            foreign.session.send_hello(hello.encode())
            await foreign.flush()
            running = asyncio.create_task(foreign.run())
            await tunnel.until(lambda: edge.tunnels.candidates(tunnel.SITE, tunnel.SERVICE), "INFO")
            stream = edge.tunnels.open(tunnel.SITE, tunnel.NAME, tunnel.SERVICE, tunnel.HEAD, fin=False)
            sending = asyncio.create_task(send(stream, BODY))
            assert (await stream.head()).data == OK
            assert await received(stream) == hashlib.sha256(BODY).digest()
            await sending
            assert foreign.longest > 65_535, "a message with a length of 64 bits"
            assert foreign.fragments > 100
            assert foreign.pongs > 3
            edge.tunnels.close()
            await running
            assert connection.close_code == 1000, "DRAINING is no fault"
        await edge.tunnels.wait_closed()


async def send(stream: Any, data: bytes) -> None:
    for at in range(0, len(data), 50_000):
        await stream.write(data[at : at + 50_000])
    stream.finish()


async def received(stream: Any) -> bytes:
    digest = hashlib.sha256()
    while piece := await stream.read():
        digest.update(piece)
    return digest.digest()


async def test_as_client() -> None:
    served: asyncio.Queue[Foreign] = asyncio.Queue()

    def let_in(foreign: Foreign) -> None:
        for entry in foreign.end.owner.log:
            if entry[0] == "auth":
                foreign.session.send_auth(Verdict(True).encode())
        foreign.end.owner.log.clear()

    async def handle(connection: ServerConnection) -> None:
        assert connection.request is not None
        assert connection.request.path == PATH
        foreign = Foreign(connection, edge=True, answer=let_in)
        foreign.session.send_hello(Hello(role="edge", epoch=1, edge="foreign").encode())
        await foreign.flush()
        served.put_nowait(foreign)
        await foreign.run()

    async def echo(stream: Any, service: str, head: bytes) -> None:
        stream.send_head(OK)
        while piece := await stream.read():
            await stream.write(piece)
        stream.finish()

    async with serve(
        handle, "127.0.0.1", 0, subprotocols=[OURS], compression=None, max_size=None, ping_interval=None
    ) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        gateway = tunnel.TestGateway(serve=echo)
        where = dial.edge_at(f"http://127.0.0.1:{port}")
        _, link = await dial.connect(where, lambda: gateway.make(where.authority))
        assert isinstance(link, GatewayLink)
        await tunnel.until(lambda: link.ready, "a verdict")
        foreign = await served.get()
        stream, handler = open_foreign(foreign)
        for at in range(0, len(BODY), 50_000):
            stream.send(BODY[at : at + 50_000], fin=at + 50_000 >= len(BODY))
            await foreign.flush()
        await tunnel.until(lambda: handler.fin, "the echo")
        assert bytes(handler.body) == BODY
        assert foreign.longest > 65_535
        assert foreign.fragments > 100
        assert foreign.pongs > 3
        await link.close()
        await tunnel.until(lambda: foreign.connection.close_code == 1000, "a close frame")


def open_foreign(foreign: Foreign) -> tuple[Any, Any]:
    handler = Recorder()
    return foreign.session.open(tunnel.SERVICE, tunnel.HEAD, handler), handler


@pytest.mark.parametrize(
    ("message", "code"),
    [("text", 1003), (model.frame(model.DATA, 0, 2**31), 1001), (b"\xff" * 100, 1001)],
    ids=["text", "bit 31", "garbage"],
)
async def test_the_close_code_reaches_the_other_end(tmp_path: Path, message: Any, code: int) -> None:
    async with tunnel.edge(tmp_path, tls=False) as edge:
        url = edge.url.replace("http", "ws") + PATH
        async with connect(url, subprotocols=[OURS], compression=None) as connection:
            await connection.send(message)
            async with asyncio.timeout(10):
                await connection.wait_closed()
            assert connection.close_code == code
        await edge.tunnels.wait_closed()


@pytest.mark.parametrize("code", [1000, 1001, 3000])
async def test_a_close_frame_of_the_other_end(tmp_path: Path, code: int) -> None:
    async with tunnel.edge(tmp_path, tls=False) as edge:
        url = edge.url.replace("http", "ws") + PATH
        async with connect(url, subprotocols=[OURS], compression=None) as connection:
            (link,) = edge.tunnels._links
            await connection.send(model.frame(model.HELLO, 0, 0, Hello(role="gateway", epoch=1).encode()))
            await connection.close(code)
            assert connection.close_code == code
        await tunnel.until(lambda: link.end is not None, "the end")
        assert link.end is not None
        assert link.end.by_peer
        assert link.end.code in (ErrorCode.NO_ERROR, ErrorCode.UNREACHABLE)


async def test_compression_is_not_agreed_on(tmp_path: Path) -> None:
    """A client that offers permessage-deflate gets a connection without."""
    async with tunnel.edge(tmp_path, tls=False) as edge:
        url = edge.url.replace("http", "ws") + PATH
        async with connect(url, subprotocols=[OURS]) as connection:
            assert connection.protocol.extensions == []
            assert isinstance(await connection.recv(), bytes)
