"""`ip-allow-list`, `scope`, `rate-limit` and `headers`: what they compile, and which settings they refuse."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from pydantic import ValidationError
from support.people import plugin

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
