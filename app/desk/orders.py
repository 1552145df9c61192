"""Orders: what they are, as lists and as CSV; cancel before payment, refund after it."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncConnection

from app.buyer.contacts import indexes_of
from app.desk.auth import Viewer
from app.desk.change import Answer, Body, Change, OperatorPosts
from app.desk.sales import CancelAllIn, found
from app.desk.shapes import (
    LIMIT_DEFAULT,
    LIMIT_MAX,
    Cursor,
    Limit,
    OrderDetail,
    OrderOut,
    OrderState,
    Out,
    Page,
    SalePath,
    listed,
    order_out,
    read_cursor,
)
from app.desk.wiring import Desk, TheDesk, reading
from app.keys import SaleKeys
from app.ledger import books, orders, payments, refunds
from app.ledger.refunds import RefundAsked, RefundRefused
from app.problems import JsonRoute, refusals, refuse
from app.purchase.told import instant
from app.sale.document import PRICE_MINOR_MAX

router = APIRouter(tags=["orders"], route_class=JsonRoute)
OF_SALE, ONE = "/v1/admin/sales/{sale}/orders", "/v1/admin/orders/{order_no}"
CANCEL_PAGE = 500  # orders ended in one transaction of cancel-all
CSV_COLUMNS = (
    "order_no", "sale", "sku", "buyer_id", "units", "amount_minor", "currency", "state", "reason", "seq", "epoch",
    "claimed_at", "reserved_at", "pay_by", "paid_at", "ended_at",
)  # fmt: skip

OrderPath = Annotated[str, Path(pattern=r"^[0-9A-Z]{20,26}$", examples=["4K1RGVQ0M5T8C2N7PA9D3E6F"])]
StateQuery = Annotated[OrderState | None, Query()]
# A plus that was not written as %2B arrives as a space.
PhoneQuery = Annotated[
    str | None,
    Query(
        pattern=r"^[+ ][1-9][0-9]{6,14}$",
        description="E.164, `+` as `%2B`: only the orders of this number (role operator); found by a keyed hash",
    ),
]
READ = refusals("auth_missing", "no_such_sale", "invalid", "busy")
WRITE = refusals(
    "malformed", "auth_missing", "forbidden", "key_reused", "too_large", "not_json", "invalid", "busy"
)


@router.get(
    OF_SALE,
    response_model=Page[OrderOut],
    responses={**READ, **refusals("forbidden", "no_such_sale")},
    summary="Orders of a sale, in the order of the line",
)
async def list_orders(
    sale: SalePath,
    desk: TheDesk,
    operator: Viewer,
    state: StateQuery = None,
    phone: PhoneQuery = None,
    limit: Limit = LIMIT_DEFAULT,
    cursor: Cursor = None,
) -> dict[str, Any]:
    if phone is not None and not operator.may("operator"):
        raise refuse("forbidden", "Looking a number up needs the role operator.")
    numbers = None if phone is None else indexes_of(desk.seal_keys, sale, "+" + phone[1:])
    kind = f"orders:{sale}"
    behind = read_cursor(desk.ring, kind, cursor)
    after = None if behind is None else (str(behind[0]), int(behind[1]), int(behind[2]))
    async with reading(desk) as conn:
        await found(conn, sale)
        rows = await orders.page(conn, sale, state, after, limit, numbers)
    return listed(desk.ring, kind, limit, rows, order_out, lambda row: [row["sku"], row["epoch"], row["seq"]])


@router.get(
    OF_SALE + ".csv",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}, **READ},
    summary="The same as CSV, whole",
)
async def orders_csv(sale: SalePath, desk: TheDesk, operator: Viewer, state: StateQuery = None) -> Response:
    async with reading(desk) as conn:
        await found(conn, sale)

    async def lines() -> AsyncIterator[str]:
        yield ",".join(CSV_COLUMNS) + "\r\n"
        after: tuple[str, int, int] | None = None
        while True:
            async with reading(desk) as conn:
                rows = await orders.page(conn, sale, state, after, LIMIT_MAX)
            if not rows:
                return
            text = io.StringIO()
            writer = csv.writer(text)
            for row in rows:
                shown = order_out(row)
                writer.writerow([_cell(shown[name]) for name in CSV_COLUMNS])
            yield text.getvalue()
            after = (rows[-1]["sku"], rows[-1]["epoch"], rows[-1]["seq"])

    headers = {
        "Content-Disposition": f'attachment; filename="{sale}-orders.csv"',
        "Cache-Control": "no-store",
    }
    return StreamingResponse(lines(), media_type="text/csv; charset=utf-8", headers=headers)


def _cell(value: object) -> str:
    """A cell that a spreadsheet does not run as a formula (buyers choose their ids)."""
    text = "" if value is None else str(value)
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


async def detail(conn: AsyncConnection, order_no: str) -> dict[str, Any]:
    """Everything about one order. Refusal 404 `no_such_order`."""
    row = await orders.get(conn, order_no)
    if row is None:
        raise refuse("no_such_order")
    lines = (await orders.lines(conn, [order_no])).get(order_no, [])
    return {
        **order_out(row),
        "lines": [_timed(line, "order_no", "line_no") for line in lines],
        "attempts": [_timed(one) for one in await books.attempts(conn, order_no)],
        "captures": [_timed(one) for one in await books.captures(conn, order_no)],
        "refunds": [_timed(one) for one in await books.refunds(conn, order_no)],
    }


def _timed(row: Any, *without: str) -> dict[str, Any]:
    """A row with its times as the API writes them."""
    return {
        name: instant(value) if name.endswith("_at") else value
        for name, value in row.items()
        if name not in without
    }


@router.get(
    ONE, response_model=OrderDetail, responses=refusals("auth_missing", "no_such_order", "invalid", "busy")
)
async def read_order(order_no: OrderPath, desk: TheDesk, operator: Viewer) -> dict[str, Any]:
    """One order with its lines, payment attempts, captures and refunds."""
    async with reading(desk) as conn:
        return await detail(conn, order_no)


# ---- ending orders --------------------------------------------------------------------------------------------------


async def end(conn: AsyncConnection, order_no: str) -> str | None:
    """Cancel a reserved order: `cancelled` at once, `leaving` while money may still arrive (the worker closes the
    payment first), None: it is not reserved. Its event, SMS and the units' way back are written with it."""
    row = await orders.lock(conn, order_no)
    if row is None or row["state"] != "reserved":
        return None
    if await payments.has_open(conn, order_no):
        await orders.ask_to_leave(conn, order_no, "operator")
        return "leaving"
    await orders.cancel(conn, order_no, "operator")
    return "cancelled"


@router.post(
    ONE + "/cancel",
    response_model=OrderDetail,
    responses={
        **WRITE,
        **refusals("no_such_order", "not_cancellable", "key_reused"),
        202: {"model": OrderDetail, "description": "a payment is open: it is closed at the supplier first"},
    },
    summary="Cancel a reserved order; its units go back",
)
async def cancel(order_no: OrderPath, post: OperatorPosts, body: Body | None = None) -> Response:
    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            before = await orders.get(conn, order_no)
            if before is None:
                raise refuse("no_such_order")
            how = await end(conn, order_no)
            if how is None:
                raise refuse("not_cancellable", f"The order is {before['state']}.")
            answer = Answer(202 if how == "leaving" else 200, plain(await detail(conn, order_no)))
            return await change.done(
                answer, "order.cancel", sale=before["sale"], detail={"order_no": order_no}
            )

    return await post.once(effect, body)


def plain(document: dict[str, Any]) -> dict[str, Any]:
    """The document as JSON keeps it."""
    kept: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document))
    return kept


class RefundIn(Body):
    amount_minor: int | None = Field(
        None, ge=1, le=PRICE_MINOR_MAX, description="null: all that is left of it"
    )
    restock: bool = Field(False, description="the units go back into the sale, once the money is back")


_REFUSED = {
    "not_paid": "Only a paid order is refunded.",
    "nothing_captured": "No money of this order is on record.",
    "amount_wrong": "No more can go back than is left of what was paid.",
    "restock_needs_whole": "Units go back only when all the money does.",
}


@router.post(
    ONE + "/refund",
    status_code=202,
    response_model=OrderDetail,
    responses={**WRITE, **refusals("no_such_order", "not_refundable", "key_reused")},
    summary="Give money back, whole or in part",
)
async def refund(order_no: OrderPath, post: OperatorPosts, body: RefundIn | None = None) -> Response:
    """The whole: the order is `refunding` until the supplier has done it, then `refunded`. A part: the order stays
    paid, with an adjustment line."""
    wanted = body or RefundIn()

    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            asked = await refunds.ask(conn, order_no, wanted.amount_minor, wanted.restock, "operator")
            match asked:
                case RefundRefused("no_such_order"):
                    raise refuse("no_such_order")
                case RefundRefused(code):
                    raise refuse("not_refundable", _REFUSED.get(code, ""), extra={"why": code})
                case RefundAsked(refund_id, order):
                    answer = Answer(202, plain(await detail(conn, order_no)))
                    told = {
                        "order_no": order_no,
                        "refund_id": refund_id,
                        "amount_minor": wanted.amount_minor,
                        "restock": wanted.restock,
                    }
                    return await change.done(answer, "order.refund", sale=order["sale"], detail=told)

    return await post.once(effect, body)


class CancelledOut(Out):
    sku: str
    cancelled: int = Field(description="reserved orders that ended at once")
    leaving: int = Field(description="reserved orders with an open payment: ended once it is closed")
    refunding: int = Field(description="paid orders whose money is on its way back")
    in_flight: int = Field(description="claims that are not orders yet; repeat with a new key once this is 0")


@router.post(
    "/v1/admin/sales/{sale}/cancel-all",
    response_model=CancelledOut,
    responses={
        **WRITE,
        **refusals("no_such_sale", "no_such_item", "not_published", "not_paused", "key_reused"),
    },
    summary="End every live order of an item: cancel the reserved, refund the paid",
)
async def cancel_all(sale: SalePath, body: CancelAllIn, post: OperatorPosts) -> Response:
    """For a wrong price: pause, cancel-all, close, `copy_of`. The sale must be paused or closed, so that the units that
    come back are not sold again at once."""
    desk = post.desk

    async def effect(change: Change) -> Answer:
        counts = {"cancelled": 0, "leaving": 0, "refunding": 0}
        async with change.step() as conn:
            await paused_with(conn, sale, body.sku)
            if not change.dry_run:
                await change.intend()
        after = ("", 0, 0)
        more = True
        while more and not change.dry_run:
            # Page by page, so that no transaction holds thousands of rows; a crash in between is gone on with.
            async with change.step() as conn:
                more, after = await _end_page(conn, sale, body.sku, after, counts)
        async with change.step() as conn:
            if change.dry_run:
                await _end_page(conn, sale, body.sku, after, counts, limit=LIMIT_MAX * 100)
            answer = Answer(200, {"sku": body.sku, **counts, "in_flight": await _in_flight(desk, sale)})
            return await change.done(answer, "sale.cancel_all", sale=sale, detail={"sku": body.sku, **counts})

    return await post.once(effect, body)


async def paused_with(conn: AsyncConnection, sale_id: str, sku: str) -> None:
    """Refusal: the sale is not paused or closed, or has no such item."""
    row = await found(conn, sale_id, lock=True)
    if all(item.sku != sku for item in row.items):
        raise refuse("no_such_item")
    if row.state == "draft":
        raise refuse("not_published")
    if row.state not in ("paused", "closed", "settled"):
        raise refuse("not_paused")


async def _end_page(
    conn: AsyncConnection,
    sale: str,
    sku: str,
    after: tuple[str, int, int],
    counts: dict[str, int],
    *,
    limit: int = CANCEL_PAGE,
) -> tuple[bool, tuple[str, int, int]]:
    """End the live orders of the next page; whether there are more, and behind which."""
    start = after if after[0] else (sku, 0, 0)
    rows = await orders.page(conn, sale, None, start, limit)
    for row in rows:
        if row["sku"] != sku:
            return False, start
        start = (row["sku"], row["epoch"], row["seq"])
        if row["state"] == "reserved" and (how := await end(conn, row["order_no"])) is not None:
            counts[how] += 1
        elif row["state"] == "paid":
            asked = await refunds.ask(conn, row["order_no"], None, False, "operator")
            counts["refunding"] += isinstance(asked, RefundAsked)
    return len(rows) == limit, start


async def _in_flight(desk: Desk, sale: str) -> int:
    return int(await desk.link.call("HGET", SaleKeys(sale).sale, "claims_open") or 0)
