"""`random`: each session goes to a gateway picked at random, so that load spreads without anybody keeping
count."""

from __future__ import annotations

from random import Random as Generator
from random import SystemRandom

from guestpass.plugin import BackendChooser, Candidate, Choice

__all__ = ["Random"]


class Random(BackendChooser):
    """Every candidate with the same chance."""

    # Not seeded: two edges that start from the same snapshot must not choose alike.
    generator: Generator = SystemRandom()

    def choose(self, choice: Choice) -> Candidate:
        return self.generator.choice(choice.candidates)
