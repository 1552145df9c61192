"""The tail of Redis' log is torn off, at every byte of its last records, as by a disk that lies about fsync.

One sale is prepared: in its middle everything dies at once, and what both stores hold is put aside. Then

- a server is started on the log cut at each byte: it must hold what the records before the cut made, a script's writes
  as a whole or not at all;
- for each of these states the rest of the installation is started over it, with what Postgres and the supplier knew.
  The sale must be armed again or made anew, come to rest, and keep every promise that Redis alone did not give.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import asyncpg
import redis.asyncio
from redis.exceptions import RedisError

from app.demo.desk import Desk
from app.embedded import Valkey, find_valkey
from app.history.final import finish
from app.history.judge import AGREE_WITHIN_S, judge
from app.record import Line, Mark, Op, Recorder, Sale, encode, read
from tests.chaos.faults import BACK_WITHIN_S, all_sorts, bring_back, top_ups
from tests.chaos.scenario import (
    CALLS_WITHIN_S,
    PATIENCE,
    REST_WITHIN_S,
    Outcome,
    Plan,
    Stage,
    _close,
    calls_come_through,
    play,
)
from tests.chaos.system import System, Zygote
from tests.conftest import Stores

RECORDS = 50  # the last ones
SAMPLE_EVERY_S = 0.01
SERVERS_AT_ONCE = 4
HEALED_AT_ONCE = 2
LOADED_WITHIN_S = 60.0
# Told by Redis alone: a place that only a buyer knows of can be lost with it.
OF_REDIS = frozenset({"waiting", "claimed", "left", "sold_out", "closed", "lapsed"})


@dataclass
class Aside:
    """What was put aside when everything died: Redis' log, a copy of the database, supplier's books, history."""

    folder: Path
    sale: str
    database: str
    sizes: list[tuple[float, int]] = field(default_factory=list)  # of the log, in the history's time

    @property
    def log(self) -> Path:
        return next((self.folder / "log").glob("*.incr.aof"))

    def surely_written_before(self, size: int) -> float:
        """The last moment at which the log was no longer than this."""
        return max((at for at, was in self.sizes if was <= size), default=0.0)


def records(log: bytes) -> Iterator[tuple[int, int]]:
    """Where each record of a log begins and ends: one command, or all from MULTI to EXEC. The last may be cut: none."""
    at, begun = 0, -1
    with contextlib.suppress(ValueError):  # no end of a line any more
        while at < len(log):
            first, line = at, log.index(b"\r\n", at)
            if log[at : at + 1] == b"#":  # an annotation
                at = line + 2
                continue
            words, at, command = int(log[at + 1 : line]), line + 2, b""
            for word in range(words):
                line = log.index(b"\r\n", at)
                length = int(log[at + 1 : line])
                if word == 0:
                    command = log[line + 2 : line + 2 + length].upper()
                at = line + 2 + length + 2
            if at > len(log):
                return
            if command == b"MULTI":
                begun = first
            elif command == b"EXEC":
                yield begun, at
                begun = -1
            elif begun < 0:
                yield first, at


def sale_to_tear(seed: int, stores: Stores, put_aside: list[Aside]) -> Plan:
    """A sale in whose middle everything dies at once; it goes on afterwards."""

    async def everything_dies(stage: Stage) -> None:
        aside = Aside(stage.system.folder / "aside", stage.sale, f"t_{secrets.token_hex(6)}")
        aside.folder.mkdir()
        home = stage.valkey.home / "appendonlydir"
        loop = asyncio.get_running_loop()
        await stage.after_opening(0.5)
        until = loop.time() + 2.5
        while loop.time() < until or not await enough_happened(stage):
            size = next(home.glob("*.incr.aof")).stat().st_size
            aside.sizes.append((stage.record.clock(), size))
            await asyncio.sleep(SAMPLE_EVERY_S)
        stage.fault("everything dies at once")
        for role in stage.system.roles.values():
            role.wanted = False
            stage.system.signal(role.name, signal.SIGKILL)
        stage.valkey.kill()
        shutil.copytree(home, aside.folder / "log")
        stage.record.flush()
        shutil.copy(stage.system.folder / "history.jsonl", aside.folder)
        shutil.copy(stage.system.ledger, aside.folder / "supplier.jsonl")
        name = stage.database_url.rpartition("/")[2]
        stores.of("wheel").sql(
            f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'",
            f"CREATE DATABASE {aside.database} TEMPLATE {name} STRATEGY file_copy",
        )
        put_aside.append(aside)
        await bring_back(stage.valkey)
        for role in stage.system.roles.values():
            role.wanted = True

    async def enough_happened(stage: Stage) -> bool:
        return bool(
            (await stage.sql("SELECT count(*) > 5 AS many FROM purchase_order WHERE state = 'paid'"))[0][
                "many"
            ]
        )

    return Plan(
        f"torn-{seed}",
        units=8,
        pay_within_s=3,
        buyers=lambda dice: all_sorts(dice, 12.0),
        control={"late_pay": True},
        meanwhile=(top_ups,),
        fault=everything_dies,
        open_for_s=4.0,
    )


async def state_of(folder: Path, sale: str) -> str:
    """What a server that starts on this log holds of the sale. AssertionError: it does not start, and what it said.

    It listens on no port: of twenty thousand starts one would find its port taken by somebody else meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="torn-") as short:  # the path of a socket has at most 107 bytes
        wire, said = Path(short) / "s", folder / "said"
        with said.open("wb") as out:
            server = await asyncio.create_subprocess_exec(
                str(find_valkey()), "--port", "0", "--unixsocket", str(wire), "--dir", str(folder), "--appendonly",
                "yes", "--save", "", "--aof-load-truncated", "yes", "--enable-debug-command", "local",
                stdout=out, stderr=out,
            )  # fmt: skip
        try:
            async with redis.asyncio.Redis(
                unix_socket_path=str(wire), socket_timeout=5.0, retry=None
            ) as client:
                deadline = asyncio.get_running_loop().time() + LOADED_WITHIN_S
                while True:
                    ended = server.returncode is not None
                    assert not ended, f"Valkey does not start on {folder}: {said.read_text()[-600:]}"
                    assert asyncio.get_running_loop().time() < deadline, f"Valkey does not load {folder}"
                    with contextlib.suppress(RedisError, OSError):
                        names = sorted(await client.keys(f"{{sale:{sale}}}:*"))
                        digests = (
                            await client.execute_command("DEBUG", "DIGEST-VALUE", *names) if names else []
                        )
                        return repr(list(zip(names, digests, strict=True)))
                    await asyncio.sleep(0.005)
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.kill()
            await server.wait()


def cut_copy(aside: Aside, size: int, to: Path) -> None:
    """The log put aside, cut after so many bytes."""
    shutil.copytree(aside.folder / "log", to)
    os.truncate(to / aside.log.name, size)


async def states(aside: Aside, cuts: list[int]) -> dict[int, str]:
    """cut → what a server holds that starts on the log cut there."""
    places = asyncio.Semaphore(SERVERS_AT_ONCE)

    async def one(cut: int) -> tuple[int, str]:
        async with places:
            folder = Path(tempfile.mkdtemp(prefix="torn-", dir=aside.folder))
            try:
                cut_copy(aside, cut, folder / "appendonlydir")
                return cut, await state_of(folder, aside.sale)
            finally:
                shutil.rmtree(folder)

    return dict(await asyncio.gather(*(one(cut) for cut in cuts)))


def as_remembered(lines: list[Line], since_s: float) -> list[Line]:
    """The history without what Redis alone told after this moment: those answers count as never given."""
    kept: list[Line] = []
    for line in lines:
        if isinstance(line, Op) and line.do == "ok" and line.at > since_s and line.state in OF_REDIS:
            of = {"id": line.id, "process": line.process, "op": line.op, "buyer": line.buyer}
            kept.append(Op(at=line.at, do="unknown", **of))  # type: ignore[arg-type]
        else:
            kept.append(line)
    return kept


async def heal(aside: Aside, cut: int, zygote: Zygote, stores: Stores) -> Outcome:
    """Start everything over the log cut here, and judge what comes of it."""
    began = asyncio.get_running_loop().time()
    folder = Path(tempfile.mkdtemp(prefix="healed-", dir=stores.home))
    folder.chmod(0o711)
    pair = stores.of("wheel")
    database = f"t_{secrets.token_hex(6)}"
    pair.sql(f"CREATE DATABASE {database} TEMPLATE {aside.database} STRATEGY file_copy")
    database_url = pair.postgres.url_of(database)
    valkey = Valkey(folder / "valkey", secrets.token_urlsafe(12), server=find_valkey())
    valkey.home.mkdir()
    cut_copy(aside, cut, valkey.home / "appendonlydir")
    valkey.start()
    system = System(
        zygote,
        folder,
        redis_url=valkey.url,
        database_url=database_url,
        environment={"FAIRDROP_REBUILD_AFTER_S": "0.3", "FAIRDROP_REBUILD_EVERY_MIN_S": "1"},
    )
    shutil.copy(aside.folder / "supplier.jsonl", system.ledger)
    desk, sandbox = Desk(system.url("office"), system.operator_key), Desk(system.url("sandbox"), "")
    before = as_remembered(read(aside.folder / "history.jsonl"), aside.surely_written_before(cut))
    record = Recorder(folder / "history.jsonl")
    try:
        await system.start()
        await wait_for_home(valkey, database_url, aside.sale)
        record.mark("healed")
        await _close(desk, aside.sale)
        await calls_come_through(sandbox, within_s=CALLS_WITHIN_S)
        rested = await finish(
            record,
            aside.sale,
            redis_url=valkey.url,
            database_url=database_url,
            supplier=system.ledger,
            within_s=REST_WITHIN_S,
        )
    finally:
        await desk.close()
        await sandbox.close()
        system.close()
        valkey.kill()
        record.close()
        stores.drop_database(database_url)
    lines = before + read(folder / "history.jsonl")
    with (folder / "history.jsonl").open("wb") as file:
        for line in lines:
            file.write(encode(line))
    seconds = asyncio.get_running_loop().time() - began
    verdict = judge(lines, agree_within_s=AGREE_WITHIN_S * PATIENCE)
    return Outcome(verdict, lines, seconds, [], [], rested, folder / "history.jsonl")


async def wait_for_home(valkey: Valkey, database_url: str, sale: str) -> None:
    """The sale is armed again, or made anew. AssertionError: neither."""
    async with redis.asyncio.Redis.from_url(valkey.url) as client:
        run_id = (await client.info("server"))["run_id"]
    connection = await asyncpg.connect(database_url)
    try:
        deadline = asyncio.get_running_loop().time() + BACK_WITHIN_S
        while await connection.fetchval("SELECT home FROM sale WHERE id = $1", sale) != run_id:
            assert asyncio.get_running_loop().time() < deadline, "neither armed nor made anew"
            await asyncio.sleep(0.05)
    finally:
        await connection.close()


async def tear(
    zygote: Zygote, stores: Stores, seed: int, *, cuts_max: int = 0, heals_max: int = 0
) -> Outcome:
    """cuts_max: so many cuts, chosen by the seed; heals_max: so many of the states are healed. 0: all."""
    dice = random.Random(f"torn:{seed}")
    put_aside: list[Aside] = []
    outcome = await play(sale_to_tear(seed, stores, put_aside), zygote, stores, seed)
    if not (outcome.verdict.ok and outcome.rested):
        return outcome
    (aside,) = put_aside
    try:
        return await _tear(aside, outcome, zygote, stores, dice, cuts_max, heals_max)
    finally:
        stores.drop_database(aside.database)


async def _tear(
    aside: Aside, outcome: Outcome, zygote: Zygote, stores: Stores, dice: random.Random, cuts_max: int, heals_max: int
) -> Outcome:  # fmt: skip
    log = aside.log.read_bytes()
    last = list(records(log))[-RECORDS:]
    ends = [last[0][0], *(end for _, end in last)]
    inside = [cut for begin, end in last for cut in range(begin + 1, end)]
    if cuts_max:
        inside = sorted(dice.sample(inside, min(cuts_max, len(inside))))
    held = await states(aside, sorted({*ends, *inside}))
    marks = [Mark(at=0.0, what="fault", note="Redis' log cut at a byte")] * len(inside)
    for cut in inside:
        whole = max(end for end in ends if end <= cut)
        assert held[cut] == held[whole], f"a log cut at byte {cut} holds part of the record at {whole}"
    chosen = ends if not heals_max else sorted(dice.sample(ends, heals_max))
    places = asyncio.Semaphore(HEALED_AT_ONCE)

    async def one(cut: int) -> Outcome:
        async with places:
            return await heal(aside, cut, zygote, stores)

    healed = await asyncio.gather(*(one(cut) for cut in chosen))
    for came in healed:
        if not (came.verdict.ok and came.rested):
            return came
        anew = any(isinstance(line, Sale) and line.epoch > 1 for line in came.lines)
        note = "Redis' log cut between two records: the sale was " + ("made anew" if anew else "armed again")
        marks.append(Mark(at=0.0, what="fault", note=note))
        shutil.rmtree(came.history.parent, ignore_errors=True)
    seconds = outcome.seconds + sum(came.seconds for came in healed)
    return replace(outcome, lines=[*outcome.lines, *marks], seconds=seconds)
