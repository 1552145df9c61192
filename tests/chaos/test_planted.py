"""The checker is checked: each planted bug is caught by the check that is there for it, and without it all is well."""

from __future__ import annotations

import pytest

from app.history.report import report
from tests.chaos.planted import PLANS
from tests.chaos.plants import PLANTS
from tests.chaos.scenario import PATIENCE, play
from tests.chaos.system import Zygote
from tests.conftest import Stores

CAUGHT_WITHIN_S = 120.0 * PATIENCE


def test_every_bug_that_the_design_forbids_is_planted_somewhere() -> None:
    assert {plant for plan in PLANS.values() for plant in plan.plants} == set(PLANTS)
    assert len(PLANTS) >= 15


@pytest.mark.parametrize("name", PLANS)
async def test_the_planted_bug_is_caught(name: str, zygote: Zygote, stores: Stores) -> None:
    plan = PLANS[name]
    outcome = await play(plan, zygote, stores, seed=1, planted=True)
    assert plan.caught_by & outcome.verdict.broken, "\n".join(report(outcome.verdict, outcome.lines))
    assert outcome.seconds < CAUGHT_WITHIN_S


ALWAYS = ("client_retries", "ack_before_commit", "failover_while_unknown", "stale_status")


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in PLANS]
)
async def test_without_the_bug_the_same_sale_keeps_its_promises(
    name: str, zygote: Zygote, stores: Stores
) -> None:
    plan = PLANS[name]
    outcome = await play(plan, zygote, stores, seed=1, planted=False)
    said = "\n".join(report(outcome.verdict, outcome.lines))
    if plan.heals:
        assert outcome.verdict.ok, said
        assert outcome.rested, said
        assert not outcome.surprises, outcome.surprises
    else:
        assert not plan.caught_by & outcome.verdict.broken, said
