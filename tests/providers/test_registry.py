"""Suppliers are opened from settings in order of preference, found by channel; or a sentence says what is missing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from app.errors import CannotStart
from app.providers.registry import PAYMENT, SMS, Providers, open_providers
from app.settings import SECRETS, Settings
from tests.providers.standins import loopback
from tests.providers.standins.wechat_pay_api import WechatPayApi

KEY = loopback.pem(loopback.rsa_key("alipay merchant"))
PUBLIC = loopback.public_pem(loopback.rsa_key("alipay"))
TEMPLATES = (
    '{"reserved": ["1", "minutes"], "paid": ["2"], "expired": ["3"], "cancelled": ["4"], "refunded": null}'
)
ALL: dict[str, Any] = {
    "env": "development",
    "payment_provider": "stripe",
    "payment_also": "alipay, wechat-pay,sandbox,stripe",
    "sms_provider": "aliyun-sms",
    "sms_also": "tencent-sms,twilio,sandbox-sms",
    "stripe_key": "sk_test",
    "stripe_hook_secrets": "whsec_a, whsec_b",
    "alipay_app_id": "2021",
    "alipay_seller_id": "2088",
    "alipay_private_key": KEY,
    "alipay_public_key": PUBLIC,
    "wechat_pay_mchid": "1900000109",
    "wechat_pay_appid": "wx1",
    "wechat_pay_serial": "5157",
    "wechat_pay_private_key": KEY,
    "wechat_pay_apiv3_key": WechatPayApi().apiv3_key,
    "aliyun_sms_key_id": "LTAI",
    "aliyun_sms_key_secret": "x",
    "aliyun_sms_signature": "闪购",
    "aliyun_sms_templates": TEMPLATES,
    "tencent_sms_secret_id": "AKID",
    "tencent_sms_secret_key": "x",
    "tencent_sms_app_id": "1400",
    "tencent_sms_signature": "闪购",
    "tencent_sms_templates": TEMPLATES,
    "twilio_account_sid": "AC1",
    "twilio_auth_token": "x",
    "twilio_sender": "+1501",
}


async def opened(**changes: Any) -> Providers:
    return open_providers(Settings(**{**ALL, **changes}))


async def test_all_suppliers_open_in_order_of_preference() -> None:
    providers = await opened()
    assert list(providers.payment) == ["stripe", "alipay", "wechat-pay", "sandbox"]
    assert list(providers.sms) == ["aliyun-sms", "tencent-sms", "twilio", "sandbox-sms"]
    assert len(providers.guards()) == 8
    await providers.aclose()


@pytest.mark.parametrize(
    ("channel", "name"),
    [
        ("stripe", "stripe"),
        ("stripe-embedded", "stripe"),
        ("alipay", "alipay"),
        ("alipay-qr", "alipay"),
        ("wechat-pay", "wechat-pay"),
        ("wechat-jsapi", "wechat-pay"),
        ("sandbox", "sandbox"),
        ("card", "stripe"),  # nobody's own word: the preferred supplier serves it
    ],
)
async def test_a_channel_finds_its_supplier(channel: str, name: str) -> None:
    providers = await opened()
    assert providers.payment_for(channel, "ORDER") == name
    await providers.aclose()


NEEDED = sorted(set(ALL) - {"env", "payment_provider", "payment_also", "sms_provider", "sms_also"})


@pytest.mark.parametrize("name", NEEDED)
async def test_a_missing_setting_of_a_supplier_in_use_is_named(name: str) -> None:
    with pytest.raises(CannotStart, match=f"FAIRDROP_{name.upper()}"):
        await opened(**{name: ""})


async def test_settings_of_suppliers_that_are_not_in_use_are_not_asked_for() -> None:
    providers = open_providers(Settings(env="development"))
    assert (list(providers.payment), list(providers.sms)) == (["sandbox"], ["sandbox-sms"])
    await providers.aclose()


@pytest.mark.parametrize("change", [{"payment_also": "paypal"}, {"sms_provider": "pigeon"}])
async def test_an_unknown_supplier_is_told_which_there_are(change: dict[str, str]) -> None:
    with pytest.raises(CannotStart, match=", ".join(PAYMENT if "payment_also" in change else SMS)):
        await opened(**change)


@pytest.mark.parametrize("token", ["short", "x" * 23, "with/slash-and-twenty-four"])
async def test_an_address_for_reports_that_could_be_guessed_stops_the_start(token: str) -> None:
    with pytest.raises(CannotStart, match="FAIRDROP_ALIYUN_SMS_REPORT_TOKEN"):
        await opened(aliyun_sms_report_token=token)


async def test_in_production_the_sandbox_needs_its_secret() -> None:
    with pytest.raises(CannotStart, match="FAIRDROP_SANDBOX_SECRET"):
        await opened(env="production")


def test_keys_come_from_files_and_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "stripe_key",
        "alipay_private_key",
        "alipay_public_key",
        "wechat_pay_apiv3_key",
        "twilio_auth_token",
    ):
        assert name in SECRETS
        (tmp_path / name).write_text(f"{name}-from-a-file\n")
        monkeypatch.setenv(f"FAIRDROP_{name.upper()}_FILE", str(tmp_path / name))
    settings = Settings()
    assert settings.stripe_key.get_secret_value() == "stripe_key-from-a-file"
    assert settings.alipay_public_key == "alipay_public_key-from-a-file"
    shown = repr(settings)
    for name in ("stripe_key", "alipay_private_key", "wechat_pay_apiv3_key", "twilio_auth_token"):
        assert f"{name}-from-a-file" not in shown


def test_addresses_with_phone_numbers_and_signatures_are_not_logged() -> None:
    assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
