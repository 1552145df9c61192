"""An office on a real server in this loop, in front of real stores, with a key for each role."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from sqlalchemy import text

from app.desk.wiring import Desk
from app.ledger import orders
from app.office import create_app
from app.serving.server import listen
from app.settings import Settings

FIRST_KEY = "the first admin's key of the tests"
SIGNING_KEY = "k" * 40
PII_KEY = "11" * 32
_keys = itertools.count(1)


def settings_for(redis_url: str, database_url: str, **changed: Any) -> Settings:
    return Settings(
        **{
            "env": "development", "redis_url": redis_url, "database_url": database_url, "signing_keys": SIGNING_KEY,
            "pii_keys": PII_KEY, "operator_key": FIRST_KEY, "sandbox_secret": "s" * 40, "redis_deadline_s": 30.0,
            **changed,
        }
    )  # fmt: skip


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


def iso(seconds: float) -> str:
    """A time so many seconds from now."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def timed(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields whose times are written as seconds from now."""
    return {n: iso(v) if n.endswith("_at") and isinstance(v, int) else v for n, v in fields.items()}


def document(sale: str = "drop", **changed: Any) -> dict[str, Any]:
    """A good sale: the line opens in a minute, the doors in two."""
    return {
        "id": sale,
        "title": "Drop",
        "line_opens_at": iso(60),
        "opens_at": iso(120),
        "closes_at": iso(3600),
        "items": [{"sku": "A", "title": "Thing", "price_minor": 500, "currency": "EUR", "units": 10}],
        **changed,
    }


class _Quiet(uvicorn.Server):
    """Signals are the test runner's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@dataclass
class Office:
    """One running office and a client of it; without `key` calls are the first admin's."""

    app: FastAPI
    url: str
    http: httpx.AsyncClient
    server: uvicorn.Server
    task: asyncio.Task[None]

    @property
    def desk(self) -> Desk:
        desk: Desk = self.app.state.desk
        return desk

    async def get(self, path: str, *, key: str | None = FIRST_KEY, **params: Any) -> httpx.Response:
        return await self.http.get(path, params=params, headers=_bearer(key))

    async def post(
        self,
        path: str,
        body: Any = None,
        *,
        key: str | None = FIRST_KEY,
        idem: str | None = None,
        **params: Any,
    ) -> httpx.Response:
        headers = {**_bearer(key), "Idempotency-Key": idem or f"test-{next(_keys)}"}
        if body is None:
            return await self.http.post(path, headers=headers, params=params)
        return await self.http.post(path, json=body, headers=headers, params=params)

    async def patch(
        self, path: str, body: Any, *, etag: str | None, key: str | None = FIRST_KEY, **params: Any
    ) -> httpx.Response:
        headers = {**_bearer(key), **({"If-Match": etag} if etag is not None else {})}
        return await self.http.patch(path, json=body, headers=headers, params=params)

    async def delete(self, path: str, *, key: str | None = FIRST_KEY, **params: Any) -> httpx.Response:
        return await self.http.delete(path, params=params, headers=_bearer(key))

    async def draft(self, sale: str = "drop", **changed: Any) -> dict[str, Any]:
        answer = await self.post("/v1/admin/sales", document(sale, **changed))
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def publish(self, sale: str = "drop", **changed: Any) -> dict[str, Any]:
        """A published sale."""
        await self.draft(sale, **changed)
        answer = await self.post(f"/v1/admin/sales/{sale}/publish")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def open_sale(self, sale: str = "drop", **changed: Any) -> dict[str, Any]:
        """A published sale that is open now."""
        times = {"line_opens_at": iso(-20), "opens_at": iso(-10), "draw_freeze_s": 0}
        return await self.publish(sale, **{**times, **changed})

    async def change(self, sale: str, body: dict[str, Any]) -> httpx.Response:
        """PATCH with the ETag as it is now."""
        read = await self.get(f"/v1/admin/sales/{sale}")
        return await self.patch(f"/v1/admin/sales/{sale}", body, etag=read.headers["etag"])

    async def key_of(self, role: str) -> str:
        answer = await self.post("/v1/admin/keys", {"name": f"a {role}", "role": role})
        assert answer.status_code == 201, answer.text
        key: str = answer.json()["key"]
        return key

    async def sql(self, statement: str, **values: Any) -> list[Any]:
        """What somebody does to Postgres by hand."""
        async with self.desk.engine.begin() as conn:
            found = await conn.execute(text(statement), values)
            return list(found.all()) if found.returns_rows else []

    async def redis(self, *command: Any) -> Any:
        return await self.desk.link.call(*command)

    async def close(self) -> None:
        await self.http.aclose()
        self.server.should_exit = True
        await self.task


def _bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


async def open_office(settings: Settings) -> Office:
    app = create_app(settings)
    wire = listen("127.0.0.1", 0, 100, what="office")
    config = uvicorn.Config(
        app,
        ws="none",
        interface="asgi3",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
        timeout_keep_alive=600,
    )
    server = _Quiet(config)
    task = asyncio.create_task(server.serve(sockets=[wire]))
    await until(lambda: server.started or task.done())
    if task.done():
        task.result()
    url = f"http://127.0.0.1:{wire.getsockname()[1]}"
    return Office(app, url, httpx.AsyncClient(base_url=url, timeout=60, trust_env=False), server, task)


@pytest.fixture
def settings(redis_url: str, database_url: str) -> Settings:
    return settings_for(redis_url, database_url)


@pytest.fixture
async def office(settings: Settings) -> AsyncIterator[Office]:
    running = await open_office(settings)
    try:
        yield running
    finally:
        await running.close()


async def write_order(
    office: Office,
    sale: str = "drop",
    *,
    sku: str = "A",
    seq: int = 1,
    buyer: str = "b1",
    state: str = "reserved",
) -> str:
    """An order as confirm writes it: row, line, counters, event; its ticket in Redis says the same."""
    number = orders.order_no(sale, 1, sku, seq, buyer)
    counter = "reserved" if state == "reserved" else "sold"
    await office.sql(
        "INSERT INTO purchase_order (order_no, sale, sku, buyer_id, epoch, seq, units, amount_minor, currency, state,"
        " claimed_at, pay_within_s, paid_at) VALUES (:no, :sale, :sku, :buyer, 1, :seq, 1, 500, 'EUR', :state, now(),"
        " 900, CASE WHEN :paid THEN now() END)",
        no=number, sale=sale, sku=sku, buyer=buyer, seq=seq, state=state, paid=state == "paid",
    )  # fmt: skip
    await office.sql(
        "INSERT INTO order_line (order_no, line_no, kind, sku, title, units, unit_minor, amount_minor)"
        " VALUES (:no, 1, 'item', :sku, 'Thing', 1, 500, 500)",
        no=number, sku=sku,
    )  # fmt: skip
    await office.sql(
        f"UPDATE item SET {counter} = {counter} + 1 WHERE sale = :sale AND sku = :sku", sale=sale, sku=sku
    )
    await office.sql(
        "INSERT INTO event (id, type, sale, order_no, version, data)"
        " VALUES (:id, 'order.reserved', :sale, :no, 1, '{}')",
        id=f"evt-{number}-1-reserved", sale=sale, no=number,
    )  # fmt: skip
    if state == "paid":
        await office.sql(
            "INSERT INTO capture (provider, provider_ref, order_no, amount_minor, currency, state, captured_at)"
            " VALUES ('sandbox', :ref, :no, 500, 'EUR', 'kept', now())",
            ref=f"ref-{number}", no=number,
        )  # fmt: skip
    prefix = f"{{sale:{sale}}}:"
    await office.redis("HINCRBY", f"{prefix}stock", sku, -1)
    await office.redis("SETRANGE", f"{prefix}outcome:{sku}", seq - 1, "r" if state == "reserved" else "p")
    await office.redis("HSET", f"{prefix}item:{sku}", "next_seq", seq + 1, "served", seq)
    return number


async def redis_sale(office: Office, sale: str = "drop") -> dict[str, str]:
    """The `sale` hash as Redis has it."""
    flat = await office.redis("HGETALL", f"{{sale:{sale}}}:sale")
    return {key.decode(): value.decode() for key, value in zip(flat[::2], flat[1::2], strict=True)}


async def stock(office: Office, sale: str = "drop", sku: str = "A") -> int:
    return int(await office.redis("HGET", f"{{sale:{sale}}}:stock", sku))


def sse(raw: str) -> list[dict[str, Any]]:
    """The documents of an event stream."""
    return [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: ")]
