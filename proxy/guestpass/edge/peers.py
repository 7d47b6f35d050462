"""Tunnels that other workers hold, and the sockets between workers.

A gateway's tunnel lands on any worker. Each worker tells the supervisor what it holds, the supervisor tells the others,
and a worker that needs a gateway which it does not hold itself opens a link to a worker that does: a Unix socket that
speaks the frames of a tunnel, without WebSocket and handshake, one for each gateway, kept while there is use for it.
The holder splices each stream onto a tunnel (`guestpass_speedups.splice`). To both lanes such a link is one more tunnel
of the gateway.

      Neighbours ── PeerLink ═══ Unix socket ═══ Holder ── SpliceSession ── the gateway's tunnels

A holder whose last tunnel to the gateway takes no more streams says GOAWAY, as a gateway does when it drains; those
that have come already it sends by another way, if there is one in a moment.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from guestpass.mux.link import TICK, WRITE_HIGH, WRITE_LOW
from guestpass.mux.stream import TunnelStream
from guestpass_speedups.session import Budget, ErrorCode, Session, Stream, StreamRefused, TunnelError
from guestpass_speedups.splice import Near, SpliceSession

log = logging.getLogger("guestpass.edge.peers")

# As tunnels: see `guestpass_speedups.wire`.
FILL_SIZE = 128 * 1024

# What one read may bring; emptied before the loop's next callback, so all links share it.
_BUFFER = memoryview(bytearray(256 * 1024))

# A worker whose link has ended is not asked again for so long, unless it says anew what it holds.
REFUSED_SECONDS = 1.0

Name = tuple[str, str]
"""Site and gateway."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a worker holds of one gateway."""

    site: str
    name: str
    key: bytes
    epoch: int
    since: float
    tunnels: int
    usable: bool
    """A tunnel takes new streams."""
    leaving: bool
    """All of them were asked to leave: better another worker's."""
    streams: int
    rtt: float | None
    services: Mapping[str, bool] = field(default_factory=dict)
    weight: float = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    software: str = ""
    remote: str = ""


class _Peer(asyncio.BufferedProtocol):
    """One end of a socket between two workers. Implements `SessionHandler`."""

    session: Session

    def __init__(self, guard: Callable[[], None]) -> None:
        self._guard = guard
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self.over = False

    # ── asyncio's calls ──────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH, low=WRITE_LOW)
        if self.over:
            self._transport.abort()
            return
        self._timer = self._loop.call_later(TICK, self._tick)
        self.output_ready()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.finish()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        self._guard()
        if self.over:
            return
        try:
            self.session.receive(_BUFFER[:nbytes], time.monotonic())
        except TunnelError as exc:
            log.error("a link between workers ended: %s", exc)
            self.finish()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if not self.over and self.session.has_output:
            self.output_ready()

    # ── inner ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _flush(self) -> None:
        self._flush_due = False
        self._guard()
        if self._paused or self._transport is None or self.over:
            return
        data = self.session.fill(FILL_SIZE, time.monotonic())
        if data:
            self._transport.write(data)
            if self.session.has_output and not self._paused:
                self.output_ready()

    @property
    def of_no_use(self) -> bool:
        """It ends when its streams have."""
        return self.session.draining

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._tick)
        try:
            self.session.tick(time.monotonic())
        except TunnelError as exc:
            log.warning("a link between workers ended: %s", exc)
            self.finish()
            return
        if self.of_no_use and not self.session.streams:
            self.finish()

    @property
    def busy(self) -> bool:
        """Streams are live, or what they left has not been handed to the kernel."""
        waiting = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return not self.over and bool(self.session.streams or self.session.has_output or waiting)

    def finish(self) -> None:
        """End the link and its streams. Idempotent."""
        if self.over:
            return
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # To whoever waits, the way has gone and not the gateway.
        self.session.abort(ErrorCode.DRAINING)
        if self._transport is not None:
            self._transport.abort()
        self.ended()

    def ended(self) -> None:
        """The link is over."""

    # ── SessionHandler ───────────────────────────────────────────────────────────────────────────────────────────

    def output_ready(self) -> None:
        if not self._flush_due and self._transport is not None and not self.over:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def hello_received(self, payload: bytes) -> None:
        pass

    def auth_received(self, payload: bytes) -> None:
        pass

    def info_received(self, payload: bytes) -> None:
        pass

    def stream_opened(
        self, stream: Stream, service: str, interactive: bool, head: bytes, fin: bool
    ) -> TunnelStream | None:
        return None

    def goaway_received(self, last_stream: int, code: int) -> None:
        pass

    def pong_received(self, rtt: float) -> None:
        pass

    def handler_failed(self, stream: Stream, exc: BaseException) -> None:
        log.error("a fault in the handling of a stream between workers", exc_info=exc)


class PeerLink(_Peer):
    """The visitor's end: streams to a gateway whose tunnels another worker holds. Usable from the first moment; what
    is sent before the socket is connected waits."""

    def __init__(
        self,
        who: Name,
        path: str,
        *,
        budget: Budget,
        guard: Callable[[], None],
        on_change: Callable[[PeerLink], None],
    ) -> None:
        super().__init__(guard)
        self.wanted = True
        """The worker at its end holds the gateway."""
        self._on_change = on_change
        self.session = Session(True, self, budget, now=time.monotonic())
        self.session.send_hello(orjson.dumps({"site": who[0], "name": who[1]}))
        self.session.send_auth(b"{}")
        self._connecting = self._loop.create_task(self._connect(path))

    async def _connect(self, path: str) -> None:
        try:
            await self._loop.create_unix_connection(lambda: self, path)
        except OSError as exc:
            log.warning("another worker cannot be reached: %s", exc.strerror)
            self.finish()

    @property
    def draining(self) -> bool:
        return self.over or self.session.draining

    @property
    def of_no_use(self) -> bool:
        return super().of_no_use or not self.wanted

    def open(self, service: str, head: bytes, *, fin: bool, body: bytes = b"") -> TunnelStream:
        """A new stream. Raises StreamRefused; then nothing was sent."""
        stream = TunnelStream(self._loop, finished=fin)
        stream.attach(self.session.open(service, head, stream, fin=fin, body=body))
        return stream

    def goaway_received(self, last_stream: int, code: int) -> None:
        self._on_change(self)

    def ended(self) -> None:
        self._connecting.cancel()
        self._on_change(self)


class Holder(_Peer):
    """The end of the worker that holds the gateway's tunnels."""

    def __init__(
        self,
        *,
        budget: Budget,
        guard: Callable[[], None],
        ways: Callable[[str, str], Sequence[Session]],
        another: Callable[[str, str], Awaitable[Session | None]],
        on_end: Callable[[Holder], None],
    ) -> None:
        """`another` looks for a way when `ways` has none: for a moment, wherever it may be."""
        super().__init__(guard)
        self._ways = ways
        self._another = another
        self._parked: set[asyncio.Task[None]] = set()
        self._on_end = on_end
        self._who: Name | None = None
        self.session = SpliceSession(False, self, budget, now=time.monotonic())
        self.session.send_hello(b"{}")

    def hello_received(self, payload: bytes) -> None:
        fields = orjson.loads(payload)
        self._who = (fields["site"], fields["name"])

    def ways(self) -> Sequence[Session]:
        return self._ways(*self._who) if self._who is not None else ()

    def no_way(self, stream: Near) -> None:
        """No tunnel takes the stream. Called from within the session."""
        self._loop.call_soon(self.leave)
        task = self._loop.create_task(self._look_elsewhere(stream))
        self._parked.add(task)
        task.add_done_callback(self._parked.discard)

    async def _look_elsewhere(self, stream: Near) -> None:
        assert self._who is not None
        way = await self._another(*self._who)
        self._guard()
        try:
            if way is not None:
                stream.go(way)
        except StreamRefused as exc:
            log.info("%s/%s: %s", *self._who, exc)
        stream.refuse()

    def leave(self) -> None:
        if not self.over and not self.session.draining:
            self.session.goaway(ErrorCode.DRAINING)

    def ended(self) -> None:
        for task in self._parked:
            task.cancel()
        self._on_end(self)


class Neighbours:
    """What the other workers hold, and the links to them."""

    def __init__(self, *, budget: Budget, guard: Callable[[], None]) -> None:
        self._budget = budget
        self._guard = guard
        self._sites: dict[str, dict[str, dict[int, Held]]] = {}
        self._paths: dict[int, str] = {}
        self._links: dict[tuple[str, str, int], PeerLink] = {}
        self._refused: dict[tuple[str, str, int], float] = {}  # until when (monotonic)
        self.on_change: Callable[[], None] = lambda: None
        self.tunnels = 0
        """Of all other workers."""

    def update(self, worker: int, path: str, changed: Iterable[Held], gone: Iterable[Name]) -> None:
        """News of a worker: `changed` entries are whole, `gone` gateways have no tunnel there any more."""
        self._paths[worker] = path
        for site, name in gone:
            self._forget(site, name, worker)
        for held in changed:
            workers = self._sites.setdefault(held.site, {}).setdefault(held.name, {})
            self.tunnels += held.tunnels - (workers[worker].tunnels if worker in workers else 0)
            workers[worker] = held
            self._want((held.site, held.name, worker), True)
            self._refused.pop((held.site, held.name, worker), None)
        self.on_change()

    def remove(self, worker: int) -> None:
        """The worker is gone."""
        if self._paths.pop(worker, None) is None:
            return
        for site, names in list(self._sites.items()):
            for name in [name for name, workers in names.items() if worker in workers]:
                self._forget(site, name, worker)
        for key in [key for key in self._links if key[2] == worker]:
            self._links[key].finish()
        self.on_change()

    def _forget(self, site: str, name: str, worker: int) -> None:
        names = self._sites.get(site, {})
        workers = names.get(name, {})
        held = workers.pop(worker, None)
        if held is None:
            return
        self.tunnels -= held.tunnels
        self._want((site, name, worker), False)
        self._refused.pop((site, name, worker), None)
        if not workers:
            del names[name]
            if not names:
                del self._sites[site]

    def _want(self, key: tuple[str, str, int], wanted: bool) -> None:
        link = self._links.get(key)
        if link is not None:
            link.wanted = wanted

    def names(self, site: str) -> Iterable[str]:
        return self._sites.get(site, {})

    @property
    def all(self) -> Iterable[Name]:
        return ((site, name) for site, names in self._sites.items() for name in names)

    def of(self, site: str, name: str) -> Sequence[Held]:
        """What other workers hold of the gateway."""
        return tuple(self._sites.get(site, {}).get(name, {}).values())

    def usable(self, site: str, name: str) -> bool:
        """Whether streams can be opened by another worker's tunnel."""
        return bool(self._holders(site, name))

    def _holders(self, site: str, name: str) -> list[int]:
        """Workers that take streams for the gateway, best first."""
        now = time.monotonic()
        found = [
            (held.leaving, held.streams, worker)
            for worker, held in self._sites.get(site, {}).get(name, {}).items()
            if held.usable and self._refused.get((site, name, worker), 0.0) <= now
        ]
        return [worker for _, _, worker in sorted(found)]

    def link(self, site: str, name: str) -> PeerLink | None:
        """The link by which to open a stream to the gateway."""
        for worker in self._holders(site, name):
            key = (site, name, worker)
            link = self._links.get(key)
            if link is None or link.session.retiring:
                self._want(key, False)
                link = self._links[key] = PeerLink(
                    (site, name),
                    self._paths[worker],
                    budget=self._budget,
                    guard=self._guard,
                    on_change=lambda link, key=key: self._link_changed(key, link),  # type: ignore[misc]
                )
            return link
        return None

    def _link_changed(self, key: tuple[str, str, int], link: PeerLink) -> None:
        if self._links.get(key) is link:
            del self._links[key]
            site, name, worker = key
            if worker in self._sites.get(site, {}).get(name, {}):
                # Until it says anew what it holds; otherwise the next request would try again at once.
                self._refused[key] = time.monotonic() + REFUSED_SECONDS
            self.on_change()

    def disconnect(self, site: str, name: str) -> None:
        """The gateway was removed."""
        for key in [key for key in self._links if key[:2] == (site, name)]:
            self._links[key].finish()

    def close(self) -> None:
        for link in list(self._links.values()):
            link.finish()


def status_of(held: Sequence[Held]) -> dict[str, Any]:
    """What all holders of one gateway together say of it."""
    services: dict[str, bool] = {}
    for one in held:
        for service, healthy in one.services.items():
            services[service] = services.get(service, False) or healthy
    oldest = min(held, key=lambda one: one.since)
    return {
        "site": oldest.site,
        "name": oldest.name,
        "tunnels": sum(one.tunnels for one in held),
        "rtt": min((one.rtt for one in held if one.rtt is not None), default=None),
        "services": services,
        "since": oldest.since,
        "streams": sum(one.streams for one in held),
        "software": oldest.software,
        "remote": oldest.remote,
    }


__all__ = ["Held", "Holder", "Neighbours", "PeerLink", "status_of"]
