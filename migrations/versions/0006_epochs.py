"""A sale can begin a new epoch: each item knows with which seq each epoch began.

Expands only: release N−1 neither writes nor reads it, and cannot rebuild.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """One column."""
    op.add_column("item", sa.Column("epoch_starts", pg.JSONB))
