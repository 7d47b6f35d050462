"""WebSockets: messages a second, and what an idle one costs in memory. Writes system-websocket.json.

Each of the connections sends 100 B, waits for the same 100 B, sends the next. The peers stand in front of the same echo
server. Memory is the edge's resident set before and after opening them, divided by how many there are.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from figures import Options, figure, run, save
from processes import Lab
from rounds import BUSY_PAUSE, MAX_OTHERS, TRIES, Wrong, children_cpu, lab_cpu, machine_cpu, patience, quiet
from targets import LABELS, TARGETS, Target

HERE = Path(__file__).parent

CONNECTIONS = 64
SIZE = 100
IDLE = 10_000

# Sockets that a process has besides those of its visitors.
SPARE_FILES = 200

# For timers and the allocator to come to rest after the last handshake.
REST_SECONDS = 2.0

# Of ws_client.py, before it counts.
WARM_SECONDS = 0.5

KIB = 1024


def main(chosen: Options) -> None:
    figures: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    with Lab() as lab:
        names = ("guestpass", "nginx", "nginx-tls", "guestpass-slow")
        targets = [TARGETS[name](lab) for name in (names[:2] if chosen.smoke else names)]
        figures += messages(chosen, targets, details)
        for name in ("guestpass",) if chosen.smoke else ("guestpass", "guestpass-slow"):
            # One that nobody has visited: what the messages left behind in the allocator is no part of it.
            figures.append(idle(chosen, TARGETS[name](lab), details))
    save(chosen, "system-websocket", figures, details)


def headers(target: Target) -> list[str]:
    fields = dict(target.echo_headers or target.headers)
    fields.setdefault("Host", f"127.0.0.1:{target.port}")
    fields["Origin"] = f"http://{fields['Host']}"
    return [part for name, value in fields.items() for part in ("--header", f"{name}: {value}")]


def messages(
    chosen: Options, targets: list[Target], details: dict[str, Any], *, say: bool = True
) -> list[dict[str, Any]]:
    """Rates and p99 of the first target against each of the others. Raises Wrong."""
    rounds: dict[str, list[dict[str, Any]]] = {target.name: [] for target in targets}
    with quiet(chosen.lock):
        for _ in range(chosen.rounds):
            for target in targets:
                one = one_round(chosen, target)
                rounds[target.name].append(one)
                if say:
                    print(
                        f"  WebSocket echo, {CONNECTIONS} connections   {LABELS[target.name]:26} "
                        f"{one['rate']:>9,.0f}/s  p50 {one['p50']:>7,.0f}  p99 {one['p99']:>7,.0f} µs",
                        file=sys.stderr,
                        flush=True,
                    )
    details["messages"] = rounds
    ours = rounds["guestpass"]
    figures = []
    for target in targets[1:]:
        peer = rounds[target.name]
        others = max(one["others"] for one in (*ours, *peer))
        for of, unit in (("rate", "messages/s"), ("p99", "µs")):
            each = [a[of] / b[of] for a, b in zip(ours, peer, strict=True)]
            a, b = (statistics.median(one[of] for one in who) for who in (ours, peer))
            decided = of == "rate" and target.name == "nginx"
            what = f"WebSocket echo, {CONNECTIONS} connections" + ("" if of == "rate" else f", {of}")
            figures.append(
                figure(
                    f"{what}, against {LABELS[target.name]}",
                    ours=round(a, 1),
                    peer=round(b, 1),
                    unit=unit,
                    ratio=round(a / b, 3),
                    target="≥ 0.9" if decided else None,
                    rounds=len(each),
                    spread=[round(min(each), 3), round(max(each), 3)],
                    note=f"other processes had {others:.1f} processors" if others > 2 * MAX_OTHERS else "",
                )
            )
    return figures


def one_round(chosen: Options, target: Target) -> dict[str, Any]:
    """Raises Wrong when it cannot be done without an error."""
    tries = TRIES
    while tries:
        ours, busy, client = lab_cpu(target.lab), machine_cpu(), children_cpu()
        before = {process.role: process.usage().cpu for process in target.processes}
        command = [sys.executable, HERE / "ws_client.py", "echo", str(target.port), *headers(target)]
        command += ["--connections", str(CONNECTIONS), "--seconds", str(chosen.seconds), "--size", str(SIZE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout)
            found["cpu_seconds"] = {
                process.role: round(process.usage().cpu - before[process.role], 3)
                for process in target.processes
            }
            used = lab_cpu(target.lab) - ours + children_cpu() - client
            found["others"] = max(machine_cpu() - busy - used, 0.0) / (chosen.seconds + WARM_SECONDS)
            if found["others"] > MAX_OTHERS and patience.left:
                patience.left -= 1
                time.sleep(BUSY_PAUSE)
                continue
            if not found["wrong"] and not found["lost"] and found["messages"]:
                return found
            error = f"{found['wrong']} wrong, {found['lost']} lost of {found['messages']} messages"
        else:
            error = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output"
        tries -= 1
    raise Wrong(f"{target.name}: WebSocket: {error}")


def idle(chosen: Options, target: Target, details: dict[str, Any]) -> dict[str, Any]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 100 if chosen.smoke else IDLE
    number = min(wanted, hard - SPARE_FILES)
    edge, gateway = target.role("edge"), target.role("gateway")
    command = [sys.executable, HERE / "ws_client.py", "hold", str(target.port), *headers(target)]
    with quiet(chosen.lock):
        # The first sockets pay for tables and code that all share.
        warm = target.lab.start("holder", [*command, "--connections", "100"])
        warm.wait_for_line('{"open"')
        before = {process.role: process.usage().rss for process in (edge, gateway)}
        holder = target.lab.start("holder", [*command, "--connections", str(number)])
        opened = json.loads(holder.wait_for_line('{"open"', seconds=120))["open"]
        time.sleep(REST_SECONDS)
        after = {process.role: process.usage() for process in (edge, gateway)}
        target.lab.stop([holder, warm])
    if opened != number:
        raise Wrong(f"{target.name}: {opened} of {number} WebSockets opened")
    each = {role: (after[role].rss - before[role]) / number for role in before}
    details[f"idle, {target.name}"] = {
        "opened": number,
        "bytes_each": each,
        "rss": {r: u.rss for r, u in after.items()},
    }
    lane = "" if target.name == "guestpass" else ", fast lane off"
    return figure(
        f"memory of an idle WebSocket at the edge, {number:,} open{lane}",
        ours=round(each["edge"] / KIB, 2),
        unit="KiB",
        target="≤ 12" if not lane and not chosen.smoke else None,
        note=f"at the gateway {each['gateway'] / KIB:.1f} KiB"
        + (f"; {wanted:,} need more than {hard} open files" if number < wanted else ""),
    )


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
