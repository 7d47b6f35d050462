"""Statements about mail that waits to be delivered."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from guestpass.plugin import Message
from guestpass.shares.store.rows import QueuedMail, from_message, to_mail
from guestpass.shares.store.schema import mail


def insert(db: Connection, message: Message, now: float) -> None:
    db.execute(sa.insert(mail), from_message(message, now))


def due(db: Connection, now: float, limit: int, but: frozenset[int]) -> list[QueuedMail]:
    """What should be tried now: codes before invitations, then the longest waiting. `but`: on their way already."""
    query = (
        sa.select(mail)
        .where(mail.c.due <= now, mail.c.id.not_in(but))
        .order_by(mail.c.kind != "code", mail.c.due, mail.c.id)
        .limit(limit)
    )
    return [to_mail(row) for row in db.execute(query)]


def next_due(db: Connection, but: frozenset[int]) -> float | None:
    return db.execute(sa.select(sa.func.min(mail.c.due)).where(mail.c.id.not_in(but))).scalar()


def again(db: Connection, mail_id: int, attempts: int, due_at: float) -> None:
    db.execute(sa.update(mail).where(mail.c.id == mail_id).values(attempts=attempts, due=due_at))


def delete(db: Connection, mail_id: int) -> None:
    db.execute(sa.delete(mail).where(mail.c.id == mail_id))


def cancel(db: Connection, share_id: str, recipient_id: str | None = None) -> None:
    """Mail of a share, or of one of its recipients, that was not sent yet."""
    query = sa.delete(mail).where(mail.c.share_id == share_id)
    if recipient_id is not None:
        query = query.where(mail.c.recipient_id == recipient_id)
    db.execute(query)


def count(db: Connection) -> int:
    return db.execute(sa.select(sa.func.count()).select_from(mail)).scalar_one()
