"""Many gateways in one process: the agent's own loop that keeps a tunnel, real links and keys, no services."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from faults.world import SERVICE, SITE, START_SECONDS, prepare, until
from support.network import Network
from support.programs import Program, free_port

from guestpass.config import load_edge
from guestpass.gateway import dial
from guestpass.gateway.agent import _EdgeKeeper
from guestpass.mux.handshake import Hello
from guestpass.mux.link import GatewayLink
from guestpass.mux.stream import TunnelStream
from guestpass_speedups.session import Budget

# The edge lets so few strangers of one address in at a time (MAX_UNPROVEN_PER_ADDRESS, 64); all dialers have the same.
AT_ONCE = 40

BUDGET = Budget()


class Dialer:
    """One gateway with one tunnel. Stands where `_EdgeKeeper` expects the `Agent`."""

    def __init__(self, crowd: Crowd, name: str, key: Ed25519PrivateKey) -> None:
        self.name = name
        self._crowd = crowd
        self._key = key
        self._epoch = time.time_ns()
        self.keeper = _Keeper(self, crowd.url)
        self.ready_at = 0.0

    @property
    def ready(self) -> bool:
        return any(link.usable for link in self.keeper._links)

    # what the keeper asks of the agent

    def edge_at(self, url: str) -> dial.Edge:
        return dial.edge_at(url)

    def keeps(self, url: str) -> bool:
        return url == self._crowd.url

    def make_link(self, keeper: _EdgeKeeper, edge: dial.Edge) -> GatewayLink:
        return GatewayLink(
            keeper,
            budget=BUDGET,
            hello=Hello(role="gateway", epoch=self._epoch),
            host=edge.authority,
            site=SITE,
            name=self.name,
            key=self._key,
            serve=self._serve,
        )

    async def _serve(self, stream: TunnelStream, service: str, head: bytes) -> None:
        stream.send_head(b"HTTP/1.1 204 No Content\r\n\r\n", fin=True)

    def let_in(self) -> None:
        self.ready_at = time.monotonic()

    def info(self) -> dict[str, Any]:
        return {"services": {SERVICE: {"healthy": True}}, "weight": 1, "labels": {}, "load": {"streams": 0}}


class _Keeper(_EdgeKeeper):
    """Counts tries."""

    def __init__(self, dialer: Dialer, url: str) -> None:
        super().__init__(dialer, url, dial.edge_at(url))  # type: ignore[arg-type]
        self._crowd = dialer._crowd

    async def _one_tunnel(self, leaving: GatewayLink | None) -> Any:
        self._crowd.tries.append(time.monotonic())
        return await super()._one_tunnel(leaving)


class Crowd:
    """An edge process, and `count` gateways that are enrolled there."""

    def __init__(self, folder: Path, count: int, *, network: Network | None = None) -> None:
        self.folder = folder
        self.network = network
        self.address = "10.203.0.1" if network is not None else "127.0.0.1"
        self.port = free_port()
        self.url = f"http://{self.address}:{self.port}"
        self.keys = {f"gw-{number}": Ed25519PrivateKey.generate() for number in range(count)}
        self.tries: list[float] = []
        self.dialers: list[Dialer] = []
        self.edge: Program
        self._config = folder / "edge.toml"
        self._logs = 0

    async def prepare(self) -> None:
        """To be called where the edge will be."""
        self._config.write_text(
            f'[edge]\nlisten = ["{self.url}"]\nadmin_listen = "127.0.0.1:{free_port()}"\ninsecure = true\n'
            f'public_url = "http://localhost:{self.port}"\nshare_domain = "localhost:{self.port}"\n',
            "utf-8",
        )
        await prepare(load_edge(self._config), self.keys)

    async def start_edge(self) -> None:
        self._logs += 1
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "guestpass",
            "edge",
            "--config",
            self._config,
            "--json",
        ]
        if self.network is not None:
            command = self.network.at_edge(command)
        self.edge = Program(command, log=self.folder / f"edge-{self._logs}.log")
        await asyncio.to_thread(self.edge.wait_for_line, "{", seconds=START_SECONDS)

    async def connect(self) -> None:
        self.dialers = [Dialer(self, name, key) for name, key in self.keys.items()]
        for first in range(0, len(self.dialers), AT_ONCE):
            group = self.dialers[first : first + AT_ONCE]
            for dialer in group:
                dialer.keeper.start(1)
            await until(lambda group=group: all(d.ready for d in group), "some gateways are in", seconds=30)

    @property
    def ready(self) -> int:
        return sum(dialer.ready for dialer in self.dialers)

    async def close(self) -> None:
        await asyncio.gather(*(dialer.keeper.stop(0) for dialer in self.dialers))
        if hasattr(self, "edge"):
            self.edge.process.kill()  # nobody is left who would need a drain
            self.edge.stop()
