"""Money that goes back: one function for each SQL intent; the caller owns the transaction."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger import captures, orders

Row = dict[str, Any]


class RefundAsked(NamedTuple):
    """The refund is on its way; `order` is the row as it is now."""

    refund_id: str
    order: Row


class RefundRefused(NamedTuple):
    """Nothing changed. code: no_such_order | not_paid | nothing_captured | amount_wrong | restock_needs_whole"""

    code: str


async def ask(
    conn: AsyncConnection, order_no: str, amount_minor: int | None, restock: bool, reason: str
) -> RefundAsked | RefundRefused:
    """Money of a paid order goes back: all that is left of it (None), or a part.

    The whole: the order is `refunding`, and `refunded` once the supplier has done it; restock: its units then go back
    into the sale. A part: the order stays paid, and an adjustment line lowers its amount once it is done.
    """
    order = await orders.lock(conn, order_no)
    if order is None:
        return RefundRefused("no_such_order")
    if order["state"] != "paid":
        return RefundRefused("not_paid")
    kept = await captures.kept(conn, order_no)
    if kept is None:
        return RefundRefused("nothing_captured")
    found = (
        await conn.execute(
            text(
                "SELECT coalesce(sum(amount_minor) FILTER (WHERE state <> 'failed'), 0) AS asked, count(*) AS made"
                " FROM refund WHERE capture_id = :id"
            ),
            {"id": kept["id"]},
        )
    ).one()
    left = kept["amount_minor"] - int(found.asked)
    amount = left if amount_minor is None else amount_minor
    if not 0 < amount <= left:
        return RefundRefused("amount_wrong")
    whole = amount == left
    if restock and not whole:
        return RefundRefused("restock_needs_whole")
    refund_id = f"{order_no}-R{kept['id']}-{int(found.made) + 1}"
    await conn.execute(
        text(
            "INSERT INTO refund (id, capture_id, order_no, amount_minor, currency, reason, restock, state)"
            " VALUES (:id, :capture_id, :order_no, :amount, :currency, :reason, :restock, 'due')"
        ),
        {
            "id": refund_id,
            "capture_id": kept["id"],
            "order_no": order_no,
            "amount": amount,
            "currency": kept["currency"],
            "reason": reason,
            "restock": restock,
        },
    )
    now = await orders.begin_refund(conn, order_no) if whole else order
    return RefundAsked(refund_id, now or order)


async def lease(conn: AsyncConnection, provider: str, limit: int, lease_s: float) -> list[Row]:
    """Take due refunds of this supplier's captures."""
    found = await conn.execute(
        text(
            "WITH due AS (SELECT r.id FROM refund r JOIN capture c ON c.id = r.capture_id"
            " WHERE r.state IN ('due', 'sent', 'unknown') AND r.next_at <= now() AND c.provider = :provider"
            " AND (r.leased_until IS NULL OR r.leased_until < now())"
            " ORDER BY r.next_at LIMIT :limit FOR UPDATE OF r SKIP LOCKED),"
            " leased AS (UPDATE refund AS r SET leased_until = now() + make_interval(secs => :lease_s),"
            " generation = r.generation + 1, tries = r.tries + 1 FROM due WHERE r.id = due.id RETURNING r.*)"
            " SELECT leased.id, leased.order_no, leased.amount_minor, leased.currency, leased.reason, leased.state,"
            " leased.tries, leased.generation, leased.created_at, now() AS now, c.provider_ref AS capture_ref,"
            " c.attempt_id, c.amount_minor AS captured_minor FROM leased JOIN capture c ON c.id = leased.capture_id"
        ),
        {"provider": provider, "limit": limit, "lease_s": float(lease_s)},
    )
    return [dict(row) for row in found.mappings()]


async def wait(conn: AsyncConnection, held: tuple[str, int], state: str, wait_s: float) -> bool:
    """The refund is looked at again after `wait_s`. False: the lease is no longer ours."""
    found = await conn.execute(
        text(
            "UPDATE refund SET state = :state, leased_until = NULL, next_at = now() + make_interval(secs => :wait_s)"
            " WHERE id = :id AND generation = :generation AND state IN ('due', 'sent', 'unknown')"
        ),
        {"id": held[0], "generation": held[1], "state": state, "wait_s": wait_s},
    )
    return bool(found.rowcount)


async def doubted(conn: AsyncConnection, refund_id: str) -> str | None:
    """The supplier says that a refund did not get through: one under way is asked about now. Returns its state."""
    found = await conn.execute(
        text(
            "UPDATE refund SET next_at = CASE WHEN state IN ('due', 'sent', 'unknown') THEN now() ELSE next_at END"
            " WHERE id = :id RETURNING state"
        ),
        {"id": refund_id},
    )
    return found.scalar_one_or_none()


async def failed(conn: AsyncConnection, refund: Row) -> bool:
    """The supplier refuses a leased refund for good; a person has to look. False: the lease is no longer ours.

    Nothing has gone back, so the capture keeps its state, and an order that was to be refunded whole is paid as before:
    the operator can try again.
    """
    order = await orders.lock(conn, refund["order_no"])
    found = await conn.execute(
        text(
            "UPDATE refund SET state = 'failed', leased_until = NULL"
            " WHERE id = :id AND generation = :generation AND state IN ('due', 'sent', 'unknown')"
        ),
        {"id": refund["id"], "generation": refund["generation"]},
    )
    if not found.rowcount:
        return False
    if order is not None and order["state"] == "refunding":
        await conn.execute(
            text(
                "UPDATE purchase_order AS o SET state = 'paid' WHERE order_no = :order_no AND NOT EXISTS (SELECT FROM"
                " purchase_order AS other WHERE other.sale = o.sale AND other.buyer_id = o.buyer_id"
                " AND other.state IN ('reserved', 'paid'))"
            ),
            {"order_no": refund["order_no"]},
        )
        await orders.bump(conn, refund["order_no"])
    return True


async def done(conn: AsyncConnection, refund_id: str, provider_ref: str | None) -> bool:
    """The money has gone back: capture and order follow. False: it was done before, or is unknown to us."""
    number = (
        await conn.execute(text("SELECT order_no FROM refund WHERE id = :id"), {"id": refund_id})
    ).scalar_one_or_none()
    if number is None:
        return False
    order = await orders.lock(conn, number)
    found = await conn.execute(
        text(
            "UPDATE refund SET state = 'done', done_at = now(), provider_ref = :provider_ref, leased_until = NULL,"
            " generation = generation + 1 WHERE id = :id AND state IN ('due', 'sent', 'unknown')"
            " RETURNING capture_id, amount_minor, restock"
        ),
        {"id": refund_id, "provider_ref": provider_ref},
    )
    refund = found.first()
    if refund is None:
        return False
    of = await captures.locked(conn, refund.capture_id)
    back = (
        await conn.execute(
            text(
                "SELECT coalesce(sum(amount_minor), 0) FROM refund WHERE capture_id = :id AND state = 'done'"
            ),
            {"id": refund.capture_id},
        )
    ).scalar_one()
    if of is None or order is None:
        raise LookupError(f"refund {refund_id} has no capture or no order")
    if int(back) < of["amount_minor"]:
        await _lower(conn, number, refund.amount_minor)
        return True
    await conn.execute(text("UPDATE capture SET state = 'refunded' WHERE id = :id"), {"id": of["id"]})
    if of["state"] == "kept" or (
        # Late money that was refused: the ended order is `refunded`, unless another capture pays it.
        order["state"] in ("expired", "cancelled") and await captures.kept(conn, number) is None
    ):
        await orders.finish_refund(conn, number, restock=bool(refund.restock))
    return True


async def _lower(conn: AsyncConnection, order_no: str, amount_minor: int) -> None:
    """A part of the money went back: the amount of the order stays the sum of its lines, and of the money we have."""
    await conn.execute(
        text(
            "INSERT INTO order_line (order_no, line_no, kind, sku, title, units, unit_minor, amount_minor)"
            " SELECT :order_no, coalesce(max(line_no), 1) + 1, 'adjustment', NULL, 'refund', 1,"
            " CAST(:amount AS bigint), CAST(:amount AS bigint) FROM order_line WHERE order_no = :order_no"
        ),
        {"order_no": order_no, "amount": -amount_minor},
    )
    await conn.execute(
        text(
            "UPDATE purchase_order SET amount_minor = amount_minor - CAST(:amount AS bigint) WHERE order_no = :order_no"
        ),
        {"order_no": order_no, "amount": amount_minor},
    )
    await orders.bump(conn, order_no)
