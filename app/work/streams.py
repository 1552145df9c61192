"""Claims and asks, as a worker reads them from Redis."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from app.alarm import alert
from app.errors import DidNotHappen
from app.keys import GROUP, SaleKeys
from app.redis.link import Link

CLUSTER_READ_EVERY_S = (
    0.02  # between two looks at the streams of sales on a cluster: what a claim waits for at most
)
SHUT_LOOK_EVERY_S = 0.2  # between two looks for the streams of a sale that is being made anew

Entry = tuple[bytes, Sequence[bytes]]  # id, [field, value, …]


class Streams:
    """Reads one kind of stream of every watched sale as a consumer of the group, on a link of its own if it blocks.

    In a cluster two sales' streams may not be named in one command: each is read for itself, all in one pipeline, and
    instead of blocking it is looked again every CLUSTER_READ_EVERY_S.
    """

    def __init__(self, link: Link, consumer: str, key: Callable[[str], str]) -> None:
        self.link = link
        self.consumer = consumer
        self.key = key
        self._missing: dict[str, float] = {}  # sale -> until when it is passed over, monotonic s

    async def read(self, sales: Sequence[str], count: int, *, block_ms: int = 0) -> dict[str, list[Entry]]:
        """Entries that no consumer has had yet: sale → entries. Waits up to block_ms for the first."""
        sales = self._there(sales)
        if not sales:
            return {}
        if self.link.spread:
            return await self._read_each(sales, count, block_ms)
        names = [self.key(sale) for sale in sales]
        block = ("BLOCK", block_ms) if block_ms else ()
        try:
            found = await self.link.call(
                "XREADGROUP", "GROUP", GROUP, self.consumer, "COUNT", count, *block,
                "STREAMS", *names, *[">"] * len(names),
                deadline_s=self.link.deadline_s + block_ms / 1000,
            )  # fmt: skip
        except DidNotHappen as error:
            if str(error).startswith("NOGROUP"):
                await self._find_missing(sales)
                return {}
            raise
        by_name = dict(zip(names, sales, strict=True))
        return {by_name[name.decode()]: entries for name, entries in found or ()}

    async def _read_each(self, sales: Sequence[str], count: int, block_ms: int) -> dict[str, list[Entry]]:
        """Each sale's stream for itself. Those whose node is away are passed over, unless no node answers."""
        until = time.monotonic() + block_ms / 1000
        while True:
            answers = await self.link.pipeline(
                [
                    (
                        "XREADGROUP",
                        "GROUP",
                        GROUP,
                        self.consumer,
                        "COUNT",
                        count,
                        "STREAMS",
                        self.key(sale),
                        ">",
                    )
                    for sale in sales
                ]
            )
            found: dict[str, list[Entry]] = {}
            failed: list[Exception] = []
            for sale, answer in zip(sales, answers, strict=True):
                if isinstance(answer, Exception):
                    if str(answer).startswith("NOGROUP"):
                        await self._find_missing([sale])
                    else:
                        failed.append(answer)
                elif answer:
                    found[sale] = answer[0][1]
            if len(failed) == len(sales):
                raise failed[0]
            if found or time.monotonic() >= until:
                return found
            await asyncio.sleep(CLUSTER_READ_EVERY_S)

    def _there(self, sales: Sequence[str]) -> list[str]:
        """Those whose stream was not missing at the last look."""
        now = time.monotonic()
        return [sale for sale in sales if self._missing.get(sale, 0.0) <= now]

    async def _find_missing(self, sales: Sequence[str]) -> None:
        """A stream without its group must not stop the others.

        It is made in one step with the sale. A sale that is shut is being made anew, and is looked at again in a
        moment; from one that is open somebody removed it.
        """
        for sale in sales:
            fence = ("HMGET", SaleKeys(sale).sale, "epoch", "home")
            before, groups, after = await self.link.pipeline(
                [fence, ("XINFO", "GROUPS", self.key(sale)), fence]
            )
            if isinstance(groups, Exception) and "no such key" not in str(groups):
                raise groups
            if groups and not isinstance(groups, Exception):
                continue
            is_open = not isinstance(before, Exception) and before == after and before[1]
            self._missing[sale] = math.inf if is_open else time.monotonic() + SHUT_LOOK_EVERY_S
            if is_open:
                alert("stream_missing", "a stream of a published sale has no consumer group", sale=sale)

    async def own_pending(self, sales: Sequence[str], count: int) -> dict[str, list[Entry]]:
        """Entries of each sale that this consumer has had and not given up. One round trip for all sales."""
        sales = self._there(sales)
        answers = await self.link.pipeline(
            [
                ("XREADGROUP", "GROUP", GROUP, self.consumer, "COUNT", count, "STREAMS", self.key(sale), "0")
                for sale in sales
            ]
        )
        pending: dict[str, list[Entry]] = {}
        failed: list[Exception] = []
        for sale, found in zip(sales, answers, strict=True):
            if isinstance(found, Exception):
                failed.append(found)
                continue
            pending[sale] = [entry for _, entries in found or () for entry in entries if entry[1] is not None]
        if failed and not pending:
            raise failed[0]  # of several nodes those that answer are served
        return pending

    async def take_over(
        self, sale: str, idle_ms: int, count: int, after: bytes = b"0-0"
    ) -> tuple[list[Entry], bytes]:
        """Entries that some consumer has had for longer than idle_ms: it died, or stalls. And behind which one to go
        on; 0-0: there were no more."""
        reply = await self.link.call(
            "XAUTOCLAIM", self.key(sale), GROUP, self.consumer, idle_ms, after, "COUNT", count
        )
        return [entry for entry in reply[1] if entry is not None and entry[1] is not None], reply[0]

    def is_away(self, sale: str) -> bool:
        """Whether the node of a cluster that holds this sale cannot be reached, while another can."""
        return self.link.connected and not self.link.at(self.key(sale)).connected

    def forget_missing(self) -> None:
        self._missing.clear()
