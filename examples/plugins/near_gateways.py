"""near-gateways: a BackendChooser for Guestpass."""

from __future__ import annotations

from guestpass.plugin import BackendChooser, Candidate, Choice, PluginConfig


class NearGateways(BackendChooser):
    """Prefer the gateways of one zone; of them, the one with the fewest streams."""

    class Config(PluginConfig):
        zone: str = "default"

    def choose(self, choice: Choice) -> Candidate | None:
        near = [c for c in choice.candidates if c.labels.get("zone") == self.config.zone]
        return min(near, key=lambda c: c.streams, default=None)
