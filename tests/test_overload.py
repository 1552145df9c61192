"""The gate: up only in a crowd, first come first served, newcomers turned away by how long the first has waited."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.overload import CALM_S, LONG_TURNS, SLICE_S, Gate, retry_after_s

TURN_S, WAIT_S = 0.02, 0.1


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate[int]:
    return Gate(TURN_S, WAIT_S, clock, crowd_min=1)


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
def test_the_gate_goes_up_when_long_turns_follow_each_other(
    gate: Gate[int], turns: list[float], up: bool
) -> None:
    for took in turns:
        gate.turned(took)
    assert gate.up is up


def test_the_gate_comes_down_when_nobody_has_waited_for_a_while(gate: Gate[int], clock: Clock) -> None:
    for _ in range(LONG_TURNS):
        gate.turned(1.0)
    gate.put(1)
    clock.now += CALM_S * 2
    gate.turned(0.0)
    assert gate.up  # somebody is still there
    assert list(gate.take()) == [1]  # and has waited long
    clock.now += CALM_S * 0.9
    gate.turned(0.0)
    assert gate.up
    clock.now += CALM_S * 0.2
    gate.turned(0.0)
    assert not gate.up


def test_newcomers_are_turned_away_while_the_first_has_waited_too_long(gate: Gate[int], clock: Clock) -> None:
    assert not gate.full
    gate.put(1)
    clock.now += WAIT_S * 0.9
    assert not gate.full
    gate.put(2)
    clock.now += WAIT_S * 0.2
    assert gate.full
    assert next(iter(gate.take())) == 1
    assert not gate.full  # the second came later


def test_a_few_are_never_turned_away_however_slow_the_machine_is(clock: Clock) -> None:
    gate: Gate[int] = Gate(TURN_S, WAIT_S, clock, crowd_min=3)
    gate.put(1)
    gate.put(2)
    clock.now += 60
    assert not gate.full
    gate.put(3)
    assert gate.full


def test_newcomers_are_turned_away_from_a_queue_that_is_too_long_for_its_speed(
    gate: Gate[int], clock: Clock
) -> None:
    for number in range(300):
        gate.put(number)
    for _ in range(20):  # 5 in a slice, and as long again for everything else: 2 ms each
        for _ in gate.take():
            clock.now += SLICE_S / 5
        clock.now += SLICE_S
    while len(gate) < 300:
        gate.put(0)
    next(iter(gate.take()))
    assert gate.wait_s > 0.5
    assert gate.full


def test_a_slice_ends_when_its_time_is_up_and_serves_one_at_least(gate: Gate[int], clock: Clock) -> None:
    for number in range(10):
        gate.put(number)
    served = []
    for number in gate.take():
        served.append(number)
        clock.now += SLICE_S / 2.5
    assert served == [0, 1, 2]
    for number in gate.take():
        served.append(number)
        clock.now += SLICE_S * 9
    assert served == [0, 1, 2, 3]
    assert list(gate.take()) == [4, 5, 6, 7, 8, 9]


def test_those_turned_away_do_not_come_back_together() -> None:
    assert {retry_after_s(draw / 100) for draw in range(100)} == {1, 2, 3, 4}


@dataclass
class Process:
    """A server of one processor, turn by turn: newcomers are queued or told no, then a slice is served."""

    serve_s: float
    refuse_s: float
    clock: Clock = field(default_factory=Clock)

    def run(self, per_s: float, seconds: float, draw: random.Random) -> tuple[float, float, float]:
        """Requests at random moments. Returns served a second, and the longest waits of served and refused, in s."""
        gate: Gate[float] = Gate(TURN_S, WAIT_S, self.clock, crowd_min=1)
        gate.up = True
        end = self.clock.now + seconds
        coming = self.clock.now
        served, longest, told = 0, 0.0, 0.0
        while self.clock.now < end:
            turn_began = self.clock.now
            while coming <= turn_began:
                if gate.full:
                    self.clock.now += self.refuse_s
                    told = max(told, self.clock.now - coming)
                else:
                    gate.put(coming)
                coming += draw.expovariate(per_s)
            for came in gate.take():
                self.clock.now += self.serve_s
                longest = max(longest, self.clock.now - came)
                served += 1
            if not gate:
                self.clock.now = max(self.clock.now, coming)
        return served / seconds, longest, told


@pytest.mark.parametrize("load", [0.3, 0.6, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("serve_us", [50, 200])
@pytest.mark.parametrize("refuse_part", [0.05, 0.2])
def test_a_crowd_is_served_at_full_speed_and_the_rest_is_told_at_once(
    load: float, serve_us: int, refuse_part: float
) -> None:
    serve_s = serve_us / 1e6
    refuse_s = serve_s * refuse_part
    per_s, seconds = load / serve_s, 2.0
    served, longest, told = Process(serve_s, refuse_s).run(per_s, seconds, random.Random(7))
    possible = min(
        per_s, (1 - refuse_s * per_s) / (serve_s - refuse_s)
    )  # all time is spent on one or the other
    still_waiting = WAIT_S / seconds * possible
    assert served >= 0.95 * possible - still_waiting
    turn_s = SLICE_S / (1 - load * refuse_part)  # a slice, and telling those who came meanwhile
    assert longest <= (WAIT_S + 2 * turn_s) * 1.5  # the speed is learned while the crowd comes
    assert told <= 2 * turn_s
    if load <= 0.6:
        assert told == 0.0


@given(steps=st.lists(st.tuples(st.sampled_from(["put", "take", "turn"]), st.floats(0, 0.3)), max_size=60))
def test_nobody_is_lost_or_overtaken(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    gate: Gate[int] = Gate(TURN_S, WAIT_S, clock, crowd_min=1)
    put, taken = 0, []
    for step, passes in steps:
        clock.now += passes
        match step:
            case "put":
                gate.put(put)
                put += 1
            case "take":
                taken += list(gate.take())
            case _:
                gate.turned(passes)
        assert gate.full == (len(gate) > 0 and gate.wait_s > WAIT_S)
        assert len(gate) == put - len(taken)
    while gate:
        taken += list(gate.take())
    assert taken == list(range(put))
