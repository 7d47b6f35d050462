"""The way to an edge, step by step, as `guestpass doctor` walks it: name, HTTP proxy, TCP, TLS, HTTP, WebSocket.

Each step is a check of its own, so that the first that fails names the culprit. Only standard sockets are used: what
is tested is this machine's network, not our client.
"""

from __future__ import annotations

import base64
import http.client
import os
import socket
import ssl
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from guestpass import __version__
from guestpass.cli.client import unreachable
from guestpass.errors import GuestpassError
from guestpass.hosts import is_loopback

if TYPE_CHECKING:
    from guestpass.gateway.dial import Edge, Proxy

T = TypeVar("T")

OK, WARN, FAIL = "ok", "warn", "fail"

# Each step on its own; a healthy one takes a round trip or two.
TIMEOUT = 10.0

# Signed codes and assertions live for minutes: a clock that is off by more than this breaks them.
CLOCK_FAIL = 60.0
# The Date header has whole seconds, and an answer takes its time.
CLOCK_WARN = 5.0

# Time enough to renew a certificate.
EXPIRY_WARN = 14 * 86400


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `status` is ok, warn or fail."""

    name: str
    status: str
    detail: str
    hint: str = ""

    def as_json(self) -> dict[str, str]:
        return {"name": self.name, "status": self.status, "detail": self.detail, "hint": self.hint}


def edge_path(url: str, *, ca: Path | None = None, http_proxy: str | None = None) -> Iterator[Check]:
    """Check the way to an edge as a gateway would go it; ends at the first step that makes the rest pointless."""
    from guestpass.gateway import dial

    try:
        edge = dial.edge_at(url, ca=ca, http_proxy=http_proxy)
    except GuestpassError as exc:
        yield Check("settings", FAIL, exc.message, exc.hint)
        return
    sock = yield from _connect(edge)
    if sock is None:
        return
    with sock:
        yield _upgrade(sock, edge)
    # A connection that asked for a tunnel is one, so the clock needs another.
    sock = _result(_connect(edge))
    if sock is not None:
        with sock:
            yield _clock(sock, edge)


def _connect(edge: Edge) -> Generator[Check, None, socket.socket | None]:
    """Name, TCP, HTTP proxy, TLS. Returns the connection, None when a step failed."""
    from guestpass.gateway import dial

    host, port = (edge.host, edge.port) if edge.proxy is None else (edge.proxy.host, edge.proxy.port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        yield Check("DNS", FAIL, f"{host}: {exc.strerror}", "Check the name, and this machine's DNS.")
        return None
    yield Check("DNS", OK, f"{host} is {', '.join(dict.fromkeys(str(entry[4][0]) for entry in found))}")

    began = time.monotonic()
    try:
        sock = socket.create_connection((host, port), timeout=TIMEOUT)
    except OSError as exc:
        error = unreachable(f"{host}:{port}", exc)
        yield Check("TCP", FAIL, error.message, error.hint)
        return None
    yield Check("TCP", OK, f"connected to {host}:{port} in {_ms(began)}")
    if edge.proxy is not None:
        step = _through_proxy(sock, edge.proxy, dial.authority(edge.host, edge.port))
        yield step
        if step.status == FAIL:
            sock.close()
            return None
    if edge.tls is None:
        if not is_loopback(edge.host):
            yield Check(
                "TLS", WARN, f"{edge.url} is plain HTTP", "Everybody on the way can read it: use https://."
            )
        return sock
    began = time.monotonic()
    try:
        secured = edge.tls.wrap_socket(sock, server_hostname=edge.host)
    except OSError as exc:
        sock.close()
        error = dial.translate(exc, edge)
        yield Check("TLS", FAIL, error.message, error.hint)
        return None
    yield _tls(secured, began)
    return secured


def _result(steps: Generator[Check, None, T]) -> T:
    """What a generator returns, without what it yields."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            value: T = done.value
            return value


def _ms(began: float) -> str:
    return f"{(time.monotonic() - began) * 1000:.0f} ms"


def _through_proxy(sock: socket.socket, proxy: Proxy, target: str) -> Check:
    name = proxy.authority
    head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
    if proxy.authorization:
        head += f"Proxy-Authorization: {proxy.authorization}\r\n"
    try:
        sock.sendall(head.encode() + b"\r\n")
        answer = http.client.HTTPResponse(sock, method="CONNECT")
        answer.begin()
    except (OSError, http.client.HTTPException) as exc:
        what = str(exc) or type(exc).__name__
        return Check(
            "HTTP proxy", FAIL, f"{name} did not answer like an HTTP proxy: {what}", "Check HTTPS_PROXY."
        )
    if answer.status == 407:
        hint = "Put its user and password into the proxy's URL: http://USER:PASSWORD@HOST:PORT."
        return Check("HTTP proxy", FAIL, f"{name} asks for a user and password", hint)
    if answer.status != 200:
        hint = f"Allow CONNECT to {target} there."
        return Check("HTTP proxy", FAIL, f"{name} refuses CONNECT to {target} (status {answer.status})", hint)
    return Check("HTTP proxy", OK, f"{name} connects to {target}")


def _tls(sock: ssl.SSLSocket, began: float) -> Check:
    certificate = sock.getpeercert() or {}
    left = ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()
    detail = f"{sock.version()} in {_ms(began)}, certificate valid for {left / 86400:.0f} more days"
    if left < EXPIRY_WARN:
        return Check("TLS", WARN, detail, "Renew the edge's certificate.")
    return Check("TLS", OK, detail)


def _upgrade(sock: socket.socket, edge: Edge) -> Check:
    """Ask for a tunnel, as a gateway does."""
    key = base64.b64encode(os.urandom(16)).decode()
    answer = _ask(
        sock,
        f"GET /.guestpass/tunnel HTTP/1.1\r\nHost: {edge.authority}\r\nConnection: Upgrade\r\n"
        f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
        "Sec-WebSocket-Protocol: guestpass.v1\r\n",
    )
    if isinstance(answer, Exception):
        error = unreachable(edge.url, answer)
        return Check("WebSocket upgrade", FAIL, error.message, error.hint)
    if answer.status == 101 and answer.getheader("Sec-WebSocket-Protocol") == "guestpass.v1":
        return Check("WebSocket upgrade", OK, "the edge takes tunnels here")
    by = answer.getheader("Via") or answer.getheader("Server") or ""
    return Check(
        "WebSocket upgrade",
        FAIL,
        f"the answer was status {answer.status}{f' from {by}' if by else ''}, not an upgrade",
        "Is this the edge's public URL? A proxy in front of it, or on the way, must pass WebSocket upgrades.",
    )


def _clock(sock: socket.socket, edge: Edge) -> Check:
    answer = _ask(sock, f"HEAD / HTTP/1.1\r\nHost: {edge.authority}\r\nConnection: close\r\n", method="HEAD")
    date = None if isinstance(answer, Exception) else answer.getheader("Date")
    return clock(date) if date else Check("clock", WARN, "the edge did not say what time it is")


def _ask(sock: socket.socket, head: str, *, method: str = "GET") -> http.client.HTTPResponse | Exception:
    """The head of the answer, or why there is none."""
    try:
        sock.settimeout(TIMEOUT)
        sock.sendall(f"{head}User-Agent: guestpass/{__version__}\r\n\r\n".encode())
        answer = http.client.HTTPResponse(sock, method=method)
        answer.begin()
    except (OSError, http.client.HTTPException) as exc:
        return exc
    return answer


def clock(date: str) -> Check:
    """This machine's clock against a Date header."""
    try:
        off = time.time() - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return Check("clock", WARN, "the edge's Date header is not a time")
    detail = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the edge's"
    if abs(off) > CLOCK_FAIL:
        return Check("clock", FAIL, detail, "Set this machine's clock (NTP), or the edge's.")
    if abs(off) > CLOCK_WARN:
        return Check("clock", WARN, detail, "Is NTP running here and there?")
    return Check("clock", OK, "agrees with the edge's")
