"""`fairdrop audit SALE`: do stock, orders and money agree?"""

from __future__ import annotations

import typer

from app.commands.asking import Json, Office, SaleArgument, quoted, show, table
from app.commands.installation import DataDir

commands = typer.Typer()


@commands.command()
def audit(sale_id: SaleArgument, as_json: Json = False, data_dir: DataDir = None) -> None:
    """Compare stock, orders and money; exit status 1 if they do not agree."""
    answer = Office(data_dir).ask("GET", f"/v1/admin/sales/{quoted(sale_id)}/audit")
    checks = answer["checks"]
    show(
        answer,
        as_json,
        lambda: table(
            f"Audit of {sale_id}: {'all agree' if answer['ok'] else 'DOES NOT HOLD'}",
            ("check", "ok", "left", "right"),
            [(c["name"], "yes" if c["ok"] else "NO", c["left"], c["right"]) for c in checks],
            bad=[not c["ok"] for c in checks],
        ),
    )
    if not answer["ok"]:
        raise typer.Exit(1)
