"""The kinds of fault that a campaign plays, each as a plan by seed, and how many sales of each the long form has."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.chaos import faults
from tests.chaos.scenario import Plan


class Kind(NamedTuple):
    """plan: of a seed. short: of `make test`. runs: sales in the long form. beside: others may go on beside it."""

    plan: Callable[[int], Plan]
    runs: int
    beside: bool = True
    short: Callable[[int], Plan] | None = None


KINDS: dict[str, Kind] = {
    "storm": Kind(
        lambda seed: faults.storm(seed, kills=8, stops=3),
        40,  # 320 kills of each
        beside=False,
        short=lambda seed: faults.storm(seed, kills=5, stops=1),
    ),
    "sweep": Kind(faults.sweep, 26),  # each crash point 26 times
    "cuts": Kind(lambda seed: faults.cuts(seed, 6), 20, short=lambda seed: faults.cuts(seed, 4)),
    "redis_full": Kind(faults.redis_full, 10),
    "disk_full": Kind(faults.disk_full, 10),
    "postgres_away": Kind(
        lambda seed: faults.postgres_away(seed, 60.0),
        5,
        beside=False,
        short=lambda seed: faults.postgres_away(seed, 5.0),
    ),
    "older_log": Kind(faults.older_log, 20),
    "clocks": Kind(faults.clocks, 20),
    "call_backs": Kind(faults.call_backs, 20),
    "twins": Kind(faults.twins, 20),
    "deploy": Kind(faults.deploy, 20),
}
