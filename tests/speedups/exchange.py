"""The gateway's exchanges without a socket: a session at each end, a service that is a list of writes, a loop that runs
when it is told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from speedups.pair import Pair, Recorder

from guestpass.gateway.upstream import Limits
from guestpass_speedups.session import Stream
from guestpass_speedups.upstream import Connection, Pool, Services, UpstreamSession, UpstreamStream


class Loop:
    """call_soon and call_later of an event loop. Timers run only by `fire`."""

    def __init__(self) -> None:
        self.soon: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.timers: list[tuple[float, Callable[..., None]]] = []

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        self.soon.append((callback, args))

    def call_later(self, delay: float, callback: Callable[..., None]) -> None:
        self.timers.append((delay, callback))

    def turn(self) -> None:
        batch, self.soon = self.soon, []
        for callback, args in batch:
            callback(*args)

    def run(self) -> None:
        for _ in range(1000):
            if not self.soon:
                return
            self.turn()
        raise AssertionError("the loop never falls silent")


class Transport:
    """What a connection writes into. `stuck`: the service takes nothing; more than 64 KiB pause the protocol."""

    def __init__(self, loop: Loop, protocol: Connection) -> None:
        self.loop = loop
        self.protocol = protocol
        self.writes: list[bytes] = []
        self.waiting = 0
        self.stuck = False
        self.reading = True
        self.writing_paused = False
        self.closed = False
        self.aborted = False
        self.eof = False
        self.lost = False
        self.unread = b""
        self.delivering = False

    @property
    def written(self) -> bytes:
        return b"".join(self.writes)

    def write(self, data: bytes) -> None:
        assert type(data) is bytes
        assert data
        assert not self.eof
        if self.closed:
            return
        self.writes.append(data)
        if self.stuck:
            self.waiting += len(data)
            if self.waiting > 65_536 and not self.writing_paused:
                self.writing_paused = True
                self.protocol.pause_writing()

    def writelines(self, pieces: list[bytes]) -> None:
        self.write(b"".join(pieces))

    def unstick(self) -> None:
        self.stuck = False
        self.waiting = 0
        if self.writing_paused:
            self.writing_paused = False
            self.protocol.resume_writing()

    def write_eof(self) -> None:
        self.eof = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        assert self.reading
        assert self.protocol.pool.half_close or not self.delivering, "TLS is not paused from within a read"
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True
        self.loop.call_soon(self.read_on)

    def read_on(self) -> None:
        data, self.unread = self.unread, b""
        if data and not self.closed:
            self.say(data)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.loop.call_soon(self.lose, None)

    def abort(self) -> None:
        self.aborted = True
        self.close()

    def get_extra_info(self, name: str) -> None:
        return None

    # ── what the service does ────────────────────────────────────────────────────────────────────────────────────

    def say(self, data: bytes) -> None:
        """Bytes from the service, unless the connection is closed."""
        assert self.reading, "the protocol has asked for a pause"
        if not self.closed:
            while data:
                buffer = self.protocol.get_buffer(-1)
                size = min(len(data), len(buffer))
                buffer[:size] = data[:size]
                data = data[size:]
                self.delivering = True
                self.protocol.buffer_updated(size)
                self.delivering = False
                if self.closed or not self.reading:
                    self.unread += data
                    return

    def hang_up(self) -> None:
        if not self.closed and not self.protocol.eof_received():
            self.close()

    def lose(self, exc: Exception | None) -> None:
        if not self.lost:
            self.lost = self.closed = True
            self.protocol.connection_lost(exc)


class Web(Pool):
    """The service `web`. `wanted` counts connections that were asked for and not made yet."""

    def __init__(self, loop: Loop, limits: Limits, *, half_close: bool = True, public: bool = False) -> None:
        host, origin = (b"", b"") if public else (b"app:3000", b"http://app:3000")
        super().__init__("web", host=host, origin=origin, guarded=False, limits=limits, loop=loop)
        self.fake = loop
        self.half_close = half_close
        self.wanted = 0
        self.attempts = 0
        self.transports: list[Transport] = []
        self.notes: list[tuple[int, str]] = []

    def start_connecting(self) -> None:
        self.wanted += 1
        self.attempts += 1

    def note(self, code: int, text: str) -> None:
        self.notes.append((code, text))

    def connect(self) -> Transport:
        """One of the wanted connections is made."""
        assert self.wanted
        self.wanted -= 1
        connection = Connection(self, half_close=self.half_close)
        transport = Transport(self.fake, connection)
        connection.connection_made(transport)  # type: ignore[arg-type]
        self.transports.append(transport)
        self.connected(connection)
        return transport

    def fail(self) -> None:
        assert self.wanted
        self.wanted -= 1
        self.not_connected()


class Exchange(Pair):
    """A `Pair` whose gateway serves its streams from `pool`."""

    def __init__(self, limits: Limits | None = None, **settings: Any) -> None:
        super().__init__(handshake=False)
        self.loop = Loop()
        self.pool = Web(self.loop, limits or Limits(), **settings)
        services = Services()
        services.use({"web": self.pool})
        session = UpstreamSession(
            False, self.gateway.owner, self.gateway_budget, now=0.0, floor=32_768, max_streams=16_384
        )
        session.services = services
        session.set_peer_limits(floor=32_768, max_streams=16_384)
        self.gateway.session = session
        self.edge.session.send_hello(b"{}")
        session.send_hello(b"{}")
        session.send_auth(b"{}")
        self.edge.session.send_auth(b"{}")
        self.shuttle()

    def ask(
        self, head: bytes, *, fin: bool = True, body: bytes = b"", auto: bool = True
    ) -> tuple[Stream, Recorder]:
        """Opens a stream; the request is at the gateway."""
        if not head.endswith(b"\r\n\r\n"):
            head += b"\r\nHost: s.example\r\n\r\n"
        handler = Recorder(auto=auto)
        handler.react = lambda name, stream: stream.cancelled() if name == "reset" else None
        stream = self.edge.session.open("web", head, handler, fin=fin, body=body)
        self.settle()
        return stream, handler

    def settle(self) -> None:
        """Until nothing moves any more."""
        for _ in range(1000):
            self.shuttle()
            if not self.loop.soon:
                return
            self.loop.run()
        raise AssertionError("never falls silent")

    def serve(self, head: bytes, **more: Any) -> tuple[Stream, Recorder, Transport]:
        """Opens a stream and gives it a connection, a new one if it waits for one."""
        stream, handler = self.ask(head, **more)
        if self.pool.wanted:
            self.pool.connect()
        self.settle()
        return stream, handler, self.pool.transports[-1]

    def say(self, transport: Transport, data: bytes) -> None:
        transport.say(data)
        self.settle()

    @property
    def far(self) -> UpstreamStream:
        (stream,) = self.pool.streams
        return stream

    def check_silence(self) -> None:
        """Nothing is left of any exchange."""
        self.settle()
        assert not self.pool.streams
        assert not self.gateway.owner.failures
        assert not self.edge.owner.failures
        assert self.edge.session.streams == self.gateway.session.streams == 0
        assert self.gateway_budget.promised == 0
