"""Visitors' connections are tested on the event loop that an edge runs on, the fast lane on asyncio's own as well: what
a transport does, and when, differs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

BOTH = {"test_fast_lane.py", "test_front.py"}
UVLOOP = {"test_access_log.py", "test_limits.py", "test_relay.py", "test_siblings.py", "test_tls.py"}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {}
    if item.path.name not in UVLOOP:
        loops["asyncio"] = asyncio.new_event_loop
    if item.path.name in BOTH | UVLOOP:
        loops["uvloop"] = uvloop.new_event_loop
    return loops
