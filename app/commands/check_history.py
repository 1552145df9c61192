"""`fairdrop check-history FILE`: judge a recorded history, and tell the story of the first broken promise.

Exit status: 0 every promise was kept, 1 one was broken, 2 the file is not a history.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from app.errors import CannotStart, DidNotHappen, Unknown

commands = typer.Typer()

REST_WITHIN_S = 60.0  # after the clients have gone


@commands.command("check-history")
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
    from app.history.judge import judge
    from app.history.report import report, shown
    from app.record import read

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


def _finish(file: Path, urls: Path, supplier: Path | None) -> None:
    """Append what the stores hold of the sale that the history is of. CannotStart: they do not answer."""
    import asyncio

    from app.data_dir import read_urls
    from app.history.final import finish
    from app.record import Recorder, Run, read

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
