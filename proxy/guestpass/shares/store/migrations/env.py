"""Run by Alembic for every command: migrates over the connection that `Store.open` hands in, in its transaction."""

from __future__ import annotations

from alembic import context

from guestpass.shares.store.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    # SQLite's DDL is transactional once the driver leaves BEGIN to us; Alembic assumes that it is not.
    transactional_ddl=True,
)
context.run_migrations()
