"""What load balancers and Prometheus ask of the office."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError

from app.desk.shapes import Out
from app.desk.wiring import Desk
from app.ledger.engine import durability, ping
from app.ledger.servers import StandbyAway
from app.problems import refusals, refuse
from app.telemetry import Metrics

router = APIRouter(tags=["probes"])
LOOK_WITHIN_S = 2.0  # a store that needs longer to say "1" is not ready


class HealthOut(Out):
    status: Literal["ok"]


class ReadyOut(Out):
    status: Literal["ready"]
    reasons: list[str]
    durability: str = Field(
        description="what a failover of Postgres keeps: `local`, or its synchronous standbys"
    )


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", response_model=HealthOut, summary="The process runs")
async def healthz(response: Response) -> dict[str, str]:
    response.headers["Cache-Control"] = "no-store"
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    response_model=ReadyOut,
    responses=refusals("draining", "busy"),
    summary="Send requests here: both stores answer",
)
async def readyz(request: Request, response: Response) -> dict[str, Any]:
    """503 with the reasons in `reasons` while a store is away, or while the process drains."""
    desk: Desk = request.app.state.desk
    reasons: list[str] = []
    holds = ""
    if not desk.link.connected:
        reasons.append(f"redis: {desk.link.trouble or 'not connected'}")
    try:
        async with asyncio.timeout(LOOK_WITHIN_S), desk.engine.connect() as conn:
            await ping(conn)
            holds = await durability(conn)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        reasons.append(f"postgres: {error if isinstance(error, StandbyAway) else type(error).__name__}")
    if request.app.state.draining:
        raise refuse("draining", extra={"reasons": ["draining", *reasons]})
    if reasons:
        raise refuse("busy", "A store does not answer.", extra={"reasons": reasons})
    response.headers["Cache-Control"] = "no-store"
    return {"status": "ready", "reasons": [], "durability": holds}


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals("forbidden")},
    summary="Prometheus metrics of this office",
)
async def metrics(request: Request) -> Response:
    told: Metrics = request.app.state.metrics
    if not told.allows(request.client.host if request.client is not None else None):
        raise refuse("forbidden")
    return Response(told.text(), headers={"content-type": told.content_type})
