"""Routes: which suppliers serve a payment channel, or texts, in which order and share; changed live."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from app import keys
from app.desk.auth import Viewer
from app.desk.change import Answer, Body, Change, OperatorPosts
from app.desk.providers import PROVIDERS
from app.desk.shapes import Out, Share
from app.desk.wiring import Desk, TheDesk
from app.errors import FairdropError
from app.ledger import provider_routes
from app.problems import JsonRoute, refusals, refuse
from app.providers import routes
from app.providers.routes import SUPPLIERS_MAX, WEIGHT_MAX, Kind
from app.sale.document import Word

router = APIRouter(tags=["providers"], route_class=JsonRoute)
ROUTES = PROVIDERS + "/routes"
_log = structlog.get_logger("routes")


class RouteOut(Out):
    kind: Kind
    channel: str | None = Field(description="of a payment; null: the route of texts")
    suppliers: list[Share] = Field(description="in the order of the route")
    set_by: Literal["operators", "settings"]


class RoutesOut(Out):
    data: list[RouteOut]


class ShareIn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Word
    weight: int = Field(ge=0, le=WEIGHT_MAX, description="0: a backup")


class RouteIn(Body):
    kind: Kind
    channel: Word | None = Field(None, description="of a payment, also a new one; texts have none")
    suppliers: Annotated[list[ShareIn], Field(min_length=1, max_length=SUPPLIERS_MAX)] | None = Field(
        description="the whole route, in order; null: as the settings say"
    )


def shown(desk: Desk, kind: Kind, channel: str | None) -> dict[str, Any]:
    found = desk.routes
    return {
        "kind": kind,
        "channel": channel,
        "suppliers": shares(found.route(kind, channel)),
        "set_by": "operators" if found.is_live(kind, channel) else "settings",
    }


def shares(route: routes.Route) -> list[dict[str, Any]]:
    return [{"name": name, "weight": weight} for name, weight in route.items()]


async def look(desk: Desk) -> None:
    """Take over what operators have set, as far as Redis can be asked; else it is half a second old."""
    try:
        await desk.routes.refresh(desk.link)
    except FairdropError as error:
        _log.warning("provider_routes_not_read", error=type(error).__name__)


async def _copy(desk: Desk, field: str, route: routes.Route | None) -> None:
    """Tell all processes. Postgres has it already: without Redis, a worker tells them as soon as there is one."""
    try:
        if route is None:
            await desk.link.call("HDEL", keys.PROVIDER_ROUTES, field)
        else:
            await desk.link.call("HSET", keys.PROVIDER_ROUTES, field, routes.encode(route))
        await desk.routes.refresh(desk.link)
    except FairdropError as error:
        _log.warning("provider_routes_not_told", error=type(error).__name__)


def of_channels(desk: Desk, channels: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Where the payments of these channels go. Refusal 422 `unknown_channel`: one of them leads to no supplier."""
    known = desk.routes.channels()
    unknown = [at for at, channel in enumerate(channels) if channel not in known]
    if unknown:
        raise refuse(
            "unknown_channel",
            f"No supplier serves {', '.join(channels[at] for at in unknown)}; channels are: {', '.join(known)}.",
            errors=[{"path": f"channels.{at}", "code": "unknown_channel"} for at in unknown],
        )
    return {channel: shares(desk.routes.route("payment", channel)) for channel in channels}


@router.get(
    ROUTES,
    response_model=RoutesOut,
    responses=refusals("auth_missing", "invalid", "busy"),
    summary="Routes of payment channels and of texts",
)
async def list_routes(desk: TheDesk, operator: Viewer) -> dict[str, Any]:
    await desk.routes.refresh(desk.link)
    return {
        "data": [
            *(shown(desk, "payment", channel) for channel in desk.routes.channels()),
            shown(desk, "sms", None),
        ]
    }


@router.post(
    ROUTES,
    response_model=RouteOut,
    responses=refusals(
        "malformed", "auth_missing", "forbidden", "key_reused", "too_large", "not_json", "invalid", "busy"
    ),
    summary="Set a route, or leave it to the settings again; live on every process within a second",
)
async def set_route(body: RouteIn, post: OperatorPosts) -> Response:
    """Payments under way stay where they are; what is begun from now on follows. Who is chosen for an order depends on
    its number and the weights alone, so a change moves as few as it can."""
    desk = post.desk

    async def effect(change: Change) -> Answer:
        if (body.kind == "payment") != (body.channel is not None):
            raise refuse("invalid", errors=[{"path": "channel", "code": "payment_needs_channel"}])
        known = desk.routes.suppliers(body.kind)
        names = [] if body.suppliers is None else [one.name for one in body.suppliers]
        wrong = [
            {"path": f"suppliers.{at}.name", "code": "not_unique" if name in known else "unknown_supplier"}
            for at, name in enumerate(names)
            if name not in known or name in names[:at]
        ]
        if wrong:
            raise refuse("invalid", f"Suppliers in use are: {', '.join(known) or 'none'}.", errors=wrong)
        await look(desk)
        before = shares(desk.routes.route(body.kind, body.channel))
        field = routes.field_of(body.kind, body.channel)
        given = None if body.suppliers is None else {one.name: one.weight for one in body.suppliers}
        after = given if given is not None else desk.routes.without_live(body.kind, body.channel)
        answer = {
            "kind": body.kind,
            "channel": body.channel,
            "suppliers": shares(after),
            "set_by": "settings" if given is None else "operators",
        }
        async with change.step() as conn:
            await provider_routes.put(conn, field, given)
            done = await change.done(
                Answer(200, answer),
                "provider.route",
                detail={
                    "kind": body.kind,
                    "channel": body.channel,
                    "suppliers": answer["suppliers"],
                    "set_by": answer["set_by"],
                    "before": before,
                },
            )
        await _copy(desk, field, given)
        return done

    return await post.once(effect, body)
