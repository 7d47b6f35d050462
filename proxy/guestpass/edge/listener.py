"""Listening sockets of the edge. What is accepted belongs to `guestpass.edge.front`.

Plain sockets are the event loop's own, TLS sockets aiofastnet's: see `guestpass.loop` and `guestpass.edge.tls`.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from guestpass import loop
from guestpass.edge.certificates import Certificates
from guestpass.edge.tls import TlsServer
from guestpass.errors import ConfigError, PortTaken

# Connections that wait in the kernel for accept().
BACKLOG = 1024


class Listener:
    """One `listen` URL of edge.toml. `sock`: one that was bound already, by the supervisor of several workers."""

    def __init__(
        self, url: str, certificates: Certificates | None = None, sock: socket.socket | None = None
    ) -> None:
        parts = urlsplit(url)
        self.scheme = parts.scheme
        self._host = parts.hostname or ""
        default_port = 443 if parts.scheme == "https" else 80
        self._port = parts.port if parts.port is not None else default_port
        self._certificates = certificates if parts.scheme == "https" else None
        self._server: asyncio.AbstractServer | TlsServer | None = None
        self._sock = sock
        self.url = url

    def bind(self) -> socket.socket:
        """Bind, without accepting yet. Raises PortTaken, ConfigError."""
        if self._sock is None:
            self._sock = bind(self._host, self._port)
        self._port = self._sock.getsockname()[1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{self.scheme}://{host}:{self._port}"
        return self._sock

    async def start(self, front: Callable[[], asyncio.BaseProtocol]) -> None:
        """Bind and accept. Raises PortTaken, ConfigError."""
        sock = self.bind()
        certificates = self._certificates
        if certificates is None:
            self._server = await loop.create_server(front, sock=sock, backlog=BACKLOG)
        else:
            self._server = TlsServer(sock, front, certificates.choose, lambda: certificates.several)

    def close(self) -> None:
        """Stop accepting; open connections stay."""
        if self._server is not None:
            self._server.close()
            self._server = None
        elif self._sock is not None:
            self._sock.close()
        self._sock = None


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
