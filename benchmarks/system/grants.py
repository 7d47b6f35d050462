"""What sessions cost: a request as the grant table grows, memory of a grant, and a first visit on a fresh edge.
Writes system-grants.json.

*Growth*: two edges, one with 10 grants and one with 100,000, in alternating rounds, under the same load of 64
connections that go round ten sessions. The cost is the edge's CPU time, divided by the requests, the least of all
rounds: whatever else the machine does can only add to it (caches, the other thread of a core). A second pair goes round
ten sessions and 5,000 sessions: that also shows what the processor's caches make of it, and has no target.

*First visit*: sessions with cookies are put into the store of an edge that is then started; each cookie is sent once,
over a connection that is kept alive, and the edge's CPU time is read before and after (all threads, from the
scheduler's own count). Half of them come one at a time, with a pause after each: the edge is woken for every one, with
nothing of its own in the processor's caches, and what it does afterwards counts. The other half come in rows, one after
the other: what a visit costs an edge that has something to do.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from figures import Options, figure, run, save
from processes import Lab, Process, wait_for
from rounds import Load, Run, Wrong, compare, quiet
from targets import Target, body, guestpass, start_edge

HERE = Path(__file__).parent

FEW, MANY, ACTIVE, MANY_ACTIVE = 10, 100_000, 10, 5_000
VISITS = 300
ROW = 50

END_OF_BODY = body("small")[-7:]

# Of the design: what a grant may take.
GRANT_LIMIT = 2048


def main(chosen: Options) -> None:
    figures: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    growth(chosen, figures, details)
    first_visits(chosen, figures, details)
    save(chosen, "system-grants", figures, details)


# ── growth ───────────────────────────────────────────────────────────────────────────────────────────────────────


def growth(chosen: Options, figures: list[dict[str, Any]], details: dict[str, Any]) -> None:
    many, many_active = 1000 if chosen.smoke else MANY, MANY_ACTIVE
    with Lab() as lab:
        few = filled(lab, FEW, ACTIVE)
        grown = filled(lab, many, ACTIVE)
        pairs: list[tuple[Target, str, str | None]] = [(grown, f"{many:,} grants against {FEW}", "≤ 1.05")]
        if not chosen.smoke:
            busy = filled(lab, many, many_active)
            pairs.append((busy, f"{many:,} grants, {many_active:,} of them in use, against {FEW}", None))
        targets = [few, *(target for target, _, _ in pairs)]
        found: dict[str, list[Run]] = {target.name: [] for target in targets}
        with quiet(chosen.lock):
            for target in targets:
                use_each(target)
            for _ in range(chosen.rounds):
                for target in targets:
                    load = Load("small", 64, chosen.seconds, tokens=target.facts["tokens"])
                    found[target.name] += compare([target], load, 1, say=False)[target.name].runs
        per_request = {
            name: [run.cpu["edge"] / run.responses * 1e6 for run in runs] for name, runs in found.items()
        }
        details["edge_microseconds_per_request"] = per_request
        base = per_request[few.name]
        if not base:
            raise Wrong(f"{few.name}: no run without an error")
        for target, text, goal in pairs:
            each = [a / b for a, b in zip(per_request[target.name], base, strict=False)]
            if not each:
                raise Wrong(f"{target.name}: no run without an error")
            figures.append(
                figure(
                    f"edge CPU of a request, least of {chosen.rounds} rounds, {text}",
                    ours=round(min(per_request[target.name]), 2),
                    peer=round(min(base), 2),
                    unit="µs",
                    ratio=round(min(per_request[target.name]) / min(base), 3),
                    target=None if chosen.smoke else goal,
                    rounds=len(each),
                    spread=[round(min(each), 3), round(max(each), 3)],
                )
            )
        size = grown.facts["bytes_each"]
        figures.append(
            figure(
                "memory of a grant that was never used, everything that belongs to it",
                ours=round(size),
                unit="bytes",
                target=None if chosen.smoke else f"≤ {GRANT_LIMIT}",
                note="the design's target, not the issue's",
            )
        )


def edge_with_grants(config: Path) -> list[str]:
    return [sys.executable, "-P", str(HERE / "edge_with_grants.py"), "--config", str(config)]


def use_each(target: Target) -> None:
    """One request with each token: the first use of a grant takes another way than those that are measured."""
    with socket.create_connection(("127.0.0.1", target.port)) as visitor:
        for token in target.facts["tokens"].read_text().split():
            ask(visitor, target, f"Authorization: Bearer {token}")


def filled(lab: Lab, number: int, active: int) -> Target:
    """An edge with this many grants."""
    target = guestpass(lab, name=f"{number:,} grants, {active:,} in use", edge_command=edge_with_grants)
    folder: Path = target.facts["folder"]
    edge = target.role("edge")
    before = edge.usage().rss
    order = {"number": number, "active": active, "share": target.facts["shares"][0], "gateway": "gateway-1"}
    partial = folder / "fill.json.partial"
    partial.write_text(json.dumps(order))
    partial.rename(folder / "fill.json")
    edge.wait_for_line('{"filled"', seconds=120)
    target.facts["bytes_each"] = (edge.usage().rss - before) / number
    target.facts["tokens"] = folder / "tokens.txt"
    return target


# ── first visits ─────────────────────────────────────────────────────────────────────────────────────────────────


def first_visits(chosen: Options, figures: list[dict[str, Any]], details: dict[str, Any]) -> None:
    visits = 20 if chosen.smoke else VISITS
    with Lab() as lab:
        target = guestpass(lab)
        edge, facts = target.role("edge"), target.facts
        share = facts["shares"][0]
        lab.stop([edge])
        done = subprocess.run(
            [sys.executable, "-P", HERE / "seed.py", facts["config"], share, str(2 * visits)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        seeded = done.stdout.split()
        cookies, in_rows = seeded[:visits], seeded[visits:]
        edge, _ = start_edge(lab, facts["config"])
        connected(edge, target)
        with quiet(chosen.lock), socket.create_connection(("127.0.0.1", target.port)) as visitor:
            first = [visit(edge, visitor, target, cookie) for cookie in cookies]
            again = [visit(edge, visitor, target, cookie) for cookie in cookies]
            rows = [
                visits_in_a_row(edge, visitor, target, in_rows[at : at + ROW])
                for at in range(0, len(in_rows), ROW)
            ]
    details["first_visits_ms"] = [round(cost, 3) for cost in first]
    details["second_visits_ms"] = [round(cost, 3) for cost in again]
    details["first_visits_in_rows_ms"] = [round(cost, 3) for cost in rows]
    note = f"the very first on this edge {first[0]:.1f} ms; a later visit {statistics.median(again):.2f} ms"
    figures.append(
        figure(
            f"edge CPU of a first visit with a valid cookie on a fresh edge, median of {visits} with pauses",
            ours=round(statistics.median(first), 3),
            unit="ms",
            target=None if chosen.smoke else "≤ 1",
            rounds=visits,
            spread=[round(min(first), 3), round(max(first), 3)],
            note=note,
        )
    )
    figures.append(
        figure(
            f"the same, median of rows of {min(ROW, visits)} without pauses",
            ours=round(statistics.median(rows), 3),
            unit="ms",
            target=None if chosen.smoke else "≤ 1",
            rounds=len(rows),
            spread=[round(min(rows), 3), round(max(rows), 3)],
        )
    )


def connected(edge: Process, target: Target) -> None:
    """Wait for the gateway, which dials again by itself."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{target.facts['port']}/api/v1/gateways", headers=target.facts["api"].headers
    )

    def look() -> bool:
        with urllib.request.urlopen(request, timeout=5) as response:
            return any(gateway["connected"] for gateway in json.load(response)["gateways"])

    wait_for("the gateway is connected again", look)
    time.sleep(0.5)  # its second tunnel


def visit(edge: Process, visitor: socket.socket, target: Target, cookie: str) -> float:
    """Milliseconds of the edge's CPU for one request with this cookie. Raises Wrong."""
    before = edge.cpu_nanoseconds()
    ask(visitor, target, f"Cookie: __Host-guestpass={cookie}")
    time.sleep(0.005)  # what it does after the answer is part of the visit
    return (edge.cpu_nanoseconds() - before) / 1e6


def visits_in_a_row(edge: Process, visitor: socket.socket, target: Target, cookies: list[str]) -> float:
    """As `visit`, for each of them."""
    before = edge.cpu_nanoseconds()
    for cookie in cookies:
        ask(visitor, target, f"Cookie: __Host-guestpass={cookie}")
    return (edge.cpu_nanoseconds() - before) / 1e6 / len(cookies)


def ask(visitor: socket.socket, target: Target, secret: str) -> None:
    """One small request with this header field, answered. Raises Wrong."""
    visitor.sendall(f"GET /small HTTP/1.1\r\nHost: {target.headers['Host']}\r\n{secret}\r\n\r\n".encode())
    received = b""
    while not received.endswith(END_OF_BODY):
        part = visitor.recv(65536)
        if not part:
            raise Wrong(f"guestpass closed the connection: {received[:100]!r}")
        received += part
    if not received.startswith(b"HTTP/1.1 200"):
        raise Wrong(f"guestpass answers {received.splitlines()[:1]} to a session that is there")


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
