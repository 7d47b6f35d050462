"""What the suites show, as a table for people and as JSON for scripts.

A test that measures or counts something which a user would want to know adds a row; the table stands at the end of
the run (see tests/conftest.py) and, with GUESTPASS_SCOREBOARD=FILE, is written there. With GUESTPASS_LONG=1 suites run
their long forms: `make faults`, `make conformance` and `make plugins` do. The short forms are part of `make test`,
where times are shown but do not decide: a machine that is busy with other things proves nothing about them. What was
lost, accepted or desynchronised decides always.
"""

from __future__ import annotations

import json
import os
import platform
import textwrap
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

LONG = os.environ.get("GUESTPASS_LONG") == "1"

long_only = pytest.mark.skipif(not LONG, reason="takes long: GUESTPASS_LONG=1, as in the suite's make target")


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    done: str
    measured: str
    limit: str
    ok: bool
    figure: int | None = None
    """Number of the figure in the project's scoreboard that this row is."""


ROWS: list[Row] = []


def row(
    name: str,
    done: str,
    measured: str,
    limit: str,
    *,
    ok: bool,
    timing: bool = False,
    figure: int | None = None,
) -> None:
    """Add a row. One that is not ok fails the test, in the short form not if it is about `timing`."""
    ROWS.append(Row(name, done, measured, limit, ok, figure))
    assert ok or (timing and not LONG), f"{name}: {measured}, limit {limit}"


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def text() -> str:
    """The table as people read it."""
    widths = (30, 44, 50, 30)
    lines = [_line(("what", "what was done", "measured", "limit"), widths) + "pass"]
    for entry in ROWS:
        name = entry.name if entry.figure is None else f"{entry.name} (figure {entry.figure})"
        cells = [
            textwrap.wrap(cell, width - 2) or [""]
            for cell, width in zip((name, entry.done, entry.measured, entry.limit), widths, strict=True)
        ]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            lines.append(_line(parts, widths) + (("yes" if entry.ok else "NO") if number == 0 else ""))
    return "\n".join(lines)


def _line(parts: Iterable[str], widths: Iterable[int]) -> str:
    return "".join(part.ljust(width) for part, width in zip(parts, widths, strict=True))


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "form": "long" if LONG else "short",
        "machine": {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
        },
        "rows": [asdict(entry) for entry in ROWS],
    }
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
