"""Plugins' storage, sign-in flows, hand-over codes: what expires, and what happens once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.shares import World

from guestpass.errors import Invalid
from guestpass.plugin import Storage


@pytest.fixture
def storage(w: World) -> Storage:
    return w.service.storage("email-code")


@pytest.mark.parametrize("value", [1, "text", [1, 2], {"a": {"b": None}}, True, 0, "", 1.5])
async def test_values_come_back(storage: Storage, value: Any) -> None:
    await storage.set("k", value)
    assert await storage.get("k") == value
    assert await storage.take("k") == value
    assert await storage.get("k") is None


async def test_each_plugin_has_its_own(w: World, storage: Storage) -> None:
    await storage.set("k", 1)
    assert await w.service.storage("other").get("k") is None
    assert await w.service.storage("other").delete("k") is False
    assert await storage.get("k") == 1


async def test_expiry(w: World, storage: Storage) -> None:
    await storage.set("k", 1, ttl=10)
    w.clock.forward(9.9)
    assert await storage.get("k") == 1
    w.clock.forward(0.1)
    assert await storage.get("k") is None
    assert await storage.take("k") is None
    await storage.set("k", 2, ttl=10)
    assert await storage.get("k") == 2
    await storage.set("k", 3)  # for ever
    w.clock.forward(1e6)
    assert await storage.get("k") == 3
    assert await storage.delete("k") is True
    assert await storage.delete("k") is False


async def test_counters(w: World, storage: Storage) -> None:
    assert await storage.add("n", ttl=60) == 1
    w.clock.forward(30)
    assert await storage.add("n", 4, ttl=60) == 5  # the expiry is the first one's
    assert await storage.get("n") == 5
    w.clock.forward(30)
    assert await storage.add("n", ttl=60) == 1
    assert await storage.add("n", -3) == -2
    await storage.set("text", "x")
    with pytest.raises(Invalid, match="not a counter"):
        await storage.add("text")
    assert await storage.get("text") == "x"


async def test_counting_at_the_same_time(storage: Storage) -> None:
    sums = await asyncio.gather(*(storage.add("n") for _ in range(50)))
    assert sorted(sums) == list(range(1, 51))


async def test_of_several_takers_one_gets_it(storage: Storage) -> None:
    await storage.set("k", "prize")
    taken = await asyncio.gather(*(storage.take("k") for _ in range(20)))
    assert sorted(taken, key=str) == [*[None] * 19, "prize"]


async def test_limits(storage: Storage) -> None:
    await storage.set("k" * 200, "x" * ((64 << 10) - 2))
    for refused in (
        storage.set("k" * 201, 1),
        storage.set("", 1),
        storage.set("k", "x" * (64 << 10)),
        storage.set("k", object()),
        storage.set("k", {1: 2}),
        storage.add("k", 1 << 60),
    ):
        with pytest.raises(Invalid):
            await refused


async def test_flows(w: World) -> None:
    flow = await w.service.create_flow({"share": "s1", "step": 1}, ttl=600)
    assert flow.encode() not in w.store.path.read_bytes()
    assert await w.service.get_flow(flow) == {"share": "s1", "step": 1}
    w.clock.forward(599)
    assert await w.service.update_flow(flow, {"step": 2}) is True
    assert await w.service.get_flow(flow) == {"step": 2}
    w.clock.forward(1)  # an update does not prolong
    assert await w.service.get_flow(flow) is None
    assert await w.service.update_flow(flow, {"step": 3}) is False
    assert await w.service.get_flow(flow) is None
    other = await w.service.create_flow({}, ttl=600)
    ends = await asyncio.gather(*(w.service.end_flow(other) for _ in range(5)))
    assert sorted(ends) == [False] * 4 + [True]
    assert await w.service.get_flow("nonsense") is None
    with pytest.raises(Invalid, match="larger than"):
        await w.service.create_flow({"x": "y" * (64 << 10)}, ttl=1)


async def test_handovers(w: World) -> None:
    code = await w.service.create_handover({"email": "alice@example.org"}, ttl=3600)
    taken = await asyncio.gather(*(w.service.take_handover(code) for _ in range(10)))
    assert [t for t in taken if t is not None] == [{"email": "alice@example.org"}]
    late = await w.service.create_handover({"x": 1}, ttl=3600)
    w.clock.forward(60)  # a minute at most, whatever was asked for
    assert await w.service.take_handover(late) is None
    assert await w.service.take_handover("nonsense") is None
    # A flow's id is no hand-over code.
    flow = await w.service.create_flow({}, 60)
    assert await w.service.take_handover(flow) is None


async def test_sweep(w: World, storage: Storage) -> None:
    await storage.set("short", "canary", ttl=10)
    await storage.set("long", 1)
    await w.service.sweep()
    w.clock.forward(20)
    await w.service.sweep()  # too soon
    assert b"canary" in w.store.path.read_bytes()
    w.clock.forward(600)
    await w.service.sweep()
    assert b"canary" not in w.store.path.read_bytes()
    assert await storage.get("long") == 1
