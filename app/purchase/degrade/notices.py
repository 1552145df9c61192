"""What a ticket says beyond its own state while something around it is out of order: a stable code, and the words.

One at a time, the weightiest. Codes are for programs (an unknown one: show the words); the words are for people, in the
languages that texts have. (What an SMS would have said, had a channel taken it, is the ticket's `message`.)
"""

from __future__ import annotations

from typing import Final

import msgspec

WORDS: Final[dict[str, dict[str, str]]] = {
    "payment_delayed": {
        "zh-CN": "支付渠道暂时不可用，您的名额已为您保留。恢复后请在本页继续支付，付款时限不足时会适当延长。",
        "en": "Payment is out of order for the moment. Your unit is kept: pay here as soon as it works again."
        " If time runs short, you get more.",
    },
    "deadline_extended": {
        "zh-CN": "因支付渠道故障，您的付款时限已延长。",
        "en": "Payment was out of order, so you have more time to pay.",
    },
}
TOLD: Final[dict[str, bytes]] = {
    code: msgspec.json.encode({"code": code, "text": words}) for code, words in WORDS.items()
}


def of_ticket(notices: str, byte: bytes, extended_s: int) -> bytes:
    """The `notice` of a winner's ticket as JSON; empty: none.

    notices: as the advisor wrote them into the sale. byte: the ticket's state. extended_s: of its order.
    """
    if byte in (b"c", b"r") and "payment" in notices.split(","):
        return TOLD["payment_delayed"]
    if byte == b"r" and extended_s:
        return TOLD["deadline_extended"]
    return b""
