"""The oracle: what guestpass/mux/SPEC.md says, in plain Python, written without looking at the code under test.

`Endpoint` is fed the frames that one end sends and receives, in the order in which that end sees them, and raises
Violation on the first one that the page does not allow. It shares nothing with the extension but the page.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

DATA, OPEN, HEAD, TRAILERS, CREDIT, RESET, RESET_ACK, PING, PONG, GOAWAY, HELLO, AUTH, INFO = range(13)
NAMES = [
    "DATA",
    "OPEN",
    "HEAD",
    "TRAILERS",
    "CREDIT",
    "RESET",
    "RESET_ACK",
    "PING",
    "PONG",
    "GOAWAY",
    "HELLO",
    "AUTH",
    "INFO",
]
FIN = 1
INTERIM = 2
MAX_DATA = 16_368
MAX_HEAD = 32_768
QUANTUM = 16_376

# SPEC.md, section 3: (state, what happened) -> state. Body is HEAD or DATA without FIN.
LIVE = ("OPEN", "HALF_LOCAL", "HALF_REMOTE")
TABLE = {
    ("IDLE", "sent OPEN"): "OPEN",
    ("IDLE", "received OPEN"): "OPEN",
    ("IDLE", "sent OPEN+FIN"): "HALF_LOCAL",
    ("IDLE", "received OPEN+FIN"): "HALF_REMOTE",
    ("IDLE", "sent RESET"): "CLOSED",
    ("IDLE", "received RESET"): "CLOSED",
    ("OPEN", "sent FIN"): "HALF_LOCAL",
    ("OPEN", "received FIN"): "HALF_REMOTE",
    ("HALF_LOCAL", "received FIN"): "CLOSED",
    ("HALF_REMOTE", "sent FIN"): "CLOSED",
    **{(state, "received RESET"): "CANCELLING" for state in LIVE},
    ("OPEN", "sent RESET"): "RESETTING",
    ("HALF_REMOTE", "sent RESET"): "RESETTING",
    ("HALF_LOCAL", "sent RESET"): "RESETTING_FIN",
    ("CANCELLING", "sent RESET_ACK"): "CLOSED",
    **{(state, "received RESET_ACK"): "CLOSED" for state in ("RESETTING", "RESETTING_FIN")},
    **{(state, "received RESET"): "CLOSED" for state in ("RESETTING", "RESETTING_FIN")},
    ("RESETTING", "received FIN"): "RESETTING",
    ("RESETTING_FIN", "received FIN"): "CLOSED",
    # "Besides": events that change nothing.
    **{(state, "sent body"): state for state in ("OPEN", "HALF_REMOTE")},
    **{(state, "received body"): state for state in ("OPEN", "HALF_LOCAL", "RESETTING", "RESETTING_FIN")},
    **{(state, "sent CREDIT"): state for state in ("OPEN", "HALF_LOCAL")},
    **{(state, "received CREDIT"): state for state in (*LIVE, "RESETTING", "RESETTING_FIN")},
}


class Violation(AssertionError):
    """A frame that SPEC.md does not allow here."""


def require(condition: object, text: str) -> None:
    if not condition:
        raise Violation(text)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">HBBI", len(payload), kind, flags, stream) + payload


def open_payload(service: str, head: bytes, body: bytes = b"", *, interactive: bool = True) -> bytes:
    name = service.encode()
    return bytes([len(name)]) + name + bytes([interactive]) + struct.pack(">H", len(head)) + head + body


def head_payload(head: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">H", len(head)) + head + body


@dataclass
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes

    def __repr__(self) -> str:
        fin = "+FIN" if self.flags & FIN else ""
        return f"{NAMES[self.kind]}{fin}({self.stream}, {len(self.payload)} B)"

    @property
    def body(self) -> bytes:
        """The bytes that count against credit."""
        if self.kind == DATA:
            return self.payload
        if self.kind == OPEN:
            at = 1 + self.payload[0] + 1
            (head,) = struct.unpack_from(">H", self.payload, at)
            return self.payload[at + 2 + head :]
        if self.kind == HEAD:
            (head,) = struct.unpack_from(">H", self.payload)
            return self.payload[2 + head :]
        return b""


class Splitter:
    """Cuts one direction of a tunnel into frames, whatever the pieces in which it comes."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> list[Frame]:
        frames = []
        self.rest += data
        while len(self.rest) >= 8:
            length, kind, flags, stream = struct.unpack_from(">HBBI", self.rest)
            if len(self.rest) < 8 + length:
                break
            frames.append(Frame(kind, flags, stream, self.rest[8 : 8 + length]))
            self.rest = self.rest[8 + length :]
        return frames


@dataclass
class StreamView:
    """One end's view of one stream."""

    state: str = "IDLE"
    sent: int = 0
    received: int = 0
    may_send: int = 0
    may_receive: int = 0
    consumed: int = 0
    head_seen: bool = False
    interims: int = 0


@dataclass
class Endpoint:
    edge: bool
    floor: int
    peer_floor: int
    max_streams: int
    streams: dict[int, StreamView] = field(default_factory=dict)
    last_opened: int = 0
    sent_hello: bool = False
    last_served: int = 0
    decided_goaway: int = 2**30 - 1  # what the owner asked for; the frame may still wait
    sent_goaway: int = 2**30 - 1
    received_goaway: int = 2**30 - 1
    verdict: bool = False
    pings: list[bytes] = field(default_factory=list)
    pongs_owed: list[bytes] = field(default_factory=list)

    @property
    def live(self) -> int:
        return sum(view.state not in ("IDLE", "CLOSED") for view in self.streams.values())

    def _move(self, view: StreamView, frame: Frame, event: str) -> None:
        after = TABLE.get((view.state, event))
        require(after, f"{'edge' if self.edge else 'gateway'}: {event} ({frame}) in state {view.state}")
        assert after is not None
        view.state = after

    def _new(self) -> StreamView:
        return StreamView(may_send=self.peer_floor, may_receive=self.floor)

    def _body_event(self, frame: Frame, verb: str) -> str:
        return f"{verb} FIN" if frame.flags & FIN or frame.kind == TRAILERS else f"{verb} body"

    def decide_goaway(self, last: int | None) -> None:
        """The gateway's owner drains: None turns away all that has not come yet."""
        last = self.last_opened if last is None else max(last, self.last_opened)
        self.decided_goaway = min(self.decided_goaway, last)

    def sent(self, frame: Frame) -> None:
        self._shape(frame)
        require(self.sent_hello or frame.kind in (HELLO, GOAWAY), f"{frame} before HELLO")
        if frame.stream == 0:
            self._sent_tunnel(frame)
            return
        if frame.kind == OPEN or (frame.kind == RESET and frame.stream > self.last_opened):
            require(self.edge, f"{frame} from the gateway")
            require(self.verdict, f"{frame} before the verdict")
            require(frame.stream == self.last_opened + 1, f"{frame} after id {self.last_opened}")
            self.last_opened = frame.stream
            self.streams[frame.stream] = self._new()
        require(frame.stream in self.streams, f"{frame} for a stream that was never opened")
        view = self.streams[frame.stream]
        if frame.kind == OPEN:
            self._move(view, frame, "sent OPEN+FIN" if frame.flags & FIN else "sent OPEN")
            require(self.live <= self.max_streams, f"{frame}: too many live streams")
        elif frame.kind in (DATA, HEAD, TRAILERS):
            self._move(view, frame, self._body_event(frame, "sent"))
            self._head_order(view, frame, sender_is_edge=self.edge)
        else:
            self._move(view, frame, f"sent {NAMES[frame.kind]}")
        if frame.kind == CREDIT:
            (offset,) = struct.unpack(">Q", frame.payload)
            require(offset > view.may_receive, f"{frame} does not grow")
            require(offset - view.may_receive >= self.floor // 8, f"{frame} is a glitch")
            view.may_receive = offset
        view.sent += len(frame.body)
        require(view.sent <= view.may_send, f"{frame}: {view.sent} bytes sent, credit is {view.may_send}")

    def _sent_tunnel(self, frame: Frame) -> None:
        if frame.kind == HELLO:
            require(not self.sent_hello, "a second HELLO")
            self.sent_hello = True
        elif frame.kind == AUTH and self.edge:
            self.verdict = True
        elif frame.kind == GOAWAY:
            last, _ = struct.unpack(">II", frame.payload)
            require(self.edge or last >= self.last_served, f"{frame} turns away what was served")
            require(last <= self.sent_goaway, f"{frame} raises its last id")
            self.sent_goaway = last
        elif frame.kind == PING:
            self.pings.append(frame.payload)
        elif frame.kind == PONG:
            require(frame.payload in self.pongs_owed, f"{frame} without PING")
            self.pongs_owed.clear()

    def received(self, frame: Frame) -> None:
        if frame.stream == 0:
            if frame.kind == PING:
                self.pongs_owed.append(frame.payload)
            elif frame.kind == AUTH and not self.edge:
                self.verdict = True
            elif frame.kind == GOAWAY:
                self.received_goaway = struct.unpack(">II", frame.payload)[0]
                for number, view in self.streams.items():
                    if self.edge and number > self.received_goaway:
                        view.state = "CLOSED"
            return
        if not self.edge and frame.stream == self.last_opened + 1 and frame.kind in (OPEN, RESET):
            self.last_opened = frame.stream
            self.streams[frame.stream] = self._new()
            if frame.stream > self.decided_goaway:
                self.streams[frame.stream].state = "CLOSED"
            else:
                self.last_served = frame.stream
        require(frame.stream in self.streams, f"received {frame}, never opened")
        view = self.streams[frame.stream]
        if view.state == "CLOSED":
            crossing = frame.kind in (CREDIT, RESET) or frame.stream > self.decided_goaway
            require(crossing, f"received {frame}, stale")
            return
        if frame.kind == OPEN:
            self._move(view, frame, "received OPEN+FIN" if frame.flags & FIN else "received OPEN")
        elif frame.kind in (DATA, HEAD, TRAILERS):
            self._move(view, frame, self._body_event(frame, "received"))
        else:
            self._move(view, frame, f"received {NAMES[frame.kind]}")
        if frame.kind == CREDIT:
            view.may_send = struct.unpack(">Q", frame.payload)[0]
        view.received += len(frame.body)
        require(view.received <= view.may_receive, f"received {frame} beyond credit {view.may_receive}")

    @staticmethod
    def _shape(frame: Frame) -> None:
        size = len(frame.payload)
        sizes = {CREDIT: 8, RESET: 4, RESET_ACK: 0, PING: 8, PONG: 8, GOAWAY: 8}
        require(frame.kind in range(13), f"type {frame.kind}")
        require((frame.stream == 0) == (frame.kind >= PING), f"{frame}: wrong id")
        require(frame.stream < 2**30, f"{frame}: id too high")
        require(size == sizes.get(frame.kind, size), f"{frame}: wrong length")
        require(frame.kind != DATA or size <= MAX_DATA, f"{frame}: too long")
        require(frame.kind != DATA or size or frame.flags & FIN, f"{frame}: empty")
        require(size <= MAX_DATA or frame.kind in (OPEN, HEAD, TRAILERS, INFO), f"{frame}: too long")

    @staticmethod
    def _head_order(view: StreamView, frame: Frame, *, sender_is_edge: bool) -> None:
        if frame.kind == HEAD:
            require(not sender_is_edge, "HEAD from the edge")
            require(not view.head_seen, "HEAD after HEAD")
            if frame.flags & INTERIM:
                view.interims += 1
                require(not frame.flags & FIN and not frame.body, "an interim head with a body")
            else:
                view.head_seen = True
        elif not sender_is_edge:
            require(view.head_seen, f"{frame} before HEAD")
