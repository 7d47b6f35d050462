"""Two ends of a tunnel over a loopback socket, plain or TLS, as the edge and the gateway have them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from guestpass import loop as loops
from guestpass.edge.tunnels import Tunnels
from guestpass.gateway import dial
from guestpass.local_ca import write_certificates
from guestpass.model import Event
from guestpass.mux.handshake import Hello, certificate_hash
from guestpass.mux.link import End, GatewayLink
from guestpass.mux.stream import TunnelStream
from guestpass_speedups.session import Budget, Session

SITE = "plant"
NAME = "plant-1"
SERVICE = "dash"
HEAD = b"GET /x HTTP/1.1\r\nhost: a.example\r\n\r\n"
INFO = {"services": {SERVICE: {"healthy": True}}, "weight": 1, "labels": {}, "load": {"streams": 0}}


async def until(condition: Callable[[], Any], what: str, *, seconds: float = 10) -> None:
    """Wait for `condition`; AssertionError that names `what`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.005)


class Front(asyncio.Protocol):
    """Takes the first head of a connection and hands over to the tunnels, as the edge's listener does."""

    def __init__(self, accept: Callable[[asyncio.Transport, bytes, bytes], None]) -> None:
        self._accept = accept
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end >= 0:
            assert self._transport is not None
            self._accept(self._transport, self._received[: end + 4], self._received[end + 4 :])


@dataclass
class TestEdge:
    """`Tunnels` behind a socket. `keys` are enrolled: (site, name) → public key."""

    __test__ = False

    tunnels: Tunnels
    url: str
    ca: Path | None
    keys: dict[tuple[str, str], bytes]
    events: list[Event]
    touched: list[tuple[str, str]]
    servers: list[asyncio.Server]
    budget: Budget
    gate: Callable[[], Awaitable[None]] | None = None
    certificate: bytes | None = None

    def enrol(self, key: Ed25519PrivateKey, site: str = SITE, name: str = NAME) -> None:
        self.keys[site, name] = key.public_key().public_bytes_raw()

    def kinds(self) -> list[str]:
        return [event.type for event in self.events]


@contextlib.asynccontextmanager
async def edge(
    folder: Path, *, tls: bool, binding: bytes | None = b"own", host: str = "127.0.0.1"
) -> AsyncIterator[TestEdge]:
    """`binding`: b"own" for the certificate's own hash, another value in its place, None to switch it off."""
    context = ca = None
    expected: bytes | None = b""
    if tls:
        folder = folder / "tls"
        folder.mkdir(exist_ok=True)
        ca = folder / "ca.pem"
        if not ca.exists():
            write_certificates(folder, ("localhost", "127.0.0.1"))
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        expected = certificate_hash(ssl.PEM_cert_to_DER_cert((folder / "cert.pem").read_text("ascii")))
    if binding != b"own":
        expected = binding
    keys: dict[tuple[str, str], bytes] = {}
    events: list[Event] = []
    touched: list[tuple[str, str]] = []
    budget = Budget()
    made: TestEdge

    async def find_key(site: str, name: str, key: bytes) -> bool:
        if made.gate is not None:
            await made.gate()
        return keys.get((site, name)) == key

    tunnels = Tunnels(
        edge_name="test edge",
        find_key=find_key,
        budget=budget,
        certificate_hash=lambda transport: made.certificate,
        on_event=events.append,
        touched=lambda site, name: touched.append((site, name)),
    )
    server = await loops.create_server(lambda: Front(tunnels.accept), host=host, port=0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    url = f"https://localhost:{port}" if tls else f"http://{host}:{port}"
    made = TestEdge(tunnels, url, ca, keys, events, touched, [server], budget, certificate=expected)
    try:
        yield made
    finally:
        tunnels.close()
        server.close()
        await tunnels.wait_closed()


@dataclass
class TestGateway:
    """Owner of one `GatewayLink`; streams that the edge opens are collected in `streams` or served by `serve`."""

    __test__ = False

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    site: str = SITE
    name: str = NAME
    epoch: int = 1
    edge_name: str | None = None
    serve: Callable[[TunnelStream, str, bytes], Awaitable[None]] | None = None
    new_session: Callable[..., Session] | None = None
    budget: Budget = field(default_factory=Budget)
    ready: int = 0
    infos: list[Any] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    streams: list[TunnelStream] = field(default_factory=list)
    links: list[GatewayLink] = field(default_factory=list)

    def link_ready(self, link: GatewayLink) -> None:
        self.ready += 1
        link.send_info(INFO)

    def link_info(self, link: GatewayLink, fields: Any) -> None:
        self.infos.append(fields)

    def link_ended(self, link: GatewayLink, end: End) -> None:
        self.ends.append(end)

    async def _serve(self, stream: TunnelStream, service: str, head: bytes) -> None:
        self.streams.append(stream)
        if self.serve is not None:
            await self.serve(stream, service, head)
        else:
            await stream.wait_closed()

    def make(self, host: str = "edge") -> GatewayLink:
        return GatewayLink(
            self,
            budget=self.budget,
            hello=Hello(role="gateway", epoch=self.epoch),
            host=host,
            site=self.site,
            name=self.name,
            key=self.key,
            serve=self._serve,
            new_session=self.new_session,
            edge_name=self.edge_name,
        )

    async def dial(self, to: TestEdge, *, proxy: str | None = None) -> GatewayLink:
        """Connect; does not wait for the verdict."""
        where = dial.edge_at(to.url, ca=to.ca, http_proxy=proxy)
        _, link = await dial.connect(where, lambda: self.make(where.authority))
        self.links.append(link)
        return link

    async def join(self, to: TestEdge, **settings: Any) -> GatewayLink:
        """Connect, and wait until streams can be opened."""
        link = await self.dial(to, **settings)
        await until(lambda: link.ready or link.end is not None, "a verdict")
        assert link.ready, link.end
        await until(lambda: to.tunnels.candidates(self.site, SERVICE), "INFO at the edge")
        return link

    async def close(self) -> None:
        for link in self.links:
            link.abort()
        for link in self.links:
            if link.transport is not None:
                await link.closed
