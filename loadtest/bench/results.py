"""What a section hands back: verdicts about the goals, tables, and lines for the plots; nothing of it void."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.bench.rounds import Course, Void, ratios


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int = 5
    seconds: float = 1.0  # of one round
    connections: tuple[int, ...] = (64, 256)
    workers: tuple[int, ...] = (1,)
    servers: tuple[str, ...] = ("uvicorn", "granian")
    growth_max: int = 1_000_000  # waiting buyers
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Part:
    """One measure of a goal: median and spread of its rounds, in `unit`."""

    label: str  # by CPU, per second, p99, …
    median: float
    low: float
    high: float
    unit: str
    met: bool

    def __str__(self) -> str:
        digits = 0 if self.unit == "%" or abs(self.median) >= 100 else 2 if abs(self.median) < 10 else 1
        middle, low, high = (f"{one:,.{digits}f}" for one in (self.median, self.low, self.high))
        unit = f" {self.unit}" if self.unit else ""
        return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low}–{high})"


@dataclass(frozen=True)
class Verdict:
    """One goal (or one case of it): what was measured, what was needed, whether it is met."""

    goal: int
    what: str
    where: str  # server program, connections
    needed: str
    parts: tuple[Part, ...] = ()
    void: str | None = None

    @property
    def outcome(self) -> str:
        if self.void is not None:
            return f"void: {self.void}"
        good = [part.label for part in self.parts if part.met]
        if len(good) == len(self.parts):
            return "met"
        return f"only {' and '.join(good)}" if good else "not met"


@dataclass
class Sheet:
    """A table of figures. The first column is text, the others are numbers as text."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


@dataclass
class Found:
    """What one section found."""

    verdicts: list[Verdict] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    courses: dict[str, list[Course]] = field(
        default_factory=dict
    )  # by a name of the section's own, for JSON and plots
    lines: dict[str, Any] = field(default_factory=dict)  # further numbers for JSON and plots
    unmeasured: list[str] = field(default_factory=list)  # further figures that could not be taken

    def add(self, other: Found) -> None:
        self.verdicts += other.verdicts
        self.sheets += other.sheets
        self.courses |= other.courses
        self.lines |= other.lines
        self.unmeasured += other.unmeasured

    @property
    def void(self) -> list[str]:
        """Every figure that could not be taken."""
        return (
            [f"goal {one.goal}, {one.what}: {one.void}" for one in self.verdicts if one.void]
            + [
                f"{course.name}, {course.connections} connections: {course.void}"
                for courses in self.courses.values()
                for course in courses
                if course.void
            ]
            + self.unmeasured
        )


Measured = Callable[[], Mapping[str, Sequence[float]]]


def verdict(
    goal: int,
    what: str,
    where: str,
    needed: str,
    measured: Measured,
    fits: Callable[[float], bool],
    unit: str = "%",
) -> Verdict:
    """measured gives the values of each round by label; met where the median fits; a void figure, a void verdict."""
    try:
        parts = []
        for label, values in measured().items():
            if not values:
                raise Void(f"{what}: nothing to compare")
            middle = statistics.median(values)
            parts.append(Part(label, middle, min(values), max(values), unit, fits(middle)))
        return Verdict(goal, what, where, needed, tuple(parts))
    except Void as void:
        return Verdict(goal, what, where, needed, (), str(void))


def at_least(goal: int, what: str, where: str, need: float, measured: Measured, unit: str = "%") -> Verdict:
    return verdict(goal, what, where, f"≥ {need:g}{_of(unit)}", measured, lambda value: value >= need, unit)


def at_most(goal: int, what: str, where: str, need: float, measured: Measured, unit: str = "%") -> Verdict:
    return verdict(goal, what, where, f"≤ {need:g}{_of(unit)}", measured, lambda value: value <= need, unit)


def _of(unit: str) -> str:
    return f" {unit}" if unit else ""


def percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median (least–most)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def course_sheet(title: str, courses: Sequence[Course], limit: Course | None, plain: Course | None) -> Sheet:
    """CPU first, then answers per second, each against R1 (limit) and R2 (plain)."""
    roles = [
        role for role in ("api", "redis", "worker", "postgres") if any(_has(one, role) for one in courses)
    ]
    sheet = Sheet(
        title,
        ["what", *(f"{'API' if role == 'api' else role.capitalize()} µs" for role in roles), "of R1 by CPU",
         "per second", "of R1", "of R2", "commands", "batch", "p50 ms", "p99 ms", "generator", "others"],
    )  # fmt: skip
    for course in courses:
        if course.void is not None or not course.rounds:
            sheet.rows.append([course.name, f"void: {course.void or 'not measured'}"])
            continue
        redis = _has(course, "redis")
        against = _against(course, limit, plain)
        sheet.rows.append([
            course.name,
            *(spread(course.values(role), 1) if _has(course, role) else "" for role in roles),
            against[0],
            spread(course.values("per_s")),
            *against[1:],
            f"{course.median('commands'):.3f}" if redis else "",
            f"{course.median('batch'):.0f}" if redis and course.median("commands") > 0 and _batched(course) else "",
            f"{course.median('p50_ms'):.1f}",
            f"{course.median('p99_ms'):.1f}",
            f"{max(course.values('generator_share')):.0%}",
            f"{max(course.values('others_share')):.0%}",
        ])  # fmt: skip
    return sheet


def _has(course: Course, role: str) -> bool:
    return bool(course.rounds) and role in course.rounds[0].cpu_us


def _batched(course: Course) -> bool:
    """Polls make no script call to speak of: answers for one would be a senseless number."""
    return 0 < course.median("batch") < 2_000


def _against(course: Course, limit: Course | None, plain: Course | None) -> list[str]:
    """By CPU of R1, per second of R1 and of R2; empty where there is nothing to hold it against."""

    def share(against: Course | None, what: str, inverse: bool) -> str:
        try:
            found = ratios(course, against, what, inverse=inverse) if against is not None else []
        except Void:
            return ""
        return f"{statistics.median(found):.0%}" if found else ""

    return [share(limit, "api", True), share(limit, "per_s", False), share(plain, "per_s", False)]
