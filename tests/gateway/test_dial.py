"""The way to the edge: names, certificates, clocks, and a real HTTP proxy."""

from __future__ import annotations

import asyncio
import datetime
import errno
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from support import tunnel
from support.programs import Program, free_port, wait_until
from support.tunnel import NAME, SITE, TestGateway, until

from guestpass import loop as loops
from guestpass.errors import ConfigError, EdgeUnreachable
from guestpass.gateway import dial
from guestpass.gateway.dial import Proxy, edge_at, parse_proxy
from guestpass.mux.handshake import certificate_hash
from guestpass.mux.link import peer_certificate_hash
from guestpass.mux.stream import TunnelStream

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_an_edge_is() -> None:
    edge = edge_at("https://share.example.com")
    assert (edge.host, edge.port, edge.authority, edge.proxy) == (
        "share.example.com",
        443,
        "share.example.com",
        None,
    )
    edge = edge_at("http://[::1]:8080")
    assert (edge.host, edge.port, edge.authority, edge.tls) == ("::1", 8080, "[::1]:8080", None)


@pytest.mark.parametrize("url", ["ftp://x", "https://", "share.example.com"])
def test_what_is_no_edge(url: str) -> None:
    with pytest.raises(ConfigError):
        edge_at(url)


def test_proxies() -> None:
    assert parse_proxy("http://proxy:8080", "k") == Proxy("proxy", 8080)
    assert parse_proxy("proxy.example", "k") == Proxy("proxy.example", 3128)
    made = parse_proxy("http://us%40er:p%3Ass@proxy", "k")
    assert made.authorization == "Basic dXNAZXI6cDpzcw=="  # us@er:p:ss
    assert "cDpzcw" not in repr(made)
    for wrong in ("https://proxy:1", "socks5://proxy", "http://", "http://proxy:99999"):
        with pytest.raises(ConfigError) as caught:
            parse_proxy(wrong, "http_proxy")
        assert "http_proxy" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "environment", "configured", "expected"),
    [
        ("https://e.example", {"HTTPS_PROXY": "http://p:1"}, None, "p"),
        ("https://e.example", {"https_proxy": "http://p:1"}, None, "p"),
        ("https://e.example", {"HTTP_PROXY": "http://p:1"}, None, None),
        ("https://e.example", {"ALL_PROXY": "http://p:1"}, None, "p"),
        ("http://e.example", {"HTTP_PROXY": "http://p:1"}, None, "p"),
        ("https://e.example", {"HTTPS_PROXY": "http://p:1"}, "http://q:1", "q"),
        ("https://e.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "e.example"}, None, None),
        ("https://e.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".example"}, None, None),
        ("https://e.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other, *"}, None, "p"),
        ("https://e.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None, None),
        ("https://e.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "notexample"}, None, "p"),
        ("https://localhost:8443", {"HTTPS_PROXY": "http://p:1"}, None, None),
        ("https://127.0.0.1:8443", {"HTTPS_PROXY": "http://p:1"}, None, None),
        ("https://127.0.0.1:8443", {}, "http://q:1", "q"),
    ],
)
def test_which_proxy(
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    environment: dict[str, str],
    configured: str | None,
    expected: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    proxy = edge_at(url, http_proxy=configured).proxy
    assert (proxy.host if proxy else None) == expected


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_unusable_ca(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        edge_at("https://e.example", ca=path)
    assert str(path) in str(caught.value)


# ── faults ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def fault(url: str, **more: object) -> EdgeUnreachable:
    with pytest.raises(EdgeUnreachable) as caught:
        await dial.connect(edge_at(url, **more), asyncio.Protocol)  # type: ignore[arg-type]
    assert url in caught.value.message
    assert caught.value.hint
    return caught.value


async def settled(server: asyncio.Server) -> None:
    """Close, and wait for what it has accepted: connections whose handshake failed have no protocol to ask."""
    server.close()
    await until(
        lambda: not (getattr(server, "_active_count", 0) or getattr(server, "_clients", ())),
        "all connections ended",
    )


async def test_nobody_listens() -> None:
    exc = await fault(f"http://127.0.0.1:{free_port()}")
    assert exc.error_code == "edge_unreachable"
    assert "refused" in exc.message.lower()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..example", "x" * 64 + ".example"])
async def test_unknown_host(host: str) -> None:
    assert (await fault(f"http://{host}")).error_code == "edge_unknown_host"


@pytest.mark.parametrize("limit", ["TCP_TIMEOUT", "CONNECT_TIMEOUT"])
async def test_no_answer(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(dial, limit, 0.1)
    with socket.socket() as deaf:  # its queue is full: further connections hang
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        port = deaf.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            assert filler.connect_ex(("127.0.0.1", port)) in (0, errno.EINPROGRESS)
        exc = await fault(f"http://127.0.0.1:{port}")
        for filler in fillers:
            filler.close()
    assert "within" in exc.message


def certificate(
    folder: Path, *, names: tuple[str, ...] = ("localhost",), days: tuple[int, int] = (-1, 1)
) -> ssl.SSLContext:
    """A self-signed one, in `folder`/cert.pem, valid from and until so many days from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA384())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(pem)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@pytest.mark.parametrize(
    ("names", "days", "trusted", "code", "words"),
    [
        (("localhost",), (-1, 1), False, "certificate_untrusted", "ca"),
        (("localhost",), (1, 2), True, "clock_wrong", "clock"),
        (("localhost",), (-2, -1), True, "clock_wrong", "clock"),
        (("other.example",), (-1, 1), True, "certificate_wrong_name", "localhost"),
    ],
)
async def test_certificates(
    tmp_path: Path, names: tuple[str, ...], days: tuple[int, int], trusted: bool, code: str, words: str
) -> None:
    context = certificate(tmp_path, names=names, days=days)
    server = await loops.create_server(asyncio.Protocol, host="127.0.0.1", port=0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    exc = await fault(url, ca=tmp_path / "cert.pem" if trusted else None)
    assert exc.error_code == code
    assert words in exc.message + exc.hint
    await settled(server)


async def test_certificate_hash_is_what_the_edge_has(tmp_path: Path) -> None:
    """RFC 5929: SHA-384 for a certificate that is signed with SHA-384."""
    context = certificate(tmp_path)
    server = await loops.create_server(asyncio.Protocol, host="127.0.0.1", port=0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    transport, _ = await dial.connect(edge_at(url, ca=tmp_path / "cert.pem"), asyncio.Protocol)
    der = x509.load_pem_x509_certificate((tmp_path / "cert.pem").read_bytes()).public_bytes(Encoding.DER)
    assert peer_certificate_hash(transport) == certificate_hash(der)
    assert len(certificate_hash(der)) == 48
    transport.abort()
    await settled(server)


async def test_tls_with_a_port_that_has_none() -> None:
    class Plain(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")  # type: ignore[attr-defined]

    server = await asyncio.get_running_loop().create_server(Plain, "127.0.0.1", 0)
    exc = await fault(f"https://localhost:{server.sockets[0].getsockname()[1]}")
    assert exc.error_code == "tls_failed"
    await settled(server)


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
async def test_ipv6_and_names_below_localhost() -> None:
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "::1", 0)
    port = server.sockets[0].getsockname()[1]
    for host in ("[::1]", "localhost", "edge.localhost"):
        transport, _ = await dial.connect(edge_at(f"http://{host}:{port}"), asyncio.Protocol)
        transport.abort()
    await settled(server)


# ── an HTTP proxy that nobody here wrote ──────────────────────────────────────────────────────────────────────────


def run_proxy(folder: Path, *options: str) -> Iterator[int]:
    port_file = folder / "port"
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "proxy",
        "--hostname",
        "127.0.0.1",
        "--port",
        "0",
        "--port-file",
        port_file,
    ]
    command += ["--num-workers", "1", "--num-acceptors", "1", "--log-level", "w", *options]
    with Program(command, log=folder / "proxy.log"):
        yield wait_until(
            "the proxy's port",
            lambda: int(port_file.read_text() or 0) if port_file.exists() else 0,
            seconds=30,
        )


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    yield from run_proxy(tmp_path_factory.mktemp("proxy"))


@pytest.fixture(scope="module")
def locked_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    yield from run_proxy(tmp_path_factory.mktemp("locked-proxy"), "--basic-auth", "user:p@ss")


@pytest_asyncio.fixture(params=[False, True], ids=["plain", "tls"])
async def edge(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tunnel.TestEdge]:
    async with tunnel.edge(tmp_path, tls=request.param) as made:
        yield made


async def test_tunnel_through_a_proxy(edge: tunnel.TestEdge, proxy: int) -> None:
    gateway = TestGateway()
    edge.enrol(gateway.key)

    async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
        stream.send_head(b"HTTP/1.1 200 OK\r\n\r\n")
        while data := await stream.read():
            await stream.write(data)
        stream.finish()

    gateway.serve = serve
    made = await gateway.join(edge, proxy=f"http://127.0.0.1:{proxy}")
    assert made.remote == f"127.0.0.1:{proxy}"
    stream = edge.tunnels.open(SITE, NAME, tunnel.SERVICE, tunnel.HEAD, fin=False)
    await stream.write(b"x" * 100_000)
    stream.finish()
    await stream.head()
    size = 0
    while data := await stream.read():
        size += len(data)
    assert size == 100_000
    await gateway.close()


async def test_proxy_with_a_password(edge: tunnel.TestEdge, locked_proxy: int) -> None:
    gateway = TestGateway()
    edge.enrol(gateway.key)
    await gateway.join(edge, proxy=f"http://user:p%40ss@127.0.0.1:{locked_proxy}")
    for wrong in (f"http://127.0.0.1:{locked_proxy}", f"http://user:wrong@127.0.0.1:{locked_proxy}"):
        exc = await fault(edge.url, ca=edge.ca, http_proxy=wrong)
        assert exc.error_code == "proxy_refused"
        assert "407" in exc.message
        assert "USER:PASSWORD" in exc.hint
        assert "wrong" not in exc.message
    await gateway.close()


async def test_proxy_that_is_not_there() -> None:
    port = free_port()
    exc = await fault("https://edge.example", http_proxy=f"http://127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in exc.message
    assert "http_proxy" in exc.hint


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "403 Forbidden"),
        (b"SSH-2.0-x\r\n\r\n", "does not answer like an HTTP proxy"),
        (b"", "does not answer like an HTTP proxy"),
        (b"HTTP/1.1 200 OK\r\n\r\nsurplus", "cannot have sent"),
    ],
)
async def test_odd_proxies(answer: bytes, words: str) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(EdgeUnreachable) as caught:
        await dial.connect(
            edge_at("https://edge.example", http_proxy=f"http://127.0.0.1:{port}"), asyncio.Protocol
        )
    assert words in caught.value.message
    await settled(server)
