"""Processes that are killed, frozen and restarted while visitors are at it."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest
from faults.world import Load, World, until
from support.scoreboard import LONG, long_only, percentile, row

pytestmark = pytest.mark.timeout(900 if LONG else 120)

RESTARTS = 20 if LONG else 2
ROLLING_REQUESTS = 100_000 if LONG else 2_000


async def test_killed_gateway_of_two(tmp_path: Path) -> None:
    """kill -9 of one of two gateways: what waited for it is asked of the other one at once."""
    async with World(tmp_path, names=("gw-1", "gw-2"), visitors=16) as world:
        mine = await world.visitors_of("gw-1")
        assert mine
        work = 3 if LONG else 1.5
        async with Load(world, visitors=16).running() as load:
            await asyncio.sleep(0.5)
            waiting = [asyncio.create_task(world.ask(f"/slow/{work}", number)) for number in mine]
            await asyncio.sleep(1)
            world.gateways["gw-1"].process.kill()
            killed = time.monotonic()
            answers = await asyncio.gather(*waiting)
            over = max(a.began + a.took for a in answers) - killed - work  # the work itself begins anew
            await asyncio.sleep(0.5)
        assert all(a.ok and a.instance == "gw-2" for a in answers), answers
        row(
            "kill -9 of a gateway",
            f"one of two, under load, {len(waiting)} requests waiting on it",
            f"{len(load.answers)} requests, {len(load.failed)} failed; waiting ones go to the other gateway "
            f"in {max(over, 0):.2f} s",
            "0 failed; ≤ 1 s",
            ok=not load.failed and over <= 1,
            timing=not load.failed,
        )


async def test_a_killed_gateway_is_back_under_its_name(tmp_path: Path) -> None:
    """The only gateway, kill -9: visitors are told at once, nothing is done twice, its name is free again."""
    async with World(tmp_path) as world:
        down: list[float] = []
        async with Load(world, method="POST").running() as load:
            for _ in range(5 if LONG else 2):
                await asyncio.sleep(0.5)
                world.gateways["gw-1"].process.kill()
                killed = time.monotonic()
                await until(lambda: world.has_not("gw-1"), "the edge knows")
                await world.start_gateway("gw-1")
                down.append(await load.served(killed))
            await asyncio.sleep(0.3)
        twice = await world.asked_twice()
        in_use = [line for line in world.logs("gw-1").splitlines() if "refused" in line]
        row(
            "kill -9 of the only gateway",
            f"{len(down)} times under POSTs, started again under its name",
            f"away {max(down):.1f} s, the start of the process included; slowest answer {load.slowest:.2f} s; "
            f"{len(twice)} of {load.sent} done twice; refused {len(in_use)} times",
            "none twice, never “in use”",
            ok=not twice and not in_use,
        )


@long_only
async def test_frozen_gateway(tmp_path: Path) -> None:
    """SIGSTOP: a tunnel that looks alive to the kernel is found out, and is back after SIGCONT without help."""
    async with World(tmp_path, names=("gw-1", "gw-2"), visitors=16) as world:
        mine = await world.visitors_of("gw-1")
        assert mine
        async with Load(world, visitors=16, pause=0.02).running() as load:
            await asyncio.sleep(0.3)
            world.gateways["gw-1"].process.send_signal(signal.SIGSTOP)
            frozen = time.monotonic()
            answer = await world.ask("/", mine[0])
            assert answer.ok, answer
            detected = await until(lambda: world.has_not("gw-1"), "the frozen gateway is found out")
            detected = time.monotonic() - frozen
            world.gateways["gw-1"].process.send_signal(signal.SIGCONT)
            back = await until(lambda: world.has("gw-1"), "it is back")
            await asyncio.sleep(0.3)
        row(
            "SIGSTOP of a gateway",
            "one of two, under load; SIGCONT when the edge has given it up",
            f"detected {detected:.1f} s, a waiting request answered after {answer.took:.1f} s, back {back:.1f} s "
            f"after SIGCONT; {len(load.answers)} requests, {len(load.failed)} failed",
            "≤ 10 s; ≤ 10 s; ≤ 5 s; 0 failed",
            ok=not load.failed and detected <= 10 and answer.took <= 10 and back <= 5,
            timing=not load.failed,
        )


async def test_killed_and_frozen_edge(tmp_path: Path) -> None:
    """kill -9 and SIGSTOP of the edge: gateways come back by themselves, sessions go on."""
    async with World(tmp_path) as world:
        async with Load(world).running() as load:
            await asyncio.sleep(0.5)
            world.edge.process.kill()
            await asyncio.to_thread(world.edge.process.wait)
            await world.start_edge()
            up = time.monotonic()
            served = await load.served(up)
            await until(lambda: world.has("gw-1"), "the gateway is back")
            again = len(load.answers)
            await asyncio.sleep(0.5)
            unhappy = [a for a in load.answers[again:] if not a.ok]
        row(
            "kill -9 of the edge",
            "under load, started again",
            f"serves {served:.2f} s after it is up again, with the same sessions; then {len(unhappy)} failed",
            "≤ 5 s; 0 failed",
            ok=not unhappy and served <= 5,
            timing=not unhappy,
        )
        seconds = 10 if LONG else 2
        async with Load(world).running() as load:
            await asyncio.sleep(0.5)
            world.edge.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(seconds)
            world.edge.process.send_signal(signal.SIGCONT)
            thawed = time.monotonic()
            served = await load.served(thawed)
            await asyncio.sleep(0.5)
        row(
            "SIGSTOP of the edge",
            f"{seconds} s, under load",
            f"serves {served:.2f} s after SIGCONT; slowest answer {load.slowest:.1f} s",
            "≤ 5 s; nothing hangs",
            ok=served <= 5 and load.slowest < seconds + 15,
            timing=True,
        )


async def test_edge_is_restarted_again_and_again(tmp_path: Path) -> None:
    """SIGTERM and a new process, under load: no answer is cut short, no POST is done twice, gateways are back."""
    async with World(tmp_path, names=("gw-1", "gw-2"), drain=5) as world:
        gaps: list[float] = []
        async with Load(world).running() as load, Load(world, method="POST", visitors=2).running():
            for _ in range(RESTARTS):
                await asyncio.sleep(0.3)
                status = await asyncio.to_thread(world.edge.stop)
                assert status == 0, world.logs("edge")[-3000:]
                await world.start_edge()
                gaps.append(await load.served(time.monotonic()))
                await until(world._all_in, "both gateways are back")
        twice = await world.asked_twice()
        cut = [a for a in load.answers if "payload" in a.problem.lower()]
        row(
            "edge restarted under load",
            f"{RESTARTS} times (SIGTERM, new process), two gateways",
            f"serves {percentile(gaps, 0.5):.2f} s (median), {max(gaps):.2f} s (worst) after it is up; "
            f"{len(load.good)} answers, {len(cut)} cut short; {len(twice)} POSTs done twice",
            "≤ 5 s; none cut, none twice",
            ok=not cut and not twice and max(gaps) <= 5,
            timing=not cut and not twice,
        )
        for name in world.names:
            lines = world.logs(name).splitlines()
            assert len(lines) <= 4 * RESTARTS + 8, "a line for a change, not for a try"


async def test_rolling_restarts_of_gateways(tmp_path: Path) -> None:
    """Two gateways, restarted in turn with a drain while visitors are at it: nobody notices."""
    async with World(tmp_path, names=("gw-1", "gw-2"), visitors=16, drain=10) as world:
        restarts = 0
        async with (
            Load(world, visitors=14).running() as load,
            Load(world, visitors=2, path="/slow/0.5").running() as slow,
        ):
            while restarts < RESTARTS or len(load.answers) + len(slow.answers) < ROLLING_REQUESTS:
                if restarts < RESTARTS:
                    name = world.names[restarts % 2]
                    status = await asyncio.to_thread(world.gateways[name].stop)
                    assert status == 0, world.logs(name)[-3000:]
                    await world.start_gateway(name)
                    await until(world._all_in, "both gateways are there")
                    restarts += 1
                await asyncio.sleep(0.5)
        total = len(load.answers) + len(slow.answers)
        failed = load.failed + slow.failed
        row(
            "rolling restarts of gateways",
            f"{restarts} restarts of two gateways in turn (SIGTERM, drain), {total} requests meanwhile",
            f"{len(failed)} failed; slowest {load.slowest:.2f} s",
            "0 failed",
            ok=not failed,
            figure=20,
        )
        assert not failed, load.why() + slow.why()
