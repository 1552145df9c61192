"""The benchmark: every goal of the hot path, measured on this machine as ratios within one run.

    fairdrop bench                                       all goals, about ten minutes
    fairdrop bench --quick                               all goals, two short rounds: to see that it runs
    fairdrop bench --only join poll --rounds 3           while tuning: R1, R2 and two subjects
    fairdrop bench --write BENCHMARKS.md --plots docs/bench      what BENCHMARKS.md holds

Subjects are measured in turn, round after round (A/B/A/B). CPU comes first, in µs for one answer, by process; then
answers per second. The API has one core, everything else (stores, generator) the other. A round with an unexpected
answer, or with a generator that used more than 90 % of its core, is void and repeated; a figure whose rounds stay void
is not printed, only the reason, and the exit status is 1. Exit status 0: every figure could be taken, whether or not it
meets its goal. `others` is what processes outside the benchmark used meanwhile, in shares of a core: measure at rest.

R1 is an empty raw-ASGI POST on the same server program, R2 an empty FastAPI POST with a model. The generator is our
own (loadtest/generator.py): closed loop for ceilings, open loop for latency; `ceilings` checks it against wrk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import shlex
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import uvloop
from rich.console import Console

from loadtest.bench import (
    ceilings,
    confirm,
    door,
    fronts,
    growth,
    latency,
    machine,
    peers,
    plots,
    report,
    system,
)
from loadtest.bench.door import Sales
from loadtest.bench.results import Found, Plan
from loadtest.bench.rounds import Void
from loadtest.bench.stack import Shopfront, private_folder
from loadtest.run import CannotStart

SECTIONS = ("door", "peers", "system", "confirm", "growth", "latency", "fronts", "ceilings")
WIDTH = 190  # columns of a report that is not on a terminal


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="fairdrop bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WHAT",
        help=f"sections: {', '.join(SECTIONS)}; or subjects of `door`: {', '.join(door.SUBJECTS)}",
    )
    found.add_argument("--rounds", type=int, help="of each subject; default 5")
    found.add_argument("--seconds", type=float, help="of one round; default 1")
    found.add_argument("--quick", action="store_true", help="2 rounds of 0.5 s, 10⁵ waiting")
    found.add_argument("--connections", type=int, nargs="+", default=[64, 256])
    found.add_argument(
        "--workers", type=int, nargs="+", default=[1], help="front processes in `door`; default 1"
    )
    found.add_argument("--servers", nargs="+", choices=("uvicorn", "granian"), default=["uvicorn", "granian"])
    found.add_argument("--growth-max", type=int, help="buyers waiting at most; default 1,000,000")
    found.add_argument(
        "--json", action="store_true", help="one JSON document with every round on standard output"
    )
    found.add_argument("--plots", type=Path, metavar="DIR", help="write SVG plots into this folder")
    found.add_argument(
        "--write", type=Path, metavar="FILE", help="put the report between the marks of this file"
    )
    return found  # fmt: skip


def plan_of(options: argparse.Namespace, say: Callable[[str], None]) -> Plan:
    quick = options.quick
    return Plan(
        rounds=options.rounds or (2 if quick else 5),
        seconds=options.seconds or (0.5 if quick else 1.0),
        connections=tuple(options.connections),
        workers=tuple(options.workers),
        servers=tuple(options.servers),
        growth_max=options.growth_max or (100_000 if quick else 1_000_000),
        say=say,
    )


def chosen(only: Sequence[str]) -> tuple[list[str], set[str]]:
    """Sections, and subjects of `door`. SystemExit: a word that is neither."""
    words = [word for part in only for word in part.split(",") if word]
    unknown = [word for word in words if word not in SECTIONS and word not in door.SUBJECTS]
    if unknown:
        raise SystemExit(f"fairdrop bench: --only knows no {', '.join(unknown)}")
    sections = [name for name in SECTIONS if name in words] if words else list(SECTIONS)
    subjects = {word for word in words if word in door.SUBJECTS}
    if subjects and "door" not in sections:
        sections.insert(0, "door")
    return sections, subjects or set(door.DEFAULT)


async def run(plan: Plan, sections: Sequence[str], subjects: set[str], folder: Path) -> Found:
    """Run the sections one after the other; each takes its own time, all figures are ratios within a section."""
    found = Found()

    async def add(name: str, section: Callable[[], Awaitable[Found]]) -> None:
        """What cannot be measured at all is a void figure too: the other sections still are."""
        try:
            found.add(await section())
        except (Void, RuntimeError, OSError, TimeoutError, CannotStart) as error:
            found.unmeasured.append(f"{name}: {type(error).__name__}: {error}")

    if {"door", "peers", "latency", "fronts", "ceilings"} & set(sections):
        async with Shopfront(folder / "door") as shop:
            sales = Sales(shop)
            for workers in plan.workers if "door" in sections else ():
                for server in plan.servers:
                    title = f"{server} × {workers}"
                    await add(title, partial(door.section, shop, sales, plan, server, workers, subjects))
            of_shop = {"peers": peers, "latency": latency, "fronts": fronts, "ceilings": ceilings}
            for name, module in of_shop.items():
                if name in sections:
                    await add(name, partial(module.section, shop, sales, plan))
    if "growth" in sections:
        async with Shopfront(folder / "growth") as shop:  # an empty Redis: its memory is counted
            await add("growth", partial(growth.section, shop, plan))
    if "system" in sections:
        pinning = machine.Pinning.of(1, machine.cores())
        await add("system", partial(system.section, folder, pinning, plan))
    if "confirm" in sections:
        await add("confirm", partial(confirm.section, folder, plan))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    status = Console(stderr=True)
    sections, subjects = chosen(options.only)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16_384)), hard))
    with tempfile.TemporaryDirectory(prefix="fairdrop-bench-") as name:
        folder = private_folder(Path(name))
        plan = plan_of(options, lambda text: status.print(text, style="dim", highlight=False))
        pinning = str(machine.Pinning.of(1, machine.cores()))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(run(plan, sections, subjects, folder))
    facts = machine.describe()
    command = shlex.join(["fairdrop", "bench", *given])
    if options.json:
        print(json.dumps(report.as_json(found, facts, command), ensure_ascii=False, indent=1))
    else:
        report.on_terminal(Console(width=None if sys.stdout.isatty() else WIDTH), found, facts)
    pictures = plots.write(found, options.plots) if options.plots else []
    if options.write:
        beside = options.write.parent
        report.write(options.write, report.as_markdown(found, facts, command, pinning, pictures, beside))
    for reason in found.void:
        status.print(f"void: {reason}", style="red", highlight=False)
    return 1 if found.void else 0
