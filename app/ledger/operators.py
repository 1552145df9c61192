"""Operators' keys and the shop's webhook endpoints. Keys are stored as SHA-256 only: 32 random bytes need no salt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, cast

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger.tables import event, operator_key, webhook_endpoint

Role = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = ("viewer", "operator", "admin")  # each may do what the one before may
FIRST = "first"  # the id of the key that the settings give
LOCK = 0x6661_6972_0002  # advisory lock: the last admin is counted by one at a time


@dataclass(frozen=True)
class Operator:
    id: str
    name: str
    role: Role
    created_at: datetime
    revoked_at: datetime | None

    def may(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class Endpoint:
    id: str
    url: str
    events: list[str]
    created_at: datetime
    secret_before_until: datetime | None = None  # until when the secret before signs too
    disabled_at: datetime | None = None
    disabled_why: str | None = None


_KEY = [operator_key.c[name] for name in ("id", "name", "role", "created_at", "revoked_at")]
_ENDPOINT = [
    webhook_endpoint.c[name]
    for name in ("id", "url", "events", "created_at", "secret_before_until", "disabled_at", "disabled_why")
]


def key_hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _operator(row: sa.RowMapping) -> Operator:
    return Operator(row["id"], row["name"], cast(Role, row["role"]), row["created_at"], row["revoked_at"])


async def find(conn: AsyncConnection, key: str) -> Operator | None:
    """Whose key this is; None: nobody's, or it was revoked."""
    query = sa.select(*_KEY).where(
        operator_key.c.key_hash == key_hash(key), operator_key.c.revoked_at.is_(None)
    )
    row = (await conn.execute(query)).mappings().first()
    return None if row is None else _operator(row)


async def put_first(conn: AsyncConnection, key: str) -> None:
    """Make the settings' key the first admin's. The same key stays revoked if it was; another key takes its place."""
    statement = insert(operator_key).values(
        id=FIRST, name="first admin", role="admin", key_hash=key_hash(key)
    )
    statement = statement.on_conflict_do_update(
        index_elements=["id"],
        set_={"key_hash": statement.excluded.key_hash, "revoked_at": None},
        where=operator_key.c.key_hash != statement.excluded.key_hash,
    )
    await conn.execute(statement)


async def insert_key(conn: AsyncConnection, key_id: str, name: str, role: Role, key: str) -> Operator:
    statement = insert(operator_key).values(id=key_id, name=name, role=role, key_hash=key_hash(key))
    return _operator((await conn.execute(statement.returning(*_KEY))).mappings().one())


async def revoke(conn: AsyncConnection, key_id: str) -> Operator | Literal["no_such_key", "last_admin"]:
    """End a key at once, on every office. The last admin's key stays: nobody could make another."""
    await conn.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
    c = operator_key.c
    row = (
        (await conn.execute(sa.select(*_KEY).where(c.id == key_id, c.revoked_at.is_(None))))
        .mappings()
        .first()
    )
    if row is None:
        return "no_such_key"
    others = sa.select(sa.func.count()).where(c.role == "admin", c.revoked_at.is_(None), c.id != key_id)
    if row["role"] == "admin" and (await conn.execute(others)).scalar_one() == 0:
        return "last_admin"
    await conn.execute(sa.update(operator_key).where(c.id == key_id).values(revoked_at=sa.func.now()))
    return _operator(row)


async def keys(
    conn: AsyncConnection, *, limit: int, after: tuple[datetime, str] | None = None
) -> list[Operator]:
    """Keys that work, oldest first; never the keys themselves."""
    c = operator_key.c
    query = sa.select(*_KEY).where(c.revoked_at.is_(None)).order_by(c.created_at, c.id).limit(limit)
    if after is not None:
        query = query.where(sa.tuple_(c.created_at, c.id) > after)
    return [_operator(row) for row in (await conn.execute(query)).mappings()]


# ---- webhook endpoints ----------------------------------------------------------------------------------------------


async def count_endpoints(conn: AsyncConnection) -> int:
    query = sa.select(sa.func.count()).where(webhook_endpoint.c.deleted_at.is_(None))
    return int((await conn.execute(query)).scalar_one())


async def insert_endpoint(
    conn: AsyncConnection, endpoint_id: str, url: str, events: Sequence[str], sealed_secret: bytes
) -> Endpoint:
    """A new endpoint is told what the feed shows from now on."""
    newest = sa.select(sa.func.coalesce(sa.func.max(event.c.position), 0)).scalar_subquery()
    statement = insert(webhook_endpoint).values(
        id=endpoint_id, url=url, events=list(events), secret=sealed_secret, told_to=newest
    )
    return Endpoint(**(await conn.execute(statement.returning(*_ENDPOINT))).mappings().one())


async def endpoints(
    conn: AsyncConnection, *, limit: int, after: tuple[datetime, str] | None = None
) -> list[Endpoint]:
    """Endpoints that are told, oldest first; never their secrets."""
    c = webhook_endpoint.c
    query = sa.select(*_ENDPOINT).where(c.deleted_at.is_(None)).order_by(c.created_at, c.id).limit(limit)
    if after is not None:
        query = query.where(sa.tuple_(c.created_at, c.id) > after)
    return [Endpoint(**row) for row in (await conn.execute(query)).mappings()]


async def endpoint(conn: AsyncConnection, endpoint_id: str) -> Endpoint | None:
    c = webhook_endpoint.c
    query = sa.select(*_ENDPOINT).where(c.id == endpoint_id, c.deleted_at.is_(None))
    row = (await conn.execute(query)).mappings().first()
    return None if row is None else Endpoint(**row)


async def rotate_secret(
    conn: AsyncConnection, endpoint_id: str, sealed_secret: bytes, overlap_s: int
) -> Endpoint | None:
    """Sign with a new secret from now on, and with the one before too for `overlap_s`. None: no such endpoint."""
    c = webhook_endpoint.c
    statement = (
        sa.update(webhook_endpoint)
        .where(c.id == endpoint_id, c.deleted_at.is_(None))
        .values(
            secret=sealed_secret,
            secret_before=c.secret,
            secret_before_until=sa.func.now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, float(overlap_s)),
        )
        .returning(*_ENDPOINT)
    )
    row = (await conn.execute(statement)).mappings().first()
    return None if row is None else Endpoint(**row)


async def delete_endpoint(conn: AsyncConnection, endpoint_id: str) -> Endpoint | None:
    c = webhook_endpoint.c
    statement = (
        sa.update(webhook_endpoint)
        .where(c.id == endpoint_id, c.deleted_at.is_(None))
        .values(deleted_at=sa.func.now())
        .returning(*_ENDPOINT)
    )
    row = (await conn.execute(statement)).mappings().first()
    return None if row is None else Endpoint(**row)


async def works(conn: AsyncConnection, key_id: str) -> bool:
    """Whether this key has not been revoked."""
    c = operator_key.c
    query = sa.select(c.id).where(c.id == key_id, c.revoked_at.is_(None))
    return (await conn.execute(query)).first() is not None
