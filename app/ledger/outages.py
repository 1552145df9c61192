"""Outages of payment suppliers, and the time to pay that orders get because of them. Postgres' clock decides both.

An outage is open while workers keep seeing the supplier out; when nobody has for `gap_s` it is over, and the next is
another one: a supplier that flaps is one outage. `deadline_extension` holds every extension: its key (order, outage)
makes it one for each outage, whatever workers do at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger import orders

Row = dict[str, Any]

CURRENT_S = 5.0  # an outage nobody has seen for that long extends nothing more; workers look once a second
NOTING_LOCK = 0x4F555421  # "OUT!": one worker notes at a time, or the same outage would be two


async def note(conn: AsyncConnection, providers: Sequence[str], gap_s: float) -> list[str]:
    """These suppliers are out now. Returns those whose outage begins with this."""
    await conn.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": NOTING_LOCK})
    found = await conn.execute(
        text(
            "WITH seen AS (UPDATE payment_outage SET seen_at = now() WHERE provider = ANY(CAST(:providers AS text[]))"
            " AND seen_at > now() - make_interval(secs => :gap) RETURNING provider)"
            " INSERT INTO payment_outage (provider) SELECT name FROM unnest(CAST(:providers AS text[])) AS name"
            " WHERE name NOT IN (SELECT provider FROM seen) RETURNING provider"
        ),
        {"providers": list(providers), "gap": float(gap_s)},
    )
    return [row.provider for row in found]


# An order without any attempt cannot be paid only if nobody can be: the caller says so (`unpaid_by`, else null).
_EXTEND = (
    "WITH open AS (SELECT provider, max(id) AS outage FROM payment_outage"
    " WHERE seen_at > now() - make_interval(secs => :current) GROUP BY provider),"
    " due AS (SELECT o.order_no, o.pay_by, open.outage,"
    " least(CAST(:more AS integer), CAST(:most AS integer) - o.extended_s) AS extended_s"
    " FROM purchase_order AS o"
    " LEFT JOIN LATERAL (SELECT a.provider FROM payment_attempt AS a WHERE a.order_no = o.order_no"
    " ORDER BY a.attempt_no DESC LIMIT 1) AS newest ON TRUE"
    " JOIN open ON open.provider = coalesce(newest.provider, CAST(:unpaid_by AS text))"
    " WHERE o.state = 'reserved' AND NOT o.leaving AND o.pay_by > now()"
    " AND o.pay_by <= now() + make_interval(secs => CAST(:more AS integer)) AND o.extended_s < CAST(:most AS integer)"
    " AND NOT EXISTS (SELECT FROM deadline_extension AS e"
    " WHERE e.order_no = o.order_no AND e.outage = open.outage)"
    " ORDER BY o.pay_by LIMIT :limit FOR UPDATE OF o SKIP LOCKED),"
    " written AS (INSERT INTO deadline_extension (order_no, outage, pay_by_before, extended_s, most_s)"
    " SELECT order_no, outage, pay_by, extended_s, CAST(:most AS integer) FROM due"
    " ON CONFLICT (order_no, outage) DO NOTHING RETURNING order_no, extended_s)"
    " UPDATE purchase_order AS p SET pay_by = p.pay_by + make_interval(secs => written.extended_s),"
    " extended_s = p.extended_s + written.extended_s, version = p.version + 1"
    " FROM written WHERE p.order_no = written.order_no RETURNING {columns}"
)
_COLUMNS = ", ".join(f"p.{name.strip()}" for name in orders.COLUMNS.split(","))


async def extend(
    conn: AsyncConnection, *, more_s: int, most_s: int, limit: int, unpaid_by: str | None = None
) -> list[Row]:
    """Orders that would end within `more_s` while their supplier is out get `more_s` more, at most `most_s` in all.

    Once for each outage; the buyers are told. A deadline that has passed, an order that has ended or whose buyer leaves
    is let alone. unpaid_by: whose outage keeps buyers from paying who have no attempt yet. Returns the orders.
    """
    found = await conn.execute(
        text(_EXTEND.format(columns=_COLUMNS)),
        {"more": more_s, "most": most_s, "current": CURRENT_S, "limit": limit, "unpaid_by": unpaid_by},
    )
    rows = [dict(row) for row in found.mappings()]
    await orders.tell_many(conn, rows)
    return rows
