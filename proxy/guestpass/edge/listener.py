"""Accepted sockets of the edge.

`Front` owns every accepted connection until its first request line has come. A tunnel handshake goes to the tunnel
acceptor for good; anything else to aiohttp for good (a gateway's connection is never also a visitor's). Plain sockets
are the event loop's own, TLS sockets aiofastnet's: see `guestpass.loop`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

from guestpass import loop
from guestpass.errors import ConfigError, PortTaken

log = logging.getLogger("guestpass.edge.listener")

TUNNEL_REQUEST = b"GET /.guestpass/tunnel "

# Longest wait for a first request. A browser's spare connections are closed then; it opens new ones as it needs them.
FIRST_REQUEST_TIMEOUT = 30.0

# A tunnel handshake has a dozen short fields.
MAX_TUNNEL_HEAD = 8 * 1024

# Connections that wait in the kernel for accept().
BACKLOG = 1024

Accept = Callable[[asyncio.Transport, bytes, bytes], None]


class Front(asyncio.Protocol):
    """First protocol of an accepted connection."""

    def __init__(self, visitor: Callable[[], asyncio.BaseProtocol], tunnel: Accept) -> None:
        self._visitor = visitor
        self._tunnel = tunnel
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(FIRST_REQUEST_TIMEOUT, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._transport = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._received += data
        beginning = self._received[: len(TUNNEL_REQUEST)]
        if not TUNNEL_REQUEST.startswith(beginning):
            self._to_visitor()
        elif (end := self._received.find(b"\r\n\r\n")) >= 0:
            self._stop_timer()
            self._tunnel(self._transport, self._received[: end + 4], self._received[end + 4 :])
        elif len(self._received) > MAX_TUNNEL_HEAD:
            self._transport.abort()

    def _to_visitor(self) -> None:
        transport = self._transport
        assert transport is not None
        self._stop_timer()
        protocol = cast(asyncio.Protocol, self._visitor())
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        protocol.data_received(self._received)


class Listener:
    """One `listen` URL of edge.toml."""

    def __init__(self, url: str, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        self.scheme = parts.scheme
        self._host = parts.hostname or ""
        default_port = 443 if parts.scheme == "https" else 80
        self._port = parts.port if parts.port is not None else default_port
        self._tls = tls if parts.scheme == "https" else None
        self._server: asyncio.AbstractServer | None = None
        self.url = url

    async def start(self, visitor: Callable[[], asyncio.BaseProtocol], tunnel: Accept) -> None:
        """Bind and accept. Raises PortTaken, ConfigError."""
        sock = bind(self._host, self._port)
        self._port = sock.getsockname()[1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{self.scheme}://{host}:{self._port}"
        self._server = await loop.create_server(
            lambda: Front(visitor, tunnel), sock=sock, ssl=self._tls, backlog=BACKLOG
        )

    def close(self) -> None:
        """Stop accepting; open connections stay."""
        if self._server is not None:
            self._server.close()
            self._server = None


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortTaken, ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as exc:
        raise ConfigError(
            f"cannot listen on {host}: {exc.strerror}", hint="Use an address of this machine."
        ) from exc
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if exc.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"{where} is in use by another process", hint="Stop that process or choose another port."
            ) from exc
        if exc.errno == errno.EACCES:
            raise ConfigError(
                f"not allowed to listen on {where}", hint="Ports below 1024 need CAP_NET_BIND_SERVICE."
            ) from exc
        raise ConfigError(f"cannot listen on {where}: {exc.strerror}") from exc
    return sock
