"""The worker: admit, confirm, release, pay, tell, push, reconcile; loops that outlive the outages of what they need.

One TaskGroup. SIGTERM: stop taking, finish what is in hand, acknowledge it, exit; what another worker's death left
behind is taken over with XAUTOCLAIM. Admit runs without Postgres, and without a Redis nothing runs but the probes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from functools import partial
from typing import Any

import httpx
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from starlette.applications import Starlette

from app.answers import Removed
from app.buyer.contacts import remove_old
from app.keys import SaleKeys
from app.ledger import engine as engines
from app.ledger import events
from app.ledger.due import Kind
from app.providers import published, routes
from app.providers.registry import Providers, open_providers
from app.purchase import pay, tell
from app.purchase.admit import Admitter, Course
from app.purchase.confirm import Confirmer
from app.purchase.degrade.advise import Advisor
from app.purchase.degrade.extend import Extender
from app.purchase.feed import AsksLoop, ConfirmLoop
from app.purchase.release import PayAsk, Releaser
from app.redis.cluster import open_link
from app.repair.audit import Auditor
from app.repair.bills import Biller
from app.repair.reconcile import Reconciler, copy_routes
from app.scripts import Scripts
from app.settings import Settings
from app.shop import push
from app.work import probes
from app.work.lookout import LOOK_EVERY_S, Lookout
from app.work.loops import BACKOFF_MAX_S, Health, Turn, keep_going, once
from app.work.streams import Streams

# A store that is back is found within this by the loops that a sale waits for: they arm it, make it anew, serve its
# line, write its orders.
URGENT_BACKOFF_MAX_S = 0.4
EVENTS_EVERY_S = 0.2  # between two numbering steps: how stale the shop's feed may be
EVENTS_MAX = 2_000
COURSE_EVERY_S = 0.5  # between two looks at the clock for openings and closings
SETTLE_EVERY_S = 2.0
BILLS_EVERY_S = 30.0  # between two looks for a bill to be read
BILLS_AGAIN_EVERY_S = 3_600.0  # between two comparisons of days that differ
ROUTES_EVERY_S = 2.0  # for so long a Redis that lost them leaves suppliers to the settings
MEND_EVERY_S = 0.5  # between two looks for a sale without a home
CONTACTS_EVERY_S = 60.0  # between two looks for contacts that have been kept long enough
DEADLINES_EVERY_S = 1.0
OUTAGES_EVERY_S = 1.0
ADVICE_EVERY_S = 0.5
CONSUMERS_EVERY_S = 60.0  # between two looks for consumers that are gone
CONSUMER_GONE_S = 600.0  # without a read; what it held is taken over long before (autoclaim_idle_ms)
_log = structlog.get_logger("worker")


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
        # Those of confirm: all its batches may wait for one item, and payments still find a connection.
        self.writing = engines.create_engine(
            settings, name="fairdrop confirm", pool=settings.confirm_in_flight_max + 1
        )
        self.lookout = Lookout(self.watch, min(LOOK_EVERY_S, settings.relay_every_ms / 1000))
        self.link = open_link(settings.redis_url, deadline_s=settings.redis_deadline_s, name="worker")
        self.reading = open_link(settings.redis_url, deadline_s=settings.redis_deadline_s, name="worker-read")
        self.scripts = Scripts(self.link)
        self.providers = providers or open_providers(settings)
        self.admitter = Admitter(self.link, self.scripts, settings)
        come = self.lookout.bell("course")
        self.course = Course(self.engine, self.link, self.scripts, self.admitter, come)
        self.confirmer = Confirmer(
            self.writing, self.link, self.scripts, settings, self.providers.payment_now
        )
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
        self.auditor = Auditor(self.engine, self.link, lambda: self.admitter.watched)

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

    def probes(self) -> Starlette:
        return probes.create_app(self.settings, self.link, self.engine, self.health, self.stopping)

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
                loop("audit", once(self.auditor.turn), s.audit_every_s)
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
            await self.writing.dispose()
            await self.watch.dispose()


async def run(settings: Settings) -> None:
    """The process: probes and loops until SIGTERM or Ctrl-C. CannotStart: its port is taken, or a setting is wrong."""
    worker = Worker(settings)
    wire = probes.listen(settings.worker_host, settings.worker_port)
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, worker.stopping.set)
    try:
        async with asyncio.TaskGroup() as group:
            async with probes.answered(worker.probes(), wire, group):
                await worker.run()
    finally:
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(sign)
