"""What the sandbox supplier keeps, and does: payments, refunds, texts, and the call-backs that tell of them. No HTTP
server; every table has a limit."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec

from app.providers import sandbox_wire
from app.providers.sandbox_faults import Control
from app.providers.sandbox_ledger import Ledger
from app.settings import Settings

PAYMENTS_MAX = 500_000  # the oldest ended one makes room; if it is still open: 503 not_taken
REFUNDS_MAX = 100_000
SMS_LOG_MAX = 200_000
HOOKS_MAX = 200_000  # call-backs on their way; beyond that they are lost, as with any supplier on a bad day
HOOKS_AT_ONCE_MAX = 32
HOOK_RETRIES_S = (0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300)  # a demo's version of "15 s … 24 h"
BILL_MAX = 100_000


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
            body["payment"] = public(pay)
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


def public(pay: Pay) -> dict[str, Any]:
    """What the shop is told of a payment."""
    names = (
        "ref", "attempt_id", "order_no", "amount_minor", "currency", "merchant", "state", "url", "kind", "expires_at",
        "paid_at", "capture_ref", "code",
    )  # fmt: skip
    return {name: getattr(pay, name) for name in names}
