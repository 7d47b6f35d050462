"""Figures and the files they are kept in: `benchmarks/results/NAME.json`, which report.py reads.

    {"name", "when", "machine": {cpu, cores, kernel, python}, "versions": {…},
     "figures": [{"figure", "ours", "peer", "unit", "ratio", "target", "reached", "rounds", "spread"}], "details": {…}}

`target` is a text like "≥ 2.0" or "≤ 12"; it is held against the ratio, or, where there is no peer, against the value.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import Missing, need, program
from rounds import Series, Wrong, patience, ratio
from targets import LABELS

RESULTS = Path(__file__).parents[1] / "results"

# Distributions and programs whose versions decide what a figure means.
DISTRIBUTIONS = ("guestpass", "aiofastnet", "aiohttp", "Cython", "picows", "proxy.py", "uvloop")
PROGRAMS = {
    "nginx": ("-v",),
    "haproxy": ("-v",),
    "wrk": ("-v",),
    "ssh": ("-V",),
}

# Rounds of figures with a target: fewer would not tell a figure from its noise.
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Options:
    """Of every script here."""

    rounds: int
    seconds: int
    smoke: bool  # tiny numbers: whether the scripts work, not what they measure
    lock: Path | None
    results: Path


def options(about: str | None, argv: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"alternating rounds (default: {ROUNDS})")
    parser.add_argument("--seconds", type=int, default=2, help="of each run (default: 2)")
    parser.add_argument(
        "--smoke", action="store_true", help="one short round of everything; measures nothing"
    )
    parser.add_argument("--busy", action="store_true", help="do not wait for a quiet machine")
    parser.add_argument("--lock", type=Path, help="a file, held exclusively while it measures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where NAME.json goes")
    args = parser.parse_args(argv)
    raise_file_limit()
    if args.smoke or args.busy:
        patience.left = 0
    if args.smoke:
        return Options(1, 1, True, args.lock, args.results)
    return Options(args.rounds, args.seconds, False, args.lock, args.results)


def run(main: Any, about: str | None, *programs: str) -> int:
    """The exit status of a script: 1 and one line where something is missing or a target answers wrongly."""
    chosen = options(about)
    try:
        need("nginx", "wrk", *programs)
        main(chosen)
    except (Missing, Wrong) as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


def raise_file_limit() -> None:
    """A thousand visitors are two thousand sockets, and many shells begin with a limit of 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def figure(
    text: str,
    *,
    ours: float | None,
    unit: str,
    peer: float | None = None,
    ratio: float | None = None,
    target: str | None = None,
    rounds: int = 1,
    spread: list[float] | None = None,
    note: str = "",
) -> dict[str, Any]:
    value = ratio if ratio is not None else ours
    reached = None if target is None else value is not None and holds(value, target)
    row: dict[str, Any] = {"figure": text, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio}
    row |= {"target": target, "reached": reached, "rounds": rounds, "spread": spread}
    if note:
        row["note"] = note
    return row


def holds(value: float, target: str) -> bool:
    """Whether `value` is as `target` demands: "≥ 2.0", "≤ 0.6"."""
    sign, number = target.split()
    return value >= float(number) if sign == "≥" else value <= float(number)


def against(
    ours: Series,
    peer: Series,
    *,
    of: str = "rate",
    target: str | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """The figure of two series: a rate, or a latency."""
    unit = "requests/s" if of == "rate" else "µs"
    what = prefix + ours.load.text + ("" if of == "rate" else f", {of}")
    text = f"{what}, against {LABELS.get(peer.target, peer.target)}"
    if not ours.runs or not peer.runs:
        who = ours if not ours.runs else peer
        return figure(
            text,
            ours=ours.median(of) if ours.runs else None,
            peer=peer.median(of) if peer.runs else None,
            unit=unit,
            target=target,
            note=f"no run without errors: {who.errors[-1]}",
        )
    value, spread = ratio(ours, peer, of)
    others = max(run.others for series in (ours, peer) for run in series.runs)
    return figure(
        text,
        ours=round(ours.median(of), 1),
        peer=round(peer.median(of), 1),
        unit=unit,
        ratio=round(value, 3),
        target=target,
        rounds=min(len(ours.runs), len(peer.runs)),
        spread=spread,
        note=f"other processes had {others:.1f} processors" if others > 0.3 else "",
    )


def save(chosen: Options, name: str, figures: list[dict[str, Any]], details: dict[str, Any]) -> None:
    chosen.results.mkdir(parents=True, exist_ok=True)
    result = {
        "name": name,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "smoke": chosen.smoke,
        "machine": machine(),
        "versions": versions(),
        "figures": figures,
        "details": details,
    }
    path = chosen.results / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for row in figures:
        print(row_text(row))


def row_text(row: dict[str, Any]) -> str:
    """One line for a terminal."""
    text = f"{row['figure'][:96]:96} "
    if row["ratio"] is not None:
        text += f"{row['ratio']:>7.2f}×"
    else:
        text += f"{'-' if row['ours'] is None else format(row['ours'], ',.4g'):>8}"
    text += f"  {row['target'] or '':8}"
    text += {True: "reached", False: "MISSED", None: ""}[row["reached"]]
    return text + (f"  ({row['note']})" if row.get("note") else "")


def machine() -> dict[str, Any]:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not every run needs all of them
    for name, arguments in PROGRAMS.items():
        try:
            done = subprocess.run(
                [program(name), *arguments], capture_output=True, text=True, check=False, timeout=10
            )
        except Missing:
            continue
        # "nginx/1.22.1", "HAProxy version 2.6.12-1", "OpenSSH_9.2p1"
        if number := re.search(r"(?<![A-Za-z0-9.])(\d+\.\d+[\w.+-]*)", done.stderr + done.stdout):
            found[name] = number[1]
    return found
