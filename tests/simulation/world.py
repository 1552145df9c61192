"""A deterministic world around the product's pure parts: a fake clock, fake stores, suppliers that lie low, and dice.

What is real: app/purchase/paying/attempt.py (every decision about a payment), app/states.py, app/draw.py, and the judge
of app/history, to which each run hands its history. What is fake, and as simple as it can be: Postgres (rows with the
guards of app/ledger), Redis (units, bytes, versions), the suppliers.

Every participant is a generator that yields wherever a process would wait for another; the scheduler picks who goes on,
moves the clock, loses answers, delays requests past their callers, and kills workers between any two steps. The same
seed plays the same history. One history is one sale of a few units with buyers who pay, pay late, leave and ask for
links again; after the faults everything must come to rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from app import draw
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.payment import Captured, Link, Payment
from app.purchase.paying import attempt as law
from app.record import Attempt, Capture, Item, Line, Op, Order, Run, Sale, Stream, Supplier, Ticket
from app.states import ARROWS, BYTE_OF, STATE_OF, TicketState

Task = Generator[None, None, None]
Told = Generator[None, None, law.Move | None]

SKU = "A"
PRICE = 500
PAY_WITHIN_S = 30.0
LEASE_S = 5.0
LINK_MIN_S = 2.0
GRACE_S = 1.0
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
OPEN = ("created", "sent", "unknown")
CALLS_MAX = 6
REST_STEPS = 20_000


@dataclass
class Row:
    """A payment attempt."""

    id: str
    order: str
    provider: str
    state: str
    sent_at: float | None = None
    expires_at: float | None = None
    leased_until: float = 0.0
    generation: int = 0
    next_at: float = 0.0


@dataclass
class Sold:
    """An order."""

    no: str
    buyer: str
    seq: int
    claimed_ms: int
    state: str = "reserved"
    version: int = 1
    pay_by: float | None = None
    leaving: bool = False
    leased_until: float = 0.0
    generation: int = 0
    reserved_at: float = 0.0


@dataclass
class Money:
    ref: str
    order: str
    attempt: str
    state: str  # due, kept, refund_due, refunded


@dataclass
class Held:
    """A link at a supplier."""

    attempt: str
    order: str
    state: str  # waiting, paid, declined, closed
    expires_at: float
    ref: str = ""
    refunded: bool = False


class World:
    """One history, from its seed."""

    def __init__(self, seed: int, *, bug: str = "") -> None:
        self.seed = seed
        self.bug = bug
        self.dice = random.Random(seed)
        self.now = 0.0
        self.lines: list[Line] = []
        self.faults = True
        self.tasks: list[tuple[str, Task]] = []
        self.ids = 0
        self.total = self.dice.randint(1, 4)
        # Redis
        self.left = self.total
        self.bytes: dict[int, str] = {}
        self.shown: dict[int, str] = {}
        self.told: dict[int, int] = {}
        # Postgres
        self.reserved = self.sold = 0
        self.orders: dict[str, Sold] = {}
        self.rows: dict[str, Row] = {}
        self.captures: dict[str, Money] = {}
        self.outbox: list[tuple[str, str]] = []  # (release | mark, order)
        # suppliers
        self.held: dict[str, dict[str, Held]] = {"one": {}, "two": {}}
        self.never: dict[str, set[str]] = {"one": set(), "two": set()}
        self.trouble = self.dice.choice([0.0, 0.1, 0.3, 0.6])  # of every call
        self.sloppy = self.dice.random() < 0.3  # suppliers that take money for links that are closed
        self.mortality = self.dice.choice([0.0, 0.02, 0.08])  # of workers, a step

    def chance(self, p: float) -> bool:
        return self.dice.random() < p

    # --- what is written down

    def supplier(self, op: str, of: Held, **more: object) -> None:
        self.lines.append(
            Supplier(
                at=self.now, op=op, attempt=of.attempt, order=of.order, amount_minor=PRICE, currency="CNY",
                until=of.expires_at, **more,
            )  # type: ignore[arg-type]
        )  # fmt: skip

    def tell(self, order: Sold) -> None:
        """The buyer looks, and is told what Redis holds."""
        byte = self.bytes[order.seq] if self.bug == "retake_is_told" else self.shown[order.seq]
        self.ids += 1
        who = {"id": self.ids, "process": order.buyer, "op": "poll", "buyer": order.buyer}
        self.lines.append(Op(at=self.now, do="invoke", **who))  # type: ignore[arg-type]
        self.lines.append(
            Op(
                at=self.now + 1e-6, do="ok", sku=SKU, units=1, ticket=f"{order.seq}-x", seq=order.seq,
                state=STATE_OF[byte.encode()].value, order=order.no, **who,  # type: ignore[arg-type]
            )
        )  # fmt: skip

    # --- Redis

    def byte_to(self, seq: int, byte: str) -> None:
        """A ticket moves; only along the arrows."""
        before = self.bytes.get(seq)
        if before is not None and before != byte:
            assert TicketState(STATE_OF[byte.encode()]) in ARROWS[STATE_OF[before.encode()]], (
                f"ticket {seq}: {before} -> {byte}"
            )
        self.bytes[seq] = self.shown[seq] = byte

    def release(self, order: Sold) -> None:
        """units_release: out of claimed or reserved, once for each version."""
        if self.bytes[order.seq] not in "cr" or self.told.get(order.seq, 0) >= order.version:
            return
        self.byte_to(order.seq, BYTE_OF[TicketState(order.state)].decode())
        self.told[order.seq] = order.version
        self.left += 1

    def retake(self, order: Sold) -> bool:
        """units_retake: an ended ticket holds its unit again. True: it does."""
        byte = self.bytes[order.seq]
        if byte in "crp":
            return True
        if self.left == 0:
            return False
        self.left -= 1
        self.bytes[order.seq] = "c"  # late money: no arrow of a ticket, so its buyer is not told
        self.told[order.seq] = order.version
        return True

    def mark(self, order: Sold) -> None:
        """ticket_mark: what the row says now, unless something newer was told."""
        byte = BYTE_OF[TicketState("paid" if order.state == "refunding" else order.state)].decode()
        if self.told.get(order.seq, 0) >= order.version or byte in "ek":
            return
        if self.bytes[order.seq] == "c" and byte == "p":
            self.bytes[order.seq] = "r"
        self.byte_to(order.seq, byte)
        self.told[order.seq] = order.version

    # --- Postgres: each method is one transaction

    def lease(self, row: Row) -> tuple[Row, float | None] | None:
        """Take an attempt: (it, when it had been sent before). None: another has it, or it is over."""
        if row.state not in (*OPEN, "wanted") or row.leased_until > self.now:
            return None
        before = row.sent_at
        row.leased_until, row.generation = self.now + LEASE_S, row.generation + 1
        if row.state == "created" and row.sent_at is None:
            row.sent_at = self.now
        return Row(**row.__dict__), before

    def holds(self, mine: Row) -> Row | None:
        row = self.rows[mine.id]
        return row if row.generation == mine.generation and row.state in (*OPEN, "wanted") else None

    def unended(self, order: str) -> list[Row]:
        return [row for row in self.rows.values() if row.order == order and row.state in (*OPEN, "wanted")]

    def add(self, order: Sold, provider: str, state: str = "created") -> None:
        number = sum(row.order == order.no for row in self.rows.values()) + 1
        if number > 20:
            return
        name = f"{order.no}-{number}"
        self.rows[name] = Row(name, order.no, provider, state, next_at=self.now)

    def end(self, mine: Row, state: str, *, again: bool = False, at: str = "") -> bool:
        row = self.holds(mine)
        if row is None:
            return False
        row.state, row.generation = state, row.generation + 1
        order = self.orders[row.order]
        if order.state == "reserved":
            if at or (again and not order.leaving and not self.unended(order.no)):
                self.add(order, at or row.provider)
            for other in self.unended(order.no):
                other.next_at = self.now
            order.version += 1
            self.outbox.append(("mark", order.no))
        return True

    def evidence(self, captured: Captured) -> str:
        """take_evidence."""
        if captured.provider_ref in self.captures:
            return "known"
        order = self.orders[captured.order_no]
        money = Money(captured.provider_ref, order.no, captured.attempt_id, "due")
        self.captures[money.ref] = money
        if order.state == "reserved":
            order.state, order.version = "paid", order.version + 1
            self.reserved, self.sold = self.reserved - 1, self.sold + 1
            self.outbox.append(("mark", order.no))
            money.state = "kept"
            self.rows[captured.attempt_id].state = "succeeded"
            for other in self.unended(order.no):
                other.next_at = self.now
            return "paid"
        if order.state in ("expired", "cancelled"):
            return "late"
        money.state = "refund_due"
        return "refund"

    # --- a supplier, and the way there

    def call(self, name: str, work: Callable[[], object], unit: list[object]) -> Task:
        """One request: executed or not, answered or not, now or after its caller has given up. unit[0]: the answer."""
        yield
        if not (self.faults and self.chance(self.trouble)):
            unit.append(Done(work()))
            return
        how = self.dice.randrange(4)
        if how == 0:
            unit.append(NotDone("refused_before"))
        elif how == 1:
            work()
            unit.append(MaybeDone("reply_lost"))
        elif how == 2:
            unit.append(MaybeDone("never_arrived"))
        else:
            self.tasks.append((f"late {name}", self.later(work)))
            unit.append(MaybeDone("arrives_late"))
        yield

    def later(self, work: Callable[[], object]) -> Task:
        for _ in range(self.dice.randint(1, 30)):
            yield
        work()

    def make(self, provider: str, row: Row, until: float) -> Payment:
        """The link of an attempt, one however often it is asked for; refused for ever once it was closed."""
        held = self.held[provider].get(row.id)
        if held is None:
            if row.id in self.never[provider]:
                return Payment(state="closed")
            held = Held(row.id, row.order, "waiting", until)
            self.held[provider][row.id] = held
            self.supplier("created", held)
            if self.bug == "" and self.chance(0.03):
                held.state = "declined"
                self.supplier("declined", held)
        return self.look(provider, row)

    def look(self, provider: str, row: Row) -> Payment:
        held = self.held[provider].get(row.id)
        if held is None:
            return Payment(state="absent")
        if held.state == "waiting" and held.expires_at <= self.now:
            held.state = "closed"
            self.supplier("closed", held)
        captured = None
        if held.state == "paid":
            captured = Captured(
                provider_ref=held.ref, attempt_id=held.attempt, order_no=held.order, amount_minor=PRICE,
                currency="CNY", captured_at=EPOCH,
            )  # fmt: skip
        return Payment(state=held.state, captured=captured)  # type: ignore[arg-type]

    def shut(self, provider: str, row: Row) -> Payment:
        held = self.held[provider].get(row.id)
        if held is None:
            self.never[provider].add(row.id)
            return Payment(state="closed")
        if self.look(provider, row).state == "waiting":
            held.state = "closed"
            self.supplier("closed", held)
        return self.look(provider, row)

    def give(self, provider: str, attempt: str) -> None:
        """The buyer's money, once; and a call-back that may come twice, late or never."""
        held = self.held[provider].get(attempt)
        if held is None or held.state in ("paid", "declined"):
            return
        if not self.sloppy and (held.state != "waiting" or held.expires_at <= self.now):
            return
        late = (
            held.state != "waiting"
        )  # nobody asks about a closed link again: this call-back is not given up
        held.state, held.ref = "paid", f"cap-{attempt}"
        self.supplier("captured", held, capture=held.ref)
        for _ in range(self.dice.choice([1, 1, 2] if late else [0, 1, 1, 2])):
            self.tasks.append(("hook", self.hook(provider, attempt)))

    def hook(self, provider: str, attempt: str) -> Task:
        for _ in range(self.dice.randint(0, 40)):
            yield
        payment = self.look(provider, self.rows[attempt])
        assert payment.captured is not None
        self.evidence(payment.captured)

    # --- the worker

    def play(self, mine: Row, before: float | None, move: law.Move) -> Generator[None, None, str]:
        """pay._play: call until there is a verdict, and carry it out. Returns clear, paid or unknown."""
        facts = self.facts(mine, before)
        order = self.orders[mine.order]
        for _ in range(CALLS_MAX):
            got: list[object] = []
            match move:
                case law.Create():
                    until = order.pay_by or self.now + PAY_WITHIN_S
                    make = partial(self.make, mine.provider, mine, until)
                    yield from self.call("create", make, got)
                    move = law.after_create(facts, self.linked(got[0], until), other=self.chance(0.5))
                    if self.bug == "failover_while_unknown" and isinstance(move, law.Unknown):
                        move = law.Elsewhere(move.code, law.SendLater())
                    if self.bug == "new_key" and isinstance(move, law.Unknown):
                        move = law.End("failed", move.code, again=True)
                case law.Query():
                    yield from self.call("query", lambda: self.look(mine.provider, mine), got)
                    move = law.after_query(facts, move, got[0])  # type: ignore[arg-type]
                case law.Close():
                    yield from self.call("close", lambda: self.shut(mine.provider, mine), got)
                    move = law.after_close(move, got[0])  # type: ignore[arg-type]
                case _:
                    return self.carry_out(mine, move)
            yield
        return self.carry_out(mine, law.Unknown("contradicts_itself"))

    def linked(self, answer: object, until: float) -> Answer[Link]:
        if not isinstance(answer, Done):
            return answer  # type: ignore[return-value]
        state = answer.value.state
        if state != "waiting":
            return Refused(state)
        expires = EPOCH + timedelta(seconds=until)
        return Done(Link(provider_ref=None, kind="redirect", url="x", params=None, expires_at=expires))

    def carry_out(self, mine: Row, verdict: law.Move) -> str:
        order = self.orders[mine.order]
        row = self.holds(mine)
        match verdict:
            case law.Show():
                if row is not None:
                    held = self.held[mine.provider][mine.id]
                    row.state, row.expires_at = "sent", held.expires_at
                    row.leased_until, row.next_at = (
                        0.0,
                        self.now + (15.0 if order.state == "reserved" else 0.0),
                    )
                    if order.state == "reserved" and not order.leaving:
                        order.pay_by = order.pay_by or self.now + PAY_WITHIN_S
                        order.version += 1
                        self.outbox.append(("mark", order.no))
            case law.SendLater():
                if row is not None:
                    row.sent_at, row.leased_until, row.next_at = None, 0.0, self.now + 1.0
            case law.Elsewhere():
                self.end(mine, "failed", at="two" if mine.provider == "one" else "one")
            case law.LookLater():
                if row is not None:
                    row.leased_until, row.next_at = 0.0, self.now + 5.0
            case law.Unknown():
                if row is not None:
                    row.state, row.leased_until, row.next_at = "unknown", 0.0, self.now + 1.0
            case law.Settle(captured):
                if self.evidence(captured) in ("known", "late", "refund"):
                    self.end(mine, "closed")
                return "paid"
            case law.End(state, _, again):
                self.end(mine, state, again=again)
                return "clear"
            case law.MakeWay():
                others = [other for other in self.unended(order.no) if other.id != mine.id]
                if order.state != "reserved" or order.leaving:
                    self.end(mine, "closed")
                elif row is not None and not others:
                    row.state, row.sent_at, row.leased_until, row.next_at = "created", None, 0.0, self.now
                elif row is not None:
                    row.leased_until, row.next_at = 0.0, self.now + 1.0
                    others[0].next_at = self.now
                    if others[0].state != "wanted":
                        self.tasks.append(("replace", self.replace(others[0])))
        return "unknown"

    def replace(self, other: Row) -> Task:
        leased = self.lease(other)
        if leased is not None:
            yield from self.play(*leased, law.end(self.facts(*leased), "replaced"))

    def facts(self, mine: Row, before: float | None) -> law.Facts:
        order = self.orders[mine.order]
        until = order.pay_by or self.now + PAY_WITHIN_S
        return law.Facts(
            state=mine.state,  # type: ignore[arg-type]
            was_sent=before is not None,
            payable=order.state == "reserved" and not order.leaving,
            too_late=until - self.now < LINK_MIN_S,
            link_over=mine.expires_at is not None and mine.expires_at + GRACE_S <= self.now,
        )

    def payer(self) -> Task:
        """One worker's turns over due attempts."""
        while True:
            yield
            due = [
                row for row in self.rows.values() if row.next_at <= self.now and row.leased_until <= self.now
            ]
            due = [row for row in due if row.state in (*OPEN, "wanted")]
            if due:
                leased = self.lease(self.dice.choice(due))
                if leased is not None:
                    yield from self.play(*leased, law.begin(self.facts(*leased)))

    def expirer(self) -> Task:
        """Ends unpaid orders: first the suppliers, then the row, then the outbox."""
        while True:
            yield
            late = [
                order
                for order in self.orders.values()
                if order.state == "reserved" and order.leased_until <= self.now and self.is_over(order)
            ]
            if not late:
                continue
            order = self.dice.choice(late)
            order.leased_until, order.generation = self.now + LEASE_S, order.generation + 1
            mine, clear = order.generation, True
            for row in sorted(self.unended(order.no), key=lambda row: row.state != "wanted"):
                leased = self.lease(row)
                if leased is None:
                    clear = False
                    break
                if row.state == "wanted":
                    self.end(leased[0], "closed")
                    continue
                said = yield from self.play(*leased, law.end(self.facts(*leased), "not_payable"))
                if said != "clear":
                    clear = False
                    break
            yield
            if self.bug == "no_clear":
                clear = True
            elif any(row.state in OPEN for row in self.unended(order.no)):
                clear = False
            guarded = order.state == "reserved" and order.generation == mine
            if clear and (guarded or self.bug == "no_guard") and order.state in ("reserved", "paid"):
                order.state = "cancelled" if order.leaving else "expired"
                order.version += 1
                self.reserved -= 1
                self.outbox.append(("release", order.no))

    def is_over(self, order: Sold) -> bool:
        if order.pay_by is None and self.now > order.reserved_at + 60:
            order.pay_by = self.now + PAY_WITHIN_S
        return order.leaving or (order.pay_by is not None and order.pay_by <= self.now)

    def relay(self) -> Task:
        """Tells Redis what Postgres has decided, perhaps twice."""
        while True:
            yield
            if not self.outbox:
                continue
            kind, number = self.outbox[0]
            order = self.orders[number]
            open_releases = ("release", number) in self.outbox
            if kind == "release":
                self.release(order)
            elif not open_releases and order.state not in ("expired", "cancelled"):
                self.mark(order)
            yield  # a worker that dies here leaves the row: it is applied again
            if self.outbox and self.outbox[0] == (kind, number):
                self.outbox.pop(0)

    def weigher(self) -> Task:
        """Late money: its unit again, or the money back; and refunds."""
        while True:
            yield
            for money in list(self.captures.values()):
                order = self.orders[money.order]
                if money.state == "due":
                    if ("release", order.no) in self.outbox:
                        continue  # under way: in a moment
                    taken = order.state in ("expired", "cancelled") and self.retake(order)
                    yield
                    if money.state != "due":
                        continue
                    if taken and order.state in ("expired", "cancelled"):
                        order.state, order.version = "paid", order.version + 1
                        self.sold += 1
                        money.state = "kept"
                        self.outbox.append(("mark", order.no))
                    else:
                        money.state = "refund_due"
                if money.state == "refund_due":
                    got: list[object] = []
                    yield from self.call("refund", lambda money=money: self.refund(money), got)  # type: ignore[misc]
                    if isinstance(got[0], Done):
                        money.state = "refunded"
                        kept = any(m.state == "kept" for m in self.captures.values() if m.order == order.no)
                        if order.state in ("expired", "cancelled") and not kept:
                            order.state, order.version = "refunded", order.version + 1
                            self.outbox.append(("mark", order.no))

    def refund(self, money: Money) -> None:
        for held in (self.held["one"].get(money.attempt), self.held["two"].get(money.attempt)):
            if held is not None and held.ref == money.ref and not held.refunded:
                held.refunded = True
                self.supplier("refunded", held, capture=held.ref, refund=f"R{money.ref}")

    # --- buyers

    def buyer(self, order: Sold) -> Task:
        pays, leaves, asks = self.chance(0.8), self.chance(0.1), self.chance(0.2)
        for _ in range(self.dice.randint(0, 20)):
            yield
        while order.state == "reserved":
            yield
            if self.chance(0.2):
                self.tell(order)
            if leaves and self.chance(0.05):
                order.leaving, order.version = True, order.version + 1
            if asks and self.chance(0.05) and not order.leaving and not self.is_over(order):
                wanted = [row for row in self.unended(order.no) if row.state == "wanted"]
                if not wanted:
                    state = "wanted" if self.unended(order.no) else "created"
                    self.add(order, self.dice.choice(["one", "two"]), state)
            links = [row for row in self.rows.values() if row.order == order.no and row.state == "sent"]
            if pays and links and self.chance(0.4):
                link = self.dice.choice(links)
                for _ in range(
                    self.dice.choice([0, 0, 0, 5, 60, 150])
                ):  # some pay a link that they opened long ago
                    yield
                self.give(link.provider, link.id)
        for _ in range(200):
            yield
            if self.chance(0.1):
                self.tell(order)

    # --- the scheduler

    def claim(self, seq: int, now_ms: int) -> None:
        self.left -= 1
        self.reserved += 1
        order = Sold(f"O{seq}", f"b{seq}", seq, now_ms, reserved_at=self.now)
        self.orders[order.no] = order
        self.bytes[seq] = self.shown[seq] = "r"
        self.told[seq] = 1
        self.add(order, self.dice.choice(["one", "two"]))
        self.tasks.append(("buyer", self.buyer(order)))

    def run(self) -> list[Line]:
        """Play the history to its rest. AssertionError: something moved that must not, or it never rested."""
        self.lines.append(Run(at=0.0, by="simulation", sale="s", seed=self.seed))
        waiting = self.in_rank_order()
        workers: dict[str, Callable[[], Task]] = {
            "payer": self.payer,
            "payer2": self.payer,
            "expirer": self.expirer,
            "relay": self.relay,
            "weigher": self.weigher,
        }
        running = {name: make() for name, make in workers.items()}
        steps = self.dice.randint(150, 500)
        for step in range(REST_STEPS):
            if step == steps:
                self.faults = False
            self.now += self.dice.random() * 0.3
            while waiting and self.left and not any(kind == "release" for kind, _ in self.outbox):
                self.claim(waiting.pop(0), int(self.now * 1000))
            at = self.dice.randrange(len(running) + len(self.tasks))
            if at < len(running):
                name = list(running)[at]
                if self.faults and self.chance(self.mortality):
                    running[name] = workers[name]()  # kill -9, and another is started
                else:
                    next(running[name])
            else:
                self.go_on(at - len(running))
            if step > steps and self.at_rest(waiting):
                return self.finish()
        raise AssertionError(f"seed {self.seed}: not at rest after {REST_STEPS} steps")

    def go_on(self, at: int) -> None:
        try:
            next(self.tasks[at][1])
        except StopIteration:
            del self.tasks[at]

    def at_rest(self, waiting: list[int]) -> bool:
        return (
            not self.outbox
            and not self.tasks
            and not (waiting and self.left)
            and all(order.state not in ("reserved", "refunding") for order in self.orders.values())
            and all(row.state not in (*OPEN, "wanted") for row in self.rows.values())
            and all(money.state in ("kept", "refunded") for money in self.captures.values())
        )

    def in_rank_order(self) -> list[int]:
        """The seqs of everybody in line, as the draw puts them."""
        self.buyers = self.dice.randint(1, 7)
        self.secret = self.dice.randbytes(32)
        self.hashes = [self.dice.randbytes(10) for _ in range(self.buyers)]
        self.seed_hash = draw.seed_hash(self.secret)
        self.chain = draw.chain_head(draw.chain_start("s", SKU, 1, self.seed_hash), self.hashes)
        self.key = draw.draw_key(self.secret, self.chain, "")
        keys = draw.round_keys(self.key, self.buyers)
        self.last_rank = 0
        return [draw.seq_of(rank, self.buyers, keys) for rank in range(1, self.buyers + 1)]

    def finish(self) -> list[Line]:
        """The end, as a dump of the two stores would be."""
        keys = draw.round_keys(self.key, self.buyers)
        served = max(
            (draw.rank_of(order.seq, self.buyers, keys) for order in self.orders.values()), default=0
        )
        outcome = "".join(self.bytes.get(seq, "w") for seq in range(1, self.buyers + 1))
        self.lines += [
            Sale(
                at=self.now, sale="s", state="closed", epoch=1, limit=1, standby=True, held=True, redis_epoch=1,
                seed=self.secret.hex(), seed_hash=self.seed_hash,
            ),
            Item(
                sku=SKU, epoch=1, total=self.total, reserved=self.reserved, sold=self.sold, left=self.left,
                next_seq=self.buyers + 1, served=served, early=self.buyers, drawn=True, drawn_n=self.buyers,
                drawn_key=self.key, chain=self.chain, outcome=outcome,
                drawn_hashes=b"".join(self.hashes).hex(),
            ),
            Stream(name="orders", added=len(self.orders), length=0, pending=0),
        ]  # fmt: skip
        for order in self.orders.values():
            self.lines.append(
                Order(
                    order_no=order.no, sku=SKU, buyer=order.buyer, epoch=1, seq=order.seq, units=1,
                    amount_minor=PRICE, currency="CNY", state=order.state, version=self.told[order.seq],
                    claimed_ms=order.claimed_ms,
                )
            )  # fmt: skip
            byte = self.bytes[order.seq]
            self.lines.append(Ticket(sku=SKU, seq=order.seq, version=self.told[order.seq], byte=byte))
        self.lines += [Attempt(id=row.id, order=row.order, state=row.state) for row in self.rows.values()]
        self.lines += [
            Capture(ref=money.ref, order=money.order, amount_minor=PRICE, state=money.state)
            for money in self.captures.values()
        ]
        return self.lines
