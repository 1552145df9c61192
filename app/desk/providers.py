"""Suppliers: what their breakers say, each with its transitions, and overriding them.

Mode, state and counts of a shared breaker are read from Redis as they are now; places and the like are what the worker
that reported last sees. Transitions are read from the history that every process writes into (lua/breaker.lua).
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Response
from pydantic import Field

from app import keys
from app.answers import Gone, Stands
from app.breaker import Counts, Mode, State
from app.desk.auth import Viewer
from app.desk.change import Answer, Body, Change, OperatorPosts
from app.desk.shapes import (
    LIMIT_DEFAULT,
    Cursor,
    Limit,
    Out,
    Page,
    When,
    format_ms,
    listed,
    read_cursor,
)
from app.desk.wiring import Desk, TheDesk
from app.problems import JsonRoute, refusals, refuse
from app.providers.guard import rates
from app.providers.registry import guard_rules, supplier_kinds
from app.providers.shared_breaker import rules_text

router = APIRouter(tags=["providers"], route_class=JsonRoute)
PROVIDERS = "/v1/admin/providers"
HISTORY_SHOWN = 10  # transitions of each supplier in the list
ProviderPath = Annotated[str, Path(pattern=r"^[a-z][a-z0-9_.:-]{0,63}$")]


class TransitionOut(Out):
    at: When
    at_ms: int = Field(description="the same as Unix time, ms")
    before: str
    after: str = Field(
        description="the same as `before` in metrics_only: a rate was reached that would have opened it"
    )
    why: str = Field(
        description="failure_rate, slow_rate, interval_over, recovered, half_open_too_long, operator"
    )
    calls: int = Field(description="counted before it, with failures and slow")
    failures: int
    slow: int
    last_error: str | None
    open_for_ms: int = Field(description="of an opening: how long nothing passes; else 0")
    by: str | None = Field(
        None, description="the process whose call made it (alone: without Redis), or the operator"
    )


class ProviderOut(Out):
    name: str
    mode: Mode = Field(description="what operators want; workers follow within a second")
    state: str = Field(
        description="closed, open, half_open, forced_open, disabled, metrics_only; unknown: no worker runs"
    )
    history: list[TransitionOut] = Field([], description="the last transitions, oldest first")


class ProvidersOut(Out):
    data: list[ProviderOut]


class ModeIn(Body):
    mode: Mode = Field(description="auto: by its own measure; the others override it")


async def breakers(desk: Desk) -> list[dict[str, Any]]:
    """Every supplier that is configured or was reported by a worker."""
    reports_flat = await desk.link.call("HGETALL", keys.PROVIDERS)
    shown: dict[str, dict[str, Any]] = {
        name: {"name": name, "mode": "auto", "state": "unknown"} for name in supplier_kinds(desk.settings)
    }
    for name_raw, raw in zip(reports_flat[::2], reports_flat[1::2], strict=True):
        name = name_raw.decode()
        try:
            report = msgspec.json.decode(raw, type=dict[str, Any])
        except (msgspec.DecodeError, ValueError):
            report = {}
        shown[name] = {**report, "name": name, "mode": "auto", "state": report.get("state", "unknown")}
    names = sorted(shown)
    stands, histories = await asyncio.gather(
        asyncio.gather(*(_turn(desk, name) for name in names)),
        asyncio.gather(*(history_of(desk, name, HISTORY_SHOWN) for name in names)),
    )
    for name, stand, history in zip(names, stands, histories, strict=True):
        one = shown[name]
        one["history"] = [told for _, told in reversed(history)]
        if isinstance(stand, Gone):
            continue
        one["mode"] = stand.mode
        if one.get("shared") and not one.get("alone"):
            waits = stand.until_ms - stand.now_ms if stand.state == State.OPEN else 0
            one |= {
                "state": stand.state,
                "since_ms": int(time.time() * 1000) - (stand.now_ms - stand.since_ms),
                "retry_in_ms": max(0, waits),
                **rates(Counts(stand.calls, stand.failures, stand.slow)),
                "last_error": stand.last_error or None,
            }
    return [shown[name] for name in names]


async def _turn(desk: Desk, name: str, *, switch_to: str = "", who: str = "office") -> Gone | Stands:
    """Look at the shared breaker; switch_to: and override it, which also makes it where it is not yet."""
    kind = supplier_kinds(desk.settings).get(name, "payment")
    return await desk.scripts.breaker(
        name=name, rules=rules_text(guard_rules(desk.settings, kind).breaker), rand=0.5, who=who,
        history_max=desk.settings.breaker_history_max, mode_first="auto" if switch_to else "", switch_to=switch_to,
    )  # fmt: skip


async def history_of(
    desk: Desk, name: str, count: int, before: str | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Transitions with their ids, newest first. before: an id, itself left out."""
    newest = "+" if before is None else f"({before}"
    found = await desk.link.call(
        "XREVRANGE", keys.breaker_history_key(name), newest, "-", "COUNT", str(count)
    )
    rows = []
    for entry_id, fields in found:
        told = msgspec.json.decode(fields[1], type=dict[str, Any])
        rows.append((entry_id.decode(), {"at": format_ms(told["at_ms"]), **told}))
    return rows


@router.get(
    PROVIDERS,
    response_model=ProvidersOut,
    responses=refusals("auth_missing", "invalid", "busy"),
    summary="Suppliers and their breakers",
)
async def list_providers(desk: TheDesk, operator: Viewer) -> dict[str, Any]:
    return {"data": await breakers(desk)}


@router.get(
    PROVIDERS + "/{name}/history",
    response_model=Page[TransitionOut],
    responses=refusals("auth_missing", "no_such_provider", "invalid", "busy"),
    summary="A supplier's transitions, newest first",
)
async def history(
    name: ProviderPath, desk: TheDesk, operator: Viewer, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
) -> dict[str, Any]:
    behind = read_cursor(desk.ring, f"history:{name}", cursor)
    rows = await history_of(desk, name, limit, None if behind is None else str(behind[0]))
    if not rows and all(one["name"] != name for one in await breakers(desk)):
        raise refuse("no_such_provider")
    return listed(desk.ring, f"history:{name}", limit, rows, lambda row: row[1], lambda row: [row[0]])


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
async def override(name: ProviderPath, body: ModeIn, post: OperatorPosts) -> Response:
    desk = post.desk

    async def effect(change: Change) -> Answer:
        known = {str(one["name"]): one for one in await breakers(desk)}
        if name not in known:
            raise refuse("no_such_provider")
        before = known[name]["mode"]
        if not change.dry_run:
            who = f"{change.operator.name} ({change.operator.id})"  # as in the journal
            # Idempotent, and first: a journal entry without its effect would be worse than the other way round.
            await _turn(desk, name, switch_to=body.mode, who=who)
        async with change.step():
            return await change.done(
                Answer(200, {**known[name], "mode": body.mode, "history": []}),
                "provider.breaker",
                detail={"name": name, "mode": body.mode, "before": before},
            )

    return await post.once(effect, body)
