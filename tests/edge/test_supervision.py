"""Workers that crash, hang and are replaced while something else goes on. `tests/edge/test_workers.py` has what they do
when nothing is wrong, and when the supervisor is not heard."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.programs import free_port, wait_until
from support.workers import PIECE, Edge, Visit, off, running

# A plugin that does at its import what files beside it say: hang while `hang` is there, end the process by `crash`.
TROUBLE = """
import os
import time
from pathlib import Path

from guestpass.plugin import Denied, PluginConfig, RequestFilter

folder = Path(__file__).parent
while (folder / "hang").exists():
    (folder / f"hangs-{os.getpid()}").touch()
    time.sleep(0.02)
if (folder / "crash").exists():
    os._exit(7)


class Trouble(RequestFilter):
    class Config(PluginConfig):
        closed: bool = False

    def compile(self, share, session):
        if self.config.closed:
            raise Denied("Closed.")
"""
FILTER = '[[filter]]\nuse = "./trouble.py:Trouble"\n'


@contextlib.asynccontextmanager
async def troubled(folder: Path, *, more: str = "") -> AsyncIterator[Edge]:
    (folder / "trouble.py").write_text(TROUBLE)
    async with running(folder, workers=2, more=more + FILTER) as edge:
        yield edge


@contextlib.contextmanager
def there(path: Path) -> Iterator[None]:
    """A file, for as long."""
    path.touch()
    try:
        yield
    finally:
        path.unlink()


def ends(edge: Edge, cause: str) -> float:
    return edge.metrics().get(f'guestpass_worker_ends_total{{cause="{cause}"}}', 0)


def log_of(edge: Edge) -> str:
    return (edge.folder / "edge.log").read_text("utf-8", "replace")


def readyz(edge: Edge) -> tuple[int, dict[str, Any]]:
    where = edge.facts["metrics"].removeprefix("http://").partition("/")[0]
    with contextlib.closing(HTTPConnection(where, timeout=30)) as connection:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def wait_for_log(edge: Edge, words: str, times: int = 1) -> None:
    wait_until(f"{words!r} in the log", lambda: log_of(edge).count(words) >= times, seconds=60)


def wait_for_workers(edge: Edge, count: int, but: list[int]) -> None:
    """So many serve, and none of those."""
    wait_until(
        f"{count} new workers",
        lambda: (
            len(edge.pids) == count
            and not set(but) & set(edge.pids)
            and edge.metrics()["guestpass_workers"] == count
        ),
        seconds=60,
    )


async def rolls(edge: Edge) -> None:
    """A rolling restart whose first new worker hangs at its start, with its configuration read."""
    edge.program.process.send_signal(signal.SIGUSR2)
    await off(wait_until, "a new worker starts", lambda: list(edge.folder.glob("hangs-*")), seconds=30)


# ── a worker that starts ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_deletion_and_a_death_while_a_worker_starts(tmp_path: Path) -> None:
    """The new one has admitted nobody: waiting for it would hold up the owner, and killing it the rolling restart. The
    one that it is to replace dies meanwhile, and is replaced once."""
    async with troubled(tmp_path) as edge:
        old = edge.facts["workers"]
        visit = await off(edge.visit, old[1])
        assert (await off(visit.ask))[0] == 200
        with there(tmp_path / "hang"):
            await rolls(edge)
            deleted = await off(edge.api, "DELETE", f"/shares/{edge.share_id}")
            assert deleted["revoked"]["sessions"] == 1
            assert len(edge.pids) == 3
            assert await off(ends, edge, "unacknowledged") == 0
            os.kill(old[0], signal.SIGKILL)
            await off(wait_until, "it is seen", lambda: ends(edge, "exit") == 1, seconds=20)
        await off(wait_for_log, edge, "all workers were replaced")
        await off(wait_for_workers, edge, 2, old)
        assert (await off(readyz, edge)) == (200, {"status": "ready", "faults": {}})
        for pid in edge.pids:  # those that came since know of the deletion as well
            visit = await off(edge.visit, pid)
            assert (await off(visit.ask))[0] == 410


async def test_a_reload_reaches_a_worker_that_starts(tmp_path: Path) -> None:
    """What it has read already may be what was changed."""
    async with troubled(tmp_path) as edge:
        config = tmp_path / "edge.toml"
        with there(tmp_path / "hang"):
            await rolls(edge)
            (starting,) = set(edge.pids) - set(edge.facts["workers"])
            changed = config.read_text().replace(FILTER, FILTER + "closed = true\n")
            config.write_text(changed + '[[notify]]\nuse = "outbox"\nfolder = "elsewhere"\n')
            edge.program.process.send_signal(signal.SIGHUP)
        await off(wait_for_log, edge, f"(process {starting}) serves")
        visit = await off(edge.visit, starting)
        await off(wait_until, "it has read the change", lambda: visit.ask()[0] == 403, seconds=30)
        await off(wait_for_log, edge, "reload: notifiers and observers were replaced")  # by the supervisor


async def test_sigterm_during_a_rolling_restart(tmp_path: Path) -> None:
    async with troubled(tmp_path) as edge:
        visits = [await off(edge.visit, pid) for pid in edge.pids]
        answers = [await off(visit.begin, "GET", "/down?pieces=400") for visit in visits]
        with there(tmp_path / "hang"):
            await rolls(edge)
            pids = edge.pids
            edge.program.process.send_signal(signal.SIGTERM)
            for answer in answers:
                assert len(await off(answer.read)) == 400 * len(PIECE)
            assert await off(edge.program.process.wait, 30) == 0
            assert not any(psutil.pid_exists(pid) for pid in pids)
        assert "Traceback" not in log_of(edge)


async def test_a_second_rolling_restart_follows_the_first(tmp_path: Path) -> None:
    """Whoever asks again may have changed the configuration since. And nothing is left of those that were replaced."""
    async with troubled(tmp_path) as edge:
        supervisor = psutil.Process(edge.program.process.pid)
        files = supervisor.num_fds()
        old = edge.pids
        with there(tmp_path / "hang"):
            await rolls(edge)
            for _ in range(3):
                edge.program.process.send_signal(signal.SIGUSR2)
                await asyncio.sleep(0.05)
        await off(wait_for_log, edge, "all workers were replaced", 2)
        await off(wait_for_workers, edge, 2, old)
        assert await off(ends, edge, "replaced") == 4
        await off(wait_until, "its files are closed", lambda: supervisor.num_fds() <= files, seconds=10)
        assert len(list(edge.sockets.iterdir())) == 2


async def test_what_the_supervisor_has_taken_holds_for_new_workers(tmp_path: Path) -> None:
    async with troubled(tmp_path) as edge:
        (holder,) = edge.holders()
        (killed,) = [pid for pid in edge.pids if pid != holder]
        config = tmp_path / "edge.toml"
        changed, count = re.subn(
            r"listen = \[.*\]", f'listen = ["http://127.0.0.1:{free_port()}"]', config.read_text()
        )
        assert count == 1
        config.write_text(
            re.sub(r"admin_listen.*", "", changed)
            .replace(f'public_url = "http://localhost:{edge.port}"', 'public_url = "http://localhost:1"')
            .replace("[[filter]]", 'state = "sqlite:///another.db"\n[[filter]]', 1)
        )
        os.kill(killed, signal.SIGKILL)
        await off(wait_for_workers, edge, 2, [killed])
        (fresh,) = [pid for pid in edge.pids if pid != holder]
        visit = await off(edge.visit, fresh)
        assert (await off(visit.ask))[0] == 200
        assert not (tmp_path / "another.db").exists()
        assert "is needed for changes of: edge.listen, edge.public_url, edge.state" in log_of(edge)


# ── a worker that cannot start ───────────────────────────────────────────────────────────────────────────────────


async def test_a_worker_that_crashes_at_every_start(tmp_path: Path) -> None:
    """The others serve, `/readyz` says so, a rolling restart changes nothing, and it comes back by itself."""
    async with troubled(tmp_path) as edge:
        killed, other = edge.pids
        os.kill(other, signal.SIGTERM)  # it follows the supervisor's word only, but its children would end
        status = Path(f"/proc/{other}/status").read_text()
        assert not int(re.findall(r"^SigIgn:\s*(\w+)$", status, re.M)[0], 16) & 1 << signal.SIGTERM - 1
        with there(tmp_path / "crash"):
            os.kill(killed, signal.SIGKILL)
            await off(wait_for_log, edge, "ended with status 7", 2)
            status, told = await off(readyz, edge)
            assert (status, told["faults"]) == (503, {"workers": "1 of 2 serve"})
            visit = await off(edge.visit, other)
            assert (await off(visit.ask))[0] == 200
            edge.program.process.send_signal(signal.SIGUSR2)
            await off(wait_for_log, edge, "a new worker cannot start, the old ones stay")
            assert (await off(visit.ask))[0] == 200
        await off(wait_for_workers, edge, 2, [killed])
        assert other in edge.pids
        assert (await off(readyz, edge))[0] == 200


def test_a_folder_whose_path_is_too_long_for_sockets(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    (tmp_path / "edge.toml").write_text(
        f'[edge]\nlisten = ["http://127.0.0.1:{free_port()}"]\nadmin_listen = "127.0.0.1:0"\nworkers = 2\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "guestpass", "edge", "--config", str(tmp_path / "edge.toml"), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, str(folder) in error["message"], "TMPDIR" in error["hint"]) == (2, True, True)
    assert not list(folder.iterdir())


async def test_sigusr2_does_not_end_an_edge_of_one_process(tmp_path: Path) -> None:
    async with running(tmp_path, workers=1) as edge:
        edge.program.process.send_signal(signal.SIGUSR2)
        await off(wait_for_log, edge, "this edge has one process")
        assert (await off(readyz, edge))[0] == 200


# ── a worker that dies in the middle of something ────────────────────────────────────────────────────────────────


def half_an_upload(edge: Edge, visit: Visit) -> None:
    visit.send_head("POST", "/up", {**edge.headers(), "Content-Length": "1000000"})
    visit.sock.sendall(bytes(500_000))


def a_websocket(edge: Edge, visit: Visit) -> None:
    visit.upgrade()


def streams(edge: Edge) -> int:
    """That the gateway has, by the tunnels' count."""
    (gateway,) = edge.api("GET", "/gateways")["gateways"]
    return int(gateway["streams"])


@pytest.mark.parametrize("fast_lane", [True, False], ids=["fast", "aiohttp"])
async def test_what_a_killed_worker_had_open_ends_at_both_sides(tmp_path: Path, fast_lane: bool) -> None:
    async with running(tmp_path, workers=3, fast_lane=fast_lane) as edge:
        (holder,) = edge.holders()
        first, second = [pid for pid in edge.pids if pid != holder]
        begun = ((half_an_upload, 1), (a_websocket, 1), (half_an_upload, 2), (a_websocket, 2))
        visits = []
        for begin, number in begun:
            visits.append(await off(edge.visit, first if number == 1 else second))
            assert (await off(visits[-1].ask))[0] == 200
            await off(begin, edge, visits[-1])
        await off(wait_until, "all are open", lambda: streams(edge) == 4, seconds=20)
        # The worker that the visitors of two are at: their exchanges end at the application, others go on.
        os.kill(first, signal.SIGKILL)
        await off(wait_until, "two have ended", lambda: streams(edge) == 2, seconds=20)
        # The worker that holds the tunnel: the visitors hear of it.
        os.kill(holder, signal.SIGKILL)
        ends = [await off(last_of, visit) for visit in visits]
        assert ends[2].startswith(b"HTTP/1.1 50")  # an upload is not sent again by itself
        assert ends[0] == ends[1] == ends[3] == b""

        def live() -> int:
            share = edge.api("GET", f"/shares/{edge.share_id}")
            return int(share["live"]["streams"])

        await off(wait_until, "nothing is open", lambda: live() == 0, seconds=20)


def last_of(visit: Visit) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return visit.sock.recv(4096)
    return b""


async def test_an_observer_that_holds_up_the_supervisor_is_counted(tmp_path: Path) -> None:
    """Workers wait for the supervisor: after two seconds and a half they would end what they serve."""
    (tmp_path / "slow.py").write_text(
        "import time\nfrom guestpass.plugin import Observer\n\n\nclass Slow(Observer):\n"
        "    async def on_event(self, event):\n"
        "        if event.type == 'share.created':\n            time.sleep(1)\n"
    )
    more = '[[observe]]\nuse = "./slow.py:Slow"\nname = "culprit"\n'
    async with running(tmp_path, workers=2, more=more) as edge:
        name = 'guestpass_loop_blocked_total{plugin="culprit"}'
        await off(wait_until, "it is counted", lambda: edge.metrics().get(name), seconds=20)
        visit = edge.open()
        assert (await off(visit.ask))[0] == 200


async def test_the_access_log_of_all_workers_on_standard_output(tmp_path: Path) -> None:
    more = 'access_log = "-"\naccess_log_paths = true\n'
    async with running(tmp_path, workers=3, more=more) as edge:
        wanted = []
        for index, pid in enumerate(edge.pids):
            visit = await off(edge.visit, pid)
            for number in range(40):
                path = f"/{index}/{number}/" + '"' * 2100
                assert (await off(visit.ask, "GET", path))[0] == 404
                wanted.append(path[:1280])
            visit.close()

        def lines() -> list[str]:
            return [line for line in log_of(edge).splitlines() if line.startswith('{"time"')]

        await off(wait_until, "all lines", lambda: len(lines()) == len(wanted), seconds=20)
        found = sorted(json.loads(line)["path"] for line in lines())
        assert [len(path) > 1200 and path.strip('"') for path in found] == sorted(
            path.rstrip('"') for path in wanted
        )
