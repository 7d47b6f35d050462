"""The loop that runs everything, and the abort after which nothing more is delivered."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from guestpass import loop as loops
from guestpass.local_ca import write_certificates


def test_run_returns_and_raises() -> None:
    async def good() -> str:
        return type(asyncio.get_running_loop()).__module__

    async def bad() -> None:
        raise LookupError("x")

    assert loops.run(good()).startswith("uvloop")
    with pytest.raises(LookupError):
        loops.run(bad())


def test_without_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows there is none."""

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    loop = loops.new_event_loop()
    assert type(loop).__module__.startswith("asyncio.")
    loop.close()


class Sender(asyncio.Protocol):
    """Writes as much as it can, and more, to a peer that does not read."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        for _ in range(64):
            self.transport.write(b"x" * (1 << 20))


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("cut", ["now", "plain abort"])
def test_abort_now_delivers_nothing_more(tmp_path: Path, tls: bool, cut: str) -> None:
    """The peer reads only after the abort: what the kernel had queued must be gone, too."""
    client_context = server_context = None
    if tls:
        ca, cert, key = write_certificates(tmp_path, ("localhost",))
        server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server_context.load_cert_chain(cert, key)
        client_context = ssl.create_default_context(cafile=ca)

    async def main() -> tuple[int, bool]:
        senders: list[Sender] = []

        def factory() -> Sender:
            senders.append(Sender())
            return senders[-1]

        server = await loops.create_server(factory, host="127.0.0.1", port=0, ssl=server_context)
        port = server.sockets[0].getsockname()[1]
        peer = await asyncio.to_thread(connect, port, client_context)
        while not senders or senders[0].transport is None:
            await asyncio.sleep(0.01)
        transport = senders[0].transport
        await stable(lambda: transport.get_write_buffer_size() + queued_at_peer(peer))
        in_kernel = queued_at_peer(peer)
        loops.abort_now(transport) if cut == "now" else transport.abort()
        await asyncio.sleep(0.05)  # the event loop closes the socket in its next turn
        result = await asyncio.to_thread(read_to_the_end, peer)
        server.close()
        return result[0] - in_kernel, result[1]

    surplus, reset = loops.run(main())
    if cut == "now":
        assert reset
        assert surplus <= 0, "only what had reached the peer before"
    else:
        assert surplus > 0, "the reason why abort_now is there"


def connect(port: int, context: ssl.SSLContext | None) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    sock.connect(("127.0.0.1", port))
    sock.settimeout(10)
    if context is not None:
        # The handshake is by OpenSSL, what follows is looked at as TCP carries it.
        sock = socket.socket(fileno=context.wrap_socket(sock, server_hostname="localhost").detach())
        sock.settimeout(10)
    return sock


async def stable(look: Callable[[], int]) -> None:
    before, since = -1, time.monotonic()
    while look() != before or time.monotonic() - since < 0.2:
        if look() != before:
            before, since = look(), time.monotonic()
        await asyncio.sleep(0.02)


def queued_at_peer(sock: socket.socket) -> int:
    import array
    import fcntl
    import termios

    found = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.FIONREAD, found)
    return found[0]


def read_to_the_end(sock: socket.socket) -> tuple[int, bool]:
    """(bytes, whether the connection was reset)."""
    size = 0
    with sock:
        while True:
            try:
                data = sock.recv(1 << 20)
            except ConnectionResetError:
                return size, True
            if not data:
                return size, False
            size += len(data)
