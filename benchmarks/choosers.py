"""Makes docs/plots/choosers-*.svg: how the five choosers balance, and what a gateway that leaves and returns disturbs.

    python benchmarks/choosers.py [--seed N] [--folder DIR]

A simulation of the plugins themselves, described in tests/support/choosers.py. It measures no time: the same seed gives
the same pictures everywhere.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.choosers import CHOOSERS, LEAVER, LEAVES, RETURNS, Run, simulate  # noqa: E402

COLOURS = dict(zip(CHOOSERS, ("#6c757d", "#0b6e4f", "#8d6a9f", "#1f4e9e", "#e09f3e"), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "plots")
    args = parser.parse_args()
    runs = [simulate(name, args.seed) for name in CHOOSERS]
    args.folder.mkdir(parents=True, exist_ok=True)
    plot(
        [(run, run.balance) for run in runs],
        "busiest gateway / mean of those that serve",
        args.folder / "choosers-balance.svg",
    )
    plot(
        [(run, run.again) for run in runs],
        "next session meets the same gateway",
        args.folder / "choosers-same-again.svg",
    )
    print(
        f"{'chooser':18}{'busiest/mean':>14}{'moved when it left':>20}{'same again':>12}{'… while it is away':>20}"
    )
    for run in runs:
        steady = run.balance[:LEAVES]
        print(
            f"{run.name:18}{sum(steady) / len(steady):>14.3f}{f'{run.moved} of {run.of}':>20}"
            f"{mean(run.again[:LEAVES]):>12.0%}{run.again[LEAVES]:>20.0%}"
        )
    return 0


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def plot(lines: list[tuple[Run, list[float]]], label: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "guestpass", "font.size": 10, "axes.spines.top": False})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for run, values in lines:
        axes.plot(values, label=run.name, color=COLOURS[run.name])
    for at, what in ((LEAVES, f"{LEAVER} leaves"), (RETURNS, f"{LEAVER} returns")):
        axes.axvline(at, color="#000000", linewidth=0.8, linestyle=":")
        axes.annotate(what, (at + 1, axes.get_ylim()[1]), va="top", fontsize=9)
    axes.set_xlabel("time, in steps of 200 sessions that end and 200 that begin")
    axes.set_ylabel(label)
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
