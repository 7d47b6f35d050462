"""`idle-timeout` in a running edge: sessions that are used stay, in either lane, and those with something open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from support.people import plugin
from support.served import serving
from support.stack import EMAIL, Stack, running

from guestpass.model import Session, SessionKind, Share
from guestpass.plugin import Client
from guestpass_plugins.revoke import idle_timeout as module
from guestpass_plugins.revoke.idle_timeout import IdleTimeout

MINUTES = 10
SHARE = Share("s1", "n", "plant", "dash", "/", (), "o", "", 0.0, None, None)
SESSION = Session("e1", "s1", "r1", EMAIL, SessionKind.COOKIE, "p", 0.0, 0.0, None, "c")


@pytest.mark.parametrize(
    ("settings", "session", "ends"),
    [
        ({}, {"last_seen": 0.0}, True),
        ({}, {"last_seen": 500.0}, False),
        ({}, {"last_seen": 0.0, "kind": SessionKind.TOKEN}, False),
        ({"tokens": True}, {"last_seen": 0.0, "kind": SessionKind.TOKEN}, True),
        ({"tokens": True}, {"last_seen": 500.0, "kind": SessionKind.TOKEN}, False),
    ],
)
def test_check(settings: dict[str, bool], session: dict[str, object], ends: bool) -> None:
    revoker = plugin(IdleTimeout, "idle-timeout", minutes=MINUTES, **settings)
    assert isinstance(revoker, IdleTimeout)
    revoker.host = type("Host", (), {"now": lambda self: 1000.0})()
    found = revoker.check(SHARE, replace(SESSION, **session))
    assert (found is not None) == ends
    assert found is None or (found.reason, found.session_id) == ("idle", "e1")


def test_it_is_not_shorter_than_what_the_edge_knows() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 5"):
        plugin(IdleTimeout, "idle-timeout", minutes=1)


@pytest.fixture(params=["fast", "aiohttp"])
async def stack(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stack]:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path != "/open":
            return web.Response(text="ok")
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"alive")
                await asyncio.sleep(0.05)
        return response

    app = web.Application()
    app.router.add_get("/{tail:.*}", answer)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    config = {"revoke": [{"use": "idle-timeout", "minutes": MINUTES}]}
    async with serving(app) as url, running(tmp_path, url, config=config, lane=request.param) as found:
        yield found


async def sign_in(stack: Stack) -> tuple[str, dict[str, str]]:
    session, secret = await stack.edge.service.open_session(
        stack.share_id, EMAIL, SessionKind.COOKIE, "email-code", Client("::1")
    )
    return session.id, {"Cookie": f"__Host-guestpass={secret}"}


async def status(stack: Stack, headers: dict[str, str]) -> int:
    fields = {**headers, "Host": stack.host}
    async with stack.session.get(stack.url("/"), headers=fields, allow_redirects=False) as response:
        return response.status


def later(stack: Stack, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """It is later, for the store, the plugin and the grants."""
    now = stack.edge.service._now
    moved = lambda: now() + seconds  # noqa: E731
    stack.edge.service._now = moved
    stack.edge.grants._now = moved
    for host in stack.edge.plugins._hosts.values():
        object.__setattr__(host._edge, "now", moved)


async def test_who_is_away_is_signed_out_and_who_is_there_is_not(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, away_headers = await sign_in(stack)
    there, there_headers = await sign_in(stack)
    watching, watching_headers = await sign_in(stack)
    for headers in (away_headers, there_headers, watching_headers):
        assert await status(stack, headers) == 200
    host = {"Host": stack.host}
    response = await stack.session.get(stack.url("/open"), headers={**watching_headers, **host})
    await response.content.readexactly(5)

    async def live() -> set[str]:
        return {s.id for s in await stack.edge.service.sessions() if s.kind is SessionKind.COOKIE}

    assert await live() == {away, there, watching}
    later(stack, monkeypatch, 60 * MINUTES * 0.7)
    assert await status(stack, there_headers) == 200
    stack.edge.grants.used(stack.edge.grants._by_session[there], stack.edge.grants._now())
    stack.edge.grants.sweep()
    later(stack, monkeypatch, 60 * MINUTES * 0.7)
    async with asyncio.timeout(10):
        while away in await live():
            await asyncio.sleep(0.02)
    assert await live() == {there, watching}
    assert await status(stack, away_headers) == 401
    assert await status(stack, there_headers) == 200
    async with asyncio.timeout(5):
        assert await response.content.readexactly(5) == b"alive"
    response.close()
    # The token of the stack was used once, long ago: scripts are left alone.
    assert await status(stack, stack.authorization) == 200
    (event,) = [e for e in (await stack.edge.service.audit()).items if e.event.type == "session.ended"]
    assert event.event.detail["reason"] == "idle"


async def test_a_session_without_a_grant_is_refused(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart, between two looks: the store knows when it was used last."""
    _, headers = await sign_in(stack)
    monkeypatch.setattr(module, "LOOK_SECONDS", 3600.0)
    await asyncio.sleep(0.1)
    later(stack, monkeypatch, 60 * MINUTES + 1)
    assert await status(stack, headers) == 401
