"""ticket_mark and ask_put: what a winner is told, and what a winner asks for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.answers import (
    AlreadyAsked,
    AlreadyReleased,
    Asked,
    Marked,
    Not,
    Stale,
)
from tests.lua.conftest import OPENS, T0, Stage

pytestmark = pytest.mark.stores_matrix


async def test_a_winner_is_told_what_the_row_says(stage: Stage) -> None:
    await stage.publish(2)
    await stage.join("ann", "bob")
    await stage.ask(1, "leave")
    assert await stage.mark(1, 1, b"r", json='{"order":{"a":"|"}}', keep_ask=True) == Marked()
    assert await stage.outcome() == b"rc"
    assert await stage.status() == {"A:1": '1|r|{"order":{"a":"|"}}', "A:1:a": f"leave|{OPENS}"}
    assert await stage.mark(1, 2, b"r") == Marked()
    assert await stage.status() == {"A:1": "2|r|{}"}


async def test_a_worker_that_stalled_cannot_tell_old_news(stage: Stage, unchanged: Any) -> None:
    await stage.publish(2)
    await stage.join("ann")
    await stage.mark(1, 3, b"r")
    assert await unchanged(stage.mark(1, 3, b"p")) == Stale(3)
    assert await unchanged(stage.mark(1, 2, b"p")) == Stale(3)


async def test_versions_are_compared_as_numbers(stage: Stage) -> None:
    await stage.publish(2)
    await stage.join("ann")
    await stage.mark(1, 9, b"r")
    assert await stage.mark(1, 10, b"p") == Marked()


@pytest.mark.parametrize("ended", [b"e", b"k", b"l"])
async def test_an_ended_ticket_moves_only_for_late_money(stage: Stage, unchanged: Any, ended: bytes) -> None:
    await stage.publish(2)
    await stage.join("ann", "bob")
    for seq in (1, 2):
        await stage.mark(seq, 1, b"r")
        await stage.release(seq, 2, to=ended)
    assert await unchanged(stage.mark(1, 3, b"r")) == AlreadyReleased(ended)
    assert await stage.mark(1, 3, ended, json='{"order":"refunding"}') == Marked()  # new text, same state
    assert await stage.mark(1, 4, b"f") == Marked()
    assert await stage.mark(2, 3, b"p") == Marked()
    assert await stage.outcome() == b"fp"
    assert await stage.units_left() == 2


async def test_refunded_is_final_and_paid_moves_only_to_refunded(stage: Stage, unchanged: Any) -> None:
    await stage.publish(2)
    await stage.join("ann")
    await stage.mark(1, 1, b"p")
    assert await unchanged(stage.mark(1, 2, b"r")) == Not(b"p")
    assert await unchanged(stage.mark(1, 2, b"k")) == Not(b"p")
    await stage.mark(1, 2, b"f")
    for byte in (b"r", b"p", b"k"):
        assert await unchanged(stage.mark(1, 3, byte)) == AlreadyReleased(b"f")


async def test_cancelling_without_units_leaves_the_stock_alone(stage: Stage) -> None:
    await stage.publish(2)
    await stage.join("ann")
    assert await stage.mark(1, 1, b"k") == Marked()
    assert await stage.units_left() == 1


async def test_a_ticket_that_never_held_a_unit_is_not_marked(stage: Stage, unchanged: Any) -> None:
    await stage.publish(1)
    await stage.at(T0).join("ann")
    assert await unchanged(stage.mark(1, 1, b"r")) == Not(b"w")
    assert await unchanged(stage.mark(7, 1, b"r")) == Not(b"o")
    await stage.leave(1)
    assert await unchanged(stage.mark(1, 1, b"r")) == AlreadyReleased(b"l")


async def test_a_byte_of_no_meaning_is_refused(stage: Stage, unchanged: Any) -> None:
    await stage.publish(1)
    await stage.join("ann")
    for byte in (b"w", b"e", b"l", b"x", b"o"):
        assert await unchanged(stage.mark(1, 1, byte)) == Not(b"c")


async def test_two_hundred_marks_at_once_end_with_the_newest(stage: Stage) -> None:
    await stage.publish(1)
    await stage.join("ann")
    await asyncio.gather(*[stage.mark(1, version, b"r", json=str(version)) for version in range(1, 201)])
    assert await stage.status() == {"A:1": "200|r|200"}


async def test_a_wish_to_leave_reaches_the_worker_once(stage: Stage, unchanged: Any) -> None:
    await stage.publish(2)
    await stage.join("ann")
    replies = await asyncio.gather(*[stage.ask(1, "leave", buyer="a|b") for _ in range(200)])
    assert replies.count(Asked()) == 1
    assert replies.count(AlreadyAsked("leave")) == 199
    entries = await stage.link.call("XRANGE", stage.keys.asks, "-", "+")
    assert [entry[1] for entry in entries] == [[b"a", f"1|1|A|1|leave|-|{OPENS}|a|b".encode()]]
    assert await stage.status() == {"A:1:a": f"leave|{OPENS}"}
    assert await unchanged(stage.ask(1, "pay")) == Not(b"c")


async def test_a_wish_to_pay_names_the_channel_and_may_be_repeated_later(
    stage: Stage, unchanged: Any
) -> None:
    await stage.publish(2)
    await stage.join("ann")
    await stage.mark(1, 1, b"r")
    assert await stage.ask(1, "pay", arg="eyJ9", channel="card") == Asked()
    assert await stage.status() == {"A:1": "1|r|{}", "A:1:a": f"pay|{OPENS}|card"}
    assert await unchanged(stage.ask(1, "pay", channel="wallet")) == AlreadyAsked("pay")
    stage.at(OPENS + 10_000)
    assert await stage.ask(1, "pay", channel="wallet") == Asked()
    assert await stage.ask(1, "leave") == Asked()  # leaving wins over a payment that is starting
    assert await unchanged(stage.ask(1, "pay")) == AlreadyAsked("leave")
    entries = await stage.link.call("XRANGE", stage.keys.asks, "-", "+")
    assert entries[0][1][1] == f"1|1|A|1|pay|eyJ9|{OPENS}|ann".encode()
    assert len(entries) == 3


@pytest.mark.parametrize("byte", [b"p", b"k", b"f"])
async def test_there_is_nothing_to_ask_for_with_an_ended_or_paid_ticket(
    stage: Stage, unchanged: Any, byte: bytes
) -> None:
    await stage.publish(2)
    await stage.join("ann")
    await stage.mark(1, 1, byte)
    for kind in ("leave", "pay"):
        assert await unchanged(stage.ask(1, kind)) == Not(byte)
        assert await unchanged(stage.ask(5, kind)) == Not(b"o")
