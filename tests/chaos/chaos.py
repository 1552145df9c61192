"""Every kind of fault by seed, over and over; what was survived is written down and can be summed up at any time.

    python -m tests.chaos.chaos --campaign DIR              the long form, about an hour
    python -m tests.chaos.chaos --campaign DIR --summary    what has been survived so far, as a table
    python -m tests.chaos.chaos --seed 7 --runs 3           three sales of each kind, seeds 7 to 9
    python -m tests.chaos.chaos --only cuts --seed 7 --runs 1

The same seed gives the same crowd and the same plan of faults (what the kernel makes of it is its own). Each run is one
line of DIR/runs.jsonl; runs that are there are not done again, so a campaign that was stopped goes on where it was. A
broken promise keeps its history in DIR/broken, and the end is status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from app.history.report import report
from app.record import Mark
from tests.chaos.kinds import KINDS
from tests.chaos.scenario import Outcome
from tests.chaos.system import Zygote
from tests.conftest import Stores


class Run(msgspec.Struct, kw_only=True):
    """One sale under one kind of fault. survived: faults by name, as the history marks them."""

    kind: str
    seed: int
    ok: bool
    rested: bool
    seconds: float
    ops: int
    survived: dict[str, int]
    broken: list[str] = []  # checks of the judge, or what was not seen while the fault lasted
    deaths: int = 0
    surprises: int = 0
    at: float = 0.0
    agreed_s: float = 0.0  # from the healing until nothing was under way any more; 0: unknown
    waited_for: str = ""  # what was the last that was under way


def of_outcome(kind: str, seed: int, outcome: Outcome) -> Run:
    marks = Counter(line.note for line in outcome.lines if isinstance(line, Mark) and line.what == "fault")
    marks["poison"] = outcome.poisoned
    healed = [line.at for line in outcome.lines if isinstance(line, Mark) and line.what == "healed"]
    agreed = [line for line in outcome.lines if isinstance(line, Mark) and line.what == "agreed"]
    return Run(
        kind=kind,
        seed=seed,
        ok=outcome.verdict.ok and outcome.rested,
        rested=outcome.rested,
        seconds=round(outcome.seconds, 1),
        ops=outcome.verdict.ops,
        survived={note: count for note, count in marks.items() if count},
        broken=sorted(outcome.verdict.broken),
        deaths=len(outcome.deaths),
        surprises=len(outcome.surprises),
        at=time.time(),
        agreed_s=round(agreed[-1].at - healed[-1], 1) if healed and agreed else 0.0,
        waited_for=agreed[-1].note if agreed else "",
    )


async def one(kind: str, seed: int, zygote: Zygote, stores: Stores, kept: Path, *, short: bool) -> Run:
    """Play it and say in a line how it went; a broken promise tells its story, and its history is kept."""
    began = time.monotonic()
    try:
        outcome = await KINDS[kind].play(seed, zygote, stores, short)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is written down and the next run begins
        run = Run(
            kind=kind, seed=seed, ok=False, rested=False, ops=0, survived={}, at=time.time(),
            seconds=round(time.monotonic() - began, 1), broken=[f"{type(error).__name__}: {error}"[:400]],
        )  # fmt: skip
        print(f"{kind} {seed}: BROKEN {run.broken[0]}", flush=True)
        traceback.print_exception(error, limit=-6)
        return run
    run = of_outcome(kind, seed, outcome)
    word = "ok" if run.ok else "BROKEN"
    print(
        f"{kind} {seed}: {word}, {run.seconds} s, {run.ops} operations, {run.survived},"
        f" at rest after {run.agreed_s} s, {run.waited_for}",
        flush=True,
    )
    for surprise in outcome.surprises[:3]:
        print(f"  surprise: {str(surprise)[:300]}")
    if run.ok:
        shutil.rmtree(outcome.history.parent, ignore_errors=True)
    else:
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(outcome.history, kept / f"{kind}-{seed}.jsonl")
        for log in outcome.history.parent.glob("*.log"):
            shutil.copy(log, kept / f"{kind}-{seed}-{log.name}")
        print(f"  rested {outcome.rested}, history: {kept / f'{kind}-{seed}.jsonl'}")
        print("\n".join(report(outcome.verdict, outcome.lines)), flush=True)
    return run


def runs_of(folder: Path) -> list[Run]:
    file = folder / "runs.jsonl"
    if not file.exists():
        return []
    found = [msgspec.json.decode(raw, type=Run) for raw in file.read_bytes().splitlines() if raw]
    return list({(run.kind, run.seed): run for run in found}.values())  # the last of each


def todo(only: list[str], first: int, runs: int) -> Iterator[tuple[str, int]]:
    """The long form, kinds in turn, so that a campaign that is stopped has some of each."""
    left = {kind: (runs or KINDS[kind].runs) for kind in (only or KINDS)}
    done: Counter[str] = Counter()
    most = max(left.values())
    for step in range(most):
        for kind, count in left.items():
            while done[kind] < round(count * (step + 1) / most):
                yield kind, first + done[kind]
                done[kind] += 1


def summary(runs: list[Run]) -> Iterator[str]:
    """A table by fault: how often, in how many sales, with which seeds; then what was broken."""
    seeds: dict[str, set[int]] = defaultdict(set)
    sales: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    struck: Counter[str] = Counter()
    broken: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        seeds[run.kind].add(run.seed)
        sales[run.kind] += 1
        seconds[run.kind] += run.seconds  # type: ignore[assignment]
        if run.ok:
            struck.update(run.survived)
        else:
            broken[run.kind].append(run.seed)
    yield "| kind of sale | sales | seeds | broken | operations | s | at rest after healing, s: median, most |"
    yield "|---|---|---|---|---|---|---|"
    for kind in sales:
        ops = sum(run.ops for run in runs if run.kind == kind)
        span = f"{min(seeds[kind])}–{max(seeds[kind])}"
        rests = [run.agreed_s for run in runs if run.kind == kind and run.agreed_s]
        rest = f"{median(rests):.0f}, {max(rests):.0f}" if rests else "–"
        wrong = broken.get(kind) or 0
        yield f"| {kind} | {sales[kind]} | {span} | {wrong} | {ops} | {seconds[kind]:.0f} | {rest} |"
    yield ""
    yield "| fault, survived | times |"
    yield "|---|---|"
    for note, count in sorted(struck.items()):
        yield f"| {note} | {count} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--campaign", type=Path, metavar="DIR", help="where runs are written down; else nowhere"
    )
    parser.add_argument("--summary", action="store_true", help="print what has been survived so far")
    parser.add_argument("--json", action="store_true", help="of the summary: as JSON")
    parser.add_argument("--only", action="append", default=[], choices=list(KINDS), help="kinds of fault")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--runs", type=int, default=0, help="sales of each kind, instead of the long form's")
    parser.add_argument("--beside", type=int, default=3, help="sales that go on at once")
    parser.add_argument("--fsync", action="store_true", help="of Postgres: slow on a disk that others use")
    parser.add_argument("--again", action="store_true", help="play again what was broken on record")
    parser.add_argument("--for-s", type=float, default=0.0, help="begin no further sale after so many s")
    options = parser.parse_args()
    folder: Path = options.campaign or Path(tempfile.mkdtemp(prefix="fairdrop-chaos-"))
    if options.summary:
        runs = runs_of(folder)
        if options.json:
            totals: Counter[str] = Counter()
            for run in runs:
                totals.update(run.survived if run.ok else {})
            said: dict[str, Any] = {
                "sales": len(runs),
                "broken": [f"{run.kind} {run.seed}" for run in runs if not run.ok],
                "survived": totals,
            }
            print(json.dumps(said, indent=2))
        else:
            print("\n".join(summary(runs)))
        return 1 if any(not run.ok for run in runs) else 0
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(run_all(folder, options))
    runs = runs_of(folder)
    if not options.campaign and all(run.ok for run in runs):
        shutil.rmtree(folder)
    print("\n".join(summary(runs)))
    return 1 if any(not run.ok for run in runs) else 0


async def run_all(folder: Path, options: argparse.Namespace) -> None:
    """Everything that is not on record yet. Sales wait more than they work, so some go on beside each other."""
    over = {(run.kind, run.seed) for run in runs_of(folder) if run.ok or not options.again}
    stores, zygote = Stores(durable=options.fsync), Zygote()
    began = time.monotonic()
    short = not options.campaign
    try:
        with (folder / "runs.jsonl").open("ab", buffering=0) as file:

            async def go(kind: str, seed: int) -> None:
                run = await one(kind, seed, zygote, stores, folder / "broken", short=short)
                file.write(msgspec.json.encode(run) + b"\n")

            wanted = [one for one in todo(options.only, options.seed, options.runs) if one not in over]
            under_way: set[asyncio.Task[None]] = set()
            for kind, seed in wanted:
                if options.for_s and time.monotonic() - began > options.for_s:
                    break
                alone = not KINDS[kind].beside
                while under_way and (alone or len(under_way) >= options.beside):
                    _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                task = asyncio.create_task(go(kind, seed))
                under_way.add(task)
                if alone:
                    await task
                    under_way.clear()
            if under_way:
                await asyncio.wait(under_way)
    finally:
        zygote.close()
        stores.close()


if __name__ == "__main__":
    sys.exit(main())
