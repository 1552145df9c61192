"""Who did what: append-only and hash-chained, so that a changed, removed or inserted row shows.

hash = SHA-256(prev_hash ‖ canonical JSON of the row). Appending is serialised by an advisory lock that is held to the
end of the caller's transaction: append last. It is outside `confirm`'s transaction and never on the hot path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger.tables import journal

LOCK = 0x6661_6972_0001  # advisory lock: one appender at a time ("fair", 1)
GENESIS = hashlib.sha256(b"fairdrop journal 1").digest()  # prev_hash of the first row
VERIFY_PAGE = 1_000  # rows read at once

_COLUMNS = [
    journal.c[name]
    for name in ("id", "at", "actor", "role", "action", "sale", "reason", "detail", "prev_hash", "hash")
]


@dataclass(frozen=True)
class Entry:
    id: int
    at: datetime
    actor: str
    role: str
    action: str
    sale: str | None
    reason: str | None
    detail: dict[str, Any]
    prev_hash: bytes
    hash: bytes


def _hash(
    prev_hash: bytes,
    row_id: int,
    at: datetime,
    actor: str,
    role: str,
    action: str,
    sale: str | None,
    reason: str | None,
    detail: Mapping[str, Any],
) -> bytes:
    row = {
        "id": row_id,
        "at": at.astimezone(UTC).isoformat(timespec="microseconds"),
        "actor": actor,
        "role": role,
        "action": action,
        "sale": sale,
        "reason": reason,
        "detail": detail,
    }
    canonical = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(prev_hash + canonical.encode("ascii")).digest()


async def append(
    conn: AsyncConnection,
    *,
    actor: str,
    role: str,
    action: str,
    sale: str | None = None,
    reason: str | None = None,
    detail: Mapping[str, Any] | None = None,
) -> int:
    """Add one row at the chain's head; returns its number. `detail` must be plain JSON (integers, no floats needed)."""
    await conn.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
    head = sa.select(journal.c.id, journal.c.hash).order_by(journal.c.id.desc()).limit(1)
    last = (await conn.execute(head)).first()
    row_id, prev_hash = (1, GENESIS) if last is None else (last.id + 1, bytes(last.hash))
    at = (await conn.execute(sa.select(sa.func.clock_timestamp()))).scalar_one()
    # Floats are stored by Postgres as numerics and come back spelled otherwise: the chain holds what comes back.
    plain = json.loads(json.dumps(dict(detail or {}), allow_nan=False), parse_float=str)
    values = {"actor": actor, "role": role, "action": action, "sale": sale, "reason": reason, "detail": plain}
    await conn.execute(
        sa.insert(journal).values(
            id=row_id, at=at, prev_hash=prev_hash, hash=_hash(prev_hash, row_id, at, **values), **values
        )
    )
    return row_id


async def page(
    conn: AsyncConnection, *, limit: int, before: int | None = None, sale: str | None = None
) -> list[Entry]:
    """Entries, newest first."""
    query = sa.select(*_COLUMNS).order_by(journal.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(journal.c.id < before)
    if sale is not None:
        query = query.where(journal.c.sale == sale)
    return [_entry(row) for row in (await conn.execute(query)).mappings()]


def _entry(row: Mapping[Any, Any]) -> Entry:
    return Entry(**{**row, "prev_hash": bytes(row["prev_hash"]), "hash": bytes(row["hash"])})


@dataclass(frozen=True)
class Chain:
    """What `verify` found: how many rows hold, and the first that does not."""

    rows: int
    broken_at: int | None
    head: bytes


async def verify(conn: AsyncConnection) -> Chain:
    """Recompute the whole chain. `broken_at` is the first row that was changed, or whose forerunner is gone.

    A chain that was cut at its end shows only against a head noted elsewhere: `head` is there to be noted.
    """
    rows, prev_hash, expected = 0, GENESIS, 1
    while True:
        query = sa.select(*_COLUMNS).where(journal.c.id >= expected).order_by(journal.c.id).limit(VERIFY_PAGE)
        found = [_entry(row) for row in (await conn.execute(query)).mappings()]
        for e in found:
            true_hash = _hash(prev_hash, e.id, e.at, e.actor, e.role, e.action, e.sale, e.reason, e.detail)
            if e.id != expected or e.prev_hash != prev_hash or e.hash != true_hash:
                return Chain(rows, expected, prev_hash)
            rows, prev_hash, expected = rows + 1, e.hash, expected + 1
        if len(found) < VERIFY_PAGE:
            return Chain(rows, None, prev_hash)
