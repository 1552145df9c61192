"""Outages of payment suppliers, and the time to pay that orders got because of them.

Expands only: release N−1 writes none of it, and its orders count as never extended.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Two tables, one column (with a constant default: no table is rewritten), one index."""
    at = pg.TIMESTAMP(timezone=True)
    now = sa.text("now()")
    op.add_column(
        "purchase_order", sa.Column("extended_s", sa.Integer, nullable=False, server_default=sa.text("0"))
    )
    op.create_table(
        "payment_outage",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("began_at", at, nullable=False, server_default=now),
        sa.Column("seen_at", at, nullable=False, server_default=now),
    )
    op.create_index("outages_of_provider", "payment_outage", ["provider", "seen_at"])
    op.create_table(
        "deadline_extension",
        sa.Column("order_no", sa.Text, sa.ForeignKey("purchase_order.order_no"), primary_key=True),
        sa.Column("outage", sa.BigInteger, sa.ForeignKey("payment_outage.id"), primary_key=True),
        sa.Column("at", at, nullable=False, server_default=now),
        sa.Column("pay_by_before", at, nullable=False),
        sa.Column("extended_s", sa.Integer, nullable=False),
        sa.Column("most_s", sa.Integer, nullable=False),
        sa.CheckConstraint("extended_s > 0", name="extension_never_shortens"),
    )


def downgrade() -> None:
    """Release N−1 runs on these tables as they are."""
    raise NotImplementedError("run the older release on this database")
