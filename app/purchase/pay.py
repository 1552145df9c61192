"""Money: a link for each reserved order, from one supplier at a time. No call inside a transaction.

An attempt is leased, its supplier is called, and what it said is stored if the lease still holds. Before the first
call `sent_at` is on record, so a worker that dies in the middle leaves an attempt that is asked about before it is sent
again, with the attempt's id as idempotency key each time. Its parts are in paying/: what an answer leads to is
attempt.py; evidence of money and what it pays for is evidence.py; call-backs are hook.py, refunds refund.py.

Which supplier an attempt goes to is its channel's route (app/providers/routes.py): the first whose breaker is not open.
What has certainly not happened there goes to the next one (failover.py); what may have happened never does, until it is
closed.
"""

from __future__ import annotations

import asyncio
import random
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal, NamedTuple, assert_never

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.alarm import alert
from app.ledger import captures, orders, payments, refunds
from app.ledger.due import Kind
from app.ledger.engine import alone
from app.providers.answer import other_may
from app.providers.guard import GuardedPayment
from app.providers.payment import AttemptRef, Captured, Link, LinkWanted
from app.providers.registry import Providers
from app.purchase.paying import attempt, failover
from app.purchase.paying.evidence import SETTLED, Evidence, take_evidence, weigh_late
from app.purchase.paying.refund import send_refund
from app.scripts import Scripts
from app.sealing import CannotOpen, SealingKey, address_aad, payer_aad, sealing_keys, unseal
from app.settings import Settings
from app.work.leased import Pace, again_and_again, backoff_s, held, work_off
from app.work.lookout import LOOK_EVERY_S, Lookout

Row = dict[str, Any]
log = structlog.get_logger()

LINK_LIFE_MIN_S = 2.0  # a link that would end sooner only disappoints; no new one is begun so late
POLL_FIRST_S = 15.0  # call-backs come within a second; a query is for those that were lost
POLL_MAX_S = 60.0
EXPIRY_GRACE_S = 1.0  # after a link's end before it is closed: clocks differ
LATE_EVERY_S = 0.2
AGAIN_PER_S = 20.0  # what an outage left is taken up again at this pace, which grows: some 20 ms of CPU each
ORPHANS_EVERY_S = 5.0  # between two looks for attempts of suppliers that are not in use any more
ADDRESS_MAX = 128  # characters: a sealed IPv6 address in base64 has 96
CALLS_MAX = 8  # in one turn of an attempt; a supplier that keeps saying something else is asked again later

Cleared = Literal["clear", "paid", "unknown"]


# The loops


@dataclass(frozen=True, slots=True)
class Till:
    """What every step here needs."""

    engine: AsyncEngine
    providers: Providers
    lease_s: float
    office_url: str = ""
    seal_keys: Sequence[SealingKey] = ()  # open payers' addresses

    def notify_for(self, provider: str) -> str | None:
        """Where the supplier calls back. None: nowhere is set, so what became of a link is found out by query."""
        return f"{self.office_url.rstrip('/')}/v1/hooks/{provider}" if self.office_url else None


class _Work(NamedTuple):
    """One kind of due rows of a supplier."""

    name: Kind
    lease: Callable[[AsyncConnection, str, int, float], Awaitable[list[Row]]]
    step: Callable[[Till, GuardedPayment, Row], Awaitable[None]]
    share: int  # a places-th of the places, so that looking at old links never keeps a new buyer from theirs
    per_s: float | None = (
        None  # so many a second at first, however many are due; None: as many as there are places
    )


async def run(
    engine: AsyncEngine,
    scripts: Scripts,
    providers: Providers,
    settings: Settings,
    stopping: asyncio.Event,
    lookout: Lookout,
) -> None:
    """Start links, look at those under way, weigh late money, send refunds, until `stopping` is set.

    Each supplier has loops and places of its own: one that hangs holds up nobody else's buyers.
    """
    seal_keys = sealing_keys(settings.pii_keys.get_secret_value())
    till = Till(engine, providers, settings.lease_s, settings.office_url, seal_keys)
    works = (
        _Work("starts", payments.lease_starts, step, 1),
        _Work("again", payments.lease_again, step, 2, per_s=AGAIN_PER_S),
        _Work("polls", payments.lease_polls, step, 4),
        _Work("refunds", refunds.lease, _refund, 4),
    )
    async with asyncio.TaskGroup() as group:
        for provider in providers.payment.values():
            for work in works:
                places = max(1, settings.pay_concurrency // work.share)
                group.create_task(_work(till, provider, work, places, stopping, lookout))
            if len(providers.payment) > 1:
                move_on = partial(failover.move_on, engine, providers, provider)
                group.create_task(again_and_again("move on", move_on, LOOK_EVERY_S, stopping))
        adopt, late = partial(failover.adopt, engine, providers), partial(weigh_late, engine, scripts)
        group.create_task(again_and_again("adopt", adopt, ORPHANS_EVERY_S, stopping))
        group.create_task(again_and_again("late", late, LATE_EVERY_S, stopping, lookout.bell("late")))


async def _work(
    till: Till,
    provider: GuardedPayment,
    work: _Work,
    places: int,
    stopping: asyncio.Event,
    lookout: Lookout,
) -> None:
    pace = None if work.per_s is None else Pace(work.per_s)

    async def lease(count: int) -> list[Row]:
        async with alone(till.engine) as conn:
            rows = await work.lease(conn, provider.name, count, till.lease_s)
        if pace is not None:
            pace.took(len(rows), count)
        return rows

    def room(running: int) -> int:
        # Nothing while the supplier's breaker is open: the rows stay due.
        free = min(places - running, provider.guard.ready())
        return free if pace is None else min(free, pace.room())

    await work_off(
        f"pay {provider.name} {work.name}",
        lease,
        lambda row: work.step(till, provider, row),
        room,
        stopping,
        lookout,
        lookout.bell(work.name, provider.name),
    )


async def _refund(till: Till, provider: GuardedPayment, row: Row) -> None:
    await send_refund(till.engine, provider, row)


# One attempt


async def step(till: Till, provider: GuardedPayment, row: Row) -> None:
    """Do the next thing for one leased attempt."""
    await _play(till, provider, row, attempt.begin(_facts(row)))


async def _play(till: Till, provider: GuardedPayment, row: Row, move: attempt.Move) -> Cleared:
    """Call the supplier until there is a verdict, and carry it out. Says whether money may still come of it."""
    facts = _facts(row)
    for _ in range(CALLS_MAX):
        match move:
            case attempt.Create():
                linked = await provider.create(_wanted(till, provider, row))
                other = (
                    other_may(linked) and await failover.other(till.engine, till.providers, row) is not None
                )
                move = attempt.after_create(facts, linked, other=other)
            case attempt.Query():
                move = attempt.after_query(facts, move, await provider.query(_ref(row)))
            case attempt.Close():
                move = attempt.after_close(move, await provider.close(_ref(row)))
            case _:
                return await _carry_out(till, row, move)
    return await _carry_out(till, row, attempt.Unknown("contradicts_itself"))


async def _end_it(till: Till, row: Row, why: str) -> Cleared:
    """Make sure that nothing comes of a leased attempt any more."""
    move = attempt.end(_facts(row), why)
    provider = till.providers.payment.get(row["provider"])
    if provider is not None:
        return await _play(till, provider, row, move)
    if isinstance(move, attempt.End):
        return await _carry_out(till, row, move)  # nobody was ever asked for it
    alert("provider_gone", "an open payment belongs to a supplier that is not configured", attempt=row["id"])
    return "unknown"


async def _carry_out(till: Till, row: Row, verdict: attempt.Verdict) -> Cleared:
    match verdict:
        case attempt.Show(link):
            await _store(till, row, link)
        case attempt.SendLater(retry_in_ms):
            async with till.engine.begin() as conn:
                await payments.start(conn, held(row), backoff_s(row["tries"], retry_in_ms))
        case attempt.Elsewhere(code, otherwise):
            if not await failover.go(till.engine, till.providers, row, partial(_end_failed, row, code)):
                return await _carry_out(till, row, otherwise)
        case attempt.LookLater():
            await _look_later(till, row)
        case attempt.Unknown(code, retry_in_ms):
            await _wait_unknown(till, row, code, retry_in_ms)
        case attempt.Settle(captured):
            return "paid" if await _settle(till, row, captured) != "mismatch" else "unknown"
        case attempt.End(state, code, again):
            await _end(till, row, state, code, again=again)
            return "clear"
        case attempt.MakeWay():
            await _make_way(till, row)
        case attempt.PayNothing():
            async with till.engine.begin() as conn:
                if await orders.pay(conn, row["order_no"]) is not None:
                    await payments.succeed(conn, row["id"])
        case _:
            assert_never(verdict)
    return "unknown"


async def _end_failed(row: Row, code: str, conn: AsyncConnection) -> bool:
    return await payments.end(conn, held(row), "failed", code)


def _facts(row: Row) -> attempt.Facts:
    over_at = row["expires_at"]
    return attempt.Facts(
        state=row["state"],
        was_sent=row["was_sent_at"] is not None,
        payable=row["order_state"] == "reserved" and not row["leaving"],
        too_late=row["link_until"] - row["now"] < timedelta(seconds=LINK_LIFE_MIN_S),
        link_over=over_at is not None and over_at + timedelta(seconds=EXPIRY_GRACE_S) <= row["now"],
        costs_nothing=row["amount_minor"] == 0,
    )


def _wanted(till: Till, provider: GuardedPayment, row: Row) -> LinkWanted:
    """The attempt's id makes it one payment however often it is asked for."""
    return LinkWanted(
        attempt_id=row["id"],
        order_no=row["order_no"],
        amount_minor=row["amount_minor"],
        currency=row["currency"],
        title=row["title"],
        channel=row["channel"],
        expires_at=row["link_until"],
        return_url=row["return_url"],
        payer=_payer(till, row),
        notify_url=till.notify_for(provider.name),
    )


def _payer(till: Till, row: Row) -> Mapping[str, Any] | None:
    """Who pays, and from which network address, opened for this one call."""
    payer: dict[str, Any] | None = row["payer"]
    if payer is None:
        return None
    told = {
        name: value for name, value in payer.items() if name not in ("sealed", "address")
    }  # plain: N−1 wrote it
    if "sealed" in payer and (found := _opened(till, row, payer["sealed"], payer_aad)) is not None:
        told |= msgspec.json.decode(found, type=dict[str, str])
    if "address" in payer and (found := _opened(till, row, payer["address"], address_aad)) is not None:
        told["client_ip"] = found.decode()
    return told


def _opened(till: Till, row: Row, sealed: str, aad: Callable[[str, str], bytes]) -> bytes | None:
    try:
        return unseal(till.seal_keys, b64decode(sealed, validate=True), aad(row["sale"], row["buyer_id"]))
    except (CannotOpen, ValueError) as error:
        log.error("payer_cannot_be_opened", attempt=row["id"], error=type(error).__name__)
        return None


def _ref(row: Row) -> AttemptRef:
    return AttemptRef(
        attempt_id=row["id"],
        order_no=row["order_no"],
        provider_ref=row["provider_ref"],
        expires_at=row["expires_at"],
    )


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
            held(row),
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


async def _look_later(till: Till, row: Row) -> None:
    """Ask again about a link that nobody has called back about, at its end at the latest."""
    wait_s = min(POLL_MAX_S, POLL_FIRST_S * 2.0 ** min(row["tries"], 6)) * random.uniform(0.8, 1.2)
    until_end_s = (row["expires_at"] - row["now"]).total_seconds() + EXPIRY_GRACE_S
    async with till.engine.begin() as conn:
        await payments.wait(conn, held(row), "sent", max(0.1, min(wait_s, until_end_s)))


async def _settle(till: Till, row: Row, captured: Captured) -> Evidence:
    """A query has found money."""
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
        waits = await payments.wait(conn, held(row), "unknown", backoff_s(row["tries"], retry_in_ms), code)
        if waits and row["state"] != "unknown" and order is not None and order["state"] == "reserved":
            await orders.bump(conn, row["order_no"])


async def _end(till: Till, row: Row, state: str, code: str | None, *, again: bool = False) -> None:
    """The attempt is over. again: the buyer, who still waits for a link, gets another attempt at once."""
    async with till.engine.begin() as conn:
        order = await orders.lock(conn, row["order_no"])
        if order is None or not await payments.end(conn, held(row), state, code):
            return
        if order["state"] == "reserved":
            others = await payments.unended(conn, row["order_no"])
            again = again or (code == "expired" and _extended(order, row["now"]))
            if again and not order["leaving"] and not others:
                provider = await failover.best(conn, till.providers, order, row["channel"])
                await failover.add_like(conn, order, row, provider)
            await payments.hasten_wanted(conn, row["order_no"])
            await orders.bump(conn, row["order_no"])
        elif order["state"] == "paid":
            kept = await captures.kept(conn, row["order_no"])
            if kept is not None and kept["attempt_id"] is not None and kept["attempt_id"] != row["id"]:
                await payments.succeed(conn, kept["attempt_id"])


def _extended(order: Row, now: datetime) -> bool:
    """The link ended with the deadline it was made for, and the order got more time since: the buyer gets another."""
    return bool(order["extended_s"]) and order["pay_by"] - now >= timedelta(seconds=LINK_LIFE_MIN_S)


async def _make_way(till: Till, row: Row) -> None:
    """A new attempt waits until the one before it cannot bring money any more."""
    before: Row | None = None
    async with till.engine.begin() as conn:
        order = await orders.lock(conn, row["order_no"])
        if order is None:
            return
        if order["state"] != "reserved" or order["leaving"]:
            await payments.end(conn, held(row), "closed", "not_payable")
            return
        open_ones = [
            other for other in await payments.unended(conn, row["order_no"]) if other["id"] != row["id"]
        ]
        if not open_ones:
            if await payments.start(conn, held(row)):
                await orders.bump(conn, row["order_no"])
            return
        before = await payments.lease_one(conn, open_ones[0]["id"], till.lease_s)
    if before is not None and await _end_it(till, before, "replaced") == "clear":
        async with till.engine.begin() as conn:
            await orders.lock(conn, row["order_no"])
            await payments.start(conn, held(row))
        return
    async with till.engine.begin() as conn:
        await payments.wait(conn, held(row), "wanted", backoff_s(row["tries"]))


# What others ask of the money


async def start_attempt(
    conn: AsyncConnection,
    order_no: str,
    *,
    channel: str,
    return_url: str | None,
    payer: Mapping[str, Any] | None,
    providers: Providers,
    address: str | None = None,
) -> bool:
    """The buyer gets a link, or a new one for one that has ended or goes elsewhere. False: nothing to do, or too late.

    In the caller's transaction; the caller has checked that the order is reserved, and locked it or not. address: the
    buyer's, sealed, in base64; kept with the attempt until it has its link, if a supplier of the channel wants it.
    """
    order = await orders.lock(conn, order_no)
    if order is None or order["state"] != "reserved" or order["leaving"]:
        return False
    if address is not None and len(address) <= ADDRESS_MAX and providers.wants_address(channel):
        payer = {**(payer or {}), "address": address}
    now = await payments.clock(conn)
    if order["pay_by"] is not None and order["pay_by"] - now < timedelta(seconds=LINK_LIFE_MIN_S):
        return False
    asked: dict[str, Any] = {
        "provider": await failover.best(conn, providers, order, channel),
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
                await payments.end(conn, held(row), "closed", "not_payable")
            continue
        cleared = await _end_it(till, row, "not_payable")
        if cleared != "clear":
            return cleared
    return "clear"
