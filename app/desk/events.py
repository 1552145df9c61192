"""What the shop needs to know: a feed that never skips a committed event, and the endpoints that are told the same."""

from __future__ import annotations

import secrets
from base64 import b64encode
from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Path, Query, Response
from pydantic import Field, StringConstraints

from app import sealing
from app.desk.auth import Admin, Viewer
from app.desk.change import AdminEdits, AdminPosts, Answer, Body, Change
from app.desk.shapes import (
    LIMIT_DEFAULT,
    Cursor,
    EndpointOut,
    EventOut,
    Limit,
    NewEndpointOut,
    Page,
    endpoint_out,
    event_out,
    exact,
    next_cursor,
    read_cursor,
)
from app.desk.wiring import TheDesk, reading
from app.ledger import events, operators
from app.problems import JsonRoute, refusals, refuse
from app.sale.document import SALE_ID, Line, is_web_address

router = APIRouter(tags=["events"], route_class=JsonRoute)
EVENTS, WEBHOOKS = "/v1/admin/events", "/v1/admin/webhooks"
ENDPOINTS_MAX = 20  # each event is pushed to each of them
URL_MAX = 2_000  # characters
NUMBER_MAX = 10_000  # events numbered by one look

EventType = Literal[
    "order.reserved", "order.paid", "order.expired", "order.cancelled", "order.refunded", "sale.published",
    "sale.opened", "sale.paused", "sale.resumed", "sale.sold_out", "sale.closed",
]  # fmt: skip


class EventsOut(Page[EventOut]):
    next_cursor: str = Field(description="`after` of the next call; never null: the feed goes on")


@router.get(
    EVENTS,
    response_model=EventsOut,
    responses=refusals("auth_missing", "invalid", "busy"),
    summary="Events in the order of their commits",
)
async def feed(
    desk: TheDesk,
    operator: Viewer,
    after: Annotated[
        str | None, Query(max_length=512, description="`next_cursor` of the answer before")
    ] = None,
    sale: Annotated[str | None, Query(pattern=SALE_ID)] = None,
    limit: Limit = LIMIT_DEFAULT,
) -> dict[str, Any]:
    """Everything that was committed, once and in order. Keep `next_cursor` and ask again: it never skips an event."""
    behind = desk.ring.cursor_read("events", after) if after is not None else [0]
    if behind is None:
        raise refuse(
            "invalid", "This cursor is not the feed's.", errors=[{"path": "query.after", "code": "cursor"}]
        )
    async with desk.engine.begin() as conn:
        # The worker numbers too; doing it here keeps the feed fresh when it is down.
        await events.number(conn, NUMBER_MAX)
    async with reading(desk) as conn:
        rows = await events.page(conn, int(behind[0]), limit, sale)
    position = int(rows[-1]["position"]) if rows else int(behind[0])
    return {
        "data": [event_out(row) for row in rows],
        "next_cursor": desk.ring.cursor_sign("events", [position]),
    }


class EndpointIn(Body):
    url: Annotated[Line, StringConstraints(min_length=8, max_length=URL_MAX)] = Field(
        description="https; http only to this machine", examples=["https://shop.example/fairdrop"]
    )
    events: Annotated[list[EventType], Field(min_length=1, max_length=len(get_args(EventType)))] = Field(
        description="event types to push", examples=[["order.reserved", "order.paid"]]
    )


@router.post(
    WEBHOOKS,
    status_code=201,
    response_model=NewEndpointOut,
    responses=refusals(
        "malformed",
        "auth_missing",
        "forbidden",
        "key_reused",
        "too_many",
        "too_large",
        "not_json",
        "invalid",
        "busy",
    ),
    summary="Tell an address of the shop",
)
async def create(body: EndpointIn, post: AdminPosts) -> Response:
    desk = post.desk
    if not is_web_address(body.url):
        raise refuse("invalid", "Not an https address.", errors=[{"path": "url", "code": "not_an_address"}])
    if len(set(body.events)) != len(body.events):
        raise refuse(
            "invalid", "An event type is named twice.", errors=[{"path": "events", "code": "not_unique"}]
        )

    async def effect(change: Change) -> Answer:
        endpoint_id, plain = f"wh_{secrets.token_hex(8)}", secrets.token_bytes(32)
        async with change.step() as conn:
            if await operators.count_endpoints(conn) >= ENDPOINTS_MAX:
                raise refuse("too_many", f"There are {ENDPOINTS_MAX} endpoints; delete one first.")
            sealed = sealing.seal(desk.seal_keys, plain, webhook_aad(endpoint_id))
            made = await operators.insert_endpoint(conn, endpoint_id, body.url, body.events, sealed)
            secret = {"secret": "whsec_" + b64encode(plain).decode()}
            detail = {"id": endpoint_id, "url": body.url, "events": body.events}
            return await change.done(
                Answer(201, endpoint_out(made), secret=secret), "webhook.create", detail=detail
            )

    return await post.once(effect, body)


def webhook_aad(endpoint_id: str) -> bytes:
    """What an endpoint's sealed secret is bound to."""
    return f"webhook\0{endpoint_id}".encode()


@router.get(
    WEBHOOKS,
    response_model=Page[EndpointOut],
    responses=refusals("auth_missing", "forbidden", "invalid", "busy"),
    summary="Addresses that are told",
)
async def list_endpoints(
    desk: TheDesk, operator: Admin, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
) -> dict[str, Any]:
    behind = read_cursor(desk.ring, "webhooks", cursor)
    after = None if behind is None else (datetime.fromisoformat(behind[0]), str(behind[1]))
    async with reading(desk) as conn:
        rows = await operators.endpoints(conn, limit=limit, after=after)
    last = [exact(rows[-1].created_at), rows[-1].id] if rows else None
    return {
        "data": [endpoint_out(row) for row in rows],
        "next_cursor": next_cursor(desk.ring, "webhooks", len(rows), limit, last),
    }


@router.delete(
    WEBHOOKS + "/{endpoint_id}",
    status_code=204,
    response_class=Response,
    responses=refusals("auth_missing", "forbidden", "no_such_webhook", "invalid", "busy"),
    summary="Tell an address no more",
)
async def delete(
    endpoint_id: Annotated[str, Path(pattern=r"^[a-z0-9_]{1,64}$")], edit: AdminEdits
) -> Response:
    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            ended = await operators.delete_endpoint(conn, endpoint_id)
            if ended is None:
                raise refuse("no_such_webhook")
            return await change.done(
                Answer(204, None), "webhook.delete", detail={"id": endpoint_id, "url": ended.url}
            )

    return await edit.once(effect)
