"""The services of a gateway: what it may reach, how it connects, and what it says about that.

The exchanges themselves (heads, bodies, pooled connections) are `guestpass_speedups.upstream`, which asks here for a
connection, for a judgement on method and path where there are rules, and for a line in the log when something is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from guestpass import loop as loops
from guestpass import scope
from guestpass.config import Service
from guestpass.errors import ConfigError
from guestpass.gateway.dial import connect_tcp, describe
from guestpass.gateway.health import Health
from guestpass.model import Scope
from guestpass_speedups.session import Budget, ErrorCode
from guestpass_speedups.upstream import Connection, Pool, Services, UpstreamSession

if TYPE_CHECKING:
    from guestpass_speedups.session import SessionHandler

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
    for those with a shorter one (Node 5 s, gunicorn 2 s) an idempotent request is sent once more."""
    idle_connections: int = 64
    """Unused connections kept for a service: browsers open six for a host, so this is ten visitors at once. More are
    closed when they were not used for a second, not before: in a rush they would be made anew at once."""
    unsafe_idle: float = 1.0
    """A request that must not be sent twice takes a pooled connection only if it was used in the last second, which is
    less than any service's keep-alive time-out."""
    half_closed: float = 10.0
    """How long a TLS service may go on sending on an upgraded connection after the visitor's end of it."""
    interim: int = 32
    """SPEC.md, chapter 2.2."""


class Target(Pool):
    """One service as configured, its rules, its connections and its health."""

    def __init__(
        self,
        name: str,
        service: Service,
        limits: Limits,
        resolve: Callable[[Path], Path],
        health: Health,
    ) -> None:
        """Raises ConfigError when the CA file cannot be used."""
        parts = urlsplit(service.url)
        host, origin = naming(service.url, service.host_header)
        # Where everything is exposed no path can be out of bounds, so none is refused for being ambiguous.
        self._open_paths = service.paths == ("/**",)
        super().__init__(
            name,
            host=host,
            origin=origin,
            guarded=not (self._open_paths and "*" in service.methods),
            limits=limits,
        )
        self.service = service
        self.scheme = parts.scheme
        self._limits = limits
        self._health = health
        self._path = parts.path
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = _client_context(name, service, resolve) if parts.scheme == "https" else None
        self._scopes = tuple(Scope(method, path) for method in service.methods for path in service.paths)
        self._tasks: set[asyncio.Task[None]] = set()

    # ── for the exchanges ────────────────────────────────────────────────────────────────────────────────────────

    def admits(self, method: bytes, target: bytes) -> bool:
        name = method.decode("ascii")
        if not self._open_paths:
            return scope.admits(self._scopes, name, target.decode("ascii"))
        methods = self.service.methods
        return "*" in methods or name in methods or (name == "HEAD" and "GET" in methods)

    def start_connecting(self) -> None:
        task = asyncio.get_running_loop().create_task(self._make_connection())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make_connection(self) -> None:
        try:
            connection = await self.connect()
        except OSError as exc:
            self._health.failed(self.name, describe(exc))
            self.not_connected()
        except BaseException:
            self.not_connected()
            raise
        else:
            self._health.succeeded(self.name)
            self.connected(connection)

    def note(self, code: int, text: str) -> None:
        if code == ErrorCode.REFUSED:
            log.info("service %s: a request was refused: %s", self.name, text)
        elif code == ErrorCode.PROTOCOL_ERROR:
            log.warning("service %s: a request was given up: %s", self.name, text)
        elif code == ErrorCode.TIMEOUT:
            log.warning("service %s: no answer within %.0f s", self.name, self._limits.response)
        else:
            log.warning("service %s: bad answer: %s", self.name, text)

    # ── connecting ───────────────────────────────────────────────────────────────────────────────────────────────

    async def connect(self) -> Connection:
        """A new connection. Raises OSError (TimeoutError is one)."""
        async with asyncio.timeout(self._limits.connect):
            if self.scheme == "unix":
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_unix_connection(lambda: Connection(self), self._path)
                return connection
            sock = await connect_tcp(self._host, self._port)
            try:
                _, connection = await loops.create_connection(
                    lambda: Connection(self, half_close=self._tls is None),
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

    async def stop(self) -> None:
        """Make no more connections."""
        self.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def naming(url: str, host_header: str) -> tuple[bytes, bytes]:
    """What a service is called to itself, for its `url` and `host_header` (see gateway.toml): (Host, Origin). Both
    empty: as the visitor calls it.

    With "upstream" the service sees its own name in Host, and in Origin and Referer where those name the share's origin
    (Bokeh, JupyterLab and Streamlit refuse WebSockets otherwise). Any other Origin stays: rewriting it would defeat the
    application's own cross-site check. The other way round, Location is rewritten back where it names the service's own
    origin.
    """
    if host_header == "public":
        return b"", b""
    parts = urlsplit(url)
    scheme = "http" if parts.scheme == "unix" else parts.scheme
    if host_header != "upstream":
        host = host_header
    elif parts.scheme == "unix":
        host = "localhost"
    else:
        name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        default = 443 if scheme == "https" else 80
        host = name if parts.port in (None, default) else f"{name}:{parts.port}"
    return host.encode("ascii"), f"{scheme}://{host}".encode("ascii")


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


class _Table(Services):
    def unknown(self, service: bytes) -> None:
        name = service[:64].decode("ascii")
        log.info("a stream was refused: this gateway has no service %s", name)


class Upstream:
    """All services of a gateway. `new_session` makes the session of a `GatewayLink`."""

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
        self.health = Health(on_health)
        self._targets = {
            name: Target(name, service, self._limits, resolve, self.health)
            for name, service in services.items()
        }
        self.table = _Table()
        """What sessions look services up in."""
        self.table.use(self._targets)
        self.health.watch(self._targets)

    def new_session(self, handler: SessionHandler, budget: Budget, **limits: Any) -> UpstreamSession:
        session = UpstreamSession(False, handler, budget, **limits)
        session.services = self.table
        return session

    def configure(
        self, services: Mapping[str, Service], resolve: Callable[[Path], Path] = lambda path: path
    ) -> None:
        """Other services from now on. Streams of a service that is no longer there are ended; others go on, new ones
        follow the new rules. Raises ConfigError; then nothing has changed."""
        targets = {
            name: old
            if (old := self._targets.get(name)) is not None and old.service == service
            else Target(name, service, self._limits, resolve, self.health)
            for name, service in services.items()
        }
        before, self._targets = self._targets, targets
        self.table.use(targets)
        for name, target in before.items():
            if targets.get(name) is not target:
                target.close()
            if name not in targets:
                for stream in list(target.streams):
                    stream.end(ErrorCode.REFUSED)
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
            await target.stop()


__all__ = ["Limits", "Target", "Upstream", "naming"]
