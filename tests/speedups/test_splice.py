"""Streams of one worker's visitors on another worker's tunnel: two sessions back to back with two more."""

from __future__ import annotations

from typing import Any

import pytest
from speedups.pair import HEAD, OK, Owner, Pair, Recorder, pattern

from guestpass_speedups.session import Budget, ErrorCode, Session, Stream, StreamRefused
from guestpass_speedups.splice import Near, SpliceSession

# Bytes that may wait in one direction: a window at each socket, grown a little, and a queue at each sender.
BOUND = 1 << 20


class Holder(Owner):
    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[Session] = []
        self.parked: list[Near] = []

    def ways(self) -> list[Session]:
        return self.sessions

    def no_way(self, stream: Near) -> None:
        self.parked.append(stream)


class Chain:
    """visitor's session ══ splice ── tunnel's session ══ gateway's session"""

    def __init__(self, **limits: int) -> None:
        self.tunnel = Pair(**limits)
        self.visitor_budget, self.holder_budget = Budget(), Budget()
        self.visitor = Session(True, Owner(), self.visitor_budget, now=0.0)
        self.holder = Holder()
        self.holder.sessions = [self.tunnel.edge.session]
        self.near = SpliceSession(False, self.holder, self.holder_budget, now=0.0)
        self.visitor.send_hello(b"{}")
        self.visitor.send_auth(b"{}")
        self.near.send_hello(b"{}")
        self.shuttle()

    def shuttle(self) -> None:
        for _ in range(10_000):
            moved = False
            for source, target in ((self.visitor, self.near), (self.near, self.visitor)):
                data = source.fill(65_536, 0.0)
                target.receive(data, 0.0)
                moved |= bool(data)
            moved |= self.tunnel.edge.session.has_output or self.tunnel.gateway.session.has_output
            self.tunnel.shuttle()
            if not moved:
                return
        raise AssertionError("the chain never falls silent")

    def open(self, handler: Recorder | None = None, **more: Any) -> tuple[Stream, Recorder, Stream, Recorder]:
        handler = handler or Recorder()
        stream = self.visitor.open("web", HEAD, handler, **more)
        self.shuttle()
        far, service, _, head, _, there = self.tunnel.gateway.owner.opened[-1]
        assert (service, head) == ("web", HEAD)
        return stream, handler, far, there

    def check_idle(self) -> None:
        """Nothing is left of any stream."""
        self.shuttle()
        for session in (self.visitor, self.near, self.tunnel.edge.session, self.tunnel.gateway.session):
            assert session.streams == 0
        for budget in (self.visitor_budget, self.holder_budget, self.tunnel.edge_budget):
            assert budget.promised == 0
        assert not self.holder.failures
        assert not self.tunnel.edge.owner.failures


def test_an_exchange() -> None:
    chain = Chain()
    stream, visitor, far, application = chain.open(body=pattern(0, 5000))
    stream.send(pattern(5000, 20_000), fin=True)
    chain.shuttle()
    assert bytes(application.body) == pattern(0, 25_000)
    assert application.fin
    far.send_head(b"HTTP/1.1 103 Early Hints\r\n\r\n", interim=True)
    far.send_head(OK)
    far.send(pattern(0, 30_000))
    far.send_trailers(b"x: y\r\n\r\n")
    chain.shuttle()
    assert visitor.interims == [b"HTTP/1.1 103 Early Hints\r\n\r\n"]
    assert visitor.heads == [OK]
    assert bytes(visitor.body) == pattern(0, 30_000)
    assert visitor.trailers == b"x: y\r\n\r\n"
    assert (visitor.closed, application.closed) == (1, 1)
    chain.check_idle()


def test_trailers_of_a_request_and_an_answer_without_a_body() -> None:
    chain = Chain()
    stream, visitor, far, application = chain.open()
    stream.send(b"body")
    stream.send_trailers(b"a: b\r\n\r\n")
    chain.shuttle()
    assert (bytes(application.body), application.trailers) == (b"body", b"a: b\r\n\r\n")
    far.send_head(OK, fin=True)
    chain.shuttle()
    assert (visitor.heads, visitor.fin, visitor.closed) == ([OK], True, 1)
    chain.check_idle()


def test_credit_is_end_to_end_for_answers() -> None:
    chain = Chain()
    stream, visitor, far, _ = chain.open(Recorder(auto=False), fin=True)
    far.send_head(OK)
    sent = 16_384
    while far.send(pattern(sent - 16_384, 16_384)):
        sent += 16_384
        chain.shuttle()
        assert sent <= BOUND, "nobody stops the application"
    # Somebody else is not held up.
    _, other, quick, _ = chain.open(fin=True)
    quick.send_head(OK)
    quick.send(pattern(0, 200_000), fin=True)
    chain.shuttle()
    assert (len(other.body), other.closed) == (200_000, 1)
    # The reader goes on, and everything arrives in order.
    far.send(b"", fin=True)
    while not visitor.fin:
        held, visitor.unconsumed = visitor.unconsumed, 0
        assert held, "nothing comes any more"
        stream.consume(held)
        chain.shuttle()
    assert bytes(visitor.body) == pattern(0, sent)
    stream.consume(visitor.unconsumed)
    chain.check_idle()


def test_credit_is_end_to_end_for_requests() -> None:
    chain = Chain()
    chain.tunnel.gateway.owner.accept = lambda stream: Recorder(auto=False)
    stream, _, far, application = chain.open()
    sent = 16_384
    while stream.send(pattern(sent - 16_384, 16_384)):
        sent += 16_384
        chain.shuttle()
        assert sent <= BOUND, "nobody stops the visitor"
    stream.send(b"", fin=True)
    while not application.fin:
        held, application.unconsumed = application.unconsumed, 0
        assert held, "nothing comes any more"
        far.consume(held)
        chain.shuttle()
    assert bytes(application.body) == pattern(0, sent)


def test_a_reset_by_the_visitor_is_acknowledged_when_the_application_has_stopped() -> None:
    chain = Chain()
    stream, visitor, far, application = chain.open(fin=True)
    stream.reset(ErrorCode.CANCEL)
    chain.shuttle()
    assert application.reset_code == ErrorCode.CANCEL
    assert chain.visitor.streams == 1, "acknowledged while the application works"
    far.cancelled()
    chain.shuttle()
    assert visitor.closed == 1
    chain.check_idle()


def test_a_reset_by_the_gateway_reaches_the_visitor() -> None:
    chain = Chain()
    _, visitor, far, _ = chain.open(fin=True)
    far.reset(ErrorCode.BAD_UPSTREAM)
    chain.shuttle()
    assert visitor.reset_code == ErrorCode.BAD_UPSTREAM


@pytest.mark.parametrize("answered", [False, True])
def test_a_lost_tunnel_says_whether_the_request_may_be_sent_again(answered: bool) -> None:
    chain = Chain()
    _, visitor, far, _ = chain.open(fin=True)
    if answered:
        far.send_head(OK)
        chain.shuttle()
    chain.tunnel.edge.session.abort(ErrorCode.UNREACHABLE)
    for source, target in ((chain.near, chain.visitor), (chain.visitor, chain.near)):
        target.receive(source.fill(65_536, 0.0), 0.0)
    assert visitor.reset_code == (ErrorCode.UNREACHABLE if answered else ErrorCode.DRAINING)


def test_a_lost_link_cancels_at_the_gateway() -> None:
    chain = Chain()
    _, _, far, application = chain.open(fin=True)
    chain.near.abort(ErrorCode.DRAINING)
    chain.tunnel.shuttle()
    assert application.reset_code == ErrorCode.DRAINING
    far.cancelled()
    chain.tunnel.shuttle()
    assert chain.tunnel.edge.session.streams == 0


def test_the_next_way_is_tried() -> None:
    chain = Chain()
    draining = Pair()
    draining.edge.session.goaway(ErrorCode.DRAINING)
    chain.holder.sessions = [draining.edge.session, chain.tunnel.edge.session]
    _, _, far, _ = chain.open(fin=True)
    assert far.session is chain.tunnel.gateway.session
    assert not chain.holder.parked


@pytest.mark.parametrize("size", [0, 10, 30_000])
@pytest.mark.parametrize("end", ["fin", "trailers", "later"])
def test_what_is_parked_goes_by_another_way(size: int, end: str) -> None:
    chain = Chain()
    (way,), chain.holder.sessions = chain.holder.sessions, []
    visitor = Recorder()
    stream = chain.visitor.open("web", HEAD, visitor, fin=end == "fin" and not size)
    if size:
        stream.send(pattern(0, size), fin=end == "fin")
    if end == "trailers":
        stream.send_trailers(b"a: b\r\n\r\n")
    chain.shuttle()
    (near,) = chain.holder.parked
    assert near.waits
    draining = Pair()
    draining.edge.session.goaway(ErrorCode.DRAINING)
    with pytest.raises(StreamRefused):
        near.go(draining.edge.session)
    near.go(way)
    near.refuse()  # too late, and so nothing
    if end == "later":
        stream.send(pattern(size, 200_000), fin=True)
        size += 200_000
    chain.shuttle()
    far, _, _, _, _, application = chain.tunnel.gateway.owner.opened[-1]
    assert (bytes(application.body), application.fin) == (pattern(0, size), True)
    assert application.trailers == (b"a: b\r\n\r\n" if end == "trailers" else None)
    far.send_head(OK, fin=True)
    chain.shuttle()
    assert visitor.heads == [OK]
    chain.check_idle()


def test_what_is_parked_is_refused_or_given_up() -> None:
    chain = Chain()
    (way,), chain.holder.sessions = chain.holder.sessions, []
    refused, given_up = Recorder(), Recorder()
    chain.visitor.open("web", HEAD, refused, body=b"x", fin=True)
    stream = chain.visitor.open("web", HEAD, given_up, body=b"x", fin=True)
    chain.shuttle()
    first, second = chain.holder.parked
    first.refuse()
    stream.reset(ErrorCode.CANCEL)
    chain.shuttle()
    assert refused.reset_code == ErrorCode.DRAINING
    assert not second.waits
    second.go(way)
    assert given_up.closed == 1
    assert not chain.tunnel.gateway.owner.opened
