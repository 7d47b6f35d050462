"""Requests a second, latency and CPU: all peers by number of connections, the main ones by size of the body, and
visitors over TLS. Writes system-throughput.json, system-bodies.json, system-tls.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from figures import Options, against, run, save
from processes import Lab
from rounds import Load, Series, Wrong, compare
from targets import TARGETS, Target

CONNECTIONS = (1, 16, 64, 256, 1024)

# Of peers without a target at this load: a look at the shape, not a figure to hold anybody to.
FEW_ROUNDS = 3

# With 1 MB bodies more connections measure the processor's caches.
BULK_CONNECTIONS = 8

MAIN = ("guestpass", "nginx-tls", "nginx", "haproxy")
OTHERS = ("guestpass-slow", "guestpass-log", "aiohttp", "proxy.py", "ssh")

Table = dict[tuple[str, int], dict[str, Series]]


def main(chosen: Options) -> None:
    with Lab() as lab:
        plain = {name: TARGETS[name](lab) for name in (*MAIN, *OTHERS, "direct")}
        small = sweep(chosen, plain)
        save(chosen, "system-throughput", throughput_figures(small), details(small))
        bodies = by_body(chosen, plain)
        save(chosen, "system-bodies", body_figures(bodies), details(bodies))
        names = ("guestpass", "nginx-tls") if chosen.smoke else ("guestpass", "nginx-tls", "nginx")
        over_tls = [TARGETS[name](lab, tls=True) for name in names]
        tls: Table = {}
        for connections in (64,) if chosen.smoke else (1, 64, 256):
            tls["small", connections] = safely(chosen, over_tls, "small", connections, chosen.rounds)
        if not chosen.smoke:
            tls["1MB", BULK_CONNECTIONS] = safely(chosen, over_tls, "1MB", BULK_CONNECTIONS, chosen.rounds)
        save(chosen, "system-tls", tls_figures(tls), details(tls))


def sweep(chosen: Options, plain: dict[str, Target]) -> Table:
    """Small requests; the main targets in alternation with each other, then the rest with ours."""
    table: Table = {}
    for connections in (16,) if chosen.smoke else CONNECTIONS:
        main = [plain[name] for name in MAIN]
        rest = [plain[name] for name in (*OTHERS, "direct")]
        few = chosen.rounds if connections == 64 else min(FEW_ROUNDS, chosen.rounds)
        found = safely(chosen, main, "small", connections, chosen.rounds)
        # Slow peers fluctuate little against ten times the rate: their rounds do not need ours beside them.
        table["small", connections] = found | safely(chosen, rest, "small", connections, few)
    return table


def by_body(chosen: Options, plain: dict[str, Target]) -> Table:
    table: Table = {}
    for size, connections in (("100B", 64), ("16KB", 64), ("1MB", BULK_CONNECTIONS)):
        if chosen.smoke and size != "1MB":
            continue
        names = (*MAIN, "guestpass-slow", "aiohttp", "ssh") if not chosen.smoke else MAIN
        table[size, connections] = safely(
            chosen, [plain[name] for name in names], size, connections, chosen.rounds
        )
    return table


def safely(
    chosen: Options, targets: Sequence[Target], size: str, connections: int, rounds: int
) -> dict[str, Series]:
    """`compare`; a target that answers wrongly to begin with is reported, and the others go on without it."""
    load = Load(size, connections, chosen.seconds)
    left, broken = list(targets), {}
    while True:
        try:
            return compare(left, load, rounds, lock=chosen.lock) | broken
        except Wrong as exc:
            name = str(exc).split(":")[0].split(" ")[0]
            failed = next((target for target in left if target.name == name), None)
            if failed is None or chosen.smoke:
                raise
            print(f"  {exc}", file=sys.stderr)
            left.remove(failed)
            broken[failed.name] = Series(failed.name, load, errors=[str(exc)])


def throughput_figures(table: Table) -> list[dict[str, Any]]:
    figures = []
    for (_, connections), found in table.items():
        ours = found["guestpass"]
        decided = connections in (64, 256)
        figures.append(against(ours, found["nginx-tls"], target="≥ 2.0" if decided else None))
        if connections == 1:
            figures.append(against(ours, found["nginx-tls"], of="p50", target="≤ 1.0"))
        if connections == 64:
            figures.append(against(ours, found["nginx-tls"], of="p99", target="≤ 0.6"))
        figures.append(against(ours, found["nginx"], target="≥ 1.0" if decided else None))
        figures.append(against(ours, found["haproxy"]))
        targets = {"aiohttp": "≥ 9", "ssh": "≥ 2.5"} if connections == 64 else {}
        for name in OTHERS:
            figures.append(against(ours, found[name], target=targets.get(name)))
    return figures


def body_figures(table: Table) -> list[dict[str, Any]]:
    figures = []
    for (size, _), found in table.items():
        targets = {"nginx-tls": "≥ 1.5", "nginx": "≥ 0.7", "haproxy": "≥ 0.5"} if size == "1MB" else {}
        for name in found:
            if name != "guestpass":
                figures.append(against(found["guestpass"], found[name], target=targets.get(name)))
    return figures


def tls_figures(table: Table) -> list[dict[str, Any]]:
    figures = []
    for (size, connections), found in table.items():
        decided = size == "small" and connections in (64, 256)
        for name, target in (("nginx-tls", "≥ 1.5" if decided else None), ("nginx", None)):
            if name in found:
                figures.append(
                    against(found["guestpass"], found[name], target=target, prefix="TLS visitors: ")
                )
    return figures


def details(table: Table) -> dict[str, Any]:
    return {"series": [series.as_details() for found in table.values() for series in found.values()]}


if __name__ == "__main__":
    sys.exit(run(main, __doc__, "haproxy", "sshd", "ssh"))
