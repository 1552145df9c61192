"""Event streams: one follows a ticket and is sent its document at each change, until it has ended.

No stream polls by itself: one sweep over all, with each new snapshot, wakes those whose ticket may have changed.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from app.errors import DidNotHappen, FairdropError
from app.problems import refuse
from app.purchase.track import Told, Tracker
from app.sale.snapshot import Snapshots
from app.sale.view import ItemView, SaleView
from app.settings import Settings
from app.tokens import Ticket

HEARTBEAT_S = 15.0  # a comment this often keeps proxies from closing a quiet stream
IN_HAND_EVERY_S = 0.5  # a claimed or reserved ticket is read this often
TROUBLE_EVERY_S = 1.0


class Follower:
    """One open stream: what must happen for it to be looked at again."""

    __slots__ = ("at_most", "item", "rank", "seq", "sleeper", "view")

    def __init__(self) -> None:
        self.view: SaleView | None = None
        self.item: ItemView | None = None
        self.rank: int | None = None
        self.seq = 0
        self.at_most = 0.0
        self.sleeper: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.sleeper is not None and not self.sleeper.done():
            self.sleeper.set_result(None)


class EventStreams:
    """The open event streams of a process. One sweep a snapshot wakes those whose ticket may have changed."""

    def __init__(self, settings: Settings, tracker: Tracker, snapshots: Snapshots) -> None:
        self.tracker = tracker
        self._snapshots = snapshots
        self._max = settings.sse_max
        self._open: set[Follower] = set()
        self._draining = False
        snapshots.on_tick.append(self.sweep)

    @property
    def open(self) -> int:
        return len(self._open)

    def drain(self) -> None:
        """End all streams now: their clients come back to another process."""
        self._draining = True
        for follower in self._open:
            follower.wake()

    def enter(self) -> Follower:
        """A place for one more stream. Refusal 503 `busy` beyond sse_max: the client polls instead."""
        if self._draining or len(self._open) >= self._max:
            raise refuse(
                "busy", "No more event streams here: poll the ticket.", retry_after_s=random.randint(2, 6)
            )
        follower = Follower()
        self._open.add(follower)
        return follower

    def leave(self, follower: Follower) -> None:
        self._open.discard(follower)

    def sweep(self) -> None:
        now = time.monotonic()
        now_ms = self._snapshots.now_ms()
        for follower in self._open:
            if follower.sleeper is None or follower.sleeper.done():
                continue
            item, view = follower.item, follower.view
            if now >= follower.at_most or (
                item is not None
                and view is not None
                and (
                    (item.drawn if follower.rank is None else item.served >= follower.rank)
                    or follower.seq in item.left
                    or view.closed
                    or now_ms >= view.closes_ms
                    or self._snapshots.get(view.id) is not view
                )
            ):
                follower.wake()

    async def run(
        self, follower: Follower, token: str, ticket: Ticket, mine: bool, first: Told, send: Any
    ) -> None:
        """Send the document at each change, else as often as poll_after_ms, until an ended state or draining.

        `send(bytes)` writes to the client. Ends by itself; the caller cancels it when the client is gone.
        """
        await send(b"retry: %d\n\n" % random.randint(1_000, 4_000))
        told, key, next_at = first, b"", 0.0
        while True:
            now = time.monotonic()
            if told.key != key or now >= next_at:
                await send(b"event: ticket\ndata: %b\n\n" % told.body)
                if told.poll_after_ms is None:
                    return
                key, next_at = told.key, now + told.poll_after_ms / 1000
            if self._draining:
                return
            heartbeat_at = now + HEARTBEAT_S
            waits = key in (b"w", b"W")
            view = self._snapshots.get(ticket.sale)
            follower.view = view if waits else None
            if waits and view is not None:
                follower.item = view.order[ticket.item]
                follower.rank, follower.seq = follower.item.rank_of(ticket.seq), ticket.seq
            follower.at_most = min(next_at, heartbeat_at) if waits else min(next_at, now + IN_HAND_EVERY_S)
            follower.sleeper = asyncio.get_running_loop().create_future()
            await follower.sleeper
            try:
                view = self._snapshots.get(ticket.sale)
                if view is None:
                    raise DidNotHappen("the sale is not known just now")
                told = await self.tracker.told(token, ticket, view, view.order[ticket.item], mine)
            except FairdropError:
                if not self._snapshots.fresh:
                    return  # the client comes back after `retry`, perhaps to a process that sees Redis
                await asyncio.sleep(TROUBLE_EVERY_S)
            if time.monotonic() >= heartbeat_at and told.key == key and time.monotonic() < next_at:
                await send(b": still here\n\n")
