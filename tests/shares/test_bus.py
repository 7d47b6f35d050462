from __future__ import annotations

import pytest

from guestpass.model import Revocation, Revoked
from guestpass.shares.bus import Bus, RevocationIncomplete


async def test_counts_are_summed() -> None:
    bus, seen = Bus(), []

    def one(revocation: Revocation) -> Revoked:
        seen.append(revocation)
        return Revoked(2, 3, 0.0)

    undo = bus.subscribe(one)
    bus.subscribe(lambda _: Revoked(1, 4, 0.0))
    revocation = Revocation("deleted", share_id="s1")
    done = await bus.publish(revocation)
    assert (done.sessions, done.streams) == (3, 7)
    assert done.took_ms >= 0
    assert seen == [revocation]
    undo()
    undo()
    assert (await bus.publish(revocation)).sessions == 1


async def test_nobody_listens() -> None:
    assert (await Bus().publish(Revocation("deleted", share_id="s1"))).streams == 0


async def test_one_that_fails_does_not_spare_the_others_and_is_not_hidden(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus, reached = Bus(), []

    def broken(_: Revocation) -> Revoked:
        raise RuntimeError("boom")

    def works(_: Revocation) -> Revoked:
        reached.append(1)
        return Revoked(1, 1, 0.0)

    bus.subscribe(broken)
    bus.subscribe(works)
    with pytest.raises(RevocationIncomplete) as caught:
        await bus.publish(Revocation("deleted", share_id="s1"))
    assert reached == [1]
    assert caught.value.hint
    assert "boom" in caplog.text
