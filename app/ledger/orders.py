# ruff: noqa: S608 - what is put into the SQL text are constants of this module; every value is a parameter
"""Orders: who owns what. Each step is guarded by the state it leaves and writes its event, SMS and outbox rows itself.

Each function runs in the caller's transaction and takes row locks in one order: purchase_order, then item, then outbox.
A step that the state guard refuses returns None and changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger import events, outbox

Row = dict[str, Any]

ORDER_NO_BYTES = 15  # 120 bits are 24 signs; a collision among 10^9 orders of a sale has odds of 10^-18
_SIGNS = bytes.maketrans(bytes(range(32)), b"0123456789ABCDEFGHIJKLMNOPQRSTUV")
# 40 bits in 64 become 2 x 20 in 2 x 32, 4 x 10 in 4 x 16, 8 x 5 in 8 x 8: (the upper halves, how far they move)
_SPREADS = (
    (bytes.fromhex("000000fffff00000"), 12),
    (bytes.fromhex("000ffc00000ffc00"), 6),
    (bytes.fromhex("03e003e003e003e0"), 3),
)
SMS_TTL_S = 86_400  # at most; tell drops it after settings.sms_ttl_s, which it alone knows

COLUMNS = (
    "order_no, sale, sku, buyer_id, epoch, seq, units, amount_minor, currency, state, version, reason, leaving,"
    " claimed_at, reserved_at, pay_within_s, pay_by, extended_s, paid_at, ended_at, contact, generation"
)


def order_no(sale: str, epoch: int, sku: str, seq: int, buyer: bytes | str) -> str:
    """The order number of a claim, 24 of [0-9A-V]: the same claim always has the same one, so a redelivery is seen."""
    raw = buyer if isinstance(buyer, bytes) else buyer.encode("utf-8", "surrogateescape")
    return order_nos(sale, [(epoch, sku, seq, raw)])[0]


def order_nos(sale: str, claims: Sequence[tuple[int, str, int, bytes]]) -> list[str]:
    """The order numbers of many claims: (epoch, sku, seq, buyer_id).

    Each is base32hex of a hash, of which claims of one item share the beginning. Five bytes are eight signs, so each
    five are put into eight and their bits spread, for all claims at once, by shifts of one long integer: one by one it
    took a tenth of what confirm cost in Python.
    """
    items: dict[tuple[int, str], blake2b] = {}
    hashes: list[bytes] = []
    for epoch, sku, seq, buyer in claims:
        item = items.get((epoch, sku))
        if item is None:
            begins = f"{sale}\0{epoch}\0{sku}\0".encode()
            item = items[epoch, sku] = blake2b(begins, digest_size=ORDER_NO_BYTES)
        whole = item.copy()
        whole.update(b"%d\0%b" % (seq, buyer))
        hashes.append(whole.digest())
    hashed = b"".join(hashes)
    eights = len(hashed) // 5
    wide = bytearray(8 * eights)
    for at in range(5):
        wide[3 + at :: 8] = hashed[at::5]
    bits = int.from_bytes(wide, "big")
    for upper, shift in _SPREADS:
        moved = bits & int.from_bytes(upper * eights, "big")
        bits = bits ^ moved | moved << shift
    signs = bits.to_bytes(len(wide), "big").translate(_SIGNS).decode("ascii")
    return [signs[at : at + 24] for at in range(0, len(signs), 24)]


def byte_of(row: Mapping[str, Any]) -> str:
    """The ticket's byte in Redis that goes with an order's state."""
    match row["state"]:
        case "reserved":
            return "r"
        case "paid" | "refunding":
            return "p"
        case "expired":
            return "e"
        case "cancelled":
            return "k"  # also when the buyer left (the reason says so): `left` is for tickets that waited
        case "refunded":
            return "f"
        case other:
            raise ValueError(f"unknown order state {other!r}")


def event_data(row: Mapping[str, Any]) -> dict[str, Any]:
    """`data` of an order's events."""
    return {
        "order_no": row["order_no"],
        "sale": row["sale"],
        "sku": row["sku"],
        "buyer_id": row["buyer_id"],
        "units": row["units"],
        "amount_minor": row["amount_minor"],
        "currency": row["currency"],
        "state": row["state"],
        "reason": row["reason"],
    }


# Reading


async def get(conn: AsyncConnection, number: str) -> Row | None:
    """The order, without a lock."""
    found = await conn.execute(
        text(f"SELECT {COLUMNS} FROM purchase_order WHERE order_no = :order_no"), {"order_no": number}
    )
    row = found.mappings().first()
    return None if row is None else dict(row)


async def lock(conn: AsyncConnection, number: str) -> Row | None:
    """The order; nobody else changes it until the caller's transaction ends."""
    found = await conn.execute(
        text(f"SELECT {COLUMNS} FROM purchase_order WHERE order_no = :order_no FOR UPDATE"),
        {"order_no": number},
    )
    row = found.mappings().first()
    return None if row is None else dict(row)


def asked(parameter: str, column: str = "order_no") -> str:
    """Many values to JOIN … USING. `= ANY` of a thousand is a thousand comparisons a row wherever Postgres prefers to
    read the whole table (one that was empty a moment ago): 60 ms for a batch among 10,000 orders, and worse with more.
    """
    return f"(SELECT DISTINCT unnest(CAST(:{parameter} AS text[])) AS {column}) AS asked"


async def many(conn: AsyncConnection, numbers: Sequence[str]) -> dict[str, Row]:
    """Those of these orders that exist, by number."""
    found = await conn.execute(
        text(f"SELECT {COLUMNS} FROM purchase_order JOIN {asked('numbers')} USING (order_no)"),
        {"numbers": list(numbers)},
    )
    return {row["order_no"]: dict(row) for row in found.mappings()}


async def lines(conn: AsyncConnection, numbers: Sequence[str]) -> dict[str, list[Row]]:
    """The lines and adjustments of these orders, each list in line order.

    The first line is what was claimed. It follows from the order and its item, whose title, price and currency are
    fixed before anybody can claim, so confirm writes none; release N−1 did, and what is written stands.
    """
    found = await conn.execute(
        text(
            "SELECT order_no, line_no, kind, sku, title, units, unit_minor, amount_minor FROM order_line"
            f" JOIN {asked('numbers')} USING (order_no)"
            " UNION ALL"
            " SELECT o.order_no, 1, 'item', o.sku, i.title, o.units, i.price_minor, o.units * i.price_minor"
            f" FROM purchase_order o JOIN {asked('numbers')} USING (order_no)"
            " JOIN item i ON i.sale = o.sale AND i.sku = o.sku WHERE NOT EXISTS"
            " (SELECT FROM order_line l WHERE l.order_no = o.order_no AND l.line_no = 1)"
            " ORDER BY order_no, line_no"
        ),
        {"numbers": list(numbers)},
    )
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in found.mappings():
        grouped[row["order_no"]].append(dict(row))
    return grouped


async def live_of_buyers(conn: AsyncConnection, sale: str, buyers: Sequence[str]) -> dict[str, str]:
    """buyer_id → order_no of the live order, for those who have one in this sale."""
    found = await conn.execute(
        text(
            f"SELECT buyer_id, order_no FROM purchase_order JOIN {asked('buyers', 'buyer_id')} USING (buyer_id)"
            " WHERE sale = :sale AND state IN ('reserved', 'paid')"
        ),
        {"sale": sale, "buyers": list(buyers)},
    )
    return {row.buyer_id: row.order_no for row in found}


async def contacts_of_ended(conn: AsyncConnection, sale: str, buyers: Sequence[str]) -> dict[str, bytes]:
    """buyer_id → sealed contact of an ended order of this sale: what a buyer who comes back has told us before."""
    found = await conn.execute(
        text(
            "SELECT DISTINCT ON (buyer_id) buyer_id, contact FROM purchase_order"
            f" JOIN {asked('buyers', 'buyer_id')} USING (buyer_id)"
            " WHERE sale = :sale AND state IN ('expired', 'cancelled', 'refunded')"
            " AND contact IS NOT NULL ORDER BY buyer_id, reserved_at DESC"
        ),
        {"sale": sale, "buyers": list(buyers)},
    )
    return {row.buyer_id: bytes(row.contact) for row in found}


async def page(
    conn: AsyncConnection,
    sale: str,
    state: str | None,
    after: tuple[str, int, int] | None,
    limit: int,
    phone_indexes: Sequence[bytes] | None = None,
) -> list[Row]:
    """Orders of a sale by (sku, epoch, seq), behind `after`: the cursor of lists and CSV.

    phone_indexes: only those of a number, by its blind index under each key (app/buyer/contacts.py).
    """
    given: dict[str, Any] = {"sale": sale, "state": state, "limit": limit}
    of_number = ""
    if phone_indexes is not None:
        # In the text only when it is asked for: the planner then takes the index over numbers.
        of_number, given["numbers"] = " AND phone_index = ANY(CAST(:numbers AS bytea[]))", list(phone_indexes)
    sku, epoch, seq = after or ("", 0, 0)
    found = await conn.execute(
        text(
            f"SELECT {COLUMNS} FROM purchase_order WHERE sale = :sale AND (sku, epoch, seq) > (:sku, :epoch, :seq)"
            f"{of_number} AND (CAST(:state AS text) IS NULL OR state = :state) ORDER BY sku, epoch, seq LIMIT :limit"
        ),
        {**given, "sku": sku, "epoch": epoch, "seq": seq},
    )
    return [dict(row) for row in found.mappings()]


# Steps


async def bump(conn: AsyncConnection, number: str) -> Row | None:
    """The buyer is shown the order and its payment as they are now (version + 1, and a mark on its way)."""
    row = await _one(conn, "version = version + 1", "TRUE", order_no=number)
    if row is not None:
        await _mark(conn, row)
    return row


async def start_deadline(conn: AsyncConnection, number: str) -> Row | None:
    """The payment deadline starts now, by Postgres' clock, unless it has started before."""
    return await _one(
        conn,
        "pay_by = now() + make_interval(secs => pay_within_s), version = version + 1",
        "state = 'reserved' AND pay_by IS NULL",
        order_no=number,
    )


async def start_overdue_deadlines(conn: AsyncConnection, link_wait_max_s: int, limit: int) -> list[str]:
    """Orders that got no payment link within `link_wait_max_s`: their deadline starts all the same. Returns numbers."""
    found = await conn.execute(
        text(
            "UPDATE purchase_order SET pay_by = now() + make_interval(secs => pay_within_s), version = version + 1"
            " WHERE order_no IN (SELECT order_no FROM purchase_order WHERE state = 'reserved' AND pay_by IS NULL"
            " AND reserved_at < now() - make_interval(secs => :wait) LIMIT :limit FOR UPDATE SKIP LOCKED)"
            f" RETURNING {COLUMNS}"
        ),
        {"wait": float(link_wait_max_s), "limit": limit},
    )
    rows = [dict(row) for row in found.mappings()]
    await tell_many(conn, rows)
    return [row["order_no"] for row in rows]


async def tell_many(conn: AsyncConnection, rows: Sequence[Row]) -> None:
    """Mark the tickets of orders that a statement of the caller's has changed (with their versions)."""
    if rows:
        marks = [(row["sale"], row["epoch"], _ticket(row), row["order_no"]) for row in rows]
        await outbox.put_marks(conn, marks)


async def lease_unpaid(conn: AsyncConnection, limit: int, lease_s: float) -> list[tuple[str, int]]:
    """Take up to `limit` orders whose deadline has passed, for `lease_s`: (order_no, generation)."""
    found = await conn.execute(
        text(
            "UPDATE purchase_order SET leased_until = now() + make_interval(secs => :lease_s),"
            " generation = generation + 1 WHERE order_no IN (SELECT order_no FROM purchase_order"
            " WHERE state = 'reserved' AND pay_by <= now()"
            " AND (leased_until IS NULL OR leased_until < now()) ORDER BY pay_by LIMIT :limit FOR UPDATE SKIP LOCKED)"
            " RETURNING order_no, generation"
        ),
        {"limit": limit, "lease_s": float(lease_s)},
    )
    return [(row.order_no, row.generation) for row in found]


async def lease_leaving(conn: AsyncConnection, limit: int, lease_s: float) -> list[tuple[str, int]]:
    """Take up to `limit` orders whose buyers asked to leave and whose payment is not cleared yet."""
    found = await conn.execute(
        text(
            "UPDATE purchase_order SET leased_until = now() + make_interval(secs => :lease_s),"
            " generation = generation + 1 WHERE order_no IN (SELECT order_no FROM purchase_order"
            " WHERE state = 'reserved' AND leaving"
            " AND (leased_until IS NULL OR leased_until < now()) LIMIT :limit FOR UPDATE SKIP LOCKED)"
            " RETURNING order_no, generation"
        ),
        {"limit": limit, "lease_s": float(lease_s)},
    )
    return [(row.order_no, row.generation) for row in found]


async def overdue_s(conn: AsyncConnection, number: str) -> float:
    """s since the deadline passed, by Postgres' clock; 0 before, or without one."""
    found = await conn.execute(
        text(
            "SELECT greatest(0, CAST(extract(epoch FROM now() - pay_by) AS double precision)) FROM purchase_order"
            " WHERE order_no = :order_no"
        ),
        {"order_no": number},
    )
    return float(found.scalar() or 0.0)


async def postpone(conn: AsyncConnection, number: str, generation: int, wait_s: float) -> None:
    """Look at a leased order again after `wait_s` (its payment is unknown)."""
    await conn.execute(
        text(
            "UPDATE purchase_order SET leased_until = now() + make_interval(secs => :wait_s)"
            " WHERE order_no = :order_no AND generation = :generation"
        ),
        {"order_no": number, "generation": generation, "wait_s": wait_s},
    )


async def ask_to_leave(conn: AsyncConnection, number: str, reason: str = "left") -> Row | None:
    """The buyer (or, with reason `operator`, the shop) wants out: the order is cancelled once no payment can arrive.

    None: it is not reserved, or leaving already.
    """
    row = await _one(
        conn,
        "leaving = TRUE, reason = :reason, version = version + 1",
        "state = 'reserved' AND NOT leaving",
        order_no=number,
        reason=reason,
    )
    if row is not None:
        await _mark(conn, row)
    return row


async def expire(conn: AsyncConnection, number: str, generation: int) -> Row | None:
    """The unpaid order ends and its units go back, if Postgres' clock says so and the lease holds."""
    row = await _one(
        conn,
        "state = 'expired', reason = 'unpaid', ended_at = now(), version = version + 1, leased_until = NULL",
        "state = 'reserved' AND pay_by <= now() AND generation = :generation",
        order_no=number,
        generation=generation,
    )
    if row is not None:
        await _ended(conn, row, "order.expired", "expired", "e")
    return row


async def cancel(
    conn: AsyncConnection, number: str, reason: str, generation: int | None = None
) -> Row | None:
    """The reserved order ends before payment and its units go back. reason: left, operator, …

    The reason it was asked to end for, if it was, stands.
    """
    row = await _one(
        conn,
        "state = 'cancelled', reason = coalesce(reason, :reason), ended_at = now(), version = version + 1,"
        " leased_until = NULL",
        "state = 'reserved' AND (CAST(:generation AS bigint) IS NULL OR generation = :generation)",
        order_no=number,
        reason=reason,
        generation=generation,
    )
    if row is not None:
        await _ended(conn, row, "order.cancelled", "cancelled", byte_of(row))
    return row


async def pay(conn: AsyncConnection, number: str) -> Row | None:
    """The reserved order is paid: its units are sold."""
    row = await _one(
        conn,
        "state = 'paid', paid_at = now(), version = version + 1, leaving = FALSE, reason = NULL, leased_until = NULL",
        "state = 'reserved'",
        order_no=number,
    )
    if row is not None:
        await _move(conn, row, "reserved = reserved - :units, sold = sold + :units")
        await _told(conn, row, "order.paid", "paid")
        await _mark(conn, row)
    return row


async def revive(conn: AsyncConnection, number: str) -> Row | None:
    """An ended order is paid by late money; the caller has taken its units again in Redis (or they never went back).

    IntegrityError, and the caller rolls back: the buyer has another live order, or Postgres has no unit left.
    """
    row = await _one(
        conn,
        "state = 'paid', paid_at = now(), ended_at = NULL, reason = 'late_money', version = version + 1",
        "state IN ('expired', 'cancelled')",
        order_no=number,
    )
    if row is not None:
        await _move(conn, row, "sold = sold + :units")
        await _told(conn, row, "order.paid", "paid")
        await _mark(conn, row)
    return row


async def is_current(conn: AsyncConnection, row: Mapping[str, Any]) -> bool:
    """Whether the item is in the epoch of this order. It stays so if this transaction has changed the item before."""
    found = await conn.execute(
        text("SELECT 1 FROM item WHERE sale = :sale AND sku = :sku AND epoch = :epoch"),
        {"sale": row["sale"], "sku": row["sku"], "epoch": row["epoch"]},
    )
    return found.first() is not None


async def release_again(conn: AsyncConnection, number: str) -> Row | None:
    """Units that late money took again in Redis, and Postgres then refused, go back. None: the order has not ended."""
    row = await _one(conn, "version = version + 1", "state IN ('expired', 'cancelled')", order_no=number)
    if row is not None:
        await outbox.put(conn, "release", row["sale"], row["epoch"], _units(row, byte_of(row)), number)
    return row


async def begin_refund(conn: AsyncConnection, number: str) -> Row | None:
    """The paid order's money is on its way back; the units stay sold until it is."""
    row = await _one(conn, "state = 'refunding', version = version + 1", "state = 'paid'", order_no=number)
    if row is not None:
        await _mark(conn, row)
    return row


async def finish_refund(conn: AsyncConnection, number: str, *, restock: bool) -> Row | None:
    """The money is back. restock: the units of a paid order go back into the sale; else they stay out of it.

    Of an expired or cancelled order (late money) only the state changes: its units went back when it ended.
    """
    before = await lock(conn, number)
    if before is None or before["state"] not in ("paid", "refunding", "expired", "cancelled"):
        return None
    row = await _one(
        conn, "state = 'refunded', ended_at = now(), version = version + 1", "TRUE", order_no=number
    )
    if row is None:
        return None
    await _told(conn, row, "order.refunded", "refunded")
    if restock and before["state"] in ("paid", "refunding"):
        await _move(conn, row, "sold = sold - :units")
        await outbox.put(conn, "release", row["sale"], row["epoch"], _units(row, "f"), number)
    else:
        await _mark(conn, row)
    return row


async def _one(conn: AsyncConnection, sets: str, guard: str, **values: Any) -> Row | None:
    found = await conn.execute(
        text(f"UPDATE purchase_order SET {sets} WHERE order_no = :order_no AND {guard} RETURNING {COLUMNS}"),
        values,
    )
    row = found.mappings().first()
    return None if row is None else dict(row)


async def _move(conn: AsyncConnection, row: Mapping[str, Any], sets: str) -> None:
    """Counters of the item. No epoch guard: these units are counted in Postgres whatever Redis was lost since."""
    await conn.execute(
        text(f"UPDATE item SET {sets} WHERE sale = :sale AND sku = :sku"),
        {"sale": row["sale"], "sku": row["sku"], "units": row["units"]},
    )


def _ticket(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"sku": row["sku"], "seq": row["seq"]}


def _units(row: Mapping[str, Any], to: str) -> dict[str, Any]:
    return {**_ticket(row), "units": row["units"], "to": to}


async def _mark(conn: AsyncConnection, row: Mapping[str, Any]) -> None:
    await outbox.put(conn, "mark", row["sale"], row["epoch"], _ticket(row), row["order_no"])


async def _ended(conn: AsyncConnection, row: Mapping[str, Any], event: str, template: str, to: str) -> None:
    await _move(conn, row, "reserved = reserved - :units")
    await _told(conn, row, event, template)
    await outbox.put(conn, "release", row["sale"], row["epoch"], _units(row, to), row["order_no"])


async def _told(
    conn: AsyncConnection,
    row: Mapping[str, Any],
    event: str,
    template: str,
) -> None:
    """The event for the shop and, where the buyer left a contact, the SMS."""
    await events.put(conn, event, row["sale"], row["version"], event_data(row), row["order_no"])
    if row["contact"] is not None:
        await conn.execute(
            text(
                "INSERT INTO sms (id, order_no, sale, template, state, expires_at)"
                " VALUES (:id, :order_no, :sale, :template, 'due', now() + make_interval(secs => :ttl))"
                " ON CONFLICT (order_no, template) DO NOTHING"
            ),
            {
                "id": f"{row['order_no']}-{template}",
                "order_no": row["order_no"],
                "sale": row["sale"],
                "template": template,
                "ttl": float(SMS_TTL_S),
            },
        )
