"""Settings: every documented key loads, and every fault is one line that names the file, the key and the next step."""

from pathlib import Path

import pytest

from guestpass import config
from guestpass.config import Secret, duration, load_edge, load_gateway, nearest
from guestpass.errors import ConfigError

# As documented; the values that only later versions accept are named in the tests below.
EDGE = """
[edge]
listen = ["http://127.0.0.1:8080"]
admin_listen = "127.0.0.1:8081"
public_url = "http://localhost:8080"
share_domain = "localhost:8080"
state = "sqlite:///edge.db"
tls = { cert = "cert.pem", key = "key.pem" }
trusted_proxies = ["10.0.0.0/8", "::1/128"]
workers = 1
fast_lane = true
drain_seconds = 30
access_log = "-"
access_log_paths = false

[limits]
head_seconds = 30
head_bytes = 32768
body_progress_seconds = 60
body_bytes = 0
answer_seconds = 300
write_progress_seconds = 60
idle_seconds = 75
upgrade_idle_seconds = 3600
connections_per_client = 1024
streams_per_session = 1024
streams_per_share = 16384

[mail]
smtp = "smtp://user:password@host:587?tls=starttls"
from = "Guestpass <share@example.com>"

[[authenticate]]
use = "email-code"
[[authenticate]]
use = "oidc"
name = "google"
preset = "google"
client_id = "abc"
client_secret = { env = "GOOGLE_CLIENT_SECRET" }

[[revoke]]
use = "share-state"
[choose]
use = "random"
[[filter]]
use = "./office_hours.py:OfficeHours"
[[notify]]
use = "smtp"
[[observe]]
use = "audit-log"
"""

GATEWAY = """
[gateway]
name = "plant-a-1"
site = "plant-a"
edges = ["https://share.example.com"]
ca = "ca.pem"
key = "gateway.key"
tunnels = 2
http_proxy = "http://proxy:3128"
weight = 1
labels = { zone = "hall-3" }

[services.dashboards]
url = "http://127.0.0.1:3000"
paths = ["/**"]
methods = ["*"]
host_header = "upstream"
"""


@pytest.fixture
def write(tmp_path: Path):
    def to_file(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text, "utf-8")
        return path

    return to_file


def fault(load, path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = caught.value.message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert caught.value.exit_status == 2
    return message.removeprefix(f"{path}: ")


def test_every_documented_key_of_the_edge_loads(write):
    loaded = load_edge(write(EDGE))
    assert loaded.edge.listen == ("http://127.0.0.1:8080",)
    assert [str(network) for network in loaded.edge.trusted_proxies] == ["10.0.0.0/8", "::1/128"]
    assert loaded.mail is not None
    assert loaded.mail.sender == "Guestpass <share@example.com>"
    assert [plugin.use for plugin in loaded.authenticate] == ["email-code", "oidc"]
    assert loaded.authenticate[1].settings == {
        "preset": "google",
        "client_id": "abc",
        "client_secret": {"env": "GOOGLE_CLIENT_SECRET"},
    }
    assert [plugin.use for plugin in loaded.choose] == ["random"]
    assert loaded.database == loaded.folder / "edge.db"


def test_every_documented_key_of_the_gateway_loads(write):
    loaded = load_gateway(write(GATEWAY))
    assert loaded.gateway.labels == {"zone": "hall-3"}
    assert loaded.services["dashboards"].paths == ("/**",)
    assert loaded.resolve(loaded.gateway.key) == loaded.folder / "gateway.key"


def test_an_empty_edge_file_means_the_defaults(write):
    loaded = load_edge(write(""))
    assert loaded.edge.admin_listen == "127.0.0.1:8081"
    assert [plugin.use for plugin in loaded.authenticate] == ["email-code", "bearer-token"]
    assert [plugin.use for plugin in loaded.revoke] == ["share-state"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[edge]\nlisen = ["http://127.0.0.1:1"]', 'unknown key "edge.lisen"; did you mean "listen"?'),
        ("[edge]\ndrain-seconds = 3", 'unknown key "edge.drain-seconds"; did you mean "drain_seconds"?'),
        ("[edge]\ndrain = 3", 'unknown key "edge.drain"; did you mean "drain_seconds"?'),
        (
            '[edge]\ntls = { certificate = "a", key = "b" }',
            'unknown key "edge.tls.certificate"; did you mean "cert"?',
        ),
        ('[mail]\nsmpt = "smtp://h"\nfrom = "a@b"', 'unknown key "mail.smpt"; did you mean "smtp"?'),
        (
            '[mail]\nsmtp = "smtp://h"\nsender = "a@b"',
            'unknown key "mail.sender"; known keys: from, password, smtp',
        ),
        ('[[authenticat]]\nuse = "email-code"', 'unknown key "authenticat"; did you mean "authenticate"?'),
        ('[[authenticate]]\nuss = "email-code"', 'unknown key "authenticate.0.uss"; did you mean "use"?'),
        ("[[authenticate]]\npreset = 1", 'the key "authenticate.0.use" is missing'),
        ('public_url = "https://a.example"', 'unknown key "public_url"; it belongs under [edge]'),
        ("[edge]\nzzz = 1", 'unknown key "edge.zzz"; known keys: access_log, access_log_paths, admin'),
        ("[limits]\nhead = 3", 'unknown key "limits.head"; did you mean "head_bytes"?'),
        ("[limits]\nidle-seconds = 3", 'unknown key "limits.idle-seconds"; did you mean "idle_seconds"?'),
        (
            "[limits]\nstreams_per_sesion = 3",
            'unknown key "limits.streams_per_sesion"; did you mean "streams_per_session"?',
        ),
        ("connections_per_client = 3", 'unknown key "connections_per_client"; it belongs under [limits]'),
        ('[mail]\nfrom = "a@b"', 'the key "mail.smtp" is missing'),
        ('file = "other.toml"', 'unknown key "file"; did you mean "filter"?'),
    ],
)
def test_unknown_and_missing_keys_of_the_edge(write, text, says):
    assert fault(load_edge, write(text)).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '[gateway]\nname = "a"\nsite = "b"\nedge = ["https://e"]',
            'unknown key "gateway.edge"; did you mean "edges"?',
        ),
        (
            GATEWAY + 'host = "public"',
            'unknown key "services.dashboards.host"; did you mean "host_header"?',
        ),
        (
            '[gateway]\nname = "a"\nsite = "b"\nedges = ["https://e"]\n[service.x]\nurl = "http://h"',
            'unknown key "service"; did you mean "services"?',
        ),
        ('[services.url]\nurll = "http://h"', 'unknown key "services.url.urll"; did you mean "url"?'),
    ],
)
def test_unknown_keys_of_the_gateway(write, text, says):
    assert fault(load_gateway, write(text)).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('listen = ["http://0.0.0.0:80"]', 'or set insecure = true (key "edge.listen")'),
        ('listen = ["https://0.0.0.0:443"]', "https://0.0.0.0:443 needs tls"),
        (
            'state = "postgresql://db"',
            'this version stores in SQLite only: sqlite:///PATH (key "edge.state")',
        ),
        ('listen = ["tcp://127.0.0.1:1"]', "is not of the form http://HOST:PORT"),
        ('listen = ["http://127.0.0.1:99999"]', "Port out of range"),
        ('listen = "http://127.0.0.1:1"', 'Input should be a list (key "edge.listen")'),
        ('public_url = "https://a.example/path"', "is not of the form https://HOST[:PORT]"),
        ('public_url = "https://u:p@a.example"', "is not of the form https://HOST[:PORT]"),
        ('share_domain = "*.example.com"', "write it without the '*'"),
        ('share_domain = "example.com:x"', "is not of the form DOMAIN or DOMAIN:PORT"),
        ('admin_listen = "127.0.0.1"', "is not of the form HOST:PORT"),
        ("workers = 0", 'Input should be greater than or equal to 1 (key "edge.workers")'),
        ("workers = 65", 'Input should be less than or equal to 64 (key "edge.workers")'),
        ("drain_seconds = -1", 'Input should be greater than or equal to 0 (key "edge.drain_seconds")'),
        ('trusted_proxies = ["10.0.0.1/8"]', 'has host bits set (key "edge.trusted_proxies.0")'),
        ('api_key = "plain"', '(key "edge.api_key")'),
        ('api_key = { env = "A", file = "b" }', "a secret is either"),
    ],
)
def test_wrong_values(write, text, says):
    assert says in fault(load_edge, write(f"[edge]\n{text}"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the section [gateway] is missing"),
        ('[gateway]\nname = "a"', 'the key "gateway.site" is missing'),
        (GATEWAY.replace('"plant-a-1"', '"Plant A"'), "'Plant A' is not a name"),
        (GATEWAY.replace('["https://share.example.com"]', "[]"), "at least 1 item"),
        (
            GATEWAY.replace("https://share", "http://share"),
            "is plain HTTP on an address that is not loopback",
        ),
        (
            GATEWAY.replace("http://127.0.0.1:3000", "http://127.0.0.1:3000/x"),
            "a share's path is chosen by the share",
        ),
        (
            GATEWAY.replace("http://127.0.0.1:3000", "unix:app.sock"),
            "is not of the form unix:///path/to/socket",
        ),
        (
            GATEWAY.replace("http://127.0.0.1:3000", "ftp://h"),
            "a service is http://…, https://… or unix:///…",
        ),
        (GATEWAY.replace("[services.dashboards]", '[services."a b"]'), "is not a name"),
    ],
)
def test_wrong_values_of_the_gateway(write, text, says):
    assert says in fault(load_gateway, write(text))


def test_insecure_admits_plain_http(write):
    assert load_edge(write('[edge]\ninsecure = true\nlisten = ["http://0.0.0.0:80"]')).edge.insecure


def test_a_missing_file_and_broken_toml(tmp_path, write):
    assert fault(load_edge, tmp_path / "absent.toml") == "there is no such file"
    assert "line 2" in fault(load_edge, write("[edge]\nlisten = = []\n"))
    assert fault(load_edge, tmp_path).startswith("Is a directory")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "not valid TOML" in fault(load_edge, tmp_path / "binary.toml")


def test_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("GUESTPASS_TEST_SECRET", " hush\n")
    assert Secret(env="GUESTPASS_TEST_SECRET").read(tmp_path) == "hush"
    (tmp_path / "secret").write_text("quiet\n")
    assert Secret(file=Path("secret")).read(tmp_path) == "quiet"
    monkeypatch.delenv("GUESTPASS_TEST_SECRET")
    for secret, says in [
        (Secret(env="GUESTPASS_TEST_SECRET"), "GUESTPASS_TEST_SECRET is not set"),
        (Secret(file=Path("absent")), "absent: No such file or directory"),
    ]:
        with pytest.raises(ConfigError, match=says):
            secret.read(tmp_path)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        Secret(file=Path("empty")).read(tmp_path)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("12h", 43_200), ("7d", 604_800), (" 1d ", 86_400)]
)
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "7", "d", "0s", "-1d", "1.5h", "1w", "1d2h", "١d", "1 d", "9999999999d"]
)
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="is not a duration"):
        duration(text)


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("host", ["url", "host_header", "paths"], "host_header"),
        ("header", ["url", "host_header"], "host_header"),
        ("lables", ["labels", "tunnels"], "labels"),
        ("service_url", ["url", "paths"], "url"),
        ("ob", ["notify", "observe"], None),
        ("zebra", ["url", "paths"], None),
        ("x", [], None),
    ],
)
def test_the_nearest_name(name, known, meant):
    assert nearest(name, known) == meant


def test_settings_are_frozen(write):
    loaded = load_edge(write(EDGE))
    with pytest.raises(ValueError, match="frozen"):
        loaded.edge.workers = 2


def test_known_keys_leave_out_what_no_file_holds():
    assert "file" not in config.known_keys(config.EdgeConfig, [])
    assert "from" in config.known_keys(config.EdgeConfig, ["mail"])
