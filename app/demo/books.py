"""What the buyers were told, compared with the orders that the office shows and the supplier's own sums."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from app.demo.crowd import Buyer


@dataclass(frozen=True)
class Check:
    """One thing that must hold, with both sides' numbers."""

    name: str
    ok: bool
    left: Any
    right: Any


KEEPS_UNIT = frozenset({"reserved", "paid", "refunding"})
EVER_WON = frozenset({"reserved", "paid", "expired", "refunded"})


def close_books(
    people: list[Buyer], orders: list[dict[str, Any]], units: int
) -> tuple[dict[str, int], list[Check]]:
    """Compare what the buyers were told with the orders that exist. Returns the figures and the checks."""
    of_buyer = Counter(order["buyer_id"] for order in orders)
    numbers = {order["order_no"]: order for order in orders}
    states = Counter(order["state"] for order in orders)
    kept = sum(order["units"] for order in orders if order["state"] in KEEPS_UNIT)
    lost = [buyer for buyer in people if was_promised(buyer) and not of_buyer[buyer.buyer_id]]
    foreign = [
        buyer
        for buyer in people
        if buyer.order_no is not None
        and (buyer.order_no not in numbers or numbers[buyer.order_no]["buyer_id"] != buyer.buyer_id)
    ]
    doubled = [buyer for buyer in people if len(buyer.ticket_ids) > 1 or of_buyer[buyer.buyer_id] > 1]
    told_paid = {buyer.buyer_id for buyer in people if buyer.state == "paid"}
    paid = {order["buyer_id"] for order in orders if order["state"] == "paid"}
    unended = [buyer for buyer in people if buyer.state == "waiting" or buyer.state == "claimed"]
    bent = Counter(buyer.bent for buyer in people if buyer.bent)
    figures = {
        "buyers": len(people),
        "units": units,
        "joined": sum(1 for buyer in people if buyer.ticket_ids),
        "claimed": len(orders),
        "reserved": len(orders),
        "paid": states["paid"],
        "expired": states["expired"],
        "released": states["expired"] + states["cancelled"] + states["refunded"],
        "standby_wins": sum(1 for buyer in people if buyer.was_standby and of_buyer[buyer.buyer_id]),
        "refunded": states["refunded"],
        "oversold": max(0, kept - units),
        "duplicates": len(doubled),
        "lost": len({buyer.buyer_id for buyer in (*lost, *foreign)}),
    }
    checks = [
        Check("units kept by orders never exceed the units on sale", kept <= units, kept, units),
        Check(
            "everyone who was promised a unit has an order",
            not lost and not foreign,
            len(lost) + len(foreign),
            0,
        ),
        Check("one ticket and one order a buyer, however often they tapped", not doubled, len(doubled), 0),
        Check("buyers who were told paid = paid orders", told_paid == paid, len(told_paid), len(paid)),
        Check("nobody is left without an answer", not unended, len(unended), 0),
        Check("what a buyer was told never went backwards", not bent, dict(bent) or 0, 0),
    ]
    return figures, checks


def compare_money(orders: list[dict[str, Any]], supplier: dict[str, Any]) -> list[Check]:
    """Compare the orders with the supplier's own sums: money that came, went back, and call-backs that were forged."""
    kept = supplier.get("captured_minor", 0) - supplier.get("refunded_minor", 0)
    sold = sum(order["amount_minor"] for order in orders if order["state"] == "paid")
    forged = supplier.get("forged_taken", 0)
    return [
        Check("the supplier's captures - refunds = the sum of paid orders", kept == sold, kept, sold),
        Check("forged call-backs that were believed", forged == 0, forged, 0),
    ]


def was_promised(buyer: Buyer) -> bool:
    """Told `reserved` (or what only follows it), or told `claimed` and nothing since."""
    return any(state in EVER_WON for state in buyer.states) or buyer.state == "claimed"
