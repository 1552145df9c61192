"""A repeated POST has one effect: the answer is kept with the effect, in the same transaction, for 7 days.

The lock of a key is a session's, not a transaction's: it is held over all the steps of a change (Postgres, Redis,
Postgres), and it goes with the connection, so that a crash half-way leaves nothing locked. Needs a session of its own
(no transaction-pooling proxy in between).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger.tables import idempotency

KEEP_DAYS = 7


@dataclass(frozen=True)
class Kept:
    """What an earlier request with the same key asked and was answered. status None: it never came to an answer."""

    request_hash: bytes
    status: int | None
    response: dict[str, Any] | None


def lock_number(actor: str, key: str) -> int:
    """A signed 64-bit number of the pair, for pg_advisory_lock; two pairs that share one only wait for each other."""
    digest = hashlib.blake2b(f"{actor}\0{key}".encode(), digest_size=8, person=b"fairdrop-idem").digest()
    return int.from_bytes(digest, "big", signed=True)


async def lock(conn: AsyncConnection, actor: str, key: str) -> None:
    """Wait until nobody else works on this key (at most the engine's lock_timeout), then keep it to ourselves."""
    await conn.execute(sa.select(sa.func.pg_advisory_lock(lock_number(actor, key))))


async def unlock(conn: AsyncConnection, actor: str, key: str) -> None:
    await conn.execute(sa.select(sa.func.pg_advisory_unlock(lock_number(actor, key))))


async def find(conn: AsyncConnection, actor: str, key: str) -> Kept | None:
    c = idempotency.c
    query = sa.select(c.request_hash, c.status, c.response).where(
        c.actor == actor, c.key == key, c.created_at > sa.func.now() - sa.text(f"interval '{KEEP_DAYS} days'")
    )
    row = (await conn.execute(query)).first()
    return None if row is None else Kept(bytes(row.request_hash), row.status, row.response)


async def begin(conn: AsyncConnection, actor: str, key: str, request_hash: bytes) -> None:
    """Note that a change of more than one step is under way; the same key with another body is refused from now on."""
    await _put(conn, actor, key, request_hash, None, None)


async def keep(
    conn: AsyncConnection,
    actor: str,
    key: str,
    request_hash: bytes,
    status: int,
    response: dict[str, Any] | None,
) -> None:
    """Keep the answer, in the transaction that makes the change."""
    await _put(conn, actor, key, request_hash, status, response)


async def _put(
    conn: AsyncConnection,
    actor: str,
    key: str,
    request_hash: bytes,
    status: int | None,
    response: dict[str, Any] | None,
) -> None:
    statement = insert(idempotency).values(
        actor=actor, key=key, request_hash=request_hash, status=status, response=response
    )
    await conn.execute(
        statement.on_conflict_do_update(
            index_elements=["actor", "key"],
            set_={
                "request_hash": statement.excluded.request_hash,
                "status": statement.excluded.status,
                "response": statement.excluded.response,
                "created_at": sa.func.now(),
            },
        )
    )


async def forget_old(conn: AsyncConnection) -> int:
    """Delete what is older than 7 days; returns how many."""
    c = idempotency.c
    statement = sa.delete(idempotency).where(
        c.created_at < sa.func.now() - sa.text(f"interval '{KEEP_DAYS} days'")
    )
    return (await conn.execute(statement)).rowcount
