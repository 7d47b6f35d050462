"""The management API over real HTTP, on a real store; the data plane behind it is made up."""

from __future__ import annotations

import asyncio
import base64
import csv
import hashlib
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer
from support.shares import World, new, secret_of, world
from yarl import URL

from guestpass.edge import api_models
from guestpass.edge.api import OPERATIONS, PREFIX, Api, routes
from guestpass.errors import ShareEnded
from guestpass.model import Event, Revoked, SessionKind
from guestpass.tokens import digest

API_KEY = "gpk_test-key"
KEY = {"Authorization": f"Bearer {API_KEY}"}
GATEWAY_KEY = base64.urlsafe_b64encode(bytes(range(32))).decode().rstrip("=")


class Live:
    def sessions(self, share_id: str) -> int:
        return 2

    def streams(self, share_id: str) -> int:
        return 5

    def session_streams(self, session_id: str) -> int:
        return 3


@dataclass
class Status:
    site: str
    name: str
    tunnels: int = 2
    streams: int = 4
    rtt: float | None = 0.012
    services: Mapping[str, bool] = field(default_factory=lambda: {"dashboards": True})
    since: float = 1785580000.0


class Tunnels:
    def __init__(self) -> None:
        self.connected: list[Status] = []

    def status(self) -> list[Status]:
        return self.connected


@dataclass
class Served:
    w: World
    client: TestClient[web.Request, web.Application]
    tunnels: Tunnels

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        status: int = 200,
        headers: Mapping[str, str] = KEY,
        **options: Any,
    ) -> Any:
        async with self.client.request(
            method, PREFIX + path, json=body, headers=headers, **options
        ) as answer:
            text = await answer.text()
            assert answer.status == status, text
            if not text:
                return None
            given = json.loads(text)
            assert answer.headers["Cache-Control"] == "no-store"
            if status >= 400:
                check_problem(answer, given)
            return given

    async def share(self, **more: Any) -> Any:
        body = {"site": "plant-a", "service": "dashboards", "to": ["alice@example.org"], **more}
        return await self.ask("POST", "/shares", body, status=201)


def check_problem(answer: ClientResponse, given: Any) -> None:
    assert answer.content_type == "application/problem+json"
    assert set(given) == {"type", "title", "status", "detail", "code", "hint"}
    assert given["status"] == answer.status
    assert given["detail"]


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Served]:
    async with world(folder) as w:
        tunnels = Tunnels()
        api = Api(
            service=w.service,
            live=Live(),
            gateways=tunnels,
            events=w.events,
            api_key=API_KEY,
            edge_name="guestpass",
            share_origin=w.service.share_origin,
            now=w.clock,
        )
        app = web.Application(client_max_size=256 << 10)
        app.add_routes(routes(api))
        async with TestClient(TestServer(app)) as client:
            yield Served(w, client, tunnels)
            w.events.close()


@pytest.fixture
async def s(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as made:
        yield made


# ── The document ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_route_is_in_the_document_and_the_other_way_round(s: Served) -> None:
    given = await s.ask("GET", "/openapi.json")
    documented = {(method.upper(), path) for path, item in given["paths"].items() for method in item}
    app = s.client.server.app  # type: ignore[attr-defined]
    registered = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.method not in ("HEAD", "*")
    }
    assert registered == documented
    assert len(documented) == len(OPERATIONS)


async def test_the_document_is_openapi(s: Served) -> None:
    given = await s.ask("GET", "/openapi.json")
    assert given["openapi"].startswith("3.1")
    ids = [o["operationId"] for item in given["paths"].values() for o in item.values()]
    assert len(set(ids)) == len(ids)
    schemas = given["components"]["schemas"]

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            found = {node["$ref"]} if "$ref" in node else set()
            return found.union(*map(references, node.values()))
        return set().union(*map(references, node)) if isinstance(node, list) else set()

    for reference in references(given):
        assert reference.removeprefix("#/components/schemas/") in schemas
    for path, item in given["paths"].items():
        for operation in item.values():
            in_path = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert in_path == {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert "default" in operation["responses"]
    enroll = given["paths"][f"{PREFIX}/gateways/enroll"]["post"]
    assert enroll["security"] == []
    created = given["paths"][f"{PREFIX}/shares"]["post"]
    assert created["responses"]["201"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/CreatedShareOut"
    }
    assert {p["name"] for p in given["paths"][f"{PREFIX}/audit"]["get"]["parameters"]} == set(
        api_models.AuditQuery.model_fields
    )


# ── Keys, paths, methods, bodies ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.handler)
@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "api_key_missing"),
        ({"Authorization": API_KEY}, "api_key_missing"),
        ({"Authorization": f"Basic {API_KEY}"}, "api_key_missing"),
        ({"Authorization": "Bearer "}, "api_key_wrong"),
        ({"Authorization": f"Bearer {API_KEY}x"}, "api_key_wrong"),
        ({"Authorization": "Bearer \x80"}, "api_key_wrong"),
    ],
)
async def test_nothing_without_the_key(s: Served, operation: Any, headers: dict[str, str], code: str) -> None:
    path = operation.path.replace("{id}", "s1").replace("{email}", "a@b.org").replace("{site}/{name}", "a/b")
    if not operation.needs_key:
        assert operation.handler == "enroll"
        return
    async with s.client.request(operation.method, PREFIX + path, headers=headers) as answer:
        given = await answer.json(content_type=None)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert given["code"] == code
        check_problem(answer, given)


async def test_the_scheme_has_no_case(s: Served) -> None:
    await s.ask("GET", "/shares", headers={"Authorization": f"bearer {API_KEY}"})


@pytest.mark.parametrize(
    "path", ["", "/", "/share", "/shares/", "/shares/x/y", "/shares/x/recipients/a/b", "//shares"]
)
async def test_what_is_not_there(s: Served, path: str) -> None:
    given = await s.ask("GET", path, status=404)
    assert given["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/shares", "GET, POST"),
        ("DELETE", "/shares", "GET, POST"),
        ("POST", "/shares/s1", "DELETE, GET, PATCH"),
        ("GET", "/gateways/enroll", "POST"),
        ("POST", "/events", "GET"),
    ],
)
async def test_methods_that_are_not_there(s: Served, method: str, path: str, allowed: str) -> None:
    async with s.client.request(method, PREFIX + path, headers=KEY) as answer:
        given = await answer.json(content_type=None)
        assert answer.status == 405
        assert answer.headers["Allow"] == allowed
        check_problem(answer, given)


@pytest.mark.parametrize(
    ("data", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "body_invalid"),
        (b"", "application/json", 400, "body_invalid"),
        (b"[]", "application/json", 400, "body_invalid"),
        (b"null", "application/json", 400, "body_invalid"),
        (b'{"site": "\xff"}', "application/json", 400, "body_invalid"),
        (b"site=plant-a", "application/x-www-form-urlencoded", 415, "media_type_unsupported"),
        (b"{}", "text/plain", 415, "media_type_unsupported"),
        (b"[" * 100_000, "application/json", 400, "body_invalid"),
        (b'"' + b"x" * (300 << 10) + b'"', "application/json", 413, "body_too_large"),
    ],
)
async def test_bodies_that_are_none(
    s: Served, data: bytes, content_type: str, status: int, code: str
) -> None:
    async with s.client.post(
        f"{PREFIX}/shares", data=data, headers={**KEY, "Content-Type": content_type}
    ) as answer:
        given = await answer.json(content_type=None)
        assert (answer.status, given["code"]) == (status, code)
        check_problem(answer, given)


async def test_a_body_without_a_length_that_is_too_large(s: Served) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * 8192

    async with s.client.post(
        f"{PREFIX}/shares", data=endless(), headers={**KEY, "Content-Type": "application/json"}
    ) as answer:
        assert (answer.status, (await answer.json(content_type=None))["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"exipres": "7d"}, 'unknown key "exipres"; did you mean "expires"?'),
        ({"max_sessions": "3"}, 'key "max_sessions"'),
        ({"max_sessions": True}, 'key "max_sessions"'),
        ({"sign_in": ["nobody"]}, "no way of signing in named 'nobody'"),
        ({"sign_in": "google"}, 'key "sign_in"'),
        ({"max_sessions": 0}, "max_sessions must be between"),
        ({"to": "alice@example.org"}, 'key "to"'),
        ({"to": []}, "needs a recipient"),
        ({"to": ["alice"]}, "'alice' is not an email address"),
        ({"site": None}, 'key "site"'),
        ({"site": "Plant A"}, "'Plant A' is not the name of a site"),
        ({"expires": "soon"}, "'soon' is not a time"),
        ({"expires": "2020-01-01T00:00:00Z"}, "in the past"),
        ({"expires": 7}, 'key "expires"'),
        ({"scope": ["GET"]}, "must begin with '/'"),
        ({"name": "a\nb"}, "control character"),
        ({"message": "x" * 2001}, "longer than 2000"),
    ],
)
async def test_shares_that_are_refused(s: Served, change: dict[str, Any], detail: str) -> None:
    body = {"site": "plant-a", "service": "dashboards", "to": ["alice@example.org"], **change}
    given = await s.ask("POST", "/shares", body, status=422)
    assert detail in given["detail"]
    assert (await s.ask("GET", "/shares"))["shares"] == []


async def test_a_missing_key_is_named(s: Served) -> None:
    given = await s.ask("POST", "/shares", {"site": "plant-a", "to": ["a@example.org"]}, status=422)
    assert given["detail"] == 'the key "service" is missing'


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=201", "limit=x", "curser=x", "limit=1&limit=2", "include_ended=maybe"]
)
async def test_queries_that_are_refused(s: Served, query: str) -> None:
    await s.ask("GET", f"/shares?{query}", status=422)


async def test_an_unexpected_fault_gives_an_id_and_no_words(
    s: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("inner secret")

    monkeypatch.setattr(s.w.service, "get", broken)
    given = await s.ask("GET", "/shares/s1", status=500)
    assert given["code"] == "internal_error"
    assert "secret" not in json.dumps(given)
    error_id = given["detail"].split("error ")[1].rstrip(")")
    assert error_id in caplog.text


# ── Shares ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_create_and_read(s: Served) -> None:
    given = await s.share(
        to=["Alice@example.org", "bob@example.org"],
        name="Boiler 3, “hall” 🏭",
        path="/d/1",
        scope=["GET /d/**", "/api/**"],
        expires="7d",
        max_sessions=2,
        message="hello",
    )
    links = given.pop("links")
    given.pop("warning", None)
    assert "notice" not in given
    assert set(links) == {"alice@example.org", "bob@example.org"}
    share, recipient = await s.w.service.resolve_link(secret_of(links["bob@example.org"]))
    assert (share.id, recipient.email) == (given["id"], "bob@example.org")
    assert given == {
        "id": share.id,
        "name": "Boiler 3, “hall” 🏭",
        "site": "plant-a",
        "service": "dashboards",
        "path": "/d/1",
        "scope": ["GET /d/**", "* /api/**"],
        "owner": "Olga Owner",
        "message": "hello",
        "created": "2026-08-01T12:00:00.000Z",
        "expires": "2026-08-08T12:00:00.000Z",
        "max_sessions": 2,
        "sign_in": [],
        "state": "active",
        "origin": f"https://{share.id}.share.example.com",
        "recipients": [
            {
                "email": email,
                "delivery": "queued",
                "delivery_detail": "",
                "first_opened": None,
                "last_opened": None,
            }
            for email in ("alice@example.org", "bob@example.org")
        ],
        "live": {"sessions": 2, "streams": 5},
    }
    assert await s.ask("GET", f"/shares/{share.id}") == given
    assert (await s.ask("GET", "/shares")) == {"shares": [given], "next": None}
    assert (await s.ask("HEAD", f"/shares/{share.id}")) is None
    api_models.ShareOut.model_validate(given)


async def test_null_is_as_good_as_absent(s: Served) -> None:
    given = await s.share(name=None, path=None, expires=None, max_sessions=None, message=None, owner=None)
    assert (given["name"], given["path"], given["message"]) == ("dashboards /", "/", "")


async def test_sharing_everything_is_pointed_out(s: Served) -> None:
    given = await s.share(path="/d/1")
    assert "whole service plant-a/dashboards" in given["notice"]


async def test_sharing_what_nobody_offers_is_pointed_out(s: Served) -> None:
    assert (
        "No gateway that is connected offers plant-a/nosuch" in (await s.share(service="nosuch"))["warning"]
    )


async def test_repeating_a_creation(s: Served) -> None:
    body = {"site": "plant-a", "service": "dashboards", "to": ["alice@example.org"], "expires": "7d"}
    key = {**KEY, "Idempotency-Key": "abc"}
    first = await s.ask("POST", "/shares", body, status=201, headers=key)
    s.w.clock.forward(1)
    async with s.client.post(f"{PREFIX}/shares", json=body, headers=key) as answer:
        again = await answer.json()
        assert answer.status == 201
        assert answer.headers["Idempotency-Replayed"] == "true"
    for given in (first, again):
        await s.w.service.resolve_link(secret_of(given.pop("links")["alice@example.org"]))
    assert again == first
    other = await s.ask("POST", "/shares", {**body, "name": "x"}, status=409, headers=key)
    assert other["code"] == "idempotency_key_reused"
    assert len((await s.ask("GET", "/shares"))["shares"]) == 1
    await s.ask("POST", "/shares", body, status=422, headers={**KEY, "Idempotency-Key": "x" * 256})


async def test_pages(s: Served) -> None:
    ids = []
    for number in range(5):
        ids.append((await s.share(name=f"{number}"))["id"])
        s.w.clock.forward(1)
    await s.ask("DELETE", f"/shares/{ids[0]}")
    first = await s.ask("GET", "/shares?limit=2")
    second = await s.ask("GET", "/shares", params={"limit": "2", "cursor": first["next"]})
    assert [x["id"] for x in first["shares"] + second["shares"]] == ids[:0:-1]
    assert second["next"] is None
    everything = await s.ask("GET", "/shares?include_ended=true")
    assert [x["state"] for x in everything["shares"]] == ["active"] * 4 + ["deleted"]
    given = await s.ask("GET", "/shares?cursor=x", status=422)
    assert given["code"] == "cursor_invalid"


async def test_change(s: Served) -> None:
    share_id = (await s.share(expires="7d", max_sessions=3, message="hello"))["id"]
    given = await s.ask("PATCH", f"/shares/{share_id}", {"name": "new", "expires": None})
    assert (given["name"], given["expires"], given["max_sessions"], given["message"]) == (
        "new",
        None,
        3,
        "hello",
    )
    assert given["links"] == {}
    given = await s.ask(
        "PATCH",
        f"/shares/{share_id}",
        {"message": "", "max_sessions": None, "add": ["bob@example.org"], "remove": ["alice@example.org"]},
    )
    assert [r["email"] for r in given["recipients"]] == ["bob@example.org"]
    assert list(given["links"]) == ["bob@example.org"]
    assert set(given["revoked"]) == {"sessions", "streams", "took_ms"}
    for refused in ({"name": None}, {"scope": None}, {"colour": "red"}, {"name": ""}, {"path": "x"}):
        await s.ask("PATCH", f"/shares/{share_id}", refused, status=422)
    await s.ask("PATCH", f"/shares/{share_id}", {"remove": ["carol@example.org"]}, status=404)
    await s.ask("PATCH", "/shares/nothing", {"name": "x"}, status=404)
    unchanged = await s.ask("PATCH", f"/shares/{share_id}", {})
    assert unchanged["name"] == "new"


async def test_delete(s: Served) -> None:
    given = await s.share()
    share_id = given["id"]
    _, cookie = await s.w.sign_in(share_id, "alice@example.org")
    s.w.grants = Revoked(3, 7, 0.0)
    done = await s.ask("DELETE", f"/shares/{share_id}")
    assert done["revoked"].pop("took_ms") > 0
    assert done == {"revoked": {"sessions": 3, "streams": 7}}
    with pytest.raises(ShareEnded):
        await s.w.service.find_session(SessionKind.COOKIE, cookie)
    s.w.grants = Revoked(0, 0, 0.0)
    again = await s.ask("DELETE", f"/shares/{share_id}")
    assert (again["revoked"]["sessions"], again["revoked"]["streams"]) == (0, 0)
    assert (await s.ask("GET", f"/shares/{share_id}"))["state"] == "deleted"
    assert (await s.ask("DELETE", "/shares/nothing", status=404))["code"] == "share_not_found"
    for path in ("resend", "links", "tokens"):
        given = await s.ask("POST", f"/shares/{share_id}/{path}", {"email": "alice@example.org"}, status=410)
        assert given["code"] == "share_ended"


async def test_recipients(s: Served) -> None:
    share_id = (await s.share())["id"]
    odd = "o'brien/a+b=c%41@example.org"
    given = await s.ask("POST", f"/shares/{share_id}/recipients", {"to": [odd, "bob@example.org"]})
    assert list(given["links"]) == [odd.lower(), "bob@example.org"]
    done = await s.ask("DELETE", f"/shares/{share_id}/recipients/bob@example.org")
    assert done["revoked"]["sessions"] == 0
    quoted = odd.replace("%", "%25").replace("/", "%2F").replace("+", "%2B")
    path = URL(f"{PREFIX}/shares/{share_id}/recipients/{quoted}", encoded=True)
    async with s.client.delete(path, headers=KEY) as answer:
        assert answer.status == 200
    assert [r["email"] for r in (await s.ask("GET", f"/shares/{share_id}"))["recipients"]] == [
        "alice@example.org"
    ]
    missing = await s.ask("DELETE", f"/shares/{share_id}/recipients/bob@example.org", status=404)
    assert missing["code"] == "recipient_not_found"
    await s.ask("POST", f"/shares/{share_id}/recipients", {"to": []}, status=422)


async def test_links_and_resending(s: Served) -> None:
    share_id = (await s.share(invite=False))["id"]
    assert await s.w.queued() == []
    made = await s.ask("POST", f"/shares/{share_id}/links", {"email": "alice@example.org"}, status=201)
    sent = await s.ask("POST", f"/shares/{share_id}/resend", {"email": "alice@example.org"})
    for given in (made, sent):
        assert (given["share"], given["email"]) == (share_id, "alice@example.org")
        await s.w.service.resolve_link(secret_of(given["link"]))
    [message] = await s.w.queued()
    assert sent["link"] in message.text
    await s.ask("POST", f"/shares/{share_id}/resend", {"email": "bob@example.org"}, status=404)
    await s.ask("POST", f"/shares/{share_id}/resend", {}, status=422)


async def test_tokens(s: Served) -> None:
    share_id = (await s.share(expires="7d"))["id"]
    given = await s.ask(
        "POST", f"/shares/{share_id}/tokens", {"email": "Alice@example.org", "expires": "1h"}, status=201
    )
    assert given["email"] == "alice@example.org"
    assert given["expires"] == "2026-08-01T13:00:00.000Z"
    found = await s.w.service.find_session(SessionKind.TOKEN, digest(given["token"]))
    assert found is not None
    assert found[0].id == given["session"]
    given = await s.ask(
        "POST", f"/shares/{share_id}/tokens", {"email": "alice@example.org", "expires": None}, status=201
    )
    assert given["expires"] == "2026-08-08T12:00:00.000Z"
    await s.ask("POST", f"/shares/{share_id}/tokens", {"email": "bob@example.org"}, status=404)


# ── Sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_sessions(s: Served) -> None:
    one, two = (await s.share())["id"], (await s.share())["id"]
    first, cookie = await s.w.sign_in(one, "alice@example.org")
    s.w.clock.forward(1)
    second, _ = await s.w.sign_in(two, "alice@example.org")
    given = await s.ask("GET", "/sessions")
    assert [x["id"] for x in given["sessions"]] == [second, first]
    assert given["sessions"][1] == {
        "id": first,
        "share": one,
        "email": "alice@example.org",
        "kind": "cookie",
        "provider": "email-code",
        "created": "2026-08-01T12:00:00.000Z",
        "last_seen": "2026-08-01T12:00:00.000Z",
        "expires": "2026-08-08T12:00:00.000Z",
        "ended": None,
        "client": "203.0.113.7 Mozilla/5.0",
        "streams": 3,
    }
    assert [x["id"] for x in (await s.ask("GET", f"/sessions?share={one}"))["sessions"]] == [first]
    s.w.grants = Revoked(1, 3, 0.0)
    done = await s.ask("DELETE", f"/sessions/{first}")
    assert (done["revoked"]["sessions"], done["revoked"]["streams"]) == (1, 3)
    assert await s.w.service.find_session(SessionKind.COOKIE, cookie) is None
    assert [x["id"] for x in (await s.ask("GET", "/sessions"))["sessions"]] == [second]
    assert len((await s.ask("GET", "/sessions?live=false"))["sessions"]) == 2
    page = await s.ask("GET", "/sessions?live=false&limit=1")
    rest = await s.ask("GET", "/sessions", params={"live": "false", "limit": "1", "cursor": page["next"]})
    assert [x["id"] for x in rest["sessions"]] == [first]
    assert (await s.ask("DELETE", "/sessions/x", status=404))["code"] == "session_not_found"


# ── Gateways ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def enrolled(s: Served, name: str = "g1", key: str = GATEWAY_KEY, site: str = "plant-a") -> Any:
    token = (await s.ask("POST", "/gateways/join-tokens", {"site": site}, status=201))["join_token"]
    return await s.ask(
        "POST", "/gateways/enroll", {"join_token": token, "name": name, "public_key": key}, headers={}
    )


async def test_enrolment(s: Served) -> None:
    made = await s.ask("POST", "/gateways/join-tokens", {"site": "plant-a", "expires": "15m"}, status=201)
    assert made["expires"] == "2026-08-01T12:15:00.000Z"
    body = {"join_token": made["join_token"], "name": "g1", "public_key": GATEWAY_KEY}
    for _ in range(2):  # the second time as if the first answer was lost
        given = await s.ask("POST", "/gateways/enroll", body, headers={})
        assert given == {"site": "plant-a", "name": "g1", "edge": "guestpass"}
    found = await s.w.service.find_gateway("plant-a", "g1")
    assert found is not None
    assert found.public_key == bytes(range(32))
    other = {**body, "name": "g2", "public_key": base64.urlsafe_b64encode(bytes(32)).decode()}
    given = await s.ask("POST", "/gateways/enroll", other, headers={}, status=403)
    assert given["code"] == "join_token_rejected"
    assert made["join_token"] not in json.dumps(given)


@pytest.mark.parametrize(
    "change",
    [
        {"public_key": "?"},
        {"public_key": "AAAA"},
        {"public_key": "é"},
        {"name": "G 1"},
        {"extra": 1},
        {"name": None},
    ],
)
async def test_enrolments_that_are_refused(s: Served, change: dict[str, Any]) -> None:
    token = await s.w.service.create_join_token("plant-a")
    body = {"join_token": token, "name": "g1", "public_key": GATEWAY_KEY, **change}
    await s.ask("POST", "/gateways/enroll", body, headers={}, status=422)
    assert await s.w.service.list_gateways() == []


async def test_a_fault_of_the_store_is_not_told_to_strangers(s: Served) -> None:
    await s.w.store.close()
    given = await s.ask("GET", "/shares", status=503)
    assert given["code"] == "store_unavailable"
    body = {"join_token": "x", "name": "g1", "public_key": GATEWAY_KEY}
    given = await s.ask("POST", "/gateways/enroll", body, headers={}, status=500)
    assert str(s.w.store.path) not in json.dumps(given)


@pytest.mark.parametrize("expires", ["2h", "0s", "soon", "2020-01-01T00:00:00Z"])
async def test_join_tokens_that_are_refused(s: Served, expires: str) -> None:
    await s.ask("POST", "/gateways/join-tokens", {"site": "plant-a", "expires": expires}, status=422)


async def test_gateways(s: Served) -> None:
    await enrolled(s)
    away = await s.ask("GET", "/gateways")
    assert away == {
        "gateways": [
            {
                "site": "plant-a",
                "name": "g1",
                "state": "not_connected",
                "connected": False,
                "enrolled": "2026-08-01T12:00:00.000Z",
                "last_seen": None,
                "connected_since": None,
                "tunnels": 0,
                "streams": 0,
                "rtt": None,
                "services": {},
            }
        ],
        "next": None,
    }
    s.tunnels.connected = [Status("plant-a", "g1"), Status("plant-b", "g1")]
    [given] = (await s.ask("GET", "/gateways"))["gateways"]
    assert (given["state"], given["connected"], given["tunnels"], given["streams"]) == (
        "connected",
        True,
        2,
        4,
    )
    assert given["last_seen"] == "2026-08-01T12:00:00.000Z"
    assert given["services"] == {"dashboards": True}
    s.tunnels.connected = [Status("plant-a", "g1", services={"dashboards": True, "wiki": False})]
    [given] = (await s.ask("GET", "/gateways"))["gateways"]
    assert (given["state"], given["connected"]) == ("service_down", True)


async def test_removing_a_gateway(s: Served) -> None:
    await enrolled(s)
    s.w.grants = Revoked(2, 6, 0.0)
    done = await s.ask("DELETE", "/gateways/plant-a/g1")
    assert (done["revoked"]["sessions"], done["revoked"]["streams"]) == (2, 6)
    assert s.w.revocations[-1].gateway == ("plant-a", "g1")
    assert (await s.ask("GET", "/gateways"))["gateways"] == []
    assert (await s.ask("DELETE", "/gateways/plant-a/g1", status=404))["code"] == "gateway_not_found"


# ── Audit ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def record(s: Served, count: int) -> None:
    for number in range(count):
        await s.w.service.record(
            Event(
                "share.opened",
                s.w.clock.at + number,
                "alice@example.org",
                f"s{number % 2}",
                None,
                {"n": number},
            )
        )


async def test_audit(s: Served) -> None:
    await record(s, 5)
    given = await s.ask("GET", "/audit?share=s1&limit=1")
    [event] = given["events"]
    assert event == {
        "id": 4,
        "type": "share.opened",
        "at": "2026-08-01T12:00:03.000Z",
        "actor": "alice@example.org",
        "share": "s1",
        "session": None,
        "detail": {"n": 3},
    }
    rest = await s.ask("GET", "/audit", params={"share": "s1", "cursor": given["next"]})
    assert [e["detail"]["n"] for e in rest["events"]] == [1]
    assert rest["next"] is None
    for query, numbers in (
        ("since=2026-08-01T12:00:03Z", [4, 3]),
        ("until=2026-08-01T12:00:01Z", [0]),
        ("actor=bob@example.org", []),
        ("type=share.opened&limit=2", [4, 3]),
    ):
        assert [e["detail"]["n"] for e in (await s.ask("GET", f"/audit?{query}"))["events"]] == numbers
    s.w.clock.forward(10)
    assert [e["detail"]["n"] for e in (await s.ask("GET", "/audit?since=7s"))["events"]] == [4, 3]
    for query in ("format=xml", "limit=0", "format=csv&limit=3", "format=jsonl&cursor=x", "since=yesterday"):
        await s.ask("GET", f"/audit?{query}", status=422)


async def test_export(s: Served) -> None:
    await record(s, 450)  # several pages
    await s.w.service.record(Event("=1+1", 1.0, '=cmd|"/C calc"!A0', "@s", None, {"x": 'a,\n"b" “ü”'}))
    async with s.client.get(f"{PREFIX}/audit?format=csv", headers=KEY) as answer:
        assert answer.content_type == "text/csv"
        assert "attachment" in answer.headers["Content-Disposition"]
        text = await answer.text()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == 451
    assert rows[0]["type"] == "'=1+1"
    assert rows[0]["actor"] == '\'=cmd|"/C calc"!A0'
    assert rows[0]["share"] == "'@s"
    assert json.loads(rows[0]["detail"]) == {"x": 'a,\n"b" “ü”'}
    assert not any(cell[:1] in "=+-@\t\r\n" and cell for row in rows for cell in row.values())
    async with s.client.get(f"{PREFIX}/audit?format=jsonl&share=s1", headers=KEY) as answer:
        assert answer.content_type == "application/jsonl"
        lines = [json.loads(line) for line in (await answer.text()).splitlines()]
    assert len(lines) == 225
    assert lines[0]["detail"] == {"n": 449}
    assert lines[-1]["detail"] == {"n": 1}


async def test_an_export_that_breaks_off_does_not_look_whole(
    s: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    await record(s, 250)
    real, calls = s.w.service.audit, 0

    async def breaks(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("boom")
        return await real(*args)

    monkeypatch.setattr(s.w.service, "audit", breaks)
    with pytest.raises(ClientError):
        async with s.client.get(f"{PREFIX}/audit?format=csv", headers=KEY) as answer:
            await answer.read()


# ── Events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def next_event(answer: ClientResponse) -> tuple[str, Any]:
    kind = ""
    async with asyncio.timeout(5):
        async for raw in answer.content:
            line = raw.decode().rstrip("\n")
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                return kind, json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended")


async def test_events_as_they_happen(s: Served) -> None:
    async with s.client.get(f"{PREFIX}/events", headers=KEY) as answer:
        assert answer.content_type == "text/event-stream"
        assert answer.headers["Cache-Control"] == "no-store"
        assert await answer.content.readline() == b": listening\n"
        created = await s.share()
        kind, data = await next_event(answer)
        assert (kind, data["share"]) == ("share.created", created["id"])
        assert "links" not in json.dumps(data)
        assert (await next_event(answer))[0] == "recipient.added"
        s.w.events.close()
        assert (await answer.content.read()).strip() == b""


async def test_filtered_events_and_a_heartbeat(s: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guestpass.edge.api.HEARTBEAT_SECONDS", 0.01)
    async with s.client.get(f"{PREFIX}/events?share=s2&type=b", headers=KEY) as answer:
        await answer.content.readline()
        for share, type_ in (("s1", "a"), ("s1", "b"), ("s2", "a"), ("s2", "b")):
            s.w.events.emit(Event(type_, 0.0, share_id=share))
        kind, data = await next_event(answer)
        assert (kind, data["share"]) == ("b", "s2")
        await answer.content.readline()
        assert await answer.content.readline() == b": still here\n"


async def test_a_slow_listener_is_told_what_it_lost(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        s.w.events._queue_events = 3
        async with s.client.get(f"{PREFIX}/events", headers=KEY) as answer:
            await answer.content.readline()
            for number in range(8):  # in one go: the handler gets no turn
                s.w.events.emit(Event("x", float(number)))
            assert await next_event(answer) == ("lost", {"count": 5})
            assert (await next_event(answer))[1]["at"].startswith("1970-01-01T00:00:05")


async def test_listeners_are_counted(s: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guestpass.edge.api.MAX_LISTENERS", 1)
    async with s.client.get(f"{PREFIX}/events", headers=KEY) as answer:
        await answer.content.readline()
        given = await s.ask("GET", "/events", status=503)
        assert given["code"] == "too_many_listeners"
    async with asyncio.timeout(5):
        while s.w.events.subscribers:  # who hangs up is noticed at the next event
            s.w.events.emit(Event("x", 0.0))
            await asyncio.sleep(0.01)
    async with s.client.get(f"{PREFIX}/events", headers=KEY) as answer:
        assert answer.status == 200


# ── Secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_nothing_secret_is_logged_or_told_to_observers(
    s: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    created = await s.share(path="/d/canary-path?q=canary-query")
    token = await s.ask("POST", f"/shares/{created['id']}/tokens", {"email": "alice@example.org"}, status=201)
    join = await s.ask("POST", "/gateways/join-tokens", {"site": "plant-a"}, status=201)
    link = created["links"]["alice@example.org"]
    await s.w.service.delete(created["id"])
    with pytest.raises(ShareEnded):
        await s.w.service.resolve_link(secret_of(link))
    said = caplog.text + repr(s.w.happened)
    for secret in (link, secret_of(link), token["token"], join["join_token"], API_KEY, "canary"):
        assert secret not in said
    assert hashlib.sha256(API_KEY.encode()).hexdigest() not in said


async def test_the_service_under_the_api_is_the_same(s: Served) -> None:
    made = await s.w.service.create(new())
    assert (await s.ask("GET", f"/shares/{made.share.id}"))["id"] == made.share.id
