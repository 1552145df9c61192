"""Tell the shop: deliveries, secrets that rotate, orders found by phone number, contacts that are removed.

Expands only: release N−1 writes none of it and reads none of it. `webhook_endpoint.told_to` is null for an endpoint
that N−1 makes: it is told from its first look on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """One table, seven columns, three indexes."""
    at = pg.TIMESTAMP(timezone=True)
    op.add_column("sale", sa.Column("contacts_removed_at", at))
    op.add_column("purchase_order", sa.Column("phone_index", pg.BYTEA))
    op.create_index(
        "orders_of_phone",
        "purchase_order",
        ["sale", "phone_index"],
        postgresql_where=sa.text("phone_index IS NOT NULL"),
    )
    op.add_column("webhook_endpoint", sa.Column("secret_before", pg.BYTEA))
    op.add_column("webhook_endpoint", sa.Column("secret_before_until", at))
    op.add_column("webhook_endpoint", sa.Column("told_to", sa.BigInteger))
    op.add_column("webhook_endpoint", sa.Column("disabled_at", at))
    op.add_column("webhook_endpoint", sa.Column("disabled_why", sa.Text))
    op.create_table(
        "webhook_delivery",
        sa.Column("endpoint", sa.Text, sa.ForeignKey("webhook_endpoint.id"), primary_key=True),
        sa.Column("event", sa.Text, sa.ForeignKey("event.id"), primary_key=True),
        sa.Column("state", sa.Text, nullable=False, server_default="due"),
        sa.Column("status", sa.Integer),
        sa.Column("code", sa.Text),
        sa.Column("created_at", at, nullable=False, server_default=sa.text("now()")),
        sa.Column("expires_at", at, nullable=False),
        sa.Column("ended_at", at),
        sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("next_at", at, nullable=False, server_default=sa.text("now()")),
        sa.Column("leased_until", at),
        sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"),
        sa.CheckConstraint("state IN ('due', 'delivered', 'failed')", name="delivery_state_known"),
    )
    op.create_index(
        "deliveries_due",
        "webhook_delivery",
        ["endpoint", "next_at"],
        postgresql_where=sa.text("state = 'due'"),
    )
    op.create_index(
        "deliveries_ended",
        "webhook_delivery",
        ["ended_at"],
        postgresql_where=sa.text("ended_at IS NOT NULL"),
    )


def downgrade() -> None:
    """Release N−1 runs on these tables as they are."""
    raise NotImplementedError("run the older release on this database")
