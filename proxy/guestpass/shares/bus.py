"""Revocations from where they are decided to whoever holds grants or tunnels, with acknowledgements.

In this process only: handlers are plain functions that have ended what they end when they return, so that a
revocation is over when `publish` returns. A bus between several edges keeps this interface.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from guestpass.errors import GuestpassError
from guestpass.model import Revocation, Revoked

log = logging.getLogger("guestpass.bus")

Handler = Callable[[Revocation], Revoked]


class RevocationIncomplete(GuestpassError):
    """Someone who holds grants did not acknowledge: streams may still be open."""

    code = "revocation_incomplete"


class Bus:
    """See the module."""

    def __init__(self) -> None:
        self._handlers: list[Handler] = []

    def subscribe(self, handler: Handler) -> Callable[[], None]:
        """Call `handler` with every revocation from now on; returns what undoes this."""
        self._handlers.append(handler)

        def unsubscribe() -> None:
            if handler in self._handlers:
                self._handlers.remove(handler)

        return unsubscribe

    async def publish(self, revocation: Revocation) -> Revoked:
        """End what `revocation` names, everywhere; the sum of all acknowledgements.

        Every handler is called even when an earlier one fails. Raises RevocationIncomplete after that.
        """
        started = time.perf_counter()
        sessions = streams = failures = 0
        for handler in tuple(self._handlers):
            try:
                done = handler(revocation)
            except Exception:
                failures += 1
                log.exception("a handler failed on a revocation (%s)", revocation.reason)
            else:
                sessions += done.sessions
                streams += done.streams
        if failures:
            raise RevocationIncomplete(
                f"the revocation ({revocation.reason}) is stored, but not every stream is known to be closed",
                hint="Restart the edge: nothing that was revoked is admitted again. The log says what failed.",
            )
        return Revoked(sessions, streams, (time.perf_counter() - started) * 1000)
