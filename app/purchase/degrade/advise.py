"""Admission slows down by itself when Postgres or payment cannot keep up, says why, and ends by itself.

Twice a second one worker (the *advisor*: a key that expires) looks at claims, payment links and breakers, asks each
open sale's throttle (throttle.py), and writes what it says into the sale (`sale_advise`), where the token bucket of
every script obeys it: joins that are served at once, ticks, returned units. The operator's rate is not touched.

What is written holds for `advice_lease_s`. An advisor that dies is followed by another worker within LEAD_MS, which
goes on from what is written; without any worker the slowdown ends with its lease, and the backlog cap remains.

The same lease carries the notices of tickets: `payment` (nobody can pay now).
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import structlog
from prometheus_client import Gauge
from sqlalchemy.ext.asyncio import AsyncEngine

from app import keys
from app.answers import Advised
from app.keys import GROUP, SaleKeys
from app.ledger import payments
from app.ledger.engine import alone, passes
from app.providers.registry import Providers
from app.purchase.admit import Admitter, Watched
from app.purchase.degrade.extend import out
from app.purchase.degrade.throttle import Limits, Signs, Slow, Throttle
from app.redis.link import Link
from app.scripts import Scripts
from app.settings import Settings

LEAD_MS = 5_000  # a dead advisor is followed by another worker after this; ten looks
SERVED_OVER_MS = 5_000  # the rate that a slowdown starts from is measured over this
QUEUED_MIN = 5  # so many links must be late: one that hangs alone says nothing about payment
LOOK_WITHIN_S = 1.0  # the look at Postgres; without it the claims' lag tells

SLOWED = Gauge(
    "fairdrop_admission_slowed_per_s", "tickets a second while slowed down, -1: not slowed", ["sale"]
)
_log = structlog.get_logger("advise")


def limits_of(settings: Settings) -> Limits:
    """The throttle's limits as the settings have them."""
    return Limits(
        confirm_lag_s=settings.slow_confirm_lag_s,
        link_wait_s=settings.slow_link_wait_s,
        least_milli=max(1, round(settings.slow_rate_min_per_s * 1000)),
    )


@dataclass
class _Course:
    """One sale as the advisor knows it."""

    epoch: int
    throttle: Throttle
    counted: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=64))  # (ms, claims ever)
    said: tuple[Slow | None, str] = (None, "")
    said_ms: int = 0

    def served_milli(self) -> int:
        """Claims of the last seconds, thousandths a second."""
        (first_ms, first), (last_ms, last) = self.counted[0], self.counted[-1]
        return (last - first) * 1_000_000 // max(1_000, last_ms - first_ms)


@dataclass
class Advisor:
    """The worker's loop; any number of workers may run it, one at a time advises."""

    engine: AsyncEngine
    link: Link
    scripts: Scripts
    providers: Providers
    admitter: Admitter
    settings: Settings
    attempts: asyncio.Event | None = None  # rings while some attempt has not ended; None: ask each time
    limits: Limits | None = None  # of every throttle; None: as the settings have them
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    _courses: dict[str, _Course] = field(default_factory=dict)

    async def turn(self) -> None:
        """One look. DidNotHappen, Unknown: Redis does not answer; what was said holds until its lease ends."""
        if not self.settings.slow_auto or not await self._leads():
            self._courses.clear()
            return
        sales = [
            sale
            for sale in self.admitter.watched.values()
            if not sale.closed and self.admitter.now_ms >= sale.opens_ms
        ]
        for gone in self._courses.keys() - {sale.sale for sale in sales}:
            del self._courses[gone]
        payment_out = bool(self.providers.payment) and len(out(self.providers)) == len(self.providers.payment)
        link_wait_s = await self._link_wait_s() if sales else 0.0
        for sale in sales:
            await self._advise(sale, payment_out, link_wait_s)

    async def _leads(self) -> bool:
        mine, holder = await self.link.pipeline(
            [("SET", keys.ADVISOR, self.name, "NX", "PX", LEAD_MS), ("GET", keys.ADVISOR)]
        )
        for answer in (mine, holder):
            if isinstance(answer, Exception):
                raise answer
        if mine is None and holder == self.name.encode():
            await self.link.call("PEXPIRE", keys.ADVISOR, LEAD_MS)
        return bool(holder == self.name.encode())

    async def _link_wait_s(self) -> float:
        if self.attempts is not None:
            if not self.attempts.is_set():
                return 0.0
            self.attempts.clear()
        try:
            async with asyncio.timeout(LOOK_WITHIN_S), alone(self.engine) as conn:
                return await payments.link_wait_s(conn, QUEUED_MIN)
        except Exception as error:
            if not passes(error):
                raise
            return 0.0

    async def _advise(self, sale: Watched, payment_out: bool, link_wait_s: float) -> None:
        stream = SaleKeys(sale.sale).orders
        clock, groups, told = await self.link.pipeline(
            [
                ("TIME",),
                ("XINFO", "GROUPS", stream),
                ("HMGET", SaleKeys(sale.sale).sale, "rate_milli", "slow_milli", "slow_base_milli", "slow_reason",
                 "advice_until_ms", "claims_made"),
            ]
        )  # fmt: skip
        if any(isinstance(answer, Exception) for answer in (clock, groups, told)) or told[0] is None:
            return  # no such stream: reconcile and the confirm loop call a person
        now_ms = int(clock[0]) * 1000 + int(clock[1]) // 1000
        course = self._courses.get(sale.sale)
        if course is None or course.epoch != sale.epoch:
            course = self._courses[sale.sale] = _Course(
                sale.epoch, Throttle(self.limits or limits_of(self.settings), _in_force(told, now_ms))
            )
        course.counted.append((now_ms, int(told[5] or 0)))
        while now_ms - course.counted[0][0] > SERVED_OVER_MS:
            course.counted.popleft()
        lag_s = await self._confirm_lag_s(stream, groups, now_ms)
        signs = Signs(payment_out, link_wait_s, lag_s)
        slow = None
        if not sale.paused:
            slow = course.throttle.look(now_ms, signs, course.served_milli(), int(told[0]))
        await self._say(sale, course, slow, "payment" if payment_out else "", now_ms)

    async def _confirm_lag_s(self, stream: str, groups: Any, now_ms: int) -> float:
        """Age of the oldest claim that no worker has taken yet: what a dead worker holds is no lag of Postgres."""
        last = next(
            (g["last-delivered-id"] for g in map(_facts, groups) if g["name"] == GROUP.encode()), None
        )
        if last is None:
            return 0.0
        found = await self.link.call("XRANGE", stream, b"(" + last, "+", "COUNT", 1)
        return max(0.0, (now_ms - int(found[0][0].split(b"-")[0])) / 1000) if found else 0.0

    async def _say(
        self, sale: Watched, course: _Course, slow: Slow | None, notices: str, now_ms: int
    ) -> None:
        lease_ms = int(self.settings.advice_lease_s * 1000)
        before, saying = course.said, (slow, notices)
        if saying == (None, "") == before:
            return
        if saying == before and now_ms - course.said_ms < lease_ms / 3:
            return
        answer = await self.scripts.sale_advise(
            sale=sale.sale,
            epoch=sale.epoch,
            slow_milli=-1 if slow is None else slow.rate_milli,
            base_milli=-1 if slow is None else slow.base_milli,
            reason="" if slow is None else slow.reason,
            notices=notices,
            lease_ms=lease_ms,
        )
        if not isinstance(answer, Advised):
            return
        course.said, course.said_ms = saying, now_ms
        SLOWED.labels(sale.sale).set(-1 if slow is None else slow.rate_milli / 1000)
        was = before[0]
        if (was is None) != (slow is None) or (was and slow and was.reason != slow.reason):
            _log.warning(
                "admission slowed" if slow else "admission no longer slowed",
                sale=sale.sale,
                reason=slow.reason if slow else None,
                rate_per_s=slow.rate_milli / 1000 if slow else None,
                signs=notices or None,
            )


def _facts(flat: Any) -> dict[str, Any]:
    """XINFO's flat answer as a dict; names are text, values as they came."""
    return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}


def _in_force(told: Any, now_ms: int) -> Slow | None:
    """The slowdown that another advisor wrote, if it holds still."""
    _, rate, base, reason, until, _ = told
    if rate is None or int(rate) < 0 or until is None or now_ms >= int(until):
        return None
    word = reason.decode()
    if word not in ("payment_down", "payment_slow", "confirm_lag"):
        return None  # a newer release wrote it
    return Slow(int(rate), max(int(base), int(rate)), word)
