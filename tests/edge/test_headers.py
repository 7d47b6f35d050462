"""Header fields through the edge: refusals, hop-by-hop, spoofs, cookies, response heads. One row, one test."""

from __future__ import annotations

import ipaddress

import pytest

from guestpass.edge import headers as h

HOST = (b"Host", b"a.share.example.org")


def head_of(
    *fields: tuple[bytes, bytes], upgrade: bool = False, inject: bytes = b"X-Guestpass-Email: a@x.org\r\n"
) -> bytes:
    return h.request_head("GET", b"/x", [HOST, *fields], inject=inject, bearer_prefix=b"gp_", upgrade=upgrade)


@pytest.mark.parametrize(
    ("method", "target", "fields", "status"),
    [
        ("CONNECT", b"/", [HOST], 405),
        ("TRACE", b"/", [HOST], 405),
        ("GET", b"http://other/x", [HOST], 400),
        ("GET", b"/a#b", [HOST], 400),
        ("GET", b"x", [HOST], 400),
        ("GET", b"*", [HOST], 400),
        ("GET", b"/a b", [HOST], 400),
        ("GET", b"/\xe9", [HOST], 400),
        ("GET", b"/", [], 400),
        ("GET", b"/", [HOST, HOST], 400),
        ("GET", b"/", [(b"Host", b"")], 400),
        ("GET", b"/", [(b"Host", b"a/b")], 400),
        ("GET", b"/", [(b"Host", b"u@a")], 400),
        ("GET", b"/", [(b"Host", b"a, b")], 400),
        ("GET", b"/", [(b"Host", b"a:b")], 400),
        ("POST", b"/", [HOST, (b"Content-Length", b"0005")], 400),
        ("POST", b"/", [HOST, (b"Content-Length", b"+5")], 400),
        ("POST", b"/", [HOST, (b"Content-Length", b"5"), (b"content-length", b"5")], 400),
        ("POST", b"/", [HOST, (b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked")], 400),
        ("POST", b"/", [HOST, (b"Transfer-Encoding", b",chunked")], 400),
        ("POST", b"/", [HOST, (b"Transfer-Encoding", b"gzip, chunked")], 400),
        ("POST", b"/", [HOST, (b"Transfer-Encoding", b"identity")], 400),
        ("POST", b"/", [HOST, (b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"chunked")], 400),
        ("GET", b"/", [HOST, (b"Expect", b"100-continue"), (b"Expect", b"100-continue")], 400),
        ("GET", b"/", [HOST, (b"Bad Name", b"x")], 400),
        ("GET", b"/", [HOST, (b"X", b"a\x00b")], 400),
        ("GET", b"/", [HOST, (b"X", b"a\rb")], 400),
        ("GET", b"/", [HOST, *[(b"X-%d" % i, b"y") for i in range(128)]], 431),
        ("GET", b"/", [HOST, (b"X", b"y" * 32768)], 431),
    ],
)
def test_refused(method: str, target: bytes, fields: list[tuple[bytes, bytes]], status: int) -> None:
    with pytest.raises(h.BadRequest) as caught:
        h.check_request(method, target, fields, http11=True)
    assert caught.value.status == status


def test_http10_with_chunked_is_refused() -> None:
    with pytest.raises(h.BadRequest):
        h.check_request("POST", b"/", [HOST, (b"Transfer-Encoding", b"chunked")], http11=False)


@pytest.mark.parametrize(
    ("method", "target", "fields"),
    [
        ("GET", b"/", [HOST]),
        ("OPTIONS", b"*", [HOST]),
        ("GET", b"/a%20b?q=%2f..&x=[1]|", [(b"host", b"A.example:8080")]),
        ("GET", b"/", [(b"Host", b"[::1]:8080")]),
        ("POST", b"/", [HOST, (b"Content-Length", b"0")]),
        ("POST", b"/", [HOST, (b"Transfer-Encoding", b"Chunked")]),
        ("PROPFIND", b"/dav/", [HOST, (b"X", b"caf\xe9")]),
    ],
)
def test_accepted(method: str, target: bytes, fields: list[tuple[bytes, bytes]]) -> None:
    h.check_request(method, target, fields, http11=True)


HOP = [
    b"Connection",
    b"Keep-Alive",
    b"Proxy-Connection",
    b"Proxy-Authorization",
    b"TE",
    b"Trailer",
    b"Transfer-Encoding",
]


@pytest.mark.parametrize("name", [*HOP, b"Upgrade", b"Expect"])
def test_hop_by_hop_is_dropped(name: bytes) -> None:
    assert name.lower() + b":" not in head_of((name, b"x")).lower()


def test_what_connection_names_is_dropped_before_identity_is_injected() -> None:
    head = head_of(
        (b"Connection", b"close, X-Guestpass-Email , x-secret"), (b"X-Secret", b"1"), (b"X-Kept", b"2")
    )
    assert b"X-Secret" not in head
    assert b"X-Kept: 2\r\n" in head
    assert head.endswith(b"X-Guestpass-Email: a@x.org\r\n\r\n")


ALIASES = [
    b"X-Guestpass-Email",
    b"x_guestpass_email",
    b"X.Guestpass.Email",
    b"X-GUESTPASS-EMAIL",
    b"X-Guestpass_Assertion",
    b"x~guestpass~share",
    b"X-Guestpass-Anything-New",
    b"X-Forwarded-For",
    b"x_forwarded_for",
    b"X.Forwarded.Host",
    b"Forwarded",
    b"X-Real-IP",
    b"X-Original-URL",
    b"x_rewrite_url",
    b"X-HTTP-Method-Override",
    b"Remote-User",
    b"X_WEBAUTH_USER",
    b"X-Forwarded-Email",
    b"X-Auth-Request-Preferred-Username",
    b"Cf-Access-Authenticated-User-Email",
]


@pytest.mark.parametrize("name", ALIASES)
def test_reserved_names_never_pass(name: bytes) -> None:
    assert b"spoof" not in head_of((name, b"spoof"), inject=b"")


def test_cookies_and_tokens_of_ours_are_stripped_and_others_kept() -> None:
    head = head_of(
        (b"Cookie", b"a=1; __Host-guestpass=secret; b=2; __Host-gp-nonce=secret;c=3"),
        (b"Authorization", b"Bearer gp_secret"),
    )
    assert b"Cookie: a=1; b=2; c=3\r\n" in head
    assert b"secret" not in head
    for blanks in (b" ", b"  ", b"\t", b" \t "):
        for scheme in (b"Bearer", b"BEARER"):
            assert b"secret" not in head_of((b"Authorization", scheme + blanks + b"gp_secret")), blanks
    assert b"Authorization: Basic eA==\r\n" in head_of((b"Authorization", b"Basic eA=="))
    assert b"Authorization: Bearer other\r\n" in head_of((b"Authorization", b"Bearer other"))
    assert b"Cookie" not in head_of((b"Cookie", b"__Host-guestpass=secret"))


def test_upgrade_is_the_edges_own_word() -> None:
    head = head_of((b"Connection", b"keep-alive, Upgrade"), (b"Upgrade", b"WebSocket"), upgrade=True)
    assert head.count(b"Connection: Upgrade\r\nUpgrade: websocket\r\n") == 1
    assert b"keep-alive" not in head


def test_order_and_case_are_kept() -> None:
    head = head_of((b"X-b", b"1"), (b"x-A", b"2"), (b"X-b", b"3"), inject=b"")
    assert head == b"GET /x HTTP/1.1\r\nHost: a.share.example.org\r\nX-b: 1\r\nx-A: 2\r\nX-b: 3\r\n\r\n"


# ── cookies and tokens that come in ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"__Host-guestpass=abc", "abc"),
        (b"a=1;  __Host-guestpass=abc ; b=2", "abc"),
        (b"__Host-guestpass=abc; __Host-guestpass=def", None),
        (b"__host-guestpass=abc", None),
        (b"\xe2\x80\x80__Host-guestpass=abc", None),
        (b"\xc2\xa0__Host-guestpass=abc", None),
        (b"x__Host-guestpass=abc", None),
        (b"__Host-guestpass", None),
    ],
)
def test_session_cookie_is_exact(field: bytes, value: str | None) -> None:
    assert h.cookie([(b"Cookie", field)], h.SESSION_COOKIE) == value


def test_bearer() -> None:
    assert h.bearer([(b"authorization", b"bearer gp_x")], "gp_") == "gp_x"
    assert h.bearer([(b"Authorization", b"Bearer other")], "gp_") is None
    assert h.bearer([(b"Authorization", b"Bearer gp_x"), (b"Authorization", b"Bearer gp_x")], "gp_") is None


@pytest.mark.parametrize(
    ("method", "value", "left"),
    [
        ("OPTIONS", b"3", b"2"),
        ("OPTIONS", b"1", b"0"),
        ("OPTIONS", b"0", None),
        ("OPTIONS", b"x", b"x"),
        ("OPTIONS", b"-1", b"-1"),
        ("GET", b"0", b"0"),
    ],
)
def test_max_forwards(method: str, value: bytes, left: bytes | None) -> None:
    counted = h.one_hop_fewer(method, [HOST, (b"MAX-Forwards", value)])
    assert counted == (None if left is None else [HOST, (b"MAX-Forwards", left)])


TRUSTED = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.7", b"1.2.3.4", "203.0.113.7"),
        ("10.0.0.1", b"198.51.100.2", "198.51.100.2"),
        ("::ffff:10.0.0.1", b"198.51.100.2", "198.51.100.2"),
        ("10.0.0.1", b"6.6.6.6, 198.51.100.2, 10.0.0.2", "198.51.100.2"),
        ("10.0.0.1", b"garbage", "10.0.0.1"),
        ("10.0.0.1", b'fe80::1%";for=evil', "10.0.0.1"),
        ("10.0.0.1", b"198.51.100.2, fd00::1%\xff", "10.0.0.1"),
        ("fd00::1", b"[2001:db8::5]", "2001:db8::5"),
        ("10.0.0.1", b"", "10.0.0.1"),
    ],
)
def test_client_address(peer: str, forwarded: bytes, expected: str) -> None:
    assert h.client_address(peer, [(b"X-Forwarded-For", forwarded)], TRUSTED) == expected
    assert h.client_address(peer, [(b"X-Forwarded-For", forwarded)], ()) == peer


# ── responses ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 099 X\r\n\r\n",
        b"HTTP/1.1 600 X\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\nC: d\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n A: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nNoColon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\x00c\r\n\r\n",
        b"HTTP/1.1 200 O\x01K\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 05\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 129 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 33000 + b"\r\n\r\n",
    ],
)
def test_bad_response_heads(data: bytes) -> None:
    with pytest.raises(h.BadResponse):
        h.parse_response(data)


def fields_of(*lines: bytes) -> dict[bytes, bytes]:
    return dict(h.parse_response(b"\r\n".join((b"HTTP/1.1 200 OK", *lines, b"", b""))).fields)


def test_response_fields() -> None:
    fields = fields_of(
        b"Content-Type: text/plain",
        b"Connection: X-Hop",
        b"X-Hop: 1",
        b"Keep-Alive: 5",
        b"Transfer-Encoding: chunked",
        b"Alt-Svc: h3",
        b"Strict-Transport-Security: max-age=1; includeSubDomains",
        b"Service-Worker-Allowed: /",
        b"X_Guestpass_Email: spoof",
        b"Clear-Site-Data: *",
    )
    assert fields == {b"Content-Type": b"text/plain", b"Cache-Control": b"private"}


def test_reason_phrase_is_filled_in() -> None:
    assert h.parse_response(b"HTTP/1.1 404\r\n\r\n").reason == b"Not Found"
    assert h.parse_response(b"HTTP/1.1 404 \r\n\r\n").reason == b""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"", b"private"),
        (b"public, max-age=60", b"private, max-age=60"),
        (b"s-maxage=60", b"private"),
        (b"no-store", b"no-store"),
        (b"private, max-age=0", b"private, max-age=0"),
        (b"max-age=60, must-revalidate", b"private, max-age=60, must-revalidate"),
    ],
)
def test_nothing_is_left_to_shared_caches(given: bytes, expected: bytes) -> None:
    assert h.private_cache_control(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"a=1; Domain=example.org; Path=/", b"a=1; Path=/"),
        (b"a=1; domain = .example.org", b"a=1"),
        (b"a=domain=x; HttpOnly", b"a=domain=x; HttpOnly"),
        (b"__Host-guestpass=x; Path=/; Secure", None),
        (b"__host-gp-nonce=x", None),
        (b"=__Host-guestpass=1; Path=/", None),
        (b" = __host-gp-me=1", None),
    ],
)
def test_set_cookie(given: bytes, expected: bytes | None) -> None:
    assert h.clean_set_cookie(given) == expected
