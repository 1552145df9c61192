"""The story of a counterexample: everything a history knows of one buyer and one order, for a person to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from app.history.judge import Finding
from app.record import Attempt, Capture, Line, Mark, Op, Order, Refused, Supplier, Ticket


def story(lines: Iterable[Line], finding: Finding) -> Iterator[str]:
    """Lines in order of time; behind them what the stores hold at the end."""
    kept = list(lines)
    buyer, orders = finding.buyer, {finding.order} - {""}
    for one in kept:
        if isinstance(one, Order | Refused):
            if buyer and one.buyer == buyer:
                orders.add(one.order_no)
            if one.order_no in orders:
                buyer = buyer or one.buyer
    begun = next((one.at for one in kept if isinstance(one, Op | Mark)), 0.0)
    timed: list[tuple[float, str]] = []
    after: list[str] = []
    same: str = ""
    for one in sorted(kept, key=lambda one: getattr(one, "at", 0.0)):
        match one:
            case Op(do="invoke") if one.buyer == buyer and one.op != "poll":
                timed.append((one.at, f"{one.process} asks: {one.op}"))
            case Op() if one.buyer == buyer and one.do != "invoke":
                said = f"{one.op} {one.do}"
                if one.do == "ok":
                    said = f"is told {one.state or one.status}"
                    said += f", rank {one.rank}" if one.rank is not None and one.state == "waiting" else ""
                    said += f", order {one.order}" if one.order else ""
                    said += f", payment {one.payment}" if one.payment else ""
                else:
                    said += f" {one.status or ''} {one.code}".rstrip()
                if said != same or one.op != "poll":
                    timed.append((one.at, f"{one.process} {said}"))
                same = said
            case Supplier() if one.order in orders:
                what = f"supplier: {one.op} {one.attempt or one.event}"
                what += f" {one.amount_minor} {one.currency}" if one.amount_minor else ""
                timed.append((one.at, f"{what} {one.capture}".rstrip()))
            case Mark() if one.what in ("fault", "healed", "drained"):
                timed.append((one.at, f"-- {one.what}: {one.note}" if one.note else f"-- {one.what}"))
            case Order() if one.order_no in orders:
                after.append(
                    f"in Postgres: order {one.order_no} of {one.buyer}, {one.sku} seq {one.seq}, {one.state}"
                    f" (version {one.version}) {one.reason}".rstrip()
                )
            case Refused() if one.order_no in orders:
                after.append(f"in Postgres: claim {one.order_no} was refused ({one.reason})")
            case Attempt() if one.order in orders:
                after.append(f"in Postgres: payment attempt {one.id} is {one.state}")
            case Capture() if one.order in orders:
                after.append(f"in Postgres: capture {one.ref} of {one.amount_minor} is {one.state}")
    seqs = {(one.sku, one.seq) for one in kept if isinstance(one, Order) and one.order_no in orders}
    for one in kept:
        if isinstance(one, Ticket) and (one.sku, one.seq) in seqs:
            after.append(f"in Redis: {one.sku} seq {one.seq} is told {one.byte!r}, version {one.version}")
    for at, what in timed:
        yield f"{at - begun:9.3f} s  {what}"
    for what in after:
        yield f"{'at the end':>11}  {what}"
