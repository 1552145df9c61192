"""The faults of issue and failure table, each a plan by seed: the crowd, what breaks, and what must be seen meanwhile.

A fault marks what it does in the history (`stage.fault`), always in the same words, so that a campaign can count what
was survived. What must hold *during* a fault (a 503 with Retry-After, a release that runs) is asserted here; what must
hold in the end is the judge's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import shutil
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import msgspec
import redis.asyncio
from redis.exceptions import RedisError

from app.demo.crowd import Buyer
from app.disk import MB, Disk
from app.embedded import Postgres, Valkey
from app.errors import FairdropError
from app.keys import SaleKeys
from app.providers import sandbox_wire
from app.providers.sandbox_ledger import Ledger
from tests.chaos.cable import Way
from tests.chaos.dresses import write_clock
from tests.chaos.points import POINTS
from tests.chaos.scenario import PATIENCE, SKU, Plan, Stage

PROCESSES = ("front", "worker", "office", "sandbox")
STORES = ("valkey", "postgres")
STOP_S = 0.6  # of a SIGSTOP: longer than a lease's or a claim's patience here, shorter than the crowd's
BACK_WITHIN_S = 30.0 * PATIENCE
HOUR_S = 3_600.0
SEEN_WITHIN_S = 30.0  # for what must be seen while a fault lasts, on a busy machine


# --- the crowd -------------------------------------------------------------------------------------------------------


def all_sorts(dice: random.Random, over_s: float, per_s: float = 4.0) -> list[Buyer]:
    """People come all the time: most pay, some never, some too late, some leave, some tap ten times."""
    crowd = []
    for number in range(int(over_s * per_s)):
        fate = dice.random()
        crowd.append(
            Buyer(
                buyer_id=f"b{number:04d}",
                arrives_s=-dice.random() if number < 6 else dice.random() * over_s,
                think_s=0.05 + dice.random() * 0.3,
                taps=6 if dice.random() < 0.1 else 1,
                pays=fate > 0.2,
                pays_late=0.2 < fate < 0.4,
                leaves="won" if 0.4 < fate < 0.46 else "waiting" if 0.46 < fate < 0.48 else "",
            )
        )
    return crowd


async def top_ups(stage: Stage) -> None:
    """One unit more, again and again."""
    while True:
        with contextlib.suppress(FairdropError, httpx.HTTPError):  # the office may be dead just now
            await stage.desk.post(f"/v1/admin/sales/{stage.sale}/top-up", {"sku": SKU, "units": 1})
        await asyncio.sleep(0.2 + stage.dice.random() * 0.4)


POISON = (  # what claims of an entry share, and one of a ticket number that nobody has
    (b"no claim at all", b"%d:1", b"buyer"),
    (b"9|1|A|1", b"%d:1", b"of-another-format"),
    (b"1|1|A|1", b"-%d:1", b"out-of-range"),
    (b"1|1|NO-SUCH-ITEM|1", b"%d:1", b"buyer"),
    (b"1|1|A|1", b"%d:1", b"\xff\xfe no text"),
)
POISON_MAX = 25  # a sale: far more than one in a hundred; each is bisected out, which is a few transactions
ADD = """
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('XADD', KEYS[2], '*', 'c', ARGV[1], ARGV[2], ARGV[3])
  redis.call('HINCRBY', KEYS[1], 'claims_open', 1)
  redis.call('HINCRBY', KEYS[1], 'claims_made', 1)
end
"""


async def poison(stage: Stage) -> None:
    """Entries that are no claims, or that no statement can hold, among the claims: more than one in a hundred."""
    async with redis.asyncio.Redis.from_url(stage.valkey.url, retry=None) as client:
        for number in range(POISON_MAX):
            await asyncio.sleep(0.4 + stage.dice.random() * 0.4)
            shared, ticket, buyer = POISON[number % len(POISON)]
            raw = (shared, ticket % (900_001 + number), buyer)
            stage.record.mark("poison", repr(raw))
            of = SaleKeys(stage.sale)
            with contextlib.suppress(RedisError, OSError):
                await client.eval(ADD, 2, of.sale, of.orders, *raw)


# --- kills, stops, crash points --------------------------------------------------------------------------------------


async def bring_back(store: Valkey | Postgres) -> None:
    """Start a store that has died, while everything else goes on."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + BACK_WITHIN_S
    while True:
        store.prepare()
        store.spawn()
        while store.running() and loop.time() < deadline:
            if store.ready():
                return
            await asyncio.sleep(0.01)
        assert loop.time() < deadline, f"{store.name} does not come back: {store.complaint()}"
        store.kill()  # its predecessor's children may hold its memory for a moment
        await asyncio.sleep(0.05)


def storm(seed: int, *, kills: int, stops: int) -> Plan:
    """A sale under kills and stops of every process and store, in an order given by the seed."""
    dice = random.Random(f"faults:{seed}")
    todo = [("kill -9", name) for name in (*PROCESSES, *STORES) for _ in range(kills)]
    todo += [("SIGSTOP", name) for name in PROCESSES for _ in range(stops)]
    dice.shuffle(todo)

    async def strike(stage: Stage) -> None:
        await stage.after_opening(-0.3)
        stores = {"valkey": stage.valkey, "postgres": stage.postgres}
        for what, name in todo:
            stage.fault(f"{what} of {name}")
            if name in stores:
                stores[name].kill()
                await bring_back(stores[name])
            elif what == "kill -9":
                stage.system.kill(name)
            else:
                stage.system.signal(name, signal.SIGSTOP)
                await asyncio.sleep(STOP_S)  # not a wait of a test: the fault itself
                stage.system.signal(name, signal.SIGCONT)
            await asyncio.sleep(0.1 + dice.random() * 0.4)

    return Plan(
        f"storm-{seed}",
        units=8,
        pay_within_s=3,
        buyers=lambda dice: all_sorts(dice, 4.0 + 0.4 * len(todo)),
        control={
            "hooks": {"copies": 2, "shuffle_ms": 200},
            "payments": {"error_rate": 0.05},
            "late_pay": True,
        },
        meanwhile=(top_ups,),
        fault=strike,
        open_for_s=4.0,
    )


# A long sale: the point is what dies, not how often people look.
SPARING = {"FAIRDROP_POLL_MIN_MS": "250", "FAIRDROP_POLL_MAX_MS": "1000"}
RARE = ("late.", "refund.", "capture.", "topup.", "confirm.bury", "pay.close")  # struck when first reached


def sweep(seed: int, rounds: int = 1, names: tuple[str, ...] = tuple(POINTS)) -> Plan:
    """A death at every crash point, `rounds` times each, in one sale that reaches them all."""
    dice = random.Random(f"sweep:{seed}")
    chain = [
        f"{name}:kill:1:{0 if name.startswith(RARE) else dice.choice((0, 0, 1))}"
        for name in names
        for _ in range(rounds)
    ]
    dice.shuffle(chain)
    most_s = (30.0 + 3.0 * len(chain)) * PATIENCE  # on a busy machine; a third of it at rest

    async def until_all_are_struck(stage: Stage) -> None:
        seen = 0
        while stage.system.to_strike() and stage.crowd.now_s() < stage.opens_s + most_s:
            for name in stage.system.struck()[seen:]:
                seen += 1
                stage.fault(f"death at {name}")
            await asyncio.sleep(0.05)
        for name in stage.system.struck()[seen:]:
            stage.fault(f"death at {name}")

    return Plan(
        f"sweep-{seed}",
        units=6,
        pay_within_s=2,
        buyers=lambda dice: all_sorts(dice, most_s, per_s=2.5),
        control={"hooks": {"copies": 2, "shuffle_ms": 100}, "late_pay": True},
        environment={**SPARING, "FAIRDROP_LEASE_S": "1", "FAIRDROP_AUTOCLAIM_IDLE_MS": "300"},
        chain=tuple(chain),
        meanwhile=(top_ups, poison),
        fault=until_all_are_struck,
        open_for_s=2.0,
    )


# --- the network -----------------------------------------------------------------------------------------------------

ENDS = {
    "redis": ("front", "worker", "office"),
    "postgres": ("worker", "office"),
    "supplier": ("worker",),
    "hooks": ("worker",),
}
WAYS: dict[str, tuple[Way, ...]] = {
    "one way, there": ("there",),
    "one way, back": ("back",),
    "both ways": ("there", "back"),
}


def cuts(seed: int, count: int = 4) -> Plan:
    """Connections are cut one way or both ways for longer than every deadline, and come back late or reset."""
    dice = random.Random(f"cuts:{seed}")
    things = list(ENDS) * (count // len(ENDS) + 1)
    dice.shuffle(things)

    async def cut(stage: Stage) -> None:
        await stage.after_opening(0.2)
        for thing in things[:count]:
            cable = stage.cables[dice.choice(ENDS[thing]), thing]
            how = dice.choice(list(WAYS))
            stage.fault(f"cut of {thing}, {how}")
            cable.cut(*WAYS[how])
            await asyncio.sleep(2.2 + dice.random())  # not a wait of a test: the fault itself
            cable.heal("deliver" if dice.random() < 0.5 else "reset")
            await asyncio.sleep(dice.random() * 0.6)

    return Plan(
        f"cuts-{seed}",
        units=6,
        pay_within_s=3,
        buyers=lambda dice: all_sorts(dice, 3.0 * count),
        control={"late_pay": True},
        cabled=tuple(ENDS),
        environment={"FAIRDROP_DATABASE_DEADLINE_S": "2"},
        meanwhile=(top_ups,),
        fault=cut,
        open_for_s=4.0,
    )


# --- stores that are full, away, or not what they were ----------------------------------------------------------------

PAY_WITHIN_S = 300  # of sales whose deadlines the plan lets pass: longer than any of them lasts


def hardly_paying(dice: random.Random, over_s: float) -> list[Buyer]:
    """Nine in ten of those who would pay do not: there are orders that can be released."""
    people = all_sorts(dice, over_s)
    for buyer in people:
        if dice.random() < 0.9:
            buyer.pays = False
    return people


async def a_join_gets_503(stage: Stage) -> None:
    """A buyer who comes now is told to come again, and when. AssertionError: nobody ever was."""
    async with httpx.AsyncClient(base_url=stage.system.url("front"), trust_env=False, timeout=10) as anyone:

        async def refused() -> bool:
            try:
                answer = await anyone.post(
                    f"/v1/sales/{stage.sale}/tickets",
                    json={"sku": SKU, "units": 1},
                    headers={"X-Buyer-Id": f"probe-{secrets.token_hex(4)}"},
                )
            except httpx.HTTPError:
                return False
            return answer.status_code == 503 and answer.headers.get("retry-after", "").isdigit()

        await stage.until(refused, SEEN_WITHIN_S)


async def releases(stage: Stage) -> int:
    rows = await stage.sql("SELECT count(*) AS n FROM outbox WHERE kind = 'release' AND state = 'done'")
    return int(rows[0]["n"])


async def deadlines_pass(stage: Stage, most: int) -> None:
    await stage.sql(
        "UPDATE purchase_order SET pay_by = now() WHERE order_no IN (SELECT order_no FROM purchase_order"
        " WHERE state = 'reserved' AND pay_by > now() ORDER BY pay_by LIMIT $1)",
        most,
    )


async def nobody_can_pay_any_more(stage: Stage) -> None:
    """Whatever is not paid ends, order by order, so that the sale comes to rest."""
    while True:
        await deadlines_pass(stage, 100)
        await asyncio.sleep(0.2)


async def a_release_runs(stage: Stage) -> None:
    """The deadline of one unpaid order passes now, and its units go back. Before, no deadline passes by itself
    (PAY_WITHIN_S), so that there is such an order however long the fault took to show."""
    before = await releases(stage)
    await deadlines_pass(stage, 1)

    async def more() -> bool:
        return await releases(stage) > before

    await stage.until(more, SEEN_WITHIN_S)


async def the_next_wins(stage: Stage) -> None:
    """All is well again: units come back, and somebody new is told `reserved`."""
    had = sum("reserved" in buyer.states for buyer in stage.crowd.people)
    await deadlines_pass(stage, 100)
    await stage.told("reserved", had + 1)


def redis_full(seed: int) -> Plan:
    """No memory left in the middle of the sale: joins 503 with Retry-After, releases run, and it heals when raised."""

    async def fill(stage: Stage) -> None:
        await stage.told("reserved", 2)
        async with redis.asyncio.Redis.from_url(stage.valkey.url) as client:
            used = (await client.info("memory"))["used_memory"]
            stage.fault("Redis is full")
            await client.config_set("maxmemory", int(used * (0.3 + stage.dice.random() * 0.6)))
            await a_join_gets_503(stage)
            await a_release_runs(stage)
            await client.config_set("maxmemory", 0)
        await the_next_wins(stage)

    return Plan(
        f"redis_full-{seed}",
        units=5,
        pay_within_s=PAY_WITHIN_S,
        afterwards=(nobody_can_pay_any_more,),
        buyers=lambda dice: hardly_paying(dice, 14.0),
        control={"late_pay": True},
        fault=fill,
        open_for_s=4.0,
    )


def disk_full(seed: int) -> Plan:
    """Redis' disk fills up: the door is shut before, Valkey ends when it is full, the ballast brings it back."""

    async def fill(stage: Stage) -> None:
        home = stage.valkey.home
        said: list[str] = []
        disk = Disk(home, stage.valkey, min_mb=6, ballast_mb=2, say=said.append)
        disk.look()
        await stage.told("reserved", 2)
        other = home / "other"
        stage.fault("Redis' disk is nearly full")
        take_room(other, leave_bytes=5 * MB)
        disk.look()
        assert disk.shut, said
        await a_join_gets_503(stage)
        await a_release_runs(stage)
        stage.fault("Redis' disk is full")
        take_room(other, leave_bytes=0)
        await stage.until(stage.valkey_ended, SEEN_WITHIN_S)
        disk.look()
        assert not disk.ballast.exists(), said
        await bring_back(stage.valkey)
        disk.look()
        await a_join_gets_503(stage)
        await a_release_runs(stage)
        other.unlink()
        disk.look()
        assert not disk.shut, said
        await the_next_wins(stage)

    return Plan(
        f"disk_full-{seed}",
        units=5,
        pay_within_s=PAY_WITHIN_S,
        afterwards=(nobody_can_pay_any_more,),
        buyers=lambda dice: hardly_paying(dice, 20.0),
        control={"late_pay": True},
        small_disk_mb=24,
        fault=fill,
        open_for_s=4.0,
    )


def take_room(file: Path, *, leave_bytes: int) -> None:
    """Take all the room of a disk but so much, though others write to it too."""
    with file.open("ab") as out:
        while (much := shutil.disk_usage(file.parent).free - leave_bytes) > 0:
            with contextlib.suppress(OSError):  # somebody else was faster: look again
                os.posix_fallocate(out.fileno(), out.seek(0, os.SEEK_END), much)


def postgres_away(seed: int, away_s: float) -> Plan:
    """No Postgres at the peak: claims up to the backlog cap, then 503; all are written when it is back."""
    backlog_max = 6

    async def take_away(stage: Stage) -> None:
        await stage.after_opening(0.3)
        stage.fault(f"Postgres is away for {away_s:.0f} s")
        loop = asyncio.get_running_loop()
        stage.postgres.kill()
        back_at = loop.time() + away_s

        async def claims(client: redis.asyncio.Redis) -> int:
            return int(await client.hget(SaleKeys(stage.sale).sale, "claims_open"))  # type: ignore[misc]

        async with redis.asyncio.Redis.from_url(stage.valkey.url) as client:

            async def full() -> bool:
                return await claims(client) >= backlog_max

            await stage.until(full, SEEN_WITHIN_S)
            await a_join_gets_503(stage)
            await asyncio.sleep(max(0.0, back_at - loop.time()))  # not a wait of a test: the fault itself
            assert await claims(client) <= backlog_max
            await bring_back(stage.postgres)

            async def drained() -> bool:
                return not await claims(client)

            await stage.until(drained, BACK_WITHIN_S)

    return Plan(
        f"postgres_away-{seed}",
        units=20,
        pay_within_s=3,
        buyers=lambda dice: all_sorts(dice, 4.0 + away_s),
        standby=False,
        control={"late_pay": True},
        environment={"FAIRDROP_ORDERS_BACKLOG_MAX": str(backlog_max)},
        fault=take_away,
        open_for_s=4.0,
    )


async def bring_older_log(stage: Stage) -> None:
    """Redis dies and comes back with a copy of its log that lacks two pulses, and what happened with them."""
    await stage.told("reserved", 2)
    folder = stage.valkey.home / "appendonlydir"
    older = stage.system.folder / "older"
    shutil.copytree(folder, older)
    beat = await pulse(stage)

    async def newer() -> bool:
        return await pulse(stage) > beat + 1

    await stage.until(newer)
    await asyncio.sleep(stage.dice.random())  # not a wait of a test: the fault's moment
    stage.fault("Redis comes back with an older log")
    stage.valkey.kill()
    put_back(older, folder)
    await bring_back(stage.valkey)


def older_log(seed: int) -> Plan:
    """Redis comes back with an older log, the data of a lost failover: the pulse tells, and the sale is made anew."""

    async def lose(stage: Stage) -> None:
        await bring_older_log(stage)

        await stage.until(lambda: made_anew(stage), BACK_WITHIN_S)

    return Plan(
        f"older_log-{seed}",
        units=12,
        pay_within_s=3,
        buyers=lambda dice: all_sorts(dice, 16.0),
        control={"late_pay": True},
        environment={"FAIRDROP_REBUILD_AFTER_S": "0.5", "FAIRDROP_REBUILD_EVERY_MIN_S": "1"},
        fault=lose,
        open_for_s=4.0,
    )


async def made_anew(stage: Stage) -> bool:
    found = await stage.sql("SELECT epoch, home FROM sale WHERE id = $1", stage.sale)
    return bool(found[0]["epoch"] > 1 and found[0]["home"] != "rebuilding")


async def pulse(stage: Stage) -> int:
    return int((await stage.sql("SELECT pulse FROM sale WHERE id = $1", stage.sale))[0]["pulse"])


def put_back(older: Path, folder: Path) -> None:
    """Replace Redis' log by an older copy, with the rights that it had."""
    owner = folder.stat()
    shutil.rmtree(folder)
    shutil.copytree(older, folder)
    for path in (folder, *folder.iterdir()):
        os.chown(path, owner.st_uid, owner.st_gid)


# --- clocks, call-backs, twins, versions -----------------------------------------------------------------------------


def clocks(seed: int) -> Plan:
    """The wall clocks of our processes jump by an hour, forth and back, in the middle of the sale.

    Redis' and Postgres' clocks decide what has come and what has passed; ours only sign and stamp."""

    async def jump(stage: Stage) -> None:
        await stage.after_opening(-0.4)
        for _ in range(5):
            process = stage.dice.choice(("front", "worker", "office"))
            ahead_s = stage.dice.choice((HOUR_S, -HOUR_S))
            stage.fault(f"the clock of {process} jumps by {'+' if ahead_s > 0 else '-'}1 h")
            write_clock(stage.system.folder / f"{process}.clock", ahead_s)
            await asyncio.sleep(0.8 + stage.dice.random())  # not a wait of a test: the fault itself
            if stage.dice.random() < 0.6:
                write_clock(stage.system.folder / f"{process}.clock", 0.0)
        for process in ("front", "worker", "office"):
            write_clock(stage.system.folder / f"{process}.clock", 0.0)

    return Plan(
        f"clocks-{seed}",
        units=6,
        pay_within_s=3,
        buyers=lambda dice: all_sorts(dice, 10.0),
        control={"late_pay": True},
        dresses={"front": "clock", "worker": "clock", "office": "clock"},
        meanwhile=(top_ups,),
        fault=jump,
        open_for_s=4.0,
    )


def call_backs(seed: int) -> Plan:
    """Call-backs come three times, out of order, forged, not at all, with an old signature, and a day late."""

    async def call_again(stage: Stage) -> None:
        await stage.told("paid", 2)
        secret = sandbox_wire.secrets_of(stage.system.sandbox_secret)[0]
        took: list[str] = []
        async with httpx.AsyncClient(
            base_url=stage.system.url("office"), trust_env=False, timeout=10
        ) as http:

            async def post(kind: str, raw: bytes, key: bytes, at_s: float | None = None) -> int:
                stage.fault(f"call-back: {kind}")
                signed = sandbox_wire.headers(key, "POST", "/hook", raw, at_s)
                answer = await http.post("/v1/hooks/sandbox", content=raw, headers=signed)
                took.append(kind)
                return answer.status_code

            for line in [one for one in Ledger(stage.system.ledger).read() if one.op == "captured"]:
                pay = msgspec.json.decode(line.keep)
                shown = {name: pay.get(name) for name in SHOWN}
                a_day_ago = datetime.now(UTC) - timedelta(days=1)
                event = {
                    "id": f"evt_{secrets.token_hex(12)}",
                    "type": "payment.paid",
                    "merchant": pay["merchant"],
                    "created_at": a_day_ago.isoformat(),
                    "payment": {**shown, "paid_at": a_day_ago.isoformat()},
                }
                raw = msgspec.json.encode(event)
                assert await post("a day late", raw, secret) == 200
                assert await post("the same event again", raw, secret) == 200
                assert await post("signed a day ago", raw, secret, a_day_ago.timestamp()) == 401
                dearer = {**event, "id": f"evt_{secrets.token_hex(12)}"}
                dearer["payment"] = {**shown, "amount_minor": 1}
                assert await post("forged", msgspec.json.encode(dearer), secrets.token_bytes(32)) == 401
        assert took, "nobody has paid"

    return Plan(
        f"call_backs-{seed}",
        units=8,
        pay_within_s=2,
        buyers=lambda dice: all_sorts(dice, 12.0),
        control={
            "hooks": {"copies": 3, "shuffle_ms": 1500, "forge_rate": 0.5, "drop_rate": 0.3},
            "late_pay": True,
        },
        fault=call_again,
        open_for_s=5.0,
    )


SHOWN = (
    "ref", "attempt_id", "order_no", "amount_minor", "currency", "merchant", "state", "url", "kind", "expires_at",
    "paid_at", "capture_ref", "code",
)  # fmt: skip  # of a payment, as the sandbox shows it in a call-back


def twins(seed: int) -> Plan:
    """Two workers with the same name read the same streams, with poison among the claims, and die in turn."""

    async def kill_in_turn(stage: Stage) -> None:
        await stage.after_opening(0.5)
        for number in range(4):
            await asyncio.sleep(0.5 + stage.dice.random() * 0.7)  # not a wait of a test: the fault's moment
            stage.fault("kill -9 of a worker with a twin")
            stage.system.kill(("worker", "worker2")[number % 2])

    return Plan(
        f"twins-{seed}",
        units=6,
        pay_within_s=2,
        buyers=lambda dice: all_sorts(dice, 8.0, per_s=5.0),
        control={"late_pay": True},
        workers=2,
        worker_name="twin",
        meanwhile=(top_ups, poison),
        fault=kill_in_turn,
        open_for_s=5.0,
    )


def deploy(seed: int) -> Plan:
    """A rolling deploy: half of the processes run the scripts of the release before, then each changes over."""

    async def roll(stage: Stage) -> None:
        todo = ["front", "office", "worker", "worker2"]
        stage.dice.shuffle(todo)
        await stage.after_opening(0.3)
        for name in todo:
            stage.fault("a process is replaced by the next release")
            dresses = stage.system.roles[name].dresses
            if dresses:
                dresses.clear()
            else:
                dresses.append("older_scripts")  # a release is taken back
            stage.system.signal(name, signal.SIGTERM)
            await asyncio.sleep(0.4 + stage.dice.random() * 0.4)  # not a wait of a test: the fault itself
            if stage.dice.random() < 0.5:
                stage.fault("SCRIPT FLUSH")
                async with redis.asyncio.Redis.from_url(stage.valkey.url) as client:
                    await client.script_flush()

    return Plan(
        f"deploy-{seed}",
        units=6,
        pay_within_s=2,
        buyers=lambda dice: all_sorts(dice, 8.0),
        control={"late_pay": True},
        workers=2,
        dresses={"front": "older_scripts", "worker2": "older_scripts"},
        meanwhile=(top_ups,),
        fault=roll,
        open_for_s=4.0,
    )
