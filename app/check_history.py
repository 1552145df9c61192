"""`fairdrop check-history FILE`: judge a recorded history, and tell the story of the first broken promise.

Exit status: 0 every promise was kept, 1 one was broken, 2 the file is not a history.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from app.errors import CannotStart, DidNotHappen, Unknown
from app.history.judge import Verdict, judge, story
from app.record import Line, Recorder, Run, read

REST_WITHIN_S = 60.0  # after the clients have gone
STORY_MAX = 60  # lines; what comes between is left out


def _finish(file: Path, urls: Path, supplier: Path | None) -> None:
    """Append what the stores hold of the sale that the history is of. CannotStart: they do not answer."""
    from app.history.final import finish
    from app.supervisor import read_urls

    run = next((line for line in read(file) if isinstance(line, Run)), None)
    if run is None or not run.sale:
        raise CannotStart(f"{file} does not say which sale it is of")
    stores = read_urls(urls.parent)
    with Recorder(file, more=True) as record:
        try:
            asyncio.run(
                finish(
                    record,
                    run.sale,
                    redis_url=str(stores["redis"]),
                    database_url=str(stores["database"]),
                    supplier=supplier,
                    within_s=REST_WITHIN_S,
                )
            )
        except (DidNotHappen, Unknown, LookupError) as error:
            raise CannotStart(f"the stores do not show {run.sale}: {error}") from error


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


def check_history(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A history: JSON lines (docs/history.md).")],
    urls: Annotated[
        Path | None,
        typer.Option("--urls", help="urls.json of a running `up`: end the history from its stores first."),
    ] = None,
    supplier: Annotated[
        Path | None, typer.Option("--supplier", help="With --urls: what FAIRDROP_SANDBOX_LEDGER named.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, and nothing else.")
    ] = False,
) -> None:
    """Judge a recorded history: nothing oversold, nothing lost, nobody charged twice; exit 1 if one was."""
    try:
        if urls is not None:
            _finish(file, urls, supplier)
        lines = read(file)
    except OSError as error:
        raise CannotStart(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CannotStart(f"not a history: {error}") from error
    verdict = judge(lines)
    if as_json:
        print(json.dumps(shown(verdict, lines), ensure_ascii=False))
    else:
        print("\n".join(report(verdict, lines)))
    raise typer.Exit(0 if verdict.ok else 1)
