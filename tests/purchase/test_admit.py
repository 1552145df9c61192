"""The line moves without Postgres; what happens by the clock is noted once Postgres is there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from app.errors import DidNotHappen
from app.purchase import admit
from app.purchase.admit import Course, fetch_beacon, listed
from tests.ledger.shop import SALE, Shop


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


@pytest.fixture
def course(shop: Shop) -> Course:
    return Course(shop.engine, shop.link, shop.scripts, shop.admitter)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    def answer(request: httpx.Request) -> httpx.Response:
        match request.url.path:
            case "/drand":
                return httpx.Response(200, json={"round": 7, "randomness": "abcd"})
            case "/page":
                return httpx.Response(200, text="the index closed at 7")
            case "/large":
                return httpx.Response(200, content=b"x" * 70_000)
            case _:
                return httpx.Response(404)

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        yield client


async def test_a_tick_serves_who_waits_since_before_the_opening(shop: Shop) -> None:
    await shop.publish(3, state="scheduled", opened_at=None, opens_at=ago(-60), draw_freeze_s=0)
    answers = await shop.join("a", "b", "c", "d", "e")
    assert [type(answer).__name__ for answer in answers] == ["Waits"] * 5
    assert await shop.admitter.tick() == 0
    await shop.link.call("HSET", shop.keys.sale, "opens_ms", int(time.time() * 1000) - 1)
    assert await shop.admitter.tick() > 0
    assert await shop.left() == 0
    assert await shop.backlog() == 3
    assert await shop.confirm() == 3
    await shop.conserved()


async def test_many_in_a_row_who_left_do_not_hold_up_the_tick(shop: Shop) -> None:
    shop.settings.line_serve_max = 4
    await shop.publish(50, opens_at=ago(-60), opened_at=None, state="scheduled", draw_freeze_s=0)
    await shop.join(*(f"b{n}" for n in range(40)))
    for seq in range(1, 39):  # nearly everyone: whatever the draw says, whole calls pass only people who left
        await shop.scripts.line_leave(sale=SALE, epoch=1, sku="A", seq=seq)
    await shop.link.call("HSET", shop.keys.sale, "opens_ms", int(time.time() * 1000) - 1)
    assert await shop.admitter.tick() == 2


async def test_a_turn_ends_and_says_that_there_is_more(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admit, "TURN_S", 0.0)
    shop.settings.line_serve_max = 4
    await shop.publish(50, opens_at=ago(-60), opened_at=None, state="scheduled", draw_freeze_s=0)
    await shop.join(*(f"b{n}" for n in range(9)))
    await shop.link.call("HSET", shop.keys.sale, "opens_ms", int(time.time() * 1000) - 1)
    assert [await shop.admitter.turn() for _ in range(3)] == [True, True, False]
    assert await shop.backlog() == 9


async def test_waiting_for_tokens_is_no_work(shop: Shop) -> None:
    await shop.publish(50, opens_at=ago(-60), opened_at=None, state="scheduled", draw_freeze_s=0)
    await shop.join(*(f"b{n}" for n in range(9)))
    await shop.link.call("HSET", shop.keys.sale, "rate_milli", 1_000, "burst", 1, "tokens_micro", 1_000_000)
    await shop.link.call("HSET", shop.keys.sale, "opens_ms", int(time.time() * 1000) - 1)
    assert await shop.admitter.tick() == 1
    assert not shop.admitter.more


async def test_the_line_moves_while_postgres_is_away(shop: Shop) -> None:
    await shop.publish(2, opens_at=ago(-60), opened_at=None, state="scheduled", draw_freeze_s=0)
    await shop.join("a", "b")
    await shop.engine.dispose()
    shop.admitter = type(shop.admitter)(shop.link, shop.scripts, shop.settings)  # which has no engine at all
    await shop.link.call("HSET", shop.keys.sale, "opens_ms", int(time.time() * 1000) - 1)
    assert await shop.admitter.tick() > 0
    assert await shop.backlog() == 2


@pytest.mark.parametrize(("field", "value"), [("paused", "1"), ("closed", "1")])
async def test_a_paused_or_closed_sale_admits_nobody(shop: Shop, field: str, value: str) -> None:
    await shop.publish(0, standby=True)
    await shop.join("a")
    await shop.link.call("HSET", shop.keys.stock, "A", 5)
    await shop.link.call("HSET", shop.keys.sale, field, value)
    assert await shop.admitter.tick() == 0
    assert await shop.left() == 5


async def test_a_sale_without_its_key_or_that_has_ended_is_not_watched(shop: Shop) -> None:
    await shop.publish()
    await shop.link.call("HSET", "fairdrop:sales", "ghost", b'{"version":1,"ended":false}')
    await shop.admitter.tick()
    assert set(shop.admitter.watched) == {SALE}
    await shop.link.call("HSET", "fairdrop:sales", SALE, b'{"version":2,"ended":true}')
    await shop.admitter.tick()
    assert shop.admitter.watched == {}


def test_facts_that_a_newer_release_wrote_do_not_hide_a_sale() -> None:
    assert listed([b"a", b"\xc1 not json", b"b", b'{"ended":true}']) == [("a", False), ("b", True)]


async def test_the_beacon_is_fetched_after_the_freeze_and_never_before_whatever_ails_another_sale(
    shop: Shop, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.publish(3, opens_at=ago(-60), opened_at=None, state="scheduled", draw_freeze_s=30,
                       beacon="https://beacon.test/drand")  # fmt: skip
    await shop.admitter.tick()
    assert await shop.admitter.put_beacons(client) == 0
    assert await shop.link.call("HGET", shop.keys.sale, "beacon_value") == b""
    await shop.link.call("HSET", shop.keys.sale, "freeze_ms", int(time.time() * 1000) - 1)
    await shop.admitter.tick()
    put = shop.scripts.beacon_put

    async def unless_away(*, sale: str, **given: Any) -> Any:
        if sale == "away":
            raise DidNotHappen("its node of the cluster is away")
        return await put(sale=sale, **given)

    monkeypatch.setattr(shop.scripts, "beacon_put", unless_away)
    mine = shop.admitter.watched[SALE]
    shop.admitter.watched = {"away": replace(mine, sale="away"), SALE: mine}
    with pytest.raises(DidNotHappen):
        await shop.admitter.put_beacons(client)
    assert await shop.link.call("HGET", shop.keys.sale, "beacon_value") == b"abcd"
    await shop.admitter.tick()
    assert await shop.admitter.put_beacons(client) == 0
    await shop.admitter.note_beacons(shop.engine)
    (sale,) = await shop.sql("SELECT beacon_value, beacon_at FROM sale")
    assert sale["beacon_value"] == "abcd"
    assert sale["beacon_at"] is not None


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("https://beacon.test/drand", "abcd"),
        ("https://beacon.test/page", hashlib.sha256(b"the index closed at 7").hexdigest()),
        ("https://beacon.test/large", None),
        ("https://beacon.test/none", None),
        ("dice:rolled-on-stage", None),
        ("none", None),
    ],
)
async def test_a_beacon_is_a_documents_randomness_or_the_hash_of_a_page(
    client: httpx.AsyncClient, source: str, value: str | None
) -> None:
    assert await fetch_beacon(client, source) == value


async def events_of(shop: Shop) -> list[str]:
    return [
        row["type"]
        for row in await shop.sql("SELECT type FROM event WHERE order_no IS NULL ORDER BY written")
    ]


async def state_of(shop: Shop) -> Any:
    return (await shop.sql("SELECT * FROM sale"))[0]


async def test_opening_selling_out_and_closing_are_noted_once_each(shop: Shop, course: Course) -> None:
    await shop.publish(1, state="scheduled", opened_at=None)
    await shop.claim("ann")
    await shop.admitter.tick()
    for _ in range(3):
        await course.note()
        await shop.admitter.tick()
    sale = await state_of(shop)
    assert sale["state"] == "open"
    assert sale["sold_out_at"] is not None
    await shop.sql("UPDATE sale SET closes_at = now() - interval '1 second'")
    for _ in range(2):
        await course.note()
    sale = await state_of(shop)
    assert sale["state"] == "closed"
    assert await events_of(shop) == ["sale.opened", "sale.sold_out", "sale.closed"]
    await shop.relay()
    assert await shop.link.call("HGET", shop.keys.sale, "closed") == b"1"
    assert await shop.admitter.tick() == 0


async def test_a_top_up_takes_sold_out_back(shop: Shop, course: Course) -> None:
    await shop.publish(1)
    await shop.claim("ann")
    await shop.admitter.tick()
    await shop.admitter.tick()
    await course.note()
    assert (await state_of(shop))["sold_out_at"] is not None
    await shop.link.call("HSET", shop.keys.stock, "A", 2)
    await course.note()
    assert (await state_of(shop))["sold_out_at"] is None


async def test_a_sale_that_is_not_due_stays_as_it_is(shop: Shop, course: Course) -> None:
    await shop.publish(1, state="scheduled", opened_at=None, opens_at=ago(-60))
    await shop.admitter.tick()
    assert await course.note() == 0
    assert (await state_of(shop))["state"] == "scheduled"
