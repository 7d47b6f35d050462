"""`guestpass up` whole: real processes, a real application, and everything gone afterwards."""

import contextlib
import html
import http.client
import http.server
import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlencode, urljoin, urlsplit

import psutil
import pytest

from guestpass import config
from guestpass.cli.up import MAX_WORKERS

START_SECONDS = 90.0

# The JSON line, which scripts read.
KEYS = {
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


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"hello from {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def application():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


class Up:
    """`guestpass up … --json`, until the line is there."""

    def __init__(self, *arguments: str, json_line: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "guestpass", "up", *arguments, *(["--json"] if json_line else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            # A terminal's Ctrl-C reaches the group; ours must not be the test's.
            start_new_session=True,
        )
        self.lines: list[str] = []

    def line(self) -> str:
        timer = threading.Timer(START_SECONDS, self.process.kill)
        timer.start()
        try:
            text = self.process.stdout.readline()
        finally:
            timer.cancel()
        assert text, self.process.stderr.read()
        return text

    def facts(self) -> dict:
        return json.loads(self.line())

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        return self.finish()

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextlib.contextmanager
def running(*arguments: str, **options):
    up = Up(*arguments, **options)
    try:
        yield up
    finally:
        if up.process.poll() is None:
            up.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                up.process.wait(30)
        if up.process.poll() is None:
            up.process.kill()
        up.process.stdout.close()
        up.process.stderr.close()
        up.process.wait()


def get(url: str, token: str | None = None, *, ca: str | None = None) -> tuple[int, bytes]:
    """Names below localhost are this machine, which Python's resolver does not know."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=30)
    if ca is not None:
        context = ssl.create_default_context(cafile=ca)
        plain = socket.create_connection(("127.0.0.1", parts.port), timeout=30)
        connection.sock = context.wrap_socket(plain, server_hostname=parts.hostname)
    headers = {"Host": parts.netloc, **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        connection.request("GET", parts.path or "/", headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_json_line_and_a_clean_end(application):
    with running(
        application, "--to", "Alice@Example.org", "--port", "0", "--path", "/x", "--gateways", "2"
    ) as up:
        facts = up.facts()
        assert set(facts) == KEYS
        assert facts["origin"].startswith(f"http://{facts['share']}.localhost:")
        assert facts["link"].startswith(f"{facts['edge']}/s/")
        assert facts["api"] == f"{facts['edge']}/api/v1"
        assert facts["tunnel"].startswith("https://localhost:")
        assert facts["token"].startswith("gp_")
        assert len(facts["pids"]["edge"]) == 1
        assert len(facts["pids"]["gateways"]) == 2
        folder = Path(facts["outbox"]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert ssl.create_default_context(cafile=facts["ca"]).cert_store_stats()["x509_ca"] == 1

        assert get(f"{facts['origin']}/anything", facts["token"]) == (200, b"hello from /anything")
        assert get(f"{facts['origin']}/anything")[0] == 401
        assert b"guestpass_requests_total" in get(facts["metrics"])[1]
        mails = [path.read_text() for path in Path(facts["outbox"]).glob("*.eml")]
        assert any(facts["link"] in text.replace("=\n", "") for text in mails)

        status, out, err = up.end(signal.SIGINT)
    assert (status, out, err) == (0, "", "")
    assert not folder.exists()
    assert all(gone(pid) for pid in (*facts["pids"]["edge"], *facts["pids"]["gateways"]))


def test_several_workers(application, tmp_path):
    """Each is a process; visitors notice nothing, and all of them end."""
    path = tmp_path / "edge.toml"
    path.write_text("[edge]\nworkers = 3\n")
    arguments = ("--to", "a@example.org", "--port", "0", "--workers", "2", "--config", str(path))
    with running(application, *arguments) as up:
        facts = up.facts()
        supervisor, *workers = facts["pids"]["edge"]
        assert len(workers) == 2
        assert {child.pid for child in psutil.Process(supervisor).children()} == set(workers)
        for _ in range(4):
            assert get(f"{facts['origin']}/anything", facts["token"]) == (200, b"hello from /anything")
        assert b"guestpass_workers 2.0" in get(facts["metrics"])[1]
        status, out, err = up.end(signal.SIGINT)
    assert (status, out, err) == (0, "", "")
    assert all(gone(pid) for pid in (supervisor, *workers, *facts["pids"]["gateways"]))


def test_as_many_workers_as_edge_toml_allows():
    assert MAX_WORKERS == config.MAX_WORKERS


def test_only_a_path_is_shared(application):
    with running(application, "--to", "a@example.org", "--port", "0", "--path", "/x", "--only") as up:
        facts = up.facts()
        assert get(f"{facts['origin']}/x/y", facts["token"])[0] == 200
        assert get(f"{facts['origin']}/y", facts["token"])[0] == 403


def test_https(application):
    with running(application, "--to", "a@example.org", "--port", "0", "--https") as up:
        facts = up.facts()
        assert facts["edge"].startswith("https://localhost:")
        assert facts["origin"].startswith(f"https://{facts['share']}.share.localhost:")
        assert get(f"{facts['origin']}/x", facts["token"], ca=facts["ca"]) == (200, b"hello from /x")
        assert get(facts["link"], ca=facts["ca"])[0] == 200


class Visitor:
    """Cookies by origin, redirects followed; forms are submitted with what they hold."""

    def __init__(self) -> None:
        self.cookies: dict[str, dict[str, str]] = {}
        self.url = self.page = ""

    def ask(self, method: str, url: str, fields: dict[str, str] | None = None) -> None:
        for _ in range(10):
            parts = urlsplit(urljoin(self.url, url))
            jar = self.cookies.setdefault(parts.netloc, {})
            connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=30)
            headers = {"Host": parts.netloc, "Cookie": "; ".join(f"{k}={v}" for k, v in jar.items())}
            if fields is not None:
                headers |= {
                    "Origin": f"http://{parts.netloc}",
                    "Content-Type": "application/x-www-form-urlencoded",
                }
            target = parts.path + (f"?{parts.query}" if parts.query else "")
            headers |= {"Accept": "text/html", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
            connection.request(
                method, target, body=urlencode(fields) if fields is not None else None, headers=headers
            )
            response = connection.getresponse()
            self.page, self.url = response.read().decode(), parts.geturl()
            for cookie in response.headers.get_all("Set-Cookie", []):
                name, _, value = cookie.partition(";")[0].partition("=")
                jar[name] = value
            connection.close()
            if response.status != 303:
                assert response.status == 200, (response.status, self.page)
                return
            method, url, fields = "GET", response.headers["Location"], None

    def submit(self, **fields: str) -> None:
        (action,) = re.findall(r'<form method="post" action="([^"]+)"', self.page)[:1]
        hidden = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', self.page))
        self.ask("POST", html.unescape(action), {**hidden, **fields})


def test_the_code_is_printed_and_lets_its_recipient_in(application):
    with running(application, "--to", "a@example.org", "--port", "0", "--path", "/x", json_line=False) as up:
        lines = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(up.line())
        link = next(line.split()[-1] for line in lines if line.startswith("Link for"))
        visitor = Visitor()
        visitor.ask("GET", link)
        visitor.submit()
        visitor.submit(email="a@example.org")
        said = up.line()
        assert said.startswith("Sign-in code for a@example.org: ")
        visitor.submit(code=said.rpartition(": ")[2].strip())
        assert visitor.page == "hello from /x"


def test_people_read_what_is_shared_and_where(application):
    with running(application, "--to", "a@example.org,b@example.org", "--port", "0", json_line=False) as up:
        text = ""
        while "Ctrl-C" not in text:
            text += up.line()
        assert "whole application" in text
        assert "Link for a@example.org" in text
        assert "Link for b@example.org" in text
        status, _, err = up.end()
    assert (status, err) == (0, "")


def test_an_application_that_is_not_there_yet():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with running(url, "--to", "a@example.org", "--port", "0") as up:
            facts = up.facts()
            assert get(f"{facts['origin']}/", facts["token"])[0] == 502
            _, _, err = up.end()
    assert f"warning: nothing answers at {url} yet" in err


def test_a_gateway_that_dies_ends_everything(application):
    with running(application, "--to", "a@example.org", "--port", "0") as up:
        facts = up.facts()
        os.kill(facts["pids"]["gateways"][0], signal.SIGKILL)
        status, _, err = up.finish()
    assert status == 1
    assert "the gateway local-1 ended by itself (status -9)" in err
    assert gone(facts["pids"]["edge"][0])
    assert not Path(facts["outbox"]).parent.exists()


def test_when_it_is_killed_its_parts_end(application):
    with running(application, "--to", "a@example.org", "--port", "0") as up:
        facts = up.facts()
        up.process.kill()
        up.process.wait()
        pids = (*facts["pids"]["edge"], *facts["pids"]["gateways"])
        deadline = time.monotonic() + 30
        while not all(gone(pid) for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    for path in sorted(Path(facts["outbox"]).parent.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Path(facts["outbox"]).parent.rmdir()


def test_a_taken_port(guestpass, application):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = guestpass("up", application, "--to", "a@example.org", "--port", str(port), "--json")
    assert result.status == 1
    assert result.code == "port_taken"
    assert f"port {port}" in result.json["error"]["message"]
    assert "--port" in result.json["error"]["hint"]


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (("ftp://127.0.0.1", "--to", "a@example.org"), "usage", 2),
        (("127.0.0.1:3000", "--to", "a@example.org"), "usage", 2),
        (("http://127.0.0.1:x", "--to", "a@example.org"), "usage", 2),
        (("http://127.0.0.1:1/x", "--path", "/y", "--to", "a@example.org"), "usage", 2),
        (("http://127.0.0.1:1", "--only", "--to", "a@example.org"), "usage", 2),
        (("http://127.0.0.1:1", "--scope", "GET x", "--to", "a@example.org"), "invalid", 1),
        (("http://127.0.0.1:1", "--path", "/a/../b", "--to", "a@example.org"), "invalid", 1),
        (("http://127.0.0.1:1", "--to", "alice"), "email_invalid", 1),
        (("http://127.0.0.1:1", "--to", " , "), "usage", 2),
        (("http://127.0.0.1:1", "--to", "a@example.org", "--workers", "65"), "usage", 2),
        (("http://127.0.0.1:1", "--to", "a@example.org", "--config", "/absent.toml"), "config_invalid", 2),
    ],
)
def test_bad_arguments(guestpass, arguments, code, status):
    result = guestpass("up", *arguments, "--json")
    assert (result.code, result.status) == (code, status)
    assert guestpass("up", *arguments).err.startswith("guestpass: ")


def test_a_plugin_that_is_not_there(guestpass, application, tmp_path):
    path = tmp_path / "edge.toml"
    path.write_text('[[authenticate]]\nuse = "e-mail-code"\n')
    result = guestpass(
        "up", application, "--to", "a@example.org", "--port", "0", "--config", str(path), "--json"
    )
    assert result.status == 1
    assert result.code == "plugin_invalid"
    assert str(path) in result.json["error"]["message"]
    assert "email-code" in result.json["error"]["hint"]


def test_a_plugin_of_ones_own(application, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from guestpass.plugin import Denied, RequestContext, RequestFilter\n\n\n"
        "class NoSecrets(RequestFilter):\n"
        "    async def on_request(self, request: RequestContext) -> None:\n"
        "        if request.path == '/secret':\n"
        "            raise Denied('Not that one.')\n"
    )
    tmp_path.chmod(0o755)
    path = tmp_path / "edge.toml"
    path.write_text('[[filter]]\nuse = "./mine.py:NoSecrets"\n')
    with running(application, "--to", "a@example.org", "--port", "0", "--config", str(path)) as up:
        facts = up.facts()
        assert get(f"{facts['origin']}/open", facts["token"])[0] == 200
        assert get(f"{facts['origin']}/secret", facts["token"])[0] == 403
