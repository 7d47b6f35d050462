"""What the fault tests share; the failures of others that they stand for are listed in README.md."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop
from support.network import Network, why_not


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}  # visitors and bad peers should cost less than what they are at


@pytest.fixture
def network() -> Iterator[Network]:
    """Two namespaces and a cable. Skipped where the machine cannot make them, but not in CI."""
    reason = why_not()
    if reason:
        if os.environ.get("CI"):
            pytest.fail(f"network namespaces are needed here: {reason}")
        pytest.skip(f"no network namespaces: {reason}")
    with Network() as made:
        yield made
