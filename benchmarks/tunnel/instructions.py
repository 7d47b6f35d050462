"""Instructions of the session for one received DATA frame of 64 B, counted by valgrind: two runs, subtracted.

    python benchmarks/tunnel/instructions.py            measure
    python benchmarks/tunnel/instructions.py --check    compare with COMMITTED, at most 2 % more or less

The count is a compiler's: COMMITTED has one for each major version of gcc that was tried, on x86-64. What is counted is
`frames_null` of bench_session.py: `Session.receive` of reads of 1,000 frames, the stream's own accounts, and the CREDIT
that follows; no Python runs for a frame.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from guestpass_speedups import session

SCRIPT = Path(__file__).resolve().parent.parent / "bench_session.py"

# gcc's major version → instructions a frame. Change it with the code, in the same commit.
COMMITTED = {12: 115.5}
TOLERANCE = 0.02

FRAMES_A_LOOP = 1000
FEW, MANY = 20, 120


def why_not() -> str:
    """Why this machine cannot count; "" if it can."""
    if shutil.which("valgrind") is None:
        return "no valgrind: apt-get install valgrind"
    return ""


def compiler() -> int | None:
    """Major version of the gcc that has compiled the session, for x86-64."""
    found = re.search(rb"GCC: \([^)]*\) (\d+)\.", Path(session.__file__).read_bytes())
    return int(found[1]) if found is not None and platform.machine() == "x86_64" else None


def why_no_check() -> str:
    """Why the count cannot be compared; "" if it can."""
    if compiler() not in COMMITTED:
        return (
            f"counts were committed for gcc {', '.join(map(str, COMMITTED))} on x86-64, not for {compiler()}"
        )
    return why_not()


def off(count: float) -> str:
    """What is wrong with a count; "" if it is as committed."""
    committed = COMMITTED[compiler() or 0]
    if abs(count / committed - 1) <= TOLERANCE:
        return ""
    name = Path(__file__).name
    return f"{count:.1f} instructions a frame, {committed} are committed: look why, then change COMMITTED in {name}"


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
    if "--check" in sys.argv[1:]:
        sys.exit(why_no_check() or off(count))


if __name__ == "__main__":
    main()
