"""The main ratios in about a minute: `make bench-quick`, or `python benchmarks/quick.py [--json]`.

Three rounds of a second each, so the last digit is noise; `make bench` takes five rounds of two seconds. Everything
runs on this machine and on loopback: see benchmarks/system/targets.py for what is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "system"))

import sockets
from figures import Options, against, machine, raise_file_limit, row_text, versions
from processes import Lab, Missing, need
from rounds import Load, Wrong, compare, patience
from targets import TARGETS

SECONDS = 1
ROUNDS = 3

# Longer waits for a quiet machine would not be quick.
BUSY_TRIES = 5


def measure(chosen: Options, *, say: bool) -> list[dict[str, Any]]:
    """The figures. Raises Wrong."""
    figures: list[dict[str, Any]] = []

    def rounds(names: tuple[str, ...], size: str, connections: int, *, tls: bool = False) -> Any:
        targets = [visited[name] if tls else plain[name] for name in names]
        return compare(
            targets, Load(size, connections, chosen.seconds), chosen.rounds, lock=chosen.lock, say=say
        )

    with Lab() as lab:
        plain = {
            name: TARGETS[name](lab)
            for name in ("guestpass", "nginx-tls", "nginx", "haproxy", "aiohttp", "ssh")
        }
        visited = {name: TARGETS[name](lab, tls=True) for name in ("guestpass", "nginx-tls")}

        found = rounds(tuple(plain), "small", 64)
        for name, target in (
            ("nginx-tls", "≥ 2.0"),
            ("nginx", "≥ 1.0"),
            ("haproxy", None),
            ("aiohttp", "≥ 9"),
            ("ssh", "≥ 2.5"),
        ):
            figures.append(against(found["guestpass"], found[name], target=target))
        figures.append(against(found["guestpass"], found["nginx-tls"], of="p99", target="≤ 0.6"))

        found = rounds(("guestpass", "nginx-tls"), "small", 1)
        figures.append(against(found["guestpass"], found["nginx-tls"], of="p50", target="≤ 1.0"))

        found = rounds(("guestpass", "nginx-tls", "nginx", "haproxy"), "1MB", 8)
        for name, target in (("nginx-tls", "≥ 1.5"), ("nginx", "≥ 0.7"), ("haproxy", "≥ 0.5")):
            figures.append(against(found["guestpass"], found[name], target=target))

        found = rounds(("guestpass", "nginx-tls"), "small", 64, tls=True)
        figures.append(
            against(found["guestpass"], found["nginx-tls"], target="≥ 1.5", prefix="TLS visitors: ")
        )
        figures += sockets.messages(chosen, [plain["guestpass"], plain["nginx"]], {}, say=say)[:1]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, and nothing else")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--lock", type=Path, help="a file, held exclusively while it measures")
    args = parser.parse_args()
    raise_file_limit()
    patience.left = BUSY_TRIES
    begin = time.monotonic()
    try:
        need("nginx", "wrk", "haproxy", "ssh", "sshd")
        figures = measure(Options(args.rounds, SECONDS, False, args.lock, Path()), say=not args.json)
    except (Missing, Wrong) as exc:
        print(json.dumps({"error": str(exc)}) if args.json else exc, file=sys.stderr)
        return 1
    if args.json:
        print(
            json.dumps({"figures": figures, "machine": machine(), "versions": versions()}, ensure_ascii=False)
        )
        return 0
    print()
    for row in figures:
        print(row_text(row))
    print(f"\n{args.rounds} rounds of {SECONDS} s each, {time.monotonic() - begin:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
