"""`audit-log`: keeps every event in the edge's store, where the API lists and exports it."""

from __future__ import annotations

from guestpass.plugin import Event, Observer

__all__ = ["AuditLog"]


class AuditLog(Observer):
    """On disk when `on_event` returns."""

    async def on_event(self, event: Event) -> None:
        await self.host.record(event)
