"""A sale and its items as last seen in Redis: what positions, waits and states are told from. No I/O.

Nothing here grows with the number of waiting buyers, save one bit a ticket once somebody has left. Within an epoch
`served`, `next_seq` and `dead_seq` only rise; a new epoch is a new view.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from app import draw
from app.keys import SaleKeys

RATE_WINDOW_S = (
    30  # s of history behind an ETA: long enough to smooth bursts, short enough to follow a rate change
)
RATE_EVERY_MS = 1_000  # ms between two points of that history
FEW_PART = 10  # "few": a tenth of the units or less is left

# of `item:<sku>`, in the order in which `ItemView.take` reads them
ITEM_FIELDS = (
    "next_seq",
    "served",
    "early",
    "chain",
    "drawn",
    "drawn_n",
    "drawn_key",
    "beacon_used",
    "dead_seq",
    "paused",
    "starts",
)


def int_of(value: bytes | None, default: int = 0) -> int:
    """A number of Redis; `default`: there is none."""
    return int(value) if value else default


def text_of(value: bytes | None) -> str:
    """A text of Redis; empty: there is none."""
    return value.decode() if value else ""


class LeftTickets:
    """Which tickets left while waiting: one bit each, from the list `left:<sku>` whose tail is followed."""

    __slots__ = ("_bits", "read")

    def __init__(self) -> None:
        self._bits = bytearray()
        self.read = 0  # entries of the list seen so far

    def add(self, seq: int) -> None:
        at = seq >> 3
        if at >= len(self._bits):
            self._bits.extend(bytes(at + 1 - len(self._bits)))
        self._bits[at] |= 1 << (seq & 7)

    def __contains__(self, seq: int) -> bool:
        at = seq >> 3
        return at < len(self._bits) and bool(self._bits[at] >> (seq & 7) & 1)


class ItemView:
    """One item of a sale as last seen."""

    __slots__ = (
        "_points",
        "beacon_used",
        "chain",
        "dead_seq",
        "drawn",
        "drawn_key",
        "drawn_n",
        "early",
        "head",
        "left",
        "next_seq",
        "p50_per_s",
        "p90_per_s",
        "paused",
        "position",
        "round_keys",
        "served",
        "shown",
        "sku",
        "starts",
        "total",
        "units_left",
    )

    def __init__(self, sale_id: str, sku: str, position: int) -> None:
        self.sku = sku
        # the part of a ticket document that is the same for every ticket of the item; ids need no escaping
        self.head = f'"sale":"{sale_id}","sku":"{sku}"'.encode("ascii")
        self.position = position
        self.total = 0
        self.units_left = 0
        self.next_seq = 1
        self.served = 0
        self.early = 0
        self.chain = ""
        self.drawn = False
        self.drawn_n = 0
        self.drawn_key = ""
        self.round_keys: Any = None
        self.beacon_used = ""
        self.dead_seq = 0
        self.paused = False
        self.starts: list[tuple[int, int]] = []  # (epoch, its first seq), oldest first; empty: no rebuild yet
        self.left = LeftTickets()
        self.shown: tuple[Any, ...] = ()  # what public documents were built from
        # ranks served in a second: what half and what nine tenths of the last seconds reached
        self.p50_per_s: float | None = None
        self.p90_per_s: float | None = None
        self._points: deque[tuple[int, int]] = deque(maxlen=RATE_WINDOW_S + 1)

    def take(self, fields: Sequence[bytes | None], now_ms: int) -> None:
        """Take over one look at `item:<sku>`. Numbers that only rise never go back."""
        next_seq, served, early, chain, drawn, drawn_n, drawn_key, beacon_used, dead_seq, paused, starts = (
            fields
        )
        self.next_seq = max(self.next_seq, int_of(next_seq, 1))
        self.early = int_of(early)
        self.chain = text_of(chain)
        if drawn == b"1" and not self.drawn:
            self.drawn_n = int_of(drawn_n)
            self.drawn_key = text_of(drawn_key)
            self.beacon_used = text_of(beacon_used)
            self.round_keys = draw.round_keys(self.drawn_key, self.drawn_n) if self.drawn_n else None
            self.drawn = True
        self.served = max(self.served, int_of(served))
        self.dead_seq = max(self.dead_seq, int_of(dead_seq))
        self.paused = paused == b"1"
        if starts and not self.starts:  # fixed when the epoch begins
            pairs = (start.split(b":") for start in starts.split(b","))
            self.starts = [(int(epoch), int(seq)) for epoch, seq in pairs]
        if not self._points or now_ms - self._points[-1][0] >= RATE_EVERY_MS:
            self._points.append((now_ms, self.served))
            self._measure()

    def _measure(self) -> None:
        points = self._points
        rates = [
            (after[1] - before[1]) * 1000 / (after[0] - before[0])
            for before, after in itertools.pairwise(points)
            if after[0] > before[0]
        ]
        while rates and rates[0] == 0:
            rates.pop(0)  # nothing was served before the opening: that says nothing about the wait
        if not rates:
            self.p50_per_s = self.p90_per_s = None
            return
        ordered = sorted(rates)
        self.p50_per_s = statistics.median(ordered)
        self.p90_per_s = ordered[len(ordered) // 10]

    def rank_of(self, seq: int) -> int | None:
        """The ticket's place in the order of service; None until the draw has fixed it, and once a rebuild lost it."""
        if self.starts and seq < self.starts[-1][1]:
            return None  # an order of an earlier epoch: its draw is gone with Redis, and the seq is no rank
        if not self.drawn:
            # Served before any draw: nobody was in it, so ranks are seqs.
            return seq if self.served and not self.early else None
        if seq > self.drawn_n:
            return seq
        return draw.rank_of(seq, self.drawn_n, self.round_keys)

    def goes_on(self, epoch: int, seq: int) -> bool:
        """Whether a ticket of an earlier epoch may have been taken along by the rebuilds since: Redis knows it then.

        A seq belongs to the epoch that gave it out. One that was given in an epoch and lost is given again in a later
        one, to somebody else: the older ticket must not be taken for that.
        """
        if not self.starts or seq >= self.starts[-1][1]:
            return False
        return next((begun for begun, first in reversed(self.starts) if first <= seq), 1) <= epoch

    @property
    def waiting(self) -> int:
        """Tickets in the line; those that left are counted until they are passed."""
        return max(0, self.next_seq - 1 - self.served)

    @property
    def availability(self) -> str:
        if self.units_left <= 0:
            return "none"
        return "few" if self.units_left * FEW_PART <= self.total else "plenty"


class SaleView:
    """One sale as last seen. A new epoch is a new SaleView."""

    __slots__ = (
        "_doc_bytes",
        "advice",
        "backlog",
        "beacon_source",
        "beacon_value",
        "beacon_wait_ms",
        "burst",
        "changes",
        "closed",
        "closes_ms",
        "doc",
        "epoch",
        "freeze_ms",
        "home",
        "id",
        "items",
        "keys",
        "limit",
        "line_max",
        "line_opens_ms",
        "looked_at",
        "message",
        "message_json",
        "notices",
        "opens_ms",
        "order",
        "paused",
        "pulse",
        "rate_milli",
        "seed",
        "seed_hash",
        "skus",
        "standby",
        "version",
    )

    def __init__(self, sale_id: str, epoch: int, skus: Sequence[str], doc: bytes) -> None:
        self.id = sale_id
        self.keys = SaleKeys(sale_id)
        self.epoch = epoch
        self.home = ""
        self.version = 0
        self.doc: dict[str, Any] = {}
        self._doc_bytes = b""
        self.skus = tuple(skus)
        self.order = tuple(ItemView(sale_id, sku, at) for at, sku in enumerate(skus))
        self.items: dict[str, ItemView] = {item.sku: item for item in self.order}
        self._take_doc(doc)
        self.paused = False
        self.closed = False
        self.line_opens_ms = self.opens_ms = self.closes_ms = self.freeze_ms = 0
        self.beacon_source = "none"
        self.beacon_value = ""
        self.beacon_wait_ms = 0
        self.rate_milli = -1
        self.burst = 0
        self.limit = 1
        self.line_max = 0
        self.standby = False
        self.seed = ""
        self.seed_hash = ""
        self.message = ""
        self.message_json = b"null"
        self.advice = ""  # why service is slower than planned; '' it is not
        self.notices = ""  # what tickets say beyond their own state
        self.pulse = 0
        self.backlog = 0
        self.looked_at = -1e9
        self.changes = 0  # rises whenever a public fact may have changed: documents are rebuilt then

    def _take_doc(self, raw: bytes) -> bool:
        if raw == self._doc_bytes:
            return False
        doc = msgspec.json.decode(raw) if raw else {}
        if not isinstance(doc, dict):
            raise ValueError("the sale's doc is no JSON object")
        self._doc_bytes = raw
        self.doc = doc
        for told in doc.get("items", ()):
            item = self.items.get(told["sku"])
            if item is not None:
                item.total = int(told.get("units", 0))
        return True

    def take(self, sale: Mapping[bytes, bytes], now_ms: int) -> None:
        """Take over one look at the `sale` hash."""
        before = self._public()
        self.home = text_of(sale.get(b"home"))
        self.version = int_of(sale.get(b"version"))
        self.paused = sale.get(b"paused") == b"1"
        self.closed = sale.get(b"closed") == b"1"
        self.line_opens_ms = int_of(sale.get(b"line_opens_ms"))
        self.opens_ms = int_of(sale.get(b"opens_ms"))
        self.closes_ms = int_of(sale.get(b"closes_ms"))
        self.freeze_ms = int_of(sale.get(b"freeze_ms"), self.opens_ms)
        self.beacon_source = text_of(sale.get(b"beacon_source")) or "none"
        self.beacon_value = text_of(sale.get(b"beacon_value"))
        self.beacon_wait_ms = int_of(sale.get(b"beacon_wait_ms"))
        self.rate_milli = int_of(sale.get(b"rate_milli"), -1)
        self.burst = int_of(sale.get(b"burst"))
        self.limit = int_of(sale.get(b"limit"), 1)
        self.line_max = int_of(sale.get(b"line_max"))
        self.standby = sale.get(b"standby") == b"1"
        self.seed = text_of(sale.get(b"seed"))
        self.seed_hash = text_of(sale.get(b"seed_hash"))
        self.message = text_of(sale.get(b"message"))
        self.message_json = msgspec.json.encode(self.message or None)
        self.pulse = int_of(sale.get(b"pulse"))
        advised = now_ms < int_of(sale.get(b"advice_until_ms"))
        self.advice = text_of(sale.get(b"slow_reason")) if advised else ""
        self.notices = text_of(sale.get(b"notices")) if advised else ""
        if self._take_doc(sale.get(b"doc", b"")) or before != self._public():
            self.changes += 1

    def _public(self) -> tuple[Any, ...]:
        return (
            self.version,
            self.paused,
            self.closed,
            self.line_opens_ms,
            self.opens_ms,
            self.closes_ms,
            self.message,
            self.advice,
            self.rate_milli,
            self.standby,
            self.limit,
            self.beacon_value,
        )

    def state_at(self, now_ms: int) -> str:
        """The sale's state word: scheduled, line_open, open, paused, sold_out or closed."""
        if self.closed or now_ms >= self.closes_ms:
            return "closed"
        if self.paused:
            return "paused"
        if now_ms < self.line_opens_ms:
            return "scheduled"
        if now_ms < self.opens_ms:
            return "line_open"
        if not self.standby and all(item.units_left <= 0 for item in self.order):
            return "sold_out"
        return "open"
