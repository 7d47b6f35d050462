"""`json-lines`: appends each event to a file, one JSON object per line, for whatever collects logs.

The file may be moved away at any moment: before each line it is looked whether the path still leads to the file that
is open, and where it does not, a new one is made. So logrotate needs neither `copytruncate`, which loses lines, nor a
signal. A line is written by one call with O_APPEND: lines of several writers do not mix. A new file is readable by
its owner only; one that exists keeps its mode. A symbolic link is not followed.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import orjson

from guestpass.plugin import ConfigPath, Event, Host, Observer
from guestpass_plugins.observe.selection import Selection, as_json

__all__ = ["JsonLines"]

FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
MODE = 0o600


class JsonLines(Observer):
    class Config(Selection):
        path: ConfigPath = Path("events.jsonl")

    async def start(self, host: Host) -> None:
        """Raises OSError when the file cannot be written."""
        await super().start(host)
        self._file: int | None = await asyncio.to_thread(os.open, self.config.path, FLAGS, MODE)

    async def stop(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    async def on_event(self, event: Event) -> None:
        if self.config.wants(event):
            await asyncio.to_thread(self._append, orjson.dumps(as_json(event)) + b"\n")

    def _append(self, line: bytes) -> None:
        file = self._current()
        while line:
            line = line[os.write(file, line) :]

    def _current(self) -> int:
        """The file at the path, opened again where that has become another one."""
        path: Path = self.config.path
        if self._file is not None:
            try:
                there = path.stat(follow_symlinks=False)
                if os.path.samestat(there, os.fstat(self._file)):
                    return self._file
            except FileNotFoundError:
                pass
            os.close(self._file)
            self._file = None
        self._file = os.open(path, FLAGS, MODE)
        return self._file
