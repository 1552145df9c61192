"""Texts to buyers about their order: at most once. What no channel takes in time is on the ticket too.

The row is `sending` before a supplier is called. Suppliers are tried in their route's order, the next one only when the
text certainly was not sent: the breaker is open, no connection, refused before processing, or a refusal that another
supplier may not share. None could: again until it would come too late. Unknown: never again, nowhere else. A number
gets only so many texts a minute, an hour and a day; one too many waits. Phone numbers are opened here, for the one
call, and go nowhere else.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, assert_never

import msgspec
import structlog
from prometheus_client import Counter
from sqlalchemy.ext.asyncio import AsyncEngine

from app.answers import Wait
from app.errors import DidNotHappen, Unknown
from app.ledger import orders, sms
from app.ledger.engine import alone
from app.providers.answer import Answer, Done, MaybeDone, NotDone, Refused
from app.providers.payment import HookForged
from app.providers.registry import Providers
from app.providers.sms import ReportsByToken, ReportsStatus, Sent, Text
from app.scripts import Scripts
from app.sealing import CannotOpen, SealingKey, contact_aad, number_index, sealing_keys, unseal
from app.settings import Settings
from app.texts import KINDS, Kind, language_of, render, values
from app.work.leased import again_and_again, backoff_s, work_off
from app.work.lookout import Lookout

Row = dict[str, Any]
log = structlog.get_logger()

SWEEP_EVERY_S = 1.0
SHOW_EVERY_S = 1.0
SHOW_MAX = 200  # texts put on tickets in one transaction
LEASE_SHARE = 0.5  # of a lease that may be over when another supplier is begun with

TEXTS = Counter("fairdrop_sms", "Texts by template and what became of them", ["template", "outcome"])
FAILOVERS = Counter(
    "fairdrop_sms_failovers", "Texts handed on, by the supplier that did not take them", ["provider"]
)

# What the guard itself answers, without a call: for sure nothing has left us.
NOT_CALLED = frozenset({"breaker_open", "no_place"})


class Contact(msgspec.Struct, frozen=True):
    """What the buyer left: a phone number (E.164) and a language (BCP 47)."""

    phone: str | None = None
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How many texts a number gets. GCRA, so that no window of a minute, an hour or 24 h ever sees more."""

    per_min: int
    per_hour: int
    per_day: int

    @staticmethod
    def gcra(count: int, window_ms: int) -> tuple[int, int]:
        """(period in ms, burst) under which no window holds more than `count`: half of them at once, then spread.

        In a window fit burst + floor((window - 1 ms) / period): with the period below, exactly `count`.
        """
        burst = (count + 1) // 2
        return -(-window_ms // (count - burst + 1)), burst

    async def wait_ms(self, scripts: Scripts, key: SealingKey, phone: str) -> int:
        """Count one text to this number; 0: it may go. Else nothing was counted, and it may go in so many ms.

        Without Redis it may go: the suppliers have limits of their own, and a text that waits helps nobody.
        """
        minute, hour, day = (
            self.gcra(self.per_min, 60_000),
            self.gcra(self.per_hour, 3_600_000),
            self.gcra(self.per_day, 86_400_000),
        )
        try:
            answer = await scripts.sms_take(
                number=number_index(key, phone).hex(),
                minute_period=minute[0],
                minute_burst=minute[1],
                hour_period=hour[0],
                hour_burst=hour[1],
                day_period=day[0],
                day_burst=day[1],
            )
        except (DidNotHappen, Unknown) as error:
            log.warning("sms_limits_not_asked", error=type(error).__name__)
            return 0
        return answer.ms if isinstance(answer, Wait) else 0


@dataclass(frozen=True, slots=True)
class Teller:
    """What every step here needs."""

    engine: AsyncEngine
    providers: Providers
    scripts: Scripts
    keys: Sequence[SealingKey]
    limits: Limits
    lease_s: float
    shown_after_s: float

    def route(self, key: str) -> list[str]:
        """The suppliers to be tried for this text, the first one first."""
        return [name for name in self.providers.routes.order("sms", None, key) if name in self.providers.sms]

    def room(self) -> int:
        """How many texts may begin now: what the roomiest supplier takes, for the next one takes over from it."""
        return max((self.providers.sms[name].guard.ready() for name in self.route("")), default=0)


async def run(
    engine: AsyncEngine,
    scripts: Scripts,
    providers: Providers,
    settings: Settings,
    stopping: asyncio.Event,
    lookout: Lookout,
) -> None:
    """Send due texts until `stopping` is set, and show those on the ticket that nobody takes."""
    limits = Limits(settings.sms_number_per_min, settings.sms_number_per_hour, settings.sms_number_per_day)
    keys = sealing_keys(settings.pii_keys.get_secret_value())
    teller = Teller(engine, providers, scripts, keys, limits, settings.lease_s, settings.sms_shown_after_s)
    places = settings.tell_concurrency

    async def lease(count: int) -> list[Row]:
        async with alone(engine) as conn:
            return await sms.lease_due(conn, count, settings.lease_s, settings.sms_ttl_s)

    async with asyncio.TaskGroup() as group:
        group.create_task(
            work_off(
                "tell",
                lease,
                lambda row: send(teller, row),
                lambda running: min(places - running, teller.room()),
                stopping,
                lookout,
                lookout.bell("texts"),
            )
        )
        sweep, shows = partial(_sweep, engine, settings.sms_ttl_s), partial(show, teller)
        waits, unshown = lookout.bell("text_waits"), lookout.bell("unshown")
        group.create_task(again_and_again("sweep texts", sweep, SWEEP_EVERY_S, stopping, waits))
        group.create_task(again_and_again("show texts", shows, SHOW_EVERY_S, stopping, unshown))


async def _sweep(engine: AsyncEngine, ttl_s: float) -> None:
    async with alone(engine) as conn:
        dropped, unknown = await sms.sweep(conn, ttl_s)
    if dropped:
        TEXTS.labels("any", "dropped").inc(dropped)
    if unknown:
        TEXTS.labels("any", "unknown").inc(unknown)


# Sending

Next = Literal["sent", "unknown", "failed", "again", "next"]


def next_step(kind: Kind, answer: Answer[Sent]) -> Next:
    """What follows an answer. next: another supplier may be asked; none left: `again` or, if it was refused, `failed`.

    A one-time text ends with the first call that left us: it is not known to have been read by nobody.
    """
    match answer:
        case Done():
            return "sent"
        case MaybeDone():
            return "unknown"
        case NotDone():
            return "next" if not kind.one_time or answer.code in NOT_CALLED else "failed"
        case Refused():
            return "next" if answer.other_may and not kind.one_time else "failed"
        case _:
            assert_never(answer)


async def send(teller: Teller, row: Row) -> None:
    """Send one leased text, if what it says is still true, and store what became of it."""
    held, template = (row["id"], row["generation"]), row["template"]
    began = time.monotonic()
    kind = KINDS.get(template)
    if kind is None or row["order_state"] not in kind.true_in:
        await _end(teller, held, template, "dropped", "overtaken")
        return
    contact = _open(teller.keys, row)
    if contact is None or not contact.phone:
        await _end(teller, held, template, "dropped", "no_contact")
        return
    if not row["counted"]:
        wait_ms = await teller.limits.wait_ms(teller.scripts, teller.keys[0], contact.phone)
        if wait_ms:
            await _again(teller, held, template, wait_ms / 1000, "limited", counted=False)
            return
    language = language_of(contact.language)
    text = Text(
        id=row["id"],
        phone=contact.phone,
        language=language,
        template=template,
        body=render(template, language, row),
        params=values(row),
    )
    not_done: list[NotDone] = []
    refused: Refused | None = None
    before = ""
    for name in teller.route(row["id"]):
        if not_done and time.monotonic() - began > teller.lease_s * LEASE_SHARE:
            break  # the lease must outlast the call: a text whose lease has ended counts as sent
        if before:
            FAILOVERS.labels(before).inc()
        before = name
        answer = await teller.providers.sms[name].send(text)
        match next_step(kind, answer):
            case "sent":
                assert isinstance(answer, Done)
                async with teller.engine.begin() as conn:
                    await sms.end(conn, held, "sent", provider=name, provider_ref=answer.value.provider_ref)
                TEXTS.labels(template, "sent").inc()
                return
            case "unknown" | "failed" as state:
                assert not isinstance(answer, Done)
                await _end(teller, held, template, state, answer.code, provider=name)
                return
        if isinstance(answer, NotDone):
            not_done.append(answer)
        elif isinstance(answer, Refused):
            refused = answer
    if not_done or refused is None:
        # The first that may be tried again says when.
        at_least_ms = min((answer.retry_in_ms for answer in not_done), default=0)
        code = not_done[0].code if not_done else "no_supplier"
        await _again(teller, held, template, backoff_s(row["tries"], at_least_ms), code, counted=True)
    else:
        await _end(teller, held, template, "failed", refused.code)


async def _again(
    teller: Teller, held: tuple[str, int], template: str, wait_s: float, code: str, *, counted: bool
) -> None:
    async with teller.engine.begin() as conn:
        await sms.again(conn, held, wait_s, code, counted=counted)
    TEXTS.labels(template, "limited" if code == "limited" else "again").inc()


async def _end(
    teller: Teller,
    held: tuple[str, int],
    template: str,
    state: str,
    code: str,
    *,
    provider: str | None = None,
) -> None:
    async with teller.engine.begin() as conn:
        await sms.end(conn, held, state, code=code, provider=provider)
    TEXTS.labels(template, state).inc()


def _open(keys: Sequence[SealingKey], row: Row) -> Contact | None:
    """The contact that was sealed for this sale and buyer; None: there is none, or nobody can open it."""
    if row["contact"] is None:
        return None
    try:
        plain = unseal(keys, bytes(row["contact"]), contact_aad(row["sale"], row["buyer_id"]))
        return msgspec.json.decode(plain, type=Contact)
    except (CannotOpen, msgspec.MsgspecError) as error:
        log.error("contact_cannot_be_opened", sms=row["id"], error=type(error).__name__)
        return None


# Reports

Taken = Literal["taken", "known", "no_such_provider"]


async def take_report(
    engine: AsyncEngine, providers: Providers, name: str, headers: Mapping[str, str], raw_body: bytes
) -> Taken | HookForged:
    """A supplier's signed report of what became of a text. HookForged: refuse it; nothing changed."""
    provider = providers.sms.get(name)
    if provider is None or not isinstance(provider.adapter, ReportsStatus):
        return "no_such_provider"
    status = provider.adapter.read_status({key.lower(): value for key, value in headers.items()}, raw_body)
    if isinstance(status, HookForged):
        TEXTS.labels("any", "report_refused").inc()
        log.warning("sms_report_refused", provider=name, code=status.code)
        return status
    if status.arrived is None:
        return "known"
    async with alone(engine) as conn:
        changed = await sms.report(conn, name, status.provider_ref, status.arrived, status.code)
    if changed:
        TEXTS.labels("any", "delivered" if status.arrived else "not_delivered").inc()
    return "taken" if changed else "known"


async def take_reports(
    engine: AsyncEngine, providers: Providers, name: str, token: str, raw_body: bytes
) -> bytes | HookForged | Literal["no_such_provider"]:
    """Reports that a secret address vouches for; all of a call are kept, or none. What to answer, in JSON."""
    provider = providers.sms.get(name)
    if (
        provider is None
        or not isinstance(provider.adapter, ReportsByToken)
        or not provider.adapter.report_token
    ):
        return "no_such_provider"
    if not hmac.compare_digest(provider.adapter.report_token.encode(), token.encode()):
        TEXTS.labels("any", "report_refused").inc()
        log.warning("sms_report_refused", provider=name, code="token_wrong")
        return HookForged("token_wrong")
    found = provider.adapter.read_reports(raw_body)
    if isinstance(found, HookForged):
        TEXTS.labels("any", "report_refused").inc()
        log.warning("sms_report_refused", provider=name, code=found.code)
        return found
    changed: list[bool] = []
    async with engine.begin() as conn:
        for one in found:
            if one.arrived is not None and await sms.report(
                conn, name, one.provider_ref, one.arrived, one.code
            ):
                changed.append(one.arrived)
    for arrived in changed:
        TEXTS.labels("any", "delivered" if arrived else "not_delivered").inc()
    return provider.adapter.report_answer


# On the ticket


async def show(teller: Teller) -> bool:
    """Put texts that no channel took in time on their tickets, in the buyer's language. Whether there are more."""
    async with teller.engine.begin() as conn:
        rows = await sms.unshown(conn, teller.shown_after_s, SHOW_MAX)
        bodies = [_body(teller.keys, row) for row in rows]
        if rows:
            await sms.show(conn, [row["id"] for row in rows], bodies)
        # In one order, whoever else takes locks on several orders.
        for number in sorted({row["order_no"] for row, body in zip(rows, bodies, strict=True) if body}):
            await orders.bump(conn, number)
    told = sum(map(bool, bodies))
    if told:
        TEXTS.labels("any", "shown").inc(told)
    return len(rows) == SHOW_MAX


def _body(keys: Sequence[SealingKey], row: Row) -> str:
    """The text for the ticket; '' where it is no longer true, or nobody left a contact to be told at."""
    kind = KINDS.get(row["template"])
    if kind is None or row["order_state"] not in kind.true_in:
        return ""
    contact = _open(keys, row)
    return "" if contact is None else render(row["template"], language_of(contact.language), row)
