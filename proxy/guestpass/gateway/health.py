"""Whether the services can be reached: looked at every few seconds, and noted whenever a request finds out.

The edge hears of every change, so that a gateway that has lost its service gets no new sessions, and gets them again
without anybody's help.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from guestpass.gateway.dial import describe

if TYPE_CHECKING:
    from guestpass.gateway.upstream import Target

log = logging.getLogger("guestpass.gateway.health")

# How often a service is looked at: one connection attempt, seconds. While it is down, more often: a restart of the
# service should not cost visitors more than a moment.
INTERVAL = 5.0
INTERVAL_DOWN = 1.0

# Idle connections beyond their time are closed on the same occasion.

NOT_CHECKED = "not checked yet"


class Health:
    """Health of the services of one gateway; starts with all of them unknown, which counts as down."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._state: dict[str, tuple[bool, str]] = {}
        self._last: dict[str, float] = {}
        self._targets: Mapping[str, Target] = {}
        self._tasks: dict[str, tuple[Target, asyncio.Task[None]]] = {}
        self._running = False

    def of(self, name: str) -> tuple[bool, str]:
        """(reachable, why not)."""
        return self._state.get(name, (False, NOT_CHECKED))

    def watch(self, targets: Mapping[str, Target]) -> None:
        """These from now on."""
        self._targets = targets
        for name in [name for name in self._state if name not in targets]:
            del self._state[name]
        if self._running:
            self._start_tasks()

    async def start(self, wait: float) -> None:
        """Begin to look; returns when every service was looked at once, after `wait` seconds at most."""
        self._running = True
        self._start_tasks()
        until = time.monotonic() + wait
        while any(name not in self._state for name in self._targets) and time.monotonic() < until:
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._running = False
        tasks = [task for _, task in self._tasks.values()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start_tasks(self) -> None:
        for name, (target, task) in list(self._tasks.items()):
            if self._targets.get(name) is not target:
                task.cancel()
                del self._tasks[name]
        for name, target in self._targets.items():
            if name not in self._tasks:
                self._tasks[name] = (target, asyncio.get_running_loop().create_task(self._look(name, target)))

    async def _look(self, name: str, target: Target) -> None:
        while True:
            healthy = self.of(name)[0]
            try:
                if not healthy or time.monotonic() - self._last.get(name, 0.0) >= INTERVAL:
                    await self._probe(name, target)
                target.sweep()
            except Exception:  # a loop that ended would be a service that is down for ever
                log.exception("a fault in looking at service %s", name)
            await asyncio.sleep(INTERVAL if self.of(name)[0] else INTERVAL_DOWN)

    async def _probe(self, name: str, target: Target) -> None:
        try:
            await target.probe()
        except OSError as exc:
            self.failed(name, describe(exc))
        else:
            self.succeeded(name)

    def succeeded(self, name: str) -> None:
        """A connection was made."""
        self._last[name] = time.monotonic()
        self._note(name, True, "")

    def failed(self, name: str, detail: str) -> None:
        """No connection could be made."""
        self._note(name, False, detail)

    def _note(self, name: str, healthy: bool, detail: str) -> None:
        if name not in self._targets:
            return
        before = self._state.get(name)
        self._state[name] = (healthy, detail)
        if before is not None and before[0] == healthy:
            return
        if not healthy:
            log.warning(
                "service %s cannot be reached at %s: %s", name, self._targets[name].service.url, detail
            )
        elif before is not None:
            log.info("service %s can be reached again", name)
        self._on_change()
