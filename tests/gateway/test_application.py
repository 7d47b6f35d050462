"""The gateway in front of a real aiohttp application."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest_asyncio
from aiohttp import WSMsgType, web
from support.tunnel import until
from support.upstream import Rig, answer

from guestpass.local_ca import write_certificates
from guestpass_speedups.session import ErrorCode
from guestpass_speedups.websocket import WebSocket

MB = 1 << 20


async def show(request: web.Request) -> web.Response:
    body = await request.read()
    return web.json_response(
        {"host": request.host, "length": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    )


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    if "length" in request.query:
        response.content_length = 8 * MB
    await response.prepare(request)
    for number in range(8):
        await response.write(bytes([number]) * MB)
    return response


async def events(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    gate: asyncio.Queue[bytes] = request.app[GATE]
    while event := await gate.get():
        await response.write(event)
    return response


async def too_large(request: web.Request) -> web.Response:
    raise web.HTTPRequestEntityTooLarge(max_size=1, actual_size=2)


async def socket(request: web.Request) -> web.WebSocketResponse:
    ws = web.WebSocketResponse(protocols=("echo",))
    await ws.prepare(request)
    async for message in ws:
        if message.type is WSMsgType.BINARY:
            await ws.send_bytes(message.data[::-1])
    request.app[CLOSED].append(ws.close_code)
    return ws


GATE: web.AppKey[asyncio.Queue[bytes]] = web.AppKey("gate", asyncio.Queue)
CLOSED: web.AppKey[list[int | None]] = web.AppKey("closed", list)


@dataclass
class Served:
    url: str
    gate: asyncio.Queue[bytes]
    closed: list[int | None]


@pytest_asyncio.fixture
async def app() -> AsyncIterator[Served]:
    made = web.Application(client_max_size=100 * MB)
    made[GATE] = asyncio.Queue()
    made[CLOSED] = []
    made.router.add_route("*", "/show", show)
    made.router.add_get("/stream", stream)
    made.router.add_get("/events", events)
    made.router.add_put("/too-large", too_large)
    made.router.add_get("/ws", socket)
    runner = web.AppRunner(made)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield Served(f"http://127.0.0.1:{runner.addresses[0][1]}", made[GATE], made[CLOSED])
    await runner.cleanup()


async def test_methods_and_bodies(rig: Rig, app: Served) -> None:
    rig.use(dash=app.url)
    body = bytes(range(256)) * 4096
    for head in ("POST /show HTTP/1.1", f"PUT /show HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}"):
        sending = rig.open(head, fin=False)
        for start in range(0, len(body), 100_000):
            await sending.write(body[start : start + 100_000])
        sending.finish()
        found = await answer(sending)
        assert hashlib.sha256(body).hexdigest().encode() in found.body
    assert (await rig.ask("GET /missing HTTP/1.1")).status == 404
    assert (await rig.ask("HEAD /show HTTP/1.1")).body == b""


async def test_responses_of_both_framings(rig: Rig, app: Served) -> None:
    rig.use(dash=app.url)
    expected = b"".join(bytes([number]) * MB for number in range(8))
    for target in ("/stream", "/stream?length"):
        assert (await rig.ask(f"GET {target} HTTP/1.1")).body == expected


async def test_events_come_one_by_one(rig: Rig, app: Served) -> None:
    rig.use(dash=app.url)
    receiving = rig.open("GET /events HTTP/1.1")
    await receiving.head()
    for event in (b"data: 1\n\n", b"data: 2\n\n"):
        app.gate.put_nowait(event)
        assert await asyncio.wait_for(receiving.read(), 5) == event
    app.gate.put_nowait(b"")
    assert await receiving.read() == b""


async def test_early_refusal_of_an_upload(rig: Rig, app: Served) -> None:
    rig.use(dash=app.url)
    sending = rig.open("PUT /too-large HTTP/1.1\r\nHost: a\r\nContent-Length: 500000000", fin=False)
    await sending.write(b"x" * 65536)
    assert (await answer(sending)).status == 413
    sending.reset(ErrorCode.CANCEL)


async def test_websocket(rig: Rig, app: Served) -> None:
    rig.use(dash=app.url)
    made = rig.open(
        "GET /ws HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: echo",
        fin=False,
    )
    head = await made.head()
    assert head.data.startswith(b"HTTP/1.1 101 ")
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head.data
    client = WebSocket(client=True)
    for payload in (b"abc", b"x" * 100_000 + b"y"):
        await made.write(client.wrap(payload))
        received = b""
        while len(received) < len(payload):
            received += client.feed(await asyncio.wait_for(made.read(), 5))
        assert received == payload[::-1]
    await made.write(client.close(1000))
    client.feed(await made.read())
    assert client.close_code == 1000
    made.finish()
    assert await asyncio.wait_for(made.read(), 5) == b""
    assert app.closed == [1000]


async def test_service_over_tls(rig: Rig, app: Served, tmp_path: Path) -> None:
    folder = tmp_path / "service"
    folder.mkdir()
    ca, cert, key = write_certificates(folder, ("localhost",))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    secure = web.Application()
    secure.router.add_get("/show", show)
    secure.router.add_get("/stream", stream)
    runner = web.AppRunner(secure)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    url = f"https://localhost:{runner.addresses[0][1]}"
    upstream = rig.use(
        good={"url": url, "ca": ca}, distrusted={"url": url}, unverified={"url": url, "verify": False}
    )
    for service in ("good", "unverified"):
        found = await rig.ask("GET /show HTTP/1.1", service=service)
        assert url.removeprefix("https://").encode() in found.body
        assert len((await rig.ask("GET /stream HTTP/1.1", service=service)).body) == 8 * MB
    refused = rig.open("GET /show HTTP/1.1", service="distrusted")
    await until(lambda: refused.reset_code is not None, "refused")
    assert refused.reset_code == ErrorCode.UNREACHABLE
    assert "certificate" in upstream.health.of("distrusted")[1].lower()
    await upstream.close()
    await runner.cleanup()
