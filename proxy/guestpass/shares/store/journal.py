"""Revocations, in a file beside the database, so that a restored backup cannot bring back what was revoked.

How it works:

* Every transaction that takes something away raises a counter in the database, the epoch. After the commit, and before
  the answer, one line for each revocation is appended to `<database>.revocations` and synced: the epoch, the time, and
  what was revoked, by id.
* At the start, a database whose epoch is below the journal's is older than what was acknowledged. Then the start is
  refused, with a list of what the database does not know, until an operator says that the backup was meant:
  `guestpass edge --restored` does to it again what the journal says, and starts.
* The other way round, a crash between commit and line, nothing is lost: the database knows more than the journal.
* A database without shares has nothing that could come back, whatever the journal says: it is a new one.

The file is not part of a backup of the database: it belongs to the machine that gave the answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import orjson
from sqlalchemy.engine import Connection

from guestpass.errors import StoreError
from guestpass.model import Revocation, Scope, Share
from guestpass.moments import to_text
from guestpass.shares.store import entries, gateways, mail, sessions, shares

# Where the epoch stands among the database's entries.
NAMESPACE, KEY = "revocations", "epoch"

# Lines that a start keeps. Backups are younger than ten thousand revocations; with 100 bytes a line, a megabyte.
LINES_KEPT = 10_000

# Named in the message of a refused start; the file has the rest.
NAMED = 5


@dataclass(frozen=True, slots=True)
class Entry:
    """One revocation. `limits`: what a share was narrowed to (see `limits_of`)."""

    epoch: int
    at: float  # seconds since the epoch of time
    revocation: Revocation
    limits: Mapping[str, Any] | None = None

    def line(self) -> bytes:
        revocation = self.revocation
        found: dict[str, Any] = {"epoch": self.epoch, "at": self.at, "reason": revocation.reason}
        for name in ("share_id", "recipient_id", "session_id", "gateway"):
            if (value := getattr(revocation, name)) is not None:
                found[name] = value
        if self.limits is not None:
            found["limits"] = self.limits
        return orjson.dumps(found) + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Self:
        """Raises ValueError, KeyError, TypeError."""
        found = orjson.loads(line)
        epoch, at, limits = int(found.pop("epoch")), float(found.pop("at")), found.pop("limits", None)
        if "gateway" in found:
            site, name = found["gateway"]
            found["gateway"] = (site, name)
        return cls(epoch, at, Revocation(**found), limits)

    def __str__(self) -> str:
        revocation = self.revocation
        if revocation.gateway is not None:
            what = f"gateway {'/'.join(revocation.gateway)}"
        elif revocation.session_id is not None:
            what = f"session {revocation.session_id} of the share {revocation.share_id}"
        elif revocation.recipient_id is not None:
            what = f"a recipient of the share {revocation.share_id}"
        else:
            what = f"share {revocation.share_id}"
        return f"{what} ({revocation.reason}, {to_text(self.at)})"


def limits_of(share: Share) -> Mapping[str, Any]:
    """What an update can take away, as the journal keeps it."""
    return {
        "path": share.path,
        "scope": [[rule.method, rule.path] for rule in share.scope],
        "expires": share.expires,
        "max_sessions": share.max_sessions,
    }


class Journal:
    """The file. Belongs to the store's thread."""

    def __init__(self, path: Path, file: int, found: Sequence[Entry]) -> None:
        self.path = path
        self._file = file
        self.entries = found
        self.last = max((entry.epoch for entry in found), default=0)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create. A last line that was cut off by a crash was never acknowledged, and is dropped.

        Raises StoreError.
        """
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            found = []
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    found.append(Entry.read(line))
                except (ValueError, KeyError, TypeError) as exc:
                    raise StoreError(
                        f"{path}, line {number}: this is no revocation",
                        hint="The file is damaged. Restore it, or, when no backup of the database was restored since "
                        "it was whole, move it away.",
                    ) from exc
            kept = found[-LINES_KEPT:]
            if len(whole) != len(data) or len(kept) != len(found) or not path.exists():
                _write(path, kept)
            return cls(path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC), kept)
        except OSError as error:
            raise StoreError(
                f"{path}: {error.strerror}", hint="Check the file's owner and rights: the edge must own it."
            ) from error

    def append(self, added: Iterable[Entry]) -> None:
        """On disk when this returns. Raises StoreError."""
        added = list(added)
        data = b"".join(entry.line() for entry in added)
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fdatasync(self._file)
        except OSError as error:
            raise StoreError(
                f"{self.path}: {error.strerror}",
                hint="What was revoked is revoked, and stays so; a backup from before could bring it back. "
                "Free some space and revoke it again.",
            ) from error
        self.last = max(self.last, *(entry.epoch for entry in added))

    def close(self) -> None:
        os.close(self._file)


def _write(path: Path, kept: Iterable[Entry]) -> None:
    """Replace the file as a whole, durably."""
    new = path.with_name(path.name + ".new")
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(file, "wb", closefd=False) as out:
            out.writelines(entry.line() for entry in kept)
        os.fsync(file)
    finally:
        os.close(file)
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ── the database's side ──────────────────────────────────────────────────────────────────────────────────────────


def epoch(db: Connection) -> int:
    return int(entries.get(db, NAMESPACE, KEY, 0.0) or 0)


def raise_epoch(db: Connection) -> int:
    """Part of a transaction that takes something away; the new epoch."""
    raised = entries.add(db, NAMESPACE, KEY, 1, 0.0, None)
    assert raised is not None, "the epoch is a number"
    return raised


def settle(db: Connection, journal: Journal, *, restored: bool) -> Sequence[Entry]:
    """Compare at the start. Returns what was done again. Raises StoreError (store_older) when the database is older
    and `restored` is False."""
    known = epoch(db)
    missing = [entry for entry in journal.entries if entry.epoch > known]
    if not missing:
        return ()
    if not shares.exist(db) and not gateways.listed(db):
        entries.put(db, NAMESPACE, KEY, str(journal.last).encode(), None)
        return ()
    if not restored:
        names = ", ".join(str(entry) for entry in missing[:NAMED])
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise StoreError(
            f"the database is older than what was acknowledged; {len(missing)} revoked since: {names}{more}",
            hint="A backup was restored? Then start once with --restored: these are revoked in it again, as "
            f"{journal.path} says. Shares that were made or changed since the backup are lost.",
            code="store_older",
        )
    for entry in missing:
        _again(db, entry)
    entries.put(db, NAMESPACE, KEY, str(journal.last).encode(), None)
    return missing


def _again(db: Connection, entry: Entry) -> None:
    """Do to the database what the entry says was done; what it does not know needs nothing."""
    revocation, at = entry.revocation, entry.at
    if revocation.gateway is not None:
        gateways.delete(db, *revocation.gateway)
        return
    share_id = revocation.share_id
    share = None if share_id is None else shares.get(db, share_id)
    if share is None:
        return
    if revocation.session_id is not None:
        sessions.end(db, at, revocation.reason, session_id=revocation.session_id)
    elif revocation.recipient_id is not None:
        shares.remove_recipient(db, revocation.recipient_id, at)
        mail.cancel(db, share.id, revocation.recipient_id)
        sessions.end(db, at, revocation.reason, recipient_id=revocation.recipient_id)
    elif entry.limits is not None:
        limits = dict(entry.limits)
        scope = tuple(Scope(method, path) for method, path in limits.pop("scope"))
        shares.update(db, replace(share, scope=scope, **limits))
    else:
        sessions.end(db, at, revocation.reason, share_id=share.id)
        shares.delete(db, share.id, at)
        mail.cancel(db, share.id)
