"""Goals 2 and 3: a purchase here against the naive one, against Postgres alone, and against one script call each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from app.embedded import Postgres
from loadtest.bench.door import Door, Sales, doors
from loadtest.bench.machine import on_cores
from loadtest.bench.requests import BODY, request
from loadtest.bench.results import Found, Plan, Verdict, at_least, at_most, course_sheet, percent
from loadtest.bench.rounds import Course, Measure, Subject, ratios
from loadtest.bench.stack import Shopfront

NAIVE_TIMES = 6.0
POSTGRES_TIMES = 10.0
REDIS_OF_ONE_CALL = 20.0  # per cent
BATCH_MIN = 32  # mean batch that goal 3 is about
CONNECTIONS = (64, 256)
# One call each makes everyone wait: it must not turn away those whom it is measured on.
PATIENT = {"join_wait_max_ms": "60000", "overload_wait_max_ms": "0"}


class Purchases:
    """POST /buy, each of another buyer."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1_000_000_001)

    def __call__(self) -> Iterator[bytes]:
        for number in self._numbers:
            yield request("POST", "/buy", b"X-Buyer-Id: %d\r\n" % number, BODY)


async def section(shop: Shopfront, sales: Sales, plan: Plan) -> Found:
    """All on uvicorn, one process each, interleaved."""
    postgres = Postgres(shop.folder / "peer-postgres", "bench", log_path=shop.folder / "peer-postgres.log")
    with on_cores(shop.pinning.rest):
        postgres.start()
    try:
        async with doors(shop, sales, "uvicorn", 1) as door:
            # The same script for a batch of one: what the batch saves, all else equal.
            single = await shop.front("uvicorn", 1, batch_max="1", batch_in_flight_max="8", **PATIENT)
            naive = await shop.peer("naive:app", path="/buy")
            alone = await shop.peer("postgres_only:app", path="/buy", FAIRDROP_DATABASE_URL=postgres.url)
            subjects = [
                door.subject("r1", plan.seconds),
                door.subject("r2", plan.seconds),
                door.subject("join", plan.seconds),
                _single(door, single.port, single.pids, plan.seconds),
                Subject("naive", "naive: FastAPI, one EVALSHA each", naive.port,
                        {"api": naive.pids, "redis": [shop.valkey.pid]}, Purchases(), frozenset({202})),
                Subject("postgres-only", "Postgres only: UPDATE + INSERT", alone.port,
                        {"api": alone.pids, "postgres": [postgres.pid]}, Purchases(), frozenset({202})),
            ]  # fmt: skip
            courses = await Measure(plan.seconds, shop.numbers, plan.say).interleaved(
                subjects,
                [one for one in CONNECTIONS if one in plan.connections] or plan.connections,
                plan.rounds,
            )
            for one in (single, naive, alone):
                shop.drop(one)
    finally:
        postgres.stop()
    found = Found()
    for connections in dict.fromkeys(number for _, number in courses):
        here = {key: course for (key, number), course in courses.items() if number == connections}
        where = f"uvicorn, 1 front process, {connections} connections"
        found.courses[f"peers, {connections} connections"] = list(here.values())
        found.sheets.append(
            course_sheet(f"A purchase and its peers, {where}", list(here.values()), here["r1"], here["r2"])
        )
        found.verdicts += verdicts(here, where)
    return found


def _single(door: Door, port: int, pids: list[int], seconds: float) -> Subject:
    subject = door.subject("join", seconds)
    subject.key, subject.name = "single", "join, batches of one (line_join each)"
    subject.port, subject.pids = port, {"api": pids, "redis": [door.shop.valkey.pid]}
    return subject


def verdicts(courses: dict[str, Course], where: str) -> list[Verdict]:
    join = courses["join"]
    found = []
    for key, need in (("naive", NAIVE_TIMES), ("postgres-only", POSTGRES_TIMES)):
        peer = courses[key]

        def times(peer: Course = peer) -> dict[str, list[float]]:
            return {
                "by CPU, stores included": ratios(join, peer, "all_us", inverse=True),
                "per second": ratios(join, peer),
            }

        found.append(at_least(2, f"purchase against {peer.name}", where, need, times, "×"))
    if join.rounds and join.median("batch") >= BATCH_MIN:
        for key in ("naive", "single"):
            peer = courses[key]

            def share(peer: Course = peer) -> dict[str, list[float]]:
                return {"by CPU": percent(ratios(join, peer, "redis"))}

            what = f"Redis CPU of a purchase, mean batch {join.median('batch'):.0f}, of {peer.name}"
            found.append(at_most(3, what, where, REDIS_OF_ONE_CALL, share))
    return found
