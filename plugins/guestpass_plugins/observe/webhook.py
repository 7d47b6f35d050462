"""`webhook` (observer): tells another system what happened, signed, in order, and again until it was heard.

Events wait in memory, at most a thousand; the oldest go first when there are more, and the log says how many. So a
receiver that is away for a while misses nothing, one that is away for long, or a restart of the edge, may cost
events: `audit-log` is what keeps them for good.
"""

from __future__ import annotations

import asyncio
from collections import deque

from pydantic import Field

from guestpass.plugin import Event, Host, Observer
from guestpass_plugins.observe.selection import Selection, as_json
from guestpass_plugins.webhook import Endpoint, NotSent, Signer, new_id, pauses, send

__all__ = ["Webhook"]

MAX_WAITING = 1000
# The edge waits for five seconds at most.
STOP_SECONDS = 3.0


class Webhook(Observer):
    class Config(Endpoint, Selection):
        give_up_seconds: float = Field(default=3600, ge=0, le=86_400)

    async def start(self, host: Host) -> None:
        await super().start(host)
        self._signer = Signer(self.config.secret)
        self._waiting: deque[tuple[str, Event]] = deque(maxlen=MAX_WAITING)
        self._more = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._lost = 0
        host.spawn(self._send_all(), name="send events")

    async def stop(self) -> None:
        """What waits gets a last chance."""
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._all_sent.wait()
        except TimeoutError:
            self.host.logger.warning("%d events were not sent", len(self._waiting))

    def on_event(self, event: Event) -> None:
        if not self.config.wants(event):
            return
        if len(self._waiting) == MAX_WAITING:
            self._lost += 1
        self._waiting.append((new_id(), event))
        self._all_sent.clear()
        self._more.set()

    async def _send_all(self) -> None:
        while True:
            await self._more.wait()
            while self._waiting:
                first = self._waiting[0]
                await self._send(*first)
                if self._waiting and self._waiting[0] is first:  # it was not pushed out meanwhile
                    self._waiting.popleft()
            self._more.clear()
            self._all_sent.set()

    async def _send(self, message_id: str, event: Event) -> None:
        waits = pauses(self.config.give_up_seconds)
        while True:
            try:
                await send(
                    *(self.host, self.config, self._signer, event.type, as_json(event), message_id, event.at)
                )
            except NotSent as exc:
                pause = next(waits, None)
                if pause is None:
                    self.host.logger.error("an event %s was given up: %s", event.type, exc)
                    return
                self.host.logger.warning("%s: again in %.0f s, %d wait", exc, pause, len(self._waiting))
                await asyncio.sleep(pause)
            else:
                if self._lost:
                    self.host.logger.error("%d events were lost while nobody listened", self._lost)
                    self._lost = 0
                return
