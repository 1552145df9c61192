"""The worker as a whole: its loops outlive outages, share their work, and end cleanly."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from prometheus_client import REGISTRY
from sqlalchemy import event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from app import worker as worker_module
from app.answers import Asked, Busy
from app.embedded import Postgres, Valkey
from app.errors import DidNotHappen
from app.keys import GROUP, SaleKeys
from app.ledger import confirming, orders
from app.problems import CODES, Problem
from app.purchase.confirm import Confirmer, claims_of
from app.purchase.feed import READ_MAX, ConfirmLoop
from app.repair import audit
from app.repair.reconcile import Reconciler
from app.settings import Settings
from app.work.loops import Health, keep_going
from app.work.streams import Streams
from app.worker import Worker
from tests.ledger.shop import SALE, Shop, open_shop, settings_of, until

QUICK: dict[str, Any] = {
    "autoclaim_idle_ms": 300,
    "confirm_block_ms": 50,
    "expire_every_ms": 50,
    "relay_every_ms": 20,
    "pulse_every_s": 0.1,
    "reconcile_every_s": 0.2,
}


@pytest.fixture
async def shop(redis_url: str, database_url: str) -> AsyncIterator[Shop]:
    async with open_shop(redis_url, database_url, **QUICK) as shop:
        yield shop


@asynccontextmanager
async def at_work(shop: Shop, **changed: Any) -> AsyncIterator[Worker]:
    """A worker in this process, until the end of the block."""
    worker = Worker(settings_of(shop.settings.redis_url, shop.settings.database_url, **(QUICK | changed)))
    working = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stopping.set()
        await asyncio.wait_for(working, 180)


async def reserved(shop: Shop, count: int, within_s: float = 180.0) -> None:
    async def there() -> bool:
        try:
            async with shop.engine.connect() as conn:
                found = await conn.execute(
                    text("SELECT count(*) FROM purchase_order WHERE state = 'reserved'")
                )
                return int(found.scalar_one()) == count and await shop.backlog() == 0
        except (SQLAlchemyError, OSError):
            return False

    await until(there, f"{count} reserved", within_s)


async def at_rest(shop: Shop) -> None:
    """Nothing on its way, and every unit somewhere once."""

    async def quiet() -> bool:
        due = await shop.sql("SELECT 1 FROM outbox WHERE state = 'due'")
        return not due and await shop.backlog() == 0

    await until(quiet, "nothing is on its way")
    await shop.conserved()


async def test_a_worker_confirms_expires_and_tells_by_itself(shop: Shop) -> None:
    await shop.publish(20, pay_within_s=1)
    seqs = await shop.claim(*[f"b{n}" for n in range(10)])
    async with at_work(shop):
        await reserved(shop, 10)
        await shop.sql("UPDATE purchase_order SET pay_by = now() WHERE seq <= 4")
        await reserved(shop, 6)
        await at_rest(shop)
        assert await shop.left() == 14
        assert [await shop.byte(seq) for seq in seqs[:4]] == [b"e"] * 4

        async def numbered() -> bool:
            rows = await shop.sql("SELECT position FROM event ORDER BY position")
            return [row["position"] for row in rows] == list(range(1, len(rows) + 1))

        await until(numbered, "every event has its number")


async def test_asks_are_read_again_once_their_stream_is_back(shop: Shop) -> None:
    """While a sale is made anew its streams are gone for a moment; a worker that looked then never looked again."""
    await shop.publish(3)
    (seq,) = await shop.claim("ann")
    await shop.confirm()
    worker = Worker(shop.settings)
    await worker.link.start()
    try:
        await worker.admitter.look()
        await shop.link.call("UNLINK", shop.keys.asks)
        assert not await worker.asking.turn()
        await shop.link.call("XGROUP", "CREATE", shop.keys.asks, GROUP, "0", "MKSTREAM")
        asked = await shop.scripts.ask_put(
            sale=SALE,
            epoch=1,
            sku="A",
            seq=seq,
            buyer_id="ann",
            kind="leave",
            arg="-",
            channel="x",
            repeat_ms=1000,
        )
        assert asked == Asked()
        await worker.asking.take_over()
        await worker.asking.turn()
        assert await shop.link.call("XLEN", shop.keys.asks) == 0
    finally:
        await worker.link.close()
        await worker.engine.dispose()


async def test_a_stream_is_missing_only_from_a_sale_that_is_open(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is made anew has none for a moment: no alert, and it is read as soon as it is there again."""
    given: list[str] = []
    monkeypatch.setattr("app.work.streams.alert", lambda kind, _why, **_facts: given.append(kind))
    monkeypatch.setattr("app.work.streams.SHUT_LOOK_EVERY_S", 0.0)
    await shop.publish(3)
    streams = Streams(shop.link, "me", lambda sale: SaleKeys(sale).orders)
    await shop.scripts.sale_fence(sale=SALE, epoch=1)
    await shop.link.call("UNLINK", shop.keys.orders)
    assert await streams.read([SALE], 10) == {}
    assert given == []
    await shop.link.call("XGROUP", "CREATE", shop.keys.orders, GROUP, "0", "MKSTREAM")
    await shop.link.call("XADD", shop.keys.orders, "*", "c", "claim")
    assert list(await streams.read([SALE], 10)) == [SALE]
    await shop.link.call("HSET", shop.keys.sale, "home", shop.link.run_id)
    await shop.link.call("UNLINK", shop.keys.orders)  # somebody did
    for _ in range(3):
        assert await streams.read([SALE], 10) == {}
    assert given == ["stream_missing"]


async def test_a_worker_at_rest_asks_postgres_one_question_for_all_its_loops(shop: Shop) -> None:
    """Each loop looked for itself: 60 to 88 transactions a second for nothing."""
    await shop.publish(2)
    looks, others = 0, Counter[str]()
    async with at_work(shop, relay_every_ms=100, expire_every_ms=500, pulse_every_s=600.0) as worker:
        look = worker.lookout.turn

        async def counted() -> bool:
            nonlocal looks
            looks += 1
            return await look()

        worker.lookout.turn = counted  # type: ignore[method-assign]  # before its loop begins

        @event.listens_for(worker.engine.sync_engine, "before_cursor_execute")
        def _note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
            others[statement[:60]] += 1

        async def looked(times: int) -> None:
            async def enough() -> bool:
                return looks >= times

            await until(enough, f"{times} looks")

        await looked(10)  # every loop has looked once by itself
        others.clear()
        await looked(30)
        assert others.total() <= 4 * 20, others.most_common()  # some 10; one look a loop: 120


async def test_a_worker_at_rest_rests(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pulse that beat, and a comparison that compared, were taken for more to do: an idle worker never rested."""
    await shop.publish(2)
    turns: Counter[str] = Counter()

    def counted(name: str, turn: Any) -> Any:
        async def count(self: Any) -> Any:
            turns[name] += 1
            return await turn(self)

        return count

    monkeypatch.setattr(Reconciler, "pulse", counted("pulse", Reconciler.pulse))
    monkeypatch.setattr(Reconciler, "compare_all", counted("compare", Reconciler.compare_all))
    began = time.monotonic()
    async with at_work(shop, pulse_every_s=60.0, reconcile_every_s=0.3) as worker:

        async def compared() -> bool:
            return turns["compare"] >= 4 and bool(worker.admitter.watched)

        await until(compared, "the sale is compared again and again")
        assert turns["pulse"] == 1
        assert turns["compare"] <= (time.monotonic() - began) / 0.3 + 2


GOES_ON: dict[str, tuple[str, ...]] = {  # by part of the worker, what is done again and again
    "admitter": ("turn", "put_beacons", "note_beacons"),
    "course": ("note",),
    "confirming": ("turn", "take_over"),
    "asking": ("turn", "take_over"),
    "releaser": ("start_deadlines", "expire", "let_go", "relay"),
    "advisor": ("turn",),
    "extender": ("turn",),
    "biller": ("turn", "again"),
    "reconciler": ("pulse", "mend", "compare_all", "settle"),
    "auditor": ("turn",),
}
RUN_BESIDE = ("pay.run", "tell.run", "push.run", "published.run", "routes.run", "copy_routes", "remove_old")


async def test_whatever_has_to_go_on_by_itself_is_taken_up(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these is tried for itself elsewhere, by hand; here, that a worker does it at all."""
    begun: set[str] = set()

    def noted(name: str, real: Any) -> Any:
        def note(*args: Any, **more: Any) -> Any:
            begun.add(name)
            return real(*args, **more)

        return note

    for name in RUN_BESIDE:
        monkeypatch.setattr(f"app.worker.{name}", noted(name, attrgetter(name)(worker_module)))
    wanted = {f"{part}.{turn}" for part, turns in GOES_ON.items() for turn in turns} | set(RUN_BESIDE)
    async with at_work(shop) as worker:
        for part, turns in GOES_ON.items():
            for turn in turns:  # before their loops begin
                owner = getattr(worker, part)
                monkeypatch.setattr(owner, turn, noted(f"{part}.{turn}", getattr(owner, turn)))

        async def all_begun() -> bool:
            return begun == wanted

        try:
            await until(all_begun, "all that goes on by itself")
        except AssertionError:
            raise AssertionError(f"never begun: {sorted(wanted - begun)}") from None


async def test_books_that_do_not_agree_are_a_metric_and_call_a_person_once(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, called = 0, []
    run = audit.run

    async def counted(*args: Any, **more: Any) -> Any:
        nonlocal looks
        looks += 1
        return await run(*args, **more)

    monkeypatch.setattr(audit, "run", counted)
    monkeypatch.setattr(audit, "alert", lambda kind, _why, **facts: called.append((kind, facts["check"])))
    await shop.publish(5)

    async def seen(held: float) -> None:
        async def told() -> bool:
            labels = {"sale": SALE, "name": "units_add_up:A"}
            return REGISTRY.get_sample_value("fairdrop_invariant_holds", labels) == held

        await until(told, f"the metric says {held}")

    async def looked(times: int) -> None:
        most = looks + times

        async def enough() -> bool:
            return looks > most

        await until(enough, f"{times} looks more")

    async with at_work(shop, audit_every_s=0.1):
        await seen(1)
        await shop.link.call("HINCRBY", shop.keys.stock, "A", -1)  # somebody did
        await seen(0)
        await looked(2 * audit.SURE_AFTER)
        assert called == [("invariant_broken", "units_add_up:A")]
        await shop.link.call("HINCRBY", shop.keys.stock, "A", 1)
        await seen(1)
    assert len(called) == 1


async def test_standby_buyers_win_what_others_do_not_pay(shop: Shop) -> None:
    await shop.publish(2, standby=True)
    await shop.claim("a", "b")
    waiting = await shop.join("c", "d", "e")
    async with at_work(shop):
        await reserved(shop, 2)
        await shop.sql("UPDATE purchase_order SET pay_by = now()")

        async def moved() -> bool:
            rows = await shop.sql("SELECT buyer_id FROM purchase_order WHERE state = 'reserved'")
            return {row["buyer_id"] for row in rows} == {"c", "d"}

        await until(moved, "the next in line hold the units")
        await at_rest(shop)
    assert await shop.byte(waiting[2].seq) == b"w"
    assert await shop.left() == 0


async def test_a_buyer_leaves_while_claimed(shop: Shop) -> None:
    await shop.publish(3)
    (seq,) = await shop.claim("ann")
    await shop.scripts.ask_put(
        sale=SALE, epoch=1, sku="A", seq=seq, buyer_id="ann", kind="leave", repeat_ms=60_000
    )
    async with at_work(shop):

        async def gone() -> bool:
            return await shop.byte(seq) == b"k"

        await until(gone, "the ticket is left")
        await at_rest(shop)
    assert await shop.left() == 3
    assert await shop.link.call("XLEN", shop.keys.asks) == 0


async def test_a_redis_that_restarts_full_is_armed_and_takes_units_back(shop: Shop, valkey: Valkey) -> None:
    """As after a full disk: nothing may be taken, but what gives back runs."""
    await shop.publish(3)
    (seq,) = await shop.claim("ann")
    async with at_work(shop):
        await reserved(shop, 1)
        valkey.settings["maxmemory"] = "1"
        try:
            valkey.restart(crash=True)
            async with shop.engine.begin() as conn:
                await orders.ask_to_leave(conn, (await shop.orders())[0]["order_no"])

            async def gone() -> bool:
                with suppress(DidNotHappen):  # the test's own link is not back yet
                    return await shop.byte(seq) == b"k"
                return False

            await until(gone, "the unit is back")
        finally:
            del valkey.settings["maxmemory"]
            valkey.restart(crash=True)


async def test_claims_of_a_dead_worker_are_taken_over(shop: Shop) -> None:
    await shop.publish(20)
    await shop.claim(*[f"b{n}" for n in range(10)])
    assert claims_of(await shop.read(consumer="dead")) == 10
    async with at_work(shop):
        await reserved(shop, 10)
        assert await shop.pending() == 0


async def consumers(shop: Shop, stream: str) -> set[str]:
    return {found[1].decode() for found in await shop.link.call("XINFO", "CONSUMERS", stream, GROUP)}


async def test_workers_that_are_gone_are_forgotten_once_they_hold_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "CONSUMER_GONE_S", 0.4)
    monkeypatch.setattr(worker_module, "CONSUMERS_EVERY_S", 0.05)
    await shop.publish(20)
    await shop.claim("ann")
    assert len(await shop.read(consumer="dead")) == 1
    assert await shop.read(consumer="left") == []
    await shop.link.call("XGROUP", "CREATECONSUMER", shop.keys.asks, GROUP, "left")

    async def only_dead() -> bool:
        return "left" not in await consumers(shop, shop.keys.orders) | await consumers(shop, shop.keys.asks)

    async with at_work(shop, worker_name="here", autoclaim_idle_ms=600_000):
        await until(only_dead, "the consumer with nothing in hand is removed")
        assert "dead" in await consumers(shop, shop.keys.orders)
        assert await shop.pending() == 1  # what the dead one holds is kept
    async with at_work(shop, worker_name="here", autoclaim_idle_ms=200):
        await reserved(shop, 1)  # and taken over

        async def only_here() -> bool:
            return await consumers(shop, shop.keys.orders) == {"here"}

        await until(only_here, "then it is removed too")
    assert (await shop.item())["reserved"] == 1


async def test_two_workers_with_one_name_do_no_harm(shop: Shop) -> None:
    await shop.publish(300)
    async with at_work(shop, worker_name="twin"), at_work(shop, worker_name="twin"):
        seqs: list[int] = []
        for batch in range(5):
            seqs += await shop.claim(*[f"b{batch}-{n}" for n in range(30)])
        await reserved(shop, 150)
        for seq in seqs[:20]:
            await shop.scripts.ask_put(
                sale=SALE, epoch=1, sku="A", seq=seq, buyer_id=f"b0-{seqs.index(seq)}", kind="leave",
                repeat_ms=60_000,
            )  # fmt: skip

        async def left() -> bool:
            return len(await shop.sql("SELECT 1 FROM purchase_order WHERE state = 'cancelled'")) == 20

        await until(left, "the buyers have left")
        await at_rest(shop)
    assert (await shop.item())["reserved"] == 130
    assert await shop.left() == 170


async def test_three_workers_share_the_claims_and_write_each_once(shop: Shop) -> None:
    await shop.publish(500)
    async with (
        at_work(shop, worker_name="w1"),
        at_work(shop, worker_name="w2"),
        at_work(shop, worker_name="w3"),
    ):
        for batch in range(10):
            await shop.claim(*[f"b{batch}-{n}" for n in range(30)])
        await reserved(shop, 300)
        await at_rest(shop)
    assert (await shop.item())["reserved"] == 300


async def test_postgres_goes_down_and_comes_back_and_no_claim_is_lost(shop: Shop, postgres: Postgres) -> None:
    await shop.publish(100)
    async with at_work(shop) as worker:
        await shop.claim("first")
        await reserved(shop, 1)
        postgres.stop()
        await shop.claim(*[f"b{n}" for n in range(20)])  # selling goes on
        waiting = [f"w{n}" for n in range(3)]
        await shop.link.call("HSET", shop.keys.sale, "rate_milli", 1, "tokens_micro", 0)
        await shop.join(*waiting)
        await shop.link.call("HSET", shop.keys.sale, "rate_milli", -1)

        async def admitted() -> bool:
            return await shop.left() == 100 - 1 - 20 - 3

        await until(admitted, "the line moves without Postgres")
        assert await shop.backlog() == 23
        transport = httpx.ASGITransport(worker.probes())
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            answer = await client.get("/readyz")
            assert answer.status_code == 503
            assert answer.json()["reasons"][0].startswith("postgres: ")
            assert (await client.get("/healthz")).status_code == 200
            postgres.start()
            await reserved(shop, 24)
            await at_rest(shop)

            async def ready() -> bool:
                return (await client.get("/readyz")).status_code == 200

            await until(ready, "ready again")
            told = (await client.get("/readyz")).json()
            assert told["redis"] in shop.settings.redis_url  # which server; never its password
            assert told["durability"] == "local"
    assert (await shop.item())["reserved"] == 24


async def test_redis_restarts_and_the_worker_arms_it_and_goes_on(shop: Shop, valkey: Valkey) -> None:
    await shop.publish(100)
    async with at_work(shop):
        await shop.claim(*[f"a{n}" for n in range(5)])
        await reserved(shop, 5)
        await shop.claim(*[f"b{n}" for n in range(20)])
        before = shop.link.run_id
        valkey.restart(crash=True)

        async def armed() -> bool:
            return (
                shop.link.connected
                and shop.link.run_id != before
                and await shop.link.call("HGET", shop.keys.sale, "home") == shop.link.run_id.encode()
            )

        await until(armed, "armed again")
        await shop.claim(*[f"c{n}" for n in range(5)])
        await reserved(shop, 30)
        await at_rest(shop)
    assert await shop.left() == 70


async def test_a_sale_that_postgres_does_not_know_keeps_its_claims_and_holds_up_no_other(shop: Shop) -> None:
    await shop.publish(10)
    ghost = SaleKeys("ghost")
    await shop.link.call("HSET", ghost.sale, *await shop.link.call("HGETALL", shop.keys.sale))
    await shop.link.call("XGROUP", "CREATE", ghost.orders, GROUP, "0", "MKSTREAM")
    await shop.link.call("XGROUP", "CREATE", ghost.asks, GROUP, "0", "MKSTREAM")
    await shop.link.call("XADD", ghost.orders, "*", "c", "1|1|A|1700000000000", "1:1", "eve")
    await shop.link.call("HSET", "fairdrop:sales", "ghost", b'{"version":1,"ended":false}')
    async with at_work(shop) as worker:

        async def in_trouble() -> bool:
            return any(batch.sale == "ghost" for batch in worker.confirming.held)

        await until(in_trouble, "the ghost's claim is in hand")
        await shop.claim("ann", "bob")
        await reserved(shop, 2)
        assert await shop.link.call("XLEN", ghost.orders) == 1
        assert await shop.sql("SELECT 1 FROM dead_letter") == []


async def test_a_long_line_is_served_no_faster_than_postgres_writes(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Postgres writes nothing admission pauses at the cap; then it goes on below it, to the end of the line."""
    cap, buyers = 60, 300
    real, writes = confirming.reserve, asyncio.Event()

    async def held(conn: AsyncConnection, *rest: Any) -> bool:
        await writes.wait()
        return await real(conn, *rest)

    monkeypatch.setattr(confirming, "reserve", held)
    later = datetime.now(UTC) + timedelta(
        minutes=30
    )  # it opens when everybody is there, however long that takes
    await shop.publish(buyers, state="scheduled", opened_at=None, opens_at=later, draw_freeze_s=0)
    for first in range(0, buyers, 100):
        await shop.join(*[f"b{first + n}" for n in range(100)])
    await shop.sql("UPDATE sale SET opens_at = now()")
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    await shop.link.call("HSET", shop.keys.sale, "opens_ms", now_ms, "freeze_ms", now_ms)
    lags: list[int] = []
    async with at_work(shop, orders_backlog_max=cap, confirm_batch_max=20) as worker:

        async def paused() -> bool:
            answer = await shop.scripts.line_advance(
                sale=SALE, epoch=1, sku="A", work_max=1, backlog_max=cap
            )  # what the next tick will hear
            return isinstance(answer, Busy)

        await until(paused, "admission pauses")
        assert await shop.backlog() == cap
        writes.set()

        async def served() -> bool:
            lags.append(await shop.backlog())
            return (await shop.item())["reserved"] == buyers

        await until(served, "the whole line is served")
        assert len(worker.confirming.working) <= 2
        await at_rest(shop)
    assert max(lags) <= cap


async def test_full_batches_of_one_sale_are_confirmed_at_once_and_others_alone(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(1_000)
    real = Confirmer.confirm
    under_way: list[int] = []
    most = beside_part = 0

    async def watched(self: Confirmer, sale: str, entries: Any, **given: Any) -> int:
        nonlocal most, beside_part
        beside_part += any(size < 50 for size in under_way)
        under_way.append(claims_of(entries))
        most = max(most, len(under_way))
        try:
            return await real(self, sale, entries, **given)
        finally:
            under_way.remove(claims_of(entries))

    monkeypatch.setattr(Confirmer, "confirm", watched)
    for n in range(250):
        await shop.claim(f"a{n}", f"c{n}")
    async with at_work(shop, confirm_batch_max=50, confirm_in_flight_max=3):
        await reserved(shop, 500)
        for n in range(20):
            await shop.claim(f"b{n}")
        await reserved(shop, 520)
        await at_rest(shop)
    assert most == 3  # as many as may be
    assert beside_part == 0  # claims that come one by one wait for the batch before them, and go together


async def test_batches_that_wait_for_an_item_take_no_connection_from_payments(shop: Shop) -> None:
    await shop.publish(100)
    await shop.claim(*[f"b{n}" for n in range(40)])
    waiting = (
        "SELECT application_name AS name, count(*) AS n FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock' GROUP BY 1"
    )

    async def all_wait() -> bool:
        return await shop.sql(waiting) == [{"name": "fairdrop confirm", "n": 2}]

    async with shop.engine.connect() as other:
        await other.execute(text("SELECT 1 FROM item FOR UPDATE"))
        async with at_work(shop, confirm_batch_max=1, confirm_in_flight_max=2, database_pool=1):
            await shop.claim(*[f"c{n}" for n in range(10)])
            await until(all_wait, "both batches wait for the item")
            await other.rollback()
            await reserved(shop, 50)
            await at_rest(shop)


@dataclass
class Queue:
    """A stream of entries with so many claims each, as the worker reads it, and a confirmer that notes its batches."""

    sizes: list[int]
    asked: list[int] = field(default_factory=list)
    at: int = 0
    in_hand: int = 0
    most_in_hand: int = 0
    batches: list[list[Any]] = field(default_factory=list)

    async def read(self, sales: Sequence[str], count: int, *, block_ms: int = 0) -> dict[str, list[Any]]:
        self.asked.append(count)
        first = self.at
        taken = [
            (b"%d-0" % (first + n), [b"c", b"1|1|A|1", *[b"1:1", b"ann"] * size])
            for n, size in enumerate(self.sizes[first : first + count])
        ]
        self.at += len(taken)
        self.in_hand += claims_of(taken)
        self.most_in_hand = max(self.most_in_hand, self.in_hand)
        return {"s": taken} if taken else {}

    async def confirm(self, sale: str, entries: list[Any], *, careful: bool) -> int:
        self.batches.append(entries)
        await asyncio.sleep(0)
        self.in_hand -= claims_of(entries)
        return claims_of(entries)


@pytest.mark.parametrize(
    ("sizes", "smallest"),
    [
        ([1] * 5_000, 900),  # small entries make full batches where there are enough of them
        ([7] * 1_000, 900),
        ([256] * 100, 256),
        ([1] * 1_000 + [256] * 100, 1),
        ([1_000] * 20 + [1] * 2_000, 1),
    ],
)
async def test_batches_are_of_claims_whatever_the_entries_hold(sizes: list[int], smallest: int) -> None:
    queue = Queue(sizes)
    settings = Settings(
        env="development", redis_url="redis://127.0.0.1:1", database_url="postgresql://x@127.0.0.1:1/x"
    )
    loop = ConfirmLoop(
        cast(Any, queue), cast(Any, queue), cast(Any, SimpleNamespace(watched={"s": None})), settings
    )
    while queue.at < len(sizes) or loop.working or loop.ready:
        await loop.turn()
    held = [claims_of(batch) for batch in queue.batches]
    assert [entry[0] for batch in queue.batches for entry in batch] == [
        b"%d-0" % n for n in range(len(sizes))
    ]
    assert max(held) <= settings.confirm_batch_max
    assert min(held[:-1]) >= smallest
    assert max(queue.asked) <= READ_MAX
    assert (
        queue.most_in_hand
        <= READ_MAX * max(sizes) + settings.confirm_in_flight_max * settings.confirm_batch_max
    )


async def test_stopping_finishes_what_is_in_hand_and_takes_nothing_new(shop: Shop) -> None:
    await shop.publish(3_000)
    for batch in range(60):
        await shop.claim(*[f"b{batch}-{n}" for n in range(50)])
    async with at_work(shop, confirm_batch_max=500):

        async def begun() -> bool:
            return bool(await shop.sql("SELECT 1 FROM purchase_order LIMIT 1"))

        await until(begun, "a first batch is written")
    assert await shop.pending() == 0  # nothing was left half done
    written = len(await shop.orders())
    assert written + await shop.backlog() == 3_000
    await shop.conserved()


async def test_metrics_are_for_the_allowed_networks_only(shop: Shop) -> None:
    worker = Worker(shop.settings)
    try:
        for host, status in (("127.0.0.1", 200), ("192.0.2.1", 403)):
            transport = httpx.ASGITransport(worker.probes(), client=(host, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
                answer = await client.get("/metrics")
                assert answer.status_code == status
                if status == 200:
                    assert "fairdrop_confirm_claims_total" in answer.text
    finally:
        await worker.providers.aclose()
        await worker.engine.dispose()


async def test_the_probes_refuse_with_problem_documents_like_the_other_processes(shop: Shop) -> None:
    """Operators' tools read one shape of all three: these were bare texts, and `reasons` was an object here only."""
    worker = Worker(shop.settings)
    try:
        transport = httpx.ASGITransport(worker.probes(), client=("192.0.2.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            for method, path, status, code in (
                ("GET", "/metrics", 403, "forbidden"),
                ("GET", "/nowhere", 404, "not_found"),
                ("POST", "/healthz", 405, "method_not_allowed"),
                ("GET", "/readyz", 503, "busy"),  # no link to Redis yet
            ):
                answer = await client.request(method, path)
                assert answer.headers["content-type"] == "application/problem+json"
                assert (answer.status_code, answer.json()["status"], answer.json()["code"]) == (
                    status,
                    status,
                    code,
                )
                assert Problem.model_validate(answer.json()).request_id
                assert CODES[code].status == status
            assert answer.headers["retry-after"] == "1"
            assert [reason.partition(":")[0] for reason in answer.json()["reasons"]] == ["redis"]
    finally:
        await worker.providers.aclose()
        await worker.engine.dispose()


async def test_a_loop_that_fails_says_so_once_and_goes_on_when_it_can(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopping, turns = asyncio.Event(), 0

    async def turn() -> bool:
        nonlocal turns
        turns += 1
        if turns <= 4:
            raise ConnectionRefusedError("nobody there")
        stopping.set()
        return False

    await asyncio.wait_for(keep_going("test", turn, 0.01, stopping, Health()), 5)
    assert turns == 5
    said = capsys.readouterr()
    assert (said.out + said.err).count("loop interrupted") == 1
    assert (said.out + said.err).count("loop works again") == 1


async def test_the_process_answers_its_probes_and_ends_on_sigterm(shop: Shop, tmp_path: Path) -> None:
    await shop.publish(20)
    await shop.claim(*[f"b{n}" for n in range(10)])
    told = tmp_path / "port"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import asyncio; from app.settings import Settings; from app.worker import run; asyncio.run(run(Settings()))",
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("FAIRDROP_")},
            "FAIRDROP_ENV": "development",
            "FAIRDROP_REDIS_URL": shop.settings.redis_url,
            "FAIRDROP_DATABASE_URL": shop.settings.database_url,
            "FAIRDROP_WORKER_PORT": "0",
            "FAIRDROP_PORT_FILE": str(told),
        },
    )
    try:

        async def listening() -> bool:
            assert process.returncode is None
            return told.exists()

        await until(listening, "the worker says its port")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{told.read_text().strip()}") as client:

            async def ready() -> bool:
                return (await client.get("/readyz")).status_code == 200

            await until(ready, "ready")
        await reserved(shop, 10)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 180) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert await shop.link.call("XPENDING", shop.keys.orders, GROUP) == [0, None, None, None]
