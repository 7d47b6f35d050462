"""The gateway's exchanges, byte by byte: framing at every split, back-pressure, connections, resets."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from random import Random
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speedups.exchange import Exchange, Transport
from speedups.pair import EXAMPLES, Recorder, pattern

from guestpass.gateway.upstream import Limits
from guestpass_speedups.session import HIGH_WATER, ErrorCode, Stream
from guestpass_speedups.upstream import Connection

GET = b"GET / HTTP/1.1"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Key: 1\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"
BAD = ErrorCode.BAD_UPSTREAM


# ── answers, cut at every byte ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Answer:
    """What a service says to one request, and what must become of it. `kept`: the connection is used again."""

    said: bytes
    body: bytes = b""
    status: int = 200
    code: int | None = None
    kept: bool = True
    hang_up: bool = False
    interims: int = 0
    trailers: bytes | None = None
    request: bytes = GET


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "length": Answer(OK, b"ok"),
    "no reason": Answer(b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"),
    "no body": Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "204": Answer(b"HTTP/1.1 204 No Content\r\n\r\n", status=204),
    "304": Answer(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", status=304),
    "HEAD": Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", request=b"HEAD / HTTP/1.1"),
    "HEAD of chunks": Answer(CHUNKED, request=b"HEAD / HTTP/1.1"),
    "chunks": Answer(CHUNKED + b'3\r\nabc\r\n1;x="a;\\""\r\nd\r\n00\r\n\r\n', b"abcd"),
    "trailers": Answer(
        CHUNKED + b"1\r\na\r\n0\r\nX: 1\r\nY:2\r\n\r\n", b"a", trailers=b"X: 1\r\nY:2\r\n\r\n"
    ),
    "trailers only": Answer(CHUNKED + b"0\r\nX: 1\r\n\r\n", trailers=b"X: 1\r\n\r\n"),
    "interim": Answer(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 2 + OK, b"ok", interims=2),
    "interim and chunks": Answer(
        b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + b"1\r\na\r\n0\r\n\r\n", b"a", interims=1
    ),
    "close": Answer(
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok", kept=False
    ),
    "1.0": Answer(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", kept=False),
    "until the end": Answer(b"HTTP/1.1 200 OK\r\n\r\nuntil", b"until", kept=False, hang_up=True),
    "until the end, nothing": Answer(b"HTTP/1.1 200 OK\r\n\r\n", kept=False, hang_up=True),
    "surplus": Answer(OK + b"x", b"ok", kept=False),
    "second answer": Answer(OK + OK, b"ok", kept=False),
    "surplus after nothing": Answer(b"HTTP/1.1 204 No Content\r\n\r\nx", status=204, kept=False),
    "surplus after chunks": Answer(CHUNKED + b"1\r\na\r\n0\r\n\r\nx", b"a", kept=False),
    "body after HEAD": Answer(OK, request=b"HEAD / HTTP/1.1", kept=False),
    "too short": Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok", code=BAD, hang_up=True),
    "chunks cut": Answer(CHUNKED + b"3\r\nabc\r\n", code=BAD, hang_up=True),
    "chunk too long": Answer(CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n", code=BAD),
    "chunk size": Answer(CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n", code=BAD),
    "chunk line feed": Answer(CHUNKED + b"3\nabc\r\n0\r\n\r\n", code=BAD),
    "bad trailer": Answer(CHUNKED + b"0\r\nContent-Length: 1\r\n\r\n", code=BAD),
    "two framings": Answer(
        CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 1\r\n\r\n") + b"0\r\n\r\n", code=BAD
    ),
    "two lengths": Answer(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", code=BAD),
    "gzip": Answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", code=BAD),
    "folded": Answer(b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n", code=BAD),
    "line feeds": Answer(b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", code=BAD),
    "space before colon": Answer(b"HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 0\r\n\r\n", code=BAD),
    "switch unasked": Answer(SWITCH, code=BAD),
    "head cut": Answer(b"HTTP/1.1 200 OK\r\nX: a\r\n", code=BAD, hang_up=True),
    "garbage": Answer(b"\x16\x03\x01\x02\x00\x01\x00", code=BAD),
    "nothing": Answer(b"", code=BAD, hang_up=True),
}


def tell(answer: Answer, pieces: list[bytes]) -> tuple[Any, ...]:
    """What becomes of an answer that comes in these pieces."""
    web = Exchange()
    _, handler, transport = web.serve(answer.request)
    for piece in pieces:
        web.say(transport, piece)
    if answer.hang_up:
        transport.hang_up()
    web.settle()
    kept = transport.protocol.idle
    if handler.reset_code is not None:
        assert not kept
        web.check_silence()
        return (handler.reset_code,)
    head = h11_response(handler.heads[0]) if handler.heads else (0, [])
    assert handler.fin == bool(handler.heads), "a head without an end"
    if handler.heads:
        web.check_silence()
    return (None, head[0], len(handler.interims), bytes(handler.body), handler.trailers, kept)


def h11_response(head: bytes) -> tuple[int, list[tuple[bytes, bytes]]]:
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="HEAD", target="/", headers=[("Host", "a")]))
    parser.receive_data(head)
    event = parser.next_event()
    assert isinstance(event, h11.Response | h11.InformationalResponse)
    return event.status_code, list(event.headers)


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_cut_at_every_byte(name: str) -> None:
    answer = ANSWERS[name]
    expected = (
        (int(answer.code),)
        if answer.code is not None
        else (None, answer.status, answer.interims, answer.body, answer.trailers, answer.kept)
    )
    said = answer.said
    assert tell(answer, [said] if said else []) == expected
    for at in range(1, len(said)):
        assert tell(answer, [said[:at], said[at:]]) == expected, said[:at]
    assert tell(answer, [said[at : at + 1] for at in range(len(said))]) == expected


# ── whole exchanges at random ─────────────────────────────────────────────────────────────────────────────────────


def cut(random: Random, data: bytes) -> list[bytes]:
    """In pieces of which most are small."""
    pieces = []
    while data:
        size = random.choice((1, 2, random.randrange(1, 40), random.randrange(1, 5000), len(data)))
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def chunked(random: Random, body: bytes, trailers: bytes) -> bytes:
    said = b"".join(
        b"%x%b\r\n%b\r\n"
        % (len(piece), random.choice((b"", b";a", b";a=b", b';a="\\"\r;"'.replace(b"\r", b""))), piece)
        for piece in cut(random, body)
    )
    return said + b"0\r\n" + (trailers or b"\r\n")


class Service:
    """The far end of one transport: h11 reads the requests, so that what is sent is judged by somebody else."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.parser = h11.Connection(h11.SERVER)
        self.read = 0

    def request(self) -> tuple[h11.Request, bytes]:
        """The next request, which must be complete."""
        self.parser.receive_data(self.transport.written[self.read :])
        self.read = len(self.transport.written)
        event = self.parser.next_event()
        assert isinstance(event, h11.Request)
        body = b""
        while isinstance(found := self.parser.next_event(), h11.Data):
            body += found.data
        assert isinstance(found, h11.EndOfMessage), found
        self.parser.send(h11.Response(status_code=204, headers=[]))
        self.parser.send(h11.EndOfMessage())
        self.parser.start_next_cycle()
        return event, body


@settings(max_examples=150 * EXAMPLES, deadline=None)
@given(st.integers(0, 2**32))
def test_exchanges_at_random(seed: int) -> None:
    random = Random(seed)
    web = Exchange()
    services: dict[int, Service] = {}
    for number in range(4):
        method = random.choice((b"GET", b"HEAD", b"POST", b"PUT", b"OPTIONS"))
        sent = (
            pattern(number, random.choice((0, 1, 100, 20_000, 100_000)))
            if method in (b"POST", b"PUT")
            else b""
        )
        known = random.random() < 0.5
        head = b"%b /%d?q HTTP/1.1\r\nHost: s\r\nX-N: %d" % (method, number, number)
        if known and sent:
            head += b"\r\nContent-Length: %d" % len(sent)
        has_body = method in (b"POST", b"PUT")
        stream, handler = web.ask(head + b"\r\n\r\n", fin=not has_body)
        if random.random() < 0.5 and web.pool.wanted:
            web.pool.connect()  # before the body; else in the middle of it or after
        for piece in cut(random, sent):
            stream.send(piece)
            if random.random() < 0.3:
                web.settle()
            if random.random() < 0.1 and web.pool.wanted:
                web.pool.connect()
        if has_body:
            stream.send(b"", fin=True)
        web.settle()
        if web.pool.wanted:
            web.pool.connect()
        web.settle()
        (transport,) = [
            t
            for t in web.pool.transports
            if not t.closed and len(t.written) > services.get(id(t), Service(t)).read
        ]
        service = services.setdefault(id(transport), Service(transport))
        request, got = service.request()
        assert (request.method, got) == (method, sent)
        assert dict(request.headers)[b"host"] == b"app:3000"

        body = pattern(7 * number, random.choice((0, 1, 50, 16_384, 300_000)))
        framing = random.choice(("length", "chunked", "close"))
        trailers = b"X-Sum: 1\r\n\r\n" if framing == "chunked" and random.random() < 0.3 else b""
        said = (
            random.choice((b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"))
            + b"HTTP/1.1 200 OK\r\nX: %d\r\n" % number
        )
        if framing == "length":
            said += b"Content-Length: %d\r\n\r\n" % len(body)
        elif framing == "chunked":
            said += b"Transfer-Encoding: chunked\r\n\r\n"
        else:
            said += b"\r\n"
        if method != b"HEAD":
            said += chunked(random, body, trailers) if framing == "chunked" else body
        for piece in cut(random, said):
            web.say(transport, piece)
        if framing == "close" and method != b"HEAD":
            transport.hang_up()
        web.settle()
        assert handler.reset_code is None
        assert handler.fin
        assert bytes(handler.body) == (b"" if method == b"HEAD" else body)
        assert handler.trailers == (trailers or None if method != b"HEAD" else None)
        assert transport.protocol.idle == (framing != "close" or method == b"HEAD")
    web.check_silence()


@settings(max_examples=300 * EXAMPLES, deadline=None)
@given(
    st.lists(
        st.one_of(st.binary(max_size=40), st.sampled_from(sorted(a.said for a in ANSWERS.values()))),
        max_size=5,
    )
)
def test_any_bytes_end_or_wait_and_nothing_raises(pieces: list[bytes]) -> None:
    web = Exchange()
    stream, handler, transport = web.serve(GET)
    for piece in pieces:
        if piece:
            web.say(transport, piece)
    transport.hang_up()
    web.settle()
    assert handler.fin or handler.reset_code == BAD
    assert stream.state == "CLOSED"
    web.check_silence()


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_head_and_body_leave_in_one_write() -> None:
    web = Exchange()
    _, handler, transport = web.serve(
        b"POST / HTTP/1.1\r\nHost: s\r\nContent-Length: 4\r\n\r\n", body=b"body"
    )
    assert transport.writes == [b"POST / HTTP/1.1\r\nHost: app:3000\r\nContent-Length: 4\r\n\r\nbody"]
    web.say(transport, OK)
    assert handler.body == b"ok"
    _, _, again = web.serve(GET)
    assert again is transport
    assert len(transport.writes) == 2
    web.say(transport, OK)
    web.check_silence()


@pytest.mark.parametrize(
    ("lines", "public", "expected"),
    [
        (b"Origin: https://s\r\n", False, b"Origin: http://app:3000\r\n"),
        (b"Origin: https://s.evil\r\n", False, b"Origin: https://s.evil\r\n"),
        (b"Origin: https://s/\r\n", False, b"Origin: https://s/\r\n"),
        (b"Origin: null\r\n", False, b"Origin: null\r\n"),
        (b"Referer: https://s\r\n", False, b"Referer: http://app:3000\r\n"),
        (b"Referer: https://s/a?b\r\n", False, b"Referer: http://app:3000/a?b\r\n"),
        (b"Referer: https://s:1/a\r\n", False, b"Referer: https://s:1/a\r\n"),
        (
            b"Origin: https://s\r\nReferer: https://s/\r\n",
            True,
            b"Origin: https://s\r\nReferer: https://s/\r\n",
        ),
        (b"A:  1 \r\nB:2\r\nc:\r\n", False, b"A: 1\r\nB: 2\r\nc: \r\n"),
        (b"Connection: X-Hop, close\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\n", False, b""),
        (b"Connection: upgrade\r\nUpgrade: h2c\r\n", False, b""),
    ],
)
def test_fields_of_a_request(lines: bytes, public: bool, expected: bytes) -> None:
    web = Exchange(public=public)
    forwarded = b"X-Forwarded-Proto: https\r\nX-Forwarded-Host: s\r\n"
    _, _, transport = web.serve(b"GET /p HTTP/1.1\r\nHost: s\r\n" + lines + forwarded + b"\r\n")
    host = b"s" if public else b"app:3000"
    assert transport.written == b"GET /p HTTP/1.1\r\nHost: " + host + b"\r\n" + expected + forwarded + b"\r\n"


def test_a_rewritten_head_that_grows_is_still_whole() -> None:
    """128 fields without the space behind the colon: the head that is sent is longer than the one that came."""
    web = Exchange()
    lines = b"".join(b"X-%03d:%b\r\n" % (n, b"v" * 200) for n in range(127))
    _, _, transport = web.serve(b"GET / HTTP/1.1\r\nHost:s\r\n" + lines + b"\r\n")
    request, _ = Service(transport).request()
    assert len(request.headers) == 128


@pytest.mark.parametrize("size", [0, 1, 9])
def test_location_points_to_the_share(size: int) -> None:
    web = Exchange()
    forwarded = b"X-Forwarded-Proto: https\r\nX-Forwarded-Host: s" + b"s" * size
    _, handler, transport = web.serve(b"GET / HTTP/1.1\r\nHost: s\r\n" + forwarded + b"\r\n\r\n")
    web.say(
        transport,
        b"HTTP/1.1 201 Created\r\nLocation: http://app:3000/a\r\ncontent-location:http://app:3000\r\n"
        b"X: http://app:3000/\r\nContent-Length: 0\r\n\r\n",
    )
    public = b"https://s" + b"s" * size
    _, fields = h11_response(handler.heads[0])
    assert fields == [
        (b"location", public + b"/a"),
        (b"content-location", public),
        (b"x", b"http://app:3000/"),
        (b"content-length", b"0"),
    ]


# ── bodies, back-pressure ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("half_close", [True, False])
def test_slow_reader_pauses_the_service(half_close: bool) -> None:
    web = Exchange(half_close=half_close)
    stream, handler, transport = web.serve(GET, auto=False)
    web.say(transport, b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
    far, said = web.far, 0
    while transport.reading:
        web.say(transport, pattern(said, 65_536))
        said += 65_536
    assert said < HIGH_WATER + 32_768 + 2 * 65_536
    assert far.queued <= HIGH_WATER + 65_536
    while said < 10_000_000:
        stream.consume(handler.unconsumed)
        handler.unconsumed = 0
        web.settle()
        while transport.reading and said < 10_000_000:
            size = min(65_536, 10_000_000 - said)
            web.say(transport, pattern(said, size))
            said += size
        assert far.queued <= HIGH_WATER + 65_536
    while not handler.fin:
        stream.consume(handler.unconsumed)
        handler.unconsumed = 0
        web.settle()
    assert bytes(handler.body) == pattern(0, 10_000_000)
    assert transport.protocol.idle


def test_slow_service_holds_up_the_edge() -> None:
    web = Exchange()
    stream, handler, transport = web.serve(
        b"PUT / HTTP/1.1\r\nHost: s\r\nContent-Length: 5000000\r\n\r\n", fin=False
    )
    transport.stuck = True
    stream.send(pattern(0, 5_000_000), fin=True)
    web.settle()
    first = transport.waiting
    assert first > 65_536
    assert web.far.held_bytes <= web.far.window
    web.settle()
    assert transport.waiting == first
    transport.unstick()
    web.settle()
    assert transport.written.endswith(pattern(4_000_000, 1_000_000))
    assert Service(transport).request()[1] == pattern(0, 5_000_000)
    web.say(transport, OK)
    assert handler.body == b"ok"
    assert transport.protocol.idle
    web.check_silence()


def test_body_waits_for_the_connection() -> None:
    web = Exchange()
    stream, handler = web.ask(b"POST / HTTP/1.1", fin=False)
    stream.send(pattern(0, 200_000), fin=True)
    web.settle()
    assert web.far.held_bytes == web.far.window == 32_768, "one floor of credit, and not a byte more"
    transport = web.pool.connect()
    web.settle()
    assert Service(transport).request()[1] == pattern(0, 200_000)
    web.say(transport, OK)
    assert handler.fin
    web.check_silence()


def test_trailers_of_a_request_that_waits_for_the_connection() -> None:
    web = Exchange()
    stream, _ = web.ask(b"POST / HTTP/1.1", fin=False, body=b"x")
    stream.send_trailers(b"X-Sum: 1\r\n\r\n")
    web.settle()
    transport = web.pool.connect()
    web.settle()
    assert transport.written.endswith(b"\r\n\r\n1\r\nx\r\n0\r\nX-Sum: 1\r\n\r\n")
    web.say(transport, OK)
    assert transport.protocol.idle
    web.check_silence()


@pytest.mark.parametrize("framing", [b"Content-Length: 9000000\r\n", b""])
@pytest.mark.parametrize("stuck", [False, True])
def test_an_early_refusal_ends_the_upload(framing: bytes, stuck: bool) -> None:
    web = Exchange()
    stream, handler, transport = web.serve(b"PUT / HTTP/1.1\r\nHost: s\r\n" + framing + b"\r\n", fin=False)
    transport.stuck = stuck
    stream.send(pattern(0, 100_000))
    web.settle()
    web.say(transport, b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\n")
    before = len(transport.written)
    stream.send(pattern(0, 3_000_000))
    web.settle()
    assert len(transport.written) == before, "nothing more goes to the service"
    assert stream.queued > 2_000_000, "and nothing more is taken from the edge"
    web.say(transport, b"big")
    assert transport.closed
    assert handler.body == b"big"
    assert stream.queued == 0, "the rest is taken and forgotten"
    stream.send(b"", fin=True)
    web.check_silence()


def test_an_early_success_lets_the_upload_go_on_until_it_is_complete() -> None:
    web = Exchange()
    stream, handler, transport = web.serve(b"PUT / HTTP/1.1", fin=False)
    stream.send(b"one")
    web.settle()
    web.say(transport, CHUNKED + b"1\r\na\r\n")
    stream.send(b"two")
    web.settle()
    assert transport.written.endswith(b"3\r\none\r\n3\r\ntwo\r\n")
    web.say(transport, b"0\r\n\r\n")
    assert handler.fin
    assert transport.closed, "it has not got the whole request"
    stream.send(pattern(0, 1_000_000), fin=True)
    web.check_silence()


@pytest.mark.parametrize(
    ("head", "body", "fin"),
    [
        (b"Content-Length: 2\r\n", b"abc", False),
        (b"Content-Length: 2\r\n", b"a", True),
        (b"Content-Length: 0\r\n", b"a", True),
    ],
)
@pytest.mark.parametrize("waits", [False, True])
def test_a_body_that_does_not_fit_its_length(head: bytes, body: bytes, fin: bool, waits: bool) -> None:
    web = Exchange()
    stream, handler = web.ask(b"PUT / HTTP/1.1\r\nHost: s\r\n" + head + b"\r\n", fin=False)
    if not waits:
        web.pool.connect()
    stream.send(body, fin=fin)
    web.settle()
    assert handler.reset_code == ErrorCode.PROTOCOL_ERROR
    assert all(body not in transport.written for transport in web.pool.transports)
    assert all(transport.aborted for transport in web.pool.transports)
    web.check_silence()


# ── upgrades ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_upgrade_cut_at_every_byte() -> None:
    said = SWITCH + b"from the service"
    for at in range(1, len(said)):
        web = Exchange()
        stream, handler, transport = web.serve(UPGRADE, fin=False, body=b"early ")
        assert transport.written.endswith(b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        before = len(transport.written)
        web.say(transport, said[:at])
        stream.send(b"from the visitor")
        web.settle()
        web.say(transport, said[at:])
        assert transport.written[before:] == b"early from the visitor"
        assert bytes(handler.body) == b"from the service"
        assert handler.heads[0].endswith(b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        stream.send(b"last", fin=True)
        web.settle()
        assert transport.written.endswith(b"last")
        assert transport.eof
        web.say(transport, b" after the end")
        transport.hang_up()
        web.settle()
        assert bytes(handler.body) == b"from the service after the end"
        assert transport.closed
        web.check_silence()


@pytest.mark.parametrize("half_close", [True, False])
def test_the_service_ends_an_upgraded_connection_first(half_close: bool) -> None:
    web = Exchange(half_close=half_close)
    stream, handler, transport = web.serve(UPGRADE, fin=False)
    web.say(transport, SWITCH)
    transport.hang_up()
    web.settle()
    assert handler.fin
    assert transport.closed != half_close
    stream.send(b"still here")
    web.settle()
    if half_close:
        assert transport.written.endswith(b"still here")
        stream.send(b"", fin=True)
        web.settle()
        assert transport.eof
    else:
        assert web.pool.notes[-1] == (BAD, "an upgraded connection was cut off")
    assert transport.closed
    web.settle()
    assert stream.state == "CLOSED"
    web.check_silence()


def test_reset_after_the_service_has_ended_an_upgraded_connection_over_tls() -> None:
    web = Exchange(half_close=False)
    stream, _, transport = web.serve(UPGRADE, fin=False)
    web.say(transport, SWITCH)
    transport.hang_up()
    web.settle()
    assert transport.lost
    assert stream.state == "HALF_REMOTE"
    stream.reset(ErrorCode.CANCEL)
    web.settle()
    assert stream.state == "CLOSED"
    web.check_silence()


def test_the_visitor_ends_an_upgraded_connection_over_tls() -> None:
    """TLS has no half-close: the service may go on for a while, then the connection is cut."""
    web = Exchange(Limits(half_closed=3.0), half_close=False)
    stream, handler, transport = web.serve(UPGRADE, fin=False)
    web.say(transport, SWITCH)
    stream.send(b"last", fin=True)
    web.settle()
    assert transport.written.endswith(b"last")
    web.say(transport, b"more")
    assert handler.body == b"more"
    ((_, cut_off),) = [timer for timer in web.loop.timers if timer[0] == 3.0]
    cut_off()
    web.settle()
    assert handler.fin
    web.check_silence()


def test_a_declined_upgrade_keeps_the_connection() -> None:
    web = Exchange()
    stream, handler, transport = web.serve(UPGRADE, fin=False, body=b"early")
    web.say(transport, b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
    assert handler.body == b"no"
    assert transport.protocol.idle
    stream.send(b"more", fin=True)
    web.check_silence()
    assert b"early" not in transport.written


def test_a_stuck_service_holds_up_an_upgraded_connection() -> None:
    web = Exchange()
    stream, _, transport = web.serve(UPGRADE, fin=False)
    web.say(transport, SWITCH)
    transport.stuck = True
    stream.send(pattern(0, 1_000_000))
    web.settle()
    assert stream.queued > 500_000
    assert web.far.held_bytes <= web.far.window
    transport.unstick()
    web.settle()
    assert transport.written.endswith(pattern(0, 1_000_000))


# ── connections ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_as_many_connections_as_streams_wait_and_no_more() -> None:
    web = Exchange()
    asked = [web.ask(GET) for _ in range(300)]
    assert web.pool.wanted == 300
    first = web.pool.connect()
    for _ in range(100):
        web.say(first, OK)
    assert sum(handler.fin for _, handler in asked) == 100, (
        "each answer frees the connection for the next stream"
    )
    assert web.pool.attempts == 300
    while web.pool.wanted:
        web.pool.connect()
    web.settle()
    for transport in web.pool.transports:
        if not transport.protocol.idle:
            web.say(transport, OK)
    assert all(handler.fin for _, handler in asked)
    assert [handler.heads for _, handler in asked] == [[OK[:-2]]] * 300
    web.check_silence()
    assert len(web.pool.connections) == 300
    for _ in range(500):
        _, _, _ = web.serve(GET)
        (transport,) = [t for t in web.pool.transports if not t.protocol.idle]
        web.say(transport, OK)
    assert web.pool.attempts == 300, "no more connections are needed"


def test_streams_that_are_reset_while_they_wait() -> None:
    web = Exchange()
    for _ in range(50):
        stream, _ = web.ask(GET)
        stream.reset(ErrorCode.CANCEL)
        web.settle()
        assert stream.state == "CLOSED", "nothing was sent for it, so there is nothing to wait for"
    assert web.pool.attempts == 1
    transport = web.pool.connect()
    assert transport.protocol.idle
    assert not transport.writes
    web.check_silence()


def test_a_failure_is_the_oldest_waiters() -> None:
    web = Exchange()
    asked = [web.ask(GET) for _ in range(3)]
    web.pool.fail()
    web.settle()
    assert [handler.reset_code for _, handler in asked] == [ErrorCode.UNREACHABLE, None, None]
    transport = web.pool.connect()
    web.settle()
    for _ in range(2):
        web.say(transport, OK)
    assert [handler.fin for _, handler in asked] == [False, True, True]
    web.pool.fail()
    web.check_silence()
    assert web.pool.connecting == 0


def test_a_connection_that_closes_as_soon_as_it_is_made() -> None:
    web = Exchange()
    _, handler = web.ask(GET)
    web.pool.wanted -= 1
    connection = Connection(web.pool)
    transport = Transport(web.loop, connection)
    connection.connection_made(transport)  # type: ignore[arg-type]
    transport.say(b"220 not HTTP, and nobody asked\r\n")
    web.pool.connected(connection)
    web.settle()
    assert handler.reset_code == ErrorCode.UNREACHABLE
    web.check_silence()


@pytest.mark.parametrize("how", ["end", "cut", "cut after a byte"])
@pytest.mark.parametrize(
    ("head", "more", "safe"),
    [
        (GET, {}, True),
        (b"DELETE /x HTTP/1.1", {}, True),
        (UPGRADE, {"fin": False, "body": b"early"}, True),
        (b"POST / HTTP/1.1", {}, False),
        (b"PUT / HTTP/1.1", {"body": b"x"}, False),
    ],
)
def test_stale_connections(how: str, head: bytes, more: dict[str, Any], safe: bool) -> None:
    web = Exchange()
    for _ in range(2):
        web.ask(GET)
    for _ in range(2):
        web.pool.connect()
        web.settle()
    for transport in web.pool.transports:
        web.say(transport, OK)
    _, handler = web.ask(head, **more)
    (transport,) = [t for t in web.pool.transports if not t.protocol.idle]
    sent = transport.writes[-1]
    if how == "end":
        transport.hang_up()
    else:
        if how == "cut after a byte":
            web.say(transport, b"H")
        transport.lose(ConnectionResetError())
    web.settle()
    if not safe or how == "cut after a byte":
        assert handler.reset_code == BAD
        assert web.pool.attempts == 2
        web.check_silence()
        return
    assert web.pool.attempts == 3, "a new one, not another one of the pool"
    fresh = web.pool.connect()
    web.settle()
    assert fresh.written == sent
    fresh.hang_up()
    web.settle()
    assert handler.reset_code == BAD, "once more, but not twice"
    assert web.pool.attempts == 3
    web.check_silence()


def test_what_is_sent_once_more_waits_for_a_new_connection() -> None:
    """One that another stream releases meanwhile may be as stale as the first."""
    web = Exchange()
    for _ in range(2):
        web.ask(GET)
    one, two = web.pool.connect(), web.pool.connect()
    web.settle()
    web.say(one, OK)
    _, handler = web.ask(GET)
    one.hang_up()
    web.settle()
    assert web.pool.attempts == 3
    web.say(two, OK)
    assert two.protocol.idle
    fresh = web.pool.connect()
    web.settle()
    web.say(fresh, OK)
    assert handler.body == b"ok"
    web.check_silence()


def test_a_tls_connection_that_was_to_be_paused_is_read_again() -> None:
    web = Exchange(half_close=False)
    _, handler, transport = web.serve(GET)
    transport.say(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + pattern(0, 300_000))
    web.settle()
    assert bytes(handler.body) == pattern(0, 300_000)
    assert transport.protocol.idle
    assert transport.reading
    _, handler, _ = web.serve(GET)
    web.say(transport, OK)
    assert handler.body == b"ok"
    web.check_silence()


def test_a_service_that_speaks_before_it_is_asked() -> None:
    """A 408 for the idle connection, which has crossed the request: it answers nobody."""
    web = Exchange()
    _, _, transport = web.serve(GET)
    web.say(transport, OK)
    head = b"PUT / HTTP/1.1\r\nHost: s\r\nContent-Length: 1\r\n\r\n"
    web.edge.session.open("web", head, handler := Recorder(), fin=True, body=b"x")
    web.shuttle()
    assert len(transport.writes) == 1, "the request leaves at the end of the turn"
    transport.say(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
    web.settle()
    assert transport.aborted
    assert len(transport.writes) == 1
    assert handler.reset_code == BAD


@pytest.mark.parametrize(("idle", "left"), [(1000.0, 5), (0.0, 0)])
def test_sweep(idle: float, left: int) -> None:
    """What is too old is closed; what is only too much is not, as long as it was used a moment ago."""
    web = Exchange(Limits(idle_connections=2, idle=idle))
    for _ in range(5):
        web.ask(GET)
    for _ in range(5):
        web.pool.connect()
    web.settle()
    for transport in web.pool.transports:
        web.say(transport, OK)
    web.pool.sweep()
    assert len(web.pool.connections) == left
    web.check_silence()


def test_a_closed_pool_serves_who_waits_and_keeps_nothing() -> None:
    web = Exchange()
    _, first, transport = web.serve(GET)
    _, second = web.ask(GET)
    web.pool.close()
    web.say(transport, OK)
    assert first.fin
    web.say(transport, OK)
    assert second.fin
    assert transport.closed
    assert web.pool.connect().closed
    web.check_silence()


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────

STAGES: dict[str, bytes | None] = {
    "waiting": None,
    "asked": b"",
    "head": b"HTTP/1.1 200",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
    "chunks": CHUNKED + b"5\r\nab",
    "switched": SWITCH,
}


def at_stage(stage: str) -> tuple[Exchange, Stream, Recorder, Transport | None]:
    web = Exchange()
    said = STAGES[stage]
    head = UPGRADE if stage == "switched" else b"POST / HTTP/1.1"
    stream, handler = web.ask(head, fin=False, body=b"part")
    if said is None:
        return web, stream, handler, None
    transport = web.pool.connect()
    web.settle()
    if said:
        web.say(transport, said)
    return web, stream, handler, transport


@pytest.mark.parametrize("stage", STAGES)
def test_reset_is_acknowledged_when_the_connection_is_gone(stage: str) -> None:
    web, stream, _, transport = at_stage(stage)
    stream.reset(ErrorCode.REVOKED)
    web.shuttle()
    if transport is None:
        assert stream.state == "CLOSED"
    else:
        assert transport.aborted
        assert stream.state == "RESETTING", "the service may still be reading"
        transport.say(b"late")
        web.loop.run()
        web.shuttle()
        assert stream.state == "CLOSED"
    web.check_silence()


@pytest.mark.parametrize("stage", STAGES)
def test_the_tunnel_is_lost(stage: str) -> None:
    web, _, _, transport = at_stage(stage)
    web.gateway.session.abort(ErrorCode.UNREACHABLE)
    web.loop.run()
    assert transport is None or transport.lost
    assert not web.pool.streams
    assert not web.gateway.owner.failures
    if transport is None:
        assert not web.pool.connect().writes


@pytest.mark.parametrize("stage", STAGES)
def test_the_gateway_gives_a_stream_up(stage: str) -> None:
    web, _, handler, transport = at_stage(stage)
    web.far.end(ErrorCode.REFUSED)
    web.settle()
    assert handler.reset_code == ErrorCode.REFUSED
    assert transport is None or transport.lost
    web.check_silence()


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "waiting"])
def test_the_connection_is_cut(stage: str) -> None:
    web, _, handler, transport = at_stage(stage)
    assert transport is not None
    transport.lose(ConnectionResetError())
    web.settle()
    assert handler.reset_code == BAD
    assert len(web.pool.notes) == 1
    web.check_silence()


def test_no_answer_in_time() -> None:
    web = Exchange(Limits(response=0.0))
    _, handler, transport = web.serve(GET)
    ((delay, look),) = web.loop.timers
    assert delay == 0.0
    look()
    web.settle()
    assert handler.reset_code == ErrorCode.TIMEOUT
    assert transport.aborted
    web.loop.timers[1][1]()
    assert len(web.loop.timers) == 2, "nobody is there to look after"
    web.check_silence()


def test_more_interim_heads_than_allowed() -> None:
    web = Exchange()
    _, handler, transport = web.serve(GET)
    web.say(transport, b"HTTP/1.1 103 Early Hints\r\n\r\n" * 33)
    assert handler.reset_code == BAD
    assert "interim" in web.pool.notes[0][1]
    web.check_silence()


def test_unknown_service_and_malformed_heads_are_refused() -> None:
    web = Exchange()
    for head in (
        b"GET / HTTP/1.0",
        b"\r\nGET / HTTP/1.1",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1",
        b"",
    ):
        _, handler = web.ask(head)
        assert handler.reset_code == ErrorCode.REFUSED, head
    handler = Recorder()
    handler.react = lambda name, stream: stream.cancelled() if name == "reset" else None
    web.edge.session.open("other", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", handler, fin=True)
    web.settle()
    assert handler.reset_code == ErrorCode.REFUSED
    assert web.pool.attempts == 0
    web.check_silence()


def test_nothing_is_left_in_memory() -> None:
    """Many exchanges of every kind, then as many blocks as before."""

    def some() -> None:
        web = Exchange()
        for answer in ANSWERS.values():
            stream, handler, _ = web.serve(answer.request)
            (transport,) = [t for t in web.pool.transports if not t.protocol.idle and not t.closed]
            for at in range(0, len(answer.said), 7):
                web.say(transport, answer.said[at : at + 7])
            transport.hang_up()
            web.settle()
            assert stream.state == "CLOSED"
            assert handler.closed
        web.pool.close()
        web.check_silence()

    some()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(10):
        some()
    gc.collect()
    assert sys.getallocatedblocks() - before < 200
