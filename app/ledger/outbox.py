"""What Postgres has decided and Redis must still be told: written in the deciding transaction, applied once.

Payloads by kind:
    mark       {"sku", "seq"}: byte and status are made from the order row as it is when the row is applied;
               a refused claim has no order row and carries {"sku", "seq", "byte", "status", "version"}
    release    {"sku", "seq", "units", "to"}: `to` is the ticket's last byte (e, k, l, f)
    stock_add  {"sku", "units", "id"}
    switch     {"version", "changes"} or {"sku", "item_paused": "0"|"1"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

Row = dict[str, Any]


async def put(
    conn: AsyncConnection,
    kind: str,
    sale: str,
    epoch: int,
    payload: Mapping[str, Any],
    order_no: str | None = None,
) -> int:
    """One more thing to tell Redis, as soon as the caller's transaction commits. Returns its id."""
    found = await conn.execute(
        text(
            "INSERT INTO outbox (kind, sale, epoch, order_no, payload)"
            " VALUES (:kind, :sale, :epoch, :order_no, CAST(:payload AS jsonb)) RETURNING id"
        ),
        {
            "kind": kind,
            "sale": sale,
            "epoch": epoch,
            "order_no": order_no,
            "payload": msgspec.json.encode(payload).decode(),
        },
    )
    return int(found.scalar_one())


async def put_marks(conn: AsyncConnection, marks: Sequence[tuple[str, int, Mapping[str, Any], str]]) -> None:
    """Many marks of one statement's rows, in one statement: (sale, epoch, payload, order_no)."""
    sales, epochs, payloads, order_nos = zip(*marks, strict=True)
    await conn.execute(
        text(
            "INSERT INTO outbox (kind, sale, epoch, order_no, payload)"
            " SELECT 'mark', sale, epoch, order_no, CAST(payload AS jsonb) FROM unnest(CAST(:sales AS text[]),"
            " CAST(:epochs AS bigint[]), CAST(:order_nos AS text[]), CAST(:payloads AS text[]))"
            " AS mark (sale, epoch, order_no, payload)"
        ),
        {
            "sales": list(sales),
            "epochs": list(epochs),
            "order_nos": list(order_nos),
            "payloads": [msgspec.json.encode(payload).decode() for payload in payloads],
        },
    )


async def lease(conn: AsyncConnection, limit: int, lease_s: float) -> list[Row]:
    """Take up to `limit` due rows for this worker, oldest first; nobody else gets them for `lease_s`.

    A row whose lease ran out is taken again: whoever holds the older generation can no longer close it.
    """
    found = await conn.execute(
        text(
            "UPDATE outbox SET leased_until = now() + make_interval(secs => :lease_s), generation = generation + 1,"
            " tries = tries + 1 WHERE id IN (SELECT id FROM outbox WHERE state = 'due'"
            " AND (leased_until IS NULL OR leased_until < now()) ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED)"
            " RETURNING id, kind, sale, epoch, order_no, payload, tries, generation, created_at"
        ),
        {"limit": limit, "lease_s": float(lease_s)},
    )
    return sorted((dict(row) for row in found.mappings()), key=lambda row: int(row["id"]))


async def close(conn: AsyncConnection, ids: Sequence[tuple[int, int]], state: str) -> int:
    """Rows (id, generation) that Redis has been told (`done`) or never will be (`dropped`). Returns how many."""
    if not ids:
        return 0
    found = await conn.execute(
        text(
            "UPDATE outbox SET state = :state, done_at = now(), leased_until = NULL"
            " FROM unnest(CAST(:ids AS bigint[]), CAST(:generations AS bigint[])) AS held (id, generation)"
            " WHERE outbox.id = held.id AND outbox.generation = held.generation AND outbox.state = 'due'"
        ),
        {"state": state, "ids": [row for row, _ in ids], "generations": [held for _, held in ids]},
    )
    return int(found.rowcount)


async def postpone(conn: AsyncConnection, ids: Sequence[tuple[int, int]], wait_s: float) -> None:
    """Rows (id, generation) that could not be applied now: due again after `wait_s`."""
    if ids:
        await conn.execute(
            text(
                "UPDATE outbox SET leased_until = now() + make_interval(secs => :wait_s)"
                " FROM unnest(CAST(:ids AS bigint[]), CAST(:generations AS bigint[])) AS held (id, generation)"
                " WHERE outbox.id = held.id AND outbox.generation = held.generation AND outbox.state = 'due'"
            ),
            {"wait_s": wait_s, "ids": [row for row, _ in ids], "generations": [held for _, held in ids]},
        )


async def cancel_release(conn: AsyncConnection, order_no: str) -> str:
    """Withdraw the release of this order's units, if no worker has begun to tell Redis of it.

    "cancelled": the units are still taken in Redis. "under_way": a worker holds it, or may have sent it: wait.
    "none": there is no open release (it was applied, dropped, or never written).
    """
    found = (
        await conn.execute(
            text(
                "SELECT id, tries FROM outbox WHERE order_no = :order_no AND kind = 'release' AND state = 'due'"
                " FOR UPDATE"
            ),
            {"order_no": order_no},
        )
    ).first()
    if found is None:
        return "none"
    if found.tries > 0:
        return "under_way"
    await conn.execute(
        text("UPDATE outbox SET state = 'dropped', done_at = now() WHERE id = :id"), {"id": found.id}
    )
    return "cancelled"


async def backlog(conn: AsyncConnection) -> int:
    """How many rows wait, of all sales."""
    return int((await conn.execute(text("SELECT count(*) FROM outbox WHERE state = 'due'"))).scalar_one())


async def open_releases(conn: AsyncConnection, order_nos: Sequence[str]) -> set[str]:
    """Those of these orders whose units Redis has not yet been told to take back."""
    found = await conn.execute(
        text(
            "SELECT DISTINCT order_no FROM outbox WHERE order_no = ANY(CAST(:order_nos AS text[]))"
            " AND kind = 'release' AND state = 'due'"
        ),
        {"order_nos": list(order_nos)},
    )
    return {row.order_no for row in found}
