"""How long after a kill -9 the service does again what it did, in the middle of a sale.

    python -m tests.chaos.recovery --kills 10 --seed 1
    python -m tests.chaos.recovery --kills 3 --note FILE     each kill is a line of FILE; the table is of all its lines

`fairdrop up` runs as anybody has it, its supervisor starts again what dies, and people join all the while. Measured
from the kill, by what they are told:

front      a join that began after it is answered 202
worker     somebody who joined after it is told `reserved`
valkey     a join that began after it is answered 202; of which Valkey loaded its log for so long
postgres   somebody who joined after it is told `reserved`

The seed gives the order of the kills and their moments. What was killed has lived for 31 s before it is killed again:
the supervisor's pauses grow for one that dies sooner. Exit status 1: something took longer than its goal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from app.children import HEALTHY_AFTER_S
from app.demo.desk import Desk
from tests.story.people import instant
from tests.test_up import PORTS, UpProcess, up

GOALS_S = {
    "front": 2.0,
    "worker": 5.0,
    "valkey": 5.0,
    "postgres": 15.0,
}  # valkey: without the loading of its log
CONFIRMS = ("worker", "postgres")  # these are back when an order is written, the others when a join is taken
JOIN_EVERY_S = 0.04
LOOK_EVERY_S = 0.02
ASKED_MAX = 40  # joins under way: while nothing answers no more are begun
BACK_WITHIN_S = 60.0
APART_S = HEALTHY_AFTER_S + 1.0
CALM_S = 2.0  # of good service before a kill
SALE = "recovery"
_LOADED = re.compile(r"DB loaded from append only file: ([0-9.]+) seconds")


class Kill(msgspec.Struct):
    """One kill. load_s: of that, Valkey read its log. load: processes that wanted the processor, by the last minute."""

    what: str
    back_s: float
    load_s: float
    load: float
    at: float


class People:
    """They come one after the other; each joins, and some wait until they are told `reserved`."""

    def __init__(self, front: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=front, timeout=httpx.Timeout(BACK_WITHIN_S), trust_env=False,
            limits=httpx.Limits(max_connections=ASKED_MAX + 20),
        )  # fmt: skip
        self._tasks: set[asyncio.Task[None]] = set()
        self.joined_at: float | None = None  # when the first join begun after `since` was answered
        self.reserved_at: float | None = None  # when the first of those who began after `since` was told so
        self.since = 0.0

    def look_from_now(self) -> None:
        self.since, self.joined_at, self.reserved_at = time.monotonic(), None, None

    async def come(self) -> None:
        """Until cancelled."""
        try:
            while True:
                if len(self._tasks) < ASKED_MAX:
                    task = asyncio.create_task(self._one())
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                await asyncio.sleep(JOIN_EVERY_S)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._http.aclose()

    async def _one(self) -> None:
        headers = {"X-Buyer-Id": secrets.token_hex(8)}
        began, since = time.monotonic(), self.since
        with contextlib.suppress(httpx.HTTPError):  # a process died with it: that is what is measured
            answer = await self._http.post(
                f"/v1/sales/{SALE}/tickets", json={"sku": "A", "units": 1}, headers=headers
            )
            if answer.status_code != 202 or began < since:
                return
            if since == self.since and self.joined_at is None:
                self.joined_at = time.monotonic()
            ticket = answer.json()["ticket"]
            while since == self.since and self.reserved_at is None:
                with contextlib.suppress(httpx.HTTPError):
                    told = await self._http.get(f"/v1/tickets/{ticket}", headers=headers)
                    if told.status_code == 200 and told.json()["state"] in ("reserved", "paid"):
                        if since == self.since and self.reserved_at is None:
                            self.reserved_at = time.monotonic()
                        return
                await asyncio.sleep(LOOK_EVERY_S)


async def until_well(people: People) -> None:
    """Everything does what it should: people who come now are reserved. AssertionError: they are not."""
    people.look_from_now()
    deadline = time.monotonic() + BACK_WITHIN_S
    while people.reserved_at is None:
        assert time.monotonic() < deadline, "nobody is reserved"
        await asyncio.sleep(LOOK_EVERY_S)


async def measure(what: str, running: UpProcess, people: People) -> Kill:
    """Kill it and wait for its service."""
    loads = _loads(running)
    first = psutil.Process(running.urls()["pids"][what])
    for process in (
        first,
        *first.children(recursive=True),
    ):  # those of Postgres finish what they do, otherwise
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    people.look_from_now()
    deadline = people.since + BACK_WITHIN_S
    while (back := people.reserved_at if what in CONFIRMS else people.joined_at) is None:
        assert time.monotonic() < deadline, f"{what} did not come back: {running.said[-800:]}"
        await asyncio.sleep(LOOK_EVERY_S)
    fresh = _loads(running)[len(loads) :]
    load_s = float(fresh[-1]) if what == "valkey" and fresh else 0.0
    return Kill(what, round(back - people.since, 3), load_s, round(os.getloadavg()[0], 1), time.time())


def _loads(running: UpProcess) -> list[str]:
    """Seconds that each start of Valkey has taken to load its log."""
    return [
        found
        for log in sorted(running.data_dir.rglob("*valkey*.log"))
        for found in _LOADED.findall(log.read_text(errors="replace"))
    ]


async def kills(running: UpProcess, count: int, dice: random.Random, note: Callable[[Kill], None]) -> None:
    """So many of each, in rounds of all four; each is noted at once."""
    urls: dict[str, Any] = running.urls()
    desk = Desk(urls["office"], urls["operator_key"])
    try:
        await desk.post("/v1/admin/sales", document())
        await desk.post(f"/v1/admin/sales/{SALE}/publish")
    finally:
        await desk.close()
    people = People(urls["front"])
    coming = asyncio.create_task(people.come())
    try:
        started = dict.fromkeys(GOALS_S, -APART_S)  # whoever has not died yet is started again at once
        for _ in range(count):
            for what in dice.sample(list(GOALS_S), len(GOALS_S)):
                await asyncio.sleep(max(CALM_S, started[what] + APART_S - time.monotonic()) + dice.random())
                await until_well(people)
                kill = await measure(what, running, people)
                started[what] = time.monotonic()
                note(kill)
                print(f"{what:9} {kill.back_s:6.2f} s  (load {kill.load})", flush=True)
        await until_well(people)
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


def document() -> dict[str, Any]:
    now = time.time()
    return {
        "id": SALE,
        "title": "Recovery",
        "line_opens_at": instant(now),
        "opens_at": instant(now + 1),
        "closes_at": instant(now + 24 * 3_600),
        "draw_freeze_s": 0,
        "pay_within_s": 3_600,
        "items": [{"sku": "A", "title": "Thing", "price_minor": 500, "currency": "CNY", "units": 1_000_000}],
    }


def table(found: list[Kill]) -> Iterator[str]:
    yield "| killed | kills | least | median | most | goal, s | load |"
    yield "|---|---|---|---|---|---|---|"
    for what, goal in GOALS_S.items():
        mine = [kill for kill in found if kill.what == what]
        if not mine:
            continue
        took = [kill.back_s for kill in mine]
        loads = [kill.load for kill in mine]
        log = f", of which its log {max(kill.load_s for kill in mine):.2f}" if what == "valkey" else ""
        yield (
            f"| {what} | {len(mine)} | {min(took):.2f} | {statistics.median(took):.2f} | {max(took):.2f}{log}"
            f" | {goal:g}{' + log' if log else ''} | {min(loads):.1f}–{max(loads):.1f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--note", type=Path, metavar="FILE", help="keep each kill as a line; sum up all lines"
    )
    options = parser.parse_args()
    dice = random.Random(f"recovery:{options.seed}")
    with tempfile.TemporaryDirectory(prefix="fairdrop-recovery-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        file = options.note or home / "kills.jsonl"

        def note(kill: Kill) -> None:
            with file.open("ab") as out:
                out.write(msgspec.json.encode(kill) + b"\n")

        with up(home / "data", *PORTS, "--front-workers", "1") as running:
            running.urls()
            asyncio.run(kills(running, options.kills, dice, note))
        found = [msgspec.json.decode(line, type=Kill) for line in file.read_bytes().splitlines() if line]
    print("\n".join(table(found)))
    return 1 if any(kill.back_s - kill.load_s > GOALS_S[kill.what] for kill in found) else 0


if __name__ == "__main__":
    sys.exit(main())
