"""A plugin that means harm, in a process of its own: what it is told, and what it can do to the edge."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.people import people, plugin, usual
from support.served import serving
from support.stack import EMAIL, running

from guestpass.model import SessionKind
from guestpass.plugin import Authenticator, Client, Denied, Plugin, SignIn, Step


@pytest.fixture
async def application() -> AsyncIterator[str]:
    async def show(request: web.Request) -> web.Response:
        return web.json_response({k.lower(): v for k, v in request.headers.items()})

    app = web.Application()
    app.router.add_get("/{tail:.*}", show)
    async with serving(app) as url:
        yield url


def isolated(folder: Path, source: str, cls: str, **settings: Any) -> dict[str, Any]:
    """A section for a plugin of this source. The imports are there already."""
    folder.chmod(0o755)
    file = folder / f"{cls.lower()}.py"
    file.write_text(f"import asyncio\nfrom guestpass.plugin import *\n\n{source}")
    file.chmod(0o644)
    return {"use": f"./{file.name}:{cls}", "isolation": "process", **settings}


# ── what it is told ──────────────────────────────────────────────────────────────────────────────────────────────

LISTENS = """
class Listens(RequestFilter):
    async def on_request(self, request):
        await self.host.storage.set("told", [list(field) for field in request.headers])
"""


async def test_a_filter_is_not_told_what_lets_somebody_in(tmp_path: Path, application: str) -> None:
    section = isolated(tmp_path, LISTENS, "Listens")
    async with running(tmp_path, application, config={"filter": [section]}) as stack:
        storage = stack.edge.service.storage("filter/Listens")
        _, secret = await stack.edge.service.open_session(
            stack.share_id, EMAIL, SessionKind.COOKIE, "email-code", Client("127.0.0.1"), None
        )
        credentials: tuple[Mapping[str, str], ...] = (
            {"Authorization": f"bearer  {stack.token}"},
            {"Cookie": f"theme=dark; __Host-guestpass={secret}; __Host-gp-console={secret}"},
        )
        for fields in credentials:
            headers = {"Host": stack.host, "X-Mine": "1", **fields}
            async with stack.session.get(stack.url("/"), headers=headers) as answer:
                assert answer.status == 200
            told = await storage.get("told")
            assert ["X-Mine", "1"] in told
            assert not any(s in str(told) for s in (stack.token, secret))
        assert ["Cookie", "theme=dark"] in told


async def test_a_sign_in_is_not_told_who_else_the_browser_is(tmp_path: Path) -> None:
    """The owner's console and what was shared with them are on the main origin as well."""
    told: list[SignIn] = []

    class Listens(Authenticator):
        label = "Listen"

        def begin(self, sign_in: SignIn) -> Step:
            told.append(sign_in)
            raise Denied("Not today.")

    plugins: dict[str, list[Plugin]] = usual()
    plugins["authenticate"].append(plugin(Listens, "listens"))
    async with people(tmp_path, plugins=plugins) as edge:
        share, _ = await edge.share()
        browser = edge.browser()
        page = await browser.follow(await browser.get(edge.origins.share_origin(share.id) + "/"))
        secrets = {"__Host-gp-console": "c" * 43, "__Host-gp-me": "m" * 43}
        browser.cookies[page.url.split("/")[2]].update(**secrets, theme="dark")
        await browser.get(f"{page.url}/listens", **{"X-Mine": "1"})
    (sign_in,) = told
    assert ("X-Mine", "1") in sign_in.headers
    assert [value for name, value in sign_in.headers if name == "Cookie"] == ["theme=dark"]
