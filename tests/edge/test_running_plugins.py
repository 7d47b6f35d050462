"""Plugins of a running edge: those that block, a loop that is blocked, plugins in a process of their own, and a new set
on SIGHUP."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.served import dripping, serving
from support.stack import Stack, running

from guestpass.config import PluginSection, load_edge
from guestpass.edge import plugins as module
from guestpass.edge.isolation_wire import HOOKS, Frames, WireError, dump, load, pack
from guestpass.edge.plugin_loader import KINDS, build, check_class, fingerprint, section_line
from guestpass.edge.plugins import PluginSet
from guestpass.edge.threads import THREADS, Exhausted, Threads
from guestpass.edge.watchdog import Blocked, Watchdog
from guestpass.errors import ConfigError, PluginError, PluginFailed
from guestpass.model import Session, SessionKind, Share
from guestpass.plugin import (
    Authenticator,
    Client,
    Edits,
    Form,
    Host,
    PluginConfig,
    Redirect,
    RequestContext,
    RequestFilter,
    Revocation,
    Revoker,
    SignIn,
    Step,
)
from guestpass.testing import TestEdge, edge_with, use

SHARE = Share("s1", "n", "plant", "dash", "/", (), "o", "", 0.0, None, None)
SESSION = Session("e1", "s1", "r1", "a@example.org", SessionKind.COOKIE, "email-code", 0.0, 0.0, None, "c")


async def invited(address: str) -> bool:
    return True


SIGN_IN = SignIn("f1", None, Client("192.0.2.1"), {}, "https://share.example.com/callback/slow", invited)


@pytest.fixture
async def application() -> AsyncIterator[str]:
    async def show(request: web.Request) -> web.Response:
        return web.json_response({k.lower(): v for k, v in request.headers.items()})

    async with serving(dripping(show), handler_cancellation=True) as url:
        yield url


# ── plugins that block ───────────────────────────────────────────────────────────────────────────────────────────


class Blocking(Revoker):
    """Waits without awaiting, and uses the host from its thread."""

    blocking = True
    thread: threading.Thread | None = None
    release: threading.Event

    def check(self, share: Share, session: Session) -> Revocation | None:
        self.thread = threading.current_thread()
        assert self.release.wait(2)  # which nobody sets, unless the event loop runs meanwhile
        self.host.wait(self.host.storage.set("asked", session.id))
        return None


async def test_a_blocking_plugin_holds_up_nobody() -> None:
    async with edge_with(Blocking) as edge:
        plugin = edge.plugin(Blocking)
        plugin.release = threading.Event()
        visitor = await edge.admitted()
        asked = asyncio.create_task(visitor.get("/"))
        await edge.until(lambda: plugin.thread, "the hook runs")
        plugin.release.set()
        assert (await asked).status == 200
        assert plugin.thread is not threading.main_thread()
        assert await plugin.host.storage.get("asked")
        with pytest.raises(RuntimeError, match="threads"):
            plugin.host.wait(plugin.host.storage.get("asked"))


async def test_threads_that_never_return_open_the_breaker(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Stuck(Revoker):
        blocking = True

        def check(self, share: Share, session: Session) -> Revocation | None:
            release.wait()
            return None

    monkeypatch.setattr(module, "CHECK_DEADLINE", 0.05)
    monkeypatch.setattr(module, "BREAKER_FAILURES", 100)
    plugins = PluginSet({"revoke": [Stuck("stuck", PluginConfig())]})
    try:
        for _ in range(9):
            found = await plugins.check(SHARE, SESSION)
            assert found is not None
            assert found.reason == "plugin_failed"
        assert plugins.health()["revoke/stuck"].startswith("not asked after 100 failures")
    finally:
        release.set()


async def test_visitors_who_go_away_do_not_switch_a_plugin_off() -> None:
    """Their hooks run on in their threads, within their deadline: who comes next waits for a place."""
    release, begun = threading.Event(), []

    class Slow(Authenticator):
        blocking = True

        def begin(self, sign_in: SignIn) -> Step:
            begun.append(sign_in)
            assert release.wait(10)
            return Form("Who are you?")

    plugins = PluginSet({"authenticate": [Slow("slow", PluginConfig())]})

    async def begin() -> Step:
        return await plugins.begin("slow", SIGN_IN)

    visitors = [asyncio.create_task(begin()) for _ in range(THREADS)]
    async with asyncio.timeout(10):
        while len(begun) < THREADS:
            await asyncio.sleep(0.01)
    for visitor in visitors:
        visitor.cancel()
    await asyncio.gather(*visitors, return_exceptions=True)
    next_one = asyncio.create_task(begin())
    await asyncio.sleep(0)
    assert not next_one.done()
    release.set()
    assert await next_one == Form("Who are you?")
    assert not plugins.health()


async def test_a_hook_that_nobody_waits_for_still_has_its_deadline() -> None:
    release, begun = threading.Event(), threading.Event()
    threads = Threads("t", 1)
    going = asyncio.create_task(threads.run(0.05, lambda: begun.set() or release.wait()))
    async with asyncio.timeout(10):
        while not begun.is_set():
            await asyncio.sleep(0.01)
    going.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going
    with pytest.raises(TimeoutError):
        await threads.run(0.5, lambda: 1)
    with pytest.raises(Exhausted):
        await threads.run(0.5, lambda: 1)
    release.set()
    async with asyncio.timeout(10):
        while threads._left_behind:
            await asyncio.sleep(0.01)
    assert await threads.run(5, lambda: 7) == 7
    threads.close()


async def test_exit_in_a_thread_is_an_error_of_the_hook() -> None:
    threads = Threads("t", 1)
    with pytest.raises(RuntimeError, match="SystemExit"):
        await threads.run(5, lambda: exit(3))
    assert await threads.run(5, lambda: 7) == 7
    threads.close()
    with pytest.raises(Exhausted):
        await threads.run(5, lambda: 7)


def test_async_hooks_of_a_blocking_plugin_are_refused() -> None:
    class Both(Revoker):
        blocking = True

        async def check(self, share: Share, session: Session) -> Revocation | None:
            return None

    with pytest.raises(PluginError, match="async function"):
        check_class(KINDS["revoke"], "Both", Both)


def test_a_filter_needs_one_of_its_hooks() -> None:
    class Empty(RequestFilter):
        pass

    with pytest.raises(PluginError, match="compile and on_request"):
        check_class(KINDS["filter"], "Empty", Empty)


# ── the loop watchdog ────────────────────────────────────────────────────────────────────────────────────────────


class BlocksTheLoop(RequestFilter):
    """The usual mistake."""

    async def on_request(self, request: RequestContext) -> Edits | None:
        if request.path == "/slow":
            time.sleep(0.8)
        return None


async def test_who_blocks_the_loop_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async with edge_with(use(BlocksTheLoop, name="culprit")) as edge:
        visitor = await edge.admitted()
        assert (await visitor.get("/")).status == 200
        assert edge.faults() == {}
        assert (await visitor.get("/slow")).status == 200
        said = [r.getMessage() for r in caplog.records if "blocks the event loop" in r.getMessage()]
        assert len(said) == 1
        assert "request-filter 'culprit' blocks the event loop in on_request" in said[0]
        assert "test_running_plugins.py" in said[0]
        assert "on_request" in edge.faults()["filter/culprit"]
        count = edge.edge.metrics.registry.get_sample_value(
            "guestpass_loop_blocked_total", {"plugin": "culprit"}
        )
        assert count == 1


async def test_the_watchdog_tells_each_incident_once() -> None:
    told: list[Blocked] = []
    dog = Watchdog(lambda frame: None, told.append)
    dog.start()
    try:
        for _ in range(2):
            time.sleep(0.8)
            await asyncio.sleep(0.3)
        # A busy machine may stop us elsewhere as well.
        here = [t for t in told if "test_running_plugins" in t.place]
        assert len(here) == 2
        assert all(t.owner is None for t in here)
    finally:
        dog.stop()


# ── a process of its own: the conversation ───────────────────────────────────────────────────────────────────────


def test_what_comes_out_of_a_process_is_checked() -> None:
    check = HOOKS["revoker"]["check"].answer
    assert load(check, None) is None
    assert load(check, {"reason": "x", "session_id": "s"}) == Revocation("x", session_id="s")
    for wrong in ({}, {"reason": 1}, "x", [], {"reason": "x", "gateway": "y"}):
        with pytest.raises(WireError):
            load(check, wrong)
    step = HOOKS["authenticator"]["begin"].answer
    for value in (Form("t", fields=[], actions=[], state={"a": [1]}), Redirect("https://x")):
        assert load(step, json.loads(json.dumps(dump(step, value)))) == value
    for bad in ({"Popen": {}}, {"Form": {}, "Redirect": {}}, None, {"Form": {"title": []}}):
        with pytest.raises(WireError):
            load(step, bad)


def test_frames_come_in_any_pieces() -> None:
    data = pack({"do": "a"}) + pack({"do": "b", "x": "ü" * 100})
    for size in (1, 3, 7, len(data)):
        frames = Frames()
        found = [m for i in range(0, len(data), size) for m in frames.feed(data[i : i + size])]
        assert [m["do"] for m in found] == ["a", "b"]
    with pytest.raises(WireError):
        Frames().feed(b"\xff\xff\xff\xff")
    with pytest.raises(WireError):
        Frames().feed(b"\0\0\0\1x")
    with pytest.raises(WireError):
        pack({"do": "x" * (1 << 20)})


def test_a_plugin_that_cannot_be_loaded_in_its_process_stops_the_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "bad.py").write_text("import os\nos._exit(7)\n")
    (tmp_path / "bad.py").chmod(0o644)
    toml = tmp_path / "edge.toml"
    toml.write_text('[edge]\n\n[[revoke]]\nuse = "./bad.py:X"\nisolation = "process"\n')
    section = PluginSection.model_validate({"use": "./bad.py:X", "isolation": "process"})
    with pytest.raises(PluginError, match=r"edge\.toml.*exit status 7"):
        module._built(KINDS["revoke"], section, 1, toml)
    section = PluginSection.model_validate({"use": "./none.py:X", "isolation": "process"})
    with pytest.raises(PluginError, match=r"edge\.toml:3: \[\[revoke\]\] number 1.*none\.py"):
        module._built(KINDS["revoke"], section, 1, toml)
    with pytest.raises(ValueError, match="the one value"):
        PluginSection.model_validate({"use": "x", "isolation": "thread"})


# ── errors name the line ─────────────────────────────────────────────────────────────────────────────────────────


def test_errors_name_the_line(tmp_path: Path) -> None:
    toml = tmp_path / "edge.toml"
    toml.write_text(
        '[edge]\n[[filter]]\nuse = "a"\n\n [[ filter ]] # second\nuse = "b"\n[choose]\nuse = "c"\n'
    )
    assert [section_line(toml, "filter", n) for n in (1, 2, 3)] == [2, 5, None]
    assert section_line(toml, "choose", 1) == 7
    with pytest.raises(PluginError, match=r"edge\.toml:5: \[\[filter\]\] number 2") as caught:
        build(KINDS["filter"], PluginSection(use="nothing-such"), 2, toml)
    assert "plugin list" in caught.value.hint
    wrong = PluginSection.model_validate({"use": "random", "zone": 1})
    with pytest.raises((ConfigError, PluginError), match=r"edge\.toml:7: .*zone") as fault:
        build(
            KINDS["choose"],
            wrong.model_copy(update={"use": "guestpass_plugins.choose.random:Random"}),
            1,
            toml,
        )
    assert "guestpass plugin show" in fault.value.hint


# ── a new set on SIGHUP ──────────────────────────────────────────────────────────────────────────────────────────

FILTER = """
from guestpass.plugin import *

class Adds(RequestFilter):
    def compile(self, share, session):
        return Static(edits=Edits(add=(("X-Version", "{version}"),)))
"""

REVOKER = """
from guestpass.plugin import *

class NotAlice(Revoker):
    def check(self, share, session):
        if session.email == "alice@example.org":
            return Revocation("not_alice", session_id=session.id)
"""


def toml_of(stack: Stack, *sections: str) -> None:
    """edge.toml as the running edge has it, with these sections of plugins."""
    edge = stack.edge.config.edge
    assert edge.tls is not None
    lines = [
        "[edge]",
        f"listen = {json.dumps(list(edge.listen))}",
        f'admin_listen = "{edge.admin_listen}"',
        f'public_url = "{edge.public_url}"',
        f'share_domain = "{edge.share_domain}"',
        f'state = "{edge.state}"',
        f'outbox = "{edge.outbox}"',
        "drain_seconds = 1",
        f"fast_lane = {json.dumps(edge.fast_lane)}",
        f'tls = {{ cert = "{edge.tls.cert}", key = "{edge.tls.key}" }}',
        *sections,
    ]
    stack.edge.config.file.write_text("\n".join(lines) + "\n")


def write(folder: Path, name: str, text: str) -> None:
    folder.chmod(0o755)
    (folder / name).write_text(text)
    (folder / name).chmod(0o644)


async def version(stack: Stack) -> str | None:
    answer = await stack.get("/")
    assert answer.status == 200, answer.body
    found: dict[str, Any] = json.loads(answer.body)
    return found.get("x-version")


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
async def test_a_new_set_keeps_streams(tmp_path: Path, application: str, lane: str) -> None:
    write(tmp_path, "adds.py", FILTER.format(version=1))
    config = {"filter": [{"use": "./adds.py:Adds"}]}
    async with running(tmp_path, application, config=config, lane=lane) as stack:
        assert await version(stack) == "1"
        headers = {"Host": stack.host, **stack.authorization}
        async with stack.session.get(stack.url("/forever"), headers=headers) as download:
            await download.content.readexactly(100)
            write(tmp_path, "adds.py", FILTER.format(version=2))
            toml_of(stack, "[[filter]]", 'use = "./adds.py:Adds"')
            await stack.edge.reload()
            assert await version(stack) == "2"
            await download.content.readexactly(1000)
            # Nothing has changed: nothing is loaded again.
            before = stack.edge.plugins.all
            await stack.edge.reload()
            assert stack.edge.plugins.all == before
            toml_of(stack)
            await stack.edge.reload()
            assert await version(stack) is None
            await download.content.readexactly(1000)
            assert await stack.edge.service.delete(stack.share_id)
            with pytest.raises(Exception):  # noqa: B017, PT011 - however aiohttp calls it
                await download.content.readexactly(1 << 30)


async def test_a_new_revoker_is_asked_about_what_is_open(tmp_path: Path, application: str) -> None:
    async with running(tmp_path, application, lane="fast") as stack:
        headers = {"Host": stack.host, **stack.authorization}
        async with stack.session.get(stack.url("/forever"), headers=headers) as download:
            await download.content.readexactly(100)
            write(tmp_path, "no.py", REVOKER)
            toml_of(stack, "[[revoke]]", 'use = "share-state"', "[[revoke]]", 'use = "./no.py:NotAlice"')
            await stack.edge.reload()
            with pytest.raises(Exception):  # noqa: B017, PT011 - however aiohttp calls it
                await download.content.readexactly(1 << 30)
        assert (await stack.get("/")).status == 403


async def test_a_broken_new_set_keeps_the_old_one(
    tmp_path: Path, application: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "adds.py", FILTER.format(version=1))
    config = {"filter": [{"use": "./adds.py:Adds"}]}
    async with running(tmp_path, application, config=config) as stack:
        for broken in ("import nothing_such\n", "class Adds: pass\n", FILTER.replace("class", "clas")):
            write(tmp_path, "adds.py", broken)
            toml_of(stack, "[[filter]]", 'use = "./adds.py:Adds"')
            await stack.edge.reload()
            said = caplog.records[-1].getMessage()
            assert said.startswith("reload: ")
            assert "edge.toml:11: [[filter]] number 1" in said
            assert said.endswith("nothing was changed")
            assert await version(stack) == "1"
        write(
            tmp_path,
            "adds.py",
            FILTER.format(version=1) + "\n    async def start(self, host):\n        1 / 0\n",
        )
        await stack.edge.reload()
        assert "cannot start: ZeroDivisionError" in caplog.records[-1].getMessage()
        assert await version(stack) == "1"


def test_a_change_of_any_file_that_plugins_come_from_is_seen(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text(
        '[mail]\nsmtp = "smtps://guest@mail.example.org"\nfrom = "share@example.org"\n'
        'password = { file = "password" }\n'
        '[[filter]]\nuse = "./adds.py:Adds"\nkeys = [{ key = { file = "key" } }]\n'
    )
    seen = set()
    for name in ("password", "key", "adds.py", "other"):
        (tmp_path / name).write_text("changed")
        seen.add(fingerprint(load_edge(tmp_path / "edge.toml")))
    assert len(seen) == 3


class Cycle(Revoker):
    """Notes its life, and answers when it may."""

    def __init__(self, name: str, *, slow_start: bool = False) -> None:
        super().__init__(name, PluginConfig())
        self.slow_start = slow_start
        self.may_answer = asyncio.Event()
        self.said: list[str] = []

    async def start(self, host: Host) -> None:
        await super().start(host)
        self.said.append("started")
        if self.slow_start:
            await asyncio.Event().wait()

    async def stop(self) -> None:
        self.said.append("stopped")

    async def check(self, share: Share, session: Session) -> None:
        self.said.append("asked")
        await self.may_answer.wait()


async def test_a_replacement_that_is_cut_short_leaves_no_plugin_behind() -> None:
    """As when the edge is told to stop during a reload."""
    old, new, ready, slow = Cycle("old"), Cycle("new"), Cycle("ready"), Cycle("slow", slow_start=True)

    async def cut_short(edge: TestEdge, last: Cycle, *plugins: Cycle) -> None:
        replacing = asyncio.create_task(edge.edge.plugins.replace(PluginSet({"revoke": plugins})))
        await edge.until(lambda: last.said, "the last of the new ones is being started")
        replacing.cancel()
        await asyncio.wait((replacing,))
        assert replacing.cancelled()

    async with edge_with(old) as edge:
        asked = asyncio.create_task((await edge.admitted()).get("/"))
        await edge.until(lambda: "asked" in old.said, "the old one is asked")
        await cut_short(edge, slow, ready, slow)
        assert ready.said == slow.said == ["started", "stopped"]
        assert old.said == ["started", "asked"], "it goes on as before"
        await cut_short(edge, new, new)  # while a hook of the old one runs
        assert old.said == ["started", "asked", "stopped"]
        assert new.said == ["started"]
        old.may_answer.set()
        await asked
    assert new.said == ["started", "stopped"]


async def test_sessions_of_an_authenticator_that_is_gone_are_over(tmp_path: Path, application: str) -> None:
    write(tmp_path, "other.py", OTHER)
    both = {"authenticate": [{"use": "email-code"}, {"use": "bearer-token"}, {"use": "./other.py:Other"}]}
    async with running(tmp_path, application, config=both) as stack:
        service = stack.edge.service
        _, secret = await service.open_session(
            stack.share_id, "alice@example.org", SessionKind.COOKIE, "Other", module_client(), None
        )
        headers = {"Host": stack.host, "Cookie": f"__Host-guestpass={secret}"}
        async with stack.session.get(stack.url("/"), headers=headers) as answer:
            assert answer.status == 200
        toml_of(stack, "[[authenticate]]", 'use = "email-code"', "[[authenticate]]", 'use = "bearer-token"')
        await stack.edge.reload()
        async with stack.session.get(stack.url("/"), headers=headers) as answer:
            assert answer.status == 401
        assert (await stack.get("/")).status == 200
        # For good: the store knows.
        assert [s.provider for s in await service.sessions(stack.share_id, live=True)] == ["bearer-token"]


OTHER = """
from guestpass.plugin import *

class Other(Authenticator):
    label = "Other"
    async def begin(self, sign_in):
        raise Denied("no")
"""


def module_client() -> Any:
    from guestpass.plugin import Client

    return Client("127.0.0.1")


async def test_failing_hooks_are_not_hidden_by_others_of_the_plugin() -> None:
    """A notifier that accepts and never delivers is switched off all the same."""
    from guestpass.plugin import Message, NotDelivered, Notifier

    class Never(Notifier):
        def accepts(self, message: Message) -> bool:
            return True

        def deliver(self, message: Message) -> str:
            raise OSError("no route")

    plugins = PluginSet({"notify": [Never("never", PluginConfig())]})
    (notifier,) = plugins.notifiers
    for _ in range(module.BREAKER_FAILURES):
        assert await notifier.accepts(Message("code", "a@b", "s", "t"))
        with pytest.raises(NotDelivered):
            await notifier.deliver(Message("code", "a@b", "s", "t"))
    assert "notify/never" in plugins.health()
    with pytest.raises(PluginFailed):
        await plugins._notify[0].ask("deliver", 1, lambda: None)
