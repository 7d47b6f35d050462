"""Tunnel tests run on asyncio's own loop and on uvloop: both are in use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop
from support import tunnel


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest_asyncio.fixture
async def edge(tmp_path: Path, tls: bool) -> AsyncIterator[tunnel.TestEdge]:
    async with tunnel.edge(tmp_path, tls=tls) as made:
        yield made


@pytest_asyncio.fixture
async def gateway(edge: tunnel.TestEdge) -> AsyncIterator[tunnel.TestGateway]:
    """A gateway that is enrolled and not connected yet."""
    made = tunnel.TestGateway()
    edge.enrol(made.key)
    yield made
    await made.close()
