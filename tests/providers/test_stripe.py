"""Stripe's adapter against a stand-in that keeps Stripe's rules; Stripe's own SDK is the judge of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import stripe as sdk
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse, Response

from app.breaker import Result
from app.providers.answer import Done, MaybeDone, NotDone, Refused
from app.providers.payment import (
    AttemptRef,
    HookClosed,
    HookDeclined,
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
from app.providers.stripe import Stripe
from tests.providers.standins import loopback, stripe_api
from tests.providers.standins.bits import flips, header_flips
from tests.providers.standins.stripe_api import StripeApi


@pytest.fixture
def api() -> Iterator[StripeApi]:
    api = StripeApi()
    with loopback.serve(api.app()) as url:
        api.url = url
        yield api


@pytest.fixture
async def stripe(api: StripeApi) -> AsyncIterator[Stripe]:
    adapter = adapter_of(api)
    yield adapter
    await adapter.aclose()


def adapter_of(api: StripeApi, **changes: Any) -> Stripe:
    values: dict[str, Any] = {"deadline_s": 20.0, "connections_max": 8, "url": api.url}
    return Stripe(api.key, [api.hook_secret], **{**values, **changes})


def wanted(attempt: str = "ORDER1-1", **changes: Any) -> LinkWanted:
    values: dict[str, Any] = {
        "attempt_id": attempt,
        "order_no": "ORDER1",
        "amount_minor": 19_900,
        "currency": "EUR",
        "title": "Phone & case = 128 GB",
        "channel": "stripe",
        "expires_at": datetime.now(UTC) + timedelta(hours=1),
        "return_url": "https://shop.example/done?a=1&b=2",
    }
    return LinkWanted(**{**values, **changes})


def ref(link: Link | None = None, attempt: str = "ORDER1-1") -> AttemptRef:
    return AttemptRef(
        attempt_id=attempt, order_no="ORDER1", provider_ref=link.provider_ref if link is not None else None
    )


async def created(stripe: Stripe, **changes: Any) -> Link:
    answer = await stripe.create(wanted(**changes))
    assert isinstance(answer, Done), answer
    return answer.value


# -- payments


async def test_a_page_is_made_and_its_payment_is_seen(api: StripeApi, stripe: Stripe) -> None:
    link = await created(stripe)
    assert link.kind == "redirect"
    assert link.url is not None and link.provider_ref is not None and link.provider_ref in link.url
    assert await stripe.query(ref(link)) == Done(Payment(state="waiting"))
    api.pay(link.provider_ref)
    answer = await stripe.query(ref(link))
    assert isinstance(answer, Done) and answer.value.captured is not None
    captured = answer.value.captured
    assert (captured.amount_minor, captured.currency) == (19_900, "EUR")
    assert (captured.attempt_id, captured.order_no) == ("ORDER1-1", "ORDER1")
    assert captured.provider_ref.startswith("pi_")
    assert abs((captured.captured_at - datetime.now(UTC)).total_seconds()) < 60


async def test_the_embedded_form_gets_a_client_secret(stripe: Stripe) -> None:
    link = await created(stripe, channel="stripe-embedded")
    assert (link.kind, link.url) == ("sdk", None)
    assert link.params is not None and link.params["client_secret"].startswith("cs_test_")


async def test_the_same_attempt_twice_is_one_session(api: StripeApi, stripe: Stripe) -> None:
    at = datetime.now(UTC) + timedelta(hours=2)
    first = await created(stripe, expires_at=at)
    again = await created(stripe, expires_at=at)
    assert first == again
    assert len(api.sessions) == 1


async def test_the_same_attempt_with_a_moved_deadline_finds_the_first_session(
    api: StripeApi, stripe: Stripe
) -> None:
    first = await created(stripe, expires_at=datetime.now(UTC) + timedelta(hours=2))
    again = await created(stripe, expires_at=datetime.now(UTC) + timedelta(hours=3))
    assert again.provider_ref == first.provider_ref
    assert len(api.sessions) == 1


async def test_a_repeat_after_the_end_is_told_the_end_and_not_the_stored_answer(
    api: StripeApi, stripe: Stripe
) -> None:
    at = datetime.now(UTC) + timedelta(hours=2)
    link = await created(stripe, expires_at=at)
    assert isinstance(await stripe.close(ref(link)), Done)
    assert await stripe.create(wanted(expires_at=at)) == Refused("closed")
    at = datetime.now(UTC) + timedelta(hours=3)
    other = await created(stripe, attempt="ORDER1-2", expires_at=at)
    api.pay(str(other.provider_ref))
    assert await stripe.create(wanted("ORDER1-2", expires_at=at)) == Refused("paid")


@pytest.mark.parametrize(("minutes", "at_stripe"), [(5, 30), (60, 60), (24 * 60, 24 * 60)])
async def test_a_session_lives_as_stripe_allows_and_the_link_as_we_say(
    api: StripeApi, stripe: Stripe, minutes: int, at_stripe: int
) -> None:
    until = datetime.now(UTC) + timedelta(minutes=minutes)
    link = await created(stripe, expires_at=until)
    assert link.expires_at <= until
    session = api.sessions[str(link.provider_ref)]
    assert abs(session["expires_at"] - time.time() - at_stripe * 60) < 60


async def test_closing_decides_whether_it_can_still_be_paid(api: StripeApi, stripe: Stripe) -> None:
    open_one, paid_one = await created(stripe), await created(stripe, attempt="ORDER1-2")
    answer = await stripe.close(ref(open_one))
    assert isinstance(answer, Done) and answer.value.state == "closed"
    again = await stripe.close(ref(open_one))
    assert isinstance(again, Done) and again.value.state == "closed"
    api.pay(str(paid_one.provider_ref))
    late = await stripe.close(ref(paid_one, "ORDER1-2"))
    assert isinstance(late, Done) and late.value.state == "paid" and late.value.captured is not None


async def test_a_debit_under_way_can_neither_be_closed_nor_called_paid(
    api: StripeApi, stripe: Stripe
) -> None:
    link = await created(stripe)
    api.pay(str(link.provider_ref), later=True)
    assert await stripe.query(ref(link)) == Done(Payment(state="waiting", code="processing"))
    assert await stripe.close(ref(link)) == MaybeDone("processing", counts=Result.SUCCESS)
    api.settle_later(str(link.provider_ref), paid=False)
    answer = await stripe.close(ref(link))
    assert isinstance(answer, Done) and answer.value.state == "declined"


async def test_an_attempt_whose_reference_was_lost_is_found_by_our_own_id(
    api: StripeApi, stripe: Stripe
) -> None:
    for number in range(3):
        await created(stripe, attempt=f"OTHER{number}-1")
    api.faults.lose(Response(b"upstream", 502))
    assert await stripe.create(wanted()) == MaybeDone("http_502")
    assert await stripe.query(ref()) == Done(Payment(state="waiting"))
    answer = await stripe.close(ref())
    assert isinstance(answer, Done) and answer.value.state == "closed"
    assert await stripe.query(ref(attempt="NEVER-1")) == Done(Payment(state="absent"))
    assert await stripe.close(ref(attempt="NEVER-1")) == Done(Payment(state="absent"))


async def test_lost_sessions_are_looked_for_over_several_pages(api: StripeApi, stripe: Stripe) -> None:
    await created(stripe)
    template = next(iter(api.sessions.values()))
    for number in range(250):
        api.sessions[f"cs_test_{number}"] = {
            **template,
            "id": f"cs_test_{number}",
            "client_reference_id": f"X{number}",
        }
    assert await stripe.query(ref()) == Done(Payment(state="waiting"))
    for number in range(250, 600):
        api.sessions[f"cs_test_{number}"] = {
            **template,
            "id": f"cs_test_{number}",
            "client_reference_id": f"X{number}",
        }
    assert await stripe.query(ref()) == MaybeDone("too_many_sessions", counts=Result.IGNORED)


async def test_a_foreign_session_is_not_taken_for_the_attempt(stripe: Stripe) -> None:
    link = await created(stripe)
    assert await stripe.query(ref(link, "ORDER1-9")) == MaybeDone("foreign_session")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"currency": "KWD", "amount_minor": 5_124}, "amount_not_chargeable"),
        ({"return_url": None}, "return_url_missing"),
    ],
)
async def test_what_stripe_cannot_do_is_refused_before_any_call(
    api: StripeApi, stripe: Stripe, change: dict[str, Any], code: str
) -> None:
    assert await stripe.create(wanted(**change)) == Refused(code, other_may=True)
    assert api.calls == []


# -- what answers mean


@pytest.mark.parametrize(
    ("status", "error", "answer"),
    [
        (400, {"type": "invalid_request_error", "code": "amount_too_small"}, Refused("amount_too_small")),
        (402, {"type": "card_error", "code": "card_declined", "decline_code": "lost_card"}, Refused("lost_card")),
        (401, {"type": "invalid_request_error"}, Refused("invalid_request_error", True, Result.FAILURE)),
        (403, {"type": "invalid_request_error"}, Refused("invalid_request_error", True, Result.FAILURE)),
        (409, {"type": "invalid_request_error", "code": "idempotency_key_in_use"},
         MaybeDone("idempotency_key_in_use", Result.IGNORED)),
        (429, {"type": "invalid_request_error", "code": "rate_limit"}, NotDone("rate_limit", 2_000, Result.IGNORED)),
        (500, {"type": "api_error"}, MaybeDone("api_error")),
        (503, None, MaybeDone("http_503")),
        (404, None, MaybeDone("http_404")),
    ],
)  # fmt: skip
async def test_an_error_is_not_done_refused_or_unknown(
    api: StripeApi, stripe: Stripe, status: int, error: dict[str, str] | None, answer: object
) -> None:
    body = (
        JSONResponse({"error": error}, status, {"retry-after": "2"}) if error else Response(b"<html>", status)
    )
    api.faults.refuse(body)
    assert await stripe.create(wanted()) == answer


async def test_a_500_is_kept_for_its_key_and_the_way_out_is_to_close(api: StripeApi, stripe: Stripe) -> None:
    at = datetime.now(UTC) + timedelta(hours=2)
    api.kept["ORDER1-1"] = ("", 500, b"{}")
    assert isinstance(await stripe.create(wanted(expires_at=at)), Refused | MaybeDone)
    assert await stripe.close(ref()) == Done(Payment(state="absent"))
    assert isinstance(await stripe.create(wanted("ORDER1-2", expires_at=at)), Done)


async def test_no_answer_is_unknown_and_no_connection_is_not_done(api: StripeApi) -> None:
    slow = adapter_of(api, deadline_s=0.1)
    api.faults.stall(0.5)
    answer = await slow.create(wanted())
    assert isinstance(answer, MaybeDone)
    assert len(api.sessions) == 1
    await slow.aclose()
    nobody = adapter_of(api, url="http://127.0.0.1:1")
    assert isinstance(await nobody.create(wanted()), NotDone)
    await nobody.aclose()


async def test_a_wrong_key_is_told_to_the_breaker(api: StripeApi) -> None:
    adapter = Stripe("sk_wrong", ["whsec_x"], deadline_s=20.0, connections_max=1, url=api.url)
    answer = await adapter.query(AttemptRef(attempt_id="A-1", order_no="A", provider_ref="cs_1"))
    assert isinstance(answer, Refused) and answer.counts is Result.FAILURE and answer.other_may
    await adapter.aclose()


async def test_a_proxys_404_is_not_a_missing_payment(api: StripeApi, stripe: Stripe) -> None:
    link = await created(stripe)
    for call in (stripe.query, stripe.close):
        api.faults.refuse(Response(b"<html>not here", 404))
        assert await call(ref(link)) == MaybeDone("http_404")


# -- refunds and the bill


async def paid(api: StripeApi, stripe: Stripe) -> RefundWanted:
    link = await created(stripe)
    api.pay(str(link.provider_ref))
    answer = await stripe.query(ref(link))
    assert isinstance(answer, Done) and answer.value.captured is not None
    return RefundWanted(
        refund_id="R1-1", order_no="ORDER1", attempt_id="ORDER1-1", capture_ref=answer.value.captured.provider_ref,
        amount_minor=900, currency="EUR", captured_minor=19_900, reason="damaged",
    )  # fmt: skip


async def test_a_refund_is_done_once_and_found_again(api: StripeApi, stripe: Stripe) -> None:
    want = await paid(api, stripe)
    assert await stripe.refund_query("R1-1", want.capture_ref) == Done(RefundState(state="absent"))
    first = await stripe.refund(want)
    assert isinstance(first, Done) and first.value.state == "done"
    assert await stripe.refund(want) == first
    assert await stripe.refund_query("R1-1", want.capture_ref) == first
    assert len(api.refunds) == 1
    assert await stripe.refund_query("R1-1") == MaybeDone("capture_unknown", counts=Result.IGNORED)


@pytest.mark.parametrize(
    ("status", "state"),
    [("pending", "pending"), ("requires_action", "pending"), ("failed", "failed"), ("canceled", "failed")],
)
async def test_a_refund_that_is_not_done_yet_or_never_will_be(
    api: StripeApi, stripe: Stripe, status: str, state: str
) -> None:
    api.refund_status = status
    want = await paid(api, stripe)
    for answer in (await stripe.refund(want), await stripe.refund_query(want.refund_id, want.capture_ref)):
        assert isinstance(answer, Done) and answer.value.state == state
        assert answer.value.code == (f"refund_{status}" if state == "failed" else None)


async def test_more_than_was_paid_is_refused(api: StripeApi, stripe: Stripe) -> None:
    want = await paid(api, stripe)
    too_much = RefundWanted(
        **{**{name: getattr(want, name) for name in want.__slots__}, "amount_minor": 19_901}
    )
    assert await stripe.refund(too_much) == Refused("amount_too_large")


async def test_the_bill_has_our_captures_and_refunds_of_the_day_and_nobody_elses(
    api: StripeApi, stripe: Stripe
) -> None:
    want = await paid(api, stripe)
    await stripe.refund(want)
    one = next(iter(api.charges.values()))
    api.charges["ch_other_shop"] = {**one, "id": "ch_other_shop", "metadata": {}}
    api.charges["ch_failed"] = {**one, "id": "ch_failed", "paid": False}
    api.charges["ch_yesterday"] = {**one, "id": "ch_yesterday", "created": one["created"] - 86_400}
    answer = await stripe.bill(datetime.fromtimestamp(one["created"], UTC).date())
    assert isinstance(answer, Done)
    assert [(line.kind, line.our_id, line.order_no, line.amount_minor) for line in answer.value] == [
        ("capture", "ORDER1-1", "ORDER1", 19_900),
        ("refund", "R1-1", "ORDER1", 900),
    ]
    assert answer.value[0].provider_ref == want.capture_ref


# -- call-backs


def hook_of(api: StripeApi, signed: tuple[dict[str, str], bytes], now: datetime | None = None) -> object:
    adapter = adapter_of(api)
    return adapter.read_hook(signed[0], signed[1], now or datetime.now(UTC))


def session_of(api: StripeApi) -> str:
    """A Session as the stand-in makes it, without the adapter."""
    api.sessions["cs_test_1"] = {
        "id": "cs_test_1", "status": "open", "payment_status": "unpaid", "created": int(time.time()),
        "expires_at": int(time.time()) + 3600, "amount_total": 19_900, "currency": "eur",
        "client_reference_id": "ORDER1-1", "metadata": {"order_no": "ORDER1", "attempt_id": "ORDER1-1"},
        "intent_metadata": {"order_no": "ORDER1", "attempt_id": "ORDER1-1"}, "payment_intent": None, "url": "https://x",
        "client_secret": None,
    }  # fmt: skip
    return "cs_test_1"


async def test_a_paid_sessions_event_and_its_query_name_the_same_capture(
    api: StripeApi, stripe: Stripe
) -> None:
    link = await created(stripe)
    hook = hook_of(api, api.signed(api.pay(str(link.provider_ref))))
    answer = await stripe.query(ref(link))
    assert isinstance(hook, HookPaid) and isinstance(answer, Done) and answer.value.captured is not None
    assert hook.captured.provider_ref == answer.value.captured.provider_ref
    assert hook.captured.amount_minor == answer.value.captured.amount_minor


def test_what_each_event_means() -> None:
    api = StripeApi()
    session = api.sessions[session_of(api)]
    later = api.pay("cs_test_1", later=True)
    assert isinstance(hook_of(api, api.signed(later)), HookOther)  # complete, but not paid
    failed = hook_of(api, api.signed(api.settle_later("cs_test_1", paid=False)))
    assert isinstance(failed, HookDeclined) and failed.final
    arrived = hook_of(api, api.signed(api.settle_later("cs_test_1", paid=True)))
    assert isinstance(arrived, HookPaid)
    session["status"] = "expired"
    assert isinstance(hook_of(api, api.signed(api.event("checkout.session.expired", session))), HookClosed)
    intent = {"id": "pi_1", "status": "requires_payment_method", "metadata": session["intent_metadata"]}
    tried = hook_of(api, api.signed(api.event("payment_intent.payment_failed", intent)))
    assert isinstance(tried, HookDeclined) and not tried.final
    back = {"id": "re_1", "status": "succeeded", "metadata": {"refund_id": "R1-1"}}
    for status in ("failed", "canceled"):  # a bank may send it back days after it succeeded
        gone = hook_of(api, api.signed(api.event("refund.failed", {**back, "status": status})))
        assert isinstance(gone, HookRefundFailed) and gone.code == f"refund_{status}"
    done = hook_of(api, api.signed(api.event("refund.updated", back)))
    assert done == HookRefunded(event_id=done.event_id, refund_id="R1-1", provider_ref="re_1")  # type: ignore[attr-defined]
    for kind, thing in (
        ("customer.created", {"id": "cus_1"}),
        ("refund.updated", {**back, "status": "pending"}),
    ):
        assert isinstance(hook_of(api, api.signed(api.event(kind, thing))), HookOther)
    foreign = {**session, "client_reference_id": None}
    assert isinstance(hook_of(api, api.signed(api.event("checkout.session.completed", foreign))), HookOther)


def test_stripes_own_sdk_verifies_what_we_verify_and_refuses_what_we_refuse() -> None:
    api = StripeApi()
    session_of(api)
    headers, body = api.signed(api.pay("cs_test_1"))
    event = sdk.Webhook.construct_event(body, headers["stripe-signature"], api.hook_secret)  # type: ignore[no-untyped-call]
    hook = hook_of(api, (headers, body))
    assert isinstance(hook, HookPaid) and hook.event_id == event.id
    made = sdk.WebhookSignature.generate_signature_header(body.decode(), api.hook_secret)  # type: ignore[no-untyped-call]
    assert isinstance(hook_of(api, ({"stripe-signature": made}, body)), HookPaid)
    old = sdk.WebhookSignature.generate_signature_header(
        body.decode(), api.hook_secret, int(time.time()) - 400
    )  # type: ignore[no-untyped-call]
    with pytest.raises(sdk.SignatureVerificationError):
        sdk.WebhookSignature.verify_header(body, old, api.hook_secret, 300)  # type: ignore[no-untyped-call]
    assert hook_of(api, ({"stripe-signature": old}, body)) == HookForged("timestamp_outside_window")


def test_any_bit_flipped_in_a_call_back_is_refused() -> None:
    api = StripeApi()
    session_of(api)
    headers, body = api.signed(api.pay("cs_test_1"))
    adapter, now = adapter_of(api), datetime.now(UTC)
    assert isinstance(adapter.read_hook(headers, body, now), HookPaid)
    for bent in flips(body):
        assert isinstance(adapter.read_hook(headers, bent, now), HookForged)
    for bent_headers in header_flips(headers, "stripe-signature"):
        assert isinstance(adapter.read_hook(bent_headers, body, now), HookForged)


STRANGERS = adapter_of(StripeApi())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.text(max_size=120))
def test_whatever_a_stranger_sends_is_forged(body: bytes, header: str) -> None:
    hook = STRANGERS.read_hook({"stripe-signature": header}, body, datetime.now(UTC))
    assert isinstance(hook, HookForged)


@pytest.mark.parametrize("late_s", [-400, -301, 301, 400, 10**9])
def test_a_call_back_outside_five_minutes_is_refused(late_s: int) -> None:
    api = StripeApi()
    session_of(api)
    signed = api.signed(api.pay("cs_test_1"), int(time.time()) + late_s)
    assert hook_of(api, signed) == HookForged("timestamp_outside_window")


def test_a_signed_body_that_is_no_event_is_refused() -> None:
    api = StripeApi()
    for thing in ([], {"id": "evt"}, {"id": 1, "type": "x", "created": 1, "data": {"object": {}}}, "text"):
        assert hook_of(api, api.signed(thing)) == HookForged("malformed")  # type: ignore[arg-type]


def test_while_a_secret_is_rolled_both_verify() -> None:
    api = StripeApi()
    session_of(api)
    signed = api.signed(api.pay("cs_test_1"))
    rolled = Stripe("sk", ["whsec_new", api.hook_secret], deadline_s=1, connections_max=1)
    assert isinstance(rolled.read_hook(*signed, datetime.now(UTC)), HookPaid)
    done = Stripe("sk", ["whsec_new"], deadline_s=1, connections_max=1)
    assert done.read_hook(*signed, datetime.now(UTC)) == HookForged("signature_wrong")


def test_redelivery_goes_on_until_a_2xx_and_every_copy_is_the_same_event() -> None:
    api = StripeApi()
    session_of(api)
    adapter = adapter_of(api)
    no, yes = adapter.hook_reply(False), adapter.hook_reply(True)
    shop = loopback.Shop([(no.status, no.body), (no.status, no.body), (yes.status, yes.body)])
    with shop.open() as url:
        assert api.deliver(url, api.pay("cs_test_1")) == (3, True)
    hooks = [adapter.read_hook(headers, body, datetime.now(UTC)) for headers, body in shop.got]
    assert len({hook.event_id for hook in hooks if isinstance(hook, HookPaid)}) == 1
    assert len(hooks) == 3
    assert sum(stripe_api.SCHEDULE_S) > 2 * 86_400


# -- the official SDK as a client of the stand-in


async def test_the_stand_in_speaks_stripes_protocol_to_stripes_own_sdk(
    api: StripeApi, stripe: Stripe
) -> None:
    def call() -> tuple[str, str, str]:
        client = sdk.StripeClient(api.key, base_addresses={"api": api.url}, max_network_retries=0)
        session = client.v1.checkout.sessions.create(
            {
                "mode": "payment",
                "success_url": "https://shop.example",
                "client_reference_id": "SDK1-1",
                "metadata": {"order_no": "SDK1", "attempt_id": "SDK1-1"},
                "line_items": [
                    {
                        "quantity": 1,
                        "price_data": {"currency": "eur", "unit_amount": 500, "product_data": {"name": "x"}},
                    }
                ],
            },
            {"idempotency_key": "SDK1-1"},
        )
        expired = client.v1.checkout.sessions.expire(session.id)
        return session.id, str(session.status), str(expired.status)

    session_id, first, then = await asyncio.to_thread(call)
    assert (first, then) == ("open", "expired")
    answer = await stripe.query(AttemptRef(attempt_id="SDK1-1", order_no="SDK1", provider_ref=session_id))
    assert isinstance(answer, Done) and answer.value.state == "closed"
