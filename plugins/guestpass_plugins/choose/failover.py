"""`failover`: the gateways of the best rank, and the next rank when none of those is there.

The rank is a whole number in a label of gateway.toml, the lowest is best: `labels = { priority = "1" }`. A gateway
without the label, or with something else in it, comes last. Within a rank, the less busy of two serves (see
`least-loaded`). A session stays with its gateway while that one lives, so when a better rank comes back new sessions go
there and nobody who is at work is moved.
"""

from __future__ import annotations

import math
from random import Random as Generator
from random import SystemRandom

from pydantic import Field

from guestpass.plugin import BackendChooser, Candidate, Choice, Host, PluginConfig
from guestpass_plugins.choose.least_loaded import less_busy_of_two

__all__ = ["Failover"]


class Failover(BackendChooser):
    class Config(PluginConfig):
        label: str = Field(default="priority", min_length=1)
        far: float = Field(default=0.1, gt=0)

    generator: Generator = SystemRandom()

    async def start(self, host: Host) -> None:
        await super().start(host)
        self._told: set[tuple[str, str]] = set()

    def choose(self, choice: Choice) -> Candidate:
        ranked = [(self._rank(candidate), candidate) for candidate in choice.candidates]
        best = min(rank for rank, _ in ranked)
        first = [candidate for rank, candidate in ranked if rank == best]
        return less_busy_of_two(first, self.generator, self.config.far)

    def _rank(self, candidate: Candidate) -> float:
        text = candidate.labels.get(self.config.label)
        try:
            return math.inf if text is None else int(text)
        except ValueError:
            name = (candidate.site, candidate.name)
            if name not in self._told:
                self._told.add(name)
                self.host.logger.warning(
                    "gateway %s/%s: the label %s = %r is not a whole number: it comes last",
                    *(*name, self.config.label, text),
                )
            return math.inf
