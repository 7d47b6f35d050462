"""`share-state`, `random` and `bearer-token` on their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from support.people import ALICE, BOB, plugin

from guestpass.model import Candidate, Identity, Recipient, Session, SessionKind, Share
from guestpass.plugin import Choice, Client, Denied, RequestContext, settled
from guestpass_plugins.authenticate.bearer_token import BearerToken
from guestpass_plugins.choose.random import Random
from guestpass_plugins.revoke.share_state import ShareState

NOW = 1000.0
SHARE = Share(
    "s1", "n", "plant", "dash", "/", (), "o", "", 0.0, None, None, None, (Recipient("r1", "s1", ALICE),)
)
SESSION = Session("e1", "s1", "r1", ALICE, SessionKind.COOKIE, "email-code", 500.0, 500.0, None, "c")


class Host:
    """What these three ask of the edge."""

    def __init__(self, sessions: Sequence[Session] = (), token: str = "") -> None:
        self.sessions = sessions
        self.token = token

    def now(self) -> float:
        return NOW

    async def live_sessions(self, share_id: str) -> Sequence[Session]:
        return self.sessions

    async def resolve_token(self, token: str) -> Identity | None:
        return Identity(ALICE, "bearer-token") if token == self.token else None


async def reason(
    share: Share = SHARE, session: Session = SESSION, others: Sequence[Session] = ()
) -> str | None:
    revoker = plugin(ShareState, "share-state")
    assert isinstance(revoker, ShareState)
    revoker.host = Host([session, *others])  # type: ignore[assignment]
    found = await settled(revoker.check(share, session))
    return None if found is None else found.reason


@pytest.mark.parametrize(
    ("share", "session", "expected"),
    [
        ({}, {}, None),
        ({"expires": NOW + 1}, {"expires": NOW + 1}, None),
        ({"deleted": 999.0}, {}, "deleted"),
        ({"expires": NOW}, {}, "expired"),
        ({"recipients": ()}, {}, "recipient_removed"),
        ({"recipients": (Recipient("r1", "s1", ALICE, removed=999.0),)}, {}, "recipient_removed"),
        ({"recipients": (Recipient("r2", "s1", ALICE),)}, {}, "recipient_removed"),  # removed, invited again
        ({}, {"email": BOB}, "recipient_removed"),
        ({}, {"ended": 999.0}, "session_ended"),
        ({}, {"expires": NOW}, "session_expired"),
    ],
)
async def test_states(share: dict[str, Any], session: dict[str, Any], expected: str | None) -> None:
    found = await reason(dataclasses.replace(SHARE, **share), dataclasses.replace(SESSION, **session))
    assert found == expected


def other(name: str, created: float, used: bool = True, **more: Any) -> Session:
    seen = created + used
    return dataclasses.replace(SESSION, id=name, created=created, last_seen=seen, **more)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], None),
        ([other("a", 400.0)], None),
        ([other("a", 400.0), other("b", 401.0)], "max_sessions"),
        ([other("a", 600.0), other("b", 601.0)], None),  # who came later does not put out who was first
        ([other("a", 500.0), other("b", 500.0)], "max_sessions"),  # at the same moment: by id
        ([other("x", 500.0), other("y", 500.0)], None),
        ([other("a", 400.0), other("t", 401.0, used=False, kind=SessionKind.TOKEN)], None),  # never used
    ],
)
async def test_two_at_a_time(others: list[Session], expected: str | None) -> None:
    assert await reason(dataclasses.replace(SHARE, max_sessions=2), SESSION, others) == expected


async def test_a_token_that_is_used_counts() -> None:
    used = other("t", 401.0, kind=SessionKind.TOKEN)
    assert await reason(dataclasses.replace(SHARE, max_sessions=1), SESSION, [used]) == "max_sessions"


@pytest.mark.parametrize(("age", "expected"), [(59, "max_sessions"), (61, None)])
async def test_a_session_whose_cookie_never_arrived_gives_its_place_back(
    age: float, expected: str | None
) -> None:
    lost = other("a", NOW - age, used=False)
    late = dataclasses.replace(SESSION, created=NOW)
    assert await reason(dataclasses.replace(SHARE, max_sessions=1), late, [lost]) == expected


async def test_every_gateway_has_the_same_chance() -> None:
    chooser = plugin(Random, "random")
    assert isinstance(chooser, Random)
    candidates = [Candidate("plant", name, streams=n) for n, name in enumerate("abcd")]
    counts = {c.name: 0 for c in candidates}
    for _ in range(4000):
        counts[(chooser.choose(Choice(SHARE, SESSION, candidates))).name] += 1
    # Four standard deviations (27.4) from 1000: once in 8,000 runs.
    assert all(abs(n - 1000) < 110 for n in counts.values()), counts


TOKEN = "gp_" + "t" * 43


async def identify(*headers: tuple[str, str]) -> Identity | None:
    way = plugin(BearerToken, "bearer-token")
    assert isinstance(way, BearerToken)
    way.host = Host(token=TOKEN)  # type: ignore[assignment]
    return await way.identify(RequestContext("GET", "/", headers, Client("c"), SHARE, None, NOW))


@pytest.mark.parametrize("value", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER   {TOKEN}"])
async def test_a_token_of_ours(value: str) -> None:
    found = await identify(("Accept", "*/*"), ("authorization", value))
    assert found is not None
    assert found.email == ALICE


@pytest.mark.parametrize("value", ["", "Bearer ghp_x", "Basic Z3BfeDp5", f"Token {TOKEN}", TOKEN])
async def test_what_is_none_of_ours_is_passed_by(value: str) -> None:
    assert await identify(("Authorization", value)) is None
    assert await identify() is None


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", f"Bearer {TOKEN}x")],
        [("Authorization", "Bearer gp_short")],
        [("Authorization", f"Bearer {TOKEN} more")],
        [("Authorization", f"Bearer {TOKEN}"), ("Authorization", f"Bearer {TOKEN}")],
        [("Authorization", "Basic eDp5"), ("Authorization", f"Bearer {TOKEN}")],
    ],
)
async def test_a_wrong_token_of_ours_is_refused(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(Denied):
        await identify(*headers)
