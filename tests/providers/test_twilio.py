"""Twilio's adapter against a stand-in; Twilio's own SDK is the judge of call-back signatures."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import Response

from app.breaker import Result
from app.errors import CannotStart
from app.providers.answer import Done, MaybeDone, NotDone, Refused
from app.providers.payment import HookForged
from app.providers.sms import SmsStatus, Text
from app.providers.twilio import Twilio, status_signature
from tests.providers.standins import loopback
from tests.providers.standins.bits import flips, header_flips
from tests.providers.standins.sms_apis import TwilioApi

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from twilio.request_validator import RequestValidator

STATUS_URL = "https://shop.example/v1/hooks/twilio?a=1"
SID = "SM" + "1" * 32


@pytest.fixture
def api() -> Iterator[TwilioApi]:
    api = TwilioApi()
    with loopback.serve(api.app()) as api.url:
        yield api


@pytest.fixture
async def twilio(api: TwilioApi) -> AsyncIterator[Twilio]:
    adapter = adapter_of(api)
    yield adapter
    await adapter.aclose()


def adapter_of(api: TwilioApi, **changes: Any) -> Twilio:
    values: dict[str, Any] = {
        "account_sid": api.account_sid,
        "auth_token": api.auth_token,
        "sender": "+15017122661",
        "deadline_s": 20.0,
        "connections_max": 4,
        "status_url": STATUS_URL,
        "url": api.url,
    }
    return Twilio(**{**values, **changes})


def text(**changes: Any) -> Text:
    values: dict[str, Any] = {
        "id": "ORDER1-reserved",
        "phone": "+15558675310",
        "language": "en",
        "template": "reserved",
        "body": "Pay & win = 100% – 付款",
    }
    return Text(**{**values, **changes})


async def test_a_text_is_sent_as_it_is(api: TwilioApi, twilio: Twilio) -> None:
    answer = await twilio.send(text())
    assert isinstance(answer, Done) and str(answer.value.provider_ref).startswith("SM")
    assert api.sent == [
        {
            "To": "+15558675310",
            "Body": "Pay & win = 100% – 付款",
            "From": "+15017122661",
            "StatusCallback": STATUS_URL,
        }
    ]


async def test_a_messaging_service_sends_under_its_own_number(api: TwilioApi) -> None:
    adapter = adapter_of(api, sender="MG" + "0" * 32, status_url="")
    await adapter.send(text())
    assert api.sent[0]["MessagingServiceSid"] == "MG" + "0" * 32
    assert "From" not in api.sent[0] and "StatusCallback" not in api.sent[0]
    await adapter.aclose()


@pytest.mark.parametrize(
    ("status", "number", "answer"),
    [
        (400, 21211, Refused("twilio_21211")),
        (400, 21610, Refused("twilio_21610")),
        (400, 21614, Refused("twilio_21614")),
        (400, 21408, Refused("twilio_21408", other_may=True)),
        (400, 21606, NotDone("twilio_21606")),
        (401, 20003, NotDone("twilio_20003")),
        (404, 20404, NotDone("twilio_20404")),
        (429, 20429, NotDone("twilio_20429", counts=Result.IGNORED)),
        (500, 20500, MaybeDone("twilio_20500")),
        (503, 20503, MaybeDone("twilio_20503")),
    ],
)
async def test_an_error_has_one_meaning(
    api: TwilioApi, twilio: Twilio, status: int, number: int, answer: object
) -> None:
    api.next_error = (status, number)
    assert await twilio.send(text()) == answer
    assert api.sent == []


async def test_bad_numbers_and_long_texts_are_refused(api: TwilioApi, twilio: Twilio) -> None:
    assert await twilio.send(text(phone="+1")) == Refused("twilio_21211")
    assert await twilio.send(text(body="x" * 1_601)) == Refused("text_too_long")
    assert len(api.calls) == 1


async def test_no_answer_is_unknown_and_no_connection_is_not_done(api: TwilioApi, twilio: Twilio) -> None:
    api.faults.stall(0.6)
    slow, nobody = adapter_of(api, deadline_s=0.2), adapter_of(api, url="http://127.0.0.1:1")
    stranger = adapter_of(api, auth_token="other")
    assert isinstance(await slow.send(text()), MaybeDone)
    assert isinstance(await nobody.send(text()), NotDone)
    assert await stranger.send(text()) == NotDone("twilio_20003")
    for adapter in (slow, nobody, stranger):
        await adapter.aclose()
    for body, status in ((b"<html>", 201), (b"", 502)):
        api.faults.refuse(Response(body, status))
        assert isinstance(await twilio.send(text()), MaybeDone)


def test_a_sender_is_needed() -> None:
    with pytest.raises(CannotStart, match="TWILIO"):
        adapter_of(TwilioApi(), sender="")


# -- status call-backs

API = TwilioApi()
READER = adapter_of(API)


def test_a_status_call_back_is_read_and_a_copy_is_the_same_event() -> None:
    headers, body = API.status_call(STATUS_URL, SID, "delivered")
    status = READER.read_status(headers, body)
    assert status == SmsStatus(
        event_id=f"{SID}:delivered", provider_ref=SID, status="delivered", arrived=True, code=None
    )
    assert READER.read_status(headers, body) == status
    failed = READER.read_status(*API.status_call(STATUS_URL, SID, "undelivered"))
    assert isinstance(failed, SmsStatus) and (failed.code, failed.arrived) == ("twilio_30003", False)
    assert failed.event_id != f"{SID}:delivered"


def test_twilios_own_sdk_verifies_what_we_verify() -> None:
    validator = RequestValidator(API.auth_token)
    headers, body = API.status_call(STATUS_URL, SID, "sent")
    fields = dict(parse_qsl(body.decode(), keep_blank_values=True))
    assert validator.validate(STATUS_URL, fields, headers["x-twilio-signature"])
    # The example of twilio.com/docs/usage/security
    url = "https://mycompany.com/myapp.php?foo=1&bar=2"
    params = {"CallSid": "CA1234567890ABCDE", "Caller": "+12349013030", "Digits": "1234", "From": "+12349013030",
              "To": "+18005551212"}  # fmt: skip
    assert status_signature(b"12345", url, params) == RequestValidator("12345").compute_signature(url, params)
    assert status_signature(b"12345", url, params) == "0/KCTR6DLpKmkAf8muzZqo1nDgQ="


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=20), max_size=6))
def test_we_and_the_sdk_sign_any_fields_alike(fields: dict[str, str]) -> None:
    assert status_signature(b"t", STATUS_URL, fields) == RequestValidator("t").compute_signature(
        STATUS_URL, fields
    )


def test_any_bit_flipped_in_a_status_call_back_is_refused() -> None:
    headers, body = API.status_call(STATUS_URL, SID, "delivered")
    for bent in flips(body):
        assert isinstance(READER.read_status(headers, bent), HookForged), bent
    for bent_headers in header_flips(headers, "x-twilio-signature"):
        assert isinstance(READER.read_status(bent_headers, body), HookForged)


def test_status_call_backs_of_others_are_refused() -> None:
    elsewhere = API.status_call("https://shop.example/other", SID, "delivered")
    assert READER.read_status(*elsewhere) == HookForged("signature_wrong")
    foreign = TwilioApi()
    foreign.account_sid = "AC" + "9" * 32
    assert READER.read_status(*foreign.status_call(STATUS_URL, SID, "delivered")) == HookForged(
        "merchant_wrong"
    )
    deaf = adapter_of(API, status_url="")
    assert deaf.read_status(*API.status_call("", SID, "delivered")) == HookForged("not_asked_for")
