"""The shop's feed: positions are given in commit order, so a cursor never skips an event."""

from __future__ import annotations

import asyncio

from app.ledger import events
from app.ledger.engine import by_hand
from tests.ledger.shop import SALE, Shop


async def numbered(shop: Shop) -> list[tuple[int, str]]:
    async with shop.engine.connect() as conn:
        return [(row["position"], row["id"]) for row in await events.page(conn, 0, 1000)]


async def test_an_event_that_commits_late_gets_a_later_position(shop: Shop) -> None:
    async with shop.engine.connect() as slow:
        await slow.begin()
        await events.put(slow, "sale.opened", SALE, 1, {})  # written first, committed last
        async with shop.engine.begin() as conn:
            await events.put(conn, "sale.closed", SALE, 2, {})
        async with shop.engine.begin() as conn:
            assert await events.number(conn, 100) == 1
        seen = await numbered(shop)
        assert [name for _, name in seen] == [events.event_id(SALE, 2, "sale.closed")]
        await slow.commit()
    async with shop.engine.begin() as conn:
        assert await events.number(conn, 100) == 1
    assert [position for position, _ in await numbered(shop)] == [1, 2]
    assert (await numbered(shop))[:1] == seen


async def test_workers_that_number_at_once_leave_no_gap_and_no_double(shop: Shop) -> None:
    async def write(first: int) -> None:
        for version in range(first, first + 25):
            async with shop.engine.begin() as conn:
                await events.put(conn, "sale.opened", SALE, version, {})

    async def number() -> None:
        for _ in range(30):
            async with shop.engine.begin() as conn:
                await events.number(conn, 7)

    await asyncio.gather(write(1), write(100), write(200), number(), number())
    while True:
        async with shop.engine.begin() as conn:
            if not await events.number(conn, 1000):
                break
    assert [position for position, _ in await numbered(shop)] == list(range(1, 76))


async def test_the_same_change_told_twice_is_one_event(shop: Shop) -> None:
    for _ in range(3):
        async with shop.engine.begin() as conn:
            await events.put(conn, "sale.opened", SALE, 1, {"sale": SALE})
            await events.number(conn, 100)
    assert len(await numbered(shop)) == 1


async def test_the_order_numbers_of_a_batch_are_stored_as_they_are(shop: Shop) -> None:
    """Compressing them was a tenth of confirm's transaction beside its COPY."""
    async with by_hand(shop.engine) as conn:
        await events.put_reserved(conn, SALE, [f"{n:024}" for n in range(1000)])
    assert await shop.sql("SELECT pg_column_compression(order_nos) AS how FROM event_batch") == [
        {"how": None}
    ]
