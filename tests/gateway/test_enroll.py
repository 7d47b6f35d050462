"""Enrolment against an edge's API over TLS."""

from __future__ import annotations

import asyncio
import base64
import ssl
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from guestpass.errors import (
    ConfigError,
    Conflict,
    EdgeUnreachable,
    GuestpassError,
    Invalid,
    JoinTokenRejected,
)
from guestpass.gateway.enroll import enroll, load_key, load_or_create_key
from guestpass.local_ca import write_certificates


@dataclass
class Api:
    url: str = ""
    ca: Path = Path()
    requests: list[Any] = field(default_factory=list)
    answer: Callable[[], web.Response] = field(
        default=lambda: web.json_response({"site": "plant", "name": "gw", "edge": "the edge"}, status=201)
    )

    async def enroll(self, request: web.Request) -> web.Response:
        self.requests.append(await request.json())
        return self.answer()


@pytest_asyncio.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    made = Api()
    folder = tmp_path / "edge"
    folder.mkdir()
    made.ca, cert, key = write_certificates(folder, ("localhost",))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    app = web.Application()
    app.router.add_post("/api/v1/gateways/enroll", made.enroll)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    made.url = f"https://localhost:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


def problem(status: int, code: str) -> web.Response:
    body = {
        "type": "about:blank",
        "title": "no",
        "status": status,
        "detail": "so it is",
        "code": code,
        "hint": "do",
    }
    return web.json_response(body, status=status, content_type="application/problem+json")


async def test_enrol(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "gateway.key"
    result = await enroll(api.url, "gpj_x", "gw", path, ca=api.ca)
    assert (result.site, result.edge_name) == ("plant", "the edge")
    (request,) = api.requests
    assert request.keys() == {"join_token", "name", "public_key"}
    public = load_key(path).public_key().public_bytes_raw()
    assert base64.urlsafe_b64decode(request["public_key"] + "=") == public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["gateway.key"]


async def test_enrol_again_with_the_same_key(api: Api, tmp_path: Path) -> None:
    """The first answer may have been lost."""
    path = tmp_path / "gateway.key"
    api.answer = lambda: web.Response(status=502)
    with pytest.raises(EdgeUnreachable):
        await enroll(api.url, "gpj_x", "gw", path, ca=api.ca)
    key = path.read_bytes()
    api.answer = Api().answer
    await enroll(api.url, "gpj_x", "gw", path, ca=api.ca)
    assert path.read_bytes() == key
    assert api.requests[0] == api.requests[1]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "join_token_rejected", JoinTokenRejected),
        (409, "name_taken", Conflict),
        (422, "invalid", Invalid),
        (503, "store_unavailable", EdgeUnreachable),
    ],
)
async def test_refusals(api: Api, tmp_path: Path, status: int, code: str, kind: type[GuestpassError]) -> None:
    api.answer = lambda: problem(status, code)
    with pytest.raises(kind) as caught:
        await enroll(api.url, "gpj_x", "gw", tmp_path / "k", ca=api.ca)
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint, caught.value.error_code) == ("so it is", "do", code)


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(text="hello"),
        lambda: web.json_response({"site": "plant"}),
        lambda: web.json_response([1]),
        lambda: web.json_response({"site": 1, "edge": "x"}),
        lambda: web.Response(status=404, text="not here"),
        lambda: web.Response(body=b"x" * 200_000),
    ],
)
async def test_answers_of_something_else(
    api: Api, tmp_path: Path, answer: Callable[[], web.Response]
) -> None:
    api.answer = answer
    with pytest.raises(EdgeUnreachable) as caught:
        await enroll(api.url, "gpj_x", "gw", tmp_path / "k", ca=api.ca)
    assert caught.value.error_code == "not_an_edge"


async def test_something_that_is_not_http(tmp_path: Path) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await reader.read(100)
        writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    with pytest.raises(EdgeUnreachable):
        await enroll(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "gpj_x", "gw", tmp_path / "k")
    server.close()


async def test_edge_that_is_not_trusted(api: Api, tmp_path: Path) -> None:
    with pytest.raises(EdgeUnreachable) as caught:
        await enroll(api.url, "gpj_x", "gw", tmp_path / "k")
    assert caught.value.error_code == "certificate_untrusted"
    assert api.requests == []


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_key_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "k"
    first = load_or_create_key(path).private_bytes_raw()
    assert load_or_create_key(path).private_bytes_raw() == first
    assert load_key(path).private_bytes_raw() == first


def test_another_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "k"
    key = ec.generate_private_key(ec.SECP256R1())
    for content in (b"", b"precious", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_or_create_key(path)
        assert str(path) in str(caught.value)
        assert path.read_bytes() == content


def test_key_that_is_not_there_or_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_key(tmp_path / "none")
    assert "enroll" in caught.value.hint
    with pytest.raises(ConfigError):
        load_or_create_key(tmp_path / "no-folder" / "k")
