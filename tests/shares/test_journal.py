"""A restored backup brings nothing back that was revoked: the journal beside the database knows of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.shares import BROWSER, Clock, new, world

from guestpass.errors import GuestpassError, StoreError
from guestpass.model import Revocation, Scope, SessionKind, ShareState
from guestpass.shares.store import Store, journal, sessions, shares

KEY = bytes(range(32))


def restore(folder: Path, backup: Path) -> None:
    shutil.copy(backup, folder / "edge.db")


async def refused(folder: Path) -> StoreError:
    with pytest.raises(StoreError) as caught:
        await Store.open(folder / "edge.db")
    assert caught.value.error_code == "store_older"
    return caught.value


async def test_a_backup_is_not_served_until_an_operator_says_so(tmp_path: Path) -> None:
    clock, backup = Clock(), tmp_path / "backup"
    async with world(tmp_path, clock) as w:
        deleted = (await w.service.create(new())).share.id
        kept = (await w.service.create(new("alice@example.org", "bob@example.org"))).share.id
        narrowed = (await w.service.create(new())).share.id
        ended, _ = await w.sign_in(kept, "alice@example.org")
        removed, _ = await w.sign_in(kept, "bob@example.org")
        token = await w.service.create_join_token("plant-a")
        await w.service.enroll(token, "gw-1", KEY)
    shutil.copy(tmp_path / "edge.db", backup)
    clock.forward(60)
    async with world(tmp_path, clock) as w:
        await w.service.delete(deleted)
        await w.service.end_session(ended)
        await w.service.remove_recipient(kept, "bob@example.org")
        await w.service.remove_gateway("plant-a", "gw-1")
        await w.service.update(narrowed, path="/x", scope=[Scope("GET", "/x/**")], expires=clock() + 3600)
    restore(tmp_path, backup)

    error = await refused(tmp_path)
    assert "5 revoked since" in error.message
    assert f"share {deleted} (deleted, 2026-08-01T12:01:00.000Z)" in error.message
    assert "--restored" in error.hint
    await refused(tmp_path)  # nothing was changed by asking

    store = await Store.open(tmp_path / "edge.db", restored=True)
    found = await store.read(lambda db: [shares.get(db, i) for i in (deleted, kept, narrowed)])
    live = await store.read(lambda db: [sessions.get(db, i) for i in (ended, removed)])
    await store.close()
    assert [share.state(clock()) for share in found if share] == [
        ShareState.DELETED,
        ShareState.ACTIVE,
        ShareState.ACTIVE,
    ]
    assert found[1] is not None
    assert found[1].recipient("bob@example.org") is None
    assert found[1].recipient("alice@example.org") is not None
    assert found[2] is not None
    assert found[2].scope == (Scope("GET", "/x/**"),)
    assert found[2].expires == clock() + 3600
    assert all(session is not None and session.ended is not None for session in live)
    async with world(tmp_path, clock) as w:  # once is enough
        assert await w.service.find_gateway("plant-a", "gw-1") is None
        with pytest.raises(GuestpassError):
            await w.service.open_session(
                deleted, "alice@example.org", SessionKind.COOKIE, "email-code", BROWSER
            )


async def test_the_usual_start(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        share = (await w.service.create(new())).share.id
        await w.service.delete(share)
        await w.service.delete(share)
    async with world(tmp_path) as w:
        assert (await w.service.get(share)).deleted is not None
    lines = (tmp_path / "edge.db.revocations").read_bytes().splitlines()
    assert [journal.Entry.read(line).revocation for line in lines] == [
        Revocation("deleted", share_id=share)
    ] * 2


async def test_a_crash_between_commit_and_line_is_no_older_database(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        share = (await w.service.create(new())).share.id
        await w.store.write(lambda db: shares.delete(db, share, w.clock()), revoking=True)
    async with world(tmp_path) as w:
        assert (await w.service.get(share)).deleted is not None


async def test_a_line_that_was_cut_off_was_never_acknowledged(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        first = (await w.service.create(new())).share.id
        await w.service.delete(first)
    path = tmp_path / "edge.db.revocations"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    async with world(tmp_path) as w:
        second = (await w.service.create(new())).share.id
        await w.service.delete(second)
    assert [journal.Entry.read(line).revocation.share_id for line in path.read_bytes().splitlines()] == [
        first,
        second,
    ]


async def test_a_damaged_journal_stops_the_start(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.service.delete((await w.service.create(new())).share.id)
    path = tmp_path / "edge.db.revocations"
    path.write_bytes(b"garbage\n" + path.read_bytes())
    with pytest.raises(StoreError, match=r"edge\.db\.revocations, line 1"):
        await Store.open(tmp_path / "edge.db")


async def test_a_new_database_beside_an_old_journal(tmp_path: Path) -> None:
    """There is nothing in it that could come back, and what it revokes later is known."""
    async with world(tmp_path) as w:
        await w.service.delete((await w.service.create(new())).share.id)
    (tmp_path / "edge.db").unlink()
    async with world(tmp_path) as w:
        share = (await w.service.create(new())).share.id
    shutil.copy(tmp_path / "edge.db", tmp_path / "backup")
    async with world(tmp_path) as w:
        await w.service.delete(share)
    restore(tmp_path, tmp_path / "backup")
    await refused(tmp_path)


async def test_the_journal_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LINES_KEPT", 3)
    async with world(tmp_path) as w:
        share = (await w.service.create(new())).share.id
        for _ in range(5):
            await w.service.delete(share)
    async with world(tmp_path):
        pass
    lines = (tmp_path / "edge.db.revocations").read_bytes().splitlines()
    assert [journal.Entry.read(line).epoch for line in lines] == [3, 4, 5]


async def test_a_revocation_that_the_journal_cannot_take_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as w:
        share = (await w.service.create(new())).share.id

        def full(_: journal.Journal, added: object) -> None:
            raise StoreError("edge.db.revocations: No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(journal.Journal, "append", full)
            with pytest.raises(StoreError, match="No space"):
                await w.service.delete(share)
        # ended all the same, and repeating it completes it
        assert w.revocations == [Revocation("deleted", share_id=share)]
        await w.service.delete(share)
    assert (tmp_path / "edge.db.revocations").read_bytes().count(b"\n") == 1
