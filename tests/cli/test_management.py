"""The management commands against a real edge."""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

START_SECONDS = 90.0


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    """What `guestpass up` says of itself; the application is not there, which no command minds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "guestpass", "up", "http://127.0.0.1:1", "--to", "a@example.org"]
        + ["--port", "0", "--json"],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with process:
        yield json.loads(process.stdout.readline())
        process.terminate()


@pytest.fixture
def command(guestpass, edge):
    """A command with the edge and its key in the environment; its JSON."""

    def run(*arguments: str, status: int = 0) -> dict:
        env = {"GUESTPASS_EDGE": edge["edge"], "GUESTPASS_API_KEY": edge["api_key"]}
        result = guestpass(*arguments, "--json", env=env)
        assert result.status == status, result
        return result.json

    return run


@pytest.fixture
def share(command):
    made = command("share", "create", "--service", "local/app", "--to", "b@example.org", "--no-mail")
    yield made
    command("share", "delete", made["id"])


def test_a_share_from_creation_to_deletion(command, edge):
    made = command(
        *("share", "create", "--service", "local/app", "--path", "/line-3", "--only", "--expires", "12h"),
        *("--to", "B@example.org,c@example.org", "--to", "d@example.org", "--max-sessions", "2"),
        *("--name", 'Line 3, "hall" 🎈', "--message", "Have a look"),
    )
    assert made["scope"] == ["* /line-3/**"]
    assert made["name"] == 'Line 3, "hall" 🎈'
    assert sorted(made["links"]) == ["b@example.org", "c@example.org", "d@example.org"]
    assert all(link.startswith(f"{edge['edge']}/s/") for link in made["links"].values())
    assert "notice" not in made
    ahead = (
        datetime.fromisoformat(made["expires"]) - datetime.fromisoformat(made["created"])
    ).total_seconds()
    assert ahead == pytest.approx(12 * 3600, abs=5)

    assert made["id"] in [share["id"] for share in command("share", "list")["shares"]]
    assert command("share", "show", made["id"])["max_sessions"] == 2

    changed = command(
        *(
            "share",
            "update",
            made["id"],
            "--expires",
            "never",
            "--max-sessions",
            "unlimited",
            "--whole-service",
        ),
        *("--remove", "c@example.org", "--add", "e@example.org", "--message", ""),
    )
    assert (changed["expires"], changed["max_sessions"], changed["scope"], changed["message"]) == (
        None,
        None,
        [],
        "",
    )
    assert [r["email"] for r in changed["recipients"]] == ["b@example.org", "d@example.org", "e@example.org"]

    assert command("share", "update", made["id"], "--sign-in", "email-code")["sign_in"] == ["email-code"]
    assert command("share", "update", made["id"], "--sign-in", "any")["sign_in"] == []

    gone = command("share", "delete", made["id"])
    assert gone["id"] == made["id"]
    assert set(gone["revoked"]) == {"sessions", "streams", "took_ms"}
    assert made["id"] not in [share["id"] for share in command("share", "list")["shares"]]
    ended = next(share for share in command("share", "list", "--all")["shares"] if share["id"] == made["id"])
    assert ended["state"] == "deleted"


def test_the_whole_service_is_said_to_be_shared(guestpass, edge, command, share):
    assert "whole service" in share["notice"]
    env = {"GUESTPASS_EDGE": edge["edge"], "GUESTPASS_API_KEY": edge["api_key"]}
    arguments = ("share", "create", "--service", "local/app", "--to", "b@example.org")
    text = guestpass(*arguments, env=env).out
    assert "The whole service local/app is shared; limit it with --only or --scope." in text


def test_a_service_that_nobody_offers(guestpass, edge, command):
    assert "warning" not in command(
        "share", "create", "--service", "local/app", "--to", "b@example.org", "--no-mail"
    )
    env = {"GUESTPASS_EDGE": edge["edge"], "GUESTPASS_API_KEY": edge["api_key"]}
    arguments = ("share", "create", "--service", "local/nosuch", "--to", "b@example.org", "--no-mail")
    result = guestpass(*arguments, env=env)
    assert result.status == 0
    assert "warning: No gateway that is connected offers local/nosuch (offered now: local/app)." in result.err


def test_tokens_and_links(command, share):
    token = command("share", "token", share["id"], "--to", "b@example.org", "--expires", "1h")
    assert token["token"].startswith("gp_")
    assert token["expires"]
    link = command("share", "link", share["id"], "--to", "b@example.org")["link"]
    assert link != share["links"]["b@example.org"]
    resent = command("share", "resend", share["id"], "--to", "b@example.org")
    assert resent["email"] == "b@example.org"


def test_what_people_read(guestpass, edge, share):
    env = {"GUESTPASS_EDGE": edge["edge"], "GUESTPASS_API_KEY": edge["api_key"]}
    shown = guestpass("share", "show", share["id"], env=env)
    assert shown.status == 0
    assert "none: the whole service" in shown.out
    assert "b@example.org" in shown.out
    listed = guestpass("share", "list", env=env).out
    assert listed.startswith("ID ")
    assert share["id"] in listed
    assert guestpass("gateway", "list", env=env).out.splitlines()[1].startswith("local/local-1  connected")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("share", "show", "nothing-like-it"), "share_not_found"),
        (("share", "delete", "../gateways"), "share_not_found"),
        (("share", "create", "--service", "local/app", "--to", "alice"), "email_invalid"),
        (("gateway", "remove", "nobody"), "gateway_not_found"),
    ],
)
def test_refusals(command, arguments, code):
    assert command(*arguments, status=1)["error"]["code"] == code


def test_a_wrong_key(guestpass, edge):
    result = guestpass("share", "list", "--edge", edge["edge"], "--api-key", "gpk_wrong", "--json")
    assert (result.status, result.code) == (1, "api_key_wrong")


def test_the_key_from_a_file_and_from_standard_input(guestpass, edge, tmp_path):
    path = tmp_path / "key"
    path.write_text(edge["api_key"] + "\n")
    for source, given in ((str(path), ""), ("-", edge["api_key"])):
        result = guestpass("share", "list", "--edge", edge["edge"], "--api-key-file", source, input=given)
        assert result.status == 0


def enroll(guestpass, edge, token: str, *arguments: str, folder: Path):
    return guestpass(
        *("gateway", "enroll", "--edge", edge["edge"], "--join-token-file", "-", "--json", *arguments),
        input=token,
        cwd=folder,
    )


def test_gateways_from_enrolment_to_removal(guestpass, command, edge, tmp_path):
    made = command("gateway", "token", "--site", "plant")
    token = made["join_token"]
    arguments = ("--name", "plant-1", "--config", "gateway.toml", "--service", "dash=http://127.0.0.1:3000")
    done = enroll(guestpass, edge, token, *arguments, folder=tmp_path)
    assert done.status == 0, done
    assert done.json["site"] == "plant"
    settings = (tmp_path / "gateway.toml").read_text()
    assert "[services.dash]" in settings
    assert (tmp_path / "gateway.key").stat().st_mode & 0o777 == 0o600

    # The same key again is the same gateway; the answer may have been lost.
    again = enroll(guestpass, edge, token, "--config", "gateway.toml", folder=tmp_path)
    assert again.status == 0, again
    assert (tmp_path / "gateway.toml").read_text() == settings

    # Another one may not use it.
    other = enroll(guestpass, edge, token, "--name", "plant-2", "--key", "other.key", folder=tmp_path)
    assert (other.status, other.code) == (1, "join_token_rejected")
    assert other.json["error"]["hint"]

    # Nor may another key take the name.
    fresh = command("gateway", "token", "--site", "plant")["join_token"]
    taken = enroll(guestpass, edge, fresh, "--name", "plant-1", "--key", "other.key", folder=tmp_path)
    assert taken.status == 1
    assert "plant-1" in taken.json["error"]["message"]

    states = {f"{g['site']}/{g['name']}": g["state"] for g in command("gateway", "list")["gateways"]}
    assert states == {"local/local-1": "service_down", "plant/plant-1": "not_connected"}
    assert command("gateway", "remove", "plant-1")["site"] == "plant"
    assert "plant/plant-1" not in [f"{g['site']}/{g['name']}" for g in command("gateway", "list")["gateways"]]


def test_enrolment_writes_nothing_over(guestpass, command, edge, tmp_path):
    token = command("gateway", "token", "--site", "plant")["join_token"]
    path = tmp_path / "gateway.toml"
    path.write_text('[gateway]\nname = "x"\nsite = "other"\nedges = ["http://localhost:1"]\n')
    before = path.read_text()
    result = enroll(guestpass, edge, token, "--config", "gateway.toml", folder=tmp_path)
    assert (result.status, result.code) == (2, "config_invalid")
    assert 'was for "plant"' in result.json["error"]["message"]
    assert path.read_text() == before
    command("gateway", "remove", "plant/x")


def test_doctor_looks_at_the_gateways(command, edge):
    found = command("doctor")
    checks = {check["name"]: check["status"] for check in found["checks"]}
    assert checks["WebSocket upgrade"] == "ok"
    assert checks["clock"] == "ok"
    assert checks["API key"] == "ok"
    assert checks["gateway local/local-1"] == "warn"  # its application is down


def test_doctor_goes_the_way_of_the_tunnel(guestpass, edge):
    result = guestpass("doctor", "--edge", edge["tunnel"], "--ca", edge["ca"], "--json")
    checks = {check["name"]: check["status"] for check in result.json["checks"]}
    assert (checks["TLS"], checks["WebSocket upgrade"]) == ("ok", "ok")
    without = guestpass("doctor", "--edge", edge["tunnel"], "--json")
    assert without.status == 1
    assert without.json["checks"][-1]["name"] == "TLS"
