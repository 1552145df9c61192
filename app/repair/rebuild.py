"""A sale whose Redis was lost, rolled back or replaced is made anew from Postgres, in a new epoch.

fence    what is left of the sale in this Redis answers OLD from now on
drain    claims that this Redis still holds become orders, as far as Postgres has the units
begin    one transaction: the next epoch, what is available, which orders live (app/ledger/rebuilding.py)
load     tickets and statuses of all orders are written while the sale's own hash is missing
open     stock, lines and the hash are written in one step; front doors see the sale at their next look

A crash in between leaves the sale shut, and the next rebuild begins again. Orders keep their tickets, with the seq they
had; whoever waited, or was claimed and not yet written, is told `lapsed` and may join again. Nothing is oversold:
stock is what Postgres has free, and every claim of before is of an epoch that confirm refuses.

Two servers may each believe to be the sale's Redis (a partition). Claims made in the one that lost are never confirmed.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import asyncpg
import structlog
from prometheus_client import Counter as Count
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.answers import (
    Already,
    Fenced,
    Gone,
    Other,
    Rebuilt,
)
from app.errors import DidNotHappen
from app.keys import SaleKeys
from app.ledger import journal, orders, payments, rebuilding, sales, sms
from app.ledger.engine import alone, create_engine, sqlstate_of
from app.ledger.rebuilding import NewEpoch
from app.ledger.sales import Sale
from app.purchase.confirm import Confirmer, claims_of, cut
from app.purchase.told import status_json
from app.redis import reading
from app.redis.link import Link
from app.sale.publish import announce, publish_fields
from app.scripts import Scripts
from app.settings import Settings
from app.texts import still_true

PAGE = 2_000  # orders written in one round trip
OUTCOME_CHUNK = 1 << 20  # bytes of `outcome` in one command
STATEMENT_S = 60.0  # the transaction touches every live order of the sale
DEADLOCK = (asyncpg.DeadlockDetectedError.sqlstate, asyncpg.SerializationError.sqlstate)
TRIES_MAX = 5  # of the transaction, when it meets a deadlock

REBUILDS = Count("fairdrop_rebuilds", "sales made anew from Postgres, by how it ended", ["outcome"])
_log = structlog.get_logger("rebuild")

Row = dict[str, Any]


class NotNow(DidNotHappen):
    """The sale cannot be rebuilt now; str(error) says why."""


@dataclass(frozen=True)
class Report:
    """What a rebuild has done. seconds: from the fence to the opening; steps: how much of them each step took."""

    sale: str
    epoch: int
    claims_drained: int
    orders_live: int
    orders_ended: int
    units_left: dict[str, int]
    outbox_dropped: int
    seconds: float
    steps: dict[str, float]


class _Watch:
    """Seconds by step, in order."""

    def __init__(self) -> None:
        self.began = self._last = time.monotonic()
        self.steps: dict[str, float] = {}

    def done(self, step: str) -> None:
        now = time.monotonic()
        self.steps[step] = round(now - self._last, 3)
        self._last = now


async def rebuild(
    settings: Settings, link: Link, scripts: Scripts, sale_id: str, *, actor: str, reason: str
) -> Report | None:
    """Make a sale anew in the Redis of this link. None: another process is doing it.

    NotNow: there is nothing to rebuild, or Redis knows more than Postgres. DidNotHappen, Unknown, or what Postgres
    raises: the sale stays shut; do it again. actor and reason go into the journal.
    """
    watch = _Watch()
    engine = create_engine(
        settings.model_copy(update={"database_deadline_s": STATEMENT_S}), name="rebuild", pool=3
    )
    try:
        async with rebuilding.alone_with(engine, sale_id) as held:
            if not held:
                return None
            watch.done("connect")
            drained = await _shut_and_drain(engine, link, scripts, settings, sale_id)
            watch.done("drain")
            begun = await _begin(engine, sale_id)
            watch.done("begin")
            async with alone(engine) as conn:
                sale = await sales.get(conn, sale_id)
            assert sale is not None
            ended = await _load(engine, link, sale, begun)
            watch.done("load")
            await _open(link, scripts, sale, begun)
            watch.done("open")
            report = Report(
                sale_id, begun.epoch, drained, len(begun.live), ended,
                {item.sku: item.available for item in begun.items}, begun.dropped,
                round(time.monotonic() - watch.began, 3), watch.steps,
            )  # fmt: skip
            home = link.home_of(SaleKeys(sale_id).sale)
            async with engine.begin() as conn:
                if not await rebuilding.finish(conn, sale_id, begun.epoch, home):
                    raise DidNotHappen(f"another rebuild of {sale_id} has overtaken this one")
                await journal.append(
                    conn, actor=actor, role="system", action="sale.rebuild", sale=sale_id, reason=reason,
                    detail=asdict(report) | {"home": home},
                )  # fmt: skip
            await announce(link, sale)
    except BaseException:
        REBUILDS.labels("failed").inc()
        raise
    finally:
        await engine.dispose()
    REBUILDS.labels("done").inc()
    _log.warning("sale rebuilt", **asdict(report), reason=reason)
    return report


async def _shut_and_drain(
    engine: AsyncEngine, link: Link, scripts: Scripts, settings: Settings, sale_id: str
) -> int:
    """Fence the sale, and let Postgres judge every claim that this Redis holds. Returns how many there were."""
    async with alone(engine) as conn:
        sale = await sales.get(conn, sale_id)
    if sale is None or sale.state in ("draft", "settled"):
        raise NotNow(f"{sale_id} is {'no sale' if sale is None else sale.state}: there is nothing to rebuild")
    match await scripts.sale_fence(sale=sale_id, epoch=sale.epoch):
        case Gone():
            return 0
        case Fenced():
            pass
        case Other(epoch):
            raise NotNow(
                f"Redis knows epoch {epoch} of {sale_id} and Postgres only {sale.epoch}: this Postgres has lost writes"
            )
    confirmer = Confirmer(engine, link, scripts, settings)
    drained = 0
    async for page in reading.pieces(link, SaleKeys(sale_id).orders, pairs_max=sys.maxsize):
        for entries in cut(page, PAGE):
            await confirmer.confirm(sale_id, entries, careful=True)  # nobody is told: the fence is shut
            drained += claims_of(entries)
    return drained


async def _begin(engine: AsyncEngine, sale_id: str) -> NewEpoch:
    for _ in range(TRIES_MAX):
        try:
            async with engine.begin() as conn:
                begun = await rebuilding.begin(conn, sale_id)
        except DBAPIError as error:
            if sqlstate_of(error) not in DEADLOCK:
                raise
            continue
        if begun is None:
            raise NotNow(f"{sale_id} was settled meanwhile")
        return begun
    raise DidNotHappen(f"the orders of {sale_id} do not stand still")


async def _load(engine: AsyncEngine, link: Link, sale: Sale, begun: NewEpoch) -> int:
    """Write what every order's ticket is told. Returns how many orders had ended."""
    k = SaleKeys(sale.id)
    skus = [item.sku for item in begun.items]
    gone = [k.sale, k.buyers, k.status, k.orders, k.asks, k.stock]
    for sku in skus:
        gone += (k.item(sku), k.line(sku), k.outcome(sku), k.drawn(sku), k.left(sku))
    await link.call("UNLINK", *gone)  # contacts stay: those who waited may join again
    outcomes = {item.sku: bytearray(item.first_seq - 1) for item in begun.items}
    ended = 0
    live = {row["order_no"] for row in begun.live}
    async with alone(engine) as conn:
        async for page in rebuilding.ended_orders(conn, sale.id, PAGE):
            rows = [
                row for row in page if row["order_no"] not in live
            ]  # one ended since: as it was, its release is due
            await _write(engine, link, k, rows, outcomes)
            ended += len(rows)
    for at in range(0, len(begun.live), PAGE):
        await _write(engine, link, k, begun.live[at : at + PAGE], outcomes)
    for sku, bytes_ in outcomes.items():
        for at in range(0, len(bytes_), OUTCOME_CHUNK):
            await link.call("SETRANGE", k.outcome(sku), at, bytes(bytes_[at : at + OUTCOME_CHUNK]))
    return ended


async def _write(
    engine: AsyncEngine, link: Link, k: SaleKeys, rows: Sequence[Row], outcomes: dict[str, bytearray]
) -> None:
    """One page of orders: ticket bytes, statuses, and whose newest ticket it is (later pages win)."""
    if not rows:
        return
    numbers = [row["order_no"] for row in rows]
    async with alone(engine) as conn:
        lines = await orders.lines(conn, numbers)
        attempts = await payments.newest_attempts(conn, numbers)
        texts = await sms.shown(conn, numbers)
    buyers: list[str | bytes] = []
    statuses: list[str | bytes] = []
    for row in sorted(rows, key=lambda row: row["reserved_at"]):
        number, byte = row["order_no"], orders.byte_of(row)
        said = still_true(texts.get(number, {}), row["state"])
        told = status_json(row, lines.get(number, []), attempts.get(number), said)
        ticket = f"{row['sku']}:{row['seq']}"
        outcomes[row["sku"]][row["seq"] - 1] = ord(byte)
        buyers += (row["buyer_id"].encode(), f"{ticket}:{row['units']}")
        statuses += (ticket, b"%d|%b|%b" % (row["version"], byte.encode(), told))
    _done(await link.pipeline([("HSET", k.buyers, *buyers), ("HSET", k.status, *statuses)]))


def _done(replies: Iterable[Any]) -> None:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


async def _open(link: Link, scripts: Scripts, sale: Sale, begun: NewEpoch) -> None:
    assert sale.seed is not None, "a published sale has a seed"
    if sale.epoch != begun.epoch:
        raise DidNotHappen(f"another rebuild of {sale.id} has overtaken this one")
    beacon = {"beacon_value": sale.beacon_value} if sale.beacon_value else {}
    answer = await scripts.sale_rebuild(
        sale=sale.id,
        fields=publish_fields(sale) | beacon,
        items=[
            (
                item.sku,
                item.available,
                item.first_seq,
                ",".join(f"{epoch}:{seq}" for epoch, seq in item.starts),
                item.paused,
            )
            for item in begun.items
        ],
        seed_hash=hashlib.sha256(sale.seed).hexdigest(),
    )
    match answer:
        case Rebuilt() | Already():
            pass
        case Other(epoch):
            raise DidNotHappen(f"Redis holds epoch {epoch} of {sale.id} by now")
