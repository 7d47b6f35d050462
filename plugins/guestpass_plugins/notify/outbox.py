"""`outbox`: writes each message as an .eml file into a folder, for trying things out without a mail server.

The files hold links and codes: the folder is 0700, each file 0600. A file appears under its name when it is complete.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from guestpass.plugin import ConfigPath, Host, Message, NotDelivered, Notifier, PluginConfig
from guestpass_plugins.notify.letter import KEY_PURPOSE, check_sender, letter

__all__ = ["Outbox"]


class Outbox(Notifier):
    class Config(PluginConfig):
        folder: ConfigPath = Path("outbox")
        sender: Annotated[str, AfterValidator(check_sender)] = "Guestpass <guestpass@localhost>"

    async def start(self, host: Host) -> None:
        """Raises OSError when the folder cannot be written."""
        await super().start(host)
        self._key = host.derive_key(KEY_PURPOSE)
        folder: Path = self.config.folder
        await asyncio.to_thread(_make_folder, folder)
        host.logger.info("mail is written to %s", folder)

    async def deliver(self, message: Message) -> str:
        data = letter(message, self.config.sender, self._key).as_bytes()
        at = datetime.fromtimestamp(self.host.now(), UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        kind = "".join(c for c in message.kind if c.isalnum()) or "message"
        path: Path = self.config.folder / f"{at}-{kind}-{secrets.token_hex(4)}.eml"
        try:
            await asyncio.to_thread(_write, path, data)
        except OSError as exc:
            raise NotDelivered(f"{path.parent}: {exc.strerror}", permanent=False) from exc
        return f"written to {path.name}"


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def _write(path: Path, data: bytes) -> None:
    """Complete and on disk under its name, or not there."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
