"""Feeds the confirmer with claims and the releaser with asks, from the streams of all sales that a worker watches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import structlog

from app.errors import DidNotHappen, Unknown
from app.purchase.admit import Admitter
from app.purchase.confirm import TOOK, Confirmer, claims_of, cut
from app.purchase.release import Releaser
from app.settings import Settings
from app.work.loops import BACKOFF_MAX_S, BACKOFF_S
from app.work.streams import Entry, Streams

READ_FIRST, READ_MAX = 16, 64  # entries of claims read in one call: one may hold a claim, or hundreds
ASKS_MAX = 200  # asks of one sale that one look takes

_log = structlog.get_logger("worker")


@dataclass(eq=False)
class Batch:
    """Claims of one sale in hand. `careful`: they may have been written, ask first. `full`: more wait behind them."""

    sale: str
    entries: list[Entry]
    careful: bool = False
    full: bool = False
    pause_s: float = 0.0  # before they are tried again: their node of a cluster is away
    not_before: float = 0.0  # monotonic s


@dataclass
class ConfirmLoop:
    """Feeds the confirmer, with several batches of a sale under way at once: one is read and encoded here while
    Postgres writes another and Redis is told of a third.

    Entries in hand stay in hand until they are done; a sale in trouble holds up no other.
    """

    streams: Streams
    confirmer: Confirmer
    admitter: Admitter
    settings: Settings
    wrote: Callable[[], None] = lambda: None  # after a batch was confirmed
    working: dict[asyncio.Task[None], Batch] = field(default_factory=dict)
    held: list[Batch] = field(default_factory=list)  # failed, or COMMIT's answer was lost
    ready: list[Batch] = field(
        default_factory=list
    )  # read, and not begun: a read brought more than one batch
    _count: int = READ_FIRST  # entries asked for at a time: about a batch, if they are like the last ones

    async def turn(self) -> bool:
        begun = time.monotonic()
        held, self.held = self.held, []
        for batch in held:
            if begun >= batch.not_before:
                self._start(batch)
            else:
                self.held.append(batch)
        fresh = await self._read()
        for sale, (entries, more) in fresh.items():
            batches = list(cut(entries, self.settings.confirm_batch_max))
            self.ready += [Batch(sale, batch, full=more or batch is not batches[-1]) for batch in batches]
        self._begin()
        if not self.working:
            # Nothing came: rest only if the read itself has not waited.
            return time.monotonic() - begun > self.settings.confirm_block_ms / 2000
        if not self._with_room(among=fresh):
            await asyncio.wait(
                self.working,
                timeout=self.settings.confirm_block_ms / 1000,
                return_when=asyncio.FIRST_COMPLETED,
            )
        self._settle()
        return True

    async def _read(self) -> dict[str, tuple[list[Entry], bool]]:
        """Claims of sales with room, about a batch of each, and whether there are more.

        Nobody knows how many claims the next entries hold: they are read some at a time, never more than READ_MAX, as
        many as hold a batch if they are like those before. So small entries make full batches when there are enough of
        them, and what full ones bring at most fits in memory and does not hold Redis up.
        """
        found: dict[str, list[Entry]] = {}
        full: dict[str, bool] = {}
        wanting, count = self._with_room(), min(self._count, self.settings.confirm_batch_max)
        block_ms = 0 if self.working else self.settings.confirm_block_ms
        while wanting:
            try:
                page = await self.streams.read(wanting, count, block_ms=block_ms)
            except (DidNotHappen, Unknown):
                if not found:
                    raise
                break  # what has been read is in hand; the next turn says so
            block_ms = 0
            for sale, entries in page.items():
                found.setdefault(sale, []).extend(entries)
                full[sale] = len(entries) >= count
            fitting = {sale: self._fitting(found[sale]) for sale in page if full[sale]}
            wanting = [sale for sale, more in fitting.items() if more]
            count = min((fitting[sale] for sale in wanting), default=0)
        if found:
            self._count = max(1, min(self._fitting(entries, empty=True) for entries in found.values()))
        return {sale: (entries, full[sale]) for sale, entries in found.items()}

    def _fitting(self, entries: Sequence[Entry], *, empty: bool = False) -> int:
        """How many more entries like these a batch (or an empty one) has room for, as far as one read brings them."""
        claims = max(1, claims_of(entries))
        room = self.settings.confirm_batch_max - (0 if empty else claims)
        return min(READ_MAX, room * len(entries) // claims) if room > 0 else 0

    def _with_room(self, among: Iterable[str] | None = None) -> list[str]:
        """Sales of which more may be read: none of theirs is in trouble or still to be begun, and their last batch was
        full, so that a second one is not made of the few claims of a quiet minute."""
        found: list[str] = []
        for sale in self.admitter.watched if among is None else among:
            mine = self._batches_of(sale)
            if not mine or (
                len(mine) < self.settings.confirm_in_flight_max
                and not any(batch.careful for batch in mine)
                and all(batch.full for batch in mine)
                and not any(batch.sale == sale for batch in self.ready)
            ):
                found.append(sale)
        return found

    def _batches_of(self, sale: str) -> list[Batch]:
        return [batch for batch in (*self.working.values(), *self.held, *self.ready) if batch.sale == sale]

    def _begin(self) -> None:
        """Begin what is ready, as far as its sale has room."""
        ready, self.ready = self.ready, []
        for batch in ready:
            under_way = sum(one.sale == batch.sale for one in (*self.working.values(), *self.held))
            if under_way < self.settings.confirm_in_flight_max:
                self._start(batch)
            else:
                self.ready.append(batch)

    def _start(self, batch: Batch) -> None:
        task = asyncio.create_task(self._confirm(batch), name=f"confirm {batch.sale}")
        self.working[task] = batch

    def _settle(self) -> None:
        """Let go of what is done; hold what failed. Raises one of the failures."""
        failure: BaseException | None = None
        for task in [task for task in self.working if task.done()]:
            batch = self.working.pop(task)
            if (error := task.exception()) is not None:
                batch.careful = True
                self.held.append(batch)
                if self.streams.is_away(batch.sale):
                    batch.pause_s = min(max(BACKOFF_S, batch.pause_s * 2), BACKOFF_MAX_S)
                    batch.not_before = time.monotonic() + batch.pause_s
                else:
                    failure = error
        if failure is not None:
            raise failure

    async def finish(self) -> None:
        """Finish what is in hand; what fails now stays pending, for another worker."""
        self._begin()
        while self.working:
            await asyncio.wait(self.working)
            for task in self.working:
                task.exception()
            self.working = {}
            self._begin()

    def drop(self) -> None:
        """Stop at once whatever has not finished."""
        for task in self.working:
            task.cancel()

    async def take_over(self) -> bool:
        """Finish what other workers left unfinished."""
        self.streams.forget_missing()
        more = False
        for sale in list(self.admitter.watched):
            if self._batches_of(sale):
                continue
            batch_max, after = self.settings.confirm_batch_max, b"0-0"
            entries: list[Entry] = []
            while claims_of(entries) < batch_max:
                page, after = await self.streams.take_over(
                    sale, self.settings.autoclaim_idle_ms, min(READ_MAX, batch_max), after
                )
                entries += page
                if after == b"0-0":
                    break
            if entries:
                _log.info("claims taken over", sale=sale, claims=claims_of(entries))
                more = True
            for batch in cut(entries, batch_max):
                await self.confirmer.confirm(sale, batch, careful=True)
        return more

    async def _confirm(self, batch: Batch) -> None:
        begun = time.monotonic()
        await self.confirmer.confirm(batch.sale, batch.entries, careful=batch.careful)
        self.wrote()
        TOOK.observe(time.monotonic() - begun)


@dataclass
class AsksLoop:
    """Feeds buyers' asks to the releaser."""

    streams: Streams
    releaser: Releaser
    admitter: Admitter
    settings: Settings

    async def turn(self) -> bool:
        sales = list(self.admitter.watched)
        fresh = await self.streams.read(sales, ASKS_MAX)
        pending = await self.streams.own_pending(sales, ASKS_MAX)
        more = False
        for sale in sales:
            # Those of before: their claims were not written yet.
            entries = {entry[0]: entry for entry in pending.get(sale, [])}
            entries |= {entry[0]: entry for entry in fresh.get(sale, [])}
            if entries:
                done = await self.releaser.answer_asks(sale, list(entries.values()))
                more = more or done == ASKS_MAX
        return more

    async def take_over(self) -> None:
        self.streams.forget_missing()  # a sale that is made anew has no streams for a moment
        for sale in list(self.admitter.watched):
            await self.streams.take_over(
                sale, self.settings.autoclaim_idle_ms, ASKS_MAX
            )  # own_pending reads them
