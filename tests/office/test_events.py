"""The shop's feed never skips a committed event; endpoints keep their secrets."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from typing import Any

import pytest

from app import sealing
from app.ledger import events
from app.sealing import webhook_aad
from tests.office.conftest import Office


async def test_the_feed_goes_on_where_it_was_left(office: Office) -> None:
    await office.publish()
    await office.publish("other")
    first = (await office.get("/v1/admin/events", limit=1)).json()
    assert [one["data"]["sale"] for one in first["data"]] == ["drop"]
    assert {"id", "type", "at", "version", "data"} <= set(first["data"][0])
    second = (await office.get("/v1/admin/events", after=first["next_cursor"])).json()
    assert [one["data"]["sale"] for one in second["data"]] == ["other"]
    empty = (await office.get("/v1/admin/events", after=second["next_cursor"])).json()
    assert empty["data"] == []
    await office.post("/v1/admin/sales/drop/pause")
    more = (await office.get("/v1/admin/events", after=empty["next_cursor"])).json()
    assert [one["type"] for one in more["data"]] == ["sale.paused"]
    of_sale = (await office.get("/v1/admin/events", sale="other")).json()["data"]
    assert [one["type"] for one in of_sale] == ["sale.published"]


async def test_a_cursor_that_is_bent_or_of_another_list_is_refused(office: Office) -> None:
    await office.publish()
    cursor = (await office.get("/v1/admin/events")).json()["next_cursor"]
    for at in range(len(cursor)):
        bent = cursor[:at] + ("A" if cursor[at] != "A" else "B") + cursor[at + 1 :]
        assert (await office.get("/v1/admin/events", after=bent)).status_code == 422, at
    for other in ("0", "x" * 600, office.desk.ring.cursor_sign("journal", [0])):
        assert (await office.get("/v1/admin/events", after=other)).status_code == 422


async def test_an_event_that_is_committed_late_is_never_skipped(office: Office) -> None:
    """Ten writers commit in an order other than they began, while a reader follows: it sees each exactly once."""
    seen: list[str] = []
    done = asyncio.Event()

    async def write(n: int) -> None:
        async with office.desk.engine.begin() as conn:
            await events.put(conn, "order.reserved", "drop", n, {"n": n}, f"order-{n}")
            await asyncio.sleep((n * 7 % 10) / 50)  # not a wait: it makes them commit in another order

    async def read() -> None:
        cursor: dict[str, Any] = {}
        while True:
            last = done.is_set()
            page = (await office.get("/v1/admin/events", limit=3, **cursor)).json()
            seen.extend(one["id"] for one in page["data"])
            cursor = {"after": page["next_cursor"]}
            if last and not page["data"]:
                return

    reader = asyncio.create_task(read())
    for at in range(0, 20, 5):
        await asyncio.gather(*(write(n) for n in range(at, at + 5)))
    done.set()
    await reader
    assert sorted(seen) == sorted(events.event_id(f"order-{n}", n, "order.reserved") for n in range(20))


async def test_an_endpoint_is_made_listed_and_deleted_and_its_secret_is_sealed(office: Office) -> None:
    body = {"url": "https://shop.example/hook", "events": ["order.reserved", "sale.closed"]}
    made = await office.post("/v1/admin/webhooks", body, idem="k")
    assert made.status_code == 201, made.text
    secret = made.json()["secret"]
    assert secret.startswith("whsec_") and len(b64decode(secret[6:])) == 32
    assert (await office.post("/v1/admin/webhooks", body, idem="k")).json() == made.json()
    listed = await office.get("/v1/admin/webhooks")
    assert secret not in listed.text and listed.json()["data"][0]["url"] == body["url"]
    row = (await office.sql("SELECT id, secret FROM webhook_endpoint"))[0]
    opened = sealing.unseal(office.desk.seal_keys, bytes(row[1]), webhook_aad(row[0]))
    assert opened == b64decode(secret[6:])
    assert not any(secret in str(r) for r in await office.sql("SELECT t::text FROM idempotency t"))
    assert (await office.delete(f"/v1/admin/webhooks/{row[0]}")).status_code == 204
    assert (await office.delete(f"/v1/admin/webhooks/{row[0]}")).status_code == 404
    assert (await office.get("/v1/admin/webhooks")).json()["data"] == []


@pytest.mark.parametrize(
    "body",
    [
        {"url": "http://shop.example/hook", "events": ["order.paid"]},
        {"url": "https://user:pass@shop.example/", "events": ["order.paid"]},
        {"url": "file:///etc/passwd", "events": ["order.paid"]},
        {"url": "https://shop.example:0/", "events": ["order.paid"]},
        {"url": "https://shop.example/", "events": []},
        {"url": "https://shop.example/", "events": ["order.lost"]},
        {"url": "https://shop.example/", "events": ["order.paid", "order.paid"]},
        {"url": "https://" + "x" * 2000, "events": ["order.paid"]},
        {"url": "https://shop.example/\u0000", "events": ["order.paid"]},
        {"url": "https://shop.example/"},
    ],
)
async def test_a_bad_endpoint_is_not_made(office: Office, body: dict[str, Any]) -> None:
    assert (await office.post("/v1/admin/webhooks", body)).status_code == 422
    assert (await office.get("/v1/admin/webhooks")).json()["data"] == []
