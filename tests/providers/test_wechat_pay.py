"""WeChat Pay's adapter against a stand-in that checks every signature; the wechatpayv3 SDK is the judge of both."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse, Response

from app.breaker import Result
from app.errors import CannotStart
from app.providers import signing
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.guard import Guard, GuardedPayment, GuardRules
from app.providers.payment import (
    AttemptRef,
    Hook,
    HookClosed,
    HookForged,
    HookOther,
    HookPaid,
    HookRefunded,
    HookRefundFailed,
    Link,
    LinkWanted,
    Payment,
    RefundState,
    RefundWanted,
)
from app.providers.wechat_pay import WechatPay, bill_lines
from tests.providers.standins import loopback, wechat_pay_api
from tests.providers.standins.bits import flips, header_flips
from tests.providers.standins.wechat_pay_api import WechatPayApi

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import wechatpayv3
    from wechatpayv3 import utils as sdk

NOTIFY = "https://shop.example/v1/hooks/wechat-pay"


@pytest.fixture
def api() -> Iterator[WechatPayApi]:
    api = WechatPayApi()
    with loopback.serve(api.app()) as api.url:
        yield api


@pytest.fixture
async def wechat(api: WechatPayApi) -> AsyncIterator[WechatPay]:
    adapter = adapter_of(api)
    yield adapter
    await adapter.aclose()


def adapter_of(api: WechatPayApi, **changes: Any) -> WechatPay:
    values: dict[str, Any] = {
        "mchid": api.mchid,
        "appid": api.appid,
        "serial": api.merchant_serial,
        "private_key": loopback.pem(api.merchant_key),
        "apiv3_key": api.apiv3_key,
        "deadline_s": 20.0,
        "connections_max": 8,
        "url": api.url or "http://127.0.0.1:1",
    }
    if api.public_key_id:
        values |= {"public_key_id": api.public_key_id, "public_key": loopback.public_pem(api.public_key)}
    return WechatPay(**{**values, **changes})


def knowing(api: WechatPayApi, **changes: Any) -> WechatPay:
    """An adapter that has downloaded today's certificates, without a server."""
    adapter = adapter_of(api, **changes)
    adapter.keys.learn({serial: made for serial, (_, made) in api.certificates.items()}, datetime.now(UTC))
    return adapter


def wanted(attempt: str = "0123456789ABCDEFGHIJKLMN-1", **changes: Any) -> LinkWanted:
    values: dict[str, Any] = {
        "attempt_id": attempt,
        "order_no": attempt.partition("-")[0],
        "amount_minor": 8_888,
        "currency": "CNY",
        "title": "手机" * 60,
        "channel": "wechat-native",
        "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        "notify_url": NOTIFY,
    }
    return LinkWanted(**{**values, **changes})


def ref(attempt: str = "0123456789ABCDEFGHIJKLMN-1") -> AttemptRef:
    return AttemptRef(attempt_id=attempt, order_no=attempt.partition("-")[0])


NUMBER = ref().attempt_id


def value_of(answer: Answer[Any]) -> Any:
    assert isinstance(answer, Done), answer
    return answer.value


# -- the ways to pay


async def test_native_gives_a_code_to_scan(wechat: WechatPay) -> None:
    link: Link = value_of(await wechat.create(wanted()))
    assert link.kind == "qr" and link.url is not None and link.url.startswith("weixin://wxpay/")


async def test_h5_gives_a_page_that_comes_back_to_the_shop(wechat: WechatPay) -> None:
    want = wanted(
        channel="wechat-h5", payer={"client_ip": "203.0.113.7"}, return_url="https://shop.example/?a=1&b=2"
    )
    link: Link = value_of(await wechat.create(want))
    assert link.kind == "redirect" and link.url is not None
    assert link.url.endswith("&redirect_url=https%3A%2F%2Fshop.example%2F%3Fa%3D1%26b%3D2")


async def test_jsapi_gives_signed_parameters_for_the_page(api: WechatPayApi, wechat: WechatPay) -> None:
    link: Link = value_of(await wechat.create(wanted(channel="wechat-jsapi", payer={"openid": "oUpF8u"})))
    assert link.kind == "sdk" and link.url is None and link.params is not None
    params = link.params
    message = f"{params['appId']}\n{params['timeStamp']}\n{params['nonceStr']}\n{params['package']}\n"
    assert params["package"].startswith("prepay_id=wx")
    assert signing.verify(api.merchant_key.public_key(), message.encode(), params["paySign"])
    assert params["paySign"] == sdk.rsa_sign(
        api.merchant_key, message
    )  # the SDK signs the same to the same bytes


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"currency": "USD"}, "currency_not_supported"),
        ({"channel": "wechat-jsapi"}, "openid_missing"),
        ({"channel": "wechat-h5"}, "payer_ip_missing"),
        ({"notify_url": None}, "notify_url_missing"),
        ({"attempt": "A" * 33}, "attempt_id_not_usable"),
        ({"attempt": "中文-1234"}, "attempt_id_not_usable"),
    ],
)
async def test_what_wechat_pay_cannot_do_is_refused_before_any_call(
    api: WechatPayApi, wechat: WechatPay, change: dict[str, Any], code: str
) -> None:
    assert await wechat.create(wanted(**change)) == Refused(code, other_may=True)
    assert api.calls == []


async def test_a_payment_is_seen_with_its_money(api: WechatPayApi, wechat: WechatPay) -> None:
    await wechat.create(wanted())
    assert await wechat.query(ref()) == Done(Payment(state="waiting"))
    order = api.pay(NUMBER)
    payment: Payment = value_of(await wechat.query(ref()))
    assert payment.state == "paid" and payment.captured is not None
    assert payment.captured.provider_ref == order["transaction_id"]
    assert (payment.captured.amount_minor, payment.captured.currency) == (8_888, "CNY")
    assert payment.captured.order_no == "0123456789ABCDEFGHIJKLMN"
    assert await wechat.query(ref("NEVER1-1")) == Done(Payment(state="absent"))


@pytest.mark.parametrize(
    ("state", "ours"),
    [("USERPAYING", "waiting"), ("CLOSED", "closed"), ("REVOKED", "closed"), ("PAYERROR", "declined")],
)
async def test_each_trade_state_has_one_meaning(
    api: WechatPayApi, wechat: WechatPay, state: str, ours: str
) -> None:
    await wechat.create(wanted())
    api.orders[NUMBER]["trade_state"] = state
    assert value_of(await wechat.query(ref())).state == ours
    api.orders[NUMBER]["trade_state"] = "SOMETHING_NEW"
    assert await wechat.query(ref()) == MaybeDone("state_unknown")


async def test_closing_decides_whether_it_can_still_be_paid(api: WechatPayApi, wechat: WechatPay) -> None:
    await wechat.create(wanted())
    assert await wechat.close(ref()) == Done(Payment(state="closed"))
    assert await wechat.create(wanted()) == Refused("closed")
    await wechat.create(wanted("OTHER1-1"))
    api.pay("OTHER1-1")
    assert value_of(await wechat.close(ref("OTHER1-1"))).state == "paid"
    assert await wechat.create(wanted("OTHER1-1")) == Refused("paid")
    await wechat.create(wanted("OTHER2-1"))
    api.orders["OTHER2-1"]["trade_state"] = "USERPAYING"
    assert await wechat.close(ref("OTHER2-1")) == MaybeDone("not_closed", counts=Result.SUCCESS)
    assert await wechat.close(ref("NEVER1-1")) == Done(Payment(state="absent"))


# -- what answers mean


@pytest.mark.parametrize(
    ("status", "code", "answer"),
    [
        (400, "PARAM_ERROR", Refused("PARAM_ERROR")),
        (403, "RULE_LIMIT", Refused("RULE_LIMIT")),
        (401, "SIGN_ERROR", Refused("SIGN_ERROR", True, Result.FAILURE)),
        (403, "NO_AUTH", Refused("NO_AUTH", True, Result.FAILURE)),
        (429, "FREQUENCY_LIMITED", NotDone("FREQUENCY_LIMITED", counts=Result.IGNORED)),
        (500, "SYSTEM_ERROR", MaybeDone("SYSTEM_ERROR")),
        (502, None, MaybeDone("http_502")),
        (404, None, MaybeDone("http_404")),
    ],
)
async def test_an_error_is_not_done_refused_or_unknown(
    api: WechatPayApi, wechat: WechatPay, status: int, code: str | None, answer: object
) -> None:
    assert isinstance(await wechat.learn_keys(), Done)
    api.faults.refuse(
        JSONResponse({"code": code, "message": "x"}, status) if code else Response(b"<html>", status)
    )
    assert await wechat.create(wanted()) == answer


async def test_no_answer_is_unknown_and_no_connection_is_not_done(api: WechatPayApi) -> None:
    slow = knowing(api, deadline_s=0.2)
    slow.keys.learned_at = 1e12
    api.faults.stall(0.6)
    assert isinstance(await slow.create(wanted()), MaybeDone)
    assert NUMBER in api.orders
    await slow.aclose()
    nobody = knowing(api, url="http://127.0.0.1:1")
    assert isinstance(await nobody.create(wanted()), NotDone)
    await nobody.aclose()


async def test_an_answer_that_wechat_pay_did_not_sign_is_not_believed(
    api: WechatPayApi, wechat: WechatPay
) -> None:
    assert isinstance(await wechat.learn_keys(), Done)
    api.forge_answers = True
    assert await wechat.create(wanted()) == MaybeDone("answer_signature_wrong")
    api.forge_answers = False
    api.faults.lose(JSONResponse({"code_url": "weixin://forged"}))
    assert await wechat.create(wanted()) == MaybeDone("answer_signature_missing")


async def test_our_signature_is_made_anew_and_over_the_whole_request(
    api: WechatPayApi, wechat: WechatPay
) -> None:
    for _ in range(3):
        assert isinstance(await wechat.query(ref()), Done)
    assert len(api.nonces) == len(api.calls)
    stranger = adapter_of(api, private_key=loopback.pem(loopback.rsa_key("somebody else")))
    answer = await stranger.create(wanted())
    assert isinstance(answer, Refused) and answer.counts is Result.FAILURE
    await stranger.aclose()


def test_the_sdk_builds_the_same_authorization(monkeypatch: pytest.MonkeyPatch) -> None:
    api = WechatPayApi()
    monkeypatch.setattr(
        "app.providers.wechat_pay.secrets.token_hex", lambda size: "593BEC0C930BF1AFEB40B4A08C8FB242"
    )
    monkeypatch.setattr("app.providers.wechat_pay.time.time", lambda: 1_554_208_460.5)
    monkeypatch.setattr("wechatpayv3.utils.time.time", lambda: 1_554_208_460.5)
    body = json.dumps({"amount": {"total": 1}, "描述": "手机"}, ensure_ascii=False)
    target = "/v3/pay/transactions/out-trade-no/A-1?mchid=1900000109"
    ours = adapter_of(api)._authorization("POST", target, body.encode())
    theirs = sdk.build_authorization(
        target,
        "POST",
        api.mchid,
        api.merchant_serial,
        api.merchant_key,
        body,
        "593BEC0C930BF1AFEB40B4A08C8FB242",
    )
    fields = lambda text: sorted(text.removeprefix("WECHATPAY2-SHA256-RSA2048 ").split(","))  # noqa: E731
    assert fields(ours) == fields(theirs)


async def test_a_proxys_404_is_not_a_missing_order(api: WechatPayApi, wechat: WechatPay) -> None:
    await wechat.create(wanted())
    for call in (wechat.query, wechat.close):
        api.faults.refuse(Response(b"<html>not here", 404))
        assert await call(ref()) == MaybeDone("http_404")


# -- platform certificates and the public key


async def test_certificates_are_downloaded_by_themselves_and_renewed(
    api: WechatPayApi, wechat: WechatPay
) -> None:
    assert isinstance(await wechat.create(wanted()), Done)
    assert api.calls[0] == "GET /v3/certificates"
    first = list(wechat.keys.serials)
    api.rotate("platform 2")
    wechat.keys.tried_at = -1e9
    assert isinstance(await wechat.query(ref()), Done)
    assert len(wechat.keys.serials) == 2 and wechat.keys.serials[0] == first[0]
    assert api.calls.count("GET /v3/certificates") == 2


async def test_a_call_back_under_a_new_certificate_is_learned_once_and_forgers_cost_nothing(
    api: WechatPayApi, wechat: WechatPay
) -> None:
    guarded = GuardedPayment(wechat, Guard("wechat-pay", "payment", GuardRules(deadline_s=20.0)))
    await wechat.create(wanted())
    api.rotate("platform 2")
    headers, body = api.signed(api.note("TRANSACTION.SUCCESS", api.pay(NUMBER)))
    assert guarded.read_hook(headers, body, datetime.now(UTC)) == HookForged("serial_unknown")
    wechat.keys.tried_at = -1e9
    await guarded.prepare_hook(headers)
    assert isinstance(guarded.read_hook(headers, body, datetime.now(UTC)), HookPaid)
    before = len(api.calls)
    for number in range(20):
        forged = {**headers, "wechatpay-serial": f"5{number:039X}"}
        await guarded.prepare_hook(forged)
        assert isinstance(guarded.read_hook(forged, body, datetime.now(UTC)), HookForged)
    assert len(api.calls) == before


async def test_certificates_that_are_not_wechat_pays_are_not_learned(api: WechatPayApi) -> None:
    other_key = adapter_of(api, apiv3_key="x" * 32)
    assert await other_key.learn_keys() == MaybeDone("certificate_not_opened")
    assert other_key.keys.serials == []
    await other_key.aclose()
    api.forge_answers = True
    forged = adapter_of(api)
    assert await forged.learn_keys() == MaybeDone("answer_signature_wrong")
    assert forged.keys.serials == []
    await forged.aclose()


def test_a_certificate_is_good_only_in_its_time() -> None:
    api = WechatPayApi()
    adapter = knowing(api)
    serial, now = api.signs_with, datetime.now(UTC)
    assert adapter.keys.find(serial, now) is not None
    assert adapter.keys.find(serial, now - timedelta(days=3)) is None
    assert adapter.keys.find(serial, now + timedelta(days=2000)) is None
    assert adapter.keys.find(serial.lower(), now) is None
    adapter.keys.learn({}, now + timedelta(days=2000))
    assert adapter.keys.serials == []


async def test_with_the_public_key_answers_are_asked_for_and_verified_with_it(api: WechatPayApi) -> None:
    api.use_public_key()
    adapter = adapter_of(api)
    assert isinstance(await adapter.create(wanted()), Done)
    assert "GET /v3/certificates" not in api.calls
    note = api.note("TRANSACTION.SUCCESS", api.pay(NUMBER))
    assert isinstance(adapter.read_hook(*api.signed(note), datetime.now(UTC)), HookPaid)
    await adapter.aclose()


async def test_while_a_merchant_moves_to_the_public_key_both_are_believed(api: WechatPayApi) -> None:
    api.use_public_key()
    adapter = adapter_of(api)
    await adapter.create(wanted())
    note = api.note("TRANSACTION.SUCCESS", api.pay(NUMBER))
    key_id, api.public_key_id = api.public_key_id, ""
    old_style = api.signed(note)  # still signed with the platform certificate
    api.public_key_id = key_id
    guarded = GuardedPayment(adapter, Guard("wechat-pay", "payment", GuardRules(deadline_s=20.0)))
    await guarded.prepare_hook(old_style[0])
    assert isinstance(guarded.read_hook(*old_style, datetime.now(UTC)), HookPaid)
    await adapter.aclose()


async def test_while_the_public_key_is_replaced_the_next_one_is_believed_too(api: WechatPayApi) -> None:
    api.use_public_key()
    old_id, old_key = api.public_key_id, api.public_key
    new_id, new_key = (
        "PUB_KEY_ID_0119000001092026112200000000000001",
        loopback.rsa_key("wechat's next public key"),
    )
    both = loopback.public_pem(old_key) + loopback.public_pem(new_key)
    adapter = adapter_of(api, public_key_id=f"{old_id}, {new_id}", public_key=both)
    await adapter.create(wanted())
    order = api.pay(NUMBER)
    assert adapter.keys.fixed_id == old_id
    for api.public_key_id, api.public_key in ((old_id, old_key), (new_id, new_key)):
        signed = api.signed(api.note("TRANSACTION.SUCCESS", order))
        assert isinstance(adapter.read_hook(*signed, datetime.now(UTC)), HookPaid)
    api.public_key_id, api.public_key = old_id, new_key  # a name does not lend its key
    signed = api.signed(api.note("TRANSACTION.SUCCESS", order))
    assert adapter.read_hook(*signed, datetime.now(UTC)) == HookForged("signature_wrong")
    await adapter.aclose()


@pytest.mark.parametrize(
    "change",
    [
        {"apiv3_key": "short"},
        {"public_key_id": "PUB_KEY_ID_1,PUB_KEY_ID_2"},
        {"public_key": "x"},
        {"private_key": "nonsense"},
        {"public_key_id": "PUB_KEY_ID_1"},
    ],
)
def test_bad_keys_stop_the_start_with_one_sentence_that_shows_none_of_them(change: dict[str, Any]) -> None:
    with pytest.raises(CannotStart) as caught:
        adapter_of(WechatPayApi(), **change)
    assert "FAIRDROP_WECHAT_PAY_" in str(caught.value)
    assert "nonsense" not in str(caught.value)


# -- refunds and the bill


async def paid(api: WechatPayApi, wechat: WechatPay, number: str = NUMBER) -> RefundWanted:
    await wechat.create(wanted(number))
    order = api.pay(number)
    return RefundWanted(
        refund_id="ORDERR1-1", order_no="ORDER", attempt_id=number, capture_ref=order["transaction_id"],
        amount_minor=888, currency="CNY", captured_minor=8_888, reason="坏了" * 40,
    )  # fmt: skip


async def test_a_refund_is_done_once_and_found_again(api: WechatPayApi, wechat: WechatPay) -> None:
    want = await paid(api, wechat)
    assert await wechat.refund_query("ORDERR1-1") == Done(RefundState(state="absent"))
    first = await wechat.refund(want)
    assert value_of(first).state == "done"
    assert await wechat.refund(want) == first
    assert await wechat.refund_query("ORDERR1-1", want.capture_ref) == first
    assert len(api.refunds) == 1


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        ("PROCESSING", "pending"),
        ("ABNORMAL", "pending"),  # decided in the console, under the same number
        ("CLOSED", "failed"),
    ],
)
async def test_a_refund_that_is_not_done(
    api: WechatPayApi, wechat: WechatPay, status: str, answer: str
) -> None:
    api.refund_status = status
    want = await paid(api, wechat)
    for got in (await wechat.refund(want), await wechat.refund_query(want.refund_id)):
        found = value_of(got)
        assert found.state == answer
        assert found.code == (None if status == "PROCESSING" else f"refund_{status.lower()}")


async def test_an_empty_account_is_not_done_and_may_be_repeated(api: WechatPayApi, wechat: WechatPay) -> None:
    want = await paid(api, wechat)
    api.faults.refuse(JSONResponse({"code": "NOT_ENOUGH", "message": "余额不足"}, 403))
    assert await wechat.refund(want) == NotDone("balance_insufficient", counts=Result.IGNORED)
    assert value_of(await wechat.refund(want)).state == "done"


async def test_the_bill_is_of_one_utc_day_out_of_two_of_beijings(
    api: WechatPayApi, wechat: WechatPay
) -> None:
    want = await paid(api, wechat)
    await wechat.refund(want)
    order, refund = api.orders[NUMBER], api.refunds["ORDERR1-1"]
    at = datetime(2026, 11, 11, tzinfo=UTC)
    inside, outside = at + timedelta(hours=1), at - timedelta(seconds=1)
    api.bills["2026-11-11"] = "\r\n".join([api.bill_row(inside, order), api.bill_row(outside, order)])
    api.bills["2026-11-12"] = api.bill_row(at + timedelta(hours=23), order, refund)
    lines = value_of(await wechat.bill(at.date()))
    assert [(line.kind, line.our_id, line.order_no, line.amount_minor) for line in lines] == [
        ("capture", NUMBER, "0123456789ABCDEFGHIJKLMN", 8_888),
        ("refund", "ORDERR1-1", "0123456789ABCDEFGHIJKLMN", 888),
    ]
    assert [line.provider_ref for line in lines] == [order["transaction_id"], refund["refund_id"]]
    assert lines[0].at == inside


async def test_a_day_without_trade_a_bill_under_way_and_a_bent_file(
    api: WechatPayApi, wechat: WechatPay
) -> None:
    assert value_of(await wechat.bill(datetime(2026, 1, 1, tzinfo=UTC).date())) == []
    api.bills["2026-01-02"] = "creating"
    answer = await wechat.bill(datetime(2026, 1, 1, tzinfo=UTC).date())
    assert answer == NotDone("bill_not_ready", counts=Result.SUCCESS)
    api.bills["2026-01-02"] = ""
    api._file = lambda day: b"bent" if len(api.calls) % 2 else b"other"  # type: ignore[method-assign,assignment]
    assert await wechat.bill(datetime(2026, 1, 1, tzinfo=UTC).date()) == MaybeDone("bill_hash_wrong")
    assert bill_lines("no,bill\r\n", api.mchid) is None


# -- call-backs


def read(api: WechatPayApi, signed: tuple[dict[str, str], bytes], now: datetime | None = None) -> Hook:
    return knowing(api).read_hook(signed[0], signed[1], now or datetime.now(UTC))


def order_of(api: WechatPayApi, **changes: Any) -> dict[str, Any]:
    """An order as the stand-in makes it, paid, without the adapter."""
    api.orders[NUMBER] = {
        "appid": api.appid, "mchid": api.mchid, "out_trade_no": NUMBER, "trade_state": "NOTPAY",
        "attach": "0123456789ABCDEFGHIJKLMN", "amount": {"total": 8_888, "currency": "CNY"},
    }  # fmt: skip
    return {**api.pay(NUMBER), **changes}


def test_a_paid_call_back_is_read_and_the_sdk_reads_the_same() -> None:
    api = WechatPayApi()
    headers, body = api.signed(api.note("TRANSACTION.SUCCESS", order_of(api)))
    hook = read(api, (headers, body))
    assert isinstance(hook, HookPaid)
    assert (hook.captured.attempt_id, hook.captured.order_no) == (NUMBER, "0123456789ABCDEFGHIJKLMN")
    theirs = official(api).callback(headers, body)
    assert theirs["id"] == hook.event_id
    assert theirs["resource"]["transaction_id"] == hook.captured.provider_ref
    assert theirs["resource"]["amount"]["total"] == hook.captured.amount_minor


def official(api: WechatPayApi) -> Any:
    """The SDK in public-key mode with a certificate slipped in: no network at its construction."""
    client = wechatpayv3.WeChatPay(
        wechatpay_type=wechatpayv3.WeChatPayType.NATIVE,
        mchid=api.mchid,
        private_key=loopback.pem(api.merchant_key),
        cert_serial_no=api.merchant_serial,
        apiv3_key=api.apiv3_key,
        appid=api.appid,
        notify_url=NOTIFY,
        public_key=loopback.public_pem(api.public_key),
        public_key_id=api.public_key_id or "PUB_KEY_ID_NONE",
    )
    client._core._certificates = [made for _, made in api.certificates.values()]
    client._core._gate_way = api.url
    return client


async def test_the_stand_in_speaks_the_protocol_to_the_sdk_too(api: WechatPayApi) -> None:
    api.use_public_key()

    def call() -> list[int]:
        client = official(api)
        ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
        amount = {"total": 5, "currency": "CNY"}
        made = client.pay(description="Phone", out_trade_no="SDK001", amount=amount, time_expire=ends)
        found = client.query(out_trade_no="SDK001")
        closed = client.close(out_trade_no="SDK001")
        return [made[0], found[0], closed[0]]

    assert await asyncio.to_thread(call) == [200, 200, 204]


def test_what_other_call_backs_mean() -> None:
    api = WechatPayApi()
    order = order_of(api)
    closed = read(api, api.signed(api.note("TRANSACTION.CLOSED", {**order, "trade_state": "CLOSED"})))
    assert isinstance(closed, HookClosed) and closed.attempt_id == NUMBER
    assert isinstance(
        read(api, api.signed(api.note("TRANSACTION.X", {**order, "trade_state": "PAYERROR"}))), HookOther
    )
    refund = {
        "transaction_id": order["transaction_id"],
        "out_trade_no": NUMBER,
        "refund_id": "50300",
        "out_refund_no": "R1-1",
        "amount": {"refund": 1, "total": 8_888},
    }
    back = read(api, api.signed(api.refund_note(refund)))
    assert isinstance(back, HookRefunded)
    assert (back.refund_id, back.provider_ref) == ("R1-1", "50300")
    for status in ("CLOSED", "ABNORMAL"):
        gone = {**refund, "mchid": api.mchid, "refund_status": status}
        told = read(api, api.signed(api.note(f"REFUND.{status}", gone, "refund")))
        assert isinstance(told, HookRefundFailed)
        assert (told.refund_id, told.code) == ("R1-1", f"refund_{status.lower()}")


def test_the_call_backs_that_try_whether_we_look_at_signatures_are_refused() -> None:
    """WeChat Pay sends such ones now and then: the signature is bent, and only a refusal is the right answer."""
    api = WechatPayApi()
    headers, body = api.signed(api.note("TRANSACTION.SUCCESS", order_of(api)))
    name = next(one for one in headers if one.lower() == "wechatpay-signature")
    bent = {**headers, name: "WECHATPAY/SIGNTEST/" + headers[name]}
    assert read(api, (bent, body)) == HookForged("signature_wrong")


@pytest.mark.parametrize("change", [{"mchid": "1900000000"}, {"appid": "wx_other"}])
def test_a_call_back_for_another_merchant_is_refused(change: dict[str, str]) -> None:
    api = WechatPayApi()
    assert read(api, api.signed(api.note("TRANSACTION.SUCCESS", order_of(api, **change)))) == HookForged(
        "merchant_wrong"
    )


def test_a_call_back_without_money_is_refused() -> None:
    for change in (
        {"transaction_id": None},
        {"success_time": None},
        {"amount": {"total": 0, "currency": "CNY"}},
    ):
        api = WechatPayApi()
        note = api.note("TRANSACTION.SUCCESS", order_of(api, **change))
        assert read(api, api.signed(note)) == HookForged("malformed")


def test_any_bit_flipped_in_a_call_back_is_refused() -> None:
    api = WechatPayApi()
    headers, body = api.signed(api.note("TRANSACTION.SUCCESS", order_of(api)))
    adapter, now = knowing(api), datetime.now(UTC)
    assert isinstance(adapter.read_hook(headers, body, now), HookPaid)
    for bent in flips(body):
        assert isinstance(adapter.read_hook(headers, bent, now), HookForged)
    for name in ("timestamp", "nonce", "signature", "serial", "signature-type"):
        for bent_headers in header_flips(headers, f"wechatpay-{name}"):
            if name == "signature-type" and f"wechatpay-{name}" not in bent_headers:
                continue  # WeChat Pay's older call-backs name no type
            assert isinstance(adapter.read_hook(bent_headers, body, now), HookForged), (name, bent_headers)


def test_a_resource_sealed_with_another_key_is_refused_though_the_signature_holds() -> None:
    api = WechatPayApi()
    note = api.note("TRANSACTION.SUCCESS", order_of(api))
    adapter = knowing(api, apiv3_key="z" * 32)
    assert adapter.read_hook(*api.signed(note), datetime.now(UTC)) == HookForged("resource_not_opened")


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=5), st.integers(0, 10**9))
def test_every_call_backs_every_flip_is_refused_whatever_it_says(extra: dict[str, str], at: int) -> None:
    headers, body = SIGNER.signed({**SIGNER.note("TRANSACTION.SUCCESS", PAID), **extra})
    place = at % (len(body) * 8)
    bent = bytearray(body)
    bent[place // 8] ^= 1 << (place % 8)
    assert isinstance(READER.read_hook(headers, bytes(bent), datetime.now(UTC)), HookForged)


SIGNER = WechatPayApi()
PAID = order_of(SIGNER)
READER = knowing(SIGNER)


@pytest.mark.parametrize("late_s", [-86_400, -301, 301, 86_400])
def test_a_call_back_outside_five_minutes_is_refused(late_s: int) -> None:
    note = SIGNER.note("TRANSACTION.SUCCESS", PAID)
    signed = SIGNER.signed(note, int(datetime.now(UTC).timestamp()) + late_s)
    assert READER.read_hook(*signed, datetime.now(UTC)) == HookForged("timestamp_outside_window")


def test_redelivery_goes_on_until_it_is_accepted_and_every_copy_is_the_same_event() -> None:
    no, yes = READER.hook_reply(False), READER.hook_reply(True)
    assert yes.status == 204 and json.loads(no.body)["code"] == "FAIL"
    shop = loopback.Shop([(no.status, no.body)] * 4 + [(yes.status, yes.body)])
    with shop.open() as url:
        assert SIGNER.deliver(url, SIGNER.note("TRANSACTION.SUCCESS", PAID)) == (5, True)
    hooks = [READER.read_hook(headers, body, datetime.now(UTC)) for headers, body in shop.got]
    assert all(isinstance(hook, HookPaid) for hook in hooks)
    assert len({hook.event_id for hook in hooks if isinstance(hook, HookPaid)}) == 1
    assert len({headers["wechatpay-nonce"] for headers, _ in shop.got}) == 5
    assert sum(wechat_pay_api.SCHEDULE_S) == 24 * 3600 + 4 * 60
