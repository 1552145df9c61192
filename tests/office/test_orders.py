"""Orders at the desk: lists, CSV, cancel, refund, and ending all of an item."""

from __future__ import annotations

import csv
import io

import pytest

from tests.office.conftest import Office, write_order


async def outbox_kinds(office: Office) -> list[tuple[str, str | None]]:
    found = await office.sql("SELECT kind, payload->>'to' FROM outbox WHERE order_no IS NOT NULL ORDER BY id")
    return [(row[0], row[1]) for row in found]


async def open_attempt(office: Office, order_no: str) -> None:
    await office.sql(
        "INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, amount_minor, currency)"
        " VALUES (:id, :no, 1, 'sandbox', 'sandbox', 'sent', 500, 'EUR')",
        id=f"P{order_no}", no=order_no,
    )  # fmt: skip


async def test_orders_are_listed_in_the_order_of_the_line_in_pages_and_by_state(office: Office) -> None:
    await office.open_sale()
    numbers = [
        await write_order(office, seq=n, buyer=f"b{n}", state="paid" if n == 3 else "reserved")
        for n in (1, 2, 3)
    ]
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await office.get("/v1/admin/sales/drop/orders", limit=2, **cursor)).json()
        seen += [one["order_no"] for one in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert seen == numbers
    paid = (await office.get("/v1/admin/sales/drop/orders", state="paid")).json()["data"]
    assert [one["order_no"] for one in paid] == numbers[2:]
    assert (await office.get("/v1/admin/sales/drop/orders", state="lost")).status_code == 422
    assert (await office.get("/v1/admin/sales/none/orders")).status_code == 404
    await office.publish("other")
    assert (await office.get("/v1/admin/sales/other/orders", **cursor)).status_code == 422


async def test_csv_is_whole_and_runs_nothing_in_a_spreadsheet(office: Office) -> None:
    await office.open_sale()
    await write_order(office, seq=1, buyer='=HYPERLINK("https://bad.example")')
    await write_order(office, seq=2, buyer='a,"b"\nc')
    answer = await office.get("/v1/admin/sales/drop/orders.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    found = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    assert [row["buyer_id"] for row in found] == ['\'=HYPERLINK("https://bad.example")', 'a,"b"\nc']
    assert found[0]["amount_minor"] == "500" and found[0]["paid_at"] == ""


async def test_one_order_is_shown_with_its_money(office: Office) -> None:
    await office.open_sale()
    number = await write_order(office, state="paid")
    one = (await office.get(f"/v1/admin/orders/{number}")).json()
    assert (one["state"], one["buyer_id"], one["lines"][0]["amount_minor"]) == ("paid", "b1", 500)
    assert one["captures"][0]["state"] == "kept" and one["refunds"] == [] and "contact" not in one
    for number, status in (("0123456789ABCDEFGHIJ", 404), ("short", 422), ("x" * 24, 422)):
        assert (await office.get(f"/v1/admin/orders/{number}")).status_code == status


async def test_a_reserved_order_is_cancelled_with_event_and_its_units_way_back(office: Office) -> None:
    await office.open_sale()
    number = await write_order(office)
    answer = await office.post(f"/v1/admin/orders/{number}/cancel", {"reason": "the buyer called"})
    assert (answer.status_code, answer.json()["state"], answer.json()["reason"]) == (
        200,
        "cancelled",
        "operator",
    )
    assert await outbox_kinds(office) == [("release", "k")]
    assert (await office.get("/v1/admin/sales/drop")).json()["items"][0]["reserved"] == 0
    types = [e["type"] for e in (await office.get("/v1/admin/events")).json()["data"]]
    assert types[-1] == "order.cancelled"
    again = await office.post(f"/v1/admin/orders/{number}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "not_cancellable")
    assert await outbox_kinds(office) == [("release", "k")]


async def test_an_order_with_an_open_payment_ends_once_money_cannot_arrive(office: Office) -> None:
    await office.open_sale()
    number = await write_order(office)
    await open_attempt(office, number)
    answer = await office.post(f"/v1/admin/orders/{number}/cancel")
    assert (answer.status_code, answer.json()["state"], answer.json()["leaving"]) == (202, "reserved", True)
    assert ("release", "k") not in await outbox_kinds(office)


async def test_a_paid_order_is_refunded_and_not_cancelled(office: Office) -> None:
    await office.open_sale()
    number = await write_order(office, state="paid")
    assert (await office.post(f"/v1/admin/orders/{number}/cancel")).status_code == 409
    for body, why in (
        ({"amount_minor": 501}, "amount_wrong"),
        ({"amount_minor": 100, "restock": True}, "restock_needs_whole"),
    ):
        refused = await office.post(f"/v1/admin/orders/{number}/refund", body)
        assert (refused.status_code, refused.json()["code"], refused.json()["why"]) == (
            409,
            "not_refundable",
            why,
        )
    for body in ({"amount_minor": 0}, {"amount_minor": "1"}, {"restock": "yes"}, {"more": 1}):
        assert (await office.post(f"/v1/admin/orders/{number}/refund", body)).status_code == 422
    tried = await office.post(f"/v1/admin/orders/{number}/refund", dry_run=True)
    assert tried.json()["state"] == "refunding"
    part = await office.post(f"/v1/admin/orders/{number}/refund", {"amount_minor": 100})
    assert (part.status_code, part.json()["state"], len(part.json()["refunds"])) == (202, "paid", 1)
    whole = await office.post(f"/v1/admin/orders/{number}/refund", {"restock": False}, idem="k")
    assert (whole.status_code, whole.json()["state"]) == (202, "refunding")
    assert [one["amount_minor"] for one in whole.json()["refunds"]] == [100, 400]
    assert (
        await office.post(f"/v1/admin/orders/{number}/refund", {"restock": False}, idem="k")
    ).json() == whole.json()
    assert (await office.post(f"/v1/admin/orders/{number}/refund")).status_code == 409
    reserved = await write_order(office, seq=2, buyer="b2")
    assert (await office.post(f"/v1/admin/orders/{reserved}/refund")).json()["why"] == "not_paid"
    assert (await office.post("/v1/admin/orders/0123456789ABCDEFGHIJ/refund")).status_code == 404


@pytest.mark.parametrize("repeat", [False, True])
async def test_cancel_all_ends_every_live_order_of_the_item(office: Office, repeat: bool) -> None:
    items = [{"sku": s, "title": s, "price_minor": 500, "currency": "EUR", "units": 10} for s in ("A", "B")]
    await office.open_sale(items=items)
    a, b = await write_order(office, seq=1), await write_order(office, seq=2, buyer="b2", state="paid")
    c, other = (
        await write_order(office, seq=3, buyer="b3"),
        await write_order(office, sku="B", seq=1, buyer="b4"),
    )
    await open_attempt(office, c)
    body = {"sku": "A", "reason": "wrong price"}
    refused = await office.post("/v1/admin/sales/drop/cancel-all", body)
    assert (refused.status_code, refused.json()["code"]) == (409, "not_paused")
    await office.post("/v1/admin/sales/drop/pause")
    tried = await office.post("/v1/admin/sales/drop/cancel-all", body, dry_run=True)
    expected = {"sku": "A", "cancelled": 1, "leaving": 1, "refunding": 1, "in_flight": 0}
    assert tried.json() == expected and await outbox_kinds(office) == []
    answer = await office.post("/v1/admin/sales/drop/cancel-all", body, idem="k")
    assert (answer.status_code, answer.json()) == (200, expected), answer.text
    if repeat:
        assert (await office.post("/v1/admin/sales/drop/cancel-all", body, idem="k")).json() == expected
    states = [(await office.get(f"/v1/admin/orders/{n}")).json()["state"] for n in (a, b, c, other)]
    assert states == ["cancelled", "refunding", "reserved", "reserved"]
    assert (await outbox_kinds(office)).count(("release", "k")) == 1
    for bad, status in (({"sku": "C"}, 404), ({}, 422)):
        assert (await office.post("/v1/admin/sales/drop/cancel-all", bad)).status_code == status


async def test_a_trace_tells_what_happened_to_an_order_and_what_its_buyer_is_told(office: Office) -> None:
    await office.open_sale()
    number = await write_order(office)
    await open_attempt(office, number)
    await office.sql("UPDATE payment_attempt SET state = 'closed', ended_at = now()")
    await office.post(f"/v1/admin/orders/{number}/cancel", {"reason": "the buyer called"})
    found = (await office.get(f"/v1/admin/orders/{number}/trace")).json()
    # No worker runs that would tell Redis.
    assert (found["state"], found["told"]) == ("cancelled", "reserved")
    steps = [(one["step"], one["what"]) for one in found["data"]]
    assert steps[0] == ("claim", "claimed") and [one["at"] for one in found["data"]] == sorted(
        one["at"] for one in found["data"]
    )
    assert {
        ("confirm", "reserved"), ("pay", "link wanted"), ("pay", "link closed"), ("release", "cancelled"),
        ("release", "Redis to be told: release"), ("tell", "event order.cancelled"), ("operator", "order.cancel"),
    } <= set(steps)  # fmt: skip
    by_hand = next(one for one in found["data"] if one["step"] == "operator")
    assert by_hand["detail"] == {"actor": "first admin (first)", "reason": "the buyer called"}
    assert (await office.get("/v1/admin/orders/0123456789ABCDEFGHIJ/trace")).status_code == 404


async def test_a_trace_knows_refused_claims_and_does_not_need_redis(office: Office) -> None:
    await office.open_sale()
    number = await write_order(office, state="paid")
    await office.sql(
        "INSERT INTO refused_claim (order_no, sale, sku, buyer_id, epoch, seq, units, reason, returned)"
        " VALUES ('REFUSED0000000000000', 'drop', 'A', 'b2', 1, 2, 1, 'live_order', true)"
    )
    refused = (await office.get("/v1/admin/orders/REFUSED0000000000000/trace")).json()
    assert (refused["state"], refused["told"]) == (None, None)
    assert [(one["step"], one["what"], one["detail"]["reason"]) for one in refused["data"]] == [
        ("confirm", "refused", "live_order")
    ]
    await office.desk.link.close()
    alone = (await office.get(f"/v1/admin/orders/{number}/trace")).json()
    assert (alone["state"], alone["told"]) == ("paid", None)
    assert ("pay", "money captured") in [(one["step"], one["what"]) for one in alone["data"]]
