"""The edge, wired together: the only place that knows all of its parts.

`serve(config)` runs one edge until SIGTERM or SIGINT. Start-up order: what can be wrong in the configuration (plugins,
keys, certificates), the store, then the parts, then the listeners: a fault stops the start, not the first visitor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
from aiohttp import web
from prometheus_client import generate_latest

from guestpass import config as configuration
from guestpass.config import EdgeConfig
from guestpass.daemon import Signals, reloading, spare_collector
from guestpass.edge import certificates
from guestpass.edge import headers as h
from guestpass.edge.access_log import STDOUT, AccessLog
from guestpass.edge.acme import Acme
from guestpass.edge.admin import Admin
from guestpass.edge.admission import Admission
from guestpass.edge.api import Api
from guestpass.edge.api import routes as api_routes
from guestpass.edge.assertion import Signer
from guestpass.edge.bare import BareServer, ServerLog
from guestpass.edge.certificates import Certificates
from guestpass.edge.console import Console
from guestpass.edge.events import EventHub
from guestpass.edge.front import HANDLER_KEEPALIVE, Answered, FastLane, House
from guestpass.edge.grants import Grant, GrantTable
from guestpass.edge.home import (
    Home,
    api_key_of,
    make_state_folder,
    plugin_secret,
    ready_line,
    with_notifiers,
)
from guestpass.edge.incoming import PREFIX as HOOKS_PREFIX
from guestpass.edge.incoming import IncomingRoutes
from guestpass.edge.keys import CLIENT, SCHEME, SHARE_ID
from guestpass.edge.limits import Refusals, client_of
from guestpass.edge.listener import Listener
from guestpass.edge.metrics import Metrics
from guestpass.edge.origins import Origins
from guestpass.edge.pages import Pages
from guestpass.edge.plugin_loader import OF_PLUGINS, fingerprint
from guestpass.edge.plugins import PluginSet
from guestpass.edge.relay import Relay
from guestpass.edge.signing_keys import JWKS_SECONDS, KeyRing
from guestpass.edge.tunnels import Tunnels
from guestpass.edge.worker import Seat
from guestpass.errors import Forbidden, GuestpassError, StoreError
from guestpass.hosts import is_loopback
from guestpass.model import Revocation, Revoked
from guestpass.plugin import Client, Message
from guestpass_speedups.relay import Connection, Lane
from guestpass_speedups.session import Budget

log = logging.getLogger("guestpass.edge")

# aiohttp's limits for one line of a request head; the whole head is capped by `headers.MAX_HEAD`.
MAX_LINE = 16 * 1024

# A request that was answered before its body came: what is still read of it so that the answer arrives, in seconds.
LINGER = 2.0

# What aiohttp buffers of a request body before it stops reading.
READ_BUFFER = 128 * 1024

# Grants that idle, expired flows and the like are cleared this often.
SWEEP_SECONDS = 60.0

# How often a drain looks whether the last stream has ended.
DRAIN_POLL = 0.05

# A worker that is replaced waits so long for its gateways' tunnels to other workers: a dial, a handshake, and time.
HAND_OVER_SECONDS = 10.0

# And leaves connections alone that did nothing for so long: a client that keeps asking has been answered by then.
HAND_OVER_IDLE = 2.0

RESERVED_PREFIX = "/.guestpass/"
ASSETS_PREFIX = "/.guestpass/assets/"

# Kinds of plugins that a worker has; the others are the supervisor's.
DECIDING = frozenset(("authenticate", "revoke", "choose", "filter"))

# A JSON or form body for our own handlers; shared applications' bodies stream and have no cap.
MAX_OWN_BODY = 256 * 1024


class Edge:
    """One edge process. `start`, then `drain` and `stop`."""

    def __init__(
        self,
        config: EdgeConfig,
        *,
        seat: Seat | None = None,
        restored: bool = False,
        now: Callable[[], float] = time.time,
        load: Callable[..., PluginSet] = PluginSet.load,
    ) -> None:
        """`seat`: of one worker among several; without one, the edge is this process. `restored`: the database is a
        backup (see `Store.open`).
        `load(config, observe_hook=…)` makes the set of plugins."""
        self.config = config
        self._restored = restored
        self._now = now
        self._load = load
        self._seat = seat
        self._listeners: list[Listener] = []
        self._bare: list[BareServer] = []
        self._lanes: list[Lane] = []
        self._admin: Admin | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._cleanups: list[Callable[[], Awaitable[None]]] = []
        self.certificates = Certificates()
        self._certified = config  # the one whose certificates are served: a reload changes it
        self.acme: Acme | None = None
        self._draining = False
        self.access_log: AccessLog | None = None
        self._reloads: set[asyncio.Task[None]] = set()
        self._reload_lock = asyncio.Lock()

    async def start(self) -> dict[str, Any]:
        """Bring everything up; returns the `ready` line. Raises GuestpassError; what was started is undone then."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> dict[str, Any]:
        config, seat = self.config, self._seat
        state = make_state_folder(config)
        api_key, api_key_file = self._prepare(config, state)
        home, notify = await self._open_home(config)
        self._make_parts(config)
        if seat is not None:
            seat.settle(self)
        await self.plugins.start(
            self.service,
            self.events,
            notify=notify,
            revoke=self._publish,
            fail_closed=self.grants.end_all,
            secret=plugin_secret(state),
            now=self._now,
            count_blocked=lambda plugin: self.metrics.loop_blocked.labels(plugin).inc(),
            incoming=self.incoming,
        )
        self._cleanups.append(self.plugins.stop)
        if home is not None:
            await home.courier.start()
            self._cleanups.append(home.courier.stop)
        listening, admin_url = await self._listen(config, api_key)
        if self.acme is not None:
            await self.acme.start()
            self._cleanups.append(self.acme.stop)
        self._tasks.append(asyncio.create_task(self._sweep(), name="sweep"))
        return ready_line(
            config,
            listen=listening,
            admin_url=admin_url,
            api_key_file=api_key_file,
            pid=os.getpid(),
        )

    def _prepare(self, config: EdgeConfig, state: Path) -> tuple[str, Path | None]:
        """What can be wrong in the configuration: certificates, keys, plugins. Returns the API key, and the file that
        it is in. Raises GuestpassError."""
        edge, seat = config.edge, self._seat
        self.origins = Origins(edge.public_url, edge.share_domain)
        # Not on a developer's machine: a browser keeps it for all ports of the name, other servers' too.
        public = not is_loopback(urlsplit(edge.public_url).hostname or "")
        self._hsts = f"max-age={edge.hsts_seconds}" if public and edge.hsts_seconds else ""
        self.metrics = Metrics()
        self.events = EventHub() if seat is None else seat.events
        if config.acme is not None:
            self.acme = Acme(
                config,
                config.acme,
                changed=self._serve_issued,
                count=lambda outcome: self.metrics.acme_attempts.labels(outcome).inc(),
            )
        self._load_certificates(config)
        self.keys = KeyRing(state, days=edge.assertion_key_days)
        self.keys.open(time.time())
        self.signer = Signer(self.keys, edge.public_url)
        api_key, api_key_file = api_key_of(config, state)
        self.plugins = self._load_plugins(config)
        self._cleanups.append(self.plugins.stop)  # of those that were loaded and never started as well
        # A worker among several has the plugins that decide; the others are the supervisor's.
        self._plugin_parts = tuple(part for part in OF_PLUGINS if seat is None or part in DECIDING)
        self._seen = fingerprint(config, self._plugin_parts)
        self.grants: GrantTable
        return api_key, api_key_file

    async def _open_home(
        self, config: EdgeConfig
    ) -> tuple[Home | None, Callable[[Message], Awaitable[object]]]:
        """The store and what rests on it, or, of one worker among several, the way to the supervisor's; and what queues
        a message. Raises GuestpassError."""
        seat = self._seat
        home: Home | None = None
        if seat is None:
            home = await Home.open(
                config,
                events=self.events,
                notifiers=self.plugins.notifiers,
                origins=self.origins,
                renew=lambda share, sessions: self.grants.renew(share, sessions),
                ways=self.ways,
                restored=self._restored,
                now=self._now,
            )
            self._cleanups.append(home.close)
            home.bus.subscribe(self._revoke)
            self.service = home.service
            notify, self._publish = home.courier.enqueue, home.bus.publish
        else:
            self.service = seat.service
            notify, self._publish = seat.enqueue, seat.publish
        return home, notify

    def _make_parts(self, config: EdgeConfig) -> None:
        """The parts, each with what it needs of the others. Nothing is served yet."""
        edge, seat, service = config.edge, self._seat, self.service
        self.grants = GrantTable(now=self._now, touched=service.touch if seat is None else seat.touch_later)
        self.tunnels = Tunnels(
            edge_name=edge.name,
            find_key=self._find_key,
            budget=Budget(edge.memory_budget) if seat is None else seat.budget,
            certificate_hash=self._binding,
            on_event=self.events.emit,
            touched=service.seen,
            other_edges=edge.other_edges,
            neighbours=seat.neighbours if seat is not None else None,
            guard=seat.guard if seat is not None else None,
        )
        self.pages = Pages(self.origins, self._count_refused)
        self.admission = Admission(
            origins=self.origins,
            service=service,
            plugins=self.plugins,
            grants=self.grants,
            tunnels=self.tunnels,
            pages=self.pages,
            events=self.events,
            metrics=self.metrics,
            now=self._now,
            agree=seat.agree if seat is not None else None,
        )
        self.refusals = Refusals(config.limits, count=lambda limit: self.metrics.refusals.labels(limit).inc())
        self.lane = FastLane(
            grants=self.grants,
            admission=self.admission,
            tunnels=self.tunnels,
            signer=self.signer,
            origins=self.origins,
            # Filters that see every request are Python.
            fast=edge.fast_lane and not self.plugins.filters_requests,
            limits=config.limits,
        )
        self._lanes.append(self.lane)
        if edge.access_log:
            path = None if edge.access_log == STDOUT else config.resolve(Path(edge.access_log))
            self.access_log = AccessLog(path)
            self.lane.log_to(self.access_log.write, edge.access_log_paths)
            self.metrics.watch_access_log(lambda: self.access_log.dropped if self.access_log else 0)
        self.relay = Relay(
            grants=self.grants,
            admission=self.admission,
            tunnels=self.tunnels,
            plugins=self.plugins,
            pages=self.pages,
            signer=self.signer,
            metrics=self.metrics,
            share_origin=self.origins.share_origin,
            learn=self.lane.learn,
            refusals=self.refusals,
            access_log=self.lane if self.access_log is not None else None,
            windows=lambda address: self.lane.client(client_of(address)).windows,
            now=self._now,
        )
        self.metrics.watch_lane(lambda: self.lane.services.values(), lambda: self.lane.durations)
        self.metrics.watch(
            grants=lambda: len(self.grants),
            streams=lambda: self.grants.all_streams,
            tunnels=lambda: [(s.site, s.name, s.tunnels, s.rtt) for s in self.tunnels.held()],
            tunnel_bytes=lambda: (self.tunnels.bytes_received, self.tunnels.bytes_sent),
            certificates=self.certificates.expiries,
        )
        self.incoming = IncomingRoutes(self.origins)

    async def _listen(self, config: EdgeConfig, api_key: str) -> tuple[list[str], str]:
        """Serve. Returns the URLs that are listened on, and the admin listener's. Raises PortTaken, ConfigError."""
        edge, seat, service = config.edge, self._seat, self.service
        live = self.grants if seat is None else seat.live
        api = Api(
            service=service,
            live=live,
            gateways=self.tunnels,
            events=self.events,
            api_key=api_key,
            edge_name=edge.name,
            share_origin=self.origins.share_origin,
        )
        console = Console(
            service=service,
            live=live,
            gateways=self.tunnels,
            pages=self.pages,
            api_key=api_key,
            origins=self.origins,
            ways=lambda: self.plugins.interactive,
        )
        self.house = House(
            lane=self.lane,
            handler=await self._visitor_app(api, console),
            tunnel=self.tunnels.accept,
            pages=self.pages,
            refused=self._count_refused,
            trusted_proxies=edge.trusted_proxies,
            scheme=self.origins.scheme,
            refusals=self.refusals,
        )
        admin_url = await self._admin_app() if seat is None else ""
        sockets = iter(seat.sockets if seat is not None else repeat(None))
        if seat is not None:
            seat.admits(edge.drain_seconds)
        for url in edge.listen:
            listener = Listener(url, self.certificates, next(sockets))
            await listener.start(self.house.front, self.house.admit)
            self._listeners.append(listener)
        listening = [listener.url for listener in self._listeners]
        for url in edge.redirect_listen:
            server = BareServer(
                url,
                self._plain_app(),
                pages=self.pages,
                refused=self.metrics.refused,
                limits=config.limits,
                refusals=self.refusals,
                sock=next(sockets),
            )
            self._bare.append(server)
            listening.append(await server.start())
        return listening, admin_url

    async def drain(self, *, replaced: bool = False) -> None:
        """Stop accepting, tell the gateways, let what runs finish, at most `drain_seconds`. `replaced`: other workers
        go on, so nobody may notice that this one leaves."""
        self._draining = True
        for listener in self._listeners:
            listener.close()
        for server in self._bare:
            server.close()
        self.relay.leaving = True
        self.lane.fast = False  # what still comes on open connections is answered, and told that they close
        self.tunnels.leave()
        seconds = self.config.edge.drain_seconds
        deadline = time.monotonic() + seconds
        if replaced and self._seat is not None:
            self.events.close()  # who listens to them comes back at once
            await self._hand_over(self._seat, deadline)
        while self._busy() and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL)
        left = self.grants.end_all("edge_stopping", tails=False)
        if left:
            log.info("drain: %d streams were still open after %g s", left, seconds)
        await self.tunnels.drain(max(deadline - time.monotonic(), 0.0))

    async def _hand_over(self, seat: Seat, deadline: float) -> None:
        """Until gateways have tunnels to other workers, these have stopped using the ones here, and visitors have gone:
        each is told with an answer that its connection closes."""
        settled = min(deadline, time.monotonic() + HAND_OVER_SECONDS)
        while not self.tunnels.held_elsewhere() and time.monotonic() < settled:
            await asyncio.sleep(DRAIN_POLL)
        await seat.withdraw()
        while time.monotonic() < deadline and (
            self._busy()
            or self.tunnels.streams
            or not all(idles(connection, self.config.limits) for connection in self.lane.connections)
        ):
            await asyncio.sleep(DRAIN_POLL)

    def _busy(self) -> bool:
        """Whether anything is open: of visitors here, or of other workers'."""
        return bool(self.grants.all_streams) or (self._seat is not None and self._seat.busy)

    async def stop(self) -> None:
        """Undo `start` in reverse order. Never raises."""
        for listener in self._listeners:
            listener.close()
        for server in self._bare:
            server.close()
        if self._admin is not None:
            await self._admin.stop()
        for server in self._bare:
            await server.stop()
        for task in (*self._tasks, *self._reloads):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._reloads, return_exceptions=True)
        if hasattr(self, "tunnels"):
            self.tunnels.close()
        if hasattr(self, "events"):
            self.events.close()  # or who listens to them would hold up the server's end
        while self._cleanups:
            cleanup = self._cleanups.pop()
            try:
                await cleanup()
            except Exception:
                log.exception("while stopping")
        for lane in self._lanes:
            lane.close()
        if self.access_log is not None:
            await asyncio.to_thread(self.access_log.close)

    def ways(self) -> list[str]:
        """Names of the authenticators among which visitors can choose."""
        return [way.name for way in self.plugins.interactive]

    def reload(self) -> asyncio.Task[None]:
        """SIGHUP: certificates are read again, the access log is opened again, and plugins are loaded again where
        something about them has changed; a configuration with faults changes nothing. Live streams stay, unless the new
        plugins revoke them."""
        task = asyncio.create_task(self._reload(), name="reload")
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)
        return task

    async def _reload(self) -> None:
        async with self._reload_lock:
            with reloading():
                if self.access_log is not None:
                    self.access_log.reopen()
                try:
                    await self._load_again()
                except GuestpassError as exc:
                    log.error("reload: %s; nothing was changed", exc)
                except Exception:
                    log.exception("reload: failed")

    async def _load_again(self) -> None:
        fresh = configuration.load_edge(self.config.file)
        # What may fail goes first: then nothing was changed, as the log says. Certificates are tried where nobody is
        # served.
        self.keys.tick(time.time())
        Certificates().load(fresh.file, tuple(certificates.sources(fresh)))
        seen = fingerprint(fresh, self._plugin_parts)
        if seen != self._seen:
            await self._swap_plugins(fresh)
            self._seen = seen
        self.config = self.config.model_copy(update={name: getattr(fresh, name) for name in OF_PLUGINS})
        self._load_certificates(fresh)
        if self.acme is not None:
            self.acme.hurry()
        elsewhere = [
            f"{prefix}{name}"
            for prefix, new, old in (("edge.", fresh.edge, self.config.edge), ("", fresh, self.config))
            for name in sorted(type(new).model_fields)
            if name not in ("edge", "file", "tls", "certificate") and getattr(new, name) != getattr(old, name)
        ]
        if elsewhere:
            log.warning("reload: a restart is needed for changes of: %s", ", ".join(elsewhere))
        log.info("reloaded %s", self.config.file)

    def _load_plugins(self, config: EdgeConfig) -> PluginSet:
        """Of one worker among several, those that decide. Raises PluginError, ConfigError."""
        if self._seat is None:
            return self._load(with_notifiers(config), observe_hook=self.metrics.observe_hook)
        return self._load(config, observe_hook=self.metrics.observe_hook, only=DECIDING)

    async def _swap_plugins(self, fresh: EdgeConfig) -> None:
        """Raises GuestpassError; then the old plugins are asked as before."""
        # importing may take a while, and others are served meanwhile
        plugins = await asyncio.to_thread(self._load_plugins, fresh)
        open_ones: list[Grant] = []

        def swapped() -> None:
            open_ones.extend(self.grants.outdate())
            self.lane.fast = (
                self.config.edge.fast_lane and not self.plugins.filters_requests and not self._draining
            )

        await self.plugins.replace(plugins, swapped)
        ended = 0
        for name in sorted(self.plugins.removed):
            ended += await self.service.end_signed_in_by(name, "provider_removed")
        for grant in open_ones:
            ended += await self._ask_again(grant)
        log.info(
            "reload: the plugins were replaced; %d sessions with open streams were asked about; %d sessions ended",
            *(len(open_ones), ended),
        )

    async def _ask_again(self, grant: Grant) -> bool:
        """Whether what the session has open had to end, by what the plugins say now."""
        session = grant.session
        try:
            if session.provider in self.plugins.removed:
                return False  # over
            revocation = await self.plugins.check(grant.share, session)
        except Forbidden:
            revocation = Revocation("denied")
        except GuestpassError as exc:
            log.warning("reload: session %s: %s", session.id, exc)
            revocation = Revocation("plugin_failed")
        if revocation is not None:
            await self._publish(Revocation(revocation.reason, session_id=session.id))
        return revocation is not None

    # ── parts of start ───────────────────────────────────────────────────────────────────────────────────────────

    def _load_certificates(self, config: EdgeConfig) -> None:
        """Raises ConfigError, and keeps those that are served."""
        issued = self.acme.sources() if self.acme is not None else []
        self.certificates.load(config.file, (*certificates.sources(config), *issued))
        self._certified = config

    def _serve_issued(self) -> bool:
        """There are new certificates by ACME, and nobody asked for the other files to be read again: where one of those
        has a fault by now, what is served stays until it is mended."""
        try:
            self._load_certificates(self._certified)
        except GuestpassError as exc:
            log.error("a new certificate is not served: %s", exc)
            return False
        return True

    def _binding(self, transport: asyncio.BaseTransport) -> bytes | None:
        """What a gateway's proof on this connection must be bound to; None where the binding is switched off."""
        if not self.config.edge.tunnel_binding:
            return None
        if self.config.edge.tunnel_certificate_hash is not None:
            return bytes.fromhex(self.config.edge.tunnel_certificate_hash)
        return self.certificates.hash_of(transport.get_extra_info("sslcontext"))

    async def _find_key(self, site: str, name: str, key: bytes) -> bool:
        gateway = await self.service.find_gateway(site, name)
        return gateway is not None and secrets.compare_digest(gateway.public_key, key)

    def _revoke(self, revocation: Revocation) -> Revoked:
        ended = self.revoke(revocation)
        self.metrics.count_revocation(revocation.reason, ended.took_ms / 1000)
        return ended

    def revoke(self, revocation: Revocation) -> Revoked:
        """End in this process what `revocation` names."""
        ended = self.grants.revoke(revocation)
        if revocation.gateway is not None:
            self.tunnels.disconnect(*revocation.gateway)
        return ended

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.grants.sweep()
            for sweep in (self.service.sweep, self._turn_keys):
                try:
                    await sweep()
                except GuestpassError as exc:
                    log.warning("sweep: %s", exc)
                except Exception:  # a loop that ended would never clear anything again
                    log.exception("sweep")

    async def _turn_keys(self) -> None:
        await asyncio.to_thread(self.keys.tick, time.time())

    # ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _visitor_app(self, api: Api, console: Console) -> Callable[[], asyncio.BaseProtocol]:
        app = web.Application(middlewares=[self._front], client_max_size=MAX_OWN_BODY)
        app.add_routes(self.admission.main_routes())
        app.add_routes(self.admission.share_routes())
        app.add_routes(self.pages.asset_routes())
        app.add_routes(self.incoming.web_routes())
        app.add_routes(console.console_routes())
        app.add_routes(api_routes(api))
        app.router.add_get("/.well-known/jwks.json", self._jwks)
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=log,
            access_log_class=Answered,
            logger=ServerLog(self.metrics.refused),
            auto_decompress=False,
            keepalive_timeout=HANDLER_KEEPALIVE,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            max_headers=h.MAX_FIELDS,
            read_bufsize=READ_BUFFER,
            lingering_time=LINGER,
            shutdown_timeout=1.0,
        )
        app.on_response_prepare.append(self._own_fields)
        await runner.setup()
        self._cleanups.append(runner.cleanup)
        server = runner.server
        assert server is not None
        return server

    @web.middleware
    async def _front(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Every request: refuse what is malformed, find the origin, then the relay or our own pages."""
        try:
            return await self._dispatch(request, handler)
        except h.BadRequest as exc:
            response = self.pages.error(exc.status, request=request, message=exc.reason, why=exc.reason)
            response.force_close()
            return response
        except web.HTTPException as exc:
            if exc.status < 400 or request.path.startswith("/api/"):
                raise
            return self.pages.error(exc.status, request=request)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except StoreError as exc:
            error_id = secrets.token_hex(4)
            log.warning("error %s: %s", error_id, exc)
            return self.pages.error(503, request=request, error_id=error_id)
        except Exception:
            error_id = secrets.token_hex(4)
            log.exception("error %s: unexpected", error_id)
            return self.pages.error(500, request=request, error_id=error_id)

    async def _dispatch(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        target = request.raw_path
        if request.version not in ((1, 0), (1, 1)):
            raise h.BadRequest("this server speaks HTTP/1.1", 505)
        h.check_request(
            request.method,
            target.encode("utf-8", "surrogateescape"),
            request.raw_headers,
            http11=request.version >= (1, 1),
        )
        peer = (
            str((request.transport.get_extra_info("peername") or ("",))[0])
            if request.transport is not None
            else ""
        )
        address = h.client_address(peer, request.raw_headers, self.config.edge.trusted_proxies)
        # What is not UTF-8 could be stored nowhere.
        agent = request.headers.get("User-Agent", "")[:200].encode("utf-8", "replace").decode("utf-8")
        request[CLIENT] = Client(address, agent)
        # A trusted proxy ends TLS for us; what it was spoken to as is our public scheme.
        proxied = h.within(peer, self.config.edge.trusted_proxies)
        request[SCHEME] = "https" if request.secure else self.origins.scheme if proxied else "http"
        challenge = self._challenge(request)
        if challenge is not None:
            return challenge
        share_id = self.origins.share_of(request.host)
        if share_id is not None:
            request[SHARE_ID] = share_id
            if not target.startswith(RESERVED_PREFIX):
                return await self.relay.handle(request, share_id)
        elif not self.origins.is_main(request.host):
            raise h.BadRequest("no such host here", 421)
        # Of the decoded path, which is what the router looks at.
        elif request.path.startswith(RESERVED_PREFIX) and not request.path.startswith(
            (ASSETS_PREFIX, HOOKS_PREFIX)
        ):
            raise web.HTTPNotFound
        elif self._seat is not None and request.path.startswith("/api/") and request.method != "DELETE":
            await self._seat.look_around()
        elif self._seat is not None and request.path.startswith("/console"):
            async with self._seat.for_owner():
                return await handler(request)
        return await handler(request)

    async def _own_fields(self, request: web.Request, response: web.StreamResponse) -> None:
        """Of all answers of our own; the first on each host is one. The relay's are written elsewhere."""
        # Otherwise aiohttp says which Python and which aiohttp this is.
        response.headers["Server"] = "Guestpass"
        if self._hsts and request.get(SCHEME) == "https":
            response.headers["Strict-Transport-Security"] = self._hsts

    def _count_refused(self, status: int) -> None:
        self.metrics.refused.labels(str(status)).inc()

    def _challenge(self, request: web.Request) -> web.Response | None:
        """The answer to a challenge of ACME that is under way."""
        text = self.acme.answer(request.host, request.raw_path) if self.acme is not None else None
        if text is None or request.method not in ("GET", "HEAD"):
            return None
        return web.Response(body=text.encode("ascii"), content_type="application/octet-stream")

    def _plain_app(self) -> web.Application:
        """For `redirect_listen`: challenges, and the way to https."""

        async def answer(request: web.Request) -> web.StreamResponse:
            challenge = self._challenge(request)
            if challenge is not None:
                return challenge
            origin = self.origins.named(request.host.lower().partition(":")[0])
            if origin is None:
                return self.pages.error(421, request=request)
            if request.method not in ("GET", "HEAD"):
                # Sent again over https it would be too late: what it holds has passed in the clear.
                return self.pages.error(403, request=request, message="This is spoken over https only.")
            headers = {"Location": origin + request.raw_path, "Cache-Control": "no-store"}
            return web.Response(status=308, headers=headers)

        app = web.Application(client_max_size=MAX_OWN_BODY)
        app.router.add_route("*", "/{path:.*}", answer)
        app.on_response_prepare.append(self._own_fields)
        return app

    async def _jwks(self, request: web.Request) -> web.Response:
        return web.Response(
            body=orjson.dumps(self.keys.jwks),
            content_type="application/json",
            headers={"Cache-Control": f"public, max-age={JWKS_SECONDS}"},
        )

    async def _admin_app(self) -> str:
        self._admin = Admin(
            self.config.edge.admin_listen,
            metrics=self._metrics,
            faults=self.faults,
            pages=self.pages,
            refused=self.metrics.refused,
            limits=self.config.limits,
            certificates=self.acme.status if self.acme is not None else None,
        )
        return await self._admin.start()

    async def _metrics(self) -> bytes:
        return generate_latest(self.metrics.registry)

    async def faults(self) -> dict[str, str]:
        faults: dict[str, str] = dict(self.plugins.health())
        if self._draining:
            faults["edge"] = "draining"
        return faults


def idles(connection: Connection, limits: configuration.Limits) -> bool:
    """Whether a visitor's connection is between requests, and has been for a while."""
    limit = connection.time_limit
    times = {"IDLE": limits.idle_seconds, "HEAD": limits.head_seconds}
    if limit is None or limit[0] not in times:
        return False
    return time.monotonic() - (limit[1] - times[limit[0]]) > HAND_OVER_IDLE


async def work(config: EdgeConfig, seat: Seat) -> None:
    """Be a worker until the supervisor says so, or is gone. Faults of the start are told to it."""
    edge = Edge(config, seat=seat)
    try:
        await edge.start()
    except GuestpassError as exc:
        await seat.failed(exc)
        return
    spare_collector()
    try:
        await seat.serve()
    finally:
        await edge.stop()


def _no_workers() -> None:
    """SIGUSR2 would end this process: the script that sends it may not know how many workers there are."""
    log.warning("SIGUSR2 replaces workers one after the other, and this edge has one process (edge.workers)")


async def serve(
    config: EdgeConfig, *, ready: Callable[[dict[str, Any]], None], restored: bool = False
) -> None:
    """Run an edge until SIGTERM or SIGINT, which drain it (a second one stops at once); SIGHUP reloads. Raises
    GuestpassError when it cannot start."""
    edge = Edge(config, restored=restored)
    line = await edge.start()
    spare_collector()
    try:
        with Signals(on_reload=edge.reload, on_roll=_no_workers) as signals:
            ready(line)
            await signals.stop.wait()
            drained = asyncio.ensure_future(edge.drain())
            hurried = asyncio.ensure_future(signals.hurry.wait())
            await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
            drained.cancel()
            hurried.cancel()
            await asyncio.gather(drained, hurried, return_exceptions=True)
    finally:
        await edge.stop()
