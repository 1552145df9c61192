"""One statement says what is due: exactly when the statement of the loop that is told would find something."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.ledger import captures, course, deliveries, due, events, orders, outbox, payments, refunds, sms
from app.ledger.engine import driver
from tests.ledger.shop import Shop, open_shop

Take = Callable[[AsyncConnection], Awaitable[object]]
HELD, FREE = "now() + interval '1 h'", "now() - interval '1 s'"
LATER = "now() + interval '1 h'"


@pytest.fixture
async def conn(redis_url: str, database_url: str) -> AsyncIterator[AsyncConnection]:
    """In one transaction, where time stands still; ann has an order without a link, and nothing else is due."""
    async with open_shop(redis_url, database_url) as shop:
        await _prepare(shop)
        async with shop.engine.connect() as conn:
            yield conn


async def _prepare(shop: Shop) -> None:
    await shop.publish(5)
    await shop.claim("ann")
    await shop.confirm()
    async with shop.engine.begin() as conn:
        await events.number(conn, 100)
        await conn.execute(text("UPDATE outbox SET state = 'done'"))
        await conn.execute(text("UPDATE purchase_order SET pay_by = now() + interval '1 h'"))
        await conn.execute(text("DELETE FROM payment_attempt"))
        await conn.execute(
            text(
                "INSERT INTO capture (provider, provider_ref, order_no, amount_minor, currency, state, captured_at)"
                " SELECT 'sandbox', 'r', order_no, 1, 'EUR', 'kept', now() FROM purchase_order"
            )
        )
        await conn.execute(
            text(
                "INSERT INTO webhook_endpoint (id, url, events, secret, told_to)"
                " SELECT 'w', 'https://x', '[]', '', max(position) FROM event"
            )
        )


async def said(conn: AsyncConnection) -> dict[str, float]:
    return {kind: in_s for kind, _, in_s in await due.look(conn, 0.1, 5.0)}


def attempt(state: str, tries: int = 0, next_at: str = FREE, leased: str = "NULL") -> str:
    return (
        "INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, amount_minor, currency,"
        f" tries, next_at, leased_until) SELECT 'a', order_no, 1, 'sandbox', 'sandbox', '{state}', 1, 'EUR', {tries},"
        f" {next_at}, {leased} FROM purchase_order"
    )


def refund(state: str, next_at: str = FREE, leased: str = "NULL") -> str:
    return (
        "INSERT INTO refund (id, capture_id, order_no, amount_minor, currency, reason, state, next_at, leased_until)"
        f" SELECT 'r', id, order_no, 1, 'EUR', '', '{state}', {next_at}, {leased} FROM capture"
    )


def a_text(state: str, next_at: str = FREE, shown: str = "NULL") -> str:
    return (
        "INSERT INTO sms (id, order_no, sale, template, state, expires_at, next_at, shown)"
        f" SELECT 's', order_no, sale, 'paid', '{state}', now() + interval '1 h', {next_at}, {shown}"
        " FROM purchase_order"
    )


def order(changes: str) -> str:
    return f"UPDATE purchase_order SET {changes}"


def outbox_row(state: str, leased: str = "NULL") -> str:
    return (
        "INSERT INTO outbox (kind, sale, epoch, payload, state, leased_until)"
        f" VALUES ('mark', 'drop', 1, '{{}}', '{state}', {leased})"
    )


def delivery(state: str, next_at: str = FREE, leased: str = "NULL") -> str:
    return (
        "INSERT INTO webhook_delivery (endpoint, event, expires_at, state, next_at, leased_until)"
        f" SELECT 'w', id, now() + interval '1 h', '{state}', {next_at}, {leased} FROM event LIMIT 1"
    )


TAKES: dict[str, Take] = {
    "starts": lambda conn: payments.lease_starts(conn, "sandbox", 9, 30),
    "again": lambda conn: payments.lease_again(conn, "sandbox", 9, 30),
    "polls": lambda conn: payments.lease_polls(conn, "sandbox", 9, 30),
    "refunds": lambda conn: refunds.lease(conn, "sandbox", 9, 30),
    "late": lambda conn: captures.due(conn, 9),
    "unpaid": lambda conn: orders.lease_unpaid(conn, 9, 30),
    "leaving": lambda conn: orders.lease_leaving(conn, 9, 30),
    "outbox": lambda conn: outbox.lease(conn, 9, 30),
    "events": lambda conn: events.number(conn, 9),
    "spread": deliveries.is_behind,
    "deliveries": lambda conn: deliveries.lease_due(conn, {"w": 9}, 9, 30),
    "texts": lambda conn: sms.lease_due(conn, 9, 30, 900),
    "course": course.is_due,
}


CASES: list[tuple[str, set[str]]] = [
    ("SELECT 1", set[str]()),
    (attempt("created"), {"starts"}),
    (attempt("wanted"), {"starts"}),
    (attempt("created", tries=2, leased=FREE), {"again"}),
    (attempt("unknown", tries=1), {"again"}),
    (attempt("sent", tries=1), {"polls"}),
    (attempt("created", leased=HELD), set()),
    (attempt("sent", next_at=LATER), set()),
    (attempt("failed"), set()),
    (refund("due"), {"refunds"}),
    (refund("unknown", leased=FREE), {"refunds"}),
    (refund("sent", leased=HELD), set()),
    (refund("due", next_at=LATER), set()),
    (refund("done"), set()),
    ("UPDATE capture SET state = 'due'", {"late"}),
    (order("pay_by = now() - interval '1 s'"), {"unpaid"}),
    (order(f"pay_by = now() - interval '1 s', leased_until = {HELD}"), set()),
    (order(f"pay_by = now() - interval '1 s', leased_until = {FREE}"), {"unpaid"}),
    (order("pay_by = now() - interval '1 s', state = 'paid'"), set()),
    (order("leaving = TRUE"), {"leaving"}),
    (order(f"leaving = TRUE, leased_until = {HELD}"), set()),
    (outbox_row("due"), {"outbox"}),
    (outbox_row("due", leased=FREE), {"outbox"}),
    (outbox_row("due", leased=HELD), set()),
    (outbox_row("intent"), set()),
    ("UPDATE event SET position = NULL", {"events"}),
    ("INSERT INTO event_batch (sale, order_nos) VALUES ('drop', '{x}')", {"events"}),
    ("UPDATE webhook_endpoint SET told_to = NULL", {"spread"}),
    ("UPDATE webhook_endpoint SET told_to = 0", {"spread"}),
    ("UPDATE webhook_endpoint SET told_to = 0, disabled_at = now()", set()),
    (delivery("due"), {"deliveries"}),
    (delivery("due", leased=HELD), set()),
    (delivery("due", next_at=LATER), set()),
    (delivery("delivered"), set()),
    (a_text("due"), {"texts"}),
    (a_text("due", next_at=LATER), set()),
    (a_text("sending"), set()),
    ("UPDATE sale SET opened_at = NULL", {"course"}),
    ("UPDATE sale SET closes_at = now()", {"course"}),
    ("UPDATE sale SET closes_at = now(), state = 'closed'", set()),
    ("UPDATE sale SET opened_at = NULL, opens_at = now() + interval '1 s'", set()),
]
ANY = (
    (attempt("sent", next_at=LATER), "attempts"),
    (order("pay_by = NULL"), "linkless"),
    (a_text("sending", next_at=LATER), "text_waits"),
    (a_text("failed"), "unshown"),
    ("INSERT INTO payment_outage (provider) VALUES ('sandbox')", "outage"),
)
SOON = (
    (attempt("sent", next_at="now() + interval '60 ms'"), "polls"),
    (attempt("created", leased="now() + interval '60 ms'"), "starts"),
    (order("pay_by = now() + interval '60 ms'"), "unpaid"),
    ("UPDATE sale SET closes_at = now() + interval '60 ms'", "course"),
)


@contextlib.asynccontextmanager
async def undone(conn: AsyncConnection) -> AsyncIterator[None]:
    """What is done within is rolled back."""
    nested = await conn.begin_nested()
    yield
    await nested.rollback()


async def test_a_kind_is_said_to_be_due_exactly_when_its_loop_would_find_something(
    conn: AsyncConnection,
) -> None:
    for statement, kinds in CASES:
        async with undone(conn):
            await conn.execute(text(statement))
            found = {kind for kind, in_s in (await said(conn)).items() if in_s <= 0 and kind in TAKES}
            assert found == kinds, statement
            assert {kind for kind, take in TAKES.items() if await take(conn)} == kinds, statement


async def test_of_some_kinds_it_is_said_that_there_is_any(conn: AsyncConnection) -> None:
    for statement, kind in ANY:
        assert kind not in await said(conn)
        async with undone(conn):
            await conn.execute(text(statement))
            assert kind in await said(conn), statement


async def test_what_becomes_due_before_the_next_look_is_announced(conn: AsyncConnection) -> None:
    for statement, kind in SOON:
        async with undone(conn):
            await conn.execute(text(statement))
            assert (await said(conn))[kind] == pytest.approx(0.06), statement


async def test_a_full_beginning_of_rows_that_others_hold_hides_nobody(conn: AsyncConnection) -> None:
    """A supplier that hangs has all its places' rows leased; another's behind them must be found."""
    for _ in range(due.MOST):
        await conn.execute(text(outbox_row("due", leased=HELD)))
    assert "outbox" in await said(conn)
    await conn.execute(text(outbox_row("due")))
    assert (await said(conn))["outbox"] <= 0


async def test_a_look_costs_the_same_whatever_the_history(redis_url: str, database_url: str) -> None:
    """Late money and buyers who leave had no index: each look read all captures, and all reserved orders."""
    async with open_shop(redis_url, database_url) as shop:
        await shop.publish(5)
        for statement in HISTORY:
            await shop.sql(statement)
        async with shop.engine.connect() as conn:
            rows = await (await driver(conn)).fetch(
                "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + due.LOOK.replace("$1", "0.1").replace("$2", "5"),
            )
        plan: dict[str, Any] = rows[0][0][0]["Plan"]
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 60


HISTORY = (
    "INSERT INTO purchase_order (order_no, sale, sku, buyer_id, epoch, seq, units, amount_minor, currency, state,"
    " claimed_at, pay_within_s, pay_by) SELECT 'O' || n, 'drop', 'A', 'h' || n, 0, n, 1, 1, 'EUR',"
    " (ARRAY['paid', 'expired', 'reserved'])[1 + n % 3], now(), 600, now() + interval '1 h'"
    " FROM generate_series(1, 6000) AS n",
    "INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, amount_minor, currency, next_at)"
    " SELECT order_no, order_no, 1, 'sandbox', 'sandbox', CASE state WHEN 'reserved' THEN 'sent' ELSE 'closed' END, 1,"
    " 'EUR', now() + CASE state WHEN 'reserved' THEN 1 ELSE -1 END * interval '1 h' FROM purchase_order ORDER BY state",
    "INSERT INTO capture (provider, provider_ref, order_no, amount_minor, currency, state, captured_at)"
    " SELECT 'sandbox', order_no, order_no, 1, 'EUR', 'kept', now() FROM purchase_order WHERE state = 'paid'",
    "INSERT INTO outbox (kind, sale, epoch, order_no, payload, state)"
    " SELECT 'mark', 'drop', 0, order_no, '{}', 'done' FROM purchase_order",
    "INSERT INTO event (id, type, sale, version, data, position)"
    " SELECT order_no, 'order.reserved', 'drop', 1, '{}', seq FROM purchase_order",
    "INSERT INTO sms (id, order_no, sale, template, state, expires_at)"
    " SELECT order_no, order_no, 'drop', 'paid', 'sent', now() FROM purchase_order",
    "ANALYZE",
)
