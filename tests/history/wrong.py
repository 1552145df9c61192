"""What may go wrong in a history: single changes to a legal one, and the finding that each must lead to."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from app.record import (
    Attempt,
    Buried,
    Capture,
    Inbox,
    Item,
    Line,
    Mark,
    Op,
    Order,
    Refused,
    Sale,
    Stream,
    Supplier,
    Ticket,
    Wire,
)
from tests.history.legal import SKU

L = TypeVar("L", bound=msgspec.Struct)
Dice = random.Random
Change = Callable[[list[Line], Dice], list[Line]]


class Nothing(Exception):
    """This history has nothing that could be broken this way."""


def pick(lines: list[Line], kind: type[L], dice: Dice, fits: Callable[[L], bool] = lambda _: True) -> L:
    found = [line for line in lines if isinstance(line, kind) and fits(line)]
    if not found:
        raise Nothing
    return dice.choice(found)


def told(state: str) -> Callable[[Op], bool]:
    return lambda op: op.do == "ok" and op.state == state


def change(lines: list[Line], old: msgspec.Struct, **changes: Any) -> list[Line]:
    new = msgspec.structs.replace(old, **changes)
    return [new if line is old else line for line in lines]  # type: ignore[misc]


def without(lines: list[Line], old: msgspec.Struct) -> list[Line]:
    return [line for line in lines if line is not old]


def later_answer(lines: list[Line], before: Op, **changes: Any) -> list[Line]:
    """The same client asks again once the answer `before` was there, and is told something else."""
    at = before.at + 1_000
    number = max(line.id for line in lines if isinstance(line, Op)) + 1
    begun = Op(at=at, do="invoke", id=number, process=before.process, op="poll", buyer=before.buyer)
    end = msgspec.structs.replace(before, at=at + 0.01, id=number, op="poll", **changes)
    return [*lines, begun, end]


def item(lines: list[Line]) -> Item:
    return next(line for line in lines if isinstance(line, Item))


def told_of(lines: list[Line], state: str = "") -> Callable[[Order], bool]:
    """An order that somebody was told of, in this state."""
    numbers = {op.order for op in lines if isinstance(op, Op) and (not state or op.state == state)}
    return lambda order: order.order_no in numbers


def order_is_lost(lines: list[Line], dice: Dice) -> list[Line]:
    return without(lines, pick(lines, Order, dice, told_of(lines)))  # `queue` knows of the others


def order_is_doubled(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice)
    return [*lines, msgspec.structs.replace(order, order_no=order.order_no + "B")]


def oversold(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, item(lines), sold=item(lines).total + 1)


def a_unit_too_many_in_redis(lines: list[Line], dice: Dice) -> list[Line]:
    left = item(lines).left
    assert left is not None
    return change(lines, item(lines), left=left + 1)


def redis_would_sell_twice(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, item(lines), left=item(lines).total + 1)


def a_unit_vanished(lines: list[Line], dice: Dice) -> list[Line]:
    left = item(lines).left
    if left is None:
        raise Nothing
    return change(lines, item(lines), left=left - 1)  # also below 0: most of these sales sell out


def stock_is_lost(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, item(lines), left=None)


def refusal(order: Order, reason: str, *, returned: bool) -> Refused:
    """The claim of this order, refused."""
    return Refused(
        order_no=order.order_no, sku=SKU, buyer=order.buyer, epoch=1, seq=order.seq, units=1, reason=reason,
        returned=returned,
    )  # fmt: skip


def two_outcomes(lines: list[Line], dice: Dice) -> list[Line]:
    return [*lines, refusal(pick(lines, Order, dice), "live_order", returned=True)]


def refused_for_lack(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice)
    return [*without(lines, order), refusal(order, "no_stock", returned=False)]


def entry_lost(lines: list[Line], dice: Dice) -> list[Line]:
    stream = pick(lines, Stream, dice)
    return change(lines, stream, added=stream.added + 1)


def entry_in_hand(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, pick(lines, Stream, dice), pending=1)


def entry_buried(lines: list[Line], dice: Dice) -> list[Line]:
    return [*lines, Buried(stream="orders", entry="1-1", reason="UniqueViolationError")]


def served_for_nothing(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    at = of.outcome.find("w")
    if at < 0:
        raise Nothing
    return change(lines, of, outcome=of.outcome[:at] + "c" + of.outcome[at + 1 :])


def charged_twice(lines: list[Line], dice: Dice) -> list[Line]:
    paid = {line.order_no for line in lines if isinstance(line, Order) and line.state == "paid"}
    first = pick(lines, Supplier, dice, lambda s: s.op == "captured" and s.order in paid)
    return [*lines, msgspec.structs.replace(first, capture="other", at=first.at + 1)]


def wrong_amount(lines: list[Line], dice: Dice) -> list[Line]:
    paid = {line.order_no for line in lines if isinstance(line, Order) and line.state == "paid"}
    first = pick(lines, Supplier, dice, lambda s: s.op == "captured" and s.order in paid)
    return change(lines, first, amount_minor=first.amount_minor + 1)


def not_refunded(lines: list[Line], dice: Dice) -> list[Line]:
    return without(lines, pick(lines, Supplier, dice, lambda s: s.op == "refunded"))


def paid_for_nothing(lines: list[Line], dice: Dice) -> list[Line]:
    paid = {line.order_no for line in lines if isinstance(line, Order) and line.state == "paid"}
    first = pick(lines, Supplier, dice, lambda s: s.op == "captured" and s.order in paid)
    return without(lines, first)


def capture_not_on_record(lines: list[Line], dice: Dice) -> list[Line]:
    return without(lines, pick(lines, Capture, dice))


def hook_not_on_record(lines: list[Line], dice: Dice) -> list[Line]:
    return without(lines, pick(lines, Inbox, dice))


def two_links(lines: list[Line], dice: Dice) -> list[Line]:
    first = pick(lines, Supplier, dice, lambda s: s.op == "created")
    at = lines.index(first)
    second = msgspec.structs.replace(first, attempt=first.attempt + "B", at=first.at + 0.0001)
    return [*lines[: at + 1], second, *lines[at + 1 :]]


def paid_then_reserved(lines: list[Line], dice: Dice) -> list[Line]:
    return later_answer(lines, pick(lines, Op, dice, told("paid")), state="reserved")


def claimed_then_waiting(lines: list[Line], dice: Dice) -> list[Line]:
    return later_answer(lines, pick(lines, Op, dice, told("claimed")), state="waiting")


def paid_order_ends_expired(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, pick(lines, Order, dice, told_of(lines, "paid")), state="expired")


def redis_says_less(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice, lambda o: o.state == "paid")
    of = item(lines)
    return change(lines, of, outcome=of.outcome[: order.seq - 1] + "r" + of.outcome[order.seq :])


def redis_is_behind(lines: list[Line], dice: Dice) -> list[Line]:
    ticket = pick(lines, Ticket, dice, lambda t: t.version > 1)
    return change(lines, ticket, version=ticket.version - 1)


def agreed_late(lines: list[Line], dice: Dice) -> list[Line]:
    mark = pick(lines, Mark, dice, lambda m: m.what == "agreed")
    return change(lines, mark, at=mark.at + 61)


def out_of_turn(lines: list[Line], dice: Dice) -> list[Line]:
    orders = [line for line in lines if isinstance(line, Order)]
    if len(orders) < 2:
        raise Nothing
    last = max(orders, key=lambda order: order.claimed_ms)
    return change(lines, last, claimed_ms=1)


def passed_over(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    if "w" not in of.outcome or of.dead_seq:
        raise Nothing
    return change(lines, of, served=len(of.outcome))


def ahead_grows(lines: list[Line], dice: Dice) -> list[Line]:
    seen = pick(lines, Op, dice, lambda op: op.ahead is not None)
    assert seen.ahead is not None
    return later_answer(lines, seen, ahead=seen.ahead + 1, state="waiting")


def other_key(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, item(lines), drawn_key="0" * 40)


def other_hash(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    if not of.drawn_hashes:
        raise Nothing
    first = "0" if of.drawn_hashes[0] != "0" else "1"
    return change(lines, of, drawn_hashes=first + of.drawn_hashes[1:])


def turned_away_too_soon(lines: list[Line], dice: Dice) -> list[Line]:
    seen = pick(lines, Op, dice, told("waiting"))
    of = item(lines)
    return later_answer(
        change(lines, of, total=of.total + 50, left=(of.left or 0) + 50), seen, state="sold_out"
    )


def two_tickets(lines: list[Line], dice: Dice) -> list[Line]:
    seen = pick(lines, Op, dice, told("waiting"))
    return later_answer(lines, seen, ticket=f"9999-{'0' * 20}", seq=9999)


def one_place_twice(lines: list[Line], dice: Dice) -> list[Line]:
    seen = pick(lines, Op, dice, told("waiting"))
    return later_answer(lines, seen, ticket=f"{seen.seq}-{'0' * 20}", buyer="stranger")


def place_forgotten(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    return change(lines, of, outcome=of.outcome[:-1] + ".")


def asked_twice_for_one_tap(lines: list[Line], dice: Dice) -> list[Line]:
    return [*lines, pick(lines, Wire, dice)]


def held_at_once(lines: list[Line], dice: Dice) -> list[Line]:
    """More buyers than units are told, twice and at the same time, that they hold one; nothing else says so."""
    made: list[Line] = []
    for number in range(item(lines).total + 1):
        for look in range(2):
            who = {
                "id": 10**6 + number * 2 + look,
                "process": f"x{number}",
                "op": "poll",
                "buyer": f"x{number}",
            }
            at = 5_000.0 + look + number / 1_000
            made.append(Op(at=at, do="invoke", **who))  # type: ignore[arg-type]
            end = Op(at=at + 0.0001, do="ok", sku=SKU, units=1, ticket=f"x{number}", state="reserved", **who)  # type: ignore[arg-type]
            made.append(end)
    return [*lines, *made]


# Counters, places and money that are wrong by themselves, with everything else as it should be


def reserved_is_miscounted(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    return change(lines, of, total=of.total + 1, reserved=of.reserved + 1)


def sold_is_miscounted(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    orders = sum(isinstance(line, Order) for line in lines)
    return change(lines, of, total=of.total + orders + 1, sold=of.sold + orders + 1)


def told_two_orders(lines: list[Line], dice: Dice) -> list[Line]:
    return later_answer(lines, pick(lines, Op, dice, lambda op: bool(op.order)), order="another")


def told_the_order_of_another(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice, told_of(lines))
    return change(lines, order, buyer=order.buyer + "-not")


def won_without_an_order(lines: list[Line], dice: Dice) -> list[Line]:
    """Nobody was told its number."""
    order = pick(lines, Order, dice, told_of(lines, "reserved"))
    return [
        msgspec.structs.replace(line, order="")
        if isinstance(line, Op) and line.buyer == order.buyer
        else line
        for line in without(lines, order)
    ]


def two_live_orders(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice, lambda o: o.state in ("reserved", "paid"))
    return [*lines, msgspec.structs.replace(order, order_no=order.order_no + "B", seq=order.seq + 500)]


def more_than_the_limit(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, pick(lines, Order, dice, lambda o: o.state in ("reserved", "paid")), units=2)


def one_claim_two_orders(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice)
    return [*lines, msgspec.structs.replace(order, order_no=order.order_no + "B", state="expired")]


def claimed_and_forgotten(lines: list[Line], dice: Dice) -> list[Line]:
    """A buyer whose place nobody served was told that it was."""
    waits = {at + 1 for at, byte in enumerate(item(lines).outcome) if byte == "w"}
    return later_answer(lines, pick(lines, Op, dice, lambda op: op.seq in waits), state="claimed")


def claimed_twice(lines: list[Line], dice: Dice) -> list[Line]:
    order = pick(lines, Order, dice)
    refused = refusal(order, "ticket_taken", returned=True)
    return [*lines, msgspec.structs.replace(refused, order_no=order.order_no + "B")]


def redis_says_it_waits(lines: list[Line], dice: Dice) -> list[Line]:
    order, of = pick(lines, Order, dice), item(lines)
    return change(lines, of, outcome=of.outcome[: order.seq - 1] + "w" + of.outcome[order.seq :])


def claims_miscounted(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, pick(lines, Stream, dice), open=1)


def attempt_not_on_record(lines: list[Line], dice: Dice) -> list[Line]:
    return without(lines, pick(lines, Attempt, dice))


def refunded_twice(lines: list[Line], dice: Dice) -> list[Line]:
    first = pick(lines, Supplier, dice, lambda s: s.op == "refunded")
    return [*lines, msgspec.structs.replace(first, refund="other", at=first.at + 1)]


def refund_never_ends(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, pick(lines, Order, dice, lambda o: o.state == "paid"), state="refunding")


def money_for_no_order(lines: list[Line], dice: Dice) -> list[Line]:
    first = pick(lines, Supplier, dice, lambda s: s.op == "captured")
    return [*lines, msgspec.structs.replace(first, capture="other", order="nobody's", at=first.at + 1)]


def capture_that_never_was(lines: list[Line], dice: Dice) -> list[Line]:
    return [*lines, msgspec.structs.replace(pick(lines, Capture, dice), ref="other")]


def unit_never_arrived(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, item(lines), unapplied=1)


def status_is_lost(lines: list[Line], dice: Dice) -> list[Line]:
    return without(lines, pick(lines, Ticket, dice))


def served_is_behind(lines: list[Line], dice: Dice) -> list[Line]:
    pick(lines, Order, dice)
    return change(lines, item(lines), served=0)


def other_rank(lines: list[Line], dice: Dice) -> list[Line]:
    """One ticket is always told the same rank, and it is that of another."""
    seen = pick(lines, Op, dice, lambda op: op.rank is not None)
    assert seen.rank is not None
    return [
        msgspec.structs.replace(line, rank=seen.rank + 1)
        if isinstance(line, Op) and line.ticket == seen.ticket and line.rank is not None
        else line
        for line in lines
    ]


def rank_changes(lines: list[Line], dice: Dice) -> list[Line]:
    seen = pick(lines, Op, dice, lambda op: op.rank is not None)
    assert seen.rank is not None
    return later_answer(lines, seen, rank=seen.rank + 1)


def other_seed(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, pick(lines, Sale, dice), seed="00" * 32)


def other_beacon(lines: list[Line], dice: Dice) -> list[Line]:
    return change(lines, item(lines), beacon_used="of nobody")


def not_in_the_draw(lines: list[Line], dice: Dice) -> list[Line]:
    """A ticket of another buyer on an early place."""
    seen = pick(lines, Op, dice, lambda op: op.seq is not None and op.seq <= item(lines).drawn_n)
    return [
        msgspec.structs.replace(line, ticket=f"{seen.seq}-{'0' * 20}")
        if isinstance(line, Op) and line.ticket == seen.ticket
        else line
        for line in lines
    ]


def hash_is_missing(lines: list[Line], dice: Dice) -> list[Line]:
    of = item(lines)
    if not of.drawn_hashes:
        raise Nothing
    return change(lines, of, drawn_hashes=of.drawn_hashes[20:])


# The check that must find it, and what it says

FOUND_AS: dict[Change, tuple[str, str]] = {
    order_is_lost: ("set", "which does not exist"),
    order_is_doubled: ("set", "became 2 orders"),
    one_claim_two_orders: ("set", "became 2 orders"),
    two_live_orders: ("set", "has 2 live orders"),
    more_than_the_limit: ("set", "has more units than 1"),
    told_two_orders: ("set", "was told two orders"),
    told_the_order_of_another: ("set", "was told the order of"),
    won_without_an_order: ("set", "and has no order"),
    claimed_and_forgotten: ("set", "nothing came of it"),
    two_tickets: ("set", "asked for one ticket and has 2"),
    one_place_twice: ("set", "was given to 2 tickets"),
    place_forgotten: ("set", "Redis never heard of it"),
    oversold: ("bank", "Postgres holds"),
    reserved_is_miscounted: ("bank", "are counted as reserved"),
    sold_is_miscounted: ("bank", "are counted as sold"),
    a_unit_too_many_in_redis: ("bank", "units became"),
    a_unit_vanished: ("bank", "units became"),
    refused_for_lack: ("bank", "a unit that Postgres did not have"),
    held_at_once: ("bank", "were held at once"),
    two_outcomes: ("queue", "is an order and was refused"),
    claimed_twice: ("queue", "was claimed twice"),
    entry_lost: ("queue", "came to an end"),
    entry_in_hand: ("queue", "in somebody's hands"),
    entry_buried: ("queue", "were buried"),
    served_for_nothing: ("queue", "there is no order, no refusal"),
    redis_says_it_waits: ("queue", "in Redis its byte is 'w'"),
    claims_miscounted: ("queue", "the scripts count 1"),
    charged_twice: ("money", "was charged 2 times"),
    wrong_amount: ("money", "the supplier holds"),
    not_refunded: ("money", "the supplier holds"),
    paid_for_nothing: ("money", "the supplier holds 0"),
    refunded_twice: ("money", "went back"),
    refund_never_ends: ("money", "never ended"),
    money_for_no_order: ("money", "of order nobody's, which does not exist"),
    capture_not_on_record: ("money", "is not on record"),
    capture_that_never_was: ("money", "the supplier never made it"),
    hook_not_on_record: ("money", "was acknowledged and is not on record"),
    attempt_not_on_record: ("money", "we do not"),
    two_links: ("money", "two links open"),
    paid_then_reserved: ("states", "told paid, then reserved"),
    claimed_then_waiting: ("states", ", then waiting"),
    paid_order_ends_expired: ("states", "told paid, and its order is expired"),
    redis_says_less: ("stores", "Redis tells its ticket 'r'"),
    redis_is_behind: ("stores", "is at version"),
    agreed_late: ("stores", "s after healing"),
    redis_would_sell_twice: ("stores", "Redis would give away"),
    stock_is_lost: ("stores", "has lost the stock"),
    unit_never_arrived: ("stores", "still on their way"),
    status_is_lost: ("stores", "its status in Redis is not"),
    out_of_turn: ("line", "ms before rank"),
    passed_over: ("line", "the line has passed it"),
    served_is_behind: ("line", "has a unit, served is 0"),
    ahead_grows: ("line", "were ahead, then"),
    other_key: ("draw", "the key of the draw is another"),
    other_hash: ("draw", "the chain over the early tickets"),
    other_seed: ("draw", "not the one that was committed to"),
    other_beacon: ("draw", "is not the one that was named"),
    other_rank: ("draw", "the draw says"),
    rank_changes: ("draw", "was told the ranks"),
    not_in_the_draw: ("draw", "was not in the draw as told"),
    hash_is_missing: ("draw", "ticket hashes for a draw of"),
    turned_away_too_soon: ("sold_out", "were ever taken"),
    asked_twice_for_one_tap: ("executions", "Redis was asked"),
}  # fmt: skip
