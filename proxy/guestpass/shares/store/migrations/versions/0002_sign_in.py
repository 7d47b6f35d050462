"""Which ways of signing in a share takes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("shares", sa.Column("sign_in", sa.Text, nullable=False, server_default="[]"))
