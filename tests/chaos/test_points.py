"""Crash points exist only in tests: nothing of them is in the product, and each names something that is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from tests.chaos.points import POINTS, VARIABLE

APP = Path(__file__).parents[2] / "app"


def test_the_product_knows_no_crash_point_and_no_planted_bug() -> None:
    for path in APP.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert VARIABLE not in text, path
        assert "failpoint" not in text.lower(), path
        assert not re.search(r"^\s*(from|import) tests\b", text, re.MULTILINE), path


def test_what_is_installed_holds_no_tests() -> None:
    wheel = (APP.parent / "pyproject.toml").read_text(encoding="utf-8")
    packed = wheel[
        wheel.index("[tool.hatch.build.targets.wheel]") : wheel.index("[tool.hatch.build.targets.sdist]")
    ]
    assert 'packages = ["app"]' in packed
    assert "tests" not in packed


@pytest.mark.parametrize("name", POINTS)
def test_a_crash_point_names_a_coroutine_of_the_product(name: str) -> None:
    point = POINTS[name]
    assert inspect.iscoroutinefunction(getattr(point.owner, point.name)), name
    assert point.when in ("before", "after")
    assert point.role in ("front", "worker", "office")
