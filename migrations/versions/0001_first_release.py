"""Make every table of the first release.

Revision: 0001, the first.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "capture",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("provider_ref", sa.Text(), nullable=False),
        sa.Column("order_no", sa.Text(), nullable=False),
        sa.Column("attempt_id", sa.Text(), nullable=True),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("captured_at", pg.TIMESTAMP(timezone=True), nullable=False),
        sa.Column(
            "recorded_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.CheckConstraint("state IN ('due', 'kept', 'refund_due', 'refunded')", name="capture_state_known"),
        sa.CheckConstraint("amount_minor > 0", name="capture_positive"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("provider", "provider_ref", name="one_capture_a_ref"),
    )
    op.create_index("captures_of_order", "capture", ["order_no"], unique=False)
    op.create_index(
        "one_kept_capture_an_order",
        "capture",
        ["order_no"],
        unique=True,
        postgresql_where=sa.text("state = 'kept'"),
    )
    op.create_table(
        "dead_letter",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("sale", sa.Text(), nullable=False),
        sa.Column("stream", sa.Text(), nullable=False),
        sa.Column("entry_id", sa.Text(), nullable=False),
        sa.Column("entry", pg.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("sale", "stream", "entry_id", name="one_letter_an_entry"),
    )
    op.create_table(
        "event",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=True),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("sale", sa.Text(), nullable=False),
        sa.Column("order_no", sa.Text(), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("data", pg.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("written", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "events_to_number", "event", ["written"], unique=False, postgresql_where=sa.text("position IS NULL")
    )
    op.create_index(
        "one_event_a_position",
        "event",
        ["position"],
        unique=True,
        postgresql_where=sa.text("position IS NOT NULL"),
    )
    op.create_table(
        "idempotency",
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request_hash", pg.BYTEA(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("response", pg.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("created_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("actor", "key"),
    )
    op.create_table(
        "journal",
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("at", pg.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("sale", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("detail", pg.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("prev_hash", pg.BYTEA(), nullable=False),
        sa.Column("hash", pg.BYTEA(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "operator_key",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("key_hash", pg.BYTEA(), nullable=False),
        sa.Column("created_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("revoked_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key_hash"),
    )
    op.create_table(
        "order_line",
        sa.Column("order_no", sa.Text(), nullable=False),
        sa.Column("line_no", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("sku", sa.Text(), nullable=True),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("units", sa.Integer(), nullable=False),
        sa.Column("unit_minor", sa.BigInteger(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("order_no", "line_no"),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("sale", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("order_no", sa.Text(), nullable=True),
        sa.Column("payload", pg.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", sa.Text(), server_default="due", nullable=False),
        sa.Column("created_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("done_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("leased_until", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint(
            "kind IN ('mark', 'release', 'stock_add', 'stock_take', 'switch')", name="outbox_kind_known"
        ),
        sa.CheckConstraint("state IN ('due', 'intent', 'done', 'dropped')", name="outbox_state_known"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("outbox_due", "outbox", ["id"], unique=False, postgresql_where=sa.text("state = 'due'"))
    op.create_index("outbox_of_order", "outbox", ["order_no"], unique=False)
    op.create_table(
        "purchase_order",
        sa.Column("order_no", sa.Text(), nullable=False),
        sa.Column("sale", sa.Text(), nullable=False),
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("buyer_id", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("units", sa.Integer(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("leaving", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("claimed_at", pg.TIMESTAMP(timezone=True), nullable=False),
        sa.Column(
            "reserved_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("pay_within_s", sa.Integer(), nullable=False),
        sa.Column("pay_by", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("paid_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("ended_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("contact", pg.BYTEA(), nullable=True),
        sa.Column("leased_until", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint(
            "state IN ('reserved', 'paid', 'expired', 'cancelled', 'refunding', 'refunded')",
            name="order_state_known",
        ),
        sa.CheckConstraint("amount_minor >= 0", name="amount_not_negative"),
        sa.CheckConstraint("units >= 1", name="units_positive"),
        sa.PrimaryKeyConstraint("order_no"),
        sa.UniqueConstraint("sale", "sku", "epoch", "seq", name="one_order_a_ticket"),
    )
    op.create_index(
        "ended_orders_of_buyer",
        "purchase_order",
        ["sale", "buyer_id"],
        unique=False,
        postgresql_where=sa.text("state IN ('expired', 'cancelled', 'refunded')"),
    )
    op.create_index(
        "one_live_order_a_buyer",
        "purchase_order",
        ["sale", "buyer_id"],
        unique=True,
        postgresql_where=sa.text("state IN ('reserved', 'paid')"),
    )
    op.create_index(
        "orders_due",
        "purchase_order",
        ["pay_by"],
        unique=False,
        postgresql_where=sa.text("state = 'reserved'"),
    )
    op.create_table(
        "refused_claim",
        sa.Column("order_no", sa.Text(), nullable=False),
        sa.Column("sale", sa.Text(), nullable=False),
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("buyer_id", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("units", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("returned", sa.Boolean(), nullable=False),
        sa.Column("at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("order_no"),
    )
    op.create_table(
        "sale",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="draft", nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=True),
        sa.Column("line_opens_at", pg.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("opens_at", pg.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("closes_at", pg.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("draw_freeze_s", sa.Integer(), nullable=False),
        sa.Column("beacon", sa.Text(), server_default="none", nullable=False),
        sa.Column("beacon_wait_s", sa.Integer(), nullable=False),
        sa.Column("beacon_value", sa.Text(), nullable=True),
        sa.Column("beacon_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("pay_within_s", sa.Integer(), nullable=False),
        sa.Column("limit_per_buyer", sa.Integer(), nullable=False),
        sa.Column("rate_per_s", sa.Double(), nullable=True),
        sa.Column("standby", sa.Boolean(), nullable=False),
        sa.Column("line_max", sa.BigInteger(), nullable=False),
        sa.Column("pass_mode", sa.Text(), nullable=False),
        sa.Column("challenge", sa.Text(), nullable=False),
        sa.Column("audience", pg.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("channels", pg.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("default_channel", sa.Text(), nullable=True),
        sa.Column("return_urls", pg.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("seed", pg.BYTEA(), nullable=True),
        sa.Column("copy_of", sa.Text(), nullable=True),
        sa.Column("epoch", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("home", sa.Text(), nullable=True),
        sa.Column("pulse", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("published_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("opened_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("sold_out_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("closed_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("settled_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('draft', 'scheduled', 'open', 'paused', 'closed', 'settled')", name="sale_state_known"
        ),
        sa.CheckConstraint("NOT standby OR limit_per_buyer = 1", name="standby_means_one_unit"),
        sa.CheckConstraint("limit_per_buyer >= 1", name="limit_positive"),
        sa.CheckConstraint("line_opens_at <= opens_at AND opens_at < closes_at", name="sale_times_in_order"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "sms",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("order_no", sa.Text(), nullable=False),
        sa.Column("sale", sa.Text(), nullable=False),
        sa.Column("template", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=True),
        sa.Column("provider_ref", sa.Text(), nullable=True),
        sa.Column("code", sa.Text(), nullable=True),
        sa.Column("created_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", pg.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("sent_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("next_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("leased_until", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint(
            "state IN ('due', 'sending', 'sent', 'failed', 'unknown', 'dropped')", name="sms_state_known"
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("order_no", "template", name="one_sms_a_step"),
    )
    op.create_index(
        "sms_due", "sms", ["next_at"], unique=False, postgresql_where=sa.text("state IN ('due', 'sending')")
    )
    op.create_table(
        "webhook_endpoint",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("events", pg.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("secret", pg.BYTEA(), nullable=False),
        sa.Column("created_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("deleted_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "webhook_inbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("body", pg.BYTEA(), nullable=False),
        sa.Column(
            "received_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("provider", "event_id", name="one_row_an_event"),
    )
    op.create_table(
        "item",
        sa.Column("sale", sa.Text(), nullable=False),
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("price_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("reserved", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("sold", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("epoch", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("paused_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("price_minor >= 0", name="price_not_negative"),
        sa.CheckConstraint("reserved >= 0 AND sold >= 0 AND reserved + sold <= total", name="never_oversold"),
        sa.ForeignKeyConstraint(
            ["sale"],
            ["sale.id"],
        ),
        sa.PrimaryKeyConstraint("sale", "sku"),
        sa.UniqueConstraint("sale", "position", name="one_item_a_position"),
    )
    op.create_table(
        "payment_attempt",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("order_no", sa.Text(), nullable=False),
        sa.Column("attempt_no", sa.Integer(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=True),
        sa.Column("url", sa.Text(), nullable=True),
        sa.Column("params", pg.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("return_url", sa.Text(), nullable=True),
        sa.Column("payer", pg.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("provider_ref", sa.Text(), nullable=True),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=True),
        sa.Column("created_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("sent_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("expires_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("ended_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("next_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("leased_until", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint(
            "state IN ('wanted', 'created', 'sent', 'unknown', 'succeeded', 'failed', 'closed')",
            name="attempt_state_known",
        ),
        sa.ForeignKeyConstraint(
            ["order_no"],
            ["purchase_order.order_no"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("order_no", "attempt_no", name="one_number_an_attempt"),
    )
    op.create_index(
        "attempts_due",
        "payment_attempt",
        ["next_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('wanted', 'created', 'sent', 'unknown')"),
    )
    op.create_index(
        "one_open_attempt_an_order",
        "payment_attempt",
        ["order_no"],
        unique=True,
        postgresql_where=sa.text("state IN ('created', 'sent', 'unknown', 'succeeded')"),
    )
    op.create_table(
        "refund",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("capture_id", sa.BigInteger(), nullable=False),
        sa.Column("order_no", sa.Text(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("restock", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("provider_ref", sa.Text(), nullable=True),
        sa.Column("created_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("done_at", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("next_at", pg.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("leased_until", pg.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint(
            "state IN ('due', 'sent', 'unknown', 'done', 'failed')", name="refund_state_known"
        ),
        sa.CheckConstraint("amount_minor > 0", name="refund_positive"),
        sa.ForeignKeyConstraint(
            ["capture_id"],
            ["capture.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "refunds_due",
        "refund",
        ["next_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('due', 'sent', 'unknown')"),
    )
    op.create_index("refunds_of_order", "refund", ["order_no"], unique=False)


def downgrade() -> None:
    """There is nothing before the first release."""
    raise NotImplementedError("drop the database instead")
