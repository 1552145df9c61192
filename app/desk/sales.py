"""Sales: drafts, publish, and everything that may be turned while people wait."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncConnection

from app.desk import routes
from app.desk.auth import Viewer
from app.desk.change import Answer, Body, Change, OperatorEdits, OperatorPosts, etag_of
from app.desk.shapes import (
    LIMIT_DEFAULT,
    Cursor,
    Limit,
    Page,
    PublishedOut,
    SaleOut,
    SalePath,
    SaleState,
    exact,
    listed,
    read_cursor,
    sale_out,
)
from app.desk.wiring import Desk, TheDesk, reading
from app.errors import DidNotHappen, Unknown
from app.ledger import events, outbox, sales
from app.ledger.sales import Sale
from app.problems import JsonRoute, refusals, refuse
from app.sale import document, publish
from app.sale.document import UNITS_MAX, Message, Rate, SaleIn, SalePatch, Sku, Terms

router = APIRouter(tags=["sales"], route_class=JsonRoute)
ADMIN = "/v1/admin/sales"
READ = refusals("auth_missing", "auth_invalid", "forbidden", "not_found", "no_such_sale", "invalid", "busy")
WRITE = {
    **refusals(
        "malformed", "auth_missing", "forbidden", "no_such_sale", "key_reused", "wrong_state", "sale_closed",
        "too_large", "not_json", "invalid", "busy",
    ),
}  # fmt: skip
LATER: dict[int | str, dict[str, Any]] = {
    202: {"model": SaleOut, "description": "committed; live as soon as Redis answers"}
}


def shown_sale(sale: Sale, status: int = 200) -> Answer:
    seed_hash = None if sale.seed is None else hashlib.sha256(sale.seed).hexdigest()
    return Answer(status, sale_out(sale, seed_hash), etag=sale.version)


async def found(conn: AsyncConnection, sale_id: str, *, lock: bool = False) -> Sale:
    sale = await sales.get(conn, sale_id, lock=lock)
    if sale is None:
        raise refuse("no_such_sale")
    return sale


async def tell(desk: Desk, work: Callable[[], Awaitable[None]], answer: Answer) -> Answer:
    """Tell Redis what has been committed; 202 if it cannot be told now (a relay tells it later)."""
    try:
        await work()
    except (DidNotHappen, Unknown):
        return Answer(202, answer.body, answer.etag, answer.secret)
    return answer


# ---- drafts ---------------------------------------------------------------------------------------------------------


@router.post(
    ADMIN,
    status_code=201,
    response_model=SaleOut,
    responses={**WRITE, **refusals("sale_exists", "time_without_zone")},
    summary="Make a draft",
)
async def create(given: SaleIn, post: OperatorPosts) -> Response:
    """A draft: nothing is live before publish. With `copy_of`, what is not given is taken from that sale."""

    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            base = None
            if given.copy_of is not None:
                base = publish.terms_of(await found(conn, given.copy_of))
            terms = document.settle(given, base, post.desk.house)
            if not await sales.insert_draft(conn, columns_of(terms), items_of(terms)):
                raise refuse("sale_exists")
            sale = await found(conn, terms.id)
            return await change.done(
                shown_sale(sale, 201), "sale.create", sale=sale.id, detail={"copy_of": given.copy_of}
            )

    return await post.once(effect)


def columns_of(terms: Terms) -> dict[str, Any]:
    """The columns of `sale` that hold a document."""
    return {
        "id": terms.id,
        "title": terms.title,
        "time_zone": terms.time_zone,
        "line_opens_at": terms.line_opens_at,
        "opens_at": terms.opens_at,
        "closes_at": terms.closes_at,
        "draw_freeze_s": terms.draw_freeze_s,
        "beacon": terms.beacon,
        "beacon_wait_s": terms.beacon_wait_s,
        "pay_within_s": terms.pay_within_s,
        "limit_per_buyer": terms.limit_per_buyer,
        "rate_per_s": terms.rate_per_s,
        "standby": terms.standby,
        "line_max": terms.line_max,
        "pass_mode": terms.pass_mode,
        "challenge": terms.challenge,
        "audience": None if terms.audience is None else list(terms.audience),
        "channels": list(terms.channels),
        "default_channel": terms.default_channel,
        "return_urls": list(terms.return_urls),
        "copy_of": terms.copy_of,
    }


def items_of(terms: Terms) -> list[dict[str, Any]]:
    return [
        {
            "sku": i.sku,
            "title": i.title,
            "price_minor": i.price_minor,
            "currency": i.currency,
            "total": i.units,
        }
        for i in terms.items
    ]


@router.get(ADMIN, response_model=Page[SaleOut], responses=READ, summary="All sales, newest first")
async def list_sales(
    desk: TheDesk,
    operator: Viewer,
    state: Annotated[SaleState | None, Query()] = None,
    limit: Limit = LIMIT_DEFAULT,
    cursor: Cursor = None,
) -> dict[str, Any]:
    behind = read_cursor(desk.ring, "sales", cursor)
    before = None if behind is None else (datetime.fromisoformat(behind[0]), str(behind[1]))
    async with reading(desk) as conn:
        rows = await sales.page(conn, limit=limit, before=before, state=state)
    return listed(
        desk.ring,
        "sales",
        limit,
        rows,
        lambda row: shown_sale(row).body,
        lambda row: [exact(row.created_at), row.id],
    )


@router.get(ADMIN + "/{sale}", response_model=SaleOut, responses=READ, summary="One sale, with its ETag")
async def read_sale(sale: SalePath, desk: TheDesk, operator: Viewer, response: Response) -> dict[str, Any]:
    async with reading(desk) as conn:
        row = await found(conn, sale)
    response.headers["ETag"] = etag_of(row.version)
    return shown_sale(row).body or {}


IfMatch = Annotated[
    str | None, Header(alias="If-Match", max_length=200, description="the ETag that was read; required")
]


def match(if_match: str | None, version: int) -> None:
    """Refusal 428 without If-Match, 412 when it names another version. Comparison is strong: W/ never matches."""
    if if_match is None:
        raise refuse("if_match_required")
    if if_match.strip() != "*" and etag_of(version) not in [part.strip() for part in if_match.split(",")]:
        raise refuse("changed")


@router.patch(
    ADMIN + "/{sale}",
    response_model=SaleOut,
    responses={
        **WRITE,
        **LATER,
        **refusals("fixed_after_publish", "changed", "if_match_required", "invalid", "time_without_zone"),
    },
    summary="Change a sale",
)
async def patch(sale: SalePath, given: SalePatch, edit: OperatorEdits, if_match: IfMatch = None) -> Response:
    """A draft: any field but its id. A published sale: title, rate, standby, line_max, closes_at, pay_within_s (new
    orders); an opening time until it has passed; prices until the line opens. What comes too late is 409
    `fixed_after_publish` with each path and code, and nothing is changed."""
    desk = edit.desk

    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            row = await found(conn, sale, lock=True)
            match(if_match, row.version)
            old = publish.terms_of(row)
            now = await sales.clock(conn)
            new = document.amend(given, old, desk.house)
            late = document.locked(old, new, row.state, now)
            if late:
                code = "sale_closed" if late[0]["code"] == "sale_closed" else "fixed_after_publish"
                raise refuse(code, document.says(late), errors=late)
            if new == old:
                return await change.done(shown_sale(row), "sale.change", sale=sale, detail={"changed": {}})
            if row.state != "draft":
                new = document.keep_freeze(old, new, now)
            columns = columns_of(new)
            before = columns_of(old)
            await sales.change(
                conn, sale, {name: value for name, value in columns.items() if value != before[name]}
            )
            if new.items != old.items:
                if row.state == "draft":
                    await sales.replace_items(conn, sale, items_of(new))
                else:
                    for item in new.items:
                        await sales.set_price(conn, sale, item.sku, item.price_minor)
            row = await found(conn, sale)
            told = None if row.state == "draft" else await put_switch(conn, row)
            detail = {"changed": {name: given_value(given, name) for name in sorted(given.model_fields_set)}}
            answer = await change.done(shown_sale(row), "sale.change", sale=sale, detail=detail)
        return answer if told is None else await tell(desk, lambda: turn(desk, change, row, told), answer)

    return await edit.once(effect)


def given_value(given: SalePatch, name: str) -> Any:
    return given.model_dump(mode="json", include={name})[name]


@router.delete(
    ADMIN + "/{sale}",
    status_code=204,
    response_class=Response,
    responses={**WRITE, **refusals("published", "changed")},
    summary="Delete a draft; its id stays used",
)
async def delete(sale: SalePath, edit: OperatorEdits, if_match: IfMatch = None) -> Response:
    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            row = await found(conn, sale, lock=True)
            if if_match is not None:
                match(if_match, row.version)
            if row.state != "draft":
                raise refuse("published")
            await sales.delete_draft(conn, sale)
            return await change.done(Answer(204, None), "sale.delete", sale=sale)

    return await edit.once(effect)


# ---- going live -----------------------------------------------------------------------------------------------------


@router.post(
    ADMIN + "/{sale}/publish",
    response_model=PublishedOut,
    responses={**WRITE, **LATER, **refusals("invalid", "unknown_channel", "no_captcha")},
    summary="Publish a draft: commit to the draw's seed, go live on every front door",
)
async def publish_sale(sale: SalePath, post: OperatorPosts, body: Body | None = None) -> Response:
    desk = post.desk

    async def effect(change: Change) -> Answer:
        await routes.look(desk)
        async with change.step() as conn:
            row = await found(conn, sale, lock=True)
            if row.state != "draft":
                raise refuse("wrong_state", f"The sale is {row.word}; only a draft is published.")
            now = await sales.clock(conn)
            if row.closes_at <= now:
                raise refuse(
                    "invalid",
                    "The sale would be over.",
                    errors=[{"path": "closes_at", "code": "in_the_past"}],
                )
            led = routes.of_channels(desk, row.channels)
            if row.challenge == "captcha" and not desk.settings.captcha_verify_url:
                raise refuse("no_captcha", errors=[{"path": "challenge", "code": "no_captcha"}])
            version = await sales.change(
                conn, sale, {"state": "scheduled", "seed": secrets.token_bytes(32), "published_at": now}
            )
            row = await found(conn, sale)
            answer = shown_sale(row)
            answer = replace(answer, body={**(answer.body or {}), "routes": led})
            seed_hash = (answer.body or {})["seed_hash"]
            await events.put(
                conn, "sale.published", sale, version, publish.event_data(row, seed_hash=seed_hash)
            )
            await change.done(answer, "sale.publish", sale=sale, detail={"seed_hash": seed_hash})
        return await tell(desk, lambda: publish.go_live(change.conn, desk.link, desk.scripts, row), answer)

    return await post.once(effect, body)


async def put_switch(conn: AsyncConnection, row: Sale) -> int:
    """Write down, with the change, what Redis must be told of it. Always the whole set: the newest version wins."""
    payload = {"version": row.version, "changes": publish.switch_fields(row)}
    return await outbox.put(conn, "switch", row.id, row.epoch, payload)


async def turn(desk: Desk, change: Change, row: Sale, outbox_id: int) -> None:
    """Tell Redis at once; the relay finds nothing left to do.

    On the change's own connection: a request that holds one and waits for a second would lock all of them out.
    """
    await publish.switch(desk.link, desk.scripts, row)
    async with change.step() as conn:
        await outbox.close(conn, [(outbox_id, 0)], "done")


async def switched(
    post: OperatorPosts,
    sale_id: str,
    body: Body | None,
    action: str,
    values: Callable[[Sale, datetime], Mapping[str, Any]],
    *,
    event: str | None = None,
    detail: Mapping[str, Any] | None = None,
    also: Callable[[AsyncConnection, Sale], Awaitable[None]] | None = None,
) -> Response:
    """One change of a published sale's columns: Postgres, journal, event and outbox in one step, then Redis."""
    desk = post.desk

    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            row = await found(conn, sale_id, lock=True)
            if row.state == "draft":
                raise refuse("not_published")
            if row.state in ("closed", "settled"):
                raise refuse("sale_closed")
            version = await sales.change(conn, sale_id, values(row, await sales.clock(conn)))
            if also is not None:
                await also(conn, row)
            row = await found(conn, sale_id)
            if event is not None:
                await events.put(conn, event, sale_id, version, publish.event_data(row))
            outbox_id = await put_switch(conn, row)
            answer = await change.done(shown_sale(row), action, sale=sale_id, detail=detail)
        return await tell(desk, lambda: turn(desk, change, row, outbox_id), answer)

    return await post.once(effect, body)


@router.post(
    ADMIN + "/{sale}/pause",
    response_model=SaleOut,
    responses={**WRITE, **LATER, **refusals("wrong_state", "not_published")},
    summary="Stop admission; joining, payments, releases and deadlines go on",
)
async def pause(sale: SalePath, post: OperatorPosts, body: Body | None = None) -> Response:
    def values(row: Sale, now: datetime) -> Mapping[str, Any]:
        if row.state == "paused":
            raise refuse("wrong_state", "The sale is paused already.")
        return {"state": "paused"}

    return await switched(post, sale, body, "sale.pause", values, event="sale.paused")


@router.post(
    ADMIN + "/{sale}/resume",
    response_model=SaleOut,
    responses={**WRITE, **LATER, **refusals("wrong_state", "not_published")},
    summary="Go on after a pause, also with items that were stopped for lack of stock in Postgres",
)
async def resume(sale: SalePath, post: OperatorPosts, body: Body | None = None) -> Response:
    def values(row: Sale, now: datetime) -> Mapping[str, Any]:
        if row.state != "paused" and not any(item.paused_at for item in row.items):
            raise refuse("wrong_state", f"The sale is {row.word}, not paused.")
        return {"state": "open" if row.opened_at is not None else "scheduled"}

    async def let_items_go_on(conn: AsyncConnection, row: Sale) -> None:
        for sku in await sales.resume_items(conn, row.id):
            await outbox.put(conn, "switch", row.id, row.epoch, {"sku": sku, "item_paused": "0"})

    return await switched(post, sale, body, "sale.resume", values, event="sale.resumed", also=let_items_go_on)


@router.post(
    ADMIN + "/{sale}/close",
    response_model=SaleOut,
    responses={**WRITE, **LATER, **refusals("not_published", "wrong_state")},
    summary="Close for good: waiting tickets end, claimed and reserved ones finish, returned units stay",
)
async def close(sale: SalePath, post: OperatorPosts, body: Body | None = None) -> Response:
    def values(row: Sale, now: datetime) -> Mapping[str, Any]:
        return {"state": "closed", "closed_at": now}

    return await switched(post, sale, body, "sale.close", values, event="sale.closed")


class RateIn(Body):
    rate_per_s: Rate | None = Field(
        description="tickets served per s; null: as fast as stock allows", examples=[50]
    )


class MessageIn(Body):
    text: Message | None = Field(
        description="shown above the line; null or empty: nothing", examples=["Almost there"]
    )


class TopUpIn(Body):
    sku: Sku
    units: int = Field(
        ge=-UNITS_MAX, le=UNITS_MAX, description="negative: down to the unsold", examples=[100]
    )


class CancelAllIn(Body):
    sku: Sku


@router.post(
    ADMIN + "/{sale}/rate",
    response_model=SaleOut,
    responses={**WRITE, **LATER, **refusals("not_published", "wrong_state")},
    summary="Change the admission rate",
)
async def rate(sale: SalePath, body: RateIn, post: OperatorPosts) -> Response:
    chosen = None if body.rate_per_s is None else float(body.rate_per_s)
    return await switched(
        post, sale, body, "sale.rate", lambda row, now: {"rate_per_s": chosen}, detail={"rate_per_s": chosen}
    )


@router.post(
    ADMIN + "/{sale}/message",
    response_model=SaleOut,
    responses={**WRITE, **LATER, **refusals("not_published", "wrong_state")},
    summary="Say something to everyone in line",
)
async def message(sale: SalePath, body: MessageIn, post: OperatorPosts) -> Response:
    text = body.text or None
    return await switched(
        post, sale, body, "sale.message", lambda row, now: {"message": text}, detail={"text": text}
    )


@router.post(
    ADMIN + "/{sale}/top-up",
    response_model=SaleOut,
    responses={
        **WRITE,
        **LATER,
        **refusals("no_such_item", "no_such_sale", "not_published", "not_unsold", "invalid"),
    },
    summary="Add units, or take unsold ones away",
)
async def top_up(sale: SalePath, body: TopUpIn, post: OperatorPosts) -> Response:
    """Added units are in Postgres first and reach Redis once, whatever is repeated. Units are taken away in Redis
    first, never more than are unsold (409 `not_unsold` with `units_left`)."""
    if body.units == 0:
        raise refuse("invalid", "Zero units are no top-up.", errors=[{"path": "units", "code": "zero"}])
    effect = _add(post, sale, body) if body.units > 0 else _take(post, sale, body)
    return await post.once(effect, body)


async def on_sale(conn: AsyncConnection, sale_id: str, sku: str) -> Sale:
    """The sale, locked, published and not closed, with this item."""
    row = await found(conn, sale_id, lock=True)
    if row.state == "draft":
        raise refuse("not_published")
    if row.state in ("closed", "settled"):
        raise refuse("sale_closed")
    if all(item.sku != sku for item in row.items):
        raise refuse("no_such_item")
    return row


def _add(post: OperatorPosts, sale_id: str, body: TopUpIn) -> Callable[[Change], Awaitable[Answer]]:
    desk = post.desk

    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            row = await on_sale(conn, sale_id, body.sku)
            total = next(item.total for item in row.items if item.sku == body.sku)
            if total + body.units > UNITS_MAX:
                raise refuse(
                    "invalid",
                    f"An item has at most {UNITS_MAX} units.",
                    errors=[{"path": "units", "code": "less_than_equal"}],
                )
            await sales.add_units(conn, sale_id, body.sku, body.units)
            await sales.change(conn, sale_id, {})
            row = await found(conn, sale_id)
            payload = {"sku": body.sku, "units": body.units, "id": change.id}
            added_id = await outbox.put(conn, "stock_add", sale_id, row.epoch, payload)
            switch_id = await put_switch(conn, row)
            detail = {"sku": body.sku, "units": body.units, "id": change.id}
            answer = await change.done(shown_sale(row), "sale.top_up", sale=sale_id, detail=detail)

        async def told() -> None:
            await publish.add_stock(desk.settings, desk.scripts, row, body.sku, body.units, change.id)
            async with change.step() as conn:
                await outbox.close(conn, [(added_id, 0)], "done")
            await turn(desk, change, row, switch_id)

        return await tell(desk, told, answer)

    return effect


def _take(post: OperatorPosts, sale_id: str, body: TopUpIn) -> Callable[[Change], Awaitable[Answer]]:
    desk = post.desk

    async def effect(change: Change) -> Answer:
        async with change.step() as conn:
            row = await on_sale(conn, sale_id, body.sku)
            if change.dry_run:
                item = next(item for item in row.items if item.sku == body.sku)
                if item.available < -body.units:
                    raise refuse("not_unsold", extra={"units_left": item.available})
                return await change.done(shown_sale(row), "sale.top_up", sale=sale_id)
            intent_id = await sales.intend_take(
                conn,
                sale_id,
                row.epoch,
                sku=body.sku,
                units=body.units,
                take_id=change.id,
                actor=f"{change.operator.name} ({change.operator.id})",
                role=change.operator.role,
                reason=change.reason,
            )
            await change.intend()
        left = await publish.take_stock(
            desk.settings, desk.scripts, row.id, row.epoch, body.sku, body.units, change.id
        )
        async with change.step() as conn:
            row = await found(conn, sale_id, lock=True)
            if left is not None:
                await sales.close_intent(conn, intent_id, "dropped")
            else:
                first = await publish.settle_take(conn, sale_id, body.sku, body.units, intent_id)
                row = await found(conn, sale_id)
                switch_id = await put_switch(conn, row)
                detail = {"sku": body.sku, "units": body.units, "id": change.id}
                # `finish_half_done` was faster: it has written the journal.
                answer = await change.done(
                    shown_sale(row), "sale.top_up", sale=sale_id, detail=detail, journalled=not first
                )
        if left is not None:
            raise refuse("not_unsold", extra={"units_left": left})
        return await tell(desk, lambda: turn(desk, change, row, switch_id), answer)

    return effect
