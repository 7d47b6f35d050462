"""Every command: its help, its usage errors, its promise of one JSON object."""

import argparse
import array
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios

import psutil
import pytest
from support.programs import wait_until

import guestpass as package
from guestpass.cli import build_parser


def commands(parser: argparse.ArgumentParser, names: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and sub-command, as what is typed after `guestpass`."""
    found = [names]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                found += commands(child, (*names, name))
    return found


ALL = commands(build_parser())

# What others script against; never renamed.
CONTRACT = [
    "up",
    "edge",
    "gateway",
    "gateway enroll",
    "gateway token",
    "gateway list",
    "gateway remove",
    "share create",
    "share list",
    "share show",
    "share update",
    "share delete",
    "share token",
    "plugin list",
    "plugin show",
    "doctor",
    "version",
]


@pytest.mark.parametrize("command", CONTRACT)
def test_the_documented_commands_exist(command):
    assert tuple(command.split()) in ALL


@pytest.mark.parametrize("names", ALL, ids=" ".join)
def test_help(names, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([*names, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert re.search(r"^examples?:\n  guestpass ", text, re.MULTILINE), "an example"
    assert "--json" in text
    purpose = text.split("\n\n")[1].splitlines()[0]
    assert purpose.endswith("."), "one line that says what it is for"


def test_help_is_a_success(guestpass):
    result = guestpass("share", "create", "--help")
    assert result.status == 0
    assert "--max-sessions" in result.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "say which command"),
        (("sharing",), "invalid choice: 'sharing'"),
        (("share",), "required: ACTION"),
        (("share", "show"), "required: ID"),
        (("share", "create", "--to", "a@example.org"), "required: --service"),
        (("share", "list", "--al"), "unrecognized arguments: --al"),
        (("share", "update", "x", "--expires", "soon"), "'soon' is not a time"),
        (("share", "update", "x", "--expires", "2001-01-01T00:00:00Z"), "is past"),
        (("share", "update", "x", "--expires", "2100-01-01T00:00:00"), "has no time zone"),
        (("share", "update", "x", "--max-sessions", "0"), "'0' is not a number from 1 to"),
        (("share", "update", "x", "--max-sessions", "few"), "'few' is not a number"),
        (("share", "list"), "which edge?"),
        (("share", "list", "--edge", "share.example.com"), "is not of the form https://HOST[:PORT]"),
        (("share", "list", "--edge", "http://127.0.0.1:1/x"), "is not of the form https://HOST[:PORT]"),
        (("share", "list", "--edge", "http://127.0.0.1:1"), "no API key"),
        (
            ("share", "list", "--edge", "http://127.0.0.1:1", "--api-key", "gpk a"),
            "has characters that no API key",
        ),
        (("share", "list", "--edge", "http://127.0.0.1:1", "--api-key-file", "/absent"), "No such file"),
        (("share", "list", "--edge", "http://127.0.0.1:1", "--api-key-file", "-"), "standard input is empty"),
        (
            ("share", "list", "--edge", "https://127.0.0.1:1", "--api-key", "x", "--ca", "/absent"),
            "cannot use the CA file /absent: No such file",
        ),
        (
            ("share", "list", "--edge", "https://127.0.0.1:1", "--api-key", "x", "--ca", __file__),
            "it is not a PEM certificate",
        ),
        (
            ("share", "create", "--service", "dashboards", "--to", "a@example.org"),
            "is not of the form SITE/SERVICE",
        ),
        (
            ("share", "create", "--service", "a/b", "--to", "a@example.org", "--only", "--edge", "http://h"),
            "no API key",
        ),
        (
            (
                "share",
                "create",
                "--service",
                "a/b",
                "--to",
                "a@b.c",
                "--only",
                "--edge",
                "http://h",
                "--api-key",
                "x",
            ),
            "--only limits the share to --path, but no --path is given",
        ),
        (("share", "update", "x", "--edge", "http://h", "--api-key", "x"), "nothing to change"),
        (("share", "update", "x", "--only", "--whole-service"), "give one of them"),
        (("gateway",), "which gateway? --config is missing"),
        (("gateway", "run"), "which gateway? --config is missing"),
        (("edge",), "required: --config"),
        (("up", "http://127.0.0.1:3000"), "required: --to"),
        (("up", "http://127.0.0.1:3000", "--to", "a@example.org", "--gateways", "0"), "from 1 to"),
        (("up", "http://127.0.0.1:3000", "--to", "a@example.org", "--port", "70000"), "from 0 to 65535"),
    ],
)
def test_usage_errors(guestpass, arguments, says):
    plain = guestpass(*arguments)
    assert plain.status == 2
    assert plain.out == ""
    assert plain.err.startswith("guestpass: ")
    assert says in plain.err
    scripted = guestpass(*arguments, "--json")
    assert scripted.status == 2
    assert scripted.code == "usage"
    assert says in scripted.json["error"]["message"]


def test_version(guestpass):
    assert guestpass("version", "--json").json["version"] == package.__version__
    assert guestpass("--json", "version").json["version"] == package.__version__
    assert guestpass("version").out.startswith(f"guestpass {package.__version__} (")


def test_version_and_help_import_nothing_slow():
    code = (
        "import sys\n"
        "from guestpass.cli import main\n"
        "main(['version'])\n"
        "slow = {'aiohttp', 'asyncio', 'cryptography', 'pydantic', 'sqlalchemy', 'uvloop'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_a_reader_that_goes_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "guestpass", "version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    with process:
        assert process.stderr.read() == b""
    assert process.returncode == 1


def unread(pipe):
    found = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, found)
    return found[0]


def test_an_interrupt_is_quiet(tmp_path):
    fifo = tmp_path / "key"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "guestpass",
            "share",
            "list",
            "--edge",
            "http://127.0.0.1:1",
            "--api-key-file",
            fifo,
        ],
        stderr=subprocess.PIPE,
    )
    with process, open(fifo, "wb", buffering=0) as key:  # opens when the command does
        # A signal just before the system call waits for the end of the key: let it take a byte, and sleep.
        key.write(b"k")
        wait_until("taken", lambda: unread(key) == 0, seconds=30)
        wait_until("asleep", lambda: psutil.Process(process.pid).status() == "sleeping", seconds=30)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == 130


def test_a_missing_temporary_folder_is_said_in_words():
    arguments = ("up", "http://127.0.0.1:1", "--to", "a@example.org", "--port", "0", "--json")
    code = "import os, sys, tempfile; tempfile.tempdir = '/absent'; from guestpass.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, encoding="utf-8", timeout=60
    )
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "os_error"
    assert error["message"].startswith("No such file or directory: /absent/guestpass-")


def test_a_missing_core_is_said_in_words(tmp_path):
    (tmp_path / "edge.toml").write_text("")
    code = (
        "import sys\n"
        "sys.modules['guestpass_speedups.session'] = None  # as if it had not been built\n"
        "from guestpass.cli import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "edge", "--config", str(tmp_path / "edge.toml"), "--json"],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "core_missing"
