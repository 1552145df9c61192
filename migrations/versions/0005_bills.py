"""Suppliers' daily bills, their lines, and where they differ from our books.

Expands only: release N−1 knows none of these tables.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Three tables, three indexes."""
    at = pg.TIMESTAMP(timezone=True)
    now = sa.text("now()")
    op.create_index("captures_by_day", "capture", ["provider", "captured_at"])
    op.create_table(
        "bill",
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("state", sa.Text, nullable=False, server_default="due"),
        sa.Column("lines", sa.Integer),
        sa.Column("read_at", at),
        sa.Column("code", sa.Text),
        sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("next_at", at, nullable=False, server_default=now),
        sa.Column("leased_until", at),
        sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"),
        sa.CheckConstraint("state IN ('due', 'read')", name="bill_state_known"),
    )
    op.create_table(
        "bill_line",
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("n", sa.Integer, primary_key=True),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("provider_ref", sa.Text, nullable=False),
        sa.Column("our_id", sa.Text, nullable=False),
        sa.Column("order_no", sa.Text, nullable=False),
        sa.Column("amount_minor", sa.BigInteger, nullable=False),
        sa.Column("currency", sa.Text, nullable=False),
        sa.Column("at", at, nullable=False),
    )
    op.create_index("bill_lines_by_ref", "bill_line", ["provider", "provider_ref"])
    op.create_index("bill_lines_by_our_id", "bill_line", ["provider", "our_id"])
    op.create_table(
        "bill_difference",
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("what", sa.Text, primary_key=True),
        sa.Column("ref", sa.Text, primary_key=True),
        sa.Column("our_id", sa.Text, primary_key=True),
        sa.Column("order_no", sa.Text, nullable=False),
        sa.Column("ours_minor", sa.BigInteger),
        sa.Column("theirs_minor", sa.BigInteger),
        sa.Column("currency", sa.Text, nullable=False),
        sa.Column("at", at, nullable=False),
        sa.Column("found_at", at, nullable=False, server_default=now),
        sa.Column("cleared_at", at),
    )
