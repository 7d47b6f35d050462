"""What filters cost a request: nothing where they are compiled, a call on aiohttp's lane where they are Python.

The CPU time is that of visitor, edge, gateway and application together, which are one process here: what an edge alone
spends is less, and the differences are its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from support.scoreboard import LONG, row
from support.stack import Stack, running

REQUESTS = 2000 if LONG else 200
ROUNDS = 7 if LONG else 3

FILTERS = """
import ipaddress
from guestpass.plugin import *

class Compiled(RequestFilter):
    def compile(self, share, session):
        return Static(
            edits=Edits(frozenset({"X-Old"}), (("X-New", "1"),)),
            scope=[Scope("*", "/**")],
            networks=[ipaddress.ip_network("127.0.0.0/8")],
            rate=Rate(1e9, 1_000_000),
        )

class Python(RequestFilter):
    def on_request(self, request):
        return Edits(frozenset({"X-Old"}), (("X-New", "1"),))
"""


@pytest.fixture
async def application() -> AsyncIterator[str]:
    async def show(request: web.Request) -> web.Response:
        return web.Response(text=request.headers.get("X-New", "0"))

    app = web.Application()
    app.router.add_get("/{tail:.*}", show)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


async def spent(stack: Stack, expected: bytes) -> float:
    """Microseconds of CPU for one request, of REQUESTS on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    head = stack.head("GET", "/a/b", "X-Old: 1")
    began = time.process_time()
    for _ in range(REQUESTS):
        writer.write(head)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(1) == expected
    took = time.process_time() - began
    writer.close()
    await writer.wait_closed()
    return took / REQUESTS * 1e6


async def test_what_filters_cost(tmp_path: Path, application: str) -> None:
    names = ("no filter", "compiled", "Python")
    best = dict.fromkeys(names, float("inf"))
    async with contextlib.AsyncExitStack() as opened:
        stacks = {}
        for name in names:
            folder = tmp_path / name.replace(" ", "-")
            folder.mkdir(mode=0o755)
            file = folder / "filters.py"
            file.write_text(FILTERS)
            file.chmod(0o644)
            config = {} if name == "no filter" else {"filter": [{"use": f"./filters.py:{name.capitalize()}"}]}
            lane = "fast" if name != "Python" else None
            stacks[name] = await opened.enter_async_context(
                running(folder, application, lane=lane, config=config)
            )
        for _ in range(ROUNDS):  # in turns: what else the machine does meets all of them
            for name, stack in stacks.items():
                best[name] = min(best[name], await spent(stack, b"0" if name == "no filter" else b"1"))
        assert all(stacks[name].answered("fast") == ROUNDS * REQUESTS for name in names[:2])
        assert stacks["Python"].answered("fast") == 0
    row(
        "cost of filters for a request",
        f"best of {ROUNDS} × {REQUESTS} requests; CPU of visitor, edge, gateway and application together",
        "; ".join(f"{name}: {took:.0f} µs" for name, took in best.items()),
        "compiled within 5 % of none",
        ok=best["compiled"] <= 1.05 * best["no filter"],
        timing=True,
        figure=21,
    )
