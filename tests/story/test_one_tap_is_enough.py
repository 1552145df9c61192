"""Third story: however often and from wherever a buyer taps, there is one ticket; and nobody can bend it."""

from __future__ import annotations

import asyncio

import httpx

from tests.story.conftest import Town


async def test_a_hundred_taps_at_once_through_two_front_doors_are_one_ticket(town: Town) -> None:
    sale = await town.operator.publishes_a_sale(units=3, opens_in_s=0.0, limit_per_buyer=2, standby=False)
    lin = town.buyer("lin", sale)

    # `up` runs two front doors here, and the kernel spreads connections over them: no connection is used twice.
    async def tap_from_another_phone() -> httpx.Response:
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=town.urls.front, limits=limits, timeout=60, trust_env=False
        ) as phone:
            return await phone.post(
                f"/v1/sales/{sale}/tickets",
                json={"sku": "PH-128", "units": 1},
                headers={"X-Buyer-Id": lin.name},
            )

    answers = await asyncio.gather(*(tap_from_another_phone() for _ in range(100)))
    assert {answer.status_code for answer in answers} == {200, 202}
    assert sum(answer.status_code == 202 for answer in answers) == 1  # exactly one of them made the ticket
    assert len({answer.json()["ticket"] for answer in answers}) == 1

    # The same buyer with another wish is not a repetition: the answer names the ticket that there is.
    lin.ticket = answers[0].json()["ticket"]
    answer = await lin.taps(units=2)
    assert (answer.status_code, answer.json()["code"]) == (409, "ticket_exists")
    assert answer.json()["ticket"] == lin.ticket

    await lin.is_told("reserved")
    assert len(await town.operator.sees_orders(sale)) == 1
    await town.operator.audits(sale)


async def test_a_ticket_shows_its_place_to_everyone_and_its_order_to_its_buyer_only(town: Town) -> None:
    sale = await town.operator.publishes_a_sale(units=1, opens_in_s=0.0)
    lin, eve = town.buyer("lin", sale), town.buyer("eve", sale)
    await lin.taps()
    await lin.is_told("reserved")

    # Whoever holds the link sees the state, not the order; nor may they give the unit away.
    eve.ticket = lin.ticket
    seen = await eve.looks()
    assert (seen["state"], seen["order"], seen["payment"]) == ("reserved", None, None)
    assert (await eve.leaves()).status_code == 404

    # A ticket with one character changed is as absent as one that never was.
    bent = lin.ticket[:-1] + ("A" if lin.ticket[-1] != "A" else "B")
    forged, absent = [await eve.http.get(f"/v1/tickets/{token}") for token in (bent, "x" * len(bent))]
    assert (forged.status_code, absent.status_code) == (404, 404)
    assert forged.json()["code"] == absent.json()["code"]
