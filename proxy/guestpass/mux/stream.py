"""One stream of a tunnel, for asyncio: the same class at the edge and at the gateway.

Bytes that arrive wait in a deque until `read` takes all of them; there is no task and no queue object per frame.
Credit is given for what was *consumed*: `read` counts what the read before it returned, so a caller that waits for
its own transport to drain before it reads again holds up the peer, and nobody else.

    peer's frame ─▶ Session.receive ─▶ stream_data ─▶ deque ─▶ await read() ─▶ transport.write, await drain
                                                                     └── the next read() consumes ──▶ CREDIT

One coroutine may wait in `head`/`read` and another one in `write` at the same time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guestpass_speedups.session import ErrorCode

if TYPE_CHECKING:
    from guestpass_speedups.session import Budget, Stream

log = logging.getLogger("guestpass.tunnel")

# A read joins what has arrived up to about this size: fewer, larger writes to the next socket, but not a whole window
# (16 MiB) in one piece.
MAX_READ = 256 * 1024


class StreamReset(Exception):
    """The stream ended before its end: by the peer, by `reset`, or with its tunnel (UNREACHABLE)."""

    def __init__(self, code: int) -> None:
        super().__init__(_name(code))
        self.code = code


def _name(code: int) -> str:
    try:
        return ErrorCode(code).name
    except ValueError:
        return f"code {code}"


@dataclass(frozen=True, slots=True)
class Head:
    """A response head as it came. `interim` for 1xx but 101; `fin`: no body follows."""

    data: bytes
    interim: bool
    fin: bool


class TunnelStream:
    """`StreamHandler` of the session, and what the relay and the upstream work with."""

    __slots__ = (
        "__weakref__",
        "_close_waiter",
        "_closed",
        "_data",
        "_discarding",
        "_ended",
        "_finished",
        "_heads",
        "_held",
        "_loop",
        "_read_waiter",
        "_reset_by_peer",
        "_reset_code",
        "_stream",
        "_task",
        "_write_waiter",
        "trailers",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stream: Stream | None = None,
        *,
        ended: bool = False,
        finished: bool = False,
    ) -> None:
        """`ended`, `finished`: the peer's, or this, direction had its FIN in OPEN."""
        self._loop = loop
        self._stream = stream
        self._heads: deque[Head] = deque()
        self._data: deque[bytes] = deque()
        self._held = 0  # bytes that read() handed out and that are not consumed yet
        self._ended = ended
        self._finished = finished
        self._discarding = False
        self._closed = False
        self._reset_code: int | None = None
        self._reset_by_peer = False
        self._read_waiter: asyncio.Future[None] | None = None
        self._write_waiter: asyncio.Future[None] | None = None
        self._close_waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[Any] | None = None
        self.trailers: bytes | None = None

    def __repr__(self) -> str:
        stream = self._stream
        return f"<TunnelStream {stream.id if stream else '-'} {stream.state if stream else 'IDLE'}>"

    # ── for the owner ────────────────────────────────────────────────────────────────────────────────────────────

    async def head(self) -> Head:
        """The next response head; interim ones first. Raises StreamReset."""
        while not self._heads:
            if self._reset_code is not None:
                raise StreamReset(self._reset_code)
            if self._ended:
                raise StreamReset(ErrorCode.BAD_UPSTREAM)  # ended without a response
            await self._wait_to_read()
        return self._heads.popleft()

    async def read(self) -> bytes:
        """What has arrived of the body, at least one byte; b"" at its end. Raises StreamReset.

        Consumes what the previous call returned: call it when that was handed on and drained.
        """
        if self._held:
            held, self._held = self._held, 0
            if self._reset_code is None:
                self._raw.consume(held)
        while not self._data:
            if self._reset_code is not None:
                raise StreamReset(self._reset_code)
            if self._ended:
                return b""
            await self._wait_to_read()
        data = self._take()
        self._held = len(data)
        return data

    def _take(self) -> bytes:
        data = self._data
        if len(data) == 1:
            return data.popleft()
        pieces = []
        size = 0
        while data and size < MAX_READ:
            piece = data.popleft()
            size += len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    async def write(self, data: bytes) -> None:
        """Queue body bytes; returns when the stream's queue is below its high-water mark. Raises StreamReset, and
        RuntimeError after this direction's end."""
        if self._reset_code is not None:
            raise StreamReset(self._reset_code)
        if self._finished:
            raise RuntimeError("this direction of the stream was ended already")
        if self._raw.send(data):
            return
        waiter = self._write_waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._write_waiter = None
        if self._reset_code is not None:
            raise StreamReset(self._reset_code)

    def expect(self, size: int) -> None:
        """The peer's body will have `size` bytes, by its head: its window may open at once."""
        if self._reset_code is None:
            self._raw.expect(size)

    def send_head(self, head: bytes, *, interim: bool = False, fin: bool = False) -> None:
        """Gateway: the response head. Raises StreamReset."""
        if self._reset_code is not None:
            raise StreamReset(self._reset_code)
        self._raw.send_head(head, interim=interim, fin=fin)
        if fin:
            self._finished = True

    def send_trailers(self, trailers: bytes) -> None:
        """Ends this direction. `trailers` are complete field lines and the empty line."""
        if self._reset_code is None and not self._finished:
            self._finished = True
            self._raw.send_trailers(trailers)

    def finish(self, data: bytes = b"") -> None:
        """Ends this direction, with last body bytes if there are any; idempotent, and nothing after a reset."""
        if self._reset_code is None and not self._finished:
            self._finished = True
            self._raw.send(data, fin=True)

    def reset(self, code: int) -> None:
        """Ends both directions at once: what is queued either way is dropped, and a task that serves the stream is
        cancelled, unless it is the caller. Idempotent; does nothing after the end."""
        if self._closed or self._reset_code is not None:
            return
        self._reset_code = code
        self._drop()
        self._raw.reset(code)
        if self._task is not None and self._task is not asyncio.current_task(self._loop):
            self._task.cancel()

    async def wait_closed(self) -> None:
        """Returns when the stream is over at both ends, as far as this one can know."""
        if self._closed:
            return
        if self._close_waiter is None:
            self._close_waiter = self._loop.create_future()
        await asyncio.shield(self._close_waiter)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def ended(self) -> bool:
        """The peer's direction has ended: `read` will not wait any more."""
        return self._ended

    @property
    def buffered(self) -> int:
        """Bytes that have arrived and that no `read` has taken."""
        return sum(map(len, self._data))

    @property
    def reset_code(self) -> int | None:
        return self._reset_code

    @property
    def acknowledged(self) -> bool:
        """Any frame of this stream has come from the peer."""
        return self._raw.acknowledged

    @property
    def bytes_sent(self) -> int:
        return self._raw.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._raw.bytes_received

    # ── for the link ─────────────────────────────────────────────────────────────────────────────────────────────

    def attach(self, stream: Stream) -> None:
        """The edge's side is made before its `Session.open`."""
        self._stream = stream

    def bound(self, waiting: Callable[[], int], allowance: Budget) -> None:
        """Before the first byte: the window grows out of `allowance`, too, and only while little of what `read`
        returned is `waiting` further down."""
        self._raw.waiting = waiting
        self._raw.set_allowance(allowance)

    def serve(self, task: asyncio.Task[Any]) -> None:
        """`task` is this stream's local work: the peer's RESET cancels it, and is acknowledged when it has ended."""
        self._task = task
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[Any]) -> None:
        """The work has really ended. What it left open is closed here."""
        self._task = None
        exc = None if task.cancelled() else task.exception()
        if exc is not None and not isinstance(exc, StreamReset):
            log.error("a fault while a stream was served", exc_info=exc)
            self.reset(ErrorCode.INTERNAL_ERROR)
        if self._closed:
            return
        if self._reset_by_peer:
            self._raw.cancelled()
        elif self._reset_code is None:
            if self._finished:
                # The response is complete, the request is not: take the rest and forget it, until the edge, which has
                # the response, ends it. A RESET from here could overtake the response's last bytes.
                self._discard()
            else:
                self.reset(ErrorCode.INTERNAL_ERROR)

    def _discard(self) -> None:
        self._discarding = True
        size = self._held + self.buffered
        self._held = 0
        self._data.clear()
        if size:
            self._raw.consume(size)

    @property
    def _raw(self) -> Stream:
        if self._stream is None:
            raise RuntimeError("the stream was never opened")
        return self._stream

    async def _wait_to_read(self) -> None:
        if self._read_waiter is not None:
            raise RuntimeError("another coroutine is reading this stream")
        waiter = self._read_waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._read_waiter = None

    def _wake_reader(self) -> None:
        waiter = self._read_waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _wake_writer(self) -> None:
        waiter = self._write_waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _drop(self) -> None:
        self._heads.clear()
        self._data.clear()
        self._held = 0
        self._wake_reader()
        self._wake_writer()

    # ── StreamHandler ────────────────────────────────────────────────────────────────────────────────────────────

    def stream_head(self, stream: Stream, head: bytes, interim: bool, fin: bool) -> None:
        self._heads.append(Head(head, interim, fin))
        if fin:
            self._ended = True
        self._wake_reader()

    def stream_data(self, stream: Stream, data: bytes, fin: bool) -> None:
        if fin:
            self._ended = True
        if self._discarding:
            if data:
                stream.consume(len(data))
            return
        if data:
            self._data.append(data)
        self._wake_reader()

    def stream_trailers(self, stream: Stream, trailers: bytes) -> None:
        self.trailers = trailers
        self._ended = True
        self._wake_reader()

    def stream_reset(self, stream: Stream, code: int) -> None:
        self._reset_code = code
        self._reset_by_peer = True
        self._drop()
        if self._task is not None:
            self._task.cancel()
        else:
            stream.cancelled()

    def stream_writable(self, stream: Stream) -> None:
        self._wake_writer()

    def stream_closed(self, stream: Stream) -> None:
        self._closed = True
        self._wake_reader()
        self._wake_writer()
        if self._close_waiter is not None and not self._close_waiter.done():
            self._close_waiter.set_result(None)
