"""A replica takes over in the middle of a sale: nothing is oversold, nobody loses what was reserved. All: `make ha`."""

from __future__ import annotations

import sys

import pytest

from app.history.report import report
from tests.chaos.system import Zygote
from tests.conftest import Stores
from tests.ha.failover import KINDS, fail_over

ALWAYS = ("redis kill -9", "postgres kill -9")


@pytest.mark.parametrize(
    "kind", [kind if kind in ALWAYS else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
async def test_a_sale_survives_a_failover(kind: str, zygote: Zygote, stores: Stores) -> None:
    outcome, took_s = await fail_over(kind, zygote, stores, 1, until_it_follows=kind not in ALWAYS)
    said = "\n".join(report(outcome.verdict, outcome.lines))
    assert outcome.verdict.ok, said
    assert outcome.rested, said
    sys.stderr.write(f"{kind}: {took_s}\n")
    assert took_s
