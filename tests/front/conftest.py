"""Front doors on a real server in this loop, in front of a real Valkey; sales are published straight to Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import jwt
import pytest
import uvicorn

from app import keys
from app.answers import Published
from app.door.hot import HotRoutes
from app.draw import seed_hash
from app.front import create_app
from app.keys import SaleKeys
from app.redis.link import Link
from app.scripts import Scripts
from app.serving.server import listen
from app.serving.wire import http_protocol
from app.settings import Settings

JWT_SECRET = "a secret of the shop that is long enough"
SIGNING_KEY = "k" * 40
PII_KEY = "11" * 32
SEED = bytes(range(32))
ORIGIN = "https://shop.example"


def settings_for(redis_url: str, **changed: Any) -> Settings:
    return Settings(
        **{
            "env": "development", "redis_url": redis_url, "signing_keys": SIGNING_KEY, "pii_keys": PII_KEY,
            "jwt_secret": JWT_SECRET, "cors_origins": [ORIGIN], "pass_pow_bits": 6, "poll_min_ms": 50,
            "pass_rate_per_min": 600, "change_rate_per_min": 600, "snapshot_every_ms": 50,
            "overload_wait_max_ms": 0,  # clients and server share this loop: their crowds are no crowd
            # A busy machine is neither a crowd nor a Redis that is away.
            "redis_deadline_s": 30.0, "join_wait_max_ms": 60_000.0, "keep_alive_s": 600.0,
            **changed,
        }
    )  # fmt: skip


def token(buyer: str, **claims: Any) -> str:
    body = {"sub": buyer, "exp": int(time.time()) + 600, **claims}
    return jwt.encode(body, JWT_SECRET, algorithm="HS256")


class _Quiet(uvicorn.Server):
    """Signals are the test runner's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@dataclass
class Front:
    """One running front door and a client of it."""

    app: HotRoutes
    url: str
    http: httpx.AsyncClient
    server: uvicorn.Server
    task: asyncio.Task[None]

    async def join(
        self,
        sale: str,
        buyer: str,
        sku: str = "A",
        units: int = 1,
        *,
        again: bool | None = None,
        **headers: str,
    ) -> httpx.Response:
        body: dict[str, Any] = {"sku": sku, "units": units}
        if again is not None:
            body["again"] = again
        return await self.http.post(
            f"/v1/sales/{sale}/tickets", json=body, headers=headers or {"X-Buyer-Id": buyer}
        )

    async def poll(self, ticket: str, buyer: str | None = None) -> httpx.Response:
        return await self.http.get(f"/v1/tickets/{ticket}", headers={"X-Buyer-Id": buyer} if buyer else {})

    async def close(self) -> None:
        await self.http.aclose()
        self.server.should_exit = True
        await self.task


async def open_front(settings: Settings) -> Front:
    app = create_app(settings)
    wire = listen("127.0.0.1", 0, 2048, what="front")
    config = uvicorn.Config(
        app, http=http_protocol(settings, app), ws="none", interface="asgi3", log_config=None, access_log=False,
        server_header=False, timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = _Quiet(config)
    task = asyncio.create_task(server.serve(sockets=[wire]))
    await until(lambda: server.started or task.done())
    if task.done():
        task.result()
    url = f"http://127.0.0.1:{wire.getsockname()[1]}"
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
    http = httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False)
    return Front(app, url, http, server, task)


async def until(true: Callable[[], Any], within_s: float = 180.0) -> Any:
    """Wait until `true()` (which may be a coroutine function) holds, and return it."""
    deadline = time.monotonic() + within_s
    while True:
        found = true()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s")
        await asyncio.sleep(0.01)


@dataclass
class Shop:
    """What office and worker do, as far as a front door sees it."""

    link: Link
    scripts: Scripts
    versions: dict[str, int] = field(default_factory=dict)

    async def publish(
        self,
        sale: str = "x",
        *,
        units: int = 5,
        skus: tuple[str, ...] = ("A", "B"),
        line_opens_in_s: float = -2.0,
        opens_in_s: float = -1.0,
        closes_in_s: float = 600.0,
        freeze_s: float = 0.0,
        doc: dict[str, Any] | None = None,
        **changed: Any,
    ) -> str:
        now_ms = int(time.time() * 1000)
        opens_ms = now_ms + int(opens_in_s * 1000)
        facts = {
            "title": f"Sale {sale}",
            "items": [
                {"sku": sku, "title": f"Item {sku}", "price_minor": 59900, "currency": "EUR", "units": units}
                for sku in skus
            ],
            "pass": "optional", "challenge": "none", "audience": None, "channels": ["sandbox", "card"],
            "default_channel": "sandbox", "return_urls": ["https://shop.example/done"], "pay_within_s": 60,
            **(doc or {}),
        }  # fmt: skip
        fields: dict[str, Any] = {
            "epoch": 1, "version": 1, "line_opens_ms": now_ms + int(line_opens_in_s * 1000), "opens_ms": opens_ms,
            "closes_ms": now_ms + int(closes_in_s * 1000), "freeze_ms": opens_ms - int(freeze_s * 1000),
            "beacon_source": "none", "beacon_wait_ms": 5_000, "rate_milli": -1, "burst": 100, "limit": 2,
            "line_max": 100_000, "standby": 0, "seed": SEED.hex(), "items": ",".join(skus), "doc": json.dumps(facts),
            **changed,
        }  # fmt: skip
        published = await self.scripts.sale_publish(
            sale=sale, fields=fields, items=[(sku, units) for sku in skus], seed_hash=seed_hash(SEED)
        )
        assert published == Published()
        self.versions[sale] = 1
        await self.announce(sale)
        return sale

    async def announce(self, sale: str, *, ended: bool = False) -> None:
        told = json.dumps({"version": self.versions.get(sale, 1), "ended": ended})
        await self.link.call("HSET", keys.SALES, sale, told)

    async def switch(self, sale: str, **changes: str | int) -> None:
        self.versions[sale] += 1
        await self.scripts.sale_switch(sale=sale, epoch=1, version=self.versions[sale], changes=changes)
        await self.announce(sale)

    async def open_now(self, sale: str, **changes: str | int) -> None:
        """Bring the opening forward: no test races against the clock."""
        now_ms = int(time.time() * 1000)
        await self.switch(sale, opens_ms=now_ms - 1, freeze_ms=now_ms - 1, **changes)

    async def advance(self, sale: str, sku: str = "A") -> Any:
        return await self.scripts.line_advance(
            sale=sale, epoch=1, sku=sku, work_max=1000, backlog_max=100_000
        )

    async def mark(
        self,
        sale: str,
        seq: int,
        byte: bytes,
        *,
        sku: str = "A",
        version: int = 1,
        payment: dict[str, Any] | None = None,
        keep_ask: bool = False,
        text: str | None = None,
        order: dict[str, Any] | None = None,
    ) -> Any:
        """What the worker tells a winner."""
        states = {b"r": "reserved", b"p": "paid", b"k": "cancelled", b"e": "expired", b"f": "refunded"}
        of_order = {
            "order_no": f"ORDER{seq:015d}", "state": states[byte], "amount_minor": 59900, "currency": "EUR",
            "lines": [
                {"kind": "item", "sku": sku, "title": "Item", "units": 1, "unit_minor": 59900, "amount_minor": 59900}
            ],
            "pay_by": None, **(order or {}),
        }  # fmt: skip
        told = {
            "channel": None, "state": "none", "kind": None, "url": None, "params": None, "expires_at": None,
            "code": None, **(payment or {}),
        }  # fmt: skip
        document = {"order": of_order, "payment": told, "leaving": False, "reason": None}
        status = json.dumps(document | ({"text": text} if text else {}))
        return await self.scripts.ticket_mark(
            sale=sale,
            epoch=1,
            sku=sku,
            seq=seq,
            version=version,
            byte=byte,
            status_json=status,
            keep_ask=keep_ask,
        )

    async def asks(self, sale: str) -> list[bytes]:
        entries = await self.link.call("XRANGE", SaleKeys(sale).asks, "-", "+")
        return [entry[1][1] for entry in entries]

    async def orders(self, sale: str) -> list[bytes]:
        entries = await self.link.call("XRANGE", SaleKeys(sale).orders, "-", "+")
        """Of each claim what its entry shares, the ticket and the buyer."""
        return [
            b"|".join((fields[1], *claim))
            for _, fields in entries
            for claim in zip(fields[2::2], fields[3::2], strict=True)
        ]


@pytest.fixture
async def shop(redis_url: str) -> AsyncIterator[Shop]:
    link = Link(redis_url, deadline_s=30, name="test-shop")
    await link.start()
    yield Shop(link, Scripts(link))
    await link.close()


Open = Callable[..., Awaitable[Front]]


@pytest.fixture
async def open_door(redis_url: str) -> AsyncIterator[Open]:
    """Opens a further front door: `await open_door(**settings)`."""
    fronts: list[Front] = []

    async def opened(**changed: Any) -> Front:
        front = await open_front(settings_for(redis_url, **changed))
        fronts.append(front)
        return front

    yield opened
    for front in fronts:
        await front.close()


@pytest.fixture
async def front(open_door: Open) -> Front:
    return await open_door()


@pytest.fixture
def seen(front: Front) -> Callable[..., Awaitable[Any]]:
    """Wait until a front door sees a sale (and what is asked of it)."""

    async def wait(
        sale: str = "x", true: Callable[[Any], bool] = lambda view: True, door: Front | None = None
    ) -> Any:
        snapshots = (door or front).app.door.snapshots
        return await until(lambda: (view := snapshots.get(sale)) is not None and true(view) and view)

    return wait
