"""The gate: how many may be under way, how long one turn may read, and when nobody is turned away at all."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.serving.overload import CALM_S, CROWD_MIN, LONG_TURNS, SLICE_S, Gate, retry_after_s

TURN_S, WAIT_S, LOOK_S = 0.02, 0.025, 0.01


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(TURN_S, WAIT_S, clock, crowd_min=3)


def put_up(gate: Gate) -> None:
    for _ in range(LONG_TURNS):
        gate.looked(1.0)
    assert gate.up


@pytest.mark.parametrize(
    ("turns", "up"),
    [
        ([0.0] * 50, False),
        ([0.5], False),
        ([0.5, 0.5, 0.001, 0.5, 0.5], False),
        ([0.021] * LONG_TURNS, True),
        ([0.001, *[0.5] * LONG_TURNS, 0.0], True),
    ],
)
def test_the_gate_goes_up_when_long_turns_follow_each_other(gate: Gate, turns: list[float], up: bool) -> None:
    for took in turns:
        gate.looked(took)
    assert gate.up is up


def test_the_gate_comes_down_when_nobody_has_been_turned_away_for_a_while(gate: Gate, clock: Clock) -> None:
    put_up(gate)
    clock.now += CALM_S * 0.9
    gate.turn_away()
    gate.looked(0.0)
    clock.now += CALM_S * 0.9
    gate.looked(0.0)
    assert gate.up
    gate.looked(1.0)  # nor after a long turn
    clock.now += CALM_S * 0.9
    gate.looked(0.0)
    assert gate.up
    clock.now += CALM_S * 0.2
    gate.looked(0.0)
    assert not gate.up
    gate.looked(1.0)
    assert not gate.up  # it takes as many long turns as before


def test_a_turn_reads_for_a_slice_of_time_only_while_the_gate_is_up(gate: Gate, clock: Clock) -> None:
    assert not any(gate.late() for _ in range(1_000))
    put_up(gate)
    assert not gate.reading
    for _ in range(gate.crowd_min):
        assert not gate.late()  # a few are no crowd, however slow the machine is
        clock.now += SLICE_S
    assert gate.reading
    assert gate.late()
    gate.turn_ended()
    assert not gate.reading
    for _ in range(gate.crowd_min + 5):
        assert not gate.late()  # nor are many who take no time
    clock.now += SLICE_S * 1.1
    assert gate.late()


def looks(gate: Gate, clock: Clock, per_s: float, seconds: float) -> None:
    """So many answers a second, with as many under way as may be."""
    owed = 0.0
    for _ in range(int(seconds / LOOK_S)):
        owed += per_s * LOOK_S
        while owed >= 1:
            gate.begin()
            gate.end()
            owed -= 1
        while not gate.full:
            gate.begin()
        clock.now += LOOK_S
        gate.looked(0.0)
        while gate.under_way > gate.limit:
            gate.under_way -= 1


@pytest.mark.parametrize("per_s", [100.0, 2_000.0, 16_000.0, 80_000.0])
def test_as_many_may_be_under_way_as_are_answered_in_time(gate: Gate, clock: Clock, per_s: float) -> None:
    looks(gate, clock, per_s, 2.0)
    assert gate.limit == pytest.approx(max(gate.crowd_min, per_s * WAIT_S), rel=0.1, abs=1)


def test_few_requests_say_nothing_of_the_speed(gate: Gate, clock: Clock) -> None:
    before = gate.limit
    for _ in range(100):
        gate.begin()
        gate.end()
        clock.now += LOOK_S
        gate.looked(0.0)
    assert gate.limit == before


def test_whoever_is_turned_away_puts_the_gate_up(gate: Gate) -> None:
    gate.turn_away()
    assert gate.up


def test_when_redis_stops_answering_no_more_than_a_crowd_waits_for_it(clock: Clock) -> None:
    gate = Gate(TURN_S, WAIT_S, clock)
    looks(gate, clock, 20_000.0, 1.0)
    assert gate.limit == pytest.approx(500, rel=0.1)
    for _ in range(100):
        clock.now += LOOK_S
        gate.looked(0.0)
    assert gate.limit == CROWD_MIN
    assert gate.full


def test_those_turned_away_do_not_come_back_together() -> None:
    assert {retry_after_s(draw / 100) for draw in range(100)} == {1, 2, 3, 4}


@dataclass
class Process:
    """A server of one processor, turn by turn: it reads what has come, then answers what its store has done."""

    read_s: float
    answer_s: float
    refuse_s: float
    store_s: float  # of each request, in a store that serves one after the other
    clock: Clock = field(default_factory=Clock)

    def run(self, per_s: float, seconds: float, draw: random.Random) -> tuple[float, float, float]:
        """Answers a second, the longest wait of the answered, p99 of the refused; requests come at random moments."""
        gate = Gate(TURN_S, WAIT_S, self.clock)
        clock = self.clock
        end, looked_at, coming = clock.now + seconds, clock.now, clock.now
        stored: deque[tuple[float, float]] = deque()  # (came, done in the store)
        free_at = clock.now
        answered, longest = 0, 0.0
        told: list[float] = []
        while clock.now < end:
            turn_began = clock.now
            while coming <= turn_began:
                if gate.late() or gate.full:
                    gate.turn_away()
                    clock.now += self.refuse_s
                    told.append(clock.now - coming)
                else:
                    clock.now += self.read_s
                    gate.begin()
                    free_at = max(free_at, clock.now) + self.store_s
                    stored.append((coming, free_at))
                coming += draw.expovariate(per_s)
            gate.turn_ended()
            done_by = clock.now
            while stored and stored[0][1] <= done_by:
                came, _ = stored.popleft()
                clock.now += self.answer_s
                gate.end()
                answered += 1
                longest = max(longest, clock.now - came)
            if clock.now - looked_at >= LOOK_S:
                gate.looked(clock.now - looked_at - LOOK_S)
                looked_at = clock.now
            clock.now = max(clock.now, min(coming, stored[0][1] if stored else coming)) + 1e-6
        return answered / seconds, longest, sorted(told)[len(told) * 99 // 100] if told else 0.0


@pytest.mark.parametrize("load", [0.3, 0.6, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("store", [0.2, 0.9, 2.0], ids=["fast store", "even", "slow store"])
@pytest.mark.parametrize("refuse_part", [0.05, 0.2])
def test_a_crowd_is_served_at_full_speed_and_the_rest_is_told_at_once(
    load: float, store: float, refuse_part: float
) -> None:
    serve_s = 50e-6
    store_s, refuse_s = serve_s * store, serve_s * refuse_part
    capacity = 1 / max(serve_s, store_s)
    per_s, seconds = load * capacity, 1.0
    process = Process(serve_s / 2, serve_s / 2, refuse_s, store_s)
    answered, longest, told = process.run(per_s, seconds, random.Random(7))
    possible = min(per_s, capacity, (1 - refuse_s * per_s) / (serve_s - refuse_s))
    assert answered >= 0.9 * possible - CROWD_MIN / seconds
    assert longest <= max(WAIT_S, CROWD_MIN / possible) * 2 + 2 * TURN_S
    assert told <= (0.025 if load <= 1.5 else 0.04)
    if load <= 0.6:
        assert told == 0.0


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["begin", "end", "look", "ask", "turn"]), st.floats(0, 0.3)), max_size=60
    )
)
def test_the_gate_never_lets_fewer_in_than_are_no_crowd(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    gate = Gate(TURN_S, WAIT_S, clock, crowd_min=5)
    for step, passes in steps:
        clock.now += passes
        match step:
            case "begin":
                gate.begin()
            case "end" if gate.under_way:
                gate.end()
            case "look":
                gate.looked(passes)
            case "ask":
                gate.late()
            case "turn":
                gate.turn_ended()
        assert gate.limit >= gate.crowd_min
        assert gate.full == (gate.under_way >= gate.limit)
