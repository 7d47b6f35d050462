"""A small fuzzer guided by coverage, for modules that asan.py has built.

A target is a function of bytes that raises when something is wrong. Inputs that reach code no input reached before
(see coverage.c) join the corpus and are changed further. What a target is working on stands in a mapped file, so it is
there when AddressSanitizer ends the process: `build/asan/current.bin`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib
import mmap
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Target = Callable[[bytes], None]
Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

FOLDER = Path(__file__).parents[2] / "build" / "asan"
CURRENT = FOLDER / "current.bin"
FINDINGS = FOLDER / "findings"

# Inputs do not grow beyond this: a frame has up to 65,543 bytes.
MAX_INPUT = 140_000
# Numbers that limits and length fields turn on.
NUMBERS: tuple[int, ...] = (
    0,
    1,
    2,
    7,
    8,
    9,
    125,
    126,
    127,
    128,
    255,
    256,
    4095,
    4096,
    16_367,
    16_368,
    16_369,
    16_384,
    16_385,
)
NUMBERS += (
    32_767,
    32_768,
    32_769,
    65_534,
    65_535,
    2**30 - 1,
    2**30,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)
# What is allocated may grow by this much between the tenth part of a run and its end, the pool aside: a hundred bytes
# that each input leaves behind are more.
LEAK_ALLOWED = 4 << 20


def plain_change(random: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Bits, bytes, numbers and pieces, as every fuzzer does it."""
    changed = bytearray(data)
    at = random.randrange(len(changed) + 1)
    kind = random.randrange(8)
    if kind == 0 and changed:
        changed[at % len(changed)] ^= 1 << random.randrange(8)
    elif kind == 1 and changed:
        changed[at % len(changed)] = random.randrange(256)
    elif kind == 2:
        size = random.choice((1, 2, 2, 4, 8))
        number = random.choice(NUMBERS) & ((1 << 8 * size) - 1)
        changed[at : at + size] = number.to_bytes(size, "big")
    elif kind == 3:
        del changed[at : at + random.choice((1, 1, 2, 4, 8, 16, 64, 1024))]
    elif kind == 4:
        changed[at:at] = random.randbytes(random.choice((1, 1, 2, 4, 8, 16, 64)))
    elif kind == 5:
        start = random.randrange(len(changed) + 1)
        changed[at:at] = changed[start : start + random.choice((1, 8, 16, 64, 256, 4096))]
    elif kind == 6 and others:
        other = random.choice(others)
        changed[at:] = other[random.randrange(len(other) + 1) :]
    elif kind == 7:
        del changed[at:]
    return bytes(changed[:MAX_INPUT])


class Coverage:
    """The map in coverage.c, which is preloaded."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self.begin = library.coverage_begin
        self.new = library.coverage_new
        self.edges = library.coverage_edges
        self.forget = library.coverage_forget
        # By getattr: the compiler would mangle the name.
        self._allocated = getattr(library, "__sanitizer_get_current_allocated_bytes")
        self._allocated.restype = ctypes.c_size_t

    def allocated(self) -> int:
        """Bytes that are allocated and not freed, as AddressSanitizer counts them."""
        gc.collect()
        return int(self._allocated())


class Current:
    """The input in work, where a crash leaves it."""

    def __init__(self) -> None:
        CURRENT.parent.mkdir(parents=True, exist_ok=True)
        CURRENT.write_bytes(bytes(4096 + MAX_INPUT * 2))
        with CURRENT.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def note(self, target: str, data: bytes) -> None:
        head = f"{target} {len(data)}\n".encode()
        self._map[: len(head) + len(data)] = head + data


def load(folder: Path, target: str) -> dict[str, bytes]:
    """The committed inputs of a target: files TARGET.*.bin, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"{target}.*.bin"))}


def run(
    targets: Mapping[str, Target],
    *,
    corpus: Path,
    mutators: Mapping[str, Sequence[Mutator]],
    modules: Sequence[str],
    thorough: Mapping[str, Target],
    quick: Mapping[str, Target],
) -> int:
    """The command line of a fuzz program. `thorough` are checked on the corpus, `quick` on each input that joins it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0, help="all targets together (default 60)")
    parser.add_argument("--seed", type=int, default=None, help="of the random numbers (default: the time)")
    parser.add_argument("--only", choices=sorted(targets), help="one target")
    parser.add_argument(
        "--keep", action="store_true", help="add the smallest inputs that reach new code to the corpus"
    )
    parser.add_argument("--input", type=Path, help="run one file (of findings, or current.bin) and stop")
    options = parser.parse_args()
    for name in modules:
        where = importlib.import_module(name).__file__ or ""
        if not Path(where).is_relative_to(FOLDER):
            sys.exit(f"{name} is {where}, not built by asan.py: run `make fuzz-asan`")
    if options.input is not None:
        return replay(options.input, targets, thorough)
    seed = options.seed if options.seed is not None else time.time_ns() % 2**32
    rng = random.Random(seed)
    coverage, current = Coverage(), Current()
    chosen = [options.only] if options.only else list(targets)
    print(f"seed {seed}, {options.seconds:.0f} s, targets: {', '.join(chosen)}", flush=True)
    for target in chosen:
        found = load(corpus, target)
        if not found:
            sys.exit(f"{corpus} has no inputs for {target}")
        pool: list[bytes] = []
        base = 0
        runs = 0

        def attempt(data: bytes, *, seed_input: bool, target: str = target, pool: list[bytes] = pool) -> bool:
            current.note(target, data)
            coverage.begin()
            targets[target](data)
            fresh = coverage.new()
            if fresh or seed_input:
                (thorough if seed_input else quick)[target](data)
                pool.append(data)
            return bool(fresh)

        data = b""
        try:
            for data in found.values():
                attempt(data, seed_input=True)
            edges = coverage.edges()
            began = time.monotonic()
            until = began + options.seconds / len(chosen)
            while time.monotonic() < until:
                data = rng.choice(pool)
                for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
                    data = rng.choice(mutators[target])(rng, data, pool)[:MAX_INPUT]
                attempt(data, seed_input=False)
                runs += 1
                if not base and time.monotonic() > began + (until - began) / 10:
                    base = coverage.allocated() - sum(map(len, pool))
        except Exception:
            traceback.print_exc()
            FINDINGS.mkdir(parents=True, exist_ok=True)
            finding = FINDINGS / f"{target}.{hashlib.sha256(data).hexdigest()[:12]}.bin"
            finding.write_bytes(f"{target} {len(data)}\n".encode() + data)
            print(f"{target}: failed after {runs} inputs; the input is in {finding}", file=sys.stderr)
            return 1
        grown = coverage.allocated() - sum(map(len, pool)) - base if base else 0
        print(
            f"{target:24} {len(found):5} committed, {runs:8} inputs, "
            f"{coverage.edges() - edges:5} new edges of {coverage.edges()}, {len(pool):5} in the pool, "
            f"memory {grown >> 10:+} KiB",
            flush=True,
        )
        if options.keep:
            keep(corpus, target, targets[target], found, pool, coverage)
        if grown > LEAK_ALLOWED:
            print(f"{target}: memory grew by {grown >> 10} KiB", file=sys.stderr)
            return 1
    return 0


def keep(
    corpus: Path,
    name: str,
    target: Target,
    found: Mapping[str, bytes],
    pool: Sequence[bytes],
    coverage: Coverage,
) -> None:
    """Write those of the pool, smallest first, that take an edge which none before takes, committed ones included."""
    coverage.forget()
    for data in (*found.values(), *sorted(pool, key=len)):
        edges = coverage.edges()
        coverage.begin()
        target(data)
        coverage.new()
        if coverage.edges() > edges and data not in found.values():
            (corpus / f"{name}.found-{hashlib.sha256(data).hexdigest()[:12]}.bin").write_bytes(data)


def replay(path: Path, targets: Mapping[str, Target], thorough: Mapping[str, Target]) -> int:
    """One input as `Current` and the findings have them."""
    head, _, rest = path.read_bytes().partition(b"\n")
    name, size = head.decode().split()
    data = rest[: int(size)]
    targets[name](data)
    thorough[name](data)
    print(f"{path}: {name}, {len(data)} bytes: nothing wrong")
    return 0
