"""What the shop is told. Rows are written in the transaction that makes them true; positions are given afterwards.

A position is given by one numbering step at a time, to rows that are committed: a reader who has seen position n will
never find a smaller one that is new. (An identity column would not do: numbers are taken before COMMIT, so a slow
transaction would appear behind a cursor that has passed it.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

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


async def is_behind(conn: AsyncConnection) -> bool:
    """Whether committed events wait for their position; a look, so that rest costs one statement and no lock."""
    found = await conn.execute(text("SELECT EXISTS (SELECT 1 FROM event WHERE position IS NULL)"))
    return bool(found.scalar_one())


async def number(conn: AsyncConnection, limit: int) -> int:
    """Give the next positions to committed events, in the order they were written. Returns how many."""
    await conn.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": NUMBERING_LOCK})
    found = await conn.execute(
        text(
            "WITH fresh AS (SELECT id, row_number() OVER (ORDER BY written) AS nth FROM"
            " (SELECT id, written FROM event WHERE position IS NULL ORDER BY written LIMIT :limit) AS unnumbered),"
            " last AS (SELECT coalesce(max(position), 0) AS position FROM event)"
            " UPDATE event SET position = last.position + fresh.nth FROM fresh, last WHERE event.id = fresh.id"
        ),
        {"limit": limit},
    )
    return int(found.rowcount)


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
