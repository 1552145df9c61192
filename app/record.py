"""A history: what clients asked and were told, what the supplier did, what the stores held in the end; JSON lines.

Written by the demo's crowd, the Locust suite and the chaos tests; judged by app/history. Every line has a `t`, which
says what it is; docs: docs/history.md.

    op        one step of a client's operation: invoke, then ok, fail (certainly not done) or unknown
    supplier  money at the supplier, and call-backs that were acknowledged
    wire      a join that reached Redis, as seen by a proxy between
    mark      something that the run did: began, fault, healed, agreed, drained, poison
    run, sale, item, stream, order, refused, buried, attempt, capture, inbox, ticket    the end

Times are seconds of the epoch, by one clock of the recording process that never runs back. Amounts are minor units.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, TypeAlias

import msgspec

FORMAT = 1
NOTHING = msgspec.Raw(b"null")
FLUSH_BYTES = 256 * 1024  # of lines kept back; a recorder that is killed loses at most this


class Op(msgspec.Struct, tag_field="t", tag="op", omit_defaults=True, kw_only=True, gc=False):
    """One step of one operation of one client. `process` does one thing at a time; a buyer may have several."""

    at: float
    do: Literal["invoke", "ok", "fail", "unknown"]
    id: int  # the same for invoke and its end
    process: str
    op: str  # pass, join, poll, leave, ask_payment, pay
    buyer: str
    sale: str = ""
    sku: str = ""
    units: int = 0
    again: bool = False
    status: int = 0  # of the HTTP answer
    code: str = ""  # of the problem document
    ticket: str = ""  # ticket_id
    state: str = ""  # as told
    seq: int | None = None
    rank: int | None = None
    ahead: int | None = None
    order: str = ""
    amount_minor: int | None = None
    currency: str = ""
    payment: str = ""  # state of the payment as told
    now_ms: int | None = None  # the sale clock as told


class Supplier(msgspec.Struct, tag_field="t", tag="supplier", omit_defaults=True, kw_only=True):
    """What the supplier did. `keep` is its own record, from which the sandbox starts again."""

    at: float
    op: Literal["created", "captured", "declined", "closed", "refunded", "hook", "sms"]
    attempt: str = ""
    order: str = ""
    amount_minor: int = 0
    currency: str = ""
    capture: str = ""
    refund: str = ""
    event: str = ""  # of an acknowledged call-back
    until: float = 0.0  # when a created link ends by itself
    keep: msgspec.Raw = NOTHING


class Wire(msgspec.Struct, tag_field="t", tag="wire", omit_defaults=True, kw_only=True):
    """One buyer in one call that Redis was given."""

    at: float
    op: str
    buyer: str
    sku: str = ""


class Mark(msgspec.Struct, tag_field="t", tag="mark", omit_defaults=True, kw_only=True):
    at: float
    what: Literal["began", "fault", "healed", "agreed", "drained", "poison"]
    note: str = ""


class Run(msgspec.Struct, tag_field="t", tag="run", omit_defaults=True, kw_only=True):
    """The first line."""

    format: int = FORMAT
    at: float = 0.0
    by: str = ""  # demo, locust, chaos
    sale: str = ""
    seed: int = 0


class Sale(msgspec.Struct, tag_field="t", tag="sale", omit_defaults=True, kw_only=True):
    """The sale at the end. `held`: Redis has it, in the same epoch, and is its home."""

    at: float
    sale: str
    state: str
    epoch: int
    limit: int
    standby: bool
    held: bool
    redis_epoch: int = 0
    seed: str = ""
    seed_hash: str = ""
    beacon_source: str = ""
    beacon_value: str = ""


class Item(msgspec.Struct, tag_field="t", tag="item", omit_defaults=True, kw_only=True):
    sku: str
    epoch: int
    total: int
    reserved: int
    sold: int
    unapplied: int = 0  # units that Redis is still to be told of
    topped_up: int = 0
    left: int | None = None  # units in Redis; None: it does not have the item
    next_seq: int = 1
    served: int = 0
    early: int = 0
    dead_seq: int = 0
    drawn: bool = False
    drawn_n: int = 0
    drawn_key: str = ""
    beacon_used: str = ""
    chain: str = ""
    outcome: str = ""  # one sign for each seq, as Redis holds it; "." for none
    left_seqs: list[int] = []  # of those who left while they waited
    drawn_hashes: str = ""  # hex, 20 digits for each early seq


class Stream(msgspec.Struct, tag_field="t", tag="stream", omit_defaults=True, kw_only=True):
    """orders or asks."""

    name: str
    added: int  # claims, or asks, ever written
    length: int  # claims, or asks, that are left
    pending: int  # entries in a worker's hands
    open: int = 0  # claims that are left as the scripts count them


class Order(msgspec.Struct, tag_field="t", tag="order", omit_defaults=True, kw_only=True):
    order_no: str
    sku: str
    buyer: str
    epoch: int
    seq: int
    units: int
    amount_minor: int
    currency: str
    state: str
    version: int
    claimed_ms: int
    reason: str = ""


class Refused(msgspec.Struct, tag_field="t", tag="refused", omit_defaults=True, kw_only=True):
    """A claim that Postgres refused."""

    order_no: str
    sku: str
    buyer: str
    epoch: int
    seq: int
    units: int
    reason: str
    returned: bool


class Buried(msgspec.Struct, tag_field="t", tag="buried", omit_defaults=True, kw_only=True):
    """A dead letter."""

    stream: str
    entry: str
    reason: str


class Attempt(msgspec.Struct, tag_field="t", tag="attempt", omit_defaults=True, kw_only=True):
    id: str
    order: str
    state: str


class Capture(msgspec.Struct, tag_field="t", tag="capture", omit_defaults=True, kw_only=True):
    ref: str
    order: str
    amount_minor: int
    state: str


class Inbox(msgspec.Struct, tag_field="t", tag="inbox", omit_defaults=True, kw_only=True):
    """A call-back that is on record."""

    event: str


class Ticket(msgspec.Struct, tag_field="t", tag="ticket", omit_defaults=True, kw_only=True):
    """What Redis tells a winner."""

    sku: str
    seq: int
    version: int
    byte: str


Line: TypeAlias = (
    Op | Supplier | Wire | Mark | Run | Sale | Item | Stream | Order | Refused | Buried | Attempt | Capture | Inbox
    | Ticket
)  # fmt: skip

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Line)


def read(path: Path) -> list[Line]:
    """All lines of a history. ValueError: one is not a line of this format (with its number)."""
    lines: list[Line] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                lines.append(_DECODER.decode(raw))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ValueError(f"{path.name}:{number}: {error}") from error
    return lines


def encode(line: Line) -> bytes:
    return _ENCODER.encode(line) + b"\n"


class Clock:
    """Seconds of the epoch that never run back, whatever happens to the machine's clock meanwhile."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset_s + time.monotonic()


class Recorder:
    """Appends lines to a file; one thread, any number of clients. None as path: keeps them in `lines` only."""

    def __init__(self, path: Path | None, *, more: bool = False) -> None:
        """more: append to a history that exists."""
        self.path = path
        self.lines: list[Line] = []
        self.clock = Clock()
        self._ids = itertools.count(1)
        self._held = bytearray()
        self._file: BinaryIO | None = None if path is None else path.open("ab" if more else "wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, line: Line) -> None:
        if self._file is None:
            self.lines.append(line)
            return
        self._held += _ENCODER.encode(line)
        self._held += b"\n"
        if len(self._held) >= FLUSH_BYTES:
            self.flush()

    def add_all(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self.add(line)

    def flush(self) -> None:
        if self._file is not None:
            self._file.write(self._held)
            self._file.flush()
            self._held.clear()

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def mark(
        self, what: Literal["began", "fault", "healed", "agreed", "drained", "poison"], note: str = ""
    ) -> None:
        self.add(Mark(at=self.clock(), what=what, note=note))

    def invoke(self, op: str, process: str, buyer: str, **given: Any) -> Op:
        """A client begins an operation. End it with `end`; one that is never ended counts as unknown."""
        begun = Op(
            at=self.clock(), do="invoke", id=next(self._ids), process=process, op=op, buyer=buyer, **given
        )
        self.add(begun)
        return begun

    def end(
        self, begun: Op, do: Literal["ok", "fail", "unknown"], *, status: int = 0, code: str = "", **told: Any
    ) -> None:
        """How it ended. fail: certainly nothing was done; unknown: no answer, or one that does not say."""
        self.add(
            Op(
                at=self.clock(),
                do=do,
                id=begun.id,
                process=begun.process,
                op=begun.op,
                buyer=begun.buyer,
                sale=begun.sale,
                status=status,
                code=code,
                **told,
            )
        )

    def answered(self, begun: Op, status: int, document: Any) -> None:
        """How it ended, from an HTTP answer: 5xx is unknown, 4xx is a refusal, 2xx with a ticket says what was told."""
        if status >= 500:
            self.end(begun, "unknown", status=status, code=_word(document, "code"))
        elif status >= 400:
            self.end(begun, "fail", status=status, code=_word(document, "code"))
        elif isinstance(document, dict) and "ticket" in document:
            order, payment = document.get("order"), document.get("payment")
            self.end(
                begun,
                "ok",
                status=status,
                ticket=document.get("ticket_id") or "",
                state=document.get("state") or "",
                sku=document.get("sku") or "",
                units=document.get("units") or 0,
                seq=document.get("seq"),
                rank=document.get("rank"),
                ahead=document.get("ahead"),
                order=order["order_no"] if order else "",
                amount_minor=order.get("amount_minor") if order else None,
                currency=(order.get("currency") or "") if order else "",
                payment=(payment.get("state") or "") if payment else "",
                now_ms=document.get("now_ms"),
            )
        else:
            self.end(begun, "ok", status=status)


def _word(document: Any, name: str) -> str:
    found = document.get(name) if isinstance(document, dict) else None
    return found if isinstance(found, str) else ""
