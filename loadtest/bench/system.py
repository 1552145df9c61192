"""Goal 1 once more, of the whole system: `fairdrop up` with the worker writing every claim into Postgres meanwhile.

CPU is counted until the last claim of the round is an order. The front has a core to itself; Redis, worker, Postgres,
office and generator share the other, so requests per second say how much a small machine does, not what the front can.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path

from app.embedded import make_folder
from app.keys import SaleKeys
from app.redis.link import Link
from app.tokens import Keyring
from loadtest.bench.door import JOINS_PER_S_MAX, known
from loadtest.bench.machine import Pinning, family, pin
from loadtest.bench.requests import Joins
from loadtest.bench.results import Found, Plan, Sheet, spread
from loadtest.bench.rounds import Measure, Subject
from loadtest.bench.stack import FIRST_BUYER, redis_numbers
from loadtest.office import Office, read_urls
from loadtest.run import servers

SETTLE_WITHIN_S = 60.0
UNITS = 1_000_000  # the most that an item may have
LOOK_EVERY_S = 0.05  # between two looks at the stream: 20 HGET a second are nothing beside the load
ROUNDS_MAX = 3  # each waits until Postgres has everything


async def section(folder: Path, pinning: Pinning, plan: Plan) -> Found:
    key = secrets.token_urlsafe(48)
    data = folder / "system"
    make_folder(data)
    environment = {
        "FAIRDROP_SIGNING_KEYS": key, "FAIRDROP_ORDERS_BACKLOG_MAX": "10000000", "FAIRDROP_LOG_LEVEL": "warning"
    }  # fmt: skip
    # Starting takes seconds of waiting: in a thread, so that the loop's links stay alive.
    context = servers(data, environment=environment)
    urls_path = await asyncio.to_thread(context.__enter__)
    try:
        return await _measure(urls_path, key, pinning, plan)
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


async def _measure(urls_path: Path, key: str, pinning: Pinning, plan: Plan) -> Found:
    urls = read_urls(urls_path)
    pids: dict[str, int] = urls["pids"]  # type: ignore[assignment]
    for name, pid in pids.items():
        pin(family(pid) if name != "up" else [pid], pinning.api[0] if name == "front" else pinning.rest)
    office = Office(urls["office"], urls["operator_key"])
    sale = await asyncio.to_thread(
        office.hold_sale,
        units=UNITS,
        opens_in_s=0,
        pay_within_s=86_400,
        default_channel=None,
        line_max=5_000_000,
    )
    port = int(urls["front"].rsplit(":", 1)[1])
    await known(port, sale.id)
    joins = Joins(Keyring([key.encode()]), sale.id, int(time.time() * 1000) + 7_200_000, FIRST_BUYER)
    link = Link(urls["redis"], deadline_s=30, name="bench")
    await link.start()
    orders = SaleKeys(sale.id).orders

    backlog = Backlog(link, SaleKeys(sale.id).sale)

    async def ready() -> None:
        backlog.begin()
        joins.prepare(int(plan.seconds * JOINS_PER_S_MAX / 2))

    async def settled() -> None:
        """Every claim so far is an order, and its buyer has been told."""
        begun = time.perf_counter()
        async with asyncio.timeout(SETTLE_WITHIN_S):
            while await link.call("XLEN", orders):  # noqa: ASYNC110  another process empties it
                await asyncio.sleep(0.01)
        backlog.end(time.perf_counter() - begun)

    subject = Subject(
        "system", "join with a pass, and the order in Postgres", port,
        {"api": [pids["front"]], "redis": [pids["valkey"]], "worker": [pids["worker"]],
         "postgres": [pids["postgres"]]},
        joins, frozenset({202}), ready, settled,
    )  # fmt: skip
    watching = asyncio.create_task(backlog.watch())
    try:
        courses = await Measure(plan.seconds, lambda: redis_numbers(link), plan.say).interleaved(
            [subject], plan.connections, min(plan.rounds, ROUNDS_MAX)
        )
        await asyncio.to_thread(office.close, sale.id)
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        await link.close()
    sheet = Sheet(
        "The whole system: the worker confirms meanwhile, CPU until the last order is in Postgres",
        ["connections", "API µs", "Redis µs", "worker µs", "Postgres µs", "all µs", "answered per second",
         "orders per second, to the last one", "p50 ms", "p99 ms", "generator", "others"],
    )  # fmt: skip
    for (_, connections), course in courses.items():
        if course.void is not None:
            sheet.rows.append([str(connections), f"void: {course.void}"])
            continue
        sheet.rows.append([
            str(connections),
            *(spread(course.values(role), 1) for role in ("api", "redis", "worker", "postgres", "all_us")),
            spread(course.values("per_s")),
            spread(course.values("settled_per_s")),
            f"{course.median('p50_ms'):.1f}",
            f"{course.median('p99_ms'):.1f}",
            f"{max(course.values('generator_share')):.0%}",
            f"{max(course.values('others_share')):.0%}",
        ])  # fmt: skip
    waiting = Sheet(
        "Claims on their way meanwhile: what confirm is behind while the line is served at full speed",
        ["most claims on their way", "s until there were none, after the last answer"],
    )
    if backlog.most:
        waiting.rows.append([spread(backlog.most), spread(backlog.drained_s, 2)])
    return Found([], [sheet, waiting], {"system": list(courses.values())})


class Backlog:
    """The claims on their way to Postgres, round by round."""

    def __init__(self, link: Link, sale: str) -> None:
        self._link = link
        self._sale = sale
        self._now = 0
        self.most: list[float] = []
        self.drained_s: list[float] = []

    async def watch(self) -> None:
        while True:
            self._now = max(self._now, int(await self._link.call("HGET", self._sale, "claims_open") or 0))
            await asyncio.sleep(LOOK_EVERY_S)

    def begin(self) -> None:
        self._now = 0

    def end(self, drained_s: float) -> None:
        self.most.append(self._now)
        self.drained_s.append(drained_s)
