"""The plugins of an edge: lifecycle, and containment of what they do wrong.

How it works, in order:

1. `PluginSet.load(config)` loads, validates and constructs what the configuration names (see `plugin_loader`), before
   anything listens.
2. `start` gives each plugin its host and starts them in the order of the configuration; the first that raises
   stops those that ran already and the edge does not start.
3. Hooks go through a `_Slot`: a deadline, a metric, an error id that stands in the log, a circuit breaker.
   Hooks that decide fail closed; choosers fall through to the next; notifiers are retried by the courier;
   observers are isolated.
4. `stop` ends the background work, then stops the plugins in reverse order.

A deadline is kept even when a hook swallows its cancellation: the hook runs in a task of its own, which is
cancelled and left behind. Hooks of a `blocking` plugin run in threads (see `threads`). What blocks the event loop
itself cannot be stopped from inside it, but is named (see `watchdog`); a plugin with `isolation = "process"` runs in a
process of its own (see `isolation`), and what stands here in its place is a proxy that answers to the same hooks.

`replace` swaps the set of a running edge for another one: those who hold this object need not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import inspect
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import aiohttp
import orjson

from guestpass import tokens
from guestpass.addresses import canonical
from guestpass.config import EdgeConfig, PluginSection
from guestpass.edge.incoming import IncomingRoutes
from guestpass.edge.isolation import Isolated, isolated
from guestpass.edge.plugin_loader import (
    KINDS,
    Available,
    Kind,
    build,
    in_one_line,
    load_available,
    load_class,
    place,
    section_line,
)
from guestpass.edge.static import Compiled, StaticCompiler, check_edits, spellings
from guestpass.edge.threads import Exhausted, Threads
from guestpass.edge.watchdog import Blocked, Watchdog
from guestpass.errors import (
    ConfigError,
    Forbidden,
    GuestpassError,
    InvalidEmail,
    NotFound,
    PluginError,
    PluginFailed,
    ShareEnded,
)
from guestpass.model import Candidate, Event, Identity, Revocation, Session, SessionKind, Share
from guestpass.plugin import (
    Answer,
    Authenticator,
    BackendChooser,
    Choice,
    Denied,
    Edits,
    Form,
    Host,
    Incoming,
    Message,
    NotDelivered,
    Notifier,
    Observer,
    Plugin,
    Redirect,
    Reply,
    RequestContext,
    RequestFilter,
    Revoker,
    SignIn,
    Static,
    Step,
    Storage,
    Unproven,
)

if TYPE_CHECKING:
    from guestpass.edge.events import EventHub, Subscription
    from guestpass.shares.service import ShareService

__all__ = ["KINDS", "Available", "PluginHealth", "PluginSet", "load_available", "load_class"]

log = logging.getLogger(__name__)

# ── deadlines, seconds ──────────────────────────────────────────────────────────────────────────────────────
# A start may wait for a provider's discovery document; an operator is looking.
START_DEADLINE = 30.0
# systemd's stop job should not have to kill us for a plugin.
STOP_DEADLINE = 5.0
# A visitor is looking at a spinning tab; a provider's token endpoint may be across an ocean.
SIGN_IN_DEADLINE = 15.0
# Stand in the way of a request.
IDENTIFY_DEADLINE = 5.0
CHECK_DEADLINE = 3.0
CHOOSE_DEADLINE = 1.0
FILTER_DEADLINE = 1.0
# A mail server may answer slowly (RFC 5321 §4.5.3.2 allows minutes); the courier retries.
DELIVER_DEADLINE = 60.0
ACCEPTS_DEADLINE = 5.0
OBSERVE_DEADLINE = 10.0

# ── circuit breaker ─────────────────────────────────────────────────────────────────────────────────────────
# One or two failures are weather; five in a row are a fault.
BREAKER_FAILURES = 5
# Then the plugin is not asked for so long; afterwards one hook is tried.
BREAKER_SECONDS = 30.0

# ── watches of Revokers ─────────────────────────────────────────────────────────────────────────────────────
# A revocation must not be missed for longer than this (scoreboard: fail closed ≤ 3 s).
WATCH_LOST_SECONDS = 3.0
WATCH_RETRY_FIRST = 0.1
WATCH_RETRY_MAX = 2.0
# A restarted watch that has lasted so long counts as running again.
WATCH_SETTLE_SECONDS = 1.0

# What may be kept of a step on the server (plugin API: "JSON, ≤ 4 KiB").
MAX_STATE = 4096

# ── a set that replaces another ─────────────────────────────────────────────────────────────────────────────
# Hooks of the old plugins that still run may finish; those of a sign-in take longest but for a delivery, which the
# courier tries again.
REPLACED_SECONDS = SIGN_IN_DEADLINE

P = TypeVar("P", bound=Plugin)
T = TypeVar("T")

ObserveHook = Callable[[str, str, float, bool], None]
"""(plugin, hook, seconds, error)"""


@dataclass(frozen=True, slots=True)
class PluginHealth:
    """What an operator needs to know of one plugin. `state`: "ok", "failing" (its last hook failed) or "off"
    (not asked until `retry_at`, after repeated failures)."""

    name: str
    kind: str
    state: str
    failures: int  # in a row
    error_id: str | None = None  # of the last failure
    retry_at: float | None = None  # seconds since the epoch


# ── one enabled plugin ──────────────────────────────────────────────────────────────────────────────────────


class _Slot(Generic[P]):
    """An enabled plugin and what contains it."""

    def __init__(self, plugin: P, observe_hook: ObserveHook | None) -> None:
        self.plugin = plugin
        self.watch_lost: float | None = None  # monotonic, when a Revoker's watch broke
        self._observe_hook = observe_hook
        self._failures = 0
        self._error_id: str | None = None
        self._off_until: float | None = None  # monotonic
        self._trying = False
        self._running = 0
        self._left_behind: set[asyncio.Future[Any]] = set()
        self._threads = Threads(f"{plugin.kind} {plugin.name}") if plugin.blocking else None
        self._blocked: Blocked | None = None  # the loop, by this plugin
        self._blocked_at = 0.0

    @property
    def name(self) -> str:
        return self.plugin.name

    async def ask(
        self,
        hook: str,
        deadline: float,
        call: Callable[[], Any],
        *,
        passes: tuple[type[Exception], ...] = (Denied,),
        settles: bool = True,
    ) -> Any:
        """Run a hook. Raises what is in `passes` as it is, and PluginFailed for any other exception, an
        overrun deadline, or a plugin that is switched off. `settles`: that it answers shows that it works."""
        trying = self._enter()
        began = time.monotonic()
        error = True
        self._running += 1
        try:
            if self._threads is not None:
                result = await self._threads.run(deadline, call)
                if inspect.isawaitable(result):
                    getattr(result, "close", bool)()  # or it would be missed as "never awaited"
                    raise TypeError("hooks of a blocking plugin are plain functions, this one is async")
            else:
                result = _called(call)
                if inspect.isawaitable(result):
                    result = await self._within(deadline, result)
            error = False
            if settles:
                self._failures = 0
                self._off_until = None
            return result
        except passes:
            error = False
            self._failures = 0
            self._off_until = None
            raise
        except asyncio.CancelledError:
            error = False
            raise
        except Exception as exc:
            raise self.failed(hook, exc) from exc
        finally:
            self._running -= 1
            if trying:
                self._trying = False
            if self._observe_hook is not None:
                self._observe_hook(self.name, hook, time.monotonic() - began, error)

    def failed(self, hook: str, exc: BaseException) -> PluginFailed:
        """Count and log a failure; the returned error carries the id that the log has."""
        self._failures += 1
        if isinstance(exc, Exhausted):
            self._failures = max(self._failures, BREAKER_FAILURES)
        self._error_id = error_id = new_error_id()
        log.error(
            "%s %r failed in %s (error id %s)", self.plugin.kind, self.name, hook, error_id, exc_info=exc
        )
        if self._failures >= BREAKER_FAILURES:
            if self._off_until is None:
                log.error(
                    "%s %r failed %d times in a row: it is not asked for %d seconds, and what it decides is denied",
                    *(self.plugin.kind, self.name, self._failures, BREAKER_SECONDS),
                )
            self._off_until = time.monotonic() + BREAKER_SECONDS
        return PluginFailed(f"The {self.plugin.kind} {self.name!r} failed.", error_id=error_id)

    def deaf(self) -> PluginFailed:
        """Its watch is broken: the failure that broke it stands in the log."""
        error_id = self._error_id or new_error_id()
        return PluginFailed(f"The {self.plugin.kind} {self.name!r} hears nothing.", error_id=error_id)

    def health(self, now: float) -> PluginHealth:
        state, retry_at = ("failing" if self._failures else "ok"), None
        if self._off_until is not None:
            state, retry_at = "off", now + max(0.0, self._off_until - time.monotonic())
        elif self.watch_lost is not None or self.fault() is not None:
            state = "failing"
        return PluginHealth(self.name, self.plugin.kind, state, self._failures, self._error_id, retry_at)

    def fault(self) -> str | None:
        """What is wrong with it besides failed hooks."""
        if isinstance(self.plugin, Isolated) and (fault := self.plugin.fault()) is not None:
            return fault
        if self._blocked is not None and time.monotonic() - self._blocked_at < BREAKER_SECONDS:
            return f"blocked the event loop in {self._blocked.hook} at {self._blocked.place}"
        return None

    def blocked_loop(self, blocked: Blocked) -> None:
        """Called in the watchdog's thread."""
        self._blocked_at = time.monotonic()
        self._blocked = blocked
        log.error(
            "%s %r blocks the event loop in %s, at %s, for %d ms by now: every visitor waits. "
            'Await what waits; or set blocking = True in its class, or isolation = "process" in its section',
            *(self.plugin.kind, self.name, blocked.hook, blocked.place, blocked.seconds * 1000),
        )

    def owns(self, frame: FrameType) -> bool:
        """Whether a frame of the loop's stack is this plugin's code."""
        module = type(self.plugin).__module__
        return frame.f_globals.get("__name__") == module and not isinstance(self.plugin, Isolated)

    async def idle(self) -> None:
        """Returns when no hook runs any more."""
        while self._running:
            await asyncio.sleep(0.05)

    def abandon(self) -> None:
        """Cancel hooks that overran their deadline and still run."""
        for task in self._left_behind:
            task.cancel()
        if self._threads is not None:
            self._threads.close()

    def _enter(self) -> bool:
        if self._off_until is None:
            return False
        if self._trying or time.monotonic() < self._off_until:
            # The id of the failure that switched it off: that one stands in the log.
            raise PluginFailed(
                f"The {self.plugin.kind} {self.name!r} is switched off after repeated failures.",
                error_id=self._error_id or new_error_id(),
            )
        self._trying = True
        return True

    async def _within(self, deadline: float, awaitable: Awaitable[Any]) -> Any:
        task = asyncio.ensure_future(_contained(awaitable))
        try:
            done, _ = await asyncio.wait((task,), timeout=deadline)
        except asyncio.CancelledError:
            task.cancel()
            self._leave_behind(task)
            raise
        if not done:
            task.cancel()
            self._leave_behind(task)
            raise TimeoutError(f"no answer within {deadline:g} seconds")
        if task.cancelled():
            raise RuntimeError("the hook cancelled itself")
        return task.result()

    def _leave_behind(self, task: asyncio.Future[Any]) -> None:
        self._left_behind.add(task)
        task.add_done_callback(self._ended_late)

    def _ended_late(self, task: asyncio.Future[Any]) -> None:
        self._left_behind.discard(task)
        if not task.cancelled():
            task.exception()  # was reported as an overrun; do not report it as "never retrieved" as well


def _called(call: Callable[[], Any]) -> Any:
    """A hook's first step. What would end the edge, or the task that asks, is an error of the hook."""
    try:
        return call()
    except Exception:
        raise
    except BaseException as exc:
        raise RuntimeError(f"it raised {type(exc).__name__}") from exc


async def _contained(awaitable: Awaitable[T]) -> T:
    """The rest of a hook. In a task of its own, so a cancellation is either ours or seen as the hook's."""
    try:
        return await awaitable
    except (Exception, asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as exc:  # sys.exit(): asyncio would end the loop for it
        raise RuntimeError(f"it raised {type(exc).__name__}") from exc


def _built(
    kind: Kind, section: PluginSection, position: int, file: Path, kept: Sequence[Path] = ()
) -> Plugin:
    if section.isolation is None:
        return build(kind, section, position, file)
    line = section_line(file, kind.section, position)
    return isolated(kind.name, kind.section, section, position, file, line, kept)


def _overrides(plugin: Plugin, base: type[Plugin], hook: str) -> bool:
    if isinstance(plugin, Isolated):
        return hook in plugin.hooks
    return getattr(type(plugin), hook) is not getattr(base, hook)


def new_error_id() -> str:
    """8 characters that a visitor can read out and an operator can search for."""
    return secrets.token_hex(4)


# ── what plugins are given ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Edge:
    """What the hosts of all plugins rest on."""

    service: ShareService
    events: EventHub
    notify: Callable[[Message], Awaitable[object]]
    now: Callable[[], float]
    secret: bytes
    incoming: IncomingRoutes = dataclasses.field(default_factory=IncomingRoutes)


class _Host:
    """One plugin's host."""

    def __init__(self, edge: _Edge, section: str, name: str) -> None:
        self._edge = edge
        self._owner = f"{section}/{name}"
        self.logger = logging.getLogger(f"guestpass.plugin.{section}.{name}")
        self.storage: Storage = edge.service.storage(self._owner)
        self._http: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    @property
    def http(self) -> aiohttp.ClientSession:
        if self._http is None:
            # No cookies: requests for one visitor must not carry what a server set for another.
            self._http = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=SIGN_IN_DEADLINE)
            )
        return self._http

    def now(self) -> float:
        return self._edge.now()

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(partial(self.spawn, work, name=name))
            return
        task = self._loop.create_task(_contained(work), name=f"{self._owner}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._spawned_ended)

    async def notify(self, message: Message) -> None:
        await self._edge.notify(message)

    def emit(self, event: Event) -> None:
        if threading.get_ident() == self._thread:
            self._edge.events.emit(event)
        else:
            self._loop.call_soon_threadsafe(self._edge.events.emit, event)

    @property
    def seed(self) -> bytes:
        """What this plugin's keys are derived from."""
        return hmac.digest(self._edge.secret, self._owner.encode(), "sha256")

    def derive_key(self, purpose: str) -> bytes:
        return hmac.digest(self.seed, purpose.encode(), "sha256")

    def wait(self, promise: Coroutine[Any, Any, T]) -> T:
        if threading.get_ident() == self._thread:
            promise.close()
            raise RuntimeError("host.wait is for the threads of a blocking plugin: await this here")
        return asyncio.run_coroutine_threadsafe(promise, self._loop).result()

    async def resolve_token(self, token: str) -> Identity | None:
        if not token.startswith(tokens.BEARER_PREFIX):
            return None
        try:
            found = await self._edge.service.find_session(SessionKind.TOKEN, tokens.digest(token))
        except ShareEnded:
            return None
        if found is None:
            return None
        session = found[0]
        return Identity(session.email, session.provider, proven=session.created)

    async def live_sessions(self, share_id: str) -> Sequence[Session]:
        found = await self._edge.service.sessions(share_id, live=True)
        return sorted(found, key=lambda s: (s.created, s.id))

    async def record(self, event: Event) -> None:
        await self._edge.service.record(event)

    async def idle_sessions(self, seconds: float, *, tokens: bool = False) -> Sequence[Session]:
        return await self._edge.service.idle_sessions(self.now() - seconds, tokens=tokens)

    async def end_session(self, session_id: str, reason: str) -> None:
        with contextlib.suppress(NotFound):  # forgotten long ago: over as well
            await self._edge.service.end_session(session_id, reason)

    async def sign_out(self, email: str, reason: str, *, tokens: bool = False) -> int:
        return await self._edge.service.sign_out(canonical(email), reason, tokens=tokens)

    async def address_of(self, provider: str, subject: str) -> str | None:
        return await self._edge.service.proofs.address_of(provider, subject)

    def route(self, path: str, handler: Callable[[Incoming], Answer[Reply]]) -> str:
        return self._edge.incoming.add(self._owner, self, path, handler)

    async def close(self) -> None:
        self._edge.incoming.remove(self)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_DEADLINE)
        if self._http is not None:
            await self._http.close()

    def _spawned_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self.logger.error("%s failed", task.get_name(), exc_info=exc)


class _ContainedNotifier(Notifier):
    """A notifier as the courier sees it: with a deadline, and with every failure as NotDelivered."""

    def __init__(self, slot: _Slot[Notifier]) -> None:
        super().__init__(slot.name, slot.plugin.config)
        self._slot = slot

    async def accepts(self, message: Message) -> bool:
        try:
            return bool(
                await self._slot.ask(
                    "accepts",
                    ACCEPTS_DEADLINE,
                    partial(self._slot.plugin.accepts, message),
                    passes=(),
                    settles=False,  # it does so while it delivers nothing
                )
            )
        except PluginFailed:
            return False

    async def deliver(self, message: Message) -> str:
        try:
            receipt = await self._slot.ask(
                "deliver",
                DELIVER_DEADLINE,
                partial(self._slot.plugin.deliver, message),
                passes=(NotDelivered,),
            )
        except PluginFailed as exc:
            raise NotDelivered(f"{exc.message} Error id {exc.error_id}.", permanent=False) from exc
        return str(receipt)


# ── the set ─────────────────────────────────────────────────────────────────────────────────────────────────


class PluginSet:
    """All plugins that a configuration enables."""

    def __init__(
        self, plugins: Mapping[str, Sequence[Plugin]], *, observe_hook: ObserveHook | None = None
    ) -> None:
        """`plugins` by section name. `load` is the usual way here."""

        def slots(section: str) -> list[_Slot[Any]]:
            base = KINDS[section].base
            found: list[_Slot[Any]] = []
            for plugin in plugins.get(section, ()):
                if not isinstance(plugin, base):
                    raise PluginError(f"plugin {plugin.name!r} is not a {base.__name__}")
                found.append(_Slot(plugin, observe_hook))
            return found

        self._authenticate: list[_Slot[Authenticator]] = slots("authenticate")
        self._revoke: list[_Slot[Revoker]] = slots("revoke")
        self._choose: list[_Slot[BackendChooser]] = slots("choose")
        self._filter: list[_Slot[RequestFilter]] = slots("filter")
        self._notify: list[_Slot[Notifier]] = slots("notify")
        self._observe: list[_Slot[Observer]] = slots("observe")
        self.notifiers: list[_ContainedNotifier] = [_ContainedNotifier(slot) for slot in self._notify]
        """The same list for good: it is what the courier has."""
        self.removed: set[str] = set()
        """Authenticators that were replaced by none of their name: their sessions are over."""
        self._observe_hook = observe_hook
        self._compiler = StaticCompiler()
        self._watchdog: Watchdog | None = None
        self._count_blocked: Callable[[str], object] = lambda plugin: None
        self._edge: _Edge | None = None
        self._revoke_now: Callable[[Revocation], Awaitable[object]] | None = None
        self._now: Callable[[], float] = time.time
        self._started: list[_Slot[Any]] = []
        self._hosts: dict[int, _Host] = {}
        self._watching: list[asyncio.Task[None]] = []
        self._observing: dict[asyncio.Task[None], Subscription] = {}
        self._fail_closed: Callable[[str], object] = lambda reason: None

    @classmethod
    def load(
        cls,
        config: EdgeConfig,
        *,
        observe_hook: ObserveHook | None = None,
        only: frozenset[str] = frozenset(KINDS),
    ) -> PluginSet:
        """Import, validate and construct everything that `config` names (of several processes each has `only` some
        sections); nothing is started. Raises PluginError or ConfigError."""
        plugins: dict[str, list[Plugin]] = {}
        try:
            cls._build_all(config, plugins, only)
        except BaseException:
            for plugin in (p for found in plugins.values() for p in found):
                if isinstance(plugin, Isolated):
                    plugin.kill()
            raise
        return cls(plugins, observe_hook=observe_hook)

    @staticmethod
    def _build_all(config: EdgeConfig, plugins: dict[str, list[Plugin]], only: frozenset[str]) -> None:
        for kind in KINDS.values():
            sections: tuple[PluginSection, ...] = (
                getattr(config, kind.section) if kind.section in only else ()
            )
            plugins[kind.section] = []
            for position, section in enumerate(sections, 1):
                plugin = _built(kind, section, position, config.file, (config.database.parent,))
                taken = [p.name for p in plugins[kind.section]]
                plugins[kind.section].append(plugin)
                if plugin.name in taken:
                    raise ConfigError(
                        f'{place(kind, section, position, config.file)}: there is another "{plugin.name}"',
                        hint='Give one of them a name of its own: name = "…".',
                    )
        if "revoke" in only and not any(section.use == "share-state" for section in config.revoke):
            # Deletion, expiry and limits hold whatever else decides.
            plugins["revoke"].insert(
                0, build(KINDS["revoke"], PluginSection(use="share-state"), 0, config.file)
            )
        if "authenticate" in only and not any(
            isinstance(p, Authenticator) and p.interactive for p in plugins["authenticate"]
        ):
            raise ConfigError(
                f"{config.file}: [[authenticate]]: no way to sign in is left for visitors",
                hint='Add [[authenticate]] with use = "email-code".',
            )
        needy = [p for p in plugins["authenticate"] if isinstance(p, Authenticator) and p.needs_proof]
        if needy and not any(_proves(p) for p in plugins["authenticate"]):
            raise ConfigError(
                f'{config.file}: [[authenticate]] "{needy[0].name}" proves no address, and nothing else does',
                hint='Add [[authenticate]] with use = "email-code".',
            )

    # ── lifecycle ───────────────────────────────────────────────────────────────────────────────────────────

    async def start(
        self,
        service: ShareService,
        events: EventHub,
        *,
        notify: Callable[[Message], Awaitable[object]],
        revoke: Callable[[Revocation], Awaitable[object]],
        fail_closed: Callable[[str], object] = lambda reason: None,
        secret: bytes | None = None,
        now: Callable[[], float] = time.time,
        count_blocked: Callable[[str], object] = lambda plugin: None,
        incoming: IncomingRoutes | None = None,
    ) -> None:
        """Start every plugin in the order of the configuration.

        `notify` queues a message durably; `revoke` carries out what a Revoker's watch yields; `fail_closed`
        drops every grant (the reason is given) when a watch stays broken; `secret` seeds the keys of
        `Host.derive_key` and should be the same after a restart (None: fresh for this process); `count_blocked`
        is told, in a thread, which plugin blocks the loop ("-": none does). Raises PluginError when one of
        them refuses. `incoming` is where plugins register what they answer to other systems.
        """
        self._now = now
        self._fail_closed = fail_closed
        self._count_blocked = count_blocked
        self._revoke_now = revoke
        self._edge = edge = _Edge(
            service, events, notify, now, secret or secrets.token_bytes(32), incoming or IncomingRoutes()
        )
        await self._start_all(edge, revoke)
        self._watchdog = Watchdog(self._owner_of, self._loop_blocked)
        self._watchdog.start()

    async def _start_all(self, edge: _Edge, revoke: Callable[[Revocation], Awaitable[object]]) -> None:
        for section, slot in self._all():
            host = self._hosts[id(slot)] = _Host(edge, section, slot.name)
            self._started.append(slot)
            try:
                async with asyncio.timeout(START_DEADLINE):
                    await _contained(slot.plugin.start(_checked_host(host)))
            except asyncio.CancelledError:
                await self.stop()
                raise
            except Exception as exc:
                await self.stop()
                if isinstance(exc, GuestpassError):
                    raise
                reason = (
                    f"it did not start within {START_DEADLINE:g} seconds"
                    if isinstance(exc, TimeoutError)
                    else in_one_line(exc)
                )
                raise PluginError(f"the {slot.plugin.kind} {slot.name!r} cannot start: {reason}") from exc
        for observer in self._observe:
            # Subscribed here, not in the task: an event that is emitted after `start` is not missed.
            stream = edge.events.subscribe()
            task = asyncio.create_task(self._tell(observer, stream), name=f"observe/{observer.name}")
            self._observing[task] = stream
        for revoker in self._revoke:
            if _overrides(revoker.plugin, Revoker, "watch"):
                self._watching.append(
                    asyncio.create_task(self._watch(revoker, revoke), name=f"revoke/{revoker.name}: watch")
                )

    async def stop(self) -> None:
        """End background work, then stop the plugins in reverse order. Observers are told what was emitted
        before. Idempotent."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        observing, self._observing = self._observing, {}
        for stream in observing.values():
            stream.close()
        if observing:
            await asyncio.wait(observing, timeout=STOP_DEADLINE)
        tasks, self._watching = [*self._watching, *observing], []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_DEADLINE)
        while self._started:
            slot = self._started.pop()
            slot.abandon()
            try:
                async with asyncio.timeout(STOP_DEADLINE):
                    await _contained(slot.plugin.stop())
            except Exception:
                log.exception("%s %r failed to stop", slot.plugin.kind, slot.name)
            host = self._hosts.pop(id(slot), None)
            if host is not None:
                await host.close()
        self.discard()

    def discard(self) -> None:
        """End the processes of a set that was loaded and is not wanted any more."""
        for _, slot in self._all():
            if isinstance(slot.plugin, Isolated):
                slot.plugin.kill()

    async def replace(self, fresh: PluginSet, swapped: Callable[[], object] = lambda: None) -> None:
        """Start the plugins of `fresh` and ask those from now on; the old ones stop when their running hooks have
        ended. Raises what `start` raises; then nothing has changed. `fresh` must not be used any more.

        `swapped` is called as soon as the new ones are asked: whoever keeps what plugins decided must ask again."""
        edge, revoke = self._edge, self._revoke_now
        assert edge is not None, "only a set that runs is replaced"
        assert revoke is not None
        fresh._now, fresh._fail_closed = self._now, self._fail_closed
        await fresh._start_all(edge, revoke)
        names, fresh_names = ({a.name for a in s.authenticators} for s in (self, fresh))
        old = PluginSet({})
        for part in (
            *("_authenticate", "_revoke", "_choose", "_filter", "_notify", "_observe"),
            *("_started", "_hosts", "_watching", "_observing"),
        ):
            setattr(old, part, getattr(self, part))
            setattr(self, part, getattr(fresh, part))
        self.notifiers[:] = fresh.notifiers
        self.removed = (self.removed | names) - fresh_names
        try:
            swapped()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPLACED_SECONDS):
                    await asyncio.gather(*(slot.idle() for _, slot in old._all()))
        finally:  # nobody else knows them any more: also when the edge stops meanwhile
            await old.stop()

    def _owner_of(self, frame: FrameType) -> object | None:
        found = [slot for _, slot in self._all() if slot.owns(frame)]
        if len(found) > 1:  # of one module: `self` tells them apart, in this frame or in one further out
            return next((slot for slot in found if frame.f_locals.get("self") is slot.plugin), None)
        return found[0] if found else None

    def _loop_blocked(self, blocked: Blocked) -> None:
        slot = blocked.owner
        self._count_blocked(slot.name if isinstance(slot, _Slot) else "-")
        if isinstance(slot, _Slot):
            slot.blocked_loop(blocked)
        else:
            log.warning(
                "the event loop is blocked at %s for %d ms by now", blocked.place, blocked.seconds * 1000
            )

    @property
    def all(self) -> list[Plugin]:
        return [slot.plugin for _, slot in self._all()]

    def states(self) -> list[PluginHealth]:
        """Every plugin's state, in the order of the configuration."""
        now = self._now()
        return [slot.health(now) for _, slot in self._all()]

    def health(self) -> dict[str, str]:
        """What is wrong: a line for each plugin that is not asked at present, by "section/name"."""
        faults = {}
        for section, slot in self._all():
            state = slot.health(self._now())
            if state.state == "off":
                faults[f"{section}/{slot.name}"] = (
                    f"not asked after {state.failures} failures in a row; error id {state.error_id}"
                )
            elif (fault := slot.fault()) is not None:
                faults[f"{section}/{slot.name}"] = fault
            elif slot.watch_lost is not None:
                faults[f"{section}/{slot.name}"] = f"hears no revocations; error id {state.error_id}"
        return faults

    def _all(self) -> list[tuple[str, _Slot[Any]]]:
        return [
            *(("notify", s) for s in self._notify),
            *(("observe", s) for s in self._observe),
            *(("authenticate", s) for s in self._authenticate),
            *(("revoke", s) for s in self._revoke),
            *(("choose", s) for s in self._choose),
            *(("filter", s) for s in self._filter),
        ]

    # ── Authenticators ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def authenticators(self) -> list[Authenticator]:
        """All, in the order of the configuration."""
        return [slot.plugin for slot in self._authenticate]

    def offers(self, provider: str) -> bool:
        """Whether this way of signing in is configured: what rests on one that is not counts no more, be it that it
        went at a SIGHUP or at a restart."""
        return any(slot.name == provider for slot in self._authenticate)

    @property
    def interactive(self) -> list[Authenticator]:
        """Those that stand on the sign-in page."""
        return [slot.plugin for slot in self._authenticate if slot.plugin.interactive]

    async def begin(self, name: str, sign_in: SignIn) -> Step:
        """Raises Denied, PluginFailed; KeyError when there is no interactive authenticator of that name."""
        slot = self._interactive(name)
        return self._step(
            slot, "begin", await slot.ask("begin", SIGN_IN_DEADLINE, partial(slot.plugin.begin, sign_in))
        )

    async def complete(self, name: str, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        """Raises as `begin`."""
        slot = self._interactive(name)
        return self._step(
            slot,
            "complete",
            await slot.ask("complete", SIGN_IN_DEADLINE, partial(slot.plugin.complete, sign_in, params)),
        )

    @property
    def prover(self) -> str | None:
        """The name of the authenticator that has visitors prove a given address."""
        return next((slot.name for slot in self._authenticate if _proves(slot.plugin)), None)

    async def prove(self, name: str, sign_in: SignIn, email: str) -> Step:
        """Raises as `begin`."""
        slot = self._interactive(name)
        return self._step(
            slot,
            "prove",
            await slot.ask("prove", SIGN_IN_DEADLINE, partial(slot.plugin.prove, sign_in, email)),
        )

    async def identify(self, request: RequestContext) -> Identity | None:
        """Who the credentials in the request prove: the first authenticator that does not abstain.
        Raises Denied, PluginFailed."""
        for slot in self._authenticate:
            if not _overrides(slot.plugin, Authenticator, "identify"):
                continue
            found = await slot.ask("identify", IDENTIFY_DEADLINE, partial(slot.plugin.identify, request))
            if found is not None:
                return self._identity(slot, "identify", found)
        return None

    def _interactive(self, name: str) -> _Slot[Authenticator]:
        for slot in self._authenticate:
            if slot.name == name and slot.plugin.interactive:
                return slot
        raise KeyError(name)

    def _step(self, slot: _Slot[Authenticator], hook: str, step: object) -> Step:
        if isinstance(step, Form | Redirect):
            try:
                size = len(orjson.dumps(dict(step.state)))
            except TypeError as exc:
                raise slot.failed(hook, exc) from exc
            if size > MAX_STATE:
                raise slot.failed(
                    hook, ValueError(f"its state has {size} bytes of JSON, {MAX_STATE} are allowed")
                )
            return step
        if isinstance(step, Unproven):
            try:
                return dataclasses.replace(step, email=canonical(step.email))
            except InvalidEmail as exc:
                raise slot.failed(hook, exc) from exc
        return self._identity(slot, hook, step)

    def _identity(self, slot: _Slot[Authenticator], hook: str, found: object) -> Identity:
        if not isinstance(found, Identity):
            raise slot.failed(hook, TypeError(f"it returned {type(found).__name__}"))
        try:
            email = canonical(found.email)
        except InvalidEmail as exc:
            raise slot.failed(hook, exc) from exc
        # Not of the future: that would outlive the address's being signed out of everything.
        proven = min(found.proven or self._now(), self._now())
        return dataclasses.replace(found, email=email, provider=slot.name, proven=proven)

    # ── Revokers ────────────────────────────────────────────────────────────────────────────────────────────

    async def check(self, share: Share, session: Session) -> Revocation | None:
        """Whether the session may start or go on. A Revoker that fails, overruns its deadline or has lost its
        watch revokes, with `error_id` set. Raises Forbidden with the words of a Revoker that raised
        Denied."""
        for slot in self._revoke:
            lost = slot.watch_lost
            try:
                if lost is not None and time.monotonic() - lost > WATCH_LOST_SECONDS:
                    raise slot.deaf()
                answer = await slot.ask("check", CHECK_DEADLINE, partial(slot.plugin.check, share, session))
                if answer is not None and not isinstance(answer, Revocation):
                    raise slot.failed("check", TypeError(f"it returned {type(answer).__name__}"))
            except PluginFailed as exc:
                return Revocation("plugin_failed", session_id=session.id, error_id=exc.error_id)
            except Denied as exc:
                raise Forbidden(str(exc) or "You cannot open this now.", code="denied") from exc
            if answer is not None:
                return answer
        return None

    async def _watch(self, slot: _Slot[Revoker], revoke: Callable[[Revocation], Awaitable[object]]) -> None:
        loop = asyncio.get_running_loop()
        delay = WATCH_RETRY_FIRST
        told = False

        def settled() -> None:
            nonlocal delay, told
            slot.watch_lost, delay, told = None, WATCH_RETRY_FIRST, False

        while True:
            timer: asyncio.TimerHandle | None = None
            try:
                stream = slot.plugin.watch()
                if stream is None:
                    slot.watch_lost = None
                    return
                timer = loop.call_later(WATCH_SETTLE_SECONDS, settled)
                async for revocation in stream:
                    settled()
                    await revoke(revocation)
                raise RuntimeError("the watch ended by itself")
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as exc:
                if slot.watch_lost is None:
                    slot.watch_lost = time.monotonic()
                    slot.failed("watch", exc)
            finally:
                if timer is not None:
                    timer.cancel()
            if not told and time.monotonic() - slot.watch_lost > WATCH_LOST_SECONDS:
                # What it may have said meanwhile is unknown: every session asks again, and `check` denies.
                told = True
                self._fail_closed("plugin_failed")
            await asyncio.sleep(delay)
            delay = min(delay * 2, WATCH_RETRY_MAX)

    # ── BackendChoosers ─────────────────────────────────────────────────────────────────────────────────────

    async def choose(self, choice: Choice) -> Candidate:
        """One of the candidates (there must be one)."""
        for slot in self._choose:
            try:
                answer = await slot.ask(
                    "choose", CHOOSE_DEADLINE, partial(slot.plugin.choose, choice), passes=()
                )
            except PluginFailed:
                continue
            if answer is None:
                continue
            if answer in choice.candidates:
                return answer  # type: ignore[no-any-return]
            slot.failed("choose", ValueError("it chose a gateway that is not a candidate"))
        return secrets.choice(choice.candidates)

    # ── RequestFilters ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def filters(self) -> list[RequestFilter]:
        return [slot.plugin for slot in self._filter]

    @property
    def filters_requests(self) -> bool:
        """Whether any of them sees each request."""
        return any(_overrides(slot.plugin, RequestFilter, "on_request") for slot in self._filter)

    async def compile(self, share: Share, session: Session) -> Compiled | None:
        """What the filters say for every request of the session. Raises Forbidden with the words of one that refused,
        PluginFailed."""
        answers: list[tuple[str, Static]] = []
        compiled: Compiled | None = None
        for one in self._authenticate:
            if not one.plugin.private_headers:
                continue
            try:
                removed = frozenset(spellings(one.plugin.private_headers))
                answers.append((one.name, Static(edits=Edits(remove=removed))))
                compiled = self._compiler.compile(answers, share, session)
            except (ValueError, TypeError, AttributeError) as exc:
                raise one.failed("private_headers", exc) from exc
        for slot in self._filter:
            if not _overrides(slot.plugin, RequestFilter, "compile"):
                continue
            try:
                static = await slot.ask(
                    "compile", FILTER_DEADLINE, partial(slot.plugin.compile, share, session)
                )
            except Denied as exc:
                raise Forbidden(str(exc) or "You cannot open this now.", code="denied") from exc
            if static is None:
                continue
            if not isinstance(static, Static):
                raise slot.failed("compile", TypeError(f"it returned {type(static).__name__}"))
            answers.append((slot.name, static))
            try:
                compiled = self._compiler.compile(answers, share, session)
            except (ValueError, TypeError, AttributeError) as exc:
                raise slot.failed("compile", exc) from exc
        return compiled

    async def on_request(self, request: RequestContext) -> Edits | None:
        """All filters in order; their edits together, None when there are none. Raises Denied with the words of
        the one that refused, PluginFailed."""
        remove: frozenset[str] = frozenset()
        add: tuple[tuple[str, str], ...] = ()
        for slot in self._filter:
            if not _overrides(slot.plugin, RequestFilter, "on_request"):
                continue
            edits = await slot.ask("on_request", FILTER_DEADLINE, partial(slot.plugin.on_request, request))
            if edits is None:
                continue
            if not isinstance(edits, Edits):
                raise slot.failed("on_request", TypeError(f"it returned {type(edits).__name__}"))
            try:
                check_edits(edits)
            except (ValueError, TypeError, AttributeError) as exc:
                raise slot.failed("on_request", exc) from exc
            remove |= edits.remove
            add += edits.add
        return Edits(remove, add) if remove or add else None

    # ── Observers ───────────────────────────────────────────────────────────────────────────────────────────

    async def _tell(self, slot: _Slot[Observer], stream: Subscription) -> None:
        async for event in stream:
            # Already logged and counted; an observer's failure is nobody else's.
            with contextlib.suppress(PluginFailed):
                await slot.ask("on_event", OBSERVE_DEADLINE, partial(slot.plugin.on_event, event), passes=())


def _proves(plugin: Plugin) -> bool:
    return (
        isinstance(plugin, Authenticator)
        and plugin.interactive
        and _overrides(plugin, Authenticator, "prove")
    )


def _checked_host(host: Host) -> Host:
    """The type checker's proof that `_Host` is all that the plugin API promises."""
    return host
