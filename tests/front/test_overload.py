"""A front door that has too much to do says so at once: to whom it never read, and to whom Redis would keep waiting."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis.asyncio as redis_async

from tests.front.conftest import ORIGIN, Front, Open, Shop, until

Seen = Callable[..., Awaitable[Any]]


@pytest.mark.parametrize(
    ("begin", "may_wait"),
    [
        (b"POST /v1/sales/x/tickets HTTP/1.1\r\n", True),
        (b"GET /v1/tickets/abc HTTP/1.1\r\n", True),
        (b"GET /v1/sales/x/board HTTP/1.1\r\n", False),  # cheap, and what everyone goes by
        (b"GET /readyz HTTP/1.1\r\n", False),
        (b"DELETE /v1/tickets/abc HTTP/1.1\r\n", False),  # gives something back
        (b"", False),
    ],
)
async def test_joins_and_polls_may_wait(front: Front, begin: bytes, may_wait: bool) -> None:
    assert front.app.may_wait(begin) is may_wait


@pytest.mark.parametrize("origin", [None, ORIGIN.encode(), b"https://elsewhere.example"])
async def test_who_is_turned_away_unread_gets_a_whole_answer(front: Front, origin: bytes | None) -> None:
    head = b"post /v1/sales/x/tickets http/1.1\r\nhost: x\r\n"
    if origin is not None:
        head += b"origin: %b\r\n" % origin
    before = front.app.door.counts["refused", "busy"]
    said, _, body = front.app.turned_away(head, b"date: now\r\n").partition(b"\r\n\r\n")
    lines = said.split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines[1:])
    assert lines[0] == b"HTTP/1.1 503 Service Unavailable"
    assert int(headers[b"content-length"]) == len(body)
    assert 1 <= int(headers[b"retry-after"]) <= 4
    assert headers[b"date"] == b"now"
    assert headers.get(b"access-control-allow-origin") == (
        ORIGIN.encode() if origin == ORIGIN.encode() else None
    )
    problem = json.loads(body)
    assert (problem["status"], problem["code"]) == (503, "busy")
    assert problem["request_id"].encode() == headers[b"x-request-id"]
    assert front.app.door.counts["refused", "busy"] == before + 1


async def test_newcomers_do_not_wait_for_a_redis_that_keeps_others_waiting(
    open_door: Open, shop: Shop, redis: redis_async.Redis
) -> None:
    front = await open_door(redis_deadline_s=60.0)
    await shop.publish("x", units=500)
    await until(lambda: front.app.door.snapshots.get("x"))
    claims = front.app.door.claims
    claims._wait_max_s = 60.0
    claims._crowd_min = 1
    await redis.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
    calls = front.app.door.settings.batch_in_flight_max
    under_way = []
    for number in range(calls + 1):  # as many calls as may be under way, and one buyer who has to wait
        under_way.append(asyncio.create_task(front.join("x", f"first-{number}")))
        await until(lambda n=number: claims.joined + sum(map(len, claims._queues.values())) > n)  # type: ignore[misc]
    (queue,) = claims._queues.values()
    claims._wait_max_s = 0.1
    await until(lambda: queue.first is not None and time.perf_counter() - queue.first[3] > 0.1)
    refused = await front.join("x", "newcomer")
    assert not any(task.done() for task in under_way)  # who came before waits on
    assert (refused.status_code, refused.json()["code"]) == (503, "busy")
    assert refused.headers["retry-after"]
    await redis.execute_command("CLIENT", "UNPAUSE")
    assert [(await task).status_code for task in under_way] == [202] * (calls + 1)
    assert (await front.join("x", "newcomer")).status_code == 202


async def test_while_redis_keeps_joins_waiting_further_joins_are_not_even_read(
    open_door: Open, shop: Shop, redis: redis_async.Redis
) -> None:
    front = await open_door(overload_wait_max_ms=25, overload_turn_ms=60_000, redis_deadline_s=60.0)
    await shop.publish("x", units=500)
    await until(lambda: front.app.door.snapshots.get("x"))
    assert (await front.join("x", "ann")).status_code == 202
    gate = front.server.config.http.lane.gate  # type: ignore[union-attr]
    await until(lambda: gate.under_way == 0)
    gate.limit = 3
    gate.crowd_min, gate._per_s = 3, 0.0
    await redis.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
    under_way = [asyncio.create_task(front.join("x", f"first-{number}")) for number in range(3)]
    await until(lambda: gate.under_way == 3)
    before = front.app.door.claims.joined
    refused = await front.join("x", "newcomer")
    assert (refused.status_code, refused.json()["code"]) == (503, "busy")
    assert 1 <= int(refused.headers["retry-after"]) <= 4
    assert (await front.http.get("/v1/sales/x/board")).status_code == 200  # nobody else is held up
    assert front.app.door.claims.joined == before
    await redis.execute_command("CLIENT", "UNPAUSE")
    assert [(await task).status_code for task in under_way] == [202] * 3
    assert (await front.join("x", "newcomer")).status_code == 202
