"""The session's model test as a random walk: events of two ends, their pipes and the clock in any order, 10⁶ of them in
the long form, without the search machinery that makes `tests/speedups/test_session_model.py` find small examples.

A failure names the seed; GUESTPASS_FAULTS_SEED=N walks that one again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

import pytest
from hypothesis.stateful import MultipleResults
from speedups.test_session_model import Tunnel
from support.scoreboard import LONG, row

pytestmark = pytest.mark.timeout(600 if LONG else 120)

EVENTS = 1_000_000 if LONG else 20_000
WALK = 200
"""Events of one pair of sessions, before everything is let finish and checked."""

MODES = ("auto", "auto", "plain", "plain", "refuse", "reset in data", "raise in data", "raise in reset")


def walk(seed: int) -> None:
    rng = random.Random(seed)
    both = Tunnel()
    both.handshake()
    streams: list[int] = []

    def opened() -> None:
        made = both.open(
            size=rng.choice((0, 1, 700, 5000)),
            fin=rng.random() < 0.5,
            interactive=rng.random() < 0.5,
            mode=rng.choice(MODES),
        )
        if not isinstance(made, MultipleResults):
            streams.append(made)

    def side() -> bool:
        return rng.random() < 0.5

    def one() -> int:
        return rng.choice(streams[-20:])

    events: list[tuple[int, Callable[[], object]]] = [
        (2, opened),
        (3, lambda: both.respond(number=one(), interim=side(), fin=side(), big=rng.random() < 0.1)),
        (
            4,
            lambda: both.send(
                number=one(), at_edge=side(), size=rng.choice((0, 1, 100, 1024, 3000, 40_000)), fin=side()
            ),
        ),
        (1, lambda: both.trailers(number=one(), at_edge=side())),
        (4, lambda: both.consume(number=one(), at_edge=side(), size=rng.randint(1, 4000))),
        (1, lambda: both.reset(number=one(), at_edge=side())),
        (2, lambda: both.cancelled(number=one(), at_edge=side())),
        (8, lambda: both.write(at_edge=side(), limit=rng.choice((1, 50, 700, 5000, 65_536)))),
        (8, lambda: both.read(at_edge=side(), size=rng.randint(1, 30_000))),
        (1, lambda: both.read_byte_by_byte(at_edge=side())),
        (3, lambda: both.wait(seconds=rng.choice((0.0, 0.001, 0.02, 0.5, 1.0)))),
        (1, lambda: both.info(at_edge=side())),
    ]
    weights = [weight for weight, _ in events]
    calls = [call for _, call in events]
    for number in range(WALK):
        call = rng.choices(calls, weights)[0] if streams else opened
        call()
        if number == WALK * 3 // 4 and rng.random() < 0.2:
            both.drain(hard=side())
        both.states_agree()
        both.memory_is_bounded()
        if number % 10 == 0:
            both.bytes_in_order()
    both.teardown()


def test_random_reorderings() -> None:
    chosen = os.environ.get("GUESTPASS_FAULTS_SEED")
    began = time.monotonic()
    seeds = [int(chosen)] if chosen else range(EVENTS // WALK)
    for seed in seeds:
        try:
            walk(seed)
        except BaseException:
            print(f"seed {seed}")
            raise
    row(
        "random reorderings",
        f"{len(seeds) * WALK:,} events of two sessions, bounded pipes and a clock, against the model",
        f"bytes in order, credit and memory within bounds, all completes; {time.monotonic() - began:.0f} s",
        "no difference",
        ok=True,
    )
