"""One sale with reserved orders in real Postgres and Redis, a real sandbox supplier, and call-backs between them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from app.answers import Joined, Published
from app.draw import seed_hash
from app.ledger import orders, payments, tables
from app.ledger.engine import create_engine
from app.providers.payment import HookAnswer
from app.providers.registry import Providers, open_providers
from app.purchase import pay
from app.purchase.paying import hook
from app.purchase.release import Releaser
from app.redis.link import Link
from app.scripts import Scripts
from app.sealing import contact_aad, seal, sealing_keys
from app.settings import Settings
from tests.ledger.shop import looking_out
from tests.providers.server import SECRET, Shop, hook_listener, until

SALE, SKU, PRICE = "drop", "PH-128", 19_900
SEED = bytes(range(32))
PII_KEY = "11" * 32

# For tests of suppliers that do not answer, and for no other: on a busy machine a good answer may take a second too.
hasty = pytest.mark.parametrize(
    "till", [{"provider_deadline_s": 1.0, "lease_s": 3}], indirect=True, ids=["hasty"]
)


class Money:
    """The stage of a payment test. `loops()` runs the payment loops, `relay()` tells Redis what was decided."""

    def __init__(
        self, settings: Settings, engine: AsyncEngine, shop: Shop, providers: Providers, link: Link
    ) -> None:
        self.settings, self.engine, self.shop, self.providers = settings, engine, shop, providers
        self.link, self.scripts = link, Scripts(link)
        self.others: list[Shop] = []  # further suppliers beside `shop`
        self.hook_answers: list[HookAnswer] = []
        self.hooks_on = True
        self.releaser = Releaser(
            engine,
            link,
            self.scripts,
            settings,
            lambda order_no: pay.clear_attempts(engine, providers, order_no),
            lambda conn, order_no, ask: pay.start_attempt(
                conn,
                order_no,
                channel=ask.channel,
                return_url=ask.return_url,
                payer=ask.payer,
                providers=providers,
            ),
        )

    # the sale

    async def publish(self, *, units: int = 5, standby: bool = False, pay_within_s: int = 60) -> None:
        now = datetime.now(UTC)
        opens = now - timedelta(minutes=1)
        self.pay_within_s = pay_within_s
        async with self.engine.begin() as conn:
            await conn.execute(
                tables.sale.insert().values(
                    id=SALE, title="Drop", state="open", line_opens_at=opens, opens_at=opens,
                    closes_at=now + timedelta(hours=1), draw_freeze_s=0, beacon_wait_s=5, pay_within_s=pay_within_s,
                    limit_per_buyer=1, standby=standby, line_max=1000, pass_mode="optional", challenge="none",
                    channels=["sandbox"], default_channel="sandbox", return_urls=[], seed=SEED, home=self.link.run_id,
                    published_at=opens,
                )
            )  # fmt: skip
            await conn.execute(
                tables.item.insert().values(
                    sale=SALE,
                    sku=SKU,
                    position=0,
                    title="Phone",
                    price_minor=PRICE,
                    currency="CNY",
                    total=units,
                )
            )
        opens_ms = int(opens.timestamp() * 1000)
        published = await self.scripts.sale_publish(
            sale=SALE,
            fields={
                "epoch": 1, "version": 1, "line_opens_ms": opens_ms, "opens_ms": opens_ms, "freeze_ms": opens_ms,
                "closes_ms": opens_ms + 3_600_000, "beacon_source": "none", "beacon_wait_ms": 5_000, "rate_milli": -1,
                "burst": 100, "limit": 1, "line_max": 1_000, "standby": int(standby), "seed": SEED.hex(),
                "items": SKU, "doc": "{}",
            },
            items=[(SKU, units)],
            seed_hash=seed_hash(SEED),
        )  # fmt: skip
        assert published == Published()

    async def join(self, *buyers: str) -> Joined:
        joined = await self.scripts.line_join(
            sale=SALE, epoch=1, sku=SKU, skus=[SKU], backlog_max=1_000,
            buyers=[(buyer.encode(), 1, False, buyer.encode().rjust(10, b"#")[-10:]) for buyer in buyers],
        )  # fmt: skip
        assert isinstance(joined, Joined)
        return joined

    async def reserve(
        self, buyer: str, *, attempt: bool = True, amount_minor: int = PRICE, contact: bool = False
    ) -> str:
        """A buyer claims in Redis, and the order is written as confirm would write it."""
        joined = await self.join(buyer)
        seq = int(joined.answers[0].seq)  # type: ignore[union-attr]
        number = orders.order_no(SALE, 1, SKU, seq, buyer)
        sealed = (
            seal(
                sealing_keys(PII_KEY),
                b'{"phone":"+8613800000001","language":"zh-CN"}',
                contact_aad(SALE, buyer),
            )
            if contact
            else None
        )
        async with self.engine.begin() as conn:
            await conn.execute(
                tables.purchase_order.insert().values(
                    order_no=number, sale=SALE, sku=SKU, buyer_id=buyer, epoch=1, seq=seq, units=1,
                    amount_minor=amount_minor, currency="CNY", state="reserved", claimed_at=datetime.now(UTC),
                    pay_within_s=self.pay_within_s, contact=sealed,
                )
            )  # fmt: skip
            await conn.execute(
                tables.order_line.insert().values(
                    order_no=number, line_no=1, kind="item", sku=SKU, title="Phone", units=1,
                    unit_minor=amount_minor, amount_minor=amount_minor,
                )
            )  # fmt: skip
            await conn.execute(tables.item.update().values(reserved=tables.item.c.reserved + 1))
            if attempt:
                order = await orders.lock(conn, number)
                assert order is not None
                await payments.add_attempt(
                    conn,
                    order,
                    provider="sandbox",
                    channel="sandbox",
                    return_url=None,
                    payer=None,
                    state="created",
                )
            await orders.bump(conn, number)
        await self.relay()
        return number

    async def relay(self) -> None:
        while await self.releaser.relay():
            pass

    async def end(self, number: str, *, relay: bool = True) -> None:
        """The order's deadline has passed, and release has ended it (or not, when the supplier does not answer)."""
        await self.sql(
            "UPDATE purchase_order SET pay_by = now() - interval '1 s' WHERE order_no = :no", no=number
        )
        await self.releaser.expire()
        if relay:
            await self.relay()

    # the loops

    @contextlib.asynccontextmanager
    async def loops(self) -> AsyncIterator[None]:
        stopping = asyncio.Event()
        async with looking_out(self.engine) as lookout:
            running = asyncio.create_task(
                pay.run(self.engine, self.scripts, self.providers, self.settings, stopping, lookout)
            )
            try:
                yield
            finally:
                stopping.set()
                await running

    async def take_hook(self, provider: str, headers: dict[str, str], raw: bytes) -> tuple[int, bytes]:
        if not self.hooks_on:
            return 503, b""
        answer = await hook.take_hook(self.engine, self.providers, provider, headers, raw)
        self.hook_answers.append(answer)
        return answer.status, answer.body

    # looking

    async def sql(self, statement: str, **values: Any) -> list[dict[str, Any]]:
        async with self.engine.begin() as conn:
            found = await conn.execute(sa.text(statement), values)
            return [dict(row) for row in found.mappings()] if found.returns_rows else []

    async def one(self, statement: str, **values: Any) -> Any:
        rows = await self.sql(statement, **values)
        assert len(rows) == 1, rows
        return next(iter(rows[0].values()))

    async def state(self, number: str) -> str:
        return str(await self.one("SELECT state FROM purchase_order WHERE order_no = :no", no=number))

    async def attempts(self, number: str) -> list[tuple[str, str | None]]:
        rows = await self.sql(
            "SELECT state, code FROM payment_attempt WHERE order_no = :no ORDER BY attempt_no", no=number
        )
        return [(row["state"], row["code"]) for row in rows]

    async def captures(self, number: str) -> list[str]:
        rows = await self.sql("SELECT state FROM capture WHERE order_no = :no ORDER BY id", no=number)
        return [row["state"] for row in rows]

    async def link_of(self, number: str, attempt_no: int = 1) -> str:
        """The link that the buyer is shown, once it is there."""

        async def found() -> str | None:
            rows = await self.sql(
                "SELECT url FROM payment_attempt WHERE order_no = :no AND attempt_no = :n AND state = 'sent'",
                no=number,
                n=attempt_no,
            )
            return rows[0]["url"] if rows else None

        return str(await until(found))

    async def becomes(self, number: str, state: str) -> None:
        async def holds() -> bool:
            return await self.state(number) == state

        await until(holds)

    async def units(self) -> tuple[int, int, int]:
        """(left in Redis, reserved, sold)"""
        left = int(await self.link.call("HGET", f"{{sale:{SALE}}}:stock", SKU))
        rows = await self.sql("SELECT reserved, sold FROM item")
        return left, rows[0]["reserved"], rows[0]["sold"]

    async def balanced(self) -> None:
        """Money and units agree, at rest."""
        await self.relay()
        assert await self.one(
            "SELECT coalesce(sum(amount_minor), 0) - (SELECT coalesce(sum(amount_minor), 0) FROM refund"
            " WHERE state = 'done') FROM capture"
        ) == await self.one("SELECT coalesce(sum(amount_minor), 0) FROM purchase_order WHERE state = 'paid'")
        left, reserved, sold = await self.units()
        total = await self.one("SELECT total FROM item")
        assert left + reserved + sold == total
        stats = [await shop.stats() for shop in (self.shop, *self.others)]
        ours = await self.one("SELECT coalesce(sum(amount_minor), 0) FROM capture")
        assert sum(one.get("captured_minor", 0) for one in stats) == ours
        done = await self.one("SELECT coalesce(sum(amount_minor), 0) FROM refund WHERE state = 'done'")
        assert sum(one.get("refunded_minor", 0) for one in stats) == done


@contextlib.asynccontextmanager
async def money(shop: Shop, redis_url: str, database_url: str, **changes: Any) -> AsyncIterator[Money]:
    stage: list[Money] = []

    async def take(provider: str, headers: dict[str, str], raw: bytes) -> tuple[int, bytes]:
        return await stage[0].take_hook(provider, headers, raw)

    async with hook_listener(take) as url:
        values: dict[str, Any] = {
            "env": "development", "redis_url": redis_url, "database_url": database_url, "sandbox_url": shop.url,
            "sandbox_secret": SECRET, "provider_deadline_s": 20.0, "provider_wait_max_s": 20.0, "lease_s": 60,
            "office_url": url, "pii_keys": PII_KEY, "worker_name": f"test-{os.getpid()}",
        }  # fmt: skip
        settings = Settings(**{**values, **changes})
        engine = create_engine(settings)
        providers = open_providers(settings)
        link = Link(redis_url, name="test", deadline_s=20.0)
        await link.start()
        try:
            stage.append(Money(settings, engine, shop, providers, link))
            yield stage[0]
        finally:
            await providers.aclose()
            await link.close()
            await engine.dispose()
