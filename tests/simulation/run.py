"""Many simulated histories in a row: `python -m tests.simulation.run --seed 1 --count 100000`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter

from app.history.judge import judge
from app.record import Supplier
from tests.simulation.world import World

# The draw's tickets have no hash in their names here, and Redis' versions are told apart in tests/lua.
LEFT_OUT = frozenset({"set", "draw"})


def broken(seed: int, *, bug: str = "", seen: Counter[str] | None = None) -> str:
    """What is wrong with the history of this seed; empty: nothing."""
    try:
        lines = World(seed, bug=bug).run()
    except AssertionError as error:
        return str(error)
    if seen is not None:
        seen.update(line.op for line in lines if isinstance(line, Supplier))
    verdict = judge(lines)
    found = [
        f"{result.name}: {result.findings[0].what}"
        for result in verdict.results
        if not result.ok and result.name not in LEFT_OUT
    ]
    return "; ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--bug", default="", help="a bug of tests/simulation/world.py")
    options = parser.parse_args()
    seen: Counter[str] = Counter()
    began, wrong = time.process_time(), 0
    for seed in range(options.seed, options.seed + options.count):
        if why := broken(seed, bug=options.bug, seen=seen):
            wrong += 1
            print(f"seed {seed}: {why}", flush=True)
            if wrong >= 20:
                break
        if seed % 10_000 == 0:
            print(f"{seed:,} in {time.process_time() - began:.0f} s of CPU", file=sys.stderr, flush=True)
    print(json.dumps({"histories": seed - options.seed + 1, "broken": wrong, "supplier": seen}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
