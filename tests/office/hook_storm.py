"""Call-backs of the sandbox supplier by the thousand: made, copied, forged, late, shuffled, and sent to the office.

They go into the office's own ASGI application: its real route, no socket in between, so what is measured is ours."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec

from app.providers import sandbox_wire
from tests.office.conftest import Office

Fate = Literal["paid", "late_money", "declined", "refunded"]
SHARES: tuple[Fate, ...] = ("paid",) * 14 + (
    "late_money",
    "late_money",
    "declined",
    "declined",
    "refunded",
    "refunded",
)
PRICE = 500
OLD_S = 3_600  # how late a late copy is: far outside the replay window


def number_of(n: int) -> str:
    return f"{n:024d}"


def fate_of(n: int) -> Fate:
    return SHARES[n % len(SHARES)]


@dataclass(frozen=True)
class Hook:
    """One copy of one call-back; it is signed when it is sent."""

    body: bytes
    expected: int  # the status that is due
    word: str
    secret: bytes
    late_s: float = 0.0
    torn: bool = False  # changed after it was signed

    def sent(self) -> tuple[dict[str, str], bytes]:
        headers = sandbox_wire.headers(self.secret, "POST", "/hook", self.body, time.time() - self.late_s)
        return headers, self.body.replace(b"evt-", b"evt_") if self.torn else self.body


@dataclass
class Seen:
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: float = 0.0
    cpu_s: float = 0.0
    hooks: int = 0
    again: int = 0

    @property
    def ms_each(self) -> float:
        return 1000 * self.seconds / self.hooks

    @property
    def cpu_ms_each(self) -> float:
        return 1000 * self.cpu_s / self.hooks


async def lay_out(office: Office, count: int) -> None:
    """`count` orders with an open payment link each; one in ten has expired, one in ten is paid and being refunded."""
    item = {"sku": "A", "title": "Thing", "price_minor": PRICE, "currency": "EUR", "units": count}
    await office.open_sale(items=[item])
    shares = {fate: [n for n in range(count) if fate_of(n) == fate] for fate in set(SHARES)}
    given = {"late": shares["late_money"], "refunded": shares["refunded"], "count": count, "price": PRICE}
    for statement in (
        "INSERT INTO purchase_order (order_no, sale, sku, buyer_id, epoch, seq, units, amount_minor, currency, state,"
        " claimed_at, pay_within_s, contact, ended_at, paid_at) SELECT lpad(n::text, 24, '0'), 'drop', 'A', 'b' || n,"
        " 1, n + 1, 1, :price, 'EUR', CASE WHEN n = ANY(CAST(:late AS int[])) THEN 'expired'"
        " WHEN n = ANY(CAST(:refunded AS int[])) THEN 'refunding' ELSE 'reserved' END, now(), 900, 'sealed',"
        " CASE WHEN n = ANY(CAST(:late AS int[])) THEN now() END,"
        " CASE WHEN n = ANY(CAST(:refunded AS int[])) THEN now() END FROM generate_series(0, :count - 1) AS n",
        "INSERT INTO order_line (order_no, line_no, kind, sku, title, units, unit_minor, amount_minor)"
        " SELECT order_no, 1, 'item', 'A', 'Thing', 1, amount_minor, amount_minor FROM purchase_order",
        "UPDATE item SET reserved = (SELECT count(*) FROM purchase_order WHERE state = 'reserved'),"
        " sold = (SELECT count(*) FROM purchase_order WHERE state = 'refunding')",
        "INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, amount_minor, currency, kind,"
        " url, sent_at, expires_at) SELECT order_no || '-1', order_no, 1, 'sandbox', 'sandbox',"
        " CASE state WHEN 'expired' THEN 'closed' WHEN 'refunding' THEN 'succeeded' ELSE 'sent' END, amount_minor,"
        " 'EUR', 'redirect', 'http://x', now(), now() + interval '1 h' FROM purchase_order",
        "INSERT INTO capture (provider, provider_ref, order_no, attempt_id, amount_minor, currency, state, captured_at)"
        " SELECT 'sandbox', 'cap-' || order_no, order_no, order_no || '-1', amount_minor, 'EUR', 'kept', now()"
        " FROM purchase_order WHERE state = 'refunding'",
        "INSERT INTO refund (id, capture_id, order_no, amount_minor, currency, reason, state) SELECT order_no || '-R',"
        " id, order_no, amount_minor, 'EUR', 'test', 'sent' FROM capture",
    ):
        bound = {name: value for name, value in given.items() if f":{name}" in statement}
        await office.sql(statement, **bound)
    await office.sql("ANALYZE")


def hooks_of(n: int, copies: int, dice: random.Random, secret: str) -> list[Hook]:
    """What the supplier and its imitators send about order `n`."""
    number, fate = number_of(n), fate_of(n)
    now = datetime.now(UTC)
    payment = {
        "ref": f"pay-{number}", "attempt_id": f"{number}-1", "order_no": number, "amount_minor": PRICE,
        "currency": "EUR", "merchant": sandbox_wire.MERCHANT, "state": "paid", "url": "http://x",
        "expires_at": now + timedelta(hours=1), "paid_at": now, "capture_ref": f"cap-{number}",
    }  # fmt: skip
    event: dict[str, Any] = {"id": f"evt-{number}", "merchant": sandbox_wire.MERCHANT}
    match fate:
        case "paid" | "late_money":
            event |= {"type": "payment.paid", "payment": payment}
        case "declined":
            declined = {"state": "declined", "paid_at": None, "capture_ref": None, "code": "card_declined"}
            event |= {"type": "payment.declined", "payment": payment | declined}
        case "refunded":
            event |= {
                "type": "refund.done",
                "refund": {"ref": f"ref-{number}", "refund_id": f"{number}-R", "state": "done"},
            }
    good, foreign = sandbox_wire.secrets_of(secret)[0], b"somebody-else"

    def hook(word: str, expected: int, body: dict[str, Any], secret: bytes = good, **how: Any) -> Hook:
        return Hook(msgspec.json.encode(body), expected, word, secret, **how)

    made = [hook("true", 200, event) for _ in range(copies)]
    if fate == "paid" and n % 4 == 0:
        # Told anew: another event, the same money.
        made.append(hook("true", 200, event | {"id": f"evt-{number}-again"}))
    raised = event | {"payment": payment | {"amount_minor": PRICE * 100}}
    made += [
        hook("forged", 401, event, foreign),
        hook("late", 401, event, late_s=OLD_S),
        hook("raised", 401, raised, foreign),
        hook("torn", 401, event, torn=True),
        hook("other merchant", 401, event | {"merchant": "another"}),
    ]
    if fate == "paid":
        # Rightly signed, and not what we asked for.
        made.append(hook("mismatch", 422, raised | {"id": f"evt-{number}-raised"}))
    dice.shuffle(made)
    return made


async def send(office: Office, hooks: list[Hook], *, at_once: int = 16) -> Seen:
    """All of them, `at_once` under way at a time; every status that is not the one due is kept under its word."""
    seen, waiting = Seen(hooks=len(hooks)), iter(hooks)

    async def one(hook: Hook) -> None:
        while (status := await call(office, hook)) == 503:  # not committed: the supplier sends it again
            seen.again += 1
        seen.statuses[hook.word, status] += 1

    async def sender() -> None:
        for hook in waiting:
            await one(hook)

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*[sender() for _ in range(at_once)])
    seen.seconds, seen.cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return seen


async def call(office: Office, hook: Hook) -> int:
    status = 0
    sent = False
    signed, raw = hook.sent()

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": raw, "more_body": False}

    async def answer(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]

    headers = [(name.encode(), value.encode()) for name, value in signed.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/hooks/sandbox", "raw_path": b"/v1/hooks/sandbox", "query_string": b"", "root_path": "",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    await office.app(scope, receive, answer)  # type: ignore[arg-type]
    return status
