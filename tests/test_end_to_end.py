"""The commands as scripts use them: `guestpass up --json`, curl with its token, `share delete`, restarts."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.programs import Program, free_port, wait_until
from support.up import GUESTPASS, Up, answer

CANARY = "canary7d1f93c2"


@pytest.fixture
def app(tmp_path: Path) -> Iterator[str]:
    script = Path(__file__).parent / "support" / "bulk_app.py"
    with Program([sys.executable, script], log=tmp_path / "app.log") as program:
        yield program.wait_for_line("http://", seconds=20)


@pytest.fixture
def up(app: str, tmp_path: Path) -> Iterator[Up]:
    with Up(app, to="alice@example.org", folder=tmp_path) as running:
        yield running


def authorization(up: Up) -> dict[str, str]:
    return {"Authorization": f"Bearer {up.facts['token']}"}


def test_up_prints_what_scripts_rely_on(up: Up) -> None:
    expected = {
        "edge",
        "share",
        "link",
        "origin",
        "token",
        "metrics",
        "outbox",
        "pids",
        "tunnel",
        "ca",
        "api",
        "api_key",
    }
    assert set(up.facts) == expected
    assert up.origin.startswith(f"http://{up.share}.localhost:")
    assert up.facts["token"].startswith("gp_")
    assert Path(up.facts["ca"]).is_file()
    assert Path(up.facts["outbox"]).is_dir()
    assert {key: len(pids) for key, pids in up.facts["pids"].items()} == {"edge": 1, "gateways": 1}
    status, _, body = up.get(f"{up.origin}/1000", authorization(up))
    assert (status, len(body)) == (200, 1000)
    status, _, body = up.get(up.facts["metrics"])
    assert status == 200
    assert b"guestpass_requests_total" in body


def test_curl_reaches_the_origin(up: Up) -> None:
    if shutil.which("curl") is None:
        pytest.fail("curl is not installed: apt-get install curl")
    command = ["curl", "-sS", "-o", os.devnull, "-w", "%{http_code} %{size_download}", f"{up.origin}/5000"]
    done = subprocess.run(
        [*command, "-H", f"Authorization: Bearer {up.facts['token']}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "200 5000"
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("401")


def test_deleting_a_share_ends_a_running_download(up: Up) -> None:
    started = threading.Event()
    outcome: list[str] = []

    def download() -> None:
        with subprocess.Popen(
            [
                "curl",
                "-sS",
                "--limit-rate",
                "5M",
                "-H",
                f"Authorization: Bearer {up.facts['token']}",
                f"{up.origin}/10000000000",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as curl:
            assert curl.stdout is not None
            curl.stdout.read(1_000_000)
            started.set()
            while curl.stdout.read(1_000_000):
                pass
            outcome.append(f"{curl.wait()}")

    thread = threading.Thread(target=download)
    thread.start()
    assert started.wait(20)
    deleted = answer(up.command("share", "delete", up.share))
    thread.join(10)
    assert not thread.is_alive()
    assert outcome in (["56"], ["18"])  # curl: receive failure, or fewer bytes than promised
    assert deleted["revoked"]["streams"] == 1
    assert deleted["revoked"]["took_ms"] < 1000
    assert up.get(f"{up.origin}/1", authorization(up))[0] == 410
    assert up.get(up.link)[0] == 410
    assert answer(up.command("share", "show", up.share))["state"] == "deleted"


def test_up_ends_with_everything_it_started(app: str, tmp_path: Path) -> None:
    with Up(app, to="alice@example.org", folder=tmp_path) as up:
        pids = [pid for group in up.facts["pids"].values() for pid in group]
        folder = Path(up.facts["ca"]).parent
        up.program.process.send_signal(signal.SIGINT)
        assert up.program.process.wait(20) in (0, 130)
    wait_until("all processes ended", lambda: not any(psutil.pid_exists(pid) for pid in pids), seconds=5)
    assert not folder.exists()


@pytest.mark.parametrize(
    "name", ["Umsatz, Q3 „vorläufig“", "\"quoted\" 'name'", "📈 日本 dashboards", "n" * 200]
)
def test_names_of_shares(up: Up, name: str) -> None:
    created = answer(
        up.command(
            "share",
            "create",
            "--service",
            "local/app",
            "--path",
            "/",
            "--to",
            "bob@example.org",
            "--name",
            name,
        )
    )
    assert answer(up.command("share", "show", created["id"]))["name"] == name
    status, _, page = up.get(created["links"]["bob@example.org"])
    assert status == 200
    assert name in html.unescape(page.decode("utf-8"))
    assert answer(up.command("share", "delete", created["id"]))["revoked"]["sessions"] == 0


def test_no_content_is_written_at_the_edge(up: Up) -> None:
    """Paths, queries, tokens and links leave no trace in what `guestpass up` has written. (Of all that passes:
    tests/conformance/test_traces.py.)"""
    for number in range(5):
        up.get(f"{up.origin}/100?q={CANARY}{number}", {**authorization(up), "X-Note": CANARY})
        up.get(f"{up.origin}/{CANARY}", authorization(up))
    folder = Path(up.facts["ca"]).parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files)
    secrets = (CANARY.encode(), up.facts["token"].encode(), up.link.rpartition("/")[2].encode())
    mail = Path(up.facts["outbox"])
    for path in files:
        data = path.read_bytes()
        assert secrets[0] not in data, path
        assert secrets[1] not in data, path
        if mail not in path.parents:
            assert secrets[2] not in data, path
    log = up.program.output().partition("\n")[2]
    assert CANARY not in log


# ── an edge that is killed ────────────────────────────────────────────────────────────────────────────────────────


class EdgeProcess:
    """`guestpass edge` with a configuration in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.config = folder / "edge.toml"
        self.config.write_text(
            f'[edge]\nlisten = ["http://127.0.0.1:{self.port}"]\nadmin_listen = "127.0.0.1:0"\n'
            f'public_url = "http://localhost:{self.port}"\nshare_domain = "localhost:{self.port}"\n'
        )
        self.program = self.start()

    def start(self) -> Program:
        self.program = Program(
            [*GUESTPASS, "edge", "--config", self.config, "--json"], log=self.folder / "edge.log"
        )
        json.loads(self.program.wait_for_line("{", seconds=30))
        return self.program

    def kill(self) -> None:
        self.program.process.kill()
        self.program.process.wait()

    def run(self, *arguments: str) -> dict[str, object]:
        environment = {
            **os.environ,
            "GUESTPASS_EDGE": f"http://localhost:{self.port}",
            "GUESTPASS_API_KEY": (self.folder / "api.key").read_text().strip(),
        }
        with subprocess.Popen(
            [*GUESTPASS, *arguments, "--json"], stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            output, _ = process.communicate(timeout=30)
        found: dict[str, object] = json.loads(output)
        return found


def test_kill_9_loses_no_acknowledged_share_or_deletion(tmp_path: Path) -> None:
    edge = EdgeProcess(tmp_path)
    try:
        kept, deleted = [], []
        for number in range(4):
            created = edge.run(
                "share", "create", "--service", "plant/dash", "--path", "/", "--to", f"a{number}@example.org"
            )
            kept.append(created["id"])
        deleted.append(kept.pop())
        assert "revoked" in edge.run("share", "delete", str(deleted[0]))
        edge.kill()
        start = time.monotonic()
        edge.start()
        assert time.monotonic() - start < 20
        for share in kept:
            assert edge.run("share", "show", str(share))["state"] == "active"
        assert edge.run("share", "show", str(deleted[0]))["state"] == "deleted"
    finally:
        edge.program.stop()


def test_two_edges_on_one_store(tmp_path: Path) -> None:
    edge = EdgeProcess(tmp_path)
    try:
        other = tmp_path / "other.toml"
        other.write_text(edge.config.read_text().replace(str(edge.port), str(free_port())))
        done = subprocess.run(
            [*GUESTPASS, "edge", "--config", str(other)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 1
        assert "edge.db" in done.stderr
        assert str(edge.program.process.pid) in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        edge.program.stop()


def test_port_taken(tmp_path: Path) -> None:
    edge = EdgeProcess(tmp_path)
    try:
        folder = tmp_path / "other"
        folder.mkdir()
        (folder / "edge.toml").write_text(edge.config.read_text())
        done = subprocess.run(
            [*GUESTPASS, "edge", "--config", str(folder / "edge.toml"), "--json"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 1
        error = json.loads(done.stdout)["error"]
        assert error["code"] == "port_taken"
        assert str(edge.port) in error["message"]
        assert error["hint"]
    finally:
        edge.program.stop()
