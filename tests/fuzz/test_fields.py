"""Runs the targets of fields.py: over the corpus, then over mutations of it, from a seed.

GUESTPASS_FUZZ_SEED sets where it begins and FUZZ_SECONDS for how long each target runs (`make fuzz-fields`); without
the latter each has a number of cases, so that `make test` does the same work on every machine.
"""

from __future__ import annotations

import os
import random
import time

import pytest
from fuzz.engine import plain_change
from fuzz.fields import CORPUS, TARGETS, WORDS

CASES = 4000
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
SEED = int(os.environ.get("GUESTPASS_FUZZ_SEED", "1"))
LONGEST = 4096


def corpus(target: str) -> list[bytes]:
    found = [path.read_bytes() for path in sorted(CORPUS.glob(f"{target}.*.bin"))]
    assert len(found) >= 6, f"the corpus of {target} is not there"
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    for data in corpus(target):
        TARGETS[target](data)


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("target", TARGETS)
def test_mutations(target: str) -> None:
    rng = random.Random(f"{SEED} {target}")
    known = corpus(target)
    until = time.monotonic() + SECONDS
    done = 0
    while time.monotonic() < until if SECONDS else done < CASES:
        done += 1
        data = rng.choice(known)
        for _ in range(rng.randrange(1, 6)):
            if rng.random() < 0.7:
                at = rng.randrange(len(data) + 1)
                data = data[:at] + rng.choice(WORDS[target]) + data[at + rng.choice((0, 0, 0, 1, 3)) :]
            else:
                data = plain_change(rng, data, known)
        data = data[:LONGEST]
        try:
            TARGETS[target](data)
        except Exception as exc:
            exc.add_note(f"{target}: {data!r}")
            raise
    assert done
