"""Goals 1, 4 and 5: what a join, a sold-out answer, a poll and the board cost the front door alone, against R1 and R2.

No worker runs: what is measured is HTTP, the front's own work and Redis with appendfsync always.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from loadtest.bench.requests import Joins, Repeated, ask_all, request, tickets
from loadtest.bench.results import Found, Plan, Verdict, at_least, at_most, course_sheet, percent
from loadtest.bench.rounds import Course, Measure, Subject, ratios
from loadtest.bench.stack import FRONT, Server, Shopfront

SAMPLE = 2_000  # tickets that are polled, buyers who are told sold out
FAR_S = 3_600.0  # until the sale with a draw would open: it is opened when its sample has joined
SEEN_WITHIN_S = 0.5  # every front has seen a change: it looks ten times a second
JOINS_PER_S_MAX = 40_000  # no server here reaches it: a round does not run out of buyers

SUBJECTS: dict[str, str] = {
    "r1": "R1: empty raw-ASGI POST",
    "r2": "R2: empty FastAPI POST with a model",
    "join": "join with a pass: a unit is claimed",
    "wait": "join with a pass: a place in the line",
    "sold-out": "join with a pass: sold out",
    "poll": "poll of a waiting ticket",
    "drawn": "poll of a waiting ticket that was drawn",
    "board": "board, If-None-Match (304)",
    "board-200": "board, whole (200)",
}
DEFAULT = ("r1", "r2", "join", "sold-out", "poll", "drawn", "board")


class Sales:
    """The sales that the subjects are about, published once."""

    def __init__(self, shop: Shopfront) -> None:
        self.shop = shop
        self.polls: dict[str, list[bytes]] = {}
        self.prepared = False

    async def prepare(self, port: int) -> None:
        """Once; if it failed before, RuntimeError says so."""
        if self.prepared:
            await known(port, "claims")
            return
        if "claims" in self.shop.versions:
            raise RuntimeError("the sales could not be prepared: see the first section that needed them")
        shop = self.shop
        self.claims = await shop.publish("claims", units=1_000_000_000)
        self.line = await shop.publish("line", units=1, standby=True)
        gone = await shop.publish("gone", units=1)
        drawn = await shop.publish("drawn", units=1, standby=True, opens_in_s=FAR_S, rate_milli=1)
        await known(port, "drawn")
        early = await tickets(port, drawn, SAMPLE)
        now_ms = int(time.time() * 1000)
        await shop.switch("drawn", opens_ms=now_ms - 1, freeze_ms=now_ms - 1)
        await shop.advance("drawn")
        await tickets(port, self.line, 1)  # takes the unit
        waiting = await tickets(port, self.line, SAMPLE)
        self.polls = {"poll": polls_of(waiting), "drawn": polls_of(early)}
        await tickets(port, gone, 1)
        self.gone = gone.take(SAMPLE)
        # As many bytes as a join has: the limit reads them too.
        self.same = self.claims.make().replace(b"/v1/sales/claims/tickets", b"/r2", 1)
        await asyncio.sleep(SEEN_WITHIN_S)
        self.prepared = True


def polls_of(tickets: Sequence[dict[str, str]]) -> list[bytes]:
    return [request("GET", f"/v1/tickets/{one['ticket']}") for one in tickets]


async def known(port: int, sale: str) -> None:
    """Return when the front on this port has seen the sale."""
    deadline = time.monotonic() + 5
    while True:
        try:
            await ask_all(port, [request("GET", f"/v1/sales/{sale}/board")], 1)
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


async def etag_of(port: int, path: str) -> bytes:
    """The validator of a document, for If-None-Match."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request("GET", path))
        head = await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"etag":
            return value.strip()
    raise RuntimeError(f"{path} has no ETag")


class Door:
    """R1, R2 and one kind of front door, on one server program, and the subjects measured on them."""

    def __init__(self, shop: Shopfront, sales: Sales, front: Server, r1: Server, r2: Server) -> None:
        self.shop = shop
        self.sales = sales
        self.front = front
        self.r1 = r1
        self.r2 = r2

    def subject(self, key: str, seconds: float) -> Subject:
        """One of SUBJECTS; seconds: of a round, so that enough buyers are ready."""
        sales, shop = self.sales, self.shop
        ours = {"api": self.front.pids, "redis": [shop.valkey.pid]}
        same = Repeated([sales.same])
        name = SUBJECTS[key]
        ok = frozenset({200})

        def joins(supply: Joins, sale: str) -> Subject:
            async def ready() -> None:
                supply.prepare(int(seconds * JOINS_PER_S_MAX))

            async def forget() -> None:
                await shop.forget_orders(sale)

            subject = Subject(key, name, self.front.port, ours, supply, frozenset({202}), ready)
            if sale == "claims":
                subject.after = forget
            return subject

        match key:
            case "r1":
                return Subject(key, name, self.r1.port, {"api": self.r1.pids}, same, ok)
            case "r2":
                return Subject(key, name, self.r2.port, {"api": self.r2.pids}, same, ok)
            case "join":
                return joins(sales.claims, "claims")
            case "wait":
                return joins(sales.line, "line")
            case "sold-out":
                return Subject(key, name, self.front.port, ours, Repeated(sales.gone), ok)
            case "poll" | "drawn":
                return Subject(key, name, self.front.port, ours, Repeated(sales.polls[key]), ok)
            case "board" | "board-200":
                path, board = "/v1/sales/claims/board", Repeated([b""])
                found = Subject(key, name, self.front.port, ours, board, ok)
                if key == "board":
                    found.expects = frozenset({304})

                async def renew() -> None:
                    tag = b"If-None-Match: %b\r\n" % await etag_of(self.front.port, path)
                    board.requests = [request("GET", path, tag if key == "board" else b"")]

                found.before = renew
                return found
            case _:
                raise ValueError(key)


@asynccontextmanager
async def doors(
    shop: Shopfront, sales: Sales, server: str, workers: int, module: str = FRONT
) -> AsyncIterator[Door]:
    """R1, R2 and a front on this server program with so many processes each."""
    front = await shop.front(server, workers, module)
    await sales.prepare(front.port)
    r1 = await shop.peer("limits:r1", server, workers)
    r2 = await shop.peer("limits:r2", server, workers, "/r2")
    try:
        yield Door(shop, sales, front, r1, r2)
    finally:
        for one in (front, r1, r2):
            shop.drop(one)


@dataclass(frozen=True)
class Case:
    """What one subject must reach, in per cent of R1, at each number of connections (0: at any)."""

    goal: int
    key: str
    of_r1: dict[int, float]


CASES = (
    Case(1, "join", {256: 75, 64: 60}),
    Case(4, "sold-out", {0: 80}),
    Case(5, "poll", {0: 85}),
    Case(5, "drawn", {0: 80}),
    Case(5, "board", {0: 93}),
)
OF_R2 = 250  # per cent, a join at 256 connections
SOLD_OUT_REDIS_US = 2.0
COMMANDS_OF_A_POLL = 0.01  # above what an idle front asks for: none, and room for the clock of the snapshot


async def section(
    shop: Shopfront, sales: Sales, plan: Plan, server: str, workers: int, keys: Collection[str]
) -> Found:
    """The figures and verdicts of one server program; R1 and R2 are always among the subjects."""
    wanted = [key for key in SUBJECTS if key in {"r1", "r2"} or key in keys]
    async with doors(shop, sales, server, workers) as door:
        subjects = [door.subject(key, plan.seconds) for key in wanted]
        courses = await Measure(plan.seconds, shop.numbers, plan.say).interleaved(
            subjects, plan.connections, plan.rounds
        )
    found = Found()
    title = f"{server}, {workers} front process{'es' if workers > 1 else ''}"
    for connections in plan.connections:
        where = f"{title}, {connections} connections"
        here = [courses[key, connections] for key in wanted]
        found.courses[where] = here
        limit, plain = courses["r1", connections], courses["r2", connections]
        found.sheets.append(course_sheet(where, here, limit, plain))
        if workers == 1:
            found.verdicts += verdicts({course.subject: course for course in here}, where)
    return found


def verdicts(courses: dict[str, Course], where: str) -> list[Verdict]:
    """Goals 1, 4 and 5 for one server program at one number of connections."""
    r1, r2 = courses["r1"], courses["r2"]
    found: list[Verdict] = []
    for case in CASES:
        course = courses.get(case.key)
        need = case.of_r1.get(course.connections, case.of_r1.get(0)) if course is not None else None
        if course is None or need is None:
            continue

        def of_r1(course: Course = course) -> dict[str, list[float]]:
            return {
                "by CPU": percent(ratios(course, r1, "api", inverse=True)),
                "per second": percent(ratios(course, r1)),
            }

        found.append(at_least(case.goal, f"{course.name}, of R1", where, need, of_r1))
    if "join" in courses and r1.connections == 256:
        join = courses["join"]
        found.append(
            at_least(1, f"{join.name}, of R2", where, OF_R2, lambda: {
                "by CPU": percent(ratios(join, r2, "api", inverse=True)), "per second": percent(ratios(join, r2))
            })
        )  # fmt: skip
    if "sold-out" in courses:
        gone = courses["sold-out"]
        found.append(
            at_most(4, f"{gone.name}, Redis CPU", where, SOLD_OUT_REDIS_US,
                    lambda: {"by used_cpu": gone.values("redis_used_us")}, "µs a buyer")
        )  # fmt: skip
    if "poll" in courses:
        poll = courses["poll"]

        def commands() -> dict[str, list[float]]:
            idle = r1.values(
                "commands_per_s"
            )  # the front looks at its sales ten times a second, polled or not
            asked = poll.values("commands_per_s")
            return {
                "": [max(0.0, a - b) / n for a, b, n in zip(asked, idle, poll.values("per_s"), strict=False)]
            }

        found.append(
            at_most(
                5, "Redis commands for a poll of a waiting ticket", where, COMMANDS_OF_A_POLL, commands, ""
            )
        )
    return found
