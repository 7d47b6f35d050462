"""What the edge does with requests before anybody looks at who asks, and with its certificate."""

from __future__ import annotations

import asyncio
import io
import logging
import shutil
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from support.stack import Stack, running

from guestpass.daemon import set_up_logging
from guestpass.edge import browser
from guestpass.local_ca import write_certificates


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async def read(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", read)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        async with running(tmp_path, f"http://{host}:{port}") as found:
            yield found
    finally:
        await runner.cleanup()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The log as `guestpass edge --log-level debug` writes it."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr("sys.stderr", stream)
    set_up_logging("debug")
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /CANARY b HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nCookie: __Host-guestpass=CANARY\x01\r\n\r\n",
        b"CANARY\x00 / HTTP/1.1\r\n\r\n",
        b"GET /?" + b"CANARY" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["path", "cookie", "method", "query"],
)
async def test_what_is_malformed_does_not_stand_in_the_log(
    stack: Stack, log: io.StringIO, request_: bytes
) -> None:
    status = b" 414 " if b"CANARYCANARY" in request_ else b" 400 "
    assert status in await stack.raw(request_)
    assert "CANARY" not in log.getvalue()


async def test_a_malformed_upload_does_not_stand_in_the_log(stack: Stack, log: io.StringIO) -> None:
    chunks = b"5\r\nhelloCANARY\r\n0\r\n\r\n"
    own = f"POST /console/sign-in HTTP/1.1\r\nHost: localhost:{stack.port}\r\nOrigin: http://localhost:{stack.port}\r\n"
    form = "Content-Type: application/x-www-form-urlencoded\r\nTransfer-Encoding: chunked\r\n\r\n"
    head = stack.head("POST", "/", "Transfer-Encoding: chunked")
    for request in (head + chunks, (own + form).encode() + chunks):
        for part in (request, request.replace(b"5\r\n", b"5\r\nhello\r\n5\r\n", 1)):
            assert b" 400 " in await stack.raw(part)
    assert "CANARY" not in log.getvalue()


async def test_an_encoded_reserved_path_is_nothing_on_the_main_origin(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    main = {"Host": f"localhost:{stack.port}"}
    for path in (
        "/.guestpass/start",
        "/%2eguestpass/start",
        "/%2Eguestpass/finish?code=x",
        "/.guest%70ass/sign-out",
    ):
        async with stack.session.get(stack.url(path), headers=main) as answer:
            assert answer.status == 404, path
    assert "unexpected" not in caplog.text


async def test_half_a_form_is_not_waited_for(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "BODY_SECONDS", 0.2)
    main = f"Host: localhost:{stack.port}\r\nOrigin: http://localhost:{stack.port}\r\nContent-Length: 100\r\n"
    form = (
        f"POST /console/sign-in HTTP/1.1\r\n{main}Content-Type: application/x-www-form-urlencoded\r\n\r\nkey="
    )
    json = f"POST /api/v1/gateways/enroll HTTP/1.1\r\n{main}Content-Type: application/json\r\n\r\n{{"
    for request in (form, json):
        assert b" 408 " in await stack.raw(request.encode())  # and then the connection is closed


async def test_other_versions_of_http_are_not_spoken(stack: Stack) -> None:
    answer = await stack.raw(stack.head("GET", "/").replace(b"HTTP/1.1", b"HTTP/2.0"))
    assert answer.split(b" ", 2)[1] == b"505"


async def test_nobody_is_told_what_this_runs_on(stack: Stack) -> None:
    for host in (f"localhost:{stack.port}", stack.host, "stranger.example"):
        async with stack.session.get(stack.url("/api/v1/nothing"), headers={"Host": host}) as answer:
            assert answer.headers["Server"] == "Guestpass"
    assert b"\r\nServer: Guestpass\r\n" in await stack.raw(b"GET / HTTP/1.1\r\n\r\n")


async def test_a_reload_says_what_it_did_not_take(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    file = stack.edge.config.file
    file.write_text('[edge]\nowner = "Somebody else"\n')
    await stack.edge.reload()
    said = next(r.getMessage() for r in caplog.records if "a restart is needed" in r.getMessage())
    assert "edge.owner" in said


async def test_a_reload_of_a_certificate_that_does_not_fit_changes_nothing(
    stack: Stack, tmp_path: Path
) -> None:
    """Half of a renewal, the new certificate with the old key, is on disk when SIGHUP comes."""
    edge = stack.edge.config.edge
    assert edge.tls is not None
    cert, key = stack.edge.config.resolve(edge.tls.cert), stack.edge.config.resolve(edge.tls.key)
    file = stack.edge.config.file
    file.write_text(
        f'[edge]\nlisten = ["http://127.0.0.1:1", "https://127.0.0.1:1"]\ntls = {{ cert = "{cert}", key = "{key}" }}\n'
    )
    other = tmp_path / "other"
    other.mkdir()
    _, other_cert, other_key = write_certificates(other, ("localhost",))
    tunnel = urlsplit(stack.tunnel_url)

    def served() -> str:
        return ssl.get_server_certificate(("127.0.0.1", tunnel.port or 0))

    before = await asyncio.to_thread(served)
    shutil.copy(other_cert, cert)
    await stack.edge.reload()
    assert await asyncio.to_thread(served) == before
    shutil.copy(other_key, key)
    await stack.edge.reload()
    assert await asyncio.to_thread(served) == other_cert.read_text()
