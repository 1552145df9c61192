# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""Call-backs and captures: one function for each SQL intent; the caller owns the transaction."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger import orders
from app.ledger.engine import driver

Row = dict[str, Any]


async def inbox_add(
    conn: AsyncConnection, provider: str, event_id: str, kind: str, digest: bytes, outcome: str
) -> bool:
    """A verified call-back is on record. False: it was before; do nothing again."""
    found = await conn.execute(
        text(
            "INSERT INTO webhook_inbox (provider, event_id, kind, body, outcome)"
            " VALUES (:provider, :event_id, :kind, :body, :outcome) ON CONFLICT (provider, event_id) DO NOTHING"
        ),
        {"provider": provider, "event_id": event_id, "kind": kind, "body": digest, "outcome": outcome},
    )
    return bool(found.rowcount)


async def add(
    conn: AsyncConnection,
    *,
    provider: str,
    provider_ref: str,
    order_no: str,
    attempt_id: str,
    amount_minor: int,
    currency: str,
    captured_at: datetime,
) -> int | None:
    """Money has verifiably arrived: on record as `due`, whatever is decided next. None: it was on record before."""
    found = await conn.execute(
        text(
            "INSERT INTO capture (provider, provider_ref, order_no, attempt_id, amount_minor, currency, state,"
            " captured_at) VALUES (:provider, :provider_ref, :order_no, :attempt_id, :amount_minor, :currency, 'due',"
            " :captured_at) ON CONFLICT (provider, provider_ref) DO NOTHING RETURNING id"
        ),
        {
            "provider": provider,
            "provider_ref": provider_ref,
            "order_no": order_no,
            "attempt_id": attempt_id,
            "amount_minor": amount_minor,
            "currency": currency,
            "captured_at": captured_at,
        },
    )
    made = found.scalar_one_or_none()
    return None if made is None else int(made)


# The plain case of a call-back: verified money for a reserved order, told for the first time. One statement, so one
# round trip and one commit, and the item's row (which every order wants) is locked for that long only. It does what
# inbox_add, add, orders.pay, keep, succeed and look_at_others do one after the other (a test compares), or, where
# anything is not plain, nothing. A row that another transaction holds is waited for and looked at again.
_PAY_PLAINLY = """
WITH heard AS (SELECT FROM webhook_inbox WHERE provider = $1 AND event_id = $2),
plain AS (SELECT o.order_no FROM purchase_order o JOIN payment_attempt a ON a.id = $5 AND a.order_no = o.order_no
  AND a.provider = $1 AND a.amount_minor = $7 AND a.currency = $8
  WHERE o.order_no = $6 AND o.state = 'reserved' AND NOT EXISTS (SELECT FROM heard)
  AND NOT EXISTS (SELECT FROM capture WHERE provider = $1 AND provider_ref = $4) FOR UPDATE OF o),
inbox AS (INSERT INTO webhook_inbox (provider, event_id, kind, body, outcome)
  SELECT $1, $2, 'paid', $3, 'paid' FROM plain),
kept AS (INSERT INTO capture (provider, provider_ref, order_no, attempt_id, amount_minor, currency, state, captured_at)
  SELECT $1, $4, $6, $5, $7, $8, 'kept', $9 FROM plain),
paid AS (UPDATE purchase_order AS o SET state = 'paid', paid_at = now(), version = version + 1, leaving = FALSE,
  reason = NULL, leased_until = NULL FROM plain WHERE o.order_no = plain.order_no AND o.state = 'reserved'
  RETURNING o.order_no, o.sale, o.sku, o.seq, o.epoch, o.buyer_id, o.units, o.amount_minor, o.currency, o.version,
  o.contact),
moved AS (UPDATE item SET reserved = reserved - paid.units, sold = sold + paid.units FROM paid
  WHERE item.sale = paid.sale AND item.sku = paid.sku),
told AS (INSERT INTO event (id, type, sale, order_no, version, data)
  SELECT 'evt-' || order_no || '-' || version || '-paid', 'order.paid', sale, order_no, version, jsonb_build_object(
  'order_no', order_no, 'sale', sale, 'sku', sku, 'buyer_id', buyer_id, 'units', units, 'amount_minor', amount_minor,
  'currency', currency, 'state', 'paid', 'reason', NULL) FROM paid ON CONFLICT (id) DO NOTHING),
texted AS (INSERT INTO sms (id, order_no, sale, template, state, expires_at)
  SELECT order_no || '-paid', order_no, sale, 'paid', 'due', now() + make_interval(secs => $10) FROM paid
  WHERE contact IS NOT NULL ON CONFLICT (order_no, template) DO NOTHING),
marked AS (INSERT INTO outbox (kind, sale, epoch, order_no, payload)
  SELECT 'mark', sale, epoch, order_no, jsonb_build_object('sku', sku, 'seq', seq) FROM paid),
succeeded AS (UPDATE payment_attempt AS a SET state = 'succeeded', code = NULL, ended_at = now(), leased_until = NULL,
  payer = payer - 'address', generation = generation + 1 FROM paid
  WHERE a.id = $5 AND a.state <> 'succeeded' AND NOT EXISTS (SELECT FROM payment_attempt AS other
  WHERE other.order_no = $6 AND other.id <> $5 AND other.state IN ('created', 'sent', 'unknown', 'succeeded'))),
others AS (UPDATE payment_attempt AS a SET next_at = now() FROM paid WHERE a.order_no = $6 AND a.id <> $5
  AND a.state IN ('wanted', 'created', 'sent', 'unknown'))
SELECT CASE WHEN EXISTS (SELECT FROM heard) THEN 'duplicate' WHEN EXISTS (SELECT FROM paid) THEN 'paid' END
"""


async def pay_plainly(
    conn: AsyncConnection,
    *,
    provider: str,
    event_id: str,
    digest: bytes,
    provider_ref: str,
    order_no: str,
    attempt_id: str,
    amount_minor: int,
    currency: str,
    captured_at: datetime,
) -> Literal["paid", "duplicate"] | None:
    """The plain call-back, in one statement that commits by itself (`engine.alone`). None: not plain, or not certain.

    None changes nothing, or, where the connection was lost, may have: the long way looks before it acts, and says what
    is wrong.
    """
    try:
        found: Literal["paid", "duplicate"] | None = await (await driver(conn)).fetchval(
            _PAY_PLAINLY, provider, event_id, digest, provider_ref, attempt_id, order_no, amount_minor, currency,
            captured_at, float(orders.SMS_TTL_S),
        )  # fmt: skip
    except (asyncpg.PostgresError, asyncpg.InterfaceError):
        return None  # such as a unique index: a copy of this call-back was faster
    return found


CAPTURE_COLUMNS = (
    "id, provider, provider_ref, order_no, attempt_id, amount_minor, currency, state, captured_at,"
    " recorded_at"
)


async def locked(conn: AsyncConnection, capture_id: int) -> Row | None:
    """One capture; locked until the caller's transaction ends."""
    found = await conn.execute(
        text(f"SELECT {CAPTURE_COLUMNS} FROM capture WHERE id = :id FOR UPDATE"), {"id": capture_id}
    )
    row = found.mappings().first()
    return None if row is None else dict(row)


async def kept(conn: AsyncConnection, order_no: str) -> Row | None:
    """The capture that pays this order."""
    found = await conn.execute(
        text(f"SELECT {CAPTURE_COLUMNS} FROM capture WHERE order_no = :order_no AND state = 'kept'"),
        {"order_no": order_no},
    )
    row = found.mappings().first()
    return None if row is None else dict(row)


async def due(conn: AsyncConnection, limit: int) -> list[Row]:
    """Money that arrived for an ended order and is not weighed yet, oldest first."""
    found = await conn.execute(
        text(f"SELECT {CAPTURE_COLUMNS} FROM capture WHERE state = 'due' ORDER BY id LIMIT :limit"),
        {"limit": limit},
    )
    return [dict(row) for row in found.mappings()]


async def keep(conn: AsyncConnection, capture_id: int) -> bool:
    """This capture pays its order. False: it was weighed before."""
    found = await conn.execute(
        text("UPDATE capture SET state = 'kept' WHERE id = :id AND state = 'due'"), {"id": capture_id}
    )
    return bool(found.rowcount)


async def give_back(conn: AsyncConnection, capture_id: int, reason: str) -> bool:
    """This capture is refunded whole: its refund is due from now on. False: it was weighed before."""
    found = await conn.execute(
        text("UPDATE capture SET state = 'refund_due' WHERE id = :id AND state = 'due' RETURNING id"),
        {"id": capture_id},
    )
    if found.scalar_one_or_none() is None:
        return False
    await conn.execute(
        text(
            "INSERT INTO refund (id, capture_id, order_no, amount_minor, currency, reason, state)"
            " SELECT order_no || '-R' || id || '-1', id, order_no, amount_minor, currency, :reason, 'due'"
            " FROM capture WHERE id = :id"
        ),
        {"id": capture_id, "reason": reason},
    )
    return True
