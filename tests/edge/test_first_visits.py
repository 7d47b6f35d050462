"""A session's first request on an edge that does not know it yet: both lanes, over real sockets. The fast lane has
admission make the grant of a cookie and goes on by itself; what is refused is aiohttp's to tell."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSMsgType, web
from support.served import serving
from support.stack import EMAIL, Stack, read_head, running

from guestpass.model import Revocation, SessionKind
from guestpass.plugin import Client, Denied
from guestpass_speedups.relay import HELD_LIMIT, Connection

LANES = ("fast", "aiohttp")
MB = 1 << 20
# What one read brings at most (READ_BUFFER of relay.pyx).
READ = 262144


async def show(request: web.Request) -> web.StreamResponse:
    if request.path == "/echo":
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            if message.type is WSMsgType.TEXT:
                await ws.send_str(message.data)
        return ws
    body = await request.read()
    found = {"target": request.raw_path, "length": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    return web.json_response(found | {"email": request.headers.get("X-Guestpass-Email")})


@pytest.fixture
async def app_url() -> AsyncIterator[str]:
    application = web.Application(client_max_size=64 * MB)
    application.router.add_route("*", "/{tail:.*}", show)
    async with serving(application, handler_cancellation=True) as url:
        yield url


@pytest.fixture(params=LANES)
async def stack(app_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    """The token of the share has a grant already; cookies are new."""
    log = {"access_log": str(tmp_path / "access.log")}
    async with running(tmp_path, app_url, lane=request.param, edge=log) as it:
        yield it


def lane_of(stack: Stack) -> str:
    return "fast" if stack.edge.lane.fast else "aiohttp"


async def new_cookie(stack: Stack) -> str:
    _, cookie = await stack.edge.service.open_session(
        stack.share_id, EMAIL, SessionKind.COOKIE, "email-code", Client("127.0.0.1")
    )
    return cookie


def head(stack: Stack, cookie: str, method: str, path: str, *lines: str) -> bytes:
    first = (f"{method} {path} HTTP/1.1", f"Host: {stack.host}", f"Cookie: __Host-guestpass={cookie}")
    origin = f"Origin: http://{stack.host}"
    return "\r\n".join((*first, origin, *lines, "", "")).encode("latin-1")


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The next one, which has a length."""
    async with asyncio.timeout(10):
        got = (await read_head(reader)).decode("latin-1").lower()
        length = next(int(line[16:]) for line in got.split("\r\n") if line.startswith("content-length: "))
        return int(got[9:12]), await reader.readexactly(length)


@contextlib.asynccontextmanager
async def connection(stack: Stack) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def first(stack: Stack, cookie: str, path: str = "/", *lines: str) -> tuple[int, bytes]:
    """A request on a connection of its own."""
    async with connection(stack) as (reader, writer):
        writer.write(head(stack, cookie, "GET", path, *lines))
        return await answer(reader)


class Gate:
    """Holds admission up after the store and the Revokers were asked."""

    def __init__(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.open = asyncio.Event()
        compile_ = stack.edge.plugins.compile

        async def held(*about: Any) -> Any:
            self.asked += 1
            await self.open.wait()
            return await compile_(*about)

        monkeypatch.setattr(stack.edge.plugins, "compile", held)
        self._stack = stack

    async def reached(self, number: int = 1) -> None:
        await self._stack.until(lambda: self.asked == number, f"admission was asked {number} times")


def waiting(stack: Stack) -> list[Connection]:
    return [c for c in stack.edge.lane.connections if c.phase_name == "ADMISSION"]


# ── served ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_lane_serves_all_requests_of_a_cookie(stack: Stack) -> None:
    cookie = await new_cookie(stack)
    async with connection(stack) as (reader, writer):
        for number in range(3):
            writer.write(head(stack, cookie, "GET", f"/{number}"))
            status, body = await answer(reader)
            assert (status, json.loads(body)["target"], json.loads(body)["email"]) == (
                200,
                f"/{number}",
                EMAIL,
            )
    assert stack.answered(lane_of(stack)) == 3
    assert sum(stack.answered(lane) for lane in LANES) == 3


async def test_bodies_of_first_requests(stack: Stack) -> None:
    body = bytes(range(256)) * 4096
    digest = hashlib.sha256(body).hexdigest()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[:7], body[7:70_000], body[70_000:]))
    for framing, sent in (
        (f"Content-Length: {len(body)}", body),
        ("Transfer-Encoding: chunked", chunks + b"0\r\n\r\n"),
    ):
        cookie = await new_cookie(stack)
        async with connection(stack) as (reader, writer):
            writer.write(
                head(stack, cookie, "POST", "/up", framing) + sent + head(stack, cookie, "GET", "/2")
            )
            status, got = await answer(reader)
            assert (status, json.loads(got)["sha256"]) == (200, digest)
            status, got = await answer(reader)
            assert (status, json.loads(got)["target"]) == (200, "/2")
    cookie = await new_cookie(stack)
    async with connection(stack) as (reader, writer):
        writer.write(head(stack, cookie, "POST", "/up", "Content-Length: 4", "Expect: 100-continue"))
        async with asyncio.timeout(10):
            assert (await read_head(reader)).startswith(b"HTTP/1.1 100 ")
        writer.write(b"body")
        status, got = await answer(reader)
        assert (status, json.loads(got)["length"]) == (200, 4)
    assert stack.answered(lane_of(stack)) == 5


async def test_an_upgrade_may_come_first(stack: Stack) -> None:
    cookie = await new_cookie(stack)
    headers = {
        "Host": stack.host,
        "Cookie": f"__Host-guestpass={cookie}",
        "Origin": f"http://{stack.host}",
    }
    async with stack.session.ws_connect(stack.url("/echo"), headers=headers) as ws:
        await ws.send_str("hello")
        assert await ws.receive_str(timeout=10) == "hello"
    await stack.until(lambda: stack.answered(lane_of(stack)) == 1, "the socket is counted")


async def test_requests_that_come_together_ask_once(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    cookie = await new_cookie(stack)
    gate = Gate(stack, monkeypatch)
    asking = [asyncio.create_task(first(stack, cookie, f"/{number}")) for number in range(6)]
    await gate.reached()
    if lane_of(stack) == "fast":
        await stack.until(lambda: len(waiting(stack)) == 6, "all of them wait")
    gate.open.set()
    assert [status for status, _ in await asyncio.gather(*asking)] == [200] * 6
    assert gate.asked == 1
    assert stack.answered(lane_of(stack)) == 6


async def test_what_comes_behind_the_request_is_bounded(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While admission is asked nobody takes a body: reading pauses."""
    cookie = await new_cookie(stack)
    gate = Gate(stack, monkeypatch)
    body = bytes(16 * MB)
    async with connection(stack) as (reader, writer):
        writer.write(head(stack, cookie, "POST", "/up", f"Content-Length: {len(body)}") + body)
        await gate.reached()
        if lane_of(stack) == "fast":
            (held,) = waiting(stack)
            await stack.until(lambda: held.held_bytes > HELD_LIMIT, "reading pauses")
            await asyncio.sleep(0.1)
            assert held.held_bytes <= HELD_LIMIT + READ
        gate.open.set()
        status, got = await answer(reader)
    assert (status, json.loads(got)["length"]) == (200, len(body))


async def test_a_proxys_client_is_found_out_first(app_url: str, tmp_path: Path) -> None:
    trusting = {"trusted_proxies": ["127.0.0.1/32"]}
    async with running(tmp_path, app_url, lane="fast", edge=trusting) as stack:
        cookie = await new_cookie(stack)
        for answered in ((1, 0), (1, 1)):
            assert (await first(stack, cookie, "/", "X-Forwarded-For: 192.0.2.7"))[0] == 200
            assert (stack.answered("aiohttp"), stack.answered("fast")) == answered


async def test_filters_that_came_meanwhile_see_the_request(
    app_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane may have been switched off while admission was asked: then the request is aiohttp's."""
    async with running(tmp_path, app_url, lane="fast") as stack:
        cookie = await new_cookie(stack)
        gate = Gate(stack, monkeypatch)
        asking = asyncio.create_task(first(stack, cookie))
        await gate.reached()
        stack.edge.lane.fast = False
        gate.open.set()
        assert (await asking)[0] == 200
        assert (stack.answered("aiohttp"), stack.answered("fast")) == (1, 0)


# ── refused ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_cookies_of_no_session(stack: Stack) -> None:
    ended = await new_cookie(stack)
    (session,) = [
        s for s in await stack.edge.service.sessions(stack.share_id) if s.kind is SessionKind.COOKIE
    ]
    await stack.edge.service.end_session(session.id)
    for cookie in (ended, "x", "x" * 4000, stack.token):
        assert (await first(stack, cookie))[0] == 401
    other = await stack.new_share()
    stack.share_id, mine = other, stack.share_id
    cookie = await new_cookie(stack)
    stack.share_id = mine
    assert (await first(stack, cookie))[0] == 401
    await stack.edge.service.delete(mine)
    assert (await first(stack, await new_cookie_of(stack, other)))[0] == 410
    assert stack.answered("fast") == 0


async def new_cookie_of(stack: Stack, share_id: str) -> str:
    _, cookie = await stack.edge.service.open_session(
        share_id, EMAIL, SessionKind.COOKIE, "email-code", Client("127.0.0.1")
    )
    return cookie


async def test_a_refusal_is_found_out_once_and_told(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Revokers are asked once for one request, whatever they say; and again for the next one."""
    cookie = await new_cookie(stack)
    (revoker,) = [plugin for plugin in stack.edge.plugins.all if plugin.name == "share-state"]
    asked = 0

    def check(share: Any, session: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise Denied("Not before noon.")
        if asked == 2:
            raise RuntimeError("broken")
        return Revocation("session_ended", session_id=session.id) if asked == 3 else None

    monkeypatch.setattr(revoker, "check", check)
    async with connection(stack) as (reader, writer):
        for number, (status, words) in enumerate(((403, b"Not before noon."), (503, b""), (401, b"")), 1):
            writer.write(head(stack, cookie, "GET", "/"))
            got, body = await answer(reader)
            assert (got, words in body, asked) == (status, True, number)
        writer.write(head(stack, cookie, "GET", "/"))
        assert (await answer(reader))[0] == 200
    assert asked == 4


async def test_what_a_cookie_was_refused_is_not_another_ones(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection, requests of two sessions in a row: a refusal stays with its own."""
    good, bad = await new_cookie(stack), "nobody"
    gate = Gate(stack, monkeypatch)
    gate.open.set()
    async with connection(stack) as (reader, writer):
        writer.write(b"".join(head(stack, cookie, "GET", "/") for cookie in (bad, good, bad, good)))
        assert [(await answer(reader))[0] for _ in range(4)] == [401, 200, 401, 200]


# ── revoked meanwhile ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_revocation_while_admission_is_asked_wins(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookie = await new_cookie(stack)
    gate = Gate(stack, monkeypatch)
    asking = asyncio.create_task(first(stack, cookie))
    await gate.reached()
    await stack.edge.service.delete(stack.share_id)
    gate.open.set()
    assert (await asking)[0] == 410
    assert not len(stack.edge.grants)
    assert not stack.edge.grants.cookies


async def test_a_revocation_between_grant_and_request_wins(
    app_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grant was made, and is dropped before the lane has looked at the request again."""
    async with running(tmp_path, app_url, lane="fast") as stack:
        cookie = await new_cookie(stack)
        learn = stack.edge.lane.learn
        before = 0

        def revoked_first(grant: Any, secret: str) -> None:
            nonlocal before
            before += 1
            if before == 1:
                assert stack.edge.grants.revoke(Revocation("deleted", share_id=stack.share_id)).sessions == 2
            learn(grant, secret)

        monkeypatch.setattr(stack.edge.lane, "learn", revoked_first)
        # The store knows of no revocation: admission, which is asked again, lets the session in anew.
        assert (await first(stack, cookie))[0] == 200
        assert (stack.answered("aiohttp"), stack.answered("fast")) == (1, 0)
        assert before == 1, "the relay has its own reference"


# ── gone meanwhile ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["aborts", "ends"])
async def test_a_visitor_who_leaves_while_admission_is_asked(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Others who wait for the same grant get it, and the log knows of both."""
    cookie = await new_cookie(stack)
    gate = Gate(stack, monkeypatch)
    async with connection(stack) as (_, writer):
        writer.write(head(stack, cookie, "GET", "/gone"))
        await gate.reached()
        before = len(stack.edge.lane.connections)
        staying = asyncio.create_task(first(stack, cookie))
        await stack.until(lambda: len(stack.edge.lane.connections) == before + 1, "another one is there")
        if how == "ends":
            writer.write_eof()
        else:
            writer.transport.abort()
        await stack.until(lambda: len(stack.edge.lane.connections) == before, "the first one has gone")
    gate.open.set()
    assert (await staying)[0] == 200
    stack.edge.lane.log_flush()
    log = stack.folder / "access.log"
    await stack.until(lambda: log.read_bytes().count(b"\n") == 2, "two lines are logged")
    gone, served = (json.loads(line) for line in log.read_text().splitlines())
    assert (gone["status"], gone["complete"], gone["session"], gone["lane"]) == (
        *(499, False, None),
        lane_of(stack),
    )
    assert (gone["share"], gone["method"], gone["client"]) == (stack.share_id, "GET", "127.0.0.1")
    assert (served["status"], served["complete"], served["lane"]) == (200, True, lane_of(stack))
    assert served["session"]


async def test_an_edge_that_stops_while_admission_is_asked(
    app_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, app_url, lane="fast") as stack:
        cookie = await new_cookie(stack)
        gate = Gate(stack, monkeypatch)
        async with connection(stack) as (reader, writer):
            writer.write(head(stack, cookie, "GET", "/"))
            await gate.reached()
            async with asyncio.timeout(10):
                await stack.edge.stop()
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
