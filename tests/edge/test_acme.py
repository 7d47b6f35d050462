"""Certificates by ACME, against a server of our own that really looks: at the edge's plain listener, in a zone that the
hook writes."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import re
import socket
import ssl
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from support.acme_server import AcmeServer
from support.programs import free_port, wait_until

from guestpass.cli import doctor
from guestpass.config import AcmeSection, EdgeConfig, load_edge, parse
from guestpass.edge import acme as module
from guestpass.edge.acme import Acme, AcmeFailed, Storage, check, run_hook
from guestpass.edge.app import Edge
from guestpass.errors import ConfigError
from guestpass.local_ca import LocalCA, write_certificates

HOST = "share.localhost"
DAY = 86_400.0

HOOK = """
import json, os, pathlib, sys
zone = pathlib.Path(sys.argv[1])
known = json.loads(zone.read_text()) if zone.exists() else {}
action, name, value = sys.argv[2:5]
assert (action, name, value) == tuple(os.environ["GUESTPASS_ACME_" + k] for k in ("ACTION", "NAME", "VALUE"))
values = known.setdefault(name, [])
(values.append if action == "add" else values.remove)(value)
zone.write_text(json.dumps(known))
with open(str(zone) + ".log", "a") as log:
    log.write(f"{action} {name}\\n")
print("done with", value)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client library sleeps a second between two looks at an order."""
    monkeypatch.setattr("acme.client.time", SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 20)))


class Clock:
    """Time as the edge sees it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def settings(
    folder: Path, server: AcmeServer, *, hosts: tuple[str, ...] = (HOST,), **more: Any
) -> EdgeConfig:
    section = {
        "hosts": hosts,
        "directory": server.directory,
        "email": "owner@example.org",
        "storage": "acme",
        **more,
    }
    edge = {
        "listen": [f"https://127.0.0.1:{free_port()}"],
        "redirect_listen": [f"http://127.0.0.1:{server.plain}"],
        "admin_listen": "127.0.0.1:0",
        "public_url": f"https://{HOST}",
        "share_domain": HOST,
        "state": f"sqlite:///{folder}/state/edge.db",
    }
    return parse(EdgeConfig, {"edge": edge, "acme": section}, folder / "edge.toml")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[AcmeServer]:
    async with AcmeServer(plain=free_port(), zone=tmp_path / "zone.json") as started:
        yield started


@contextlib.asynccontextmanager
async def answering(acme: Acme, server: AcmeServer) -> AsyncIterator[None]:
    """The edge's part of http-01 alone."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        host = next(line[6:] for line in lines if line.lower().startswith("host: "))
        body = (acme.answer(host, lines[0].split(" ")[1]) or "nothing here").encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        writer.close()

    listener = await asyncio.start_server(talk, "127.0.0.1", server.plain)
    async with listener:
        yield


class Run:
    """An `Acme` with its clock, and what it told."""

    def __init__(self, config: EdgeConfig) -> None:
        assert config.acme is not None
        self.clock = Clock()
        self.changes = 0
        self.serves = True
        self.outcomes: list[str] = []
        self.acme = Acme(
            config, config.acme, changed=self.changed, count=self.outcomes.append, now=self.clock
        )

    def changed(self) -> bool:
        self.changes += 1
        self.acme.sources()
        return self.serves

    def serial(self, host: str = HOST) -> int:
        stored = self.acme.storage.stored(host)
        return stored.serial if stored is not None else 0

    async def look(self, ahead: float | None = None) -> None:
        if ahead is not None:
            self.clock.ahead = ahead
        await self.acme.look()


# ── http-01, with the whole edge ─────────────────────────────────────────────────────────────────────────────────


async def until(what: str, look: Callable[[], bool], seconds: float = 30) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not look():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.02)


def served(port: int) -> x509.Certificate:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as sock,
        context.wrap_socket(sock, server_hostname=HOST) as secured,
    ):
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")


async def test_an_edge_without_any_certificate_gets_one(server: AcmeServer, tmp_path: Path) -> None:
    config = settings(tmp_path, server)
    port = int(config.edge.listen[0].rpartition(":")[2])
    edge = Edge(config)
    ready = await edge.start()
    try:
        assert edge.acme is not None
        await until("a certificate is served", lambda: len(edge.certificates) == 1)
        leaf = await asyncio.to_thread(served, port)
        assert leaf.issuer.rfc4514_string() == "CN=A small CA"
        assert server.looked_up == [
            f"{HOST}/.well-known/acme-challenge/{next(iter(server.orders.values())).token}"
        ]
        (account,) = server.accounts.values()
        assert account.contact == ["mailto:owner@example.org"]
        async with aiohttp.ClientSession() as session:
            async with session.get(ready["metrics"]) as found:
                metrics = await found.text()
            async with session.get(ready["metrics"].replace("/metrics", "/readyz")) as found:
                told = await found.json()
        assert f'guestpass_certificate_expires_seconds{{host="{HOST}"}}' in metrics
        assert 'guestpass_acme_attempts_total{outcome="issued"} 1.0' in metrics
        assert told["status"] == "ready"
        assert told["certificates"][HOST].startswith("until ")
        # Nothing is left to be asked for, and what was is private.
        assert list((tmp_path / "acme" / "challenges").iterdir()) == []
        for path in (tmp_path / "acme").rglob("*"):
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    finally:
        await edge.stop()
    # A restart serves it without asking anybody.
    asked = sum(server.seen.values())
    edge = Edge(config)
    await edge.start()
    try:
        assert (await asyncio.to_thread(served, port)).serial_number == leaf.serial_number
        assert sum(server.seen.values()) == asked
    finally:
        await edge.stop()


async def test_the_plain_listener_does_nothing_else(server: AcmeServer, tmp_path: Path) -> None:
    server.faults.add("down")
    config = settings(tmp_path, server)
    edge = Edge(config)
    await edge.start()
    try:
        assert edge.acme is not None
        url = f"http://127.0.0.1:{server.plain}"
        token = "t" * 43
        with edge.acme.storage.challenge(token, "the answer"):
            async with aiohttp.ClientSession() as session:

                async def ask(path: str, host: str, method: str = "GET") -> tuple[int, str, str]:
                    async with session.request(
                        method, url + path, headers={"Host": host}, allow_redirects=False
                    ) as found:
                        assert "Strict-Transport-Security" not in found.headers
                        return found.status, found.headers.get("Location", ""), await found.text()

                challenge = f"/.well-known/acme-challenge/{token}"
                assert await ask(challenge, HOST) == (200, "", "the answer")
                assert await ask(challenge, f"{HOST}:80") == (200, "", "the answer")
                assert (await ask(challenge, f"a.{HOST}"))[0] == 308  # a share's host is none of [acme] hosts
                assert (await ask(challenge, "evil.example"))[0] == 421
                assert (await ask("/.well-known/acme-challenge/../account.key", HOST))[0] in (308, 404)
                assert (await ask("/.well-known/acme-challenge/..%2faccount.key", HOST))[0] in (308, 404)
                assert (await ask("/s/x?y=1", HOST))[:2] == (308, f"https://{HOST}/s/x?y=1")
                assert (await ask("/x", f"abc.{HOST}:80"))[:2] == (308, f"https://abc.{HOST}/x")
                assert (await ask("/", "evil.example"))[0] == 421
                assert (await ask("/console", HOST, "POST"))[0] == 403
                assert (await ask("//evil.example/", HOST))[1] == f"https://{HOST}//evil.example/"
        assert edge.acme.answer(HOST, challenge) is None
    finally:
        await edge.stop()


# ── dns-01 ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_wildcard_by_a_hook(
    server: AcmeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "guestpass.edge.acme")
    (tmp_path / "hook.py").write_text(HOOK)
    hook = (sys.executable, "hook.py", str(server.zone), "{action}", "{name}", "{value}")
    hosts = (HOST, f"*.{HOST}")
    run = Run(settings(tmp_path, server, hosts=hosts, challenge="dns-01", hook=hook))
    await run.look()
    assert run.outcomes == ["issued", "issued"]
    for host in hosts:
        stored = run.acme.storage.stored(host)
        assert stored is not None
        assert stored.path.name == f"{host.replace('*', '_')}.pem"
    name = f"_acme-challenge.{HOST}"
    assert server.looked_up == [name, name]
    assert (tmp_path / "zone.json.log").read_text() == f"add {name}\nremove {name}\n" * 2
    assert json.loads((tmp_path / "zone.json").read_text()) == {name: []}
    said = [r.getMessage() for r in caplog.records if "the hook said" in r.getMessage()]
    assert len(said) == 4
    assert all(text.endswith("done with …") for text in said), "the value is not for the log"


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ((sys.executable, "-c", "raise SystemExit(3)"), "ended with status 3"),
        (("/no/such/hook",), "cannot be run: No such file"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), "was not done within 0.5 s"),
        ((sys.executable, "-c", "pass"), "no TXT record at _acme-challenge.share.localhost"),
    ],
)
async def test_a_hook_that_fails(
    server: AcmeServer, tmp_path: Path, hook: tuple[str, ...], says: str
) -> None:
    run = Run(
        settings(
            tmp_path, server, challenge="dns-01", hook=hook, hook_seconds=0.5 if "60" in hook[-1] else 30
        )
    )
    await run.look()
    assert run.outcomes == ["failed"]
    assert says in run.acme.status()[HOST]


def test_what_a_hook_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell, none of our secrets, and no process of it is left."""
    monkeypatch.setenv("GUESTPASS_API_KEY", "gpk_secret")
    out = tmp_path / "out"
    code = (
        "import json, os, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "json.dump({'argv': sys.argv[1:], 'env': dict(os.environ), 'child': child.pid}, open('out', 'w'))\n"
    )
    hook = (sys.executable, "-c", code, "; touch pwned $(touch pwned)", "{name}{value}")
    section = AcmeSection(hosts=("a.example",), challenge="dns-01", hook=hook)
    run_hook(section, tmp_path, "add", "n.example", "{name} `touch pwned`")
    got = json.loads(out.read_text())
    assert got["argv"] == ["; touch pwned $(touch pwned)", "n.example{name} `touch pwned`"]
    assert "GUESTPASS_API_KEY" not in got["env"]
    assert got["env"]["GUESTPASS_ACME_ACTION"] == "add"
    assert not (tmp_path / "pwned").exists()
    status = Path(f"/proc/{got['child']}/stat")

    def ended() -> bool:
        try:
            return status.read_text().split()[2] in "ZX"
        except FileNotFoundError:
            return True

    wait_until("what the hook started has ended", ended, seconds=10)


# ── renewal ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_renewal_when_two_thirds_are_over(server: AcmeServer, tmp_path: Path) -> None:
    run = Run(settings(tmp_path, server))
    server.now = lambda: datetime.datetime.fromtimestamp(run.clock(), datetime.UTC)
    async with answering(run.acme, server):
        await run.look()
        first = run.serial()
        assert first
        await run.look(59 * DAY)
        assert run.serial() == first
        await run.look(64 * DAY)  # at a third of 90 days, and at most a tenth of that later
        assert run.serial() not in (0, first)
        assert run.outcomes == ["issued", "issued"]
        assert server.seen["account"] == 1, "the account is kept"


async def test_certificates_of_a_day_spread_their_renewals(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    times = set()
    for number in range(20):
        cert, key = LocalCA().issue(["a.localhost"])
        storage.path("a.localhost").write_bytes(cert + key)
        stored = storage.stored("a.localhost")
        assert stored is not None, number
        left = (stored.expires - stored.renew_at) / (stored.expires - stored.begins)
        assert 0.3 <= left <= 1 / 3
        times.add(round(left, 4))
    assert len(times) > 10


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("down", "the server answered 503"),
        ("nonsense", "makes no sense"),
        ("rate limited", "too many certificates"),
        ("changed token", "the challenge failed: share.localhost answered 200"),
        ("refused order", "the server refused the order: not this one"),
        ("garbage", "no certificate with its key"),
        ("another key", "for another key"),
        ("another host", "for evil.example, not for share.localhost"),
        ("expired", "the certificate is good from"),
    ],
)
async def test_a_failure_keeps_the_old_certificate(
    server: AcmeServer, tmp_path: Path, fault: str, says: str
) -> None:
    run = Run(settings(tmp_path, server))
    async with answering(run.acme, server):
        await run.look()
        first, before = run.serial(), (tmp_path / "acme" / f"{HOST}.pem").read_bytes()
        server.faults.add(fault)
        await run.look(70 * DAY)
        assert run.outcomes == ["issued", "failed"]
        assert (tmp_path / "acme" / f"{HOST}.pem").read_bytes() == before
        assert re.search(says, run.acme.status()[HOST]), run.acme.status()
        # Not at once again, and not after a restart either; in the end it works, and nobody had to help.
        asked = sum(server.seen.values())
        await run.look()
        await Run(settings(tmp_path, server)).look()
        assert sum(server.seen.values()) == asked
        server.faults.clear()
        server.now = lambda: datetime.datetime.fromtimestamp(run.clock(), datetime.UTC)
        await run.look(70 * DAY + 2 * 3600)
        assert run.serial() not in (0, first)
        assert run.acme.status()[HOST].startswith("until ")
        assert ";" not in run.acme.status()[HOST]


async def test_each_failure_waits_longer(server: AcmeServer, tmp_path: Path) -> None:
    server.faults.add("down")
    run = Run(settings(tmp_path, server))
    waits = []
    for _ in range(12):
        await run.look()
        number, retry_at = run.acme.storage.attempts()[HOST]
        waits.append(retry_at - run.clock())
        assert number == len(waits)
        run.clock.ahead += waits[-1] + 1
    assert 25 <= waits[0] <= 60
    assert all(module.RETRY_MOST / 2 - 5 <= wait <= module.RETRY_MOST for wait in waits[-2:])
    assert len(run.outcomes) == 12


async def test_a_nonce_that_is_refused_is_asked_for_again(server: AcmeServer, tmp_path: Path) -> None:
    server.faults.add("bad nonce")
    run = Run(settings(tmp_path, server))
    async with answering(run.acme, server):
        await run.look()
    assert run.outcomes == ["issued"]


async def test_a_server_that_forgot_the_account(server: AcmeServer, tmp_path: Path) -> None:
    run = Run(settings(tmp_path, server))
    async with answering(run.acme, server):
        await run.look()
        server.accounts.clear()
        await run.look(70 * DAY)
        assert run.outcomes == ["issued", "failed"]
        run.acme.hurry()
        server.now = lambda: datetime.datetime.fromtimestamp(run.clock(), datetime.UTC)
        await run.look()
        assert run.outcomes == ["issued", "failed", "issued"]
        # And one that knows it though we have lost its name.
        (tmp_path / "acme" / "account.json").unlink()
        await run.look(140 * DAY)
        assert run.outcomes[-1] == "issued"
        assert len(server.accounts) == 1


async def test_one_host_that_fails_holds_up_no_other(server: AcmeServer, tmp_path: Path) -> None:
    run = Run(settings(tmp_path, server, hosts=("bad.localhost", HOST)))
    cert, key = LocalCA().issue(["other.localhost"])
    run.acme.storage.path("bad.localhost").write_bytes(cert + key)  # and what is not for it is not used
    original = server._look_http

    async def look(order: Any, expected: str) -> None:
        await original(order, "x" if order.host.startswith("bad") else expected)

    server._look_http = look  # type: ignore[method-assign]
    async with answering(run.acme, server):
        await run.look()
    assert run.outcomes == ["failed", "issued"]
    assert [source.hosts for source in run.acme.sources()] == [(HOST,)]


async def test_only_one_process_orders(server: AcmeServer, tmp_path: Path) -> None:
    one, other = Run(settings(tmp_path, server)), Run(settings(tmp_path, server))
    async with answering(one.acme, server):
        await asyncio.gather(one.look(), other.look())
        assert sorted(one.outcomes + other.outcomes) == ["issued"]
        assert len(server.orders) == 1
        # The other one finds it when it looks again, and serves it.
        await one.look()
        await other.look()
    assert one.changes >= 1
    assert other.changes >= 1


async def test_a_new_certificate_that_cannot_be_served_yet(server: AcmeServer, tmp_path: Path) -> None:
    """Another file of edge.toml has a fault just then: it is tried again until that is mended."""
    run = Run(settings(tmp_path, server))
    run.serves = False
    async with answering(run.acme, server):
        for _ in range(3):
            await run.look()
        assert (run.changes, run.outcomes) == (3, ["issued"])
        run.serves = True
        for _ in range(3):
            await run.look()
        assert (run.changes, run.outcomes) == (4, ["issued"])


async def test_a_server_with_a_ca_of_its_own(tmp_path: Path) -> None:
    ca, cert, key = write_certificates(tmp_path, ("127.0.0.1",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    async with AcmeServer(plain=free_port(), tls=context) as server:
        stranger = Run(settings(tmp_path, server))
        await stranger.look()
        assert stranger.outcomes == ["failed"]
        assert "cannot be reached: SSLError" in stranger.acme.status()[HOST]
        assert not server.seen
        run = Run(settings(tmp_path, server, ca=str(ca)))
        run.acme.hurry()
        async with answering(run.acme, server):
            await run.look()
        assert run.outcomes == ["issued"]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "aiohttp"])
async def test_a_challenge_behind_a_proxy(server: AcmeServer, tmp_path: Path, fast: bool) -> None:
    """Answered on the listeners for visitors as well, at the hosts of [acme] only, and only while there is one."""
    server.faults.add("down")
    plain = free_port()
    edge = {"listen": (f"http://127.0.0.1:{plain}",), "redirect_listen": (), "fast_lane": fast}
    config = settings(tmp_path, server)
    config = config.model_copy(update={"edge": config.edge.model_copy(update=edge)})
    running = Edge(config)
    await running.start()
    try:
        assert running.acme is not None
        path = f"/.well-known/acme-challenge/{'t' * 43}"
        async with aiohttp.ClientSession() as session:

            async def ask(host: str, method: str = "GET") -> tuple[int, str]:
                url = f"http://127.0.0.1:{plain}{path}"
                async with session.request(method, url, headers={"Host": host}) as found:
                    return found.status, await found.text()

            assert (await ask(HOST))[0] == 404
            with running.acme.storage.challenge("t" * 43, "the answer"):
                assert await ask(HOST) == (200, "the answer")
                assert (await ask(HOST, "HEAD"))[0] == 200
                assert (await ask(HOST, "POST"))[0] in (404, 405)
                assert (await ask(f"abc.{HOST}"))[0] != 200
                assert (await ask("evil.example"))[0] == 421
            assert (await ask(HOST))[0] == 404
    finally:
        await running.stop()


async def test_stopping_waits_for_no_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, and nobody answers
        fake = AcmeServer(plain=free_port())
        fake.url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = Run(settings(tmp_path, fake))
        await run.acme.start()
        await asyncio.sleep(0.2)
        async with asyncio.timeout(5):
            await run.acme.stop()


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            'hosts = ["*.a.example"]',
            '*.a.example can be proven by challenge = "dns-01" only (key "acme.hosts")',
        ),
        ('hosts = ["a.example"]\nchallenge = "dns-01"', "needs a command that adds and removes TXT records"),
        ('hosts = ["a.example"]\nchallenge = "tls-alpn-01"', "Input should be 'http-01' or 'dns-01'"),
        ("hosts = []", '(key "acme.hosts")'),
        ('hosts = ["192.0.2.1"]', "is not a host name like"),
        ('hosts = ["a b"]', "is not a host name like"),
        ('hosts = ["a.example"]\ndirectory = "http://ca.example/d"', "is not of the form https://"),
        (
            'hosts = ["a.example"]\ndirectory = "http://localhost.evil.example/d"',
            "is not of the form https://",
        ),
        ('hosts = ["a.example"]', '(key "edge.redirect_listen")'),
        (
            'hosts = ["a.example", "A.example."]\nchallenge = "dns-01"\nhook = ["x"]',
            "a.example has two certificates",
        ),
    ],
)
def test_sections_that_cannot_work(tmp_path: Path, lines: str, says: str) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(f'[edge]\nlisten = ["https://127.0.0.1:1"]\n[acme]\n{lines}\n')
    with pytest.raises(ConfigError) as caught:
        load_edge(file)
    assert says in caught.value.message


def test_tokens_name_no_other_files(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "acme")
    storage.prepare()
    (tmp_path / "acme" / "account.key").write_text("secret")
    for token in ("../account.key", "..", "", "a" * 15, "a" * 300, "account.key", "é" * 20, "a" * 20 + "\n"):
        assert storage.answer(token) is None
        with pytest.raises(AcmeFailed), storage.challenge(token, "x"):
            pass


async def test_doctor_says_how_it_stands(server: AcmeServer, tmp_path: Path) -> None:
    config = settings(tmp_path, server, hosts=(HOST, "other.localhost"))
    run = Run(config)
    async with answering(run.acme, server):
        await run.acme._attempt(HOST)
    found = [(check.status, check.detail) for check in doctor.certificate(config)]
    assert ("warn", "other.localhost has none by ACME yet") in found
    assert any(status == "ok" and "valid until" in detail for status, detail in found)


def test_half_a_file_is_not_used(tmp_path: Path) -> None:
    cert, key = LocalCA().issue(["a.localhost"])
    for data in (b"", cert, key, cert[:-50] + key, cert + key[:-80]):
        with pytest.raises(AcmeFailed):
            check(data, "a.localhost", tmp_path / "x")


def test_without_the_library_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "acme.client", None)
    with pytest.raises(ConfigError, match="ACME client") as caught:
        module.import_client()
    assert "guestpass[acme]" in caught.value.hint


def test_what_was_left_behind_goes(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.prepare()
    old, new = (tmp_path / "challenges" / name for name in ("o" * 43, "n" * 43))
    for path in (old, new):
        path.write_text("x")
    os.utime(old, (0, 0))
    storage.prepare()
    assert not old.exists()
    assert new.exists()
