"""A supplier's call-back: verified on its raw bytes, committed once, then acknowledged in the supplier's own words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import assert_never

import msgspec
import structlog
from prometheus_client import Counter
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.alarm import alert
from app.ledger import captures, orders, payments, refunds
from app.ledger.engine import alone, passes
from app.providers.payment import (
    Hook,
    HookAnswer,
    HookClosed,
    HookDeclined,
    HookForged,
    HookOther,
    HookPaid,
    HookRefunded,
    HookRefundFailed,
)
from app.providers.registry import Providers
from app.purchase.paying.evidence import SETTLED, take_evidence

log = structlog.get_logger()

HOOK_BODY_MAX_BYTES = 64 * 1024

HOOKS = Counter("fairdrop_hooks", "Suppliers' call-backs by what became of them", ["provider", "outcome"])


async def take_hook(
    engine: AsyncEngine, providers: Providers, name: str, headers: Mapping[str, str], raw_body: bytes
) -> HookAnswer:
    """One supplier call-back: verified on its raw bytes, committed, then acknowledged in the supplier's own words.

    Anything but a 2xx makes the supplier repeat it: a forged one is refused, and so is one that we could not commit.
    """
    provider = providers.payment.get(name)
    if provider is None:
        return _problem(404, "no_such_provider")
    if len(raw_body) > HOOK_BODY_MAX_BYTES:
        return _problem(413, "too_large")
    lower = {key.lower(): value for key, value in headers.items()}
    await provider.prepare_hook(lower)  # may have to fetch the key that this was signed with
    hook = provider.read_hook(lower, raw_body, datetime.now(UTC))
    if isinstance(hook, HookForged):
        HOOKS.labels(name, hook.code).inc()
        log.warning("hook_refused", provider=name, code=hook.code)
        return _problem(401, hook.code)
    if b"\\u0000" in msgspec.json.encode(hook):
        return _problem(422, "malformed")  # Postgres' text holds no NUL, and no id of ours has one
    # Kept is a digest: the whole may say who paid, with number and address, and its supplier can show it again.
    digest = hashlib.sha256(raw_body).digest()
    try:
        if isinstance(hook, HookPaid):
            async with alone(engine) as conn:
                plain = await captures.pay_plainly(
                    conn,
                    provider=name,
                    event_id=hook.event_id,
                    digest=digest,
                    provider_ref=hook.captured.provider_ref,
                    order_no=hook.captured.order_no,
                    attempt_id=hook.captured.attempt_id,
                    amount_minor=hook.captured.amount_minor,
                    currency=hook.captured.currency,
                    captured_at=hook.captured.captured_at,
                )
            if plain is not None:
                HOOKS.labels(name, plain).inc()
                if plain == "paid":
                    SETTLED.labels(plain).inc()
                return provider.hook_reply(ok=True)
        async with engine.connect() as conn:
            outcome = await _take(conn, name, hook, digest)
            # What does not fit leaves no trace in the inbox: the supplier may still correct it under the same id.
            await (conn.rollback() if outcome == "mismatch" else conn.commit())
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        if not passes(error):
            raise
        HOOKS.labels(name, "not_committed").inc()
        log.warning("hook_not_committed", provider=name, error=type(error).__name__)
        return provider.hook_reply(ok=False)
    HOOKS.labels(name, outcome).inc()
    if outcome == "mismatch":
        return _problem(422, "mismatch")
    return provider.hook_reply(ok=True)


async def _take(conn: AsyncConnection, provider: str, hook: Hook, digest: bytes) -> str:
    """Act once on a verified call-back, in one transaction with its row in the inbox. Returns what became of it."""
    if isinstance(hook, HookForged):
        raise ValueError("a forged call-back got this far")
    kind = type(hook).__name__.removeprefix("Hook").lower()
    if not await captures.inbox_add(conn, provider, hook.event_id, kind, digest, kind):
        return "duplicate"
    match hook:
        case HookPaid():
            evidence = await take_evidence(conn, provider, hook.captured)
            SETTLED.labels(evidence).inc()
            return evidence
        case HookDeclined():
            return await _over(conn, hook.attempt_id, hook.order_no, "failed", hook.code, hook.final)
        case HookClosed():
            return await _over(conn, hook.attempt_id, hook.order_no, "closed", hook.code, True)
        case HookRefunded():
            done = await refunds.done(conn, hook.refund_id, hook.provider_ref)
            return "refunded" if done else "known"
        case HookRefundFailed():
            state = await refunds.doubted(conn, hook.refund_id)
            if state == "done":
                alert(
                    "refund_came_back",
                    "a refund that was done has failed at its supplier; the money is with us again",
                    provider=provider,
                    refund=hook.refund_id,
                    code=hook.code,
                )
            return "refund_failed" if state is not None else "known"
        case HookOther():
            return "other"
        case _:
            assert_never(hook)


async def _over(
    conn: AsyncConnection, attempt_id: str, order_no: str, state: str, code: str, final: bool
) -> str:
    """A link has ended without money; the order keeps its units, and the buyer may ask for another link."""
    attempt = await payments.attempt(conn, attempt_id)
    if attempt is None or attempt["order_no"] != order_no:
        return "mismatch"
    order = await orders.lock(conn, order_no)
    if final and await payments.end_by_hook(conn, attempt_id, state, code):
        if order is not None and order["state"] == "reserved":
            await payments.hasten_wanted(conn, order_no)
            await orders.bump(conn, order_no)
        return state
    return "known"


def _problem(status: int, code: str) -> HookAnswer:
    body = {"type": "about:blank", "title": code, "status": status, "code": code}
    return HookAnswer(status, msgspec.json.encode(body), "application/problem+json")
