"""The scanner of heads, and llhttp through aiohttp's parser beside it: workloads of bench_http1.py."""

from __future__ import annotations

from typing import Any

import pytest
from bench_http1 import CASES, REQUEST, RESPONSE

from guestpass_speedups.http1 import ChunkedDecoder, parse_request, parse_response

LOOPS = 2000

CHUNKS = 200
CHUNKED = b"400\r\n" + bytes(0x400) + b"\r\n"


def test_heads_are_accepted() -> None:
    """Else the figures below would be those of a refusal."""
    assert parse_request(REQUEST) is not None
    assert parse_response(RESPONSE) is not None


@pytest.mark.parametrize("name", CASES)
def test_head(benchmark: Any, name: str) -> None:
    benchmark.pedantic(CASES[name], args=(LOOPS,), rounds=10, warmup_rounds=1)
    benchmark.extra_info |= {"items": LOOPS, "unit": "heads"}


def test_chunked_body(benchmark: Any) -> None:
    data = CHUNKED * CHUNKS

    def decode() -> int:
        body, used = ChunkedDecoder().feed(data)
        assert used == len(data)
        return len(body)

    assert benchmark(decode) == 0x400 * CHUNKS
    benchmark.extra_info |= {"items": CHUNKS, "unit": "chunks of 1 KiB"}
