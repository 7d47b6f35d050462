"""What stands before both lanes: refusals, time limits, the shim, and connections that change lanes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.stack import RawServer, Stack, read_head, running

from guestpass.config import Limits
from guestpass.edge.front import Answered, Front, House, bare_lane
from guestpass.edge.origins import Origins
from guestpass.edge.pages import Pages
from guestpass_speedups.relay import Lane

log = logging.getLogger(__name__)

LIMITS = Limits()


# ── a front with a small aiohttp application behind it, and nothing else ──────────────────────────────────────────


class Served:
    """Fronts on a port of their own."""

    def __init__(self) -> None:
        self.lane: Lane
        self.refused: list[int] = []
        self.tunnels: list[tuple[bytes, bytes]] = []
        self.gate = asyncio.Event()
        self.fronts: list[Front] = []
        self.port = 0

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)

    async def exchange(self, data: bytes) -> bytes:
        """Bytes there, and what comes back until the end."""
        reader, writer = await self.connect()
        writer.write(data)
        async with asyncio.timeout(10):
            received = await reader.read()
        writer.close()
        return received

    def front(self, house: House) -> Front:
        made = house.front()
        self.fronts.append(made)
        return made


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    it = Served()
    it.lane = bare_lane(LIMITS)

    async def show(request: web.Request) -> web.Response:
        return web.Response(body=request.raw_path.encode() + b" " + await request.read())

    async def wait(request: web.Request) -> web.Response:
        await it.gate.wait()
        return web.Response(text="waited")

    async def big(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = 8 << 20
        await response.prepare(request)
        for _ in range(8):
            await response.write(bytes(1 << 20))
        return response

    async def early(request: web.Request) -> web.Response:
        return web.Response(text="early")

    async def echo(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_str(message.data)
        return ws

    app = web.Application()
    app.router.add_get("/wait", wait)
    app.router.add_get("/big", big)
    app.router.add_post("/early", early)
    app.router.add_get("/echo", echo)
    app.router.add_route("*", "/{tail:.*}", show)
    runner = web.AppRunner(
        app,
        access_log=log,
        access_log_class=Answered,
        handler_cancellation=True,
        shutdown_timeout=0.1,
        lingering_time=0.2,
    )
    await runner.setup()
    assert runner.server is not None

    def tunnel(transport: asyncio.Transport, head: bytes, rest: bytes) -> None:
        it.tunnels.append((head, rest))
        transport.close()

    house = House(
        lane=it.lane,
        handler=runner.server,
        tunnel=tunnel,
        pages=Pages(Origins("http://localhost", "localhost")),
        refused=it.refused.append,
    )
    server = await asyncio.get_running_loop().create_server(lambda: it.front(house), "127.0.0.1", 0)
    it.port = server.sockets[0].getsockname()[1]
    yield it
    server.close()
    await runner.cleanup()
    it.lane.close()


def request(path: str, *lines: str, method: str = "GET") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", "")).encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await read_head(reader)).decode("latin-1").lower()
    length = next(int(line[16:]) for line in head.split("\r\n") if line.startswith("content-length: "))
    return int(head[9:12]), await reader.readexactly(length)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS to a plain port
        (b"GET / HTTP/1.1\nHost: localhost\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET /a#b HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0005\r\n\r\nhello", 400),
        (b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost:1\r\n\r\n", 405),
        (b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 40000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: x\r\n" * 200 + b"\r\n", 431),
    ],
)
async def test_what_is_malformed_never_reaches_aiohttp(served: Served, data: bytes, status: int) -> None:
    received = await served.exchange(data)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), received
    assert b"\r\nConnection: close" in head
    assert b"Error id: " in body
    assert b"\r\nContent-Length: %d" % len(body) in head
    assert served.refused == [status]
    assert all(front._handler is None for front in served.fronts)


async def test_what_follows_a_malformed_request_is_not_looked_at(served: Served) -> None:
    received = await served.exchange(request("/first") + b"BAD\r\n\r\n" + request("/second"))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 400 " in received
    assert b"/second" not in received


async def test_requests_come_one_at_a_time(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(
        request("/wait") + request("/a", "Content-Length: 3", method="POST") + b"abc" + request("/b")
    )
    await asyncio.sleep(0.1)
    (front,) = served.fronts
    assert front.held_bytes > 0
    served.gate.set()
    assert [await answer(reader) for _ in range(3)] == [(200, b"waited"), (200, b"/a abc"), (200, b"/b ")]
    assert front.held_bytes == 0
    writer.close()


async def test_a_handler_serves_many_requests(served: Served) -> None:
    reader, writer = await served.connect()
    handlers = set()
    for number in range(20):
        writer.write(request(f"/{number}"))
        assert await answer(reader) == (200, b"/%d " % number)
        handlers.add(served.fronts[0]._handler)
    assert len(handlers) == 1
    writer.close()


async def test_a_handler_that_idles_away_takes_nothing_with_it(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(request("/1"))
    assert await answer(reader) == (200, b"/1 ")
    (front,) = served.fronts
    handler = front._handler
    handler.force_close()  # what its own keep-alive timer does
    await asyncio.sleep(0.05)
    writer.write(request("/2"))
    assert await answer(reader) == (200, b"/2 ")
    assert front._handler is not handler
    writer.close()


async def test_connections_that_are_to_close_close(served: Served) -> None:
    for data in (
        request("/x", "Connection: close"),
        b"GET /x HTTP/1.0\r\nHost: localhost\r\n\r\n",
    ):
        received = await served.exchange(data)
        assert received.partition(b"\r\n\r\n")[2] == b"/x "


async def test_an_answer_before_the_body(served: Served) -> None:
    """It arrives, and then the connection ends: nobody knows where the next request would begin."""
    reader, writer = await served.connect()
    writer.write(request("/early", f"Content-Length: {1 << 20}", method="POST") + bytes(1000))
    assert await answer(reader) == (200, b"early")
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()


async def test_writing_pauses_and_resumes_in_turn(served: Served) -> None:
    """aiohttp asserts it; the transport may pause before a handler is there, and after it has gone."""
    reader, writer = await served.connect()
    for _ in range(3):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request("/big") + request("/after"))
        (front,) = served.fronts
        async with asyncio.timeout(10):
            while not front.paused:
                await asyncio.sleep(0.01)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        status, body = await answer(reader)
        assert (status, len(body)) == (200, 8 << 20)
        assert await answer(reader) == (200, b"/after ")
    writer.close()


async def test_bytes_behind_an_upgrade_wait_for_the_101(served: Served) -> None:
    lines = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    frame = b"\x81\x82\x00\x00\x00\x00hi"
    received = await served.exchange(request("/echo", *lines) + frame + b"\x88\x80\x00\x00\x00\x00")
    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert rest.startswith(b"\x81\x02hi")
    # Declined: they are the next request.
    received = await served.exchange(request("/plain", *lines) + request("/next", "Connection: close"))
    assert received.count(b"HTTP/1.1 200 OK") == 2


async def test_only_the_first_request_may_be_for_a_tunnel(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(request("/.guestpass/tunnel", "Upgrade: websocket", "Connection: Upgrade") + b"more")
    assert await reader.read() == b""
    ((head, rest),) = served.tunnels
    assert head.startswith(b"GET /.guestpass/tunnel HTTP/1.1\r\n")
    assert head.endswith(b"\r\n\r\n")
    assert rest == b"more"
    writer.close()

    reader, writer = await served.connect()
    writer.write(request("/1") + request("/.guestpass/tunnel"))
    assert await answer(reader) == (200, b"/1 ")
    assert await answer(reader) == (200, b"/.guestpass/tunnel ")
    assert len(served.tunnels) == 1
    assert not served.lane.connections - {served.fronts[1]}
    writer.close()


async def test_time_limits(served: Served) -> None:
    """For the first request, for the rest of one that has begun, and between requests."""
    streams = [await served.connect() for _ in range(3)]
    streams[1][1].write(b"GET / HTTP/1.1\r\nHo")
    streams[2][1].write(request("/x"))
    assert await answer(streams[2][0]) == (200, b"/x ")
    now = time.monotonic()
    served.lane.tick(now + LIMITS.head_seconds - 1)
    assert len(served.lane.connections) == 3
    served.lane.tick(now + LIMITS.head_seconds + 1)
    assert await streams[0][0].read() == b""  # who sent nothing is not talked to
    status, told = await answer(streams[1][0])
    assert status == 408
    assert b"limit: head_seconds" in told
    assert await streams[1][0].read() == b""
    streams[1][1].close()
    async with asyncio.timeout(5):
        while len(served.lane.connections) > 1:
            await asyncio.sleep(0.01)
    served.lane.tick(now + LIMITS.idle_seconds + 1)
    assert await streams[2][0].read() == b""
    for _, writer in streams:
        writer.close()


async def test_a_head_does_not_gain_time_by_its_bytes(served: Served) -> None:
    reader, writer = await served.connect()
    writer.write(request("/x") + b"GET")
    assert await answer(reader) == (200, b"/x ")
    now = time.monotonic()
    for second in range(int(LIMITS.head_seconds) - 1):
        served.lane.tick(now + second)
        writer.write(b"x")
        await asyncio.sleep(0)
    assert len(served.lane.connections) == 1
    await asyncio.sleep(0.05)
    served.lane.tick(time.monotonic() + LIMITS.head_seconds + 1)
    status, told = await answer(reader)
    assert status == 408
    assert b"limit: head_seconds" in told
    assert await reader.read() == b""
    writer.close()


async def test_the_end_closes_every_connection(served: Served) -> None:
    idle, busy = await served.connect(), await served.connect()
    busy[1].write(request("/wait"))
    idle[1].write(request("/x"))
    assert await answer(idle[0]) == (200, b"/x ")
    served.lane.close()
    for reader, writer in (idle, busy):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
    async with asyncio.timeout(5):
        while served.lane.connections:
            await asyncio.sleep(0.01)


# ── the fast lane's refusals ──────────────────────────────────────────────────────────────────────────────────────


async def test_refusals_are_counted(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with RawServer(talk) as server, running(tmp_path, server.url, lane="fast") as stack:
        received = await stack.raw(stack.head("GET", "/1") + stack.head("GET", "/2", "Host: again"))
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b"\r\n\r\nokHTTP/1.1 400 " in received
        assert _metric(stack, "guestpass_refused_total", status="400") == 1
        assert stack.answered("fast") == 1


def _metric(stack: Stack, name: str, **labels: str) -> Any:
    return stack.edge.metrics.registry.get_sample_value(name, labels)
