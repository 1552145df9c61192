"""What everyone may see: sales, board, draw, time; validators, CORS, probes, metrics, pages."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from app import draw as drawing
from tests.front.conftest import ORIGIN, SEED, Front, Open, Shop, until
from tests.front.wire import Wire, crowd, join_bytes
from tests.machine import mostly_within

Seen = Callable[..., Awaitable[Any]]


async def test_facts_of_a_sale(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    answer = await front.http.get("/v1/sales/x")
    told = answer.json()
    assert told["state"] == "line_open" and told["title"] == "Sale x"
    assert [item["sku"] for item in told["items"]] == ["A", "B"]
    assert told["items"][0]["availability"] == "plenty"
    assert told["draw"]["seed_hash"] == drawing.seed_hash(SEED)
    assert answer.headers["cache-control"] == "public, max-age=1"
    assert SEED.hex() not in answer.text


async def test_etags_answer_304_until_something_changes(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    for path in ("/v1/sales/x", "/v1/sales/x/board", "/v1/sales", "/v1/sales/x/draw"):
        first = await front.http.get(path)
        etag = first.headers["etag"]
        for given in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            again = await front.http.get(path, headers={"If-None-Match": given})
            assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == etag
        assert (await front.http.get(path, headers={"If-None-Match": '"other"'})).status_code == 200
    before = (await front.http.get("/v1/sales/x/board")).headers["etag"]
    await front.join("x", "ann")
    await seen(
        true=lambda view: view.order[0].shown[1:2] == (2,)
    )  # what documents are made of: a look has seen it
    after = await front.http.get("/v1/sales/x/board", headers={"If-None-Match": before})
    assert after.status_code == 200 and after.json()["items"][0]["line"] == 1


@pytest.mark.serial
async def test_a_switch_is_live_on_every_door_within_200_ms(open_door: Open, shop: Shop, seen: Seen) -> None:
    doors = [await open_door(snapshot_every_ms=100), await open_door(snapshot_every_ms=100)]
    await shop.publish()
    for door in doors:
        await seen(door=door)
    words = itertools.cycle(((1, "paused"), (0, "open")))

    async def switch() -> None:
        paused, word = next(words)
        await shop.switch("x", paused=paused)
        for door in doors:
            snapshots = door.app.door.snapshots
            await until(lambda s=snapshots, w=word: s.state(s.get("x")) == w)  # type: ignore[misc]
            assert (await door.http.get("/v1/sales/x/board")).json()["state"] == word

    await mostly_within(0.2, switch)


@pytest.mark.serial
async def test_a_new_sale_is_seen_within_200_ms(open_door: Open, shop: Shop) -> None:
    front = await open_door(snapshot_every_ms=100)
    numbers = itertools.count()

    async def publish() -> None:
        name = f"s{next(numbers)}"
        await shop.publish(name)
        await until(lambda: front.app.door.snapshots.get(name))

    await mostly_within(0.2, publish)


async def test_sales_are_listed_by_state_and_page(front: Front, shop: Shop, seen: Seen) -> None:
    for number in range(5):
        await shop.publish(f"s{number}", opens_in_s=60 if number % 2 else -1)
    await seen("s4")
    assert [one["id"] for one in (await front.http.get("/v1/sales?state=line_open")).json()["data"]] == [
        "s1",
        "s3",
    ]
    names, cursor = [], None
    while True:
        query = {"limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = (await front.http.get("/v1/sales", params=query)).json()
        names += [one["id"] for one in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert names == [f"s{number}" for number in range(5)]
    for bad in ("limit=0", "limit=1001", "limit=x", "state=odd", "cursor=abc", f"cursor={'A' * 600}"):
        answer = await front.http.get(f"/v1/sales?{bad}")
        assert answer.status_code == 422 and answer.json()["code"] == "invalid" and answer.json()["errors"], (
            bad
        )


async def test_the_clock_never_runs_back(front: Front) -> None:
    times = [(await front.http.get("/v1/time")).json()["now_ms"] for _ in range(5)]
    assert times == sorted(times) and abs(times[-1] - time.time() * 1000) < 60_000


async def test_the_draw_can_be_recomputed_by_anyone(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(units=5, opens_in_s=60)
    await seen()
    before = (await front.http.get("/v1/sales/x/draw")).json()
    assert before["seed"] is None and before["items"][0]["n"] is None and before["items"][0]["chain"] is None
    early = await front.http.get("/v1/sales/x/draw/entries")
    assert early.status_code == 403 and early.json()["code"] == "not_drawn_yet"
    replies = await crowd(front.url, [join_bytes("x", f"b{number}") for number in range(40)])
    tickets = [reply.json() for reply in replies]
    await shop.open_now("x")

    async def opened() -> bool:
        return bool((await shop.advance("x")).__class__.__name__ == "Served")

    await until(opened)
    await seen(true=lambda view: view.order[0].drawn)
    told = (await front.http.get("/v1/sales/x/draw")).json()
    assert drawing.seed_hash(bytes.fromhex(told["seed"])) == before["seed_hash"]
    item = told["items"][0]
    lines = (await front.http.get("/v1/sales/x/draw/entries?sku=A")).text.splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["seq"] for entry in entries] == list(range(1, item["n"] + 1))
    start = drawing.chain_start("x", "A", 1, told["seed_hash"])
    chain = drawing.chain_head(start, (bytes.fromhex(entry["ticket_hash"]) for entry in entries))
    assert chain == item["chain"]
    assert drawing.draw_key(bytes.fromhex(told["seed"]), chain, item["beacon_used"]) == item["key"]
    keys = drawing.round_keys(item["key"], item["n"])
    found = {f"{entry['seq']}-{entry['ticket_hash']}" for entry in entries}
    for ticket in tickets:
        assert ticket["ticket_id"] in found
        shown = (await front.poll(ticket["ticket"])).json()
        assert shown["rank"] == drawing.rank_of(ticket["seq"], item["n"], keys)
    both = (await front.http.get("/v1/sales/x/draw/entries")).text.splitlines()
    assert both == lines  # nobody joined for B
    assert (await front.http.get("/v1/sales/x/draw/entries?sku=Z")).json()["code"] == "no_such_item"


async def test_cors_for_the_shop_and_nobody_else(
    front: Front, open_door: Open, shop: Shop, seen: Seen
) -> None:
    await shop.publish()
    await seen()
    wanted = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    for path in ("/v1/sales/x/tickets", "/v1/tickets/abc", "/v1/sales/x/pass", "/nowhere"):
        allowed = await front.http.options(path, headers={"Origin": ORIGIN, **wanted})
        assert allowed.status_code == 204
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "DELETE" in allowed.headers["access-control-allow-methods"]
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        other = await front.http.options(path, headers={"Origin": "https://evil.example", **wanted})
        assert "access-control-allow-origin" not in other.headers
    for method, path in (
        ("GET", "/v1/sales/x/board"),
        ("GET", "/v1/sales"),
        ("POST", "/v1/sales/x/tickets"),
        ("GET", "/v1/tickets/x"),
    ):
        answer = await front.http.request(method, path, headers={"Origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        exposed = answer.headers["access-control-expose-headers"]
        assert "ETag" in exposed and "Retry-After" in exposed
        assert answer.headers["vary"] == "Origin"
    closed = await open_door(cors_origins=[])
    answer = await closed.http.options("/v1/time", headers={"Origin": ORIGIN, **wanted})
    assert "access-control-allow-origin" not in answer.headers


async def test_request_ids_are_taken_over_or_made(front: Front) -> None:
    for path in ("/v1/time", "/v1/sales", "/v1/tickets/x", "/nowhere"):
        answer = await front.http.get(path, headers={"X-Request-Id": "shop-123"})
        assert answer.headers.get_list("x-request-id") == ["shop-123"]
        if answer.status_code >= 400:
            assert answer.json()["request_id"] == "shop-123"
        made = {
            (await front.http.get(path, headers={"X-Request-Id": bad})).headers["x-request-id"]
            for bad in ("", "a b", "x" * 65)
        }
        assert len(made) == 3


async def test_health_readiness_and_draining(front: Front) -> None:
    assert (await front.http.get("/healthz")).json() == {"status": "ok"}
    await until(lambda: front.app.door.snapshots.fresh)
    assert (await front.http.get("/readyz")).json() == {"status": "ready", "reasons": []}
    front.app.drain()
    answer = await front.http.get("/readyz")
    assert answer.status_code == 503 and answer.json()["code"] == "draining" and answer.headers["retry-after"]
    assert (await front.http.get("/v1/time")).status_code == 200  # serving on


async def test_metrics_count_answers_for_those_who_may_look(
    front: Front, open_door: Open, shop: Shop, seen: Seen
) -> None:
    await shop.publish()
    await seen()
    await front.join("x", "ann")

    async def counted() -> bool:
        text = (await front.http.get("/metrics")).text
        return (
            'fairdrop_front_answers_total{outcome="claimed",route="join"}' in text
            and "fairdrop_front_join_batches" in text
        )

    await until(counted)
    closed = await open_door(metrics_allow="10.0.0.0/8")
    answer = await closed.http.get("/metrics")
    assert answer.status_code == 403 and answer.json()["code"] == "forbidden"


@pytest.mark.parametrize(
    "path", ["/", "/s/x", "/docs", "/pages/buyer.js", "/pages/buyer.css", "/pages/docs.js", "/favicon.ico"]
)
async def test_pages_need_nothing_from_elsewhere(path: str, front: Front) -> None:
    answer = await front.http.get(path)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    outside = answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in outside and "https://" not in outside
    assert (await front.http.get(path, headers={"If-None-Match": answer.headers["etag"]})).status_code == 304


async def test_a_head_is_answered_like_the_page_or_probe_without_its_body(front: Front) -> None:
    for path in ("/", "/s/x", "/docs", "/pages/buyer.js", "/healthz", "/readyz"):
        whole, head = await front.http.get(path), await front.http.head(path)
        assert head.status_code == 200 and head.content == b"" and whole.content
        for name in ("content-type", "content-length", "cache-control"):
            assert head.headers[name] == whole.headers[name], (path, name)


async def test_only_a_captcha_that_is_set_may_come_from_elsewhere(open_door: Callable[..., Any]) -> None:
    plain = await open_door(captcha_origins=["https://frames.example"])
    assert "example" not in (await plain.http.get("/s/x")).headers["content-security-policy"]
    front = await open_door(
        captcha_script_url="https://captcha.example/api.js?render=explicit",
        captcha_origins=["https://*.captcha.example"],
    )
    rules = dict(
        rule.split(" ", 1)
        for rule in (await front.http.get("/s/x")).headers["content-security-policy"].split("; ")
    )
    also = "https://captcha.example https://*.captcha.example"
    for directive in ("script-src", "style-src", "connect-src"):
        assert rules[directive] == f"'self' {also}"
    assert rules["frame-src"] == also and rules["default-src"] == "'none'"


async def test_redis_away_is_503_with_retry_after_and_heals(
    front: Front, valkey: Any, shop: Shop, seen: Seen
) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    valkey.kill()
    try:
        answer = await front.join("x", "bob")
        assert (
            answer.status_code == 503
            and answer.json()["code"] == "busy"
            and int(answer.headers["retry-after"]) >= 1
        )
        ready = await front.http.get("/readyz")
        assert ready.status_code == 200
        await until(lambda: not front.app.door.link.connected)
        assert (await front.http.get("/readyz")).json()["reasons"]
        for method, path in (
            ("DELETE", f"/v1/tickets/{ticket}"),
            ("POST", "/v1/sales/x/pass"),
            ("GET", "/v1/sales/x/ticket"),
        ):
            answer = await front.http.request(method, path, headers={"X-Buyer-Id": "ann"})
            assert answer.status_code == 503 and answer.headers["retry-after"], path
        assert (await front.http.get("/v1/time")).status_code == 200
    finally:
        valkey.start()
    await until(lambda: front.app.door.link.connected)
    # The restarted Redis has another run_id: until the worker has re-armed the sale, nothing is told or taken.
    assert (await front.poll(ticket)).status_code == 503
    await until(lambda: shop.link.connected)
    old = (await shop.link.call("HGET", "{sale:x}:sale", "home")).decode()
    await shop.scripts.sale_rearm(
        sale="x", epoch=1, old_home=old, new_home=shop.link.run_id, pulse_at_least=0
    )

    async def told() -> bool:
        answer = await front.poll(ticket)
        return answer.status_code == 200 and answer.json()["state"] == "waiting"

    await until(told)
    assert (await front.join("x", "ann")).json()["ticket"] == ticket


async def test_a_door_that_starts_without_redis_serves_as_soon_as_it_is_there(
    valkey: Any, redis_url: str, open_door: Open
) -> None:
    valkey.kill()
    try:
        front = await open_door()
        assert (await front.http.get("/readyz")).status_code == 200
        answer = await front.join("x", "ann")
        assert answer.status_code == 503 and answer.headers["retry-after"]
    finally:
        valkey.start()
    await until(lambda: front.app.door.snapshots.fresh)
    assert (await front.join("x", "ann")).json()["code"] == "no_such_sale"


async def test_an_unknown_path_method_and_upgrade(front: Front) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/sales/x/", 404),
        ("GET", "/v1/tickets/", 404),
        ("PUT", "/v1/sales/x", 405),
        ("DELETE", "/v1/time", 405),
        ("POST", "/v1/sales//tickets", 404),
        ("GET", "/v1/sales/../../etc/passwd", 404),
        ("GET", "/pages/../front.py", 404),
        ("GET", "/pages/..%2ffront.py", 404),
        ("GET", "/v1/sales/%00", 404),
    ):
        wire = Wire(front.url)
        answer = await wire.request(method, path)
        await wire.close()
        assert answer.status == status, (method, path, answer.body)
        assert answer.json()["code"] == (
            "not_found" if status == 404 and path != "/v1/sales/%00" else answer.json()["code"]
        )
        assert answer.headers["content-type"] == "application/problem+json"


async def test_sales_that_end_are_still_shown(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    await shop.switch("x", closed=1)
    await shop.announce("x", ended=True)
    await seen(true=lambda view: view.closed)
    assert (await front.http.get("/v1/sales/x")).json()["state"] == "closed"
    assert (await front.http.get("/v1/sales/x/board")).status_code == 200


async def test_a_sale_that_redis_has_lost_is_busy_not_absent(front: Front, shop: Shop, seen: Seen) -> None:
    """A buyer must not throw the ticket away: the sale may be rebuilt."""
    await shop.publish(opens_in_s=60)
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    await shop.link.call("FLUSHALL")
    await until(lambda: front.app.door.snapshots.get("x") is None)
    for answer in (
        await front.poll(ticket),
        await front.http.get("/v1/sales/x"),
        await front.join("x", "ann"),
    ):
        assert answer.status_code == 503 and answer.json()["code"] == "busy"
    await shop.publish(opens_in_s=60)
    await seen()
    assert (await front.http.get("/v1/sales/x")).status_code == 200


async def test_bodies_without_a_length_are_bounded_too(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    head = (
        b"POST /v1/sales/x/%b HTTP/1.1\r\nhost: x\r\nx-buyer-id: ann\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    for path in (b"tickets", b"pass"):
        wire = Wire(front.url)
        answer = await wire.send(head % path + chunk * 5 + b"0\r\n\r\n")
        assert answer.status == 413 and answer.json()["code"] == "too_large"
        await wire.close()
        wire = Wire(front.url)
        good = b'{"sku":"A","units":1}' if path == b"tickets" else b'{"source":"a"}'
        answer = await wire.send(head % path + b"%x\r\n%b\r\n0\r\n\r\n" % (len(good), good))
        assert answer.status in (201, 202)
        await wire.close()


async def test_the_board_says_why_a_sale_is_slow_and_stops_saying_it_by_the_clock(
    front: Front, shop: Shop, seen: Any
) -> None:
    """Nobody has to take the words back: an advisor that died leaves no sale slow for ever."""
    await shop.publish()
    await seen()
    assert (await front.http.get("/v1/sales/x/board")).json()["slowdown"] is None
    await shop.scripts.sale_advise(
        sale="x",
        epoch=1,
        slow_milli=2_000,
        base_milli=9_000,
        reason="payment_down",
        notices="",
        lease_ms=1_500,
    )

    async def slowdown() -> Any:
        return (await front.http.get("/v1/sales/x/board")).json()["slowdown"]

    async def told() -> bool:
        return bool(await slowdown() == "payment_down")

    async def over() -> bool:
        return await slowdown() is None

    await until(told)
    await until(over)
