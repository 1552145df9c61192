"""One order from claim to SMS: what Postgres has written down, and what Redis tells its buyer now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field

from app.desk.auth import Viewer
from app.desk.orders import OrderPath
from app.desk.shapes import Out, When
from app.desk.wiring import Desk, TheDesk, reading
from app.errors import DidNotHappen, Unknown
from app.keys import SaleKeys
from app.ledger import orders
from app.ledger.tracing import trace
from app.problems import JsonRoute, refusals, refuse
from app.purchase.told import instant
from app.states import STATE_OF

router = APIRouter(tags=["orders"], route_class=JsonRoute)


class StepOut(Out):
    at: When
    step: Literal["claim", "confirm", "pay", "release", "tell", "operator"]
    what: str = Field(examples=["supplier asked"])
    detail: dict[str, Any]


class TraceOut(Out):
    order_no: str
    state: str | None = Field(description="of the order in Postgres; null: the claim was refused")
    told: str | None = Field(
        description="the state that Redis tells the buyer; null: Redis does not answer, or was rebuilt since"
    )
    data: list[StepOut]


@router.get(
    "/v1/admin/orders/{order_no}/trace",
    response_model=TraceOut,
    responses=refusals("auth_missing", "no_such_order", "invalid", "busy"),
    summary="What happened to one order, oldest first",
)
async def trace_order(order_no: OrderPath, desk: TheDesk, operator: Viewer) -> dict[str, Any]:
    async with reading(desk) as conn:
        steps = await trace(conn, order_no)
        row = await orders.get(conn, order_no)
    if not steps:
        raise refuse("no_such_order")
    return {
        "order_no": order_no,
        "state": None if row is None else row["state"],
        "told": None if row is None else await _told(desk, row),
        "data": [{**step, "at": instant(step["at"])} for step in steps],
    }


async def _told(desk: Desk, row: Mapping[str, Any]) -> str | None:
    """The ticket's state by its outcome byte. None after a rebuild too: the order has another ticket then."""
    keys = SaleKeys(row["sale"])
    try:
        epoch, byte = await desk.link.pipeline(
            [
                ("HGET", keys.sale, "epoch"),
                ("GETRANGE", keys.outcome(row["sku"]), row["seq"] - 1, row["seq"] - 1),
            ]
        )
    except (DidNotHappen, Unknown):
        return None
    if not isinstance(epoch, bytes) or int(epoch) != row["epoch"] or byte not in STATE_OF:
        return None
    return STATE_OF[byte].value
