"""The pieces of `guestpass up` that need no processes."""

import email.policy
import socket
import tomllib
from datetime import UTC, date, datetime, time
from email.message import EmailMessage

import pytest

from guestpass.cli.local import _free_port, new_codes, toml, user_sections
from guestpass.errors import ConfigError, PortTaken


@pytest.mark.parametrize(
    "settings",
    [
        {
            "edge": {
                "listen": ["http://127.0.0.1:1", "http://[::1]:1"],
                "fast_lane": False,
                "drain_seconds": 1.5,
            }
        },
        {"a": {'quote"d key': 'back\\slash "quotes" \n\t\x7f\x00 \u2028 ü 🎈'}},
        {
            "authenticate": [{"use": "x", "secret": {"env": "A"}, "numbers": [1, -2, 3e300], "on": True}],
            "empty": {},
        },
        {"when": datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC), "day": date(2030, 1, 2), "at": time(9, 30)},
        {"infinite": float("inf"), "list": []},
    ],
)
def test_toml_is_read_back(settings):
    assert tomllib.loads(toml(settings)) == settings


def test_sections_of_the_users_file_as_seen_from_elsewhere(tmp_path):
    path = tmp_path / "edge.toml"
    path.write_text(
        '[edge]\nowner = "Me"\n[mail]\nsmtp = "smtp://h"\nfrom = "a@b.c"\npassword = { file = "secret" }\n'
        '[[authenticate]]\nuse = "./mine.py:Mine"\n[[authenticate]]\nuse = "email-code"\nhint = "../x"\n'
    )
    assert user_sections(path) == {
        "edge": {"owner": "Me"},
        "mail": {"smtp": "smtp://h", "from": "a@b.c", "password": {"file": str(tmp_path / "secret")}},
        "authenticate": [
            {"use": str(tmp_path / "mine.py:Mine")},
            {"use": "email-code", "hint": f"{tmp_path}/../x"},
        ],
    }


@pytest.mark.parametrize(
    "line",
    [
        'listen = ["http://127.0.0.1:1"]',
        'state = "sqlite:///x"',
        'public_url = "http://x"',
        "fast_lane = true",
    ],
)
def test_keys_that_up_sets_are_refused(tmp_path, line):
    path = tmp_path / "edge.toml"
    path.write_text(f"[edge]\n{line}\n")
    with pytest.raises(ConfigError, match=f'sets "edge.{line.split()[0]}" itself'):
        user_sections(path)


def test_faults_of_the_users_file_are_found_before_anything_starts(tmp_path):
    path = tmp_path / "edge.toml"
    path.write_text('[[autenticate]]\nuse = "x"\n')
    with pytest.raises(ConfigError, match="did you mean"):
        user_sections(path)


def test_ports():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {port} is taken"):
            _free_port(port, ["127.0.0.1"], required=True)
        assert _free_port(port, ["127.0.0.1"]) != port
    assert _free_port(port, ["127.0.0.1"], required=True) == port
    assert _free_port(port, ["127.0.0.1"], taken={port}) != port


def mail(to: str, text: str) -> bytes:
    message = EmailMessage()
    message["To"] = to
    message.set_content(text)
    return message.as_bytes(policy=email.policy.SMTP)


def test_codes_in_the_outbox(tmp_path):
    seen: set[str] = set()
    outbox = tmp_path / "outbox"
    assert new_codes(outbox, seen) == []
    outbox.mkdir()
    (outbox / "1-invitation-x.eml").write_bytes(mail("a@example.org", "    1111 2222\n"))
    (outbox / "2-code-x.eml").write_bytes(
        mail(
            "a@example.org", "Your code to open “12345678”:\n\n    1234 5678\n\nIt is good for 10 minutes.\n"
        )
    )
    (outbox / ".3-code-x.eml.part").write_bytes(b"not yet")
    assert new_codes(outbox, seen) == ["Sign-in code for a@example.org: 1234 5678"]
    assert new_codes(outbox, seen) == []
    (outbox / "4-code-y.eml").write_bytes(mail("b@example.org", "\n    0000 0001\n"))
    assert new_codes(outbox, seen) == ["Sign-in code for b@example.org: 0000 0001"]
