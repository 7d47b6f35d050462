"""Mail that waits is delivered, tried again, or given up; and the owner sees which."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.shares import World, new, secret_of, world

from guestpass.errors import StoreError
from guestpass.model import Delivery, Event
from guestpass.plugin import Message, NotDelivered, Notifier, PluginConfig
from guestpass.shares.courier import CONCURRENT, GIVE_UP_SECONDS, Courier
from guestpass.shares.store import Store

TEMPORARY = NotDelivered("451 busy, come back", permanent=False)
PERMANENT = NotDelivered("550 5.1.1 no such user here", permanent=True)


class Scripted(Notifier):
    """Answers each delivery with the next of `answers`, then with success."""

    def __init__(self, *answers: Exception, takes: Callable[[Message], bool] = lambda _: True) -> None:
        super().__init__("scripted", PluginConfig())
        self.answers = list(answers)
        self.takes = takes
        self.delivered: list[Message] = []
        self.tried: list[Message] = []
        self.gate: asyncio.Event | None = None
        self.running = self.most = 0

    def accepts(self, message: Message) -> bool:
        return self.takes(message)

    async def deliver(self, message: Message) -> str:
        self.tried.append(message)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.answers:
                raise self.answers.pop(0)
            self.delivered.append(message)
            return "250 queued as 4F2A"
        finally:
            self.running -= 1


class Post:
    """A courier on a world's store, and what became of its mail."""

    def __init__(self, w: World, *notifiers: Notifier, first_retry: float = 0.01) -> None:
        self.w = w
        self.over: asyncio.Queue[Event] = asyncio.Queue()
        self.courier = Courier(
            w.store, notifiers, emit=self.over.put_nowait, now=w.clock, first_retry=first_retry
        )

    async def __aenter__(self) -> Post:
        await self.courier.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.courier.stop()

    async def outcome(self) -> Event:
        async with asyncio.timeout(10):
            return await self.over.get()


class RunningClock:
    """The world's clock, but it goes."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead

    def forward(self, seconds: float) -> float:
        self.ahead += seconds
        return self()


@pytest.fixture
async def w(tmp_path: Path):  # type: ignore[no-untyped-def]
    async with world(tmp_path, RunningClock()) as made:  # type: ignore[arg-type]
        yield made


def code(to: str = "alice@example.org", **more: object) -> Message:
    return Message("code", to, "Your code", "Your code is 1234 5678.", **more)  # type: ignore[arg-type]


async def recipient(w: World, share_id: str):  # type: ignore[no-untyped-def]
    return (await w.service.get(share_id)).recipients[0]


async def test_an_invitation_goes_out_when_the_share_is_created(w: World) -> None:
    notifier = Scripted()
    async with Post(w, notifier) as post:
        made = await w.service.create(new())
        event = await post.outcome()
    assert (event.type, event.actor, event.share_id) == ("mail.sent", "alice@example.org", made.share.id)
    assert event.detail == {"kind": "invitation", "attempts": 1, "said": "250 queued as 4F2A"}
    [message] = notifier.delivered
    assert made.links["alice@example.org"] in message.text
    found = await recipient(w, made.share.id)
    assert (found.delivery, found.delivery_detail) == (Delivery.SENT, "250 queued as 4F2A")
    assert await post.courier.waiting() == 0
    assert secret_of(made.links["alice@example.org"]).encode() not in w.store.path.read_bytes()


async def test_what_waited_before_the_start_goes_out(tmp_path: Path) -> None:
    async with world(tmp_path) as before:
        await before.service.create(new("a@example.org", "b@example.org"))
    async with world(tmp_path, RunningClock()) as w:  # type: ignore[arg-type]
        notifier = Scripted()
        async with Post(w, notifier) as post:
            w.clock.ahead = before.clock.at - time.time()  # type: ignore[attr-defined]
            await post.courier.enqueue(code())
            for _ in range(3):
                await post.outcome()
    assert {m.to for m in notifier.delivered} == {"a@example.org", "b@example.org", "alice@example.org"}


async def test_temporary_refusals_are_tried_again(w: World) -> None:
    notifier = Scripted(TEMPORARY, TEMPORARY)
    async with Post(w, notifier) as post:
        made = await w.service.create(new())
        event = await post.outcome()
    assert event.type == "mail.sent"
    assert event.detail["attempts"] == 3
    assert len(set(notifier.tried)) == 1
    assert (await recipient(w, made.share.id)).delivery is Delivery.SENT


async def test_pauses_double(w: World) -> None:
    notifier = Scripted(*[TEMPORARY] * 4)
    async with Post(w, notifier, first_retry=1000.0) as post:
        made = await w.service.create(new())
        for attempt in range(1, 5):
            async with asyncio.timeout(10):
                while (await recipient(w, made.share.id)).delivery_detail != "451 busy, come back" or len(
                    notifier.tried
                ) < attempt:
                    await asyncio.sleep(0.005)
                while post.courier._under_way:
                    await asyncio.sleep(0.005)
            pause = min(1000.0 * 2 ** (attempt - 1), 1800.0)
            due = await w.store.read(lambda db: db.exec_driver_sql("SELECT due FROM mail").scalar_one())
            assert 0 < due - w.clock() <= pause
            assert due - w.clock() > pause - 10
            w.clock.forward(pause)
            w.store.wake_courier()
        assert (await post.outcome()).detail["attempts"] == 5
    assert (await recipient(w, made.share.id)).delivery is Delivery.SENT


async def test_a_bounce_is_shown_to_the_owner_and_not_repeated(w: World) -> None:
    notifier = Scripted(PERMANENT)
    async with Post(w, notifier) as post:
        made = await w.service.create(new())
        event = await post.outcome()
        assert event.type == "mail.bounced"
        found = await recipient(w, made.share.id)
        assert (found.delivery, found.delivery_detail) == (Delivery.BOUNCED, "550 5.1.1 no such user here")
        assert await post.courier.waiting() == 0
        assert len(notifier.tried) == 1
        # The owner corrects nothing and tries again.
        await w.service.resend(made.share.id, "alice@example.org")
        assert (await post.outcome()).type == "mail.sent"
    found = await recipient(w, made.share.id)
    assert (found.delivery, found.delivery_detail) == (Delivery.SENT, "250 queued as 4F2A")


async def test_a_code_changes_what_the_owner_sees_only_when_it_bounces(w: World) -> None:
    made = await w.service.create(new(invite=False))
    about = {"share_id": made.share.id, "recipient_id": made.share.recipients[0].id}
    notifier = Scripted()
    async with Post(w, notifier) as post:
        await post.courier.enqueue(code(**about))
        assert (await post.outcome()).type == "mail.sent"
        assert (await recipient(w, made.share.id)).delivery is None
        notifier.answers.append(PERMANENT)
        await post.courier.enqueue(code(**about))
        assert (await post.outcome()).type == "mail.bounced"
        assert (await recipient(w, made.share.id)).delivery is Delivery.BOUNCED


async def test_it_is_given_up_in_the_end(w: World) -> None:
    notifier = Scripted(*[TEMPORARY] * 100)
    async with Post(w, notifier, first_retry=1800.0) as post:
        made = await w.service.create(new())
        async with asyncio.timeout(10):
            while not notifier.tried or post.courier._under_way:
                await asyncio.sleep(0.005)
        w.clock.forward(GIVE_UP_SECONDS - 1000)
        w.store.wake_courier()
        event = await post.outcome()
    assert (event.type, event.detail["said"]) == ("mail.failed", "451 busy, come back")
    assert (await recipient(w, made.share.id)).delivery is Delivery.FAILED
    assert await post.courier.waiting() == 0


async def test_a_code_that_is_too_late_is_not_sent(w: World) -> None:
    notifier = Scripted()
    await Post(w, notifier).courier.enqueue(code(expires=w.clock() + 300))
    w.clock.forward(301)
    async with Post(w, notifier) as post:
        event = await post.outcome()
    assert (event.type, event.detail["said"]) == ("mail.failed", "it was not delivered in time")
    assert notifier.tried == []


async def test_a_share_that_ended_is_not_announced(w: World) -> None:
    notifier = Scripted()
    made = await w.service.create(new())
    kept = await w.service.create(new("bob@example.org"))
    await w.service.delete(made.share.id)
    async with Post(w, notifier) as post:
        assert (await post.outcome()).share_id == kept.share.id
        assert await post.courier.waiting() == 0
    assert [m.to for m in notifier.delivered] == ["bob@example.org"]


async def test_the_first_notifier_that_accepts(w: World) -> None:
    inside = Scripted(takes=lambda m: m.to.endswith("@plant.internal"))
    outside = Scripted(takes=lambda m: m.to.endswith("@example.org"))
    async with Post(w, inside, outside) as post:
        for to in ("a@plant.internal", "a@example.org", "a@elsewhere.net"):
            await post.courier.enqueue(code(to))
        outcomes = {(e.actor, e.type) for e in [await post.outcome() for _ in range(3)]}
    assert outcomes == {
        ("a@plant.internal", "mail.sent"),
        ("a@example.org", "mail.sent"),
        ("a@elsewhere.net", "mail.failed"),
    }
    assert [m.to for m in inside.delivered] == ["a@plant.internal"]


async def test_a_notifier_that_breaks_is_tried_again(w: World, caplog: pytest.LogCaptureFixture) -> None:
    async with Post(w, Scripted(RuntimeError("boom"))) as post:
        await post.courier.enqueue(code())
        assert (await post.outcome()).detail["attempts"] == 2
    assert "boom" in caplog.text
    assert "1234" not in caplog.text


async def test_a_notifier_that_hangs_is_cut_off(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guestpass.shares.courier.DELIVERY_SECONDS", 0.02)
    notifier = Scripted()
    notifier.gate = asyncio.Event()
    async with Post(w, notifier) as post:
        made = await w.service.create(new())
        async with asyncio.timeout(10):
            while len(notifier.tried) < 2:
                await asyncio.sleep(0.005)
        assert "no answer" in (await recipient(w, made.share.id)).delivery_detail
        notifier.gate.set()
        assert (await post.outcome()).type == "mail.sent"


async def test_slow_mail_does_not_hold_up_all_and_codes_go_first(w: World) -> None:
    notifier = Scripted()
    notifier.gate = asyncio.Event()
    await w.service.create(new(*(f"a{n}@example.org" for n in range(CONCURRENT * 3))))
    courier = Post(w, notifier)
    await courier.courier.enqueue(code("code@example.org"))
    async with courier as post:
        async with asyncio.timeout(10):
            while notifier.running < CONCURRENT:
                await asyncio.sleep(0.005)
        assert notifier.tried[0].kind == "code"
        notifier.gate.set()
        for _ in range(CONCURRENT * 3 + 1):
            await post.outcome()
    assert notifier.most == CONCURRENT
    assert len(notifier.delivered) == len(set(notifier.delivered)) == CONCURRENT * 3 + 1


async def test_stopping_loses_nothing(w: World) -> None:
    notifier = Scripted()
    notifier.gate = asyncio.Event()
    async with Post(w, notifier) as post:
        await post.courier.enqueue(code())
        async with asyncio.timeout(10):
            while not notifier.running:
                await asyncio.sleep(0.005)
    assert await post.courier.waiting() == 1
    assert notifier.delivered == []
    notifier.gate = None
    async with Post(w, notifier) as post:
        assert (await post.outcome()).type == "mail.sent"


async def test_a_fault_of_our_own_does_not_end_it(
    w: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(work: object) -> None:
        monkeypatch.undo()
        raise LookupError("oops")

    notifier = Scripted()
    monkeypatch.setattr(w.store, "read", broken)
    async with Post(w, notifier) as post:
        async with asyncio.timeout(10):
            while "oops" not in caplog.text:
                await asyncio.sleep(0.01)
        await post.courier.enqueue(code())
        assert (await post.outcome()).type == "mail.sent"


async def test_queued_means_on_disk(w: World, tmp_path: Path) -> None:
    await Post(w).courier.enqueue(code())
    await w.service.close()
    await w.store.close()
    async with await Store.open(tmp_path / "edge.db") as store:
        assert await Courier(store, [], emit=lambda _: None).waiting() == 1
    with pytest.raises(StoreError):
        await Post(w).courier.enqueue(code())


async def test_words_of_a_server_are_made_fit_to_show(w: World) -> None:
    said = "550 \x1b[31mno\r\nX-Evil: 1\n" + "y" * 5000
    async with Post(w, Scripted(NotDelivered(said, permanent=True))) as post:
        made = await w.service.create(new())
        await post.outcome()
    detail = (await recipient(w, made.share.id)).delivery_detail
    assert detail.isprintable()
    assert detail.startswith("550 [31mno X-Evil: 1 yyy")
    assert len(detail) == 500
