from __future__ import annotations

from pathlib import Path

import pytest
from support.shares import BROWSER, Clock, World, new, world

from guestpass.errors import Invalid, NotFound, ShareEnded, ShareNotFound
from guestpass.model import Revocation, SessionKind
from guestpass.plugin import Client
from guestpass.shares.service import COOKIE_LIFETIME, SEEN_SECONDS
from guestpass.tokens import BEARER_PREFIX, digest

DAY = 86400.0


async def test_open_and_find(w: World) -> None:
    made = await w.service.create(new())
    session, secret = await w.service.open_session(
        made.share.id, "alice@example.org", SessionKind.COOKIE, "email-code", BROWSER
    )
    assert session.expires == w.clock.at + COOKIE_LIFETIME
    assert session.client == "203.0.113.7 Mozilla/5.0"
    found = await w.service.find_session(SessionKind.COOKIE, digest(secret))
    assert found is not None
    assert found[0] == session
    assert found[1].id == made.share.id
    assert found[2].email == "alice@example.org"
    assert found[2].first_opened == found[2].last_opened == w.clock.at
    event = w.happened[-1]
    assert (event.type, event.actor, event.session_id) == ("share.opened", "alice@example.org", session.id)
    # The secret of a cookie is nothing as a token.
    assert await w.service.find_session(SessionKind.TOKEN, digest(secret)) is None
    assert await w.service.find_session(SessionKind.COOKIE, digest(session.id)) is None


async def test_first_and_last_opening(w: World) -> None:
    made = await w.service.create(new())
    await w.sign_in(made.share.id, "alice@example.org")
    first = w.clock.at
    await w.sign_in(made.share.id, "alice@example.org")
    w.clock.forward(60)
    await w.sign_in(made.share.id, "alice@example.org")
    recipient = (await w.service.get(made.share.id)).recipients[0]
    assert (recipient.first_opened, recipient.last_opened) == (first, first + 60)
    assert len({s.id for s in await w.service.sessions(made.share.id)}) == 3


async def test_tokens(w: World) -> None:
    made = await w.service.create(new(expires=w.clock.at + DAY))
    session, token = await w.service.create_token(made.share.id, "Alice@example.org", w.clock.at + 60)
    forever, other = await w.service.create_token(made.share.id, "alice@example.org")
    assert token.startswith(BEARER_PREFIX)
    assert token != other
    assert session.expires == w.clock.at + 60
    assert forever.expires == w.clock.at + DAY  # as long as the share
    assert (await w.service.get(made.share.id)).recipients[0].first_opened is None  # nobody opened anything
    assert w.types()[-1] == "token.created"
    w.clock.forward(60)
    assert await w.service.find_session(SessionKind.TOKEN, digest(token)) is None
    assert await w.service.find_session(SessionKind.TOKEN, digest(other)) is not None
    with pytest.raises(Invalid, match="in the past"):
        await w.service.create_token(made.share.id, "alice@example.org", w.clock.at)
    with pytest.raises(NotFound):
        await w.service.create_token(made.share.id, "mallory@example.org")


async def test_no_session_for_strangers_and_ended_shares(w: World) -> None:
    made = await w.service.create(new(expires=w.clock.at + 10))
    with pytest.raises(NotFound):
        await w.sign_in(made.share.id, "mallory@example.org")
    with pytest.raises(ShareNotFound):
        await w.sign_in("s000", "alice@example.org")
    w.clock.forward(10)
    with pytest.raises(ShareEnded):
        await w.sign_in(made.share.id, "alice@example.org")
    assert await w.service.sessions() == []


async def test_no_session_outlives_its_share(w: World) -> None:
    made = await w.service.create(new(expires=w.clock.at + 10))
    _, cookie = await w.sign_in(made.share.id, "alice@example.org")
    found = await w.service.find_session(SessionKind.COOKIE, cookie)
    assert found is not None
    assert found[0].expires == w.clock.at + 10
    await w.service.update(made.share.id, expires=w.clock.at + 20)
    w.clock.forward(15)
    found = await w.service.find_session(
        SessionKind.COOKIE, cookie
    )  # the share was prolonged, and the session with it
    assert found is not None
    assert found[0].expires == w.clock.at + 5
    w.clock.forward(5)
    with pytest.raises(ShareEnded):
        await w.service.find_session(SessionKind.COOKIE, cookie)


async def test_an_expired_cookie_is_nothing(w: World) -> None:
    made = await w.service.create(new())
    _, cookie = await w.sign_in(made.share.id, "alice@example.org")
    w.clock.forward(COOKIE_LIFETIME)
    assert await w.service.find_session(SessionKind.COOKIE, cookie) is None
    assert await w.service.sessions(live=True) == []
    assert len(await w.service.sessions(live=False)) == 1


async def test_end_session(w: World) -> None:
    made = await w.service.create(new())
    ended, cookie = await w.sign_in(made.share.id, "alice@example.org")
    _, kept = await w.sign_in(made.share.id, "alice@example.org")
    revoked = await w.service.end_session(ended, "signed_out")
    assert revoked.sessions == 1
    assert w.revocations == [Revocation("signed_out", share_id=made.share.id, session_id=ended)]
    assert await w.service.find_session(SessionKind.COOKIE, cookie) is None
    assert await w.service.find_session(SessionKind.COOKIE, kept) is not None
    assert (await w.service.end_session(ended)).sessions == 0
    assert w.types().count("session.ended") == 1
    assert (await w.service.get_session(ended)).ended == w.clock.at
    with pytest.raises(NotFound, match="no session x"):
        await w.service.end_session("x")


async def test_lists(w: World) -> None:
    one = await w.service.create(new())
    two = await w.service.create(new())
    ids = []
    for share in (one, two, one):
        ids.append((await w.sign_in(share.share.id, "alice@example.org"))[0])
        w.clock.forward(1)
    assert [s.id for s in await w.service.sessions()] == ids[::-1]
    assert [s.id for s in await w.service.sessions(one.share.id)] == [ids[2], ids[0]]
    first = await w.service.list_sessions(None, 2)
    assert [s.id for s in first.items] == [ids[2], ids[1]]
    rest = await w.service.list_sessions(first.next, 2)
    assert [s.id for s in rest.items] == [ids[0]]
    assert rest.next is None
    await w.service.delete(one.share.id)
    assert [s.id for s in await w.service.sessions()] == [ids[1]]
    assert len(await w.service.sessions(live=False)) == 3


async def test_touch_is_written_together_and_known_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, writes = Clock(), 0
    async with world(tmp_path, clock) as w:
        made = await w.service.create(new())
        session_id, cookie = await w.sign_in(made.share.id, "alice@example.org")
        real = w.store.write

        async def counted(work):  # type: ignore[no-untyped-def]
            nonlocal writes
            writes += 1
            return await real(work)

        monkeypatch.setattr(w.store, "write", counted)
        for _ in range(100):
            w.service.touch(session_id, clock.forward(0.5))
        w.service.touch("unknown", clock.at)
        found = await w.service.find_session(SessionKind.COOKIE, cookie)
        assert found is not None
        assert found[0].last_seen == clock.at
        assert (await w.service.sessions())[0].last_seen == clock.at
        assert writes == 0
        assert SEEN_SECONDS == 60
    assert writes == 1  # closing writes what was held back
    async with world(tmp_path, clock) as w:
        assert (await w.service.sessions())[0].last_seen == clock.at


async def test_what_is_seen_is_written_by_and_by(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guestpass.shares.service.SEEN_SECONDS", 0.0)
    made = await w.service.create(new())
    session_id, _ = await w.sign_in(made.share.id, "alice@example.org")
    w.service.touch(session_id, w.clock.forward(30))
    import asyncio

    async with asyncio.timeout(5):
        while w.service._sessions_seen:
            await asyncio.sleep(0.01)
    assert (await w.service.get_session(session_id)).last_seen == w.clock.at


async def test_hostile_user_agents_are_made_fit_to_show(w: World) -> None:
    made = await w.service.create(new())
    client = Client("203.0.113.7", "x\r\nSet-Cookie: a\x1b[2J" + "y" * 5000)
    session, _ = await w.service.open_session(
        made.share.id, "alice@example.org", SessionKind.COOKIE, "email-code", client
    )
    assert session.client.isprintable()
    assert len(session.client) <= 250


async def test_old_sessions_are_swept(w: World) -> None:
    made = await w.service.create(new())
    ended, _ = await w.sign_in(made.share.id, "alice@example.org")
    await w.service.end_session(ended)
    w.clock.forward(29 * DAY)
    await w.service.sweep()
    assert len(await w.service.sessions(live=False)) == 1
    w.clock.forward(2 * DAY)
    await w.service.sweep()
    assert await w.service.sessions(live=False) == []


async def test_idle_sessions(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest idle first; those of browsers are not hidden behind tokens, however many have slept for long."""
    monkeypatch.setattr("guestpass.shares.service.MAX_IDLE", 2)
    made = await w.service.create(new())
    tokens = [(await w.service.create_token(made.share.id, "alice@example.org"))[0].id for _ in range(3)]
    w.clock.forward(10)
    first, _ = await w.sign_in(made.share.id, "alice@example.org")
    w.clock.forward(10)
    second, _ = await w.sign_in(made.share.id, "alice@example.org")
    w.clock.forward(100)
    third, _ = await w.sign_in(made.share.id, "alice@example.org")

    async def idle(seconds: float, **more: bool) -> list[str]:
        return [s.id for s in await w.service.idle_sessions(w.clock.at - seconds, **more)]

    assert await idle(50) == [first, second]
    assert await idle(105) == [first]
    assert set(await idle(50, tokens=True)) < set(tokens)
    w.service.touch(first, w.clock.at)  # not written yet
    assert await idle(50) == [second]
    await w.service.end_session(second)
    assert await idle(50) == []
    assert third
