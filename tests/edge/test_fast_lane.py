"""What is special about the fast lane, over real sockets: which requests take it, order across the lanes, bytes in any
pieces, memory in both directions, and its end. What both lanes have in common is in test_relay.py."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from support.stack import EMAIL, RawServer, Stack, read_head, running

from guestpass.config import Limits
from guestpass.edge.front import Front
from guestpass.model import SessionKind
from guestpass.plugin import Client
from guestpass_speedups.relay import HELD_LIMIT, Connection
from guestpass_speedups.session import FLOOR, HIGH_WATER, MAX_WINDOW

MB = 1 << 20
LIMITS = Limits()


class Application:
    """Answers with what it got; counts what is open."""

    def __init__(self) -> None:
        self.open = 0
        self.url = ""
        self.reading = asyncio.Event()
        self.reading.set()

    async def show(self, request: web.Request) -> web.Response:
        body = await request.read()
        return web.json_response(
            {"target": request.raw_path, "length": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        )

    async def forever(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        self.open += 1
        try:
            while True:
                await response.write(b"x" * 65536)
                await asyncio.sleep(0)
        finally:
            self.open -= 1

    async def swallow(self, request: web.Request) -> web.Response:
        self.open += 1
        try:
            size = 0
            while True:
                await self.reading.wait()
                part = await request.content.read(65536)
                if not part:
                    return web.Response(text=str(size))
                size += len(part)
        finally:
            self.open -= 1

    async def echo(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        self.open += 1
        try:
            async for message in ws:
                if message.type is WSMsgType.BINARY:
                    await ws.send_bytes(message.data)
        finally:
            self.open -= 1
        return ws


@pytest.fixture
async def app() -> AsyncIterator[Application]:
    it = Application()
    application = web.Application(client_max_size=64 * MB)
    application.router.add_get("/forever", it.forever)
    application.router.add_post("/swallow", it.swallow)
    application.router.add_get("/echo", it.echo)
    application.router.add_route("*", "/{tail:.*}", it.show)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    it.url = f"http://{host}:{port}"
    yield it
    await runner.cleanup()


@pytest.fixture
async def stack(app: Application, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(tmp_path, app.url, lane="fast") as it:
        yield it


async def answers(reader: asyncio.StreamReader, number: int) -> list[tuple[int, bytes]]:
    """Status and body of so many answers that have a length."""
    found = []
    for _ in range(number):
        head = (await read_head(reader)).decode("latin-1").lower()
        length = next(int(line[16:]) for line in head.split("\r\n") if line.startswith("content-length: "))
        found.append((int(head[9:12]), await reader.readexactly(length)))
    return found


def only(stack: Stack) -> Connection:
    """The one connection that has a request under way."""
    (found,) = [c for c in stack.edge.lane.connections if c.phase_name not in ("HEAD", "GONE")]
    return found


# ── which lane ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_first_request_of_a_session_is_the_control_planes(stack: Stack) -> None:
    stack.token = await stack.new_token(stack.share_id)
    for answered in ((1, 0), (1, 1), (1, 2)):
        assert (await stack.get("/")).status == 200
        assert (stack.answered("aiohttp"), stack.answered("fast")) == answered


async def test_requests_that_are_not_for_the_fast_lane(stack: Stack) -> None:
    """They are answered all the same, or refused as ever."""
    for path, headers, status in (
        ("/", {"Host": stack.host.upper()}, 200),
        ("/.guestpass/nothing", {}, 404),
        ("/", {"Host": f"localhost:{stack.port}"}, 200),
        ("/", {"Authorization": "Bearer gp_unknown"}, 401),
        ("/", {"Authorization": "Basic Z3Vlc3Q6eA=="}, 401),
    ):
        assert (await stack.get(path, headers=headers)).status == status, (path, headers)
    assert stack.answered("fast") == 0


async def test_a_secret_is_good_only_as_what_it_is(stack: Stack) -> None:
    """A bearer token is no cookie, a cookie is no token, neither is good on another share's origin."""
    _, cookie = await stack.edge.service.open_session(
        stack.share_id, EMAIL, SessionKind.COOKIE, "email-code", Client("127.0.0.1")
    )
    await stack.warm(stack.share_id, cookie, SessionKind.COOKIE)
    other = await stack.new_share()

    async def status(host: str, **headers: str) -> int:
        async with stack.session.get(
            stack.url("/"), headers={"Host": host, **headers}, allow_redirects=False
        ) as got:
            return got.status

    sibling = f"{other}.localhost:{stack.port}"
    assert await status(stack.host, Cookie=f"__Host-guestpass={cookie}") == 200
    assert await status(stack.host, Authorization=f"Bearer {stack.token}") == 200
    assert stack.answered("fast") == 2
    assert await status(stack.host, Cookie=f"__Host-guestpass={stack.token}") == 401
    assert await status(stack.host, Authorization=f"Bearer {cookie}") == 401
    assert await status(sibling, Cookie=f"__Host-guestpass={cookie}") == 401
    assert await status(sibling, Authorization=f"Bearer {stack.token}") == 401
    assert stack.answered("fast") == 2


async def test_a_dropped_grant_is_not_found_again(stack: Stack) -> None:
    assert (await stack.get("/")).status == 200
    assert len(stack.edge.grants.tokens) == 1
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    writer.write(stack.head("GET", "/"))
    assert (await answers(reader, 1))[0][0] == 200
    await stack.edge.service.delete(stack.share_id)
    assert not stack.edge.grants.tokens
    writer.write(stack.head("GET", "/"))  # the connection remembers the grant that it used last
    assert (await answers(reader, 1))[0][0] == 410
    writer.close()


async def test_sessions_that_are_used_stay_in_use(stack: Stack) -> None:
    (grant,) = stack.edge.grants._by_session.values()
    grant.last_used = 0.0
    assert (await stack.get("/")).status == 200
    assert stack.answered("fast") == 1
    assert grant.last_used > 0


async def test_what_a_scope_admits_is_remembered_by_path(app: Application, tmp_path: Path) -> None:
    async with running(
        tmp_path, app.url, share={"path": "/a/", "scope": ["GET /a/**"]}, lane="fast"
    ) as stack:
        for _ in range(2):
            for number in range(300):
                assert (await stack.get(f"/a/{number % 7}?{number}")).status == 200
            assert (await stack.get("/b")).status == 403
            assert (await stack.get("/a/1", method="POST")).status == 403
        assert stack.answered("fast") == 600
        assert stack.answered("aiohttp") == 4


# ── order and pieces ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_pipelined_requests_are_answered_in_order_across_lanes(stack: Stack) -> None:
    main = f"GET /.well-known/jwks.json HTTP/1.1\r\nHost: localhost:{stack.port}\r\n\r\n".encode()
    body = b"0123456789"
    data = b"".join(
        (
            stack.head("GET", "/1"),
            main,
            stack.head("POST", "/2", f"Content-Length: {len(body)}") + body,
            stack.head("GET", "/.guestpass/3"),
            stack.head("POST", "/4", "Transfer-Encoding: chunked")
            + b"a;x=1\r\n0123456789\r\n0\r\nT: t\r\n\r\n",
            stack.head("GET", "/5"),
            main,
            main,
            stack.head("GET", "/6"),
        )
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    writer.write(data)
    async with asyncio.timeout(20):
        found = await answers(reader, 9)
    assert [status for status, _ in found] == [200, 200, 200, 404, 200, 200, 200, 200, 200]
    targets = [json.loads(body).get("target") for status, body in found if status == 200]
    assert targets == ["/1", None, "/2", "/4", "/5", None, None, "/6"]
    digest = hashlib.sha256(body).hexdigest()
    assert [json.loads(found[at][1])["sha256"] for at in (2, 4)] == [digest, digest]
    assert stack.answered("fast") == 5
    writer.close()


async def test_a_head_may_come_in_any_two_pieces(stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    data = stack.head("POST", "/x", "Content-Length: 4") + b"body"
    async with asyncio.timeout(60):
        for cut in range(1, len(data)):
            writer.write(data[:cut])
            await asyncio.sleep(0)
            writer.write(data[cut:])
            ((status, body),) = await answers(reader, 1)
            assert status == 200
            assert json.loads(body)["length"] == 4
    assert stack.answered("fast") == len(data) - 1
    writer.close()


async def test_a_head_may_come_byte_by_byte(stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    async with asyncio.timeout(30):
        for byte in stack.head("GET", "/x"):
            writer.write(bytes((byte,)))
            await asyncio.sleep(0.001)
        assert (await answers(reader, 1))[0][0] == 200
    assert stack.answered("fast") == 1
    writer.close()


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
async def test_bodies_in_chunks_and_pieces_of_any_size(app: Application, tmp_path: Path, lane: str) -> None:
    """One connection, many uploads: chunks, extensions, trailers and reads cut anywhere."""
    dice = random.Random(4)
    async with running(tmp_path, app.url, lane=lane) as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        for number in range(30):
            body = dice.randbytes(dice.choice((0, 1, 100, 5000, 70000)))
            sent = b""
            at = 0
            while at < len(body):
                size = dice.choice((1, 7, 16, 1000, 40000))
                piece = body[at : at + size]
                at += len(piece)
                extension = dice.choice((b"", b";a", b';a="b c"'))
                sent += b"%x%b\r\n%b\r\n" % (len(piece), extension, piece)
            sent += b"0\r\n" + dice.choice((b"", b"Checksum: 1\r\n")) + b"\r\n"
            data = stack.head("POST", f"/{number}", "Transfer-Encoding: chunked") + sent
            at = 0
            while at < len(data):
                size = dice.choice((1, 50, 3000, 100000))
                writer.write(data[at : at + size])
                at += size
                await asyncio.sleep(0)
            async with asyncio.timeout(20):
                ((status, answer),) = await answers(reader, 1)
            assert status == 200
            assert json.loads(answer) == {
                "target": f"/{number}",
                "length": len(body),
                "sha256": hashlib.sha256(body).hexdigest(),
            }
        await stack.until(lambda: stack.answered(lane) == 30, "all are counted")
        writer.close()


async def test_many_requests_on_one_connection(stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    async with asyncio.timeout(60):
        for number in range(500):
            writer.write(stack.head("GET", f"/{number}"))
            ((_, body),) = await answers(reader, 1)
            assert json.loads(body)["target"] == f"/{number}"
    assert stack.answered("fast") == 500
    writer.close()


async def test_http10_connections_stay_when_they_ask_to(stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    head = stack.head("GET", "/x", "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
    for _ in range(2):
        writer.write(head)
        answer = await read_head(reader)
        assert b"\r\nConnection: keep-alive\r\n" in answer
        length = answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
    writer.write(head.replace(b"Connection: keep-alive\r\n", b""))
    assert b"connection: keep-alive" not in (await reader.read()).lower()
    assert stack.answered("fast") == 3
    writer.close()


# ── TLS ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_visitors_over_tls(app: Application, stack: Stack) -> None:
    trust = ssl.create_default_context(cafile=str(stack.ca))
    headers = {"Host": stack.host, **stack.authorization}
    body = random.Random(1).randbytes(3 * MB)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session:
        for _ in range(3):
            async with session.post(
                f"{stack.tunnel_url}/x", headers=headers, data=io.BytesIO(body)
            ) as answer:
                assert (await answer.json())["sha256"] == hashlib.sha256(body).hexdigest()
        async with session.get(f"{stack.tunnel_url}/forever", headers=headers) as answer:
            await answer.content.readexactly(5 * MB)
        await stack.until(lambda: app.open == 0, "the application's request is cancelled")
        async with session.ws_connect(f"{stack.tunnel_url}/echo", headers=headers, max_msg_size=0) as ws:
            await ws.send_bytes(body)
            assert await ws.receive_bytes(timeout=10) == body
    assert stack.answered("aiohttp") == 0
    await stack.until(lambda: stack.edge.grants.all_streams == 0, "no stream is left")


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
async def test_the_end_of_an_upload_over_tls(app: Application, tmp_path: Path, lane: str) -> None:
    """Reading pauses while records wait between the socket and the front, and the socket has no more to say: the rest
    must come all the same. Sizes around multiples of what one read may bring."""
    async with running(tmp_path, app.url, lane=lane) as stack:
        trust = ssl.create_default_context(cafile=str(stack.ca))
        port = int(stack.tunnel_url.rpartition(":")[2])

        def upload(total: int) -> bytes:
            size = total - len(stack.head("POST", "/swallow", f"Content-Length: {total}"))
            data = stack.head("POST", "/swallow", f"Content-Length: {size}") + bytes(size)
            plain = socket.create_connection(("127.0.0.1", port))
            with trust.wrap_socket(plain, server_hostname="localhost") as sock:
                sock.settimeout(20)
                sock.sendall(data)
                received = b""
                while not received.endswith(b"%d" % size):
                    part = sock.recv(65536)
                    assert part, received
                    received += part
            return received

        for extra in (0, 1, 2, 14, 1000):
            received = await asyncio.to_thread(upload, 12 * 256 * 1024 + extra)
            assert received.startswith(b"HTTP/1.1 200 ")


async def test_half_a_tls_connection_is_none(app: Application, stack: Stack) -> None:
    """TLS has no half-closed connections: the stream ends with the visitor."""
    trust = ssl.create_default_context(cafile=str(stack.ca))
    port = int(stack.tunnel_url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname="localhost")
    writer.write(stack.head("GET", "/forever"))
    await reader.readexactly(1000)
    assert app.open == 1
    writer.close()
    await stack.until(lambda: app.open == 0, "the application's request is cancelled")


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_download_that_nobody_reads_is_bounded(app: Application, stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=1024)
    writer.write(stack.head("GET", "/forever"))
    await reader.readexactly(1000)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    connection = only(stack)
    await stack.until(lambda: connection.paused, "the visitor's socket is full")
    (stream,) = next(iter(stack.edge.grants._by_session.values())).streams
    seen = -1
    while seen != stream.bytes_received:
        seen = stream.bytes_received
        await asyncio.sleep(0.3)
    # All that was received and not consumed waits here, and it is what the window allows.
    waiting = connection.transport.get_write_buffer_size()
    assert 0 < waiting <= MAX_WINDOW + 1024
    assert 0 < connection.unconsumed_bytes <= stream.window
    # When the visitor reads on, so does everything else.
    before = stream.bytes_received
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    await reader.readexactly(20 * MB)
    assert stream.bytes_received > before
    writer.transport.abort()
    await stack.until(lambda: app.open == 0, "the application's request is cancelled")


async def test_an_upload_that_nobody_reads_is_bounded(app: Application, stack: Stack) -> None:
    app.reading.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    total = 64 * MB
    writer.write(stack.head("POST", "/swallow", f"Content-Length: {total}"))

    async def send() -> None:
        for _ in range(total // MB):
            writer.write(bytes(MB))
            await writer.drain()

    sending = asyncio.create_task(send())
    await stack.until(lambda: app.open == 1, "the application has the request")
    connection = only(stack)
    await stack.until(lambda: not connection.transport.is_reading(), "reading the visitor pauses")
    (stream,) = next(iter(stack.edge.grants._by_session.values())).streams
    await asyncio.sleep(0.5)
    assert not sending.done()
    assert not connection.transport.is_reading()
    assert 0 < stream.queued <= HIGH_WATER + 256 * 1024  # and one read
    assert connection.held_bytes == 0
    # Meanwhile others are served.
    assert (await stack.get("/")).status == 200
    app.reading.set()
    await sending
    assert await answers(reader, 1) == [(200, str(total).encode())]
    writer.close()


async def test_requests_ahead_of_their_answers_are_bounded(app: Application, stack: Stack) -> None:
    """A visitor that pipelines and reads nothing fills its own sockets, not the edge."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=1024)
    app.reading.clear()
    writer.write(stack.head("POST", "/swallow", "Content-Length: 1") + b"x")
    await stack.until(lambda: app.open == 1, "the application has the request")
    connection = only(stack)
    more = stack.head("GET", "/more")
    number = 4 * MB // len(more)
    writer.write(more * number)
    await stack.until(lambda: not connection.transport.is_reading(), "reading the visitor pauses")
    assert HELD_LIMIT < connection.held_bytes <= HELD_LIMIT + 256 * 1024
    app.reading.set()
    first = await answers(reader, 1 + 300)
    assert [status for status, _ in first] == [200] * 301
    writer.transport.abort()


async def test_answers_that_nobody_reads_stop_the_requests(app: Application, tmp_path: Path) -> None:
    page = b"y" * 24_000  # less than the smallest window: answers end, however little is read

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(page) + page)
            await writer.drain()

    async with RawServer(talk) as server, running(tmp_path, server.url, lane="fast") as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(stack.head("GET", "/") * 1000)
        await stack.until(
            lambda: any(c.paused and c.phase_name == "HEAD" for c in stack.edge.lane.connections),
            "an answer waits for the visitor, and the next request for the answer",
        )
        await asyncio.sleep(0.2)
        assert stack.answered("fast") < 500
        (connection,) = [c for c in stack.edge.lane.connections if c.paused]
        assert connection.transport.get_write_buffer_size() <= MAX_WINDOW + MB
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert [status for status, _ in await answers(reader, 1000)] == [200] * 1000
        writer.close()


# ── past the transport ────────────────────────────────────────────────────────────────────────────────────────────


async def trickle(reader: asyncio.StreamReader, size: int) -> bytes:
    """So many bytes in pieces, with pauses: what is on the way in front of it fills up and runs empty by turns."""
    parts = []
    while size:
        part = await reader.read(min(size, 300_000))
        assert part, "the connection was closed"
        parts.append(part)
        size -= len(part)
        await asyncio.sleep(0.005)
    return b"".join(parts)


class Held:
    """A visitor's transport that keeps what it is given, as if the event loop had not come round to it yet."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.holding = False
        self.waiting: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self.holding:
            self.waiting.append(bytes(data))
        else:
            self._transport.write(data)

    def writelines(self, list_of_data: Iterable[bytes]) -> None:
        for data in list_of_data:
            self.write(data)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size() + sum(map(len, self.waiting))

    def release(self) -> None:
        self.holding = False
        self._transport.writelines(self.waiting)
        self.waiting = []


async def test_nothing_overtakes_what_waits_in_the_transport(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has room again, the transport has not written yet, and the next message comes."""
    held: list[Held] = []
    made = Front.connection_made

    def connection_made(self: Front, transport: Any) -> None:
        held.append(Held(transport))
        made(self, cast(Any, held[-1]))

    monkeypatch.setattr(Front, "connection_made", connection_made)
    first, big, last = b"first", random.Random(1).randbytes(16 * MB), b"last"
    go_on = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        for message in (first, big, last):
            await go_on.wait()
            go_on.clear()
            writer.write(message)
            await writer.drain()

    async with RawServer(talk) as server, running(tmp_path, server.url, lane="fast") as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=1024)
        writer.write(stack.head("GET", "/", "Connection: Upgrade", "Upgrade: websocket"))
        assert (await read_head(reader)).startswith(b"HTTP/1.1 101 ")
        async with asyncio.timeout(30):
            go_on.set()
            assert await reader.readexactly(len(first)) == first
            transport = held[-1]
            assert not transport.waiting  # it was not asked
            transport.holding = True
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            go_on.set()
            (stream,) = next(iter(stack.edge.grants._by_session.values())).streams
            await stack.until(lambda: stream.bytes_received == len(first) + len(big), "all of it came")
            waiting = len(b"".join(transport.waiting))
            assert waiting
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            received = await reader.readexactly(len(big) - waiting)
            go_on.set()
            await stack.until(
                lambda: len(b"".join(transport.waiting)) == waiting + len(last), "the last message waits too"
            )
            transport.release()
            received += await reader.readexactly(waiting + len(last))
        assert received == big + last
        writer.close()


async def test_answers_past_a_full_transport_stay_in_order(tmp_path: Path) -> None:
    """Small answers go to the kernel directly, but not past what the transport still has of the big ones."""
    bodies = [random.Random(n).randbytes(1_500_000 if n % 4 == 0 else 100 + n) for n in range(24)]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            number = int((await read_head(reader)).split(b" ")[1][1:])
            body = bodies[number]
            if number % 3 == 2:
                framed = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            else:
                framed = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            writer.write(b"HTTP/1.1 200 OK\r\n" + framed)
            await writer.drain()

    async with RawServer(talk) as server, running(tmp_path, server.url, lane="fast") as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=65536)
        before = stack.answered("fast")
        async with asyncio.timeout(60):
            writer.write(b"".join(stack.head("GET", f"/{number}") for number in range(len(bodies))))
            for body in bodies:
                head = await read_head(reader)
                if b"chunked" not in head.lower():
                    assert await trickle(reader, len(body)) == body
                    continue
                received = b""
                while size := int(await reader.readline(), 16):
                    received += await trickle(reader, size)
                    assert await reader.readexactly(2) == b"\r\n"
                assert await reader.readexactly(2) == b"\r\n"
                assert received == body
        assert stack.answered("fast") == before + len(bodies)
        writer.close()


async def test_messages_past_a_full_transport_stay_in_order(tmp_path: Path) -> None:
    sizes = [400_000 if n % 5 == 0 else 1 + 37 * n for n in range(100)]
    messages = [random.Random(n).randbytes(size) for n, size in enumerate(sizes)]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        for message in messages:
            writer.write(message)
            await writer.drain()
            await asyncio.sleep(0.001)

    async with RawServer(talk) as server, running(tmp_path, server.url, lane="fast") as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=65536)
        writer.write(stack.head("GET", "/", "Connection: Upgrade", "Upgrade: websocket"))
        assert (await read_head(reader)).startswith(b"HTTP/1.1 101 ")
        async with asyncio.timeout(60):
            assert await trickle(reader, sum(sizes)) == b"".join(messages)
        writer.close()


async def test_no_credit_for_a_body_that_was_granted_already(tmp_path: Path) -> None:
    """Of an answer whose length is known, and fits the first window, the edge says nothing while it passes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            fits = b"/fits" in await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (FLOOR if fits else 2 * FLOOR))
            for _ in range(8 if fits else 16):
                writer.write(b"z" * (FLOOR // 8))
                await writer.drain()
                await asyncio.sleep(0.01)

    async with RawServer(talk) as server, running(tmp_path, server.url, lane="fast") as stack:

        def credits() -> int:
            return sum(link.session.stats()["frames_out_credit"] for link in stack.edge.tunnels._links)

        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        counts = []
        for path in ("/warm", "/fits", "/more"):
            before = credits()
            writer.write(stack.head("GET", path))
            async with asyncio.timeout(10):
                ((status, _),) = await answers(reader, 1)
            assert status == 200
            counts.append(credits() - before)
        assert counts[1] == 0
        assert counts[2] > 0
        writer.close()


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_revocation_ends_whatever_is_under_way(app: Application, stack: Stack) -> None:
    """A download, an upload and a WebSocket, all of the fast lane."""
    headers = {"Host": stack.host, **stack.authorization}
    reader, download = await asyncio.open_connection("127.0.0.1", stack.port)
    download.write(stack.head("GET", "/forever"))
    await reader.readexactly(MB)
    uploaded, upload = await asyncio.open_connection("127.0.0.1", stack.port)
    upload.write(stack.head("POST", "/swallow", f"Content-Length: {MB}") + bytes(1000))
    async with stack.session.ws_connect(stack.url("/echo"), headers=headers) as ws:
        await ws.send_bytes(b"a")
        assert await ws.receive_bytes() == b"a"
        await stack.until(lambda: app.open == 3, "all three are under way")
        phases = sorted(c.phase_name for c in stack.edge.lane.connections if c.phase_name != "HEAD")
        assert phases == ["FAST", "FAST", "OPAQUE"]
        revoked = await stack.edge.service.delete(stack.share_id)
        assert (revoked.sessions, revoked.streams) == (1, 3)
        with pytest.raises(ConnectionResetError):  # noqa: PT012
            while await reader.read(MB):
                pass
        with pytest.raises(ConnectionResetError):
            await uploaded.read()
        assert (await ws.receive(timeout=5)).type is not WSMsgType.BINARY
    await stack.until(lambda: app.open == 0, "the application sees all of them end")
    download.transport.abort()
    upload.transport.abort()


async def test_a_session_that_expires_in_the_fast_lane(stack: Stack) -> None:
    share = await stack.new_share()
    loop = asyncio.get_running_loop()
    (grant,) = stack.edge.grants._by_session.values()
    token = await stack.new_token(share, time.time() + 1)
    await stack.warm(share, token)
    headers = {"Host": f"{share}.localhost:{stack.port}", "Authorization": f"Bearer {token}"}
    deadline = loop.time() + 10
    statuses = []
    while loop.time() < deadline and (not statuses or statuses[-1] == 200):
        async with stack.session.get(stack.url("/"), headers=headers) as got:
            statuses.append(got.status)
        await asyncio.sleep(0.05)
    assert statuses[0] == 200
    assert statuses[-1] == 401
    assert stack.edge.grants.is_live(grant)


async def test_half_closed_websockets_get_the_last_bytes(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        key = head.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
        digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
        )
        received = await reader.read()  # to the visitor's end
        writer.write(b"last words: " + received)

    lines = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    async with RawServer(talk) as server, running(tmp_path, server.url, lane="fast") as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(stack.head("GET", "/", *lines) + b"right behind, ")
        assert (await read_head(reader)).startswith(b"HTTP/1.1 101 ")
        writer.write(b"and later")
        writer.write_eof()
        async with asyncio.timeout(10):
            assert await reader.read() == b"last words: right behind, and later"
        writer.close()
        await stack.until(lambda: stack.edge.grants.all_streams == 0, "no stream is left")


async def test_a_visitor_that_half_closes_cancels_its_request(app: Application, stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    writer.write(stack.head("GET", "/forever"))
    await reader.readexactly(1000)
    writer.write_eof()
    await stack.until(lambda: app.open == 0, "the application's request is cancelled")
    writer.transport.abort()


async def test_an_application_that_never_answers(tmp_path: Path) -> None:
    waiting = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        waiting.set()
        await reader.read()

    async with RawServer(talk) as server, running(tmp_path, server.url, lane="fast") as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(stack.head("GET", "/", "Accept: text/html"))
        await waiting.wait()
        stack.edge.lane.tick(time.monotonic() + 299)
        assert only(stack).phase_name == "FAST"
        stack.edge.lane.tick(time.monotonic() + 301)
        async with asyncio.timeout(10):
            ((status, page),) = await answers(reader, 1)
        assert status == 504
        assert b"<html" in page
        await stack.until(lambda: stack.edge.grants.all_streams == 0, "no stream is left")
        writer.close()


async def test_an_upload_may_take_its_time(app: Application, stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    writer.write(stack.head("POST", "/swallow", "Content-Length: 10"))
    await stack.until(lambda: app.open == 1, "the application has the request")
    connection = only(stack)
    limits = []
    (stream,) = next(iter(stack.edge.grants._by_session.values())).streams
    for sent in range(1, 10):
        writer.write(b"x")
        await stack.until(lambda sent=sent: stream.bytes_sent == sent, "it was passed on")
        assert connection.time_limit is not None
        what, until = connection.time_limit
        assert what == "BODY"
        limits.append(until)
    assert sorted(set(limits)) == limits, "every byte moves the limit"
    assert limits[-1] > time.monotonic() + LIMITS.body_progress_seconds - 10
    writer.write(b"x")
    assert await answers(reader, 1) == [(200, b"10")]
    writer.close()


@pytest.mark.parametrize("broken", [b"x\r\n", b"5\r\nhelloX", b"-1\r\n", b"1 \r\n"])
@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
async def test_a_malformed_body_is_refused(
    app: Application, tmp_path: Path, lane: str, broken: bytes
) -> None:
    async with running(tmp_path, app.url, lane=lane) as stack:
        received = await stack.raw(stack.head("POST", "/swallow", "Transfer-Encoding: chunked") + broken)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert b"\r\nConnection: close\r\n" in received
        await stack.until(lambda: app.open == 0, "the application's request is cancelled")
        await stack.until(lambda: stack.edge.grants.all_streams == 0, "no stream is left")
