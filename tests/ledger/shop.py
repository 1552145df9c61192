"""A sale on real stores, and the worker's parts to drive by hand: what the tests of confirm and release start from."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app import alike
from app.answers import Claimed, Joined, Published
from app.keys import GROUP, SaleKeys
from app.ledger import events
from app.ledger.engine import create_engine
from app.purchase.admit import Admitter
from app.purchase.confirm import Confirmer, Entry, claims_of
from app.purchase.release import PayAsk, Releaser
from app.redis.link import Link
from app.repair.reconcile import Books, Reconciler, compare
from app.scripts import Scripts
from app.settings import Settings
from app.work.lookout import Lookout
from app.work.loops import Health, keep_going

SALE = "drop"


async def until(true: Callable[[], Awaitable[object]], what: str, within_s: float = 180.0) -> None:
    """Poll a condition."""
    deadline = time.monotonic() + within_s
    while not await true():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def looking_out(engine: AsyncEngine, every_s: float = 0.02) -> AsyncIterator[Lookout]:
    """The lookout of a worker that is only some of its loops."""
    lookout, stopping = Lookout(engine, every_s), asyncio.Event()
    looking = asyncio.create_task(keep_going("lookout", lookout.turn, 0.0, stopping, Health()))
    try:
        yield lookout
    finally:
        stopping.set()
        await looking


@dataclass
class Shop:
    settings: Settings
    engine: AsyncEngine
    link: Link
    scripts: Scripts
    skus: tuple[str, ...] = ("A",)
    cleared: str = "clear"  # what the supplier says of any order
    epoch: int = 1  # of the sale, for joins
    attempts: list[tuple[str, PayAsk]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = SaleKeys(SALE)
        self.admitter = Admitter(self.link, self.scripts, self.settings)
        self.confirmer = Confirmer(self.engine, self.link, self.scripts, self.settings)
        self.releaser = Releaser(
            self.engine, self.link, self.scripts, self.settings, self._clear, self._start_attempt
        )
        self.reconciler = Reconciler(self.engine, self.link, self.scripts, self.admitter, self.settings)

    async def _clear(self, order_no: str) -> Any:
        return self.cleared

    async def _start_attempt(self, conn: AsyncConnection, order_no: str, ask: PayAsk) -> bool:
        self.attempts.append((order_no, ask))
        return False

    # Making

    async def publish(self, units: int | dict[str, int] = 5, **changed: Any) -> Shop:
        """A sale that is open now. `changed`: columns of `sale`."""
        stock = units if isinstance(units, dict) else dict.fromkeys(self.skus, units)
        self.skus = tuple(stock)
        now = int(time.time() * 1000)
        row: dict[str, Any] = {
            "id": SALE,
            "title": "A drop",
            "state": "open",
            "line_opens_at": _at(now - 20_000),
            "opens_at": _at(now - 10_000),
            "closes_at": _at(now + 3_600_000),
            "draw_freeze_s": 5,
            "beacon_wait_s": 5,
            "pay_within_s": 600,
            "limit_per_buyer": 1,
            "standby": False,
            "line_max": 100_000,
            "pass_mode": "optional",
            "challenge": "none",
            "channels": "[]",
            "return_urls": "[]",
            "seed": bytes(32),
            "home": self.link.run_id,
            "opened_at": _at(now - 10_000),
            "published_at": _at(now - 30_000),
            "default_channel": None,
        } | changed
        async with self.engine.begin() as conn:
            columns = ", ".join(row)
            values = ", ".join(_bind(name) for name in row)
            await conn.execute(text(f"INSERT INTO sale ({columns}) VALUES ({values})"), row)
            for position, (sku, total) in enumerate(stock.items()):
                await conn.execute(
                    text(
                        "INSERT INTO item (sale, sku, position, title, price_minor, currency, total)"
                        " VALUES (:sale, :sku, :position, :title, 1000, 'EUR', :total)"
                    ),
                    {"sale": SALE, "sku": sku, "position": position, "title": f"Item {sku}", "total": total},
                )
        await self.publish_to_redis(stock, row)
        return self

    async def publish_to_redis(self, stock: dict[str, int], row: dict[str, Any]) -> None:
        ms = {name: int(row[name].timestamp() * 1000) for name in ("line_opens_at", "opens_at", "closes_at")}
        published = await self.scripts.sale_publish(
            sale=SALE,
            fields={
                "epoch": row.get("epoch", 1), "version": 1, "line_opens_ms": ms["line_opens_at"],
                "opens_ms": ms["opens_at"], "closes_ms": ms["closes_at"],
                "freeze_ms": ms["opens_at"] - row["draw_freeze_s"] * 1000,
                "beacon_source": row.get("beacon", "none"), "beacon_wait_ms": 5_000, "rate_milli": -1, "burst": 100,
                "limit": row["limit_per_buyer"], "line_max": row["line_max"], "standby": int(row["standby"]),
                "seed": bytes(32).hex(), "items": ",".join(stock), "doc": "{}",
            },
            items=list(stock.items()),
            seed_hash=hashlib.sha256(bytes(32)).hexdigest(),
        )  # fmt: skip
        assert published == Published()
        await self.link.call(
            "HSET", "fairdrop:sales", SALE, msgspec.json.encode({"version": 1, "ended": False})
        )
        await self.admitter.look()

    async def join(
        self, *buyers: str | tuple[str, int], sku: str | None = None, again: bool = False
    ) -> list[Any]:
        rows = []
        for buyer in buyers:
            name, units = buyer if isinstance(buyer, tuple) else (buyer, 1)
            raw = name.encode()
            rows.append((raw, units, again, raw.rjust(10, b"#")[-10:]))
        answer = await self.scripts.line_join(
            sale=SALE,
            epoch=self.epoch,
            sku=sku or self.skus[0],
            skus=self.skus,
            buyers=rows,
            backlog_max=1_000_000,
        )
        assert isinstance(answer, Joined), answer
        return answer.answers

    async def claim(
        self, *buyers: str | tuple[str, int], sku: str | None = None, again: bool = False
    ) -> list[int]:
        """Every buyer has taken units. Returns their seqs."""
        answers = await self.join(*buyers, sku=sku, again=again)
        assert all(isinstance(answer, Claimed) for answer in answers), answers
        return [answer.seq for answer in answers]

    async def add_entry(self, *claims: bytes, shared: bytes = b"1|1|A|1700000000000") -> bytes:
        """An entry that no script wrote, counted as one would have counted it. claims: seq:units, buyer, …"""
        made = len(claims) // 2
        replies = await self.link.pipeline(
            [
                ("MULTI",),
                ("XADD", self.keys.orders, "*", "c", shared, *claims),
                ("HINCRBY", self.keys.sale, "claims_open", made),
                ("HINCRBY", self.keys.sale, "claims_made", made),
                ("EXEC",),
            ]
        )
        entry_id: bytes = replies[-1][0]
        return entry_id

    async def copy_entry(self, fields: Sequence[bytes]) -> bytes:
        """An entry once more."""
        return await self.add_entry(*fields[2:], shared=fields[1])

    # Driving

    async def read(self, count: int = 1000, consumer: str = "one") -> list[Entry]:
        found = await self.link.call(
            "XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, "STREAMS", self.keys.orders, ">"
        )
        return [entry for _, entries in found or () for entry in entries]

    async def take_over(self, consumer: str = "two") -> list[Entry]:
        reply = await self.link.call("XAUTOCLAIM", self.keys.orders, GROUP, consumer, 0, "0-0", "COUNT", 1000)
        return [entry for entry in reply[1] if entry is not None]

    async def confirm(self, *, careful: bool = False) -> int:
        done = 0
        while entries := await self.read():
            done += await self.confirmer.confirm(SALE, entries, careful=careful)
        return done

    async def relay(self) -> int:
        """Everything in the outbox that Redis will take."""
        closed = 0
        while now := await self.releaser.relay():
            closed += now
        return closed

    async def asks(self) -> list[Entry]:
        found = await self.link.call(
            "XREADGROUP", "GROUP", GROUP, "one", "COUNT", 1000, "STREAMS", self.keys.asks, ">"
        )
        return [entry for _, entries in found or () for entry in entries]

    async def events(self) -> list[Any]:
        """The shop's feed, once everything that was written has its position."""
        async with self.engine.begin() as conn:
            while await events.number(conn, 1000):
                pass
        return await self.sql("SELECT * FROM event ORDER BY position")

    # Looking

    async def sql(self, statement: str, **values: Any) -> list[Any]:
        async with self.engine.begin() as conn:
            result = await conn.execute(text(statement), values)
            return list(result.mappings()) if result.returns_rows else []

    async def orders(self) -> list[Any]:
        return await self.sql("SELECT * FROM purchase_order ORDER BY epoch, seq, order_no")

    async def item(self, sku: str | None = None) -> Any:
        return (await self.sql("SELECT * FROM item WHERE sku = :sku", sku=sku or self.skus[0]))[0]

    async def left(self, sku: str | None = None) -> int:
        return int(await self.link.call("HGET", self.keys.stock, sku or self.skus[0]))

    async def byte(self, seq: int, sku: str | None = None) -> bytes:
        found: bytes = await self.link.call(
            "GETRANGE", self.keys.outcome(sku or self.skus[0]), seq - 1, seq - 1
        )
        return found

    async def told(self, seq: int, sku: str | None = None) -> tuple[int, bytes, dict[str, Any]] | None:
        found = await self.link.call("HGET", self.keys.status, f"{sku or self.skus[0]}:{seq}")
        if found is None:
            return None
        version, byte, document = found.split(b"|", 2)
        if (like := alike.cut(document)) is not None:
            form = await self.link.call("HGET", self.keys.status, alike.field_of(like[0]))
            document = alike.filled(form, like[1])
        return int(version), byte, msgspec.json.decode(document)

    async def backlog(self) -> int:
        """Claims in the stream; the scripts count as many."""
        replies = await self.link.pipeline(
            [
                ("MULTI",),
                ("XRANGE", self.keys.orders, "-", "+"),
                ("HGET", self.keys.sale, "claims_open"),
                ("EXEC",),
            ]
        )
        entries, counted = replies[-1]
        assert claims_of(entries) == int(counted or 0)
        return claims_of(entries)

    async def pending(self) -> int:
        return int((await self.link.call("XPENDING", self.keys.orders, GROUP))[0])

    async def books(self) -> Books:
        return await compare(self.engine, self.link, SALE)

    async def conserved(self) -> None:
        """At rest every unit is left, claimed, reserved or sold: once."""
        books = await self.books()
        assert books.agree, books.report()


def _at(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


def _bind(name: str) -> str:
    return f"CAST(:{name} AS jsonb)" if name in ("channels", "return_urls") else f":{name}"


def settings_of(redis_url: str, database_url: str, **changed: Any) -> Settings:
    return Settings(
        env="development",
        redis_url=redis_url,
        database_url=database_url,
        **({"sandbox_secret": "s" * 32, "worker_port": 0, "redis_deadline_s": 30.0} | changed),
    )


@asynccontextmanager
async def open_shop(redis_url: str, database_url: str, **changed: Any) -> AsyncIterator[Shop]:
    settings = settings_of(redis_url, database_url, **changed)
    engine = create_engine(settings)
    link = Link(redis_url, deadline_s=30, name="test")
    await link.start()
    assert link.connected, link.trouble
    try:
        yield Shop(settings, engine, link, Scripts(link))
    finally:
        await link.close()
        await engine.dispose()
