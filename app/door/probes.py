"""What load balancers and Prometheus ask. The front stays ready without Redis: its 503 beats no backend at all."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from app.door.respond import door_of
from app.door.shapes import HealthOut, ReadyOut
from app.problems import refusals, refuse
from app.telemetry import Metrics

router = APIRouter(tags=["probes"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", response_model=HealthOut, summary="The process runs")
async def healthz() -> Response:
    return JSONResponse({"status": "ok"}, headers={"cache-control": "no-store"})


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    response_model=ReadyOut,
    responses=refusals("draining"),
    summary="Send requests here",
)
async def readyz(request: Request) -> Response:
    door = door_of(request)
    reasons: list[str] = []
    if not door.link.connected or door.link.trouble:
        reasons.append(f"redis: {door.link.trouble or 'not connected'}")
    elif not door.snapshots.fresh:
        reasons.append("snapshot: stale")
    if request.app.state.draining:
        raise refuse("draining", extra={"reasons": ["draining", *reasons]})
    return JSONResponse({"status": "ready", "reasons": reasons}, headers={"cache-control": "no-store"})


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals("forbidden")},
    summary="Prometheus metrics of all front-door processes",
)
async def metrics(request: Request) -> Response:
    told: Metrics = request.app.state.metrics
    if not told.allows(request.client.host if request.client is not None else None):
        raise refuse("forbidden")
    return Response(told.text(), headers={"content-type": told.content_type})
