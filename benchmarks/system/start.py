"""How long it takes until something is served. Writes system-start.json.

From the start of a process to its `ready` line, and from the start of edge and gateway to the first answer from the
application, with the state of an edge that ran before. Then a request on a warm connection, for comparison.
"""

from __future__ import annotations

import statistics
import sys
import time

from figures import Options, figure, run, save
from processes import Lab, wait_for
from rounds import Wrong, fetch, quiet
from targets import LABELS, Target, guestpass, guestpass_command, start_edge


def main(chosen: Options) -> None:
    times: dict[str, list[float]] = {"edge": [], "gateway": [], "served": []}
    with Lab() as lab:
        target = guestpass(lab)
        with quiet(chosen.lock):
            for _ in range(chosen.rounds):
                one = restart(lab, target)
                for name, seconds in one.items():
                    times[name].append(seconds)
            cold, warm = first_answers(lab, target)
    figures = [
        figure(
            text,
            ours=round(statistics.median(times[name]), 3),
            unit="s",
            rounds=chosen.rounds,
            spread=[round(min(times[name]), 3), round(max(times[name]), 3)],
        )
        for name, text in (
            ("edge", "start of the edge until it is ready"),
            ("gateway", "start of a gateway until it is connected"),
            ("served", "start of edge and gateway until the application answers through them"),
        )
    ]
    figures.append(
        figure("first answer of a fresh edge, on a new connection", ours=round(cold, 2), unit="ms")
    )
    figures.append(figure("an answer when warm, on a new connection", ours=round(warm, 2), unit="ms"))
    save(chosen, "system-start", figures, {"seconds": times, "label": LABELS["guestpass"]})


def restart(lab: Lab, target: Target) -> dict[str, float]:
    """Seconds until each is ready; one after the other, as they would be started by hand."""
    lab.stop(target.processes)
    facts = target.facts
    begin = time.perf_counter()
    edge, _ = start_edge(lab, facts["config"])
    edge_ready = time.perf_counter()
    gateway = lab.start(
        "gateway", guestpass_command("gateway", "--config", facts["folder"] / "gateway.toml", "--json")
    )
    gateway.wait_for_line('{"gateway"')
    gateway_ready = time.perf_counter()
    target.processes = [edge, gateway]
    wait_for("an answer", lambda: answers(target))
    return {
        "edge": edge_ready - begin,
        "gateway": gateway_ready - edge_ready,
        "served": time.perf_counter() - begin,
    }


def answers(target: Target) -> bool:
    try:
        head, _ = fetch(target, "small")
    except (Wrong, OSError):
        return False
    return head.startswith(b"HTTP/1.1 200")


def first_answers(lab: Lab, target: Target) -> tuple[float, float]:
    """(the first, the median of the next hundred), milliseconds."""
    lab.stop(target.processes)
    edge, _ = start_edge(lab, target.facts["config"])
    gateway = lab.start(
        "gateway", guestpass_command("gateway", "--config", target.facts["folder"] / "gateway.toml", "--json")
    )
    gateway.wait_for_line('{"gateway"')
    target.processes = [edge, gateway]
    time.sleep(0.5)
    seconds: list[float] = []
    for _ in range(101):
        begin = time.perf_counter()
        if not answers(target):
            raise Wrong("guestpass does not answer after its start")
        seconds.append(time.perf_counter() - begin)
    return seconds[0] * 1e3, statistics.median(seconds[1:]) * 1e3


if __name__ == "__main__":
    sys.exit(run(main, __doc__))
