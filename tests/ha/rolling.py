"""A rolling restart under a steady load: two front doors behind a balancer, each stopped and started again in turn.

The worker is restarted too. Nothing may fail, and afterwards every join is one ticket and one order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from app.children import answers
from app.demo.crowd import Wires
from app.demo.desk import Desk
from app.errors import Unknown
from tests.chaos.system import Role, System, Zygote
from tests.conftest import Stores
from tests.ha.balancer import Balancer
from tests.story.people import instant

SKU = "PH-128"
FRONTS = ("front1", "front2")
GONE_WITHIN_S = 20.0
STARTS_WITHIN_S = 30.0
ORDERS_WITHIN_S = 20.0


@dataclass
class Told:
    """What came of the load."""

    joins: int = 0
    polls: int = 0
    restarts: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    tickets: dict[str, str] = field(default_factory=dict)  # buyer → token
    took_s: list[float] = field(default_factory=list)  # from SIGTERM to the end of a front door


def free_port() -> int:
    """A port that nobody has now."""
    with contextlib.closing(socket.socket()) as wire:
        wire.bind(("127.0.0.1", 0))
        port: int = wire.getsockname()[1]
        return port


class Load:
    """So many joins a second, and as many polls again for each of them, until `stop`."""

    def __init__(self, url: str, sale: str, told: Told, *, joins_per_s: float) -> None:
        self.wires = Wires(url, connections_max=64, deadline_s=8.0)
        self.sale = sale
        self.told = told
        self.every_s = 1 / joins_per_s
        self._going: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        number, next_at = 0, time.monotonic()
        try:
            while True:
                task = asyncio.create_task(self._buyer(f"b{number}"))
                self._going.add(task)
                task.add_done_callback(self._going.discard)
                number += 1
                next_at += self.every_s
                await asyncio.sleep(max(0.0, next_at - time.monotonic()))
        finally:
            if self._going:
                await asyncio.wait(list(self._going))
            self.wires.close()

    async def _buyer(self, name: str) -> None:
        who = f"X-Buyer-Id: {name}\r\n".encode()
        body = b'{"sku":"%b","units":1}' % SKU.encode()
        answer = await self._ask("join", "POST", f"/v1/sales/{self.sale}/tickets", who, body)
        if answer is None:
            return
        self.told.joins += 1
        token = self.told.tickets[name] = json.loads(answer)["ticket"]
        for _ in range(2):
            await asyncio.sleep(0.3)
            if await self._ask("poll", "GET", f"/v1/tickets/{token}", who) is not None:
                self.told.polls += 1

    async def _ask(
        self, what: str, method: str, path: str, headers: bytes, body: bytes | None = None
    ) -> bytes | None:
        began = time.monotonic()
        try:
            answer = await self.wires.ask(method, path, headers, body)
        except Unknown as error:
            self.told.failed[f"{what}: {error}"] += 1
            return None
        self.told.slowest_s = max(self.told.slowest_s, time.monotonic() - began)
        if answer.status not in (200, 202):
            self.told.failed[f"{what}: {answer.status}"] += 1
            return None
        return answer.body


@contextlib.contextmanager
def installation(zygote: Zygote, stores: Stores, drain_s: float) -> Iterator[System]:
    """Two front doors with ports of their own, a worker, an office, over stores of the tests."""
    folder = Path(tempfile.mkdtemp(prefix="rolling-", dir=stores.home))
    database_url = stores.new_database()
    system = System(
        zygote,
        folder,
        redis_url=stores.valkey.url,
        database_url=database_url,
        environment={"FAIRDROP_DRAIN_S": str(drain_s)},
    )
    one = system.roles.pop("front")
    for name in FRONTS:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        log = folder / f"{name}.log"
        system.roles[name] = Role(name, "front", url, log, None, one.environment, ["--port", str(port)])
    try:
        yield system
    finally:
        system.close()
        stores.drop_database(database_url)


async def restart(system: System, name: str, told: Told) -> None:
    """SIGTERM, wait for the end, start again, wait until it answers."""
    role = system.roles[name]
    assert role.process is not None
    began = time.monotonic()
    system.signal(name, signal.SIGTERM)
    while role.process.is_running():
        assert time.monotonic() - began < GONE_WITHIN_S, f"{name} does not end: {system.last_words(name)}"
        await asyncio.sleep(0.02)
    if role.role == "front":
        told.took_s.append(time.monotonic() - began)
    told.restarts[role.role] += 1
    system.spawn(name)
    if role.url:
        await _serves(system, name)


async def _serves(system: System, name: str) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while not await asyncio.to_thread(answers, system.roles[name].url):
        assert time.monotonic() < deadline, f"{name} does not answer: {system.last_words(name)}"
        await asyncio.sleep(0.02)


async def roll(
    zygote: Zygote, stores: Stores, *, rounds: int, checks: bool, drain_s: float, joins_per_s: float
) -> Told:
    """Restart everything `rounds` times under the load. checks: the balancer asks /readyz."""
    told = Told()
    with installation(zygote, stores, drain_s) as system:
        for name in system.roles:
            system.spawn(name)
        for name in (*FRONTS, "office"):
            await _serves(system, name)
        urls = [system.roles[name].url for name in FRONTS]
        ports = [int(url.rpartition(":")[2]) for url in urls]
        desk = Desk(system.url("office"), system.operator_key)
        sale = f"rolling-{secrets.token_hex(3)}"
        now = time.time()
        item = {"sku": SKU, "title": "Phone", "price_minor": 500, "currency": "CNY", "units": 100_000}
        await desk.post(
            "/v1/admin/sales",
            {"id": sale, "title": "Rolling", "line_opens_at": instant(now - 1), "opens_at": instant(now)}
            | {"closes_at": instant(now + 3_600), "standby": False, "items": [item]},
        )
        await desk.post(f"/v1/admin/sales/{sale}/publish")
        async with Balancer(ports, check_every_s=0.1 if checks else 0.0, keep_s=drain_s * 0.6) as balancer:
            await _is_known(sale, urls)
            load = Load(balancer.url, sale, told, joins_per_s=joins_per_s)
            going = asyncio.create_task(load.run())
            try:
                for _ in range(rounds):
                    for name in (*FRONTS, "worker"):
                        await _more(told, joins_per_s / 2)
                        await restart(system, name, told)
                await _more(told, joins_per_s / 2)
            finally:
                going.cancel()
                await asyncio.gather(going, return_exceptions=True)
            told.failed.update({f"balancer: {why}": count for why, count in balancer.lost.items()})
        orders = await _orders(desk, sale, told.joins)
        assert {order["buyer_id"] for order in orders} == set(told.tickets)
        assert len(orders) == told.joins
        await desk.close()
    return told


async def _more(told: Told, joins: float) -> None:
    """Some steady load between two restarts."""
    wanted, deadline = told.joins + joins, time.monotonic() + GONE_WITHIN_S
    while told.joins < wanted:
        assert time.monotonic() < deadline, told.failed
        await asyncio.sleep(0.05)


async def _is_known(sale: str, urls: list[str]) -> None:
    """Every front door has seen the sale."""
    deadline = time.monotonic() + GONE_WITHIN_S
    for url in urls:
        wires = Wires(url)
        while (await wires.ask("GET", f"/v1/sales/{sale}")).status != 200:
            assert time.monotonic() < deadline, f"{url} never saw the sale"
            await asyncio.sleep(0.02)
        wires.close()


async def _orders(desk: Desk, sale: str, wanted: int) -> list[dict[str, object]]:
    deadline = time.monotonic() + ORDERS_WITHIN_S
    while len(orders := await desk.orders(sale)) < wanted:
        assert time.monotonic() < deadline, f"{len(orders)} orders of {wanted}"
        await asyncio.sleep(0.1)
    return orders
