"""Exchanges that proxies get wrong: each answer through the tunnel is the direct one, and the connection goes on.

Ranges, conditions, answers without a body, long polling, gRPC-web, interim answers, trailers, keep-alive limits of
applications, and heads that never end. What `tests/edge/test_relay.py` shows of server-sent events, early hints,
upgrades and half-closed connections is not shown again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from aiohttp import web
from support.stack import RawServer, Stack, port_of, read_head, running

MB = 1 << 20

# Larger than any buffer on the way, so that what is kept of it shows in the process's memory.
ENDLESS = 100 * MB
# Buffers of two connections and their tunnel, and what the allocator keeps.
KEPT_MOST = 24 * MB

DOCUMENT = bytes(range(256)) * 400

Start = Callable[..., contextlib.AbstractAsyncContextManager[Stack]]


@pytest.fixture(params=["fast", "aiohttp"])
def start(request: pytest.FixtureRequest) -> Start:
    """`running`, with either lane."""
    return functools.partial(running, lane=request.param)


# ── answers are the direct ones ──────────────────────────────────────────────────────────────────────────────────


async def document(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(request.app[FILE])


async def nothing(request: web.Request) -> web.Response:
    return web.Response(status=int(request.query["status"]))


async def chunked(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"X-Kind": "chunked"})
    await answer.prepare(request)
    if request.method != "HEAD":
        await answer.write(b"some ")
        await answer.write(b"bytes")
    return answer


async def fields(request: web.Request) -> web.Response:
    answer = web.Response(text="x")
    for number in range(100):
        answer.headers.add("X-Same", f"{number}")
    answer.headers["X-Empty"] = ""
    answer.headers["X-Latin"] = "caf\xe9".encode("latin-1").decode("utf-8", "surrogateescape")
    return answer


FILE = web.AppKey("FILE", Path)
# Of Last-Modified: the file's time is set to it.
WHEN = 1_700_000_000
DATE = "Tue, 14 Nov 2023 22:13:20 GMT"


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[str]:
    path = tmp_path / "document.bin"
    path.write_bytes(DOCUMENT)
    os.utime(path, (WHEN, WHEN))
    application = web.Application()
    application[FILE] = path
    application.router.add_get("/document", document)
    application.router.add_route("*", "/nothing", nothing)
    application.router.add_get("/chunked", chunked)
    application.router.add_get("/fields", fields)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


# name → method, path, lines, status
EXCHANGES: dict[str, tuple[str, str, tuple[str, ...], int]] = {
    "a first range": ("GET", "/document", ("Range: bytes=0-9",), 206),
    "a range in the middle": ("GET", "/document", ("Range: bytes=1000-70000",), 206),
    "an open range": ("GET", "/document", ("Range: bytes=102300-",), 206),
    "the last bytes": ("GET", "/document", ("Range: bytes=-5",), 206),
    "a range that there is not": ("GET", "/document", ("Range: bytes=999999-",), 416),
    "a range that is none": ("GET", "/document", ("Range: lines=1-2",), 416),
    "a range of HEAD": ("HEAD", "/document", ("Range: bytes=0-9",), 206),
    "a range if unchanged": ("GET", "/document", ("Range: bytes=0-9", f"If-Range: {DATE}"), 206),
    "a range if unchanged, changed": (
        "GET",
        "/document",
        ("Range: bytes=0-9", "If-Range: Tue, 14 Nov 2000 22:13:20 GMT"),
        200,
    ),
    "not modified, by time": ("GET", "/document", (f"If-Modified-Since: {DATE}",), 304),
    "modified, by time": ("GET", "/document", ("If-Modified-Since: Tue, 14 Nov 2000 22:13:20 GMT",), 200),
    "modified, by tag": ("GET", "/document", ('If-None-Match: "other"',), 200),
    "any tag": ("GET", "/document", ("If-None-Match: *",), 304),
    "not modified, HEAD": ("HEAD", "/document", (f"If-Modified-Since: {DATE}",), 304),
    "precondition failed, by tag": ("GET", "/document", ('If-Match: "other"',), 412),
    "precondition failed, by time": (
        "GET",
        "/document",
        ("If-Unmodified-Since: Tue, 14 Nov 2000 22:13:20 GMT",),
        412,
    ),
    "the whole": ("GET", "/document", (), 200),
    "HEAD of the whole": ("HEAD", "/document", (), 200),
    "HEAD of what has no length": ("HEAD", "/chunked", (), 200),
    "what has no length": ("GET", "/chunked", (), 200),
    "204": ("GET", "/nothing?status=204", (), 204),
    "204 to POST": ("POST", "/nothing?status=204", ("Content-Length: 0",), 204),
    "204 to DELETE": ("DELETE", "/nothing?status=204", (), 204),
    "200 without a body": ("GET", "/nothing?status=200", (), 200),
    "an unknown class of success": ("GET", "/nothing?status=299", (), 299),
    "a hundred fields of one name": ("GET", "/fields", (), 200),
}

# A proxy has its own, or dates them itself.
NOT_COMPARED = (b"connection", b"date", b"via", b"keep-alive", b"transfer-encoding", b"cache-control")

Answer = tuple[int, dict[bytes, list[bytes]], bytes]


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> Answer:
    """Status, fields and body of one answer on a connection that goes on. Fields of one name keep their order."""
    writer.write(head)
    lines = (await read_head(reader)).split(b"\r\n")[:-2]
    status = int(lines[0].split()[1])
    pairs = [(k.lower(), v.strip()) for k, _, v in (line.partition(b":") for line in lines[1:])]
    length = [v for k, v in pairs if k == b"content-length"]
    body = b""
    if head.startswith(b"HEAD") or status in (204, 304):
        pass
    elif length:
        body = await reader.readexactly(int(length[0]))
    elif (b"transfer-encoding", b"chunked") in pairs:
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        assert await reader.readuntil(b"\r\n") == b"\r\n"
    found: dict[bytes, list[bytes]] = {}
    for name, value in pairs:
        if name not in NOT_COMPARED and not (name == b"content-length" and value == b"0"):
            found.setdefault(name, []).append(value)
    return status, found, body


async def test_answers_are_those_of_the_direct_connection(app: str, start: Start, tmp_path: Path) -> None:
    """All on one connection, so that a body which is counted wrongly shows in the next answer."""
    wrong = []
    async with start(tmp_path, app) as stack:
        direct = await asyncio.open_connection("127.0.0.1", port_of(app))
        tunnel = await asyncio.open_connection("127.0.0.1", stack.port)
        for name, (method, path, lines, status) in EXCHANGES.items():
            bare = "\r\n".join((f"{method} {path} HTTP/1.1", "Host: x", *lines, "", "")).encode()
            expected = await exchange(*direct, bare)
            assert expected[0] == status, name
            found = await exchange(*tunnel, stack.head(method, path, *lines))
            if found != expected:
                wrong.append((name, expected, found))
        for _, writer in (direct, tunnel):
            writer.close()
            await writer.wait_closed()
    assert not wrong


# ── answers that take their time ─────────────────────────────────────────────────────────────────────────────────


async def test_long_polling(start: Start, tmp_path: Path) -> None:
    """A poll waits until there is news; twenty wait at a time, and each gets its own."""
    news: dict[str, asyncio.Future[str]] = {}

    async def poll(request: web.Request) -> web.Response:
        waiting = news.setdefault(request.query["who"], asyncio.get_running_loop().create_future())
        return web.Response(text=await waiting)

    application = web.Application()
    application.router.add_get("/poll", poll)
    async with served(application) as url, start(tmp_path, url) as stack:
        polls = [asyncio.create_task(stack.get(f"/poll?who={n}")) for n in range(20)]
        await stack.until(lambda: len(news) == len(polls), "all wait")
        for n in reversed(range(20)):
            news[f"{n}"].set_result(f"news for {n}")
        assert [(await task).body for task in polls] == [b"news for %d" % n for n in range(20)]


def grpc_frame(payload: bytes, *, trailers: bool = False) -> bytes:
    """A message of gRPC-web: flags, length, payload; flag 0x80 marks the trailers."""
    return struct.pack("!BI", 0x80 if trailers else 0, len(payload)) + payload


async def test_grpc_web_messages_come_one_by_one(start: Start, tmp_path: Path) -> None:
    """A server-streaming call of gRPC-web: the request as it was sent, each message when it is sent, trailers last."""
    asked: list[bytes] = []
    go_on = asyncio.Queue[None]()

    async def call(request: web.Request) -> web.StreamResponse:
        assert request.content_type == "application/grpc-web+proto"
        asked.append(await request.read())
        answer = web.StreamResponse(headers={"Content-Type": "application/grpc-web+proto"})
        await answer.prepare(request)
        for number in range(5):
            await answer.write(grpc_frame(b"message %d" % number))
            await go_on.get()
        await answer.write(grpc_frame(b"grpc-status:0\r\ngrpc-message:\r\n", trailers=True))
        return answer

    application = web.Application()
    application.router.add_post("/package.Service/Method", call)
    async with served(application) as url, start(tmp_path, url) as stack:
        request = grpc_frame(bytes(range(256)))
        async with stack.session.post(
            stack.url("/package.Service/Method"),
            data=request,
            headers={
                "Host": stack.host,
                **stack.authorization,
                "Content-Type": "application/grpc-web+proto",
                "X-Grpc-Web": "1",
            },
        ) as answer:
            for number in range(5):
                expected = grpc_frame(b"message %d" % number)
                assert await answer.content.readexactly(len(expected)) == expected
                go_on.put_nowait(None)
            assert (await answer.content.read()).startswith(b"\x80")
        assert asked == [request]


@contextlib.asynccontextmanager
async def served(application: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


# ── interim answers and trailers ─────────────────────────────────────────────────────────────────────────────────


async def test_interim_answers_keep_their_order(start: Start, tmp_path: Path) -> None:
    interim = [b"HTTP/1.1 102 Processing", b"HTTP/1.1 103 Early Hints", b"HTTP/1.1 199 Unknown"]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            for line in interim:
                writer.write(line + b"\r\nX-Interim: yes\r\n\r\n")
                await asyncio.sleep(0.01)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        received = await stack.raw(stack.head("GET", "/") + stack.head("GET", "/", "Connection: close"))
        lines = [line for line in received.split(b"\r\n") if b"HTTP/1.1 " in line]
        lines = [line[line.index(b"HTTP/1.1 ") :] for line in lines]
        assert lines == [*interim, b"HTTP/1.1 200 OK"] * 2


async def test_visitors_of_http10_get_no_interim_answers(start: Start, tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        received = await stack.raw(stack.head("GET", "/").replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert b" 103 " not in received
        assert received.split(b"\r\n")[0].endswith(b" 200 OK")


async def test_trailers_of_an_answer(start: Start, tmp_path: Path) -> None:
    """They arrive as trailers or not at all, never among the fields of the head."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            writer.write(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
                b"2\r\nok\r\n0\r\nX-Sum: 42\r\n\r\n"
            )

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        received = await stack.raw(
            stack.head("GET", "/", "TE: trailers") + stack.head("GET", "/", "Connection: close")
        )
        assert received.count(b"HTTP/1.1 200 OK") == 2
        for answer in received.split(b"HTTP/1.1 200 OK")[1:]:
            head, _, rest = answer.partition(b"\r\n\r\n")
            assert b"X-Sum: 42" not in head
            assert rest.startswith(b"2\r\nok\r\n0\r\n")


@pytest.mark.parametrize(
    "trailer", [b"Content-Length: 7", b"Set-Cookie: a=b", b"Transfer-Encoding: chunked", b"Host: x"]
)
async def test_trailers_that_must_not_be(start: Start, tmp_path: Path, trailer: bytes) -> None:
    """RFC 9110 §6.5.1: framing, routing, authentication. The answer is not whole, and says so."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n" + trailer + b"\r\n\r\n"
        )
        await writer.drain()
        await reader.read()

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        received = await stack.raw(stack.head("GET", "/", "Connection: close"))
        assert trailer not in received
        assert received.startswith(b"HTTP/1.1 502 ") or not received.endswith(b"0\r\n\r\n")


# ── keep-alive limits of applications ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("announced", [True, False])
async def test_applications_that_close_every_third_connection(
    start: Start, tmp_path: Path, *, announced: bool
) -> None:
    """With `Connection: close` or without a word: no request of a visitor is lost, none is sent twice."""
    seen: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in range(3):
            head = await read_head(reader)
            seen.append(head.split()[1])
            close = b"Connection: close\r\n" if announced and number == 2 else b""
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + close + b"\r\nok")
            await writer.drain()

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        for number in range(20):
            assert (await stack.get(f"/{number}")).body == b"ok"
        assert seen == [b"/%d" % number for number in range(20)]
        assert server.connections >= 7


# ── heads that never end ─────────────────────────────────────────────────────────────────────────────────────────

LINE = b"X-Filler: " + b"x" * 1000 + b"\r\n"

ENDLESS_ANSWERS: dict[str, tuple[bytes, bytes]] = {
    "fields": (b"HTTP/1.1 200 OK\r\n", LINE),
    "one field": (b"HTTP/1.1 200 OK\r\nX-Filler: ", b"x" * 1000),
    "a reason": (b"HTTP/1.1 200 ", b"x" * 1000),
    "fields of an interim answer": (b"HTTP/1.1 103 Early Hints\r\n", LINE),
    "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", LINE),
    "a chunk's extension": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;a=", b"x" * 1000),
    "a chunk's size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0", b"0" * 1000),
}


@pytest.mark.parametrize("what", ENDLESS_ANSWERS)
async def test_endless_heads_of_applications(start: Start, tmp_path: Path, what: str) -> None:
    """Given up early, by an error or by the end of the connection, and nothing is kept of it."""
    begin, more = ENDLESS_ANSWERS[what]
    taken = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        await read_head(reader)
        writer.write(begin)
        while taken < ENDLESS:
            writer.write(more * 64)
            await writer.drain()
            taken += len(more) * 64

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        before = psutil.Process().memory_info().rss
        received = await stack.raw(stack.head("GET", "/", "Connection: close"), seconds=30)
        assert received.startswith(b"HTTP/1.1 502 ") or b"chunked" in begin, received[:200]
        assert not received.endswith(b"0\r\n\r\n") or received.startswith(b"HTTP/1.1 502 ")
        assert taken < ENDLESS
        assert psutil.Process().memory_info().rss - before < KEPT_MOST
        await stack.until(lambda: not stack.edge.grants.all_streams, "no stream is left")


ENDLESS_REQUESTS: dict[str, tuple[tuple[str, ...], bytes, bytes, tuple[int, ...]]] = {
    "fields": ((), b"", LINE, (431,)),
    "one field": ((), b"X-Filler: ", b"x" * 1000, (431,)),
    "trailers": (("Transfer-Encoding: chunked",), b"\r\n0\r\n", LINE, (400, 431)),
    "a chunk's extension": (("Transfer-Encoding: chunked",), b"\r\n1;a=", b"x" * 1000, (400, 431)),
}


@pytest.mark.parametrize("what", ENDLESS_REQUESTS)
async def test_endless_heads_of_visitors(app: str, start: Start, tmp_path: Path, what: str) -> None:
    lines, begin, more, statuses = ENDLESS_REQUESTS[what]
    async with start(tmp_path, app) as stack:
        before = psutil.Process().memory_info().rss
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(stack.head("POST", "/nothing?status=200", *lines)[:-2] + begin)
        answer = asyncio.create_task(read_head(reader))
        # It is read to the answer, and for a moment longer, lest a reset overtakes the answer; then it is cut.
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                while not writer.is_closing():
                    writer.write(more * 64)
                    await writer.drain()
                    await asyncio.sleep(0.01)
        assert int((await answer).split()[1]) in statuses
        assert psutil.Process().memory_info().rss - before < KEPT_MOST
        assert (await stack.get("/nothing?status=200")).status == 200


async def test_endless_interim_answers_end(start: Start, tmp_path: Path) -> None:
    """An application that never gets to its answer is given up by the answer's deadline or before."""
    count = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        await read_head(reader)
        while True:
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" * 64)
            await writer.drain()
            count += 64

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        before = psutil.Process().memory_info().rss
        received = await stack.raw(stack.head("GET", "/", "Connection: close"), seconds=20)
        last = received[received.rindex(b"HTTP/1.1 ") :]
        assert last.startswith(b"HTTP/1.1 502 "), f"{len(received)} bytes, {count} interim answers"
        assert psutil.Process().memory_info().rss - before < KEPT_MOST
