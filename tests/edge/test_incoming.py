"""Requests from other systems to plugins: what bounds them, and what a handler that fails cannot do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.served import serving

from guestpass.edge import incoming as module
from guestpass.edge.incoming import PREFIX, IncomingRoutes
from guestpass.edge.keys import CLIENT, SHARE_ID
from guestpass.errors import PluginError
from guestpass.plugin import Client, Incoming, Reply


class World:
    def __init__(self, url: str, routes: IncomingRoutes, session: aiohttp.ClientSession) -> None:
        self.url, self.routes, self.session = url, routes, session

    async def call(
        self, path: str, body: Any = b"", *, method: str = "POST", headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, Mapping[str, str]]:
        async with self.session.request(
            method, f"{self.url}{PREFIX}{path}", data=body, headers=headers
        ) as answer:
            return answer.status, await answer.read(), answer.headers


@pytest.fixture
async def world() -> AsyncIterator[World]:
    @web.middleware
    async def front(request: web.Request, handler: Any) -> web.StreamResponse:
        request[CLIENT] = Client(request.headers.get("X-From", "192.0.2.1"))
        if "X-Share" in request.headers:
            request[SHARE_ID] = "s1"
        answer: web.StreamResponse = await handler(request)
        return answer

    routes = IncomingRoutes()
    app = web.Application(middlewares=[front])
    app.add_routes(routes.web_routes())
    async with serving(app) as url, aiohttp.ClientSession() as session:
        yield World(url, routes, session)


def echo(call: Incoming) -> Reply:
    return Reply(200, call.body, headers=(("X-Path", call.path), ("X-From", call.client.address)))


async def test_a_route(world: World) -> None:
    assert world.routes.add("revoke/hr", object(), "told/now", echo) == f"{PREFIX}hr/told/now"
    status, body, headers = await world.call("hr/told/now", b"hello")
    assert (status, body, headers["X-Path"], headers["X-From"]) == (200, b"hello", "told/now", "192.0.2.1")
    assert headers["Cache-Control"] == "no-store"
    for path, method, expected in (
        ("hr/told/now", "GET", 405),
        ("hr/told", "POST", 404),
        ("hr", "POST", 404),
        ("hrx/told/now", "POST", 404),
        ("", "POST", 404),
    ):
        assert (await world.call(path, method=method))[0] == expected, (path, method)
    assert (await world.call("hr/told/now", headers={"X-Share": "1"}))[0] == 404


async def test_bodies_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.routes.add("revoke/hr", object(), "", echo)
    assert (await world.call("hr", bytes(module.MAX_BODY)))[0] == 200
    assert (await world.call("hr", bytes(module.MAX_BODY + 1)))[0] == 413

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(module.MAX_BODY // 2)

    assert (await world.call("hr", chunks()))[0] == 413


async def test_what_a_handler_raises_is_answered_500(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def broken(call: Incoming) -> Reply:
        raise RuntimeError("oops")

    async def slow(call: Incoming) -> Reply:
        await asyncio.sleep(60)
        return Reply()

    host = object()
    world.routes.add("revoke/hr", host, "broken", broken)
    world.routes.add("revoke/hr", host, "slow", slow)
    status, body, _ = await world.call("hr/broken")
    assert status == 500
    assert b"oops" not in body
    assert body.decode().split()[1] in caplog.text


async def test_a_deadline(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALL_DEADLINE", 0.05)

    async def slow(call: Incoming) -> Reply:
        await asyncio.sleep(60)
        return Reply()

    world.routes.add("revoke/hr", object(), "", slow)
    assert (await world.call("hr"))[0] == 500


async def test_calls_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, for all; and in number, for each network."""
    monkeypatch.setattr(module, "MOST_AT_ONCE", 2)
    going = asyncio.Event()

    async def waits(call: Incoming) -> Reply:
        await going.wait()
        return Reply()

    world.routes.add("revoke/hr", object(), "", waits)
    calls = [asyncio.create_task(world.call("hr")) for _ in range(2)]
    async with asyncio.timeout(10):
        while world.routes._under_way["hr"] < 2:
            await asyncio.sleep(0.01)
    status, _, headers = await world.call("hr")
    assert (status, headers["Retry-After"]) == (503, str(module.RETRY_AFTER))
    going.set()
    assert [(await call)[0] for call in calls] == [204, 204]
    world.routes._limiter._most = 5
    found = [(await world.call("hr"))[0] for _ in range(4)]
    assert found == [204, 204, 429, 429]
    assert (await world.call("hr", headers={"X-From": "198.51.100.1"}))[0] == 204


async def test_names_and_paths(world: World) -> None:
    host = object()
    world.routes.add("revoke/hr", host, "", echo)
    with pytest.raises(PluginError, match="two plugins of the name"):
        world.routes.add("observe/hr", object(), "", echo)
    for path in ("/x", "x/", "x\n", "ü"):
        with pytest.raises(PluginError, match="plain relative path"):
            world.routes.add("revoke/other", host, path, echo)


async def test_a_new_set_of_plugins_takes_over(world: World) -> None:
    """The new one has started before the old one stops, and keeps what both have."""
    old, new = object(), object()
    world.routes.add("revoke/hr", old, "", lambda call: Reply(200, b"old"))
    world.routes.add("revoke/hr", old, "more", lambda call: Reply(200, b"old"))
    world.routes.add("revoke/hr", new, "", lambda call: Reply(200, b"new"))
    world.routes.remove(old)
    assert (await world.call("hr"))[1] == b"new"
    assert (await world.call("hr/more"))[0] == 404
    world.routes.remove(new)
    assert (await world.call("hr"))[0] == 404
