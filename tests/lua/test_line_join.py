"""line_join: places in the line, units at once, and who has a ticket already."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.answers import (
    Claimed,
    Conflict,
    Has,
    Joined,
    Turned,
    Waits,
)
from app.draw import chain_head, chain_start, seed_hash
from tests.lua.conftest import CLOSES, FREEZE, OPENS, SEED, T0, Stage

pytestmark = pytest.mark.stores_matrix


async def test_before_the_opening_everybody_waits_and_is_in_the_draw(stage: Stage) -> None:
    await stage.publish(5)
    stage.at(T0)
    assert await stage.batch("ann", ("bob", 2)) == Joined(T0, 0, 3, [Waits(1), Waits(2)])
    assert await stage.join("cid") == [Waits(3)]
    assert await stage.buyers() == {"ann": "A:1:1", "bob": "A:2:2", "cid": "A:3:1"}
    assert await stage.line() == {"1-0": b"1:ann", "2-0": b"2:bob", "3-0": b"1:cid"}
    assert await stage.outcome() == b"www"
    hashes = [stage.hash_of(name) for name in ("ann", "bob", "cid")]
    assert await stage.link.call("GET", stage.keys.drawn("A")) == b"".join(hashes)
    item = await stage.item()
    assert (item["next_seq"], item["served"], item["early"], item["drawn"]) == ("4", "0", "3", "0")
    assert item["chain"] == chain_head(chain_start("x", "A", 1, seed_hash(SEED)), hashes)
    assert await stage.units_left() == 5
    assert await stage.claims() == []


async def test_after_the_freeze_one_waits_behind_the_draw(stage: Stage) -> None:
    await stage.publish(5)
    await stage.at(FREEZE - 1).join("ann")
    before = await stage.item()
    assert await stage.at(FREEZE).join("bob") == [Waits(2)]
    after = await stage.item()
    assert (after["early"], after["chain"]) == ("1", before["chain"])
    assert await stage.link.call("STRLEN", stage.keys.drawn("A")) == 10


async def test_a_freeze_that_is_moved_back_does_not_tear_the_draw(stage: Stage) -> None:
    await stage.publish(5)
    await stage.at(T0).join("ann")
    await stage.at(FREEZE).join("bob")
    await stage.switch(2, freeze_ms=OPENS - 1)
    await stage.join("cid")
    assert (await stage.item())["early"] == "1"


async def test_with_nobody_waiting_a_unit_is_taken_at_once_with_its_entry(stage: Stage) -> None:
    await stage.publish(3)
    assert await stage.batch("ann", ("bob", 2)) == Joined(OPENS, 2, 3, [Claimed(1), Claimed(2)])
    assert await stage.outcome() == b"cc"
    assert await stage.claims() == [f"1|1|A|1|1|{OPENS}|ann", f"1|1|A|2|2|{OPENS}|bob"]
    assert await stage.units_left() == 0
    assert await stage.line() == {}
    assert (await stage.sale())["opened"] == "1"
    assert (await stage.item())["served"] == "2"


async def test_a_buyer_id_may_hold_anything(stage: Stage) -> None:
    await stage.publish(1)
    strange = b"a|b:c\0\xff{}"
    reply = await stage.scripts.line_join(
        sale="x",
        epoch=1,
        sku="A",
        skus=["A", "B"],
        buyers=[(strange, 1, False, b"h" * 10)],
        backlog_max=9,
        now_ms=T0,
    )
    assert isinstance(reply, Joined)
    await stage.at(OPENS).advance()
    (entry,) = await stage.link.call("XRANGE", stage.keys.orders, "-", "+")
    assert entry[1] == [b"c", b"1|1|A|%d" % OPENS, b"1:1", strange]


async def test_taps_repeated_in_a_batch_and_later_find_the_one_ticket(stage: Stage, unchanged: Any) -> None:
    await stage.publish(5)
    assert await stage.join("ann", "ann", "bob", "ann") == [
        Claimed(1),
        Has(b"A", 1, 1, b"c"),
        Claimed(2),
        Has(b"A", 1, 1, b"c"),
    ]
    assert await unchanged(stage.join("bob", "ann")) == [Has(b"A", 2, 1, b"c"), Has(b"A", 1, 1, b"c")]
    assert await stage.units_left() == 3


async def test_a_live_ticket_for_something_else_is_a_conflict(stage: Stage, unchanged: Any) -> None:
    await stage.publish(5)
    await stage.at(T0).join("ann")
    assert await unchanged(stage.join(("ann", 2))) == [Conflict(b"A", 1, 1, b"w")]
    assert await unchanged(stage.join("ann", sku="B")) == [Conflict(b"A", 1, 1, b"w")]
    assert await unchanged(stage.join(("ann", 2, True))) == [Conflict(b"A", 1, 1, b"w")]


async def test_an_ended_ticket_is_shown_until_the_buyer_asks_for_a_new_one(
    stage: Stage, unchanged: Any
) -> None:
    await stage.publish(5)
    await stage.at(T0).join("ann")
    await stage.leave(1)
    assert await unchanged(stage.join(("ann", 2))) == [Has(b"A", 1, 1, b"l")]
    assert await unchanged(stage.join("ann", sku="B")) == [Has(b"A", 1, 1, b"l")]
    assert await stage.join(("ann", 2, True), sku="B") == [Waits(1)]
    assert await stage.buyers() == {"ann": "B:1:2"}
    assert await stage.join(("ann", 2, True), sku="B") == [Has(b"B", 1, 2, b"w")]  # live: again or not


async def test_a_ticket_of_another_item_that_everybody_passed_is_sold_out(stage: Stage) -> None:
    await stage.publish(1)
    await stage.at(T0).join("ann", "bob")
    await stage.at(OPENS).advance()
    loser = ["ann", "bob"][(await stage.outcome()).index(b"w")]
    assert [answer.byte for answer in await stage.join(loser, sku="B")] == [b"s"]
    assert await stage.join((loser, 1, True), sku="B") == [Claimed(1)]


async def test_sold_out_stores_nothing_and_keeps_showing_what_one_has(stage: Stage, unchanged: Any) -> None:
    await stage.publish(1)
    await stage.join("ann")
    assert await unchanged(stage.join("bob", "ann", "cid")) == [
        Turned("sold_out"),
        Has(b"A", 1, 1, b"c"),
        Turned("sold_out"),
    ]


async def test_the_last_unit_is_not_taken_for_a_buyer_who_wants_two(stage: Stage, unchanged: Any) -> None:
    await stage.publish(1)
    assert await unchanged(stage.join(("ann", 2))) == [Turned("sold_out")]
    assert await stage.join(("ann", 2), "bob") == [Turned("sold_out"), Claimed(1)]


@pytest.mark.parametrize(
    ("now", "fields", "buyer", "why"),
    [
        (T0 - 1, {}, "ann", "not_open_yet"),
        (CLOSES, {}, "ann", "closed"),
        (OPENS, {"closed": 1}, "ann", "closed"),
        (OPENS, {}, ("ann", 3), "limit"),
        (T0, {}, ("ann", 3), "limit"),
        (T0, {"line_max": 0}, "ann", "line_full"),
    ],
)
async def test_a_refused_buyer_leaves_no_trace(
    stage: Stage, unchanged: Any, now: int, fields: dict[str, int], buyer: Any, why: Any
) -> None:
    await stage.publish(5, **fields)
    assert await unchanged(stage.at(now).join(buyer)) == [Turned(why)]


async def test_in_a_closed_sale_tickets_are_still_shown(stage: Stage, unchanged: Any) -> None:
    await stage.publish(5)
    await stage.at(T0).join("ann")
    assert await unchanged(stage.at(CLOSES).join("ann", ("ann", 1, True))) == [
        Has(b"A", 1, 1, b"x"),
        Turned("closed"),
    ]


async def test_a_backlog_of_orders_refuses_new_buyers_and_shows_old_ones(
    stage: Stage, unchanged: Any
) -> None:
    await stage.publish(5)
    await stage.join("ann", "bob")
    assert await unchanged(stage.join("ann", "cid", backlog_max=2)) == [Has(b"A", 1, 1, b"c"), Turned("busy")]
    assert await stage.join("cid", "dan", backlog_max=3) == [Claimed(3), Turned("busy")]


async def test_the_line_is_full_by_those_who_wait_not_by_those_who_left(stage: Stage) -> None:
    await stage.publish(5, line_max=2)
    stage.at(T0)
    assert await stage.join("ann", "bob", "cid") == [Waits(1), Waits(2), Turned("line_full")]
    await stage.leave(1)
    assert await stage.join("cid") == [Waits(3)]


async def test_while_paused_one_waits_in_line(stage: Stage) -> None:
    await stage.publish(5)
    await stage.switch(2, paused=1)
    assert await stage.join("ann") == [Waits(1)]
    await stage.scripts.item_switch(sale="x", epoch=1, sku="B", paused=True, now_ms=stage.now)
    await stage.switch(3, paused=0)
    assert await stage.join("bob", sku="B") == [Waits(1)]
    assert await stage.claims() == []


async def test_nobody_overtakes_those_who_wait(stage: Stage) -> None:
    await stage.publish(5)
    await stage.at(T0).join("ann")
    assert await stage.at(OPENS).join("bob") == [Waits(2)]
    await stage.advance()
    assert await stage.join("cid") == [Claimed(3)]
    assert await stage.claimed_seqs() == [1, 2, 3]


async def test_the_rate_lets_a_burst_in_and_then_makes_a_line(stage: Stage) -> None:
    await stage.publish(50, rate_milli=1_000, burst=2)
    assert await stage.join("a", "b", "c", "d") == [Claimed(1), Claimed(2), Waits(3), Waits(4)]
    assert (await stage.sale())["tokens_micro"] == "0"
    stage.at(OPENS + 1_500)
    assert await stage.join("e") == [Waits(5)]
    served = await stage.advance()
    assert (served.served, served.claimed) == (3, 1)
    assert (await stage.sale())["tokens_micro"] == "500000"


async def test_slow_rates_lose_no_fraction_however_often_the_bucket_is_settled(stage: Stage) -> None:
    await stage.publish(50, rate_milli=1, burst=1, closes_ms=OPENS * 2)  # one ticket in 1,000 s
    assert await stage.join("a") == [Claimed(1)]
    for step in range(1, 41):
        await stage.at(OPENS + step * 7).join(f"b{step}")
    assert (await stage.sale())["tokens_micro"] == str(40 * 7)
    assert (await stage.at(OPENS + 999_999).advance(work_max=1)).claimed == 0
    assert (await stage.at(OPENS + 1_000_000).advance(work_max=1)).claimed == 1  # to the millisecond


async def test_with_standby_one_waits_at_stock_zero(stage: Stage) -> None:
    await stage.publish(1, standby=1, limit=1)
    assert await stage.join("ann", "bob") == [Claimed(1), Waits(2)]
    assert (await stage.item())["served"] == "1"


async def test_the_clock_never_runs_back(stage: Stage) -> None:
    await stage.publish(5)
    await stage.at(FREEZE + 5).join("ann")
    reply = await stage.at(T0).batch("bob")
    assert reply.now_ms == FREEZE + 5
    assert (await stage.item())["early"] == "0"  # nobody joins a draw that is frozen


async def test_the_server_clock_is_used_when_no_time_is_given(stage: Stage) -> None:
    await stage.publish(5, line_opens_ms=0, freeze_ms=0, opens_ms=0, closes_ms=4_000_000_000_000)
    seconds, _ = await stage.link.call("TIME")
    reply = await stage.at(0).batch("ann")
    assert abs(reply.now_ms - max(int(seconds) * 1000, T0 - 1_000)) < 60_000


async def test_a_batch_of_a_thousand_fits(stage: Stage) -> None:
    await stage.publish(400, line_max=10**6)
    answers = await stage.join(*[f"b{n}" for n in range(1_000)])
    assert answers[:400] == [Claimed(n) for n in range(1, 401)]
    assert answers[400:] == [Turned("sold_out")] * 600
    again = await stage.join(*[f"b{n}" for n in range(1_000)])
    assert again[:400] == [Has(b"A", n, 1, b"c") for n in range(1, 401)]


@pytest.mark.parametrize("claimed", [True, False], ids=["claims", "places"])
async def test_every_ticket_has_its_number_everywhere_it_is_written(stage: Stage, claimed: bool) -> None:
    """Numbers are put together from their digits: across powers of ten, and with another wish in between."""
    await stage.publish(2_000, line_max=10**6)
    stage.at(OPENS if claimed else FREEZE)
    for first in range(1, 1_010, 7):
        wishes = [(f"b{seq}", 1 + (seq % 5 == 0)) for seq in range(first, first + 7)]
        kind = Claimed if claimed else Waits
        assert await stage.join(*wishes, backlog_max=10**6) == [kind(seq) for seq in range(first, first + 7)]
    stored = {f"b{seq}": f"A:{seq}:{1 + (seq % 5 == 0)}" for seq in range(1, 1_016)}
    assert await stage.buyers() == stored
    if claimed:
        assert await stage.claims() == [
            f"1|1|A|{seq}|{1 + (seq % 5 == 0)}|{OPENS}|b{seq}" for seq in range(1, 1_016)
        ]
    else:
        assert await stage.line() == {
            f"{seq}-0": b"%d:b%d" % (1 + (seq % 5 == 0), seq) for seq in range(1, 1_016)
        }


async def test_old_tickets_and_refusals_stand_between_new_ones_at_their_places(stage: Stage) -> None:
    await stage.publish(2)
    assert await stage.join("ann", sku="B") == [Claimed(1)]
    assert await stage.join(("bob", 3), "cat", "ann", "cat", ("cat", 2), "dan", "eve") == [
        Turned("limit"),
        Claimed(1),
        Conflict(b"B", 1, 1, b"c"),
        Has(b"A", 1, 1, b"c"),
        Conflict(b"A", 1, 1, b"c"),
        Claimed(2),
        Turned("sold_out"),
    ]


async def test_two_hundred_at_once_share_ten_units_and_one_buyer_gets_one_ticket(stage: Stage) -> None:
    await stage.publish(10)
    buyers = [f"b{n}" for n in range(150)] + ["ann"] * 50
    replies = await asyncio.gather(*[stage.join(buyer) for buyer in buyers])
    answers = [reply[0] for reply in replies]
    assert sum(isinstance(answer, Claimed) for answer in answers) == 10
    assert sum(answer == Turned("sold_out") for answer in answers) >= 140
    assert await stage.units_left() == 0
    assert len(set(await stage.claims())) == 10
    assert sum(isinstance(answer, Claimed) for answer in answers[150:]) <= 1


async def test_a_lost_reply_is_made_good_by_the_same_call(stage: Stage) -> None:
    """The caller cannot know whether the first call happened; the second tells, and takes no stock again."""
    await stage.publish(5)
    first = await stage.join("ann", "bob")
    assert first == [Claimed(1), Claimed(2)]
    for _ in range(3):
        assert await stage.join("ann", "bob") == [Has(b"A", 1, 1, b"c"), Has(b"A", 2, 1, b"c")]
    assert await stage.units_left() == 3
    assert len(await stage.claims()) == 2
