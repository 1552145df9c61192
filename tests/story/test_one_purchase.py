"""The tutorial: read this first. One purchase, from the draft of the sale to the paid order, told as sentences.

Everything here goes over HTTP to a running `fairdrop up` (Valkey, Postgres, front, office, worker, sandbox supplier).
What each sentence causes inside is said beside it; app/purchase/ has one file for each step, in the same order.
"""

from __future__ import annotations

import asyncio

from tests.story.conftest import Town
from tests.story.people import until


async def test_lin_gets_a_phone_at_the_minute(town: Town) -> None:
    # An operator writes the sale and publishes it. Postgres holds the document; `sale_publish` puts its facts, the
    # stock and an empty line for each item into Redis. The hash of the draw's seed is public from now on.
    sale = await town.operator.publishes_a_sale(units=1, opens_in_s=60.0)
    lin, wei = town.buyer("lin", sale), town.buyer("wei", sale)

    # accept: before the minute Lin gets a pass. Her phone number is sealed before it is stored anywhere. From here on
    # no request of hers needs more than one keyed hash to know who she is.
    await lin.gets_a_pass(phone="+8613812345678")

    # admit: she taps once. `line_join` writes her place and remembers her; her ticket is signed and holds that place.
    # Until the draw she has no rank, and is told to ask again after the opening.
    tapped = await lin.taps()
    assert tapped.status_code == 202
    place = tapped.json()
    assert (place["state"], place["rank"], place["order"]) == ("waiting", None, None)

    # Tapping again changes nothing: one buyer, one ticket, however often, from however many phones.
    again = await asyncio.gather(*(lin.taps() for _ in range(20)))
    assert {(answer.status_code, answer.json()["ticket"]) for answer in again} == {(200, place["ticket"])}

    # Wei comes a little later, and will be in the same draw.
    assert (await wei.taps()).status_code == 202

    # (So that nobody has to wait for a minute here, the operator brings the opening forward. It is live at once.)
    await town.operator.opens(sale, in_s=2.0)

    # claim: at the minute the first advance draws the ranks and `served` moves. The unit is taken and the order entry
    # is written in one script: there is no unit without an entry and no entry without a unit. One of the two wins.
    async def winner_is_known() -> tuple[str, str]:
        return (await lin.looks())["state"], (await wei.looks())["state"]

    states = await until(winner_is_known, lambda seen: "reserved" in seen)
    winner, other = (lin, wei) if states[0] == "reserved" else (wei, lin)

    # confirm: the winner was told `reserved`, so the row is committed in Postgres, at the price of the document.
    order = (await winner.is_told("reserved"))["order"]
    [row] = await town.operator.sees_orders(sale)
    assert (row["order_no"], row["buyer_id"], row["state"]) == (order["order_no"], winner.name, "reserved")
    assert (order["amount_minor"], order["currency"]) == (499_900, "CNY")

    # track: the other one has a true place: next, waiting for a unit that may come back.
    waiting = await other.looks()
    assert (waiting["state"], waiting["ahead"], waiting["standby"]) == ("waiting", 0, True)

    # pay: a payment link appears by itself on the ticket (the sale has a default channel). The supplier's signed
    # call-back, not the buyer's word, makes the order paid.
    await winner.pays()
    paid = await winner.is_told("paid")
    assert paid["order"]["state"] == "paid"
    assert paid["poll_after_ms"] is None

    # tell: the shop reads the same in its event feed, in order.
    await until(
        lambda: town.operator.sees_events(sale, order["order_no"]),
        lambda types: types == ["order.reserved", "order.paid"],
    )

    # The operator closes the sale. Whoever still waits is told, whoever has paid keeps the phone.
    await town.operator.closes(sale)
    assert (await other.is_told("closed"))["order"] is None
    assert (await winner.looks())["state"] == "paid"

    # And the books agree: Redis, Postgres and the supplier, every invariant with both sides' numbers.
    await town.operator.audits(sale)
