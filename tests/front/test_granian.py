"""On granian, by its own interface: every route has the answer that it has on uvicorn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from app.serving.server import Granian, listen
from tests.front.conftest import ORIGIN, Front, Shop, settings_for, until
from tests.front.test_express import BODY, CASES, ME, TICKETS, told

Seen = Callable[..., Awaitable[Any]]

COLD: dict[str, dict[str, Any]] = {
    "a typed route": {"method": "GET", "url": "/v1/sales/x/ticket", "headers": ME},
    "nobody there": {"method": "GET", "url": "/v1/nothing"},
    "another method": {"method": "PUT", "url": "/v1/sales/x"},
    "a head alone": {"method": "HEAD", "url": "/v1/sales/x/board"},
    "a page of another origin": {
        "method": "OPTIONS",
        "url": TICKETS,
        "headers": {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"},
    },
    "hot, of another origin": {"method": "GET", "url": "/v1/sales/x/board", "headers": {"Origin": ORIGIN}},
    "a body for a typed route": {
        "method": "POST", "url": "/v1/tickets/TICKET/payment", "json": {"channel": "no such"}, "headers": ME
    },
    "a body that is too large for it": {
        "method": "POST", "url": "/v1/tickets/TICKET/payment", "content": b"x" * 20_000, "headers": ME
    },
}  # fmt: skip


@pytest.fixture
async def granian(front: Front, redis_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the same application, served by granian as well."""
    wire = listen("127.0.0.1", 0, 64, what="front")
    port = wire.getsockname()[1]
    server = Granian(front.app, settings_for(redis_url), wire)
    serving = asyncio.create_task(server.serve())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:

        async def answers() -> bool:
            try:
                return (await http.get("/healthz")).status_code == 200
            except httpx.TransportError:
                return False

        await until(answers)
        yield http
    server.stop()
    await serving


async def test_granian_and_uvicorn_say_the_same(
    front: Front, shop: Shop, seen: Seen, granian: httpx.AsyncClient
) -> None:
    await shop.publish("x", units=5)
    await seen()
    joined = await front.join("x", "b1")
    assert joined.status_code == 202
    for case, asked in {**CASES, **COLD}.items():
        asked = {**asked, "url": asked["url"].replace("TICKET", joined.json()["ticket"])}
        by_uvicorn, by_granian = told(await front.http.request(**asked)), told(await granian.request(**asked))
        by_granian[1].pop("server")
        if by_uvicorn[0] == 304 or not by_uvicorn[-1]:  # whether a length of nothing is told is the server's
            by_uvicorn, by_granian = (*by_uvicorn[:3], b""), (*by_granian[:3], b"")
        assert by_granian == by_uvicorn, case


async def test_a_join_by_granian_may_come_in_pieces(
    shop: Shop, seen: Seen, granian: httpx.AsyncClient
) -> None:
    await shop.publish("x", units=5)
    await seen()

    async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    headers = {**ME, "Content-Type": "application/json"}
    body = pieces(b'{"sku":"A",', b'"units":1}')
    assert (await granian.post(TICKETS, content=body, headers=headers)).status_code == 202
    large = await granian.post(TICKETS, content=pieces(*[b" " * 9_000] * 4), headers=headers)
    assert (large.status_code, large.json()["code"]) == (413, "too_large")
    assert large.headers["connection"] == "close"  # the rest of the body is never read
    assert (await granian.post(TICKETS, json=BODY, headers=ME)).status_code == 200


async def test_granian_keeps_a_connection_whose_request_has_a_length_of_nothing(
    granian: httpx.AsyncClient,
) -> None:
    answer = await granian.get("/v1/sales", headers={"Content-Length": "0"})
    assert answer.headers.get("connection") != "close"


async def test_an_event_stream_by_granian_ends_with_its_client(
    front: Front, shop: Shop, seen: Seen, granian: httpx.AsyncClient
) -> None:
    await shop.publish("x", opens_in_s=60)
    await seen()
    ticket = (await granian.post(TICKETS, json=BODY, headers=ME)).json()["ticket"]
    await seen()
    async with granian.stream("GET", f"/v1/tickets/{ticket}/events", headers=ME) as stream:
        assert stream.status_code == 200
        lines = stream.aiter_lines()
        while "waiting" not in await anext(lines):
            pass
        assert front.app.door.streams.open == 1
    await until(lambda: front.app.door.streams.open == 0)


async def test_a_client_of_granian_that_leaves_before_its_answer_harms_nobody(
    front: Front, shop: Shop, seen: Seen, granian: httpx.AsyncClient, redis: Any
) -> None:
    await shop.publish("x", units=5)
    await seen()
    await redis.execute_command("CLIENT", "PAUSE", 300, "WRITE")
    leaving = asyncio.create_task(granian.post(TICKETS, json=BODY, headers={"X-Buyer-Id": "gone"}))
    await until(lambda: front.app.door.claims.batches)
    leaving.cancel()
    assert (await granian.post(TICKETS, json=BODY, headers=ME)).status_code == 202
    assert (await granian.get("/healthz")).status_code == 200


async def raw(granian: httpx.AsyncClient, sent: bytes) -> tuple[bytes, bytes]:
    """Head and body of all that a connection of its own is told before it ends."""
    reader, writer = await asyncio.open_connection(granian.base_url.host, granian.base_url.port)
    writer.write(sent)
    head, _, body = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
    writer.close()
    return head.lower(), body


async def test_granian_says_that_a_connection_ends_where_a_chunked_body_breaks_off_and_is_refused(
    granian: httpx.AsyncClient,
) -> None:
    head, _ = await raw(
        granian,
        b"POST /v1/sales/x/pass HTTP/1.1\r\nHost: x\r\nX-Buyer-Id: b\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\nzz\r\n\r\n",
    )
    assert head.count(b"connection: close") == 1


async def test_an_answer_without_a_body_has_no_length_either(
    front: Front, shop: Shop, seen: Seen, granian: httpx.AsyncClient
) -> None:
    """RFC 9110, 8.6: not with 204, and with 304 it would be that of the document that is not sent."""
    await shop.publish("x", units=5)
    await seen()
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    for http in (front.http, granian):
        for path in ("/v1/sales", "/v1/sales/x", "/v1/sales/x/board", "/v1/sales/x/draw"):
            unchanged = await http.get(path, headers={"If-None-Match": "*"})
            assert unchanged.status_code == 304
            assert "content-length" not in unchanged.headers, path
        allowed = await http.options(TICKETS, headers=preflight)
        assert allowed.status_code == 204
        assert "content-length" not in allowed.headers
