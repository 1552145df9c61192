"""Kills of everything in the middle of a sale, and a death at every crash point: all promises are kept."""

from __future__ import annotations

import pytest

from app.check_history import report
from tests.chaos.chaos import at_point, storm
from tests.chaos.points import POINTS
from tests.chaos.scenario import play
from tests.chaos.system import Zygote
from tests.conftest import Stores

ALWAYS = ("confirm.after_commit", "relay.after_script", "pay.after_send", "hook.after_commit")


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_sale_survives_kills_of_every_process_and_store(
    seed: int, zygote: Zygote, stores: Stores
) -> None:
    plan, faults = storm(stores, seed)
    outcome = await play(plan, zygote, stores, seed, planted=False)
    said = "\n".join(report(outcome.verdict, outcome.lines))
    assert outcome.verdict.ok, said
    assert outcome.rested, said
    assert sum(faults.done.values()) == len(faults.todo)


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in POINTS]
)
async def test_a_death_at_a_crash_point_breaks_no_promise(name: str, zygote: Zygote, stores: Stores) -> None:
    outcome = await play(at_point(name), zygote, stores, 1, planted=False)
    said = "\n".join(report(outcome.verdict, outcome.lines))
    assert outcome.verdict.ok, said
    assert outcome.rested, said
