"""Chaos by seed: processes and stores are killed and stopped in the middle of a sale, then the judge looks.

    python -m tests.chaos.chaos --seed 7 --runs 10            kills and stops, a sale a run
    python -m tests.chaos.chaos --seed 7 --points             every crash point, a sale each

The same seed gives the same crowd and the same plan of faults (what the kernel makes of it is its own). Prints one line
a run and, at the end, how many faults of each kind were survived, as JSON; exit status 1: a promise was broken, and
the history is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from app.check_history import report
from tests.chaos.planted import at_the_deadline
from tests.chaos.points import POINTS
from tests.chaos.scenario import Outcome, Plan, Stage, people, play
from tests.chaos.system import Zygote
from tests.conftest import Stores

PROCESSES = ("front", "worker", "office", "sandbox")
STORES = ("valkey", "postgres")
STOP_S = 0.6  # of a SIGSTOP: longer than a lease's or a claim's patience here, shorter than the crowd's


class Faults:
    """The plan of one run, and what was really done."""

    def __init__(self, stores: Stores, seed: int, kills: int, stops: int) -> None:
        self.stores = stores
        self.dice = random.Random(f"faults:{seed}")
        self.todo = [("kill", name) for name in (*PROCESSES, *STORES) for _ in range(kills)]
        self.todo += [("stop", name) for name in PROCESSES for _ in range(stops)]
        self.dice.shuffle(self.todo)
        self.done: Counter[str] = Counter()

    async def strike(self, stage: Stage) -> None:
        await stage.after_opening(-0.3)
        for what, name in self.todo:
            await self._one(stage, what, name)
            self.done[f"{what} {name}"] += 1
            await asyncio.sleep(0.15 + self.dice.random() * 0.5)

    async def _one(self, stage: Stage, what: str, name: str) -> None:
        stage.fault(f"{'kill -9' if what == 'kill' else 'SIGSTOP'} of {name}")
        if name == "valkey":
            stage.valkey.restart(crash=True)
        elif name == "postgres":
            self.stores.postgres.restart(crash=True)
        elif what == "kill":
            stage.system.kill(name)
        else:
            stage.system.signal(name, signal.SIGSTOP)
            await asyncio.sleep(STOP_S)  # not a wait of a test: the fault itself
            stage.system.signal(name, signal.SIGCONT)


def storm(stores: Stores, seed: int, *, kills: int = 1, stops: int = 1) -> tuple[Plan, Faults]:
    """A sale of eight units under kills of every process and store."""
    faults = Faults(stores, seed, kills, stops)
    plan = Plan(
        f"storm-{seed}",
        units=8,
        pay_within_s=3,
        buyers=lambda dice: people(dice, 30, over_s=5.0),
        control={"hooks": {"copies": 2, "shuffle_ms": 200}, "payments": {"error_rate": 0.05}},
        fault=faults.strike,
        open_for_s=4.0,
    )
    return plan, faults


def at_point(name: str, action: str = "kill") -> Plan:
    """A sale whose first passage of one crash point kills the process."""
    point = POINTS[name]
    late = name.startswith(("late", "refund"))
    return Plan(
        f"point-{name}",
        units=6,
        pay_within_s=2 if late else 3,
        buyers=at_the_deadline if late else lambda dice: people(dice, 14, pays=0.6, think_s=0.05),
        control={"late_pay": late},
        points={point.role: f"{name}:{action}"},
        open_for_s=4.0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="sales, with seeds that count up")
    parser.add_argument("--kills", type=int, default=1, help="of each process and store, a run")
    parser.add_argument("--stops", type=int, default=1, help="of each process, a run")
    parser.add_argument("--points", action="store_true", help="every crash point instead, --runs seeds each")
    options = parser.parse_args()
    stores, zygote = Stores(), Zygote()
    survived: Counter[str] = Counter()
    broken = 0
    try:
        for seed in range(options.seed, options.seed + options.runs):
            for name in POINTS if options.points else [""]:
                if name:
                    plan, done = at_point(name), Counter({f"point {name}": 1})
                else:
                    plan, faults = storm(stores, seed, kills=options.kills, stops=options.stops)
                    done = faults.done
                outcome = asyncio.run(play(plan, zygote, stores, seed, planted=False))
                fine = say(plan, seed, outcome)
                broken += not fine
                if not name or outcome.deaths:
                    survived.update(done)
    finally:
        zygote.close()
        stores.close()
    print(json.dumps({"survived": survived, "runs_broken": broken}, indent=2))
    return 1 if broken else 0


def say(plan: Plan, seed: int, outcome: Outcome) -> bool:
    fine = outcome.verdict.ok and outcome.rested
    said = f"{plan.name} seed {seed}: {'ok' if fine else 'BROKEN'}, {outcome.verdict.ops} operations"
    print(f"{said}, {len(outcome.deaths)} deaths, {outcome.seconds:.1f} s, rested {outcome.rested}")
    for surprise in outcome.surprises[:3]:
        print(f"  surprise: {str(surprise)[:200]}")
    if not fine:
        kept = Path(tempfile.mkdtemp(prefix=f"fairdrop-{plan.name}-"))
        shutil.copy(outcome.history, kept)
        print(f"  history: {kept}")
        print("\n".join(report(outcome.verdict, outcome.lines)))
    sys.stdout.flush()
    return fine


if __name__ == "__main__":
    sys.exit(main())
