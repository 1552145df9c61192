"""From Postgres to Redis: a sale goes live, its switches turn, its stock grows and shrinks. Live on every front door.

Order of writes (purchase-path.md): giving and switching is Postgres first, then the outbox tells Redis; taking units
away is Redis first. Every step here may be repeated: scripts refuse an older version and know each top-up's id.
What the office has committed it tells Redis at once; if it dies in between, the worker's relay does (switch,
stock_add), or `finish_half_done` of any office (publish, negative top-up).
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, assert_never

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app import keys
from app.alarm import alert
from app.answers import (
    Added,
    Already,
    AlreadyUnits,
    ClosedForGood,
    Gone,
    Leftover,
    Old,
    Other,
    Published,
    Short,
    Stale,
    Switched,
)
from app.errors import DidNotHappen, Unknown
from app.ledger import journal, outbox, sales
from app.ledger.sales import Intent, Sale
from app.redis.link import Link
from app.sale.document import ItemTerms, Terms, format_time, to_ms
from app.scripts import Scripts
from app.settings import Settings

BURST_S = 0.5  # s of the admission rate that a gap between two ticks may save up; more would be a rush
HALF_DONE_AFTER_S = 5.0  # a request that is alive is done by then (Redis' and Postgres' deadlines)
HALF_DONE_MAX = 20  # taken up in one look
_log = structlog.get_logger("publish")


def terms_of(sale: Sale) -> Terms:
    """A stored sale as the document it came from."""
    return Terms(
        id=sale.id,
        title=sale.title,
        time_zone=sale.time_zone,
        line_opens_at=sale.line_opens_at,
        opens_at=sale.opens_at,
        closes_at=sale.closes_at,
        draw_freeze_s=sale.draw_freeze_s,
        beacon=sale.beacon,
        beacon_wait_s=sale.beacon_wait_s,
        pay_within_s=sale.pay_within_s,
        limit_per_buyer=sale.limit_per_buyer,
        rate_per_s=sale.rate_per_s,
        standby=sale.standby,
        line_max=sale.line_max,
        pass_mode=sale.pass_mode,  # type: ignore[arg-type]
        challenge=sale.challenge,  # type: ignore[arg-type]
        audience=None if sale.audience is None else tuple(sale.audience),
        channels=tuple(sale.channels),
        default_channel=sale.default_channel,
        return_urls=tuple(sale.return_urls),
        items=tuple(ItemTerms(i.sku, i.title, i.price_minor, i.currency, i.total) for i in sale.items),
        copy_of=sale.copy_of,
    )


def public_doc(sale: Sale) -> str:
    """The facts that anyone may read, as the front doors serve them."""
    return json.dumps(
        {
            "title": sale.title,
            "items": [
                {
                    "sku": i.sku,
                    "title": i.title,
                    "price_minor": i.price_minor,
                    "currency": i.currency,
                    "units": i.total,
                }
                for i in sale.items
            ],
            "limit": sale.limit_per_buyer,
            "standby": sale.standby,
            "pass": sale.pass_mode,
            "challenge": sale.challenge,
            "audience": sale.audience,
            "channels": sale.channels,
            "default_channel": sale.default_channel,
            "return_urls": sale.return_urls,
            "pay_within_s": sale.pay_within_s,
            "beacon": sale.beacon,
            "draw_freeze_s": sale.draw_freeze_s,
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def event_data(sale: Sale, **more: Any) -> dict[str, Any]:
    """`data` of a sale's events."""
    return {
        "sale": sale.id,
        "title": sale.title,
        "state": sale.state,
        "line_opens_at": format_time(sale.line_opens_at),
        "opens_at": format_time(sale.opens_at),
        "closes_at": format_time(sale.closes_at),
        **more,
    }


def switch_fields(sale: Sale) -> dict[str, str]:
    """Every field of `sale` in Redis that may change after publish. Always all of them: the newest version wins whole,
    so that two changes may arrive in any order."""
    ended = sale.state in ("closed", "settled")
    rate_milli = -1 if sale.rate_per_s is None else max(1, round(sale.rate_per_s * 1000))
    burst = 1 if sale.rate_per_s is None else max(1, math.ceil(sale.rate_per_s * BURST_S))
    return {
        "state_word": "closed" if ended else sale.state,
        "paused": "1" if sale.state == "paused" else "0",
        "closed": "1" if ended else "0",
        "line_opens_ms": str(to_ms(sale.line_opens_at)),
        "opens_ms": str(to_ms(sale.opens_at)),
        "closes_ms": str(to_ms(sale.closes_at)),
        "freeze_ms": str(to_ms(sale.opens_at) - sale.draw_freeze_s * 1000),
        "rate_milli": str(rate_milli),
        "burst": str(burst),
        "line_max": str(sale.line_max),
        "standby": "1" if sale.standby else "0",
        "doc": public_doc(sale),
        "message": sale.message or "",
    }


def publish_fields(sale: Sale) -> dict[str, str | int | bytes]:
    """What sale_publish needs."""
    assert sale.seed is not None, "a published sale has a seed"
    return {
        **switch_fields(sale),
        "epoch": sale.epoch,
        "version": sale.version,
        "beacon_source": sale.beacon,
        "beacon_wait_ms": sale.beacon_wait_s * 1000,
        "limit": sale.limit_per_buyer,
        "seed": sale.seed.hex(),
        "items": ",".join(item.sku for item in sale.items),
    }


async def announce(link: Link, sale: Sale, *, ended: bool = False) -> None:
    """Make every front door watch the sale from its next look (100 ms) on."""
    await link.call("HSET", keys.SALES, sale.id, json.dumps({"version": sale.version, "ended": ended}))


async def go_live(conn: AsyncConnection, link: Link, scripts: Scripts, sale: Sale) -> None:
    """A sale that Postgres calls published becomes known to Redis and to the front doors.

    `conn` has no transaction open.     DidNotHappen, Unknown: repeat; `finish_half_done` does.
    """
    assert sale.seed is not None
    answer = await scripts.sale_publish(
        sale=sale.id,
        fields=publish_fields(sale),
        items=[(item.sku, item.available) for item in sale.items],
        seed_hash=hashlib.sha256(sale.seed).hexdigest(),
    )
    match answer:
        case Published() | Already():
            pass
        case Other() | Leftover():
            # An id is never used again, so these keys are of a lost past: a person must look before units exist twice.
            alert(
                "publish_refused",
                "Redis holds keys of this sale that Postgres does not know of",
                sale=sale.id,
            )
            raise DidNotHappen(f"Redis holds other keys of {sale.id}")
        case _:
            assert_never(answer)
    if isinstance(answer, Already):
        # It was switched meanwhile, or the first answer was lost: bring the fields up to date.
        await switch(link, scripts, sale, announced=False)
    await announce(link, sale)
    async with conn.begin():
        await sales.set_home(conn, sale.id, link.home_of(keys.SaleKeys(sale.id).sale))


async def switch(link: Link, scripts: Scripts, sale: Sale, *, announced: bool = True) -> None:
    """Tell Redis what a published sale is now; an older version than the one it knows changes nothing."""
    answer = await scripts.sale_switch(
        sale=sale.id, epoch=sale.epoch, version=sale.version, changes=switch_fields(sale)
    )
    match answer:
        case Switched() | Stale() | ClosedForGood():
            pass
        case Gone() | Old():
            raise DidNotHappen(f"this Redis is not the home of {sale.id} (yet, or any more)")
        case _:
            assert_never(answer)
    if announced:
        await announce(link, sale, ended=sale.state == "settled")


async def add_stock(
    settings: Settings, scripts: Scripts, sale: Sale, sku: str, units: int, top_up_id: str
) -> None:
    """Units that Postgres has added reach Redis, once for each id; a standby line is served with them."""
    answer = await _stock_add(settings, scripts, sale.id, sale.epoch, sku, units, top_up_id)
    match answer:
        case Added() | AlreadyUnits():
            return
        case Short():
            raise AssertionError("adding units cannot fall short")
        case Gone() | Old():
            raise DidNotHappen(f"this Redis is not the home of {sale.id} (yet, or any more)")
        case _:
            assert_never(answer)


async def take_stock(
    settings: Settings, scripts: Scripts, sale_id: str, epoch: int, sku: str, units: int, take_id: str
) -> int | None:
    """Take unsold units (negative) out of Redis, once for each id. None: taken; else how many there are to take."""
    answer = await _stock_add(settings, scripts, sale_id, epoch, sku, units, take_id)
    match answer:
        case Added() | AlreadyUnits():
            return None
        case Short(units_left):
            return units_left
        case Gone() | Old():
            raise DidNotHappen(f"this Redis is not the home of {sale_id} (yet, or any more)")
        case _:
            assert_never(answer)


async def _stock_add(
    settings: Settings, scripts: Scripts, sale_id: str, epoch: int, sku: str, units: int, top_up_id: str
) -> Gone | Old | Added | AlreadyUnits | Short:
    return await scripts.stock_add(
        sale=sale_id,
        epoch=epoch,
        sku=sku,
        units=units,
        id=top_up_id,
        work_max=settings.line_serve_max,
        backlog_max=settings.orders_backlog_max,
    )


async def settle_take(conn: AsyncConnection, sale_id: str, sku: str, units: int, intent_id: int) -> bool:
    """Lower Postgres' total by what Redis has given up, once. False: somebody else has done it.

    Refused by Postgres (it would fall below what is owned) the units stay out of Redis: undersold, with an alert.
    """
    if not await sales.close_intent(conn, intent_id, "done"):
        return False
    if await sales.add_units(conn, sale_id, sku, units) is None:
        alert("take_refused", "Redis gave up units that Postgres counts as owned", sale=sale_id, sku=sku)
    await sales.change(conn, sale_id, {})
    return True


async def finish_half_done(engine: AsyncEngine, link: Link, scripts: Scripts, settings: Settings) -> int:
    """Finish what an office began and did not live to finish: publishes and negative top-ups. Returns how many."""
    async with engine.connect() as conn:
        unannounced = await sales.unannounced(conn, HALF_DONE_AFTER_S, HALF_DONE_MAX)
        intents = await sales.intents(conn, HALF_DONE_AFTER_S, HALF_DONE_MAX)
    finished = 0
    for sale_id in unannounced:
        async with engine.connect() as conn:
            sale = await sales.get(conn, sale_id)
            await conn.commit()
            if sale is not None:
                await go_live(conn, link, scripts, sale)
                finished += 1
    for intent in intents:
        finished += await _finish_take(engine, link, scripts, settings, intent)
    return finished


async def _finish_take(
    engine: AsyncEngine, link: Link, scripts: Scripts, settings: Settings, intent: Intent
) -> bool:
    async with engine.connect() as conn:
        sale = await sales.get(conn, intent.sale)
    if sale is None or sale.epoch != intent.epoch:
        # A rebuild has read Postgres' total, which was never lowered: there is nothing to take any more.
        async with engine.begin() as conn:
            return await sales.close_intent(conn, intent.row_id, "dropped")
    left = await take_stock(
        settings, scripts, sale.id, intent.epoch, intent.sku, intent.units, intent.take_id
    )
    async with engine.begin() as conn:
        if left is not None:
            return await sales.close_intent(conn, intent.row_id, "dropped")
        await sales.get(conn, sale.id, lock=True)
        if not await settle_take(conn, sale.id, intent.sku, intent.units, intent.row_id):
            return False
        sale = await sales.get(conn, sale.id)
        assert sale is not None
        row_id = await outbox.put(
            conn, "switch", sale.id, sale.epoch, {"version": sale.version, "changes": switch_fields(sale)}
        )
        await journal.append(
            conn,
            actor=intent.actor,
            role=intent.role,
            action="sale.top_up",
            sale=sale.id,
            reason=intent.reason,
            detail={"sku": intent.sku, "units": intent.units, "id": intent.take_id, "finished_later": True},
        )
    try:
        await switch(link, scripts, sale)
    except (DidNotHappen, Unknown):
        return True  # the relay tells it
    async with engine.begin() as conn:
        await outbox.close(conn, [(row_id, 0)], "done")
    return True
