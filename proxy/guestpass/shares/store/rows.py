"""Rows into domain types and back: the only place that knows both."""

from __future__ import annotations

import sqlite3
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import Row

from guestpass.model import Delivery, Event, Gateway, Recipient, Scope, Session, SessionKind, Share
from guestpass.plugin import Message

AnyRow = Row[Any]


class Finder:
    """A SELECT whose text is made once; `Store.find` runs it without SQLAlchemy. Rows have the columns by name."""

    def __init__(self, query: sa.Select[Any], *names: str) -> None:
        """`names` of its parameters, in the order in which they are given."""
        compiled = query.compile(dialect=sqlite.dialect())
        if tuple(compiled.positiontup or ()) != names:
            raise ValueError(f"the parameters stand in the order {compiled.positiontup}")
        self._text = str(compiled)
        self._row: Any = namedtuple("FoundRow", query.selected_columns.keys())  # type: ignore[misc]

    def all(self, db: sqlite3.Connection, *values: Any) -> list[AnyRow]:
        return [self._row._make(row) for row in db.execute(self._text, values)]


@dataclass(frozen=True, slots=True)
class QueuedMail:
    """A message that waits, and how often it was tried."""

    id: int
    message: Message
    created: float
    attempts: int
    due: float


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """An event as it is kept; `id` grows with time."""

    id: int
    event: Event


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What is kept of a join token. `used_*`: the gateway that it enrolled."""

    site: str
    expires: float
    used_name: str | None
    used_key: bytes | None


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which events; every field that is set must match. `since` is inclusive, `until` exclusive."""

    share_id: str | None = None
    actor: str | None = None
    type: str | None = None
    since: float | None = None
    until: float | None = None


def to_share(row: AnyRow, recipients: Sequence[AnyRow]) -> Share:
    return Share(
        id=row.id,
        name=row.name,
        site=row.site,
        service=row.service,
        path=row.path,
        scope=tuple(Scope(method, path) for method, path in orjson.loads(row.scope)),
        owner=row.owner,
        message=row.message,
        created=row.created,
        expires=row.expires,
        max_sessions=row.max_sessions,
        deleted=row.deleted,
        recipients=tuple(to_recipient(r) for r in recipients),
        sign_in=tuple(orjson.loads(row.sign_in)),
    )


def from_share(share: Share) -> dict[str, Any]:
    """Without its recipients: they have rows of their own."""
    return {
        "id": share.id,
        "name": share.name,
        "site": share.site,
        "service": share.service,
        "path": share.path,
        "scope": orjson.dumps([[rule.method, rule.path] for rule in share.scope]).decode(),
        "owner": share.owner,
        "message": share.message,
        "created": share.created,
        "expires": share.expires,
        "max_sessions": share.max_sessions,
        "deleted": share.deleted,
        "sign_in": orjson.dumps(share.sign_in).decode(),
    }


def to_recipient(row: AnyRow) -> Recipient:
    return Recipient(
        id=row.id,
        share_id=row.share_id,
        email=row.email,
        delivery=None if row.delivery is None else Delivery(row.delivery),
        delivery_detail=row.delivery_detail,
        first_opened=row.first_opened,
        last_opened=row.last_opened,
        removed=row.removed,
    )


def from_recipient(recipient: Recipient) -> dict[str, Any]:
    return {
        "id": recipient.id,
        "share_id": recipient.share_id,
        "email": recipient.email,
        "delivery": recipient.delivery,
        "delivery_detail": recipient.delivery_detail,
        "first_opened": recipient.first_opened,
        "last_opened": recipient.last_opened,
        "removed": recipient.removed,
    }


def to_session(row: AnyRow) -> Session:
    return Session(
        id=row.id,
        share_id=row.share_id,
        recipient_id=row.recipient_id,
        email=row.email,
        kind=SessionKind(row.kind),
        provider=row.provider,
        created=row.created,
        last_seen=row.last_seen,
        expires=row.expires,
        client=row.client,
        ended=row.ended,
    )


def from_session(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "share_id": session.share_id,
        "recipient_id": session.recipient_id,
        "email": session.email,
        "kind": session.kind,
        "provider": session.provider,
        "created": session.created,
        "last_seen": session.last_seen,
        "expires": session.expires,
        "client": session.client,
        "ended": session.ended,
    }


def to_gateway(row: AnyRow) -> Gateway:
    return Gateway(
        site=row.site,
        name=row.name,
        public_key=row.public_key,
        enrolled=row.enrolled,
        last_seen=row.last_seen,
    )


def to_join_token(row: AnyRow) -> JoinToken:
    return JoinToken(site=row.site, expires=row.expires, used_name=row.used_name, used_key=row.used_key)


def to_mail(row: AnyRow) -> QueuedMail:
    message = Message(
        kind=row.kind,
        to=row.recipient,
        subject=row.subject,
        text=row.text,
        html=row.html,
        share_id=row.share_id,
        recipient_id=row.recipient_id,
        expires=row.expires,
    )
    return QueuedMail(id=row.id, message=message, created=row.created, attempts=row.attempts, due=row.due)


def from_message(message: Message, now: float) -> dict[str, Any]:
    return {
        "kind": message.kind,
        "recipient": message.to,
        "subject": message.subject,
        "text": message.text,
        "html": message.html,
        "share_id": message.share_id,
        "recipient_id": message.recipient_id,
        "created": now,
        "expires": message.expires,
        "due": now,
    }


def to_audit(row: AnyRow) -> AuditEntry:
    event = Event(
        type=row.type,
        at=row.at,
        actor=row.actor,
        share_id=row.share_id,
        session_id=row.session_id,
        detail=orjson.loads(row.detail),
    )
    return AuditEntry(id=row.id, event=event)


def from_event(event: Event) -> dict[str, Any]:
    return {
        "type": event.type,
        "at": event.at,
        "actor": event.actor,
        "share_id": event.share_id,
        "session_id": event.session_id,
        "detail": orjson.dumps(dict(event.detail), default=str).decode(),
    }
