"""Payments through Stripe Checkout: a hosted page (redirect) or the embedded form (sdk).

Sources: docs.stripe.com/api/checkout/sessions, /api/refunds, /api/idempotent_requests, /api/errors, /webhooks,
/currencies. One attempt is one Checkout Session; its PaymentIntent is the capture that refunds name.

| our word | at Stripe |
|---|---|
| attempt_id | `client_reference_id`, `metadata[attempt_id]`, and the Idempotency-Key of create |
| provider_ref of a link | Checkout Session `cs_…` |
| provider_ref of a capture | PaymentIntent `pi_…` |
| refund_id | `metadata[refund_id]`, and the Idempotency-Key of refund |

- A Session lives 30 minutes to 24 hours. Where our deadline is nearer, the Session outlives the link's `expires_at`
  and is closed by `close`, which every attempt gets before its order expires; the buyer is told our time.
- Sessions cannot be searched by our id. One whose reference was lost with the answer of create is looked for in the
  list of open ones; one that cannot be found can be paid by nobody, because its URL was in the lost answer.
- Idempotency-Keys are bound to the parameters. A create that is repeated with others (its deadline has moved) is
  answered `idempotency_error`: then the first Session exists, is looked for and returned.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, TypeVar

import httpx
import msgspec

from app.breaker import Result
from app.providers import money, signing, wire
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.payment import (
    AttemptRef,
    BillLine,
    Captured,
    Hook,
    HookAnswer,
    HookClosed,
    HookDeclined,
    HookForged,
    HookOther,
    HookPaid,
    HookRefunded,
    HookRefundFailed,
    Link,
    LinkWanted,
    Payment,
    RefundState,
    RefundWanted,
)

T = TypeVar("T")

API_URL: Final = "https://api.stripe.com"
# Answers and events are shaped by this version, whatever the account's default is (docs.stripe.com/api/versioning).
API_VERSION: Final = "2026-10-28.endive"
SESSION_MIN = timedelta(
    minutes=30, seconds=30
)  # 30 minutes by Stripe's clock; the rest is for the way and the clocks
SESSION_MAX = timedelta(hours=24) - timedelta(seconds=30)
PAGE = 100  # objects in a list answer, Stripe's most
SCAN_PAGES_MAX = 5  # pages looked through for one lost Session: more would not fit into the call's deadline
BILL_PAGES_MAX = 1_000
SIGNATURES_MAX = 8  # `v1` entries in one header; Stripe sends one for each secret while one is rolled

# Stripe counts these currencies' amounts in other units than ISO 4217 does (docs.stripe.com/currencies#special-cases).
_STRIPE_EXPONENT = {"ISK": 2, "UGX": 2, "MGA": 0}
_TENS = frozenset({"BHD", "JOD", "KWD", "OMR", "TND"})  # three digits, of which the last must be 0


def stripe_amount(amount_minor: int, currency: str) -> int | None:
    """Our minor units → Stripe's `amount`. None: Stripe cannot charge exactly this."""
    steps = _STRIPE_EXPONENT.get(currency, money.exponent(currency)) - money.exponent(currency)
    if steps >= 0:
        amount = amount_minor * int(10**steps)
    else:
        amount, rest = divmod(amount_minor, int(10**-steps))
        if rest:
            return None
    return None if currency in _TENS and amount % 10 else amount


def minor_amount(amount: int, currency: str) -> int | None:
    """Stripe's `amount` → our minor units. None: a fraction of a minor unit, which never was asked for."""
    steps = money.exponent(currency) - _STRIPE_EXPONENT.get(currency, money.exponent(currency))
    if steps >= 0:
        return amount * int(10**steps)
    whole, rest = divmod(amount, int(10**-steps))
    return None if rest else whole


class _Charge(msgspec.Struct, kw_only=True):
    id: str
    created: int
    amount_captured: int = 0
    currency: str = ""
    paid: bool = False
    payment_intent: str | None = None
    metadata: dict[str, str] = {}


class _Intent(msgspec.Struct, kw_only=True):
    id: str
    status: str = ""
    latest_charge: _Charge | str | None = None
    metadata: dict[str, str] = {}


class _Session(msgspec.Struct, kw_only=True):
    id: str
    status: str | None = None  # open | complete | expired
    payment_status: str = "unpaid"  # paid | unpaid | no_payment_required
    created: int = 0
    expires_at: int = 0
    amount_total: int | None = None
    currency: str | None = None
    client_reference_id: str | None = None
    metadata: dict[str, str] | None = None
    payment_intent: _Intent | str | None = None
    url: str | None = None
    client_secret: str | None = None


class _Refund(msgspec.Struct, kw_only=True):
    id: str
    status: str | None = None  # pending | requires_action | succeeded | failed | canceled
    amount: int = 0
    currency: str = ""
    created: int = 0
    payment_intent: str | None = None
    metadata: dict[str, str] | None = None


class _List(msgspec.Struct, kw_only=True):
    data: list[msgspec.Raw]
    has_more: bool = False


class _Id(msgspec.Struct):
    id: str


class _ErrorBody(msgspec.Struct, kw_only=True):
    type: str = ""
    code: str | None = None
    decline_code: str | None = None


class _Error(msgspec.Struct):
    error: _ErrorBody


class _EventData(msgspec.Struct):
    object: msgspec.Raw


class _Event(msgspec.Struct, kw_only=True):
    id: str
    type: str
    created: int
    data: _EventData


class Stripe:
    """Payment through Stripe."""

    name = "stripe"
    channels = ("stripe", "stripe-embedded")

    def __init__(
        self,
        key: str,
        hook_secrets: Sequence[str],
        *,
        deadline_s: float,
        connections_max: int,
        url: str = API_URL,
        return_url: str = "",
        methods: Sequence[str] = ("card",),
    ) -> None:
        """hook_secrets: `whsec_…` of the endpoint; several while one is rolled. methods: [] = as the dashboard says."""
        self._secrets = [secret.encode() for secret in hook_secrets]
        self._return_url = return_url
        self._methods = tuple(methods)
        self._client = wire.client(url, deadline_s=deadline_s, connections_max=connections_max)
        self._client.headers["authorization"] = f"Bearer {key}"
        self._client.headers["stripe-version"] = API_VERSION

    async def aclose(self) -> None:
        await self._client.aclose()

    # -- calls

    async def _call(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        params: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Answer[T]:
        return (await self._send(method, path, kind, params=params, data=data, key=key))[0]

    async def _send(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        params: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> tuple[Answer[T], bool]:
        """The answer, and whether it is the stored one of an earlier call with the same key."""
        headers = {} if key is None else {"idempotency-key": key}
        try:
            reply = await self._client.request(method, path, params=params, data=data, headers=headers)
        except httpx.HTTPError as error:
            return wire.failed(error), False
        return _answer(reply, kind), reply.headers.get("idempotent-replayed") == "true"

    async def _pages(
        self, path: str, params: Mapping[str, str], pages_max: int
    ) -> AsyncIterator[Answer[list[msgspec.Raw]]]:
        """The pages of a list, newest first; ends after an answer that is not Done. Refused("too_many"): cut off."""
        after: dict[str, str] = {}
        for _ in range(pages_max):
            answer = await self._call("GET", path, _List, params={**params, "limit": str(PAGE), **after})
            if not isinstance(answer, Done):
                yield answer
                return
            page = answer.value
            yield Done(page.data)
            if not page.has_more or not page.data:
                return
            after = {"starting_after": msgspec.json.decode(page.data[-1], type=_Id).id}
        yield Refused("too_many")

    # -- payments

    async def create(self, wanted: LinkWanted) -> Answer[Link]:
        amount = stripe_amount(wanted.amount_minor, wanted.currency)
        if amount is None:
            return Refused("amount_not_chargeable", other_may=True)
        back = wanted.return_url or self._return_url
        if not back:
            return Refused("return_url_missing", other_may=True)
        now = datetime.now(UTC)
        expires_at = min(max(wanted.expires_at, now + SESSION_MIN), now + SESSION_MAX)
        data = {
            "mode": "payment",
            "client_reference_id": wanted.attempt_id,
            "expires_at": str(int(expires_at.timestamp())),
            "line_items[0][quantity]": "1",
            "line_items[0][price_data][currency]": wanted.currency.lower(),
            "line_items[0][price_data][unit_amount]": str(amount),
            "line_items[0][price_data][product_data][name]": wanted.title[:250],
        }
        for prefix in (
            "metadata",
            "payment_intent_data[metadata]",
        ):  # the second is copied to the charge: the bill
            data[f"{prefix}[attempt_id]"] = wanted.attempt_id
            data[f"{prefix}[order_no]"] = wanted.order_no
        for index, method in enumerate(self._methods):
            data[f"allowed_payment_method_types[{index}]"] = method
        if wanted.channel == "stripe-embedded":
            data["ui_mode"] = "embedded_page"
            data["return_url"] = back
        else:
            data["success_url"] = data["cancel_url"] = back
        answer, replayed = await self._send(
            "POST", "/v1/checkout/sessions", _Session, data=data, key=wanted.attempt_id
        )
        if replayed and isinstance(answer, Done):  # as it was then; meanwhile it may have been paid or closed
            answer = await self._call("GET", f"/v1/checkout/sessions/{answer.value.id}", _Session)
        if isinstance(answer, Refused) and answer.code == "key_reused":
            found = await self._find(wanted.attempt_id)
            if not isinstance(found, Done):
                return found
            if found.value is None:
                return MaybeDone("key_reused", counts=Result.IGNORED)
            answer = Done(found.value)
        if not isinstance(answer, Done):
            return answer
        session = answer.value
        if session.status != "open":
            return Refused("paid" if session.payment_status == "paid" else "closed")
        until = min(wanted.expires_at, datetime.fromtimestamp(session.expires_at, UTC))
        if session.client_secret is not None:
            return Done(
                Link(
                    provider_ref=session.id,
                    kind="sdk",
                    url=None,
                    params={"client_secret": session.client_secret},
                    expires_at=until,
                )
            )
        if session.url is None:
            return MaybeDone("malformed_answer")
        return Done(
            Link(provider_ref=session.id, kind="redirect", url=session.url, params=None, expires_at=until)
        )

    async def query(self, ref: AttemptRef) -> Answer[Payment]:
        found = await self._session(ref)
        if not isinstance(found, Done):
            return Done(Payment(state="absent")) if _absent(found) else found
        return Done(Payment(state="absent")) if found.value is None else self._state(ref, found.value)

    async def close(self, ref: AttemptRef) -> Answer[Payment]:
        if ref.provider_ref is None:
            found = await self._find(ref.attempt_id)
            if not isinstance(found, Done):
                return found
            if found.value is None:
                return Done(Payment(state="absent"))  # nobody has its URL, if it exists
            ref = AttemptRef(attempt_id=ref.attempt_id, order_no=ref.order_no, provider_ref=found.value.id)
        answer = await self._call("POST", f"/v1/checkout/sessions/{_path(ref)}/expire", _Session, data={})
        if isinstance(answer, Refused) and answer.counts is Result.SUCCESS:
            # Only an open Session can be expired. Which other state it is in decides; `processing` is none of them.
            answer = await self._session(ref)
        if not isinstance(answer, Done):
            return Done(Payment(state="absent")) if _absent(answer) else answer
        state = self._state(ref, answer.value)
        if isinstance(state, Done) and state.value.state == "waiting":
            return MaybeDone("processing", counts=Result.SUCCESS)
        return state

    async def _session(self, ref: AttemptRef) -> Answer[Any]:
        """The Session of an attempt; Done(None) or Refused("absent"): there is none."""
        if ref.provider_ref is None:
            found = await self._find(ref.attempt_id, whole=True)
            if not isinstance(found, Done) or found.value is None:
                return found
            ref = AttemptRef(attempt_id=ref.attempt_id, order_no=ref.order_no, provider_ref=found.value.id)
        return await self._call(
            "GET",
            f"/v1/checkout/sessions/{_path(ref)}",
            _Session,
            params={"expand[]": "payment_intent.latest_charge"},
        )

    async def _find(self, attempt_id: str, *, whole: bool = False) -> Answer[_Session | None]:
        """Look for a Session by our id among the newest. whole: not to have seen all is MaybeDone, not "none"."""
        since = int(time.time()) - 2 * 86_400
        params = {"created[gte]": str(since)}
        async for answer in self._pages("/v1/checkout/sessions", params, SCAN_PAGES_MAX):
            if isinstance(answer, Refused) and answer.code == "too_many":
                return MaybeDone("too_many_sessions", counts=Result.IGNORED) if whole else Done(None)
            if not isinstance(answer, Done):
                return answer
            for raw in answer.value:
                try:
                    session = msgspec.json.decode(raw, type=_Session)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    return MaybeDone("malformed_answer")
                if session.client_reference_id == attempt_id:
                    return Done(session)
        return Done(None)

    def _state(self, ref: AttemptRef, session: _Session) -> Answer[Payment]:
        if session.client_reference_id != ref.attempt_id:
            return MaybeDone("foreign_session")
        match session.status, session.payment_status:
            case "open", _:
                return Done(Payment(state="waiting"))
            case "expired", _:
                return Done(Payment(state="closed", code="expired"))
            case "complete", "paid":
                captured = _captured(session, None)
                return (
                    MaybeDone("malformed_answer")
                    if captured is None
                    else Done(Payment(state="paid", captured=captured))
                )
            case "complete", "unpaid":
                # A method that pays later (bank debit): the money may still come, unless its PaymentIntent has failed.
                intent = session.payment_intent
                if isinstance(intent, _Intent) and intent.status in ("requires_payment_method", "canceled"):
                    return Done(Payment(state="declined", code="async_payment_failed"))
                return Done(Payment(state="waiting", code="processing"))
        return MaybeDone("malformed_answer")

    # -- refunds

    async def refund(self, wanted: RefundWanted) -> Answer[RefundState]:
        amount = stripe_amount(wanted.amount_minor, wanted.currency)
        if amount is None:
            return Refused("amount_not_refundable")
        data = {
            "payment_intent": wanted.capture_ref,
            "amount": str(amount),
            "metadata[refund_id]": wanted.refund_id,
            "metadata[order_no]": wanted.order_no,
        }
        answer = await self._call("POST", "/v1/refunds", _Refund, data=data, key=wanted.refund_id)
        if isinstance(answer, Refused) and answer.code == "key_reused":
            return await self.refund_query(wanted.refund_id, wanted.capture_ref)
        return _refund_state(answer.value) if isinstance(answer, Done) else answer

    async def refund_query(self, refund_id: str, capture_ref: str | None = None) -> Answer[RefundState]:
        if capture_ref is None:
            return MaybeDone("capture_unknown", counts=Result.IGNORED)
        async for answer in self._pages("/v1/refunds", {"payment_intent": capture_ref}, SCAN_PAGES_MAX):
            if not isinstance(answer, Done):
                return answer
            for raw in answer.value:
                try:
                    found = msgspec.json.decode(raw, type=_Refund)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    return MaybeDone("malformed_answer")
                if (found.metadata or {}).get("refund_id") == refund_id:
                    return _refund_state(found)
        return Done(RefundState(state="absent"))

    async def bill(self, day: date) -> Answer[Sequence[BillLine]]:
        start = datetime(day.year, day.month, day.day, tzinfo=UTC)
        params = {
            "created[gte]": str(int(start.timestamp())),
            "created[lt]": str(int((start + timedelta(days=1)).timestamp())),
        }
        lines: list[BillLine] = []
        for path in ("/v1/charges", "/v1/refunds"):
            async for answer in self._pages(path, params, BILL_PAGES_MAX):
                if not isinstance(answer, Done):
                    return answer
                try:
                    for raw in answer.value:
                        line = _charge_line(raw) if path == "/v1/charges" else _refund_line(raw)
                        if line is not None:
                            lines.append(line)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    return MaybeDone("malformed_answer")
        return Done(lines)

    # -- call-backs

    def read_hook(self, headers: Mapping[str, str], raw_body: bytes, now: datetime) -> Hook:
        why = signature_refusal(self._secrets, headers.get("stripe-signature", ""), raw_body, now)
        if why is not None:
            return HookForged(why)
        try:
            event = msgspec.json.decode(raw_body, type=_Event)
            return _meaning(event)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return HookForged("malformed")

    def hook_reply(self, ok: bool) -> HookAnswer:
        return HookAnswer(200, b'{"received":true}') if ok else HookAnswer(503, b'{"received":false}')


def _answer(reply: httpx.Response, kind: type[T]) -> Answer[T]:
    """What an answer means; a 5xx may have happened.

    Stripe answers a 5xx to the same key again from now on (docs.stripe.com/api/idempotent_requests).
    """
    status = reply.status_code
    if status == 200:
        try:
            return Done(msgspec.json.decode(reply.content, type=kind))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return MaybeDone("malformed_answer")
    body = _ErrorBody()
    try:
        body = msgspec.json.decode(reply.content, type=_Error).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass  # a proxy's page: the status alone has to do
    code = body.decline_code or body.code or body.type or f"http_{status}"
    if status == 400 and body.type == "idempotency_error":
        return Refused("key_reused")
    match status:
        case 404 if body.code == "resource_missing":
            return Refused("absent")  # only in Stripe's own words: a proxy's 404 says nothing about a payment
        case 401 | 403:  # our key: every call will fail, so the breaker should know
            return Refused(code, other_may=True, counts=Result.FAILURE)
        case 429:  # refused before the idempotency layer: nothing was done
            return NotDone(code, wire.retry_after_ms(reply), Result.IGNORED)
        case 409:  # the first call with this key is still under way
            return MaybeDone(code, counts=Result.IGNORED)
        case 400 | 402:
            return Refused(code)
    return MaybeDone(code)


def signature_refusal(secrets: Sequence[bytes], header: str, raw_body: bytes, now: datetime) -> str | None:
    """None if a `Stripe-Signature` holds, else why not (docs.stripe.com/webhooks#verify-manually)."""
    if not header:
        return "signature_missing"
    stamps: list[str] = []
    given: list[str] = []
    for part in header.split(","):
        name, _, value = part.partition("=")
        if name == "t":
            stamps.append(value)
        elif name == "v1":
            given.append(value)
    if len(stamps) != 1 or not 0 < len(given) <= SIGNATURES_MAX or not header.isascii():
        return "signature_malformed"
    stamp = signing.timestamp(stamps[0])
    if stamp is None:
        return "signature_malformed"
    if abs(now.timestamp() - stamp) > signing.WINDOW_S:
        return "timestamp_outside_window"
    found = False
    for secret in secrets:
        expected = hmac.new(secret, f"{stamp}.".encode() + raw_body, hashlib.sha256).hexdigest()
        for signature in given:
            found |= hmac.compare_digest(expected, signature)
    return None if found else "signature_wrong"


def _meaning(event: _Event) -> Hook:
    kind = event.type
    if kind.startswith("checkout.session."):
        session = msgspec.json.decode(event.data.object, type=_Session)
        attempt_id = session.client_reference_id
        order_no = (session.metadata or {}).get("order_no")
        if not attempt_id or not order_no:
            return HookOther(event_id=event.id, kind=kind)  # not of ours: the account serves other shops too
        match kind.removeprefix("checkout.session."):
            case "completed" | "async_payment_succeeded" if session.payment_status == "paid":
                captured = _captured(session, event.created)
                return (
                    HookForged("malformed")
                    if captured is None
                    else HookPaid(event_id=event.id, captured=captured)
                )
            case "async_payment_failed":
                return HookDeclined(
                    event_id=event.id,
                    attempt_id=attempt_id,
                    order_no=order_no,
                    code="async_payment_failed",
                    final=True,
                )
            case "expired":
                return HookClosed(event_id=event.id, attempt_id=attempt_id, order_no=order_no, code="expired")
    elif kind == "payment_intent.payment_failed":
        metadata = msgspec.json.decode(event.data.object, type=_Intent).metadata
        if "attempt_id" in metadata and "order_no" in metadata:
            return HookDeclined(
                event_id=event.id,
                attempt_id=metadata["attempt_id"],
                order_no=metadata["order_no"],
                code="payment_failed",
                final=False,  # the page asks for another card
            )
    elif kind in ("refund.created", "refund.updated", "refund.failed", "charge.refund.updated"):
        refund = msgspec.json.decode(event.data.object, type=_Refund)
        refund_id = (refund.metadata or {}).get("refund_id")
        if refund_id and refund.status in ("failed", "canceled"):  # failed may follow succeeded, days later
            return HookRefundFailed(event_id=event.id, refund_id=refund_id, code=f"refund_{refund.status}")
        if refund_id and refund.status == "succeeded":
            return HookRefunded(event_id=event.id, refund_id=refund_id, provider_ref=refund.id)
    return HookOther(event_id=event.id, kind=kind)


def _captured(session: _Session, at_s: int | None) -> Captured | None:
    """The money of a paid Session. at_s: of the event; a query tells the charge's own time."""
    intent = session.payment_intent
    order_no = (session.metadata or {}).get("order_no")
    if intent is None or not order_no or not session.client_reference_id:
        return None
    if session.amount_total is None or session.currency is None:
        return None
    currency = session.currency.upper()
    amount_minor = minor_amount(session.amount_total, currency)
    if amount_minor is None:
        return None
    if isinstance(intent, _Intent) and isinstance(intent.latest_charge, _Charge):
        at_s = intent.latest_charge.created
    return Captured(
        provider_ref=intent if isinstance(intent, str) else intent.id,
        attempt_id=session.client_reference_id,
        order_no=order_no,
        amount_minor=amount_minor,
        currency=currency,
        captured_at=datetime.fromtimestamp(session.created if at_s is None else at_s, UTC),
    )


def _refund_state(refund: _Refund) -> Answer[RefundState]:
    match refund.status:
        case "succeeded":
            return Done(RefundState(state="done", provider_ref=refund.id))
        case "pending" | "requires_action":
            return Done(RefundState(state="pending", provider_ref=refund.id))
        case "failed" | "canceled":
            return Done(RefundState(state="failed", provider_ref=refund.id, code=f"refund_{refund.status}"))
    return MaybeDone("malformed_answer")


def _charge_line(raw: msgspec.Raw) -> BillLine | None:
    charge = msgspec.json.decode(raw, type=_Charge)
    currency = charge.currency.upper()
    amount_minor = minor_amount(charge.amount_captured, currency)
    if (
        not charge.paid
        or not charge.amount_captured
        or "attempt_id" not in charge.metadata
        or amount_minor is None
    ):
        return None  # a failed try, or another shop of the account
    return BillLine(
        kind="capture",
        provider_ref=charge.payment_intent or charge.id,
        our_id=charge.metadata["attempt_id"],
        order_no=charge.metadata.get("order_no", ""),
        amount_minor=amount_minor,
        currency=currency,
        at=datetime.fromtimestamp(charge.created, UTC),
    )


def _refund_line(raw: msgspec.Raw) -> BillLine | None:
    refund = msgspec.json.decode(raw, type=_Refund)
    currency = refund.currency.upper()
    metadata = refund.metadata or {}
    amount_minor = minor_amount(refund.amount, currency)
    if refund.status in ("failed", "canceled") or "refund_id" not in metadata or amount_minor is None:
        return None
    return BillLine(
        kind="refund",
        provider_ref=refund.id,
        our_id=metadata["refund_id"],
        order_no=metadata.get("order_no", ""),
        amount_minor=amount_minor,
        currency=currency,
        at=datetime.fromtimestamp(refund.created, UTC),
    )


def _absent(answer: object) -> bool:
    return isinstance(answer, Refused) and answer.code == "absent"


def _path(ref: AttemptRef) -> str:
    """The Session's id as a path segment: it came from Stripe, but a database is not a reason to build any URL."""
    text = ref.provider_ref or ""
    if not (text.isascii() and text.replace("_", "").isalnum()):
        raise ValueError("not a Checkout Session id")
    return text
