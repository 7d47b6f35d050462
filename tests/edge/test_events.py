from __future__ import annotations

import asyncio

import pytest

from guestpass.edge.events import EventHub
from guestpass.model import Event


def event(number: int) -> Event:
    return Event("test", float(number))


async def test_each_subscriber_gets_everything_in_order() -> None:
    hub = EventHub()
    with hub.subscribe() as one, hub.subscribe() as two:
        for number in range(5):
            hub.emit(event(number))
        assert [(await anext(s)).at for s in (one, two, one)] == [0.0, 0.0, 1.0]
        waiting = asyncio.create_task(_all(two))
        hub.emit(event(5))
        hub.close()
        assert await waiting == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert await _all(one) == [2.0, 3.0, 4.0, 5.0]
    assert hub.subscribers == 0


async def test_only_what_comes_after_subscribing() -> None:
    hub = EventHub()
    hub.emit(event(1))
    with hub.subscribe() as subscription:
        hub.emit(event(2))
        assert (await anext(subscription)).at == 2.0


async def test_a_slow_one_loses_the_oldest_and_is_told() -> None:
    hub = EventHub(queue_events=3)
    with hub.subscribe() as slow, hub.subscribe() as fast:
        for number in range(5):
            hub.emit(event(number))
            assert (await anext(fast)).at == number
        assert (slow.lost, fast.lost, hub.lost) == (2, 0, 2)
        slow.close()
        assert await _all(slow) == [2.0, 3.0, 4.0]


async def test_waiting_can_be_given_up_without_losing_anything() -> None:
    hub = EventHub()
    with hub.subscribe() as subscription:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await anext(subscription)
        hub.emit(event(1))
        async with asyncio.timeout(1):
            assert (await anext(subscription)).at == 1.0


async def test_emit_after_the_end() -> None:
    hub = EventHub()
    subscription = hub.subscribe()
    hub.close()
    hub.emit(event(1))
    assert await _all(subscription) == []
    assert await _all(hub.subscribe()) == []


async def _all(subscription):  # type: ignore[no-untyped-def]
    return [e.at async for e in subscription]
