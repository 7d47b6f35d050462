"""Scanner against llhttp: on what the scanner accepts, both agree. See http1_fuzz.py.

GUESTPASS_FUZZ_CASES sets how many cases the plain mutator runs (`make fuzz`: ten million), GUESTPASS_FUZZ_SEED where it
begins.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import http_parser
from hypothesis import given
from hypothesis import strategies as st
from speedups import http1_fuzz as fuzz
from support.scoreboard import row

from guestpass_speedups import http1

CASES = int(os.environ.get("GUESTPASS_FUZZ_CASES", "20000"))
SEED = int(os.environ.get("GUESTPASS_FUZZ_SEED", "1"))

# Half of the cases are requests; a response is an answer to GET or to HEAD.
KINDS: list[tuple[str, str, Callable[[bytes], bool], int]] = [
    ("request", "request", fuzz.check_request, 2),
    ("response", "response", partial(fuzz.check_response, to_head=False), 3),
    ("response-to-head", "response", partial(fuzz.check_response, to_head=True), 6),
]


def disagreement(check: Callable[[bytes], bool], data: bytes) -> str:
    """What the two disagree on, without the values; "" when they agree."""
    try:
        check(data)
    except fuzz.Disagreement as exc:
        return str(exc).partition(": scanner")[0]
    return ""


def disagrees(check: Callable[[bytes], bool], what: str, data: bytes) -> bool:
    return disagreement(check, data) == what


def test_llhttp_is_what_we_compare_with() -> None:
    assert http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy
    assert http_parser.HttpResponseParser is not http_parser.HttpResponseParserPy


@pytest.mark.parametrize("path", sorted(fuzz.CORPUS.glob("*.bin")), ids=lambda p: p.stem)
def test_corpus_is_accepted(path: Path) -> None:
    data = path.read_bytes()
    if path.name.startswith("request"):
        assert fuzz.check_request(data)
    else:
        assert fuzz.check_response(data, to_head=False)
        assert fuzz.check_response(data, to_head=True)


@pytest.mark.timeout(0 if CASES > 1_000_000 else 300)
@pytest.mark.parametrize(("name", "kind", "check", "share"), KINDS, ids=[k[0] for k in KINDS])
def test_mutated(name: str, kind: str, check: Callable[[bytes], bool], share: int) -> None:
    mutator = fuzz.Mutator(kind, SEED)
    cases, accepted = CASES // share, 0
    begin = time.perf_counter()
    for _ in range(cases):
        data = mutator.case()
        try:
            accepted += check(data)
        except fuzz.Disagreement:
            small = fuzz.shrink(data, partial(disagrees, check, disagreement(check, data)))
            with pytest.raises(fuzz.Disagreement) as caught:
                check(small)
            pytest.fail(f"{name}: {caught.value}\n{small!r}\nfrom {data!r} (seed {SEED})")
    seconds = time.perf_counter() - begin
    row(
        f"scanner against llhttp, {name}",
        f"{cases:,} mutated heads, seed {SEED}; {cases / seconds:,.0f} a second",
        f"{accepted:,} accepted, on none of them a disagreement",
        "0",
        ok=True,  # the first disagreement has ended the test
        figure=2,
    )
    assert accepted > cases // 8, "a mutator whose cases are all refused compares nothing"


# ── the comparison sees what it is there to see ───────────────────────────────────────────────────────────────────

SIMPLE = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
BLIND = [
    ("method", b"PUT"),
    ("target", b"/y"),
    ("minor", 0),
    ("fields", [(b"Host", b"a")]),
    ("keep_alive", False),
    ("upgrade", "websocket"),
    ("content_length", 4),
    ("framing", "none"),
    ("size", len(SIMPLE) - 6),
]


@pytest.mark.parametrize(("name", "wrong"), BLIND, ids=[b[0] for b in BLIND])
def test_a_wrong_scanner_of_requests_is_caught(
    name: str, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = http1.parse_request(SIMPLE)
    names = (
        "size",
        "method",
        "target",
        "minor",
        "fields",
        "framing",
        "content_length",
        "keep_alive",
        "upgrade",
    )
    values = {n: getattr(head, n) for n in names}
    monkeypatch.setattr(fuzz, "parse_request", lambda data: SimpleNamespace(**values))
    assert fuzz.check_request(SIMPLE)
    values[name] = wrong
    with pytest.raises(fuzz.Disagreement):
        fuzz.check_request(SIMPLE)


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
BLIND_TO_RESPONSES = [
    ("status", 201),
    ("reason", b"Ok"),
    ("minor", 0),
    ("fields", []),
    ("keep_alive", False),
    ("content_length", 4),
    ("framing", "close"),
    ("size", len(ANSWER) - 6),
]


@pytest.mark.parametrize(("name", "wrong"), BLIND_TO_RESPONSES, ids=[b[0] for b in BLIND_TO_RESPONSES])
def test_a_wrong_scanner_of_responses_is_caught(
    name: str, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = http1.parse_response(ANSWER)
    names = ("size", "status", "reason", "minor", "fields", "framing", "content_length", "keep_alive")
    values = {n: getattr(head, n) for n in names}
    monkeypatch.setattr(fuzz, "parse_response", lambda data, to_head: SimpleNamespace(**values))
    assert fuzz.check_response(ANSWER, to_head=False)
    values[name] = wrong
    with pytest.raises(fuzz.Disagreement):
        fuzz.check_response(ANSWER, to_head=False)


def test_shrinking_keeps_the_disagreement() -> None:
    assert fuzz.shrink(b"GET /aXbYc HTTP/1.1", lambda case: b"X" in case and b"Y" in case) == b"XY"


# ── hypothesis: heads that are put together, not mutated ──────────────────────────────────────────────────────────

HEADS = st.tuples(
    st.sampled_from([b"GET / HTTP/1.1", b"POST /x?y HTTP/1.1", b"HEAD / HTTP/1.0", b"OPTIONS * HTTP/1.1"]),
    st.lists(st.sampled_from(fuzz.LINES), max_size=5),
    st.one_of(
        st.sampled_from([b"", b"hello", b"0\r\n\r\n", b"5\r\nhello\r\n0\r\nX: y\r\n\r\n"]),
        st.binary(max_size=20),
    ),
)


@given(HEADS)
def test_requests_put_together(parts: tuple[bytes, list[bytes], bytes]) -> None:
    line, lines, body = parts
    fuzz.check_request(b"\r\n".join((line, b"Host: a", *lines, b"", body)))


@given(
    HEADS,
    st.sampled_from([b"200 OK", b"204", b"304 X", b"101 X", b"100 X", b"199 X", b"404 "]),
    st.booleans(),
)
def test_responses_put_together(
    parts: tuple[bytes, list[bytes], bytes], status: bytes, to_head: bool
) -> None:
    line, lines, body = parts
    fuzz.check_response(b"\r\n".join((line[-8:] + b" " + status, *lines, b"", body)), to_head=to_head)
