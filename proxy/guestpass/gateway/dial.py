"""Connections from the gateway to an edge: directly or through an HTTP proxy, over TLS.

    resolve ─▶ TCP to the edge, or to the proxy ─▶ (CONNECT) ─▶ TLS with the edge ─▶ protocol

Every fault comes out as `EdgeUnreachable`, whose message names what failed and whose hint says what to look at. A wrong
clock is told apart from a wrong certificate, because both look the same to somebody who reads OpenSSL's words.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import socket
import ssl
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import aiohappyeyeballs
import h11
from aiohappyeyeballs import AddrInfoType

from guestpass import loop as loops
from guestpass.errors import ConfigError, EdgeUnreachable
from guestpass.hosts import is_address, is_loopback
from guestpass.mux.handshake import SOFTWARE

ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)

# From the first packet to the TLS handshake's end. A gateway tries again soon, so there is nothing to win by waiting.
CONNECT_TIMEOUT = 15.0

# Until TCP is connected. SYNs leave at 0, 1, 3 and 7 s: when the way is blocked and opens again, a new try is sooner
# there than the fourth SYN of an old one.
TCP_TIMEOUT = 4.0

# RFC 8305 section 5: head start of one address before the next one is tried beside it.
HAPPY_EYEBALLS_DELAY = 0.25

# A proxy's answer to CONNECT.
MAX_PROXY_HEAD = 16 * 1024

TIMEOUT_HINT = "Is its address right, and does a firewall let this machine out to that port?"
CLOCK_HINT = "Check this machine's clock; if it is right, the edge's certificate needs renewing."

# X509_V_ERR_* of OpenSSL's x509_vfy.h.
NOT_YET_VALID = 9
EXPIRED = 10
UNTRUSTED = frozenset((2, 18, 19, 20, 21, 27))  # no issuer, self-signed, no chain, untrusted
WRONG_NAME = frozenset((62, 64))  # host name, IP address


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. `authorization` is the value of Proxy-Authorization, or empty."""

    host: str
    port: int
    authorization: str = ""

    def __repr__(self) -> str:
        return f"Proxy({self.host!r}, {self.port})"  # without the password

    @property
    def authority(self) -> str:
        return authority(self.host, self.port)


@dataclass(frozen=True, slots=True)
class Edge:
    """Where an edge is, and how to get there."""

    url: str
    host: str
    port: int
    tls: ssl.SSLContext | None
    proxy: Proxy | None

    @property
    def authority(self) -> str:
        """For the Host field: without the port where it is the scheme's own."""
        default = 443 if self.tls is not None else 80
        return authority(self.host, self.port if self.port != default else None)


def authority(host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def edge_at(url: str, *, ca: Path | None = None, http_proxy: str | None = None) -> Edge:
    """Settings for `url`; the certificate authorities are read here. Raises ConfigError.

    `ca`: trust only these. `http_proxy` goes before HTTPS_PROXY, HTTP_PROXY and NO_PROXY of the environment, which do
    not count for loopback addresses: a proxy's localhost is another machine's.
    """
    parts = urlsplit(url)
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{url} is not the URL of an edge", hint="Write it like https://share.example.com.")
    tls = None
    if parts.scheme == "https":
        tls = _client_context(ca)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return Edge(url, host, port, tls, _choose_proxy(parts.scheme, host, port, http_proxy))


def _client_context(ca: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca is not None else None)
    except FileNotFoundError as exc:
        raise ConfigError(f"the CA file {ca} does not exist", hint="Check `ca` in gateway.toml.") from exc
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError(
            f"the CA file {ca} cannot be read: {exc.strerror or exc}",
            hint="It must hold certificates in PEM.",
        ) from exc
    context.set_alpn_protocols(["http/1.1"])
    return context


def _choose_proxy(scheme: str, host: str, port: int, configured: str | None) -> Proxy | None:
    if configured:
        return parse_proxy(configured, "http_proxy")
    if is_loopback(host):
        return None
    proxies = urllib.request.getproxies_environment()
    url = proxies.get(scheme) or proxies.get("all")
    bypassed = urllib.request.proxy_bypass_environment(authority(host, port), proxies)  # type: ignore[attr-defined]
    if not url or bypassed:
        return None
    return parse_proxy(url, f"{scheme.upper()}_PROXY")


def parse_proxy(url: str, key: str) -> Proxy:
    """`http://[user:password@]host[:port]`. Raises ConfigError, without the password."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or 3128 if parts.scheme == "http" else 0
    except ValueError as exc:
        raise ConfigError(f"{key}: the port of the HTTP proxy is not a number from 1 to 65535") from exc
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(
            f"{key}: the HTTP proxy is not of the form http://[USER:PASSWORD@]HOST:PORT",
            hint="TLS to the edge goes through it end to end; the way to the proxy itself is plain HTTP.",
        )
    authorization = ""
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(secret.encode()).decode("ascii")
    return Proxy(parts.hostname, port, authorization)


async def connect(edge: Edge, factory: Callable[[], ProtocolT]) -> tuple[asyncio.Transport, ProtocolT]:
    """A connection to the edge with the product of `factory` as its protocol. Raises EdgeUnreachable."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            sock = await _open_socket(edge)
            try:
                return await loops.create_connection(
                    factory,
                    sock=sock,
                    ssl=edge.tls,
                    server_hostname=edge.host if edge.tls is not None else None,
                )
            except BaseException:
                sock.close()
                raise
    except TimeoutError as exc:
        raise EdgeUnreachable(
            f"{edge.url}: no connection within {CONNECT_TIMEOUT:g} s", hint=TIMEOUT_HINT
        ) from exc
    except OSError as exc:
        raise translate(exc, edge) from exc


async def _open_socket(edge: Edge) -> socket.socket:
    proxy = edge.proxy
    if proxy is None:
        try:
            return await connect_tcp(edge.host, edge.port, seconds=TCP_TIMEOUT)
        except TimeoutError as exc:
            raise EdgeUnreachable(
                f"{edge.url}: no connection within {TCP_TIMEOUT:g} s", hint=TIMEOUT_HINT
            ) from exc
    try:
        sock = await connect_tcp(proxy.host, proxy.port, seconds=TCP_TIMEOUT)
    except OSError as exc:  # TimeoutError is one
        raise EdgeUnreachable(
            f"{edge.url}: the HTTP proxy {proxy.authority} cannot be reached: {describe(exc)}",
            hint="Check http_proxy in gateway.toml, or HTTPS_PROXY and NO_PROXY.",
        ) from exc
    try:
        await _tunnel_through(sock, proxy, edge)
    except BaseException:
        sock.close()
        raise
    return sock


async def connect_tcp(host: str, port: int, *, seconds: float | None = None) -> socket.socket:
    """Resolves the name, anew each time, and tries IPv6 and IPv4 as RFC 8305 says, for `seconds` once the name is
    resolved. Raises OSError (TimeoutError is one)."""
    loop = asyncio.get_running_loop()
    infos: Sequence[AddrInfoType]
    if host == "localhost" or host.endswith(".localhost"):
        # RFC 6761 section 6.3: always loopback; resolvers do not know the names below.
        infos = [_info("::1", port), _info("127.0.0.1", port)]
    elif is_address(host) and "%" not in host:  # the scope of a link-local address is the resolver's business
        infos = [_info(host, port)]  # no need to trouble the resolver's threads
    else:
        try:
            infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as exc:  # an empty label, or one of more than 63 letters
            raise socket.gaierror(socket.EAI_NONAME, "it is not a host name") from exc
    async with asyncio.timeout(seconds):
        return await aiohappyeyeballs.start_connection(
            infos,
            happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY,
            interleave=1,
            loop=loop,
        )


def _info(address: str, port: int) -> AddrInfoType:
    """As getaddrinfo gives it."""
    if ":" in address:
        return (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0))
    return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))


async def _tunnel_through(sock: socket.socket, proxy: Proxy, edge: Edge) -> None:
    """CONNECT (RFC 9110 section 9.3.6). Raises EdgeUnreachable, OSError."""
    loop = asyncio.get_running_loop()
    target = authority(edge.host, edge.port)
    headers = [("Host", target), ("User-Agent", SOFTWARE)]
    if proxy.authorization:
        headers.append(("Proxy-Authorization", proxy.authorization))
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_PROXY_HEAD)
    request = parser.send(h11.Request(method="CONNECT", target=target, headers=headers))
    assert request is not None
    sock.setblocking(False)
    await loop.sock_sendall(sock, request)
    try:
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Response):
                break
            if event is h11.NEED_DATA:
                parser.receive_data(await loop.sock_recv(sock, MAX_PROXY_HEAD))
            elif not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("the connection was closed without an answer")
    except h11.RemoteProtocolError as exc:
        raise EdgeUnreachable(
            f"{edge.url}: {proxy.authority} does not answer like an HTTP proxy: {exc}",
            hint="Check http_proxy in gateway.toml, or HTTPS_PROXY.",
        ) from exc
    status = event.status_code
    if 200 <= status < 300:
        if parser.trailing_data[0]:
            raise EdgeUnreachable(f"{edge.url}: {proxy.authority} sent bytes that the edge cannot have sent")
        return
    hints = {
        407: "Write its user and password into http_proxy: http://USER:PASSWORD@HOST:PORT.",
        403: f"The proxy must allow CONNECT to {target}.",
    }
    raise EdgeUnreachable(
        f"{edge.url}: the HTTP proxy {proxy.authority} refused: {status} {event.reason.decode('latin-1')}".rstrip(),
        hint=hints.get(status, f"Ask whoever runs the proxy why it refuses CONNECT to {target}."),
        code="proxy_refused",
    )


def translate(exc: OSError, edge: Edge) -> EdgeUnreachable:
    """What `exc` means to somebody who wants to reach `edge`."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return _bad_certificate(exc, edge)
    if isinstance(exc, ssl.SSLError):
        return EdgeUnreachable(
            f"{edge.url}: the TLS handshake failed: {exc.reason or exc}",
            hint="Is this an https:// port? Something between here and the edge may end TLS.",
            code="tls_failed",
        )
    if isinstance(exc, socket.gaierror):
        return EdgeUnreachable(
            f"{edge.url}: the name {edge.host} cannot be resolved: {exc.strerror}",
            hint="Check the URL's spelling and this machine's DNS.",
            code="edge_unknown_host",
        )
    hint = "Is the edge running, and is the port right?"
    if exc.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        hint = "This machine has no way to that address: check its network."
    return EdgeUnreachable(f"{edge.url}: cannot connect: {describe(exc)}", hint=hint)


def _bad_certificate(exc: ssl.SSLCertVerificationError, edge: Edge) -> EdgeUnreachable:
    number = exc.verify_code
    if number == NOT_YET_VALID:
        return EdgeUnreachable(
            f"{edge.url}: the edge's certificate is not yet valid", hint=CLOCK_HINT, code="clock_wrong"
        )
    if number == EXPIRED:
        return EdgeUnreachable(
            f"{edge.url}: the edge's certificate has expired", hint=CLOCK_HINT, code="clock_wrong"
        )
    if number in WRONG_NAME:
        return EdgeUnreachable(
            f"{edge.url}: the certificate is not for {edge.host}",
            hint="Use the name that stands in the edge's certificate.",
            code="certificate_wrong_name",
        )
    if number in UNTRUSTED:
        return EdgeUnreachable(
            f"{edge.url}: the certificate is not from a CA that is trusted here ({exc.verify_message})",
            hint="If the edge has a CA of its own, name its file: `ca` in gateway.toml, or --ca. Else something "
            "between here and the edge ends TLS.",
            code="certificate_untrusted",
        )
    return EdgeUnreachable(
        f"{edge.url}: the certificate was refused: {exc.verify_message}",
        hint="Check the edge's certificate.",
        code="certificate_refused",
    )


def describe(exc: OSError) -> str:
    """A few words on why no connection could be made, without the addresses that some libraries put in."""
    if isinstance(exc, TimeoutError):
        return "no answer"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate was refused: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError):
        return f"the TLS handshake failed: {exc.reason or exc}"
    if isinstance(exc, socket.gaierror):
        return f"its name cannot be resolved: {exc.strerror}"
    if exc.errno is not None and exc.errno > 0:
        return os.strerror(exc.errno)
    return exc.strerror or str(exc) or type(exc).__name__
