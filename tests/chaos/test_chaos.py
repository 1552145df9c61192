"""Kills of everything in the middle of a sale, and a death at every crash point: all promises are kept."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Iterable
from pathlib import Path

import msgspec
import pytest

from app.history.report import report
from app.record import Mark
from tests.chaos import faults
from tests.chaos.chaos import Run, runs_of, summary, todo
from tests.chaos.kinds import KINDS
from tests.chaos.points import POINTS
from tests.chaos.scenario import Outcome, play
from tests.chaos.system import Zygote
from tests.conftest import Stores

pytestmark = pytest.mark.slow

BESIDE = [kind for kind, of in KINDS.items() if of.beside and kind != "sweep"]
SEEDS = 5  # of each crash point
KILLS = 10  # of each process and store, in two sales
AT_ONCE = 3  # sales; each is some six processes, and they wait more than they work


async def some_at_once(sales: Iterable[Awaitable[Outcome]]) -> list[Outcome]:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(sale: Awaitable[Outcome]) -> Outcome:
        async with places:
            return await sale

    return await asyncio.gather(*map(one, sales))


def kept(outcome: Outcome) -> Counter[str]:
    """Every promise was kept and all came to rest. Returns the faults that were survived."""
    said = "\n".join(report(outcome.verdict, outcome.lines))
    assert outcome.verdict.ok, said
    assert outcome.rested, said
    assert not outcome.surprises, outcome.surprises
    return Counter(line.note for line in outcome.lines if isinstance(line, Mark) and line.what == "fault")


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_sale_survives_kills_of_every_process_and_store(
    seed: int, zygote: Zygote, stores: Stores
) -> None:
    survived = kept(await play(faults.storm(seed, kills=KILLS // 2, stops=1), zygote, stores, seed))
    for name in (*faults.PROCESSES, *faults.STORES):
        assert survived[f"kill -9 of {name}"] == KILLS // 2


async def test_a_death_at_every_crash_point_breaks_no_promise(zygote: Zygote, stores: Stores) -> None:
    seeds = range(1, SEEDS + 1)
    outcomes = await some_at_once(play(faults.sweep(seed), zygote, stores, seed) for seed in seeds)
    for outcome in outcomes:
        kept(outcome)
        assert set(outcome.struck) == set(POINTS)


async def test_every_other_kind_of_fault_breaks_no_promise(zygote: Zygote, stores: Stores) -> None:
    """Cut networks, full memory and disk, older and torn logs, clocks, call-backs, twins, two releases: at once."""
    if os.geteuid() != 0:
        BESIDE.remove("disk_full")  # only root may make a small disk; tests/test_disk.py says so, too
    for outcome in await some_at_once(KINDS[kind].play(1, zygote, stores, True) for kind in BESIDE):
        assert kept(outcome)


async def test_postgres_is_away_and_what_was_claimed_is_written_when_it_is_back(
    zygote: Zygote, stores: Stores
) -> None:
    kept(await play(faults.postgres_away(1, away_s=5.0), zygote, stores, 1))


def test_a_campaign_goes_on_where_it_was_and_sums_up(tmp_path: Path) -> None:
    """Kinds in turn; the last word about a sale counts; what broke counts as survived nowhere."""
    assert list(todo(["storm", "cuts"], first=3, runs=2)) == [
        ("storm", 3), ("cuts", 3), ("storm", 4), ("cuts", 4)
    ]  # fmt: skip
    of_kinds = Counter(kind for kind, _ in todo([], first=1, runs=0))
    assert of_kinds == {kind: of.runs for kind, of in KINDS.items()}

    def run(seed: int, *, ok: bool) -> Run:
        return Run(kind="cuts", seed=seed, ok=ok, rested=ok, seconds=1, ops=5, survived={"a cut": 2})

    runs = [run(1, ok=False), run(2, ok=True), run(1, ok=True), run(3, ok=False)]
    (tmp_path / "runs.jsonl").write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in runs))
    said = "\n".join(summary(runs_of(tmp_path)))
    assert "| cuts | 3 | 1–3 | [3] | 15 | 3 |" in said
    assert "| a cut | 4 |" in said
