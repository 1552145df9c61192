"""The benchmark: every goal of the hot path, measured on this machine as ratios within one run.

    python -m loadtest.bench --only join,poll --rounds 3 --seconds 1      while tuning: R1, R2 and two subjects
    python -m loadtest.bench --only join --servers uvicorn granian --connections 256

Subjects are measured in turn, round after round (A/B/A/B). CPU comes first, in µs for one answer, by process; then
answers per second. The API has one core, everything else (stores, generator) the other. A round with an unexpected
answer, or with a generator that used more than 90 % of its core, is void and repeated; a figure whose rounds stay void
is not printed, only the reason, and the exit status is 1.

Measure with nothing else running: `others` is what processes outside the benchmark used meanwhile, in shares of a core.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from loadtest.bench import door
from loadtest.bench.rounds import Course, Void, ratios
from loadtest.bench.stack import Shopfront, private_folder


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median (least–most)."""
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2] if len(ordered) % 2 else sum(ordered[len(ordered) // 2 - 1 :][:2]) / 2
    return f"{middle:,.{digits}f} ({ordered[0]:,.{digits}f}–{ordered[-1]:,.{digits}f})"


def door_table(title: str, courses: dict[tuple[str, int], Course], connections: int) -> Table:
    """One server program at one number of connections."""
    table = Table(title=title)
    for name in ("what", "API µs", "of R1 by CPU", "per second", "of R1", "of R2", "Redis µs", "commands", "batch",
                 "p50 ms", "p99 ms", "generator", "others"):  # fmt: skip
        table.add_column(name, justify="left" if name == "what" else "right")
    r1, r2 = courses["r1", connections], courses["r2", connections]
    for (_, number), course in courses.items():
        if number != connections:
            continue
        try:
            has_redis = "redis" in course.rounds[0].cpu_us if course.rounds else False
            table.add_row(
                course.name,
                spread(course.values("api"), 1),
                f"{spread([100 * one for one in ratios(course, r1, 'api', inverse=True)])} %",
                spread(course.values("per_s")),
                f"{spread([100 * one for one in ratios(course, r1)])} %",
                f"{course.median('per_s') / r2.median('per_s'):.0%}",
                f"{course.median('redis'):.1f}" if has_redis else "",
                f"{course.median('commands'):.3f}" if has_redis else "",
                f"{course.median('batch'):.0f}" if has_redis and course.median("batch") < 1_000 else "",
                f"{course.median('p50_ms'):.1f}",
                f"{course.median('p99_ms'):.1f}",
                f"{max(course.values('generator_share')):.0%}",
                f"{max(course.values('others_share')):.0%}",
            )
        except Void as void:
            table.add_row(course.name, f"void: {void}")
    return table


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="fairdrop bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--only", nargs="+", default=[], metavar="SUBJECT", help=", ".join(door.SUBJECTS))
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--seconds", type=float, default=1.0, help="of one round")
    found.add_argument("--connections", type=int, nargs="+", default=[64, 256])
    found.add_argument("--workers", type=int, nargs="+", default=[1], help="front processes")
    found.add_argument("--servers", nargs="+", choices=("uvicorn", "granian"), default=["uvicorn"])
    return found


async def run(options: argparse.Namespace, folder: Path) -> int:
    console, failed = Console(width=200 if not sys.stdout.isatty() else None), False
    only = {key for word in options.only for key in word.split(",")} or set(door.DEFAULT)
    status = Console(stderr=True)
    async with Shopfront(folder) as shop:
        sales = door.Sales(shop)
        for workers in options.workers:
            for server in options.servers:
                courses = await door.measure(
                    shop, sales, server, workers, only, options.connections, options.rounds, options.seconds,
                    lambda text: status.print(text, style="dim", highlight=False),
                )  # fmt: skip
                failed = failed or any(course.void is not None for course in courses.values())
                for connections in options.connections:
                    title = f"{server} × {workers}, {connections} connections"
                    console.print(door_table(title, courses, connections))
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fairdrop-bench-") as name:
        folder = private_folder(Path(name))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(options, folder))
