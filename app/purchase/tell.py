"""Texts to buyers about their order: at most once. What a lost one would have said is on the ticket too.

The row is `sending` before the supplier is called. Certainly not sent: again until it would come too late. Unknown:
never again. Phone numbers are opened here, for the one call, and go nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, assert_never

import msgspec
import structlog
from prometheus_client import Counter
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.ledger import sms
from app.ledger.engine import alone
from app.providers.answer import Done, MaybeDone, NotDone, Refused
from app.providers.guard import GuardedSms
from app.providers.registry import Providers
from app.providers.sms import Text
from app.purchase.leased import work_off
from app.purchase.pay import backoff_s
from app.sealing import CannotOpen, SealingKey, contact_aad, sealing_keys, unseal
from app.settings import Settings

Row = dict[str, Any]
log = structlog.get_logger()

SWEEP_EVERY_S = 1.0
TITLE_MAX = 40  # characters of a title in a text: two segments at most in either language

TEXTS = Counter("fairdrop_sms", "Texts by template and what became of them", ["template", "outcome"])

# template -> order states in which it is still true; sent later it would only confuse
STILL_TRUE: dict[str, frozenset[str]] = {
    "reserved": frozenset({"reserved"}),
    "paid": frozenset({"paid"}),
    "expired": frozenset({"expired"}),
    "cancelled": frozenset({"cancelled"}),
    "refunded": frozenset({"refunded"}),
}

TEMPLATES: dict[str, dict[str, str]] = {
    "zh-CN": {
        "reserved": (
            "【{sale}】恭喜!您已抢到{item} ×{units},请在{minutes}分钟内支付{amount},逾期将自动释放。"
            "订单号{order_no}"
        ),
        "paid": "【{sale}】{item} ×{units} 付款成功({amount})。订单号{order_no}",
        "expired": "【{sale}】您的订单{order_no}未在时限内付款,{item}已释放给下一位。",
        "cancelled": "【{sale}】您的订单{order_no}({item})已取消。",
        "refunded": "【{sale}】订单{order_no}的{amount}已原路退回,到账时间以支付渠道为准。",
    },
    "en": {
        "reserved": (
            "{sale}: {item} x{units} is yours. Pay {amount} within {minutes} min or it goes to the next in line."
            " Order {order_no}"
        ),
        "paid": "{sale}: {item} x{units} is paid ({amount}). Order {order_no}",
        "expired": "{sale}: order {order_no} was not paid in time; {item} went to the next in line.",
        "cancelled": "{sale}: order {order_no} ({item}) is cancelled.",
        "refunded": "{sale}: {amount} of order {order_no} is on its way back to you.",
    },
}

# ISO 4217 currencies without a minor unit that shops use
_NO_MINOR = frozenset({"JPY", "KRW", "VND", "CLP", "XAF", "XOF", "PYG", "UGX", "ISK"})
_THREE_MINOR = frozenset({"BHD", "JOD", "KWD", "OMR", "TND", "IQD", "LYD"})


class Contact(msgspec.Struct, frozen=True):
    """What the buyer left: a phone number (E.164) and a language (BCP 47)."""

    phone: str | None = None
    language: str | None = None


async def run(engine: AsyncEngine, providers: Providers, settings: Settings, stopping: asyncio.Event) -> None:
    """Send due texts until `stopping` is set."""
    keys = sealing_keys(settings.pii_keys.get_secret_value())
    provider = next(iter(providers.sms.values()), None)
    if provider is None:
        return  # on-page only
    places = settings.tell_concurrency

    async def lease(count: int) -> list[Row]:
        async with alone(engine) as conn:
            return await sms.lease_due(conn, count, settings.lease_s)

    async with asyncio.TaskGroup() as group:
        group.create_task(
            work_off(
                "tell",
                lease,
                lambda row: send(engine, provider, keys, row),
                lambda running: min(places - running, provider.guard.ready()),
                stopping,
            )
        )
        group.create_task(_sweep(engine, stopping))


async def _sweep(engine: AsyncEngine, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        try:
            async with alone(engine) as conn:
                dropped, unknown = await sms.sweep(conn)
            if dropped:
                TEXTS.labels("any", "dropped").inc(dropped)
            if unknown:
                TEXTS.labels("any", "unknown").inc(unknown)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            log.warning("cannot_sweep_sms", error=type(error).__name__)
        try:
            async with asyncio.timeout(SWEEP_EVERY_S):
                await stopping.wait()
        except TimeoutError:
            continue


async def send(engine: AsyncEngine, provider: GuardedSms, keys: Sequence[SealingKey], row: Row) -> None:
    """Send one leased text, if what it says is still true, and store what became of it."""
    held = (row["id"], row["generation"])
    template = row["template"]
    if row["order_state"] not in STILL_TRUE.get(template, frozenset()):
        await _end(engine, held, template, "dropped", "overtaken")
        return
    contact = _open(keys, row)
    if contact is None or not contact.phone:
        await _end(engine, held, template, "dropped", "no_contact")
        return
    language = language_of(contact.language)
    answer = await provider.send(
        Text(
            id=row["id"],
            phone=contact.phone,
            language=language,
            template=template,
            body=render(template, language, row),
            params=values(row),
        )
    )
    match answer:
        case Done(sent):
            async with engine.begin() as conn:
                await sms.end(conn, held, "sent", provider=provider.name, provider_ref=sent.provider_ref)
            TEXTS.labels(template, "sent").inc()
        case NotDone():
            async with engine.begin() as conn:
                await sms.again(conn, held, backoff_s(row["tries"], answer.retry_in_ms), answer.code)
            TEXTS.labels(template, "again").inc()
        case Refused():
            await _end(engine, held, template, "failed", answer.code)
        case MaybeDone():
            await _end(engine, held, template, "unknown", answer.code)
        case _:
            assert_never(answer)


async def _end(engine: AsyncEngine, held: tuple[str, int], template: str, state: str, code: str) -> None:
    async with engine.begin() as conn:
        await sms.end(conn, held, state, code=code)
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


def language_of(wanted: str | None) -> str:
    """zh-CN for any Chinese, and where nothing is known; else en."""
    word = (wanted or "zh").lower()
    return "zh-CN" if word == "zh" or word.startswith("zh-") else "en"


def money(amount_minor: int, currency: str) -> str:
    """`12.50 CNY`, with as many decimals as the currency has."""
    if currency in _NO_MINOR:
        return f"{amount_minor} {currency}"
    digits = 3 if currency in _THREE_MINOR else 2
    return f"{amount_minor // 10**digits}.{amount_minor % 10**digits:0{digits}} {currency}"


def render(template: str, language: str, row: Row) -> str:
    """The text itself, in one line. Titles are the shop's own words, cut to TITLE_MAX."""
    return TEMPLATES[language][template].format_map(values(row))


def values(row: Row) -> dict[str, str]:
    """What a text is made with; suppliers that send approved templates only are given these."""
    return {
        "sale": _short(row["sale_title"]),
        "item": _short(row["item_title"]),
        "units": str(row["units"]),
        "amount": money(row["amount_minor"], row["currency"]),
        "minutes": str(max(1, row["pay_within_s"] // 60)),
        "order_no": row["order_no"],
    }


def _short(title: str) -> str:
    line = " ".join(title.split())
    return line if len(line) <= TITLE_MAX else line[: TITLE_MAX - 1] + "…"
