"""The gateway of examples/gateway behind a real edge, in front of a real aiohttp application."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import pytest
import pytest_asyncio
from aiohttp import web
from support import stack

from guestpass.gateway.enroll import enroll

EXAMPLE = Path(__file__).parents[2] / "examples" / "gateway"
SIZE = 20 * 1024 * 1024
PIECE = os.urandom(64 * 1024)
# What kernels, the edge and the gateway hold between an application that writes and a visitor who does not read: the
# sockets' buffers (a few MB each on loopback) and one window.
IN_BETWEEN = 48 * 1024 * 1024


@dataclass
class App:
    """An application that counts what it sees."""

    written: int = 0
    running: int = 0
    seen: list[str] = field(default_factory=list)

    async def hello(self, request: web.Request) -> web.Response:
        self.seen.append(f"{request.method} {request.path_qs} {request.host}")
        return web.Response(text=f"hello {request.headers['X-Guestpass-Email']}", headers={"X-App": "1"})

    async def download(self, request: web.Request) -> web.StreamResponse:
        """`size` bytes, chunked or with their length."""
        size = int(request.query["size"])
        response = web.StreamResponse()
        if "length" in request.query:
            response.content_length = size
        await response.prepare(request)
        self.running += 1
        try:
            for _ in range(size // len(PIECE)):
                await response.write(PIECE)
                self.written += len(PIECE)
        finally:
            self.running -= 1
        return response

    async def upload(self, request: web.Request) -> web.Response:
        digest = hashlib.sha256()
        async for piece in request.content.iter_any():
            digest.update(piece)
        return web.Response(text=digest.hexdigest())

    async def broken(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 200 OK\r\nno header\r\n\r\n")
        request.transport.close()
        return web.Response()


@dataclass
class Rig:
    stack: stack.Stack
    app: App
    process: asyncio.subprocess.Process


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = App()
    app = web.Application()
    app.add_routes([web.get("/download", made.download), web.post("/upload", made.upload)])
    app.add_routes([web.get("/broken", made.broken), web.route("*", "/{rest:.*}", made.hello)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with stack.running(tmp_path, url, gateways=0) as edge:
        key = tmp_path / "pure.key"
        token = await edge.edge.service.create_join_token(stack.SITE)
        await enroll(f"http://localhost:{edge.port}", token, "pure", key, ca=edge.ca)
        options = {"edge": edge.tunnel_url, "ca": edge.ca, "site": stack.SITE, "name": "pure", "key": key}
        options |= {"service": stack.SERVICE, "url": url}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-X", "dev", str(EXAMPLE / "gateway.py"), *arguments
        )
        try:
            await edge.until(lambda: edge.is_ready("pure"), "the gateway is connected")
            yield Rig(edge, made, process)
            assert process.returncode is None, "the gateway has ended by itself"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
    await runner.cleanup()


def test_its_size() -> None:
    """150 lines beside imports, blank lines and comments: the specification is what is short."""
    lines = (EXAMPLE / "gateway.py").read_text("utf-8").splitlines()
    code = [
        line
        for line in lines
        if line.strip() and not line.strip().startswith(("#", "import ", "from ", '"""'))
    ]
    assert 100 < len(code) <= 150


async def test_requests(rig: Rig) -> None:
    answer = await rig.stack.get("/some/path?q=1&r=%2F")
    assert (answer.status, answer.body) == (200, b"hello alice@example.org")
    assert answer.headers["X-App"] == "1"
    head = await rig.stack.get("/", method="HEAD")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", "23")
    many = await asyncio.gather(*(rig.stack.get(f"/{number}") for number in range(50)))
    assert {answer.status for answer in many} == {200}
    assert rig.app.seen[0] == f"GET /some/path?q=1&r=%2F {rig.stack.app_url.removeprefix('http://')}"
    assert (await rig.stack.get("/", method="DELETE")).status == 403
    assert (await rig.stack.get("/broken")).status == 502
    assert (await rig.stack.get("/")).status == 200


@pytest.mark.parametrize("length", ["", "&length"])
async def test_download(rig: Rig, length: str) -> None:
    answer = await rig.stack.get(f"/download?size={SIZE}{length}")
    assert answer.body == PIECE * (SIZE // len(PIECE))


async def test_upload(rig: Rig) -> None:
    body = PIECE * (SIZE // len(PIECE))
    answer = await rig.stack.get("/upload", method="POST", data=io.BytesIO(body))
    assert answer.body.decode() == hashlib.sha256(body).hexdigest()


async def test_a_slow_reader_holds_up_its_application_and_nobody_else(rig: Rig) -> None:
    size = 400 * 1024 * 1024
    url, headers = (
        rig.stack.url(f"/download?size={size}"),
        {"Host": rig.stack.host, **rig.stack.authorization},
    )
    async with rig.stack.session.get(url, headers=headers) as slow:
        await slow.content.readexactly(100)
        before = -1
        while before != rig.app.written:  # until nothing moves any more
            before = rig.app.written
            await asyncio.sleep(0.5)
            assert (await rig.stack.get("/")).status == 200
        assert rig.app.written < IN_BETWEEN
        assert psutil.Process(rig.process.pid).memory_info().rss < 200 * 1024 * 1024
        slow.close()
    await rig.stack.until(lambda: not rig.app.running, "the application's response is cancelled")


async def test_a_share_that_is_deleted_ends_its_download(rig: Rig) -> None:
    size = 400 * 1024 * 1024
    url, headers = (
        rig.stack.url(f"/download?size={size}"),
        {"Host": rig.stack.host, **rig.stack.authorization},
    )
    async with rig.stack.session.get(url, headers=headers) as response:
        await response.content.readexactly(1000)
        assert rig.app.running == 1
        await rig.stack.edge.service.delete(rig.stack.share_id)
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await response.read()
    await rig.stack.until(lambda: not rig.app.running, "the application's response is cancelled")
    await rig.stack.until(lambda: not rig.stack.edge.tunnels.streams, "RESET_ACK")


async def test_the_edge_comes_back(rig: Rig) -> None:
    """All tunnels end; the gateway dials again by itself."""
    for link in list(rig.stack.edge.tunnels._links):
        link.abort()
    await rig.stack.until(lambda: not rig.stack.is_ready("pure"), "the tunnel is gone")
    await rig.stack.until(lambda: rig.stack.is_ready("pure"), "the gateway is connected again")
    assert (await rig.stack.get("/")).status == 200
