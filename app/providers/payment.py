"""What a payment supplier must be able to do. One adapter a supplier; calls go through `guard.GuardedPayment`.

Every call carries our own id (attempt, refund): the idempotency key. The same id twice is one payment, one refund.
Adapters keep no state between calls and never repeat a call by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Literal, Protocol, runtime_checkable

from app.providers.answer import Answer

LinkKind = Literal["redirect", "qr", "sdk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkWanted:
    """A payment to be made possible. amount in minor units; the link must be dead at `expires_at`, never later."""

    attempt_id: str
    order_no: str
    amount_minor: int
    currency: str
    title: str
    channel: str
    expires_at: datetime
    return_url: str | None = None
    payer: Mapping[str, Any] | None = None
    notify_url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Where the buyer pays. url for redirect and qr, params for an SDK. expires_at: as the supplier says."""

    provider_ref: str | None
    kind: LinkKind
    url: str | None
    params: Mapping[str, Any] | None
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRef:
    """Names one attempt to the supplier: our id always, theirs when known.

    expires_at: the end of the link that was handed out, None if none was. A supplier that hears of a payment only when
    the buyer opens the link (Alipay) cannot close it before; until then only its end makes it harmless.
    """

    attempt_id: str
    order_no: str
    provider_ref: str | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Money that arrived, as the supplier states it. `provider_ref` is unique for each capture at this supplier."""

    provider_ref: str
    attempt_id: str
    order_no: str
    amount_minor: int
    currency: str
    captured_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """How an attempt stands at the supplier. absent: never heard of. captured is set if and only if state is paid."""

    state: Literal["waiting", "paid", "declined", "closed", "absent"]
    captured: Captured | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefundWanted:
    refund_id: str
    order_no: str
    attempt_id: str | None
    capture_ref: str
    amount_minor: int
    currency: str
    captured_minor: int  # WeChat Pay wants the total beside the part
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RefundState:
    """done: the money is on its way back for good. pending: accepted, ask again. absent: never heard of. failed: the
    supplier had accepted it, and has given it up; the money is still with us.

    code: of a failure, or of a pending one that a person must look at in the supplier's console.
    """

    state: Literal["done", "pending", "absent", "failed"]
    provider_ref: str | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BillLine:
    """One line of a supplier's day: what reconcile compares with our captures and refunds."""

    kind: Literal["capture", "refund"]
    provider_ref: str
    our_id: str
    order_no: str
    amount_minor: int
    currency: str
    at: datetime


# -- what a call-back says, after its signature was verified on the raw bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HookPaid:
    event_id: str
    captured: Captured


@dataclass(frozen=True, slots=True, kw_only=True)
class HookDeclined:
    event_id: str
    attempt_id: str
    order_no: str
    code: str
    final: bool  # True: this link is dead; False: the buyer may try again on the same page


@dataclass(frozen=True, slots=True, kw_only=True)
class HookClosed:
    event_id: str
    attempt_id: str
    order_no: str
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HookRefunded:
    event_id: str
    refund_id: str
    provider_ref: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HookRefundFailed:
    """A refund did not reach the buyer, perhaps after it was said to be done: the money is with us again."""

    event_id: str
    refund_id: str
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HookOther:
    """Verified, but says nothing that we act on: acknowledge it."""

    event_id: str
    kind: str


@dataclass(frozen=True, slots=True)
class HookForged:
    """Not to be believed: bad signature, foreign merchant, outside the time window, malformed. Change nothing."""

    code: str


Hook = HookPaid | HookDeclined | HookClosed | HookRefunded | HookRefundFailed | HookOther | HookForged


@dataclass(frozen=True, slots=True)
class HookAnswer:
    """What the supplier is answered. Only a 2xx stops its redelivery."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


class PaymentProvider(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def channels(self) -> Sequence[str]:
        """The channels it knows besides its own name. Any other that is routed to it means its usual way to pay."""

    async def create(self, wanted: LinkWanted) -> Answer[Link]:
        """Make a payment possible. Refused("closed"): this attempt id was closed before. Idempotent by attempt id."""

    async def query(self, ref: AttemptRef) -> Answer[Payment]:
        """How an attempt stands. Changes nothing."""

    async def close(self, ref: AttemptRef) -> Answer[Payment]:
        """Make sure that an attempt can never be paid from now on.

        Done with state closed or declined; absent: never heard of, and refused from now on; paid: too late, with the
        capture.
        """

    async def refund(self, wanted: RefundWanted) -> Answer[RefundState]:
        """Give money back. Idempotent by refund id."""

    async def refund_query(self, refund_id: str, capture_ref: str | None = None) -> Answer[RefundState]:
        """How a refund stands. Changes nothing. Stripe and Alipay find a refund only by its capture's reference."""

    async def bill(self, day: date) -> Answer[Sequence[BillLine]]:
        """Every capture and refund of one UTC day. NotDone("bill_not_ready"): the supplier has not made it yet."""

    def read_hook(self, headers: Mapping[str, str], raw_body: bytes, now: datetime) -> Hook:
        """Verify a call-back on its raw bytes and say what it means. headers: names in lower case. No I/O."""

    def hook_reply(self, ok: bool) -> HookAnswer:
        """The supplier's own word for "understood" or "again, please"."""

    async def aclose(self) -> None: ...


@runtime_checkable
class LearnsKeys(Protocol):
    """A supplier whose call-backs may be signed with a key that we have not seen yet (WeChat Pay's certificates)."""

    def key_missing(self, headers: Mapping[str, str]) -> bool:
        """Whether `read_hook` would refuse these headers for want of a key that it is worth asking for now."""

    async def learn_keys(self) -> Answer[None]:
        """Fetch the supplier's public keys of today."""


@runtime_checkable
class WantsAddress(Protocol):
    """A supplier that must be told the payer's network address (`payer["client_ip"]`) for some of its channels."""

    @property
    def address_channels(self) -> Sequence[str]: ...
