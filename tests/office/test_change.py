"""PATCH: what may still change, when, and that nothing changes of what may not."""

from __future__ import annotations

import asyncio

import pytest

from tests.office.conftest import Office, document, iso, redis_sale, timed

ITEM = {"sku": "A", "title": "Thing", "price_minor": 500, "currency": "EUR", "units": 10}
LATER = {"line_opens_at": 60, "opens_at": 120, "draw_freeze_s": 10}
LINE_OPEN = {"line_opens_at": -30, "opens_at": 120, "draw_freeze_s": 10}
OPEN = {"line_opens_at": -30, "opens_at": -20, "draw_freeze_s": 5}

FREE = [
    {"title": "New"}, {"rate_per_s": 3}, {"standby": False}, {"line_max": 5}, {"pay_within_s": 300},
    {"closes_at": 7200}, {"time_zone": "Europe/Berlin"},
]  # fmt: skip
FIXED = [
    ({"limit_per_buyer": 2, "standby": False}, "limit_per_buyer"), ({"draw_freeze_s": 20}, "draw_freeze_s"),
    ({"beacon": "word"}, "beacon"), ({"beacon_wait_s": 5}, "beacon_wait_s"), ({"pass": "required"}, "pass"),
    ({"audience": ["vip"]}, "audience"), ({"channels": ["other", "sandbox"]}, "channels"),
    ({"return_urls": ["https://shop.example/"]}, "return_urls"), ({"default_channel": "sandbox"}, "default_channel"),
    ({"items": [{**ITEM, "units": 11}]}, "items.0.units"), ({"items": [{**ITEM, "title": "Other"}]}, "items.0.title"),
    ({"items": [{**ITEM, "currency": "USD"}]}, "items.0.currency"), ({"items": [{**ITEM, "sku": "B"}]}, "items"),
    ({"items": [ITEM, {**ITEM, "sku": "B"}]}, "items"),
]  # fmt: skip


@pytest.mark.parametrize("times", [LATER, LINE_OPEN, OPEN], ids=["scheduled", "line_open", "open"])
async def test_after_publish_some_fields_stay_free_and_are_live_at_once(
    office: Office, times: dict[str, object]
) -> None:
    await office.publish(**timed(times))
    for change in FREE:
        answer = await office.change("drop", timed(change))
        assert answer.status_code == 200, (change, answer.text)
    told = await redis_sale(office)
    assert (told["rate_milli"], told["standby"], told["line_max"]) == ("3000", "0", "5")
    assert '"title":"New"' in told["doc"] and '"pay_within_s":300' in told["doc"]
    assert int(told["version"]) == (await office.get("/v1/admin/sales/drop")).json()["version"]


@pytest.mark.parametrize(("change", "path"), FIXED)
async def test_after_publish_other_fields_are_fixed(
    office: Office, change: dict[str, object], path: str
) -> None:
    await office.publish(**timed(LATER))
    before, told = (await office.get("/v1/admin/sales/drop")).json(), await redis_sale(office)
    # Together with a change that is allowed: nothing of it is done.
    answer = await office.change("drop", timed({**change, "title": "Not this either"}))
    assert (answer.status_code, answer.json()["code"]) == (409, "fixed_after_publish"), answer.text
    assert {"path": path, "code": "fixed_after_publish"} in answer.json()["errors"]
    assert (await office.get("/v1/admin/sales/drop")).json() == before
    assert await redis_sale(office) == told


@pytest.mark.parametrize(
    ("times", "change", "code"),
    [
        (LATER, {"line_opens_at": 90}, None),
        (LATER, {"line_opens_at": -1}, "in_the_past"),
        (LATER, {"opens_at": 300}, None),
        (LATER, {"items": [{**ITEM, "price_minor": 600}]}, None),
        (LINE_OPEN, {"line_opens_at": 90}, "has_passed"),
        (LINE_OPEN, {"opens_at": 300}, None),
        (LINE_OPEN, {"items": [{**ITEM, "price_minor": 600}]}, "has_passed"),
        (OPEN, {"opens_at": 300}, "has_passed"),
        (OPEN, {"closes_at": -1}, "in_the_past"),
        (OPEN, {"closes_at": 30}, None),
    ],
)
async def test_times_and_prices_may_change_until_they_have_passed(
    office: Office, times: dict[str, object], change: dict[str, object], code: str | None
) -> None:
    await office.publish(**timed(times))
    answer = await office.change("drop", timed(change))
    if code is None:
        assert answer.status_code == 200, answer.text
    else:
        assert answer.status_code == 409, answer.text
        assert [one["code"] for one in answer.json()["errors"]] == [code]


async def test_a_later_opening_lets_nobody_into_a_draw_that_is_frozen(office: Office) -> None:
    await office.publish(line_opens_at=iso(-60), opens_at=iso(25), draw_freeze_s=30)
    frozen = int((await redis_sale(office))["freeze_ms"])
    answer = await office.change("drop", {"opens_at": iso(600)})
    assert answer.status_code == 200, answer.text
    told = await redis_sale(office)
    assert frozen - 1000 < int(told["freeze_ms"]) <= frozen
    assert int(told["opens_ms"]) > frozen + 500_000


async def test_after_the_close_nothing_changes(office: Office) -> None:
    await office.publish()
    await office.post("/v1/admin/sales/drop/close")
    for change in ({"title": "New"}, {"closes_at": iso(9000)}, {"rate_per_s": 2}):
        answer = await office.change("drop", change)
        assert (answer.status_code, answer.json()["code"]) == (410, "sale_closed")


async def test_a_draft_may_change_in_everything_but_its_id(office: Office) -> None:
    await office.draft()
    for change, _ in FIXED:
        answer = await office.change("drop", {"default_channel": None, **change})
        assert answer.status_code == 200, (change, answer.text)
    assert [i["sku"] for i in (await office.get("/v1/admin/sales/drop")).json()["items"]] == ["A", "B"]
    for change in (
        {"id": "other"},
        {"copy_of": "x"},
        {"state": "open"},
        {"items": []},
        {"opens_at": "2027-01-01T00:00:00"},
    ):
        assert (await office.change("drop", change)).status_code == 422, change


async def test_null_puts_a_field_back_to_its_default(office: Office) -> None:
    await office.draft(rate_per_s=5, pay_within_s=100, time_zone="Europe/Berlin")
    answer = await office.change("drop", {"rate_per_s": None, "pay_within_s": None, "time_zone": None})
    sale = answer.json()
    assert (sale["rate_per_s"], sale["pay_within_s"], sale["time_zone"]) == (None, 900, None)


async def test_if_match_is_required_and_strong(office: Office) -> None:
    await office.draft()
    for etag, status, code in (
        (None, 428, "if_match_required"), ('"2"', 412, "changed"), ("1", 412, "changed"), ('W/"1"', 412, "changed"),
        ("", 412, "changed"),
    ):  # fmt: skip
        answer = await office.patch("/v1/admin/sales/drop", {"title": "x"}, etag=etag)
        assert (answer.status_code, answer.json()["code"]) == (status, code), etag
    for etag in ('"1"', '"7", "2"', "*"):
        answer = await office.patch("/v1/admin/sales/drop", {"title": f"x{etag}"}, etag=etag)
        assert answer.status_code == 200, answer.text
    assert (await office.patch("/v1/admin/sales/none", {"title": "x"}, etag="*")).status_code == 404


async def test_of_two_changes_at_once_one_is_told_to_read_again(office: Office) -> None:
    await office.draft()
    answers = await asyncio.gather(
        *(office.patch("/v1/admin/sales/drop", {"title": f"t{n}"}, etag='"1"') for n in range(8))
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 7
    assert (await office.get("/v1/admin/sales/drop")).json()["version"] == 2


async def test_a_change_that_changes_nothing_keeps_the_version(office: Office) -> None:
    await office.publish()
    version = (await office.get("/v1/admin/sales/drop")).json()["version"]
    assert (await office.change("drop", {"title": document()["title"]})).json()["version"] == version
