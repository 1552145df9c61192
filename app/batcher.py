"""Coalesces what arrives while a call is under way into the next call. No timers: an idle process sends at once."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from app.errors import DidNotHappen, Unknown

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger("fairdrop.batcher")


class Full(DidNotHappen):
    """The queue is at its maximum; nothing was sent. Answer 503 with Retry-After."""


class Batcher(Generic[T, R]):
    """Sends submitted items in batches; each is told the result at its place, or the error of its batch.

    send: takes 1..batch_max items and returns as many results, in order. An error of `send` goes to every item of the
    batch as it is (DidNotHappen or Unknown). At most in_flight_max calls at once, at most queue_max items waiting.
    beside_min: items that must wait before a call is made beside another (a full batch always may): fewer and larger
    batches cost less, and while one is under way nobody waits for long.
    """

    def __init__(
        self,
        send: Callable[[list[T]], Awaitable[list[R]]],
        batch_max: int = 256,
        in_flight_max: int = 2,
        queue_max: int = 20_000,
        beside_min: int = 1,
    ) -> None:
        self._send = send
        self.batch_max = batch_max
        self.in_flight_max = in_flight_max
        self.queue_max = queue_max
        self.beside_min = min(beside_min, batch_max)
        self.in_flight = 0
        self.batches = 0  # sent so far, for metrics: items / batches is the mean batch
        self.items = 0
        # what is to be sent, who is told, and the future of somebody who may stop waiting
        self._queue: deque[tuple[T, Callable[[R | Exception], None], asyncio.Future[R] | None]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._woken = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def first(self) -> T | None:
        """The item that has been queued for longest; None: nobody waits."""
        return self._queue[0][0] if self._queue else None

    def put(
        self, item: T, tell: Callable[[R | Exception], None], future: asyncio.Future[R] | None = None
    ) -> None:
        """Queue one item; `tell` is called once, with its result or with the error as a value.

        Raises Full at the maximum. Everything put in one turn of the loop goes together. future: of whoever is told;
        an item whose future is done (cancelled) before it is sent is not sent.
        """
        if len(self._queue) >= self.queue_max:
            raise Full(f"{self.queue_max} buyers are queued in this process")
        self._queue.append((item, tell, future))
        if not self._woken and self._may_send():
            self._woken = True
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._wake)

    def submit(self, item: T) -> asyncio.Future[R]:
        """The same for whoever would rather wait: the future gets the result or the error."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self.put(item, partial(settle, future), future)
        return future

    async def drain(self) -> None:
        """Wait until everything submitted has been answered."""
        while self._queue or self._running:
            if self._running:
                await asyncio.wait(self._running)
            else:
                await asyncio.sleep(0)

    def _may_send(self) -> bool:
        in_flight = self.in_flight
        return in_flight == 0 or (in_flight < self.in_flight_max and len(self._queue) >= self.beside_min)

    def _wake(self) -> None:
        self._woken = False
        assert self._loop is not None
        while self._queue and self._may_send():
            items: list[T] = []
            tells: list[Callable[[R | Exception], None]] = []
            while self._queue and len(items) < self.batch_max:
                item, tell, future = self._queue.popleft()
                if future is None or not future.done():
                    items.append(item)
                    tells.append(tell)
            if items:
                self.in_flight += 1
                self.batches += 1
                self.items += len(items)
                task = self._loop.create_task(self._run(items, tells))
                self._running.add(task)
                task.add_done_callback(self._ran)

    async def _run(self, items: list[T], tells: list[Callable[[R | Exception], None]]) -> None:
        results: Sequence[R | Exception]
        try:
            results = await self._send(items)
            if len(results) != len(items):
                raise Unknown(f"{len(items)} items were sent and {len(results)} results came")
        except asyncio.CancelledError:
            self._tell(tells, [Unknown("the process is stopping")] * len(tells))
            raise
        except Exception as error:  # noqa: BLE001  nothing is swallowed: everyone is told
            results = [error] * len(tells)
        self._tell(tells, results)

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self.in_flight -= 1
        self._wake()

    @staticmethod
    def _tell(tells: list[Callable[[R | Exception], None]], results: Sequence[R | Exception]) -> None:
        for tell, result in zip(tells, results, strict=True):
            try:
                tell(result)
            except Exception:
                log.exception("could not tell one of a batch")  # the others are told all the same


def settle(future: asyncio.Future[Any], given: Any) -> None:
    """Give a future its result, or its error as a value, unless nobody waits for it any more."""
    if future.done():
        return
    if isinstance(given, Exception):
        future.set_exception(given)
    else:
        future.set_result(given)
