"""Goal 6: confirm, one function of the worker, against raw binary COPY into the same table, on durable stores.

Measures, interleaved round by round, each batch one transaction with synchronous_commit=on:
    copy       asyncpg's binary COPY of the batch into purchase_order and nothing else, one after the other: the limit
    postgres   confirm's transaction: orders, the row that tells the shop, the item's counter (no SMS: no contacts)
    alone      the whole step, one batch after the other: contacts, transaction, winners told, entries off the stream
    confirm    the same as a worker does it: confirm_in_flight_max batches under way at once
    again      the same with some per cent of the entries delivered before
    number     afterwards: the shop's events unpacked and numbered, which a loop of its own does
After each round the books are compared: as many orders as claims, and the counter of the item says the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.answers import Claimed, Joined
from app.embedded import Postgres, Valkey, make_folder
from app.keys import GROUP, SaleKeys
from app.ledger import events, migrate
from app.ledger.engine import create_engine
from app.ledger.orders import order_no
from app.purchase.confirm import Confirmer, parse
from app.redis.link import Link
from app.scripts import Scripts
from app.settings import Settings
from app.work.streams import Entry
from loadtest.bench.machine import cpu_by_role
from loadtest.bench.results import Found, Plan, Sheet, at_least, spread
from loadtest.bench.rounds import Void

SALE, SKU = "bench", "A"
UNITS = 10_000_000


class Bench:
    def __init__(self, engine: AsyncEngine, link: Link, settings: Settings, stores: tuple[int, int]) -> None:
        self.engine = engine
        self.link = link
        self.settings = settings
        self.database_url = settings.database_url
        self.scripts = Scripts(link)
        self.confirmer = Confirmer(engine, link, self.scripts, settings)
        self.keys = SaleKeys(SALE)
        self.buyers = 0
        postgres_pid, redis_pid = stores
        self._pids = {"worker": [os.getpid()], "redis": [redis_pid], "postgres": [postgres_pid]}
        self._cpu: dict[str, float] = {}
        self._at = 0.0
        self.spent: dict[str, float] = {}  # s of CPU of the last measure, by process

    def begin(self) -> None:
        """The work is ready: from here on time and CPU count."""
        self._cpu = cpu_by_role(self._pids)
        self._at = time.perf_counter()

    def end(self) -> float:
        """The work is done; returns its seconds."""
        took = time.perf_counter() - self._at
        self.spent = {role: cpu - self._cpu[role] for role, cpu in cpu_by_role(self._pids).items()}
        return took

    async def wrong(self, count: int, name: str) -> str | None:
        """What the books say against a round of so many orders; None: nothing lost, nothing doubled."""
        async with self.engine.begin() as conn:
            orders = (await conn.execute(text("SELECT count(*) FROM purchase_order"))).scalar_one()
            reserved = (await conn.execute(text("SELECT reserved FROM item"))).scalar_one()
        left = await self.link.call("XLEN", self.keys.orders)
        if orders != count or left or (name != "copy" and reserved != count):
            return f"{count} claims, {orders} orders, {reserved} reserved, {left} left in the stream"
        return None

    async def publish(self) -> None:
        now = int(time.time() * 1000)
        async with self.engine.begin() as conn:
            await conn.execute(
                text(
                    "INSERT INTO sale (id, title, state, line_opens_at, opens_at, closes_at, draw_freeze_s,"
                    " beacon_wait_s, pay_within_s, limit_per_buyer, standby, line_max, pass_mode, challenge, channels,"
                    " return_urls) VALUES ('bench', 'bench', 'open', now() - interval '2 s', now() - interval '1 s',"
                    " now() + interval '1 day', 0, 0, 600, 1, FALSE, 1000, 'optional', 'none', '[]', '[]')"
                )
            )
            await conn.execute(
                text(
                    "INSERT INTO item (sale, sku, position, title, price_minor, currency, total)"
                    " VALUES ('bench', 'A', 0, 'bench', 1000, 'EUR', 10000000)"
                )
            )
        await self.scripts.sale_publish(
            sale=SALE,
            fields={
                "epoch": 1, "version": 1, "line_opens_ms": now - 2000, "opens_ms": now - 1000,
                "closes_ms": now + 86_400_000, "freeze_ms": now - 1000, "beacon_source": "none", "beacon_wait_ms": 0,
                "rate_milli": -1, "burst": 100, "limit": 1, "line_max": 1000, "standby": 0, "seed": bytes(32).hex(),
                "items": SKU, "doc": "{}",
            },
            items=[(SKU, UNITS)],
            seed_hash=hashlib.sha256(bytes(32)).hexdigest(),
        )  # fmt: skip

    async def claims(self, count: int) -> list[Entry]:
        """Claims that the script itself made, read by a consumer."""
        for first in range(0, count, 500):
            names = [b"buyer-%d" % (self.buyers + n) for n in range(min(500, count - first))]
            self.buyers += len(names)
            answer = await self.scripts.line_join(
                sale=SALE, epoch=1, sku=SKU, skus=[SKU],
                buyers=[(name, 1, False, name[-10:].rjust(10)) for name in names],
                backlog_max=10**9,
            )  # fmt: skip
            assert isinstance(answer, Joined)
            assert all(isinstance(one, Claimed) for one in answer.answers)
        found = await self.link.call(
            "XREADGROUP", "GROUP", GROUP, "bench", "COUNT", count, "STREAMS", self.keys.orders, ">"
        )
        entries: list[Entry] = found[0][1]
        return entries

    async def empty(self) -> None:
        async with self.engine.begin() as conn:
            await conn.execute(
                text(
                    "TRUNCATE purchase_order, order_line, event, sms, payment_attempt, outbox, event_batch CASCADE"
                )
            )
            await conn.execute(text("UPDATE item SET reserved = 0"))

    async def copy(self, batches: int, size: int) -> float:
        work: list[list[tuple[object, ...]]] = []
        at = datetime.now(UTC)
        for _ in range(batches):
            names = [f"buyer-{self.buyers + n}" for n in range(size)]
            work.append([
                (order_no(SALE, 1, SKU, self.buyers + n, name), SALE, SKU, name, 1, self.buyers + n, 1, 1000, "EUR",
                 "reserved", at, 600)
                for n, name in enumerate(names, 1)
            ])  # fmt: skip
            self.buyers += size
        # asyncpg by itself: the limit must not move when our own way of writing does
        connection = await asyncpg.connect(self.database_url)
        try:
            self.begin()
            for batch in work:
                async with connection.transaction():
                    await connection.copy_records_to_table("purchase_order", records=batch, columns=COLUMNS)
            return self.end()
        finally:
            await connection.close()

    async def postgres(self, batches: int, size: int) -> float:
        work = [parse(SALE, await self.claims(size))[0] for _ in range(batches)]
        self.begin()
        for batch in work:
            await self.confirmer._write(SALE, batch, {}, careful=False)
        took = self.end()
        for batch in work:  # nothing may stay pending: it would keep the stream from being trimmed
            await self.confirmer._acknowledge(SALE, Counter(claim.entry_id for claim in batch))
        return took

    async def alone(self, batches: int, size: int) -> float:
        return await self._confirm([await self.claims(size) for _ in range(batches)], 1)

    async def confirm(self, batches: int, size: int) -> float:
        work = [await self.claims(size) for _ in range(batches)]
        return await self._confirm(work, self.settings.confirm_in_flight_max)

    async def again(self, batches: int, size: int) -> float:
        """Batches taken over from a worker that died, REDELIVERED per cent of each confirmed before that."""
        old = size * REDELIVERED // 100
        before = [await self.claims(old) for _ in range(batches)]
        for batch in before:
            await self.confirmer.confirm(SALE, batch)
        work = [repeated + await self.claims(size - old) for repeated in before]
        return await self._confirm(work, self.settings.confirm_in_flight_max, careful=True)

    async def _confirm(self, work: list[list[Entry]], at_once: int, *, careful: bool = False) -> float:
        batches = iter(work)

        async def confirm() -> None:
            for batch in batches:
                await self.confirmer.confirm(SALE, batch, careful=careful)

        self.begin()
        await asyncio.gather(*(confirm() for _ in range(at_once)))
        return self.end()

    async def number(self, batches: int, size: int) -> float:
        await self.confirm(batches, size)
        self.begin()
        for _ in range(batches * size // EVENTS_MAX + 1):
            async with self.engine.begin() as conn:
                await events.number(conn, EVENTS_MAX)
        return self.end()


BATCH = 1_000
BATCHES = 20  # a round: what is filling and draining at its ends is a twentieth, not a tenth
EVENTS_MAX = 2_000  # as the worker's loop takes them
COLUMNS = (
    "order_no", "sale", "sku", "buyer_id", "epoch", "seq", "units", "amount_minor", "currency", "state", "claimed_at",
    "pay_within_s",
)  # fmt: skip
REDELIVERED = 10  # per cent of a batch
OF_COPY, AGAIN_OF_COPY = 80.0, 60.0
NAMES = {
    "copy": "copy: raw binary COPY into `purchase_order`, nothing else",
    "postgres": "postgres: the transaction alone",
    "alone": "alone: the whole step, one batch after the other",
    "confirm": "confirm: the same as a worker does it, several batches at once",
    "again": f"again: {REDELIVERED} % were delivered before",
    "number": "number: the events of as many orders, unpacked and numbered",
}


@dataclass
class Taken:
    """Rounds of one measure: orders a second, and CPU µs for an order of this process, Redis and Postgres."""

    per_s: list[float] = field(default_factory=list)
    cpu_us: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


async def section(folder: Path, plan: Plan, batches: int = BATCHES) -> Found:
    """Durable stores of its own, started and stopped here."""
    home = folder / "confirm"
    make_folder(home)
    valkey, postgres = Valkey(home / "valkey", "bench"), Postgres(home / "postgres", "bench")
    try:
        await asyncio.to_thread(valkey.start)
        await asyncio.to_thread(postgres.start)
        await asyncio.to_thread(migrate.upgrade, postgres.url)
        taken, void = await _rounds(valkey, postgres, plan, batches)
    finally:
        valkey.stop()
        postgres.stop()
    return report(taken, void, batches)


async def _rounds(
    valkey: Valkey, postgres: Postgres, plan: Plan, batches: int
) -> tuple[dict[str, Taken], str | None]:
    settings = Settings(env="development", redis_url=valkey.url, database_url=postgres.url)
    engine = create_engine(settings)
    link = Link(valkey.url, name="bench")
    await link.start()
    bench = Bench(engine, link, settings, (postgres.pid, valkey.pid))
    taken = {name: Taken() for name in NAMES}
    measures: dict[str, Callable[[int, int], Awaitable[float]]] = {
        "copy": bench.copy, "postgres": bench.postgres, "alone": bench.alone, "confirm": bench.confirm,
        "again": bench.again, "number": bench.number
    }  # fmt: skip
    void: str | None = None
    try:
        await bench.publish()
        for turn in range(plan.rounds + 1):  # the first warms caches and prepares statements
            plan.say(f"round {turn}/{plan.rounds}: orders into Postgres")
            for name, measure in measures.items():
                await bench.empty()
                took = await measure(batches, BATCH)
                wrong = await bench.wrong(batches * BATCH, name)
                if wrong is not None:
                    void = f"{name}: {wrong}"
                if turn:
                    taken[name].per_s.append(batches * BATCH / took)
                    for role, seconds in bench.spent.items():
                        taken[name].cpu_us[role].append(seconds / (batches * BATCH) * 1e6)
    finally:
        await link.close()
        await engine.dispose()
    return taken, void


def report(taken: dict[str, Taken], void: str | None, batches: int) -> Found:
    """The verdicts of goal 6 and the table."""
    found = Found()
    limit = taken["copy"]

    def of_copy(name: str) -> Callable[[], dict[str, list[float]]]:
        def measured() -> dict[str, list[float]]:
            if void is not None:
                raise Void(void)
            return {"per second": [100 * a / b for a, b in zip(taken[name].per_s, limit.per_s, strict=True)]}

        return measured

    where = f"batches of {BATCH:,}, synchronous_commit=on"
    found.verdicts.append(at_least(6, "confirm, of raw binary COPY", where, OF_COPY, of_copy("confirm")))
    again = f"confirm with {REDELIVERED} % redelivered, of raw binary COPY"
    found.verdicts.append(at_least(6, again, where, AGAIN_OF_COPY, of_copy("again")))
    sheet = Sheet(
        f"Orders into Postgres: batches of {BATCH:,}, {batches} a round",
        ["what", "orders per second", "of copy", "worker µs", "Redis µs", "Postgres µs"],
    )
    if void is None:
        for name, one in taken.items():
            ratio = [a / b for a, b in zip(one.per_s, limit.per_s, strict=True)]
            sheet.rows.append([
                NAMES[name], spread(one.per_s), f"{statistics.median(ratio):.0%}",
                *(spread(one.cpu_us[role], 1) for role in ("worker", "redis", "postgres")),
            ])  # fmt: skip
    found.sheets.append(sheet)
    found.lines["confirm"] = {
        name: {"per_s": one.per_s, "cpu_us": dict(one.cpu_us)} for name, one in taken.items()
    }
    return found
