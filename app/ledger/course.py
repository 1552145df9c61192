"""What a sale goes through by itself, by Postgres' clock: it opens, sells out, closes, settles; and where it lives.

What operators do to it is in sales.py. Each function is one SQL intent in the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection


class Home(NamedTuple):
    """Which Redis holds a sale, and how far Postgres has seen it."""

    sale: str
    state: str
    epoch: int
    home: str | None
    pulse: int


class Told(NamedTuple):
    """What Redis has been told of an epoch: tickets (sku, seq, version), top-ups (sku, id), the newest switch."""

    tickets: list[tuple[str, int, int]]
    added: list[tuple[str, str]]
    version: int


class Counts(NamedTuple):
    """One item by Postgres, at one moment."""

    sku: str
    total: int
    reserved: int
    sold: int
    to_release: int  # units that go back once the outbox has told Redis
    to_add: int  # units of top-ups that Redis has not been told of
    epoch: int


async def epochs(conn: AsyncConnection, sales: Sequence[str]) -> dict[str, int]:
    """sale → epoch by Postgres, for those that exist."""
    found = await conn.execute(
        text("SELECT id, epoch FROM sale WHERE id = ANY(CAST(:sales AS text[]))"), {"sales": list(sales)}
    )
    return {row.id: row.epoch for row in found}


async def is_settled(conn: AsyncConnection, sale: str) -> bool:
    """Whether the sale has ended for good (or does not exist)."""
    state = (await conn.execute(text("SELECT state FROM sale WHERE id = :sale"), {"sale": sale})).scalar()
    return state is None or state == "settled"


async def is_due(conn: AsyncConnection) -> bool:
    """Whether some sale's opening or closing has come; a look, so that rest costs one statement."""
    found = await conn.execute(
        text(
            "SELECT EXISTS (SELECT 1 FROM sale WHERE"
            " (state IN ('scheduled', 'open') AND opened_at IS NULL AND opens_at <= now())"
            " OR (state IN ('scheduled', 'open', 'paused') AND closes_at <= now()))"
        )
    )
    return bool(found.scalar_one())


async def open_due(conn: AsyncConnection) -> list[str]:
    """Sales whose opening has come become `open`. Returns their ids."""
    found = await conn.execute(
        text(
            "UPDATE sale SET state = 'open', opened_at = now(), version = version + 1"
            " WHERE state IN ('scheduled', 'open') AND opened_at IS NULL AND opens_at <= now() RETURNING id"
        )
    )
    return [row.id for row in found]


async def close_due(conn: AsyncConnection) -> list[str]:
    """Sales whose closing time has come become `closed`. Returns their ids."""
    found = await conn.execute(
        text(
            "UPDATE sale SET state = 'closed', closed_at = now(), version = version + 1"
            " WHERE state IN ('scheduled', 'open', 'paused') AND closes_at <= now() RETURNING id"
        )
    )
    return [row.id for row in found]


async def note_sold_out(conn: AsyncConnection, sale: str, sold_out: bool) -> bool:
    """Redis has no unit left (or has some again). True: that is news."""
    found = await conn.execute(
        text(
            "UPDATE sale SET sold_out_at = CASE WHEN :sold_out THEN now() END, version = version + 1"
            " WHERE id = :sale AND state IN ('open', 'paused') AND (sold_out_at IS NOT NULL) <> :sold_out RETURNING id"
        ),
        {"sale": sale, "sold_out": sold_out},
    )
    return found.first() is not None


async def note_beacon(conn: AsyncConnection, sale: str, value: str) -> bool:
    """The public random value that Redis holds for the draw, for the record. False: it was noted before."""
    found = await conn.execute(
        text(
            "UPDATE sale SET beacon_value = :value, beacon_at = now() WHERE id = :sale AND beacon_value IS NULL"
            " RETURNING id"
        ),
        {"sale": sale, "value": value},
    )
    return found.first() is not None


async def closed(conn: AsyncConnection) -> list[str]:
    """Closed sales that wait to be settled."""
    return [row.id for row in await conn.execute(text("SELECT id FROM sale WHERE state = 'closed'"))]


async def settle(conn: AsyncConnection, sale: str) -> bool:
    """The closed sale is over: no order waits for money, no money for its order, and Redis knows everything."""
    found = await conn.execute(
        text(
            "UPDATE sale SET state = 'settled', settled_at = now(), version = version + 1"
            " WHERE id = :sale AND state = 'closed'"
            " AND NOT EXISTS (SELECT 1 FROM purchase_order WHERE purchase_order.sale = :sale"
            "  AND purchase_order.state IN ('reserved', 'refunding'))"
            " AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.sale = :sale AND outbox.state IN ('due', 'intent'))"
            " AND NOT EXISTS (SELECT 1 FROM capture JOIN purchase_order USING (order_no)"
            "  WHERE purchase_order.sale = :sale AND capture.state IN ('due', 'refund_due'))"
            " RETURNING id"
        ),
        {"sale": sale},
    )
    return found.first() is not None


async def homes(conn: AsyncConnection) -> list[Home]:
    """Published sales that are not over, with the Redis that holds them."""
    found = await conn.execute(
        text(
            "SELECT id, state, epoch, home, pulse FROM sale WHERE state NOT IN ('draft', 'settled') ORDER BY id"
        )
    )
    return [Home(*row) for row in found]


async def note_pulses(conn: AsyncConnection, pulses: Sequence[tuple[str, int, int]]) -> None:
    """Redis has these pulses, (sale, epoch, pulse), on disk: one that comes back with less has lost writes."""
    await conn.execute(
        text(
            "UPDATE sale SET pulse = greatest(sale.pulse, seen.pulse)"
            " FROM unnest(CAST(:sales AS text[]), CAST(:epochs AS bigint[]), CAST(:pulses AS bigint[]))"
            " AS seen (sale, epoch, pulse) WHERE sale.id = seen.sale AND sale.epoch = seen.epoch"
        ),
        {
            "sales": [sale for sale, _, _ in pulses],
            "epochs": [epoch for _, epoch, _ in pulses],
            "pulses": [pulse for _, _, pulse in pulses],
        },
    )


async def move_home(conn: AsyncConnection, sale: str, epoch: int, home: str) -> None:
    """The sale is served by the Redis with this run_id from now on (it restarted from its own log)."""
    await conn.execute(
        text("UPDATE sale SET home = :home WHERE id = :sale AND epoch = :epoch"),
        {"sale": sale, "epoch": epoch, "home": home},
    )


async def told(conn: AsyncConnection, sale: str, epoch: int) -> Told:
    """What Redis certainly was told of this epoch, all of one moment: nothing of it may be missing there.

    An order with an outbox row that is due is left out: Redis may or may not know its newest version."""
    found = await conn.execute(
        text(
            "SELECT sku, seq, version FROM purchase_order AS o WHERE sale = :sale AND epoch = :epoch"
            " AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.order_no = o.order_no AND outbox.state = 'due')"
            " UNION ALL SELECT sku, seq, 1 FROM refused_claim AS o WHERE sale = :sale AND epoch = :epoch"
            " AND reason IN ('live_order', 'no_stock')"
            " AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.order_no = o.order_no AND outbox.state = 'due')"
        ),
        {"sale": sale, "epoch": epoch},
    )
    tickets = [(row.sku, row.seq, row.version) for row in found]
    rows = await conn.execute(
        text(
            "SELECT kind, payload FROM outbox WHERE sale = :sale AND epoch = :epoch AND state = 'done'"
            " AND (kind = 'stock_add' OR kind = 'switch' AND payload->>'version' IS NOT NULL)"
        ),
        {"sale": sale, "epoch": epoch},
    )
    added: list[tuple[str, str]] = []
    version = 0
    for row in rows:
        if row.kind == "stock_add":
            added.append((row.payload["sku"], str(row.payload["id"])))
        else:
            version = max(version, int(row.payload["version"]))
    return Told(tickets, added, version)


async def counts(conn: AsyncConnection, sale: str) -> list[Counts]:
    """The items of a sale with what is under way to Redis, all of one moment (one statement)."""
    found = await conn.execute(
        text(
            "SELECT item.sku, total, reserved, sold, item.epoch,"
            " coalesce(sum(CAST(payload->>'units' AS int)) FILTER (WHERE outbox.kind = 'release'), 0) AS to_release,"
            " coalesce(sum(CAST(payload->>'units' AS int)) FILTER (WHERE outbox.kind = 'stock_add'), 0) AS to_add"
            " FROM item LEFT JOIN outbox ON outbox.sale = item.sale AND outbox.state = 'due'"
            "  AND outbox.payload->>'sku' = item.sku AND outbox.epoch = item.epoch"
            " WHERE item.sale = :sale GROUP BY item.sku, total, reserved, sold, item.epoch"
            " ORDER BY item.sku"
        ),
        {"sale": sale},
    )
    return [
        Counts(row.sku, row.total, row.reserved, row.sold, row.to_release, row.to_add, row.epoch)
        for row in found
    ]


async def settled_of(conn: AsyncConnection, sales: Sequence[str]) -> list[tuple[str, int]]:
    """Those of these sales that are over: (sale, version)."""
    found = await conn.execute(
        text("SELECT id, version FROM sale WHERE id = ANY(CAST(:sales AS text[])) AND state = 'settled'"),
        {"sales": list(sales)},
    )
    return [(row.id, row.version) for row in found]
