"""Looks out for all loops of a worker: one statement says what is due, and only those whose bell rings ask for more.

A loop takes rows with its own statement, which alone decides; a bell only says that it is worth asking. So each way to
be wrong ends in asking once too often: a look that fails rings every bell, and so does every ASK_YOURSELVES_S.

Whoever has just committed work for another loop says so (`wrote`): the next look is made then, not at its time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from sqlalchemy.ext.asyncio import AsyncEngine

from app.ledger import due, outages
from app.ledger.due import Kind
from app.ledger.engine import alone, driver

LOOK_EVERY_S = 0.1  # what others (the office, another worker) have committed waits that long at most
AT_LEAST_S = 0.05  # between two looks, however much is written here
LOOK_WITHIN_S = 5.0  # it takes half a millisecond; a connection that hangs must not keep the others waiting
ASK_YOURSELVES_S = 30.0  # between two times that all bells ring, whatever was seen


class Lookout:
    """The bells of one worker. `bell` before the first `turn`; the loop that waits for a bell clears it first."""

    def __init__(
        self,
        engine: AsyncEngine,
        every_s: float = LOOK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._every_s = every_s
        self._clock = clock
        self._bells: dict[tuple[Kind, str], asyncio.Event] = {}
        self._wrote = asyncio.Event()
        self._looked_at = self._next_at = clock()
        self._all_at = 0.0  # when all bells rang

    def bell(self, kind: Kind, supplier: str = "") -> asyncio.Event:
        """Rings (is set) while this kind of work is due. It rings at first."""
        found = self._bells.get((kind, supplier))
        if found is None:
            found = self._bells[kind, supplier] = asyncio.Event()
            found.set()
        return found

    def wrote(self, *kinds: Kind) -> None:
        """This process has committed what may be another loop's work: look soon. kinds: this for sure, ring at once."""
        for kind in kinds:
            self._ring(kind, "")
        self._wrote.set()

    def ring_all(self) -> None:
        for bell in self._bells.values():
            bell.set()

    async def turn(self) -> bool:
        """Wait until it is time, and look once. Raises what the statement raised; all bells ring then."""
        await self._until_next()
        self._wrote.clear()
        self._looked_at = self._clock()
        self._next_at = self._looked_at + self._every_s
        try:
            async with alone(self._engine) as conn:
                wire = await driver(conn)
                try:
                    async with asyncio.timeout(LOOK_WITHIN_S):
                        found = await due.look(conn, self._every_s, outages.CURRENT_S)
                except Exception:
                    wire.terminate()  # it may hang for ever: the next look gets another one
                    raise
        except BaseException:
            self.ring_all()
            raise
        if self._looked_at - self._all_at >= ASK_YOURSELVES_S:
            self._all_at = self._looked_at
            self.ring_all()
        for one in found:
            if one.in_s <= 0:
                self._ring(one.kind, one.supplier)
            else:
                self._next_at = min(self._next_at, self._looked_at + one.in_s)
        return True  # the waiting is done here

    def _ring(self, kind: Kind, supplier: str) -> None:
        for (other, whose), bell in self._bells.items():
            if other == kind and (not supplier or whose in ("", supplier)):
                bell.set()

    async def _until_next(self) -> None:
        await asyncio.sleep(self._looked_at + min(AT_LEAST_S, self._every_s) - self._clock())
        with suppress(TimeoutError):
            async with asyncio.timeout(self._next_at - self._clock()):
                await self._wrote.wait()
