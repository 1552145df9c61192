"""Alipay's adapter against a stand-in gateway that checks every signature; Alipay's own SDK is the judge of both."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import Response

from app.breaker import Result
from app.errors import CannotStart
from app.providers.alipay import Alipay, bill_lines, certificate_sn, root_sn
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.payment import (
    AttemptRef,
    Hook,
    HookClosed,
    HookForged,
    HookOther,
    HookPaid,
    HookRefunded,
    Link,
    LinkWanted,
    Payment,
    RefundState,
    RefundWanted,
)
from tests.providers.standins import alipay_gateway, loopback
from tests.providers.standins.alipay_gateway import AlipayGateway
from tests.providers.standins.bits import flips

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from alipay.aop.api.AlipayClientConfig import AlipayClientConfig
    from alipay.aop.api.DefaultAlipayClient import DefaultAlipayClient
    from alipay.aop.api.request.AlipayTradeQueryRequest import AlipayTradeQueryRequest
    from alipay.aop.api.util.SignatureUtils import get_sign_content, sign_with_rsa2, verify_with_rsa

ATTEMPT = "0123456789ABCDEFGHIJKLMN-1"
NUMBER = ATTEMPT.replace("-", "_")


@pytest.fixture
def api() -> Iterator[AlipayGateway]:
    api = AlipayGateway()
    with loopback.serve(api.app()) as api.url:
        yield api


@pytest.fixture
async def alipay(api: AlipayGateway) -> AsyncIterator[Alipay]:
    adapter = adapter_of(api)
    yield adapter
    await adapter.aclose()


def adapter_of(api: AlipayGateway, **changes: Any) -> Alipay:
    values: dict[str, Any] = {
        "app_id": api.app_id,
        "seller_id": api.seller_id,
        "private_key": loopback.bare(loopback.pem(api.merchant_key)),
        "public_key": loopback.bare(loopback.public_pem(api.key)),
        "deadline_s": 20.0,
        "connections_max": 8,
        "url": f"{api.url or 'http://127.0.0.1:1'}/gateway.do",
    }
    return Alipay(**{**values, **changes})


def wanted(**changes: Any) -> LinkWanted:
    values: dict[str, Any] = {
        "attempt_id": ATTEMPT,
        "order_no": ATTEMPT.partition("-")[0],
        "amount_minor": 8_888,
        "currency": "CNY",
        "title": "手机/壳=128&GB+",
        "channel": "alipay",
        "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        "return_url": "https://shop.example/done?a=1",
        "notify_url": "https://shop.example/v1/hooks/alipay",
    }
    return LinkWanted(**{**values, **changes})


def ref(link: Link | None = None, attempt: str = ATTEMPT, **changes: Any) -> AttemptRef:
    until = None if link is None else link.expires_at
    return AttemptRef(
        attempt_id=attempt, order_no=attempt.partition("-")[0], **{"expires_at": until, **changes}
    )


def value_of(answer: Answer[Any]) -> Any:
    assert isinstance(answer, Done), answer
    return answer.value


# -- the ways to pay


@pytest.mark.parametrize(
    ("channel", "method"),
    [
        ("alipay", "alipay.trade.page.pay"),
        ("alipay-page", "alipay.trade.page.pay"),
        ("alipay-wap", "alipay.trade.wap.pay"),
    ],
)
async def test_a_page_link_is_signed_here_and_opens_at_alipay(
    api: AlipayGateway, alipay: Alipay, channel: str, method: str
) -> None:
    link: Link = value_of(await alipay.create(wanted(channel=channel)))
    assert link.kind == "redirect" and link.url is not None and api.calls == []
    fields = dict(parse_qsl(urlsplit(link.url).query))
    assert fields["method"] == method and fields["return_url"] == "https://shop.example/done?a=1"
    assert api.open_link(link.url) == NUMBER
    assert api.trades[NUMBER]["total_amount"] == "88.88"
    assert api.trades[NUMBER]["subject"] == "手机 壳 128 GB+"


async def test_a_bent_page_link_does_not_open(api: AlipayGateway, alipay: Alipay) -> None:
    link: Link = value_of(await alipay.create(wanted()))
    with pytest.raises(AssertionError, match="验签出错"):
        api.open_link(str(link.url).replace("88.88", "00.01"))


async def test_a_code_to_scan_and_an_order_string_for_apps(api: AlipayGateway, alipay: Alipay) -> None:
    code: Link = value_of(await alipay.create(wanted(channel="alipay-qr")))
    assert code.kind == "qr" and str(code.url).startswith("https://qr.alipay.com/")
    app: Link = value_of(await alipay.create(wanted(channel="alipay-app")))
    assert app.kind == "sdk" and app.params is not None
    assert api.open_link("?" + app.params["order_string"]) == NUMBER


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"currency": "USD"}, "currency_not_supported"),
        ({"attempt_id": "A_1-1"}, "attempt_id_not_usable"),
        ({"attempt_id": "中文-1"}, "attempt_id_not_usable"),
        ({"expires_at": datetime(2026, 1, 1, tzinfo=UTC)}, "expires_too_soon"),
    ],
)
async def test_what_alipay_cannot_do_is_refused_before_any_call(
    api: AlipayGateway, alipay: Alipay, change: dict[str, Any], code: str
) -> None:
    assert await alipay.create(wanted(**change)) == Refused(code, other_may=True)
    assert api.calls == []


async def test_a_payment_is_seen_with_its_money(api: AlipayGateway, alipay: Alipay) -> None:
    link: Link = value_of(await alipay.create(wanted()))
    assert await alipay.query(ref(link)) == Done(Payment(state="waiting"))  # not opened yet
    api.open_link(str(link.url))
    assert await alipay.query(ref(link)) == Done(Payment(state="waiting"))
    trade = api.pay(NUMBER)
    payment: Payment = value_of(await alipay.query(ref(link)))
    assert payment.state == "paid" and payment.captured is not None
    assert (payment.captured.amount_minor, payment.captured.currency) == (8_888, "CNY")
    assert (payment.captured.provider_ref, payment.captured.attempt_id) == (trade["trade_no"], ATTEMPT)
    assert abs((payment.captured.captured_at - datetime.now(UTC)).total_seconds()) < 60


async def test_a_link_that_was_not_opened_cannot_be_closed_until_it_has_ended(
    api: AlipayGateway, alipay: Alipay
) -> None:
    link: Link = value_of(await alipay.create(wanted()))
    assert await alipay.close(ref(link)) == MaybeDone("link_may_live", counts=Result.SUCCESS)
    ended = ref(link, expires_at=datetime.now(UTC) - timedelta(minutes=2))
    assert await alipay.query(ended) == Done(Payment(state="absent"))
    assert await alipay.close(ended) == Done(Payment(state="absent"))
    assert await alipay.close(ref()) == Done(Payment(state="absent"))  # no link was ever handed out


async def test_closing_decides_whether_it_can_still_be_paid(api: AlipayGateway, alipay: Alipay) -> None:
    link: Link = value_of(await alipay.create(wanted()))
    api.open_link(str(link.url))
    assert await alipay.close(ref(link)) == Done(Payment(state="closed"))
    closed: Payment = value_of(await alipay.query(ref(link)))
    assert closed.state == "closed"
    assert value_of(await alipay.close(ref(link))).state == "closed"
    assert await alipay.create(wanted(channel="alipay-qr")) == Refused("closed")
    other: Link = value_of(await alipay.create(wanted(attempt_id="OTHER1-1")))
    api.open_link(str(other.url))
    api.pay("OTHER1_1")
    assert value_of(await alipay.close(ref(other, "OTHER1-1"))).state == "paid"
    assert await alipay.create(wanted(attempt_id="OTHER1-1", channel="alipay-qr")) == Refused("paid")


# -- what answers mean


@pytest.mark.parametrize(
    ("code", "sub_code", "answer"),
    [
        ("40004", "ACQ.SYSTEM_ERROR", MaybeDone("ACQ.SYSTEM_ERROR")),
        ("20000", "isp.unknow-error", MaybeDone("isp.unknow-error")),
        ("20000", "aop.unknow-error", MaybeDone("aop.unknow-error")),
        ("40004", "ACQ.INVALID_PARAMETER", Refused("ACQ.INVALID_PARAMETER")),
        ("40004", "ACQ.CONTEXT_INCONSISTENT", Refused("ACQ.CONTEXT_INCONSISTENT")),
        ("40006", "isv.insufficient-isv-permissions",
         Refused("isv.insufficient-isv-permissions", True, Result.FAILURE)),
        ("40005", "isv.app-call-limited", NotDone("isv.app-call-limited", counts=Result.IGNORED)),
        ("10003", "", MaybeDone("code_10003")),
    ],
)  # fmt: skip
async def test_an_error_is_not_done_refused_or_unknown(
    api: AlipayGateway, alipay: Alipay, code: str, sub_code: str, answer: object
) -> None:
    api.next_sub_code = (code, sub_code)
    if not sub_code:
        api.next_sub_code = (code, None)  # type: ignore[assignment]
    assert await alipay.create(wanted(channel="alipay-qr")) == answer


async def test_no_answer_is_unknown_and_no_connection_is_not_done(api: AlipayGateway, alipay: Alipay) -> None:
    slow = adapter_of(api, deadline_s=0.2)
    api.faults.stall(0.6)
    assert isinstance(await slow.create(wanted(channel="alipay-qr")), MaybeDone)
    await slow.aclose()
    nobody = adapter_of(api, url="http://127.0.0.1:1/gateway.do")
    assert isinstance(await nobody.query(ref()), NotDone)
    await nobody.aclose()
    for body in (
        b"<html>",
        b"{}",
        b'{"alipay_trade_query_response":{"code":"10000"}}',
        b"[]",
        b'{"error_response":1}',
    ):
        api.faults.refuse(Response(body))
        assert isinstance(await alipay.query(ref()), MaybeDone)
    api.faults.refuse(Response(b"", 502))
    assert await alipay.query(ref()) == MaybeDone("http_502")


async def test_an_answer_that_alipay_did_not_sign_is_not_believed(api: AlipayGateway, alipay: Alipay) -> None:
    api.forge_answers = True
    assert await alipay.create(wanted(channel="alipay-qr")) == MaybeDone("answer_signature_wrong")


async def test_a_wrong_key_of_ours_is_told_to_the_breaker(api: AlipayGateway) -> None:
    stranger = adapter_of(api, private_key=loopback.pem(loopback.rsa_key("somebody else")))
    answer = await stranger.query(ref())
    assert answer == Refused("isv.invalid-signature", other_may=True, counts=Result.FAILURE)
    await stranger.aclose()


# -- certificates


def certificate_of(name: str, key: Any, serial: int, algorithm: hashes.HashAlgorithm) -> x509.Certificate:
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "CN"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Ant Financial"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Certification Authority"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=3650))
        .sign(key, algorithm)
    )


def pem_of(*made: x509.Certificate) -> str:
    return "".join(one.public_bytes(Encoding.PEM).decode() for one in made)


async def test_in_certificate_mode_serial_numbers_go_along_and_the_next_certificate_is_known_too(
    api: AlipayGateway,
) -> None:
    ours = certificate_of("app", api.merchant_key, 1111, hashes.SHA256())
    old = certificate_of("alipay", loopback.rsa_key("alipay old"), 2222, hashes.SHA256())
    new = certificate_of("alipay", api.key, 3333, hashes.SHA256())
    root = [
        certificate_of("root", loopback.rsa_key("root"), 4444, hashes.SHA256()),
        certificate_of("root ec", ec.generate_private_key(ec.SECP256R1()), 5555, hashes.SHA256()),
    ]
    api.app_cert_sn, api.root_cert_sn, api.cert_sn = certificate_sn(ours), root_sn(root), certificate_sn(new)
    assert api.root_cert_sn == certificate_sn(root[0])
    change = {
        "public_key": "",
        "app_cert": pem_of(ours),
        "alipay_cert": pem_of(old, new),
        "root_cert": pem_of(*root),
    }
    adapter = adapter_of(api, **change)
    assert isinstance(await adapter.create(wanted(channel="alipay-qr")), Done)
    api.cert_sn = "0" * 32
    assert await adapter.create(wanted(channel="alipay-qr")) == MaybeDone("answer_certificate_unknown")
    assert isinstance(adapter.read_hook(*api.signed(api.note(trade_of(api))), datetime.now(UTC)), HookPaid)
    await adapter.aclose()


async def test_while_alipays_public_key_changes_both_are_believed(api: AlipayGateway, alipay: Alipay) -> None:
    next_key = loopback.public_pem(loopback.rsa_key("alipay's next key"))
    today = loopback.public_pem(api.key)
    link = value_of(await alipay.create(wanted(channel="alipay-wap")))
    note = api.signed(api.note(api.pay(api.open_link(link.url))))
    for both in (today + next_key, f"{loopback.bare(next_key)},{loopback.bare(today)}"):
        adapter = adapter_of(api, public_key=both)
        assert value_of(await adapter.query(ref())).state == "paid"
        assert isinstance(adapter.read_hook(*note, datetime.now(UTC)), HookPaid)
        await adapter.aclose()
    stranger = adapter_of(api, public_key=next_key)
    assert await stranger.query(ref()) == MaybeDone("answer_signature_wrong")
    assert stranger.read_hook(*note, datetime.now(UTC)) == HookForged("signature_wrong")
    await stranger.aclose()


def test_a_certificates_name_is_the_md5_of_issuer_and_serial() -> None:
    made = certificate_of("Ant Root", loopback.rsa_key("root"), 4444, hashes.SHA256())
    issuer = "CN=Ant Root,OU=Certification Authority,O=Ant Financial,C=CN"
    assert certificate_sn(made) == hashlib.md5(f"{issuer}4444".encode()).hexdigest()


@pytest.mark.parametrize(
    "change", [{"public_key": ""}, {"private_key": "nonsense"}, {"public_key": "nonsense"}, {"way": "pigeon"}]
)
def test_bad_keys_stop_the_start_with_one_sentence_that_shows_none_of_them(change: dict[str, str]) -> None:
    with pytest.raises(CannotStart) as caught:
        adapter_of(AlipayGateway(), **change)
    assert "FAIRDROP_ALIPAY_" in str(caught.value)
    assert "nonsense" not in str(caught.value)


# -- refunds and the bill


async def paid(api: AlipayGateway, alipay: Alipay) -> RefundWanted:
    link: Link = value_of(await alipay.create(wanted()))
    api.open_link(str(link.url))
    trade = api.pay(NUMBER)
    return RefundWanted(
        refund_id="R1-1", order_no=ATTEMPT.partition("-")[0], attempt_id=ATTEMPT, capture_ref=trade["trade_no"],
        amount_minor=888, currency="CNY", captured_minor=8_888, reason="damaged",
    )  # fmt: skip


async def test_a_refund_is_done_once_and_found_again(api: AlipayGateway, alipay: Alipay) -> None:
    want = await paid(api, alipay)
    assert await alipay.refund_query("R1-1", want.capture_ref) == Done(RefundState(state="absent"))
    first = await alipay.refund(want)
    assert value_of(first).state == "done"
    assert await alipay.refund(want) == first  # fund_change N: looked up
    assert await alipay.refund_query("R1-1", want.capture_ref) == first
    assert len(api.refunds) == 1
    assert await alipay.refund_query("R1-1") == MaybeDone("capture_unknown", counts=Result.IGNORED)
    assert value_of(await alipay.query(ref())).state == "paid"


async def test_a_trade_that_was_refunded_whole_was_paid(api: AlipayGateway, alipay: Alipay) -> None:
    want = await paid(api, alipay)
    await alipay.refund(
        RefundWanted(**{**{name: getattr(want, name) for name in want.__slots__}, "amount_minor": 8_888})
    )
    payment: Payment = value_of(await alipay.query(ref()))
    assert payment.state == "paid" and payment.captured is not None and payment.code == "refunded"


async def test_a_refund_that_cannot_be_and_one_that_cannot_be_yet(api: AlipayGateway, alipay: Alipay) -> None:
    want = await paid(api, alipay)
    api.next_sub_code = ("40004", "ACQ.SELLER_BALANCE_NOT_ENOUGH")
    assert await alipay.refund(want) == NotDone("balance_insufficient", counts=Result.IGNORED)
    api.next_sub_code = ("40004", "ACQ.SYSTEM_ERROR")
    assert await alipay.refund(want) == MaybeDone("ACQ.SYSTEM_ERROR")
    api.next_sub_code = ("40004", "ACQ.TRADE_NOT_ALLOW_REFUND")
    assert await alipay.refund(want) == Refused("ACQ.TRADE_NOT_ALLOW_REFUND")


async def test_the_bill_is_of_one_utc_day_out_of_two_of_beijings(api: AlipayGateway, alipay: Alipay) -> None:
    await paid(api, alipay)
    trade = api.trades[NUMBER]
    at = datetime(2026, 11, 11, tzinfo=UTC)
    foreign = api.bill_row(trade, at + timedelta(hours=2))
    foreign[1] = "T200P1234"  # another product of the account
    api.bills["2026-11-11"] = api.make_bill(
        [
            api.bill_row(trade, at + timedelta(hours=1)),
            api.bill_row(trade, at - timedelta(seconds=1)),
            foreign,
        ]
    )
    answer = await alipay.bill(date(2026, 11, 11))
    assert answer == NotDone("bill_not_ready", counts=Result.SUCCESS)
    api.bills["2026-11-12"] = api.make_bill([api.bill_row(trade, at + timedelta(hours=23), ("R1-1", 888))])
    lines = value_of(await alipay.bill(date(2026, 11, 11)))
    assert [(line.kind, line.our_id, line.order_no, line.amount_minor) for line in lines] == [
        ("capture", ATTEMPT, ATTEMPT.partition("-")[0], 8_888),
        ("refund", "R1-1", ATTEMPT.partition("-")[0], 888),
    ]
    assert bill_lines(b"no zip") is None


# -- call-backs


def trade_of(api: AlipayGateway, **changes: Any) -> dict[str, Any]:
    """A paid trade as the stand-in makes it, without the adapter."""
    ends = (datetime.now(alipay_gateway.BEIJING) + timedelta(minutes=5)).strftime(alipay_gateway.TIME)
    api._make(
        {"out_trade_no": NUMBER, "total_amount": "88.88", "subject": "大乐透 *+/=?é", "time_expire": ends},
        None,
    )
    if api.trades[NUMBER]["trade_status"] == "WAIT_BUYER_PAY":
        api.pay(NUMBER)
    return {**api.trades[NUMBER], **changes}


def read(api: AlipayGateway, note: dict[str, str]) -> Hook:
    return adapter_of(api).read_hook(*api.signed(note), datetime.now(UTC))


def test_a_paid_call_back_is_read() -> None:
    api = AlipayGateway()
    note = api.note(trade_of(api))
    hook = read(api, note)
    assert isinstance(hook, HookPaid)
    assert hook.event_id == note["notify_id"]
    captured = hook.captured
    assert (captured.attempt_id, captured.order_no) == (ATTEMPT, ATTEMPT.partition("-")[0])
    assert (captured.amount_minor, captured.currency) == (8_888, "CNY")
    assert captured.provider_ref == note["trade_no"]


def test_what_other_call_backs_mean() -> None:
    api = AlipayGateway()
    trade = trade_of(api)
    assert isinstance(read(api, api.note(trade, trade_status="TRADE_FINISHED")), HookPaid)
    assert isinstance(read(api, api.note(trade, trade_status="TRADE_CLOSED")), HookClosed)
    assert isinstance(read(api, api.note(trade, trade_status="WAIT_BUYER_PAY")), HookOther)
    back = read(
        api, api.note(trade, refund_fee="8.88", gmt_refund="2026-11-11 12:00:00.123", out_biz_no="R1-1")
    )
    assert isinstance(back, HookRefunded) and back.refund_id == "R1-1"
    whole = api.note(trade, trade_status="TRADE_CLOSED", refund_fee="88.88", out_biz_no="R1-2")
    assert isinstance(read(api, whole), HookRefunded)
    assert isinstance(read(api, api.note(trade, out_trade_no="T200P1234")), HookOther)
    assert isinstance(read(api, api.note(trade, notify_type="dut_user_sign")), HookOther)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"app_id": "2021000000000002"}, "merchant_wrong"),
        ({"seller_id": "2088000000000002"}, "merchant_wrong"),
        ({"total_amount": "88.888"}, "malformed"),
        ({"total_amount": "0.00"}, "malformed"),
        ({"gmt_payment": "yesterday"}, "malformed"),
        ({"notify_id": ""}, "malformed"),
        ({"charset": "gbk"}, "malformed"),
        ({"notify_time": "2015-14-27 15:45:58"}, "malformed"),
    ],
)
def test_a_signed_call_back_that_is_not_for_us_or_makes_no_sense_is_refused(
    change: dict[str, str], code: str
) -> None:
    api = AlipayGateway()
    assert read(api, api.note(trade_of(api), **change)) == HookForged(code)


@pytest.mark.parametrize(("hours", "believed"), [(-27, False), (-25, True), (0, True), (1, False)])
def test_a_call_back_is_believed_as_long_as_alipay_sends_it_again(hours: int, believed: bool) -> None:
    api = AlipayGateway()
    at = datetime.now(alipay_gateway.BEIJING) + timedelta(hours=hours)
    hook = read(api, api.note(trade_of(api), notify_time=at.strftime(alipay_gateway.TIME)))
    assert isinstance(hook, HookPaid) if believed else hook == HookForged("timestamp_outside_window")


def test_any_bit_flipped_in_a_call_back_is_refused() -> None:
    api = AlipayGateway()
    headers, body = api.signed(api.note(trade_of(api)))
    adapter, now = adapter_of(api), datetime.now(UTC)
    assert isinstance(adapter.read_hook(headers, body, now), HookPaid)
    for bent in flips(body):
        assert isinstance(adapter.read_hook(headers, bent, now), HookForged), bent


@pytest.mark.parametrize(
    "bend",
    [
        lambda body: body + b"&trade_status=TRADE_SUCCESS",
        lambda body: b"app_id=2021000000000001&" + body,
        lambda body: body + b"&extra=1",
        lambda body: body.replace(b"&sign_type=RSA2", b""),
        lambda body: body.replace(b"sign_type=RSA2", b"sign_type=RSA"),
        lambda body: body + b"&",
        lambda body: body.replace(b"%3D%3D&sign_type", b"&sign_type"),
        lambda body: b"",
    ],
)  # fmt: skip
def test_fields_added_doubled_or_dropped_are_refused(bend: Any) -> None:
    api = AlipayGateway()
    headers, body = api.signed(api.note(trade_of(api)))
    assert bend(body) != body
    assert isinstance(adapter_of(api).read_hook(headers, bend(body), datetime.now(UTC)), HookForged)


GATEWAY = AlipayGateway()
READER = adapter_of(GATEWAY)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=80, deadline=None)
@given(TEXT, st.integers(0, 10**9))
def test_whatever_a_title_holds_the_call_back_is_read_and_its_flips_are_refused(
    subject: str, at: int
) -> None:
    headers, body = GATEWAY.signed(GATEWAY.note(trade_of(GATEWAY), subject=subject))
    assert isinstance(READER.read_hook(headers, body, datetime.now(UTC)), HookPaid)
    place = at % (len(body) * 8)
    bent = bytearray(body)
    bent[place // 8] ^= 1 << (place % 8)
    assert isinstance(READER.read_hook(headers, bytes(bent), datetime.now(UTC)), HookForged)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_whatever_a_stranger_sends_is_forged(body: bytes) -> None:
    assert isinstance(READER.read_hook({}, body, datetime.now(UTC)), HookForged)


def test_redelivery_goes_on_until_success_and_every_copy_is_the_same_event() -> None:
    no, yes = READER.hook_reply(False), READER.hook_reply(True)
    assert yes.body == b"success"
    shop = loopback.Shop([(no.status, no.body), (500, b""), (200, b"success\n"), (yes.status, yes.body)])
    with shop.open() as url:
        assert GATEWAY.deliver(url, GATEWAY.note(trade_of(GATEWAY))) == (4, True)
    hooks = [READER.read_hook(headers, body, datetime.now(UTC)) for headers, body in shop.got]
    assert len({hook.event_id for hook in hooks if isinstance(hook, HookPaid)}) == 1 and len(hooks) == 4
    assert sum(alipay_gateway.SCHEDULE_S) == 24 * 3600 + 24 * 60


# -- Alipay's own SDK


def pkcs1(api: AlipayGateway) -> str:
    """The form that Alipay's Python SDK wants."""
    made = api.merchant_key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    return loopback.bare(made.decode())


def test_the_sdk_signs_the_same_to_the_same_bytes_and_verifies_what_alipay_signed() -> None:
    api = AlipayGateway()
    adapter = adapter_of(api, private_key=pkcs1(api))
    fields = adapter._signed(
        "alipay.trade.query", {"out_trade_no": NUMBER}, {"notify_url": "https://x/é?a=b&c"}
    )
    given = fields.pop("sign")
    assert given == sign_with_rsa2(pkcs1(api), get_sign_content(fields), "utf-8")
    headers, body = api.signed(api.note(trade_of(api)))
    note = dict(parse_qsl(body.decode()))
    sign = note.pop("sign")
    note.pop("sign_type")
    public = loopback.bare(loopback.public_pem(api.key))
    assert verify_with_rsa(public, get_sign_content(note).encode(), sign)
    assert isinstance(adapter.read_hook(headers, body, datetime.now(UTC)), HookPaid)


async def test_the_stand_in_speaks_the_protocol_to_the_sdk_too(
    api: AlipayGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The SDK writes its machine's local time where Alipay wants Beijing's.
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    # And it cannot add a port number to an address.
    at = urlsplit(api.url)
    monkeypatch.setattr(
        "alipay.aop.api.util.WebUtils.get_http_connection",
        lambda url, query, timeout: (
            f"{url}?{query}",
            http.client.HTTPConnection(at.netloc, timeout=timeout),
        ),
    )
    trade_of(api)

    def call() -> str:
        config = AlipayClientConfig()
        config.server_url = f"{api.url}/gateway.do"
        config.app_id = api.app_id
        config.app_private_key = pkcs1(api)
        config.alipay_public_key = loopback.bare(loopback.public_pem(api.key))
        request = AlipayTradeQueryRequest()
        request.biz_content = {"out_trade_no": NUMBER}
        return str(DefaultAlipayClient(config).execute(request))

    try:
        assert "TRADE_SUCCESS" in await asyncio.to_thread(call)
    finally:
        monkeypatch.undo()
        time.tzset()
