"""HTTP/1.1 to the services: what one stream of a tunnel becomes.

    stream ─▶ parse the head, check the rules ─▶ a pooled or new connection ─▶ head, body ─▶ service
    stream ◀─ head (interim ones too), body, trailers ◀─ h11 parses strictly ◀─────────────── service

One connection carries one exchange at a time. It goes back to the pool only when nothing about it is in doubt: the
request was sent whole, the response was framed by Content-Length or chunks and is complete, both sides want to go on,
and not one byte too many came. Everything else closes it: an early response, surplus bytes, a response that ends with
the connection, a cancelled stream.

Nothing is collected: a body is read from one side when the other one has taken what was read before. The response to
a request whose body is still on its way is passed on at once; when it is not a success, the body stops there.

A connection from the pool may turn out to be closed by the service in the very moment in which it is used. An
idempotent request without a body is then sent once more on a new connection, if no byte of a response came; any other
request takes a connection from the pool only if that was in use a moment ago.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import h11

from guestpass import loop as loops
from guestpass import scope
from guestpass.config import Service
from guestpass.errors import ConfigError
from guestpass.gateway import heads
from guestpass.gateway.dial import connect_tcp, describe
from guestpass.gateway.heads import BadHead, Naming, Request
from guestpass.gateway.health import Health
from guestpass.model import Scope
from guestpass.mux.stream import StreamReset, TunnelStream
from guestpass_speedups.session import ErrorCode

log = logging.getLogger("guestpass.gateway.upstream")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds, bytes and counts; each with its reason."""

    connect: float = 10.0
    """A service is near the gateway: three SYNs are sent in this time (0, 1, 3 s) with room to spare."""
    response: float = 300.0
    """From the last byte of the request that the service took to its response head. Browsers give up after 300 s."""
    idle: float = 30.0
    """How long an unused connection is kept: shorter than most services' own time-out (nginx 75 s, aiohttp 75 s);
    for those with a shorter one (Node 5 s, gunicorn 2 s) see above."""
    idle_connections: int = 64
    """Unused connections kept for a service: browsers open six for a host, so this is ten visitors at once."""
    unsafe_idle: float = 1.0
    """A request that must not be sent twice takes a pooled connection only if it was used in the last second, which is
    less than any service's keep-alive time-out."""
    buffer: int = 256 * 1024
    """Reading from a service pauses when this much waits for the tunnel."""
    half_closed: float = 10.0
    """How long a TLS service may go on sending on an upgraded connection after the visitor's end of it."""
    interim: int = 32
    """SPEC.md, chapter 2.2."""


class BadUpstream(Exception):
    """The service's answer is malformed or incomplete. The text is for the log."""


class _NoResponse(BadUpstream):
    """The connection ended before the first byte of a response."""


class _BadBody(Exception):
    """The edge's request body does not fit its Content-Length, or its trailers are malformed."""


class Connection(asyncio.Protocol):
    """One connection to a service, read and written by one exchange at a time."""

    def __init__(self, limits: Limits, *, half_close: bool = True) -> None:
        """`half_close`: whether it can be closed in one direction only (not with TLS)."""
        self._loop = asyncio.get_running_loop()
        self._limit = limits.buffer
        self._half_close = half_close
        self._transport: asyncio.Transport | None = None
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._reading_paused = False
        self._writing_paused = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._eof = False
        self._lost: Exception | None = None
        self.closed = False
        self.pool: list[Connection] | None = None
        """The pool that it waits in; None while in use."""
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.pool is not None:
            self.close()  # nobody asked
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._size > self._limit and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()
        self._wake(self._reader)

    def eof_received(self) -> bool:
        self._eof = True
        if self.pool is not None:
            self.close()
        self._wake(self._reader)
        return self._half_close

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._lost = exc
        if not self._eof:
            self._eof = exc is None
        self._leave_pool()
        self._transport = None
        self._wake(self._reader)
        self._wake(self._writer)

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake(self._writer)

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def read(self) -> bytes:
        """What has come; b"" at the end. Raises ConnectionError when it was cut off."""
        while not self._chunks:
            if self._eof:
                return b""
            if self.closed:
                raise ConnectionResetError("the service cut off the connection") from self._lost
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        if self._reading_paused and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()
        return data

    def write(self, data: bytes) -> None:
        """Raises ConnectionError."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the service closed the connection") from self._lost
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait while the transport has more to write than it likes. Raises ConnectionError."""
        if self._writing_paused and not self.closed:
            self._writer = self._loop.create_future()
            try:
                await self._writer
            finally:
                self._writer = None
        if self.closed:
            raise ConnectionResetError("the service closed the connection") from self._lost

    def write_eof(self) -> bool:
        """Close this direction only; False where that cannot be done (TLS)."""
        transport = self._transport
        if transport is None or not self._half_close:
            return False
        if not transport.is_closing():
            transport.write_eof()
        return True

    @property
    def spotless(self) -> bool:
        """Open, with nothing to read: fit for another exchange."""
        return self._transport is not None and not (self._eof or self._chunks or self._transport.is_closing())

    def is_quiet(self) -> bool:
        """Whether the kernel has nothing for us, not even the end: what the event loop has not seen yet."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        if sock is None or not hasattr(select, "poll"):
            return self._transport is not None
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        return not poll.poll(0)

    def _leave_pool(self) -> None:
        if self.pool is not None:
            with contextlib.suppress(ValueError):
                self.pool.remove(self)
            self.pool = None

    def close(self) -> None:
        self._leave_pool()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close without sending what is queued."""
        self._leave_pool()
        if self._transport is not None:
            self._transport.abort()


class Target:
    """One service as configured, its rules, its pool and its health."""

    def __init__(self, name: str, service: Service, limits: Limits, resolve: Callable[[Path], Path]) -> None:
        """Raises ConfigError when the CA file cannot be used."""
        self.name = name
        self.service = service
        self.streams: set[TunnelStream] = set()
        self.pool: list[Connection] = []
        self._limits = limits
        parts = urlsplit(service.url)
        self.scheme = parts.scheme
        self._path = parts.path
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = _client_context(name, service, resolve) if parts.scheme == "https" else None
        self.naming = Naming.of(service.url, service.host_header)
        # Where everything is exposed no path can be out of bounds, so none is refused for being ambiguous.
        self._open_paths = service.paths == ("/**",)
        self._scopes = tuple(Scope(method, path) for method in service.methods for path in service.paths)

    def admits(self, request: Request) -> bool:
        """Whether this side is willing to pass the request on."""
        method, path = request.method.decode("ascii"), request.target.decode("ascii")
        if not self._open_paths:
            return scope.admits(self._scopes, method, path)
        methods = self.service.methods
        return "*" in methods or method in methods or (method == "HEAD" and "GET" in methods)

    async def connect(self) -> Connection:
        """A new connection. Raises OSError (TimeoutError is one)."""
        limits = self._limits
        async with asyncio.timeout(limits.connect):
            if self.scheme == "unix":
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_unix_connection(lambda: Connection(limits), self._path)
                return connection
            sock = await connect_tcp(self._host, self._port)
            try:
                _, connection = await loops.create_connection(
                    lambda: Connection(limits, half_close=self._tls is None),
                    sock=sock,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls is not None else None,
                )
            except BaseException:
                sock.close()
                raise
            return connection

    async def probe(self) -> None:
        """Whether the service takes connections. Raises OSError."""
        async with asyncio.timeout(self._limits.connect):
            if self.scheme == "unix":
                loop = asyncio.get_running_loop()
                transport, _ = await loop.create_unix_connection(asyncio.Protocol, self._path)
                transport.abort()
            else:
                sock = await connect_tcp(self._host, self._port)
                sock.close()

    def pooled(self, *, safe: bool) -> Connection | None:
        """An unused connection, the latest used first. `safe`: the request may be sent twice."""
        now = time.monotonic()
        while self.pool:
            connection = self.pool[-1]
            if not safe and (
                now - connection.idle_since > self._limits.unsafe_idle or not connection.is_quiet()
            ):
                return None
            self.pool.pop()
            connection.pool = None
            if connection.spotless:
                return connection
            connection.close()
        return None

    def release(self, connection: Connection) -> None:
        """Take an unused connection back."""
        if not connection.spotless or len(self.pool) >= self._limits.idle_connections:
            connection.close()
            return
        connection.idle_since = time.monotonic()
        connection.pool = self.pool
        self.pool.append(connection)

    def sweep(self) -> None:
        """Close what was not used for too long."""
        before = time.monotonic() - self._limits.idle
        for connection in [c for c in self.pool if c.idle_since < before]:
            connection.close()

    def close(self) -> None:
        for connection in self.pool[:]:
            connection.close()


def _client_context(name: str, service: Service, resolve: Callable[[Path], Path]) -> ssl.SSLContext:
    ca = resolve(service.ca) if service.ca is not None else None
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca is not None else None)
    except OSError as exc:
        raise ConfigError(
            f'the CA file {ca} cannot be used: {exc.strerror or exc} (key "services.{name}.ca")'
        ) from exc
    if not service.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


class Upstream:
    """All services of a gateway. `serve` is what a `GatewayLink` runs for each stream."""

    def __init__(
        self,
        services: Mapping[str, Service],
        *,
        on_health: Callable[[], None],
        resolve: Callable[[Path], Path] = lambda path: path,
        limits: Limits | None = None,
    ) -> None:
        """`on_health` is called when a service's health changed. `resolve` makes paths of the configuration absolute.
        Raises ConfigError."""
        self._limits = limits or Limits()
        self._targets = {
            name: Target(name, service, self._limits, resolve) for name, service in services.items()
        }
        self.health = Health(on_health)
        self.health.watch(self._targets)

    def configure(
        self, services: Mapping[str, Service], resolve: Callable[[Path], Path] = lambda path: path
    ) -> None:
        """Other services from now on. Streams of a service that is no longer there are ended; others go on, new ones
        follow the new rules. Raises ConfigError; then nothing has changed."""
        targets = {
            name: old
            if (old := self._targets.get(name)) is not None and old.service == service
            else Target(name, service, self._limits, resolve)
            for name, service in services.items()
        }
        before, self._targets = self._targets, targets
        for name, target in before.items():
            if targets.get(name) is not target:
                target.close()
            if name not in targets:
                for stream in list(target.streams):
                    stream.reset(ErrorCode.REFUSED)
        self.health.watch(targets)

    def services(self) -> dict[str, dict[str, bool | str]]:
        """As INFO tells the edge."""
        found: dict[str, dict[str, bool | str]] = {}
        for name, target in self._targets.items():
            healthy, detail = self.health.of(name)
            found[name] = {"healthy": healthy, "detail": detail, "url_scheme": target.scheme}
        return found

    @property
    def streams(self) -> int:
        return sum(len(target.streams) for target in self._targets.values())

    async def close(self) -> None:
        await self.health.stop()
        for target in self._targets.values():
            target.close()

    async def serve(self, stream: TunnelStream, service: str, head: bytes) -> None:
        """One exchange, from the request head to the response's end. Raises only StreamReset."""
        target = self._targets.get(service)
        if target is None:
            log.info("a stream was refused: this gateway has no service %s", service[:64])
            stream.reset(ErrorCode.REFUSED)
            return
        target.streams.add(stream)
        try:
            await self._serve(target, stream, head)
        except BadHead as exc:
            log.info("service %s: a request was refused: %s", target.name, exc)
            stream.reset(ErrorCode.REFUSED)
        except _BadBody as exc:
            log.warning("service %s: a request was given up: %s", target.name, exc)
            stream.reset(ErrorCode.PROTOCOL_ERROR)
        except (BadUpstream, h11.RemoteProtocolError) as exc:
            log.warning("service %s: bad answer: %s", target.name, exc)
            stream.reset(ErrorCode.BAD_UPSTREAM)
        except TimeoutError:
            log.warning("service %s: no answer within %.0f s", target.name, self._limits.response)
            stream.reset(ErrorCode.TIMEOUT)
        finally:
            target.streams.discard(stream)

    async def _serve(self, target: Target, stream: TunnelStream, head: bytes) -> None:
        request = heads.parse_request(head)
        if not target.admits(request):
            raise BadHead("its method or path is not among what this gateway exposes")
        if stream.ended and not stream.buffered and request.length:
            raise _BadBody("the body is missing")
        bodiless = stream.ended and not stream.buffered
        safe = bodiless and request.method in heads.IDEMPOTENT
        connection = target.pooled(safe=safe)
        if connection is not None:
            try:
                await self._exchange(target, stream, request, connection)
                return
            except _NoResponse:
                if not safe:
                    raise
        try:
            connection = await target.connect()
        except OSError as exc:
            self.health.failed(target.name, describe(exc))
            stream.reset(ErrorCode.UNREACHABLE)
            return
        self.health.succeeded(target.name)
        await self._exchange(target, stream, request, connection)

    async def _exchange(
        self, target: Target, stream: TunnelStream, request: Request, connection: Connection
    ) -> None:
        exchange = _Exchange(target, stream, request, connection, self._limits)
        try:
            reusable = await exchange.run()
        except BaseException:
            connection.abort()
            raise
        if reusable:
            target.release(connection)
        else:
            connection.close()


class _Exchange:
    """One request on one connection."""

    def __init__(
        self, target: Target, stream: TunnelStream, request: Request, connection: Connection, limits: Limits
    ) -> None:
        self._naming = target.naming
        self._stream = stream
        self._request = request
        self._connection = connection
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        headers, self._public = self._naming.request(request)
        self._has_body = request.upgrade is None and not (stream.ended and not stream.buffered)
        self._chunked = self._has_body and request.length is None
        self._head = heads.request_bytes(request, headers, chunked=self._chunked)
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=heads.MAX_HEAD)
        fields = [(b"Host", b"service")]
        if request.upgrade is not None:
            fields += [(b"Connection", b"Upgrade"), (b"Upgrade", request.upgrade)]
        # h11 only has to know what decides how the response is framed; the bytes that are sent are ours.
        self._parser.send(h11.Request(method=request.method, target=b"/", headers=fields))
        self._pump: asyncio.Task[None] | None = None
        self._deadline: asyncio.Timeout | None = None

    async def run(self) -> bool:
        """Returns whether the connection may be used again. Raises BadUpstream, h11.RemoteProtocolError, _BadBody,
        StreamReset, TimeoutError."""
        try:
            try:
                self._connection.write(self._head)
            except ConnectionError as exc:
                raise _NoResponse("the connection was closed before the request") from exc
            if self._has_body:
                self._pump = self._loop.create_task(self._send_body())
            async with asyncio.timeout(self._limits.response) as self._deadline:
                response = await self._read_head()
            self._deadline = None
            if response is None:
                await self._upgraded()
                return False
            if response.status_code >= 300:
                await self._stop_pump()  # the rest of the body is not wanted (RFC 9112 section 9.5)
            return await self._respond(response) and self._body_sent
        except BadUpstream:
            self._raise_body_fault()  # the reason why the connection was cut off, from here
            raise
        finally:
            await self._stop_pump()

    # ── request body ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _send_body(self) -> None:
        stream, connection, length = self._stream, self._connection, self._request.length
        sent = 0
        try:
            while data := await stream.read():
                sent += len(data)
                if length is not None and sent > length:
                    raise _BadBody("the body is longer than its Content-Length")
                await self._let_read()
                connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
                await connection.drain()
                self._progress()
            if self._chunked:
                try:
                    connection.write(b"0\r\n" + heads.check_trailers(stream.trailers or b"\r\n"))
                except BadHead as exc:
                    raise _BadBody(str(exc)) from exc
            elif sent != length:
                raise _BadBody("the body is shorter than its Content-Length")
            self._progress()
        except ConnectionError:
            raise  # the service stopped reading: its answer, if there is one, says why
        except BaseException:
            connection.abort()  # wakes the one that waits for an answer
            raise

    async def _let_read(self) -> None:
        """Before a write: have the event loop read what the service has sent. A service that refuses a body often
        answers and resets the connection at once; a write that fails would close the transport with the answer unread.
        """
        if not self._connection.is_quiet():
            await asyncio.sleep(0)  # the loop sees it
            await asyncio.sleep(0)  # and has read it

    def _progress(self) -> None:
        """The service has taken something: the time for its answer begins anew."""
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(self._loop.time() + self._limits.response)

    async def _stop_pump(self) -> None:
        pump = self._pump
        if pump is not None and not pump.done():
            pump.cancel()
            await asyncio.wait((pump,))
        if pump is not None and not pump.cancelled():
            pump.exception()  # seen

    @property
    def _body_sent(self) -> bool:
        """Whether the whole request has gone out, now that the response is complete."""
        pump = self._pump
        return pump is None or (pump.done() and not pump.cancelled() and pump.exception() is None)

    # ── response ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _read_head(self) -> h11.Response | None:
        """The final head, after interim ones were passed on; None for 101."""
        parser, begun, interim = self._parser, False, 0
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                try:
                    data = await self._connection.read()
                except ConnectionError as exc:
                    raise (BadUpstream if begun else _NoResponse)("the connection was cut off") from exc
                if not data and not begun:
                    raise _NoResponse("the connection was closed without an answer")
                begun = True
                parser.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                head = self._head_for_edge(event)
                if event.status_code == 101:
                    self._stream.send_head(head)
                    return None
                interim += 1
                if interim > self._limits.interim:
                    raise BadUpstream(f"more than {self._limits.interim} interim responses")
                self._stream.send_head(head, interim=True)
            elif isinstance(event, h11.Response):
                return event
            else:
                raise BadUpstream("the connection was closed inside the response head")

    def _raise_body_fault(self) -> None:
        pump = self._pump
        if pump is not None and pump.done() and not pump.cancelled():
            exc = pump.exception()
            if exc is not None and not isinstance(exc, ConnectionError):
                raise exc

    def _head_for_edge(self, event: h11.Response | h11.InformationalResponse) -> bytes:
        try:
            return heads.response_bytes(event, self._naming, self._public)
        except BadHead as exc:
            raise BadUpstream(str(exc)) from exc

    async def _respond(self, response: h11.Response) -> bool:
        """Pass the response on; returns whether the connection is fit for another exchange."""
        stream = self._stream
        head = self._head_for_edge(response)
        lengths = [value for name, value in response.headers if name == b"content-length"]
        chunked = any(name == b"transfer-encoding" for name, _ in response.headers)
        if lengths and chunked:
            raise BadUpstream("the response has both Content-Length and Transfer-Encoding")
        keep_alive = response.http_version == b"1.1" and not any(
            name == b"connection" and b"close" in value.lower() for name, value in response.headers
        )
        bodiless = self._request.method == b"HEAD" or response.status_code in (204, 304) or lengths == [b"0"]
        if bodiless:
            stream.send_head(head, fin=True)
            return keep_alive and not self._parser.trailing_data[0]
        stream.send_head(head)
        if lengths:
            return await self._counted_body(int(lengths[0])) and keep_alive
        return await self._parsed_body() and keep_alive and chunked

    async def _counted_body(self, left: int) -> bool:
        """A body of known length goes past h11. Returns whether not one byte more came."""
        stream, connection = self._stream, self._connection
        data = self._parser.trailing_data[0]
        while True:
            if len(data) > left:
                stream.finish(data[:left])
                return False
            left -= len(data)
            if data:
                if left == 0:
                    stream.finish(data)
                    return True
                await stream.write(data)
            try:
                data = await connection.read()
            except ConnectionError as exc:
                raise BadUpstream("the connection was cut off inside the response") from exc
            if not data:
                raise BadUpstream(f"the connection was closed {left} bytes before the response's end")

    async def _parsed_body(self) -> bool:
        """A body in chunks, or up to the connection's end. Returns whether not one byte more came."""
        stream, connection, parser = self._stream, self._connection, self._parser
        pieces: list[bytes] = []
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Data):
                pieces.append(event.data)
                continue
            if pieces:
                await stream.write(
                    pieces[0] if len(pieces) == 1 and type(pieces[0]) is bytes else b"".join(pieces)
                )
                pieces.clear()
            if isinstance(event, h11.EndOfMessage):
                trailers = event.headers.raw_items()
                if trailers:
                    stream.send_trailers(heads.trailer_bytes(trailers))
                else:
                    stream.finish()
                return not parser.trailing_data[0]
            if event is not h11.NEED_DATA:
                raise BadUpstream("the response broke off")
            try:
                data = await connection.read()
            except ConnectionError as exc:
                raise BadUpstream("the connection was cut off inside the response") from exc
            parser.receive_data(data)

    # ── upgraded ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _upgraded(self) -> None:
        """Opaque bytes in both directions; each direction ends by itself."""
        up = self._loop.create_task(self._visitor_to_service())
        down = self._loop.create_task(self._service_to_visitor(self._parser.trailing_data[0]))
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_EXCEPTION)
            for task in (up, down):
                if task.done() and (exc := task.exception()) is not None:
                    raise (
                        BadUpstream("an upgraded connection was cut off")
                        if isinstance(exc, ConnectionError)
                        else exc
                    )
        finally:
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    async def _visitor_to_service(self) -> None:
        stream, connection = self._stream, self._connection
        while data := await stream.read():
            connection.write(data)
            await connection.drain()
        if not connection.write_eof():
            await asyncio.sleep(self._limits.half_closed)
            connection.abort()

    async def _service_to_visitor(self, first: bytes) -> None:
        stream, connection = self._stream, self._connection
        data = first or await connection.read()
        while data:
            await stream.write(data)
            data = await connection.read()
        stream.finish()


__all__ = ["BadUpstream", "Connection", "Limits", "StreamReset", "Target", "Upstream"]
