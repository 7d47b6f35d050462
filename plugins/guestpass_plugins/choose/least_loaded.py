"""`least-loaded`: of two gateways picked at random, the one that is less busy.

Two choices are enough: the busiest of n gateways stays within a few streams of the mean, where one random choice lets
it drift far above (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001). Always taking the
least busy of all would send a whole rush of sessions to the gateway that just came back, before any of them has a
stream that could be counted.

How busy a gateway is: its live streams, with the one to come, divided by its weight, and dearer by distance. A
gateway whose round trip is `far` seconds longer counts as twice as busy, so distance decides among idle gateways, and
load among busy ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random as Generator
from random import SystemRandom

from pydantic import Field

from guestpass.plugin import BackendChooser, Candidate, Choice, PluginConfig

__all__ = ["LeastLoaded"]


def less_busy_of_two(candidates: Sequence[Candidate], generator: Generator, far: float) -> Candidate:
    """`candidates` is not empty. Those of weight 0 are taken only when there are no others."""
    pool = [c for c in candidates if c.weight > 0] or list(candidates)
    # In random order, so that `min`, which takes the first of equals, has no favourite.
    return min(generator.sample(pool, min(2, len(pool))), key=lambda c: busy(c, far))


def busy(candidate: Candidate, far: float) -> float:
    """Without a measured round trip (a tunnel's first second) distance does not count."""
    return (candidate.streams + 1) / max(candidate.weight, 1) * (1 + (candidate.rtt or 0.0) / far)


class LeastLoaded(BackendChooser):
    class Config(PluginConfig):
        far: float = Field(
            default=0.1, gt=0, description="seconds of round trip that count like twice the load"
        )

    generator: Generator = SystemRandom()

    def choose(self, choice: Choice) -> Candidate:
        return less_busy_of_two(choice.candidates, self.generator, self.config.far)
