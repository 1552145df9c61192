"""Time to pay while a supplier is out: bounded, once an outage, never after the end; and the ticket says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.ledger import orders, outages, payments
from app.providers.registry import Providers, open_providers
from app.purchase.degrade.extend import Extender, out
from app.repair import audit
from tests.conftest import Stores
from tests.ledger.shop import SALE, Shop, open_shop, until

MORE, MOST = 300, 700


class Outages:
    """A sale whose orders wait for money, a supplier to switch off, and a clock to push."""

    def __init__(self, shop: Shop, providers: Providers) -> None:
        self.shop, self.providers = shop, providers
        self.extender = Extender(shop.engine, providers, shop.settings)
        self.pushed_s = 0.0

    def supplier(self, works: bool) -> None:
        for payment in self.providers.payment.values():
            payment.guard.breaker.set_mode("auto" if works else "forced_open")

    async def reserve(self, *buyers: str, attempt: bool = True) -> list[str]:
        """These buyers hold an order each, with 60 s left to pay and an attempt at the sandbox."""
        await self.shop.claim(*buyers)
        await self.shop.confirm()
        numbers = [row["order_no"] for row in await self.shop.orders() if row["buyer_id"] in buyers]
        async with self.shop.engine.begin() as conn:
            for number in numbers:
                order = await orders.lock(conn, number)
                assert order is not None
                if attempt:
                    await payments.add_attempt(
                        conn, order, provider="sandbox", channel="sandbox", return_url=None, payer=None, state="created"
                    )  # fmt: skip
        await self.shop.sql(
            "UPDATE purchase_order SET pay_by = now() + interval '60 s' WHERE pay_by IS NULL AND order_no = ANY(:n)",
            n=numbers,
        )
        return numbers

    async def push(self, seconds: float) -> None:
        """So much time passes, as far as Postgres can tell."""
        self.pushed_s += seconds
        for table, columns in (
            ("purchase_order", ("pay_by", "reserved_at", "paid_at", "ended_at", "leased_until")),
            ("payment_outage", ("began_at", "seen_at")),
            ("deadline_extension", ("at", "pay_by_before")),
        ):
            sets = ", ".join(f"{column} = {column} - make_interval(secs => :s)" for column in columns)
            await self.shop.sql(f"UPDATE {table} SET {sets}", s=seconds)

    async def order(self, number: str) -> Any:
        return (await self.shop.sql("SELECT * FROM purchase_order WHERE order_no = :n", n=number))[0]

    async def left_s(self, number: str) -> int:
        """Seconds to the deadline, to the nearest ten: what the test itself takes is not looked at."""
        found = await self.shop.sql(
            "SELECT extract(epoch FROM pay_by - now())::float AS s FROM purchase_order WHERE order_no = :n",
            n=number,
        )
        return int(round(found[0]["s"], -1))


@asynccontextmanager
async def outages_of(redis_url: str, database_url: str, **changed: Any) -> AsyncIterator[Outages]:
    settings = {"pay_extension_s": MORE, "pay_extension_max_s": MOST} | changed
    async with open_shop(redis_url, database_url, **settings) as shop:
        providers = open_providers(shop.settings)
        try:
            yield Outages(shop, providers)
        finally:
            await providers.aclose()


@pytest.fixture
async def stage(redis_url: str, database_url: str) -> AsyncIterator[Outages]:
    async with outages_of(redis_url, database_url) as stage:
        await stage.shop.publish(10)
        yield stage


async def test_an_order_whose_supplier_is_out_gets_more_time_and_its_ticket_says_so(stage: Outages) -> None:
    (number,) = await stage.reserve("ann")
    await stage.shop.relay()
    before = (await stage.order(number))["version"]
    stage.supplier(works=False)
    assert out(stage.providers) == ["sandbox"]
    await stage.extender.turn()
    assert await stage.left_s(number) == 60 + MORE
    row = await stage.order(number)
    assert (row["version"], row["extended_s"], row["state"]) == (before + 1, MORE, "reserved")
    await stage.shop.relay()
    version, byte, told = await stage.shop.told(row["seq"]) or (0, b"", {})
    assert (version, byte, told["order"]["extended_s"]) == (before + 1, b"r", MORE)
    assert told["order"]["pay_by"].startswith(f"{row['pay_by']:%Y-%m-%dT%H:%M:%S}")
    assert {event["type"] for event in await stage.shop.events()} == {"order.reserved"}


async def test_while_the_supplier_works_no_deadline_moves(stage: Outages) -> None:
    (number,) = await stage.reserve("ann")
    await stage.extender.turn()
    assert await stage.left_s(number) == 60
    assert await stage.shop.sql("SELECT 1 FROM payment_outage") == []


async def test_one_outage_extends_once_however_long_it_lasts_and_whoever_looks(stage: Outages) -> None:
    (number,) = await stage.reserve("ann")
    stage.supplier(works=False)
    others = [Extender(stage.shop.engine, stage.providers, stage.shop.settings) for _ in range(4)]
    await asyncio.gather(*(other.turn() for other in others))
    assert [row["count"] for row in await stage.shop.sql("SELECT count(*) FROM payment_outage")] == [1]
    for _ in range(12):
        await stage.push(25)
        await asyncio.gather(*(other.turn() for other in others))
    assert (await stage.order(number))["extended_s"] == MORE
    assert [row["count"] for row in await stage.shop.sql("SELECT count(*) FROM payment_outage")] == [1]


async def test_the_next_outage_extends_again_until_the_most_is_reached(stage: Outages) -> None:
    (number,) = await stage.reserve("ann")
    extended = []
    for _ in range(4):
        stage.supplier(works=False)
        await stage.extender.turn()
        stage.supplier(works=True)
        extended.append((await stage.order(number))["extended_s"])
        await stage.push(await stage.left_s(number) - 30)
        await stage.extender.turn()
    assert extended == [MORE, 2 * MORE, MOST, MOST]


async def test_a_supplier_that_flaps_is_one_outage(stage: Outages) -> None:
    (number,) = await stage.reserve("ann")
    for works in (False, True) * 10:
        stage.supplier(works=works)
        await stage.extender.turn()
        await stage.push(10)
    assert (await stage.order(number))["extended_s"] == MORE


async def test_an_order_that_has_time_left_anyway_keeps_its_deadline(stage: Outages) -> None:
    """Its unit would be kept from others for nothing; if the outage lasts, its turn comes."""
    (number,) = await stage.reserve("ann")
    await stage.shop.sql(
        "UPDATE purchase_order SET pay_by = now() + make_interval(secs => :s)", s=MORE + 100.0
    )
    stage.supplier(works=False)
    await stage.extender.turn()
    assert await stage.left_s(number) == MORE + 100
    for _ in range(11):
        await stage.push(10)
        await stage.extender.turn()
    assert await stage.left_s(number) == MORE - 10 + MORE


async def test_who_has_no_attempt_gets_time_only_when_nobody_can_be_paid(stage: Outages) -> None:
    (number,) = await stage.reserve("ann", attempt=False)
    stage.supplier(works=False)
    await stage.extender.turn()
    assert await stage.left_s(number) == 60 + MORE


async def test_only_orders_of_the_supplier_that_is_out_are_extended(stage: Outages) -> None:
    ann, bob = await stage.reserve("ann", "bob")
    await stage.shop.sql("UPDATE payment_attempt SET provider = 'other' WHERE order_no = :n", n=bob)
    async with stage.shop.engine.begin() as conn:
        assert await outages.note(conn, ["other"], 30.0) == ["other"]
    await stage.extender.turn()
    assert (await stage.left_s(ann), await stage.left_s(bob)) == (60, 60 + MORE)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("state = 'expired', ended_at = now()", "it has ended"),
        ("state = 'paid', paid_at = now()", "it is paid"),
        ("leaving = TRUE", "its buyer wants out"),
        ("pay_by = now() - interval '1 s'", "its deadline has passed"),
        ("pay_by = NULL", "its deadline has not started"),
    ],
)
async def test_an_order_is_let_alone_because(stage: Outages, change: str, why: str) -> None:
    (number,) = await stage.reserve("ann")
    await stage.shop.sql(f"UPDATE purchase_order SET {change} WHERE order_no = :n", n=number)
    before = dict(await stage.order(number))
    stage.supplier(works=False)
    await stage.extender.turn()
    assert dict(await stage.order(number)) == before, why


async def test_nothing_is_extended_where_the_operator_wants_none(redis_url: str, database_url: str) -> None:
    async with outages_of(redis_url, database_url, pay_extension_s=0) as stage:
        await stage.shop.publish(10)
        (number,) = await stage.reserve("ann")
        stage.supplier(works=False)
        await stage.extender.turn()
        assert await stage.left_s(number) == 60


async def test_expiry_and_extension_at_the_same_moment_agree(stage: Outages) -> None:
    """Every order either ended at its deadline or has a later one; never both."""
    numbers = await stage.reserve(*[f"b{n}" for n in range(10)], attempt=False)
    await stage.shop.sql("UPDATE purchase_order SET pay_by = now() + interval '30 ms'")
    stage.supplier(works=False)

    async def decided() -> bool:
        await stage.shop.releaser.expire()
        return all(row["state"] == "expired" or row["extended_s"] for row in await stage.shop.orders())

    await asyncio.gather(until(decided, "every order has ended or has more time"), stage.extender.turn())
    for number in numbers:
        row = await stage.order(number)
        assert (row["state"], row["extended_s"]) in (("expired", 0), ("reserved", MORE))


async def test_the_audit_sees_an_extension_that_nobody_granted(stage: Outages) -> None:
    ann, bob = await stage.reserve("ann", "bob")
    stage.supplier(works=False)
    await stage.extender.turn()

    async def extended() -> tuple[bool, int, int]:
        found = await audit.run(stage.shop.engine, stage.shop.link, SALE, deep=False)
        assert found is not None
        (check,) = [check for check in found.checks if check.name == "deadlines_fairly_extended"]
        return check.ok, check.left, check.right

    assert await extended() == (True, 2, 2)
    await stage.shop.sql("UPDATE purchase_order SET extended_s = extended_s + 1 WHERE order_no = :n", n=ann)
    assert await extended() == (False, 2, 1)
    await stage.shop.sql(
        "UPDATE purchase_order SET pay_by = pay_by - interval '1 s' WHERE order_no = :n", n=bob
    )
    assert await extended() == (False, 2, 0)


async def test_links_that_waited_for_a_supplier_are_due_at_once_when_it_works_again(stage: Outages) -> None:
    """Prevents a recovery that takes as long as the last backoff."""
    (number,) = await stage.reserve("ann")
    stage.supplier(works=False)
    await stage.extender.turn()
    await stage.shop.sql("UPDATE payment_attempt SET next_at = now() + interval '30 s'")

    async def due() -> bool:
        (row,) = await stage.shop.sql(
            "SELECT next_at <= now() AS due FROM payment_attempt WHERE order_no = :n", n=number
        )
        return bool(row["due"])

    await stage.extender.turn()
    assert not await due()
    stage.supplier(works=True)
    await stage.extender.turn()
    assert await due()


# Whatever happens in whatever order

STEP = st.one_of(
    st.sampled_from(["fails", "works", "look", "look", "look twice", "pay", "leave", "expire"]),
    st.integers(1, 400),  # seconds that pass
)


@pytest.mark.slow
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEP, min_size=3, max_size=20), most=st.sampled_from([0, 250, 300, 700]))
def test_an_extension_is_bounded_never_shortens_and_never_comes_after_the_end(
    stores: Stores, steps: list[str | int], most: int
) -> None:
    async def play(redis_url: str, database_url: str) -> None:
        async with outages_of(redis_url, database_url, pay_extension_max_s=most) as stage:
            await stage.shop.publish(10)
            numbers = await stage.reserve("ann", "bob", "eve")
            first = {number: await stage.order(number) for number in numbers}
            pay_by = {number: row["pay_by"] for number, row in first.items()}
            ended: dict[str, Any] = {}
            for at, step in enumerate(steps):
                await _do(stage, step, numbers[at % 3])
                for number in numbers:
                    row = await stage.order(number)
                    now = row["pay_by"].timestamp() + stage.pushed_s
                    was = pay_by[number] if isinstance(pay_by[number], float) else pay_by[number].timestamp()
                    assert now >= was - 0.001, "a deadline was shortened"
                    pay_by[number] = now
                    assert 0 <= row["extended_s"] <= most, "more than the most"
                    total = now - first[number]["pay_by"].timestamp()
                    assert abs(total - row["extended_s"]) < 0.001, "pay_by and extended_s disagree"
                    if number in ended:
                        assert (row["extended_s"], row["state"]) == ended[number], "extended after the end"
                    elif row["state"] != "reserved":
                        ended[number] = (row["extended_s"], row["state"])
            found = await audit.run(stage.shop.engine, stage.shop.link, SALE, deep=False)
            assert found is not None
            assert [
                check for check in found.checks if check.name == "deadlines_fairly_extended" and not check.ok
            ] == []

    url = stores.new_database()
    try:
        from tests.conftest import _flush

        _flush(stores.valkey)
        asyncio.run(play(stores.valkey.url, url))
        _flush(stores.valkey)
    finally:
        stores.drop_database(url)


async def _do(stage: Outages, step: str | int, number: str) -> None:
    match step:
        case int(seconds):
            await stage.push(seconds)
        case "fails" | "works":
            stage.supplier(works=step == "works")
        case "look":
            await stage.extender.turn()
        case "look twice":
            other = Extender(stage.shop.engine, stage.providers, stage.shop.settings)
            await asyncio.gather(stage.extender.turn(), other.turn())
        case "pay":
            async with stage.shop.engine.begin() as conn:
                await orders.pay(conn, number)
        case "leave":
            async with stage.shop.engine.begin() as conn:
                await orders.ask_to_leave(conn, number)
        case "expire":
            await stage.shop.releaser.expire()
