"""The buyer's page in a browser, on a phone: one tap without a network, a second tab, the payment, and back.

`pytest -m long tests/story/test_the_page.py`; Chromium must be on PATH. Not part of `make test`: see the marker `long`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.story.browser import Browser, Page, find_chromium
from tests.story.conftest import Town
from tests.story.people import until

WITHIN_S = 60.0  # a browser shares the processor with everything else here

pytestmark = pytest.mark.long


async def shown(page: Page, selector: str) -> None:
    await until(lambda: page.sees(selector), bool, WITHIN_S)


async def told(page: Page, words: str) -> str:
    return await until(page.text, lambda seen: words in seen, WITHIN_S)


async def test_lin_gets_a_phone_with_one_tap_on_a_bad_network(town: Town, tmp_path: Path) -> None:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on PATH")
    sale = await town.operator.publishes_a_sale(
        units=1, opens_in_s=0.0, challenge="pow", limit_per_buyer=1, **{"pass": "required"}
    )
    address = f"{town.urls.front}/s/{sale}"
    async with Browser(chromium, tmp_path / "profile") as browser:
        page = await browser.page(address, width=390, height=844, language="zh-CN")
        await shown(page, "#go")

        # A number with a figure missing is not dropped in silence; without its country it is taken as one of China's.
        await page.js("document.getElementById('phone').value = '1381234567'")
        await page.taps("#go")
        await told(page, "手机号有误")
        await page.js("document.getElementById('phone').value = '138 1234 5678'")

        # The network is gone just when she taps. The page says so, and asks again until it is back.
        await page.offline(True)
        await page.taps("#go")
        await told(page, "网络不稳定")
        await page.offline(False)
        await shown(page, "#pay")
        assert "名额已为您保留" in await page.text()
        orders = await town.operator.sees_orders(sale)
        assert [row["state"] for row in orders] == ["reserved"]

        # Another tab, on a larger screen and in English, shows the same place: it is hers, not the tab's.
        other = await browser.page(address, width=1280, height=800, language="en")
        await told(other, "It is yours. Please pay.")
        assert orders[0]["order_no"] in await other.text()

        # The supplier's page, and by its call-back the order is paid, whatever the phone shows meanwhile.
        await page.js("document.getElementById('pay').click()")
        await told(page, "Sandbox supplier")
        await page.taps("button")
        await told(other, "Paid. Thank you!")
        await page.call("Page.navigate", url=address)
        await told(page, "支付成功")
        assert not await page.sees("#go") and not await page.sees("#pay")
