"""The file, its lock, its settings, its migrations, its errors."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.engine import Connection

from guestpass.errors import StoreError
from guestpass.shares.store import Store, entries
from guestpass.shares.store.database import MIGRATIONS
from guestpass.shares.store.schema import REVISION, VERSION_TABLE, metadata


async def put(store: Store, key: str) -> None:
    await store.write(lambda db: entries.put(db, "test", key, b"1", None))


async def value(store: Store, key: str) -> object:
    return await store.read(lambda db: entries.get(db, "test", key, 0.0))


async def test_settings_make_an_acknowledged_write_durable(tmp_path: Path) -> None:
    async with await Store.open(tmp_path / "edge.db") as store:
        found = {
            name: await store.read(lambda db, name=name: db.execute(text(f"PRAGMA {name}")).scalar())  # type: ignore[misc]
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "secure_delete")
        }
    assert found == {
        "journal_mode": "delete",
        "synchronous": 3,  # EXTRA
        "foreign_keys": 1,
        "busy_timeout": 5000,
        "secure_delete": 1,
    }


async def test_files_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with await Store.open(tmp_path / "edge.db"):
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"edge.db": 0o600, "edge.db.lock": 0o600, "edge.db.revocations": 0o600}


async def test_a_file_that_others_could_read_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "edge.db"
    path.touch(mode=0o644)
    async with await Store.open(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_what_work_raises_undoes_it(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def work(db: Connection) -> None:
        entries.put(db, "test", "half", b"1", None)
        raise Stop

    async with await Store.open(tmp_path / "edge.db") as store:
        await put(store, "whole")
        with pytest.raises(Stop):
            await store.write(work)
        assert await value(store, "half") is None
        assert await value(store, "whole") == 1


async def test_a_second_edge_hears_who_holds_the_store(tmp_path: Path) -> None:
    path = tmp_path / "edge.db"
    async with await Store.open(path) as store:
        with pytest.raises(StoreError) as caught:
            await Store.open(path)
        assert str(path) in caught.value.message
        assert f"process {os.getpid()}" in caught.value.message
        assert caught.value.error_code == "store_locked"
        assert "`state`" in caught.value.hint
        await put(store, "still mine")
    async with await Store.open(path) as store:
        assert await value(store, "still mine") == 1


async def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "edge.db"
    program = """
import asyncio, sys
from pathlib import Path
from guestpass.shares.store import Store
async def main():
    await Store.open(Path(sys.argv[1]))
    print("open", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    holder = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match=f"process {holder.pid}"):
            await Store.open(path)
        holder.kill()
        holder.wait()
        async with await Store.open(path):
            pass
    finally:
        holder.kill()
        holder.communicate()


async def test_another_program_that_holds_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestpass.shares.store.database.PRAGMAS", {"busy_timeout": "50"})
    path = tmp_path / "edge.db"
    async with await Store.open(path) as store:
        other = sqlite3.connect(path)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match=r"edge\.db: database is locked") as caught:
            await put(store, "x")
        assert "end it and try again" in caught.value.hint
        other.close()
        await put(store, "x")  # and goes on afterwards


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "edge.db"
    async with await Store.open(path) as store:
        await store.write(lambda db: db.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")))
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer Guestpass") as caught:
        await Store.open(path)
    assert caught.value.error_code == "store_newer"
    assert "9999" in caught.value.message
    assert caught.value.hint
    assert path.read_bytes() == before


async def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "edge.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE songs (title TEXT)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"another program.*'songs'"):
        await Store.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"this is not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096]
)
async def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "edge.db"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        await Store.open(path)
    assert str(path) in caught.value.message
    assert "restore a backup" in caught.value.hint
    assert path.read_bytes() == content


async def test_damage_in_the_middle_is_an_error_of_the_store(tmp_path: Path) -> None:
    path = tmp_path / "edge.db"
    async with await Store.open(path) as store:
        for number in range(50):
            await store.write(
                lambda db, n=number: entries.put(db, "test", f"{n}", b'"%b"' % (b"x" * 4000), None)
            )  # type: ignore[misc]
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * (size - 8192))
    with pytest.raises(StoreError) as caught:
        async with await Store.open(path) as store:
            await store.read(lambda db: db.execute(text("SELECT count(value) FROM entries")).scalar())
    assert str(path) in caught.value.message


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder") as caught:
        await Store.open(tmp_path / "missing" / "edge.db")
    assert "mkdir -p" in caught.value.hint
    with pytest.raises(StoreError, match="is a folder"):
        await Store.open(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match=r"edge\.db"):
            await Store.open(tmp_path / "edge.db")
    finally:
        tmp_path.chmod(0o700)


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "edge.db")
    await store.close()
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await put(store, "x")


async def test_migrations_give_the_tables_of_the_code(tmp_path: Path) -> None:
    def differences(db: Connection) -> list[object]:
        context = MigrationContext.configure(
            db, opts={"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        )
        return list(compare_metadata(context, metadata))

    async with await Store.open(tmp_path / "edge.db") as store:
        assert await store.read(differences) == []


def test_the_code_knows_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [REVISION]


async def test_an_older_schema_is_migrated_in_one_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration that fails half-way leaves the file as it was."""
    versions = tmp_path / "migrations"
    (versions / "versions").mkdir(parents=True)
    for name in (
        "env.py",
        "script.py.mako",
        *(f"versions/{p.name}" for p in (MIGRATIONS / "versions").glob("*.py")),
    ):
        (versions / name).write_text((MIGRATIONS / name).read_text("utf-8"), "utf-8")
    path = tmp_path / "edge.db"
    async with await Store.open(path) as store:
        await put(store, "kept")
    head = f'"""Next."""\nfrom alembic import op\nrevision = "next"\ndown_revision = "{REVISION}"\ndef upgrade():\n'
    add = '    op.execute("ALTER TABLE shares ADD COLUMN colour TEXT")\n'
    monkeypatch.setattr("guestpass.shares.store.database.MIGRATIONS", versions)
    monkeypatch.setattr("guestpass.shares.store.database.REVISION", "next")

    (versions / "versions" / "next.py").write_text(head + add + '    op.execute("SELECT * FROM nowhere")\n')
    with pytest.raises(StoreError, match="nowhere"):
        await Store.open(path)
    connection = sqlite3.connect(path)
    assert "colour" not in {row[1] for row in connection.execute("PRAGMA table_info(shares)")}
    assert connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall() == [(REVISION,)]
    connection.close()

    (versions / "versions" / "next.py").write_text(head + add)
    async with await Store.open(path) as store:
        assert await value(store, "kept") == 1
        columns = await store.read(lambda db: db.execute(text("PRAGMA table_info(shares)")).all())
    assert "colour" in {row[1] for row in columns}


async def test_what_is_deleted_is_overwritten(tmp_path: Path) -> None:
    """Queued mail holds links: after delivery the file must not hold them any more."""
    path = tmp_path / "edge.db"
    async with await Store.open(path) as store:
        await store.write(lambda db: entries.put(db, "test", "x", b'"canary-7f3a"', None))
        assert b"canary-7f3a" in path.read_bytes()
        await store.write(lambda db: entries.delete(db, "test", "x", 0.0))
        assert b"canary-7f3a" not in path.read_bytes()
