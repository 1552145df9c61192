"""The short check of `make test`: has a stage of the hot path become dearer, and which one?

CPU only, and only as ratios within one run: on a busy machine answers per second say nothing, CPU for one answer still
does. Bounds are generous (tests/loadtest/bounds.json): the check is there for a stage that doubles, not for one that
gains a tenth; for that there is the benchmark at rest.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtest.bench import confirm
from loadtest.bench.door import JOINS_PER_S_MAX, Sales, doors
from loadtest.bench.latency import OVERLOAD_CONNECTIONS
from loadtest.bench.results import Plan
from loadtest.bench.rounds import Measure, ratios
from loadtest.bench.stack import FRONT, Shopfront
from loadtest.generator import closed_loop, open_loop

CONNECTIONS = 64
PEAK_CONNECTIONS = 256
TOO_MUCH = 2.0  # times the peak
NOT_TOO_MUCH = 0.7  # part of it that nobody accepts who has too much
TRIES = 8
FILLS = 4  # times that the requests without an answer would fill the connections: on a slow machine too
SECONDS_MAX = 10.0
BATCHES = 2  # of confirm, a round

# What a figure is about, for the sentence that names it. All are CPU, as multiples of what the limit costs.
STAGES: dict[str, str] = {
    "join": "join: API CPU of a claim, as multiples of an empty answer (R1)",
    "sold-out": "sold out: API CPU of the answer, as multiples of R1",
    "poll": "poll: API CPU of a waiting ticket, as multiples of R1",
    "redis": "line_join: Redis CPU of a claim, as multiples of R1",
    "accepting": "overload: the peak, as multiples of what is accepted when twice as much comes",
    "refusing": "overload: p50 of a refusal, as multiples of that of an accepted join",
    "waiting": "overload: parts of the requests that found all their client's connections waiting for answers",
    "confirm": "confirm: CPU of an order (worker, Redis, Postgres), as multiples of a row by COPY",
}


async def door_figures(folder: Path, plan: Plan, module: str = FRONT) -> dict[str, float]:
    """Front door and Redis. module: what is run as the front (a test puts a slowed one there)."""
    async with Shopfront(folder) as shop:
        sales = Sales(shop)
        async with doors(shop, sales, "uvicorn", 1, module) as door:
            subjects = [door.subject(key, plan.seconds) for key in ("r1", "join", "sold-out", "poll")]
            courses = await Measure(plan.seconds, shop.numbers, plan.say).interleaved(
                subjects, [CONNECTIONS], plan.rounds
            )
    r1 = courses["r1", CONNECTIONS]
    found = {
        key: statistics.median(ratios(courses[key, CONNECTIONS], r1, "api"))
        for key in ("join", "sold-out", "poll")
    }
    redis, api = courses["join", CONNECTIONS].values("redis"), r1.values("api")
    found["redis"] = statistics.median(a / b for a, b in zip(redis, api, strict=False))
    return found


async def overload_figures(folder: Path, plan: Plan, **settings: str) -> dict[str, float]:
    """Twice as many joins as the front can take, sent at fixed moments. settings: of the front, in lower case.

    The best of the rounds: what else runs on the machine spoils one or another, a mistake of ours all of them.
    """
    found: dict[str, list[float]] = {key: [] for key in ("accepting", "refusing", "waiting")}
    async with Shopfront(folder) as shop:
        front = await shop.front("uvicorn", 1, FRONT, **settings)
        sales = Sales(shop)
        await sales.prepare(front.port)
        for _ in range(TRIES):
            sales.claims.prepare(int(JOINS_PER_S_MAX * plan.seconds))
            result, _ = await closed_loop(
                "127.0.0.1", front.port, sales.claims(), connections=PEAK_CONNECTIONS, seconds=plan.seconds
            )
            peak_per_s = result.per_s  # of this moment: what else runs here comes and goes
            offered = TOO_MUCH * peak_per_s
            # So many more come than are answered that they would fill the connections several times over.
            seconds = min(
                SECONDS_MAX, max(plan.seconds, FILLS * OVERLOAD_CONNECTIONS / (offered - peak_per_s))
            )
            sales.claims.prepare(int(offered * seconds) + 1)
            result = await open_loop(
                "127.0.0.1", front.port, sales.claims(), per_s=offered, connections=OVERLOAD_CONNECTIONS,
                seconds=seconds, give_up=True,
            )  # fmt: skip
            await shop.forget_orders("claims")
            accepted_per_s = result.in_time[202] / seconds
            if accepted_per_s > NOT_TOO_MUCH * offered:  # the peak was measured in a bad moment
                continue
            found["accepting"].append(peak_per_s / max(1.0, accepted_per_s))
            found["refusing"].append(result.quantile_ms(0.5, 503) / max(0.1, result.quantile_ms(0.5, 202)))
            found["waiting"].append(result.starved / (result.answers + result.unsent))
            if len(found["waiting"]) >= plan.rounds:
                break
    return {key: min(values) for key, values in found.items()}


async def confirm_figure(folder: Path, plan: Plan) -> dict[str, float]:
    found = await confirm.section(folder, plan, BATCHES)
    if found.void:
        raise RuntimeError("; ".join(found.void))
    taken: dict[str, Any] = found.lines["confirm"]

    def cost(name: str) -> float:
        return float(sum(statistics.median(values) for values in taken[name]["cpu_us"].values()))

    return {"confirm": cost("confirm") / cost("copy")}


def worse(figures: Mapping[str, float], bounds: Mapping[str, float]) -> list[str]:
    """One sentence for each stage above its bound. KeyError: a stage without a bound."""
    return [
        f"{STAGES[stage]}: {value:.2f}, at most {bounds[stage]:.2f} is expected"
        for stage, value in figures.items()
        if value > bounds[stage]
    ]


def read_bounds(path: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["bounds"]
    return found
