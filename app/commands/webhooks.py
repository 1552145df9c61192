"""`fairdrop webhooks …`: the shop's endpoints, to which events are pushed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from app.commands.asking import DryRun, Json, Key, Office, Reason, quoted, show, table
from app.commands.installation import DataDir

commands = typer.Typer()
webhooks = typer.Typer(
    help="Make, list, rotate, replay, enable and delete the shop's endpoints (admin).", no_args_is_help=True
)
commands.add_typer(webhooks, name="webhooks")

EndpointArgument = Annotated[
    str, typer.Argument(metavar="ID", help="The endpoint's id (`fairdrop webhooks list`).")
]


def _show_endpoint(found: Mapping[str, Any], as_json: bool) -> None:
    columns = ("id", "url", "events", "secret_before_until", "disabled_at", "secret")
    rows = [(name, found[name]) for name in columns if found.get(name) is not None]
    show(dict(found), as_json, lambda: table("", ("field", "value"), rows))


@webhooks.command("create")
def webhooks_create(
    url: Annotated[str, typer.Argument(metavar="URL", help="https; http only to this machine.")],
    events: Annotated[list[str], typer.Option("--event", help="Event type to push; may be repeated.")],
    reason: Reason = None,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Push events to an address. Its secret is shown this once."""
    made = Office(data_dir).post(
        "/v1/admin/webhooks", {"url": url, "events": events}, idempotency_key=idempotency_key, reason=reason
    )
    _show_endpoint(made, as_json)


@webhooks.command("list")
def webhooks_list(as_json: Json = False, data_dir: DataDir = None) -> None:
    """Endpoints; never their secrets."""
    rows = Office(data_dir).all_of("/v1/admin/webhooks")
    columns = ("id", "url", "events", "created_at", "disabled_at", "disabled_why")
    show(
        {"data": rows},
        as_json,
        lambda: table(
            "",
            columns,
            [[row[name] if name != "events" else ", ".join(row[name]) for name in columns] for row in rows],
            bad=[row["disabled_at"] is not None for row in rows],
        ),
    )


@webhooks.command("rotate")
def webhooks_rotate(
    endpoint_id: EndpointArgument,
    overlap_s: Annotated[
        int | None, typer.Option(min=0, help="s in which the old secret signs too. [default: a day]")
    ] = None,
    reason: Reason = None,
    dry_run: DryRun = False,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Sign with a new secret; it is shown this once."""
    found = Office(data_dir).post(
        f"/v1/admin/webhooks/{quoted(endpoint_id)}/rotate",
        {} if overlap_s is None else {"overlap_s": overlap_s},
        idempotency_key=idempotency_key,
        reason=reason,
        dry_run=dry_run,
    )
    _show_endpoint(found, as_json)


@webhooks.command("replay")
def webhooks_replay(
    endpoint_id: EndpointArgument,
    after: Annotated[
        str, typer.Option("--after", help="A time with its offset (from then on), or a cursor of the feed.")
    ],
    until: Annotated[str | None, typer.Option("--until", help="A time with its offset (before it).")] = None,
    reason: Reason = None,
    dry_run: DryRun = False,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Push events of the past again, whatever became of them."""
    found = Office(data_dir).post(
        f"/v1/admin/webhooks/{quoted(endpoint_id)}/replay",
        {"after": after, "until": until},
        idempotency_key=idempotency_key,
        reason=reason,
        dry_run=dry_run,
    )
    show(found, as_json, lambda: table("", ("id", "replayed"), [(found["id"], found["replayed"])]))


@webhooks.command("enable")
def webhooks_enable(
    endpoint_id: EndpointArgument,
    reason: Reason = None,
    dry_run: DryRun = False,
    idempotency_key: Key = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Tell an endpoint again that answered 410 Gone; what it missed of the last 72 h is pushed."""
    found = Office(data_dir).post(
        f"/v1/admin/webhooks/{quoted(endpoint_id)}/enable",
        idempotency_key=idempotency_key,
        reason=reason,
        dry_run=dry_run,
    )
    show(found, as_json, lambda: table("", ("id", "due again"), [(found["id"], found["due"])]))


@webhooks.command("delete")
def webhooks_delete(
    endpoint_id: EndpointArgument, reason: Reason = None, as_json: Json = False, data_dir: DataDir = None
) -> None:
    """Tell an address no more."""
    Office(data_dir).ask("DELETE", f"/v1/admin/webhooks/{quoted(endpoint_id)}", params={"reason": reason})
    show(
        {"id": endpoint_id, "deleted": True},
        as_json,
        lambda: table("", ("id", "deleted"), [(endpoint_id, "yes")]),
    )
