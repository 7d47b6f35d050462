"""What an edge has once, however many processes serve it: the store, the service on it, the bus and the courier.

An edge of one process has its home itself; with several workers the supervisor has it, and workers ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guestpass import config as configuration
from guestpass.config import EdgeConfig, PluginSection
from guestpass.edge.events import EventHub
from guestpass.edge.origins import Origins
from guestpass.edge.signing_keys import write_private
from guestpass.errors import ConfigError
from guestpass.model import Session, Share
from guestpass.plugin import Notifier
from guestpass.shares.bus import Bus
from guestpass.shares.courier import Courier
from guestpass.shares.service import ShareService
from guestpass.shares.store import Store
from guestpass.tokens import API_KEY_PREFIX, new_secret


@dataclass(frozen=True, slots=True)
class Home:
    store: Store
    bus: Bus
    courier: Courier
    service: ShareService

    @classmethod
    async def open(
        cls,
        config: EdgeConfig,
        *,
        events: EventHub,
        notifiers: Sequence[Notifier],
        origins: Origins,
        renew: Callable[[Share, Mapping[str, Session]], None],
        ways: Callable[[], Collection[str]],
        restored: bool = False,
        now: Callable[[], float] = time.time,
    ) -> Home:
        """`ways`, `renew`: see ShareService. `restored`: see `Store.open`. The courier is not started yet. Raises
        StoreError, ConfigError."""
        store = await Store.open(config.database, restored=restored)
        bus = Bus()
        service = ShareService(
            store,
            bus,
            now=now,
            emit=events.emit,
            renew=renew,
            public_url=config.edge.public_url,
            share_origin=origins.share_origin,
            default_owner=config.edge.owner,
            ways=ways,
        )
        return cls(store, bus, Courier(store, notifiers, emit=events.emit, now=now), service)

    async def close(self) -> None:
        await self.service.close()
        await self.store.close()


def make_state_folder(config: EdgeConfig) -> Path:
    """The folder of the database, made if it is not there. Raises ConfigError."""
    state = config.database.parent
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise ConfigError(
            f'{config.file}: cannot make the folder {state}: {exc.strerror} (key "edge.state")'
        ) from exc
    return state


def api_key_of(config: EdgeConfig, state: Path) -> tuple[str, Path | None]:
    """The key, and the file that it is in unless it is configured. Raises ConfigError."""
    secret = config.edge.api_key
    if secret is not None:
        return secret.of(config.file, "edge.api_key"), None
    path = state / "api.key"
    return secret_file(path, API_KEY_PREFIX), path


def plugin_secret(state: Path) -> bytes:
    """What plugins' keys are derived from. Raises ConfigError."""
    return secret_file(state / "plugins.key").encode("ascii")


def secret_file(path: Path, prefix: str = "") -> str:
    """A secret of ours that is made at the first start and kept in a file of mode 0600. Raises ConfigError."""
    if not path.exists():
        write_private(path, new_secret(prefix).encode("ascii") + b"\n")
    return configuration.Secret(file=path.absolute()).read(path.parent)


def with_notifiers(config: EdgeConfig) -> EdgeConfig:
    """The configuration with the notifier that `[mail]`, or its absence, implies when none is named."""
    if config.notify:
        return config
    if config.mail is not None:
        settings: dict[str, Any] = {"url": config.mail.smtp, "sender": config.mail.sender}
        if config.mail.password is not None:
            settings["password"] = config.mail.password.of(config.file, "mail.password")
        keys = {"url": "mail.smtp", "sender": "mail.from", "password": "mail.password"}
        section = PluginSection.standing_for("[mail]", keys, use="smtp", **settings)
    else:
        section = PluginSection(use="outbox", folder=str(config.resolve(config.edge.outbox).absolute()))
    return config.model_copy(update={"notify": (section,)})


def ready_line(
    config: EdgeConfig, *, listen: Sequence[str], admin_url: str, api_key_file: Path | None, pid: int
) -> dict[str, Any]:
    """What `guestpass edge --json` prints when the edge serves."""
    edge = config.edge
    to_outbox = config.mail is None and not config.notify
    return {
        "edge": edge.public_url,
        "listen": list(listen),
        "metrics": f"{admin_url}/metrics",
        "api": f"{edge.public_url}/api/v1",
        "outbox": str(config.resolve(edge.outbox)) if to_outbox else None,
        "pid": pid,
        "api_key_file": str(api_key_file) if api_key_file is not None else None,
    }
