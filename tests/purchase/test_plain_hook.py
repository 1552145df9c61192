"""The plain call-back in one statement: it leaves the very rows that the long way leaves, or none."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from app.ledger import captures
from app.providers import sandbox_wire
from app.purchase.paying import hook
from tests.providers.server import SECRET, Shop
from tests.purchase.money import PRICE, Money, money

TABLES = (
    "purchase_order", "item", "payment_attempt", "capture", "event", "sms", "outbox", "webhook_inbox", "order_line",
)  # fmt: skip
OWN = frozenset({"id", "written", "position"})  # numbers that a table gives by itself


def body_of(number: str, *, event: str = "evt-1", ref: str = "cap-1", amount_minor: int = PRICE) -> bytes:
    now = datetime(2026, 11, 22, 9, tzinfo=UTC)
    return msgspec.json.encode(
        {
            "id": event, "type": "payment.paid", "merchant": sandbox_wire.MERCHANT,
            "payment": {
                "ref": "pay-1", "attempt_id": f"{number}-1", "order_no": number, "amount_minor": amount_minor,
                "currency": "CNY", "merchant": sandbox_wire.MERCHANT, "state": "paid", "url": "http://x",
                "expires_at": now + timedelta(hours=1), "paid_at": now, "capture_ref": ref,
            },
        }
    )  # fmt: skip


async def told(till: Money, raw: bytes) -> int:
    headers = sandbox_wire.headers(sandbox_wire.secrets_of(SECRET)[0], "POST", "/hook", raw, time.time())
    return (await hook.take_hook(till.engine, till.providers, "sandbox", headers, raw)).status


async def rows(till: Money) -> dict[str, list[dict[str, Any]]]:
    """Everything that is in Postgres but for what the clock or a counter says; times only by whether there is one."""
    found = {}
    for table in TABLES:
        kept = [
            {
                name: isinstance(value, datetime)
                if name.endswith(("_at", "_by", "_until")) or name == "at"
                else value
                for name, value in row.items()
                if name not in OWN or isinstance(value, str)
            }
            for row in map(dict, await till.sql(f"SELECT * FROM {table}"))
        ]
        found[table] = sorted(kept, key=lambda row: json.dumps(row, default=str, sort_keys=True))
    return found


async def laid_out(till: Money, change: str = "") -> str:
    number = await till.reserve("ann", contact=True)
    await till.sql(
        "UPDATE payment_attempt SET state = 'sent', sent_at = now(), expires_at = now() + interval '1 h'"
    )
    await till.sql("UPDATE purchase_order SET contact = 'sealed'")  # the seal's own nonce would differ
    if change:
        await till.sql(change)
    return number


CHANGES = {
    "plain": "",
    "leaving": "UPDATE purchase_order SET leaving = TRUE, reason = 'left'",
    "no contact": "UPDATE purchase_order SET contact = NULL",
    "leased": "UPDATE payment_attempt SET leased_until = now() + interval '9 s', generation = 4",
    "link unknown": "UPDATE payment_attempt SET state = 'unknown', code = 'deadline'",
    "told before": "INSERT INTO event (id, type, sale, order_no, version, data) SELECT 'evt-' || order_no || '-3-paid',"
    " 'order.paid', sale, order_no, 3, '{}' FROM purchase_order",
    "another link": "INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, amount_minor,"
    " currency) SELECT order_no || '-2', order_no, 2, provider, channel, 'wanted', amount_minor, currency"
    " FROM payment_attempt",
    "link closed, another open": "WITH closed AS (UPDATE payment_attempt SET state = 'closed' RETURNING *)"
    " INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, amount_minor, currency)"
    " SELECT order_no || '-2', order_no, 2, provider, channel, 'wanted', amount_minor, currency FROM closed",
}


@pytest.mark.parametrize("name", CHANGES)
async def test_both_ways_leave_the_same_rows(
    supplier: Shop, redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen = []
    plainly = captures.pay_plainly
    for long_way in (False, True):
        ways: list[str | None] = []

        async def spied(
            *args: Any, long_way: bool = long_way, ways: list[str | None] = ways, **facts: Any
        ) -> Any:
            ways.append(None if long_way else await plainly(*args, **facts))
            return ways[-1]

        monkeypatch.setattr(captures, "pay_plainly", spied)
        async with money(supplier, redis_url, database_url) as till:
            if long_way:
                await empty(till)
            await till.publish()
            number = await laid_out(till, CHANGES[name])
            assert await told(till, body_of(number)) == 200
            assert ways == [None if long_way else "paid"]
            assert await till.state(number) == "paid"
            seen.append(await rows(till))
    plain, long = seen
    assert plain == long


async def empty(till: Money) -> None:
    """As if nothing had been: the second way begins where the first began."""
    tables = ", ".join((*TABLES, "sale", "refund"))
    await till.sql(f"TRUNCATE {tables} RESTART IDENTITY CASCADE")
    await till.link.call("FLUSHALL")


NOT_PLAIN = {
    "expired": "UPDATE purchase_order SET state = 'expired', ended_at = now()",
    "paid": "UPDATE purchase_order SET state = 'paid', paid_at = now()",
    "other amount": "UPDATE payment_attempt SET amount_minor = amount_minor + 1",
    "other currency": "UPDATE payment_attempt SET currency = 'EUR'",
    "other supplier": "UPDATE payment_attempt SET provider = 'stripe'",
    "known money": "INSERT INTO capture (provider, provider_ref, order_no, amount_minor, currency, state, captured_at)"
    " SELECT 'sandbox', 'cap-1', order_no, 1, 'CNY', 'due', now() FROM purchase_order",
}


@pytest.mark.parametrize("name", NOT_PLAIN)
async def test_what_is_not_plain_changes_nothing_here(till: Money, name: str) -> None:
    number = await laid_out(till, NOT_PLAIN[name])
    before = await rows(till)
    async with till.engine.connect() as conn:
        conn = await conn.execution_options(isolation_level="AUTOCOMMIT")
        found = await captures.pay_plainly(
            conn, provider="sandbox", event_id="evt-1", digest=b"x" * 32, provider_ref="cap-1", order_no=number,
            attempt_id=f"{number}-1", amount_minor=PRICE, currency="CNY", captured_at=datetime.now(UTC),
        )  # fmt: skip
    assert found is None
    assert await rows(till) == before


async def test_fifty_copies_at_once_have_one_effect_and_every_one_is_acknowledged(till: Money) -> None:
    number = await laid_out(till)
    raw = body_of(number)
    again = body_of(number, event="evt-2")  # the supplier tells it anew
    assert set(
        await asyncio.gather(*[told(till, raw) for _ in range(40)], *[told(till, again) for _ in range(10)])
    ) == {200}
    left, reserved, sold = await till.units()
    assert (left, reserved, sold) == (4, 0, 1)
    assert (await till.sql("SELECT version FROM purchase_order"))[0]["version"] == 3
    for table, count in (
        ("capture", 1),
        ("event WHERE type = 'order.paid'", 1),
        ("sms", 1),
        ("webhook_inbox", 2),
    ):
        assert await till.one(f"SELECT count(*) FROM {table}") == count, table
