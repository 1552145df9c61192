"""The verdict of a load test: it must find each kind of broken promise, and share nothing with what it judges."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from loadtest.verdict import Told, judge, report

LOADTEST = Path(__file__).resolve().parents[2] / "loadtest"
FINE = {"ok": True, "checks": [{"name": "stock", "ok": True, "left": 1, "right": 1}]}


def told(name: str, *states: str, order_no: str | None = None, tickets: int = 1) -> Told:
    return Told(name, {f"{name}-{number}" for number in range(tickets)}, list(states), order_no)


def row(order_no: str, buyer_id: str, state: str = "paid") -> dict[str, Any]:
    return {"order_no": order_no, "buyer_id": buyer_id, "state": state, "units": 1}


def test_books_that_agree_are_fine(capsys: pytest.CaptureFixture[str]) -> None:
    checks = judge(
        [told("a", "waiting", "paid", order_no="A"), told("b", "closed")], [row("A", "a")], FINE, 1
    )
    assert report(checks)
    assert "every promise was kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("memories", "orders", "audit", "units", "fault"),
    [
        ([told("a", "reserved")], [], FINE, 1, "buyers who were promised a unit have an order"),
        (
            [told("a", "paid", order_no="B")],
            [row("A", "a")],
            FINE,
            1,
            "an order number told is that buyer's order",
        ),
        ([], [row("A", "a"), row("B", "b")], FINE, 1, "units kept by orders never exceed the units on sale"),
        ([told("a", "waiting", tickets=2)], [], FINE, 1, "one ticket and one order a buyer"),
        ([], [row("A", "a"), row("B", "a", "expired")], FINE, 2, "one ticket and one order a buyer"),
        ([], [], {"checks": [{"name": "stock", "ok": False, "left": 1, "right": 2}]}, 1, "stock"),
    ],
)
def test_each_kind_of_broken_promise_is_found(
    memories: list[Told],
    orders: list[dict[str, Any]],
    audit: dict[str, Any],
    units: int,
    fault: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checks = judge(memories, orders, audit, units)
    assert [check.name for check in checks if not check.ok] == [fault]
    assert not report(checks)
    assert f"BROKEN  {fault}" in capsys.readouterr().out


def test_a_memory_survives_the_way_to_the_master() -> None:
    memory = told("a", "waiting", "paid", order_no="A", tickets=2)
    assert Told.of(memory.row()) == memory


def test_a_load_test_never_imports_what_it_loads() -> None:
    # bench/ is no load test: it also measures single functions of app/, and publishes sales without an office.
    # The recorder writes down what clients saw; it knows nothing of the product.
    for path in [*LOADTEST.glob("*.py"), *LOADTEST.glob("peers/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = {name for name in names if name.split(".")[0] == "app"}
            assert ours <= {"app.record"}, path.name
