"""What crosses between the processes of an edge, in which order, and what does not."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import generate_latest

from guestpass.edge.channel import Channel, ChannelClosed, decode, encode
from guestpass.edge.metrics import Metrics, Together
from guestpass.edge.worker import SERVICE_METHODS, STORAGE_METHODS, RemoteService, RemoteStorage
from guestpass.errors import Conflict, GuestpassError, PluginFailed, ShareEnded, StoreError
from guestpass.model import Delivery, Event, Recipient, Revocation, Scope, Share
from guestpass.shares.service import UNSET, NewShare, ShareService, Unset
from guestpass.shares.storage import PluginStorage

SHARE = Share(
    id="abc",
    name="Line 3",
    site="plant",
    service="dash",
    path="/",
    scope=(Scope("GET", "/x/**"),),
    owner="owner@example.org",
    message="",
    created=1.5,
    expires=None,
    max_sessions=3,
    recipients=(Recipient("r", "abc", "alice@example.org", Delivery.SENT),),
)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.fixture
async def ends() -> AsyncIterator[tuple[Channel, Channel, list[Any]]]:
    """Two joined ends; what the second one was told, in order."""
    told: list[Any] = []

    async def later(value: Any) -> Any:
        await asyncio.sleep(0)
        told.append(("later", value))
        return value

    def fail(kind: str) -> None:
        raise Conflict("taken", hint="Choose another.", code="taken") if kind == "ours" else KeyError(kind)

    handlers = {"echo": lambda *args: args, "later": later, "fail": fail, "note": told.append}
    near, far = socket.socketpair()
    first, second = Channel({}, who="second"), Channel(handlers, who="first")
    await first.join(near)
    await second.join(far)
    yield first, second, told
    first.close()
    second.close()
    await asyncio.wait((first.closed, second.closed))


@pytest.mark.parametrize(
    "value",
    [
        SHARE,
        NewShare("plant", "dash", ["a@example.org"], scope=[Scope("*", "/y")]),
        Revocation("deleted", share_id="abc", gateway=("plant", "gw-1")),
        Event("share.created", 1.0, detail={"whole_service": True}),
        {"digest": b"\0" * 32, "set": {1, 2}, "none": None},
        [Delivery.QUEUED, frozenset((1,))],
    ],
    ids=lambda value: type(value).__name__,
)
def test_domain_types_cross(value: Any) -> None:
    assert decode(encode(value)[4:]) == value


def test_unset_stays_unset() -> None:
    assert isinstance(decode(encode((UNSET,))[4:])[0], Unset)


def test_errors_keep_their_code_and_hint() -> None:
    error = decode(encode((Conflict("taken", hint="Choose another.", code="taken"),))[4:])[0]
    assert (type(error), error.error_code, str(error), error.hint) == (
        Conflict,
        "taken",
        "taken",
        "Choose another.",
    )
    failed = decode(encode((PluginFailed("no", error_id="12345678"),))[4:])[0]
    assert (failed.error_id, failed.error_code) == ("12345678", "plugin_failed")


@pytest.mark.parametrize(
    "value",
    [Evil(), os.system, socket.socketpair, asyncio.Lock, Channel, type, ShareService],
    ids=repr,
)
def test_nothing_else_is_ever_built(value: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="does not cross"):
        decode(pickle.dumps(value))


async def test_answers_and_order(ends: tuple[Channel, Channel, list[Any]]) -> None:
    first, _, told = ends
    assert await first.call("echo", SHARE, 1) == (SHARE, 1)
    waiting = asyncio.ensure_future(first.call("later", "slow"))
    first.tell("note", "quick")
    assert await waiting == "slow"
    assert told == ["quick", ("later", "slow")] or told == [("later", "slow"), "quick"]
    for number in range(100):
        first.tell("note", number)
    await first.call("echo")
    assert told[-100:] == list(range(100))


async def test_failures(ends: tuple[Channel, Channel, list[Any]], caplog: pytest.LogCaptureFixture) -> None:
    first, _, _ = ends
    with pytest.raises(Conflict, match="taken") as caught:
        await first.call("fail", "ours")
    assert caught.value.hint == "Choose another."
    with pytest.raises(StoreError, match="its log says why"):
        await first.call("fail", "another")
    assert "KeyError" in caplog.text
    with pytest.raises(GuestpassError, match="not for"):
        await first.call("_store")


async def test_who_waits_hears_that_the_other_end_is_gone(ends: tuple[Channel, Channel, list[Any]]) -> None:
    first, second, _ = ends
    second._handlers = {"never": asyncio.Event().wait}
    waiting = asyncio.ensure_future(first.call("never"))
    await asyncio.sleep(0)
    second.close()
    with pytest.raises(ChannelClosed):
        await waiting
    with pytest.raises(ChannelClosed):
        await first.call("echo")
    first.tell("note", "to nobody")


async def test_no_call_is_made_without_a_lease(ends: tuple[Channel, Channel, list[Any]]) -> None:
    first, _, told = ends
    first.refusal = lambda: ShareEnded("over")
    with pytest.raises(ShareEnded):
        await first.call("note", 1)
    assert told == []


def methods(of: type) -> set[str]:
    return {
        name
        for name, found in vars(of).items()
        if inspect.iscoroutinefunction(found) and not name.startswith("_") and name != "close"
    }


def test_every_question_to_the_store_can_be_asked_by_workers() -> None:
    assert methods(ShareService) == set(SERVICE_METHODS)
    assert methods(PluginStorage) == set(STORAGE_METHODS)
    assert all(name in vars(RemoteService) for name in SERVICE_METHODS)
    assert all(name in vars(RemoteStorage) for name in STORAGE_METHODS)
    kept = {
        name for name, found in vars(ShareService).items() if callable(found) and not name.startswith("_")
    }
    assert kept - set(SERVICE_METHODS) <= set(vars(RemoteService)), (
        "a method would act on a store that is not there"
    )


def test_metrics_of_several_processes_are_added_and_never_fall() -> None:
    first, second, together = Metrics(), Metrics(), Together()
    for metrics, times in ((first, 1), (second, 3)):
        metrics.refused.labels("400").inc(times)
        metrics.revocation_seconds.observe(0.002)
        metrics.watch(
            grants=lambda times=times: 10 * times,  # type: ignore[misc]
            streams=lambda: 0,
            tunnels=lambda times=times: [("plant", "gw-1", 1, 0.1 * times)],  # type: ignore[misc]
            tunnel_bytes=lambda: (5, 6),
            certificates=list,
        )

    def value(name: str, *processes: Metrics) -> float:
        class Answers:
            def collect(self) -> Any:
                return together.of([process.families() for process in processes])

        lines = generate_latest(Answers()).decode().splitlines()  # type: ignore[arg-type]
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " "))

    assert value('guestpass_refused_total{status="400"}', first, second) == 4
    assert value('guestpass_revocation_seconds_bucket{le="0.0025"}', first, second) == 2
    assert value("guestpass_grants", first, second) == 40
    assert value('guestpass_tunnels{gateway="gw-1",site="plant"}', first, second) == 2
    assert value('guestpass_tunnel_rtt_seconds{gateway="gw-1",site="plant"}', first, second) == pytest.approx(
        0.3
    )
    together.keep(second.families())
    assert value('guestpass_refused_total{status="400"}', first) == 4
    assert value("guestpass_grants", first) == 10
    assert value('guestpass_tunnel_bytes_total{direction="sent"}', first) == 12
