from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.shares import world

from guestpass.model import Event
from guestpass.plugin import PluginConfig
from guestpass_plugins.observe.audit_log import AuditLog


async def test_every_event_is_on_disk_when_the_hook_returns(tmp_path: Path) -> None:
    event = Event("share.opened", 1.0, "alice@example.org", "s1", "s2", {"provider": "email-code"})
    async with world(tmp_path) as w:
        host: Any = SimpleNamespace(record=w.service.record)
        observer = AuditLog("audit-log", PluginConfig())
        await observer.start(host)
        await observer.on_event(event)
        await observer.stop()
    async with world(tmp_path) as w:
        assert [entry.event for entry in (await w.service.audit()).items] == [event]
