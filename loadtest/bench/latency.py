"""Goal 8: latency under a load that does not wait for answers, and what is left of the throughput when it is too much.

Open loop: requests leave at fixed moments whatever the server does, and latency counts from the intended moment.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from loadtest.bench.door import Door, Sales, doors
from loadtest.bench.machine import cpu_s, pin
from loadtest.bench.requests import Repeated
from loadtest.bench.results import Found, Plan, Sheet, at_least, at_most, spread
from loadtest.bench.rounds import Measure, Void, offered
from loadtest.bench.stack import Shopfront
from loadtest.generator import Result, open_loop

UTILISED = 0.7
OVERLOAD = 1.5
CONNECTIONS = 256
OVERLOAD_CONNECTIONS = 1_024
OVERLOAD_ROUNDS = (
    2  # times the rounds of the others: what is accepted spreads four times as wide as the machine's speed
)
P99_TIMES = 2.0
GOODPUT = 90.0  # per cent of the peak
REFUSED_MS = 20.0
QUANTILES = (0.5, 0.9, 0.99, 0.999)
POLITE = frozenset({202, 429, 503})


@dataclass
class Open:
    """Rounds of one subject under open load."""

    name: str
    per_s: float  # offered
    quantiles_ms: list[list[float]] = field(default_factory=list)  # of each round
    void: str | None = None
    voided: list[str] = field(default_factory=list)  # rounds thrown away: repeated since

    def at(self, q: float) -> list[float]:
        if self.void is not None:
            raise Void(f"{self.name}: {self.void}")
        return [one[QUANTILES.index(q)] for one in self.quantiles_ms]


async def section(shop: Shopfront, sales: Sales, plan: Plan, server: str = "uvicorn") -> Found:
    async with doors(shop, sales, server, 1) as door:
        pin([shop.valkey.pid], shop.pinning.api[0])
        try:
            r1, join = door.subject("r1", plan.seconds), door.subject("join", plan.seconds)
            peak = await Measure(plan.seconds, shop.numbers, plan.say).interleaved(
                [r1, join], [CONNECTIONS], 3
            )
            capacity = {key: peak[key, CONNECTIONS].median("per_s") for key in ("r1", "join")}
            found = await _at_70(door, plan, capacity, server)
            found.add(await _at_150(door, plan, server))
        finally:
            pin([shop.valkey.pid], shop.pinning.rest)
        for sheet in found.sheets:
            sheet.note = str(shop.pinning).replace("everything else", "Redis beside it; the generator")
        return found


async def _at_70(door: Door, plan: Plan, capacity: dict[str, float], server: str) -> Found:
    sales = door.sales
    supplies: dict[str, Callable[[], Iterator[bytes]]] = {"r1": Repeated([sales.same]), "join": sales.claims}
    ports = {"r1": door.r1.port, "join": door.front.port}
    runs = {
        "r1": Open("R1", UTILISED * capacity["r1"]),
        "join": Open("join with a pass", UTILISED * capacity["join"]),
    }

    async def attempt(key: str, per_s: float) -> Result:
        sales.claims.prepare(int(per_s * plan.seconds) + 1 if key == "join" else 0)
        try:
            return await open_loop(
                "127.0.0.1",
                ports[key],
                supplies[key](),
                per_s=per_s,
                connections=CONNECTIONS,
                seconds=plan.seconds,
            )
        finally:
            await door.shop.forget_orders("claims")

    for turn in range(plan.rounds):
        for key, run in runs.items():
            if run.void is not None:
                continue
            plan.say(f"round {turn + 1}/{plan.rounds}: {run.name} at {run.per_s:,.0f} per second")
            try:
                result = await offered(partial(attempt, key, run.per_s), frozenset({200, 202}), run.voided)
            except Void as void:
                run.void = str(void)
                continue
            run.quantiles_ms.append([result.quantile_ms(q) for q in QUANTILES])
    where = f"{server}, 1 front process, open loop at {UTILISED:.0%} of capacity"

    def times() -> dict[str, list[float]]:
        return {
            "p99": [a / b for a, b in zip(runs["join"].at(0.99), runs["r1"].at(0.99), strict=True) if b > 0]
        }

    sheet = Sheet(
        f"Latency at {UTILISED:.0%} of capacity, {server}, from the intended moment of sending",
        ["what", "offered per second", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms"],
    )
    for run in runs.values():
        sheet.rows.append(
            [run.name, f"void: {run.void}"]
            if run.void
            else [run.name, f"{run.per_s:,.0f}", *(spread(run.at(q), 1) for q in QUANTILES)]
        )
    latencies = {
        run.name: [statistics.median(run.at(q)) for q in QUANTILES]
        for run in runs.values()
        if run.void is None
    }
    return Found(
        [at_most(8, "p99 of a join, of R1's at the same utilisation", where, P99_TIMES, times, "×")],
        [sheet],
        {},
        {"latency": {"quantiles": QUANTILES, "ms": latencies}},
    )


async def _at_150(door: Door, plan: Plan, server: str) -> Found:
    """Peak and overload interleaved: goodput is what is accepted in time of what can be accepted at all.

    What can be is the mean of the peaks right before and right after: with refusals at a third of a join's cost, a core
    that is a tenth slower than at the peak accepts a quarter less.

    A client has so many connections and no more. Where answers are slow all of them are busy, and requests wait for one
    in the generator: that is latency too, and the sheet says how many did.
    """
    sales, port = door.sales, door.front.port
    served_by = [*door.front.pids, door.shop.valkey.pid]
    good: list[float] = []
    refused_ms: list[float] = []
    accepted_ms: list[float] = []
    starved: list[float] = []  # per cent of the requests
    spent: list[float] = []  # parts of a core that front and Redis had, of each attempt
    busy: list[float] = []  # the same of those that count, per cent
    refused = 0
    offered_per_s: list[float] = []
    void: str | None = None
    voided: list[str] = []

    async def peak_now() -> float:
        found = await Measure(plan.seconds, door.shop.numbers).interleaved(
            [door.subject("join", plan.seconds)], [CONNECTIONS], 1
        )
        return found["join", CONNECTIONS].median("per_s")

    async def attempt(per_s: float) -> Result:
        sales.claims.prepare(int(per_s * plan.seconds) + 1)
        before = cpu_s(served_by)
        try:
            result = await open_loop(
                "127.0.0.1", port, sales.claims(), per_s=per_s, connections=OVERLOAD_CONNECTIONS,
                seconds=plan.seconds, give_up=True,
            )  # fmt: skip
            spent.append((cpu_s(served_by) - before) / result.seconds)
            return result
        finally:
            await door.shop.forget_orders("claims")

    try:
        peak = await peak_now()
        for turn in range(OVERLOAD_ROUNDS * plan.rounds):
            plan.say(f"round {turn + 1}/{OVERLOAD_ROUNDS * plan.rounds}: {OVERLOAD:.0%} of capacity")
            per_s = OVERLOAD * peak
            result = await offered(partial(attempt, per_s), POLITE, voided)
            before, peak = peak, await peak_now()
            good.append(100 * result.in_time[202] / plan.seconds / statistics.mean((before, peak)))
            offered_per_s.append(per_s)
            busy.append(100 * spent[-1])
            turned = result.statuses[503] + result.statuses[429]
            refused += turned
            starved.append(100 * result.starved / result.due)
            accepted_ms.append(result.quantile_ms(0.99, 202))
            if turned:
                refused_ms.append(result.quantile_ms(0.99, 503, 429))
    except Void as reason:
        void = str(reason)
    where = f"{server}, 1 front process, {OVERLOAD:.0%} offered over {OVERLOAD_CONNECTIONS:,} connections"

    def goodput() -> dict[str, list[float]]:
        if void is not None:
            raise Void(void)
        return {"per second": good}

    found = Found([at_least(8, "joins accepted under overload, of the peak", where, GOODPUT, goodput)])
    if refused_ms and void is None:
        found.verdicts.append(
            at_most(
                8, "p99 of a refusal under overload", where, REFUSED_MS, lambda: {"p99": refused_ms}, "ms"
            )
        )
    if void is None:
        found.sheets.append(
            Sheet(
                f"Too much: {OVERLOAD:.0%} of capacity, {server}, {OVERLOAD_CONNECTIONS:,} connections",
                ["offered per second", "accepted, % of the peak", "accepted p99 ms", "refused p99 ms",
                 "found no free connection, %", "front and Redis, % of their core"],
                [[spread(offered_per_s, 0), spread(good, 0), spread(accepted_ms, 0),
                  spread(refused_ms, 1) if refused_ms else "–", spread(starved, 1), spread(busy, 0)]],
            )
        )  # fmt: skip
    found.lines["overload"] = {
        "goodput_percent": good, "refused": refused, "offered_per_s": offered_per_s, "starved_percent": starved,
        "core_percent": busy, "voided": voided,
    }  # fmt: skip
    return found
