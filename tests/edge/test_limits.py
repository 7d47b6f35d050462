"""What visitors may take in time and number, on both lanes. Floods of them, against processes: tests/conformance."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSMsgType, web
from support.stack import Stack, read_head, running
from support.turns import Turns

from guestpass.config import Limits
from guestpass.edge.limits import TABLE, Refusals, client_of
from guestpass.loop import unsent
from guestpass_speedups.relay import ENDED_AT_ONCE
from guestpass_speedups.session import FLOOR

LANES = ("fast", "aiohttp")
MB = 1 << 20
TICKS = 25


class Application:
    def __init__(self) -> None:
        self.open = 0
        self.url = ""
        self.reading = asyncio.Event()
        self.reading.set()

    async def forever(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        self.open += 1
        try:
            while True:
                await response.write(bytes(65536))
                await asyncio.sleep(0)
        finally:
            self.open -= 1

    async def swallow(self, request: web.Request) -> web.Response:
        self.open += 1
        try:
            size = 0
            async for part in request.content.iter_any():
                size += len(part)
                await self.reading.wait()
            return web.Response(text=str(size))
        finally:
            self.open -= 1

    async def talk(self, request: web.Request) -> web.WebSocketResponse:
        """Says something every tenth of a second, TICKS times."""
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        self.open += 1
        try:
            for _ in range(0 if "silent" in request.query else TICKS):
                await ws.send_str("tick")
                await asyncio.sleep(0.1)
            await ws.receive()
        finally:
            self.open -= 1
        return ws

    async def big(self, request: web.Request) -> web.Response:
        return web.Response(body=bytes(int(request.match_info["size"])))

    async def never(self, request: web.Request) -> web.Response:
        self.open += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.open -= 1
        raise AssertionError("the event is never set")


@pytest.fixture
async def app() -> AsyncIterator[Application]:
    it = Application()
    application = web.Application(client_max_size=64 * MB)
    application.router.add_get("/forever", it.forever)
    application.router.add_post("/swallow", it.swallow)
    application.router.add_get("/talk", it.talk)
    application.router.add_get("/never", it.never)
    application.router.add_get("/big/{size}", it.big)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    it.url = "http://{}:{}".format(*runner.addresses[0][:2])
    yield it
    await runner.cleanup()


# What `asked` opened; the end of a test closes it.
opened: list[asyncio.StreamWriter] = []


@pytest.fixture(autouse=True)
async def _nothing_stays_open() -> AsyncIterator[None]:
    yield
    while opened:
        writer = opened.pop()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def limited(
    folder: Path, app: Application, lane: str, limits: Mapping[str, int], **edge: Any
) -> AsyncIterator[Stack]:
    async with running(folder, app.url, lane=lane, config={"limits": limits}, edge=edge) as stack:
        yield stack


def refusals(stack: Stack, limit: str) -> int:
    found = stack.edge.metrics.registry.get_sample_value("guestpass_refusals_total", {"reason": limit})
    return int(found or 0)


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status, and the whole answer."""
    head = await read_head(reader)
    sizes = [
        line[16:] for line in head.decode("latin-1").lower().split("\r\n") if line[:15] == "content-length:"
    ]
    return int(head[9:12]), head + await reader.readexactly(int(sizes[0]))


async def asked(stack: Stack, *lines: str, path: str = "/forever") -> tuple[int, asyncio.StreamWriter]:
    """Status of a request on a connection of its own that stays open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    opened.append(writer)
    writer.write(stack.head("GET", path, *lines))
    async with asyncio.timeout(10):
        return int((await read_head(reader))[9:12]), writer


@pytest.mark.parametrize("lane", LANES)
async def test_connections_of_one_client(app: Application, tmp_path: Path, lane: str) -> None:
    async with limited(tmp_path, app, lane, {"connections_per_client": 8}) as stack:
        await stack.until(lambda: stack.edge.lane.client("127.0.0.1").open <= 1, "the tunnels do not count")
        await stack.session.close()
        await stack.until(lambda: stack.edge.lane.client("127.0.0.1").open == 0, "nothing is open")
        streams = [await asyncio.open_connection("127.0.0.1", stack.port) for _ in range(9)]
        status, told = await answer(streams[8][0])
        assert status == 429
        assert b"limit: connections_per_client" in told
        assert b"\r\nRetry-After: 5\r\n" in told
        assert b"\r\nConnection: close\r\n" in told
        assert await streams[8][0].read() == b""
        streams[8][1].close()
        streams[0][1].close()
        await stack.until(lambda: stack.edge.lane.client("127.0.0.1").open == 7, "two less")
        streams.append(await asyncio.open_connection("127.0.0.1", stack.port))
        streams[-1][1].write(stack.head("GET", "/big/3"))
        assert (await answer(streams[-1][0]))[0] == 200
        # Those beyond twice the limit are not even told: the first are held until they have their answer.
        held = [await asyncio.open_connection("127.0.0.1", stack.port) for _ in range(20)]
        ends = [await asyncio.wait_for(quiet(reader.read()), 10) for reader, _ in held]
        assert b"" in ends
        assert sum(end.startswith(b"HTTP/1.1 429 ") for end in ends) <= 8
        for _, writer in streams + held:
            writer.transport.abort()
        assert refusals(stack, "connections_per_client") == 21


async def quiet(read: Any) -> bytes:
    try:
        found = await read
        assert isinstance(found, bytes)
        return found
    except ConnectionError:
        return b""


@pytest.mark.parametrize("lane", LANES)
async def test_clients_behind_a_trusted_proxy(
    app: Application, tmp_path: Path, lane: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests under way count, for whom the proxy speaks: not its connections, and not what it has done before."""
    caplog.set_level("INFO", "guestpass")
    limits = {"connections_per_client": 2}
    one, other = "X-Forwarded-For: 198.51.100.7", "X-Forwarded-For: 203.0.113.9"
    async with limited(tmp_path, app, lane, limits, trusted_proxies=["127.0.0.0/8"]) as stack:
        idle = [await asked(stack, one, path="/big/1") for _ in range(5)]
        assert [status for status, _ in idle] == [200] * 5
        busy = [await asked(stack, one) for _ in range(2)]
        assert [status for status, _ in busy] == [200] * 2
        assert (await asked(stack, one))[0] == 429
        assert (await asked(stack, other))[0] == 200
        busy[0][1].transport.abort()
        await stack.until(lambda: stack.edge.lane.client("198.51.100.7").open == 1, "one less")
        assert (await asked(stack, one))[0] == 200
        assert refusals(stack, "connections_per_client") == 1
        assert "429: 198.51.100.7: " in caplog.text
        await stack.edge.service.delete(stack.share_id)
        await stack.until(lambda: stack.edge.lane.client("198.51.100.7").open == 0, "nothing is left")


@pytest.mark.parametrize("lane", LANES)
async def test_a_trusted_proxy_speaks_for_several_on_one_connection(
    app: Application, tmp_path: Path, lane: str
) -> None:
    """Each request counts for its own client, also where the one before it was for another lane."""
    one, other = "X-Forwarded-For: 198.51.100.7", "X-Forwarded-For: 203.0.113.9"
    async with limited(tmp_path, app, lane, {}, trusted_proxies=["127.0.0.0/8"]) as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        opened.append(writer)
        writer.write(stack.head("GET", "/big/1", one))
        assert (await answer(reader))[0] == 200
        stranger = stack.head("GET", "/big/1", other).replace(stack.token.encode(), b"unknown")
        writer.write(stranger)
        assert (await answer(reader))[0] == 401
        writer.write(stack.head("GET", "/forever", one))
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
        assert [stack.edge.lane.client(ip).open for ip in ("198.51.100.7", "203.0.113.9")] == [1, 0]
        writer.transport.abort()
        await stack.until(lambda: stack.edge.lane.client("198.51.100.7").open == 0, "nothing is left")


@pytest.mark.parametrize("lane", LANES)
async def test_streams_of_a_share_and_of_a_session(app: Application, tmp_path: Path, lane: str) -> None:
    async with limited(tmp_path, app, lane, {"streams_per_session": 2, "streams_per_share": 3}) as stack:
        first = stack.token
        busy = [await asked(stack) for _ in range(2)]
        assert [status for status, _ in busy] == [200] * 2
        got = await stack.get("/big/1")
        assert got.status == 429
        assert b"limit: streams_per_session" in got.body
        assert got.headers["Retry-After"] == "5"
        stack.token = await stack.new_token(stack.share_id)
        assert (await asked(stack))[0] == 200
        got = await stack.get("/big/1")
        assert got.status == 503
        assert b"limit: streams_per_share" in got.body
        # Another share is not concerned.
        stack.share_id, before = await stack.new_share(), stack.share_id
        stack.token = await stack.new_token(stack.share_id)
        assert (await stack.get("/big/1")).status == 200
        stack.share_id, stack.token = before, first
        for _, writer in busy:
            writer.transport.abort()
        await stack.until(lambda: stack.edge.grants.streams(before) == 1, "two less")
        assert (await stack.get("/big/1")).status == 200
        assert (refusals(stack, "streams_per_session"), refusals(stack, "streams_per_share")) == (1, 1)


@pytest.mark.parametrize("lane", LANES)
async def test_large_bodies(app: Application, tmp_path: Path, lane: str) -> None:
    async with limited(tmp_path, app, lane, {"body_bytes": 1000}) as stack:
        assert (await stack.get("/swallow", method="POST", data=bytes(1000))).body == b"1000"
        for framing, body in (
            ("Content-Length: 1001", b""),
            ("Transfer-Encoding: chunked", b"3e8\r\n" + bytes(1000) + b"\r\n" + b"1\r\nx\r\n"),
        ):
            received = await stack.raw(stack.head("POST", "/swallow", framing) + body)
            assert received.startswith(b"HTTP/1.1 413 ")
            assert b"limit: body_bytes" in received
        assert refusals(stack, "body_bytes") == 2
        await stack.until(lambda: app.open == 0, "the application's request is cancelled")
        await stack.until(lambda: stack.edge.grants.all_streams == 0, "no stream is left")


@pytest.mark.parametrize("lane", LANES)
async def test_large_heads(app: Application, tmp_path: Path, lane: str) -> None:
    async with limited(tmp_path, app, lane, {"head_bytes": 4096}) as stack:
        fits = 4096 - len(stack.head("GET", "/big/1", "X: "))
        assert (
            await stack.raw(stack.head("GET", "/big/1", "X: " + "x" * fits, "Connection: close"), seconds=1)
        ) != b""
        for data in (
            stack.head("GET", "/big/1", "X: " + "x" * (fits + 1)),
            stack.head("GET", "/big/1", "X: " + "x" * fits)[:-2] + b"YYY",
            stack.head("GET", "/big/1", "X: " + "x" * 40_000),
        ):
            received = await stack.raw(data)
            assert received.startswith(b"HTTP/1.1 431 ")
            assert b"limit: head_bytes" in received


@pytest.mark.parametrize("lane", LANES)
async def test_an_application_that_takes_nothing_is_not_the_visitors_fault(
    app: Application, tmp_path: Path, lane: str
) -> None:
    async with limited(tmp_path, app, lane, {"body_progress_seconds": 1}) as stack:
        app.reading.clear()
        size = 16 * MB
        asking = asyncio.create_task(stack.get("/swallow", method="POST", data=io.BytesIO(bytes(size))))
        await stack.until(lambda: app.open == 1, "the application has the request")
        await asyncio.sleep(3)
        app.reading.set()
        assert (await asking).body == b"%d" % size
        assert refusals(stack, "body_progress_seconds") == 0


@pytest.mark.parametrize("lane", LANES)
async def test_an_answer_that_does_not_come(app: Application, tmp_path: Path, lane: str) -> None:
    async with limited(tmp_path, app, lane, {"answer_seconds": 1}) as stack:
        assert (await stack.get("/never")).status == 504
        assert refusals(stack, "answer_seconds") == 1
        await stack.until(lambda: app.open == 0, "the application's request is cancelled")


@pytest.mark.parametrize("lane", LANES)
async def test_who_reads_slowly_stays_and_who_reads_nothing_goes(
    app: Application, tmp_path: Path, lane: str
) -> None:
    async with limited(tmp_path, app, lane, {"write_progress_seconds": 1}) as stack:
        slow, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=1024)
        writer.write(stack.head("GET", "/forever"))
        still, nothing = await asyncio.open_connection("127.0.0.1", stack.port, limit=1024)
        nothing.write(stack.head("GET", "/forever"))
        await still.readexactly(1000)
        nothing.transport.pause_reading()  # type: ignore[attr-defined]
        await slow.readexactly(1000)
        await stack.until(lambda: app.open == 2, "both are under way")
        for _ in range(8):
            await slow.readexactly(MB)
            await asyncio.sleep(0.5)
        assert app.open == 1
        assert refusals(stack, "write_progress_seconds") == 1
        writer.transport.abort()
        await stack.until(lambda: stack.edge.grants.all_streams == 0, "no stream is left")
        nothing.transport.abort()


@pytest.mark.parametrize("first", ["GET / HT", "GET /forever HTTP/1.1"])
async def test_who_came_together_is_ended_a_few_at_a_time(
    app: Application, tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose time is over at the same moment, for a head or for reading. Others are served in between."""
    ended = Turns()
    settings = {"head_seconds": 1, "write_progress_seconds": 1}
    async with limited(tmp_path, app, "fast", settings) as stack:
        note = stack.edge.refusals.note

        def noted(limit: str, who: str) -> str:
            ended.note()
            return note(limit, who)

        monkeypatch.setattr(stack.edge.refusals, "note", noted)
        for _ in range(60):
            _reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=1024)
            opened.append(writer)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(stack.head("GET", "/forever") if "forever" in first else first.encode())
        with ended:
            await stack.until(lambda: ended.total == 60, "all are ended", seconds=30)
    assert ended.most <= ENDED_AT_ONCE


@pytest.mark.parametrize("lane", LANES)
async def test_windows_stay_small_for_who_reads_nothing(app: Application, tmp_path: Path, lane: str) -> None:
    """The kernel's buffer takes the first megabytes as fast as any visitor."""
    async with limited(tmp_path, app, lane, {}) as stack:
        await stack.session.close()
        for _ in range(8):
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", stack.port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
            opened.append(writer)
            writer.write(stack.head("GET", "/forever"))
            await reader.readexactly(100)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        connections = stack.edge.lane.connections
        held, looks = [0], 0
        async with asyncio.timeout(20):
            while looks < 5:  # until nothing moves any more
                before, held = held, [unsent(connection.transport) for connection in connections]
                looks = looks + 1 if held == before and all(c.paused for c in connections) else 0
                await asyncio.sleep(0.1)
        assert stack.edge.lane.client("127.0.0.1").windows.promised <= 8 * 3 * FLOOR
        assert max(held) < MB  # of that of the kernel 256 KiB and the last piece; it would take 4 MB


@pytest.mark.parametrize("lane", LANES)
async def test_windows_of_one_client_share_an_allowance(app: Application, tmp_path: Path, lane: str) -> None:
    async with limited(tmp_path, app, lane, {}) as stack:
        await stack.session.close()
        readers = [await asyncio.open_connection("127.0.0.1", stack.port) for _ in range(4)]
        windows = stack.edge.lane.client("127.0.0.1").windows
        assert windows.promised == 0
        windows.limit = 5 * FLOOR
        for _, writer in readers:
            opened.append(writer)
            writer.write(stack.head("GET", "/forever"))
        for _ in range(40):
            await asyncio.gather(*(reader.readexactly(MB // 4) for reader, _ in readers))
        assert 0 < windows.promised <= 5 * FLOOR
        for _, writer in readers:
            writer.transport.abort()
        await stack.until(lambda: windows.promised == 0, "nothing is promised any more")


@pytest.mark.parametrize("lane", LANES)
async def test_an_answer_that_waits_in_the_kernel_for_who_reads_nothing(
    app: Application, tmp_path: Path, lane: str
) -> None:
    async with limited(tmp_path, app, lane, {"write_progress_seconds": 1, "idle_seconds": 1}) as stack:
        _reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(stack.head("GET", f"/big/{4 * MB}"))
        await stack.until(lambda: refusals(stack, "write_progress_seconds") == 1, "it is cut")
        await stack.until(lambda: stack.edge.grants.all_streams == 0, "no stream is left")
        writer.transport.abort()


@pytest.mark.parametrize("lane", LANES)
async def test_an_upgrade_idles_when_nobody_says_anything(
    app: Application, tmp_path: Path, lane: str
) -> None:
    async with limited(tmp_path, app, lane, {"upgrade_idle_seconds": 1}) as stack:
        headers = {"Host": stack.host, **stack.authorization}
        async with stack.session.ws_connect(stack.url("/talk"), headers=headers) as ws:
            for _ in range(TICKS):
                assert await ws.receive_str(timeout=5) == "tick"
            assert refusals(stack, "upgrade_idle_seconds") == 0
        await stack.until(lambda: app.open == 0, "the application's end is over")
        async with stack.session.ws_connect(stack.url("/talk?silent=1"), headers=headers) as ws:
            assert (await ws.receive(timeout=5)).type is WSMsgType.CLOSED
            assert refusals(stack, "upgrade_idle_seconds") == 1
            await stack.until(lambda: app.open == 0, "the application's end is over")


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
    ],
)
def test_who_is_one_client(address: str, client: str) -> None:
    assert client_of(address) == client


def test_every_limit_has_its_words() -> None:
    """But the end of an idle connection, which is no refusal."""
    assert set(TABLE) == set(Limits.model_fields) - {"idle_seconds"}


def test_a_flood_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    counted: list[str] = []
    refused = Refusals(Limits(), count=counted.append, now=lambda: clock[0])
    with caplog.at_level(logging.INFO, logger="guestpass.edge.limits"):
        ids = {refused.note("head_seconds", "203.0.113.9") for _ in range(1000)}
        refused.note("body_bytes", "203.0.113.9")
        clock[0] = 1.0
        refused.note("head_seconds", "203.0.113.9")
    assert len(ids) == 1000
    assert len(counted) == 1002
    first, other, again = caplog.messages
    assert first.endswith(
        "408: 203.0.113.9: the request's head did not come in time (limits.head_seconds = 30)"
    )
    assert "limits.body_bytes = 0" in other
    assert again.endswith("; 999 more since the last line")
