"""The process of one plugin with `isolation = "process"`: see `isolation`.

Order of things: limits and the sandbox first, then the plugin is loaded, then its hooks run in this process's own
event loop. It ends when the edge does: the socket is closed then.

The sandbox is Landlock (Linux 5.13): of the file system the plugin sees Python, its packages, what name resolution and
TLS need, its own file, and what its section names. It cannot look into other processes, nor signal them (Linux 6.12).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hmac
import logging
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from guestpass.config import PluginSection
from guestpass.edge.isolation_wire import HOOKS, SERVICES, Frames, Hook, WireSignIn, dump, load, pack
from guestpass.edge.plugin_loader import KINDS, build
from guestpass.edge.threads import Threads
from guestpass.errors import GuestpassError
from guestpass.model import Event, Identity, Revocation, Session
from guestpass.plugin import (
    Answer,
    Authenticator,
    Denied,
    Host,
    Incoming,
    Message,
    NotDelivered,
    Plugin,
    Reply,
    SignIn,
    Storage,
)

T = TypeVar("T")

# As of the plugins in the edge's process.
HTTP_SECONDS = 15.0
# Hooks of a blocking plugin are given up by the edge, which then ends this process; none takes longer than a delivery.
THREAD_SECONDS = 120.0

# ── limits and sandbox ──────────────────────────────────────────────────────────────────────────────────────

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
# How many access rights a version of Landlock knows; the first sixteen are enough.
KNOWN_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 1, 2

# What Python, name resolution and TLS read.
SYSTEM = (
    *(
        "/usr",
        "/lib",
        "/lib64",
        "/etc/ssl/certs",
        "/etc/ssl/openssl.cnf",
        "/etc/pki/tls",
        "/etc/ca-certificates",
    ),
    *(
        "/etc/resolv.conf",
        "/etc/hosts",
        "/etc/nsswitch.conf",
        "/etc/host.conf",
        "/etc/gai.conf",
        "/etc/services",
    ),
    *(
        "/etc/localtime",
        "/etc/ld.so.cache",
        "/dev/urandom",
        "/dev/random",
        "/dev/zero",
        "/run/systemd/resolve",
    ),
)


def limit(limits: Mapping[str, int | None]) -> None:
    """Resource limits of this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, value in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
    ):
        if value is not None:
            resource.setrlimit(name, (value, value))


def sandbox(readable: Sequence[str], writable: Sequence[str]) -> bool:
    """From here on no other files; whether the kernel can. Called before there are threads."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    handled = (1 << KNOWN_RIGHTS.get(version, 16)) - 1
    scoped = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if version >= 6 else 0
    attributes = (ctypes.c_uint64 * 3)(handled, 0, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(
        LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    if rules < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for paths, rights in (
        (("/dev/null",), READ_FILE | WRITE_FILE),
        ((*SYSTEM, *readable), EXECUTE | READ_FILE | READ_DIR),
        (writable, handled & ~EXECUTE),
    ):
        for path in paths:
            _allow(libc, rules, path, rights & handled)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(
        LANDLOCK_RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint32(0)
    ):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(rules)
    return True


def _allow(libc: ctypes.CDLL, rules: int, path: str, rights: int) -> None:
    try:
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this machine
    try:
        if not os.path.isdir(path):
            rights &= OF_FILES
        rule = rights.to_bytes(8, sys.byteorder) + at.to_bytes(4, sys.byteorder)
        if libc.syscall(LANDLOCK_ADD_RULE, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0)):
            raise OSError(ctypes.get_errno(), "landlock_add_rule", path)
    finally:
        os.close(at)


# ── what the plugin is given ────────────────────────────────────────────────────────────────────────────────


class _Storage:
    def __init__(self, ask: Callable[..., Awaitable[Any]]) -> None:
        self._ask = ask

    async def get(self, key: str) -> Any | None:
        return await self._ask("storage.get", key)

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        await self._ask("storage.set", key, value, ttl)

    async def delete(self, key: str) -> bool:
        return bool(await self._ask("storage.delete", key))

    async def add(self, key: str, amount: int = 1, *, ttl: float | None = None) -> int:
        return int(await self._ask("storage.add", key, amount, ttl))

    async def take(self, key: str) -> Any | None:
        return await self._ask("storage.take", key)


class _Host:
    """The edge's services, asked for over the socket; the clock, tasks and HTTP are this process's own."""

    def __init__(self, process: Process, seed: bytes) -> None:
        self._process = process
        self._seed = seed
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._http: aiohttp.ClientSession | None = None
        self.logger = logging.getLogger("plugin")
        self.storage: Storage = _Storage(process.ask)

    @property
    def http(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=HTTP_SECONDS)
            )
        return self._http

    def now(self) -> float:
        return time.time()

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        self._loop.call_soon_threadsafe(self._spawn, work, name)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._spawned_ended)

    def _spawned_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self.logger.error("%s failed", task.get_name(), exc_info=exc)

    async def notify(self, message: Message) -> None:
        await self._process.ask("notify", message)

    def emit(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._process.tell, "emit", event)

    def derive_key(self, purpose: str) -> bytes:
        return hmac.digest(self._seed, purpose.encode(), "sha256")

    async def resolve_token(self, token: str) -> Identity | None:
        return await self._process.ask("resolve_token", token)  # type: ignore[no-any-return]

    async def live_sessions(self, share_id: str) -> Sequence[Session]:
        return await self._process.ask("live_sessions", share_id)  # type: ignore[no-any-return]

    async def record(self, event: Event) -> None:
        await self._process.ask("record", event)

    async def idle_sessions(self, seconds: float, *, tokens: bool = False) -> Sequence[Session]:
        return await self._process.ask("idle_sessions", seconds, tokens)  # type: ignore[no-any-return]

    async def end_session(self, session_id: str, reason: str) -> None:
        await self._process.ask("end_session", session_id, reason)

    async def sign_out(self, email: str, reason: str, *, tokens: bool = False) -> int:
        return await self._process.ask("sign_out", email, reason, tokens)  # type: ignore[no-any-return]

    async def address_of(self, provider: str, subject: str) -> str | None:
        return await self._process.ask("address_of", provider, subject)  # type: ignore[no-any-return]

    def route(self, path: str, handler: Callable[[Incoming], Answer[Reply]]) -> str:
        raise RuntimeError('a plugin with isolation = "process" cannot take requests from outside')

    def wait(self, promise: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(promise, self._loop).result()

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()


class _Told(logging.Handler):
    """The plugin's log, to the edge's."""

    def __init__(self, send: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a log that raises would be the plugin's fault to somebody
            self._send({"do": "log", "level": record.levelno, "text": self.format(record)[:8192]})


# ── the process ─────────────────────────────────────────────────────────────────────────────────────────────


class Process:
    def __init__(self, sock: socket.socket, plugin: Plugin, frames: Frames) -> None:
        self._sock = sock
        self._plugin = plugin
        self._frames = frames
        self._hooks: Mapping[str, Hook] = HOOKS[plugin.kind]
        self._threads = Threads("hook") if plugin.blocking else None
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._ids = 0
        self._host: _Host | None = None
        # The loop itself keeps tasks by weak references only.
        self._starting: asyncio.Task[None] | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        reader, self._writer = await asyncio.open_connection(sock=self._sock)
        self._loop = loop

        def told(message: Mapping[str, Any]) -> None:
            loop.call_soon_threadsafe(self._send, message)

        logging.getLogger().addHandler(_Told(told))
        logging.getLogger().setLevel(logging.INFO)
        while data := await reader.read(65536):
            for message in self._frames.feed(data):
                if not await self._take(message):
                    return

    async def _take(self, message: dict[str, Any]) -> bool:
        do = message["do"]
        if do == "call":
            number, hook = message["id"], message["hook"]
            task = self._loop.create_task(self._call(number, hook, message["args"]), name=hook)
            self._calls[number] = task
            task.add_done_callback(lambda _: self._calls.pop(number, None))
        elif do == "cancel":
            if (running := self._calls.get(message["id"])) is not None:
                running.cancel()
        elif do == "answer":
            future = self._asked.pop(message["id"], None)
            if future is not None and not future.done():
                if "error" in message:
                    future.set_exception(RuntimeError(message["error"]["text"]))
                else:
                    future.set_result(message["value"])
        elif do == "start":
            self._host = _Host(self, bytes.fromhex(message["seed"]))
            self._starting = self._loop.create_task(self._start(message["id"]), name="start")
        elif do == "stop":
            try:
                await self._plugin.stop()
            finally:
                if self._host is not None:
                    await self._host.close()
            return False
        return True

    async def _start(self, number: int) -> None:
        assert self._host is not None
        try:
            await self._plugin.start(_checked_host(self._host))
        except Exception as exc:
            self._fail(number, exc)
        else:
            self._send({"do": "answer", "id": number, "value": None})

    async def _call(self, number: int, name: str, args: Sequence[Any]) -> None:
        hook = self._hooks[name]
        try:
            given = [load(kind, arg) for kind, arg in zip(hook.args, args, strict=True)]
            given = [self._sign_in(number, arg) if isinstance(arg, WireSignIn) else arg for arg in given]
            method = getattr(self._plugin, name)
            if name == "watch":
                async for revocation in method():
                    self._send({"do": "yield", "id": number, "value": dump(Revocation, revocation)})
                raise RuntimeError("the watch ended by itself")
            if self._threads is not None:
                value = await self._threads.run(THREAD_SECONDS, lambda: method(*given))
            else:
                value = method(*given)
                if isinstance(value, Awaitable):
                    value = await value
            answer = {"do": "answer", "id": number, "value": dump(hook.answer, value)}
        except (Exception, asyncio.CancelledError) as exc:
            self._fail(number, exc)
        else:
            self._send(answer)

    def _sign_in(self, number: int, wire: WireSignIn) -> SignIn:
        async def is_invited(address: str) -> bool:
            return bool(await self.ask("is_invited", number, address))

        return SignIn(
            *(wire.flow_id, wire.share, wire.client, wire.state, wire.callback_url, is_invited, wire.link),
            *(wire.headers, wire.peer),
        )

    def _fail(self, number: int, exc: BaseException) -> None:
        error: dict[str, Any] = {"type": "Exception", "text": f"{type(exc).__name__}: {exc}"}
        if isinstance(exc, Denied):
            error = {"type": "Denied", "text": str(exc)}
        elif isinstance(exc, NotDelivered):
            error = {"type": "NotDelivered", "text": exc.detail, "permanent": bool(exc.permanent)}
        elif not isinstance(exc, asyncio.CancelledError):
            error["trace"] = "".join(traceback.format_exception(exc))[-8192:]
        self._send({"do": "answer", "id": number, "error": error})

    async def ask(self, name: str, *args: Any) -> Any:
        service = SERVICES[name]
        self._ids += 1
        number = self._ids
        future = self._asked[number] = self._loop.create_future()
        given = [dump(kind, arg) for kind, arg in zip(service.args, args, strict=True)]
        self._send({"do": "host", "id": number, "name": name, "args": given})
        return load(service.answer, await future)

    def tell(self, name: str, *args: Any) -> None:
        given = [dump(kind, arg) for kind, arg in zip(SERVICES[name].args, args, strict=True)]
        self._send({"do": "host", "name": name, "args": given})

    def _send(self, message: Mapping[str, Any]) -> None:
        self._writer.write(pack(message))


def _checked_host(host: Host) -> Host:
    """The type checker's proof that `_Host` is all that the plugin API promises."""
    return host


def _load(message: Mapping[str, Any]) -> Plugin:
    """Raises GuestpassError."""
    secrets = dict(message["secrets"])

    def secret(value: Any) -> str | None:
        return secrets.get(repr(sorted(value.items()))) if isinstance(value, Mapping) else None

    kind = next(kind for kind in KINDS.values() if kind.section == message["section"])
    section = PluginSection.model_validate(
        {**message["settings"], "use": message["use"], "name": message["name"]}
    )
    return build(
        kind, section, message["position"], Path(message["file"]), secret=secret, line=message["line"]
    )


def _describe(plugin: Plugin) -> dict[str, Any]:
    base = next(kind.base for kind in KINDS.values() if kind.name == plugin.kind)
    return {
        "do": "loaded",
        "name": plugin.name,
        "interactive": isinstance(plugin, Authenticator) and bool(plugin.interactive),
        "label": str(getattr(plugin, "label", "")),
        "needs_proof": bool(getattr(plugin, "needs_proof", False)),
        "private_headers": list(getattr(plugin, "private_headers", ())),
        "hooks": [h for h in HOOKS[plugin.kind] if getattr(type(plugin), h) is not getattr(base, h)],
    }


def main(descriptor: int) -> None:
    sock = socket.socket(fileno=descriptor)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    frames = Frames()
    messages: list[dict[str, Any]] = []
    while not messages:
        data = sock.recv(65536)
        if not data:
            return
        messages = frames.feed(data)
    first = messages[0]
    limit(first["limits"])
    sandboxed = sandbox(first["readable"], first["writable"])
    try:
        plugin = _load(first)
        answer = {**_describe(plugin), "sandboxed": sandboxed}
    except GuestpassError as exc:
        sock.sendall(pack({"do": "refused", "message": exc.message, "hint": exc.hint}))
        return
    sock.sendall(pack(answer))
    sock.setblocking(False)
    asyncio.run(Process(sock, plugin, frames).run())
