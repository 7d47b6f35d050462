"""The access log: one line of JSON for each request on a share's origin, where an operator asks for it.

Both lanes append finished lines to one buffer (`Lane` in relay.pyx, which makes the lines of both), and the buffer
comes here when it is full or a second old: one write for many requests, by a thread, so that a disk or a pipe that is
slow holds up nobody. What it cannot take is dropped and counted, never queued without end.

Several workers append to one file, or to one standard output. A file takes each write whole. A pipe, or the socket that
systemd gives, does that with PIPE_BUF bytes only: what goes there is written in pieces of so many, cut between lines.

A line names the share, the session, the gateway and the visitor's address; no query string, link, token or code ever
stands there, and a path only with `access_log_paths = true`.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import orjson

from guestpass.errors import ConfigError

if TYPE_CHECKING:
    from guestpass.edge.grants import Grant

log = logging.getLogger("guestpass.edge.access_log")

STDOUT = "-"

# What may wait for the disk: some seconds' lines at full speed.
MAX_WAITING = 4 << 20

# Rotated files are for the operator and a group that reads logs.
MODE = 0o640

CLOSE_SECONDS = 5.0


def who(share_id: str, grant: Grant | None) -> bytes:
    """The fields of a line that a grant tells; None where nobody was admitted."""
    known = {
        "share": share_id,
        "session": grant.session.id if grant is not None else None,
        "service": grant.service if grant is not None else None,
        "gateway": grant.gateway if grant is not None else None,
    }
    return orjson.dumps(known)[1:-1]


class AccessLog:
    """A file that lines are appended to, or standard output."""

    def __init__(self, path: Path | None) -> None:
        """None: standard output. Raises ConfigError when the file cannot be opened."""
        self._path = path
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._reopen = False
        self._failing = False
        self.dropped = 0
        """Lines that were not written."""
        try:
            self._fd = self._open()
        except OSError as exc:
            raise ConfigError(
                f'cannot write to {path}: {exc.strerror} (key "edge.access_log")',
                hint="Its folder must exist, and the edge's user must be allowed to write there.",
            ) from exc
        self._whole = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._thread = threading.Thread(target=self._work, name="access log", daemon=True)
        self._thread.start()

    def _open(self) -> int:
        if self._path is None:
            return os.dup(1)
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, MODE)

    def write(self, lines: bytes) -> None:
        """Whole lines. Never waits."""
        with self._lock:
            if self._waiting + len(lines) > MAX_WAITING:
                self.dropped += lines.count(b"\n")
                return
            self._waiting += len(lines)
        self._queue.put(lines)

    def reopen(self) -> None:
        """The file was moved away (logrotate): what comes from now on goes to a new one of the old name."""
        self._reopen = True
        self._queue.put(b"")

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)

    # ── the thread ───────────────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        while (lines := self._queue.get()) is not None:
            if self._reopen:
                self._reopen = False
                self._open_again()
            self._write(lines)
            with self._lock:
                self._waiting -= len(lines)
        os.close(self._fd)

    def _open_again(self) -> None:
        try:
            fresh = self._open()
        except OSError as exc:
            log.error("cannot open %s again: %s; the old file stays in use", self._path, exc.strerror)
            return
        os.close(self._fd)
        self._fd = fresh
        self._whole = stat.S_ISREG(os.fstat(fresh).st_mode)

    def _at_once(self, left: memoryview) -> int:
        """How much of it goes in one write."""
        if self._whole or len(left) <= select.PIPE_BUF:
            return len(left)
        return bytes(left[: select.PIPE_BUF]).rfind(b"\n") + 1 or select.PIPE_BUF

    def _write(self, lines: bytes) -> None:
        left = memoryview(lines)
        try:
            while left:
                left = left[os.write(self._fd, left[: self._at_once(left)]) :]
            self._failing = False
        except OSError as exc:
            with self._lock:
                self.dropped += bytes(left).count(b"\n")
            if not self._failing:
                self._failing = True
                log.error("cannot write to %s: %s; lines are dropped", self._path or "stdout", exc.strerror)
