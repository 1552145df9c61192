"""Loops that outlive the outages of what they need."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
from prometheus_client import Counter as Count
from prometheus_client import Gauge

from app.alarm import alert
from app.errors import DidNotHappen, Unknown
from app.ledger import engine as engines

BACKOFF_S = 0.1  # after the first failure of a loop; doubles
BACKOFF_MAX_S = 2.0  # a store that is back is found within this
ALERT_AFTER_S = 60.0  # a loop that fails for longer calls a person

FAILING = Gauge("fairdrop_loop_failing", "1 while a loop of the worker fails", ["loop"])
FAILURES = Count("fairdrop_loop_failures", "failed turns of a loop of the worker", ["loop"])
_log = structlog.get_logger("worker")

Turn = Callable[[], Awaitable[object]]  # truthy: there is more to do at once


@dataclass
class Health:
    """Why which loop does not work now; empty: all do."""

    troubles: dict[str, str] = field(default_factory=dict)


async def keep_going(
    name: str,
    turn: Turn,
    every_s: float,
    stopping: asyncio.Event,
    health: Health,
    *,
    wake: asyncio.Event | None = None,
    bell: asyncio.Event | None = None,
    backoff_max_s: float = BACKOFF_MAX_S,
) -> None:
    """Turn after turn until `stopping`; an outage is waited out with backoff, and logged when it begins and ends.

    A turn that found nothing more to do is followed by another `every_s` later, or when it is woken; with a bell, once
    that rings too.
    """
    backoff_s, since = BACKOFF_S, 0.0
    while not stopping.is_set():
        for called in (wake, bell):
            if called is not None:
                called.clear()
        try:
            more = await turn()
        except Exception as error:  # noqa: BLE001 - a loop survives what nobody thought of: it says so and goes on
            why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            FAILURES.labels(name).inc()
            if not since:
                since = time.monotonic()
                FAILING.labels(name).set(1)
                expected = isinstance(error, (DidNotHappen, Unknown)) or engines.passes(error)
                _log.warning("loop interrupted", loop=name, why=why, exc_info=None if expected else error)
            elif time.monotonic() - since > ALERT_AFTER_S and name not in health.troubles:
                alert("loop_failing", "a loop of the worker has been failing for long", loop=name, error=why)
            if time.monotonic() - since > ALERT_AFTER_S / 10:
                health.troubles[name] = why
            await first_of(stopping, None, backoff_s)
            backoff_s = min(backoff_s * 2, backoff_max_s)
            continue
        if since:
            _log.info("loop works again", loop=name, after_s=round(time.monotonic() - since, 1))
            FAILING.labels(name).set(0)
            health.troubles.pop(name, None)
            backoff_s, since = BACKOFF_S, 0.0
        if not more:
            await first_of(stopping, wake, every_s)
            if bell is not None:
                await first_of(stopping, bell)


def once(turn: Turn) -> Turn:
    """The turn, for a loop that rests after each: what it returns is news for people, not more to do."""

    async def rested() -> None:
        await turn()

    return rested


async def first_of(
    stopping: asyncio.Event, bell: asyncio.Event | None, within_s: float | None = None
) -> None:
    """Wait until one of them is set, or for `within_s`."""
    waiting = [asyncio.ensure_future(event.wait()) for event in (stopping, bell) if event is not None]
    try:
        await asyncio.wait(waiting, timeout=within_s, return_when="FIRST_COMPLETED")
    finally:
        for one in waiting:
            one.cancel()
