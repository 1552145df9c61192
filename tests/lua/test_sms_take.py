"""sms_take: a number's three limits allow a text together, or count nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.answers import Taken, Wait
from app.keys import sms_limits
from app.purchase.tell import Limits
from tests.lua.conftest import T0, Stage

NUMBER = "ab" * 16


async def take(stage: Stage, now: int, **changes: int) -> Taken | Wait:
    values: dict[str, int] = {
        "minute_period": 30_000, "minute_burst": 2, "hour_period": 720_000, "hour_burst": 4,
        "day_period": 8_640_000, "day_burst": 10, **changes,
    }  # fmt: skip
    return await stage.scripts.sms_take(number=NUMBER, now_ms=now, **values)


async def test_the_least_limit_decides_and_a_refusal_counts_under_none(stage: Stage, unchanged: Any) -> None:
    assert [await take(stage, T0), await take(stage, T0)] == [Taken(1), Taken(0)]
    assert await unchanged(take(stage, T0)) == Wait(30_000)
    assert await unchanged(take(stage, T0 + 29_999)) == Wait(1)
    assert await take(stage, T0 + 30_000) == Taken(0)
    assert await take(stage, T0 + 60_000) == Taken(0)
    # The minute would allow a fifth by now; the hour does not, and keeps the minute untouched.
    assert await unchanged(take(stage, T0 + 600_000)) == Wait(120_000)
    assert await take(stage, T0 + 720_000) == Taken(0)


async def test_the_keys_go_by_themselves_and_name_no_number(stage: Stage) -> None:
    await take(stage, 0)
    for key, most in zip(sms_limits(NUMBER), (30_000, 720_000, 8_640_000), strict=True):
        assert 0 < await stage.link.call("PTTL", key) <= most


async def test_two_hundred_at_once_get_no_more_than_the_burst(stage: Stage) -> None:
    replies = await asyncio.gather(*[take(stage, 0) for _ in range(200)])
    assert sum(isinstance(reply, Taken) for reply in replies) == 2


@given(st.integers(1, 60), st.sampled_from([60_000, 3_600_000, 86_400_000]), st.data())
def test_no_window_ever_holds_more_than_the_setting_says(
    count: int, window_ms: int, data: st.DataObject
) -> None:
    period, burst = Limits.gcra(count, window_ms)
    arrival, sent, now = 0, [], 0
    for gap in data.draw(st.lists(st.integers(0, window_ms), max_size=200)):
        now += gap
        after = max(arrival, now) + period
        if after - burst * period <= now:
            arrival = after
            sent.append(now)
    for at, begun in enumerate(sent):
        assert sum(begun <= other < begun + window_ms for other in sent[at:]) <= count


@pytest.mark.parametrize("count", [1, 2, 3, 8, 20])
def test_a_patient_sender_gets_at_least_half_of_what_the_setting_says(count: int) -> None:
    period, burst = Limits.gcra(count, 60_000)
    assert 60_000 // period >= count // 2 and burst >= 1
