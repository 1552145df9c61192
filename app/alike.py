"""Statuses that differ in nothing but the order number: Redis keeps what they have in common once.

The orders of a batch are told the same, 270 bytes of JSON, but for their numbers. `claims_mark` stores that JSON as a
form in the field `=<name>` of `status`, with a zero byte where the number goes, and for each ticket only
`{"like":"<name>","order_no":"…"}`. A form is named after what it says, so it never changes and may be kept for good.
"""

from __future__ import annotations

from hashlib import blake2b

_BEGINS = b'{"like":"'
_NAME_BYTES = 8  # 64 bits: a sale has a handful of forms
_NAME_ENDS = len(_BEGINS) + 2 * _NAME_BYTES
_NUMBER_BEGINS = _NAME_ENDS + len(b'","order_no":"')


def form_of(before: bytes, behind: bytes) -> bytes:
    """The form of statuses that read `before`, an order number, `behind`. JSON holds no zero byte."""
    return before + b"\0" + behind


def name_of(form: bytes) -> str:
    """The name of a form, 16 of [0-9a-f]."""
    return blake2b(form, digest_size=_NAME_BYTES).hexdigest()


def field_of(name: str) -> str:
    """Where `status` holds the form; a ticket's field has a colon."""
    return f"={name}"


def cut(text: bytes) -> tuple[str, bytes] | None:
    """The form's name and the order number of a status that says `like`; None: it says all itself."""
    if not text.startswith(_BEGINS):
        return None
    return text[len(_BEGINS) : _NAME_ENDS].decode("ascii"), text[_NUMBER_BEGINS:-2]


def filled(form: bytes, order_no: bytes) -> bytes:
    """The status in full."""
    return form.replace(b"\0", order_no, 1)
