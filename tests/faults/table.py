"""The fault table: what was done to Guestpass, what was measured, and the limit.

Every test of this folder adds rows. `make faults` runs the long forms, prints the table and writes it as JSON; the
short forms are part of `make test`, where times are shown but do not decide: a machine that is busy with other things
proves nothing about them. Whether a request was lost or a process died decides always.

Where each row of "known failures of others" is shown:

| failure | seen in | at the session (`tests/speedups/test_known_failures.py`) | on the whole system, here |
|---|---|---|---|
| a slow reader stalls every stream | smux #18, #85; WaterWall #332
    | `test_a_slow_reader_does_not_stall_other_streams` | `test_one_stalled_stream_of_100` |
| one paused download captures the connection | nghttp2 #713; hyper #2899
    | `test_a_paused_download_does_not_capture_the_connection` | `test_paused_downloads_do_not_capture_the_tunnel` |
| reading gated on writing: deadlock when both sides push | rust-yamux #227; h2o #912
    | `test_both_sides_push_and_neither_stops_reading`, `test_reading_goes_on_without_any_writing`
    | `test_both_sides_push` |
| window / RTT caps one stream | frp #2987; pangolin #1389
    | `test_one_stream_fills_a_long_pipe` | `test_a_narrow_link_is_filled`; over 100 ms of delay: `make bench` |
| whole-window frames delay small ones | hashicorp/yamux
    | `test_a_small_answer_overtakes_a_download` | `test_a_narrow_link_is_filled` |
| timed-out write leaves the peer's read hung | yamux GHSA-29qp-crvh-w22m
    | `test_when_a_tunnel_dies_every_stream_hears_of_it`
    | `test_a_tunnel_that_ends_wakes_everybody`, `test_black_hole` |
| unbounded pending frames, window overflow, oversized first frame
    | rust-yamux CVE-2024-32984, CVE-2026-31814, CVE-2026-32314
    | `test_pending_frames_are_bounded_however_much_the_peer_provokes`, `test_credit_cannot_overflow`,
      `test_oversized_first_frames` | `test_bad_gateways`, `test_bad_edges` |
| ping, reset, settings, empty-frame floods
    | HTTP/2 of 2019, CVE-2023-44487, CVE-2025-8671, RUSTSEC-2026-0258
    | `test_ping_flood` to `test_made_you_reset` | `test_bad_gateways`, `test_bad_edges` |
| half-dead tunnel still used; cancelled one never renewed; hours of cooldown after a few failures
    | cloudflared #306, #724, #1381; newt #284, #433
    | `test_a_dead_tunnel_takes_no_more_streams` | `test_black_hole`, `test_frozen_gateway`, `test_thousand_returns` |
| "already in use" after reconnect | frp #209; sish #280
    | needs processes | `test_a_killed_gateway_is_back_under_its_name`, `test_clock_jumps` |
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

# GUESTPASS_FAULTS=long: the long forms.
LONG = os.environ.get("GUESTPASS_FAULTS") == "long"

long_only = pytest.mark.skipif(not LONG, reason="takes long, and runs in `make faults`")


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
    if not ROWS:
        return ""
    widths = (30, 44, 50, 30)
    lines = [_line(("fault", "what was done", "measured", "limit"), widths) + "pass"]
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
