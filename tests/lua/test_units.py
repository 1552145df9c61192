"""units_release, units_retake, stock_add: units move once for each reason, and standby gets them at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.answers import (
    Added,
    AlreadyByte,
    AlreadyUnits,
    Claimed,
    Joined,
    Marked,
    Refused,
    Released,
    Short,
    Taken,
)
from app.redis.link import Rejected
from tests.lua.conftest import CLOSES, OPENS, T0, Stage

pytestmark = pytest.mark.stores_matrix


async def test_a_reserved_ticket_gives_its_units_back(stage: Stage) -> None:
    await stage.publish(3)
    await stage.join(("ann", 2))
    await stage.mark(1, 1, b"r", json='{"order":1}')
    await stage.link.call("HSET", stage.keys.status, "A:1:a", "leave|1")
    assert await stage.release(1, 2, units=2, to=b"l") == Released(3, 0)
    assert await stage.units_left() == 3
    assert await stage.outcome() == b"l"
    assert await stage.status() == {"A:1": '2|l|{"order":null}'}


async def test_two_hundred_releases_of_one_ticket_return_one_unit(stage: Stage) -> None:
    await stage.publish(1)
    await stage.join("ann")
    replies = await asyncio.gather(*[stage.release(1, 1) for _ in range(200)])
    assert replies.count(Released(1, 0)) == 1
    assert replies.count(AlreadyByte(b"e")) == 199
    assert await stage.units_left() == 1


async def test_units_that_are_not_held_are_not_given_back(stage: Stage, unchanged: Any) -> None:
    await stage.publish(1)
    await stage.at(T0).join("ann", "bob")
    assert await unchanged(stage.release(1, 1)) == AlreadyByte(b"w")
    assert await unchanged(stage.release(9, 1)) == AlreadyByte(b"o")
    await stage.at(OPENS).advance()
    winner, loser = (1, 2) if (await stage.outcome()).startswith(b"c") else (2, 1)
    assert await unchanged(stage.release(loser, 1)) == AlreadyByte(b"s")
    await stage.mark(winner, 3, b"r")
    assert await unchanged(stage.release(winner, 3)) == AlreadyByte(b"r")  # an old release of this version
    await stage.mark(winner, 4, b"p")
    assert await unchanged(stage.release(winner, 5)) == AlreadyByte(b"p")  # paid does not expire


async def test_a_paid_ticket_gives_its_units_back_when_it_is_refunded_with_restock(stage: Stage) -> None:
    await stage.publish(1)
    await stage.join("ann")
    await stage.mark(1, 1, b"p")
    assert await stage.release(1, 2, to=b"f") == Released(1, 0)
    assert await stage.outcome() == b"f"


async def test_a_returned_unit_goes_to_the_next_in_line_in_the_same_call(stage: Stage) -> None:
    await stage.publish(2, standby=1, limit=1)
    await stage.at(T0).join("a", "b", "c", "d")
    await stage.at(OPENS).advance()
    order = await stage.claimed_seqs()
    assert await stage.at(OPENS + 9).release(order[0], 1) == Released(0, 1)
    assert await stage.release(order[1], 1) == Released(0, 1)
    seqs = await stage.claimed_seqs()
    assert len(seqs) == len(set(seqs)) == 4
    assert (await stage.item())["served"] == "4"
    assert await stage.release(seqs[2], 1) == Released(1, 0)  # nobody waits any more: it stays
    assert isinstance((await stage.join("e"))[0], Claimed)


async def test_without_standby_a_returned_unit_goes_to_the_next_join(stage: Stage) -> None:
    await stage.publish(1)
    await stage.at(T0).join("a", "b")
    await stage.at(OPENS).advance()
    (winner,) = await stage.claimed_seqs()
    assert await stage.release(winner, 1) == Released(1, 0)
    assert await stage.join("c") == [Claimed(3)]


@pytest.mark.parametrize("how", ["closed", "paused", "item", "backlog"])
async def test_units_stay_in_stock_while_nobody_is_served(stage: Stage, how: str) -> None:
    await stage.publish(1, standby=1, limit=1)
    await stage.at(OPENS).join("a", "b")
    if how == "closed":
        stage.at(CLOSES)
    elif how == "paused":
        await stage.switch(2, paused=1)
    elif how == "item":
        await stage.scripts.item_switch(sale="x", epoch=1, sku="A", paused=True, now_ms=OPENS)
    assert await stage.release(1, 1, backlog_max=1 if how == "backlog" else 10) == Released(1, 0)
    assert await stage.units_left() == 1
    assert await stage.outcome() == b"ew"


async def test_an_empty_bucket_holds_a_returned_unit_until_the_next_token(stage: Stage) -> None:
    await stage.publish(1, standby=1, limit=1, rate_milli=1_000, burst=1)
    await stage.at(OPENS).join("a", "b")
    assert await stage.release(1, 1) == Released(1, 0)
    assert (await stage.at(OPENS + 1_000).advance()).claimed == 1


async def test_memory_full_refuses_what_takes_and_runs_what_gives_back(stage: Stage, valkey: Any) -> None:
    await stage.publish(2, standby=1, limit=1)
    await stage.at(OPENS).join("a", "b", "c")
    await stage.link.call("CONFIG", "SET", "maxmemory", 1)
    try:
        before = await stage.dump()
        for call in (
            stage.join("d"),
            stage.leave(3),
            stage.advance(),
            stage.add(1, "t"),
            stage.ask(1, "leave"),
        ):
            with pytest.raises(Rejected) as refused:
                await call
            assert refused.value.code == "OOM"
        assert await stage.dump() == before
        assert await stage.mark(1, 1, b"r") == Marked()
        assert await stage.release(2, 1) == Released(0, 1)
    finally:
        await stage.link.call("CONFIG", "SET", "maxmemory", 0)
    assert await stage.outcome() == b"rec"


async def test_late_money_takes_the_unit_again_once(stage: Stage, unchanged: Any) -> None:
    await stage.publish(1)
    await stage.join("ann")
    await stage.mark(1, 1, b"r", json='{"order":"a"}')
    await stage.release(1, 2)
    assert await stage.retake(1, 2) == Taken(0)
    assert await stage.outcome() == b"c"
    assert await stage.status() == {"A:1": '2|e|{"order":null}'}
    assert await unchanged(stage.retake(1, 2)) == AlreadyByte(b"c")
    assert await unchanged(stage.release(1, 2)) == AlreadyByte(b"c")  # the old release, delivered again
    assert len(await stage.claims()) == 1
    assert await stage.mark(1, 3, b"p") == Marked()
    assert await unchanged(stage.retake(1, 2)) == AlreadyByte(b"p")
    assert await stage.units_left() == 0


async def test_a_retake_can_be_given_back_with_a_higher_version(stage: Stage) -> None:
    await stage.publish(1)
    await stage.join("ann")
    await stage.release(1, 1, to=b"k")
    assert await stage.retake(1, 2) == Taken(0)
    assert await stage.release(1, 3, to=b"f") == Released(1, 0)


async def test_a_retake_is_refused(stage: Stage, unchanged: Any) -> None:
    await stage.publish(1, standby=1, limit=1)
    await stage.join("ann", "bob")
    assert await unchanged(stage.retake(2, 1)) == Refused("state")
    assert await unchanged(stage.retake(1, 1)) == Refused("state")  # claimed, and told nothing yet
    await stage.switch(2, paused=1)
    await stage.release(1, 5)
    assert await unchanged(stage.retake(1, 4)) == Refused("state")  # an older row than the one told
    assert await unchanged(stage.retake(1, 5)) == Refused("waiting")
    await stage.leave(2)
    assert await unchanged(stage.retake(1, 5, units=2)) == Refused("stock")
    assert await stage.retake(1, 5) == Taken(0)


async def test_two_hundred_retakes_take_one_unit(stage: Stage) -> None:
    await stage.publish(5)
    await stage.join("ann")
    await stage.release(1, 1)
    replies = await asyncio.gather(*[stage.retake(1, 1) for _ in range(200)])
    assert replies.count(Taken(4)) == 1
    assert await stage.units_left() == 4


async def test_a_top_up_is_added_once_for_each_id(stage: Stage, unchanged: Any) -> None:
    await stage.publish(1)
    replies = await asyncio.gather(*[stage.add(3, "t1") for _ in range(200)])
    assert replies.count(Added(4, 0)) == 1
    assert replies.count(AlreadyUnits(4)) == 199
    assert await unchanged(stage.add(3, "t1")) == AlreadyUnits(4)
    assert await stage.add(3, "t2") == Added(7, 0)
    assert (await stage.item())["add:t1"] == "3"


async def test_units_can_be_taken_away_down_to_the_unsold(stage: Stage, unchanged: Any) -> None:
    await stage.publish(3)
    await stage.join("ann")
    assert await unchanged(stage.add(-3, "t1")) == Short(2)
    assert await stage.add(-2, "t2") == Added(0, 0)
    assert await unchanged(stage.add(-2, "t2")) == AlreadyUnits(0)


async def test_a_top_up_serves_standby_at_once_and_otherwise_waits_for_joins(stage: Stage) -> None:
    await stage.publish(1, standby=1, limit=1)
    await stage.at(OPENS).join("a", "b", "c", "d")
    assert await stage.add(2, "t1") == Added(0, 2)
    assert await stage.claimed_seqs() == [1, 2, 3]


async def test_a_top_up_before_the_opening_waits_for_the_draw(stage: Stage) -> None:
    await stage.publish(0, standby=1, limit=1)
    await stage.at(T0).join("a", "b")
    assert await stage.add(1, "t1") == Added(1, 0)
    assert await stage.at(OPENS).add(1, "t2") == Added(2, 0)  # not drawn yet: the next tick serves
    assert (await stage.advance()).claimed == 2


async def test_after_a_sold_out_a_top_up_sells_to_new_buyers(stage: Stage) -> None:
    await stage.publish(1)
    await stage.at(T0).join("a", "b")
    await stage.at(OPENS).advance()
    await stage.add(1, "t1")
    reply = await stage.batch("c")
    assert isinstance(reply, Joined)
    assert reply.answers == [Claimed(3)]


async def test_missing_stock_means_gone_and_not_zero(stage: Stage, unchanged: Any) -> None:
    await stage.publish(1)
    await stage.join("ann")
    await stage.link.call("DEL", stage.keys.stock)
    for call in (
        stage.release(1, 1),
        stage.add(1, "t"),
        stage.advance(),
        stage.batch("bob"),
        stage.retake(1, 1),
    ):
        assert type(await unchanged(call)).__name__ == "Gone"
