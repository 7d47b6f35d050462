"""Statements about entries: JSON values under (namespace, key) that may expire. An expired entry is an absent one."""

from __future__ import annotations

from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import Connection

from guestpass.shares.store.schema import entries


def get(db: Connection, namespace: str, key: str, now: float) -> Any | None:
    value = db.execute(sa.select(entries.c.value).where(*_is(namespace, key), _valid(now))).scalar()
    return None if value is None else orjson.loads(value)


def put(db: Connection, namespace: str, key: str, value: bytes, expires: float | None) -> None:
    """`value` is JSON text."""
    new = insert(entries).values(namespace=namespace, key=key, value=value.decode(), expires=expires)
    db.execute(
        new.on_conflict_do_update(
            index_elements=[entries.c.namespace, entries.c.key],
            set_={"value": new.excluded.value, "expires": new.excluded.expires},
        )
    )


def replace(db: Connection, namespace: str, key: str, value: bytes, now: float) -> bool:
    """A new value for an entry that exists, with its old expiry."""
    done = db.execute(
        sa.update(entries).where(*_is(namespace, key), _valid(now)).values(value=value.decode())
    )
    return done.rowcount == 1


def delete(db: Connection, namespace: str, key: str, now: float) -> bool:
    """Whether there was one."""
    return take(db, namespace, key, now) is not None


def take(db: Connection, namespace: str, key: str, now: float) -> bytes | None:
    """Get and delete in one statement: JSON text, or None."""
    row = db.execute(
        sa.delete(entries).where(*_is(namespace, key)).returning(entries.c.value, entries.c.expires)
    ).first()
    if row is None or (row.expires is not None and row.expires <= now):
        return None
    return str(row.value).encode()


def add(
    db: Connection, namespace: str, key: str, amount: int, now: float, expires: float | None
) -> int | None:
    """Add to a counter in one statement; None when the entry is not a whole number. An expired counter starts anew."""
    new = insert(entries).values(namespace=namespace, key=key, value=str(amount), expires=expires)
    over = entries.c.expires <= now
    return db.execute(
        new.on_conflict_do_update(
            index_elements=[entries.c.namespace, entries.c.key],
            set_={
                "value": sa.case(
                    (over, new.excluded.value),
                    else_=sa.cast(sa.cast(entries.c.value, sa.Integer) + amount, sa.Text),
                ),
                "expires": sa.case((over, new.excluded.expires), else_=entries.c.expires),
            },
            where=sa.or_(over, sa.func.json_type(entries.c.value) == "integer"),
        ).returning(sa.cast(entries.c.value, sa.Integer))
    ).scalar()


def forget(db: Connection, before: float) -> None:
    """Delete those that expired before."""
    db.execute(sa.delete(entries).where(entries.c.expires < before))


def _is(namespace: str, key: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return entries.c.namespace == namespace, entries.c.key == key


def _valid(now: float) -> sa.ColumnElement[bool]:
    return sa.or_(entries.c.expires.is_(None), entries.c.expires > now)
