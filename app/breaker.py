"""Stops calling a supplier that fails or crawls, probes it carefully, and lets calls through again. Pure: no I/O.

    closed ──rate reached──► open ──interval over──► half_open ──enough good probes──► closed
                              ▲                          │
                              └──rate reached · waited too long for probes ┘
    forced_open (nothing passes) · disabled (all passes, nothing is counted) · metrics_only (all passes, counted)

Semantics are those of resilience4j's CircuitBreaker, where it defines them; docs/breaker.md has them, every difference
with its reason, and how the same breaker is shared by all processes (lua/breaker.lua, app/providers/shared_breaker.py).
tests/test_breaker.py holds both to the same tables and to the same model.

One event loop or one thread owns a breaker; it takes no lock.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Final, Literal, NamedTuple, Protocol

import msgspec


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    DISABLED = "disabled"
    METRICS_ONLY = "metrics_only"


Mode = Literal["auto", "forced_open", "disabled", "metrics_only"]
MODES: Final[tuple[Mode, ...]] = ("auto", "forced_open", "disabled", "metrics_only")


class Result(StrEnum):
    """What a finished call says about the supplier. Declared by the adapter, never guessed from an exception here."""

    SUCCESS = "success"  # the channel works: also a decline, a bad phone number, a blacklist
    FAILURE = "failure"
    IGNORED = "ignored"  # says nothing about the supplier (our own limit, a cancelled task)


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When to trip and how to come back. Times in ms, rates in percent."""

    failure_rate: float = 50.0  # resilience4j's default
    slow_rate: float = (
        80.0  # a supplier that answers four of five calls slowly holds as many places as a dead one
    )
    slow_ms: int = 3_000
    window: Literal["count", "time"] = "time"
    window_calls: int = 100  # of a count window
    window_ms: int = 10_000  # of a time window
    bucket_ms: int = 1_000
    calls_min: int = 10  # below this a rate means nothing
    open_ms: int = 1_000  # the first interval; short, because a buyer waits for a link
    open_growth: float = 2.0
    open_max_ms: int = 30_000
    jitter: float = 0.2  # ± share of the interval
    probes_max: int = 5  # calls let through in half-open, and how many results decide
    half_open_max_ms: int = 30_000  # 0: wait for ever
    lease_ms: int = 30_000  # longer than any call's deadline
    history_max: int = 50  # transitions remembered for operators

    def __post_init__(self) -> None:
        whole = (
            self.window_calls, self.window_ms, self.bucket_ms, self.calls_min, self.open_ms, self.open_max_ms,
            self.probes_max, self.lease_ms, self.history_max,
        )  # fmt: skip
        if min(whole) < 1 or self.slow_ms < 0 or self.half_open_max_ms < 0:
            raise ValueError("limits and times of a breaker are positive")
        if not (0 < self.failure_rate <= 100 and 0 < self.slow_rate <= 100):
            raise ValueError("rates are in (0, 100] percent")
        if self.open_growth < 1 or not 0 <= self.jitter < 1:
            raise ValueError("open_growth is at least 1, jitter in [0, 1)")
        if self.window_ms % self.bucket_ms:
            raise ValueError("window_ms is a multiple of bucket_ms")


class Permit:
    """The right to make one call; give it back with `settle`. Only the first time counts."""

    __slots__ = ("generation", "lease_until_ms", "serial", "settled", "taken_ms")

    def __init__(self, serial: int, generation: int, taken_ms: int, lease_until_ms: int) -> None:
        self.serial = serial
        self.generation = generation
        self.taken_ms = taken_ms
        self.lease_until_ms = lease_until_ms
        self.settled = False


class Stop(NamedTuple):
    """No call now. retry_in_ms: when it makes sense to ask again (0: as soon as a probe has finished)."""

    state: State
    retry_in_ms: int


class Counts(NamedTuple):
    """Of the window under way."""

    calls: int = 0
    failures: int = 0
    slow: int = 0


class Event(NamedTuple):
    """A transition, with what was counted before it and the last error that was seen.

    In metrics_only a rate that is reached is told once, as a transition from the state to itself.
    """

    at_ms: int
    before: State
    after: State
    why: str  # failure_rate | slow_rate | interval_over | recovered | half_open_too_long | operator
    counts: Counts
    last_error: str | None
    open_for_ms: int  # of an opening; else 0


class Window(Protocol):
    def add(self, now_ms: int, failed: bool, slow: bool) -> None: ...
    def counts(self, now_ms: int) -> Counts: ...


class CountWindow:
    """The last `size` calls."""

    __slots__ = ("_calls", "_failures", "_slow")

    def __init__(self, size: int) -> None:
        self._calls: deque[tuple[bool, bool]] = deque(maxlen=size)
        self._failures = 0
        self._slow = 0

    def add(self, now_ms: int, failed: bool, slow: bool) -> None:
        calls = self._calls
        if len(calls) == calls.maxlen:
            old_failed, old_slow = calls[0]
            self._failures -= old_failed
            self._slow -= old_slow
        calls.append((failed, slow))
        self._failures += failed
        self._slow += slow

    def counts(self, now_ms: int) -> Counts:
        return Counts(len(self._calls), self._failures, self._slow)


class TimeWindow:
    """The calls of the last `buckets` buckets of `bucket_ms`, the one under way included; O(1) a call."""

    __slots__ = ("_bucket_ms", "_buckets", "_calls", "_failures", "_limit", "_slow")

    def __init__(self, window_ms: int, bucket_ms: int) -> None:
        self._bucket_ms = bucket_ms
        self._limit = window_ms // bucket_ms
        self._buckets: deque[list[int]] = deque()  # [number, calls, failures, slow], oldest first
        self._calls = self._failures = self._slow = 0

    def _drop(self, number: int) -> None:
        buckets = self._buckets
        while buckets and buckets[0][0] <= number - self._limit:
            _, calls, failures, slow = buckets.popleft()
            self._calls -= calls
            self._failures -= failures
            self._slow -= slow

    def add(self, now_ms: int, failed: bool, slow: bool) -> None:
        number = now_ms // self._bucket_ms
        self._drop(number)
        if not self._buckets or self._buckets[-1][0] != number:
            self._buckets.append([number, 0, 0, 0])
        bucket = self._buckets[-1]
        bucket[1] += 1
        bucket[2] += failed
        bucket[3] += slow
        self._calls += 1
        self._failures += failed
        self._slow += slow

    def counts(self, now_ms: int) -> Counts:
        self._drop(now_ms // self._bucket_ms)
        return Counts(self._calls, self._failures, self._slow)


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class Breaker:
    """Says whether a call may be made now, and learns from how it went.

    clock_ms never runs back. rand is uniform in [0, 1). on_event is called inside the transition: quick, no calls back.
    """

    def __init__(
        self,
        name: str,
        rules: Rules = Rules(),  # noqa: B008  (frozen)
        *,
        clock_ms: Callable[[], int] = monotonic_ms,
        rand: Callable[[], float] = random.random,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.name = name
        self.rules = rules
        self._clock = clock_ms
        self._rand = rand
        self._on_event = on_event
        self._mode: Mode = "auto"
        self._state = State.CLOSED
        self._since_ms = clock_ms()
        self._until_ms = (
            0  # of an open state: when half-open may begin; of half-open: when it has waited too long
        )
        self._openings = 0  # in a row, without a recovery in between
        self._generation = 0
        self._serial = 0
        self._window: Window = self._fresh()
        self._told: set[str] = set()  # in metrics_only: rates that were reached
        # In half-open only: permit serial -> lease end. Insertion order is lease order, so the first is the oldest.
        self._probes: dict[int, int] = {}
        self.history: deque[Event] = deque(maxlen=rules.history_max)
        self.last_error: str | None = None
        self.stopped_count = 0  # calls refused since the start
        self.late_count = 0  # results that came too late to count
        self.ignored_count = 0

    # -- what callers do

    def take(self) -> Permit | Stop:
        """A permit for one call, or the reason why not. In half-open at most `probes_max` are out or decided."""
        now = self._clock()
        state = self._now_state(now)
        if state is State.OPEN:
            if now < self._until_ms:
                self.stopped_count += 1
                return Stop(state, self._until_ms - now)
            self._move(State.HALF_OPEN, now, "interval_over")
            state = State.HALF_OPEN
        if state is State.HALF_OPEN:
            self._forget_dead_probes(now)
            if len(self._probes) + self._window.counts(now).calls >= self.rules.probes_max:
                self.stopped_count += 1
                return Stop(state, 0)
        elif state is State.FORCED_OPEN:
            self.stopped_count += 1
            return Stop(state, self.rules.open_max_ms)
        self._serial += 1
        permit = Permit(self._serial, self._generation, now, now + self.rules.lease_ms)
        if state is State.HALF_OPEN:
            self._probes[permit.serial] = permit.lease_until_ms
        return permit

    def settle(self, permit: Permit, result: Result, error: str | None = None) -> None:
        """Learn from one call and give its permit back. Late or repeated results change nothing.

        The call's duration is the time since `take`. error: one short text without personal data.
        """
        now = self._clock()
        state = self._now_state(now)
        if permit.settled or permit.generation != self._generation or now >= permit.lease_until_ms:
            self.late_count += 1
            return
        permit.settled = True
        if state is State.HALF_OPEN and self._probes.pop(permit.serial, None) is None:
            self.late_count += 1
            return
        if result is Result.FAILURE and error is not None:
            self.last_error = error
        if result is Result.IGNORED:
            self.ignored_count += 1
            return
        if state is State.DISABLED:
            return
        self._window.add(now, result is Result.FAILURE, now - permit.taken_ms > self.rules.slow_ms)
        if state is State.CLOSED:
            if why := self._reached(now, self._calls_min()):
                self._move(State.OPEN, now, why[0])
        elif state is State.METRICS_ONLY:
            for rate in self._reached(now, self._calls_min()):
                if rate not in self._told:
                    self._told.add(rate)
                    self._tell(Event(now, state, state, rate, self._window.counts(now), self.last_error, 0))
        elif self._window.counts(now).calls >= self.rules.probes_max:
            if why := self._reached(now, self.rules.probes_max):
                self._move(State.OPEN, now, why[0])
            else:
                self._move(State.CLOSED, now, "recovered")

    # -- what operators do

    @property
    def mode(self) -> Mode:
        return self._mode

    def set_mode(self, mode: Mode) -> None:
        """Override the breaker, or give it back its own will (`auto`: closed, knowing nothing)."""
        if mode == self._mode:
            return
        now = self._clock()
        self._now_state(now)
        self._mode = mode
        self._openings = 0
        after = State.CLOSED if mode == "auto" else State(mode)
        self._move(after, now, "operator")

    def adopt(self, state: State, mode: Mode, retry_in_ms: int, openings: int) -> None:
        """Go on from what another breaker of this supplier knew: its state, not its counts. Tells nobody.

        retry_in_ms: of an open state. Half-open is taken over as open with its interval over: probes are our own.
        """
        now = self._clock()
        self._mode = mode
        self._state = State.OPEN if state is State.HALF_OPEN else state
        self._since_ms = now
        self._until_ms = now + (retry_in_ms if state is State.OPEN else 0)
        self._openings = openings
        self._renew()

    @property
    def state(self) -> State:
        """As the next caller would find it, except that only `take` moves from open to half-open."""
        return self._now_state(self._clock())

    def age_ms(self) -> int:
        """How long it has been in this state."""
        return self._clock() - self._since_ms

    def wall_ms(self, at_ms: int) -> int:
        """A moment of the breaker's clock as milliseconds since 1970."""
        return int(time.time() * 1000) - (self._clock() - at_ms)

    def retry_in_ms(self) -> int:
        """0: a call may pass now (or as soon as a probe has finished); else ms to wait."""
        now = self._clock()
        state = self._now_state(now)
        if state is State.FORCED_OPEN:
            return self.rules.open_max_ms
        return max(0, self._until_ms - now) if state is State.OPEN else 0

    def counts(self) -> Counts:
        return self._window.counts(self._clock())

    # -- inside

    def _calls_min(self) -> int:
        rules = self.rules
        return min(rules.calls_min, rules.window_calls) if rules.window == "count" else rules.calls_min

    def _fresh(self) -> Window:
        if self._state is State.HALF_OPEN:
            return CountWindow(self.rules.probes_max)
        if self.rules.window == "count":
            return CountWindow(self.rules.window_calls)
        return TimeWindow(self.rules.window_ms, self.rules.bucket_ms)

    def _now_state(self, now: int) -> State:
        """The state at this moment: half-open that has waited too long is open again."""
        limit = self.rules.half_open_max_ms
        if self._state is State.HALF_OPEN and limit and now >= self._until_ms:
            # The interval is counted from the moment the wait was over, not from when somebody looked.
            self._move(State.OPEN, self._until_ms, "half_open_too_long")
        return self._state

    def _forget_dead_probes(self, now: int) -> None:
        probes = self._probes
        while probes:
            serial = next(iter(probes))
            if probes[serial] > now:
                return
            del probes[serial]

    def _reached(self, now: int, calls_min: int) -> list[str]:
        """The rates that are reached, the one that decides first."""
        counts = self._window.counts(now)
        if counts.calls < calls_min:
            return []
        reached = []
        if counts.failures * 100 >= self.rules.failure_rate * counts.calls:
            reached.append("failure_rate")
        if counts.slow * 100 >= self.rules.slow_rate * counts.calls:
            reached.append("slow_rate")
        return reached

    def _open_for_ms(self) -> int:
        rules = self.rules
        # The exponent is capped: 2.0 ** 64 is far past any maximum, and floats must not overflow.
        grown = min(rules.open_max_ms, rules.open_ms * rules.open_growth ** min(self._openings - 1, 64))
        # floor(x + 0.5), not round(): lua/breaker.lua has no rounding to even.
        return max(1, math.floor(grown * (1 + rules.jitter * (2 * self._rand() - 1)) + 0.5))

    def _move(self, after: State, now: int, why: str) -> None:
        before, counts = self._state, self._window.counts(now)
        open_for_ms = 0
        self._state = after
        self._since_ms = now
        if after is State.OPEN:
            self._openings += 1
            open_for_ms = self._open_for_ms()
            self._until_ms = now + open_for_ms
        elif after is State.HALF_OPEN:
            self._until_ms = now + self.rules.half_open_max_ms
        elif after is State.CLOSED:
            self._openings = 0
        self._renew()
        self._tell(Event(now, before, after, why, counts, self.last_error, open_for_ms))

    def _renew(self) -> None:
        """A new era: permits and counts of the one before are worth nothing."""
        self._generation += 1
        self._probes.clear()
        self._told.clear()
        self._window = self._fresh()

    def _tell(self, event: Event) -> None:
        self.history.append(event)
        if self._on_event is not None:
            self._on_event(event)
