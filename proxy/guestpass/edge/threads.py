"""Threads for the hooks of a plugin that blocks.

A deadline cannot stop a thread: one that overruns it is left behind, and its place is missing until it returns. When
every place is held by such threads the plugin is not asked any more (`Exhausted`). The threads are daemons, so that a
hook which never returns does not keep the edge from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

# Hooks of one plugin at the same time. A provider that answers in 100 ms then serves 80 sign-ins a second.
THREADS = 8


class Exhausted(Exception):
    """Every thread is held by a hook that overran its deadline."""


class _Job:
    __slots__ = ("abandoned", "call", "future", "running")

    def __init__(self, call: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        self.call = call
        self.future = future
        self.running = False
        self.abandoned = False


class Threads:
    """Used from one event loop."""

    def __init__(self, name: str, size: int = THREADS) -> None:
        self._name = name
        self._size = size
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = 0
        self._jobs = 0  # given and not finished
        self._left_behind = 0
        self._closed = False

    async def run(self, deadline: float, call: Callable[[], Any]) -> Any:
        """What `call` returns or raises. Raises TimeoutError, Exhausted."""
        if self._left_behind >= self._size or self._closed:
            raise Exhausted(f"all of its {self._size} threads are held by hooks that overran their deadline")
        loop = asyncio.get_running_loop()
        job = _Job(call, loop.create_future())
        self._jobs += 1
        if self._jobs > self._threads and self._threads < self._size:
            self._threads += 1
            name = f"{self._name} {self._threads}"
            threading.Thread(target=self._work, args=(loop,), name=name, daemon=True).start()
        self._queue.put(job)
        try:
            async with asyncio.timeout(deadline):
                return await asyncio.shield(job.future)
        except TimeoutError:
            if job.future.done():  # the hook's own
                raise
            raise TimeoutError(f"no answer within {deadline:g} seconds") from None
        finally:
            if not job.future.done():
                job.abandoned = True
                self._left_behind += job.running

    def close(self) -> None:
        """Threads that are at work end with their hook."""
        self._closed = True
        for _ in range(self._threads):
            self._queue.put(None)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while (job := self._queue.get()) is not None:
            result: Any = None
            error: BaseException | None = None
            if not job.abandoned:
                job.running = True
                try:
                    result = job.call()
                except Exception as exc:
                    error = exc
                except BaseException as exc:  # sys.exit() in a hook ends neither the thread nor the edge
                    error = RuntimeError(f"it raised {type(exc).__name__}")
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._finished, job, result, error)
            del job, result, error

    def _finished(self, job: _Job, result: Any, error: BaseException | None) -> None:
        self._jobs -= 1
        self._left_behind -= job.abandoned and job.running
        if job.future.done():
            return
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)
        if job.abandoned:
            job.future.exception()  # was reported as an overrun
