"""Looks for due rows: often while there are some, seldom after a while without any."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from app.purchase import leased


async def test_looks_are_farther_apart_after_a_while_with_nothing_due_until_something_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leased, "QUIET_LOOKS", 3)
    monkeypatch.setattr(leased, "REST_TIMES", 100)
    stopping, looks, handled = asyncio.Event(), [], []

    async def lease(_room: int) -> list[str]:
        looks.append(time.monotonic())
        if len(looks) == 8:
            stopping.set()
        return ["a row"] if len(looks) == 5 else []

    async def handle(row: str) -> None:
        handled.append(len(looks))

    await leased.work_off("rows", lease, handle, lambda _: 10, stopping, look_every_s=0.01)
    apart_s = [after - before for before, after in itertools.pairwise(looks)]
    assert apart_s[3] >= 1.0  # the fourth look in a row that found nothing
    assert handled == [5]
    assert min(apart_s[4:]) < 1.0  # and then they come soon again


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
