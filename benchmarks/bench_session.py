"""The tunnel's session in memory: no sockets, no TLS, no WebSocket framing. Both ends run in this one thread.

    python benchmarks/bench_session.py                      all, best of 5
    python benchmarks/bench_session.py --json               one JSON object
    valgrind --tool=callgrind … --only frames_null --loops N    instructions per frame: run with two N, subtract

`frames_null` is the session's own cost (a Stream without a handler drops what comes); `frames` adds a Python handler
that is called for each frame. For orientation, not to be compared: hashicorp/yamux over loopback TCP opens, echoes
200 B over, and closes 23,000–25,000 streams a second, and moves 1.17 GB/s.
"""

from __future__ import annotations

import argparse
import json
import struct
import time
from collections.abc import Callable
from typing import Any

from guestpass_speedups.session import Budget, Session, Stream

HEAD = b"GET /x HTTP/1.1\r\nhost: a.b\r\naccept: */*\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n"
DATA, OPEN, HELLO, AUTH = 0, 1, 10, 11


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">HBBI", len(payload), kind, flags, stream) + payload


class Owner:
    """Does nothing. A gateway's makes a handler for each stream by `accept`."""

    def __init__(self, accept: Callable[[Stream], Any] | None = None) -> None:
        self.accept = accept

    def stream_opened(self, stream: Stream, service: str, interactive: bool, head: bytes, fin: bool) -> Any:
        return self.accept(stream) if self.accept is not None else Null()

    def handler_failed(self, stream: Stream, exc: BaseException) -> None:
        raise exc

    def ignore(self, *args: Any) -> None:
        pass

    output_ready = hello_received = auth_received = info_received = goaway_received = pong_received = ignore


class Null:
    """Consumes at once."""

    def stream_data(self, stream: Stream, data: bytes, fin: bool) -> None:
        stream.consume(len(data))

    def ignore(self, *args: Any) -> None:
        pass

    stream_head = stream_trailers = stream_reset = stream_writable = stream_closed = ignore


def keeping(streams: list[Stream], stream: Stream) -> Null:
    streams.append(stream)
    return Null()


class Echo:
    """Answers with what it gets."""

    def __init__(self, stream: Stream) -> None:
        stream.send_head(OK)

    def stream_data(self, stream: Stream, data: bytes, fin: bool) -> None:
        stream.consume(len(data))
        stream.send(data, fin=fin)

    def ignore(self, *args: Any) -> None:
        pass

    stream_head = stream_trailers = stream_reset = stream_writable = stream_closed = ignore


def pair(accept: Callable[[Stream], Any] | None = None, floor: int = 32_768) -> tuple[Session, Session]:
    edge = Session(True, Owner(), Budget(1 << 30), now=0.0, floor=floor)
    gateway = Session(False, Owner(accept), Budget(1 << 30), now=0.0, floor=floor)
    for session in (edge, gateway):
        session.set_peer_limits(floor=floor, max_streams=16_384)
        session.send_hello(b"{}")
        session.send_auth(b"{}")
    shuttle(edge, gateway, 0.0)
    return edge, gateway


def shuttle(edge: Session, gateway: Session, now: float) -> None:
    while edge.has_output or gateway.has_output:
        gateway.receive(edge.fill(131_072, now), now)
        edge.receive(gateway.fill(131_072, now), now)


def receive_frames(loops: int, handler: bool) -> tuple[int, float]:
    """A gateway receives DATA of 64 B, 1,000 frames to a read, and gives credit."""
    keep: list[Stream] = []
    gateway = Session(
        False, Owner(lambda stream: keeping(keep, stream)), Budget(1 << 30), now=0.0, floor=1 << 20
    )
    gateway.send_hello(b"{}")
    gateway.receive(frame(HELLO, 0, 0, b"{}") + frame(AUTH, 0, 0, b"{}"), 0.0)
    gateway.receive(frame(OPEN, 0, 1, b"\x03web\x01" + struct.pack(">H", len(HEAD)) + HEAD), 0.0)
    if not handler:
        keep[0].handler = None
    batch = frame(DATA, 0, 1, bytes(64)) * 1000
    start = time.perf_counter()
    for _ in range(loops):
        gateway.receive(batch, 1.0)
        gateway.fill(65_536, 1.0)
    return loops * 1000, time.perf_counter() - start


def send_frames(loops: int) -> tuple[int, float]:
    """1,000 streams send 64 B each into one buffer; a frame each."""
    edge, gateway = pair(floor=1 << 19)
    streams = [edge.open("web", HEAD, Null()) for _ in range(1000)]
    shuttle(edge, gateway, 0.0)
    data = bytes(64)
    seconds = 0.0
    for _ in range(loops):
        start = time.perf_counter()
        for stream in streams:
            stream.send(data)
        out = edge.fill(131_072, 1.0)
        seconds += time.perf_counter() - start
        assert len(out) == 72_000
        gateway.receive(out, 1.0)
        edge.receive(gateway.fill(131_072, 1.0), 1.0)
    return loops * 1000, seconds


def echo(loops: int) -> tuple[int, float]:
    """Open, send 200 B with FIN, get head and 200 B with FIN, close: 100 streams a turn of the loop, both ends."""
    edge, gateway = pair(Echo)
    body = bytes(200)
    handler = Null()
    start = time.perf_counter()
    for _ in range(loops):
        for _ in range(100):
            edge.open("web", HEAD, handler, body=body, fin=True)
        shuttle(edge, gateway, 1.0)
    seconds = time.perf_counter() - start
    assert edge.stats()["streams_closed"] == loops * 100
    return loops * 100, seconds


def bulk(loops: int) -> tuple[int, float]:
    """Bytes from gateway to edge over 8 streams, in pieces of 64 KiB, both ends, windows of 1 MiB."""
    streams: list[Stream] = []
    edge, gateway = pair(lambda stream: keeping(streams, stream), floor=1 << 20)
    handler = Null()
    for _ in range(8):
        edge.open("web", HEAD, handler, fin=True, interactive=False)
    shuttle(edge, gateway, 0.0)
    for stream in streams:
        stream.send_head(OK)
    piece = bytes(65_536)
    start = time.perf_counter()
    for _ in range(loops):
        for stream in streams:
            stream.send(piece)
        shuttle(edge, gateway, 1.0)
    seconds = time.perf_counter() - start
    return loops * 8 * len(piece), seconds


BENCHMARKS: dict[str, tuple[Callable[[int], tuple[int, float]], int, str]] = {
    "frames_null": (lambda loops: receive_frames(loops, handler=False), 1000, "frames/s received, 64 B"),
    "frames": (
        lambda loops: receive_frames(loops, handler=True),
        500,
        "frames/s received, 64 B, Python handler",
    ),
    "frames_sent": (send_frames, 300, "frames/s sent, 64 B, Python caller"),
    "echo": (echo, 300, "streams/s opened, echoed over, closed"),
    "bulk": (bulk, 1000, "bytes/s, both ends"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=BENCHMARKS, help="one of them")
    parser.add_argument("--loops", type=int, help="fixed number of loops, once (for callgrind)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    results = {}
    for name in [arguments.only] if arguments.only else BENCHMARKS:
        run, loops, unit = BENCHMARKS[name]
        rounds = [run(arguments.loops or loops) for _ in range(1 if arguments.loops else 5)]
        best = max(count / seconds for count, seconds in rounds)
        results[name] = {"per_second": best, "ns": 1e9 / best, "unit": unit}
        if not arguments.json:
            print(f"{name:12} {best:>16,.0f} {unit}")
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
