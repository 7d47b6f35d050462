"""The scanner: what it refuses and accepts (one row, one test), heads and bodies that come in pieces, limits, and the
same results as the edge's headers.py."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpass.edge import headers as h
from guestpass_speedups import http1
from guestpass_speedups.http1 import BadHttp, ChunkedDecoder

CORPUS = sorted((Path(__file__).parents[1] / "corpus" / "http1").glob("*.bin"))

# FieldFlag and FieldId of http1.pxd.
HOP_BY_HOP, NOMINATED, RESERVED, DROPPED, PLAIN = 1, 2, 4, 8, 16
N_ERRORS = 25
MAX_HEAD, MAX_LINE, MAX_FIELDS = 32 * 1024, 16 * 1024, 128


def request(*lines: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes = b"Host: a") -> bytes:
    return b"\r\n".join((line, *((host,) if host else ()), *lines, b"", b""))


def response(*lines: bytes, line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((line, *lines, b"", b""))


POST = b"POST / HTTP/1.1"
HTTP10 = b"GET / HTTP/1.0"

# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED_REQUESTS = [
    # request line
    ("connect", request(line=b"CONNECT a:443 HTTP/1.1"), 405),
    ("trace", request(line=b"TRACE / HTTP/1.1"), 405),
    ("unknown method", request(line=b"FOO / HTTP/1.1"), 501),
    ("lower-case method", request(line=b"get / HTTP/1.1"), 501),
    ("rtsp method", request(line=b"DESCRIBE / HTTP/1.1"), 501),
    ("http/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 501),
    ("long method", request(line=b"A" * 17 + b" / HTTP/1.1"), 501),
    ("no method", request(line=b" / HTTP/1.1"), 400),
    ("method is no token", request(line=b"G(T / HTTP/1.1"), 400),
    ("tls hello", b"\x16\x03\x01\x02\x00\x01\x00", 400),
    ("two spaces before target", request(line=b"GET  / HTTP/1.1"), 400),
    ("tab before target", request(line=b"GET\t/ HTTP/1.1"), 400),
    ("two spaces after target", request(line=b"GET /  HTTP/1.1"), 400),
    ("space after version", request(line=b"GET / HTTP/1.1 "), 400),
    ("absolute form", request(line=b"GET http://a/ HTTP/1.1"), 400),
    ("authority form", request(line=b"GET a:80 HTTP/1.1"), 400),
    ("relative target", request(line=b"GET x HTTP/1.1"), 400),
    ("empty target", request(line=b"GET  HTTP/1.1"), 400),
    ("fragment", request(line=b"GET /a#b HTTP/1.1"), 400),
    ("space in target", request(line=b"GET /a b HTTP/1.1"), 400),
    ("obs-text in target", request(line=b"GET /\xe9 HTTP/1.1"), 400),
    ("control in target", request(line=b"GET /\x01 HTTP/1.1"), 400),
    ("del in target", request(line=b"GET /\x7f HTTP/1.1"), 400),
    ("asterisk with get", request(line=b"GET * HTTP/1.1"), 400),
    ("asterisk and more", request(line=b"OPTIONS *a HTTP/1.1"), 400),
    ("http/0.9", b"GET /\r\n\r\n", 400),
    ("http/0.9 with version", request(line=b"GET / HTTP/0.9"), 505),
    ("http/1.2", request(line=b"GET / HTTP/1.2"), 505),
    ("http/2.0", request(line=b"GET / HTTP/2.0"), 505),
    ("http/1.10", request(line=b"GET / HTTP/1.10"), 400),
    ("http/11", request(line=b"GET / HTTP/11"), 400),
    ("lower-case version", request(line=b"GET / http/1.1"), 400),
    ("other protocol", request(line=b"GET / ICE/1.0"), 400),
    # lines
    ("bare lf after request line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    ("bare lf after field", b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
    ("bare lf as empty line", b"GET / HTTP/1.1\r\nHost: a\r\n\nx", 400),
    ("bare cr as empty line", b"GET / HTTP/1.1\r\nHost: a\r\n\rx", 400),
    ("bare cr in field", request(b"X: a\rb"), 400),
    ("cr cr lf", request(b"X: a\r"), 400),
    ("two empty lines first", b"\r\n\r\n" + request(), 400),
    ("lf first", b"\n" + request(), 400),
    # fields
    ("space before colon", request(b"X : a"), 400),
    ("tab before colon", request(b"X\t: a"), 400),
    ("no colon", request(b"X"), 400),
    ("no name", request(b": a"), 400),
    ("obs-fold", request(b"X: a", b" b"), 400),
    ("obs-fold with tab", request(b"X: a", b"\tb"), 400),
    ("fold before the first field", b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    ("space in name", request(b"Bad Name: x"), 400),
    ("obs-text in name", request(b"X\xe9: x"), 400),
    ("nul in name", request(b"X\x00: x"), 400),
    ("nul in value", request(b"X: a\x00b"), 400),
    ("vertical tab in value", request(b"X: a\x0bb"), 400),
    ("del in value", request(b"X: a\x7fb"), 400),
    ("del in a later word", request(b"X: 12345678abc\x7f"), 400),
    ("control after obs-text", request(b"X: \xff\xff\xff\xff\xff\xff\xff\x1f"), 400),
    # Host
    ("no host", request(host=b""), 400),
    ("no host in http/1.0", request(line=HTTP10, host=b""), 400),
    ("two hosts", request(b"Host: a"), 400),
    ("host in other case twice", request(b"hOST: a"), 400),
    ("empty host", request(host=b"Host:"), 400),
    ("host with path", request(host=b"Host: a/b"), 400),
    ("host with user", request(host=b"Host: u@a"), 400),
    ("host list", request(host=b"Host: a, b"), 400),
    ("host with bad port", request(host=b"Host: a:b"), 400),
    ("host with empty port", request(host=b"Host: a:"), 400),
    ("host with long port", request(host=b"Host: a:123456"), 400),
    ("host begins with dot", request(host=b"Host: .a"), 400),
    ("host ends with dot", request(host=b"Host: a."), 400),
    ("host with underscore", request(host=b"Host: a_b"), 400),
    ("host with obs-text", request(host=b"Host: m\xfcnchen"), 400),
    ("open bracket", request(host=b"Host: [::1"), 400),
    ("empty brackets", request(host=b"Host: []"), 400),
    ("zone id", request(host=b"Host: [fe80::1%25eth0]"), 400),
    ("after bracket", request(host=b"Host: [::1]a"), 400),
    # framing
    ("leading zero", request(b"Content-Length: 05", line=POST), 400),
    ("two zeros", request(b"Content-Length: 00", line=POST), 400),
    ("sign", request(b"Content-Length: +5", line=POST), 400),
    ("negative", request(b"Content-Length: -5", line=POST), 400),
    ("hexadecimal", request(b"Content-Length: 0x5", line=POST), 400),
    ("length list", request(b"Content-Length: 5, 5", line=POST), 400),
    ("empty length", request(b"Content-Length:", line=POST), 400),
    ("space in length", request(b"Content-Length: 1 1", line=POST), 400),
    ("underscore in length", request(b"Content-Length: 1_1", line=POST), 400),
    ("19 digits", request(b"Content-Length: 1000000000000000000", line=POST), 400),
    ("two equal lengths", request(b"Content-Length: 5", b"content-length: 5", line=POST), 400),
    ("two lengths", request(b"Content-Length: 5", b"Content-Length: 6", line=POST), 400),
    ("length and chunked", request(b"Content-Length: 5", b"Transfer-Encoding: chunked", line=POST), 400),
    ("chunked and length", request(b"Transfer-Encoding: chunked", b"Content-Length: 0", line=POST), 400),
    ("gzip, chunked", request(b"Transfer-Encoding: gzip, chunked", line=POST), 400),
    ("chunked, gzip", request(b"Transfer-Encoding: chunked, gzip", line=POST), 400),
    (",chunked", request(b"Transfer-Encoding: ,chunked", line=POST), 400),
    ("identity", request(b"Transfer-Encoding: identity", line=POST), 400),
    ("empty coding", request(b"Transfer-Encoding:", line=POST), 400),
    ("quoted coding", request(b'Transfer-Encoding: "chunked"', line=POST), 400),
    ("xchunked", request(b"Transfer-Encoding: xchunked", line=POST), 400),
    ("chunked with parameter", request(b"Transfer-Encoding: chunked;q=1", line=POST), 400),
    ("chunked and blank", request(b"Transfer-Encoding: chunked\t", line=POST), 400),
    ("chunked twice", request(*(b"Transfer-Encoding: chunked",) * 2, line=POST), 400),
    ("chunked in http/1.0", request(b"Transfer-Encoding: chunked", line=b"POST / HTTP/1.0"), 400),
    # what may come once
    ("two expects", request(*(b"Expect: 100-continue",) * 2), 400),
    ("unknown expectation", request(b"Expect: 200-ok"), 417),
    ("two content types", request(b"Content-Type: a/b", b"Content-Type: a/b", line=POST), 400),
    ("two user agents", request(b"User-Agent: a", b"user-agent: b"), 400),
    ("two upgrades", request(b"Connection: upgrade", b"Upgrade: websocket", b"Upgrade: h2c"), 400),
    # Connection and upgrades
    ("tab in connection", request(b"Connection: close,\tx"), 400),
    ("connection names host", request(b"Connection: host"), 400),
    ("connection names length", request(b"Connection: content-length", b"Content-Length: 1", line=POST), 400),
    ("too many options", request(b"Connection: " + b"," * 128), 400),
    ("close and keep-alive in 1.0", request(b"Connection: close, keep-alive", line=HTTP10), 400),
    ("upgrade by proxy-connection", request(b"Proxy-Connection: upgrade", b"Upgrade: websocket"), 400),
    ("websocket by post", request(b"Connection: upgrade", b"Upgrade: websocket", line=POST), 400),
    ("websocket in 1.0", request(b"Connection: upgrade", b"Upgrade: websocket", line=HTTP10), 400),
    (
        "websocket with body",
        request(b"Connection: upgrade", b"Upgrade: websocket", b"Content-Length: 1"),
        400,
    ),
    ("old websocket", request(b"Sec-WebSocket-Key1: x"), 400),
    # limits
    ("129 fields", request(*(b"X: y",) * 128), 431),
    ("line of more than 16 KiB", request(b"X: " + b"y" * (MAX_LINE - 2)), 431),
    ("target of more than 16 KiB", request(line=b"GET /" + b"a" * MAX_LINE + b" HTTP/1.1"), 414),
    ("fields of more than 30 KiB", request(*(b"X: " + b"y" * 10_300,) * 3), 431),
    (
        "more than 32 KiB",
        request(*(b"X: " + b"y" * 10_000,) * 3, line=b"GET /" + b"a" * 3000 + b" HTTP/1.1"),
        431,
    ),
    ("endless field", b"GET / HTTP/1.1\r\nX: " + b"y" * MAX_HEAD, 431),
    ("endless target", b"GET /" + b"y" * MAX_HEAD, 414),
]


def error_of(data: bytes, *, is_response: bool = False) -> int:
    """The status that refuses a message; 0 when it is accepted."""
    try:
        head = http1.parse_response(data) if is_response else http1.parse_request(data)
    except BadHttp as exc:
        return exc.status
    assert head is not None, "the head is not complete"
    return 0


@pytest.mark.parametrize(
    ("data", "status"), [r[1:] for r in REFUSED_REQUESTS], ids=[r[0] for r in REFUSED_REQUESTS]
)
def test_request_refused(data: bytes, status: int) -> None:
    assert error_of(data) == status


ACCEPTED_REQUESTS = [
    ("http/1.0", request(line=HTTP10), {"minor": 0, "keep_alive": False}),
    ("http/1.0 keep-alive", request(b"Connection: Keep-Alive", line=HTTP10), {"keep_alive": True}),
    (
        "http/1.0 proxy keep-alive",
        request(b"Proxy-Connection: keep-alive", line=HTTP10),
        {"keep_alive": True},
    ),
    ("keep-alive", request(), {"minor": 1, "keep_alive": True, "framing": "none", "content_length": 0}),
    ("close", request(b"Connection: x, Close"), {"keep_alive": False}),
    ("close in a second field", request(b"Connection: x", b"connection: close"), {"keep_alive": False}),
    ("proxy close", request(b"Proxy-Connection: close"), {"keep_alive": False}),
    ("closed is not close", request(b"Connection: closed"), {"keep_alive": True}),
    ("empty elements", request(b"Connection: ,, close ,"), {"keep_alive": False}),
    ("one empty line first", b"\r\n" + request(), {"method": b"GET", "size": len(request()) + 2}),
    ("method", request(line=b"PROPFIND / HTTP/1.1"), {"method": b"PROPFIND"}),
    ("asterisk", request(line=b"OPTIONS * HTTP/1.1"), {"target": b"*"}),
    (
        "target",
        request(line=b'GET /a%20b?q=%2f..&x=[1]|"<>\\^` HTTP/1.1'),
        {"target": b'/a%20b?q=%2f..&x=[1]|"<>\\^`'},
    ),
    ("host with port", request(host=b"Host: A-b.9.example:65535"), {}),
    ("ipv6 host", request(host=b"Host: [::ffff:1.2.3.4]:80"), {}),
    ("white space around values", request(b"X:\t a \t"), {"fields": [(b"Host", b"a"), (b"X", b"a")]}),
    ("empty value", request(b"X:", b"Y: \t "), {"fields": [(b"Host", b"a"), (b"X", b""), (b"Y", b"")]}),
    ("obs-text", request(b"X: \xe9"), {"fields": [(b"Host", b"a"), (b"X", b"\xe9")]}),
    ("all of a token", request(b"!#$%&'*+-.^_`|~0Aa: b"), {}),
    ("length", request(b"Content-Length: 5", line=POST), {"framing": "length", "content_length": 5}),
    ("length 0", request(b"Content-Length: 0", line=POST), {"framing": "none", "content_length": 0}),
    ("18 digits", request(b"Content-Length: 999999999999999999"), {"content_length": 999999999999999999}),
    ("get with body", request(b"Content-Length: 1"), {"framing": "length"}),
    ("chunked", request(b"Transfer-Encoding:  CHUNKED", line=POST), {"framing": "chunked"}),
    ("expect", request(b"Expect: 100-Continue"), {"expect_continue": True}),
    ("expect in http/1.0", request(b"Expect: 100-continue", line=HTTP10), {"expect_continue": False}),
    ("unknown expectation in http/1.0", request(b"Expect: x", line=HTTP10), {"expect_continue": False}),
    ("websocket", request(b"Connection: x, Upgrade", b"Upgrade: WebSocket"), {"upgrade": "websocket"}),
    ("not asked by connection", request(b"Upgrade: websocket"), {"upgrade": None}),
    ("h2c", request(b"Connection: Upgrade", b"Upgrade: h2c"), {"upgrade": "other"}),
    ("list", request(b"Connection: Upgrade", b"Upgrade: websocket, h2c"), {"upgrade": "other"}),
    ("128 fields", request(*(b"X: y",) * 127), {}),
    ("127 empty options", request(b"Connection: " + b"," * 127), {}),
    ("line of 16 KiB", request(b"X: " + b"y" * (MAX_LINE - 3)), {}),
    ("target of 16 KiB", request(line=b"GET /" + b"a" * (MAX_LINE - 1) + b" HTTP/1.1"), {}),
    ("followed by anything", request() + b"\x00\n", {"size": len(request())}),
]


@pytest.mark.parametrize(
    ("data", "expected"), [r[1:] for r in ACCEPTED_REQUESTS], ids=[r[0] for r in ACCEPTED_REQUESTS]
)
def test_request_accepted(data: bytes, expected: dict[str, object]) -> None:
    head = http1.parse_request(data)
    assert head is not None
    assert {name: getattr(head, name) for name in expected} == expected


def test_head_of_exactly_the_limit() -> None:
    """At the gateway: what an edge has filled up to the last byte passes, one byte more does not."""
    lines = [b"X: " + b"y" * 16_000, b"Y: " + b"y" * 16_000]
    room = MAX_HEAD - len(request(*lines, b"Z: "))
    head = http1.parse_request(request(*lines, b"Z: " + b"z" * room), from_edge=True)
    assert head is not None
    assert head.size == MAX_HEAD
    with pytest.raises(BadHttp) as caught:
        http1.parse_request(request(*lines, b"Z: " + b"z" * (room + 1)), from_edge=True)
    assert caught.value.status == 431


def test_an_edge_sends_no_transfer_encoding() -> None:
    data = request(b"Transfer-Encoding: chunked", line=POST)
    assert http1.parse_request(data) is not None
    with pytest.raises(BadHttp):
        http1.parse_request(data, from_edge=True)


# ── responses ─────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED_RESPONSES = [
    ("http/1.2", response(line=b"HTTP/1.2 200 OK")),
    ("http/2", response(line=b"HTTP/2 200 OK")),
    ("icy", response(line=b"ICY 200 OK")),
    ("lower case", response(line=b"http/1.1 200 OK")),
    ("a request", request()),
    ("space first", response(line=b" HTTP/1.1 200 OK")),
    ("empty line first", b"\r\n" + response()),
    ("two spaces", response(line=b"HTTP/1.1  200 OK")),
    ("two digits", response(line=b"HTTP/1.1 99 X")),
    ("four digits", response(line=b"HTTP/1.1 2000 X")),
    ("status 0", response(line=b"HTTP/1.1 099 X")),
    ("status 600", response(line=b"HTTP/1.1 600 X")),
    ("no space after status", response(line=b"HTTP/1.1 200OK")),
    ("control in reason", response(line=b"HTTP/1.1 200 O\x01K")),
    ("cr in reason", response(line=b"HTTP/1.1 200 O\rK")),
    ("bare lf", b"HTTP/1.1 200 OK\n\n"),
    ("bare lf after a field", b"HTTP/1.1 200 OK\r\nA: b\n\r\n"),
    ("space before colon", response(b"A : b")),
    ("folded", response(b"A: b", b" c")),
    ("no colon", response(b"A")),
    ("nul", response(b"A: b\x00")),
    ("two lengths", response(*(b"Content-Length: 5",) * 2)),
    ("length list", response(b"Content-Length: 5, 5")),
    ("leading zero", response(b"Content-Length: 05")),
    ("length and chunked", response(b"Content-Length: 5", b"Transfer-Encoding: chunked")),
    ("gzip, chunked", response(b"Transfer-Encoding: gzip, chunked")),
    ("identity", response(b"Transfer-Encoding: identity")),
    ("chunked twice", response(*(b"Transfer-Encoding: chunked",) * 2)),
    ("chunked in http/1.0", response(b"Transfer-Encoding: chunked", line=b"HTTP/1.0 200 OK")),
    ("length in 103", response(b"Content-Length: 5", line=b"HTTP/1.1 103 X")),
    ("chunked 100", response(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 100 Continue")),
    ("chunked 204", response(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 204 X")),
    ("101 without upgrade", response(b"Connection: upgrade", line=b"HTTP/1.1 101 X")),
    ("101 without connection", response(b"Upgrade: websocket", line=b"HTTP/1.1 101 X")),
    ("tab in connection", response(b"Connection: a,\tclose")),
    ("129 fields", response(*(b"A: b",) * 129)),
    ("more than 32 KiB", response(b"A: " + b"b" * MAX_HEAD)),
    ("endless reason", b"HTTP/1.1 200 " + b"a" * MAX_HEAD),
]


@pytest.mark.parametrize("data", [r[1] for r in REFUSED_RESPONSES], ids=[r[0] for r in REFUSED_RESPONSES])
def test_response_refused(data: bytes) -> None:
    assert error_of(data, is_response=True)


UP = (b"Connection: Upgrade", b"Upgrade: websocket")
CHUNKED = b"Transfer-Encoding: chunked"
ACCEPTED_RESPONSES = [
    (
        "length",
        response(b"Content-Length: 5"),
        {"framing": "length", "content_length": 5, "keep_alive": True},
    ),
    (
        "length 0",
        response(b"Content-Length: 0"),
        {"framing": "none", "content_length": 0, "keep_alive": True},
    ),
    ("chunked", response(CHUNKED), {"framing": "chunked", "keep_alive": True, "content_length": None}),
    ("until close", response(), {"framing": "close", "keep_alive": False}),
    ("close", response(b"Connection: close", b"Content-Length: 5"), {"keep_alive": False}),
    ("http/1.0", response(b"Content-Length: 5", line=b"HTTP/1.0 200 OK"), {"minor": 0, "keep_alive": False}),
    (
        "http/1.0 keep-alive",
        response(b"Content-Length: 5", b"Connection: keep-alive", line=b"HTTP/1.0 200 OK"),
        {"keep_alive": True},
    ),
    ("100", response(line=b"HTTP/1.1 100 Continue"), {"status": 100, "framing": "none", "keep_alive": True}),
    ("102 with length 0", response(b"Content-Length: 0", line=b"HTTP/1.1 102 X"), {"framing": "none"}),
    ("204", response(line=b"HTTP/1.1 204 No Content"), {"framing": "none", "keep_alive": True}),
    ("204 with a length", response(b"Content-Length: 5", line=b"HTTP/1.1 204 X"), {"framing": "none"}),
    ("304", response(b"Content-Length: 5", line=b"HTTP/1.1 304 X"), {"framing": "none", "content_length": 5}),
    ("101", response(*UP, line=b"HTTP/1.1 101 X"), {"framing": "none", "upgrade": "websocket"}),
    ("101 h2c", response(UP[0], b"Upgrade: h2c", line=b"HTTP/1.1 101 X"), {"upgrade": "other"}),
    ("no reason", response(line=b"HTTP/1.1 599"), {"status": 599, "reason": None}),
    ("empty reason", response(line=b"HTTP/1.1 200 "), {"reason": b""}),
    ("odd reason", response(line=b"HTTP/1.1 200  \t\xe9 a"), {"reason": b" \t\xe9 a"}),
    ("a long field", response(b"A: " + b"b" * 30_000), {}),
    ("128 fields", response(*(b"A: b",) * 128), {}),
]


@pytest.mark.parametrize(
    ("data", "expected"), [r[1:] for r in ACCEPTED_RESPONSES], ids=[r[0] for r in ACCEPTED_RESPONSES]
)
def test_response_accepted(data: bytes, expected: dict[str, object]) -> None:
    head = http1.parse_response(data)
    assert head is not None
    assert {name: getattr(head, name) for name in expected} == expected


@pytest.mark.parametrize("lines", [(), (b"Content-Length: 5",), (CHUNKED,)])
def test_answer_to_head_has_no_body(lines: tuple[bytes, ...]) -> None:
    head = http1.parse_response(response(*lines), to_head=True)
    assert head is not None
    assert head.framing == "none"
    assert head.keep_alive


def test_a_gateway_frames_nothing() -> None:
    head = http1.parse_response(response(CHUNKED, b"Content-Length: 5"), from_gateway=True)
    assert head is not None
    assert head.framing == "length"
    with pytest.raises(BadHttp):
        http1.parse_response(response(line=b"HTTP/1.0 200 OK"), from_gateway=True)


# ── heads in pieces ───────────────────────────────────────────────────────────────────────────────────────────────


def exactly(data: bytes) -> array[int]:
    """In memory that ends with the last byte (bytes objects have one more), so that a read beyond is seen by ASan."""
    return array("B", data)


def head_size(path: Path) -> int:
    data = path.read_bytes()
    head = http1.parse_request(data) if path.name.startswith("request") else http1.parse_response(data)
    assert head is not None
    return head.size


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.stem)
def test_every_split_of_a_head(path: Path) -> None:
    data, size, is_response = path.read_bytes(), head_size(path), path.name.startswith("response")
    for split in range(size):
        result, searched = http1.resume(exactly(data[:split]), 0, is_response)
        assert result == 0
        assert http1.resume(exactly(data), searched, is_response) == (size, 0)


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.stem)
def test_a_head_byte_by_byte(path: Path) -> None:
    data, size, is_response = path.read_bytes(), head_size(path), path.name.startswith("response")
    searched = 0
    for end in range(size):
        result, searched = http1.resume(exactly(data[:end]), searched, is_response)
        assert result == 0
        assert end - 2 <= searched <= end or end <= 2, "bytes are looked at again"
    assert http1.resume(data[:size], searched, is_response) == (size, 0)


BAD = [(name, data, False) for name, data, _ in REFUSED_REQUESTS] + [
    (n, d, True) for n, d in REFUSED_RESPONSES
]


@pytest.mark.parametrize(("data", "is_response"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_is_refused_does_not_depend_on_the_split(data: bytes, is_response: bool) -> None:
    """Followed by an empty line, at the latest: until then it may be that nobody looks."""
    data += b"\r\n\r\n"
    whole, _ = http1.resume(data, 0, is_response)
    assert whole < 0
    for split in range(0, len(data), max(1, len(data) // 97)):
        result, searched = http1.resume(exactly(data[:split]), 0, is_response)
        if result == 0:
            result, searched = http1.resume(exactly(data), searched, is_response)
        assert result == whole
        assert searched == 0


def test_a_broken_first_line_is_refused_with_its_first_bytes() -> None:
    assert http1.resume(b"\x16", 0)[0] < 0
    assert http1.resume(b"GET h", 0)[0] < 0
    assert http1.resume(b"GET / XX", 0)[0] < 0
    assert http1.resume(b"HTTQ", 0, True)[0] < 0


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────

KNOWN = [
    "host", "connection", "content-length", "transfer-encoding", "expect", "upgrade", "cookie", "authorization",
    "origin", "referer", "sec-fetch-site", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host",
    "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "proxy-authentication-info",
    "te", "trailer", "content-type", "content-range", "content-location", "etag", "server", "user-agent",
    "max-forwards", "sec-websocket-key1", "sec-websocket-protocol", "accept", "date", "location", "set-cookie",
    "cache-control", "alt-svc", "nel", "report-to", "reporting-endpoints", "strict-transport-security",
    "service-worker-allowed", "public-key-pins", "expect-ct", "clear-site-data",
]  # fmt: skip  # in the order of FieldId


@pytest.mark.parametrize(("number", "name"), list(enumerate(KNOWN, 1)), ids=KNOWN)
def test_known_name(number: int, name: str) -> None:
    raw = name.encode()
    assert http1.field_id(raw) == number
    assert http1.field_id(raw.upper()) == number
    assert http1.field_id(raw.title()) == number
    for i in range(len(raw)):
        for other in (b"_", b"^", b"~", b"0"):
            assert http1.field_id(raw[:i] + other + raw[i + 1 :]) == 0
        assert http1.field_id(raw[:i] + raw[i + 1 :]) in (0, http1.field_id(raw[:i] + raw[i + 1 :]))
        assert http1.field_id(raw[:i] + raw[i + 1 :]) != number
    assert http1.field_id(raw + b"x") == 0


def flags_of(name: bytes, *lines: bytes, is_response: bool = False) -> int:
    line = name + b": 1"
    data = response(line, *lines) if is_response else request(line, *lines)
    head = http1.parse_response(data) if is_response else http1.parse_request(data)
    assert head is not None
    return dict(zip((k for k, _ in head.fields), head.flags, strict=True))[name] & ~PLAIN


@pytest.mark.parametrize("name", sorted(h.HOP_BY_HOP - {b"transfer-encoding"}))
def test_hop_by_hop_names(name: bytes) -> None:
    assert flags_of(name.title()) & HOP_BY_HOP
    assert flags_of(name.title(), is_response=True) & HOP_BY_HOP


@pytest.mark.parametrize(
    "name", [*sorted(h.RESERVED), *h.RESERVED_PREFIXES, *(p + b"x" for p in h.RESERVED_PREFIXES)]
)
def test_reserved_names(name: bytes) -> None:
    for alias in (
        name,
        name.upper(),
        name.replace(b"-", b"_"),
        name.replace(b"-", b"."),
        name.replace(b"-", b"~"),
    ):
        assert flags_of(alias) == RESERVED
        assert http1.reserved(alias)
        assert not flags_of(alias, is_response=True) or name.startswith(b"x-guestpass")
    assert http1.reserved(name[:-1]) == h.is_reserved(name[:-1])
    assert flags_of(b"y" + name[1:]) == 0


@pytest.mark.parametrize("name", sorted(h.DROPPED_FROM_RESPONSES))
def test_names_dropped_from_responses(name: bytes) -> None:
    assert flags_of(name.upper(), is_response=True) == DROPPED
    assert flags_of(name) == 0


def test_nominated_names() -> None:
    assert flags_of(b"X-Secret", b"Connection: close, x-SECRET ,y") == NOMINATED
    assert flags_of(b"X_Secret", b"Connection: x-secret") == 0
    assert flags_of(b"Close", b"Connection: close") == NOMINATED
    assert flags_of(b"X-Secret", b"Proxy-Connection: x-secret") == 0


def test_errors_have_a_status_and_a_reason() -> None:
    for code in range(1, N_ERRORS):
        error = BadHttp(-code)
        assert error.status in (400, 405, 414, 417, 431, 501, 502, 505)
        assert error.reason
        assert error.code == -code


# ── chunked bodies ────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED_CHUNKS = [
    ("no size", b"\r\n"),
    ("space first", b" 5\r\n"),
    ("sign", b"+5\r\n"),
    ("0x", b"0x5\r\n"),
    ("no digit", b"g\r\n"),
    ("16 digits", b"0000000000000001\r\n"),
    ("overflow", b"10000000000000005\r\n"),
    ("space after size", b"5 \r\n"),
    ("tab after size", b"5\t\r\n"),
    ("bare lf after size", b"5\nhello\r\n"),
    ("bare cr after size", b"5\rhello\r\n"),
    ("spill", b"5\r\nhello!\r\n"),
    ("short", b"5\r\nhell\r\n0\r\n\r\n"),
    ("bare lf after data", b"5\r\nhello\n0\r\n\r\n"),
    ("bare cr after data", b"5\r\nhello\r0\r\n\r\n"),
    ("no crlf after data", b"5\r\nhello0\r\n\r\n"),
    ("empty extension", b"5;\r\n"),
    ("space in extension", b"5; a=b\r\n"),
    ("extension without name", b"5;=b\r\n"),
    ("extension without value", b"5;a=\r\n"),
    ("two equals", b"5;a==b\r\n"),
    ("after quoted", b'5;a="b"c\r\n'),
    ("lf in quoted", b'5;a="b\nc"\r\n'),
    ("cr in quoted", b'5;a="b\r\n"\r\n'),
    ("nul in quoted", b'5;a="\x00"\r\n'),
    ("escaped control", b'5;a="\\\n"\r\n'),
    ("lf in extension", b"5;a\nhello\r\n"),
    ("long extension", b"5;" + b"a" * 256 + b"\r\n"),
    ("many extensions", (b"1;" + b"a" * 200 + b"\r\nx\r\n") * 90),
    ("bare lf at the end", b"0\r\n\n"),
    ("bare lf after last size", b"0\n\r\n"),
    ("bare cr at the end", b"0\r\n\rx"),
    ("trailer without colon", b"0\r\nX\r\n\r\n"),
    ("trailer without name", b"0\r\n: x\r\n\r\n"),
    ("space before colon", b"0\r\nX : y\r\n\r\n"),
    ("folded trailer", b"0\r\nX: y\r\n z\r\n\r\n"),
    ("nul in trailer", b"0\r\nX: \x00\r\n\r\n"),
    ("bare lf after trailer", b"0\r\nX: y\n\r\n"),
    ("length as trailer", b"0\r\nContent-Length: 5\r\n\r\n"),
    ("coding as trailer", b"0\r\ntransfer-encoding: chunked\r\n\r\n"),
    ("host as trailer", b"0\r\nHost: a\r\n\r\n"),
    ("connection as trailer", b"0\r\nConnection: close\r\n\r\n"),
    ("cookie as trailer", b"0\r\nCookie: a=b\r\n\r\n"),
    ("authorization as trailer", b"0\r\nAuthorization: Bearer gp_x\r\n\r\n"),
    ("etag as trailer of a request", b"0\r\nETag: x\r\n\r\n"),
    ("65 trailers", b"0\r\n" + b"X: y\r\n" * 65 + b"\r\n"),
    ("long trailer", b"0\r\nX: " + b"y" * 8192 + b"\r\n\r\n"),
]


@pytest.mark.parametrize("data", [c[1] for c in REFUSED_CHUNKS], ids=[c[0] for c in REFUSED_CHUNKS])
def test_chunks_refused(data: bytes) -> None:
    with pytest.raises(BadHttp):
        ChunkedDecoder().feed(data)
    decoder = ChunkedDecoder()
    with pytest.raises(BadHttp):
        _ = [decoder.feed(data[i : i + 1]) for i in range(len(data))]


BODIES = [
    ("empty", b"0\r\n\r\n", b"", b"\r\n"),
    ("zeros", b"000000000000000\r\n\r\n", b"", b"\r\n"),
    ("two chunks", b"5\r\nhello\r\n001A\r\n" + b"x" * 26 + b"\r\n0\r\n\r\n", b"hello" + b"x" * 26, b"\r\n"),
    ("crlf in data", b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n", b"\r\n"),
    ("extensions", b'1;a;b=c;d="\\"\xe9 \t";e\r\nx\r\n0;z\r\n\r\n', b"x", b"\r\n"),
    ("extension of 254", b"1;" + b"a" * 253 + b"\r\nx\r\n0\r\n\r\n", b"x", b"\r\n"),
    ("trailers", b"1\r\nx\r\n0\r\nA: b\r\nC:\t\xe9 \r\n\r\n", b"x", b"A: b\r\nC:\t\xe9 \r\n\r\n"),
    ("64 trailers", b"0\r\n" + b"X: y\r\n" * 64 + b"\r\n", b"", b"X: y\r\n" * 64 + b"\r\n"),
    (
        "long name",
        b"0\r\n" + b"content-length" * 4 + b": y\r\n\r\n",
        b"",
        b"content-length" * 4 + b": y\r\n\r\n",
    ),
]


@pytest.mark.parametrize(("data", "body", "trailers"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_every_split_of_a_chunked_body(data: bytes, body: bytes, trailers: bytes) -> None:
    for split in range(len(data) + 1):
        decoder = ChunkedDecoder()
        first, used = decoder.feed(exactly(data[:split]))
        assert used == split
        assert decoder.ended == (split == len(data))
        second, used = decoder.feed(exactly(data[split:] + b"next"))
        assert (first + second, used) == (body, len(data) - split)
        assert decoder.trailers == trailers
        assert decoder.ended
        assert decoder.feed(b"next") == (b"", 0)
    decoder, pieces = ChunkedDecoder(), []
    for i in range(len(data)):
        pieces.append(decoder.feed(exactly(data[i : i + 1]))[0])
        assert decoder.ended == (i == len(data) - 1)
    assert b"".join(pieces) == body


def test_trailers_of_a_response() -> None:
    decoder = ChunkedDecoder(response=True)
    decoder.feed(b"0\r\nETag: x\r\n\r\n")
    assert decoder.ended
    with pytest.raises(BadHttp):
        ChunkedDecoder(response=True).feed(b"0\r\nSet-Cookie: x\r\n\r\n")


def test_a_huge_chunk_is_counted() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b"fffffffffffffff\r\n" + b"x" * 1000) == (b"x" * 1000, 1017)
    assert not decoder.ended


EXTENSIONS = st.lists(st.sampled_from([b"", b";a", b";a=b", b';a="\\"; x"']), min_size=1)


@given(st.lists(st.binary(min_size=1, max_size=40)), EXTENSIONS, st.lists(st.integers(1, 9)), st.booleans())
def test_chunked_bodies(pieces: list[bytes], extensions: list[bytes], steps: list[int], upper: bool) -> None:
    form = b"%X" if upper else b"%x"
    data = b"".join(
        form % len(piece) + extensions[i % len(extensions)] + b"\r\n" + piece + b"\r\n"
        for i, piece in enumerate(pieces)
    )
    data += b"0\r\n\r\n"
    decoder, body, at = ChunkedDecoder(), b"", 0
    for step in steps:
        body += decoder.feed(data[at : at + step])[0]
        at += step
    body += decoder.feed(data[at:])[0]
    assert body == b"".join(pieces)
    assert decoder.ended


# ── the same results as headers.py ────────────────────────────────────────────────────────────────────────────────

NAMES = st.sampled_from([
    b"Host", b"host", b"Connection", b"Cookie", b"cookie", b"Authorization", b"Upgrade", b"TE", b"Expect",
    b"X-A", b"x-a", b"X-B", b"X_Forwarded_For", b"X-Forwarded-Proto", b"forwarded", b"X.Guestpass.Email",
    b"x-guestpass-", b"X-Guest", b"Keep-Alive", b"Proxy-Authorization", b"Trailer", b"Content-Length",
    b"content-length", b"Transfer-Encoding", b"Set-Cookie", b"Cache-Control", b"cache-control", b"Alt-Svc",
    b"NEL", b"Clear-Site-Data", b"Content-Type", b"Via", b"True_Client_IP", b"Close", b"Bad Name", b"",
    b"X\xe9",
])  # fmt: skip
WORDS = [
    b"close",
    b"keep-alive",
    b"upgrade",
    b"Upgrade",
    b"websocket",
    b"x-a",
    b"X-B",
    b"te",
    b"host",
    b"cookie",
    b"a",
]
WORDS += [
    b"public",
    b"Private",
    b"no-store",
    b"s-maxage=5",
    b"max-age=1",
    b'private="x"',
    b"chunked",
    b"0",
    b"5",
    b"05",
]
WORDS += [
    b"__Host-guestpass=abc",
    b"__host-guestpass=x",
    b"__Host-gp-nonce=1",
    b"a=1",
    b"b=domain=2",
    b"Domain=x",
    b"=",
]
WORDS += [
    b"domain = .x",
    b"Path=/",
    b"__Host-guestpass",
    b"\xc2\xa0__Host-guestpass=x",
    b"Bearer gp_x",
    b"bearer  gp_y",
]
WORDS += [
    b"BEARER GP_z",
    b"Basic eA==",
    b"Bearer other",
    b"100-continue",
    b"example.org",
    b"[::1]:80",
    b"u@a",
    b"\xe9",
]
WORDS += [b"", b"x\x00", b"\x7f", b"\t"]
SEPARATORS = [b", ", b",", b"; ", b";", b" ", b"\t", b" ; "]
VALUES = st.one_of(
    st.sampled_from(WORDS),
    st.lists(st.sampled_from(WORDS + SEPARATORS), max_size=8).map(b"".join),
    st.binary(max_size=12),
)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=8)
SPACES = st.sampled_from([b": ", b":", b":  ", b":\t"])
BEARER = b"gp_"


def stripped(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value.strip(b" \t")) for name, value in fields]


def is_ours_too(fields: list[tuple[bytes, bytes]]) -> bool:
    """Not one of the few things that only the scanner refuses."""
    names = [name.lower() for name, _ in fields]
    once = {b"content-type", b"upgrade"}
    return (
        all(names.count(name) <= 1 for name in once)
        and b"\t" not in b"".join(h.values(fields, b"connection"))
        and not h.nominated(fields) & {b"host", b"content-length"}
        and h.values(fields, b"expect") in ([], [b"100-continue"])
        and b"transfer-encoding" not in names
        and b"upgrade" not in names
    )


@given(
    st.sampled_from(["GET", "POST", "OPTIONS", "TRACE"]),
    st.sampled_from([b"/", b"/a?b", b"*", b"x", b"/#"]),
    FIELDS,
    SPACES,
)
def test_requests_as_check_request(
    method: str, target: bytes, fields: list[tuple[bytes, bytes]], colon: bytes
) -> None:
    fields = [(b"Host", b"a.example"), *fields]
    data = b"%b %b HTTP/1.1\r\n" % (method.encode(), target)
    data += b"".join(name + colon + value + b"\r\n" for name, value in fields) + b"\r\n"
    clean = stripped(fields)
    try:
        h.check_request(method, target, clean, http11=True)
        accepted = True
    except h.BadRequest:
        accepted = False
    try:
        head = http1.parse_request(data)
    except BadHttp:
        assert not accepted or not is_ours_too(clean)
        return
    assert accepted
    assert head is not None
    assert head.fields == clean
    assert http1.request_for_gateway(data, b"X-Guestpass-Email: a\r\n", BEARER) == h.request_head(
        method,
        target,
        clean,
        inject=b"X-Guestpass-Email: a\r\n",
        bearer_prefix=BEARER,
        upgrade=head.upgrade == "websocket",
    )
    found, value = http1.cookies_named(data, h.SESSION_COOKIE)
    ours = value.decode("ascii", "replace") if found == 1 and value is not None else None
    assert ours == h.cookie(clean, h.SESSION_COOKIE)
    token = http1.bearer_token(data, BEARER)
    assert (token.decode("ascii", "replace") if token is not None else None) == h.bearer(
        clean, BEARER.decode()
    )


def test_an_upgrade_as_headers_writes_it() -> None:
    data = request(*UP, b"Sec-WebSocket-Key: x")
    expected = h.request_head(
        "GET",
        b"/",
        [
            (b"Host", b"a"),
            (b"Connection", b"Upgrade"),
            (b"Upgrade", b"websocket"),
            (b"Sec-WebSocket-Key", b"x"),
        ],
        inject=b"",
        bearer_prefix=BEARER,
        upgrade=True,
    )
    assert http1.request_for_gateway(data, b"", BEARER) == expected
    assert expected.count(b"Upgrade: websocket\r\n") == 1


def test_what_does_not_fit_the_tunnel() -> None:
    data = request(b"X: " + b"y" * 16_000, b"Y: " + b"y" * 14_000)
    room = MAX_HEAD - len(data)
    assert len(http1.request_for_gateway(data, b"z" * room, BEARER)) == MAX_HEAD
    with pytest.raises(BadHttp) as caught:
        http1.request_for_gateway(data, b"z" * (room + 1), BEARER)
    assert caught.value.status == 431


LINES = st.sampled_from([
    b"HTTP/1.1 200 OK", b"HTTP/1.1 404", b"HTTP/1.1 299", b"HTTP/1.1 500 ", b"HTTP/1.1 101 X",
    b"HTTP/1.1 103 Early Hints", b"HTTP/1.0 200 OK", b"HTTP/1.1 204 a\tb\xe9", b"HTTP/1.1 99 X",
    b"HTTP/1.1 304 Not Modified", b"HTTP/1.1 200 \x01",
])  # fmt: skip


@given(LINES, FIELDS, SPACES)
def test_responses_as_response_head(line: bytes, fields: list[tuple[bytes, bytes]], colon: bytes) -> None:
    data = line + b"\r\n" + b"".join(name + colon + value + b"\r\n" for name, value in fields) + b"\r\n"
    try:
        expected = h.parse_response(data)
    except h.BadResponse:
        # Bytes behind an empty line are no business of the scanner's.
        if data.index(b"\r\n\r\n") == len(data) - 4:
            with pytest.raises(BadHttp):
                http1.response_for_visitor(data)
        return
    try:
        written = http1.response_for_visitor(data)
    except BadHttp:
        clean = stripped(fields)
        assert b"\t" in b"".join(h.values(clean, b"connection")) or (
            expected.status < 200 and expected.length
        )
        return
    assert written + b"\r\n" == h.response_head(expected, b"", keep_alive=True, http11=True)


@pytest.mark.parametrize("status", range(100, 600))
def test_standard_reasons(status: int) -> None:
    data = b"HTTP/1.1 %d\r\n\r\n" % status
    expected = h.response_head(h.parse_response(data), b"", keep_alive=True, http11=True)
    assert http1.response_for_visitor(data) + b"\r\n" == expected


@given(st.lists(st.sampled_from(WORDS + SEPARATORS), max_size=12).map(b"".join), st.binary(max_size=30))
def test_reserved_as_headers(words: bytes, name: bytes) -> None:
    for candidate in (words, name, *(prefix[:-1] + name for prefix in h.RESERVED_PREFIXES)):
        assert http1.reserved(candidate) == h.is_reserved(candidate)
        assert http1.reserved(candidate, True) == h.fold(candidate).startswith(h.OUR_RESPONSE_PREFIX)


def test_the_largest_growth_fits() -> None:
    """Cookie and Cache-Control values may be written longer than they came: `a;b` as `a; b`."""
    cookie = b";".join([b"a"] * 7_000)
    data = request(b"Cookie:" + cookie)
    assert http1.request_for_gateway(data, b"", BEARER) == request(b"Cookie: " + b"; ".join([b"a"] * 7_000))
    cookie = b";".join([b"a"] * 10_000)
    with pytest.raises(BadHttp):
        http1.request_for_gateway(request(*(b"Cookie:" + cookie[:12_000],) * 2), b"", BEARER)
    written = http1.response_for_visitor(
        response(b"Set-Cookie:" + b";" * 16_000, b"Cache-Control:" + b"a," * 8_000)
    )
    assert written == (
        b"HTTP/1.1 200 OK\r\nSet-Cookie: "
        + b"; " * 16_000
        + b"\r\nCache-Control: private"
        + b", a" * 8_000
        + b"\r\n"
    )
