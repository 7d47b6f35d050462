"""Statements about enrolled gateways and join tokens."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from guestpass.model import Gateway
from guestpass.shares.store.rows import JoinToken, to_gateway, to_join_token
from guestpass.shares.store.schema import gateways, join_tokens


def insert(db: Connection, gateway: Gateway) -> None:
    db.execute(
        sa.insert(gateways),
        {
            "site": gateway.site,
            "name": gateway.name,
            "public_key": gateway.public_key,
            "enrolled": gateway.enrolled,
            "last_seen": gateway.last_seen,
        },
    )


def get(db: Connection, site: str, name: str) -> Gateway | None:
    row = db.execute(sa.select(gateways).where(gateways.c.site == site, gateways.c.name == name)).first()
    return None if row is None else to_gateway(row)


def by_key(db: Connection, public_key: bytes) -> Gateway | None:
    row = db.execute(sa.select(gateways).where(gateways.c.public_key == public_key)).first()
    return None if row is None else to_gateway(row)


def listed(db: Connection, name: str | None = None) -> list[Gateway]:
    query = sa.select(gateways).order_by(gateways.c.site, gateways.c.name)
    if name is not None:
        query = query.where(gateways.c.name == name)
    return [to_gateway(row) for row in db.execute(query)]


def delete(db: Connection, site: str, name: str) -> None:
    db.execute(sa.delete(gateways).where(gateways.c.site == site, gateways.c.name == name))


def seen(db: Connection, at: Mapping[tuple[str, str], float]) -> None:
    """`last_seen` of many at once."""
    if at:
        db.execute(
            sa.update(gateways)
            .where(gateways.c.site == sa.bindparam("its_site"), gateways.c.name == sa.bindparam("its_name"))
            .values(last_seen=sa.bindparam("at")),
            [{"its_site": site, "its_name": name, "at": when} for (site, name), when in at.items()],
        )


def insert_join_token(db: Connection, digest: bytes, site: str, now: float, expires: float) -> None:
    db.execute(sa.insert(join_tokens), {"digest": digest, "site": site, "created": now, "expires": expires})


def join_token(db: Connection, digest: bytes) -> JoinToken | None:
    row = db.execute(sa.select(join_tokens).where(join_tokens.c.digest == digest)).first()
    return None if row is None else to_join_token(row)


def use_join_token(db: Connection, digest: bytes, name: str, public_key: bytes) -> None:
    db.execute(
        sa.update(join_tokens)
        .where(join_tokens.c.digest == digest)
        .values(used_name=name, used_key=public_key)
    )


def forget_join_tokens(db: Connection, before: float) -> None:
    db.execute(sa.delete(join_tokens).where(join_tokens.c.expires < before))
