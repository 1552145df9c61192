"""claims_mark: a batch of winners is told in one call; whatever is not the plain case is left to ticket_mark."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import alike
from app.answers import Counted, Gone, MarkedEach, Old, Removed
from app.keys import GROUP
from app.scripts import _runs
from tests.lua.conftest import Stage

pytestmark = pytest.mark.stores_matrix


async def read(stage: Stage, *seqs: int, consumer: str = "one") -> list[tuple[int, str, bytes]]:
    """Deliver every entry; returns (seq, order_no, entry id) of these tickets, of all if none is named."""
    found = await stage.link.call(
        "XREADGROUP", "GROUP", GROUP, consumer, "COUNT", 2_000, "STREAMS", stage.keys.orders, ">"
    )
    tickets = [
        (int(ticket.split(b":")[0]), entry_id)
        for _, entries in found or ()
        for entry_id, fields in entries
        for ticket in fields[2::2]
    ]
    return [(seq, number(seq), entry_id) for seq, entry_id in sorted(tickets) if not seqs or seq in seqs]


def number(seq: int) -> str:
    return f"{seq:024d}"


async def one_by_one(stage: Stage, *buyers: str) -> None:
    """Each in a call, and so in an entry, of their own."""
    for buyer in buyers:
        await stage.join(buyer)


async def mark(stage: Stage, *tickets: tuple[int, str, bytes], epoch: int = 1) -> Any:
    """As confirm asks: tickets of whole entries first, and only those entries are named."""
    held = await stage.link.call("XRANGE", stage.keys.orders, "-", "+")
    sizes = {entry_id: len(fields) // 2 - 1 for entry_id, fields in held}
    mine = Counter(entry_id for _, _, entry_id in tickets)
    whole = [(entry_id, count) for entry_id, count in mine.items() if sizes.get(entry_id) == count]
    named = [entry_id for entry_id, _ in whole]
    order = sorted(tickets, key=lambda one: named.index(one[2]) if one[2] in named else len(named))
    answer = await stage.scripts.claims_mark(
        sale="x", epoch=epoch, sku="A", before=b'{"n":"', behind=b'"}', seqs=[seq for seq, _, _ in order],
        order_nos=[no for _, no, _ in order], entries=whole, now_ms=stage.now,
    )  # fmt: skip
    if isinstance(answer, MarkedEach):
        done = dict(zip(order, answer.done, strict=True))
        return MarkedEach("".join(done[one] for one in tickets))
    return answer


NONE = (1, number(1), b"1-1")


async def left(stage: Stage) -> tuple[int, int]:
    """Entries in the stream, and those of them that are pending; the number of open claims is what they hold."""
    held = await stage.link.call("XRANGE", stage.keys.orders, "-", "+")
    counted = int((await stage.sale())["claims_open"])
    assert counted == sum(len(fields) // 2 - 1 for _, fields in held)
    return len(held), (await stage.link.call("XPENDING", stage.keys.orders, GROUP))[0]


async def test_claimed_tickets_are_reserved_and_told_version_one(stage: Stage) -> None:
    await stage.publish(5)
    await one_by_one(stage, "ann", "bob", "cid", "dan")
    await stage.ask(2, "leave", buyer="bob")
    assert await mark(stage, *await read(stage, 1, 2, 4)) == MarkedEach("111")
    assert await left(stage) == (1, 1)  # the third is still to be told
    assert await stage.outcome() == b"rrcr"
    told = await stage.told()
    assert {name: told[name] for name in ("A:1", "A:2", "A:4")} == {
        f"A:{seq}": '1|r|{"n":"' + number(seq) + '"}' for seq in (1, 2, 4)
    }  # fmt: skip
    assert "A:2:a" in told  # still leaving


async def test_it_tells_what_ticket_mark_would_have_told(stage: Stage) -> None:
    await stage.publish(5)
    await one_by_one(stage, "ann", "bob")
    await stage.mark(1, 1, b"r", json='{"n":"' + number(2) + '"}', keep_ask=True)
    await mark(stage, *await read(stage, 2))
    assert await stage.outcome() == b"rr"
    told = await stage.told()
    assert told["A:1"] == told["A:2"]


async def test_a_ticket_that_ended_untold_or_waits_is_left_alone_with_its_entry(stage: Stage) -> None:
    await stage.publish(3)
    await one_by_one(stage, "ann", "bob", "cid")
    (ann, bob, cid) = await read(stage)
    await stage.link.call("SETRANGE", stage.keys.outcome("A"), 0, "e")
    assert await mark(stage, ann, bob, cid, (9, number(9), b"1-1")) == MarkedEach("0110")
    assert await stage.outcome() == b"err"
    told = await stage.told()
    assert sorted(told) == ["A:2", "A:3"]
    assert await left(stage) == (1, 1)


async def test_what_was_told_is_never_told_again_but_its_entry_is_done(stage: Stage) -> None:
    """Anything told has version 1 or a later one: a redelivered batch costs one call too."""
    await stage.publish(3)
    await one_by_one(stage, "ann", "bob", "cid")
    tickets = await read(stage)
    await stage.mark(1, 4, b"p")
    await stage.release(2, 1)
    before, told_before = await stage.outcome(), await stage.told()
    assert await mark(stage, *tickets) == MarkedEach("111")
    assert await stage.outcome() == before[:2] + b"r"
    told = await stage.told()
    assert (told["A:1"], told["A:2"]) == (told_before["A:1"], told_before["A:2"])
    assert await left(stage) == (0, 0)


async def test_a_claimed_ticket_that_was_told_keeps_its_byte_among_others(stage: Stage) -> None:
    """units_retake leaves it claimed, with a newer version: only ticket_mark may go on from there."""
    await stage.publish(5)
    await one_by_one(stage, "ann", "bob", "cid", "dan")
    tickets = await read(stage)
    await stage.mark(2, 1, b"r")
    await stage.release(2, 2)
    await stage.retake(2, 2)
    assert await stage.outcome() == b"cccc"
    told = (await stage.told())["A:2"]
    assert await mark(stage, *tickets) == MarkedEach("1111")
    assert await stage.outcome() == b"rcrr"
    assert (await stage.told())["A:2"] == told
    assert await left(stage) == (0, 0)


async def test_nothing_to_mark_changes_nothing(stage: Stage, unchanged: Any) -> None:
    await stage.publish(3)
    await stage.join("ann")
    (ticket,) = await read(stage)
    await stage.link.call("SETRANGE", stage.keys.outcome("A"), 0, "k")
    assert await unchanged(mark(stage, ticket)) == MarkedEach("0")


async def test_another_epoch_or_no_sale_changes_nothing(stage: Stage, unchanged: Any) -> None:
    assert isinstance(await mark(stage, NONE), Gone)
    await stage.publish(3)
    await stage.join("ann")
    (ticket,) = await read(stage)
    assert isinstance(await unchanged(mark(stage, ticket, epoch=2)), Old)


async def test_what_tickets_are_told_alike_is_kept_once(stage: Stage) -> None:
    await stage.publish(5)
    await one_by_one(stage, "ann", "bob", "cid")
    (ann, bob, cid) = await read(stage)
    await mark(stage, ann)
    await mark(stage, bob, cid)
    status = await stage.status()
    (form,) = [field for field in status if field.startswith("=")]
    assert status[form] == '{"n":"\0"}'
    assert form == alike.field_of(alike.name_of(alike.form_of(b'{"n":"', b'"}')))
    assert status["A:2"] == '1|r|{"like":"' + form[1:] + '","order_no":"' + number(2) + '"}'


async def test_tickets_need_not_come_in_the_order_of_their_numbers(stage: Stage) -> None:
    """A drawn line is served in another order than it was joined; an entry goes with its own ticket."""
    await stage.publish(9)
    await one_by_one(stage, *[f"b{n}" for n in range(8)])
    tickets = await read(stage)
    await stage.link.call("SETRANGE", stage.keys.outcome("A"), 4, "e")
    order = [tickets[at] for at in (5, 6, 0, 4, 2, 1)]
    assert await mark(stage, *order) == MarkedEach("111011")
    assert await stage.outcome() == b"rrrcerrc"
    told = await stage.told()
    assert told == {f"A:{seq}": '1|r|{"n":"' + number(seq) + '"}' for seq in (1, 2, 3, 6, 7)}
    kept = await stage.link.call("XRANGE", stage.keys.orders, "-", "+")
    assert {entry_id for entry_id, _ in kept} >= {tickets[at][2] for at in (3, 4, 7)}
    assert (await left(stage))[1] == 3


@given(st.lists(st.integers(1, 2**53 - 1), min_size=1, max_size=40))
def test_runs_say_what_they_stand_for(seqs: list[int]) -> None:
    pairs = _runs(seqs)
    assert [n for a, b in zip(*[iter(pairs)] * 2, strict=True) for n in range(a, a + b)] == seqs


async def test_an_entry_leaves_with_the_last_of_its_tickets(stage: Stage) -> None:
    await stage.publish(9)
    await stage.join("ann", "bob", "cid")
    await stage.join("dan", "eve")
    tickets = await read(stage)
    await stage.link.call("SETRANGE", stage.keys.outcome("A"), 1, "e")
    assert await mark(stage, *tickets) == MarkedEach("10111")
    assert await stage.outcome() == b"rerrr"
    assert await left(stage) == (1, 1)  # bob's ticket ended untold: ticket_mark first
    assert (await stage.sale())["claims_open"] == "3"
    assert await mark(stage, *tickets[:2]) == MarkedEach("10")  # a part of an entry takes nothing off
    assert await left(stage) == (1, 1)
    remove = stage.scripts.claims_remove
    assert await remove(sale="x", entries=[(tickets[0][2], 3)]) == Removed(1)
    assert await left(stage) == (0, 0)
    assert await remove(sale="x", entries=[(tickets[0][2], 3)]) == Removed(0)
    assert (await stage.sale())["claims_open"] == "0"


async def test_entries_that_are_removed_count_what_they_held_once(stage: Stage, unchanged: Any) -> None:
    await stage.publish(20)
    for size in (1, 3, 3, 2, 1):
        await stage.join(*[f"{size}-{n}-{stage.now}" for n in range(size)])
        stage.now += 1
    ids = [entry_id for _, _, entry_id in await read(stage)]
    entries = list(Counter(ids).items())
    assert await stage.scripts.claims_remove(sale="x", entries=entries[1:4]) == Removed(3)
    assert await left(stage) == (2, 2)
    assert await unchanged(stage.scripts.claims_remove(sale="x", entries=entries[1:4])) == Removed(0)
    assert await stage.scripts.claims_remove(sale="x", entries=entries) == Removed(2)
    assert await left(stage) == (0, 0)
    sale = await stage.sale()
    assert (sale["claims_open"], sale["claims_made"]) == ("0", "10")


async def test_removing_from_a_sale_that_is_gone_makes_no_sale(stage: Stage) -> None:
    await stage.publish(3)
    await stage.join("ann")
    ((_, _, entry_id),) = await read(stage)
    await stage.link.call("DEL", stage.keys.sale)
    assert await stage.scripts.claims_remove(sale="x", entries=[(entry_id, 1)]) == Removed(1)
    assert await stage.link.call("EXISTS", stage.keys.sale) == 0


async def test_without_entries_there_are_no_claims(stage: Stage) -> None:
    """Whatever was counted wrong: with the last entry it is over."""
    await stage.publish(3)
    await stage.join("ann", "bob")
    tickets = await read(stage)
    await stage.link.call("HSET", stage.keys.sale, "claims_open", 7)
    assert await mark(stage, *tickets) == MarkedEach("11")
    assert await left(stage) == (0, 0)


async def test_a_wrong_number_of_open_claims_is_set_right_unless_something_moved(
    stage: Stage, unchanged: Any
) -> None:
    await stage.publish(5)
    await stage.join("ann", "bob")
    await stage.link.call("HSET", stage.keys.sale, "claims_open", 9)

    def count(**of: int) -> Any:
        return stage.scripts.claims_count(
            sale="x", **({"epoch": 1, "made": 2, "open_": 9, "counted": 2} | of)
        )

    assert await unchanged(count(made=1)) == Counted(9)
    assert await unchanged(count(open_=8)) == Counted(9)
    assert await unchanged(count(epoch=2)) == Old()
    assert await count() == Counted(2)
    assert await left(stage) == (1, 0)


async def test_a_whole_batch_is_told(stage: Stage) -> None:
    await stage.publish(1_000)
    for first in range(0, 1_000, 250):
        await stage.join(*[f"b{first + n}" for n in range(250)])
    assert await mark(stage, *await read(stage)) == MarkedEach("1" * 1_000)
    assert await stage.outcome() == b"r" * 1_000
    assert len(await stage.told()) == 1_000
    assert await left(stage) == (0, 0)


@pytest.mark.parametrize("newest_first", [True, False])
async def test_entries_that_others_hold_or_nobody_has_had_stay(stage: Stage, newest_first: bool) -> None:
    """Nothing that is not done is lost."""
    await stage.publish(300)
    await one_by_one(stage, *[f"a{n}" for n in range(120)])
    ours = await read(stage)
    await one_by_one(stage, *[f"b{n}" for n in range(120)])
    theirs = await read(stage, consumer="two")
    await stage.join("last")  # nobody has had it
    first, second = (theirs, ours) if newest_first else (ours, theirs)
    assert await mark(stage, *first) == MarkedEach("1" * 120)
    assert await left(stage) == (121, 120)
    kept = [entry_id for entry_id, _ in await stage.link.call("XRANGE", stage.keys.orders, "-", "+")]
    assert sorted(kept[:120]) == sorted(entry_id for _, _, entry_id in second)
    assert await mark(stage, *second[:60]) == MarkedEach("1" * 60)
    assert await left(stage) == (61, 60)
    assert await mark(stage, *second[60:]) == MarkedEach("1" * 60)
    assert await left(stage) == (1, 0)
    assert len(await read(stage)) == 1


async def test_a_caller_whose_last_entry_is_not_the_newest_loses_nothing(stage: Stage) -> None:
    await stage.publish(10)
    await one_by_one(stage, *[f"b{n}" for n in range(6)])
    (*rest, newest) = await read(stage)
    assert await mark(stage, newest, *rest) == MarkedEach("111111")
    await stage.join("next")
    assert (await left(stage))[1] == 0
    await mark(stage, *await read(stage))
    assert await left(stage) == (0, 0)  # what was left over goes with the next
