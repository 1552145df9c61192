"""The worker: admit, confirm, release, pay, tell, push, reconcile; loops that outlive the outages of what they need.

One TaskGroup. SIGTERM: stop taking, finish what is in hand, acknowledge it, exit; what another worker's death left
behind is taken over with XAUTOCLAIM. Admit runs without Postgres, and without a Redis nothing runs but the probes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import structlog
import uvicorn
from prometheus_client import Counter as Count
from prometheus_client import Gauge
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.alarm import alert
from app.answers import Removed
from app.buyer.contacts import remove_old
from app.errors import CannotStart, DidNotHappen, Unknown
from app.keys import GROUP, SaleKeys
from app.ledger import engine as engines
from app.ledger import events
from app.ledger.due import Kind
from app.providers import published, routes
from app.providers.registry import Providers, open_providers
from app.purchase import pay, tell
from app.purchase.admit import Admitter, Course
from app.purchase.confirm import TOOK, Confirmer, Entry, claims_of, cut
from app.purchase.degrade.advise import Advisor
from app.purchase.degrade.extend import Extender
from app.purchase.leased import first_of
from app.purchase.lookout import LOOK_EVERY_S, Lookout
from app.purchase.release import PayAsk, Releaser
from app.redis.cluster import open_link
from app.redis.link import Link
from app.repair.bills import Biller
from app.repair.reconcile import Reconciler, copy_routes
from app.scripts import Scripts
from app.settings import Settings
from app.shop import push
from app.telemetry import Metrics

BACKOFF_S = 0.1  # after the first failure of a loop; doubles
BACKOFF_MAX_S = 2.0  # a store that is back is found within this
# and within this by the loops that a sale waits for: they arm it, make it anew, serve its line, write its orders
URGENT_BACKOFF_MAX_S = 0.4
CLUSTER_READ_EVERY_S = (
    0.02  # between two looks at the streams of sales on a cluster: what a claim waits for at most
)
READ_FIRST, READ_MAX = 16, 64  # entries of claims read in one call: one may hold a claim, or hundreds
ASKS_MAX = 200  # asks of one sale that one look takes
EVENTS_EVERY_S = 0.2  # between two numbering steps: how stale the shop's feed may be
EVENTS_MAX = 2_000
COURSE_EVERY_S = 0.5  # between two looks at the clock for openings and closings
SETTLE_EVERY_S = 2.0
BILLS_EVERY_S = 30.0  # between two looks for a bill to be read
BILLS_AGAIN_EVERY_S = 3_600.0  # between two comparisons of days that differ
ROUTES_EVERY_S = 2.0  # for so long a Redis that lost them leaves suppliers to the settings
SHUT_LOOK_EVERY_S = 0.2  # between two looks for the streams of a sale that is being made anew
MEND_EVERY_S = 0.5  # between two looks for a sale without a home
CONTACTS_EVERY_S = 60.0  # between two looks for contacts that have been kept long enough
DEADLINES_EVERY_S = 1.0
OUTAGES_EVERY_S = 1.0
ADVICE_EVERY_S = 0.5
CONSUMERS_EVERY_S = 60.0  # between two looks for consumers that are gone
CONSUMER_GONE_S = 600.0  # without a read; what it held is taken over long before (autoclaim_idle_ms)
PROBES_BACKLOG = 64
FRESH = {"Cache-Control": "no-store"}
READY_WITHIN_S = 1.0  # a probe's look at Postgres
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


class Streams:
    """Reads one kind of stream of every watched sale as a consumer of the group, on a link of its own if it blocks.

    In a cluster two sales' streams may not be named in one command: each is read for itself, all in one pipeline, and
    instead of blocking it is looked again every CLUSTER_READ_EVERY_S.
    """

    def __init__(self, link: Link, consumer: str, key: Callable[[str], str]) -> None:
        self.link = link
        self.consumer = consumer
        self.key = key
        self._missing: dict[str, float] = {}  # sale -> until when it is passed over, monotonic s

    async def read(self, sales: Sequence[str], count: int, *, block_ms: int = 0) -> dict[str, list[Entry]]:
        """Entries that no consumer has had yet: sale → entries. Waits up to block_ms for the first."""
        sales = self._there(sales)
        if not sales:
            return {}
        if self.link.spread:
            return await self._read_each(sales, count, block_ms)
        names = [self.key(sale) for sale in sales]
        block = ("BLOCK", block_ms) if block_ms else ()
        try:
            found = await self.link.call(
                "XREADGROUP", "GROUP", GROUP, self.consumer, "COUNT", count, *block,
                "STREAMS", *names, *[">"] * len(names),
                deadline_s=self.link.deadline_s + block_ms / 1000,
            )  # fmt: skip
        except DidNotHappen as error:
            if str(error).startswith("NOGROUP"):
                await self._find_missing(sales)
                return {}
            raise
        by_name = dict(zip(names, sales, strict=True))
        return {by_name[name.decode()]: entries for name, entries in found or ()}

    async def _read_each(self, sales: Sequence[str], count: int, block_ms: int) -> dict[str, list[Entry]]:
        """Each sale's stream for itself. Those whose node is away are passed over, unless no node answers."""
        until = time.monotonic() + block_ms / 1000
        while True:
            answers = await self.link.pipeline(
                [
                    (
                        "XREADGROUP",
                        "GROUP",
                        GROUP,
                        self.consumer,
                        "COUNT",
                        count,
                        "STREAMS",
                        self.key(sale),
                        ">",
                    )
                    for sale in sales
                ]
            )
            found: dict[str, list[Entry]] = {}
            failed: list[Exception] = []
            for sale, answer in zip(sales, answers, strict=True):
                if isinstance(answer, Exception):
                    failed.append(answer)
                    if str(answer).startswith("NOGROUP"):
                        await self._find_missing([sale])
                elif answer:
                    found[sale] = answer[0][1]
            if len(failed) == len(sales):
                raise failed[0]
            if found or time.monotonic() >= until:
                return found
            await asyncio.sleep(CLUSTER_READ_EVERY_S)

    def _there(self, sales: Sequence[str]) -> list[str]:
        """Those whose stream was not missing at the last look."""
        now = time.monotonic()
        return [sale for sale in sales if self._missing.get(sale, 0.0) <= now]

    async def _find_missing(self, sales: Sequence[str]) -> None:
        """A stream without its group must not stop the others.

        It is made in one step with the sale. A sale that is shut is being made anew, and is looked at again in a
        moment; from one that is open somebody removed it.
        """
        for sale in sales:
            fence = ("HMGET", SaleKeys(sale).sale, "epoch", "home")
            before, groups, after = await self.link.pipeline(
                [fence, ("XINFO", "GROUPS", self.key(sale)), fence]
            )
            if isinstance(groups, Exception) and "no such key" not in str(groups):
                raise groups
            if groups and not isinstance(groups, Exception):
                continue
            is_open = not isinstance(before, Exception) and before == after and before[1]
            self._missing[sale] = math.inf if is_open else time.monotonic() + SHUT_LOOK_EVERY_S
            if is_open:
                alert("stream_missing", "a stream of a published sale has no consumer group", sale=sale)

    async def own_pending(self, sales: Sequence[str], count: int) -> dict[str, list[Entry]]:
        """Entries of each sale that this consumer has had and not given up. One round trip for all sales."""
        sales = self._there(sales)
        answers = await self.link.pipeline(
            [
                ("XREADGROUP", "GROUP", GROUP, self.consumer, "COUNT", count, "STREAMS", self.key(sale), "0")
                for sale in sales
            ]
        )
        pending: dict[str, list[Entry]] = {}
        failed: list[Exception] = []
        for sale, found in zip(sales, answers, strict=True):
            if isinstance(found, Exception):
                failed.append(found)
                continue
            pending[sale] = [entry for _, entries in found or () for entry in entries if entry[1] is not None]
        if failed and not pending:
            raise failed[0]  # of several nodes those that answer are served
        return pending

    async def take_over(
        self, sale: str, idle_ms: int, count: int, after: bytes = b"0-0"
    ) -> tuple[list[Entry], bytes]:
        """Entries that some consumer has had for longer than idle_ms: it died, or stalls. And behind which one to go
        on; 0-0: there were no more."""
        reply = await self.link.call(
            "XAUTOCLAIM", self.key(sale), GROUP, self.consumer, idle_ms, after, "COUNT", count
        )
        return [entry for entry in reply[1] if entry is not None and entry[1] is not None], reply[0]

    def is_away(self, sale: str) -> bool:
        """Whether the node of a cluster that holds this sale cannot be reached, while another can."""
        return self.link.connected and not self.link.at(self.key(sale)).connected

    def forget_missing(self) -> None:
        self._missing.clear()


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


class Worker:
    """All loops of one worker process, and what they share."""

    def __init__(self, settings: Settings, *, providers: Providers | None = None) -> None:
        self.settings = settings
        self.consumer = settings.worker_name or f"{socket.gethostname()}:{os.getpid()}"
        self.stopping = asyncio.Event()
        self.health = Health()
        self.engine: AsyncEngine = engines.create_engine(settings, name="fairdrop worker")
        # A connection of its own: it waits for no other, and Postgres plans for it what it would for nobody else.
        self.watch = engines.create_engine(
            settings, name="fairdrop lookout", pool=1, planner=engines.INDEXES_ONLY
        )
        self.lookout = Lookout(self.watch, min(LOOK_EVERY_S, settings.relay_every_ms / 1000))
        self.link = open_link(settings.redis_url, deadline_s=settings.redis_deadline_s, name="worker")
        self.reading = open_link(settings.redis_url, deadline_s=settings.redis_deadline_s, name="worker-read")
        self.scripts = Scripts(self.link)
        self.providers = providers or open_providers(settings)
        self.admitter = Admitter(self.link, self.scripts, settings)
        come = self.lookout.bell("course")
        self.course = Course(self.engine, self.link, self.scripts, self.admitter, come)
        self.confirmer = Confirmer(self.engine, self.link, self.scripts, settings, self.providers.payment_now)
        self.confirming = ConfirmLoop(
            Streams(self.reading, self.consumer, lambda sale: SaleKeys(sale).orders),
            self.confirmer,
            self.admitter,
            settings,
            wrote=self.lookout.wrote,
        )
        self.releaser = Releaser(
            self.engine,
            self.link,
            self.scripts,
            settings,
            self._clear,
            self._start_attempt,
            partial(self.lookout.wrote, "outbox"),
        )
        self.asking = AsksLoop(
            Streams(self.link, self.consumer, lambda sale: SaleKeys(sale).asks),
            self.releaser,
            self.admitter,
            settings,
        )
        seen_out, attempts = self.lookout.bell("outage"), self.lookout.bell("attempts")
        self.extender = Extender(self.engine, self.providers, settings, seen_out)
        self.advisor = Advisor(
            self.engine, self.link, self.scripts, self.providers, self.admitter, settings, attempts
        )
        self.biller = Biller(self.engine, self.providers, settings)
        self.reconciler = Reconciler(self.engine, self.link, self.scripts, self.admitter, settings)

    async def _clear(self, order_no: str) -> Any:
        return await pay.clear_attempts(self.engine, self.providers, order_no)

    async def _start_attempt(self, conn: AsyncConnection, order_no: str, ask: PayAsk) -> bool:
        return await pay.start_attempt(
            conn,
            order_no,
            channel=ask.channel,
            return_url=ask.return_url,
            payer=ask.payer,
            address=ask.address,
            providers=self.providers,
        )

    async def number_events(self) -> bool:
        async with engines.alone(self.engine) as conn:
            if not await events.is_behind(conn):
                return False
        async with self.engine.begin() as conn:
            return await events.number(conn, EVENTS_MAX) == EVENTS_MAX

    async def remove_consumers(self) -> None:
        """Forget workers that came and went: each was a consumer of every stream, by a name of its own."""
        for sale in list(self.admitter.watched):
            keys = SaleKeys(sale)
            for stream in (keys.orders, keys.asks):
                found = await self.scripts.consumers_remove(
                    stream=stream, idle_ms=round(CONSUMER_GONE_S * 1000)
                )
                if isinstance(found, Removed) and found.count:
                    _log.info("consumers removed", sale=sale, stream=stream, consumers=found.count)

    async def _confirm_to_the_end(self) -> None:
        try:
            await keep_going(
                "confirm", self.confirming.turn, 0.05, self.stopping, self.health,
                backoff_max_s=URGENT_BACKOFF_MAX_S,
            )  # fmt: skip
            await self.confirming.finish()
        finally:
            self.confirming.drop()

    async def run(self) -> None:
        """Work until `stopping` is set; return when what was in hand is done."""
        s = self.settings
        await self.link.start()
        await self.reading.start()
        idle_s = s.autoclaim_idle_ms / 2000
        relay_s = s.relay_every_ms / 1000
        expire_s = s.expire_every_ms / 1000
        try:
            async with (
                httpx.AsyncClient(follow_redirects=False, trust_env=False) as client,
                asyncio.TaskGroup() as group,
            ):

                def loop(
                    name: str,
                    turn: Turn,
                    every_s: float,
                    wake: asyncio.Event | None = None,
                    due: Kind | None = None,
                    backoff_max_s: float = BACKOFF_MAX_S,
                ) -> None:
                    bell = None if due is None else self.lookout.bell(due)
                    group.create_task(
                        keep_going(
                            name, turn, every_s, self.stopping, self.health,
                            wake=wake, bell=bell, backoff_max_s=backoff_max_s,
                        ),
                        name=name,
                    )  # fmt: skip

                urgent = partial(loop, backoff_max_s=URGENT_BACKOFF_MAX_S)

                urgent("lookout", self.lookout.turn, 0.0)
                urgent("admit", self.admitter.turn, s.admit_every_ms / 1000)
                loop("beacon", once(lambda: self.admitter.put_beacons(client)), 1.0)
                loop("beacon-note", lambda: self.admitter.note_beacons(self.engine), 1.0)
                loop("course", self.course.note, COURSE_EVERY_S)
                group.create_task(self._confirm_to_the_end(), name="confirm")
                loop("confirm-take-over", self.confirming.take_over, idle_s)
                loop("consumers", self.remove_consumers, CONSUMERS_EVERY_S)
                loop("asks", self.asking.turn, relay_s)
                loop("asks-take-over", self.asking.take_over, idle_s)
                loop("deadlines", self.releaser.start_deadlines, DEADLINES_EVERY_S, due="linkless")
                loop("advise", self.advisor.turn, ADVICE_EVERY_S)
                loop("extend", self.extender.turn, OUTAGES_EVERY_S)
                loop("expire", self.releaser.expire, expire_s, due="unpaid")
                loop("let-go", self.releaser.let_go, relay_s, due="leaving")
                loop("relay", self.releaser.relay, 0.0, due="outbox")
                loop("events", self.number_events, EVENTS_EVERY_S, due="events")
                urgent("pulse", once(self.reconciler.pulse), s.pulse_every_s)
                loop("routes-copy", once(partial(copy_routes, self.engine, self.link)), ROUTES_EVERY_S)
                urgent("rebuild", once(self.reconciler.mend), MEND_EVERY_S, self.reconciler.elected)
                loop("reconcile", once(self.reconciler.compare_all), s.reconcile_every_s)
                loop("bills", self.biller.turn, BILLS_EVERY_S)
                loop("bills-again", self.biller.again, BILLS_AGAIN_EVERY_S)
                loop("settle", self.reconciler.settle, SETTLE_EVERY_S)
                loop("contacts", lambda: remove_old(self.engine, s.settled_keep_days), CONTACTS_EVERY_S)
                ours = self.engine, self.scripts, self.providers, s, self.stopping, self.lookout
                for name, work in (
                    ("pay", lambda: pay.run(*ours)),
                    ("tell", lambda: tell.run(*ours)),
                    ("push", lambda: push.run(self.engine, s, self.stopping, self.lookout)),
                    ("providers", lambda: published.run(self.link, self.providers, s, self.stopping)),
                    ("routes", lambda: routes.run(self.link, self.providers.routes, self.stopping)),
                ):
                    loop(name, work, 0.1)
                await self.stopping.wait()
        finally:
            await self.link.close()
            await self.reading.close()
            await self.providers.aclose()
            await self.engine.dispose()
            await self.watch.dispose()


# Probes


def create_app(worker: Worker) -> Starlette:
    """/healthz, /readyz and /metrics of a worker."""
    metrics = Metrics(worker.settings)

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"}, headers=FRESH)

    async def readyz(_: Request) -> Response:
        reasons = [f"{loop}: {why}" for loop, why in worker.health.troubles.items()]
        if not worker.link.connected:
            reasons.append(f"redis: {worker.link.trouble or 'not connected'}")
        durable = ""
        try:
            async with asyncio.timeout(READY_WITHIN_S), worker.engine.connect() as conn:
                durable = await engines.durability(conn)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
            reasons.append(f"postgres: {type(error).__name__}: {error}".splitlines()[0][:200])
        if worker.stopping.is_set():
            return _problem(503, "draining", "This process is about to stop.", reasons=["draining", *reasons])
        if reasons:
            return _problem(503, "busy", "A store does not answer, or a loop fails.", reasons=reasons)
        told = {"status": "ready", "reasons": [], "redis": worker.link.where, "durability": durable}
        return JSONResponse(told, headers=FRESH)

    async def show_metrics(request: Request) -> Response:
        if not metrics.allows(request.client.host if request.client else None):
            return _problem(403, "forbidden", "This caller may not do this.")
        return Response(metrics.text(), media_type=metrics.content_type)

    async def not_here(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = "not_found" if error.status_code == 404 else "method_not_allowed"
        return _problem(error.status_code, code, str(error.detail), headers=error.headers)

    return Starlette(
        routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", show_metrics)],
        exception_handlers={HTTPException: not_here},
    )


def _problem(
    status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: object
) -> Response:
    """A problem document as app.problems makes them; that module brings FastAPI, a third of a second of a restart."""
    document = {
        "type": f"urn:fairdrop:problem:{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": os.urandom(8).hex(),
        "errors": [],
        **more,
    }
    told = {**FRESH, **(headers or {}), **({"Retry-After": "1"} if status == 503 else {})}
    return JSONResponse(document, status, told, media_type="application/problem+json")


async def run(settings: Settings) -> None:
    """The process: probes and loops until SIGTERM or Ctrl-C. CannotStart: its port is taken, or a setting is wrong."""
    worker = Worker(settings)
    wire = _listen(settings.worker_host, settings.worker_port)
    if path := os.environ.get("FAIRDROP_PORT_FILE"):
        draft = Path(f"{path}.draft")
        draft.write_text(f"{wire.getsockname()[1]}\n", encoding="ascii")
        draft.replace(path)
    config = uvicorn.Config(
        create_app(worker), log_config=None, access_log=False, server_header=False, lifespan="off", ws="none"
    )
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, worker.stopping.set)
    try:
        async with asyncio.TaskGroup() as group:
            async with _probes(config, wire, group):
                await worker.run()
    finally:
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(sign)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=PROBES_BACKLOG)
    except OSError as error:
        raise CannotStart(
            f"worker: cannot listen on {host}:{port}: {error.strerror or error}; choose another port with --port"
        ) from error


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the worker has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def _probes(
    config: uvicorn.Config, wire: socket.socket, group: asyncio.TaskGroup
) -> AsyncIterator[None]:
    server = _Server(config)
    serving = group.create_task(server.serve(sockets=[wire]), name="probes")
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait([serving], timeout=5)
