"""What buyers are told by SMS: one kind for each step of an order, in Chinese and in English. Pure: rows in, text out.

The same text is shown on the ticket when no channel takes it in time (purchase/tell.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

Row = Mapping[str, Any]

LANGUAGES: Final = ("zh-CN", "en")
TITLE_MAX = 40  # characters of a title in a text: two segments at most in either language


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of text. true_in: order states in which it is still true; sent later it would only confuse.

    one_time: it holds a one-time code. It is handed to one supplier, once: not again after a call that left us,
    whatever was answered, for two codes are one too many. (No kind has one yet; the rule is in `tell.next_step`.)
    """

    texts: Mapping[str, str]
    true_in: frozenset[str]
    one_time: bool = False


KINDS: Final[dict[str, Kind]] = {
    "reserved": Kind(
        {
            "zh-CN": "【{sale}】恭喜!您已抢到{item} ×{units},请在{minutes}分钟内支付{amount},逾期将自动释放。"
            "订单号{order_no}",
            "en": "{sale}: {item} x{units} is yours. Pay {amount} within {minutes} min or it goes to the next in line."
            " Order {order_no}",
        },
        frozenset({"reserved"}),
    ),
    "paid": Kind(
        {
            "zh-CN": "【{sale}】{item} ×{units} 付款成功({amount})。订单号{order_no}",
            "en": "{sale}: {item} x{units} is paid ({amount}). Order {order_no}",
        },
        frozenset({"paid"}),
    ),
    "expired": Kind(
        {
            "zh-CN": "【{sale}】您的订单{order_no}未在时限内付款,{item}已释放给下一位。",
            "en": "{sale}: order {order_no} was not paid in time; {item} went to the next in line.",
        },
        frozenset({"expired"}),
    ),
    "cancelled": Kind(
        {
            "zh-CN": "【{sale}】您的订单{order_no}({item})已取消。",
            "en": "{sale}: order {order_no} ({item}) is cancelled.",
        },
        frozenset({"cancelled"}),
    ),
    "refunded": Kind(
        {
            "zh-CN": "【{sale}】订单{order_no}的{amount}已原路退回,到账时间以支付渠道为准。",
            "en": "{sale}: {amount} of order {order_no} is on its way back to you.",
        },
        frozenset({"refunded"}),
    ),
}

# ISO 4217 currencies without a minor unit that shops use
_NO_MINOR = frozenset({"JPY", "KRW", "VND", "CLP", "XAF", "XOF", "PYG", "UGX", "ISK"})
_THREE_MINOR = frozenset({"BHD", "JOD", "KWD", "OMR", "TND", "IQD", "LYD"})

# 3GPP TS 23.038, 6.2.1: the default alphabet, and what its extension table adds (two septets each).
_GSM = frozenset(
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿"
    "abcdefghijklmnopqrstuvwxyzäöñüà"
)
_GSM_TWO = frozenset("^{}\\[~]|€\f")
GSM_ONE, GSM_EACH = 160, 153  # septets of a text that is alone, and of each part of a longer one
UCS2_ONE, UCS2_EACH = 70, 67  # UTF-16 units of the same


@dataclass(frozen=True, slots=True)
class Size:
    """What a text costs. units: septets or UTF-16 units; suppliers bill segments."""

    encoding: str  # GSM-7 | UCS-2
    units: int
    segments: int


def size_of(body: str) -> Size:
    """How a supplier that sends free text packs it. (In mainland China operators bill 70 characters, then 67.)"""
    if all(sign in _GSM or sign in _GSM_TWO for sign in body):
        # A sign of two septets is not torn apart: it may leave the last septet of a part empty.
        units = sum(2 if sign in _GSM_TWO else 1 for sign in body)
        if units <= GSM_ONE:
            return Size("GSM-7", units, 1)
        return Size("GSM-7", units, _parts([2 if sign in _GSM_TWO else 1 for sign in body], GSM_EACH))
    sizes = [len(sign.encode("utf-16-be")) // 2 for sign in body]
    units = sum(sizes)
    return Size("UCS-2", units, 1 if units <= UCS2_ONE else _parts(sizes, UCS2_EACH))


def _parts(sizes: list[int], each: int) -> int:
    parts, left = 1, each
    for size in sizes:
        if size > left:
            parts, left = parts + 1, each
        left -= size
    return parts


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


def still_true(texts: Mapping[str, str], order_state: str) -> str | None:
    """Of an order's texts by kind, the one that goes with its state. None: there is none."""
    return next((body for kind, body in texts.items() if order_state in KINDS[kind].true_in), None)


def render(kind: str, language: str, row: Row) -> str:
    """The text itself, in one line. Titles are the shop's own words, cut to TITLE_MAX."""
    return KINDS[kind].texts[language].format_map(values(row))


def values(row: Row) -> dict[str, str]:
    """What a text is made with; suppliers that send approved templates only are given these.

    row: sale_title, item_title, units, amount_minor, currency, pay_within_s, order_no.
    """
    return {
        "sale": _short(row["sale_title"]),
        "item": _short(row["item_title"]),
        "units": str(row["units"]),
        "amount": money(row["amount_minor"], row["currency"]),
        "minutes": str(max(1, row["pay_within_s"] // 60)),
        "order_no": row["order_no"],
    }


VALUES: Final = (
    "sale",
    "item",
    "units",
    "amount",
    "minutes",
    "order_no",
)  # the names that a template may use


def _short(title: str) -> str:
    line = " ".join(title.split())
    return line if len(line) <= TITLE_MAX else line[: TITLE_MAX - 1] + "…"
