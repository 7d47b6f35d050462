"""The relay: one request of a visitor through a tunnel stream and its response back, on aiohttp.

This is the reference path, correct for every legal request. aiohttp parses the visitor's requests and owns the
connection; the response is written here, byte for byte as the application sent it but for the head (see `headers`),
so that nothing is added, buffered or re-encoded on the way.

Order of things, for every request on a share's origin:

1. who: the session cookie or bearer token finds a grant, or the control plane makes one;
2. may it: cross-site check, the share's scope, the filters;
3. where: the session's gateway, or another one if that is gone;
4. OPEN; the request body is pumped by a task of its own, the response by the handler's;
5. a `Live` entry in the grant from before OPEN to the last byte: revocation ends it from outside at any moment;
6. a `Tail` entry until the visitor's kernel has acknowledged what was written: a response that is complete here may
   still wait in ours, by the megabyte.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from guestpass import scope
from guestpass.edge import headers as h
from guestpass.edge.grants import Grant, GrantTable
from guestpass.edge.keys import CLIENT, SCHEME
from guestpass.errors import Forbidden, NoGateway, NotFound, PluginFailed, ShareEnded, Unauthorized
from guestpass.loop import abort_now, unsent
from guestpass.model import SessionKind
from guestpass.mux.stream import StreamReset, TunnelStream
from guestpass.plugin import Denied, RequestContext
from guestpass.tokens import BEARER_PREFIX, digest
from guestpass_speedups.session import ErrorCode, StreamRefused

if TYPE_CHECKING:
    from guestpass.edge.admission import Admission
    from guestpass.edge.assertion import Signer
    from guestpass.edge.metrics import Metrics
    from guestpass.edge.pages import Pages
    from guestpass.edge.plugins import PluginSet
    from guestpass.edge.tunnels import Tunnels

log = logging.getLogger("guestpass.edge.relay")

# How long an application may take to begin its answer, from the last piece of the request that it took. Long polling
# answers within a minute or two; reports that are computed on request take longer.
RESPONSE_TIMEOUT = 300.0

# A request may be sent so often before the visitor is told.
MAX_ATTEMPTS = 3

# A request whose grant was dropped while the filters looked at it is admitted anew so often.
MAX_ADMISSIONS = 3

# After this many bytes from the visitor wait for an upgraded stream, reading pauses.
UPGRADE_BUFFER = 64 * 1024

# How long the application may go on sending after the visitor closed an upgraded connection.
HALF_CLOSED_TIMEOUT = 10.0

# A response is over when no more than this of it waits for the visitor to acknowledge it: a few round trips' worth,
# so that the next request on the connection is not held up.
TAIL = 64 * 1024

# How soon and how often it is looked, seconds.
TAIL_FIRST = 0.001
TAIL_POLL = 0.05

# What browsers wait before they try again when no gateway is there.
RETRY_AFTER = 5

# Stream errors before a response began, and what the visitor is told.
STATUS_OF_RESET: dict[int, int] = {
    ErrorCode.REFUSED: 403,
    ErrorCode.TIMEOUT: 504,
    ErrorCode.UNREACHABLE: 502,
    ErrorCode.BAD_UPSTREAM: 502,
    ErrorCode.OVERLOADED: 503,
}

# What streams get when their tunnel goes: lost, drained, or taken by a newer process of the gateway.
TUNNEL_WENT: frozenset[int] = frozenset((ErrorCode.UNREACHABLE, ErrorCode.DRAINING, ErrorCode.REPLACED))


class RelayResponse(web.StreamResponse):
    """What the relay returns to aiohttp: everything was written already, only the connection's fate is left."""

    def __init__(self, status: int, *, keep_alive: bool) -> None:
        super().__init__(status=status)
        self._relay_keep_alive = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._relay_keep_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


class _GrantDropped(Exception):
    """The grant is not in force any more; whether the session is, the control plane knows."""


class _ResponseBroken(Exception):
    """The response cannot be finished after its head went out; the visitor's connection is cut so that they see it."""


class _Patience:
    """The time that is left for the answer to begin. An upload may take hours, as long as it goes on."""

    def __init__(self) -> None:
        self._timeout: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Raises TimeoutError."""
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT) as self._timeout:
                yield
        finally:
            self._timeout = None

    def progress(self) -> None:
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + RESPONSE_TIMEOUT)


@dataclass(slots=True, eq=False)
class Live:
    """A request under way, as the grant table sees it."""

    grant: Grant
    request: web.Request
    task: asyncio.Task[Any]
    stream: TunnelStream | None = None
    ended: str = ""

    def end(self, reason: str) -> None:
        """Nothing more reaches the visitor: the socket is reset with what it had queued, then the rest is undone."""
        self.ended = reason
        transport = self.request.transport
        if transport is not None:
            abort_now(transport)
        if self.stream is not None:
            self.stream.reset(ErrorCode.REVOKED)
        self.task.cancel()


class Tail:
    """The end of a response on a connection that stays open, until the visitor has it."""

    __slots__ = ("_transport", "grant")

    def __init__(self, grant: Grant, transport: asyncio.WriteTransport) -> None:
        self.grant = grant
        self._transport = transport
        grant.tails[transport] = self
        asyncio.get_running_loop().call_later(TAIL_POLL, self._look)

    def _look(self) -> None:
        if unsent(self._transport):
            asyncio.get_running_loop().call_later(TAIL_POLL, self._look)
        elif self.grant.tails.get(self._transport) is self:
            del self.grant.tails[self._transport]

    def cut(self) -> bool:
        if not unsent(self._transport):
            return False
        abort_now(self._transport)
        return True


class Relay:
    """Serves share origins. One instance per worker."""

    def __init__(
        self,
        *,
        grants: GrantTable,
        admission: Admission,
        tunnels: Tunnels,
        plugins: PluginSet,
        pages: Pages,
        signer: Signer,
        metrics: Metrics,
        share_origin: Callable[[str], str],
        learn: Callable[[Grant, str], None] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`learn(grant, secret)` is told which secret a grant was found by."""
        self._grants = grants
        self._admission = admission
        self._tunnels = tunnels
        self._plugins = plugins
        self._pages = pages
        self._signer = signer
        self._metrics = metrics
        self._share_origin = share_origin
        self._learn = learn
        self._now = now
        self.leaving = False
        """The edge is being drained: no connection is kept for another request."""

    async def handle(self, request: web.Request, share_id: str) -> web.StreamResponse:
        """Answer one request on the origin of `share_id`. `request[CLIENT]` is set."""
        start = time.perf_counter()
        for _ in range(MAX_ADMISSIONS):
            answer = await self._admit(request, share_id)
            if isinstance(answer, web.StreamResponse):
                self._count("-", answer.status, None)
                return answer
            grant, context = answer
            try:
                response = await self._exchange(request, grant, context)
            except _GrantDropped:
                continue
            upgraded = response.status == 101
            self._count(grant.service, response.status, None if upgraded else time.perf_counter() - start)
            return response
        return self._problem(
            request, 503, f"share {share_id}: revoked again and again", retry_after=RETRY_AFTER
        )

    def _count(self, service: str, status: int, seconds: float | None) -> None:
        self._metrics.requests.labels(service, f"{status // 100}xx", "aiohttp").inc()
        if seconds is not None:
            self._metrics.request_seconds.observe(seconds)

    # ── who and may it ───────────────────────────────────────────────────────────────────────────────────────────

    async def _admit(
        self, request: web.Request, share_id: str
    ) -> web.StreamResponse | tuple[Grant, RequestContext]:
        raw = request.raw_headers
        token = h.bearer(raw, BEARER_PREFIX)
        secret = token or h.cookie(raw, h.SESSION_COOKIE)
        kind = SessionKind.TOKEN if token else SessionKind.COOKIE
        if not secret:
            return await self._admission.challenge(request, share_id)
        grant = self._grants.get(kind, digest(secret), share_id)
        if grant is None:
            try:
                grant = await self._admission.restore(share_id, kind, secret, request)
            except Unauthorized:
                if token:
                    return self._pages.error(401, request=request, headers={"WWW-Authenticate": "Bearer"})
                return await self._admission.challenge(request, share_id)
            except ShareEnded:
                return self._admission.ended(request)
            except NotFound:
                return self._pages.error(421, request=request)
            except NoGateway as exc:
                return self._problem(request, 503, f"share {share_id}: {exc}", retry_after=RETRY_AFTER)
            except PluginFailed as exc:
                return self._pages.error(503, request=request, error_id=exc.error_id)
            except Forbidden as exc:
                return self._pages.error(403, request=request, message=exc.message)
        if self._learn is not None:
            self._learn(grant, secret)
        if kind is SessionKind.COOKIE and not self._same_origin(request, share_id):
            return self._pages.error(403, request=request, message="The request came from another site.")
        target = request.raw_path
        if grant.share.scope and not scope.admits(grant.share.scope, request.method, target):
            return self._pages.error(403, request=request, message="This is not part of what was shared.")
        context = RequestContext(
            method=request.method,
            path=target,
            headers=[(k.decode("latin-1"), v.decode("latin-1")) for k, v in raw]
            if self._plugins.filters
            else (),
            client=request[CLIENT],
            share=grant.share,
            session=grant.session,
            at=self._now(),
        )
        return grant, context

    def _same_origin(self, request: web.Request, share_id: str) -> bool:
        """Shares of one domain are same-site, so cookies alone prove nothing on unsafe methods and upgrades."""
        if request.method in h.SAFE_METHODS and not h.values(request.raw_headers, b"upgrade"):
            return True
        origins = h.values(request.raw_headers, b"origin")
        if origins:
            return len(origins) == 1 and origins[0].decode("latin-1") == self._share_origin(share_id)
        return request.headers.get("Sec-Fetch-Site") in ("same-origin", "none")

    # ── where ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _exchange(
        self, request: web.Request, grant: Grant, context: RequestContext
    ) -> web.StreamResponse:
        upgrade = self._is_upgrade(request)
        inject = h.forwarded_fields(context.client.address, request[SCHEME], request.host.encode("latin-1"))
        inject += self._signer.fields(grant, context.at)
        source: h.RawHeaders = request.raw_headers
        if self._plugins.filters:
            try:
                edits = await self._plugins.on_request(context)
            except Denied as exc:
                return self._pages.error(403, request=request, message=str(exc))
            except PluginFailed as exc:
                return self._pages.error(503, request=request, error_id=exc.error_id)
            if not self._grants.is_live(grant):
                raise _GrantDropped
            if edits is not None:
                removed = {name.lower().encode("latin-1") for name in edits.remove}
                source = [(k, v) for k, v in source if k.lower() not in removed]
                inject += b"".join(f"{k}: {v}\r\n".encode("latin-1") for k, v in edits.add)
        try:
            head = h.request_head(
                request.method,
                request.raw_path.encode("utf-8", "surrogateescape"),
                source,
                inject=inject,
                bearer_prefix=BEARER_PREFIX.encode("ascii"),
                upgrade=upgrade,
            )
        except h.BadRequest as exc:
            return self._pages.error(exc.status, request=request)

        task = asyncio.current_task()
        assert task is not None
        live = Live(grant, request, task)
        grant.streams.add(live)
        try:
            response = await self._with_retries(request, live, head, upgrade=upgrade)
            if isinstance(response, RelayResponse):
                await self._see_off(request, live, response)
            return response
        except _ResponseBroken as exc:
            log.info("share %s: response cut: %s", grant.share.id, exc)
            if request.transport is not None:
                request.transport.abort()
            return RelayResponse(502, keep_alive=False)
        finally:
            live.grant.streams.discard(live)
            if live.stream is not None:
                live.stream.reset(ErrorCode.CANCEL)

    async def _see_off(self, request: web.Request, live: Live, response: RelayResponse) -> None:
        """Wait until the visitor has nearly all of the response; or all of it, when the connection is to be closed: a
        closed socket cannot be reset any more."""
        transport = request.transport
        if transport is None:
            return
        most, pause = TAIL if response.keep_alive else 0, TAIL_FIRST
        while (left := unsent(transport)) > most:
            await asyncio.sleep(pause)
            pause = min(2 * pause, TAIL_POLL)
        if left and transport not in live.grant.tails:
            Tail(live.grant, transport)

    @staticmethod
    def _is_upgrade(request: web.Request) -> bool:
        """Only what aiohttp's parser also took for an upgrade: then it hands us the bytes that follow."""
        return (
            request.method == "GET"
            and request.version >= (1, 1)
            and b"upgrade" in h.nominated(request.raw_headers)
            and [v.strip(b" \t").lower() for v in h.values(request.raw_headers, b"upgrade")] == [b"websocket"]
        )

    async def _with_retries(
        self, request: web.Request, live: Live, head: bytes, *, upgrade: bool
    ) -> web.StreamResponse:
        grant = live.grant
        bodiless = not request.body_exists and not upgrade
        tried: set[str] = set()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                gateway = await self._gateway(grant, tried)
                if live.ended or not self._grants.is_live(grant):
                    return self._admission.ended(request)
                live.stream = self._tunnels.open(grant.site, gateway, grant.service, head, fin=bodiless)
                return await self._serve(
                    request, live, upgrade=upgrade, has_body=not bodiless and not upgrade
                )
            except NoGateway as exc:
                return self._problem(request, 503, f"{grant.site}: {exc}", retry_after=RETRY_AFTER)
            except StreamRefused as exc:
                tried.add(gateway)
                if attempt == MAX_ATTEMPTS or exc.code is ErrorCode.OVERLOADED:
                    return self._problem(
                        request, 503, f"{grant.site}/{gateway}: {exc.reason}", retry_after=RETRY_AFTER
                    )
            except StreamReset as exc:
                stream = live.stream
                assert stream is not None
                tried.add(gateway)
                if attempt == MAX_ATTEMPTS or not (
                    bodiless and self._may_repeat(grant, request.method, stream, exc.code, tried)
                ):
                    status = STATUS_OF_RESET.get(exc.code, 502)
                    return self._problem(request, status, f"{grant.site}/{gateway}/{grant.service}: {exc}")
        raise AssertionError("the last attempt returns")

    def _may_repeat(
        self, grant: Grant, method: str, stream: TunnelStream, code: int, tried: set[str]
    ) -> bool:
        """Whether a request without a body, whose stream was reset before a response came, may go out again."""
        if stream.acknowledged and code != ErrorCode.DRAINING:
            # The gateway lives. That it could not reach the service did not touch the service; another one may.
            return code == ErrorCode.UNREACHABLE and any(
                candidate.name not in tried
                for candidate in self._tunnels.candidates(grant.site, grant.service)
            )
        # The tunnel, or another worker's way to it, was lost or drained: nobody knows how far the request had come.
        return code in TUNNEL_WENT and method in h.IDEMPOTENT_METHODS

    async def _gateway(self, grant: Grant, tried: set[str]) -> str:
        """The session's gateway; chosen anew when that one is gone, unwell or was tried. Raises NoGateway."""
        name = grant.gateway
        if name is not None and name not in tried and self._tunnels.is_connected(grant.site, name):
            well = {candidate.name for candidate in self._tunnels.candidates(grant.site, grant.service)}
            if (
                name in well or not well
            ):  # when nobody's service is well, let the gateway say what is wrong with it
                return name
        try:
            chosen = await self._admission.choose_gateway(
                grant.share, grant.session, exclude=frozenset(tried)
            )
        except NoGateway:
            if not tried:
                raise
            # No other one; but one that lost a tunnel may have another, or be back.
            chosen = await self._admission.choose_gateway(grant.share, grant.session)
        self._grants.move(grant, chosen)
        return chosen

    def _problem(
        self, request: web.Request, status: int, what: str, *, retry_after: int | None = None
    ) -> web.StreamResponse:
        error_id = secrets.token_hex(4)
        log.warning("error %s: %d: %s", error_id, status, what)
        return self._pages.error(status, error_id=error_id, request=request, retry_after=retry_after)

    # ── the exchange ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _serve(
        self, request: web.Request, live: Live, *, upgrade: bool, has_body: bool
    ) -> web.StreamResponse:
        stream = live.stream
        assert stream is not None
        pump: asyncio.Task[None] | None = None
        patience = _Patience()
        if has_body:
            pump = asyncio.create_task(_pump_request(request, stream, patience.progress))
        try:
            head, fin = await self._response_head(request, stream, patience, upgrade=upgrade)
            if head.status == 101:
                return await _serve_upgraded(request, stream, head)
            complete = pump is None or pump.done()
            return await self._respond(
                request,
                stream,
                head,
                fin=fin,
                keep_alive=request.keep_alive and complete and not self.leaving,
            )
        except h.BadResponse as exc:
            stream.reset(ErrorCode.PROTOCOL_ERROR)
            return self._problem(request, 502, f"{live.grant.site}/{live.grant.service}: {exc}")
        finally:
            if pump is not None:
                pump.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await pump

    async def _response_head(
        self, request: web.Request, stream: TunnelStream, patience: _Patience, *, upgrade: bool
    ) -> tuple[h.ResponseHead, bool]:
        """The final response head, and whether that is all. Interim ones (1xx) are passed on. Raises BadResponse,
        StreamReset."""
        try:
            async with patience.limit():
                while True:
                    received = await stream.head()
                    head = h.parse_response(received.data)
                    if head.status == 101 and not (upgrade and not received.interim):
                        raise h.BadResponse("101 without an upgrade")
                    if head.interim != received.interim:
                        raise h.BadResponse("a final status in an interim head, or the other way round")
                    if not head.interim:
                        return head, received.fin
                    # aiohttp has answered Expect: 100-continue already, and HTTP/1.0 knows no interim responses.
                    if head.status != 100 and request.version >= (1, 1):
                        await _write(request, h.response_head(head, b"", keep_alive=True, http11=True))
        except TimeoutError:
            stream.reset(ErrorCode.TIMEOUT)
            raise StreamReset(ErrorCode.TIMEOUT) from None

    async def _respond(
        self, request: web.Request, stream: TunnelStream, head: h.ResponseHead, *, fin: bool, keep_alive: bool
    ) -> web.StreamResponse:
        """Write the final response; the edge frames the body itself and cuts what does not add up. The head goes out
        at once: the first event of an SSE response may be minutes away."""
        http11 = request.version >= (1, 1)
        bodiless = request.method == "HEAD" or head.status in h.NO_BODY_STATUS
        length = head.length
        if length is None and fin and not bodiless:
            length = 0
        chunked = length is None and not bodiless and http11
        if chunked:
            framing = b"Transfer-Encoding: chunked\r\n"
        elif length is not None and head.status != 204:
            framing = b"Content-Length: %d\r\n" % length
        else:
            framing = b""
            keep_alive = keep_alive and bodiless  # HTTP/1.0: the end of the connection ends the body
        await _write(request, h.response_head(head, framing, keep_alive=keep_alive, http11=http11))

        expected = 0 if bodiless else length
        counted = 0
        while not fin:
            data = await self._read(stream)
            if not data:
                break
            counted += len(data)
            if expected is not None and counted > expected:
                stream.reset(ErrorCode.PROTOCOL_ERROR)
                raise _ResponseBroken("more bytes than the head promised")
            await _write(request, _chunk(data) if chunked else data)
        if expected is not None and counted < expected:
            raise _ResponseBroken("fewer bytes than the head promised")
        if chunked:
            await _write(request, b"0\r\n\r\n")
        return RelayResponse(head.status, keep_alive=keep_alive)

    @staticmethod
    async def _read(stream: TunnelStream) -> bytes:
        try:
            return await stream.read()
        except StreamReset as exc:
            raise _ResponseBroken(f"the stream was reset: {exc}") from exc


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _write(request: web.Request, data: bytes) -> None:
    """To the visitor; waits while the transport's buffer is over its high-water mark."""
    try:
        await request.writer.write(data)
    except ConnectionError as exc:
        raise _ResponseBroken("the visitor went away") from exc


async def _pump_request(request: web.Request, stream: TunnelStream, progress: Callable[[], None]) -> None:
    """The visitor's request body into the stream, in bounded memory."""
    try:
        while data := await request.content.readany():
            await stream.write(data)
            progress()
        stream.finish()
    except StreamReset:
        return  # the response side sees it too, and answers
    except Exception:  # the visitor's body broke off or was malformed: aiohttp raises several kinds
        stream.reset(ErrorCode.CANCEL)


# ── upgraded connections ──────────────────────────────────────────────────────────────────────────────────────────


class _Opaque:
    """Takes the visitor's bytes after the 101 from aiohttp's protocol (its payload parser interface)."""

    def __init__(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self._pause = pause
        self._resume = resume
        self._queue: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._eof = False
        self._waiter: asyncio.Future[None] | None = None

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._queue.append(bytes(data))
        self._size += len(data)
        if self._size > UPGRADE_BUFFER and not self._paused:
            self._paused = True
            self._pause()
        self._wake()
        return False, b""

    def feed_eof(self) -> None:
        self._eof = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self) -> bytes:
        """What has come since; b"" when the visitor closed."""
        while not self._queue and not self._eof:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        data = b"".join(self._queue)
        self._queue.clear()
        self._size = 0
        if self._paused and not self._eof:
            self._paused = False
            self._resume()
        return data


async def _serve_upgraded(
    request: web.Request, stream: TunnelStream, head: h.ResponseHead
) -> web.StreamResponse:
    """Opaque bytes in both directions until either side ends."""
    protocol = request.protocol
    visitor = _Opaque(protocol.pause_reading, protocol.resume_reading)
    await _write(request, h.response_head(head, b"", keep_alive=True, http11=True))
    protocol.set_parser(visitor)  # type: ignore[arg-type]

    async def upstream() -> None:
        while data := await visitor.read():
            await stream.write(data)
        stream.finish()

    async def downstream() -> None:
        while data := await stream.read():
            await _write(request, data)

    up = asyncio.create_task(upstream())
    down = asyncio.create_task(downstream())
    try:
        # The application's end is the end; after the visitor's end the application's last bytes still go through.
        await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        if not down.done():
            await asyncio.wait((down,), timeout=HALF_CLOSED_TIMEOUT)
    finally:
        up.cancel()
        down.cancel()
        await asyncio.gather(up, down, return_exceptions=True)
    return RelayResponse(101, keep_alive=False)
