# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""Payment attempts, captures and refunds: one function for each SQL intent; the caller owns the transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

Row = dict[str, Any]

ATTEMPT_COLUMNS = (
    "id, order_no, attempt_no, provider, channel, state, kind, url, params, return_url, payer, provider_ref,"
    " amount_minor, currency, code, created_at, sent_at, expires_at, ended_at, tries, next_at, generation"
)


async def newest_attempts(conn: AsyncConnection, order_nos: Sequence[str]) -> dict[str, Row]:
    """order_no → its newest payment attempt, for those orders that have one: what the buyer is shown."""
    found = await conn.execute(
        text(
            f"SELECT DISTINCT ON (order_no) {ATTEMPT_COLUMNS} FROM payment_attempt"
            " WHERE order_no = ANY(CAST(:order_nos AS text[])) ORDER BY order_no, attempt_no DESC"
        ),
        {"order_nos": list(order_nos)},
    )
    return {row["order_no"]: dict(row) for row in found.mappings()}
