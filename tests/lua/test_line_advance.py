"""line_advance and line_leave: ranks in order, each once."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from app.answers import (
    Busy,
    Closed,
    Early,
    Left,
    NotWaiting,
    Paused,
    Put,
    Served,
    WaitBeacon,
    Waits,
)
from app.draw import chain_head, chain_start, draw_key, rank_of, round_keys, seed_hash
from tests.lua.conftest import CLOSES, OPENS, SEED, T0, Stage

pytestmark = pytest.mark.stores_matrix


async def test_the_first_call_after_the_opening_fixes_the_draw_and_serves_in_its_order(stage: Stage) -> None:
    await stage.publish(100)
    names = [f"b{n}" for n in range(30)]
    await stage.at(T0).join(*names)
    await stage.at(OPENS - 1).join("late")
    assert await stage.at(OPENS).advance() == Served(31, 31, 69, 0)
    item = await stage.item()
    chain = chain_head(chain_start("x", "A", 1, seed_hash(SEED)), map(stage.hash_of, names))
    assert item["chain"] == chain
    assert item["drawn_key"] == draw_key(SEED, chain, "")
    assert item["drawn_key"] == hashlib.sha1(SEED + chain.encode()).hexdigest()
    assert (item["drawn"], item["drawn_n"], item["beacon_used"], item["served"]) == ("1", "30", "", "31")
    keys = round_keys(item["drawn_key"], 30)
    in_order = sorted(range(1, 31), key=lambda seq: rank_of(seq, 30, keys))
    assert await stage.claimed_seqs() == [*in_order, 31]
    assert await stage.outcome() == b"c" * 31
    assert await stage.line() == {}


async def test_two_hundred_ticks_at_once_serve_everyone_once(stage: Stage) -> None:
    await stage.publish(60)
    await stage.at(T0).join(*[f"b{n}" for n in range(100)])
    stage.at(OPENS)
    await asyncio.gather(*[stage.advance(work_max=3) for _ in range(200)])
    seqs = await stage.claimed_seqs()
    assert len(seqs) == len(set(seqs)) == 60
    assert await stage.units_left() == 0
    assert (await stage.outcome()).count(b"c") == 60
    assert (await stage.item())["dead_seq"] == "100"


async def test_work_is_bounded_and_the_next_call_goes_on(stage: Stage) -> None:
    await stage.publish(100)
    await stage.at(T0).join(*[f"b{n}" for n in range(20)])
    await stage.at(OPENS).join(*[f"c{n}" for n in range(20)])
    assert await stage.advance(work_max=15) == Served(15, 15, 85, 25)
    assert await stage.advance(work_max=15) == Served(30, 15, 70, 10)
    assert await stage.advance(work_max=15) == Served(40, 10, 60, 0)


async def test_those_who_left_are_passed_without_a_token(stage: Stage) -> None:
    await stage.publish(100, rate_milli=0, burst=3)
    await stage.at(OPENS).switch(2, rate_milli=1_000)
    await stage.switch(3, paused=1)
    await stage.join(*[f"b{n}" for n in range(10)])
    for seq in (1, 2, 4, 10):
        assert await stage.leave(seq) == Left()
    await stage.switch(4, paused=0)
    stage.at(OPENS + 3_000)
    assert await stage.advance() == Served(6, 3, 97, 4)  # 3, 5, 6; served stops before 7, who waits
    assert await stage.claimed_seqs() == [3, 5, 6]
    stage.at(OPENS + 60_000)
    assert await stage.advance() == Served(10, 3, 94, 0)  # the last one left: the line is empty


async def test_the_last_unit_ends_the_line_in_the_same_call(stage: Stage) -> None:
    await stage.publish(2)
    await stage.at(T0).join("a", "b", "c", "d")
    assert await stage.at(OPENS).advance() == Served(4, 2, 0, 0)
    assert (await stage.item())["dead_seq"] == "4"
    assert await stage.link.call("EXISTS", stage.keys.line("A")) == 0
    loser = (await stage.outcome()).index(b"w") + 1
    assert await stage.leave(loser) == NotWaiting(b"s")


async def test_no_stock_at_the_opening_ends_the_line(stage: Stage) -> None:
    await stage.publish(0)
    await stage.at(T0).join("a", "b")
    assert await stage.at(OPENS).advance() == Served(2, 0, 0, 0)


async def test_a_ticket_that_cannot_be_filled_whole_is_sold_out_and_the_next_is_tried(stage: Stage) -> None:
    await stage.publish(3)
    await stage.switch(2, paused=1)
    await stage.join(("a", 2), ("b", 2), ("c", 1), ("d", 1))
    await stage.switch(3, paused=0)
    assert await stage.advance() == Served(4, 2, 0, 0)
    assert await stage.outcome() == b"cscw"
    assert [answer.byte for answer in await stage.join(("b", 2), "d")] == [b"s", b"s"]


async def test_with_standby_served_stops_at_the_first_who_waits(stage: Stage, unchanged: Any) -> None:
    await stage.publish(2, standby=1, limit=1)
    await stage.at(T0).join("a", "b", "c", "d")
    assert await stage.at(OPENS).advance() == Served(2, 2, 0, 2)
    assert await unchanged(stage.advance()) == Served(2, 0, 0, 2)
    assert (await stage.item())["dead_seq"] == "0"
    assert len(await stage.line()) == 2


async def test_nothing_to_do_writes_nothing(stage: Stage, unchanged: Any) -> None:
    await stage.publish(2)
    assert await stage.advance() == Served(0, 0, 2, 0)  # fixes the draw of nobody
    assert await unchanged(stage.at(OPENS + 5).advance()) == Served(0, 0, 2, 0)


@pytest.mark.parametrize(
    ("now", "fields", "answer"),
    [
        (OPENS - 1, {}, Early()),
        (CLOSES, {}, Closed()),
        (OPENS, {"closed": 1}, Closed()),
        (OPENS, {"paused": 1}, Paused()),
        (OPENS, {"beacon_source": "drand"}, WaitBeacon()),
        (OPENS + 4_999, {"beacon_source": "drand"}, WaitBeacon()),
    ],
)
async def test_a_refused_call_changes_nothing(
    stage: Stage, unchanged: Any, now: int, fields: dict[str, Any], answer: Any
) -> None:
    await stage.publish(5, **fields)
    await stage.at(T0).join("ann")
    assert await unchanged(stage.at(now).advance()) == answer


async def test_a_paused_item_is_not_served(stage: Stage, unchanged: Any) -> None:
    await stage.publish(5)
    await stage.at(T0).join("ann")
    await stage.scripts.item_switch(sale="x", epoch=1, sku="A", paused=True, now_ms=T0)
    assert await unchanged(stage.at(OPENS).advance()) == Paused()


async def test_a_full_backlog_serves_nobody(stage: Stage, unchanged: Any) -> None:
    await stage.publish(5)
    await stage.join("ann")
    await stage.switch(2, paused=1)
    await stage.join("bob", "cid", "dan")
    await stage.switch(3, paused=0)
    assert await stage.advance(backlog_max=3) == Served(3, 2, 2, 1)
    assert await unchanged(stage.advance(backlog_max=3)) == Busy()


async def test_the_beacon_goes_into_the_key_and_a_missing_one_is_recorded(stage: Stage) -> None:
    await stage.publish(5, beacon_source="drand")
    await stage.at(T0).join("ann", "bob")
    await stage.at(OPENS).join("x", sku="B")
    assert await stage.advance() == WaitBeacon()
    assert await stage.scripts.beacon_put(sale="x", epoch=1, value="f00d", now_ms=OPENS) == Put()
    assert isinstance(await stage.advance(), Served)
    item = await stage.item()
    assert (item["beacon_used"], item["drawn_key"]) == ("f00d", draw_key(SEED, item["chain"], "f00d"))


async def test_a_beacon_that_never_comes_holds_nobody_for_ever(stage: Stage) -> None:
    await stage.publish(5, beacon_source="drand")
    await stage.at(T0).join("ann", "bob")
    assert isinstance(await stage.at(OPENS + 5_000).advance(), Served)
    item = await stage.item()
    assert (item["beacon_used"], item["drawn_key"]) == ("missing", draw_key(SEED, item["chain"], "missing"))


async def test_nobody_in_the_draw_waits_for_no_beacon(stage: Stage) -> None:
    await stage.publish(5, beacon_source="drand")
    await stage.at(OPENS - 1).join("ann")
    assert await stage.at(OPENS).advance() == Served(1, 1, 4, 0)


async def test_leaving_gives_the_place_up_once(stage: Stage, unchanged: Any) -> None:
    await stage.publish(5)
    await stage.at(T0).join("ann", "bob")
    assert await stage.leave(1) == Left()
    assert await stage.outcome() == b"lw"
    assert await stage.line() == {"2-0": b"1:bob"}
    assert await stage.link.call("LRANGE", stage.keys.left("A"), 0, -1) == [b"1"]
    assert await unchanged(stage.leave(1)) == NotWaiting(b"l")
    assert await unchanged(stage.leave(7)) == NotWaiting(b"o")
    assert await stage.join("cid") == [Waits(3)]


async def test_who_does_not_wait_cannot_leave_the_line(stage: Stage, unchanged: Any) -> None:
    await stage.publish(1)
    await stage.join("ann")
    assert await unchanged(stage.leave(1)) == NotWaiting(b"c")
    await stage.switch(2, paused=1)
    await stage.add(1, "more")
    await stage.join("bob")
    assert await unchanged(stage.at(CLOSES).leave(2)) == NotWaiting(b"x")


async def test_two_hundred_leave_at_once_and_each_seq_is_told_once(stage: Stage) -> None:
    await stage.publish(5)
    await stage.at(T0).join(*[f"b{n}" for n in range(20)])
    replies = await asyncio.gather(*[stage.leave(1 + n % 20) for n in range(200)])
    assert sum(reply == Left() for reply in replies) == 20
    assert sorted(map(int, await stage.link.call("LRANGE", stage.keys.left("A"), 0, -1))) == list(
        range(1, 21)
    )
