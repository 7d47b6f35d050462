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
import functools
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from guestpass import scope
from guestpass.config import Limits
from guestpass.edge import headers as h
from guestpass.edge import limits
from guestpass.edge.access_log import who
from guestpass.edge.grants import Grant, GrantTable
from guestpass.edge.keys import CLIENT, GRANT, LIVE, SCHEME
from guestpass.edge.limits import Refusals
from guestpass.edge.static import Compiled
from guestpass.errors import Forbidden, NoGateway, NotFound, PluginFailed, ShareEnded, Unauthorized
from guestpass.loop import abort_now, unsent, waiting
from guestpass.model import SessionKind
from guestpass.mux.stream import StreamReset, TunnelStream
from guestpass.plugin import Denied, RequestContext
from guestpass.tokens import BEARER_PREFIX, digest
from guestpass_speedups.relay import VISITOR_GONE, Lane
from guestpass_speedups.session import ErrorCode, StreamRefused

if TYPE_CHECKING:
    from guestpass.edge.admission import Admission
    from guestpass.edge.assertion import Signer
    from guestpass.edge.metrics import Metrics
    from guestpass.edge.pages import Pages
    from guestpass.edge.plugins import PluginSet
    from guestpass.edge.tunnels import Tunnels
    from guestpass_speedups.session import Budget

log = logging.getLogger("guestpass.edge.relay")

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

NOT_SHARED = "This is not part of what was shared."

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

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Raises TimeoutError."""
        try:
            async with asyncio.timeout(self._seconds) as self._timeout:
                yield
        finally:
            self._timeout = None

    def progress(self) -> None:
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._seconds)


@dataclass(slots=True, eq=False)
class Live:
    """A request under way, as the grant table sees it."""

    grant: Grant
    request: web.Request
    task: asyncio.Task[Any]
    stream: TunnelStream | None = None
    ended: str = ""
    status: int = 0
    """Of the application's answer, once its head went out."""
    whole: bool = False
    """The answer was written to its end."""

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
        refusals: Refusals | None = None,
        access_log: Lane | None = None,
        windows: Callable[[str], Budget] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`learn(grant, secret)` is told which secret a grant was found by. `access_log` takes each request's line.
        `windows`: what the windows of all streams of a client, named by its address, may grow by."""
        self._grants = grants
        self._admission = admission
        self._tunnels = tunnels
        self._plugins = plugins
        self._pages = pages
        self._signer = signer
        self._metrics = metrics
        self._share_origin = share_origin
        self._learn = learn
        self._log = access_log
        self._windows = windows
        self._refusals = refusals if refusals is not None else Refusals(Limits())
        self._limits = self._refusals.limits
        self._now = now
        self.leaving = False
        """The edge is being drained: no connection is kept for another request."""

    async def handle(self, request: web.Request, share_id: str) -> web.StreamResponse:
        """Answer one request on the origin of `share_id`. `request[CLIENT]` is set."""
        lane = self._log
        if lane is None:
            return await self._handle(request, share_id)
        start = time.perf_counter()
        status, complete, transport = 0, False, request.transport
        try:
            response = await self._handle(request, share_id)
            status, complete = response.status, True
            return response
        finally:
            grant, live = request.get(GRANT), request.get(LIVE)
            stream = None
            if isinstance(live, Live) and live.status:
                # Either side may end an upgraded connection; only a revocation breaks it off.
                complete = live.whole if live.status != 101 else not live.ended
                status, stream = live.status, live.stream
            elif not status and (status := getattr(transport, "told", 0)):
                complete = True  # by the front
            begun = lane.begun(
                who(share_id, grant if isinstance(grant, Grant) else None),
                request[CLIENT].address,
                request.method.encode("ascii", "replace"),
                request.raw_path.encode("utf-8", "surrogateescape"),
            )
            lane.ended(
                begun,
                status or VISITOR_GONE,
                stream.bytes_sent if stream is not None else 0,
                stream.bytes_received if stream is not None else 0,
                time.perf_counter() - start,
                complete,
            )

    async def _handle(self, request: web.Request, share_id: str) -> web.StreamResponse:
        start = time.perf_counter()
        for _ in range(MAX_ADMISSIONS):
            answer = await self._admit(request, share_id)
            if isinstance(answer, web.StreamResponse):
                self._count("-", answer.status, None)
                return answer
            grant, context = answer
            request[GRANT] = grant
            try:
                response = await self._exchange(request, grant, context)
            except _GrantDropped:
                continue
            upgraded = response.status == 101
            self._count(grant.service, response.status, None if upgraded else time.perf_counter() - start)
            return response
        return self._problem(request, 503, f"share {share_id}: revoked again and again")

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
            # Of the front's question, if there was one: it asks about cookies only.
            said: Exception | None = getattr(request.transport, "refusal", None)
            try:
                if said is not None and kind is SessionKind.COOKIE:
                    raise said
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
                return self._problem(request, 503, f"share {share_id}: {exc}")
            except PluginFailed as exc:
                return self._pages.error(503, request=request, error_id=exc.error_id)
            except Forbidden as exc:
                return self._pages.error(403, request=request, message=exc.message)
        if self._learn is not None:
            self._learn(grant, secret)
        if kind is SessionKind.COOKIE and not self._same_origin(request, share_id):
            return self._forbidden(request, "The request came from another site.")
        target = request.raw_path
        if grant.share.scope and not scope.admits(grant.share.scope, request.method, target):
            return self._forbidden(request, NOT_SHARED)
        if grant.static is not None:
            refusal = self._limit(request, grant.static)
            if refusal is not None:
                return refusal
        context = RequestContext(
            method=request.method,
            path=target,
            headers=h.for_plugins(raw, BEARER_PREFIX.encode("ascii"))
            if self._plugins.filters_requests
            else (),
            client=request[CLIENT],
            share=grant.share,
            session=grant.session,
            at=self._now(),
        )
        return grant, context

    def _limit(self, request: web.Request, static: Compiled) -> web.StreamResponse | None:
        """The answer to what filters do not admit at all; None: they do, and a token of each rate was taken."""
        words = static.elsewhere(request[CLIENT].address)
        if words is None:
            words = static.outside(request.method, request.raw_path)
        if words is not None:
            return self._forbidden(request, words or NOT_SHARED)
        wait = static.take(time.monotonic())
        if wait is None:
            return None
        return self._pages.error(
            429, request=request, why="a filter's rate", retry_after=max(1, math.ceil(wait))
        )

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
        counted = h.one_hop_fewer(request.method, request.raw_headers)
        if counted is None:
            return web.Response(status=204)
        source: h.RawHeaders = counted
        if grant.static is not None:
            source = [(k, v) for k, v in source if k.lower() not in grant.static.removed]
            inject += grant.static.added
        if self._plugins.filters_requests:
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

        if grant.load.streams >= self._limits.streams_per_share:
            return self._limited(request, "streams_per_share")
        if len(grant.streams) >= self._limits.streams_per_session:
            return self._limited(request, "streams_per_session")
        task = asyncio.current_task()
        assert task is not None
        request[LIVE] = live = Live(grant, request, task)
        grant.streams.add(live)
        load = grant.load
        load.streams += 1
        try:
            response = await self._with_retries(request, live, head, upgrade=upgrade)
            live.whole = True
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
            load.streams -= 1
            if live.stream is not None:
                live.stream.reset(ErrorCode.CANCEL)

    async def _see_off(self, request: web.Request, live: Live, response: RelayResponse) -> None:
        """Wait until the visitor has nearly all of the response; or all of it, when the connection is to be closed: a
        closed socket cannot be reset any more."""
        transport = request.transport
        if transport is None:
            return
        most, pause = TAIL if response.keep_alive else 0, TAIL_FIRST
        least, since = unsent(transport), time.monotonic()
        while (left := unsent(transport)) > most:
            if left < least:
                least, since = left, time.monotonic()
            elif time.monotonic() - since >= self._limits.write_progress_seconds:
                self._refusals.note("write_progress_seconds", request[CLIENT].address)
                abort_now(transport)
                raise _ResponseBroken("the visitor takes nothing of it")
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
                if self._windows is not None and request.transport is not None:
                    behind = functools.partial(waiting, request.transport)
                    live.stream.bound(behind, self._windows(request[CLIENT].address))
                return await self._serve(
                    request, live, upgrade=upgrade, has_body=not bodiless and not upgrade
                )
            except NoGateway as exc:
                return self._problem(request, 503, f"{grant.site}: {exc}")
            except StreamRefused as exc:
                tried.add(gateway)
                if attempt == MAX_ATTEMPTS or exc.code is ErrorCode.OVERLOADED:
                    return self._problem(request, 503, f"{grant.site}/{gateway}: {exc.reason}")
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

    def _forbidden(self, request: web.Request, why: str) -> web.StreamResponse:
        return self._pages.error(403, request=request, message=why, why=why)

    def _limited(self, request: web.Request, limit: str) -> web.StreamResponse:
        told = limits.TABLE[limit]
        return self._pages.error(
            told.status,
            error_id=self._refusals.note(limit, request[CLIENT].address),
            request=request,
            message=Refusals.message(limit),
            retry_after=limits.RETRY_AFTER if told.retry else None,
        )

    def _problem(self, request: web.Request, status: int, what: str) -> web.StreamResponse:
        error_id = secrets.token_hex(4)
        log.warning("error %s: %d: %s", error_id, status, what)
        return self._pages.error(status, error_id=error_id, request=request)

    # ── the exchange ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _serve(
        self, request: web.Request, live: Live, *, upgrade: bool, has_body: bool
    ) -> web.StreamResponse:
        stream = live.stream
        assert stream is not None
        pump: asyncio.Task[None] | None = None
        patience = _Patience(self._limits.answer_seconds)
        if has_body:
            pump = asyncio.create_task(_pump_request(request, stream, patience.progress))
        try:
            head, fin = await self._response_head(request, stream, patience, upgrade=upgrade)
            live.status = head.status
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
            live.status = 0
            stream.reset(ErrorCode.PROTOCOL_ERROR)
            return self._problem(request, 502, f"{live.grant.site}/{live.grant.service}: {exc}")
        finally:
            if pump is not None and not pump.done():
                pump.cancel()
                await asyncio.wait((pump,))  # which a cancellation of ours still ends

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
            self._refusals.note("answer_seconds", request[CLIENT].address)
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
        if not h.values(head.fields, b"date"):  # RFC 9110, 6.6.1
            framing = b"Date: %b\r\n" % formatdate(usegmt=True).encode("ascii") + framing
        await _write(request, h.response_head(head, framing, keep_alive=keep_alive, http11=http11))

        expected = 0 if bodiless else length
        if expected:
            stream.expect(expected)
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
