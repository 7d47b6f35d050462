"""The gateway against an application of bytes: what is sent, what is taken, what is refused."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from support.tunnel import until
from support.upstream import App, Rig, answer, replies, serving

from guestpass.gateway.upstream import Limits
from guestpass.loop import abort_now
from guestpass.mux.stream import StreamReset, TunnelStream
from guestpass_speedups.session import ErrorCode

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def code_of(rig: Rig, head: str | bytes, **more: object) -> ErrorCode:
    with pytest.raises(StreamReset) as caught:
        await rig.ask(head, **more)
    return ErrorCode(caught.value.code)


async def test_head_is_rewritten_and_its_order_and_case_kept(rig: Rig) -> None:
    async with serving(replies(OK)) as app:
        seen: list[bytes] = []

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(OK)
            await reader.read()

        app.talk = talk
        rig.use(dash=app.url)
        found = await rig.ask(
            "GET /a%2Fb?x=1&y=%00 HTTP/1.1\r\nHost: s1.share.example\r\nX-First: 1\r\n"
            "ORIGIN: https://s1.share.example\r\n"
            "Referer: https://s1.share.example/page?q\r\nAccept: a\r\nAccept: b\r\n"
            "Connection: X-Private\r\nX-Private: 1\r\nTE: trailers\r\n"
            "X-Forwarded-Proto: https\r\nX-Forwarded-Host: s1.share.example"
        )
        assert found.body == b"ok"
        host = app.url.removeprefix("http://").encode()
        lines = seen[0].split(b"\r\n")
        assert lines == [
            b"GET /a%2Fb?x=1&y=%00 HTTP/1.1",
            b"Host: " + host,
            b"X-First: 1",
            b"ORIGIN: http://" + host,
            b"Referer: http://" + host + b"/page?q",
            b"Accept: a",
            b"Accept: b",
            b"X-Forwarded-Proto: https",
            b"X-Forwarded-Host: s1.share.example",
            b"",
            b"",
        ]


@pytest.mark.parametrize(
    ("setting", "host", "origin"),
    [
        ("public", b"s1.share.example", b"https://s1.share.example"),
        ("app.internal", b"app.internal", b"http://app.internal"),
    ],
)
async def test_host_header_settings(rig: Rig, setting: str, host: bytes, origin: bytes) -> None:
    seen: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(OK)

    async with serving(talk) as app:
        rig.use(dash={"url": app.url, "host_header": setting})
        forwarded = "X-Forwarded-Proto: https\r\nX-Forwarded-Host: s1.share.example"
        await rig.ask(
            f"GET / HTTP/1.1\r\nHost: s1.share.example\r\nOrigin: https://s1.share.example\r\n{forwarded}"
        )
        await rig.ask(
            f"GET / HTTP/1.1\r\nHost: s1.share.example\r\nOrigin: https://evil.example\r\n{forwarded}"
        )
    assert b"\r\nHost: " + host + b"\r\n" in seen[0]
    assert b"\r\nOrigin: " + origin + b"\r\n" in seen[0]
    assert b"\r\nOrigin: https://evil.example\r\n" in seen[1], "another site's origin stays what it is"


async def test_location_of_the_service_becomes_the_share(rig: Rig) -> None:
    locations = ["/plain", "URL/login?x", "URL.evil.example/", "https://elsewhere.example/"]
    async with serving(replies()) as app:

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for location in locations:
                await reader.readuntil(b"\r\n\r\n")
                target = location.replace("URL", app.url)
                writer.write(
                    f"HTTP/1.1 302 Found\r\nlocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()
                )
            await reader.read()

        app.talk = talk
        rig.use(dash=app.url)
        found = []
        for _ in locations:
            got = await rig.ask(
                "GET / HTTP/1.1\r\nHost: s\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: s.share.example"
            )
            found.append(dict(got.fields())[b"location"].decode())
        evil = app.url + ".evil.example/"
        assert found == ["/plain", "https://s.share.example/login?x", evil, "https://elsewhere.example/"]


async def test_connections_are_used_again(rig: Rig) -> None:
    async with serving(replies(OK, OK, OK)) as app:
        rig.use(dash=app.url)
        for method in ("GET", "POST", "HEAD"):
            if method == "HEAD":  # its answer has no body, whatever its length says
                app.talk = replies()
                break
            assert (await rig.ask(f"{method} / HTTP/1.1")).body == b"ok"
        assert app.connections == 1


@pytest.mark.parametrize(
    ("request_line", "reply"),
    [
        ("HEAD / HTTP/1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
        ("GET / HTTP/1.1", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET / HTTP/1.1", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n"),
        ("GET / HTTP/1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ],
)
async def test_responses_without_a_body(rig: Rig, request_line: str, reply: bytes) -> None:
    async with serving(replies(reply, reply)) as app:
        rig.use(dash=app.url)
        for _ in range(2):
            stream = rig.open(request_line)
            head = await stream.head()
            assert head.fin
            assert head.data.replace(b": ", b":") == reply.replace(b": ", b":")
            assert await stream.read() == b""
            await stream.wait_closed()
        assert app.connections == 1


async def test_chunked_with_trailers_and_extensions(rig: Rig) -> None:
    reply = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Digest\r\n\r\n"
        b"5;ext=1\r\nhello\r\n1\r\n \r\n5\r\nworld\r\n0\r\nDigest: abc\r\n\r\n"
    )
    async with serving(replies(reply, reply)) as app:
        rig.use(dash=app.url)
        for _ in range(2):
            found = await rig.ask("GET / HTTP/1.1")
            assert found.body == b"hello world"
            assert found.trailers == b"Digest: abc\r\n\r\n"
            assert found.fields() == [(b"Trailer", b"Digest")]
        assert app.connections == 1


async def test_interim_responses_go_through(rig: Rig) -> None:
    async with serving(replies(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" * 2 + OK)) as app:
        rig.use(dash=app.url)
        found = await rig.ask("GET / HTTP/1.1")
        assert found.interim == [b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"] * 2
        assert found.body == b"ok"


async def test_body_up_to_the_end_of_the_connection(rig: Rig) -> None:
    async with serving(replies(b"HTTP/1.0 200 OK\r\n\r\nuntil the end", close=True)) as app:
        rig.use(dash=app.url)
        assert (await rig.ask("GET / HTTP/1.1")).body == b"until the end"
        await rig.ask("GET / HTTP/1.1")
        assert app.connections == 2


async def test_surplus_bytes_are_nobodys_response(rig: Rig) -> None:
    """Response queue poisoning: what comes after the end must not answer the next visitor."""
    poison = OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
    async with serving(replies(poison)) as app:
        rig.use(dash=app.url)
        for _ in range(3):
            assert (await rig.ask("GET / HTTP/1.1")).body == b"ok"
        assert app.connections == 3


async def test_bytes_while_idle_close_the_connection(rig: Rig) -> None:
    release = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await writer.drain()
        await release.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
        await reader.read()

    async with serving(talk) as app:
        rig.use(dash=app.url)
        assert (await rig.ask("GET / HTTP/1.1")).body == b"ok"
        release.set()
        await until(lambda: app.open == 0, "the gateway closed the connection")
        assert (await rig.ask("GET / HTTP/1.1")).body == b"ok"


@pytest.mark.parametrize(
    "reply",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nBad Name: 1\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 200 + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 40,
        b"",
        b"HTTP/1.1 200",
    ],
)
async def test_malformed_answers(rig: Rig, reply: bytes) -> None:
    async with serving(replies(reply, close=True)) as app:
        rig.use(dash=app.url)
        assert await code_of(rig, "GET / HTTP/1.1") == ErrorCode.BAD_UPSTREAM


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloXX",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_connection_closed_inside_the_body(rig: Rig, reply: bytes) -> None:
    async with serving(replies(reply, close=True)) as app:
        rig.use(dash=app.url)
        assert await code_of(rig, "GET / HTTP/1.1") == ErrorCode.BAD_UPSTREAM


async def test_refused_by_this_sides_rules(rig: Rig) -> None:
    async with serving(replies(OK)) as app:
        rig.use(
            dash={"url": app.url, "paths": ("/public/**", "/x"), "methods": ("GET",)}, whole={"url": app.url}
        )
        for line in (
            "POST /x HTTP/1.1",
            "GET /private HTTP/1.1",
            "GET /public/../private HTTP/1.1",
            "GET /public/%2e%2e/private HTTP/1.1",
            "GET /public//x HTTP/1.1",
            "GET /public/a;b HTTP/1.1",
            "CONNECT /x HTTP/1.1",
            "TRACE /x HTTP/1.1",
            "GET http://other/x HTTP/1.1",
            "GET /x HTTP/1.0",
            "GET /x HTTP/1.1\r\nHost: a\r\nHost: b",
            "GET /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked",
            "GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1",
            "GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: +1",
            "GET /x HTTP/1.1\r\nHost: a\r\nX : 1",
            "GET /x HTTP/1.1\r\nHost: a\r\nX: 1\n2",
            "GET /x HTTP/1.1\r\nHost: a\r\n folded: 1",
            "GET /x HTTP/1.1\r\nX: 1",
            "GET /x HTTP/1.1\r\nHost: a\r\n\r\nGET /private HTTP/1.1\r\nHost: a",
        ):
            assert await code_of(rig, line) == ErrorCode.REFUSED, line
        assert await code_of(rig, "GET /x HTTP/1.1", service="unknown") == ErrorCode.REFUSED
        assert app.connections == 0
        assert (await rig.ask("GET /public/a/b?c=%2e%2e HTTP/1.1")).status == 200
        assert (await rig.ask("GET /a/..%2f;x//y HTTP/1.1", service="whole")).status == 200


async def test_service_down(rig: Rig) -> None:
    async with serving(replies(OK)) as app:
        url = app.url
    rig.use(dash=url)
    assert await code_of(rig, "GET / HTTP/1.1") == ErrorCode.UNREACHABLE
    assert rig.changes == [
        {"dash": {"healthy": False, "detail": "Connection refused", "url_scheme": "http"}}
    ] or (rig.changes[-1]["dash"]["healthy"] is False)


async def test_no_answer_in_time(rig: Rig) -> None:
    async with serving(replies()) as app:
        rig.use(Limits(response=0.1), dash=app.url)
        app.talk = lambda reader, writer: reader.read()  # type: ignore[assignment,return-value]
        assert await code_of(rig, "GET / HTTP/1.1") == ErrorCode.TIMEOUT


# ── request bodies ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_body_with_a_length(rig: Rig) -> None:
    seen: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            seen.append(await reader.readexactly(10))
            writer.write(OK)

    async with serving(talk) as app:
        rig.use(dash=app.url)
        head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10"
        assert (await rig.ask(head, body=b"0123456789")).body == b"ok"
        stream = rig.open(head, fin=False, body=b"01234")
        await stream.write(b"5678")
        stream.finish(b"9")
        assert (await answer(stream)).body == b"ok"
        assert seen[1] == seen[3] == b"0123456789"
        assert b"\r\nContent-Length: 10\r\n" in seen[0]
        assert app.connections == 1


async def test_body_without_a_length_is_chunked_with_trailers(rig: Rig) -> None:
    seen: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"0\r\nX-Sum: 1\r\n\r\n"))
        writer.write(OK)
        await reader.read()

    async with serving(talk) as app:
        rig.use(dash=app.url)
        stream = rig.open("POST / HTTP/1.1", fin=False)
        await stream.write(b"hello")
        stream.send_trailers(b"X-Sum: 1\r\n\r\n")
        assert (await answer(stream)).body == b"ok"
        head, _, body = seen[0].partition(b"\r\n\r\n")
        assert head.endswith(b"\r\nTransfer-Encoding: chunked")
        assert body == b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "body", "trailers"),
    [
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10", b"short", None),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2", b"too long", None),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2", b"", None),
        ("POST / HTTP/1.1", b"x", b"bad trailer\r\n\r\n"),
        ("POST / HTTP/1.1", b"x", b"Content-Length: 1\r\n\r\n"),
        ("POST / HTTP/1.1", b"x", b"A: 1\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
    ],
)
async def test_bodies_that_do_not_fit(rig: Rig, head: str, body: bytes, trailers: bytes | None) -> None:
    requests: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.read())

    async with serving(talk) as app:
        rig.use(dash=app.url)
        if trailers is None:
            assert await code_of(rig, head, body=body) == ErrorCode.PROTOCOL_ERROR
        else:
            stream = rig.open(head, fin=False, body=body)
            stream.send_trailers(trailers)
            with pytest.raises(StreamReset) as caught:
                await answer(stream)
            assert caught.value.code == ErrorCode.PROTOCOL_ERROR
        await until(lambda: app.open == 0, "the connection is closed")
        assert all(b"too long" not in request for request in requests)


async def test_early_response_stops_the_body(rig: Rig) -> None:
    got = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await writer.drain()
        while data := await reader.read(65536):
            got += len(data)

    async with serving(talk) as app:
        rig.use(dash=app.url)
        stream = rig.open("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000", fin=False)

        async def push() -> None:
            with contextlib.suppress(StreamReset):
                for _ in range(1000):
                    await stream.write(b"x" * 65536)

        pushing = asyncio.create_task(push())
        found = await answer(stream)
        assert (found.status, found.body) == (413, b"big")
        await until(lambda: app.open == 0, "the connection is closed")
        stream.reset(ErrorCode.CANCEL)
        await pushing
        assert got < 64 << 20
        assert (await rig.ask("GET / HTTP/1.1")).status == 413
        assert app.connections == 2


async def test_early_response_and_a_reset(rig: Rig) -> None:
    """Many servers answer 413 and hang up with the body unread, which resets the connection: the answer must be read
    before the next write fails. It is a race in the kernel, so not every one can be won."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)  # the body piles up in the kernel

    async with serving(talk) as app:
        rig.use(dash=app.url)
        won = 0
        for _ in range(20):
            stream = rig.open("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000", fin=False)

            async def push(stream: TunnelStream = stream) -> None:
                with contextlib.suppress(StreamReset):
                    for _ in range(200):
                        await stream.write(b"x" * 65536)

            pushing = asyncio.create_task(push())
            with contextlib.suppress(StreamReset):
                won += (await answer(stream)).status == 413
            stream.reset(ErrorCode.CANCEL)
            await pushing
        assert won >= 17


async def test_response_while_the_request_is_being_sent(rig: Rig) -> None:
    """A service may answer while it reads; it gets the rest of the request all the same."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while (line := await reader.readline()) != b"0\r\n":
            data = await reader.readexactly(int(line, 16) + 2)
            writer.write(line + data)
        await reader.readline()
        writer.write(b"0\r\n\r\n")
        await reader.read()

    async with serving(talk) as app:
        rig.use(dash=app.url)
        stream = rig.open("POST / HTTP/1.1", fin=False)
        for word in (b"one", b"two", b"three"):
            await stream.write(word)
            if word == b"one":
                assert (await stream.head()).data.startswith(b"HTTP/1.1 200")
            received = await stream.read()
            assert received == word
        stream.finish()
        assert await stream.read() == b""
        await stream.wait_closed()


# ── stale connections ─────────────────────────────────────────────────────────────────────────────────────────────


class Stale:
    """Answers the first request of a connection; at the second one it closes without a word."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK)
        await writer.drain()
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))


async def test_stale_connection_is_replaced_for_idempotent_requests(rig: Rig) -> None:
    talk = Stale()
    async with serving(talk) as app:
        rig.use(dash=app.url)
        for _ in range(2):
            assert (await rig.ask("GET / HTTP/1.1")).body == b"ok"
        assert app.connections == 2
        assert len(talk.requests) == 3


async def test_unsafe_request_is_never_sent_twice(rig: Rig) -> None:
    talk = Stale()
    async with serving(talk) as app:
        rig.use(dash=app.url)
        assert (await rig.ask("GET / HTTP/1.1")).body == b"ok"
        assert await code_of(rig, "POST / HTTP/1.1") == ErrorCode.BAD_UPSTREAM
        assert [request.split(b" ")[0] for request in talk.requests] == [b"GET", b"POST"]


async def test_unsafe_request_takes_a_new_connection_after_a_pause(rig: Rig) -> None:
    talk = Stale()
    async with serving(talk) as app:
        rig.use(Limits(unsafe_idle=0.0), dash=app.url)
        assert (await rig.ask("GET / HTTP/1.1")).body == b"ok"
        assert (await rig.ask("POST / HTTP/1.1")).body == b"ok"
        assert app.connections == 2


async def test_idle_connections_are_closed(rig: Rig) -> None:
    async with serving(replies(OK)) as app:
        upstream = rig.use(Limits(idle=0.0), dash=app.url)
        await rig.ask("GET / HTTP/1.1")
        assert app.open == 1
        await upstream.health.start(5)
        await until(lambda: app.open == 0, "the idle connection is closed")


# ── cancellation, memory ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("begun", [False, True])
async def test_reset_closes_the_connection_to_the_service(rig: Rig, begun: bool) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if begun:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx")
        await reader.read()

    async with serving(talk) as app:
        upstream = rig.use(dash=app.url)
        stream = rig.open("GET / HTTP/1.1")
        if begun:
            await stream.head()
        await until(lambda: app.open == 1, "the request at the service")
        stream.reset(ErrorCode.REVOKED)
        await until(lambda: app.open == 0, "the connection is closed")
        await asyncio.wait_for(stream.wait_closed(), 5)
        await until(lambda: upstream.streams == 0, "no stream is left")


async def test_download_with_a_slow_reader_stays_bounded(rig: Rig) -> None:
    size = 64 << 20
    sent = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536
        await reader.read()

    async with serving(talk) as app:
        rig.use(Limits(), dash=app.url)
        stream = rig.open("GET / HTTP/1.1")
        await stream.head()
        await until(lambda: stream.buffered, "the download has begun")
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.1)
        far = rig.far()
        link = rig.gateway.links[0].transport
        assert link is not None
        assert far.queued < 1 << 20
        assert link.get_write_buffer_size() < 1 << 20
        assert stream.buffered <= stream._raw.window
        got = 0
        async with asyncio.timeout(30):
            while data := await stream.read():
                got += len(data)
        assert got == size
        await stream.wait_closed()
        assert rig.edge.budget.promised == 0


async def test_upload_to_a_slow_service_stays_bounded(rig: Rig) -> None:
    size = 64 << 20
    go = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go.wait()
        left = size
        while left:
            left -= len(await reader.read(1 << 20))
        writer.write(OK)
        await reader.read()

    async with serving(talk) as app:
        rig.use(dash=app.url)
        stream = rig.open(f"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}", fin=False)
        sent = 0

        async def push() -> None:
            nonlocal sent
            for _ in range(size >> 16):
                await stream.write(b"x" * 65536)
                sent += 65536
            stream.finish()

        pushing = asyncio.create_task(push())
        await until(lambda: sent, "the upload has begun")
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.1)
        far = rig.far()
        assert far.held_bytes <= far.window
        assert stream._raw.queued < 1 << 20
        go.set()
        async with asyncio.timeout(30):
            assert (await answer(stream)).body == b"ok"
        await pushing


# ── upgrades ──────────────────────────────────────────────────────────────────────────────────────────────────────

UPGRADE = "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nUpgrade: websocket\r\nX-Kept: 1\r\n\r\n"


async def test_upgraded_connection_is_opaque_and_half_closes(rig: Rig) -> None:
    seen: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(SWITCH + b"first")
        seen.append(await reader.readexactly(10))
        writer.write(b"second")
        seen.append(await reader.read())
        writer.write(b"after your end")

    async with serving(talk) as app:
        rig.use(dash=app.url)
        stream = rig.open(UPGRADE, fin=False)
        await stream.write(b"early")
        head = await stream.head()
        assert not head.interim
        assert not head.fin
        assert head.data == (
            b"HTTP/1.1 101 Switching Protocols\r\nX-Kept: 1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        assert await stream.read() == b"first"
        await stream.write(b"\0\r\n\r\n")
        assert await stream.read() == b"second"
        stream.finish(b"last")
        rest = b""
        while data := await stream.read():
            rest += data
        assert rest == b"after your end"
        assert b"Connection: Upgrade\r\nUpgrade: websocket\r\n" in seen[0]
        assert seen[1:] == [b"early\0\r\n\r\n", b"last"]
        await asyncio.wait_for(stream.wait_closed(), 5)


async def test_upgrade_that_is_declined(rig: Rig) -> None:
    async with serving(replies(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")) as app:
        rig.use(dash=app.url)
        stream = rig.open(UPGRADE, fin=False)
        found = await answer(stream)
        assert (found.status, found.body) == (403, b"no")
        stream.finish()
        await asyncio.wait_for(stream.wait_closed(), 5)


async def test_service_cuts_off_an_upgraded_connection(rig: Rig) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCH)
        await writer.drain()
        await reader.readexactly(1)
        abort_now(writer.transport)

    async with serving(talk) as app:
        rig.use(dash=app.url)
        stream = rig.open(UPGRADE, fin=False)
        await stream.head()
        await stream.write(b"x" * 100)
        with pytest.raises(StreamReset) as caught:
            await asyncio.wait_for(stream.read(), 5)
        assert caught.value.code == ErrorCode.BAD_UPSTREAM


# ── other kinds of services ───────────────────────────────────────────────────────────────────────────────────────


async def test_unix_socket(rig: Rig, tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK)
        await reader.read()

    async with serving(talk, path=tmp_path / "app.sock") as app:
        upstream = rig.use(dash=app.url)
        await upstream.health.start(5)
        assert upstream.services() == {"dash": {"healthy": True, "detail": "", "url_scheme": "unix"}}
        assert (await rig.ask("GET / HTTP/1.1")).body == b"ok"
        assert b"\r\nHost: localhost\r\n" in seen[0]


@pytest.mark.parametrize("unix", [False, True])
async def test_many_streams_at_once_share_connections(rig: Rig, tmp_path: Path, unix: bool) -> None:
    """Ten visitors' worth at a time, again and again: connections are made for the first of them only."""
    at_once = 60
    numbers: set[int] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            number = int(head.split(b" ")[1][1:])
            assert number not in numbers
            numbers.add(number)
            await asyncio.sleep(0)
            body = b"%d" % number * 1000
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)

    async with serving(talk, path=tmp_path / "app.sock" if unix else None) as app:
        rig.use(dash=app.url)
        for turn in range(10):
            first = turn * at_once
            found = await asyncio.gather(
                *(rig.ask(f"GET /{number} HTTP/1.1") for number in range(first, first + at_once))
            )
            assert [answer.body for answer in found] == [
                b"%d" % number * 1000 for number in range(first, first + at_once)
            ]
        assert len(numbers) == 10 * at_once
        assert app.connections == app.open <= at_once


async def test_health_follows_the_service(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    upstream = rig.use(dash=f"unix://{path}")
    await upstream.health.start(5)
    assert upstream.health.of("dash") == (False, "No such file or directory")
    app: App
    async with serving(replies(OK), path=path) as app:
        await until(lambda: upstream.health.of("dash")[0], "the service is up")
        assert (await rig.ask("GET / HTTP/1.1")).body == b"ok"
        assert app.connections >= 1
    assert [change["dash"]["healthy"] for change in rig.changes] == [False, True]


async def test_removed_service_ends_its_streams(rig: Rig) -> None:
    async with serving(lambda reader, writer: reader.read()) as app:  # type: ignore[arg-type,return-value]
        upstream = rig.use(dash=app.url, other=app.url)
        one, two = rig.open("GET / HTTP/1.1"), rig.open("GET / HTTP/1.1", service="other")
        await until(lambda: app.open == 2, "both requests at the service")
        configured = {name: target.service for name, target in upstream._targets.items()}
        upstream.configure({"other": configured["other"]})
        with pytest.raises(StreamReset) as caught:
            await one.head()
        assert caught.value.code == ErrorCode.REFUSED
        await until(lambda: app.open == 1, "its connection is closed")
        assert two.reset_code is None
        two.reset(ErrorCode.CANCEL)
        await until(lambda: app.open == 0, "the other one is closed")
