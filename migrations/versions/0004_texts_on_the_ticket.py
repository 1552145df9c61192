"""Texts that no channel takes are shown on the ticket; a text is counted once under its number's limits.

Expands only: release N−1 writes neither column, and reads neither.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Two columns, one index."""
    op.add_column("sms", sa.Column("shown", sa.Text))
    op.add_column("sms", sa.Column("counted", sa.Boolean, nullable=False, server_default=sa.text("false")))
    op.create_index(
        "sms_unshown",
        "sms",
        ["created_at"],
        postgresql_where=sa.text("shown IS NULL AND state IN ('due', 'unknown', 'failed')"),
    )
