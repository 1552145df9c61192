"""What a winner is told: the JSON kept in `status` beside the version and the state byte of a ticket.

Made in this one place, by every step that changes an order or its payment (confirm, pay, release), and shown unchanged
by the front door. Pure: rows in, bytes out; no database, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

Row = Mapping[str, Any]

# payment_attempt.state -> payment.state of api.md. `sent` is `ready` only once the link is stored.
_PAYMENT_STATE = {
    "wanted": "starting",  # waits until the attempt before it is closed at the supplier
    "created": "starting",
    "sent": "starting",
    "unknown": "unknown",
    "succeeded": "paid",
    "failed": "failed",
    "closed": "none",  # the link has ended; the buyer may ask for a new one
}
_ONCE_PAID = frozenset({"paid", "refunding", "refunded"})  # order states that follow a kept capture


def instant(at: datetime | None) -> str | None:
    """A time as the API writes it: RFC 3339, UTC, milliseconds, `Z`. None stays None."""
    if at is None:
        return None
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def order_told(order: Row, lines: Sequence[Row]) -> dict[str, Any]:
    """`order` of api.md. `lines` are order_line rows in line_no order.

    extended_s is there only once the deadline was extended: that is rare, and Redis keeps the status of every order.
    """
    extended_s = order.get("extended_s", 0)
    return {
        "order_no": order["order_no"],
        "state": order["state"],
        "amount_minor": order["amount_minor"],
        "currency": order["currency"],
        "lines": [
            {
                "kind": line["kind"],
                "sku": line["sku"],
                "title": line["title"],
                "units": line["units"],
                "unit_minor": line["unit_minor"],
                "amount_minor": line["amount_minor"],
            }
            for line in lines
        ],
        "pay_by": instant(order["pay_by"]),
        **({"extended_s": extended_s} if extended_s else {}),
    }


def payment_told(order: Row, attempt: Row | None) -> dict[str, Any]:
    """`payment` of api.md. `attempt` is the newest payment_attempt row, None if there was none.

    The link is shown only while it can be used: not after it ended, failed or was paid.
    """
    channel: str | None = None
    state = "none"
    code: str | None = None
    kind: str | None = None
    url: str | None = None
    params: Any = None
    expires_at: str | None = None
    if attempt is not None:
        channel = attempt["channel"]
        state = _PAYMENT_STATE.get(attempt["state"], "unknown")
        code = attempt["code"]
        if attempt["state"] == "sent" and attempt["kind"] is not None:
            state, kind, url, params = "ready", attempt["kind"], attempt["url"], attempt["params"]
            expires_at = instant(attempt["expires_at"])
    if order["state"] in _ONCE_PAID:
        state, kind, url, params, expires_at = "paid", None, None, None, None
    elif order["state"] in ("expired", "cancelled") and state in ("ready", "starting"):
        state, kind, url, params, expires_at = "none", None, None, None, None
    return {
        "channel": channel,
        "state": state,
        "kind": kind,
        "url": url,
        "params": params,
        "expires_at": expires_at,
        "code": code,
    }


def status_json(order: Row, lines: Sequence[Row], attempt: Row | None, text: str | None = None) -> bytes:
    """The status of a ticket that has an order row: {"order", "payment", "leaving", "reason"} and, if given, "text".

    order: a purchase_order row (order_no, state, amount_minor, currency, pay_by, reason, leaving).
    lines: its order_line rows in order. attempt: its newest payment_attempt row or None.
    Any mapping with these names will do (SQLAlchemy: `row._mapping`). text: what an SMS would have said, had a channel
    taken it; the buyer's own ticket shows it as its message.
    """
    status = {
        "order": order_told(order, lines),
        "payment": payment_told(order, attempt),
        "leaving": bool(order["leaving"]) and order["state"] == "reserved",
        "reason": order["reason"],
    }
    if text:
        status["text"] = text
    return msgspec.json.encode(status)


def refused_json(reason: str, live_order_no: str | None = None) -> bytes:
    """The status of a claim that Postgres refused: no order; why; and the live order that stood in its way, if any."""
    return msgspec.json.encode(
        {"order": None, "payment": None, "leaving": False, "reason": reason, "live_order": live_order_no}
    )
