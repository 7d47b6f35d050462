"""An edge of several workers, as processes: every worker serves everything, none is missed, and none serves what was
revoked. `tests/support/workers.py` has the parts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.programs import free_port, wait_until
from support.scoreboard import LONG, row
from support.workers import EMAIL, MB, PIECE, Edge, Visit, application, off, running

# A frozen worker is found out within the deadline for acknowledgements; the lease, which needs no kill, is longer.
FAIL_CLOSED_SECONDS = 3.0


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    async with running(tmp_path, workers=2) as started:
        yield started


def echo(visit: Visit) -> None:
    """One message there and back over a WebSocket."""
    visit.upgrade()
    visit.sock.sendall(b"\x81\x85\0\0\0\0hello")  # masked with zeros
    with visit.sock.makefile("rb") as reader:
        assert reader.read(7) == b"\x81\x05hello"


def read_to_the_end(visit: Visit) -> str:
    """Reads a body that has no end of its own; how the connection ended."""
    try:
        while visit.sock.recv(65536):
            pass
    except ConnectionResetError:
        return "reset"
    except TimeoutError:
        return "still open"
    return "closed"


# ── every worker serves every session ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fast_lane", [True, False], ids=["fast", "aiohttp"])
async def test_every_worker_serves_every_session(tmp_path: Path, fast_lane: bool) -> None:
    async with running(tmp_path, workers=3, fast_lane=fast_lane) as edge:
        assert edge.facts["workers"] == edge.pids
        assert len(edge.holders()) == 1  # the others reach the tunnel through that one
        body = os.urandom(3 * MB + 12345)
        digest = hashlib.sha256(body).hexdigest()
        for pid in edge.pids:
            visit = await off(edge.visit, pid)
            for _ in range(3):
                status, data = await off(visit.ask)
                assert (status, json.loads(data)["email"]) == (200, EMAIL)
            answer = await off(visit.begin, "GET", "/down?pieces=80")
            received = await off(answer.read)
            assert (answer.status, received) == (200, PIECE * 80)
            status, data = await off(visit.ask, "POST", "/up", body=body)
            assert (status, json.loads(data)) == (200, {"sha256": digest, "size": len(body)})
            pieces = [body[at : at + 50_000] for at in range(0, len(body), 50_000)]
            chunked = edge.headers(**{"Transfer-Encoding": "chunked"})
            status, data = await off(
                visit.ask, "POST", "/up", body=iter(pieces), headers=chunked, chunked=True
            )
            assert (status, json.loads(data)) == (200, {"sha256": digest, "size": len(body)})
            status, _ = await off(visit.ask, "HEAD")
            assert status == 200
            status, _ = await off(visit.ask, "GET", "/nowhere")
            assert status == 404
            visit.close()
        counted = await off(edge.total, "guestpass_requests_total")
        assert counted == 8 * 3
        for pid in edge.pids:
            visit = await off(edge.visit, pid)
            await off(echo, visit)
            visit.close()
        lanes = {key.split('lane="')[1].split('"')[0] for key in edge.metrics() if "requests_total{" in key}
        assert lanes == ({"fast", "aiohttp"} if fast_lane else {"aiohttp"})  # first requests are aiohttp's
        assert edge.metrics()['guestpass_tunnels{gateway="gw-1",site="plant"}'] == 1


async def test_a_slow_reader_stops_the_application_through_two_workers(edge: Edge) -> None:
    """Credit is end to end: what waits on the way is bounded, and others go on."""
    (holder,) = edge.holders()
    (other,) = [pid for pid in edge.pids if pid != holder]
    slow = await off(edge.visit, other)
    answer = await off(slow.begin, "GET", "/down")
    assert answer.status == 200
    before = psutil.Process(holder).memory_info().rss + psutil.Process(other).memory_info().rss
    quick = await off(edge.visit, other)
    for _ in range(50):
        assert (await off(quick.ask))[0] == 200
    received = await off(quick.ask, "GET", "/down?pieces=160")
    assert received == (200, PIECE * 160)
    after = psutil.Process(holder).memory_info().rss + psutil.Process(other).memory_info().rss
    assert after - before < 128 * MB
    slow.close()
    quick.close()


async def test_one_session_has_one_gateway_on_all_workers(edge: Edge, tmp_path: Path) -> None:
    """Each worker chooses for a session that it meets; the first choice holds."""
    async with application() as app_url:
        await edge.start_gateway(app_url, "gw-2")
        for _ in range(6):
            edge.token = await off(edge.new_token, edge.share_id)
            for pid in edge.pids:
                visit = await off(edge.visit, pid)
                assert (await off(visit.ask))[0] == 200
                visit.close()
        # Every session was met by two workers. Ending a gateway's sessions tells how many had chosen it.
        removed = [
            (await off(edge.api, "DELETE", f"/gateways/plant/{name}"))["revoked"]["sessions"]
            for name in ("gw-1", "gw-2")
        ]
        assert sum(removed) == 6, "a session was with both gateways"


# ── what owners see and do ───────────────────────────────────────────────────────────────────────────────────────


async def test_deletion_ends_streams_on_all_workers(tmp_path: Path) -> None:
    async with running(tmp_path, workers=3) as edge:
        visits = [await off(edge.visit, pid) for pid in edge.pids]
        for visit in visits:
            assert (await off(visit.ask))[0] == 200
            assert (await off(visit.begin, "GET", "/trickle")).status == 200
        for pid in edge.pids:  # the same, whoever is asked
            owner = await off(edge.visit, pid)
            share = await off(edge.api, "GET", f"/shares/{edge.share_id}", connection=owner)
            assert share["live"] == {"sessions": 1, "streams": 3}
            owner.close()
        deleted = await off(edge.api, "DELETE", f"/shares/{edge.share_id}")
        assert (deleted["revoked"]["sessions"], deleted["revoked"]["streams"]) == (1, 3)
        ends = await asyncio.gather(*(off(read_to_the_end, visit) for visit in visits))
        assert ends == ["reset"] * 3
        for pid in edge.pids:
            visit = await off(edge.visit, pid)
            assert (await off(visit.ask))[0] == 410
            visit.close()


async def test_a_change_and_an_end_reach_all_workers(edge: Edge) -> None:
    async def statuses(*requests: tuple[str, str]) -> list[list[int]]:
        """Of each worker. On connections of their own: the end of a session cuts what is still on its way."""
        found = []
        for pid in edge.pids:
            visit = await off(edge.visit, pid)
            found.append([(await off(visit.ask, *request))[0] for request in requests])
            visit.close()
        return found

    both = (("POST", "/"), ("GET", "/down?pieces=1"))
    assert await statuses(*both) == [[200, 200]] * 2
    await off(edge.api, "PATCH", f"/shares/{edge.share_id}", {"scope": ["GET /", "GET /down"]})
    assert await statuses(*both) == [[403, 200]] * 2
    listed = await off(edge.api, "GET", f"/sessions?share={edge.share_id}")
    await off(edge.api, "DELETE", f"/sessions/{listed['sessions'][0]['id']}")
    assert await statuses(*both) == [[401, 401]] * 2


async def test_max_sessions_counts_over_all_workers(edge: Edge) -> None:
    edge.share_id = await off(edge.new_share, max_sessions=1)
    tokens = [await off(edge.new_token, edge.share_id) for _ in range(2)]
    statuses = []
    for pid, token in zip(edge.pids, tokens, strict=True):
        edge.token = token
        visit = await off(edge.visit, pid)
        statuses.append((await off(visit.ask))[0])
        visit.close()
    assert statuses == [200, 403]


async def test_an_owner_is_signed_in_to_the_console_on_all_workers(edge: Edge) -> None:
    first, second = [await off(edge.visit, pid) for pid in edge.pids]
    key = (edge.folder / "api.key").read_text().strip()
    site = {"Host": f"localhost:{edge.port}"}
    form = {**site, "Origin": f"http://localhost:{edge.port}", "Sec-Fetch-Site": "same-origin"}
    form["Content-Type"] = "application/x-www-form-urlencoded"
    answer = await off(first.begin, "POST", "/console/sign-in", headers=form, body=f"key={key}")
    assert answer.status == 303, answer.read()
    await off(answer.read)
    cookie = {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}
    for visit in (second, first):
        status, page = await off(visit.ask, "GET", "/console", headers={**site, **cookie})
        assert (status, b"plant" in page) == (200, True)
    gateways = [await off(edge.api, "GET", "/gateways", connection=v) for v in (first, second)]
    assert gateways[0]["gateways"][0]["tunnels"] == 1
    assert {g["gateways"][0]["name"] for g in gateways} == {"gw-1"}
    first.close()
    second.close()


async def test_a_share_takes_the_ways_that_visitors_can_choose(tmp_path: Path) -> None:
    """The names are the workers' to say: the supervisor has no authenticators, and SIGHUP may bring other ones."""

    async def takes(name: str) -> bool:
        visit = await off(edge.open)
        head = {"Host": f"localhost:{edge.port}", "Content-Type": "application/json", "Authorization": key}
        body = json.dumps({"sign_in": [name]}).encode()
        status, answer = await off(
            visit.ask, "PATCH", f"/api/v1/shares/{edge.share_id}", headers=head, body=body
        )
        visit.close()
        assert status in (200, 422), answer
        return bool(status == 200)

    more = '[[authenticate]]\nuse = "bearer-token"\n[[authenticate]]\nuse = "email-code"\nname = "{}"\n'
    async with running(tmp_path, workers=2, more=more.format("letters")) as edge:
        key = "Bearer " + (edge.folder / "api.key").read_text().strip()
        taken = {name: await takes(name) for name in ("letters", "email-code", "bearer-token")}
        assert taken == {"letters": True, "email-code": False, "bearer-token": False}
        file = edge.folder / "edge.toml"
        file.write_text(file.read_text("utf-8").replace("letters", "postcards"), "utf-8")
        edge.program.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(20):
            while not await takes("postcards"):
                await asyncio.sleep(0.05)
        assert not await takes("letters")


async def test_events_of_one_worker_reach_listeners_of_another(edge: Edge) -> None:
    key = (edge.folder / "api.key").read_text().strip()
    fields = {"Host": f"localhost:{edge.port}", "Authorization": f"Bearer {key}"}
    first, second = [await off(edge.visit, pid) for pid in edge.pids]
    answer = await off(first.begin, "GET", "/api/v1/events", headers=fields)
    assert answer.status == 200
    created = await off(
        edge.api,
        "POST",
        "/shares",
        {"site": "plant", "service": "dash", "path": "/", "to": [EMAIL], "invite": False},
        connection=second,
    )

    def event() -> bytes:
        seen = b""
        while created["id"].encode() not in seen:
            line = answer.readline()
            assert line, "the stream of events has ended"
            seen += line
        return seen

    assert b"share.created" in await off(event)
    first.close()
    second.close()


# ── workers that end ─────────────────────────────────────────────────────────────────────────────────────────────


class Load:
    """Visitors who ask again and again, half of them POST, each on a connection that it opens anew when it has to.

    A request that is answered counts, with its status. One that was sent on a connection which the edge closed at the
    same moment, before a byte of an answer, is sent again on a new one, as every client does (RFC 9112, 9.3.1);
    `resent` counts these."""

    def __init__(self, edge: Edge, visitors: int = 4) -> None:
        self._edge = edge
        self.statuses: list[int] = []
        self.broken: list[str] = []
        self.resent: list[str] = []
        self._over = threading.Event()
        posts = {"method": "POST", "path": "/up", "body": bytes(3000)}
        self._threads = [
            threading.Thread(target=self._visit, args=(posts if number % 2 else {},))
            for number in range(visitors)
        ]

    def _visit(self, request: dict[str, Any]) -> None:
        visit: Visit | None = None
        while not self._over.is_set():
            fresh = visit is None
            try:
                if visit is None:
                    visit = self._edge.open()
                answer = visit.begin(**request)
                answer.read()
                self.statuses.append(answer.status)
                if answer.will_close:
                    visit.close()
                    visit = None
            except OSError as exc:
                if fresh:
                    self.broken.append(repr(exc))
                else:
                    self.resent.append(repr(exc))
                if visit is not None:
                    visit.close()
                visit = None
        if visit is not None:
            visit.close()

    def wait_for(self, more: int) -> None:
        wanted = len(self.statuses) + more
        wait_until(f"{more} more answers", lambda: len(self.statuses) >= wanted, seconds=30)

    async def __aenter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    async def __aexit__(self, *about: object) -> None:
        self._over.set()
        for thread in self._threads:
            await off(thread.join, 30)  # the application has to answer meanwhile


async def test_a_killed_worker_is_replaced_and_others_go_on(edge: Edge) -> None:
    (holder,) = edge.holders()
    (other,) = [pid for pid in edge.pids if pid != holder]
    visit = await off(edge.visit, holder)
    for _ in range(5):
        assert (await off(visit.ask))[0] == 200
    before = await off(edge.total, "guestpass_requests_total")
    assert before == 5

    # The one without the tunnel: visitors of the other one notice nothing.
    os.kill(other, signal.SIGKILL)
    for _ in range(20):
        assert (await off(visit.ask))[0] == 200
    await off(
        wait_until, "another worker", lambda: len(edge.pids) == 2 and other not in edge.pids, seconds=20
    )
    (fresh,) = [pid for pid in edge.pids if pid != holder]
    await off(wait_until, "it serves", lambda: edge.metrics()["guestpass_workers"] == 2, seconds=30)
    known = await off(edge.visit, fresh)
    assert (await off(known.ask))[0] == 200  # the session is known there
    counted = await off(edge.total, "guestpass_requests_total")
    assert counted == before + 21, "counters fell"

    # The one with the tunnel: the gateway connects again, to any worker.
    os.kill(holder, signal.SIGKILL)

    def served() -> bool:
        status, _ = known.ask()
        assert status in (200, 502, 503)
        return status == 200

    await off(wait_until, "served again", served, seconds=20)
    await off(wait_until, "two workers", lambda: edge.metrics()["guestpass_workers"] == 2, seconds=30)
    metrics = await off(edge.metrics)
    assert metrics['guestpass_worker_ends_total{cause="exit"}'] == 2
    assert await off(edge.total, "guestpass_requests_total") >= counted
    known.close()
    visit.close()


@pytest.mark.timeout(900 if LONG else 120)
async def test_workers_are_replaced_without_a_lost_request(edge: Edge) -> None:
    before = edge.pids
    rounds = 20 if LONG else 1
    async with Load(edge) as load:
        await off(load.wait_for, 200)
        for number in range(1, rounds + 1):
            old = edge.pids
            edge.program.process.send_signal(signal.SIGUSR2)

            def replaced(old: list[int] = old, number: int = number) -> bool:
                ends = edge.metrics().get('guestpass_worker_ends_total{cause="replaced"}', 0)
                return len(edge.pids) == 2 and not set(old) & set(edge.pids) and ends == 2 * number

            await off(wait_until, "all workers are new", replaced, seconds=60)
        await off(load.wait_for, 200)
    failed = [status for status in load.statuses if status != 200]
    row(
        "rolling restarts of the workers",
        f"{rounds} × 2 workers replaced under {len(load.statuses)} requests",
        f"{len(failed) + len(load.broken)} failed, {len(load.resent)} sent again",
        "0 failed",
        ok=not failed and not load.broken and not load.resent,
        figure=20,
    )
    assert not set(before) & set(edge.pids)
    assert edge.program.process.poll() is None


async def test_sighup_reads_notifiers_and_observers_again(edge: Edge) -> None:
    """They are the supervisor's: nobody else could."""
    file, events = edge.folder / "edge.toml", edge.folder / "events.jsonl"
    file.write_text(f'{file.read_text()}\n[[observe]]\nuse = "json-lines"\npath = "events.jsonl"\n')
    edge.program.process.send_signal(signal.SIGHUP)
    await off(wait_until, "the new observer has started", events.exists, seconds=20)
    share = await off(edge.new_share)
    await off(wait_until, "it is told of a share", lambda: share in events.read_text(), seconds=10)


async def test_sigterm_drains_all_workers(edge: Edge) -> None:
    visits = [await off(edge.visit, pid) for pid in edge.pids]
    answers = [await off(visit.begin, "GET", "/down?pieces=400") for visit in visits]
    pids = edge.pids
    edge.program.process.send_signal(signal.SIGTERM)
    for answer in answers:
        assert len(await off(answer.read)) == 400 * len(PIECE)
    assert await off(edge.program.process.wait, 30) == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


# ── fail closed ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_frozen_worker_does_not_hold_up_a_deletion(edge: Edge) -> None:
    """It is killed, and after that the deletion is acknowledged: nothing of the share is served any more."""
    frozen, other = edge.pids
    visit = await off(edge.visit, frozen)
    assert (await off(visit.ask))[0] == 200
    assert (await off(visit.begin, "GET", "/trickle")).status == 200
    beside = await off(edge.visit, other)
    assert (await off(beside.begin, "GET", "/trickle")).status == 200
    os.kill(frozen, signal.SIGSTOP)
    began = time.monotonic()
    deleted = await off(edge.api, "DELETE", f"/shares/{edge.share_id}", connection=edge.open())
    took = time.monotonic() - began
    assert deleted["revoked"]["streams"] == 1  # of the worker that could count
    assert not psutil.pid_exists(frozen) or psutil.Process(frozen).status() == psutil.STATUS_ZOMBIE
    with contextlib.suppress(ProcessLookupError):
        os.kill(frozen, signal.SIGCONT)
    # What the kernel had taken from it before is all that can come.
    ends = await asyncio.gather(off(read_to_the_end, visit), off(read_to_the_end, beside))
    assert ends[1] == "reset"
    assert ends[0] in ("reset", "closed")
    metrics = await off(edge.metrics)
    assert metrics['guestpass_worker_ends_total{cause="unacknowledged"}'] == 1
    row(
        "a worker is stopped (SIGSTOP)",
        "the share is deleted while the worker serves it",
        f"answered, and nothing served any more, after {took:.2f} s",
        f"≤ {FAIL_CLOSED_SECONDS:g} s",
        ok=took <= FAIL_CLOSED_SECONDS,
        timing=True,
        figure=14,
    )
    await off(wait_until, "another worker", lambda: edge.metrics()["guestpass_workers"] == 2, seconds=30)


@pytest.mark.parametrize("fast_lane", [True, False], ids=["fast", "aiohttp"])
async def test_workers_that_do_not_hear_the_supervisor_stop_serving(tmp_path: Path, fast_lane: bool) -> None:
    async with running(tmp_path, workers=2, fast_lane=fast_lane) as edge:
        visits = [await off(edge.visit, pid) for pid in edge.pids]
        for visit in visits:
            assert (await off(visit.ask))[0] == 200
            assert (await off(visit.begin, "GET", "/trickle")).status == 200
        supervisor = edge.program.process
        supervisor.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        ends = await asyncio.gather(*(off(read_to_the_end, visit) for visit in visits))
        took = time.monotonic() - began
        assert ends == ["reset"] * 2
        again = edge.open()
        assert (await off(again.ask))[0] == 503  # known nowhere any more, and nobody can be asked
        row(
            f"workers are cut off ({'fast lane' if fast_lane else 'aiohttp'})",
            "the supervisor is stopped while two workers serve a stream each",
            f"the last stream ended after {took:.2f} s, new requests 503",
            f"≤ {FAIL_CLOSED_SECONDS:g} s",
            ok=took <= FAIL_CLOSED_SECONDS,
            timing=True,
            figure=14,
        )
        supervisor.send_signal(signal.SIGCONT)

        def served() -> bool:
            visit = edge.open()
            status, _ = visit.ask()
            visit.close()
            return status == 200

        await off(wait_until, "served again", served, seconds=20)


@pytest.mark.parametrize("fast_lane", [True, False], ids=["fast", "aiohttp"])
async def test_a_worker_that_was_frozen_serves_nothing_of_what_it_had(
    tmp_path: Path, fast_lane: bool
) -> None:
    """Supervisor and worker are frozen, the worker wakes first: the visitor's request and the application's bytes are
    there before anything of the supervisor. The lease is looked at first."""
    async with running(tmp_path, workers=2, fast_lane=fast_lane) as edge:
        frozen, _ = edge.pids
        streaming, asking = await off(edge.visit, frozen), await off(edge.visit, frozen)
        assert (await off(asking.ask))[0] == 200
        assert (await off(streaming.begin, "GET", "/trickle")).status == 200
        edge.program.process.send_signal(signal.SIGSTOP)
        os.kill(frozen, signal.SIGSTOP)
        await asyncio.sleep(0.2)
        streaming.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while streaming.sock.recv(65536):  # what had left before
                pass
        head = "".join(f"{name}: {value}\r\n" for name, value in edge.headers().items())
        asking.sock.sendall(f"GET / HTTP/1.1\r\n{head}\r\n".encode())
        await asyncio.sleep(3.0)  # the lease has lapsed
        os.kill(frozen, signal.SIGCONT)
        streaming.sock.settimeout(10)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            received = await off(streaming.sock.recv, 65536)
        assert received == b""
        answer = await off(asking.sock.recv, 65536)
        assert b" 200 " not in answer.partition(b"\r\n")[0]
        edge.program.process.send_signal(signal.SIGCONT)
        row(
            f"a worker wakes up ({'fast lane' if fast_lane else 'aiohttp'})",
            "supervisor and worker stopped for 3 s, the worker goes on first",
            f"{len(received)} bytes of the stream, the request refused",
            "0 bytes",
            ok=received == b"",
            figure=14,
        )


async def test_workers_end_with_their_supervisor(edge: Edge) -> None:
    pids = edge.pids
    sockets = edge.sockets
    assert sockets.is_dir()
    visits = [await off(edge.visit, pid) for pid in pids]
    for visit in visits:
        assert (await off(visit.begin, "GET", "/trickle")).status == 200
    edge.program.process.kill()
    began = time.monotonic()
    ends = await asyncio.gather(*(off(read_to_the_end, visit) for visit in visits))
    took = time.monotonic() - began
    assert set(ends) <= {"reset", "closed"}  # of the one without the tunnel, whichever ends first
    await off(wait_until, "the workers have ended", lambda: not any(map(psutil.pid_exists, pids)), seconds=10)
    assert not sockets.exists()
    row(
        "the supervisor is killed",
        "two workers serve a stream each",
        f"the last stream ended after {took:.2f} s, both workers ended",
        f"≤ {FAIL_CLOSED_SECONDS:g} s",
        ok=took <= FAIL_CLOSED_SECONDS,
        timing=True,
        figure=14,
    )


# ── start ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fault_that_only_workers_see_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text(
        f'[edge]\nlisten = ["http://127.0.0.1:{free_port()}"]\nadmin_listen = "127.0.0.1:0"\nworkers = 2\n'
        '[[authenticate]]\nuse = "nothing-of-this-name"\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "guestpass", "edge", "--config", str(tmp_path / "edge.toml"), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "nothing-of-this-name" in json.loads(done.stdout)["error"]["message"]
