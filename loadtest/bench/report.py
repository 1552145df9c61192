"""The report: on the terminal, as JSON, and between the marks of BENCHMARKS.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.bench.results import Found, Sheet, Verdict

MARKS = ("<!-- bench: begin -->", "<!-- bench: end -->")
CALM = 0.1  # share of a core that others may use before the report says that the machine was not at rest


def goals_sheet(verdicts: Sequence[Verdict]) -> Sheet:
    """Every goal: measured, needed, met or not."""
    sheet = Sheet("Goals", ["goal", "what", "where", "measured", "needed", "outcome"])
    for one in sorted(verdicts, key=lambda verdict: verdict.goal):
        measured = "; ".join(f"{part.label} {part}".strip() for part in one.parts) or "–"
        sheet.rows.append([str(one.goal), one.what, one.where, measured, one.needed, one.outcome])
    return sheet


def others_share(found: Found) -> float:
    """The most that processes outside the benchmark used in the median round of any figure, in shares of a core."""
    shares = [
        course.median("others_share")
        for courses in found.courses.values()
        for course in courses
        if course.rounds and course.void is None
    ]
    return max(shares, default=0.0)


def rest(found: Found) -> str:
    share = others_share(found)
    calm = "nothing else to speak of ran" if share <= CALM else "THE MACHINE WAS NOT AT REST"
    return f"Processes outside the benchmark used at most {share:.0%} of a core in the median round: {calm}."


def on_terminal(console: Console, found: Found, facts: Mapping[str, str]) -> None:
    for sheet in (*found.sheets, *([goals_sheet(found.verdicts)] if found.verdicts else [])):
        table = Table(
            title=sheet.title, caption=sheet.note or None, title_justify="left", caption_justify="left"
        )
        for number, column in enumerate(sheet.columns):
            text = number == 0 or sheet.title == "Goals"
            table.add_column(column, justify="left" if text else "right", no_wrap=number == 0)
        for row in sheet.rows:
            styled = list(row)
            if sheet.title == "Goals":
                styled[-1] = f"[{_colour(row[-1])}]{row[-1]}[/]"
            table.add_row(*styled)
        console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), style="dim")
    if found.courses:
        console.print(rest(found))


def _colour(outcome: str) -> str:
    return "green" if outcome == "met" else "yellow" if outcome.startswith("only") else "red"


def as_json(found: Found, facts: Mapping[str, str], command: str) -> dict[str, Any]:
    """Everything, with every round."""
    return {
        "command": command,
        "machine": dict(facts),
        "goals": [asdict(one) | {"outcome": one.outcome} for one in found.verdicts],
        "courses": {
            where: [
                {
                    "subject": course.subject, "name": course.name, "connections": course.connections,
                    "void": course.void, "voided": course.voided,
                    "rounds": [asdict(one) | {"per_s": one.per_s} for one in course.rounds],
                }
                for course in courses
            ]
            for where, courses in found.courses.items()
        },
        "further": found.lines,
        "void": found.void,
        "others_share": others_share(found),
    }  # fmt: skip


def as_markdown(
    found: Found, facts: Mapping[str, str], command: str, pinning: str, plots: Sequence[Path], beside: Path
) -> str:
    """What stands between the marks. plots: images, linked relative to the folder `beside`."""
    lines = [
        f"Machine: {', '.join(f'{name} {value}' for name, value in facts.items())}.",
        "",
        f"Command: `{command}`. Median (least–most) of the rounds. {pinning}. {rest(found)}",
        "",
    ]
    for sheet in ([goals_sheet(found.verdicts)] if found.verdicts else []) + found.sheets:
        lines += [
            f"**{sheet.title}**",
            "",
            f"| {' | '.join(sheet.columns)} |",
            "|---" * len(sheet.columns) + "|",
        ]
        for row in sheet.rows:
            cells = [cell.replace("|", "\\|") for cell in row] + [""] * (len(sheet.columns) - len(row))
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *([sheet.note, ""] if sheet.note else [])]
        if sheet.title == "Goals":
            for plot in plots:
                lines += [
                    f"![{plot.stem.replace('-', ' ')}]({plot.resolve().relative_to(beside.resolve())})",
                    "",
                ]
    return "\n".join(lines).rstrip() + "\n"


def write(path: Path, text: str) -> None:
    """Put the text between the marks of this file. ValueError: it has none."""
    whole = path.read_text(encoding="utf-8")
    if whole.count(MARKS[0]) != 1 or whole.count(MARKS[1]) != 1:
        raise ValueError(f"{path} has no marks {MARKS[0]} … {MARKS[1]}")
    before, after = whole.partition(MARKS[0])[0], whole.partition(MARKS[1])[2]
    path.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{after}", encoding="utf-8")
