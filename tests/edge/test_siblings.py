"""Shares of one domain are same-site to a browser: SameSite cookies do not keep their pages apart, the edge does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from support.stack import EMAIL, Stack, running

from guestpass.model import SessionKind
from guestpass.plugin import Client


async def hello(request: web.Request) -> web.StreamResponse:
    if request.headers.get("Upgrade", "").lower() != "websocket":
        return web.Response(text="hello")
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.close()
    return socket


@pytest.fixture(params=["fast", "aiohttp"])
async def stack(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stack]:
    app = web.Application()
    app.router.add_route("*", "/", hello)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        async with running(tmp_path, f"http://{host}:{port}", lane=request.param) as found:
            yield found
    finally:
        await runner.cleanup()


async def browser_of(stack: Stack, share_id: str) -> dict[str, str]:
    """The headers that a signed-in browser sends to a share's origin of its own accord."""
    service = stack.edge.service
    client = Client("127.0.0.1")
    _, secret = await service.open_session(share_id, EMAIL, SessionKind.COOKIE, "email-code", client)
    if stack.edge.lane.fast:
        await stack.warm(share_id, secret, SessionKind.COOKIE)
    return {"Host": f"{share_id}.localhost:{stack.port}", "Cookie": f"__Host-guestpass={secret}"}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_unsafe_methods_need_the_shares_own_origin(stack: Stack, method: str) -> None:
    sibling = await stack.new_share()
    browser = await browser_of(stack, stack.share_id)

    async def status(**headers: str) -> int:
        sent = browser | {name.replace("_", "-"): value for name, value in headers.items()}
        async with stack.session.request(method, stack.url("/"), headers=sent) as answer:
            return answer.status

    assert await status(Origin=f"http://{stack.host}") == 200
    assert await status(Sec_Fetch_Site="same-origin") == 200
    assert await status(Origin=f"http://{sibling}.localhost:{stack.port}") == 403
    assert await status(Origin=f"http://localhost:{stack.port}") == 403
    assert await status(Origin="null") == 403
    assert await status(Origin=f"https://{stack.host}") == 403
    assert await status(Sec_Fetch_Site="same-site") == 403
    assert await status(Sec_Fetch_Site="cross-site") == 403
    assert await status() == 403


async def test_websockets_need_the_shares_own_origin(stack: Stack) -> None:
    sibling = await stack.new_share()
    browser = await browser_of(stack, stack.share_id)

    async def status(origin: str | None) -> int:
        sent = browser | ({"Origin": origin} if origin else {})
        try:
            async with stack.session.ws_connect(stack.url("/"), headers=sent):
                return 101
        except aiohttp.WSServerHandshakeError as refused:
            return refused.status

    assert await status(f"http://{stack.host}") == 101
    assert await status(f"http://{sibling}.localhost:{stack.port}") == 403
    assert await status("https://elsewhere.example") == 403
    assert await status(None) == 403


async def test_pages_may_be_linked_from_anywhere(stack: Stack) -> None:
    browser = await browser_of(stack, stack.share_id)
    elsewhere = {"Origin": "https://elsewhere.example", "Sec-Fetch-Site": "cross-site"}
    async with stack.session.get(stack.url("/"), headers=browser | elsewhere) as answer:
        assert answer.status == 200


async def test_a_script_with_a_token_sends_no_origin(stack: Stack) -> None:
    assert (await stack.get("/", method="POST")).status == 200


async def test_a_cookie_of_a_sibling_opens_nothing(stack: Stack) -> None:
    """Also when the browser was made to send it: a page may set cookies for the domain that all shares are below."""
    sibling = await stack.new_share()
    foreign = (await browser_of(stack, sibling))["Cookie"]
    own = await browser_of(stack, stack.share_id)

    async def status(cookie: str) -> int:
        sent = {"Host": stack.host, "Cookie": cookie}
        async with stack.session.get(stack.url("/"), headers=sent, allow_redirects=False) as answer:
            return answer.status

    assert await status(own["Cookie"]) == 200
    assert await status(foreign) == 401
    assert await status(f"{own['Cookie']}; {foreign}") == 401, "one of two: nobody can say which is right"


async def test_the_admin_listener_knows_its_names(stack: Stack) -> None:
    url = stack.metrics_url.removesuffix("/metrics")
    for host, status in (("localhost", 200), ("127.0.0.1:1", 200), ("rebound.example", 421)):
        async with stack.session.get(f"{url}/healthz", headers={"Host": host}) as answer:
            assert answer.status == status, host
