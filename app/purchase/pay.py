"""Money: a link for each reserved order, evidence of payment, late money, refunds. No call inside a transaction.

An attempt is leased, the supplier is called, and what it said is stored if the lease still holds. Before the first
call `sent_at` is on record, so a worker that dies in the middle leaves an attempt that is asked about before it is sent
again, with the attempt's id as idempotency key each time. Where the supplier does not answer, the attempt is *unknown*:
it is queried and closed there before anything else is tried, and another supplier is never tried instead.

Evidence (call-back or query) is verified against the attempt and recorded as a capture before any rule can refuse it.
Then, with the order locked:

    reserved             paid
    paid by another      refund (the second capture)
    expired, cancelled   late money: its units again, if they are still to be had, else refund (see release.settle_late)
    refunding, refunded  refund
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, assert_never

import msgspec
import structlog
from prometheus_client import Counter
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.alarm import alert
from app.errors import DidNotHappen, Unknown
from app.ledger import orders, payments
from app.ledger.engine import alone, passes
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.guard import GuardedPayment
from app.providers.payment import (
    AttemptRef,
    Captured,
    Hook,
    HookAnswer,
    HookClosed,
    HookDeclined,
    HookForged,
    HookOther,
    HookPaid,
    HookRefunded,
    Link,
    LinkWanted,
    Payment,
    RefundWanted,
)
from app.providers.registry import Providers
from app.purchase import release
from app.purchase.leased import work_off
from app.scripts import Scripts
from app.settings import Settings

Row = dict[str, Any]
log = structlog.get_logger()

LINK_LIFE_MIN_S = 2.0  # a link that would end sooner only disappoints; no new one is begun so late
POLL_FIRST_S = 15.0  # call-backs come within a second; a query is for those that were lost
POLL_MAX_S = 60.0
EXPIRY_GRACE_S = 1.0  # after a link's end before it is closed: clocks differ
RETRY_FIRST_S = 0.5
RETRY_MAX_S = 30.0
LATE_MAX = 100  # captures of ended orders weighed in one look
LATE_EVERY_S = 0.2
HOOK_BODY_MAX_BYTES = 64 * 1024

HOOKS = Counter("fairdrop_hooks", "Suppliers' call-backs by what became of them", ["provider", "outcome"])
SETTLED = Counter(
    "fairdrop_captures", "Captures by decision: paid, late, refund, known, mismatch", ["decision"]
)

Evidence = Literal["paid", "late", "refund", "known", "mismatch"]
Cleared = Literal["clear", "paid", "unknown"]


# The loops


async def run(
    engine: AsyncEngine, scripts: Scripts, providers: Providers, settings: Settings, stopping: asyncio.Event
) -> None:
    """Start links, look at those under way, weigh late money, send refunds, until `stopping` is set.

    Each supplier has loops and places of its own: one that hangs holds up nobody else's buyers.
    """
    till = Till(engine, providers, settings.lease_s, settings.office_url)
    places = settings.pay_concurrency
    async with asyncio.TaskGroup() as group:
        # A quarter of the places each, so that looking at old links never keeps a new buyer from theirs.
        for provider in providers.payment.values():
            group.create_task(_starts(till, provider, places, stopping))
            group.create_task(_polls(till, provider, max(1, places // 4), stopping))
            group.create_task(_refunds(till, provider, max(1, places // 4), stopping))
        group.create_task(_late(till, scripts, stopping))


@dataclass(frozen=True, slots=True)
class Till:
    """What every step here needs."""

    engine: AsyncEngine
    providers: Providers
    lease_s: float
    office_url: str = ""

    def notify_for(self, provider: str) -> str | None:
        """Where the supplier calls back. None: nowhere is set, so what became of a link is found out by query."""
        return f"{self.office_url.rstrip('/')}/v1/hooks/{provider}" if self.office_url else None


def _room(provider: GuardedPayment, places: int, running: int) -> int:
    """No more than this loop's share, and nothing while the supplier's breaker is open: the rows stay due."""
    return min(places - running, provider.guard.ready())


async def _starts(till: Till, provider: GuardedPayment, places: int, stopping: asyncio.Event) -> None:
    async def lease(count: int) -> list[Row]:
        async with alone(till.engine) as conn:
            return await payments.lease_starts(conn, provider.name, count, till.lease_s)

    await work_off(
        f"pay {provider.name} starts",
        lease,
        lambda row: step(till, provider, row),
        lambda running: _room(provider, places, running),
        stopping,
    )


async def _polls(till: Till, provider: GuardedPayment, places: int, stopping: asyncio.Event) -> None:
    async def lease(count: int) -> list[Row]:
        async with alone(till.engine) as conn:
            return await payments.lease_polls(conn, provider.name, count, till.lease_s)

    await work_off(
        f"pay {provider.name} polls",
        lease,
        lambda row: step(till, provider, row),
        lambda running: _room(provider, places, running),
        stopping,
    )


async def _refunds(till: Till, provider: GuardedPayment, places: int, stopping: asyncio.Event) -> None:
    async def lease(count: int) -> list[Row]:
        async with alone(till.engine) as conn:
            return await payments.lease_refunds(conn, provider.name, count, till.lease_s)

    await work_off(
        f"pay {provider.name} refunds",
        lease,
        lambda row: send_refund(till, provider, row),
        lambda running: _room(provider, places, running),
        stopping,
        look_every_s=LATE_EVERY_S,
    )


async def _late(till: Till, scripts: Scripts, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        try:
            await weigh_late(till.engine, scripts)
        except (SQLAlchemyError, OSError, TimeoutError, DidNotHappen, Unknown) as error:
            log.warning("late_money_waits", error=type(error).__name__)
        try:
            async with asyncio.timeout(LATE_EVERY_S):
                await stopping.wait()
        except TimeoutError:
            continue


def backoff_s(tries: int, at_least_ms: int = 0) -> float:
    """Growing and spread, and not before the supplier's breaker may let it through."""
    grown = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(max(tries - 1, 0), 10))
    return max(grown, at_least_ms / 1000) * random.uniform(0.8, 1.2)


# One attempt


async def step(till: Till, provider: GuardedPayment, row: Row) -> None:
    """Do the next thing for one leased attempt."""
    wanted_still = row["order_state"] == "reserved" and not row["leaving"]
    match row["state"]:
        case "wanted":
            await _make_way(till, row, wanted_still)
        case "created":
            if row["amount_minor"] == 0 and wanted_still:
                await _pay_nothing(till, row)
            elif not wanted_still or row["link_until"] - row["now"] < timedelta(seconds=LINK_LIFE_MIN_S):
                await _close(till, provider, row, "too_late" if wanted_still else "not_payable")
            elif row["was_sent_at"] is not None:
                await _recover(till, provider, row)
            else:
                await _create(till, provider, row)
        case "unknown":
            await _recover(till, provider, row)
        case "sent":
            ended = row["expires_at"] + timedelta(seconds=EXPIRY_GRACE_S) <= row["now"]
            if not wanted_still or ended:
                await _close(till, provider, row, "expired" if ended else "not_payable")
            else:
                await _look(till, provider, row)
        case other:
            raise ValueError(f"attempt {row['id']} is in state {other!r}")


async def _create(till: Till, provider: GuardedPayment, row: Row) -> None:
    """Ask for the link; the attempt's id makes it one payment however often this runs."""
    answer: Answer[Link] = await provider.create(
        LinkWanted(
            attempt_id=row["id"],
            order_no=row["order_no"],
            amount_minor=row["amount_minor"],
            currency=row["currency"],
            title=row["title"],
            channel=row["channel"],
            expires_at=row["link_until"],
            return_url=row["return_url"],
            payer=row["payer"],
            notify_url=till.notify_for(provider.name),
        )
    )
    match answer:
        case Done(link):
            await _store(till, row, link)
        case NotDone():
            async with till.engine.begin() as conn:
                # It may have been sent by a worker before us: only a row that never was is fresh again.
                wait_s = backoff_s(row["tries"], answer.retry_in_ms)
                if row["was_sent_at"] is None:
                    await payments.start(conn, _held(row), wait_s)
                else:
                    await payments.wait(conn, _held(row), "created", wait_s, answer.code)
        case Refused():
            # "paid", "closed", "declined": this id has a past at the supplier; ask what it is. Else: no link for this.
            if answer.code in ("paid", "closed", "declined"):
                await _recover(till, provider, row)
            else:
                await _end(till, row, "failed", answer.code)
        case MaybeDone():
            await _wait_unknown(till, row, answer.code)
        case _:
            assert_never(answer)


async def _store(till: Till, row: Row, link: Link) -> None:
    """The buyer gets the link, and the payment deadline starts with the first one."""
    async with till.engine.begin() as conn:
        order = await orders.lock(conn, row["order_no"])
        payable = order is not None and order["state"] == "reserved" and not order["leaving"]
        # Never shown for longer than the order is kept, whatever the supplier answered; it is closed there as well.
        expires_at = min(link.expires_at, row["link_until"])
        look_in_s = POLL_FIRST_S * random.uniform(0.8, 1.2) if payable else 0.0
        look_in_s = min(look_in_s, max(0.0, (expires_at - row["now"]).total_seconds() + EXPIRY_GRACE_S))
        stored = await payments.store_link(
            conn,
            _held(row),
            kind=link.kind,
            url=link.url,
            params=link.params,
            provider_ref=link.provider_ref,
            expires_at=expires_at,
            look_in_s=look_in_s,
        )
        if stored and payable:
            await orders.start_deadline(conn, row["order_no"])
            await orders.bump(conn, row["order_no"])


async def _recover(till: Till, provider: GuardedPayment, row: Row) -> None:
    """Nobody knows whether the supplier has it: query, then close; then the buyer gets another attempt."""
    answer = await provider.query(_ref(row))
    match answer:
        case Done(payment):
            match payment.state:
                case "paid":
                    await _settle(till, row, payment)
                case "absent" if row["state"] == "created":
                    # A worker died before or in the call. The same id again: late or not, it is one payment.
                    async with till.engine.begin() as conn:
                        await payments.start(conn, _held(row))
                case "waiting" | "absent":
                    await _close(till, provider, row, "unknown", queried=True)
                case "closed" | "declined":
                    await _ended_there(till, row, payment)
                case _:
                    assert_never(payment.state)
        case NotDone() | MaybeDone() | Refused():
            await _wait_unknown(
                till, row, answer.code, answer.retry_in_ms if isinstance(answer, NotDone) else 0
            )
        case _:
            assert_never(answer)


async def _look(till: Till, provider: GuardedPayment, row: Row) -> None:
    """Ask about a link that nobody has called back about."""
    answer = await provider.query(_ref(row))
    if isinstance(answer, Done):
        payment = answer.value
        if payment.state == "paid":
            await _settle(till, row, payment)
            return
        if payment.state != "waiting":
            await _ended_there(till, row, payment)
            return
    wait_s = min(POLL_MAX_S, POLL_FIRST_S * 2.0 ** min(row["tries"], 6)) * random.uniform(0.8, 1.2)
    until_end_s = (row["expires_at"] - row["now"]).total_seconds() + EXPIRY_GRACE_S
    async with till.engine.begin() as conn:
        await payments.wait(conn, _held(row), "sent", max(0.1, min(wait_s, until_end_s)))


async def _close(
    till: Till, provider: GuardedPayment, row: Row, why: str, *, queried: bool = False
) -> Cleared:
    """Make sure that this attempt can never bring money: closed at the supplier, or paid after all."""
    if row["state"] == "created" and row["was_sent_at"] is None:
        await _end(till, row, "closed", why)  # no supplier has ever heard of it
        return "clear"
    if row["state"] in ("created", "unknown") and not queried:
        answer: Answer[Payment] = await provider.query(_ref(row))
        if isinstance(answer, Done) and answer.value.state in ("paid", "closed", "declined"):
            return await _finish_close(till, row, answer.value, why)
        if not isinstance(answer, Done):
            await _wait_unknown(till, row, answer.code)
            return "unknown"
    answer = await provider.close(_ref(row))
    match answer:
        case Done(payment) if payment.state != "waiting":
            return await _finish_close(till, row, payment, why)
        case Done():
            await _wait_unknown(till, row, "not_closed")
        case NotDone() | MaybeDone() | Refused():
            await _wait_unknown(
                till, row, answer.code, answer.retry_in_ms if isinstance(answer, NotDone) else 0
            )
        case _:
            assert_never(answer)
    return "unknown"


async def _finish_close(till: Till, row: Row, payment: Payment, why: str) -> Cleared:
    if payment.state == "paid":
        return "paid" if await _settle(till, row, payment) != "mismatch" else "unknown"
    again = why == "unknown"  # the buyer had asked for this link and never saw it
    await _end(till, row, "closed", None if again else why, again=again)
    return "clear"


async def _ended_there(till: Till, row: Row, payment: Payment) -> None:
    """The supplier says that it is over, unpaid."""
    if payment.state == "declined":
        await _end(till, row, "failed", payment.code or "declined")
    else:
        await _end(till, row, "closed", payment.code or "closed", again=row["state"] == "unknown")


async def _settle(till: Till, row: Row, payment: Payment) -> Evidence:
    """A query has found money."""
    captured = payment.captured
    if captured is None:
        raise ValueError(f"{row['provider']} says paid without a capture")
    async with till.engine.begin() as conn:
        evidence = await take_evidence(conn, row["provider"], captured, expected_attempt=row["id"])
    SETTLED.labels(evidence).inc()
    if evidence == "mismatch":
        await _wait_unknown(till, row, "mismatch")
    elif evidence in ("known", "late", "refund"):
        await _end(till, row, "closed", "paid")
    return evidence


async def _wait_unknown(till: Till, row: Row, code: str, retry_in_ms: int = 0) -> None:
    """Unknown is treated as happened until checked: the order keeps its unit, and this attempt is looked at again.

    After `unknown_max_s` a person is called by whoever wants to end the order (release).
    """
    async with till.engine.begin() as conn:
        order = await orders.lock(conn, row["order_no"])
        waits = await payments.wait(conn, _held(row), "unknown", backoff_s(row["tries"], retry_in_ms), code)
        if waits and row["state"] != "unknown" and order is not None and order["state"] == "reserved":
            await orders.bump(conn, row["order_no"])


async def _end(till: Till, row: Row, state: str, code: str | None, *, again: bool = False) -> None:
    """The attempt is over. again: the buyer, who still waits for a link, gets another attempt at once."""
    async with till.engine.begin() as conn:
        order = await orders.lock(conn, row["order_no"])
        if order is None or not await payments.end(conn, _held(row), state, code):
            return
        if order["state"] == "reserved":
            others = await payments.unended(conn, row["order_no"])
            again = again or (code == "expired" and _extended(order, row["now"]))
            if again and not order["leaving"] and not others:
                await payments.add_attempt(
                    conn,
                    order,
                    provider=row["provider"],
                    channel=row["channel"],
                    return_url=row["return_url"],
                    payer=row["payer"],
                    state="created",
                )
            await payments.hasten_wanted(conn, row["order_no"])
            await orders.bump(conn, row["order_no"])
        elif order["state"] == "paid":
            kept = await payments.kept_capture(conn, row["order_no"])
            if kept is not None and kept["attempt_id"] is not None and kept["attempt_id"] != row["id"]:
                await payments.succeed(conn, kept["attempt_id"])


def _extended(order: Row, now: datetime) -> bool:
    """The link ended with the deadline it was made for, and the order got more time since: the buyer gets another."""
    return bool(order["extended_s"]) and order["pay_by"] - now >= timedelta(seconds=LINK_LIFE_MIN_S)


async def _make_way(till: Till, row: Row, wanted_still: bool) -> None:
    """A new attempt waits until the one before it cannot bring money any more."""
    before: Row | None = None
    async with till.engine.begin() as conn:
        order = await orders.lock(conn, row["order_no"])
        if order is None:
            return
        if not wanted_still or order["state"] != "reserved" or order["leaving"]:
            await payments.end(conn, _held(row), "closed", "not_payable")
            return
        open_ones = [
            other for other in await payments.unended(conn, row["order_no"]) if other["id"] != row["id"]
        ]
        if not open_ones:
            if await payments.start(conn, _held(row)):
                await orders.bump(conn, row["order_no"])
            return
        before = await payments.lease_one(conn, open_ones[0]["id"], till.lease_s)
    if before is not None:
        provider = till.providers.payment.get(before["provider"])
        if provider is not None and await _close(till, provider, before, "replaced") == "clear":
            async with till.engine.begin() as conn:
                await orders.lock(conn, row["order_no"])
                await payments.start(conn, _held(row))
            return
    async with till.engine.begin() as conn:
        await payments.wait(conn, _held(row), "wanted", backoff_s(row["tries"]))


async def _pay_nothing(till: Till, row: Row) -> None:
    """An order that costs nothing is paid without a supplier."""
    async with till.engine.begin() as conn:
        if await orders.pay(conn, row["order_no"]) is not None:
            await payments.succeed(conn, row["id"])


def _held(row: Row) -> tuple[str, int]:
    return row["id"], row["generation"]


def _ref(row: Row) -> AttemptRef:
    return AttemptRef(
        attempt_id=row["id"],
        order_no=row["order_no"],
        provider_ref=row["provider_ref"],
        expires_at=row["expires_at"],
    )


# What others ask of the money


async def start_attempt(
    conn: AsyncConnection,
    order_no: str,
    *,
    channel: str,
    return_url: str | None,
    payer: Mapping[str, Any] | None,
    providers: Providers,
) -> bool:
    """The buyer gets a link, or a new one for one that has ended or goes elsewhere. False: nothing to do, or too late.

    In the caller's transaction; the caller has checked that the order is reserved, and locked it or not.
    """
    order = await orders.lock(conn, order_no)
    if order is None or order["state"] != "reserved" or order["leaving"]:
        return False
    now = datetime.now(UTC)
    if order["pay_by"] is not None and order["pay_by"] - now < timedelta(seconds=LINK_LIFE_MIN_S):
        return False
    asked: dict[str, Any] = {
        "provider": providers.payment_now(channel, order_no),
        "channel": channel,
        "return_url": return_url,
        "payer": payer,
    }
    unended = await payments.unended(conn, order_no)
    for other in unended:
        if other["state"] == "wanted":
            await payments.redirect_wanted(conn, other["id"], **asked)
            await orders.bump(conn, order_no)
            return True
    for other in unended:
        if other["channel"] == channel and other["return_url"] == return_url:
            usable = other["state"] != "sent" or other["expires_at"] - now > timedelta(
                seconds=LINK_LIFE_MIN_S
            )
            if usable and other["state"] != "unknown":
                return False  # this link is (about to be) there already
    made = await payments.add_attempt(conn, order, **asked, state="wanted" if unended else "created")
    if made is None:
        alert("attempts_max", "an order has used up its payment attempts", order_no=order_no)
        return False
    await orders.bump(conn, order_no)
    return True


async def clear_attempts(
    engine: AsyncEngine, providers: Providers, order_no: str, *, lease_s: float = 30.0
) -> Cleared:
    """Before an order ends unpaid: nothing at any supplier can bring money for it any more.

    clear: end it. paid: it is paid. unknown: a supplier does not answer, or a worker is calling it: ask again later.
    Call it with no transaction open.
    """
    till = Till(engine, providers, lease_s)
    async with engine.begin() as conn:
        unended = await payments.unended(conn, order_no)
    for found in sorted(unended, key=lambda row: row["state"] != "wanted"):
        async with engine.begin() as conn:
            row = await payments.lease_one(conn, found["id"], lease_s)
        if row is None:
            return "unknown"
        if row["state"] == "wanted":
            async with engine.begin() as conn:
                await payments.end(conn, _held(row), "closed", "not_payable")
            continue
        provider = providers.payment.get(row["provider"])
        if provider is None:
            alert(
                "provider_gone",
                "an open payment belongs to a supplier that is not configured",
                attempt=row["id"],
            )
            return "unknown"
        cleared = await _close(till, provider, row, "not_payable")
        if cleared != "clear":
            return cleared
    return "clear"


# Evidence


async def take_evidence(
    conn: AsyncConnection, provider: str, captured: Captured, *, expected_attempt: str | None = None
) -> Evidence:
    """Record money that a supplier vouches for, and let it pay its order. In the caller's transaction.

    paid: the order is paid by it. late: recorded; `weigh_late` decides. refund: recorded, its refund is due. known: was
    recorded before. mismatch: it does not fit what we asked for; nothing is recorded, a person is called.
    """
    attempt = await payments.attempt(conn, captured.attempt_id)
    if (
        attempt is None
        or attempt["provider"] != provider
        or attempt["order_no"] != captured.order_no
        or attempt["amount_minor"] != captured.amount_minor
        or attempt["currency"] != captured.currency
        or (expected_attempt is not None and expected_attempt != captured.attempt_id)
    ):
        alert(
            "capture_mismatch",
            "a supplier reports money that does not fit any payment we asked for",
            provider=provider,
            attempt=captured.attempt_id,
            order_no=captured.order_no,
            amount_minor=captured.amount_minor,
            currency=captured.currency,
            expected_minor=None if attempt is None else attempt["amount_minor"],
        )
        return "mismatch"
    order = await orders.lock(conn, captured.order_no)
    if order is None:
        raise LookupError(f"attempt {captured.attempt_id} has no order")
    capture_id = await payments.capture_add(
        conn,
        provider=provider,
        provider_ref=captured.provider_ref,
        order_no=captured.order_no,
        attempt_id=captured.attempt_id,
        amount_minor=captured.amount_minor,
        currency=captured.currency,
        captured_at=captured.captured_at,
    )
    if capture_id is None:
        return "known"
    if order["state"] == "reserved":
        await orders.pay(conn, captured.order_no)
        await payments.keep(conn, capture_id)
        await payments.succeed(conn, captured.attempt_id)
        await payments.look_at_others(conn, captured.order_no, captured.attempt_id)
        return "paid"
    if order["state"] in ("expired", "cancelled"):
        return "late"
    await payments.give_back(conn, capture_id, "second_capture")
    return "refund"


class _WeighedBefore(Exception):
    """Another worker has decided on this capture; the transaction that relied on it is rolled back."""


async def weigh_late(engine: AsyncEngine, scripts: Scripts) -> int:
    """Late money gets its units again, or goes back. Returns how many captures were decided.

    Raises DidNotHappen and Unknown while Redis is away: they stay `due`.
    """
    async with alone(engine) as conn:
        due = await payments.due_captures(conn, LATE_MAX)
    decided = 0
    for capture in due:

        async def kept(conn: AsyncConnection, capture: Row = capture) -> None:
            if not await payments.keep(conn, capture["id"]):
                raise _WeighedBefore
            await payments.succeed(conn, capture["attempt_id"])

        async def refused(conn: AsyncConnection, capture: Row = capture) -> None:
            await payments.give_back(conn, capture["id"], "late_money")

        try:
            decision = await release.settle_late(
                engine, scripts, capture["order_no"], kept=kept, refused=refused
            )
        except IntegrityError as error:
            # The buyer has got another live order in this moment: the next look sees it.
            log.warning("late_money_waits", capture=capture["id"], error=type(error.orig).__name__)
            continue
        except _WeighedBefore:
            # We may have taken its units from Redis for nothing: they go back (the script knows if there are none).
            async with engine.begin() as conn:
                order = await orders.lock(conn, capture["order_no"])
                if order is not None and order["state"] in ("expired", "cancelled"):
                    await orders.release_again(conn, capture["order_no"])
            continue
        if decision != "later":
            SETTLED.labels("late_kept" if decision == "kept" else "late_refund").inc()
            decided += 1
    return decided


# Call-backs


async def take_hook(
    engine: AsyncEngine, providers: Providers, name: str, headers: Mapping[str, str], raw_body: bytes
) -> HookAnswer:
    """One supplier call-back: verified on its raw bytes, committed, then acknowledged in the supplier's own words.

    Anything but a 2xx makes the supplier repeat it: a forged one is refused, and so is one that we could not commit.
    """
    provider = providers.payment.get(name)
    if provider is None:
        return _problem(404, "no_such_provider")
    if len(raw_body) > HOOK_BODY_MAX_BYTES:
        return _problem(413, "too_large")
    lower = {key.lower(): value for key, value in headers.items()}
    await provider.prepare_hook(lower)  # may have to fetch the key that this was signed with
    hook = provider.read_hook(lower, raw_body, datetime.now(UTC))
    if isinstance(hook, HookForged):
        HOOKS.labels(name, hook.code).inc()
        log.warning("hook_refused", provider=name, code=hook.code)
        return _problem(401, hook.code)
    if b"\\u0000" in msgspec.json.encode(hook):
        return _problem(422, "malformed")  # Postgres' text holds no NUL, and no id of ours has one
    try:
        if isinstance(hook, HookPaid):
            async with alone(engine) as conn:
                plain = await payments.pay_plainly(
                    conn,
                    provider=name,
                    event_id=hook.event_id,
                    body=raw_body,
                    provider_ref=hook.captured.provider_ref,
                    order_no=hook.captured.order_no,
                    attempt_id=hook.captured.attempt_id,
                    amount_minor=hook.captured.amount_minor,
                    currency=hook.captured.currency,
                    captured_at=hook.captured.captured_at,
                )
            if plain is not None:
                HOOKS.labels(name, plain).inc()
                if plain == "paid":
                    SETTLED.labels(plain).inc()
                return provider.hook_reply(ok=True)
        async with engine.connect() as conn:
            outcome = await _take(conn, name, hook, raw_body)
            # What does not fit leaves no trace in the inbox: the supplier may still correct it under the same id.
            await (conn.rollback() if outcome == "mismatch" else conn.commit())
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        if not passes(error):
            raise
        HOOKS.labels(name, "not_committed").inc()
        log.warning("hook_not_committed", provider=name, error=type(error).__name__)
        return provider.hook_reply(ok=False)
    HOOKS.labels(name, outcome).inc()
    if outcome == "mismatch":
        return _problem(422, "mismatch")
    return provider.hook_reply(ok=True)


async def _take(conn: AsyncConnection, provider: str, hook: Hook, raw_body: bytes) -> str:
    """Act once on a verified call-back, in one transaction with its row in the inbox. Returns what became of it."""
    if isinstance(hook, HookForged):
        raise ValueError("a forged call-back got this far")
    kind = type(hook).__name__.removeprefix("Hook").lower()
    if not await payments.inbox_add(conn, provider, hook.event_id, kind, raw_body, kind):
        return "duplicate"
    match hook:
        case HookPaid():
            evidence = await take_evidence(conn, provider, hook.captured)
            SETTLED.labels(evidence).inc()
            return evidence
        case HookDeclined():
            return await _over(conn, hook.attempt_id, hook.order_no, "failed", hook.code, hook.final)
        case HookClosed():
            return await _over(conn, hook.attempt_id, hook.order_no, "closed", hook.code, True)
        case HookRefunded():
            done = await payments.refund_done(conn, hook.refund_id, hook.provider_ref)
            return "refunded" if done else "known"
        case HookOther():
            return "other"
        case _:
            assert_never(hook)


async def _over(
    conn: AsyncConnection, attempt_id: str, order_no: str, state: str, code: str, final: bool
) -> str:
    """A link has ended without money; the order keeps its units, and the buyer may ask for another link."""
    attempt = await payments.attempt(conn, attempt_id)
    if attempt is None or attempt["order_no"] != order_no:
        return "mismatch"
    order = await orders.lock(conn, order_no)
    if final and await payments.end_by_hook(conn, attempt_id, state, code):
        if order is not None and order["state"] == "reserved":
            await payments.hasten_wanted(conn, order_no)
            await orders.bump(conn, order_no)
        return state
    return "known"


def _problem(status: int, code: str) -> HookAnswer:
    body = {"type": "about:blank", "title": code, "status": status, "code": code}
    return HookAnswer(status, msgspec.json.encode(body), "application/problem+json")


# Refunds


async def send_refund(till: Till, provider: GuardedPayment, row: Row) -> None:
    """Give one leased refund's money back; its id makes it one refund however often this runs."""
    if row["state"] in ("sent", "unknown"):
        looked = await provider.refund_query(row["id"], row["capture_ref"])
        if isinstance(looked, Done) and looked.value.state != "absent":
            await _refund_stands(till, row, looked.value.state, looked.value.provider_ref)
            return
        if not isinstance(looked, Done):
            async with till.engine.begin() as conn:
                await payments.refund_wait(conn, _held(row), row["state"], backoff_s(row["tries"]))
            return
    answer = await provider.refund(
        RefundWanted(
            refund_id=row["id"],
            order_no=row["order_no"],
            attempt_id=row["attempt_id"],
            capture_ref=row["capture_ref"],
            amount_minor=row["amount_minor"],
            currency=row["currency"],
            captured_minor=row["captured_minor"],
            reason=row["reason"],
        )
    )
    match answer:
        case Done(state):
            await _refund_stands(till, row, state.state, state.provider_ref)
        case NotDone():
            async with till.engine.begin() as conn:
                wait_s = backoff_s(row["tries"], answer.retry_in_ms)
                await payments.refund_wait(conn, _held(row), row["state"], wait_s)
        case MaybeDone():
            async with till.engine.begin() as conn:
                await payments.refund_wait(conn, _held(row), "unknown", backoff_s(row["tries"]))
        case Refused():
            async with till.engine.begin() as conn:
                failed = await payments.refund_failed(conn, row)
            if failed:
                alert(
                    "refund_refused",
                    "a supplier refuses a refund for good; the money is still with us",
                    refund=row["id"],
                    order_no=row["order_no"],
                    code=answer.code,
                )
        case _:
            assert_never(answer)


async def _refund_stands(till: Till, row: Row, state: str, provider_ref: str | None) -> None:
    async with till.engine.begin() as conn:
        if state == "done":
            await payments.refund_done(conn, row["id"], provider_ref)
        else:
            await payments.refund_wait(conn, _held(row), "sent", backoff_s(row["tries"]))
