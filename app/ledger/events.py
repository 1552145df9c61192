"""What the shop is told. Rows are written in the transaction that makes them true; positions are given afterwards.

A position is given by one numbering step at a time, to rows that are committed: a reader who has seen position n will
never find a smaller one that is new. (An identity column would not do: numbers are taken before COMMIT, so a slow
transaction would appear behind a cursor that has passed it.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger.engine import driver

Row = dict[str, Any]

NUMBERING_LOCK = 0x4556454E  # "EVEN": one numbering step at a time


def event_id(subject: str, version: int, kind: str) -> str:
    """The same change has the same id, whoever writes it: an order's by version, a sale's by version and word."""
    return f"evt-{subject}-{version}-{kind.rpartition('.')[2]}"


async def put(
    conn: AsyncConnection,
    kind: str,
    sale: str,
    version: int,
    data: Mapping[str, Any],
    order_no: str | None = None,
) -> None:
    """The shop learns of one change once the caller's transaction commits. The same change twice is one event."""
    await conn.execute(
        text(
            "INSERT INTO event (id, type, sale, order_no, version, data)"
            " VALUES (:id, :type, :sale, :order_no, :version, CAST(:data AS jsonb)) ON CONFLICT (id) DO NOTHING"
        ),
        {
            "id": event_id(order_no or sale, version, kind),
            "type": kind,
            "sale": sale,
            "order_no": order_no,
            "version": version,
            "data": msgspec.json.encode(data).decode(),
        },
    )


async def put_reserved(conn: AsyncConnection, sale: str, order_nos: Sequence[str]) -> None:
    """The shop learns of all these new orders once the caller's transaction commits: one row, unpacked by `number`.

    An `event` row an order cost confirm a third of its time in Postgres, and another as much when it was numbered.
    """
    await (await driver(conn)).execute(
        "INSERT INTO event_batch (sale, order_nos) VALUES ($1, string_to_array($2, ' '))",
        *(sale, " ".join(order_nos)),
    )


async def is_behind(conn: AsyncConnection) -> bool:
    """Whether committed events wait for their position; a look, so that rest costs one statement and no lock."""
    found = await conn.execute(
        text(
            "SELECT EXISTS (SELECT 1 FROM event WHERE position IS NULL) OR EXISTS (SELECT 1 FROM event_batch)"
        )
    )
    return bool(found.scalar_one())


async def number(conn: AsyncConnection, limit: int) -> int:
    """Give the next positions to committed events, in the order they were written. Returns how many.

    `limit` is where it stops; the last batch is taken whole. A batch is always unpacked before what was written after
    it was committed (both take `written` from one sequence), so an order is never paid before it is reserved.
    The data of `order.reserved` is the order as confirm wrote it: what may change since (state, amount) is not read.
    """
    await conn.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": NUMBERING_LOCK})
    found = await conn.execute(
        text(
            "WITH due AS ((SELECT written, 1 AS events, FALSE AS batch FROM event WHERE position IS NULL"
            "   ORDER BY written LIMIT :limit)"
            "  UNION ALL (SELECT written, cardinality(order_nos), TRUE FROM event_batch"
            "   ORDER BY written LIMIT :limit)),"
            " placed AS (SELECT written, events, batch,"
            "   CAST(sum(events) OVER (ORDER BY written) AS bigint) - events AS before FROM due),"
            " fresh AS (SELECT written, events, batch, before + coalesce((SELECT max(position) FROM event), 0) AS last"
            "   FROM placed WHERE before < :limit),"
            " taken AS (DELETE FROM event_batch AS b USING fresh WHERE fresh.batch AND b.written = fresh.written"
            "   RETURNING b.sale, b.at, b.order_nos, fresh.last),"
            " unpacked AS (INSERT INTO event (id, type, sale, order_no, version, at, data, position)"
            "   SELECT 'evt-' || o.order_no || '-1-reserved', 'order.reserved', o.sale, o.order_no, 1, taken.at,"
            "   jsonb_build_object('order_no', o.order_no, 'sale', o.sale, 'sku', o.sku, 'buyer_id', o.buyer_id,"
            "    'units', o.units, 'amount_minor', o.units * i.price_minor, 'currency', o.currency,"
            "    'state', 'reserved', 'reason', NULL), taken.last + one.nth"
            "   FROM taken CROSS JOIN unnest(taken.order_nos) WITH ORDINALITY AS one (order_no, nth)"
            "   JOIN purchase_order o ON o.order_no = one.order_no"
            "   JOIN item i ON i.sale = o.sale AND i.sku = o.sku ON CONFLICT (id) DO NOTHING),"
            " single AS (UPDATE event SET position = fresh.last + 1 FROM fresh"
            "   WHERE NOT fresh.batch AND event.written = fresh.written AND event.position IS NULL)"
            " SELECT coalesce(CAST(sum(events) AS bigint), 0) FROM fresh"
        ),
        {"limit": limit},
    )
    return int(found.scalar_one())


async def page(conn: AsyncConnection, after: int, limit: int, sale: str | None = None) -> list[Row]:
    """Numbered events behind position `after`, in order."""
    found = await conn.execute(
        text(
            "SELECT position, id, type, sale, order_no, version, at, data FROM event WHERE position > :after"
            " AND (CAST(:sale AS text) IS NULL OR sale = :sale) ORDER BY position LIMIT :limit"
        ),
        {"after": after, "limit": limit, "sale": sale},
    )
    return [dict(row) for row in found.mappings()]
