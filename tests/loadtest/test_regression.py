"""No stage of the hot path has become much dearer; if one has, the check says which. CPU ratios within one run."""

from __future__ import annotations

import asyncio
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


@pytest.mark.serial
def test_no_stage_of_the_front_door_has_become_much_dearer(folder: Path) -> None:
    figures = run(door_figures(folder, PLAN))
    assert not worse(figures, BOUNDS), worse(figures, BOUNDS)


@pytest.mark.serial
def test_a_crowd_is_served_at_full_speed_and_the_rest_is_told_at_once(folder: Path) -> None:
    figures = run(overload_figures(folder, OVERLOAD))
    assert not worse(figures, BOUNDS), worse(figures, BOUNDS)


@pytest.mark.serial
def test_a_front_without_its_gate_is_caught(folder: Path) -> None:
    figures = run(overload_figures(folder, OVERLOAD, overload_wait_max_ms="0", join_wait_max_ms="60000"))
    named = worse(figures, BOUNDS)
    assert any(sentence.startswith(STAGES["waiting"]) for sentence in named), figures


@pytest.mark.serial
def test_confirm_has_not_become_much_dearer(folder: Path) -> None:
    figures = run(confirm_figure(folder, PLAN))
    assert not worse(figures, BOUNDS), worse(figures, BOUNDS)


@pytest.mark.serial
def test_a_stage_that_was_slowed_is_caught_and_named(folder: Path) -> None:
    """A front whose poll, and nothing else, does more: the check must say poll, and only poll."""
    figures = run(door_figures(folder, PLAN, module="tests.loadtest.slow_front"))
    named = worse(figures, BOUNDS)
    assert [sentence.split(":")[0] for sentence in named] == ["poll"], figures


def test_every_stage_has_a_bound() -> None:
    assert set(BOUNDS) == set(STAGES)
