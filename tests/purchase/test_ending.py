"""An order never ends while a payment may still arrive for it, whoever begins one in whatever moment."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Literal

import pytest

from app.ledger import orders, payments
from app.purchase import pay
from tests.providers.server import sandbox, until
from tests.purchase.money import Money, money


@pytest.fixture
async def till(redis_url: str, database_url: str) -> AsyncIterator[Money]:
    async with sandbox() as shop, money(shop, redis_url, database_url) as till:
        await till.publish(units=30)
        yield till


async def _begin(till: Money, number: str) -> bool:
    """Somebody begins a payment, as the law wants it: with the order locked, and only while it is reserved."""
    async with till.engine.begin() as conn:
        order = await orders.lock(conn, number)
        if order is None or order["state"] != "reserved" or await payments.has_open(conn, number):
            return False
        await payments.add_attempt(
            conn,
            order,
            provider="sandbox",
            channel="sandbox",
            return_url=None,
            payer=None,
            state="created",
        )
    return True


async def _due(till: Money, *, leaving: bool = False) -> None:
    await till.sql(
        "UPDATE purchase_order SET pay_by = now() - interval '1 s', leaving = :leaving, leased_until = NULL",
        leaving=leaving,
    )


@pytest.mark.parametrize("ending", ["expire", "let_go"])
async def test_a_payment_begun_after_the_look_at_the_supplier_keeps_the_order(
    till: Money, ending: Literal["expire", "let_go"]
) -> None:
    number = await till.reserve("ann", attempt=False)
    await _due(till, leaving=ending == "let_go")
    clear = till.releaser.clear

    async def clear_and_lose_the_race(order_no: str) -> Literal["clear", "paid", "unknown"]:
        cleared = await clear(order_no)
        assert await _begin(till, order_no)
        return cleared

    till.releaser.clear = clear_and_lose_the_race
    assert await getattr(till.releaser, ending)() == 0
    assert await till.state(number) == "reserved"
    assert await till.attempts(number) == [("created", None)]
    # The next look clears that one too, and then the order ends.
    till.releaser.clear = clear
    await _due(till, leaving=ending == "let_go")
    assert await getattr(till.releaser, ending)() == 1
    assert await till.attempts(number) == [("closed", "not_payable")]
    await till.balanced()


async def test_of_many_races_between_ending_and_paying_none_leaves_an_ended_order_with_a_payment(
    till: Money,
) -> None:
    numbers = [await till.reserve(f"buyer{n}", attempt=False) for n in range(24)]
    dice = random.Random(7)
    await _due(till)
    await till.sql("UPDATE purchase_order SET leaving = (seq % 2 = 0)")
    clear = till.releaser.clear

    async def slow_clear(order_no: str) -> Literal["clear", "paid", "unknown"]:
        cleared = await clear(order_no)
        await asyncio.sleep(dice.random() * 0.02)  # not a wait: shuffles who comes first
        return cleared

    async def begin(number: str) -> bool:
        await asyncio.sleep(dice.random() * 0.06)  # not a wait: shuffles who comes first
        return await _begin(till, number)

    till.releaser.clear = slow_clear
    begun, *_ = await asyncio.gather(
        asyncio.gather(*(begin(number) for number in numbers)), till.releaser.expire(), till.releaser.let_go()
    )
    wrong = await till.sql(
        "SELECT o.order_no, o.state FROM purchase_order o JOIN payment_attempt a USING (order_no)"
        " WHERE o.state <> 'reserved' AND a.state IN ('created', 'sent', 'unknown')"
    )
    assert wrong == []
    assert any(begun)
    till.releaser.clear = clear

    async def all_ended() -> bool:
        await _due(till)
        await till.releaser.expire()
        return not await till.sql("SELECT 1 FROM purchase_order WHERE state = 'reserved'")

    await until(all_ended)
    await till.balanced()


async def test_a_link_is_not_begun_when_postgres_says_that_it_is_too_late(till: Money) -> None:
    """The same clock that expires the order; a worker's own may be minutes behind."""
    number = await till.reserve("ann", attempt=False)
    await till.sql("UPDATE purchase_order SET pay_by = now() + interval '1.5 s'")
    async with till.engine.begin() as conn:
        assert not await pay.start_attempt(
            conn, number, channel="sandbox", return_url=None, payer=None, providers=till.providers
        )
    assert await till.attempts(number) == []
