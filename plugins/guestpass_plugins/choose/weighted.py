"""`weighted`: at random, each gateway in proportion to the `weight` of its gateway.toml.

A gateway of weight 0 gets no sessions while there is another one: that empties it before maintenance, or keeps it for
an emergency.
"""

from __future__ import annotations

from random import Random as Generator
from random import SystemRandom

from guestpass.plugin import BackendChooser, Candidate, Choice

__all__ = ["Weighted"]


class Weighted(BackendChooser):
    generator: Generator = SystemRandom()

    def choose(self, choice: Choice) -> Candidate:
        weights = [candidate.weight for candidate in choice.candidates]
        if not any(weights):
            return self.generator.choice(choice.candidates)
        return self.generator.choices(choice.candidates, weights)[0]
