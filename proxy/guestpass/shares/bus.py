"""Revocations from where they are decided to whoever holds grants or tunnels, with acknowledgements.

Handlers have ended what they end when they return, or, those of other processes, when what they return has been
awaited; so a revocation is over when `publish` returns. A bus between several edges keeps this interface.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from guestpass.errors import GuestpassError
from guestpass.model import Revocation, Revoked

log = logging.getLogger("guestpass.bus")

Handler = Callable[[Revocation], Revoked | Awaitable[Revoked]]


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
        pending: list[Awaitable[Revoked]] = []

        def failed(exc: BaseException) -> None:
            nonlocal failures
            failures += 1
            log.error("a handler failed on a revocation (%s)", revocation.reason, exc_info=exc)

        for handler in tuple(self._handlers):
            try:
                done = handler(revocation)
            except Exception as exc:
                failed(exc)
                continue
            if isinstance(done, Revoked):
                sessions += done.sessions
                streams += done.streams
            else:
                pending.append(done)
        for late in await asyncio.gather(*pending, return_exceptions=True):
            if isinstance(late, BaseException):
                failed(late)
            else:
                sessions += late.sessions
                streams += late.streams
        if failures:
            raise RevocationIncomplete(
                f"the revocation ({revocation.reason}) is stored, but not every stream is known to be closed",
                hint="Restart the edge: nothing that was revoked is admitted again. The log says what failed.",
            )
        return Revoked(sessions, streams, (time.perf_counter() - started) * 1000)
