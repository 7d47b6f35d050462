"""Which events an observer is told, and how the bundled ones write them."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from guestpass.plugin import Event, PluginConfig
from guestpass_plugins.webhook import in_rfc3339

__all__ = ["Selection", "as_json"]


class Selection(PluginConfig):
    """Settings of observers that may be told of some events only: `types = ["share.*", "session.ended"]`."""

    types: tuple[str, ...] = ("*",)

    def wants(self, event: Event) -> bool:
        return any(fnmatchcase(event.type, pattern) for pattern in self.types)


def as_json(event: Event) -> Mapping[str, Any]:
    """An event as the bundled observers write it. It holds no link, token, code, path or query."""
    return {
        "type": event.type,
        "at": in_rfc3339(event.at),
        "actor": event.actor,
        "share": event.share_id,
        "session": event.session_id,
        "detail": dict(event.detail),
    }
