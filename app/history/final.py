"""The end of a history: what Redis and Postgres hold of one sale once everything has come to rest.

Redis is read in one transaction inside Postgres' snapshot, as the audit does; at rest nothing moves, so the two agree
on a moment. `at_rest` waits for that, and says when the stores began to agree.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from app.errors import DidNotHappen, Unknown
from app.keys import GROUP, SaleKeys
from app.ledger import books
from app.ledger import engine as engines
from app.ledger.whole import whole
from app.providers.sandbox_ledger import Ledger
from app.purchase.confirm import claims_of
from app.record import (
    Attempt,
    Buried,
    Capture,
    Inbox,
    Item,
    Line,
    Order,
    Recorder,
    Refused,
    Sale,
    Stream,
    Ticket,
)
from app.redis import reading
from app.redis.cluster import open_link
from app.redis.link import Link
from app.settings import Settings

LOOK_EVERY_S = 0.2
REDIS_DEADLINE_S = 15.0  # one transaction reads a whole sale


async def finish(
    record: Recorder,
    sale_id: str,
    *,
    redis_url: str,
    database_url: str,
    supplier: Path | None,
    within_s: float,
    connected_within_s: float = 30.0,
) -> bool:
    """Wait until the sale is at rest, and end the record with what both stores and the supplier's ledger hold.

    False: it never came to rest. DidNotHappen, Unknown, LookupError: a store does not answer, or has no such sale.
    """
    settings = Settings(database_url=database_url, database_pool=2)
    database = engines.create_engine(settings, name="fairdrop history")
    link = open_link(redis_url, deadline_s=REDIS_DEADLINE_S, name="history")
    try:
        await link.start()
        for _ in range(int(connected_within_s / LOOK_EVERY_S)):
            if link.connected:
                break
            await asyncio.sleep(LOOK_EVERY_S)
        rested, last = await at_rest(database, link, sale_id, within_s=within_s)
        if rested:
            record.mark("agreed", last and f"waited last for {last}")
        record.mark("drained", "" if rested else f"not at rest: {last}")
        record.add_all(await final(database, link, sale_id, at=record.clock()))
    finally:
        await link.close()
        await database.dispose()
    record.add_all(Ledger(supplier).read())
    return rested


async def final(engine: AsyncEngine, link: Link, sale_id: str, *, at: float) -> list[Line]:
    """Every row of one sale in both stores, as lines. at: the recorder's time.

    LookupError: Postgres has no such sale. DidNotHappen, Unknown: Redis is out of reach.
    """
    async with engine.connect() as conn:
        await conn.execution_options(isolation_level="REPEATABLE READ")
        async with conn.begin():
            rows = await whole(conn, sale_id)
            if not rows["sale"]:
                raise LookupError(f"Postgres has no sale {sale_id}")
            item_books = await books.items(conn, sale_id)
            redis = await _read_redis(link, sale_id, list(item_books))
    return _lines(rows, item_books, redis, link.home_of(SaleKeys(sale_id).sale), at)


async def at_rest(engine: AsyncEngine, link: Link, sale_id: str, *, within_s: float) -> tuple[bool, str]:
    """Wait until nothing of the sale is under way: no claim, ask, outbox row, unfinished order or refund.

    Returns whether it came to rest, and what was the last that was under way. False: something still was after
    `within_s`; the history is judged as it is.
    """
    deadline = time.monotonic() + within_s
    keys = SaleKeys(sale_id)
    last = ""
    while True:
        try:
            backlog, asks = await link.pipeline([("XLEN", keys.orders), ("XLEN", keys.asks)])
            async with engine.connect() as conn:
                busy = await books.under_way(conn, sale_id)
        except Exception as error:
            if time.monotonic() > deadline or not (isinstance(error, Unknown) or engines.passes(error)):
                raise  # on a machine that has too much to do one look in vain says nothing
        else:
            busy = {name: count for name, count in {"claims": backlog, "asks": asks, **busy}.items() if count}
            if not busy:
                return True, last
            last = ", ".join(f"{name} {count}" for name, count in busy.items())
            if time.monotonic() > deadline:
                return False, last
        await asyncio.sleep(LOOK_EVERY_S)


# --- Redis -----------------------------------------------------------------------------------------------------------


class _Redis:
    """What was read, by name."""

    def __init__(self, sale: dict[str, str], stock: dict[str, str], status: dict[str, str]) -> None:
        self.sale, self.stock, self.status = sale, stock, status
        self.items: dict[str, dict[str, str]] = {}
        self.outcome: dict[str, str] = {}
        self.left: dict[str, list[int]] = {}
        self.drawn: dict[str, str] = {}
        self.streams: list[Stream] = []


def _pairs(flat: Sequence[bytes]) -> dict[str, str]:
    text = [value.decode("utf-8", "replace") for value in flat]
    return dict(zip(text[::2], text[1::2], strict=True))


async def _read_redis(link: Link, sale_id: str, skus: Sequence[str]) -> _Redis:
    keys = SaleKeys(sale_id)
    asked: list[Sequence[str | int]] = [
        ("MULTI",),
        ("HGETALL", keys.sale),
        ("HGETALL", keys.stock),
        ("HGETALL", keys.status),
    ]
    for sku in skus:
        asked += [
            ("HGETALL", keys.item(sku)),
            ("GET", keys.outcome(sku)),
            ("LRANGE", keys.left(sku), 0, -1),
            ("GET", keys.drawn(sku)),
        ]
    answers = await link.pipeline([*asked, ("EXEC",)])
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    facts, stock, status, *rest = answers[-1]
    redis = _Redis(_pairs(facts), _pairs(stock), _pairs(status))
    for at, sku in enumerate(skus):
        item, outcome, left, drawn = rest[at * 4 : at * 4 + 4]
        redis.items[sku] = _pairs(item)
        redis.outcome[sku] = (outcome or b"").decode("latin-1").replace("\0", ".")
        redis.left[sku] = [int(seq) for seq in left]
        redis.drawn[sku] = (drawn or b"").hex()
    claims = 0
    async for page in reading.pieces(link, keys.orders, pairs_max=sys.maxsize):
        claims += claims_of(page)
    made, open_ = (int(redis.sale.get(name, 0)) for name in ("claims_made", "claims_open"))
    orders = await _stream(link, "orders", keys.orders)
    redis.streams.append(msgspec.structs.replace(orders, added=made, length=claims, open=open_))
    redis.streams.append(await _stream(link, "asks", keys.asks))
    return redis


async def _stream(link: Link, name: str, key: str) -> Stream:
    """Of a stream that is gone: nothing added, nothing there."""
    try:
        info = await link.call("XINFO", "STREAM", key)
        groups = await link.call("XINFO", "GROUPS", key)
    except DidNotHappen:
        return Stream(name=name, added=0, length=0, pending=0)
    facts = dict(zip(info[::2], info[1::2], strict=True))
    pending = 0
    for group in groups:
        of = dict(zip(group[::2], group[1::2], strict=True))
        if of[b"name"] == GROUP.encode():
            pending = int(of[b"pending"])
    return Stream(
        name=name, added=int(facts[b"entries-added"]), length=int(facts[b"length"]), pending=pending
    )


# --- lines -----------------------------------------------------------------------------------------------------------


def _lines(
    rows: dict[str, list[dict[str, Any]]],
    items: dict[str, books.ItemBooks],
    redis: _Redis,
    run_id: str,
    at: float,
) -> list[Line]:
    sale = rows["sale"][0]
    facts = redis.sale
    epoch = int(facts.get("epoch", 0))
    lines: list[Line] = [
        Sale(
            at=at,
            sale=sale["id"],
            state=sale["state"],
            epoch=sale["epoch"],
            limit=sale["limit_per_buyer"],
            standby=sale["standby"],
            held=epoch == sale["epoch"] and facts.get("home") == run_id,
            redis_epoch=epoch,
            seed=facts.get("seed", ""),
            seed_hash=facts.get("seed_hash", ""),
            beacon_source=facts.get("beacon_source", ""),
            beacon_value=facts.get("beacon_value", ""),
        )
    ]
    for sku, i in items.items():
        of = redis.items[sku]
        stock = redis.stock.get(sku)
        lines.append(
            Item(
                sku=sku,
                epoch=sale["epoch"],
                total=i.total,
                reserved=i.reserved,
                sold=i.sold,
                unapplied=i.unapplied,
                topped_up=i.topped_up,
                left=None if stock is None else int(stock),
                next_seq=int(of.get("next_seq", 1)),
                served=int(of.get("served", 0)),
                early=int(of.get("early", 0)),
                dead_seq=int(of.get("dead_seq", 0)),
                drawn=of.get("drawn") == "1",
                drawn_n=int(of.get("drawn_n") or 0),
                drawn_key=of.get("drawn_key", ""),
                beacon_used=of.get("beacon_used", ""),
                chain=of.get("chain", ""),
                outcome=redis.outcome[sku],
                left_seqs=redis.left[sku],
                drawn_hashes=redis.drawn[sku],
            )
        )
    lines += redis.streams
    for row in rows["orders"]:
        lines.append(
            Order(
                order_no=row["order_no"],
                sku=row["sku"],
                buyer=row["buyer_id"],
                epoch=row["epoch"],
                seq=row["seq"],
                units=row["units"],
                amount_minor=row["amount_minor"],
                currency=row["currency"],
                state=row["state"],
                version=row["version"],
                claimed_ms=row["claimed_ms"],
                reason=row["reason"] or "",
            )
        )
    for row in rows["refused"]:
        lines.append(Refused(buyer=row.pop("buyer_id"), **row))
    lines += [
        Buried(stream=row["stream"], entry=row["entry_id"], reason=row["reason"]) for row in rows["buried"]
    ]
    lines += [Attempt(id=row["id"], order=row["order_no"], state=row["state"]) for row in rows["attempts"]]
    lines += [
        Capture(
            ref=row["provider_ref"],
            order=row["order_no"],
            amount_minor=row["amount_minor"],
            state=row["state"],
        )
        for row in rows["captures"]
    ]
    lines += [Inbox(event=row["event_id"]) for row in rows["inbox"]]
    for name, value in redis.status.items():
        sku, _, seq = name.rpartition(":")
        version, _, rest = value.partition("|")
        if seq.isdigit() and version.isdigit():
            lines.append(Ticket(sku=sku, seq=int(seq), version=int(version), byte=rest[:1]))
    return lines
