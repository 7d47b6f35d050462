"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "shares",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("site", sa.Text, nullable=False),
        sa.Column("service", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
        sa.Column("max_sessions", sa.Integer),
        sa.Column("deleted", sa.Float),
    )
    op.create_index("shares_by_creation", "shares", ["created", "id"])

    op.create_table(
        "recipients",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("share_id", sa.Text, sa.ForeignKey("shares.id"), nullable=False),
        sa.Column("email", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("delivery", sa.Text),
        sa.Column("delivery_detail", sa.Text, nullable=False),
        sa.Column("first_opened", sa.Float),
        sa.Column("last_opened", sa.Float),
        sa.Column("removed", sa.Float),
    )
    op.create_index("recipients_by_share", "recipients", ["share_id"])
    op.create_index("recipients_by_email", "recipients", ["email"])
    op.create_index(
        "recipients_once",
        "recipients",
        ["share_id", "email"],
        unique=True,
        sqlite_where=sa.text("removed IS NULL"),
    )

    op.create_table(
        "links",
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("recipient_id", sa.Text, sa.ForeignKey("recipients.id"), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_index("links_by_recipient", "links", ["recipient_id"])

    op.create_table(
        "sessions",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("share_id", sa.Text, sa.ForeignKey("shares.id"), nullable=False),
        sa.Column("recipient_id", sa.Text, sa.ForeignKey("recipients.id"), nullable=False),
        sa.Column("email", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("last_seen", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("ended", sa.Float),
        sa.Column("ended_reason", sa.Text, nullable=False),
        sa.UniqueConstraint("kind", "digest", name="sessions_by_secret"),
    )
    op.create_index("sessions_by_share", "sessions", ["share_id"])
    op.create_index("sessions_by_recipient", "sessions", ["recipient_id"])
    op.create_index("sessions_by_creation", "sessions", ["created", "id"])

    op.create_table(
        "gateways",
        sa.Column("site", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("public_key", sa.LargeBinary, nullable=False),
        sa.Column("enrolled", sa.Float, nullable=False),
        sa.Column("last_seen", sa.Float),
        sa.PrimaryKeyConstraint("site", "name"),
        sa.UniqueConstraint("public_key", name="gateways_by_key"),
    )

    op.create_table(
        "join_tokens",
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("site", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
        sa.Column("used_name", sa.Text),
        sa.Column("used_key", sa.LargeBinary),
    )

    op.create_table(
        "entries",
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("expires", sa.Float),
        sa.PrimaryKeyConstraint("namespace", "key"),
    )
    op.create_index("entries_by_expiry", "entries", ["expires"], sqlite_where=sa.text("expires IS NOT NULL"))

    op.create_table(
        "mail",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("recipient", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("html", sa.Text),
        sa.Column("share_id", sa.Text),
        sa.Column("recipient_id", sa.Text),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due", sa.Float, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("mail_by_due", "mail", ["due"])
    op.create_index("mail_by_share", "mail", ["share_id"])

    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("share_id", sa.Text),
        sa.Column("session_id", sa.Text),
        sa.Column("detail", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("audit_by_time", "audit", ["at"])
    op.create_index("audit_by_share", "audit", ["share_id", "id"])
