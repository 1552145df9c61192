"""`fairdrop bills` shows suppliers' bills beside our books; `fairdrop reconcile-bill DATE` reads a day at once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.commands.asking import Json, Office, show, table
from app.commands.installation import DataDir, log_as, settings_of, with_sandbox
from app.errors import CannotStart

commands = typer.Typer()


@commands.command()
def bills(
    provider: Annotated[str | None, typer.Option("--provider", help="Only this payment supplier.")] = None,
    differing: Annotated[
        bool, typer.Option("--differing", help="Only days that differ, or cannot be read.")
    ] = False,
    days: Annotated[int, typer.Option("--days", min=1, max=1_000, help="So many bills, the newest.")] = 30,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Suppliers' daily bills beside our books, newest first, and what differs. Exit status 1: something does.

    `fairdrop reconcile-bill DATE` reads a day at once."""
    asked = {"provider": provider, "differing": differing, "limit": days}
    answer = Office(data_dir).ask("GET", "/v1/admin/bills", params=asked)
    columns = ("day", "provider", "state", "lines", "read_at", "differing", "code")
    shown = (
        "day",
        "provider",
        "what",
        "kind",
        "ref",
        "our_id",
        "order_no",
        "ours_minor",
        "theirs_minor",
        "currency",
    )
    rows = answer["data"]
    found = [{**row, **one} for row in rows for one in row["differences"]]

    def tables() -> None:
        table(
            "",
            columns,
            [[row[name] for name in columns] for row in rows],
            bad=[row["differing"] > 0 for row in rows],
        )
        if found:
            table("what differs", shown, [[one[name] for name in shown] for one in found])

    show(answer, as_json, tables)
    raise typer.Exit(1 if any(row["differing"] for row in rows) else 0)


@commands.command("reconcile-bill")
def reconcile_bill(
    day: Annotated[str, typer.Argument(metavar="DATE", help="UTC day, for example 2026-11-11.")],
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="Only this supplier; may be repeated.")
    ] = None,
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Read the payment suppliers' bills of a day now and compare them with our captures and refunds, both ways.

    It talks to the suppliers and to Postgres with the settings of a worker; the worker does the same by itself every
    day. It may be run again at any time. Exit status 1: something differs, or a bill could not be read.
    """
    import asyncio
    import json
    from datetime import UTC, date, datetime

    from app.ledger.engine import create_engine
    from app.providers.registry import open_providers
    from app.repair import bills

    try:
        wanted = date.fromisoformat(day)
    except ValueError:
        raise typer.BadParameter("a day is written like 2026-11-11") from None
    if wanted > datetime.now(UTC).date():
        raise typer.BadParameter("this day has not begun")
    settings = with_sandbox(settings_of(data_dir=data_dir))
    log_as(settings, "reconcile-bill")

    async def run() -> list[dict[str, Any]]:
        providers = open_providers(settings)
        engine = create_engine(settings, name="reconcile-bill")
        try:
            names = provider or list(providers.payment)
            for name in names:
                if name not in providers.payment:
                    raise CannotStart(
                        f"there is no payment supplier {name!r} in use; there are: {', '.join(providers.payment)}"
                    )
            return await bills.read_now(engine, providers, settings, wanted, names)
        finally:
            await engine.dispose()
            await providers.aclose()

    reports = asyncio.run(run())
    if as_json:
        print(json.dumps({"day": day, "bills": reports}, default=str, ensure_ascii=False, indent=2))
    for row in () if as_json else reports:
        said = (
            f"{row['lines']} lines"
            if row["state"] == "read"
            else f"not read: {row['code'] or 'a worker has it'}"
        )
        print(f"{row['provider']} {day}: {said}, {len(row['differences'])} differences")
        for one in row["differences"]:
            amounts = f"ours {one['ours_minor']}, theirs {one['theirs_minor']} {one['currency']} minor"
            print(
                f"  {one['what']} {one['kind']}: {one['ref']} ({one['our_id']}), order {one['order_no']}: {amounts}"
            )
    raise typer.Exit(1 if any(row["differences"] or row["state"] != "read" for row in reports) else 0)
