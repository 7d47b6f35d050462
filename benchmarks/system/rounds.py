"""Alternating rounds: ours, peer, ours, peer … with wrk, and what counts as a round.

Before the first round each target is asked once, byte by byte, and then by a short run that looks at the status and
the length of every response. In the measured runs, looking at each would cost the client more than sending it; there
wrk counts statuses and socket errors itself, and its total of bytes must be the number of responses times the size of
one. A run with any error is not counted; it is repeated (`TRIES`), and a target that cannot do without is reported as
such.

The machine is watched too: a run during which other processes had more than `MAX_OTHERS` of a processor is repeated,
`BUSY_TRIES` times at most for one load; after that it counts, and the report says how much others had.

A ratio is the median of one over the median of the other; its spread, the lowest and highest of the rounds' own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Lab, Usage, program
from targets import LABELS, SIZES, Target, body

SCRIPT = Path(__file__).with_name("wrk.lua")

# Of a run with errors.
TRIES = 3

# Processors that others may have during a run: a desktop's background, not somebody's build.
MAX_OTHERS = 0.15

# Of runs on a busy machine: for all rounds of one load, and for the whole program.
BUSY_TRIES = 10
ALL_BUSY_TRIES = 60
BUSY_PAUSE = 1.0

CHECK_SECONDS = 1

# More for every so many connections, which have to be made first: a TLS handshake is a millisecond.
CHECK_CONNECTIONS = 256

# A response may differ a little from the first in its head: a date, a count.
HEAD_SLACK = 16

# Longer without an answer is an error.
TIMEOUT = "10s"

# Threads of wrk. With one, the client never takes both processors from what is measured.
THREADS = 1


class Patience:
    """How often this program still waits for a quiet machine."""

    def __init__(self, left: int) -> None:
        self.left = left


patience = Patience(ALL_BUSY_TRIES)


class Wrong(Exception):
    """A target did not answer as it must."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the client does."""

    size: str = "small"  # of SIZES
    connections: int = 64
    seconds: int = 2
    tokens: Path | None = None  # a file of bearer tokens to go round, instead of the target's

    @property
    def text(self) -> str:
        plural = "" if self.connections == 1 else "s"
        return f"{SIZE_LABELS[self.size]}, {self.connections:,} connection{plural}"


SIZE_LABELS = {
    "small": "small requests",
    "100B": "100 B bodies",
    "16KB": "16 KB bodies",
    "1MB": "1 MB bodies",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one target without an error."""

    rate: float  # responses a second
    p50: float  # microseconds
    p99: float
    cpu: Mapping[str, float]  # seconds, by role
    peak: Mapping[str, int]  # bytes, by role
    client_cpu: float
    others: float  # processors that the rest of the machine had
    responses: int

    @property
    def cpu_per_request(self) -> float:
        """Microseconds of all roles of the target together."""
        return sum(self.cpu.values()) / self.responses * 1e6


@dataclass
class Series:
    """All rounds of one target under one load."""

    target: str
    load: Load
    runs: list[Run] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of runs that were not counted

    def median(self, of: str) -> float:
        return statistics.median(getattr(run, of) for run in self.runs)

    def as_details(self) -> dict[str, Any]:
        """For the results file."""
        details: dict[str, Any] = {"target": self.target, "label": LABELS.get(self.target, self.target)}
        details |= {
            "size": self.load.size,
            "connections": self.load.connections,
            "seconds": self.load.seconds,
        }
        details |= {"rounds": len(self.runs), "errors": self.errors}
        if self.runs:
            for name in ("rate", "p50", "p99", "cpu_per_request"):
                details[name] = round(self.median(name), 2)
            details["rates"] = [round(run.rate, 1) for run in self.runs]
            details["cpu_seconds"] = {
                role: round(statistics.median(run.cpu[role] for run in self.runs), 3)
                for role in self.runs[0].cpu
            }
            details["peak_rss"] = {
                role: max(run.peak[role] for run in self.runs) for role in self.runs[0].peak
            }
            details["others"] = round(max(run.others for run in self.runs), 2)
            details["client_cpu_seconds"] = round(self.median("client_cpu"), 3)
        return details


@contextlib.contextmanager
def quiet(lock: Path | None) -> Iterator[None]:
    """Hold `lock` exclusively, so that runs of several people on one machine do not meet."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compare(
    targets: Sequence[Target], load: Load, rounds: int, *, lock: Path | None = None, say: bool = True
) -> dict[str, Series]:
    """`rounds` rounds over all targets in turn. Raises Wrong where one answers wrongly to begin with."""
    series = {target.name: Series(target.name, load) for target in targets}
    busy = BUSY_TRIES
    with quiet(lock):
        sizes = {target.name: check(target, load) for target in targets}
        for _ in range(rounds):
            for target in targets:
                into = series[target.name]
                if len(into.errors) >= TRIES and not into.runs:
                    continue  # it cannot do this
                tries = TRIES
                while tries:
                    try:
                        run = measure(target, load, sizes[target.name])
                    except Wrong as exc:
                        into.errors.append(str(exc))
                        tries -= 1
                        continue
                    if run.others > MAX_OTHERS and busy and patience.left:
                        busy -= 1
                        patience.left -= 1
                        time.sleep(BUSY_PAUSE)
                        continue
                    into.runs.append(run)
                    break
    if say:
        for one in series.values():
            print(line(one), file=sys.stderr, flush=True)
    return series


def line(series: Series) -> str:
    """One line for people who watch."""
    head = f"  {series.load.text:32} {LABELS.get(series.target, series.target):26}"
    if not series.runs:
        return f"{head} not counted: {series.errors[-1]}"
    roles = ", ".join(
        f"{role} {statistics.median(run.cpu[role] / run.responses for run in series.runs) * 1e6:.1f}"
        for role in series.runs[0].cpu
    )
    others = max(run.others for run in series.runs)
    return (
        f"{head} {series.median('rate'):>9,.0f}/s  p50 {series.median('p50'):>7,.0f}  "
        f"p99 {series.median('p99'):>7,.0f} µs   CPU µs each: {roles}"
        + (f"   (others had {others:.1f} processors)" if others > MAX_OTHERS else "")
    )


def ratio(ours: Series, peer: Series, of: str = "rate") -> tuple[float, list[float]]:
    """(ratio of the medians, [lowest, highest] of the rounds' own)."""
    each = [getattr(a, of) / getattr(b, of) for a, b in zip(ours.runs, peer.runs, strict=False)]
    return ours.median(of) / peer.median(of), [round(min(each), 3), round(max(each), 3)]


# ── one run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(target: Target, load: Load, size: int) -> Run:
    """Raises Wrong."""
    for process in target.processes:
        process.reset_peak()
    before = {process.role: process.usage() for process in target.processes}
    lab, busy, client = lab_cpu(target.lab), machine_cpu(), children_cpu()
    totals = wrk(target, load, load.seconds)
    client_used, busy_used = children_cpu() - client, machine_cpu() - busy
    lab_used = lab_cpu(target.lab) - lab
    after = {process.role: process.usage() for process in target.processes}
    _no_errors(target, totals)
    responses, received = totals["requests"], totals["bytes"]
    if not responses:
        raise Wrong(f"{target.name}: no answer at all")
    # What was under way when the run ended counts as bytes but not as responses.
    low = responses * (size - HEAD_SLACK)
    high = responses * (size + HEAD_SLACK) + 2 * load.connections * size
    if not low <= received <= high:
        raise Wrong(f"{target.name}: {received} bytes in {responses} responses of {size}")
    cpu = {role: after[role].cpu - before[role].cpu for role in before}
    return Run(
        rate=responses / (totals["duration"] / 1e6),
        p50=totals["p50"],
        p99=totals["p99"],
        cpu=cpu,
        peak={role: usage.peak for role, usage in after.items()},
        client_cpu=client_used,
        others=max(busy_used - lab_used - client_used, 0.0) / (totals["duration"] / 1e6),
        responses=responses,
    )


def machine_cpu() -> float:
    """Seconds that all processors worked for processes: user, nice and system."""
    fields = Path("/proc/stat").read_text().split(None, 4)
    return sum(map(int, fields[1:4])) / os.sysconf("SC_CLK_TCK")


def lab_cpu(lab: Lab) -> float:
    return sum(process.usage().cpu for process in lab.processes)


def children_cpu() -> float:
    """Seconds of the clients that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def wrk(target: Target, load: Load, seconds: int, check: str | None = None) -> dict[str, int]:
    """The totals of one run. Raises Wrong when there are none."""
    command = [program("wrk"), "-t", str(THREADS), "-c", str(load.connections), "-d", f"{seconds}s"]
    command += ["--timeout", TIMEOUT, "-s", str(SCRIPT)]
    for name, value in target.headers.items():
        command += ["-H", f"{name}: {value}"]
    command.append(f"{target.base}/{load.size}")
    env = {**os.environ, "GUESTPASS_PREFIX": target.prefix}
    if check is not None:
        env["GUESTPASS_CHECK"] = check
    if load.tokens is not None:
        env["GUESTPASS_TOKENS"] = str(load.tokens)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found = re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise Wrong(f"wrk ended with status {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}")
    totals: dict[str, int] = json.loads(found[0])
    return totals


def _no_errors(target: Target, totals: Mapping[str, int]) -> None:
    errors = {
        name: totals[name] for name in ("connect", "read", "write", "status", "timeout") if totals[name]
    }
    if errors:
        text = ", ".join(f"{number} of {name}" for name, number in errors.items())
        raise Wrong(f"{target.name}: errors: {text}")


def check(target: Target, load: Load) -> int:
    """Whether a target answers rightly; returns the bytes of one response, head and body. Raises Wrong.

    Also its warm-up: the connections to the application are open afterwards.
    """
    head, content = fetch(target, load.size)
    if not head.startswith(b"HTTP/1.1 200"):
        raise Wrong(f"{target.name} answers {head.splitlines()[:1]}")
    if content != body(load.size):
        raise Wrong(f"{target.name}: the body is not what the application sent")
    seconds = CHECK_SECONDS + load.connections // CHECK_CONNECTIONS
    totals = wrk(target, load, seconds, f"200:{SIZES[load.size]}")
    if totals["wrong"] or not totals["seen"]:
        raise Wrong(f"{target.name}: {totals['wrong']} of {totals['seen']} responses were wrong")
    return len(head) + len(content)


def fetch(target: Target, size: str) -> tuple[bytes, bytes]:
    """One request on a connection of its own: (head, body), read by Content-Length. Raises Wrong."""
    headers = {"Host": f"127.0.0.1:{target.port}", **target.headers}
    lines = [
        f"GET {target.prefix}/{size} HTTP/1.1",
        *(f"{name}: {value}" for name, value in headers.items()),
        "",
        "",
    ]
    sock = socket.create_connection(("127.0.0.1", target.port), timeout=10)
    if target.tls:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        sock = context.wrap_socket(sock)
    with sock:
        sock.sendall("\r\n".join(lines).encode())
        received = b""
        while b"\r\n\r\n" not in received:
            part = sock.recv(65536)
            if not part:
                raise Wrong(f"{target.name} closed the connection: {received[:200]!r}")
            received += part
        head, _, content = received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if length is None:
            raise Wrong(f"{target.name}: no Content-Length in {head!r}")
        while len(content) < int(length[1]):
            part = sock.recv(1 << 20)
            if not part:
                raise Wrong(f"{target.name}: the body ended after {len(content)} bytes")
            content += part
    return head + b"\r\n\r\n", content


__all__ = ["Load", "Run", "Series", "Usage", "Wrong", "check", "compare", "line", "measure", "quiet", "ratio"]
