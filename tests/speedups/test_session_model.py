"""Two sessions, two bounded pipes that cut anywhere, and a clock, against the model (tunnel specification in model.py).

Each end has an `Endpoint` of the model that sees the frames which the end sends and receives. What must hold: bytes
come in order and complete; nobody exceeds credit, and session and model agree on where it ends; windows stay within the
budget; states agree; and when all readers resume, everything completes and all memory is given back.

More examples: HYPOTHESIS_PROFILE=long pytest tests/speedups/test_session_model.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from speedups import model
from speedups.pair import HEAD, LONG, OK, Owner, Recorder, pattern

from guestpass_speedups.session import Budget, ErrorCode, Session, Stream, StreamRefused

FLOOR = 1024
BUDGET = 48 * 1024
MAX_WINDOW = 16 * 1024
PIPE = 20_000


class Boom(Exception):
    pass


@dataclass
class Side:
    """One end: the session, the model's view, and the pipe that carries its output."""

    edge: bool
    budget: Budget = field(default_factory=lambda: Budget(BUDGET))
    owner: Owner = field(default_factory=Owner)
    session: Session = field(init=False)
    view: model.Endpoint = field(init=False)
    pipe: bytearray = field(default_factory=bytearray)
    outgoing: model.Splitter = field(default_factory=model.Splitter)
    incoming: model.Splitter = field(default_factory=model.Splitter)
    halves: dict[int, Half] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session = Session(
            self.edge, self.owner, self.budget, now=0.0, max_streams=12, floor=FLOOR, max_window=MAX_WINDOW
        )
        self.session.set_peer_limits(floor=FLOOR, max_streams=12)
        self.view = model.Endpoint(self.edge, FLOOR, FLOOR, 12)


@dataclass
class Half:
    """One end of one stream, as the application sees it."""

    side: Side
    stream: Stream
    handler: Recorder
    queued: int = 0  # body bytes given to send
    ended: bool = False
    head_sent: bool = False
    dropped: bool = False  # reset here: what was queued may be lost
    trailers: bytes | None = None
    interims: int = 0

    @property
    def alive(self) -> bool:
        return not self.handler.closed and not self.dropped and self.handler.reset_code is None


class Tunnel(RuleBasedStateMachine):
    streams = Bundle("streams")

    @initialize()
    def handshake(self) -> None:
        self.now = 0.0
        self.edge = Side(True)
        self.gateway = Side(False)
        self.sides = (self.edge, self.gateway)
        self.gateway.owner.accept = self._accepted
        self.mode: dict[int, str] = {}
        self.drained = False
        for side in self.sides:
            side.session.send_hello(b"{}")
            side.session.send_auth(b"{}")

    # -- what applications do --------------------------------------------------------------------------------------

    def _accepted(self, stream: Stream) -> Recorder | None:
        mode = self.mode.get(stream.id, "plain")
        if mode == "refuse":
            return None
        if mode == "raise in open":
            raise Boom
        handler = Recorder(auto=mode == "auto")
        half = Half(self.gateway, stream, handler)
        self.gateway.halves[stream.id] = half
        handler.react = self._reaction(half, mode)
        return handler

    def _reaction(self, half: Half, mode: str) -> Any:
        def react(name: str, stream: Stream) -> None:
            if name == "reset" and mode == "auto":
                stream.cancelled()
            elif name == "data" and mode == "reset in data":
                half.dropped = True
                stream.reset(ErrorCode.CANCEL)
            elif name == "data" and mode == "raise in data":
                half.dropped = True
                raise Boom
            elif (name == "reset" and mode == "raise in reset") or (
                name == "closed" and mode == "raise in closed"
            ):
                raise Boom

        return react

    @rule(
        target=streams,
        size=st.sampled_from((0, 1, 700, 5000)),
        fin=st.booleans(),
        interactive=st.booleans(),
        mode=st.sampled_from(
            (
                "auto",
                "auto",
                "plain",
                "plain",
                "refuse",
                "raise in open",
                "reset in data",
                "raise in data",
                "raise in reset",
                "raise in closed",
            )
        ),
    )
    def open(self, size: int, fin: bool, interactive: bool, mode: str) -> Any:
        handler = Recorder(auto=mode == "auto")
        before = self.edge.session.streams
        try:
            stream = self.edge.session.open(
                "web", HEAD, handler, interactive=interactive, fin=fin, body=pattern(0, size)
            )
        except StreamRefused as exc:
            assert self.edge.session.streams == before
            if exc.code == ErrorCode.DRAINING:
                assert self.edge.session.draining
            elif exc.code == ErrorCode.LIMIT_EXCEEDED:
                assert before == 12
            else:
                overloaded = self.edge.budget.promised + FLOOR > BUDGET
                assert (exc.code, overloaded) == (ErrorCode.OVERLOADED, True)  # noqa: PT017
            return multiple()
        assert before < 12
        self.mode[stream.id] = mode
        half = Half(self.edge, stream, handler, queued=size, ended=fin, head_sent=True)
        handler.react = self._reaction(half, mode if mode != "refuse" else "plain")
        self.edge.halves[stream.id] = half
        return stream.id

    def _half(self, number: int, at_edge: bool) -> Half | None:
        half = (self.edge if at_edge else self.gateway).halves.get(number)
        return half if half is not None and half.alive else None

    @rule(number=streams, interim=st.booleans(), fin=st.booleans(), big=st.booleans())
    def respond(self, number: int, interim: bool, fin: bool, big: bool) -> None:
        half = self._half(number, at_edge=False)
        if half is None or half.head_sent or half.ended:
            return
        fin = fin and not interim
        half.stream.send_head(OK + b"x" * (20_000 if big else 0), interim=interim, fin=fin)
        half.interims += interim
        half.head_sent = not interim
        half.ended = fin

    @rule(
        number=streams,
        at_edge=st.booleans(),
        size=st.sampled_from((0, 1, 100, 1024, 3000, 40_000)),
        fin=st.booleans(),
    )
    def send(self, number: int, at_edge: bool, size: int, fin: bool) -> None:
        half = self._half(number, at_edge)
        if half is None or half.ended or not half.head_sent:
            return
        half.stream.send(pattern(half.queued, size), fin=fin)
        half.queued += size
        half.ended = fin

    @rule(number=streams, at_edge=st.booleans())
    def trailers(self, number: int, at_edge: bool) -> None:
        half = self._half(number, at_edge)
        if half is None or half.ended or not half.head_sent:
            return
        half.trailers = b"a: b\r\n\r\n"
        half.stream.send_trailers(half.trailers)
        half.ended = True

    @rule(number=streams, at_edge=st.booleans(), size=st.integers(1, 4000))
    def consume(self, number: int, at_edge: bool, size: int) -> None:
        half = (self.edge if at_edge else self.gateway).halves.get(number)
        if half is not None and half.handler.unconsumed:
            size = min(size, half.handler.unconsumed)
            half.handler.unconsumed -= size
            half.stream.consume(size)

    @rule(number=streams, at_edge=st.booleans())
    def reset(self, number: int, at_edge: bool) -> None:
        half = (self.edge if at_edge else self.gateway).halves.get(number)
        if half is not None:
            half.stream.reset(ErrorCode.CANCEL)
            half.dropped = half.dropped or not half.handler.closed

    @rule(number=streams, at_edge=st.booleans())
    def cancelled(self, number: int, at_edge: bool) -> None:
        half = (self.edge if at_edge else self.gateway).halves.get(number)
        if half is not None:
            half.stream.cancelled()

    # Races that chance alone finds too seldom.

    @rule(number=streams, edge_first=st.booleans(), write=st.booleans())
    def both_reset(self, number: int, edge_first: bool, write: bool) -> None:
        """Neither has heard of the other's RESET; `write`: and one of the two was written already."""
        for at_edge in (edge_first, not edge_first):
            self.reset(number, at_edge)
            if write:
                self.write(edge_first, 65_536)

    @rule(number=streams, at_edge=st.booleans())
    def reset_while_the_last_fin_is_under_way(self, number: int, at_edge: bool) -> None:
        first, last = (self.edge, self.gateway) if at_edge else (self.gateway, self.edge)
        for side in (first, last):
            half = self._half(number, side.edge)
            if half is None:
                return
            if not half.head_sent:
                half.stream.send_head(OK)
                half.head_sent = True
            if not half.ended:
                half.stream.send(b"", fin=True)
                half.ended = True
            if side is first:
                self.write(side.edge, 65_536)
                self._read(last, PIPE * 2)
        self.write(last.edge, 65_536)
        self.reset(number, first.edge)
        self.write(first.edge, 65_536)

    # -- what the network does -------------------------------------------------------------------------------------

    @rule(at_edge=st.booleans(), limit=st.sampled_from((1, 50, 700, 5000, 65_536)))
    def write(self, at_edge: bool, limit: int) -> None:
        side = self.edge if at_edge else self.gateway
        if len(side.pipe) < PIPE:
            self._write(side, limit)

    def _write(self, side: Side, limit: int) -> int:
        had = side.session.has_output
        data = side.session.fill(limit, self.now)
        assert bool(data) == had
        frames = side.outgoing.feed(data)
        assert not side.outgoing.rest, "fill returned a part of a frame"
        for frame in frames:
            side.view.sent(frame)
        side.pipe += data
        return len(data)

    @rule(at_edge=st.booleans(), size=st.integers(1, 30_000))
    def read(self, at_edge: bool, size: int) -> None:
        self._read(self.edge if at_edge else self.gateway, size)

    @rule(at_edge=st.booleans())
    def read_byte_by_byte(self, at_edge: bool) -> None:
        for _ in range(60):
            self._read(self.edge if at_edge else self.gateway, 1)

    def _read(self, side: Side, size: int) -> None:
        other = self.gateway if side.edge else self.edge
        data = bytes(other.pipe[:size])
        del other.pipe[:size]
        for frame in side.incoming.feed(data):
            side.view.received(frame)
        side.session.receive(data, self.now)

    @rule(seconds=st.sampled_from((0.0, 0.001, 0.02, 0.5, 1.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for side in self.sides:
            if self.now - side.session.last_received < 5:
                side.session.tick(self.now)

    @rule(at_edge=st.booleans())
    def info(self, at_edge: bool) -> None:
        (self.edge if at_edge else self.gateway).session.send_info(b'{"load":{}}')

    @rule(hard=st.booleans())
    def drain(self, hard: bool) -> None:
        self.drained = True
        last = None if hard else 2**30 - 1
        self.gateway.view.decide_goaway(last)
        self.gateway.session.goaway(ErrorCode.DRAINING, last)

    # -- what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def states_agree(self) -> None:
        for side in self.sides:
            for number, half in side.halves.items():
                view = side.view.streams.get(number, model.StreamView())
                expected = view.state
                actual = half.stream.state
                if half.handler.closed:
                    assert actual == "CLOSED"
                if expected in ("IDLE", *model.LIVE) and actual == "RESETTING":
                    continue  # reset here, RESET still waits
                if view.state == "IDLE" and number > side.view.received_goaway:
                    assert actual == "CLOSED"  # turned away before it was sent
                    continue
                assert actual == expected, (number, side.edge)
                if expected in model.LIVE and not half.dropped:
                    assert half.stream.bytes_sent == view.sent
                    assert half.stream.bytes_received == view.received
                    assert half.stream.credit == view.may_send - view.sent

    @invariant()
    def memory_is_bounded(self) -> None:
        for side in self.sides:
            assert side.session.streams <= 12
            assert side.budget.promised <= BUDGET
            held = sum(half.handler.unconsumed for half in side.halves.values() if half.alive)
            assert held <= side.budget.promised

    @invariant()
    def bytes_in_order(self) -> None:
        for side, other in (self.sides, self.sides[::-1]):
            for number, half in side.halves.items():
                body = half.handler.body
                assert body == pattern(0, len(body)), (number, side.edge)
                if number in other.halves:
                    assert len(body) <= other.halves[number].queued
                assert half.handler.closed <= 1

    def _pump(self) -> None:
        for _ in range(5000):
            moved = 0
            for side in self.sides:
                if len(side.pipe) < PIPE:
                    moved += self._write(side, 65_536)
            for side in self.sides:
                self._read(side, 40_000)
            for side in self.sides:
                for half in side.halves.values():
                    if half.handler.unconsumed:
                        half.stream.consume(half.handler.unconsumed)
                        half.handler.unconsumed = 0
            if not moved and not any(side.session.has_output or side.pipe for side in self.sides):
                return
        raise AssertionError("never falls silent")

    def teardown(self) -> None:
        if not hasattr(self, "edge"):
            return
        self._pump()
        self.states_agree()
        # Readers have resumed: all that was queued has arrived, except where a reset lost it.
        for side, other in (self.sides, self.sides[::-1]):
            for number, half in side.halves.items():
                peer = other.halves.get(number)
                if peer is None or not half.alive or not peer.alive:
                    continue
                assert half.stream.queued == 0
                assert len(peer.handler.body) == half.queued
                assert peer.handler.trailers == half.trailers
                assert peer.handler.fin == half.ended
                if not side.edge:
                    assert len(peer.handler.interims) == half.interims
                    assert len(peer.handler.heads) == half.head_sent
        # End everything: no slot and no promise is left behind.
        for side in self.sides:
            for half in side.halves.values():
                if half.handler.reset_code is not None and not half.handler.closed:
                    half.stream.cancelled()
                if half.alive and not half.head_sent:
                    half.stream.send_head(OK)
                    half.head_sent = True
                if half.alive and not half.ended:
                    half.ended = True
                    half.stream.send(b"", fin=True)
        self._pump()
        for side in self.sides:
            for half in side.halves.values():
                if half.handler.reset_code is not None:
                    half.stream.cancelled()
        self._pump()
        for side in self.sides:
            assert side.session.streams == 0
            assert side.budget.promised == 0
            assert side.session.failure is None
            assert all(half.handler.closed for half in side.halves.values())
            assert all(isinstance(exc, Boom) for exc in side.owner.failures)
            assert side.session.stats()["stale"] == 0
            goaways = sum(entry[0] == "goaway" for entry in side.owner.log)
            late_pongs = side.session.stats()["frames_in_pong"] - len(side.owner.rtts)
            assert side.session.stats()["glitches"] == goaways + late_pongs


TestTunnel = Tunnel.TestCase
TestTunnel.settings = settings(
    max_examples=3000 if LONG else 150,
    stateful_step_count=120 if LONG else 50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
pytestmark = pytest.mark.timeout(3600 if LONG else 120)
