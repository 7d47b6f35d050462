"""`random`: each session goes to a gateway picked at random, so that load spreads without anybody keeping
count."""

from __future__ import annotations

from random import SystemRandom

from guestpass.plugin import BackendChooser, Candidate, Choice

__all__ = ["Random"]

# Not seeded: two edges that start from the same snapshot must not choose alike.
_random = SystemRandom()


class Random(BackendChooser):
    """Every candidate with the same chance."""

    async def choose(self, choice: Choice) -> Candidate:
        return _random.choice(choice.candidates)
