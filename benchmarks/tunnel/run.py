"""The tunnel's figures, measured side by side with what they are compared with, and their targets.

    python benchmarks/tunnel/run.py                     all: a table, and benchmarks/results/tunnel.json
    python benchmarks/tunnel/run.py --only echo bulk    some of them (the JSON keeps the others of an earlier run)
    python benchmarks/tunnel/run.py --rounds 7          default 5; ours and the peer's take turns, medians count

echo    open, 200 B over, the same 200 B back, close; 64 at a time; two processes; plain TCP on loopback. Ours: the edge
        opens, the gateway echoes, each stream has a request and a response head as well. Peer: hashicorp/yamux, Go's
        runtime with all cores
bulk    one stream, gateway to edge (the masked direction), plain TCP. Peer: yamux with its defaults and (in the
        details) with a window of 6 MiB
tls     the same through TLS 1.3. A core is a second of CPU, of sender and receiver together. Limit: AES-256-GCM of
        `openssl speed`, once to encrypt and once to decrypt
wan     one stream over 100 ms and 1 Gbit/s (wan.py), from the third second on
beside  99 visitors with small exchanges, alone, and beside a download of 1 Gbit/s and a stalled stream; in the details
        beside a download as fast as the two processes can, when what is measured is also the lack of a third core
frame   instructions for one received DATA frame of 64 B (instructions.py)
idle    resident memory of 10,000 idle streams of one gateway, without sockets; each of them works afterwards

What a machine cannot do is skipped with a printed reason. Figures without a peer compare with their target.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "tunnel.json"

ECHO_STREAMS = 60_000
BULK_BYTES = 2_000_000_000
CONCURRENT = 64
IDLE_STREAMS = 10_000
VISITORS = 99
DOWNLOAD = 125_000_000


class Skipped(Exception):
    """Why this machine cannot measure something."""


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


class End:
    """One end of a tunnel (ends.py) as a process. `before`: a command that the process is to be run by."""

    def __init__(self, *arguments: str | Path, before: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*before, sys.executable, str(HERE / "ends.py"), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended")  # type: ignore[union-attr]
        fields: dict[str, Any] = json.loads(line)
        return fields

    def do(self, name: str, **fields: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": name, **fields}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def tunnel(folder: Path, lane: str, *, tls: bool = False) -> Iterator[tuple[End, End]]:
    """Edge and gateway, connected."""
    edge = End("edge", folder, lane, *(["--tls"] if tls else []))
    try:
        ca = ["--ca", edge.first["ca"]] if tls else []
        gateway = End("gateway", folder, lane, "--url", edge.first["url"], *ca)
        try:
            yield edge, gateway
        finally:
            gateway.close()
    finally:
        edge.close()


class Yamux:
    """The Go program of yamux/: its server, and its client's figures."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.program = folder / "yamux"
        if not self.program.exists():
            if (
                shutil.which("go") is None
                or not Path("/usr/share/gocode/src/github.com/hashicorp/yamux").is_dir()
            ):
                raise Skipped(
                    "no hashicorp/yamux: apt-get install golang-go golang-github-hashicorp-yamux-dev"
                )
            go = {"GOPATH": "/usr/share/gocode", "GO111MODULE": "off", "GOCACHE": str(folder / "go")}
            subprocess.run(
                ["go", "build", "-o", str(self.program), "."],
                cwd=HERE / "yamux",
                env={**os.environ, **go},
                check=True,
            )
        self.environment = {**os.environ, **environment}
        self.server = subprocess.Popen(
            [self.program, "serve"], stdout=subprocess.PIPE, text=True, env=self.environment
        )
        assert self.server.stdout is not None
        self.port = self.server.stdout.readline().strip()

    def run(self, *arguments: Any) -> dict[str, Any]:
        """The client's figures; `cpu` is that of both ends."""
        what, *rest = map(str, arguments)
        before = cpu_of(self.server.pid)
        done = subprocess.run(
            [self.program, what, self.port, *rest],
            capture_output=True,
            text=True,
            check=True,
            env=self.environment,
        )
        fields: dict[str, Any] = json.loads(done.stdout)
        fields["cpu"] += cpu_of(self.server.pid) - before
        return fields

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()


def cpu_of(pid: int) -> float:
    """Seconds of CPU of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Report:
    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.figures: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {}

    def add(
        self,
        part: str,
        figure: str,
        ours: list[float],
        peer: list[float] | None,
        unit: str,
        target: float,
        *,
        of_ours: bool = False,
        most: bool = False,
    ) -> None:
        """Medians. `target` is of the ratio, or with `of_ours` of our figure itself; `most`: at most, not at least."""
        mine = statistics.median(ours)
        other = statistics.median(peer) if peer else None
        ratio = mine / other if other else None
        judged = mine if of_ours or ratio is None else ratio
        reached = judged <= target if most else judged >= target
        words = f"{'≤' if most else '≥'} {target:g} {unit if of_ours or ratio is None else '×'}"
        self.figures.append(
            {
                "part": part,
                "figure": figure,
                "ours": mine,
                "peer": other,
                "unit": unit,
                "ratio": ratio,
                "target": words,
                "reached": reached,
                "rounds": len(ours),
                # of the rounds' own ratios where there is a peer, as in every result
                "spread": spread(ours, peer),
                "range": [min(ours), max(ours)],
            }
        )
        print(row(self.figures[-1]), flush=True)


def spread(ours: list[float], peer: list[float] | None) -> list[float] | None:
    if not peer:
        return None
    ratios = [mine / other for mine, other in zip(ours, peer, strict=False)]
    return [min(ratios), max(ratios)]


def row(figure: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    ratio = "-" if figure["ratio"] is None else f"{figure['ratio']:.2f} ×"
    low, high = figure["range"]
    return (
        f"{figure['figure']:<58} {number(figure['ours']):>10} {number(figure['peer']):>10} {figure['unit']:<12} "
        f"{ratio:>8}  {figure['target']:<16} {'yes' if figure['reached'] else 'NO':<3} "
        f"({number(low)} to {number(high)}, {figure['rounds']} rounds)"
    )


def rate(result: dict[str, Any]) -> float:
    return float(result["count"] / result["seconds"])


def echo(report: Report, folder: Path) -> None:
    yamux = Yamux(folder, YAMUX_WINDOW="default")
    lanes: dict[str, list[float]] = {"c": [], "python": [], "task": []}
    cpu: dict[str, list[float]] = {lane: [] for lane in lanes}
    peer: list[float] = []
    peer_cpu: list[float] = []
    try:
        with (
            tunnel(folder, "c") as in_c,
            tunnel(folder, "python") as in_python,
            tunnel(folder, "task") as in_tasks,
        ):
            ends = {"c": in_c, "python": in_python, "task": in_tasks}
            for _ in range(report.rounds):
                for lane, (edge, gateway) in ends.items():
                    total = ECHO_STREAMS // 4 if lane == "task" else ECHO_STREAMS * 2
                    before = gateway.do("usage")["cpu"]
                    result = edge.do("echo", total=total, concurrent=CONCURRENT)
                    lanes[lane].append(rate(result))
                    used = result["cpu"] + gateway.do("usage")["cpu"] - before
                    cpu[lane].append(1e6 * used / total)
                result = yamux.run("echo", ECHO_STREAMS // 2, CONCURRENT)
                peer.append(rate(result))
                peer_cpu.append(1e6 * result["cpu"] / result["count"])
    finally:
        yamux.close()
    report.add("echo", "open + echo 200 B + close, yamux", lanes["c"], peer, "streams/s", 4)
    report.add("echo", "  the same with a Python handler a stream", lanes["python"], peer, "streams/s", 4)
    report.add(
        "echo", "  the same with an asyncio task a stream, both ends", lanes["task"], peer, "streams/s", 1
    )
    report.details["echo"] = {
        "cpu_microseconds_of_both_ends_per_stream": {
            **{lane: statistics.median(cpu[lane]) for lane in cpu},
            "yamux": statistics.median(peer_cpu),
        }
    }


def bulk(report: Report, folder: Path) -> None:
    yamux = Yamux(folder, YAMUX_WINDOW="default")
    wide = Yamux(folder)
    ours: list[float] = []
    handlers: list[float] = []
    tasks: list[float] = []
    peer: list[float] = []
    peer_cores: list[float] = []
    wider: list[float] = []
    wider_cores: list[float] = []
    cores: list[float] = []
    try:
        with (
            tunnel(folder, "c") as (edge, gateway),
            tunnel(folder, "python") as (edge_python, _),
            tunnel(folder, "task") as (edge_task, _),
        ):
            edge.do("bulk", size=BULK_BYTES // 4)
            for _ in range(report.rounds):
                before = gateway.do("usage")["cpu"]
                result = edge.do("bulk", size=BULK_BYTES)
                ours.append(rate(result) / 1e9)
                cores.append(BULK_BYTES / 1e9 / (result["cpu"] + gateway.do("usage")["cpu"] - before))
                for program, rates, by_core in ((yamux, peer, peer_cores), (wide, wider, wider_cores)):
                    result = program.run("bulk", BULK_BYTES)
                    rates.append(rate(result) / 1e9)
                    by_core.append(BULK_BYTES / 1e9 / result["cpu"])
                handlers.append(rate(edge_python.do("bulk", size=BULK_BYTES)) / 1e9)
                tasks.append(rate(edge_task.do("bulk", size=BULK_BYTES // 2)) / 1e9)
    finally:
        yamux.close()
        wide.close()
    report.add("bulk", "one bulk stream, yamux", ours, peer, "GB/s", 2)
    report.details["bulk"] = {
        "GB/s by Python handlers": statistics.median(handlers),
        "GB/s by TunnelStream and a task at both ends": statistics.median(tasks),
        "GB/s by yamux with a window of 6 MiB": statistics.median(wider),
        "GB per CPU second of both ends": {
            "ours": statistics.median(cores),
            "yamux": statistics.median(peer_cores),
            "yamux with a window of 6 MiB": statistics.median(wider_cores),
        },
    }


def tls(report: Report, folder: Path) -> None:
    if shutil.which("openssl") is None:
        raise Skipped("no openssl: apt-get install openssl")
    limits: list[float] = []
    cores: list[float] = []
    sender: list[float] = []
    receiver: list[float] = []
    wall: list[float] = []
    with tunnel(folder, "c", tls=True) as (edge, gateway):
        edge.do("bulk", size=BULK_BYTES // 8)
        for _ in range(report.rounds):
            limits.append(cipher_speed() / 2)
            before = gateway.do("usage")["cpu"]
            result = edge.do("bulk", size=BULK_BYTES // 2)
            used = gateway.do("usage")["cpu"] - before
            size = result["count"] / 1e9
            cores.append(size / (used + result["cpu"]))
            sender.append(size / used)
            receiver.append(size / result["cpu"])
            wall.append(rate(result) / 1e9)
    report.add("tls", "bulk by TLS, per CPU second of both ends", cores, limits, "GB/s", 0.6, of_ours=True)
    report.details["tls"] = {
        "share of the limit (encrypted and decrypted once)": statistics.median(cores)
        / statistics.median(limits),
        "openssl speed -evp aes-256-gcm, 16 KiB, GB/s": 2 * statistics.median(limits),
        "GB per CPU second of the sender": statistics.median(sender),
        "GB per CPU second of the receiver": statistics.median(receiver),
        "GB/s by the clock": statistics.median(wall),
    }


def cipher_speed() -> float:
    """GB/s of AES-256-GCM on one core, in blocks of 16 KiB, by CPU time."""
    done = subprocess.run(
        ["openssl", "speed", "-mr", "-seconds", "1", "-bytes", "16384", "-evp", "aes-256-gcm"],
        capture_output=True,
        text=True,
        check=True,
    )
    last = next(line for line in done.stdout.splitlines() if line.startswith("+F:"))
    return float(last.rsplit(":", 1)[1]) / 1e9


def wan(report: Report, folder: Path) -> None:
    import wan as network

    reason = network.why_not()
    if reason:
        raise Skipped(reason)
    shares = []
    for _ in range(max(1, report.rounds // 2)):
        result = network.measure(End, folder)
        shares.append(100 * result["share"])
        report.details["wan"] = result
    report.add("wan", "one stream, 100 ms and 1 Gbit/s, from 3 s on", shares, None, "% of link", 80)


def beside(report: Report, folder: Path) -> None:
    alone: list[float] = []
    crowded: list[float] = []
    ratios: list[float] = []
    unbound: list[float] = []
    last: dict[str, Any] = {}
    with tunnel(folder, "task") as (edge, _):
        edge.do("beside", small=VISITORS, seconds=1, bulk=None, stalled=False)
        for _ in range(report.rounds):
            first = edge.do("beside", small=VISITORS, seconds=3, bulk=None, stalled=False)
            last = edge.do("beside", small=VISITORS, seconds=3, bulk=DOWNLOAD, stalled=True)
            flat_out = edge.do("beside", small=VISITORS, seconds=2, bulk=0, stalled=True)
            unbound.append(flat_out["p99"] / first["p99"])
            alone.append(first["p99"])
            crowded.append(last["p99"])
            ratios.append(last["p99"] / first["p99"])
            if last["stalled_buffered"] > last["windows"] or last["promised_most"] > 512 * 1024 * 1024:
                raise RuntimeError(f"memory beyond the windows: {last}")
    report.add(
        "beside", "99 small streams, p99 beside bulk and a stalled one", crowded, alone, "ms", 1.5, most=True
    )
    report.details["beside"] = {
        "ratios": ratios,
        "ratio beside a download without a bound": statistics.median(unbound),
        "last round": last,
    }


def frame(report: Report, folder: Path) -> None:
    import instructions

    reason = instructions.why_not()
    if reason:
        raise Skipped(reason)
    report.add(
        "frame",
        "instructions for a received frame of 64 B",
        [instructions.measure()],
        None,
        "",
        120,
        most=True,
    )


def idle(report: Report, folder: Path) -> None:
    each: list[float] = []
    for _ in range(max(1, report.rounds // 2)):
        with tunnel(folder, "task") as (edge, gateway):
            edge.do("echo", total=1000, concurrent=CONCURRENT)
            before = gateway.do("usage")
            held = edge.do("hold", count=IDLE_STREAMS)
            after = gateway.do("usage")
            each.append(held["bytes_each"])
            worked = edge.do("release")
            if (held["streams"], worked["worked"], worked["streams"]) != (IDLE_STREAMS, IDLE_STREAMS, 0):
                raise RuntimeError(f"{held}, {worked}")
    report.add(
        "idle", "an idle stream at the edge, of 10,000 that work", each, None, "bytes", 4096, most=True
    )
    report.details["idle"] = {
        "bytes at the gateway, with a task": (after["rss"] - before["rss"]) / IDLE_STREAMS,
        "streams": IDLE_STREAMS,
    }


PARTS: dict[str, Callable[[Report, Path], None]] = {
    "echo": echo,
    "bulk": bulk,
    "tls": tls,
    "wan": wan,
    "beside": beside,
    "frame": frame,
    "idle": idle,
}


def machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    found = {
        name: importlib.metadata.version(name) for name in ("guestpass", "uvloop", "aiofastnet", "Cython")
    }
    for name, command in (("go", ["go", "version"]), ("openssl", ["openssl", "version"])):
        if shutil.which(command[0]) is not None:
            found[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    package = "golang-github-hashicorp-yamux-dev"
    asked = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True, check=False
    )
    if asked.returncode == 0:
        found["yamux"] = asked.stdout
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE))
    report = Report(arguments.rounds)
    skipped: dict[str, str] = {}
    where = machine()
    print(
        f"{'figure':<58} {'ours':>10} {'peer':>10} {'unit':<12} {'ratio':>8}  {'target':<16} reached",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="guestpass-bench-") as made:
        import build_lane

        folder = Path(made)
        build_lane.build(folder / "lane")
        for part in arguments.only:
            try:
                PARTS[part](report, folder)
            except Skipped as exc:
                skipped[part] = str(exc)
                print(f"{part}: skipped, {exc}", flush=True)
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"figures": [], "details": {}}
    kept = [f for f in old["figures"] if f.get("part") not in arguments.only]
    order = {part: index for index, part in enumerate(PARTS)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {
                "name": "tunnel",
                "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "machine": where,
                "versions": versions(),
                "figures": sorted(kept + report.figures, key=lambda f: order.get(f.get("part"), 99)),
                "details": {**old["details"], **report.details, "skipped": skipped},
            },
            indent=2,
            ensure_ascii=False,
        )
        + "\n"
    )
    missed = [figure["figure"].strip() for figure in report.figures if not figure["reached"]]
    print("every target reached" if not missed else f"not reached: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
