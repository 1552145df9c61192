"""Positions are consistent: joins, leaves, ticks, releases, top-ups and pauses in any order, against a small model.

Every ticket is served at most once and in rank order, units are conserved, standby is served at once, `served` never
runs back; after each step the outcome bytes, the stock, the line and the order of claims are those of the model.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.answers import (
    Added,
    Claimed,
    Has,
    Joined,
    Left,
    Released,
    Served,
    Turned,
    Waits,
)
from app.draw import rank_of, round_keys
from app.redis.link import Link
from tests.lua.conftest import FREEZE, OPENS, T0, Stage, claims_of

TOKEN = 1_000_000


@dataclass
class Place:
    buyer: str
    units: int
    byte: str = "w"
    version: int = 0


class Line(RuleBasedStateMachine):
    """The model is the plain reading of purchase-path.md, one ticket at a time."""

    redis_url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.link = Link(self.redis_url, deadline_s=10, name="model")
        self.do(self.link.start())
        self.do(self.link.call("FLUSHALL"))
        self.stage = Stage(self.link)

    def do(self, work: Any) -> Any:
        return self.runner.run(_await(work))

    def teardown(self) -> None:
        self.do(self.link.close())
        self.runner.close()

    @initialize(
        units=st.integers(0, 6),
        standby=st.booleans(),
        rate_milli=st.sampled_from([-1, -1, 500, 4_000]),
        burst=st.integers(1, 4),
        early=st.integers(0, 12),
    )
    def publish(self, units: int, standby: bool, rate_milli: int, burst: int, early: int) -> None:
        self.standby, self.rate, self.burst = standby, rate_milli, burst
        self.limit = 1 if standby else 2
        self.total = self.stock = units
        self.tokens = burst * TOKEN
        self.now = self.last = T0 - 1_000
        self.served = self.dead = 0
        self.paused = self.drawn = False
        self.version = 1
        self.places: list[Place] = []
        self.claims: list[int] = []
        self.of_buyer: dict[str, int] = {}
        self.seq_at: dict[int, int] = {}
        self.top_ups = 0
        self.do(
            self.stage.publish(
                units, standby=int(standby), rate_milli=rate_milli, burst=burst, limit=self.limit
            )
        )
        self.now = T0
        self.early = 0
        if early:
            self.take([(f"b{n}", 1 + n % self.limit, False) for n in range(early)])
        self.now = FREEZE

    # the model
    def settle(self) -> None:
        if self.paused or self.rate < 0:
            self.tokens = 0
        else:
            self.tokens = min(self.burst * TOKEN, self.tokens + (self.now - self.last) * self.rate)
        self.last = self.now

    def effective(self, seq: int) -> str:
        byte = self.places[seq - 1].byte
        return "s" if byte == "w" and seq <= self.dead else byte

    def waiting(self) -> bool:
        return any(self.effective(seq) == "w" for seq in range(1, len(self.places) + 1))

    def can_pay(self) -> bool:
        return self.rate < 0 or self.tokens >= TOKEN

    def claim(self, seq: int) -> None:
        place = self.places[seq - 1]
        assert place.byte == "w"
        place.byte = "c"
        self.stock -= place.units
        if self.rate >= 0:
            self.tokens -= TOKEN
        self.claims.append(seq)

    def serve(self) -> int:
        count = 0
        while self.served < len(self.places) and self.stock > 0:
            seq = self.seq_at.get(self.served + 1, self.served + 1)
            place = self.places[seq - 1]
            if place.byte == "w":
                if place.units > self.stock:
                    place.byte = "s"
                elif not self.can_pay():
                    break
                else:
                    self.claim(seq)
                    count += 1
            self.served += 1
        if self.stock == 0 and not self.standby and self.served < len(self.places):
            self.dead = self.served = len(self.places)
        return count

    def expect_join(self, buyer: str, units: int, again: bool) -> Any:
        held = self.of_buyer.get(buyer)
        opened = self.now >= OPENS
        if held:
            byte = self.effective(held)
            live = byte in "wcrp"
            if live or not again:
                place = self.places[held - 1]
                same = not live or place.units == units
                return ("H" if same else "X", held, place.units, byte)
        alone = self.served == len(self.places)
        ready = opened and not self.paused and (self.drawn or self.early == 0)
        if opened and not self.standby and (self.stock == 0 or (units > self.stock and alone)):
            return ("S",)
        seq = len(self.places) + 1
        self.places.append(Place(buyer, units))
        self.of_buyer[buyer] = seq
        if ready and alone and units <= self.stock and self.can_pay():
            self.claim(seq)
            self.served = seq
            return ("C", seq)
        return ("W", seq)

    def take(self, rows: list[tuple[str, int, bool]]) -> None:
        before = (self.tokens, self.last, len(self.places))
        self.settle()
        expected = [self.expect_join(*row) for row in rows]
        if len(self.places) == before[2]:
            self.tokens, self.last = before[:2]  # nothing stored: nothing settled either
        if self.now < FREEZE:
            self.early = len(self.places)
        reply = self.do(self.stage.at(self.now).batch(*rows))
        assert isinstance(reply, Joined)
        assert [shape(answer) for answer in reply.answers] == expected
        assert (reply.served, reply.next_seq) == (self.served, len(self.places) + 1)

    # what happens
    @rule(
        rows=st.lists(
            st.tuples(st.integers(0, 15).map("b{}".format), st.integers(1, 2), st.booleans()),
            min_size=1,
            max_size=5,
        )
    )
    def join(self, rows: list[tuple[str, int, bool]]) -> None:
        self.take([(buyer, min(units, self.limit), again) for buyer, units, again in rows])

    @rule(ms=st.sampled_from([1, 40, 250, 1_000, 5_000]))
    def time_passes(self, ms: int) -> None:
        self.now += ms

    @rule()
    def the_minute_comes(self) -> None:
        self.now = max(self.now, OPENS)

    @rule()
    def tick(self) -> None:
        reply = self.do(self.stage.at(self.now).advance())
        if self.now < OPENS or self.paused:
            assert type(reply).__name__ == ("Early" if self.now < OPENS else "Paused")
            return
        before = (self.tokens, self.last, self.served, self.drawn)
        self.settle()
        if not self.drawn:
            self.drawn = True
            item = self.do(self.stage.item())
            assert item["drawn_n"] == str(self.early)
            keys = round_keys(item["drawn_key"], self.early)
            self.seq_at = {rank_of(seq, self.early, keys): seq for seq in range(1, self.early + 1)}
            assert sorted(self.seq_at) == list(range(1, self.early + 1))
        count = self.serve()
        if (self.served, self.drawn) == before[2:]:
            self.tokens, self.last = before[:2]
        assert reply == Served(self.served, count, self.stock, len(self.places) - self.served)

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        seq = data.draw(st.integers(1, len(self.places)))
        byte = self.effective(seq)
        reply = self.do(self.stage.at(self.now).leave(seq))
        assert (reply == Left()) == (byte == "w")
        if byte == "w":
            self.places[seq - 1].byte = "l"

    @precondition(lambda self: any(place.byte == "c" for place in self.places))
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        seq = data.draw(st.sampled_from([n for n, place in enumerate(self.places, 1) if place.byte == "c"]))
        place = self.places[seq - 1]
        place.version += 1
        place.byte = "e"
        self.stock += place.units
        count = self.given_back()
        reply = self.do(self.stage.at(self.now).release(seq, place.version, units=place.units))
        assert reply == Released(self.stock, count)

    @rule(units=st.integers(1, 3))
    def top_up(self, units: int) -> None:
        self.top_ups += 1
        self.stock += units
        self.total += units
        count = self.given_back()
        assert self.do(self.stage.at(self.now).add(units, f"t{self.top_ups}")) == Added(self.stock, count)

    def given_back(self) -> int:
        """Standby is served in the same call."""
        if not (self.standby and self.now >= OPENS and not self.paused and (self.drawn or self.early == 0)):
            return 0
        before = (self.tokens, self.last, self.served)
        self.settle()
        count = self.serve()
        if self.served == before[2]:
            self.tokens, self.last = before[:2]
        return count

    @rule()
    def pause_or_resume(self) -> None:
        self.settle()
        self.version += 1
        self.paused = not self.paused
        self.do(self.stage.at(self.now).switch(self.version, paused=int(self.paused)))
        if self.paused:
            self.tokens = 0

    # what holds
    @invariant()
    def redis_is_the_model(self) -> None:
        if not hasattr(self, "places"):
            return
        stage, keys = self.stage, self.stage.keys
        outcome, left, line, claims, item, counted = self.do(
            self.link.pipeline(
                [
                    ("GET", keys.outcome("A")),
                    ("HGET", keys.stock, "A"),
                    ("XRANGE", keys.line("A"), "-", "+"),
                    ("XRANGE", keys.orders, "-", "+"),
                    ("HMGET", keys.item("A"), "served", "dead_seq", "next_seq"),
                    ("HMGET", keys.sale, "claims_open", "claims_made"),
                ]
            )
        )
        assert stage
        assert (outcome or b"").decode() == "".join(place.byte for place in self.places)
        assert int(left) == self.stock >= 0
        held = sum(place.units for place in self.places if place.byte == "c")
        assert self.stock + held == self.total
        assert [int(claim.split("|")[3]) for entry in claims for claim in claims_of(entry)] == self.claims
        assert [int(value) for value in counted] == [len(self.claims)] * 2
        assert len(self.claims) == len(set(self.claims))
        waiting = {f"{seq}-0" for seq in range(1, len(self.places) + 1) if self.effective(seq) == "w"}
        assert {entry[0].decode() for entry in line} == waiting
        assert [int(value) for value in item] == [self.served, self.dead, len(self.places) + 1]
        rank_at = {seq: rank for rank, seq in self.seq_at.items()}
        if self.drawn or not self.early:
            for seq in range(1, len(self.places) + 1):
                if self.effective(seq) == "w":
                    assert rank_at.get(seq, seq) > self.served
            ranks = [rank_at.get(seq, seq) for seq in self.claims]
            assert ranks == sorted(ranks)


async def _await(work: Any) -> Any:
    return await work


def shape(answer: Any) -> tuple[Any, ...]:
    match answer:
        case Waits(seq):
            return ("W", seq)
        case Claimed(seq):
            return ("C", seq)
        case Has(_, seq, units, byte):
            return ("H", seq, units, byte.decode())
        case Turned(why):
            return ({"sold_out": "S"}[why],)
    return ("X", answer.seq, answer.units, answer.byte.decode())


@pytest.mark.slow
def test_any_interleaving_leaves_the_line_as_the_model_says(redis_url: str) -> None:
    machine = type("LineHere", (Line,), {"redis_url": redis_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=150,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )
