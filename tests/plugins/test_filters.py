"""`ip-allow-list`, `scope`, `rate-limit` and `headers`: what they compile, and which settings they refuse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import ValidationError
from support.people import plugin
from support.served import serving
from support.stack import SITE, Stack, running

from guestpass.model import Session, SessionKind, Share
from guestpass.plugin import Edits, Rate, RequestFilter, Scope, Static
from guestpass_plugins.filter.headers import Headers
from guestpass_plugins.filter.ip_allow_list import IpAllowList
from guestpass_plugins.filter.rate_limit import RateLimit
from guestpass_plugins.filter.scope import ScopeFilter

SHARE = Share("s1", "n", "plant", "dash", "/", (), "o", "", 0.0, None, None)
SESSION = Session("e1", "s1", "r1", "a@example.org", SessionKind.COOKIE, "p", 0.0, 0.0, None, "c")

SETTINGS: dict[type[RequestFilter], dict[str, Any]] = {
    IpAllowList: {"networks": ["192.0.2.0/24", "2001:db8::/32"]},
    ScopeFilter: {"allow": ["GET /x/**", "/y"]},
    RateLimit: {"per_second": 5, "burst": 20},
    Headers: {"set": {"X-Team": "blue"}, "remove": ["X-Debug"]},
}


def compiled(cls: type[RequestFilter], **settings: Any) -> Static | None:
    chosen = plugin(cls, "filter", **settings)
    assert isinstance(chosen, RequestFilter)
    found = chosen.compile(SHARE, SESSION)
    assert found is None or isinstance(found, Static)
    return found


@pytest.mark.parametrize("cls", SETTINGS)
def test_they_keep_the_fast_lane(cls: type[RequestFilter]) -> None:
    assert cls.on_request is RequestFilter.on_request
    assert compiled(cls, **SETTINGS[cls]) is not None


@pytest.mark.parametrize("cls", SETTINGS)
@pytest.mark.parametrize(
    ("where", "covers"),
    [
        ({"site": "plant"}, True),
        ({"service": "dash"}, True),
        ({"site": "plant", "service": "dash"}, True),
        ({"site": "plant", "service": "other"}, False),
        ({"site": "office"}, False),
        ({"service": "other"}, False),
    ],
)
def test_for_a_site_or_a_service(cls: type[RequestFilter], where: dict[str, str], covers: bool) -> None:
    assert (compiled(cls, **SETTINGS[cls], **where) is not None) == covers


def test_ip_allow_list() -> None:
    found = compiled(IpAllowList, networks=["192.0.2.0/24", "2001:db8::/32"], message="Not from there.")
    networks = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))
    assert found == Static(networks=networks, message="Not from there.")


def test_scope() -> None:
    found = compiled(ScopeFilter, allow=["GET /x/**", "/y"])
    assert found is not None
    assert found.scope == (Scope("GET", "/x/**"), Scope("*", "/y"))


def test_rate_limit() -> None:
    found = compiled(RateLimit, per_second=0.5, burst=3, each="share")
    assert found is not None
    assert found.rate == Rate(0.5, 3, each="share")


def test_headers() -> None:
    found = compiled(Headers, set={"X-Team": "blue {email} {share} {session}"}, remove=["Cookie", "X-A-B"])
    assert found is not None
    assert found.edits == Edits(
        remove=frozenset(("X-Team", "X_Team", "Cookie", "X-A-B", "X_A-B", "X-A_B", "X_A_B")),
        add=(("X-Team", "blue a@example.org s1 e1"),),
    )


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (IpAllowList, {"networks": []}, "at least 1"),
        (IpAllowList, {"networks": ["192.0.2.1/24"]}, "host bits"),
        (IpAllowList, {"networks": ["here"]}, "write it like"),
        (ScopeFilter, {"allow": []}, "at least 1"),
        (ScopeFilter, {"allow": ["GET x"]}, "must begin with '/'"),
        (ScopeFilter, {"allow": ["G3T /x"]}, "not a method"),
        (ScopeFilter, {"allow": ["/x/../y"]}, "ambiguous"),
        (RateLimit, {"per_second": 0, "burst": 1}, "greater than 0"),
        (RateLimit, {"per_second": 1, "burst": 0}, "greater than or equal to 1"),
        (RateLimit, {"per_second": 1, "burst": 1, "each": "planet"}, "'session', 'recipient' or 'share'"),
        (Headers, {}, "neither sets nor removes"),
        (Headers, {"set": {"X-A": "{password}"}}, "there is no {password}"),
        (Headers, {"set": {"X-A": "a\r\nX-B: c"}}, "cannot hold"),
        (Headers, {"set": {"X-A": "ü"}}, "cannot hold"),
        (Headers, {"set": {"X A": "b"}}, "not the name"),
        (Headers, {"set": {f"X-{n}": "b" for n in range(6)}}, "at most 5"),
        (Headers, {"remove": ["A-B-C-D-E-F"]}, "separators"),
        *(
            (Headers, {key: value}, "the edge's own")
            for name in (
                "Host",
                "content-length",
                "Transfer_Encoding",
                "X-Guestpass-Email",
                "X_Forwarded.For",
            )
            for key, value in (("set", {name: "x"}), ("remove", [name]))
        ),
    ],
)
def test_settings_that_are_refused(cls: type[RequestFilter], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as found:
        plugin(cls, "filter", **settings)
    assert words in str(found.value)


# ── through an edge, in both lanes ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def application() -> AsyncIterator[str]:
    """Answers with the fields of the request that are about the visitor's team."""

    async def answer(request: web.Request) -> web.Response:
        lines = [f"{k.lower()}={v}" for k, v in request.headers.items() if "team" in k.lower()]
        return web.Response(text="\n".join(sorted(lines)))

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    async with serving(app) as url:
        yield url


@pytest.fixture(params=["fast", "aiohttp"])
def lane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def statuses(stack: Stack, *requests: tuple[str, str]) -> list[int]:
    return [
        (await stack.get(path, method=method, headers=stack.authorization)).status
        for method, path in requests
    ]


async def test_scope_through_an_edge(tmp_path: Path, application: str, lane: str) -> None:
    rules = [
        {"use": "scope", "name": "both", "allow": ["GET /x/**", "/y"]},
        {"use": "scope", "name": "not-here", "site": "office", "allow": ["/z"]},
    ]
    async with running(tmp_path, application, config={"filter": rules}, lane=lane) as stack:
        found = await statuses(stack, ("GET", "/x/1"), ("POST", "/y"), ("POST", "/x/1"), ("GET", "/"))
        assert found == [200, 200, 403, 403]
        refused = await stack.get("/x/../z", headers=stack.authorization)
        assert refused.status == 403


async def test_networks_through_an_edge(tmp_path: Path, application: str, lane: str) -> None:
    rules = [
        {
            "use": "ip-allow-list",
            "name": "office",
            "networks": ["192.0.2.0/24"],
            "message": "From the office.",
        }
    ]
    config, edge = {"filter": rules}, {"trusted_proxies": ["127.0.0.1/32"]}
    async with running(tmp_path, application, config=config, edge=edge, lane=lane) as stack:
        for forwarded, status in (("192.0.2.7", 200), ("198.51.100.7", 403), ("192.0.2.7, 10.0.0.1", 403)):
            headers = {**stack.authorization, "X-Forwarded-For": forwarded}
            response = await stack.get("/", headers=headers)
            assert response.status == status, forwarded
            assert (b"From the office." in response.body) == (status == 403)
        assert (await stack.get("/", headers=stack.authorization)).status == 403


async def test_rate_through_an_edge(tmp_path: Path, application: str, lane: str) -> None:
    rules = [{"use": "rate-limit", "per_second": 0.01, "burst": 5}]
    async with running(tmp_path, application, config={"filter": rules}, lane=lane) as stack:
        found = await statuses(stack, *[("GET", "/")] * 8)
        assert found[-3:] == [429] * 3
        assert found.count(200) in (4, 5)  # what made the lane sure took one
        refused = await stack.get("/", headers=stack.authorization)
        assert int(refused.headers["Retry-After"]) > 0
        other = await stack.new_token(stack.share_id)
        assert (await stack.get("/", headers={"Authorization": f"Bearer {other}"})).status == 200


async def test_headers_through_an_edge(tmp_path: Path, application: str, lane: str) -> None:
    rules = [{"use": "headers", "site": SITE, "set": {"X-Team": "{email}"}, "remove": ["X-Old-Team"]}]
    async with running(tmp_path, application, config={"filter": rules}, lane=lane) as stack:
        sent = {"X_Team": "mallory", "x-team": "mallory", "X-Old_Team": "a", "X-Team-2": "kept"}
        response = await stack.get("/", headers={**stack.authorization, **sent})
        assert response.body.decode().split() == ["x-team-2=kept", "x-team=alice@example.org"]
