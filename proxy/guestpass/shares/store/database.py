"""The database file: one lock, one connection, one thread, one transaction at a time.

How it works:

* `open()` takes the lock (`<database>.lock`, an flock that the kernel releases when the process dies, however it
  dies), opens the file and migrates it, in one transaction.
* `write(work)` and `read(work)` run `work(connection)` in the store's own thread inside a transaction, which is
  committed when the work returns and rolled back when it raises. There is never a second writer, so nothing waits for
  SQLite's own locks except for a program that looks into the file from outside (a backup, `sqlite3`).
* What `write` has returned from is on disk: rollback journal with synchronous=EXTRA. (FULL does not sync the folder
  after the journal is deleted, so a power cut could bring the journal back and undo an acknowledged commit.)
* `find(work)` is `read` without SQLAlchemy, for what a visitor's first request waits for: there it takes several times
  as long as SQLite. Statements for it are made with SQLAlchemy, once, by `rows.Finder`.
* `write(work, revoking=True)` is for what takes something away, and `remember` for what that was: see `journal`.
* `secure_delete` overwrites what is deleted: mail that waits holds links.

Errors of the database are translated here, once: StoreError names the file and says what to do.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import NullPool

from guestpass.errors import StoreError
from guestpass.model import Revocation
from guestpass.shares.store import journal
from guestpass.shares.store.schema import REVISION, VERSION_TABLE

log = logging.getLogger("guestpass.store")

T = TypeVar("T")

# How long a statement waits for a program outside that holds SQLite's own lock: a backup of a large file takes longer,
# but reads only and does not hold it throughout.
BUSY_SECONDS = 5.0

MIGRATIONS = Path(__file__).with_name("migrations")

PRAGMAS = {
    "journal_mode": "DELETE",
    "synchronous": "EXTRA",
    "foreign_keys": "ON",
    "busy_timeout": str(int(BUSY_SECONDS * 1000)),
    "secure_delete": "ON",
    "trusted_schema": "OFF",
    "cell_size_check": "ON",
}


class Store:
    """See the module. Make one with `await Store.open(path)`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._courier: Callable[[], None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="guestpass-store")
        self._lock: int | None = None
        self._engine: Engine | None = None
        self._db: Connection | None = None
        self._driver: sqlite3.Connection | None = None
        self._journal: journal.Journal | None = None
        self._epoch = 0
        self._begin = "BEGIN"
        self._closed = False

    @classmethod
    async def open(cls, path: Path, *, restored: bool = False) -> Self:
        """Open, or create, the database at `path`. `restored`: it is a backup, and what was revoked since is to be
        revoked in it again. Raises StoreError."""
        store = cls(Path(path))
        try:
            await asyncio.get_running_loop().run_in_executor(store._thread, store._open, restored)
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Finish what was asked for, close the file, release the lock."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def write(self, work: Callable[[Connection], T], *, revoking: bool = False) -> T:
        """Run `work` in a transaction; on disk when this returns. What `work` raises undoes it and passes through.

        `revoking`: it takes something away, and `remember` follows before anybody is told. Cancelling the caller does
        not undo work that has begun. Raises StoreError.
        """
        return await self._submit("BEGIN IMMEDIATE", self._revoking(work) if revoking else work)

    async def remember(
        self, revocations: Sequence[Revocation], at: float, limits: Mapping[str, Any] | None = None
    ) -> None:
        """Have the journal know what was revoked. `limits`: what `share_updated` narrowed the share to.

        Raises StoreError: then what was revoked is, but a backup from before could bring it back unnoticed.
        """
        await self._in_thread(partial(self._remember, tuple(revocations), at, limits))

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, which only reads, on one consistent state. Raises StoreError."""
        return await self._submit("BEGIN", work)

    async def find(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """As `read`, with the driver's own connection. Raises StoreError."""
        return await self._in_thread(partial(self._find, work))

    def on_mail(self, courier: Callable[[], None] | None) -> None:
        """Whom `wake_courier` calls."""
        self._courier = courier

    def wake_courier(self) -> None:
        """Mail was queued by a transaction that is over."""
        if self._courier is not None:
            self._courier()

    async def _submit(self, begin: str, work: Callable[[Connection], T]) -> T:
        return await self._in_thread(partial(self._run, begin, work))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        if self._closed:
            raise StoreError(
                f"{self.path}: the store is closed", hint="The edge is shutting down: try again later."
            )
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    # ── In the store's thread ────────────────────────────────────────────────────────────────────────────────────

    def _run(self, begin: str, work: Callable[[Connection], T]) -> T:
        if self._db is None:
            raise StoreError(f"{self.path}: the store is closed")
        self._begin = begin
        with self._translated(), self._db.begin():
            return work(self._db)

    def _find(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._driver is None:
            raise StoreError(f"{self.path}: the store is closed")
        with self._translated():
            self._driver.execute("BEGIN")
            try:
                return work(self._driver)
            finally:
                if self._driver.in_transaction:  # some errors end it
                    self._driver.execute("COMMIT")

    def _revoking(self, work: Callable[[Connection], T]) -> Callable[[Connection], T]:
        def both(db: Connection) -> T:
            done = work(db)
            self._epoch = journal.raise_epoch(db)
            return done

        return both

    def _remember(
        self, revocations: tuple[Revocation, ...], at: float, limits: Mapping[str, Any] | None
    ) -> None:
        if self._journal is None:
            raise StoreError(f"{self.path}: the store is closed")
        self._journal.append(
            journal.Entry(self._epoch, at, r, limits if r.reason == "share_updated" else None)
            for r in revocations
        )

    def _open(self, restored: bool) -> None:
        folder = self.path.parent
        if not folder.is_dir():
            raise StoreError(
                f"{self.path}: there is no folder {folder}", hint=f"Create it: mkdir -p {folder}"
            )
        if self.path.is_dir():
            raise StoreError(
                f"{self.path} is a folder", hint="Name a file in `state`: sqlite:///PATH/edge.db"
            )
        self._take_lock()
        self._make_private()
        engine = sa.create_engine(sa.URL.create("sqlite", database=str(self.path)), poolclass=NullPool)
        self._engine = engine

        @event.listens_for(engine, "connect")
        def configure(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # the driver leaves BEGIN to us, for DDL as well
            for name, value in PRAGMAS.items():
                connection.execute(f"PRAGMA {name} = {value}").close()

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql(self._begin)

        with self._translated():
            self._db = engine.connect()
            driver = self._db.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            self._driver = driver
            self._begin = "BEGIN IMMEDIATE"
            with self._db.begin():
                self._migrate(self._db)
            self._journal = journal.Journal.open(self.path.with_name(self.path.name + ".revocations"))
            with self._db.begin():
                again = journal.settle(self._db, self._journal, restored=restored)
                self._epoch = journal.epoch(self._db)
        for entry in again:
            log.warning("%s is a restored backup: revoked again: %s", self.path, entry)

    def _close(self) -> None:
        try:
            if self._db is not None:
                self._db.close()
            if self._engine is not None:
                self._engine.dispose()
        finally:
            self._db = self._driver = self._engine = None
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            if self._lock is not None:
                # The file stays: who deletes a lock file can let two others in, one on the old and one on a new file.
                os.close(self._lock)
                self._lock = None

    def _take_lock(self) -> None:
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"{lock}: {error.strerror}", hint=f"Give the edge's user the right to write in {lock.parent}."
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
            os.close(handle)
            raise StoreError(
                f"{self.path} is in use by {f'process {holder}' if holder else 'another process'}",
                hint="Stop that edge first, or give this one a database of its own with `state` in its edge.toml.",
                code="store_locked",
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._lock = handle

    def _make_private(self) -> None:
        """The file's mode is 0600, whoever made it; SQLite gives its journal the same."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if stat.S_IMODE(os.fstat(handle).st_mode) & 0o077:
                    os.fchmod(handle, 0o600)
            finally:
                os.close(handle)
        except OSError as error:
            raise StoreError(
                f"{self.path}: {error.strerror}",
                hint="Check the file's owner and rights: the edge must own it.",
            ) from error

    def _migrate(self, db: Connection) -> None:
        tables = set(db.execute(sa.text("SELECT name FROM sqlite_master WHERE type = 'table'")).scalars())
        if VERSION_TABLE in tables:
            found = db.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalars().all()
            if list(found) == [REVISION]:
                return  # the usual start, without loading Alembic
        elif tables:
            raise StoreError(
                f"{self.path} is a database of another program (it has a table {sorted(tables)[0]!r})",
                hint="Name a new file in `state`.",
            )
        else:
            found = []

        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        unknown = [revision for revision in found if revision not in known]
        if unknown:
            raise StoreError(
                f"{self.path} was written by a newer Guestpass (schema {unknown[0]}, this one knows up to {REVISION})",
                hint="Install that version again, or restore the backup from before the upgrade.",
                code="store_newer",
            )
        config.attributes["connection"] = db
        command.upgrade(config, "head")
        if found:
            log.info("%s: schema %s migrated to %s", self.path, found[0], REVISION)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except exc.IntegrityError:
            raise  # the caller's: a name or key that is taken
        except exc.DBAPIError as error:
            said = str(error.orig)
            raise StoreError(f"{self.path}: {said}", hint=self._advice(said)) from error
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}", hint=self._advice(str(error))) from error

    def _advice(self, said: str) -> str:
        if "locked" in said or "busy" in said:
            return "Another program holds the database (a backup, sqlite3?): end it and try again."
        if "full" in said:
            return "Free some space; nothing that was acknowledged is lost."
        if "readonly" in said or "unable to open" in said or "permission" in said.lower():
            return f"Give the edge's user the right to write {self.path} and its folder."
        if "malformed" in said or "not a database" in said or "corrupt" in said:
            return f"The file is damaged: stop the edge, move it away and restore a backup as {self.path}."
        return "The log of the edge has the details."
