"""Sans-I/O session of one tunnel: streams, credit, scheduling. Wire format and rules: guestpass/mux/SPEC.md."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Protocol

class ErrorCode(IntEnum):
    """Codes in RESET and GOAWAY frames; the words are the ones of SPEC.md."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    LIMIT_EXCEEDED = 4  # a flood limit, too many streams
    CANCEL = 5  # the visitor went away, or the caller lost interest
    REVOKED = 6
    REFUSED = 7  # gateway rules forbid it, or unknown service
    UNREACHABLE = 8  # the service did not answer the connection attempt
    BAD_UPSTREAM = 9  # the service answered with something malformed
    TIMEOUT = 10
    AUTH_FAILED = 11
    REPLACED = 12  # a newer epoch of the same key registered
    DRAINING = 13
    OVERLOADED = 14  # no memory budget for another stream

class TunnelError(Exception):
    """The peer broke the protocol: the tunnel must end. Send what `fill` still has (a GOAWAY), then close."""

    code: ErrorCode
    reason: str
    def __init__(self, code: int, reason: str) -> None: ...

class StreamHandler(Protocol):
    """What a stream calls. Calls come from inside `Session.receive` (or `Session.fill` for `stream_writable`, and for
    `stream_closed` when a frame that was written ended the stream); `data` is bytes that the handler may keep. An
    exception resets the stream with INTERNAL_ERROR and is reported to `SessionHandler.handler_failed`. All methods of
    Session and Stream but `receive` (from `receive`) and `fill` (from `fill`) may be called from here."""

    def stream_head(self, stream: Stream, head: bytes, interim: bool, fin: bool) -> None: ...
    #   fin: no body follows. When the frame carried body bytes as well, they and its FIN come as `stream_data`.
    def stream_data(self, stream: Stream, data: bytes, fin: bool) -> None: ...
    def stream_trailers(self, stream: Stream, trailers: bytes) -> None: ...  # implies FIN
    def stream_reset(self, stream: Stream, code: int) -> None: ...  # peer's RESET: cancel, then stream.cancelled()
    def stream_writable(self, stream: Stream) -> None: ...  # `queued` fell to LOW_WATER or below after `send` went above HIGH_WATER
    def stream_closed(self, stream: Stream) -> None: ...  # last call, exactly once, whatever the way it ended; then `handler` becomes None

class SessionHandler(Protocol):
    """An exception here ends the session; a TunnelError is passed on as if it were the session's own (GOAWAY is ready)."""

    def output_ready(self) -> None: ...  # something to `fill` where there was nothing before
    def hello_received(self, payload: bytes) -> None: ...
    def auth_received(self, payload: bytes) -> None: ...
    def info_received(self, payload: bytes) -> None: ...
    def stream_opened(self, stream: Stream, service: str, interactive: bool, head: bytes, fin: bool) -> StreamHandler | None: ...
    #   gateway only. Body bytes carried by OPEN follow as `stream_data`, and FIN then comes with them. None refuses: RESET(REFUSED).
    def goaway_received(self, last_stream: int, code: int) -> None: ...
    #   edge: streams above `last_stream` were ended before this call (stream_reset(code), stream_closed), without a frame.
    def pong_received(self, rtt: float) -> None: ...
    def handler_failed(self, stream: Stream, exc: BaseException) -> None: ...

class Budget:
    """Memory for receive windows, shared by all tunnels of a process. `limit` and `promised` in bytes. Windows may grow
    out of three quarters of it; the rest is for the floors of new streams. Default 512 MiB."""

    limit: int
    @property
    def promised(self) -> int: ...
    def __init__(self, limit: int = ...) -> None: ...

class Stream:
    """One exchange. States and transitions: SPEC.md; `state` is one of its words."""

    handler: StreamHandler | None
    context: Any  # free for the owner
    waiting: Callable[[], int] | None  # how much of what was consumed waits further down: while it is much, the window does not grow
    @property
    def id(self) -> int: ...
    @property
    def session(self) -> Session: ...
    @property
    def state(self) -> str: ...
    @property
    def queued(self) -> int: ...  # body bytes accepted by `send` and not yet framed by `fill`
    @property
    def acknowledged(self) -> bool: ...  # any frame of this stream has come from the peer
    @property
    def bytes_sent(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...
    @property
    def window(self) -> int: ...  # bytes that the peer may have under way, by now
    @property
    def credit(self) -> int: ...  # body bytes that may be sent at once
    def send_head(self, head: bytes, *, interim: bool = False, fin: bool = False) -> None: ...  # gateway → edge
    def send(self, data: bytes, *, fin: bool = False) -> bool: ...
    #   Queues all of it (the caller stops when it returns False, until `stream_writable`). `data` must be bytes: it is kept, not copied.
    #   On a stream that was reset or whose tunnel is gone: dropped, False. RuntimeError after FIN, or before the gateway's final head.
    def send_trailers(self, trailers: bytes) -> None: ...  # ends this direction
    def set_allowance(self, allowance: Budget) -> None: ...  # what the window grows by counts there as well; once
    def consume(self, size: int) -> None: ...
    def expect(self, size: int) -> None: ...
    #   `size` more bytes were handed on *and* drained from the local transport: credit may be given again. Call it after FIN, and
    #   after `stream_closed`, too: the budget stays promised until then (or until the Stream is freed). ValueError beyond what was received.
    def reset(self, code: int) -> None: ...  # idempotent; drops what is queued; no callback but `stream_closed` follows
    #   After the peer's RESET it means `cancelled()`.
    def cancelled(self) -> None: ...  # answer to `stream_reset`: local work has really ended → RESET_ACK

class Session:
    """`edge=True` opens streams, `edge=False` accepts them. All times are seconds of one monotonic clock, passed in.

    Order at the start: `send_hello` first (nothing else leaves before it); the edge's first `send_auth` is the verdict, before it
    `open` refuses and an OPEN is an error."""

    handler: SessionHandler | None  # None after `abort`
    @property
    def budget(self) -> Budget: ...
    @property
    def edge(self) -> bool: ...
    def __init__(self, edge: bool, handler: SessionHandler, budget: Budget, *, now: float, max_streams: int = ..., floor: int = ..., max_window: int = ...) -> None: ...
    def receive(self, data: bytes | bytearray | memoryview, now: float) -> None: ...  # raises TunnelError; keeps no reference to data
    def fill(self, limit: int, now: float) -> bytes: ...  # at most about `limit` bytes (and 128 KiB) of whole frames; b"" when there is nothing to send
    def fill_into(self, buffer: bytearray | memoryview, now: float) -> int: ...  # the same into a buffer of at least 65,543 bytes
    @property
    def has_output(self) -> bool: ...  # while true after `fill`, call it again when the transport has room; `output_ready` comes only after it was false
    @property
    def streams(self) -> int: ...  # not CLOSED
    @property
    def rtt(self) -> float | None: ...  # smoothed
    bytes_out: int  # all that `fill` has returned
    @property
    def last_received(self) -> float: ...
    @property
    def draining(self) -> bool: ...  # GOAWAY sent or received
    @property
    def failure(self) -> TunnelError | None: ...  # why the session ended
    @property
    def last_stream(self) -> int: ...  # highest id opened on the wire: for the second GOAWAY of a drain
    @property
    def retiring(self) -> bool: ...  # edge: stream ids are about to run out, have another tunnel brought up and drain this one
    def set_peer_limits(self, *, floor: int, max_streams: int) -> None: ...  # from the peer's HELLO; TunnelError when out of range
    def send_hello(self, payload: bytes) -> None: ...
    def send_auth(self, payload: bytes) -> None: ...
    def send_info(self, payload: bytes) -> None: ...  # whole state; the newest goes out, at most about one a second (call `tick`)
    def open(self, service: str, head: bytes, handler: StreamHandler, *, interactive: bool = True, fin: bool = False, body: bytes = b"") -> Stream: ...
    #   raises StreamRefused (draining, too many streams, no budget, no verdict yet) – nothing was sent; ValueError (bad name, head over 32 KiB)
    def ping(self, now: float) -> None: ...
    def goaway(self, code: int, last_stream: int | None = None) -> None: ...
    #   gateway: None means the highest id that was opened so far; 2**30 - 1 turns nothing away that is under way (first step of a drain)
    def tick(self, now: float) -> None: ...  # call about once a second: liveness PING after 3 s idle; raises TunnelError(TIMEOUT) at 6 s without a byte
    #   (If two ticks are more than 3 s apart, this process itself was stopped: the peer is given the time to answer a PING first.)
    def abort(self, code: int) -> None: ...  # the tunnel is gone: every stream gets stream_reset(code) then stream_closed
    def _start_ids_at(self, number: int) -> None: ...  # for tests: as if the ids up to `number` had been used up
    def stats(self) -> dict[str, int]: ...  # frames in/out by type, glitches, stale frames; for metrics and tests

class StreamRefused(Exception):
    code: ErrorCode
    reason: str
    def __init__(self, code: int, reason: str) -> None: ...

FLOOR: int  # 32 KiB
START_WINDOW: int
MAX_WINDOW: int  # 16 MiB
MAX_STREAMS: int  # 16384
HIGH_WATER: int
LOW_WATER: int

STATES: tuple[str, ...]
EVENTS: tuple[str, ...]
TRANSITIONS: dict[tuple[str, str], str]  # (state, event) → next state: the table of SPEC.md, 3.
