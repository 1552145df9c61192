"""A stand-in for Stripe's API: Checkout Sessions, refunds, charges, idempotency, signed events.

Documentation: docs.stripe.com/api/checkout/sessions (expiry 30 min to 24 h; only open Sessions expire), /api/refunds,
/api/idempotent_requests (the first result of a key is kept, also a 500; other parameters are an error; `Idempotent-
Replayed`), /api/errors, /api/pagination, /webhooks#retries (live mode: up to three days, exponential back-off).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from typing import Any
from urllib.parse import parse_qsl

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from app.providers.stripe import API_VERSION
from tests.providers.standins import loopback

# "up to three days with an exponential back off": the documented frame, with doubling steps.
SCHEDULE_S = tuple(60.0 * 2**step for step in range(12))


class StripeApi:
    def __init__(self, key: str = "sk_test_stand_in", hook_secret: str = "whsec_stand_in") -> None:
        self.key, self.hook_secret = key, hook_secret
        self.sessions: dict[str, dict[str, Any]] = {}
        self.charges: dict[str, dict[str, Any]] = {}
        self.intents: dict[str, dict[str, Any]] = {}
        self.refunds: dict[str, dict[str, Any]] = {}
        self.kept: dict[str, tuple[str, int, bytes]] = {}
        self.calls: list[str] = []
        self.faults = loopback.Faults()
        self.refund_status = "succeeded"
        self.url = "http://127.0.0.1:1"

    def app(self) -> Starlette:
        guarded = {
            ("POST", "/v1/checkout/sessions"): self._create,
            ("GET", "/v1/checkout/sessions"): lambda request, body: self._list(request, self.sessions),
            ("GET", "/v1/checkout/sessions/{id}"): self._read,
            ("POST", "/v1/checkout/sessions/{id}/expire"): self._expire,
            ("POST", "/v1/refunds"): self._refund,
            ("GET", "/v1/refunds"): lambda request, body: self._list(request, self.refunds),
            ("GET", "/v1/charges"): lambda request, body: self._list(request, self.charges),
        }
        return loopback.routes(
            {route: self._checked(work) for route, work in guarded.items()}, self.faults, self.calls
        )

    # -- the gate

    def _checked(self, work: loopback.Work) -> loopback.Work:
        def run(request: Request, body: bytes) -> Response:
            if request.headers.get("authorization") != f"Bearer {self.key}":
                return _error(401, "invalid_request_error", None, "Invalid API Key provided")
            if request.headers.get("stripe-version") != API_VERSION:
                return _error(400, "invalid_request_error", None, "Invalid Stripe API version")
            key = request.headers.get("idempotency-key")
            if request.method != "POST" or key is None:
                return work(request, body)
            digest = hashlib.sha256(request.url.path.encode() + b"\n" + body).hexdigest()
            if key in self.kept:
                first, status, stored = self.kept[key]
                if first != digest:
                    return _error(
                        400,
                        "idempotency_error",
                        None,
                        "Keys for idempotent requests can only be used with the same",
                    )
                return Response(stored, status, {"idempotent-replayed": "true"}, "application/json")
            answer = work(request, body)
            if answer.status_code not in (409, 429):
                self.kept[key] = (digest, answer.status_code, bytes(answer.body))
            return answer

        return run

    # -- Checkout

    def _create(self, request: Request, body: bytes) -> Response:
        form = dict(parse_qsl(body.decode(), strict_parsing=True))
        now = int(time.time())
        expires_at = int(form.get("expires_at", now + 86_400))
        if not now + 1_800 <= expires_at <= now + 86_400:
            return _error(
                400, "invalid_request_error", "parameter_invalid", "expires_at: 30 minutes to 24 hours"
            )
        embedded = form.get("ui_mode") == "embedded_page"
        if not embedded and "success_url" not in form:
            return _error(400, "invalid_request_error", "parameter_missing", "success_url")
        if embedded and ("success_url" in form or "return_url" not in form):
            return _error(400, "invalid_request_error", "parameter_unknown", "success_url")
        currency = form["line_items[0][price_data][currency]"]
        amount = int(form["line_items[0][price_data][unit_amount]"])
        if currency != currency.lower() or amount <= 0 or form["mode"] != "payment":
            return _error(400, "invalid_request_error", "parameter_invalid", "price_data")
        session_id = "cs_test_" + secrets.token_hex(12)
        session = {
            "id": session_id,
            "object": "checkout.session",
            "status": "open",
            "payment_status": "unpaid",
            "created": now,
            "expires_at": expires_at,
            "amount_total": amount * int(form["line_items[0][quantity]"]),
            "currency": currency,
            "client_reference_id": form.get("client_reference_id"),
            "metadata": _metadata(form, "metadata"),
            "intent_metadata": _metadata(form, "payment_intent_data[metadata]"),
            "payment_intent": None,
            "url": None if embedded else f"https://checkout.stripe.com/c/pay/{session_id}",
            "client_secret": f"{session_id}_secret_x" if embedded else None,
            "livemode": False,
        }
        self.sessions[session_id] = session
        return JSONResponse(_public(session))

    def _read(self, request: Request, body: bytes) -> Response:
        session = self.sessions.get(request.path_params["id"])
        if session is None:
            return _error(404, "invalid_request_error", "resource_missing", "No such checkout.session")
        shown = _public(session)
        if (
            request.query_params.get("expand[]") == "payment_intent.latest_charge"
            and session["payment_intent"]
        ):
            intent = dict(self.intents[session["payment_intent"]])
            intent["latest_charge"] = self.charges.get(intent["latest_charge"])
            shown["payment_intent"] = intent
        return JSONResponse(shown)

    def _expire(self, request: Request, body: bytes) -> Response:
        session = self.sessions.get(request.path_params["id"])
        if session is None:
            return _error(404, "invalid_request_error", "resource_missing", "No such checkout.session")
        if session["status"] != "open":
            return _error(
                400,
                "invalid_request_error",
                None,
                'Only Checkout Sessions with a status in ["open"] can be expired.',
            )
        session["status"], session["url"] = "expired", None
        return JSONResponse(_public(session))

    def _list(self, request: Request, of: dict[str, dict[str, Any]]) -> Response:
        query = request.query_params
        limit = int(query.get("limit", "10"))
        if not 1 <= limit <= 100:
            return _error(400, "invalid_request_error", "parameter_invalid_integer", "limit")
        rows = list(reversed(of.values()))  # newest first
        for name, keep in (
            ("created[gte]", lambda row, at: row["created"] >= at),
            ("created[lt]", lambda row, at: row["created"] < at),
        ):
            if name in query:
                at = int(query[name])
                rows = [row for row in rows if keep(row, at)]
        if "payment_intent" in query:
            rows = [row for row in rows if row["payment_intent"] == query["payment_intent"]]
        if "starting_after" in query:
            ids = [row["id"] for row in rows]
            rows = rows[ids.index(query["starting_after"]) + 1 :]
        page = [_public(row) for row in rows[:limit]]
        return JSONResponse({"object": "list", "data": page, "has_more": len(rows) > limit})

    # -- what buyers and banks do

    def pay(self, session_id: str, *, later: bool = False) -> dict[str, Any]:
        """The buyer pays; later: with a bank debit that takes days. Returns the event."""
        session = self.sessions[session_id]
        assert session["status"] == "open"
        intent_id, charge_id = "pi_" + secrets.token_hex(12), "ch_" + secrets.token_hex(12)
        session.update(status="complete", payment_intent=intent_id, url=None)
        self.intents[intent_id] = {
            "id": intent_id,
            "object": "payment_intent",
            "status": "processing" if later else "succeeded",
            "latest_charge": None,
            "metadata": session["intent_metadata"],
        }
        if not later:
            self._charge(session, intent_id, charge_id)
        return self.event("checkout.session.completed", _public(session))

    def _charge(self, session: dict[str, Any], intent_id: str, charge_id: str) -> None:
        session["payment_status"] = "paid"
        self.intents[intent_id].update(status="succeeded", latest_charge=charge_id)
        self.charges[charge_id] = {
            "id": charge_id,
            "object": "charge",
            "created": int(time.time()),
            "amount_captured": session["amount_total"],
            "currency": session["currency"],
            "paid": True,
            "payment_intent": intent_id,
            "metadata": session["intent_metadata"],
        }

    def settle_later(self, session_id: str, *, paid: bool) -> dict[str, Any]:
        session = self.sessions[session_id]
        intent_id = session["payment_intent"]
        if paid:
            self._charge(session, intent_id, "ch_" + secrets.token_hex(12))
            return self.event("checkout.session.async_payment_succeeded", _public(session))
        self.intents[intent_id]["status"] = "requires_payment_method"
        return self.event("checkout.session.async_payment_failed", _public(session))

    def _refund(self, request: Request, body: bytes) -> Response:
        form = dict(parse_qsl(body.decode(), strict_parsing=True))
        charges = [one for one in self.charges.values() if one["payment_intent"] == form["payment_intent"]]
        if not charges:
            return _error(404, "invalid_request_error", "resource_missing", "No such payment_intent")
        amount = int(form["amount"])
        back = sum(
            one["amount"] for one in self.refunds.values() if one["payment_intent"] == form["payment_intent"]
        )
        if back + amount > charges[0]["amount_captured"]:
            code = "charge_already_refunded" if back else "amount_too_large"
            return _error(400, "invalid_request_error", code, "Refund amount is greater than the charge")
        refund = {
            "id": "re_" + secrets.token_hex(12),
            "object": "refund",
            "status": self.refund_status,
            "amount": amount,
            "currency": charges[0]["currency"],
            "created": int(time.time()),
            "payment_intent": form["payment_intent"],
            "metadata": _metadata(form, "metadata"),
        }
        self.refunds[refund["id"]] = refund
        return JSONResponse(refund)

    # -- events

    def event(self, kind: str, thing: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "evt_" + secrets.token_hex(12),
            "object": "event",
            "type": kind,
            "created": int(time.time()),
            "livemode": False,
            "data": {"object": thing},
        }

    def signed(self, event: dict[str, Any], at_s: int | None = None) -> tuple[dict[str, str], bytes]:
        """Headers and body of one delivery; each try is signed anew."""
        body = json.dumps(event, indent=2).encode()
        stamp = int(time.time()) if at_s is None else at_s
        digest = hmac.new(self.hook_secret.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
        return {"stripe-signature": f"t={stamp},v1={digest}", "content-type": "application/json"}, body

    def deliver(self, url: str, event: dict[str, Any], speed: float = 1e6) -> tuple[int, bool]:
        return loopback.deliver(url, lambda: self.signed(event), SCHEDULE_S, accepted, speed)


def accepted(answer: httpx.Response) -> bool:
    """Any 2xx; a redirect is a failure (docs.stripe.com/webhooks)."""
    return 200 <= answer.status_code < 300


def _metadata(form: dict[str, str], prefix: str) -> dict[str, str]:
    start = prefix + "["
    return {name[len(start) : -1]: value for name, value in form.items() if name.startswith(start)}


def _public(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "intent_metadata"}


def _error(status: int, kind: str, code: str | None, message: str) -> Response:
    return JSONResponse({"error": {"type": kind, "code": code, "message": message}}, status)
