"""Which certificate a connection gets, and how new ones take their place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from support.programs import free_port
from support.stack import RawServer, Stack, read_head, running
from support.turns import Turns

from guestpass.config import EdgeConfig, parse
from guestpass.edge import tls
from guestpass.edge.app import Edge
from guestpass.edge.certificates import Certificates, Source
from guestpass.errors import ConfigError
from guestpass.local_ca import LocalCA

FILE = Path("edge.toml")


def hello(name: str | None, *, alpn: int = 0) -> bytes:
    """A ClientHello as OpenSSL makes it; `alpn` protocols of 250 bytes make it long."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols([f"{n:0250}" for n in range(alpn)])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def issue(folder: Path, name: str, *hosts: str, ca: LocalCA | None = None) -> tuple[Path, Path]:
    """The files of a certificate for `hosts`."""
    cert, key = (ca or LocalCA()).issue(hosts)
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    for path, data in zip(paths, (cert, key), strict=True):
        path.write_bytes(data)
    return paths


# ── the ClientHello ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["a.example.org", "A.Example.ORG", None])
def test_the_name_is_read(name: str | None) -> None:
    data = hello(name)
    assert tls.read_hello(data + b"more") == (len(data), name and name.lower())


@pytest.mark.parametrize("alpn", [0, 20])
def test_a_hello_in_pieces(alpn: int) -> None:
    """Whatever has come: what is asked for next is at most what is missing, and never nothing."""
    data = hello("a.example.org", alpn=alpn)
    for size in range(len(data)):
        wanted, name = tls.read_hello(data[:size])
        assert size < wanted <= len(data)
        assert name is None


def test_a_hello_over_several_records() -> None:
    data = hello("a.example.org")
    body, records = data[5:], b""
    for at in range(0, len(body), 100):
        records += data[:3] + len(body[at : at + 100]).to_bytes(2, "big") + body[at : at + 100]
    assert tls.read_hello(records) == (len(records), "a.example.org")
    for size in range(len(records)):
        assert tls.read_hello(records[:size])[0] > size


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x80\x2e\x01\x00\x02",  # SSL 2
        b"\x16\x03\x01\x00\x00",  # a record of nothing
        b"\x16\x03\x01\xff\xff",  # longer than a record may be
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",  # a ServerHello
        b"\x15\x03\x03\x00\x02\x02\x28",  # an alert
    ],
)
def test_what_is_no_hello_is_left_to_openssl(data: bytes) -> None:
    assert tls.read_hello(data) == (0, None)


@given(st.integers(0, 400), st.integers(0, 255), st.integers(0, 400))
def test_a_broken_hello_names_at_most_something_else(at: int, value: int, cut: int) -> None:
    data = bytearray(HELLO)
    data[at % len(data)] = value
    del data[len(data) - cut % len(data) :]
    wanted, _ = tls.read_hello(bytes(data))  # and raises nothing
    assert wanted <= tls.MAX_HELLO + 5


HELLO = hello("a.example.org")


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """An accepted connection and its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    ours.setblocking(False)
    return ours, theirs


async def test_looking_takes_nothing_away() -> None:
    data = hello("a.example.org", alpn=20)
    ours, theirs = tcp_pair()
    with ours, theirs:
        looking = asyncio.ensure_future(tls.client_name(ours))
        for at in range(0, len(data), 1000):
            await asyncio.sleep(0.01)
            assert not looking.done()
            theirs.send(data[at : at + 1000])
        assert await asyncio.wait_for(looking, 10) == "a.example.org"
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
        assert ours.recv(65536) == data


async def test_who_goes_in_the_middle_of_a_hello() -> None:
    for size in (0, 3, 200):
        ours, theirs = tcp_pair()
        with ours, theirs:
            theirs.send(HELLO[:size])
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(tls.client_name(ours), 10)


# ── which certificate ────────────────────────────────────────────────────────────────────────────────────────────


def loaded(folder: Path, *wanted: tuple[str, tuple[str, ...], tuple[str, ...]]) -> Certificates:
    """Of (file name, names in the certificate, hosts of the section)."""
    found = Certificates()
    found.load(
        FILE,
        [Source(*issue(folder, name, *names), "edge.certificate", hosts) for name, names, hosts in wanted],
    )
    return found


def test_the_choice(tmp_path: Path) -> None:
    certificates = loaded(
        tmp_path,
        ("first", ("share.example.com", "*.share.example.com"), ()),
        ("second", ("other.example.com", "*.share.example.com"), ()),
        ("third", ("a.share.example.com",), ("a.share.example.com",)),
        ("fourth", ("*.fourth.example.com",), ("b.fourth.example.com",)),
    )
    by_context = {id(c.context): c.name for c in certificates}
    for name, expected in {
        "share.example.com": "share.example.com",
        "x.share.example.com": "share.example.com",
        "other.example.com": "other.example.com",
        "a.share.example.com": "a.share.example.com",
        "b.fourth.example.com": "b.fourth.example.com",
        "c.fourth.example.com": "share.example.com",  # the section names one host only
        "x.y.share.example.com": "share.example.com",
        "stranger.example": "share.example.com",
        None: "share.example.com",
    }.items():
        assert by_context[id(certificates.choose(name))] == expected, name
    assert Certificates().choose("share.example.com") is None


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ([("a", ("a.example.com",), ("b.example.com",))], "is not for b.example.com"),
        (
            [("a", ("a.example.com",), ("a.example.com",)), ("b", ("a.example.com",), ("a.example.com",))],
            "a.example.com has two certificates",
        ),
    ],
)
def test_sections_that_contradict(tmp_path: Path, sections: list[Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        loaded(tmp_path, *sections)


def test_a_key_with_a_pass_phrase_is_refused_without_asking(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    cert, key = issue(tmp_path, "a", "a.example.com")
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="do not load"):
        Certificates().load(FILE, [Source(cert, key, "edge.tls")])


def test_the_profile() -> None:
    context = tls.server_context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.num_tickets == 0
    assert context.options & ssl.OP_NO_TICKET
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert not context.options & ssl.OP_CIPHER_SERVER_PREFERENCE
    assert {c["name"] for c in context.get_ciphers() if c["protocol"] == "TLSv1.2"} == set(
        tls.CIPHERS.split(":")
    )


# ── an edge ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    ca = LocalCA()
    sections = []
    for name, hosts in {"one": ("one.localhost", "*.one.localhost"), "two": ("two.localhost",)}.items():
        cert, key = issue(tmp_path, name, *hosts, ca=ca)
        sections.append({"cert": str(cert), "key": str(key)})
    async with (
        RawServer(answer) as app,
        running(tmp_path, app.url, edge={"certificate": sections}) as started,
    ):
        yield started


def served(port: int, name: str | None) -> set[str]:
    """The names in the certificate that a client gets which asks for `name`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as sock,
        context.wrap_socket(sock, server_hostname=name) as secured,
    ):
        leaf = x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(names.get_values_for_type(x509.DNSName))


def port_of(stack: Stack) -> int:
    return urlsplit(stack.tunnel_url).port or 0


async def test_each_name_has_its_certificate(stack: Stack) -> None:
    for name, expected in (
        ("localhost", "localhost"),
        ("one.localhost", "one.localhost"),
        ("x.one.localhost", "one.localhost"),
        ("two.localhost", "two.localhost"),
        ("TWO.localhost", "two.localhost"),
        ("x.two.localhost", "localhost"),
        ("stranger.example", "localhost"),
        (None, "localhost"),
    ):
        assert expected in await asyncio.to_thread(served, port_of(stack), name), name


async def test_many_at_once(stack: Stack) -> None:
    names = ["localhost", "one.localhost", "two.localhost"] * 20
    found = await asyncio.gather(*(asyncio.to_thread(served, port_of(stack), name) for name in names))
    assert all(name in got for name, got in zip(names, found, strict=True))


async def test_a_hello_that_comes_slowly(stack: Stack) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    secured = context.wrap_bio(incoming, outgoing, server_hostname="two.localhost")
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(stack))
    with contextlib.suppress(ssl.SSLWantReadError):
        secured.do_handshake()
    first = outgoing.read()
    for at in range(0, len(first), 50):
        writer.write(first[at : at + 50])
        await asyncio.sleep(0.005)
    async with asyncio.timeout(10):
        while True:
            incoming.write(await reader.read(65536))
            try:
                secured.do_handshake()
                break
            except ssl.SSLWantReadError:
                continue
    leaf = x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    assert "two.localhost" in leaf.subject.rfc4514_string()
    writer.close()


async def test_requests_through_a_certificate_of_its_own(stack: Stack) -> None:
    """And the gateway's tunnel, whose proof is bound to the default one, is up beside it."""
    async with stack.session.get(
        f"https://127.0.0.1:{port_of(stack)}/",
        headers={"Host": stack.host, **stack.authorization},
        ssl=False,
        server_hostname="two.localhost",
    ) as found:
        assert (found.status, await found.read()) == (200, b"ok")


async def test_silence_and_plain_text_end_and_leave_nothing(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "TLS_HANDSHAKE_TIMEOUT", 0.3)
    before = len(os.listdir("/proc/self/fd"))
    for first in (b"", b"\x16", HELLO[:100], HELLO[:-1], b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", HELLO):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(stack))
        writer.write(first)
        with contextlib.suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 10)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    await stack.until(lambda: len(os.listdir("/proc/self/fd")) <= before, "descriptors are closed")


@pytest.mark.parametrize("first", [b"", b"\x16", HELLO[:100]])
async def test_handshakes_count_for_their_client(tmp_path: Path, first: bytes) -> None:
    """Before anybody has said anything."""
    limits = {"limits": {"connections_per_client": 4}}
    async with RawServer(answer) as app, running(tmp_path, app.url, config=limits) as stack:
        await stack.session.close()
        client = stack.edge.lane.client("127.0.0.1")
        await stack.until(lambda: client.open == client.starting == 0, "the tunnels do not count")
        some = [await asyncio.open_connection("127.0.0.1", port_of(stack)) for _ in range(4)]
        for _, writer in some:
            writer.write(first)
        await stack.until(lambda: client.starting == 4, "four have begun")
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(stack))
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
        assert (client.open, client.starting) == (0, 4)
        found = stack.edge.metrics.registry.get_sample_value(
            "guestpass_refusals_total", {"reason": "connections_per_client"}
        )
        assert found == 3
        for _, writer in some:
            writer.transport.abort()
        await stack.until(lambda: client.starting == 0, "nobody is left")
        assert "localhost" in await asyncio.to_thread(served, port_of(stack), "localhost")
        await stack.until(lambda: client.open == client.starting == 0, "that one neither")


async def test_a_few_handshakes_are_answered_in_a_turn() -> None:
    """However many come at once; in between the loop looks after others."""
    loop = asyncio.get_running_loop()
    chosen = Turns()

    def choose(name: str | None) -> None:
        assert name == "a.example.org"
        chosen.note()

    sock = socket.create_server(("127.0.0.1", 0), backlog=100)
    sock.setblocking(False)
    visitors = [socket.create_connection(sock.getsockname()) for _ in range(60)]
    for visitor in visitors:
        visitor.setblocking(False)
        visitor.send(hello("a.example.org"))
    server = tls.TlsServer(sock, asyncio.Protocol, choose, lambda: False)
    try:
        with chosen:
            async with asyncio.timeout(10):
                for visitor in visitors:
                    assert await loop.sock_recv(visitor, 100) == tls.UNRECOGNIZED_NAME
    finally:
        server.close()
        for visitor in visitors:
            visitor.close()
    assert (chosen.total, chosen.most) == (60, tls.ANSWERED_AT_ONCE)


async def test_without_any_certificate_the_name_is_not_recognised(tmp_path: Path) -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    server = tls.TlsServer(sock, asyncio.Protocol, Certificates().choose, lambda: False)
    try:
        with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
            await asyncio.to_thread(served, sock.getsockname()[1], "localhost")
    finally:
        server.close()


# ── reload ───────────────────────────────────────────────────────────────────────────────────────────────────────


def rewrite(stack: Stack, *sections: str) -> None:
    """edge.toml with the stack's own certificate and these sections, as an operator's editor would leave it."""
    edge = stack.edge.config.edge
    assert edge.tls is not None
    listen = ", ".join(f'"{url}"' for url in edge.listen)
    own = f'[edge]\nlisten = [{listen}]\ntls = {{ cert = "{edge.tls.cert}", key = "{edge.tls.key}" }}\n'
    stack.edge.config.file.write_text(own + "\n".join(sections))


def section(cert: Path, key: Path) -> str:
    return f'[[edge.certificate]]\ncert = "{cert}"\nkey = "{key}"\n'


async def test_a_reload_renews_and_drops_nobody(stack: Stack, tmp_path: Path) -> None:
    port = port_of(stack)
    tunnels = [status.since for status in stack.edge.tunnels.status()]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname="two.localhost"
    )

    async def ask() -> bytes:
        writer.write(stack.head("GET", "/"))
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            return head.split(b" ", 2)[1] + await reader.readexactly(2)

    assert await ask() == b"200ok"
    cert, key = issue(tmp_path, "renewed", "two.localhost", "renewed.localhost")
    extra, extra_key = issue(tmp_path, "extra", "extra.localhost")
    rewrite(stack, section(cert, key), section(extra, extra_key))
    await stack.edge.reload()
    assert "renewed.localhost" in await asyncio.to_thread(served, port, "two.localhost")
    assert "extra.localhost" in await asyncio.to_thread(served, port, "extra.localhost")
    assert "localhost" in await asyncio.to_thread(served, port, "one.localhost")  # it has none any more
    assert await ask() == b"200ok", "on the connection that was there before"
    writer.close()
    assert [status.since for status in stack.edge.tunnels.status()] == tunnels


async def test_a_bad_new_certificate_keeps_all_old_ones_and_says_so(
    stack: Stack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = port_of(stack)
    cert, _ = issue(tmp_path, "new", "two.localhost", "renewed.localhost")
    one, one_key = issue(tmp_path, "one-new", "one.localhost", "renewed.localhost")
    rewrite(
        stack, section(one, one_key), section(cert, tmp_path / "two.key")
    )  # the last is half of a renewal
    await stack.edge.reload()
    said = next(r.getMessage() for r in caplog.records if "nothing was changed" in r.getMessage())
    assert str(cert) in said
    assert "edge.certificate" in said
    for name in ("one.localhost", "two.localhost"):
        assert "renewed.localhost" not in await asyncio.to_thread(served, port, name)


async def test_from_one_certificate_to_several_by_a_reload(tmp_path: Path) -> None:
    async with RawServer(answer) as app, running(tmp_path, app.url, gateways=0) as stack:
        port = port_of(stack)
        assert "localhost" in await asyncio.to_thread(served, port, "two.localhost")
        rewrite(stack, section(*issue(tmp_path, "two", "two.localhost")))
        await stack.edge.reload()
        assert "two.localhost" in await asyncio.to_thread(served, port, "two.localhost")


async def test_a_gateway_comes_back_after_the_default_was_renewed(stack: Stack, tmp_path: Path) -> None:
    """Its proof is bound to the certificate that it sees now."""
    tls_section = stack.edge.config.edge.tls
    assert tls_section is not None
    ca = LocalCA()
    cert, key = issue(tmp_path, "default-new", "localhost", "127.0.0.1", ca=ca)
    shutil.copy(cert, tls_section.cert)
    shutil.copy(key, tls_section.key)
    (tmp_path / "ca.pem").write_bytes(ca.pem())
    rewrite(stack)
    await stack.edge.reload()
    await stack.stop_gateway("gw-1")
    await stack.add_gateway("gw-2")


# ── Strict-Transport-Security ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("public", "more", "expected"),
    [
        ("https://share.example.com", {}, "max-age=63072000"),
        ("https://share.example.com", {"hsts_seconds": 300}, "max-age=300"),
        ("https://share.example.com", {"hsts_seconds": 0}, None),
        ("https://share.localhost", {}, None),
    ],
)
async def test_hsts(tmp_path: Path, public: str, more: dict[str, Any], expected: str | None) -> None:
    cert, key = issue(tmp_path, "public", "share.example.com")
    plain, secured = free_port(), free_port()
    host = urlsplit(public).hostname or ""
    settings = {
        "edge": {
            "listen": [f"http://127.0.0.1:{plain}", f"https://127.0.0.1:{secured}"],
            "admin_listen": "127.0.0.1:0",
            "public_url": public,
            "share_domain": host,
            "state": f"sqlite:///{tmp_path}/state/edge.db",
            "tls": {"cert": str(cert), "key": str(key)},
            **more,
        }
    }
    edge = Edge(parse(EdgeConfig, settings, tmp_path / "edge.toml"))
    await edge.start()
    try:
        async with aiohttp.ClientSession() as session:
            for path in ("/", "/nothing", "/.well-known/jwks.json", "/s/" + "x" * 32, "/console"):
                for name in (host, f"abc.{host}"):
                    fields = {"Host": name, "Accept": "text/html"}
                    url = f"https://127.0.0.1:{secured}{path}"
                    async with session.get(url, headers=fields, ssl=False, allow_redirects=False) as found:
                        assert found.headers.get("Strict-Transport-Security") == expected, (name, path)
            # RFC 6797 §7.2: never over plain HTTP.
            async with session.get(f"http://127.0.0.1:{plain}/", headers={"Host": host}) as found:
                assert "Strict-Transport-Security" not in found.headers
    finally:
        await edge.stop()
