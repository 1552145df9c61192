"""The sandbox supplier on a real socket, through our adapter: what it does, and how it misbehaves on request."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from app.breaker import Result, State
from app.errors import CannotStart
from app.providers import sandbox_wire
from app.providers.answer import Done, MaybeDone, NotDone, Refused
from app.providers.payment import AttemptRef, HookForged, HookPaid, LinkWanted, RefundWanted
from app.providers.registry import Providers, open_providers
from app.providers.sms import Text
from app.settings import Settings
from tests.providers.server import SECRET, Shop, hook_listener, sandbox, until
from tests.sockets import nobody


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    async with sandbox() as shop:
        yield shop


@pytest.fixture
def deadline_s() -> float:
    """Of a call to the supplier. A test that waits for it to pass gives its own."""
    return 20.0


@pytest.fixture
async def providers(shop: Shop, deadline_s: float) -> AsyncIterator[Providers]:
    settings = Settings(
        env="development",
        sandbox_url=shop.url,
        sandbox_secret=SECRET,
        provider_deadline_s=deadline_s,
        provider_wait_max_s=0.1,
    )
    providers = open_providers(settings)
    yield providers
    await providers.aclose()


def wanted(attempt: str = "A1", **changes: Any) -> LinkWanted:
    values: dict[str, Any] = {
        "attempt_id": attempt,
        "order_no": "ORDER1",
        "amount_minor": 19_900,
        "currency": "CNY",
        "title": "Phone <128>",
        "channel": "sandbox",
        "expires_at": datetime.now(UTC) + timedelta(minutes=5),
    }
    return LinkWanted(**{**values, **changes})


def ref(attempt: str = "A1") -> AttemptRef:
    return AttemptRef(attempt_id=attempt, order_no="ORDER1")


async def link(providers: Providers, attempt: str = "A1", **changes: Any) -> str:
    answer = await providers.payment["sandbox"].create(wanted(attempt, **changes))
    assert isinstance(answer, Done), answer
    assert answer.value.url is not None
    return answer.value.url


async def state(providers: Providers, attempt: str = "A1") -> str:
    answer = await providers.payment["sandbox"].query(ref(attempt))
    assert isinstance(answer, Done), answer
    return answer.value.state


async def test_a_link_is_paid_once_and_its_capture_is_found_by_query(
    shop: Shop, providers: Providers
) -> None:
    url = await link(providers)
    assert await state(providers) == "waiting"
    replies = await asyncio.gather(*(shop.press(url) for _ in range(10)))
    assert {reply.json()["capture_ref"] for reply in replies} == {replies[0].json()["capture_ref"]}
    answer = await providers.payment["sandbox"].query(ref())
    assert isinstance(answer, Done)
    assert answer.value.captured is not None
    assert (answer.value.captured.amount_minor, answer.value.captured.currency) == (19_900, "CNY")
    assert (await shop.stats())["captured"] == 1


async def test_the_same_attempt_is_one_link_however_often_it_is_asked_for(providers: Providers) -> None:
    assert await link(providers) == await link(providers)
    answer = await providers.payment["sandbox"].create(wanted(amount_minor=1))
    assert answer == Refused("key_reused")


async def test_a_closed_attempt_cannot_be_paid_not_even_one_that_was_never_made(
    shop: Shop, providers: Providers
) -> None:
    payment = providers.payment["sandbox"]
    url = await link(providers)
    closed = await payment.close(ref())
    assert isinstance(closed, Done)
    assert closed.value.state == "closed"
    assert (await shop.press(url)).status_code == 410
    assert await payment.create(wanted()) == Refused("closed")
    absent = await payment.close(ref("NEVER"))
    assert isinstance(absent, Done)
    assert absent.value.state == "absent"
    assert await payment.create(wanted("NEVER")) == Refused("closed")


async def test_closing_a_paid_attempt_says_paid(shop: Shop, providers: Providers) -> None:
    await shop.press(await link(providers))
    answer = await providers.payment["sandbox"].close(ref())
    assert isinstance(answer, Done)
    assert answer.value.state == "paid"
    assert answer.value.captured is not None


async def test_a_link_ends_when_it_was_told_to(shop: Shop, providers: Providers) -> None:
    ends = datetime.now(UTC) + timedelta(minutes=5)
    url = await link(providers, expires_at=ends)
    (pay,) = shop.state.pays.values()
    assert pay.expires_at == ends
    pay.expires_at = datetime.now(UTC)  # and now the five minutes have passed
    assert await state(providers) == "closed"
    assert (await shop.press(url)).status_code == 410
    answer = await providers.payment["sandbox"].create(
        wanted("A2", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    )
    assert answer == Refused("expires_in_the_past")


async def _is(providers: Providers, wanted_state: str, attempt: str = "A1") -> bool:
    return await state(providers, attempt) == wanted_state


async def test_refunds_are_idempotent_and_never_more_than_the_capture(
    shop: Shop, providers: Providers
) -> None:
    payment = providers.payment["sandbox"]
    capture = (await shop.press(await link(providers))).json()["capture_ref"]

    def back(refund: str, amount: int) -> RefundWanted:
        return RefundWanted(
            refund_id=refund, order_no="ORDER1", attempt_id="A1", capture_ref=capture, amount_minor=amount,
            currency="CNY", captured_minor=19_900, reason="test",
        )  # fmt: skip

    assert isinstance(await payment.refund(back("R1", 10_000)), Done)
    assert isinstance(await payment.refund(back("R1", 10_000)), Done)
    assert await payment.refund(back("R1", 9_999)) == Refused("key_reused")
    assert await payment.refund(back("R2", 10_000)) == Refused("amount_wrong")
    assert isinstance(await payment.refund(back("R3", 9_900)), Done)
    absent = await payment.refund_query("R2")
    assert isinstance(absent, Done)
    assert absent.value.state == "absent"
    assert (await shop.stats())["refunded_minor"] == 19_900
    bill = await payment.bill(datetime.now(UTC).date())
    assert isinstance(bill, Done)
    assert sorted((line.kind, line.our_id, line.amount_minor) for line in bill.value) == [
        ("capture", "A1", 19_900),
        ("refund", "R1", 10_000),
        ("refund", "R3", 9_900),
    ]


async def test_a_pending_refund_is_done_later(shop: Shop, providers: Providers) -> None:
    await shop.control(refund_pending_ms=80)
    capture = (await shop.press(await link(providers))).json()["capture_ref"]
    payment = providers.payment["sandbox"]
    asked = RefundWanted(
        refund_id="R1", order_no="ORDER1", attempt_id="A1", capture_ref=capture, amount_minor=1,
        currency="CNY", captured_minor=19_900, reason="test",
    )  # fmt: skip
    first = await payment.refund(asked)
    assert isinstance(first, Done)
    assert first.value.state == "pending"

    async def done() -> bool:
        answer = await payment.refund_query("R1")
        return isinstance(answer, Done) and answer.value.state == "done"

    await until(done)


async def test_texts_are_logged_once_and_a_bad_number_is_a_refusal(shop: Shop, providers: Providers) -> None:
    sms = providers.sms["sandbox-sms"]
    text = Text(id="T1", phone="+8613800000000", language="zh-CN", template="paid", body="付款成功")
    assert isinstance(await sms.send(text), Done)
    assert isinstance(await sms.send(text), Done)
    assert [(row["phone"], row["body"]) for row in await shop.texts()] == [("+8613800000000", "付款成功")]
    bad = Text(id="T2", phone="13800000000", language="en", template="paid", body="paid")
    assert await sms.send(bad) == Refused("phone_wrong")
    assert sms.guard.breaker.counts().failures == 0
    assert "+86" not in repr(text)


# Misbehaving


@pytest.mark.parametrize(
    ("faults", "answer", "deadline_s"),
    [
        ({"error_rate": 1, "error_status": 500}, MaybeDone("sandbox_error"), 20.0),
        ({"error_rate": 1, "error_status": 429}, NotDone("sandbox_error", 0, Result.IGNORED), 20.0),
        ({"refuse_rate": 1}, NotDone("not_taken"), 20.0),
        ({"hang_rate": 1}, MaybeDone("deadline"), 1.0),
        ({"lost_rate": 1}, MaybeDone("deadline"), 1.0),
        ({"lost_rate": 1, "hang_ms": 10}, MaybeDone("reply_lost"), 20.0),
    ],
)
async def test_each_fault_is_understood(shop: Shop, providers: Providers, faults: Any, answer: Any) -> None:
    await shop.control(payments={**faults, "only": ["create"]})
    got = await providers.payment["sandbox"].create(wanted())
    # httpx' own deadline may be the first to pass: both say the same.
    assert got in (answer, MaybeDone("ReadTimeout") if answer == MaybeDone("deadline") else answer)
    done = "lost_rate" in faults
    assert await state(providers) == ("waiting" if done else "absent")


async def test_nobody_there_is_certainly_not_done() -> None:
    with nobody() as port:
        url = f"http://127.0.0.1:{port}"
        providers = open_providers(Settings(env="development", sandbox_url=url, sandbox_secret=SECRET))
        assert await providers.payment["sandbox"].create(wanted()) == NotDone("ConnectError")
        await providers.aclose()


async def test_a_wrong_secret_is_refused_and_counts_against_the_supplier(shop: Shop) -> None:
    providers = open_providers(Settings(env="development", sandbox_url=shop.url, sandbox_secret="not-it"))
    assert await providers.payment["sandbox"].create(wanted()) == Refused(
        "signature_wrong", counts=Result.FAILURE
    )
    await providers.aclose()


async def test_a_flapping_supplier_trips_the_breaker_and_is_taken_back(
    shop: Shop, providers: Providers
) -> None:
    payment = providers.payment["sandbox"]
    await shop.control(payments={"error_rate": 1})
    while payment.guard.breaker.state is State.CLOSED:
        await payment.query(ref())
    before = (await shop.stats())["calls_query"]
    for _ in range(50):
        assert isinstance(await payment.query(ref()), NotDone)
    assert (await shop.stats())["calls_query"] == before
    await shop.control(reset=True)

    async def back() -> bool:
        await payment.query(ref())
        return payment.guard.breaker.state is State.CLOSED

    await until(back)


async def test_a_hanging_payment_supplier_does_not_stall_texts(shop: Shop, providers: Providers) -> None:
    await shop.control(payments={"hang_rate": 1})
    payment = providers.payment["sandbox"]
    hanging = [asyncio.create_task(payment.create(wanted(f"H{number}"))) for number in range(100)]
    await until(lambda: payment.guard.bulkhead.in_flight == payment.guard.rules.places_max)
    text = Text(id="T1", phone="+8613800000000", language="en", template="paid", body="paid")
    assert isinstance(await providers.sms["sandbox-sms"].send(text), Done)
    assert payment.guard.bulkhead.in_flight == payment.guard.rules.places_max  # they hang on
    for task in hanging:
        task.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)
    assert payment.guard.bulkhead.in_flight == 0


async def test_auto_pay_plays_the_buyers_alike_for_the_same_seed(shop: Shop, providers: Providers) -> None:
    await shop.control(
        auto_pay={"share": 0.5, "decline_share": 0.2, "delay_ms": 0, "jitter_ms": 20, "seed": 7}
    )
    names = [f"B{number}" for number in range(60)]
    for name in names:
        await link(providers, name)
    await until(lambda: not shop.state.tasks)
    first = {pay.attempt_id: pay.state for pay in shop.state.pays.values()}
    states = list(first.values())
    assert 15 < states.count("paid") < 45
    assert 3 < states.count("declined") < 25
    assert "waiting" in states
    shop.state.pays.clear()
    for name in names:
        await link(providers, name)
    await until(lambda: not shop.state.tasks)
    assert {pay.attempt_id: pay.state for pay in shop.state.pays.values()} == first


async def test_control_refuses_what_it_does_not_know_and_changes_nothing(shop: Shop) -> None:
    before = (await shop.http.get(f"{shop.url}/control")).json()
    for wrong in (
        {"payments": {"error_rate": 2}},
        {"payments": {"no_such": 1}},
        {"no_such": 1},
        {"payments": {"hang_ms": 10**9}},
        {"hooks": {"copies": 101}},
        {"payments": None},
        [],
        "x",
    ):
        assert (await shop.http.post(f"{shop.url}/control", json=wrong)).status_code == 422
    assert (await shop.http.post(f"{shop.url}/control", content=b"\xff{")).status_code == 422
    assert (await shop.http.get(f"{shop.url}/control")).json() == before


async def test_hostile_requests_are_refused_without_a_server_error(shop: Shop) -> None:
    paths = [
        "/v1/payments",
        "/v1/payments/x/close",
        "/v1/refunds",
        "/v1/sms",
        "/pay/x/pay",
        "/pay/%00/decline",
    ]
    for path in paths:
        for body in (b"", b"{", b"[]", b'{"attempt_id": 1}', b"x" * 20_000, b"[" * 10_000):
            assert (await shop.http.post(shop.url + path, content=body)).status_code < 500
            raw_path = httpx.URL(shop.url + path).path
            signed = sandbox_wire.headers(SECRET.encode(), "POST", raw_path, body)
            assert (await shop.http.post(shop.url + path, content=body, headers=signed)).status_code < 500
    assert (await shop.http.get(f"{shop.url}/sms?limit=-1")).status_code == 200
    assert (await shop.http.get(f"{shop.url}/pay/absent")).status_code == 404


async def test_the_pay_page_works_in_a_browser_and_escapes_the_shops_words(
    shop: Shop, providers: Providers
) -> None:
    url = await link(providers, return_url="https://shop.example/back?a=1&b=2")
    browser = {"accept": "text/html,*/*"}
    page = await shop.http.get(url, headers=browser)
    assert page.headers["content-type"].startswith("text/html")
    assert "Phone &lt;128&gt;" in page.text
    assert "199.00 CNY" in page.text
    assert page.text.count("<button") == 2
    pressed = await shop.http.post(f"{url}/pay", headers=browser)
    assert pressed.status_code == 303
    after = await shop.http.get(url, headers=browser)
    assert "<button" not in after.text
    assert 'href="https://shop.example/back?a=1&amp;b=2"' in after.text


# Call-backs


class Taken:
    """Takes call-backs, verifies them with our adapter, and answers as told."""

    def __init__(self, providers: Providers, refuse_first: int = 0) -> None:
        self.providers, self.refuse = providers, refuse_first
        self.good: list[str] = []
        self.forged: list[str] = []

    async def __call__(self, _: str, headers: dict[str, str], raw: bytes) -> tuple[int, bytes]:
        hook = self.providers.payment["sandbox"].read_hook(headers, raw, datetime.now(UTC))
        if isinstance(hook, HookForged):
            self.forged.append(hook.code)
            return 401, b""
        if self.refuse > 0:
            self.refuse -= 1
            return 503, b""
        assert isinstance(hook, HookPaid)
        self.good.append(hook.event_id)
        return 200, b""


async def test_call_backs_are_repeated_until_they_are_taken(shop: Shop, providers: Providers) -> None:
    take = Taken(providers, refuse_first=2)
    async with hook_listener(take) as office:
        await shop.press(await link(providers, notify_url=f"{office}/v1/hooks/sandbox"))
        await until(lambda: take.good)
    assert len(take.good) == 1
    assert (await shop.stats())["hooks_sent"] == 3


async def test_call_backs_come_doubled_shuffled_and_forged_when_told_to(
    shop: Shop, providers: Providers
) -> None:
    await shop.control(hooks={"copies": 3, "shuffle_ms": 50, "forge_rate": 1})
    take = Taken(providers)
    async with hook_listener(take) as office:
        for number in range(10):
            await shop.press(await link(providers, f"A{number}", notify_url=f"{office}/v1/hooks/sandbox"))
        await until(lambda: not shop.state.tasks)
    assert len(take.good) == 30
    assert len(set(take.good)) == 10
    assert take.forged == ["signature_wrong"] * 10
    assert (await shop.stats()).get("forged_taken", 0) == 0


async def test_late_money_is_called_back_about_whatever_is_dropped(shop: Shop, providers: Providers) -> None:
    await shop.control(hooks={"copies": 3, "drop_rate": 1}, late_pay=True)
    take = Taken(providers)
    async with hook_listener(take) as office:
        await shop.press(await link(providers, "A1", notify_url=f"{office}/v1/hooks/sandbox"))
        late = await link(providers, "A2", notify_url=f"{office}/v1/hooks/sandbox")
        await providers.payment["sandbox"].close(ref("A2"))
        await shop.press(late)
        await until(lambda: not shop.state.tasks)
    assert len(take.good) == 1  # of A2, about which nobody would ask
    assert (await shop.stats())["hooks_dropped"] == 5


def test_any_flipped_bit_of_a_call_back_is_refused() -> None:
    body = b'{"id":"evt_1","type":"payment.paid","merchant":"fairdrop"}'
    secrets, now = [SECRET.encode()], 1_750_000_000.0
    headers = sandbox_wire.headers(secrets[0], "POST", "/hook", body, now)
    assert sandbox_wire.refusal(secrets, headers, "POST", "/hook", body, now) is None
    for at in range(len(body) * 8):
        bent = bytearray(body)
        bent[at // 8] ^= 1 << at % 8
        assert sandbox_wire.refusal(secrets, headers, "POST", "/hook", bytes(bent), now) == "signature_wrong"
    for name, value in headers.items():
        for at in range(len(value) * 7):
            bent_value = bytearray(value.encode())
            bent_value[at // 7] ^= 1 << at % 7
            bent_headers = {**headers, name: bent_value.decode("latin-1")}
            assert sandbox_wire.refusal(secrets, bent_headers, "POST", "/hook", body, now) is not None


@pytest.mark.parametrize(("late_s", "believed"), [(-301, False), (-300, True), (300, True), (301, False)])
def test_a_call_back_is_believed_within_five_minutes_only(late_s: int, believed: bool) -> None:
    secrets, at = [SECRET.encode()], 1_750_000_000.0
    headers = sandbox_wire.headers(secrets[0], "POST", "/hook", b"{}", at)
    why = sandbox_wire.refusal(secrets, headers, "POST", "/hook", b"{}", at + late_s)
    assert why == (None if believed else "timestamp_outside_window")


def test_a_rotated_secret_is_still_believed() -> None:
    headers = sandbox_wire.headers(b"old", "POST", "/hook", b"{}", 1_750_000_000)
    assert sandbox_wire.refusal([b"new", b"old"], headers, "POST", "/hook", b"{}", 1_750_000_000) is None
    assert sandbox_wire.refusal([b"new"], headers, "POST", "/hook", b"{}", 1_750_000_000) == "signature_wrong"


def test_production_refuses_to_start_without_a_secret_or_with_an_unknown_supplier() -> None:
    with pytest.raises(CannotStart, match="SANDBOX_SECRET"):
        open_providers(Settings(env="production"))
    with pytest.raises(CannotStart, match="FAIRDROP_PAYMENT_PROVIDER"):
        open_providers(Settings(env="development", payment_provider="moneybags"))


async def test_it_is_a_real_process_that_stops_on_sigterm_even_while_requests_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", "from app.cli import main; main()", "sandbox", "--port", str(port)],
        env={**os.environ, "FAIRDROP_ENV": "development", "FAIRDROP_SANDBOX_SECRET": SECRET},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:

            async def answers() -> bool:
                try:
                    return (await http.get(f"{url}/healthz")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(answers)
            await http.post(f"{url}/control", json={"payments": {"hang_rate": 1}})
            settings = Settings(
                env="development", sandbox_url=url, sandbox_secret=SECRET, provider_deadline_s=0.2
            )
            providers = open_providers(settings)
            assert isinstance(await providers.payment["sandbox"].create(wanted()), MaybeDone)
            await providers.aclose()
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, 60)
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
