"""Plugins that run in a process of their own: `isolation = "process"` in their section.

What a deadline cannot stop in the edge's process it can stop here: a plugin that blocks, crashes in C, forks or calls
`os._exit` is one process among others, and is killed. So that it also learns nothing that is not its own, the process

* is a fresh interpreter with an empty environment, one socket and nothing else open but /dev/null;
* has limits on memory and files, dumps no core, and (where the kernel has Landlock) sees of the file system what Python
  needs, its own file and what its section names;
* is told its own section, with the secrets that this names, and what its hooks are asked.

In the set of plugins a proxy stands in its place (`Isolated`), one class per kind, which forwards the hooks. The class
itself is never imported here: importing is running. Words and types of the conversation: `isolation_wire`.

**Life of the process.** `load` starts it, synchronously: what is wrong with the plugin is found before anything
listens. `start` attaches it to the event loop. A hook that is cancelled (its deadline has passed) must be given up by
the process within CANCEL_SECONDS, else it is blocked, and is killed. However it ends, what it was asked fails, and it
is started again, after a pause that doubles.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guestpass.config import Isolation, PluginSection, Secret
from guestpass.edge.isolation_child import SYSTEM
from guestpass.edge.isolation_wire import HOOKS, SERVICES, Frames, WireError, WireSignIn, dump, load, pack
from guestpass.errors import ConfigError, PluginError
from guestpass.model import Candidate, Event, Identity, Revocation, Session, Share
from guestpass.plugin import (
    Authenticator,
    BackendChooser,
    Choice,
    Denied,
    Edits,
    Host,
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
    Static,
    Step,
)

log = logging.getLogger(__name__)

# A fresh interpreter with aiohttp needs half a second, on a busy machine several.
LOAD_SECONDS = 30.0
# How long a process may take to give up a hook that was cancelled. One that does not is blocked.
CANCEL_SECONDS = 1.0
STOP_SECONDS = 2.0
# Until it is started again; doubles with each death. One that has lived for a while starts anew.
RESTART_FIRST = 0.1
RESTART_MAX = 10.0
SETTLED_SECONDS = 30.0
# Services of the host that one process may be waiting for; it waits as well until it has read the answer.
MAX_ASKED = 256
# Sign-ins of which it may ask who is invited. That is asked after the hook has answered, so that nobody feels the
# difference: the latest ones are kept.
MAX_SIGN_INS = 1024
# Revocations that it has yielded and that are not carried out, and the size of each: a burst, not a flood.
MAX_YIELDED = 4096
MAX_YIELD = 4096
# Of its log this many lines in a window, each of this length: a flood must not fill the disk.
LOG_LINES, LOG_SECONDS = 200, 10.0
LOG_TEXT = 8192
# Fields of which it says that no application may see them.
MAX_PRIVATE = 16

# Whose hooks are asked about what a visitor wrote: what cannot be passed on is the visitor's fault, not the plugin's.
OF_VISITORS = ("authenticator", "request-filter")

BOOT = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from guestpass.edge.isolation_child import main; main(int(sys.argv[1]))"
)


class ProcessDied(Exception):
    """The plugin's process is not there."""


class Failed(Exception):
    """The hook raised in the plugin's process; the text is its traceback."""


@dataclass(frozen=True, slots=True)
class Loading:
    """What a process is started with."""

    kind: str
    section: str
    position: int
    line: int | None
    file: Path
    use: str
    name: str
    settings: Mapping[str, Any]
    isolation: Isolation
    kept: Sequence[Path]  # folders with what is not the plugin's: the edge's own files

    def message(self) -> dict[str, Any]:
        """Raises ConfigError when a secret is missing, or when the edge's own files lie where the process may read."""
        folder = self.file.parent
        secrets = {
            repr(sorted(table.items())): Secret.model_validate(table).of(self.file, self.section)
            for table in _secret_tables(self.settings)
        }
        source = self.use.rpartition(":")[0]
        own = [str((folder / source).resolve())] if source.endswith(".py") else []
        kept = [path.resolve() for path in (folder, *self.kept)]
        # Not where the edge keeps its state, should that lie on Python's path.
        path = [p for p in sys.path if p and not any(k.is_relative_to(Path(p).resolve()) for k in kept)]
        for readable in (*SYSTEM, sys.prefix, sys.base_prefix):
            if found := next((k for k in kept if k.is_relative_to(Path(readable).resolve())), None):
                raise ConfigError(
                    f'{self.file}: [[{self.section}]] number {self.position} with isolation = "process" could read '
                    f"the edge's own files in {found}: its process needs {readable}",
                    hint="Keep the configuration and the state elsewhere.",
                )
        return {
            "do": "load",
            "section": self.section,
            "position": self.position,
            "line": self.line,
            "file": str(self.file.absolute()),
            "use": self.use,
            "name": self.name,
            "settings": self.settings,
            "secrets": list(secrets.items()),
            "limits": {
                "memory": self.isolation.memory_mb << 20,
                "files": self.isolation.files,
                "cpu_seconds": self.isolation.cpu_seconds,
            },
            "readable": [*own, sys.prefix, sys.base_prefix, *path],
            "writable": sorted(_named_paths(self.settings, folder)),
        }


def _secret_tables(value: Any) -> Iterator[Mapping[str, str]]:
    """Every `{ env = … }` and `{ file = … }`."""
    if isinstance(value, Mapping):
        if len(value) == 1 and all(k in ("env", "file") and isinstance(v, str) for k, v in value.items()):
            yield value
        else:
            for inner in value.values():
                yield from _secret_tables(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _secret_tables(inner)


def _named_paths(value: Any, folder: Path) -> Iterator[str]:
    """Files and folders that exist and that the section names."""
    if isinstance(value, str):
        with contextlib.suppress(OSError, ValueError):
            path = folder / value
            if value and path.exists() and not folder.resolve().is_relative_to(path.resolve()):
                yield str(path.resolve())
    elif isinstance(value, Mapping):
        if not (len(value) == 1 and set(value) <= {"env", "file"}):
            for inner in value.values():
                yield from _named_paths(inner, folder)
    elif isinstance(value, list):
        for inner in value:
            yield from _named_paths(inner, folder)


class _Process:
    """One run of the plugin's process."""

    def __init__(self, loading: Loading) -> None:
        """Starts it and has it load the plugin; blocks. Raises PluginError, ConfigError."""
        message = pack(loading.message())
        ours, theirs = socket.socketpair()
        self.socket = ours
        self.began = time.monotonic()
        self.frames = Frames()
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-X", "utf8", "-c", BOOT, str(theirs.fileno()), *sys.path],
                    env={},
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,
                )
            self.loaded = self._load(loading, message)
        except BaseException:
            self.kill()
            ours.close()
            raise

    def _load(self, loading: Loading, message: bytes) -> dict[str, Any]:
        where = f'{loading.file}: [[{loading.section}]] number {loading.position} (use = "{loading.use}")'
        found: list[dict[str, Any]] = []
        self.socket.settimeout(LOAD_SECONDS)
        try:
            self.socket.sendall(message)
            while not found:
                data = self.socket.recv(65536)
                if not data:
                    raise PluginError(f"{where}: its process ended while it loaded: {self.fate()}")
                found = self.frames.feed(data)
        except (OSError, WireError) as exc:
            raise PluginError(f"{where}: its process does not load it: {exc or 'no answer'}") from exc
        first = found[0]
        if first.get("do") == "refused":
            raise PluginError(str(first.get("message")), hint=str(first.get("hint", "")))
        if first.get("do") != "loaded" or not isinstance(first.get("hooks"), list):
            raise PluginError(f"{where}: its process speaks another language")
        self.socket.setblocking(False)
        return first

    def fate(self) -> str:
        """How it ended; waits for a moment."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1.0)
            if code < 0:
                with contextlib.suppress(ValueError):
                    return f"killed by {signal.Signals(-code).name}"
            return f"exit status {code}"
        return "it closed its socket"

    def kill(self) -> None:
        """With what it has forked. Blocks until it is gone, which a kill does not let take long."""
        if not hasattr(self, "process"):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its group stays while a child of it lives
        self.process.kill()
        self.process.wait()


class Isolated(Plugin):
    """Stands for a plugin in its own process. `hooks` are those that it overrides."""

    hooks: frozenset[str]

    def __init__(self, loading: Loading) -> None:
        """Raises PluginError, ConfigError."""
        self._loading = loading
        self._process: _Process | None = _Process(loading)
        loaded = self._process.loaded
        super().__init__(str(loaded["name"]), PluginConfig())
        self.hooks = frozenset(map(str, loaded["hooks"])) & HOOKS[self.kind].keys()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._cancelled: dict[int, asyncio.TimerHandle] = {}
        self._yields: dict[int, asyncio.Queue[Any]] = {}
        # By the id of the hook's call, the oldest first.
        self._invited: OrderedDict[int, Callable[[str], Awaitable[bool]]] = OrderedDict()
        self._asked: set[asyncio.Task[None]] = set()
        self._ids = 0
        self._said, self._said_since = 0, 0.0  # lines of its log in this window
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._down: str | None = "it is not started"
        self._sandboxed = bool(loaded.get("sandboxed"))

    @property
    def pid(self) -> int | None:
        return self._process.process.pid if self._process is not None else None

    def fault(self) -> str | None:
        """Why it cannot be asked."""
        return self._down if self._keeper is not None else None

    async def start(self, host: Host) -> None:
        self.host = host
        if not self._sandboxed:
            log.warning(
                "%s %r: this kernel has no Landlock; its process may read the files that the edge may read",
                *(self.kind, self.name),
            )
        assert self._process is not None
        reader = await self._attach(self._process)
        listening = asyncio.create_task(self._listen(reader), name=f"{self.name}: listen")
        try:
            await self._begin()
        except BaseException:
            listening.cancel()
            raise
        self._keeper = asyncio.create_task(self._keep(listening), name=f"{self.name}: process")

    async def stop(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait((keeper,))
        if self._writer is not None and self._process is not None:
            with contextlib.suppress(Exception):
                self._writer.write(pack({"do": "stop"}))
                deadline = time.monotonic() + STOP_SECONDS
                while self._process.process.poll() is None and time.monotonic() < deadline:
                    await asyncio.sleep(0.01)
        self.kill()
        for task in list(self._asked):
            task.cancel()

    def kill(self) -> None:
        """End the process at once. Idempotent."""
        process, self._process = self._process, None
        self._close(process)
        if process is not None:
            process.kill()
        self._drop("it was stopped")

    # ── the process's life ──────────────────────────────────────────────────────────────────────────────────

    async def _attach(self, process: _Process) -> asyncio.StreamReader:
        reader, self._writer = await asyncio.open_connection(sock=process.socket)
        return reader

    async def _begin(self) -> None:
        self._ids += 1
        number = self._ids
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        seed = getattr(self.host, "seed", b"")
        self._send({"do": "start", "id": number, "seed": seed.hex()})
        await future
        self._down = None

    async def _keep(self, listening: asyncio.Task[str]) -> None:
        """Start it again whenever it ends."""
        pause = RESTART_FIRST
        try:
            while True:
                why = await listening
                process, self._process = self._process, None
                assert process is not None
                if time.monotonic() - process.began > SETTLED_SECONDS:
                    pause = RESTART_FIRST
                self._close(process)
                fate = await asyncio.to_thread(process.fate)
                await asyncio.to_thread(process.kill)
                self._drop(f"its process ended: {why or fate}")
                log.error("%s %r: %s; it is started again in %.1f s", self.kind, self.name, self._down, pause)
                while True:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, RESTART_MAX)
                    listening = await self._again()
                    if self._down is None:
                        break
        finally:
            listening.cancel()

    async def _again(self) -> asyncio.Task[str]:
        idle: asyncio.Task[str] = asyncio.create_task(asyncio.sleep(0, ""))
        try:
            self._process = process = await self._made()
            reader = await self._attach(process)
            listening = asyncio.create_task(self._listen(reader), name=f"{self.name}: listen")
            try:
                async with asyncio.timeout(LOAD_SECONDS):
                    await self._begin()
            except BaseException:
                listening.cancel()
                raise
            return listening
        except Exception as exc:
            self._down = f"its process does not start: {exc}"
            log.error("%s %r: %s", self.kind, self.name, self._down)
            failed, self._process = self._process, None
            self._close(failed)
            if failed is not None:
                await asyncio.to_thread(failed.kill)
            return idle

    async def _made(self) -> _Process:
        """A new process, from a thread. One that is there when nobody wants it any more is ended."""
        making = asyncio.ensure_future(asyncio.to_thread(_Process, self._loading))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                process = await making
                process.kill()
                process.socket.close()
            raise

    def _close(self, process: _Process | None) -> None:
        """Our end of the conversation with it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        elif process is not None:
            process.socket.close()

    async def _listen(self, reader: asyncio.StreamReader) -> str:
        """Until the process ends or says what it must not; why, unless it ended."""
        assert self._process is not None
        process = self._process
        try:
            waiting: list[dict[str, Any]] = process.frames.feed(b"")
            while True:
                for message in waiting:
                    self._take(message)
                data = await reader.read(65536)
                if not data:
                    return ""
                waiting = process.frames.feed(data)
        except ConnectionError:
            return ""
        except (WireError, KeyError, TypeError, ValueError, AttributeError) as exc:
            return f"it said what it must not: {exc}"
        finally:
            self._drop("its process ended")

    def _drop(self, why: str) -> None:
        self._down = why
        for timer in self._cancelled.values():
            timer.cancel()
        self._cancelled.clear()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(ProcessDied(why))
        self._calls.clear()
        for queue in self._yields.values():
            queue.put_nowait(None)

    def _blocked(self, number: int) -> None:
        """It did not give up a hook that was cancelled."""
        self._cancelled.pop(number, None)
        process = self._process
        if process is not None:
            log.error(
                "%s %r: its process (%d) is blocked and is killed", self.kind, self.name, process.process.pid
            )
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.process.pid, signal.SIGKILL)

    # ── the conversation ────────────────────────────────────────────────────────────────────────────────────

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._writer is None or self._process is None:
            raise ProcessDied(self._down or "its process ended")
        self._writer.write(pack(message))

    def _call(self, name: str, args: tuple[Any, ...]) -> int:
        if self._down is not None:
            raise ProcessDied(self._down)
        hook = HOOKS[self.kind][name]
        self._ids += 1
        number = self._ids
        try:
            given = [
                dump(kind, self._wired(number, arg) if kind is WireSignIn else arg)
                for kind, arg in zip(hook.args, args, strict=True)
            ]
            self._send({"do": "call", "id": number, "hook": name, "args": given})
        except WireError as exc:
            if self.kind in OF_VISITORS:
                raise Denied("This cannot be read here.") from exc
            raise
        return number

    def _wired(self, number: int, sign_in: SignIn) -> WireSignIn:
        self._invited[number] = sign_in.is_invited
        while len(self._invited) > MAX_SIGN_INS:
            self._invited.popitem(last=False)
        return WireSignIn(
            *(
                sign_in.flow_id,
                sign_in.share,
                sign_in.client,
                sign_in.state,
                sign_in.callback_url,
                sign_in.link,
                sign_in.headers,
                sign_in.peer,
            )
        )

    async def ask(self, name: str, *args: Any) -> Any:
        """What the plugin's hook answers. Raises what it raises."""
        number = self._call(name, args)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            return load(HOOKS[self.kind][name].answer, await future)
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessDied):
                self._send({"do": "cancel", "id": number})
                loop = asyncio.get_running_loop()
                self._cancelled[number] = loop.call_later(CANCEL_SECONDS, self._blocked, number)
            raise
        finally:
            self._calls.pop(number, None)

    async def stream(self, name: str) -> AsyncIterator[Any]:
        """What the plugin's iterator yields."""
        number = self._call(name, ())
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._yields[number] = queue
        future = self._calls[number] = asyncio.get_running_loop().create_future()

        def ended(done: asyncio.Future[Any]) -> None:
            if not done.cancelled():
                done.exception()  # told below
            queue.put_nowait(None)

        future.add_done_callback(ended)
        try:
            while (item := await queue.get()) is not None:
                yield load(HOOKS[self.kind][name].answer, item)
            if future.done():
                future.result()
            raise ProcessDied(self._down or "its process ended")
        finally:
            self._yields.pop(number, None)
            self._calls.pop(number, None)
            with contextlib.suppress(ProcessDied):
                self._send({"do": "cancel", "id": number})

    def _take(self, message: dict[str, Any]) -> None:
        """One message of the process. Raises WireError and the like when it is not of the protocol."""
        do = message["do"]
        if do == "answer":
            self._answered(message)
        elif do == "yield":
            if (queue := self._yields.get(message["id"])) is not None:
                if queue.qsize() >= MAX_YIELDED:
                    raise WireError(f"more than {MAX_YIELDED} revocations wait")
                if len(pack(message)) > MAX_YIELD:
                    raise WireError(f"a revocation of more than {MAX_YIELD} bytes")
                queue.put_nowait(message["value"])
        elif do == "host":
            if len(self._asked) >= MAX_ASKED:
                raise WireError(f"more than {MAX_ASKED} questions at once")
            task = asyncio.create_task(self._serve(message), name=f"{self.name}: host")
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
        elif do == "log":
            self._log(int(message["level"]), str(message["text"]))
        else:
            raise WireError(f"what is {do!r}")

    def _log(self, level: int, text: str) -> None:
        now = time.monotonic()
        if now - self._said_since >= LOG_SECONDS:
            self._said, self._said_since = 0, now
        self._said += 1
        if self._said <= LOG_LINES:
            self.host.logger.log(max(logging.DEBUG, min(level, logging.ERROR)), "%s", text[:LOG_TEXT])
        elif self._said == LOG_LINES + 1:
            self.host.logger.warning(
                "more than %d lines within %g s: further ones are dropped", LOG_LINES, LOG_SECONDS
            )

    def _answered(self, message: dict[str, Any]) -> None:
        number = message["id"]
        timer = self._cancelled.pop(number, None)
        if timer is not None:
            timer.cancel()
        future = self._calls.get(number)
        if future is None or future.done():
            return
        error = message.get("error")
        if error is None:
            future.set_result(message["value"])
        elif error["type"] == "Denied":
            future.set_exception(Denied(str(error["text"])))
        elif error["type"] == "NotDelivered":
            future.set_exception(NotDelivered(str(error["text"]), permanent=bool(error["permanent"])))
        else:
            future.set_exception(Failed(str(error.get("trace") or error["text"])))

    async def _serve(self, message: dict[str, Any]) -> None:
        """A service of the host for the process."""
        reply: dict[str, Any] = {"do": "answer", "id": message.get("id")}
        try:
            service = SERVICES[message["name"]]
            args = [load(kind, arg) for kind, arg in zip(service.args, message["args"], strict=True)]
            value = await self._service(message["name"], args)
            reply["value"] = dump(service.answer, value)
        except Exception as exc:
            reply["error"] = {"text": f"{type(exc).__name__}: {exc}"}
        if reply["id"] is not None:
            with contextlib.suppress(ProcessDied, WireError, ConnectionError):
                self._send(reply)
                if self._writer is not None:
                    await self._writer.drain()

    async def _service(self, name: str, args: list[Any]) -> Any:
        host = self.host
        storage = host.storage
        if name == "is_invited":
            return await self._invited[args[0]](args[1])
        if name == "emit":
            return host.emit(args[0])
        if name == "idle_sessions":
            return await host.idle_sessions(args[0], tokens=args[1])
        if name == "sign_out":
            return await host.sign_out(args[0], args[1], tokens=args[2])
        if name in ("storage.set", "storage.add"):
            method = storage.set if name == "storage.set" else storage.add
            return await method(args[0], args[1], ttl=args[2])
        plain: Mapping[str, Callable[..., Coroutine[Any, Any, Any]]] = {
            "storage.get": storage.get,
            "storage.delete": storage.delete,
            "storage.take": storage.take,
            "notify": host.notify,
            "record": host.record,
            "resolve_token": host.resolve_token,
            "live_sessions": host.live_sessions,
            "end_session": host.end_session,
            "address_of": host.address_of,
        }
        return await plain[name](*args)


# ── one proxy per kind ──────────────────────────────────────────────────────────────────────────────────────


class IsolatedAuthenticator(Isolated, Authenticator):
    def __init__(self, loading: Loading) -> None:
        super().__init__(loading)
        assert self._process is not None
        self.interactive = bool(self._process.loaded["interactive"])  # type: ignore[misc]
        self.label = str(self._process.loaded["label"])
        self.needs_proof = bool(self._process.loaded["needs_proof"])
        private = self._process.loaded["private_headers"]
        if not isinstance(private, list) or len(private) > MAX_PRIVATE:
            self.kill()
            raise PluginError(f"plugin {self.name!r}: private_headers are at most {MAX_PRIVATE} names")
        self.private_headers = tuple(map(str, private))

    async def begin(self, sign_in: SignIn) -> Step:
        return await self.ask("begin", sign_in)  # type: ignore[no-any-return]

    async def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        return await self.ask("complete", sign_in, params)  # type: ignore[no-any-return]

    async def prove(self, sign_in: SignIn, email: str) -> Step:
        return await self.ask("prove", sign_in, email)  # type: ignore[no-any-return]

    async def identify(self, request: RequestContext) -> Identity | None:
        return await self.ask("identify", request)  # type: ignore[no-any-return]


class IsolatedRevoker(Isolated, Revoker):
    async def check(self, share: Share, session: Session) -> Revocation | None:
        return await self.ask("check", share, session)  # type: ignore[no-any-return]

    def watch(self) -> AsyncIterator[Revocation] | None:
        return self.stream("watch")


class IsolatedBackendChooser(Isolated, BackendChooser):
    async def choose(self, choice: Choice) -> Candidate | None:
        return await self.ask("choose", choice)  # type: ignore[no-any-return]


class IsolatedRequestFilter(Isolated, RequestFilter):
    async def compile(self, share: Share, session: Session) -> Static | None:
        return await self.ask("compile", share, session)  # type: ignore[no-any-return]

    async def on_request(self, request: RequestContext) -> Edits | None:
        return await self.ask("on_request", request)  # type: ignore[no-any-return]


class IsolatedNotifier(Isolated, Notifier):
    async def accepts(self, message: Message) -> bool:
        return "accepts" not in self.hooks or bool(await self.ask("accepts", message))

    async def deliver(self, message: Message) -> str:
        return str(await self.ask("deliver", message))


class IsolatedObserver(Isolated, Observer):
    async def on_event(self, event: Event) -> None:
        await self.ask("on_event", event)


PROXIES: Mapping[str, type[Isolated]] = {
    proxy.kind: proxy
    for proxy in (
        *(IsolatedAuthenticator, IsolatedRevoker, IsolatedBackendChooser),
        *(IsolatedRequestFilter, IsolatedNotifier, IsolatedObserver),
    )
}


def isolated(
    kind: str,
    section: str,
    entry: PluginSection,
    position: int,
    file: Path,
    line: int | None,
    kept: Sequence[Path] = (),
) -> Isolated:
    """The proxy of a plugin whose process has loaded it; it may read nothing in the folders of `kept`, nor in that of
    `file`. Raises PluginError, ConfigError."""
    assert entry.isolation is not None
    loading = Loading(
        *(kind, section, position, line, file, entry.use, entry.name, entry.settings, entry.isolation),
        kept,
    )
    try:
        return PROXIES[kind](loading)
    except WireError as exc:
        raise ConfigError(f"{file}: [[{section}]] number {position}: {exc}") from exc
