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
