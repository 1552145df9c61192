"""The states of a ticket, their one-byte form in Redis, and the arrows between them (purchase-path.md)."""

from __future__ import annotations

from enum import StrEnum


class TicketState(StrEnum):
    """What a buyer is told. A waiting ticket's `sold_out`, `closed` and `lapsed` are computed, never stored."""

    WAITING = "waiting"
    CLAIMED = "claimed"
    RESERVED = "reserved"
    PAID = "paid"
    SOLD_OUT = "sold_out"
    CLOSED = "closed"
    LEFT = "left"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    REFUNDED = "refunded"
    LAPSED = "lapsed"


LIVE = frozenset({TicketState.WAITING, TicketState.CLAIMED, TicketState.RESERVED, TicketState.PAID})

# One byte a ticket in `outcome:<sku>`; a zero byte means that this seq was never given out.
BYTE_OF: dict[TicketState, bytes] = {
    TicketState.WAITING: b"w",
    TicketState.CLAIMED: b"c",
    TicketState.RESERVED: b"r",
    TicketState.PAID: b"p",
    TicketState.SOLD_OUT: b"s",
    TicketState.CLOSED: b"x",
    TicketState.LEFT: b"l",
    TicketState.EXPIRED: b"e",
    TicketState.CANCELLED: b"k",
    TicketState.REFUNDED: b"f",
    TicketState.LAPSED: b"o",
}
STATE_OF: dict[bytes, TicketState] = {byte: state for state, byte in BYTE_OF.items()}

# Legal steps. Late money: expired or cancelled -> paid | refunded.
ARROWS: dict[TicketState, frozenset[TicketState]] = {
    TicketState.WAITING: frozenset(
        {TicketState.CLAIMED, TicketState.SOLD_OUT, TicketState.CLOSED, TicketState.LEFT, TicketState.LAPSED}
    ),
    TicketState.CLAIMED: frozenset({TicketState.RESERVED, TicketState.CANCELLED}),
    TicketState.RESERVED: frozenset({TicketState.PAID, TicketState.EXPIRED, TicketState.CANCELLED}),
    TicketState.PAID: frozenset({TicketState.REFUNDED}),
    TicketState.EXPIRED: frozenset({TicketState.PAID, TicketState.REFUNDED}),
    TicketState.CANCELLED: frozenset({TicketState.PAID, TicketState.REFUNDED}),
    TicketState.SOLD_OUT: frozenset(),
    TicketState.CLOSED: frozenset(),
    TicketState.LEFT: frozenset(),
    TicketState.REFUNDED: frozenset(),
    TicketState.LAPSED: frozenset(),
}
