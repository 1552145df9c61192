"""WeChat Pay's H5 must be told where the buyer pays from: it is, and nobody else is, and nothing of it stays."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from app.purchase import pay
from app.sealing import address_aad, payer_aad, seal, sealing_keys
from tests.providers.server import Shop, until
from tests.purchase.money import PII_KEY, SALE, Money, money
from tests.purchase.test_real_suppliers import Case, wechat

ADDRESS = "203.0.113.77"
OPENID = "oUpF8uMuAJO"
PAYER = {
    "sealed": base64.b64encode(
        seal(sealing_keys(PII_KEY), f'{{"openid":"{OPENID}"}}'.encode(), payer_aad(SALE, "ann"))
    ).decode()
}


@pytest.fixture
async def stage(redis_url: str, database_url: str) -> AsyncIterator[tuple[Case, Money]]:
    with wechat() as case:
        nobody = cast(Shop, SimpleNamespace(url="http://127.0.0.1:1"))
        values = {"payment_provider": case.name, "provider_deadline_s": 3.0, **case.settings}
        async with money(nobody, redis_url, database_url, **values) as till:
            await till.publish(pay_within_s=600)
            yield case, till


async def _ask(till: Money, number: str, channel: str, address: str) -> bool:
    async with till.engine.begin() as conn:
        return await pay.start_attempt(
            conn, number, channel=channel, return_url=None, payer=PAYER, providers=till.providers,
            address=address,
        )  # fmt: skip


def _sealed(buyer: str, address: str = ADDRESS) -> str:
    return base64.b64encode(seal(sealing_keys(PII_KEY), address.encode(), address_aad(SALE, buyer))).decode()


async def _payer(till: Money, number: str) -> Any:
    return await till.one("SELECT payer FROM payment_attempt WHERE order_no = :no", no=number)


async def test_h5_is_told_the_buyers_address_and_then_it_is_forgotten(stage: tuple[Case, Money]) -> None:
    case, till = stage
    number = await till.reserve("ann", attempt=False)
    assert await _ask(till, number, "wechat-h5", _sealed("ann"))
    assert ADDRESS not in str(await till.sql("SELECT * FROM payment_attempt"))
    assert set(await _payer(till, number)) == {"sealed", "address"}
    async with till.loops():
        await till.link_of(number)
    (wanted,) = [one for one in case.api.wanted if "scene_info" in one]
    assert wanted["scene_info"]["payer_client_ip"] == ADDRESS
    assert await _payer(till, number) == PAYER


@pytest.mark.parametrize(
    "payer", [PAYER, {"openid": OPENID}], ids=["sealed", "plain, as release N-1 wrote it"]
)
async def test_jsapi_is_told_who_pays(stage: tuple[Case, Money], payer: dict[str, str]) -> None:
    case, till = stage
    number = await till.reserve("ann", attempt=False)
    async with till.engine.begin() as conn:
        assert await pay.start_attempt(
            conn, number, channel="wechat-jsapi", return_url=None, payer=payer, providers=till.providers
        )
    async with till.loops():
        await until(lambda: _sent(till, number))
    assert [one["payer"] for one in case.api.wanted] == [{"openid": OPENID}]
    assert await _payer(till, number) == payer  # another link may be wanted


async def _sent(till: Money, number: str) -> bool:
    return (await till.attempts(number))[0][0] == "sent"


async def test_a_channel_that_needs_no_address_keeps_none(stage: tuple[Case, Money]) -> None:
    _, till = stage
    number = await till.reserve("ann", attempt=False)
    assert await _ask(till, number, "wechat-native", _sealed("ann"))
    assert await _payer(till, number) == PAYER
    assert not till.providers.wants_address("wechat-native") and till.providers.wants_address("wechat-h5")


@pytest.mark.parametrize(
    "address", [_sealed("bob"), "no base64", "x" * 10_000], ids=["somebody else's", "no base64", "too long"]
)
async def test_an_address_of_somebody_else_or_none_at_all_is_refused_and_forgotten(
    stage: tuple[Case, Money], address: str
) -> None:
    _, till = stage
    number = await till.reserve("ann", attempt=False)
    assert await _ask(till, number, "wechat-h5", address)
    async with till.loops():
        await until(lambda: _failed(till, number))
    assert await till.attempts(number) == [("failed", "payer_ip_missing")]
    assert await _payer(till, number) == PAYER


async def _failed(till: Money, number: str) -> bool:
    return (await till.attempts(number))[0][0] == "failed"
