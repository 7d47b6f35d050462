"""What supervisor and workers say to each other: calls, answers and tellings over a socket pair.

The socket pair is made by the supervisor and inherited by one worker; nothing else can reach it. A frame is a length
and a pickle: a tuple of its kind, a number, a name and arguments. Pickle, because domain types go both ways and both
ends are of one installation and one user. Not any pickle all the same, since workers read what strangers send: only
the classes that `may_cross` admits are ever built, which are ours and without effects, so a worker that was taken over
cannot have the supervisor run code by this way.

Order is kept: what one end sends is handled in that order at the other, and a handler that is a plain function has done
its work before the next frame is looked at. The grant table relies on it: an answer of the store that is older than a
revocation never comes after it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import functools
import importlib
import inspect
import io
import logging
import pickle
import socket
from collections.abc import Callable, Mapping
from typing import Any, cast

from guestpass.errors import GuestpassError, StoreError
from guestpass.shares.service import Unset

log = logging.getLogger("guestpass.edge.channel")

# The longest frame: a page of the audit has some 200 KiB, the shape of a thousand gateways the same.
MAX_FRAME = 64 << 20

# Modules whose dataclasses, enumerations and errors cross.
MODULES = frozenset(
    ("guestpass.errors", "guestpass.model", "guestpass.plugin", "guestpass.edge.console")
    + ("guestpass.edge.peers", "guestpass.shares.bus", "guestpass.shares.service", "guestpass.shares.pages")
    + ("guestpass.shares.store.rows",)
)
BUILTINS = {"set": set, "frozenset": frozenset}

CALL, ANSWER, FAILURE, TELL = range(4)

Handler = Callable[..., Any]


class ChannelClosed(StoreError):
    """The other process is gone, or has not been heard for too long."""


def may_cross(found: object) -> bool:
    """Whether instances of this class are data and nothing else."""
    return isinstance(found, type) and (
        dataclasses.is_dataclass(found)
        or issubclass(found, enum.Enum)
        or issubclass(found, GuestpassError)
        or found is Unset
    )


@functools.cache  # of names that are refused nothing is kept: it raises
def _class(module: str, name: str) -> Any:
    if module == "builtins" and name in BUILTINS:
        return BUILTINS[name]
    if module in MODULES and "." not in name:
        found = getattr(importlib.import_module(module), name, None)
        if may_cross(found):
            return found
    raise pickle.UnpicklingError(f"{module}.{name} does not cross between processes")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _class(module, name)


def encode(message: tuple[Any, ...]) -> bytes:
    data = pickle.dumps(message, protocol=5)
    if len(data) > MAX_FRAME:
        raise ValueError(f"a message of {len(data)} bytes is over the limit of {MAX_FRAME}")
    return len(data).to_bytes(4, "big") + data


def decode(data: bytes) -> Any:
    """Raises pickle.UnpicklingError."""
    return _Unpickler(io.BytesIO(data)).load()


class Channel(asyncio.Protocol):
    """One end. `handlers`: what the other end may call or tell, by name; a coroutine function runs as a task."""

    def __init__(self, handlers: Mapping[str, Handler], *, who: str) -> None:
        self._handlers = handlers
        self._who = who
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._held = bytearray()
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done when the other end is gone."""
        self.heard: Callable[[], None] = lambda: None
        """Called with everything that comes."""
        self.refusal: Callable[[], GuestpassError | None] = lambda: None
        """Asked before each call: why it cannot be made."""

    async def join(self, sock: socket.socket) -> None:
        """Begin, on this end's socket."""
        sock.setblocking(False)
        # A connected socket of its own family: the event loop treats it as any stream.
        await self._loop.create_unix_connection(lambda: self, sock=sock)

    # ── what the owner calls ─────────────────────────────────────────────────────────────────────────────────────

    async def call(self, name: str, /, *args: Any, **more: Any) -> Any:
        """The handler's answer. Raises what it raised, and ChannelClosed."""
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        self._number += 1
        number = self._number
        waiter = self._waiting[number] = self._loop.create_future()
        try:
            self._send((CALL, number, name, args, more))
            return await waiter
        finally:
            self._waiting.pop(number, None)

    def tell(self, name: str, /, *args: Any) -> None:
        """Without an answer. Nothing happens when the other end is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._send((TELL, 0, name, args, {}))

    def fail_waiting(self, error: GuestpassError) -> None:
        """Every call that waits raises `error`."""
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(error)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def flushed(self) -> None:
        """Close when what was sent has left."""
        if self._transport is not None:
            self._transport.close()
        await asyncio.wait((self.closed,), timeout=1.0)

    # ── asyncio's calls ──────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.fail_waiting(ChannelClosed(f"{self._who} is gone", hint="Its log says why."))
        for task in self._tasks:
            task.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._held += data
        self.heard()
        while len(self._held) >= 4:
            size = int.from_bytes(self._held[:4], "big")
            if size > MAX_FRAME:
                log.error("%s sent a frame of %d bytes", self._who, size)
                self.close()
                return
            if len(self._held) < 4 + size:
                return
            frame = bytes(self._held[4 : 4 + size])
            del self._held[: 4 + size]
            try:
                kind, number, *rest = decode(frame)
            except Exception:
                log.exception("%s sent what cannot be read", self._who)
                self.close()
                return
            self._take(kind, number, rest)

    # ── inner ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, message: tuple[Any, ...]) -> None:
        if self._transport is None or self._transport.is_closing():
            raise ChannelClosed(f"{self._who} is gone", hint="Its log says why.")
        self._transport.write(encode(message))

    def _take(self, kind: int, number: int, rest: list[Any]) -> None:
        if kind in (ANSWER, FAILURE):
            waiter = self._waiting.get(number)
            if waiter is None or waiter.done():
                return
            if kind == ANSWER:
                waiter.set_result(rest[0])
            else:
                waiter.set_exception(rest[0])
            return
        name, args, more = rest
        handler = self._handlers.get(name)
        try:
            if handler is None:
                raise GuestpassError(f"{name} is not for {self._who} to ask")
            result = handler(*args, **more)
        except Exception as exc:
            self._failed(kind, number, name, exc)
            return
        if inspect.isawaitable(result):
            task = asyncio.ensure_future(self._run(kind, number, name, result))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind == CALL:
            self._answer(number, name, result)

    async def _run(self, kind: int, number: int, name: str, work: Any) -> None:
        try:
            result = await work
        except Exception as exc:
            self._failed(kind, number, name, exc)
        else:
            if kind == CALL:
                self._answer(number, name, result)

    def _answer(self, number: int, name: str, result: Any) -> None:
        try:
            self._send((ANSWER, number, result))
        except ChannelClosed:
            pass
        except Exception as exc:
            self._failed(CALL, number, name, exc)

    def _failed(self, kind: int, number: int, name: str, exc: Exception) -> None:
        if not isinstance(exc, GuestpassError):
            log.error("%s, asked by %s, failed", name, self._who, exc_info=exc)
            exc = StoreError("the other process of this edge failed; its log says why")
        if kind == CALL and self._transport is not None and not self._transport.is_closing():
            self._send((FAILURE, number, exc))
