# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""Claims become orders: the SQL of confirm, in bulk.

A batch costs the same few statements whatever its size, and they go to asyncpg itself: through SQLAlchemy they were a
sixth of what the worker did. All rows are inserted before an item is updated, so that the lock of the item (which
everyone wants) is held for one round trip and the commit.

`conn` is of `engine.by_hand`: a transaction that SQLAlchemy begins has not begun before its own first statement.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger import events, outbox
from app.ledger.engine import driver
from app.ledger.orders import asked

_ATTEMPT = ("id", "order_no", "attempt_no", "provider", "channel", "state", "amount_minor", "currency")
_SMS = ("id", "order_no", "sale", "template", "state", "expires_at")

# COPY's binary form (postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS): a row is its number of fields,
# then each field's length and bytes; −1 is NULL; integers are big-endian; a time is µs since 2000.
_COPY_HEAD = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END = b"\xff\xff"
_NULL = struct.pack(">i", -1)
_NO_CONTACT = 2 * _NULL
_LONG = struct.Struct(">iq").pack
_INT = struct.Struct(">ii").pack
_EPOCH_2000_MS = 946_684_800_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
    any_ended: bool  # some order of this sale has ended: its buyer may be back
    items: dict[str, Item]


class Kind(NamedTuple):
    """What orders of one batch have in common, in the order in which `copied_orders` writes it."""

    sale: str
    sku: str
    epoch: int
    units: int
    amount_minor: int  # the sum of its one line
    currency: str
    state: str
    pay_within_s: int


class NewOrder(msgspec.Struct, frozen=True, gc=False):
    """One order to be written: what is its own, and its kind, one object for all orders of that kind."""

    order_no: str  # 24 ASCII signs
    buyer: bytes  # UTF-8, or Postgres refuses it
    seq: int
    claimed_ms: int
    contact: bytes | None
    phone_index: bytes | None
    kind: Kind


_ORDER = (
    "order_no", "buyer_id", "seq", "claimed_at", "contact", "phone_index", "sale", "sku", "epoch", "units",
    "amount_minor", "currency", "state", "pay_within_s",
)  # fmt: skip
_ORDER_KINDS = (
    "text", "text", "bigint", "timestamptz", "bytea", "bytea", "text", "text", "bigint", "int",
    "bigint", "text", "text", "int",
)  # fmt: skip


async def terms(conn: AsyncConnection, sale: str, *, lock: bool = False) -> Terms | None:
    """The sale's terms and items, in one statement. lock: the items' counters stand still until it ends."""
    found = await (await driver(conn)).fetch(
        "SELECT now() AS now, s.epoch AS sale_epoch, pay_within_s, default_channel,"
        " EXISTS (SELECT 1 FROM purchase_order WHERE sale = $1"
        "  AND state IN ('expired', 'cancelled', 'refunded')) AS any_ended,"
        " i.sku, i.epoch, i.title, price_minor, currency, total - reserved - sold AS free"
        " FROM sale s JOIN item i ON i.sale = s.id WHERE s.id = $1 ORDER BY i.sku"
        + (" FOR UPDATE OF i" if lock else ""),
        sale,
    )
    if not found:
        return None
    (now, epoch, pay_within_s, default_channel, any_ended), items = found[0][:5], [row[5:] for row in found]
    return Terms(
        now, epoch, pay_within_s, default_channel, any_ended, {sku: Item(*rest) for sku, *rest in items}
    )


async def copy_orders(conn: AsyncConnection, orders: Sequence[NewOrder]) -> None:
    """Write new orders by binary COPY.

    asyncpg.UniqueViolationError: one of them, or a live order of one of their buyers, exists; the transaction is lost.
    """
    await (await driver(conn)).copy_to_table(
        "purchase_order", source=copied_orders(orders), columns=_ORDER, format="binary"
    )


def copied_orders(orders: Sequence[NewOrder]) -> bytearray:
    """The rows as binary COPY wants them. struct.error: a number is too large for its column.

    Written here because the driver asks a codec for each of the fourteen fields: 5 µs a row against half a one.
    """
    out = bytearray(_COPY_HEAD)
    rows: dict[int, Callable[..., bytes]] = {}  # by the length of buyer_id
    kinds: dict[int, bytes] = {}
    for order in orders:
        buyer, contact, kind = order.buyer, order.contact, order.kind
        length = len(buyer)
        row = rows.get(length)
        if row is None:
            # number of fields, order_no, buyer_id, seq, claimed_at
            row = rows[length] = struct.Struct(f">hi24si{length}siqiq").pack
        common = kinds.get(id(kind))
        if common is None:
            common = kinds[id(kind)] = _common(kind)
        at_us = (order.claimed_ms - _EPOCH_2000_MS) * 1000
        out += row(len(_ORDER), 24, order.order_no.encode(), length, buyer, 8, order.seq, 8, at_us)
        out += _NO_CONTACT if contact is None else _field(contact) + _field(order.phone_index)
        out += common
    out += _COPY_END
    return out


def _common(kind: Kind) -> bytes:
    return b"".join(
        (
            _field(kind.sale.encode()),
            _field(kind.sku.encode()),
            _LONG(8, kind.epoch),
            _INT(4, kind.units),
            _LONG(8, kind.amount_minor),
            _field(kind.currency.encode()),
            _field(kind.state.encode()),
            _INT(4, kind.pay_within_s),
        )
    )


def _field(value: bytes | None) -> bytes:
    return _NULL if value is None else struct.pack(">i", len(value)) + value


async def insert_orders(conn: AsyncConnection, orders: Sequence[NewOrder]) -> set[str]:
    """Write those orders that nothing forbids, in this order, and return their numbers.

    The others meet a row: the same order (a redelivery), a live order of the same buyer, or another order of the same
    ticket. No conflict target is named: all three are answered by leaving the row out, none by losing the transaction.
    A conflicting transaction that is still open is waited for. UnicodeDecodeError: a buyer's id is no UTF-8.
    """
    rows = [
        (
            one.order_no,
            one.buyer.decode(),
            one.seq,
            _EPOCH + timedelta(milliseconds=one.claimed_ms),
            one.contact,
            one.phone_index,
            *one.kind,
        )
        for one in orders
    ]
    columns = zip(*rows, strict=True)
    arrays = ", ".join(f"CAST(:c{at} AS {kind}[])" for at, kind in enumerate(_ORDER_KINDS))
    found = await conn.execute(
        text(
            f"INSERT INTO purchase_order ({', '.join(_ORDER)}) SELECT {', '.join(_ORDER)}"
            f" FROM unnest({arrays}) WITH ORDINALITY AS claim ({', '.join(_ORDER)}, nth) ORDER BY nth"
            " ON CONFLICT DO NOTHING RETURNING order_no"
        ),
        {f"c{at}": list(column) for at, column in enumerate(columns)},
    )
    return {row.order_no for row in found}


async def reserve(conn: AsyncConnection, sale: str, orders: Sequence[NewOrder]) -> bool:
    """Count the units of orders that were really inserted, one UPDATE an item, items in sku order.

    False: the item has another epoch by now (a rebuild came between): roll back and look again.
    asyncpg.CheckViolationError (never_oversold): there are not that many units; the transaction is lost.
    """
    raw = await driver(conn)
    units: Counter[tuple[str, int]] = Counter()
    kinds = {id(order.kind): order.kind for order in orders}
    for kind, count in Counter([id(order.kind) for order in orders]).items():
        units[kinds[kind].sku, kinds[kind].epoch] += kinds[kind].units * count
    for (sku, epoch), count in sorted(units.items()):
        done = await raw.execute(
            "UPDATE item SET reserved = reserved + $4 WHERE sale = $1 AND sku = $2 AND epoch = $3",
            *(sale, sku, epoch, count),
        )
        if done != "UPDATE 1":
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
    """What belongs to new orders: the shop's events, the buyers' SMS, the first payment attempts."""
    if not orders:
        return
    await events.put_reserved(conn, orders[0].kind.sale, [order.order_no for order in orders])
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
                    o.kind.amount_minor,
                    o.kind.currency,
                )
                for o in orders
                if o.kind.amount_minor > 0
            ],
            _ATTEMPT,
        )
    told = [
        (f"{o.order_no}-reserved", o.order_no, o.kind.sale, "reserved", "due", sms_by)
        for o in orders
        if o.contact is not None
    ]
    if told:
        await _copy(conn, "sms", told, _SMS)


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
        text(f"SELECT order_no, reason FROM refused_claim JOIN {asked('numbers')} USING (order_no)"),
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
    await (await driver(conn)).copy_records_to_table(table, records=rows, columns=columns)
