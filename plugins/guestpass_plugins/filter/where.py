"""What the bundled filters have in common: the part of the edge that a filter is for."""

from __future__ import annotations

from guestpass.plugin import PluginConfig, Share

__all__ = ["Where"]


class Where(PluginConfig):
    """Settings of a filter that may be for one site, or one service of it, only."""

    site: str | None = None
    service: str | None = None

    def covers(self, share: Share) -> bool:
        return self.site in (None, share.site) and self.service in (None, share.service)
