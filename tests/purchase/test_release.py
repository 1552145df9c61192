"""Units go back exactly once: expiry, leaving, cancels, late money, top-ups; and the relay that tells Redis."""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64encode
from typing import Any, Literal

import msgspec
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from app.answers import Asked
from app.ledger import orders, outbox
from app.purchase.release import PayAsk, parse_ask, parse_pay, settle_late
from tests.ledger.shop import SALE, Shop


async def reserve(shop: Shop, *buyers: str, units: int = 5, **changed: Any) -> list[Any]:
    """These buyers hold an order each."""
    await shop.publish(units, **changed)
    await shop.claim(*buyers)
    await shop.confirm()
    return await shop.orders()


async def overdue(shop: Shop) -> None:
    await shop.sql("UPDATE purchase_order SET pay_by = now() - interval '1 second' WHERE state = 'reserved'")


async def state_of(shop: Shop, number: str) -> str:
    return str(
        (await shop.sql("SELECT state FROM purchase_order WHERE order_no = :no", no=number))[0]["state"]
    )


# Expiry


async def test_an_unpaid_order_expires_and_its_unit_goes_back_once(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await overdue(shop)
    assert await shop.releaser.expire() == 1
    assert (await shop.item())["reserved"] == 0
    assert await shop.left() == 4
    for _ in range(3):
        await shop.relay()
        assert await shop.releaser.expire() == 0
    assert await shop.left() == 5
    assert await shop.byte(row["seq"]) == b"e"
    version, byte, told = await shop.told(row["seq"]) or (0, b"", {})
    assert (version, byte, told["order"]["state"]) == (2, b"e", "expired")
    assert {event["type"] for event in await shop.events()} == {
        "order.reserved",
        "order.expired",
    }
    await shop.conserved()


async def test_an_order_before_its_deadline_or_without_one_stays(shop: Shop) -> None:
    await reserve(shop, "ann", "bob")
    await shop.sql("UPDATE purchase_order SET pay_by = now() + interval '1 minute' WHERE buyer_id = 'ann'")
    assert await shop.releaser.expire() == 0


async def test_the_deadline_starts_without_a_link_after_a_while(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    assert await shop.releaser.start_deadlines() == 0
    await shop.sql("UPDATE purchase_order SET reserved_at = now() - interval '61 seconds'")
    assert await shop.releaser.start_deadlines() == 1
    assert await shop.releaser.start_deadlines() == 0
    await shop.relay()
    (row,) = await shop.orders()
    assert 595 < (row["pay_by"] - row["reserved_at"]).total_seconds() - 61 < 605
    told = await shop.told(row["seq"])
    assert told is not None
    assert told[2]["order"]["pay_by"] is not None


async def test_the_first_link_starts_the_deadline_and_the_second_does_not_move_it(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    async with shop.engine.begin() as conn:
        first = await orders.start_deadline(conn, row["order_no"])
    assert first is not None
    async with shop.engine.begin() as conn:
        assert await orders.start_deadline(conn, row["order_no"]) is None
    assert (await shop.orders())[0]["pay_by"] == first["pay_by"]


@pytest.mark.parametrize("said", ["paid", "unknown"])
async def test_an_order_whose_money_may_be_on_its_way_stays_reserved(shop: Shop, said: str) -> None:
    await reserve(shop, "ann")
    await overdue(shop)
    shop.cleared = said
    assert await shop.releaser.expire() == 0
    assert [row["state"] for row in await shop.orders()] == ["reserved"]
    assert await shop.sql("SELECT 1 FROM outbox WHERE kind = 'release'") == []


async def test_a_payment_that_comes_while_the_order_expires_wins_or_loses_whole(shop: Shop) -> None:
    """The row lock decides; in both cases every unit is somewhere, once."""
    rows = await reserve(shop, *[f"b{n}" for n in range(20)], units=20)
    await overdue(shop)

    async def pay(number: str) -> bool:
        async with shop.engine.begin() as conn:
            return await orders.pay(conn, number) is not None

    results = await asyncio.gather(shop.releaser.expire(), *(pay(row["order_no"]) for row in rows))
    paid = sum(results[1:])
    states = [row["state"] for row in await shop.orders()]
    assert states.count("paid") == paid
    assert states.count("expired") == results[0] == 20 - paid
    await shop.relay()
    item = await shop.item()
    assert (item["reserved"], item["sold"], await shop.left()) == (0, paid, 20 - paid)
    await shop.conserved()


async def test_a_worker_whose_lease_ran_out_cannot_expire_the_order(shop: Shop) -> None:
    _ = await reserve(shop, "ann")
    await overdue(shop)
    async with shop.engine.begin() as conn:
        ((number, old),) = await orders.lease_unpaid(conn, 10, 30.0)
    await shop.sql("UPDATE purchase_order SET leased_until = now() - interval '1 second'")
    async with shop.engine.begin() as conn:
        ((_, new),) = await orders.lease_unpaid(conn, 10, 30.0)
    assert new == old + 1
    async with shop.engine.begin() as conn:
        assert await orders.expire(conn, number, old) is None
        assert await orders.expire(conn, number, new) is not None


async def test_many_workers_expire_each_order_once(shop: Shop) -> None:
    await reserve(shop, *[f"b{n}" for n in range(30)], units=30)
    await overdue(shop)
    assert sum(await asyncio.gather(*(shop.releaser.expire() for _ in range(4)))) == 30
    await asyncio.gather(*(shop.releaser.relay() for _ in range(4)))
    assert await shop.left() == 30
    await shop.conserved()


async def test_a_standby_buyer_wins_the_unit_that_expires(shop: Shop) -> None:
    _ = await reserve(shop, "ann", units=1, standby=True)
    (waiting,) = await shop.join("bob")
    await overdue(shop)
    await shop.releaser.expire()
    await shop.relay()
    assert await shop.byte(waiting.seq) == b"c"
    assert await shop.left() == 0
    assert await shop.confirm() == 1
    assert {row["buyer_id"]: row["state"] for row in await shop.orders()} == {
        "ann": "expired",
        "bob": "reserved",
    }
    await shop.conserved()


# Leaving


async def ask(shop: Shop, seq: int, buyer: str, kind: Literal["leave", "pay"], arg: str = "-") -> None:
    answer = await shop.scripts.ask_put(
        sale=SALE, epoch=1, sku="A", seq=seq, buyer_id=buyer, kind=kind, arg=arg, channel="x", repeat_ms=1000
    )
    assert isinstance(answer, Asked), answer


async def test_a_buyer_with_an_order_leaves_and_the_unit_goes_back(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await ask(shop, row["seq"], "ann", "leave")
    assert await shop.releaser.answer_asks(SALE, await shop.asks()) == 1
    await shop.relay()
    told = await shop.told(row["seq"])
    assert told is not None
    assert told[2]["leaving"] is True
    assert await shop.releaser.let_go() == 1
    await shop.relay()
    assert await shop.byte(row["seq"]) == b"k"
    assert await shop.left() == 5
    (row,) = await shop.orders()
    assert (row["state"], row["reason"]) == ("cancelled", "left")
    assert await shop.link.call("XLEN", shop.keys.asks) == 0
    await shop.conserved()


async def test_a_buyer_who_leaves_while_claimed_is_let_go_once_the_order_is_written(shop: Shop) -> None:
    await shop.publish(5)
    (seq,) = await shop.claim("ann")
    await ask(shop, seq, "ann", "leave")
    entries = await shop.asks()
    assert await shop.releaser.answer_asks(SALE, entries) == 0  # no row yet: the ask stays pending
    await shop.confirm()
    assert (
        await shop.link.call("HEXISTS", shop.keys.status, f"A:{seq}:a") == 1
    )  # still leaving, for the buyer
    assert await shop.releaser.answer_asks(SALE, entries) == 1
    assert await shop.releaser.let_go() == 1
    await shop.relay()
    assert await shop.byte(seq) == b"k"
    assert await shop.left() == 5
    assert await shop.link.call("HEXISTS", shop.keys.status, f"A:{seq}:a") == 0
    await shop.conserved()


async def test_a_paid_order_is_not_left_and_the_wish_is_taken_off_the_ticket(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await ask(shop, row["seq"], "ann", "leave")
    async with shop.engine.begin() as conn:
        await orders.pay(conn, row["order_no"])
    assert await shop.releaser.answer_asks(SALE, await shop.asks()) == 1
    assert await shop.releaser.let_go() == 0
    await shop.relay()
    assert await shop.byte(row["seq"]) == b"p"
    assert await shop.link.call("HEXISTS", shop.keys.status, f"A:{row['seq']}:a") == 0


async def test_while_a_payment_is_unknown_nobody_is_let_go(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await ask(shop, row["seq"], "ann", "leave")
    await shop.releaser.answer_asks(SALE, await shop.asks())
    shop.cleared = "unknown"
    assert await shop.releaser.let_go() == 0
    assert await state_of(shop, row["order_no"]) == "reserved"
    await shop.sql("UPDATE purchase_order SET leased_until = NULL")
    shop.cleared = "clear"
    assert await shop.releaser.let_go() == 1


async def test_a_wish_to_pay_reaches_the_till_with_what_the_buyer_chose(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    wish = {"channel": "wechat", "return_url": None, "payer": {"openid": "o1"}}
    arg = urlsafe_b64encode(msgspec.json.encode(wish)).decode().rstrip("=")
    await ask(shop, row["seq"], "ann", "pay", arg)
    assert await shop.releaser.answer_asks(SALE, await shop.asks()) == 1
    assert shop.attempts == [(row["order_no"], PayAsk("wechat", None, {"openid": "o1"}))]


async def test_a_broken_ask_is_buried_and_the_next_one_heard(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await shop.link.call("XADD", shop.keys.asks, "*", "a", "rubbish")
    await ask(shop, row["seq"], "ann", "leave")
    assert await shop.releaser.answer_asks(SALE, await shop.asks()) == 2
    (letter,) = await shop.sql("SELECT stream, reason FROM dead_letter")
    assert (letter["stream"], letter["reason"]) == ("asks", "shape")


async def test_an_ask_that_no_statement_can_hold_is_buried_and_the_next_one_heard(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await shop.link.call("XADD", shop.keys.asks, "*", "a", f"1|1|A|{10**30}|leave|-|17|ann")
    await ask(shop, row["seq"], "ann", "leave")
    assert await shop.releaser.answer_asks(SALE, await shop.asks()) == 2
    (letter,) = await shop.sql("SELECT stream, reason FROM dead_letter")
    assert (letter["stream"], letter["reason"]) == ("asks", "DBAPIError")
    assert (await shop.orders())[0]["leaving"]


def test_asks_are_read_as_they_were_written() -> None:
    found = parse_ask("s", (b"1-1", [b"a", b"1|1|A|7|leave|-|17|ann|b"]))
    assert found is not None
    assert (found.kind, found.order_no) == ("leave", orders.order_no("s", 1, "A", 7, "ann|b"))
    assert parse_ask("s", (b"1-1", [b"a", b"1|1|A|7|dance|-|17|ann"])) is None
    assert parse_pay("!!!") is None


# The relay


async def test_a_release_that_was_applied_and_not_noted_is_applied_again_for_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies between Redis and Postgres."""
    await reserve(shop, "ann")
    await overdue(shop)
    await shop.releaser.expire()

    async def die(*_: Any) -> int:
        raise RuntimeError("killed")

    with monkeypatch.context() as crash:
        crash.setattr(outbox, "close", die)
        with pytest.raises(RuntimeError):
            await shop.releaser.relay()
    assert await shop.left() == 5
    await shop.sql("UPDATE outbox SET leased_until = NULL")
    await shop.relay()
    assert await shop.left() == 5
    assert await shop.sql("SELECT 1 FROM outbox WHERE state = 'due'") == []
    await shop.conserved()


async def test_a_release_of_an_epoch_that_is_over_is_dropped(shop: Shop) -> None:
    await reserve(shop, "ann")
    await overdue(shop)
    await shop.releaser.expire()
    await shop.sql("UPDATE sale SET epoch = 2")
    await shop.link.call("HSET", shop.keys.sale, "epoch", 2)
    await shop.releaser.relay()
    assert {row["state"] for row in await shop.sql("SELECT state FROM outbox WHERE kind = 'release'")} == {
        "dropped"
    }
    assert await shop.left() == 4  # a rebuild has counted it already


async def test_a_redis_that_is_not_armed_yet_keeps_the_release_waiting(shop: Shop) -> None:
    await reserve(shop, "ann")
    await overdue(shop)
    await shop.releaser.expire()
    await shop.link.call("HSET", shop.keys.sale, "home", "x" * 40)
    assert await shop.releaser.relay() == 0
    await shop.link.call("HSET", shop.keys.sale, "home", shop.link.run_id)
    await shop.sql("UPDATE outbox SET leased_until = NULL")
    assert await shop.relay() >= 1
    assert await shop.left() == 5


async def test_a_top_up_counts_once_however_often_it_is_told(shop: Shop) -> None:
    await shop.publish(1)
    async with shop.engine.begin() as conn:
        for _ in range(3):
            await outbox.put(conn, "stock_add", SALE, 1, {"sku": "A", "units": 4, "id": "t1"})
    await shop.sql("UPDATE item SET total = total + 4")
    await shop.relay()
    assert await shop.left() == 5
    await shop.conserved()


async def test_a_mark_never_overtakes_the_release_of_the_same_order(shop: Shop) -> None:
    """A mark that was written before the order ended must not set the last byte: the units would be lost."""
    (row,) = await reserve(shop, "ann")
    async with shop.engine.begin() as conn:
        await orders.bump(conn, row["order_no"])
    async with shop.engine.begin() as conn:
        await orders.cancel(conn, row["order_no"], "operator")
    await shop.relay()
    assert await shop.left() == 5
    assert await shop.byte(row["seq"]) == b"k"


async def test_a_row_that_cannot_be_applied_holds_up_no_other(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await shop.sql("INSERT INTO outbox (kind, sale, epoch, payload) VALUES ('stock_add', 'drop', 1, '{}')")
    async with shop.engine.begin() as conn:
        await orders.cancel(conn, row["order_no"], "operator")
    await shop.releaser.relay()
    assert await shop.left() == 5
    states = await shop.sql("SELECT kind, state FROM outbox ORDER BY id DESC LIMIT 2")
    assert [(one["kind"], one["state"]) for one in states] == [("release", "done"), ("stock_add", "due")]


async def test_an_order_that_cannot_end_keeps_no_other_from_it(shop: Shop) -> None:
    rows = await reserve(shop, "ann", "bob", "cat")
    await overdue(shop)
    clear = shop.releaser.clear

    async def contradictory(number: str) -> Any:
        if number == rows[0]["order_no"]:
            raise ValueError("a supplier says paid without a capture")
        return await clear(number)

    shop.releaser.clear = contradictory
    with pytest.raises(ValueError, match="without a capture"):
        await shop.releaser.expire()
    assert [await state_of(shop, row["order_no"]) for row in rows] == ["reserved", "expired", "expired"]


async def test_what_changes_after_the_release_is_told_too(shop: Shop) -> None:
    """As a text for the ticket of an expired order, which no channel took."""
    (row,) = await reserve(shop, "ann")
    number = row["order_no"]
    await overdue(shop)
    await shop.releaser.expire()
    await shop.relay()
    async with shop.engine.begin() as conn:
        assert await orders.bump(conn, number) is not None
    await shop.relay()
    (row,) = await shop.orders()
    told = await shop.told(row["seq"])
    assert told is not None
    assert (told[0], told[1]) == (row["version"], b"e")
    await shop.conserved()


async def test_what_changes_while_the_release_is_under_way_is_told_after_it(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    number = row["order_no"]
    await overdue(shop)
    await shop.releaser.expire()
    async with shop.engine.begin() as conn:  # another worker holds the release, with the row as it was
        (release,) = await outbox.lease(conn, 10, 30.0)
        facts = await shop.releaser._facts(conn, [release])
    async with shop.engine.begin() as conn:
        await orders.bump(conn, number)
    await shop.releaser.relay()  # the mark comes first, and waits
    assert await shop.releaser._apply(release, facts) == "done"
    async with shop.engine.begin() as conn:
        assert await outbox.close(conn, [(release["id"], release["generation"])], "done") == 1
    await shop.sql("UPDATE outbox SET leased_until = NULL")
    await shop.relay()
    (row,) = await shop.orders()
    told = await shop.told(row["seq"])
    assert told is not None
    assert (told[0], told[1]) == (row["version"], b"e")
    assert await shop.left() == 5
    await shop.conserved()


async def test_a_refund_with_restock_gives_the_unit_back_and_one_without_does_not(shop: Shop) -> None:
    first, second = await reserve(shop, "ann", "bob")
    async with shop.engine.begin() as conn:
        for row in (first, second):
            await orders.pay(conn, row["order_no"])
            await orders.begin_refund(conn, row["order_no"])
        await orders.finish_refund(conn, first["order_no"], restock=True)
        await orders.finish_refund(conn, second["order_no"], restock=False)
    await shop.relay()
    item = await shop.item()
    assert (item["reserved"], item["sold"], await shop.left()) == (0, 1, 4)
    assert [await shop.byte(row["seq"]) for row in (first, second)] == [b"f", b"f"]
    await shop.conserved()


# Late money


class Money:
    """What a capture becomes; each decision is written with the order's."""

    def __init__(self) -> None:
        self.became: list[str] = []

    async def kept(self, conn: AsyncConnection) -> None:
        self.became.append("kept")

    async def refused(self, conn: AsyncConnection) -> None:
        self.became.append("refused")


async def late(shop: Shop, number: str) -> tuple[str, list[str]]:
    money = Money()
    decision = await settle_late(shop.engine, shop.scripts, number, kept=money.kept, refused=money.refused)
    return decision, money.became


async def test_late_money_before_the_release_is_sent_withdraws_it(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await overdue(shop)
    await shop.releaser.expire()
    assert await late(shop, row["order_no"]) == ("kept", ["kept"])
    await shop.relay()
    assert await state_of(shop, row["order_no"]) == "paid"
    assert (await shop.item())["sold"] == 1
    assert await shop.left() == 4
    assert await shop.byte(row["seq"]) == b"p"
    await shop.conserved()


async def test_late_money_after_the_release_takes_the_unit_again(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await overdue(shop)
    await shop.releaser.expire()
    await shop.relay()
    assert await shop.left() == 5
    assert await late(shop, row["order_no"]) == ("kept", ["kept"])
    await shop.relay()
    assert await shop.left() == 4
    assert await shop.byte(row["seq"]) == b"p"
    assert (await shop.item())["sold"] == 1
    await shop.conserved()
    assert (await late(shop, row["order_no"]))[0] == "refused"  # a second capture of a paid order goes back
    assert await shop.left() == 4


async def test_late_money_while_the_release_is_under_way_waits(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await overdue(shop)
    await shop.releaser.expire()
    async with shop.engine.begin() as conn:
        await outbox.lease(conn, 10, 30.0)
    assert await late(shop, row["order_no"]) == ("later", [])
    assert await state_of(shop, row["order_no"]) == "expired"


async def test_late_money_for_a_unit_that_somebody_else_has_goes_back(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann", units=1)
    await overdue(shop)
    await shop.releaser.expire()
    await shop.relay()
    await shop.claim("bob")
    await shop.confirm()
    assert await late(shop, row["order_no"]) == ("refused", ["refused"])
    assert (await shop.item())["reserved"] == 1
    await shop.conserved()


async def test_late_money_of_a_buyer_with_another_order_goes_back(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await overdue(shop)
    await shop.releaser.expire()
    await shop.relay()
    await shop.claim("ann", again=True)
    await shop.confirm()
    assert await late(shop, row["order_no"]) == ("refused", ["refused"])
    await shop.relay()
    assert await shop.left() == 4
    await shop.conserved()


async def test_a_crash_between_taking_the_unit_again_and_postgres_is_finished_by_the_next_look(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = await reserve(shop, "ann")
    await overdue(shop)
    await shop.releaser.expire()
    await shop.relay()

    async def die(*_: Any) -> Any:
        raise RuntimeError("killed")

    with monkeypatch.context() as crash:
        crash.setattr(orders, "revive", die)
        with pytest.raises(RuntimeError):
            await late(shop, row["order_no"])
    assert await shop.left() == 4  # taken, and nobody's
    assert await late(shop, row["order_no"]) == ("kept", ["kept"])
    await shop.relay()
    assert await shop.left() == 4
    await shop.conserved()


async def test_units_taken_again_go_back_if_the_buyer_got_another_order_meanwhile(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = await reserve(shop, "ann")
    await overdue(shop)
    await shop.releaser.expire()
    await shop.relay()
    real = orders.revive

    async def too_late(conn: AsyncConnection, number: str) -> Any:
        await shop.link.call(
            "HDEL", shop.keys.buyers, "ann"
        )  # Redis would not let the buyer in again by itself
        await shop.claim("ann")
        await shop.confirm()
        return await real(conn, number)

    with monkeypatch.context() as race:
        race.setattr(orders, "revive", too_late)
        decision, became = await late(shop, row["order_no"])
    assert (decision, became) == ("refused", ["refused"])
    await shop.relay()
    assert await shop.left() == 4
    assert (await shop.item())["sold"] == 0
    await shop.conserved()


async def test_two_looks_at_the_same_late_money_keep_it_once(shop: Shop) -> None:
    (row,) = await reserve(shop, "ann")
    await overdue(shop)
    await shop.releaser.expire()
    await shop.relay()
    results = await asyncio.gather(*(late(shop, row["order_no"]) for _ in range(4)))
    assert [decision for decision, _ in results].count("kept") == 1
    await shop.relay()
    assert (await shop.item())["sold"] == 1
    assert await shop.left() == 4
    await shop.conserved()
