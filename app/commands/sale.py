"""`fairdrop sale …`: draft, publish, pause, resume, close and list sales."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from app.commands.asking import (
    DryRun,
    Json,
    Key,
    Office,
    Reason,
    SaleArgument,
    quoted,
    refused,
    show,
    table,
)
from app.commands.installation import DataDir
from app.errors import CannotStart

commands = typer.Typer()
sale = typer.Typer(help="Draft, publish, pause, resume, close and list sales.", no_args_is_help=True)
commands.add_typer(sale, name="sale")


def show_sale(found: Mapping[str, Any], as_json: bool) -> None:
    def draw() -> None:
        facts = [
            (name, found[name])
            for name in (
                "id", "title", "state", "version", "line_opens_at", "opens_at", "closes_at", "rate_per_s",
                "limit_per_buyer", "standby", "pay_within_s", "message", "seed_hash",
            )
        ]  # fmt: skip
        table("", ("field", "value"), facts)
        table(
            "Items",
            ("sku", "title", "price", "units", "reserved", "sold"),
            [
                (
                    i["sku"],
                    i["title"],
                    f"{i['price_minor']} {i['currency']} minor",
                    i["units"],
                    i["reserved"],
                    i["sold"],
                )
                for i in found["items"]
            ],
        )

    show(dict(found), as_json, draw)


@sale.command("apply")
def sale_apply(
    file: Annotated[Path, typer.Argument(help="YAML or JSON; - reads standard input.")],
    publish: Annotated[bool, typer.Option("--publish", help="Publish the draft as well.")] = False,
    reason: Reason = None,
    dry_run: DryRun = False,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Make the sale of a document, or change it to what the document says."""
    from app.sale.document import read_yaml

    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        document = read_yaml(text)
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:
        raise CannotStart(f"{file}: {error}") from error
    sale_id = document.get("id")
    if not isinstance(sale_id, str) or not sale_id:
        raise CannotStart(f"{file}: `id` is missing")
    office = Office(data_dir)
    path = f"/v1/admin/sales/{quoted(sale_id)}"
    status, current, etag = office.look("GET", path)
    if status == 404 and current.get("code") == "no_such_sale":
        found = office.post(
            "/v1/admin/sales", document, idempotency_key=idempotency_key, reason=reason, dry_run=dry_run
        )
    elif status == 422 or status == 404:
        # Not even an id: let the office say what is wrong with the whole document.
        found = office.post("/v1/admin/sales", document, dry_run=dry_run)
    elif status >= 400:
        refused(status, current)
    else:
        change = {name: value for name, value in document.items() if name not in ("id", "copy_of")}
        found = office.ask(
            "PATCH",
            path,
            change,
            params={"reason": reason, "dry_run": "true" if dry_run else None},
            headers={"If-Match": etag or "*"},
        )
    if publish and not dry_run and found["state"] == "draft":
        found = office.post(f"{path}/publish", reason=reason)
    show_sale(found, as_json)


def _switch(action: str, does: str) -> None:
    """One command that turns a published sale."""

    @sale.command(action, help=does)
    def turn(
        sale_id: SaleArgument,
        reason: Reason = None,
        dry_run: DryRun = False,
        idempotency_key: Key = None,
        as_json: Json = False,
        data_dir: DataDir = None,
    ) -> None:
        found = Office(data_dir).post(
            f"/v1/admin/sales/{quoted(sale_id)}/{action}",
            idempotency_key=idempotency_key,
            reason=reason,
            dry_run=dry_run,
        )
        show_sale(found, as_json)


_switch("publish", "Put a draft on every front door, and commit to the seed of its draw.")
_switch("pause", "Stop admission; joining, payments, releases and deadlines go on.")
_switch("resume", "Go on after a pause.")
_switch("close", "Close for good: whoever waits is told so, whoever holds a unit may finish.")

SaleState = Literal["draft", "scheduled", "line_open", "open", "paused", "sold_out", "closed", "settled"]


@sale.command("list")
def sale_list(
    state: Annotated[SaleState | None, typer.Option("--state", help="Only these.")] = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """All sales, newest first."""
    rows = Office(data_dir).all_of("/v1/admin/sales", state=state)
    show(
        {"data": rows},
        as_json,
        lambda: table(
            "",
            ("id", "title", "state", "opens", "closes", "units", "reserved", "sold"),
            [
                (
                    s["id"],
                    s["title"],
                    s["state"],
                    s["opens_at"],
                    s["closes_at"],
                    *(sum(item[name] for item in s["items"]) for name in ("units", "reserved", "sold")),
                )
                for s in rows
            ],
        ),
    )
