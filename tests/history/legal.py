"""Legal histories made from dice: a small sale played by the rules, with all that a recorder writes down."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

from app import draw
from app.record import (
    Attempt,
    Capture,
    Inbox,
    Item,
    Line,
    Mark,
    Op,
    Order,
    Run,
    Sale,
    Stream,
    Supplier,
    Ticket,
    Wire,
)

SKU = "A"
SALE = "s"
PRICE = 500
BYTE = {"reserved": "r", "paid": "p", "expired": "e", "refunded": "f"}


@dataclass
class Player:
    buyer: str
    seq: int
    ticket: str
    state: str = "waiting"
    order: Order | None = None


@dataclass
class Play:
    """One sale: everybody joins, the draw, units in rank order, some pay, some do not, units go to the next."""

    seed: int
    buyers: int = 12
    units: int = 4
    early: bool = True
    standby: bool = True
    lines: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.now = 1_000.0
        self.ids = 0
        self.served = 0
        self.left = self.units
        self.sold = 0
        self.added = 0

    def tick(self) -> float:
        self.now += self.dice.random() * 0.1 + 0.001
        return self.now

    def ask(self, player: Player, op: str, *, process: str = "", told: bool = True, **more: object) -> None:
        """One operation of a buyer, who is told how things stand."""
        self.ids += 1
        who = {
            "id": self.ids,
            "process": process or player.buyer,
            "op": op,
            "buyer": player.buyer,
            "sale": SALE,
        }
        self.lines.append(Op(at=self.tick(), do="invoke", sku=SKU, units=1, **who))  # type: ignore[arg-type]
        if op == "join":
            self.lines.append(Wire(at=self.tick(), op="line_join", buyer=player.buyer))
        if self.dice.random() < 0.1 and op == "poll":
            self.lines.append(Op(at=self.tick(), do="unknown", **who))  # type: ignore[arg-type]
            return
        if not told:
            self.lines.append(Op(at=self.tick(), do="ok", status=200, **who))  # type: ignore[arg-type]
            return
        rank = self.rank(player.seq) if self.open else None
        self.lines.append(
            Op(
                at=self.tick(),
                do="ok",
                status=200,
                sku=SKU,
                units=1,
                ticket=player.ticket,
                state=player.state,
                seq=player.seq,
                rank=rank,
                ahead=rank - 1 - self.served if rank is not None and player.state == "waiting" else None,
                order=player.order.order_no if player.order else "",
                **who,  # type: ignore[arg-type]
                **more,  # type: ignore[arg-type]
            )
        )

    def rank(self, seq: int) -> int:
        return draw.rank_of(seq, self.n, self.keys) if seq <= self.n else seq

    def play(self) -> list[Line]:
        self.lines.append(Run(at=self.now, by="test", sale=SALE, seed=self.seed))
        self.lines.append(Mark(at=self.tick(), what="began"))
        self.open = False
        self.n = 0
        seed = self.dice.randbytes(32)
        hashes = [hashlib.sha1(b"%d-%d" % (self.seed, n)).digest()[:10] for n in range(self.buyers)]
        players = []
        for number in range(self.buyers):
            player = Player(f"b{number}", number + 1, f"{number + 1}-{hashes[number].hex()}")
            players.append(player)
            for tap in range(self.dice.choice([1, 1, 1, 3])):
                self.ask(player, "join", process=f"{player.buyer}#{tap}")
        self.n = self.buyers if self.early else 0
        seed_hash = draw.seed_hash(seed)
        chain = draw.chain_head(draw.chain_start(SALE, SKU, 1, seed_hash), hashes[: self.n])
        key = draw.draw_key(seed, chain, "")
        self.keys = draw.round_keys(key, self.n)
        self.open = True
        by_rank = sorted(players, key=lambda player: self.rank(player.seq))
        waiting = list(by_rank)
        self.lines.append(Mark(at=self.tick(), what="fault", note="something broke"))
        while waiting and self.left:
            player = waiting.pop(0)
            self._claim(player)
            for other in self.dice.sample(waiting, min(2, len(waiting))):
                self.ask(other, "poll")
            if self.dice.random() < 0.7:
                self._pay(player)
            elif self.dice.random() < 0.7:
                self._expire(player)
        sold_out = not self.standby and not self.left
        for player in waiting:
            if sold_out:
                player.state = "sold_out"
            self.ask(player, "poll")
        self.lines.append(Mark(at=self.tick(), what="healed"))
        self.lines.append(Mark(at=self.tick(), what="agreed"))
        self._end(players, seed, seed_hash, chain, key, hashes)
        return self.lines

    def _claim(self, player: Player) -> None:
        self.left -= 1
        self.added += 1
        self.served = self.rank(player.seq)
        player.state = "claimed"
        self.ask(player, "poll")
        player.order = Order(
            order_no=f"O{player.seq}",
            sku=SKU,
            buyer=player.buyer,
            epoch=1,
            seq=player.seq,
            units=1,
            amount_minor=PRICE,
            currency="CNY",
            state="reserved",
            version=1,
            claimed_ms=int(self.now * 1000),
        )
        player.state = "reserved"
        self.ask(player, "poll")

    def _money(self, player: Player, op: str, number: int, **more: object) -> None:
        assert player.order is not None
        line = Supplier(
            at=self.tick(),
            op=op,  # type: ignore[arg-type]
            attempt=f"{player.order.order_no}-{number}",
            order=player.order.order_no,
            amount_minor=PRICE,
            currency="CNY",
            **more,  # type: ignore[arg-type]
        )
        self.lines.append(line)

    def _pay(self, player: Player) -> None:
        assert player.order is not None
        number = 1
        self._money(player, "created", number, until=self.now + 60)
        if self.dice.random() < 0.3:
            self._money(player, "closed", number)
            number = 2
            self._money(player, "created", number, until=self.now + 60)
        self.ask(player, "pay", told=False)
        self._money(player, "captured", number, capture=f"cap{player.seq}")
        self._money(player, "hook", number, event=f"evt{player.seq}")
        player.order.state, player.order.version = "paid", 3
        player.state = "paid"
        self.sold += 1
        self.ask(player, "poll")

    def _expire(self, player: Player) -> None:
        assert player.order is not None
        player.order.state, player.order.version = "expired", 2
        player.state = "expired"
        self.left += 1
        self.ask(player, "poll")
        if self.dice.random() < 0.5:  # money that came too late goes back
            self._money(player, "created", 1, until=self.now + 60)
            self._money(player, "captured", 1, capture=f"cap{player.seq}")
            self._money(player, "refunded", 1, capture=f"cap{player.seq}", refund=f"ref{player.seq}")
            player.order.state, player.order.version = "refunded", 3
            player.state = "refunded"
            self.ask(player, "poll")

    def _end(
        self, players: list[Player], seed: bytes, seed_hash: str, chain: str, key: str, hashes: list[bytes]
    ) -> None:
        outcome = "".join(BYTE[player.order.state] if player.order else "w" for player in players)
        reserved = sum(player.order is not None and player.order.state == "reserved" for player in players)
        self.lines += [
            Mark(at=self.tick(), what="drained"),
            Sale(
                at=self.tick(), sale=SALE, state="closed", epoch=1, limit=1, standby=self.standby, held=True,
                redis_epoch=1, seed=seed.hex(), seed_hash=seed_hash, beacon_source="none",
            ),
            Item(
                sku=SKU, epoch=1, total=self.units, reserved=reserved, sold=self.sold, left=self.left,
                next_seq=len(players) + 1, served=self.served, early=self.n, drawn=True, drawn_n=self.n,
                drawn_key=key, chain=chain, outcome=outcome,
                dead_seq=0 if self.standby or self.left else len(players),
                drawn_hashes=b"".join(hashes[: self.n]).hex(),
            ),
            Stream(name="orders", added=self.added, length=0, pending=0),
        ]  # fmt: skip
        created = {line.attempt: line for line in self.lines if isinstance(line, Supplier)}
        self.lines += [Attempt(id=name, order=line.order, state="closed") for name, line in created.items()]
        for line in list(self.lines):
            if isinstance(line, Supplier) and line.op == "captured":
                self.lines.append(
                    Capture(ref=line.capture, order=line.order, amount_minor=PRICE, state="kept")
                )
            if isinstance(line, Supplier) and line.event:
                self.lines.append(Inbox(event=line.event))
        for player in players:
            if player.order is not None:
                self.lines.append(player.order)
                self.lines.append(
                    Ticket(
                        sku=SKU,
                        seq=player.seq,
                        version=player.order.version,
                        byte=BYTE[player.order.state],
                    )
                )
            if player.state == "paid" and self.dice.random() < 0.3:  # told again after the stores were read
                self._money(player, "hook", 1, event=f"late{player.seq}")
