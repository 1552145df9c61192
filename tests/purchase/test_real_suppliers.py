"""One order paid and refunded through each real supplier, on real Postgres and Redis and a stand-in of the supplier."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from app.ledger import orders, payments, refunds
from app.purchase import pay
from app.purchase.paying import hook, refund
from app.work import leased
from tests.providers.server import Shop, until
from tests.providers.standins import loopback
from tests.providers.standins.alipay_gateway import AlipayGateway
from tests.providers.standins.stripe_api import StripeApi
from tests.providers.standins.wechat_pay_api import WechatPayApi
from tests.purchase.money import PRICE, Money, money

Signed = tuple[dict[str, str], bytes]


@dataclass
class Case:
    name: str
    channel: str
    settings: dict[str, Any]
    pay: Callable[[str, str], Signed]  # attempt id and link → the call-back of the payment
    refunded: Callable[[], int]
    api: Any = None


@contextlib.contextmanager
def stripe() -> Iterator[Case]:
    api = StripeApi()
    with loopback.serve(api.app()) as url:

        def buy(attempt_id: str, link: str) -> Signed:
            return api.signed(api.pay(link.rpartition("/")[2]))

        values = {"stripe_key": api.key, "stripe_hook_secrets": api.hook_secret, "stripe_url": url}
        values["stripe_return_url"] = "https://shop.example/done"
        yield Case(
            "stripe", "stripe", values, buy, lambda: sum(one["amount"] for one in api.refunds.values()), api
        )


@contextlib.contextmanager
def alipay() -> Iterator[Case]:
    api = AlipayGateway()
    with loopback.serve(api.app()) as url:
        api.url = url

        def buy(attempt_id: str, link: str) -> Signed:
            return api.signed(api.note(api.pay(api.open_link(link))))

        values = {
            "alipay_app_id": api.app_id,
            "alipay_seller_id": api.seller_id,
            "alipay_private_key": loopback.pem(api.merchant_key),
            "alipay_public_key": loopback.public_pem(api.key),
            "alipay_url": f"{url}/gateway.do",
        }
        yield Case("alipay", "alipay-wap", values, buy, lambda: sum(api.refunds.values()), api)


@contextlib.contextmanager
def wechat() -> Iterator[Case]:
    api = WechatPayApi()
    with loopback.serve(api.app()) as api.url:

        def buy(attempt_id: str, link: str) -> Signed:
            return api.signed(api.note("TRANSACTION.SUCCESS", api.pay(attempt_id)))

        values = {
            "wechat_pay_mchid": api.mchid,
            "wechat_pay_appid": api.appid,
            "wechat_pay_serial": api.merchant_serial,
            "wechat_pay_private_key": loopback.pem(api.merchant_key),
            "wechat_pay_apiv3_key": api.apiv3_key,
            "wechat_pay_url": api.url,
        }
        back = lambda: sum(one["amount"]["refund"] for one in api.refunds.values())  # noqa: E731
        yield Case("wechat-pay", "wechat-native", values, buy, back, api)


CASES = {"stripe": stripe, "alipay": alipay, "wechat-pay": wechat}


@pytest.fixture(params=list(CASES))
async def stage(
    request: pytest.FixtureRequest, redis_url: str, database_url: str
) -> AsyncIterator[tuple[Case, Money]]:
    with CASES[request.param]() as case:
        nobody = cast(Shop, SimpleNamespace(url="http://127.0.0.1:1"))
        values = {"payment_provider": case.name, "provider_deadline_s": 3.0, **case.settings}
        async with money(nobody, redis_url, database_url, **values) as till:
            await till.publish(pay_within_s=600)
            yield case, till


async def begun(case: Case, till: Money) -> str:
    """A reserved order whose buyer has asked to pay through this channel."""
    number = await till.reserve("ann", attempt=False)
    async with till.engine.begin() as conn:
        order = await orders.lock(conn, number)
        assert order is not None
        await payments.add_attempt(
            conn,
            order,
            provider=case.name,
            channel=case.channel,
            return_url=None,
            payer=None,
            state="created",
        )
    return number


async def test_an_order_is_paid_by_the_suppliers_call_back_once_and_refunded_once(
    stage: tuple[Case, Money],
) -> None:
    case, till = stage
    number = await begun(case, till)
    async with till.loops():
        link = await till.link_of(number)
        headers, body = await asyncio.to_thread(case.pay, f"{number}-1", link)
        bent = body[:-1] + bytes([body[-1] ^ 1])
        forged = await hook.take_hook(till.engine, till.providers, case.name, headers, bent)
        assert forged.status == 401
        assert await till.state(number) == "reserved"
        for _ in range(3):  # the supplier's duplicates
            answer = await hook.take_hook(till.engine, till.providers, case.name, headers, body)
            assert answer == till.providers.payment[case.name].hook_reply(True)
        assert await till.state(number) == "paid"
        assert await till.captures(number) == ["kept"]
        async with till.engine.begin() as conn:
            asked = await refunds.ask(conn, number, None, False, "damaged")
            assert isinstance(asked, refunds.RefundAsked)
        await till.becomes(number, "refunded")
    assert case.refunded() == PRICE
    assert await till.captures(number) == ["refunded"]


async def test_without_a_call_back_the_payment_is_found_by_query(
    stage: tuple[Case, Money], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pay, "POLL_FIRST_S", 0.2)
    case, till = stage
    number = await begun(case, till)
    async with till.loops():
        await asyncio.to_thread(case.pay, f"{number}-1", await till.link_of(number))
        await till.becomes(number, "paid")
    assert await till.captures(number) == ["kept"]


async def test_an_unpaid_order_is_not_given_away_while_its_link_can_still_be_paid(
    stage: tuple[Case, Money],
) -> None:
    case, till = stage
    number = await begun(case, till)
    async with till.loops():
        link = await till.link_of(number)
    cleared = await pay.clear_attempts(till.engine, till.providers, number)
    if case.name == "alipay":  # nobody has opened the link: Alipay cannot close what it has not heard of
        assert cleared == "unknown"
        await asyncio.to_thread(case.pay, f"{number}-1", link)

        async def found() -> bool:
            return await pay.clear_attempts(till.engine, till.providers, number) == "paid"

        await until(found)
        assert await till.state(number) == "paid"
    else:
        assert cleared == "clear"
        with pytest.raises(AssertionError):
            case.pay(f"{number}-1", link)


@pytest.mark.parametrize("becomes", ["CLOSED", "ABNORMAL"])
async def test_a_refund_that_the_supplier_gives_up_later_calls_a_person_and_is_not_asked_about_for_ever(
    redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    monkeypatch.setattr(leased, "RETRY_FIRST_S", 0.05)
    called: list[str] = []
    monkeypatch.setattr(refund, "alert", lambda kind, _text, **_facts: called.append(kind))
    with wechat() as case:
        nobody = cast(Shop, SimpleNamespace(url="http://127.0.0.1:1"))
        values = {"payment_provider": case.name, "provider_deadline_s": 3.0, **case.settings}
        async with money(nobody, redis_url, database_url, **values) as till:
            await till.publish(pay_within_s=600)
            number = await begun(case, till)
            case.api.refund_status = "PROCESSING"
            async with till.loops():
                link = await till.link_of(number)
                headers, body = await asyncio.to_thread(case.pay, f"{number}-1", link)
                await hook.take_hook(till.engine, till.providers, case.name, headers, body)
                async with till.engine.begin() as conn:
                    await refunds.ask(conn, number, None, False, "damaged")
                await until(lambda: case.api.refunds)
                assert await till.state(number) == "refunding" and not called
                for one in case.api.refunds.values():
                    one["status"] = becomes
                await until(lambda: called)
                if becomes == "CLOSED":
                    await till.becomes(number, "paid")  # as before: an operator may try again
                    assert called == ["refund_refused"]
                    assert await till.one("SELECT state FROM refund") == "failed"
                else:
                    for one in case.api.refunds.values():
                        one["status"] = "SUCCESS"  # somebody has dealt with it in the console
                    await till.becomes(number, "refunded")
                    assert set(called) == {"refund_stuck"}
