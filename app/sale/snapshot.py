"""What every sale looks like now, as seen ten times a second: positions, waits and states without a Redis call a poll.

One task reads all watched sales into their views (view.py), in one pipeline a tick.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import structlog

from app import keys
from app.errors import DidNotHappen, FairdropError, Unknown
from app.keys import SaleKeys
from app.redis.link import Link
from app.sale.view import ITEM_FIELDS, SaleView, int_of, text_of
from app.settings import Settings

log = structlog.get_logger(__name__)

LEFT_READ_MAX = 2_000  # leavers read for one item in one tick: Redis is held for some 100 µs
ENDED_EVERY_TICKS = 50  # a closed sale is looked at every 5 s, or when its version in fairdrop:sales moves
BROKEN_WARN_S = 5.0  # s between two warnings about the same trouble


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
            asked.append(("HMGET", of.item(item.sku), *ITEM_FIELDS))
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
            if int_of(sale.get(b"epoch")) != view.epoch or text_of(sale.get(b"items")) != ",".join(view.skus):
                del self._views[sale_id]  # another epoch: read anew in this very tick
                self._ended.pop(sale_id, None)
                return
            stock = _pairs(replies[1])
            view.take(sale, now_ms)
            view.backlog = int_of(sale.get(b"claims_open"))
            for item, fields, left in zip(view.order, replies[2::2], replies[3::2], strict=True):
                item.units_left = int_of(stock.get(item.sku.encode()))
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
                    fresh.append(SaleView(sale_id, int(head[0]), text_of(head[1]).split(","), head[2] or b""))
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
