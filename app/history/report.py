"""A verdict over a history, in lines for a person or as a document for a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.history.judge import Verdict
from app.history.story import story
from app.record import Line

STORY_MAX = 60  # lines; what comes between is left out


def report(verdict: Verdict, lines: Sequence[Line]) -> list[str]:
    """The verdict as lines for a person."""
    said = [f"{verdict.ops:,} operations, {len(lines):,} lines"]
    for result in verdict.results:
        word = "ok    " if result.ok else "BROKEN"
        looked = f"{result.looked_at:,} looked at" if result.looked_at else "nothing to look at"
        said.append(
            f"{word} {result.name:<11} {looked}" + ("" if result.ok else f", {result.count:,} broken")
        )
        said += [f"         {finding.what}" for finding in result.findings[:3]]
    first = verdict.first()
    if first is not None:
        name, finding = first
        said += ["", f"{name}: {finding.what}"]
        told = list(story(lines, finding))
        if len(told) > STORY_MAX:
            cut = len(told) - STORY_MAX
            told = [*told[: STORY_MAX // 2], f"  ... {cut} lines ...", *told[-STORY_MAX // 2 :]]
        said += told
    said.append("every promise was kept" if verdict.ok else "A PROMISE WAS BROKEN")
    return said


def shown(verdict: Verdict, lines: Sequence[Line]) -> dict[str, Any]:
    """The verdict as `--json` prints it."""
    first = verdict.first()
    return {
        "ok": verdict.ok,
        "operations": verdict.ops,
        "checks": [
            {
                "name": result.name,
                "ok": result.ok,
                "looked_at": result.looked_at,
                "broken": result.count,
                "findings": [finding._asdict() for finding in result.findings],
            }
            for result in verdict.results
        ],
        "story": list(story(lines, first[1])) if first else [],
    }
