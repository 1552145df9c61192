# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""Suppliers' daily bills beside our captures and refunds. A day's lines are kept, so that both are compared in SQL.

due ──► read (its lines are here and compared)     compared again while a difference is open: it may clear by itself

Differences (`what`: capture or refund):
    missing_here   on the bill, not in our books (a refund that we hold for failed counts as missing)
    missing_there  in our books, on no bill
    other_amount   on both, with another amount or currency

Captures are known by the supplier's reference, refunds by our own id (Alipay's refunds share their trade's reference).
Days are UTC. What is in our books within SLACK of midnight may be on the next day's bill: it is looked for a day later.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger.engine import driver
from app.providers.payment import BillLine

Row = dict[str, Any]

SLACK = "interval '1 hour'"  # suppliers book by their own clock, some when the money moves, some when they tell us
LINE_COLUMNS = (
    "provider",
    "day",
    "n",
    "what",
    "provider_ref",
    "our_id",
    "order_no",
    "amount_minor",
    "currency",
    "at",
)


async def plan(conn: AsyncConnection, provider: str, days_back: int, after_s: float) -> int:
    """A row for each finished day of this supplier since its first capture, at most `days_back`. Returns how many."""
    found = await conn.execute(
        text(
            "INSERT INTO bill (provider, day, next_at) SELECT :provider, d::date,"
            " (d + interval '1 day') AT TIME ZONE 'UTC' + make_interval(secs => :after)"
            " FROM (SELECT min(captured_at) AT TIME ZONE 'UTC' AS at FROM capture WHERE provider = :provider) AS first,"
            " generate_series(greatest(first.at::date, (now() AT TIME ZONE 'UTC')::date - CAST(:back AS int))"
            "::timestamp, ((now() AT TIME ZONE 'UTC')::date - 1)::timestamp, interval '1 day') AS d"
            " WHERE first.at IS NOT NULL ON CONFLICT (provider, day) DO UPDATE SET state = 'due', next_at ="
            " excluded.next_at WHERE bill.state = 'read' AND bill.read_at < excluded.next_at"  # read by hand, too early
        ),
        {"provider": provider, "back": days_back, "after": float(after_s)},
    )
    return int(found.rowcount)


async def want(conn: AsyncConnection, provider: str, day: date) -> None:
    """This day's bill is to be read now, whether or not it was before."""
    await conn.execute(
        text(
            "INSERT INTO bill (provider, day) VALUES (:provider, :day) ON CONFLICT (provider, day)"
            " DO UPDATE SET state = 'due', next_at = now(), leased_until = NULL, generation = bill.generation + 1"
        ),
        {"provider": provider, "day": day},
    )


async def lease(
    conn: AsyncConnection, providers: Sequence[str], lease_s: float, day: date | None = None
) -> Row | None:
    """Take the oldest due bill of these suppliers (of this day, if one is named)."""
    found = await conn.execute(
        text(
            "UPDATE bill SET leased_until = now() + make_interval(secs => :lease_s), generation = generation + 1,"
            " tries = tries + 1 WHERE (provider, day) = (SELECT provider, day FROM bill WHERE state = 'due'"
            " AND next_at <= now() AND (leased_until IS NULL OR leased_until < now())"
            " AND provider = ANY(CAST(:providers AS text[])) AND (CAST(:day AS date) IS NULL OR day = :day)"
            " ORDER BY day, provider LIMIT 1 FOR UPDATE SKIP LOCKED)"
            " RETURNING provider, day, tries, generation, (now() AT TIME ZONE 'UTC')::date - day AS age_days"
        ),
        {"providers": list(providers), "lease_s": float(lease_s), "day": day},
    )
    row = found.mappings().first()
    return None if row is None else dict(row)


async def later(conn: AsyncConnection, held: Row, wait_s: float, code: str) -> None:
    """The bill could not be read: due again after `wait_s`."""
    await conn.execute(
        text(
            "UPDATE bill SET leased_until = NULL, code = :code, next_at = now() + make_interval(secs => :wait_s)"
            " WHERE provider = :provider AND day = :day AND generation = :generation"
        ),
        {**_key(held), "generation": held["generation"], "wait_s": wait_s, "code": code},
    )


async def store(conn: AsyncConnection, held: Row, lines: Sequence[BillLine]) -> bool:
    """Replace the day's lines by what was read. False: the lease is no longer ours, and nothing changed."""
    found = await conn.execute(
        text(
            "UPDATE bill SET state = 'read', read_at = now(), leased_until = NULL, code = NULL, lines = :lines"
            " WHERE provider = :provider AND day = :day AND generation = :generation AND state = 'due' RETURNING day"
        ),
        {**_key(held), "generation": held["generation"], "lines": len(lines)},
    )
    if found.first() is None:
        return False
    await conn.execute(text("DELETE FROM bill_line WHERE provider = :provider AND day = :day"), _key(held))
    await (await driver(conn)).copy_records_to_table(
        "bill_line",
        records=[
            (
                held["provider"], held["day"], n, line.kind, line.provider_ref, line.our_id, line.order_no,
                line.amount_minor, line.currency, line.at,
            )
            for n, line in enumerate(lines)
        ],
        columns=LINE_COLUMNS,
    )  # fmt: skip
    return True


_DIFFERENCES = f"""
WITH line AS (SELECT * FROM bill_line WHERE provider = :provider AND day = :day),
span AS (SELECT :day::timestamp AT TIME ZONE 'UTC' - CASE WHEN EXISTS (SELECT FROM bill WHERE provider = :provider
    AND day = :day - 1 AND state = 'read') THEN {SLACK} ELSE interval '0' END AS start,
  (:day + 1)::timestamp AT TIME ZONE 'UTC' - {SLACK} AS stop)
SELECT CASE WHEN c.id IS NULL THEN 'missing_here' ELSE 'other_amount' END AS kind, 'capture' AS what,
  line.provider_ref AS ref, line.our_id, line.order_no, c.amount_minor AS ours_minor, line.amount_minor AS theirs_minor,
  line.currency, line.at
FROM line LEFT JOIN capture c ON c.provider = line.provider AND c.provider_ref = line.provider_ref
WHERE line.what = 'capture' AND (c.id IS NULL OR (c.amount_minor, c.currency) <> (line.amount_minor, line.currency))
UNION ALL
SELECT CASE WHEN r.id IS NULL OR r.state = 'failed' THEN 'missing_here' ELSE 'other_amount' END, 'refund',
  line.provider_ref, line.our_id, line.order_no, r.amount_minor, line.amount_minor, line.currency, line.at
FROM line LEFT JOIN refund r ON r.id = line.our_id
WHERE line.what = 'refund' AND (r.id IS NULL OR r.state = 'failed'
  OR (r.amount_minor, r.currency) <> (line.amount_minor, line.currency))
UNION ALL
SELECT 'missing_there', 'capture', c.provider_ref, coalesce(c.attempt_id, ''), c.order_no, c.amount_minor, NULL,
  c.currency, c.captured_at
FROM capture c, span WHERE c.provider = :provider AND c.captured_at >= span.start AND c.captured_at < span.stop
  AND NOT EXISTS (SELECT FROM bill_line l WHERE l.provider = :provider AND l.what = 'capture'
  AND l.provider_ref = c.provider_ref)
UNION ALL
SELECT 'missing_there', 'refund', coalesce(r.provider_ref, ''), r.id, r.order_no, r.amount_minor, NULL, r.currency,
  r.done_at
FROM refund r JOIN capture c ON c.id = r.capture_id, span WHERE c.provider = :provider AND r.state = 'done'
  AND r.done_at >= span.start AND r.done_at < span.stop AND NOT EXISTS (SELECT FROM bill_line l
  WHERE l.provider = :provider AND l.what = 'refund' AND l.our_id = r.id)
""".replace(":day", "CAST(:day AS date)")


async def compare(conn: AsyncConnection, provider: str, day: date) -> list[Row]:
    """Keep the differences of a read day as they are now; those that are gone are cleared. Returns the new ones."""
    given = {"provider": provider, "day": day}
    found = await conn.execute(
        text(
            f"WITH now_differ AS ({_DIFFERENCES}),"
            " cleared AS (UPDATE bill_difference AS d SET cleared_at = now() WHERE d.provider = :provider AND d.day ="
            " CAST(:day AS date) AND d.cleared_at IS NULL AND NOT EXISTS (SELECT FROM now_differ n WHERE"
            " (n.kind, n.what, n.ref, n.our_id) = (d.kind, d.what, d.ref, d.our_id)))"
            " INSERT INTO bill_difference AS old (provider, day, kind, what, ref, our_id, order_no, ours_minor,"
            " theirs_minor, currency, at) SELECT DISTINCT ON (kind, what, ref, our_id) :provider, CAST(:day AS date),"
            " kind, what, ref, our_id, order_no, ours_minor, theirs_minor, currency, at FROM now_differ"
            " ON CONFLICT (provider, day, kind, what, ref, our_id) DO UPDATE SET cleared_at = NULL, found_at = now(),"
            " ours_minor = excluded.ours_minor, theirs_minor = excluded.theirs_minor, currency = excluded.currency"
            " WHERE old.cleared_at IS NOT NULL OR (old.ours_minor, old.theirs_minor, old.currency) IS DISTINCT FROM"
            " (excluded.ours_minor, excluded.theirs_minor, excluded.currency)"
            " RETURNING kind, what, ref, our_id, order_no, ours_minor, theirs_minor, currency, at"
        ),
        given,
    )
    return [dict(row) for row in found.mappings()]


async def open_days(conn: AsyncConnection, providers: Sequence[str]) -> list[tuple[str, date]]:
    """Read days with open differences, newest first."""
    found = await conn.execute(
        text(
            "SELECT DISTINCT d.provider, d.day FROM bill_difference d JOIN bill b ON (b.provider, b.day) ="
            " (d.provider, d.day) WHERE d.cleared_at IS NULL AND b.state = 'read'"
            " AND d.provider = ANY(CAST(:providers AS text[])) ORDER BY d.day DESC"
        ),
        {"providers": list(providers)},
    )
    return [(row.provider, row.day) for row in found]


_BILLS = (
    "SELECT b.provider, b.day, b.state, b.lines, b.read_at, b.code, b.tries, (SELECT count(*) FROM bill_difference d"
    " WHERE d.provider = b.provider AND d.day = b.day AND d.cleared_at IS NULL) AS differing,"
    " coalesce((SELECT jsonb_agg("
    "jsonb_build_object('kind', d.kind, 'what', d.what, 'ref', d.ref, 'our_id', d.our_id, 'order_no',"
    " d.order_no, 'ours_minor', d.ours_minor, 'theirs_minor', d.theirs_minor, 'currency', d.currency)"
    " ORDER BY d.what, d.kind, d.ref, d.our_id) FROM (SELECT * FROM bill_difference d WHERE d.provider = b.provider"
    " AND d.day = b.day AND d.cleared_at IS NULL ORDER BY d.what, d.kind, d.ref, d.our_id LIMIT :shown_max) AS d),"
    " '[]') AS differences FROM bill b"
)


async def report(conn: AsyncConnection, day: date) -> list[Row]:
    """All suppliers' bills of a day, each with its open differences."""
    found = await conn.execute(
        text(f"{_BILLS} WHERE b.day = :day ORDER BY b.provider"), {"day": day, "shown_max": None}
    )
    return [dict(row) for row in found.mappings()]


async def page(
    conn: AsyncConnection,
    *,
    limit: int,
    shown_max: int,
    before: tuple[date, str] | None = None,
    provider: str | None = None,
    differing: bool = False,
) -> list[Row]:
    """Bills, newest first, each with its first `shown_max` open differences.

    before: the (day, supplier) of the last one that was seen. differing: only those that differ, or were tried and
    could not be read.
    """
    found = await conn.execute(
        text(
            f"{_BILLS} WHERE (CAST(:day AS date) IS NULL OR b.day < :day OR (b.day = :day AND b.provider > :last))"
            " AND (CAST(:provider AS text) IS NULL OR b.provider = :provider)"
            " AND (NOT :differing OR b.code IS NOT NULL OR EXISTS (SELECT FROM bill_difference d"
            " WHERE d.provider = b.provider AND d.day = b.day AND d.cleared_at IS NULL))"
            " ORDER BY b.day DESC, b.provider LIMIT :limit"
        ),
        {
            "day": None if before is None else before[0],
            "last": "" if before is None else before[1],
            "provider": provider,
            "differing": differing,
            "limit": limit,
            "shown_max": shown_max,
        },
    )
    return [dict(row) for row in found.mappings()]


async def counts(conn: AsyncConnection) -> list[tuple[str, str, str, int]]:
    """(supplier, kind, what, open differences) for each supplier that ever differed; zeros too, for metrics."""
    found = await conn.execute(
        text(
            "SELECT provider, kind, what, count(*) FILTER (WHERE cleared_at IS NULL) AS open FROM bill_difference"
            " GROUP BY 1, 2, 3"
        )
    )
    return [(row.provider, row.kind, row.what, int(row.open)) for row in found]


def _key(held: Row) -> Row:
    return {"provider": held["provider"], "day": held["day"]}
