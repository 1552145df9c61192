"""Goal 10: what a second front process costs a purchase, and what batching costs when nobody else is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from loadtest.bench.door import JOINS_PER_S_MAX, Sales, known
from loadtest.bench.machine import Pinning, pin
from loadtest.bench.results import Found, Plan, Sheet, at_most, spread
from loadtest.bench.rounds import Measure, Subject, Void, offered, ratios
from loadtest.bench.stack import Server, Shopfront
from loadtest.generator import Result, open_loop

TWO_OF_ONE = 1.1
BATCHING_ADDS_MS = 0.3
LOW_PER_S = 100.0
LOW_SECONDS = 2.0  # 200 joins give a median


async def section(shop: Shopfront, sales: Sales, plan: Plan) -> Found:
    one, two = await shop.front("uvicorn", 1), await shop.front("uvicorn", 2)
    off = await shop.front("uvicorn", 1, batch_max="1", batch_in_flight_max="8")
    try:
        await sales.prepare(one.port)
        for front in (one, two, off):
            await known(front.port, "claims")
        found = await _two(shop, sales, plan, one, two)
        found.add(await _low(sales, plan, one, off))
    finally:
        os.sched_setaffinity(0, shop.pinning.rest)
        for front in (one, two, off):
            shop.drop(front)
    return found


async def _two(shop: Shopfront, sales: Sales, plan: Plan, one: Server, two: Server) -> Found:
    connections = max(plan.connections)

    def ready(rest: tuple[int, ...]) -> Callable[[], Coroutine[Any, Any, None]]:
        async def before() -> None:
            sales.claims.prepare(int(plan.seconds * JOINS_PER_S_MAX))
            pin([shop.valkey.pid, os.getpid()], rest)

        return before

    async def forget() -> None:
        await shop.forget_orders("claims")

    subjects = [
        Subject(f"front-{number}", f"join, {number} front process{'es' if number > 1 else ''}", front.port,
                {"api": front.pids, "redis": [shop.valkey.pid]}, sales.claims, frozenset({202}),
                ready(Pinning.of(number, shop.cores).rest), after=forget)
        for number, front in ((1, one), (2, two))
    ]  # fmt: skip
    courses = await Measure(plan.seconds, shop.numbers, plan.say).interleaved(
        subjects, [connections], plan.rounds
    )
    pin([shop.valkey.pid, os.getpid()], shop.pinning.rest)
    first, second = courses["front-1", connections], courses["front-2", connections]
    where = f"uvicorn, {connections} connections"
    sheet = Sheet(
        "A second front process",
        [
            "what",
            "API µs",
            "Redis µs",
            "both µs",
            "per second",
            "batch",
            "p50 ms",
            "p99 ms",
            "generator",
            "others",
        ],
        note=str(Pinning.of(2, shop.cores)),
    )
    for course in (first, second):
        try:
            sheet.rows.append([
                course.name, *(spread(course.values(role), 1) for role in ("api", "redis", "all_us")),
                spread(course.values("per_s")), f"{course.median('batch'):.0f}", f"{course.median('p50_ms'):.1f}",
                f"{course.median('p99_ms'):.1f}", f"{max(course.values('generator_share')):.0%}",
                f"{max(course.values('others_share')):.0%}",
            ])  # fmt: skip
        except Void as void:
            sheet.rows.append([course.name, f"void: {void}"])
    asked = at_most(
        10, "CPU for a purchase, two front processes against one", where, TWO_OF_ONE,
        lambda: {"front": ratios(second, first, "api"), "with Redis": ratios(second, first, "all_us")}, "×",
    )  # fmt: skip
    return Found([asked], [sheet], {"front processes": [first, second]})


async def _low(sales: Sales, plan: Plan, one: Server, off: Server) -> Found:
    """Open loop, so few joins a second that no two are ever together."""
    p50: dict[str, list[float]] = {"batching": [], "off": []}
    p99: dict[str, list[float]] = {"batching": [], "off": []}
    void: str | None = None

    async def attempt(port: int) -> Result:
        sales.claims.prepare(int(LOW_PER_S * LOW_SECONDS))
        return await open_loop(
            "127.0.0.1", port, sales.claims(), per_s=LOW_PER_S, connections=16, seconds=LOW_SECONDS
        )

    for turn in range(plan.rounds):
        plan.say(f"round {turn + 1}/{plan.rounds}: {LOW_PER_S:.0f} joins a second, batching on and off")
        for name, front in (("batching", one), ("off", off)):
            if void is not None:
                break
            try:
                result = await offered(partial(attempt, front.port), frozenset({202}))
            except Void as reason:
                void = str(reason)
                break
            p50[name].append(result.quantile_ms(0.5))
            p99[name].append(result.quantile_ms(0.99))

    def added() -> dict[str, list[float]]:
        if void is not None:
            raise Void(void)
        return {"p50": [a - b for a, b in zip(p50["batching"], p50["off"], strict=True)]}

    sheet = Sheet(f"{LOW_PER_S:.0f} joins a second, open loop", ["what", "p50 ms", "p99 ms"])
    if void is None:
        for name in p50:
            sheet.rows.append(
                [
                    f"batching {'on' if name == 'batching' else 'off'}",
                    spread(p50[name], 2),
                    spread(p99[name], 2),
                ]
            )
    where = f"uvicorn, 1 front process, {LOW_PER_S:.0f} per second"
    return Found([at_most(10, "batching adds at low load", where, BATCHING_ADDS_MS, added, "ms")], [sheet])
