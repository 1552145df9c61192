# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""What is sealed in Postgres: which with an old key, and which contacts and payers have been kept long enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

Row = dict[str, Any]

# Format 1 of app/sealing.py: one byte of format, then the key's id.
_OTHER_KEY = "substring(contact FROM 2 FOR 4) <> :newest"


async def with_old_keys(conn: AsyncConnection, newest: bytes, after: str, limit: int) -> list[Row]:
    """Locked: orders behind `after` whose contact has another key than `newest`, or no phone index yet."""
    found = await conn.execute(
        text(
            "SELECT order_no, sale, buyer_id, contact FROM purchase_order WHERE contact IS NOT NULL"
            f" AND order_no > :after AND ({_OTHER_KEY} OR phone_index IS NULL)"
            " ORDER BY order_no LIMIT :limit FOR UPDATE"
        ),
        {"newest": newest, "after": after, "limit": limit},
    )
    return [dict(row) for row in found.mappings()]


async def put(conn: AsyncConnection, rows: Sequence[tuple[str, bytes, bytes | None]]) -> None:
    """(order_no, contact, phone index): nothing that a buyer or the shop sees changes."""
    numbers, sealed, indexes = (list(column) for column in zip(*rows, strict=True))
    await conn.execute(
        text(
            "UPDATE purchase_order AS o SET contact = new.contact, phone_index = new.phone_index FROM unnest("
            "CAST(:numbers AS text[]), CAST(:sealed AS bytea[]), CAST(:indexes AS bytea[]))"
            " AS new (order_no, contact, phone_index) WHERE o.order_no = new.order_no"
        ),
        {"numbers": numbers, "sealed": sealed, "indexes": indexes},
    )


async def payers(conn: AsyncConnection, after: str, limit: int) -> list[Row]:
    """Locked: attempts behind `after` that say who pays or from where. payer: {sealed?, address?, openid? (plain)}."""
    found = await conn.execute(
        text(
            "SELECT a.id, o.sale, o.buyer_id, a.payer FROM payment_attempt AS a JOIN purchase_order AS o"
            " ON o.order_no = a.order_no WHERE a.payer IS NOT NULL AND a.payer <> '{}' AND a.id > :after"
            " ORDER BY a.id LIMIT :limit FOR UPDATE OF a"
        ),
        {"after": after, "limit": limit},
    )
    return [dict(row) for row in found.mappings()]


async def put_payer(conn: AsyncConnection, attempt_id: str, payer: Row) -> None:
    await conn.execute(
        text("UPDATE payment_attempt SET payer = CAST(:payer AS jsonb) WHERE id = :id"),
        {"id": attempt_id, "payer": msgspec.json.encode(payer).decode()},
    )


async def secrets(conn: AsyncConnection) -> list[Row]:
    """Locked: every endpoint's sealed secrets; there are few."""
    found = await conn.execute(
        text("SELECT id, secret, secret_before FROM webhook_endpoint ORDER BY id FOR UPDATE")
    )
    return [dict(row) for row in found.mappings()]


async def put_secrets(conn: AsyncConnection, endpoint: str, secret: bytes, before: bytes | None) -> None:
    await conn.execute(
        text("UPDATE webhook_endpoint SET secret = :secret, secret_before = :before WHERE id = :id"),
        {"id": endpoint, "secret": secret, "before": before},
    )


async def sealed_answers(conn: AsyncConnection, after: tuple[str, str], limit: int) -> list[Row]:
    """Locked: answers behind `after` (actor, key) that hold sealed secrets, in order. The Base64 of their seal."""
    found = await conn.execute(
        text(
            "SELECT actor, key, response->>'sealed' AS sealed FROM idempotency WHERE response->>'sealed' IS NOT NULL"
            " AND (actor, key) > (:actor, :key) ORDER BY actor, key LIMIT :limit FOR UPDATE"
        ),
        {"actor": after[0], "key": after[1], "limit": limit},
    )
    return [dict(row) for row in found.mappings()]


async def put_answer(conn: AsyncConnection, actor: str, key: str, sealed: str) -> None:
    await conn.execute(
        text(
            "UPDATE idempotency SET response = jsonb_set(response, '{sealed}', to_jsonb(CAST(:sealed AS text)))"
            " WHERE actor = :actor AND key = :key"
        ),
        {"actor": actor, "key": key, "sealed": sealed},
    )


async def remove_old(conn: AsyncConnection, keep_days: int, limit: int) -> tuple[str, int] | None:
    """Remove what up to `limit` orders of one sale that settled `keep_days` ago hold of people: contacts, who paid.
    (sale, how many orders); None: there is none.

    Fewer than `limit`: it was the sale's last, and the sale is not looked at again.
    """
    sale = (
        await conn.execute(
            text(
                "SELECT id FROM sale WHERE state = 'settled' AND contacts_removed_at IS NULL"
                " AND settled_at <= now() - make_interval(days => :days) ORDER BY settled_at LIMIT 1"
                " FOR UPDATE SKIP LOCKED"
            ),
            {"days": keep_days},
        )
    ).scalar()
    if sale is None:
        return None
    found = await conn.execute(
        text(
            "WITH gone AS (SELECT order_no FROM purchase_order AS o WHERE sale = :sale AND (contact IS NOT NULL"
            " OR phone_index IS NOT NULL OR EXISTS (SELECT FROM payment_attempt AS a WHERE a.order_no = o.order_no"
            " AND a.payer IS NOT NULL)) LIMIT :limit),"
            " payers AS (UPDATE payment_attempt AS a SET payer = NULL FROM gone"
            " WHERE a.order_no = gone.order_no AND a.payer IS NOT NULL)"
            " UPDATE purchase_order AS o SET contact = NULL, phone_index = NULL FROM gone"
            " WHERE o.order_no = gone.order_no"
        ),
        {"sale": sale, "limit": limit},
    )
    if found.rowcount < limit:
        await conn.execute(
            text("UPDATE sale SET contacts_removed_at = now() WHERE id = :sale"), {"sale": sale}
        )
    return sale, int(found.rowcount)
