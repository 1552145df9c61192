"""A primary of a Redis Cluster dies in the middle of six sales: two are made anew, the other four notice nothing."""

from __future__ import annotations

import json
import os
import sys

import pytest

from tests.chaos.system import Zygote
from tests.conftest import Stores
from tests.ha.cluster_sale import Outcome, move_slots, play


def hold(outcome: Outcome, *, epoch: int = 2) -> None:
    """Every promise, in every sale. epoch: of those that were hit; 1: nothing had to be made anew."""
    assert not outcome.surprises
    for course in outcome.courses:
        assert course.verdict is not None
        assert course.verdict.ok, f"{course.sale} (hit: {course.hit}): {course.verdict}"
        assert course.lost == []
        assert course.epoch == (epoch if course.hit else 1), course.sale
        if not course.hit:
            assert course.not_served == 0, course.sale


def figures(outcome: Outcome) -> dict[str, object]:
    hit = [course for course in outcome.courses if course.hit]
    others = [course for course in outcome.courses if not course.hit]
    return {
        "promoted_s": round(outcome.promoted_s, 2),
        "down_s": [round(course.down_s, 2) for course in hit],
        "shut_s": [round(course.shut_s, 2) for course in hit],
        "others_down_s": round(max(course.down_s for course in others), 2),
        "others_not_served": sum(course.not_served for course in others),
        "joined": sum(course.joined for course in outcome.courses),
        "reserved": sum(course.reserved for course in outcome.courses),
        "lost": sum(len(course.lost) for course in outcome.courses),
        "took_s": round(outcome.seconds, 1),
    }


@pytest.mark.slow
async def test_a_primary_dies_and_only_its_own_sales_are_made_anew(zygote: Zygote, stores: Stores) -> None:
    outcome = await play(zygote, stores, seed=1)
    sys.stderr.write(json.dumps(figures(outcome)) + "\n")
    hold(outcome)


@pytest.mark.long
@pytest.mark.timeout(1_800)
async def test_primaries_die_in_many_sales(zygote: Zygote, stores: Stores) -> None:
    """FAIRDROP_TEST_SEEDS=3-12 chooses."""
    first, _, last = os.environ.get("FAIRDROP_TEST_SEEDS", "2-6").partition("-")
    for seed in range(int(first), int(last or first) + 1):
        outcome = await play(zygote, stores, seed, per_s=8.0)
        sys.stderr.write(json.dumps({"seed": seed} | figures(outcome)) + "\n")
        hold(outcome)


@pytest.mark.long
async def test_a_slot_that_is_moved_takes_its_sale_along(zygote: Zygote, stores: Stores) -> None:
    """The new node is another home: the sale is shut until the next pulse arms it there. Nothing is made anew."""
    outcome = await play(
        zygote, stores, seed=1, per_s=8.0, fault=move_slots, environment={"FAIRDROP_REBUILD_AFTER_S": "10"}
    )
    sys.stderr.write(json.dumps(figures(outcome)) + "\n")
    hold(outcome, epoch=1)
