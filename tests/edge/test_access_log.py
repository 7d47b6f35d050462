"""The access log: the same lines from both lanes, nothing in them that is secret, and never a wait for the disk."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.stack import SERVICE, Stack, running

from guestpass.edge.access_log import MAX_WAITING, AccessLog
from guestpass.errors import ConfigError

LANES = ("fast", "aiohttp")


class Application:
    def __init__(self) -> None:
        self.open = 0
        self.url = ""

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

    async def echo(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_str(message.data)
        return ws

    async def show(self, request: web.Request) -> web.Response:
        return web.json_response({"target": request.raw_path, "length": len(await request.read())})


@pytest.fixture
async def app() -> AsyncIterator[Application]:
    it = Application()
    application = web.Application()
    application.router.add_get("/forever", it.forever)
    application.router.add_get("/echo", it.echo)
    application.router.add_route("*", "/{tail:.*}", it.show)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    it.url = "http://{}:{}".format(*runner.addresses[0][:2])
    yield it
    await runner.cleanup()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


async def logged(stack: Stack, path: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` lines, without what differs from run to run."""

    def there() -> bool:
        stack.edge.lane.log_flush()
        return path.exists() and len(lines(path)) >= count

    await stack.until(there, f"{count} lines in the access log")
    found = lines(path)
    for line in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
        assert 0 <= line.pop("seconds") < 30
        assert line.pop("client") == "127.0.0.1"
        assert line.pop("gateway") == "gw-1"
        assert line.pop("share") == stack.share_id
        assert line.pop("service") == SERVICE
        assert line.pop("session")
    return found


@pytest.mark.parametrize("paths", [False, True])
@pytest.mark.parametrize("lane", LANES)
async def test_lines(app: Application, tmp_path: Path, lane: str, paths: bool) -> None:
    path = tmp_path / "access.log"
    config = {"access_log": str(path), "access_log_paths": paths}
    async with running(tmp_path, app.url, lane=lane, edge=config) as stack:
        got = await stack.get('/a"b\\c?secret=querystring')
        posted = await stack.get("/y", method="POST", data=b"x" * 1000)
        await stack.get("/x", method="HEAD")
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(stack.head("GET", "/forever"))
        await reader.readexactly(1000)
        writer.transport.abort()
        await stack.until(lambda: app.open == 0, "the application's request is cancelled")
        headers = {"Host": stack.host, **stack.authorization}
        async with stack.session.ws_connect(stack.url("/echo"), headers=headers) as ws:
            await ws.send_str("hello")
            assert await ws.receive_str() == "hello"
        found = await logged(stack, path, 5)
    begun = found.pop(3)
    assert begun.pop("bytes_out") >= 1000
    socket = found.pop(3)
    assert socket.pop("bytes_in") > 5
    assert socket.pop("bytes_out") > 5

    def line(method: str, target: str, status: int, complete: bool, **sizes: int) -> dict[str, Any]:
        told = {"path": target} if paths else {}
        return {"lane": lane, "method": method, **told, "status": status, **sizes, "complete": complete}

    assert found == [
        line("GET", '/a"b\\c', 200, True, bytes_in=0, bytes_out=len(got.body)),
        line("POST", "/y", 200, True, bytes_in=1000, bytes_out=len(posted.body)),
        line("HEAD", "/x", 200, True, bytes_in=0, bytes_out=0),
    ]
    assert begun == line("GET", "/forever", 200, False, bytes_in=0)
    assert socket == line("GET", "/echo", 101, True)
    text = path.read_text("ascii")
    for secret in ("querystring", stack.token, "hello"):
        assert secret not in text
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("lane", LANES)
async def test_refused_and_unreachable(app: Application, tmp_path: Path, lane: str) -> None:
    path = tmp_path / "access.log"
    config = {"limits": {"streams_per_session": 1}}
    async with running(tmp_path, app.url, lane=lane, edge={"access_log": str(path)}, config=config) as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(stack.head("GET", "/forever"))
        await reader.readexactly(1000)
        refused = await stack.get("/x")
        assert refused.status == 429
        assert b"limit: streams_per_session" in refused.body
        assert refused.headers["Retry-After"] == "5"
        (first,) = await logged(stack, path, 1)
        writer.transport.abort()
    assert first.items() >= {"method": "GET", "status": 429, "bytes_in": 0, "bytes_out": 0}.items()


@pytest.mark.parametrize("lane", LANES)
async def test_bodies_that_are_not_taken(app: Application, tmp_path: Path, lane: str) -> None:
    path = tmp_path / "access.log"
    config = {"limits": {"body_progress_seconds": 1, "body_bytes": 1000}}
    async with running(tmp_path, app.url, lane=lane, edge={"access_log": str(path)}, config=config) as stack:
        for body, status in (
            (b"x\r\n", 400),
            (b"5\r\nhello\r\n", 408),
            (b"3e9\r\n" + bytes(1001) + b"\r\n", 413),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
            writer.write(stack.head("POST", "/y", "Transfer-Encoding: chunked"))
            # What is refused before the relay has looked at the request has no line.
            await stack.until(lambda: stack.edge.grants.all_streams == 1, "the stream is open")
            writer.write(body)
            async with asyncio.timeout(10):
                assert (await reader.read()).startswith(b"HTTP/1.1 %d " % status)
            writer.close()
            await stack.until(lambda: stack.edge.grants.all_streams == 0, "no stream is left")
        found = await logged(stack, path, 3)
    assert [(line["status"], line["bytes_out"], line["complete"]) for line in found] == [
        (400, 0, True),
        (408, 0, True),
        (413, 0, True),
    ]


@pytest.mark.parametrize("lane", LANES)
async def test_revoked(app: Application, tmp_path: Path, lane: str) -> None:
    path = tmp_path / "access.log"
    async with running(tmp_path, app.url, lane=lane, edge={"access_log": str(path)}) as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(stack.head("GET", "/forever"))
        await reader.readexactly(1000)
        await stack.edge.service.delete(stack.share_id)
        (line,) = await logged(stack, path, 1)
        writer.close()
    assert line.items() >= {"lane": lane, "status": 200, "complete": False}.items()


async def test_rotation(app: Application, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with running(tmp_path, app.url, lane="fast", edge={"access_log": str(path)}) as stack:
        await stack.get("/")
        await logged(stack, path, 1)
        path.rename(tmp_path / "access.log.1")
        await stack.edge.reload()
        await stack.get("/")
        await logged(stack, path, 1)
    assert len(lines(tmp_path / "access.log.1")) == 1


def test_what_cannot_be_written_is_dropped_and_counted() -> None:
    out, into = os.pipe()
    log = AccessLog(Path(f"/proc/self/fd/{into}"))
    line = b"x" * 1023 + b"\n"
    block = line * 64
    blocks = 2 * MAX_WAITING // len(block)
    for _ in range(blocks):
        log.write(block)
    kept = blocks * 64 - log.dropped
    assert MAX_WAITING // 1024 <= kept <= MAX_WAITING // 1024 + 256
    os.close(into)
    received = b""
    while len(received) < kept * 1024:
        received += os.read(out, 1 << 20)
    log.close()
    assert os.read(out, 1) == b""
    os.close(out)
    assert received == line * kept


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'No such file or directory \(key "edge.access_log"\)'):
        AccessLog(tmp_path / "missing" / "access.log")
