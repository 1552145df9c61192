"""HTTP/1.1 requests as bytes, ready to be sent, and supplies of them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from app.tokens import Keyring, Pass
from loadtest.generator import closed_loop

SKU = "PH-128"
BODY = b'{"sku":"PH-128","units":1}'
ASK_WITHIN_S = 120.0
TAKES = 8  # times that joins are asked for again after 503: a busy machine is no reason to give up


def request(method: str, path: str, headers: bytes = b"", body: bytes = b"") -> bytes:
    """headers: whole lines, each with its CRLF."""
    tail = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body) if body else b""
    return b"%b %b HTTP/1.1\r\nHost: fairdrop\r\n%b%b\r\n%b" % (
        method.encode(), path.encode(), headers, tail, body
    )  # fmt: skip


class Joins:
    """Join requests, each of a buyer of its own with a pass of its own. Buyers have integer ids, never used again.

    Passes are signed with the installation's key, as the front would: getting them is not what is measured.
    """

    def __init__(self, ring: Keyring, sale: str, closes_ms: int, first: int) -> None:
        self._ring = ring
        self._sale = sale
        self._closes_ms = closes_ms
        self._next = first
        self._ready: list[bytes] = []
        self._head = (
            b"POST /v1/sales/%b/tickets HTTP/1.1\r\nHost: fairdrop\r\nAuthorization: Pass " % sale.encode()
        )
        self._tail = (b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)) + BODY

    def make(self) -> bytes:
        number = self._next
        self._next += 1
        text = self._ring.pass_sign(Pass(self._sale, b"%d" % number, self._closes_ms))
        return self._head + text.encode("ascii") + self._tail

    def prepare(self, count: int) -> None:
        """Have so many requests ready: signing must not be counted as the generator's work."""
        while len(self._ready) < count:
            self._ready.append(self.make())

    def take(self, count: int) -> list[bytes]:
        self.prepare(count)
        found, self._ready = self._ready[:count], self._ready[count:]
        return found

    def __call__(self) -> Iterator[bytes]:
        """What is ready, each once."""
        while self._ready:
            yield self._ready.pop()


class Repeated:
    """The same requests over and over."""

    def __init__(self, requests: list[bytes]) -> None:
        self.requests = requests

    def __call__(self) -> Iterator[bytes]:
        return cycle(self.requests)


async def ask_all(port: int, requests: list[bytes], connections: int = 64) -> list[Any]:
    """Send each request once and return the JSON answers (in no order). RuntimeError: one was refused."""
    result, bodies = await closed_loop(
        "127.0.0.1", port, iter(requests), connections=connections, seconds=ASK_WITHIN_S, keep_bodies=True
    )
    if any(status >= 400 or status == 0 for status in result.statuses):
        raise RuntimeError(f"{dict(result.statuses)}: {bodies[-1][:300] if bodies else b''!r}")
    return [json.loads(body) for body in bodies]


async def tickets(port: int, joins: Joins, count: int) -> list[dict[str, Any]]:
    """So many new tickets, as they are told at the join. RuntimeError: there were not that many in TAKES times."""
    found: list[dict[str, Any]] = []
    seen: Counter[int] = Counter()
    for _ in range(TAKES):
        result, bodies = await closed_loop(
            "127.0.0.1", port, iter(joins.take(count - len(found))), connections=min(32, count),
            seconds=ASK_WITHIN_S, keep_bodies=True,
        )  # fmt: skip
        seen += result.statuses
        found += [one for one in map(json.loads, bodies) if one.get("ticket")]
        if len(found) >= count:
            return found
        await asyncio.sleep(0.5)
    raise RuntimeError(f"{len(found)} of {count} tickets: {dict(seen)}")
