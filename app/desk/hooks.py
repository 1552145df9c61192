"""Where suppliers call back. Verified on the raw bytes and committed before the supplier's own success reply."""

from __future__ import annotations

from typing import Annotated, Any, cast

import msgspec
import structlog
from fastapi import APIRouter, Path, Request, Response
from sqlalchemy.exc import SQLAlchemyError

from app.ledger.engine import passes
from app.problems import bounded_body, refusals, refuse
from app.providers.payment import HookForged
from app.providers.registry import Providers
from app.purchase import tell
from app.purchase.paying.hook import HOOK_BODY_MAX_BYTES, take_hook

router = APIRouter(tags=["hooks"])
_log = structlog.get_logger("hooks")


@router.post(
    "/v1/hooks/{provider}",
    responses={
        200: {"description": "the supplier's own success reply: committed", "content": {"*/*": {}}},
        204: {"description": "a report of a text is committed, or says nothing new"},
        **refusals("hook_refused", "no_such_provider", "too_large", "busy", "invalid"),
    },
    response_class=Response,
    summary="A supplier's call-back",
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": {}}}, "required": True}},
)
async def hook(
    provider: Annotated[str, Path(pattern=r"^[a-z][a-z0-9_-]{0,63}$")], request: Request
) -> Response:
    """Signature, timestamp, amount, currency, merchant and order number are verified on the raw bytes."""
    state = request.app.state
    raw = await bounded_body(request, HOOK_BODY_MAX_BYTES)
    if provider in state.providers.sms:
        return await _report(provider, request, raw)
    if provider not in state.providers.payment:
        raise refuse("no_such_provider")
    answer = await take_hook(
        state.engine, cast(Providers, state.providers), provider, dict(request.headers), raw
    )
    if answer.status in (401, 422):
        why = msgspec.json.decode(answer.body, type=dict[str, Any]).get("code", "")
        raise refuse("hook_refused" if answer.status == 401 else "invalid", extra={"why": why})
    headers = {**answer.headers, "content-type": answer.content_type}
    return Response(answer.body, status_code=answer.status, headers=headers)


@router.post(
    "/v1/hooks/{provider}/{token}",
    responses={
        200: {
            "description": "the supplier's own success reply: committed",
            "content": {"application/json": {}},
        },
        **refusals("hook_refused", "no_such_provider", "too_large", "busy", "invalid"),
    },
    response_class=Response,
    summary="Delivery reports of an SMS supplier that does not sign them",
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": {}}}, "required": True}},
)
async def reports(
    provider: Annotated[str, Path(pattern=r"^[a-z][a-z0-9_-]{0,63}$")],
    token: Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$")],
    request: Request,
) -> Response:
    """The token of the supplier's settings vouches for them; without one there are none."""
    state = request.app.state
    raw = await bounded_body(request, HOOK_BODY_MAX_BYTES)
    try:
        taken = await tell.take_reports(state.engine, cast(Providers, state.providers), provider, token, raw)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        _log.error(
            "sms_reports_not_kept", provider=provider, error=repr(error)
        )  # not the path: it holds the token
        raise refuse("busy", "Not committed; call again.", retry_after_s=1) from error
    if isinstance(taken, HookForged):
        raise refuse("hook_refused", extra={"why": taken.code})
    if taken == "no_such_provider":
        raise refuse("no_such_provider")
    return Response(taken, media_type="application/json")


async def _report(provider: str, request: Request, raw: bytes) -> Response:
    """An SMS supplier's report of what became of a text."""
    state = request.app.state
    try:
        taken = await tell.take_report(
            state.engine, cast(Providers, state.providers), provider, dict(request.headers), raw
        )
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        if not passes(error):
            raise
        raise refuse("busy", "Not committed; call again.", retry_after_s=1) from error
    if isinstance(taken, HookForged):
        raise refuse("hook_refused", extra={"why": taken.code})
    if taken == "no_such_provider":
        raise refuse("no_such_provider")
    return Response(status_code=204)
