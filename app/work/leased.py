"""Works off due rows: lease some, handle each beside the others, never more than there is room for.

When it is worth a look a bell says (lookout.py): with nothing due a loop asks Postgres nothing.

A row that cannot be handled stays leased until its lease runs out: that is its backoff, whatever went wrong.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.errors import DidNotHappen, Unknown
from app.work.lookout import LOOK_EVERY_S, Lookout
from app.work.loops import first_of

T = TypeVar("T")
log = structlog.get_logger()

GATHER_S = 0.005  # so that one look takes the places of several that finished together
DATABASE_DOWN_S = 1.0  # between two looks while Postgres does not answer
DRAIN_S = 8.0  # after `stopping`: longer than one supplier call; what is cut off recovers by query


RETRY_FIRST_S = 0.5
RETRY_MAX_S = 30.0


def held(row: Mapping[str, Any]) -> tuple[str, int]:
    """A leased row as its holder names it: another generation is another holder's."""
    return row["id"], row["generation"]


def backoff_s(tries: int, at_least_ms: int = 0) -> float:
    """s until a row that failed `tries` times is due again: growing and spread, and not before a breaker may let it
    through (`at_least_ms`)."""
    grown = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(max(tries - 1, 0), 10))
    return max(grown, at_least_ms / 1000) * random.uniform(0.8, 1.2)


class Pace:
    """How many rows may be taken now, of a kind that falls due all at once when something works again.

    `per_s` at first, for a burst takes the CPU that others on the machine need, and hits a supplier that has just come
    back. While each look finds as many as it may take, the pace grows by GROWTH a look: 500 in 8 s, 5,000 in 15 s.
    """

    GROWTH = 1.03

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s = per_s
        self._now_per_s = per_s
        self._clock = clock
        self._saved, self._at = per_s * LOOK_EVERY_S, clock()

    def room(self) -> int:
        """Rows that may be taken now: what one look's time allows, never what was saved in quiet times."""
        now = self._clock()
        self._saved += (now - self._at) * self._now_per_s
        self._saved = min(self._saved, max(1.0, self._now_per_s * LOOK_EVERY_S))
        self._at = now
        return int(self._saved)

    def took(self, count: int, allowed: int) -> None:
        """So many were found where `allowed` might have been."""
        self._saved -= count
        self._now_per_s = self._now_per_s * self.GROWTH if count >= allowed else self.per_s


async def work_off(
    name: str,
    lease: Callable[[int], Awaitable[Sequence[T]]],
    handle: Callable[[T], Awaitable[None]],
    room: Callable[[int], int],
    stopping: asyncio.Event,
    lookout: Lookout,
    bell: asyncio.Event,
) -> None:
    """Until `stopping` is set; then what has begun is finished, for at most DRAIN_S.

    lease(n): take up to n due rows. handle(row): deal with one. room(running): how many more may begin now. bell: rings
    while rows are due.
    """
    running: set[asyncio.Task[None]] = set()

    async def one(row: T) -> None:
        try:
            await handle(row)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            log.warning("row_left_leased", loop=name, error=type(error).__name__)
        except Exception:
            # A bug must not stop the other rows; this one comes back when its lease ends.
            log.exception("row_left_leased", loop=name)
        lookout.wrote()

    stop = asyncio.ensure_future(stopping.wait())
    rung = asyncio.ensure_future(bell.wait())
    try:
        while not stop.done():
            if rung.done():
                rung = asyncio.ensure_future(bell.wait())
            await asyncio.wait({stop, rung}, return_when="FIRST_COMPLETED")
            wait_s, wanted, rows, failed = LOOK_EVERY_S, room(len(running)), [], False
            if wanted > 0:
                bell.clear()
                try:
                    rows = list(await lease(wanted))
                except (SQLAlchemyError, OSError, TimeoutError) as error:
                    log.warning("cannot_lease", loop=name, error=type(error).__name__)
                    wait_s, failed = DATABASE_DOWN_S, True
            for row in rows:
                task = asyncio.create_task(one(row), name=f"{name} row")
                running.add(task)
                task.add_done_callback(running.discard)
            # There may be more where a full batch came from: go on as soon as a few have finished.
            more = len(rows) == wanted
            if more or failed:
                bell.set()
                await asyncio.wait(
                    {stop, *running} if more else {stop}, timeout=wait_s, return_when="FIRST_COMPLETED"
                )
            if more and not stop.done():
                await asyncio.sleep(GATHER_S)
        if running:
            await asyncio.wait(running, timeout=DRAIN_S)
    finally:
        stop.cancel()
        rung.cancel()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def again_and_again(
    name: str,
    turn: Callable[[], Awaitable[object]],
    every_s: float,
    stopping: asyncio.Event,
    bell: asyncio.Event | None = None,
) -> None:
    """A turn each `every_s` at most, until `stopping` is set; with a bell, only when it has rung. A turn that returns
    something true has left more to do at once; one that a store fails is followed by another like any."""
    while not stopping.is_set():
        if bell is not None:
            bell.clear()
        try:
            if await turn():
                continue
        except (SQLAlchemyError, OSError, TimeoutError, DidNotHappen, Unknown) as error:
            log.warning("waits_for_a_store", loop=name, error=type(error).__name__)
            if bell is not None:
                bell.set()
        await first_of(stopping, None, every_s)
        if bell is not None:
            await first_of(stopping, bell)
