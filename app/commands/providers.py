"""`fairdrop providers`: suppliers, their breakers, and who serves which channel."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from app.commands.asking import DryRun, Json, Key, Office, Reason, quoted, show, table
from app.commands.installation import DataDir

commands = typer.Typer()


@commands.command()
def providers(
    name: Annotated[
        str | None,
        typer.Argument(help="The supplier whose breaker is overridden, or whose history is shown."),
    ] = None,
    breaker: Annotated[
        Literal["auto", "forced_open", "disabled", "metrics_only"] | None,
        typer.Option("--breaker", help="auto: by its own measure; the others override it."),
    ] = None,
    routes: Annotated[
        bool, typer.Option("--routes", help="Show who serves which channel, and who else.")
    ] = False,
    route: Annotated[
        str | None, typer.Option("--route", help="A payment channel, or `sms`: set its route, with --to.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Suppliers in order with their weights, `stripe=3,sandbox=1,alipay=0` (0: a backup), or `settings`.",
        ),
    ] = None,
    history: Annotated[
        bool,
        typer.Option("--history", help="The transitions: of NAME all that are kept, else the last of each."),
    ] = False,
    reason: Reason = None,
    idempotency_key: Key = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Suppliers and their breakers; with NAME and --breaker, override one; --history: what happened to them; --routes
    and --route: who serves what."""
    if history and breaker is not None:
        raise typer.BadParameter("--history and --breaker do not go together")
    if not history and (name is None) != (breaker is None):
        raise typer.BadParameter("a name goes with --breaker or --history")
    if (route is None) != (to is None):
        raise typer.BadParameter("--route and --to go together")
    if routes or route is not None:
        _routes(Office(data_dir), route, to, reason, idempotency_key, dry_run, as_json)
        return
    office = Office(data_dir)
    if history:
        transitions(office, name, as_json)
        return
    if name is not None:
        rows = [
            office.post(
                f"/v1/admin/providers/{quoted(name)}/breaker",
                {"mode": breaker},
                idempotency_key=idempotency_key,
                reason=reason,
                dry_run=dry_run,
            )
        ]
        answer: Any = rows[0]
    else:
        answer = office.ask("GET", "/v1/admin/providers")
        rows = answer["data"]
    columns = ("name", "kind", "mode", "state", "calls", "failures", "slow", "last_error")
    show(
        answer,
        as_json,
        lambda: table(
            "",
            columns,
            [[row.get(column) for column in columns] for row in rows],
            bad=[row.get("state") in ("open", "forced_open") for row in rows],
        ),
    )


def _routes(
    office: Office,
    route: str | None,
    to: str | None,
    reason: str | None,
    idempotency_key: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    path = "/v1/admin/providers/routes"
    answer: Any
    if route is None:
        answer = office.ask("GET", path)
        rows = answer["data"]
    else:
        body: dict[str, Any] = {"kind": "sms" if route == "sms" else "payment", "suppliers": None}
        if route != "sms":
            body["channel"] = route
        if to != "settings":
            body["suppliers"] = [_share(part) for part in (to or "").split(",")]
        answer = office.post(path, body, idempotency_key=idempotency_key, reason=reason, dry_run=dry_run)
        rows = [answer]
    show(
        answer,
        as_json,
        lambda: table(
            "",
            ("route", "suppliers", "set by"),
            [
                (
                    row["channel"] or row["kind"],
                    ", ".join(f"{one['name']}={one['weight']}" for one in row["suppliers"]),
                    row["set_by"],
                )
                for row in rows
            ],
        ),
    )


def transitions(office: Office, name: str | None, as_json: bool) -> None:
    """What happened to one supplier's breaker, or to all of them, newest first."""
    if name is not None:
        told = [{"name": name, **one} for one in office.all_of(f"/v1/admin/providers/{quoted(name)}/history")]
    else:
        answer = office.ask("GET", "/v1/admin/providers")
        told = [{"name": row["name"], **one} for row in answer["data"] for one in row["history"]]
        told.sort(key=lambda one: int(one["at_ms"]), reverse=True)
    columns = (
        "at",
        "name",
        "before",
        "after",
        "why",
        "calls",
        "failures",
        "slow",
        "last_error",
        "open_for_ms",
        "by",
    )
    show(
        {"data": told},
        as_json,
        lambda: table(
            "",
            columns,
            [[one.get(column) for column in columns] for one in told],
            bad=[one["after"] in ("open", "forced_open") for one in told],
        ),
    )


def _share(text: str) -> dict[str, Any]:
    name, _, weight = text.strip().partition("=")
    if not name or not weight.isascii() or not weight.isdigit():
        raise typer.BadParameter(f"{text!r} is not like stripe=3", param_hint="--to")
    return {"name": name, "weight": int(weight)}
