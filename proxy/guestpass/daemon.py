"""What the edge and the gateway need as long-running processes: logs, signals, telling systemd.

Logs go to standard error, one line per record, so that a log file can be cut at any line. Whoever logs leaves out
links, tokens, keys and codes; the formatter masks what looks like one all the same, since a library's message or a
traceback may quote what it was given.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from guestpass.config import LogLevel

# Our tokens and keys, the secret part of a link, and a password in a URL. The prefix stays: a reader sees what it was.
SECRETS = (
    (re.compile(r"\b(gp[jk]?_)[A-Za-z0-9_-]{16,}"), r"\1…"),
    (re.compile(r"(/s/)[A-Za-z0-9_-]{16,}"), r"\1…"),
    (re.compile(r"(://[^/@\s:]*:)[^/@\s]+@"), r"\1…@"),
)

# Everything that could end a line or drive a terminal.
CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160))} | {
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): " ",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}

# journald reads the level of a line from this prefix (sd-daemon(3)).
JOURNAL_LEVELS = {logging.DEBUG: "<7>", logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}


class LineFormatter(logging.Formatter):
    """One line per record: time, level, logger, message; a traceback follows on the same line, escaped."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._journal = journal
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record).translate(CONTROLS)
        for pattern, replacement in SECRETS:
            line = pattern.sub(replacement, line)
        return JOURNAL_LEVELS.get(record.levelno, "") + line if self._journal else line


def set_up_logging(level: LogLevel = "info") -> None:
    """Send the records of every logger to standard error. Libraries speak from warning upwards only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(journal=_stderr_is_journal()))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in ("guestpass", "guestpass_plugins"):
        logging.getLogger(name).setLevel(level.upper())
    logging.captureWarnings(True)


def _stderr_is_journal() -> bool:
    """Whether standard error is the socket that systemd names in JOURNAL_STREAM (device and inode)."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


def spare_collector() -> None:
    """What there is when a process is ready stays until its end, so the garbage collector need not look at it again.
    There are 100,000 objects of modules and libraries: with them each full collection stops everything for a tenth of a
    second, and the more a process has to do, the more of these there are."""
    gc.collect()
    gc.freeze()


def notify_systemd(*lines: str) -> bool:
    """Send `READY=1` and the like to the service manager (sd_notify(3)); False when there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or address[0] not in "/@":
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            sock.sendall("\n".join(lines).encode())
        except OSError as exc:
            logging.getLogger(__name__).warning("cannot notify systemd at %s: %s", address, exc.strerror)
            return False
    return True


@contextmanager
def reloading() -> Iterator[None]:
    """Around a reload: systemd (`Type=notify-reload`) waits for its end."""
    notify_systemd("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
    try:
        yield
    finally:
        notify_systemd("READY=1")


class Signals:
    """Signal handlers of the running event loop, for the length of a `with` block.

    `stop` is set by the first SIGTERM or SIGINT; `hurry` by a further one, from a person who does not want to wait
    for the drain. SIGHUP calls `on_reload`; without one it stops as well, as when the terminal of a command is closed.
    SIGUSR2 calls `on_roll`, where there is one.
    """

    def __init__(
        self, *, on_reload: Callable[[], object] | None = None, on_roll: Callable[[], object] | None = None
    ) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._on_reload = on_reload
        self._handlers: dict[signal.Signals, Callable[[], object]] = {
            signal.SIGTERM: self._stop,
            signal.SIGINT: self._stop,
            signal.SIGHUP: self._reload,
        }
        if on_roll is not None:
            self._handlers[signal.SIGUSR2] = on_roll

    def _stop(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        else:
            self.stop.set()
            notify_systemd("STOPPING=1")

    def _reload(self) -> None:
        if self._on_reload is None:
            self._stop()
        elif not self.stop.is_set():
            self._on_reload()

    def __enter__(self) -> Signals:
        loop = asyncio.get_running_loop()
        for number, handler in self._handlers.items():
            loop.add_signal_handler(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in self._handlers:
            loop.remove_signal_handler(number)
