"""The gateway process: tunnels to every edge, kept up for as long as it runs.

For each edge of the configuration it keeps `tunnels` tunnels, each by a loop of its own:

    connect ─▶ serve until it ends or must be replaced ─▶ connect again, at once the first time, then after a random
                                                          part of a growing time (full jitter)

An edge that refuses (this key is not enrolled, another process has it) is asked less often, but never given up. An
edge with many gateways names a time over which they are to spread when it goes away, so that they do not all come back
in the same second. A tunnel that its edge wants to be left is replaced first (by one to another edge, if it names one)
and lives on until its streams have ended. What is logged are changes of an edge's state, never tries.

The services and their health are one for all tunnels: see `upstream` and `health`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from guestpass.config import GatewayConfig
from guestpass.errors import ConfigError, EdgeUnreachable, GuestpassError, TunnelRefused
from guestpass.gateway import dial
from guestpass.gateway.enroll import load_key
from guestpass.gateway.upstream import Upstream
from guestpass.mux.handshake import Hello
from guestpass.mux.link import End, GatewayLink
from guestpass_speedups.session import Budget, ErrorCode

log = logging.getLogger("guestpass.gateway")

# Reconnecting: the first try is at once, then full jitter over a time that doubles from BACKOFF_FIRST to BACKOFF_MOST.
# Between two tries are 3 s at most, and a try that hangs is given up after 4 s (`dial.TCP_TIMEOUT`), its last SYN sent
# 1 s before that: a link that comes back is used within 5 s.
BACKOFF_FIRST = 0.5
BACKOFF_MOST = 3.0

# An edge that has many gateways names a time over which they are to spread (SPEC.md, chapter 8): the first try is then
# after a random part of it, the second one after half of it, none later than this.
SPREAD_MOST = 20.0

# After a refusal somebody has to do something, and may do it at any time.
REFUSED_FIRST = 5.0
REFUSED_MOST = 120.0

# A tunnel that lived for so long was good: the next loss of it begins with a try at once again. One that ends sooner,
# again and again, must not be a loop without a pause.
GOOD_AFTER = 5.0

# Before the first tunnel, services are looked at for at most so long, so that the first INFO is true.
FIRST_CHECK = 2.0

# How long a replaced tunnel may go on with its streams, seconds: then the visitor's next request goes elsewhere anyway.
REPLACED_GRACE = 3600.0


class EdgeState(StrEnum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    LOST = "lost"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class EdgeStatus:
    """One edge as this gateway sees it."""

    url: str
    state: EdgeState
    tunnels: int
    rtt: float | None
    """Seconds; the best of the tunnels."""
    streams: int
    since: float
    """When the state began, seconds since the epoch."""
    problem: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class AgentStatus:
    site: str
    name: str
    edges: tuple[EdgeStatus, ...]
    services: Mapping[str, Mapping[str, bool | str]]
    streams: int


class Agent:
    """One gateway. `run` returns when it is cancelled and drained; `reload` may be called while it runs."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        on_ready: Callable[[], None] | None = None,
        budget: Budget | None = None,
    ) -> None:
        """`on_ready` is called once, after the first edge has let this gateway in. Raises ConfigError."""
        self._config = config
        self._key = load_key(config.resolve(config.gateway.key))
        self._on_ready = on_ready
        self._budget = budget or Budget()
        self._epoch = time.time_ns()
        self._upstream = Upstream(config.services, on_health=self._announce, resolve=config.resolve)
        self._edges = {url: _EdgeKeeper(self, url, self.edge_at(url)) for url in config.gateway.edges}
        self._leaving: set[asyncio.Task[None]] = set()
        self._running = False

    async def run(self) -> None:
        """Serve until cancelled, then drain for `drain_seconds` at most; a second cancellation cuts that short.

        An edge that cannot be reached, or refuses, is no reason to end: see `status`.
        """
        self._running = True
        try:
            await self._upstream.health.start(FIRST_CHECK)
            for keeper in self._edges.values():
                keeper.start(self._config.gateway.tunnels)
            await asyncio.get_running_loop().create_future()
        finally:
            self._running = False
            await self._drain()

    def reload(self, config: GatewayConfig) -> None:
        """Other settings from now on. Live streams stay, but for those of services that are gone. Name, site and key
        are this process's identity and need a restart. Raises ConfigError; then nothing has changed."""
        new, old = config.gateway, self._config.gateway
        for key in ("name", "site", "key"):
            if getattr(new, key) != getattr(old, key):
                raise ConfigError(
                    f'{config.file}: the change needs a restart (key "gateway.{key}")',
                    hint="Restart this gateway.",
                )
        edges = {url: self.edge_at(url, config) for url in new.edges}
        self._upstream.configure(config.services, config.resolve)
        self._config = config
        if not self._running:
            return
        for url in [url for url in self._edges if url not in edges]:
            self._leave(self._edges.pop(url), new.drain_seconds)
        for url, edge in edges.items():
            keeper = self._edges.get(url)
            if keeper is None:
                keeper = self._edges[url] = _EdgeKeeper(self, url, edge)
            keeper.edge = edge
            keeper.start(new.tunnels)
        self._announce()

    def status(self) -> AgentStatus:
        return AgentStatus(
            self._config.gateway.site,
            self._config.gateway.name,
            tuple(keeper.status() for keeper in self._edges.values()),
            self._upstream.services(),
            self._upstream.streams,
        )

    # ── for the edges' keepers ───────────────────────────────────────────────────────────────────────────────────

    def edge_at(self, url: str, config: GatewayConfig | None = None) -> dial.Edge:
        """How to get to an edge, by the settings. Raises ConfigError."""
        config = config or self._config
        gateway = config.gateway
        ca = config.resolve(gateway.ca) if gateway.ca is not None else None
        return dial.edge_at(url, ca=ca, http_proxy=gateway.http_proxy)

    def make_link(self, keeper: _EdgeKeeper, edge: dial.Edge) -> GatewayLink:
        gateway = self._config.gateway
        return GatewayLink(
            keeper,
            budget=self._budget,
            hello=Hello(role="gateway", epoch=self._epoch),
            host=edge.authority,
            site=gateway.site,
            name=gateway.name,
            key=self._key,
            serve=self._upstream.serve,
            edge_name=gateway.edge_name,
        )

    def keeps(self, url: str) -> bool:
        """Whether there are tunnels of their own to that edge."""
        return url in self._edges

    def let_in(self) -> None:
        if self._on_ready is not None:
            callback, self._on_ready = self._on_ready, None
            callback()

    def info(self) -> dict[str, Any]:
        """What edges are told of this gateway."""
        gateway = self._config.gateway
        return {
            "services": self._upstream.services(),
            "weight": gateway.weight,
            "labels": gateway.labels,
            "load": {"streams": self._upstream.streams},
        }

    def _announce(self) -> None:
        info = self.info()
        for keeper in self._edges.values():
            keeper.announce(info)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _leave(self, keeper: _EdgeKeeper, seconds: float) -> None:
        task = asyncio.get_running_loop().create_task(keeper.stop(seconds))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _drain(self) -> None:
        seconds = self._config.gateway.drain_seconds
        for keeper in self._edges.values():
            self._leave(keeper, seconds)
        # A second cancellation (somebody does not want to wait) cuts the drain short.
        try:
            await asyncio.gather(*self._leaving)
        except asyncio.CancelledError:
            for keeper in self._edges.values():
                keeper.cut()
            raise
        finally:
            await self._upstream.close()


class _EdgeKeeper:
    """The tunnels to one edge. Implements `Owner` for its links."""

    def __init__(self, agent: Agent, url: str, edge: dial.Edge) -> None:
        self.url = url
        self.edge = edge
        self._agent = agent
        self._tasks: list[asyncio.Task[None]] = []
        self._links: set[GatewayLink] = set()
        self._retired: dict[GatewayLink, asyncio.Task[None]] = {}
        self._changed: dict[GatewayLink, asyncio.Event] = {}
        self._stopping = False
        self._spread = 0.0
        self._said: set[str] = set()
        self._state = EdgeState.CONNECTING
        self._since = time.time()
        self._problem = ""
        self._hint = ""

    def start(self, tunnels: int) -> None:
        """Keep so many tunnels."""
        while len(self._tasks) < tunnels:
            self._tasks.append(asyncio.get_running_loop().create_task(self._keep()))
        for task in self._tasks[tunnels:]:
            task.cancel()
        del self._tasks[tunnels:]

    async def stop(self, seconds: float) -> None:
        """Open no more, let streams end for at most `seconds`, close."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for task in list(self._retired.values()):
            task.cancel()
        await asyncio.gather(*(link.drain(seconds) for link in list(self._links)))

    def cut(self) -> None:
        for link in list(self._links):
            link.abort(ErrorCode.DRAINING)

    def announce(self, info: Mapping[str, Any]) -> None:
        for link in self._links:
            if link.usable:
                link.send_info(info)

    def status(self) -> EdgeStatus:
        ready = [link for link in self._links if link.usable]
        return EdgeStatus(
            url=self.url,
            state=self._state,
            tunnels=len(ready),
            rtt=min((link.session.rtt for link in ready if link.session.rtt is not None), default=None),
            streams=sum(link.session.streams for link in ready),
            since=self._since,
            problem=self._problem,
            hint=self._hint,
        )

    # ── one tunnel ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep(self) -> None:
        """Keep one tunnel up until cancelled."""
        failures = refusals = 0
        leaving: GatewayLink | None = None  # its edge wants to be left; serves on until there is another
        try:
            while True:
                began = time.monotonic()
                problem: GuestpassError | None
                try:
                    leaving, problem = await self._one_tunnel(leaving)
                except Exception as exc:  # a loop that ended would be a tunnel that is never renewed
                    log.exception("a fault in the tunnel to %s", self.url)
                    problem = EdgeUnreachable(
                        f"{self.url}: a fault of this gateway: {exc}", code="internal_error"
                    )
                if isinstance(problem, TunnelRefused):
                    refusals += 1
                    self._note(EdgeState.REFUSED, problem)
                    await _pause(REFUSED_FIRST, REFUSED_MOST, refusals)
                    continue
                refusals = 0
                failures = 0 if time.monotonic() - began > GOOD_AFTER else failures + 1
                if problem is not None:
                    self._note(EdgeState.LOST, problem)
                await self._before_another(failures, leaving)
        finally:
            self._retire(leaving)

    async def _before_another(self, failures: int, leaving: GatewayLink | None) -> None:
        """The pause before another tunnel: none the first time, unless many gateways lose this edge."""
        spread = self._spread
        if failures:
            await _pause(max(BACKOFF_FIRST, spread / 2), max(BACKOFF_MOST, spread), failures)
        elif spread and (leaving is not None or not any(link.usable for link in self._links)):
            await asyncio.sleep(random.uniform(0, spread))

    async def _one_tunnel(
        self, leaving: GatewayLink | None
    ) -> tuple[GatewayLink | None, GuestpassError | None]:
        """Connect and serve; returns why it is over, or the tunnel that is to be replaced.

        `leaving` goes when the new tunnel stands, not before."""
        link: GatewayLink | None = None
        edge = self._elsewhere(leaving) or self.edge

        def make() -> GatewayLink:
            nonlocal link
            link = self._agent.make_link(self, edge)
            self._changed[link] = asyncio.Event()
            return link

        try:
            await dial.connect(edge, make)
        except EdgeUnreachable as exc:
            if link is not None:
                self._changed.pop(link, None)
            return leaving, exc
        assert link is not None
        if link.end is None:
            self._links.add(link)
        changed = self._changed.get(link) or asyncio.Event()
        try:
            while link.end is None and not (link.ready and link.replace):
                if link.ready and leaving is not None:
                    self._retire(leaving)
                    leaving = None
                await changed.wait()
                changed.clear()
        except asyncio.CancelledError:
            if not link.ready:
                link.abort()
            self._retire(link)
            raise
        if link.end is None:
            self._retire(leaving)
            return link, None
        await asyncio.wait((link.closed,), timeout=1)
        return leaving, self._why(link, link.end)

    def _elsewhere(self, leaving: GatewayLink | None) -> dial.Edge | None:
        """One of the edges that the edge to be left has named, each tried once. An edge that was reached by https
        names only such, and an edge that has tunnels of its own here needs no more of them."""
        if leaving is None:
            return None
        found = []
        for url in leaving.edges:
            with contextlib.suppress(ConfigError, ValueError):
                edge = self._agent.edge_at(url)
                if not self._agent.keeps(url) and (edge.tls is not None or self.edge.tls is None):
                    found.append(edge)
        if not found:
            return None
        chosen = random.choice(found)
        leaving.edges = tuple(url for url in leaving.edges if url != chosen.url)
        return chosen

    def _retire(self, link: GatewayLink | None) -> None:
        """This tunnel is not needed any more (its place is taken, or fewer are wanted); its streams may end."""
        if link is None or link.end is not None or link in self._retired or self._stopping:
            return
        task = asyncio.get_running_loop().create_task(link.drain(REPLACED_GRACE))
        self._retired[link] = task
        task.add_done_callback(lambda _: self._retired.pop(link, None))

    def _why(self, link: GatewayLink, end: End) -> GuestpassError:
        if end.verdict is not None and end.verdict.code != "unavailable":
            return TunnelRefused(
                f"{self.url} refused this gateway: {end.reason}",
                hint=_VERDICT_HINTS.get(end.verdict.code, ""),
                code=end.verdict.code,
            )
        if end.verdict is not None:  # nobody has to do anything at this end
            return EdgeUnreachable(
                f"{self.url} cannot let this gateway in: {end.reason}",
                hint="The edge's log says why.",
                code="unavailable",
            )
        goaway = link.goaway
        if ErrorCode.REPLACED in (end.code, goaway):
            return TunnelRefused(
                f"{self.url}: another process has connected with this gateway's key",
                hint="Is this gateway running twice, perhaps on a copy of this machine? Enrol one of them anew.",
                code="replaced",
            )
        if ErrorCode.AUTH_FAILED in (end.code, goaway):
            return TunnelRefused(
                f"{self.url} ended the tunnel: this gateway was removed, or its proof was refused ({end.reason})",
                hint="See `guestpass gateway list` at the edge; enrol this gateway again if it should be there.",
                code="auth_failed",
            )
        if end.status is not None:
            return EdgeUnreachable(
                f"{self.url}: {end.reason}", hint=_status_hint(end.status), code="upgrade_refused"
            )
        what = "the tunnel was lost" if link.ready else "no tunnel"
        code = goaway if goaway is not None else end.code
        said = f" ({code.name})" if code is not ErrorCode.NO_ERROR else ""
        return EdgeUnreachable(f"{self.url}: {what}: {end.reason}{said}", code="tunnel_lost")

    # ── Owner ────────────────────────────────────────────────────────────────────────────────────────────────────

    def link_ready(self, link: GatewayLink) -> None:
        link.send_info(self._agent.info())
        self._spread = 0.0
        self._note(EdgeState.CONNECTED, None)
        self._agent.let_in()
        self._wake(link)

    def link_info(self, link: GatewayLink, fields: Mapping[str, Any]) -> None:
        if "spread" in fields:
            self._spread = min(link.spread, SPREAD_MOST)
        self._wake(link)

    def link_ended(self, link: GatewayLink, end: End) -> None:
        self._links.discard(link)
        self._wake(link)
        self._changed.pop(link, None)

    def _wake(self, link: GatewayLink) -> None:
        changed = self._changed.get(link)
        if changed is not None:
            changed.set()

    # ── what is said about it ────────────────────────────────────────────────────────────────────────────────────

    def _note(self, state: EdgeState, problem: GuestpassError | None) -> None:
        """Log a change of the edge's state. One of several tunnels lost or refused is no change."""
        if state is not EdgeState.CONNECTED and any(link.usable for link in self._links):
            return
        words, hint = (problem.message, problem.hint) if problem is not None else ("", "")
        before = self._state
        self._problem, self._hint = words, hint
        if state is not before:
            self._state, self._since = state, time.time()
        if state is EdgeState.CONNECTED:
            self._said.clear()
            if before is not state:
                again = before in (EdgeState.LOST, EdgeState.REFUSED)
                log.info("connected to edge %s%s", self.url, " again" if again else "")
            return
        if (
            _kind(words) in self._said
        ):  # said since the last tunnel; one of two causes in turn is no news either
            return
        self._said.add(_kind(words))
        code = problem.error_code if problem is not None else ""
        log.warning("%s (%s)%s", words, code, f" — {hint}" if hint else "")


def _kind(words: str) -> str:
    """The part of a message by which two of them are the same news."""
    return words.partition("(")[0]


_VERDICT_HINTS = {
    "unknown_key": "Enrol this gateway (again): `guestpass gateway enroll --help`.",
    "bad_signature": "Both ends must be of versions that fit, and nothing may change what is sent between them.",
    "wrong_certificate": "If a proxy is to end TLS before the edge, edge.toml's tunnel_certificate_hash names its own.",
    "stale_epoch": "Is this gateway running twice, perhaps on a copy of this machine? Enrol one of them anew.",
}


def _status_hint(status: int) -> str:
    if status == 0:
        return "Is this the port of a Guestpass edge, and http or https as it should be?"
    if status == 426:
        return "An HTTP proxy or load balancer on the way drops the WebSocket upgrade: it must pass it."
    if status in (403, 407):
        return "Something on the way wants authentication: is there an HTTP proxy to be named in http_proxy?"
    if status == 404:
        return "Is this the address of a Guestpass edge?"
    return ""


async def _pause(first: float, most: float, failures: int) -> None:
    """Full jitter: anything between nothing and the whole of a time that doubles with each failure."""
    whole = min(most, first * 2 ** min(failures - 1, 16))
    await asyncio.sleep(random.uniform(0, whole))


__all__ = ["Agent", "AgentStatus", "EdgeState", "EdgeStatus"]
