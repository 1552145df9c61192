"""Everything Postgres holds of one sale, row by row: the end of a history (app/history/final.py). Reads only."""

from __future__ import annotations

from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

Row = dict[str, Any]

_STATEMENTS = {
    "sale": "SELECT id, state, epoch, limit_per_buyer, standby FROM sale WHERE id = :sale",
    "orders": (
        "SELECT order_no, sku, buyer_id, epoch, seq, units, amount_minor, currency, state, version, reason,"
        " CAST(round(extract(epoch FROM claimed_at) * 1000) AS bigint) AS claimed_ms"
        " FROM purchase_order WHERE sale = :sale ORDER BY sku, epoch, seq"
    ),
    "refused": (
        "SELECT order_no, sku, buyer_id, epoch, seq, units, reason, returned FROM refused_claim"
        " WHERE sale = :sale ORDER BY sku, epoch, seq"
    ),
    "buried": "SELECT stream, entry_id, reason FROM dead_letter WHERE sale = :sale ORDER BY id",
    "attempts": (
        "SELECT a.id, a.order_no, a.state FROM payment_attempt a JOIN purchase_order p USING (order_no)"
        " WHERE p.sale = :sale ORDER BY a.id"
    ),
    "captures": (
        "SELECT c.provider_ref, c.order_no, c.amount_minor, c.state FROM capture c"
        " JOIN purchase_order p USING (order_no) WHERE p.sale = :sale ORDER BY c.id"
    ),
    "inbox": "SELECT event_id FROM webhook_inbox ORDER BY id",
}


async def whole(conn: AsyncConnection, sale: str) -> dict[str, list[Row]]:
    """sale, orders, refused, buried, attempts, captures, inbox (of all sales) → rows, in the caller's snapshot."""
    found: dict[str, list[Row]] = {}
    for name, statement in _STATEMENTS.items():
        rows = await conn.execute(text(statement), {"sale": sale} if ":sale" in statement else {})
        found[name] = [dict(row) for row in rows.mappings()]
    return found
