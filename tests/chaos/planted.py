"""Which sale shows which planted bug (tests/chaos/plants.py), and which check must find it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path

import redis.asyncio

from app.demo.crowd import Buyer
from app.keys import SaleKeys
from app.redis.link import Link
from app.repair.rebuild import rebuild
from app.scripts import Scripts
from app.settings import Settings
from tests.chaos.faults import bring_older_log, made_anew, pulse
from tests.chaos.scenario import Plan, Stage, people

RELEASE_TAKES_S = 4  # from its row to Redis, where a rebuild overtakes it


async def answers_are_lost(stage: Stage) -> None:
    """Joins are executed, and nobody hears of it."""
    assert stage.proxy is not None
    for _ in range(4):
        stage.proxy.lose += 1
        stage.fault("the answer to a join is lost")
        await asyncio.sleep(0.4)


async def the_worker_stalls(stage: Stage) -> None:
    await stage.after_opening(0.05)
    stage.fault("SIGSTOP of the worker")
    stage.system.signal("worker", signal.SIGSTOP)
    await stage.after_opening(1.8)
    stage.system.signal("worker", signal.SIGCONT)
    stage.fault("SIGCONT of the worker")


async def an_older_log_comes_back(stage: Stage) -> None:
    """The data of a lost failover. Without the bug the sale is made anew; with it nobody notices."""
    await bring_older_log(stage)
    with contextlib.suppress(AssertionError):
        await stage.until(lambda: made_anew(stage), within_s=6.0)


async def the_power_fails(stage: Stage) -> None:
    """What was not synced is gone. With fsync always that is nothing; with everysec, the last second."""
    log = stage.valkey.home / "appendonlydir"
    sizes: list[tuple[float, Path, int]] = []
    loop = asyncio.get_running_loop()
    await stage.after_opening(0.3)
    beat = before = await pulse(stage)
    while beat == before:  # just after a pulse: what is lost then is seen by nobody's pulse
        beat = await pulse(stage)
        await asyncio.sleep(0.02)
    since = loop.time()
    while loop.time() < since + 1.2:
        for path in log.glob("*.incr.aof"):
            sizes.append((loop.time(), path, path.stat().st_size))
        await asyncio.sleep(0.02)
    client = redis.asyncio.Redis.from_url(stage.valkey.url)
    how = (await client.config_get("appendfsync"))["appendfsync"]
    await client.aclose()
    stage.fault(f"the power fails (appendfsync {how})")
    stage.valkey.kill()
    if how != "always":
        synced = [(path, size) for at, path, size in sizes if at <= loop.time() - 0.9]
        path, size = synced[-1]
        os.truncate(path, size)
    stage.valkey.start()
    await stage.after_opening(4.0)


async def a_rebuild_overtakes_a_release(stage: Stage) -> None:
    """Everything has expired, one release is on its way to Redis, and the sale is made anew."""

    async def due() -> bool:
        rows = await stage.sql("SELECT 1 FROM outbox WHERE kind = 'release' AND state = 'due'")
        held = await stage.sql("SELECT 1 FROM purchase_order WHERE state = 'reserved'")
        return bool(rows) and not held

    await stage.until(due)
    loop = asyncio.get_running_loop()
    on_its_way_until = loop.time() + RELEASE_TAKES_S
    stage.fault("fairdrop rebuild, while a release is on its way")
    settings = Settings(redis_url=stage.valkey.url, database_url=stage.database_url)
    link = Link(settings.redis_url, name="rebuild")
    await link.start()
    try:
        report = await rebuild(settings, link, Scripts(link), stage.sale, actor="chaos", reason="planted")
    finally:
        await link.close()
    assert report is not None
    assert report.epoch == 2

    async def arrived() -> bool:
        return loop.time() > on_its_way_until + 0.5

    await stage.until(
        arrived
    )  # the sale may be at rest before: Postgres has closed what the rebuild overtook


async def the_stock_is_lost(stage: Stage) -> None:
    await stage.after_opening(0.3)
    stage.fault("the stock key is gone")
    client = redis.asyncio.Redis.from_url(stage.valkey.url)
    await client.delete(SaleKeys(stage.sale).stock)
    await client.aclose()


def unpaying(dice: random.Random) -> list[Buyer]:
    return [Buyer(buyer_id=f"b{n}", arrives_s=0.05 * n, think_s=0.1, pays=False) for n in range(6)]


def three_who_never_pay(dice: random.Random) -> list[Buyer]:
    return [Buyer(buyer_id=f"b{n}", arrives_s=0.05 * n, think_s=0.1, pays=False) for n in range(3)]


def at_the_deadline(dice: random.Random) -> list[Buyer]:
    """All pay: some at once, the others one after the other around their deadline of two seconds."""
    return [
        Buyer(buyer_id=f"b{n:02d}", arrives_s=0.03 * n, think_s=0.1 if n < 2 else 1.4 + 0.2 * n)
        for n in range(10)
    ]


def prompt(dice: random.Random) -> list[Buyer]:
    return people(dice, 8, pays=1.0, taps=0.0, think_s=0.05, over_s=0.5)


def in_waves(dice: random.Random) -> list[Buyer]:
    """New people all the time, long after the fault."""
    return [
        Buyer(buyer_id=f"b{n:03d}", arrives_s=0.1 + 0.06 * n, think_s=0.2, pays=dice.random() < 0.6)
        for n in range(60)
    ]


def few(dice: random.Random) -> list[Buyer]:
    return [Buyer(buyer_id=f"b{n:02d}", arrives_s=0.1 * n, think_s=0.2) for n in range(10)]


PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan(
            "client_retries",
            frozenset({"executions"}),
            ("client_retries",),
            fault=answers_are_lost,
            proxied=True,
            open_for_s=3.0,
        ),
        Plan("no_dedupe", frozenset({"set"}), ("no_dedupe",), open_for_s=2.0),
        Plan(
            "ack_before_commit",
            frozenset({"queue", "set"}),
            ("ack_before_commit",),
            points={"worker": "confirm.in_transaction:kill"},
            open_for_s=3.0,
        ),
        Plan(
            "release_before_commit",
            frozenset({"bank", "queue"}),
            ("release_before_commit",),
            units=1,
            pay_within_s=1,
            buyers=unpaying,
            points={"worker": "expire.before_row:kill"},
            environment={
                "FAIRDROP_LEASE_S": "4"
            },  # the next buyer's claim comes before the order is looked at again
            open_for_s=4.0,
        ),
        Plan(
            "maxlen",
            frozenset({"queue", "set"}),
            ("maxlen",),
            units=12,
            rate_per_s=8.0,  # so that they are served in several calls: each is an entry
            buyers=lambda dice: people(dice, 16, early=0.9),
            points={"worker": "confirm.after_read:sleep=1"},
            open_for_s=3.0,
        ),
        Plan(
            "expiry_without_guard",
            frozenset({"money", "bank"}),
            ("expiry_without_guard",),
            units=10,
            buyers=at_the_deadline,
            control={"late_pay": True},
            points={"worker": "expire.cleared:sleep=1.2:50"},
            environment={"FAIRDROP_LEASE_S": "4"},
            open_for_s=5.0,
        ),
        Plan(
            "failover_while_unknown",
            frozenset({"money"}),
            ("failover_while_unknown",),
            control={"payments": {"lost_rate": 0.5, "hang_ms": 1500, "only": ["create"]}},
            open_for_s=4.5,
            pay_within_s=4,
        ),
        Plan(
            "acknowledged_before_commit",
            frozenset({"money"}),
            ("acknowledged_before_commit",),
            points={"office": "hook.before_commit:kill"},
            buyers=prompt,
            open_for_s=3.0,
        ),
        Plan(
            "no_epoch_check",
            frozenset({"set", "queue", "bank"}),
            ("no_epoch_check",),
            units=8,
            buyers=in_waves,
            fault=an_older_log_comes_back,
            environment={"FAIRDROP_REBUILD_AFTER_S": "0.5"},
            open_for_s=6.0,
        ),
        Plan(
            "old_release_applied",
            frozenset({"bank"}),
            ("old_release_applied",),
            units=3,
            pay_within_s=1,
            buyers=three_who_never_pay,
            points={"worker": f"relay.before_script:sleep={RELEASE_TAKES_S}"},
            fault=a_rebuild_overtakes_a_release,
            open_for_s=6.0,
        ),
        Plan(
            "violation_is_poison",
            frozenset({"queue"}),
            ("violation_is_poison",),
            points={"worker": "confirm.after_commit:kill"},
            open_for_s=3.0,
        ),
        Plan(
            "stale_status",
            frozenset({"stores", "states"}),
            ("stale_status",),
            units=8,
            buyers=prompt,
            workers=2,
            points={"worker": "confirm.after_commit:sleep=2.5", "worker2": "confirm.after_commit:sleep=2.5"},
            open_for_s=4.0,
        ),
        Plan(
            "missing_stock_is_zero",
            frozenset({"sold_out"}),
            ("missing_stock_is_zero",),
            units=40,
            standby=False,
            buyers=few,
            fault=the_stock_is_lost,
            open_for_s=2.0,
            heals=False,
        ),
        Plan(
            "new_key_each_retry",
            frozenset({"money"}),
            ("new_key_each_retry",),
            control={"payments": {"lost_rate": 0.5, "hang_ms": 1500, "only": ["create"]}},
            open_for_s=4.5,
            pay_within_s=4,
        ),
        Plan(
            "everysec",
            frozenset({"set", "queue", "bank"}),
            ("everysec",),
            units=30,
            buyers=in_waves,
            valkey={"appendfsync": "everysec"},
            environment={"FAIRDROP_PULSE_EVERY_S": "2"},
            fault=the_power_fails,
            open_for_s=4.5,
        ),
    )
}
