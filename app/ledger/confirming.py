# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""Claims become orders: the SQL of confirm, in bulk.

A batch costs the same few statements whatever its size. All rows are inserted before an item is updated, so that the
lock of the item (which everyone wants) is held for one round trip and the commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger import outbox

_ORDER = (
    "order_no", "sale", "sku", "buyer_id", "epoch", "seq", "units", "amount_minor", "currency", "state",
    "claimed_at", "pay_within_s", "contact", "phone_index",
)  # fmt: skip
_LINE = ("order_no", "line_no", "kind", "sku", "title", "units", "unit_minor", "amount_minor")
_EVENT = ("id", "type", "sale", "order_no", "version", "data")
_ATTEMPT = ("id", "order_no", "attempt_no", "provider", "channel", "state", "amount_minor", "currency")
_SMS = ("id", "order_no", "sale", "template", "state", "expires_at")


class Item(NamedTuple):
    """What confirm must know of an item."""

    epoch: int
    title: str
    price_minor: int
    currency: str
    free: int  # units that nobody owns


class Terms(NamedTuple):
    """What confirm must know of a sale, as it is in this transaction."""

    now: datetime
    epoch: int
    pay_within_s: int
    default_channel: str | None
    items: dict[str, Item]


class NewOrder(NamedTuple):
    """One order to be written; `amount_minor` is the sum of its one line."""

    order_no: str
    sale: str
    sku: str
    buyer_id: str
    epoch: int
    seq: int
    units: int
    amount_minor: int
    currency: str
    state: str
    claimed_at: datetime
    pay_within_s: int
    contact: bytes | None
    phone_index: bytes | None = None


async def terms(conn: AsyncConnection, sale: str, *, lock: bool = False) -> Terms | None:
    """The sale's terms and items. lock: the items' counters stand still until the transaction ends."""
    found = (
        await conn.execute(
            text("SELECT now() AS now, epoch, pay_within_s, default_channel FROM sale WHERE id = :sale"),
            {"sale": sale},
        )
    ).first()
    if found is None:
        return None
    items = await conn.execute(
        text(
            "SELECT sku, epoch, title, price_minor, currency, total - reserved - sold AS free FROM item"
            " WHERE sale = :sale ORDER BY sku" + (" FOR UPDATE" if lock else "")
        ),
        {"sale": sale},
    )
    return Terms(
        found.now,
        found.epoch,
        found.pay_within_s,
        found.default_channel,
        {row.sku: Item(row.epoch, row.title, row.price_minor, row.currency, row.free) for row in items},
    )


async def copy_orders(conn: AsyncConnection, orders: Sequence[NewOrder]) -> None:
    """Write new orders by binary COPY, on the transaction's own connection.

    asyncpg.UniqueViolationError: one of them, or a live order of one of their buyers, exists; the transaction is lost.
    A statement must have gone before in this transaction: SQLAlchemy sends BEGIN with the first.
    """
    await _copy(conn, "purchase_order", orders, _ORDER)


async def insert_orders(conn: AsyncConnection, orders: Sequence[NewOrder]) -> set[str]:
    """Write those orders that nothing forbids, in this order, and return their numbers.

    The others meet a row: the same order (a redelivery), a live order of the same buyer, or another order of the same
    ticket. No conflict target is named: all three are answered by leaving the row out, none by losing the transaction.
    A conflicting transaction that is still open is waited for.
    """
    columns = [list(column) for column in zip(*orders, strict=True)]
    kinds = (
        "text",
        "text",
        "text",
        "text",
        "bigint",
        "bigint",
        "int",
        "bigint",
        "text",
        "text",
        "timestamptz",
        "int",
        "bytea",
        "bytea",
    )
    arrays = ", ".join(f"CAST(:c{at} AS {kind}[])" for at, kind in enumerate(kinds))
    found = await conn.execute(
        text(
            f"INSERT INTO purchase_order ({', '.join(_ORDER)}) SELECT {', '.join(_ORDER)}"
            f" FROM unnest({arrays}) WITH ORDINALITY AS claim ({', '.join(_ORDER)}, nth) ORDER BY nth"
            " ON CONFLICT DO NOTHING RETURNING order_no"
        ),
        {f"c{at}": column for at, column in enumerate(columns)},
    )
    return {row.order_no for row in found}


async def reserve(conn: AsyncConnection, sale: str, orders: Sequence[NewOrder]) -> bool:
    """Count the units of orders that were really inserted, one UPDATE an item, items in sku order.

    False: the item has another epoch by now (a rebuild came between): roll back and look again.
    IntegrityError (never_oversold): there are not that many units; the transaction is lost.
    """
    units: Counter[tuple[str, int]] = Counter()
    for order in orders:
        units[order.sku, order.epoch] += order.units
    for (sku, epoch), count in sorted(units.items()):
        found = await conn.execute(
            text(
                "UPDATE item SET reserved = reserved + :units WHERE sale = :sale AND sku = :sku AND epoch = :epoch"
            ),
            {"units": count, "sale": sale, "sku": sku, "epoch": epoch},
        )
        if found.rowcount != 1:
            return False
    return True


async def write_beside(
    conn: AsyncConnection,
    orders: Sequence[NewOrder],
    terms: Terms,
    *,
    supplier: Callable[[str, str], str],
    sms_by: datetime,
) -> None:
    """What belongs to new orders: their lines, the shop's events, the buyers' SMS, the first payment attempts."""
    if not orders:
        return
    await _copy(
        conn,
        "order_line",
        [
            (o.order_no, 1, "item", o.sku, item.title, o.units, item.price_minor, o.amount_minor)
            for o in orders
            for item in (terms.items[o.sku],)
        ],
        _LINE,
    )
    encode = msgspec.json.encode
    await _copy(
        conn,
        "event",
        [
            (
                f"evt-{o.order_no}-1-reserved",
                "order.reserved",
                o.sale,
                o.order_no,
                1,
                encode(event_data(o)).decode(),
            )
            for o in orders
        ],
        _EVENT,
    )
    if terms.default_channel is not None:
        await _copy(
            conn,
            "payment_attempt",
            [
                (
                    f"{o.order_no}-1",
                    o.order_no,
                    1,
                    supplier(terms.default_channel, o.order_no),
                    terms.default_channel,
                    "created",
                    o.amount_minor,
                    o.currency,
                )
                for o in orders
                if o.amount_minor > 0
            ],
            _ATTEMPT,
        )
    told = [
        (f"{o.order_no}-reserved", o.order_no, o.sale, "reserved", "due", sms_by)
        for o in orders
        if o.contact is not None
    ]
    if told:
        await _copy(conn, "sms", told, _SMS)


def event_data(order: NewOrder) -> dict[str, Any]:
    """`data` of order.reserved, with the same names as `orders.event_data`."""
    return {
        "order_no": order.order_no,
        "sale": order.sale,
        "sku": order.sku,
        "buyer_id": order.buyer_id,
        "units": order.units,
        "amount_minor": order.amount_minor,
        "currency": order.currency,
        "state": order.state,
        "reason": None,
    }


async def ticket_has_order(conn: AsyncConnection, sale: str, sku: str, epoch: int, seq: int) -> bool:
    """Whether some order, of whatever buyer, came from this ticket number."""
    found = await conn.execute(
        text(
            "SELECT 1 FROM purchase_order WHERE sale = :sale AND sku = :sku AND epoch = :epoch AND seq = :seq"
        ),
        {"sale": sale, "sku": sku, "epoch": epoch, "seq": seq},
    )
    return found.first() is not None


async def refused(conn: AsyncConnection, order_nos: Sequence[str]) -> dict[str, str]:
    """Those of these claims that were refused before: order_no → reason."""
    found = await conn.execute(
        text("SELECT order_no, reason FROM refused_claim WHERE order_no = ANY(CAST(:numbers AS text[]))"),
        {"numbers": list(order_nos)},
    )
    return {row.order_no: row.reason for row in found}


async def refuse(
    conn: AsyncConnection,
    order_no: str,
    sale: str,
    sku: str,
    buyer_id: str,
    epoch: int,
    seq: int,
    units: int,
    *,
    reason: str,
    returned: bool,
    told: bytes,
    mark: bool = True,
) -> bool:
    """A claim that will never be an order: its ticket is cancelled; `returned`: its units go back to Redis, once.

    False: it was refused before, and nothing is written. mark=False: Redis is not told (its epoch is gone, or the
    ticket's number belongs to another claim).
    """
    found = await conn.execute(
        text(
            "INSERT INTO refused_claim (order_no, sale, sku, buyer_id, epoch, seq, units, reason, returned)"
            " VALUES (:order_no, :sale, :sku, :buyer_id, :epoch, :seq, :units, :reason, :returned)"
            " ON CONFLICT (order_no) DO NOTHING RETURNING order_no"
        ),
        {
            "order_no": order_no,
            "sale": sale,
            "sku": sku,
            "buyer_id": buyer_id,
            "epoch": epoch,
            "seq": seq,
            "units": units,
            "reason": reason,
            "returned": returned,
        },
    )
    if found.first() is None:
        return False
    if mark:
        payload: dict[str, Any] = {"sku": sku, "seq": seq, "status": told.decode(), "version": 1}
        if returned:
            await outbox.put(conn, "release", sale, epoch, {**payload, "units": units, "to": "k"}, order_no)
        else:
            await outbox.put(conn, "mark", sale, epoch, {**payload, "byte": "k"}, order_no)
    return True


async def pause_item(conn: AsyncConnection, sale: str, sku: str, epoch: int) -> bool:
    """Stop the admission of an item that Redis sells and Postgres does not have. False: it was paused before."""
    found = await conn.execute(
        text(
            "UPDATE item SET paused_at = now() WHERE sale = :sale AND sku = :sku AND paused_at IS NULL RETURNING sku"
        ),
        {"sale": sale, "sku": sku},
    )
    if found.first() is None:
        return False
    await outbox.put(conn, "switch", sale, epoch, {"sku": sku, "item_paused": "1"})
    return True


async def bury(
    conn: AsyncConnection, sale: str, stream: str, entry_id: str, entry: Mapping[str, Any], reason: str
) -> bool:
    """Keep an entry that cannot be processed, for a person. False: it was kept before."""
    found = await conn.execute(
        text(
            "INSERT INTO dead_letter (sale, stream, entry_id, entry, reason)"
            " VALUES (:sale, :stream, :entry_id, CAST(:entry AS jsonb), :reason)"
            " ON CONFLICT (sale, stream, entry_id) DO NOTHING RETURNING id"
        ),
        {
            "sale": sale,
            "stream": stream,
            "entry_id": entry_id,
            "entry": msgspec.json.encode(entry).decode(),
            "reason": reason[:500],
        },
    )
    return found.first() is not None


async def _copy(
    conn: AsyncConnection, table: str, rows: Sequence[tuple[Any, ...]], columns: tuple[str, ...]
) -> None:
    raw = (await conn.get_raw_connection()).driver_connection
    assert raw is not None  # an open transaction has a connection
    await raw.copy_records_to_table(table, records=rows, columns=columns)
