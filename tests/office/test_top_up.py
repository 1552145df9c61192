"""More units and fewer, once each, and never fewer than are owned."""

from __future__ import annotations

import asyncio

import pytest

from app.errors import DidNotHappen, Unknown
from app.sale import publish
from tests.office.conftest import Office, redis_sale, stock, until, write_order


async def units(office: Office) -> int:
    return int((await office.get("/v1/admin/sales/drop")).json()["items"][0]["units"])


async def test_units_are_added_in_both_stores_and_on_the_public_document(office: Office) -> None:
    await office.publish()
    answer = await office.post(
        "/v1/admin/sales/drop/top-up", {"sku": "A", "units": 5, "reason": "found a box"}
    )
    assert answer.status_code == 200 and answer.json()["items"][0]["units"] == 15
    assert (await stock(office), await units(office)) == (15, 15)
    assert '"units":15' in (await redis_sale(office))["doc"]
    entry = (await office.get("/v1/admin/journal")).json()["data"][0]
    assert (entry["action"], entry["reason"], entry["detail"]["units"]) == ("sale.top_up", "found a box", 5)


async def test_units_that_redis_did_not_hear_of_are_left_to_the_relay_once(
    office: Office, monkeypatch
) -> None:
    await office.publish()

    async def away(**given):
        raise DidNotHappen("not connected")

    monkeypatch.setattr(office.desk.scripts, "stock_add", away)
    answer = await office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": 5}, idem="k")
    assert answer.status_code == 202
    assert (await stock(office), await units(office)) == (10, 15)
    monkeypatch.undo()
    due = await office.sql("SELECT payload FROM outbox WHERE kind = 'stock_add' AND state = 'due'")
    assert len(due) == 1
    # The relay applies it; twice, because its first answer is lost.
    sale = await read(office)
    for _ in range(2):
        await publish.add_stock(
            office.desk.settings, office.desk.scripts, sale, "A", due[0][0]["units"], due[0][0]["id"]
        )
    assert await stock(office) == 15


async def read(office: Office):
    from app.ledger import sales

    async with office.desk.engine.connect() as conn:
        return await sales.get(conn, "drop")


async def test_unsold_units_are_taken_away_and_no_more(office: Office) -> None:
    await office.open_sale()
    await write_order(office, seq=1)
    await write_order(office, seq=2, buyer="b2", state="paid")
    refused = await office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": -9})
    assert (refused.status_code, refused.json()["code"], refused.json()["units_left"]) == (
        409,
        "not_unsold",
        8,
    )
    assert (await stock(office), await units(office)) == (8, 10)
    taken = await office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": -8})
    assert taken.status_code == 200, taken.text
    assert (await stock(office), await units(office)) == (0, 2)
    assert (await office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": -1})).status_code == 409
    assert await office.sql("SELECT 1 FROM outbox WHERE state IN ('due', 'intent')") == []
    assert (await office.get("/v1/admin/sales/drop/audit")).json()["ok"]


async def test_many_takes_at_once_never_take_more_than_there_is(office: Office) -> None:
    await office.publish()
    answers = await asyncio.gather(
        *(office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": -3}) for _ in range(12))
    )
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [409] * 9
    assert (await stock(office), await units(office)) == (1, 1)


@pytest.mark.parametrize("heard", [True, False], ids=["Redis did it", "Redis did not"])
async def test_a_take_whose_office_died_is_finished_once_by_another(
    office: Office, monkeypatch, heard: bool
) -> None:
    await office.publish()
    real = office.desk.scripts.stock_add

    async def dies(**given):
        if heard:
            await real(**given)
        raise Unknown("killed")

    monkeypatch.setattr(office.desk.scripts, "stock_add", dies)
    assert (
        await office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": -4}, idem="k")
    ).status_code == 503
    monkeypatch.undo()
    assert await units(office) == 10
    await office.sql("UPDATE outbox SET created_at = now() - interval '1 minute'")

    async def finished() -> bool:
        return await units(office) == 6

    await until(finished)
    assert await stock(office) == 6
    entry = (await office.get("/v1/admin/journal")).json()["data"][0]
    assert (entry["action"], entry["detail"]["units"]) == ("sale.top_up", -4)
    # The operator, who saw a 503, repeats the request: it is not done again.
    again = await office.post("/v1/admin/sales/drop/top-up", {"sku": "A", "units": -4}, idem="k")
    assert again.status_code == 200, again.text
    assert (await stock(office), await units(office)) == (6, 6)
    assert (await office.get("/v1/admin/sales/drop/audit")).json()["ok"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"sku": "A", "units": 0}, 422, "invalid"),
        ({"sku": "B", "units": 1}, 404, "no_such_item"),
        ({"sku": "A", "units": 10**12}, 422, "invalid"),
        ({"sku": "A", "units": 10_000_000}, 422, "invalid"),
        ({"sku": "A", "units": 1.5}, 422, "invalid"),
        ({"sku": "A", "units": "1"}, 422, "invalid"),
        ({"sku": "A"}, 422, "invalid"),
        ({"sku": "A\u0000", "units": 1}, 422, "invalid"),
    ],
)
async def test_a_bad_top_up_changes_nothing(
    office: Office, body: dict[str, object], status: int, code: str
) -> None:
    await office.publish()
    answer = await office.post("/v1/admin/sales/drop/top-up", body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (await stock(office), await units(office)) == (10, 10)
