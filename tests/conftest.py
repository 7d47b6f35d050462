"""Prints the scoreboard at the end of a run that added to it, and writes it where GUESTPASS_SCOREBOARD says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import scoreboard


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if scoreboard.ROWS:
        terminalreporter.section("scoreboard")
        terminalreporter.write_line(scoreboard.text())


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("GUESTPASS_SCOREBOARD")
    if path and scoreboard.ROWS:
        scoreboard.write(Path(path))
