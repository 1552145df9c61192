"""The kinds of fault that a campaign plays, by seed, and how many sales of each the long form has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from tests.chaos import faults, torn
from tests.chaos.scenario import Outcome, Plan, play
from tests.chaos.system import Zygote
from tests.conftest import Stores

Play = Callable[[int, Zygote, Stores, bool], Awaitable[Outcome]]  # of seed, …, and whether in the short form
OfSeed = Callable[[int], Plan]


class Kind(NamedTuple):
    """runs: sales in the long form. beside: others may go on beside it (it does not kill the Postgres of all)."""

    runs: int
    play: Play
    beside: bool = True


def sale(plan: OfSeed, short: OfSeed | None = None) -> Play:
    """One sale with its judgement; `short`: how `make test` plays it, if otherwise."""

    async def one(seed: int, zygote: Zygote, stores: Stores, in_short: bool) -> Outcome:
        return await play(((in_short and short) or plan)(seed), zygote, stores, seed)

    return one


async def tear(seed: int, zygote: Zygote, stores: Stores, in_short: bool) -> Outcome:
    cuts, heals = (100, 2) if in_short else (0, 0)
    return await torn.tear(zygote, stores, seed, cuts_max=cuts, heals_max=heals)


KINDS: dict[str, Kind] = {
    "storm": Kind(
        40,  # 320 kills of each
        sale(
            lambda seed: faults.storm(seed, kills=8, stops=3),
            lambda seed: faults.storm(seed, kills=5, stops=1),
        ),
        beside=False,
    ),
    "sweep": Kind(26, sale(faults.sweep)),  # each crash point 26 times
    "cuts": Kind(20, sale(lambda seed: faults.cuts(seed, 6), lambda seed: faults.cuts(seed, 4))),
    "redis_full": Kind(10, sale(faults.redis_full)),
    "disk_full": Kind(10, sale(faults.disk_full)),
    "postgres_away": Kind(
        5,
        sale(lambda seed: faults.postgres_away(seed, 60.0), lambda seed: faults.postgres_away(seed, 5.0)),
        beside=False,
    ),
    "older_log": Kind(20, sale(faults.older_log)),
    "torn": Kind(2, tear),  # each at every byte of 50 records, and healed between any two of them
    "clocks": Kind(20, sale(faults.clocks)),
    "call_backs": Kind(20, sale(faults.call_backs)),
    "twins": Kind(20, sale(faults.twins)),
    "deploy": Kind(20, sale(faults.deploy)),
}
