"""The breaker: tables for every rule and boundary (±1 ms), and Hypothesis against a model too simple to be wrong.

Everything here runs on the breaker of one process (app/breaker.py) and on the one shared over Redis: seen by one
process that believes what it knows, and by two that take turns and ask each time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.breaker import (
    Breaker,
    Counts,
    CountWindow,
    Event,
    Mode,
    Permit,
    Result,
    Rules,
    State,
    Stop,
    TimeWindow,
)
from app.providers import shared_breaker
from app.providers.shared_breaker import SharedBreaker
from app.redis.link import Link
from app.scripts import Scripts

S, F, I = Result.SUCCESS, Result.FAILURE, Result.IGNORED  # noqa: E741


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis whose disk is busy for a moment is waited for here; without it a breaker goes on alone."""
    monkeypatch.setattr(shared_breaker, "DEADLINE_S", 30.0)


class Clock:
    def __init__(self) -> None:
        self.ms = 1_000_000

    def __call__(self) -> int:
        return self.ms


class Stage:
    """One breaker under test, whatever it is made of. Every step is over when its call returns."""

    def __init__(self, clock: Clock, faces: list[Breaker | SharedBreaker], events: list[Event]) -> None:
        self.clock = clock
        self.faces = faces  # of the same breaker
        self.events = events
        self.rules = faces[0].rules
        self._turn = 0

    def _face(self) -> Breaker | SharedBreaker:
        self._turn += 1
        return self.faces[self._turn % len(self.faces)]

    async def take(self) -> Permit | Stop:
        face = self._face()
        return face.take() if isinstance(face, Breaker) else await face.take()

    async def settle(self, permit: Permit, result: Result, error: str | None = None) -> None:
        face = self._face()
        face.settle(permit, result, error)
        if isinstance(face, SharedBreaker):
            await face.idle()

    async def set_mode(self, mode: Mode) -> None:
        face = self._face()
        face.set_mode(mode)
        if isinstance(face, SharedBreaker):
            await face.idle()

    async def seen(self) -> Breaker | SharedBreaker:
        """To be looked at: its properties are as of now."""
        face = self._face()
        if isinstance(face, SharedBreaker):
            await face.look()
            assert not face.alone
        return face

    async def state(self) -> State:
        return (await self.seen()).state

    async def counts(self) -> Counts:
        return (await self.seen()).counts()

    @property
    def late(self) -> int:
        return sum(face.late_count for face in self.faces)

    async def one(self, result: Result, ms: int = 0) -> bool:
        """One call that takes `ms`; False: it was stopped."""
        permit = await self.take()
        if isinstance(permit, Stop):
            return False
        self.clock.ms += ms
        await self.settle(permit, result, "boom" if result is F else None)
        return True

    async def trip(self) -> None:
        while await self.state() is State.CLOSED:
            assert await self.one(F)
        assert await self.state() is State.OPEN


Make = Callable[..., Awaitable[Stage]]


@pytest.fixture(params=["local", "shared", "shared by two"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """make(clock, rand=0.5, **rules) -> a breaker without jitter (rand 0.5)."""
    kind: str = request.param
    link: Link | None = None
    if kind != "local":
        link = Link(request.getfixturevalue("redis_url"), deadline_s=30, name="test")
        await link.start()
    made = 0

    async def maker(clock: Clock, *, rand: float = 0.5, **rules: Any) -> Stage:
        nonlocal made
        made += 1
        events: list[Event] = []
        if link is None:
            breaker = Breaker(
                "shop", Rules(**rules), clock_ms=clock, rand=lambda: rand, on_event=events.append
            )
            return Stage(clock, [breaker], events)
        faces: list[Breaker | SharedBreaker] = [
            SharedBreaker(
                f"shop-{made}", Rules(**rules), Scripts(link), who=f"w{number}", clock_ms=clock, now_ms=clock,
                rand=lambda: rand, on_event=events.append, fresh_max_ms=None if kind == "shared" else 0,
            )
            for number in range(1 if kind == "shared" else 2)
        ]  # fmt: skip
        return Stage(clock, faces, events)

    yield maker
    if link is not None:
        await link.close()


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
async def test_failures_trip_at_the_rate_and_not_before(
    make: Make, results: str, rules: dict[str, Any], state: State
) -> None:
    clock = Clock()
    breaker = await make(clock, **rules)
    for letter in results:
        await breaker.one({"S": S, "F": F, "I": I}[letter])
    assert await breaker.state() is state


@pytest.mark.parametrize(("ms", "slow"), [(99, 0), (100, 0), (101, 1)])
async def test_a_call_is_slow_when_it_took_longer_than_slow_ms(make: Make, ms: int, slow: int) -> None:
    clock = Clock()
    breaker = await make(clock, slow_ms=100)
    await breaker.one(S, ms)
    assert await breaker.counts() == Counts(1, 0, slow)


@pytest.mark.parametrize(("rate", "state"), [(50, State.OPEN), (51, State.CLOSED)])
async def test_slow_calls_trip_by_their_own_rate(make: Make, rate: float, state: State) -> None:
    clock = Clock()
    breaker = await make(clock, slow_ms=100, slow_rate=rate, calls_min=4)
    for ms in (0, 0, 101, 101):
        await breaker.one(S, ms)
    assert await breaker.state() is state
    assert [event.why for event in breaker.events] == (["slow_rate"] if state is State.OPEN else [])


@pytest.mark.parametrize(("ms", "left"), [(2_999, 1), (3_000, 0), (3_001, 0)])
async def test_a_call_leaves_the_time_window_with_its_bucket(make: Make, ms: int, left: int) -> None:
    clock = Clock()
    breaker = await make(clock, window_ms=3_000, bucket_ms=1_000)
    assert clock.ms % 1_000 == 0
    await breaker.one(F)
    clock.ms += ms
    assert (await breaker.counts()).calls == left


@pytest.mark.parametrize(("ms", "passes"), [(999, False), (1_000, True), (1_001, True)])
async def test_open_lets_nothing_through_until_its_interval_is_over(
    make: Make, ms: int, passes: bool
) -> None:
    clock = Clock()
    breaker = await make(clock, open_ms=1_000, calls_min=1)
    await breaker.trip()
    clock.ms += ms
    answer = await breaker.take()
    assert isinstance(answer, Permit) is passes
    assert await breaker.state() is (State.HALF_OPEN if passes else State.OPEN)
    if isinstance(answer, Stop):
        assert answer == Stop(State.OPEN, 1_000 - ms)


@pytest.mark.parametrize(("rand", "open_for"), [(0.0, 800), (0.5, 1_000), (0.999999, 1_200)])
async def test_jitter_spreads_the_interval(make: Make, rand: float, open_for: int) -> None:
    clock = Clock()
    breaker = await make(clock, rand=rand, open_ms=1_000, jitter=0.2, calls_min=1)
    await breaker.trip()
    assert breaker.events[-1].open_for_ms == open_for


async def test_the_interval_grows_with_each_failed_recovery_up_to_its_maximum_and_starts_anew_after_a_good_one(
    make: Make,
) -> None:
    clock = Clock()
    breaker = await make(clock, open_ms=100, open_growth=3, open_max_ms=1_000, probes_max=1, calls_min=1)
    await breaker.trip()
    for _ in range(4):
        clock.ms += 1_000
        await breaker.one(F)
    assert [event.open_for_ms for event in breaker.events if event.after is State.OPEN] == [
        100,
        300,
        900,
        1_000,
        1_000,
    ]
    clock.ms += 1_000
    await breaker.one(S)
    assert await breaker.state() is State.CLOSED
    await breaker.trip()
    assert breaker.events[-1].open_for_ms == 100


async def test_half_open_decides_by_its_own_window(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=1, probes_max=4, open_ms=10, failure_rate=50)
    for results, after in (("SSSF", State.CLOSED), ("SFSF", State.OPEN)):
        await breaker.trip()
        clock.ms += 10
        for letter in results:
            assert await breaker.state() in (State.OPEN, State.HALF_OPEN)
            await breaker.one({"S": S, "F": F}[letter])
        assert await breaker.state() is after
    assert breaker.events[-1].why == "failure_rate"
    assert breaker.events[-1].counts == Counts(4, 2, 0)


async def test_slow_probes_open_again(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=1, probes_max=2, open_ms=10, slow_ms=100, slow_rate=100)
    await breaker.trip()
    clock.ms += 10
    await breaker.one(S, 101)
    await breaker.one(S, 101)
    assert breaker.events[-1].why == "slow_rate"
    assert await breaker.state() is State.OPEN


async def test_half_open_never_has_more_than_the_permitted_probes_out_or_decided(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=1, probes_max=3, open_ms=10)
    await breaker.trip()
    clock.ms += 10
    permits = [await breaker.take() for _ in range(10)]
    assert [isinstance(permit, Permit) for permit in permits] == [True] * 3 + [False] * 7
    assert isinstance(permits[0], Permit)
    assert isinstance(permits[1], Permit)
    await breaker.settle(permits[0], S)
    assert isinstance(await breaker.take(), Stop)  # decided probes keep their place
    await breaker.settle(permits[1], I)
    assert isinstance(await breaker.take(), Permit)  # an ignored result gives it back


async def test_a_result_counts_once(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=1, probes_max=2, open_ms=10)
    await breaker.trip()
    clock.ms += 10
    permit = await breaker.take()
    assert isinstance(permit, Permit)
    await breaker.settle(permit, S)
    await breaker.settle(permit, S)
    assert await breaker.state() is State.HALF_OPEN
    assert breaker.late == 1


async def test_a_result_of_an_older_generation_changes_nothing(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=1, probes_max=1, open_ms=10)
    old = await breaker.take()
    assert isinstance(old, Permit)
    await breaker.trip()
    clock.ms += 10
    probe = await breaker.take()
    assert isinstance(probe, Permit)
    await breaker.settle(old, F)
    assert await breaker.state() is State.HALF_OPEN
    assert await breaker.counts() == Counts()
    await breaker.settle(probe, S)
    assert await breaker.state() is State.CLOSED
    await breaker.settle(old, F)
    await breaker.settle(probe, F)
    assert await breaker.state() is State.CLOSED
    assert await breaker.counts() == Counts()
    assert breaker.late == 3


@pytest.mark.parametrize(
    ("ms", "free", "counted"), [(499, False, True), (500, True, False), (501, True, False)]
)
async def test_a_probe_that_never_comes_back_is_forgotten_after_its_lease(
    make: Make, ms: int, free: bool, counted: bool
) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=1, probes_max=1, open_ms=10, lease_ms=500)
    await breaker.trip()
    clock.ms += 10
    dead = await breaker.take()
    assert isinstance(dead, Permit)
    clock.ms += ms
    if free:
        assert isinstance(await breaker.take(), Permit)
    else:
        assert isinstance(await breaker.take(), Stop)
    await breaker.settle(dead, S)  # too late after its lease
    assert (await breaker.state() is State.CLOSED) is counted


@pytest.mark.parametrize(("ms", "state"), [(699, State.HALF_OPEN), (700, State.OPEN), (701, State.OPEN)])
async def test_half_open_that_waits_too_long_opens_again_for_longer(
    make: Make, ms: int, state: State
) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=1, probes_max=2, open_ms=100, half_open_max_ms=700)
    await breaker.trip()
    clock.ms += 100
    probe = await breaker.take()
    assert isinstance(probe, Permit)
    clock.ms += ms
    assert await breaker.state() is state
    if state is State.OPEN:
        assert breaker.events[-1].why == "half_open_too_long"
        assert breaker.events[-1].open_for_ms == 200
        assert (await breaker.seen()).retry_in_ms() == 200 - (ms - 700)  # counted from when the wait was over
        await breaker.settle(probe, S)
        assert await breaker.state() is State.OPEN


async def test_half_open_waits_for_ever_when_told_so(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=1, open_ms=100, half_open_max_ms=0)
    await breaker.trip()
    clock.ms += 100
    await breaker.take()
    clock.ms += 10**9
    assert await breaker.state() is State.HALF_OPEN
    assert isinstance(await breaker.take(), Permit)


async def test_forced_open_stops_all_and_auto_starts_afresh(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=2)
    permit = await breaker.take()
    assert isinstance(permit, Permit)
    await breaker.one(F)
    await breaker.set_mode("forced_open")
    await breaker.set_mode("forced_open")
    assert isinstance(await breaker.take(), Stop)
    assert (await breaker.seen()).retry_in_ms() > 0
    await breaker.settle(permit, F)
    await breaker.set_mode("auto")
    assert await breaker.state() is State.CLOSED
    assert await breaker.counts() == Counts()
    assert [(event.before, event.after, event.why) for event in breaker.events] == [
        (State.CLOSED, State.FORCED_OPEN, "operator"),
        (State.FORCED_OPEN, State.CLOSED, "operator"),
    ]


async def test_disabled_passes_all_and_counts_nothing_metrics_only_counts_but_never_trips(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=1)
    await breaker.set_mode("disabled")
    assert all([await breaker.one(F) for _ in range(50)])
    assert await breaker.counts() == Counts()
    assert await breaker.state() is State.DISABLED
    await breaker.set_mode("metrics_only")
    assert all([await breaker.one(F) for _ in range(50)])
    assert await breaker.counts() == Counts(50, 50, 0)
    assert await breaker.state() is State.METRICS_ONLY


async def test_metrics_only_tells_once_for_each_rate_what_would_have_opened_it(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=2, slow_ms=100, slow_rate=50)
    await breaker.set_mode("metrics_only")
    for _ in range(5):
        await breaker.one(F)
    for _ in range(9):
        await breaker.one(S, 101)
    only = State.METRICS_ONLY
    assert [(event.before, event.after, event.why, event.counts) for event in breaker.events[1:]] == [
        (only, only, "failure_rate", Counts(2, 2, 0)),
        (only, only, "slow_rate", Counts(10, 5, 5)),
    ]
    await breaker.set_mode("auto")
    await breaker.set_mode("metrics_only")
    await breaker.one(F)
    await breaker.one(F)
    assert breaker.events[-1].why == "failure_rate"  # another stay, another time


@pytest.mark.parametrize(("ms", "calls"), [(499, 1), (500, 0), (501, 0)])
async def test_a_result_after_its_lease_counts_in_no_state(make: Make, ms: int, calls: int) -> None:
    clock = Clock()
    breaker = await make(clock, lease_ms=500, window_ms=60_000)
    await breaker.one(F, ms)
    assert (await breaker.counts()).calls == calls
    assert breaker.late == 1 - calls


async def test_a_permit_of_a_closed_breaker_counts_once_too(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=2)
    permit = await breaker.take()
    assert isinstance(permit, Permit)
    await breaker.settle(permit, F)
    await breaker.settle(permit, F)
    assert await breaker.counts() == Counts(1, 1, 0)
    assert (breaker.late, await breaker.state()) == (1, State.CLOSED)


async def test_events_carry_counts_and_the_last_error_and_history_is_bounded(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=2, open_ms=10, probes_max=1, history_max=3)
    await breaker.one(S)
    await breaker.trip()
    assert breaker.events == [
        Event(clock.ms, State.CLOSED, State.OPEN, "failure_rate", Counts(2, 1, 0), "boom", 10)
    ]
    for _ in range(5):
        clock.ms += 1_000
        await breaker.one(S)
        await breaker.trip()
    face = await breaker.seen()
    if isinstance(face, Breaker):  # the shared one keeps it in Redis: test_shared_breaker
        assert list(face.history) == breaker.events[-3:]
    assert len(breaker.events) == 16


@pytest.mark.parametrize(
    "wrong",
    [{"failure_rate": 0}, {"failure_rate": 101}, {"slow_rate": 0}, {"calls_min": 0}, {"probes_max": 0}, {"lease_ms": 0},
     {"open_growth": 0.5}, {"jitter": 1}, {"window_ms": 1_500}, {"slow_ms": -1}],
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Rules(**wrong)


async def test_ten_thousand_callers_at_once_never_exceed_the_probes(make: Make) -> None:
    clock = Clock()
    breaker = await make(clock, calls_min=1, probes_max=7, open_ms=10, half_open_max_ms=0)
    await breaker.trip()
    clock.ms += 10
    out = peak = asked = passed = 0
    gate = asyncio.Event()

    async def caller() -> None:
        nonlocal out, peak, asked, passed
        permit = await breaker.take()
        asked += 1
        if isinstance(permit, Stop):
            return
        out += 1
        passed += 1
        result = I if passed % 2 else S
        peak = max(peak, out)
        try:
            await gate.wait()
        finally:
            out -= 1
            await breaker.settle(permit, result)

    tasks = [asyncio.create_task(caller()) for _ in range(10_000)]
    while asked < 10_000:  # noqa: ASYNC110 - turns of the loop, not time
        await asyncio.sleep(0)
    assert out == peak == 7
    assert await breaker.state() is State.HALF_OPEN
    probes = [task for task in tasks if not task.done()]
    for task in probes[:3]:
        task.cancel()
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert peak == 7
    # Those given back are free for others, and for no more.
    assert await breaker.state() is State.HALF_OPEN
    answers = await asyncio.gather(*(breaker.take() for _ in range(100)))
    given = sum(isinstance(answer, Permit) for answer in answers)
    assert given == 7 - (await breaker.counts()).calls


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
        self.settled: set[int] = set()

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

    def counted(self) -> list[tuple[int, bool, bool]]:
        """The calls of the window."""
        if self.state == "half_open" or self.rules.window == "count":
            size = self.rules.probes_max if self.state == "half_open" else self.rules.window_calls
            return self.facts[-size:]
        bucket, limit = self.rules.bucket_ms, self.rules.window_ms // self.rules.bucket_ms
        return [fact for fact in self.facts if self.now // bucket - fact[0] // bucket < limit]

    def counts(self) -> tuple[int, int, int]:
        facts = self.counted()
        return len(facts), sum(f for _, f, _ in facts), sum(s for *_, s in facts)

    def settle(self, number: int, era: int, taken: int, result: Result) -> None:
        self.look()
        if number in self.settled or era != self.era or self.now >= taken + self.rules.lease_ms:
            return
        self.settled.add(number)
        if self.state == "half_open" and self.out.pop(number, None) is None:
            return
        if result is I or self.state == "disabled":
            return
        self.facts.append((self.now, result is F, self.now - taken > self.rules.slow_ms))
        size, facts = self.rules.calls_min, self.counted()
        if self.state == "half_open":
            size = self.rules.probes_max
        elif self.rules.window == "count":
            size = min(size, self.rules.window_calls)
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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RULES, st.lists(STEP, max_size=80))
async def test_the_breaker_equals_its_model(make: Make, rules: Rules, steps: list[tuple[str, Any]]) -> None:
    clock = Clock()
    breaker = await make(clock, **{name: getattr(rules, name) for name in rules.__struct_fields__})
    model, mode = Model(rules), "auto"
    model.now = clock.ms
    permits: list[tuple[Permit, int, int]] = []
    for number, (what, arg) in enumerate(steps):
        if what == "wait":
            clock.ms += arg
            model.now = clock.ms
        elif what == "take":
            permit = await breaker.take()
            passes = model.take(number)
            assert isinstance(permit, Permit) is passes
            if isinstance(permit, Permit):
                permits.append((permit, number, model.era))
        elif what == "mode":
            await breaker.set_mode(arg)
            model.look()
            if arg != mode:
                mode = arg
                model.openings = 0
                model.enter("closed" if arg == "auto" else arg)
        elif permits:
            permit, taken_at, era = permits[arg % len(permits)]  # often settled twice, or late
            await breaker.settle(permit, Result(what))
            model.settle(taken_at, era, permit.taken_ms, Result(what))
        model.look()
        seen = await breaker.seen()
        assert seen.state.value == model.state
        assert seen.counts() == model.counts()
        if model.state == "open":
            assert seen.retry_in_ms() == max(0, model.until - clock.ms)
