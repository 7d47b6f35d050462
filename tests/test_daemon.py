"""What a service manager and a person who reads the log rely on."""

import asyncio
import io
import logging
import os
import signal
import socket

import pytest

from guestpass.daemon import LineFormatter, Signals, notify_systemd, reloading, set_up_logging


@pytest.fixture
def log():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    logger = logging.Logger("guestpass.test")
    logger.addHandler(handler)
    logger.stream = stream
    return logger


def test_a_record_is_one_line(log):
    log.warning("two\nlines, \x1b[31mred, %s", "a\r\nb\u2028c")
    text = log.stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("WARNING guestpass.test: two\\nlines, \\x1b[31mred, a\\r\\nb\\u2028c\n")
    assert text[:4].isdigit()
    assert text[10] == "T"


def test_a_traceback_is_on_the_same_line(log):
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("it failed")
    assert log.stream.getvalue().count("\n") == 1
    assert "Traceback" in log.stream.getvalue()
    assert "ValueError: broken" in log.stream.getvalue()


@pytest.mark.parametrize(
    ("said", "logged"),
    [
        ("token gp_" + "a" * 43, "token gp_…"),
        ("join gpj_" + "A-_9" * 10 + ".", "join gpj_…."),
        ("key gpk_" + "b" * 43, "key gpk_…"),
        ("http://localhost:8080/s/" + "c" * 43 + " x", "http://localhost:8080/s/… x"),
        ("smtp://me:hush@mail:587", "smtp://me:…@mail:587"),
        ("http://user:p%40ss@proxy", "http://user:…@proxy"),
        ("see /s/short and gp_short", "see /s/short and gp_short"),
        ("http://localhost:8080/x@y", "http://localhost:8080/x@y"),
    ],
)
def test_what_looks_like_a_secret_is_masked(log, said, logged):
    log.error("%s", said)
    assert log.stream.getvalue().partition(": ")[2] == logged + "\n"


def test_levels_for_the_journal():
    record = logging.LogRecord("guestpass", logging.WARNING, "", 0, "careful", (), None)
    assert LineFormatter(journal=True).format(record) == "<4>careful"


def test_set_up_logging_replaces_what_was_there(monkeypatch, capsys):
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    ours = logging.getLogger("guestpass")
    try:
        set_up_logging("warning")
        logging.getLogger("guestpass.x").info("not shown")
        logging.getLogger("guestpass.x").warning("shown")
        logging.getLogger("library").info("not shown either")
        assert capsys.readouterr().err.count("\n") == 1
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
        ours.setLevel(logging.NOTSET)
        logging.getLogger("guestpass_plugins").setLevel(logging.NOTSET)


def test_systemd_is_told(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert notify_systemd("READY=1", "STATUS=Serving")
        assert manager.recv(100) == b"READY=1\nSTATUS=Serving"
        with reloading():
            assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(100) == b"READY=1"


def test_systemd_by_an_abstract_address(monkeypatch):
    name = f"guestpass-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        assert notify_systemd("READY=1")
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "vsock:1:2", "relative"])
def test_without_systemd_nothing_happens(monkeypatch, address):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify_systemd("READY=1")


def test_a_dead_service_manager_is_logged(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "absent"))
    assert not notify_systemd("READY=1")
    assert "cannot notify systemd" in caplog.text


async def test_signals():
    reloads = []
    loop = asyncio.get_running_loop()
    reloaded = asyncio.Event()

    def on_reload() -> None:
        reloads.append(1)
        reloaded.set()

    with Signals(on_reload=on_reload) as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.wait_for(reloaded.wait(), 5)
        assert not signals.stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(signals.stop.wait(), 5)
        assert not signals.hurry.is_set()
        os.kill(os.getpid(), signal.SIGHUP)  # too late to reload
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(signals.hurry.wait(), 5)
    assert len(reloads) == 1
    assert not loop.remove_signal_handler(signal.SIGTERM)


async def test_a_closed_terminal_stops_what_cannot_reload():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.wait_for(signals.stop.wait(), 5)
