"""Postgres' side of the audit: what the rows add up to, read as of one moment. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True)
class ItemBooks:
    """One item: the counters of its row, the same recomputed from orders, and what Redis has not heard yet."""

    sku: str
    total: int
    reserved: int
    sold: int
    reserved_units: int  # of orders in `reserved`
    sold_units: int  # of paid and refunding orders, and of refunded ones whose units were not put back
    orders: int  # rows of this epoch
    refused: int  # refused claims of this epoch
    unapplied: int  # units that outbox rows still have to bring back or add
    topped_up: int  # units of top-ups and takes that Redis has been told, in this epoch
    moved: int  # grows with every unit that moves: how much may change while two stores are read


@dataclass(frozen=True)
class Money:
    """One currency: what arrived, what went back, and what is owed."""

    currency: str
    captured: int
    refunded: int
    owned: int  # amounts of paid and refunding orders
    owing: int  # captures that belong to no order and are still to be refunded


@dataclass(frozen=True)
class SaleBooks:
    live_orders: int
    live_buyers: int
    most_units: int  # of one buyer's live orders
    orders: int
    told_orders: int  # orders whose order.reserved is in the feed, or on its way there
    lawful_orders: int  # orders whose times fit their state
    extended_orders: int  # orders whose deadline was extended
    rightly_extended: int  # of these, those whose extensions add up, stay within their limit and came in time
    paid_orders: int
    funded_orders: int  # paid orders that a capture paid for
    captured_orders: int  # orders with an unrefunded capture
    kept_captures: int  # unrefunded captures
    amount_minor: int  # of all orders
    lines_minor: int  # of all order lines (the first follows from the item's price) and adjustments


async def items(conn: AsyncConnection, sale: str) -> dict[str, ItemBooks]:
    found = await conn.execute(
        text(
            """
            SELECT i.sku, i.total, i.reserved, i.sold,
                   coalesce(o.reserved_units, 0) AS reserved_units, coalesce(o.sold_units, 0) AS sold_units,
                   coalesce(o.orders, 0) AS orders, coalesce(r.refused, 0) AS refused,
                   coalesce(b.unapplied, 0) AS unapplied, coalesce(b.topped_up, 0) AS topped_up,
                   coalesce(o.ever, 0) + coalesce(r.ever, 0) + coalesce(b.ever, 0) AS moved
            FROM item i
            LEFT JOIN (
                SELECT p.sku, count(*) FILTER (WHERE p.epoch = i2.epoch) AS orders, sum(p.units * p.version) AS ever,
                       sum(p.units) FILTER (WHERE p.state = 'reserved') AS reserved_units,
                       sum(p.units) FILTER (WHERE p.state IN ('paid', 'refunding') OR p.state = 'refunded'
                           AND p.paid_at IS NOT NULL AND NOT EXISTS (
                               SELECT 1 FROM outbox f WHERE f.order_no = p.order_no AND f.kind = 'release'
                               AND f.payload->>'to' = 'f' AND f.state <> 'dropped')) AS sold_units
                FROM purchase_order p JOIN item i2 ON i2.sale = p.sale AND i2.sku = p.sku
                WHERE p.sale = :sale GROUP BY p.sku
            ) o ON o.sku = i.sku
            LEFT JOIN (
                SELECT c.sku, count(*) FILTER (WHERE c.epoch = i3.epoch) AS refused, sum(c.units) AS ever
                FROM refused_claim c JOIN item i3 ON i3.sale = c.sale AND i3.sku = c.sku
                WHERE c.sale = :sale GROUP BY c.sku
            ) r ON r.sku = i.sku
            LEFT JOIN (
                SELECT x.payload->>'sku' AS sku,
                       sum((x.payload->>'units')::bigint) FILTER (
                           WHERE x.state = 'due' AND x.kind IN ('release', 'stock_add')) AS unapplied,
                       sum((x.payload->>'units')::bigint) FILTER (
                           WHERE x.state = 'done' AND x.kind IN ('stock_add', 'stock_take')) AS topped_up,
                       sum(abs((x.payload->>'units')::bigint) * CASE WHEN x.done_at IS NULL THEN 1 ELSE 2 END) AS ever
                FROM outbox x JOIN sale s ON s.id = x.sale
                WHERE x.sale = :sale AND x.epoch = s.epoch AND x.kind IN ('release', 'stock_add', 'stock_take')
                GROUP BY 1
            ) b ON b.sku = i.sku
            WHERE i.sale = :sale ORDER BY i.position
            """
        ),
        {"sale": sale},
    )
    return {
        row["sku"]: ItemBooks(**{name: _whole(value) for name, value in row.items()})
        for row in found.mappings()
    }


def _whole(value: Any) -> Any:
    """Postgres sums bigints to numerics."""
    return value if isinstance(value, str) else int(value)


async def of_sale(conn: AsyncConnection, sale: str) -> SaleBooks:
    found = await conn.execute(
        text(
            """
            SELECT
              (SELECT count(*) FROM purchase_order WHERE sale = :sale AND state IN ('reserved', 'paid')) AS live_orders,
              (SELECT count(DISTINCT buyer_id) FROM purchase_order
                WHERE sale = :sale AND state IN ('reserved', 'paid')) AS live_buyers,
              (SELECT coalesce(max(units), 0) FROM (SELECT sum(units) AS units FROM purchase_order
                WHERE sale = :sale AND state IN ('reserved', 'paid') GROUP BY buyer_id) AS each) AS most_units,
              (SELECT count(*) FROM purchase_order WHERE sale = :sale) AS orders,
              (SELECT count(*) FROM purchase_order p WHERE p.sale = :sale AND (EXISTS (
                SELECT 1 FROM event e WHERE e.order_no = p.order_no AND e.type = 'order.reserved')
                OR p.order_no IN (SELECT unnest(order_nos) FROM event_batch WHERE sale = :sale))) AS told_orders,
              (SELECT count(*) FROM purchase_order WHERE sale = :sale AND CASE state
                WHEN 'reserved' THEN paid_at IS NULL AND ended_at IS NULL
                WHEN 'paid' THEN paid_at IS NOT NULL AND ended_at IS NULL
                WHEN 'refunding' THEN paid_at IS NOT NULL AND ended_at IS NULL
                WHEN 'refunded' THEN ended_at IS NOT NULL
                ELSE ended_at IS NOT NULL AND paid_at IS NULL END) AS lawful_orders,
              (SELECT count(*) FROM purchase_order WHERE sale = :sale AND extended_s <> 0) AS extended_orders,
              (SELECT count(*) FROM purchase_order p JOIN (SELECT order_no, sum(extended_s) AS extended_s,
                    max(most_s) AS most_s, max(at) AS last_at, bool_and(at < pay_by_before) AS in_time,
                    max(pay_by_before + make_interval(secs => extended_s)) AS pay_by
                  FROM deadline_extension GROUP BY order_no) x ON x.order_no = p.order_no
                WHERE p.sale = :sale AND p.extended_s = x.extended_s AND p.extended_s <= x.most_s AND x.in_time
                AND p.pay_by >= x.pay_by AND x.last_at <= coalesce(p.ended_at, p.paid_at, x.last_at))
                AS rightly_extended,
              (SELECT count(*) FROM purchase_order WHERE sale = :sale AND state IN ('paid', 'refunding')
                AND amount_minor > 0) AS paid_orders,
              (SELECT count(*) FROM purchase_order p WHERE p.sale = :sale AND p.state IN ('paid', 'refunding')
                AND p.amount_minor > 0 AND EXISTS (SELECT 1 FROM capture c WHERE c.order_no = p.order_no
                AND c.state IN ('kept', 'refund_due', 'refunded'))) AS funded_orders,
              (SELECT count(DISTINCT c.order_no) FROM capture c JOIN purchase_order p ON p.order_no = c.order_no
                WHERE p.sale = :sale AND c.state IN ('due', 'kept')) AS captured_orders,
              (SELECT count(*) FROM capture c JOIN purchase_order p ON p.order_no = c.order_no
                WHERE p.sale = :sale AND c.state IN ('due', 'kept')) AS kept_captures,
              (SELECT coalesce(sum(amount_minor), 0) FROM purchase_order WHERE sale = :sale) AS amount_minor,
              (SELECT coalesce(sum(l.amount_minor), 0) FROM order_line l JOIN purchase_order p
                ON p.order_no = l.order_no WHERE p.sale = :sale)
              + (SELECT coalesce(sum(p.units * i.price_minor), 0) FROM purchase_order p JOIN item i
                ON i.sale = p.sale AND i.sku = p.sku WHERE p.sale = :sale AND NOT EXISTS (
                SELECT 1 FROM order_line l WHERE l.order_no = p.order_no AND l.line_no = 1)) AS lines_minor
            """
        ),
        {"sale": sale},
    )
    return SaleBooks(**{name: int(value) for name, value in found.mappings().one().items()})


async def money(conn: AsyncConnection, sale: str) -> list[Money]:
    """By currency. Money in transit is `owing`: captures still to be refunded, less what has gone back of them."""
    found = await conn.execute(
        text(
            """
            WITH mine AS (SELECT order_no, currency, amount_minor, state FROM purchase_order WHERE sale = :sale),
            back AS (SELECT r.capture_id, sum(r.amount_minor) AS amount FROM refund r JOIN mine m USING (order_no)
                WHERE r.state = 'done' GROUP BY r.capture_id),
            got AS (SELECT c.currency, c.state, c.amount_minor, coalesce(b.amount, 0) AS back, m.state AS order_state
                FROM capture c JOIN mine m USING (order_no) LEFT JOIN back b ON b.capture_id = c.id)
            SELECT u.currency,
                coalesce((SELECT sum(amount_minor) FROM got WHERE currency = u.currency), 0) AS captured,
                coalesce((SELECT sum(back) FROM got WHERE currency = u.currency), 0) AS refunded,
                coalesce((SELECT sum(amount_minor) FROM mine
                    WHERE currency = u.currency AND state IN ('paid', 'refunding')), 0) AS owned,
                coalesce((SELECT sum(amount_minor - back) FROM got WHERE currency = u.currency
                    AND (state IN ('due', 'refund_due')) AND NOT (order_state = 'refunding' AND state = 'refund_due')),
                    0) AS owing
            FROM (SELECT currency FROM mine UNION SELECT currency FROM got) AS u ORDER BY u.currency
            """
        ),
        {"sale": sale},
    )
    return [
        Money(r["currency"], *(int(r[n]) for n in ("captured", "refunded", "owned", "owing")))
        for r in found.mappings()
    ]


async def decided(conn: AsyncConnection, order_nos: Sequence[str]) -> set[str]:
    """Those of these claims that have their outcome: an order, or a refusal."""
    found = await conn.execute(
        text(
            "SELECT order_no FROM purchase_order WHERE order_no = ANY(CAST(:numbers AS text[]))"
            " UNION ALL SELECT order_no FROM refused_claim WHERE order_no = ANY(CAST(:numbers AS text[]))"
        ),
        {"numbers": list(order_nos)},
    )
    return {row.order_no for row in found}


async def states(
    conn: AsyncConnection, sale: str, sku: str, after_seq: int, limit: int
) -> Sequence[RowMapping]:
    """(seq, state, reason) of this epoch's orders that Redis has been told all about, by seq."""
    found = await conn.execute(
        text(
            "SELECT p.seq, p.state, p.reason FROM purchase_order p JOIN item i ON i.sale = p.sale AND i.sku = p.sku"
            " WHERE p.sale = :sale AND p.sku = :sku AND p.epoch = i.epoch AND p.seq > :after"
            " AND NOT EXISTS (SELECT 1 FROM outbox x WHERE x.order_no = p.order_no AND x.state = 'due')"
            " ORDER BY p.seq LIMIT :limit"
        ),
        {"sale": sale, "sku": sku, "after": after_seq, "limit": limit},
    )
    return found.mappings().all()


# ---- one order, for the desk ----------------------------------------------------------------------------------------


async def attempts(conn: AsyncConnection, order_no: str) -> Sequence[RowMapping]:
    found = await conn.execute(
        text(
            "SELECT id, attempt_no, provider, channel, state, provider_ref, code, created_at, expires_at"
            " FROM payment_attempt WHERE order_no = :order_no ORDER BY attempt_no"
        ),
        {"order_no": order_no},
    )
    return found.mappings().all()


async def captures(conn: AsyncConnection, order_no: str) -> Sequence[RowMapping]:
    found = await conn.execute(
        text(
            "SELECT id, provider, provider_ref, amount_minor, currency, state, captured_at"
            " FROM capture WHERE order_no = :order_no ORDER BY id"
        ),
        {"order_no": order_no},
    )
    return found.mappings().all()


async def refunds(conn: AsyncConnection, order_no: str) -> Sequence[RowMapping]:
    found = await conn.execute(
        text(
            "SELECT id, amount_minor, currency, reason, state, created_at, done_at"
            " FROM refund WHERE order_no = :order_no ORDER BY created_at, id"
        ),
        {"order_no": order_no},
    )
    return found.mappings().all()


async def under_way(conn: AsyncConnection, sale: str) -> dict[str, int]:
    """What of a sale is not at rest: unpaid orders, money to be weighed or given back, rows Redis is to be told."""
    found = await conn.execute(
        text(
            """
            SELECT (SELECT count(*) FROM purchase_order WHERE sale = :sale AND state IN ('reserved', 'refunding'))
                     AS orders,
                   (SELECT count(*) FROM outbox WHERE sale = :sale AND state = 'due') AS outbox,
                   (SELECT count(*) FROM capture c JOIN purchase_order p USING (order_no)
                     WHERE p.sale = :sale AND c.state IN ('due', 'refund_due')) AS captures,
                   (SELECT count(*) FROM payment_attempt a JOIN purchase_order p USING (order_no)
                     WHERE p.sale = :sale AND a.state IN ('wanted', 'created', 'sent', 'unknown')) AS attempts
            """
        ),
        {"sale": sale},
    )
    return {name: count for name, count in found.mappings().one().items() if count}
