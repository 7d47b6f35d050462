"""Wall clocks that jump by an hour while tunnels live. The clock is injected: the machine's own is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from aiohttp import web
from support.scoreboard import row
from support.stack import running

from guestpass.config import GatewayConfig, parse
from guestpass.gateway import agent as agent_module
from guestpass.gateway.agent import Agent

HOUR = 3600.0


class Clock:
    """`time.time` and `time.time_ns` with an offset."""

    def __init__(self) -> None:
        self.offset = 0.0
        self._time = time.time

    def time(self) -> float:
        return self._time() + self.offset

    def time_ns(self) -> int:
        return int(self.time() * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "time", made.time)
    monkeypatch.setattr(time, "time_ns", made.time_ns)
    return made


async def application() -> web.AppRunner:
    async def page(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def ticks(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"tick\n")
            await asyncio.sleep(0.05)

    app = web.Application()
    app.router.add_get("/", page)
    app.router.add_get("/ticks", ticks)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner


async def test_clock_jumps(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "REFUSED_FIRST", 0.5)
    runner = await application()
    port = runner.addresses[0][1]
    jumps = restarts = 0
    async with running(tmp_path, f"http://127.0.0.1:{port}") as stack:
        links = set(stack.edge.tunnels._links)
        headers = {"Host": stack.host, **stack.authorization}
        async with stack.session.get(stack.url("/ticks"), headers=headers) as response:
            for offset in (HOUR, -HOUR, 0.0, -HOUR, HOUR, 0.0):
                clock.offset = offset
                jumps += 1
                for _ in range(10):
                    assert await response.content.readline() == b"tick\n"
                assert (await stack.get("/")).status == 200
            await asyncio.sleep(1.5)  # ticks of both ends
            assert set(stack.edge.tunnels._links) == links, "the tunnels stay"
        # A gateway that is started again after its clock was set back: its epoch is lower than the old process's.
        agent, task = stack.agents["gw-1"]
        for offset in (-HOUR, HOUR, -2 * HOUR):
            clock.offset = offset
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            again = Agent(agent._config)
            task = asyncio.create_task(again.run())
            stack.agents["gw-1"] = (again, task)
            await stack.until(lambda: stack.is_ready("gw-1"), "back under its name")
            restarts += 1
            assert (await stack.get("/")).status == 200
        # And one that was killed: the edge still holds the old process's tunnels, and its higher epoch.
        clock.offset = -3 * HOUR
        old = stack.agents["gw-1"][0]
        settings = old._config.model_dump(mode="python", exclude={"file"}, exclude_none=True)
        again = Agent(
            parse(
                GatewayConfig,
                {"gateway": settings["gateway"], "services": settings["services"]},
                old._config.file,
            )
        )
        task = asyncio.create_task(again.run())
        await asyncio.sleep(1)
        refused = again.status().edges[0].state
        for keeper in old._edges.values():
            keeper._stopping = True
            for keeping in keeper._tasks:
                keeping.cancel()
            keeper.cut()
        began = time.monotonic()
        await stack.until(lambda: again.status().edges[0].state == "connected", "in when the old one is gone")
        took = time.monotonic() - began
        assert (await stack.get("/")).status == 200
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await runner.cleanup()
    row(
        "clock jumps",
        f"{jumps} jumps of ±1 h under a live stream; {restarts} restarts of the gateway with clocks set back and on",
        f"stream, tunnels and sessions stay; beside the old process {refused}, in {took:.1f} s after its end",
        "nothing lost",
        ok=refused == "refused",
    )
