"""Thousands of simulated histories keep every promise; the same world with a mistake in it does not."""

from __future__ import annotations

import pytest

from app.record import encode
from tests.simulation.run import broken
from tests.simulation.world import World

SHORT = 1_500  # some seven seconds of one processor; `python -m tests.simulation.run` does any number

# A mistake and seeds among which it shows.
MISTAKES = {
    "failover_while_unknown": range(1, 60),
    "new_key": range(1, 60),
    "retake_is_told": range(50, 130),
    "no_guard": range(350, 400),
}


@pytest.mark.parametrize("part", range(3))
def test_no_seed_breaks_a_promise(part: int) -> None:
    seeds = range(part * SHORT // 3 + 1, (part + 1) * SHORT // 3 + 1)
    found = {seed: why for seed in seeds if (why := broken(seed))}
    assert not found, found


def test_a_seed_plays_the_same_history_again() -> None:
    first, second = ([encode(line) for line in World(7).run()] for _ in range(2))
    assert first == second
    assert first != [encode(line) for line in World(8).run()]


@pytest.mark.parametrize("bug", MISTAKES)
def test_a_mistake_in_the_world_is_found(bug: str) -> None:
    assert any(broken(seed, bug=bug) for seed in MISTAKES[bug])
