"""Joins of many buyers become few script calls: whoever arrives while a call is under way rides in the next one.

No timers: an idle process sends at once. A batch is of one item of one epoch; its answers are values of app.scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from app.answers import (
    Gone,
    JoinAnswer,
    Joined,
    Old,
)
from app.batcher import Batcher, Full
from app.errors import Refusal
from app.problems import refuse
from app.sale.snapshot import Snapshots
from app.sale.view import ItemView, SaleView
from app.scripts import Scripts
from app.settings import Settings
from app.tokens import Keyring

T = TypeVar("T")

CALLS_QUEUED = 1  # whole calls that wait before newcomers may be refused: fewer are a pause, not a crowd

# (buyer_id, units, again, perf_counter() when it was asked)
Wish = tuple[bytes, int, bool, float]
Reply = JoinAnswer | Old | Gone
# What becomes of a batch: told(view, item, wishes, ticket hashes, replies) gives as many answers, in order.
Told = Callable[[SaleView, ItemView, Sequence[Wish], Sequence[bytes], Sequence[Reply]], list[T]]


class Claims(Generic[T]):
    """Gives buyers their places. One for a process; a batch queue for each item, none for a waiting buyer."""

    def __init__(
        self, settings: Settings, scripts: Scripts, ring: Keyring, snapshots: Snapshots, told: Told[T]
    ) -> None:
        self._settings = settings
        self._scripts = scripts
        self._ring = ring
        self._snapshots = snapshots
        self._told = told
        self._crowd_min = CALLS_QUEUED * settings.batch_max
        self._wait_max_s = settings.join_wait_max_ms / 1000
        self._queues: dict[ItemView, Batcher[Wish, T]] = {}
        self.batches = 0
        self.joined = 0  # buyers in those batches

    async def drain(self) -> None:
        """Wait for the joins under way: each has the link's deadline."""
        for queue in list(self._queues.values()):
            await queue.drain()

    def join(self, view: SaleView, item: ItemView, wish: Wish, tell: Callable[[T | Exception], None]) -> None:
        """Ask for a place; `tell` is called with what the buyer is told, once Redis has accepted it.

        Refusal 503 `busy`: too many, or for too long, wait for Redis in this process. `tell` may also be called with
        DidNotHappen or Unknown, as values; the same join may simply be repeated.
        """
        queue = self._queues.get(item)
        if queue is None:
            queue = self._queues[item] = self._queue(view, item)
        if len(queue) >= self._crowd_min:
            first = queue.first
            if first is not None and wish[3] - first[3] > self._wait_max_s:
                raise crowded()
        try:
            queue.put(wish, tell)
        except Full:
            raise crowded() from None

    def _queue(self, view: SaleView, item: ItemView) -> Batcher[Wish, T]:
        settings = self._settings
        return Batcher(
            self._sender(view, item),
            settings.batch_max,
            settings.batch_in_flight_max,
            settings.batch_queue_max,
            settings.batch_beside_min,
        )

    def _sender(self, view: SaleView, item: ItemView) -> Callable[[list[Wish]], Coroutine[Any, Any, list[T]]]:
        scripts, ring, backlog_max = self._scripts, self._ring, self._settings.orders_backlog_max

        async def send(wishes: list[Wish]) -> list[T]:
            self.batches += 1
            self.joined += len(wishes)
            ids, units, again, _ = zip(*wishes, strict=True)
            hashes = ring.ticket_hashes(view.id, item.sku, ids)
            reply = await scripts.line_join(
                sale=view.id,
                epoch=view.epoch,
                sku=item.sku,
                skus=view.skus,
                buyers=list(zip(ids, units, again, hashes, strict=True)),
                backlog_max=backlog_max,
            )
            if not isinstance(reply, Joined):
                return self._told(view, item, wishes, hashes, [reply] * len(wishes))
            # As new as it gets: what is told from the snapshot must not lag behind what this process was told itself.
            if reply.served > item.served:
                item.served = reply.served
            if reply.next_seq > item.next_seq:
                item.next_seq = reply.next_seq
            return self._told(view, item, wishes, hashes, reply.answers)

        return send

    def forget(self) -> None:
        """Drop the queues of items that are no longer watched (another epoch, or the sale is gone)."""
        known = {item for view in self._snapshots for item in view.order}
        for item in [item for item in self._queues if item not in known]:
            del self._queues[item]  # what is under way in it is still answered


def crowded() -> Refusal:
    return refuse("busy", "Too many requests are waiting here; repeat the same request.", retry_after_s=2)
