"""The judge: whether a history keeps the promises of vision.md. Pure: lines in, verdict out.

    bank          units held never exceed the units there are, at any moment; at rest total = left + reserved + sold
    set           who was told `reserved` has that order, once; one tap, one ticket; one seq, one buyer
    queue         every claim has exactly one outcome, every entry of the stream was read, and nothing was buried
    money         at most one unrefunded capture an order, of the order's amount, for paid orders only; never two links
                  open at once; every acknowledged call-back is on record
    states        what a client is told moves along the arrows, in real time, also across taps and front doors
    stores        Redis tells what Postgres holds, and did so within 60 s of healing
    line          units were given in rank order, nobody was passed over, and `ahead` never grew
    draw          every rank can be recomputed from what was committed to
    sold_out      nobody was sent away while units were there
    executions    Redis ran no join more often than its buyer asked for it (needs wire lines)

The order of events is that of real time: an operation comes before another only if it had ended when the other began
(as in Jepsen's checkers). What is concurrent may have happened either way, so nothing here blames it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from app import draw
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
    Run,
    Sale,
    Stream,
    Supplier,
    Ticket,
    Wire,
)
from app.states import ARROWS, TicketState

AGREE_WITHIN_S = 60.0
STALE_S = 3.0  # a front door tells from what it has seen for so long (snapshot_stale_s)
FINDINGS_MAX = 20  # shown of one check; the count is exact

HOLDS_UNIT = frozenset({"reserved", "paid"})
WON = frozenset({"reserved", "paid", "expired", "refunded"})
OF_ORDER = {"refunding": "paid"}  # the ticket state that goes with an order's state, where they differ
BYTE_OF_ORDER = {
    "reserved": "r",
    "paid": "p",
    "refunding": "p",
    "expired": "e",
    "cancelled": "k",
    "refunded": "f",
}
SERVED = frozenset("crpekf")


class Finding(NamedTuple):
    """One broken promise: what, and whose story tells it."""

    what: str
    buyer: str = ""
    order: str = ""


@dataclass
class Result:
    """One check: how many things it looked at, and what it found. looked_at 0: the history has nothing for it."""

    name: str
    looked_at: int = 0
    count: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.count == 0

    def find(self, what: str, buyer: str = "", order: str = "") -> None:
        self.count += 1
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(Finding(what, buyer, order))


@dataclass
class Verdict:
    results: list[Result]
    ops: int

    @property
    def ok(self) -> bool:
        return all(result.ok for result in self.results)

    @property
    def broken(self) -> set[str]:
        return {result.name for result in self.results if not result.ok}

    def first(self) -> tuple[str, Finding] | None:
        """The first counterexample that has a story, else the first at all."""
        found = [(result.name, finding) for result in self.results for finding in result.findings]
        return next((one for one in found if one[1].buyer or one[1].order), found[0] if found else None)


class Done(NamedTuple):
    """One operation, from both its ends. `end` None: it never ended, or nobody knows how."""

    begun: Op
    end: Op | None


class History:
    """The lines of one run, sorted by what they are. anew: the sale was rebuilt after Redis had lost something."""

    @property
    def anew(self) -> bool:
        return self.sale is not None and self.sale.epoch > 1

    def __init__(self, lines: Iterable[Line], agree_within_s: float) -> None:
        self.agree_within_s = agree_within_s
        self.run = Run()
        self.sale: Sale | None = None
        self.ops: list[Done] = []  # by begin
        self.marks: list[Mark] = []
        self.supplier: list[Supplier] = []
        self.wires: list[Wire] = []
        self.items: dict[str, Item] = {}
        self.streams: dict[str, Stream] = {}
        self.orders: dict[str, Order] = {}
        self.refused: dict[str, Refused] = {}
        self.buried: list[Buried] = []
        self.attempts: dict[str, Attempt] = {}
        self.captures: list[Capture] = []
        self.inbox: set[str] = set()
        self.tickets: dict[tuple[str, int], Ticket] = {}
        begun: dict[int, Op] = {}
        ends: dict[int, Op] = {}
        for line in lines:
            match line:
                case Op(do="invoke"):
                    begun[line.id] = line
                case Op():
                    ends[line.id] = line
                case Supplier():
                    self.supplier.append(line)
                case Wire():
                    self.wires.append(line)
                case Mark():
                    self.marks.append(line)
                case Run():
                    self.run = line
                case Sale():
                    self.sale = line
                case Item():
                    self.items[line.sku] = line
                case Stream():
                    self.streams[line.name] = line
                case Order():
                    self.orders[line.order_no] = line
                case Refused():
                    self.refused[line.order_no] = line
                case Buried():
                    self.buried.append(line)
                case Attempt():
                    self.attempts[line.id] = line
                case Capture():
                    self.captures.append(line)
                case Inbox():
                    self.inbox.add(line.event)
                case Ticket():
                    self.tickets[line.sku, line.seq] = line
        self.ops = [Done(op, ends.get(number)) for number, op in begun.items()]
        self.told: dict[str, list[Done]] = defaultdict(
            list
        )  # ticket_id -> what clients were told of it, by end
        for done in self.ops:
            if done.end is not None and done.end.do == "ok" and done.end.ticket:
                self.told[done.end.ticket].append(done)
        for seen in self.told.values():
            seen.sort(key=lambda done: _end(done).at)

    @property
    def held(self) -> bool:
        """Whether Redis is the home of the sale, so that the two stores can be compared."""
        return self.sale is not None and self.sale.held

    @property
    def claims(self) -> list[Order | Refused]:
        """Every outcome that Postgres has for a claim."""
        return [*self.orders.values(), *self.refused.values()]

    def poisoned(self) -> int:
        return sum(mark.what == "poison" for mark in self.marks)


def judge(lines: Iterable[Line], *, agree_within_s: float = AGREE_WITHIN_S) -> Verdict:
    """Judge one history. A history without its end (no `sale` line) is judged by what clients and supplier said."""
    history = History(lines, agree_within_s)
    results = []
    for name, check in CHECKS.items():
        result = Result(name)
        check(history, result)
        results.append(result)
    return Verdict(results, len(history.ops))


# --- units -----------------------------------------------------------------------------------------------------------


def bank(h: History, r: Result) -> None:
    for item in h.items.values():
        r.looked_at += 1
        if item.reserved + item.sold > item.total:
            r.find(f"{item.sku}: Postgres holds {item.reserved} reserved + {item.sold} sold of {item.total}")
        counted: Counter[str] = Counter()
        for order in h.orders.values():
            if order.sku == item.sku:
                counted[order.state] += order.units
        if item.reserved != counted["reserved"]:
            r.find(f"{item.sku}: {item.reserved} are counted as reserved, orders say {counted['reserved']}")
        least, most = counted["paid"] + counted["refunding"], sum(counted.values()) - counted["reserved"]
        if not least <= item.sold <= most:
            r.find(f"{item.sku}: {item.sold} are counted as sold, paid orders say {least}")
        if h.held and item.left is not None and _drained(h):
            there = item.left + item.unapplied + item.reserved + item.sold
            if there != item.total:
                r.find(
                    f"{item.sku}: {item.total} units became {there}: {item.left} left in Redis + {item.unapplied} on"
                    f" their way + {item.reserved} reserved + {item.sold} sold"
                )
    for refused in h.refused.values():
        if refused.reason == "no_stock":
            r.find(
                f"Redis gave {refused.sku} seq {refused.seq} a unit that Postgres did not have",
                refused.buyer,
                refused.order_no,
            )
    _held_at_once(h, r)


def _held_at_once(h: History, r: Result) -> None:
    """Clients who surely held units at the same moment: from the first answer that said so to the last question."""
    steps: dict[str, list[tuple[float, int, str, str]]] = defaultdict(list)
    for seen in h.told.values():
        for state in HOLDS_UNIT:
            of = [done for done in seen if _end(done).state == state]
            if not of:
                continue
            since, until = _end(of[0]).at, max(done.begun.at for done in of)
            end = _end(of[0])
            r.looked_at += 1
            if until > since:
                steps[end.sku].append((since, end.units, end.buyer, end.order))
                steps[end.sku].append((until, -end.units, end.buyer, end.order))
    for sku, moves in steps.items():
        item = h.items.get(sku)
        if item is None:
            continue
        held = 0
        for at, units, buyer, order in sorted(moves):
            held += units
            if held > item.total:
                r.find(f"{sku}: {held} units of {item.total} were held at once, at {at:.3f}", buyer, order)
                break


def _drained(h: History) -> bool:
    stream = h.streams.get("orders")
    return stream is None or stream.length == 0


def sold_out(h: History, r: Result) -> None:
    taken: Counter[str] = Counter()
    for claim in h.claims:
        taken[claim.sku] += claim.units
    for done in h.ops:
        end = done.end
        if end is None or end.do != "ok" or end.state != "sold_out":
            continue
        item = h.items.get(end.sku or done.begun.sku)
        if item is None:
            continue
        r.looked_at += 1
        units = end.units or done.begun.units or 1
        first = item.total - max(0, item.topped_up)
        if taken[item.sku] < first - units + 1:
            r.find(
                f"{done.begun.buyer} was told sold_out, but of {first} units of {item.sku} only {taken[item.sku]} were"
                " ever taken",
                done.begun.buyer,
            )


# --- who was promised what -------------------------------------------------------------------------------------------


def the_set(h: History, r: Result) -> None:
    of_seq: dict[tuple[str, int], set[str]] = defaultdict(set)
    of_buyer: dict[str, set[str]] = defaultdict(set)
    again = {done.begun.buyer for done in h.ops if done.begun.again}
    for ticket, seen in h.told.items():
        r.looked_at += 1
        last = _end(seen[-1])
        of_buyer[last.buyer].add(ticket)
        if last.seq is not None:
            of_seq[last.sku, last.seq].add(ticket)
        numbers = {_end(done).order for done in seen} - {""}
        if len(numbers) > 1:
            r.find(f"ticket {ticket} was told two orders: {sorted(numbers)}", last.buyer)
        if h.sale is None:
            continue
        for number in numbers:
            order = h.orders.get(number)
            if order is None:
                r.find(f"{last.buyer} was told order {number}, which does not exist", last.buyer, number)
            elif order.buyer != last.buyer:
                r.find(f"{last.buyer} was told the order of {order.buyer}", last.buyer, number)
        promised = next((_end(done).state for done in seen if _end(done).state in WON), None)
        if promised and not numbers and not any(o.buyer == last.buyer for o in h.orders.values()):
            r.find(f"{last.buyer} was told {promised} and has no order", last.buyer)
        _kept_place(h, r, ticket, seen)
    if h.anew:  # ADR 0009: a seq that has no order may be given once more
        told_order = {ticket for ticket, seen in h.told.items() if any(_end(done).order for done in seen)}
        of_seq = {at: tickets & told_order for at, tickets in of_seq.items()}
    for (sku, seq), tickets in of_seq.items():
        if len(tickets) > 1:
            r.find(f"{sku} seq {seq} was given to {len(tickets)} tickets: {sorted(tickets)}")
    epochs = h.sale.epoch if h.sale is not None else 1  # who lost a place with Redis may ask again, each time
    for buyer, tickets in of_buyer.items():
        if len(tickets) > epochs and buyer not in again:
            r.find(f"{buyer} asked for one ticket and has {len(tickets)}: {sorted(tickets)}", buyer)
    live: dict[str, list[Order]] = defaultdict(list)
    made: dict[tuple[int, str, int], list[Order]] = defaultdict(list)
    for order in h.orders.values():
        made[order.epoch, order.sku, order.seq].append(order)
        if order.state in ("reserved", "paid"):
            live[order.buyer].append(order)
    for buyer, orders in live.items():
        if len(orders) > 1:
            r.find(f"{buyer} has {len(orders)} live orders", buyer, orders[0].order_no)
        if h.sale is not None and sum(order.units for order in orders) > h.sale.limit:
            r.find(f"{buyer} has more units than {h.sale.limit}", buyer, orders[0].order_no)
    for (_, sku, seq), orders in made.items():
        if len(orders) > 1:
            r.find(f"{sku} seq {seq} became {len(orders)} orders", orders[0].buyer, orders[0].order_no)


def _kept_place(h: History, r: Result, ticket: str, seen: list[Done]) -> None:
    """What Redis acknowledged is still there: the seq that was told has its byte, and a claim became something."""
    last = _end(seen[-1])
    item = h.items.get(last.sku)
    if item is None or last.seq is None or not h.held or not _of_this_epoch(h, seen):
        return
    byte = _byte(item, last.seq)
    lapsed = any(_end(done).state == "lapsed" for done in seen)
    if byte == "." and not lapsed:
        r.find(
            f"{last.buyer} holds ticket {ticket}, {last.sku} seq {last.seq}; Redis never heard of it",
            last.buyer,
        )
    if last.state == "claimed" and _drained(h):
        known = {(claim.sku, claim.seq) for claim in h.claims}
        if (last.sku, last.seq) not in known:
            r.find(f"{last.buyer} was told claimed, and nothing came of it", last.buyer)


def queue(h: History, r: Result) -> None:
    outcomes: Counter[str] = Counter()
    for number in (*h.orders, *h.refused):
        outcomes[number] += 1
        r.looked_at += 1
    for number, count in outcomes.items():
        if count > 1:
            refused = h.refused[number]
            r.find(
                f"the claim of {refused.sku} seq {refused.seq} is an order and was refused ({refused.reason})",
                refused.buyer,
                number,
            )
    for refused in h.refused.values():
        if refused.reason == "ticket_taken":
            r.find(f"{refused.sku} seq {refused.seq} was claimed twice", refused.buyer, refused.order_no)
    letters = [letter for letter in h.buried if letter.stream == "orders"]
    if len(letters) > h.poisoned():
        r.find(f"{len(letters)} claims were buried, {h.poisoned()} were poison: {letters[0].reason}")
    if not h.held or h.sale is None:
        return
    claims = {(claim.sku, claim.seq): claim for claim in sorted(h.claims, key=lambda claim: claim.epoch)}
    for item in h.items.values():
        left = set(item.left_seqs)
        for seq, byte in enumerate(item.outcome, 1):
            was_served = byte in SERVED or (byte == "l" and seq not in left)
            claim = claims.get((item.sku, seq))
            r.looked_at += was_served
            if was_served and claim is None and _drained(h):
                r.find(
                    f"{item.sku} seq {seq} was given a unit; there is no order, no refusal",
                    _buyer_of(h, item.sku, seq),
                )
            if not was_served and claim is not None and claim.epoch == h.sale.epoch:
                r.find(
                    f"{item.sku} seq {seq} has a claim in Postgres; in Redis its byte is {byte!r}",
                    claim.buyer,
                    claim.order_no,
                )
    stream = h.streams.get("orders")
    if stream is None:
        return
    if stream.length or stream.pending:
        r.find(f"{stream.length} claims were left in orders, {stream.pending} entries in somebody's hands")
    if stream.open != stream.length:
        r.find(f"{stream.length} claims were left in orders, and the scripts count {stream.open}")
    if h.sale.epoch == 1:
        found = (
            len(set(h.orders) | set(h.refused))
            + len(letters)
            - sum(refused.reason == "poison" for refused in h.refused.values())
        )
        if stream.added != found + stream.length:
            r.find(f"{stream.added} claims were written to orders, {found} came to an end")


def executions(h: History, r: Result) -> None:
    asked = Counter(done.begun.buyer for done in h.ops if done.begun.op == "join")
    ran = Counter(wire.buyer for wire in h.wires if wire.op == "line_join")
    for buyer, count in ran.items():
        r.looked_at += 1
        if count > asked[buyer]:
            r.find(f"{buyer} asked {asked[buyer]} times, and Redis was asked {count} times", buyer)


# --- money -----------------------------------------------------------------------------------------------------------


def money(h: History, r: Result) -> None:
    captured: dict[str, Supplier] = {}
    back: Counter[str] = Counter()
    open_links: dict[str, dict[str, float]] = defaultdict(dict)
    for event in h.supplier:
        r.looked_at += 1
        match event.op:
            case "created":
                others = [
                    attempt
                    for attempt, until in open_links[event.order].items()
                    if attempt != event.attempt and (until > event.at or not until)
                ]
                if others:
                    r.find(
                        f"order {event.order} had two links open at the supplier: {others[0]}, {event.attempt}",
                        order=event.order,
                    )
                open_links[event.order][event.attempt] = event.until
                if h.sale is not None and event.attempt not in h.attempts and event.order in h.orders:
                    r.find(f"the supplier has attempt {event.attempt}, we do not", order=event.order)
            case "declined" | "closed":
                open_links[event.order].pop(event.attempt, None)
            case "captured":
                captured[event.capture] = event
            case "refunded":
                back[event.capture] += event.amount_minor
            case "hook":
                # One acknowledged after the stores were read may be missing in what was read.
                if h.sale is not None and event.at < h.sale.at and event.event not in h.inbox:
                    r.find(
                        f"call-back {event.event} was acknowledged and is not on record", order=event.order
                    )
            case "sms":
                pass
    if not h.supplier or h.sale is None:
        return
    kept: dict[str, list[Supplier]] = defaultdict(list)
    for ref, capture in captured.items():
        if back[ref] > capture.amount_minor:
            r.find(f"{back[ref]} of {capture.amount_minor} went back", order=capture.order)
        if back[ref] < capture.amount_minor:
            kept[capture.order].append(capture)
    on_record = {capture.ref: capture for capture in h.captures}
    for number, order in h.orders.items():
        mine = kept.pop(number, [])
        if len(mine) > 1:
            r.find(f"order {number} was charged {len(mine)} times", order.buyer, number)
        amount = sum(capture.amount_minor - back[capture.capture] for capture in mine)
        owed = order.amount_minor if order.state in ("paid", "refunding") else 0
        if amount != owed:
            r.find(
                f"order {number} is {order.state}, {order.amount_minor} {order.currency}; the supplier holds {amount}"
                " of it",
                order.buyer,
                number,
            )
        if order.state == "refunding":
            r.find(f"the refund of order {number} never ended", order.buyer, number)
    for number in kept:
        r.find(f"the supplier holds money of order {number}, which does not exist", order=number)
    for ref, capture in captured.items():
        if ref not in on_record and capture.order in h.orders:
            r.find(f"capture {ref} of order {capture.order} is not on record", order=capture.order)
    for ref, ours in on_record.items():
        if ref not in captured:
            r.find(f"capture {ref} is on record, the supplier never made it", order=ours.order)


# --- what clients were told ------------------------------------------------------------------------------------------


@cache
def reachable(before: str) -> frozenset[str]:
    """The states that may be told after `before`, itself included; steps between two looks are not seen."""
    reached = {TicketState(before)}
    edge = [TicketState(before)]
    while edge:
        for state in ARROWS[edge.pop()] - reached:
            reached.add(state)
            edge.append(state)
    return frozenset(state.value for state in reached)


def states(h: History, r: Result) -> None:
    known = {state.value for state in TicketState}
    for ticket, seen in h.told.items():
        by_begin = sorted(
            (done for done in seen if _end(done).state in known), key=lambda done: done.begun.at
        )
        ended = [done for done in seen if _end(done).state in known]
        at = 0
        newest: dict[str, Done] = {}  # states that had been told by then, none of which follows from another
        for done in by_begin:
            while at < len(ended) and _end(ended[at]).at < done.begun.at:
                word = _end(ended[at]).state
                if not any(word == other or other in reachable(word) for other in newest):
                    newest = {o: d for o, d in newest.items() if word not in reachable(o)} | {word: ended[at]}
                at += 1
            now = _end(done).state
            r.looked_at += 1
            for before in newest:
                lost = h.anew and (before, now) == ("claimed", "lapsed")  # with Redis, before it was written
                if now not in reachable(before) and not lost:
                    r.find(f"ticket {ticket}: told {before}, then {now}", done.begun.buyer, _end(done).order)
        _came_to(h, r, ticket, ended)


def _came_to(h: History, r: Result, ticket: str, ended: list[Done]) -> None:
    """The order's last state follows from everything that was told."""
    numbers = {_end(done).order for done in ended} - {""}
    for number in numbers:
        order = h.orders.get(number)
        if order is None:
            continue
        last = OF_ORDER.get(order.state, order.state)
        for word in {_end(done).state for done in ended}:
            if last not in reachable(word):
                r.find(f"ticket {ticket}: told {word}, and its order is {order.state}", order.buyer, number)


def stores(h: History, r: Result) -> None:
    healed = next((mark.at for mark in reversed(h.marks) if mark.what == "healed"), None)
    agreed = next((mark.at for mark in reversed(h.marks) if mark.what == "agreed"), None)
    if healed is not None and agreed is not None:
        r.looked_at += 1
        if agreed - healed > h.agree_within_s:
            r.find(
                f"the stores agreed {agreed - healed:.1f} s after healing, not within {h.agree_within_s:.0f} s"
            )
    if not h.held or h.sale is None:
        return
    for item in h.items.values():
        r.looked_at += 1
        if item.left is None:
            r.find(f"Redis has lost the stock of {item.sku}")
        elif item.left > item.total - item.reserved - item.sold - item.unapplied:
            r.find(f"Redis would give away {item.left} of {item.sku}, Postgres has fewer")
        if item.unapplied:
            r.find(f"{item.unapplied} units of {item.sku} are still on their way to Redis")
    for number, order in h.orders.items():
        if order.epoch != h.sale.epoch or order.sku not in h.items:
            continue
        r.looked_at += 1
        byte = _byte(h.items[order.sku], order.seq)
        if byte != BYTE_OF_ORDER[order.state]:
            r.find(f"order {number} is {order.state}; Redis tells its ticket {byte!r}", order.buyer, number)
            continue
        told = h.tickets.get((order.sku, order.seq))
        if told is None or told.byte != byte:
            r.find(f"order {number} is {order.state}; its status in Redis is not", order.buyer, number)
        elif told.version != order.version:
            r.find(
                f"order {number} is at version {order.version}; Redis tells {told.version}",
                order.buyer,
                number,
            )


# --- the line --------------------------------------------------------------------------------------------------------


def line(h: History, r: Result) -> None:
    for item in h.items.values():
        rank = _ranks(item)
        claims: list[tuple[int, Order]] = []
        if rank is not None:
            mine = [o for o in h.orders.values() if o.sku == item.sku and o.epoch == item.epoch]
            claims = sorted(((rank(order.seq), order) for order in mine), key=lambda pair: pair[0])
        before: Order | None = None
        for place, order in claims:
            r.looked_at += 1
            if before is not None and order.claimed_ms < before.claimed_ms:
                r.find(
                    f"{item.sku}: rank {place} got its unit {before.claimed_ms - order.claimed_ms} ms before rank"
                    f" {rank(before.seq) if rank else 0}",
                    before.buyer,
                    before.order_no,
                )
            before = order
            if h.held and place > item.served:
                r.find(
                    f"{item.sku}: rank {place} has a unit, served is {item.served}",
                    order.buyer,
                    order.order_no,
                )
        if h.held and rank is not None and (item.drawn or not item.early):
            for seq, byte in enumerate(item.outcome, 1):
                if byte == "w" and seq > item.dead_seq and rank(seq) <= item.served:
                    r.find(
                        f"{item.sku}: rank {rank(seq)} waits, and the line has passed it (served {item.served})",
                        _buyer_of(h, item.sku, seq),
                    )
    for ticket, seen in h.told.items():
        _never_back(r, ticket, seen)


def _ranks(item: Item) -> Callable[[int], int] | None:
    """seq → rank of service, None while nobody knows."""
    if not item.drawn:
        return None if item.early else lambda seq: seq
    keys = draw.round_keys(item.drawn_key, item.drawn_n)
    return lambda seq: draw.rank_of(seq, item.drawn_n, keys) if seq <= item.drawn_n else seq


def _never_back(r: Result, ticket: str, seen: list[Done]) -> None:
    """`ahead` of one ticket: the least that had been told when a question was put is the most it may be told."""
    places = [done for done in seen if _end(done).ahead is not None and _end(done).state == "waiting"]
    at, least = 0, None
    for done in sorted(places, key=lambda one: one.begun.at):
        while at < len(places) and _end(places[at]).at < done.begun.at:
            ahead = _end(places[at]).ahead
            least = ahead if least is None else min(least, ahead or 0)
            at += 1
        now = _end(done).ahead
        if least is not None and now is not None and now > least:
            r.find(f"ticket {ticket}: {least} were ahead, then {now}", done.begun.buyer)
            return
        r.looked_at += 1


def the_draw(h: History, r: Result) -> None:
    """Of a sale that was made anew: the draw of its last epoch, and that nobody's rank ever changed."""
    for ticket, seen in h.told.items():
        # Of a line that was lost: the same buyer may get the same seq again, in another draw.
        lost = any(_end(done).state == "lapsed" for done in seen)
        ranks = set() if lost else {_end(done).rank for done in seen} - {None}
        r.looked_at += bool(ranks) and h.anew
        if len(ranks) > 1:
            r.find(f"ticket {ticket} was told the ranks {sorted(ranks)}", _end(seen[-1]).buyer)  # type: ignore[type-var]
    if h.sale is None or not h.held or not h.sale.seed:
        return
    seed = bytes.fromhex(h.sale.seed)
    if draw.seed_hash(seed) != h.sale.seed_hash:
        r.find("the seed is not the one that was committed to")
    for item in h.items.values():
        if not item.drawn:
            continue
        r.looked_at += 1
        hashes = [item.drawn_hashes[at : at + 20] for at in range(0, len(item.drawn_hashes), 20)]
        if len(hashes) != item.drawn_n:
            r.find(f"{item.sku}: {len(hashes)} ticket hashes for a draw of {item.drawn_n}")
            continue
        start = draw.chain_start(h.sale.sale, item.sku, h.sale.epoch, h.sale.seed_hash)
        chain = draw.chain_head(start, [bytes.fromhex(one) for one in hashes])
        if chain != item.chain:
            r.find(f"{item.sku}: the chain over the early tickets ends in {chain}, not {item.chain}")
        none = h.sale.beacon_source in ("", "none") or item.drawn_n == 0
        if item.beacon_used not in ({""} if none else {h.sale.beacon_value, "missing"}):
            r.find(f"{item.sku}: beacon {item.beacon_used!r} is not the one that was named")
        if draw.draw_key(seed, chain, item.beacon_used) != item.drawn_key:
            r.find(f"{item.sku}: the key of the draw is another")
        keys = draw.round_keys(item.drawn_key, item.drawn_n)
        for ticket, seen in h.told.items():
            last = _end(seen[-1])
            if last.sku != item.sku or last.seq is None or not _of_this_epoch(h, seen):
                continue
            early = last.seq <= item.drawn_n
            if not early and h.anew:
                continue  # the ranks of its first line went with it
            r.looked_at += 1
            if early and ticket != f"{last.seq}-{hashes[last.seq - 1]}":
                r.find(f"ticket {ticket} was not in the draw as told", last.buyer)
            rank = draw.rank_of(last.seq, item.drawn_n, keys) if early else last.seq
            wrong = [_end(done).rank for done in seen if _end(done).rank not in (None, rank)]
            if wrong:
                r.find(f"ticket {ticket} was told rank {wrong[0]}, the draw says {rank}", last.buyer)


# --- small questions -------------------------------------------------------------------------------------------------


def _end(done: Done) -> Op:
    assert done.end is not None
    return done.end


def _of_this_epoch(h: History, seen: list[Done]) -> bool:
    """Whether the ticket surely is of the sale's last epoch: the only one, or told well after everything was healed."""
    told_s = seen[-1].begun.at - STALE_S
    return not h.anew or any(mark.what == "healed" and mark.at < told_s for mark in h.marks)


def _byte(item: Item, seq: int) -> str:
    return item.outcome[seq - 1 : seq] or "."


def _buyer_of(h: History, sku: str, seq: int) -> str:
    for seen in h.told.values():
        last = _end(seen[-1])
        if last.sku == sku and last.seq == seq:
            return last.buyer
    return ""


CHECKS: Mapping[str, Callable[[History, Result], None]] = {
    "bank": bank,
    "set": the_set,
    "queue": queue,
    "money": money,
    "states": states,
    "stores": stores,
    "line": line,
    "draw": the_draw,
    "sold_out": sold_out,
    "executions": executions,
}
