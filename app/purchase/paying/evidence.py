"""Money that has arrived: recorded before any rule can refuse it, then weighed, with the order locked.

reserved             paid
paid by another      refund (the second capture)
expired, cancelled   late money: its units again, if they are still to be had, else refund (see release.settle_late)
refunding, refunded  refund
"""

from __future__ import annotations

from typing import Any, Literal

import structlog
from prometheus_client import Counter
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.alarm import alert
from app.ledger import captures, orders, payments
from app.ledger.engine import alone
from app.providers.payment import Captured
from app.purchase import release
from app.scripts import Scripts

Row = dict[str, Any]
log = structlog.get_logger()

LATE_MAX = 100  # captures of ended orders weighed in one look

SETTLED = Counter(
    "fairdrop_captures", "Captures by decision: paid, late, refund, known, mismatch", ["decision"]
)

Evidence = Literal["paid", "late", "refund", "known", "mismatch"]


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
    capture_id = await captures.add(
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
        await captures.keep(conn, capture_id)
        await payments.succeed(conn, captured.attempt_id)
        await payments.look_at_others(conn, captured.order_no, captured.attempt_id)
        return "paid"
    if order["state"] in ("expired", "cancelled"):
        return "late"
    await captures.give_back(conn, capture_id, "second_capture")
    return "refund"


class _WeighedBefore(Exception):
    """Another worker has decided on this capture; the transaction that relied on it is rolled back."""


async def weigh_late(engine: AsyncEngine, scripts: Scripts) -> int:
    """Late money gets its units again, or goes back. Returns how many captures were decided.

    Raises DidNotHappen and Unknown while Redis is away: they stay `due`.
    """
    async with alone(engine) as conn:
        due = await captures.due(conn, LATE_MAX)
    decided = 0
    for capture in due:

        async def kept(conn: AsyncConnection, capture: Row = capture) -> None:
            if not await captures.keep(conn, capture["id"]):
                raise _WeighedBefore
            await payments.succeed(conn, capture["attempt_id"])

        async def refused(conn: AsyncConnection, capture: Row = capture) -> None:
            await captures.give_back(conn, capture["id"], "late_money")

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
