"""Texts: at most once, still true when sent, in the buyer's language; phone numbers are seen by the supplier alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from app.ledger import orders, sms
from app.purchase import tell
from tests.providers.server import Shop, sandbox, until
from tests.purchase.money import Money, money


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    async with sandbox() as shop:
        yield shop


@pytest.fixture
async def till(shop: Shop, redis_url: str, database_url: str) -> AsyncIterator[Money]:
    async with money(shop, redis_url, database_url) as till:
        await till.publish()
        yield till


@contextlib.asynccontextmanager
async def telling(till: Money) -> AsyncIterator[None]:
    stopping = asyncio.Event()
    running = asyncio.create_task(tell.run(till.engine, till.providers, till.settings, stopping))
    try:
        yield
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
    async with telling(till):
        await becomes(till, "unknown")
        await till.shop.control(reset=True)
        before = len(looks)
        await until(lambda: len(looks) >= before + 3)
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


async def test_a_worker_killed_while_sending_leaves_it_unknown(till: Money) -> None:
    await due(till)
    async with till.engine.begin() as conn:
        assert len(await sms.lease_due(conn, 10, 0.0)) == 1
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


async def test_a_hanging_sms_supplier_holds_up_no_payment(till: Money) -> None:
    await till.shop.control(sms={"hang_rate": 1})
    for buyer in ("ann", "bob", "cem"):
        await due(till, buyer=buyer)
    number = await till.reserve("dan")
    async with telling(till), till.loops():
        await till.shop.press(await till.link_of(number))
        await till.becomes(number, "paid")


@pytest.mark.parametrize("language", ["zh-CN", "en"])
@pytest.mark.parametrize("template", sorted(tell.STILL_TRUE))
def test_every_template_is_there_in_every_language(language: str, template: str) -> None:
    body = tell.render(
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
    assert tell.language_of(wanted) == spoken


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
    assert tell.money(minor, currency) == shown
