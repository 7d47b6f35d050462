"""A whole gateway: it connects, stays connected, says what changed, and leaves in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support import tunnel
from support.programs import free_port
from support.tunnel import HEAD, NAME, SERVICE, SITE, TestEdge, TestGateway, until
from support.upstream import App, replies, serving

from guestpass import loop as loops
from guestpass.config import GatewayConfig, parse
from guestpass.edge import tunnels as tunnels_module
from guestpass.errors import ConfigError, NoGateway
from guestpass.gateway import agent as agent_module
from guestpass.gateway import health as health_module
from guestpass.gateway.agent import Agent, EdgeState, EdgeStatus
from guestpass.gateway.enroll import load_key, load_or_create_key
from guestpass.mux.stream import StreamReset
from guestpass_speedups.session import ErrorCode

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter pauses; what they are for stays."""
    monkeypatch.setattr(agent_module, "BACKOFF_FIRST", 0.02)
    monkeypatch.setattr(agent_module, "BACKOFF_MOST", 0.1)
    monkeypatch.setattr(agent_module, "REFUSED_FIRST", 0.05)
    monkeypatch.setattr(agent_module, "REFUSED_MOST", 0.1)
    monkeypatch.setattr(agent_module, "GOOD_AFTER", 0.05)
    monkeypatch.setattr(health_module, "INTERVAL", 0.05)
    monkeypatch.setattr(health_module, "INTERVAL_DOWN", 0.02)


class Running:
    """Agents of one test, ended with it."""

    def __init__(self, folder: Path, edge: TestEdge, app: App) -> None:
        self.folder = folder
        self.edge = edge
        self.app = app
        self.ready = 0
        self.tasks: dict[Agent, asyncio.Task[None]] = {}

    def config(self, *, services: dict[str, Any] | None = None, **gateway: Any) -> GatewayConfig:
        settings = {
            "name": NAME,
            "site": SITE,
            "edges": [self.edge.url],
            "key": "gateway.key",
            "drain_seconds": 0.2,
            **({"ca": str(self.edge.ca)} if self.edge.ca else {}),
            **gateway,
        }
        if services is None:
            services = {SERVICE: {"url": self.app.url}}
        return parse(GatewayConfig, {"gateway": settings, "services": services}, self.folder / "gateway.toml")

    def start(self, config: GatewayConfig | None = None) -> Agent:
        agent = Agent(config or self.config(), on_ready=self._ready)
        self.tasks[agent] = asyncio.create_task(agent.run())
        return agent

    def _ready(self) -> None:
        self.ready += 1

    async def joined(self, config: GatewayConfig | None = None) -> Agent:
        agent = self.start(config)
        await until(lambda: self.edge.tunnels.candidates(SITE, SERVICE), "the gateway is a candidate")
        return agent

    async def stop(self, agent: Agent) -> None:
        task = self.tasks.pop(agent)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest_asyncio.fixture(params=[False, True], ids=["plain", "tls"])
async def edge(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TestEdge]:
    async with tunnel.edge(tmp_path, tls=request.param) as made:
        yield made


@pytest_asyncio.fixture
async def running(edge: TestEdge, tmp_path: Path) -> AsyncIterator[Running]:
    async with serving(replies(*[OK] * 100)) as app:
        edge.enrol(load_or_create_key(tmp_path / "gateway.key"))
        made = Running(tmp_path, edge, app)
        yield made
        for agent in list(made.tasks):
            await made.stop(agent)


def status(agent: Agent) -> EdgeStatus:
    return agent.status().edges[0]


async def get(edge: TestEdge, *, service: str = SERVICE) -> bytes:
    stream = edge.tunnels.open(SITE, NAME, service, HEAD, fin=True)
    async with asyncio.timeout(5):
        await stream.head()
        return await stream.read()


def said(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.message for record in caplog.records if words in record.message]


async def test_connects_with_its_tunnels(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    agent = await running.joined(running.config(tunnels=3, weight=5, labels={"zone": "hall"}))
    await until(lambda: running.edge.tunnels.status()[0].tunnels == 3, "three tunnels")
    (candidate,) = running.edge.tunnels.candidates(SITE, SERVICE)
    assert (candidate.weight, candidate.labels) == (5, {"zone": "hall"})
    assert await get(running.edge) == b"ok"
    found = agent.status()
    assert (found.site, found.name, found.services[SERVICE]["healthy"]) == (SITE, NAME, True)
    assert (status(agent).state, status(agent).tunnels, status(agent).problem) == (EdgeState.CONNECTED, 3, "")
    assert running.ready == 1
    assert len(said(caplog, "connected to edge")) == 1


async def test_first_info_is_true(running: Running) -> None:
    """The gateway looks at its services before it calls: no session is sent to one that is down, none is lost."""
    services = {SERVICE: {"url": running.app.url}, "down": {"url": f"http://127.0.0.1:{free_port()}"}}
    running.start(running.config(services=services))
    await until(lambda: running.edge.tunnels.status() and running.edge.tunnels.status()[0].services, "INFO")
    assert running.edge.tunnels.status()[0].services == {SERVICE: True, "down": False}


async def test_comes_back_after_the_edge_was_away(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    edge = running.edge
    agent = await running.joined()
    port = int(edge.url.rpartition(":")[2])
    edge.servers[0].close()
    for link in list(edge.tunnels._links):
        link.abort()
    await until(lambda: status(agent).state is EdgeState.LOST, "the loss is noticed")
    await until(lambda: "refused" in status(agent).problem.lower(), "the edge is away")
    before = len(caplog.records)
    await asyncio.sleep(0.5)  # many tries
    assert len(caplog.records) - before <= 1, "a line for every change, not for every try"
    context = None
    if edge.ca is not None:
        import ssl

        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(edge.ca.with_name("cert.pem"), edge.ca.with_name("key.pem"))
    edge.servers[0] = await loops.create_server(
        lambda: tunnel.Front(edge.tunnels.accept), host="127.0.0.1", port=port, ssl=context
    )
    try:
        await until(lambda: edge.tunnels.candidates(SITE, SERVICE), "the gateway is back")
        assert await get(edge) == b"ok"
        assert status(agent).state is EdgeState.CONNECTED
        assert len(said(caplog, "connected to edge")) == 2
        assert len(said(caplog, " again")) == 1
        assert running.ready == 1
    finally:
        await running.stop(agent)
        edge.servers[0].close()


async def test_lost_tunnel_is_replaced(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    agent = await running.joined()
    await until(lambda: running.edge.tunnels.status()[0].tunnels == 2, "both tunnels")
    first = next(iter(running.edge.tunnels._links))
    first.abort()
    await until(lambda: running.edge.tunnels.status()[0].tunnels == 1, "one is lost")
    await until(lambda: running.edge.tunnels.status()[0].tunnels == 2, "both tunnels again")
    assert status(agent).state is EdgeState.CONNECTED
    assert said(caplog, "lost") == []


async def test_refused_until_it_is_enrolled(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    keys = dict(running.edge.keys)
    running.edge.keys.clear()
    agent = running.start(running.config(tunnels=1))
    await until(lambda: status(agent).state is EdgeState.REFUSED, "refused")
    assert "not enrolled" in status(agent).problem
    assert "enroll" in status(agent).hint
    await asyncio.sleep(0.3)  # several tries
    assert len(said(caplog, "not enrolled")) == 1
    assert running.ready == 0
    running.edge.keys.update(keys)
    await until(lambda: running.edge.tunnels.candidates(SITE, SERVICE), "it is let in without a restart")
    assert running.ready == 1


async def test_removed_gateway_says_so(running: Running) -> None:
    agent = await running.joined()
    running.edge.keys.clear()
    running.edge.tunnels.disconnect(SITE, NAME)
    await until(lambda: status(agent).state is EdgeState.REFUSED, "refused")


async def test_second_process_with_the_same_key(running: Running) -> None:
    agent = await running.joined()
    copy = TestGateway(key=load_key(running.folder / "gateway.key"), epoch=2**63)
    await copy.dial(running.edge)
    await until(lambda: status(agent).state is EdgeState.REFUSED, "the older process is told")
    assert "running twice" in status(agent).hint
    await copy.close()
    await until(
        lambda: status(agent).state is EdgeState.CONNECTED, "it comes back when the other one is gone"
    )


async def test_drain_when_it_is_stopped(running: Running) -> None:
    go = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nha")
        await go.wait()
        writer.write(b"lf")
        await reader.read()

    running.app.talk = talk
    agent = await running.joined(running.config(drain_seconds=10))
    stream = running.edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=True)
    await stream.head()
    assert await stream.read() == b"ha"
    stopping = asyncio.create_task(running.stop(agent))
    await until(lambda: not running.edge.tunnels.is_connected(SITE, NAME), "the edge opens no more")
    with pytest.raises(NoGateway):
        running.edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=True)
    go.set()
    assert await asyncio.wait_for(stream.read(), 5) == b"lf"
    assert await stream.read() == b""
    await asyncio.wait_for(stopping, 5)
    await until(lambda: running.app.open == 0, "the connections to the service are closed")


async def test_drain_ends_in_time(running: Running) -> None:
    running.app.talk = lambda reader, writer: reader.read()  # type: ignore[assignment,return-value]
    agent = await running.joined(running.config(drain_seconds=0.1))
    stream = running.edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=True)
    await until(lambda: running.app.open, "the request at the service")
    await asyncio.wait_for(running.stop(agent), 5)
    with pytest.raises(StreamReset):
        await stream.head()
    await until(lambda: running.app.open == 0, "the connection to the service is closed")


async def test_replacement_comes_before_the_old_tunnel_goes(running: Running) -> None:
    go = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go.wait()
        writer.write(OK)
        await reader.read()

    running.app.talk = talk
    await running.joined(running.config(tunnels=1))
    edge = running.edge
    stream = edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=True)
    (old,) = edge.tunnels._links
    edge.tunnels._ask_to_leave(old)
    await until(lambda: any(link.ready and link is not old for link in edge.tunnels._links), "another tunnel")
    assert edge.tunnels.is_connected(SITE, NAME)
    go.set()
    await stream.head()
    assert await stream.read() == b"ok"
    await until(lambda: old.end is not None, "the old tunnel ends when its streams have")
    assert edge.tunnels.is_connected(SITE, NAME)
    assert edge.kinds() == ["gateway.connected"]


async def test_health_reaches_the_edge(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    running.start(running.config(services={SERVICE: {"url": f"unix://{path}"}}))
    edge = running.edge
    await until(lambda: edge.tunnels.status() and edge.tunnels.status()[0].services, "INFO")
    assert edge.tunnels.candidates(SITE, SERVICE) == []
    with pytest.raises(StreamReset) as caught:
        await get(edge)
    assert caught.value.code == ErrorCode.UNREACHABLE
    async with serving(replies(OK), path=path):
        await until(lambda: edge.tunnels.candidates(SITE, SERVICE), "the service is up")
        assert await get(edge) == b"ok"
    path.unlink(missing_ok=True)
    await until(lambda: not edge.tunnels.candidates(SITE, SERVICE), "the service is down")


async def test_reload(running: Running) -> None:
    agent = await running.joined()
    edge = running.edge
    running.app.talk = lambda reader, writer: reader.read()  # type: ignore[assignment,return-value]
    kept = edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=True)
    await until(lambda: running.app.open, "the request at the service")
    services = {SERVICE: {"url": running.app.url}, "second": {"url": running.app.url}}
    agent.reload(running.config(services=services, tunnels=3))
    await until(lambda: edge.tunnels.status()[0].tunnels == 3, "more tunnels")
    await until(lambda: edge.tunnels.candidates(SITE, "second"), "another service")
    agent.reload(running.config(services=services, tunnels=1))
    await until(lambda: edge.tunnels.status()[0].tunnels == 1 or kept.reset_code, "fewer tunnels")
    assert kept.reset_code is None
    with pytest.raises(ConfigError) as caught:
        agent.reload(running.config(name="another"))
    assert "gateway.name" in str(caught.value)
    with pytest.raises(ConfigError):
        agent.reload(running.config(ca="no-such-file.pem", edges=["https://edge.example"]))
    assert edge.tunnels.is_connected(SITE, NAME)
    agent.reload(running.config(services={"second": {"url": running.app.url}}, tunnels=1))
    with pytest.raises(StreamReset):
        await kept.head()
    await until(lambda: not edge.tunnels.candidates(SITE, SERVICE), "the service is gone")


async def test_reload_to_another_edge(running: Running, tmp_path: Path) -> None:
    agent = await running.joined()
    folder = tmp_path / "other"
    folder.mkdir()
    async with tunnel.edge(folder, tls=False) as other:
        other.keys.update(running.edge.keys)
        config = running.config(edges=[other.url])
        agent.reload(config)
        await until(lambda: other.tunnels.candidates(SITE, SERVICE), "the other edge has it")
        await until(lambda: not running.edge.tunnels.is_connected(SITE, NAME), "the first edge has lost it")
        assert [edge.url for edge in agent.status().edges] == [other.url]
        await running.stop(agent)


async def test_key_that_is_not_there(running: Running) -> None:
    with pytest.raises(ConfigError):
        Agent(running.config(key="no-such.key"))


async def test_edge_that_is_not_there(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    agent = running.start(running.config(edges=[f"http://127.0.0.1:{free_port()}"]))
    await until(lambda: status(agent).problem, "a problem is shown")
    assert status(agent).state is EdgeState.LOST
    assert "refused" in status(agent).problem.lower()
    await asyncio.sleep(0.3)
    assert len(said(caplog, "cannot connect")) == 1


async def test_edge_that_is_something_else(running: Running) -> None:
    agent = running.start(running.config(edges=[running.app.url]))
    running.app.talk = replies(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    await until(lambda: "404" in status(agent).problem, "the answer is shown")
    assert "Guestpass edge" in status(agent).hint


async def test_old_tunnel_serves_until_there_is_another(running: Running) -> None:
    """An edge that wants to be left, and no other to go to: nobody notices until it ends the tunnel itself."""
    await running.joined(running.config(tunnels=1))
    edge = running.edge
    edge.servers[0].close()
    (old,) = edge.tunnels._links
    edge.tunnels.leave()
    await asyncio.sleep(0.3)  # several tries
    assert not old.draining
    assert await get(edge) == b"ok"


async def test_goes_to_the_edge_that_is_named(running: Running, tmp_path: Path) -> None:
    edge = running.edge
    folder = tmp_path / "other"
    folder.mkdir()
    if edge.ca is not None:  # one CA vouches for both
        shutil.copytree(edge.ca.parent, folder / "tls")
    async with tunnel.edge(folder, tls=edge.ca is not None) as other:
        other.keys.update(edge.keys)
        edge.tunnels._other_edges = ["nonsense", edge.url, other.url]
        agent = await running.joined(running.config(tunnels=1))
        edge.tunnels.leave()
        await until(lambda: other.tunnels.candidates(SITE, SERVICE), "the other edge has it")
        assert await get(other) == b"ok"
        await until(lambda: not edge.tunnels.is_connected(SITE, NAME), "the old tunnel goes")
        assert status(agent).state is EdgeState.CONNECTED
        edge.tunnels._closing = False
        for link in list(other.tunnels._links):
            link.abort()
        await until(lambda: edge.tunnels.candidates(SITE, SERVICE), "back at its own edge")
        await running.stop(agent)


async def test_names_of_plain_edges_do_not_count_where_tls_is_spoken(
    running: Running, tmp_path: Path
) -> None:
    if running.edge.ca is None:
        return  # plain edges may name each other: the test before
    folder = tmp_path / "other"
    folder.mkdir()
    async with tunnel.edge(folder, tls=False) as other:
        other.keys.update(running.edge.keys)
        running.edge.tunnels._other_edges = [other.url]
        await running.joined(running.config(tunnels=1))
        running.edge.tunnels.leave()
        await asyncio.sleep(0.3)
        assert other.events == []


async def test_a_large_edge_spreads_its_gateways(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the edge says comes from its tunnels; what the gateway does with it: the first try is not at once."""
    monkeypatch.setattr(tunnels_module, "SPREAD_RATE", 1)
    asked: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        asked.append((low, high))
        return 0.0

    agent = await running.joined(running.config(tunnels=2))
    keeper = agent._edges[running.edge.url]
    await until(lambda: keeper._spread == 2, "both tunnels are counted")
    await asyncio.sleep(0.1)  # they have lived long enough
    monkeypatch.setattr(agent_module.random, "uniform", uniform)
    for link in list(running.edge.tunnels._links):
        link.abort()
    await until(lambda: running.edge.tunnels.candidates(SITE, SERVICE), "back")
    assert (0, 2) in asked
    assert all(high <= agent_module.SPREAD_MOST for _, high in asked)


async def test_a_name_is_resolved_anew(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edge moves to another address; the gateway is not told."""
    if running.edge.ca is not None:
        return  # names do not depend on TLS, and the certificate has no such name
    port = running.edge.url.rpartition(":")[2]
    address = "127.0.0.9"  # nobody listens there
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **named: Any) -> Any:
        return real(address if host == "edge.example" else host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    agent = running.start(running.config(edges=[f"http://edge.example:{port}"], insecure=True))
    await until(lambda: "refused" in status(agent).problem.lower(), "not there")
    address = "127.0.0.1"
    await until(lambda: running.edge.tunnels.candidates(SITE, SERVICE), "found at its new address")


async def test_causes_that_alternate_are_logged_once(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    edge, port = running.edge, free_port()
    answers = iter([b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", b"SSH-2.0\r\n"] * 100)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(next(answers))
        writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", port)
    running.start(running.config(edges=[f"http://127.0.0.1:{port}"], tunnels=1))
    await until(lambda: said(caplog, "503") and said(caplog, "not HTTP"), "both causes")
    await asyncio.sleep(0.3)
    assert (len(said(caplog, "503")), len(said(caplog, "not HTTP"))) == (1, 1)
    server.close()
    assert edge.events == []
