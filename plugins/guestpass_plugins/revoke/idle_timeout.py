"""`idle-timeout`: ends sessions that had neither a request nor anything open for some time.

The edge notes when a session was last used, in both lanes, and counts whatever is open (a WebSocket, a download) as
use; it writes that to the store, so it holds over restarts. Every half minute this plugin asks for live sessions that
are idle for too long and ends them for good; and `check` refuses one whose grant had been dropped in the meantime, so
no request slips in between. Whoever comes back proves the address again.

Bearer tokens are left alone unless `tokens` is set: a script that runs once a week is not somebody who walked away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from pydantic import Field

from guestpass.plugin import PluginConfig, Revocation, Revoker, Session, SessionKind, Share

__all__ = ["IdleTimeout"]

# Use is known to about two minutes: the edge looks at what is open once a minute, and writes once a minute.
SHORTEST_MINUTES = 5.0
LOOK_SECONDS = 30.0
REASON = "idle"


class IdleTimeout(Revoker):
    class Config(PluginConfig):
        minutes: float = Field(default=60, ge=SHORTEST_MINUTES)
        tokens: bool = False

    def check(self, share: Share, session: Session) -> Revocation | None:
        spared = session.kind is SessionKind.TOKEN and not self.config.tokens
        if spared or self.host.now() - session.last_seen <= 60 * self.config.minutes:
            return None
        return Revocation(REASON, session_id=session.id)

    def watch(self) -> AsyncIterator[Revocation]:
        return self._watch()

    async def _watch(self) -> AsyncIterator[Revocation]:
        while True:
            seconds, tokens = 60 * self.config.minutes, self.config.tokens
            for session in await self.host.idle_sessions(seconds, tokens=tokens):
                await self.host.end_session(session.id, REASON)
                yield Revocation(REASON, session_id=session.id)
            await asyncio.sleep(LOOK_SECONDS)
