"""Statements about the audit."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from guestpass.model import Event
from guestpass.shares.store.rows import AuditEntry, AuditFilter, from_event, to_audit
from guestpass.shares.store.schema import audit


def insert(db: Connection, event: Event) -> None:
    db.execute(sa.insert(audit), from_event(event))


def page(db: Connection, which: AuditFilter, *, before: int | None, limit: int) -> list[AuditEntry]:
    """Newest first, beginning before the id `before`."""
    query = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(audit.c.id < before)
    for column, value in (
        (audit.c.share_id, which.share_id),
        (audit.c.actor, which.actor),
        (audit.c.type, which.type),
    ):
        if value is not None:
            query = query.where(column == value)
    if which.since is not None:
        query = query.where(audit.c.at >= which.since)
    if which.until is not None:
        query = query.where(audit.c.at < which.until)
    return [to_audit(row) for row in db.execute(query)]
