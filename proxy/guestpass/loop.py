"""The one place that chooses the event loop and who drives a socket.

Plain sockets are the event loop's own (uvloop's where it exists, so that a gateway can also run on Windows); sockets
with TLS are aiofastnet's, which is 1.2 (small exchanges) to 2.5 times (bulk) as fast as uvloop's TLS but slower than
uvloop on plain ones. Everything that listens or connects goes through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import socket
import ssl as ssl_module
import struct
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import aiofastnet

log = logging.getLogger("guestpass.loop")

T = TypeVar("T")
ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)

# Connections that wait in the kernel for accept(); the kernel lowers it to net.core.somaxconn.
BACKLOG = 1024

# A peer that needs longer for its TLS handshake is not one that we can serve; asyncio's default is a minute.
TLS_HANDSHAKE_TIMEOUT = 15.0

# How long close() waits for the peer's close_notify. Nothing depends on it: streams end by their own frames.
TLS_SHUTDOWN_TIMEOUT = 2.0

# Where Linux has tcpi_bytes_acked in struct tcp_info (linux/tcp.h), 64 bits in the machine's order.
_BYTES_ACKED = slice(120, 128)

# linux/sockios.h: bytes that the kernel has not sent yet. Python has no name for it.
_SIOCOUTQNSD = 0x894B

_LINGER_ZERO = struct.pack("ii", 1, 0)

if sys.platform != "win32":
    import fcntl
    import termios


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on the loop that this machine runs best."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's loop, or asyncio's own where uvloop is not available."""
    loop: asyncio.AbstractEventLoop
    try:
        loop = importlib.import_module("uvloop").new_event_loop()
    except ImportError:
        loop = asyncio.new_event_loop()
    loop.set_exception_handler(_unhandled)
    return loop


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What no caller hears of. A TLS handshake that fails is the peer's affair: every port scan makes some, and a
    traceback for each would fill the log. Whoever connects gets the exception besides."""
    exc = context.get("exception")
    if context.get("message") == "SSL handshake failed":
        log.debug("a TLS handshake failed: %r", exc)
        return
    if isinstance(
        exc, type
    ):  # aiofastnet passes a class where there is no instance; logging cannot format one
        context = {**context, "exception": exc()}
    loop.default_exception_handler(context)


async def create_server(
    factory: Callable[[], asyncio.BaseProtocol],
    *,
    host: str | None = None,
    port: int | None = None,
    sock: socket.socket | None = None,
    ssl: ssl_module.SSLContext | None = None,
    backlog: int = BACKLOG,
) -> asyncio.Server:
    """Listen on `host` and `port`, or on a bound socket. Raises OSError."""
    loop = asyncio.get_running_loop()
    where: dict[str, Any] = {"sock": sock} if sock is not None else {"host": host, "port": port}
    if ssl is None:
        return await loop.create_server(factory, backlog=backlog, **where)
    return await aiofastnet.create_server(
        loop,
        factory,
        backlog=backlog,
        ssl=ssl,
        ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT,
        ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT,
        **where,
    )


async def create_connection(
    factory: Callable[[], ProtocolT],
    host: str | None = None,
    port: int | None = None,
    *,
    ssl: ssl_module.SSLContext | None = None,
    server_hostname: str | None = None,
    sock: socket.socket | None = None,
) -> tuple[asyncio.Transport, ProtocolT]:
    """Connect to `host` and `port`, or take over a connected socket. Raises OSError, ssl.SSLError."""
    loop = asyncio.get_running_loop()
    where: dict[str, Any] = {"sock": sock} if sock is not None else {"host": host, "port": port}
    if ssl is None:
        return await loop.create_connection(factory, **where)
    return await aiofastnet.create_connection(
        loop,
        factory,
        ssl=ssl,
        server_hostname=server_hostname,
        ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT,
        ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT,
        **where,
    )


def takes_all(transport: asyncio.BaseTransport) -> bool:
    """Whether `write` has taken all of its argument when it returns, so that the buffer may be used again. TLS has:
    aiofastnet encrypts what it can and copies the rest. Others keep a buffer until the kernel has taken it."""
    return isinstance(transport, aiofastnet.Transport)


def abort_now(transport: asyncio.WriteTransport) -> None:
    """Close the connection so that nothing more reaches the peer, not even what the kernel has queued already.

    `abort()` alone drops only what the process has queued: the kernel goes on to deliver its own buffer, which is
    megabytes. With a linger time of zero, closing the socket discards that as well and sends a reset.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):  # closed already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    transport.abort()


def resume_reading(transport: asyncio.ReadTransport) -> None:
    """`transport.resume_reading()`, and what was left behind by the pause.

    aiofastnet 1.2.0 keeps what it had read from the socket when a protocol paused in the middle of it, and looks at it
    again only when the socket has more: the end of an upload over TLS would wait for ever."""
    transport.resume_reading()
    again = getattr(transport, "_retry_ssl_read", None)
    if again is not None:
        asyncio.get_running_loop().call_soon(again)


def unsent(transport: asyncio.WriteTransport) -> int:
    """How many bytes that were written have not reached the peer's kernel: in the process, and in our kernel (Linux,
    tcp(7): SIOCOUTQ). 0 when the connection is gone."""
    waiting = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sock is None or sys.platform == "win32":
        return waiting
    try:
        return waiting + int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (OSError, ValueError):  # closed already
        return 0


def waiting(transport: asyncio.WriteTransport) -> int:
    """How many bytes that were written have not set out for the peer: in the process, and in our kernel, because the
    peer or the network takes no more now. What was sent and is not acknowledged yet is not among them."""
    held = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sock is None or sys.platform != "linux":
        return held
    try:
        return held + int.from_bytes(fcntl.ioctl(sock.fileno(), _SIOCOUTQNSD, bytes(4)), sys.byteorder)
    except (OSError, ValueError):  # closed already, or not TCP
        return held


def acknowledged(transport: asyncio.WriteTransport) -> int:
    """A number that rises when the peer takes something of what it was sent, and only then."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError):  # closed already
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)
            if len(info) >= _BYTES_ACKED.stop:
                return int.from_bytes(info[_BYTES_ACKED], sys.byteorder)
    return -unsent(transport)
