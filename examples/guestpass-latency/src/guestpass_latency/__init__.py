"""Choose the gateway that answers soonest.

Each gateway's round-trip time is measured by its tunnel (`Candidate.rtt`). One measurement says little, so a moving
average is kept for each; a new session goes to the fastest, unless others are nearly as fast: of those that are within
`close` of it the one with the fewest streams serves, so that the fastest does not get everybody.

A gateway that was not measured yet counts as the fastest: somebody has to try it.
"""

from __future__ import annotations

from guestpass.plugin import BackendChooser, Candidate, Choice, PluginConfig


class FastestGateway(BackendChooser):
    """Choose the gateway with the shortest round-trip time; of nearly equal ones, the least busy."""

    class Config(PluginConfig):
        close: float = 0.2
        """As near to the fastest: a share of its time."""
        weight: float = 0.3
        """How much a new measurement counts in the average."""

    averages: dict[tuple[str, str], float]

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self.averages = {}

    def choose(self, choice: Choice) -> Candidate | None:
        times = {c.name: self._average(c) for c in choice.candidates}
        limit = min(times.values()) * (1 + self.config.close)
        near = [c for c in choice.candidates if times[c.name] <= limit]
        return min(near, key=lambda c: (c.streams, times[c.name]))

    def _average(self, candidate: Candidate) -> float:
        """Seconds; 0 where nothing is known."""
        key = (candidate.site, candidate.name)
        if candidate.rtt is None:
            return self.averages.get(key, 0.0)
        before = self.averages.get(key, candidate.rtt)
        average = before + self.config.weight * (candidate.rtt - before)
        self.averages[key] = average
        return float(average)
