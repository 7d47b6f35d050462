"""A tunnel over a socket: WebSocket framing outside, `Session` inside, asyncio around.

    transport ─▶ Wire.buffer_updated ─▶ WebSocket ─▶ Session.receive_raw ─▶ TunnelStream
    transport ◀─ Wire._write_frames ◀── WebSocket ◀─ Session.fill_at ◀───── TunnelStream

What runs for every read and write is compiled (`guestpass_speedups.wire`); here is the rest.

Rules that everything here follows:

1. Reading never pauses. What a stream's reader does not take is bounded by credit; a tunnel that stops reading because
   a writer is slow is how two ends that both push come to a standstill.
2. `output_ready` asks for a flush at the end of the loop's turn, so the frames of many streams leave in one write. A
   flush fills at most 128 KiB and only while the transport is not paused; what is left waits in the session, where
   small frames still overtake bulk.
3. Callbacks of the session run inside `Session.receive`. An end that is decided there takes effect when `receive` has
   returned.
4. The end is one way: `_end` writes what the session still has (its GOAWAY), closes, and tells every stream. After
   that nothing is read or written any more.

Two ends: `EdgeLink` is handed an accepted connection after its upgrade request was checked; `GatewayLink` dials, sends
the upgrade request, and serves what the edge opens: each stream by one task, or by a session that does it itself
(`guestpass_speedups.upstream`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from guestpass.loop import abort_now, takes_all
from guestpass.mux import handshake
from guestpass.mux.handshake import HandshakeError, Hello, Proof, UpgradeRefused, Verdict
from guestpass.mux.stream import StreamReset, TunnelStream
from guestpass_speedups.session import Budget, ErrorCode, Session, Stream, TunnelError
from guestpass_speedups.websocket import GOING_AWAY, NORMAL, WebSocket, WebSocketError
from guestpass_speedups.wire import Wire, keep_freed_memory

if TYPE_CHECKING:
    from guestpass_speedups.session import SessionHandler

log = logging.getLogger("guestpass.tunnel")

keep_freed_memory()  # whoever imports this is an edge or a gateway

# Water marks of the transport. uvloop's defaults for TLS let 576 KiB pile up, and urgent frames would stand behind it.
WRITE_HIGH = 128 * 1024
WRITE_LOW = 32 * 1024

# Unsent bytes in the kernel's buffer. Its own bound is megabytes, and a small frame would stand behind them.
NOTSENT_LOWAT = 128 * 1024

# The session looks at its clocks so often.
TICK = 1.0

# Longest handshake, from the accepted socket to the verdict. Whoever needs longer tries again.
HANDSHAKE_TIMEOUT = 10.0

# A write that makes no progress for so long ends the tunnel (SPEC.md, chapter 6).
NO_PROGRESS_TIMEOUT = 30.0

# Unacknowledged data for so long ends the connection in the kernel. Longer than the session's own 6 s, which give the
# better reason.
TCP_USER_TIMEOUT_MS = 10_000

# After the close frame, what is queued has so long to leave.
CLOSE_TIMEOUT = 5.0

# The same when the other end has fallen silent. Then a reset cuts the connection: if it is deaf in one direction only,
# a GOAWAY may be stuck behind segments whose acknowledgements are lost, and a reset is not.
SILENT_CLOSE_TIMEOUT = 0.25

# Drain: how often the number of live streams is looked at.
DRAIN_POLL = 0.05

# Highest stream id: GOAWAY with it says "open no more" and cuts off nothing that is on its way.
LAST_STREAM_ID = 2**30 - 1


@dataclass(slots=True)
class PeerInfo:
    """The gateway at the other end of an edge's tunnel: proven fields, and what its newest INFO says."""

    site: str
    name: str
    epoch: int
    public_key: bytes
    software: str = ""
    services: Mapping[str, bool] = field(default_factory=dict)
    """Service → whether the gateway can reach it."""
    weight: float = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    informed: bool = False
    """An INFO has come."""


@dataclass(frozen=True, slots=True)
class End:
    """Why a tunnel ended. `by_peer`: the other end said so, or hung up."""

    code: ErrorCode
    reason: str
    by_peer: bool = False
    status: int | None = None
    """Gateway: the HTTP status that answered the upgrade, if that was not 101 (0: the answer was not HTTP)."""
    verdict: Verdict | None = None
    """Gateway: the edge's refusal."""


class Owner(Protocol):
    """What a link tells the one who keeps it. `link_ended` is last and comes exactly once."""

    def link_ready(self, link: Any) -> None: ...
    def link_info(self, link: Any, fields: Mapping[str, Any]) -> None: ...
    def link_ended(self, link: Any, end: End) -> None: ...


class EdgeOwner(Owner, Protocol):
    async def authenticate(self, link: EdgeLink, proof: Proof) -> Verdict: ...


class Link(Wire, asyncio.BufferedProtocol):
    """One tunnel. Do not make one of these but one of its two kinds."""

    def __init__(self, owner: Owner, *, edge: bool, budget: Budget, hello: Hello) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._edge = edge
        self._hello = hello
        self._peer_hello: Hello | None = None
        self._budget = budget
        self.session = cast(Session, None)  # from `connection_made` on
        self.ready = False
        self.since = time.time()
        self.end = None
        self.goaway: ErrorCode | None = None
        """Code of the other end's GOAWAY."""
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done when the connection is gone."""
        self._websocket = WebSocket(client=not edge)
        self._tick_timer: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._progress = 0
        self._progress_at = 0.0

    def _new_session(self, handler: SessionHandler, budget: Budget, **limits: Any) -> Session:
        return Session(self._edge, handler, budget, **limits)

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def transport(self) -> asyncio.Transport | None:
        """None before the connection is made and when it is gone."""
        return self._transport

    @property
    def draining(self) -> bool:
        """Opens no more streams."""
        return self.end is not None or self.session.draining

    @property
    def usable(self) -> bool:
        """Let in, and alive as far as anybody knows."""
        return self.ready and self.end is None

    @property
    def remote(self) -> str:
        """Address of the other end of the connection, for logs."""
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) and len(name) >= 2 else str(name or "-")

    def _who(self) -> str:
        return self.remote

    # ── asyncio's calls ──────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        now = time.monotonic()
        self.session = self._new_session(
            self, self._budget, now=now, max_streams=self._hello.max_streams, floor=self._hello.floor
        )
        made = cast(asyncio.Transport, transport)
        self._connect(made, self._loop.call_soon, takes_all(made))
        made.set_write_buffer_limits(high=WRITE_HIGH, low=WRITE_LOW)
        _tune(made)
        self._progress_at = now
        self._tick_timer = self._loop.call_later(TICK, self._tick)
        self._deadline = self._loop.call_later(HANDSHAKE_TIMEOUT, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.end is None:
            reason = f"the connection was lost ({exc})" if exc else "the other end hung up"
            self._note_end(End(ErrorCode.UNREACHABLE, reason, by_peer=True))
        self._stop_timers()
        self._disconnect()
        if not self.closed.done():
            self.closed.set_result(None)

    def eof_received(self) -> bool:
        return False  # a tunnel has no half-closed state: streams have

    # ── Wire ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _faulty(self, exc: Exception) -> None:
        if isinstance(exc, TunnelError) and self._receiving:
            self._fail(exc.code, exc.reason)
        elif isinstance(exc, WebSocketError):
            self._fail(ErrorCode.PROTOCOL_ERROR, exc.reason, close_code=exc.code)
        else:
            log.error("tunnel with %s: a fault of our own", self._who(), exc_info=exc)
            self._fail(ErrorCode.INTERNAL_ERROR, "a fault of our own")

    def _after_read(self) -> None:
        if self._end_due is not None:
            self._end(*self._end_due)
            return
        replies = self._websocket.take_replies()
        if replies and self._transport is not None:
            self._transport.write(replies)
        if self._websocket.close_code is not None:
            code = self.goaway if self.goaway is not None else ErrorCode.NO_ERROR
            self._end(End(code, "the other end closed the tunnel", by_peer=True))

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tick(self) -> None:
        self._tick_timer = self._loop.call_later(TICK, self._tick)
        now = time.monotonic()
        try:
            self.session.tick(now)
        except TunnelError as exc:
            self._fail(exc.code, exc.reason)
            return
        transport = self._transport
        if transport is None:
            return
        waiting = transport.get_write_buffer_size()
        progress = self._written - waiting
        if progress != self._progress or not waiting:
            self._progress = progress
            self._progress_at = now
        elif now - self._progress_at > NO_PROGRESS_TIMEOUT:
            log.warning(
                "tunnel with %s: nothing could be written for %.0f s", self._who(), NO_PROGRESS_TIMEOUT
            )
            self.abort(ErrorCode.TIMEOUT)

    def _too_late(self) -> None:
        self._deadline = None
        if not self.ready:
            self._fail(ErrorCode.TIMEOUT, f"the handshake took more than {HANDSHAKE_TIMEOUT:.0f} s")

    def _stop_timers(self) -> None:
        for timer in (self._tick_timer, self._deadline):
            if timer is not None:
                timer.cancel()
        self._tick_timer = self._deadline = None

    # ── end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fail(self, code: ErrorCode, reason: str, *, close_code: int | None = None) -> None:
        """The peer, or the handshake, is at fault. After a TunnelError the session has its own GOAWAY ready."""
        if self.end is None and self._end_due is None:
            log.warning("tunnel with %s ended: %s: %s", self._who(), ErrorCode(code).name, reason)
            self._end(End(ErrorCode(code), reason), close_code)

    def finish(self, code: ErrorCode = ErrorCode.NO_ERROR, reason: str = "closed here") -> None:
        """GOAWAY with `code`, close; streams that are live are lost. Idempotent."""
        self._end(End(code, reason))

    def _end(self, end: End, close_code: int | None = None) -> None:
        if self.end is not None:
            return
        if self._receiving:  # the session is busy; what it has handed out so far stands
            self._end_due = self._end_due or (end, close_code)
            return
        transport = self._transport
        if transport is not None and not transport.is_closing():
            try:
                self._say_goodbye(transport, end, close_code)
            except (
                Exception
            ):  # whatever is wrong, the tunnel ends, and everybody who waits for it hears of that
                log.exception("tunnel with %s: a fault of our own at its end", self._who())
                transport.abort()
        self._note_end(end)
        if transport is not None:
            transport.close()
            if end.code is ErrorCode.TIMEOUT and not end.by_peer:
                self._deadline = self._loop.call_later(SILENT_CLOSE_TIMEOUT, abort_now, transport)
            else:
                self._deadline = self._loop.call_later(CLOSE_TIMEOUT, transport.abort)

    def _say_goodbye(self, transport: asyncio.Transport, end: End, close_code: int | None) -> None:
        if not end.by_peer:
            self.session.goaway(end.code)
            self._write_frames()
        if close_code is None:
            close_code = NORMAL if end.code in (ErrorCode.NO_ERROR, ErrorCode.DRAINING) else GOING_AWAY
        frame = self._websocket.close(close_code)
        if frame:
            transport.write(frame)

    def _note_end(self, end: End) -> None:
        self.end = end
        self._stop_timers()
        # To the streams the reason is always the same: their tunnel is gone.
        code = end.code if end.code in (ErrorCode.REPLACED, ErrorCode.DRAINING) else ErrorCode.UNREACHABLE
        self.session.abort(code)
        self._owner.link_ended(self, end)

    def abort(self, code: ErrorCode = ErrorCode.UNREACHABLE) -> None:
        """The connection is cut; nothing more is written."""
        self.abort_with(End(code, "cut off here"))

    def abort_with(self, end: End) -> None:
        if self.end is None:
            self._note_end(end)
        if self._transport is not None:
            self._transport.abort()

    async def close(self, code: ErrorCode = ErrorCode.NO_ERROR) -> None:
        """`finish`, and wait until the connection is gone."""
        self.finish(code)
        if self._transport is not None:
            await asyncio.shield(self.closed)

    async def drain(self, seconds: float) -> None:
        """Let live streams end for at most `seconds`, open no new ones, then close (SPEC.md, chapter 10)."""
        until = time.monotonic() + seconds
        if self.end is None and self.ready:
            self.session.goaway(ErrorCode.DRAINING, LAST_STREAM_ID)
            # One round trip, and what two busy processes add to it: what the other end opened before it heard of this
            # is on its way.
            await self._ended_within(min(max(self.session.rtt or 0.0, DRAIN_POLL), seconds))
            if self.end is None:
                self.session.goaway(ErrorCode.DRAINING, self.session.last_stream)
            while self.end is None and self.session.streams and time.monotonic() < until:
                await self._ended_within(DRAIN_POLL)
        await self.close(ErrorCode.DRAINING)

    async def _ended_within(self, seconds: float) -> None:
        await asyncio.wait((self.closed,), timeout=seconds)

    # ── SessionHandler ───────────────────────────────────────────────────────────────────────────────────────────

    def hello_received(self, payload: bytes) -> None:
        with _handshake():
            hello = Hello.decode(payload, role="gateway" if self._edge else "edge")
            self._peer_hello = hello
            self.session.set_peer_limits(floor=hello.floor, max_streams=hello.max_streams)
            self._greeted(hello)

    def auth_received(self, payload: bytes) -> None:
        with _handshake():
            self._authenticated(handshake.decode_object(payload, "AUTH"))

    def info_received(self, payload: bytes) -> None:
        with _handshake():
            self._informed(handshake.decode_object(payload, "INFO"))

    def _greeted(self, hello: Hello) -> None:
        raise NotImplementedError

    def _authenticated(self, fields: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _informed(self, fields: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def stream_opened(
        self, stream: Stream, service: str, interactive: bool, head: bytes, fin: bool
    ) -> TunnelStream | None:
        return None

    def goaway_received(self, last_stream: int, code: int) -> None:
        """The session opens no more streams by itself; the other end closes when it is done."""
        try:
            self.goaway = ErrorCode(code)
        except ValueError:  # SPEC.md, chapter 11
            self.goaway = ErrorCode.INTERNAL_ERROR

    def pong_received(self, rtt: float) -> None:
        """The session keeps the round-trip time."""

    def handler_failed(self, stream: Stream, exc: BaseException) -> None:
        log.error(
            "tunnel with %s: a fault in the handling of stream %d", self._who(), stream.id, exc_info=exc
        )

    # ── shared parts of the handshake ────────────────────────────────────────────────────────────────────────────

    def _now_ready(self) -> None:
        self.ready = True
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._owner.link_ready(self)

    def send_info(self, fields: Mapping[str, Any]) -> None:
        """The whole state; only the newest is sent when several come quickly."""
        if self.end is None:
            self.session.send_info(orjson.dumps(fields))


class EdgeLink(Link):
    """The edge's end. `connection_made` is called by the acceptor, `feed` with what came after the upgrade request."""

    def __init__(
        self, owner: EdgeOwner, *, budget: Budget, hello: Hello, websocket_key: str, certificate: bytes | None
    ) -> None:
        """`certificate`: its hash that the gateway must have seen (empty without TLS); None: the binding is off."""
        super().__init__(owner, edge=True, budget=budget, hello=hello)
        self._edge_owner = owner
        self._websocket_key = websocket_key
        self._certificate = certificate
        self._check: asyncio.Task[None] | None = None
        self._early_info: Mapping[str, Any] | None = None
        self.peer: PeerInfo | None = None
        self.asked_to_leave = False
        """For the owner: the gateway was told to bring up another tunnel."""

    @property
    def epoch(self) -> int:
        """The gateway's, from its HELLO."""
        return self._peer_hello.epoch if self._peer_hello is not None else 0

    def _who(self) -> str:
        return f"{self.peer.site}/{self.peer.name}" if self.peer is not None else self.remote

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        cast(asyncio.Transport, transport).write(handshake.upgrade_response(self._websocket_key))
        self.session.send_hello(self._hello.encode())

    def feed(self, data: bytes) -> None:
        """Bytes of the tunnel that were read together with the upgrade request."""
        if data and self.end is None:
            self._received(bytearray(data), len(data))

    def _greeted(self, hello: Hello) -> None:
        """The gateway goes on by itself."""

    def _authenticated(self, fields: Mapping[str, Any]) -> None:
        if fields.get("step") != "proof":
            return
        if self._check is not None or self._peer_hello is None:
            raise HandshakeError(ErrorCode.PROTOCOL_ERROR, "a second proof")
        proof = Proof.decode(fields)
        self._check = self._loop.create_task(self._judge(proof, self._peer_hello))

    async def _judge(self, proof: Proof, hello: Hello) -> None:
        try:
            verdict = await self._verdict(proof, hello)
        except Exception:
            log.exception("the proof of %s/%s could not be checked", proof.site, proof.name)
            verdict = Verdict(False, "unavailable", "The edge cannot check keys at the moment.")
        if self.end is not None:
            return
        self.session.send_auth(verdict.encode())
        if not verdict.ok:
            self._fail(ErrorCode.AUTH_FAILED, f"{verdict.code} (site {proof.site}, name {proof.name})")
            return
        self.peer = PeerInfo(proof.site, proof.name, hello.epoch, proof.key, hello.software)
        if self._early_info is not None:
            self._informed(self._early_info)
        self._now_ready()

    async def _verdict(self, proof: Proof, hello: Hello) -> Verdict:
        if not proof.holds(self._hello, hello):
            return Verdict(False, "bad_signature", "The signature does not fit the key and this handshake.")
        if self._certificate is not None and proof.certificate != self._certificate:
            return Verdict(
                False,
                "wrong_certificate",
                "The gateway saw another TLS certificate than this edge's: something between them ends TLS.",
            )
        return await self._edge_owner.authenticate(self, proof)

    def _informed(self, fields: Mapping[str, Any]) -> None:
        peer = self.peer
        if peer is None:
            self._early_info = fields  # allowed after HELLO; counts when the gateway is known
            return
        peer.services = _services(fields)
        peer.labels = _labels(fields)
        weight = fields.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise HandshakeError(ErrorCode.PROTOCOL_ERROR, "the weight in INFO is not a number from 0")
        peer.weight = weight
        peer.informed = True
        self._owner.link_info(self, fields)

    def open(
        self, service: str, head: bytes, *, fin: bool, body: bytes = b"", interactive: bool = True
    ) -> TunnelStream:
        """A new stream. Raises StreamRefused; then nothing was sent."""
        stream = TunnelStream(self._loop, finished=fin)
        stream.attach(self.session.open(service, head, stream, interactive=interactive, fin=fin, body=body))
        return stream

    def connection_lost(self, exc: Exception | None) -> None:
        if self._check is not None:
            self._check.cancel()
        super().connection_lost(exc)


Serve = Callable[[TunnelStream, str, bytes], Coroutine[Any, Any, None]]
NewSession = Callable[..., Session]


class GatewayLink(Link):
    """The gateway's end: a protocol factory's product for `create_connection`."""

    def __init__(
        self,
        owner: Owner,
        *,
        budget: Budget,
        hello: Hello,
        host: str,
        site: str,
        name: str,
        key: Ed25519PrivateKey,
        serve: Serve | None = None,
        new_session: NewSession | None = None,
        edge_name: str | None = None,
    ) -> None:
        """`host`: authority for the Host field. `edge_name`: who the edge must say it is; None: whoever the certificate
        says. One of: `serve(stream, service, head)` is one stream's work, done by a task; or `new_session(handler,
        budget, **limits)` makes a session that serves its streams itself, without one."""
        super().__init__(owner, edge=False, budget=budget, hello=hello)
        self._host = host
        self._site = site
        self._name = name
        self._key = key
        self._serve = serve
        self._own_session = new_session
        self._edge_name = edge_name
        self._websocket_key = handshake.new_websocket_key()
        self._raw = True  # until the edge has agreed to the upgrade
        self._head = b""
        self.edge: str = ""
        """What the edge calls itself."""
        self.replace = False
        """The edge asked to be left: bring up another tunnel first."""
        self.edges: tuple[str, ...] = ()
        """Other edges that this one named."""
        self.spread = 0.0
        """Seconds over which the edge wants its gateways' next connections to be spread."""

    def _who(self) -> str:
        return f"edge {self._host}"

    def _new_session(self, handler: SessionHandler, budget: Budget, **limits: Any) -> Session:
        if self._own_session is not None:
            return self._own_session(handler, budget, **limits)
        return super()._new_session(handler, budget, **limits)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        cast(asyncio.Transport, transport).write(handshake.upgrade_request(self._host, self._websocket_key))

    def _received_raw(self, data: bytes) -> None:
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            if len(self._head) > handshake.MAX_UPGRADE_HEAD or not b"HTTP/1.1 ".startswith(self._head[:9]):
                self._refused(0, "the answer is not HTTP")
            return
        head, rest = self._head[: end + 4], self._head[end + 4 :]
        self._head = b""
        try:
            handshake.check_upgrade_response(head, self._websocket_key)
        except UpgradeRefused as exc:
            self._refused(exc.status, exc.reason)
            return
        self._raw = False
        self.session.send_hello(self._hello.encode())
        if rest:
            self._received(bytearray(rest), len(rest))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._raw and self.end is None and not self._head and exc is None:
            self._refused(0, "the connection was closed without an answer")
        super().connection_lost(exc)

    def _refused(self, status: int, reason: str) -> None:
        self.abort_with(End(ErrorCode.UNREACHABLE, reason, by_peer=True, status=status))

    def _end(self, end: End, close_code: int | None = None) -> None:
        if self._raw:
            self.abort_with(end)
        else:
            super()._end(end, close_code)

    def _greeted(self, hello: Hello) -> None:
        self.edge = hello.edge
        if self._edge_name is not None and hello.edge != self._edge_name:
            reason = f"the edge calls itself {hello.edge!r}, but {self._edge_name!r} is expected"
            raise HandshakeError(ErrorCode.AUTH_FAILED, reason)
        proof = Proof.sign(
            self._key,
            site=self._site,
            name=self._name,
            certificate=peer_certificate_hash(self._transport),
            edge=hello,
            gateway=self._hello,
        )
        self.session.send_auth(proof.encode())

    def _authenticated(self, fields: Mapping[str, Any]) -> None:
        if fields.get("step") != "verdict" or self.ready:
            return
        verdict = Verdict.decode(fields)
        if verdict.ok:
            self._now_ready()
        else:
            self._end(
                End(ErrorCode.AUTH_FAILED, verdict.message or verdict.code, by_peer=True, verdict=verdict)
            )

    def _fail(self, code: ErrorCode, reason: str, *, close_code: int | None = None) -> None:
        # The agent logs changes of state; a line for every try would fill the disk of a gateway that is refused.
        log.debug("tunnel with %s ended: %s: %s", self._who(), ErrorCode(code).name, reason)
        self._end(End(ErrorCode(code), reason), close_code)

    def goaway_received(self, last_stream: int, code: int) -> None:
        super().goaway_received(last_stream, code)
        self.replace = True
        self._owner.link_info(self, {"drain": True})

    def _informed(self, fields: Mapping[str, Any]) -> None:
        drain = fields.get("drain", False)
        edges = fields.get("edges", [])
        spread = fields.get("spread", 0)
        if (
            not isinstance(drain, bool)
            or isinstance(spread, bool)
            or not isinstance(spread, int | float)
            or not 0 <= spread < float("inf")
            or not isinstance(edges, list)
            or not all(isinstance(edge, str) for edge in edges)
        ):
            raise HandshakeError(ErrorCode.PROTOCOL_ERROR, "INFO is malformed")
        self.edges = tuple(edges)
        self.spread = float(spread)
        self.replace = self.replace or drain
        self._owner.link_info(self, fields)

    def stream_opened(
        self, stream: Stream, service: str, interactive: bool, head: bytes, fin: bool
    ) -> TunnelStream | None:
        if self._serve is None:
            return None
        handler = TunnelStream(self._loop, stream, ended=fin)
        handler.serve(self._loop.create_task(self._serve(handler, service, head)))
        return handler


@contextlib.contextmanager
def _handshake() -> Iterator[None]:
    """The session ends the tunnel by a TunnelError that comes out of its callbacks."""
    try:
        yield
    except HandshakeError as exc:
        raise TunnelError(exc.code, exc.reason) from exc


def peer_certificate_hash(transport: asyncio.BaseTransport | None) -> bytes:
    """`tls-server-end-point` hash of the certificate at the other end; empty without TLS."""
    tls = transport.get_extra_info("ssl_object") if transport is not None else None
    der = tls.getpeercert(True) if tls is not None else None
    return handshake.certificate_hash(der) if der else b""


def _tune(transport: asyncio.Transport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # the connection may be gone already
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)


def _services(fields: Mapping[str, Any]) -> dict[str, bool]:
    services = fields.get("services", {})
    if not isinstance(services, dict):
        raise HandshakeError(ErrorCode.PROTOCOL_ERROR, '"services" in INFO is not an object')
    found = {}
    for name, state in services.items():
        if not isinstance(state, dict) or not isinstance(state.get("healthy", True), bool):
            raise HandshakeError(ErrorCode.PROTOCOL_ERROR, '"services" in INFO is malformed')
        found[name] = state.get("healthy", True)
    return found


def _labels(fields: Mapping[str, Any]) -> dict[str, str]:
    labels = fields.get("labels", {})
    if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
        raise HandshakeError(ErrorCode.PROTOCOL_ERROR, '"labels" in INFO is not an object of strings')
    return labels


__all__ = [
    "EdgeLink",
    "End",
    "GatewayLink",
    "Link",
    "PeerInfo",
    "StreamReset",
    "TunnelStream",
    "peer_certificate_hash",
]
