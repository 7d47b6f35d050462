"""Makes benchmarks/report.md and benchmarks/plots/*.svg from whatever is in benchmarks/results/*.json.

    python benchmarks/report.py [--results DIR] [--report FILE]

The form of a result is described in benchmarks/system/figures.py; scoreboards of test suites (`make faults`, `make
conformance`, `make plugins`: tests/support/scoreboard.py) are put in as tables of their own. `details.series`, where a
result has it, makes the plots and the tables of CPU and memory. What people have to say about a figure that misses its
target stands in benchmarks/notes.md, and is put into the report as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

INTRODUCTION = """\
# Benchmarks

Made by `make bench`; `make bench-quick` prints the main ratios in about a minute. Everything runs on one machine, over
loopback, one process for each role: load generator, proxies and the application share the processors. So the figures
compare stacks on equal terms; they do not say what a stack does on a machine of its own. The application is nginx with
static files, small requests are answered with 43 B; the session of every request is checked; the tunnel has TLS.

A ratio is the median of ours over the median of the peer, of alternating rounds; in brackets the lowest and highest of
the rounds' own ratios. A round with a wrong status, a wrong length or a socket error is not counted.
"""

BUSY = """\
**Other processes used much of the machine during some of these runs**, as is said beside each figure. All took their
turns under the same load, but such rates and latencies say little about the stacks; CPU per request says more.
"""

# One colour and mark for each target in all plots; ours first.
STYLES = {
    "guestpass": ("#0b6e4f", "o"),
    "guestpass-slow": ("#7fb069", "o"),
    "nginx": ("#1f4e9e", "s"),
    "nginx-tls": ("#d1495b", "^"),
    "haproxy": ("#8d6a9f", "D"),
    "ssh": ("#e09f3e", "v"),
    "aiohttp": ("#6c757d", "x"),
    "proxy.py": ("#adb5bd", "+"),
    "direct": ("#000000", "."),
}

PLOT_SIZES = ("100B", "16KB", "1MB")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--report", type=Path, default=HERE / "report.md")
    args = parser.parse_args()
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(args.results.glob("*.json"))}
    results = [one for one in found.values() if "figures" in one]
    boards = {name: one for name, one in found.items() if "rows" in one}
    if not results:
        print(f"there is nothing in {args.results}: run `make bench`", file=sys.stderr)
        return 1
    plots = draw(results, args.report.parent / "plots")
    args.report.write_text(report(results, boards, plots), "utf-8")
    rows = [row for result in results for row in result["figures"] if row["target"]]
    reached = sum(bool(row["reached"]) for row in rows)
    print(f"{args.report}: {reached} of {len(rows)} targets reached")
    return 0


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(
    results: Sequence[dict[str, Any]],
    boards: Mapping[str, dict[str, Any]],
    plots: Iterable[tuple[str, str]],
) -> str:
    parts = [INTRODUCTION]
    if any(result.get("smoke") for result in results):
        parts.append(
            "**These are figures of a smoke run: they show that the scripts work and nothing else.**\n"
        )
    if any("other processes had" in row.get("note", "") for result in results for row in result["figures"]):
        parts.append(BUSY)
    parts.append(circumstances(results))
    decided = [row for result in results for row in result["figures"] if row["target"]]
    parts += ["## Targets\n", figure_table(decided, verdict=True)]
    parts.append((HERE / "notes.md").read_text("utf-8"))
    # a page of its own, with a title
    parts.append(re.sub("^#", "##", (HERE / "notes-tunnel.md").read_text("utf-8"), flags=re.MULTILINE))
    for name, board in boards.items():
        parts += [f"## Scoreboard of `make {name}`\n", scoreboard(board)]
    for title, name in plots:
        parts.append(f"## {title}\n\n![{title}](plots/{name})\n")
    parts.append("## All figures\n")
    for result in results:
        parts += [f"### {result['name']}\n", figure_table(result["figures"], verdict=False)]
        if series := result["details"].get("series"):
            parts.append(series_table(series))
    return "\n".join(parts)


def circumstances(results: Sequence[dict[str, Any]]) -> str:
    """One line for each machine on which a result was made, and the versions."""
    lines = []
    for result in results:
        machine = result["machine"]
        text = f"{machine['cores']} processors ({machine['cpu']}), Linux {machine['kernel']}"
        text += f", CPython {machine['python']}"
        versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
        lines.append((text, versions, result["name"], result["when"]))
    parts = []
    for text, versions in dict.fromkeys((line[0], line[1]) for line in lines):
        names = [f"{name} ({when[:16]}Z)" for t, v, name, when in lines if (t, v) == (text, versions)]
        parts.append(f"* {text}; {versions}. Results: {', '.join(names)}.")
    return "\n".join(parts) + "\n"


def figure_table(rows: Sequence[dict[str, Any]], *, verdict: bool) -> str:
    head = ["figure", "ours", "peer", "ratio", "rounds"] + (["target", ""] if verdict else [])
    lines = [head, ["---"] + ["---:"] * 3 + ["---:"] + (["---:", "---"] if verdict else [])]
    for row in rows:
        text = row["figure"] + (f"<br>{row['note']}" if row.get("note") else "")
        cells = [text, value(row["ours"], row["unit"]), value(row["peer"], row["unit"]), ratio(row)]
        cells.append(str(row["rounds"]))
        if verdict:
            cells += [row["target"], "reached" if row["reached"] else "**missed**"]
        lines.append(cells)
    return table(lines)


def scoreboard(board: dict[str, Any]) -> str:
    """What a test suite counted and timed; `figure` is its number in the project's scoreboard."""
    lines = [["figure", "what", "what was done", "measured", "limit", ""], ["---:"] + ["---"] * 5]
    for row in board["rows"]:
        number = "" if row["figure"] is None else str(row["figure"])
        verdict = "held" if row["ok"] else "**missed**"
        lines.append([number, row["name"], row["done"], row["measured"], row["limit"], verdict])
    machine = board["machine"]
    where = (
        f"{machine['cpus']} processors, Linux {machine['kernel']}, CPython {machine['python']}; {board['at']}"
    )
    return f"{board['form'].capitalize()} form; {where}.\n\n{table(lines)}"


def value(number: float | None, unit: str) -> str:
    return "" if number is None else f"{short(number)} {unit}"


def ratio(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return "" if row["peer"] is None else "–"
    spread = row.get("spread")
    around = f" ({spread[0]:.2f}–{spread[1]:.2f})" if isinstance(spread, list) and len(spread) == 2 else ""
    return f"{row['ratio']:.2f}×{around}"


def short(number: float) -> str:
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def series_table(series: Sequence[dict[str, Any]]) -> str:
    """Rates, latency, and what each process used."""
    head = ["load", "", "requests/s", "p50 µs", "p99 µs", "CPU µs per request", "peak memory, MB"]
    lines = [head, ["---", "---"] + ["---:"] * 3 + ["---", "---"]]
    for one in series:
        load = f"{one['size']}, {one['connections']:,}"
        if "rate" not in one:
            lines.append(
                [load, one["label"], "not counted", "", "", one["errors"][-1] if one["errors"] else "", ""]
            )
            continue
        requests = one["rate"] * one["seconds"]
        cpu = ", ".join(f"{role} {used / requests * 1e6:.1f}" for role, used in one["cpu_seconds"].items())
        peak = ", ".join(f"{role} {size / 1e6:.0f}" for role, size in one["peak_rss"].items())
        lines.append([load, one["label"], *(short(one[name]) for name in ("rate", "p50", "p99")), cpu, peak])
    return table(lines)


def table(lines: Sequence[Sequence[str]]) -> str:
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


# ── plots ────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw(results: Sequence[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """(title, file) of each plot that the results have the data for."""
    by_name = {result["name"]: result["details"].get("series", []) for result in results}
    made: list[tuple[str, str]] = []
    wanted: list[tuple[str, str, str, Callable[..., None]]] = [
        ("Throughput by connections", "throughput-by-connections.svg", "system-throughput", throughput),
        ("Latency by load", "latency-by-load.svg", "system-throughput", latency),
        ("Cost of a request by size of the body", "cost-by-body.svg", "system-bodies", cost),
    ]
    for title, name, result, plot in wanted:
        series = [one for one in by_name.get(result, []) if "rate" in one]
        if series:
            folder.mkdir(exist_ok=True)
            picture(folder / name, series, plot)
            made.append((title, name))
    return made


def picture(path: Path, series: Sequence[dict[str, Any]], plot: Callable[..., None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    # The same data make the same file: no date, no random ids.
    matplotlib.rcParams.update({"svg.hashsalt": "guestpass", "font.size": 10, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    plot(axes, series)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    # matplotlib ends lines of paths with blanks
    lines = [line.rstrip() for line in path.read_text("utf-8").splitlines()]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def by_target(series: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name in STYLES:
        mine = [one for one in series if one["target"] == name]
        if mine:
            found[name] = sorted(mine, key=lambda one: one["connections"])
    return found


def throughput(axes: Any, series: Sequence[dict[str, Any]]) -> None:
    for name, points in by_target(series).items():
        colour, mark = STYLES[name]
        xs = [one["connections"] for one in points]
        width = 2.4 if name == "guestpass" else 1.3
        axes.plot(
            xs, [one["rate"] for one in points], mark + "-", color=colour, lw=width, label=points[0]["label"]
        )
    _connections(axes, series)
    axes.set_ylabel("small requests a second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
    axes.legend(fontsize=8, ncols=2)


def latency(axes: Any, series: Sequence[dict[str, Any]]) -> None:
    for name, points in by_target(series).items():
        colour, mark = STYLES[name]
        xs = [one["connections"] for one in points]
        axes.plot(
            xs, [one["p50"] / 1000 for one in points], mark + "-", color=colour, label=points[0]["label"]
        )
        axes.plot(xs, [one["p99"] / 1000 for one in points], mark + ":", color=colour, alpha=0.6)
    _connections(axes, series)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds: p50 solid, p99 dotted")
    axes.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
    axes.legend(fontsize=8, ncols=2)


def _connections(axes: Any, series: Sequence[dict[str, Any]]) -> None:
    ticks = sorted({one["connections"] for one in series})
    axes.set_xscale("log", base=4)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("connections, all busy")


def cost(axes: Any, series: Sequence[dict[str, Any]]) -> None:
    names = list(by_target(series))
    sizes = [size for size in PLOT_SIZES if any(one["size"] == size for one in series)]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        mine = {one["size"]: one for one in series if one["target"] == name}
        xs = [
            place + (index - (len(names) - 1) / 2) * width for place, size in enumerate(sizes) if size in mine
        ]
        ys = [mine[size]["cpu_per_request"] for size in sizes if size in mine]
        label = next(iter(mine.values()))["label"]
        axes.bar(xs, ys, width * 0.92, color=STYLES[name][0], label=label)
    axes.set_xticks(range(len(sizes)), [f"{size} bodies" for size in sizes])
    axes.set_yscale("log")
    axes.set_ylabel("CPU of all proxies, µs per request")
    axes.yaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
    axes.grid(visible=False, axis="x")
    axes.legend(fontsize=8, ncols=2)


if __name__ == "__main__":
    sys.exit(main())
