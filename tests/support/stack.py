"""A whole Guestpass in the test's event loop: an edge, gateways that enrolled for real, and one share.

Everything goes over real sockets: visitors to the edge's plain listener, tunnels to its TLS listener.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.test_utils import make_mocked_request
from support.programs import free_port
from yarl import URL

from guestpass.config import EdgeConfig, GatewayConfig, parse
from guestpass.edge.app import Edge
from guestpass.edge.keys import CLIENT
from guestpass.gateway.agent import Agent
from guestpass.gateway.enroll import enroll
from guestpass.local_ca import write_certificates
from guestpass.model import Scope, SessionKind
from guestpass.plugin import Client
from guestpass.shares.service import NewShare

SITE = "plant"
SERVICE = "dash"
EMAIL = "alice@example.org"


@dataclass
class Response:
    """What a visitor got, read to the end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    raw: aiohttp.ClientResponse


@dataclass
class Stack:
    folder: Path
    edge: Edge
    port: int
    tunnel_url: str
    ca: Path
    app_url: str
    session: aiohttp.ClientSession
    metrics_url: str
    share_id: str = ""
    token: str = ""
    agents: dict[str, tuple[Agent, asyncio.Task[None]]] = field(default_factory=dict)

    @property
    def host(self) -> str:
        return f"{self.share_id}.localhost:{self.port}"

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def url(self, path: str) -> URL:
        """With `path` as it is: nothing is quoted again."""
        return URL(f"http://127.0.0.1:{self.port}{path}", encoded=True)

    async def new_share(self, **changes: Any) -> str:
        """Create a share for EMAIL; returns its id."""
        settings: dict[str, Any] = {
            "site": SITE,
            "service": SERVICE,
            "path": "/",
            "to": [EMAIL],
            "invite": False,
            **changes,
        }
        settings["scope"] = tuple(Scope(*rule.split(" ")) for rule in settings.get("scope", ()))
        created = await self.edge.service.create(NewShare(**settings))
        return created.share.id

    async def new_token(self, share_id: str, expires: float | None = None) -> str:
        _, token = await self.edge.service.create_token(share_id, EMAIL, expires)
        return token

    async def get(
        self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, **more: Any
    ) -> Response:
        """One request with the share's token, as a script would send it."""
        request = self.session.request(
            method,
            self.url(path),
            headers={"Host": self.host, **self.authorization, **(headers or {})},
            allow_redirects=False,
            **more,
        )
        async with request as response:
            return Response(response.status, response.headers, await response.read(), response)

    async def raw(self, data: bytes, *, seconds: float = 10) -> bytes:
        """Bytes to the edge and what comes back until it closes (or for `seconds`)."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(seconds):
                while part := await reader.read(65536):
                    received += part
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return received

    async def warm(self, share_id: str, secret: str, kind: SessionKind = SessionKind.TOKEN) -> None:
        """Have the edge meet a secret: a token's first request is always aiohttp's. The application is not asked."""
        request = make_mocked_request("GET", "/", headers={"Authorization": f"Bearer {secret}"})
        request[CLIENT] = Client("127.0.0.1")
        grant = await self.edge.admission.restore(share_id, kind, secret, request)
        self.edge.lane.learn(grant, secret)
        assert grant.entry is not None

    def answered(self, lane: str) -> int:
        """Requests that a lane has answered."""
        found = self.edge.metrics.registry.collect()
        (requests,) = (metric for metric in found if metric.name == "guestpass_requests")
        return sum(
            int(sample.value)
            for sample in requests.samples
            if sample.name.endswith("_total") and sample.labels["lane"] == lane
        )

    def head(self, method: str, path: str, *lines: str) -> bytes:
        """A request head with the share's token, to be sent as bytes."""
        first = (f"{method} {path} HTTP/1.1", f"Host: {self.host}", f"Authorization: Bearer {self.token}")
        return "\r\n".join((*first, *lines, "", "")).encode("latin-1")

    async def add_gateway(
        self, name: str, *, gateway: Mapping[str, Any] | None = None, **service: Any
    ) -> Agent:
        """Enrol and run one more gateway of the site. `gateway`: more of its section."""
        join_token = await self.edge.service.create_join_token(SITE)
        key = self.folder / f"{name}.key"
        await enroll(f"http://localhost:{self.port}", join_token, name, key, ca=self.ca)
        settings = {
            "gateway": {
                "name": name,
                "site": SITE,
                "edges": [self.tunnel_url],
                "ca": str(self.ca),
                "key": str(key),
                "drain_seconds": 0.5,
                **(gateway or {}),
            },
            "services": {SERVICE: {"url": self.app_url, **service}},
        }
        agent = Agent(parse(GatewayConfig, settings, self.folder / "gateway.toml"))
        self.agents[name] = (agent, asyncio.create_task(agent.run(), name=f"gateway {name}"))
        await self.until(lambda: self.is_ready(name), f"gateway {name} connected")
        return agent

    def is_ready(self, name: str) -> bool:
        return any(c.name == name for c in self.edge.tunnels.candidates(SITE, SERVICE))

    async def stop_gateway(self, name: str) -> None:
        _, task = self.agents.pop(name)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def until(self, condition: Any, what: str, *, seconds: float = 15) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, f"not within {seconds:g} s: {what}"
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    app_url: str,
    *,
    gateways: int = 1,
    share: Mapping[str, Any] | None = None,
    service: Mapping[str, Any] | None = None,
    edge: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    lane: str | None = None,
) -> AsyncIterator[Stack]:
    """An edge with `gateways` gateways in front of `app_url`, and a share with a token. `lane`: "aiohttp" switches the
    fast lane off, "fast" makes sure that it serves the first request of the test."""
    port, tunnel_port = free_port(), free_port()
    ca, cert, key = write_certificates(folder, ("localhost", "127.0.0.1", "::1"))
    settings = {
        **(config or {}),
        "edge": {
            "listen": [f"http://127.0.0.1:{port}", f"https://127.0.0.1:{tunnel_port}"],
            "admin_listen": "127.0.0.1:0",
            "public_url": f"http://localhost:{port}",
            "share_domain": f"localhost:{port}",
            "state": f"sqlite:///{folder}/state/edge.db",
            "outbox": str(folder / "outbox"),
            "tls": {"cert": str(cert), "key": str(key)},
            "drain_seconds": 1,
            "fast_lane": lane != "aiohttp",
            **(edge or {}),
        },
    }
    running_edge = Edge(parse(EdgeConfig, settings, folder / "edge.toml"))
    ready = await running_edge.start()
    try:
        async with aiohttp.ClientSession(
            auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        ) as session:
            stack = Stack(
                folder,
                running_edge,
                port,
                f"https://localhost:{tunnel_port}",
                ca,
                app_url,
                session,
                ready["metrics"],
            )
            try:
                for number in range(1, gateways + 1):
                    await stack.add_gateway(f"gw-{number}", **(service or {}))
                stack.share_id = await stack.new_share(**(share or {}))
                stack.token = await stack.new_token(stack.share_id)
                if lane == "fast":
                    await stack.warm(stack.share_id, stack.token)
                yield stack
            finally:
                for name in list(stack.agents):
                    await stack.stop_gateway(name)
    finally:
        await running_edge.stop()


class RawServer:
    """An application of bytes: each connection is given to `talk`, which reads and writes what it likes."""

    def __init__(self, talk: Any) -> None:
        self._talk = talk
        self._server: asyncio.Server | None = None
        self.connections = 0
        self.url = ""

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def __aenter__(self) -> RawServer:
        self._server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        if hasattr(self._server, "close_clients"):
            self._server.close_clients()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port
