"""TLS as sslyze sees it: Mozilla's intermediate profile, nothing older, nothing weaker (figure 6)."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.programs import Program, free_port
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
def edge(tmp_path: Path) -> Iterator[int]:
    """An edge as it is deployed, in a process of its own; its port."""
    port = free_port()
    write_certificates(tmp_path, ("localhost", "share.localhost", "*.share.localhost"))
    (tmp_path / "edge.toml").write_text(f"""
        [edge]
        listen = ["https://127.0.0.1:{port}"]
        admin_listen = "127.0.0.1:{free_port()}"
        public_url = "https://localhost:{port}"
        share_domain = "share.localhost:{port}"
        tls = {{ cert = "cert.pem", key = "key.pem" }}
        [[edge.certificate]]
        cert = "cert.pem"
        key = "key.pem"
        hosts = ["share.localhost"]
    """)
    command = (sys.executable, "-m", "guestpass", "--json", "edge", "--config", str(tmp_path / "edge.toml"))
    with Program(command, log=tmp_path / "edge.log") as program:
        program.wait_for_line("{", seconds=60)
        yield port
        assert program.process.poll() is None, "the edge survives the scan"


def test_mozilla_intermediate(edge: int, sslyze: Path, tmp_path: Path) -> None:
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
