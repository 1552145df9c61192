"""Texts: at most once, still true when sent, in the buyer's language; phone numbers are seen by the supplier alone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec import structs
from structlog.testing import capture_logs

from app import texts
from app.breaker import Result, Rules
from app.keys import SaleKeys
from app.ledger import orders, sms
from app.providers import registry
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.guard import Guard, GuardedSms, GuardRules
from app.providers.routes import Routes
from app.providers.sms import Sent, Text
from app.purchase import tell
from app.texts import Kind
from app.work.lookout import Lookout
from tests.ledger.shop import looking_out
from tests.providers.server import Shop, sandbox, until
from tests.purchase.money import Money, hasty, money


@contextlib.asynccontextmanager
async def telling(till: Money) -> AsyncIterator[Lookout]:
    stopping = asyncio.Event()
    async with looking_out(till.engine) as lookout:
        running = asyncio.create_task(
            tell.run(till.engine, till.scripts, till.providers, till.settings, stopping, lookout)
        )
        try:
            yield lookout
        finally:
            stopping.set()
            await running


async def due(till: Money, template: str = "reserved", buyer: str = "ann") -> str:
    """An order with a text that is due."""
    number = await till.reserve(buyer, attempt=False, contact=True)
    await till.sql(
        "INSERT INTO sms (id, order_no, sale, template, state, expires_at)"
        " VALUES (:id, :no, 'drop', :template, 'due', now() + interval '60 s')",
        id=f"{number}-{template}",
        no=number,
        template=template,
    )
    return number


async def row(till: Money) -> dict[str, Any]:
    return (await till.sql("SELECT state, code, provider_ref, tries FROM sms"))[0]


async def becomes(till: Money, state: str) -> dict[str, Any]:
    async def holds() -> bool:
        return bool((await row(till))["state"] == state)

    await until(holds)
    return await row(till)


async def test_a_due_text_is_sent_once_in_the_buyers_language(till: Money) -> None:
    number = await due(till)
    async with telling(till):
        sent = await becomes(till, "sent")
    assert sent["provider_ref"].startswith("sms_")
    texts = await till.shop.texts()
    assert [text["phone"] for text in texts] == ["+8613800000001"]
    assert texts[0]["language"] == "zh-CN"
    assert number in texts[0]["body"]
    assert "199.00 CNY" in texts[0]["body"]


async def test_each_step_of_an_order_is_told(till: Money) -> None:
    number = await till.reserve("ann", attempt=False, contact=True)
    async with till.engine.begin() as conn:
        await orders.pay(conn, number)
    async with telling(till):
        await becomes(till, "sent")
    assert [text["template"] for text in await till.shop.texts()] == ["paid"]


async def test_what_is_no_longer_true_is_not_sent(till: Money) -> None:
    number = await due(till)
    await till.sql("UPDATE purchase_order SET state = 'paid' WHERE order_no = :no", no=number)
    async with telling(till):
        assert (await becomes(till, "dropped"))["code"] == "overtaken"
    assert await till.shop.texts() == []


@hasty
async def test_an_unknown_result_is_not_repeated(till: Money, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    lease_due = sms.lease_due

    async def counted(*args: Any) -> list[dict[str, Any]]:
        rows = await lease_due(*args)
        looks.append(len(rows))
        return rows

    monkeypatch.setattr(sms, "lease_due", counted)
    await till.shop.control(sms={"lost_rate": 1})
    await due(till)
    async with telling(till) as lookout:
        await becomes(till, "unknown")
        await till.shop.control(reset=True)
        before = len(looks)

        def looked() -> bool:
            lookout.ring_all()
            return len(looks) >= before + 3

        await until(looked)
    assert (await row(till))["state"] == "unknown"
    assert (await till.shop.stats())["calls_send"] == 1


async def test_what_was_certainly_not_sent_is_sent_again(till: Money) -> None:
    await till.shop.control(sms={"refuse_rate": 1})
    await due(till)
    async with telling(till):
        await until(lambda: till.shop.state.counts["calls_send"] >= 2)
        await till.shop.control(reset=True)
        await becomes(till, "sent")
    assert len(await till.shop.texts()) == 1


async def test_a_text_that_would_come_too_late_is_dropped(till: Money) -> None:
    await due(till)
    await till.sql("UPDATE sms SET expires_at = now()")
    async with telling(till):
        assert (await becomes(till, "dropped"))["code"] == "too_late"


async def test_every_text_keeps_to_the_setting_and_not_only_the_first(
    supplier: Shop, redis_url: str, database_url: str
) -> None:
    """Bug: FAIRDROP_SMS_TTL_S was obeyed for the text of confirm alone; the others were written with 900 s."""
    async with money(supplier, redis_url, database_url, sms_ttl_s=60) as till:
        await till.publish()
        number = await till.reserve("ann", attempt=False, contact=True)
        async with till.engine.begin() as conn:
            await orders.pay(conn, number)
        await till.sql("UPDATE sms SET created_at = now() - interval '61 s'")
        async with telling(till):
            assert (await becomes(till, "dropped"))["code"] == "too_late"
        assert await till.shop.texts() == []


async def test_a_worker_killed_while_sending_leaves_it_unknown(till: Money) -> None:
    await due(till)
    async with till.engine.begin() as conn:
        assert len(await sms.lease_due(conn, 10, 0.0, 900)) == 1
    async with telling(till):
        assert (await becomes(till, "unknown"))["code"] == "worker_gone"
    assert await till.shop.texts() == []


async def test_a_contact_that_cannot_be_opened_is_no_contact(till: Money) -> None:
    await due(till)
    await till.sql("UPDATE purchase_order SET buyer_id = 'bob'")  # sealed for ann
    with capture_logs() as logs:
        async with telling(till):
            assert (await becomes(till, "dropped"))["code"] == "no_contact"
    assert "contact_cannot_be_opened" in [entry["event"] for entry in logs]


async def test_no_phone_number_is_logged_or_stored_in_the_clear(till: Money) -> None:
    await till.shop.control(sms={"error_rate": 1})
    await due(till)
    with capture_logs() as logs:
        async with telling(till):
            await becomes(till, "unknown")
    assert "13800000001" not in repr(logs)
    for table in ("sms", "purchase_order", "event", "outbox"):
        assert "13800000001" not in repr(await till.sql(f"SELECT * FROM {table}"))
    assert "13800000001" not in repr(till.providers.sms["sandbox-sms"].guard.report())


@hasty
async def test_a_hanging_sms_supplier_holds_up_no_payment(till: Money) -> None:
    await till.shop.control(sms={"hang_rate": 1})
    for buyer in ("ann", "bob", "cem"):
        await due(till, buyer=buyer)
    number = await till.reserve("dan")
    async with telling(till), till.loops():
        await till.shop.press(await till.link_of(number))
        await till.becomes(number, "paid")


# Failover


class Supplier:
    """An SMS supplier that answers as it is told."""

    def __init__(self, name: str, *answers: Answer[Sent]) -> None:
        self.name, self.answers, self.sent = name, list(answers), list[Text]()

    async def send(self, text: Text) -> Answer[Sent]:
        self.sent.append(text)
        return self.answers.pop(0) if self.answers else Done(Sent(f"{self.name}-ref"))

    async def aclose(self) -> None:
        return None


def suppliers(till: Money, *found: Supplier) -> None:
    """These, in this order, instead of the sandbox."""
    # Each answer is one call's: how a guard repeats is a matter of tests/providers/test_guard.py.
    rules = structs.replace(registry.guard_rules(till.settings, "sms"), retries_max=0)
    till.providers.sms = {one.name: GuardedSms(one, Guard(one.name, "sms", rules)) for one in found}
    till.providers.routes = Routes({"sandbox": ()}, [one.name for one in found])


THROTTLED = NotDone("throttled", counts=Result.IGNORED)
ELSEWHERE, NOWHERE = Refused("no_template", other_may=True), Refused("bad_number")


@pytest.mark.parametrize("first", [NotDone("ConnectError"), THROTTLED, ELSEWHERE])
async def test_the_next_supplier_sends_what_the_first_certainly_did_not(
    till: Money, first: Answer[Sent]
) -> None:
    one, two = Supplier("one", first), Supplier("two")
    suppliers(till, one, two)
    await due(till)
    async with telling(till):
        sent = await becomes(till, "sent")
    assert (sent["provider_ref"], sent["tries"]) == ("two-ref", 1)
    assert (len(one.sent), len(two.sent)) == (1, 1)


@pytest.mark.parametrize(("first", "state"), [(MaybeDone("deadline"), "unknown"), (NOWHERE, "failed")])
async def test_no_other_supplier_is_given_what_may_have_been_sent_or_nobody_can_send(
    till: Money, first: Answer[Sent], state: str
) -> None:
    one, two = Supplier("one", first), Supplier("two")
    suppliers(till, one, two)
    await due(till)
    async with telling(till):
        await becomes(till, state)
    assert (len(one.sent), two.sent) == (1, [])


async def test_an_open_breaker_hands_on_and_costs_no_call(till: Money) -> None:
    one, two = Supplier("one"), Supplier("two")
    suppliers(till, one, two)
    till.providers.sms["one"].guard.breaker.set_mode("forced_open")
    await due(till)
    async with telling(till):
        assert (await becomes(till, "sent"))["provider_ref"] == "two-ref"
    assert one.sent == []


async def test_a_sick_channel_is_left_when_its_breaker_trips_and_found_again_by_itself(
    supplier: Shop, redis_url: str, database_url: str
) -> None:
    limits = {"sms_number_per_min": 100, "sms_number_per_hour": 100, "sms_number_per_day": 100}
    async with sandbox() as second:
        also = {"sms_also": "sandbox-sms-2", "sandbox_2_url": second.url}
        async with money(supplier, redis_url, database_url, **also, **limits) as till:
            await till.publish(units=2_000)
            buyers = itertools.count()
            quick = Rules(calls_min=2, open_ms=3_000, open_max_ms=3_000, probes_max=1)
            till.providers.sms["sandbox-sms"].guard = Guard("sandbox-sms", "sms", GuardRules(breaker=quick))

            async def arrive(at: Shop) -> bool:
                await asyncio.sleep(0.05)  # not a wait: some texts a second, until one arrives there
                await due(till, buyer=f"b{next(buyers)}")
                return bool(await at.texts())

            await supplier.control(
                sms={"error_rate": 1}
            )  # answers 500: nobody knows, so nobody else is asked
            async with telling(till):
                await until(lambda: arrive(second))
                unknown = await till.one("SELECT count(*) FROM sms WHERE state = 'unknown'")
                assert unknown >= 2  # what it takes to trip; from then on the other channel has them
                await supplier.control(reset=True)
                await until(lambda: arrive(supplier))
            assert await till.one("SELECT count(*) FROM sms WHERE tries > 1 AND state = 'unknown'") == 0
            every = [text["body"] for text in (*await supplier.texts(), *await second.texts())]
            assert len(every) == len(set(every))  # none by both


async def test_what_every_supplier_refuses_has_failed_and_is_on_the_ticket(till: Money) -> None:
    one, two = Supplier("one", ELSEWHERE), Supplier("two", ELSEWHERE)
    suppliers(till, one, two)
    number = await due(till)
    async with telling(till):
        assert (await becomes(till, "failed"))["code"] == "no_template"
        await until(lambda: shown(till, number))


async def shown(till: Money, number: str) -> str:
    """What the ticket shows instead of a text; '' if it shows none."""
    await till.relay()
    rows = await till.sql("SELECT seq FROM purchase_order WHERE order_no = :no", no=number)
    raw = await till.link.call("HGET", SaleKeys("drop").status, f"PH-128:{rows[0]['seq']}")
    return str(json.loads(raw.split(b"|", 2)[2]).get("text", "")) if raw else ""


async def test_with_every_channel_down_the_buyer_reads_the_text_on_the_ticket_until_they_are_back(
    supplier: Shop, redis_url: str, database_url: str
) -> None:
    async with money(supplier, redis_url, database_url, sms_shown_after_s=0.2) as till:
        await till.publish()
        await till.shop.control(sms={"refuse_rate": 1})
        number = await due(till)
        async with telling(till):
            text = str(await until(lambda: shown(till, number)))
            row = (await till.sql("SELECT state, shown FROM sms"))[0]
            assert (row["state"] in ("due", "sending"), row["shown"]) == (True, text)
            assert number in text and "恭喜" in text  # the buyer's language
            assert "13800000001" not in repr(await till.sql("SELECT * FROM sms"))
            await till.shop.control(reset=True)
            await becomes(till, "sent")
        assert [sent["body"] for sent in await till.shop.texts()] == [text]
        # Once the order has gone on, the ticket no longer says what was true before.
        async with till.engine.begin() as conn:
            await orders.pay(conn, number)
        await till.sql("DELETE FROM sms WHERE template = 'paid'")
        assert await shown(till, number) == ""


async def test_nothing_is_shown_of_a_text_that_was_sent_in_time(till: Money) -> None:
    number = await due(till)
    async with telling(till):
        await becomes(till, "sent")
    await till.sql("UPDATE sms SET created_at = now() - interval '1 h'")
    async with till.engine.begin() as conn:
        assert await sms.unshown(conn, 1, 10) == []
    assert await shown(till, number) == ""


# One-time codes

CODE = Kind({"en": "{order_no}", "zh-CN": "{order_no}"}, frozenset({"reserved"}), one_time=True)
PLAIN = texts.KINDS["reserved"]
ANSWERS: list[tuple[Answer[Sent], str, str]] = [
    (Done(Sent("x")), "sent", "sent"),
    (MaybeDone("deadline"), "unknown", "unknown"),
    (NOWHERE, "failed", "failed"),
    (ELSEWHERE, "next", "failed"),
    (NotDone("ConnectError"), "next", "failed"),
    (THROTTLED, "next", "failed"),
    (NotDone("breaker_open", 500, Result.IGNORED), "next", "next"),
    (NotDone("no_place", 0, Result.IGNORED), "next", "next"),
]


@pytest.mark.parametrize(("answer", "plain", "code"), ANSWERS)
def test_a_one_time_code_ends_with_the_first_call_that_left_us(
    answer: Answer[Sent], plain: str, code: str
) -> None:
    assert (tell.next_step(PLAIN, answer), tell.next_step(CODE, answer)) == (plain, code)


@pytest.mark.parametrize("answer", [answer for answer, _, _ in ANSWERS[:6]])
async def test_a_one_time_code_is_handed_to_one_supplier_once_whatever_it_answers(
    till: Money, monkeypatch: pytest.MonkeyPatch, answer: Answer[Sent]
) -> None:
    monkeypatch.setitem(texts.KINDS, "reserved", CODE)
    one, two = Supplier("one", answer), Supplier("two")
    suppliers(till, one, two)
    await due(till)

    async def ended() -> bool:
        return (await row(till))["state"] not in ("due", "sending")

    async with telling(till):
        await until(ended)
    assert (len(one.sent), two.sent) == (1, [])


# Limits of a number


async def test_a_text_too_many_for_a_number_waits_and_is_counted_once_however_often_it_is_tried(
    supplier: Shop, redis_url: str, database_url: str
) -> None:
    async with money(supplier, redis_url, database_url, sms_number_per_min=1) as till:
        await till.publish()
        one = Supplier("one", *[NotDone("refused")] * 2)
        suppliers(till, one)
        await due(till, buyer="ann")
        async with telling(till):
            await becomes(till, "sent")
            assert len(one.sent) == 3  # tried again twice: one text, counted once
            await due(till, buyer="bob")  # the same number
            await until(lambda: till.one("SELECT count(*) FROM sms WHERE code = 'limited'"))
        waiting = (await till.sql("SELECT state, tries, next_at > now() + interval '30 s' AS later FROM sms"
                                  " WHERE code = 'limited'"))[0]  # fmt: skip
        assert (waiting["state"], waiting["later"], len(one.sent)) == ("due", True, 3)
        keys = [key.decode() for key in await till.link.call("KEYS", "{sms:*")]
        assert len(keys) == 3 and not any("13800000001" in key for key in keys)
        await till.sql("UPDATE sms SET expires_at = now() WHERE state = 'due'")
        async with telling(till):
            await until(
                lambda: till.one("SELECT count(*) FROM sms WHERE state = 'dropped' AND code = 'limited'")
            )


async def test_without_redis_the_suppliers_own_limits_have_to_do(till: Money) -> None:
    await due(till)
    with capture_logs() as logs:
        await till.link.close()
        async with telling(till):
            await becomes(till, "sent")
    assert "sms_limits_not_asked" in [entry["event"] for entry in logs]


@pytest.mark.parametrize("language", ["zh-CN", "en"])
@pytest.mark.parametrize("template", sorted(texts.KINDS))
def test_every_template_is_there_in_every_language(language: str, template: str) -> None:
    body = texts.render(
        template,
        language,
        {
            "sale_title": "A {brace}\nand a very long title of a sale that goes on and on", "item_title": "Phone %s",
            "units": 2, "amount_minor": 19_905, "currency": "CNY", "pay_within_s": 900, "order_no": "ORDER1",
        },
    )  # fmt: skip
    assert "ORDER1" in body
    assert "\n" not in body
    assert "A {brace} and" in body


@pytest.mark.parametrize(
    ("wanted", "spoken"),
    [
        ("zh", "zh-CN"),
        ("zh-Hant-TW", "zh-CN"),
        ("EN-us", "en"),
        ("fr", "en"),
        (None, "zh-CN"),
        ("", "zh-CN"),
        ("zha", "en"),
    ],
)
def test_a_language_without_templates_is_english(wanted: str | None, spoken: str) -> None:
    assert texts.language_of(wanted) == spoken


@pytest.mark.parametrize(
    ("minor", "currency", "shown"),
    [
        (5, "CNY", "0.05 CNY"),
        (19_900, "USD", "199.00 USD"),
        (500, "JPY", "500 JPY"),
        (1_234, "KWD", "1.234 KWD"),
    ],
)
def test_money_has_the_decimals_of_its_currency(minor: int, currency: str, shown: str) -> None:
    assert texts.money(minor, currency) == shown
