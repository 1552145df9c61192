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
from loadtest.bench.door import Sales, doors
from loadtest.bench.results import Plan
from loadtest.bench.rounds import Measure, ratios
from loadtest.bench.stack import FRONT, Shopfront

CONNECTIONS = 64
BATCHES = 2  # of confirm, a round

# What a figure is about, for the sentence that names it. All are CPU, as multiples of what the limit costs.
STAGES: dict[str, str] = {
    "join": "join: API CPU of a claim, as multiples of an empty answer (R1)",
    "sold-out": "sold out: API CPU of the answer, as multiples of R1",
    "poll": "poll: API CPU of a waiting ticket, as multiples of R1",
    "redis": "line_join: Redis CPU of a claim, as multiples of R1",
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
