"""Plots as SVG, written by hand: four pictures are not worth a plotting library in every checkout."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from loadtest.bench.results import Found
from loadtest.bench.rounds import Course

COLOURS = ("#31688e", "#35b779", "#e08214", "#8c510a", "#762a83", "#b2182b", "#666666", "#01665e")
WIDTH, LEFT, RIGHT, TOP = 860, 300, 70, 56
ROW = 20
ROLES = ("api", "redis", "worker", "postgres")


def bars(title: str, unit: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Horizontal bars, stacked by part; each row's total stands at its end."""
    parts = list(dict.fromkeys(part for _, values in rows for part in values))
    most = max((sum(values.values()) for _, values in rows), default=1.0) or 1.0
    height = TOP + ROW * len(rows) + 20
    scale = (WIDTH - LEFT - RIGHT) / most
    out = _begin(title, height) + _legend(parts if len(parts) > 1 else [])
    for number, (label, values) in enumerate(rows):
        y, x = TOP + ROW * number, float(LEFT)
        out.append(_text(LEFT - 8, y + 13, label, "end"))
        for part in parts:
            size = values.get(part, 0.0) * scale
            if size > 0:
                colour = COLOURS[parts.index(part) % len(COLOURS)]
                out.append(
                    f'<rect x="{x:.1f}" y="{y + 2}" width="{size:.1f}" height="{ROW - 5}" fill="{colour}"/>'
                )
                x += size
        total = sum(values.values())
        out.append(_text(x + 5, y + 13, f"{total:,.0f} {unit}" if total >= 100 else f"{total:,.1f} {unit}"))
    return "\n".join([*out, "</svg>\n"])


def lines(
    title: str, unit: str, ticks: Sequence[str], series: Mapping[str, Sequence[float]], *, log: bool = False
) -> str:
    """One line for each series over equally spaced ticks; log: a logarithmic scale upwards."""
    height, bottom = 340, 300
    values = [value for one in series.values() for value in one if value > 0]
    most, least = max(values, default=1.0), min(values, default=1.0)
    low = math.log10(least / 1.5) if log else 0.0
    high = math.log10(most * 1.2) if log else most * 1.15

    def y_of(value: float) -> float:
        at = math.log10(max(value, least / 1.5)) if log else value
        return bottom - (at - low) / ((high - low) or 1.0) * (bottom - TOP)

    step = (WIDTH - 90 - RIGHT) / max(1, len(ticks) - 1)
    out = _begin(title, height) + _legend(list(series))
    out.append(f'<path d="M80 {TOP} V{bottom} H{WIDTH - RIGHT}" fill="none" stroke="#999"/>')
    for value in sorted({least, (least * most) ** 0.5 if log else most / 2, most}):
        out.append(_text(74, y_of(value) + 4, f"{value:,.1f} {unit}", "end"))
        out.append(f'<path d="M80 {y_of(value):.1f} H{WIDTH - RIGHT}" stroke="#ddd"/>')
    for number, tick in enumerate(ticks):
        out.append(_text(90 + number * step, bottom + 18, tick, "middle"))
    for number, (_, ys) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(90 + at * step, y_of(value)) for at, value in enumerate(ys)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return "\n".join([*out, "</svg>\n"])


def _begin(title: str, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="12" y="20" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]


def _legend(names: Sequence[str]) -> list[str]:
    out, x = [], 12
    for number, name in enumerate(names):
        out.append(f'<rect x="{x}" y="32" width="10" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>')
        out.append(_text(x + 14, 41, name))
        x += 30 + 7 * len(name)
    return out


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="#222">{escape(text)}</text>'


def write(found: Found, folder: Path) -> list[Path]:
    """Every picture that the figures allow; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, str] = {}
    doors = {
        where: courses for where, courses in found.courses.items() if any(c.subject == "r1" for c in courses)
    }
    rows = [
        (f"{_short(where)}: {course.subject}", course)
        for where, found_ in doors.items()
        for course in _good(found_)
    ]
    if rows:
        pictures["throughput"] = bars(
            "Answers per second (median)",
            "/s",
            [(label, {"": course.median("per_s")}) for label, course in rows],
        )
        pictures["cpu-by-stage"] = bars(
            "CPU for one answer, by process (median)", "µs", [(label, _stages(course)) for label, course in rows]
            + [(f"whole system, {course.connections} connections", _stages(course))
               for course in _good(found.courses.get("system", []))],
        )  # fmt: skip
    latency = found.lines.get("latency")
    if latency and latency["ms"]:
        ticks = [f"p{100 * q:g}" for q in latency["quantiles"]]
        pictures["latency"] = lines(
            "Latency at 70 % of capacity, open loop", "ms", ticks, latency["ms"], log=True
        )
    growth = {name: _good(found.courses.get(f"growth, {name}", [])) for name in ("join", "poll")}
    if all(len(courses) > 1 for courses in growth.values()):
        ticks = [course.name.split(", ")[1] for course in growth["join"]]
        series = {f"{name}: API": [c.median("api") for c in courses] for name, courses in growth.items()}
        series["join: Redis"] = [course.median("redis") for course in growth["join"]]
        pictures["growth"] = lines("CPU for one answer, ever more waiting", "µs", ticks, series)
    paths = []
    for name, picture in pictures.items():
        path = folder / f"{name}.svg"
        path.write_text(picture, encoding="utf-8")
        paths.append(path)
    return paths


def _good(courses: Sequence[Course]) -> list[Course]:
    return [course for course in courses if course.void is None and course.rounds]


def _stages(course: Course) -> dict[str, float]:
    first = course.rounds[0].cpu_us
    return {role: statistics.median(course.values(role)) for role in ROLES if role in first}


def _short(where: str) -> str:
    return where.replace(" front process", "").replace(" connections", "").replace(", 1,", "")
