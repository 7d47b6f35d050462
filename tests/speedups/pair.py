"""An edge's and a gateway's session back to back, with handlers that record, for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from speedups import model

from guestpass_speedups.session import Budget, Session, Stream

# HYPOTHESIS_PROFILE=long runs more examples of everything in this folder, for minutes instead of seconds.
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
EXAMPLES = 50 if LONG else 1

HEAD = b"GET /x HTTP/1.1\r\nhost: a.b\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n\r\n"
PATTERN = bytes((i * 31 + (i >> 8) * 17) & 0xFF for i in range(1 << 16))


def pattern(offset: int, size: int) -> bytes:
    """`size` bytes of an endless sequence, from `offset`: what a stream's body is made of, so that order shows."""
    start = offset % len(PATTERN)
    repeats = (start + size) // len(PATTERN) + 1
    return (PATTERN * repeats)[start : start + size]


class Recorder:
    """A StreamHandler that checks the order of its calls. `auto`: consume at once."""

    def __init__(self, *, auto: bool = True) -> None:
        self.auto = auto
        self.heads: list[bytes] = []
        self.interims: list[bytes] = []
        self.body = bytearray()
        self.fin = False
        self.trailers: bytes | None = None
        self.reset_code: int | None = None
        self.closed = 0
        self.writable = 0
        self.unconsumed = 0
        self.calls: list[str] = []
        self.react: Callable[[str, Stream], None] | None = None

    def _called(self, name: str) -> None:
        assert not self.closed, f"{name} after stream_closed"
        assert self.reset_code is None or name == "closed", f"{name} after stream_reset"
        assert not self.fin or name in ("reset", "closed", "writable"), f"{name} after FIN"
        self.calls.append(name)

    def _then(self, name: str, stream: Stream) -> None:
        if self.react is not None:
            self.react(name, stream)

    def stream_head(self, stream: Stream, head: bytes, interim: bool, fin: bool) -> None:
        assert not self.heads
        self._called("head")
        (self.interims if interim else self.heads).append(head)
        self.fin = fin
        self._then("head", stream)

    def stream_data(self, stream: Stream, data: bytes, fin: bool) -> None:
        assert type(data) is bytes
        self._called("data")
        self.body += data
        self.fin = fin
        if self.auto:
            stream.consume(len(data))
        else:
            self.unconsumed += len(data)
        self._then("data", stream)

    def stream_trailers(self, stream: Stream, trailers: bytes) -> None:
        self._called("trailers")
        self.trailers = trailers
        self.fin = True
        self._then("trailers", stream)

    def stream_reset(self, stream: Stream, code: int) -> None:
        self._called("reset")
        self.reset_code = code
        self._then("reset", stream)

    def stream_writable(self, stream: Stream) -> None:
        self._called("writable")
        self.writable += 1
        self._then("writable", stream)

    def stream_closed(self, stream: Stream) -> None:
        self._called("closed")
        self.closed += 1
        self._then("closed", stream)


class Owner:
    """A SessionHandler that records. A gateway's makes a Recorder for each stream, or asks `accept`."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.opened: list[tuple[Stream, str, bool, bytes, bool, Any]] = []
        self.failures: list[BaseException] = []
        self.wakes = 0
        self.rtts: list[float] = []
        self.accept: Callable[[Stream], Any] = lambda stream: Recorder()

    def output_ready(self) -> None:
        self.wakes += 1

    def hello_received(self, payload: bytes) -> None:
        self.log.append(("hello", payload))

    def auth_received(self, payload: bytes) -> None:
        self.log.append(("auth", payload))

    def info_received(self, payload: bytes) -> None:
        self.log.append(("info", payload))

    def stream_opened(self, stream: Stream, service: str, interactive: bool, head: bytes, fin: bool) -> Any:
        handler = self.accept(stream)
        if isinstance(handler, Recorder):
            handler.fin = fin
        self.opened.append((stream, service, interactive, head, fin, handler))
        return handler

    def goaway_received(self, last_stream: int, code: int) -> None:
        self.log.append(("goaway", last_stream, code))

    def pong_received(self, rtt: float) -> None:
        self.rtts.append(rtt)

    def handler_failed(self, stream: Stream, exc: BaseException) -> None:
        self.failures.append(exc)


class End:
    """One session, its owner, and the page's view of it."""

    def __init__(self, *, edge: bool, budget: Budget, now: float = 0.0, **limits: int) -> None:
        self.owner = Owner()
        self.session = Session(edge, self.owner, budget, now=now, **limits)
        self.splitter = model.Splitter()

    def fill(self, limit: int, now: float) -> bytes:
        return self.session.fill(limit, now)


class Pair:
    """Both ends after the handshake. `shuttle` moves bytes until neither has output."""

    def __init__(
        self, *, budget: int = 1 << 29, floor: int = 32_768, handshake: bool = True, **limits: int
    ) -> None:
        self.now = 0.0
        self.edge_budget = Budget(budget)
        self.gateway_budget = Budget(budget)
        self.edge = End(edge=True, budget=self.edge_budget, floor=floor, **limits)
        self.gateway = End(edge=False, budget=self.gateway_budget, floor=floor, **limits)
        for end in (self.edge, self.gateway):
            end.session.set_peer_limits(floor=floor, max_streams=limits.get("max_streams", 16_384))
        if handshake:
            self.edge.session.send_hello(b'{"role":"edge"}')
            self.gateway.session.send_hello(b'{"role":"gateway"}')
            self.gateway.session.send_auth(b'{"step":"proof"}')
            self.edge.session.send_auth(b'{"step":"verdict","ok":true}')
            self.shuttle()

    def shuttle(self, limit: int = 65_536, rounds: int = 10_000) -> None:
        for _ in range(rounds):
            if not self.edge.session.has_output and not self.gateway.session.has_output:
                return
            self.to_gateway(limit)
            self.to_edge(limit)
        raise AssertionError("the two ends never fall silent")

    def to_gateway(self, limit: int = 65_536) -> list[model.Frame]:
        data = self.edge.fill(limit, self.now)
        self.gateway.session.receive(data, self.now)
        return self.edge.splitter.feed(data)

    def to_edge(self, limit: int = 65_536) -> list[model.Frame]:
        data = self.gateway.fill(limit, self.now)
        self.edge.session.receive(data, self.now)
        return self.gateway.splitter.feed(data)

    def open(self, handler: Any = None, **kwargs: Any) -> tuple[Stream, Any]:
        handler = handler if handler is not None else Recorder()
        return self.edge.session.open("web", HEAD, handler, **kwargs), handler

    def exchange(self, **kwargs: Any) -> tuple[Stream, Any, Stream, Any]:
        """A stream that the gateway has accepted: (edge's stream and handler, gateway's stream and handler)."""
        stream, handler = self.open(**kwargs)
        self.shuttle()
        opened = self.gateway.owner.opened[-1]
        assert opened[0].id == stream.id
        return stream, handler, opened[0], opened[5]


def hello(edge: bool = True, *, verdict: bool = True) -> bytes:
    """What a peer of that role says first."""
    data = model.frame(model.HELLO, 0, 0, b"{}")
    if edge and verdict:
        data += model.frame(model.AUTH, 0, 0, b'{"step":"verdict","ok":true}')
    return data


def gateway(**kwargs: Any) -> tuple[Session, Owner]:
    """A gateway's session that has been let in, to be fed frames by hand."""
    owner = Owner()
    budget = kwargs.pop("budget", None) or Budget()
    session = Session(False, owner, budget, now=0.0, **kwargs)
    session.send_hello(b"{}")
    session.receive(hello(edge=True), 0.0)
    session.fill(65_536, 0.0)
    return session, owner


def edge(**kwargs: Any) -> tuple[Session, Owner]:
    """An edge's session that has let its gateway in, to be fed frames by hand."""
    owner = Owner()
    budget = kwargs.pop("budget", None) or Budget()
    session = Session(True, owner, budget, now=0.0, **kwargs)
    session.send_hello(b"{}")
    session.send_auth(b"{}")
    session.receive(hello(edge=False), 0.0)
    session.fill(65_536, 0.0)
    return session, owner
