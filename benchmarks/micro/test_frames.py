"""The codec: a frame made, and a read of 1,000 taken apart into Python objects (tests and tools do that; the session
reads frames where they lie)."""

from __future__ import annotations

from typing import Any

from guestpass_speedups.frames import FrameType, encode_frame, split_frames

PAYLOAD = bytes(64)
FRAMES = 1000


def test_encode(benchmark: Any) -> None:
    assert len(benchmark(encode_frame, FrameType.DATA, 0, 7, PAYLOAD)) == 8 + len(PAYLOAD)


def test_split(benchmark: Any) -> None:
    frames, rest = benchmark(split_frames, encode_frame(FrameType.DATA, 0, 7, PAYLOAD) * FRAMES)
    assert len(frames) == FRAMES
    assert not rest
    benchmark.extra_info["items"] = FRAMES
