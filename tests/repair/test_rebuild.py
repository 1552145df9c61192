"""A sale made anew from Postgres: orders keep their tickets, units are counted once, whatever was lost or came late."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from asyncio.subprocess import PIPE
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
import pytest

from app.answers import (
    Asked,
    Claimed,
    Gone,
    Has,
    Old,
    Waits,
)
from app.errors import DidNotHappen
from app.ledger import confirming, orders
from app.repair import rebuild as rebuilding
from app.repair.rebuild import NotNow, Report, rebuild
from app.sale.view import ItemView
from tests.ledger.shop import SALE, Shop, open_shop, until


@pytest.fixture
async def shop(redis_url: str, database_url: str):  # type: ignore[no-untyped-def]
    async with open_shop(redis_url, database_url, rebuild_after_s=0.0, rebuild_every_min_s=0.0) as shop:
        yield shop


async def anew(shop: Shop) -> Report:
    report = await rebuild(shop.settings, shop.link, shop.scripts, SALE, actor="test", reason="test")
    assert report is not None
    shop.epoch = report.epoch
    await shop.admitter.look()
    return report


async def lose_everything(shop: Shop) -> None:
    await shop.link.call("FLUSHALL")


async def keep(shop: Shop) -> list[tuple[bytes, bytes]]:
    """Every key of Redis as it is now: what an older log or a lagging replica would bring back."""
    names = await shop.link.call("KEYS", "*")
    dumps = await shop.link.pipeline([("DUMP", name) for name in names])
    return list(zip(names, dumps, strict=True))


async def bring_back(shop: Shop, kept: list[tuple[bytes, bytes]]) -> None:
    await shop.link.call("FLUSHALL")
    for reply in await shop.link.pipeline([("RESTORE", name, 0, dump) for name, dump in kept]):
        assert reply == b"OK", reply


async def cancelled(shop: Shop) -> Any:
    """The order of ann, who had the only unit until an operator cancelled it."""
    await shop.publish(1)
    await shop.claim("ann")
    await shop.confirm()
    (ann,) = await shop.orders()
    async with shop.engine.begin() as conn:
        await orders.cancel(conn, ann["order_no"], "operator")
    return ann


async def late_money_is_refused(shop: Shop, order_no: str) -> None:
    """Late money for the order is decided about once, and goes back."""
    said: list[str] = []

    def note(word: str) -> Callable[[Any], Awaitable[None]]:
        async def noted(_: Any) -> None:
            said.append(word)

        return noted

    assert await shop.releaser.settle_late(order_no, kept=note("kept"), refused=note("refused")) == "refused"
    assert said == ["refused"]


async def told_as_it_is(shop: Shop) -> None:
    """Every live order is what its ticket in Redis says, by byte and by status; nobody else holds a live ticket."""
    rows = await shop.orders()
    for row in rows:
        assert await shop.byte(row["seq"], row["sku"]) == orders.byte_of(row).encode(), dict(row)
        status = await shop.told(row["seq"], row["sku"])
        assert status is not None
        assert status[1] == orders.byte_of(row).encode()
        assert status[2]["order"]["state"] == row["state"]


async def test_after_a_total_loss_orders_keep_their_tickets_and_the_rest_lapses(shop: Shop) -> None:
    await shop.publish(3)
    seqs = await shop.claim("ann", "bob")
    await shop.confirm()
    (cid,) = await shop.claim("cid")  # claimed, not written: lost with Redis
    await lose_everything(shop)
    report = await anew(shop)
    assert (report.epoch, report.orders_live, report.units_left, report.claims_drained) == (2, 2, {"A": 1}, 0)
    assert [await shop.byte(seq) for seq in seqs] == [b"r", b"r"]
    assert await shop.byte(cid) in (b"", b"\0")  # told as lapsed
    await told_as_it_is(shop)
    (ann,) = await shop.join("ann")
    assert isinstance(ann, Has)
    assert (ann.seq, ann.byte) == (seqs[0], b"r")
    (again,) = await shop.join("cid")
    assert again == Claimed(cid)  # the seq is given once more, in the new epoch
    assert await shop.confirm() == 1
    await shop.conserved()
    await told_as_it_is(shop)


async def wish(shop: Shop, seq: int, buyer: str, kind: Literal["leave", "pay"], arg: str = "-") -> int:
    """A buyer's wish, answered by the worker. Returns how many were settled."""
    answer = await shop.scripts.ask_put(
        sale=SALE,
        epoch=shop.epoch,
        sku="A",
        seq=seq,
        buyer_id=buyer,
        kind=kind,
        arg=arg,
        channel="x",
        repeat_ms=1000,
    )
    assert isinstance(answer, Asked), answer
    return await shop.releaser.answer_asks(SALE, await shop.asks())


async def test_an_order_of_an_earlier_epoch_is_paid_and_left_like_any_other(shop: Shop) -> None:
    """Its number is of the epoch in which it was claimed, and the wish is of the present one."""
    await shop.publish(4)
    ann, bob = await shop.claim("ann", "bob")
    await shop.confirm()
    await lose_everything(shop)
    await anew(shop)
    (cid,) = await shop.claim("cid")
    await shop.confirm()
    await anew(shop)
    for seq, buyer in ((ann, "ann"), (cid, "cid")):
        assert await wish(shop, seq, buyer, "leave") == 1
    while await shop.releaser.let_go():
        pass
    await shop.relay()
    assert [await shop.byte(seq) for seq in (ann, bob, cid)] == [b"k", b"r", b"k"]
    till = urlsafe_b64encode(msgspec.json.encode({"channel": "sandbox"})).decode().rstrip("=")
    assert await wish(shop, bob, "bob", "pay", till) == 1
    assert [number for number, _ in shop.attempts] == [
        row["order_no"] for row in await shop.orders() if row["buyer_id"] == "bob"
    ]
    (late,) = await shop.claim("dan")  # of the present epoch, not written yet: the wish waits for it
    assert await wish(shop, late, "dan", "leave") == 0
    await shop.conserved()


async def test_claims_that_redis_still_holds_become_orders_first(shop: Shop) -> None:
    await shop.publish(3)
    await shop.claim("ann", "bob")
    report = await anew(shop)
    assert (report.claims_drained, report.orders_live, report.units_left) == (2, 2, {"A": 1})
    await told_as_it_is(shop)
    await shop.conserved()


async def test_an_older_redis_gives_nothing_twice(shop: Shop) -> None:
    await shop.publish(3)
    await shop.claim("ann")
    older = await keep(shop)
    await shop.claim("bob", "cid")
    await shop.confirm()
    await shop.sql("UPDATE purchase_order SET state = 'paid' WHERE buyer_id = 'bob'")
    await shop.sql("UPDATE item SET reserved = reserved - 1, sold = sold + 1")
    await bring_back(shop, older)  # two units more than there are, and ann's claim once more
    report = await anew(shop)
    assert report.units_left == {"A": 0}
    assert report.claims_drained == 1
    assert len(await shop.orders()) == 3
    await told_as_it_is(shop)
    await shop.conserved()


async def test_a_worker_sees_it_and_mends_it_by_itself(shop: Shop) -> None:
    await shop.publish(3)
    await shop.claim("ann")
    await shop.confirm()
    await shop.reconciler.pulse()
    await lose_everything(shop)
    assert await shop.reconciler.mend() == 0  # not known yet
    assert await shop.reconciler.pulse() == 0
    assert await shop.reconciler.mend() == 1
    assert await shop.reconciler.pulse() == 1
    (row,) = await shop.sql("SELECT epoch, home FROM sale")
    assert (row["epoch"], row["home"]) == (2, shop.link.run_id)
    await told_as_it_is(shop)
    (entry,) = await shop.sql("SELECT action, detail FROM journal")
    assert entry["action"] == "sale.rebuild"
    assert entry["detail"]["orders_live"] == 1


async def test_a_sale_that_cannot_be_mended_holds_up_no_other(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cluster a node's death takes all its sales at once; the first of them may be in trouble of its own."""
    tried: list[str] = []

    async def rebuild(_settings: Any, _link: Any, _scripts: Any, sale: str, **_: Any) -> Any:
        tried.append(sale)
        if sale == "sick":
            raise DidNotHappen("its node is away")
        return type("Report", (), {"seconds": 0.1})()

    monkeypatch.setattr("app.repair.reconcile.rebuild", rebuild)
    shop.reconciler._homeless = dict.fromkeys(("sick", "a", "b"), (0, time.monotonic() - 60, "promoted"))
    with pytest.raises(DidNotHappen):
        await shop.reconciler.mend()
    assert tried == ["sick", "a", "b"]
    assert list(shop.reconciler._homeless) == ["sick"]


async def test_while_another_workers_pulse_goes_on_nothing_is_rebuilt(shop: Shop) -> None:
    await shop.publish(3)
    shop.settings.rebuild_after_s = 20.0
    await lose_everything(shop)
    for pulse in range(1, 6):  # somebody's Redis is well: ours is the wrong one
        await shop.sql(f"UPDATE sale SET pulse = {pulse}")
        await shop.reconciler.pulse()
        assert await shop.reconciler.mend() == 0
        for sale, (
            seen,
            since,
            kind,
        ) in shop.reconciler._homeless.items():  # much time passes, again and again
            shop.reconciler._homeless[sale] = (seen, since - 15.0, kind)
    assert (await shop.sql("SELECT epoch FROM sale"))[0]["epoch"] == 1


async def test_a_rebuild_that_dies_leaves_the_sale_shut_and_the_next_one_begins_again(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(5)
    await shop.claim("ann", "bob")
    await shop.confirm()

    async def die(*_: Any) -> None:
        raise ConnectionResetError("died")

    for step in ("_begin", "_load", "_write", "_open"):
        with monkeypatch.context() as broken, pytest.raises(ConnectionResetError):
            broken.setattr(rebuilding, step, die)
            await anew(shop)
        shop.epoch = (await shop.sql("SELECT epoch FROM sale"))[0]["epoch"]
        shut = await shop.scripts.line_join(
            sale=SALE, epoch=shop.epoch, sku="A", skus=("A",), buyers=[(b"cid", 1, False, b"#" * 10)], backlog_max=9
        )  # fmt: skip
        assert isinstance(shut, Old | Gone), step
    await shop.reconciler.pulse()
    assert await shop.reconciler.mend() == 1
    await told_as_it_is(shop)
    await shop.conserved()


async def test_one_rebuilds_and_the_other_leaves_it_alone(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(3)
    going, go_on = asyncio.Event(), asyncio.Event()
    real = rebuilding._load

    async def slow(*given: Any) -> int:
        going.set()
        await go_on.wait()
        return await real(*given)

    monkeypatch.setattr(rebuilding, "_load", slow)
    first = asyncio.create_task(anew(shop))
    await going.wait()
    assert await rebuild(shop.settings, shop.link, shop.scripts, SALE, actor="b", reason="b") is None
    go_on.set()
    assert (await first).epoch == 2


async def test_a_postgres_that_knows_less_than_redis_is_not_believed(shop: Shop) -> None:
    await shop.publish(3)
    await shop.link.call("HSET", shop.keys.sale, "epoch", 7)
    with pytest.raises(NotNow, match="lost writes"):
        await anew(shop)
    assert await shop.link.call("HGET", shop.keys.sale, "home") == shop.link.run_id.encode()
    await shop.sql("UPDATE sale SET state = 'settled'")
    with pytest.raises(NotNow, match="nothing to rebuild"):
        await anew(shop)


async def test_releases_and_top_ups_of_the_epoch_before_are_counted_and_never_told(shop: Shop) -> None:
    await shop.publish(5)
    await shop.claim("ann", "bob")
    await shop.confirm()
    (ann, _) = await shop.orders()
    async with shop.engine.begin() as conn:
        await orders.cancel(conn, ann["order_no"], "operator")
    await shop.sql("UPDATE item SET total = total + 2")
    await shop.sql(
        "INSERT INTO outbox (kind, sale, epoch, payload) VALUES"
        ' (\'stock_add\', :sale, 1, CAST(\'{"sku": "A", "units": 2, "id": "t1"}\' AS jsonb))',
        sale=SALE,
    )
    report = await anew(shop)
    assert report.units_left == {"A": 6}
    assert report.outbox_dropped >= 2
    await shop.relay()
    assert await shop.left() == 6
    await told_as_it_is(shop)
    await shop.conserved()


async def test_an_order_that_ends_during_the_rebuild_gives_its_unit_back_once(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(2)
    await shop.claim("ann", "bob")
    await shop.confirm()
    (ann, bob) = await shop.orders()
    real = rebuilding._load

    async def late(*given: Any) -> int:
        async with shop.engine.begin() as conn:
            await orders.cancel(conn, ann["order_no"], "operator")
            await orders.pay(conn, bob["order_no"])
        await shop.relay()  # nobody is told: the sale has no hash
        return await real(*given)

    monkeypatch.setattr(rebuilding, "_load", late)
    await anew(shop)
    await shop.sql("UPDATE outbox SET leased_until = NULL")
    await shop.relay()
    assert await shop.left() == 1
    await told_as_it_is(shop)
    await shop.conserved()


async def test_late_money_of_the_epoch_before_is_refused_not_given_a_unit_twice(shop: Shop) -> None:
    ann = await cancelled(shop)
    await anew(shop)
    await late_money_is_refused(shop, ann["order_no"])
    await shop.claim("bob")
    await shop.confirm()
    await shop.conserved()


async def test_a_claim_that_is_being_written_when_the_epoch_changes_is_taken_along(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(3)
    await shop.claim("ann")
    entries = await shop.read()
    await lose_everything(shop)  # only this worker knows of the claim
    counted, go_on = asyncio.Event(), asyncio.Event()
    real = confirming.reserve

    async def slow(*given: Any) -> bool:
        done = await real(*given)
        counted.set()
        await go_on.wait()  # the item is locked, nothing is committed
        return done

    monkeypatch.setattr(confirming, "reserve", slow)
    writing = asyncio.create_task(shop.confirmer.confirm(SALE, entries))
    await counted.wait()
    building = asyncio.create_task(anew(shop))

    async def blocked() -> bool:
        waits = (
            "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'rebuild'"
        )
        return bool(await shop.sql(waits))

    await until(blocked, "the rebuild waits for the item")
    go_on.set()
    report = await building
    await asyncio.gather(writing, return_exceptions=True)
    assert (report.orders_live, report.units_left) == (1, {"A": 2})
    await told_as_it_is(shop)
    await shop.conserved()


async def test_a_claim_whose_units_were_not_counted_yet_is_refused_and_costs_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(3)
    await shop.claim("ann")
    entries = await shop.read()
    await lose_everything(shop)
    written, go_on = asyncio.Event(), asyncio.Event()
    real = confirming.reserve

    async def late(*given: Any) -> bool:
        written.set()
        await go_on.wait()
        return await real(*given)

    monkeypatch.setattr(confirming, "reserve", late)
    writing = asyncio.create_task(shop.confirmer.confirm(SALE, entries))
    await written.wait()
    report = await anew(shop)
    go_on.set()
    assert await writing == 1
    assert (report.orders_live, report.units_left) == (0, {"A": 3})
    assert await shop.orders() == []
    (refused,) = await shop.sql("SELECT reason, returned FROM refused_claim")
    assert (refused["reason"], refused["returned"]) == ("old_epoch", False)
    await shop.conserved()


async def test_claims_written_while_the_epoch_changes_are_all_told_or_all_refused(shop: Shop) -> None:
    await shop.publish(100)
    for round_ in range(3):
        names = [f"b{round_}-{number}" for number in range(20)]
        for at in range(0, len(names), 4):
            await shop.claim(*names[at : at + 4])
        batches = [[entry] for entry in await shop.read()]
        await asyncio.gather(
            anew(shop), *(shop.confirmer.confirm(SALE, batch, careful=True) for batch in batches)
        )
        await told_as_it_is(shop)
        await shop.conserved()
    counted = await shop.item()
    assert counted["reserved"] == len(await shop.orders()) == 60


STEPS = ("join", "join", "join", "confirm", "end", "relay", "keep", "lose", "roll back", "rebuild")


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_units_are_counted_once(shop: Shop, seed: int) -> None:
    chance = random.Random(seed)
    await shop.publish({"A": 12, "B": 5})
    buyers, older = iter(range(1_000)), await keep(shop)
    for _ in range(30):
        sku = chance.choice(("A", "B"))
        match chance.choice(
            ("join", "join", "join", "confirm", "end", "relay", "keep", "lose", "roll back", "rebuild")
        ):
            case "join":
                await shop.join(*(f"b{next(buyers)}" for _ in range(chance.randint(1, 4))), sku=sku)
            case "confirm":
                await shop.confirm()
            case "end":
                live = [row for row in await shop.orders() if row["state"] == "reserved"]
                if live:
                    row = chance.choice(live)
                    async with shop.engine.begin() as conn:
                        if chance.random() < 0.5:
                            await orders.cancel(conn, row["order_no"], "operator")
                        else:
                            await orders.pay(conn, row["order_no"])
            case "relay":
                await shop.relay()
            case "keep":
                older = await keep(shop)
            case "lose":
                await lose_everything(shop)
                await anew(shop)
            case "roll back":
                epoch = shop.epoch
                await bring_back(shop, older)
                await anew(shop)
                assert shop.epoch == epoch + 1
            case "rebuild":
                await anew(shop)
        for counted in await shop.sql("SELECT * FROM item"):
            assert counted["reserved"] + counted["sold"] <= counted["total"]
    await anew(shop)
    await told_as_it_is(shop)
    await shop.conserved()
    live = [row["buyer_id"] for row in await shop.orders() if row["state"] in ("reserved", "paid")]
    assert len(live) == len(set(live))
    given = max((row["seq"] for row in await shop.orders() if row["sku"] == "A"), default=0)
    (fresh,) = await shop.join("late", sku="A")
    assert not isinstance(fresh, Claimed | Waits) or fresh.seq > given


def test_a_seq_of_before_a_rebuild_is_no_rank() -> None:
    """The draw went with Redis; a winner was told the number of the ticket as the place in line."""
    item = ItemView("x", "A", 0)
    item.take([b"8", b"7", b"0", b"c", b"1", b"0", b"", b"", b"0", b"0", b"2:8"], 0)
    assert [item.rank_of(seq) for seq in (1, 7, 8, 9)] == [None, None, 8, 9]


def test_a_ticket_goes_on_only_if_its_own_epoch_gave_out_its_seq() -> None:
    item = ItemView("x", "A", 0)
    assert not item.goes_on(1, 1)  # no rebuild: nothing of another epoch
    item.starts = [(2, 100), (3, 100), (4, 250)]  # nothing was ordered in epoch 2
    cases = {
        (1, 99): True, (1, 100): False, (1, 150): False,  # 150 was given in epoch 1, lost, and given again in epoch 3
        (2, 99): True, (2, 150): False, (3, 150): True, (3, 99): True, (3, 249): True, (3, 250): False,
    }  # fmt: skip
    assert {case: item.goes_on(*case) for case in cases} == cases


async def test_the_command_reports_what_it_did_and_why_it_did_not(
    shop: Shop, redis_url: str, database_url: str
) -> None:
    await shop.publish(3)
    await shop.claim("ann")
    environment = os.environ | {
        "FAIRDROP_ENV": "development", "FAIRDROP_REDIS_URL": redis_url, "FAIRDROP_DATABASE_URL": database_url,
        "FAIRDROP_PII_KEYS": "p" * 43,
    }  # fmt: skip

    async def command(sale: str) -> tuple[int, Any]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app.cli", "rebuild", sale, "--json", env=environment, stdout=PIPE, stderr=PIPE
        )  # fmt: skip
        out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, json.loads(out)

    status, told = await command(SALE)
    assert (status, told["rebuilt"], told["epoch"], told["orders_live"]) == (0, True, 2, 1)
    status, told = await command("nope")
    assert (status, told["rebuilt"]) == (1, False)
    assert told["why"].startswith("nope is no sale")


async def test_late_money_that_took_its_unit_again_just_before_the_rebuild_goes_back(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await cancelled(shop)
    await shop.relay()
    real = shop.scripts.units_retake

    async def taken(**given: Any) -> Any:
        answer = await real(**given)
        await anew(shop)  # counts the unit as free: Postgres does not know yet that it is ann's again
        return answer

    monkeypatch.setattr(shop.scripts, "units_retake", taken)
    await late_money_is_refused(shop, ann["order_no"])
    await shop.claim("bob")
    await shop.confirm()
    await shop.relay()
    await shop.conserved()
