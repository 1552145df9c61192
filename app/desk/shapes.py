"""What the office answers, as models: the OpenAPI document is made from them, and tests hold the answers to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field

from app.ledger.journal import Entry
from app.ledger.operators import Endpoint, Operator
from app.ledger.sales import Sale
from app.problems import refuse
from app.sale.document import SALE_ID, Challenge, PassMode, format_time
from app.tokens import Keyring

LIMIT_DEFAULT, LIMIT_MAX = 100, 1_000

SaleState = Literal["draft", "scheduled", "line_open", "open", "paused", "sold_out", "closed", "settled"]
OrderState = Literal["reserved", "paid", "expired", "cancelled", "refunding", "refunded"]
SalePath = Annotated[str, Path(pattern=SALE_ID, examples=["phone-2026"])]
Limit = Annotated[int, Query(ge=1, le=LIMIT_MAX, description="most rows of the answer")]
Cursor = Annotated[
    str | None, Query(max_length=512, description="`next_cursor` of the page before; signed, opaque")
]
When = Annotated[str, Field(description="RFC 3339, UTC, milliseconds", examples=["2026-11-11T12:00:00.000Z"])]
T = TypeVar("T")


class Out(BaseModel):
    """An answer. New members may come at any time."""

    model_config = ConfigDict(extra="allow")


class Page(Out, Generic[T]):
    data: list[T]
    next_cursor: str | None = Field(description="null: this was the last page")


class ItemOut(Out):
    sku: str
    title: str
    price_minor: int
    currency: str
    units: int = Field(description="on sale in all, top-ups included")
    reserved: int
    sold: int
    paused: bool = Field(
        description="Postgres refused a claim for lack of stock: admission of the item has stopped"
    )


class Share(Out):
    """A supplier in a route."""

    name: str
    weight: int = Field(description="share among those with a weight; 0: a backup, tried in this order")


class SaleOut(Out):
    id: str
    title: str
    state: SaleState = Field(description="as in the live document: by the clock and the stock, too")
    version: int = Field(description="also the ETag")
    time_zone: str | None
    line_opens_at: When
    opens_at: When
    closes_at: When
    draw_freeze_s: int
    beacon: str
    beacon_wait_s: int
    pay_within_s: int
    limit_per_buyer: int
    rate_per_s: float | None
    standby: bool
    line_max: int
    pass_: PassMode = Field(alias="pass")
    challenge: Challenge
    audience: list[str] | None
    channels: list[str]
    default_channel: str | None
    return_urls: list[str]
    items: list[ItemOut]
    copy_of: str | None
    message: str | None
    seed_hash: str | None = Field(description="SHA-256 of the draw's seed; null until published")
    epoch: int
    created_at: When
    published_at: When | None
    opened_at: When | None
    sold_out_at: When | None
    closed_at: When | None
    settled_at: When | None


class PublishedOut(SaleOut):
    """The answer of publish, also of a dry run."""

    routes: dict[str, list[Share]] = Field(description="the suppliers of each channel, in order")


def sale_out(sale: Sale, seed_hash: str | None) -> dict[str, Any]:
    """A sale as the office shows it; the seed itself never leaves the stores before the opening."""
    return {
        "id": sale.id,
        "title": sale.title,
        "state": sale.word,
        "version": sale.version,
        "time_zone": sale.time_zone,
        "line_opens_at": format_time(sale.line_opens_at),
        "opens_at": format_time(sale.opens_at),
        "closes_at": format_time(sale.closes_at),
        "draw_freeze_s": sale.draw_freeze_s,
        "beacon": sale.beacon,
        "beacon_wait_s": sale.beacon_wait_s,
        "pay_within_s": sale.pay_within_s,
        "limit_per_buyer": sale.limit_per_buyer,
        "rate_per_s": sale.rate_per_s,
        "standby": sale.standby,
        "line_max": sale.line_max,
        "pass": sale.pass_mode,
        "challenge": sale.challenge,
        "audience": sale.audience,
        "channels": sale.channels,
        "default_channel": sale.default_channel,
        "return_urls": sale.return_urls,
        "items": [
            {
                "sku": i.sku,
                "title": i.title,
                "price_minor": i.price_minor,
                "currency": i.currency,
                "units": i.total,
                "reserved": i.reserved,
                "sold": i.sold,
                "paused": i.paused_at is not None,
            }
            for i in sale.items
        ],
        "copy_of": sale.copy_of,
        "message": sale.message,
        "seed_hash": seed_hash,
        "epoch": sale.epoch,
        "created_at": format_time(sale.created_at),
        "published_at": format_time(sale.published_at),
        "opened_at": format_time(sale.opened_at),
        "sold_out_at": format_time(sale.sold_out_at),
        "closed_at": format_time(sale.closed_at),
        "settled_at": format_time(sale.settled_at),
    }


class LineOut(Out):
    kind: Literal["item", "adjustment"]
    sku: str | None
    title: str
    units: int
    unit_minor: int
    amount_minor: int


class OrderOut(Out):
    order_no: str
    sale: str
    sku: str
    buyer_id: str
    units: int
    amount_minor: int
    currency: str
    state: OrderState
    reason: str | None
    leaving: bool
    seq: int
    epoch: int
    version: int
    claimed_at: When
    reserved_at: When
    pay_by: When | None
    paid_at: When | None
    ended_at: When | None


class AttemptOut(Out):
    id: str
    attempt_no: int
    provider: str
    channel: str
    state: str
    provider_ref: str | None
    code: str | None
    created_at: When
    expires_at: When | None


class CaptureOut(Out):
    id: int
    provider: str
    provider_ref: str
    amount_minor: int
    currency: str
    state: str
    captured_at: When


class RefundOut(Out):
    id: str
    amount_minor: int
    currency: str
    reason: str
    state: str
    created_at: When
    done_at: When | None


class OrderDetail(OrderOut):
    lines: list[LineOut]
    attempts: list[AttemptOut]
    captures: list[CaptureOut]
    refunds: list[RefundOut]


def order_out(row: Mapping[Any, Any]) -> dict[str, Any]:
    """An order as operators see it; the contact stays sealed and is not shown."""
    return {
        **{
            name: row[name]
            for name in (
                "order_no", "sale", "sku", "buyer_id", "units", "amount_minor", "currency", "state", "reason",
                "leaving", "seq", "epoch", "version",
            )
        },
        **{
            name: format_time(row[name])
            for name in ("claimed_at", "reserved_at", "pay_by", "paid_at", "ended_at")
        },
    }  # fmt: skip


class KeyOut(Out):
    id: str
    name: str
    role: Literal["viewer", "operator", "admin"]
    created_at: When


class NewKeyOut(KeyOut):
    key: str = Field(description="shown this once; only its hash is kept")


def key_out(key: Operator) -> dict[str, Any]:
    return {"id": key.id, "name": key.name, "role": key.role, "created_at": format_time(key.created_at)}


class EntryOut(Out):
    id: int
    at: When
    actor: str
    role: str
    action: str
    sale: str | None
    reason: str | None
    detail: dict[str, Any]
    hash: str
    prev_hash: str


def entry_out(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "at": format_time(entry.at),
        "actor": entry.actor,
        "role": entry.role,
        "action": entry.action,
        "sale": entry.sale,
        "reason": entry.reason,
        "detail": entry.detail,
        "hash": entry.hash.hex(),
        "prev_hash": entry.prev_hash.hex(),
    }


class ChainOut(Out):
    ok: bool
    rows: int
    broken_at: int | None = Field(description="the first row that was changed, or whose forerunner is gone")
    head: str = Field(
        description="hash of the last row that holds: note it elsewhere to notice a chain cut short"
    )


class EventOut(Out):
    id: str
    type: str
    at: When
    version: int
    data: dict[str, Any]


def event_out(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "type": row["type"],
        "at": format_time(row["at"]),
        "version": row["version"],
        "data": row["data"],
    }


class EndpointOut(Out):
    id: str
    url: str
    events: list[str]
    created_at: When
    secret_before_until: When | None = Field(
        None, description="until when deliveries are signed with the secret before the last rotation too"
    )
    disabled_at: When | None = Field(None, description="told no more since then")
    disabled_why: str | None = Field(None, description="`gone`: the address answered 410")


class NewEndpointOut(EndpointOut):
    secret: str = Field(description="`whsec_…` (Standard Webhooks); shown this once, kept sealed")


def endpoint_out(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "url": endpoint.url,
        "events": endpoint.events,
        "created_at": format_time(endpoint.created_at),
        "secret_before_until": format_time(endpoint.secret_before_until),
        "disabled_at": format_time(endpoint.disabled_at),
        "disabled_why": endpoint.disabled_why,
    }


class CheckOut(Out):
    name: str
    ok: bool
    left: Any
    right: Any


class AuditOut(Out):
    ok: bool
    checks: list[CheckOut]


# ---- cursors --------------------------------------------------------------------------------------------------------


def read_cursor(ring: Keyring, kind: str, text: str | None) -> list[Any] | None:
    """What a cursor of ours points at. Refusal 422: not ours, of another list, or bent."""
    if text is None:
        return None
    payload = ring.cursor_read(kind, text)
    if payload is None:
        raise refuse(
            "invalid",
            "This cursor is not one of this list's.",
            errors=[{"path": "query.cursor", "code": "cursor"}],
        )
    return payload


def listed(
    ring: Keyring,
    kind: str,
    limit: int,
    rows: Sequence[T],
    shown: Callable[[T], Any],
    behind: Callable[[T], list[Any]],
) -> dict[str, Any]:
    """One page of a list: rows as they are `shown`, and the cursor `behind` the last one if the page is full."""
    more = rows and len(rows) == limit
    return {
        "data": [shown(row) for row in rows],
        "next_cursor": ring.cursor_sign(kind, behind(rows[-1])) if more else None,
    }


def format_ms(now_ms: int) -> str:
    """Unix milliseconds as the API writes a time."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(now_ms // 1000)) + f"{now_ms % 1000:03d}Z"


def exact(moment: datetime) -> str:
    """A time as a cursor keeps it: every microsecond."""
    return moment.isoformat()
