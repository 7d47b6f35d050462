"""Loading of plugins, and what holds when they do something wrong."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
from support.people import ALICE, People, people, plugin, usual

from guestpass.config import EdgeConfig, PluginSection
from guestpass.edge import plugin_loader as loader
from guestpass.edge import plugins as module
from guestpass.edge.plugin_loader import build
from guestpass.edge.plugins import BREAKER_FAILURES, KINDS, PluginSet, load_available, load_class
from guestpass.errors import ConfigError, Forbidden, GuestpassError, PluginError, PluginFailed
from guestpass.model import Candidate, Event, Identity, Revocation, Session, SessionKind, Share
from guestpass.plugin import (
    Authenticator,
    BackendChooser,
    Choice,
    Client,
    Denied,
    Edits,
    Form,
    Message,
    NotDelivered,
    Notifier,
    Observer,
    Plugin,
    PluginConfig,
    RequestContext,
    RequestFilter,
    Revoker,
    SignIn,
    Step,
)

SHARE = Share("s1", "n", "plant", "dash", "/", (), "o", "", 0.0, None, None)
SESSION = Session("e1", "s1", "r1", ALICE, SessionKind.COOKIE, "email-code", 0.0, 0.0, None, "c")
CANDIDATES = (Candidate("plant", "a"), Candidate("plant", "b"))
REQUEST = RequestContext("GET", "/", (), Client("192.0.2.1"), SHARE, SESSION, 0.0)

GOOD = """
from datetime import time
from guestpass.plugin import *

class Hours(RequestFilter):
    class Config(PluginConfig):
        opens: time
        secret: Secret = "none"
        list: ConfigPath = "list.txt"

    def on_request(self, request):
        if request.now().time() < self.config.opens:
            raise Denied("Open during office hours only.")

class Later(Hours):
    api_version = 2

class Half(Revoker):
    pass

class Not:
    pass
"""


class CheckOnly(Revoker):
    """Answers with what it is given, which may be an exception or something to await."""

    answer: Any = None

    async def check(self, share: Share, session: Session) -> Revocation | None:
        if isinstance(self.answer, BaseException):
            raise self.answer
        if asyncio.iscoroutinefunction(self.answer):
            return await self.answer()  # type: ignore[no-any-return]
        return self.answer  # type: ignore[no-any-return]


def revoker(answer: Any, name: str = "r") -> Revoker:
    made = plugin(CheckOnly, name)
    assert isinstance(made, CheckOnly)
    made.answer = answer
    return made


def with_revokers(*answers: Any, **more: Any) -> PluginSet:
    return PluginSet({"revoke": [revoker(a, f"r{i}") for i, a in enumerate(answers)]}, **more)


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    path = tmp_path / "hours.py"
    path.write_text(GOOD)
    path.chmod(0o644)
    return path


def edge_toml(folder: Path, **sections: Sequence[Mapping[str, Any]]) -> EdgeConfig:
    made = {k: tuple(PluginSection.model_validate(s) for s in v) for k, v in sections.items()}
    plain = {
        "authenticate": (PluginSection(use="guestpass_plugins.authenticate.email_code:EmailCode"),),
        "revoke": (PluginSection(use="guestpass_plugins.revoke.share_state:ShareState", name="share-state"),),
        "choose": (),
        "observe": (),
        **made,
    }
    return EdgeConfig(**plain, file=folder / "edge.toml")  # type: ignore[arg-type]


def fault(config: EdgeConfig) -> GuestpassError:
    with pytest.raises((ConfigError, PluginError)) as caught:
        PluginSet.load(config)
    return caught.value


@pytest.fixture(autouse=True)
def _share_state_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tests run on a source tree nothing is installed: give the set what the wheel's entry points say."""
    real = loader.entry_points

    def points(*, group: str) -> Any:
        found = list(real(group=group))
        if group == "guestpass.revoke" and not found:
            target = "guestpass_plugins.revoke.share_state:ShareState"
            found.append(EntryPoint("share-state", target, group))
        return found

    monkeypatch.setattr(loader, "entry_points", points)


def test_a_file_beside_the_configuration(file: Path) -> None:
    before = list(sys.path)
    section = {"use": "./hours.py:Hours", "opens": "09:00", "secret": {"file": "key"}, "list": "l.txt"}
    (file.parent / "key").write_text("hush\n")
    loaded = PluginSet.load(edge_toml(file.parent, filter=[section]))
    assert sys.path == before
    (found,) = loaded.filters
    assert found.name == "Hours"
    assert found.config.secret.get_secret_value() == "hush"
    assert "hush" not in repr(found.config)
    assert found.config.list == file.parent / "l.txt"


@pytest.mark.parametrize(
    ("section", "says", "hint"),
    [
        ({"use": "./hours.py:Hours"}, 'the key "opens" is missing', ""),
        ({"use": "./hours.py:Hours", "opens": "9", "close": 1}, "opens", ""),
        (
            {"use": "./hours.py:Hours", "opens": "09:00", "open": 1},
            'unknown key "open"; did you mean "opens"?',
            "",
        ),
        (
            {"use": "./hours.py:Hours", "opens": "09:00", "secret": {"env": "NO_SUCH"}},
            "NO_SUCH is not set",
            "",
        ),
        ({"use": "./hours.py:Hour", "opens": "09:00"}, "there is no 'Hour' in it", 'Did you mean "Hours"?'),
        ({"use": "./hours.py:Later", "opens": "09:00"}, "version 2 of the plugin API", "Install versions"),
        ({"use": "./hours.py:Half"}, "is of kind revoker, not request-filter", "[[revoke]]"),
        ({"use": "./hours.py:Not"}, "is not a plugin class", "RequestFilter"),
        ({"use": "./none.py:X"}, "No such file", "relative to edge.toml"),
        ({"use": "./hours.py"}, "is not of the form ./file.py:Class", ""),
        ({"use": "no_such_package.x:Y"}, "cannot be imported", "installed in the environment"),
        ({"use": "no-such"}, 'there is no request-filter "no-such"', "guestpass plugin list"),
    ],
)
def test_faults_name_the_file_the_section_and_the_next_step(
    file: Path, section: dict[str, Any], says: str, hint: str
) -> None:
    error = fault(edge_toml(file.parent, filter=[section]))
    assert error.exit_status == 2
    assert error.message.startswith(
        f'{file.parent / "edge.toml"}: [[filter]] number 1 (use = "{section["use"]}")'
    )
    assert says in error.message
    assert "\n" not in error.message
    assert hint in error.hint


def test_missing_hooks_are_named(file: Path) -> None:
    error = fault(edge_toml(file.parent, revoke=[{"use": "./hours.py:Half"}]))
    assert 'plugin "./hours.py:Half" lacks check' in error.message


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX")
@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_a_file_that_others_may_write_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    error = fault(edge_toml(file.parent, filter=[{"use": "./hours.py:Hours", "opens": "09:00"}]))
    assert "others may write to" in error.message
    assert error.hint.startswith("Run: chmod go-w")


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX")
def test_a_file_in_a_folder_that_others_may_write_is_refused(file: Path) -> None:
    file.parent.chmod(0o777)
    assert (
        f"others may write to {file.parent}"
        in fault(edge_toml(file.parent, filter=[{"use": "./hours.py:Hours", "opens": "09:00"}])).message
    )


def test_a_file_that_raises(file: Path) -> None:
    file.write_text("1 / 0")
    error = fault(edge_toml(file.parent, filter=[{"use": "./hours.py:Hours"}]))
    assert "ZeroDivisionError: division by zero" in error.message


def test_two_of_one_name(file: Path) -> None:
    section = {"use": "./hours.py:Hours", "opens": "09:00"}
    error = fault(edge_toml(file.parent, filter=[section, section]))
    assert 'there is another "Hours"' in error.message
    named = {**section, "name": "second"}
    assert [f.name for f in PluginSet.load(edge_toml(file.parent, filter=[section, named])).filters] == [
        "Hours",
        "second",
    ]


def test_share_state_is_always_on(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    loaded = PluginSet.load(edge_toml(tmp_path, revoke=()))
    assert [s.name for s in loaded.states()] == ["EmailCode", "share-state"]


def test_a_way_to_sign_in_is_needed(tmp_path: Path) -> None:
    token = {"use": "guestpass_plugins.authenticate.bearer_token:BearerToken"}
    assert "no way to sign in is left" in fault(edge_toml(tmp_path, authenticate=[token])).message


def test_what_is_installed_is_listed_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "tried-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tried\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[guestpass.filter]\nweekdays = tried_module:Weekdays\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = next(a for a in load_available() if a.name == "weekdays")
    assert (found.kind, found.package, found.version) == ("request-filter", "tried", "1.0")
    assert "tried_module" not in sys.modules
    with pytest.raises(PluginError, match="tried_module:Weekdays"):
        load_class(KINDS["filter"], "weekdays", tmp_path)
    with pytest.raises(PluginError) as caught:
        load_class(KINDS["filter"], "weekday", tmp_path)
    assert 'Did you mean "weekdays"?' in caught.value.hint


def test_two_packages_that_bring_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them the configuration means is not for the order of their installation to say; nothing is imported."""
    group = KINDS["authenticate"].group
    ours = [p for p in entry_points(group=group) if p.name == "email-code"]
    other = EntryPoint("email-code", "no_such_package:EmailCode", group)
    monkeypatch.setattr(loader, "entry_points", lambda group: [*ours, other])
    with pytest.raises(PluginError, match=r"several.*guestpass_plugins.*no_such_package") as caught:
        load_class(KINDS["authenticate"], "email-code", tmp_path)
    assert "package.module:Class" in caught.value.hint
    monkeypatch.setattr(
        loader, "entry_points", lambda group: [*ours, *ours]
    )  # found twice, as in a source tree
    assert load_class(KINDS["authenticate"], "email-code", tmp_path).__name__ == "EmailCode"


def test_construction_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Observer):
        def __init__(self, name: str, config: PluginConfig) -> None:
            raise OSError("no disk")

        async def on_event(self, event: Event) -> None: ...

    monkeypatch.setattr(sys.modules[__name__], "Broken", Broken, raising=False)
    section = PluginSection(use=f"{__name__}:Broken")
    monkeypatch.setattr(loader, "_from_module", lambda use: Broken)
    with pytest.raises(PluginError, match="cannot be constructed: OSError: no disk"):
        build(KINDS["observe"], section, 1, tmp_path / "edge.toml")


# ── deciding hooks fail closed ───────────────────────────────────────────────────────────────────────────────────


async def test_any_revoker_is_enough() -> None:
    revocation = Revocation("why not", session_id="e1")
    assert await with_revokers(None, None).check(SHARE, SESSION) is None
    assert await with_revokers(None, revocation).check(SHARE, SESSION) == revocation


async def test_a_revoker_that_raises_revokes_with_an_id_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    hooks: list[tuple[str, str, bool]] = []
    chosen = with_revokers(ValueError("oops"), observe_hook=lambda p, h, s, e: hooks.append((p, h, e)))
    answer = await chosen.check(SHARE, SESSION)
    assert answer is not None
    assert answer.error_id is not None
    assert len(answer.error_id) == 8
    assert answer.error_id in caplog.text
    assert "ValueError: oops" in caplog.text
    assert hooks == [("r0", "check", True)]


async def test_a_revoker_that_answers_nonsense_revokes() -> None:
    answer = await with_revokers("yes").check(SHARE, SESSION)
    assert answer is not None
    assert answer.error_id is not None


async def test_a_deadline_holds_even_when_the_hook_ignores_its_cancellation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHECK_DEADLINE", 0.05)
    let_go = asyncio.Event()

    async def stubborn() -> None:
        while not let_go.is_set():
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                await let_go.wait()

    answer = await with_revokers(stubborn).check(SHARE, SESSION)
    assert answer is not None
    assert answer.error_id is not None
    let_go.set()


async def test_denied_comes_with_the_plugins_words() -> None:
    with pytest.raises(Forbidden, match="Not on Sundays") as caught:
        await with_revokers(Denied("Not on Sundays.")).check(SHARE, SESSION)
    assert caught.value.error_code == "denied"


async def test_cancellation_passes() -> None:
    async def long() -> None:
        await asyncio.sleep(60)

    chosen = with_revokers(long)
    task = asyncio.create_task(chosen.check(SHARE, SESSION))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert chosen.states()[0].state == "ok"


async def test_the_breaker_opens_stays_closed_to_questions_and_lets_one_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = 0
    works = False

    async def answer() -> None:
        nonlocal asked
        asked += 1
        if not works:
            raise ValueError("down")

    chosen = with_revokers(answer)
    for _ in range(BREAKER_FAILURES):
        await chosen.check(SHARE, SESSION)
    (state,) = chosen.states()
    assert state.state == "off"
    assert state.failures == BREAKER_FAILURES
    assert state.retry_at is not None
    assert list(chosen.health()) == ["revoke/r0"]
    denied = await chosen.check(SHARE, SESSION)
    assert denied is not None
    assert denied.error_id == state.error_id
    assert asked == BREAKER_FAILURES
    assert "it is not asked for" in caplog.text
    # Time passes; the first question that fails keeps it off, the first that works switches it on.
    clock = module.time.monotonic() + module.BREAKER_SECONDS
    monkeypatch.setattr(module.time, "monotonic", lambda: clock)
    await chosen.check(SHARE, SESSION)
    await chosen.check(SHARE, SESSION)
    assert asked == BREAKER_FAILURES + 1
    clock += module.BREAKER_SECONDS
    works = True
    assert await chosen.check(SHARE, SESSION) is None
    assert chosen.health() == {}
    assert chosen.states()[0].state == "ok"


async def test_being_denied_is_no_failure() -> None:
    chosen = with_revokers(Denied("no"))
    for _ in range(BREAKER_FAILURES * 2):
        with pytest.raises(Forbidden):
            await chosen.check(SHARE, SESSION)
    assert chosen.health() == {}


# ── choosers ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Chooses(BackendChooser):
    answer: Any = None

    def choose(self, choice: Choice) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def with_choosers(*answers: Any) -> PluginSet:
    made = []
    for number, answer in enumerate(answers):
        chooser = plugin(Chooses, f"c{number}")
        chooser.answer = answer  # type: ignore[attr-defined]
        made.append(chooser)
    return PluginSet({"choose": made})


@pytest.mark.parametrize("first", [None, ValueError("oops"), Candidate("other", "x"), "a"])
async def test_the_next_chooser_answers_when_one_does_not(first: Any) -> None:
    chosen = with_choosers(first, CANDIDATES[1])
    assert await chosen.choose(Choice(SHARE, SESSION, CANDIDATES)) == CANDIDATES[1]


async def test_the_last_resort_is_chance() -> None:
    chosen = with_choosers(ValueError("oops"))
    found = {(await chosen.choose(Choice(SHARE, SESSION, CANDIDATES))).name for _ in range(64)}
    assert found == {"a", "b"}


# ── filters ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Filters(RequestFilter):
    answer: Any = None

    def on_request(self, request: RequestContext) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def with_filters(*answers: Any) -> PluginSet:
    made = []
    for number, answer in enumerate(answers):
        found = plugin(Filters, f"f{number}")
        found.answer = answer  # type: ignore[attr-defined]
        made.append(found)
    return PluginSet({"filter": made})


async def test_edits_of_all_filters_come_together() -> None:
    first, second = Edits(frozenset({"a"}), (("x", "1"),)), Edits(frozenset({"b"}), (("y", "2"),))
    assert await with_filters(None, first, second).on_request(REQUEST) == Edits(
        frozenset({"a", "b"}), (("x", "1"), ("y", "2"))
    )
    assert await with_filters(None).on_request(REQUEST) is None


async def test_a_filter_refuses_or_fails() -> None:
    with pytest.raises(Denied, match="Office hours"):
        await with_filters(Denied("Office hours.")).on_request(REQUEST)
    with pytest.raises(PluginFailed):
        await with_filters(ValueError("oops")).on_request(REQUEST)
    with pytest.raises(PluginFailed):
        await with_filters("nonsense").on_request(REQUEST)


@pytest.mark.parametrize(
    ("name", "value"),
    [("x", "1\r\nX-Guestpass-Email: eve@example.org"), ("x: y\r\nz", "1"), ("", "1"), ("x", "\u2028")],
)
async def test_what_a_filter_adds_brings_no_further_fields(name: str, value: str) -> None:
    with pytest.raises(PluginFailed):
        await with_filters(Edits(add=((name, value),))).on_request(REQUEST)


# ── authenticators ───────────────────────────────────────────────────────────────────────────────────────────────


class Signs(Authenticator):
    label = "Sign"
    answer: Any = None

    async def begin(self, sign_in: SignIn) -> Step:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]

    async def identify(self, request: RequestContext) -> Identity | None:
        return self.answer  # type: ignore[no-any-return]


async def nobody(email: str) -> bool:
    return False


SIGN_IN = SignIn("flow", SHARE, Client("192.0.2.1"), {}, "http://x/callback/s", nobody)


def with_authenticators(*answers: Any) -> PluginSet:
    made = []
    for number, answer in enumerate(answers):
        found = plugin(Signs, f"a{number}")
        found.answer = answer  # type: ignore[attr-defined]
        made.append(found)
    return PluginSet({"authenticate": made})


async def test_an_identity_is_made_canonical_and_says_who_proved_it() -> None:
    chosen = with_authenticators(Identity("Alice@Example.ORG", "somebody else"))
    step = await chosen.begin("a0", SIGN_IN)
    assert isinstance(step, Identity)
    assert (step.email, step.provider) == (ALICE, "a0")
    assert step.proven > 0


async def test_a_proof_is_of_now_or_before() -> None:
    """One of the future would outlive that its address is signed out of everything."""
    now = time.time()
    for claimed, expected in ((now + 1e6, now), (now - 60, now - 60)):
        step = await with_authenticators(Identity(ALICE, "x", proven=claimed)).begin("a0", SIGN_IN)
        assert isinstance(step, Identity)
        assert abs(step.proven - expected) < 30


@pytest.mark.parametrize("answer", [None, "alice@example.org", Identity("a@b@c", "x"), ValueError("oops")])
async def test_an_authenticator_that_fails_admits_nobody(answer: Any) -> None:
    with pytest.raises(PluginFailed):
        await with_authenticators(answer).begin("a0", SIGN_IN)


async def test_credentials_in_the_request_are_asked_for_in_order() -> None:
    chosen = with_authenticators(None, Identity(ALICE, ""), Identity("bob@example.org", ""))
    found = await chosen.identify(REQUEST)
    assert found is not None
    assert (found.email, found.provider) == (ALICE, "a1")
    assert await with_authenticators(None).identify(REQUEST) is None


async def test_steps_of_unknown_authenticators() -> None:
    with pytest.raises(KeyError):
        await with_authenticators(Form("x")).begin("other", SIGN_IN)


# ── lifecycle ────────────────────────────────────────────────────────────────────────────────────────────────────


class Told(Observer):
    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self.events: list[Event] = []
        self.fails = False
        self.stopped = False

    async def on_event(self, event: Event) -> None:
        if self.fails:
            raise ValueError("oops")
        self.events.append(event)

    async def stop(self) -> None:
        self.stopped = True


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[People]:
    observers: list[Plugin] = [plugin(Told, "bad"), plugin(Told, "good")]
    async with people(tmp_path, plugins={**usual(), "observe": observers}) as found:
        yield found


def observer(edge: People, name: str) -> Told:
    found = next(s.plugin for s in edge.plugins._observe if s.name == name)
    assert isinstance(found, Told)
    return found


async def test_an_observer_that_fails_disturbs_nobody(edge: People) -> None:
    observer(edge, "bad").fails = True
    for number in range(20):
        edge.events.emit(Event(f"e{number}", 0.0))
    await edge.plugins.stop()
    assert [e.type for e in observer(edge, "good").events] == [f"e{n}" for n in range(20)], (
        "some were lost at the stop"
    )
    assert observer(edge, "good").stopped


async def test_a_plugin_that_cannot_start_stops_those_that_did(tmp_path: Path) -> None:
    class Refuses(BackendChooser):
        async def start(self, host: Any) -> None:
            raise OSError("no network")

        async def choose(self, choice: Choice) -> None:
            return None

    told = plugin(Told, "told")
    with pytest.raises(PluginError, match=r"the backend-chooser 'refuses' cannot start: OSError: no network"):
        async with people(tmp_path, plugins={"observe": [told], "choose": [plugin(Refuses, "refuses")]}):
            pass
    assert isinstance(told, Told)
    assert told.stopped


async def test_what_a_host_offers(edge: People) -> None:
    host = observer(edge, "good").host
    other = observer(edge, "bad").host
    await host.storage.set("k", {"v": 1})
    assert await host.storage.get("k") == {"v": 1}
    assert await other.storage.get("k") is None, "another plugin's storage"
    assert host.derive_key("a") == host.derive_key("a")
    assert len({host.derive_key("a"), host.derive_key("b"), other.derive_key("a")}) == 3
    share, _ = await edge.share()
    session, token = await edge.service.create_token(share.id, ALICE)
    identity = await host.resolve_token(token)
    assert identity is not None
    assert identity.email == ALICE
    assert await host.resolve_token("gp_" + "x" * 43) is None
    assert await host.resolve_token("ghp_other") is None
    assert [s.id for s in await host.live_sessions(share.id)] == [session.id]
    await host.record(Event("tried", 1.0))
    assert (await edge.service.audit()).items[0].event.type == "tried"
    await edge.service.delete(share.id)
    assert await host.resolve_token(token) is None
    assert await host.live_sessions(share.id) == []


async def test_background_work_that_fails_is_logged_and_ends_with_the_plugin(
    edge: People, caplog: pytest.LogCaptureFixture
) -> None:
    host = observer(edge, "good").host
    cancelled = asyncio.Event()

    async def fails() -> None:
        raise ValueError("oops")

    async def lasts() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with caplog.at_level(logging.ERROR):
        host.spawn(fails(), name="a try")
        host.spawn(lasts(), name="another")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await edge.plugins.stop()
    assert "observe/good: a try failed" in caplog.text
    assert cancelled.is_set()


# ── notifiers ────────────────────────────────────────────────────────────────────────────────────────────────────


class Delivers(Notifier):
    answer: Any = "kept"

    async def deliver(self, message: Message) -> str:
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


async def test_notifiers_as_the_courier_sees_them() -> None:
    inner = plugin(Delivers, "n")
    assert isinstance(inner, Delivers)
    (notifier,) = PluginSet({"notify": [inner]}).notifiers
    message = Message("code", ALICE, "s", "t")
    assert await notifier.accepts(message)
    assert await notifier.deliver(message) == "kept"
    inner.answer = NotDelivered("550 no such user", permanent=True)
    with pytest.raises(NotDelivered) as caught:
        await notifier.deliver(message)
    assert caught.value.permanent
    inner.answer = OSError("no route")
    with pytest.raises(NotDelivered, match="Error id") as caught:
        await notifier.deliver(message)
    assert not caught.value.permanent


# ── watches ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Watches(Revoker):
    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self.queue: asyncio.Queue[Revocation | Exception] = asyncio.Queue()
        self.broken = False

    async def check(self, share: Share, session: Session) -> Revocation | None:
        return None

    async def watch(self) -> AsyncIterator[Revocation]:  # type: ignore[override]
        if self.broken:
            raise OSError("no route")
        while True:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            yield item


async def eventually(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


async def test_what_a_watch_says_is_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_LOST_SECONDS", 0.3)
    monkeypatch.setattr(module, "WATCH_SETTLE_SECONDS", 0.05)
    watches = plugin(Watches, "w")
    assert isinstance(watches, Watches)
    chosen = usual()
    chosen["revoke"].append(watches)
    async with people(tmp_path, plugins=chosen) as edge:
        share, _ = await edge.share()
        browser = edge.browser()
        origin = edge.origins.share_origin(share.id)
        await browser.sign_in(origin)
        assert len(edge.grants) == 1
        watches.queue.put_nowait(Revocation("they left", share_id=share.id))
        await eventually(lambda: len(edge.grants) == 0)
        # It dies once and is started again: nothing is lost.
        watches.queue.put_nowait(OSError("reset"))
        await browser.get(origin)
        watches.queue.put_nowait(Revocation("they left", share_id=share.id))
        await eventually(lambda: len(edge.grants) == 0)
        await eventually(lambda: edge.plugins._revoke[1].watch_lost is None)
        # It stays dead: what it would say is unknown, so everybody is out.
        await browser.get(origin)
        assert len(edge.grants) == 1
        watches.broken = True
        watches.queue.put_nowait(OSError("reset"))
        await eventually(lambda: len(edge.grants) == 0)
        session = (await edge.service.sessions(share.id))[0]
        for _ in range(BREAKER_FAILURES + 1):
            answer = await edge.plugins.check(share, session)
            assert answer is not None
            assert answer.error_id is not None
        # And comes back.
        watches.broken = False
        await eventually(lambda: edge.plugins._revoke[1].watch_lost is None)
        assert await edge.plugins.check(share, session) is None
