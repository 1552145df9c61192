"""`fairdrop trace ORDER_NO`: the story of one order."""

from __future__ import annotations

from typing import Annotated

import typer

from app.commands.asking import Json, Office, quoted, show, table
from app.commands.installation import DataDir

commands = typer.Typer()


@commands.command()
def trace(
    order_no: Annotated[str, typer.Argument(metavar="ORDER_NO", help="The order's number.")],
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """What happened to one order, oldest first: claim, confirm, pay, release, tell, and who at the desk did what."""
    answer = Office(data_dir).ask("GET", f"/v1/admin/orders/{quoted(order_no)}/trace")
    show(
        answer,
        as_json,
        lambda: table(
            f"{order_no}: {answer['state'] or 'refused'}; Redis tells its buyer: {answer['told'] or '?'}",
            ("at", "step", "what", "detail"),
            [
                (
                    one["at"],
                    one["step"],
                    one["what"],
                    ", ".join(f"{name} {value}" for name, value in one["detail"].items()),
                )
                for one in answer["data"]
            ],
        ),
    )
