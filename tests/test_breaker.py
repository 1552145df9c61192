"""The breaker: tables for every rule and boundary (±1 ms), and Hypothesis against a model too simple to be wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.breaker import Breaker, Counts, CountWindow, Event, Permit, Result, Rules, State, Stop, TimeWindow

S, F, I = Result.SUCCESS, Result.FAILURE, Result.IGNORED  # noqa: E741


class Clock:
    def __init__(self) -> None:
        self.ms = 1_000_000

    def __call__(self) -> int:
        return self.ms


def make(clock: Clock, *, rand: float = 0.5, **rules: Any) -> tuple[Breaker, list[Event]]:
    """A breaker without jitter (rand 0.5), and the list of its events."""
    events: list[Event] = []
    return Breaker("shop", Rules(**rules), clock_ms=clock, rand=lambda: rand, on_event=events.append), events


def one(breaker: Breaker, clock: Clock, result: Result, ms: int = 0) -> bool:
    """One call that takes `ms`; False: it was stopped."""
    permit = breaker.take()
    if isinstance(permit, Stop):
        return False
    clock.ms += ms
    breaker.settle(permit, result, "boom" if result is F else None)
    return True


def trip(breaker: Breaker, clock: Clock) -> None:
    while breaker.state is State.CLOSED:
        assert one(breaker, clock, F)
    assert breaker.state is State.OPEN


@pytest.mark.parametrize(
    ("results", "rules", "state"),
    [
        ("FFFF", {"calls_min": 5}, State.CLOSED),  # below the minimum a rate means nothing
        ("FFFFF", {"calls_min": 5}, State.OPEN),
        ("SSSFF", {"calls_min": 5, "failure_rate": 41}, State.CLOSED),
        ("SSSFF", {"calls_min": 5, "failure_rate": 40}, State.OPEN),  # reached is enough
        ("FFIII", {"calls_min": 3}, State.CLOSED),  # ignored results do not count
        ("FFIIIF", {"calls_min": 3}, State.OPEN),
        ("SSFF", {"window": "count", "window_calls": 2, "calls_min": 10, "failure_rate": 100}, State.OPEN),
        ("FSFS", {"window": "count", "window_calls": 2, "calls_min": 10, "failure_rate": 51}, State.CLOSED),
        ("FFSSSS", {"window": "count", "window_calls": 4, "calls_min": 6, "failure_rate": 34}, State.OPEN),
        ("SSSSSSSSSSF", {"window": "count", "window_calls": 1, "failure_rate": 100}, State.OPEN),
    ],
)
def test_failures_trip_at_the_rate_and_not_before(results: str, rules: dict[str, Any], state: State) -> None:
    clock = Clock()
    breaker, _ = make(clock, **rules)
    for letter in results:
        one(breaker, clock, {"S": S, "F": F, "I": I}[letter])
    assert breaker.state is state


@pytest.mark.parametrize(("ms", "slow"), [(99, 0), (100, 0), (101, 1)])
def test_a_call_is_slow_when_it_took_longer_than_slow_ms(ms: int, slow: int) -> None:
    clock = Clock()
    breaker, _ = make(clock, slow_ms=100)
    one(breaker, clock, S, ms)
    assert breaker.counts() == Counts(1, 0, slow)


@pytest.mark.parametrize(("rate", "state"), [(50, State.OPEN), (51, State.CLOSED)])
def test_slow_calls_trip_by_their_own_rate(rate: float, state: State) -> None:
    clock = Clock()
    breaker, events = make(clock, slow_ms=100, slow_rate=rate, calls_min=4)
    for ms in (0, 0, 101, 101):
        one(breaker, clock, S, ms)
    assert breaker.state is state
    assert [event.why for event in events] == (["slow_rate"] if state is State.OPEN else [])


@pytest.mark.parametrize(("ms", "left"), [(2_999, 1), (3_000, 0), (3_001, 0)])
def test_a_call_leaves_the_time_window_with_its_bucket(ms: int, left: int) -> None:
    clock = Clock()
    breaker, _ = make(clock, window_ms=3_000, bucket_ms=1_000)
    assert clock.ms % 1_000 == 0
    one(breaker, clock, F)
    clock.ms += ms
    assert breaker.counts().calls == left


@pytest.mark.parametrize(("ms", "passes"), [(999, False), (1_000, True), (1_001, True)])
def test_open_lets_nothing_through_until_its_interval_is_over(ms: int, passes: bool) -> None:
    clock = Clock()
    breaker, _ = make(clock, open_ms=1_000, calls_min=1)
    trip(breaker, clock)
    clock.ms += ms
    answer = breaker.take()
    assert isinstance(answer, Permit) is passes
    assert breaker.state is (State.HALF_OPEN if passes else State.OPEN)
    if isinstance(answer, Stop):
        assert answer == Stop(State.OPEN, 1_000 - ms)


@pytest.mark.parametrize(("rand", "open_for"), [(0.0, 800), (0.5, 1_000), (0.999999, 1_200)])
def test_jitter_spreads_the_interval(rand: float, open_for: int) -> None:
    clock = Clock()
    breaker, events = make(clock, rand=rand, open_ms=1_000, jitter=0.2, calls_min=1)
    trip(breaker, clock)
    assert events[-1].open_for_ms == open_for


def test_the_interval_grows_with_each_failed_recovery_up_to_its_maximum_and_starts_anew_after_a_good_one() -> (
    None
):
    clock = Clock()
    breaker, events = make(clock, open_ms=100, open_growth=3, open_max_ms=1_000, probes_max=1, calls_min=1)
    trip(breaker, clock)
    for _ in range(4):
        clock.ms += 1_000
        one(breaker, clock, F)
    assert [event.open_for_ms for event in events if event.after is State.OPEN] == [
        100,
        300,
        900,
        1_000,
        1_000,
    ]
    clock.ms += 1_000
    one(breaker, clock, S)
    assert breaker.state is State.CLOSED
    trip(breaker, clock)
    assert events[-1].open_for_ms == 100


def test_half_open_decides_by_its_own_window() -> None:
    clock = Clock()
    breaker, events = make(clock, calls_min=1, probes_max=4, open_ms=10, failure_rate=50)
    for results, after in (("SSSF", State.CLOSED), ("SFSF", State.OPEN)):
        trip(breaker, clock)
        clock.ms += 10
        for letter in results:
            assert breaker.state in (State.OPEN, State.HALF_OPEN)
            one(breaker, clock, {"S": S, "F": F}[letter])
        assert breaker.state is after
    assert events[-1].why == "failure_rate"
    assert events[-1].counts == Counts(4, 2, 0)


def test_slow_probes_open_again() -> None:
    clock = Clock()
    breaker, events = make(clock, calls_min=1, probes_max=2, open_ms=10, slow_ms=100, slow_rate=100)
    trip(breaker, clock)
    clock.ms += 10
    one(breaker, clock, S, 101)
    one(breaker, clock, S, 101)
    assert events[-1].why == "slow_rate"
    assert breaker.state is State.OPEN


def test_half_open_never_has_more_than_the_permitted_probes_out_or_decided() -> None:
    clock = Clock()
    breaker, _ = make(clock, calls_min=1, probes_max=3, open_ms=10)
    trip(breaker, clock)
    clock.ms += 10
    permits = [breaker.take() for _ in range(10)]
    assert [type(permit) for permit in permits] == [Permit] * 3 + [Stop] * 7
    assert isinstance(permits[0], Permit)
    assert isinstance(permits[1], Permit)
    breaker.settle(permits[0], S)
    assert isinstance(breaker.take(), Stop)  # decided probes keep their place
    breaker.settle(permits[1], I)
    assert isinstance(breaker.take(), Permit)  # an ignored result gives it back


def test_a_result_counts_once() -> None:
    clock = Clock()
    breaker, _ = make(clock, calls_min=1, probes_max=2, open_ms=10)
    trip(breaker, clock)
    clock.ms += 10
    permit = breaker.take()
    assert isinstance(permit, Permit)
    breaker.settle(permit, S)
    breaker.settle(permit, S)
    assert breaker.state is State.HALF_OPEN
    assert breaker.late_count == 1


def test_a_result_of_an_older_generation_changes_nothing() -> None:
    clock = Clock()
    breaker, _ = make(clock, calls_min=1, probes_max=1, open_ms=10)
    old = breaker.take()
    assert isinstance(old, Permit)
    trip(breaker, clock)
    clock.ms += 10
    probe = breaker.take()
    assert isinstance(probe, Permit)
    breaker.settle(old, F)
    assert breaker.state is State.HALF_OPEN
    assert breaker.counts() == Counts()
    breaker.settle(probe, S)
    assert breaker.state is State.CLOSED
    breaker.settle(old, F)
    breaker.settle(probe, F)
    assert breaker.state is State.CLOSED
    assert breaker.counts() == Counts()
    assert breaker.late_count == 3


@pytest.mark.parametrize(
    ("ms", "free", "counted"), [(499, False, True), (500, True, False), (501, True, False)]
)
def test_a_probe_that_never_comes_back_is_forgotten_after_its_lease(
    ms: int, free: bool, counted: bool
) -> None:
    clock = Clock()
    breaker, _ = make(clock, calls_min=1, probes_max=1, open_ms=10, lease_ms=500)
    trip(breaker, clock)
    clock.ms += 10
    dead = breaker.take()
    assert isinstance(dead, Permit)
    clock.ms += ms
    if free:
        assert isinstance(breaker.take(), Permit)
    else:
        assert isinstance(breaker.take(), Stop)
    breaker.settle(dead, S)  # too late after its lease
    assert (breaker.state is State.CLOSED) is counted


@pytest.mark.parametrize(("ms", "state"), [(699, State.HALF_OPEN), (700, State.OPEN), (701, State.OPEN)])
def test_half_open_that_waits_too_long_opens_again_for_longer(ms: int, state: State) -> None:
    clock = Clock()
    breaker, events = make(clock, calls_min=1, probes_max=2, open_ms=100, half_open_max_ms=700)
    trip(breaker, clock)
    clock.ms += 100
    probe = breaker.take()
    assert isinstance(probe, Permit)
    clock.ms += ms
    assert breaker.state is state
    if state is State.OPEN:
        assert events[-1].why == "half_open_too_long"
        assert events[-1].open_for_ms == 200
        assert breaker.retry_in_ms() == 200 - (ms - 700)  # counted from when the wait was over
        breaker.settle(probe, S)
        assert breaker.state is State.OPEN


def test_half_open_waits_for_ever_when_told_so() -> None:
    clock = Clock()
    breaker, _ = make(clock, calls_min=1, open_ms=100, half_open_max_ms=0)
    trip(breaker, clock)
    clock.ms += 100
    breaker.take()
    clock.ms += 10**9
    assert breaker.state is State.HALF_OPEN
    assert isinstance(breaker.take(), Permit)


def test_forced_open_stops_all_and_auto_starts_afresh() -> None:
    clock = Clock()
    breaker, events = make(clock, calls_min=2)
    permit = breaker.take()
    assert isinstance(permit, Permit)
    one(breaker, clock, F)
    breaker.set_mode("forced_open")
    breaker.set_mode("forced_open")
    assert isinstance(breaker.take(), Stop)
    assert breaker.retry_in_ms() > 0
    breaker.settle(permit, F)
    breaker.set_mode("auto")
    assert breaker.state is State.CLOSED
    assert breaker.counts() == Counts()
    assert [(event.before, event.after, event.why) for event in events] == [
        (State.CLOSED, State.FORCED_OPEN, "operator"),
        (State.FORCED_OPEN, State.CLOSED, "operator"),
    ]


def test_disabled_passes_all_and_counts_nothing_metrics_only_counts_but_never_trips() -> None:
    clock = Clock()
    breaker, _ = make(clock, calls_min=1)
    breaker.set_mode("disabled")
    assert all(one(breaker, clock, F) for _ in range(50))
    assert breaker.counts() == Counts()
    assert breaker.state is State.DISABLED
    breaker.set_mode("metrics_only")
    assert all(one(breaker, clock, F) for _ in range(50))
    assert breaker.counts() == Counts(50, 50, 0)
    assert breaker.state is State.METRICS_ONLY


def test_events_carry_counts_and_the_last_error_and_history_is_bounded() -> None:
    clock = Clock()
    breaker, events = make(clock, calls_min=2, open_ms=10, probes_max=1, history_max=3)
    one(breaker, clock, S)
    trip(breaker, clock)
    assert events == [Event(clock.ms, State.CLOSED, State.OPEN, "failure_rate", Counts(2, 1, 0), "boom", 10)]
    for _ in range(5):
        clock.ms += 1_000
        one(breaker, clock, S)
        trip(breaker, clock)
    assert len(breaker.history) == 3
    assert len(events) == 16


@pytest.mark.parametrize(
    "wrong",
    [{"failure_rate": 0}, {"failure_rate": 101}, {"slow_rate": 0}, {"calls_min": 0}, {"probes_max": 0}, {"lease_ms": 0},
     {"open_growth": 0.5}, {"jitter": 1}, {"window_ms": 1_500}, {"slow_ms": -1}],
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Rules(**wrong)


async def test_ten_thousand_callers_at_once_never_exceed_the_probes() -> None:
    clock = Clock()
    breaker, _ = make(clock, calls_min=1, probes_max=7, open_ms=10, half_open_max_ms=0)
    trip(breaker, clock)
    clock.ms += 10
    out = peak = passed = 0
    gate = asyncio.Event()

    async def caller(number: int) -> None:
        nonlocal out, peak, passed
        await asyncio.sleep(0)
        permit = breaker.take()
        if isinstance(permit, Stop):
            return
        passed += 1
        out += 1
        peak = max(peak, out)
        try:
            await gate.wait()
        finally:
            out -= 1
            breaker.settle(permit, I if number % 2 else S)

    tasks = [asyncio.create_task(caller(number)) for number in range(10_000)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert passed == 7
    assert breaker.state is State.HALF_OPEN
    for task in tasks[:3]:
        task.cancel()
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert peak == 7


# -- against a model


@given(st.lists(st.tuples(st.integers(0, 700), st.booleans(), st.booleans()), max_size=60), st.integers(1, 6))
def test_windows_equal_a_plain_count(calls: list[tuple[int, bool, bool]], size: int) -> None:
    counted, timed, now, seen = CountWindow(size), TimeWindow(size * 250, 250), 0, []
    for step, failed, slow in calls:
        now += step
        counted.add(now, failed, slow)
        timed.add(now, failed, slow)
        seen.append((now, failed, slow))
        last = seen[-size:]
        assert counted.counts(now) == (len(last), sum(f for _, f, _ in last), sum(s for *_, s in last))
        recent = [call for call in seen if now // 250 - call[0] // 250 < size]
        assert timed.counts(now) == (len(recent), sum(f for _, f, _ in recent), sum(s for *_, s in recent))


class Model:
    """The breaker as a list of facts, recomputed from scratch each time. Slow, obvious, no buckets, no counters."""

    def __init__(self, rules: Rules) -> None:
        self.rules, self.state, self.now = rules, "closed", 0
        self.era = self.openings = self.until = 0
        self.facts: list[tuple[int, bool, bool]] = []  # of this era
        self.out: dict[int, int] = {}  # probe -> lease end

    def open(self, at: int) -> None:
        self.openings += 1
        wait = min(self.rules.open_max_ms, self.rules.open_ms * self.rules.open_growth ** (self.openings - 1))
        self.enter("open", at + round(wait))

    def enter(self, state: str, until: int = 0) -> None:
        self.state, self.until, self.era, self.facts, self.out = state, until, self.era + 1, [], {}

    def look(self) -> None:
        if self.state == "half_open" and self.rules.half_open_max_ms and self.now >= self.until:
            self.open(self.until)

    def take(self, number: int) -> bool:
        self.look()
        if self.state == "open" and self.now >= self.until:
            self.enter("half_open", self.now + self.rules.half_open_max_ms)
        if self.state in ("open", "forced_open"):
            return False
        if self.state == "half_open":
            self.out = {probe: end for probe, end in self.out.items() if end > self.now}
            if len(self.out) + len(self.facts) >= self.rules.probes_max:
                return False
            self.out[number] = self.now + self.rules.lease_ms
        return True

    def settle(self, number: int, era: int, taken: int, result: Result) -> None:
        self.look()
        if era != self.era or self.now >= taken + self.rules.lease_ms:
            return
        if self.state == "half_open" and self.out.pop(number, None) is None:
            return
        if result is I or self.state == "disabled":
            return
        self.facts.append((self.now, result is F, self.now - taken > self.rules.slow_ms))
        size, facts = self.rules.probes_max, self.facts
        if self.state != "half_open":
            if self.rules.window == "count":
                facts = facts[-self.rules.window_calls :]
                size = min(self.rules.calls_min, self.rules.window_calls)
            else:
                bucket = self.rules.bucket_ms
                facts = [
                    f for f in facts if self.now // bucket - f[0] // bucket < self.rules.window_ms // bucket
                ]
                size = self.rules.calls_min
        if len(facts) < size or self.state not in ("closed", "half_open"):
            return
        bad = 100 * sum(f for _, f, _ in facts) >= self.rules.failure_rate * len(facts)
        slow = 100 * sum(s for *_, s in facts) >= self.rules.slow_rate * len(facts)
        if bad or slow:
            self.open(self.now)
        elif self.state == "half_open":
            self.openings = 0
            self.enter("closed")


RULES = st.builds(
    Rules,
    failure_rate=st.sampled_from([1, 34, 50, 100]),
    slow_rate=st.sampled_from([50, 100]),
    slow_ms=st.sampled_from([0, 50, 1_000]),
    window=st.sampled_from(["count", "time"]),
    window_calls=st.integers(1, 5),
    window_ms=st.sampled_from([100, 300]),
    bucket_ms=st.just(100),
    calls_min=st.integers(1, 6),
    open_ms=st.sampled_from([50, 100]),
    open_growth=st.sampled_from([1, 2, 3.5]),
    open_max_ms=st.just(400),
    probes_max=st.integers(1, 4),
    half_open_max_ms=st.sampled_from([0, 150, 1_000]),
    lease_ms=st.sampled_from([60, 250, 10_000]),
)
STEP = st.one_of(
    st.tuples(
        st.just("wait"), st.sampled_from([1, 49, 50, 51, 99, 100, 101, 149, 150, 151, 249, 250, 251, 1_000])
    ),
    st.tuples(st.just("take"), st.just(0)),
    st.tuples(st.sampled_from(["success", "failure", "ignored"]), st.integers(0, 7)),
    st.tuples(st.just("mode"), st.sampled_from(["auto", "auto", "forced_open", "disabled", "metrics_only"])),
)


@settings(max_examples=400, deadline=None)
@given(RULES, st.lists(STEP, max_size=80))
def test_the_breaker_equals_its_model(rules: Rules, steps: list[tuple[str, Any]]) -> None:
    clock = Clock()
    clock.ms = 0
    breaker, _ = make(clock, **{name: getattr(rules, name) for name in rules.__struct_fields__})
    model, mode = Model(rules), "auto"
    permits: list[tuple[Permit, int]] = []
    for what, arg in steps:
        if what == "wait":
            clock.ms += arg
            model.now = clock.ms
        elif what == "take":
            permit = breaker.take()
            passes = model.take(permit.serial if isinstance(permit, Permit) else -1)
            assert isinstance(permit, Permit) is passes
            if isinstance(permit, Permit):
                permits.append((permit, model.era))
        elif what == "mode":
            breaker.set_mode(arg)
            if arg != mode:
                mode = arg
                model.openings = 0
                model.enter("closed" if arg == "auto" else arg)
        elif permits:
            permit, era = permits[arg % len(permits)]  # often settled twice, or late
            breaker.settle(permit, Result(what))
            model.settle(permit.serial, era, permit.taken_ms, Result(what))
        model.look()
        assert breaker.state.value == model.state
        if model.state == "open":
            assert breaker.retry_in_ms() == max(0, model.until - clock.ms)
        if model.state == "half_open":
            assert len(breaker._probes) + breaker.counts().calls <= rules.probes_max
