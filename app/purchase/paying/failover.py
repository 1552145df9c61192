"""A payment that its supplier has certainly not made goes to another one, within a second of the breaker's trip.

Which one: the next of the channel's route that is well and was not tried for this order just now. Never while an
attempt may still bring money (attempt.py says when; the index `one_open_attempt_an_order` refuses a mistake).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import structlog
from prometheus_client import Counter
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.breaker import State
from app.ledger import orders, payments
from app.ledger.engine import alone
from app.providers.answer import BREAKER_OPEN
from app.providers.guard import GuardedPayment
from app.providers.registry import Providers

Row = dict[str, Any]
log = structlog.get_logger()

TRIED_S = 15.0  # for so long a supplier that came to no link for an order is not the next to be asked for it
MOVES_MAX = (
    10  # an order's attempt with this number stays where it is: the rest of ATTEMPTS_MAX is its buyer's
)
MOVED_MAX = 500  # attempts that one look sends to other suppliers, in one statement
MOVED_SINGLY_MAX = 20  # and of those that need a transaction each; the next look has the rest
HALF_OPEN_WAIT_S = (
    0.3  # while a breaker lets only probes through, what is no probe by then goes to another supplier
)

MOVED = Counter(
    "fairdrop_payments_moved", "Attempts that went to another supplier, by the one they left", ["provider"]
)


async def other(engine: AsyncEngine, providers: Providers, row: Row) -> str | None:
    """The supplier that could serve the attempt instead of its own. None: no other is well, or untried."""
    if set(providers.payment) == {row["provider"]} or row["attempt_no"] >= MOVES_MAX:
        return None
    async with engine.connect() as conn:
        tried = await payments.tried(conn, row["order_no"], TRIED_S)
    return providers.payment_for(row["channel"], row["order_no"], {row["provider"], *tried})


async def go(
    engine: AsyncEngine, providers: Providers, row: Row, end: Callable[[AsyncConnection], Awaitable[bool]]
) -> bool:
    """End an attempt that has certainly not happened, and begin another at the next supplier, in one transaction.

    False: nothing changed; there is no other supplier, or no buyer waits for a link any more.
    """
    found = await other(engine, providers, row)
    if found is None:
        return False
    async with engine.begin() as conn:
        order = await orders.lock(conn, row["order_no"])
        if order is None or order["state"] != "reserved" or order["leaving"] or not await end(conn):
            return False
        if not await payments.unended(conn, row["order_no"]):
            await add_like(conn, order, row, found)
        await payments.hasten_wanted(conn, row["order_no"])
        await orders.bump(conn, row["order_no"])
    MOVED.labels(row["provider"]).inc()
    log.info("payment_moved", order_no=row["order_no"], provider=row["provider"], other=found)
    return True


async def move_on(engine: AsyncEngine, providers: Providers, provider: GuardedPayment) -> int:
    """While a supplier's breaker is not closed, send what waits for it to others that are well. Returns how many.

    Only what no supplier was asked for, or what has certainly not happened. Half open, its probes come first.
    """
    refusal = provider.guard.refusal()
    shut = refusal is not None and refusal.code == BREAKER_OPEN
    if not shut and provider.guard.breaker.state is not State.HALF_OPEN:
        return 0
    due_since_s = 0.0 if shut else HALF_OPEN_WAIT_S
    return await _move_from(engine, providers, provider.name, due_since_s, BREAKER_OPEN)


async def adopt(engine: AsyncEngine, providers: Providers) -> int:
    """What waits for a supplier that is not in use any more goes to those that are. Returns how many.

    What may have happened there stays: only that supplier knows, and whoever ends the order calls a person.
    """
    async with alone(engine) as conn:
        gone = await payments.foreign(conn, list(providers.payment))
    return sum([await _move_from(engine, providers, name, 0.0, "provider_gone") for name in gone])


async def _move_from(
    engine: AsyncEngine, providers: Providers, name: str, due_since_s: float, code: str
) -> int:
    # Only channels that lead somewhere else, or what can go nowhere would stand in front of what can.
    channels = [
        channel
        for channel in providers.routes.channels()
        if providers.payment_for(channel, "", {name}) is not None
    ]
    if not channels:
        return 0
    async with alone(engine) as conn:
        waiting = await payments.unsent(conn, name, channels, due_since_s, TRIED_S, MOVED_MAX)
    fresh: dict[str, str] = {}
    moved = singly = 0
    for row in waiting:
        if not row["fresh"]:
            if singly == MOVED_SINGLY_MAX:
                continue
            singly += 1
            moved += await go(engine, providers, row, partial(_end_unsent, row["id"], code))
            continue
        found = providers.payment_for(row["channel"], row["order_no"], {name, *row["tried"]})
        if found is not None:
            fresh[row["id"]] = found
    if fresh:
        async with alone(engine) as conn:
            count = await payments.redirect_fresh(conn, name, fresh)
        MOVED.labels(name).inc(count)
        log.info("payments_moved", provider=name, count=count)
        moved += count
    return moved


async def _end_unsent(attempt_id: str, code: str, conn: AsyncConnection) -> bool:
    return await payments.end_unsent(conn, attempt_id, code)


async def best(conn: AsyncConnection, providers: Providers, order: Row, channel: str) -> str:
    """Where a new attempt goes: the first of the route that is well and has not just come to no link."""
    number = order["order_no"]
    tried = await payments.tried(conn, number, TRIED_S) if len(providers.payment) > 1 else set()
    return providers.payment_for(channel, number, tried) or providers.payment_now(channel, number)


async def add_like(conn: AsyncConnection, order: Row, row: Row, provider: str) -> None:
    await payments.add_attempt(
        conn,
        order,
        provider=provider,
        channel=row["channel"],
        return_url=row["return_url"],
        payer=row["payer"],
        state="created",
    )
