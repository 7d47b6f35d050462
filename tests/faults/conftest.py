"""Prints the fault table at the end of the run, and writes it where GUESTPASS_FAULTS_JSON says."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from faults import table
from support.network import Network, why_not


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}  # visitors and bad peers should cost less than what they are at


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if table.ROWS:
        terminalreporter.section("faults")
        terminalreporter.write_line(table.text())


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("GUESTPASS_FAULTS_JSON")
    if path and table.ROWS:
        table.write(Path(path))


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
