"""How often something happens in one turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Self


class Turns:
    """Counts, from entering it to leaving it, what `note` is told."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._turn = 0
        self._noted: Counter[int] = Counter()

    def __enter__(self) -> Self:
        self._next()
        return self

    def __exit__(self, *about: object) -> None:
        self._ticker.cancel()

    def _next(self) -> None:
        self._turn += 1
        self._ticker = self._loop.call_soon(self._next)

    def note(self) -> None:
        self._noted[self._turn] += 1

    @property
    def total(self) -> int:
        return self._noted.total()

    @property
    def most(self) -> int:
        """In one turn."""
        return max(self._noted.values(), default=0)
