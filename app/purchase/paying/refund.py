"""Money on its way back: a refund's id makes it one refund, however often its supplier is called."""

from __future__ import annotations

from typing import Any, assert_never

from sqlalchemy.ext.asyncio import AsyncEngine

from app.alarm import alert
from app.breaker import Result
from app.ledger import refunds
from app.providers.answer import Done, MaybeDone, NotDone, Refused
from app.providers.guard import GuardedPayment
from app.providers.payment import RefundState, RefundWanted
from app.work.leased import backoff_s, held

Row = dict[str, Any]


async def send_refund(engine: AsyncEngine, provider: GuardedPayment, row: Row) -> None:
    """Give one leased refund's money back; its id makes it one refund however often this runs."""
    if row["state"] in ("sent", "unknown"):
        looked = await provider.refund_query(row["id"], row["capture_ref"])
        if isinstance(looked, Done) and looked.value.state != "absent":
            await _stands(engine, row, looked.value)
            return
        if not isinstance(looked, Done):
            async with engine.begin() as conn:
                await refunds.wait(conn, held(row), row["state"], backoff_s(row["tries"]))
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
            await _stands(engine, row, state)
        case NotDone():
            async with engine.begin() as conn:
                wait_s = backoff_s(row["tries"], answer.retry_in_ms)
                await refunds.wait(conn, held(row), row["state"], wait_s)
        case MaybeDone():
            async with engine.begin() as conn:
                await refunds.wait(conn, held(row), "unknown", backoff_s(row["tries"]))
        case Refused() if answer.counts is Result.FAILURE:
            # Not this refund is refused, but all of our calls: a key is wrong. It waits until that is set right.
            async with engine.begin() as conn:
                await refunds.wait(conn, held(row), row["state"], backoff_s(row["tries"]))
        case Refused():
            await _give_up(engine, row, answer.code)
        case _:
            assert_never(answer)


async def _stands(engine: AsyncEngine, row: Row, found: RefundState) -> None:
    match found.state:
        case "done":
            async with engine.begin() as conn:
                await refunds.done(conn, row["id"], found.provider_ref)
        case "failed":
            await _give_up(engine, row, found.code or "refund_failed")
        case "pending" | "absent":
            async with engine.begin() as conn:
                await refunds.wait(conn, held(row), "sent", backoff_s(row["tries"]))
            # Asked again and again; a person is called at the first look and ever more rarely.
            if found.code is not None and row["tries"] & (row["tries"] - 1) == 0:
                alert(
                    "refund_stuck",
                    "a refund waits for a decision in the supplier's console",
                    refund=row["id"],
                    order_no=row["order_no"],
                    code=found.code,
                )
        case _:
            assert_never(found.state)


async def _give_up(engine: AsyncEngine, row: Row, code: str) -> None:
    async with engine.begin() as conn:
        failed = await refunds.failed(conn, row)
    if failed:
        alert(
            "refund_refused",
            "a supplier refuses a refund for good; the money is still with us",
            refund=row["id"],
            order_no=row["order_no"],
            code=code,
        )
