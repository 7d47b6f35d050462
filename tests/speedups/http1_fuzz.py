"""Differential fuzzing of the scanner: a plain mutator over tests/corpus/http1, and llhttp (through aiohttp's parser)
as the other opinion.

Only what the scanner *accepts* counts. Of that both must agree on method, target, version, names and values of fields,
body, whether the connection goes on, upgrade, and the byte where the next message begins: llhttp must not be done one
byte earlier, must be done at it, and must take a probe that follows for the next message.

    GUESTPASS_FUZZ_CASES=1000000 GUESTPASS_FUZZ_SEED=7 pytest -s tests/speedups/test_http1_differential.py
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from aiohttp import http_parser
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError

from guestpass_speedups.http1 import BadHttp, ChunkedDecoder, Request, Response, parse_request, parse_response

CORPUS = Path(__file__).parents[1] / "corpus" / "http1"

# As the edge gives them to aiohttp; see app.py and http1.pxd.
MAX_LINE = 16 * 1024
MAX_FIELDS = 128

PROBE_REQUEST = b"GET /probe HTTP/1.1\r\nHost: probe\r\n\r\n"
PROBE_RESPONSE = b"HTTP/1.1 299 Probe\r\nContent-Length: 0\r\n\r\n"


class Disagreement(Exception):
    """Scanner and llhttp read the same bytes differently."""


def corpus(kind: str) -> list[bytes]:
    """The seeds of a kind, "request" or "response"."""
    seeds = [path.read_bytes() for path in sorted(CORPUS.glob(f"{kind}-*.bin"))]
    assert len(seeds) >= 15, f"the corpus of {kind}s is not there"
    return seeds


# ── the other opinion ─────────────────────────────────────────────────────────────────────────────────────────────


class _Protocol:
    """What StreamReader wants of a protocol; nothing is ever paused, the limit is out of reach."""

    def pause_reading(self) -> None:
        raise AssertionError("the limit is out of reach")

    def resume_reading(self, **_: object) -> None:
        pass


_PROTOCOL = cast(BaseProtocol, _Protocol())
_LOOP = cast(Any, object())
_LIMIT = 1 << 28


class Opinion:
    """What llhttp makes of a stream of messages."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self.messages: list[Any] = []
        self.upgraded = False
        self.tail = b""

    def feed(self, data: bytes) -> None:
        try:
            messages, self.upgraded, self.tail = self._parser.feed_data(data)
        except HttpProcessingError as exc:
            raise Disagreement(f"llhttp refuses it: {exc.message.partition(chr(10))[0]}") from exc
        self.messages += messages

    def end(self) -> None:
        self._parser.feed_eof()

    @property
    def complete(self) -> bool:
        """Whether the first message has come to its end."""
        if not self.messages:
            return False
        payload = self.messages[0][1]
        if payload.exception() is not None:
            raise Disagreement(f"llhttp refuses the body: {payload.exception()}")
        return bool(payload.is_eof())

    def body(self) -> bytes:
        return bytes(self.messages[0][1].read_nowait())


def request_opinion() -> Opinion:
    return Opinion(
        http_parser.HttpRequestParser(
            _PROTOCOL,
            _LOOP,
            _LIMIT,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            max_headers=MAX_FIELDS,
            auto_decompress=False,
        )
    )


def response_opinion(*, to_head: bool) -> Opinion:
    return Opinion(
        http_parser.HttpResponseParser(
            _PROTOCOL,
            _LOOP,
            _LIMIT,
            max_line_size=64 * 1024,
            max_field_size=64 * 1024,
            max_headers=MAX_FIELDS,
            response_with_body=not to_head,
            read_until_eof=True,
            auto_decompress=False,
        )
    )


def _same(what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise Disagreement(f"{what}: scanner {ours!r}, llhttp {theirs!r}")


# ── one case ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _body(
    data: bytes, start: int, framing: str, length: int | None, *, response: bool
) -> tuple[bytes, int] | None:
    """(body, end of the message), or None when the scanner does not take it or it is not all there."""
    if framing == "none":
        return b"", start
    if framing == "length":
        assert length
        return (data[start : start + length], start + length) if len(data) - start >= length else None
    if framing == "close":
        return data[start:], len(data)
    decoder = ChunkedDecoder(response)
    try:
        body, used = decoder.feed(data[start:])
    except BadHttp:
        return None
    return (body, start + used) if decoder.ended else None


def _until(opinion: Opinion, data: bytes, end: int) -> None:
    """llhttp must be done at `end` and not before."""
    opinion.feed(data[: end - 1])
    if opinion.complete:
        raise Disagreement("the message ends earlier for llhttp")
    opinion.feed(data[end - 1 : end])
    if not opinion.complete:
        raise Disagreement("the message ends later for llhttp")


def check_request(data: bytes) -> bool:
    """Whether the scanner accepts the head at the start of `data`. Raises Disagreement."""
    try:
        ours = parse_request(data)
    except BadHttp:
        return False
    if ours is None:
        return False
    opinion = request_opinion()
    message = _body(data, ours.size, ours.framing, ours.content_length, response=False)
    if message is None:
        opinion.feed(data[: ours.size])
        if not opinion.messages or opinion.complete:
            raise Disagreement("llhttp expects no body")
        _compare_request(ours, opinion)
        return True
    body, end = message
    _until(opinion, data, end)
    _same("upgraded", ours.upgrade == "websocket", opinion.upgraded)
    _compare_request(ours, opinion)
    _same("body", body, opinion.body())
    if opinion.upgraded:
        return True
    if (
        ours.keep_alive and ours.upgrade is None
    ):  # aiohttp drops what follows an upgrade that it does not take
        opinion.feed(PROBE_REQUEST)
        if len(opinion.messages) != 2 or opinion.messages[1][0].path != "/probe":
            raise Disagreement("llhttp does not see the next request where it is")
    return True


def _compare_request(ours: Request, opinion: Opinion) -> None:
    theirs = opinion.messages[0][0]
    _same("method", ours.method, theirs.method.encode())
    _same("target", ours.target, theirs.path.encode("utf-8", "surrogateescape"))
    _same("version", (1, ours.minor), tuple(theirs.version))
    _same("fields", tuple(ours.fields), theirs.raw_headers)
    _same("keep-alive", ours.keep_alive, not theirs.should_close)
    _same("chunked", ours.framing == "chunked", bool(theirs.chunked))
    _same("upgrade", ours.upgrade is not None, bool(theirs.upgrade))


def check_response(data: bytes, *, to_head: bool) -> bool:
    """Whether the scanner accepts the head at the start of `data`. Raises Disagreement."""
    try:
        ours = parse_response(data, to_head=to_head)
    except BadHttp:
        return False
    if ours is None:
        return False
    opinion = response_opinion(to_head=to_head)
    message = _body(data, ours.size, ours.framing, ours.content_length, response=True)
    if message is None:
        opinion.feed(data[: ours.size])
        if not opinion.messages or opinion.complete:
            raise Disagreement("llhttp expects no body")
        _compare_response(ours, opinion, to_head=to_head)
        return True
    body, end = message
    if ours.framing == "close":
        opinion.feed(data)
        if not opinion.messages or opinion.complete:
            raise Disagreement("the message ends earlier for llhttp")
        opinion.end()
        if not opinion.complete:
            raise Disagreement("the end of the connection does not end the message for llhttp")
    else:
        _until(opinion, data, end)
    _same("upgraded", ours.status == 101, opinion.upgraded)
    _compare_response(ours, opinion, to_head=to_head)
    _same("body", body, opinion.body())
    if ours.keep_alive and ours.status != 101:
        opinion.feed(PROBE_RESPONSE)
        if len(opinion.messages) != 2 or opinion.messages[1][0].code != 299:
            raise Disagreement("llhttp does not see the next response where it is")
    return True


def _compare_response(ours: Response, opinion: Opinion, *, to_head: bool) -> None:
    theirs = opinion.messages[0][0]
    _same("status", ours.status, theirs.code)
    _same("reason", ours.reason or b"", theirs.reason.encode("utf-8", "surrogateescape"))
    _same("version", (1, ours.minor), tuple(theirs.version))
    _same("fields", tuple(ours.fields), theirs.raw_headers)
    # aiohttp asks llhttp before it says that an answer to HEAD has no body. That the connection goes on is shown by the
    # probe.
    if not to_head or ours.content_length is not None:
        _same("keep-alive", ours.keep_alive, not theirs.should_close)
    if ours.framing == "chunked":
        _same("chunked", True, bool(theirs.chunked))


# ── mutations ─────────────────────────────────────────────────────────────────────────────────────────────────────

BYTES = [
    bytes((b,))
    for b in b"\r\n\t :;,=\"'\\/*#?%&.-_@[]{}()<>|^`~!$+\x00\x01\x0b\x0c\x1f\x7f\x80\x85\xa0\xff\xc2"
]
BYTES += [bytes((b,)) for b in b"0123456789abcdefABCDEFxXgGtTkK"]
PIECES = [
    b"\r\n", b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\r\n", b"\r\n ", b"\r\n\t", b"  ", b"\t", b" ,", b", ",
    b",,", b"; ", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"http/1.1", b"ICE/1.0",
    b"RTSP/1.0", b"HTTP/1.10", b"chunked", b"Chunked", b"gzip", b"identity", b"close", b"keep-alive",
    b"upgrade", b"Upgrade", b"websocket", b"h2c", b"100-continue", b"0", b"1", b"5", b"00", b"0x5", b"+5",
    b"-1", b"0005", b"5, 5", b"18446744073709551616", b"999999999999999999", b"9223372036854775808", b"/",
    b"//", b"/../", b"%2e", b"http://a/", b"*", b"\\", b"\xc3\xa9", b"\xe2\x80\x80", b"\x00", b";a", b";a=b",
    b';a="b"', b'="', b'"', b";", b"=", b"0\r\n\r\n", b"1\r\nx\r\n", b"f\r\n", b"trailers", b"te", b"a" * 70,
    b"200 OK", b"204", b"304", b"101", b"100", b"199",
]  # fmt: skip
LINES = [
    b"Host: a", b"Host:", b"Host: a, b", b"host: u@a", b"Host: [::1]", b"Content-Length: 5",
    b"Content-Length: 0", b"Content-Length:5", b"Content-Length: 05", b"Content-Length: 5 ",
    b"Content-Length: 5,5", b"content-length: 11", b"Content-Length : 5", b"Content_Length: 5",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked ", b"Transfer-Encoding:\tchunked",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity", b"transfer-encoding: CHUNKED",
    b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: ,chunked", b"Transfer-Encoding : chunked",
    b"Transfer_Encoding: chunked", b"Transfer-Encoding:", b"Connection: close", b"Connection: keep-alive",
    b"Connection: upgrade", b"Connection: close, keep-alive", b"Connection: keep-alive,close",
    b"Connection: x-a, Upgrade", b"Connection: close\t", b"Connection: closed", b"Connection: close;q=1",
    b"Connection: Content-Length", b"Connection: host", b"Connection:", b"Connection: ,",
    b"Connection: \"close\"", b"Proxy-Connection: keep-alive", b"Proxy-Connection: close",
    b"Upgrade: websocket", b"Upgrade: WebSocket", b"Upgrade: h2c", b"Upgrade: websocket, h2c", b"Upgrade:",
    b"Expect: 100-continue", b"Expect: 200-ok", b"TE: trailers", b"Trailer: x", b"Keep-Alive: timeout=5",
    b"Sec-WebSocket-Key1: x", b"X-A:", b"X-A: \t ", b"X-A: b\tc", b"X-A : b", b": x", b"X-A", b" X-A: b",
    b"\tX-A: b", b"", b"X-\xe9: b", b"X-A: \xe9", b"X-A: a\x00b", b"X-A: a\rb", b"X-A: a\nb",
    b"Content-Type: a/b", b"User-Agent: x", b"Server: x", b"ETag: x", b"Content-Encoding: gzip",
    b"Content-Range: x", b"Content-Location: /x", b"Max-Forwards: 1", b"Set-Cookie: a=b", b"Cookie: a=b",
    b"Origin: http://a",
]  # fmt: skip
STARTS = {
    "request": [
        b"GET", b"HEAD", b"POST", b"OPTIONS", b"CONNECT", b"TRACE", b"get", b"FOO", b"PRI", b"SOURCE",
        b"DESCRIBE", b"QUERY", b"M-SEARCH", b"PURGE", b"MKCALENDAR", b"UNSUBSCRIBE", b"PUT", b"DELETE",
        b"PATCH", b"LINK", b"GET ", b" GET", b"",
    ],
    "response": [b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2", b"HTTP/0.9", b"ICY", b"http/1.1", b""],
}  # fmt: skip


class Mutator:
    """Endless cases of a kind. The same seed gives the same cases."""

    def __init__(self, kind: str, seed: int) -> None:
        self._random = random.Random(f"{kind} {seed}")
        self._seeds = corpus(kind)
        self._starts = STARTS[kind]
        self._operations: list[Callable[[bytes], bytes]] = [
            self._replace_byte,
            self._insert_byte,
            self._insert_piece,
            self._insert_piece,
            self._delete,
            self._add_line,
            self._add_line,
            self._add_line,
            self._replace_line,
            self._repeat_line,
            self._delete_line,
            self._swap_lines,
            self._change_case,
            self._splice,
            self._first_word,
            self._replace_word,
        ]

    def _below(self, n: int) -> int:
        return int(self._random.random() * n)

    def case(self) -> bytes:
        data = self._seeds[self._below(len(self._seeds))]
        operations = self._operations
        data = operations[self._below(len(operations))](data)
        while self._random.random() < 0.5:
            data = operations[self._below(len(operations))](data)
        return data

    def _place(self, data: bytes) -> int:
        return self._below(len(data) + 1)

    def _replace_byte(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + BYTES[self._below(len(BYTES))] + data[at + 1 :]

    def _insert_byte(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + BYTES[self._below(len(BYTES))] + data[at:]

    def _insert_piece(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + PIECES[self._below(len(PIECES))] + data[at:]

    def _delete(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + data[at + 1 + self._below(4) :]

    def _line(self, data: bytes) -> tuple[int, int]:
        """Start and end of some line, without its CRLF."""
        start = data.find(b"\r\n", self._place(data)) + 2
        if start == 1:
            start = data.find(b"\r\n") + 2
        end = data.find(b"\r\n", start)
        return start, end if end >= 0 else len(data)

    def _add_line(self, data: bytes) -> bytes:
        start = data.find(b"\r\n") + 2 if self._random.random() < 0.5 else self._line(data)[0]
        return data[:start] + LINES[self._below(len(LINES))] + b"\r\n" + data[start:]

    def _replace_line(self, data: bytes) -> bytes:
        start, end = self._line(data)
        return data[:start] + LINES[self._below(len(LINES))] + data[end:]

    def _repeat_line(self, data: bytes) -> bytes:
        start, end = self._line(data)
        return data[:end] + b"\r\n" + data[start:end] + data[end:]

    def _delete_line(self, data: bytes) -> bytes:
        start, end = self._line(data)
        return data[:start] + data[end + 2 :]

    def _swap_lines(self, data: bytes) -> bytes:
        start, end = self._line(data)
        other, other_end = self._line(data)
        if end > other:
            return data
        return data[:start] + data[other:other_end] + data[end:other] + data[start:end] + data[other_end:]

    def _change_case(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + data[at : at + 12].swapcase() + data[at + 12 :]

    def _splice(self, data: bytes) -> bytes:
        """The head of one with the body of another, or the beginning of one with the end of another."""
        other = self._seeds[self._below(len(self._seeds))]
        if self._random.random() < 0.7:
            return data[: data.find(b"\r\n\r\n")] + other[other.find(b"\r\n\r\n") :]
        return data[: self._place(data)] + other[self._place(other) :]

    def _first_word(self, data: bytes) -> bytes:
        return self._starts[self._below(len(self._starts))] + data[data.find(b" ") :]

    def _replace_word(self, data: bytes) -> bytes:
        at = self._place(data)
        end = data.find(b" ", at)
        return data[:at] + PIECES[self._below(len(PIECES))] + data[end if end >= 0 else len(data) :]


def shrink(data: bytes, still: Callable[[bytes], bool]) -> bytes:
    """A smaller case for which `still` holds: pieces are cut out, halves first, then single bytes."""
    size = len(data) // 2
    while size:
        at = 0
        while at < len(data):
            smaller = data[:at] + data[at + size :]
            if still(smaller):
                data = smaller
            else:
                at += size
        size //= 2
    return data
