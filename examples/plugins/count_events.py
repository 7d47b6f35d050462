"""count-events: an Observer for Guestpass."""

from __future__ import annotations

from collections import Counter

from guestpass.plugin import Event, Observer, PluginConfig


class CountEvents(Observer):
    """Count what happens, and warn when sign-ins are denied again and again."""

    class Config(PluginConfig):
        denied: int = 10
        """Warn at so many."""

    counts: Counter[str]

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self.counts = Counter()

    def on_event(self, event: Event) -> None:
        self.counts[event.type] += 1
        if event.type == "signin.denied" and self.counts[event.type] == self.config.denied:
            self.host.logger.warning("%d sign-ins were denied", self.config.denied)
