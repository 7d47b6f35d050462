"""A gateway's upstream behind a real tunnel, and applications of bytes for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from support import tunnel
from support.tunnel import NAME, SERVICE, SITE, until

from guestpass.config import Service
from guestpass.gateway.upstream import Limits, Upstream
from guestpass.mux.stream import TunnelStream
from guestpass_speedups.session import Budget
from guestpass_speedups.upstream import Services, UpstreamSession, UpstreamStream

if TYPE_CHECKING:
    from guestpass_speedups.session import SessionHandler

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Answer:
    """A response as the edge gets it."""

    head: bytes
    body: bytes
    interim: list[bytes]
    trailers: bytes | None

    @property
    def status(self) -> int:
        return int(self.head.split(b" ")[1])

    def fields(self) -> list[tuple[bytes, bytes]]:
        lines = self.head[:-4].split(b"\r\n")[1:]
        return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


def new_session(handler: SessionHandler, budget: Budget, **limits: Any) -> UpstreamSession:
    """Without a service yet: see `Rig.use`."""
    session = UpstreamSession(False, handler, budget, **limits)
    session.services = Services()
    return session


@dataclass
class Rig:
    """An edge, one tunnel, and an `Upstream` at its far end."""

    edge: tunnel.TestEdge
    gateway: tunnel.TestGateway
    upstream: Upstream | None = None
    changes: list[dict[str, dict[str, bool | str]]] = field(default_factory=list)

    def use(self, limits: Limits | None = None, **services: Any) -> Upstream:
        """Services by name: a URL or a dict of settings."""
        configured = {
            name: Service(**settings) if isinstance(settings, dict) else Service(url=settings)
            for name, settings in services.items()
        }
        made = self.upstream = Upstream(configured, on_health=self._changed, limits=limits)
        for link in self.gateway.links:
            cast(UpstreamSession, link.session).services = made.table
        return made

    def far(self, service: str = SERVICE) -> UpstreamStream:
        """The only live stream of a service, at the gateway."""
        assert self.upstream is not None
        (stream,) = self.upstream._targets[service].streams
        return stream

    def _changed(self) -> None:
        assert self.upstream is not None
        self.changes.append(self.upstream.services())

    def open(
        self, head: bytes | str, *, service: str = SERVICE, fin: bool = True, body: bytes = b""
    ) -> TunnelStream:
        if isinstance(head, str):
            head = head.encode("latin-1")
        if not head.endswith(b"\r\n\r\n"):
            head += b"\r\nHost: a.example\r\n\r\n" if b"\r\n" not in head else b"\r\n\r\n"
        return self.edge.tunnels.open(SITE, NAME, service, head, fin=fin, body=body)

    async def ask(self, head: bytes | str, **more: Any) -> Answer:
        """One whole exchange."""
        return await answer(self.open(head, **more))


async def answer(stream: TunnelStream) -> Answer:
    async with asyncio.timeout(20):
        interim = []
        while (head := await stream.head()).interim:
            interim.append(head.data)
        body = bytearray()
        while data := await stream.read():
            body += data
    return Answer(head.data, bytes(body), interim, stream.trailers)


@dataclass
class App:
    """An application of bytes: `talk` has each connection to itself."""

    talk: Talk
    url: str = ""
    connections: int = 0
    open: int = 0
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.writers.add(writer)
        try:
            await self.talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            self.writers.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(talk: Talk, *, path: Path | None = None) -> AsyncIterator[App]:
    app = App(talk)
    if path is not None:
        server = await asyncio.start_unix_server(app.client, path)
        app.url = f"unix://{path}"
    else:
        server = await asyncio.start_server(app.client, "127.0.0.1", 0)
        app.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield app
    finally:
        server.close()
        for writer in app.writers:
            writer.transport.abort()
        await until(lambda: app.open == 0, "the application's connections closed")


def replies(*answers: bytes, close: bool = False) -> Talk:
    """Answers requests without bodies, one after the other, then closes or waits for the other end to."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply)
            await writer.drain()
        if not close:
            await reader.read()

    return talk
