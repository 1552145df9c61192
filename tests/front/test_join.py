"""Joining: one tap is enough, from any node; every refusal has its code and stores nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from app.keys import SaleKeys
from tests.front.conftest import Front, Open, Shop, token, until
from tests.front.wire import crowd, join_bytes

Seen = Callable[..., Awaitable[Any]]


async def test_a_join_gets_a_unit_at_once_while_nobody_waits(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    answer = await front.join("x", "ann")
    assert answer.status_code == 202
    told = answer.json()
    assert told["state"] == "claimed"
    assert told["seq"] == 1 and told["rank"] == 1 and told["ahead"] == 0
    assert told["order"] is None and told["poll_after_ms"] > 0
    assert told["ticket_id"].startswith("1-") and len(told["ticket"]) <= 128
    assert [order.split(b"|")[-1] for order in await shop.orders("x")] == [b"ann"]
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"]


async def test_a_hundred_taps_at_once_from_two_doors_are_one_ticket(
    front: Front, open_door: Open, shop: Shop, seen: Seen
) -> None:
    other = await open_door()
    await shop.publish()
    await seen()
    await seen(door=other)
    answers = await asyncio.gather(*[(front, other)[tap % 2].join("x", "ann") for tap in range(100)])
    assert {answer.status_code for answer in answers} == {200, 202}
    assert sum(answer.status_code == 202 for answer in answers) == 1
    assert len({answer.json()["ticket"] for answer in answers}) == 1
    assert len(await shop.orders("x")) == 1


async def test_another_body_meets_the_live_ticket(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    first = (await front.join("x", "ann")).json()
    for sku, units in (("A", 2), ("B", 1)):
        answer = await front.join("x", "ann", sku, units)
        assert answer.status_code == 409
        assert answer.json()["code"] == "ticket_exists"
        assert answer.json()["ticket"] == first["ticket"]


async def test_sold_out_stores_nothing_and_a_winner_still_finds_the_ticket(
    front: Front, shop: Shop, seen: Seen
) -> None:
    await shop.publish(units=1)
    await seen()
    won = (await front.join("x", "ann")).json()
    answer = await front.join("x", "bob")
    assert answer.status_code == 200
    assert answer.json() == {"ticket": None, "state": "sold_out"}
    assert await shop.link.call("HEXISTS", SaleKeys("x").buyers, "bob") == 0
    assert (await front.join("x", "ann")).json()["ticket"] == won["ticket"]
    await until(lambda: front.app.door.snapshots.get("x").order[0].units_left == 0)  # type: ignore[union-attr]


async def test_a_standby_line_waits_at_stock_zero(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(units=1, standby=1, limit=1)
    await seen()
    await front.join("x", "ann")
    await seen(true=lambda view: view.order[0].units_left == 0)
    told = (await front.join("x", "bob")).json()
    assert told["state"] == "waiting" and told["standby"] is True and told["eta_s"] is None
    assert told["ahead"] == 0


async def test_more_than_the_limit_is_refused(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    answer = await front.join("x", "ann", units=3)
    assert answer.status_code == 409 and answer.json()["code"] == "limit_reached"


async def test_a_full_line_answers_429(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(opens_in_s=60, line_max=2)
    await seen()
    assert [(await front.join("x", name)).status_code for name in ("a", "b", "c")] == [202, 202, 429]
    answer = await front.join("x", "d")
    assert answer.json()["code"] == "line_full" and int(answer.headers["retry-after"]) >= 1


async def test_before_the_line_opens(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(line_opens_in_s=60, opens_in_s=70)
    await seen()
    answer = await front.join("x", "ann")
    assert answer.status_code == 403
    assert answer.json()["code"] == "not_open_yet"
    assert answer.json()["line_opens_at"].endswith("Z")


async def test_a_closed_sale_is_gone_but_tickets_are_still_found(
    front: Front, shop: Shop, seen: Seen
) -> None:
    await shop.publish()
    await seen()
    won = (await front.join("x", "ann")).json()
    await shop.switch("x", closed=1)
    answer = await front.join("x", "bob")
    assert answer.status_code == 410 and answer.json()["code"] == "sale_closed"
    again = await front.join("x", "ann")
    assert again.status_code == 200 and again.json()["ticket"] == won["ticket"]


async def test_while_paused_buyers_wait(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    await shop.switch("x", paused=1)
    told = (await front.join("x", "ann")).json()
    assert told["state"] == "waiting"
    await seen(true=lambda view: view.paused)
    assert (await front.http.get("/v1/sales/x/board")).json()["state"] == "paused"


async def test_orders_that_pile_up_stop_new_joins_only(open_door: Open, shop: Shop, seen: Seen) -> None:
    front = await open_door(orders_backlog_max=1)
    await shop.publish()
    await seen(door=front)
    won = (await front.join("x", "ann")).json()
    answer = await front.join("x", "bob")
    assert answer.status_code == 503 and answer.json()["code"] == "busy" and answer.headers["retry-after"]
    assert (await front.join("x", "ann")).json()["ticket"] == won["ticket"]


async def test_again_gives_a_new_ticket_only_when_none_is_live(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    first = (await front.join("x", "ann")).json()
    assert (await front.join("x", "ann", again=True)).json()["ticket"] == first["ticket"]
    left = await front.http.delete(f"/v1/tickets/{first['ticket']}", headers={"X-Buyer-Id": "ann"})
    assert left.json()["state"] == "left"
    held = await front.join("x", "ann")
    assert held.status_code == 200 and held.json()["state"] == "left"
    again = await front.join("x", "ann", again=True)
    assert again.status_code == 202 and again.json()["ticket"] != first["ticket"]


async def test_a_sale_with_required_passes(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(doc={"pass": "required"})
    await seen()
    answer = await front.join("x", "ann")
    assert answer.status_code == 403 and answer.json()["code"] == "pass_required"
    given = await front.http.post("/v1/sales/x/pass", headers={"X-Buyer-Id": "ann"})
    assert given.status_code == 201
    answer = await front.join("x", "", Authorization=f"Pass {given.json()['pass']}")
    assert answer.status_code == 202


async def test_an_audience_is_held_at_the_door(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(doc={"audience": ["gold"]})
    await seen()
    for bearer, status in (
        (token("ann", groups=["gold"]), 202),
        (token("bob", groups=["silver"]), 403),
        (token("cid", groups="gold"), 403),
        (token("dot"), 403),
    ):
        answer = await front.join("x", "", Authorization=f"Bearer {bearer}")
        assert answer.status_code == status
        if status == 403:
            assert answer.json()["code"] == "audience"


async def test_nobody_joins_without_an_identity(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    answer = await front.http.post("/v1/sales/x/tickets", json={"sku": "A", "units": 1})
    assert answer.status_code == 401 and answer.json()["code"] == "auth_missing"
    assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_unknown_sale_and_item(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    answer = await front.join("nowhere", "ann")
    assert answer.status_code == 404 and answer.json()["code"] == "no_such_sale"
    answer = await front.join("x", "ann", sku="Z")
    assert answer.status_code == 404 and answer.json()["code"] == "no_such_item"


async def test_two_thousand_buyers_get_seqs_without_gaps(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(units=100, opens_in_s=60)
    await seen()
    replies = await crowd(front.url, [join_bytes("x", f"buyer-{number}") for number in range(2000)], 128)
    assert all(reply.status == 202 for reply in replies)
    assert sorted(reply.json()["seq"] for reply in replies) == list(range(1, 2001))
    assert front.app.door.claims.batches < 1000  # coalesced
