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

import pytest
from aiohttp import http_parser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from speedups import http1_fuzz as fuzz

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
def test_mutated(
    name: str, kind: str, check: Callable[[bytes], bool], share: int, capsys: pytest.CaptureFixture[str]
) -> None:
    mutator = fuzz.Mutator(kind, SEED)
    cases, accepted = CASES // share, 0
    begin = time.perf_counter()
    for _ in range(cases):
        data = mutator.case()
        try:
            accepted += check(data)
        except fuzz.Disagreement:
            what = disagreement(check, data)
            small = fuzz.shrink(data, lambda case: disagreement(check, case) == what)
            with pytest.raises(fuzz.Disagreement) as caught:
                check(small)
            pytest.fail(f"{name}: {caught.value}\n{small!r}\nfrom {data!r} (seed {SEED})")
    seconds = time.perf_counter() - begin
    with capsys.disabled():
        print(f"\n{name}: {cases:,} cases, {accepted:,} accepted, no disagreement, {cases / seconds:,.0f} cases/s")
    assert accepted > cases // 8, "a mutator whose cases are all refused compares nothing"
