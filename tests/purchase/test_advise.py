"""The advisor: what it sees slows real sales down, other workers go on from it, and it is over by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from app import keys
from app.answers import Claimed, Waits
from app.ledger.engine import create_engine
from app.providers.registry import Providers, open_providers
from app.purchase.degrade.advise import Advisor, limits_of
from app.redis.link import Link
from app.scripts import Scripts
from tests.ledger.shop import Shop, open_shop, until


class Stage:
    """An open sale and as many workers' advisors as a test wants."""

    def __init__(self, shop: Shop, providers: Providers) -> None:
        self.shop, self.providers = shop, providers

    def advisor(self, **changed: Any) -> Advisor:
        shop = self.shop
        settings = shop.settings.model_copy(update=changed)
        quick = msgspec.structs.replace(limits_of(settings), bad_for_ms=50, good_for_ms=50, step_ms=20)
        return Advisor(
            shop.engine, shop.link, shop.scripts, self.providers, shop.admitter, settings, limits=quick
        )

    def supplier(self, works: bool) -> None:
        for payment in self.providers.payment.values():
            payment.guard.breaker.set_mode("auto" if works else "forced_open")

    async def said(self) -> dict[str, Any]:
        """What the sale says now, as the scripts and front doors read it."""
        names = ("slow_milli", "slow_reason", "notices", "advice_until_ms")
        found = await self.shop.link.call("HMGET", self.shop.keys.sale, *names)
        clock = await self.shop.link.call("TIME")
        until_ms = int(found[3] or 0)
        if until_ms <= int(clock[0]) * 1000 + int(clock[1]) // 1000:
            return {"slow": None, "reason": "", "notices": ""}
        slow = int(found[0])
        return {
            "slow": None if slow < 0 else slow,
            "reason": found[1].decode(),
            "notices": found[2].decode(),
        }

    async def look_until(self, advisor: Advisor, slowed: bool) -> None:
        async def done() -> bool:
            await self.shop.admitter.look()
            await advisor.turn()
            return ((await self.said())["slow"] is not None) is slowed

        await until(done, f"slowed down: {slowed}")


@asynccontextmanager
async def stage_of(redis_url: str, database_url: str, **changed: Any) -> AsyncIterator[Stage]:
    async with open_shop(redis_url, database_url, **changed) as shop:
        providers = open_providers(shop.settings)
        try:
            await shop.publish(50)
            await shop.admitter.look()
            yield Stage(shop, providers)
        finally:
            await providers.aclose()


@pytest.fixture
async def stage(redis_url: str, database_url: str) -> AsyncIterator[Stage]:
    async with stage_of(redis_url, database_url) as stage:
        yield stage


async def test_while_all_is_well_nothing_is_said(stage: Stage) -> None:
    advisor = stage.advisor()
    for _ in range(3):
        await advisor.turn()
    assert await stage.shop.link.call("HEXISTS", stage.shop.keys.sale, "advice_until_ms") == 0
    assert await stage.shop.join("ann") == [Claimed(1)]


async def test_payment_down_slows_the_sale_and_its_end_gives_the_rate_back(stage: Stage) -> None:
    advisor = stage.advisor()
    await advisor.turn()
    stage.supplier(works=False)
    await advisor.turn()
    assert (await stage.said())["notices"] == "payment"  # tickets say it at once
    await stage.look_until(advisor, slowed=True)
    assert await stage.said() == {"slow": 1_000, "reason": "payment_down", "notices": "payment"}
    assert await stage.shop.join("ann", "bob") == [Waits(1), Waits(2)]
    stage.supplier(works=True)
    await advisor.turn()
    assert (await stage.said())["notices"] == ""
    await stage.look_until(advisor, slowed=False)
    await stage.shop.admitter.tick()
    assert (await stage.shop.join("eve")) == [Claimed(3)]


async def test_claims_that_wait_for_postgres_slow_the_sale(redis_url: str, database_url: str) -> None:
    async with stage_of(redis_url, database_url, slow_confirm_lag_s=0.05) as stage:
        advisor = stage.advisor()
        await stage.shop.claim(*[f"b{n}" for n in range(20)])
        await stage.look_until(advisor, slowed=True)
        assert (await stage.said())["reason"] == "confirm_lag"
        await stage.shop.confirm()
        await stage.look_until(advisor, slowed=False)


async def test_links_that_are_late_slow_the_sale_but_one_that_hangs_does_not(
    redis_url: str, database_url: str
) -> None:
    async with stage_of(redis_url, database_url) as stage:
        advisor = stage.advisor()
        await stage.shop.claim(*[f"b{n}" for n in range(6)])
        await stage.shop.confirm()

        async def late(count: int) -> None:
            await stage.shop.sql(
                "INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, amount_minor,"
                " currency, created_at) SELECT order_no || '-1', order_no, 1, 'sandbox', 'sandbox', 'created', 1000,"
                " 'EUR', now() - interval '30 s' FROM purchase_order ORDER BY seq LIMIT :n ON CONFLICT DO NOTHING",
                n=count,
            )

        await late(4)
        assert await advisor._link_wait_s() == 0.0
        await late(6)
        assert await advisor._link_wait_s() >= 30.0
        await stage.look_until(advisor, slowed=True)
        assert (await stage.said())["reason"] == "payment_slow"
        await stage.shop.sql("UPDATE payment_attempt SET state = 'sent'")
        await stage.look_until(advisor, slowed=False)


async def test_one_worker_advises_and_another_goes_on_where_it_died(stage: Stage) -> None:
    first, second = stage.advisor(), stage.advisor()
    stage.supplier(works=False)
    await stage.look_until(first, slowed=True)
    before = await stage.said()
    await second.turn()
    assert second._courses == {}, "only one advises"
    await stage.shop.link.call("DEL", keys.ADVISOR)  # as its lease would: the first has died
    stage.supplier(works=True)
    await second.turn()
    assert await stage.said() == {**before, "notices": ""}
    assert second._courses["drop"].throttle.slow is not None
    await stage.look_until(second, slowed=False)


async def test_without_any_worker_it_ends_with_its_lease(stage: Stage) -> None:
    stage.supplier(works=False)
    await stage.look_until(stage.advisor(advice_lease_s=2.0), slowed=True)

    async def over() -> bool:
        return (await stage.said()) == {"slow": None, "reason": "", "notices": ""}

    await until(over, "the lease ends")
    assert await stage.shop.join("ann") == [Claimed(1)]


async def test_an_operator_may_want_no_slowdown_at_all(stage: Stage) -> None:
    advisor = stage.advisor(slow_auto=False)
    stage.supplier(works=False)
    for _ in range(5):
        await advisor.turn()
    assert (await stage.said())["slow"] is None


async def test_without_postgres_the_advisor_goes_on(redis_url: str, database_url: str) -> None:
    async with stage_of(redis_url, database_url) as stage:
        await stage.shop.engine.dispose()
        advisor = stage.advisor()
        unreachable = stage.shop.settings.model_copy(
            update={"database_url": "postgresql://nobody:x@127.0.0.1:1/none"}
        )
        advisor.engine = create_engine(unreachable)
        stage.supplier(works=False)
        await stage.look_until(advisor, slowed=True)
        await advisor.engine.dispose()


async def test_a_paused_sale_is_not_slowed_and_a_closed_one_is_forgotten(stage: Stage) -> None:
    advisor = stage.advisor()
    await advisor.turn()
    stage.supplier(works=False)
    await stage.shop.scripts.sale_switch(sale="drop", epoch=1, version=2, changes={"paused": 1})
    await stage.shop.admitter.look()
    for _ in range(5):
        await advisor.turn()
    assert (await stage.said())["slow"] is None
    await stage.shop.scripts.sale_switch(sale="drop", epoch=1, version=3, changes={"closed": 1})
    await stage.shop.admitter.look()
    await advisor.turn()
    assert advisor._courses == {}


async def test_two_links_of_two_workers_agree_on_who_advises(stage: Stage, redis_url: str) -> None:
    other_link = Link(redis_url, deadline_s=30, name="other")
    await other_link.start()
    try:
        one, two = stage.advisor(), stage.advisor()
        two.link, two.scripts = other_link, Scripts(other_link)
        leads = [await one._leads(), await two._leads(), await one._leads(), await two._leads()]
        assert leads == [True, False, True, False]
    finally:
        await other_link.close()
