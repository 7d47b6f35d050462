"""office-hours: a RequestFilter for Guestpass."""

from __future__ import annotations

from datetime import time
from zoneinfo import ZoneInfo

from guestpass.plugin import (
    Denied,
    Edits,
    PluginConfig,
    RequestContext,
    RequestFilter,
    Session,
    Share,
    Static,
)


class OfficeHours(RequestFilter):
    """Admit requests only while somebody is in the office, and tell the application that we do."""

    class Config(PluginConfig):
        opens: time = time(8)
        closes: time = time(18)
        zone: ZoneInfo = ZoneInfo("UTC")

    def compile(self, share: Share, session: Session) -> Static | None:
        return Static(edits=Edits(add=(("X-Office-Closes", self.config.closes.isoformat("minutes")),)))

    def on_request(self, request: RequestContext) -> Edits | None:
        if not self.config.opens <= request.now(self.config.zone).time() < self.config.closes:
            raise Denied("This share is open during office hours only.")
        return None
