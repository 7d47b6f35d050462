"""Who blocks the event loop: a thread that looks when the loop's heartbeat is late.

One plugin that computes or waits without awaiting holds up every visitor of the edge. It cannot be stopped from inside
the process, but it can be named: the loop writes down the time BEAT apart; when that is LATE overdue, the watchdog
looks at the loop thread's stack. The innermost frame that belongs to a plugin, by its `self` or its module, is the
culprit. Each incident is told once, however long it lasts.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

# Twenty times a second would be noticed in an idle edge's CPU time, once a second would miss what it looks for.
BEAT = 0.1
# A person notices a quarter of a second; garbage collection and a busy machine stay below it.
LATE = 0.25


@dataclass(frozen=True, slots=True)
class Blocked:
    """One incident, while it lasts. `owner` is what `owner_of` gave for the frame, None when no plugin is at work."""

    owner: object | None
    hook: str
    place: str  # "file.py:12"
    seconds: float


class Watchdog:
    """`told` is called in the watchdog's thread."""

    def __init__(
        self, owner_of: Callable[[FrameType], object | None], told: Callable[[Blocked], None]
    ) -> None:
        self._owner_of = owner_of
        self._told = told
        self._beat = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch the running loop, from its thread."""
        self._pulse(asyncio.get_running_loop())
        self._thread = threading.Thread(
            target=self._watch, args=(threading.get_ident(),), name="loop watchdog", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _pulse(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beat = time.monotonic()
        self._timer = loop.call_later(BEAT, self._pulse, loop)

    def _watch(self, thread: int) -> None:
        told_of = 0.0  # the beat that was the last before the incident
        while not self._stop.wait(BEAT):
            beat = self._beat
            late = time.monotonic() - beat - BEAT
            if late < LATE or beat == told_of:
                continue
            frame = sys._current_frames().get(thread)
            if frame is None or self._beat != beat:
                continue
            told_of = beat
            self._told(self._look(frame, late))

    def _look(self, frame: FrameType, late: float) -> Blocked:
        innermost = frame
        at: FrameType | None = frame
        while at is not None:
            owner = self._owner_of(at)
            if owner is not None:
                hook, outer = at.f_code.co_name, at.f_back
                while outer is not None and self._owner_of(outer) is owner:
                    hook, outer = outer.f_code.co_name, outer.f_back
                return Blocked(owner, hook, _place(at), late)
            at = at.f_back
        return Blocked(None, "", _place(innermost), late)


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
