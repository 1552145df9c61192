"""Operators' routes of suppliers in Postgres: what Redis holds is a copy, which workers make again.

Expands only: release N−1 neither writes nor reads the table.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """One table."""
    op.create_table(
        "provider_route",
        sa.Column("name", sa.Text, primary_key=True),  # `sms` or `payment:<channel>`
        sa.Column(
            "route", pg.JSONB, nullable=False
        ),  # [[supplier, weight], …]: the order counts, objects have none
        sa.Column("set_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    )
