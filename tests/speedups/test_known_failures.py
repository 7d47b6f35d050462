"""Failures of other multiplexers, each shown not to happen here, as far as a session without sockets can show it.

The list is that of the tunnel's design: issue trackers and advisories of yamux, smux, muxado, HTTP/2 stacks, chisel,
frp, cloudflared. What needs sockets, processes or networks (reconnect, "already in use", black holes) is tested
elsewhere.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from speedups import model, pair
from speedups.model import AUTH, CREDIT, DATA, FIN, GOAWAY, HELLO, INFO, OPEN, PING, PONG, RESET, RESET_ACK
from speedups.pair import HEAD, OK, Owner, Pair, Recorder

from guestpass_speedups.session import (
    FLOOR,
    MAX_WINDOW,
    Budget,
    ErrorCode,
    Session,
    StreamRefused,
    TunnelError,
)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def open_frame(number: int, flags: int = 0, body: bytes = b"") -> bytes:
    return model.frame(OPEN, flags, number, model.open_payload("web", HEAD, body))


def how_many(
    session: Session, frames: bytes | Callable[[int], bytes], most: int = 5000, *, write: bool = False
) -> int:
    """How often the peer may send `frames` at once (for the 1st, 2nd, … time) before the tunnel ends.

    `write`: what the session answers leaves at once; else nothing is written.
    """
    for count in range(most):
        try:
            session.receive(frames if isinstance(frames, bytes) else frames(count + 1), 0.0)
        except TunnelError:
            break
        if write:
            session.fill(1 << 17, 0.0)
    else:
        return most
    assert session.failure is not None
    assert session.failure.code is ErrorCode.LIMIT_EXCEEDED
    return count


def fall_silent(session: Session) -> None:
    """Nothing comes for 6 s."""
    for now in range(1, 6):
        session.tick(float(now))
    with pytest.raises(TunnelError) as caught:
        session.tick(6.0)
    assert caught.value.code is ErrorCode.TIMEOUT


# -- smux #18, #85; WaterWall #332 -------------------------------------------------------------------------------------


def test_a_slow_reader_does_not_stall_other_streams() -> None:
    both = Pair()
    stalled, handler, gateway, _ = both.exchange(fin=True)
    handler.auto = False
    gateway.send_head(OK)
    gateway.send(bytes(1 << 20))
    both.shuttle()
    assert stalled.bytes_received == FLOOR
    for _ in range(99):
        _, other, answering, _ = both.exchange(fin=True)
        answering.send_head(OK)
        answering.send(bytes(100_000), fin=True)
        both.shuttle()
        assert len(other.body) == 100_000
        assert other.closed == 1
    assert stalled.bytes_received == FLOOR
    assert both.edge_budget.promised == stalled.window


# -- nghttp2 #713; hyper #2899: stream window = connection window ------------------------------------------------------


def test_a_paused_download_does_not_capture_the_connection() -> None:
    both = Pair()
    paused = []
    for _ in range(50):
        _, handler, gateway, _ = both.exchange(fin=True)
        handler.auto = False
        gateway.send_head(OK)
        gateway.send(bytes(1 << 20))
        paused.append(gateway)
    both.shuttle()
    _, handler, gateway, _ = both.exchange(fin=True)
    gateway.send_head(OK)
    gateway.send(bytes(1 << 20), fin=True)
    both.shuttle()
    assert handler.closed == 1
    assert len(handler.body) == 1 << 20
    assert all(gateway.credit == 0 for gateway in paused)


# -- rust-yamux #227; h2o #912: reading gated on writing ---------------------------------------------------------------


def test_both_sides_push_and_neither_stops_reading() -> None:
    """Each end writes 700 bytes at a time and reads all that comes: neither waits for the other."""
    both = Pair()
    edge, handler, gateway, peer = both.exchange()
    gateway.send_head(OK)
    both.shuttle()
    for stream in (edge, gateway):
        stream.send(bytes(1 << 20))
    for _ in range(10_000):
        to_gateway = both.edge.fill(700, 0.0)
        to_edge = both.gateway.fill(700, 0.0)
        both.gateway.session.receive(to_gateway, 0.0)
        both.edge.session.receive(to_edge, 0.0)
        if len(handler.body) == len(peer.body) == 1 << 20:
            return
    raise AssertionError("deadlock")


def test_reading_goes_on_without_any_writing() -> None:
    session, owner = pair.gateway()
    owner.accept = lambda stream: Recorder(auto=False)
    session.receive(b"".join(open_frame(number, 0, bytes(20_000)) for number in range(1, 1001)), 0.0)
    assert session.streams == 1000
    for stream, *_ in owner.opened:
        stream.consume(20_000)
    assert len(session.fill(1 << 17, 0.0)) == 1000 * 16  # one CREDIT each, however many bytes


# -- frp #2987, pangolin #1389: window / RTT caps one stream -----------------------------------------------------------


@pytest.mark.parametrize("rtt", [0.02, 0.1])
def test_one_stream_fills_a_long_pipe(rtt: float) -> None:
    both = Pair()
    stream, _handler, gateway, _ = both.exchange(fin=True)
    gateway.send_head(OK)
    now = 10.0
    received = []
    for turn in range(40):
        now += 1.0 if turn < 25 else 0.0  # the RTT settles before the download starts
        if turn < 25:
            both.edge.session.ping(now)
        else:
            while gateway.queued < 32 << 20:
                gateway.send(bytes(1 << 20))
        before = stream.bytes_received
        both.gateway.session.receive(both.edge.fill(1 << 17, now), now + rtt / 2)
        now += rtt
        while both.gateway.session.has_output:
            both.edge.session.receive(both.gateway.fill(1 << 17, now - rtt / 2), now)
        received.append(stream.bytes_received - before)
    assert received[-1] == MAX_WINDOW  # a round trip: 160 MB/s at 100 ms, not 320 kB/s


# -- hashicorp/yamux: whole-window frames delay small ones -------------------------------------------------------------


def test_a_small_answer_overtakes_a_download() -> None:
    both = Pair(floor=1 << 20)
    _, _, download, _ = both.exchange(fin=True, interactive=False)
    download.send_head(OK)
    download.send(bytes(1 << 20))
    both.to_edge(1 << 17)
    both.open(fin=True)
    both.to_gateway()
    small = both.gateway.owner.opened[-1][0]
    small.send_head(OK)
    small.send(b"tick", fin=True)
    frames = both.gateway.splitter.feed(both.gateway.fill(1 << 17, 0.0))
    place = next(index for index, frame in enumerate(frames) if frame.stream == small.id)
    assert sum(len(frame.payload) for frame in frames[:place]) <= model.QUANTUM


def test_frames_are_short_even_if_much_waits() -> None:
    both = Pair(floor=1 << 22)
    edge, *_ = both.exchange()
    edge.send(bytes(1 << 22))
    assert {len(frame.payload) for frame in both.to_gateway(1 << 17)} <= {*range(model.MAX_DATA + 1)}


# -- yamux GHSA-29qp-crvh-w22m: a timed-out write leaves the peer's read hung ------------------------------------------


def test_when_a_tunnel_dies_every_stream_hears_of_it() -> None:
    both = Pair()
    waiting = [both.exchange() for _ in range(20)]
    for end in (both.edge, both.gateway):
        fall_silent(end.session)
        end.session.abort(ErrorCode.UNREACHABLE)
    for _, handler, _, peer in waiting:
        for one in (handler, peer):
            assert one.reset_code == ErrorCode.UNREACHABLE
            assert one.closed == 1


def test_a_dead_tunnel_takes_no_more_streams() -> None:
    """The half-dead tunnel that is still used: cloudflared #306, #724, #1381; newt #284, #433."""
    session = Pair().edge.session
    fall_silent(session)
    with pytest.raises(StreamRefused) as caught:
        session.open("web", HEAD, Recorder())
    assert caught.value.code is ErrorCode.UNREACHABLE


# -- rust-yamux CVE-2024-32984: unbounded pending frames ---------------------------------------------------------------


def test_pending_frames_are_bounded_however_much_the_peer_provokes() -> None:
    session, _owner = pair.gateway(max_streams=100)
    session.receive(b"".join(open_frame(number) for number in range(1, 101)), 0.0)
    for round_ in range(200):
        # 100 streams, each consumes and is given credit, RESETs are provoked, PINGs ask for PONGs; nothing is written.
        for number in range(1, 101):
            size = 80 if round_ else 16_000
            session.receive(model.frame(DATA, 0, number, bytes(size)), round_ * 1.0)
        session.receive(model.frame(PING, 0, 0, u64(round_)), round_ * 1.0)
    assert len(session.fill(1 << 20, 200.0)) == 100 * 16 + 16


def test_refused_streams_do_not_pile_up_answers() -> None:
    session, owner = pair.gateway(max_streams=50)
    owner.accept = lambda stream: None
    session.receive(b"".join(open_frame(number) for number in range(1, 51)), 0.0)
    with pytest.raises(TunnelError) as caught:
        session.receive(open_frame(51), 0.0)  # slots are held until RESET_ACK
    assert caught.value.code is ErrorCode.LIMIT_EXCEEDED


# -- rust-yamux CVE-2026-31814: window overflow; CVE-2026-32314: oversized first frame ---------------------------------


def test_credit_cannot_overflow() -> None:
    session, owner = pair.gateway()
    session.receive(open_frame(1, FIN) + model.frame(CREDIT, 0, 1, u64(2**64 - 1)), 0.0)
    stream = owner.opened[0][0]
    assert stream.credit == 2**64 - 1
    stream.send_head(OK)
    stream.send(bytes(100_000), fin=True)
    splitter = model.Splitter()
    body = b"".join(frame.body for frame in splitter.feed(session.fill(1 << 17, 0.0)))
    assert len(body) == 100_000
    session.receive(model.frame(CREDIT, 0, 1, u64(2**64 - 1)), 0.0)  # CLOSED by now: dropped
    assert session.failure is None


@pytest.mark.parametrize(
    "first",
    [
        model.frame(OPEN, 0, 1, model.open_payload("web", HEAD, bytes(FLOOR + 1))),
        open_frame(1) + model.frame(DATA, 0, 1, bytes(16_368)) * 2 + model.frame(DATA, 0, 1, bytes(16_368)),
    ],
)
def test_oversized_first_frames(first: bytes) -> None:
    session, owner = pair.gateway()
    owner.accept = lambda stream: Recorder(auto=False)
    with pytest.raises(TunnelError) as caught:
        session.receive(first, 0.0)
    assert caught.value.code is ErrorCode.FLOW_CONTROL_ERROR


@pytest.mark.parametrize("kind", [DATA, HELLO, AUTH, model.TRAILERS])
def test_oversized_frames_are_refused_by_their_header(kind: int) -> None:
    session = pair.gateway()[0]
    with pytest.raises(TunnelError) as caught:
        session.receive(struct.pack(">HBBI", 65_535, kind, 0, 0 if kind >= PING else 1), 0.0)
    assert caught.value.code is ErrorCode.PROTOCOL_ERROR


# -- HTTP/2, the floods of 2019; CVE-2023-44487; CVE-2025-8671; RUSTSEC-2026-0258 --------------------------------------


def test_ping_flood() -> None:
    session, _ = pair.gateway()
    assert how_many(session, model.frame(PING, 0, 0, bytes(8)), 100) == 20
    session, _ = pair.gateway()
    for second in range(100):
        session.receive(model.frame(PING, 0, 0, bytes(8)) * 2, float(second))
        assert len(session.fill(1000, float(second))) <= 16 + 16


def test_info_flood() -> None:
    """HTTP/2's SETTINGS flood: each INFO costs its reader a JSON document."""
    session, owner = pair.edge()
    assert how_many(session, model.frame(INFO, 0, 0, b"{}"), 100) == 20
    assert len(owner.log) == 1 + 20


def test_empty_frame_flood() -> None:
    session, owner = pair.gateway()
    session.receive(open_frame(1), 0.0)
    assert how_many(session, model.frame(DATA, 0, 1), 3000) == 1000
    assert owner.opened[0][5].calls == []


def test_flood_of_tiny_credit() -> None:
    session, _ = pair.gateway()
    session.receive(open_frame(1), 0.0)
    grow = FLOOR // 8 - 1
    assert how_many(session, lambda count: model.frame(CREDIT, 0, 1, u64(FLOOR + count * grow))) == 1000


@pytest.mark.parametrize(
    "stale",
    [
        model.frame(DATA, 0, 1, b"x"),
        model.frame(RESET_ACK, 0, 1),
        model.frame(CREDIT, 0, 1, u64(1 << 30)),
        model.frame(RESET, 0, 1, u32(5)),
        model.frame(GOAWAY, 0, 0, u32(0) + u32(0)),
        model.frame(PONG, 0, 0, bytes(8)),
    ],
)
def test_floods_of_stale_frames_draw_no_answers(stale: bytes) -> None:
    session, owner = pair.gateway()
    session.receive(open_frame(1, FIN), 0.0)
    owner.opened[0][0].send_head(OK, fin=True)
    session.fill(1 << 17, 0.0)
    assert session.streams == 0
    assert 1000 <= how_many(session, stale, 3000) <= 1008
    splitter = model.Splitter()
    assert [frame.kind for frame in splitter.feed(session.fill(1 << 17, 0.0))] == [GOAWAY]


def test_stale_frames_at_a_human_pace_are_forgiven() -> None:
    session, owner = pair.gateway()
    session.receive(open_frame(1, FIN), 0.0)
    owner.opened[0][0].send_head(OK, fin=True)
    session.fill(1 << 17, 0.0)
    for tenth in range(600):
        session.receive(model.frame(DATA, 0, 1, b"x") * 33, tenth / 10)
    assert session.stats()["stale"] == 600 * 33


def test_credit_that_crosses_the_last_fin_is_no_glitch() -> None:
    """10,000 downloads a second, each with a CREDIT on its way when it ends, are normal life."""
    session, owner = pair.gateway()
    for number in range(1, 10_001):
        session.receive(open_frame(number, FIN), 0.0)
        owner.opened.pop()[0].send_head(OK, fin=True)
        session.fill(1 << 17, 0.0)
        session.receive(model.frame(CREDIT, 0, number, u64(1 << 20)) * 2, 0.0)
    assert session.stats()["crossed"] == 20_000
    assert session.stats()["glitches"] == 0


def test_rapid_reset_gains_nothing() -> None:
    """CVE-2023-44487: a cancelled stream keeps its slot until the local work has ended, so work stays bounded."""
    session, owner = pair.gateway(max_streams=100)
    assert how_many(session, opened_and_reset) == 100
    assert len(owner.opened) == 100


def opened_and_reset(number: int) -> bytes:
    return open_frame(number) + model.frame(RESET, 0, number, u32(5))


def test_a_flood_of_resets_ends_the_tunnel_even_if_work_ends_at_once() -> None:
    session, owner = pair.gateway(max_streams=100)
    owner.accept = lambda stream: _cancel_at_once()
    assert how_many(session, opened_and_reset, write=True) == 100 + 1000


def _cancel_at_once() -> Recorder:
    handler = Recorder()
    handler.react = lambda name, stream: stream.cancelled() if name == "reset" else None
    return handler


def test_a_flood_of_burned_ids() -> None:
    session, _ = pair.gateway(max_streams=100)
    assert how_many(session, lambda number: model.frame(RESET, 0, number, u32(5))) == 1100


def test_made_you_reset() -> None:
    """CVE-2025-8671: frames that provoke the server's own RESET must not free the slot."""
    session, owner = pair.gateway(max_streams=100)

    def accept(stream: object) -> Recorder:
        handler = Recorder()
        handler.react = lambda name, stream: stream.reset(ErrorCode.BAD_UPSTREAM)
        return handler

    owner.accept = accept
    assert how_many(session, lambda number: open_frame(number, 0, b"provoke"), write=True) == 100
    assert len(owner.opened) == 100


def test_a_whole_tunnel_may_be_revoked_in_one_breath() -> None:
    both = Pair()
    streams = [both.open(body=b"x")[0] for _ in range(10_000)]
    both.gateway.owner.accept = lambda stream: _cancel_at_once()
    both.shuttle(1 << 17)
    assert both.gateway.session.streams == 10_000
    for stream in streams:
        stream.reset(ErrorCode.REVOKED)
    both.shuttle(1 << 17)
    assert both.gateway.session.failure is None
    assert both.edge.session.streams == both.gateway.session.streams == 0
    assert both.edge_budget.promised == both.gateway_budget.promised == 0


def test_a_service_that_is_down_does_not_end_the_tunnel() -> None:
    """The gateway answers each request with RESET(UNREACHABLE): that is the edge's own doing, at any rate."""
    both = Pair()

    def accept(stream: object) -> Recorder:
        stream.reset(ErrorCode.UNREACHABLE)  # type: ignore[attr-defined]
        return Recorder()

    both.gateway.owner.accept = accept
    for _ in range(300):
        opened = [both.open(fin=True) for _ in range(100)]
        both.shuttle(1 << 17)
        for stream, handler in opened:
            assert handler.reset_code == ErrorCode.UNREACHABLE
            stream.cancelled()
        both.shuttle(1 << 17)
        both.gateway.owner.opened.clear()
    assert both.edge.session.failure is None
    assert both.edge.session.stats()["frames_in_reset"] == 30_000


def test_handshake_flood_is_over_after_one_hello() -> None:
    session = Session(True, Owner(), Budget(), now=0.0)
    hello = model.frame(HELLO, 0, 0, b"{}")
    with pytest.raises(TunnelError) as caught:
        session.receive(hello * 2, 0.0)
    assert caught.value.code is ErrorCode.PROTOCOL_ERROR
