"""What an edge must refuse, what a proxy must do, and what an application must not be able to do, as data.

Each row names where it comes from. The tests are in test_tables.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from conformance.http.origins import FILES, START
from conformance.http.world import EMAIL

EVERYWHERE = tuple(START)


# ── refused ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Attack:
    """A request that is answered by the edge itself, after which the connection ends. {host}, {token}, {target} stand
    for what a good request has there."""

    name: str
    source: str
    data: bytes
    status: int


GOOD = b"Host: {host}\r\nAuthorization: Bearer {token}\r\n"
NEXT = b"GET /smuggled HTTP/1.1\r\n" + GOOD + b"\r\n"


def get(*lines: bytes, first: bytes = b"GET {target} HTTP/1.1", host: bytes = b"Host: {host}\r\n") -> bytes:
    more = b"".join(line + b"\r\n" for line in lines)
    return first + b"\r\n" + host + b"Authorization: Bearer {token}\r\n" + more + b"\r\n"


ATTACKS: tuple[Attack, ...] = (
    Attack("CONNECT", "RFC 9110, 9.3.6", get(first=b"CONNECT example.org:80 HTTP/1.1"), 405),
    Attack("CONNECT of a path", "RFC 9110, 9.3.6", get(first=b"CONNECT {target} HTTP/1.1"), 405),
    Attack(
        "CONNECT with a body that is a request",
        "aiohttp parses the body as a second request",
        get(b"Content-Length: 40", first=b"CONNECT example.org:80 HTTP/1.1") + NEXT,
        405,
    ),
    Attack("TRACE", "RFC 9110, 9.3.8", get(first=b"TRACE {target} HTTP/1.1"), 405),
    Attack("a method in lower case", "RFC 9110, 9.1", get(first=b"get {target} HTTP/1.1"), 501),
    Attack("a method that nobody knows", "RFC 9110, 9.1", get(first=b"FROBNICATE {target} HTTP/1.1"), 501),
    Attack("a method with a blank before", "RFC 9112, 3", get(first=b" GET {target} HTTP/1.1"), 400),
    Attack("HTTP/0.9", "RFC 9112, 3", b"GET {target}\r\n\r\n", 400),
    Attack("HTTP/2's preface", "RFC 9113, 3.4", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 501),
    Attack("HTTP/2.0", "RFC 9110, 2.5", get(first=b"GET {target} HTTP/2.0"), 505),
    Attack("HTTP/1.2", "RFC 9110, 2.5", get(first=b"GET {target} HTTP/1.2"), 505),
    Attack("no version", "RFC 9112, 3", get(first=b"GET {target} "), 400),
    Attack("something behind the version", "RFC 9112, 3", get(first=b"GET {target} HTTP/1.1 x"), 400),
    Attack("TLS to a plain port", "", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), 400),
    Attack(
        "absolute form, other host", "RFC 9112, 3.2.2", get(first=b"GET http://evil.example/ HTTP/1.1"), 400
    ),
    Attack(
        "absolute form, own host", "RFC 9112, 3.2.2", get(first=b"GET http://{host}{target} HTTP/1.1"), 400
    ),
    Attack("authority form", "RFC 9112, 3.2.3", get(first=b"GET {host} HTTP/1.1"), 400),
    Attack("* with GET", "RFC 9112, 3.2.4", get(first=b"GET * HTTP/1.1"), 400),
    Attack("a target without a slash", "RFC 9112, 3.2", get(first=b"GET x{target} HTTP/1.1"), 400),
    Attack("a fragment", "RFC 9112, 3.2", get(first=b"GET {target}#f HTTP/1.1"), 400),
    Attack("a blank in the target", "RFC 9112, 3.2", get(first=b"GET {target} x HTTP/1.1"), 400),
    Attack("a byte beyond ASCII in the target", "RFC 3986", get(first=b"GET {target}\xe9 HTTP/1.1"), 400),
    Attack("NUL in the target", "RFC 3986", get(first=b"GET {target}\0 HTTP/1.1"), 400),
    Attack("a tab in the target", "RFC 3986", get(first=b"GET {target}\tx HTTP/1.1"), 400),
    Attack("a target of 17 KB", "RFC 9112, 3", get(first=b"GET {target}" + b"a" * 17000 + b" HTTP/1.1"), 414),
    Attack("no Host", "RFC 9112, 3.2", get(host=b""), 400),
    Attack("no Host, HTTP/1.0", "ours", get(host=b"", first=b"GET {target} HTTP/1.0"), 400),
    Attack("Host empty", "RFC 9112, 3.2", get(host=b"Host: \r\n"), 400),
    Attack("Host twice", "RFC 9112, 3.2", get(b"Host: {host}"), 400),
    Attack(
        "Host twice, the other one first", "RFC 9112, 3.2", get(b"Host: {host}", host=b"Host: evil\r\n"), 400
    ),
    Attack("Host with a path", "RFC 9110, 7.2", get(host=b"Host: {host}/x\r\n"), 400),
    Attack("Host with a user", "RFC 9110, 7.2", get(host=b"Host: evil@{host}\r\n"), 400),
    Attack("Host with two names", "RFC 9110, 7.2", get(host=b"Host: {host}, evil.example\r\n"), 400),
    Attack("Host with a blank inside", "RFC 9110, 7.2", get(host=b"Host: {host} evil.example\r\n"), 400),
    Attack("Host with a port of letters", "RFC 9110, 7.2", get(host=b"Host: a:b\r\n"), 400),
    Attack("Host with an underscore", "RFC 952", get(host=b"Host: a_b\r\n"), 400),
    Attack("Connection names Host", "RFC 9110, 7.6.1", get(b"Connection: Host"), 400),
    Attack(
        "Connection names Content-Length",
        "RFC 9110, 7.6.1",
        get(b"Connection: Content-Length", b"Content-Length: 0"),
        400,
    ),
    Attack("a field of 17 KB", "RFC 9110, 5.4", get(b"X-A: " + b"a" * 17000), 431),
    Attack("a head of 40 KB", "RFC 9110, 5.4", get(*(b"X-%d: " % n + b"a" * 4000 for n in range(10))), 431),
    Attack("130 fields", "RFC 9110, 5.4", get(*(b"X-%d: a" % n for n in range(130))), 431),
    Attack(
        "a 100 MB head that has begun", "RFC 9110, 5.4", b"GET {target} HTTP/1.1\r\nX: " + b"a" * 200_000, 431
    ),
    Attack("a folded line", "RFC 9112, 5.2", get(b"X-A: b", b" c"), 400),
    Attack("a blank before the colon", "RFC 9112, 5.1", get(b"X-A : b"), 400),
    Attack("a name with a blank", "RFC 9112, 5.1", get(b"X A: b"), 400),
    Attack("a field without a name", "RFC 9112, 5.1", get(b": b"), 400),
    Attack("a field without a colon", "RFC 9112, 5", get(b"X-A"), 400),
    Attack("bare LF", "RFC 9112, 2.2", get().replace(b"\r\n", b"\n"), 400),
    Attack("bare CR in a value", "RFC 9110, 5.5", get(b"X-A: b\rX-B: c"), 400),
    Attack("NUL in a value", "RFC 9110, 5.5", get(b"X-A: b\0c"), 400),
    Attack(
        "CL.TE",
        "RFC 9112, 6.3",
        get(b"Content-Length: 6", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + NEXT,
        400,
    ),
    Attack(
        "TE.CL",
        "RFC 9112, 6.3",
        get(b"Transfer-Encoding: chunked", b"Content-Length: 3") + b"0\r\n\r\n" + NEXT,
        400,
    ),
    Attack(
        "TE.TE",
        "RFC 9112, 6.1",
        get(b"Transfer-Encoding: chunked", b"Transfer-Encoding: x") + b"0\r\n\r\n" + NEXT,
        400,
    ),
    Attack("CL.CL", "RFC 9112, 6.3", get(b"Content-Length: 0", b"Content-Length: 5") + NEXT, 400),
    Attack("a list of lengths, all the same", "RFC 9112, 6.3", get(b"Content-Length: 0, 0") + NEXT, 400),
    Attack(
        "TE: gzip, chunked",
        "RFC 9112, 6.1",
        get(b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n" + NEXT,
        400,
    ),
    Attack(
        "HTTP/1.0 with chunks",
        "RFC 9112, 6.1",
        get(b"Transfer-Encoding: chunked", b"Connection: keep-alive", first=b"POST {target} HTTP/1.0")
        + b"0\r\n\r\n"
        + NEXT,
        400,
    ),
    Attack("Expect twice", "RFC 9110, 10.1.1", get(b"Expect: 100-continue", b"Expect: 100-continue"), 400),
    Attack("an expectation that nobody knows", "RFC 9110, 10.1.1", get(b"Expect: 200-ok"), 417),
    Attack(
        "Content-Type twice", "RFC 9110, 8.3", get(b"Content-Type: text/html", b"Content-Type: text/css"), 400
    ),
    Attack(
        "WebSocket by POST",
        "RFC 6455, 4.1",
        get(b"Connection: Upgrade", b"Upgrade: websocket", first=b"POST {target} HTTP/1.1"),
        400,
    ),
    Attack(
        "WebSocket with a body",
        "RFC 6455, 4.1",
        get(b"Connection: Upgrade", b"Upgrade: websocket", b"Content-Length: 5") + b"hello",
        400,
    ),
    Attack(
        "WebSocket of HTTP/1.0",
        "RFC 9110, 7.8",
        get(b"Connection: Upgrade", b"Upgrade: websocket", first=b"GET {target} HTTP/1.0"),
        400,
    ),
    Attack(
        "WebSocket's draft 76",
        "hixie-76",
        get(b"Connection: Upgrade", b"Upgrade: WebSocket", b"Sec-WebSocket-Key1: 4 @1  46546xW%0l 1 5"),
        400,
    ),
    Attack(
        "Upgrade named by Proxy-Connection",
        "RFC 9112, C.2.2",
        get(b"Proxy-Connection: Upgrade", b"Upgrade: websocket"),
        400,
    ),
)


# ── done ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Duty:
    """A request that is forwarded: what the origin must receive, and what the visitor must get.

    `received` and `answer` have the values of a field in order; an empty tuple: the field must be absent. CGI has
    repeated fields as one. {host} and {url} stand for the share's host and the application's address.
    """

    name: str
    source: str
    lines: tuple[str, ...] = ()
    method: str = "GET"
    target: str = "/duty"
    version: str = "HTTP/1.1"
    body: bytes = b""
    """As it is sent, in chunks if the fields say so."""
    read: bytes = b""
    """The body that the origin reads."""
    status: int = 200
    received: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interim: tuple[int, ...] = ()
    """Beside 100, which is not sent where the body came with the head (RFC 9110, 10.1.1)."""
    content: bytes | None = None
    """What the answer's body is; None: what the origin likes."""
    keeps: bool = True
    """Whether another request may follow on the connection."""
    origins: tuple[str, ...] = EVERYWHERE


CHUNKED = "Transfer-Encoding: chunked"
STATIC = "/static/file.txt"
FOO = b"3\r\nfoo\r\n0\r\n\r\n"

DUTIES: tuple[Duty, ...] = (
    Duty(
        "what Connection names is dropped",
        "RFC 9110, 7.6.1",
        ("Connection: X-Hop", "X-Hop: 1", "X-End: 2"),
        received={"Connection": (), "X-Hop": (), "X-End": ("2",)},
    ),
    Duty(
        "what several Connection fields name is dropped",
        "RFC 9110, 7.6.1",
        ("Connection: x-hop", "X-HOP: 1", "connection: keep-alive, X-Other", "X-Other: 1"),
        received={"X-Hop": (), "X-Other": ()},
    ),
    Duty(
        "Connection cannot take away what the edge says",
        "ours",
        ("Connection: X-Guestpass-Email, X-Forwarded-For, Forwarded, Via",),
        received={
            "X-Guestpass-Email": (EMAIL,),
            "X-Forwarded-For": ("127.0.0.1",),
            "Via": ("1.1 guestpass",),
        },
    ),
    Duty("Keep-Alive is dropped", "RFC 9110, 7.6.1", ("Keep-Alive: timeout=5",), received={"Keep-Alive": ()}),
    Duty(
        "Proxy-Connection is dropped",
        "RFC 9110, 7.6.1",
        ("Proxy-Connection: keep-alive",),
        received={"Proxy-Connection": ()},
    ),
    Duty(
        "Proxy-Authorization is dropped",
        "RFC 9110, 11.7.2",
        ("Proxy-Authorization: Basic YTpi",),
        received={"Proxy-Authorization": ()},
    ),
    Duty("TE is dropped", "RFC 9110, 10.1.4", ("Connection: TE", "TE: trailers"), received={"TE": ()}),
    Duty("TE is dropped, also unnamed", "RFC 9110, 10.1.4", ("TE: trailers, gzip",), received={"TE": ()}),
    Duty("Trailer is dropped", "RFC 9110, 6.6.2", ("Trailer: X-Sum",), received={"Trailer": ()}),
    Duty(
        "an upgrade that is not granted is dropped",
        "RFC 9110, 7.8",
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"),
        received={"Upgrade": (), "HTTP2-Settings": (), "Connection": ()},
    ),
    Duty(
        "an upgrade to TLS is dropped",
        "RFC 2817",
        ("Connection: Upgrade", "Upgrade: TLS/1.0"),
        received={"Upgrade": ()},
    ),
    Duty("Via is added", "RFC 9110, 7.6.3", received={"Via": ("1.1 guestpass",)}),
    Duty(
        "a visitor's Via stays before ours",
        "RFC 9110, 7.6.3",
        ("Via: 1.1 office",),
        received={"Via": ("1.1 office", "1.1 guestpass")},
    ),
    Duty(
        "repeated fields keep their order",
        "RFC 9110, 5.3",
        ("X-A: 1", "X-B: x", "X-A: 2", "x-a: 3"),
        received={"X-A": ("1", "2", "3"), "X-B": ("x",)},
    ),
    Duty(
        "an empty value stays",
        "RFC 9110, 5.5",
        ("X-Empty:",),
        received={"X-Empty": ("",)},
        origins=("node", "aiohttp", "uvicorn"),
    ),
    Duty("white space around a value goes", "RFC 9112, 5.1", ("X-A: \t b c \t",), received={"X-A": ("b c",)}),
    Duty(
        "bytes beyond ASCII stay",
        "RFC 9110, 5.5",
        ("X-A: \xe9t\xe9",),
        received={"X-A": ("\xe9t\xe9",)},
        origins=("node", "aiohttp", "uvicorn"),
    ),
    Duty(
        "Accept-Encoding is the visitor's",
        "ours",
        ("Accept-Encoding: br, gzip;q=0.5",),
        received={"Accept-Encoding": ("br, gzip;q=0.5",)},
    ),
    Duty("cookies stay", "RFC 6265, 5.4", ("Cookie: a=1; b=2",), received={"Cookie": ("a=1; b=2",)}),
    Duty("Host is the application's own", "gateway.toml, host_header", received={"Host": ("{app}",)}),
    Duty(
        "Origin and Referer are the application's own",
        "gateway.toml, host_header",
        ("Origin: {origin}", "Referer: {origin}/x?y"),
        received={"Origin": ("{url}",), "Referer": ("{url}/x?y",)},
    ),
    Duty(
        "another Origin stays",
        "gateway.toml, host_header",
        ("Origin: https://evil.example",),
        received={"Origin": ("https://evil.example",)},
    ),
    Duty("the target is not decoded", "RFC 3986, 6", target="/a%2Fb/%0d%0aX:%20y/%2e%2e/?q=%00&r=%2F"),
    Duty(
        "the target is not normalised",
        "RFC 3986, 6",
        target="/a//b/./c/../d?x=/../y",
        origins=("node", "aiohttp", "uvicorn", "nginx"),
    ),
    Duty(
        "an empty query stays", "RFC 3986, 3.4", target="/a?", origins=("nginx", "apache", "node", "aiohttp")
    ),
    Duty("? and & in a query", "RFC 3986, 3.4", target="/a?b=?&c=;d"),
    Duty("a body with a length", "RFC 9112, 6.2", ("Content-Length: 3",), "POST", body=b"foo", read=b"foo"),
    Duty("a body in chunks", "RFC 9112, 7.1", (CHUNKED,), "POST", body=FOO, read=b"foo"),
    Duty(
        "chunks are framed anew, without extensions",
        "RFC 9112, 7.1.1",
        (CHUNKED,),
        "POST",
        body=b'1;a=b\r\nf\r\n2;c="d"\r\noo\r\n0;e\r\n\r\n',
        read=b"foo",
    ),
    Duty(
        "trailers never become fields",
        "RFC 9110, 6.5.1",
        (CHUNKED, "Trailer: X-Guestpass-Email, X-A"),
        "POST",
        body=b"3\r\nfoo\r\n0\r\nX-A: b\r\nX-Guestpass-Email: eve@evil.example\r\n\r\n",
        read=b"foo",
        received={"X-A": (), "X-Guestpass-Email": (EMAIL,)},
    ),
    Duty("a GET with a body", "RFC 9110, 9.3.1", ("Content-Length: 3",), body=b"foo", read=b"foo"),
    Duty("a GET with chunks", "RFC 9110, 9.3.1", (CHUNKED,), body=FOO, read=b"foo"),
    Duty(
        "a DELETE with a body", "RFC 9110, 9.3.5", ("Content-Length: 3",), "DELETE", body=b"foo", read=b"foo"
    ),
    Duty("a POST with a length of 0", "RFC 9110, 8.6", ("Content-Length: 0",), "POST"),
    Duty("a POST without a body", "RFC 9110, 8.6", (), "POST"),
    Duty("chunks without a byte", "RFC 9112, 7.1", (CHUNKED,), "POST", body=b"0\r\n\r\n"),
    Duty("PROPFIND", "RFC 4918", ("Depth: 1",), "PROPFIND", received={"Depth": ("1",)}),
    Duty("OPTIONS", "RFC 9110, 9.3.7", (), "OPTIONS"),
    Duty(
        "Max-Forwards is counted down",
        "RFC 9110, 7.6.2",
        ("Max-Forwards: 7",),
        "OPTIONS",
        received={"Max-Forwards": ("6",)},
        origins=("nginx", "node", "aiohttp", "uvicorn"),  # Apache, a proxy here, counts as well
    ),
    Duty(
        "Max-Forwards of other methods stays",
        "RFC 9110, 7.6.2",
        ("Max-Forwards: 0",),
        received={"Max-Forwards": ("0",)},
        origins=("nginx", "node", "aiohttp", "uvicorn"),  # Apache refuses it
    ),
    Duty(
        "Max-Forwards that has run out is answered here",
        "RFC 9110, 7.6.2",
        ("Max-Forwards: 0",),
        "OPTIONS",
        status=204,
        content=b"",
        answer={"X-Seen": ()},
    ),
    Duty(
        "a target that begins with //",
        "RFC 3986, 3.3",
        target="//evil.example/x",
        origins=("nginx", "node", "uvicorn"),
    ),
    Duty("an empty line before", "RFC 9112, 2.2", method="\r\nGET"),
    Duty(
        "Expect: 100-continue is answered here",
        "RFC 9110, 10.1.1",
        ("Expect: 100-continue", "Content-Length: 3"),
        "POST",
        body=b"foo",
        read=b"foo",
        received={"Expect": ()},
    ),
    Duty(
        "Expect of HTTP/1.0 is ignored",
        "RFC 9110, 10.1.1",
        ("Expect: 100-continue", "Content-Length: 3"),
        "POST",
        version="HTTP/1.0",
        body=b"foo",
        read=b"foo",
        keeps=False,
    ),
    Duty(
        "HTTP/1.0 gets no chunks, and an end",
        "RFC 9112, 6.1",
        version="HTTP/1.0",
        answer={"Transfer-Encoding": (), "Connection": ()},
        keeps=False,
    ),
    Duty(
        "HTTP/1.0 is sent on as HTTP/1.1",
        "RFC 9112, 2.3",
        version="HTTP/1.0",
        received={"Via": ("1.1 guestpass",)},
        keeps=False,
    ),
    Duty(
        "Connection: close is obeyed",
        "RFC 9112, 9.6",
        ("Connection: close",),
        answer={"Connection": ("close",)},
        keeps=False,
    ),
    Duty("HEAD has no body", "RFC 9110, 9.3.2", (), "HEAD", content=b""),
    Duty(
        "HEAD of a file has its length",
        "RFC 9110, 9.3.2",
        (),
        "HEAD",
        STATIC,
        content=b"",
        answer={"Content-Length": ("95000",)},
        origins=FILES,
    ),
    Duty(
        "204 has neither body nor length",
        "RFC 9110, 8.6",
        target="/status/204",
        status=204,
        content=b"",
        answer={"Content-Length": (), "Transfer-Encoding": ()},
    ),
    Duty(
        "304 has no body",
        "RFC 9110, 15.4.5",
        target="/status/304",
        status=304,
        content=b"",
        answer={"Transfer-Encoding": ()},
    ),
    Duty(
        "a HEAD that is answered 204", "RFC 9110, 9.3.2", (), "HEAD", "/status/204", status=204, content=b""
    ),
    Duty("103 is passed on", "RFC 8297", target="/early-hints", interim=(103,), origins=("node",)),
    Duty(
        "103 is not for HTTP/1.0",
        "RFC 9110, 15.2",
        target="/early-hints",
        version="HTTP/1.0",
        keeps=False,
        origins=("node",),
    ),
    Duty(
        "an answer's trailers never become fields",
        "RFC 9110, 6.5.1",
        target="/trailers",
        answer={"X-Checksum": (), "X-Guestpass-Email": (), "Trailer": ()},
        origins=("node",),
    ),
    Duty(
        "a range",
        "RFC 9110, 14",
        ("Range: bytes=1-4",),
        target=STATIC,
        status=206,
        content=b'!"#$',
        answer={"Content-Range": ("bytes 1-4/95000",), "Content-Length": ("4",)},
        origins=FILES,
    ),
    Duty(
        "the end of a file",
        "RFC 9110, 14",
        ("Range: bytes=-2",),
        target=STATIC,
        status=206,
        content=b"}~",
        origins=FILES,
    ),
    Duty(
        "a range that is not there",
        "RFC 9110, 15.5.17",
        ("Range: bytes=99999-",),
        target=STATIC,
        status=416,
        answer={"Content-Range": ("bytes */95000",)},
        origins=("nginx",),
    ),
    Duty(
        "If-Range that does not hold",
        "RFC 9110, 13.1.5",
        ('If-Range: "no"', "Range: bytes=0-0"),
        target=STATIC,
        answer={"Content-Length": ("95000",), "Content-Range": ()},
        origins=FILES,
    ),
    Duty(
        "If-None-Match: *",
        "RFC 9110, 13.1.2",
        ("If-None-Match: *",),
        target=STATIC,
        status=304,
        content=b"",
        origins=("apache",),
    ),
    Duty(
        "If-Modified-Since",
        "RFC 9110, 13.1.3",
        ("If-Modified-Since: Sun, 09 Sep 2001 01:46:40 GMT",),
        target=STATIC,
        status=304,
        content=b"",
        origins=FILES,
    ),
    Duty(
        "If-Match that does not hold",
        "RFC 9110, 13.1.1",
        ('If-Match: "no"',),
        target=STATIC,
        status=412,
        origins=FILES,
    ),
    Duty(
        "If-Unmodified-Since that does not hold",
        "RFC 9110, 13.1.4",
        ("If-Unmodified-Since: Sat, 01 Jan 2000 00:00:00 GMT",),
        target=STATIC,
        status=412,
        origins=FILES,
    ),
    Duty(
        "an answer is for nobody else",
        "RFC 9111, 5.2.2.7",
        target=STATIC,
        answer={"Cache-Control": ("private",)},
        origins=FILES,
    ),
)


# ── what an application cannot do ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Answered:
    """What an application writes, and what becomes of it. None: the answer breaks off, which the visitor sees.

    {origin} is the share's origin, {url} the application's own, {app} its host.
    """

    name: str
    source: str
    data: str
    status: int | None
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    body: bytes | None = None
    kind: str = "raw"
    method: str = "GET"


def ok(*lines: str, body: str = "ok", first: str = "HTTP/1.1 200 OK") -> str:
    return "\r\n".join((first, f"Content-Length: {len(body)}", *lines, "", body))


EVIL_ANSWER = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX-Seen: evil\r\n\r\nevil"


def location(name: str, value: str, expected: str, field_name: str = "Location") -> Answered:
    return Answered(
        f"{field_name} {name}",
        "RFC 9110, 7.7 and 10.2.2",
        ok(f"{field_name}: {value}", first="HTTP/1.1 302 Found"),
        302,
        {field_name: (expected,)},
    )


ANSWERS: tuple[Answered, ...] = (
    Answered("a second answer behind the first", "queue poisoning", ok() + EVIL_ANSWER, 200, body=b"ok"),
    Answered("surplus bytes", "queue poisoning", ok() + "x" * 100, 200, body=b"ok"),
    Answered("an answer that nobody asked for", "queue poisoning", EVIL_ANSWER, 200, kind="unasked"),
    Answered(
        "a body behind 204", "RFC 9112, 6.3", "HTTP/1.1 204 No Content\r\n\r\n" + EVIL_ANSWER, 204, body=b""
    ),
    Answered(
        "a body behind 304", "RFC 9112, 6.3", "HTTP/1.1 304 Not Modified\r\n\r\n" + EVIL_ANSWER, 304, body=b""
    ),
    Answered("a body for HEAD", "RFC 9112, 6.3", ok() + EVIL_ANSWER, 200, body=b"", method="HEAD"),
    Answered(
        "204 that announces a body",
        "RFC 9110, 8.6",
        "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
        204,
        {"Content-Length": ()},
        b"",
    ),
    Answered(
        "length and chunks",
        "RFC 9112, 6.3",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        502,
    ),
    Answered(
        "two lengths",
        "RFC 9112, 6.3",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 4\r\n\r\nevil",
        502,
    ),
    Answered(
        "a list of lengths", "RFC 9112, 6.3", "HTTP/1.1 200 OK\r\nContent-Length: 2, 4\r\n\r\nevil", 502
    ),
    Answered("a length of letters", "RFC 9112, 6.3", "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", 502),
    Answered("a negative length", "RFC 9112, 6.3", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", 502),
    Answered(
        "gzip, chunked",
        "RFC 9112, 6.1",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        502,
    ),
    Answered(
        "a folded field", "RFC 9112, 5.2", "HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nContent-Length: 0\r\n\r\n", 502
    ),
    Answered(
        "bare LF",
        "response splitting",
        "HTTP/1.1 200 OK\r\nX-A: b\nSet-Cookie: evil=1\r\nContent-Length: 0\r\n\r\n",
        502,
    ),
    Answered(
        "bare CR",
        "response splitting",
        "HTTP/1.1 200 OK\r\nX-A: b\rSet-Cookie: evil=1\r\nContent-Length: 0\r\n\r\n",
        502,
    ),
    Answered(
        "NUL in a value", "RFC 9110, 5.5", "HTTP/1.1 200 OK\r\nX-A: b\0c\r\nContent-Length: 0\r\n\r\n", 502
    ),
    Answered(
        "a blank before the colon",
        "RFC 9112, 5.1",
        "HTTP/1.1 200 OK\r\nX-A : b\r\nContent-Length: 0\r\n\r\n",
        502,
    ),
    Answered("not an answer", "RFC 9112, 4", "hello\r\n\r\n", 502),
    Answered("status 99", "RFC 9110, 15", "HTTP/1.1 099 Low\r\nContent-Length: 0\r\n\r\n", 502),
    Answered("status 600", "RFC 9110, 15", "HTTP/1.1 600 High\r\nContent-Length: 0\r\n\r\n", 502),
    Answered("status of four digits", "RFC 9112, 4", "HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n", 502),
    Answered("HTTP/2", "RFC 9112, 4", "HTTP/2 200\r\nContent-Length: 0\r\n\r\n", 502),
    Answered(
        "101 unasked",
        "RFC 9110, 15.2.2",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        502,
    ),
    Answered("too many interim answers", "ours", "HTTP/1.1 103 Early Hints\r\n\r\n" * 40 + ok(), 502),
    Answered("nothing", "RFC 9110, 15.6.3", "", 502, kind="close"),
    Answered("half a head", "RFC 9110, 15.6.3", "HTTP/1.1 200 OK\r\nX-A", 502, kind="close"),
    Answered(
        "fewer bytes than it said",
        "RFC 9112, 8",
        "HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\nshort",
        None,
        kind="close",
    ),
    Answered(
        "chunks without an end",
        "RFC 9112, 8",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        None,
        kind="close",
    ),
    Answered(
        "chunks that are none",
        "RFC 9112, 7.1",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nx\r\n",
        None,
    ),
    Answered(
        "a body up to the end",
        "RFC 9112, 6.3",
        "HTTP/1.1 200 OK\r\n\r\nthe end",
        200,
        body=b"the end",
        kind="close",
    ),
    Answered(
        "HTTP/1.0 up to the end",
        "RFC 9112, 6.3",
        "HTTP/1.0 200 OK\r\n\r\nthe end",
        200,
        body=b"the end",
        kind="close",
    ),
    Answered(
        "hop-by-hop fields",
        "RFC 9110, 7.6.1",
        ok(
            "Connection: keep-alive, X-Hop",
            "X-Hop: 1",
            "Keep-Alive: timeout=5",
            "Proxy-Authenticate: Basic",
            "Upgrade: h2c",
            "X-End: 1",
        ),
        200,
        {"X-Hop": (), "Keep-Alive": (), "Proxy-Authenticate": (), "Upgrade": (), "X-End": ("1",)},
    ),
    Answered(
        "what speaks for the domain or outlives the share",
        "security chapter 3",
        ok(
            'Alt-Svc: h3=":443"',
            'NEL: {"report_to":"x","max_age":9}',
            'Report-To: {"group":"x"}',
            'Reporting-Endpoints: x="https://evil.example"',
            "Strict-Transport-Security: max-age=9; includeSubDomains",
            "Service-Worker-Allowed: /",
            'Clear-Site-Data: "*"',
        ),
        200,
        dict.fromkeys(
            ("Alt-Svc", "NEL", "Report-To", "Reporting-Endpoints", "Strict-Transport-Security")
            + ("Service-Worker-Allowed", "Clear-Site-Data"),
            (),
        ),
    ),
    Answered(
        "names of ours",
        "ours",
        ok("X-Guestpass-Email: eve@evil.example", "x_guestpass.share: 1"),
        200,
        {"X-Guestpass-Email": (), "x_guestpass.share": ()},
    ),
    Answered(
        "cookies for the domain",
        "RFC 6265, 5.3",
        ok(
            "Set-Cookie: a=1; Domain=localhost; Path=/",
            "Set-Cookie: b=2; path=/; DOMAIN = .share.example; HttpOnly",
            "Set-Cookie: c=3;domain=",
            "Set-Cookie: d=Domain=x",
        ),
        200,
        {"Set-Cookie": ("a=1; Path=/", "b=2; path=/; HttpOnly", "c=3", "d=Domain=x")},
    ),
    Answered(
        "cookies of ours",
        "ours",
        ok(
            "Set-Cookie: __Host-guestpass=evil; Path=/; Secure",
            "Set-Cookie: __HOST-GUESTPASS=evil; Path=/; Secure",
            "Set-Cookie: =__Host-guestpass=evil; Path=/; Secure",
            "Set-Cookie: __Host-gp-nonce=evil; Path=/; Secure",
            "Set-Cookie:  \t__Host-guestpass=evil",
            "Set-Cookie: ok=1",
        ),
        200,
        {"Set-Cookie": ("ok=1",)},
    ),
    Answered(
        "a public answer",
        "RFC 9111, 5.2.2",
        ok("Cache-Control: public, max-age=60, s-maxage=90"),
        200,
        {"Cache-Control": ("private, max-age=60",)},
    ),
    Answered("no Cache-Control", "RFC 9111, 5.2.2", ok(), 200, {"Cache-Control": ("private",)}),
    Answered(
        "no-store stays",
        "RFC 9111, 5.2.2",
        ok("Cache-Control: no-store"),
        200,
        {"Cache-Control": ("no-store",)},
    ),
    location("of the application", "{url}/login?next=/x", "{origin}/login?next=/x"),
    location("of the application, without a path", "{url}", "{origin}"),
    location("of the application, over https", "https://{app}/login", "{origin}/login"),
    location("of the application, without a scheme", "//{app}/login", "{origin}/login"),
    location("of the application, in capitals", "HTTP://{app}/login", "{origin}/login"),
    location("of a neighbour's port", "{url}0/login", "{url}0/login"),
    location("of a longer name", "{url}.evil.example/", "{url}.evil.example/"),
    location("with the application as a user", "http://{app}@evil.example/", "http://{app}@evil.example/"),
    location(
        "of somebody else",
        "https://idp.example.org/authorize?back={url}",
        "https://idp.example.org/authorize?back={url}",
    ),
    location("without a host", "/login", "/login"),
    location("of the application", "{url}/a", "{origin}/a", "Content-Location"),
    location("of the application", "0; url={url}/a", "0; url={origin}/a", "Refresh"),
    location("of the application, quoted", "5;URL='{url}/a'", "5;URL='{origin}/a'", "Refresh"),
    location("of the application, no url=", "5, {url}/a", "5, {origin}/a", "Refresh"),
    location("without an address", "30", "30", "Refresh"),
    location(
        "of somebody else",
        "0; url=https://evil.example/?{url}",
        "0; url=https://evil.example/?{url}",
        "Refresh",
    ),
    Answered(
        "links in a body are left alone",
        "docs/sharing.md",
        ok(body='<a href="http://127.0.0.1:3000/x">'),
        200,
        body=b'<a href="http://127.0.0.1:3000/x">',
    ),
)
