"""Goals 7 and 9: what a waiting buyer takes in memory, and whether anything costs more when ten million wait.

Lines of 10⁴, 10⁵, … waiting buyers with integer ids exist side by side, so that joins and polls of all of them are
measured in turn within the same seconds. They are made by `line_join` itself, a thousand buyers a call.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import time
from collections.abc import Sequence

from app.answers import Joined, Waits
from app.keys import SaleKeys
from app.scripts import LINE_ADVANCE, SALE_SWITCH
from app.settings import Settings
from loadtest.bench.door import JOINS_PER_S_MAX, known, polls_of
from loadtest.bench.machine import resident_bytes
from loadtest.bench.requests import SKU, Joins, Repeated, tickets
from loadtest.bench.results import Found, Plan, Sheet, at_most, spread
from loadtest.bench.rounds import Course, Measure, Subject, Void, ratios
from loadtest.bench.stack import BACKLOG_MAX, Server, Shopfront
from loadtest.generator import closed_loop

SMALLEST = 10_000
BATCH = 1_000
IN_FLIGHT = 4
SAMPLE = 500  # tickets polled in each line
WAITER_BYTES = 100.0
FRONT_BYTES = 1.0  # for each waiter: none, and what a megabyte of noise is of a million
FLAT = 10.0  # per cent
LUA_MS = 1.0
CALLS_MAX = 1_000  # of line_join; fewer where they would make the line longer by more than a quarter
PROBED = 8_000_000_000  # the first of the buyers in them: nobody else has such an id
PAUSES = 5


def sizes(largest: int) -> list[int]:
    """10⁴, 10⁵, … up to the largest."""
    found = [SMALLEST]
    while found[-1] * 10 <= largest:
        found.append(found[-1] * 10)
    return found


def power(size: int) -> str:
    return "10" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(len(str(size)) - 1))


async def wait_together(shop: Shopfront, sale: str, first: int, size: int) -> None:
    """Let so many buyers, with ids from `first` on, take places in the line by one call. RuntimeError: one got none."""
    hashes = os.urandom(10 * size)
    buyers = [(b"%d" % (first + n), 1, False, hashes[10 * n : 10 * n + 10]) for n in range(size)]
    answer = await shop.scripts.line_join(
        sale=sale, epoch=1, sku=SKU, skus=[SKU], buyers=buyers, backlog_max=BACKLOG_MAX
    )
    if not isinstance(answer, Joined):
        raise RuntimeError(f"{sale}: {answer}")
    for one in answer.answers:
        if type(one) is not Waits:
            raise RuntimeError(f"{sale}: {one}")


async def fill(shop: Shopfront, sale: str, first: int, count: int) -> float:
    """Let so many buyers wait in the line of this sale; returns seconds. RuntimeError: one got no place."""
    gate = asyncio.Semaphore(IN_FLIGHT)
    began = time.perf_counter()

    async def batch(at: int, size: int) -> None:
        try:
            await wait_together(shop, sale, at, size)
        finally:
            gate.release()

    # Filling is not what is measured: it need not wait for the disk. What is measured does.
    await shop.link.call("CONFIG", "SET", "appendfsync", "everysec")
    try:
        async with asyncio.TaskGroup() as group:
            for at in range(0, count, BATCH):
                await gate.acquire()
                group.create_task(batch(first + at, min(BATCH, count - at)))
    finally:
        await shop.link.call("CONFIG", "SET", "appendfsync", "always")
    return time.perf_counter() - began


async def used_memory(shop: Shopfront) -> int:
    info = bytes(await shop.link.call("INFO", "memory")).decode()
    return int(next(line for line in info.splitlines() if line.startswith("used_memory:")).split(":")[1])


class Line:
    """One sale with so many who wait, and nobody is served: one ticket in a thousand seconds."""

    def __init__(self, shop: Shopfront, size: int) -> None:
        self.shop = shop
        self.size = size
        self.sale = f"grow-{size}"
        self.bytes_each = 0.0
        self.fill_s = 0.0

    async def make(self, front: Server) -> None:
        shop = self.shop
        self.joins: Joins = await shop.publish(self.sale, units=10, rate_milli=1)
        await known(front.port, self.sale)
        await tickets(front.port, self.joins, 2)  # what a full bucket may give is given
        before = await used_memory(shop)
        self.fill_s = await fill(shop, self.sale, 1_000_000_000 + self.size, self.size)
        self.bytes_each = (await used_memory(shop) - before) / self.size
        told = await tickets(front.port, self.joins, SAMPLE)
        # A real join sees them all: that is the proof that they are there.
        far = [one for one in told if one["state"] != "waiting" or one["ahead"] < self.size - 10]
        if far:
            raise RuntimeError(f"{self.sale}: a join after {self.size} others was told {far[0]}")
        self.polls = polls_of(told)

    def subjects(self, front: Server, seconds: float) -> list[Subject]:
        pids = {"api": front.pids, "redis": [self.shop.valkey.pid]}

        async def ready() -> None:
            self.joins.prepare(int(seconds * JOINS_PER_S_MAX))

        wait = Subject(f"join-{self.size}", f"join, {power(self.size)} wait", front.port, pids, self.joins,
                       frozenset({202}), ready)  # fmt: skip
        poll = Subject(f"poll-{self.size}", f"poll, {power(self.size)} wait", front.port, pids,
                       Repeated(self.polls), frozenset({200}))  # fmt: skip
        return [wait, poll]


async def section(shop: Shopfront, plan: Plan) -> Found:
    front = await shop.front("uvicorn", 1)
    lines = [Line(shop, size) for size in sizes(plan.growth_max)]
    try:
        # Warm: a process has its caches and its arenas before its growth is looked at.
        await lines[0].make(front)
        await _polls(front, lines[0])
        before = sum(resident_bytes(pid) for pid in front.pids)
        for line in lines[1:]:
            plan.say(f"{line.size:,} buyers join …")
            await line.make(front)
        await _polls(front, lines[-1])
        grown = sum(resident_bytes(pid) for pid in front.pids) - before
        connections = plan.connections[0]
        subjects = [subject for line in lines for subject in line.subjects(front, plan.seconds)]
        courses = await Measure(plan.seconds, shop.numbers, plan.say).interleaved(
            subjects, [connections], plan.rounds
        )
        lua = await _lua(shop, lines[-1])
        switches = [await _switches(shop, lines[0]), await _switches(shop, lines[-1])]
    finally:
        shop.drop(front)
    found = _memory(lines, grown)
    found.add(_flat(lines, {key: course for (key, _), course in courses.items()}, connections))
    found.add(_scripts(lines, lua, switches))
    return found


async def _polls(front: Server, line: Line) -> None:
    await closed_loop("127.0.0.1", front.port, Repeated(line.polls)(), connections=64, seconds=0.5)


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory(lines: Sequence[Line], grown: int) -> Found:
    largest = lines[-1]
    added = sum(line.size for line in lines[1:]) or largest.size
    where = f"{power(largest.size)} wait, integer ids"
    sheet = Sheet("Memory", ["waiting", "Redis bytes each", "joined a second by the loader"])
    sheet.rows = [
        [f"{line.size:,}", f"{line.bytes_each:.1f}", f"{line.size / line.fill_s:,.0f}"] for line in lines
    ]
    return Found(
        [
            at_most(7, "Redis memory for a waiting buyer", where, WAITER_BYTES,
                    lambda: {"used_memory": [largest.bytes_each]}, "bytes"),
            at_most(7, "memory of a front process for a waiting buyer", where, FRONT_BYTES,
                    lambda: {"private memory": [grown / added]}, "bytes"),
        ],
        [sheet],
        {},
        {"memory": {line.size: line.bytes_each for line in lines}, "front_bytes": grown / added},
    )  # fmt: skip


# --- CPU -------------------------------------------------------------------------------------------------------------


def _flat(lines: Sequence[Line], courses: dict[str, Course], connections: int) -> Found:
    found = Found()
    where = f"uvicorn, 1 front process, {connections} connections"
    sheet = Sheet(
        "Growth: the same join and the same poll, ever more waiting",
        ["what", "API µs", "Redis µs", "per second", "p99 ms", "generator", "others"],
    )
    for what in ("join", "poll"):
        mine = [courses[f"{what}-{line.size}"] for line in lines]
        found.courses[f"growth, {what}"] = mine
        for course in mine:
            if course.void is not None:
                sheet.rows.append([course.name, f"void: {course.void}"])
                continue
            sheet.rows.append([
                course.name, spread(course.values("api"), 1), spread(course.values("redis"), 1),
                spread(course.values("per_s")), f"{course.median('p99_ms'):.1f}",
                f"{max(course.values('generator_share')):.0%}", f"{max(course.values('others_share')):.0%}",
            ])  # fmt: skip
        for course, line in zip(mine[1:], lines[1:], strict=True):

            def change(course: Course = course, least: Course = mine[0]) -> dict[str, list[float]]:
                return {"CPU, Redis included": [100 * (one - 1) for one in ratios(course, least, "all_us")]}

            found.verdicts.append(
                at_most(9, f"CPU for a {what}, {power(line.size)} against {power(SMALLEST)} waiting", where, FLAT,
                        change, "% more")
            )  # fmt: skip
    found.sheets.append(sheet)
    return found


# --- scripts ---------------------------------------------------------------------------------------------------------


def _sha(script: object) -> str:
    sha: str = script.sha  # type: ignore[attr-defined]
    return sha


async def _slow(shop: Shopfront) -> list[tuple[str, int]]:
    """(sha, µs) of every script call since the last reset."""
    entries = await shop.link.call("SLOWLOG", "GET", -1)
    return [
        (bytes(entry[3][1]).decode(), int(entry[2]))
        for entry in entries
        if bytes(entry[3][0]).upper() == b"EVALSHA"
    ]


async def _watch(shop: Shopfront) -> None:
    await shop.link.pipeline([
        ["CONFIG", "SET", "slowlog-log-slower-than", "0", "slowlog-max-len", "128"], ["SLOWLOG", "RESET"]
    ])  # fmt: skip


async def _unwatch(shop: Shopfront) -> None:
    await shop.link.pipeline([["CONFIG", "SET", "slowlog-log-slower-than", "-1"], ["SLOWLOG", "RESET"]])


async def _lua(shop: Shopfront, line: Line) -> tuple[int, float]:
    """(calls, p99 in ms) of line_join while full batches join the longest line, one after the other.

    By Redis' own histogram. SLOWLOG would copy the arguments of each call, which by itself took more than the script.
    Sent from here, one at a time: the histogram counts the clock, so a crowd on Redis' core would be counted with it.
    """
    size = Settings.model_fields["batch_max"].default
    await shop.link.call("CONFIG", "RESETSTAT")
    for turn in range(min(CALLS_MAX, line.size // 4 // size)):
        await wait_together(shop, line.sale, PROBED + turn * size, size)
    told = b"".join(await shop.link.pipeline([["INFO", "commandstats"], ["INFO", "latencystats"]])).decode()
    calls = re.search(r"cmdstat_evalsha:calls=(\d+)", told)
    p99_us = re.search(r"latency_percentiles_usec_evalsha:.*p99=([\d.]+)", told)
    return (int(calls[1]), float(p99_us[1]) / 1000) if calls and p99_us else (0, 0.0)


async def _switches(shop: Shopfront, line: Line) -> dict[str, float]:
    """ms of Redis for what an operator does to a line of this length."""
    found: dict[str, float] = {}

    async def timed(what: str, script: object, *, advance: bool = False, **changes: str | int) -> None:
        if changes:
            await shop.switch(line.sale, **changes)
        if advance:
            await shop.advance(line.sale)
        slow = [us / 1000 for sha, us in await _slow(shop) if sha == _sha(script)]
        if not slow:
            raise Void(f"{what}: the script was not seen in SLOWLOG")
        found[what] = statistics.median(slow)
        await shop.link.call("SLOWLOG", "RESET")

    await _watch(shop)
    try:
        for turn in range(
            2 * PAUSES - 1
        ):  # all but the last pair, so that the median has something to choose from
            await shop.switch(line.sale, paused=turn % 2)
        await timed("pause and resume", SALE_SWITCH, paused=0)
        # All that is left is sold in one tick, and with it everyone behind is told, by one comparison.
        await timed("sell out", LINE_ADVANCE, advance=True, rate_milli=-1)
        dead = await shop.link.call("HGET", SaleKeys(line.sale).item(SKU), "dead_seq")
        if int(dead or 0) < line.size:
            raise Void(f"{line.sale} did not sell out: dead_seq is {dead!r}")
        await timed("close", SALE_SWITCH, closed=1, state_word="closed")
    finally:
        await _unwatch(shop)
    return found


def _scripts(lines: Sequence[Line], lua: tuple[int, float], switches: Sequence[dict[str, float]]) -> Found:
    calls, p99_ms = lua
    largest = power(lines[-1].size)
    sheet = Sheet(
        "Operators and long lines: ms of Redis", ["what", f"{power(lines[0].size)} wait", f"{largest} wait"]
    )
    sheet.rows = [[what, *(f"{one[what]:.3f}" for one in switches)] for what in switches[0]]

    def p99() -> dict[str, list[float]]:
        if not calls:
            raise Void("no line_join was seen")
        return {"p99": [p99_ms]}

    return Found(
        [
            at_most(9, f"one line_join call, {largest} wait", f"{calls:,} full batches in a row", LUA_MS, p99, "ms"),
            at_most(9, f"pause, sell out or close, {largest} wait", "the slowest script call", LUA_MS,
                    lambda: {"": [max(switches[-1].values())]}, "ms"),
        ],
        [sheet],
    )  # fmt: skip
