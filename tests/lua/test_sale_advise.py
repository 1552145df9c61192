"""sale_advise: admission slows down for joins and ticks alike, the operator's rate stays, and it ends by the clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.answers import (
    Advised,
    Claimed,
    Gone,
    Old,
    Served,
    Waits,
)
from tests.lua.conftest import OPENS, T0, Stage

pytestmark = pytest.mark.stores_matrix

LEASE = 10_000


async def advise(stage: Stage, slow_milli: int, *, lease_ms: int = LEASE, **changed: Any) -> Any:
    said: dict[str, Any] = {"base_milli": 50_000, "reason": "payment_down", "notices": "payment"} | changed
    return await stage.scripts.sale_advise(
        sale="x", epoch=stage.epoch, now_ms=stage.now, slow_milli=slow_milli, lease_ms=lease_ms, **said
    )


async def sale(stage: Stage) -> dict[str, str]:
    found = await stage.link.call("HGETALL", stage.keys.sale)
    return {k.decode(): v.decode() for k, v in zip(found[::2], found[1::2], strict=True)}


async def test_a_slowed_sale_serves_at_the_lower_rate_whether_at_once_or_from_the_line(stage: Stage) -> None:
    await stage.publish(100)  # as fast as stock allows
    assert await stage.at(OPENS).join("ann") == [Claimed(1)]
    assert await advise(stage, 2_000) == Advised(OPENS + LEASE)
    assert await stage.join("bob", "eve") == [Waits(2), Waits(3)]
    assert await stage.at(OPENS + 499).advance() == Served(1, 0, 99, 2)
    assert await stage.at(OPENS + 500).advance() == Served(2, 1, 98, 1)
    assert await stage.at(OPENS + 1_000).advance() == Served(3, 1, 97, 0)
    assert await stage.at(OPENS + 1_500).join("joe") == [Claimed(4)]
    assert await stage.join("kim") == [Waits(5)]


async def test_it_ends_on_the_millisecond_without_anybody(stage: Stage) -> None:
    await stage.publish(100)
    await stage.at(OPENS).join("ann")
    await advise(stage, 0)
    await stage.join("bob", "eve")
    assert await stage.at(OPENS + LEASE - 1).advance() == Served(1, 0, 99, 2)
    assert await stage.at(OPENS + LEASE).advance() == Served(3, 2, 97, 0)


async def test_the_operators_rate_is_kept_and_counts_again_afterwards(stage: Stage) -> None:
    await stage.publish(100, rate_milli=10_000, burst=10)
    stage.at(OPENS)
    before = await sale(stage)
    await advise(stage, 1_000)
    after = await sale(stage)
    assert (after["rate_milli"], after["burst"]) == (before["rate_milli"], before["burst"])
    await stage.join(*[f"b{n}" for n in range(60)])
    served = 0
    for second in range(1, 13):
        answer = await stage.at(OPENS + second * 1_000).advance()
        assert isinstance(answer, Served)
        served = answer.served
        if second == 9:
            slow = served
    assert slow <= 10 + 9  # what was saved up when it began, then one a second
    assert served == slow + 1 + 20  # one more slow second, then ten a second


async def test_advice_never_makes_a_sale_faster_than_the_operator_wants(stage: Stage) -> None:
    await stage.publish(100, rate_milli=1_000, burst=1)
    await advise(stage.at(OPENS), 50_000)
    await stage.join(*[f"b{n}" for n in range(10)])
    assert await stage.at(OPENS + 3_000).advance() == Served(2, 1, 98, 8)
    assert await stage.at(OPENS + 4_000).advance() == Served(3, 1, 97, 7)


async def test_a_paused_sale_saves_nothing_up_while_it_is_slowed(stage: Stage) -> None:
    await stage.publish(100)
    await advise(stage.at(OPENS), 5_000, lease_ms=60_000)
    await stage.join("ann", "bob")
    await stage.switch(2, paused=1)
    await stage.at(OPENS + 5_000).switch(3, paused=0)
    assert await stage.advance() == Served(0, 0, 100, 2)
    assert await stage.at(OPENS + 5_200).advance() == Served(1, 1, 99, 1)


async def test_repeated_and_withdrawn_advice(stage: Stage) -> None:
    await stage.publish(100)
    await advise(stage.at(OPENS), 1_000)
    await stage.join("ann", "bob", "eve")
    assert await advise(stage.at(OPENS + 5_000), 1_000) == Advised(OPENS + 5_000 + LEASE)
    assert await stage.advance() == Served(1, 1, 99, 2)  # the bucket holds one second of a slow rate
    await advise(stage, -1, base_milli=-1, reason="", notices="")
    assert await stage.advance() == Served(3, 2, 97, 0)


async def test_another_epoch_or_home_or_no_sale_changes_nothing(stage: Stage) -> None:
    assert await advise(stage, 1_000) == Gone()
    await stage.publish(3)
    before = await sale(stage)
    stage.epoch = 2
    assert await advise(stage, 1_000) == Old()
    assert await sale(stage) == before


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rate=st.sampled_from([-1, 500, 3_000, 40_000]),
    slow=st.sampled_from([0, 250, 1_000, 7_500]),
    lease_ms=st.integers(1, 8_000),
    gaps=st.lists(st.integers(0, 1_500), min_size=1, max_size=25),
)
async def test_never_more_is_served_than_the_lower_rate_allows_while_it_holds(
    stage: Stage, rate: int, slow: int, lease_ms: int, gaps: list[int]
) -> None:
    await stage.link.call("FLUSHALL")
    stage.epoch = 1
    await stage.at(T0).publish(1_000, rate_milli=rate, burst=1)
    stage.at(OPENS)
    await advise(stage, slow, lease_ms=lease_ms)
    await stage.join(*[f"b{n}" for n in range(300)])
    least = slow if rate < 0 else min(slow, rate)
    had = 1 if rate >= 0 else 0  # the bucket starts full
    for gap in gaps:
        answer = await stage.at(stage.now + gap).advance()
        assert isinstance(answer, Served)
        passed = stage.now - OPENS
        if passed < lease_ms:
            assert answer.served <= had + least * passed // 1_000
        elif rate < 0:
            assert answer.served == 300
        else:
            assert answer.served <= had + (least * lease_ms + rate * (passed - lease_ms)) // 1_000 + 1
