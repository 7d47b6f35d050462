"""`guestpass edge` and `guestpass gateway` as a service manager runs them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from guestpass.local_ca import write_certificates

START_SECONDS = 60.0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


@contextlib.contextmanager
def daemon(*arguments: str, env: dict[str, str] | None = None):
    """A process, and its ready line with --json."""
    process = subprocess.Popen(
        [sys.executable, "-m", "guestpass", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
    )
    timer = threading.Timer(START_SECONDS, process.kill)
    timer.start()
    try:
        yield process, process.stdout.readline()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process: subprocess.Popen, number: int = signal.SIGTERM) -> tuple[int, str]:
    process.send_signal(number)
    _, log = process.communicate(timeout=30)
    return process.returncode, log


@pytest.fixture
def edge_toml(tmp_path):
    one, two, admin = free_ports(3)
    write_certificates(tmp_path, ["localhost", "127.0.0.1"])
    path = tmp_path / "edge.toml"
    path.write_text(
        f'[edge]\nlisten = ["http://127.0.0.1:{one}", "https://127.0.0.1:{two}"]\n'
        f'admin_listen = "127.0.0.1:{admin}"\npublic_url = "http://localhost:{one}"\n'
        f'share_domain = "localhost:{one}"\ntls = {{ cert = "cert.pem", key = "key.pem" }}\ndrain_seconds = 1\n'
    )
    return path


def test_the_edge_is_ready_reloads_and_ends(edge_toml, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with daemon("edge", "--config", str(edge_toml), "--json", env=env) as (process, line):
            facts = json.loads(line)
            assert {"edge", "listen", "metrics", "api", "outbox", "pid", "api_key_file"} <= set(facts)
            assert facts["pid"] == process.pid
            assert manager.recv(1000).startswith(b"READY=1")
            with urllib.request.urlopen(
                facts["metrics"].replace("/metrics", "/healthz"), timeout=10
            ) as answer:
                assert answer.status == 200
            key = tmp_path / "api.key"
            assert facts["api_key_file"] == str(key)
            assert key.stat().st_mode & 0o777 == 0o600
            process.send_signal(signal.SIGHUP)
            while "reloaded" not in (logged := process.stderr.readline()):
                assert logged
            status, log = ended(process)
    assert status == 0
    assert key.read_text().strip() not in log


def test_what_the_edge_starts_with_is_not_looked_at_for_garbage_again(edge_toml, tmp_path):
    """A full collection of the garbage collector stopped everybody for a tenth of a second."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, gc, sys\natexit.register(lambda: print('frozen', gc.get_freeze_count(), file=sys.stderr))\n"
    )
    env = {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))}
    with daemon("edge", "--config", str(edge_toml), "--json", env=env) as (process, _line):
        _, log = ended(process)
    assert int(log.split()[log.split().index("frozen") + 1]) > 50_000


def test_the_edge_says_so_to_people(edge_toml):
    with daemon("edge", "--config", str(edge_toml)) as (process, line):
        assert line.startswith("The edge http://localhost:")
        assert ended(process, signal.SIGINT)[0] == 0


def test_a_taken_port(guestpass, edge_toml):
    port = int(edge_toml.read_text().partition("http://127.0.0.1:")[2].partition('"')[0])
    with socket.create_server(("127.0.0.1", port)):
        result = guestpass("edge", "--config", str(edge_toml), "--json")
    assert (result.status, result.code) == (1, "port_taken")
    assert str(port) in result.json["error"]["message"]
    assert result.json["error"]["hint"]


def test_a_locked_database(guestpass, edge_toml, tmp_path):
    with daemon("edge", "--config", str(edge_toml), "--json") as (process, line):
        assert json.loads(line)
        one, admin = free_ports(2)
        other = tmp_path / "other.toml"
        other.write_text(f'[edge]\nlisten = ["http://127.0.0.1:{one}"]\nadmin_listen = "127.0.0.1:{admin}"\n')
        result = guestpass("edge", "--config", str(other), "--json")
        assert (result.status, result.code) == (1, "store_locked")
        assert str(process.pid) in result.json["error"]["message"]
        assert ended(process)[0] == 0


@pytest.mark.parametrize(
    ("was", "becomes", "code", "says"),
    [
        ("cert.pem", "absent.pem", "config_invalid", "absent.pem"),
        ('"key.pem"', '"ca.pem"', "config_invalid", "edge.tls"),
        ("drain_seconds", "drain-seconds", "config_invalid", 'did you mean "drain_seconds"?'),
    ],
)
def test_bad_configurations(guestpass, edge_toml, was, becomes, code, says):
    edge_toml.write_text(edge_toml.read_text().replace(was, becomes))
    result = guestpass("edge", "--config", str(edge_toml), "--json")
    assert (result.status, result.code) == (2, code)
    message = result.json["error"]["message"]
    assert message.startswith(str(edge_toml))
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('smtp = "smtp://h"\nfrom = "x"', '(key "mail.from")'),
        ('smtp = "http://h"\nfrom = "a@example.org"', "[mail]: the mail server is not of the form smtp://"),
        ('smtp = "smtp://u@h"\nfrom = "a@example.org"\npassword = { env = "NOPE" }', '(key "mail.password")'),
    ],
)
def test_bad_mail(guestpass, edge_toml, lines, says):
    edge_toml.write_text(edge_toml.read_text() + f"[mail]\n{lines}\n")
    result = guestpass("edge", "--config", str(edge_toml), "--json")
    assert (result.status, result.code) == (2, "config_invalid")
    message = result.json["error"]["message"]
    assert message.startswith(f"{edge_toml}: ")
    assert says in message
    assert "notify" not in message


def test_a_secret_that_is_not_there(guestpass, edge_toml):
    edge_toml.write_text(edge_toml.read_text() + 'api_key = { file = "absent" }\n')
    message = guestpass("edge", "--config", str(edge_toml), "--json").json["error"]["message"]
    assert message.startswith(f"{edge_toml}: ")
    assert '(key "edge.api_key")' in message


def test_a_plugin_in_the_wrong_section(guestpass, edge_toml):
    edge_toml.write_text(edge_toml.read_text() + '[[revoke]]\nuse = "email-code"\n')
    result = guestpass("edge", "--config", str(edge_toml), "--json")
    assert (result.status, result.code) == (2, "plugin_invalid")


def test_a_gateway_without_its_key(guestpass, tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_text('[gateway]\nname = "a"\nsite = "b"\nedges = ["http://127.0.0.1:1"]\n')
    result = guestpass("gateway", "--config", str(path), "--json")
    assert (result.status, result.code) == (2, "config_invalid")
    assert "enroll" in result.json["error"]["hint"]


def test_enrolment_at_nothing(guestpass, tmp_path):
    port = free_ports(1)[0]
    result = guestpass(
        *("gateway", "enroll", "--edge", f"http://127.0.0.1:{port}", "--name", "a", "--json"),
        env={"GUESTPASS_JOIN_TOKEN": "gpj_x"},
        cwd=tmp_path,
    )
    assert (result.status, result.code) == (1, "edge_unreachable")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--edge", "http://h"), "--name is missing"),
        (("--edge", "http://h", "--name", "a"), "no join token"),
        (("--edge", "http://h", "--name", "a", "--join-token-file", "absent"), "No such file"),
        (("--edge", "http://h", "--name", "a", "--join-token-file", "-"), "standard input is empty"),
        (("--name", "a", "--join-token-file", "-"), "which edge?"),
        (("--edge", "http://h", "--name", "a", "--service", "x"), "is not of the form NAME=URL"),
        (("--edge", "http://h", "--name", "a", "--service", "x=ftp://y"), "a service is http://"),
        (("--edge", "http://h", "--name", "a", "--config", "absent/gateway.toml"), "there is no such folder"),
        (("--name", "b", "--config", "there.toml"), "--name is b, but there.toml says a"),
        (("--config", "there.toml", "--service", "x=http://y"), "there.toml exists and is not changed"),
    ],
)
def test_usage_of_enrolment(guestpass, tmp_path, arguments, says):
    (tmp_path / "there.toml").write_text(
        '[gateway]\nname = "a"\nsite = "b"\nedges = ["http://127.0.0.1:1"]\n'
    )
    result = guestpass("gateway", "enroll", *arguments, "--json", cwd=tmp_path)
    assert result.status == 2
    assert says in result.json["error"]["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["there.toml"]
