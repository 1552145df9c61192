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
import html
import ipaddress
import random
import secrets
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import msgspec
import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from app.providers import sandbox_wire
from app.providers.sandbox_ledger import Ledger
from app.settings import Settings

log = structlog.get_logger()

PAYMENTS_MAX = 500_000  # the oldest ended one makes room; if it is still open: 503 not_taken
REFUNDS_MAX = 100_000
SMS_LOG_MAX = 200_000
HOOKS_MAX = 200_000  # call-backs on their way; beyond that they are lost, as with any supplier on a bad day
HOOKS_AT_ONCE_MAX = 32
HANGS_MAX = 2_000  # requests that hang at once; beyond: 503
HANG_MAX_MS = 120_000
BODY_MAX_BYTES = 16_384
HOOK_DEADLINE_S = 5.0
HOOK_RETRIES_S = (0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300)  # a demo's version of "15 s … 24 h"
BILL_MAX = 100_000

S = TypeVar("S", bound=msgspec.Struct)
Work = Callable[[bytes], object]


# -- how to misbehave


class Faults(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of the API calls of one kind. Rates in [0, 1]; at most one of error, refuse, hang, lost applies to a call."""

    latency_ms: int = 0
    jitter_ms: int = 0
    error_rate: float = 0.0  # answers `error_status`, nothing was done
    error_status: int = 500
    refuse_rate: float = 0.0  # 503 not_taken: promises that nothing was done
    hang_rate: float = 0.0  # nothing is done and no answer comes for `hang_ms`
    lost_rate: float = (
        0.0  # it IS done (links can be paid, refunds are booked), and no answer comes for `hang_ms`
    )
    hang_ms: int = 60_000
    only: list[
        str
    ] = []  # operations that are struck (create, query, close, refund, refund_query, bill, send); [] = all


class HookFaults(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of call-backs."""

    delay_ms: int = 0
    shuffle_ms: int = 0  # each copy is late by up to this: they arrive in another order
    copies: int = 1  # each is sent so many times
    drop_rate: float = 0.0
    forge_rate: float = 0.0  # a forged copy goes along: somebody else's signature, the amount raised
    early: bool = False  # `paid` is sent before the create call has been answered


class AutoPay(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Plays the buyers: the same seed and attempt id decide alike."""

    share: float = 0.0  # of the links that are paid
    decline_share: float = 0.0  # of the links that are declined
    delay_ms: int = 500
    jitter_ms: int = 500
    seed: int = 1


class Control(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    payments: Faults = msgspec.field(default_factory=Faults)
    sms: Faults = msgspec.field(default_factory=Faults)
    hooks: HookFaults = msgspec.field(default_factory=HookFaults)
    auto_pay: AutoPay = msgspec.field(default_factory=AutoPay)
    link_life_max_s: int = 86_400  # links end by then, whatever was asked for
    late_pay: bool = False  # closed and expired links can still be paid
    refund_pending_ms: int = 0  # refunds are `pending` so long
    seed: int = 1  # of the faults' dice


# -- what it keeps


class Pay(msgspec.Struct, kw_only=True):
    ref: str
    attempt_id: str
    order_no: str
    amount_minor: int
    currency: str
    merchant: str
    title: str
    channel: str
    state: Literal["waiting", "paid", "declined", "closed"]
    url: str
    kind: str
    expires_at: datetime
    return_url: str | None = None
    notify_url: str | None = None
    paid_at: datetime | None = None
    capture_ref: str | None = None
    code: str | None = None
    refunded_minor: int = 0


class Refund(msgspec.Struct, kw_only=True):
    ref: str
    refund_id: str
    capture_ref: str
    attempt_id: str
    order_no: str
    amount_minor: int
    currency: str
    state: Literal["done", "pending"]
    at: datetime


class Sms(msgspec.Struct, kw_only=True):
    ref: str
    id: str
    phone: str
    language: str
    template: str
    body: str
    at: datetime


class PayWanted(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    attempt_id: str
    order_no: str
    amount_minor: int
    currency: str
    title: str
    channel: str
    merchant: str
    expires_at: datetime
    return_url: str | None = None
    notify_url: str | None = None


class RefundWanted(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    refund_id: str
    capture_ref: str
    amount_minor: int
    currency: str


class SmsWanted(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    id: str
    phone: str
    language: str
    template: str
    body: str


class Reply(Exception):
    """Ends a request with this status and code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


def _now() -> datetime:
    return datetime.now(UTC)


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


class Sandbox:
    """The state of the process and its call-backs under way."""

    def __init__(self, settings: Settings) -> None:
        self.secrets = sandbox_wire.secrets_of(settings.sandbox_secret.get_secret_value())
        self.public_url = (settings.sandbox_public_url or "").rstrip("/")
        self.control = Control()
        self.dice = random.Random(1)
        self.pays: OrderedDict[str, Pay] = OrderedDict()  # by attempt id
        self.by_ref: dict[str, Pay] = {}
        self.by_capture: dict[str, Pay] = {}
        self.refunds: OrderedDict[str, Refund] = OrderedDict()
        self.closed_ids: OrderedDict[str, None] = OrderedDict()  # closed before they were ever created
        self.texts: deque[Sms] = deque(maxlen=SMS_LOG_MAX)
        self.text_ids: OrderedDict[str, Sms] = OrderedDict()
        self.counts: Counter[str] = Counter()
        self.hanging = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.places = asyncio.Semaphore(HOOKS_AT_ONCE_MAX)
        self.http: httpx.AsyncClient | None = None
        self.ledger = Ledger(Path(settings.sandbox_ledger) if settings.sandbox_ledger else None)
        self.untold: list[Pay] = []  # paid before the restart, and nobody has taken the call-back yet
        self._recall()

    def _recall(self) -> None:
        """Start from what the ledger says."""
        taken: set[str] = set()
        for line in self.ledger.read():
            if line.op == "hook":
                taken.add(line.attempt)
            elif line.op == "refunded":
                refund = msgspec.json.decode(line.keep, type=Refund)
                self.refunds[refund.refund_id] = refund
                self.counts["refunded"] += 1
                self.counts["refunded_minor"] += refund.amount_minor
                self.by_capture[refund.capture_ref].refunded_minor += refund.amount_minor
            elif line.order:
                pay = msgspec.json.decode(line.keep, type=Pay)
                self.pays[pay.attempt_id] = self.by_ref[pay.ref] = pay
                if line.op == "captured" and pay.capture_ref is not None:
                    self.by_capture[pay.capture_ref] = pay
                    self.counts["captured"] += 1
                    self.counts["captured_minor"] += pay.amount_minor
            elif line.op == "closed":
                self.closed_ids[line.attempt] = None
        self.untold = [pay for pay in self.by_capture.values() if pay.attempt_id not in taken]

    def note(self, op: Literal["created", "captured", "declined", "closed"], pay: Pay) -> None:
        self.ledger.note(
            op,
            attempt=pay.attempt_id,
            order=pay.order_no,
            amount_minor=pay.amount_minor,
            currency=pay.currency,
            capture=pay.capture_ref or "",
            until=pay.expires_at.timestamp(),
            keep=pay,
        )

    # -- call-backs

    def start(self, work: Awaitable[None]) -> None:
        """Run beside the requests, up to HOOKS_MAX."""
        if len(self.tasks) >= HOOKS_MAX:
            self.counts["hooks_lost"] += 1
            if asyncio.iscoroutine(work):
                work.close()
            return
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def tell(self, pay: Pay, kind: str, refund: Refund | None = None, *, surely: bool = False) -> None:
        """Queue the signed call-back of one event, with the faults that are on now.

        surely: nobody asks about this payment any more, so one copy is not dropped (or only the daily bill would tell).
        """
        if not pay.notify_url:
            return
        event_id = f"evt_{secrets.token_hex(12)}"
        body: dict[str, Any] = {"id": event_id, "type": kind, "merchant": pay.merchant, "created_at": _now()}
        if refund is not None:
            body["refund"] = refund
        else:
            body["payment"] = _public(pay)
        raw = msgspec.json.encode(body)
        faults, dice = self.control.hooks, self.dice
        if dice.random() < faults.forge_rate:
            self.start(self._forge(pay.notify_url, body, self._late_s()))
        for copy in range(faults.copies):
            if dice.random() < faults.drop_rate and not (surely and copy == 0):
                self.counts["hooks_dropped"] += 1
                continue
            self.start(self._deliver(pay, event_id, raw, self._late_s()))

    def _late_s(self) -> float:
        faults = self.control.hooks
        return (faults.delay_ms + self.dice.random() * faults.shuffle_ms) / 1000

    async def _deliver(self, pay: Pay, event_id: str, raw: bytes, late_s: float) -> None:
        url = pay.notify_url or ""
        await asyncio.sleep(late_s)
        for retry_s in (*HOOK_RETRIES_S, None):
            # Signed anew for each try: the receiver's time window is about the sending, not about the event.
            status = await self._post(url, raw, sandbox_wire.headers(self.secrets[0], "POST", "/hook", raw))
            if 200 <= status < 300:
                self.counts["hooks_taken"] += 1
                self.ledger.note("hook", event=event_id, attempt=pay.attempt_id, order=pay.order_no)
                return
            if retry_s is None:
                self.counts["hooks_given_up"] += 1
                return
            self.counts["hooks_repeated"] += 1
            await asyncio.sleep(retry_s)

    async def _forge(self, url: str, body: dict[str, Any], late_s: float) -> None:
        await asyncio.sleep(late_s)
        raw = msgspec.json.encode(body).replace(b'"amount_minor":', b'"amount_minor":9')
        status = await self._post(
            url, raw, sandbox_wire.headers(secrets.token_bytes(32), "POST", "/hook", raw)
        )
        self.counts["forged_sent"] += 1
        if 200 <= status < 300:
            self.counts["forged_taken"] += 1

    async def _post(self, url: str, raw: bytes, headers: dict[str, str]) -> int:
        if self.http is None:
            return 0
        async with self.places:
            self.counts["hooks_sent"] += 1
            try:
                reply = await self.http.post(
                    url, content=raw, headers={**headers, "content-type": "application/json"}
                )
            except (httpx.HTTPError, httpx.InvalidURL):
                return 0
            return reply.status_code

    # -- payments

    def create(self, wanted: PayWanted, base_url: str) -> Pay:
        found = self.pays.get(wanted.attempt_id)
        if found is not None:
            self.expire(found)
            if (found.order_no, found.amount_minor, found.currency) != (
                wanted.order_no,
                wanted.amount_minor,
                wanted.currency,
            ):
                raise Reply(409, "key_reused")
            return found
        if wanted.attempt_id in self.closed_ids:
            raise Reply(409, "closed")
        if wanted.merchant != sandbox_wire.MERCHANT:
            raise Reply(403, "merchant_wrong")
        if wanted.amount_minor < 1:
            raise Reply(422, "amount_wrong")
        now = _now()
        expires_at = min(wanted.expires_at, now + timedelta(seconds=self.control.link_life_max_s))
        if expires_at <= now:
            raise Reply(422, "expires_in_the_past")
        if len(self.pays) >= PAYMENTS_MAX:
            oldest = next(iter(self.pays.values()))
            self.expire(oldest)
            if oldest.state == "waiting":
                raise Reply(503, "not_taken")
            del self.pays[oldest.attempt_id], self.by_ref[oldest.ref]
            self.by_capture.pop(oldest.capture_ref or "", None)
        ref = f"pay_{secrets.token_hex(10)}"
        pay = Pay(
            ref=ref,
            url=f"{self.public_url or base_url}/pay/{ref}",
            kind="qr" if wanted.channel.endswith("qr") else "redirect",
            state="waiting",
            attempt_id=wanted.attempt_id,
            order_no=wanted.order_no,
            amount_minor=wanted.amount_minor,
            currency=wanted.currency,
            merchant=wanted.merchant,
            title=wanted.title,
            channel=wanted.channel,
            expires_at=expires_at,
            return_url=wanted.return_url,
            notify_url=wanted.notify_url,
        )
        self.pays[pay.attempt_id] = self.by_ref[ref] = pay
        self.counts["created"] += 1
        self.note("created", pay)
        auto = self.control.auto_pay
        dice = random.Random(f"{auto.seed}:{pay.attempt_id}")
        chance, late_ms = dice.random(), auto.delay_ms + dice.random() * auto.jitter_ms
        if chance < auto.share:
            if self.control.hooks.early:
                self.pay(pay)
            else:
                self.start(self._later(late_ms / 1000, lambda: self.pay(pay)))
        elif chance < auto.share + auto.decline_share:
            self.start(self._later(late_ms / 1000, lambda: self.decline(pay)))
        return pay

    async def _later(self, late_s: float, act: Callable[[], object]) -> None:
        await asyncio.sleep(late_s)
        with contextlib.suppress(Reply):  # closed or expired in the meantime: this buyer came too late
            act()

    def expire(self, pay: Pay) -> None:
        if pay.state == "waiting" and _now() >= pay.expires_at:
            pay.state, pay.code = "closed", "expired"
            self.note("closed", pay)

    def pay(self, pay: Pay) -> Pay:
        """Take the buyer's money, once."""
        self.expire(pay)
        if pay.state == "paid":
            return pay
        late = pay.state != "waiting"
        if late and not self.control.late_pay:
            raise Reply(410, pay.code or pay.state)
        pay.state, pay.code, pay.paid_at = "paid", None, _now()
        pay.capture_ref = f"cap_{secrets.token_hex(10)}"
        self.by_capture[pay.capture_ref] = pay
        self.counts["captured"] += 1
        self.counts["captured_minor"] += pay.amount_minor
        self.note("captured", pay)
        self.tell(pay, "payment.paid", surely=late)
        return pay

    def decline(self, pay: Pay) -> Pay:
        self.expire(pay)
        if pay.state == "declined":
            return pay
        if pay.state != "waiting":
            raise Reply(410, pay.code or pay.state)
        pay.state, pay.code = "declined", "card_declined"
        self.counts["declined"] += 1
        self.note("declined", pay)
        self.tell(pay, "payment.declined")
        return pay

    def close(self, attempt_id: str) -> Pay:
        pay = self.pays.get(attempt_id)
        if pay is None:
            self.closed_ids[attempt_id] = None
            self.ledger.note("closed", attempt=attempt_id)
            while len(self.closed_ids) > PAYMENTS_MAX:
                self.closed_ids.popitem(last=False)
            raise Reply(404, "absent")
        self.expire(pay)
        if pay.state == "waiting":
            pay.state, pay.code = "closed", "closed"
            self.counts["closed"] += 1
            self.note("closed", pay)
        return pay

    def refund(self, wanted: RefundWanted) -> Refund:
        found = self.refunds.get(wanted.refund_id)
        if found is not None:
            if (found.capture_ref, found.amount_minor) != (wanted.capture_ref, wanted.amount_minor):
                raise Reply(409, "key_reused")
            return self.ripen(found)
        pay = self.by_capture.get(wanted.capture_ref)
        if pay is None:
            raise Reply(422, "capture_unknown")
        if (
            wanted.currency != pay.currency
            or not 0 < wanted.amount_minor <= pay.amount_minor - pay.refunded_minor
        ):
            raise Reply(422, "amount_wrong")
        if len(self.refunds) >= REFUNDS_MAX:
            raise Reply(503, "not_taken")
        pay.refunded_minor += wanted.amount_minor
        refund = Refund(
            ref=f"ref_{secrets.token_hex(10)}",
            refund_id=wanted.refund_id,
            capture_ref=wanted.capture_ref,
            attempt_id=pay.attempt_id,
            order_no=pay.order_no,
            amount_minor=wanted.amount_minor,
            currency=wanted.currency,
            state="pending" if self.control.refund_pending_ms else "done",
            at=_now(),
        )
        self.refunds[refund.refund_id] = refund
        self.counts["refunded"] += 1
        self.counts["refunded_minor"] += refund.amount_minor
        self.ledger.note(
            "refunded",
            attempt=refund.attempt_id,
            order=refund.order_no,
            amount_minor=refund.amount_minor,
            currency=refund.currency,
            capture=refund.capture_ref,
            refund=refund.refund_id,
            keep=refund,
        )
        if refund.state == "done":
            self.tell(pay, "refund.done", refund)
        return refund

    def ripen(self, refund: Refund) -> Refund:
        pending = timedelta(milliseconds=self.control.refund_pending_ms)
        if refund.state == "pending" and _now() >= refund.at + pending:
            refund.state = "done"
            if pay := self.by_capture.get(refund.capture_ref):
                self.tell(pay, "refund.done", refund)
        return refund

    def send(self, wanted: SmsWanted) -> Sms:
        found = self.text_ids.get(wanted.id)
        if found is not None:
            return found
        if not (wanted.phone.startswith("+") and wanted.phone[1:].isdigit() and 7 <= len(wanted.phone) <= 16):
            raise Reply(422, "phone_wrong")
        text = Sms(
            ref=f"sms_{secrets.token_hex(8)}",
            id=wanted.id,
            phone=wanted.phone,
            language=wanted.language,
            template=wanted.template,
            body=wanted.body,
            at=_now(),
        )
        self.texts.append(text)
        self.text_ids[text.id] = text
        if len(self.text_ids) > SMS_LOG_MAX:
            self.text_ids.popitem(last=False)
        self.counts["sms"] += 1
        return text

    def bill(self, day: str) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        for pay in self.by_capture.values():
            if pay.paid_at is not None and pay.paid_at.date().isoformat() == day:
                lines.append(
                    _line("capture", pay.capture_ref, pay.attempt_id, pay, pay.amount_minor, pay.paid_at)
                )
        for refund in self.refunds.values():
            if refund.at.date().isoformat() == day:
                lines.append(
                    _line("refund", refund.ref, refund.refund_id, refund, refund.amount_minor, refund.at)
                )
        if len(lines) > BILL_MAX:
            raise Reply(503, "not_taken")
        return lines


def _line(
    kind: str, ref: str | None, our_id: str, of: Pay | Refund, amount_minor: int, at: datetime
) -> dict[str, Any]:
    return {
        "kind": kind,
        "ref": ref,
        "our_id": our_id,
        "order_no": of.order_no,
        "amount_minor": amount_minor,
        "currency": of.currency,
        "at": at,
    }


def _public(pay: Pay) -> dict[str, Any]:
    """What the shop is told of a payment."""
    names = (
        "ref", "attempt_id", "order_no", "amount_minor", "currency", "merchant", "state", "url", "kind", "expires_at",
        "paid_at", "capture_ref", "code",
    )  # fmt: skip
    return {name: getattr(pay, name) for name in names}


# -- HTTP


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


def _merge(old: S, changes: object) -> S:
    """`old` with the given members replaced, members that are objects merged likewise. Reply 422: unknown or wrong."""
    document = msgspec.to_builtins(old)

    def fold(into: dict[str, Any], patch: dict[str, Any]) -> None:
        for key, value in patch.items():
            if isinstance(into.get(key), dict) and isinstance(value, dict):
                fold(into[key], value)
            else:
                into[key] = value

    if not isinstance(changes, dict):
        raise Reply(422, "invalid")
    fold(document, changes)
    try:
        return msgspec.convert(document, type=type(old))
    except msgspec.ValidationError:
        raise Reply(422, "invalid") from None


def _check(control: Control) -> Control:
    rates = [
        rate
        for faults in (control.payments, control.sms)
        for rate in (faults.error_rate, faults.refuse_rate, faults.hang_rate, faults.lost_rate)
    ] + [
        control.hooks.drop_rate,
        control.hooks.forge_rate,
        control.auto_pay.share,
        control.auto_pay.decline_share,
    ]
    times = [
        control.payments.latency_ms, control.payments.jitter_ms, control.payments.hang_ms, control.sms.latency_ms,
        control.sms.jitter_ms, control.sms.hang_ms, control.hooks.delay_ms, control.hooks.shuffle_ms,
        control.auto_pay.delay_ms, control.auto_pay.jitter_ms, control.refund_pending_ms,
    ]  # fmt: skip
    statuses = (control.payments.error_status, control.sms.error_status)
    if (
        not all(0 <= rate <= 1 for rate in rates)
        or not all(0 <= ms <= 3_600_000 for ms in times)
        or not all(400 <= status <= 599 for status in statuses)
        or max(control.payments.hang_ms, control.sms.hang_ms) > HANG_MAX_MS
        or not 0 <= control.hooks.copies <= 100
        or not 1 <= control.link_life_max_s <= 86_400
    ):
        raise Reply(422, "invalid")
    return control


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
            lambda raw: _public(sandbox.create(_aware(_read(raw, PayWanted)), base_url)),
        )  # fmt: skip

    async def query(request: Request) -> Response:
        def work(_: bytes) -> object:
            pay = sandbox.pays.get(request.path_params["attempt_id"])
            if pay is None:
                raise Reply(404, "absent")
            sandbox.expire(pay)
            return _public(pay)

        return await guarded(request, "query", sandbox.control.payments, work)

    async def close(request: Request) -> Response:
        return await guarded(
            request, "close", sandbox.control.payments,
            lambda _: _public(sandbox.close(request.path_params["attempt_id"])),
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
        return _json(_public(pay)) if _wants_json(request) else HTMLResponse(_page(pay), headers=PAGE_HEADERS)

    async def act(request: Request) -> Response:
        pay = of_ref(request)
        await _body(request)
        did = sandbox.pay(pay) if request.url.path.endswith("/pay") else sandbox.decline(pay)
        return _json(_public(did)) if _wants_json(request) else RedirectResponse(f"/pay/{pay.ref}", 303)

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
            wanted = _check(_merge(Control() if reset else sandbox.control, changes))
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


PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
}
_STYLE = (
    "body{font:17px/1.5 system-ui,sans-serif;margin:0;display:grid;place-items:center;min-height:100vh;"
    "background:#f4f5f7;color:#16181d}main{background:#fff;border-radius:16px;padding:28px;width:min(88vw,360px);"
    "box-shadow:0 2px 16px #0001}h1{font-size:18px;margin:0 0 4px}.amount{font-size:34px;font-weight:650;margin:12px 0}"
    ".small{color:#667;font-size:14px}button,a.back{display:block;width:100%;box-sizing:border-box;padding:14px;"
    "border-radius:12px;border:0;font:inherit;font-weight:600;margin-top:12px;text-align:center;text-decoration:none;"
    "cursor:pointer}.pay{background:#1a7f4b;color:#fff}.decline,a.back{background:#e8eaee;color:#16181d}"
)
_SAYS = {
    "waiting": "Sandbox supplier: no money moves.",
    "paid": "Paid. Thank you. · 已付款",
    "declined": "Declined. Ask the shop for a new link. · 付款被拒绝",
    "closed": "This link has ended. · 链接已失效",
}


def _money(amount_minor: int, currency: str) -> str:
    # A display for a sandbox: two decimals unless the currency is known to have none (ISO 4217).
    if currency in ("JPY", "KRW", "VND", "CLP"):
        return f"{amount_minor} {currency}"
    return f"{amount_minor // 100}.{amount_minor % 100:02} {currency}"


def _page(pay: Pay) -> str:
    esc = html.escape
    buttons = ""
    if pay.state == "waiting":
        buttons = (
            f'<form method="post" action="/pay/{esc(pay.ref)}/pay"><button class="pay">Pay · 付款</button></form>'
            f'<form method="post" action="/pay/{esc(pay.ref)}/decline">'
            '<button class="decline">Decline · 拒绝</button></form>'
        )
    elif pay.return_url and pay.return_url.startswith(("http://", "https://")):
        buttons = f'<a class="back" href="{esc(pay.return_url)}">Back to the shop · 返回商店</a>'
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>Sandbox payment</title>'
        f"<style>{_STYLE}</style><main><h1>{esc(pay.title)}</h1>"
        f'<div class="small">Order {esc(pay.order_no)}</div>'
        f'<div class="amount">{esc(_money(pay.amount_minor, pay.currency))}</div>'
        f'<div class="small" role="status">{_SAYS[pay.state]}</div>{buttons}</main></html>'
    )
