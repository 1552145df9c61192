"""One short sale with faults, from start to verdict: the same seed gives the same people and the same plan of faults.

    play(plan, zygote, stores, seed, planted=True) -> Outcome

starts a Valkey of its own and a database of its own, the processes (with the plan's bug, if planted), lets a crowd in,
does what the plan says, heals, closes, waits until all is at rest, ends the history from the stores and judges it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from app.demo.crowd import Buyer, Crowd
from app.demo.desk import Desk
from app.embedded import Postgres, Valkey, find_valkey
from app.errors import FairdropError
from app.history.final import finish
from app.history.judge import AGREE_WITHIN_S, Verdict, judge
from app.record import Line, Mark, Recorder, Run, read
from tests.chaos.cable import Cable
from tests.chaos.dresses import CLOCK, write_clock
from tests.chaos.proxy import Proxy
from tests.chaos.system import System, Zygote
from tests.conftest import Stores
from tests.story.people import instant

SKU = "A"
OPENS_IN_S = 1.2
FREEZE_S = 0
# On a machine that has much else to do everything takes longer: this many times as long is waited for.
PATIENCE = float(os.environ.get("FAIRDROP_TEST_PATIENCE", "1"))
PEOPLE_WITHIN_S = 15.0 * PATIENCE  # after the close, for everybody's last answer
REST_WITHIN_S = 50.0 * PATIENCE  # at most: stores shall agree within 60 s of healing
CALLS_WITHIN_S = (
    30.0 * PATIENCE
)  # repeats of call-backs that met nobody: the longest wait between them is 15 s
SET_UP_WITHIN_S = 60.0 * PATIENCE


@dataclass
class Stage:
    """What a plan's fault can reach."""

    system: System
    valkey: Valkey
    record: Recorder
    sale: str
    desk: Desk
    crowd: Crowd
    database_url: str
    dice: random.Random
    opens_s: float
    postgres: Postgres
    proxy: Proxy | None = None
    cables: Mapping[tuple[str, str], Cable] = field(default_factory=dict)  # by process and by what it reaches

    async def sql(self, statement: str, *args: object) -> list[Any]:
        connection = await asyncpg.connect(self.database_url)
        try:
            return list(await connection.fetch(statement, *args))
        finally:
            await connection.close()

    async def until(self, reached: Callable[[], Awaitable[object]], within_s: float = 30.0) -> None:
        """Wait for something in the sale. AssertionError: it never came."""
        deadline = time.monotonic() + within_s * PATIENCE
        while not await reached():
            assert time.monotonic() < deadline, "the fault's moment never came"
            await asyncio.sleep(0.02)

    async def told(self, state: str, count: int = 1) -> None:
        async def enough() -> bool:
            return sum(state in buyer.states for buyer in self.crowd.people) >= count

        await self.until(enough)

    async def after_opening(self, seconds: float) -> None:
        while (left := self.opens_s + seconds - self.crowd.now_s()) > 0:  # noqa: ASYNC110 - the sale's clock has no event
            await asyncio.sleep(left)

    async def valkey_ended(self) -> bool:
        return not self.valkey.running()

    def fault(self, note: str) -> None:
        self.record.mark("fault", note)


async def no_fault(_: Stage) -> None:
    """Only what the crash points and the crowd do."""


@dataclass(frozen=True)
class Plan:
    """A sale, its crowd, and what goes wrong."""

    name: str
    caught_by: frozenset[str] = frozenset()  # checks of which one must find the planted bug
    plants: tuple[str, ...] = ()
    buyers: Callable[[random.Random], list[Buyer]] = lambda dice: people(dice, 14)
    units: int = 4
    pay_within_s: int = 2
    standby: bool = True
    rate_per_s: float | None = None
    open_for_s: float = 4.0
    points: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    control: Mapping[str, Any] = field(default_factory=dict)
    fault: Callable[[Stage], Awaitable[None]] = no_fault
    proxied: bool = False  # the front reaches Redis through a proxy
    cabled: tuple[str, ...] = ()  # redis, postgres, supplier: every process reaches these through cables
    workers: int = 1
    worker_name: str = ""  # all workers have this one name; empty: each has its own
    chain: tuple[str, ...] = ()  # crash points, each struck once in whatever order
    meanwhile: tuple[Callable[[Stage], Awaitable[None]], ...] = ()  # goes on until the faults are healed
    afterwards: tuple[
        Callable[[Stage], Awaitable[None]], ...
    ] = ()  # goes on from the close until all is at rest
    dresses: Mapping[str, str] = field(default_factory=dict)  # process -> what else it gets after its fork
    small_disk_mb: int = 0  # Redis has a disk of its own, so small
    valkey: Mapping[str, str] = field(default_factory=dict)  # settings of the planted run only
    redis: Callable[[Path], Any] | None = (
        None  # makes what holds Redis instead of one Valkey: url, start, kill
    )
    heals: bool = (
        True  # False: no repair exists for this fault, so only `caught_by` must stay silent without the bug
    )


@dataclass
class Outcome:
    """struck: crash points that were reached."""

    verdict: Verdict
    lines: list[Line]
    seconds: float
    deaths: list[str]
    surprises: list[BaseException]
    rested: bool
    history: Path
    struck: list[str] = field(default_factory=list)

    @property
    def poisoned(self) -> int:
        """Poison entries that were put among the claims."""
        return sum(isinstance(line, Mark) and line.what == "poison" for line in self.lines)


def people(
    dice: random.Random, count: int, *, pays: float = 0.7, early: float = 0.4, taps: float = 0.2, think_s: float = 0.2,
    over_s: float = 1.5,
) -> list[Buyer]:  # fmt: skip
    """Some come early, the others within `over_s` of the opening; some tap ten times; some do not pay."""
    return [
        Buyer(
            buyer_id=f"b{number:03d}",
            arrives_s=-dice.random() if dice.random() < early else dice.random() * over_s,
            think_s=think_s * (0.5 + dice.random()),
            taps=6 if dice.random() < taps else 1,
            pays=dice.random() < pays,
            leaves="won" if dice.random() < 0.05 else "",
        )
        for number in range(count)
    ]


def document(plan: Plan, sale: str, opens_s: float) -> dict[str, Any]:
    return {
        "id": sale,
        "title": "Chaos",
        "line_opens_at": instant(opens_s - OPENS_IN_S - 0.1),
        "opens_at": instant(opens_s),
        "closes_at": instant(opens_s + 3_600),
        "draw_freeze_s": FREEZE_S,
        "pay_within_s": plan.pay_within_s,
        "limit_per_buyer": 1,
        "rate_per_s": plan.rate_per_s,
        "standby": plan.standby,
        "channels": ["sandbox"],
        "default_channel": "sandbox",
        "items": [{"sku": SKU, "title": "Thing", "price_minor": 500, "currency": "CNY", "units": plan.units}],
    }


async def play(plan: Plan, zygote: Zygote, stores: Stores, seed: int, *, planted: bool = False) -> Outcome:
    """folder: the stores' own, for pytest takes the rights of other accounts off its temporary directories."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"{plan.name}-", dir=stores.home))
    folder.chmod(0o711)
    dice = random.Random(f"{plan.name}:{seed}")
    record = Recorder(folder / "history.jsonl")
    sale = f"chaos-{secrets.token_hex(3)}"
    record.add(Run(at=record.clock(), by="chaos", sale=sale, seed=seed))
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(record.close)
        database_url = stores.new_database()
        stack.callback(stores.drop_database, database_url)
        if plan.small_disk_mb:
            stack.enter_context(small_disk(folder / "valkey", plan.small_disk_mb))
        valkey = (
            plan.redis(folder / "valkey")
            if plan.redis is not None
            else Valkey(
                folder / "valkey",
                secrets.token_urlsafe(12),
                server=find_valkey(),
                settings=plan.valkey if planted else {},
            )
        )
        stack.callback(valkey.kill)
        valkey.start()
        proxy = Proxy(valkey.url, record) if plan.proxied else None
        if proxy is not None:
            await proxy.start()
            stack.push_async_callback(proxy.close)
        system = System(
            zygote,
            folder,
            redis_url=valkey.url,
            database_url=database_url,
            plants=plan.plants if planted else (),
            environment=plan.environment,
            workers=plan.workers,
            worker_name=plan.worker_name,
            chain=plan.chain,
        )
        stack.callback(system.close)
        if proxy is not None:
            system.roles["front"].environment["FAIRDROP_REDIS_URL"] = proxy.url
        cables = await _cable(system, plan.cabled)
        for cable in cables.values():
            stack.push_async_callback(cable.close)
        for name, dress in plan.dresses.items():
            put_on(system, name, dress)
        desk, sandbox = Desk(system.url("office"), system.operator_key), Desk(system.url("sandbox"), "")
        stack.push_async_callback(desk.close)
        stack.push_async_callback(sandbox.close)
        crowd = Crowd(
            plan.buyers(dice), front=system.url("front"), sale=sale, sku=SKU, seed=seed, record=record
        )
        stack.callback(crowd.close)

        await system.start(plan.points)
        alive = asyncio.create_task(system.keep_alive())
        stack.push_async_callback(_end, alive)
        control = {**plan.control, "seed": seed}
        await _set_up(lambda: sandbox.post("/control", control))
        system.reborn["sandbox"] = lambda: sandbox.post("/control", control)  # it forgets how to misbehave
        await crowd.set_clock()
        opens_s = crowd.now_s() + OPENS_IN_S
        await _set_up(lambda: desk.post("/v1/admin/sales", document(plan, sale, opens_s)))
        await _set_up(lambda: desk.post(f"/v1/admin/sales/{sale}/publish"))
        await _known(system, sale)
        crowd.freeze_before(FREEZE_S + 0.15)
        record.mark("began")
        stage = Stage(
            system,
            valkey,
            record,
            sale,
            desk,
            crowd,
            database_url,
            dice,
            opens_s,
            stores.postgres,
            proxy,
            cables,
        )
        ended = await _let_them_in(plan, stage, stack, patience_s=3.0 if planted else PEOPLE_WITHIN_S)
        await calls_come_through(sandbox, within_s=CALLS_WITHIN_S if not planted else 1.0)
        rested = await finish(
            record,
            sale,
            redis_url=valkey.url,
            database_url=database_url,
            supplier=system.ledger,
            within_s=REST_WITHIN_S if not planted else 3.0,
        )
    lines = read(folder / "history.jsonl")
    return Outcome(
        judge(lines, agree_within_s=AGREE_WITHIN_S * PATIENCE),
        lines,
        time.monotonic() - began,
        system.deaths,
        [e for e in ended if isinstance(e, BaseException) and not isinstance(e, asyncio.CancelledError)],
        rested,
        folder / "history.jsonl",
        system.struck(),
    )


async def _let_them_in(
    plan: Plan, stage: Stage, stack: contextlib.AsyncExitStack, *, patience_s: float
) -> list[BaseException | None]:
    """The sale itself, from the first buyer to everybody's last answer. Returns how each buyer's visit ended."""
    crowd = stage.crowd
    going = [
        asyncio.create_task(crowd._live(buyer, stage.opens_s, OPENS_IN_S * 0.4)) for buyer in crowd.people
    ]
    beside = [asyncio.create_task(happen(stage)) for happen in plan.meanwhile]
    try:
        await asyncio.gather(plan.fault(stage), stage.after_opening(plan.open_for_s))
        for task in beside:
            await _end(task)
        # Who was killed last is back before the fault is over: on a busy machine a start takes half a minute.
        await stage.system.back(within_s=4 * patience_s)
        stage.record.mark("healed")
        await _close(stage.desk, stage.sale)
        for go_on in plan.afterwards:
            stack.push_async_callback(_end, asyncio.create_task(go_on(stage)))
        for buyer, task in zip(crowd.people, going, strict=True):
            if stage.opens_s + buyer.arrives_s > crowd.now_s():
                task.cancel()  # they hear that it is over, and stay at home
        await asyncio.wait(going, timeout=patience_s)
    finally:
        for task in (*going, *beside):
            task.cancel()
        ended = await asyncio.gather(*going, return_exceptions=True)
        await asyncio.gather(*beside, return_exceptions=True)
    return ended


async def calls_come_through(sandbox: Desk, *, within_s: float) -> None:
    """Wait until the supplier calls nobody any more: of late money on a closed link we learn by nothing else."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):  # it may just have been killed
            if not (await sandbox.get("/stats"))["hooks_under_way"]:
                return
        await asyncio.sleep(0.2)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel it; what it has died of before is raised here."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


# What a process reaches by which setting; ("office", "hooks") would be the supplier's way to us.
REACHES = {
    "redis": dict.fromkeys(("front", "worker", "office"), "FAIRDROP_REDIS_URL"),
    "postgres": dict.fromkeys(("worker", "office"), "FAIRDROP_DATABASE_URL"),
    "supplier": {"worker": "FAIRDROP_SANDBOX_URL"},
    "hooks": {"worker": "FAIRDROP_OFFICE_URL"},  # named in every payment: the supplier calls back there
}


async def _cable(system: System, what: Sequence[str]) -> dict[tuple[str, str], Cable]:
    """A cable for every process and each of the things it reaches."""
    cables: dict[tuple[str, str], Cable] = {}
    for thing in what:
        for role in system.roles.values():
            setting = REACHES[thing].get(role.role)
            if setting is not None:
                cable = Cable(role.environment[setting])
                await cable.start()
                role.environment[setting] = cable.url
                cables[role.name, thing] = cable
    return cables


def put_on(system: System, process: str, dress: str) -> None:
    """Dress every later incarnation of a process."""
    role = system.roles[process]
    role.dresses.append(dress)
    if dress == "clock":
        file = system.folder / f"{process}.clock"
        write_clock(file, 0.0)
        role.environment[CLOCK] = str(file)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own under `folder`. OSError: only root may make one, and not everywhere."""
    folder.mkdir(mode=0o711)
    size = f"size={megabytes}m,mode=0711"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "fairdrop-chaos", str(folder)], capture_output=True
    )
    if done.returncode != 0:
        raise OSError(f"cannot mount a small disk: {done.stderr.decode(errors='replace').strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


async def _set_up(step: Callable[[], Awaitable[object]]) -> None:
    """One step before the faults begin; on a busy machine a deadline may pass."""
    deadline = time.monotonic() + SET_UP_WITHIN_S
    while True:
        try:
            await step()
            return
        except (FairdropError, httpx.HTTPError, OSError) as error:
            if "409" in str(error):
                return  # it was done, and the answer was lost
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.2)


async def _known(system: System, sale: str) -> None:
    """The front has seen the new sale."""
    async with httpx.AsyncClient(base_url=system.url("front"), trust_env=False) as anyone:
        deadline = time.monotonic() + SET_UP_WITHIN_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await anyone.get(f"/v1/sales/{sale}")).status_code == 200:
                    return
            assert time.monotonic() < deadline, "the front never saw the sale"
            await asyncio.sleep(0.02)


async def _close(desk: Desk, sale: str) -> None:
    """Close the sale; the office may just be coming up again."""
    for _ in range(int(100 * PATIENCE)):
        try:
            await desk.post(f"/v1/admin/sales/{sale}/close")
            return
        except (FairdropError, OSError, httpx.HTTPError) as error:
            if "409" in str(error) or "410" in str(error):
                return  # it is closed: the answer to an earlier try was lost
            last: Exception = error
        await asyncio.sleep(0.1)
    raise AssertionError(f"the sale cannot be closed: {last}")
