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
    Out,
    Page,
    endpoint_out,
    event_out,
    exact,
    listed,
    read_cursor,
)
from app.desk.wiring import TheDesk, reading
from app.errors import Refusal
from app.ledger import deliveries, events, operators
from app.problems import JsonRoute, refusals, refuse
from app.sale.document import SALE_ID, Line, is_web_address
from app.sealing import webhook_aad

router = APIRouter(tags=["events"], route_class=JsonRoute)
EVENTS, WEBHOOKS = "/v1/admin/events", "/v1/admin/webhooks"
ENDPOINTS_MAX = 20  # each event is pushed to each of them
URL_MAX = 2_000  # characters
NUMBER_MAX = 10_000  # events numbered by one look
OVERLAP_DEFAULT_S = 86_400  # a day to bring the new secret to every server of the shop
OVERLAP_MAX_S = 604_800
REPLAY_MAX = 100_000  # events made due again by one call

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
        # The worker numbers too; doing it here keeps the feed fresh when it is down. At rest nobody waits for the lock.
        if await events.is_behind(conn):
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
    return listed(
        desk.ring, "webhooks", limit, rows, endpoint_out, lambda row: [exact(row.created_at), row.id]
    )


class RotateIn(Body):
    overlap_s: int = Field(
        OVERLAP_DEFAULT_S,
        ge=0,
        le=OVERLAP_MAX_S,
        description="s in which deliveries are signed with the old secret too; 0: it has leaked",
    )


WRITE = refusals(
    "malformed", "auth_missing", "forbidden", "no_such_webhook", "key_reused", "too_large", "not_json", "invalid",
    "busy",
)  # fmt: skip
EndpointPath = Annotated[str, Path(pattern=r"^[a-z0-9_]{1,64}$", examples=["wh_3f0c9a5e3f0c9a5e"])]


@router.post(
    WEBHOOKS + "/{endpoint_id}/rotate",
    response_model=NewEndpointOut,
    responses=WRITE,
    summary="Sign with a new secret; for a while with the old one too",
)
async def rotate(endpoint_id: EndpointPath, post: AdminPosts, body: RotateIn | None = None) -> Response:
    desk, wanted = post.desk, body or RotateIn()

    async def effect(change: Change) -> Answer:
        plain = secrets.token_bytes(32)
        sealed = sealing.seal(desk.seal_keys, plain, webhook_aad(endpoint_id))
        async with change.step() as conn:
            rotated = await operators.rotate_secret(conn, endpoint_id, sealed, wanted.overlap_s)
            if rotated is None:
                raise refuse("no_such_webhook")
            secret = {"secret": "whsec_" + b64encode(plain).decode()}
            return await change.done(
                Answer(200, endpoint_out(rotated), secret=secret),
                "webhook.rotate",
                detail={"id": endpoint_id, "overlap_s": wanted.overlap_s},
            )

    return await post.once(effect, body)


class ReplayIn(Body):
    after: Annotated[Line, StringConstraints(max_length=512)] = Field(
        description="a time (from then on), or a cursor of the feed (behind it)",
        examples=["2026-11-11T00:00:00+08:00"],
    )
    until: Annotated[Line, StringConstraints(max_length=64)] | None = Field(
        None, description="a time (before it); null: everything since"
    )


class ReplayOut(Out):
    id: str
    replayed: int = Field(description="events that are due for this endpoint again")


@router.post(
    WEBHOOKS + "/{endpoint_id}/replay",
    status_code=202,
    response_model=ReplayOut,
    responses={**WRITE, **refusals("wrong_state", "key_reused")},
    summary="Push events of the past again",
)
async def replay(endpoint_id: EndpointPath, body: ReplayIn, post: AdminPosts) -> Response:
    """Whatever became of them before: the shop knows an event it has had by its `webhook-id`."""
    desk = post.desk
    at = _instant(body.after)
    behind = desk.ring.cursor_read("events", body.after) if at is None else None
    if at is None and behind is None:
        raise _not_a_time("after")
    until = None if body.until is None else _instant(body.until)
    if body.until is not None and until is None:
        raise _not_a_time("until")

    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            known = await operators.endpoint(conn, endpoint_id)
            if known is None:
                raise refuse("no_such_webhook")
            if known.disabled_at is not None:
                raise refuse("wrong_state", "The endpoint is disabled; enable it first.")
            count = await deliveries.replay(
                conn,
                endpoint_id,
                after=at,
                after_position=None if behind is None else int(behind[0]),
                until=until,
                keep_trying_s=desk.settings.webhook_retry_for_s,
                limit=REPLAY_MAX,
            )
            if count is None:
                raise refuse(
                    "invalid",
                    f"That is more than {REPLAY_MAX} events: name an earlier `until`.",
                    errors=[{"path": "until", "code": "too_many"}],
                )
            detail = {"id": endpoint_id, "after": body.after, "until": body.until, "replayed": count}
            return await change.done(
                Answer(202, {"id": endpoint_id, "replayed": count}), "webhook.replay", detail=detail
            )

    return await post.once(effect, body)


class EnableOut(Out):
    id: str
    due: int = Field(
        description="deliveries that had been given up and are due again; newer events follow by themselves"
    )


@router.post(
    WEBHOOKS + "/{endpoint_id}/enable",
    status_code=202,
    response_model=EnableOut,
    responses={**WRITE, **refusals("wrong_state", "key_reused")},
    summary="Tell a disabled endpoint again",
)
async def enable(endpoint_id: EndpointPath, post: AdminPosts, body: Body | None = None) -> Response:
    """It is pushed what it missed of the last 72 h (`FAIRDROP_WEBHOOK_RETRY_FOR_S`); what is older, by a replay."""
    desk = post.desk

    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            if await operators.endpoint(conn, endpoint_id) is None:
                raise refuse("no_such_webhook")
            due = await deliveries.enable(conn, endpoint_id, desk.settings.webhook_retry_for_s)
            if due is None:
                raise refuse("wrong_state", "The endpoint is not disabled.")
            found = {"id": endpoint_id, "due": due}
            return await change.done(Answer(202, found), "webhook.enable", detail=found)

    return await post.once(effect, body)


def _instant(text: str) -> datetime | None:
    """A time with its offset; None: it is none."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def _not_a_time(name: str) -> Refusal:
    return refuse(
        "invalid", "A time has an offset, or Z.", errors=[{"path": name, "code": "time_without_zone"}]
    )


@router.delete(
    WEBHOOKS + "/{endpoint_id}",
    status_code=204,
    response_class=Response,
    responses=refusals("auth_missing", "forbidden", "no_such_webhook", "invalid", "busy"),
    summary="Tell an address no more",
)
async def delete(endpoint_id: EndpointPath, edit: AdminEdits) -> Response:
    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            ended = await operators.delete_endpoint(conn, endpoint_id)
            if ended is None:
                raise refuse("no_such_webhook")
            return await change.done(
                Answer(204, None), "webhook.delete", detail={"id": endpoint_id, "url": ended.url}
            )

    return await edit.once(effect)
