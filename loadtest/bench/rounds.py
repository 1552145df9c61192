"""Rounds: subjects are measured in turn, A/B/A/B, and what a disturbed round says is thrown away, never printed.

CPU time for an answer comes first, by process: it is what a purchase costs, on this core and on any. Answers per second
come second: they depend on who else wanted the core. A figure is the median of its rounds with the least and the most.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loadtest.bench.machine import busy_s, cpu_by_role
from loadtest.generator import LATE_S, Result, closed_loop

TRIES = 3  # of a round before its figure is void


@dataclass(frozen=True)
class RedisNumbers:
    """Redis' own books: CPU by INFO cpu, commands and script calls by INFO commandstats."""

    cpu_s: float
    commands: int
    scripts: int


@dataclass
class Round:
    """One round, not void. CPU in µs for one answer, by process."""

    answers: int
    seconds: float
    cpu_us: dict[str, float]
    redis_used_us: float  # by Redis' used_cpu_*, for one answer
    commands: float  # Redis commands for one answer
    batch: float  # answers for one script call
    p50_ms: float
    p99_ms: float
    generator_share: float  # of a core
    others_share: float  # of a core: what processes outside this measurement used meanwhile
    whole_s: float  # until what the answers started was done too (orders in Postgres)

    @property
    def per_s(self) -> float:
        return self.answers / self.seconds

    @property
    def commands_per_s(self) -> float:
        return self.commands * self.per_s

    @property
    def settled_per_s(self) -> float:
        return self.answers / self.whole_s

    @property
    def all_us(self) -> float:
        """CPU of everything but the generator, for one answer."""
        return sum(value for role, value in self.cpu_us.items() if role != "generator")


@dataclass
class Subject:
    """Something to measure: where, which processes serve it, what it must answer, and its requests.

    requests gives, for each round, requests that either repeat for ever or end when they are used up.
    """

    key: str
    name: str
    port: int
    pids: Mapping[str, Sequence[int]]  # role -> processes; the role `api` serves the requests
    requests: Callable[[], Iterator[bytes]]
    expects: frozenset[int]
    before: Callable[[], Awaitable[None]] | None = None  # each round
    settle: Callable[[], Awaitable[None]] | None = None  # within the round: CPU counts until it returns
    after: Callable[[], Awaitable[None]] | None = None


@dataclass
class Course:
    """The rounds of one subject at one number of connections, or the reason why there is no figure."""

    subject: str
    name: str
    connections: int
    rounds: list[Round] = field(default_factory=list)
    void: str | None = None
    voided: list[str] = field(default_factory=list)  # rounds thrown away: repeated since

    def values(self, what: str) -> list[float]:
        """Of each round: `per_s`, `p99_ms`, … or the name of a process for its CPU µs."""
        if self.void is not None:
            raise Void(f"{self.name}, {self.connections} connections: {self.void}")
        if not self.rounds:
            raise Void(f"{self.name}, {self.connections} connections: not measured")
        first = self.rounds[0]
        if what in first.cpu_us:
            return [one.cpu_us[what] for one in self.rounds]
        return [float(getattr(one, what)) for one in self.rounds]

    def median(self, what: str) -> float:
        return statistics.median(self.values(what))


class Void(Exception):
    """There is no figure, and str(error) says why."""


def ratios(course: Course, against: Course, what: str = "per_s", *, inverse: bool = False) -> list[float]:
    """Round by round, course / against: both were measured within the same seconds. inverse: against / course (CPU)."""
    ours, theirs = course.values(what), against.values(what)
    pairs = zip(ours, theirs, strict=False)
    return [(b / a if inverse else a / b) for a, b in pairs if a > 0 and b > 0]


class Measure:
    """Measures rounds of so many seconds, with Redis' books if there is a Redis."""

    def __init__(
        self,
        seconds: float,
        redis: Callable[[], Awaitable[RedisNumbers]] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.seconds = seconds
        self.redis = redis
        self.say = say

    async def interleaved(
        self, subjects: Sequence[Subject], connections: Sequence[int], rounds: int
    ) -> dict[tuple[str, int], Course]:
        """All subjects in turn, so many times; a machine that gets slower is slower for all of them."""
        courses = {
            (one.key, number): Course(one.key, one.name, number) for number in connections for one in subjects
        }
        for turn in range(rounds):
            for number in connections:
                for subject in subjects:
                    course = courses[subject.key, number]
                    if course.void is None:
                        self.say(f"round {turn + 1}/{rounds}, {number} connections: {subject.name}")
                        await self.one(subject, course)
        return courses

    async def one(self, subject: Subject, course: Course) -> None:
        """One round; a void one is repeated, and too many of them make the figure void."""
        for _ in range(TRIES):
            if subject.before is not None:
                await subject.before()
            try:
                found = await self._round(subject, course.connections)
            except (OSError, TimeoutError) as error:
                found = f"{type(error).__name__}: {error}"
            if subject.after is not None:
                await subject.after()
            if isinstance(found, Round):
                course.rounds.append(found)
                return
            course.voided.append(found)
        course.void = course.voided[-1]

    async def _round(self, subject: Subject, connections: int) -> Round | str:
        gc.collect()
        gc.disable()  # a collection in the generator would be a stall of the server
        try:
            numbers = await self.redis() if self.redis else None
            before = cpu_by_role(subject.pids)
            all_before = busy_s()
            result, _ = await closed_loop(
                "127.0.0.1", subject.port, subject.requests(), connections=connections, seconds=self.seconds
            )
            whole_s = result.seconds
            if subject.settle is not None:
                began = time.perf_counter()
                await subject.settle()
                whole_s += time.perf_counter() - began
            all_spent = busy_s() - all_before
            spent = {role: cpu - before[role] for role, cpu in cpu_by_role(subject.pids).items()}
            numbers_after = await self.redis() if self.redis else None
        finally:
            gc.enable()
        reason = void_reason(result, subject.expects)
        if reason is not None:
            return reason
        answers = result.answers
        used = commands = scripts = 0.0
        if numbers is not None and numbers_after is not None:
            used = numbers_after.cpu_s - numbers.cpu_s
            commands = numbers_after.commands - numbers.commands
            scripts = numbers_after.scripts - numbers.scripts
        return Round(
            answers=answers,
            seconds=result.seconds,
            cpu_us={role: one / answers * 1e6 for role, one in spent.items()}
            | {"generator": result.cpu_s / answers * 1e6},
            redis_used_us=used / answers * 1e6,
            commands=commands / answers,
            batch=answers / scripts if scripts else 0.0,
            p50_ms=result.quantile_ms(0.5),
            p99_ms=result.quantile_ms(0.99),
            generator_share=result.cpu_s / result.seconds,
            others_share=max(0.0, all_spent - sum(spent.values()) - result.cpu_s) / whole_s,
            whole_s=whole_s,
        )


def void_reason(result: Result, expects: frozenset[int]) -> str | None:
    """Why this round measured something else than it should have; None: it did not."""
    if result.answers < 1:
        return "no answer came"
    unexpected = Counter({status: n for status, n in result.statuses.items() if status not in expects})
    if unexpected:
        words = ", ".join(
            f"{count} × {status if status else 'connection lost'}"
            for status, count in unexpected.most_common(4)
        )
        last = result.bodies.get(unexpected.most_common(1)[0][0], b"")[:160].decode("utf-8", "replace")
        return f"unexpected answers: {words} {last}".strip()
    if result.saturated:
        return f"the generator used {result.cpu_s / result.seconds:.0%} of its core"
    if result.behind:
        late = result.late / result.due
        return (
            f"the rate was not offered: {late:.0%} of the requests left more than {LATE_S * 1000:.0f} ms late"
        )
    return None


async def offered(
    attempt: Callable[[], Awaitable[Result]], expects: frozenset[int], voided: list[str] | None = None
) -> Result:
    """An open-loop round, repeated while it is void. Void: it stays so. voided: takes the reasons of the repeated."""
    reasons: list[str] = [] if voided is None else voided
    for _ in range(TRIES):
        gc.collect()
        gc.disable()  # as in the closed loop
        try:
            result = await attempt()
            reason = void_reason(result, expects)
        except (OSError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            gc.enable()
        if reason is None:
            return result
        reasons.append(reason)
    raise Void(reasons[-1])
