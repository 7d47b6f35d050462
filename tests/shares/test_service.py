"""Creating, changing and ending shares, and their links."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.engine import Connection
from support.shares import BROWSER, PUBLIC_URL, Clock, World, new, secret_of, world

from guestpass.errors import Conflict, Invalid, InvalidEmail, NotFound, ShareEnded, ShareNotFound
from guestpass.model import Delivery, Revocation, Revoked, Scope, SessionKind, ShareState
from guestpass.shares.bus import RevocationIncomplete
from guestpass.shares.service import LINKS_KEPT
from guestpass.tokens import digest

DAY = 86400.0

NAMES = [
    "Boiler 3, hall \"A\" & 'B' <north>",
    "Übersicht – Straße №5",
    "家計簿、2026年",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "مرحبا \u200fعالم",
    "=cmd|'/C calc'!A0",
    "%s {0} ${x} {{ 7*7 }} \\n",
    "'; DROP TABLE shares; --",
    "x" * 200,
    "👍" * 200,
]

BAD_NAMES = {
    "": "empty",
    "  \t ": "empty",
    "x" * 201: "longer than 200",
    "two\nlines": r"U\+000A",
    "two\rlines": r"U\+000D",
    "Subject\r\nBcc: x@example.org": r"U\+000D",
    "nul\0": r"U\+0000",
    "line\u2028separator": r"U\+2028",
    "\x85next": "U",
    "gpj.\u202eexe": r"U\+202E",
    "isolate \u2066x": r"U\+2066",
    "surrogate \ud800": r"U\+D800",
}


@pytest.mark.parametrize("name", NAMES)
async def test_names_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    async with world(tmp_path) as w:
        made = await w.service.create(new(name=name))
        assert (await w.service.get(made.share.id)).name == name
        assert (await w.service.list()).items[0].name == name
    async with world(tmp_path) as w:
        assert (await w.service.get(made.share.id)).name == name


@pytest.mark.parametrize(("name", "why"), BAD_NAMES.items(), ids=map(ascii, BAD_NAMES))
async def test_names_that_are_refused(w: World, name: str, why: str) -> None:
    if name != "\x85next":  # white space to Python: stripped
        with pytest.raises(Invalid, match=why):
            await w.service.create(new(name=name))
    with pytest.raises(Invalid):
        await w.service.create(new(owner=name + "\x01"))


async def test_create(w: World) -> None:
    made = await w.service.create(
        new(
            "Alice@Example.org",
            "bob@example.org",
            "alice@example.org",
            path="/d/1?from=now",
            scope=(Scope("GET", "/d/**"), Scope("GET", "/d/**")),
            expires=w.clock.at + DAY,
            max_sessions=3,
            message="  Look at\r\nthe second chart.  ",
        )
    )
    share = await w.service.get(made.share.id)
    assert share == made.share
    assert share.name == "dashboards /d/1"  # without the query
    assert share.owner == "Olga Owner"
    assert share.message == "Look at\nthe second chart."
    assert share.scope == (Scope("GET", "/d/**"),)
    assert share.created == w.clock.at
    assert [r.email for r in share.recipients] == ["alice@example.org", "bob@example.org"]
    assert {r.delivery for r in share.recipients} == {Delivery.QUEUED}
    assert list(made.links) == ["alice@example.org", "bob@example.org"]
    assert [m.to for m in await w.queued()] == ["alice@example.org", "bob@example.org"]
    for message in await w.queued():
        assert message.kind == "invitation"
        assert made.links[message.to] in message.text
        assert message.recipient_id in {r.id for r in share.recipients}
    assert w.types() == ["share.created", "recipient.added", "recipient.added"]
    for event in w.happened:
        assert not any(str(value).startswith(("http", "/")) for value in event.detail.values())


async def test_create_without_mail(w: World) -> None:
    made = await w.service.create(new(invite=False))
    assert await w.queued() == []
    assert made.share.recipients[0].delivery is None
    assert secret_of(made.links["alice@example.org"])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"site": "Plant A"}, "'Plant A' is not the name of a site"),
        ({"service": ""}, "not the name of a service"),
        ({"path": "dashboards"}, "must begin with '/'"),
        ({"path": "/a/../b"}, "ambiguous"),
        ({"path": "/x", "scope": (Scope("GET", "/y/**"),)}, "does not admit the share's own path"),
        ({"to": ()}, "needs a recipient"),
        ({"to": [f"a{n}@example.org" for n in range(101)]}, "at most 100 recipients"),
        ({"expires": 1.0}, "in the past"),
        ({"expires": float("nan")}, "in the past"),
        ({"expires": float("inf")}, "would expire after"),
        ({"max_sessions": 0}, "max_sessions"),
        ({"message": "x" * 2001}, "longer than 2000"),
        ({"message": "bell \a"}, r"U\+0007"),
        ({"scope": [Scope("GET", f"/{n}") for n in range(101)]}, "more than 100 rules"),
    ],
)
async def test_create_refuses(w: World, fields: dict[str, object], why: str) -> None:
    with pytest.raises(Invalid, match=why):
        await w.service.create(new(**fields))
    assert (await w.service.list()).items == []
    assert await w.queued() == []
    assert w.happened == []


async def test_a_bad_address_creates_nothing(w: World) -> None:
    with pytest.raises(InvalidEmail, match="nobody"):
        await w.service.create(new("alice@example.org", "nobody"))
    assert (await w.service.list()).items == []


async def test_links_are_kept_as_digests_only(w: World) -> None:
    made = await w.service.create(new(invite=False))
    secret = secret_of(made.links["alice@example.org"])
    session, token = await w.service.create_token(made.share.id, "alice@example.org")
    data = w.store.path.read_bytes()
    assert digest(secret) in data
    assert secret.encode() not in data
    assert token.encode() not in data
    assert session.kind is SessionKind.TOKEN


# ── Idempotency ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_same_key_creates_once(w: World) -> None:
    first = await w.service.create(new(), idempotency_key="k1")
    again = await w.service.create(new(), idempotency_key="k1")
    assert again.repeated
    assert again.share == first.share
    assert not first.repeated
    assert len((await w.service.list()).items) == 1
    assert len(await w.queued()) == 1  # invited once
    assert w.types().count("share.created") == 1
    for made in (first, again):
        share, recipient = await w.service.resolve_link(secret_of(made.links["alice@example.org"]))
        assert (share.id, recipient.email) == (first.share.id, "alice@example.org")


async def test_the_same_key_for_something_else(w: World) -> None:
    await w.service.create(new(), idempotency_key="k1")
    with pytest.raises(Conflict) as caught:
        await w.service.create(new(name="other"), idempotency_key="k1")
    assert caught.value.error_code == "idempotency_key_reused"
    await w.service.create(new(name="other"), idempotency_key="k2")
    assert len((await w.service.list()).items) == 2


async def test_the_request_as_it_came_decides(w: World) -> None:
    """`7d` is another moment a second later, and still the same request."""
    first = await w.service.create(
        new(expires=w.clock.at + DAY), idempotency_key="k", request=b'{"expires":"1d"}'
    )
    w.clock.forward(1)
    again = await w.service.create(
        new(expires=w.clock.at + DAY), idempotency_key="k", request=b'{"expires":"1d"}'
    )
    assert again.share == first.share


async def test_a_key_is_forgotten_after_a_day(w: World) -> None:
    first = await w.service.create(new(), idempotency_key="k1")
    w.clock.forward(DAY)
    assert (await w.service.create(new(name="other"), idempotency_key="k1")).share.id != first.share.id


async def test_the_key_of_a_share_that_ended(w: World) -> None:
    first = await w.service.create(new(), idempotency_key="k1")
    await w.service.delete(first.share.id)
    again = await w.service.create(new(), idempotency_key="k1")
    assert again.share.id == first.share.id
    assert again.share.deleted is not None
    assert again.links == {}


async def test_at_the_same_time(w: World) -> None:
    made = await asyncio.gather(*(w.service.create(new(), idempotency_key="k") for _ in range(8)))
    assert len({m.share.id for m in made}) == 1
    assert [m.repeated for m in made].count(False) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\nb"])
async def test_keys_that_are_refused(w: World, key: str) -> None:
    with pytest.raises(Invalid, match="Idempotency-Key"):
        await w.service.create(new(), idempotency_key=key)


# ── Links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("secret", ["", "x", "é" * 43, "x" * 43, "x" * 10_000, "../../etc/passwd", "\ud800"])
async def test_unknown_links(w: World, secret: str) -> None:
    await w.service.create(new())
    with pytest.raises(ShareNotFound):
        await w.service.resolve_link(secret)


async def test_links_of_ended_shares(w: World) -> None:
    deleted = await w.service.create(new())
    expired = await w.service.create(new(expires=w.clock.at + 10))
    await w.service.delete(deleted.share.id)
    w.clock.forward(10)
    for made in (deleted, expired):
        with pytest.raises(ShareEnded):
            await w.service.resolve_link(secret_of(made.links["alice@example.org"]))


async def test_resend(w: World) -> None:
    made = await w.service.create(new("a@example.org", "b@example.org"))
    link = await w.service.resend(made.share.id, "A@example.org")
    assert link.startswith(f"{PUBLIC_URL}/s/")
    assert link != made.links["a@example.org"]
    waiting = [m for m in await w.queued() if m.to == "a@example.org"]
    assert len(waiting) == 1  # the one that had not gone out is replaced
    assert link in waiting[0].text
    for good in (link, made.links["a@example.org"]):
        assert (await w.service.resolve_link(secret_of(good)))[1].email == "a@example.org"


async def test_new_link_is_not_mailed(w: World) -> None:
    made = await w.service.create(new(invite=False))
    link = await w.service.new_link(made.share.id, "alice@example.org")
    assert await w.queued() == []
    assert (await w.service.resolve_link(secret_of(link)))[0].id == made.share.id


async def test_only_the_newest_links_stay(w: World) -> None:
    made = await w.service.create(new(invite=False))
    links = [await w.service.new_link(made.share.id, "alice@example.org") for _ in range(LINKS_KEPT)]
    with pytest.raises(ShareNotFound):
        await w.service.resolve_link(secret_of(made.links["alice@example.org"]))
    for link in links:
        await w.service.resolve_link(secret_of(link))


async def test_no_link_for_strangers_or_ended_shares(w: World) -> None:
    made = await w.service.create(new())
    with pytest.raises(NotFound, match=r"mallory@example\.org is not a recipient"):
        await w.service.resend(made.share.id, "mallory@example.org")
    with pytest.raises(ShareNotFound):
        await w.service.new_link("s" + "a" * 15, "alice@example.org")
    await w.service.delete(made.share.id)
    for make in (w.service.resend, w.service.new_link):
        with pytest.raises(ShareEnded):
            await make(made.share.id, "alice@example.org")
    assert await w.queued() == []


# ── Lists ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_pages(w: World) -> None:
    ids = []
    for number in range(7):
        ids.append((await w.service.create(new(name=f"share {number}", invite=False))).share.id)
        if number % 3:
            w.clock.forward(1)  # some of the same moment
    found: list[str] = []
    cursor = None
    for expected in (3, 3, 1):
        page = await w.service.list(cursor, 3)
        assert len(page.items) == expected
        found += [share.id for share in page.items]
        cursor = page.next
    assert cursor is None
    assert sorted(found) == sorted(ids)
    created = [(await w.service.get(i)).created for i in found]
    assert created == sorted(created, reverse=True)


async def test_lists_leave_out_what_ended(w: World) -> None:
    active = await w.service.create(new(expires=w.clock.at + 100))
    expired = await w.service.create(new(expires=w.clock.at + 10))
    deleted = await w.service.create(new())
    await w.service.delete(deleted.share.id)
    w.clock.forward(10)
    assert [s.id for s in (await w.service.list()).items] == [active.share.id]
    everything = {s.id: s.state(w.clock.at) for s in (await w.service.list(include_ended=True)).items}
    assert everything == {
        active.share.id: ShareState.ACTIVE,
        expired.share.id: ShareState.EXPIRED,
        deleted.share.id: ShareState.DELETED,
    }


@pytest.mark.parametrize("cursor", ["", "x", "é", "W10", "WzEsMl0", "bnVsbA", "eyJhIjoxfQ", "!" * 50])
async def test_foreign_cursors(w: World, cursor: str) -> None:
    with pytest.raises(Invalid) as caught:
        await w.service.list(cursor)
    assert caught.value.error_code == "cursor_invalid"


async def test_shared_with(w: World) -> None:
    first = await w.service.create(new("alice@example.org", "bob@example.org"))
    w.clock.forward(1)
    second = await w.service.create(new("alice@example.org", expires=w.clock.at + 10))
    await w.service.create(new("carol@example.org"))
    assert [s.id for s in await w.service.shared_with("alice@example.org")] == [
        second.share.id,
        first.share.id,
    ]
    w.clock.forward(10)
    assert [s.id for s in await w.service.shared_with("alice@example.org")] == [first.share.id]
    await w.service.remove_recipient(first.share.id, "alice@example.org", by="alice@example.org")
    assert await w.service.shared_with("alice@example.org") == []
    assert [s.id for s in await w.service.shared_with("bob@example.org")] == [first.share.id]


# ── Changes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_update_changes_what_is_given(w: World) -> None:
    made = await w.service.create(new(name="old", message="old", max_sessions=5, expires=w.clock.at + DAY))
    updated = await w.service.update(made.share.id, name="new, “name”")
    assert updated.share.name == "new, “name”"
    assert updated.share.message == "old"
    assert updated.share.expires == w.clock.at + DAY
    assert updated.share.max_sessions == 5
    assert w.revocations == []
    updated = await w.service.update(made.share.id, message="", expires=None, max_sessions=None, path="/new")
    assert (updated.share.message, updated.share.expires, updated.share.max_sessions) == ("", None, None)
    assert updated.share.path == "/new"
    assert updated.share == await w.service.get(made.share.id)
    assert w.revocations == []  # nobody lost anything
    assert w.types()[-2:] == ["share.updated", "share.updated"]
    await w.service.update(made.share.id, message="")
    assert w.types().count("share.updated") == 2  # nothing changed


@pytest.mark.parametrize(
    "change",
    [
        lambda now: {"expires": now + 10},
        lambda now: {"max_sessions": 4},
        lambda now: {"scope": (Scope("GET", "/**"),)},
    ],
    ids=["expires earlier", "fewer sessions", "other scope"],
)
async def test_what_takes_something_away_cuts_off(
    w: World, change: Callable[[float], dict[str, object]]
) -> None:
    made = await w.service.create(new(max_sessions=5, expires=w.clock.at + DAY))
    session_id, secret = await w.sign_in(made.share.id, "alice@example.org")
    w.grants = Revoked(1, 2, 0.0)
    updated = await w.service.update(made.share.id, **change(w.clock.at))  # type: ignore[arg-type]
    assert w.revocations == [Revocation("share_updated", share_id=made.share.id)]
    assert (updated.revoked.sessions, updated.revoked.streams) == (1, 2)
    found = await w.service.find_session(SessionKind.COOKIE, secret)  # let in again by what holds now
    assert found is not None
    assert found[0].id == session_id


@pytest.mark.parametrize(
    "change", [{"expires": None}, {"max_sessions": 6}, {"max_sessions": None}, {"path": "/y"}]
)
async def test_what_gives_more_cuts_nobody_off(w: World, change: dict[str, object]) -> None:
    made = await w.service.create(new(max_sessions=5, expires=w.clock.at + DAY))
    await w.service.update(made.share.id, **change)  # type: ignore[arg-type]
    assert w.revocations == []


async def test_recipients_are_added_and_removed(w: World) -> None:
    made = await w.service.create(new("a@example.org", "b@example.org"))
    _, secret = await w.sign_in(made.share.id, "b@example.org")
    gone = made.share.recipients[1]
    updated = await w.service.update(
        made.share.id, add=["C@example.org", "a@example.org"], remove=["b@example.org"]
    )
    assert [r.email for r in updated.share.recipients if r.removed is None] == [
        "a@example.org",
        "c@example.org",
    ]
    assert list(updated.links) == ["c@example.org"]
    assert updated.revoked.sessions == 1
    assert w.revocations == [Revocation("recipient_removed", share_id=made.share.id, recipient_id=gone.id)]
    assert [m.to for m in await w.queued()] == ["a@example.org", "c@example.org"]
    for refused in (
        w.service.find_session(SessionKind.COOKIE, secret),
        w.service.resolve_link(secret_of(made.links["b@example.org"])),
    ):
        with pytest.raises(ShareEnded):
            await refused
    assert (await w.service.resolve_link(secret_of(updated.links["c@example.org"])))[
        1
    ].email == "c@example.org"
    # Who comes back is somebody new: the old session and link stay dead.
    back = await w.service.update(made.share.id, add=["b@example.org"])
    assert [r.email for r in back.share.recipients if r.removed is None][-1] == "b@example.org"
    with pytest.raises(ShareEnded):
        await w.service.find_session(SessionKind.COOKIE, secret)


async def test_update_refuses_as_a_whole(w: World) -> None:
    made = await w.service.create(new(name="old"))
    for refused in (
        {"name": "new", "expires": 1.0},
        {"name": "new", "remove": ["stranger@example.org"]},
        {"name": "new", "add": ["nobody"]},
        {"name": "new", "add": ["b@example.org"], "remove": ["B@example.org"]},
        {"name": "new", "scope": (Scope("GET", "/other/**"),)},
        {"name": "new", "add": [f"a{n}@example.org" for n in range(100)]},
        {"name": ""},
    ):
        with pytest.raises((Invalid, NotFound)):
            await w.service.update(made.share.id, **refused)  # type: ignore[arg-type]
        assert await w.service.get(made.share.id) == made.share
    assert w.revocations == []


async def test_an_expired_share_can_be_prolonged_and_a_deleted_one_not(w: World) -> None:
    made = await w.service.create(new(expires=w.clock.at + 10))
    w.clock.forward(20)
    with pytest.raises(ShareEnded):
        await w.service.update(made.share.id, add=["b@example.org"])
    prolonged = await w.service.update(made.share.id, expires=w.clock.at + 10)
    assert prolonged.share.state(w.clock.at) is ShareState.ACTIVE
    await w.service.resolve_link(secret_of(made.links["alice@example.org"]))
    await w.service.delete(made.share.id)
    with pytest.raises(ShareEnded):
        await w.service.update(made.share.id, expires=None)


async def test_remove_the_last_recipient(w: World) -> None:
    made = await w.service.create(new())
    await w.service.remove_recipient(made.share.id, "Alice@example.org")
    assert await w.queued() == []
    with pytest.raises(NotFound):
        await w.service.remove_recipient(made.share.id, "alice@example.org")
    await w.service.delete(made.share.id)
    assert (await w.service.get(made.share.id)).deleted == w.clock.at


# ── Deletion ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_delete(w: World) -> None:
    made = await w.service.create(new("a@example.org", "b@example.org"))
    other = await w.service.create(new("a@example.org"))
    _, cookie = await w.sign_in(made.share.id, "a@example.org")
    _, kept = await w.sign_in(other.share.id, "a@example.org")
    _, unused = await w.service.create_token(made.share.id, "b@example.org")
    _, used = await w.service.create_token(made.share.id, "b@example.org")
    used_id = (await w.service.sessions(made.share.id))[0].id
    found = await w.service.find_session(SessionKind.TOKEN, digest(used))
    assert found is not None
    used_id = found[0].id
    w.service.touch(used_id, w.clock.forward(5))
    w.grants = Revoked(1, 7, 0.0)
    w.revocations.clear()

    revoked = await w.service.delete(made.share.id)
    assert revoked.streams == 7
    assert revoked.sessions == 2  # the cookie and the token that was used
    assert revoked.took_ms > 0
    assert w.revocations == [Revocation("deleted", share_id=made.share.id)]
    assert [m.share_id for m in await w.queued()] == [other.share.id]
    for kind, secret in (
        (SessionKind.COOKIE, cookie),
        (SessionKind.TOKEN, digest(used)),
        (SessionKind.TOKEN, digest(unused)),
    ):
        with pytest.raises(ShareEnded):
            await w.service.find_session(kind, secret)
    with pytest.raises(ShareEnded):
        await w.service.open_session(
            made.share.id, "a@example.org", SessionKind.COOKIE, "email-code", BROWSER
        )
    assert await w.service.sessions(made.share.id) == []
    assert await w.service.find_session(SessionKind.COOKIE, kept) is not None

    w.grants = Revoked(0, 0, 0.0)
    again = await w.service.delete(made.share.id)
    assert (again.sessions, again.streams) == (0, 0)
    assert w.types().count("share.deleted") == 1
    assert (await w.service.get(made.share.id)).deleted is not None


async def test_delete_is_on_disk_before_anybody_hears_of_it(w: World) -> None:
    made = await w.service.create(new())
    seen: list[bytes] = []

    def handler(revocation: Revocation) -> Revoked:
        import sqlite3

        other = sqlite3.connect(w.store.path)
        seen.extend(row[0] for row in other.execute("SELECT deleted FROM shares"))
        other.close()
        return Revoked(0, 0, 0.0)

    w.bus.subscribe(handler)
    await w.service.delete(made.share.id)
    assert seen == [w.clock.at]


async def test_a_caller_who_goes_away_does_not_stop_a_deletion(w: World) -> None:
    """The API's handler is cancelled when its client hangs up: between commit and publication nothing may stop."""
    made = await w.service.create(new())
    inside, go_on = threading.Event(), threading.Event()

    def slow(db: Connection) -> None:
        inside.set()
        go_on.wait(10)

    blocker = asyncio.create_task(w.store.write(slow))
    await asyncio.to_thread(inside.wait, 10)
    caller = asyncio.create_task(w.service.delete(made.share.id))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go_on.set()
    await blocker
    await w.service.close()
    assert w.revocations == [Revocation("deleted", share_id=made.share.id)]
    assert (await w.service.get(made.share.id)).deleted is not None


async def test_a_deletion_that_was_not_acknowledged_everywhere_can_be_repeated(w: World) -> None:
    made = await w.service.create(new())

    def broken(revocation: Revocation) -> Revoked:
        raise RuntimeError("boom")

    undo = w.bus.subscribe(broken)
    with pytest.raises(RevocationIncomplete):
        await w.service.delete(made.share.id)
    undo()
    await w.service.delete(made.share.id)
    assert w.revocations == [Revocation("deleted", share_id=made.share.id)] * 2


async def test_delete_what_is_not_there(w: World) -> None:
    with pytest.raises(ShareNotFound, match="there is no share nothing"):
        await w.service.delete("nothing")
    assert w.revocations == []


# ── Restart ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    async with world(tmp_path, clock) as w:
        kept = await w.service.create(new(scope=(Scope("GET", "/**"),), max_sessions=2, message="hello"))
        gone = await w.service.create(new())
        _, cookie = await w.sign_in(kept.share.id, "alice@example.org")
        await w.service.delete(gone.share.id)
        before = await w.service.get(kept.share.id)
    async with world(tmp_path, clock) as w:
        assert await w.service.get(kept.share.id) == before
        assert before.recipients[0].first_opened == clock.at
        found = await w.service.find_session(SessionKind.COOKIE, cookie)
        assert found is not None
        assert (await w.service.resolve_link(secret_of(kept.links["alice@example.org"])))[0] == before
        with pytest.raises(ShareEnded):
            await w.service.resolve_link(secret_of(gone.links["alice@example.org"]))
        assert len(await w.queued()) == 1
