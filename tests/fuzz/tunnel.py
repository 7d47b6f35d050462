"""The fuzzer of the tunnel: frame codec, session and WebSocket framing. Started by `make fuzz-asan`.

Changes know what a frame is: bytes are changed at random, and whole frames are added, dropped, repeated, swapped and
given other types, flags, ids and lengths. Behind WebSocket framing that happens within the messages.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

from fuzz import engine
from fuzz.targets import QUICK, TARGETS, THOROUGH, WebSocket, WebSocketError, exact
from speedups import model

CORPUS = Path(__file__).parents[1] / "corpus" / "tunnel"


def change_frames(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Byte 0 stays; the rest is a sequence of frames, as far as it is."""
    splitter = model.Splitter()
    frames = splitter.feed(data[1:])
    start = data[:1] or b"\0"
    if not frames or rng.randrange(8) == 0:
        frames.insert(rng.randrange(len(frames) + 1), new_frame(rng))
    at = rng.randrange(len(frames))
    frame = frames[at]
    kind = rng.randrange(10)
    if kind == 0:
        frame.kind = rng.choice((*range(13), rng.randrange(256)))
    elif kind == 1:
        frame.flags = rng.choice((0, 1, 2, 3, rng.randrange(256)))
    elif kind == 2:
        frame.stream = rng.choice((0, 1, 2, 3, 4, frame.stream + 1, *engine.NUMBERS)) % 2**32
    elif kind == 3:
        frame.payload = engine.plain_change(rng, frame.payload, ())[:65_535]
    elif kind == 4:
        frames.insert(rng.randrange(len(frames) + 1), frame)
    elif kind == 5:
        del frames[at]
    elif kind == 6:
        other = rng.randrange(len(frames))
        frames[at], frames[other] = frames[other], frames[at]
    elif kind == 7:
        frames.insert(at, new_frame(rng))
    elif kind == 8 and others:
        frames[at:] = model.Splitter().feed(rng.choice(others)[1:])
    elif kind == 9:
        start = bytes([rng.randrange(256)])
    return (
        start
        + b"".join(model.frame(f.kind, f.flags, f.stream, f.payload[:65_535]) for f in frames)
        + splitter.rest
    )


def new_frame(rng: random.Random) -> model.Frame:
    kind = rng.randrange(14)
    stream = 0 if kind >= model.PING else rng.choice((1, 1, 2, 3, 4, 5, 9))
    size = rng.choice((0, 1, 100, 1000, 4096, 5000, 16_368))
    body = rng.randbytes(1) * size
    payload = {
        model.OPEN: lambda: model.open_payload("web", b"h" * rng.choice((0, 29, 32_768)), body),
        model.HEAD: lambda: model.head_payload(b"h" * rng.choice((0, 19, 32_768)), body),
        model.CREDIT: lambda: rng.choice((4096, 8192, 8193, 2**32, 2**64 - 1)).to_bytes(8, "big"),
        model.RESET: lambda: rng.choice((0, 5, 2**32 - 1)).to_bytes(4, "big"),
        model.RESET_ACK: lambda: b"",
        model.PING: lambda: rng.randrange(4).to_bytes(8, "big"),
        model.PONG: lambda: rng.randrange(4).to_bytes(8, "big"),
        model.GOAWAY: lambda: rng.choice((0, 1, 2, 2**30 - 1)).to_bytes(4, "big") + bytes(4),
    }.get(kind, lambda: body)()
    return model.Frame(kind, rng.choice((0, 0, 1, 2)), stream, payload[:65_535])


def unframed(data: bytes) -> bytes | None:
    """Tunnel bytes inside of well-formed WebSocket frames; None when they are not."""
    try:
        return WebSocket(not (data[:1] or b"\0")[0] & 1).feed(exact(data[1:]))
    except WebSocketError:
        return None


def change_within(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Frames inside of WebSocket messages; then wrapped anew, in one message or in some."""
    payload = unframed(data)
    if payload is None:
        return engine.plain_change(rng, data, others)
    changed = change_frames(rng, data[:1] + payload, ())
    outer = WebSocket(bool(changed[0] & 1))
    wire, at = changed[:1], 1
    while at < len(changed):
        size = rng.choice((1, 7, 125, 126, 4096, len(changed), len(changed)))
        wire += outer.wrap(changed[at : at + size])
        at += size
    return wire


def main() -> int:
    plain, frames, within = engine.plain_change, change_frames, change_within
    return engine.run(
        TARGETS,
        corpus=CORPUS,
        mutators={
            "frames": (plain, frames),
            "websocket": (plain,),
            "session": (plain, frames, frames),
            "link": (plain, within),
            "program": (plain,),
        },
        modules=[f"guestpass_speedups.{name}" for name in ("frames", "session", "websocket")],
        thorough=THOROUGH,
        quick=QUICK,
    )


if __name__ == "__main__":
    sys.exit(main())
