"""What a plugin that does something wrong can do to others: nothing.

One edge has a misbehaving plugin of every kind. While each of them is brought to misbehave, another session goes on
with requests and a download: not one may fail. A failing decision denies, with an error id that stands in the log, and
`/readyz` names the plugin.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from aiohttp import web
from support.scoreboard import LONG, percentile, row
from support.served import dripping, serving
from support.stack import Stack, running

from guestpass.edge import plugins as module
from guestpass.edge.isolation import Isolated
from guestpass.edge.plugins import BREAKER_FAILURES, PluginSet

HERE = Path(__file__).parent

# In this order: one that decides and is not asked any more denies to all, so the last to be asked comes first.
KINDS = {
    "observer": ("observe", "BadObserver"),
    "notifier": ("notify", "BadNotifier"),
    "backend-chooser": ("choose", "BadChooser"),
    "request-filter": ("filter", "BadFilter"),
    "revoker": ("revoke", "BadRevoker"),
    "authenticator": ("authenticate", "BadAuthenticator"),
}
# What a visitor gets whose session one of these decides about. A chooser's place is taken by the next.
ANSWERS = {"authenticator": 503, "revoker": 503, "request-filter": 503, "backend-chooser": 200}

IN_PROCESS = ("raises", "waits", "exits", "leaks")
ISOLATED = ("blocks", "dies", "crashes", "forks", "devours")
# A process of its own for each of six plugins takes its time.
QUICK = ("blocks", "crashes")

ERROR_ID = re.compile(r"\b[0-9a-f]{8}\b")


@pytest.fixture
async def application() -> AsyncIterator[str]:
    async def show(request: web.Request) -> web.Response:
        return web.Response(text="here")

    async with serving(dripping(show), handler_cancellation=True) as url:
        yield url


@pytest.fixture(autouse=True)
def _short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IDENTIFY", "CHECK", "CHOOSE", "FILTER", "DELIVER", "OBSERVE"):
        monkeypatch.setattr(module, f"{name}_DEADLINE", 0.3)


def edge_with_all(
    folder: Path, application: str, how: str, *, isolated: bool
) -> contextlib.AbstractAsyncContextManager[Stack]:
    folder.chmod(0o755)
    file = folder / "misbehaving.py"
    shutil.copy(HERE / "misbehaving.py", file)
    file.chmod(0o644)
    usual = {
        "authenticate": ["email_code:EmailCode", "bearer_token:BearerToken"],
        "revoke": ["share_state:ShareState"],
        "choose": ["random:Random"],
    }
    config: dict[str, object] = {}
    for section, cls in KINDS.values():
        bad = {"use": f"./misbehaving.py:{cls}", "name": "bad", "how": how}
        if isolated:
            bad["isolation"] = "process"
        config[section] = [bad] + [
            {"use": f"guestpass_plugins.{section}.{name}"} for name in usual.get(section, ())
        ]
    return running(folder, application, lane="fast", config=config)


@dataclass
class Others:
    """Somebody else's session, all the while."""

    answered: int = 0
    failed: int = 0
    slowest: float = 0.0
    received: int = 0
    broken: bool = False


@contextlib.asynccontextmanager
async def others(stack: Stack) -> AsyncIterator[Others]:
    found = Others()

    async def ask() -> None:
        while True:
            began = time.monotonic()
            answer = await stack.get("/")
            found.slowest = max(found.slowest, time.monotonic() - began)
            found.answered += 1
            found.failed += answer.status != 200 or answer.body != b"here"
            await asyncio.sleep(0.01)

    async def download() -> None:
        headers = {"Host": stack.host, **stack.authorization}
        async with stack.session.get(stack.url("/forever"), headers=headers) as answer:
            async for part in answer.content.iter_any():
                found.received += len(part)
        found.broken = True

    tasks = [asyncio.create_task(ask()), asyncio.create_task(download())]
    await stack.until(lambda: found.answered and found.received, "the other session is served")
    try:
        yield found
        before = found.received
        await stack.until(lambda: found.received > before, "the download goes on")
    finally:
        broken = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        found.broken |= bool(broken)


async def readyz(stack: Stack) -> tuple[int, dict[str, str]]:
    url = stack.metrics_url.replace("/metrics", "/readyz")
    async with stack.session.get(url) as answer:
        return answer.status, json.loads(await answer.read())["faults"]


async def bring_about(stack: Stack, kind: str) -> list[tuple[int, str]]:
    """Have the bad plugin of a kind asked until it is not asked any more; what its visitors got."""
    share = await stack.new_share(path=f"/bad/{kind}")
    answers = []
    for number in range(BREAKER_FAILURES):
        if kind == "observer":
            await stack.new_share(path="/other")
        elif kind == "notifier":
            await stack.new_share(to=[f"bad{number}@example.org"], invite=True)
        else:
            token = await stack.new_token(share)
            host = f"{share}.localhost:{stack.port}"
            answer = await stack.get("/bad", headers={"Host": host, "Authorization": f"Bearer {token}"})
            answers.append((answer.status, answer.body.decode()))
    return answers


@pytest.mark.parametrize("how", [*IN_PROCESS, *(ISOLATED if LONG else QUICK)])
async def test_others_notice_nothing(
    tmp_path: Path, application: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    isolated = how in ISOLATED
    kinds = list(KINDS)
    async with edge_with_all(tmp_path, application, how, isolated=isolated) as stack:
        async with others(stack) as other:
            decided = {kind: await bring_about(stack, kind) for kind in kinds}
            named = {f"{KINDS[kind][0]}/bad" for kind in kinds}

            status, faults = await readyz(stack)
            for _ in range(100):
                if named <= set(faults):
                    break
                await asyncio.sleep(0.05)
                status, faults = await readyz(stack)
    wrong = [
        f"{kind}: {status}"
        for kind, answers in decided.items()
        for status, body in answers
        if status != ANSWERS[kind]
        or (status == 503 and not any(i in caplog.text for i in ERROR_ID.findall(body)))
    ]
    missing = sorted(named - set(faults))
    lost = other.failed + other.broken
    denied = sum(status == 503 for answers in decided.values() for status, _ in answers)
    row(
        f"containment: {how}{', isolated' if isolated else ''}",
        f"a plugin of each of {len(kinds)} kinds {how} {BREAKER_FAILURES} times, beside another session",
        f"{lost} of {other.answered} requests of others lost; {denied} decisions denied with an id in the log, "
        f"{len(wrong)} otherwise; /readyz names {len(named) - len(missing)}",
        f"0 lost, 0 otherwise, {len(named)} named",
        ok=not lost and not wrong and not missing and status == 503,
        figure=21,
    )


async def test_a_plugin_that_blocks_the_loop_is_named(
    tmp_path: Path, application: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the edge's own process it cannot be stopped: others wait, and are served."""
    async with edge_with_all(tmp_path, application, "stalls", isolated=False) as stack:
        async with others(stack) as other:
            share = await stack.new_share(path="/bad/revoker")
            token = await stack.new_token(share)
            host = f"{share}.localhost:{stack.port}"
            await stack.get("/", headers={"Host": host, "Authorization": f"Bearer {token}"})
            _, faults = await readyz(stack)
        named = "revoker 'bad' blocks the event loop in check" in caplog.text and "revoke/bad" in faults
    row(
        "containment: blocks the loop, in-process",
        "a revoker sleeps for 0.7 s in the event loop, beside another session",
        f"{other.failed + other.broken} of {other.answered} requests of others lost; named: {named}",
        "0 lost, named by log and /readyz",
        ok=named and not other.failed and not other.broken,
        figure=21,
    )


# ── what an isolated plugin can see ──────────────────────────────────────────────────────────────────────────────

LOOKS = """
import os
from guestpass.plugin import *

class Looks(Revoker):
    class Config(PluginConfig):
        key: Secret
        own: ConfigPath

    async def check(self, share, session):
        seen = {}
        parent = os.getppid()
        for what in PATHS:
            path = what.replace("PARENT", str(parent))
            try:
                with open(path, "rb") as file:
                    seen[what] = file.read(10).decode("latin-1")
            except OSError as exc:
                seen[what] = type(exc).__name__
        try:
            os.kill(parent, 0)
            seen["signal"] = "sent"
        except OSError as exc:
            seen["signal"] = type(exc).__name__
        seen["secret"] = self.config.key.get_secret_value()
        seen["environment"] = sorted(set(os.environ) - {"LC_CTYPE"})
        await self.host.storage.set("seen", seen)
        return None
"""


async def test_an_isolated_plugin_sees_no_secret_of_others(
    tmp_path: Path, application: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setenv("SOME_SECRET", "of somebody else")
    monkeypatch.setenv("ITS_SECRET", "its own")
    other = tmp_path / "other.secret"
    other.write_text("of others")
    (tmp_path / "own.txt").write_text("its file")
    state = tmp_path / "state"
    paths = [
        str(other),
        str(state / "edge.db"),
        str(state / "api.key"),
        "/proc/PARENT/environ",
        "/etc/passwd",
    ]
    own = str(tmp_path / "own.txt")
    file = tmp_path / "looks.py"
    file.write_text(LOOKS.replace("PATHS", repr([*paths, own])))
    file.chmod(0o644)
    settings = {
        "use": "./looks.py:Looks",
        "isolation": "process",
        "key": {"env": "ITS_SECRET"},
        "own": "own.txt",
    }
    async with running(tmp_path, application, config={"revoke": [settings]}) as stack:
        (proxy,) = [p for p in stack.edge.plugins.all if isinstance(p, Isolated)]
        assert proxy.pid is not None
        process = Path(f"/proc/{proxy.pid}")
        assert process.joinpath("environ").read_bytes() == b""
        opened = {fd.readlink().as_posix().partition(":")[0] for fd in process.joinpath("fd").iterdir()}
        assert opened <= {"/dev/null", "socket", "anon_inode", "pipe"}
        # Its end of the pair, and the two with which its own loop wakes itself.
        assert len([f for f in process.joinpath("fd").iterdir() if "socket" in str(f.readlink())]) == 3
        limits = process.joinpath("limits").read_text()
        assert re.search(r"Max core file size +0 +0", limits)
        assert re.search(r"Max open files +64 +64", limits)
        assert re.search(rf"Max address space +{512 << 20} ", limits)
        assert (await stack.get("/")).status == 200
        seen = await stack.edge.service.storage("revoke/Looks").get("seen")
    assert seen["secret"] == "its own"
    assert seen["environment"] == []
    assert seen[own] == "its file"
    if proxy._sandboxed:
        assert {path: seen[path] for path in paths} == dict.fromkeys(paths, "PermissionError")
    else:  # a kernel without Landlock hides no files, and the operator is told
        assert "this kernel has no Landlock" in caplog.text


async def test_the_process_goes_with_the_edge(tmp_path: Path, application: str) -> None:
    async with edge_with_all(tmp_path, application, "raises", isolated=True) as stack:
        pids = [p.pid for p in stack.edge.plugins.all if isinstance(p, Isolated)]
        assert len(pids) == len(KINDS)
        assert all(psutil.pid_exists(pid) for pid in pids if pid)
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────

THREE = """
from guestpass.plugin import *

class First(Revoker):
    async def check(self, share, session):
        return None

class Second(RequestFilter):
    def compile(self, share, session):
        return Static(edits=Edits(add=(("X-A", "b"),)))

class Third(BackendChooser):
    def choose(self, choice):
        return choice.candidates[0]
"""


async def test_an_admission_with_three_plugins(tmp_path: Path, application: str) -> None:
    """The edge's CPU time for asking three plugins, less that of asking none."""
    tmp_path.chmod(0o755)
    file = tmp_path / "three.py"
    file.write_text(THREE)
    file.chmod(0o644)
    rounds = 500 if LONG else 50
    config = {
        "revoke": [{"use": "./three.py:First"}],
        "filter": [{"use": "./three.py:Second"}],
        "choose": [{"use": "./three.py:Third"}],
    }
    async with running(tmp_path, application, config=config) as stack:
        plugins: PluginSet = stack.edge.plugins
        assert (await stack.get("/")).status == 200
        (grant,) = stack.edge.grants._by_digest.values()
        only = [slot for slot in plugins._revoke if slot.name == "First"]
        plugins._revoke[:] = only  # share-state asks the store, which is its own work
        spent = []
        for _ in range(rounds):
            began = time.process_time()
            await plugins.check(grant.share, grant.session)
            await plugins.compile(grant.share, grant.session)
            await stack.edge.admission.choose_gateway(grant.share, grant.session)
            spent.append(time.process_time() - began)
    median = percentile(spent, 0.5) * 1e6
    row(
        "admission with three plugins",
        f"a revoker, a filter and a chooser were asked, {rounds} times",
        f"{median:.0f} µs of CPU in the median",
        "300 µs",
        ok=median < 300,
        timing=True,
        figure=21,
    )


async def test_loading_three_plugins(tmp_path: Path) -> None:
    from guestpass.config import EdgeConfig, parse

    tmp_path.chmod(0o755)
    file = tmp_path / "three.py"
    file.write_text(THREE)
    file.chmod(0o644)
    config = {
        "revoke": [{"use": "./three.py:First"}],
        "filter": [{"use": "./three.py:Second"}],
        "choose": [{"use": "./three.py:Third"}],
    }
    parsed = parse(EdgeConfig, config, tmp_path / "edge.toml")
    PluginSet.load(parsed)  # the bundled ones' own imports, and the entry points, are read once
    spent = []
    for _ in range(5):
        began = time.process_time()
        PluginSet.load(parsed)
        spent.append(time.process_time() - began)
    best = min(spent) * 1000
    row(
        "loading of plugins",
        "three from a file, and the usual ones",
        f"{best:.1f} ms of CPU",
        "50 ms",
        ok=best < 50,
        timing=True,
        figure=21,
    )
