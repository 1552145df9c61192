"""Suppliers' daily bills and our books: agreed, missing here, missing there, another amount; read once, or again."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from app.ledger import bills, refunds
from app.ledger.engine import alone
from app.providers.answer import Done
from app.providers.payment import BillLine, RefundWanted
from app.purchase.paying import hook
from app.repair import bills as reading
from app.repair.bills import Biller
from tests.providers.server import SECRET, Shop
from tests.purchase.money import PRICE, Money, money
from tests.purchase.test_real_suppliers import CASES, Case, begun


def today() -> date:
    return datetime.now(UTC).date()


async def paid(till: Money, buyer: str) -> str:
    number = await till.reserve(buyer)
    async with till.loops():
        await till.shop.press(await till.link_of(number))
        await till.becomes(number, "paid")
    return number


async def differences(till: Money, day: date | None = None) -> list[tuple[str, str, int | None, int | None]]:
    """(what, kind, ours, theirs) after the bill was read."""
    (report,) = await reading.read_now(
        till.engine, till.providers, till.settings, day or today(), list(till.providers.payment)
    )
    assert report["state"] == "read", report
    return [(d["what"], d["kind"], d["ours_minor"], d["theirs_minor"]) for d in report["differences"]]


async def test_books_that_agree_stay_agreed_however_often_they_are_read(till: Money) -> None:
    number = await paid(till, "ann")
    async with till.engine.begin() as conn:
        assert isinstance(await refunds.ask(conn, number, None, False, "damaged"), refunds.RefundAsked)
    async with till.loops():
        await till.becomes(number, "refunded")
    for _ in range(2):
        assert await differences(till) == []
        assert await till.one("SELECT count(*) FROM bill_line") == 2
    assert (await till.sql("SELECT lines FROM bill"))[0]["lines"] == 2


async def test_money_of_a_lost_call_back_is_found_on_the_bill_and_pays_its_order(till: Money) -> None:
    number = await till.reserve("ann")
    async with till.loops():
        link = await till.link_of(number)
    till.hooks_on = False
    await till.shop.press(link)  # paid, and nobody hears of it
    assert await till.state(number) == "reserved"
    with capture_logs() as logs:
        assert await differences(till) == []  # it was missing, was asked about, and is here
    assert [line["alert"] for line in logs if "alert" in line] == ["bill_differs"]
    assert await till.state(number) == "paid" and await till.captures(number) == ["kept"]
    row = (
        await till.sql("SELECT kind, what, theirs_minor, cleared_at IS NOT NULL AS gone FROM bill_difference")
    )[0]
    assert tuple(row.values()) == ("missing_here", "capture", PRICE, True)
    noted = await till.sql("SELECT action, detail FROM journal")
    assert [(one["action"], one["detail"]["differences"]) for one in noted] == [("bill.differs", 1)]


async def test_what_they_do_not_have_or_have_otherwise_calls_a_person_once(till: Money) -> None:
    number = await paid(till, "ann")
    await till.sql(
        "UPDATE capture SET amount_minor = amount_minor - 1, captured_at = captured_at - interval '2 h'"
    )
    await till.sql(
        "INSERT INTO capture (provider, provider_ref, order_no, attempt_id, amount_minor, currency, state, captured_at)"
        " SELECT provider, 'cap_nobody', order_no, attempt_id, 7, currency, 'due', captured_at FROM capture"
    )
    day = (await till.sql("SELECT (captured_at AT TIME ZONE 'UTC')::date AS day FROM capture LIMIT 1"))[0][
        "day"
    ]
    refund = RefundWanted(
        refund_id="by-hand", order_no=number, attempt_id=f"{number}-1", amount_minor=5, currency="CNY",
        capture_ref=str(await till.one("SELECT provider_ref FROM capture WHERE amount_minor > 7")),
        captured_minor=PRICE, reason="in the supplier's console",
    )  # fmt: skip
    assert isinstance(await till.providers.payment["sandbox"].refund(refund), Done)
    if day != today():  # just after midnight: what they have is on today's bill, what we have was yesterday
        await differences(till, day)
    expected = {
        ("capture", "other_amount", PRICE - 1, PRICE),
        ("refund", "missing_here", None, 5),
        ("capture", "missing_there", 7, None),
    }
    with capture_logs() as logs:
        found = set(await differences(till))
        assert found == expected if day == today() else found <= expected
        assert set(await differences(till)) == found
        biller = Biller(till.engine, till.providers, till.settings)
        await biller.again()
    assert [line["alert"] for line in logs if "alert" in line] == ["bill_differs"]  # once, not at every look
    await till.sql("DELETE FROM capture WHERE amount_minor = 7")
    await biller.again()
    still = "SELECT count(*) FROM bill_difference WHERE cleared_at IS NULL AND kind = 'missing_there'"
    assert await till.one(still) == 0


@pytest.fixture(params=list(CASES))
async def real(
    request: pytest.FixtureRequest, redis_url: str, database_url: str
) -> AsyncIterator[tuple[Case, Money]]:
    with CASES[request.param]() as case:
        nobody = cast(Shop, SimpleNamespace(url="http://127.0.0.1:1"))
        values = {"payment_provider": case.name, "provider_deadline_s": 3.0, **case.settings}
        async with money(nobody, redis_url, database_url, **values) as till:
            await till.publish(pay_within_s=600)
            yield case, till


def print_bill(case: Case, *, refund_id: str | None) -> None:
    """The stand-in makes the bills of the two Beijing days that a UTC day lies in (Stripe needs none: it lists)."""
    at = datetime.now(UTC)
    days = [today().isoformat(), (today() + timedelta(days=1)).isoformat()]
    if case.name == "alipay":
        trade = next(iter(case.api.trades.values()))
        rows = [case.api.bill_row(trade, at)]
        if refund_id is not None:
            rows.append(case.api.bill_row(trade, at, (refund_id, PRICE)))
        case.api.bills = {days[0]: case.api.make_bill(rows), days[1]: case.api.make_bill([])}
    elif case.name == "wechat-pay":
        order = next(iter(case.api.orders.values()))
        lines = [case.api.bill_row(at, order)]
        if refund_id is not None:
            lines.append(case.api.bill_row(at, order, case.api.refunds[refund_id]))
        case.api.bills = {days[0]: "\r\n".join(lines)}


async def test_each_suppliers_bill_agrees_with_what_its_call_backs_said(real: tuple[Case, Money]) -> None:
    case, till = real
    number = await begun(case, till)
    async with till.loops():
        headers, body = await asyncio.to_thread(case.pay, f"{number}-1", await till.link_of(number))
        await hook.take_hook(till.engine, till.providers, case.name, headers, body)
        print_bill(case, refund_id=None)
        await till.sql("UPDATE capture SET captured_at = captured_at - interval '1 s'")
        assert await differences(till) == []
        async with till.engine.begin() as conn:
            asked = await refunds.ask(conn, number, None, False, "damaged")
            assert isinstance(asked, refunds.RefundAsked)
        await till.becomes(number, "refunded")
    print_bill(case, refund_id=asked.refund_id)
    assert await differences(till) == []
    assert await till.one("SELECT count(*) FROM bill_line") == 2
    # Our books lose both: they are missing here, under the very names that our books had for them.
    await till.sql("UPDATE refund SET state = 'failed'")
    await till.sql(
        "UPDATE capture SET provider_ref = 'other', captured_at = captured_at - interval '30 days'"
    )
    assert await differences(till) == [("refund", "missing_here", PRICE, PRICE)]
    # The capture was missing for a moment only: the supplier was asked, and vouched for it.
    assert await till.one("SELECT count(*) FROM bill_difference WHERE what = 'capture'") == 1
    assert await till.one("SELECT count(*) FROM capture") == 2


async def test_a_slow_bill_is_waited_for_and_no_payment_is_refused_for_it(
    supplier: Shop, redis_url: str, database_url: str
) -> None:
    async with money(
        supplier, redis_url, database_url, provider_deadline_s=0.5, bill_deadline_s=20.0
    ) as till:
        await till.publish()
        await till.shop.control(payments={"latency_ms": 1_200, "only": ["bill"]})
        assert await differences(till) == []  # longer than a payment call may take
        guard = till.providers.payment["sandbox"].guard
        assert (guard.breaker.counts().calls, guard.bulkhead.in_flight) == (0, 0)
    async with money(supplier, redis_url, database_url, bill_deadline_s=0.3) as till:
        (report,) = await reading.read_now(till.engine, till.providers, till.settings, today(), ["sandbox"])
        assert (report["state"], report["code"]) == ("due", "deadline")


# What is read when


async def capture_at(till: Money, at: str, ref: str) -> None:
    await till.sql(
        "INSERT INTO capture (provider, provider_ref, order_no, amount_minor, currency, state, captured_at)"
        f" VALUES ('sandbox', :ref, 'ORDER', 5, 'CNY', 'kept', CAST('{at}' AS timestamptz))"
        if at[0].isdigit()
        else "INSERT INTO capture (provider, provider_ref, order_no, amount_minor, currency, state, captured_at)"
        f" VALUES ('sandbox', :ref, :ref, 5, 'CNY', 'kept', {at})",
        ref=ref,
    )


MIDNIGHT = "(date_trunc('day', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC')"


async def test_every_finished_day_since_the_first_capture_is_read_and_none_twice(till: Money) -> None:
    async def planned(back: int = 30) -> int:
        async with till.engine.begin() as conn:
            return await bills.plan(conn, "sandbox", back, 9_000)

    assert await planned() == 0  # nothing was ever paid
    await capture_at(till, f"{MIDNIGHT} - interval '2 days 1 h'", "a")
    assert await planned() == 3  # today is not over
    assert await planned() == 0
    await till.sql("DELETE FROM bill")
    assert await planned(back=2) == 2
    await till.sql("UPDATE bill SET state = 'read', read_at = (day + 1)::timestamp AT TIME ZONE 'UTC'")
    assert await planned(back=2) == 2  # read by hand before the supplier had everything: once more
    await till.sql("UPDATE bill SET state = 'read', read_at = now() + interval '1 day'")
    assert await planned(back=2) == 0


async def test_a_worker_that_died_while_reading_is_followed_by_another_and_stores_nothing_late(
    till: Money,
) -> None:
    await capture_at(till, f"{MIDNIGHT} - interval '1 day 3 h'", "a")
    yesterday = today() - timedelta(days=1)
    async with till.engine.begin() as conn:
        assert await bills.plan(conn, "sandbox", 1, 0) == 1
    async with alone(till.engine) as conn:
        died = await bills.lease(conn, ["sandbox"], 0.0)
        assert died is not None and died["day"] == yesterday
        second = await bills.lease(conn, ["sandbox"], 60.0)
        assert second is not None and second["generation"] == died["generation"] + 1
        assert await bills.lease(conn, ["sandbox"], 60.0) is None
    line = BillLine(
        kind="capture", provider_ref="x", our_id="X-1", order_no="X", amount_minor=1, currency="CNY",
        at=datetime.now(UTC),
    )  # fmt: skip
    async with till.engine.begin() as conn:
        assert not await bills.store(conn, died, [line])
    assert await till.one("SELECT count(*) FROM bill_line") == 0
    biller = Biller(till.engine, till.providers, till.settings.model_copy(update={"bill_days_back": 1}))
    assert await biller.read(second)
    assert not await biller.turn()  # nothing is due any more


async def test_what_was_booked_around_midnight_may_be_on_the_next_days_bill(till: Money) -> None:
    day, before = today() - timedelta(days=1), today() - timedelta(days=2)
    await capture_at(till, f"{MIDNIGHT} - interval '1 day 30 min'", "late")  # 23:30 of the day before
    await capture_at(till, f"{MIDNIGHT} - interval '1 day 2 h'", "clear")  # 22:00 of it

    async def read(of: date, *refs: str) -> list[str]:
        async with till.engine.begin() as conn:
            await bills.want(conn, "sandbox", of)
        async with alone(till.engine) as conn:
            held = await bills.lease(conn, ["sandbox"], 60, of)
        assert held is not None
        lines = [
            BillLine(
                kind="capture", provider_ref=ref, our_id="ORDER-1", order_no="ORDER", amount_minor=5, currency="CNY",
                at=datetime.now(UTC),
            )
            for ref in refs
        ]  # fmt: skip
        async with till.engine.begin() as conn:
            assert await bills.store(conn, held, lines)
            return sorted(one["ref"] for one in await bills.compare(conn, "sandbox", of))

    assert await read(before) == ["clear"]  # the other one is given an hour more
    assert await read(day, "late", "clear") == []
    async with till.engine.begin() as conn:
        await bills.compare(conn, "sandbox", before)  # found on the next day's bill: cleared
    assert await till.one("SELECT count(*) FROM bill_difference WHERE cleared_at IS NULL") == 0
    assert await read(day, "clear") == ["late"]  # on neither


async def test_a_bill_that_is_not_there_yet_is_asked_for_again(till: Money) -> None:
    await till.shop.control(payments={"refuse_rate": 1, "only": ["bill"]})
    await capture_at(till, f"{MIDNIGHT} - interval '9 days'", "a")
    biller = Biller(
        till.engine,
        till.providers,
        till.settings.model_copy(update={"bill_after_s": 0.0, "bill_days_back": 5}),
    )
    with capture_logs() as logs:
        assert await biller.turn()
    rows = await till.sql("SELECT state, code, next_at > now() AS later FROM bill WHERE code IS NOT NULL")
    assert [tuple(row.values()) for row in rows] == [("due", "not_taken", True)]
    assert "bill_missing" in [line.get("alert") for line in logs]  # five days old
    await till.shop.control(reset=True)
    await till.sql("UPDATE bill SET next_at = now()")
    while await biller.turn():
        pass
    assert await till.one("SELECT count(*) FROM bill WHERE state = 'read'") == 5


async def test_the_command_reads_a_bill_and_says_what_differs(till: Money) -> None:
    await paid(till, "ann")
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "FAIRDROP_ENV": "development", "FAIRDROP_DATABASE_URL": till.settings.database_url,
        "FAIRDROP_SANDBOX_URL": till.shop.url, "FAIRDROP_SANDBOX_SECRET": SECRET, "FAIRDROP_PII_KEYS": "11" * 32,
    }  # fmt: skip

    async def run(*words: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app.cli", "reconcile-bill", *words, env=environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(180):
            out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    day = today().isoformat()
    status, out, err = await run(day, "--json")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    assert [(one["provider"], one["state"], one["differences"]) for one in found["bills"]] == [
        ("sandbox", "read", [])
    ]
    await till.sql("UPDATE capture SET amount_minor = 1")
    status, out, _ = await run(day)
    assert status == 1 and "capture other_amount" in out and "ours 1, theirs 19900 CNY" in out
    for bad in (("yesterday",), ("2999-01-01",), (day, "--provider", "stripe")):
        assert (await run(*bad))[0] == 2
