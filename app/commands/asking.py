"""What the commands that talk to a running office share: its client, their options, how an answer is shown.

The office is FAIRDROP_OFFICE_URL with FAIRDROP_OPERATOR_KEY, else what a running `up` wrote into urls.json. Exit
status: 0 fine, 1 the office refused or the checked thing failed, 2 bad usage, no office, no key. `--json` prints the
office's own answer and nothing else.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from app.commands.installation import settings_of
from app.errors import CannotStart

ASK_WITHIN_S = 30.0  # an audit of a large sale reads every order
PAGE = 500  # rows asked for at once

Json = Annotated[bool, typer.Option("--json", help="Print the office's answer as JSON, and nothing else.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why; kept in the journal.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and change nothing.")]
Key = Annotated[
    str | None,
    typer.Option("--idempotency-key", help="Repeat a command safely; the same key has one effect."),
]
SaleArgument = Annotated[str, typer.Argument(metavar="SALE", help="The sale's id.")]


class Office:
    """A client of the office."""

    def __init__(self, data_dir: Path | None) -> None:
        import httpx

        url, operator_key = _where(data_dir)
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {operator_key}"},
            timeout=ASK_WITHIN_S,
            trust_env=False,
        )
        self._unreachable: tuple[type[Exception], ...] = (httpx.HTTPError, httpx.InvalidURL)
        self.url = url

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """One call: the answer's JSON. Refused: exit 1, or 2 if it is the key. CannotStart: nobody answers."""
        status, answer, _ = self.look(method, path, body, params=params, headers=headers)
        if status >= 400:
            refused(status, answer)
        return answer

    def look(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, str | None]:
        """One call, whatever the answer: status, JSON, ETag."""
        given = {name: value for name, value in (params or {}).items() if value not in (None, False)}
        try:
            answer = self._http.request(method, path, json=body, params=given, headers=dict(headers or {}))
        except self._unreachable as error:
            raise CannotStart(f"no office answers at {self.url}: {error or type(error).__name__}") from error
        try:
            found = answer.json() if answer.content else None
        except ValueError:
            raise CannotStart(
                f"{self.url} is no office: it answers {answer.status_code} without JSON"
            ) from None
        return answer.status_code, found, answer.headers.get("etag")

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        reason: str | None = None,
        dry_run: bool = False,
    ) -> Any:
        """A change, under a key of its own unless one is given."""
        headers = {"Idempotency-Key": idempotency_key or f"cli-{secrets.token_hex(12)}"}
        params = {"reason": reason, "dry_run": "true" if dry_run else None}
        return self.ask("POST", path, body, params=params, headers=headers)

    def all_of(self, path: str, **params: Any) -> list[dict[str, Any]]:
        """Every row of a list."""
        rows: list[dict[str, Any]] = []
        cursor = None
        while True:
            page = self.ask("GET", path, params={**params, "limit": PAGE, "cursor": cursor})
            rows += page["data"]
            cursor = page["next_cursor"]
            if cursor is None:
                return rows


def _where(data_dir: Path | None) -> tuple[str, str]:
    """The office's address and a key for it. CannotStart: one of them is missing."""
    from app.data_dir import read_urls

    settings = settings_of(data_dir=data_dir)
    url, operator_key = settings.office_url, settings.operator_key.get_secret_value()
    if url and operator_key:
        return url, operator_key
    if url and not (settings.data_dir / "urls.json").is_file():
        raise CannotStart("FAIRDROP_OPERATOR_KEY is missing: the office wants a key")
    urls = read_urls(settings.data_dir)
    return url or str(urls["office"]), operator_key or str(urls["operator_key"])


def refused(status: int, problem: Any) -> None:
    """Say what the office refused, and end."""
    problem = problem if isinstance(problem, dict) else {}
    told = f"{problem.get('code', status)}: {problem.get('detail') or problem.get('title') or 'refused'}"
    sys.stderr.write(f"fairdrop: {told}\n")
    for error in problem.get("errors", ()):
        sys.stderr.write(f"  {error.get('path')}: {error.get('code')}\n")
    raise typer.Exit(2 if status in (401, 403) else 1)


def show(answer: Any, as_json: bool, draw: Callable[[], None]) -> None:
    """The answer for a program, or for a person."""
    if as_json:
        sys.stdout.write(json.dumps(answer, ensure_ascii=False, indent=2) + "\n")
    else:
        draw()


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, bad: Sequence[bool] = ()
) -> None:
    """Rows for a person; `bad` rows stand out."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", header_style="bold")
    for name in columns:
        drawn.add_column(name, overflow="fold")
    for at, row in enumerate(rows):
        style = "bold red" if at < len(bad) and bad[at] else None
        drawn.add_row(*(Text("" if cell is None else str(cell)) for cell in row), style=style)
    Console(width=None if sys.stdout.isatty() else 160).print(drawn)


def quoted(part: str) -> str:
    """As one part of a path."""
    return quote(part, safe="")
