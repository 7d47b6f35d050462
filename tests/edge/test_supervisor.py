"""The supervisor's decisions, with processes that are played: in `tests/edge/test_supervision.py` they are real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import Counter, generate_latest

import guestpass.edge.peers as peers_module
import guestpass.edge.supervisor as module
from guestpass.config import load_edge
from guestpass.edge.access_log import AccessLog
from guestpass.edge.channel import Channel
from guestpass.edge.metrics import Metrics, Together
from guestpass.edge.peers import Held, Holder, Neighbours
from guestpass.edge.supervisor import SharedEvents, Supervisor, Worker
from guestpass.edge.worker import Seat
from guestpass.errors import GuestpassError
from guestpass.model import Event, Revocation
from guestpass_speedups.session import Budget

GATEWAY = ("plant", "gw-1")


class Process:
    """As `asyncio.subprocess.Process`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        self.on_end: Callable[[], None] = lambda: None

    def end(self, code: int) -> None:
        self.returncode = code
        self._ended.set()
        self.on_end()

    def kill(self) -> None:
        self.end(-9)

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode


class Played(Supervisor):
    """Workers that are told apart by how they begin: what `scripts` holds, in turn, then `serves`."""

    def __init__(self, folder: Path) -> None:
        path = folder / "edge.toml"
        path.write_text("[edge]\nworkers = 2\n")
        super().__init__(load_edge(path))
        self.metrics = Metrics()
        self._together = Together()
        self._ends = Counter("ends", "", ("cause",), registry=self.metrics.registry)
        self.events = SharedEvents()
        self.scripts: list[Callable[[Worker, Channel], None]] = []
        self.began: list[Worker] = []
        self.others: list[Channel] = []
        self.answers: dict[str, Callable[..., Any]] = {}

    async def _spawned(self, slot: int) -> Worker:
        script = self.scripts.pop(0) if self.scripts else serves
        if script is cannot:
            raise OSError(11, "Resource temporarily unavailable")
        number = len(self.began) + 1
        process = Process(number)
        handlers: dict[str, Callable[..., Any]] = {}
        channel, other = (
            Channel(handlers, who=f"worker {number}"),
            Channel(self.answers, who="the supervisor"),
        )
        now = time.monotonic()
        worker = Worker(number, slot, "", process, channel, self._loop.create_future(), now, now)  # type: ignore[arg-type]
        handlers["last"] = lambda families: self._last(worker, families)
        ours, theirs = socket.socketpair()
        await channel.join(ours)
        await other.join(theirs)
        process.on_end = other.close
        self._workers[number] = worker
        self.began.append(worker)
        self.others.append(other)
        self._task(self._watch(worker), "watch")
        script(worker, other)
        return worker


def serves(worker: Worker, other: Channel) -> None:
    worker.admits = True
    worker.ready.set_result(None)


def hangs(worker: Worker, other: Channel) -> None:
    pass


def crashes(worker: Worker, other: Channel) -> None:
    worker.process.end(1)  # type: ignore[attr-defined]


def cannot(worker: Worker, other: Channel) -> None:
    raise AssertionError("no process is made")


@pytest.fixture
async def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Played]:
    monkeypatch.setattr(module, "RESPAWN_FIRST", 0.001)
    monkeypatch.setattr(module, "RESPAWN_MOST", 0.004)
    played = Played(tmp_path)
    yield played
    await played.stop()


async def until(look: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not look():
            await asyncio.sleep(0.002)


async def test_a_worker_that_hangs_at_its_start_is_killed_and_replaced(
    supervisor: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 0.02)
    first = await supervisor._spawn(0)
    supervisor.scripts = [hangs, hangs]
    first.process.kill()
    await until(lambda: len(supervisor.began) == 4 and supervisor.began[3].up)
    assert [worker.cause for worker in supervisor.began] == ["exit", "overdue", "overdue", "exit"]
    assert list(supervisor._workers) == [4]


async def test_a_process_that_cannot_be_made_is_tried_again(
    supervisor: Played, caplog: pytest.LogCaptureFixture
) -> None:
    first = await supervisor._spawn(0)
    supervisor.scripts = [cannot, cannot]
    first.process.kill()
    await until(lambda: len(supervisor.began) == 2 and supervisor.began[1].up)
    assert caplog.text.count("a worker cannot be started: Resource temporarily unavailable") == 2
    supervisor.scripts = [cannot]
    supervisor.roll()
    await until(lambda: not supervisor._rolling)
    assert "the old ones stay" in caplog.text
    assert supervisor.began[1].up
    supervisor.scripts = [cannot]
    with pytest.raises(GuestpassError, match="cannot be started") as caught:
        await supervisor._spawn(1)
    assert "limits" in caught.value.hint


async def test_one_that_crashes_again_and_again_is_started_later_and_later(supervisor: Played) -> None:
    pauses = []

    def dies(worker: Worker, other: Channel) -> None:
        pauses.append(supervisor._respawn.get(0, 0.0))
        crashes(worker, other)

    supervisor.scripts = [dies] * 6
    await supervisor._spawn(0)
    await until(lambda: len(supervisor.began) == 7)
    assert pauses == [0.0, 0.001, 0.002, 0.004, 0.004, 0.004]


async def test_one_place_has_one_worker(supervisor: Played) -> None:
    """The old one dies while the new one starts, and the new one fails as well: one more is started."""
    old = await supervisor._spawn(0)
    supervisor.scripts = [hangs]
    supervisor.roll()
    await until(lambda: len(supervisor.began) == 2)
    old.process.kill()
    await until(lambda: old.number not in supervisor._workers)
    assert len(supervisor.began) == 2, "the place was filled already"
    supervisor.began[1].process.kill()
    await until(lambda: len(supervisor.began) == 3 and supervisor.began[2].up)
    await until(lambda: not supervisor._rolling)
    assert list(supervisor._workers) == [3]


async def test_a_worker_has_the_time_to_drain_that_its_own_configuration_gives_it(
    supervisor: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been read anew since the supervisor was started."""
    monkeypatch.setattr(module, "STOP_SECONDS", 0.0)
    longer, quick = await supervisor._spawn(0), await supervisor._spawn(1)
    supervisor.config = supervisor.config.model_copy(
        update={"edge": supervisor.config.edge.model_copy(update={"drain_seconds": 0.0})}
    )
    supervisor._worker_admits(longer, 600.0)
    supervisor._worker_admits(quick, 0.01)
    retiring = asyncio.ensure_future(supervisor._retire(longer, "replaced"))
    await supervisor._retire(quick, "replaced")
    assert (quick.cause, longer.cause) == ("overdue", "replaced")
    longer.process.end(0)  # type: ignore[attr-defined]
    await retiring


async def test_one_that_fails_on_a_revocation_is_killed(supervisor: Played) -> None:
    def fails(revocation: Revocation) -> None:
        raise KeyError("a fault of ours")

    supervisor.answers["revoke"] = fails
    worker = await supervisor._spawn(0)
    revoked = await supervisor._revoke(Revocation("deleted", share_id="x"))
    assert (revoked.sessions, worker.process.returncode, worker.cause) == (0, -9, "unacknowledged")


async def test_one_that_starts_hears_of_a_revocation_before_anything_is_answered(supervisor: Played) -> None:
    heard: list[str] = []
    supervisor.answers |= {"revoke": lambda revocation: heard.append("revoke"), "note": heard.append}
    supervisor.scripts = [hangs]
    worker = await supervisor._spawn(0)
    await supervisor._revoke(Revocation("deleted", share_id="x"))
    worker.channel.tell("note", "what comes later")
    await until(lambda: len(heard) == 2)
    assert heard == ["revoke", "what comes later"]
    assert worker.process.returncode is None


async def test_the_last_counters_of_a_worker_count(supervisor: Played) -> None:
    """They are still on their way when the process has ended, or come while older ones are waited for."""

    def families(count: int) -> Any:
        metrics = Metrics()
        metrics.refused.labels("400").inc(count)
        return metrics.families()

    worker = await supervisor._spawn(0)
    other = supervisor.others[0]
    asked = asyncio.Event()

    async def metrics() -> Any:
        asked.set()
        await until(lambda: worker.counted)
        return families(1)

    supervisor.answers["metrics"] = metrics
    counted = asyncio.ensure_future(supervisor._count(worker))
    await asked.wait()
    other.tell("last", families(2))
    await counted
    assert 'guestpass_refused_total{status="400"} 2.0' in generate_latest(module._All(supervisor)).decode()
    process: Any = worker.process
    process.on_end = lambda: asyncio.get_running_loop().call_later(0.05, other.close)
    other.tell("last", families(3))
    worker.leaving = True
    process.end(0)
    await until(lambda: not supervisor._workers)
    text = generate_latest(module._All(supervisor)).decode()
    assert 'guestpass_refused_total{status="400"} 3.0' in text


async def test_any_worker_says_how_certificates_stand(supervisor: Played) -> None:
    supervisor.answers["certificates"] = lambda: {"share.example.com": "served"}
    supervisor.scripts = [hangs]
    await supervisor._spawn(0)
    assert await supervisor._certificates() is None
    worker = await supervisor._spawn(1)
    assert await supervisor._certificates() == {"share.example.com": "served"}
    worker.leaving = True
    worker.process.kill()
    assert await supervisor._certificates() is None


# ── gateways ─────────────────────────────────────────────────────────────────────────────────────────────────────


def held(worker: int = 1) -> Held:
    return Held(
        site=GATEWAY[0], name=GATEWAY[1], key=b"k", epoch=1, since=1.0, tunnels=1, usable=True, leaving=False,
        streams=0, rtt=None, services={"dash": True},
    )  # fmt: skip


async def test_a_gateway_that_leaves_two_workers_at_once_is_gone_once(supervisor: Played) -> None:
    """Whatever comes first: each worker says what it holds before it says what has happened."""
    seen: list[str] = []
    with contextlib.ExitStack() as both:
        seats = [both.enter_context(seated()) for _ in range(2)]
        workers = [await supervisor._spawn(slot) for slot in range(2)]
        supervisor.events.emit = lambda event: seen.append(event.type)  # type: ignore[method-assign]
        said = []
        for seat, holds, told in seats:
            for event, now in (("gateway.connected", [held()]), ("gateway.disconnected", [])):
                holds[:] = now
                seat._tunnels_changed()
                seat.events.emit(Event(event, 1.0, actor="/".join(GATEWAY)))
            said.append(told)
        for worker, told in zip(workers, said, strict=True):
            assert [name for name, *_ in told] == ["held", "event", "held", "event"]
            for name, *args in told[:2]:
                play(supervisor, worker, name, args)
        for at in (2, 3):  # in turns
            for worker, told in zip(workers, said, strict=True):
                name, *args = told[at]
                play(supervisor, worker, name, args)
    assert seen == ["gateway.connected", "gateway.disconnected"]


def play(supervisor: Supervisor, worker: Worker, name: str, args: list[Any]) -> None:
    {"held": supervisor._held, "event": supervisor._event}[name](worker, *args)


@contextlib.contextmanager
def seated() -> Any:
    """A worker's seat, what it holds, and what it tells."""
    seat = Seat([], "")
    holds: list[Held] = []
    told: list[tuple[Any, ...]] = []
    seat.channel.tell = lambda name, *args: told.append((name, *args))  # type: ignore[method-assign]
    seat._parts = SimpleNamespace(tunnels=SimpleNamespace(held=lambda: list(holds)))  # type: ignore[assignment]
    yield seat, holds, told


async def test_a_link_ends_when_its_worker_has_no_tunnel_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each gateway that ever came by would leave a socket behind, at both ends."""
    monkeypatch.setattr(peers_module, "TICK", 0.01)
    holders: set[Holder] = set()

    async def nowhere(site: str, name: str) -> None:
        return None

    def accept() -> Holder:
        holder = Holder(
            budget=Budget(),
            guard=lambda: None,
            ways=lambda site, name: (),
            another=nowhere,
            on_end=holders.discard,
        )
        holders.add(holder)
        return holder

    path = str(tmp_path / "1")
    server = await asyncio.get_running_loop().create_unix_server(accept, path)
    neighbours = Neighbours(budget=Budget(), guard=lambda: None)
    try:
        neighbours.update(1, path, [held()], [])
        link = neighbours.link(*GATEWAY)
        assert link is not None
        await until(lambda: len(holders) == 1)
        neighbours.update(1, path, [], [GATEWAY])
        neighbours.update(1, path, [held()], [])  # it has come back: the link is kept
        await asyncio.sleep(0.05)
        assert neighbours.link(*GATEWAY) is link
        neighbours.update(1, path, [], [GATEWAY])
        await until(lambda: link.over and not holders)
        assert not neighbours._links
        assert not neighbours._refused
        neighbours.update(1, path, [held()], [])
        assert neighbours.link(*GATEWAY) not in (None, link)
    finally:
        neighbours.close()
        server.close()


# ── the access log ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pipe_gets_whole_lines_in_pieces_that_it_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What several workers write to one is not mixed up."""
    reader, writer = os.pipe()
    sent: list[bytes] = []
    write = os.write

    def recorded(fd: int, data: Any) -> int:
        sent.append(bytes(data))
        return write(fd, data)

    lines = b"".join(b"%d %s\n" % (size, b"x" * size) for size in (10, 3000, 4000, 100, 4090, 1, 9000, 5))
    with open(writer, "wb") as pipe, open(reader, "rb") as out:
        monkeypatch.setattr(os, "dup", lambda fd: dup(pipe.fileno()))
        log = AccessLog(None)
        monkeypatch.setattr(os, "write", recorded)
        log.write(lines)
        log.close()
        pipe.close()
        assert out.read() == lines
    assert all(len(piece) <= 4096 for piece in sent)
    cut = [piece for piece in sent if not piece.endswith(b"\n")]
    assert b"".join(cut).startswith(b"9000 "), "only a line that is longer is cut"
    assert len(cut) == 2
    assert log.dropped == 0


dup = os.dup
