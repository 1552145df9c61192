"""Suppliers' daily bills beside our books: which days were read, and what differs."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from app.desk.auth import Viewer
from app.desk.shapes import LIMIT_DEFAULT, Cursor, Limit, Out, Page, When, listed, read_cursor
from app.desk.wiring import TheDesk, reading
from app.ledger import bills
from app.problems import JsonRoute, refusals
from app.sale.document import Word, format_time

router = APIRouter(tags=["bills"], route_class=JsonRoute)
BILLS = "/v1/admin/bills"
DIFFERENCES_SHOWN_MAX = 100  # of one day; `differing` counts them all


class DifferenceOut(Out):
    what: Literal["capture", "refund"]
    kind: Literal["missing_here", "missing_there", "other_amount"]
    ref: str = Field(description="the supplier's")
    our_id: str = Field(description="of the attempt or refund; empty: not known")
    order_no: str
    ours_minor: int | None
    theirs_minor: int | None
    currency: str


class BillOut(Out):
    provider: str
    day: date = Field(description="UTC")
    state: Literal["due", "read"] = Field(description="due: not read yet, or to be read again")
    lines: int | None = Field(description="on the bill")
    read_at: When | None
    tries: int
    code: str | None = Field(description="why it could not be read, if so; bill_not_ready: later")
    differing: int = Field(description="lines that differ now; they are looked at again each hour")
    differences: list[DifferenceOut] = Field(description=f"the first {DIFFERENCES_SHOWN_MAX} of them")


@router.get(
    BILLS,
    response_model=Page[BillOut],
    responses=refusals("auth_missing", "invalid", "busy"),
    summary="Payment suppliers' daily bills and what differs from our books, newest first",
)
async def list_bills(
    desk: TheDesk,
    operator: Viewer,
    provider: Annotated[Word | None, Query(description="of this supplier only")] = None,
    differing: Annotated[bool, Query(description="only days that differ, or cannot be read")] = False,
    limit: Limit = LIMIT_DEFAULT,
    cursor: Cursor = None,
) -> dict[str, Any]:
    behind = read_cursor(desk.ring, "bills", cursor)
    before = None if behind is None else (date.fromisoformat(str(behind[0])), str(behind[1]))
    async with reading(desk) as conn:
        rows = await bills.page(
            conn, limit=limit, before=before, provider=provider, differing=differing,
            shown_max=DIFFERENCES_SHOWN_MAX,
        )  # fmt: skip
    return listed(
        desk.ring, "bills", limit, rows, _out, lambda row: [row["day"].isoformat(), row["provider"]]
    )


def _out(row: bills.Row) -> dict[str, Any]:
    read_at: datetime | None = row["read_at"]
    return {**row, "read_at": None if read_at is None else format_time(read_at)}
