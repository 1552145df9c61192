"""Suppliers' reports of what became of a text.

Expands only: release N−1 neither writes nor reads the column.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """One column, one index."""
    op.add_column("sms", sa.Column("delivered_at", pg.TIMESTAMP(timezone=True)))
    op.create_index(
        "sms_by_ref",
        "sms",
        ["provider", "provider_ref"],
        postgresql_where=sa.text("provider_ref IS NOT NULL"),
    )
