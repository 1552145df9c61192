"""What Postgres refuses, whoever asks: each promise that does not depend on our code being right."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import IntegrityError

from app.ledger.engine import passes, sqlstate_of
from tests.ledger.shop import SALE, Shop

ORDER = (
    "INSERT INTO purchase_order (order_no, sale, sku, buyer_id, epoch, seq, units, amount_minor, currency, state,"
    " claimed_at, pay_within_s) VALUES (:no, 'drop', 'A', :buyer, 1, :seq, :units, 1000, 'EUR', :state, now(), 600)"
)


async def order(shop: Shop, no: str, buyer: str, seq: int, state: str = "reserved", units: int = 1) -> None:
    await shop.sql(ORDER, no=no, buyer=buyer, seq=seq, state=state, units=units)


@pytest.mark.parametrize(
    "change",
    [
        "reserved = 6",
        "reserved = 3, sold = 3",
        "sold = -1",
        "reserved = -1",
        "total = -1",
        "total = 0, reserved = 1",
    ],
)
async def test_never_oversold(shop: Shop, change: str) -> None:
    await shop.publish(5)
    with pytest.raises(IntegrityError, match="never_oversold") as refused:
        await shop.sql(f"UPDATE item SET {change}")
    assert sqlstate_of(refused.value) == "23514"
    assert not passes(refused.value)


@pytest.mark.parametrize(
    ("first", "second"), [("reserved", "reserved"), ("paid", "reserved"), ("paid", "paid")]
)
async def test_a_buyer_has_one_live_order_in_a_sale(shop: Shop, first: str, second: str) -> None:
    await order(shop, "O1", "ann", 1, first)
    with pytest.raises(IntegrityError, match="one_live_order_a_buyer"):
        await order(shop, "O2", "ann", 2, second)


@pytest.mark.parametrize("ended", ["expired", "cancelled", "refunded"])
async def test_an_ended_order_leaves_room_for_another(shop: Shop, ended: str) -> None:
    await order(shop, "O1", "ann", 1, ended)
    await order(shop, "O2", "ann", 2)


async def test_a_ticket_becomes_one_order(shop: Shop) -> None:
    await order(shop, "O1", "ann", 1)
    with pytest.raises(IntegrityError, match="one_order_a_ticket"):
        await order(shop, "O2", "bob", 1)


async def test_an_order_has_one_open_payment_and_one_kept_capture(shop: Shop) -> None:
    await order(shop, "O1", "ann", 1)
    attempt = (
        "INSERT INTO payment_attempt (id, order_no, attempt_no, provider, channel, state, amount_minor, currency)"
        " VALUES (:id, 'O1', :n, 'p', 'c', :state, 1000, 'EUR')"
    )
    await shop.sql(attempt, id="a", n=1, state="sent")
    with pytest.raises(IntegrityError, match="one_open_attempt_an_order"):
        await shop.sql(attempt, id="b", n=2, state="created")
    await shop.sql("UPDATE payment_attempt SET state = 'closed'")
    await shop.sql(attempt, id="b", n=2, state="created")
    capture = (
        "INSERT INTO capture (provider, provider_ref, order_no, amount_minor, currency, state, captured_at)"
        " VALUES ('p', :ref, 'O1', 1000, 'EUR', :state, now())"
    )
    await shop.sql(capture, ref="r1", state="kept")
    await shop.sql(capture, ref="r2", state="due")  # recorded, whatever becomes of it
    with pytest.raises(IntegrityError, match="one_kept_capture_an_order"):
        await shop.sql("UPDATE capture SET state = 'kept'")
    with pytest.raises(IntegrityError, match="one_capture_a_ref"):
        await shop.sql(capture, ref="r1", state="due")


@pytest.mark.parametrize(
    ("change", "law"),
    [
        ("state = 'ajar'", "sale_state_known"),
        ("closes_at = opens_at", "sale_times_in_order"),
        ("opens_at = line_opens_at - interval '1 s'", "sale_times_in_order"),
        ("limit_per_buyer = 0", "limit_positive"),
        ("standby = TRUE, limit_per_buyer = 2", "standby_means_one_unit"),
    ],
)
async def test_a_sale_that_makes_no_sense_is_refused(shop: Shop, change: str, law: str) -> None:
    await shop.publish(1)
    with pytest.raises(IntegrityError, match=law):
        await shop.sql(f"UPDATE sale SET {change} WHERE id = :sale", sale=SALE)
