"""Floods against an edge, a gateway and an application as processes, while other visitors go on asking.

Each flood is one client's, and a process of its own (`support/flood.py`). It must end in the limit that is meant for
it, by name, with the others served as before, memory within bounds, and nothing left when it is over.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from faults.world import SERVICE, SITE, World, until
from support import flood, flood_app
from support.programs import Program
from support.scoreboard import LONG, percentile, row

pytestmark = pytest.mark.timeout(900 if LONG else 180)

SECONDS, QUIET_SECONDS = (12.0, 4.0) if LONG else (1.5, 0.4)
LIMIT_SECONDS = 2 if LONG else 1
OTHERS = 3
OTHERS_PAUSE = 0.02

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


FLOODS = (
    Flood(
        "slow_head",
        "150 heads, byte by byte",
        150,
        ("408 head_seconds",),
        "408 head_seconds",
        "head_seconds",
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
        "connections",
        "800 connections of one address, 400 a second",
        800,
        ("200", "429 connections_per_client", "429 streams_per_session", "cut"),
        "429 connections_per_client",
        "connections_per_client",
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
)


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
    async def asking(self) -> AsyncIterator[None]:
        self.times = []
        tasks = [asyncio.create_task(self._ask(1 + number)) for number in range(OTHERS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def p99(self) -> float:
        return percentile(self.times, 0.99)


async def attack(world: World, edge: Edge, entry: Flood) -> dict[str, int]:
    """How the flood's visitors were answered."""
    headers = world.headers(0)
    log = world.folder / f"flood-{entry.kind}.log"
    command = [sys.executable, flood.__file__, entry.kind, str(world.port), str(entry.visitors), str(SECONDS)]
    command += [headers["Host"], headers["Authorization"].removeprefix("Bearer ")]
    with Program(command, log=log) as program:
        line = await asyncio.to_thread(program.wait_for_line, "{", seconds=SECONDS + 60)
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
async def test_floods(tmp_path: Path, lane: str) -> None:
    settings = f"fast_lane = {str(lane == 'fast').lower()}\n{SETTINGS}"
    app = Path(flood_app.__file__)
    async with World(tmp_path, visitors=1 + OTHERS, app=app, settings=settings) as world:
        edge, others = Edge(world), Others(world)
        for number in range(1 + OTHERS):
            assert (await world.ask("/", number)).ok
        async with others.asking():
            await asyncio.sleep(QUIET_SECONDS)
        begin = edge.memory
        rest = edge.process.num_fds()
        faults: list[str] = []
        for entry in FLOODS:
            counted = await edge.refusals(entry.counted) if entry.counted else 0
            async with others.asking():
                await asyncio.sleep(QUIET_SECONDS)
                await until(lambda: len(others.times) >= 10, "the others are answered")
            assert not others.failed, others.failed
            quiet = others.p99
            watching = asyncio.create_task(edge.watch())
            try:
                async with others.asking():
                    answers = await attack(world, edge, entry)
            finally:
                watching.cancel()

            async def nothing_is_left() -> bool:
                return await edge.streams() == 0 and edge.process.num_fds() <= rest

            left = ""
            try:
                await until(nothing_is_left, "no stream and no descriptor is left", seconds=20)
            except AssertionError:
                left = f"; {await edge.streams()} streams, {edge.process.num_fds() - rest} descriptors left"
            growth = edge.peak - begin
            wrong = {how: n for how, n in answers.items() if how not in entry.allowed}
            refused = await edge.refusals(entry.counted) - counted if entry.counted else 0
            hard = (
                not wrong
                and not left
                and not others.failed
                and entry.certain in answers
                and (refused > 0 or not entry.counted)
                and growth <= MOST_GROWTH
            )
            ratio = others.p99 / quiet
            try:
                row(
                    f"flood: {entry.kind}, {lane}",
                    entry.what,
                    f"{answers}, others' p99 {others.p99 * 1000:.1f} ms = {ratio:.1f}× of {quiet * 1000:.1f}, "
                    f"edge +{growth / (1 << 20):.0f} MiB{left}{' ' + str(others.failed) if others.failed else ''}",
                    f"{', '.join(entry.allowed)}; p99 ≤ {MOST_RATIO:g}×, ≤ {MOST_GROWTH >> 20} MiB, nothing left",
                    ok=hard and ratio <= MOST_RATIO,
                    timing=hard,
                    figure=5,
                )
            except AssertionError as exc:
                faults.append(str(exc))
        assert not faults, "\n".join(faults)
        assert (await world.ask("/", 0)).ok, (SITE, SERVICE)
