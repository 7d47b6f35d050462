"""Networks that lose packets, links and bandwidth: in namespaces, see `support.network`.

gw-1 is behind the cable, gw-2 on the edge's side of it; both serve the same share.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from faults.world import Answer, Load, World, until
from support.network import Network
from support.scoreboard import LONG, long_only, percentile, row

pytestmark = pytest.mark.timeout(600 if LONG else 120)

BLACK_HOLE = 30.0 if LONG else 8.0


@dataclass
class Cut:
    """What a fault of the cable did."""

    detected: float
    """Seconds until the edge had given gw-1 up."""
    waiting: Answer
    """A request that was under way to gw-1, or was sent there right after."""
    back: float
    """Seconds from the repair until gw-1 could be used."""
    load: Load
    before: int
    """Tunnels that gw-1 had."""


@pytest_asyncio.fixture
async def world(network: Network, tmp_path: Path) -> AsyncIterator[World]:
    with network.entered():
        async with World(
            tmp_path, names=("gw-1", "gw-2"), network=network, beside_edge=("gw-2",), visitors=12
        ) as made:
            yield made


async def cut(world: World, begin: Callable[[], None], end: Callable[[], None], *, seconds: float = 0) -> Cut:
    """Break the cable under load, for `seconds` or until the edge has noticed, and repair it."""
    mine = await world.visitors_of("gw-1")
    assert mine
    async with Load(world, visitors=12, pause=0.02).running() as load:
        await asyncio.sleep(0.3)
        begin()
        began = time.monotonic()
        waiting = asyncio.create_task(world.ask("/", mine[0]))
        await until(lambda: world.has_not("gw-1"), "the edge has given it up")
        detected = time.monotonic() - began
        await asyncio.sleep(max(seconds - detected, 0))
        end()
        repaired = time.monotonic()
        await until(lambda: world.has("gw-1"), "the gateway is back")
        back = time.monotonic() - repaired
        answer = await waiting
        await asyncio.sleep(0.2)
    assert answer.ok, answer
    assert not load.failed, load.why()
    return Cut(detected, answer, back, load, 2)


def report(name: str, done: str, found: Cut, *, figure: int | None = None) -> None:
    row(
        name,
        done,
        f"detected {found.detected:.1f} s; a waiting request answered by the other gateway after "
        f"{found.waiting.took:.1f} s; back {found.back:.1f} s after the repair; {len(found.load.answers)} requests, "
        f"{len(found.load.failed)} failed",
        "≤ 10 s; ≤ 10 s; ≤ 5 s; 0 failed",
        ok=found.detected <= 10 and found.waiting.took <= 10 and found.back <= 5 and not found.load.failed,
        timing=True,
        figure=figure,
    )


async def test_black_hole(world: World, network: Network) -> None:
    """Nothing gets through and nobody is told; a download that was under way ends for its visitor."""
    (number, *_) = await world.visitors_of("gw-1")
    async with world.session.get(world.url("/forever"), headers=world.headers(number)) as download:
        await download.content.readexactly(1 << 20)
        began = time.monotonic()
        ended = asyncio.create_task(_read_to_the_end(download.content))
        found = await cut(world, network.block, network.open, seconds=BLACK_HOLE)
        hung = await ended - began
    report("black hole", f"every packet of gw-1 dropped for {BLACK_HOLE:g} s, under load", found, figure=16)
    row(
        "download through a black hole",
        "the visitor's side of it",
        f"cut off after {hung:.1f} s",
        "≤ 10 s",
        ok=hung <= 10,
        timing=True,
    )
    lines = world.logs("gw-1").splitlines()
    row(
        "log lines while disconnected",
        f"the gateway's log over {BLACK_HOLE:g} s of tries",
        f"{len(lines)} lines in all",
        "≤ 6",
        ok=len(lines) <= 6,
    )


async def _read_to_the_end(content: object) -> float:
    try:
        while await content.readany():  # type: ignore[attr-defined]
            pass
    except Exception:  # cut off: aiohttp has several names for it
        pass
    return time.monotonic()


@long_only
async def test_link_down_and_up(world: World, network: Network) -> None:
    found = await cut(world, lambda: network.link(up=False), lambda: network.link(up=True))
    report("link down and up", "the cable of gw-1 pulled until the edge has noticed, under load", found)


@long_only
@pytest.mark.parametrize("way", ["to the edge", "to the gateway"])
async def test_one_way_loss(world: World, network: Network, way: str) -> None:
    """One end still hears the other one."""

    def begin() -> None:
        network.filter(**{"leaving" if way == "to the edge" else "arriving": "drop"})

    found = await cut(world, begin, network.open)
    report("one-way loss", f"packets {way} dropped (nft) until the edge has noticed, under load", found)


@long_only
async def test_connections_reset(world: World, network: Network) -> None:
    """A router that answers with resets: noticed at once."""
    found = await cut(world, network.cut, network.open, seconds=3)
    report("connections reset", "every packet of gw-1 answered by a reset for 3 s, under load", found)


@long_only
async def test_short_loss_is_ridden_out(world: World, network: Network) -> None:
    """A second without a packet: requests wait, none is lost, the tunnels stay."""
    mine = await world.visitors_of("gw-1")
    assert mine
    before = world.logs("edge").count("is gone")
    async with Load(world, visitors=12, pause=0.02).running() as load:
        await asyncio.sleep(0.3)
        network.block()
        await asyncio.sleep(1)
        network.open()
        await asyncio.sleep(2)
    row(
        "short loss",
        "every packet of gw-1 dropped for 1 s, under load",
        f"{len(load.answers)} requests, {len(load.failed)} failed, slowest {load.slowest:.1f} s; "
        f"{world.logs('edge').count('is gone') - before} gateways given up",
        "0 failed, 0 given up",
        ok=not load.failed and world.logs("edge").count("is gone") == before,
    )


async def test_a_narrow_link_is_filled(world: World, network: Network) -> None:
    """frp #2987, pangolin #1389: a download takes the link it is given; small answers do not wait behind it (yamux)."""
    megabits, seconds = 20, 10.0 if LONG else 3.0
    network.bandwidth(megabits)
    mine = await world.visitors_of("gw-1")
    assert len(mine) >= 2
    async with world.session.get(world.url("/forever"), headers=world.headers(mine[0])) as download:
        await download.content.readexactly(1 << 20)
        began, size = time.monotonic(), 0
        small: list[Answer] = []

        async def ask() -> None:
            while True:
                small.append(await world.ask("/", mine[1]))
                await asyncio.sleep(0.05)

        await asyncio.sleep(2)  # the queue in front of the narrow link fills, the window finds its size
        asking = asyncio.create_task(ask())
        while time.monotonic() - began < seconds:
            size += len(await download.content.readany())
        rate = size * 8 / (time.monotonic() - began) / 1e6
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    share = rate / megabits
    assert small
    assert all(answer.ok for answer in small)
    row(
        "narrow link",
        f"{megabits} Mbit/s by tbf: a download, and small requests beside it",
        f"{rate:.1f} Mbit/s of body bytes, {share:.0%} of the link; small requests p50 "
        f"{percentile([a.took for a in small], 0.5) * 1000:.0f} ms, p99 "
        f"{percentile([a.took for a in small], 0.99) * 1000:.0f} ms",
        "≥ 80 % of the link",
        ok=share >= 0.8,
        timing=True,
    )
