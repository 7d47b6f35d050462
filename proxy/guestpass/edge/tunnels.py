"""The edge's tunnels: who is connected, and streams to them.

A gateway is registered by its first tunnel that proves its key, and gone with its last. Registrations are fenced by
(site, name, key, epoch): tunnels of one epoch live together, a newer epoch (the gateway was restarted) evicts the older
one's at once, so nobody finds their own name "in use"; an older one is refused while the newer is connected, so that
two processes with one key do not throw each other out for ever.

Where several workers serve the edge, `neighbours` is what the others hold (see `guestpass.edge.peers`): answers are
about all of them, and a gateway without a tunnel here is reached by a link to a worker that has one.

Nothing here waits but the check of a key; opening a stream is a method call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guestpass.edge.peers import Held, Neighbours, status_of
from guestpass.errors import NoGateway
from guestpass.model import Candidate, Event
from guestpass.mux import handshake
from guestpass.mux.handshake import Hello, Proof, UpgradeRefused, Verdict
from guestpass.mux.link import EdgeLink, End
from guestpass.mux.stream import TunnelStream
from guestpass_speedups.session import Budget, ErrorCode, Session, StreamRefused

log = logging.getLogger("guestpass.edge.tunnels")

# Connections that have not proven a key yet, at once: a thousand gateways that come back after a restart are through in
# seconds, and strangers hold no more than this for no longer than the handshake's 10 s.
MAX_UNPROVEN = 512
# And from one address, so that one stranger cannot hold them all. Gateways behind one address have a few tunnels each.
MAX_UNPROVEN_PER_ADDRESS = 64
# What they are told to wait, in seconds; a gateway has its own back-off.
RETRY_AFTER = 1

# When an edge goes away, all of its gateways want to come back in the same moment. Those of a large edge are told over
# how many seconds to spread: at this many tunnels a second they are through without a queue, and none waits longer than
# SPREAD_MOST. Below SPREAD_LEAST (50 tunnels) nothing is said and all come back at once. They are told anew when the
# number has changed by a quarter.
SPREAD_RATE = 50
SPREAD_LEAST = 1.0
SPREAD_MOST = 20.0
SPREAD_CHANGE = 1.25

# Of several workers, one may hear that a tunnel has gone before it hears of the one that has taken its place.
NEWS_SECONDS = 0.5

# How often "last seen" of a connected gateway is written down, seconds.
TOUCH_INTERVAL = 60.0


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    """A connected gateway, for the owner and for metrics."""

    site: str
    name: str
    tunnels: int
    rtt: float | None
    """Seconds; the best of its tunnels."""
    services: Mapping[str, bool]
    """Service → whether the gateway reaches it."""
    since: float
    streams: int
    software: str
    remote: str
    """Address that its first tunnel comes from."""


@dataclass(slots=True, eq=False)
class _Registered:
    site: str
    name: str
    key: bytes
    epoch: int
    since: float
    links: list[EdgeLink] = field(default_factory=list)
    services: Mapping[str, bool] = field(default_factory=dict)
    weight: float = 1
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def streams(self) -> int:
        return sum(link.session.streams for link in self.links)

    @property
    def rtt(self) -> float | None:
        return min((link.session.rtt for link in self.links if link.session.rtt is not None), default=None)

    def usable(self) -> list[EdgeLink]:
        """Links that take new streams, best first."""
        links = [link for link in self.links if not link.draining]
        if len(links) > 1:
            links.sort(key=lambda link: (link.asked_to_leave, link.session.retiring, link.session.streams))
        return links

    def held(self) -> Held:
        usable = self.usable()
        peer = self.links[0].peer
        return Held(
            site=self.site,
            name=self.name,
            key=self.key,
            epoch=self.epoch,
            since=self.since,
            tunnels=len(self.links),
            usable=bool(usable),
            leaving=not usable or usable[0].asked_to_leave,
            streams=self.streams,
            rtt=self.rtt,
            services=dict(self.services),
            weight=self.weight,
            labels=dict(self.labels),
            software=peer.software if peer else "",
            remote=self.links[0].remote,
        )


class Tunnels:
    """All tunnels of this edge worker. Implements `EdgeOwner` for its links."""

    def __init__(
        self,
        *,
        edge_name: str,
        find_key: Callable[[str, str, bytes], Awaitable[bool]],
        budget: Budget,
        certificate_hash: Callable[[asyncio.Transport], bytes | None],
        on_event: Callable[[Event], None],
        touched: Callable[[str, str], None],
        other_edges: Sequence[str] = (),
        neighbours: Neighbours | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        """`find_key(site, name, key)`: whether that key is enrolled under that name. `certificate_hash(transport)`:
        what the gateway must have seen at the other end (`handshake.certificate_hash`), b"" without TLS, None to switch
        the binding off. `touched(site, name)` is called when a gateway connects, and every minute while it is.
        `guard` is called before what a tunnel brings is looked at."""
        self.on_change: set[Callable[[], None]] = set()
        """Called when a tunnel came or went, and when what a gateway reaches has changed."""
        self._edge_name = edge_name
        self._find_key = find_key
        self._budget = budget
        self._certificate_hash = certificate_hash
        self._on_event = on_event
        self._touched = touched
        self._other_edges = list(other_edges)
        self._neighbours = neighbours
        self._guard = guard
        if neighbours is not None:
            neighbours.on_change = self._neighbours_changed
        self._epoch = time.time_ns()
        self._sites: dict[str, dict[str, _Registered]] = {}
        self._unproven: dict[EdgeLink, str] = {}
        self._unproven_by_address: Counter[str] = Counter()
        self._judged: dict[EdgeLink, tuple[str, str]] = {}
        self._links: set[EdgeLink] = set()
        self._spread = 0.0
        self._ended: set[asyncio.Future[None]] = set()
        self._bytes_received = 0
        self._bytes_sent = 0
        self._touch_timer: asyncio.TimerHandle | None = None
        self._closing = False

    # ── accepting ────────────────────────────────────────────────────────────────────────────────────────────────

    def accept(self, transport: asyncio.Transport, request_head: bytes, rest: bytes) -> None:
        """Take over a connection whose first request is for a tunnel. `rest`: bytes after the head. A handshake that is
        not one is answered (400, 426, 503) and the connection closed."""
        address = _address(transport)
        try:
            key = handshake.check_upgrade_request(request_head)
        except UpgradeRefused as exc:
            self._refuse(transport, exc.status, exc.reason)
            return
        if self._closing:
            self._refuse(transport, 503, "this edge is going down")
            return
        if (
            len(self._unproven) >= MAX_UNPROVEN
            or self._unproven_by_address[address] >= MAX_UNPROVEN_PER_ADDRESS
        ):
            self._refuse(transport, 503, "too many gateways are connecting")
            return
        link = EdgeLink(
            self,
            budget=self._budget,
            hello=Hello(role="edge", epoch=self._epoch, edge=self._edge_name),
            websocket_key=key,
            certificate=self._certificate_hash(transport),
        )
        link.guard = self._guard
        self._links.add(link)
        self._unproven[link] = address
        self._unproven_by_address[address] += 1
        transport.set_protocol(link)
        link.connection_made(transport)
        if not transport.is_reading():
            transport.resume_reading()
        link.feed(rest)

    @staticmethod
    def _refuse(transport: asyncio.Transport, status: int, reason: str) -> None:
        log.info("a tunnel from %s was refused: %s", _address(transport), reason)
        phrase = {400: "Bad Request", 426: "Upgrade Required", 503: "Service Unavailable"}[status]
        extra = {
            426: "Upgrade: websocket\r\nConnection: Upgrade, close\r\nSec-WebSocket-Version: 13\r\n",
            503: f"Connection: close\r\nRetry-After: {RETRY_AFTER}\r\n",
        }.get(status, "Connection: close\r\n")
        body = reason.encode("utf-8") + b"\n"
        transport.set_protocol(_Ignored())
        transport.write(
            f"HTTP/1.1 {status} {phrase}\r\n{extra}Content-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode("ascii")
            + body
        )
        transport.close()

    def _proven(self, link: EdgeLink) -> None:
        address = self._unproven.pop(link, None)
        if address is not None:
            self._unproven_by_address[address] -= 1
            if not self._unproven_by_address[address]:
                del self._unproven_by_address[address]

    # ── what links tell ──────────────────────────────────────────────────────────────────────────────────────────

    async def authenticate(self, link: EdgeLink, proof: Proof) -> Verdict:
        """The proof holds: is the key enrolled, and is this the newest process that has it?"""
        self._judged[link] = (proof.site, proof.name)
        try:
            known = await self._find_key(proof.site, proof.name, proof.key)
        finally:
            self._judged.pop(link, None)
        if not known:
            return Verdict(
                False, "unknown_key", f"This key is not enrolled as {proof.name} of site {proof.site}."
            )
        current = self._sites.get(proof.site, {}).get(proof.name)
        rivals = [(held.key, held.epoch) for held in self._elsewhere(proof.site, proof.name)]
        if current is not None:
            rivals.append((current.key, current.epoch))
        if any(key == proof.key and epoch > link.epoch for key, epoch in rivals):
            return Verdict(
                False, "stale_epoch", "A process that was started later is connected with this key."
            )
        return Verdict(True)

    def link_ready(self, link: EdgeLink) -> None:
        self._proven(link)
        peer = link.peer
        assert peer is not None
        gateways = self._sites.setdefault(peer.site, {})
        current = gateways.get(peer.name)
        if current is not None and (current.key != peer.public_key or current.epoch != peer.epoch):
            # Out of the table first, so that its end does not report the gateway as gone.
            del gateways[peer.name]
            for old in current.links[:]:
                old.finish(ErrorCode.REPLACED, "a newer process of this gateway has connected")
            current = None
            replaced = True
        else:
            replaced = False
        new = current is None
        if current is None:
            current = _Registered(peer.site, peer.name, peer.public_key, peer.epoch, time.time())
            gateways[peer.name] = current
        current.links.append(link)
        self._changed()
        self._take_info(current, link)
        self._say_spread(link)
        if new:
            log.info("gateway %s/%s connected from %s", peer.site, peer.name, link.remote)
            self._emit("gateway.connected", peer.site, peer.name, replaced=replaced, software=peer.software)
            self._touched(peer.site, peer.name)
            if self._touch_timer is None:
                self._touch_timer = asyncio.get_running_loop().call_later(TOUCH_INTERVAL, self._touch_all)

    def _say_spread(self, link: EdgeLink) -> None:
        """Tell a new tunnel, and all of them if their number has become another."""
        elsewhere = self._neighbours.tunnels if self._neighbours is not None else 0
        spread = min((len(self._links) + elsewhere) / SPREAD_RATE, SPREAD_MOST)
        if spread < SPREAD_LEAST:
            spread = 0.0
        told = self._spread
        if spread != told and not told / SPREAD_CHANGE < spread < told * SPREAD_CHANGE:
            self._spread = spread
            for other in self._links:
                if other.ready and not other.asked_to_leave:
                    other.send_info(self._info())
        elif self._spread:
            link.send_info(self._info())

    def _info(self, *, drain: bool = False) -> dict[str, Any]:
        return {"edges": self._other_edges, "drain": drain, "spread": round(self._spread, 1)}

    def link_info(self, link: EdgeLink, fields: Mapping[str, Any]) -> None:
        registered = self._registered(link)
        if registered is not None:
            self._take_info(registered, link)

    def _take_info(self, registered: _Registered, link: EdgeLink) -> None:
        peer = link.peer
        if peer is None or not peer.informed:
            return
        for service, healthy in peer.services.items():
            before = registered.services.get(service)
            if before is not None and before != healthy:
                self._emit(
                    "gateway.service", registered.site, registered.name, service=service, healthy=healthy
                )
        registered.services = peer.services
        registered.weight = peer.weight
        registered.labels = peer.labels
        self._changed()

    def link_ended(self, link: EdgeLink, end: End) -> None:
        self._proven(link)
        self._links.discard(link)
        if not link.closed.done():
            self._ended.add(link.closed)
            link.closed.add_done_callback(self._ended.discard)
        self._bytes_received += link.bytes_received
        self._bytes_sent += link.bytes_sent
        registered = self._registered(link)
        if registered is None:
            if not link.ready and link.goaway is not None:
                log.info(
                    "the gateway at %s gave up before it was let in: %s (%s)",
                    link.remote,
                    end.reason,
                    link.goaway.name,
                )
            return
        registered.links.remove(link)
        self._changed()
        if registered.links:
            return
        gateways = self._sites[registered.site]
        del gateways[registered.name]
        if not gateways:
            del self._sites[registered.site]
        log.info(
            "gateway %s/%s is gone: %s (%s)",
            registered.site,
            registered.name,
            end.reason,
            end.code.name,
        )
        self._emit("gateway.disconnected", registered.site, registered.name, reason=end.code.name.lower())
        self._touched(registered.site, registered.name)

    def _changed(self) -> None:
        for callback in tuple(self.on_change):
            callback()

    def _registered(self, link: EdgeLink) -> _Registered | None:
        peer = link.peer
        if peer is None:
            return None
        registered = self._sites.get(peer.site, {}).get(peer.name)
        return registered if registered is not None and link in registered.links else None

    def _emit(self, kind: str, site: str, name: str, **detail: str | int | float | bool | None) -> None:
        self._on_event(Event(kind, time.time(), actor=f"{site}/{name}", detail=detail))

    def _touch_all(self) -> None:
        self._touch_timer = None
        for gateways in self._sites.values():
            for registered in gateways.values():
                self._touched(registered.site, registered.name)
        if self._sites and not self._closing:
            self._touch_timer = asyncio.get_running_loop().call_later(TOUCH_INTERVAL, self._touch_all)

    # ── what the edge asks ───────────────────────────────────────────────────────────────────────────────────────

    def candidates(self, site: str, service: str, *, unwell: bool = False) -> list[Candidate]:
        """Connected gateways of the site that reach the service and take new streams; with `unwell`, also those that
        offer the service and do not reach it now."""
        found = []
        for name in self._names(site):
            registered = self._sites.get(site, {}).get(name)
            holders: list[_Registered | Held] = [
                *([registered] if registered is not None and registered.usable() else []),
                *(held for held in self._elsewhere(site, name) if held.usable),
            ]
            states = [one.services[service] for one in holders if service in one.services]
            if not any(states) and not (unwell and states):
                continue
            rtts = [one.rtt for one in holders if one.rtt is not None]
            found.append(
                Candidate(
                    site=site,
                    name=name,
                    weight=round(holders[0].weight),
                    labels=holders[0].labels,
                    streams=sum(one.streams for one in holders),
                    rtt=min(rtts, default=None),
                    healthy=any(states),
                )
            )
        return found

    def _names(self, site: str) -> list[str]:
        here = self._sites.get(site, {})
        if self._neighbours is None:
            return list(here)
        return list(dict.fromkeys((*here, *self._neighbours.names(site))))

    def _elsewhere(self, site: str, name: str) -> Sequence[Held]:
        return () if self._neighbours is None else self._neighbours.of(site, name)

    def is_connected(self, site: str, name: str) -> bool:
        """Whether a tunnel to the gateway takes new streams."""
        registered = self._sites.get(site, {}).get(name)
        if registered is not None and any(not link.draining for link in registered.links):
            return True
        return self._neighbours is not None and self._neighbours.usable(site, name)

    def sessions(self, site: str, name: str, service: str) -> tuple[Session, ...]:
        """Sessions of the gateway's tunnels, if it reaches the service. Those that drain are among them. Without one
        here, the session of a link to another worker."""
        registered = self._sites.get(site, {}).get(name)
        if registered is not None and registered.services.get(service) and registered.usable():
            return tuple(link.session for link in registered.links)
        if self._neighbours is not None and any(
            held.usable and held.services.get(service) for held in self._neighbours.of(site, name)
        ):
            link = self._neighbours.link(site, name)
            if link is not None:
                return (link.session,)
        if registered is None or not registered.services.get(service):
            return ()
        return tuple(link.session for link in registered.links)

    def open(
        self, site: str, gateway: str, service: str, head: bytes, *, fin: bool, body: bytes = b""
    ) -> TunnelStream:
        """A stream on the least loaded tunnel of the gateway. Raises NoGateway, StreamRefused."""
        registered = self._sites.get(site, {}).get(gateway)
        refused: StreamRefused | None = None
        for link in registered.usable() if registered is not None else ():
            if link.session.retiring:
                self._ask_to_leave(link)
            try:
                return link.open(service, head, fin=fin, body=body)
            except StreamRefused as exc:
                refused = exc
        peer = self._neighbours.link(site, gateway) if self._neighbours is not None else None
        if peer is not None:
            return peer.open(service, head, fin=fin, body=body)
        if refused is None:
            raise NoGateway(f"gateway {gateway} of site {site} is not connected")
        raise refused

    def _ask_to_leave(self, link: EdgeLink) -> None:
        if not link.asked_to_leave:
            link.asked_to_leave = True
            link.send_info(self._info(drain=True))

    def status(self) -> list[GatewayStatus]:
        """Every connected gateway."""
        holders: dict[tuple[str, str], list[Held]] = {(held.site, held.name): [held] for held in self.held()}
        if self._neighbours is not None:
            for site, name in self._neighbours.all:
                holders.setdefault((site, name), []).extend(self._neighbours.of(site, name))
        return [GatewayStatus(**status_of(held)) for held in holders.values()]

    # ── among several workers ────────────────────────────────────────────────────────────────────────────────────

    def held(self) -> list[Held]:
        """What this worker holds itself."""
        return [registered.held() for gateways in self._sites.values() for registered in gateways.values()]

    def ways(self, site: str, name: str) -> list[Session]:
        """Sessions of this worker's own tunnels to the gateway that take streams, best first."""
        registered = self._sites.get(site, {}).get(name)
        return [] if registered is None else [link.session for link in registered.usable()]

    def held_elsewhere(self) -> bool:
        """Whether other workers have tunnels, which are to stay, to every gateway that has one here."""
        return all(
            any(held.usable and not held.leaving for held in self._elsewhere(site, name))
            for site, gateways in self._sites.items()
            for name in gateways
        )

    async def another_way(self, site: str, name: str) -> Session | None:
        """For a stream of another worker: a tunnel that has just come, here or elsewhere. None when there is no news of
        one."""
        until = time.monotonic() + NEWS_SECONDS
        while True:
            ways = self.ways(site, name)
            link = self._neighbours.link(site, name) if not ways and self._neighbours is not None else None
            if ways:
                return ways[0]
            if link is not None:
                return link.session
            if not await self.news(until - time.monotonic()):
                return None

    async def news(self, seconds: float) -> bool:
        """Whether a tunnel came or went, here or at another worker, within so many seconds. Without other workers there
        is nothing that one could hear late."""
        if self._neighbours is None:
            return False
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def changed() -> None:
            if not came.done():
                came.set_result(None)

        self.on_change.add(changed)
        try:
            return bool((await asyncio.wait((came,), timeout=seconds))[0])
        finally:
            self.on_change.discard(changed)

    def _neighbours_changed(self) -> None:
        """A newer process of a gateway evicts the older one's tunnels, whichever workers hold them."""
        for site, gateways in list(self._sites.items()):
            for name, current in list(gateways.items()):
                for held in self._elsewhere(site, name):
                    if (
                        (held.epoch > current.epoch)
                        if held.key == current.key
                        else held.since > current.since
                    ):
                        for link in current.links[:]:
                            link.finish(ErrorCode.REPLACED, "a newer process of this gateway has connected")
                        break
        self._changed()

    @property
    def streams(self) -> int:
        """Live streams on all tunnels."""
        return sum(link.session.streams for link in self._links)

    @property
    def bytes_received(self) -> int:
        """Through all tunnels since the start."""
        return self._bytes_received + sum(link.bytes_received for link in self._links)

    @property
    def bytes_sent(self) -> int:
        """Through all tunnels since the start."""
        return self._bytes_sent + sum(link.bytes_sent for link in self._links)

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────

    def disconnect(self, site: str, name: str) -> int:
        """End the tunnels of a gateway that was removed, those whose key is being checked as well; returns how many
        streams were live on them."""
        for link in [link for link, who in self._judged.items() if who == (site, name)]:
            link.finish(ErrorCode.AUTH_FAILED, "the gateway was removed")
        if self._neighbours is not None:
            self._neighbours.disconnect(site, name)
        registered = self._sites.get(site, {}).get(name)
        if registered is None:
            return 0
        streams = registered.streams
        for link in registered.links[:]:
            link.finish(ErrorCode.AUTH_FAILED, "the gateway was removed")
        return streams

    def leave(self) -> None:
        """Ask every gateway to bring up other tunnels, at another edge; these live on. New tunnels get 503."""
        self._closing = True
        for link in self._links:
            if link.ready:
                self._ask_to_leave(link)
        self._changed()

    async def drain(self, seconds: float) -> None:
        """Have gateways leave, let live streams end for at most `seconds`, close."""
        self.leave()
        await asyncio.gather(*(link.drain(seconds) for link in list(self._links)))
        self.close()
        await self.wait_closed()

    def close(self) -> None:
        """End every tunnel now."""
        self._closing = True
        for link in list(self._links):
            link.finish(ErrorCode.DRAINING, "this edge is going down")
        if self._neighbours is not None:
            self._neighbours.close()
        if self._touch_timer is not None:
            self._touch_timer.cancel()
            self._touch_timer = None

    async def wait_closed(self) -> None:
        """Returns when the connections of all tunnels that have ended are gone, after a few seconds at most."""
        if self._ended:
            await asyncio.wait(self._ended)


class _Ignored(asyncio.Protocol):
    """What a refused peer still sends."""


def _address(transport: asyncio.BaseTransport) -> str:
    name = transport.get_extra_info("peername")
    return str(name[0]) if isinstance(name, tuple) and name else "-"
