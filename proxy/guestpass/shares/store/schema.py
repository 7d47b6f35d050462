"""The tables. What a change here needs: a new file in migrations/versions, and `REVISION` set to its number.

Times are seconds since the epoch (REAL). Secrets (links, cookies, tokens, join tokens) are stored as SHA-256 only.
The one exception is `mail`, which holds texts with links or codes until they are delivered or given up.
"""

from __future__ import annotations

from sqlalchemy import (
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)

# The newest migration.
REVISION = "0002"

# Not Alembic's default: a database of another program with an `alembic_version` table is not taken for ours.
VERSION_TABLE = "guestpass_schema"

metadata = MetaData()

shares = Table(
    "shares",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("service", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("scope", Text, nullable=False),  # JSON: [[method, path], …]
    Column("owner", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("max_sessions", Integer),
    Column("deleted", Float),
    Column("sign_in", Text, nullable=False, server_default="[]"),  # JSON: [authenticator, …]
    Index("shares_by_creation", "created", "id"),
)

recipients = Table(
    "recipients",
    metadata,
    Column("id", Text, primary_key=True),
    Column("share_id", Text, ForeignKey("shares.id"), nullable=False),
    Column("email", Text, nullable=False),
    Column("position", Integer, nullable=False),  # as the owner listed them
    Column("delivery", Text),
    Column("delivery_detail", Text, nullable=False),
    Column("first_opened", Float),
    Column("last_opened", Float),
    Column("removed", Float),
    Index("recipients_by_share", "share_id"),
    Index("recipients_by_email", "email"),
    # One address once in a share; who was removed may be added again.
    Index("recipients_once", "share_id", "email", unique=True, sqlite_where=text("removed IS NULL")),
)

links = Table(
    "links",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("recipient_id", Text, ForeignKey("recipients.id"), nullable=False),
    Column("created", Float, nullable=False),
    Index("links_by_recipient", "recipient_id"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("kind", Text, nullable=False),
    Column("share_id", Text, ForeignKey("shares.id"), nullable=False),
    Column("recipient_id", Text, ForeignKey("recipients.id"), nullable=False),
    Column("email", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("last_seen", Float, nullable=False),
    Column("expires", Float),
    Column("client", Text, nullable=False),
    Column("ended", Float),
    Column("ended_reason", Text, nullable=False, default=""),
    UniqueConstraint("kind", "digest", name="sessions_by_secret"),
    Index("sessions_by_share", "share_id"),
    Index("sessions_by_recipient", "recipient_id"),
    Index("sessions_by_creation", "created", "id"),
)

gateways = Table(
    "gateways",
    metadata,
    Column("site", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("public_key", LargeBinary, nullable=False),
    Column("enrolled", Float, nullable=False),
    Column("last_seen", Float),
    PrimaryKeyConstraint("site", "name"),
    UniqueConstraint("public_key", name="gateways_by_key"),
)

join_tokens = Table(
    "join_tokens",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("site", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False),
    # Who used it: the same gateway with the same key may ask again when its answer was lost.
    Column("used_name", Text),
    Column("used_key", LargeBinary),
)

# Whatever expires or belongs to a plugin: sign-in flows, hand-over codes, idempotency keys, plugins' storage.
entries = Table(
    "entries",
    metadata,
    Column("namespace", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("value", Text, nullable=False),  # JSON
    Column("expires", Float),
    PrimaryKeyConstraint("namespace", "key"),
    Index("entries_by_expiry", "expires", sqlite_where=text("expires IS NOT NULL")),
)

mail = Table(
    "mail",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("recipient", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("html", Text),
    Column("share_id", Text),
    Column("recipient_id", Text),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("attempts", Integer, nullable=False, default=0),
    Column("due", Float, nullable=False),
    Index("mail_by_due", "due"),
    Index("mail_by_share", "share_id"),
    sqlite_autoincrement=True,
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("type", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("share_id", Text),
    Column("session_id", Text),
    Column("detail", Text, nullable=False),  # JSON
    Index("audit_by_time", "at"),
    Index("audit_by_share", "share_id", "id"),
    sqlite_autoincrement=True,  # an id is never used twice: it is a cursor
)
