"""`ip-allow-list`: requests come from named networks only.

The client's address is the one that the edge believes: the peer's, or what a proxy of `trusted_proxies` forwarded.
"""

from __future__ import annotations

from pydantic import Field

from guestpass.plugin import RequestFilter, Session, Share, Static
from guestpass_plugins.filter.where import Where
from guestpass_plugins.networks import Network

__all__ = ["IpAllowList"]


class IpAllowList(RequestFilter):
    class Config(Where):
        networks: tuple[Network, ...] = Field(min_length=1)
        message: str = "This share is open from certain networks only."

    def compile(self, share: Share, session: Session) -> Static | None:
        if not self.config.covers(share):
            return None
        return Static(networks=self.config.networks, message=self.config.message)
