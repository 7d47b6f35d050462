"""half-day: a Revoker for Guestpass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from guestpass.plugin import PluginConfig, Revocation, Revoker, Session, Share

# How late a session may end, in seconds.
LATE = 1.0


class HalfDay(Revoker):
    """End sessions some hours after sign-in, however busy they are."""

    class Config(PluginConfig):
        hours: float = 12.0

    ends: dict[str, float]

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self.ends = {}

    async def check(self, share: Share, session: Session) -> Revocation | None:
        end = session.created + self.config.hours * 3600
        if end <= self.host.now():
            return Revocation("too_old", session_id=session.id)
        self.ends[session.id] = end
        return None

    async def watch(self) -> AsyncIterator[Revocation]:
        while True:
            await asyncio.sleep(LATE)
            now = self.host.now()
            for session_id in [s for s, end in self.ends.items() if end <= now]:
                del self.ends[session_id]
                yield Revocation("too_old", session_id=session_id)
