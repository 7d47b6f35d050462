"""Instructions of the session for one received DATA frame of 64 B, counted by valgrind: two runs, subtracted.

    python benchmarks/tunnel/instructions.py            measure
    python benchmarks/tunnel/instructions.py --check    compare with COMMITTED, at most 2 % more or less

The count is one of a compiler: COMMITTED holds for gcc on x86-64. What is counted is `frames_null` of bench_session.py:
`Session.receive` of reads of 1,000 frames, the stream's own accounts, and the CREDIT that follows; no Python runs for a
frame.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "bench_session.py"

# Instructions a frame. Change it with the code, in the same commit.
COMMITTED = 115.5
TOLERANCE = 0.02

FRAMES_A_LOOP = 1000
FEW, MANY = 20, 120


def why_not() -> str:
    """Why this machine cannot count; "" if it can."""
    if shutil.which("valgrind") is None:
        return "no valgrind: apt-get install valgrind"
    if platform.machine() not in ("x86_64", "AMD64") or "gcc" not in (sysconfig.get_config_var("CC") or ""):
        return "the committed number holds for gcc on x86-64"
    return ""


def measure() -> float:
    with tempfile.TemporaryDirectory() as folder:
        few, many = (_count(loops, Path(folder)) for loops in (FEW, MANY))
    return (many - few) / ((MANY - FEW) * FRAMES_A_LOOP)


def _count(loops: int, folder: Path) -> int:
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder / 'out'}", sys.executable]
    command += [str(SCRIPT), "--only", "frames_null", "--loops", str(loops)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "0"}
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise RuntimeError(f"valgrind did not count: {done.stderr[-500:]}")
    return int(found[1])


def main() -> None:
    reason = why_not()
    if reason:
        print(f"instructions a frame: skipped, {reason}")
        return
    count = measure()
    print(f"instructions a frame: {count:.1f} (committed: {COMMITTED})")
    if "--check" in sys.argv[1:] and abs(count / COMMITTED - 1) > TOLERANCE:
        sys.exit(f"more than {TOLERANCE:.0%} off: look why, then change COMMITTED in {Path(__file__).name}")


if __name__ == "__main__":
    main()
