"""The sandbox supplier as payment and SMS provider: our side of the wire (`sandbox.py` is the supplier's)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, Literal, TypeVar

import httpx
import msgspec

from app.breaker import Result
from app.providers import sandbox_wire, wire
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
    Link,
    LinkWanted,
    Payment,
    RefundState,
    RefundWanted,
)
from app.providers.sms import Sent, Text

T = TypeVar("T")


class _Payment(msgspec.Struct, kw_only=True):
    """A payment as the sandbox describes it."""

    ref: str
    attempt_id: str
    order_no: str
    amount_minor: int
    currency: str
    merchant: str
    state: Literal["waiting", "paid", "declined", "closed"]
    url: str
    kind: Literal["redirect", "qr", "sdk"] = "redirect"
    expires_at: datetime
    paid_at: datetime | None = None
    capture_ref: str | None = None
    code: str | None = None


class _Refund(msgspec.Struct, kw_only=True):
    ref: str
    refund_id: str
    state: Literal["done", "pending"]


class _Error(msgspec.Struct, kw_only=True):
    code: str


class _BillLine(msgspec.Struct, kw_only=True):
    kind: Literal["capture", "refund"]
    ref: str
    our_id: str
    order_no: str
    amount_minor: int
    currency: str
    at: datetime


class _SmsSent(msgspec.Struct, kw_only=True):
    ref: str


class _HookBody(msgspec.Struct, kw_only=True):
    id: str
    type: str
    merchant: str
    payment: _Payment | None = None
    refund: _Refund | None = None
    final: bool = True


class _Calls:
    """Signed calls to the sandbox and what its statuses mean."""

    def __init__(self, url: str, secret: str, *, deadline_s: float, connections_max: int) -> None:
        self._secrets = sandbox_wire.secrets_of(secret)
        self._client = wire.client(url, deadline_s=deadline_s, connections_max=connections_max)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def call(self, method: str, path: str, body: object, kind: type[T]) -> Answer[T]:
        """200: done. 404: Refused("absent"). 429: not done, not ill. Other 4xx: refused. 5xx: may have happened."""
        raw = b"" if body is None else msgspec.json.encode(body)
        headers = sandbox_wire.headers(self._secrets[0], method, path, raw)
        headers["content-type"] = "application/json"
        try:
            reply = await self._client.request(method, path, content=raw, headers=headers)
        except httpx.HTTPError as error:
            return wire.failed(error)
        if reply.status_code == 200:
            try:
                return Done(msgspec.json.decode(reply.content, type=kind))
            except msgspec.MsgspecError:
                return MaybeDone("malformed_answer")
        code = f"http_{reply.status_code}"
        try:
            code = msgspec.json.decode(reply.content, type=_Error).code
        except msgspec.MsgspecError:
            pass  # a proxy's page: the status alone has to do
        if reply.status_code == 404:
            return Refused("absent")
        if reply.status_code == 429:
            return NotDone(code, _retry_after_ms(reply), Result.IGNORED)
        if reply.status_code == 503 and code == "not_taken":
            return NotDone(code)  # the sandbox promises that it did nothing
        if 400 <= reply.status_code < 500:
            # 401 means that our own secret is wrong: every call will fail, so the breaker should know.
            return Refused(code, counts=Result.FAILURE if reply.status_code == 401 else Result.SUCCESS)
        return MaybeDone(code)


def _retry_after_ms(reply: httpx.Response) -> int:
    text = reply.headers.get("retry-after", "")
    return min(60_000, int(text) * 1000) if text.isascii() and text.isdigit() else 0


def _captured(payment: _Payment) -> Captured | None:
    at = payment.paid_at
    if payment.state != "paid" or payment.capture_ref is None or at is None or at.tzinfo is None:
        return None
    return Captured(
        provider_ref=payment.capture_ref,
        attempt_id=payment.attempt_id,
        order_no=payment.order_no,
        amount_minor=payment.amount_minor,
        currency=payment.currency,
        captured_at=at,
    )


class SandboxPayment:
    """Payment through the sandbox. name: of one of several."""

    channels = ("sandbox", "sandbox-qr")

    def __init__(
        self, url: str, secret: str, *, deadline_s: float, connections_max: int, name: str = "sandbox"
    ) -> None:
        self.name = name
        self._secrets = sandbox_wire.secrets_of(secret)
        self._calls = _Calls(url, secret, deadline_s=deadline_s, connections_max=connections_max)

    async def create(self, wanted: LinkWanted) -> Answer[Link]:
        body: dict[str, Any] = {
            "attempt_id": wanted.attempt_id,
            "order_no": wanted.order_no,
            "amount_minor": wanted.amount_minor,
            "currency": wanted.currency,
            "title": wanted.title,
            "channel": wanted.channel,
            "merchant": sandbox_wire.MERCHANT,
            "expires_at": wanted.expires_at,
            "return_url": wanted.return_url,
            "notify_url": wanted.notify_url,
        }
        answer = await self._calls.call("POST", "/v1/payments", body, _Payment)
        if not isinstance(answer, Done):
            return answer
        found = answer.value
        if found.state != "waiting":
            # The same key again after the buyer has paid, declined or we have closed: there is no link to show.
            return Refused(found.state)
        return Done(
            Link(
                provider_ref=found.ref,
                kind=found.kind,
                url=found.url,
                params=None,
                expires_at=found.expires_at,
            )
        )

    async def query(self, ref: AttemptRef) -> Answer[Payment]:
        return self._state(await self._calls.call("GET", f"/v1/payments/{ref.attempt_id}", None, _Payment))

    async def close(self, ref: AttemptRef) -> Answer[Payment]:
        return self._state(
            await self._calls.call("POST", f"/v1/payments/{ref.attempt_id}/close", {}, _Payment)
        )

    def _state(self, answer: Answer[_Payment]) -> Answer[Payment]:
        if isinstance(answer, Refused) and answer.code == "absent":
            return Done(Payment(state="absent"))
        if not isinstance(answer, Done):
            return answer
        found = answer.value
        captured = _captured(found)
        if found.state == "paid" and (captured is None or found.merchant != sandbox_wire.MERCHANT):
            return MaybeDone("malformed_answer")
        return Done(Payment(state=found.state, captured=captured, code=found.code))

    async def refund(self, wanted: RefundWanted) -> Answer[RefundState]:
        body = {
            "refund_id": wanted.refund_id,
            "capture_ref": wanted.capture_ref,
            "amount_minor": wanted.amount_minor,
            "currency": wanted.currency,
        }
        return self._refund(await self._calls.call("POST", "/v1/refunds", body, _Refund))

    async def refund_query(self, refund_id: str, capture_ref: str | None = None) -> Answer[RefundState]:
        return self._refund(await self._calls.call("GET", f"/v1/refunds/{refund_id}", None, _Refund))

    def _refund(self, answer: Answer[_Refund]) -> Answer[RefundState]:
        if isinstance(answer, Refused) and answer.code == "absent":
            return Done(RefundState(state="absent"))
        if not isinstance(answer, Done):
            return answer
        return Done(RefundState(state=answer.value.state, provider_ref=answer.value.ref))

    async def bill(self, day: date) -> Answer[Sequence[BillLine]]:
        answer = await self._calls.call("GET", f"/v1/bills/{day.isoformat()}", None, list[_BillLine])
        if not isinstance(answer, Done):
            return answer
        return Done(
            [
                BillLine(
                    kind=line.kind,
                    provider_ref=line.ref,
                    our_id=line.our_id,
                    order_no=line.order_no,
                    amount_minor=line.amount_minor,
                    currency=line.currency,
                    at=line.at,
                )
                for line in answer.value
            ]
        )

    def read_hook(self, headers: Mapping[str, str], raw_body: bytes, now: datetime) -> Hook:
        why = sandbox_wire.refusal(
            self._secrets, headers, "POST", "/hook", raw_body, now.astimezone(UTC).timestamp()
        )
        if why is not None:
            return HookForged(why)
        try:
            body = msgspec.json.decode(raw_body, type=_HookBody)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return HookForged("malformed")
        if body.merchant != sandbox_wire.MERCHANT:
            return HookForged("merchant_wrong")
        if body.refund is not None and body.type == "refund.done":
            return HookRefunded(
                event_id=body.id, refund_id=body.refund.refund_id, provider_ref=body.refund.ref
            )
        payment = body.payment
        if payment is None:
            return HookOther(event_id=body.id, kind=body.type)
        if payment.merchant != sandbox_wire.MERCHANT:
            return HookForged("merchant_wrong")
        if body.type == "payment.paid":
            captured = _captured(payment)
            return (
                HookForged("malformed") if captured is None else HookPaid(event_id=body.id, captured=captured)
            )
        if body.type == "payment.declined":
            return HookDeclined(
                event_id=body.id,
                attempt_id=payment.attempt_id,
                order_no=payment.order_no,
                code=payment.code or "declined",
                final=body.final,
            )
        if body.type == "payment.closed":
            return HookClosed(
                event_id=body.id,
                attempt_id=payment.attempt_id,
                order_no=payment.order_no,
                code=payment.code or "closed",
            )
        return HookOther(event_id=body.id, kind=body.type)

    def hook_reply(self, ok: bool) -> HookAnswer:
        return HookAnswer(200, b'{"ok":true}') if ok else HookAnswer(503, b'{"ok":false}')

    async def aclose(self) -> None:
        await self._calls.aclose()


class SandboxSms:
    """SMS through the sandbox: into its log. name: of one of several."""

    def __init__(
        self, url: str, secret: str, *, deadline_s: float, connections_max: int, name: str = "sandbox-sms"
    ) -> None:
        self.name = name
        self._calls = _Calls(url, secret, deadline_s=deadline_s, connections_max=connections_max)

    async def send(self, text: Text) -> Answer[Sent]:
        body = {
            "id": text.id,
            "phone": text.phone,
            "language": text.language,
            "template": text.template,
            "body": text.body,
        }
        answer = await self._calls.call("POST", "/v1/sms", body, _SmsSent)
        return Done(Sent(answer.value.ref)) if isinstance(answer, Done) else answer

    async def aclose(self) -> None:
        await self._calls.aclose()
