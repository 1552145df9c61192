"""Sales spread over a Redis Cluster, one primary killed in the middle: what buyers were told is judged, sale by sale.

    play(zygote, stores, seed) -> Outcome

Two sales on each of three primaries; one of the two is scarce. People come all the while, pay or do not. The first
primary is killed with -9; its replica is promoted, its sales are made anew there. Its corpse is started again later and
comes back as a replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.demo.crowd import Buyer, Crowd
from app.demo.desk import Desk
from app.history.final import finish
from app.history.judge import AGREE_WITHIN_S, Verdict, judge
from app.keys import SaleKeys
from app.providers.sandbox_ledger import Ledger
from app.record import Attempt, Op, Order, Recorder, Run, Sale, Supplier, read
from app.redis.cluster import slot_of
from tests.chaos.scenario import PATIENCE, _close, _known
from tests.chaos.system import System, Zygote
from tests.conftest import Stores
from tests.ha.redis_cluster import Node, RedisCluster
from tests.story.people import instant

SKU = "A"
SCARCE, PLENTY = 12, 500
OPENS_IN_S = 1.2
KILL_AT_S = 2.5  # after the opening
RECOVERS_WITHIN_S = 60.0 * PATIENCE  # on a machine that has other things to do
PEOPLE_WITHIN_S = 20.0 * PATIENCE
REST_WITHIN_S = 40.0 * PATIENCE  # an outbox row that Redis could not take waits up to 15 s for its next try

# A busy machine looks like a sick supplier, and the sales would slow down for it.
PATIENT = {
    "FAIRDROP_PROVIDER_DEADLINE_S": "5",
    "FAIRDROP_SLOW_AUTO": "false",
}

Fault = Callable[["Stage"], Awaitable[None]]


@dataclass
class Course:
    """One sale and what came of it."""

    sale: str
    units: int
    hit: bool  # it was on the node that the fault was for
    history: Path
    crowd: Crowd
    record: Recorder
    verdict: Verdict | None = None
    epoch: int = 0
    down_s: float = 0.0  # from the fault to the first join begun after it that was answered
    shut_s: float = 0.0  # from the first request after it that was not served until the last
    not_served: int = 0  # requests answered 503, or not answered
    joined: int = 0
    reserved: int = 0  # buyers who were told so
    lost: list[str] = field(default_factory=list)  # of those, who has no order


@dataclass
class Stage:
    """What a fault can reach."""

    cluster: RedisCluster
    system: System
    courses: list[Course]
    victim: Node
    dice: random.Random
    fault_at: float = 0.0
    fault_done: bool = False  # nobody is to be promoted


@dataclass
class Outcome:
    courses: list[Course]
    seconds: float
    promoted_s: float = 0.0  # from the kill until another server said that it is the primary
    surprises: list[BaseException] = field(default_factory=list)


def names(cluster: RedisCluster, seed: int) -> dict[Node, list[str]]:
    """Two sales for each primary."""
    found: dict[Node, list[str]] = defaultdict(list)
    number = 0
    while len(found) < 3 or any(len(its) < 2 for its in found.values()):
        name = f"ha-{seed}-{number}"
        node = cluster.primary_of(SaleKeys(name).sale)
        if len(found[node]) < 2:
            found[node].append(name)
        number += 1
    return dict(found)


def people(dice: random.Random, sale: str, over_s: float, per_s: float) -> list[Buyer]:
    """Some before the opening, the others evenly until `over_s` after it."""
    early = [Buyer(f"{sale}-e{n}", -dice.random(), 0.2, pays=dice.random() < 0.7) for n in range(5)]
    late = [
        Buyer(
            f"{sale}-{n}",
            (n + dice.random()) / per_s,
            0.1 + dice.random() * 0.3,
            taps=3 if dice.random() < 0.1 else 1,
            pays=dice.random() < 0.7,
        )
        for n in range(int(over_s * per_s))
    ]
    return early + late


def document(sale: str, units: int, opens_s: float) -> dict[str, Any]:
    return {
        "id": sale,
        "title": "Cluster",
        "line_opens_at": instant(opens_s - OPENS_IN_S - 0.1),
        "opens_at": instant(opens_s),
        "closes_at": instant(opens_s + 3_600),
        "draw_freeze_s": 0,
        "pay_within_s": 3,
        "limit_per_buyer": 1,
        "standby": True,
        "channels": ["sandbox"],
        "default_channel": "sandbox",
        "items": [{"sku": SKU, "title": "Thing", "price_minor": 500, "currency": "CNY", "units": units}],
    }


async def kill_primary(stage: Stage) -> None:
    """kill -9; started again once its replica is primary."""
    process = stage.victim.valkey.process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    stage.fault_at = time.monotonic()
    await asyncio.to_thread(process.wait)


async def stop_primary(stage: Stage) -> None:
    """SIGSTOP: its connections stand, and nothing answers on them. It is killed once its replica is primary."""
    process = stage.victim.valkey.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    stage.fault_at = time.monotonic()


async def move_slots(stage: Stage) -> None:
    """The slots of its sales go to another primary, live, as an operator would who makes room."""
    target = next(node for node in stage.cluster.primaries() if node is not stage.victim)
    stage.fault_at = time.monotonic()
    for course in stage.courses:
        if course.hit:
            await asyncio.to_thread(stage.cluster.move, slot_of(SaleKeys(course.sale).sale), target)
    stage.fault_done = True


async def play(
    zygote: Zygote, stores: Stores, seed: int, *, over_s: float = 8.0, per_s: float = 4.0, fault: Fault = kill_primary,
    environment: dict[str, str] | None = None,
) -> Outcome:  # fmt: skip
    began = time.monotonic()
    dice = random.Random(f"cluster:{seed}")
    folder = Path(tempfile.mkdtemp(prefix="cluster-", dir=stores.home))
    folder.chmod(0o711)
    database_url = stores.new_database()
    try:
        with RedisCluster(folder / "redis") as cluster:
            system = System(
                zygote,
                folder,
                redis_url=cluster.url,
                database_url=database_url,
                environment={**PATIENT, **(environment or {})},
            )
            try:
                return await _play(cluster, system, database_url, dice, seed, over_s, per_s, fault, began)
            finally:
                system.close()
    finally:
        stores.drop_database(database_url)


async def _play(
    cluster: RedisCluster, system: System, database_url: str, dice: random.Random, seed: int, over_s: float,
    per_s: float, fault: Fault, began: float,
) -> Outcome:  # fmt: skip
    desk, sandbox = Desk(system.url("office"), system.operator_key), Desk(system.url("sandbox"), "")
    courses: list[Course] = []
    alive: asyncio.Task[None] | None = None
    try:
        await system.start()
        alive = asyncio.create_task(system.keep_alive())
        await sandbox.post("/control", {"seed": seed})
        spread = await asyncio.to_thread(names, cluster, seed)
        victim = dice.choice(list(spread))
        for node, its in spread.items():
            for units, sale in zip((SCARCE, PLENTY), its, strict=True):
                record = Recorder(system.folder / f"{sale}.jsonl")
                record.add(Run(at=record.clock(), by="chaos", sale=sale, seed=seed))
                crowd = Crowd(
                    people(dice, sale, over_s, per_s),
                    front=system.url("front"), sale=sale, sku=SKU, seed=seed, record=record,
                )  # fmt: skip
                path = system.folder / f"{sale}.jsonl"
                courses.append(Course(sale, units, node is victim, path, crowd, record))
        await courses[0].crowd.set_clock()
        opens_s = courses[0].crowd.now_s() + OPENS_IN_S + 1.0
        for course in courses:
            await course.crowd.set_clock()
            await desk.post("/v1/admin/sales", document(course.sale, course.units, opens_s))
            await desk.post(f"/v1/admin/sales/{course.sale}/publish")
            course.crowd.freeze_before(0.15)
            course.record.mark("began")
        for course in courses:
            await _known(system, course.sale)
        stage = Stage(cluster, system, courses, victim, dice)
        going = [
            asyncio.create_task(course.crowd._live(buyer, opens_s, OPENS_IN_S * 0.4))
            for course in courses
            for buyer in course.crowd.people
        ]
        outcome = Outcome(courses, 0.0)
        try:
            await _at(courses[0], opens_s + KILL_AT_S)
            for course in courses:
                course.record.mark("fault", "a primary of the cluster")
            await fault(stage)
            outcome.promoted_s = await _promoted(stage)
            going += await _recovered(stage, opens_s)
            await _at(courses[0], opens_s + over_s)
            for course in courses:
                course.record.mark("healed")
            for course in courses:
                await _close(desk, course.sale)
            await asyncio.wait(going, timeout=PEOPLE_WITHIN_S)
        finally:
            for task in going:
                task.cancel()
            ended = await asyncio.gather(*going, return_exceptions=True)
        outcome.surprises = [
            one
            for one in ended
            if isinstance(one, BaseException) and not isinstance(one, asyncio.CancelledError)
        ]
        for course in courses:
            await finish(
                course.record, course.sale, redis_url=cluster.url, database_url=database_url,
                supplier=system.folder / "nothing", within_s=REST_WITHIN_S,
            )  # fmt: skip
            course.record.close()
            _judge(course, Ledger(system.ledger).read(), stage.fault_at)
        outcome.seconds = time.monotonic() - began
        return outcome
    finally:
        if alive is not None:
            alive.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await alive
        for course in courses:
            course.crowd.close()
            course.record.close()
        await desk.close()
        await sandbox.close()


async def _at(course: Course, moment_s: float) -> None:
    while (left_s := moment_s - course.crowd.now_s()) > 0:  # noqa: ASYNC110 - the sale's clock has no event
        await asyncio.sleep(left_s)


async def _promoted(stage: Stage) -> float:
    """Seconds from the kill until another server is the primary of those sales; then the corpse is started again."""
    if stage.fault_done:
        return 0.0
    victim, key = stage.victim, SaleKeys(next(course.sale for course in stage.courses if course.hit)).sale
    deadline = time.monotonic() + RECOVERS_WITHIN_S
    while (await asyncio.to_thread(_new_primary, stage.cluster, key, victim)) in (None, victim):
        assert time.monotonic() < deadline, "no replica was promoted"
        await asyncio.sleep(0.02)
    took_s = time.monotonic() - stage.fault_at
    victim.valkey.kill()
    await asyncio.to_thread(victim.valkey.start)
    return took_s


def _new_primary(cluster: RedisCluster, key: str, victim: Node) -> Node | None:
    try:
        return cluster.primary_of(key, without=victim)
    except AssertionError:
        return None


async def _recovered(stage: Stage, opens_s: float) -> list[asyncio.Task[None]]:
    """Wait until somebody new gets an answer in every sale that was hit. They stay in the crowd: their tasks."""
    probes: list[tuple[Buyer, asyncio.Task[None]]] = []
    for course in stage.courses:
        if course.hit:
            probe = Buyer(f"{course.sale}-probe", 0.0, 0.2)
            course.crowd.people.append(probe)
            probes.append((probe, asyncio.create_task(course.crowd._live(probe, opens_s, 0.0))))
    deadline = time.monotonic() + RECOVERS_WITHIN_S
    while any(probe.state == "away" for probe, _ in probes):
        assert time.monotonic() < deadline, f"no sale again: {stage.system.last_words('worker')}"
        await asyncio.sleep(0.05)
    return [task for _, task in probes]


def _judge(course: Course, ledger: list[Supplier], fault_at: float) -> None:
    lines = read(course.history)
    mine = {line.order_no for line in lines if isinstance(line, Order)}
    attempts = {line.id for line in lines if isinstance(line, Attempt)}
    lines += [line for line in ledger if line.order in mine or line.attempt in attempts]
    course.verdict = judge(lines, agree_within_s=AGREE_WITHIN_S * PATIENCE)
    course.epoch = next(line.epoch for line in lines if isinstance(line, Sale))
    offset = time.time() - time.monotonic()
    begun = {line.id: line for line in lines if isinstance(line, Op) and line.do == "invoke"}
    answered: list[float] = []
    refused: list[float] = []
    told: set[str] = set()
    for line in lines:
        if not isinstance(line, Op) or line.do == "invoke":
            continue
        if line.do == "unknown" or line.status in (429, 503):
            course.not_served += 1
            refused.append(line.at)
        elif line.op == "join" and line.do == "ok":
            course.joined += line.status == 202
            if begun[line.id].at > fault_at + offset:
                answered.append(line.at)
        if line.state in ("reserved", "paid"):
            told.add(line.buyer)
    course.down_s = min(answered) - (fault_at + offset) if answered else float("inf")
    course.shut_s = max(refused) - min(refused) if refused else 0.0
    course.reserved = len(told)
    has: set[str] = {line.buyer for line in lines if isinstance(line, Order)}
    course.lost = sorted(told - has)
