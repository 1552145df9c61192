"""Where suppliers call back. Verified on the raw bytes and committed before the supplier's own success reply."""

from __future__ import annotations

from typing import Annotated, Any, cast

import msgspec
from fastapi import APIRouter, Path, Request, Response

from app.problems import bounded_body, refusals, refuse
from app.providers.registry import Providers
from app.purchase.hook import HOOK_BODY_MAX_BYTES, take_hook

router = APIRouter(tags=["hooks"])


@router.post(
    "/v1/hooks/{provider}",
    responses={
        200: {"description": "the supplier's own success reply: committed", "content": {"*/*": {}}},
        503: {"description": "not committed: call again"},
        **refusals("hook_refused", "no_such_provider", "too_large", "invalid"),
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
