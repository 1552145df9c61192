"""Aliyun's SMS adapter against a stand-in that checks ACS3-HMAC-SHA256 from the raw request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse, Response

from app.breaker import Result
from app.errors import CannotStart
from app.providers.aliyun_sms import AliyunSms, authorization, canonical_query
from app.providers.answer import Done, MaybeDone, NotDone, Refused
from app.providers.sms import Sent, Text
from app.providers.templates import Templates
from tests.providers.standins import loopback
from tests.providers.standins.sms_apis import AliyunApi

TEMPLATES = (
    '{"reserved.zh-CN": ["SMS_1", "order_no", "minutes"], "reserved.en": ["SMS_2"],'
    ' "paid": ["SMS_3", "order_no"], "expired": null, "cancelled": null, "refunded": null}'
)
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def api() -> Iterator[AliyunApi]:
    api = AliyunApi()
    with loopback.serve(api.app()) as api.url:
        yield api


@pytest.fixture
async def sms(api: AliyunApi) -> AsyncIterator[AliyunSms]:
    adapter = adapter_of(api)
    yield adapter
    await adapter.aclose()


def adapter_of(api: AliyunApi, **changes: Any) -> AliyunSms:
    values: dict[str, Any] = {
        "key_id": api.key_id,
        "key_secret": api.key_secret,
        "signature": "闪购",
        "templates": Templates(TEMPLATES, "FAIRDROP_ALIYUN_SMS_TEMPLATES"),
        "deadline_s": 20.0,
        "connections_max": 4,
        "url": api.url,
    }
    return AliyunSms(**{**values, **changes})


def text(**changes: Any) -> Text:
    values: dict[str, Any] = {
        "id": "ORDER1-reserved",
        "phone": "+8613800138000",
        "language": "zh-CN",
        "template": "reserved",
        "body": "您的订单 ORDER1 请在 12:15 前付款",
        "params": {"order_no": "A B+C*~/é", "minutes": "12:15", "unused": "x"},
    }
    return Text(**{**values, **changes})


def test_our_signature_is_the_sdks() -> None:
    # Made once by alibabacloud-tea-openapi 0.4.6 (Utils.get_authorization) from the same request.
    headers = {
        "host": "dysmsapi.aliyuncs.com",
        "x-acs-action": "SendSms",
        "x-acs-content-sha256": EMPTY_SHA256,
        "x-acs-date": "2026-11-11T12:00:00Z",
        "x-acs-signature-nonce": "n0nce",
        "x-acs-version": "2017-05-25",
    }
    query = canonical_query(
        {
            "PhoneNumbers": "13800138000",
            "SignName": "闪购",
            "TemplateCode": "SMS_1",
            "TemplateParam": '{"order_no":"A B+C*~/"}',
            "OutId": "x-1",
        }
    )
    assert authorization("LTAI", "secret", "POST", "/", query, headers, b"") == (
        "ACS3-HMAC-SHA256 Credential=LTAI,"
        "SignedHeaders=host;x-acs-action;x-acs-content-sha256;x-acs-date;x-acs-signature-nonce;x-acs-version,"
        "Signature=19d11a2b22cb24f5ea4f17bacf4b96df2d28c5e7c070072b814d28bfdb8e273d"
    )


async def test_a_text_is_sent_as_its_approved_template(api: AliyunApi, sms: AliyunSms) -> None:
    assert await sms.send(text()) == Done(Sent("1^0"))
    assert api.sent == [
        {
            "PhoneNumbers": "13800138000",
            "SignName": "闪购",
            "TemplateCode": "SMS_1",
            "TemplateParam": '{"order_no":"A B+C*~/é","minutes":"12:15"}',
            "OutId": "ORDER1-reserved",
        }
    ]


async def test_numbers_abroad_keep_their_country_code(api: AliyunApi, sms: AliyunSms) -> None:
    await sms.send(text(phone="+85291234567", language="en-GB"))
    assert (api.sent[0]["PhoneNumbers"], api.sent[0]["TemplateCode"]) == ("85291234567", "SMS_2")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"template": "expired"}, "template_missing"),
        ({"language": "fr"}, "template_missing"),
        ({"params": {"order_no": "A"}}, "template_value_missing"),
    ],
)
async def test_without_a_template_another_supplier_may(
    api: AliyunApi, sms: AliyunSms, change: dict[str, Any], code: str
) -> None:
    assert await sms.send(text(**change)) == Refused(code, other_may=True)
    assert api.calls == []


async def test_a_template_without_a_language_serves_every_other(api: AliyunApi, sms: AliyunSms) -> None:
    assert isinstance(await sms.send(text(template="paid", language="fr")), Done)
    assert api.sent[0]["TemplateCode"] == "SMS_3"


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("isv.MOBILE_NUMBER_ILLEGAL", Refused("isv.MOBILE_NUMBER_ILLEGAL")),
        ("isv.BUSINESS_LIMIT_CONTROL", NotDone("isv.BUSINESS_LIMIT_CONTROL", 60_000, Result.IGNORED)),
        ("isv.SECURITY_FROZEN_ACCOUNT", NotDone("isv.SECURITY_FROZEN_ACCOUNT")),
        ("isv.PORT_NOT_REGISTERED", Refused("isv.PORT_NOT_REGISTERED", other_may=True)),
        ("isv.SMS_TEMPLATE_ILLEGAL", Refused("isv.SMS_TEMPLATE_ILLEGAL", other_may=True)),
        ("isv.AMOUNT_NOT_ENOUGH", NotDone("isv.AMOUNT_NOT_ENOUGH")),
        ("isv.DAY_LIMIT_CONTROL", NotDone("isv.DAY_LIMIT_CONTROL")),
        ("isp.RAM_PERMISSION_DENY", NotDone("isp.RAM_PERMISSION_DENY")),
        ("isp.SYSTEM_ERROR", MaybeDone("isp.SYSTEM_ERROR")),
        ("Throttling.User", NotDone("Throttling.User", counts=Result.IGNORED)),
    ],
)
async def test_a_business_code_has_one_meaning(
    api: AliyunApi, sms: AliyunSms, code: str, answer: object
) -> None:
    api.next_code = code
    assert await sms.send(text()) == answer
    assert api.sent == []


@pytest.mark.parametrize(
    ("status", "code", "answer"),
    [
        (400, "InvalidTimeStamp.Expired", NotDone("InvalidTimeStamp.Expired")),
        (403, "Forbidden.RAM", NotDone("Forbidden.RAM")),
        (429, "Throttling", NotDone("Throttling", counts=Result.IGNORED)),
        (500, "InternalError", MaybeDone("InternalError")),
        (503, "ServiceUnavailable", MaybeDone("ServiceUnavailable")),
        (502, None, MaybeDone("http_502")),
        (200, None, MaybeDone("malformed_answer")),
    ],
)
async def test_a_gateways_answer_has_one_meaning(
    api: AliyunApi, sms: AliyunSms, status: int, code: str | None, answer: object
) -> None:
    api.faults.refuse(
        JSONResponse({"Code": code, "Message": "x"}, status) if code else Response(b"<html>", status)
    )
    assert await sms.send(text()) == answer


async def test_keys_that_are_wrong_send_nothing_and_another_supplier_can(api: AliyunApi) -> None:
    for change in ({"key_secret": "other"}, {"key_id": "other"}):
        stranger = adapter_of(api, **change)
        assert isinstance(await stranger.send(text()), NotDone)
        await stranger.aclose()
    assert api.sent == []


async def test_no_answer_is_unknown_and_no_connection_is_not_done(api: AliyunApi) -> None:
    slow, nobody = adapter_of(api, deadline_s=0.2), adapter_of(api, url="http://127.0.0.1:1")
    api.faults.stall(0.6)
    assert isinstance(await slow.send(text()), MaybeDone)
    assert len(api.sent) == 1
    assert isinstance(await nobody.send(text()), NotDone)
    await slow.aclose()
    await nobody.aclose()


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_whatever_a_value_holds_the_query_reads_back(value: str) -> None:
    query = canonical_query({"A": value, "B~": "x"})
    assert dict(parse_qsl(query, keep_blank_values=True)) == {"A": value, "B~": "x"}


COMPLETE = '{"reserved": ["1"], "paid": ["2"], "expired": ["3"], "cancelled": null, "refunded.zh": ["4"]%s}'


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{", "JSON"),
        ("[]", "JSON"),
        ('{"paid": "SMS_1"}', "JSON"),
        ('{"paid": []}', "code"),
        ('{"paid": [""]}', "code"),
        ('{"paid": [1]}', "JSON"),
        ("", "no template for reserved.zh-CN, reserved.en, paid.zh-CN"),
        (COMPLETE % "", "no template for refunded.en;"),
        (COMPLETE % ', "refunded.en": ["5", "pay_by"]', "no value|value 'pay_by'"),
        (COMPLETE % ', "refunded.en": ["5"], "shipped": ["6"]', "no text 'shipped'"),
        (COMPLETE % ', "refunded.en": ["5"], "paid.fr": ["6"]', "'fr'"),
    ],
)
def test_bad_or_forgotten_templates_stop_the_start(bad: str, why: str) -> None:
    with pytest.raises(CannotStart, match=f"FAIRDROP_X.*({why})"):
        Templates(bad, "FAIRDROP_X")


def test_an_event_may_be_left_to_another_supplier_on_purpose() -> None:
    templates = Templates(COMPLETE % ', "refunded.en": ["5"]', "FAIRDROP_X")
    assert templates.named("cancelled", "en") is None
    assert templates.of(text(template="cancelled")) == Refused("template_missing", other_may=True)
    named = templates.named("refunded", "zh-CN")
    assert named is not None and named.code == "4"
