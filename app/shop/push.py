"""Pushes the feed's events to the addresses that the shop named: at least once, in no order, tried again for 72 h.

    feed (ledger/events) ──spread──► deliveries ──lease──► one signed POST ──► delivered on 2xx, else later again

Not a step of the purchase (no order waits for the shop), hence beside `app/purchase/`. Each address has a breaker of
its own: one that is down costs a probe now and then, and no other address a place.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Sequence
from typing import Any, assert_never

import msgspec
import structlog
from prometheus_client import Counter, Gauge, Histogram
from sqlalchemy.ext.asyncio import AsyncEngine

from app.alarm import alert
from app.breaker import Breaker, Event, Permit, Result, Rules, State
from app.ledger import deliveries, journal
from app.ledger.deliveries import Target
from app.ledger.engine import alone
from app.purchase.told import instant
from app.sealing import CannotOpen, SealingKey, sealing_keys, unseal, webhook_aad
from app.settings import Settings
from app.shop.signature import headers
from app.shop.wire import Address, Answered, NotAnswered, Outcome, Refused
from app.work.leased import again_and_again, work_off
from app.work.lookout import Lookout

Row = dict[str, Any]
log = structlog.get_logger()

SPREAD_EVERY_S = 0.2  # as often as events are numbered
SPREAD_MAX = 1_000  # events of one endpoint in one transaction
SWEEP_EVERY_S = 5.0
SWEEP_MAX = 5_000  # old records forgotten in one transaction
JITTER = 0.2  # ± share of every wait, so that an address that is back is not run down
GONE = 410
BUSY = (429, 503)  # their Retry-After is kept to
USER_AGENT = "fairdrop-webhooks/1"

PUSHED = Counter("fairdrop_webhooks", "Tries to push an event to the shop, by outcome", ["outcome"])
WAITING = Gauge("fairdrop_webhooks_waiting", "Deliveries that are due, now or later")
TOOK = Histogram("fairdrop_webhook_seconds", "One try, from the look-up of the name to the answer")


def rules(settings: Settings) -> Rules:
    """Of one address. Slow is no reason to stop: nobody waits, and places are counted for each address."""
    deadline_ms = round(settings.webhook_deadline_s * 1000)
    return Rules(
        calls_min=5,
        slow_ms=deadline_ms,
        slow_rate=100.0,
        window_ms=30_000,
        open_ms=1_000,
        open_max_ms=60_000,
        probes_max=2,
        lease_ms=deadline_ms + 10_000,
    )


class Way:
    """The way to one address: its connections, its breaker, and how many deliveries are on it."""

    def __init__(self, url: str, settings: Settings, tls: ssl.SSLContext | bool) -> None:
        self.address = Address(url, settings, tls)
        self.running = 0
        self._limit = settings.webhook_url_concurrency
        self.breaker = Breaker("webhook", rules(settings), on_event=_note)

    def room(self) -> int:
        """How many deliveries may begin now."""
        state = self.breaker.state
        if state is State.OPEN and self.breaker.retry_in_ms() > 0:
            return 0
        limit = self._limit if state is State.CLOSED else self.breaker.rules.probes_max
        return max(0, limit - self.running)


def _note(event: Event) -> None:
    log.info("webhook_breaker", before=event.before, after=event.after, why=event.why, error=event.last_error)


class Pusher:
    """What one worker knows of the shop's addresses."""

    def __init__(self, engine: AsyncEngine, settings: Settings, tls: ssl.SSLContext | bool = True) -> None:
        self.engine = engine
        self.settings = settings
        self.keys: Sequence[SealingKey] = sealing_keys(settings.pii_keys.get_secret_value())
        self.ways: dict[str, Way] = {}
        self._tls = tls

    async def spread(self) -> bool:
        """Events that are new get their deliveries. Whether there are more."""
        async with alone(self.engine) as conn:
            if not await deliveries.is_behind(conn):
                return False
        async with self.engine.begin() as conn:
            _, more = await deliveries.spread(conn, SPREAD_MAX, self.settings.webhook_retry_for_s)
        return more

    async def lease(self, count: int) -> list[Row]:
        """Due deliveries, for addresses that have room."""
        async with alone(self.engine) as conn:
            targets = await deliveries.targets(conn)
            await self._forget_others({target.url for target in targets})
            random.shuffle(targets)  # endpoints with one address share its room: none is always the last
            room: dict[str, int] = {}
            left: dict[str, int] = {}
            for target in targets:
                if target.url not in self.ways:
                    self.ways[target.url] = Way(target.url, self.settings, self._tls)
                free = left.setdefault(target.url, self.ways[target.url].room())
                if free:
                    room[target.id] = free
                    left[target.url] = 0
            if not room:
                return []
            lease_s = max(self.settings.lease_s, self.settings.webhook_deadline_s + 5)
            rows = await deliveries.lease_due(conn, room, count, lease_s)
        by_id = {target.id: target for target in targets}
        for row in rows:
            row["target"] = by_id[row["endpoint"]]
            self.ways[row["target"].url].running += 1
        return rows

    async def push(self, row: Row) -> None:
        """One try of one leased delivery, and what became of it."""
        target: Target = row["target"]
        way = self.ways[target.url]
        try:
            permit = way.breaker.take()
            if not isinstance(permit, Permit):
                wait_s = permit.retry_in_ms / 1000
                await self._again(
                    row, wait_s * random.uniform(1, 1 + JITTER), "breaker_open", None, tried=False
                )
                return
            secrets = self._open(target)
            if not secrets:
                way.breaker.settle(permit, Result.IGNORED)
                await self._again(row, self._wait_s(row["tries"]), "secret_cannot_be_opened", None)
                return
            result, error = Result.IGNORED, None
            try:
                body = document(row)
                begun = time.monotonic()
                outcome = await way.address.post(
                    body,
                    {
                        "Content-Type": "application/json",
                        "User-Agent": USER_AGENT,
                        **headers(secrets, row["id"], int(time.time()), body),
                    },
                )
                TOOK.observe(time.monotonic() - begun)
                result, error = verdict(outcome)
            finally:
                way.breaker.settle(permit, result, error)
            await self._settle(row, outcome)
        finally:
            way.running -= 1

    async def _settle(self, row: Row, outcome: Outcome) -> None:
        match outcome:
            case Answered(status, _) if 200 <= status < 300:
                async with self.engine.begin() as conn:
                    await deliveries.deliver(conn, row, status)
                PUSHED.labels("delivered").inc()
            case Answered(status, _) if status == GONE:
                await self._disable(row)
                PUSHED.labels("gone").inc()
            case Answered(status, retry_after_s):
                wait_s = self._wait_s(row["tries"])
                if status in BUSY and retry_after_s is not None:
                    wait_s = min(max(wait_s, retry_after_s), self.settings.webhook_retry_max_s)
                await self._again(row, wait_s, f"status_{status}", status)
            case NotAnswered(code) | Refused(code):
                await self._again(row, self._wait_s(row["tries"]), code, None)
            case _:
                assert_never(outcome)

    def _wait_s(self, tries: int) -> float:
        """Growing and spread."""
        s = self.settings
        grown = min(s.webhook_retry_max_s, s.webhook_retry_first_s * 2.0 ** min(max(tries - 1, 0), 30))
        return grown * random.uniform(1 - JITTER, 1 + JITTER)

    async def _again(
        self, row: Row, wait_s: float, code: str, status: int | None, *, tried: bool = True
    ) -> None:
        async with self.engine.begin() as conn:
            await deliveries.again(conn, row, wait_s, code, status, tried=tried)
        PUSHED.labels("again" if tried else "stopped").inc()
        if tried:
            log.info(
                "webhook_not_taken", endpoint=row["endpoint"], event_id=row["id"], code=code, tries=row["tries"],
                again_in_s=round(wait_s, 1),
            )  # fmt: skip

    async def _disable(self, row: Row) -> None:
        """The shop says 410 Gone: it wants no more."""
        endpoint = row["endpoint"]
        async with self.engine.begin() as conn:
            if not await deliveries.disable(conn, endpoint, "gone"):
                return
            await journal.append(
                conn,
                actor="worker",
                role="worker",
                action="webhook.disable",
                sale=None,
                reason="the address answered 410 Gone",
                detail={"id": endpoint, "url": row["target"].url},
            )
        alert(
            "webhook_disabled",
            "an endpoint of the shop answered 410 Gone and is told no more",
            endpoint=endpoint,
        )

    async def sweep(self) -> None:
        """Give up what nobody took in time, forget what ended long ago, count what waits."""
        async with self.engine.begin() as conn:
            failed, _ = await deliveries.sweep(conn, self.settings.webhook_keep_s, SWEEP_MAX)
            WAITING.set(await deliveries.waiting(conn))
        if failed:
            PUSHED.labels("given_up").inc(failed)
            alert("webhooks_given_up", "events were not taken by the shop; replay them", deliveries=failed)

    def _open(self, target: Target) -> list[bytes]:
        """The secrets that sign; one that no key opens is left out."""
        secrets = []
        for sealed in target.secrets:
            try:
                secrets.append(unseal(self.keys, sealed, webhook_aad(target.id)))
            except CannotOpen as error:
                log.error("webhook_secret_cannot_be_opened", endpoint=target.id, error=str(error))
        return secrets

    async def _forget_others(self, urls: set[str]) -> None:
        for url in [url for url, way in self.ways.items() if url not in urls and not way.running]:
            await self.ways.pop(url).address.aclose()

    async def aclose(self) -> None:
        for way in self.ways.values():
            await way.address.aclose()


def document(row: Row) -> bytes:
    """The body: one event exactly as the feed shows it."""
    return msgspec.json.encode(
        {
            "id": row["id"],
            "type": row["type"],
            "at": instant(row["at"]),
            "version": row["version"],
            "data": row["data"],
        }
    )


def verdict(outcome: Outcome) -> tuple[Result, str | None]:
    """What a try says about the address."""
    match outcome:
        case Answered(status, _) if 200 <= status < 300 or status == GONE:
            return Result.SUCCESS, None
        case Answered(status, _):
            return Result.FAILURE, f"status {status}"
        case NotAnswered(code):
            return Result.FAILURE, code
        case Refused():
            return Result.IGNORED, None
        case _:
            assert_never(outcome)


async def run(
    engine: AsyncEngine,
    settings: Settings,
    stopping: asyncio.Event,
    lookout: Lookout,
    *,
    tls: ssl.SSLContext | bool = True,
) -> None:
    """Push until `stopping` is set; what has begun is finished."""
    pusher = Pusher(engine, settings, tls)
    try:
        async with asyncio.TaskGroup() as group:
            spread = lookout.bell("spread")
            group.create_task(again_and_again("spread", pusher.spread, SPREAD_EVERY_S, stopping, spread))
            group.create_task(again_and_again("sweep deliveries", pusher.sweep, SWEEP_EVERY_S, stopping))
            group.create_task(
                work_off(
                    "push",
                    pusher.lease,
                    pusher.push,
                    lambda running: settings.webhook_concurrency - running,
                    stopping,
                    lookout,
                    lookout.bell("deliveries"),
                )
            )
    finally:
        await pusher.aclose()
