"""Second story: a unit that is not paid for, or given back, goes to the next in line at once (候补)."""

from __future__ import annotations

from tests.story.conftest import Town
from tests.story.people import until


async def test_the_next_in_line_gets_the_unit_that_was_not_paid_for(town: Town) -> None:
    # (15 s are short for the first, and long enough for the second to pay on a machine that has other things to do.)
    sale = await town.operator.publishes_a_sale(units=1, opens_in_s=0.0, pay_within_s=15)
    first, second = town.buyer("first", sale), town.buyer("second", sale)

    # The line is empty and there is stock: the first tap takes the unit.
    assert (await first.taps()).status_code == 202
    await first.is_told("reserved")
    # The second waits, first in line, for a unit that may come back.
    assert (await second.taps()).json()["state"] == "waiting"

    # release: Postgres' clock ends the unpaid order; the outbox tells Redis, once; the same script serves the next.
    assert (await first.is_told("expired"))["order"]["state"] == "expired"
    await second.is_told("reserved")
    await second.pays()
    await second.is_told("paid")

    orders = {order["buyer_id"]: order["state"] for order in await town.operator.sees_orders(sale)}
    assert orders == {first.name: "expired", second.name: "paid"}
    await town.operator.audits(sale)


async def test_a_winner_who_leaves_gives_the_unit_to_the_next(town: Town) -> None:
    sale = await town.operator.publishes_a_sale(units=1, opens_in_s=0.0)
    first, second = town.buyer("first", sale), town.buyer("second", sale)
    await first.taps()
    await second.taps()
    await first.is_told("reserved")

    # Leaving a claimed or reserved ticket is asked of the worker; until the release commits, the ticket says so.
    answer = await first.leaves()
    assert (answer.status_code, answer.json()["leaving"]) == (202, True)
    gone = await first.is_told("cancelled")
    assert (gone["order"]["state"], gone["reason"]) == ("cancelled", "left")
    await second.is_told("reserved")
    await town.operator.audits(sale)


async def test_without_standby_nobody_waits_for_stock_that_is_gone(town: Town) -> None:
    sale = await town.operator.publishes_a_sale(units=1, opens_in_s=0.0, standby=False)
    first, second = town.buyer("first", sale), town.buyer("second", sale)
    await first.taps()

    # Sold out is an answer, not a ticket: nothing is stored for whom there is nothing to wait for.
    answer = await second.taps()
    assert (answer.status_code, answer.json()["ticket"], answer.json()["state"]) == (200, None, "sold_out")
    # A repeated tap of the winner still finds the ticket.
    assert (await first.taps()).json()["ticket"] == first.ticket
    await until(first.looks, lambda seen: seen["state"] == "reserved")
    await town.operator.audits(sale)
