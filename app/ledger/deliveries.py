# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""Which event is still to be pushed to which endpoint, and what became of it. A row is made for each event that the
endpoint asked for, from the feed's positions: what the feed shows is pushed, whatever crashes in between.

due ──► delivered (it answered 2xx)
 └────► failed (nobody took it in time, the endpoint is gone or was deleted); a replay makes it due again, and so does
                enabling an endpoint again, for what was given up because of it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

Row = dict[str, Any]
LIVE = "deleted_at IS NULL AND disabled_at IS NULL"


@dataclass(frozen=True)
class Target:
    """An endpoint that is told: where, and its sealed secrets, newest first."""

    id: str
    url: str
    secrets: tuple[bytes, ...]


async def targets(conn: AsyncConnection) -> list[Target]:
    """Every endpoint that is told. The secret before signs too while its time lasts."""
    found = await conn.execute(
        text(
            "SELECT id, url, secret, CASE WHEN secret_before_until > now() THEN secret_before END AS before"
            f" FROM webhook_endpoint WHERE {LIVE} ORDER BY created_at, id"
        )
    )
    return [
        Target(row.id, row.url, tuple(bytes(one) for one in (row.secret, row.before) if one is not None))
        for row in found
    ]


async def is_behind(conn: AsyncConnection) -> bool:
    """Whether some endpoint has not got deliveries of all numbered events; a look, so that rest costs one statement."""
    found = await conn.execute(
        text(
            f"SELECT EXISTS (SELECT 1 FROM webhook_endpoint WHERE {LIVE} AND (told_to IS NULL OR told_to <"
            " (SELECT coalesce(max(position), 0) FROM event)))"
        )
    )
    return bool(found.scalar_one())


async def spread(conn: AsyncConnection, events_max: int, keep_trying_s: float) -> tuple[int, bool]:
    """Make deliveries of numbered events that have none, for at most `events_max` positions of each endpoint.

    Returns how many deliveries were made, and whether some endpoint has more to come.
    """
    newest = (await conn.execute(text("SELECT coalesce(max(position), 0) FROM event"))).scalar_one()
    behind = await conn.execute(
        text(
            f"SELECT id, told_to FROM webhook_endpoint WHERE {LIVE}"
            " AND (told_to IS NULL OR told_to < :newest) ORDER BY id FOR UPDATE SKIP LOCKED"
        ),
        {"newest": newest},
    )
    made, more = 0, False
    for row in behind.all():
        start = newest if row.told_to is None else row.told_to
        end = min(newest, start + events_max)
        found = await conn.execute(
            text(
                "INSERT INTO webhook_delivery (endpoint, event, expires_at)"
                " SELECT w.id, e.id, now() + make_interval(secs => :keep) FROM webhook_endpoint w, event e"
                " WHERE w.id = :id AND e.position > :start AND e.position <= :end"
                " AND jsonb_exists(w.events, e.type) ON CONFLICT (endpoint, event) DO NOTHING"
            ),
            {"id": row.id, "start": start, "end": end, "keep": float(keep_trying_s)},
        )
        await conn.execute(
            text("UPDATE webhook_endpoint SET told_to = :end WHERE id = :id"), {"id": row.id, "end": end}
        )
        made += int(found.rowcount)
        more = more or end < newest
    return made, more


async def lease_due(conn: AsyncConnection, room: Mapping[str, int], limit: int, lease_s: float) -> list[Row]:
    """Take due deliveries, with their events. room: endpoint → how many of its own at most."""
    found = await conn.execute(
        text(
            "WITH picked AS (SELECT d.endpoint, d.event FROM"
            " unnest(CAST(:ids AS text[]), CAST(:rooms AS int[])) AS wanted (id, room), LATERAL"
            " (SELECT endpoint, event FROM webhook_delivery WHERE endpoint = wanted.id AND state = 'due'"
            " AND next_at <= now() AND expires_at > now() AND (leased_until IS NULL OR leased_until < now())"
            " ORDER BY next_at LIMIT wanted.room FOR UPDATE SKIP LOCKED) AS d LIMIT :limit),"
            " leased AS (UPDATE webhook_delivery AS d SET leased_until = now() + make_interval(secs => :lease_s),"
            " generation = d.generation + 1, tries = d.tries + 1 FROM picked"
            " WHERE d.endpoint = picked.endpoint AND d.event = picked.event"
            " RETURNING d.endpoint, d.event, d.tries, d.generation)"
            " SELECT leased.endpoint, leased.event, leased.tries, leased.generation,"
            " e.id, e.type, e.at, e.version, e.data FROM leased JOIN event e ON e.id = leased.event"
        ),
        {
            "ids": list(room),
            "rooms": list(room.values()),
            "limit": limit,
            "lease_s": float(lease_s),
        },
    )
    return [dict(row) for row in found.mappings()]


async def deliver(conn: AsyncConnection, row: Row, status: int) -> bool:
    """It was taken. False: the lease is no longer ours (the shop gets it twice: that is promised)."""
    return await _end(conn, row, "delivered", status, None)


async def again(
    conn: AsyncConnection, row: Row, wait_s: float, code: str, status: int | None, *, tried: bool = True
) -> bool:
    """It was not taken: due again after `wait_s`. tried=False: nothing was sent, the try does not count."""
    found = await conn.execute(
        text(
            "UPDATE webhook_delivery SET code = :code, status = :status, leased_until = NULL,"
            " tries = tries - :back, next_at = now() + make_interval(secs => :wait_s)"
            " WHERE endpoint = :endpoint AND event = :event AND generation = :generation AND state = 'due'"
        ),
        {
            "endpoint": row["endpoint"],
            "event": row["event"],
            "generation": row["generation"],
            "back": 0 if tried else 1,
            "wait_s": wait_s,
            "code": code,
            "status": status,
        },
    )
    return bool(found.rowcount)


async def _end(conn: AsyncConnection, row: Row, state: str, status: int | None, code: str | None) -> bool:
    found = await conn.execute(
        text(
            "UPDATE webhook_delivery SET state = :state, status = :status, code = :code, leased_until = NULL,"
            " ended_at = now() WHERE endpoint = :endpoint AND event = :event AND generation = :generation"
            " AND state = 'due'"
        ),
        {
            "state": state,
            "status": status,
            "code": code,
            "endpoint": row["endpoint"],
            "event": row["event"],
            "generation": row["generation"],
        },
    )
    return bool(found.rowcount)


async def disable(conn: AsyncConnection, endpoint: str, why: str) -> bool:
    """Tell this endpoint no more, and give up what it was still to be told. False: it was disabled before."""
    found = await conn.execute(
        text(
            f"UPDATE webhook_endpoint SET disabled_at = now(), disabled_why = :why WHERE id = :id AND {LIVE}"
            " RETURNING id"
        ),
        {"id": endpoint, "why": why},
    )
    return found.first() is not None


async def enable(conn: AsyncConnection, endpoint: str, keep_trying_s: float) -> int | None:
    """Tell a disabled endpoint again, and what it missed of the last `keep_trying_s`. None: it is not disabled.

    Returns how many deliveries that were given up are due again. Events that came since it was disabled get theirs from
    the next spread, for `told_to` stood still; it is moved only over those that are too old.
    """
    given = {"id": endpoint, "keep": float(keep_trying_s)}
    found = await conn.execute(
        text(
            "UPDATE webhook_endpoint SET disabled_at = NULL, disabled_why = NULL, told_to = greatest(told_to,"
            " (SELECT max(position) FROM event WHERE at < now() - make_interval(secs => :keep)))"
            " WHERE id = :id AND deleted_at IS NULL AND disabled_at IS NOT NULL RETURNING id"
        ),
        given,
    )
    if found.first() is None:
        return None
    again = await conn.execute(
        text(
            "UPDATE webhook_delivery AS d SET state = 'due', status = NULL, code = NULL, ended_at = NULL, tries = 0,"
            " next_at = now(), expires_at = now() + make_interval(secs => :keep), leased_until = NULL,"
            " generation = d.generation + 1 FROM event e WHERE d.endpoint = :id AND e.id = d.event"
            " AND e.at >= now() - make_interval(secs => :keep)"
            " AND (d.state = 'due' OR (d.state = 'failed' AND d.code LIKE 'endpoint\\_%'))"
        ),
        given,
    )
    return int(again.rowcount)


async def sweep(conn: AsyncConnection, keep_s: float, limit: int) -> tuple[int, int]:
    """(given up, forgotten): deliveries that nobody took in time or nobody waits for; ended ones that are old."""
    failed = await conn.execute(
        text(
            "UPDATE webhook_delivery AS d SET state = 'failed', ended_at = now(), leased_until = NULL,"
            " code = CASE WHEN w.deleted_at IS NOT NULL THEN 'endpoint_deleted'"
            " WHEN w.disabled_at IS NOT NULL THEN 'endpoint_' || w.disabled_why ELSE coalesce(d.code, 'too_late') END"
            " FROM webhook_endpoint w WHERE w.id = d.endpoint AND d.state = 'due'"
            " AND (d.leased_until IS NULL OR d.leased_until < now())"
            " AND (d.expires_at <= now() OR w.deleted_at IS NOT NULL OR w.disabled_at IS NOT NULL)"
        )
    )
    old = await conn.execute(
        text(
            "DELETE FROM webhook_delivery WHERE (endpoint, event) IN (SELECT endpoint, event FROM webhook_delivery"
            " WHERE ended_at < now() - make_interval(secs => :keep) LIMIT :limit)"
        ),
        {"keep": float(keep_s), "limit": limit},
    )
    return int(failed.rowcount), int(old.rowcount)


async def waiting(conn: AsyncConnection) -> int:
    """Deliveries that are due, now or later."""
    found = await conn.execute(text("SELECT count(*) FROM webhook_delivery WHERE state = 'due'"))
    return int(found.scalar_one())


async def replay(
    conn: AsyncConnection,
    endpoint: str,
    *,
    after: datetime | None,
    after_position: int | None,
    until: datetime | None,
    keep_trying_s: float,
    limit: int,
) -> int | None:
    """Make events due for this endpoint once more, whatever became of them. None: there are more than `limit`.

    Behind `after_position` of the feed, or from the time `after` on; before the time `until`, if there is one.
    """
    which = (
        " FROM webhook_endpoint w, event e WHERE w.id = :id AND e.position IS NOT NULL"
        " AND jsonb_exists(w.events, e.type)"
        " AND (CAST(:after AS timestamptz) IS NULL OR e.at >= :after)"
        " AND (CAST(:position AS bigint) IS NULL OR e.position > :position)"
        " AND (CAST(:until AS timestamptz) IS NULL OR e.at < :until)"
    )
    given = {"id": endpoint, "after": after, "position": after_position, "until": until}
    counted = await conn.execute(
        text(f"SELECT count(*) FROM (SELECT 1{which} LIMIT :limit) AS wanted"), {**given, "limit": limit + 1}
    )
    if counted.scalar_one() > limit:
        return None
    found = await conn.execute(
        text(
            "INSERT INTO webhook_delivery (endpoint, event, expires_at)"
            f" SELECT w.id, e.id, now() + make_interval(secs => :keep){which}"
            " ON CONFLICT (endpoint, event) DO UPDATE SET state = 'due', status = NULL, code = NULL,"
            " ended_at = NULL, tries = 0, next_at = now(), expires_at = excluded.expires_at, leased_until = NULL,"
            " generation = webhook_delivery.generation + 1"
        ),
        {**given, "keep": float(keep_trying_s)},
    )
    return int(found.rowcount)
