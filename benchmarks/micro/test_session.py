"""The session in memory: workloads of bench_session.py, each with what one round of it holds."""

from __future__ import annotations

from typing import Any

import pytest
from bench_session import BENCHMARKS

# Enough that the set-up of a round does not show.
LOOPS = {"frames_null": 20, "frames": 20, "frames_sent": 10, "echo": 10, "bulk": 20}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_session(benchmark: Any, name: str) -> None:
    work, _, unit = BENCHMARKS[name]
    items, seconds = benchmark.pedantic(work, args=(LOOPS[name],), rounds=10, warmup_rounds=1)
    assert items > 0
    assert seconds > 0
    benchmark.extra_info |= {"items": items, "unit": unit.partition("/s")[0]}
