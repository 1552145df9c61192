"""Do stock, orders and money agree? The invariants of purchase-path.md, each with both sides' numbers.

Names are stable; those of an item end with `:<sku>`, those of money with `:<currency>`.

    never_oversold:<sku>       reserved + sold                    ≤  total
    redis_within_postgres:<sku> units left in Redis               ≤  Postgres' available − unapplied
    units_add_up:<sku>         total                              =  left + in flight + unapplied + reserved + sold
    reserved_counted:<sku>     item.reserved                      =  units of reserved orders
    sold_counted:<sku>         item.sold                          =  units of paid orders (and refunded ones kept out)
    every_claim_decided:<sku>  tickets that were served a unit    =  orders + refused claims + claims in flight
    told_as_written:<sku>      orders                             =  orders whose ticket says the same in Redis
    top_ups_once:<sku>         top-ups that Redis applied         =  top-ups that Postgres has handed over
    one_live_order             live orders                        =  buyers who have one
    units_within_limit         most units of one buyer            ≤  limit_per_buyer
    lawful_states              orders                             =  orders whose times fit their state
    deadlines_fairly_extended  orders with an extended deadline   =  those extended in time, within their limit
    amounts_add_up             amounts of orders                  =  their lines and adjustments
    shop_is_told               orders                             =  orders with an order.reserved event
    paid_orders_have_money     paid orders                        =  paid orders with a capture
    one_capture_an_order       unrefunded captures                =  orders that have one
    money_agrees:<currency>    captures − refunds                 =  paid orders + money that is to go back
    journal_holds              rows of the journal's chain        =  rows that hold

`deep` compares ticket by ticket and recomputes the journal; without it (live page; each worker's Auditor, all the time)
only sums are compared.
Two stores cannot be read at one moment: the sums of Redis are read in one transaction inside Postgres' snapshot, what
is long (claims in flight, bytes of tickets) in pieces after it, as of that transaction. Where both keep moving, the
sides may differ by what moved during the reading, no more; a reading without movement is preferred.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Gauge
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.alarm import alert
from app.errors import DidNotHappen
from app.keys import SaleKeys
from app.ledger import books, journal, sales
from app.ledger.books import ItemBooks
from app.ledger.sales import Sale
from app.purchase.confirm import Claim, parse
from app.redis import reading
from app.redis.link import Link
from app.work.streams import Entry

TRIES = 5  # readings until two in a row find Postgres unmoved
TRY_EVERY_S = 0.05
SURE_AFTER = 3  # audits in a row: a sale is read while it goes on
BACKLOG_READ_MAX = 200_000  # claims in flight that are looked at: twice the default cap
STATES_PAGE = 5_000  # orders compared at once

HOLDS = Gauge(
    "fairdrop_invariant_holds", "1 while an invariant holds (see app/repair/audit.py)", ["sale", "name"]
)

# The ticket's byte that goes with an order's state.
_BYTES = {
    "reserved": b"r",
    "paid": b"p",
    "refunding": b"p",
    "expired": b"e",
    "cancelled": b"k",
    "refunded": b"f",
}
_SERVED = (b"c", b"r", b"p", b"e", b"k", b"f")  # and `l`, unless it left the line


@dataclass(frozen=True)
class Check:
    """One invariant: whether it holds, and both sides' numbers."""

    name: str
    ok: bool
    left: int
    right: int

    def shown(self) -> dict[str, Any]:
        return {"name": self.name, "ok": self.ok, "left": self.left, "right": self.right}


@dataclass(frozen=True)
class Audit:
    ok: bool
    checks: list[Check] = field(default_factory=list)

    def shown(self) -> dict[str, Any]:
        """As `GET /v1/admin/sales/{sale}/audit` answers it."""
        return {"ok": self.ok, "checks": [check.shown() for check in self.checks]}


@dataclass
class _RedisItem:
    left: int
    add: int  # units of all top-ups that were applied
    served: int | None  # tickets that ever got units; None: not looked at
    since: int  # tickets that were served or left while it was counted
    outcome: bytes


async def run(engine: AsyncEngine, link: Link, sale_id: str, *, deep: bool = True) -> Audit | None:
    """Audit one published sale. None: there is no such sale, or it is a draft.

    DidNotHappen, Unknown: Redis is out of reach, nothing can be said.
    """
    checks: list[Check] = []
    for attempt in range(TRIES):
        if attempt:
            await asyncio.sleep(TRY_EVERY_S)
        async with engine.connect() as conn:
            await conn.execution_options(isolation_level="REPEATABLE READ")
            async with conn.begin():
                sale = await sales.get(conn, sale_id)
                if sale is None or sale.state == "draft":
                    return None
                before = await books.items(conn, sale_id)
                redis = await _read_redis(link, sale, deep=deep)
                in_flight = await _in_flight(conn, sale, redis.claims) if redis else {}
                own = await _own_checks(conn, sale, before)
                told = await _told(conn, sale, redis, deep=deep) if redis else []
        async with engine.connect() as conn:
            after = await books.items(conn, sale_id)
        moved = {sku: abs(after[sku].moved - now.moved) if sku in after else 0 for sku, now in before.items()}
        checks = own + _cross_checks(before, redis, in_flight, moved) + told
        still = not any(moved.values()) and not (redis and any(item.since for item in redis.items.values()))
        if all(check.ok for check in checks) or (attempt and still):
            break
    if deep:
        async with engine.connect() as conn:
            chain = await journal.verify(conn)
        rows = chain.rows + (chain.broken_at is not None)
        checks.append(Check("journal_holds", chain.broken_at is None, rows, chain.rows))
    for check in checks:
        HOLDS.labels(sale_id, check.name).set(check.ok)
    return Audit(all(check.ok for check in checks), checks)


class Auditor:
    """Audits the sales that are going on, again and again: sums only. What does not hold is in the metric at once, and
    calls a person when it has not held SURE_AFTER times in a row."""

    def __init__(self, engine: AsyncEngine, link: Link, going_on: Callable[[], Iterable[str]]) -> None:
        self._engine, self._link, self._going_on = engine, link, going_on
        self._wrong: Counter[tuple[str, str]] = Counter()  # (sale, check) → times in a row

    async def turn(self) -> None:
        """One look at each. Unknown, SQLAlchemyError: a store does not answer, look again later."""
        for sale_id in list(self._going_on()):
            try:
                found = await run(self._engine, self._link, sale_id, deep=False)
            except DidNotHappen:
                continue  # another Redis, or one that is made anew: reconcile tells of it
            for check in found.checks if found is not None else ():
                at = sale_id, check.name
                self._wrong[at] = 0 if check.ok else self._wrong[at] + 1
                if self._wrong[at] == SURE_AFTER:
                    alert(
                        "invariant_broken",
                        "an invariant of a sale does not hold",
                        sale=sale_id,
                        check=check.name,
                        left=check.left,
                        right=check.right,
                    )


def _equal(name: str, left: int, right: int, slack: int = 0) -> Check:
    return Check(name, abs(left - right) <= slack, left, right)


def _at_most(name: str, left: int, right: int, slack: int = 0) -> Check:
    return Check(name, left <= right + slack, left, right)


async def _own_checks(conn: AsyncConnection, sale: Sale, items: dict[str, ItemBooks]) -> list[Check]:
    """What Postgres must say of itself, as of one moment: nothing may ever be off."""
    checks: list[Check] = []
    for sku, i in items.items():
        checks.append(_at_most(f"never_oversold:{sku}", i.reserved + i.sold, i.total))
        checks.append(_equal(f"reserved_counted:{sku}", i.reserved, i.reserved_units))
        checks.append(_equal(f"sold_counted:{sku}", i.sold, i.sold_units))
    b = await books.of_sale(conn, sale.id)
    checks += [
        _equal("one_live_order", b.live_orders, b.live_buyers),
        _at_most("units_within_limit", b.most_units, sale.limit_per_buyer),
        _equal("lawful_states", b.orders, b.lawful_orders),
        _equal("deadlines_fairly_extended", b.extended_orders, b.rightly_extended),
        _equal("amounts_add_up", b.amount_minor, b.lines_minor),
        _equal("shop_is_told", b.orders, b.told_orders),
        _equal("paid_orders_have_money", b.paid_orders, b.funded_orders),
        _equal("one_capture_an_order", b.kept_captures, b.captured_orders),
    ]
    for m in await books.money(conn, sale.id):
        checks.append(_equal(f"money_agrees:{m.currency}", m.captured - m.refunded, m.owned + m.owing))
    return checks


def _cross_checks(
    items: dict[str, ItemBooks],
    redis: _Redis | None,
    in_flight: dict[str, tuple[int, int]],
    moved: dict[str, int],
) -> list[Check]:
    """What Redis and Postgres must say of each other."""
    if redis is None:
        return []
    checks: list[Check] = []
    for sku, i in items.items():
        r = redis.items[sku]
        slack = moved[sku]
        flying_claims, flying_units = in_flight.get(sku, (0, 0))
        available = i.total - i.reserved - i.sold
        right = r.left + flying_units + i.unapplied + i.reserved + i.sold
        checks.append(_at_most(f"redis_within_postgres:{sku}", r.left, available - i.unapplied, slack))
        checks.append(_equal(f"units_add_up:{sku}", i.total, right, slack))
        checks.append(_equal(f"top_ups_once:{sku}", r.add, i.topped_up, slack))
        if r.served is not None:
            right = i.orders + i.refused + flying_claims
            checks.append(_equal(f"every_claim_decided:{sku}", r.served, right, slack + r.since))
    return checks


# ---- Redis' side ----------------------------------------------------------------------------------------------------


@dataclass
class _Redis:
    items: dict[str, _RedisItem]
    claims: list[Claim]


async def _read_redis(link: Link, sale: Sale, *, deep: bool) -> _Redis | None:
    """Stock, top-ups, claims in flight and ticket bytes. None: a settled sale may have left Redis.

    A claim that was written to Postgres and taken off the stream while this was reading is missing here and counts as
    moved there.
    """
    keys = SaleKeys(sale.id)
    asked: list[Sequence[str | int]] = [
        ("MULTI",),
        ("HGET", keys.sale, "epoch"),
        ("HGETALL", keys.stock),
        ("XREVRANGE", keys.orders, "+", "-", "COUNT", 1),
    ]
    for item in sale.items:
        asked += [("HGETALL", keys.item(item.sku)), ("LLEN", keys.left(item.sku))]
        asked.append(("STRLEN", keys.outcome(item.sku)))
    replies = await link.pipeline([*asked, ("EXEC",)])
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    epoch, stock_flat, newest, *rest = replies[-1]
    if epoch is None:
        if sale.state == "settled":
            return None
        raise DidNotHappen(f"Redis does not hold {sale.id}: nothing can be compared before it is rebuilt")
    if int(epoch) != sale.epoch:
        raise DidNotHappen(f"Redis holds epoch {int(epoch)} of {sale.id}, Postgres {sale.epoch}")
    last = bytes(newest[0][0]) if newest else b""
    in_flight = (
        await reading.entries(link, keys.orders, upto=last, pairs_max=BACKLOG_READ_MAX) if last else []
    )
    stock = dict(zip(stock_flat[::2], stock_flat[1::2], strict=True))
    items: dict[str, _RedisItem] = {}
    for at, item in enumerate(sale.items):
        fields_flat, left_count, length = rest[at * 3 : at * 3 + 3]
        fields = dict(zip(fields_flat[::2], fields_flat[1::2], strict=True))
        add = sum(int(value) for name, value in fields.items() if name.startswith(b"add:"))
        served, since, outcome = None, 0, b""
        if deep:
            outcome = await reading.first_bytes(link, keys.outcome(item.sku), int(length))
            served = sum(outcome.count(byte) for byte in _SERVED) + outcome.count(b"l") - int(left_count)
            since = int(await link.call("LLEN", keys.left(item.sku))) - int(left_count)
        items[item.sku] = _RedisItem(int(stock.get(item.sku.encode(), 0)), add, served, since, outcome)
    if deep:
        since_then = await reading.entries(link, keys.orders, after=last, pairs_max=BACKLOG_READ_MAX)
        for claim in _claims(sale, since_then):
            if claim.sku in items:
                items[claim.sku].since += 1
    return _Redis(items, _claims(sale, in_flight))


def _claims(sale: Sale, entries: list[Entry]) -> list[Claim]:
    """What these entries of `orders` hold; not what is of another epoch, or unreadable (confirm will bury it)."""
    return [claim for claim in parse(sale.id, entries)[0] if claim.epoch == sale.epoch]


async def _in_flight(conn: AsyncConnection, sale: Sale, claims: list[Claim]) -> dict[str, tuple[int, int]]:
    """sku → (claims, units) that have no outcome in Postgres' snapshot yet."""
    known = await books.decided(conn, [claim.order_no for claim in claims]) if claims else set()
    found: dict[str, tuple[int, int]] = {}
    for claim in claims:
        if claim.order_no not in known:
            count, units = found.get(claim.sku, (0, 0))
            found[claim.sku] = (count + 1, units + claim.units)
    return found


async def _told(conn: AsyncConnection, sale: Sale, redis: _Redis, *, deep: bool) -> list[Check]:
    """Every order against its ticket's byte. A step that has not been told yet (outbox) is left out."""
    if not deep:
        return []
    checks: list[Check] = []
    for sku, item in redis.items.items():
        count = agree = after = 0
        while page := await books.states(conn, sale.id, sku, after, STATES_PAGE):
            for row in page:
                byte = item.outcome[row["seq"] - 1 : row["seq"]]
                count += 1
                agree += bool(byte) and byte in _BYTES[row["state"]]
            after = page[-1]["seq"]
        checks.append(_equal(f"told_as_written:{sku}", count, agree))
    return checks
