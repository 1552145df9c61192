"""Several batches at once, of several workers, with deaths, copies and redeliveries: each claim has one outcome."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from app.ledger import orders
from app.purchase.confirm import Confirmer
from tests.ledger.shop import SALE, Shop, open_shop

BUYERS = 150


class Died(Exception):
    """This worker ends here, before or after the step."""


def mortal(real: Callable[..., Awaitable[Any]], odds: Callable[[], float]) -> Callable[..., Awaitable[Any]]:
    async def step(*given: Any, **named: Any) -> Any:
        if odds() < 0.1:
            raise Died
        answer = await real(*given, **named)
        if odds() < 0.1:
            raise Died
        return answer

    return step


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_dies_repeats_or_stalls_each_claim_has_one_outcome(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    await shop.publish({"A": 200, "B": 200}, limit_per_buyer=2)
    buyers = [(f"b{n}", chance.randrange(1, 3)) for n in range(BUYERS)]
    while buyers:
        some = [buyers.pop() for _ in range(min(len(buyers), chance.choice((1, 1, 2, 5, 12))))]
        await shop.claim(*some, sku=chance.choice("AB"))
        if chance.random() < 0.2:  # a copy, and contacts, some of which leave Redis with a row
            entries = await shop.link.call("XREVRANGE", shop.keys.orders, "+", "-", "COUNT", 1)
            await shop.copy_entry(entries[0][1])
        for name, _ in some:
            if chance.random() < 0.3:
                await shop.link.call("HSET", shop.keys.contact, name, f"sealed {name}")

    async def work(one: Shop, name: str) -> None:
        """Batches as they come; one that failed is tried again, or left behind, or confirmed twice at once."""
        while entries := await one.read(chance.randrange(1, 12), consumer=name):
            for _ in range(3):
                try:
                    await asyncio.gather(
                        *(
                            one.confirmer.confirm(SALE, list(entries), careful=chance.random() < 0.5)
                            for _ in range(chance.choice((1, 1, 2)))
                        )
                    )
                    break
                except Died:
                    if chance.random() < 0.4:
                        break

    async def leave(one: Shop) -> None:
        """Some give up what they were just told they have."""
        for _ in range(30):
            rows = await one.sql("SELECT order_no FROM purchase_order WHERE state = 'reserved' LIMIT 20")
            if rows and chance.random() < 0.5:
                async with one.engine.begin() as conn:
                    await orders.cancel(conn, chance.choice(rows)["order_no"], "left")
            await one.relay()

    async with open_shop(shop.settings.redis_url, shop.settings.database_url) as twin:
        twin.skus = shop.skus
        with monkeypatch.context() as deaths:
            for name in ("_contacts", "_write", "_forget", "_tell", "_tell_together", "mark", "_acknowledge"):
                deaths.setattr(Confirmer, name, _method(getattr(Confirmer, name), chance.random))
            await asyncio.gather(
                *(work(one, name) for one, name in ((shop, "one"), (twin, "two")) for _ in range(3)),
                leave(shop),
            )
        while entries := await twin.take_over():
            await twin.confirmer.confirm(SALE, entries, careful=True)
    await shop.relay()
    rows = await shop.orders()
    assert Counter(row["buyer_id"] for row in rows) == Counter(f"b{n}" for n in range(BUYERS))
    assert await shop.backlog() == 0
    assert await shop.pending() == 0
    for row in rows:
        told = await shop.told(row["seq"], row["sku"])
        assert told is not None
        assert (told[0], told[1].decode()) == (row["version"], orders.byte_of(row))
        assert await shop.byte(row["seq"], row["sku"]) == orders.byte_of(row).encode()
    kept = {row["buyer_id"] for row in rows if row["contact"] is not None}
    left = await shop.link.call("HLEN", shop.keys.contact)
    assert left == 0, f"{left} contacts stayed in Redis, {len(kept)} are in rows"
    feed = await shop.events()
    assert [event["position"] for event in feed] == list(range(1, len(feed) + 1))
    for row in rows:
        mine = [event["type"] for event in feed if event["order_no"] == row["order_no"]]
        ended = [] if row["state"] == "reserved" else ["order.cancelled"]
        assert mine == ["order.reserved", *ended]
    await shop.conserved()


def _method(real: Callable[..., Awaitable[Any]], odds: Callable[[], float]) -> Any:
    async def step(self: Confirmer, *given: Any, **named: Any) -> Any:
        return await mortal(real, odds)(self, *given, **named)

    return step


async def test_a_feed_read_while_batches_and_steps_commit_never_pays_before_it_reserves(shop: Shop) -> None:
    """Batches and single events are numbered by the order in which they were written, however they interleave."""
    await shop.publish(60)
    await shop.claim(*[f"b{n}" for n in range(60)])
    paid: set[str] = set()

    async def confirm() -> None:
        while entries := await shop.read(7):
            await shop.confirmer.confirm(SALE, entries)

    async def pay() -> None:
        while len(paid) < 60:
            for row in await shop.sql("SELECT order_no FROM purchase_order WHERE state = 'reserved'"):
                async with shop.engine.begin() as conn:
                    await orders.pay(conn, row["order_no"])
                paid.add(row["order_no"])

    async def number() -> None:
        while len(paid) < 60:
            await shop.events()

    await asyncio.gather(confirm(), confirm(), pay(), number(), number())
    feed = await shop.events()
    assert [event["position"] for event in feed] == list(range(1, 121))
    at = {(event["order_no"], event["type"]): event["position"] for event in feed}
    assert all(at[number, "order.reserved"] < at[number, "order.paid"] for number in paid)
