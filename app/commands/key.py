"""`fairdrop key …`: make, list and revoke operators' keys."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from app.commands.asking import Json, Key, Office, Reason, quoted, show, table
from app.commands.installation import DataDir

commands = typer.Typer()
key = typer.Typer(help="Make, list and revoke operators' keys (admin).", no_args_is_help=True)
commands.add_typer(key, name="key")


@key.command("create")
def key_create(
    name: Annotated[str, typer.Argument(help="Who will hold it.")],
    role: Annotated[Literal["viewer", "operator", "admin"], typer.Option("--role")] = "viewer",
    reason: Reason = None,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Make a key. It is shown this once."""
    made = Office(data_dir).post(
        "/v1/admin/keys", {"name": name, "role": role}, idempotency_key=idempotency_key, reason=reason
    )
    show(
        made,
        as_json,
        lambda: table("", ("id", "name", "role", "key"), [[made[c] for c in ("id", "name", "role", "key")]]),
    )


@key.command("list")
def key_list(as_json: Json = False, data_dir: DataDir = None) -> None:
    """Keys that work; never the keys themselves."""
    rows = Office(data_dir).all_of("/v1/admin/keys")
    columns = ("id", "name", "role", "created_at")
    show(
        {"data": rows}, as_json, lambda: table("", columns, [[row[name] for name in columns] for row in rows])
    )


@key.command("revoke")
def key_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id (`fairdrop key list`).")],
    reason: Reason = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """End a key, at once."""
    Office(data_dir).ask("DELETE", f"/v1/admin/keys/{quoted(key_id)}", params={"reason": reason})
    show({"id": key_id, "revoked": True}, as_json, lambda: table("", ("id", "revoked"), [(key_id, "yes")]))
