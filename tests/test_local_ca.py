"""The certificates of `guestpass up`, judged by OpenSSL."""

import asyncio
import ssl
import stat

import pytest

from guestpass.local_ca import LocalCA, write_certificates

NAMES = ["localhost", "127.0.0.1", "::1", "share.localhost", "*.share.localhost"]


async def greet(server_context: ssl.SSLContext, client_context: ssl.SSLContext, name: str) -> str:
    """One TLS handshake over loopback; the protocol version. Raises ssl.SSLError."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_context, server_hostname=name)
        version = writer.get_extra_info("ssl_object").version()
        writer.close()
        await writer.wait_closed()
    return str(version)


def contexts(folder, names=NAMES):
    ca, cert, key = write_certificates(folder, names)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    client = ssl.create_default_context(cafile=str(ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    return server, client


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "share.localhost", "sabc.share.localhost"])
async def test_names_that_it_covers(tmp_path, name):
    assert await greet(*contexts(tmp_path), name) == "TLSv1.3"


@pytest.mark.parametrize("name", ["example.org", "a.b.share.localhost", "other.localhost", "10.0.0.1"])
async def test_names_that_it_does_not(tmp_path, name):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        await greet(*contexts(tmp_path), name)


@pytest.mark.parametrize("name", ["example.org", "10.0.0.1"])
async def test_the_ca_is_good_for_this_machine_only(tmp_path, name):
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        await greet(*contexts(tmp_path, [name]), name)


async def test_another_ca_is_not_trusted(tmp_path):
    server, _ = contexts(tmp_path)
    other = tmp_path / "other.pem"
    other.write_bytes(LocalCA().pem())
    with pytest.raises(ssl.SSLCertVerificationError):
        await greet(server, ssl.create_default_context(cafile=str(other)), "localhost")


def test_the_key_is_private_and_nothing_is_overwritten(tmp_path):
    ca, cert, key = write_certificates(tmp_path, NAMES)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert b"PRIVATE" not in ca.read_bytes() + cert.read_bytes()
    with pytest.raises(FileExistsError):
        write_certificates(tmp_path, NAMES)
