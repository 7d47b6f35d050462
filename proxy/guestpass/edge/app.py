"""The edge, wired together: the only place that knows all of its parts.

`serve(config)` runs one edge until SIGTERM or SIGINT. Start-up order: what can be wrong in the configuration (plugins,
keys, certificates), the store, then the parts, then the listeners: a fault stops the start, not the first visitor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable
from itertools import repeat
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import generate_latest

from guestpass import config as configuration
from guestpass.config import EdgeConfig
from guestpass.daemon import Signals, reloading
from guestpass.edge import headers as h
from guestpass.edge.admin import Admin, ServerLog
from guestpass.edge.admission import Admission
from guestpass.edge.api import Api
from guestpass.edge.api import routes as api_routes
from guestpass.edge.assertion import Signer
from guestpass.edge.console import Console
from guestpass.edge.events import EventHub
from guestpass.edge.front import HANDLER_KEEPALIVE, Answered, FastLane, House
from guestpass.edge.grants import GrantTable
from guestpass.edge.home import (
    Home,
    api_key_of,
    make_state_folder,
    plugin_secret,
    ready_line,
    with_notifiers,
)
from guestpass.edge.keys import CLIENT, SCHEME, SHARE_ID
from guestpass.edge.listener import Listener
from guestpass.edge.metrics import Metrics
from guestpass.edge.origins import Origins
from guestpass.edge.pages import Pages
from guestpass.edge.plugins import PluginSet
from guestpass.edge.relay import RETRY_AFTER, Relay
from guestpass.edge.tunnels import Tunnels, own_certificate_hash
from guestpass.edge.worker import Seat
from guestpass.errors import ConfigError, GuestpassError, StoreError
from guestpass.model import Revocation, Revoked
from guestpass.plugin import Client
from guestpass_speedups.relay import HEAD_TIMEOUT, IDLE_TIMEOUT, Connection, Lane
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

# What a connection waits for while it does nothing, and for how long it may.
IDLE_TIMES = {"IDLE": IDLE_TIMEOUT, "HEAD": HEAD_TIMEOUT}

# Kinds of plugins that a worker has; the others are the supervisor's.
DECIDING = frozenset(("authenticate", "revoke", "choose", "filter"))

# A JSON or form body for our own handlers; shared applications' bodies stream and have no cap.
MAX_OWN_BODY = 256 * 1024


class Edge:
    """One edge process. `start`, then `drain` and `stop`."""

    def __init__(self, config: EdgeConfig, seat: Seat | None = None) -> None:
        """`seat`: of one worker among several; without one, the edge is this process."""
        self.config = config
        self._seat = seat
        self._listeners: list[Listener] = []
        self._lanes: list[Lane] = []
        self._admin: Admin | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._cleanups: list[Callable[[], Awaitable[None]]] = []
        self._tls: ssl.SSLContext | None = None
        self._certificate_hash = b""
        self._draining = False

    async def start(self) -> dict[str, Any]:
        """Bring everything up; returns the `ready` line. Raises GuestpassError; what was started is undone then."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> dict[str, Any]:
        config, edge = self.config, self.config.edge
        seat = self._seat
        state = make_state_folder(config)
        self.origins = Origins(edge.public_url, edge.share_domain)
        self._load_tls()
        self.metrics = Metrics()
        self.signer = Signer(state / "assertion.key", edge.public_url)
        api_key, api_key_file = api_key_of(config, state)
        self.grants: GrantTable
        home: Home | None = None
        if seat is None:
            self.plugins = PluginSet.load(with_notifiers(config), observe_hook=self.metrics.observe_hook)
            self.events = EventHub()
            home = await Home.open(
                config,
                events=self.events,
                notifiers=self.plugins.notifiers,
                origins=self.origins,
                renew=lambda share, sessions: self.grants.renew(share, sessions),
            )
            self._cleanups.append(home.close)
            home.bus.subscribe(self._revoke)
            self.service = home.service
            notify, publish = home.courier.enqueue, home.bus.publish
        else:
            self.plugins = PluginSet.load(config, observe_hook=self.metrics.observe_hook, only=DECIDING)
            self.events = seat.events
            self.service = seat.service
            notify, publish = seat.enqueue, seat.publish
        service = self.service
        self.grants = GrantTable(touched=service.touch if seat is None else seat.touch_later)
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
        self.pages = Pages(self.origins)
        self.admission = Admission(
            origins=self.origins,
            service=service,
            plugins=self.plugins,
            grants=self.grants,
            tunnels=self.tunnels,
            pages=self.pages,
            events=self.events,
            metrics=self.metrics,
            agree=seat.agree if seat is not None else None,
        )
        self.lane = FastLane(
            grants=self.grants,
            tunnels=self.tunnels,
            signer=self.signer,
            origins=self.origins,
            # Filters see every request, and they are Python.
            fast=edge.fast_lane and not self.plugins.filters,
        )
        self._lanes.append(self.lane)
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
        )
        self.metrics.watch_lane(lambda: self.lane.services.values(), lambda: self.lane.durations)
        self.metrics.watch(
            grants=lambda: len(self.grants),
            streams=lambda: self.grants.all_streams,
            tunnels=lambda: [(s.site, s.name, s.tunnels, s.rtt) for s in self.tunnels.held()],
            tunnel_bytes=lambda: (self.tunnels.bytes_received, self.tunnels.bytes_sent),
        )
        if seat is not None:
            seat.settle(self)
        await self.plugins.start(
            service,
            self.events,
            notify=notify,
            revoke=publish,
            fail_closed=self.grants.end_all,
            secret=plugin_secret(state),
        )
        self._cleanups.append(self.plugins.stop)
        if home is not None:
            await home.courier.start()
            self._cleanups.append(home.courier.stop)
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
        )
        self.house = House(
            lane=self.lane,
            handler=await self._visitor_app(api, console),
            tunnel=self.tunnels.accept,
            pages=self.pages,
            refused=self._count_refused,
            trusted_proxies=edge.trusted_proxies,
            scheme=self.origins.scheme,
        )
        admin_url = await self._admin_app() if seat is None else ""
        for url, sock in zip(edge.listen, seat.sockets if seat is not None else repeat(None), strict=False):
            listener = Listener(url, self._tls, sock)
            await listener.start(self.house.front)
            self._listeners.append(listener)
        self._tasks.append(asyncio.create_task(self._sweep(), name="sweep"))
        return ready_line(
            config,
            listen=[listener.url for listener in self._listeners],
            admin_url=admin_url,
            api_key_file=api_key_file,
            pid=os.getpid(),
        )

    async def drain(self, *, replaced: bool = False) -> None:
        """Stop accepting, tell the gateways, let what runs finish, at most `drain_seconds`. `replaced`: other workers
        go on, so nobody may notice that this one leaves."""
        self._draining = True
        for listener in self._listeners:
            listener.close()
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
            self._busy() or self.tunnels.streams or not all(map(idles, self.lane.connections))
        ):
            await asyncio.sleep(DRAIN_POLL)

    def _busy(self) -> bool:
        """Whether anything is open: of visitors here, or of other workers'."""
        return bool(self.grants.all_streams) or (self._seat is not None and self._seat.busy)

    async def stop(self) -> None:
        """Undo `start` in reverse order. Never raises."""
        for listener in self._listeners:
            listener.close()
        if self._admin is not None:
            await self._admin.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
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

    def reload(self) -> None:
        """SIGHUP: certificates are read again; a configuration with faults changes nothing. Live streams stay."""
        with reloading():
            self._reload()

    def _reload(self) -> None:
        try:
            fresh = configuration.load_edge(self.config.file)
            if fresh.edge.tls is not None and self._tls is not None:
                # First where nobody is served: a key that does not fit would leave the context without any.
                load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), fresh, fresh.edge.tls)
                load_certificate(self._tls, fresh, fresh.edge.tls)
                self._certificate_hash = own_certificate_hash(fresh.resolve(fresh.edge.tls.cert))
            elsewhere = [
                f"{prefix}{name}"
                for prefix, new, old in (("edge.", fresh.edge, self.config.edge), ("", fresh, self.config))
                for name in sorted(type(new).model_fields)
                if name not in ("edge", "file", "tls") and getattr(new, name) != getattr(old, name)
            ]
            if elsewhere:
                log.warning("reload: a restart is needed for changes of: %s", ", ".join(elsewhere))
            log.info("reloaded %s", self.config.file)
        except GuestpassError as exc:
            log.error("reload: %s; nothing was changed", exc)

    # ── parts of start ───────────────────────────────────────────────────────────────────────────────────────────

    def _load_tls(self) -> None:
        tls = self.config.edge.tls
        if tls is None:
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        load_certificate(context, self.config, tls)
        self._tls = context
        self._certificate_hash = own_certificate_hash(self.config.resolve(tls.cert))

    def _binding(self, transport: asyncio.BaseTransport) -> bytes | None:
        """What a gateway's proof on this connection must be bound to; None where the binding is switched off."""
        if not self.config.edge.tunnel_binding:
            return None
        if self.config.edge.tunnel_certificate_hash is not None:
            return bytes.fromhex(self.config.edge.tunnel_certificate_hash)
        return self._certificate_hash if transport.get_extra_info("sslcontext") is not None else b""

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
            try:
                await self.service.sweep()
            except GuestpassError as exc:
                log.warning("sweep: %s", exc)
            except Exception:  # a loop that ended would never clear anything again
                log.exception("sweep")

    # ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _visitor_app(self, api: Api, console: Console) -> Callable[[], asyncio.BaseProtocol]:
        app = web.Application(middlewares=[self._front], client_max_size=MAX_OWN_BODY)
        app.add_routes(self.admission.main_routes())
        app.add_routes(self.admission.share_routes())
        app.add_routes(self.pages.asset_routes())
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
        app.on_response_prepare.append(_without_versions)
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
            self._count_refused(exc.status)
            response = self.pages.error(exc.status, request=request, message=exc.reason)
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
            return self.pages.error(503, request=request, error_id=error_id, retry_after=RETRY_AFTER)
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
        request[CLIENT] = Client(address, request.headers.get("User-Agent", "")[:200])
        # A trusted proxy ends TLS for us; what it was spoken to as is our public scheme.
        proxied = h.within(peer, self.config.edge.trusted_proxies)
        request[SCHEME] = "https" if request.secure else self.origins.scheme if proxied else "http"
        share_id = self.origins.share_of(request.host)
        if share_id is not None:
            request[SHARE_ID] = share_id
            if not target.startswith(RESERVED_PREFIX):
                return await self.relay.handle(request, share_id)
        elif not self.origins.is_main(request.host):
            raise h.BadRequest("no such host here", 421)
        # Of the decoded path, which is what the router looks at.
        elif request.path.startswith(RESERVED_PREFIX) and not request.path.startswith(ASSETS_PREFIX):
            raise web.HTTPNotFound
        elif self._seat is not None and request.path.startswith("/api/") and request.method != "DELETE":
            await self._seat.look_around()
        elif self._seat is not None and request.path.startswith("/console"):
            async with self._seat.for_owner():
                return await handler(request)
        return await handler(request)

    def _count_refused(self, status: int) -> None:
        self.metrics.refused.labels(str(status)).inc()

    async def _jwks(self, request: web.Request) -> web.Response:
        return web.Response(
            body=orjson.dumps(self.signer.jwks),
            content_type="application/json",
            headers={"Cache-Control": "public, max-age=300"},
        )

    async def _admin_app(self) -> str:
        self._admin = Admin(
            self.config.edge.admin_listen,
            metrics=self._metrics,
            faults=self.faults,
            pages=self.pages,
            refused=self.metrics.refused,
        )
        return await self._admin.start()

    async def _metrics(self) -> bytes:
        return generate_latest(self.metrics.registry)

    async def faults(self) -> dict[str, str]:
        faults: dict[str, str] = dict(self.plugins.health())
        if self._draining:
            faults["edge"] = "draining"
        return faults


async def _without_versions(request: web.Request, response: web.StreamResponse) -> None:
    """Otherwise aiohttp says which Python and which aiohttp this is."""
    response.headers["Server"] = "Guestpass"


def load_certificate(context: ssl.SSLContext, config: EdgeConfig, tls: configuration.Tls) -> None:
    """Raises ConfigError that names the file."""
    cert, key = config.resolve(tls.cert), config.resolve(tls.key)
    for path in (cert, key):
        if not path.is_file():
            raise ConfigError(f'{config.file}: there is no file {path} (key "edge.tls")')
    try:
        context.load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as exc:
        raise ConfigError(
            f'{config.file}: {cert} and {key} do not load: {exc} (key "edge.tls")',
            hint="Both are PEM, the key belongs to the first certificate and has no pass phrase.",
        ) from exc


def idles(connection: Connection) -> bool:
    """Whether a visitor's connection is between requests, and has been for a while."""
    limit = connection.time_limit
    if limit is None or limit[0] not in IDLE_TIMES:
        return False
    return time.monotonic() - (limit[1] - IDLE_TIMES[limit[0]]) > HAND_OVER_IDLE


async def work(config: EdgeConfig, seat: Seat) -> None:
    """Be a worker until the supervisor says so, or is gone. Faults of the start are told to it."""
    edge = Edge(config, seat)
    try:
        await edge.start()
    except GuestpassError as exc:
        await seat.failed(exc)
        return
    try:
        await seat.serve()
    finally:
        await edge.stop()


async def serve(config: EdgeConfig, *, ready: Callable[[dict[str, Any]], None]) -> None:
    """Run an edge until SIGTERM or SIGINT, which drain it (a second one stops at once); SIGHUP reloads. Raises
    GuestpassError when it cannot start."""
    edge = Edge(config)
    line = await edge.start()
    try:
        with Signals(on_reload=edge.reload) as signals:
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
