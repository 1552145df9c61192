"""Server-Sent Events: the whole document at each change, an end after an end, and limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.front.conftest import Front, Open, Shop, until

Seen = Callable[..., Awaitable[Any]]


class Stream:
    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.retry_ms: int | None = None
        self._lines = response.aiter_lines()

    async def next(self) -> dict[str, Any] | None:
        """The next `ticket` document; None at the end of the stream."""
        event = ""
        async for line in self._lines:
            name, _, value = line.partition(": ")
            if name == "retry":
                self.retry_ms = int(value)
            elif name == "event":
                event = value
            elif name == "data":
                assert event == "ticket"
                told: dict[str, Any] = json.loads(value)
                return told
        return None


@asynccontextmanager
async def stream_of(front: Front, ticket: str, buyer: str | None = None) -> AsyncIterator[Stream]:
    headers = {"X-Buyer-Id": buyer} if buyer else {}
    async with front.http.stream("GET", f"/v1/tickets/{ticket}/events", headers=headers) as response:
        yield Stream(response)


async def test_a_stream_tells_every_change_and_ends_with_the_ticket(
    front: Front, shop: Shop, seen: Seen
) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    async with asyncio.timeout(180), stream_of(front, ticket, "ann") as stream:
        assert stream.response.status_code == 200
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["cache-control"] == "no-store"
        told = await stream.next()
        assert told is not None and told["state"] == "waiting" and told["ticket"] == ticket
        assert stream.retry_ms is not None and 1000 <= stream.retry_ms <= 4000

        await shop.open_now("x")

        async def served() -> bool:
            return bool((await shop.advance("x")).__class__.__name__ == "Served")

        await until(served)
        while told is not None and told["state"] == "waiting":
            told = await stream.next()
        assert told is not None and told["state"] == "claimed"
        await shop.mark("x", 1, b"r", version=2, payment={"channel": "sandbox", "state": "starting"})
        while told is not None and told["state"] == "claimed":
            told = await stream.next()
        assert told is not None and told["state"] == "reserved" and told["order"]["order_no"]
        await shop.mark(
            "x",
            1,
            b"r",
            version=3,
            payment={"channel": "sandbox", "state": "ready", "kind": "redirect", "url": "u"},
        )
        while told is not None and told["payment"]["state"] == "starting":
            told = await stream.next()
        assert told is not None and told["payment"]["url"] == "u"
        await shop.mark("x", 1, b"p", version=4)
        while told is not None and told["state"] == "reserved":
            told = await stream.next()
        assert told is not None and told["state"] == "paid"
        assert await stream.next() is None
    await until(lambda: front.app.door.streams.open == 0)
    again = await front.http.get(f"/v1/tickets/{ticket}/events")
    assert again.status_code == 204 and again.content == b""


async def test_leaving_ends_the_stream_at_once(front: Front, shop: Shop, seen: Seen) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    async with asyncio.timeout(180), stream_of(front, ticket) as stream:
        assert (await stream.next())["state"] == "waiting"  # type: ignore[index]
        await front.http.delete(f"/v1/tickets/{ticket}", headers={"X-Buyer-Id": "ann"})
        assert (await stream.next())["state"] == "left"  # type: ignore[index]
        assert await stream.next() is None


async def test_beyond_sse_max_a_client_is_told_to_poll_and_a_place_becomes_free(
    open_door: Open, shop: Shop, seen: Seen
) -> None:
    front = await open_door(sse_max=2)
    await shop.publish(opens_in_s=60)
    await seen(door=front)
    ticket = (await front.join("x", "ann")).json()["ticket"]
    async with asyncio.timeout(180):
        async with stream_of(front, ticket) as one, stream_of(front, ticket) as two:
            assert one.response.status_code == two.response.status_code == 200
            refused = await front.http.get(f"/v1/tickets/{ticket}/events")
            assert (
                refused.status_code == 503
                and refused.json()["code"] == "busy"
                and refused.headers["retry-after"]
            )
            assert (await front.poll(ticket)).status_code == 200
        await until(lambda: front.app.door.streams.open == 0)
        async with stream_of(front, ticket) as stream:
            assert stream.response.status_code == 200


async def test_draining_ends_streams_so_that_clients_come_back_elsewhere(
    front: Front, shop: Shop, seen: Seen
) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    async with asyncio.timeout(180), stream_of(front, ticket) as stream:
        await stream.next()
        front.app.drain()
        assert await stream.next() is None
    assert (await front.http.get(f"/v1/tickets/{ticket}/events")).status_code == 503
