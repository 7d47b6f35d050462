"""What a received frame costs is a number of this repository; it does not change unnoticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "tunnel"))

import instructions


def test_instructions_a_frame_are_as_committed() -> None:
    reason = instructions.why_no_check()
    if reason:
        pytest.skip(reason)
    assert not instructions.off(instructions.measure())
