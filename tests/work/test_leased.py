"""Works off due rows when a bell says that there are some."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from app.work import leased
from app.work.lookout import Lookout
from tests.providers.server import until


class Rows:
    """What is due, in memory, and how often it was asked for."""

    def __init__(self, *due: str) -> None:
        self.due, self.asked, self.handled = list(due), 0, list[str]()
        self.stopping, self.bell = asyncio.Event(), asyncio.Event()

    async def lease(self, room: int) -> list[str]:
        self.asked += 1
        taken, self.due = self.due[:room], self.due[room:]
        return taken

    async def handle(self, row: str) -> None:
        self.handled.append(row)

    @contextlib.asynccontextmanager
    async def at_work(self, room: Callable[[int], int]) -> AsyncIterator[None]:
        # An engine that is never asked: only `wrote` is used.
        lookout = Lookout(create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/none"))
        working = asyncio.create_task(
            leased.work_off("rows", self.lease, self.handle, room, self.stopping, lookout, self.bell)
        )
        try:
            yield
        finally:
            self.stopping.set()
            await asyncio.wait_for(working, 180)


async def test_nothing_is_asked_for_until_the_bell_rings_and_then_all_that_is_due_is_taken() -> None:
    rows = Rows()
    async with rows.at_work(lambda running: 2 - running):
        await asyncio.sleep(0)
        assert rows.asked == 0
        rows.due = list("abcde")
        rows.bell.set()
        await until(lambda: len(rows.handled) == 5)
        await until(lambda: not rows.bell.is_set())
        asked = rows.asked
        for _ in range(100):
            await asyncio.sleep(0)
        assert rows.asked == asked


async def test_a_bell_that_rings_while_there_is_no_room_is_not_forgotten() -> None:
    """A breaker is open: rows stay due, nothing is asked for, and once it closes they are taken."""
    rows, room = Rows("a"), 0
    async with rows.at_work(lambda _: room):
        rows.bell.set()
        for _ in range(100):
            await asyncio.sleep(0)
        assert rows.asked == 0
        room = 1
        await until(lambda: rows.handled == ["a"])


async def test_a_look_that_fails_is_made_again_without_a_bell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leased, "DATABASE_DOWN_S", 0.01)
    rows, failures = Rows("a"), 3
    lease = rows.lease

    async def fails(room: int) -> list[str]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise ConnectionRefusedError("no Postgres")
        return await lease(room)

    rows.lease = fails  # type: ignore[method-assign]
    async with rows.at_work(lambda _: 10):
        rows.bell.set()
        await until(lambda: rows.handled == ["a"])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def taken(pace: leased.Pace, clock: Clock, seconds: float, due: int) -> int:
    """Rows that one look each 0.1 s takes within so many seconds, where `due` are due."""
    found = 0
    for _ in range(round(seconds / 0.1)):
        clock.now += 0.1
        room = pace.room()
        if room:
            count = min(room, due - found)
            pace.took(count, room)
            found += count
    return found


def test_what_falls_due_at_once_is_taken_a_bounded_number_at_a_time_and_a_long_queue_is_worked_off_faster() -> (
    None
):
    clock = Clock()
    pace = leased.Pace(20.0, clock)
    clock.now += 3_600.0  # a quiet hour saves nothing
    assert 18 <= taken(pace, clock, 1.0, 10_000) <= 30
    pace = leased.Pace(1_000.0, clock)
    assert taken(pace, clock, 16.0, 100_000) > 25_000


def test_after_a_look_that_found_less_the_pace_begins_anew() -> None:
    clock = Clock()
    pace = leased.Pace(20.0, clock)
    for _ in range(50):
        clock.now += 0.1
        pace.took(room := pace.room(), room)
    clock.now += 0.1
    room = pace.room()
    assert room > 4
    pace.took(room - 1, room)
    assert 18 <= taken(pace, clock, 1.0, 10_000) <= 30
