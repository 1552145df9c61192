"""The pass: who may join is settled before the minute, so that the minute itself only checks one signature."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from app.buyer.challenge import Challenges
from app.buyer.identity import missing
from app.door.respond import door_of, headers_of, respond
from app.door.shapes import PassIn, PassOut
from app.problems import JsonRoute, refusals, refuse
from app.purchase.accept import Answer
from app.sale import public
from app.sealing import SealingKey, contact_aad, seal
from app.tokens import Pass

router = APIRouter(route_class=JsonRoute, tags=["tickets"])

# A pass outlives the sale by the time in which its buyer may still pay, leave or ask what became of the order.
AFTER_CLOSE_MS = 3_600_000
FLAG_DEVELOPMENT = 1  # got with X-Buyer-Id

_PHONE = re.compile(r"\+[1-9][0-9]{6,14}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}")


def contact_of(wish: PassIn, claims: Mapping[str, Any]) -> dict[str, str] | None:
    """What is kept to tell the buyer: as given, else the JWT's `phone_number` and `locale`. None without a phone."""
    if wish.contact is not None:
        phone, language = wish.contact.phone, wish.contact.language
    else:
        phone, language = claims.get("phone_number"), None  # type: ignore[assignment]
        if not isinstance(phone, str) or not _PHONE.fullmatch(phone):
            return None
    if language is None:
        locale = claims.get("locale")
        language = locale if isinstance(locale, str) and _LANGUAGE.fullmatch(locale) else "en"
    return {"phone": phone, "language": language}


@router.post(
    "/v1/sales/{sale}/pass",
    status_code=201,
    response_model=PassOut,
    responses=refusals(
        "malformed", "auth_missing", "auth_invalid", "audience", "challenge_required", "no_such_sale", "sale_closed",
        "too_large", "not_json", "invalid", "slow_down", "busy",
    ),
    summary="Get a pass for a sale",
)  # fmt: skip
async def get_pass(request: Request, sale: str, wish: PassIn | None = None) -> Response:
    """Identity is a JWT (in development also X-Buyer-Id): a pass does not make another pass."""
    door = door_of(request)
    challenges: Challenges = request.app.state.challenges
    seal_keys: Sequence[SealingKey] = request.app.state.seal_keys
    wish = wish or PassIn()
    view = door.view(sale)
    caller = await door.caller(headers_of(request), sale)
    if caller is None:
        raise missing()
    if caller.how == "pass":
        raise refuse("auth_invalid", "A pass is got with the shop's token.")
    now_ms = door.snapshots.now_ms()
    if view.closed or now_ms >= view.closes_ms:
        raise refuse("sale_closed")
    door.in_audience(view, caller)
    await door.limited(view, "pass", caller.buyer_id, door.settings.pass_rate_per_min)
    answer = wish.challenge.model_dump(exclude_none=True) if wish.challenge is not None else None
    remote_ip = request.client.host if request.client is not None else None
    await challenges.weigh(
        view.doc.get("challenge", "none"), view.id, caller.buyer_id, answer, now_ms, remote_ip
    )
    contact = contact_of(wish, caller.claims)
    if contact is not None:
        if wish.source is not None:
            contact["source"] = wish.source
        sealed = seal(seal_keys, msgspec.json.encode(contact), contact_aad(view.id, caller.buyer_id))
        await door.link.call("HSET", view.keys.contact, caller.buyer_id, sealed)
    expires_ms = view.closes_ms + int(view.doc.get("pay_within_s") or 0) * 1000 + AFTER_CLOSE_MS
    flags = FLAG_DEVELOPMENT if caller.how == "dev" else 0
    text = door.ring.pass_sign(Pass(view.id, caller.buyer_id, expires_ms, flags))
    door.counts["pass", "given"] += 1
    body = msgspec.json.encode({"pass": text, "expires_at": public.at(expires_ms)})
    return respond(
        request,
        Answer.of(201, ((b"content-type", b"application/json"), (b"cache-control", b"no-store")), body),
    )
