"""One document that says how a sale is doing, made once a second whoever watches, and the audit."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError

from app.desk.auth import Viewer
from app.desk.providers import ProviderOut, breakers
from app.desk.shapes import AuditOut, Out, SalePath, When, format_ms
from app.desk.wiring import Desk, TheDesk, reading
from app.errors import DidNotHappen, FairdropError, Unknown
from app.keys import SaleKeys
from app.ledger import operators, outbox, sales
from app.ledger.sales import Sale
from app.problems import refusals, refuse
from app.repair import audit
from app.repair.audit import Audit
from app.sale.document import format_time, to_ms

router = APIRouter(tags=["live"])
OF_SALE = "/v1/admin/sales/{sale}"
EVERY_S = 1.0  # between two looks at a sale that is watched
AUDIT_EVERY_S = 5.0  # the sums of the audit read every order: not with each look
RATE_WINDOW_S = 10.0  # a rate is measured over this
LATENCY_WINDOW_S = 60
FORGET_AFTER_S = 30.0  # a sale that nobody asks for is not looked at any more
STREAMS_MAX = 200  # event streams of one office process; beyond: 503, poll
KEY_CHECK_EVERY_S = 5.0  # a revoked key's stream ends within this
_log = structlog.get_logger("live")


class Rates(Out):
    join_per_s: float | None
    serve_per_s: float | None
    reserve_per_s: float | None
    pay_per_s: float | None
    limit_per_s: float | None = Field(
        description="the admission rate that is set; null: as fast as stock allows"
    )


class Slowdown(Out):
    """Admission is slower than the operator wants, by itself; the rate that is set stays as it is."""

    reason: str = Field(
        description="payment_down, payment_slow (links are late), confirm_lag (orders are late)"
    )
    rate_per_s: float = Field(description="tickets served at most")
    from_per_s: float = Field(description="what was served when it began")
    until_at: When = Field(description="it ends then unless a worker wants it still")


class Conversion(Out):
    joined_to_reserved: float | None
    reserved_to_paid: float | None


class Latency(Out):
    confirm_p50_ms: float | None = Field(description="claim → reserved, orders of the last minute")
    confirm_p99_ms: float | None
    pay_p50_ms: float | None = Field(description="reserved → paid")
    pay_p99_ms: float | None


class Backlog(Out):
    orders: int = Field(description="claims on their way to Postgres")
    asks: int = Field(description="leave and payment requests on their way")
    outbox: int = Field(description="decisions that Redis has not been told, of all sales")


class LiveItem(Out):
    sku: str
    title: str
    units: int
    units_left: int
    joined: int
    waiting: int
    served: int
    left: int
    reserved: int
    sold: int
    paused: bool


class LiveOut(Out):
    sale: str
    title: str
    state: str = Field(description="scheduled, line_open, open, paused, sold_out, closed, settled")
    now_at: When
    line_opens_at: When
    opens_at: When
    closes_at: When
    message: str | None
    version: int
    joined: int
    waiting: int
    served: int
    claimed: int = Field(description="claims in flight")
    reserved: int
    paid: int
    expired: int
    cancelled: int
    refunding: int
    refunded: int
    units: int
    units_left: int
    rates: Rates
    slowdown: Slowdown | None = Field(description="null: none")
    notices: list[str] = Field(description="what tickets say beyond their state: payment (out of order)")
    conversion: Conversion
    latency: Latency
    backlog: Backlog
    items: list[LiveItem]
    providers: list[ProviderOut]
    sms: dict[str, int]
    invariants: AuditOut | None = Field(
        description="sums only; `…/audit` compares every ticket. null: not looked at yet"
    )


@dataclass
class _Sample:
    at: float
    joined: int
    served: int
    reserved: int
    paid: int


@dataclass
class _Watched:
    asked_at: float
    made_at: float = 0.0
    document: dict[str, Any] | None = None
    samples: deque[_Sample] = field(default_factory=lambda: deque(maxlen=64))
    audit: Audit | None = None
    audited_at: float = 0.0
    audit_task: asyncio.Task[None] | None = None


class Watch:
    """Looks at each watched sale once a second, for all who watch it. Started by the office's lifespan."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.streams = 0
        self._sales: dict[str, _Watched] = {}

    async def run(self) -> None:
        """Keep the documents of watched sales fresh, until cancelled."""
        while True:
            began = time.monotonic()
            for sale_id, watched in list(self._sales.items()):
                if began - watched.asked_at > FORGET_AFTER_S:
                    del self._sales[sale_id]
                    continue
                try:
                    await self._look(sale_id, watched)
                except (FairdropError, SQLAlchemyError, OSError) as error:
                    _log.debug("live_look_failed", sale=sale_id, error=repr(error))  # who asks is told so
                except Exception:  # noqa: BLE001 - what nobody thought of: the other sales are watched on
                    _log.exception("live_look_broken", sale=sale_id)
            await asyncio.sleep(max(0.05, EVERY_S - (time.monotonic() - began)))

    async def document(self, sale_id: str) -> dict[str, Any]:
        """The sale as of at most a second ago. Refusal: no such sale, or a draft."""
        now = time.monotonic()
        watched = self._sales.get(sale_id)
        if watched is None:
            watched = _Watched(now)
            document = await self._look(sale_id, watched)
            self._sales[sale_id] = watched  # only what exists is watched
            return document
        watched.asked_at = now
        if watched.document is None or now - watched.made_at > 1.5 * EVERY_S:
            return await self._look(sale_id, watched)
        return watched.document

    async def _look(self, sale_id: str, watched: _Watched) -> dict[str, Any]:
        async with self.desk.turns.turn(f"live\0{sale_id}"):
            if watched.document is not None and time.monotonic() - watched.made_at < EVERY_S / 2:
                return watched.document
            document = await make(self.desk, sale_id, watched)
            watched.document, watched.made_at = document, time.monotonic()
        if watched.audit_task is None and time.monotonic() - watched.audited_at > AUDIT_EVERY_S:
            watched.audit_task = asyncio.create_task(self._audit(sale_id, watched))
        return document

    async def _audit(self, sale_id: str, watched: _Watched) -> None:
        try:
            watched.audit = await audit.run(self.desk.engine, self.desk.link, sale_id, deep=False)
        except (FairdropError, SQLAlchemyError, OSError) as error:
            _log.warning("live_audit_failed", sale=sale_id, error=repr(error))
        finally:
            watched.audited_at, watched.audit_task = time.monotonic(), None


def watch_of(request: Request) -> Watch:
    watch: Watch = request.app.state.watch
    return watch


TheWatch = Annotated[Watch, Depends(watch_of)]


def state_word(sale: Sale, now_ms: int, units_left: int) -> str:
    """The state that people see: by the clock and the stock where the operator's word leaves it open."""
    if sale.state in ("closed", "settled", "draft"):
        return sale.state
    if now_ms >= to_ms(sale.closes_at):
        return "closed"
    if sale.state == "paused":
        return "paused"
    if now_ms >= to_ms(sale.opens_at):
        return "sold_out" if units_left == 0 else "open"
    return "line_open" if now_ms >= to_ms(sale.line_opens_at) else "scheduled"


async def make(desk: Desk, sale_id: str, watched: _Watched) -> dict[str, Any]:
    """Read both stores and put the document together."""
    async with reading(desk) as conn:
        sale = await sales.get(conn, sale_id)
        if sale is None:
            raise refuse("no_such_sale")
        if sale.state == "draft":
            raise refuse("not_published")
        tally = await sales.tally(conn, sale_id)
        texts = await sales.sms_tally(conn, sale_id)
        latency = await sales.latency(conn, sale_id, LATENCY_WINDOW_S)
        waiting_outbox = await outbox.backlog(conn)
    keys = SaleKeys(sale_id)
    asked: list[Sequence[str | int]] = [
        ("TIME",), ("HGETALL", keys.stock), ("HGET", keys.sale, "claims_open"), ("XLEN", keys.asks),
        ("HMGET", keys.sale, "advice_until_ms", "slow_milli", "slow_base_milli", "slow_reason", "notices"),
    ]  # fmt: skip
    for item in sale.items:
        asked += [
            ("HMGET", keys.item(item.sku), "next_seq", "served", "paused"),
            ("LLEN", keys.left(item.sku)),
        ]
    replies = await desk.link.pipeline(asked)
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    (seconds, micros), stock_flat, claims, asks, advice, *rest = replies
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    claimed = int(claims or 0)
    stock = dict(zip(stock_flat[::2], stock_flat[1::2], strict=True))

    def of_state(state: str, sku: str | None = None) -> int:
        chosen = tally.values() if sku is None else [tally.get(sku, {})]
        return sum(states.get(state, (0, 0))[0] for states in chosen)

    items: list[dict[str, Any]] = []
    for at, item in enumerate(sale.items):
        (next_seq, served_raw, paused), left = rest[2 * at], int(rest[2 * at + 1])
        joined, served = int(next_seq or 1) - 1, int(served_raw or 0)
        items.append(
            {
                "sku": item.sku,
                "title": item.title,
                "units": item.total,
                "units_left": int(stock.get(item.sku.encode(), 0)),
                "joined": joined,
                "waiting": max(0, joined - served),
                "served": served,
                "left": left,
                "reserved": item.reserved,
                "sold": item.sold,
                "paused": paused == b"1",
            }
        )
    total = {
        name: sum(one[name] for one in items)
        for name in ("units", "units_left", "joined", "waiting", "served")
    }
    ever_reserved = sum(count for states in tally.values() for count, _ in states.values())
    ever_paid = of_state("paid") + of_state("refunding")
    sample = _Sample(time.monotonic(), total["joined"], total["served"], ever_reserved, ever_paid)
    watched.samples.append(sample)
    while len(watched.samples) > 2 and sample.at - watched.samples[1].at > RATE_WINDOW_S:
        watched.samples.popleft()
    first = watched.samples[0]

    def per_s(name: str) -> float | None:
        took = sample.at - first.at
        if took < EVERY_S / 2:
            return None
        return round(max(0, float(getattr(sample, name) - getattr(first, name))) / took, 2)

    return {
        "sale": sale.id,
        "title": sale.title,
        "state": state_word(sale, now_ms, total["units_left"]),
        "now_at": format_ms(now_ms),
        "line_opens_at": format_time(sale.line_opens_at),
        "opens_at": format_time(sale.opens_at),
        "closes_at": format_time(sale.closes_at),
        "message": sale.message,
        "version": sale.version,
        **total,
        "claimed": claimed,
        **{
            name: of_state(name)
            for name in ("reserved", "paid", "expired", "cancelled", "refunding", "refunded")
        },
        "rates": {
            "join_per_s": per_s("joined"),
            "serve_per_s": per_s("served"),
            "reserve_per_s": per_s("reserved"),
            "pay_per_s": per_s("paid"),
            "limit_per_s": sale.rate_per_s,
        },
        **advised(advice, now_ms),
        "conversion": {
            "joined_to_reserved": _share(ever_reserved, total["joined"]),
            "reserved_to_paid": _share(ever_paid, ever_reserved),
        },
        "latency": latency,
        "backlog": {"orders": claimed, "asks": int(asks), "outbox": waiting_outbox},
        "items": items,
        "providers": [{**one, "history": one.get("history", [])[-3:]} for one in await breakers(desk)],
        "sms": {"due": 0, "sending": 0, "sent": 0, "failed": 0, "unknown": 0, "dropped": 0, **texts},
        "invariants": None if watched.audit is None else watched.audit.shown(),
    }


def advised(advice: Sequence[bytes | None], now_ms: int) -> dict[str, Any]:
    """`slowdown` and `notices` from the sale's own fields; what was not repeated in time is over."""
    until, slow, base, reason, notices = (value or b"" for value in advice)
    if now_ms >= int(until or 0):
        return {"slowdown": None, "notices": []}
    slowdown = None
    if int(slow or -1) >= 0:
        slowdown = {
            "reason": reason.decode(),
            "rate_per_s": int(slow) / 1000,
            "from_per_s": int(base) / 1000,
            "until_at": format_ms(int(until)),
        }
    return {"slowdown": slowdown, "notices": [word for word in notices.decode().split(",") if word]}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


# ---- routes ---------------------------------------------------------------------------------------------------------

READ = refusals("auth_missing", "no_such_sale", "not_published", "invalid", "busy")


@router.get(OF_SALE + "/live", response_model=LiveOut, responses=READ, summary="How a sale is doing")
async def live(sale: SalePath, watch: TheWatch, operator: Viewer, response: Response) -> dict[str, Any]:
    """One document, at most a second old. `…/live/events` streams the same."""
    response.headers["Cache-Control"] = "no-store"
    return await watch.document(sale)


@router.get(
    OF_SALE + "/live/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **READ},
    summary="The same once a second (Server-Sent Events, event `live`)",
)
async def live_events(sale: SalePath, desk: TheDesk, watch: TheWatch, operator: Viewer) -> Response:
    if watch.streams >= STREAMS_MAX or desk.draining:
        raise refuse("busy", "Too many streams; poll instead.", retry_after_s=5)
    first = await watch.document(sale)

    async def stream() -> AsyncIterator[bytes]:
        watch.streams += 1
        checked_at = time.monotonic()
        document: dict[str, Any] | None = first
        try:
            yield b"retry: 2000\n\n"
            while not desk.draining:
                if document is not None:
                    yield b"event: live\ndata: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"
                else:
                    yield b": a store does not answer\n\n"
                await asyncio.sleep(EVERY_S)
                if time.monotonic() - checked_at > KEY_CHECK_EVERY_S:
                    async with desk.engine.connect() as conn:
                        if not await operators.works(conn, operator.id):
                            return
                    checked_at = time.monotonic()
                try:
                    document = await watch.document(sale)
                except (DidNotHappen, Unknown):
                    document = None
        finally:
            watch.streams -= 1

    return StreamingResponse(
        stream(),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.get(
    OF_SALE + "/audit", response_model=AuditOut, responses=READ, summary="The invariants, with both sides"
)
async def audit_sale(sale: SalePath, desk: TheDesk, operator: Viewer, response: Response) -> dict[str, Any]:
    """Stock, orders and money, compared ticket by ticket; the names are explained in `app/repair/audit.py`."""
    response.headers["Cache-Control"] = "no-store"
    # One at a time: it reads every order.
    async with desk.turns.turn("audit"):
        found = await audit.run(desk.engine, desk.link, sale)
    if found is None:
        async with reading(desk) as conn:
            if await sales.get(conn, sale) is None:
                raise refuse("no_such_sale")
        raise refuse("not_published")
    return found.shown()
