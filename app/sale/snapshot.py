"""What every sale looks like now, as seen ten times a second: positions, waits and states without a Redis call a poll.

One task reads all watched sales in one pipeline a tick. Nothing here grows with the number of waiting buyers, save one
bit a ticket once somebody has left. Within an epoch `served`, `next_seq` and `dead_seq` only rise.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import structlog

from app import draw, keys
from app.errors import DidNotHappen, FairdropError, Unknown
from app.keys import SaleKeys
from app.redis.link import Link
from app.settings import Settings

log = structlog.get_logger(__name__)

RATE_WINDOW_S = (
    30  # s of history behind an ETA: long enough to smooth bursts, short enough to follow a rate change
)
RATE_EVERY_MS = 1_000  # ms between two points of that history
LEFT_READ_MAX = 2_000  # leavers read for one item in one tick: Redis is held for some 100 µs
ENDED_EVERY_TICKS = 50  # a closed sale is looked at every 5 s, or when its version in fairdrop:sales moves
FEW_PART = 10  # "few": a tenth of the units or less is left
BROKEN_WARN_S = 5.0  # s between two warnings about the same trouble

_ITEM_FIELDS = (
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


def _int(value: bytes | None, default: int = 0) -> int:
    return int(value) if value else default


def _text(value: bytes | None) -> str:
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
        self.next_seq = max(self.next_seq, _int(next_seq, 1))
        self.early = _int(early)
        self.chain = _text(chain)
        if drawn == b"1" and not self.drawn:
            self.drawn_n = _int(drawn_n)
            self.drawn_key = _text(drawn_key)
            self.beacon_used = _text(beacon_used)
            self.round_keys = draw.round_keys(self.drawn_key, self.drawn_n) if self.drawn_n else None
            self.drawn = True
        self.served = max(self.served, _int(served))
        self.dead_seq = max(self.dead_seq, _int(dead_seq))
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
        self.home = _text(sale.get(b"home"))
        self.version = _int(sale.get(b"version"))
        self.paused = sale.get(b"paused") == b"1"
        self.closed = sale.get(b"closed") == b"1"
        self.line_opens_ms = _int(sale.get(b"line_opens_ms"))
        self.opens_ms = _int(sale.get(b"opens_ms"))
        self.closes_ms = _int(sale.get(b"closes_ms"))
        self.freeze_ms = _int(sale.get(b"freeze_ms"), self.opens_ms)
        self.beacon_source = _text(sale.get(b"beacon_source")) or "none"
        self.beacon_value = _text(sale.get(b"beacon_value"))
        self.beacon_wait_ms = _int(sale.get(b"beacon_wait_ms"))
        self.rate_milli = _int(sale.get(b"rate_milli"), -1)
        self.burst = _int(sale.get(b"burst"))
        self.limit = _int(sale.get(b"limit"), 1)
        self.line_max = _int(sale.get(b"line_max"))
        self.standby = sale.get(b"standby") == b"1"
        self.seed = _text(sale.get(b"seed"))
        self.seed_hash = _text(sale.get(b"seed_hash"))
        self.message = _text(sale.get(b"message"))
        self.message_json = msgspec.json.encode(self.message or None)
        self.pulse = _int(sale.get(b"pulse"))
        advised = now_ms < _int(sale.get(b"advice_until_ms"))
        self.advice = _text(sale.get(b"slow_reason")) if advised else ""
        self.notices = _text(sale.get(b"notices")) if advised else ""
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


class Snapshots:
    """The 10 Hz look at Redis. `start`, `get`, `close`; `on_tick` callbacks run after each look."""

    def __init__(self, link: Link, settings: Settings) -> None:
        self._link = link
        self._every_s = settings.snapshot_every_ms / 1000
        self._stale_s = settings.snapshot_stale_s
        self._views: dict[str, SaleView] = {}
        self._ended: dict[str, tuple[int, int]] = {}  # sale -> (version seen, tick it was looked at)
        self._offset_ms: float | None = None  # Redis' clock minus this machine's monotonic clock
        self._last_ms = 0
        self._tick = 0
        self._task: asyncio.Task[None] | None = None
        self._warned_at = -1e9
        self._broken: set[str] = set()
        self.lost: set[str] = (
            set()
        )  # sales that were here, had not ended, and are gone from Redis: they may come back
        self._listed: frozenset[str] = (
            frozenset()
        )  # sales that Redis names, whether or not they could be read
        self.looked_at = -1e9  # monotonic s of the last whole look
        self.on_tick: list[Callable[[], None]] = []

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, sale_id: str) -> SaleView | None:
        return self._views.get(sale_id)

    def __iter__(self) -> Iterator[SaleView]:
        return iter(list(self._views.values()))

    def now_ms(self) -> int:
        """The sale clock: Redis' time as last seen, carried on by this machine's; never runs back."""
        offset = self._offset_ms
        now = int(time.time() * 1000 if offset is None else time.monotonic() * 1000 + offset)
        if now < self._last_ms:
            return self._last_ms
        self._last_ms = now
        return now

    @property
    def loaded(self) -> bool:
        """Whether there has been any look at all."""
        return self.looked_at > 0

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.looked_at

    @property
    def fresh(self) -> bool:
        """Whether the last look is recent enough to tell buyers from."""
        return time.monotonic() - self.looked_at < self._stale_s

    def state(self, view: SaleView) -> str:
        return view.state_at(self.now_ms())

    def usable(self, view: SaleView) -> bool:
        """Whether buyers may be told from this view: seen of late, and in the Redis that is the sale's home."""
        return (
            time.monotonic() - self.looked_at < self._stale_s
            and view.home == (self._link.run_id or self._link.home_of(view.keys.sale))
            and view.id not in self._broken
        )

    # --- the task ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Look once if Redis answers, then ten times a second. Never fails: a front door starts without Redis."""
        await self._try_look()
        self._task = asyncio.create_task(self._run(), name="snapshots")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        next_at = time.monotonic()
        while True:
            next_at = max(next_at + self._every_s, time.monotonic())
            await asyncio.sleep(next_at - time.monotonic())
            await self._try_look()
            for callback in self.on_tick:
                try:
                    callback()
                except Exception:
                    log.exception("tick_failed")  # the next look matters more than a metric

    async def _try_look(self) -> None:
        try:
            await self.look()
        except FairdropError as error:
            self._warn("snapshot_failed", str(error))
        except Exception:
            # One bad value must not end the only task that sees Redis; it is told loudly and tried again.
            log.exception("snapshot_broken")

    def _warn(self, event: str, error: str) -> None:
        if time.monotonic() - self._warned_at > BROKEN_WARN_S:
            self._warned_at = time.monotonic()
            log.warning(event, error=error)

    async def look(self) -> None:
        """One look at all sales. DidNotHappen, Unknown: Redis did not answer, the old views stay."""
        self._tick += 1
        watched = [view for view in self._views.values() if self._due(view.id)]
        asked: list[Sequence[Any]] = [("TIME",), ("HGETALL", keys.SALES)]
        for view in watched:
            asked += self._commands(view)
        began = time.monotonic()
        replies = await self._link.pipeline(asked)
        ended = time.monotonic()
        # In a cluster clock and list are on one node, and the sales on others go on while that is away.
        listed = not isinstance(replies[0], Exception) and not isinstance(replies[1], Exception)
        if listed:
            seconds, micros = replies[0]
            redis_ms = int(seconds) * 1000 + int(micros) / 1000
            # The reply was made between `began` and `ended`; a slow answer says little, so a quick one is preferred.
            offset = redis_ms - (began + ended) * 500
            if self._offset_ms is None or ended - began < 0.02 or abs(offset - self._offset_ms) > 1000:
                self._offset_ms = offset
        elif all(isinstance(reply, Exception) for reply in replies):
            raise next(reply for reply in replies[:2] if isinstance(reply, Exception))
        now_ms = self.now_ms()
        at = 2
        for view in watched:
            width = 2 + 2 * len(view.order)
            self._take(view.id, replies[at : at + width], now_ms)
            at += width
        if listed:
            await self._discover(_pairs(replies[1]))
        self.looked_at = time.monotonic()

    def _due(self, sale_id: str) -> bool:
        ended = self._ended.get(sale_id)
        return ended is None or self._tick - ended[1] >= ENDED_EVERY_TICKS

    def _commands(self, view: SaleView) -> list[Sequence[Any]]:
        of = view.keys
        asked: list[Sequence[Any]] = [("HGETALL", of.sale), ("HGETALL", of.stock)]
        for item in view.order:
            asked.append(("HMGET", of.item(item.sku), *_ITEM_FIELDS))
            asked.append(("LRANGE", of.left(item.sku), item.left.read, item.left.read + LEFT_READ_MAX - 1))
        return asked

    def _take(self, sale_id: str, replies: Sequence[Any], now_ms: int) -> None:
        view = self._views.get(sale_id)
        if view is None:
            return
        try:
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            sale = _pairs(replies[0])
            if not sale:
                # A missing key means closed, never zero: nothing of it is shown as open again.
                self._lose(sale_id)
                return
            if _int(sale.get(b"epoch")) != view.epoch or _text(sale.get(b"items")) != ",".join(view.skus):
                del self._views[sale_id]  # another epoch: read anew in this very tick
                self._ended.pop(sale_id, None)
                return
            stock = _pairs(replies[1])
            view.take(sale, now_ms)
            view.backlog = _int(sale.get(b"claims_open"))
            for item, fields, left in zip(view.order, replies[2::2], replies[3::2], strict=True):
                item.units_left = _int(stock.get(item.sku.encode()))
                item.take(fields, now_ms)
                for seq in left:
                    item.left.add(int(seq))
                item.left.read += len(left)
                shown = (item.served, item.next_seq, item.availability, item.drawn, item.p50_per_s)
                if shown != item.shown:  # joins and reads move an item between two looks, too
                    item.shown = shown
                    view.changes += 1
            view.looked_at = time.monotonic()
            self._broken.discard(sale_id)
        except (KeyError, TypeError, ValueError, DidNotHappen, Unknown, msgspec.MsgspecError) as error:
            # One broken sale must not blind the others: it goes stale, which buyers are told as 503.
            if sale_id not in self._broken:
                self._broken.add(sale_id)
                log.error("sale_unreadable", sale=sale_id, error=repr(error))

    def _lose(self, sale_id: str) -> None:
        del self._views[sale_id]
        if self._ended.pop(sale_id, None) is None:
            self.lost.add(sale_id)

    def known_absent(self, sale_id: str) -> bool:
        """Whether there is certainly no such sale: Redis, seen of late, does not name it and has not lost it."""
        return self.fresh and sale_id not in self._listed and sale_id not in self.lost

    async def _discover(self, known: Mapping[bytes, bytes]) -> None:
        """Read sales that are new, have a new epoch, or have ended and changed: in this very tick."""
        unseen: list[str] = []
        listed: dict[str, tuple[int, bool]] = {}
        for raw_id, raw in known.items():
            sale_id = raw_id.decode()
            try:
                told = msgspec.json.decode(raw)
                listed[sale_id] = (int(told.get("version", 0)), bool(told.get("ended", False)))
            except (msgspec.DecodeError, AttributeError, TypeError, ValueError):
                listed[sale_id] = (0, False)
            if sale_id not in self._views:
                unseen.append(sale_id)
        self._listed = frozenset(listed)
        for sale_id in [gone for gone in self._views if gone not in listed]:
            self._lose(sale_id)
        if unseen:
            heads = await self._link.pipeline(
                [("HMGET", SaleKeys(sale_id).sale, "epoch", "items", "doc") for sale_id in unseen]
            )
            fresh: list[SaleView] = []
            for sale_id, head in zip(unseen, heads, strict=True):
                if isinstance(head, Exception) or head[0] is None or not head[1]:
                    continue
                try:
                    fresh.append(SaleView(sale_id, int(head[0]), _text(head[1]).split(","), head[2] or b""))
                except (msgspec.DecodeError, ValueError, KeyError, TypeError) as error:
                    if sale_id not in self._broken:
                        self._broken.add(sale_id)
                        log.error("sale_unreadable", sale=sale_id, error=repr(error))
            if fresh:
                asked: list[Sequence[Any]] = []
                for view in fresh:
                    asked += self._commands(view)
                replies = await self._link.pipeline(asked)
                now_ms = self.now_ms()
                at = 0
                for view in fresh:
                    width = 2 + 2 * len(view.order)
                    self._views[view.id] = view
                    self.lost.discard(view.id)
                    self._take(view.id, replies[at : at + width], now_ms)
                    if view.looked_at < 0:
                        self._views.pop(view.id, None)
                    at += width
        for sale_id, (version, ended) in listed.items():
            if not ended:
                self._ended.pop(sale_id, None)
                continue
            seen = self._ended.get(sale_id)
            if seen is None:
                self._ended[sale_id] = (version, self._tick)
            elif seen[0] != version:
                self._ended[sale_id] = (version, -ENDED_EVERY_TICKS)  # read in the next tick
            elif self._tick - seen[1] >= ENDED_EVERY_TICKS:
                self._ended[sale_id] = (version, self._tick)


def _pairs(flat: Any) -> dict[bytes, bytes]:
    """HGETALL's flat reply as a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
