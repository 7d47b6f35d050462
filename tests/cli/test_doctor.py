"""`guestpass doctor` finds what is wrong, with real sockets, certificates and databases."""

import asyncio
import fcntl
import os
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from guestpass.cli.probe import clock, edge_path
from guestpass.gateway.enroll import load_or_create_key
from guestpass.local_ca import write_certificates
from guestpass.shares.store import Store
from guestpass.shares.store.schema import VERSION_TABLE

UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Protocol: guestpass.v1\r\n"


@contextmanager
def answering(answer: bytes, context: ssl.SSLContext | None = None, *, connections: int = 1) -> Iterator[int]:
    """A server that reads a request head and sends `answer`, to so many connections, one after the other."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for _ in range(connections):
            plain, _ = server.accept()
            try:
                with context.wrap_socket(plain, server_side=True) if context else plain as connection:
                    head = b""
                    while b"\r\n\r\n" not in head:
                        data = connection.recv(4096)
                        if not data:
                            break
                        head += data
                    connection.sendall(answer)
            except OSError:
                plain.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        thread.join(10)
        server.close()


def found(url: str, **options) -> dict[str, str]:
    """Check names and their status."""
    return {check.name: check.status for check in edge_path(url, **options)}


def test_an_edge_that_takes_tunnels():
    date = format_datetime(datetime.now(UTC), usegmt=True).encode()
    with answering(UPGRADED + b"Date: " + date + b"\r\n\r\n", connections=2) as port:
        checks = found(f"http://localhost:{port}")
    assert checks == {"DNS": "ok", "TCP": "ok", "WebSocket upgrade": "ok", "clock": "ok"}


def test_a_server_that_is_no_edge():
    with answering(
        b"HTTP/1.1 404 Not Found\r\nServer: other\r\nContent-Length: 0\r\n\r\n", connections=2
    ) as port:
        checks = {check.name: check for check in edge_path(f"http://localhost:{port}")}
    assert checks["WebSocket upgrade"].status == "fail"
    assert "status 404 from other" in checks["WebSocket upgrade"].detail
    assert checks["clock"].status == "warn"


@pytest.mark.parametrize(
    ("seconds", "status"), [(0, "ok"), (-20, "warn"), (20, "warn"), (3600, "fail"), (-86400, "fail")]
)
def test_clocks(seconds, status):
    there = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
    assert clock(there).status == status


def test_a_date_that_is_none():
    assert clock("yesterday").status == "warn"


def test_an_unknown_name_and_a_closed_port():
    assert found("https://no-such-host.invalid") == {"DNS": "fail"}
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert found(f"http://127.0.0.1:{bound.getsockname()[1]}") == {"DNS": "ok", "TCP": "fail"}


def test_tls(tmp_path):
    ca, cert, key = write_certificates(tmp_path, ["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with answering(UPGRADED + b"\r\n", context, connections=2) as port:
        assert found(f"https://localhost:{port}", ca=ca)["TLS"] == "ok"
    with answering(b"", context) as port:
        last = list(edge_path(f"https://localhost:{port}"))[-1]
    assert (last.name, last.status) == ("TLS", "fail")
    assert "CA" in last.hint


def test_through_a_proxy_that_refuses():
    with answering(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n") as port:
        last = list(edge_path("https://share.example.com", http_proxy=f"http://127.0.0.1:{port}"))[-1]
    assert (last.name, last.status) == ("HTTP proxy", "fail")
    assert "refuses CONNECT to share.example.com:443 (status 403)" in last.detail


def test_through_a_proxy_that_wants_a_password():
    with answering(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n") as port:
        last = list(edge_path("https://share.example.com", http_proxy=f"http://127.0.0.1:{port}"))[-1]
    assert last.hint.endswith("http://USER:PASSWORD@HOST:PORT.")


def by_name(result) -> dict[str, dict[str, str]]:
    assert set(result.json) == {"ok", "checks"}
    for check in result.json["checks"]:
        assert set(check) == {"name", "status", "detail", "hint"}
        assert check["status"] in ("ok", "warn", "fail")
    return {check["name"]: check for check in result.json["checks"]}


def test_an_installation(guestpass):
    result = guestpass("doctor", "--json")
    assert result.status == 0
    assert result.json["ok"] is True
    checks = by_name(result)
    assert checks["compiled core"]["status"] == "ok"
    assert checks["event loop"]["status"] == "ok"
    text = guestpass("doctor").out
    assert "Nothing failed." in text


def test_a_broken_configuration(guestpass, tmp_path):
    path = tmp_path / "edge.toml"
    path.write_text("[edge]\nlisen = []\n")
    result = guestpass("doctor", "--config", str(path), "--json")
    assert result.status == 1
    assert result.json["ok"] is False
    assert 'did you mean "listen"?' in by_name(result)["configuration"]["detail"]


@pytest.fixture
def edge(tmp_path):
    """An edge.toml on free ports."""
    with socket.socket() as one, socket.socket() as other:
        for sock in (one, other):
            sock.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    write_certificates(tmp_path, ["localhost", "*.share.localhost"])
    path = tmp_path / "edge.toml"
    path.write_text(
        f'[edge]\nlisten = ["https://127.0.0.1:{ports[0]}"]\nadmin_listen = "127.0.0.1:{ports[1]}"\n'
        f'public_url = "https://localhost:{ports[0]}"\nshare_domain = "share.localhost:{ports[0]}"\n'
        'tls = { cert = "cert.pem", key = "key.pem" }\n'
    )
    return path, ports


def test_an_edge_before_its_first_start(guestpass, edge):
    path, ports = edge
    result = guestpass("doctor", "--config", str(path), "--json")
    checks = by_name(result)
    assert result.status == 0, result.out
    assert "will be made at the first start" in checks["store"]["detail"]
    assert checks[f"port {ports[0]}"]["status"] == "ok"
    assert checks["certificate"]["status"] == "ok"
    assert checks["certificate names"]["status"] == "ok"
    assert "email-code" in checks["plugins"]["detail"]
    assert not (path.parent / "edge.db").exists()


def test_a_taken_port_a_foreign_key_and_an_unknown_plugin(guestpass, edge):
    path, ports = edge
    other = path.parent / "other"
    other.mkdir()
    _, _, key = write_certificates(other, ["localhost"])
    path.write_text(path.read_text().replace("key.pem", str(key)) + '[[authenticate]]\nuse = "e-mail-code"\n')
    with socket.create_server(("127.0.0.1", ports[0])):
        result = guestpass("doctor", "--config", str(path), "--json")
    checks = by_name(result)
    assert result.status == 1
    assert checks[f"port {ports[0]}"]["status"] == "fail"
    assert checks["certificate"]["status"] == "fail"
    assert checks["plugins"]["status"] == "fail"
    assert "email-code" in checks["plugins"]["hint"]


def test_a_certificate_without_the_wildcard(guestpass, edge):
    path, _ = edge
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (path.parent / name).unlink()
    write_certificates(path.parent, ["localhost"])
    result = guestpass("doctor", "--config", str(path), "--json")
    assert result.status == 0
    names = by_name(result)["certificate names"]
    assert names["status"] == "warn"
    assert "*.share.localhost" in names["detail"]


def store_check(guestpass, path) -> dict[str, str]:
    return by_name(guestpass("doctor", "--config", str(path), "--json"))["store"]


async def make_store(path) -> None:
    await (await Store.open(path)).close()


def test_stores(guestpass, edge):
    path, _ = edge
    database = path.parent / "edge.db"
    asyncio.run(make_store(database))
    before = database.read_bytes()
    assert store_check(guestpass, path)["status"] == "ok"
    assert database.read_bytes() == before

    with open(path.parent / "edge.db.lock", "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(b"4711\n")
        lock.flush()
        held = store_check(guestpass, path)
    assert held["status"] == "fail"
    assert "in use by process 4711" in held["detail"]

    with sqlite3.connect(database) as db:
        db.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    db.close()
    assert "written by a newer Guestpass (schema 9999)" in store_check(guestpass, path)["detail"]

    database.write_bytes(b"not a database" * 1000)
    damaged = store_check(guestpass, path)
    assert damaged["status"] == "fail"
    assert "restore a backup" in damaged["hint"]


def test_a_database_of_another_program(guestpass, edge):
    path, _ = edge
    with sqlite3.connect(path.parent / "edge.db") as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    assert "another program" in store_check(guestpass, path)["detail"]


def test_a_gateway(guestpass, tmp_path):
    path = tmp_path / "gateway.toml"
    with socket.create_server(("127.0.0.1", 0)) as application, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        path.write_text(
            '[gateway]\nname = "a"\nsite = "b"\n'
            f'edges = ["http://127.0.0.1:{closed.getsockname()[1]}"]\n'
            f'[services.up]\nurl = "http://127.0.0.1:{application.getsockname()[1]}"\n'
            f'[services.down]\nurl = "unix://{tmp_path}/app.sock"\n'
        )
        checks = by_name(guestpass("doctor", "--config", str(path), "--json"))
        assert "gateway enroll" in checks["key"]["hint"]
        assert checks["service up"]["status"] == "ok"
        assert checks["service down"]["status"] == "fail"
        assert checks[f"http://127.0.0.1:{closed.getsockname()[1]} TCP"]["status"] == "fail"

        key = tmp_path / "gateway.key"
        load_or_create_key(key)
        assert by_name(guestpass("doctor", "--config", str(path), "--json"))["key"]["status"] == "ok"
        key.chmod(0o640)
        assert "mode 0640" in by_name(guestpass("doctor", "--config", str(path), "--json"))["key"]["detail"]


def test_the_reader_of_a_pipe_may_go():
    process = subprocess.Popen(
        [sys.executable, "-m", "guestpass", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "GUESTPASS_EDGE": "http://127.0.0.1:1"},
    )
    process.stdout.readline()
    process.stdout.close()
    with process:
        assert process.stderr.read() == b""
    assert process.returncode == 1
