"""Events from where they happen to whoever listens: observers, the API's event stream.

`EventHub.emit` is called on the paths that serve visitors, so it never waits and never raises. Each subscriber has a
bounded queue; one that does not keep up loses its oldest events, and the loss is counted and told to it.

Everything here belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType

from guestpass.model import Event

log = logging.getLogger("guestpass.events")

# Events that wait for one subscriber: some seconds of a busy edge, well under a megabyte.
QUEUE_EVENTS = 1000


class Subscription(AsyncIterator[Event]):
    """The events since `subscribe()`, in order. Ends when it, or the hub, is closed. For one reader."""

    def __init__(self, hub: EventHub, limit: int) -> None:
        self._hub = hub
        self._waiting: deque[Event] = deque(maxlen=limit)
        self._ready = asyncio.Event()
        self._closed = False
        self.lost = 0
        """Events that this subscriber was too slow for."""

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._waiting.popleft()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """No more events; what already waits can still be read."""
        self._hub._subscriptions.discard(self)
        self._closed = True
        self._ready.set()

    def _put(self, event: Event) -> None:
        if len(self._waiting) == self._waiting.maxlen:
            self.lost += 1
            self._hub.lost += 1
        self._waiting.append(event)
        self._ready.set()


class EventHub:
    """See the module."""

    def __init__(self, queue_events: int = QUEUE_EVENTS) -> None:
        self._queue_events = queue_events
        self._subscriptions: set[Subscription] = set()
        self._closed = False
        self.lost = 0
        """Events lost, all subscribers together."""

    def emit(self, event: Event) -> None:
        """Hand `event` to every subscriber. Never waits, never raises."""
        for subscription in tuple(self._subscriptions):
            try:
                subscription._put(event)
            except Exception:
                log.exception("an event of type %s was not handed on", event.type)

    def subscribe(self) -> Subscription:
        """Events from now on. Use it as a context manager, or close it."""
        subscription = Subscription(self, self._queue_events)
        if self._closed:
            subscription.close()
        else:
            self._subscriptions.add(subscription)
        return subscription

    @property
    def subscribers(self) -> int:
        return len(self._subscriptions)

    def close(self) -> None:
        """End every subscription after what waits in it."""
        self._closed = True
        for subscription in tuple(self._subscriptions):
            subscription.close()
