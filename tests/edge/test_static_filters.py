"""What filters compile into a grant: header edits, scopes, networks and rates, the same on both lanes."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.stack import Stack, running

from guestpass.edge.plugins import PluginSet
from guestpass.edge.static import StaticCompiler
from guestpass.errors import Forbidden, PluginFailed
from guestpass.model import Scope, Session, SessionKind, Share
from guestpass.plugin import Denied, Edits, PluginConfig, Rate, RequestFilter, Static

SHARE = Share("s1", "n", "plant", "dash", "/", (), "o", "", 0.0, None, None)
SESSION = Session("e1", "s1", "r1", "a@example.org", SessionKind.COOKIE, "email-code", 0.0, 0.0, None, "c")


class Says(RequestFilter):
    """Compiles what it is given, or raises it."""

    answer: Any = None

    def compile(self, share: Share, session: Session) -> Static | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]


def with_answers(*answers: Any) -> PluginSet:
    filters = []
    for index, answer in enumerate(answers):
        one = Says(f"f{index}", PluginConfig())
        one.answer = answer
        filters.append(one)
    return PluginSet({"filter": filters})


def networks(*texts: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(text) for text in texts]


# ── compiling ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_filters_say_is_joined() -> None:
    plugins = with_answers(
        None,
        Static(Edits(frozenset({"X-Old"}), (("X-New", "1"),)), scope=[Scope("GET", "/a/**")], message="No."),
        Static(networks=networks("10.0.0.0/8"), rate=Rate(2.0, 3)),
    )
    found = await plugins.compile(SHARE, SESSION)
    assert found is not None
    assert found.removed == (b"x-old",)
    assert found.added == b"X-New: 1\r\n"
    assert found.outside("GET", "/a/b?c") is None
    assert found.outside("GET", "/b") == "No."
    assert found.elsewhere("10.1.2.3") is None
    assert found.elsewhere("192.0.2.1") == ""
    assert [found.take(0.0) for _ in range(3)] == [None, None, None]
    assert found.take(0.0) == pytest.approx(0.5)
    assert found.take(0.5) is None


async def test_nothing_said_costs_nothing() -> None:
    assert await with_answers().compile(SHARE, SESSION) is None
    assert await with_answers(None, Static()).compile(SHARE, SESSION) is None


async def test_empty_limits_admit_nothing() -> None:
    found = await with_answers(Static(scope=[], networks=[])).compile(SHARE, SESSION)
    assert found is not None
    assert found.outside("GET", "/") is not None
    assert found.elsewhere("127.0.0.1") is not None


@pytest.mark.parametrize(
    "wrong",
    [
        "nonsense",
        Static(Edits(add=(("X Y", "1"),))),
        Static(Edits(add=(("X", "1\r\nX-Guestpass-Email: root@example.org"),))),
        Static(Edits(add=(("X-Guestpass-Email", "root@example.org"),))),
        Static(Edits(add=(("x_guestpass_email", "root@example.org"),))),
        Static(Edits(add=(("Transfer-Encoding", "chunked"),))),
        Static(Edits(frozenset({"Content-Length"}))),
        Static(Edits(add=tuple((f"X-{n}", "") for n in range(6)))),
        Static(Edits(add=(("X", "y" * 5000),))),
        Static(scope=[Scope("get it", "/")]),
        Static(scope=[Scope("GET", "/a/../b")]),
        Static(networks=["10.0.0.0/8"]),  # type: ignore[list-item]
        Static(rate=Rate(0, 1)),
        Static(rate=Rate(1, 0)),
        Static(rate=Rate(1, 1, "visitor")),
        ValueError("oops"),
    ],
    ids=lambda w: repr(w)[:60],
)
async def test_what_is_malformed_is_denied(wrong: Any) -> None:
    with pytest.raises(PluginFailed):
        await with_answers(wrong).compile(SHARE, SESSION)


async def test_a_filter_may_refuse_a_session() -> None:
    with pytest.raises(Forbidden, match="Come tomorrow"):
        await with_answers(Denied("Come tomorrow.")).compile(SHARE, SESSION)


def test_a_rate_counts_what_it_says() -> None:
    compiler = StaticCompiler()

    def buckets(each: str, session: str, recipient: str) -> Any:
        one = Session(session, "s1", recipient, "a@b", SessionKind.COOKIE, "p", 0.0, 0.0, None, "c")
        found = compiler.compile([("f", Static(rate=Rate(1, 1, each)))], SHARE, one)
        assert found is not None
        return found.buckets

    for each, same in (("session", False), ("recipient", False), ("share", True)):
        first, second = buckets(each, "e1", "r1"), buckets(each, "e2", "r2")
        assert (first[0] is second[0]) is same
    first, second = buckets("recipient", "e1", "r1"), buckets("recipient", "e2", "r1")
    assert first[0] is second[0]


# ── on both lanes ────────────────────────────────────────────────────────────────────────────────────────────────

FILTER = """
import ipaddress
import json
from guestpass.plugin import *

class Limits(RequestFilter):
    class Config(PluginConfig):
        networks: list[str] | None = None
        scope: list[tuple[str, str]] | None = None
        burst: int | None = None
        add: list[tuple[str, str]] = []
        remove: list[str] = []

    def compile(self, share, session):
        c = self.config
        return Static(
            edits=Edits(frozenset(c.remove), tuple(c.add)),
            scope=None if c.scope is None else [Scope(*rule) for rule in c.scope],
            networks=None if c.networks is None else [ipaddress.ip_network(n) for n in c.networks],
            rate=None if c.burst is None else Rate(0.01, c.burst),
            message="The filter says no.",
        )
"""


@pytest.fixture
async def application() -> AsyncIterator[str]:
    async def show(request: web.Request) -> web.Response:
        return web.json_response([[k, v] for k, v in request.headers.items()])

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", show)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


@pytest.fixture(params=["fast", "aiohttp"])
def lane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def limited(folder: Path, application: str, lane: str, edge: Any = None, **settings: Any) -> Any:
    folder.chmod(0o755)
    file = folder / "limits.py"
    file.write_text(FILTER)
    file.chmod(0o644)
    config = {"filter": [{"use": "./limits.py:Limits", **settings}]}
    return running(folder, application, lane=lane, config=config, edge=edge)


async def statuses(stack: Stack, paths: list[str], headers: Mapping[str, str] | None = None) -> list[int]:
    return [(await stack.get(path, headers=headers)).status for path in paths]


async def test_headers(tmp_path: Path, application: str, lane: str) -> None:
    settings: dict[str, Any] = {"add": [["X-Team", "blue"]], "remove": ["x-secret", "Cookie"]}
    async with limited(tmp_path, application, lane, **settings) as stack:
        sent = {"X-Secret": "1", "X-Kept": "2", "Cookie": "a=b"}
        for _ in range(3):
            got = await stack.get("/", headers=sent)
            fields = {k.lower(): v for k, v in json.loads(got.body)}
            assert fields["x-team"] == "blue"
            assert fields["x-kept"] == "2"
            assert not {"x-secret", "cookie"} & set(fields)
            assert fields["x-guestpass-email"] == "alice@example.org"
        assert stack.answered(lane) == 3


async def test_scope(tmp_path: Path, application: str, lane: str) -> None:
    async with limited(tmp_path, application, lane, scope=[["GET", "/a/**"]]) as stack:
        assert await statuses(stack, ["/a/b", "/b", "/a/b?c=d", "/a/%2e%2e/b"]) == [200, 403, 200, 403]
        refused = await stack.get("/b")
        assert b"The filter says no." in refused.body
        assert (await stack.get("/a/b", method="POST")).status == 403


async def test_networks(tmp_path: Path, application: str, lane: str) -> None:
    trusting = {"trusted_proxies": ["127.0.0.1/32"]}
    async with limited(tmp_path, application, lane, edge=trusting, networks=["192.0.2.0/24"]) as stack:
        inside, outside = {"X-Forwarded-For": "192.0.2.7"}, {"X-Forwarded-For": "198.51.100.1"}
        assert await statuses(stack, ["/", "/"], inside) == [200, 200]
        assert await statuses(stack, ["/"], outside) == [403]
        assert await statuses(stack, ["/"]) == [403]
        assert await statuses(stack, ["/"], inside) == [200]


async def test_rate(tmp_path: Path, application: str, lane: str) -> None:
    async with limited(tmp_path, application, lane, burst=3) as stack:
        assert await statuses(stack, ["/"] * 5) == [200, 200, 200, 429, 429]
        refused = await stack.get("/")
        assert int(refused.headers["Retry-After"]) >= 1


async def test_a_filter_that_only_compiles_keeps_the_fast_lane(tmp_path: Path, application: str) -> None:
    async with limited(tmp_path, application, "fast", add=[["X-A", "b"]]) as stack:
        assert await statuses(stack, ["/"] * 4) == [200] * 4
        assert stack.answered("fast") == 4
