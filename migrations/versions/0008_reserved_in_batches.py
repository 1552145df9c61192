"""Tell the shop of a whole batch of new orders in one row, unpacked when it is numbered.

Expands only. Release N−1 writes one event an order and its first line, and N reads both as they are. N−1 does not see a
batch: while both work, `order.reserved` of N's orders waits for N's numbering step.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """One table, numbered by the sequence of `event`."""
    op.create_table(
        "event_batch",
        sa.Column(
            "written",
            sa.BigInteger,
            primary_key=True,
            autoincrement=False,
            server_default=sa.text("nextval('event_written_seq')"),
        ),
        sa.Column("sale", sa.Text, nullable=False),
        sa.Column("at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.Column("order_nos", pg.ARRAY(sa.Text), nullable=False),
    )


def downgrade() -> None:
    """Release N−1 runs on these tables as they are."""
    raise NotImplementedError("run the older release on this database")
