"""Store the order numbers of a batch as they are: they are random, and Postgres tried to compress them each time.

Expands only: rows of before are read as they were written, and release N−1 sees no difference.
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """How one column is stored from now on; no row is rewritten."""
    op.execute("ALTER TABLE event_batch ALTER COLUMN order_nos SET STORAGE EXTERNAL")


def downgrade() -> None:
    """Release N−1 runs on these tables as they are."""
    raise NotImplementedError("run the older release on this database")
