"""Tickets: a true place without Redis while waiting, nothing told to strangers, states that never run backwards."""

from __future__ import annotations

import asyncio
import base64
import random
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from app.answers import Fenced, MarkedEach, Rebuilt
from app.draw import rank_of, round_keys
from app.keys import SaleKeys
from app.purchase.told import status_json
from app.sealing import CannotOpen, address_aad, payer_aad, sealing_keys, unseal
from tests.front.conftest import PII_KEY, Front, Open, Shop, until
from tests.front.wire import crowd, get_bytes, join_bytes

Seen = Callable[..., Awaitable[Any]]


async def test_waiting_in_the_draw_tells_no_rank_and_points_past_the_opening(
    front: Front, shop: Shop, seen: Seen
) -> None:
    await shop.publish(opens_in_s=30)
    await seen()
    joined = (await front.join("x", "ann")).json()
    for told in (joined, (await front.poll(joined["ticket"])).json()):
        assert told["state"] == "waiting"
        assert told["rank"] is None and told["ahead"] is None and told["eta_s"] is None
        opens_ms = front.app.door.snapshots.get("x").opens_ms  # type: ignore[union-attr]
        assert told["now_ms"] + told["poll_after_ms"] > opens_ms


async def test_polls_of_waiting_buyers_make_no_redis_call(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(units=3, opens_in_s=60, rate_milli=5_000, burst=1)
    await seen()
    replies = await crowd(front.url, [join_bytes("x", f"b{number}") for number in range(20)], 10)
    joined = [reply.json() for reply in replies]
    await shop.open_now("x")
    await until(lambda: front.app.door.snapshots.state(front.app.door.snapshots.get("x")) == "open")  # type: ignore[arg-type]
    await until(lambda: _served(shop))
    await seen(true=lambda view: view.order[0].served >= 1)
    read_before = front.app.door.tracker.read_count
    view = front.app.door.snapshots.get("x")
    assert view is not None
    drawn, ahead = view.order[0], {}
    assert drawn.drawn_n == 20
    for doc in joined:
        told = (await front.poll(doc["ticket"])).json()
        if told["state"] == "waiting":
            ahead[told["rank"]] = told["ahead"]
            assert told["rank"] == rank_of(told["seq"], 20, round_keys(drawn.drawn_key, 20))
            assert told["ahead"] == told["rank"] - view.order[0].served - 1
            assert told["eta_s"]["p50"] <= told["eta_s"]["p90"]
    assert len(ahead) == 20 - view.order[0].served
    assert (
        front.app.door.tracker.read_count - read_before == view.order[0].served
    )  # only those whose turn has come


async def _served(shop: Shop) -> bool:
    await shop.advance("x")
    return int(await shop.link.call("HGET", SaleKeys("x").item("A"), "served") or 0) >= 1


async def test_a_winner_follows_the_ticket_from_claimed_to_paid(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    assert (await front.poll(ticket, "ann")).json()["state"] == "claimed"
    link = {"channel": "sandbox", "state": "ready", "kind": "redirect", "url": "https://pay.example/1"}
    await shop.mark("x", 1, b"r", version=2, payment=link)
    told = (await front.poll(ticket, "ann")).json()
    assert told["state"] == "reserved" and told["order"]["state"] == "reserved"
    assert told["payment"]["url"] == "https://pay.example/1"
    for stranger in (None, "bob"):
        hidden = (await front.poll(ticket, stranger)).json()
        assert hidden["state"] == "reserved" and hidden["order"] is None and hidden["payment"] is None
    await shop.mark("x", 1, b"p", version=3)
    told = (await front.poll(ticket, "ann")).json()
    assert told["state"] == "paid" and told["poll_after_ms"] is None


async def test_a_text_that_no_channel_took_is_the_message_of_the_buyers_own_ticket(
    front: Front, shop: Shop, seen: Seen
) -> None:
    await shop.publish()
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    await shop.switch("x", message="for everyone")
    await shop.mark("x", 1, b"r", version=2, text="恭喜")
    assert (await front.poll(ticket, "ann")).json()["message"] == "恭喜"
    await until(lambda: _message(front, ticket, None, "for everyone"))  # nobody else reads it
    await shop.mark("x", 1, b"p", version=3)
    await until(lambda: _message(front, ticket, "ann", "for everyone"))


async def _message(front: Front, ticket: str, buyer: str | None, said: str) -> bool:
    return bool((await front.poll(ticket, buyer)).json()["message"] == said)


async def test_forged_foreign_and_absent_tickets_are_told_apart_by_nobody(
    front: Front, open_door: Open, shop: Shop, seen: Seen
) -> None:
    await shop.publish()
    await seen()
    mine = (await front.join("x", "ann")).json()["ticket"]
    elsewhere = await open_door(signing_keys="z" * 40)
    await seen(door=elsewhere)
    forged = (await elsewhere.join("x", "eve")).json()["ticket"]
    bodies = set()
    for ticket, buyer, method in (
        (forged, "ann", "GET"),
        ("A" * 60, "ann", "GET"),
        ("x", "ann", "DELETE"),
        (mine, "bob", "DELETE"),
        (forged, "ann", "DELETE"),
    ):
        answer = await front.http.request(method, f"/v1/tickets/{ticket}", headers={"X-Buyer-Id": buyer})
        assert answer.status_code == 404
        told = answer.json()
        del told["request_id"]
        bodies.add(msgspec.json.encode(told))
    paid = await front.http.post(
        f"/v1/tickets/{mine}/payment", json={"channel": "sandbox"}, headers={"X-Buyer-Id": "bob"}
    )
    told = paid.json()
    del told["request_id"]
    bodies.add(msgspec.json.encode(told))
    events = await front.http.get(f"/v1/tickets/{forged}/events")
    told = events.json()
    del told["request_id"]
    bodies.add(msgspec.json.encode(told))
    assert len(bodies) == 1


async def test_any_bent_token_is_refused(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    raw = bytearray(base64.urlsafe_b64decode(ticket + "=" * (-len(ticket) % 4)))
    bent = []
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << (bit % 8)
        bent.append(base64.urlsafe_b64encode(bytes(changed)).decode().rstrip("="))
    bent += [ticket + "=", ticket + "A", ticket[:-1], ticket[:-1] + chr(ord(ticket[-1]) ^ 1), ticket.upper()]
    replies = await crowd(front.url, [get_bytes(f"/v1/tickets/{one}") for one in bent if one != ticket])
    assert {reply.status for reply in replies} == {404}


async def test_leaving_the_line_is_seen_at_once_here_and_soon_elsewhere(
    front: Front, open_door: Open, shop: Shop, seen: Seen
) -> None:
    other = await open_door()
    await shop.publish(opens_in_s=60)
    await seen()
    await seen(door=other)
    ticket = (await front.join("x", "ann")).json()["ticket"]
    await seen(door=other, true=lambda view: view.order[0].next_seq == 2)
    assert (await other.poll(ticket)).json()["state"] == "waiting"
    left = await front.http.delete(f"/v1/tickets/{ticket}", headers={"X-Buyer-Id": "ann"})
    assert left.status_code == 200 and left.json()["state"] == "left" and left.json()["poll_after_ms"] is None
    assert (await front.poll(ticket)).json()["state"] == "left"

    async def gone() -> bool:
        return bool((await other.poll(ticket)).json()["state"] == "left")

    await until(gone)
    again = await front.http.delete(f"/v1/tickets/{ticket}", headers={"X-Buyer-Id": "ann"})
    assert again.status_code == 200 and again.json()["state"] == "left"


async def test_leaving_a_claim_asks_the_worker_once(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    for _ in range(3):
        answer = await front.http.delete(f"/v1/tickets/{ticket}", headers={"X-Buyer-Id": "ann"})
        assert answer.status_code == 202
        assert answer.json()["state"] == "claimed" and answer.json()["leaving"] is True
    asks = await shop.asks("x")
    assert len(asks) == 1 and asks[0].split(b"|")[4] == b"leave"


async def test_what_is_paid_or_unknown_cannot_be_left(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    await shop.mark("x", 1, b"r", version=2, payment={"channel": "card", "state": "unknown"})
    answer = await front.http.delete(f"/v1/tickets/{ticket}", headers={"X-Buyer-Id": "ann"})
    assert answer.status_code == 409 and answer.json()["code"] == "payment_unknown"
    await shop.mark("x", 1, b"p", version=3)
    answer = await front.http.delete(f"/v1/tickets/{ticket}", headers={"X-Buyer-Id": "ann"})
    assert answer.status_code == 409 and answer.json()["code"] == "already_paid"


async def test_asking_for_a_payment(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]

    async def pay(**body: Any) -> Any:
        return await front.http.post(
            f"/v1/tickets/{ticket}/payment",
            json={"channel": "sandbox", **body},
            headers={"X-Buyer-Id": "ann"},
        )

    refused = await pay()
    assert refused.status_code == 409 and refused.json()["code"] == "not_payable"
    await shop.mark("x", 1, b"r", version=2)
    assert (await pay(channel="cowries")).json()["code"] == "unknown_channel"
    for url in (
        "https://shop.example.evil.example/done",
        "https://shop.example/elsewhere",
        "javascript:alert(1)//",
        "https://user@shop.example/done",
        "https://shop.example/done/../x",
    ):
        answer = await pay(return_url=url)
        assert answer.status_code == 422 and answer.json()["code"] == "return_url"
    answer = await pay(return_url="https://shop.example/done/1?x=2", payer={"openid": "o1"})
    assert answer.status_code == 202
    assert (
        answer.json()["payment"]["state"] == "starting" and answer.json()["payment"]["channel"] == "sandbox"
    )
    assert (await pay()).status_code == 202  # the same wish again
    other = await pay(channel="card")
    assert other.status_code == 409 and other.json()["code"] == "payment_in_progress"
    asks = await shop.asks("x")
    assert len(asks) == 1
    arg = asks[0].split(b"|")[5].decode()
    told = msgspec.json.decode(base64.urlsafe_b64decode(arg + "=" * (-len(arg) % 4)))
    sealed = base64.b64decode(told.pop("address"), validate=True)
    payer = base64.b64decode(told.pop("payer")["sealed"], validate=True)
    assert told == {"channel": "sandbox", "return_url": "https://shop.example/done/1?x=2"}
    assert unseal(sealing_keys(PII_KEY), payer, payer_aad("x", b"ann")) == b'{"openid":"o1"}'
    # Where the buyer pays from, for suppliers that must be told: sealed for this sale and buyer, and short.
    seal_keys = sealing_keys(PII_KEY)
    assert unseal(seal_keys, sealed, address_aad("x", b"ann")) == b"127.0.0.1"
    with pytest.raises(CannotOpen):
        unseal(seal_keys, sealed, address_aad("x", b"bob"))
    assert b"127.0.0.1" not in asks[0] and len(arg) < 512
    await shop.mark(
        "x",
        1,
        b"r",
        version=3,
        payment={"channel": "sandbox", "state": "ready", "kind": "redirect", "url": "u"},
    )
    assert (await pay()).json()["payment"]["state"] == "ready"
    assert len(await shop.asks("x")) == 1
    assert (
        await pay(channel="card")
    ).status_code == 202  # another way to pay: the worker closes the first link
    assert len(await shop.asks("x")) == 2


async def test_my_newest_ticket(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish()
    await seen()
    answer = await front.http.get("/v1/sales/x/ticket", headers={"X-Buyer-Id": "ann"})
    assert answer.status_code == 404 and answer.json()["code"] == "no_ticket"
    joined = (await front.join("x", "ann")).json()
    answer = await front.http.get("/v1/sales/x/ticket", headers={"X-Buyer-Id": "ann"})
    assert answer.status_code == 200 and answer.json()["ticket"] == joined["ticket"]
    assert len(await shop.orders("x")) == 1


async def test_sold_out_and_closed_are_told_to_everyone_who_waited(
    front: Front, shop: Shop, seen: Seen
) -> None:
    await shop.publish(units=2, opens_in_s=60)
    await seen()
    tickets = [(await front.join("x", f"b{number}")).json()["ticket"] for number in range(10)]
    await shop.open_now("x")
    await until(lambda: _served(shop))
    await seen(true=lambda view: view.order[0].dead_seq == 10)
    states = sorted([(await front.poll(ticket)).json()["state"] for ticket in tickets])
    assert states == ["claimed"] * 2 + ["sold_out"] * 8

    await shop.publish("y", opens_in_s=60)
    await seen("y")
    ticket = (await front.join("y", "ann")).json()["ticket"]
    await shop.switch("y", closed=1)
    await seen("y", true=lambda view: view.closed)
    told = (await front.poll(ticket)).json()
    assert told["state"] == "closed" and told["poll_after_ms"] is None


async def test_a_ticket_of_a_lost_epoch_has_lapsed(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    await shop.link.call("HSET", SaleKeys("x").sale, "epoch", "2")
    await seen(true=lambda view: view.epoch == 2)
    told = (await front.poll(ticket)).json()
    assert told["state"] == "lapsed" and told["poll_after_ms"] is None


async def test_states_never_run_backwards_while_the_line_moves(
    front: Front, open_door: Open, shop: Shop, seen: Seen
) -> None:
    """Each client polls its tickets through random doors, no faster than it is told to, while the line is served."""
    other = await open_door()
    await shop.publish(units=30, opens_in_s=60)
    await seen()
    await seen(door=other)
    replies = await crowd(front.url, [join_bytes("x", f"b{number}") for number in range(60)])
    tickets = [reply.json()["ticket"] for reply in replies]
    await shop.open_now("x", rate_milli=40_000, burst=5)
    order = {"waiting": 0, "claimed": 1, "sold_out": 1}
    going = True

    async def serve() -> None:
        while going:
            await shop.advance("x")
            await asyncio.sleep(0.02)

    async def follow(ticket: str) -> None:
        rank, ahead = 0, sys.maxsize
        door = front
        while True:
            told = (await door.poll(ticket)).json()
            assert order[told["state"]] >= rank
            if told["state"] == "waiting" and told["ahead"] is not None:
                assert told["ahead"] <= ahead
                ahead = told["ahead"]
            rank = order[told["state"]]
            if rank == 1:
                return
            door = random.choice((front, other))
            for _ in range(
                2
            ):  # two doors may differ by the age of a snapshot: the second look begins after now
                snapshots, look = door.app.door.snapshots, door.app.door.snapshots.looked_at
                await until(lambda s=snapshots, at=look: s.looked_at > at)  # type: ignore[misc]

    server = asyncio.create_task(serve())
    await asyncio.gather(*[follow(ticket) for ticket in tickets])
    going = False
    await server


async def test_nothing_is_kept_for_a_waiting_buyer(front: Front, shop: Shop, seen: Seen) -> None:
    """3,000 waiters polled and forgotten: what lives in the process does not grow with them."""
    import gc

    await shop.publish(opens_in_s=60)
    await seen()

    async def wave(start: int) -> None:
        replies = await crowd(
            front.url, [join_bytes("x", f"w{number}") for number in range(start, start + 1500)]
        )
        await crowd(front.url, [get_bytes(f"/v1/tickets/{reply.json()['ticket']}") for reply in replies])

    await wave(0)
    gc.collect()
    before = len(gc.get_objects())
    await wave(1500)
    gc.collect()
    assert len(gc.get_objects()) - before < 300


@pytest.mark.parametrize("stranger", ["Pass abc", "Bearer abc", "Basic abc", "Pass", "Bearer é"])
async def test_a_bad_identity_is_401_where_it_matters(
    stranger: str, front: Front, shop: Shop, seen: Seen
) -> None:
    await shop.publish()
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    await shop.mark("x", 1, b"r", version=2)
    headers = {b"Authorization": stranger.encode("latin-1")}
    for method, path in (
        ("GET", f"/v1/tickets/{ticket}"),
        ("GET", f"/v1/tickets/{ticket}/events"),
        ("DELETE", f"/v1/tickets/{ticket}"),
        ("GET", "/v1/sales/x/ticket"),
        ("POST", "/v1/sales/x/pass"),
    ):
        answer = await front.http.request(method, path, headers=headers)
        assert answer.status_code == 401 and answer.json()["code"] == "auth_invalid", (method, path)


async def test_a_winner_is_told_that_payment_is_out_of_order_and_that_the_deadline_moved(
    front: Front, shop: Shop, seen: Seen
) -> None:
    await shop.publish()
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    waits = {"channel": "sandbox", "state": "starting"}
    await shop.mark("x", 1, b"r", version=2, payment=waits)
    assert "notice" not in (await front.poll(ticket, "ann")).json()
    await shop.scripts.sale_advise(
        sale="x", epoch=1, slow_milli=-1, base_milli=-1, reason="", notices="payment", lease_ms=60_000
    )
    await seen(true=lambda view: view.notices == "payment")
    notice = (await front.poll(ticket, "ann")).json()["notice"]
    assert notice["code"] == "payment_delayed"
    assert {"zh-CN", "en"} == set(notice["text"])
    assert "notice" not in (await front.poll(ticket, "bob")).json()
    await shop.scripts.sale_advise(
        sale="x", epoch=1, slow_milli=-1, base_milli=-1, reason="", notices="", lease_ms=60_000
    )
    await seen(true=lambda view: view.notices == "")
    await shop.mark("x", 1, b"r", version=3, payment=waits, order={"extended_s": 300})
    told = (await front.poll(ticket, "ann")).json()
    assert told["notice"]["code"] == "deadline_extended"
    assert told["order"]["extended_s"] == 300
    await shop.mark("x", 1, b"p", version=4, payment={"state": "paid"}, order={"extended_s": 300})
    assert "notice" not in (await front.poll(ticket, "ann")).json()


async def test_winners_told_together_each_see_the_whole_order(front: Front, shop: Shop, seen: Seen) -> None:
    """`claims_mark` keeps what they have in common once; a form that went with its epoch is asked for again."""
    await shop.publish(units=3, opens_in_s=-1)
    await seen()
    ann, bob, cid = [(await front.join("x", buyer)).json()["ticket"] for buyer in ("ann", "bob", "cid")]
    whole = status_json(
        {"order_no": "#", "state": "reserved", "amount_minor": 1000, "currency": "EUR", "pay_by": None,
         "leaving": False, "reason": None}, [], None,
    )  # fmt: skip
    before, _, behind = whole.partition(b"#")
    seqs = (1, 2)
    order_nos = [f"{seq:024d}" for seq in seqs]
    marked = await shop.scripts.claims_mark(
        sale="x", epoch=1, sku="A", before=before, behind=behind, seqs=seqs, order_nos=order_nos
    )
    assert marked == MarkedEach("11")
    for _ in range(2):  # the second time from memory
        for seq, (ticket, buyer) in enumerate([(ann, "ann"), (bob, "bob")], 1):
            told = (await front.poll(ticket, buyer)).json()
            assert (told["state"], told["order"]["order_no"]) == ("reserved", f"{seq:024d}")
            assert (told["order"]["amount_minor"], told["payment"]["state"]) == (1000, "none")
    other = b'{"like":"' + b"0" * 16 + b'","order_no":"' + b"9" * 24 + b'"}'
    await shop.link.call("HSET", SaleKeys("x").status, "A:3", b"1|r|" + other)
    assert (await front.poll(cid, "cid")).status_code == 503


async def test_a_front_that_starts_while_a_sale_is_made_anew_denies_no_ticket(
    front: Front, shop: Shop, seen: Seen, open_door: Open
) -> None:
    """Or buyers would be told to forget what they hold: a campaign's storm saw a hundred of them told so."""
    await shop.publish(opens_in_s=-1)
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    await shop.link.call("UNLINK", SaleKeys("x").sale)
    young = await open_door()
    for answer in (await young.poll(ticket, "ann"), await young.join("x", "ann")):
        assert (answer.status_code, answer.json()["code"]) == (503, "busy")
    assert (await young.join("y", "ann")).status_code == 404


async def test_after_a_rebuild_a_winner_keeps_the_ticket_and_the_others_have_lapsed(
    front: Front, shop: Shop, seen: Seen
) -> None:
    await shop.publish(units=2, opens_in_s=-1)
    await seen()
    ann, bob = [(await front.join("x", buyer)).json()["ticket"] for buyer in ("ann", "bob")]
    await shop.mark("x", 1, b"r")
    keys = SaleKeys("x")
    status = await shop.link.call("HGET", keys.status, "A:1")
    sale = await shop.link.call("HGETALL", keys.sale)
    fields = {name.decode(): value for name, value in zip(sale[::2], sale[1::2], strict=True)} | {"epoch": 2}
    hashed = fields.pop("seed_hash").decode()
    # What `fairdrop rebuild` leaves behind when bob's claim was lost with Redis: ann's order, and seqs from 2 on.
    assert await shop.scripts.sale_fence(sale="x", epoch=1) == Fenced()
    assert (await front.join("x", "cid")).json()["code"] == "busy"
    lost = [keys.sale, keys.buyers, keys.status, keys.outcome("A")]
    await shop.link.pipeline(
        [
            ("UNLINK", *lost),
            ("HSET", keys.buyers, "ann", "A:1:1"),
            ("HSET", keys.status, "A:1", status),
            ("SET", keys.outcome("A"), b"r"),
        ]
    )
    items = [("A", 1, 2, "2:2", False), ("B", 2, 1, "2:1", False)]
    for name in ("fmt", "home", "last_ms", "tokens_micro", "opened"):
        fields.pop(name)
    assert (
        await shop.scripts.sale_rebuild(sale="x", fields=fields, items=items, seed_hash=hashed) == Rebuilt()
    )
    await seen(true=lambda view: view.epoch == 2)
    told = (await front.poll(ann, "ann")).json()
    assert (told["state"], told["order"]["state"], told["ticket"]) == ("reserved", "reserved", ann)
    assert (await front.poll(bob, "bob")).json()["state"] == "lapsed"
    new = (await front.join("x", "cid")).json()
    assert (new["state"], new["seq"]) == ("claimed", 2)  # bob's seq, given once more
    told = (await front.poll(bob, "bob")).json()
    assert (told["state"], told["order"]) == ("lapsed", None)
    held = await front.join("x", "ann")
    assert (held.status_code, held.json()["seq"], held.json()["state"]) == (200, 1, "reserved")
    assert held.json()["ticket"] != ann  # signed in the new epoch; both are good
    assert (await front.poll(held.json()["ticket"], "ann")).json()["order"]["state"] == "reserved"
    gone = await front.http.delete(f"/v1/tickets/{ann}", headers={"X-Buyer-Id": "ann"})
    assert (gone.status_code, gone.json()["leaving"]) == (202, True)
