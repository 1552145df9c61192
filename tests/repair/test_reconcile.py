"""Redis and Postgres compared: pulses, re-arming after a restart, books, settling."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
import structlog

from app.answers import Old, Pulsed
from app.embedded import Valkey
from app.errors import DidNotHappen
from app.keys import SaleKeys
from app.ledger import course, orders, outbox, sales
from app.redis import reading
from app.repair import reconcile
from app.repair.reconcile import SURE_AFTER, ItemBooks, compare
from tests.ledger.shop import SALE, Shop, open_shop, until


@pytest.fixture
async def shop(redis_url: str, database_url: str):  # type: ignore[no-untyped-def]
    async with open_shop(redis_url, database_url) as shop:
        yield shop


async def crash_redis(shop: Shop, valkey: Valkey) -> str:
    """kill -9 and a restart from its own log. Returns the run_id that was."""
    before = shop.link.run_id
    valkey.restart(crash=True)

    async def back() -> bool:
        return shop.link.connected and shop.link.run_id != before

    await until(back, "the link comes back")
    return before


async def home(shop: Shop) -> tuple[str, int]:
    (row,) = await shop.sql("SELECT home, pulse FROM sale")
    return row["home"], row["pulse"]


async def test_a_redis_that_restarts_from_its_own_log_is_armed_again_and_lost_nothing(
    shop: Shop, valkey: Valkey
) -> None:
    await shop.publish(10)
    await shop.claim("ann", "bob")
    assert await shop.reconciler.pulse() == 1
    assert (await home(shop))[1] == 1
    await crash_redis(shop, valkey)
    assert isinstance(await shop.scripts.sale_pulse(sale=SALE, epoch=1, pulse=9), Old)  # fenced until armed
    assert await shop.reconciler.pulse() == 1
    assert await home(shop) == (shop.link.run_id, 2)
    assert await shop.left() == 8
    await shop.claim("cid")
    assert await shop.confirm() == 3
    await shop.conserved()


async def test_a_redis_that_came_back_older_stays_closed(shop: Shop, valkey: Valkey) -> None:
    await shop.publish(10)
    await shop.reconciler.pulse()
    await shop.sql("UPDATE sale SET pulse = 1000000")  # Postgres has seen more than this log holds
    before = await crash_redis(shop, valkey)
    assert await shop.reconciler.pulse() == 0
    assert (await home(shop))[0] == before
    assert isinstance(await shop.scripts.sale_pulse(sale=SALE, epoch=1, pulse=9), Old)


@pytest.mark.parametrize("lost", ["order", "release", "status", "top-up", "switch"])
async def test_a_redis_whose_log_lost_its_end_since_the_last_pulse_stays_closed(
    shop: Shop, valkey: Valkey, lost: str
) -> None:
    """A disk that lies about fsync: no pulse is missing, and yet something that Postgres saw told."""
    await shop.publish(10)
    await shop.claim("ann")
    await shop.claim("bob")
    await shop.reconciler.pulse()
    log = next((valkey.home / "appendonlydir").glob("*.incr.aof"))
    if lost != "order":
        await shop.confirm()
        await shop.relay()
    size = log.stat().st_size
    number = (await shop.orders() or [{"order_no": ""}])[0]["order_no"]
    match lost:
        case "order":
            size = log.read_bytes().rindex(b"XADD") - 20  # of the second claim
            await shop.confirm()
        case "release":
            async with shop.engine.begin() as conn:
                await orders.cancel(conn, number, "operator")
        case "status":
            async with shop.engine.begin() as conn:
                await orders.bump(conn, number)
        case "top-up":
            async with shop.engine.begin() as conn:
                await sales.add_units(conn, SALE, "A", 5)
                await outbox.put(conn, "stock_add", SALE, 1, {"sku": "A", "units": 5, "id": "t1"})
        case "switch":
            async with shop.engine.begin() as conn:
                await outbox.put(conn, "switch", SALE, 1, {"version": 9, "changes": {"paused": "1"}})
    await shop.relay()
    assert await shop.sql("SELECT 1 FROM outbox WHERE state = 'due'") == []
    valkey.kill()
    os.truncate(log, size)
    before = shop.link.run_id
    valkey.start()
    await until(lambda: _another(shop, before), "the link comes back")
    assert await shop.reconciler.pulse() == 0, "armed, though it has lost something"
    assert (await home(shop))[0] == before
    assert isinstance(await shop.scripts.sale_pulse(sale=SALE, epoch=1, pulse=9), Old)


async def _another(shop: Shop, before: str) -> bool:
    return shop.link.connected and shop.link.run_id != before


async def test_a_promoted_replica_stays_closed(
    shop: Shop, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(10)
    before = await crash_redis(shop, valkey)
    real = shop.link.call

    async def call(*args: str | bytes | int, deadline_s: float | None = None) -> object:
        if args == ("INFO", "replication"):
            return b"# Replication\r\nrole:master\r\nmaster_replid2:" + b"ab" * 20 + b"\r\n"
        return await real(*args, deadline_s=deadline_s)

    monkeypatch.setattr(shop.link, "call", call)
    assert await shop.reconciler.pulse() == 0
    assert (await home(shop))[0] == before


async def be_promoted(shop: Shop, monkeypatch: pytest.MonkeyPatch, *, elected: bool) -> None:
    """From now on this Redis was a replica, of which sentinels say what they say."""
    real = shop.link.call

    async def call(*args: str | bytes | int, deadline_s: float | None = None) -> object:
        if args == ("INFO", "replication"):
            return b"# Replication\r\nrole:master\r\nmaster_replid2:" + b"ab" * 20 + b"\r\n"
        return await real(*args, deadline_s=deadline_s)

    async def is_elected(_: object) -> bool:
        return elected

    monkeypatch.setattr(shop.link, "call", call)
    monkeypatch.setattr(shop.link, "is_elected", is_elected)
    await shop.sql("UPDATE sale SET home = 'the primary of before'")


@pytest.mark.parametrize("elected", [True, False])
async def test_a_primary_that_was_elected_is_not_waited_for(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, elected: bool
) -> None:
    """Nothing comes back after an election. A replica that just calls itself primary may be the wrong one."""
    await shop.publish(10)
    await shop.claim("ann")
    await shop.confirm()
    shop.settings.rebuild_after_s = 3_600.0
    await be_promoted(shop, monkeypatch, elected=elected)
    assert await shop.reconciler.pulse() == 0
    assert shop.reconciler.elected.is_set() is elected  # wakes the loop
    assert await shop.reconciler.mend() == elected
    assert await shop.reconciler.pulse() == elected


def alerts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds of the alerts that reconcile gives, as they come."""
    given: list[str] = []
    monkeypatch.setattr("app.repair.reconcile.alert", lambda kind, _why, **_facts: given.append(kind))
    return given


async def test_a_rebuild_under_way_is_no_alert_and_one_that_does_not_end_is(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(10)
    given = alerts(monkeypatch)
    shop.settings.rebuild_after_s = 3_600.0
    await shop.scripts.sale_fence(sale=SALE, epoch=1)
    await shop.sql("UPDATE sale SET home = 'the Redis of before'")  # its first step: the fence
    await shop.reconciler.pulse()
    await shop.sql("UPDATE sale SET home = 'rebuilding', pulse = 0")  # and the next: another epoch
    await shop.reconciler.pulse()
    assert given == []
    shop.settings.rebuild_after_s = 0.0
    await shop.reconciler.pulse()
    assert given == ["rebuilding"]


async def test_a_sale_that_settled_without_its_home_is_not_made_anew(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(10)
    given = alerts(monkeypatch)
    shop.settings.rebuild_after_s = 0.0
    await shop.link.call("FLUSHALL")
    await shop.reconciler.pulse()
    await shop.sql("UPDATE sale SET state = 'settled'")
    await shop.reconciler.pulse()
    assert await shop.reconciler.mend() == 0
    assert given == ["sale_gone"]  # and not `rebuild_refused`, again and again


async def test_what_this_workers_own_rebuild_does_to_a_sale_is_no_alert(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(10)
    shop.settings.rebuild_after_s = 0.0
    await shop.link.call("FLUSHALL")
    await shop.reconciler.pulse()
    given = alerts(monkeypatch)
    real = reconcile.rebuild

    async def watched(*args: Any, **named: Any) -> Any:
        await shop.sql("UPDATE sale SET home = 'rebuilding'")
        await shop.reconciler.pulse()  # the other loop goes on meanwhile
        return await real(*args, **named)

    monkeypatch.setattr(reconcile, "rebuild", watched)
    assert await shop.reconciler.mend() == 1
    assert given == ["sale_rebuilt"]


async def test_units_of_a_sale_that_is_shut_are_no_excess(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older Redis thinks that it has more; the fence keeps it, and the rebuild counts anew."""
    await shop.publish(10)
    given = alerts(monkeypatch)
    await shop.link.call("HINCRBY", shop.keys.stock, "A", 3)
    await shop.scripts.sale_fence(sale=SALE, epoch=1)
    for _ in range(SURE_AFTER + 1):
        await shop.reconciler.compare_all()
    assert given == []
    await shop.link.call("HSET", shop.keys.sale, "home", shop.link.run_id)
    for _ in range(SURE_AFTER - 1):
        await shop.reconciler.compare_all()
    assert given == []
    await shop.reconciler.compare_all()
    assert given == ["excess"]


async def test_a_redis_that_lost_the_sale_stays_closed(shop: Shop) -> None:
    await shop.publish(10)
    await shop.link.call("FLUSHALL")
    assert await shop.reconciler.pulse() == 0


async def test_a_worker_that_died_while_arming_is_followed_by_the_next(shop: Shop, valkey: Valkey) -> None:
    """Redis was armed, Postgres not told: the script says NOT with our own run_id."""
    await shop.publish(10)
    before = await crash_redis(shop, valkey)
    await shop.scripts.sale_rearm(
        sale=SALE, epoch=1, old_home=before, new_home=shop.link.run_id, pulse_at_least=0
    )
    assert (await home(shop))[0] == before
    assert await shop.reconciler.pulse() == 1
    assert (await home(shop))[0] == shop.link.run_id


async def test_the_pulse_only_grows(shop: Shop) -> None:
    await shop.publish(1)
    for _ in range(3):
        await shop.reconciler.pulse()
    assert (await home(shop))[1] == 3
    assert await shop.scripts.sale_pulse(sale=SALE, epoch=1, pulse=1) == Pulsed(3)


async def test_books_agree_at_rest_and_name_what_is_wrong(shop: Shop) -> None:
    await shop.publish(10)
    await shop.claim("ann", "bob")
    books = await compare(shop.engine, shop.link, SALE)
    assert books.agree
    assert books.items[0].claimed == 2
    await shop.confirm()
    await shop.conserved()
    await shop.link.call("HINCRBY", shop.keys.stock, "A", 3)  # Redis lies
    books = await compare(shop.engine, shop.link, SALE)
    assert not books.agree
    assert books.items[0].excess == 3
    report = books.report()
    assert report["agree"] is False
    for _ in range(3):
        await shop.reconciler.compare_all()


async def test_a_closed_sale_settles_when_nothing_is_left_to_happen(shop: Shop) -> None:
    await shop.publish(10)
    await shop.claim("ann", "bob")
    await shop.link.call("HSET", shop.keys.contact, "never-won", b"sealed")
    await shop.sql("UPDATE sale SET state = 'closed'")
    assert await shop.reconciler.settle() == 0  # claims on their way
    await shop.confirm()
    assert await shop.reconciler.settle() == 0  # unpaid orders
    first, second = await shop.orders()
    async with shop.engine.begin() as conn:
        await orders.pay(conn, first["order_no"])
        await orders.cancel(conn, second["order_no"], "operator")
    assert await shop.reconciler.settle() == 0  # Redis does not know yet
    await shop.relay()
    assert await shop.reconciler.settle() == 1
    facts = msgspec.json.decode(await shop.link.call("HGET", "fairdrop:sales", SALE))
    assert facts["ended"] is True
    assert await shop.link.call("EXISTS", shop.keys.contact) == 0
    assert (await shop.sql("SELECT state FROM sale"))[0]["state"] == "settled"
    await shop.conserved()


async def test_a_sale_whose_node_is_away_keeps_no_other_from_settling(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(10)
    await shop.sql("UPDATE sale SET state = 'closed'")
    monkeypatch.setattr(course, "closed", lambda _: _later(["away", SALE]))
    call = shop.link.call

    async def of_others(*command: Any, **named: Any) -> Any:
        if SaleKeys("away").orders in command:
            raise DidNotHappen("its node is away")
        return await call(*command, **named)

    monkeypatch.setattr(shop.link, "call", of_others)
    with pytest.raises(DidNotHappen):
        await shop.reconciler.settle()
    assert (await shop.sql("SELECT state FROM sale"))[0]["state"] == "settled"


async def _later(value: Any) -> Any:
    return value


def test_a_returned_unit_that_was_sold_again_before_its_outbox_row_was_closed_alarms_nobody() -> None:
    item = ItemBooks("A", total=1, reserved=1, sold=0, left=0, claimed=0, to_release=1, to_add=0)
    assert (item.excess, item.surely_excess) == (1, 0)
    lied = ItemBooks("A", total=1, reserved=1, sold=0, left=1, claimed=0, to_release=0, to_add=0)
    assert (lied.excess, lied.surely_excess) == (1, 1)


async def test_a_number_of_open_claims_that_is_not_the_streams_is_set_right_and_a_person_is_called(
    shop: Shop,
) -> None:
    await shop.publish(10)
    await shop.claim("ann", "bob")
    await shop.claim("cid")
    books = await shop.books()
    assert (books.backlog.made, books.backlog.open, books.backlog.counted) == (3, 3, 3)
    await shop.link.call("HSET", shop.keys.sale, "claims_open", 50)
    with structlog.testing.capture_logs() as logs:
        await shop.reconciler.compare_all()
    assert [log["alert"] for log in logs if "alert" in log] == ["claims_miscounted"]
    assert await shop.backlog() == 3
    with structlog.testing.capture_logs() as logs:
        await shop.reconciler.compare_all()
    assert not [log for log in logs if "alert" in log]
    await shop.confirm()
    assert await shop.backlog() == 0


async def test_a_stream_that_moves_while_it_is_read_is_not_counted(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(10)
    await shop.claim("ann", "bob")
    real = reading.pieces

    async def moved(*args: Any, **named: Any) -> Any:
        async for page in real(*args, **named):
            await shop.claim("cid")
            yield page

    monkeypatch.setattr(reading, "pieces", moved)
    assert (await shop.books()).backlog.counted is None
