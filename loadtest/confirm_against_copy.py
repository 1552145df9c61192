"""Orders a second into Postgres: confirm, against raw binary COPY into the same table, on durable stores of its own.

    .venv/bin/python -m loadtest.confirm_against_copy [--batch 1000] [--batches 10] [--rounds 5] [--redelivered 10]

Four measures, interleaved round by round, each batch one transaction with synchronous_commit=on:
    copy       COPY of the batch into purchase_order and nothing else: the limit
    postgres   confirm's transaction: orders, their lines, events, the item's counter (no SMS: no contacts)
    confirm    the whole step: contacts, transaction, a ticket_mark for each, XACK+XDEL
    again      the same with some per cent of the entries delivered before
Unlike the suites of this folder it imports app/: it measures one function of it, not a running system.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.embedded import Postgres, Valkey, make_folder
from app.keys import GROUP, SaleKeys
from app.ledger import confirming, migrate
from app.ledger.confirming import NewOrder
from app.ledger.engine import create_engine
from app.ledger.orders import order_no
from app.purchase.confirm import Claim, Confirmer, Entry, parse
from app.scripts import Claimed, Joined, Link, Scripts
from app.settings import Settings

SALE, SKU = "bench", "A"
UNITS = 10_000_000


class Bench:
    def __init__(self, engine: AsyncEngine, link: Link, settings: Settings) -> None:
        self.engine = engine
        self.link = link
        self.scripts = Scripts(link)
        self.confirmer = Confirmer(engine, link, self.scripts, settings)
        self.keys = SaleKeys(SALE)
        self.buyers = 0

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
                text("TRUNCATE purchase_order, order_line, event, sms, payment_attempt, outbox CASCADE")
            )
            await conn.execute(text("UPDATE item SET reserved = 0"))

    async def copy(self, batches: int, size: int) -> float:
        work: list[list[NewOrder]] = []
        at = datetime.now(UTC)
        for _ in range(batches):
            names = [f"buyer-{self.buyers + n}" for n in range(size)]
            work.append([
                NewOrder(order_no(SALE, 1, SKU, self.buyers + n, name), SALE, SKU, name, 1, self.buyers + n, 1, 1000,
                         "EUR", "reserved", at, 600, None)
                for n, name in enumerate(names, 1)
            ])  # fmt: skip
            self.buyers += size
        begun = time.perf_counter()
        for batch in work:
            async with self.engine.begin() as conn:
                await conn.execute(text("SELECT 1"))  # begins the transaction
                await confirming.copy_orders(conn, batch)
        return time.perf_counter() - begun

    async def postgres(self, batches: int, size: int) -> float:
        work: list[list[Claim]] = []
        for _ in range(batches):
            parsed = [parse(SALE, entry) for entry in await self.claims(size)]
            work.append([one for one in parsed if isinstance(one, Claim)])
        begun = time.perf_counter()
        for batch in work:
            await self.confirmer._write(SALE, batch, {}, careful=False)
        took = time.perf_counter() - begun
        await self.link.call("XTRIM", self.keys.orders, "MAXLEN", 0)
        return took

    async def confirm(self, batches: int, size: int) -> float:
        work = [await self.claims(size) for _ in range(batches)]
        begun = time.perf_counter()
        for batch in work:
            await self.confirmer.confirm(SALE, batch)
        return time.perf_counter() - begun

    async def again(self, batches: int, size: int, redelivered: int) -> float:
        """Each batch holds `redelivered` per cent of entries that were confirmed before."""
        old = size * redelivered // 100
        before = [await self.claims(old) for _ in range(batches)]
        for batch in before:
            await self.confirmer.confirm(SALE, batch)
        work = [repeated + await self.claims(size - old) for repeated in before]
        begun = time.perf_counter()
        for batch in work:
            await self.confirmer.confirm(SALE, batch)
        return time.perf_counter() - begun


async def measure(options: argparse.Namespace, valkey: Valkey, postgres: Postgres) -> None:
    settings = Settings(env="development", redis_url=valkey.url, database_url=postgres.url)
    engine = create_engine(settings)
    link = Link(valkey.url, name="bench")
    await link.start()
    bench = Bench(engine, link, settings)
    rates: dict[str, list[float]] = {"copy": [], "postgres": [], "confirm": [], "again": []}
    try:
        await bench.publish()
        for round_no in range(options.rounds + 1):
            for name in rates:
                await bench.empty()
                extra: tuple[Any, ...] = (options.redelivered,) if name == "again" else ()
                took = await getattr(bench, name)(options.batches, options.batch, *extra)
                if round_no:  # the first warms caches and prepares statements
                    rates[name].append(options.batches * options.batch / took)
    finally:
        await link.close()
        await engine.dispose()
    limit = statistics.median(rates["copy"])
    print(
        f"batches of {options.batch}, {options.batches} a round, {options.rounds} rounds, medians (least–most)"
    )
    for name, found in rates.items():
        middle = statistics.median(found)
        print(
            f"{name:9} {middle:10,.0f} orders/s  ({min(found):,.0f}–{max(found):,.0f})  {middle / limit:6.1%} of copy"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--redelivered", type=int, default=10, help="per cent of a batch delivered before")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fairdrop-bench-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        make_folder(home / "stores")
        valkey, postgres = (
            Valkey(home / "stores" / "valkey", "bench"),
            Postgres(home / "stores" / "postgres", "bench"),
        )
        try:
            valkey.start()
            postgres.start()
            migrate.upgrade(postgres.url)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(measure(options, valkey, postgres))
        finally:
            valkey.stop()
            postgres.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
