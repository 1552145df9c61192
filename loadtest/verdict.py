"""Whether the promises were kept: the buyers' memories against the shop's books.

    python -m loadtest.verdict --urls .fairdrop/urls.json --sale SALE

judges a sale by the office's audit and orders alone; under Locust the buyers' memories are judged with them. Exit
status 1: a promise was broken.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest.office import Office, read_urls

SETTLE_WITHIN_S = 30.0  # releases, refunds and SMS that are still on their way when the buyers have gone
KEEPS_UNIT = frozenset({"reserved", "paid", "refunding"})
PROMISED = frozenset({"reserved", "paid", "expired", "refunded"})


@dataclass
class Told:
    """What one buyer was told, in order."""

    buyer_id: str
    tickets: set[str] = field(default_factory=set)
    states: list[str] = field(default_factory=list)
    order_no: str | None = None

    def note(self, document: Mapping[str, Any]) -> None:
        """Remember a ticket document."""
        if document.get("ticket") is not None:
            self.tickets.add(document["ticket_id"])
            if document["order"] is not None:
                self.order_no = document["order"]["order_no"]
        if not self.states or self.states[-1] != document["state"]:
            self.states.append(document["state"])

    def row(self) -> list[Any]:
        """As plain data: load processes on other machines send it to the master."""
        return [self.buyer_id, sorted(self.tickets), self.states, self.order_no]

    @classmethod
    def of(cls, row: list[Any]) -> Told:
        return cls(row[0], set(row[1]), list(row[2]), row[3])


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    left: Any
    right: Any


def judge(
    told: Iterable[Told], orders: list[dict[str, Any]], audit: Mapping[str, Any], units: int | None
) -> list[Check]:
    """Every promise with both sides' numbers. units None: not known, so only the audit judges overselling."""
    memories = list(told)
    of_buyer = Counter(order["buyer_id"] for order in orders)
    numbers = {order["order_no"]: order["buyer_id"] for order in orders}
    kept = sum(order["units"] for order in orders if order["state"] in KEEPS_UNIT)
    promised = [memory for memory in memories if PROMISED & set(memory.states)]
    lost = [memory for memory in promised if not of_buyer[memory.buyer_id]]
    foreign = [
        memory for memory in memories if memory.order_no and numbers.get(memory.order_no) != memory.buyer_id
    ]
    doubled = [m.buyer_id for m in memories if len(m.tickets) > 1] + [
        b for b, count in of_buyer.items() if count > 1
    ]
    checks = [
        Check(check["name"], bool(check["ok"]), check["left"], check["right"]) for check in audit["checks"]
    ]
    if units is not None:
        checks.append(
            Check("units kept by orders never exceed the units on sale", kept <= units, kept, units)
        )
    checks += [
        Check(
            "buyers who were promised a unit have an order",
            not lost,
            len(promised) - len(lost),
            len(promised),
        ),
        Check("an order number told is that buyer's order", not foreign, len(foreign), 0),
        Check("one ticket and one order a buyer", not doubled, len(doubled), 0),
    ]
    return checks


def settled(
    office: Office, sale: str, within_s: float = SETTLE_WITHIN_S
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Wait until audit and orders are at rest, at most so long; then return both as they are."""
    deadline = time.monotonic() + within_s
    while True:
        audit = office.audit(sale)
        if audit["ok"] or time.monotonic() > deadline:
            return office.orders(sale), audit
        time.sleep(0.5)


def report(checks: Iterable[Check]) -> bool:
    """Print every promise and return whether all were kept."""
    kept = True
    for check in checks:
        kept = kept and check.ok
        print(f"{'ok     ' if check.ok else 'BROKEN '} {check.name}: {check.left} | {check.right}")
    print("verdict:", "every promise was kept" if kept else "A PROMISE WAS BROKEN")
    sys.stdout.flush()
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--urls", type=Path, default=Path(".fairdrop/urls.json"), help="urls.json of `fairdrop up`"
    )
    parser.add_argument("--sale", required=True)
    parser.add_argument("--units", type=int, default=None, help="units on sale, if known")
    options = parser.parse_args()
    urls = read_urls(options.urls)
    office = Office(urls["office"], urls["operator_key"])
    orders, audit = settled(office, options.sale)
    return 0 if report(judge([], orders, audit, options.units)) else 1


if __name__ == "__main__":
    sys.exit(main())
