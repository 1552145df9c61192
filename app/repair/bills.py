"""Suppliers' daily bills compared with our books, both ways: what each has and the other has not, or otherwise.

A day's bill is read once it should be there, again until it is, and its lines are kept; a worker that dies in between
leaves a lease that ends. Money on a bill that our books lack is asked about at the supplier, and, if it is vouched for,
recorded like a call-back that was lost: it then pays its order, or goes back. Whatever differs calls a person, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, assert_never

import structlog
from prometheus_client import Gauge
from sqlalchemy.ext.asyncio import AsyncEngine

from app.alarm import alert
from app.ledger import bills, journal, payments
from app.ledger.engine import alone
from app.providers.answer import Done, MaybeDone, NotDone, Refused
from app.providers.payment import AttemptRef
from app.providers.registry import Providers
from app.purchase.paying import evidence
from app.settings import Settings

Row = dict[str, Any]
log = structlog.get_logger("bills")

NOT_READY_S = 1_800.0  # between two looks for a bill that the supplier has not made yet
RETRY_FIRST_S = 60.0
RETRY_MAX_S = 3_600.0
LEASE_MORE_S = 60.0  # beyond the call's deadline: to store and to compare
MISSING_AFTER_DAYS = 3  # a bill that is still not there by then calls a person
SHOWN_MAX = 20  # differences named in one alert and one row of the journal

DIFFERENCES = Gauge(
    "fairdrop_bill_differences",
    "Open differences between suppliers' bills and our books",
    ["provider", "kind", "what"],
)


@dataclass
class Biller:
    """The worker's part of the bills."""

    engine: AsyncEngine
    providers: Providers
    settings: Settings
    _planned: date | None = None  # the day on which the days before it were planned

    async def turn(self) -> bool:
        """Read one due bill, if there is one. Whether there was."""
        names = list(self.providers.payment)
        if self._planned != (today := datetime.now(UTC).date()):
            async with self.engine.begin() as conn:
                for name in names:
                    await bills.plan(conn, name, self.settings.bill_days_back, self.settings.bill_after_s)
            self._planned = today
        async with alone(self.engine) as conn:
            held = await bills.lease(conn, names, self.settings.bill_deadline_s + LEASE_MORE_S)
        if held is None:
            return False
        await self.read(held)
        return True

    async def read(self, held: Row) -> bool:
        """Read one leased bill and compare it. Whether it was read."""
        name, day = held["provider"], held["day"]
        answer = await self.providers.payment[name].bill(day)
        match answer:
            case Done(lines):
                async with self.engine.begin() as conn:
                    stored = await bills.store(conn, held, lines)
                if stored:
                    log.info("bill_read", provider=name, day=str(day), lines=len(lines))
                    await self.compare(name, day)
                return stored
            case NotDone() | MaybeDone() | Refused():
                grown = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(held["tries"] - 1, 10))
                wait_s = NOT_READY_S if answer.code == "bill_not_ready" else grown
                async with alone(self.engine) as conn:
                    await bills.later(conn, held, wait_s, answer.code)
                log.info("bill_not_read", provider=name, day=str(day), code=answer.code, again_in_s=wait_s)
                if held["age_days"] > MISSING_AFTER_DAYS and held["tries"] % 10 == 1:
                    alert(
                        "bill_missing",
                        "a supplier's bill cannot be read",
                        provider=name,
                        day=str(day),
                        code=answer.code,
                    )
                return False
            case _:
                assert_never(answer)

    async def compare(self, provider: str, day: date) -> list[Row]:
        """Compare a read day. New differences call a person and go into the journal. Returns them."""
        async with self.engine.begin() as conn:
            fresh = await bills.compare(conn, provider, day)
            if fresh:
                await journal.append(
                    conn,
                    actor="worker",
                    role="worker",
                    action="bill.differs",
                    detail={
                        "provider": provider,
                        "day": str(day),
                        "differences": len(fresh),
                        "first": [_plain(one) for one in fresh[:SHOWN_MAX]],
                    },
                )
        if fresh:
            alert(
                "bill_differs",
                "a supplier's bill and our books differ",
                provider=provider,
                day=str(day),
                differences=len(fresh),
                first=[_plain(one) for one in fresh[:SHOWN_MAX]],
            )
        for one in fresh:
            if (one["kind"], one["what"]) == ("missing_here", "capture"):
                await self._ask(provider, one)
        await self._show()
        return fresh

    async def again(self) -> None:
        """Compare days that differ again: a call-back came late, or the next day's bill has what was missing."""
        async with alone(self.engine) as conn:
            days = await bills.open_days(conn, list(self.providers.payment))
        for provider, day in days:
            await self.compare(provider, day)
        await self._show()

    async def _ask(self, provider: str, line: Row) -> None:
        """Money that our books lack: what does the supplier say about the attempt? If it is paid, it is recorded."""
        async with alone(self.engine) as conn:
            attempt = await payments.attempt(conn, line["our_id"])
        if attempt is None or attempt["provider"] != provider:
            return  # nothing that we asked for: a person has to look
        answer = await self.providers.payment[provider].query(
            AttemptRef(
                attempt_id=attempt["id"],
                order_no=attempt["order_no"],
                provider_ref=attempt["provider_ref"],
                expires_at=attempt["expires_at"],
            )
        )
        if isinstance(answer, Done) and answer.value.captured is not None:
            async with self.engine.begin() as conn:
                taken = await evidence.take_evidence(
                    conn, provider, answer.value.captured, expected_attempt=attempt["id"]
                )
            log.warning("bill_brought_money", provider=provider, order_no=attempt["order_no"], taken=taken)

    async def _show(self) -> None:
        async with alone(self.engine) as conn:
            for provider, kind, what, count in await bills.counts(conn):
                DIFFERENCES.labels(provider, kind, what).set(count)


def _plain(difference: Row) -> dict[str, Any]:
    return {name: value for name, value in difference.items() if name != "at" and value is not None}


async def read_now(
    engine: AsyncEngine, providers: Providers, settings: Settings, day: date, names: Sequence[str]
) -> list[Row]:
    """Read these suppliers' bills of a day now, whatever was read before, and compare. Returns the reports."""
    biller = Biller(engine, providers, settings)

    async def one(name: str) -> None:
        async with engine.begin() as conn:
            await bills.want(conn, name, day)
        async with alone(engine) as conn:
            held = await bills.lease(conn, [name], settings.bill_deadline_s + LEASE_MORE_S, day)
        if held is None:
            return  # a worker was faster: it is reading it now
        if await biller.read(held):
            await biller.compare(name, day)  # money that was missing here may have been recorded by now

    await asyncio.gather(*[one(name) for name in names])
    async with alone(engine) as conn:
        found = await bills.report(conn, day)
    return [row for row in found if row["provider"] in names]
