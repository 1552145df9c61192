"""A supplier of payments and SMS for development, demos and tests: a real HTTP process that misbehaves on request.

| call | does |
|---|---|
| `POST /v1/payments` | a payment link; idempotent by `attempt_id` |
| `GET /v1/payments/{attempt_id}` · `POST …/close` | query · close (closing an id never seen refuses it for ever) |
| `POST /v1/refunds` · `GET /v1/refunds/{refund_id}` | refund, in part or whole; idempotent by `refund_id` |
| `GET /v1/bills/{day}` | captures and refunds of one UTC day |
| `POST /v1/sms` | a text into the log; idempotent by `id` |
| `GET /pay/{ref}` · `POST /pay/{ref}/pay` · `…/decline` | the buyer's page with two buttons, for browsers and JSON |
| `GET /sms` · `GET /stats` · `GET/POST /control` | the log · sums · how to misbehave (this machine, or the secret) |

`/v1` requests are signed (`sandbox_wire.py`), and so are the call-backs to each payment's `notify_url`. Call-backs are
repeated until they are answered 2xx. All state is in memory and every table has a limit; with `sandbox_ledger` money
and links survive a restart, and call-backs that were not taken are sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from app.providers import sandbox_wire
from app.providers.sandbox_faults import Control, Faults, changed
from app.providers.sandbox_page import PAGE_HEADERS, page_of
from app.providers.sandbox_state import (
    HOOKS_AT_ONCE_MAX,
    Pay,
    PayWanted,
    RefundWanted,
    Reply,
    Sandbox,
    SmsWanted,
    public,
)
from app.settings import Settings

HANGS_MAX = 2_000  # requests that hang at once; beyond: 503
BODY_MAX_BYTES = 16_384
HOOK_DEADLINE_S = 5.0

S = TypeVar("S", bound=msgspec.Struct)
Work = Callable[[bytes], object]


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _body(request: Request) -> bytes:
    raw = b""
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > BODY_MAX_BYTES:
                raise Reply(413, "too_large")
    except ClientDisconnect:
        raise Reply(400, "malformed") from None
    return raw


def _read(raw: bytes, kind: type[S]) -> S:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise Reply(422, "invalid") from None


def create_app(settings: Settings) -> Starlette:
    """The sandbox supplier as an ASGI application; `app.state.sandbox` is its state."""
    sandbox = Sandbox(settings)

    async def guarded(request: Request, operation: str, faults: Faults, work: Work) -> Response:
        """Verify the signature, misbehave as told, do the work."""
        raw = await _body(request)
        why = sandbox_wire.refusal(
            sandbox.secrets, request.headers, request.method, request.url.path, raw, time.time()
        )
        sandbox.counts[f"calls_{operation}"] += 1
        if why is not None:
            raise Reply(401, why)
        if faults.only and operation not in faults.only:
            return _json(work(raw))
        if faults.latency_ms or faults.jitter_ms:
            await asyncio.sleep((faults.latency_ms + sandbox.dice.random() * faults.jitter_ms) / 1000)
        chance = sandbox.dice.random()
        if chance < faults.error_rate:
            raise Reply(faults.error_status, "sandbox_error")
        chance -= faults.error_rate
        if chance < faults.refuse_rate:
            raise Reply(503, "not_taken")
        chance -= faults.refuse_rate
        if chance < faults.hang_rate:
            await hang(faults.hang_ms)
            raise Reply(504, "hung")
        chance -= faults.hang_rate
        if chance < faults.lost_rate:
            work(raw)
            await hang(faults.hang_ms)
            raise Reply(504, "reply_lost")
        return _json(work(raw))

    async def hang(ms: int) -> None:
        if sandbox.hanging >= HANGS_MAX:
            raise Reply(503, "not_taken")
        sandbox.hanging += 1
        try:
            await asyncio.sleep(ms / 1000)
        finally:
            sandbox.hanging -= 1

    def ours(request: Request) -> None:
        """Refuse who is neither on this machine nor knows the secret."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if any(secrets.compare_digest(given, secret) for secret in sandbox.secrets):
            return
        with contextlib.suppress(ValueError):
            if request.client is None or ipaddress.ip_address(request.client.host).is_loopback:
                return
        raise Reply(401, "auth_missing")

    # suppliers' API

    async def create(request: Request) -> Response:
        base_url = str(request.base_url).rstrip("/")
        return await guarded(
            request, "create", sandbox.control.payments,
            lambda raw: public(sandbox.create(_aware(_read(raw, PayWanted)), base_url)),
        )  # fmt: skip

    async def query(request: Request) -> Response:
        def work(_: bytes) -> object:
            pay = sandbox.pays.get(request.path_params["attempt_id"])
            if pay is None:
                raise Reply(404, "absent")
            sandbox.expire(pay)
            return public(pay)

        return await guarded(request, "query", sandbox.control.payments, work)

    async def close(request: Request) -> Response:
        return await guarded(
            request, "close", sandbox.control.payments,
            lambda _: public(sandbox.close(request.path_params["attempt_id"])),
        )  # fmt: skip

    async def refund(request: Request) -> Response:
        return await guarded(
            request, "refund", sandbox.control.payments, lambda raw: sandbox.refund(_read(raw, RefundWanted))
        )

    async def refund_query(request: Request) -> Response:
        def work(_: bytes) -> object:
            found = sandbox.refunds.get(request.path_params["refund_id"])
            if found is None:
                raise Reply(404, "absent")
            return sandbox.ripen(found)

        return await guarded(request, "refund_query", sandbox.control.payments, work)

    async def bill(request: Request) -> Response:
        return await guarded(
            request, "bill", sandbox.control.payments, lambda _: sandbox.bill(request.path_params["day"])
        )

    async def send(request: Request) -> Response:
        return await guarded(
            request, "send", sandbox.control.sms, lambda raw: sandbox.send(_read(raw, SmsWanted))
        )

    # the buyer

    def of_ref(request: Request) -> Pay:
        pay = sandbox.by_ref.get(request.path_params["ref"])
        if pay is None:
            raise Reply(404, "absent")
        sandbox.expire(pay)
        return pay

    async def page(request: Request) -> Response:
        pay = of_ref(request)
        return (
            _json(public(pay)) if _wants_json(request) else HTMLResponse(page_of(pay), headers=PAGE_HEADERS)
        )

    async def act(request: Request) -> Response:
        pay = of_ref(request)
        await _body(request)
        did = sandbox.pay(pay) if request.url.path.endswith("/pay") else sandbox.decline(pay)
        return _json(public(did)) if _wants_json(request) else RedirectResponse(f"/pay/{pay.ref}", 303)

    # the tester

    async def texts(request: Request) -> Response:
        ours(request)
        limit = request.query_params.get("limit", "100")
        count = min(int(limit), 10_000) if limit.isascii() and limit.isdigit() else 100
        data = list(sandbox.texts)[-count:] if count else []
        return _json({"count": sandbox.counts["sms"], "data": data})

    async def stats(request: Request) -> Response:
        ours(request)
        states = Counter(pay.state for pay in sandbox.pays.values())
        return _json({**sandbox.counts, "states": states, "hooks_under_way": len(sandbox.tasks)})

    async def control(request: Request) -> Response:
        ours(request)
        if request.method == "POST":
            try:
                changes = msgspec.json.decode(await _body(request))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                raise Reply(422, "invalid") from None
            reset = isinstance(changes, dict) and changes.pop("reset", False) is True
            try:
                wanted = changed(Control() if reset else sandbox.control, changes)
            except ValueError:
                raise Reply(422, "invalid") from None
            if reset or wanted.seed != sandbox.control.seed:
                sandbox.dice = random.Random(wanted.seed)
            sandbox.control = wanted
        return _json(sandbox.control)

    async def health(request: Request) -> Response:
        return _json({"ok": True})

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Reply)
        return _json({"code": error.code}, error.status)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(
            timeout=HOOK_DEADLINE_S,
            limits=httpx.Limits(
                max_connections=HOOKS_AT_ONCE_MAX, max_keepalive_connections=HOOKS_AT_ONCE_MAX
            ),
            trust_env=False,
        ) as http:
            sandbox.http = http
            for pay in sandbox.untold:
                sandbox.tell(pay, "payment.paid")
            yield
            for task in list(sandbox.tasks):
                task.cancel()
            await asyncio.gather(*sandbox.tasks, return_exceptions=True)
            sandbox.http = None
            sandbox.ledger.close()

    app = Starlette(
        routes=[
            Route("/v1/payments", create, methods=["POST"]),
            Route("/v1/payments/{attempt_id}", query, methods=["GET"]),
            Route("/v1/payments/{attempt_id}/close", close, methods=["POST"]),
            Route("/v1/refunds", refund, methods=["POST"]),
            Route("/v1/refunds/{refund_id}", refund_query, methods=["GET"]),
            Route("/v1/bills/{day}", bill, methods=["GET"]),
            Route("/v1/sms", send, methods=["POST"]),
            Route("/pay/{ref}", page, methods=["GET"]),
            Route("/pay/{ref}/pay", act, methods=["POST"]),
            Route("/pay/{ref}/decline", act, methods=["POST"]),
            Route("/sms", texts, methods=["GET"]),
            Route("/stats", stats, methods=["GET"]),
            Route("/control", control, methods=["GET", "POST"]),
            Route("/healthz", health, methods=["GET"]),
            Route("/readyz", health, methods=["GET"]),
        ],
        exception_handlers={Reply: refused},
        lifespan=lifespan,
    )
    app.state.sandbox = sandbox
    return app


def _aware(wanted: PayWanted) -> PayWanted:
    if wanted.expires_at.tzinfo is None:
        raise Reply(422, "time_without_zone")
    return wanted


def _wants_json(request: Request) -> bool:
    return "text/html" not in request.headers.get("accept", "")
