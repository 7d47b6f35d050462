"""Processes that a benchmark starts, by role, and what they cost.

`Lab` owns a temporary folder and everything that runs; leaving it ends all of it. Where the harness is killed, the
kernel ends its children (Linux), so that no run leaves anything behind.

CPU seconds and memory are read of each role's whole tree: nginx has a master and a worker, sshd a process for each
connection. The peak is reset before a run (`/proc/PID/clear_refs`), so it is the run's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from guestpass.local_ca import write_certificates

# Debian's places for what ordinary users have no need of.
EXTRA_PATHS = ("/usr/sbin", "/usr/local/sbin", "/sbin")

# Which package of Debian brings a program.
PACKAGES = {
    "haproxy": "haproxy",
    "nginx": "nginx-light",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "wrk": "wrk",
}

START_SECONDS = 60.0
STOP_SECONDS = 5.0
POLL_SECONDS = 0.02

# Linux, prctl(2).
PR_SET_PDEATHSIG = 1

# Linux, proc(5): writing 5 to clear_refs sets the peak of the resident set back to what it is now.
RESET_PEAK = "5"


class Missing(Exception):
    """Something that a benchmark needs is not installed; the text says what to do."""


def program(name: str) -> str:
    """The path of a program. Raises Missing."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *EXTRA_PATHS])
    found = shutil.which(name, path=path)
    if found is None:
        raise Missing(f"{name} is not installed: apt-get install {PACKAGES.get(name, name)}")
    return found


def need(*names: str) -> None:
    """Raises Missing with one line that names everything that is not there."""
    missing = []
    for name in names:
        try:
            program(name)
        except Missing:
            missing.append(PACKAGES.get(name, name))
    if missing:
        raise Missing(f"the benchmarks need: apt-get install {' '.join(sorted(set(missing)))}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(what: str, look: Callable[[], Any], *, seconds: float = START_SECONDS) -> Any:
    """What `look` returns as soon as it is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(POLL_SECONDS)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one role, or of the difference between two looks at it."""

    cpu: float  # seconds, user and system
    rss: int  # bytes now, all processes of the role
    peak: int  # bytes, the sum of each process's own peak


class Process:
    """One program; its output goes to a file."""

    def __init__(self, role: str, command: Sequence[str | Path], log: Path, env: Mapping[str, str]) -> None:
        self.role = role
        self.log = log
        self.started = time.perf_counter()
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait_for_port(self, port: int) -> None:
        wait_for(f"{self.role} listens on {port}", lambda: self._alive() and listens(port))

    def wait_for_line(self, start: str, *, seconds: float = START_SECONDS) -> str:
        """The first whole line of its output that begins with `start`."""

        def line() -> str | None:
            lines = self.output().splitlines(keepends=True)
            found = next((x for x in lines if x.startswith(start) and x.endswith("\n")), None)
            return found.strip() if found is not None else self._alive() and None

        return str(wait_for(f"{self.role} prints a line that begins with {start!r}", line, seconds=seconds))

    def _alive(self) -> bool:
        if self.popen.poll() is not None:
            raise RuntimeError(
                f"{self.role} ended with status {self.popen.returncode}:\n{self.output()[-4000:]}"
            )
        return True

    def tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def reset_peak(self) -> None:
        for process in self.tree():
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text(RESET_PEAK)

    def usage(self) -> Usage:
        cpu = 0.0
        rss = peak = 0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                times = process.cpu_times()
                cpu += times.user + times.system
                status = Path(f"/proc/{process.pid}/status").read_text()
                rss += _kilobytes(status, "VmRSS:")
                peak += _kilobytes(status, "VmHWM:")
        return Usage(cpu, rss, peak)

    def cpu_nanoseconds(self) -> int:
        """Of all threads that it has, from the scheduler: exact where `usage` counts hundredths of a second."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total += int((task / "schedstat").read_text().split()[0])
        return total

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()


def _kilobytes(status: str, field: str) -> int:
    for line in status.splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def _die_with_parent() -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork

    def arrange() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return arrange


class Lab:
    """A folder, a certificate authority, and everything that was started in it."""

    def __init__(self, *, keep_logs: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="guestpass-bench-"))
        self.folder.chmod(0o755)  # nginx's workers run as somebody else
        self.processes: list[Process] = []
        self.once: dict[str, Any] = {}  # what targets share: the application, certificates
        self._keep_logs = keep_logs

    def certificates(self) -> tuple[Path, Path, Path]:
        """(CA, certificate, key) for localhost and every name below share.localhost."""
        if "certificates" not in self.once:
            folder = self.folder / "tls"
            folder.mkdir()
            names = ["localhost", "127.0.0.1", "::1", "share.localhost", "*.share.localhost"]
            self.once["certificates"] = write_certificates(folder, names)
        paths: tuple[Path, Path, Path] = self.once["certificates"]
        return paths

    def start(
        self, role: str, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None
    ) -> Process:
        log = self.folder / f"{len(self.processes)}-{role.replace(' ', '-').replace('/', '-')}.log"
        process = Process(role, command, log, env or {})
        self.processes.append(process)
        return process

    def stop(self, processes: Iterable[Process]) -> None:
        for process in list(processes):
            process.stop()
            self.processes.remove(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        self.stop(reversed(self.processes.copy()))
        if not self._keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)
