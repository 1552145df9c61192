"""Payments on a real sandbox, Postgres and Redis: links, call-backs, unknown answers, late money, refunds, crashes."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from app.ledger import orders, payments, refunds
from app.providers import sandbox_wire
from app.providers.payment import HookRefundFailed
from app.purchase import pay
from app.purchase.paying import evidence, hook
from app.work import leased
from tests.ledger.shop import looking_out
from tests.providers.server import SECRET, Shop, until
from tests.purchase.money import PRICE, Money, hasty, money

# Links


async def test_a_reserved_order_gets_its_link_and_its_deadline_and_is_paid_by_the_call_back(
    till: Money,
) -> None:
    number = await till.reserve("ann")
    async with till.loops():
        url = await till.link_of(number)
        order = (await till.sql("SELECT * FROM purchase_order WHERE order_no = :no", no=number))[0]
        attempt = (await till.sql("SELECT * FROM payment_attempt"))[0]
        assert order["pay_by"] is not None
        assert attempt["expires_at"] <= order["pay_by"]
        await till.relay()
        status = await till.link.call("HGET", "{sale:drop}:status", f"PH-128:{order['seq']}")
        shown = msgspec.json.decode(status.split(b"|", 2)[2])
        assert shown["payment"]["state"] == "ready"
        assert shown["payment"]["url"] == url
        await till.shop.press(url)
        await till.becomes(number, "paid")
    assert await till.attempts(number) == [("succeeded", None)]
    assert await till.captures(number) == ["kept"]
    assert [row["type"] for row in await till.sql("SELECT type FROM event ORDER BY written")] == [
        "order.paid"
    ]
    await till.balanced()
    assert await till.link.call("GETRANGE", "{sale:drop}:outcome:PH-128", 0, 0) == b"p"


async def test_without_call_backs_a_payment_is_found_by_query(
    till: Money, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pay, "POLL_FIRST_S", 0.2)
    till.hooks_on = False
    number = await till.reserve("ann")
    async with till.loops():
        await till.shop.press(await till.link_of(number))
        await till.becomes(number, "paid")
    await till.balanced()


async def test_a_declined_payment_keeps_the_unit_and_the_buyer_may_try_again(till: Money) -> None:
    number = await till.reserve("ann")
    async with till.loops():
        await till.shop.press(await till.link_of(number), "decline")
        await until(lambda: _attempts_are(till, number, [("failed", "card_declined")]))
        assert await till.state(number) == "reserved"
        assert await till.units() == (4, 1, 0)
        assert await _ask(till, number)
        await till.shop.press(await till.link_of(number, 2))
        await till.becomes(number, "paid")
    await till.balanced()


async def _attempts_are(till: Money, number: str, wanted: Any) -> bool:
    return await till.attempts(number) == wanted


async def _ask(till: Money, number: str, channel: str = "sandbox") -> bool:
    async with till.engine.begin() as conn:
        return await pay.start_attempt(
            conn, number, channel=channel, return_url=None, payer=None, providers=till.providers
        )


async def test_asking_again_for_a_link_that_is_there_changes_nothing(till: Money) -> None:
    number = await till.reserve("ann")
    assert not await _ask(till, number)
    async with till.loops():
        await till.link_of(number)
        assert not await _ask(till, number)
    assert await till.attempts(number) == [("sent", None)]


async def test_an_ended_link_is_renewed_and_the_old_one_cannot_be_paid(
    till: Money, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pay, "EXPIRY_GRACE_S", 0.0)
    await till.shop.control(link_life_max_s=1)
    number = await till.reserve("ann")
    async with till.loops():
        await until(lambda: _attempts_are(till, number, [("closed", "expired")]))
        old = await till.one("SELECT url FROM payment_attempt WHERE order_no = :no", no=number)
        await till.shop.control(link_life_max_s=60)
        assert await _ask(till, number)
        new = await till.link_of(number, 2)
        assert (await till.shop.press(old)).status_code == 410
        await till.shop.press(new)
        await till.becomes(number, "paid")
    assert await till.attempts(number) == [("closed", "expired"), ("succeeded", None)]
    await till.balanced()


async def test_another_channel_closes_the_first_link_before_it_opens_its_own(till: Money) -> None:
    number = await till.reserve("ann")
    async with till.loops():
        first = await till.link_of(number)
        assert await _ask(till, number, "sandbox-qr")
        second = await till.link_of(number, 2)
        assert (await till.shop.press(first)).status_code == 410
        await till.shop.press(second)
        await till.becomes(number, "paid")
    assert [state for state, _ in await till.attempts(number)] == ["closed", "succeeded"]
    await till.balanced()


async def test_an_order_that_costs_nothing_is_paid_without_a_supplier(till: Money) -> None:
    number = await till.reserve("ann", amount_minor=0)
    async with till.loops():
        await till.becomes(number, "paid")
    assert "calls_create" not in await till.shop.stats()
    await till.balanced()


async def test_a_link_never_outlives_the_deadline(till: Money) -> None:
    number = await till.reserve("ann")
    await till.sql("UPDATE purchase_order SET pay_by = now() + interval '30 s'")
    async with till.loops():
        await till.link_of(number)
    assert await till.one("SELECT a.expires_at <= o.pay_by FROM payment_attempt a, purchase_order o")
    there = next(iter(till.shop.state.pays.values()))
    assert there.expires_at <= await till.one("SELECT pay_by FROM purchase_order")


async def test_too_late_for_a_link_means_no_link(till: Money) -> None:
    number = await till.reserve("ann")
    await till.sql("UPDATE purchase_order SET pay_by = now() + interval '1 s'")
    async with till.loops():
        await until(lambda: _attempts_are(till, number, [("closed", "too_late")]))
    assert not await _ask(till, number)


# Unknown answers


@hasty
async def test_a_link_whose_answer_was_lost_is_closed_before_the_buyer_gets_another(till: Money) -> None:
    await till.shop.control(payments={"lost_rate": 1, "only": ["create"]})
    number = await till.reserve("ann")
    async with till.loops():
        await until(lambda: till.shop.state.pays)
        hidden = next(iter(till.shop.state.pays.values()))
        await until(lambda: _first_state(till, number, "unknown"))
        await till.shop.control(payments={"lost_rate": 0})
        url = await till.link_of(number, 2)
        assert hidden.state == "closed"
        await till.shop.press(url)
        await till.becomes(number, "paid")
    assert (await till.shop.stats())["captured"] == 1
    await till.balanced()


async def _first_state(till: Money, number: str, state: str) -> bool:
    return (await till.attempts(number))[0][0] == state


@hasty
async def test_pays_then_times_out_is_paid_once(till: Money) -> None:
    """The create call times out, and the buyer pays all the same."""
    till.hooks_on = False
    await till.shop.control(
        payments={"lost_rate": 1, "only": ["create"]}, auto_pay={"share": 1, "delay_ms": 0, "jitter_ms": 0}
    )
    number = await till.reserve("ann")
    async with till.loops():
        await till.becomes(number, "paid")
    assert await till.attempts(number) == [("succeeded", None)]
    assert (await till.shop.stats())["captured"] == 1
    await till.balanced()


@hasty
async def test_while_the_supplier_does_not_answer_the_order_stays_reserved(till: Money) -> None:
    number = await till.reserve("ann")
    async with till.loops():
        await till.link_of(number)
    await till.shop.control(payments={"hang_rate": 1})
    await till.end(number)
    assert await till.state(number) == "reserved"
    assert await till.units() == (4, 1, 0)
    await till.shop.control(reset=True)

    async def ended() -> bool:
        await till.sql("UPDATE purchase_order SET leased_until = NULL")
        await till.end(number)
        return await till.state(number) == "expired"

    await until(ended)
    assert next(iter(till.shop.state.pays.values())).state == "closed"
    await till.balanced()


async def test_an_error_before_anything_was_done_is_repeated_with_the_same_key(till: Money) -> None:
    await till.shop.control(payments={"refuse_rate": 1, "only": ["create"]})
    number = await till.reserve("ann")
    async with till.loops():
        await until(lambda: till.shop.state.counts["calls_create"] >= 2)
        await till.shop.control(reset=True)
        await till.shop.press(await till.link_of(number))
        await till.becomes(number, "paid")
    assert await till.attempts(number) == [("succeeded", None)]
    await till.balanced()


@hasty
async def test_a_worker_killed_in_the_middle_of_a_call_is_recovered_by_query(till: Money) -> None:
    await till.shop.control(payments={"lost_rate": 1, "only": ["create"]})
    number = await till.reserve("ann")
    async with looking_out(till.engine) as lookout:
        worker = asyncio.create_task(
            pay.run(till.engine, till.scripts, till.providers, till.settings, asyncio.Event(), lookout)
        )
        await until(lambda: till.shop.state.pays)
        worker.cancel()  # as kill -9: nothing is written any more
        await asyncio.gather(worker, return_exceptions=True)
    assert await till.attempts(number) == [("created", None)]
    await till.shop.control(reset=True)
    await till.sql("UPDATE payment_attempt SET leased_until = now()")  # its lease runs out
    async with till.loops():
        await till.shop.press(await till.link_of(number, 2))
        await till.becomes(number, "paid")
    assert [pay_.state for pay_ in till.shop.state.pays.values()] == ["closed", "paid"]
    assert till.shop.state.counts["calls_query"] >= 1
    await till.balanced()


async def test_a_worker_killed_before_its_call_sends_the_same_attempt_again(till: Money) -> None:
    number = await till.reserve("ann")
    async with till.engine.begin() as conn:
        assert len(await payments.lease_starts(conn, "sandbox", 10, 0.01)) == 1
    async with till.loops():
        await till.shop.press(await till.link_of(number))
        await till.becomes(number, "paid")
    assert await till.attempts(number) == [("succeeded", None)]
    await till.balanced()


async def test_a_worker_that_lost_its_lease_changes_nothing(till: Money) -> None:
    number = await till.reserve("ann")
    async with till.engine.begin() as conn:
        stale = (await payments.lease_starts(conn, "sandbox", 10, 0.0))[0]
    async with till.loops():
        await till.link_of(number)
    held = (stale["id"], stale["generation"])
    async with till.engine.begin() as conn:
        assert not await payments.end(conn, held, "failed", "stale")
        assert not await payments.wait(conn, held, "unknown", 0.0)
        assert not await payments.start(conn, held)
    assert await till.attempts(number) == [("sent", None)]


# Call-backs


def _hook(number: str, **changes: Any) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat()
    payment = {
        "ref": "pay_1", "attempt_id": f"{number}-1", "order_no": number, "amount_minor": PRICE, "currency": "CNY",
        "merchant": "fairdrop", "state": "paid", "url": "x", "kind": "redirect", "expires_at": now, "paid_at": now,
        "capture_ref": "cap_1", "code": None,
    }  # fmt: skip
    payment |= {key: value for key, value in changes.items() if key in payment}
    outer = {key: value for key, value in changes.items() if key not in payment}
    return {"id": "evt_1", "type": "payment.paid", "merchant": "fairdrop", "payment": payment, **outer}


async def _send(till: Money, body: Any, secret: str = SECRET) -> int:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    headers = sandbox_wire.headers(secret.encode(), "POST", "/hook", raw)
    return (await hook.take_hook(till.engine, till.providers, "sandbox", headers, raw)).status


async def test_evidence_that_does_not_fit_is_refused_and_changes_nothing(till: Money) -> None:
    number = await till.reserve("ann")
    wrong: list[tuple[dict[str, Any], int]] = [
        ({"amount_minor": 1}, 422),
        ({"amount_minor": PRICE + 1}, 422),
        ({"currency": "USD"}, 422),
        ({"order_no": "SOMEBODYELSES"}, 422),
        ({"attempt_id": "NOSUCH-1"}, 422),
        ({"attempt_id": "NUL\0"}, 422),
        ({"merchant": "other"}, 401),
        ({"capture_ref": None}, 401),
        ({"paid_at": None}, 401),
        ({"paid_at": "2026-11-22T05:00:00"}, 401),
        ({"state": "waiting"}, 401),
        ({"type": "payment.declined", "order_no": "SOMEBODYELSES"}, 422),
    ]
    for changes, status in wrong:
        assert await _send(till, _hook(number, **changes)) == status, changes
        assert await till.state(number) == "reserved", changes
        assert await till.sql("SELECT 1 FROM capture") == [], changes
        assert await till.sql("SELECT 1 FROM webhook_inbox") == [], changes
    assert (
        await _send(till, _hook(number)) == 200
    )  # the true one is not locked out by the false ones' event id
    assert await till.state(number) == "paid"


async def test_what_a_call_back_says_of_a_person_is_not_kept(till: Money) -> None:
    """Bug: the whole body lay in the inbox; Stripe's has the payer's name, e-mail and number."""
    paid, declined = await till.reserve("ann"), await till.reserve("bob")
    person = {"customer_details": {"phone": "+8613812345678", "email": "ann@example.org"}}
    assert await _send(till, _hook(paid, **person)) == 200
    assert (
        await _send(till, _hook(declined, id="evt_2", type="payment.declined", state="declined", **person))
        == 200
    )
    rows = await till.sql("SELECT body FROM webhook_inbox")
    assert [len(row["body"]) for row in rows] == [32, 32]
    assert not any(b"13812345678" in row["body"] or b"example.org" in row["body"] for row in rows)


async def test_forged_bent_and_foreign_call_backs_are_refused(till: Money) -> None:
    number = await till.reserve("ann")
    raw = msgspec.json.encode(_hook(number))
    headers = sandbox_wire.headers(SECRET.encode(), "POST", "/hook", raw)
    dice = random.Random(5)
    for _ in range(200):
        at = dice.randrange(len(raw) * 8)
        bent = bytearray(raw)
        bent[at // 8] ^= 1 << at % 8
        answer = await hook.take_hook(till.engine, till.providers, "sandbox", headers, bytes(bent))
        assert answer.status == 401
    assert await _send(till, raw, "somebody-else") == 401
    old = sandbox_wire.headers(SECRET.encode(), "POST", "/hook", raw, 1_600_000_000)
    assert (await hook.take_hook(till.engine, till.providers, "sandbox", old, raw)).status == 401
    assert (await hook.take_hook(till.engine, till.providers, "sandbox", {}, raw)).status == 401
    assert (await hook.take_hook(till.engine, till.providers, "paypal", headers, raw)).status == 404
    assert (
        await hook.take_hook(till.engine, till.providers, "sandbox", headers, b"x" * 100_000)
    ).status == 413
    assert await till.state(number) == "reserved"
    assert await till.sql("SELECT 1 FROM webhook_inbox") == []


async def test_call_backs_ten_times_each_shuffled_and_forged_have_one_effect_each(till: Money) -> None:
    await till.sql("UPDATE item SET total = 60")
    await till.link.call("HSET", "{sale:drop}:stock", "PH-128", 60)
    numbers = [await till.reserve(f"buyer{number}") for number in range(60)]
    bodies: list[tuple[str, str]] = []
    for index, number in enumerate(numbers):
        for copy in range(10):
            # Half of the copies are new events about the same capture.
            event = f"evt_{index}" if copy % 2 else f"evt_{index}_{copy}"
            bodies.append(
                (SECRET, msgspec.json.encode(_hook(number, id=event, capture_ref=f"cap_{index}")).decode())
            )
        bodies.append(("forged", msgspec.json.encode(_hook(number, capture_ref=f"forged_{index}")).decode()))
    random.Random(3).shuffle(bodies)
    places = asyncio.Semaphore(16)

    async def one(secret: str, body: str) -> int:
        async with places:
            return await _send(till, body.encode(), secret)

    statuses = await asyncio.gather(*(one(*body) for body in bodies))
    assert statuses.count(200) == 600
    assert statuses.count(401) == 60
    assert await till.one("SELECT count(*) FROM capture WHERE state = 'kept'") == 60
    assert await till.one("SELECT count(*) FROM capture") == 60
    assert await till.one("SELECT count(*) FROM purchase_order WHERE state = 'paid'") == 60
    assert await till.one("SELECT count(*) FROM event WHERE type = 'order.paid'") == 60
    assert await till.units() == (0, 0, 60)


async def test_a_decline_that_arrives_after_the_payment_changes_nothing(till: Money) -> None:
    number = await till.reserve("ann")
    assert await _send(till, _hook(number)) == 200
    late = _hook(number, id="evt_0", type="payment.declined", state="declined", code="card_declined")
    assert await _send(till, late) == 200
    assert await till.state(number) == "paid"
    assert await till.attempts(number) == [("succeeded", None)]


async def test_a_call_back_that_cannot_be_committed_is_asked_for_again(till: Money) -> None:
    number = await till.reserve("ann")
    raw = msgspec.json.encode(_hook(number))
    headers = sandbox_wire.headers(SECRET.encode(), "POST", "/hook", raw)
    from app.ledger.engine import create_engine

    nowhere = create_engine(
        till.settings.model_copy(update={"database_url": "postgresql://x:y@127.0.0.1:9/none"})
    )
    assert (await hook.take_hook(nowhere, till.providers, "sandbox", headers, raw)).status == 503
    await nowhere.dispose()
    assert await _send(till, raw) == 200


# Late money


async def _paid_late(till: Money, number: str) -> None:
    """The buyer pays in the moment in which the link was closed: the supplier lets it through."""
    await till.shop.control(late_pay=True)
    await till.shop.press(await till.one("SELECT url FROM payment_attempt WHERE order_no = :no", no=number))


async def _linked(till: Money, buyer: str) -> str:
    number = await till.reserve(buyer)
    async with till.loops():
        await till.link_of(number)
    return number


async def test_late_money_cancels_a_release_that_was_not_sent(till: Money) -> None:
    number = await _linked(till, "ann")
    await till.end(number, relay=False)
    assert await till.state(number) == "expired"
    await _paid_late(till, number)
    async with till.loops():
        await till.becomes(number, "paid")
    assert await till.sql("SELECT state FROM outbox WHERE kind = 'release'") == [{"state": "dropped"}]
    assert await till.captures(number) == ["kept"]
    assert await till.units() == (4, 0, 1)
    await till.balanced()


async def test_late_money_takes_the_unit_again_when_nobody_waits(till: Money) -> None:
    number = await _linked(till, "ann")
    await till.end(number)
    assert await till.units() == (5, 0, 0)
    await _paid_late(till, number)
    async with till.loops():
        await till.becomes(number, "paid")
    assert await till.units() == (4, 0, 1)
    assert await till.captures(number) == ["kept"]
    assert await till.attempts(number) == [("succeeded", None)]
    await till.balanced()


async def test_late_money_for_a_unit_that_is_gone_is_refunded(till: Money) -> None:
    number = await _linked(till, "ann")
    await till.end(number)
    for buyer in ("bob", "cem", "dan", "eve", "fay"):
        await till.reserve(buyer, attempt=False)
    await _paid_late(till, number)
    async with till.loops():
        await till.becomes(number, "refunded")
    assert await till.captures(number) == ["refunded"]
    assert (await till.shop.stats())["refunded_minor"] == PRICE
    assert await till.units() == (0, 5, 0)
    types = [row["type"] for row in await till.sql("SELECT type FROM event ORDER BY written")]
    assert types == ["order.expired", "order.refunded"]
    await till.balanced()


async def test_late_money_of_a_buyer_with_another_live_order_is_refunded(till: Money) -> None:
    number = await _linked(till, "ann")
    await till.end(number)
    await till.sql(
        "INSERT INTO purchase_order (order_no, sale, sku, buyer_id, epoch, seq, units, amount_minor, currency, state,"
        " claimed_at, pay_within_s) SELECT 'OTHER', sale, sku, buyer_id, epoch, 99, 1, 0, currency, 'reserved',"
        " now(), 60 FROM purchase_order"
    )
    await _paid_late(till, number)
    async with till.loops():
        await till.becomes(number, "refunded")
    assert await till.captures(number) == ["refunded"]
    await till.relay()
    assert (await till.units())[0] == 5


async def test_late_money_waits_while_redis_is_away(till: Money) -> None:
    number = await _linked(till, "ann")
    await till.end(number)
    await _paid_late(till, number)
    await until(lambda: till.hook_answers)
    await till.link.close()
    from app.errors import DidNotHappen

    with pytest.raises(DidNotHappen):
        await evidence.weigh_late(till.engine, till.scripts)
    assert await till.captures(number) == ["due"]
    await till.link.start()
    async with till.loops():
        await till.becomes(number, "paid")
    await till.balanced()


async def test_a_second_capture_is_recorded_and_refunded(till: Money) -> None:
    number = await _linked(till, "ann")
    first = await till.one("SELECT url FROM payment_attempt")
    async with till.loops():
        assert await _ask(till, number, "sandbox-qr")
        second = await till.link_of(number, 2)
        await till.shop.control(late_pay=True)
        await till.shop.press(first)
        await till.becomes(number, "paid")
        await till.shop.press(second)
        await until(lambda: _captures_are(till, number, ["kept", "refunded"]))
    assert await till.state(number) == "paid"
    assert await till.units() == (4, 0, 1)
    await till.balanced()


async def _captures_are(till: Money, number: str, wanted: list[str]) -> bool:
    return await till.captures(number) == wanted


async def test_the_open_link_of_an_order_paid_by_an_older_one_is_closed(till: Money) -> None:
    number = await _linked(till, "ann")
    first = await till.one("SELECT url FROM payment_attempt")
    async with till.loops():
        assert await _ask(till, number, "sandbox-qr")
        second = await till.link_of(number, 2)
        await till.shop.control(late_pay=True)
        await till.shop.press(first)
        await till.shop.control(late_pay=False)
        await until(lambda: _states_are(till, number, ["succeeded", "closed"]))
        assert (await till.shop.press(second)).status_code == 410
    await till.balanced()


async def _states_are(till: Money, number: str, wanted: list[str]) -> bool:
    return [state for state, _ in await till.attempts(number)] == wanted


async def test_two_workers_and_an_expiry_that_race_for_late_money_settle_it_once(till: Money) -> None:
    numbers = []
    for buyer in ("ann", "bob", "cem"):
        numbers.append(await _linked(till, buyer))
        await till.end(numbers[-1])
    await till.shop.control(late_pay=True)
    for row in await till.sql("SELECT url FROM payment_attempt"):
        await till.shop.press(row["url"])
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(evidence.weigh_late(till.engine, till.scripts))
            group.create_task(till.relay())
    async with till.loops():
        for number in numbers:
            await till.becomes(number, "paid")
    await till.balanced()
    assert await till.units() == (2, 0, 3)


# Clearing before an order ends


@pytest.mark.parametrize("state", ["created", "sent", "paid"])
async def test_clearing_says_what_may_still_arrive(till: Money, state: str) -> None:
    number = await till.reserve("ann") if state == "created" else await _linked(till, "ann")
    if state == "paid":
        till.hooks_on = False
        await till.shop.press(await till.one("SELECT url FROM payment_attempt"))
    cleared = await pay.clear_attempts(till.engine, till.providers, number)
    assert cleared == ("paid" if state == "paid" else "clear")
    assert await till.state(number) == ("paid" if state == "paid" else "reserved")
    async with till.engine.begin() as conn:
        assert not await payments.has_open(conn, number)


async def test_clearing_waits_for_a_worker_that_is_calling(till: Money) -> None:
    number = await till.reserve("ann")
    async with till.engine.begin() as conn:
        await payments.lease_starts(conn, "sandbox", 10, 30)
    assert await pay.clear_attempts(till.engine, till.providers, number) == "unknown"


# Refunds


async def _paid(till: Money, buyer: str = "ann") -> str:
    number = await till.reserve(buyer)
    async with till.loops():
        await till.shop.press(await till.link_of(number))
        await till.becomes(number, "paid")
    return number


async def _refund(till: Money, number: str, amount: int | None = None, restock: bool = False) -> Any:
    async with till.engine.begin() as conn:
        return await refunds.ask(conn, number, amount, restock, "operator")


@pytest.mark.parametrize("restock", [True, False])
async def test_a_refund_gives_the_money_back_and_the_unit_if_asked(till: Money, restock: bool) -> None:
    number = await _paid(till)
    asked = await _refund(till, number, restock=restock)
    assert isinstance(asked, refunds.RefundAsked)
    assert asked.order["state"] == "refunding"
    assert await _refund(till, number) == refunds.RefundRefused("not_paid")
    async with till.loops():
        await till.becomes(number, "refunded")
    await till.relay()
    assert await till.units() == ((5, 0, 0) if restock else (4, 0, 1))
    assert await till.captures(number) == ["refunded"]


async def test_a_part_goes_back_and_lowers_the_order(till: Money) -> None:
    number = await _paid(till)
    assert await _refund(till, number, PRICE + 1) == refunds.RefundRefused("amount_wrong")
    assert await _refund(till, number, 0) == refunds.RefundRefused("amount_wrong")
    assert await _refund(till, number, 100, restock=True) == refunds.RefundRefused("restock_needs_whole")
    assert isinstance(await _refund(till, number, 900), refunds.RefundAsked)
    async with till.loops():
        await until(lambda: _amount_is(till, number, PRICE - 900))
    assert await till.state(number) == "paid"
    await till.balanced()
    assert isinstance(await _refund(till, number, restock=True), refunds.RefundAsked)
    async with till.loops():
        await till.becomes(number, "refunded")
    assert (await till.shop.stats())["refunded_minor"] == PRICE
    await till.balanced()


async def _amount_is(till: Money, number: str, amount: int) -> bool:
    order = (await till.sql("SELECT amount_minor FROM purchase_order WHERE order_no = :no", no=number))[0]
    lines = await till.one("SELECT sum(amount_minor) FROM order_line WHERE order_no = :no", no=number)
    return bool(order["amount_minor"] == lines == amount)


@hasty
async def test_a_refund_whose_answer_was_lost_is_made_once(till: Money) -> None:
    number = await _paid(till)
    till.hooks_on = False
    await till.shop.control(payments={"lost_rate": 1, "only": ["refund"]})
    await _refund(till, number)
    async with till.loops():
        await until(lambda: till.shop.state.refunds)
        await till.shop.control(payments={"lost_rate": 0})
        await till.becomes(number, "refunded")
    assert (await till.shop.stats())["refunded"] == 1
    await till.balanced()


async def test_a_refund_that_is_refused_for_good_calls_a_person(till: Money) -> None:
    number = await _paid(till)
    await _refund(till, number)
    till.shop.state.by_capture.clear()  # the supplier has forgotten it
    async with till.loops():

        async def failed() -> bool:
            return bool(await till.one("SELECT state = 'failed' FROM refund"))

        await until(failed)
    assert await till.state(number) == "paid"  # as its money is still with us
    assert await till.captures(number) == ["kept"]
    assert isinstance(await _refund(till, number), refunds.RefundAsked)


async def test_a_pending_refund_is_looked_at_until_it_is_done(till: Money) -> None:
    number = await _paid(till)
    await till.shop.control(refund_pending_ms=300)
    await _refund(till, number)
    async with till.loops():
        await till.becomes(number, "refunded")
    await till.balanced()


async def test_a_refund_that_comes_back_after_it_was_done_calls_a_person_once(
    till: Money, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(hook, "alert", lambda kind, _text, **_facts: called.append(kind))
    number = await _paid(till)
    await _refund(till, number)
    async with till.loops():
        await till.becomes(number, "refunded")
    refund_id = await till.one("SELECT id FROM refund")
    gone = HookRefundFailed(event_id="evt_gone", refund_id=refund_id, code="refund_failed")
    for outcome in ("refund_failed", "duplicate"):
        async with till.engine.begin() as conn:
            assert await hook._take(conn, "sandbox", gone, b"{}") == outcome
    nobodys = HookRefundFailed(event_id="evt_2", refund_id="R-0", code="refund_failed")
    async with till.engine.begin() as conn:
        assert await hook._take(conn, "sandbox", nobodys, b"{}") == "known"
    assert called == ["refund_came_back"]
    assert await till.state(number) == "refunded"


# The whole, under a bad supplier


@hasty
async def test_thirty_orders_through_a_supplier_that_does_everything_wrong(
    till: Money, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pay, "POLL_FIRST_S", 0.5)
    monkeypatch.setattr(leased, "RETRY_MAX_S", 1.0)
    await till.sql("UPDATE item SET total = 30")
    await till.link.call("HSET", "{sale:drop}:stock", "PH-128", 30)
    await till.shop.control(
        payments={
            "latency_ms": 5,
            "error_rate": 0.15,
            "lost_rate": 0.1,
            "hang_rate": 0.05,
            "refuse_rate": 0.1,
        },
        hooks={"copies": 3, "shuffle_ms": 300, "drop_rate": 0.3, "forge_rate": 0.3},
        auto_pay={"share": 1.0, "delay_ms": 20, "jitter_ms": 100, "seed": 11},
        late_pay=True,
    )
    till.providers.payment["sandbox"].guard.breaker.set_mode("metrics_only")
    numbers = [await till.reserve(f"buyer{number}") for number in range(30)]
    async with till.loops():
        await until(lambda: till.shop.state.counts["calls_create"] >= 25)
        await till.shop.control(payments={"error_rate": 0, "lost_rate": 0, "hang_rate": 0, "refuse_rate": 0})
        for number in numbers:
            await until(lambda number=number: _is_paid(till, number))

        async def quiet() -> bool:
            due = await till.one("SELECT count(*) FROM capture WHERE state IN ('due', 'refund_due')")
            opened = await till.one(
                "SELECT count(*) FROM payment_attempt WHERE state IN ('created', 'sent', 'unknown', 'wanted')"
            )
            booked = await till.one("SELECT count(*) FROM capture")
            return due == opened == 0 and booked == till.shop.state.counts["captured"]

        await until(quiet)
    await till.balanced()
    assert (await till.shop.stats()).get("forged_taken", 0) == 0
    assert await till.units() == (0, 0, 30)


async def _is_paid(till: Money, number: str) -> bool:
    return await till.state(number) == "paid"


async def test_an_unpaid_order_is_swept_up_when_the_link_is_due(till: Money) -> None:
    """An operator cancels while a link is out: the loop closes it at the supplier."""
    number = await _linked(till, "ann")
    async with till.engine.begin() as conn:
        assert await orders.cancel(conn, number, "operator") is not None
    await till.sql("UPDATE payment_attempt SET next_at = now()")
    async with till.loops():
        await until(lambda: _attempts_are(till, number, [("closed", "not_payable")]))
    assert next(iter(till.shop.state.pays.values())).state == "closed"
    await till.balanced()


async def test_a_link_that_ends_before_an_extended_deadline_is_followed_by_another_by_itself(
    supplier: Shop, redis_url: str, database_url: str
) -> None:
    """Prevents an extension that helps nobody: the link was made for the deadline of before and ends with it."""
    async with money(supplier, redis_url, database_url) as till:
        await till.publish(pay_within_s=6)
        number = await till.reserve("ann")
        async with till.loops():
            first = await till.link_of(number)
            await till.sql("UPDATE purchase_order SET pay_by = pay_by + interval '60 s', extended_s = 60")
            second = await till.link_of(number, attempt_no=2)
            assert second != first
            await till.shop.press(second)
            await till.becomes(number, "paid")
        assert (await till.attempts(number))[1] == ("succeeded", None)
        await till.balanced()
