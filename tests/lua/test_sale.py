"""sale_publish, sale_switch, item_switch, beacon_put, sale_rearm, sale_pulse, rate_take."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.answers import (
    Already,
    AlreadyValue,
    Armed,
    Behind,
    ClosedForGood,
    Early,
    Leftover,
    NotHome,
    Other,
    Published,
    Pulsed,
    Put,
    Stale,
    Switched,
    Taken,
    Wait,
    Waits,
)
from app.draw import chain_start, seed_hash
from tests.lua.conftest import CLOSES, FREEZE, OPENS, SEED, T0, Stage

pytestmark = pytest.mark.stores_matrix


async def test_publishing_writes_the_whole_sale(stage: Stage) -> None:
    await stage.publish(7, message="hello")
    sale = await stage.sale()
    assert sale["home"] == stage.link.run_id
    assert sale["seed_hash"] == seed_hash(SEED)
    assert (sale["fmt"], sale["epoch"], sale["version"], sale["opened"]) == ("1", "1", "1", "0")
    assert (sale["paused"], sale["closed"], sale["beacon_value"], sale["message"]) == ("0", "0", "", "hello")
    assert (sale["last_ms"], sale["tokens_micro"]) == (str(T0 - 1_000), "100000000")
    assert await stage.units_left("A") == await stage.units_left("B") == 7
    assert await stage.item("B") == {
        "next_seq": "1", "served": "0", "early": "0", "chain": chain_start("x", "B", 1, seed_hash(SEED)),
        "drawn": "0", "drawn_n": "0", "drawn_key": "", "beacon_used": "", "dead_seq": "0", "paused": "0", "starts": "",
    }  # fmt: skip
    for stream in (stage.keys.orders, stage.keys.asks):
        (group,) = await stage.link.call("XINFO", "GROUPS", stream)
        assert group[1] == b"workers"


async def test_a_sale_is_published_once(stage: Stage, unchanged: Any) -> None:
    await stage.publish()

    async def again(epoch: int) -> Any:
        return await stage.scripts.sale_publish(
            sale="x", fields=stage.fields(epoch=epoch), items=[("A", 9)], seed_hash="", now_ms=OPENS
        )

    await stage.join("ann")
    assert await unchanged(again(1)) == Already()
    assert await unchanged(again(2)) == Other(1)


async def test_two_hundred_publish_at_once_and_one_does(stage: Stage) -> None:
    replies = await asyncio.gather(
        *[
            stage.scripts.sale_publish(
                sale="x", fields=stage.fields(), items=[("A", 9)], seed_hash="", now_ms=T0
            )
            for _ in range(200)
        ]
    )
    assert replies.count(Published()) == 1
    assert replies.count(Already()) == 199


@pytest.mark.parametrize("key", ["stock", "buyers", "orders", "asks"])
async def test_what_is_left_of_a_lost_sale_is_not_written_over(
    stage: Stage, unchanged: Any, key: str
) -> None:
    await stage.publish()
    await stage.join("ann")
    kept = getattr(stage.keys, key)
    await stage.link.call(
        "DEL", *[name for name in await stage.link.call("KEYS", "*") if name.decode() != kept]
    )
    reply = await unchanged(
        stage.scripts.sale_publish(sale="x", fields=stage.fields(), items=[("A", 9)], seed_hash="", now_ms=T0)
    )
    assert reply == Leftover()


async def test_a_sale_without_its_facts_cannot_be_published(stage: Stage) -> None:
    with pytest.raises(ValueError, match="seed"):
        await stage.scripts.sale_publish(sale="x", fields={"epoch": 1}, items=[], seed_hash="")


async def test_switches_apply_in_the_order_of_versions(stage: Stage, unchanged: Any) -> None:
    await stage.publish()
    assert await stage.switch(3, message="slow today", line_max=7) == Switched()
    assert await unchanged(stage.switch(3, message="again")) == Stale(3)
    assert await unchanged(stage.switch(2, message="late")) == Stale(3)
    sale = await stage.sale()
    assert (sale["message"], sale["line_max"], sale["version"]) == ("slow today", "7", "3")


async def test_closing_is_final(stage: Stage, unchanged: Any) -> None:
    await stage.publish()
    await stage.at(T0).join("ann")
    assert await stage.switch(2, closed=1) == Switched()
    assert await unchanged(stage.switch(3, closed=0)) == ClosedForGood()
    assert await stage.switch(3, message="bye") == Switched()
    assert (await stage.sale())["closed"] == "1"
    assert [answer.byte for answer in await stage.join("ann")] == [b"x"]


async def test_a_sale_past_its_end_is_not_opened_again_by_a_later_end(stage: Stage) -> None:
    await stage.publish()
    assert await stage.at(CLOSES).switch(2, closes_ms=CLOSES + 60_000) == Switched()
    assert (await stage.sale())["closed"] == "1"


async def test_a_pause_empties_the_bucket_and_nothing_flows_in(stage: Stage) -> None:
    await stage.publish(50, rate_milli=10_000, burst=20)
    assert (await stage.sale())["tokens_micro"] == "20000000"
    await stage.switch(2, paused=1)
    assert (await stage.sale())["tokens_micro"] == "0"
    await stage.at(OPENS + 60_000).switch(3, paused=0)
    assert await stage.join("a") == [Waits(1)]
    assert (await stage.at(OPENS + 60_100).advance()).claimed == 1


async def test_a_new_rate_counts_from_now_and_a_smaller_burst_cuts(stage: Stage) -> None:
    await stage.publish(50, rate_milli=1_000, burst=100)
    await stage.join(*[f"b{n}" for n in range(50)])  # 50 of 100 tokens
    await stage.at(OPENS + 1_000).switch(2, rate_milli=5_000)
    assert (await stage.sale())["tokens_micro"] == "51000000"
    await stage.at(OPENS + 2_000).switch(3, burst=3)
    assert (await stage.sale())["tokens_micro"] == "3000000"
    await stage.switch(4, rate_milli=-1)
    assert (await stage.sale())["tokens_micro"] == "0"
    await stage.at(OPENS + 3_000).switch(5, rate_milli=1_000)
    assert (await stage.sale())["tokens_micro"] == "0"


async def test_what_the_scripts_keep_cannot_be_switched(stage: Stage) -> None:
    await stage.publish()
    for field in ("epoch", "home", "seed", "tokens_micro", "beacon_value", "version"):
        with pytest.raises(ValueError, match=field):
            await stage.scripts.sale_switch(sale="x", epoch=1, version=2, changes={field: 1})


async def test_an_item_is_paused_by_itself(stage: Stage, unchanged: Any) -> None:
    await stage.publish()

    async def turn(paused: bool) -> Any:
        return await stage.scripts.item_switch(sale="x", epoch=1, sku="A", paused=paused, now_ms=OPENS)

    assert await unchanged(turn(False)) == Already()
    assert await turn(True) == Switched()
    assert await unchanged(turn(True)) == Already()
    assert (await stage.item("A"))["paused"] == "1"
    assert (await stage.item("B"))["paused"] == "0"


async def test_the_beacon_is_stored_once_and_only_after_the_freeze(stage: Stage, unchanged: Any) -> None:
    await stage.publish(beacon_source="drand")

    async def put(value: str, now: int) -> Any:
        return await stage.scripts.beacon_put(sale="x", epoch=1, value=value, now_ms=now)

    assert await unchanged(put("aa", FREEZE - 1)) == Early()
    replies = await asyncio.gather(*[put(f"v{n}", FREEZE) for n in range(200)])
    assert replies.count(Put()) == 1
    stored = (await stage.sale())["beacon_value"]
    assert replies.count(AlreadyValue(stored)) == 199
    assert await unchanged(put("bb", OPENS)) == AlreadyValue(stored)
    with pytest.raises(ValueError, match="empty"):
        await put("", OPENS)


async def test_a_restarted_redis_is_armed_only_if_it_lost_nothing(stage: Stage, unchanged: Any) -> None:
    await stage.publish()
    assert await stage.scripts.sale_pulse(sale="x", epoch=1, pulse=10) == Pulsed(10)
    assert await stage.scripts.sale_pulse(sale="x", epoch=1, pulse=4) == Pulsed(10)
    home = stage.link.run_id

    async def rearm(old: str, pulse: int, new: str = "n" * 40, epoch: int = 1) -> Any:
        return await stage.scripts.sale_rearm(
            sale="x", epoch=epoch, old_home=old, new_home=new, pulse_at_least=pulse
        )

    assert await unchanged(rearm(home, 11)) == Behind(10)
    assert await unchanged(rearm("another", 10)) == NotHome(home)
    assert await rearm(home, 10) == Armed()
    assert await unchanged(rearm(home, 99)) == Armed()  # it is the home already
    assert (await stage.sale())["home"] == "n" * 40


async def test_a_rate_allows_a_burst_and_then_one_each_period(stage: Stage, unchanged: Any) -> None:
    key = stage.keys.rate("pass", "ann")

    async def take(now: int, cost: int = 1) -> Any:
        return await stage.scripts.rate_take(key=key, period_ms=2_000, burst=3, cost=cost, now_ms=now)

    assert [await take(T0) for _ in range(3)] == [Taken(2), Taken(1), Taken(0)]
    assert await unchanged(take(T0)) == Wait(2_000)
    assert await unchanged(take(T0 + 1_999)) == Wait(1)
    assert await take(T0 + 2_000) == Taken(0)
    assert await take(T0 + 60_000, cost=3) == Taken(0)
    assert 0 < await stage.link.call("PTTL", key) <= 6_000


async def test_two_hundred_at_once_get_no_more_than_the_burst(stage: Stage) -> None:
    key = stage.keys.rate("change", "ann")
    replies = await asyncio.gather(
        *[stage.scripts.rate_take(key=key, period_ms=60_000, burst=30) for _ in range(200)]
    )
    assert sum(isinstance(reply, Taken) for reply in replies) == 30
