"""Statements about shares, recipients and links."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from guestpass.model import Delivery, Recipient, Share
from guestpass.shares.store.rows import AnyRow, Finder, from_recipient, from_share, to_recipient, to_share
from guestpass.shares.store.schema import links, recipients, shares

# Parameters of one IN (…): SQLite takes 32,766; pages are smaller by far.
CHUNK = 500

_BY_ID = sa.select(shares).where(shares.c.id == sa.bindparam("share"))
_RECIPIENTS = (
    sa.select(recipients)
    .where(recipients.c.share_id == sa.bindparam("share"))
    .order_by(recipients.c.position)
)
_FIND = Finder(_BY_ID, "share")
_FIND_RECIPIENTS = Finder(_RECIPIENTS, "share")


def insert(db: Connection, share: Share) -> None:
    """`share` with its recipients."""
    db.execute(sa.insert(shares), from_share(share))
    for recipient in share.recipients:
        insert_recipient(db, recipient)


def insert_recipient(db: Connection, recipient: Recipient) -> None:
    position = db.execute(
        sa.select(sa.func.coalesce(sa.func.max(recipients.c.position) + 1, 0)).where(
            recipients.c.share_id == recipient.share_id
        )
    ).scalar_one()
    db.execute(sa.insert(recipients), {**from_recipient(recipient), "position": position})


def exist(db: Connection) -> bool:
    return db.execute(sa.select(sa.exists().select_from(shares))).scalar_one() == 1


def get(db: Connection, share_id: str) -> Share | None:
    row = db.execute(_BY_ID, {"share": share_id}).first()
    return None if row is None else to_share(row, db.execute(_RECIPIENTS, {"share": share_id}).all())


def find(db: sqlite3.Connection, share_id: str) -> Share | None:
    """`get` for `Store.find`."""
    return next((to_share(row, _FIND_RECIPIENTS.all(db, share_id)) for row in _FIND.all(db, share_id)), None)


def page(
    db: Connection, *, after: tuple[float, str] | None, limit: int, active_at: float | None
) -> list[Share]:
    """Newest first, beginning after (created, id); with `active_at`, only shares that are active then."""
    query = sa.select(shares).order_by(shares.c.created.desc(), shares.c.id.desc()).limit(limit)
    if after is not None:
        query = query.where(sa.tuple_(shares.c.created, shares.c.id) < sa.tuple_(*map(sa.literal, after)))
    if active_at is not None:
        query = query.where(_active(active_at))
    return _with_recipients(db, db.execute(query).all())


def shared_with(db: Connection, email: str, now: float, limit: int) -> list[Share]:
    """Active shares with this recipient, newest first."""
    query = (
        sa.select(shares)
        .join(recipients, recipients.c.share_id == shares.c.id)
        .where(recipients.c.email == email, recipients.c.removed.is_(None), _active(now))
        .order_by(shares.c.created.desc(), shares.c.id.desc())
        .limit(limit)
    )
    return _with_recipients(db, db.execute(query).all())


def update(db: Connection, share: Share) -> None:
    """Everything but its recipients and its deletion."""
    values = from_share(share)
    del values["deleted"]
    db.execute(sa.update(shares).where(shares.c.id == share.id).values(values))


def delete(db: Connection, share_id: str, now: float) -> None:
    db.execute(
        sa.update(shares).where(shares.c.id == share_id, shares.c.deleted.is_(None)).values(deleted=now)
    )


def remove_recipient(db: Connection, recipient_id: str, now: float) -> None:
    db.execute(sa.update(recipients).where(recipients.c.id == recipient_id).values(removed=now))


def opened(db: Connection, recipient_id: str, now: float) -> None:
    db.execute(
        sa.update(recipients)
        .where(recipients.c.id == recipient_id)
        .values(first_opened=sa.func.coalesce(recipients.c.first_opened, now), last_opened=now)
    )


def set_delivery(db: Connection, recipient_id: str, delivery: Delivery, detail: str) -> None:
    db.execute(
        sa.update(recipients)
        .where(recipients.c.id == recipient_id)
        .values(delivery=delivery, delivery_detail=detail)
    )


def add_link(db: Connection, digest: bytes, recipient_id: str, now: float, keep: int) -> None:
    """A further link for a recipient; of all, the newest `keep` stay."""
    db.execute(sa.insert(links), {"digest": digest, "recipient_id": recipient_id, "created": now})
    newest = (
        sa.select(links.c.digest)
        .where(links.c.recipient_id == recipient_id)
        .order_by(links.c.created.desc(), sa.literal_column("rowid").desc())
        .limit(keep)
    )
    db.execute(sa.delete(links).where(links.c.recipient_id == recipient_id, links.c.digest.not_in(newest)))


def by_link(db: Connection, digest: bytes) -> tuple[Share, Recipient] | None:
    """The share and the recipient, who may have been removed."""
    row = db.execute(
        sa.select(recipients)
        .join(links, links.c.recipient_id == recipients.c.id)
        .where(links.c.digest == digest)
    ).first()
    if row is None:
        return None
    share = get(db, row.share_id)
    return None if share is None else (share, to_recipient(row))


def _active(now: float) -> sa.ColumnElement[bool]:
    return sa.and_(shares.c.deleted.is_(None), sa.or_(shares.c.expires.is_(None), shares.c.expires > now))


def _with_recipients(db: Connection, rows: Sequence[AnyRow]) -> list[Share]:
    by_share: dict[str, list[AnyRow]] = {row.id: [] for row in rows}
    for ids in _chunks(by_share):
        query = sa.select(recipients).where(recipients.c.share_id.in_(ids)).order_by(recipients.c.position)
        for row in db.execute(query):
            by_share[row.share_id].append(row)
    return [to_share(row, by_share[row.id]) for row in rows]


def _chunks(ids: Mapping[str, Any]) -> Iterable[list[str]]:
    keys = list(ids)
    return (keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK))
