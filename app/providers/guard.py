"""Every call to a supplier goes through here, in this order:

    deadline ─► bulkhead ─► breaker ─► the adapter's call ─► retry budget ─► metrics
    (of all)    (a place,   (may I?)   (one try, typed       (again? from the
                bounded       ▲         answer)               breaker on)
                wait)         └──────── backoff ◄──────────────┘

- The deadline covers everything: the wait for a place, each try, each backoff. It passing before the call was made is
  `NotDone`, after that `MaybeDone`.
- The bulkhead comes before the breaker: a probe's lease must not run while it waits for a place. A supplier that hangs
  fills its own places and nobody else's. A breaker that is open is asked first, so that nobody queues for a refusal.
- The breaker learns what the answer declares (`answer.py`), of each try. A cancelled call says nothing about the
  supplier: ignored.
- Repeated here is only what the adapter says certainly did not happen and blames on the supplier (`NotDone` that
  counts as a failure): never an unknown, never a business "no", never "slow down" (its rows are paced by their due
  times), never a probe, and only while the breaker stays closed, the budget pays for it (`retry.py`) and the deadline
  leaves room.
  Everything else is repeated by whoever holds the row, with the same key: a sick supplier never sees a multiple.
- An exception out of an adapter is a bug; money treats it as `MaybeDone`, and it is logged with its traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import date, datetime
from typing import Any, Literal, TypeVar

import msgspec
import structlog
from prometheus_client import Counter, Gauge, Histogram

from app.breaker import Breaker, Counts, Event, Result, Rules, State, Stop, monotonic_ms
from app.providers import wire
from app.providers.answer import BREAKER_OPEN, NO_PLACE, Answer, Done, MaybeDone, NotDone
from app.providers.payment import (
    AttemptRef,
    BillLine,
    Hook,
    HookAnswer,
    LearnsKeys,
    Link,
    LinkWanted,
    Payment,
    PaymentProvider,
    RefundState,
    RefundWanted,
)
from app.providers.retry import RetryBudget, backoff_s
from app.providers.shared_breaker import SharedBreaker, told
from app.providers.sms import Sent, SmsProvider, Text
from app.scripts import Scripts

T = TypeVar("T")
log = structlog.get_logger()

CALLS = Counter(
    "fairdrop_provider_calls", "Calls to suppliers by answer: done, not_done, refused, maybe_done, cancelled",
    ["provider", "operation", "answer"],
)  # fmt: skip
SECONDS = Histogram(
    "fairdrop_provider_call_seconds", "Time of a call to a supplier, the wait for a place included",
    ["provider", "operation"], buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)  # fmt: skip
BREAKER = Gauge(
    "fairdrop_provider_breaker", "1 for the state that a supplier's breaker is in", ["provider", "state"],
    multiprocess_mode="livemax",
)  # fmt: skip
TRANSITIONS = Counter(
    "fairdrop_provider_breaker_transitions",
    "Transitions of suppliers' breakers",
    ["provider", "before", "after", "why"],
)
RETRIES = Counter(
    "fairdrop_provider_retries", "Repeats of what certainly did not happen: made, no_budget, no_time, stopped",
    ["provider", "outcome"],
)  # fmt: skip
ALONE = Gauge(
    "fairdrop_provider_breaker_alone",
    "1 while a process goes on with a breaker of its own, because Redis does not answer",
    ["provider"],
    multiprocess_mode="livesum",
)

_WORD: dict[type, str] = {Done: "done", NotDone: "not_done", MaybeDone: "maybe_done"}


class Bulkhead:
    """At most `places_max` calls at once and `queue_max` waiting; first come, first served. Cancel-safe.

    Own code instead of asyncio.Semaphore: the fast path costs no await, and the number that waits has a limit.
    """

    __slots__ = ("_waiting", "in_flight", "places_max", "queue_max")

    def __init__(self, places_max: int, queue_max: int) -> None:
        self.places_max = places_max
        self.queue_max = queue_max
        self.in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def free(self) -> int:
        return max(0, self.places_max - self.in_flight - len(self._waiting))

    async def enter(self, wait_max_s: float) -> bool:
        """True: a place is yours, `leave` it. False: none came free in time, or too many wait already."""
        if self.in_flight < self.places_max and not self._waiting:
            self.in_flight += 1
            return True
        if len(self._waiting) >= self.queue_max or wait_max_s <= 0:
            return False
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(wait_max_s):
                await place
        except TimeoutError:
            if _given(place):
                return True  # it came in the same moment
            self._give_up(place)
            return False
        except asyncio.CancelledError:
            if _given(place):
                self.leave()
            else:
                self._give_up(place)
            raise
        return True

    def _give_up(self, place: asyncio.Future[None]) -> None:
        with contextlib.suppress(ValueError):  # `leave` may have passed over it already
            self._waiting.remove(place)

    def leave(self) -> None:
        """Hand the place to the first who waits, else free it."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.in_flight -= 1


def _given(place: asyncio.Future[None]) -> bool:
    return place.done() and not place.cancelled()


class GuardRules(msgspec.Struct, frozen=True, kw_only=True):
    deadline_s: float = 5.0
    places_max: int = 32
    wait_max_s: float = 1.0
    queue_max: int = 1_000  # callers waiting for a place; more are refused at once
    retries_max: int = 0  # of one call
    retry_earned: float = 0.2  # repeats that each call earns
    retry_per_s: float = 1.0  # repeats that come by themselves
    retry_saved_max: float = 10.0
    retry_first_s: float = 0.05  # before the first repeat; doubles, jittered
    breaker: Rules = Rules()


class Guard:
    """Deadline, bulkhead, breaker, retry budget and metrics of one supplier."""

    def __init__(
        self,
        name: str,
        kind: Literal["payment", "sms"],
        rules: GuardRules,
        *,
        clock_ms: Callable[[], int] = monotonic_ms,
    ) -> None:
        if rules.breaker.lease_ms <= rules.deadline_s * 1000:
            raise ValueError(
                "a breaker's lease is longer than the call's deadline, or good probes would be forgotten"
            )
        self.name = name
        self.kind = kind
        self.rules = rules
        self.bulkhead = Bulkhead(rules.places_max, rules.queue_max)
        self.breaker: Breaker | SharedBreaker = Breaker(
            name, rules.breaker, clock_ms=clock_ms, on_event=self._noted
        )
        self.budget = RetryBudget(rules.retry_earned, rules.retry_per_s, rules.retry_saved_max, clock_ms)
        self._clock = clock_ms
        self.unsent: deque[bytes] = deque(
            maxlen=rules.breaker.history_max
        )  # entries on their way to the history
        self._untold: deque[tuple[Event, int]] = deque(maxlen=rules.breaker.history_max)
        self._meters: dict[tuple[str, str], Counter] = {}
        self._timers: dict[str, Histogram] = {}
        self._show(State.CLOSED)

    def share(self, scripts: Scripts, *, who: str, history_max: int) -> SharedBreaker:
        """From now on the breaker is the one in Redis, the same for all processes. who: this one, for the history."""
        self.breaker = SharedBreaker(
            self.name, self.rules.breaker, scripts, who=who, history_max=history_max, clock_ms=self._clock,
            on_event=self._noted, on_state=self._show,
        )  # fmt: skip
        return self.breaker

    def untold(self, who: str) -> list[bytes]:
        """Transitions that Redis has not recorded itself, as entries of the history; they are forgotten here."""
        if isinstance(self.breaker, SharedBreaker):
            return self.breaker.alone_events()
        found = [
            told(event, at_ms, who)
            for event, at_ms in self._untold
            if event.why != "operator"  # whoever ordered it has recorded it
        ]
        self._untold.clear()
        return found

    async def call(self, operation: str, send: Callable[[], Awaitable[Answer[T]]]) -> Answer[T]:
        """Make one call under guard and return its answer; raises nothing but cancellation."""
        started = time.perf_counter()
        try:
            answer = await self._guarded(operation, send)
        except asyncio.CancelledError:
            self._count(operation, "cancelled")
            raise
        self._count(operation, _WORD.get(type(answer), "refused"))
        timer = self._timers.get(operation)
        if timer is None:
            timer = self._timers[operation] = SECONDS.labels(self.name, operation)
        timer.observe(time.perf_counter() - started)
        return answer

    async def _guarded(self, operation: str, send: Callable[[], Awaitable[Answer[T]]]) -> Answer[T]:
        rules, breaker = self.rules, self.breaker
        if wait := breaker.retry_in_ms():
            breaker.stopped_count += 1
            return NotDone(BREAKER_OPEN, wait, Result.IGNORED)
        ends = time.perf_counter() + rules.deadline_s
        if not await self.bulkhead.enter(min(rules.wait_max_s, rules.deadline_s)):
            return NotDone(NO_PLACE, counts=Result.IGNORED)
        try:
            answer = await self._try(operation, send, ends)
            self.budget.earn()
            tries = 0
            while tries < rules.retries_max and self._may_repeat(answer):
                tries += 1
                wait_s = backoff_s(tries, rules.retry_first_s)
                if time.perf_counter() + wait_s >= ends:
                    self._repeated("no_time")
                    break
                if not self.budget.spend():
                    self._repeated("no_budget")
                    break
                await asyncio.sleep(wait_s)
                if not self._may_repeat(answer):
                    break  # the breaker has tripped meanwhile: what this supplier said stands
                again = await self._try(operation, send, ends)
                if type(again) is NotDone and again.code in (
                    BREAKER_OPEN,
                    NO_PLACE,
                ):  # not sent: the answer stands
                    self._repeated("no_time" if again.code == NO_PLACE else "stopped")
                    break
                self._repeated("made")
                answer = again
            return answer
        finally:
            self.bulkhead.leave()

    def _may_repeat(self, answer: Answer[T]) -> bool:
        """Certainly not done, and for a reason that may be over in a moment."""
        return (
            type(answer) is NotDone
            and answer.counts is Result.FAILURE
            and self.breaker.state in (State.CLOSED, State.DISABLED, State.METRICS_ONLY)
        )

    async def _try(self, operation: str, send: Callable[[], Awaitable[Answer[T]]], ends: float) -> Answer[T]:
        """One try: a permit, the call, what the breaker learns of it."""
        breaker = self.breaker
        if isinstance(breaker, SharedBreaker):
            permit = breaker.take_now() or await breaker.ask()
        else:
            permit = breaker.take()
        if isinstance(permit, Stop):
            return NotDone(BREAKER_OPEN, permit.retry_in_ms, Result.IGNORED)
        answer: Answer[T] | None = None
        try:
            left_s = ends - time.perf_counter()
            if left_s <= 0:
                return NotDone(NO_PLACE, counts=Result.IGNORED)
            async with asyncio.timeout(left_s):
                answer = await send()
        except TimeoutError:
            answer = MaybeDone("deadline")
        except Exception:
            log.exception("provider_adapter_failed", provider=self.name, operation=operation)
            answer = MaybeDone("adapter_error")
        finally:
            if answer is None:
                breaker.settle(permit, Result.IGNORED)
            elif type(answer) is Done:
                breaker.settle(permit, Result.SUCCESS)
            else:
                breaker.settle(permit, answer.counts, f"{operation}: {answer.code}")  # type: ignore[union-attr]
        return answer

    def _repeated(self, outcome: str) -> None:
        RETRIES.labels(self.name, outcome).inc()

    def refusal(self) -> NotDone | None:
        """May this supplier be tried now? None: yes. Else what a call would answer; another supplier may be asked.

        Costs no I/O and takes no permit: the call itself may still be refused, and then answers the same.
        """
        if wait := self.breaker.retry_in_ms():
            return NotDone(BREAKER_OPEN, wait, Result.IGNORED)
        if not self.bulkhead.free and self.bulkhead.waiting >= self.bulkhead.queue_max:
            return NotDone(NO_PLACE, counts=Result.IGNORED)
        return None

    def ready(self) -> int:
        """How many calls make sense now: 0 while the breaker is open or all places are taken."""
        if self.breaker.retry_in_ms():
            return 0
        free = self.bulkhead.free
        if self.breaker.state is State.HALF_OPEN:
            return min(free, self.rules.breaker.probes_max)
        return free

    def report(self) -> dict[str, Any]:
        """For operators: state, mode, counts, places. Counts of a shared breaker are those of all processes; places,
        stopped and late are of this process. No personal data. Its transitions are in the history."""
        breaker, counts = self.breaker, self.breaker.counts()
        shared = isinstance(breaker, SharedBreaker)
        now_ms = int(time.time() * 1000)
        return {
            "name": self.name,
            "kind": self.kind,
            "state": breaker.state.value,
            "mode": breaker.mode,
            "shared": shared,
            "alone": isinstance(breaker, SharedBreaker) and breaker.alone,
            "since_ms": now_ms - breaker.age_ms(),
            "retry_in_ms": breaker.retry_in_ms(),
            **rates(counts),
            "stopped": breaker.stopped_count,
            "late": breaker.late_count,
            "last_error": breaker.last_error,
            "in_flight": self.bulkhead.in_flight,
            "waiting": self.bulkhead.waiting,
            "places_max": self.rules.places_max,
            "retries_saved": round(self.budget.saved, 1),
            "at_ms": now_ms,
        }

    def _noted(self, event: Event) -> None:
        TRANSITIONS.labels(self.name, event.before.value, event.after.value, event.why).inc()
        self._show(event.after)
        if isinstance(self.breaker, Breaker):
            self._untold.append((event, self.breaker.wall_ms(event.at_ms)))
        log.warning(
            "provider_breaker", provider=self.name, before=event.before.value, after=event.after.value, why=event.why,
            calls=event.counts.calls, failures=event.counts.failures, slow=event.counts.slow,
            last_error=event.last_error, open_for_ms=event.open_for_ms,
        )  # fmt: skip

    def _show(self, now: State) -> None:
        ALONE.labels(self.name).set(isinstance(self.breaker, SharedBreaker) and self.breaker.alone)
        for state in State:
            BREAKER.labels(self.name, state.value).set(state is now)

    def _count(self, operation: str, word: str) -> None:
        meter = self._meters.get((operation, word))
        if meter is None:
            meter = self._meters[operation, word] = CALLS.labels(self.name, operation, word)
        meter.inc()


def rates(counts: Counts) -> dict[str, Any]:
    """Counts of a window, and their rates in percent (null: no calls)."""
    calls = counts.calls
    return {
        "calls": calls,
        "failures": counts.failures,
        "slow": counts.slow,
        "failure_rate": round(100 * counts.failures / calls, 1) if calls else None,
        "slow_rate": round(100 * counts.slow / calls, 1) if calls else None,
    }


class GuardedPayment:
    """A payment supplier behind its guard. Hook reading is pure and not guarded."""

    def __init__(self, adapter: PaymentProvider, guard: Guard, bills: Guard | None = None) -> None:
        """bills: the guard of the daily bill, which is slow and no measure of payments; default: the same."""
        self.adapter = adapter
        self.guard = guard
        self.bills = bills or guard

    @property
    def name(self) -> str:
        return self.adapter.name

    async def create(self, wanted: LinkWanted) -> Answer[Link]:
        return await self.guard.call("create", lambda: self.adapter.create(wanted))

    async def query(self, ref: AttemptRef) -> Answer[Payment]:
        return await self.guard.call("query", lambda: self.adapter.query(ref))

    async def close(self, ref: AttemptRef) -> Answer[Payment]:
        return await self.guard.call("close", lambda: self.adapter.close(ref))

    async def refund(self, wanted: RefundWanted) -> Answer[RefundState]:
        return await self.guard.call("refund", lambda: self.adapter.refund(wanted))

    async def refund_query(self, refund_id: str, capture_ref: str | None = None) -> Answer[RefundState]:
        return await self.guard.call(
            "refund_query", lambda: self.adapter.refund_query(refund_id, capture_ref)
        )

    async def bill(self, day: date) -> Answer[Sequence[BillLine]]:
        async def patiently() -> Answer[Sequence[BillLine]]:
            patience = wire.PATIENCE_S.set(self.bills.rules.deadline_s)
            try:
                return await self.adapter.bill(day)
            finally:
                wire.PATIENCE_S.reset(patience)

        return await self.bills.call("bill", patiently)

    async def prepare_hook(self, headers: Mapping[str, str]) -> None:
        """Await this before `read_hook`: learns the supplier's new key if the call-back names one, at most one in a
        while, whatever a forger sends. A failure is left to `read_hook`, which then refuses, and to redelivery."""
        adapter = self.adapter
        if isinstance(adapter, LearnsKeys) and adapter.key_missing(headers):
            await self.guard.call("learn_keys", adapter.learn_keys)

    def read_hook(self, headers: Mapping[str, str], raw_body: bytes, now: datetime) -> Hook:
        return self.adapter.read_hook(headers, raw_body, now)

    def hook_reply(self, ok: bool) -> HookAnswer:
        return self.adapter.hook_reply(ok)

    async def aclose(self) -> None:
        await self.adapter.aclose()


class GuardedSms:
    """An SMS supplier behind its guard."""

    def __init__(self, adapter: SmsProvider, guard: Guard) -> None:
        self.adapter = adapter
        self.guard = guard

    @property
    def name(self) -> str:
        return self.adapter.name

    async def send(self, text: Text) -> Answer[Sent]:
        return await self.guard.call("send", lambda: self.adapter.send(text))

    async def aclose(self) -> None:
        await self.adapter.aclose()
