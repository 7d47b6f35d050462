"""The grant table: look-up for one share only, expiry, revocation by each index, races with the store's answer."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass, field

import pytest

from guestpass.edge.grants import IDLE_SECONDS, Grant, GrantTable
from guestpass.model import Revocation, Session, SessionKind, Share


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Stream:
    grant: Grant
    ended: list[str] = field(default_factory=list)

    def end(self, reason: str) -> None:
        self.ended.append(reason)


def make(
    n: int,
    *,
    share: str = "s1",
    recipient: str = "r1",
    gateway: str | None = "g1",
    expires: float | None = None,
) -> Grant:
    session = Session(
        f"session{n}", share, recipient, "a@x.org", SessionKind.COOKIE, "email-code", 0, 0, None, ""
    )
    about = Share(share, "name", "plant", "dash", "/", (), "owner", "", 0, None, None)
    return Grant(SessionKind.COOKIE, b"%032d" % n, about, session, gateway, expires)


def with_stream(table: GrantTable, grant: Grant) -> Stream:
    assert table.add(grant, table.generation)
    stream = Stream(grant)
    grant.streams.add(stream)
    return stream


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> GrantTable:
    return GrantTable(now=clock)


def find(table: GrantTable, grant: Grant, share: str | None = None) -> Grant | None:
    return table.get(grant.kind, grant.digest, share or grant.share.id)


def test_a_grant_is_good_for_its_share_and_kind_only(table: GrantTable) -> None:
    grant = make(1)
    table.add(grant, table.generation)
    assert find(table, grant) is grant
    assert find(table, grant, "s2") is None
    assert table.get(SessionKind.TOKEN, grant.digest, "s1") is None


@pytest.mark.parametrize(
    ("revocation", "ended"),
    [
        (Revocation("x", share_id="s1"), {1, 2, 3}),
        (Revocation("x", recipient_id="r2"), {2, 4}),
        (Revocation("x", session_id="session3"), {3}),
        (Revocation("x", gateway=("plant", "g2")), {3, 4}),
        (Revocation("x", gateway=("other", "g2")), set()),
        (Revocation("x", site="plant"), {1, 2, 3, 4}),
        (Revocation("x", share_id="s1", recipient_id="r2"), {2}),
        (Revocation("x", share_id="s9"), set()),
    ],
)
def test_revocation_ends_what_matches_and_nothing_else(
    table: GrantTable, revocation: Revocation, ended: set[int]
) -> None:
    grants = {
        1: make(1),
        2: make(2, recipient="r2"),
        3: make(3, gateway="g2"),
        4: make(4, share="s2", recipient="r2", gateway="g2"),
    }
    streams = {n: [with_stream(table, g), Stream(g)] for n, g in grants.items()}
    for n, pair in streams.items():
        grants[n].streams.add(pair[1])
    result = table.revoke(revocation)
    assert (result.sessions, result.streams) == (len(ended), 2 * len(ended))
    for n, pair in streams.items():
        assert [s.ended for s in pair] == [["x"]] * 2 if n in ended else [[], []]
        assert (find(table, grants[n]) is None) == (n in ended)
    assert table.revoke(revocation).streams == 0


def test_a_revocation_that_names_nothing_is_a_mistake(table: GrantTable) -> None:
    with pytest.raises(ValueError, match="names nothing"):
        table.revoke(Revocation("x"))


def test_an_answer_from_before_a_revocation_is_not_put_in_force(table: GrantTable) -> None:
    before = table.generation
    table.revoke(Revocation("deleted", share_id="s1"))
    grant = make(1)
    assert not table.add(grant, before)
    assert find(table, grant) is None
    assert table.add(grant, table.generation)


def test_a_rebuilt_grant_takes_over_what_is_open(table: GrantTable) -> None:
    stream = with_stream(table, make(1))
    rebuilt = make(1, gateway="g2")
    table.add(rebuilt, table.generation)
    assert stream.grant is rebuilt
    assert len(table) == 1
    assert table.revoke(Revocation("x", gateway=("plant", "g1"))).sessions == 0
    assert table.revoke(Revocation("x", share_id="s1")).streams == 1


def test_move_changes_the_gateway_that_ends_it(table: GrantTable) -> None:
    grant = make(1)
    with_stream(table, grant)
    table.move(grant, "g2")
    assert table.revoke(Revocation("x", gateway=("plant", "g1"))).streams == 0
    assert table.revoke(Revocation("x", gateway=("plant", "g2"))).streams == 1


class Rest:
    """The end of a response."""

    def __init__(self, grant: Grant, *, sent: bool = False) -> None:
        self.grant = grant
        self.sent = sent
        self.asked = 0
        grant.tails[self] = self

    def cut(self) -> bool:
        self.asked += 1
        return not self.sent


def test_what_is_still_on_its_way_is_cut(table: GrantTable) -> None:
    grant, other = make(1), make(2)
    with_stream(table, grant)
    table.add(other, table.generation)
    rest, sent, others = Rest(grant), Rest(grant, sent=True), Rest(other)
    again = make(1)
    table.add(again, table.generation)
    assert rest.grant is again, "a grant that is made again takes them over"
    assert table.revoke(Revocation("x", session_id=grant.session.id)).streams == 2
    assert (rest.asked, sent.asked, others.asked) == (1, 1, 0)
    assert not again.tails
    assert table.end_all("edge_stopping", tails=False) == 0
    assert others.asked == 0, "a drain lets it arrive"


async def test_expiry_ends_live_streams_without_a_request(clock: Clock, table: GrantTable) -> None:
    grant = make(1, expires=clock.now + 0.05)
    stream = with_stream(table, grant)
    clock.now += 0.06
    async with asyncio.timeout(5):
        while not stream.ended:
            await asyncio.sleep(0.01)
    assert stream.ended == ["expired"]
    assert len(table) == 0


async def test_a_share_that_was_prolonged_goes_on(clock: Clock, table: GrantTable) -> None:
    grant, other = make(1, expires=clock.now + 0.02), make(2, expires=clock.now + 3600)
    stream, _ = with_stream(table, grant), with_stream(table, other)
    generation = table.generation
    share = dataclasses.replace(grant.share, name="new", expires=clock.now + 0.1)
    session = dataclasses.replace(grant.session, expires=None)
    table.renew(share, {session.id: session})
    clock.now += 0.05
    await asyncio.sleep(0.05)
    assert not stream.ended
    assert find(table, grant) is grant
    assert (grant.share.name, grant.expires) == ("new", share.expires)
    assert other.share.name != "new", "not among the live sessions"
    assert not table.add(make(3), generation), "who asked before heard of the share as it was"
    clock.now += 1
    async with asyncio.timeout(5):
        while not stream.ended:
            await asyncio.sleep(0.01)
    assert stream.ended == ["expired"]


async def test_a_clock_that_was_set_back_only_delays_expiry(clock: Clock, table: GrantTable) -> None:
    grant = make(1, expires=clock.now + 0.02)
    stream = with_stream(table, grant)
    clock.now -= 3600
    await asyncio.sleep(0.05)
    assert not stream.ended
    clock.now += 7200
    assert find(table, grant) is None
    assert stream.ended == ["expired"]


def test_idle_grants_are_swept_and_busy_ones_stay(clock: Clock, table: GrantTable) -> None:
    idle, busy = make(1), make(2)
    table.add(idle, table.generation)
    with_stream(table, busy)
    clock.now += IDLE_SECONDS + 1
    assert table.sweep() == 1
    assert find(table, idle) is None
    assert find(table, busy) is busy


def test_sessions_of_a_share_have_it_in_common(table: GrantTable) -> None:
    """Its recipients may be a hundred. But not as it was, or will be, for others."""
    one, two, other = make(1), make(2), make(3, share="s2")
    changed = make(4)
    changed.share = dataclasses.replace(one.share, name="new")
    for grant in (one, two, other, changed):
        assert table.add(grant, table.generation)
    assert one.share is two.share
    assert (other.share.id, changed.share.name) == ("s2", "new")


def test_counts(clock: Clock, table: GrantTable) -> None:
    for n in range(3):
        with_stream(table, make(n))
    clock.now += 61
    assert table.sessions("s1") == 3
    assert table.streams("s1") == table.all_streams == 3
    assert table.session_streams("session1") == 1
    assert table.end_all("edge_stopping") == 3
    assert table.sessions("s1") == table.all_streams == len(table) == 0


def test_indexes_leave_nothing_behind(table: GrantTable) -> None:
    for n in range(100):
        with_stream(table, make(n, share=f"s{n}", recipient=f"r{n}", gateway=f"g{n}"))
    table.revoke(Revocation("x", site="plant"))
    left = {name: value for name, value in vars(table).items() if isinstance(value, dict) and value}
    assert left == {}


def test_use_is_reported(clock: Clock) -> None:
    seen: list[tuple[str, float]] = []
    table = GrantTable(now=clock, touched=lambda session, at: seen.append((session, at)))
    grant = make(1)
    table.add(grant, table.generation)
    find(table, grant)
    assert seen == [("session1", clock.now)]
    assert dataclasses.asdict(grant.session)["id"] == "session1"
