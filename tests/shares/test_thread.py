"""The store's thread: order, what is raised, and callers who go away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from guestpass.shares.store.thread import StoreThread


@pytest.fixture
def thread() -> Iterator[StoreThread]:
    it = StoreThread()
    yield it
    it.close()


async def test_jobs_run_in_order_in_one_other_thread(thread: StoreThread) -> None:
    ran: list[tuple[int, int]] = []
    await asyncio.gather(
        *(thread.run(lambda n=n: ran.append((n, threading.get_ident()))) for n in range(100))  # type: ignore[misc]
    )
    assert [number for number, _ in ran] == list(range(100))
    (ident,) = {ident for _, ident in ran}
    assert ident != threading.get_ident()


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
async def test_what_a_job_raises_is_the_callers(thread: StoreThread, error: BaseException) -> None:
    def fail() -> None:
        raise error

    found: BaseException | None = None
    try:
        await thread.run(fail)
    except BaseException as exc:  # each is to be looked at
        found = exc
    assert found is error
    assert await thread.run(lambda: 7) == 7


async def test_a_caller_who_has_gone_is_not_waited_for(thread: StoreThread) -> None:
    """What has begun is done to its end, what has not is not begun; and the others get their answers."""
    begun, going_on = threading.Event(), threading.Event()
    done: list[str] = []

    def first() -> None:
        begun.set()
        assert going_on.wait(10)
        done.append("first")

    running = asyncio.create_task(thread.run(first))
    waiting = asyncio.create_task(thread.run(lambda: done.append("second")))
    assert await asyncio.to_thread(begun.wait, 10)
    for task in (running, waiting):
        task.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    going_on.set()
    assert await thread.run(lambda: 7) == 7
    assert done == ["first"]


async def test_it_ends_after_what_was_given() -> None:
    thread = StoreThread()
    assert await thread.run(lambda: 1) == 1
    worker = thread._thread
    assert worker is not None
    last = asyncio.ensure_future(thread.run(lambda: 2))
    await asyncio.sleep(0)
    thread.close()
    assert await last == 2
    await asyncio.to_thread(worker.join, 10)
    assert not worker.is_alive()
    with pytest.raises(RuntimeError, match="has ended"):
        await thread.run(lambda: 3)
