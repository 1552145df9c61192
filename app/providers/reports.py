"""Delivery reports of suppliers that do not sign them: Aliyun's SmsReport and Tencent Cloud's SMS status call-back.

Neither documents a signature, so what vouches for a report is a secret in the address that it is sent to, known to us
and the supplier's console. Without one (the default) none is taken. The worst that somebody with the secret can do is
to say of a text whose reference they know that it has arrived, or never will: then it is shown on the ticket.

Sources: help.aliyun.com/document_detail/101867.htm, cloud.tencent.com/document/product/382/5807.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from app.errors import CannotStart
from app.providers.payment import HookForged

T = TypeVar("T")
TOKEN = re.compile(r"[A-Za-z0-9_-]{24,128}")  # 24 characters of 64: 144 bits
CODE_MAX = 64  # characters of a reason that is kept


def report_token(value: str, setting: str) -> str:
    """A token as the settings have it; empty: no reports are taken. CannotStart: it could be guessed, or is no path."""
    if value and not TOKEN.fullmatch(value):
        raise CannotStart(
            f"{setting}: 24 to 128 letters, digits, - and _ make an address that nobody guesses"
        )
    return value


def rows(raw_body: bytes, kind: type[T]) -> list[T] | HookForged:
    """The reports of one call; the limit of a call-back's body is theirs too."""
    try:
        return msgspec.json.decode(raw_body, type=list[kind])  # type: ignore[valid-type]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return HookForged("malformed")
