"""Tencent Cloud's SMS adapter against a stand-in that checks TC3-HMAC-SHA256; its official SDK is the judge of both."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from starlette.responses import Response

from app.breaker import Result
from app.providers.answer import Done, MaybeDone, NotDone, Refused
from app.providers.sms import Sent, Text
from app.providers.templates import Templates
from app.providers.tencent_sms import CONTENT_TYPE, TencentSms, authorization
from tests.providers.standins import loopback
from tests.providers.standins.sms_apis import TencentApi

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tencentcloud.common.common_client import CommonClient
    from tencentcloud.common.credential import Credential
    from tencentcloud.common.http.request import RequestInternal
    from tencentcloud.common.profile.client_profile import ClientProfile
    from tencentcloud.common.profile.http_profile import HttpProfile


@pytest.fixture
def api() -> Iterator[TencentApi]:
    api = TencentApi()
    with loopback.serve(api.app()) as api.url:
        yield api


@pytest.fixture
async def sms(api: TencentApi) -> AsyncIterator[TencentSms]:
    adapter = adapter_of(api)
    yield adapter
    await adapter.aclose()


def adapter_of(api: TencentApi, **changes: Any) -> TencentSms:
    values: dict[str, Any] = {
        "secret_id": api.secret_id,
        "secret_key": api.secret_key,
        "app_id": "1400006666",
        "signature": "闪购",
        "templates": Templates(
            '{"reserved": ["1110", "minutes", "order_no"], "paid": null, "expired": null, "cancelled": null,'
            ' "refunded": null}',
            "FAIRDROP_TENCENT_SMS_TEMPLATES",
        ),
        "deadline_s": 20.0,
        "connections_max": 4,
        "url": api.url,
    }
    return TencentSms(**{**values, **changes})


def text(**changes: Any) -> Text:
    values: dict[str, Any] = {
        "id": "ORDER1-reserved",
        "phone": "+8613800138000",
        "language": "zh-CN",
        "template": "reserved",
        "body": "…",
        "params": {"order_no": "ORDER1", "minutes": "12:15"},
    }
    return Text(**{**values, **changes})


def test_the_sdk_signs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = ClientProfile("TC3-HMAC-SHA256", HttpProfile(endpoint="sms.tencentcloudapi.com"))
    client = CommonClient("sms", "2021-01-11", Credential("AKID", "key"), "ap-guangzhou", profile)
    monkeypatch.setattr("tencentcloud.common.abstract_client.time.time", lambda: 1_793_000_000.9)
    params = {"PhoneNumberSet": ["+8613800138000"], "SignName": "闪购"}
    request = RequestInternal("sms.tencentcloudapi.com", "POST", "/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client._build_req_with_tc3_signature("SendSms", params, request, {})
    body = json.dumps(params).encode()
    # The SDK writes the content type without a charset; both are allowed, and the one that is sent is signed.
    monkeypatch.setattr("app.providers.tencent_sms.CONTENT_TYPE", request.header["Content-Type"])
    ours = authorization("AKID", "key", "sms.tencentcloudapi.com", body, 1_793_000_000)
    assert ours == request.header["Authorization"]


async def test_the_stand_in_speaks_the_protocol_to_the_sdk_too(api: TencentApi) -> None:
    def call() -> dict[str, Any]:
        at = api.url.removeprefix("http://")
        profile = ClientProfile("TC3-HMAC-SHA256", HttpProfile("http", at))
        client = CommonClient(
            "sms", "2021-01-11", Credential(api.secret_id, api.secret_key), "ap-guangzhou", profile
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: dict[str, Any] = client.call_json("SendSms", {"PhoneNumberSet": ["+8613800138000"]})
        return found

    answer = await asyncio.to_thread(call)
    assert answer["Response"]["SendStatusSet"][0]["Code"] == "Ok"


async def test_a_text_is_sent_as_its_approved_template_with_the_values_in_order(
    api: TencentApi, sms: TencentSms
) -> None:
    assert await sms.send(text()) == Done(Sent("5000:1"))
    assert api.sent == [
        {
            "PhoneNumberSet": ["+8613800138000"],
            "SmsSdkAppId": "1400006666",
            "SignName": "闪购",
            "TemplateId": "1110",
            "TemplateParamSet": ["12:15", "ORDER1"],
            "SessionContext": "ORDER1-reserved",
        }
    ]
    assert CONTENT_TYPE.startswith("application/json")


async def test_without_a_template_another_supplier_may(api: TencentApi, sms: TencentSms) -> None:
    assert await sms.send(text(template="paid")) == Refused("template_missing", other_may=True)
    assert api.calls == []


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("FailedOperation.PhoneNumberInBlacklist", Refused("FailedOperation.PhoneNumberInBlacklist")),
        ("InvalidParameterValue.IncorrectPhoneNumber", Refused("InvalidParameterValue.IncorrectPhoneNumber")),
        (
            "LimitExceeded.PhoneNumberDailyLimit",
            NotDone("LimitExceeded.PhoneNumberDailyLimit", 60_000, Result.IGNORED),
        ),
        ("InternalError.SigVerificationFail", NotDone("InternalError.SigVerificationFail")),
        ("FailedOperation.TemplateIncorrectOrUnapproved",
         Refused("FailedOperation.TemplateIncorrectOrUnapproved", other_may=True)),
        ("FailedOperation.InsufficientBalanceInSmsPackage", NotDone("FailedOperation.InsufficientBalanceInSmsPackage")),
        ("LimitExceeded.AppDailyLimit", NotDone("LimitExceeded.AppDailyLimit")),
        ("InternalError.Timeout", MaybeDone("InternalError.Timeout")),
    ],
)  # fmt: skip
async def test_a_numbers_code_has_one_meaning(
    api: TencentApi, sms: TencentSms, code: str, answer: object
) -> None:
    api.next_status = code
    assert await sms.send(text()) == answer
    assert api.sent == []


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("AuthFailure.SignatureExpire", NotDone("AuthFailure.SignatureExpire")),
        (
            "UnauthorizedOperation.RequestIpNotInWhitelist",
            NotDone("UnauthorizedOperation.RequestIpNotInWhitelist"),
        ),
        ("RequestLimitExceeded", NotDone("RequestLimitExceeded", 1_000, Result.IGNORED)),
        ("InternalError", MaybeDone("InternalError")),
        ("InvalidParameter", Refused("InvalidParameter", other_may=True)),
    ],
)
async def test_a_requests_error_has_one_meaning(
    api: TencentApi, sms: TencentSms, code: str, answer: object
) -> None:
    api.next_error = code
    assert await sms.send(text()) == answer


async def test_what_cannot_be_read_is_unknown_and_no_connection_is_not_done(
    api: TencentApi, sms: TencentSms
) -> None:
    for body, status in ((b"<html>", 200), (b'{"Response":{"SendStatusSet":[]}}', 200), (b"", 502)):
        api.faults.refuse(Response(body, status))
        assert isinstance(await sms.send(text()), MaybeDone)
    api.faults.stall(0.6)
    slow, nobody = adapter_of(api, deadline_s=0.2), adapter_of(api, url="http://127.0.0.1:1")
    assert isinstance(await slow.send(text()), MaybeDone)
    assert isinstance(await nobody.send(text()), NotDone)
    stranger = adapter_of(api, secret_key="other")
    assert await stranger.send(text()) == NotDone("AuthFailure.SignatureFailure")
    for adapter in (slow, nobody, stranger):
        await adapter.aclose()
