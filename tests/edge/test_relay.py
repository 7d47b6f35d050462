"""The relay end to end, over real sockets: visitor → edge → TLS tunnel → gateway → application."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import socket
import termios
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import jwt
import pytest
from aiohttp import WSMsgType, web
from support.programs import free_port
from support.stack import EMAIL, RawServer, Stack, read_head, running

from guestpass.config import Limits
from guestpass.edge.plugins import PluginSet
from guestpass.loop import unsent
from guestpass.model import Revocation
from guestpass.plugin import RequestContext
from guestpass_speedups.session import ErrorCode

MB = 1 << 20

Start = Callable[..., contextlib.AbstractAsyncContextManager[Stack]]


@dataclass
class State:
    """What the application's handlers share with the tests."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    open: int = 0


STATE: web.AppKey[State] = web.AppKey("state", State)


# ── an application ────────────────────────────────────────────────────────────────────────────────────────────────


async def show(request: web.Request) -> web.Response:
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "target": request.raw_path,
            "headers": [[k, v] for k, v in request.headers.items()],
            "length": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
    )


async def big(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    size = int(float(request.query["mb"]) * MB)
    if "length" in request.query:
        response.content_length = size
    await response.prepare(request)
    for at in range(0, size, MB):
        await response.write(bytes([at // MB % 251]) * min(MB, size - at))
    return response


async def events(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    gate = request.app[STATE].gate
    for number in range(3):
        await gate.wait()
        gate.clear()
        await response.write(b"data: %d\n\n" % number)
    return response


async def forever(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    request.app[STATE].open += 1
    try:
        while True:
            await response.write(b"x" * 65536)
            await asyncio.sleep(0)
    finally:
        request.app[STATE].open -= 1


async def never(request: web.Request) -> web.Response:
    await asyncio.sleep(3600)
    return web.Response()


async def echo(request: web.Request) -> web.WebSocketResponse:
    ws = web.WebSocketResponse(protocols=("chat",))
    await ws.prepare(request)
    request.app[STATE].open += 1
    try:
        async for message in ws:
            if message.type is WSMsgType.TEXT:
                await ws.send_str(message.data + "!")
            elif message.type is WSMsgType.BINARY:
                await ws.send_bytes(message.data)
    finally:
        request.app[STATE].open -= 1
    return ws


async def cookies(request: web.Request) -> web.Response:
    response = web.Response(text="ok")
    response.headers.add("Set-Cookie", "a=1; Domain=localhost; Path=/")
    response.headers.add("Set-Cookie", "__Host-guestpass=evil; Path=/; Secure")
    return response


async def redirect(request: web.Request) -> web.Response:
    return web.Response(status=302, headers={"Location": request.query["to"]})


@pytest.fixture
async def app() -> AsyncIterator[web.AppRunner]:
    application = web.Application(client_max_size=64 * MB)
    application[STATE] = State()
    application.router.add_get("/big", big)
    application.router.add_get("/events", events)
    application.router.add_get("/forever", forever)
    application.router.add_get("/echo", echo)
    application.router.add_get("/never", never)
    application.router.add_get("/cookies", cookies)
    application.router.add_get("/redirect", redirect)
    application.router.add_route("*", "/{tail:.*}", show)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner
    await runner.cleanup()


def url_of(app: web.AppRunner) -> str:
    host, port = app.addresses[0][:2]
    return f"http://{host}:{port}"


@pytest.fixture(params=["fast", "aiohttp"])
def start(request: pytest.FixtureRequest) -> Start:
    """`running`, with either lane."""
    return functools.partial(running, lane=request.param)


@pytest.fixture
async def stack(app: web.AppRunner, start: Start, tmp_path: Path) -> AsyncIterator[Stack]:
    async with start(tmp_path, url_of(app)) as it:
        yield it


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
async def test_methods_targets_and_bodies_arrive_as_they_were_sent(stack: Stack, method: str) -> None:
    body = b"body" * 1000 if method != "GET" else b""
    async with asyncio.timeout(20):
        got = await stack.get("/a%20b/%E2%82%AC?q=%2F..&x=1;2", method=method, data=body or None)
    assert got.status == 200
    seen = json.loads(got.body)
    assert (seen["method"], seen["target"], seen["length"]) == (
        method,
        "/a%20b/%E2%82%AC?q=%2F..&x=1;2",
        len(body),
    )


async def test_identity_is_injected_and_secrets_are_removed(stack: Stack) -> None:
    spoofed = {
        "X-Guestpass-Email": "eve@evil.org",
        "x_forwarded_for": "6.6.6.6",
        "Cookie": "a=1; __Host-guestpass=x",
    }
    seen = json.loads((await stack.get("/", headers=spoofed)).body)
    headers: dict[str, list[str]] = {}
    for name, value in seen["headers"]:
        headers.setdefault(name.lower(), []).append(value)
    assert headers["x-guestpass-email"] == [EMAIL]
    assert headers["x-guestpass-share"] == [stack.share_id]
    assert headers["x-forwarded-for"] == ["127.0.0.1"]
    assert headers["x-forwarded-host"] == [stack.host]
    assert headers["x-forwarded-proto"] == ["http"]
    assert headers["cookie"] == ["a=1"]
    assert headers["host"] == [stack.app_url.removeprefix("http://")]
    assert "authorization" not in headers
    assert "x_forwarded_for" not in headers

    async with stack.session.get(
        stack.url("/.well-known/jwks.json"), headers={"Host": f"localhost:{stack.port}"}
    ) as got:
        key = jwt.PyJWKSet.from_dict(await got.json())[
            jwt.get_unverified_header(headers["x-guestpass-assertion"][0])["kid"]
        ]
    claims = jwt.decode(headers["x-guestpass-assertion"][0], key, algorithms=["EdDSA"], audience="plant/dash")
    assert (claims["email"], claims["share"]) == (EMAIL, stack.share_id)


@pytest.mark.parametrize(
    "forwarded", [{}, {"X-Forwarded-For": "127.0.0.1"}, {"X-Forwarded-For": "192.0.2.1"}]
)
async def test_behind_a_proxy_that_ends_tls_the_scheme_is_the_public_one(
    app: web.AppRunner, start: Start, tmp_path: Path, forwarded: dict[str, str]
) -> None:
    """Also when the visitor's address is the proxy's own, or the proxy does not tell it."""
    async with start(tmp_path, url_of(app), edge={"trusted_proxies": ["127.0.0.0/8"]}) as stack:
        stack.edge.origins.scheme = stack.edge.house.scheme = "https"
        seen = dict(json.loads((await stack.get("/", headers=forwarded)).body)["headers"])
        assert seen["X-Forwarded-Proto"] == "https"
        assert seen["X-Forwarded-For"] == forwarded.get("X-Forwarded-For", "127.0.0.1")


async def test_a_trusted_proxy_says_who_asks(app: web.AppRunner, start: Start, tmp_path: Path) -> None:
    async def seen(stack: Stack, *told: str) -> str:
        lines = [f"X-Forwarded-For: {who}" for who in told]
        received = await stack.raw(stack.head("GET", "/", "Connection: close", *lines))
        headers = json.loads(received.partition(b"\r\n\r\n")[2])["headers"]
        (found,) = [value for name, value in headers if name.lower() == "x-forwarded-for"]
        assert ["Forwarded", f'for={found};proto=http;host="{stack.host}"'] in headers
        return str(found)

    async with start(tmp_path, url_of(app), edge={"trusted_proxies": ["127.0.0.0/8"]}) as stack:
        for _ in range(2):
            assert await seen(stack, "203.0.113.9") == "203.0.113.9"
            assert await seen(stack, "6.6.6.6, 203.0.113.9, 127.0.0.2") == "203.0.113.9"
            assert await seen(stack, "6.6.6.6", "203.0.113.7") == "203.0.113.7"
            assert await seen(stack) == "127.0.0.1"
        lane = "fast" if stack.edge.lane.fast else "aiohttp"
        assert stack.answered(lane) == 8


@pytest.mark.parametrize("length", ["&length", ""])
async def test_large_responses_arrive_whole(stack: Stack, length: str) -> None:
    expected = hashlib.sha256(b"".join(bytes([n]) * MB for n in range(20))).hexdigest()
    got = await stack.get(f"/big?mb=20{length}")
    assert hashlib.sha256(got.body).hexdigest() == expected
    assert ("Content-Length" in got.headers) == bool(length)


@pytest.mark.parametrize("chunked", [True, False])
async def test_large_uploads_arrive_whole(stack: Stack, chunked: bool) -> None:
    body = bytes(range(256)) * 4096 * 20

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    got = await stack.get("/upload", method="POST", data=parts() if chunked else io.BytesIO(body))
    assert json.loads(got.body)["sha256"] == hashlib.sha256(body).hexdigest()


async def test_an_upload_may_take_longer_than_an_answer(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack.edge.relay, "_limits", Limits(answer_seconds=1))

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(8):
            yield b"x" * 1000
            await asyncio.sleep(0.25)

    response = await stack.get("/", method="POST", data=slowly())
    assert response.status == 200
    assert json.loads(response.body)["length"] == 8000
    if not stack.edge.lane.fast:  # the fast lane's clock is tested in test_fast_lane.py
        assert (await stack.get("/never")).status == 504, "nothing was to be taken, and no answer came"


async def test_many_at_once(stack: Stack) -> None:
    async def one(number: int) -> None:
        got = await stack.get(f"/{number}", method="POST", data=b"%d" % number)
        assert json.loads(got.body)["target"] == f"/{number}"

    await asyncio.gather(*(one(n) for n in range(200)))
    await stack.until(lambda: stack.edge.grants.all_streams == 0, "no stream is left")


async def test_keep_alive_and_pipelining_are_answered_in_order(stack: Stack) -> None:
    data = stack.head("GET", "/1") + stack.head("GET", "/2") + stack.head("GET", "/3", "Connection: close")
    received = await stack.raw(data)
    assert received.count(b"HTTP/1.1 200 OK") == 3
    assert received.index(b'"/1"') < received.index(b'"/2"') < received.index(b'"/3"')


async def test_http10_gets_a_body_that_ends_with_the_connection(stack: Stack) -> None:
    head = stack.head("GET", "/big?mb=1").replace(b"HTTP/1.1", b"HTTP/1.0")
    head_end, _, body = (await stack.raw(head)).partition(b"\r\n\r\n")
    assert b"chunked" not in head_end.lower()
    assert len(body) == MB


async def test_head_has_the_length_and_no_body(stack: Stack) -> None:
    received = await stack.raw(stack.head("HEAD", "/x", "Connection: close"))
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-length: " in head.lower()
    assert body == b""


async def test_expect_continue(stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    writer.write(stack.head("POST", "/x", "Expect: 100-continue", "Content-Length: 4", "Connection: close"))
    assert (await read_head(reader)).startswith(b"HTTP/1.1 100 ")
    writer.write(b"body")
    assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_events_are_passed_on_one_by_one(app: web.AppRunner, stack: Stack) -> None:
    gate = app.app[STATE].gate
    headers = {"Host": stack.host, **stack.authorization}
    async with asyncio.timeout(10), stack.session.get(stack.url("/events"), headers=headers) as response:
        assert response.status == 200  # the head came before the first event
        for number in range(3):
            gate.set()
            assert await response.content.readuntil(b"\n\n") == b"data: %d\n\n" % number
        assert await response.content.read() == b""


# ── upgrades ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_websocket(stack: Stack) -> None:
    headers = {"Host": stack.host, **stack.authorization}
    async with stack.session.ws_connect(
        stack.url("/echo"), headers=headers, protocols=("chat",), max_msg_size=0
    ) as ws:
        assert ws.protocol == "chat"
        await ws.send_str("hello")
        assert await ws.receive_str(timeout=5) == "hello!"
        payload = bytes(range(256)) * 8192
        await ws.send_bytes(payload)
        assert await ws.receive_bytes(timeout=10) == payload
    await stack.until(lambda: stack.edge.grants.all_streams == 0, "the stream is closed")


async def test_bytes_right_behind_the_upgrade_are_not_lost(stack: Stack) -> None:
    lines = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    frame = b"\x81\x82\x00\x00\x00\x00hi" + b"\x88\x80\x00\x00\x00\x00"
    received = await stack.raw(stack.head("GET", "/echo", *lines) + frame)
    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert rest.startswith(b"\x81\x03hi!")


async def test_declined_upgrade_is_an_ordinary_answer(stack: Stack) -> None:
    lines = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    received = await stack.raw(
        stack.head("GET", "/plain", *lines) + stack.head("GET", "/next", "Connection: close")
    )
    assert received.count(b"HTTP/1.1 200 OK") == 2


async def test_other_upgrades_are_not_passed_on(stack: Stack) -> None:
    received = await stack.raw(stack.head("GET", "/x", "Connection: Upgrade, close", "Upgrade: h2c"))
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert b"h2c" not in received


# ── who may ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_strangers(stack: Stack) -> None:
    async def status(headers: dict[str, str], path: str = "/x") -> int:
        async with stack.session.get(stack.url(path), headers=headers, allow_redirects=False) as response:
            return response.status

    navigation = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Accept": "text/html"}
    assert await status({"Host": stack.host}) == 401
    assert await status({"Host": stack.host, **navigation}) == 303
    assert await status({"Host": stack.host, "Authorization": "Bearer gp_wrong"}) == 401
    assert await status({"Host": f"unknown.localhost:{stack.port}", **stack.authorization}) == 421
    assert await status({"Host": f"other.example:{stack.port}"}) == 421
    other = await stack.new_share()
    assert await status({"Host": f"{other}.localhost:{stack.port}", **stack.authorization}) == 401


async def test_scope(app: web.AppRunner, start: Start, tmp_path: Path) -> None:
    share = {"path": "/reports/", "scope": ["GET /reports/**", "POST /reports/*/comments"]}
    async with start(tmp_path, url_of(app), share=share) as stack:
        for method, path, status in (
            ("GET", "/reports/7?x=/../y", 200),
            ("HEAD", "/reports/7", 200),
            ("POST", "/reports/7/comments", 200),
            ("POST", "/reports/7", 403),
            ("GET", "/other", 403),
            ("GET", "/reports/%2e%2e/other", 403),
            ("GET", "/reports//7", 403),
        ):
            assert (await stack.raw(stack.head(method, path, "Connection: close"))).startswith(
                b"HTTP/1.1 %d " % status
            ), path


async def test_the_gateways_own_rules_hold_whatever_the_edge_asks(
    app: web.AppRunner, start: Start, tmp_path: Path
) -> None:
    async with start(tmp_path, url_of(app), service={"paths": ["/public/**"], "methods": ["GET"]}) as stack:
        assert (await stack.get("/public/x")).status == 200
        assert (await stack.get("/private")).status == 403
        assert (await stack.get("/public/x", method="POST", data=b"x")).status == 403


async def test_cookies_of_the_application_stay_on_the_shares_origin(stack: Stack) -> None:
    assert (await stack.get("/cookies")).headers.getall("Set-Cookie") == ["a=1; Path=/"]  # type: ignore[attr-defined]


async def test_redirects_to_the_private_address_are_rewritten(stack: Stack) -> None:
    private = await stack.get("/redirect", params={"to": f"{stack.app_url}/login?next=/x"})
    assert private.headers["Location"] == f"http://{stack.host}/login?next=/x"
    for elsewhere in ("/login", "https://idp.example.org/authorize", f"{stack.app_url}0/x"):
        assert (await stack.get("/redirect", params={"to": elsewhere})).headers["Location"] == elsewhere


async def test_malformed_requests_are_refused(stack: Stack) -> None:
    for head in (
        stack.head("GET", "/a#b"),
        stack.head("GET", "http://other.example/"),
        stack.head("POST", "/", "Content-Length: 5", "Transfer-Encoding: chunked"),
        stack.head("POST", "/", "Transfer-Encoding: gzip, chunked"),
        stack.head("GET", "/", "Host: second"),
        stack.head("GET", "/", "Bad Name: x"),
    ):
        received = await stack.raw(head)
        assert received.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400")), head
    assert (await stack.raw(stack.head("TRACE", "/"))).startswith(b"HTTP/1.1 405")


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_deleting_the_share_ends_everything_at_once(app: web.AppRunner, stack: Stack) -> None:
    headers = {"Host": stack.host, **stack.authorization}
    other = await stack.new_share()
    other_headers = {
        "Host": f"{other}.localhost:{stack.port}",
        "Authorization": f"Bearer {await stack.new_token(other)}",
    }
    async with (
        stack.session.get(stack.url("/forever"), headers=headers) as download,
        stack.session.ws_connect(stack.url("/echo"), headers=headers) as ws,
        stack.session.ws_connect(stack.url("/echo"), headers=other_headers) as others,
    ):
        await download.content.readexactly(10 * MB)
        await ws.send_str("a")
        assert await ws.receive_str() == "a!"
        revoked = await stack.edge.service.delete(stack.share_id)
        assert (revoked.sessions, revoked.streams) == (1, 2)
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await download.content.read()
        assert (await ws.receive(timeout=5)).type in (WSMsgType.CLOSED, WSMsgType.ERROR, WSMsgType.CLOSE)
        await others.send_str("b")
        assert await others.receive_str(timeout=5) == "b!"
    await stack.until(lambda: app.app[STATE].open == 0, "the application sees its connections end")
    assert (await stack.get("/")).status == 410


async def test_nothing_leaves_the_kernel_after_the_deletion_is_answered(stack: Stack) -> None:
    """A visitor that reads slowly has megabytes waiting in the edge's socket: none of them may arrive later."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=1024)
    writer.write(stack.head("GET", "/forever"))
    await reader.readexactly(1024)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(0.3)  # let the buffers on the way fill
    await stack.edge.service.delete(stack.share_id)
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as visitor:
        visitor.setblocking(False)
        waiting = array.array("i", [0])
        fcntl.ioctl(visitor, termios.FIONREAD, waiting)  # what had reached the visitor's own kernel by now
        received = 0
        with pytest.raises(ConnectionResetError):  # noqa: PT012
            while part := visitor.recv(65536):
                received += len(part)
    assert 0 < received <= waiting[0]
    writer.transport.abort()


@pytest.mark.parametrize("closing", [False, True], ids=["kept", "to be closed"])
async def test_a_response_is_over_when_the_visitor_has_it(stack: Stack, *, closing: bool) -> None:
    """A response that the edge has written to its end waits in the kernel for a slow reader: that is a live stream."""
    with socket.socket() as visitor:
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        visitor.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(visitor, ("127.0.0.1", stack.port))
        lines = ["Connection: close"] if closing else []
        await loop.sock_sendall(visitor, stack.head("GET", "/big?mb=0.2&length=1", *lines))
        assert await loop.sock_recv(visitor, 1024)
        tunnel = stack.edge.tunnels
        await stack.until(lambda: not tunnel.streams, "the application's answer is complete")
        await asyncio.sleep(0.2)
        assert (await stack.edge.service.delete(stack.share_id)).streams == 1
        waiting = array.array("i", [0])
        fcntl.ioctl(visitor, termios.FIONREAD, waiting)
        received = 0
        with pytest.raises(ConnectionResetError):  # noqa: PT012
            while part := visitor.recv(65536):
                received += len(part)
    assert received <= waiting[0]


async def test_the_last_bytes_of_a_response_can_be_cut(stack: Stack) -> None:
    """Less than what holds up the connection's next request is watched all the same."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", stack.port))
    with sock:
        sock.sendall(stack.head("GET", "/" + "a" * 6000, "X: " + "a" * 6000, "Y: " + "a" * 6000))
        await stack.until(lambda: not stack.edge.grants.all_streams, "answered")
        await asyncio.sleep(0.2)
        ended = await stack.edge.service.delete(stack.share_id)
        assert ended.streams == 1
        sock.settimeout(5)
        with pytest.raises(ConnectionResetError):  # noqa: PT012
            while sock.recv(1 << 20):
                pass


async def test_nothing_is_watched_once_the_visitor_has_it(stack: Stack) -> None:
    for _ in range(3):
        assert (await stack.get("/big?mb=1")).status == 200
    (grant,) = stack.edge.grants._by_digest.values()
    if (
        stack.edge.lane.fast
    ):  # an open connection stays known; what it has not sent is looked at when it matters
        await stack.until(lambda: not any(unsent(t) for t in grant.tails), "all is acknowledged")
    else:
        await stack.until(lambda: not grant.tails, "all is acknowledged")
    assert (await stack.edge.service.delete(stack.share_id)).streams == 0


async def test_expiry_ends_a_live_stream(stack: Stack) -> None:
    share = await stack.new_share(expires=time.time() + 1)
    headers = {
        "Host": f"{share}.localhost:{stack.port}",
        "Authorization": f"Bearer {await stack.new_token(share)}",
    }
    async with stack.session.ws_connect(stack.url("/echo"), headers=headers) as ws:
        await ws.send_str("a")
        assert await ws.receive_str() == "a!"
        assert (await ws.receive(timeout=5)).type is not WSMsgType.TEXT
    async with stack.session.get(stack.url("/"), headers=headers) as response:
        assert response.status == 410


async def test_a_prolonged_share_keeps_what_is_open(stack: Stack) -> None:
    share = await stack.new_share(expires=time.time() + 1.5)
    token = await stack.new_token(share)
    headers = {"Host": f"{share}.localhost:{stack.port}", "Authorization": f"Bearer {token}"}
    async with stack.session.ws_connect(stack.url("/echo"), headers=headers) as ws:
        await ws.send_str("a")
        assert await ws.receive_str() == "a!"
        updated = await stack.edge.service.update(share, expires=time.time() + 3600)
        assert updated.revoked.streams == 0
        await asyncio.sleep(1.6)  # past the end that it had
        await ws.send_str("b")
        assert (await ws.receive(timeout=5)).data == "b!"


async def test_a_revocation_while_the_filters_look_is_not_taken_for_the_shares_end(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was revoked may be the gateway, or the share as it was before a change."""
    asked = 0

    async def on_request(plugins: PluginSet, request: RequestContext) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            stack.edge.grants.revoke(Revocation("share_updated", share_id=stack.share_id))
        elif asked == 3:
            await stack.edge.service.delete(stack.share_id)

    monkeypatch.setattr(stack.edge.lane, "fast", False)  # as with filters from the start
    monkeypatch.setattr(PluginSet, "filters_requests", True)
    monkeypatch.setattr(PluginSet, "on_request", on_request)
    assert (await stack.get("/")).status == 200
    assert asked == 2
    assert (await stack.get("/")).status == 410


async def test_a_visitor_that_leaves_ends_the_work(app: web.AppRunner, stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    writer.write(stack.head("GET", "/forever"))
    await reader.readexactly(MB)
    assert app.app[STATE].open == 1
    writer.transport.abort()
    await stack.until(lambda: app.app[STATE].open == 0, "the application's request is cancelled")
    await stack.until(lambda: stack.edge.grants.all_streams == 0, "the stream is gone")


async def test_one_session_can_be_ended(stack: Stack) -> None:
    token = await stack.new_token(stack.share_id)
    (session,) = [s for s in await stack.edge.service.sessions(stack.share_id) if s.id != ""][-1:]
    headers = {"Host": stack.host, "Authorization": f"Bearer {token}"}
    async with stack.session.get(stack.url("/"), headers=headers) as response:
        assert response.status == 200
    await stack.edge.service.end_session(session.id, "session_ended")
    statuses = []
    for secret in (token, stack.token):
        async with stack.session.get(
            stack.url("/"), headers={**headers, "Authorization": f"Bearer {secret}"}
        ) as response:
            statuses.append(response.status)
    assert sorted(statuses) == [200, 401]


async def test_drain_lets_what_runs_finish(app: web.AppRunner, stack: Stack) -> None:
    gate = app.app[STATE].gate
    headers = {"Host": stack.host, **stack.authorization}
    async with stack.session.get(stack.url("/events"), headers=headers) as response:
        drained = asyncio.create_task(stack.edge.drain())
        await stack.until(lambda: stack.edge._draining, "the drain began")
        for _ in range(3):
            gate.set()
            await response.content.readuntil(b"\n\n")
        assert await response.content.read() == b""
        await drained
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", stack.port)


# ── gateways and applications that fail ───────────────────────────────────────────────────────────────────────────


async def test_sessions_move_when_their_gateway_goes(
    app: web.AppRunner, start: Start, tmp_path: Path
) -> None:
    async with start(tmp_path, url_of(app), gateways=2) as stack:
        assert (await stack.get("/")).status == 200
        (grant,) = stack.edge.grants._by_session.values()
        first = grant.gateway
        assert first is not None
        assert {(await stack.get("/")).status for _ in range(10)} == {200}
        assert grant.gateway == first  # pinned
        await stack.stop_gateway(first)
        assert (await stack.get("/")).status == 200
        assert grant.gateway not in (None, first)


async def test_a_lost_tunnel_with_another_beside_it(start: Start, tmp_path: Path) -> None:
    """What waits on a tunnel that is lost goes out again on the other one, if it may be repeated; else 502 at once."""
    asked: list[bytes] = []
    go = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await read_head(reader)).split(b" ")[0])
        await go.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        for method, status in (("GET", 200), ("POST", 502)):
            asked.clear()
            go.clear()
            await stack.until(lambda: stack.edge.tunnels.status()[0].tunnels == 2, "two tunnels")
            waiting = asyncio.create_task(stack.get("/", method=method))
            await stack.until(lambda: asked, "the request is at the application")
            (busy,) = [link for link in stack.edge.tunnels._links if link.session.streams]
            busy.abort()
            if method == "GET":
                await stack.until(lambda: len(asked) == 2, "it is there again")
            go.set()
            assert (await waiting).status == status
            assert asked == [method.encode()] * (2 if method == "GET" else 1)


async def test_a_service_that_is_down_behind_one_gateway(
    app: web.AppRunner, start: Start, tmp_path: Path
) -> None:
    """The gateway finds out by the request itself, and another one serves it."""
    async with start(tmp_path, url_of(app), gateways=2) as stack:
        assert (await stack.get("/")).status == 200
        (grant,) = stack.edge.grants._by_session.values()
        first = grant.gateway
        assert first is not None
        targets = stack.agents[first][0]._upstream._targets
        targets["dash"]._port = free_port()
        targets["dash"].close()
        assert (await stack.get("/")).status == 200
        assert grant.gateway not in (None, first)


async def test_a_drained_edge_asks_its_gateways_to_leave(app: web.AppRunner, stack: Stack) -> None:
    gate = app.app[STATE].gate
    headers = {"Host": stack.host, **stack.authorization}
    links = list(stack.edge.tunnels._links)
    await asyncio.gather(stack.get("/"), stack.get("/"))  # two connections that are kept
    async with stack.session.get(stack.url("/events"), headers=headers) as response:
        drained = asyncio.create_task(stack.edge.drain())
        await stack.until(lambda: all(link.asked_to_leave for link in links), "the gateway was asked")
        assert not any(link.draining for link in links)  # there is no other edge: it stays while it is needed
        again = await stack.get("/")  # on a connection from before
        assert (again.status, again.headers["Connection"]) == (200, "close")
        for _ in range(3):
            gate.set()
            await response.content.readuntil(b"\n\n")
        await drained
    assert {link.end.code for link in links if link.end} == {ErrorCode.DRAINING}
    assert stack.edge.tunnels.status() == []


async def test_sessions_spread_over_gateways(app: web.AppRunner, start: Start, tmp_path: Path) -> None:
    async with start(tmp_path, url_of(app), gateways=2) as stack:
        for _ in range(30):
            stack.token = await stack.new_token(stack.share_id)
            assert (await stack.get("/")).status == 200
        assert {g.gateway for g in stack.edge.grants._by_session.values()} == {"gw-1", "gw-2"}


async def test_no_gateway_is_a_page_that_retries(stack: Stack) -> None:
    await stack.stop_gateway("gw-1")
    got = await stack.get("/", headers={"Accept": "text/html"})
    assert got.status == 503
    assert int(got.headers["Retry-After"]) > 0
    assert b'http-equiv="refresh"' in got.body
    await stack.add_gateway("gw-2")
    assert (await stack.get("/")).status == 200


async def test_a_removed_gateway_is_cut_off(stack: Stack) -> None:
    headers = {"Host": stack.host, **stack.authorization}
    async with stack.session.ws_connect(stack.url("/echo"), headers=headers) as ws:
        await ws.send_str("a")
        assert await ws.receive_str() == "a!"
        await stack.edge.service.remove_gateway("plant", "gw-1")
        assert (await ws.receive(timeout=5)).type is not WSMsgType.TEXT
    assert (await stack.get("/")).status == 503


async def test_service_down_is_a_502_page_with_an_id(app: web.AppRunner, stack: Stack) -> None:
    await app.cleanup()
    got = await stack.get("/", headers={"Accept": "text/html"})
    assert got.status == 502
    assert b"<html" in got.body


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"garbage\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", 502),
        (b"HTTP/1.1 200 OK\r\nA: b\x00c\r\n\r\n", 502),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", 502),
        (b"", 502),
    ],
)
async def test_malformed_answers(start: Start, tmp_path: Path, answer: bytes, status: int) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(answer)

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        assert (await stack.get("/")).status == status


async def test_early_hints_are_passed_on(start: Start, tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        received = await stack.raw(stack.head("GET", "/", "Connection: close"))
        assert received.startswith(
            b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\nHTTP/1.1 200 OK\r\n"
        )


async def test_a_body_that_breaks_off_is_seen_by_the_visitor(start: Start, tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        if b"/chunked" in head:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        for path in ("/chunked", "/length"):
            received = await stack.raw(stack.head("GET", path, "Connection: close"))
            # Either the head went out and the connection is cut, or it did not and there is an error to answer.
            whole = received.endswith((b"0\r\n\r\n", b"hello" * 2))
            assert not whole or received.startswith(b"HTTP/1.1 502 "), received


async def test_an_answer_before_the_upload_ended(start: Start, tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        await writer.drain()
        await asyncio.sleep(0.2)

    async with RawServer(talk) as server, start(tmp_path, server.url) as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(stack.head("POST", "/", f"Content-Length: {50 * MB}") + b"x" * 65536)
        head = await read_head(reader)
        assert head.startswith(b"HTTP/1.1 413 ")
        assert await reader.readexactly(3) == b"big"
        writer.transport.abort()
        assert (await stack.get("/")).status == 413


async def test_a_slow_visitor_holds_up_nobody_else(stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port, limit=1024)
    writer.write(stack.head("GET", "/forever"))
    await reader.readexactly(100)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(0.2)
    for _ in range(20):
        assert (await stack.get("/quick")).status == 200
    writer.transport.abort()


async def test_revocation_by_recipient_and_site(stack: Stack) -> None:
    assert (await stack.get("/")).status == 200
    assert stack.edge._revoke(Revocation("test", site="plant")).sessions == 1
    assert (await stack.get("/")).status == 200  # the store still says yes: the grant was rebuilt
    await stack.edge.service.remove_recipient(stack.share_id, EMAIL, "owner")
    assert (await stack.get("/")).status in (401, 410)


async def test_metrics_and_health(stack: Stack) -> None:
    await stack.get("/")
    async with stack.session.get(stack.metrics_url) as response:
        assert response.status == 200
        text = await response.text()
    lane = "fast" if stack.edge.lane.fast else "aiohttp"
    assert f'guestpass_requests_total{{code_class="2xx",lane="{lane}",service="dash"}} 1.0' in text
    assert "guestpass_request_seconds_count 1.0" in text
    assert 'guestpass_request_seconds_bucket{le="+Inf"} 1.0' in text
    assert 'guestpass_tunnels{gateway="gw-1",site="plant"} 2.0' in text
    assert EMAIL not in text
    assert stack.share_id not in text
