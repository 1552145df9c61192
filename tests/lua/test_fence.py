"""Every script that touches a sale: another epoch or home is told OLD, a missing sale GONE, and nothing changes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from app.answers import Gone, Old
from app.scripts import all_scripts
from tests.lua.conftest import OPENS, T0, Stage

pytestmark = pytest.mark.stores_matrix

CALLS: dict[str, Callable[[Stage], Awaitable[Any]]] = {
    "line_join": lambda stage: stage.batch("zoe"),
    "line_leave": lambda stage: stage.leave(3),
    "line_advance": lambda stage: stage.advance(),
    "units_release": lambda stage: stage.release(1, 9),
    "units_retake": lambda stage: stage.retake(2, 9),
    "stock_add": lambda stage: stage.add(1, "t"),
    "ticket_mark": lambda stage: stage.mark(1, 9, b"r"),
    "claims_mark": lambda stage: stage.scripts.claims_mark(
        sale="x",
        epoch=stage.epoch,
        sku="A",
        before=b"{",
        behind=b"}",
        seqs=[1],
        order_nos=["n" * 24],
        entries=[(b"1-1", 1)],
        now_ms=stage.now,
    ),
    "claims_count": lambda stage: stage.scripts.claims_count(
        sale="x", epoch=stage.epoch, made=2, open_=2, counted=7
    ),
    "ask_put": lambda stage: stage.ask(1, "leave"),
    "sale_switch": lambda stage: stage.switch(9, paused=1),
    "item_switch": lambda stage: stage.scripts.item_switch(sale="x", epoch=stage.epoch, sku="A", paused=True),
    "beacon_put": lambda stage: stage.scripts.beacon_put(
        sale="x", epoch=stage.epoch, value="v", now_ms=OPENS
    ),
    "sale_pulse": lambda stage: stage.scripts.sale_pulse(sale="x", epoch=stage.epoch, pulse=9),
    "sale_advise": lambda stage: stage.scripts.sale_advise(
        sale="x", epoch=stage.epoch, slow_milli=1, base_milli=2, reason="r", notices="", lease_ms=9
    ),
    "sale_rearm": lambda stage: stage.scripts.sale_rearm(
        sale="x", epoch=stage.epoch, old_home=stage.link.run_id, new_home="n", pulse_at_least=0
    ),
}
# no sale yet; what shuts it and opens it again; no sale at all
NOT_FENCED = {
    "sale_publish",
    "sale_fence",
    "sale_rebuild",
    "rate_take",
    "sms_take",
    "breaker",
    "consumers_remove",
    "claims_remove",
}


async def scene(stage: Stage) -> Stage:
    """A ticket in each state, so that every call would have something to do: the last test shows that it would."""
    await stage.publish(5)
    await stage.at(OPENS).join("ann", "bob")
    await stage.release(2, 1)
    await stage.switch(2, paused=1)
    await stage.join("cid")
    await stage.switch(3, paused=0)
    if (await stage.line()) == {}:
        raise AssertionError("cid should wait")
    return stage


def test_every_script_is_here() -> None:
    assert {script.name for script in all_scripts()} == CALLS.keys() | NOT_FENCED


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("epoch", [0, 2, 10])
async def test_another_epoch_changes_nothing(stage: Stage, unchanged: Any, name: str, epoch: int) -> None:
    await scene(stage)
    stage.epoch = epoch
    assert await unchanged(CALLS[name](stage)) == Old()


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"sale_rearm"}))
@pytest.mark.parametrize("home", ["", "f" * 40])
async def test_another_home_changes_nothing(stage: Stage, unchanged: Any, name: str, home: str) -> None:
    await scene(stage)
    stage.link.run_id = home
    assert await unchanged(CALLS[name](stage)) == Old()


@pytest.mark.parametrize("name", CALLS)
async def test_a_missing_sale_is_gone(stage: Stage, unchanged: Any, name: str) -> None:
    assert await unchanged(CALLS[name](stage)) == Gone()
    await scene(stage)
    await stage.link.call("DEL", stage.keys.sale)
    assert await unchanged(CALLS[name](stage)) == Gone()


@pytest.mark.parametrize("name", CALLS)
async def test_with_the_right_epoch_and_home_the_same_call_does_something(stage: Stage, name: str) -> None:
    await scene(stage)
    before = await stage.dump()
    await CALLS[name](stage.at(OPENS + 1 if name != "beacon_put" else T0))
    if name == "units_retake":
        return  # refused here, because somebody waits: tests/lua/test_units.py
    assert await stage.dump() != before
