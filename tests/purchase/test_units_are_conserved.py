"""Whatever happens in whatever order, with workers dying and Redis told twice: every unit is somewhere, once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.ledger import orders, outbox
from app.purchase.release import settle_late
from tests.conftest import Stores
from tests.ledger.shop import SALE, Shop, open_shop

STEP = st.sampled_from(
    [
        "join", "join", "join", "confirm", "confirm", "confirm twice", "die after commit", "die half told",
        "pay", "expire", "leave",
        "relay", "relay", "relay twice", "late money", "refund", "top up", "advance", "take over",
    ]
)  # fmt: skip


class Chaos:
    """One sale, and steps that keep to the protocol while everything around them breaks."""

    def __init__(self, shop: Shop, seed: int) -> None:
        self.shop = shop
        self.random = random.Random(seed)
        self.buyers = 0
        self.top_ups = 0

    async def pick(self, state: str) -> Any:
        rows = await self.shop.sql(
            "SELECT * FROM purchase_order WHERE state = :state ORDER BY seq", state=state
        )
        return self.random.choice(rows) if rows else None

    async def do(self, step: str) -> None:
        shop = self.shop
        match step:
            case "join":
                again = (
                    [f"b{self.random.randrange(self.buyers)}"]
                    if self.buyers and self.random.random() < 0.4
                    else []
                )
                fresh = [f"b{self.buyers + n}" for n in range(self.random.randrange(4))]
                self.buyers += len(fresh)
                for buyer in again:
                    await shop.join(buyer, again=True)
                if fresh:
                    await shop.join(*[(buyer, self.random.choice((1, 1, 2))) for buyer in fresh])
            case "confirm":
                await shop.confirm()
            case "confirm twice":
                entries = await shop.read()
                if entries:
                    await asyncio.gather(*(shop.confirmer.confirm(SALE, list(entries)) for _ in range(2)))
            case "die after commit":
                entries = await shop.read()
                if entries:
                    real = type(shop.confirmer)._tell
                    try:
                        type(shop.confirmer)._tell = _die  # type: ignore[method-assign,assignment]
                        with pytest.raises(RuntimeError):
                            await shop.confirmer.confirm(SALE, entries)
                    finally:
                        type(shop.confirmer)._tell = real  # type: ignore[method-assign]
            case "die half told":
                # Some hear it, all entries stay but those told whole; now and then nobody hears anything.
                entries = [entry for entry in await shop.read() for _ in range(self.random.choice((1, 1, 2)))]
                if entries:
                    real_acknowledge, real_mark = shop.confirmer._acknowledge, shop.confirmer.mark
                    shop.confirmer._acknowledge = _die  # type: ignore[method-assign]
                    if self.random.random() < 0.5:
                        shop.confirmer.mark = _die  # type: ignore[method-assign]
                    try:
                        await shop.confirmer.confirm(SALE, entries)
                    except RuntimeError:
                        pass
                    finally:
                        shop.confirmer._acknowledge = real_acknowledge  # type: ignore[method-assign]
                        shop.confirmer.mark = real_mark  # type: ignore[method-assign]
            case "take over":
                entries = await shop.take_over()
                if entries:
                    await shop.confirmer.confirm(SALE, entries, careful=True)
            case "pay":
                if row := await self.pick("reserved"):
                    async with shop.engine.begin() as conn:
                        await orders.pay(conn, row["order_no"])
            case "expire":
                if row := await self.pick("reserved"):
                    await shop.sql(
                        "UPDATE purchase_order SET pay_by = now() WHERE order_no = :no", no=row["order_no"]
                    )
                    await shop.releaser.expire()
            case "leave":
                if row := await self.pick("reserved"):
                    async with shop.engine.begin() as conn:
                        await orders.ask_to_leave(conn, row["order_no"])
                    await shop.releaser.let_go()
            case "relay":
                await shop.releaser.relay()
            case "relay twice":
                # The first worker dies after telling Redis: its rows are leased again.
                async with shop.engine.begin() as conn:
                    rows = await outbox.lease(conn, 100, 30.0)
                    facts = await shop.releaser._facts(conn, rows) if rows else None
                for row in rows:
                    assert facts is not None
                    await shop.releaser._apply(row, facts)
                await shop.sql("UPDATE outbox SET leased_until = NULL")
                await shop.releaser.relay()
            case "late money":
                if row := await self.pick("expired"):
                    await settle_late(
                        shop.engine, shop.scripts, row["order_no"], kept=_nothing, refused=_nothing
                    )
            case "refund":
                if row := await self.pick("paid"):
                    async with shop.engine.begin() as conn:
                        await orders.finish_refund(conn, row["order_no"], restock=self.random.random() < 0.5)
            case "top up":
                self.top_ups += 1
                async with shop.engine.begin() as conn:
                    await outbox.put(
                        conn, "stock_add", SALE, 1, {"sku": "A", "units": 1, "id": str(self.top_ups)}
                    )
                    await conn.exec_driver_sql("UPDATE item SET total = total + 1")
            case "advance":
                await shop.admitter.tick()

    async def look(self) -> None:
        """Always: Postgres is not oversold, Redis has no more to give than Postgres has free."""
        item = await self.shop.item()
        assert item["reserved"] + item["sold"] <= item["total"]
        await self.shop.backlog()  # the claims that the scripts count are those that the stream holds
        books = await self.shop.books()
        assert books.items[0].excess <= 0, books.report()

    async def rest(self) -> None:
        for step in ("take over", "confirm", "relay twice", "relay", "advance", "confirm", "relay"):
            await self.do(step)
        while await self.shop.backlog() or await self.shop.sql("SELECT 1 FROM outbox WHERE state = 'due'"):
            await self.shop.sql("UPDATE outbox SET leased_until = NULL")
            await self.do("take over")
            await self.do("confirm")
            await self.do("relay")
        await self.shop.conserved()
        live = await self.shop.sql("SELECT buyer_id FROM purchase_order WHERE state IN ('reserved', 'paid')")
        assert max(Counter(row["buyer_id"] for row in live).values(), default=1) == 1
        item = await self.shop.item()
        counted = Counter[str]()
        for row in await self.shop.sql(
            "SELECT state, sum(units) AS units FROM purchase_order GROUP BY state"
        ):
            counted[row["state"]] = row["units"]
        assert item["reserved"] == counted["reserved"]
        for row in await self.shop.orders():
            byte = await self.shop.byte(row["seq"])
            assert byte.decode() == orders.byte_of(row), dict(row)


async def _die(*_: Any) -> Any:
    raise RuntimeError("killed")


async def _nothing(_: Any) -> None:
    return None


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEP, min_size=5, max_size=40), seed=st.integers(0, 2**16), standby=st.booleans())
def test_every_unit_is_somewhere_once_after_any_steps(
    stores: Stores, redis_url: str, steps: list[str], seed: int, standby: bool
) -> None:
    async def run() -> None:
        url = stores.new_database()
        try:
            async with open_shop(redis_url, url) as shop:
                await shop.link.call("FLUSHALL")
                await shop.publish(3, standby=standby, limit_per_buyer=1 if standby else 2)
                chaos = Chaos(shop, seed)
                for step in steps:
                    await chaos.do(step)
                    await chaos.look()
                await chaos.rest()
        finally:
            stores.drop_database(url)

    asyncio.run(run())


async def test_every_unit_is_somewhere_once_with_everybody_at_work_at_the_same_time(
    redis_url: str, database_url: str
) -> None:
    async with open_shop(redis_url, database_url) as shop:
        await shop.publish(40, standby=True)
        people = [Chaos(shop, seed) for seed in range(6)]
        for number, chaos in enumerate(people):
            chaos.buyers = number * 1000

        async def busy(chaos: Chaos) -> None:
            steps = [
                "join",
                "confirm",
                "take over",
                "pay",
                "expire",
                "leave",
                "relay",
                "late money",
                "refund",
                "advance",
            ]
            for _ in range(25):
                await chaos.do(chaos.random.choice(steps))

        await asyncio.gather(*(busy(chaos) for chaos in people))
        await people[0].rest()
