"""Coalesces what arrives while a call is under way into the next call. No timers: an idle process sends at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from app.errors import DidNotHappen, Unknown

T = TypeVar("T")
R = TypeVar("R")


class Full(DidNotHappen):
    """The queue is at its maximum; nothing was sent. Answer 503 with Retry-After."""


class Batcher(Generic[T, R]):
    """Sends submitted items in batches; each future gets the result at its place, or the error of its batch.

    send: takes 1..batch_max items and returns as many results, in order. An error of `send` goes to every item of the
    batch as it is (DidNotHappen or Unknown). At most in_flight_max calls at once, at most queue_max items waiting.
    An item whose future was cancelled before it was sent is not sent.
    """

    def __init__(
        self,
        send: Callable[[list[T]], Awaitable[list[R]]],
        batch_max: int = 256,
        in_flight_max: int = 2,
        queue_max: int = 20_000,
    ) -> None:
        self._send = send
        self.batch_max = batch_max
        self.in_flight_max = in_flight_max
        self.queue_max = queue_max
        self.in_flight = 0
        self.batches = 0  # sent so far, for metrics: items / batches is the mean batch
        self.items = 0
        self._queue: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._woken = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def first(self) -> T | None:
        """The item that has been queued for longest; None: nobody waits."""
        return self._queue[0][0] if self._queue else None

    def submit(self, item: T) -> asyncio.Future[R]:
        """Queue one item. Raises Full at the maximum. Everything submitted in one turn of the loop goes together."""
        if len(self._queue) >= self.queue_max:
            raise Full(f"{self.queue_max} buyers are queued in this process")
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._queue.append((item, future))
        if not self._woken and self.in_flight < self.in_flight_max:
            self._woken = True
            loop.call_soon(self._wake)
        return future

    async def drain(self) -> None:
        """Wait until everything submitted has been answered."""
        while self._queue or self._running:
            if self._running:
                await asyncio.wait(self._running)
            else:
                await asyncio.sleep(0)

    def _wake(self) -> None:
        self._woken = False
        assert self._loop is not None
        while self._queue and self.in_flight < self.in_flight_max:
            batch: list[tuple[T, asyncio.Future[R]]] = []
            while self._queue and len(batch) < self.batch_max:
                entry = self._queue.popleft()
                if not entry[1].done():
                    batch.append(entry)
            if batch:
                self.in_flight += 1
                self.batches += 1
                self.items += len(batch)
                task = self._loop.create_task(self._run(batch))
                self._running.add(task)
                task.add_done_callback(self._ran)

    async def _run(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self._send([item for item, _ in batch])
            if len(results) != len(batch):
                raise Unknown(f"{len(batch)} items were sent and {len(results)} results came")
        except asyncio.CancelledError:
            self._fail(batch, Unknown("the process is stopping"))
            raise
        except Exception as error:  # noqa: BLE001  nothing is swallowed: it goes to every waiter
            self._fail(batch, error)
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self.in_flight -= 1
        self._wake()

    @staticmethod
    def _fail(batch: list[tuple[T, asyncio.Future[R]]], error: Exception) -> None:
        for _, future in batch:
            if not future.done():
                future.set_exception(error)
