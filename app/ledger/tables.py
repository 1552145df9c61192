"""The tables of Postgres, the arbiter. Migrations create exactly these; a test compares the two.

Money is `*_minor` (integer minor units) with `currency`. Times are `timestamptz`, `*_at` / `*_by`, by Postgres' clock.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BYTEA, JSONB, TIMESTAMP

metadata = sa.MetaData()
At = TIMESTAMP(timezone=True)
NOW = sa.text("now()")

SALE_STATES = ("draft", "scheduled", "open", "paused", "closed", "settled")
ORDER_STATES = ("reserved", "paid", "expired", "cancelled", "refunding", "refunded")
ATTEMPT_STATES = ("wanted", "created", "sent", "unknown", "succeeded", "failed", "closed")
CAPTURE_STATES = ("due", "kept", "refund_due", "refunded")
REFUND_STATES = ("due", "sent", "unknown", "done", "failed")
OUTBOX_KINDS = ("mark", "release", "stock_add", "stock_take", "switch")
OUTBOX_STATES = ("due", "intent", "done", "dropped")  # intent: of the office, no relay takes it
BILL_STATES = ("due", "read")
DELIVERY_STATES = ("due", "delivered", "failed")
SMS_STATES = ("due", "sending", "sent", "failed", "unknown", "dropped")

LIVE_ORDER = "state IN ('reserved', 'paid')"
ENDED_ORDER = "state IN ('expired', 'cancelled', 'refunded')"
OPEN_ATTEMPT = "state IN ('created', 'sent', 'unknown', 'succeeded')"


def _one_of(column: str, words: tuple[str, ...], name: str) -> sa.CheckConstraint:
    """A word that is not in the list is refused by Postgres, whoever wrote it."""
    return sa.CheckConstraint(f"{column} IN ({', '.join(repr(word) for word in words)})", name=name)


sale = sa.Table(
    "sale",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("title", sa.Text, nullable=False),
    # draft -> scheduled -> open <-> paused -> closed -> settled; line_open and sold_out are computed
    sa.Column("state", sa.Text, nullable=False, server_default="draft"),
    sa.Column(
        "version", sa.BigInteger, nullable=False, server_default="1"
    ),  # If-Match, and the guard of sale_switch
    sa.Column("time_zone", sa.Text),
    sa.Column("line_opens_at", At, nullable=False),
    sa.Column("opens_at", At, nullable=False),
    sa.Column("closes_at", At, nullable=False),
    sa.Column("draw_freeze_s", sa.Integer, nullable=False),
    sa.Column(
        "beacon", sa.Text, nullable=False, server_default="none"
    ),  # the public source, named at publish
    sa.Column("beacon_wait_s", sa.Integer, nullable=False),
    sa.Column("beacon_value", sa.Text),
    sa.Column("beacon_at", At),
    sa.Column("pay_within_s", sa.Integer, nullable=False),
    sa.Column("limit_per_buyer", sa.Integer, nullable=False),
    sa.Column("rate_per_s", sa.Double),  # null: as fast as stock allows
    sa.Column("standby", sa.Boolean, nullable=False),
    sa.Column("line_max", sa.BigInteger, nullable=False),
    sa.Column("pass_mode", sa.Text, nullable=False),  # optional | required
    sa.Column("challenge", sa.Text, nullable=False),  # none | pow | captcha
    sa.Column("audience", JSONB),
    sa.Column("channels", JSONB, nullable=False),
    sa.Column("default_channel", sa.Text),
    sa.Column("return_urls", JSONB, nullable=False),
    sa.Column("message", sa.Text),
    sa.Column("seed", BYTEA),  # 32 random bytes, secret until the opening
    sa.Column("copy_of", sa.Text),
    sa.Column("epoch", sa.BigInteger, nullable=False, server_default="1"),
    sa.Column("home", sa.Text),  # run_id of the Redis that holds the sale
    sa.Column("pulse", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("created_at", At, nullable=False, server_default=NOW),
    sa.Column("published_at", At),
    sa.Column("opened_at", At),
    sa.Column("sold_out_at", At),
    sa.Column("closed_at", At),
    sa.Column("settled_at", At),
    sa.Column("contacts_removed_at", At),  # settled_keep_days after settled_at
    _one_of("state", SALE_STATES, "sale_state_known"),
    sa.CheckConstraint("line_opens_at <= opens_at AND opens_at < closes_at", name="sale_times_in_order"),
    sa.CheckConstraint("limit_per_buyer >= 1", name="limit_positive"),
    sa.CheckConstraint("NOT standby OR limit_per_buyer = 1", name="standby_means_one_unit"),
)

# Those that something is still to happen to: some, of all that ever were.
sa.Index(
    "sales_under_way",
    sale.c.state,
    postgresql_where=sa.text("state IN ('scheduled', 'open', 'paused', 'closed')"),
)

item = sa.Table(
    "item",
    metadata,
    sa.Column("sale", sa.Text, sa.ForeignKey("sale.id"), primary_key=True),
    sa.Column("sku", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),  # 0-based; the ticket token names the item by it
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("price_minor", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("total", sa.BigInteger, nullable=False),
    sa.Column("reserved", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("sold", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("epoch", sa.BigInteger, nullable=False, server_default="1"),
    sa.Column(
        "paused_at", At
    ),  # set when Postgres refused for lack of stock: an alert, admission of the item stops
    sa.Column(
        "epoch_starts", JSONB
    ),  # [[epoch, first seq], …] of every epoch but the first; null: no rebuild
    sa.CheckConstraint("reserved >= 0 AND sold >= 0 AND reserved + sold <= total", name="never_oversold"),
    sa.CheckConstraint("price_minor >= 0", name="price_not_negative"),
    sa.UniqueConstraint("sale", "position", name="one_item_a_position"),
)

purchase_order = sa.Table(
    "purchase_order",
    metadata,
    sa.Column("order_no", sa.Text, primary_key=True),
    sa.Column("sale", sa.Text, nullable=False),
    sa.Column("sku", sa.Text, nullable=False),
    sa.Column("buyer_id", sa.Text, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("units", sa.Integer, nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),  # sum of order lines and adjustments
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column(
        "state", sa.Text, nullable=False
    ),  # reserved | paid | expired | cancelled | refunding | refunded
    sa.Column("version", sa.BigInteger, nullable=False, server_default="1"),
    sa.Column("reason", sa.Text),  # why it ended: left, unpaid, operator, live_order, no_stock, late_money
    sa.Column("leaving", sa.Boolean, nullable=False, server_default=sa.text("false")),
    sa.Column("claimed_at", At, nullable=False),
    sa.Column("reserved_at", At, nullable=False, server_default=NOW),
    sa.Column("pay_within_s", sa.Integer, nullable=False),
    sa.Column("pay_by", At),  # null until the first link is stored (or link_wait_max_s passed)
    # of this deadline: what deadline_extension adds up to, because payment was down
    sa.Column("extended_s", sa.Integer, nullable=False, server_default="0"),
    sa.Column("paid_at", At),
    sa.Column("ended_at", At),
    sa.Column("contact", BYTEA),  # sealed phone and language (AES-GCM)
    sa.Column("phone_index", BYTEA),  # keyed hash of sale and phone: finds an order, tells nothing else
    sa.Column("leased_until", At),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"),
    sa.CheckConstraint("units >= 1", name="units_positive"),
    _one_of("state", ORDER_STATES, "order_state_known"),
    sa.CheckConstraint("amount_minor >= 0", name="amount_not_negative"),
    sa.UniqueConstraint("sale", "sku", "epoch", "seq", name="one_order_a_ticket"),
)
sa.Index(
    "one_live_order_a_buyer",
    purchase_order.c.sale,
    purchase_order.c.buyer_id,
    unique=True,
    postgresql_where=sa.text(LIVE_ORDER),
)
sa.Index("orders_due", purchase_order.c.pay_by, postgresql_where=sa.text("state = 'reserved'"))
sa.Index(
    "orders_leaving",
    purchase_order.c.order_no,
    postgresql_where=sa.text("state = 'reserved' AND leaving"),
)
# A buyer who comes back: the contact is taken over from the ended order. Partial, so that it costs confirm nothing.
sa.Index(
    "ended_orders_of_buyer",
    purchase_order.c.sale,
    purchase_order.c.buyer_id,
    postgresql_where=sa.text(ENDED_ORDER),
)
# Partial: an order without a phone number costs confirm nothing.
sa.Index(
    "orders_of_phone",
    purchase_order.c.sale,
    purchase_order.c.phone_index,
    postgresql_where=sa.text("phone_index IS NOT NULL"),
)

order_line = sa.Table(
    "order_line",
    metadata,
    # What was claimed is no row: it follows from the order and its item (ledger/orders.py, lines); an adjustment is.
    # No foreign key: a line is only ever written in the transaction that writes its order, and the check of a foreign
    # key would cost confirm one index look-up and one row lock for each.
    sa.Column("order_no", sa.Text, primary_key=True),
    sa.Column("line_no", sa.Integer, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),  # item | adjustment
    sa.Column("sku", sa.Text),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("units", sa.Integer, nullable=False),
    sa.Column("unit_minor", sa.BigInteger, nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
)

payment_attempt = sa.Table(
    "payment_attempt",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),  # also the idempotency key at the supplier
    sa.Column("order_no", sa.Text, sa.ForeignKey("purchase_order.order_no"), nullable=False),
    sa.Column("attempt_no", sa.Integer, nullable=False),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("channel", sa.Text, nullable=False),
    # wanted (asked for while another is open) | created | sent | unknown | succeeded | failed | closed
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("kind", sa.Text),  # redirect | qr | sdk
    sa.Column("url", sa.Text),
    sa.Column("params", JSONB),
    sa.Column("return_url", sa.Text),
    sa.Column("payer", JSONB),
    sa.Column("provider_ref", sa.Text),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("code", sa.Text),  # why it failed
    sa.Column("created_at", At, nullable=False, server_default=NOW),
    sa.Column("sent_at", At),
    sa.Column("expires_at", At),
    sa.Column("ended_at", At),
    sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("next_at", At, nullable=False, server_default=NOW),
    sa.Column("leased_until", At),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"),
    _one_of("state", ATTEMPT_STATES, "attempt_state_known"),
    sa.UniqueConstraint("order_no", "attempt_no", name="one_number_an_attempt"),
)
sa.Index(
    "one_open_attempt_an_order",
    payment_attempt.c.order_no,
    unique=True,
    postgresql_where=sa.text(OPEN_ATTEMPT),
)
sa.Index(
    "attempts_due",
    payment_attempt.c.next_at,
    postgresql_where=sa.text("state IN ('wanted', 'created', 'sent', 'unknown')"),
)

capture = sa.Table(
    "capture",
    metadata,
    # Money that verifiably arrived; recorded before any index can refuse it.
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("provider_ref", sa.Text, nullable=False),
    sa.Column("order_no", sa.Text, nullable=False),
    sa.Column("attempt_id", sa.Text),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    # due (not yet weighed) | kept | refund_due | refunded
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("captured_at", At, nullable=False),
    sa.Column("recorded_at", At, nullable=False, server_default=NOW),
    _one_of("state", CAPTURE_STATES, "capture_state_known"),
    sa.CheckConstraint("amount_minor > 0", name="capture_positive"),
    sa.UniqueConstraint("provider", "provider_ref", name="one_capture_a_ref"),
)
sa.Index("captures_of_order", capture.c.order_no)
sa.Index("captures_due", capture.c.id, postgresql_where=sa.text("state = 'due'"))
sa.Index("captures_by_day", capture.c.provider, capture.c.captured_at)
sa.Index(
    "one_kept_capture_an_order", capture.c.order_no, unique=True, postgresql_where=sa.text("state = 'kept'")
)

refund = sa.Table(
    "refund",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),  # also the idempotency key at the supplier
    sa.Column("capture_id", sa.BigInteger, sa.ForeignKey("capture.id"), nullable=False),
    sa.Column("order_no", sa.Text, nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column(
        "restock", sa.Boolean, nullable=False, server_default=sa.text("false")
    ),  # whether the order's units go back
    sa.Column("state", sa.Text, nullable=False),  # due | sent | unknown | done | failed
    sa.Column("provider_ref", sa.Text),
    sa.Column("created_at", At, nullable=False, server_default=NOW),
    sa.Column("done_at", At),
    sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("next_at", At, nullable=False, server_default=NOW),
    sa.Column("leased_until", At),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"),
    _one_of("state", REFUND_STATES, "refund_state_known"),
    sa.CheckConstraint("amount_minor > 0", name="refund_positive"),
)
sa.Index("refunds_due", refund.c.next_at, postgresql_where=sa.text("state IN ('due', 'sent', 'unknown')"))
sa.Index("refunds_of_order", refund.c.order_no)

webhook_inbox = sa.Table(
    "webhook_inbox",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("event_id", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("body", BYTEA, nullable=False),  # SHA-256 of the raw bytes, which may say who paid
    sa.Column("received_at", At, nullable=False, server_default=NOW),
    sa.Column("outcome", sa.Text),
    sa.UniqueConstraint("provider", "event_id", name="one_row_an_event"),
)

payment_outage = sa.Table(
    "payment_outage",
    metadata,
    # Times when a supplier could not be paid through: open while it is seen out again and again (ledger/outages.py).
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("began_at", At, nullable=False, server_default=NOW),
    sa.Column("seen_at", At, nullable=False, server_default=NOW),
)
sa.Index("outages_of_provider", payment_outage.c.provider, payment_outage.c.seen_at)

deadline_extension = sa.Table(
    "deadline_extension",
    metadata,
    # Time to pay that an order got because of an outage; the key is the law: once for each outage.
    sa.Column("order_no", sa.Text, sa.ForeignKey("purchase_order.order_no"), primary_key=True),
    sa.Column("outage", sa.BigInteger, sa.ForeignKey("payment_outage.id"), primary_key=True),
    sa.Column("at", At, nullable=False, server_default=NOW),
    sa.Column("pay_by_before", At, nullable=False),
    sa.Column("extended_s", sa.Integer, nullable=False),
    sa.Column("most_s", sa.Integer, nullable=False),  # of all extensions of an order, as it was set then
    sa.CheckConstraint("extended_s > 0", name="extension_never_shortens"),
)

bill = sa.Table(
    "bill",
    metadata,
    # A supplier's bill of one UTC day.
    sa.Column("provider", sa.Text, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("state", sa.Text, nullable=False, server_default="due"),  # due | read
    sa.Column("lines", sa.Integer),  # captures and refunds on it
    sa.Column("read_at", At),
    sa.Column("code", sa.Text),  # why it could not be read
    sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("next_at", At, nullable=False, server_default=NOW),
    sa.Column("leased_until", At),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"),
    _one_of("state", BILL_STATES, "bill_state_known"),
)

bill_line = sa.Table(
    "bill_line",
    metadata,
    sa.Column("provider", sa.Text, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("n", sa.Integer, primary_key=True),
    sa.Column("what", sa.Text, nullable=False),  # capture | refund
    sa.Column("provider_ref", sa.Text, nullable=False),
    sa.Column("our_id", sa.Text, nullable=False),  # of the attempt or the refund, as the supplier has it
    sa.Column("order_no", sa.Text, nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("at", At, nullable=False),
)
sa.Index("bill_lines_by_ref", bill_line.c.provider, bill_line.c.provider_ref)
sa.Index("bill_lines_by_our_id", bill_line.c.provider, bill_line.c.our_id)

bill_difference = sa.Table(
    "bill_difference",
    metadata,
    sa.Column("provider", sa.Text, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),  # missing_here | missing_there | other_amount
    sa.Column("what", sa.Text, primary_key=True),  # capture | refund
    sa.Column("ref", sa.Text, primary_key=True),  # the supplier's
    sa.Column("our_id", sa.Text, primary_key=True),
    sa.Column("order_no", sa.Text, nullable=False),
    sa.Column("ours_minor", sa.BigInteger),
    sa.Column("theirs_minor", sa.BigInteger),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("at", At, nullable=False),
    sa.Column("found_at", At, nullable=False, server_default=NOW),
    sa.Column("cleared_at", At),
)

outbox = sa.Table(
    "outbox",
    metadata,
    # What Postgres has decided and Redis must still be told: Redis gets it once, by an idempotent script.
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("sale", sa.Text, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("order_no", sa.Text),
    sa.Column("payload", JSONB, nullable=False),
    sa.Column(
        "state", sa.Text, nullable=False, server_default="due"
    ),  # due | done | dropped (cancelled, or of an old epoch)
    sa.Column("created_at", At, nullable=False, server_default=NOW),
    sa.Column("done_at", At),
    sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("leased_until", At),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"),
    _one_of("kind", OUTBOX_KINDS, "outbox_kind_known"),
    _one_of("state", OUTBOX_STATES, "outbox_state_known"),
)
sa.Index("outbox_due", outbox.c.id, postgresql_where=sa.text("state = 'due'"))
sa.Index("outbox_of_order", outbox.c.order_no)

sms = sa.Table(
    "sms",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("order_no", sa.Text, nullable=False),
    sa.Column("sale", sa.Text, nullable=False),
    sa.Column("template", sa.Text, nullable=False),  # reserved | paid | expired | cancelled | refunded
    sa.Column("state", sa.Text, nullable=False),  # due | sending | sent | failed | unknown | dropped
    sa.Column("provider", sa.Text),
    sa.Column("provider_ref", sa.Text),
    sa.Column("code", sa.Text),
    sa.Column("created_at", At, nullable=False, server_default=NOW),
    sa.Column("expires_at", At, nullable=False),
    sa.Column("sent_at", At),
    sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("next_at", At, nullable=False, server_default=NOW),
    sa.Column("leased_until", At),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("delivered_at", At),  # the supplier reports that the phone has it
    sa.Column(
        "shown", sa.Text
    ),  # on the ticket instead, because no channel took it in time; '' = nothing to show
    sa.Column(
        "counted", sa.Boolean, nullable=False, server_default=sa.text("false")
    ),  # under its number's limits
    _one_of("state", SMS_STATES, "sms_state_known"),
    sa.UniqueConstraint("order_no", "template", name="one_sms_a_step"),
)
sa.Index(
    "sms_by_ref", sms.c.provider, sms.c.provider_ref, postgresql_where=sa.text("provider_ref IS NOT NULL")
)
sa.Index(
    "sms_unshown",
    sms.c.created_at,
    postgresql_where=sa.text("shown IS NULL AND state IN ('due', 'unknown', 'failed')"),
)
sa.Index("sms_due", sms.c.next_at, postgresql_where=sa.text("state IN ('due', 'sending')"))

event = sa.Table(
    "event",
    metadata,
    # What the shop is told. `position` is given in commit order (see ledger/events.py), so a cursor never skips one.
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("position", sa.BigInteger),  # null until numbered
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("sale", sa.Text, nullable=False),
    sa.Column("order_no", sa.Text),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("at", At, nullable=False, server_default=NOW),
    sa.Column("data", JSONB, nullable=False),
    sa.Column("written", sa.BigInteger, sa.Identity(), nullable=False),
)
# Not over nulls: confirm would write an index entry for each new event, only to have it replaced when it is numbered.
sa.Index(
    "one_event_a_position", event.c.position, unique=True, postgresql_where=sa.text("position IS NOT NULL")
)
sa.Index("events_to_number", event.c.written, postgresql_where=sa.text("position IS NULL"))

event_batch = sa.Table(
    "event_batch",
    metadata,
    # The order.reserved of a whole batch of confirm, in one row: the numbering step makes it one `event` row an order,
    # each with its position, and removes it. One sequence for both, so that they are numbered in the order of writing.
    sa.Column(
        "written", sa.BigInteger, primary_key=True, server_default=sa.text("nextval('event_written_seq')")
    ),
    sa.Column("sale", sa.Text, nullable=False),
    sa.Column("at", At, nullable=False, server_default=NOW),
    sa.Column("order_nos", sa.ARRAY(sa.Text), nullable=False),
)

webhook_endpoint = sa.Table(
    "webhook_endpoint",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("events", JSONB, nullable=False),
    sa.Column("secret", BYTEA, nullable=False),  # sealed (AES-GCM)
    sa.Column("secret_before", BYTEA),  # the one that was rotated out, sealed; signs too until:
    sa.Column("secret_before_until", At),
    sa.Column("told_to", sa.BigInteger),  # events up to this position have their deliveries; null: none yet
    sa.Column("disabled_at", At),
    sa.Column("disabled_why", sa.Text),  # gone: it answered 410
    sa.Column("created_at", At, nullable=False, server_default=NOW),
    sa.Column("deleted_at", At),
)

webhook_delivery = sa.Table(
    "webhook_delivery",
    metadata,
    # One event for one endpoint, until it was taken with a 2xx or nobody wants it any more.
    sa.Column("endpoint", sa.Text, sa.ForeignKey("webhook_endpoint.id"), primary_key=True),
    sa.Column("event", sa.Text, sa.ForeignKey("event.id"), primary_key=True),
    sa.Column("state", sa.Text, nullable=False, server_default="due"),  # due | delivered | failed
    sa.Column("status", sa.Integer),  # of the last answer
    sa.Column("code", sa.Text),  # why the last try failed
    sa.Column("created_at", At, nullable=False, server_default=NOW),
    sa.Column("expires_at", At, nullable=False),
    sa.Column("ended_at", At),
    sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("next_at", At, nullable=False, server_default=NOW),
    sa.Column("leased_until", At),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="0"),
    _one_of("state", DELIVERY_STATES, "delivery_state_known"),
)
sa.Index(
    "deliveries_due",
    webhook_delivery.c.endpoint,
    webhook_delivery.c.next_at,
    postgresql_where=sa.text("state = 'due'"),
)
sa.Index("deliveries_ended", webhook_delivery.c.ended_at, postgresql_where=sa.text("ended_at IS NOT NULL"))

journal = sa.Table(
    "journal",
    metadata,
    # Append-only, hash-chained: hash = SHA-256(prev_hash || canonical JSON of the row).
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column("at", At, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("sale", sa.Text),
    sa.Column("reason", sa.Text),
    sa.Column("detail", JSONB, nullable=False),
    sa.Column("prev_hash", BYTEA, nullable=False),
    sa.Column("hash", BYTEA, nullable=False),
)

operator_key = sa.Table(
    "operator_key",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),  # viewer | operator | admin
    sa.Column(
        "key_hash", BYTEA, nullable=False, unique=True
    ),  # SHA-256; keys are 32 random bytes, no salt needed
    sa.Column("created_at", At, nullable=False, server_default=NOW),
    sa.Column("revoked_at", At),
)

provider_route = sa.Table(
    "provider_route",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),  # `sms` or `payment:<channel>`
    sa.Column("route", JSONB, nullable=False),  # [[supplier, weight], …]: the order counts, objects have none
    sa.Column("set_at", At, nullable=False, server_default=NOW),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("actor", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("request_hash", BYTEA, nullable=False),  # of method, path and body
    sa.Column("status", sa.Integer),  # null while the first call is still running
    sa.Column("response", JSONB),
    sa.Column("created_at", At, nullable=False, server_default=NOW),
)

dead_letter = sa.Table(
    "dead_letter",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("sale", sa.Text, nullable=False),
    sa.Column("stream", sa.Text, nullable=False),  # orders | asks
    sa.Column("entry_id", sa.Text, nullable=False),
    sa.Column("entry", JSONB, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", At, nullable=False, server_default=NOW),
    sa.UniqueConstraint("sale", "stream", "entry_id", name="one_letter_an_entry"),
)

refused_claim = sa.Table(
    "refused_claim",
    metadata,
    # A claim that Postgres refused (live order, no stock, dead letter): its ticket is cancelled, no order row exists.
    sa.Column("order_no", sa.Text, primary_key=True),
    sa.Column("sale", sa.Text, nullable=False),
    sa.Column("sku", sa.Text, nullable=False),
    sa.Column("buyer_id", sa.Text, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("units", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),  # live_order | no_stock | poison | old_epoch
    sa.Column("returned", sa.Boolean, nullable=False),  # whether its units go back to Redis
    sa.Column("at", At, nullable=False, server_default=NOW),
)
