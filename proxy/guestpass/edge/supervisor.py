"""An edge of several processes: the supervisor, which serves no visitor, and its workers.

```
            ┌──────────────── supervisor ────────────────┐
            │ listening sockets · store · service · bus  │
            │ courier · notifiers · observers · metrics  │
            └──┬─────────────────┬─────────────────┬─────┘
               │ channel         │                 │         calls, revocations, events, leases
            ┌──┴─────┐        ┌──┴─────┐        ┌──┴─────┐
 visitors ─▶│ worker │◀══════▶│ worker │◀══════▶│ worker │◀─ tunnels
            └────────┘  Unix  └────────┘ sockets└────────┘
```

**Sockets** are bound once and inherited; all workers accept from them. A socket of each worker's own (SO_REUSEPORT)
would take the connections that wait in it along when the worker leaves.

**Revocation** is over when every worker has acknowledged that admits anybody: one that starts has made no grant, and
hears of the revocation before it asks for the first. One that does not acknowledge within ACK_SECONDS is killed, and is
known to be dead, before the answer is given. What a worker does that hears nothing stands in `guestpass.edge.worker`.

**Workers** are interchangeable. Each has a place; one that ends is replaced at once, and later and later if it ends
again and again at its start. `roll` puts a new process in each place, which reads the configuration anew, before the
old one is drained. What this process has taken from the configuration holds for all workers until it is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter as Counts
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import Counter, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from guestpass.config import EdgeConfig, LogLevel, load_edge
from guestpass.daemon import Signals, reloading
from guestpass.edge.admin import Admin
from guestpass.edge.channel import Channel, ChannelClosed
from guestpass.edge.console import Owner
from guestpass.edge.events import EventHub
from guestpass.edge.home import (
    Home,
    api_key_of,
    make_state_folder,
    plugin_secret,
    ready_line,
    with_notifiers,
)
from guestpass.edge.listener import Listener
from guestpass.edge.metrics import Family, Metrics, Together
from guestpass.edge.origins import Origins
from guestpass.edge.pages import Pages
from guestpass.edge.peers import Held
from guestpass.edge.plugin_loader import fingerprint
from guestpass.edge.plugins import PluginSet
from guestpass.edge.signing_keys import KeyRing
from guestpass.edge.worker import (
    AS_STARTED,
    BEAT_SECONDS,
    LEASE_SECONDS,
    SERVICE_METHODS,
    STORAGE_METHODS,
)
from guestpass.errors import ConfigError, GuestpassError
from guestpass.model import Event, Revocation, Revoked, Session, Share

log = logging.getLogger("guestpass.edge.supervisor")

# A worker that has not acknowledged a revocation by then is killed: with the kill, the end is known within 3 s.
ACK_SECONDS = 2.0

# And one that has said nothing at all for so long, whatever it does: its visitors wait.
SILENT_SECONDS = 10.0

# How often workers are asked for their counters: what a worker counted after that is lost when it crashes.
COUNT_SECONDS = 2.0

# Imports, plugins, certificates; on a machine that is busy with other things.
START_SECONDS = 60.0

# From the end of a process to that of what it had said: both come at once, in either order.
LAST_WORDS_SECONDS = 1.0

# A worker that served for so long has started well. Before that, the next one waits: twice as long each time.
WELL_SECONDS = 10.0
RESPAWN_FIRST = 0.1
RESPAWN_MOST = 10.0

# After `drain_seconds`, for closing what is left.
STOP_SECONDS = 10.0

# Sessions whose gateway is remembered: 100 bytes each. One that is forgotten is chosen for anew.
MAX_PINS = 200_000

# The longest path of a Unix socket (unix(7): 108 with the zero), and the most that a worker's number takes of it.
MAX_SOCKET_PATH = 107
NUMBER_DIGITS = 10

FOLDER_HINT = "It is made where temporary files are: set TMPDIR to another folder."

# Kinds of plugins that the supervisor has; the others are the workers'.
TELLING = frozenset(("notify", "observe"))

# The parts of edge.toml that they come from.
OF_TELLING = (*sorted(TELLING), "mail")


@dataclass(eq=False)
class Worker:
    """One process."""

    number: int
    """Of this process among all that were started."""
    slot: int
    path: str
    process: asyncio.subprocess.Process
    channel: Channel
    ready: asyncio.Future[None]
    began: float
    heard: float
    held: dict[tuple[str, str], Held] = field(default_factory=dict)
    families: list[Family] = field(default_factory=list)
    counted: bool = False
    """`families` are its last."""
    drain_seconds: float = 0.0
    """By its own configuration, which may be newer than ours."""
    admits: bool = False
    """It accepts visitors, or is about to."""
    ways: list[str] = field(default_factory=list)
    """Names of the authenticators among which visitors can choose."""
    leaving: bool = False
    """Its end is wanted."""
    cause: str = "exit"
    """Why it ends, for the metric."""

    @property
    def up(self) -> bool:
        started = self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None
        return started and self.process.returncode is None

    def kill(self, cause: str) -> None:
        if self.process.returncode is None:
            self.cause = cause
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()


class SharedEvents(EventHub):
    """The supervisor's hub: everything that is emitted goes to all workers as well."""

    def __init__(self) -> None:
        super().__init__()
        self.tell: Callable[[Event], None] = lambda event: None

    def emit(self, event: Event) -> None:
        super().emit(event)
        self.tell(event)


class Supervisor:
    """`start`, then `roll`, `reload`, `drain`, and `stop`."""

    def __init__(self, config: EdgeConfig, *, log_level: LogLevel = "info", restored: bool = False) -> None:
        """`restored`: the database is a backup (see `Store.open`)."""
        self.config = config
        self._restored = restored
        self._log_level = log_level
        self._loop = asyncio.get_running_loop()
        self._workers: dict[int, Worker] = {}  # by number
        self._numbers = 0
        self._listeners: list[Listener] = []
        self._sockets: list[socket.socket] = []
        self._folder = ""
        self._admin: Admin | None = None
        self._cleanups: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pins: OrderedDict[str, str] = OrderedDict()
        self._owners: dict[bytes, Owner] = {}
        self._announced: dict[str, dict[str, bool]] = {}  # gateways that are connected, and their services
        self._respawn: dict[int, float] = {}  # by slot: what the next start waits
        self._spawning: Counts[int] = Counts()  # by slot: processes that are being made
        self._rolling = False
        self._roll_again = False
        self._stopping = False
        self._reload_lock = asyncio.Lock()

    # ── start ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> dict[str, Any]:
        """Bring everything up; returns the `ready` line. Raises GuestpassError; what was started is undone then."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> dict[str, Any]:
        config, edge = self.config, self.config.edge
        state = make_state_folder(config)
        origins = Origins(edge.public_url, edge.share_domain)
        self.metrics = Metrics()
        self._together = Together()
        self._running = Gauge("guestpass_workers", "Workers that serve", registry=self.metrics.registry)
        self._running.set_function(lambda: sum(worker.up for worker in self._workers.values()))
        self._ends = Counter(
            "guestpass_worker_ends",
            "Workers that ended, by why: exit (by itself), silent, unacknowledged, overdue, replaced",
            ("cause",),
            registry=self.metrics.registry,
        )
        self._plugins = plugins = self._load_plugins(config)
        self._seen = fingerprint(config, OF_TELLING)
        # Workers read these files; they are made here, once.
        KeyRing(state, days=edge.assertion_key_days).open(time.time())
        _, api_key_file = api_key_of(config, state)
        secret = plugin_secret(state)
        self.events = SharedEvents()
        self.events.tell = lambda event: self._tell_all("event", event)
        self.home = await Home.open(
            config,
            events=self.events,
            notifiers=plugins.notifiers,
            origins=origins,
            renew=self._renew,
            ways=self._ways,
            restored=self._restored,
        )
        self._cleanups.append(self.home.close)
        self.home.bus.subscribe(self._revoke)
        await plugins.start(
            self.home.service,
            self.events,
            notify=self.home.courier.enqueue,
            revoke=self.home.bus.publish,
            secret=secret,
            count_blocked=lambda plugin: self.metrics.loop_blocked.labels(plugin).inc(),
        )
        self._cleanups.append(plugins.stop)
        await self.home.courier.start()
        self._cleanups.append(self.home.courier.stop)

        for url in (*edge.listen, *edge.redirect_listen):
            listener = Listener(url)
            self._sockets.append(listener.bind())
            self._listeners.append(listener)
        self._admin = Admin(
            edge.admin_listen,
            metrics=self._metrics_text,
            faults=self._faults,
            pages=Pages(origins, lambda status: self.metrics.refused.labels(str(status)).inc()),
            refused=self.metrics.refused,
            limits=config.limits,
            certificates=self._certificates if config.acme is not None else None,
        )
        admin_url = await self._admin.start()
        self._make_folder()
        self._task(self._beat(), "beat")
        workers = await asyncio.gather(*(self._spawn(slot) for slot in range(edge.workers)))
        await asyncio.gather(*(self._until_ready(worker) for worker in workers))
        return {
            **ready_line(
                config,
                listen=[listener.url for listener in self._listeners],
                admin_url=admin_url,
                api_key_file=api_key_file,
                pid=os.getpid(),
            ),
            "workers": [worker.process.pid for worker in workers],
        }

    def _make_folder(self) -> None:
        """For the workers' sockets. Raises ConfigError."""
        try:
            self._folder = tempfile.mkdtemp(prefix="guestpass-")  # 0700: nobody else reaches them
        except OSError as exc:
            raise ConfigError(
                f"no folder for the workers' sockets: {exc.strerror}", hint=FOLDER_HINT
            ) from exc
        if len(os.fsencode(self._folder)) + 1 + NUMBER_DIGITS > MAX_SOCKET_PATH:
            raise ConfigError(
                f"the folder for the workers' sockets, {self._folder}, has too long a path", hint=FOLDER_HINT
            )

    async def _spawn(self, slot: int) -> Worker:
        """A new process in this place. Raises GuestpassError."""
        self._spawning[slot] += 1
        try:
            return await self._spawned(slot)
        except OSError as exc:
            raise GuestpassError(
                f"a worker cannot be started: {exc.strerror}",
                hint="Look at the limits for open files, processes and memory.",
            ) from exc
        finally:
            self._spawning[slot] -= 1

    async def _spawned(self, slot: int) -> Worker:
        self._numbers += 1
        number = self._numbers
        path = f"{self._folder}/{number}"
        ours, theirs = socket.socketpair()
        with theirs:
            listening = [sock.fileno() for sock in self._sockets]
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "guestpass.cli.worker"),
                    *("--config", str(self.config.file), "--log-level", self._log_level),
                    *("--control", str(theirs.fileno()), "--path", path),
                    *("--listen", ",".join(map(str, listening))),
                    pass_fds=(theirs.fileno(), *listening),
                    stdin=asyncio.subprocess.DEVNULL,  # standard output is ours: an access log may go there
                    # The supervisor decides when a worker ends: neither the terminal nor the service manager does.
                    start_new_session=True,
                    env={key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"},
                )
            except BaseException:
                ours.close()
                raise
        now = time.monotonic()
        handlers: dict[str, Callable[..., Any]] = {}
        channel = Channel(handlers, who=f"worker {number}")
        worker = Worker(number, slot, path, process, channel, self._loop.create_future(), now, now)
        handlers |= self._handlers(worker)
        channel.heard = partial(self._heard, worker)
        await channel.join(ours)
        channel.tell("begin", {key: getattr(self.config.edge, key) for key in AS_STARTED})
        channel.tell("lease", _boottime() + LEASE_SECONDS)
        for other in self._workers.values():
            if other.held:
                channel.tell("neighbour", other.number, other.path, list(other.held.values()), [])
        self._workers[number] = worker
        self._task(self._watch(worker), f"worker {number}")
        if self._stopping:  # since; whoever stops has not seen this one
            self._dismiss(worker)
        return worker

    async def _until_ready(self, worker: Worker) -> None:
        """Raises GuestpassError when the worker cannot start."""
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.shield(worker.ready)
        except TimeoutError as exc:
            worker.kill("overdue")
            raise GuestpassError(
                f"a worker did not start within {START_SECONDS:g} seconds",
                hint="The log says how far it came.",
            ) from exc

    # ── the end of a worker ──────────────────────────────────────────────────────────────────────────────────────

    async def _watch(self, worker: Worker) -> None:
        """Until the process has ended; then another one takes its place, unless its end was wanted."""
        code = await worker.process.wait()
        await asyncio.wait((worker.channel.closed,), timeout=LAST_WORDS_SECONDS)
        worker.channel.close()
        del self._workers[worker.number]
        self._ends.labels(worker.cause).inc()
        self._together.keep(worker.families)
        if not worker.ready.done():
            worker.ready.set_exception(
                GuestpassError(f"a worker ended at its start, with status {code}", hint="The log says why.")
            )
            worker.ready.exception()  # if nobody waits, nobody needs it
        with contextlib.suppress(OSError):
            os.unlink(worker.path)
        self._tell_all("neighbour_gone", worker.number)
        for site, name in worker.held:
            if not self._held_by_others(worker, site, name):
                self._gone(f"{site}/{name}", reason="worker_ended")
        if worker.leaving or self._stopping:
            return
        log.error(
            "worker %d (process %d) ended with status %d (%s)",
            worker.number,
            worker.process.pid,
            code,
            worker.cause,
        )
        pause = 0.0
        if time.monotonic() - worker.began < WELL_SECONDS:
            pause = self._respawn.get(worker.slot, 0.0)
            self._respawn[worker.slot] = min(max(2 * pause, RESPAWN_FIRST), RESPAWN_MOST)
        else:
            self._respawn.pop(worker.slot, None)
        await asyncio.sleep(pause)
        await self._fill(worker.slot)

    async def _fill(self, slot: int) -> None:
        """See to it that there is a worker in this place."""
        while not self._stopping and not self._filled(slot):
            try:
                fresh = await self._spawn(slot)
            except GuestpassError as exc:
                log.error("%s; it is tried again in %g s", exc, RESPAWN_MOST)
                await asyncio.sleep(RESPAWN_MOST)
                continue
            # One that does not come up is killed, and its own watch sees to what follows.
            with contextlib.suppress(GuestpassError):
                await self._until_ready(fresh)

    def _filled(self, slot: int) -> bool:
        return self._spawning[slot] > 0 or any(
            worker.slot == slot and not worker.leaving for worker in self._workers.values()
        )

    async def _retire(self, worker: Worker, how: str) -> None:
        """Have a worker leave; returns when its process has ended."""
        if not worker.admits:
            self._dismiss(worker)
            await worker.process.wait()
            return
        worker.leaving = True
        if worker.cause == "exit":
            worker.cause = "replaced"
        worker.channel.tell("leave", how)
        patience = STOP_SECONDS + (0.0 if how == "stop" else worker.drain_seconds)
        try:
            async with asyncio.timeout(patience):
                await worker.process.wait()
        except TimeoutError:
            log.error("worker %d did not end within %g s: it is killed", worker.number, patience)
            worker.kill("overdue")
            await worker.process.wait()

    @staticmethod
    def _dismiss(worker: Worker) -> None:
        """End a worker that has no visitors yet."""
        worker.leaving = True
        worker.kill("replaced")

    # ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _beat(self) -> None:
        """Leases, and who has fallen silent."""
        last = counted = time.monotonic()
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            now = time.monotonic()
            if now - last > LEASE_SECONDS:
                # This process was frozen itself: what it did not hear says nothing about others.
                for worker in self._workers.values():
                    worker.heard = now
            last = now
            count = now - counted >= COUNT_SECONDS
            counted = now if count else counted
            for worker in tuple(self._workers.values()):
                if worker.up and now - worker.heard > SILENT_SECONDS:
                    log.error("worker %d says nothing: it is killed", worker.number)
                    worker.kill("silent")
                worker.channel.tell("lease", _boottime() + LEASE_SECONDS)
                if worker.up and count:
                    self._task(self._count(worker), "count")

    async def _count(self, worker: Worker) -> None:
        with contextlib.suppress(GuestpassError):
            families = await worker.channel.call("metrics")
            if not worker.counted:
                worker.families = families

    def _heard(self, worker: Worker) -> None:
        worker.heard = time.monotonic()

    def roll(self) -> None:
        """Replace every worker, one after the other; SIGUSR2. While that is under way, once more after it: whoever asks
        again may have changed the configuration since."""
        if self._stopping:
            return
        self._roll_again = True
        if self._rolling:
            log.info("the workers are being replaced; they will be once more after that")
            return
        self._rolling = True
        self._task(self._roll(), "roll")

    async def _roll(self) -> None:
        try:
            while self._roll_again and not self._stopping:
                self._roll_again = False
                log.info("the workers are replaced, one after the other")
                try:
                    await self._replace_all()
                    log.info("all workers were replaced")
                except GuestpassError as exc:
                    if not self._stopping:
                        log.error("a new worker cannot start, the old ones stay: %s", exc)
        finally:
            self._rolling = False

    async def _replace_all(self) -> None:
        """Raises GuestpassError; then those whose turn has not come stay."""
        for old in sorted(self._workers.values(), key=lambda worker: worker.slot):
            if self._stopping:
                return
            if old.leaving or old.process.returncode is not None:
                continue
            fresh = await self._spawn(old.slot)
            await self._until_ready(fresh)
            await self._retire(old, "replaced")

    def reload(self) -> None:
        """SIGHUP: every worker reloads, and this process its own plugins."""
        self._task(self._reload(), "reload")

    async def _reload(self) -> None:
        with reloading():
            await asyncio.gather(
                self._load_again(),
                *(worker.channel.call("reload") for worker in self._workers.values()),
                return_exceptions=True,
            )

    def _load_plugins(self, config: EdgeConfig) -> PluginSet:
        """Raises PluginError, ConfigError."""
        return PluginSet.load(with_notifiers(config), observe_hook=self.metrics.observe_hook, only=TELLING)

    async def _load_again(self) -> None:
        """Notifiers and observers, where something about them has changed; with a fault those from before stay."""
        async with self._reload_lock:
            try:
                fresh = load_edge(self.config.file)
                seen = fingerprint(fresh, OF_TELLING)
                if seen != self._seen:
                    await self._plugins.replace(await asyncio.to_thread(self._load_plugins, fresh))
                    self._seen = seen
                    log.info("reload: notifiers and observers were replaced")
            except GuestpassError as exc:
                log.error("reload: %s; notifiers and observers are those from before", exc)
            except Exception:
                log.exception("reload: failed")

    async def drain(self) -> None:
        """Have all workers let what runs finish, at most `drain_seconds`, and end."""
        self._stopping = True
        for listener in self._listeners:
            listener.close()
        await asyncio.gather(*(self._retire(worker, "drain") for worker in tuple(self._workers.values())))

    async def stop(self) -> None:
        """Undo `start`. Never raises."""
        self._stopping = True
        for listener in self._listeners:
            listener.close()
        for worker in tuple(self._workers.values()):
            self._dismiss(worker)
            await worker.process.wait()
            worker.channel.close()
        if self._admin is not None:
            await self._admin.stop()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "events"):
            self.events.close()
        while self._cleanups:
            try:
                await self._cleanups.pop()()
            except Exception:
                log.exception("while stopping")
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _task(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ── metrics and health ───────────────────────────────────────────────────────────────────────────────────────

    async def _metrics_text(self) -> bytes:
        await asyncio.gather(*(self._fresh(worker) for worker in self._workers.values() if worker.up))
        return generate_latest(_All(self))

    async def _fresh(self, worker: Worker) -> None:
        """What the worker counts now, or, when it does not say at once, what it last said."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEAT_SECONDS):
                await self._count(worker)

    def collect(self) -> Iterable[Metric]:
        own = self.metrics.families()
        return self._together.of([own, *(worker.families for worker in self._workers.values())])

    async def _faults(self) -> dict[str, str]:
        faults: dict[str, str] = dict(self._plugins.health())
        up = [worker for worker in self._workers.values() if worker.up and not worker.leaving]
        if len(up) < self.config.edge.workers:
            faults["workers"] = f"{len(up)} of {self.config.edge.workers} serve"
        for worker in up:
            try:
                async with asyncio.timeout(BEAT_SECONDS):
                    faults |= await worker.channel.call("faults")
            except (TimeoutError, GuestpassError):
                faults[f"worker {worker.slot + 1}"] = "does not answer"
        if self._stopping:
            faults["edge"] = "draining"
        return faults

    async def _certificates(self) -> object:
        """How those by ACME stand; every worker knows."""
        for worker in tuple(self._workers.values()):
            if worker.up:
                with contextlib.suppress(TimeoutError, GuestpassError):
                    async with asyncio.timeout(BEAT_SECONDS):
                        return await worker.channel.call("certificates")
        return None

    # ── revocation ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _revoke(self, revocation: Revocation) -> Revoked:
        """A session that several workers knew counts once."""
        started = time.perf_counter()
        answers = await asyncio.gather(
            *(self._have_revoked(worker, revocation) for worker in tuple(self._workers.values()))
        )
        sessions = {session for found, _ in answers for session in found}
        seconds = time.perf_counter() - started
        for session in sessions:
            self._pins.pop(session, None)
        self.metrics.count_revocation(revocation.reason, seconds)
        return Revoked(len(sessions), sum(streams for _, streams in answers), seconds * 1000)

    async def _have_revoked(self, worker: Worker, revocation: Revocation) -> tuple[list[str], int]:
        if not worker.admits:
            worker.channel.tell("revoke", revocation)  # before any answer that a grant could be made of
            return [], 0
        try:
            async with asyncio.timeout(ACK_SECONDS):
                done: tuple[list[str], int] = await worker.channel.call("revoke", revocation)
                return done
        except TimeoutError:
            log.error("worker %d did not acknowledge a revocation: it is killed", worker.number)
            worker.kill("unacknowledged")
        except ChannelClosed:
            worker.kill("exit")
        except GuestpassError as exc:
            log.error("worker %d failed on a revocation: it is killed: %s", worker.number, exc)
            worker.kill("unacknowledged")
        await worker.process.wait()
        return [], 0

    def _renew(self, share: Share, sessions: Mapping[str, Session]) -> None:
        self._tell_all("renew", share, dict(sessions))

    # ── what workers ask and tell ────────────────────────────────────────────────────────────────────────────────

    def _tell_all(self, name: str, *args: Any, but: Worker | None = None) -> None:
        for worker in self._workers.values():
            if worker is not but:
                with contextlib.suppress(ChannelClosed):
                    worker.channel.tell(name, *args)

    def _handlers(self, worker: Worker) -> dict[str, Callable[..., Any]]:
        service = self.home.service
        return {
            **{f"service.{name}": getattr(service, name) for name in SERVICE_METHODS},
            **{f"storage.{name}": partial(self._storage, name) for name in STORAGE_METHODS},
            "touched": self._touched,
            "seen": service.seen,
            "enqueue": self.home.courier.enqueue,
            "publish": self.home.bus.publish,
            "event": partial(self._event, worker),
            "agree": partial(self._agree, worker),
            "live": self._live_everywhere,
            "owners": lambda: self._owners,
            "keep_owners": self._keep_owners,
            "held": partial(self._held, worker),
            "sync": partial(self._sync, worker),
            "alive": lambda: None,
            "admits": partial(self._worker_admits, worker),
            "ready": partial(self._worker_ready, worker),
            "failed": partial(self._worker_failed, worker),
            "last": partial(self._last, worker),
            "ways": partial(setattr, worker, "ways"),
        }

    def _worker_admits(self, worker: Worker, drain_seconds: float) -> None:
        worker.admits, worker.drain_seconds = True, drain_seconds

    def _worker_ready(self, worker: Worker) -> None:
        if not worker.ready.done():
            worker.ready.set_result(None)
            log.info("worker %d (process %d) serves", worker.number, worker.process.pid)

    def _worker_failed(self, worker: Worker, exc: GuestpassError) -> None:
        if not worker.ready.done():
            worker.ready.set_exception(exc)
            worker.ready.exception()
            log.error("worker %d cannot start: %s", worker.number, exc)
            # It ends by itself, unless a plugin has left a thread behind that does not.
            self._loop.call_later(STOP_SECONDS, worker.kill, "overdue")

    def _ways(self) -> list[str]:
        """The supervisor has no authenticators: as the youngest worker says, which read the newest configuration."""
        serving = [worker for worker in self._workers.values() if worker.up]
        return max(serving, key=lambda worker: worker.number).ways if serving else []

    def _last(self, worker: Worker, families: list[Family]) -> None:
        worker.families = families
        worker.counted = True

    def _storage(self, method: str, plugin: str, *args: Any, **more: Any) -> Any:
        return getattr(self.home.service.storage(plugin), method)(*args, **more)

    def _touched(self, sessions: Mapping[str, float]) -> None:
        for session_id, at in sessions.items():
            self.home.service.touch(session_id, at)

    def _agree(self, worker: Worker, session_id: str, names: Sequence[str], chosen: str | None) -> str | None:
        """See `admission.Agree`. Whoever chooses first has chosen for all."""
        pinned = self._pins.get(session_id)
        if pinned in names or chosen is None:
            if pinned is not None:
                self._pins.move_to_end(session_id)
            return pinned if pinned in names else None
        self._pins[session_id] = chosen
        while len(self._pins) > MAX_PINS:
            self._pins.popitem(last=False)
        self._tell_all("moved", session_id, chosen, but=worker)
        return chosen

    async def _live_everywhere(self) -> dict[str, dict[str, int]]:
        """What is open on all workers, by share and session."""
        together: dict[str, dict[str, int]] = {}
        answers = await asyncio.gather(
            *(self._live(worker) for worker in self._workers.values() if worker.up)
        )
        for found in answers:
            for share, sessions in found.items():
                counts = together.setdefault(share, {})
                for session, streams in sessions.items():
                    counts[session] = counts.get(session, 0) + streams
        return together

    async def _live(self, worker: Worker) -> dict[str, dict[str, int]]:
        """Nothing of a worker that does not say it at once: a page is not worth the wait, nor may a deletion wait."""
        try:
            async with asyncio.timeout(BEAT_SECONDS):
                found: dict[str, dict[str, int]] = await worker.channel.call("live")
                return found
        except (TimeoutError, GuestpassError):
            return {}

    def _keep_owners(
        self, new: Mapping[bytes, Owner], changed: Mapping[bytes, Owner], gone: Iterable[bytes]
    ) -> None:
        """Who signed in, has other notices, signed out. Whoever signed out meanwhile stays out."""
        self._owners |= new
        self._owners |= {key: owner for key, owner in changed.items() if key in self._owners}
        for key in gone:
            self._owners.pop(key, None)

    # ── gateways ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _held(self, worker: Worker, changed: list[Held], gone: list[tuple[str, str]]) -> None:
        for key in gone:
            worker.held.pop(key, None)
        worker.held |= {(held.site, held.name): held for held in changed}
        self._tell_all("neighbour", worker.number, worker.path, changed, gone, but=worker)

    async def _sync(self, worker: Worker) -> None:
        """Returns when every other worker has handled what it was told before."""
        others = [other for other in self._workers.values() if other is not worker and other.up]

        async def handled(other: Worker) -> None:
            with contextlib.suppress(TimeoutError, GuestpassError):
                async with asyncio.timeout(ACK_SECONDS):
                    await other.channel.call("sync")

        await asyncio.gather(*map(handled, others))

    def _held_by_others(self, worker: Worker, site: str, name: str) -> bool:
        return any((site, name) in other.held for other in self._workers.values() if other is not worker)

    def _event(self, worker: Worker, event: Event) -> None:
        """Each worker says what it sees of a gateway; observers hear of each change once."""
        if event.type == "gateway.connected":
            known = event.actor in self._announced
            self._announced.setdefault(event.actor, {})
            if known and not event.detail.get("replaced"):
                return
        elif event.type == "gateway.disconnected":
            site, _, name = event.actor.partition("/")
            if not self._held_by_others(worker, site, name):
                self._gone(event.actor, reason=str(event.detail.get("reason", "")))
            return
        elif event.type == "gateway.service":
            service, healthy = str(event.detail["service"]), bool(event.detail["healthy"])
            services = self._announced.setdefault(event.actor, {})
            if services.get(service) == healthy:
                return
            services[service] = healthy
        self.events.emit(event)

    def _gone(self, actor: str, *, reason: str) -> None:
        if self._announced.pop(actor, None) is not None:
            self.events.emit(Event("gateway.disconnected", time.time(), actor, detail={"reason": reason}))


class _All(Collector):
    """For `generate_latest`: the supervisor's metrics and all workers' together."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        return self._supervisor.collect()


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def supervise(
    config: EdgeConfig,
    *,
    ready: Callable[[dict[str, Any]], None],
    log_level: LogLevel = "info",
    restored: bool = False,
) -> None:
    """Run an edge of several workers until SIGTERM or SIGINT, which drain it (a second one stops at once). SIGHUP
    reloads, SIGUSR2 replaces the workers one after the other. Raises GuestpassError when it cannot start."""
    supervisor = Supervisor(config, log_level=log_level, restored=restored)
    line = await supervisor.start()
    try:
        with Signals(on_reload=supervisor.reload, on_roll=supervisor.roll) as signals:
            ready(line)
            await signals.stop.wait()
            drained = asyncio.ensure_future(supervisor.drain())
            hurried = asyncio.ensure_future(signals.hurry.wait())
            await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
            drained.cancel()
            hurried.cancel()
            await asyncio.gather(drained, hurried, return_exceptions=True)
    finally:
        await supervisor.stop()
