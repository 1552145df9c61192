"""What a winner is told of the order and its payment, for every state of both rows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

from app.door.shapes import OrderOut, PaymentOut
from app.purchase.told import refused_json, status_json

LINE = {"kind": "item", "sku": "A", "title": "Item", "units": 2, "unit_minor": 100, "amount_minor": 200}
PAY_BY = datetime(2026, 11, 11, 20, 0, 0, 123_456, timezone(timedelta(hours=8)))


def order(state: str = "reserved", **changed: Any) -> dict[str, Any]:
    return {
        "order_no": "O1", "state": state, "amount_minor": 200, "currency": "EUR", "pay_by": PAY_BY, "reason": None,
        "leaving": False, **changed,
    }  # fmt: skip


def attempt(state: str, **changed: Any) -> dict[str, Any]:
    return {
        "channel": "card", "state": state, "kind": None, "url": None, "params": None, "expires_at": None, "code": None,
        **changed,
    }  # fmt: skip


def told(*rows: Any) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.json.decode(status_json(rows[0], [LINE], rows[1]))
    OrderOut.model_validate(document["order"])
    PaymentOut.model_validate(document["payment"])
    return document


def test_an_order_is_told_in_utc_with_milliseconds() -> None:
    document = told(order(), None)
    assert document["order"]["pay_by"] == "2026-11-11T12:00:00.123Z"
    assert document["order"]["lines"] == [LINE]
    assert document["payment"] == {
        "channel": None, "state": "none", "kind": None, "url": None, "params": None, "expires_at": None, "code": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("order_state", "attempt_state", "payment_state"),
    [
        ("reserved", "wanted", "starting"), ("reserved", "created", "starting"), ("reserved", "sent", "starting"),
        ("reserved", "unknown", "unknown"), ("reserved", "failed", "failed"), ("reserved", "closed", "none"),
        ("paid", "succeeded", "paid"), ("refunding", "succeeded", "paid"), ("refunded", "succeeded", "paid"),
        ("expired", "sent", "none"), ("cancelled", "created", "none"), ("expired", "unknown", "unknown"),
    ],
)  # fmt: skip
def test_payment_states(order_state: str, attempt_state: str, payment_state: str) -> None:
    assert told(order(order_state), attempt(attempt_state))["payment"]["state"] == payment_state


def test_a_link_is_told_only_while_it_can_be_used() -> None:
    link = {
        "kind": "redirect",
        "url": "https://pay.example/1",
        "params": {"a": 1},
        "expires_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    ready = told(order(), attempt("sent", **link))["payment"]
    assert ready["state"] == "ready" and ready["url"] == "https://pay.example/1"
    assert ready["expires_at"] == "2026-01-01T00:00:00.000Z"
    for order_state, attempt_state in (
        ("paid", "sent"),
        ("expired", "sent"),
        ("reserved", "unknown"),
        ("reserved", "closed"),
    ):
        hidden = told(order(order_state), attempt(attempt_state, **link))["payment"]
        assert hidden["url"] is None and hidden["kind"] is None and hidden["params"] is None


def test_leaving_is_told_until_the_release() -> None:
    assert told(order(leaving=True), None)["leaving"] is True
    assert told(order("cancelled", leaving=True, reason="left"), None)["leaving"] is False


def test_a_refused_claim_says_why() -> None:
    document = msgspec.json.decode(refused_json("live_order", "O9"))
    assert document["order"] is None and document["reason"] == "live_order" and document["live_order"] == "O9"
