"""The audit sees what is wrong: each invariant is broken by hand in the stores, and exactly its check says so."""

from __future__ import annotations

from typing import Any

import pytest

from app.repair import audit
from app.settings import Settings
from tests.office.conftest import Office, open_office, settings_for, write_order

PREFIX = "{sale:drop}:"


@pytest.fixture
def settings(redis_url: str, database_url: str) -> Settings:
    return settings_for(redis_url, database_url)


@pytest.fixture
async def office(settings: Settings) -> Any:
    running = await open_office(settings)
    try:
        await running.open_sale()
        yield running
    finally:
        await running.close()


async def fill(office: Office) -> list[str]:
    """Two reserved orders, two paid ones, one claim on its way, five units left."""
    numbers = [
        await write_order(office, seq=n, buyer=f"b{n}", state="paid" if n > 2 else "reserved")
        for n in (1, 2, 3, 4)
    ]
    await claim(office, 5)
    return numbers


async def claim(office: Office, seq: int, buyer: str = "b5") -> None:
    """A unit taken in Redis, with its entry, that confirm has not seen."""
    await office.redis("HINCRBY", PREFIX + "stock", "A", -1)
    await office.redis("SETRANGE", PREFIX + "outcome:A", seq - 1, "c")
    await office.redis("HSET", PREFIX + "item:A", "next_seq", seq + 1, "served", seq)
    await office.redis("XADD", PREFIX + "orders", "*", "c", "1|1|A|1700000000000", f"{seq}:1", buyer)


async def broken(office: Office, *, deep: bool = True) -> set[str]:
    found = await audit.run(office.desk.engine, office.desk.link, "drop", deep=deep)
    assert found is not None
    assert found.ok is (not [check for check in found.checks if not check.ok])
    return {check.name for check in found.checks if not check.ok}


async def test_a_sale_whose_books_agree_passes_with_both_sides_numbers(office: Office) -> None:
    assert await broken(office) == set()
    await fill(office)
    found = await audit.run(office.desk.engine, office.desk.link, "drop")
    assert found is not None and found.ok
    sides = {check.name: (check.left, check.right) for check in found.checks}
    assert sides == {
        "never_oversold:A": (4, 10), "reserved_counted:A": (2, 2), "sold_counted:A": (2, 2),
        "redis_within_postgres:A": (5, 6), "units_add_up:A": (10, 10), "top_ups_once:A": (0, 0),
        "every_claim_decided:A": (5, 5), "told_as_written:A": (4, 4), "one_live_order": (4, 4),
        "units_within_limit": (1, 1), "lawful_states": (4, 4), "deadlines_fairly_extended": (0, 0),
        "amounts_add_up": (2000, 2000), "shop_is_told": (4, 4),
        "paid_orders_have_money": (2, 2), "one_capture_an_order": (2, 2), "money_agrees:EUR": (1000, 1000),
        "journal_holds": (2, 2),
    }  # fmt: skip
    shown = (await office.get("/v1/admin/sales/drop/audit")).json()
    assert shown == found.shown()


async def test_the_quick_form_compares_sums_only(office: Office) -> None:
    await fill(office)
    found = await audit.run(office.desk.engine, office.desk.link, "drop", deep=False)
    assert found is not None and found.ok
    assert not {"every_claim_decided:A", "told_as_written:A", "journal_holds"} & {
        check.name for check in found.checks
    }


REDIS_FAULTS: dict[str, tuple[list[tuple[Any, ...]], set[str]]] = {
    "a unit is lost in Redis": ([("HINCRBY", "stock", "A", -1)], {"units_add_up:A"}),
    "one unit too many, hidden by a claim in flight": ([("HINCRBY", "stock", "A", 1)], {"units_add_up:A"}),
    "more units in Redis than Postgres has": (
        [("HINCRBY", "stock", "A", 5)], {"units_add_up:A", "redis_within_postgres:A"}
    ),
    "a winner is told something else": ([("SETRANGE", "outcome:A", 0, "e")], {"told_as_written:A"}),
    "a served ticket is forgotten": ([("SETRANGE", "outcome:A", 4, "w")], {"every_claim_decided:A"}),
    "a claim without its entry": (
        [("SETRANGE", "outcome:A", 5, "c"), ("HINCRBY", "stock", "A", -1)], {"every_claim_decided:A", "units_add_up:A"}
    ),
    "an entry without its claim": (
        [("XADD", "orders", "*", "c", "1|1|A|1700000000000", "9:1", "x")], {"every_claim_decided:A", "units_add_up:A"}
    ),
    "a top-up that Postgres does not know of": (
        [("HSET", "item:A", "add:forged", 3), ("HINCRBY", "stock", "A", 3)],
        {"top_ups_once:A", "units_add_up:A", "redis_within_postgres:A"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", REDIS_FAULTS)
async def test_what_is_wrong_in_redis_is_seen(office: Office, fault: str) -> None:
    await fill(office)
    commands, expected = REDIS_FAULTS[fault]
    for command, key, *rest in commands:
        await office.redis(command, PREFIX + key, *rest)
    assert await broken(office) == expected


ORDER = "(SELECT order_no FROM purchase_order WHERE seq = {})"
POSTGRES_FAULTS: dict[str, tuple[list[str], set[str]]] = {
    "sold beyond the total": (
        ["ALTER TABLE item DROP CONSTRAINT never_oversold", "UPDATE item SET total = 3"],
        {"never_oversold:A", "units_add_up:A", "redis_within_postgres:A"},
    ),
    "reserved miscounted": (["UPDATE item SET reserved = 1, total = 9"], {"reserved_counted:A"}),
    "sold miscounted": (["UPDATE item SET sold = 3, total = 11"], {"sold_counted:A"}),
    "two live orders of one buyer": (
        ["DROP INDEX one_live_order_a_buyer", "UPDATE purchase_order SET buyer_id = 'b1' WHERE seq = 2"],
        {"one_live_order", "units_within_limit"},
    ),
    "more units than the limit": (
        ["UPDATE purchase_order SET units = 2 WHERE seq = 1", "UPDATE item SET reserved = 3, total = 11"],
        {"units_within_limit"},
    ),
    "a reserved order that was paid": (["UPDATE purchase_order SET paid_at = now() WHERE seq = 1"], {"lawful_states"}),
    "an amount that is not its lines": (
        ["UPDATE order_line SET amount_minor = 400 WHERE order_no = " + ORDER.format(1)], {"amounts_add_up"}
    ),
    "an order that the shop was not told": (
        ["DELETE FROM event WHERE order_no = " + ORDER.format(1)], {"shop_is_told"}
    ),
    "a paid order without money": (
        ["DELETE FROM capture WHERE order_no = " + ORDER.format(3)], {"paid_orders_have_money", "money_agrees:EUR"}
    ),
    "money twice for one order": (
        ["DROP INDEX one_kept_capture_an_order",
         "INSERT INTO capture (provider, provider_ref, order_no, amount_minor, currency, state, captured_at)"
         " SELECT 'sandbox', 'twice', order_no, 500, 'EUR', 'kept', now() FROM purchase_order WHERE seq = 3"],
        {"one_capture_an_order", "money_agrees:EUR"},
    ),
    "money that came short": (
        ["UPDATE capture SET amount_minor = 499 WHERE order_no = " + ORDER.format(3)], {"money_agrees:EUR"}
    ),
    "a refund that nobody owed": (
        ["INSERT INTO refund (id, capture_id, order_no, amount_minor, currency, reason, state)"
         " SELECT 'R', id, order_no, 100, 'EUR', 'x', 'done' FROM capture WHERE order_no = " + ORDER.format(3)],
        {"money_agrees:EUR"},
    ),
    "an order that vanished": (
        ["DELETE FROM order_line WHERE order_no = " + ORDER.format(1), "DELETE FROM purchase_order WHERE seq = 1"],
        {"reserved_counted:A", "every_claim_decided:A"},
    ),
    "a journal that was changed": (
        ["ALTER TABLE journal DISABLE TRIGGER USER", "UPDATE journal SET actor = 'x' WHERE id = 1"], {"journal_holds"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", POSTGRES_FAULTS)
async def test_what_is_wrong_in_postgres_is_seen(office: Office, fault: str) -> None:
    await fill(office)
    statements, expected = POSTGRES_FAULTS[fault]
    for statement in statements:
        await office.sql(statement)
    assert await broken(office) == expected


async def test_a_release_on_its_way_counts_as_units(office: Office) -> None:
    numbers = await fill(office)
    await office.post(f"/v1/admin/orders/{numbers[0]}/cancel")
    assert await broken(office) == set()
    # Redis has it, and the outbox row is closed without its effect: the unit is lost.
    await office.sql("UPDATE outbox SET state = 'done', done_at = now() WHERE kind = 'release'")
    assert await broken(office) == {"units_add_up:A", "told_as_written:A"}


async def test_a_sale_that_redis_has_lost_cannot_be_audited(office: Office) -> None:
    await office.redis("UNLINK", PREFIX + "sale")
    answer = await office.get("/v1/admin/sales/drop/audit")
    assert (answer.status_code, answer.json()["code"]) == (503, "busy")


async def test_top_ups_and_takes_are_followed(office: Office) -> None:
    await fill(office)
    for units in (5, -3, 2):
        assert (
            await office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": units})
        ).status_code == 200
    found = await audit.run(office.desk.engine, office.desk.link, "drop")
    assert found is not None and found.ok
    assert next((c.left, c.right) for c in found.checks if c.name == "top_ups_once:A") == (4, 4)
