"""Floods against an edge, a gateway and an application as processes, while other visitors go on asking.

Each flood is one client's, and a process of its own (`support/flood.py`). It must end in the limit that is meant for
it, by name, with the others served as before, memory within bounds, and nothing left when it is over.

What "as before" means is measured in turns, several times: the others alone, the others while the same attack goes
against a sink (`support/flood_app.py`), the others while it goes against the edge. The attack and all that it is
directed at share this machine's processors; the sink shows what that alone does to the others. Their p99 is compared
with the higher one of the two, and all three are shown. The short form has no sink, and times do not decide.
GUESTPASS_FLOODS="pings resets" runs only these.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults.world import SERVICE, SITE, World, until
from support import flood, flood_app
from support.programs import Program
from support.scoreboard import LONG, percentile, row

pytestmark = pytest.mark.timeout(1800 if LONG else 240)

ROUNDS = 2 if LONG else 1
SECONDS, QUIET_SECONDS = (4.0, 3.0) if LONG else (1.5, 0.5)
LIMIT_SECONDS = 2 if LONG else 1
# Where times decide, attackers let others go first; where the machine is busy, they would never get to attack.
BACK = ("back",) if LONG else ()
# Some 300 requests a second: in the long form p99 is one of thousands.
OTHERS = 4
OTHERS_PAUSE = 0.01
LEAST_SAMPLES = 1000 if LONG else 10

# The p99 of others, and what the edge may grow by, in all floods together.
MOST_RATIO = 2.0
MOST_GROWTH = 64 << 20

PER_CLIENT = 200
PER_SESSION = 100
BODY_BYTES = 2_000_000

SETTINGS = f"""
[limits]
head_seconds = {LIMIT_SECONDS}
body_progress_seconds = {LIMIT_SECONDS}
write_progress_seconds = {LIMIT_SECONDS}
idle_seconds = {LIMIT_SECONDS + 1}
upgrade_idle_seconds = {LIMIT_SECONDS}
body_bytes = {BODY_BYTES}
connections_per_client = {PER_CLIENT}
streams_per_session = {PER_SESSION}
"""


@dataclass(frozen=True, slots=True)
class Flood:
    kind: str
    what: str
    visitors: int
    allowed: tuple[str, ...]
    """How its visitors may have been answered."""
    certain: str
    """How at least one of them must have been."""
    counted: str = ""
    """The limit that `guestpass_refusals_total` must have counted."""
    tls: bool = False
    """Against the edge's TLS listener."""
    before_lanes: bool = False
    """It never comes to a lane: the short form has it once."""


FLOODS = (
    Flood(
        "slow_head",
        "150 heads, byte by byte",
        150,
        ("408 head_seconds",),
        "408 head_seconds",
        "head_seconds",
        before_lanes=True,
    ),
    Flood(
        "slow_body",
        "90 bodies that stop after a byte",
        90,
        ("408 body_progress_seconds",),
        "408 body_progress_seconds",
        "body_progress_seconds",
    ),
    Flood(
        "slow_reader", "60 endless downloads that nobody reads", 60, ("cut",), "cut", "write_progress_seconds"
    ),
    Flood(
        "late_reader",
        f"40 endless downloads that nobody reads after {flood.READ_FIRST // 1_000_000} MB",
        40,
        ("cut",),
        "cut",
        "write_progress_seconds",
    ),
    Flood(
        "connections",
        f"connections of one address, {flood.ARRIVALS:.0f} a second",
        int(flood.ARRIVALS * SECONDS),
        ("200", "429 connections_per_client", "429 streams_per_session", "cut"),
        "429 connections_per_client",
        "connections_per_client",
        before_lanes=True,
    ),
    Flood(
        "too_many_streams",
        "150 requests of one session under way",
        150,
        ("429 streams_per_session", "408 body_progress_seconds"),
        "429 streams_per_session",
        "streams_per_session",
    ),
    Flood(
        "giant_head",
        "heads of 200 kB, 8 at a time",
        8,
        ("431 head_bytes", "cut"),
        "431 head_bytes",
        "head_bytes",
        before_lanes=True,
    ),
    Flood(
        "endless_upload",
        "20 chunked uploads without end",
        20,
        ("413 body_bytes", "cut"),
        "413 body_bytes",
        "body_bytes",
    ),
    Flood("resets", "80 visitors ask and reset, 200 times a second", 80, ("reset",), "reset"),
    Flood("pings", "30 WebSockets, 10,000 pings a second each", 30, ("cut",), "cut", "upgrade_idle_seconds"),
    Flood("idle_upgrades", "90 idle upgrades", 90, ("cut",), "cut", "upgrade_idle_seconds"),
    Flood(
        "handshakes",
        "TLS handshakes, 8 at a time",
        8,
        ("answered", "cut"),
        "answered",
        tls=True,
        before_lanes=True,
    ),
    Flood(
        "slow_handshakes",
        "300 TLS handshakes that stop after 3 bytes",
        300,
        ("cut", "kept"),
        "cut",
        "connections_per_client",
        tls=True,
        before_lanes=True,
    ),
)


@dataclass(slots=True)
class Attack:
    """What a flood did, and how it was answered."""

    answers: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    bytes: int = 0
    cpu: float = 0.0

    def add(self, found: dict[str, Any]) -> None:
        self.answers.update(found["answers"])
        self.connections += found["connections"]
        self.bytes += found["bytes"]
        self.cpu += found["cpu"]

    def __str__(self) -> str:
        done = f"{self.connections} connections, {self.bytes / 1e6:.1f} MB, {self.cpu:.1f} s of CPU"
        return f"{dict(self.answers.most_common())} ({done})"


class Edge:
    """The edge's process as seen from outside."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.process = psutil.Process(world.edge.process.pid)
        self.peak = self.memory

    @property
    def memory(self) -> int:
        return int(self.process.memory_info().rss)

    async def metrics(self) -> str:
        async with self._world.session.get(f"http://127.0.0.1:{self._world.admin_port}/metrics") as response:
            return await response.text()

    async def streams(self) -> int:
        found = re.search(r"^guestpass_streams ([0-9.]+)$", await self.metrics(), re.M)
        assert found is not None
        return int(float(found[1]))

    async def refusals(self, limit: str) -> int:
        found = re.search(
            rf'^guestpass_refusals_total\{{reason="{limit}"\}} ([0-9.]+)$', await self.metrics(), re.M
        )
        return int(float(found[1])) if found else 0

    async def watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.memory)
            await asyncio.sleep(0.05)


class Others:
    """Visitors with sessions and an address of their own, who ask one small request after another."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.times: list[float] = []
        """Of the phase."""
        self.failed: list[str] = []

    async def _ask(self, number: int) -> None:
        lines = [f"{k}: {v}" for k, v in self._world.headers(number).items()]
        head = "\r\n".join(("GET / HTTP/1.1", *lines, "", "")).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._world.port)
        try:
            while True:
                began = time.perf_counter()
                writer.write(head)
                status = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(200)
                self.times.append(time.perf_counter() - began)
                if not status.startswith(b"HTTP/1.1 200 "):
                    self.failed.append(status[:30].decode("latin-1"))
                await asyncio.sleep(OTHERS_PAUSE)
        except (OSError, EOFError) as exc:
            self.failed.append(repr(exc))
        finally:
            writer.transport.abort()

    @asynccontextmanager
    async def asking(self, times: list[float]) -> AsyncIterator[None]:
        """`times` gets how long each request took, in seconds."""
        self.times = times
        tasks = [asyncio.create_task(self._ask(1 + number)) for number in range(OTHERS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class Phases:
    """Seconds that each request of the others took."""

    quiet: list[float] = field(default_factory=list)
    sink: list[float] = field(default_factory=list)
    flood: list[float] = field(default_factory=list)

    @staticmethod
    def p99(times: list[float]) -> float:
        return percentile(times, 0.99)

    @property
    def ratio(self) -> float:
        return self.p99(self.flood) / max(self.p99(self.quiet), self.p99(self.sink))

    def __str__(self) -> str:
        sink = f", {self.p99(self.sink) * 1000:.1f} beside a sink" if self.sink else ""
        return (
            f"others' p99 {self.p99(self.flood) * 1000:.1f} ms of {len(self.flood)}, "
            f"{self.p99(self.quiet) * 1000:.1f} alone{sink}: {self.ratio:.1f}×"
        )


class Floods:
    def __init__(self, world: World, edge: Edge, others: Others, sink: str) -> None:
        self.world = world
        self.edge = edge
        self.others = others
        self.sink = int(sink.rpartition(":")[2])

    async def attack(self, entry: Flood, port: int, times: list[float], result: Attack | None) -> None:
        """The others ask as long as the attack goes on. None: how it ends is nobody's affair."""
        headers = self.world.headers(0)
        log = self.world.folder / f"flood-{entry.kind}.log"
        command = [sys.executable, flood.__file__, entry.kind, str(port), str(entry.visitors), str(SECONDS)]
        command += [headers["Host"], headers["Authorization"].removeprefix("Bearer "), *BACK]
        with Program(command, log=log) as program:
            await asyncio.to_thread(program.wait_for_line, "begun", seconds=60)
            async with self.others.asking(times):
                await asyncio.sleep(SECONDS)
            if result is not None:
                line = await asyncio.to_thread(program.wait_for_line, "{", seconds=60)
                result.add(json.loads(line))

    async def quiet(self, times: list[float]) -> None:
        async with self.others.asking(times):
            await asyncio.sleep(QUIET_SECONDS)
            await until(lambda: len(times) >= LEAST_SAMPLES // ROUNDS, "the others are answered")

    async def run(self, entry: Flood, phases: Phases, result: Attack, rest: int) -> str:
        """All rounds; what was left behind."""
        port = self.world.tunnel_port if entry.tls else self.world.port

        async def nothing_is_left() -> bool:
            return await self.edge.streams() == 0 and self.edge.process.num_fds() <= rest

        for _ in range(ROUNDS):
            await self.quiet(phases.quiet)
            if LONG:
                await self.attack(entry, self.sink, phases.sink, None)
            watching = asyncio.create_task(self.edge.watch())
            try:
                await self.attack(entry, port, phases.flood, result)
            finally:
                watching.cancel()
            try:
                await until(nothing_is_left, "no stream and no descriptor is left", seconds=20)
            except AssertionError:
                descriptors = self.edge.process.num_fds() - rest
                return f"{await self.edge.streams()} streams, {descriptors} descriptors left"
        return ""


async def served(world: World, visitor: int) -> bool:
    return (await world.ask("/", visitor)).ok


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
async def test_floods(tmp_path: Path, lane: str) -> None:
    settings = f"fast_lane = {str(lane == 'fast').lower()}\n{SETTINGS}"
    app = Path(flood_app.__file__)
    only = os.environ.get("GUESTPASS_FLOODS", "").split()
    async with World(tmp_path, visitors=1 + OTHERS, app=app, settings=settings) as world:
        with Program([sys.executable, app, "sink"], log=tmp_path / "sink.log") as program:
            sink = await asyncio.to_thread(program.wait_for_line, "http://", seconds=60)
            edge, others = Edge(world), Others(world)
            floods = Floods(world, edge, others, sink)
            for number in range(1 + OTHERS):
                await until(functools.partial(served, world, number), f"visitor {number} is served")
            await floods.quiet([])
            begin = edge.memory
            assert await edge.streams() == 0
            rest = edge.process.num_fds()  # with the connection for metrics
            faults: list[str] = []
            for entry in FLOODS:
                if (only and entry.kind not in only) or (
                    not LONG and entry.before_lanes and lane == "aiohttp"
                ):
                    continue
                counted = await edge.refusals(entry.counted) if entry.counted else 0
                phases, result = Phases(), Attack()
                before = edge.memory
                edge.peak = before
                left = await floods.run(entry, phases, result, rest)
                refused = await edge.refusals(entry.counted) - counted if entry.counted else 0
                growth = edge.peak - begin
                hard = (
                    not set(result.answers) - set(entry.allowed)
                    and not left
                    and not others.failed
                    and entry.certain in result.answers
                    and (refused > 0 or not entry.counted)
                    and growth <= MOST_GROWTH
                    and len(phases.flood) >= LEAST_SAMPLES
                )
                memory = (
                    f"edge +{growth / (1 << 20):.0f} MiB (this one +{(edge.peak - before) / (1 << 20):.0f})"
                )
                problems = "; ".join(filter(None, (left, ", ".join(sorted(set(others.failed))))))
                try:
                    row(
                        f"flood: {entry.kind}, {lane}",
                        entry.what,
                        f"{result}; {phases}; {memory}{'; ' + problems if problems else ''}",
                        f"{', '.join(entry.allowed)}; p99 ≤ {MOST_RATIO:g}×, ≤ {MOST_GROWTH >> 20} MiB, nothing left",
                        ok=hard and phases.ratio <= MOST_RATIO,
                        timing=hard,
                        figure=5,
                    )
                except AssertionError as exc:
                    faults.append(str(exc))
            assert not faults, "\n".join(faults)
            assert (await world.ask("/", 0)).ok, (SITE, SERVICE)
