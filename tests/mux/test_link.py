"""Two real ends of a tunnel: streams, credit, resets, and how a tunnel ends."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from typing import Any, cast

import pytest
from support.tunnel import HEAD, NAME, SERVICE, SITE, TestEdge, TestGateway, until

from guestpass.errors import NoGateway
from guestpass.mux import link as link_module
from guestpass.mux.stream import StreamReset, TunnelStream
from guestpass_speedups import wire
from guestpass_speedups.session import HIGH_WATER, ErrorCode, StreamRefused

OK = b"HTTP/1.1 200 OK\r\n\r\n"


async def echo(stream: TunnelStream, service: str, head: bytes) -> None:
    stream.send_head(OK)
    while data := await stream.read():
        await stream.write(data)
    stream.finish()


def open_stream(edge: TestEdge, *, fin: bool = False, body: bytes = b"") -> TunnelStream:
    return edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=fin, body=body)


async def read_all(stream: TunnelStream) -> bytes:
    body = bytearray()
    while data := await stream.read():
        body += data
    return bytes(body)


async def test_request_and_response(edge: TestEdge, gateway: TestGateway) -> None:
    seen = []

    async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
        seen.append((service, head, await read_all(stream)))
        stream.send_head(b"HTTP/1.1 103 Early Hints\r\n\r\n", interim=True)
        stream.send_head(OK)
        await stream.write(b"answer")
        stream.finish()

    gateway.serve = serve
    await gateway.join(edge)
    stream = open_stream(edge, fin=True, body=b"question")
    interim = await stream.head()
    assert interim.interim
    assert not interim.fin
    final = await stream.head()
    assert final.data == OK
    assert not final.interim
    assert await read_all(stream) == b"answer"
    assert seen == [(SERVICE, HEAD, b"question")]
    await asyncio.wait_for(stream.wait_closed(), 5)
    assert stream.acknowledged
    assert (stream.bytes_sent, stream.bytes_received) == (8, 6)
    assert edge.tunnels.streams == 0


async def test_head_with_fin_and_trailers(edge: TestEdge, gateway: TestGateway) -> None:
    async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
        if service == SERVICE:
            stream.send_head(OK, fin=True)
        else:
            stream.send_head(OK)
            await stream.write(b"x")
            stream.send_trailers(b"digest: 1\r\n\r\n")

    gateway.serve = serve
    await gateway.join(edge)
    first = open_stream(edge, fin=True)
    assert (await first.head()).fin
    assert await first.read() == b""
    assert first.trailers is None
    second = edge.tunnels.open(SITE, NAME, "other", HEAD, fin=True)
    await second.head()
    assert await read_all(second) == b"x"
    assert second.trailers == b"digest: 1\r\n\r\n"


async def test_bulk_both_ways_on_many_streams(edge: TestEdge, gateway: TestGateway) -> None:
    gateway.serve = echo
    await gateway.join(edge)

    async def one(number: int) -> None:
        stream = open_stream(edge)
        data = bytes([number]) * 300_000

        async def send() -> None:
            for start in range(0, len(data), 70_000):
                await stream.write(data[start : start + 70_000])
            stream.finish()

        sending = asyncio.create_task(send())
        await stream.head()
        assert await read_all(stream) == data
        await sending
        await stream.wait_closed()

    await asyncio.wait_for(asyncio.gather(*(one(number) for number in range(12))), 30)
    assert edge.budget.promised == 0
    assert gateway.budget.promised == 0


async def test_a_slow_reader_holds_up_only_its_own_stream(edge: TestEdge, gateway: TestGateway) -> None:
    sent = 0

    async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
        nonlocal sent
        stream.send_head(OK)
        if service == "flood":
            while True:
                await stream.write(b"x" * 65536)
                sent += 65536
        await stream.write(b"quick")
        stream.finish()

    gateway.serve = serve
    link = await gateway.join(edge)
    slow = edge.tunnels.open(SITE, NAME, "flood", HEAD, fin=True)
    await slow.head()
    # Nothing is read: the flood must stop at its window, however long it tries.
    await until(lambda: slow.buffered > 0, "the window is filling")
    before = -1
    while before != sent:
        before = sent
        for _ in range(5):
            quick = open_stream(edge, fin=True)
            await asyncio.wait_for(quick.head(), 5)
            assert await read_all(quick) == b"quick"
    (edge_link,) = edge.tunnels._links
    raw = slow._raw
    assert slow.buffered <= raw.window
    assert gateway.streams[0]._raw.queued <= HIGH_WATER + 65536
    assert link.transport is not None
    assert edge_link.transport is not None
    assert link.transport.get_write_buffer_size() <= 2 * HIGH_WATER
    slow.reset(ErrorCode.CANCEL)
    await asyncio.wait_for(slow.wait_closed(), 5)


async def test_reset_by_the_edge_cancels_the_work(edge: TestEdge, gateway: TestGateway) -> None:
    cancelled = asyncio.Event()
    may_end = asyncio.Event()

    async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
        try:
            await stream.read()
        except asyncio.CancelledError:
            cancelled.set()
            await may_end.wait()
            raise

    gateway.serve = serve
    await gateway.join(edge)
    stream = open_stream(edge)
    waiting = asyncio.create_task(stream.head())
    await until(lambda: gateway.streams, "the stream at the gateway")
    stream.reset(ErrorCode.REVOKED)
    with pytest.raises(StreamReset) as caught:
        await waiting
    assert caught.value.code == ErrorCode.REVOKED
    await asyncio.wait_for(cancelled.wait(), 5)
    with pytest.raises(StreamReset):
        await stream.write(b"late")
    # The slot is held until the work has really ended.
    assert edge.tunnels.streams == 1
    assert not stream.closed
    may_end.set()
    await asyncio.wait_for(stream.wait_closed(), 5)
    assert edge.tunnels.streams == 0
    stream.reset(ErrorCode.CANCEL)  # idempotent


async def test_reset_by_the_gateway(edge: TestEdge, gateway: TestGateway) -> None:
    async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
        stream.reset(ErrorCode.UNREACHABLE)

    gateway.serve = serve
    await gateway.join(edge)
    stream = open_stream(edge)
    with pytest.raises(StreamReset) as caught:
        await stream.head()
    assert caught.value.code == ErrorCode.UNREACHABLE
    await asyncio.wait_for(stream.wait_closed(), 5)


async def test_a_fault_at_the_gateway_resets_the_stream(
    edge: TestEdge, gateway: TestGateway, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
        if service == "faulty":
            raise LookupError("oops")

    gateway.serve = serve
    await gateway.join(edge)
    for service in ("faulty", "silent"):
        with pytest.raises(StreamReset) as caught:
            await edge.tunnels.open(SITE, NAME, service, HEAD, fin=True).head()
        assert caught.value.code == ErrorCode.INTERNAL_ERROR
    assert "oops" in caplog.text


async def test_response_before_the_request_is_complete(edge: TestEdge, gateway: TestGateway) -> None:
    async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
        stream.send_head(OK)
        await stream.write(b"enough")
        stream.finish()

    gateway.serve = serve
    await gateway.join(edge)
    stream = open_stream(edge)
    await stream.head()
    assert await read_all(stream) == b"enough"
    for _ in range(40):  # far beyond any window: the gateway takes it and forgets it
        await asyncio.wait_for(stream.write(b"x" * 65536), 5)
    stream.finish()
    await asyncio.wait_for(stream.wait_closed(), 5)


async def test_lost_connection_ends_every_stream(edge: TestEdge, gateway: TestGateway) -> None:
    link = await gateway.join(edge)
    streams = [open_stream(edge) for _ in range(3)]
    await until(lambda: len(gateway.streams) == 3, "the streams at the gateway")
    link.abort()
    for stream in streams:
        with pytest.raises(StreamReset) as caught:
            await asyncio.wait_for(stream.head(), 5)
        assert caught.value.code == ErrorCode.UNREACHABLE
        assert stream.closed
    assert not edge.tunnels.is_connected(SITE, NAME)
    with pytest.raises(NoGateway):
        open_stream(edge)
    assert edge.kinds() == ["gateway.connected", "gateway.disconnected"]


async def test_drain_lets_streams_end(edge: TestEdge, gateway: TestGateway) -> None:
    gateway.serve = echo
    link = await gateway.join(edge)
    stream = open_stream(edge)
    await stream.head()
    draining = asyncio.create_task(link.drain(10))
    await until(lambda: not edge.tunnels.is_connected(SITE, NAME), "the edge knows of the drain")
    with pytest.raises((NoGateway, StreamRefused)):
        open_stream(edge)
    await stream.write(b"still works")
    stream.finish()
    assert await read_all(stream) == b"still works"
    await asyncio.wait_for(draining, 5)
    assert link.closed.done()


async def test_drain_is_over_when_its_time_is(edge: TestEdge, gateway: TestGateway) -> None:
    link = await gateway.join(edge)
    stream = open_stream(edge)
    await until(lambda: gateway.streams, "the stream at the gateway")
    await asyncio.wait_for(link.drain(0.1), 5)
    with pytest.raises(StreamReset):
        await asyncio.wait_for(stream.head(), 5)


async def test_drain_by_the_edge(edge: TestEdge, gateway: TestGateway) -> None:
    gateway.serve = echo
    link = await gateway.join(edge)
    stream = open_stream(edge)
    await stream.head()
    draining = asyncio.create_task(edge.tunnels.drain(10))
    await until(lambda: link.replace, "the gateway was asked to leave")
    stream.finish()
    assert await read_all(stream) == b""
    await asyncio.wait_for(draining, 5)
    await until(lambda: gateway.ends, "the gateway knows of the end")
    late = await gateway.dial(edge)
    await until(lambda: late.end is not None, "refused")
    assert late.end is not None
    assert late.end.status == 503


async def test_round_trip_time_is_known_while_streams_live(edge: TestEdge, gateway: TestGateway) -> None:
    gateway.serve = echo
    await gateway.join(edge)
    stream = open_stream(edge)
    await stream.head()
    (link,) = edge.tunnels._links
    link.session.ping(asyncio.get_running_loop().time())
    await until(lambda: edge.tunnels.status()[0].rtt is not None, "a round trip")
    (status,) = edge.tunnels.status()
    assert (status.site, status.name, status.tunnels, status.streams) == (SITE, NAME, 1, 1)
    assert status.services == {SERVICE: True}
    assert edge.touched == [(SITE, NAME)]
    stream.reset(ErrorCode.CANCEL)


async def test_reading_goes_on_while_writing_is_paused(edge: TestEdge, gateway: TestGateway) -> None:
    """Both ends push at once with nobody reading: neither may stop taking the other's frames."""

    async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
        stream.send_head(OK)
        for _ in range(40):
            await stream.write(b"d" * 65536)
        stream.finish()
        await read_all(stream)

    gateway.serve = serve
    await gateway.join(edge)

    async def one() -> int:
        stream = open_stream(edge)

        async def push() -> None:
            for _ in range(40):
                await stream.write(b"u" * 65536)
            stream.finish()

        pushing = asyncio.create_task(push())
        await stream.head()
        body = await read_all(stream)
        await pushing
        return len(body)

    sizes = await asyncio.wait_for(asyncio.gather(*(one() for _ in range(4))), 30)
    assert sizes == [40 * 65536] * 4


class FastClock:
    """Stands in for the module `time`, running fast, so that minutes of silence fit a test."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._start = time.monotonic()

    def monotonic(self) -> float:
        return self._start + (time.monotonic() - self._start) * self._speed

    def time(self) -> float:
        return time.time()


async def test_half_dead_tunnel_is_given_up(
    edge: TestEdge, gateway: TestGateway, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The connection stays open, but nothing comes any more: no FIN, no RST, as behind a router that died."""
    clock = FastClock(30)
    monkeypatch.setattr(link_module, "time", clock)
    monkeypatch.setattr(link_module, "TICK", 0.02)
    wire._use_clock(clock.monotonic)
    request.addfinalizer(lambda: wire._use_clock(None))
    made = await gateway.join(edge)
    stream = open_stream(edge)
    await until(lambda: gateway.streams, "the stream at the gateway")
    # As long as both ends live, silence of the streams is no reason to end, however long it takes.
    await asyncio.sleep(0.5)  # 15 s
    assert edge.tunnels.is_connected(SITE, NAME)
    assert made.transport is not None
    made.transport.pause_reading()
    made._stop_timers()
    monkeypatch.setattr(made, "_flush", lambda: None)
    with pytest.raises(StreamReset) as caught:
        await asyncio.wait_for(stream.head(), 5)
    assert caught.value.code == ErrorCode.UNREACHABLE
    assert not edge.tunnels.is_connected(SITE, NAME)
    assert edge.events[-1].detail["reason"] == "timeout"


async def test_write_without_progress_ends_the_tunnel(
    edge: TestEdge, gateway: TestGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that sends but takes nothing: its own liveness cannot see that."""
    monkeypatch.setattr(link_module, "TICK", 0.02)
    monkeypatch.setattr(link_module, "NO_PROGRESS_TIMEOUT", 0.3)
    made = await gateway.join(edge)
    (here,) = edge.tunnels._links
    assert made.transport is not None
    made.transport.pause_reading()

    async def fill() -> None:
        while True:  # each stream may send its first window
            await open_stream(edge).write(b"x" * 32768)
            await asyncio.sleep(0)

    filling = asyncio.create_task(fill())
    await until(lambda: here._paused, "the transport is full")
    await until(lambda: here.end is not None, "the tunnel has ended")
    assert here.end is not None
    assert here.end.code is ErrorCode.TIMEOUT
    filling.cancel()
    await asyncio.gather(filling, return_exceptions=True)


async def test_misuse_of_a_stream(edge: TestEdge, gateway: TestGateway) -> None:
    gateway.serve = echo
    await gateway.join(edge)
    stream = open_stream(edge)
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="another coroutine"):
        await stream.read()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    stream.finish()
    stream.finish()
    with pytest.raises(RuntimeError, match="ended already"):
        await stream.write(b"late")
    await stream.head()
    assert await read_all(stream) == b""
    assert repr(stream).startswith("<TunnelStream 1 ")
    with pytest.raises(RuntimeError, match="never opened"):
        _ = TunnelStream(asyncio.get_running_loop()).acknowledged


async def test_nothing_is_left_behind(edge: TestEdge, gateway: TestGateway) -> None:
    """Streams that are over are garbage without the collector's help."""
    gateway.serve = echo
    await gateway.join(edge)
    gc.collect()
    gc.disable()
    try:
        refs = []
        for _ in range(50):
            stream = open_stream(edge)
            refs.append(weakref.ref(stream))
            stream.finish(b"x")
            await stream.head()
            await read_all(stream)
            await stream.wait_closed()
        gateway.streams.clear()
        del stream
        await until(lambda: sum(ref() is not None for ref in refs) <= 1, "the streams are gone")
    finally:
        gc.enable()


async def test_a_fault_of_our_own_ends_the_tunnel(
    edge: TestEdge, gateway: TestGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """Even one that comes again while the tunnel says goodbye: streams, owner and the other end hear of the end."""

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise ZeroDivisionError(name)

    link = await gateway.join(edge)
    (near,) = edge.tunnels._links
    near._websocket = cast(Any, Broken())
    stream = edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=True)
    with pytest.raises(StreamReset):
        await asyncio.wait_for(stream.head(), 5)
    assert near.end is not None
    assert near.end.code is ErrorCode.INTERNAL_ERROR
    await asyncio.wait_for(asyncio.shield(near.closed), 5)
    await asyncio.wait_for(asyncio.shield(link.closed), 5)
    assert edge.tunnels.status() == []
    assert "a fault of our own" in caplog.text
