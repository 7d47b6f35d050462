"""One figure in half a minute, for whoever works on the fast lane:

python benchmarks/system/spot.py --conns 64 --size small --peers nginx-tls
python benchmarks/system/spot.py --size 1MB --conns 8 --peers nginx-tls,nginx --rounds 5
python benchmarks/system/spot.py --peers guestpass-slow --lock ~/bench.lock
python benchmarks/system/spot.py --only --perf edge      where the edge's CPU goes (perf, in perf-edge.txt)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from processes import Lab, Missing, need
from rounds import Load, Wrong, compare, ratio, wrk
from targets import LABELS, SIZES, TARGETS, Target

PERF_SECONDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours", default="guestpass", choices=TARGETS)
    parser.add_argument("--peers", default="nginx-tls", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--only", action="store_true", help="no peers")
    parser.add_argument("--conns", type=int, default=64)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--tls", action="store_true", help="visitors come over TLS")
    parser.add_argument("--lock", type=Path, help="held exclusively while it measures")
    parser.add_argument("--perf", choices=("edge", "gateway"), help="afterwards, a profile of that process")
    args = parser.parse_args()
    names = [args.ours] + ([] if args.only else [name for name in args.peers.split(",") if name])
    try:
        need("nginx", "wrk")
        with Lab() as lab:
            targets = [TARGETS[name](lab, tls=args.tls) for name in names]
            load = Load(args.size, args.conns, args.seconds)
            series = compare(targets, load, args.rounds, lock=args.lock)
            ours = series[args.ours]
            for name in names[1:]:
                if not ours.runs or not series[name].runs:
                    continue
                rate, spread = ratio(ours, series[name])
                p50, _ = ratio(ours, series[name], "p50")
                p99, _ = ratio(ours, series[name], "p99")
                print(
                    f"{LABELS[args.ours]} against {LABELS[name]}: {rate:.2f}× the rate ({spread[0]}–{spread[1]}), "
                    f"p50 {p50:.2f}×, p99 {p99:.2f}×"
                )
            if args.perf:
                profile(targets[0], load, args.perf)
    except (Missing, Wrong) as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


def profile(target: Target, load: Load, role: str) -> None:
    """perf of one of ours under this load, by library and by symbol, into perf-ROLE.txt."""
    data, text = Path(f"perf-{role}.data"), Path(f"perf-{role}.txt")
    record = subprocess.Popen(
        [
            "perf",
            "record",
            "-q",
            "-g",
            "-o",
            data,
            "-p",
            str(target.role(role).pid),
            "--",
            "sleep",
            str(PERF_SECONDS),
        ]
    )
    wrk(target, load, PERF_SECONDS)
    record.wait()
    with text.open("wb") as output:
        for sort in ("dso", "dso,symbol"):
            command = ["perf", "report", "--stdio", "--no-children", "-g", "none", "--sort", sort, "-i", data]
            subprocess.run(command, stdout=output, stderr=subprocess.DEVNULL, check=False)
            output.seek(0, 2)
    data.unlink()
    print(f"profile of the {role}: {text}")


if __name__ == "__main__":
    sys.exit(main())
