"""Fuzz targets for what is read inside of fields and bodies: cookies, who a trusted proxy says is asking, paths under a
limit, chunks. No server, no coverage: a plain mutator over tests/corpus/fields, and properties that hold for any input.

A target is a function of bytes that raises AssertionError when something is wrong. Where there is a second opinion, it
is asked: the edge's own Python for the compiled scanner, h11 for chunks, a reading of RFC 6265 that was written here.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote_to_bytes

import h11

from guestpass import scope
from guestpass.edge import headers as h
from guestpass.model import Scope
from guestpass_speedups import http1

CORPUS = Path(__file__).parents[1] / "corpus" / "fields"

START = b"GET / HTTP/1.1\r\nHost: a.example\r\n"
NOT_IN_VALUES = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")
TRUSTED = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "10.0.0.0/8", "::1/128", "fd00::/8")))
LIMIT = (Scope("GET", "/limited/**"),)


def values(data: bytes) -> list[bytes]:
    """The input as values of a field that comes once for each line."""
    return [NOT_IN_VALUES.sub(b"", line).strip(b" \t") for line in data.split(b"\n")]


def request(name: bytes, found: list[bytes]) -> bytes:
    return START + b"".join(name + b": " + value + b"\r\n" for value in found) + b"\r\n"


def pairs(found: list[bytes]) -> list[tuple[bytes, bool, bytes]]:
    """(name, whether there was a "=", value) of every cookie, in order."""
    out = []
    for value in found:
        for piece in value.split(b";"):
            name, separator, content = piece.strip(b" \t").partition(b"=")
            if name or separator:
                out.append((name, bool(separator), content))
    return out


def is_ours(name: bytes) -> bool:
    return name.lower().startswith((b"__host-guestpass", b"__host-gp-"))


def cookies(data: bytes) -> None:
    """The session is read from the cookie of exactly its name, if that came once; ours never pass, others always do."""
    found = values(data)
    head = request(b"Cookie", found)
    try:
        count, last = http1.cookies_named(head, h.SESSION_COOKIE)
        forwarded = http1.request_for_gateway(head, b"", b"gp_")
    except http1.BadHttp as exc:
        if exc.status != 431:  # too much of it
            raise
        return
    sessions = [content for name, there, content in pairs(found) if there and name == h.SESSION_COOKIE]
    assert count == len(sessions)
    assert last == (sessions[-1] if sessions else None)
    raw = [(b"Host", b"a.example"), *((b"Cookie", value) for value in found)]
    session = h.cookie(raw, h.SESSION_COOKIE)
    assert session == (sessions[0].decode("ascii", "replace") if len(sessions) == 1 else None)
    assert forwarded == h.request_head("GET", b"/", raw, inject=b"", bearer_prefix=b"gp_", upgrade=False)
    lines = forwarded.split(b"\r\n")
    passed = pairs([line[8:] for line in lines if line.startswith(b"Cookie: ")])
    assert passed == [pair for pair in pairs(found) if not is_ours(pair[0])]


def set_cookies(data: bytes) -> None:
    """What an application sets stays on its origin and is none of ours; nothing else of it changes."""
    for value in values(data):
        cleaned = h.clean_set_cookie(value)
        head = b"HTTP/1.1 200 OK\r\nSet-Cookie: " + value + b"\r\n\r\n"
        written = http1.response_for_visitor(head)
        assert (b"\r\nSet-Cookie: " in written) == (cleaned is not None)
        if cleaned is None:
            continue
        assert b"\r\nSet-Cookie: " + cleaned + b"\r\n" in written
        assert h.clean_set_cookie(cleaned) == cleaned
        first, *attributes = cleaned.split(b";")
        assert not is_ours(first.strip(b" \t=").partition(b"=")[0])
        assert not [a for a in attributes if a.partition(b"=")[0].strip(b" \t").lower() == b"domain"]
        kept = [part.strip(b" \t") for part in value.split(b";")]
        assert cleaned.split(b"; ") == [
            part
            for number, part in enumerate(kept)
            if number == 0 or part.partition(b"=")[0].strip(b" \t").lower() != b"domain"
        ]


def forwarded(data: bytes) -> None:
    """Whatever stands in X-Forwarded-For: a visitor's address comes out, and only trusted hops have a say."""
    found = [(b"X-Forwarded-For", value) for value in values(data)]
    assert h.client_address("203.0.113.1", found, TRUSTED) == "203.0.113.1", "the peer is not trusted"
    assert h.client_address("127.0.0.1", found, ()) == "127.0.0.1", "nobody is trusted"
    last = [*found, (b"x-forwarded-for", b"198.51.100.7 , 10.0.0.1")]
    assert h.client_address("127.0.0.1", last, TRUSTED) == "198.51.100.7", "what is left of a stranger counts"
    address = h.client_address("127.0.0.1", found, TRUSTED)
    assert re.fullmatch(r"[0-9a-f.:]+", address), address
    assert str(ipaddress.ip_address(address)) == address
    lines = h.forwarded_fields(address, "https", b"a.example").split(b"\r\n")
    assert len(lines) == 6
    assert re.fullmatch(
        rb'Forwarded: for=("\[[0-9a-f.:]+\]"|[0-9.]+);proto=https;host="a\.example"', lines[3]
    )


def paths(data: bytes) -> None:
    """A path that a limit admits is within it, however often and by whom it is decoded and normalised."""
    target = "/" + re.sub(rb"[^\x21-\x22\x24-\x7e]", b"", data).decode("ascii")
    admitted = scope.admits(LIMIT, "GET", target)
    assert admitted == scope.admits(LIMIT, "HEAD", target)
    assert not scope.admits(LIMIT, "POST", target)
    if not admitted:
        return
    seen = target.encode("ascii").partition(b"?")[0]
    for _ in range(3):
        for reading in (
            seen,
            seen.replace(b"\\", b"/"),
            re.sub(rb";[^/]*", b"", seen),
            seen.partition(b"\0")[0],
        ):
            path = posixpath.normpath(reading.decode("latin-1"))
            assert path == "/limited" or path.startswith("/limited/"), path
        seen = unquote_to_bytes(seen)


def chunked(data: bytes) -> None:
    """However the bytes are cut, the same body comes out; and what is taken for a whole body h11 reads alike."""
    whole = _decode([data])
    for size in (1, 2, 3, 7):
        assert _decode([data[at : at + size] for at in range(0, len(data), size)]) == whole, size
    state, body, used = whole
    if state != "ended":
        return
    other = h11.Connection(h11.SERVER)
    other.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    found = b""
    while not isinstance(event := other.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Request | h11.Data), event
        if isinstance(event, h11.Data):
            found += bytes(event.data)
    assert found == body
    assert other.trailing_data[0] == data[used:]


def _decode(pieces: list[bytes]) -> tuple[str, bytes, int]:
    """("more", "ended" or the error, body, bytes that belong to it)."""
    decoder = http1.ChunkedDecoder()
    body = b""
    used = 0
    for piece in pieces:
        try:
            part, at = decoder.feed(piece)
        except http1.BadHttp as exc:
            return exc.reason, b"", 0  # where it was noticed depends on the cuts
        body += part
        used += at
        if decoder.ended:
            return "ended", body, used
    return "more", body, used


TARGETS: dict[str, Callable[[bytes], None]] = {
    "cookies": cookies,
    "set-cookies": set_cookies,
    "forwarded": forwarded,
    "paths": paths,
    "chunked": chunked,
}

# Pieces that matter to a target: a mutator of bits finds "%2e" by accident once in a lifetime.
WORDS: dict[str, tuple[bytes, ...]] = {
    "cookies": (
        (b"__Host-guestpass", b"__host-guestpass", b"__Host-gp-nonce", b"=", b";", b"; ", b" ", b"\t", b"\n", b'"')
        + (b",", b"\xa0", b"\xe2\x80\x80", b"a=1", b"$Version=1", b"==", b";;")
    ),
    "set-cookies": (
        (b"__Host-guestpass=x", b"=__Host-guestpass", b"__Host-gp-", b"Domain=", b"domain = x", b"DOMAIN", b"; ", b";")
        + (b"=", b" ", b"\t", b"\n", b"Path=/", b"Secure", b"Expires=Thu, 01 Jan 1970 00:00:00 GMT", b'"', b",")
    ),
    "forwarded": (
        (b"127.0.0.1", b"10.0.0.1", b"203.0.113.9", b"::1", b"[::1]", b"fd00::1", b"::ffff:10.0.0.1", b"fe80::1%eth0")
        + (b"unknown", b"_hidden", b",", b", ", b"\n", b"]", b"[", b"%", b'"', b";", b":8080", b"0", b" ", b"\xff")
    ),
    "paths": (
        (b"limited/", b"/", b"//", b"..", b"/../", b"./", b"%2e", b"%2E", b"%2f", b"%5c", b"\\", b"%25", b"%00", b";")
        + (b"%c0%ae", b"%e0%80%ae", b"%u002e", b"%", b"?", b"secret", b"%252e", b".%2e", b"%41", b"*", b"LIMITED/")
    ),
    "chunked": (
        (b"0\r\n\r\n", b"5\r\nhello\r\n", b"\r\n", b"\n", b"\r", b";", b";a=b", b';a="b"', b'"', b"\\", b"0", b"a")
        + (b"F", b"00000", b" ", b"\t", b"X-A: b\r\n", b"Content-Length: 5\r\n", b"ffffffff", b"-", b"+", b"0x", b"\0")
    ),
}  # fmt: skip
