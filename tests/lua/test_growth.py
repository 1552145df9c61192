"""A long line costs what a short one costs: 10⁵ here; `fairdrop bench --only growth` goes on to 10⁷."""

from __future__ import annotations

import asyncio

import pytest

from app.answers import Joined, Served, Switched
from tests.lua.conftest import FREEZE, OPENS, T0, Stage

WAITING = 100_000
BYTES_EACH = 100  # with integer ids
CPU_MS_MAX = 5.0  # five times the goal: this machine may be busy, but no cost may grow with the line


async def memory_of_sale(stage: Stage) -> int:
    """Bytes of all keys of the sale. Not used_memory: that also counts what its first calls leave on a new server,
    118 kB of scripts and 80 kB of clients' buffers: 2 bytes for each who waits here, nothing at 10⁷.
    """
    keys = await stage.link.call("KEYS", "{sale:x}:*")
    return sum([await stage.link.call("MEMORY", "USAGE", key, "SAMPLES", "0") for key in keys])


async def cpu_ms(stage: Stage) -> float:
    info = (await stage.link.call("INFO", "cpu")).decode()
    return 1_000 * sum(
        float(info.partition(f"used_cpu_{kind}_main_thread:")[2].partition("\r")[0])
        for kind in ("user", "sys")
    )


async def fill(stage: Stage, now: int) -> None:
    async def batch(first: int) -> None:
        buyers = [
            (b"%d" % (1_000_000_000 + number), 1, False, b"%010d" % number)
            for number in range(first, first + 500)
        ]
        reply = await stage.scripts.line_join(
            sale="x", epoch=1, sku="A", skus=stage.skus, buyers=buyers, backlog_max=10**6, now_ms=now
        )
        assert isinstance(reply, Joined)

    for first in range(0, WAITING, 2_000):
        await asyncio.gather(*(batch(first + part) for part in range(0, 2_000, 500)))


@pytest.mark.slow
@pytest.mark.parametrize("joined_at", [T0, FREEZE], ids=["drawn", "in order"])
async def test_a_long_line_is_small_and_is_served_sold_out_and_closed_in_no_time(
    stage: Stage, joined_at: int
) -> None:
    await stage.publish(40 * 32 + 10, line_max=WAITING)
    before = await memory_of_sale(stage)
    await fill(stage, joined_at)
    assert (await memory_of_sale(stage) - before) / WAITING <= BYTES_EACH

    stage.at(OPENS)
    took = []
    for _ in range(40):
        began = await cpu_ms(stage)
        answer = await stage.advance(work_max=32, backlog_max=10**6)
        took.append(await cpu_ms(stage) - began)
        assert isinstance(answer, Served)
        assert answer.claimed == 32
    assert sorted(took)[20] < CPU_MS_MAX

    began = await cpu_ms(stage)
    assert await stage.advance(work_max=32, backlog_max=10**6) == Served(
        WAITING, 10, 0, 0
    )  # sold out: all at once
    assert await stage.link.call("EXISTS", stage.keys.line("A")) == 0
    assert await stage.switch(2, paused="1") == Switched()
    assert await stage.switch(3, closed="1") == Switched()
    assert await cpu_ms(stage) - began < 4 * CPU_MS_MAX
