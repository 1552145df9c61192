"""No stage of the hot path has become much dearer; if one has, the check says which. CPU ratios within one run."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from app.embedded import make_folder
from loadtest.bench.regression import (
    STAGES,
    confirm_figure,
    door_figures,
    overload_figures,
    read_bounds,
    worse,
)
from loadtest.bench.results import Plan

BOUNDS = read_bounds(Path(__file__).with_name("bounds.json"))
PLAN = Plan(rounds=3, seconds=0.4)
OVERLOAD = Plan(rounds=3, seconds=0.5)
TRIES = 3


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("regression")
    for part in (home, *home.parents):
        if part.stat().st_uid == 0 and part.name.startswith(("pytest-", "regression")):
            part.chmod(0o711)  # the stores run as another account and pass through
    make_folder(home / "stores")
    return home / "stores"


def run(work: object) -> dict[str, float]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)  # type: ignore[arg-type]


def measured(folder: Path, work: Callable[[Path], object], fine: Callable[[list[str]], bool]) -> list[str]:
    """What is worse than its bound; measured anew, twice at most, if that is not `fine`.

    What else runs on the machine spoils one measurement, a mistake of ours each of them.
    """
    for number in range(TRIES):
        home = folder / str(number)
        make_folder(home)
        figures = run(work(home))
        named = worse(figures, BOUNDS)
        if fine(named):
            break
    return named


@pytest.mark.serial
def test_no_stage_of_the_front_door_has_become_much_dearer(folder: Path) -> None:
    assert not measured(folder, lambda home: door_figures(home, PLAN), operator.not_)


# Not in `make test`: on two cores it is now the crowd's wait for its own connections that varies, 2 to 96 % of it
# (BENCHMARKS.md, "150 % offered"), and a bound that holds would say nothing. The next test shows that the gate counts.
@pytest.mark.long
@pytest.mark.serial
def test_a_crowd_is_served_at_full_speed_and_the_rest_is_told_at_once(folder: Path) -> None:
    assert not measured(folder, lambda home: overload_figures(home, OVERLOAD), operator.not_)


@pytest.mark.serial
def test_a_front_without_its_gate_is_caught(folder: Path) -> None:
    def found(named: list[str]) -> bool:
        return any(sentence.startswith(STAGES["waiting"]) for sentence in named)

    without = {"overload_wait_max_ms": "0", "join_wait_max_ms": "60000"}
    named = measured(folder, lambda home: overload_figures(home, OVERLOAD, **without), found)
    assert found(named), named


@pytest.mark.serial
def test_confirm_has_not_become_much_dearer(folder: Path) -> None:
    assert not measured(folder, lambda home: confirm_figure(home, PLAN), operator.not_)


@pytest.mark.serial
def test_a_stage_that_was_slowed_is_caught_and_named(folder: Path) -> None:
    """A front whose poll, and nothing else, does more: the check must say poll, and only poll."""

    def poll_alone(named: list[str]) -> bool:
        return [sentence.split(":")[0] for sentence in named] == ["poll"]

    named = measured(
        folder, lambda home: door_figures(home, PLAN, module="tests.loadtest.slow_front"), poll_alone
    )
    assert poll_alone(named), named


def test_every_stage_has_a_bound() -> None:
    assert set(BOUNDS) == set(STAGES)
