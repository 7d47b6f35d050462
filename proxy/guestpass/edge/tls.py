"""TLS towards visitors and gateways: what is spoken, and which certificate a connection gets.

The profile is Mozilla's "intermediate" (https://wiki.mozilla.org/Security/Server_Side_TLS): TLS 1.2 and 1.3, ephemeral
elliptic curves and AEAD ciphers only, no compression, no renegotiation, no tickets.

The certificate is chosen before TLS starts. The usual way, a callback of the SSLContext, is closed: aiofastnet 1.2.0
takes the process down with one. So where there are several certificates, the server looks at the ClientHello while it
is still in the kernel's buffer (MSG_PEEK takes nothing out), and starts TLS with the context for the name in it:

    accept ──▶ several certificates? ──no───────────────────────────────▶ TLS with the only context
                       │ yes
                       ▼
               wait for 5 bytes ──▶ wait for the whole ClientHello ──▶ server_name ──▶ TLS with its context

Waiting sets SO_RCVLOWAT to what is wanted, or the event loop would wake up again and again for the piece that it has
seen. What is not a ClientHello gets the default context: OpenSSL answers it with the right alert. Where there is no
certificate at all, because the first one has not been issued yet, the answer is the alert `unrecognized_name`.

A handshake costs as much as a dozen requests, before anybody has said who they are. So connections are counted for
their client from accept() on (`admit`), and where many handshakes are under way, each waits until its ClientHello is
there, and then for its turn: a few are answered in a turn of the event loop, whatever comes at once. In between, those
who are connected are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable

import aiofastnet

from guestpass.loop import TLS_HANDSHAKE_TIMEOUT, TLS_SHUTDOWN_TIMEOUT

log = logging.getLogger("guestpass.edge.tls")

# Of TLS 1.2; those of 1.3 are all good and not chosen here. Without finite-field Diffie-Hellman, which is slow and
# which no client needs that has elliptic curves.
CIPHERS = ":".join(
    ("ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384")
    + ("ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-RSA-CHACHA20-POLY1305")
)

# The first list that OpenSSL knows; the hybrid with ML-KEM needs OpenSSL 3.5.
GROUPS = (b"X25519MLKEM768:X25519:P-256:P-384", b"X25519:P-256:P-384")

# openssl/ssl.h. SSL_CTX_set1_groups_list is a macro for SSL_CTX_ctrl with it.
SSL_CTRL_SET_GROUPS_LIST = 92

# A ClientHello with a post-quantum key share has 1.8 KB; RFC 8446 §5.1 ends a record at 16 KiB. What is longer is not
# a browser's, and gets the default certificate.
MAX_HELLO = 16 * 1024

# Connections that are taken from the kernel in one turn of the event loop, a tenth of a millisecond each; the others
# wait there.
ACCEPTS = 32

# So many handshakes may be under way without anybody's looking; from then on they have turns, so many in each. One
# takes 0.3 ms of computing with an elliptic curve, 1 ms with RSA.
CALM = 16
ANSWERED_AT_ONCE = 4

# How long accept() waits after the process ran out of descriptors.
ACCEPT_RETRY = 1.0

# Level fatal, unrecognized_name (RFC 6066 §3), in a record of TLS 1.2.
UNRECOGNIZED_NAME = bytes((21, 3, 3, 0, 2, 2, 112))

HANDSHAKE = 22
CLIENT_HELLO = 1
SERVER_NAME = 0
HOST_NAME = 0
RECORD_HEADER = 5

Choose = Callable[[str | None], ssl.SSLContext | None]
Admit = Callable[[str], Callable[[], None] | None]


def server_context() -> ssl.SSLContext:
    """A context with the profile and without a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    # Every cipher is good: the client knows which one its processor is fast at.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    # The keys of tickets live as long as the process, and who learns them reads what was recorded. A full handshake
    # with an elliptic curve costs less than a ticket saves.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    _limit_groups(context)
    return context


def _limit_groups(context: ssl.SSLContext) -> None:
    """Only X25519, P-256 and P-384. Python's ssl can name a single curve before 3.15, so OpenSSL itself is asked: the
    SSL_CTX is the first member of the object, which aiofastnet relies on as well. Where Python was linked statically
    there is nobody to ask, and P-256 is left alone, which every client has."""
    libraries = aiofastnet.OPENSSL_DYN_LIBS
    if hasattr(context, "set_groups"):
        context.set_groups(GROUPS[-1].decode("ascii"))
        return
    if libraries is not None:
        openssl = ctypes.CDLL(libraries.libssl)
        openssl.SSL_CTX_ctrl.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p)
        openssl.SSL_CTX_ctrl.restype = ctypes.c_long
        pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__)
        for groups in GROUPS:
            if openssl.SSL_CTX_ctrl(pointer, SSL_CTRL_SET_GROUPS_LIST, 0, groups) == 1:
                return
            ctypes.CDLL(libraries.libcrypto).ERR_clear_error()  # or the next call of anybody would fail by it
    context.set_ecdh_curve("prime256v1")


def read_hello(data: bytes) -> tuple[int, str | None]:
    """Of the first bytes of a connection: how many the ClientHello takes, as far as is known yet, and the name that it
    asks for, in lower case. More than `len(data)`: they are not all there. 0: it is no ClientHello, or one that does
    not end. RFC 8446 §4.1.2, §5.1; RFC 6066 §3."""
    hello = b""
    at = 0
    while True:
        if len(data) - at < RECORD_HEADER:
            return at + RECORD_HEADER, None
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        if (
            data[at] != HANDSHAKE
            or data[at + 1] != 3
            or not length
            or at + RECORD_HEADER + length > MAX_HELLO
        ):
            return 0, None
        hello += data[at + RECORD_HEADER : at + RECORD_HEADER + length]
        at += RECORD_HEADER + length
        if len(hello) >= 1 and hello[0] != CLIENT_HELLO:
            return 0, None
        if at > len(data):
            return at, None
        if len(hello) >= 4 and len(hello) - 4 >= int.from_bytes(hello[1:4], "big"):
            return at, _server_name(hello[4 : 4 + int.from_bytes(hello[1:4], "big")])


def _server_name(hello: bytes) -> str | None:
    """The host name in the body of a ClientHello; None when there is none, or it is malformed."""
    reader = _Reader(hello)
    try:
        reader.take(2 + 32)  # version, random
        for size in (1, 2, 1):  # session id, ciphers, compression
            reader.vector(size)
        extensions = _Reader(reader.vector(2))
        while extensions:
            kind, body = extensions.number(2), extensions.vector(2)
            if kind != SERVER_NAME:
                continue
            names = _Reader(_Reader(body).vector(2))
            while names:
                name_type, name = names.number(1), names.vector(2)
                if name_type == HOST_NAME:
                    return name.decode("ascii").lower().removesuffix(".")
    except ValueError:  # UnicodeDecodeError as well
        pass
    return None


class _Reader:
    """Numbers and vectors of TLS's presentation language. Raises ValueError past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        if len(found) < size:
            raise ValueError("past the end")
        self._at += size
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))


async def client_name(sock: socket.socket) -> str | None:
    """The name that the ClientHello on this connection asks for; all of it stays to be read. Raises ConnectionError
    when the peer goes first."""
    wanted, name = RECORD_HEADER, None
    try:
        while True:
            try:
                data = sock.recv(MAX_HELLO, socket.MSG_PEEK)
            except BlockingIOError:
                data = b""
            if len(data) >= wanted:
                wanted, name = read_hello(data)
                if wanted <= len(data):
                    return name
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            await _readable(sock)
            if len(sock.recv(MAX_HELLO, socket.MSG_PEEK)) < wanted:  # awake, and still not there: the end
                raise ConnectionResetError("closed before its ClientHello was whole")
    finally:
        with contextlib.suppress(OSError):  # closed meanwhile
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    descriptor = sock.fileno()

    def wake() -> None:
        if not ready.done():  # the loop calls again until the reader is gone
            ready.set_result(None)

    loop.add_reader(descriptor, wake)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


def anybody(address: str) -> Callable[[], None]:
    """Admits as many as there are."""
    return lambda: None


class TlsServer:
    """Accepts on a listening socket and starts TLS with the context that `choose` gives for the client's name; the
    name is looked for only while `by_name()`. `admit` is asked for each address that connects: None refuses it, what
    it returns else is called when the handshake is over."""

    def __init__(
        self,
        sock: socket.socket,
        factory: Callable[[], asyncio.BaseProtocol],
        choose: Choose,
        by_name: Callable[[], bool],
        admit: Admit = anybody,
    ) -> None:
        self._sock = sock
        self._factory = factory
        self._choose = choose
        self._by_name = by_name
        self._loop = asyncio.get_running_loop()
        self._admit = admit
        self._starting: set[asyncio.Task[None]] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._accept_soon()

    def close(self) -> None:
        """Stop accepting. Handshakes that have begun go on, within their deadline."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _accept_soon(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            try:
                connection, address = self._sock.accept()
            except ConnectionAbortedError:
                continue
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                # The kernel would report the socket as ready again at once.
                log.error("cannot accept connections: %s", exc.strerror)
                self._loop.remove_reader(self._sock.fileno())
                self._loop.call_later(ACCEPT_RETRY, self._accept_soon)
                return
            over = self._admit(address[0])
            if over is None:
                connection.close()
                continue
            connection.setblocking(False)
            task = self._loop.create_task(self._start(connection, over))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _turn(self) -> None:
        waiter = self._loop.create_future()
        self._waiting.append(waiter)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._next)
        await waiter

    def _next(self) -> None:
        for _ in range(min(ANSWERED_AT_ONCE, len(self._waiting))):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._waiting:
            self._loop.call_soon(self._next)

    async def _start(self, connection: socket.socket, over: Callable[[], None]) -> None:
        taken = False
        name = None
        try:
            crowded = len(self._starting) > CALM
            if crowded or self._by_name():
                async with asyncio.timeout(TLS_HANDSHAKE_TIMEOUT):
                    name = await client_name(connection)
                    if crowded:
                        await self._turn()
            context = self._choose(name)
            if context is None:
                connection.send(UNRECOGNIZED_NAME)
                connection.shutdown(socket.SHUT_WR)
                return
            taken = True  # closed by its transport from here on
            await aiofastnet.connect_accepted_socket(
                self._loop,
                self._factory,
                connection,
                ssl=context,
                ssl_handshake_timeout=TLS_HANDSHAKE_TIMEOUT,
                ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT,
            )
        except (
            OSError
        ) as exc:  # TimeoutError and SSLError as well: the peer's affair, as every port scan shows
            log.debug("a TLS handshake failed: %r", exc)
        finally:
            if not taken:
                connection.close()
            over()
