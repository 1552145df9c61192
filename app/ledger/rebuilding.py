# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""A sale begins a new epoch: the one transaction that decides what every ticket and unit is from now on.

Postgres alone says it. Afterwards nothing of an earlier epoch can happen to the sale: scripts answer OLD, confirm
refuses its claims, the relay finds its rows dropped (what they would have told Redis is in the rows read here).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.ledger.orders import COLUMNS, Row

LOCK_CLASS = 0x5EC  # the first half of the advisory locks of this module
REBUILDING = "rebuilding"  # sale.home while a rebuild is under way, or has died: never a run_id


class ItemEpoch(NamedTuple):
    """One item at the moment of the change. starts: (epoch, first seq) of every epoch but the first, oldest first."""

    sku: str
    available: int
    first_seq: int
    starts: tuple[tuple[int, int], ...]
    paused: bool


class NewEpoch(NamedTuple):
    """What the transaction decided. live: orders that go on, as they are told from now on."""

    epoch: int
    items: tuple[ItemEpoch, ...]
    live: list[Row]
    dropped: int  # outbox rows that the new epoch holds already


@asynccontextmanager
async def alone_with(engine: AsyncEngine, sale: str) -> AsyncIterator[bool]:
    """Hold the right to rebuild a sale, on a connection of its own. False: somebody else has it."""
    async with engine.connect() as conn:
        conn = await conn.execution_options(isolation_level="AUTOCOMMIT")
        named = {"class": LOCK_CLASS, "sale": sale}
        held = bool(
            (await conn.execute(text("SELECT pg_try_advisory_lock(:class, hashtext(:sale))"), named)).scalar()
        )
        try:
            yield held
        finally:
            if held:
                await conn.execute(text("SELECT pg_advisory_unlock(:class, hashtext(:sale))"), named)


async def begin(conn: AsyncConnection, sale: str) -> NewEpoch | None:
    """Begin the next epoch of a published sale. None: there is no such sale, or it is a draft or settled.

    Locks the sale, its live orders, its items, in that order. A deadlock with a step of a fresh order is possible:
    repeat the transaction.
    """
    found = (
        await conn.execute(
            text(
                "UPDATE sale SET epoch = epoch + 1, home = :home, pulse = 0, version = version + 1"
                " WHERE id = :sale AND state NOT IN ('draft', 'settled') RETURNING epoch"
            ),
            {"sale": sale, "home": REBUILDING},
        )
    ).first()
    if found is None:
        return None
    epoch = int(found.epoch)
    rows = await _take_along(conn, sale, epoch)
    await conn.execute(
        text("SELECT 1 FROM item WHERE sale = :sale ORDER BY sku FOR UPDATE"), {"sale": sale}
    )  # no claim becomes an order any more
    rows += await _take_along(conn, sale, epoch)  # those that did while we waited for that
    dropped = await conn.execute(
        text(
            "UPDATE outbox SET state = 'dropped', done_at = now(), leased_until = NULL"
            " WHERE sale = :sale AND epoch < :epoch AND state IN ('due', 'intent')"
        ),
        {"sale": sale, "epoch": epoch},
    )
    items = await conn.execute(
        text(
            "UPDATE item SET epoch = :epoch, epoch_starts = coalesce(epoch_starts, CAST('[]' AS jsonb))"
            "  || jsonb_build_array(jsonb_build_array(CAST(:epoch AS bigint), last.seq + 1))"
            " FROM (SELECT one.sku, coalesce(max(seq), 0) AS seq FROM item AS one LEFT JOIN purchase_order AS o"
            "   ON o.sale = one.sale AND o.sku = one.sku WHERE one.sale = :sale GROUP BY one.sku) AS last"
            " WHERE item.sale = :sale AND item.sku = last.sku"
            " RETURNING item.sku, position, total - reserved - sold AS available, last.seq + 1 AS first_seq,"
            "  epoch_starts, paused_at IS NOT NULL AS paused"
        ),
        {"sale": sale, "epoch": epoch},
    )
    return NewEpoch(
        epoch,
        tuple(
            ItemEpoch(
                row.sku,
                row.available,
                row.first_seq,
                tuple((int(begun), int(first)) for begun, first in row.epoch_starts),
                row.paused,
            )
            for row in sorted(items, key=lambda row: row.position)
        ),
        rows,
        dropped.rowcount,
    )


async def _take_along(conn: AsyncConnection, sale: str, epoch: int) -> list[Row]:
    """Orders that live go on in the new epoch, with a new version."""
    found = await conn.execute(
        text(
            "UPDATE purchase_order SET epoch = :epoch, version = version + 1 WHERE sale = :sale AND epoch < :epoch"
            f" AND state IN ('reserved', 'paid', 'refunding') RETURNING {COLUMNS}"
        ),
        {"sale": sale, "epoch": epoch},
    )
    return [dict(row) for row in found.mappings()]


async def ended_orders(conn: AsyncConnection, sale: str, limit: int) -> AsyncIterator[Sequence[Row]]:
    """The orders of a sale that have ended, in pages, by ticket."""
    after = ("", 0, 0)
    while True:
        found = await conn.execute(
            text(
                f"SELECT {COLUMNS} FROM purchase_order WHERE sale = :sale AND (sku, epoch, seq) > (:sku, :epoch, :seq)"
                " AND state IN ('expired', 'cancelled', 'refunded') ORDER BY sku, epoch, seq LIMIT :limit"
            ),
            {"sale": sale, "sku": after[0], "epoch": after[1], "seq": after[2], "limit": limit},
        )
        rows = [dict(row) for row in found.mappings()]
        if not rows:
            return
        yield rows
        after = (rows[-1]["sku"], rows[-1]["epoch"], rows[-1]["seq"])


async def born(conn: AsyncConnection, sale: str, sku: str, seq: int) -> int:
    """The epoch of the order that this ticket has or will have: each epoch's seqs begin behind all orders of before."""
    found = await conn.execute(
        text(
            "SELECT coalesce(max((began->>0)::bigint), 1) FROM item, jsonb_array_elements(epoch_starts) AS began"
            " WHERE sale = :sale AND sku = :sku AND (began->>1)::bigint <= :seq"
        ),
        {"sale": sale, "sku": sku, "seq": seq},
    )
    return int(found.scalar_one())


async def finish(conn: AsyncConnection, sale: str, epoch: int, home: str) -> bool:
    """The sale lives in this Redis now. False: a later rebuild has overtaken this one."""
    found = await conn.execute(
        text(
            "UPDATE sale SET home = :home WHERE id = :sale AND epoch = :epoch AND home = :rebuilding RETURNING id"
        ),
        {"sale": sale, "epoch": epoch, "home": home, "rebuilding": REBUILDING},
    )
    return found.first() is not None
