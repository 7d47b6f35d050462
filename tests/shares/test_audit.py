from __future__ import annotations

from support.shares import World

from guestpass.model import Event
from guestpass.shares.store.rows import AuditFilter


async def test_record_and_filter(w: World) -> None:
    for number in range(6):
        await w.service.record(
            Event(
                "share.opened" if number % 2 else "share.created",
                100.0 + number,
                "alice@example.org" if number < 3 else "bob@example.org",
                f"s{number % 3}",
                None,
                {"n": number, "text": 'quote " , “ü”', "none": None, "yes": True, "part": 0.5},
            )
        )
    everything = await w.service.audit()
    assert [entry.event.at for entry in everything.items] == [105.0, 104.0, 103.0, 102.0, 101.0, 100.0]
    assert everything.next is None
    assert everything.items[-1].event.detail == {
        "n": 0,
        "text": 'quote " , “ü”',
        "none": None,
        "yes": True,
        "part": 0.5,
    }

    async def found(which: AuditFilter) -> list[float]:
        return [entry.event.at for entry in (await w.service.audit(which)).items]

    assert await found(AuditFilter(share_id="s1")) == [104.0, 101.0]
    assert await found(AuditFilter(actor="bob@example.org")) == [105.0, 104.0, 103.0]
    assert await found(AuditFilter(type="share.created")) == [104.0, 102.0, 100.0]
    assert await found(AuditFilter(since=102.0, until=104.0)) == [103.0, 102.0]
    assert await found(AuditFilter(share_id="s1", actor="bob@example.org", type="share.opened")) == []


async def test_pages_are_stable_while_events_come(w: World) -> None:
    for number in range(5):
        await w.service.record(Event("x", float(number)))
    first = await w.service.audit(limit=2)
    await w.service.record(Event("x", 99.0))
    second = await w.service.audit(cursor=first.next, limit=2)
    third = await w.service.audit(cursor=second.next, limit=2)
    assert [e.event.at for p in (first, second, third) for e in p.items] == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert third.next is None
