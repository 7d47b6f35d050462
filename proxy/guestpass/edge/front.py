"""What stands before both lanes: the Python half of the edge's connections with visitors.

The other half, `guestpass_speedups.relay`, cuts what arrives into requests with the strict scanner and serves most of
them itself. Here is what is rare, or slow anyway: requests for aiohttp, answers of our own to what is refused or has
failed, and what the fast lane asks about a grant before it knows it.

aiohttp never sees the connection. A handler of its server is given one request at a time over a `Shim`, a transport
that passes on what the handler writes. So a request of the fast lane can follow one of aiohttp's on the same connection
and the other way round, and nothing that the scanner refuses reaches aiohttp's more lenient parser. When an answer has
been written to its end, aiohttp tells its access log: `Answered`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from multidict import CIMultiDict

from guestpass import scope
from guestpass.config import Limits
from guestpass.edge import headers as h
from guestpass.edge import limits
from guestpass.edge.access_log import who
from guestpass.edge.grants import Grant, GrantTable
from guestpass.edge.metrics import DURATIONS
from guestpass.edge.relay import STATUS_OF_RESET
from guestpass.edge.static import NOTHING
from guestpass.loop import abort_now, acknowledged, resume_reading, unsent, waiting
from guestpass.model import SessionKind
from guestpass.tokens import BEARER_PREFIX, digest
from guestpass_speedups.relay import CUT_BEYOND, Client, Connection, Entry, Lane

if TYPE_CHECKING:
    from guestpass.edge.admission import Admission
    from guestpass.edge.assertion import Signer
    from guestpass.edge.origins import Origins
    from guestpass.edge.pages import Pages
    from guestpass.edge.tunnels import Tunnels
    from guestpass_speedups.session import Session

log = logging.getLogger("guestpass.edge.front")

# An aiohttp handler waits so long for its next request: as good as for ever. Idle connections are the front's.
HANDLER_KEEPALIVE = 86_400.0

UPGRADED = b"HTTP/1.1 101 "

Accept = Callable[[asyncio.Transport, bytes, bytes], None]
HandlerFactory = Callable[[], asyncio.BaseProtocol]


class Shim(asyncio.Transport):
    """What an aiohttp handler takes for its connection. Survives it: afterwards nothing is written."""

    def __init__(self, front: Front, transport: asyncio.Transport) -> None:
        super().__init__()
        self._front: Front | None = front
        self._transport = transport
        self.awaits_upgrade = False
        """The request asked for one; a 101 makes the rest opaque."""
        self.told = 0
        """The status by which the front answered in the handler's place."""
        self.refusal: Exception | None = None
        """What admission said to the request's cookie, if it was asked already."""

    def detach(self) -> None:
        """The handler's connection is over."""
        self._front = None

    @property
    def front(self) -> Front | None:
        return self._front

    def write(self, data: Any) -> None:
        front = self._front
        if front is None:
            return
        front.lane.check()
        if not front.slow or self._transport.is_closing():
            return
        front.wrote = True
        front.slow_moved()
        self._transport.write(bytes(data))
        if self.awaits_upgrade and bytes(data[: len(UPGRADED)]) == UPGRADED:
            self.awaits_upgrade = False
            front.slow_upgraded()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        raise NotImplementedError("an answer never half-closes the connection")

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self._front is None or self._transport.is_closing()

    def close(self) -> None:
        front, self._front = self._front, None
        if front is not None:
            front.handler_closed()

    def abort(self) -> None:
        front, self._front = self._front, None
        if front is not None:
            front.cut()

    def is_reading(self) -> bool:
        return self._front is not None and not self._front.handler_paused

    def pause_reading(self) -> None:
        if self._front is not None:
            self._front.handler_paused = True
            self._front.slow_reading(False)

    def resume_reading(self) -> None:
        if self._front is not None:
            self._front.handler_paused = False
            self._front.slow_reading(True)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._transport.get_protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        raise NotImplementedError("the front stays the protocol of its connection")

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._transport.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """The transport's limits are the front's: both lanes share them."""


class Answered(AbstractAccessLogger):
    """Tells the front that aiohttp has written an answer to its end. Logs nothing."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        transport = request.transport
        if isinstance(transport, Shim) and transport.front is not None and response.keep_alive:
            transport.awaits_upgrade = False
            transport.front.slow_done()

    @property
    def enabled(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Asked:
    """Of a request that never became one of aiohttp's: enough to choose the kind of an answer."""

    method: str
    headers: CIMultiDict[str]

    @classmethod
    def of(cls, head: bytes) -> Asked:
        """`head` has passed the scanner."""
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        return cls(
            first.partition(" ")[0], CIMultiDict((name, value.strip(" \t")) for name, _, value in pairs)
        )


class Front(Connection, asyncio.BufferedProtocol):
    """The protocol of an accepted connection, from its first byte to its last (or to its tunnel handshake)."""

    __slots__ = (
        *("_handler", "_handler_writes", "_refusal", "_shim", "_spoken_for"),
        *("handler_paused", "house", "wrote"),
    )

    def __init__(self, house: House) -> None:
        super().__init__(house.lane)
        self.house = house
        self._spoken_for = ""
        self._handler: Any = None
        self._shim: Shim | None = None
        self._refusal: Exception | None = None
        self._handler_writes = True  # what the handler was told; pause and resume must alternate
        self.handler_paused = False
        self.wrote = False
        """aiohttp has written something of its answer."""

    # ── tunnels ──────────────────────────────────────────────────────────────────────────────────────────────────

    def tunnel(self, transport: asyncio.Transport, head: bytes, rest: bytes) -> None:
        self.house.tunnel(transport, head, rest)

    # ── aiohttp ──────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, head: bytes, upgrade: bool) -> None:
        """One request for aiohttp. Its body follows by `feed`; what comes behind an upgrade is held until the 101."""
        shim = self._shim
        if shim is None:
            shim = self._shim = Shim(self, self.transport)
            self._handler = self.house.handler()
            self._handler_writes = True
            self._handler.connection_made(shim)
        shim.awaits_upgrade = upgrade
        shim.refusal = self._refusal
        self.wrote = False
        if not self._may_begin(head):
            return
        self.writing(not self.paused)
        self._handler.data_received(head)

    def feed(self, data: bytes) -> None:
        if self._handler is not None:
            self._handler.data_received(data)

    def writing(self, possible: bool) -> None:
        if self._handler is not None and possible != self._handler_writes:
            self._handler_writes = possible
            if possible:
                self._handler.resume_writing()
            else:
                self._handler.pause_writing()

    def lost(self, exc: Exception | None) -> None:
        self._drop_handler(exc)

    def _drop_handler(self, exc: Exception | None, told: int = 0) -> None:
        handler, self._handler = self._handler, None
        shim, self._shim = self._shim, None
        if self.handler_paused:
            self.handler_paused = False
            self.slow_reading(True)
        if shim is not None:
            shim.told = told
            shim.detach()
        if handler is not None:
            handler.connection_lost(exc)

    def handler_closed(self) -> None:
        """The handler has closed its connection: after its answer, because it idled, or because the edge stops."""
        was_slow = self.slow
        # Not from within the handler, which is still at work.
        handler, self._handler, self._shim = self._handler, None, None
        if handler is not None:
            asyncio.get_running_loop().call_soon(handler.connection_lost, None)
        if self.handler_paused:
            self.handler_paused = False
            self.slow_reading(True)
        if was_slow:
            self.slow_finished()

    def bad_body(self, status: int, reason: str) -> None:
        """The body of a request that is with aiohttp is malformed."""
        wrote = self.wrote
        self._drop_handler(None, 0 if wrote else status)
        if wrote:
            self.cut()
        else:
            self.refused(status, reason)

    # ── answers of our own ───────────────────────────────────────────────────────────────────────────────────────

    def refused(self, status: int, reason: str) -> None:
        """The scanner refused a request: what it means is anybody's guess, so is where the next one begins."""
        error_id = secrets.token_hex(4)
        log.info("error %s: %d: %s", error_id, status, reason)
        self.house.refused(status)
        self.respond(self._page(None, status, error_id, message=reason), False)

    def limited(self, limit: str, head: bytes | None) -> int:
        """A limit was reached. None: the connection is cut. Else there is an answer: to the request with this `head`,
        or, where that is empty or its end cannot be known, before the connection is closed. Returns its status."""
        error_id = self.noted(limit)
        told = limits.TABLE[limit]
        if self.slow and (head is None or not head):
            head = None if self.wrote else head
            self._drop_handler(None, 0 if head is None else told.status)
        if head is None or not told.status:
            self.cut_now()
            return told.status
        if not head:
            self.house.refused(told.status)
        asked = Asked.of(head) if head else None
        page = self._page(
            asked,
            told.status,
            error_id,
            message=limits.Refusals.message(limit),
            retry_after=limits.RETRY_AFTER if told.retry else None,
        )
        self.respond(page, asked is not None and self.may_keep_alive)
        return told.status

    def noted(self, limit: str) -> str:
        """Counts and logs it; the id of the error."""
        return self.house.refusals.note(limit, self.address)

    def failed(self, head: bytes, code: int, grant: Grant) -> None:
        """The stream was reset before an answer came."""
        self._problem(head, STATUS_OF_RESET.get(code, 502), grant, f"the stream was reset with code {code}")

    def bad_answer(self, head: bytes, reason: str, grant: Grant) -> None:
        """What the gateway sent is not an answer."""
        self._problem(head, 502, grant, reason)

    def _problem(self, head: bytes, status: int, grant: Grant, what: str) -> None:
        error_id = secrets.token_hex(4)
        log.warning(
            "error %s: %d: %s/%s/%s: %s", error_id, status, grant.site, grant.gateway, grant.service, what
        )
        self.respond(self._page(Asked.of(head), status, error_id), self.may_keep_alive)

    def _page(
        self,
        asked: Asked | None,
        status: int,
        error_id: str,
        message: str | None = None,
        retry_after: int | None = None,
    ) -> bytes:
        page = self.house.pages.error(
            status,
            error_id=error_id,
            request=asked,
            message=message,
            retry_after=retry_after,
        )
        keep_alive = asked is not None and self.may_keep_alive
        body = cast(bytes, page.body)
        lines = [f"HTTP/1.1 {status} {page.reason}"]
        lines += [f"{name}: {value}" for name, value in page.headers.items() if name != "Content-Length"]
        lines += ["Server: Guestpass", f"Date: {formatdate(usegmt=True)}", f"Content-Length: {len(body)}"]
        if not keep_alive:
            lines.append("Connection: close")
        elif not self.http11:
            lines.append("Connection: keep-alive")
        head = "\r\n".join((*lines, "", "")).encode("latin-1")
        return head if self.to_head else head + body

    # ── who ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def answered(self, refusal: Exception | None) -> None:
        """Admission has, to the cookie of the request that waits. None: there may be a grant; else aiohttp says no."""
        self._refusal = refusal
        try:
            self.admitted()
        finally:
            self._refusal = None

    @property
    def _peer(self) -> str:
        name = self.transport.get_extra_info("peername")
        return str(name[0]) if isinstance(name, tuple) and name else ""

    def arrived(self) -> Client | None:
        """Whose connection this is; of a trusted proxy's its requests tell."""
        peer = self._peer
        return self.house.client(peer) if peer else None

    @property
    def address(self) -> str:
        """Of the client, behind trusted proxies the one that was told last."""
        return self._spoken_for or self._peer

    def speaker(self) -> Client | None:
        """Whose request a trusted proxy passes on; None where that is its own."""
        return self.house.client(self._spoken_for)

    def _may_begin(self, head: bytes) -> bool:
        """Behind a trusted proxy: whether the client that it speaks for may have one more request under way."""
        if not self.house.trusted_proxies or not self.trusts():
            return True
        told = [
            (b"x-forwarded-for", v.encode("latin-1"))
            for v in Asked.of(head).headers.getall("X-Forwarded-For", ())
        ]
        self._spoken_for = h.client_address(self._peer, told, self.house.trusted_proxies)
        client = self.speaker()
        if client is None or self.counts_for(client):
            return True
        self.limited("connections_per_client", head)
        return False

    def trusts(self) -> bool:
        return h.within(self._peer, self.house.trusted_proxies)

    def _address(self, speaks_for: bytes | None) -> str:
        told = () if speaks_for is None else ((b"x-forwarded-for", speaks_for),)
        return h.client_address(self._peer, told, self.house.trusted_proxies)

    def within(self, grant: Grant, speaks_for: bytes | None) -> bool:
        """Whether the filters admit the client's address."""
        return grant.static is None or grant.static.elsewhere(self._address(speaks_for)) is None

    def forwarding(self, speaks_for: bytes | None) -> tuple[bytes, bytes]:
        address = self._address(speaks_for)
        scheme = "https" if self.secure else self.house.scheme if self.trusts() else "http"
        self._spoken_for = address
        before, between, _ = h.forwarded_fields(address, scheme, b"\0").split(b"\0")
        return before, between


class House:
    """What all fronts of one listener, or of all listeners for visitors, share."""

    def __init__(
        self,
        *,
        lane: Lane,
        handler: HandlerFactory,
        tunnel: Accept,
        pages: Pages,
        refused: Callable[[int], None],
        trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = (),
        scheme: str = "http",
        refusals: limits.Refusals | None = None,
    ) -> None:
        """`handler` makes aiohttp's protocols; their runner has `Answered` as its access log. `tunnel` takes over a
        connection whose first request is a tunnel's. `scheme`: the public one, spoken to proxies that are trusted."""
        self.lane = lane
        self.handler = handler
        self.tunnel = tunnel
        self.pages = pages
        self.refused = refused
        self.trusted_proxies = trusted_proxies
        self.scheme = scheme
        self.refusals = refusals if refusals is not None else limits.Refusals(Limits())

    def front(self) -> Front:
        return Front(self)

    def client(self, address: str) -> Client | None:
        """Who is counted for an address; None: a proxy, which speaks for others."""
        if self.trusted_proxies and h.within(address, self.trusted_proxies):
            return None
        return self.lane.client(limits.client_of(address))

    def admit(self, address: str) -> Callable[[], None] | None:
        """Whether an address may begin a TLS handshake, which counts like what it has open; None: not. Else to be
        called when the handshake is over."""
        client = self.client(address)
        if client is None:
            return lambda: None
        most = self.refusals.limits.connections_per_client
        if client.starting >= most or client.open + client.starting >= CUT_BEYOND * most:
            self.refusals.note("connections_per_client", address)
            return None
        client.starting += 1

        def over() -> None:
            client.starting -= 1

        return over


class FastLane(Lane):
    """The fast lane's questions about grants, which are few: what it is told is remembered by its `Entry`."""

    def __init__(
        self,
        *,
        grants: GrantTable,
        admission: Admission,
        tunnels: Tunnels,
        signer: Signer,
        origins: Origins,
        fast: bool,
        limits: Limits,
    ) -> None:
        super().__init__(
            cookies=grants.cookies,
            tokens=grants.tokens,
            bearer=BEARER_PREFIX.encode("ascii"),
            statuses=STATUS_OF_RESET,
            buckets=DURATIONS,
            abort_now=abort_now,
            unsent=unsent,
            resume_reading=resume_reading,
            acknowledged=acknowledged,
            waiting=waiting,
            limits=limits,
            fast=fast,
        )
        self._grants = grants
        self._admission = admission
        self._tunnels = tunnels
        self._signer = signer
        self._origins = origins
        tunnels.on_change.add(self.changed)

    def admit(self, front: Front, host: str, secret: str) -> str | None:
        """Have admission make the grant of a cookie that the lane does not know; `front.answered` is called when it is
        there, or refused. Returns the share's id; None: nothing was asked, the relay sees what this is."""
        share_id = self._origins.share_of(host)
        if share_id is None or self._grants.get(SessionKind.COOKIE, digest(secret), share_id) is not None:
            return None
        task = self._admission.restoring(share_id, SessionKind.COOKIE, secret)
        task.add_done_callback(partial(self._answered, front, secret))
        return share_id

    def _answered(self, front: Front, secret: str, task: asyncio.Task[Grant]) -> None:
        refusal = None if task.cancelled() else task.exception()
        if not task.cancelled() and refusal is None:
            self.learn(task.result(), secret)  # if it is still in force
        front.answered(refusal if isinstance(refusal, Exception) else None)

    def learn(self, grant: Grant, secret: str) -> None:
        """The grant was found by this cookie or token: the next time without a digest."""
        if not self.fast or grant.entry is not None or not secret.isascii():
            return
        origin = self._origins.share_origin(grant.share.id)
        static = grant.static or NOTHING
        entry = Entry(
            grant,
            secret.encode("ascii"),
            origin.partition("://")[2],
            origin,
            self.service(grant.service),
            grant.kind is SessionKind.COOKIE,
            bool(grant.share.scope or static.scopes),
            static.removed,
            static.added,
            static.buckets,
            bool(static.networks),
        )
        self._grants.index(grant, entry)

    def resolve(self, grant: Grant) -> tuple[Session, ...]:
        if grant.gateway is None:
            return ()
        return self._tunnels.sessions(grant.site, grant.gateway, grant.service)

    def admits(self, grant: Grant, method: str, path: str) -> bool:
        if grant.share.scope and not scope.admits(grant.share.scope, method, path):
            return False
        return grant.static is None or grant.static.outside(method, path) is None

    def others(self, grant: Grant) -> bool:
        """Whether another gateway than the session's reaches the service."""
        return any(c.name != grant.gateway for c in self._tunnels.candidates(grant.site, grant.service))

    def who(self, grant: Grant) -> bytes:
        return who(grant.share.id, grant)

    def stranger(self, share_id: str) -> bytes:
        """As `who`, while nobody is admitted."""
        return who(share_id, None)

    def identity(self, grant: Grant, now: float) -> tuple[bytes, float]:
        return self._signer.fields(grant, now), grant.headers_until

    def used(self, grant: Grant, now: float) -> None:
        self._grants.used(grant, now)


def bare_lane(limits: Limits) -> Lane:
    """For listeners without shares: every request is aiohttp's."""
    return Lane(
        cookies={},
        tokens={},
        bearer=BEARER_PREFIX.encode("ascii"),
        statuses=STATUS_OF_RESET,
        buckets=DURATIONS,
        abort_now=abort_now,
        unsent=unsent,
        resume_reading=resume_reading,
        acknowledged=acknowledged,
        waiting=waiting,
        limits=limits,
        fast=False,
    )
