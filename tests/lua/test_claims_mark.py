"""claims_mark: a batch of winners is told in one call; whatever is not the plain case is left to ticket_mark."""

from __future__ import annotations

from typing import Any

import pytest

from app.scripts import Gone, MarkedEach, Old
from tests.lua.conftest import Stage

pytestmark = pytest.mark.stores_matrix


async def mark(stage: Stage, *seqs: int, epoch: int = 1) -> Any:
    return await stage.scripts.claims_mark(
        sale="x", epoch=epoch, sku="A", tickets=[(seq, b'{"n":%d}' % seq) for seq in seqs], now_ms=stage.now
    )


async def test_claimed_tickets_are_reserved_and_told_version_one(stage: Stage) -> None:
    await stage.publish(5)
    await stage.join("ann", "bob", "cid", "dan")
    await stage.ask(2, "leave", buyer="bob")
    assert await mark(stage, 1, 2, 4) == MarkedEach("111")
    assert await stage.outcome() == b"rrcr"
    told = await stage.status()
    assert {name: told[name] for name in ("A:1", "A:2", "A:4")} == {
        "A:1": '1|r|{"n":1}', "A:2": '1|r|{"n":2}', "A:4": '1|r|{"n":4}',
    }  # fmt: skip
    assert "A:2:a" in told  # still leaving


async def test_it_tells_what_ticket_mark_would_have_told(stage: Stage) -> None:
    await stage.publish(5)
    await stage.join("ann", "bob")
    await stage.mark(1, 1, b"r", json='{"n":2}', keep_ask=True)
    await mark(stage, 2)
    assert await stage.outcome() == b"rr"
    told = await stage.status()
    assert told["A:1"] == told["A:2"]


async def test_a_ticket_that_was_told_before_has_ended_or_waits_is_left_alone(stage: Stage) -> None:
    await stage.publish(3)
    await stage.join("ann", "bob", "cid")
    await stage.mark(1, 4, b"p")
    await stage.release(2, 1)
    before = await stage.outcome()
    assert await mark(stage, 1, 2, 3, 9) == MarkedEach("0010")
    assert await stage.outcome() == before[:2] + b"r"
    told = await stage.status()
    assert told["A:1"].startswith("4|p|")
    assert told["A:2"].startswith("1|e|")
    assert "A:9" not in told


async def test_nothing_to_mark_changes_nothing(stage: Stage, unchanged: Any) -> None:
    await stage.publish(3)
    await stage.join("ann")
    await stage.mark(1, 1, b"r")
    assert await unchanged(mark(stage, 1)) == MarkedEach("0")


async def test_another_epoch_or_no_sale_changes_nothing(stage: Stage, unchanged: Any) -> None:
    assert isinstance(await mark(stage, 1), Gone)
    await stage.publish(3)
    await stage.join("ann")
    assert isinstance(await unchanged(mark(stage, 1, epoch=2)), Old)


async def test_a_whole_batch_is_told(stage: Stage) -> None:
    await stage.publish(1_000)
    for first in range(0, 1_000, 250):
        await stage.join(*[f"b{first + n}" for n in range(250)])
    assert await mark(stage, *range(1, 1_001)) == MarkedEach("1" * 1_000)
    assert await stage.outcome() == b"r" * 1_000
    assert len(await stage.status()) == 1_000
