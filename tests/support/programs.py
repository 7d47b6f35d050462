"""Other programs that a test starts: each in a process group of its own, its output kept for the report."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

T = TypeVar("T")

POLL_SECONDS = 0.05
STOP_SECONDS = 15.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(
    what: str, look: Callable[[], T | None], *, seconds: float, pause: Callable[[float], None] = time.sleep
) -> T:
    """What `look` returns as soon as it is true; AssertionError that names `what` after `seconds`.

    `pause` is for those that have something to do meanwhile: a browser's events arrive in `Sockets.watch`.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        pause(POLL_SECONDS)


class Program:
    """A subprocess whose standard output and error go to `log`; `with` ends the whole group.

    SIGTERM first, SIGKILL after `STOP_SECONDS`. An exception in the `with` block shows the end of the output.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait_for_url(self, url: str, *, seconds: float) -> None:
        """Wait until `url` answers with anything but an error of the server."""

        def answers() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output()}"
            try:
                with urlopen(url, timeout=5):
                    return True
            except HTTPError as error:
                with error:
                    return error.code < 500
            except (URLError, OSError):
                return False

        wait_until(f"{url} answers\n{self.output()}", answers, seconds=seconds)

    def wait_for_line(self, start: str, *, seconds: float) -> str:
        """The first whole line of the output that begins with `start`."""

        def line() -> str | None:
            ended = self.process.poll()  # before its output is read, which may end with the line
            for found in self.output().splitlines(keepends=True):
                if found.startswith(start) and found.endswith("\n"):
                    return found.strip()
            assert ended is None, f"ended with {ended}:\n{self.output()}"
            return None

        return wait_until(f"a line that begins with {start!r}", line, seconds=seconds)

    def stop(self) -> int:
        """SIGTERM to the program, then SIGKILL to what is left of its group. Its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None:
            print(f"── {self.log.name} ──\n{self.output()[-8000:]}")
