"""Front doors and workers are replaced one after the other behind a balancer, and no buyer notices."""

from __future__ import annotations

import json
import sys

import pytest

from tests.chaos.system import Zygote
from tests.conftest import Stores
from tests.ha.rolling import roll


async def test_no_request_fails_while_everything_is_restarted_in_turn(zygote: Zygote, stores: Stores) -> None:
    """The balancer learns of a stop only from refused connections, as plain nginx does: the harder case."""
    told = await roll(zygote, stores, rounds=1, checks=False, drain_s=0.5, joins_per_s=60)
    assert told.failed == {}
    assert told.joins > 100
    assert told.restarts == {"front": 2, "worker": 1}


@pytest.mark.long
@pytest.mark.parametrize("checks", [True, False], ids=["checked", "unchecked"])
async def test_no_request_fails_in_many_rounds(zygote: Zygote, stores: Stores, checks: bool) -> None:
    told = await roll(zygote, stores, rounds=10, checks=checks, drain_s=1.0, joins_per_s=120)
    figures = {
        "joins": told.joins,
        "polls": told.polls,
        "restarts": told.restarts,
        "failed": told.failed,
        "slowest_ms": round(told.slowest_s * 1000),
        "front_gone_s": [round(min(told.took_s), 2), round(max(told.took_s), 2)],
    }
    sys.stderr.write(json.dumps(figures) + "\n")  # for RELIABILITY.md: pytest -s
    assert told.failed == {}
