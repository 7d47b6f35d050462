"""Runs the micro benchmarks and writes micro.json in the form of the other results.

python benchmarks/micro/run.py [--smoke] [--results DIR]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "system"))

from figures import figure, options, save

HERE = Path(__file__).parent


def main() -> int:
    chosen = options(__doc__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE),
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-columns=median",
    ]
    if chosen.smoke:
        command.append("--benchmark-disable")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        status = subprocess.run([*command, f"--benchmark-json={path}"], check=False).returncode
        # With the benchmarks disabled each runs once, and there is nothing to report.
        if status or chosen.smoke:
            return status
        found = json.loads(path.read_text("utf-8"))["benchmarks"]
    figures = []
    for one in found:
        items = one["extra_info"].get("items", 1)
        figures.append(
            figure(
                f"{one['name']} (1 of {items:,} {one['extra_info'].get('unit', 'items')})"
                if items > 1
                else one["name"],
                ours=round(one["stats"]["median"] / items * 1e9, 3),
                unit="ns",
                rounds=one["stats"]["rounds"],
            )
        )
    save(chosen, "micro", figures, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
