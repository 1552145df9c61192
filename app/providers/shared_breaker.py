"""One breaker for all processes: its state is in Redis (lua/breaker.lua), a healthy call costs at most one round trip.

    take ── known to be closed, and fresh ──► go, without asking       settle ──► a turn, nobody waits for it
         ── known to be open ───────────────► no, without asking                  (its reply is what is known next)
         ── half-open, or not known ────────► a turn: one round trip

A *turn* is one call of the script: it takes results in, gives permits out and says what the breaker is now. One turn at
a time is under way for each breaker; what arrives meanwhile goes into the next one, so ten thousand callers at once
cost a handful of turns. No lock is held anywhere, least of all during a call to a supplier.

Why half-open lets nobody past its permits, although closed is believed without asking: `closed` is believed for
`fresh_ms` after the turn that said so was *sent*, and that is at most half of the shortest open interval. Whoever still
believes it when the breaker opens has stopped believing before half-open can begin, and from then on each permit is one
that Redis gave.

Redis gone, slow or full: the process goes on *alone*, with a local breaker that starts from what was known (an open
interval runs on), and results that Redis did not get are counted there. As soon as a turn succeeds the shared state
counts again; what was counted alone is forgotten, its transitions are added to the history. While alone each process
has its own probes: at most processes × probes_max.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable

import msgspec
import structlog

from app import keys
from app.answers import Gone, Stands
from app.breaker import Breaker, Counts, Event, Mode, Permit, Result, Rules, State, Stop, monotonic_ms
from app.errors import FairdropError
from app.scripts import Scripts

log = structlog.get_logger()

FRESH_MAX_MS = 500  # an override reaches every process within this and one beat
DEADLINE_S = 0.25  # of a turn; a supplier's call waits for one at most in half-open
RESULTS_MAX = 50  # in one turn: some 13 µs of Redis each, and nobody else is served meanwhile
WANTED_MAX = 1_000
QUEUE_MAX = 10_000  # results that wait for a turn; more are lost, and counted as such
ALONE_EVENTS_MAX = 50  # transitions made alone that wait for Redis

_LETTER = {Result.SUCCESS: "s", Result.FAILURE: "f", Result.IGNORED: "i"}


def rules_text(rules: Rules) -> str:
    """Rules as lua/breaker.lua reads them: its ARGV[2]."""
    return ",".join(
        repr(number)
        for number in (
            rules.failure_rate, rules.slow_rate, rules.slow_ms, int(rules.window == "count"), rules.window_calls,
            rules.window_ms, rules.bucket_ms, rules.calls_min, rules.open_ms, rules.open_growth, rules.open_max_ms,
            rules.jitter, rules.probes_max, rules.half_open_max_ms, rules.lease_ms,
        )
    )  # fmt: skip


def fresh_ms(rules: Rules) -> int:
    """How long what a turn said may be believed: see the law above."""
    return min(FRESH_MAX_MS, int(rules.open_ms * (1 - rules.jitter) / 2))


class SharedPermit(Permit):
    """A permit of the shared breaker; others are the local one's."""

    __slots__ = ()


class Told(msgspec.Struct, frozen=True):
    """A transition as the history has it. by: the process whose call made it, or the operator."""

    at_ms: int  # wall clock
    before: State
    after: State
    why: str
    calls: int
    failures: int
    slow: int
    last_error: str | None
    open_for_ms: int
    by: str

    def event(self) -> Event:
        counts = Counts(self.calls, self.failures, self.slow)
        return Event(self.at_ms, self.before, self.after, self.why, counts, self.last_error, self.open_for_ms)


_TOLD = msgspec.json.Decoder(list[Told])


class SharedBreaker:
    """As app.breaker.Breaker, for all processes that use the same name and Redis. One event loop owns it.

    who: this process, for the history. now_ms 0-clock: Redis' own; tests pass one. on_event: of transitions that a turn
    of this process made, so that each is told once in the whole installation; on_state: whenever another state is seen.
    """

    def __init__(
        self,
        name: str,
        rules: Rules,
        scripts: Scripts,
        *,
        who: str,
        history_max: int = 1_000,
        clock_ms: Callable[[], int] = monotonic_ms,
        now_ms: Callable[[], int] | None = None,
        rand: Callable[[], float] | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_state: Callable[[State], None] | None = None,
        fresh_max_ms: int | None = None,
    ) -> None:
        self.name = name
        self.rules = rules
        self.who = who
        self.history_max = history_max
        self.alone = False
        self.turns = 0  # round trips so far
        self.stopped_count = 0
        self.late_count = 0
        self.ignored_count = 0
        self.lost_count = 0  # results that neither Redis nor the local breaker learned
        self._scripts = scripts
        self._rules_text = rules_text(rules)
        self._fresh_ms = fresh_ms(rules) if fresh_max_ms is None else min(fresh_ms(rules), fresh_max_ms)
        self._clock = clock_ms
        self._now = now_ms or (lambda: 0)
        # Of its own: a beat in the background must not move the lots of somebody who has seeded `random`.
        self._rand = rand or random.Random().random
        self.local = Breaker(name, rules, clock_ms=clock_ms, rand=self._rand, on_event=self._alone_event)
        self._on_event = on_event
        self._on_state = on_state
        # What the last turn said, and the local moments before it was sent and after it came.
        self._known: Stands | None = None
        self._state = State.CLOSED
        self._fresh_until = self._came_at = 0
        self._mode: Mode = "auto"
        # Of calls that are over: the permit's generation and serial, what is left of the message.
        self._results: deque[tuple[int, int, int, str, str]] = deque()
        self._takers: deque[asyncio.Future[Permit | Stop | None]] = deque()
        self._switch: Mode | None = None
        self._look = False
        self._turning: asyncio.Task[None] | None = None
        self._alone_events: deque[bytes] = deque(maxlen=ALONE_EVENTS_MAX)

    # -- what callers do

    def take_now(self) -> Permit | Stop | None:
        """A permit or a refusal from what is known here; None: it must be asked for (`ask`)."""
        if self.alone:
            return self._counted(self.local.take())
        known, now = self._known, self._clock()
        if known is None or now >= self._fresh_until or self._state is State.HALF_OPEN:
            return None
        if self._state is State.OPEN:
            wait_ms = known.until_ms - self._estimate(now)
            return self._counted(Stop(State.OPEN, wait_ms)) if wait_ms > 0 else None
        if self._state is State.FORCED_OPEN:
            return self._counted(Stop(State.FORCED_OPEN, self.rules.open_max_ms))
        return SharedPermit(0, known.generation, now, now + self.rules.lease_ms)

    async def ask(self) -> Permit | Stop:
        """As Breaker.take, in one round trip, shared with others who ask at the same time. Cancel-safe."""
        future: asyncio.Future[Permit | Stop | None] = asyncio.get_running_loop().create_future()
        self._takers.append(future)
        self._wake()
        try:
            answer = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and isinstance(future.result(), Permit):
                self.settle(future.result(), Result.IGNORED)  # type: ignore[arg-type]
            raise
        # None: Redis did not say. The local breaker has taken over.
        return self._counted(self.local.take() if answer is None else answer)

    async def take(self) -> Permit | Stop:
        return self.take_now() or await self.ask()

    def settle(self, permit: Permit, result: Result, error: str | None = None) -> None:
        """As Breaker.settle. Returns at once: the turn that carries it goes by itself."""
        if not isinstance(permit, SharedPermit):
            self.local.settle(permit, result, error)
            return
        if permit.settled:
            self.late_count += 1
            return
        permit.settled = True
        took_ms = self._clock() - permit.taken_ms
        sent = (permit.generation, permit.serial, took_ms, _LETTER[result], error or "")
        if self.alone:
            self._learn_alone(sent)
        elif len(self._results) >= QUEUE_MAX:
            self.lost_count += 1
        else:
            self._results.append(sent)
            self._wake()

    # -- what operators do

    @property
    def mode(self) -> Mode:
        return self.local.mode if self.alone else self._mode

    def set_mode(self, mode: Mode) -> None:
        """Override it for all processes, with the next turn."""
        if self.alone:
            self.local.set_mode(mode)
        self._switch = mode
        self._wake()

    @property
    def state(self) -> State:
        """As last known here: at most a beat old."""
        return self.local.state if self.alone else self._state

    def age_ms(self) -> int:
        """How long it has been in this state."""
        if self.alone or self._known is None:
            return self.local.age_ms()
        return max(0, self._estimate(self._clock()) - self._known.since_ms)

    def retry_in_ms(self) -> int:
        if self.alone:
            return self.local.retry_in_ms()
        if self._known is None:
            return 0
        if self._state is State.FORCED_OPEN:
            return self.rules.open_max_ms
        return (
            max(0, self._known.until_ms - self._estimate(self._clock())) if self._state is State.OPEN else 0
        )

    def counts(self) -> Counts:
        if self.alone or self._known is None:
            return self.local.counts()
        return Counts(self._known.calls, self._known.failures, self._known.slow)

    @property
    def last_error(self) -> str | None:
        if self.alone or self._known is None:
            return self.local.last_error
        return self._known.last_error or None

    # -- keeping in touch

    async def beat(self) -> None:
        """Look at what all know, unless a turn has just said it. Without Redis go on alone; with it come back."""
        if not self.alone and self._turning is None:
            left_ms = self._fresh_until - self._clock()
            if left_ms > self._fresh_ms * 2 // 3:
                return
        await self.look()

    async def look(self) -> None:
        """Learn what all know, now."""
        self._look = True
        self._wake()
        await self.idle()

    async def idle(self) -> None:
        """Wait until everything that was settled, asked or switched before has been told to Redis, or was given up."""
        while self._turning is not None:
            await asyncio.wait([self._turning])

    def _wake(self) -> None:
        if self._turning is None:
            self._turning = asyncio.get_running_loop().create_task(
                self._turn_all(), name=f"breaker {self.name}"
            )

    async def _turn_all(self) -> None:
        try:
            while self._results or self._takers or self._switch is not None or self._look:
                if not await self._turn():
                    break
        finally:
            self._turning = None
            while self._results:  # without Redis; or the process stops
                self._learn_alone(self._results.popleft())
            while self._takers:
                _hand(self._takers.popleft(), None)

    async def _turn(self) -> bool:
        """One round trip. False: Redis did not do it, the local breaker has taken over."""
        results = [self._results.popleft() for _ in range(min(RESULTS_MAX, len(self._results)))]
        takers = [self._takers.popleft() for _ in range(min(WANTED_MAX, len(self._takers)))]
        takers = [taker for taker in takers if not taker.done()]
        switch, self._look = self._switch, False
        sent_at, was = self._clock(), self.state
        self.turns += 1
        try:
            stands = await self._scripts.breaker(
                name=self.name, rules=self._rules_text, rand=self._rand(), who=self.who,
                history_max=self.history_max, mode_first=self._mode, switch_to=switch or "",
                wanted=len(takers), results=results, now_ms=self._now(), deadline_s=DEADLINE_S,
            )  # fmt: skip
        except (FairdropError, asyncio.CancelledError) as error:
            self._go_alone(error)
            self._results.extendleft(reversed(results))
            self._takers.extendleft(reversed(takers))
            if isinstance(error, asyncio.CancelledError):
                raise
            return False
        assert not isinstance(stands, Gone)  # mode_first makes it
        if self._switch is switch:
            self._switch = None
        self._take_in(stands, sent_at, was)
        self._give_out(stands, takers)
        return True

    def _take_in(self, stands: Stands, sent_at: int, was: State) -> None:
        if self.alone:
            log.info("provider_breaker_shared_again", provider=self.name, state=stands.state)
            self.alone = False
        self._known, self._came_at = stands, self._clock()
        self._fresh_until = sent_at + self._fresh_ms
        self._state = State(stands.state)
        for mode in ("auto", "forced_open", "disabled", "metrics_only"):
            if mode == stands.mode:
                self._mode = mode
        self.late_count += stands.settled.count("l")
        self.ignored_count += stands.settled.count("i")
        if self._on_event is not None:
            for told in _TOLD.decode(stands.events):
                self._on_event(told.event())
        if self._on_state is not None and self._state is not was:
            self._on_state(self._state)

    def _give_out(self, stands: Stands, takers: list[asyncio.Future[Permit | Stop | None]]) -> None:
        now, probing = self._clock(), self._state is State.HALF_OPEN
        left, serial = stands.granted, stands.serial - stands.granted
        for taker in takers:
            if taker.done():
                continue  # cancelled meanwhile
            if not left:
                _hand(taker, Stop(self._state, self.retry_in_ms()))
                continue
            left, serial = left - 1, serial + 1
            until_ms = now + self.rules.lease_ms
            _hand(taker, SharedPermit(serial if probing else 0, stands.generation, now, until_ms))
        for _ in range(left if probing else 0):  # nobody is left to use them
            serial += 1
            self.settle(SharedPermit(serial, stands.generation, now, now), Result.IGNORED)

    def _estimate(self, now: int) -> int:
        """The breaker's clock at the local moment `now`; behind by at most one way of a round trip, never ahead."""
        assert self._known is not None
        return self._known.now_ms + now - self._came_at

    def _counted(self, answer: Permit | Stop) -> Permit | Stop:
        if isinstance(answer, Stop):
            self.stopped_count += 1
        return answer

    # -- without Redis

    def _go_alone(self, error: BaseException) -> None:
        if self.alone:
            return
        log.warning("provider_breaker_alone", provider=self.name, error=type(error).__name__)
        openings = 0 if self._known is None else self._known.openings
        self.local.adopt(self._state, self._mode, self.retry_in_ms(), openings)
        self.alone = True

    def _learn_alone(self, sent: tuple[int, int, int, str, str]) -> None:
        """A call that began under the shared breaker and of which Redis does not hear."""
        _, _, took_ms, letter, error = sent
        if self.local.state is not State.CLOSED or letter == "i":
            self.lost_count += letter != "i"
            return
        permit = self.local.take()
        if isinstance(permit, Permit):
            permit.taken_ms -= took_ms
            result = Result.FAILURE if letter == "f" else Result.SUCCESS
            self.local.settle(permit, result, error or None)

    def _alone_event(self, event: Event) -> None:
        if event.why != "operator":
            self._alone_events.append(told(event, self.local.wall_ms(event.at_ms), f"{self.who} (alone)"))
        if self._on_event is not None:
            self._on_event(event)
        if self._on_state is not None:
            self._on_state(event.after)

    def alone_events(self) -> list[bytes]:
        """Transitions made alone that the history does not have yet, as its entries; they are forgotten here."""
        found = list(self._alone_events)
        self._alone_events.clear()
        return found


def _hand(taker: asyncio.Future[Permit | Stop | None], answer: Permit | Stop | None) -> None:
    if not taker.done():
        taker.set_result(answer)


def told(event: Event, at_ms: int, by: str) -> bytes:
    """A transition of a local breaker as an entry of the history."""
    return msgspec.json.encode(
        Told(
            at_ms,
            event.before,
            event.after,
            event.why,
            *event.counts,
            event.last_error,
            event.open_for_ms,
            by,
        )
    )


def history_command(name: str, entry: bytes, history_max: int) -> tuple[str | bytes | int, ...]:
    """Add one entry to the history, which keeps the newest `history_max`."""
    return ("XADD", keys.breaker_history_key(name), "MAXLEN", history_max, "*", "e", entry)
