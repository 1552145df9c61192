"""Claims become orders exactly once, whatever dies, repeats, lies or stalls in between."""

from __future__ import annotations

import asyncio
import re
from base64 import b32hexencode
from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import DidNotHappen, Unknown
from app.keys import GROUP
from app.ledger import confirming, orders
from app.ledger.events import event_id
from app.purchase import confirm as confirm_module
from app.purchase.confirm import Entry, claims_of, cut, parse
from tests.ledger.shop import SALE, Shop, open_shop


class Died(Exception):
    """The worker was killed here."""


# The order number


def test_an_order_number_is_24_signs_and_the_same_for_the_same_claim() -> None:
    number = orders.order_no("s", 1, "A", 7, "ann")
    assert re.fullmatch(r"[0-9A-Z]{20,26}", number)
    assert number == orders.order_no("s", 1, "A", 7, "ann")
    assert number == "0JU9VHDQFCFLHULO0BU8C1RC"  # what is in databases: another release makes the same
    others = [
        ("t", 1, "A", 7, "ann"),
        ("s", 2, "A", 7, "ann"),
        ("s", 1, "B", 7, "ann"),
        ("s", 1, "A", 8, "ann"),
    ]
    assert (
        len({number, *(orders.order_no(*other) for other in others), orders.order_no("s", 1, "A", 7, "bob")})
        == 6
    )


def test_an_entry_is_read_as_it_was_written_whatever_the_buyer_is_called() -> None:
    (claim,), bad = parse("s", [(b"5-1", [b"c", b"1|2|A|1700000000000", b"7:3", "a|b|ü".encode()])])
    assert bad == []
    assert (claim.name, claim.claimed_ms) == ("5-1.1", 1_700_000_000_000)
    assert (claim.epoch, claim.sku, claim.seq, claim.units, claim.buyer_id) == (2, "A", 7, 3, "a|b|ü")


SHARED = b"1|2|A|1700000000000"


@pytest.mark.parametrize(
    ("ticket", "buyer"), [(b"", b"ann"), (b"7", b"ann"), (b"7:", b"ann"), (b"0:3", b"ann"), (b"-7:3", b"ann"),
                          (b"x:3", b"ann"), (b"7:0", b"ann"), (b"7:1", b""), (b"99999999999999999:1", b"ann")],
)  # fmt: skip
def test_what_is_no_claim_is_said_to_be_none_and_the_others_of_its_entry_stand(
    ticket: bytes, buyer: bytes
) -> None:
    claims, (bad,) = parse("s", [(b"5-1", [b"c", SHARED, b"7:3", b"ann", ticket, buyer, b"8:1", b"bob"])])
    assert (bad.entry_id, bad.name, bad.reason) == (b"5-1", "5-1.2", "range")
    assert ticket in bad.raw
    assert [claim.name for claim in claims] == ["5-1.1", "5-1.3"]
    assert [claim.order_no for claim in claims] == [
        orders.order_no("s", 2, "A", 7, "ann"), orders.order_no("s", 2, "A", 8, "bob")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fields", [[], [b"c"], [b"c", SHARED], [b"a", SHARED, b"7:3", b"ann"], [b"c", b"2|2|A|17", b"7:3", b"ann"],
               [b"c", b"1|2|A", b"7:3", b"ann"], [b"c", b"1|x|A|17", b"7:3", b"ann"],
               [b"c", b"1|2|\xff|17", b"7:3", b"ann"], [b"c", b"1|2|A|17|9", b"7:3", b"ann"], [b"c", SHARED, b"7:3"]],
)  # fmt: skip
def test_an_entry_with_other_fields_is_no_claim(fields: list[bytes]) -> None:
    good = [b"c", SHARED, b"7:3", b"ann"]
    claims, bad = parse("s", [(b"5-0", good), (b"5-1", fields), (b"5-2", good)])
    assert [(one.entry_id, one.name) for one in bad] == [(b"5-1", "5-1")]
    assert [claim.entry_id for claim in claims] == [b"5-0", b"5-2"]


def test_a_batch_is_cut_between_entries_never_inside_one() -> None:
    def entry(at: int, claims: int) -> Entry:
        return b"%d-0" % at, [b"c", SHARED, *[b"7:1", b"ann"] * claims]

    sizes = [3, 4, 4, 1, 12, 1, 9]
    entries = [entry(at, size) for at, size in enumerate(sizes)]
    batches = list(cut(entries, 10))
    assert [[claims_of([one]) for one in batch] for batch in batches] == [[3, 4], [4, 1], [12], [1, 9]]
    assert [one for batch in batches for one in batch] == entries
    assert list(cut([], 10)) == []


@settings(deadline=None)  # the first example pays for what hypothesis makes once
@given(
    claims=st.lists(
        st.tuples(st.integers(1, 9), st.text("AB.", min_size=1), st.integers(1, 2**53), st.binary())
    )
)
def test_order_numbers_are_base32hex_of_a_hash_whatever_is_numbered_together(
    claims: list[tuple[int, str, int, bytes]],
) -> None:
    def plainly(epoch: int, sku: str, seq: int, buyer: bytes) -> str:
        named = f"drop\0{epoch}\0{sku}\0{seq}\0".encode() + buyer
        return b32hexencode(blake2b(named, digest_size=15).digest()).decode()

    assert orders.order_nos("drop", claims) == [plainly(*claim) for claim in claims]


# The usual case


async def test_a_batch_of_claims_becomes_orders_and_every_buyer_is_told(shop: Shop) -> None:
    await shop.publish({"A": 5, "B": 5}, limit_per_buyer=3)
    seqs = await shop.claim(("ann", 2), "bob", sku="A")
    other = await shop.claim("cid", sku="B")
    await shop.link.call("HSET", shop.keys.contact, "ann", b"sealed")
    assert await shop.confirm() == 3
    rows = {row["buyer_id"]: row for row in await shop.orders()}
    assert rows["ann"]["units"] == 2
    assert rows["ann"]["amount_minor"] == 2000
    assert bytes(rows["ann"]["contact"]) == b"sealed"
    assert rows["bob"]["contact"] is None
    assert all(row["state"] == "reserved" and row["pay_by"] is None for row in rows.values())
    assert (await shop.item("A"))["reserved"] == 3
    assert (await shop.item("B"))["reserved"] == 1
    for seq, sku, buyer in ((seqs[0], "A", "ann"), (seqs[1], "A", "bob"), (other[0], "B", "cid")):
        version, byte, told = await shop.told(seq, sku) or (0, b"", {})
        assert (version, byte, await shop.byte(seq, sku)) == (1, b"r", b"r")
        assert told["order"]["order_no"] == rows[buyer]["order_no"]
        assert told["order"]["amount_minor"] == sum(line["amount_minor"] for line in told["order"]["lines"])
    assert await shop.backlog() == 0
    assert await shop.pending() == 0
    assert await shop.link.call("EXISTS", shop.keys.contact) == 0
    async with shop.engine.connect() as conn:
        lines = await orders.lines(conn, [row["order_no"] for row in rows.values()])
    assert {no: sum(line["amount_minor"] for line in of) for no, of in lines.items()} == {
        row["order_no"]: row["amount_minor"] for row in rows.values()
    }
    events = await shop.events()
    assert [event["position"] for event in events] == [1, 2, 3]
    assert {event["order_no"] for event in events} == {row["order_no"] for row in rows.values()}
    assert {(event["type"], event["version"]) for event in events} == {("order.reserved", 1)}
    for event in events:
        row = next(row for row in rows.values() if row["order_no"] == event["order_no"])
        assert event["data"] == orders.event_data(row)
        assert event["id"] == event_id(row["order_no"], 1, "order.reserved")
    sms = await shop.sql("SELECT order_no, template, state FROM sms")
    assert [(row["order_no"], row["template"], row["state"]) for row in sms] == [
        (rows["ann"]["order_no"], "reserved", "due")
    ]
    await shop.conserved()


async def test_what_is_told_at_once_is_what_the_row_says_later(shop: Shop) -> None:
    """Confirm makes the status of a new row without reading it back; a redelivery reads it."""
    await shop.publish(default_channel="alipay")
    (seq,) = await shop.claim("ann")
    entries = await shop.read()
    await shop.confirmer.confirm(SALE, entries)
    first = await shop.told(seq)
    await shop.link.call("HDEL", shop.keys.status, f"A:{seq}")
    await shop.confirmer.confirm(SALE, entries, careful=True)
    assert await shop.told(seq) == first
    assert first is not None
    assert first[2]["payment"]["state"] == "starting"
    attempts = await shop.sql("SELECT id, state, channel, provider, amount_minor FROM payment_attempt")
    assert len(attempts) == 1
    assert (attempts[0]["state"], attempts[0]["channel"], attempts[0]["amount_minor"]) == (
        "created",
        "alipay",
        1000,
    )


async def test_every_order_of_a_batch_gets_the_supplier_of_its_own_route(shop: Shop) -> None:
    await shop.publish(5, default_channel="card")
    await shop.claim("ann", "bob", "cat")
    shop.confirmer.supplier = lambda channel, order_no: f"{channel}-{order_no[:4]}"
    await shop.confirmer.confirm(SALE, await shop.read())
    rows = await shop.sql("SELECT order_no, provider FROM payment_attempt")
    assert len(rows) == 3
    assert all(row["provider"] == f"card-{row['order_no'][:4]}" for row in rows)


async def test_a_buyer_who_comes_back_keeps_the_contact_of_the_first_order(shop: Shop) -> None:
    await shop.publish()
    await shop.link.call("HSET", shop.keys.contact, "ann", b"sealed")
    await shop.claim("ann")
    await shop.confirm()
    (row,) = await shop.orders()
    async with shop.engine.begin() as conn:
        assert await orders.cancel(conn, row["order_no"], "left") is not None
    await shop.relay()
    await shop.claim("ann", again=True)
    await shop.confirm()
    assert [bytes(row["contact"]) for row in await shop.orders()] == [b"sealed", b"sealed"]


# Crashes


async def _die(*_: Any, **__: Any) -> Any:
    raise Died


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("before the transaction", (confirming, "terms")),
        ("inside the transaction", (confirming, "reserve")),
        ("after COMMIT, before the contact leaves Redis", (confirm_module.Confirmer, "_forget")),
        ("before the status", (confirm_module.Confirmer, "_tell")),
        ("after some status, before the others", (confirm_module.Confirmer, "mark")),
        ("after the status, before XACK", (confirm_module.Confirmer, "_acknowledge")),
    ],
)
async def test_a_worker_that_dies_leaves_its_claims_to_the_next_one(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, what: str, where: tuple[Any, str]
) -> None:
    await shop.publish(10)
    await shop.link.call("HSET", shop.keys.contact, "ann", b"sealed")
    seqs = await shop.claim("ann", "bob", "cid")
    entries = await shop.read()
    ann = entries[0][1][2:4]
    await shop.add_entry(*ann)  # not the plain case: told and acknowledged in steps of their own
    entries += await shop.read()
    with monkeypatch.context() as crash:
        crash.setattr(*where, _die)
        if where[0] is confirming:
            # A killed process runs no other path either.
            crash.setattr(confirm_module.Confirmer, "_arbitrate_or_split", _die)
        with pytest.raises(Died):
            await shop.confirmer.confirm(SALE, entries)
    pending = await shop.pending()
    assert pending == (2 if where[1] not in ("mark", "_acknowledge") else 1)
    taken_over = await shop.take_over()
    assert [entry[0] for entry in taken_over] == [entry[0] for entry in entries[-pending:]]
    assert await shop.backlog() == claims_of(taken_over)
    assert await shop.confirmer.confirm(SALE, taken_over, careful=True) == (4 if pending == 2 else 1)
    assert len(await shop.orders()) == 3
    assert (await shop.item())["reserved"] == 3
    assert [await shop.byte(seq) for seq in seqs] == [b"r"] * 3
    assert [bytes(row["contact"]) for row in await shop.orders() if row["buyer_id"] == "ann"] == [b"sealed"]
    assert len(await shop.events()) == 3
    assert await shop.link.call("EXISTS", shop.keys.contact) == 0
    assert await shop.backlog() == 0
    await shop.conserved()


async def test_an_entry_is_never_given_up_before_its_ticket_was_told(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of the step that tells and acknowledges is lost: both happened, or neither did."""
    await shop.publish(10)
    seqs = await shop.claim("ann", "bob")
    entries = await shop.read()
    real = shop.scripts.claims_mark

    async def unheard(**given: Any) -> Any:
        await real(**given)
        raise Unknown("no answer")

    with monkeypatch.context() as crash:
        crash.setattr(shop.confirmer.scripts, "claims_mark", unheard)
        with pytest.raises(Unknown):
            await shop.confirmer.confirm(SALE, entries)
    assert [await shop.byte(seq) for seq in seqs] == [b"r"] * 2
    assert await shop.backlog() == 0
    assert await shop.confirmer.confirm(SALE, entries, careful=True) == 2  # the worker still holds them
    assert len(await shop.orders()) == 2
    await shop.conserved()


@pytest.mark.parametrize("committed", [True, False])
async def test_an_answer_to_commit_that_is_lost_is_never_assumed(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    """The connection dies in COMMIT: whether it was done is asked by order_no."""
    await shop.publish(10)
    await shop.claim("ann", "bob")
    entries = await shop.read()
    real = confirming.reserve

    async def cut(conn: AsyncConnection, *rest: Any) -> bool:
        done = await real(conn, *rest)
        raw: Any = (await conn.get_raw_connection()).driver_connection
        if committed:
            await raw.execute("COMMIT")
        raw.terminate()
        return done

    with monkeypatch.context() as crash:
        crash.setattr(confirming, "reserve", cut)
        with pytest.raises(Exception, match=r"(?i)connection|closed|released|terminat") as lost:
            await shop.confirmer.confirm(SALE, entries)
        assert confirm_module.passes(lost.value), repr(lost.value)
    assert len(await shop.orders()) == (2 if committed else 0)
    assert await shop.confirmer.confirm(SALE, entries, careful=True) == 2
    assert len(await shop.orders()) == 2
    assert (await shop.item())["reserved"] == 2
    assert await shop.backlog() == 0


async def test_a_worker_that_stalls_while_another_finishes_its_batch_changes_nothing(shop: Shop) -> None:
    await shop.publish(10)
    (seq, _) = await shop.claim("ann", "bob")
    stalled = await shop.read(consumer="one")
    await shop.confirmer.confirm(SALE, await shop.take_over("two"), careful=True)
    (row, _) = await shop.orders()
    async with shop.engine.begin() as conn:
        await orders.pay(conn, row["order_no"])
    await shop.relay()
    await shop.confirmer.confirm(SALE, stalled)  # as if it had never heard of the other
    assert len(await shop.orders()) == 2
    assert (await shop.told(seq) or (0, b""))[:2] == (2, b"p")
    assert await shop.byte(seq) == b"p"
    await shop.conserved()


async def test_two_workers_with_the_same_claims_at_the_same_time_write_each_once(shop: Shop) -> None:
    await shop.publish(200)
    await shop.claim(*[f"b{n}" for n in range(100)])
    entries = await shop.read()
    async with open_shop(shop.settings.redis_url, shop.settings.database_url) as twin:
        twin.skus = shop.skus
        done = await asyncio.gather(
            *(one.confirmer.confirm(SALE, list(entries)) for one in (shop, twin) for _ in range(3))
        )
    assert all(count == 100 for count in done)
    assert len(await shop.orders()) == 100
    assert (await shop.item())["reserved"] == 100
    assert len(await shop.events()) == 100
    await shop.conserved()


async def test_ten_copies_of_a_claim_are_one_order(shop: Shop) -> None:
    await shop.publish(10)
    await shop.claim("ann")
    (entry,) = await shop.read()
    for _ in range(9):
        await shop.copy_entry(entry[1])
    copies = [entry, *await shop.read()]
    assert await shop.confirmer.confirm(SALE, copies[:4]) == 4
    assert await shop.confirmer.confirm(SALE, copies) == 10
    assert len(await shop.orders()) == 1
    assert (await shop.item())["reserved"] == 1
    assert await shop.backlog() == 0


async def test_a_batch_with_old_and_new_claims_writes_the_new_ones(shop: Shop) -> None:
    await shop.publish(10)
    await shop.claim("ann", "bob")
    first = await shop.read()
    await shop.confirmer.confirm(SALE, first)
    await shop.claim("cid")
    await shop.confirmer.confirm(SALE, [*first, *await shop.read()])
    assert [row["buyer_id"] for row in await shop.orders()] == ["ann", "bob", "cid"]
    assert (await shop.item())["reserved"] == 3


# Refusals


async def test_a_claim_of_a_buyer_with_a_live_order_is_refused_and_its_units_go_back(shop: Shop) -> None:
    await shop.publish(5)
    await shop.claim("ann")
    await shop.confirm()
    (first,) = await shop.orders()
    await shop.link.call("HDEL", shop.keys.buyers, "ann")  # Redis forgets, and lets the buyer in again
    seq, other = await shop.claim("ann", "bob")
    await shop.confirm()
    assert [row["buyer_id"] for row in await shop.orders()] == ["ann", "bob"]
    (refused,) = await shop.sql("SELECT * FROM refused_claim")
    assert (refused["reason"], refused["returned"], refused["seq"]) == ("live_order", True, seq)
    assert await shop.left() == 2
    await shop.relay()
    await shop.relay()
    assert await shop.left() == 3
    assert await shop.byte(seq) == b"k"
    assert await shop.byte(other) == b"r"
    told = await shop.told(seq)
    assert told is not None
    assert told[2]["live_order"] == first["order_no"]
    await shop.conserved()


async def test_two_claims_of_one_buyer_in_one_batch_leave_the_first(shop: Shop) -> None:
    await shop.publish(5)
    (first,) = await shop.claim("ann")
    await shop.link.call("HDEL", shop.keys.buyers, "ann")
    (second,) = await shop.claim("ann")
    await shop.confirm()
    await shop.relay()
    assert [row["seq"] for row in await shop.orders()] == [first]
    assert await shop.byte(second) == b"k"
    assert await shop.left() == 4
    await shop.conserved()


async def test_a_redelivered_refusal_gives_nothing_back_again(shop: Shop) -> None:
    await shop.publish(5)
    await shop.claim("ann")
    await shop.confirm()
    await shop.link.call("HDEL", shop.keys.buyers, "ann")
    await shop.claim("ann")
    entries = await shop.read()
    for _ in range(3):
        await shop.confirmer.confirm(SALE, entries, careful=True)
        await shop.relay()
    assert await shop.left() == 4
    assert len(await shop.sql("SELECT 1 FROM outbox WHERE kind = 'release'")) == 1


async def test_if_redis_lies_about_stock_the_first_in_line_keep_it_and_nothing_is_oversold(
    shop: Shop,
) -> None:
    await shop.publish(3)
    await shop.link.call("HSET", shop.keys.stock, "A", 10)
    seqs = await shop.claim(*[f"b{n}" for n in range(6)])
    await shop.confirm()
    item = await shop.item()
    assert (item["reserved"], item["total"]) == (3, 3)
    assert item["paused_at"] is not None
    assert [row["seq"] for row in await shop.orders()] == seqs[:3]
    assert [await shop.byte(seq) for seq in seqs] == [b"r", b"r", b"r", b"k", b"k", b"k"]
    refused = await shop.sql("SELECT reason, returned FROM refused_claim")
    assert [(row["reason"], row["returned"]) for row in refused] == [("no_stock", False)] * 3
    left = await shop.left()
    await shop.relay()
    assert await shop.left() == left  # not given back: there was nothing
    assert await shop.link.call("HGET", shop.keys.item("A"), "paused") == b"1"
    assert [type(answer).__name__ for answer in await shop.join("late")] == [
        "Waits"
    ]  # nobody is admitted any more


async def test_lack_of_stock_keeps_the_lowest_ranks_that_fit(shop: Shop) -> None:
    await shop.publish(4, limit_per_buyer=3)
    await shop.link.call("HSET", shop.keys.stock, "A", 20)
    seqs = await shop.claim(("a", 3), ("b", 3), ("c", 1), ("d", 1))
    await shop.confirm()
    assert [row["seq"] for row in await shop.orders()] == [seqs[0], seqs[2]]
    assert (await shop.item())["reserved"] == 4


async def test_a_claim_of_an_epoch_that_is_over_is_refused_and_leaves_the_stream(shop: Shop) -> None:
    await shop.publish(5)
    await shop.claim("ann")
    entries = await shop.read()
    await shop.sql("UPDATE item SET epoch = 2")
    await shop.sql("UPDATE sale SET epoch = 2")
    assert await shop.confirmer.confirm(SALE, entries) == 1
    assert await shop.orders() == []
    (refused,) = await shop.sql("SELECT reason, returned FROM refused_claim")
    assert (refused["reason"], refused["returned"]) == ("old_epoch", False)
    assert await shop.sql("SELECT 1 FROM outbox") == []
    assert await shop.backlog() == 0


async def test_an_epoch_that_changes_inside_the_transaction_is_seen(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(5)
    await shop.claim("ann")
    real = confirming.copy_orders

    async def rebuilt(conn: AsyncConnection, new: Any) -> None:
        await real(conn, new)
        await shop.sql("UPDATE item SET epoch = 2")
        await shop.sql("UPDATE sale SET epoch = 2")

    monkeypatch.setattr(confirming, "copy_orders", rebuilt)
    await shop.confirm()
    assert await shop.orders() == []
    assert (await shop.item())["reserved"] == 0


# Poison


@pytest.mark.parametrize("buyer", [b"nul\0byte", b"\xff\xfe", b"x" * 100 + b"\0"])
async def test_a_poison_claim_is_bisected_out_and_its_units_go_back(shop: Shop, buyer: bytes) -> None:
    await shop.publish(20)
    good = await shop.claim(*[f"b{n}" for n in range(7)])
    answer: Any = await shop.scripts.line_join(
        sale=SALE, epoch=1, sku="A", skus=("A",), buyers=[(buyer, 1, False, b"#" * 10)], backlog_max=1000
    )
    bad = answer.answers[0].seq
    more = await shop.claim(*[f"c{n}" for n in range(6)])
    assert await shop.left() == 6
    assert await shop.confirm() == 14
    assert [row["seq"] for row in await shop.orders()] == [*good, *more]
    (letter,) = await shop.sql("SELECT * FROM dead_letter")
    assert letter["stream"] == "orders"
    (refused,) = await shop.sql("SELECT * FROM refused_claim")
    assert (refused["reason"], refused["seq"], refused["returned"]) == ("poison", bad, True)
    await shop.relay()
    assert await shop.byte(bad) == b"k"
    assert await shop.left() == 7
    assert await shop.backlog() == 0
    await shop.conserved()


async def test_a_poisonous_claim_in_the_middle_of_an_entry_leaves_the_others_their_orders(shop: Shop) -> None:
    """No statement can hold the third, and the fifth is none: exactly these are buried, by their place."""
    await shop.publish(20)
    await shop.claim("first")
    await shop.add_entry(
        b"2:1",
        b"ann",
        b"3:1",
        b"bob",
        b"4:1",
        b"nul\0byte",
        b"5:1",
        b"cid",
        b"no ticket",
        b"eve",
        b"6:1",
        b"dan",
    )
    (first, entry) = await shop.read()
    assert await shop.confirmer.confirm(SALE, [first, entry]) == 7
    assert [row["buyer_id"] for row in await shop.orders()] == ["first", "ann", "bob", "cid", "dan"]
    letters = await shop.sql("SELECT entry_id, reason FROM dead_letter ORDER BY entry_id")
    name = entry[0].decode()
    assert [letter["entry_id"] for letter in letters] == [f"{name}.3", f"{name}.5"]
    assert letters[1]["reason"] == "range"
    (refused,) = await shop.sql("SELECT seq, reason FROM refused_claim")
    assert (refused["seq"], refused["reason"]) == (4, "poison")
    assert await shop.backlog() == 0
    assert (
        await shop.confirmer.confirm(SALE, [first, entry], careful=True) == 7
    )  # the same again: nothing new
    assert len(await shop.orders()) == 5
    assert len(await shop.sql("SELECT 1 FROM dead_letter")) == 2


async def test_an_entry_half_told_when_its_worker_dies_stays_until_it_is_told_whole(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units differ, so the entry is told in two calls: after the first nothing of it may be given up."""
    await shop.publish(10, limit_per_buyer=2)
    seqs = await shop.claim("ann", ("bob", 2), "cid", ("dan", 2))
    entries = await shop.read()
    real, calls, told = shop.scripts.claims_mark, 0, asyncio.Event()

    async def dies(**given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            await told.wait()
            raise Died
        answer = await real(**given)
        told.set()
        return answer

    with monkeypatch.context() as crash:
        crash.setattr(shop.confirmer.scripts, "claims_mark", dies)
        with pytest.raises(Died):
            await shop.confirmer.confirm(SALE, entries)
    assert sorted([await shop.byte(seq) for seq in seqs]) == [b"c", b"c", b"r", b"r"]
    assert await shop.backlog() == 4
    taken_over = await shop.take_over()
    assert [entry[0] for entry in taken_over] == [entry[0] for entry in entries]
    assert await shop.confirmer.confirm(SALE, taken_over, careful=True) == 4
    assert [await shop.byte(seq) for seq in seqs] == [b"r"] * 4
    assert [row["units"] for row in await shop.orders()] == [1, 2, 1, 2]
    assert await shop.backlog() == await shop.pending() == 0
    await shop.conserved()


async def test_an_entry_of_which_some_claims_are_written_is_finished(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker died between the halves of a batch that it had to split around a poisonous claim."""
    await shop.publish(20)
    await shop.add_entry(
        *[part for seq in range(1, 9) for part in (b"%d:1" % seq, b"b%d" % seq)], b"9:1", b"\xff"
    )
    await shop.link.call("SETRANGE", shop.keys.outcome("A"), 0, "c" * 9)
    entries = await shop.read()
    real = shop.confirmer._arbitrate
    written = 0

    async def dies(conn: AsyncConnection, sale: str, claims: Any, *rest: Any, **how: Any) -> Any:
        nonlocal written
        if written:
            raise ConnectionError("the worker is gone")
        told = await real(conn, sale, claims, *rest, **how)
        written = len(claims)
        return told

    with monkeypatch.context() as crash:
        crash.setattr(shop.confirmer, "_arbitrate", dies)
        with pytest.raises(ConnectionError):
            await shop.confirmer.confirm(SALE, entries)
    assert 0 < written < 9
    assert len(await shop.orders()) == written
    assert await shop.backlog() == 9
    assert await shop.confirmer.confirm(SALE, await shop.take_over(), careful=True) == 9
    assert [row["buyer_id"] for row in await shop.orders()] == [f"b{n}" for n in range(1, 9)]
    assert [await shop.byte(seq) for seq in range(1, 9)] == [b"r"] * 8
    (letter,) = await shop.sql("SELECT entry_id FROM dead_letter")
    assert letter["entry_id"] == f"{entries[0][0].decode()}.9"
    assert await shop.backlog() == await shop.pending() == 0


async def test_an_entry_that_is_no_claim_is_buried_and_the_others_go_on(shop: Shop) -> None:
    await shop.publish(5)
    await shop.claim("ann")
    await shop.add_entry(b"7:1", b"eve", shared=b"nonsense")
    await shop.claim("bob")
    assert await shop.confirm() == 3
    assert len(await shop.orders()) == 2
    (letter,) = await shop.sql("SELECT reason, entry FROM dead_letter")
    assert "nonsense" in letter["entry"]["raw"]
    assert await shop.backlog() == 0


async def test_a_claim_for_an_item_that_does_not_exist_is_buried(shop: Shop) -> None:
    await shop.publish(5)
    await shop.claim("ann")
    await shop.add_entry(b"1:1", b"eve", shared=b"1|1|NOPE|1700000000000")
    await shop.confirm()
    assert [row["buyer_id"] for row in await shop.orders()] == ["ann"]
    assert len(await shop.sql("SELECT 1 FROM dead_letter")) == 1
    assert await shop.backlog() == 0
    due = await shop.sql("SELECT payload FROM outbox WHERE state = 'due'")
    assert due == [], "Redis does not have the item: a release of it would be tried for ever"


async def test_a_claim_with_a_row_is_never_buried(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was written, and now something about it cannot be processed: the order stands."""
    await shop.publish(5)
    await shop.claim("ann")
    entries = await shop.read()
    await shop.confirmer.confirm(SALE, entries)

    async def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(confirm_module.Confirmer, "_arbitrate", broken)
    await shop.confirmer.confirm(SALE, entries, careful=True)
    assert await shop.sql("SELECT 1 FROM dead_letter") == []
    assert [row["state"] for row in await shop.orders()] == ["reserved"]


async def test_two_buyers_with_one_ticket_number_touch_neither_stock_nor_the_others_ticket(
    shop: Shop,
) -> None:
    await shop.publish(5)
    (seq,) = await shop.claim("ann")
    await shop.confirm()
    await shop.add_entry(b"%d:1" % seq, b"eve")
    await shop.confirm()
    await shop.relay()
    assert [row["buyer_id"] for row in await shop.orders()] == ["ann"]
    assert await shop.byte(seq) == b"r"
    assert await shop.left() == 4
    (refused,) = await shop.sql("SELECT reason, returned FROM refused_claim")
    assert (refused["reason"], refused["returned"]) == ("ticket_taken", False)


# Redis away


async def test_a_redis_that_is_not_armed_keeps_the_claims_until_it_is(shop: Shop) -> None:
    await shop.publish(5)
    (seq,) = await shop.claim("ann")
    entries = await shop.read()
    await shop.link.call("HSET", shop.keys.sale, "home", "0" * 40)
    assert await shop.confirmer.confirm(SALE, entries) == 0
    assert len(await shop.orders()) == 1
    assert await shop.pending() == 1
    await shop.link.call("HSET", shop.keys.sale, "home", shop.link.run_id)
    assert await shop.confirmer.confirm(SALE, entries, careful=True) == 1
    assert await shop.byte(seq) == b"r"
    assert await shop.backlog() == 0


async def test_a_lost_redis_raises_and_the_claims_wait(shop: Shop) -> None:
    await shop.publish(5)
    await shop.claim("ann")
    entries = await shop.read()
    await shop.link.close()
    with pytest.raises(DidNotHappen):
        await shop.confirmer.confirm(SALE, entries)
    await shop.link.start()
    assert await shop.confirmer.confirm(SALE, entries, careful=True) == 1
    assert await shop.link.call("XPENDING", shop.keys.orders, GROUP) == [0, None, None, None]
