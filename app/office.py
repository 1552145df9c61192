"""The office process: wiring and lifespan. Operators, the shop's feed and suppliers' call-backs; Redis and Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator

import structlog
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from sqlalchemy.exc import SQLAlchemyError

from app import problems
from app.desk import (
    bills,
    events,
    hooks,
    journal,
    keys,
    live,
    orders,
    pages,
    probes,
    providers,
    routes,
    sales,
    trace,
)
from app.desk.live import Watch
from app.desk.wiring import Desk
from app.errors import CannotStart, DidNotHappen, Unknown
from app.ledger import idempotency, operators
from app.ledger.engine import create_engine, passes
from app.problems import refuse
from app.providers import published
from app.providers.registry import open_providers
from app.providers.routes import run as follow_routes
from app.redis.cluster import open_link
from app.resources import release
from app.sale import publish
from app.scripts import Scripts
from app.sealing import sealing_keys
from app.settings import Settings
from app.telemetry import Metrics
from app.tokens import Keyring, signing_keys

OPERATOR_KEY_MIN = 16  # characters; what the first admin can be given and nobody can guess
TEND_EVERY_S = 1.0  # between two looks for what was left half done
FORGET_EVERY_S = 3_600.0
_log = structlog.get_logger("office")

DESCRIPTION = """\
The operators' side of a flash sale: drafts, publish, switches, orders, audit, the shop's event feed.

`Authorization: Bearer <key>`; roles viewer (reads), operator (runs sales, orders, breakers), admin (keys, webhooks).
Every POST takes `Idempotency-Key` (the same key and body again is answered as the first time, for 7 days; another body
is 409 `key_reused`), `reason` and `?dry_run=true`. Every change is in the journal. Changes are live on every front door
within 200 ms; 202 means committed, and live as soon as Redis answers. Refusals are problem documents (RFC 9457).
"""


def create_app(settings: Settings) -> FastAPI:
    """The office as an ASGI application. CannotStart: a secret or an address is missing or bad."""
    ring = Keyring(signing_keys(settings.signing_keys.get_secret_value()))
    seal_keys = sealing_keys(settings.pii_keys.get_secret_value())
    if not seal_keys:
        raise CannotStart("FAIRDROP_PII_KEYS is missing: secrets of webhooks could not be sealed")
    if not settings.redis_url:
        raise CannotStart("FAIRDROP_REDIS_URL is missing")
    if not settings.database_url:
        raise CannotStart("FAIRDROP_DATABASE_URL is missing")
    first_key = settings.operator_key.get_secret_value()
    if first_key and len(first_key) < OPERATOR_KEY_MIN:
        raise CannotStart(f"FAIRDROP_OPERATOR_KEY needs at least {OPERATOR_KEY_MIN} characters")
    link = open_link(settings.redis_url, deadline_s=settings.redis_deadline_s, name="fairdrop-office")
    engine = create_engine(settings, name="fairdrop-office")
    suppliers = open_providers(settings)
    desk = Desk(settings, engine, link, Scripts(link), ring, seal_keys, suppliers.routes)
    watch = Watch(desk)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await link.start()
        tender = Tender(desk, first_key)
        await tender.tend()
        hook_server = HookServer(hooks_app(desk, app), settings) if settings.hooks_port else None
        tasks = [
            asyncio.create_task(tender.run(), name="tend"),
            asyncio.create_task(watch.run(), name="watch"),
            asyncio.create_task(follow_routes(link, suppliers.routes, asyncio.Event()), name="routes"),
        ]
        stopping = asyncio.Event()
        tasks.append(
            asyncio.create_task(
                published.run(link, suppliers, settings, stopping, report=False), name="breakers"
            )
        )
        if hook_server is not None:
            hook_server.start()
        try:
            yield
        finally:
            desk.draining = True
            if hook_server is not None:
                await hook_server.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await suppliers.aclose()
            await link.close()
            await engine.dispose()

    app = _Office(
        title="Fairdrop office",
        summary="Run flash sales: publish, watch, turn, refund, prove.",
        description=DESCRIPTION,
        version=release(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    app.state.desk = desk
    app.state.watch = watch
    app.state.metrics = Metrics(settings)
    app.state.draining = False
    _answer_problems(app)
    for router in (
        sales.router, orders.router, trace.router, live.router, routes.router, providers.router, journal.router,
        keys.router, events.router, bills.router, probes.router, pages.router,
    ):  # fmt: skip
        app.include_router(router, dependencies=[Depends(_unkept)])
    if not settings.hooks_port:
        app.include_router(hooks.router)
    app.state.engine, app.state.providers = engine, suppliers
    return app


async def _unkept(response: Response) -> None:
    """What the office tells (buyers, orders, keys) stays out of a browser's cache."""
    response.headers["Cache-Control"] = "no-store"


class _Office(FastAPI):
    def drain(self) -> None:
        """SIGTERM: /readyz says draining, event streams end; everything else is served on."""
        self.state.draining = True
        self.state.desk.draining = True


def hooks_app(desk: Desk, office: FastAPI) -> FastAPI:
    """Suppliers' call-backs and nothing else, for a listener that the internet may reach."""
    app = FastAPI(
        title="Fairdrop hooks", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.engine, app.state.providers = desk.engine, office.state.providers
    _answer_problems(app)
    app.include_router(hooks.router)
    return app


def _answer_problems(app: FastAPI) -> None:
    problems.install(app)

    async def on_store(request: Request, error: Exception) -> Response:
        if passes(error):
            return problems.answer(
                request, refuse("busy", "A store does not answer; repeat the same request.", retry_after_s=2)
            )
        _log.error("request_failed", path=request.url.path, error=repr(error))
        return problems.answer(request, refuse("internal", "Something broke on our side."))

    for kind in (SQLAlchemyError, OSError, TimeoutError):
        app.add_exception_handler(kind, on_store)


class _Quiet(uvicorn.Server):
    """Signals are the office's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HookServer:
    """A listener of its own for suppliers' call-backs, within the office's loop. CannotStart: the port is taken."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        try:
            self._wire = socket.create_server((settings.office_host, settings.hooks_port))
        except OSError as error:
            raise CannotStart(
                f"hooks: cannot listen on {settings.office_host}:{settings.hooks_port}: {error.strerror}; "
                "choose another port with FAIRDROP_HOOKS_PORT"
            ) from error
        self._within_s = settings.close_within_s
        self._server = _Quiet(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(self._within_s)),
            )
        )
        self._served: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._served = asyncio.create_task(self._server.serve([self._wire]), name="hooks")

    async def stop(self) -> None:
        """Finish what is under way, then close the port."""
        self._server.should_exit = True
        if self._served is not None:
            await asyncio.wait([self._served], timeout=self._within_s + 1)
        self._wire.close()


class Tender:
    """Keeps the office in order: the first admin's key, what was left half done, answers that are too old."""

    def __init__(self, desk: Desk, first_key: str) -> None:
        self._desk = desk
        self._first_key = first_key
        self._forgot_at = 0.0
        self._trouble = ""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TEND_EVERY_S)
            try:
                await self.tend()
            except Exception:  # noqa: BLE001 - what nobody thought of must not end the looks
                _log.exception("office_cannot_tend")

    async def tend(self) -> None:
        """One look. A store that is away is tried again at the next."""
        desk = self._desk
        try:
            if self._first_key:
                async with desk.engine.begin() as conn:
                    await operators.put_first(conn, self._first_key)
                self._first_key = ""
            await publish.finish_half_done(desk.engine, desk.link, desk.scripts, desk.settings)
            if time.monotonic() - self._forgot_at > FORGET_EVERY_S:
                async with desk.engine.begin() as conn:
                    await idempotency.forget_old(conn)
                self._forgot_at = time.monotonic()
            self._trouble = ""
        except (DidNotHappen, Unknown, SQLAlchemyError, OSError, TimeoutError) as error:
            trouble = type(error).__name__
            if trouble != self._trouble:
                _log.warning("office_waits_for_a_store", error=str(error)[:300])
            self._trouble = trouble
