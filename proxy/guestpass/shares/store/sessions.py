"""Statements about sessions."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from guestpass.model import Session, SessionKind
from guestpass.shares.store.rows import Finder, from_session, to_session
from guestpass.shares.store.schema import sessions, shares

_BY_SECRET = Finder(
    sa.select(sessions).where(
        sessions.c.kind == sa.bindparam("kind"), sessions.c.digest == sa.bindparam("digest")
    ),
    *("kind", "digest"),
)


def insert(db: Connection, session: Session, digest: bytes) -> None:
    db.execute(sa.insert(sessions), {**from_session(session), "digest": digest})


def by_secret(db: sqlite3.Connection, kind: SessionKind, digest: bytes) -> Session | None:
    """For `Store.find`."""
    return next((to_session(row) for row in _BY_SECRET.all(db, kind.value, digest)), None)


def get(db: Connection, session_id: str) -> Session | None:
    row = db.execute(sa.select(sessions).where(sessions.c.id == session_id)).first()
    return None if row is None else to_session(row)


def page(
    db: Connection,
    *,
    share_id: str | None,
    live_at: float | None,
    after: tuple[float, str] | None,
    limit: int | None,
) -> list[Session]:
    """Newest first. With `live_at`, only sessions that neither ended nor expired then, of shares that neither did."""
    query = sa.select(sessions).order_by(sessions.c.created.desc(), sessions.c.id.desc())
    if limit is not None:
        query = query.limit(limit)
    if share_id is not None:
        query = query.where(sessions.c.share_id == share_id)
    if live_at is not None:
        query = query.join(shares, shares.c.id == sessions.c.share_id).where(
            _live(live_at),
            shares.c.deleted.is_(None),
            sa.or_(shares.c.expires.is_(None), shares.c.expires > live_at),
        )
    if after is not None:
        query = query.where(sa.tuple_(sessions.c.created, sessions.c.id) < sa.tuple_(*map(sa.literal, after)))
    return [to_session(row) for row in db.execute(query)]


def idle(
    db: Connection, now: float, before: float, kinds: Sequence[SessionKind], limit: int
) -> list[Session]:
    """Live ones of these kinds that were last seen before, the longest ago first."""
    query = sa.select(sessions).where(_live(now), sessions.c.last_seen < before, sessions.c.kind.in_(kinds))
    return [to_session(row) for row in db.execute(query.order_by(sessions.c.last_seen).limit(limit))]


def of_address(db: Connection, now: float, email: str) -> list[Session]:
    """Live ones of all shares."""
    query = sa.select(sessions).where(_live(now), sessions.c.email == email)
    return [to_session(row) for row in db.execute(query)]


def end(
    db: Connection,
    now: float,
    reason: str,
    *,
    session_id: str | None = None,
    share_id: str | None = None,
    recipient_id: str | None = None,
) -> int:
    """End the live ones that match; returns how many of them somebody was using: a token that was never used is
    nobody's session."""
    query = sa.update(sessions).where(_live(now))
    if session_id is not None:
        query = query.where(sessions.c.id == session_id)
    if share_id is not None:
        query = query.where(sessions.c.share_id == share_id)
    if recipient_id is not None:
        query = query.where(sessions.c.recipient_id == recipient_id)
    ended = db.execute(
        query.values(ended=now, ended_reason=reason).returning(
            sessions.c.kind, sessions.c.created, sessions.c.last_seen
        )
    ).all()
    return sum(row.kind == SessionKind.COOKIE or row.last_seen > row.created for row in ended)


def seen(db: Connection, at: Mapping[str, float]) -> None:
    """`last_seen` of many at once."""
    if at:
        db.execute(
            sa.update(sessions)
            .where(sessions.c.id == sa.bindparam("which"), sessions.c.last_seen < sa.bindparam("at"))
            .values(last_seen=sa.bindparam("at")),
            [{"which": session_id, "at": when} for session_id, when in at.items()],
        )


def signed_in_by(db: Connection, provider: str, now: float) -> list[str]:
    """Ids of the live sessions that rest on this authenticator."""
    query = sa.select(sessions.c.id).where(sessions.c.provider == provider, _live(now))
    return [row.id for row in db.execute(query)]


def forget(db: Connection, before: float) -> None:
    """Delete those that ended or expired before."""
    db.execute(sa.delete(sessions).where(sa.or_(sessions.c.ended < before, sessions.c.expires < before)))


def _live(now: float) -> sa.ColumnElement[bool]:
    return sa.and_(sessions.c.ended.is_(None), sa.or_(sessions.c.expires.is_(None), sessions.c.expires > now))
