"""Sales and their items in Postgres: one function for each thing an operator can do to them.

`AsyncConnection` first; the caller owns the transaction. Every change of a sale adds 1 to `sale.version`, which is the
ETag, the guard of `sale_switch`, and what front doors compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger.tables import item as item_table
from app.ledger.tables import journal, outbox, purchase_order, sms
from app.ledger.tables import sale as sale_table


@dataclass(frozen=True)
class Item:
    sale: str
    sku: str
    position: int
    title: str
    price_minor: int
    currency: str
    total: int
    reserved: int
    sold: int
    epoch: int
    paused_at: datetime | None

    @property
    def available(self) -> int:
        """Units that nobody owns, by Postgres."""
        return self.total - self.reserved - self.sold


@dataclass(frozen=True)
class Sale:
    """A row of `sale`, with its items in their order."""

    id: str
    title: str
    state: str
    word: str  # the state that people see, by the clock and the stock: also line_open and sold_out
    version: int
    time_zone: str | None
    line_opens_at: datetime
    opens_at: datetime
    closes_at: datetime
    draw_freeze_s: int
    beacon: str
    beacon_wait_s: int
    beacon_value: str | None
    beacon_at: datetime | None
    pay_within_s: int
    limit_per_buyer: int
    rate_per_s: float | None
    standby: bool
    line_max: int
    pass_mode: str
    challenge: str
    audience: list[str] | None
    channels: list[str]
    default_channel: str | None
    return_urls: list[str]
    message: str | None
    seed: bytes | None
    copy_of: str | None
    epoch: int
    home: str | None
    pulse: int
    created_at: datetime
    published_at: datetime | None
    opened_at: datetime | None
    sold_out_at: datetime | None
    closed_at: datetime | None
    settled_at: datetime | None
    items: tuple[Item, ...]


_NOW = sa.func.clock_timestamp()
# As `app.desk.live.state_word` says it; what Redis counts, the worker notes within a second or so (`sold_out_at`).
_WORD = sa.case(
    (sale_table.c.state.in_(("draft", "closed", "settled")), sale_table.c.state),
    (sale_table.c.closes_at <= _NOW, "closed"),
    (sale_table.c.state == "paused", "paused"),
    (sa.and_(sale_table.c.opens_at <= _NOW, sale_table.c.sold_out_at.is_not(None)), "sold_out"),
    (sale_table.c.opens_at <= _NOW, "open"),
    (sale_table.c.line_opens_at <= _NOW, "line_open"),
    else_="scheduled",
).label("word")
_SALE = [
    _WORD if name == "word" else sale_table.c[name] for name in Sale.__dataclass_fields__ if name != "items"
]
_ITEM = [item_table.c[name] for name in Item.__dataclass_fields__]


async def clock(conn: AsyncConnection) -> datetime:
    """Postgres' clock, which decides what has passed."""
    return (await conn.execute(sa.select(sa.func.clock_timestamp()))).scalar_one()  # type: ignore[no-any-return]


async def insert_draft(
    conn: AsyncConnection, values: Mapping[str, Any], items: Sequence[Mapping[str, Any]]
) -> bool:
    """Store a new draft. False: the id is taken, or was by a deleted draft (an id is never used again)."""
    used = (
        sa.select(journal.c.id)
        .where(journal.c.sale == values["id"], journal.c.action == "sale.delete")
        .limit(1)
    )
    if (await conn.execute(used)).first() is not None:
        return False
    statement = insert(sale_table).values(**values).on_conflict_do_nothing(index_elements=["id"])
    if (await conn.execute(statement.returning(sale_table.c.id))).first() is None:
        return False
    await _insert_items(conn, str(values["id"]), items)
    return True


async def _insert_items(conn: AsyncConnection, sale: str, items: Sequence[Mapping[str, Any]]) -> None:
    await conn.execute(
        sa.insert(item_table), [{"sale": sale, "position": at, **one} for at, one in enumerate(items)]
    )


async def get(conn: AsyncConnection, sale: str, *, lock: bool = False) -> Sale | None:
    """One sale with its items; `lock` holds the row until the transaction ends."""
    query = sa.select(*_SALE).where(sale_table.c.id == sale)
    if lock:
        query = query.with_for_update()
    row = (await conn.execute(query)).mappings().first()
    if row is None:
        return None
    return Sale(**row, items=(await _items(conn, [sale])).get(sale, ()))


async def page(
    conn: AsyncConnection, *, limit: int, before: tuple[datetime, str] | None = None, state: str | None = None
) -> list[Sale]:
    """Sales, newest first; `before` is (created_at, id) of the last one seen, `state` a word as in `Sale.word`."""
    query = sa.select(*_SALE).order_by(sale_table.c.created_at.desc(), sale_table.c.id.desc()).limit(limit)
    if state is not None:
        query = query.where(_WORD.element == state)
    if before is not None:
        query = query.where(sa.tuple_(sale_table.c.created_at, sale_table.c.id) < before)
    rows = (await conn.execute(query)).mappings().all()
    items = await _items(conn, [row["id"] for row in rows])
    return [Sale(**row, items=items.get(row["id"], ())) for row in rows]


async def _items(conn: AsyncConnection, sales: list[str]) -> dict[str, tuple[Item, ...]]:
    query = (
        sa.select(*_ITEM)
        .where(item_table.c.sale.in_(sales))
        .order_by(item_table.c.sale, item_table.c.position)
    )
    found: dict[str, list[Item]] = {}
    for row in (await conn.execute(query)).mappings():
        found.setdefault(row["sale"], []).append(Item(**row))
    return {sale: tuple(items) for sale, items in found.items()}


async def change(conn: AsyncConnection, sale: str, values: Mapping[str, Any]) -> int:
    """Set these columns and add 1 to the version; the row must be locked or its state checked by the caller."""
    statement = (
        sa.update(sale_table)
        .where(sale_table.c.id == sale)
        .values(**values, version=sale_table.c.version + 1)
        .returning(sale_table.c.version)
    )
    return int((await conn.execute(statement)).scalar_one())


async def replace_items(conn: AsyncConnection, sale: str, items: Sequence[Mapping[str, Any]]) -> None:
    """Give a draft other items."""
    await conn.execute(sa.delete(item_table).where(item_table.c.sale == sale))
    await _insert_items(conn, sale, items)


async def set_price(conn: AsyncConnection, sale: str, sku: str, price_minor: int) -> None:
    """Give an item another price; orders that exist keep theirs."""
    await conn.execute(
        sa.update(item_table)
        .where(item_table.c.sale == sale, item_table.c.sku == sku)
        .values(price_minor=price_minor)
    )


async def resume_items(conn: AsyncConnection, sale: str) -> list[str]:
    """End the pause of every item that was stopped because Postgres had no stock for it. Returns their skus."""
    found = await conn.execute(
        sa.update(item_table)
        .where(item_table.c.sale == sale, item_table.c.paused_at.is_not(None))
        .values(paused_at=None)
        .returning(item_table.c.sku)
    )
    return sorted(found.scalars())


async def delete_draft(conn: AsyncConnection, sale: str) -> None:
    """Remove a sale that was never published, with its items."""
    await conn.execute(sa.delete(item_table).where(item_table.c.sale == sale))
    await conn.execute(sa.delete(sale_table).where(sale_table.c.id == sale, sale_table.c.state == "draft"))


async def add_units(conn: AsyncConnection, sale: str, sku: str, units: int) -> int | None:
    """Raise or lower an item's total; returns the new one. None: it would fall below what is reserved and sold."""
    c = item_table.c
    statement = (
        sa.update(item_table)
        .where(c.sale == sale, c.sku == sku, c.reserved + c.sold <= c.total + units)
        .values(total=c.total + units)
        .returning(c.total)
    )
    total = (await conn.execute(statement)).scalar_one_or_none()
    return None if total is None else int(total)


# ---- what is shown live ---------------------------------------------------------------------------------------------


async def tally(conn: AsyncConnection, sale: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Orders of a sale: sku → state → (orders, units)."""
    c = purchase_order.c
    query = (
        sa.select(c.sku, c.state, sa.func.count().label("orders"), sa.func.sum(c.units).label("units"))
        .where(c.sale == sale)
        .group_by(c.sku, c.state)
    )
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for sku, state, orders, units in await conn.execute(query):
        found.setdefault(sku, {})[state] = (int(orders), int(units))
    return found


async def sms_tally(conn: AsyncConnection, sale: str) -> dict[str, int]:
    """SMS of a sale: state → how many."""
    query = sa.select(sms.c.state, sa.func.count()).where(sms.c.sale == sale).group_by(sms.c.state)
    return {state: int(count) for state, count in await conn.execute(query)}


async def latency(conn: AsyncConnection, sale: str, within_s: int) -> dict[str, float | None]:
    """p50 and p99 in ms, of the orders of the last `within_s`: claim → reserved, reserved → paid."""
    c = purchase_order.c
    confirm_ms = sa.extract("epoch", c.reserved_at - c.claimed_at) * 1000
    pay_ms = sa.extract("epoch", c.paid_at - c.reserved_at) * 1000
    since = sa.func.now() - sa.text(f"interval '{int(within_s)} seconds'")

    def at(share: float, what: Any, moment: Any) -> Any:
        return sa.func.percentile_cont(share).within_group(what.asc()).filter(moment > since)

    query = sa.select(
        at(0.5, confirm_ms, c.reserved_at).label("confirm_p50_ms"),
        at(0.99, confirm_ms, c.reserved_at).label("confirm_p99_ms"),
        at(0.5, pay_ms, c.paid_at).label("pay_p50_ms"),
        at(0.99, pay_ms, c.paid_at).label("pay_p99_ms"),
    ).where(c.sale == sale)
    row = (await conn.execute(query)).mappings().one()
    return {name: None if value is None else round(float(value), 1) for name, value in row.items()}


# ---- negative top-ups: Redis first, so the intent is written before -------------------------------------------------


@dataclass(frozen=True)
class Intent:
    """Units that are to be taken out of a sale: an outbox row that no relay leases (`stock_take`, state `intent`)."""

    row_id: int
    sale: str
    epoch: int
    sku: str
    units: int  # negative
    take_id: str  # names the take in Redis, once
    actor: str
    role: str
    reason: str | None


async def intend_take(
    conn: AsyncConnection,
    sale: str,
    epoch: int,
    *,
    sku: str,
    units: int,
    take_id: str,
    actor: str,
    role: str,
    reason: str | None,
) -> int:
    """Note a take before Redis hears of it; the same take again finds its row, finished or not. Returns its id."""
    c = outbox.c
    query = sa.select(c.id).where(
        c.kind == "stock_take", c.state != "dropped", c.sale == sale, c.payload["id"].astext == take_id
    )
    if (found := (await conn.execute(query)).scalar_one_or_none()) is not None:
        return int(found)
    payload = {"sku": sku, "units": units, "id": take_id, "actor": actor, "role": role, "reason": reason}
    statement = sa.insert(outbox).values(
        kind="stock_take", state="intent", sale=sale, epoch=epoch, payload=payload
    )
    return int((await conn.execute(statement.returning(c.id))).scalar_one())


async def intents(conn: AsyncConnection, older_than_s: float, limit: int) -> list[Intent]:
    """Takes that nobody has finished for some time."""
    c = outbox.c
    query = (
        sa.select(c.id, c.sale, c.epoch, c.payload)
        .where(
            c.kind == "stock_take",
            c.state == "intent",
            c.created_at < sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, float(older_than_s)),
        )
        .order_by(c.id)
        .limit(limit)
    )
    found = []
    for row in await conn.execute(query):
        p = row.payload
        found.append(
            Intent(
                row.id,
                row.sale,
                row.epoch,
                p["sku"],
                p["units"],
                p["id"],
                p["actor"],
                p["role"],
                p.get("reason"),
            )
        )
    return found


async def close_intent(conn: AsyncConnection, row_id: int, state: str) -> bool:
    """End an intent (`done`, `dropped`). False: somebody else has."""
    statement = (
        sa.update(outbox)
        .where(outbox.c.id == row_id, outbox.c.state == "intent")
        .values(state=state, done_at=sa.func.now())
        .returning(outbox.c.id)
    )
    return (await conn.execute(statement)).first() is not None


async def unannounced(conn: AsyncConnection, older_than_s: float, limit: int) -> list[str]:
    """Sales whose publish was committed and never reached Redis."""
    c = sale_table.c
    query = (
        sa.select(c.id)
        .where(
            c.state != "draft",
            c.home.is_(None),
            c.published_at < sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, float(older_than_s)),
        )
        .limit(limit)
    )
    return [row.id for row in await conn.execute(query)]


async def set_home(conn: AsyncConnection, sale: str, home: str) -> None:
    """Note which Redis holds the sale, once it does; a rebuild's later home is not overwritten."""
    await conn.execute(
        sa.update(sale_table).where(sale_table.c.id == sale, sale_table.c.home.is_(None)).values(home=home)
    )
