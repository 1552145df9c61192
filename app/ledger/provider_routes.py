"""The routes of suppliers that operators have set. Redis has a copy for every process to follow (reconcile.py)."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection


async def put(conn: AsyncConnection, name: str, route: Mapping[str, int] | None) -> None:
    """From this commit on the route is so; None: as the settings say."""
    if route is None:
        await conn.execute(text("DELETE FROM provider_route WHERE name = :name"), {"name": name})
        return
    await conn.execute(
        text(
            "INSERT INTO provider_route (name, route) VALUES (:name, CAST(:route AS jsonb))"
            " ON CONFLICT (name) DO UPDATE SET route = excluded.route, set_at = now()"
        ),
        {"name": name, "route": msgspec.json.encode(list(route.items())).decode()},
    )


async def every(conn: AsyncConnection) -> dict[str, dict[str, int]]:
    """All of them by name, the suppliers of each in order."""
    found = await conn.execute(text("SELECT name, route FROM provider_route"))
    return {row.name: {supplier: int(weight) for supplier, weight in row.route} for row in found}
