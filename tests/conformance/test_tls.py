"""TLS as sslyze sees it: Mozilla's intermediate profile, nothing older, nothing weaker (figure 6)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.programs import Program, free_port, wait_until
from support.scoreboard import row

from guestpass.local_ca import write_certificates

REPOSITORY = Path(__file__).parents[2]
SCAN = REPOSITORY / "tests" / "support" / "sslyze_scan.py"

# Pinned: the profile comes with it. Not in the `test` extra, since it wants another `cryptography` than acme.
SSLYZE = "sslyze==6.3.1"
TOOLS = REPOSITORY / "build" / "tools" / SSLYZE.replace("==", "-")

INSTALL_SECONDS = 300
SCAN_SECONDS = 90


@pytest.fixture(scope="module")
def sslyze() -> Path:
    """A Python that has sslyze; made once, in build/tools."""
    python = TOOLS / "bin" / "python"
    done = TOOLS / "complete"
    if not done.exists():
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(TOOLS)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", SSLYZE],
        ):
            made = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=INSTALL_SECONDS)
            assert made.returncode == 0, f"{SSLYZE} cannot be installed from PyPI: {made.stderr[-500:]}"
        done.touch()
    return python


def scan(python: Path, port: int, ca: Path) -> dict[str, Any]:
    done = subprocess.run(
        [str(python), str(SCAN), "localhost", str(port), str(ca)],
        capture_output=True,
        encoding="utf-8",
        timeout=SCAN_SECONDS,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def edge() -> int:
    """The edge's port."""
    return free_port()


@pytest.fixture
def running(edge: int, tmp_path: Path) -> Iterator[Program]:
    """An edge as it is deployed, in a process of its own."""
    _, cert, key = write_certificates(tmp_path, ("localhost", "share.localhost", "*.share.localhost"))
    shutil.copy(cert, tmp_path / "share.pem")
    shutil.copy(key, tmp_path / "share.key")
    (tmp_path / "edge.toml").write_text(f"""
        [edge]
        listen = ["https://127.0.0.1:{edge}"]
        admin_listen = "127.0.0.1:{free_port()}"
        public_url = "https://localhost:{edge}"
        share_domain = "share.localhost:{edge}"
        tls = {{ cert = "cert.pem", key = "key.pem" }}
        [[edge.certificate]]
        cert = "share.pem"
        key = "share.key"
        hosts = ["share.localhost"]
    """)
    command = (sys.executable, "-m", "guestpass", "--json", "edge", "--config", str(tmp_path / "edge.toml"))
    with Program(command, log=tmp_path / "edge.log") as program:
        program.wait_for_line("{", seconds=60)
        yield program
        assert program.process.poll() is None, "the edge survives the scan"


def test_mozilla_intermediate(running: Program, edge: int, sslyze: Path, tmp_path: Path) -> None:
    found = scan(sslyze, edge, tmp_path / "ca.pem")
    accepted = {version for version, ciphers in found["ciphers"].items() if ciphers}
    suites = sum(len(ciphers) for ciphers in found["ciphers"].values())
    row(
        "sslyze, Mozilla intermediate",
        f"{SSLYZE}: versions, {suites} cipher suites, curves, certificate, vulnerabilities",
        "compliant" if not found["issues"] else "; ".join(found["issues"].values()),
        "compliant",
        ok=not found["issues"],
        figure=6,
    )
    assert accepted == {"tls_1_2", "tls_1_3"}
    assert found["curves"]
    assert not found["compression"]
    assert not found["renegotiation"]


def test_sighup_renews_by_name_and_drops_nobody(running: Program, edge: int, tmp_path: Path) -> None:
    """The signal itself, at the process: the new certificate for the name, the old connection goes on."""
    context = ssl.create_default_context(cafile=tmp_path / "ca.pem")

    def connect(name: str) -> ssl.SSLSocket:
        sock = socket.create_connection(("127.0.0.1", edge), timeout=20)
        return context.wrap_socket(sock, server_hostname=name)

    def serial(name: str) -> str:
        with connect(name) as secured:
            return str((secured.getpeercert() or {})["serialNumber"])

    def ask(secured: ssl.SSLSocket) -> bytes:
        secured.sendall(b"HEAD /.well-known/jwks.json HTTP/1.1\r\nHost: localhost:%d\r\n\r\n" % edge)
        return secured.recv(65536)

    first, other = serial("share.localhost"), serial("localhost")
    with connect("share.localhost") as before:
        assert b" 200 " in ask(before)
        renewed = tmp_path / "renewed"
        renewed.mkdir()
        ca, cert, key = write_certificates(renewed, ("share.localhost",))
        context.load_verify_locations(ca)
        for path, name in ((cert, "share.pem"), (key, "share.key")):
            path.replace(tmp_path / name)
        running.process.send_signal(signal.SIGHUP)
        wait_until("the new one is served", lambda: serial("share.localhost") != first, seconds=20)
        assert serial("localhost") == other
        assert b" 200 " in ask(before)
        # The next renewal is only half there.
        (tmp_path / "share.key").write_text("half")
        running.process.send_signal(signal.SIGHUP)
        wait_until("it says so", lambda: "nothing was changed" in running.output(), seconds=20)
        assert str(tmp_path / "share.pem") in running.output()
        assert serial("share.localhost") != first
        assert b" 200 " in ask(before)


def test_the_scan_finds_what_is_wrong(sslyze: Path, tmp_path: Path) -> None:
    """The same with a server that does as Python does by itself: so the scan above says something."""
    ca, cert, key = write_certificates(tmp_path, ("localhost",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.set_ciphers("ECDHE+AES:RSA+AES")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            try:
                with connection, context.wrap_socket(connection, server_side=True) as secured:
                    while secured.recv(4096):
                        pass
            except OSError:
                pass

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.settimeout(20)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        found = scan(sslyze, listener.getsockname()[1], ca)
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join(10)
    assert {"ciphers", "tls_curves"} <= set(found["issues"])
