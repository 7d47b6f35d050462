"""Five gigabytes down and five up through `guestpass up`, in bounded memory in every process."""

from __future__ import annotations

import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from support.programs import Program
from support.up import Up

GB = 1_000_000_000
SIZE = 5 * GB
BLOCK = bytes(range(256)) * 4096  # 1 MiB

# What a process may grow beyond its size when it is idle.
MAX_GROWTH = 100 * 1_000_000


class Watch:
    """The largest resident size of each process while it runs."""

    def __init__(self, pids: list[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self.idle = {p.pid: p.memory_info().rss for p in self._processes}
        self.peak = dict(self.idle)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            for process in self._processes:
                self.peak[process.pid] = max(self.peak[process.pid], process.memory_info().rss)

    @property
    def growth(self) -> int:
        return max(self.peak[pid] - idle for pid, idle in self.idle.items())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def connected(up: Up, head: str) -> Iterator[socket.socket]:
    host = up.origin.removeprefix("http://")
    with socket.create_connection(("127.0.0.1", int(host.rpartition(":")[2])), timeout=60) as sock:
        lines = f"Host: {host}\r\nAuthorization: Bearer {up.facts['token']}\r\nConnection: close\r\n\r\n"
        sock.sendall((head + lines).encode("ascii"))
        yield sock


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        part = sock.recv(65536)
        assert part, received
        received += part
    head, _, rest = received.partition(b"\r\n\r\n")
    return head, rest


@pytest.mark.big
@pytest.mark.timeout(600)
def test_five_gigabytes_each_way(tmp_path: Path) -> None:
    script = Path(__file__).parent / "support" / "bulk_app.py"
    with Program([sys.executable, script], log=tmp_path / "app.log") as app:
        url = app.wait_for_line("http://", seconds=20)
        with Up(url, to="alice@example.org", folder=tmp_path) as up:
            pids = up.facts["pids"]["edge"] + up.facts["pids"]["gateways"]
            with connected(up, "GET /1000 HTTP/1.1\r\n") as sock:  # what is allocated once is idle size
                read_head(sock)

            with Watch(pids) as watch, connected(up, f"GET /{SIZE} HTTP/1.1\r\n") as sock:
                start = time.monotonic()
                head, rest = read_head(sock)
                assert f"Content-Length: {SIZE}".lower().encode() in head.lower()
                checksum, count = zlib.adler32(rest), len(rest)
                buffer = bytearray(1 << 20)
                view = memoryview(buffer)
                while size := sock.recv_into(buffer):
                    checksum = zlib.adler32(view[:size], checksum)
                    count += size
                down = time.monotonic() - start
            assert count == SIZE
            assert checksum == expected(SIZE)
            assert watch.growth < MAX_GROWTH, watch.growth

            with (
                Watch(pids) as watch_up,
                connected(up, f"POST / HTTP/1.1\r\nContent-Length: {SIZE}\r\n") as sock,
            ):
                start = time.monotonic()
                left = SIZE
                while left:
                    sock.sendall(BLOCK[: min(left, len(BLOCK))])
                    left -= min(left, len(BLOCK))
                head, rest = read_head(sock)
                while part := sock.recv(65536):
                    rest += part
                took = time.monotonic() - start
            assert head.startswith(b"HTTP/1.1 200 "), head
            assert rest == b"%d %d" % (SIZE, expected(SIZE))
            assert watch_up.growth < MAX_GROWTH, watch_up.growth
            print(f"down {SIZE / down / 1e6:.0f} MB/s, up {SIZE / took / 1e6:.0f} MB/s")
            print(f"growth {watch.growth / 1e6:.0f} MB and {watch_up.growth / 1e6:.0f} MB")


def expected(size: int) -> int:
    """Adler-32 of `size` bytes of the repeated pattern 0…255."""
    checksum, left = 1, size
    while left:
        checksum = zlib.adler32(BLOCK[: min(left, len(BLOCK))], checksum)
        left -= min(left, len(BLOCK))
    return checksum
