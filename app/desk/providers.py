"""Suppliers: what their breakers say on each worker, and overriding them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Response
from pydantic import Field

from app import keys
from app.breaker import Mode
from app.desk.auth import Viewer
from app.desk.change import Answer, Body, Change, OperatorPosts
from app.desk.shapes import Out
from app.desk.wiring import Desk, TheDesk
from app.problems import JsonRoute, refusals, refuse

router = APIRouter(tags=["providers"], route_class=JsonRoute)
PROVIDERS = "/v1/admin/providers"


class ProviderOut(Out):
    name: str
    mode: Mode = Field(description="what operators want; workers follow within a second")
    state: str = Field(
        description="closed, open, half_open, forced_open, disabled, metrics_only; unknown: no worker runs"
    )


class ProvidersOut(Out):
    data: list[ProviderOut]


class ModeIn(Body):
    mode: Mode = Field(description="auto: by its own measure; the others override it")


async def breakers(desk: Desk) -> list[dict[str, Any]]:
    """Every supplier that is configured or was reported by a worker."""
    reports_flat, modes_flat = await desk.link.pipeline(
        [("HGETALL", keys.PROVIDERS), ("HGETALL", keys.PROVIDER_MODES)]
    )
    for reply in (reports_flat, modes_flat):
        if isinstance(reply, Exception):
            raise reply
    modes = {k.decode(): v.decode() for k, v in zip(modes_flat[::2], modes_flat[1::2], strict=True)}
    shown: dict[str, dict[str, Any]] = {
        name: {"name": name, "mode": modes.get(name, "auto"), "state": "unknown"}
        for name in (desk.settings.payment_provider, desk.settings.sms_provider)
    }
    for name_raw, raw in zip(reports_flat[::2], reports_flat[1::2], strict=True):
        name = name_raw.decode()
        try:
            report = msgspec.json.decode(raw, type=dict[str, Any])
        except (msgspec.DecodeError, ValueError):
            report = {}
        shown[name] = {
            **report,
            "name": name,
            "mode": modes.get(name, "auto"),
            "state": report.get("state", "unknown"),
        }
    return sorted(shown.values(), key=lambda one: str(one["name"]))


@router.get(
    PROVIDERS,
    response_model=ProvidersOut,
    responses=refusals("auth_missing", "invalid", "busy"),
    summary="Suppliers and their breakers",
)
async def list_providers(desk: TheDesk, operator: Viewer) -> dict[str, Any]:
    return {"data": await breakers(desk)}


@router.post(
    PROVIDERS + "/{name}/breaker",
    response_model=ProviderOut,
    responses=refusals(
        "malformed",
        "auth_missing",
        "forbidden",
        "no_such_provider",
        "key_reused",
        "too_large",
        "not_json",
        "invalid",
        "busy",
    ),
    summary="Override a supplier's breaker, on every worker",
)
async def override(
    name: Annotated[str, Path(pattern=r"^[a-z][a-z0-9_.:-]{0,63}$")], body: ModeIn, post: OperatorPosts
) -> Response:
    desk = post.desk

    async def effect(change: Change) -> Answer:
        known = {str(one["name"]): one for one in await breakers(desk)}
        if name not in known:
            raise refuse("no_such_provider")
        before = known[name]["mode"]
        if not change.dry_run:
            # Idempotent, and first: a journal entry without its effect would be worse than the other way round.
            await desk.link.call("HSET", keys.PROVIDER_MODES, name, body.mode)
        async with change.step():
            return await change.done(
                Answer(200, {**known[name], "mode": body.mode}),
                "provider.breaker",
                detail={"name": name, "mode": body.mode, "before": before},
            )

    return await post.once(effect, body)
