"""A sale whose Redis or Postgres primary dies in the middle, and whose replica takes over: the judge looks.

    python -m tests.ha.failover --seed 1 --runs 5        every kind of failover, a sale each; prints a table at the end

Recovery is measured from the fault to the moment at which the sale goes on:
Redis     a new primary takes writes; the sale is open in it (rebuilt, in the next epoch)
Postgres  the standby is promoted (by this script, at once: how soon a failure is noticed is Patroni's affair or an
          operator's); a process commits again; the next winner is told `reserved`
Exit status 1: a promise was broken, and the history is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

from app.demo.crowd import Buyer
from app.errors import DidNotHappen, Unknown
from app.history.report import report
from app.keys import SaleKeys
from app.ledger import engine as engines
from app.redis.link import Link
from app.settings import Settings
from tests.chaos.scenario import PATIENCE, Outcome, Plan, Stage, people, play
from tests.chaos.system import Zygote
from tests.conftest import Stores
from tests.ha.postgres_pair import Pair
from tests.ha.redis_watched import Watched

LOOK_EVERY_S = 0.02
RECOVERED_WITHIN_S = 40.0 * PATIENCE
UNITS = 40
WINNERS_FIRST = 3
WINNERS_WITHIN_S = 60.0


class Clock:
    """What was reached how long after the fault, s."""

    def __init__(self) -> None:
        self.took_s: dict[str, float] = {}
        self._began = 0.0

    def start(self) -> None:
        self._began = time.monotonic()

    async def until(self, what: str, reached: Callable[[], Awaitable[object]]) -> None:
        """AssertionError: it was never reached."""
        while not await reached():
            assert time.monotonic() - self._began < RECOVERED_WITHIN_S, f"never: {what}"
            await asyncio.sleep(LOOK_EVERY_S)
        self.took_s[what] = round(time.monotonic() - self._began, 2)


def crowd(dice: random.Random) -> list[Buyer]:
    """People come all the time: before, while and after the primary is gone."""
    return people(dice, 50, early=0.15, over_s=6.0)


@contextlib.asynccontextmanager
async def watching(stage: Stage) -> AsyncIterator[Link]:
    """A link of our own, as every process has one."""
    link = Link(stage.system.redis_url, deadline_s=1.0, name="watching")
    await link.start()
    try:
        yield link
    finally:
        await link.close()


async def _writes(link: Link) -> bool:
    try:
        await link.call("HDEL", SaleKeys("nobody").stock, "nothing")
    except (DidNotHappen, Unknown):
        return False
    return True


async def _open_in(link: Link, sale: str, epoch_least: int) -> bool:
    try:
        epoch, home = await link.call("HMGET", SaleKeys(sale).sale, "epoch", "home")
    except (DidNotHappen, Unknown):
        return False
    return int(epoch or 0) >= epoch_least and (home or b"").decode() == link.run_id


async def first_winners(stage: Stage) -> None:
    """Wait until the sale is well under way."""

    async def enough() -> bool:
        return sum("reserved" in buyer.states for buyer in stage.crowd.people) >= WINNERS_FIRST

    await stage.until(enough, WINNERS_WITHIN_S)


class RedisFailover:
    """The primary is lost in one of several ways, and comes back once the sale goes on without it."""

    def __init__(self, way: str, until_it_follows: bool) -> None:
        """until_it_follows: wait for the sentinels to make a replica of the primary of before; they take some 10 s."""
        self.way = way
        self.until_it_follows = until_it_follows
        self.clock = Clock()
        self.watched: Watched | None = None

    def make(self, home: Path) -> Watched:
        self.watched = Watched(home)
        return self.watched

    async def strike(self, stage: Stage) -> None:
        assert self.watched is not None
        await first_winners(stage)
        old = self.watched.primary
        async with watching(stage) as link:
            before = link.run_id

            async def elsewhere() -> bool:
                return link.run_id != before and await _writes(link)

            stage.fault(f"{self.way} of Redis' primary")
            self.clock.start()
            match self.way:
                case "kill -9":
                    old.kill()
                case "SIGSTOP":
                    os.kill(old.pid, signal.SIGSTOP)
                case "SENTINEL FAILOVER":
                    self.watched.ask_for_failover()
            try:
                await self.clock.until("primary_s", elsewhere)
                await self.clock.until("open_s", lambda: _open_in(link, stage.sale, 2))
            finally:
                if self.way == "SIGSTOP":
                    stage.fault("the primary of before goes on where it stood")
                    os.kill(old.pid, signal.SIGCONT)
            if self.way == "kill -9":
                stage.fault("the primary of before starts again from its own log")
                await asyncio.to_thread(old.start)

            async def demoted() -> bool:
                assert self.watched is not None
                return await asyncio.to_thread(self.watched.role_of, old) == "slave"

            if self.until_it_follows:
                await self.clock.until("old_one_follows_s", demoted)


class PostgresFailover:
    """The primary is killed, the standby promoted, and later the primary of before started again, as nobody should."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.clock = Clock()

    async def strike(self, stage: Stage) -> None:
        await first_winners(stage)
        engine = engines.create_engine(Settings(database_url=stage.database_url), pool=1)
        try:
            stage.fault("kill -9 of Postgres' primary")
            self.clock.start()
            self.pair.primary.kill()
            await self.pair.promote()

            async def commits() -> bool:
                try:
                    async with engine.begin() as conn:
                        await conn.exec_driver_sql("SELECT pg_logical_emit_message(true, 'fairdrop', '')")
                except Exception as error:
                    if not engines.passes(error):
                        raise
                    return False
                return True

            await self.clock.until("commits_s", commits)
            told = sum("reserved" in buyer.states for buyer in stage.crowd.people)

            async def one_more() -> bool:
                return sum("reserved" in buyer.states for buyer in stage.crowd.people) > told

            await self.clock.until("reserved_s", one_more)
            stage.fault("the primary of before starts again")
            await asyncio.to_thread(self.pair.primary.start)
        finally:
            await engine.dispose()


KINDS = ("redis kill -9", "redis SIGSTOP", "redis SENTINEL FAILOVER", "postgres kill -9")


async def fail_over(
    kind: str, zygote: Zygote, stores: Stores, seed: int, *, until_it_follows: bool = True
) -> tuple[Outcome, dict[str, float]]:
    """One sale with one failover. Returns what the judge says and what took how many seconds."""
    store, _, way = kind.partition(" ")
    if store == "redis":
        redis = RedisFailover(way, until_it_follows)
        outcome = await play(plan(kind, redis.strike, redis=redis.make), zygote, stores, seed, planted=False)
        return outcome, redis.clock.took_s
    pair = Pair(stores.home / f"pair-{seed}")
    try:
        await pair.start()
        postgres = PostgresFailover(pair)
        outcome = await play(
            plan(kind, postgres.strike), zygote, cast(Stores, pair), seed, planted=False
        )  # the part of it that is asked of stores
        return outcome, postgres.clock.took_s
    finally:
        pair.discard()  # the history lies in its folder


def plan(
    kind: str, strike: Callable[[Stage], Awaitable[None]], redis: Callable[[Path], Watched] | None = None
) -> Plan:
    return Plan(
        f"failover-{kind.replace(' ', '-').lower()}",
        units=UNITS,
        pay_within_s=4,
        buyers=crowd,
        fault=strike,
        open_for_s=6.0,
        redis=redis,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3, help="sales of each kind, with seeds that count up")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this; may be repeated")
    parser.add_argument("--keep", action="store_true", help="histories and logs of good runs too")
    options = parser.parse_args()
    stores, zygote = Stores(), Zygote()
    took: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    broken = 0
    try:
        for seed in range(options.seed, options.seed + options.runs):
            for kind in options.kind or KINDS:
                outcome, seconds = asyncio.run(fail_over(kind, zygote, stores, seed))
                fine = outcome.verdict.ok and outcome.rested
                broken += not fine
                print(
                    f"{kind} seed {seed}: {'ok' if fine else 'BROKEN'}, {outcome.verdict.ops} operations, {seconds}",
                    flush=True,
                )
                if not fine or options.keep:
                    kept = Path(tempfile.mkdtemp(prefix="fairdrop-failover-"))
                    for path in (outcome.history, *outcome.history.parent.glob("*.log")):
                        shutil.copy(path, kept)
                    print(f"  history: {kept}", *report(outcome.verdict, outcome.lines), sep="\n", flush=True)
                for what, value in seconds.items():
                    took[kind][what].append(value)
    finally:
        zygote.close()
        stores.close()
    for kind, found in took.items():
        for what, values in found.items():
            low, high = min(values), max(values)
            print(
                f"{kind:24} {what:20} n {len(values):3}  {low:6.2f} … {statistics.median(values):6.2f} … {high:6.2f}"
            )
    print(json.dumps({"runs_broken": broken}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
