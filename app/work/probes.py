"""What a worker is asked over HTTP: whether it lives, whether it is ready, its metrics. It serves nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.errors import CannotStart
from app.ledger import engine as engines
from app.redis.link import Link
from app.settings import Settings
from app.telemetry import Metrics
from app.work.loops import Health

PROBES_BACKLOG = 64
FRESH = {"Cache-Control": "no-store"}
READY_WITHIN_S = 1.0  # a probe's look at Postgres


def create_app(
    settings: Settings, link: Link, engine: AsyncEngine, health: Health, stopping: asyncio.Event
) -> Starlette:
    """/healthz, /readyz and /metrics of a worker."""
    metrics = Metrics(settings)

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"}, headers=FRESH)

    async def readyz(_: Request) -> Response:
        reasons = [f"{loop}: {why}" for loop, why in health.troubles.items()]
        if not link.connected:
            reasons.append(f"redis: {link.trouble or 'not connected'}")
        durable = ""
        try:
            async with asyncio.timeout(READY_WITHIN_S), engine.connect() as conn:
                durable = await engines.durability(conn)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
            reasons.append(f"postgres: {type(error).__name__}: {error}".splitlines()[0][:200])
        if stopping.is_set():
            return _problem(503, "draining", "This process is about to stop.", reasons=["draining", *reasons])
        if reasons:
            return _problem(503, "busy", "A store does not answer, or a loop fails.", reasons=reasons)
        told = {"status": "ready", "reasons": [], "redis": link.where, "durability": durable}
        return JSONResponse(told, headers=FRESH)

    async def show_metrics(request: Request) -> Response:
        if not metrics.allows(request.client.host if request.client else None):
            return _problem(403, "forbidden", "This caller may not do this.")
        return Response(metrics.text(), media_type=metrics.content_type)

    async def not_here(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = "not_found" if error.status_code == 404 else "method_not_allowed"
        return _problem(error.status_code, code, str(error.detail), headers=error.headers)

    return Starlette(
        routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", show_metrics)],
        exception_handlers={HTTPException: not_here},
    )


def _problem(
    status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: object
) -> Response:
    """A problem document as app.problems makes them; that module brings FastAPI, a third of a second of a restart."""
    document = {
        "type": f"urn:fairdrop:problem:{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": os.urandom(8).hex(),
        "errors": [],
        **more,
    }
    told = {**FRESH, **(headers or {}), **({"Retry-After": "1"} if status == 503 else {})}
    return JSONResponse(document, status, told, media_type="application/problem+json")


def listen(host: str, port: int) -> socket.socket:
    """The socket for the probes; its port is told in FAIRDROP_PORT_FILE, if that is set. CannotStart: it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        wire = socket.create_server((host, port), family=family, backlog=PROBES_BACKLOG)
    except OSError as error:
        raise CannotStart(
            f"worker: cannot listen on {host}:{port}: {error.strerror or error}; choose another port with --port"
        ) from error
    if path := os.environ.get("FAIRDROP_PORT_FILE"):
        draft = Path(f"{path}.draft")
        draft.write_text(f"{wire.getsockname()[1]}\n", encoding="ascii")
        draft.replace(path)
    return wire


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the worker has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def answered(app: Starlette, wire: socket.socket, group: asyncio.TaskGroup) -> AsyncIterator[None]:
    """Probes are answered on this socket meanwhile."""
    server = _Server(
        uvicorn.Config(app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none")
    )
    serving = group.create_task(server.serve(sockets=[wire]), name="probes")
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait([serving], timeout=5)
