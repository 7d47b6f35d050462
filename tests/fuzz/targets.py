"""What is fuzzed of the tunnel: functions of bytes that raise when something is wrong. Used by tunnel.py with
AddressSanitizer, and by test_tunnel_corpus.py without, on the committed inputs.

    websocket   byte 0: bit 0 client; the rest is fed to one end
    session     byte 0: bit 0 edge, bit 1 without a handshake before, bits 2-3 how handlers react, bits 4-5 streams
                that an edge has opened; the rest is fed to that end
    link        byte 0 as for session; the rest is fed through WebSocket framing, in place, as mux/link.py does it
    program     a program of calls: what is fed, when it is written out, what handlers do from within callbacks

Of `websocket`, `session` and `link`, THOROUGH demands the same outcome wherever the input is cut in two, and byte by
byte.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from speedups import model

from guestpass_speedups.frames import decode_header, split_frames
from guestpass_speedups.session import Budget, Session, Stream, StreamRefused, TunnelError
from guestpass_speedups.websocket import WebSocket, WebSocketError

# Above this an input is cut at about so many places instead of all: the committed inputs are below, by far the most.
EVERY = 1500
# The same for what the fuzzer has just found.
SOME = 48
# The least that `fill_into` takes: the longest frame.
ROOM = 65_543

HEAD = b"GET / HTTP/1.1\r\nhost: a.b\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n\r\n"


def exact(data: bytes) -> memoryview:
    """A copy of just this size: `bytes` and `bytearray` have a byte more, which hides a read beyond the end."""
    return memoryview(array("B", data)) if data else memoryview(bytearray())


def pieces_of(data: bytes, most: int) -> Iterator[list[bytes]]:
    """The whole, `most` cuts in two if there are not fewer, and single bytes (of what is small enough)."""
    yield [data]
    for at in range(1, len(data), max(1, len(data) // most)):
        yield [data[:at], data[at:]]
    if len(data) <= 4 * most:
        yield [data[at : at + 1] for at in range(len(data))]


# ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────


def frames(data: bytes) -> None:
    """The codec that tests and tools use, against the oracle's."""
    found: list[tuple[int, int, int, bytes]] = []
    rest, wrong = data, False
    try:
        found, rest = split_frames(data)
    except ValueError:
        wrong = True
    expected = model.Splitter().feed(data)
    if not wrong:
        assert [(f.kind, f.flags, f.stream, f.payload) for f in expected] == found
        assert b"".join(model.frame(*frame) for frame in found) + rest == data
    try:
        decode_header(exact(data[:8]))
    except ValueError:
        pass
    else:
        assert len(data) >= 8


# ── websocket ────────────────────────────────────────────────────────────────────────────────────────────────────


def feed_websocket(client: bool, pieces: Sequence[bytes], *, in_place: bool) -> tuple[Any, ...]:
    end = WebSocket(client)
    payload, error = b"", None
    for piece in pieces:
        view = exact(piece)
        try:
            payload += bytes(end.feed_into(view, len(view)) if in_place else end.feed(view))
        except WebSocketError as exc:
            error = (exc.code, exc.reason)
            break
        replies = end.take_replies()
        assert len(replies) <= 2 * (6 + 125)
        assert in_place or view.tobytes() == piece
    # What came before an error in the same piece is lost with it, so only an intact end is compared.
    return (error, end.close_code, b"" if error else payload)


def websocket(data: bytes) -> None:
    client = bool(data[:1] and data[0] & 1)
    whole = feed_websocket(client, [data[1:]], in_place=False)
    assert feed_websocket(client, [data[1:]], in_place=True) == whole


def websocket_splits(data: bytes, most: int = EVERY) -> None:
    client = bool(data[:1] and data[0] & 1)
    whole = feed_websocket(client, [data[1:]], in_place=False)
    for pieces in pieces_of(data[1:], most):
        assert feed_websocket(client, pieces, in_place=True) == whole, [len(piece) for piece in pieces]


# ── session ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Fault(Exception):
    """Raised by handlers, to see what becomes of the rest."""


class Handler:
    """Of streams and of the session. What it does depends on the stream's id and on `how` alone."""

    def __init__(self, how: int) -> None:
        self.how = how
        self.log: list[Any] = []
        self.session: Session
        self.ended: set[int] = set()
        self.faults = 0

    def output_ready(self) -> None:
        pass

    def hello_received(self, payload: bytes) -> None:
        self.log.append(("hello", payload))
        if self.how == 3 and payload == b"!":
            raise TunnelError(1, "refused")

    def auth_received(self, payload: bytes) -> None:
        self.log.append(("auth", payload))

    def info_received(self, payload: bytes) -> None:
        self.log.append(("info", payload))

    def goaway_received(self, last_stream: int, code: int) -> None:
        self.log.append(("goaway", last_stream, code))

    def pong_received(self, rtt: float) -> None:
        self.log.append(("pong", rtt))

    def handler_failed(self, stream: Stream, exc: BaseException) -> None:
        assert isinstance(exc, Fault), exc
        self.faults += 1

    def stream_opened(self, stream: Stream, service: str, interactive: bool, head: bytes, fin: bool) -> Any:
        self._note("open", stream, service, interactive, head, fin)
        if self.how == 1 and stream.id % 5 == 4:
            self.ended.add(stream.id)  # refused: nothing more is to come
            return None
        if self.how != 3 or stream.id % 2:
            stream.send_head(OK, fin=stream.id % 3 == 0)
            if stream.id % 3:
                stream.send(b"x" * 100, fin=stream.id % 3 == 1)
        return self

    def stream_head(self, stream: Stream, head: bytes, interim: bool, fin: bool) -> None:
        self._note("head", stream, head, interim, fin)
        self._react(stream)

    def stream_data(self, stream: Stream, data: bytes, fin: bool) -> None:
        self._note("data", stream, data, fin)
        if self.how != 2:
            stream.consume(len(data))
        self._react(stream)

    def stream_trailers(self, stream: Stream, trailers: bytes) -> None:
        self._note("trailers", stream, trailers)
        self._react(stream)

    def stream_reset(self, stream: Stream, code: int) -> None:
        self._note("reset", stream, code)
        if self.how != 2 or stream.id % 2:
            stream.cancelled()

    def stream_writable(self, stream: Stream) -> None:
        pass

    def stream_closed(self, stream: Stream) -> None:
        assert stream.id not in self.ended
        self.ended.add(stream.id)
        self.log.append(("closed", stream.id))

    def _note(self, what: str, stream: Stream, *more: Any) -> None:
        assert stream.id not in self.ended, f"{what} after stream_closed"
        self.log.append((what, stream.id, *more))

    def _react(self, stream: Stream) -> None:
        if self.how == 1 and stream.id % 4 == 1:
            stream.reset(5)
        elif self.how == 3 and stream.id % 4 == 2:
            raise Fault
        elif self.how == 3 and stream.id % 4 == 3:
            self.session.goaway(13)


def new_session(options: int, budget: Budget) -> tuple[Session, Handler]:
    edge = bool(options & 1)
    handler = Handler(options >> 2 & 3)
    session = handler.session = Session(edge, handler, budget, now=0.0, floor=4096, max_streams=8)
    session.set_peer_limits(floor=4096, max_streams=8)
    session.send_hello(b"{}")
    if edge:
        session.send_auth(b"{}")
        for number in range(options >> 4 & 3):
            session.open("web", HEAD, handler, fin=number == 1, body=b"b" * 50 * number)
    if not options & 2:
        session.receive(model.frame(model.HELLO, 0, 0, b"{}"), 0.0)
        session.receive(model.frame(model.AUTH, 0, 0, b"{}"), 0.0)
    session.fill(65_536, 0.0)
    return session, handler


def drained(session: Session, outer: WebSocket | None) -> bytes:
    """All that it has to say; through `outer`, if there is one, and out of its frames again."""
    out = b""
    peer = WebSocket(not outer.client) if outer is not None else None
    for _ in range(100):
        if not session.has_output:
            return out
        if outer is not None and peer is not None:
            piece = peer.feed(outer.wrap_output(session, 65_536, 0.0))
        else:
            piece = session.fill(65_536, 0.0)
        assert piece or not session.has_output
        out += piece
    raise AssertionError("the output never runs dry")


def finish(session: Session, handler: Handler, outer: WebSocket | None) -> bytes:
    out = drained(session, outer)
    if session.failure is not None:
        assert out.endswith(int(session.failure.code).to_bytes(4, "big"))
        try:
            session.receive(b"x", 0.0)
        except TunnelError as exc:
            said = exc.code
        else:
            raise AssertionError("receive after the end")
        assert said == session.failure.code
    assert len(model.Splitter().feed(out)) or not out
    opened = {entry[1] for entry in handler.log if entry[0] == "open"}
    session.abort(8)
    assert session.streams == 0
    assert opened <= handler.ended
    return out


def feed_session(options: int, pieces: Sequence[bytes], *, framed: bool) -> tuple[Any, ...]:
    budget = Budget(1 << 15)
    session, handler = new_session(options, budget)
    outer = WebSocket(not options & 1) if framed else None
    error: tuple[int, str] | None = None
    for piece in pieces:
        view = exact(piece)
        payload = view
        if outer is not None:
            try:
                payload = outer.feed_into(view, len(view))
            except WebSocketError:
                error = (-1, "")
                break
        try:
            session.receive(payload, 0.0)
        except TunnelError as exc:
            error = (int(exc.code), exc.reason)
            break
        finally:
            view[:] = b"\xaa" * len(view)  # the buffer is the next read's: nothing may refer to it
    log = list(handler.log)
    out = finish(session, handler, outer)
    stats = session.stats()
    del session, handler.session
    # What one piece brought after the end, and before a WebSocket error, depends on the cut.
    del stats["bytes_in"]
    assert budget.promised == 0, f"{budget.promised} bytes are promised to nobody"
    return (error, log, out, stats)


def session(data: bytes) -> None:
    feed_session(data[0] if data else 0, [data[1:]], framed=False)


def session_splits(data: bytes, most: int = EVERY) -> None:
    options = data[0] if data else 0
    whole = feed_session(options, [data[1:]], framed=False)
    for pieces in pieces_of(data[1:], most):
        assert feed_session(options, pieces, framed=False) == whole, [len(piece) for piece in pieces]


def link(data: bytes) -> None:
    feed_session(data[0] if data else 0, [data[1:]], framed=True)


def link_splits(data: bytes, most: int = EVERY) -> None:
    options = data[0] if data else 0
    whole = feed_session(options, [data[1:]], framed=True)
    for pieces in pieces_of(data[1:], most):
        cut = feed_session(options, pieces, framed=True)
        # What came before a WebSocket error counts only if an earlier read brought it.
        assert cut == whole or whole[0] == (-1, ""), [len(piece) for piece in pieces]


# ── program ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Program(Handler):
    """Two sessions back to back, run by the bytes of the input: each callback takes the next byte and does what it
    says, from within. Nothing is compared: nothing may crash, and only documented exceptions may come."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self.data = data
        self.at = 0
        self.now = 0.0
        self.depth = 0
        self.streams: list[Stream] = []
        self.budget = Budget(1 << 18)
        self.sessions = [
            Session(
                edge, self, self.budget, now=0.0, floor=1024 * (1 + edge), max_streams=40, max_window=1 << 16
            )
            for edge in (True, False)
        ]
        self.wire = [b"", b""]

    def next(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def run(self) -> None:
        for here, there in ((0, 1), (1, 0)):
            self.sessions[here].set_peer_limits(floor=(2048, 1024)[there], max_streams=40)
            self.sessions[here].send_hello(b"{}")
            self.sessions[here].send_auth(b"{}")
        self.move(0, 1 << 16)
        self.move(1, 1 << 16)
        while self.at < len(self.data):
            self.step()
        for end in self.sessions:
            end.abort(8)
        for stream in self.streams:
            stream.consume(0)
            stream.reset(5)
            stream.cancelled()
        self.streams.clear()

    def step(self) -> None:
        what, which = self.next(), self.next() & 1
        end = self.sessions[which]
        if what < 90:
            self.move(which, what * 64)
        elif what < 110:
            self.now += (what - 89) / 10
            self.guard(lambda: end.tick(self.now))
        elif what < 120:  # a frame of the fuzzer's own on the wire
            size = min(self.next(), 40)
            payload = bytes(self.next() for _ in range(size))
            self.wire[which] += model.frame(self.next() & 15, self.next() & 3, self.next() & 63, payload)
        elif what < 140:
            self.guard(lambda: end.goaway(13, self.next()))
        elif what < 145:
            self.guard(lambda: end.send_info(b"{}"))
        elif what < 147:
            end.abort(8)
        else:
            self.act()

    def move(self, which: int, limit: int) -> None:
        """From one end to the other, some of it."""
        self.guard(lambda: self.pull(which, limit))
        piece, self.wire[which] = self.wire[which][:limit], self.wire[which][limit:]
        self.guard(lambda: self.sessions[1 - which].receive(exact(piece), self.now))

    def pull(self, which: int, limit: int) -> None:
        if limit % 3 == 1:
            self.wire[which] += self.sessions[which].fill(limit, self.now)
        elif limit % 3 == 2:
            message = WebSocket(bool(limit & 1)).wrap_output(self.sessions[which], limit, self.now)
            self.wire[which] += WebSocket(not limit & 1).feed(message)
        else:
            room = memoryview(bytearray(ROOM))
            size = self.sessions[which].fill_into(room, self.now)
            self.wire[which] += bytes(room[:size])

    @staticmethod
    def guard(call: Callable[[], Any]) -> None:
        try:
            call()
        except (TunnelError, StreamRefused, Fault):
            pass
        except RuntimeError as exc:  # misuse is answered with words, and these are the words
            known = (
                "not reentrant",
                "ended already",
                "head comes first",
                "sent already",
                "interim head",
                "open()",
            )
            if not any(word in str(exc) for word in known):
                raise
        except ValueError as exc:
            if "unconsumed" not in str(exc):
                raise

    def act(self) -> None:
        """One call on some stream, or a new one; also from within callbacks."""
        what = self.next()
        if what < 60 or not self.streams:
            size = self.next() * 16

            def start() -> None:
                self.streams.append(
                    self.sessions[0].open(
                        "web", HEAD, self, interactive=bool(what & 1), fin=bool(what & 2), body=b"o" * size
                    )
                )

            self.guard(start)
            return
        stream = self.streams[self.next() % len(self.streams)]
        size = self.next() * 40
        calls: tuple[Callable[[], Any], ...] = (
            lambda: stream.send(b"s" * size),
            lambda: stream.send(b"s" * size, fin=True),
            lambda: stream.send_head(OK, fin=bool(size & 1)),
            lambda: stream.send_head(OK, interim=True),
            lambda: stream.send_trailers(b"a: b\r\n\r\n"),
            lambda: stream.consume(size),
            lambda: stream.reset(5),
            lambda: stream.cancelled(),
            lambda: self.streams.remove(stream) if stream in self.streams else None,
            lambda: repr(stream),
        )
        self.guard(calls[what % len(calls)])

    def _note(self, what: str, stream: Stream, *more: Any) -> None:
        pass

    def _react(self, stream: Stream) -> None:
        if self.depth > 3:
            return
        self.depth += 1
        try:
            what = self.next()
            if what < 100:
                self.act()
            elif what < 110:
                stream.reset(6)
            elif what < 114:
                self.sessions[what & 1].abort(8)
            elif what < 120:
                self.sessions[what & 1].goaway(13)
            elif what < 130:
                self.guard(lambda: self.move(what & 1, 4096))
            elif what < 140:
                raise Fault
        finally:
            self.depth -= 1

    def stream_opened(self, stream: Stream, service: str, interactive: bool, head: bytes, fin: bool) -> Any:
        self.streams.append(stream)
        self._react(stream)
        return None if self.next() == 255 else self

    def stream_data(self, stream: Stream, data: bytes, fin: bool) -> None:
        if self.next() & 3:
            self.guard(lambda: stream.consume(len(data)))
        self._react(stream)

    def stream_reset(self, stream: Stream, code: int) -> None:
        if self.next() & 1:
            stream.cancelled()
        self._react(stream)

    def stream_writable(self, stream: Stream) -> None:
        self._react(stream)

    def stream_closed(self, stream: Stream) -> None:
        self._react(stream)


def program(data: bytes) -> None:
    running = Program(data)
    running.run()
    budget = running.budget
    running.sessions.clear()
    del running
    assert budget.promised == 0, f"{budget.promised} bytes are promised to nobody"


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "websocket": websocket,
    "session": session,
    "link": link,
    "program": program,
}
# With the outcome compared: at every cut, and at SOME.
THOROUGH: dict[str, Callable[[bytes], None]] = {
    **TARGETS,
    "websocket": websocket_splits,
    "session": session_splits,
    "link": link_splits,
}
QUICK: dict[str, Callable[[bytes], None]] = {
    **TARGETS,
    "websocket": partial(websocket_splits, most=SOME),
    "session": partial(session_splits, most=SOME),
    "link": partial(link_splits, most=SOME),
}
