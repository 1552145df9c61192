"""The raw hot routes and their typed twins give the same answers: to good, bad and hostile input alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.front.conftest import Front, Shop

Seen = Callable[..., Awaitable[Any]]
VARYING = {"now_ms", "poll_after_ms", "request_id"}
JSON = {"content-type": "application/json"}


@pytest.fixture
async def typed(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    """The FastAPI application alone, with the same state behind it."""
    transport = httpx.ASGITransport(app=front.app.typed, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://typed") as client:
        yield client


@pytest.fixture
async def raw(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=front.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://raw") as client:
        yield client


def same(one: httpx.Response, two: httpx.Response) -> None:
    assert one.status_code == two.status_code, (one.text, two.text)
    for header in ("content-type", "cache-control", "etag", "www-authenticate"):
        assert one.headers.get(header) == two.headers.get(header), header
    assert ("retry-after" in one.headers) == ("retry-after" in two.headers)
    for answer in (one, two):
        assert len(answer.headers.get_list("x-request-id")) == 1
    if one.content != two.content:
        first, second = one.json(), two.json()
        for key in VARYING:
            first.pop(key, None)
            second.pop(key, None)
        assert first == second


BODIES: list[bytes] = [
    b'{"sku":"A","units":1}',
    b'{"sku":"A","units":1,"again":false}',
    b'{"sku":"A","units":1,"again":true}',
    b'{"sku":"A","units":2}',
    b"",
    b"null",
    b"[]",
    b"7",
    b'"A"',
    b"{}",
    b"{",
    b"\xff",
    b"\xef\xbb\xbf{}",
    b"NaN",
    b"[" * 15_000,
    b'{"a":' * 2_500,
    b'{"sku":"A"}',
    b'{"units":1}',
    b'{"sku":1,"units":1}',
    b'{"sku":"A","units":"1"}',
    b'{"sku":"A","units":1.0}',
    b'{"sku":"A","units":true}',
    b'{"sku":"A","units":0}',
    b'{"sku":"A","units":-1}',
    b'{"sku":"A","units":101}',
    b'{"sku":"A","units":99999999999999999999999}',
    b'{"sku":"A","units":1e400}',
    b'{"sku":"A","units":null}',
    b'{"sku":null,"units":1}',
    b'{"sku":"","units":1}',
    b'{"sku":"' + b"A" * 65 + b'","units":1}',
    b'{"sku":"\\ud800","units":1}',
    b'{"sku":"\\u0000","units":1}',
    b'{"sku":"\xc3\xa9","units":1}',
    b'{"sku":"A","units":1,"again":"yes"}',
    b'{"sku":"A","units":1,"again":1}',
    b'{"sku":"A","units":1,"again":null}',
    b'{"sku":"A","units":1,"x":1}',
    b'{"sku":"A","units":1,"x":[[[{}]]]}',
    b'{"sku":"A","sku":"B","units":1}',
    b'{"sku":"A","units":1} x',
    b'  {"sku":"A","units":1}  ',
    b'{"sku":"A","units":1}' + b" " * 16_384,
    b"x" * 16_385,
    b'{"SKU":"A","units":1}',
]


async def test_bodies(
    front: Front, raw: httpx.AsyncClient, typed: httpx.AsyncClient, shop: Shop, seen: Seen
) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    await front.join("x", "ann")
    for body in BODIES:
        sent: dict[str, Any] = {"content": body, "headers": {**JSON, "x-buyer-id": "ann"}}
        one, two = [await client.post("/v1/sales/x/tickets", **sent) for client in (raw, typed)]
        same(one, two)
        assert one.status_code < 500


HEADERS: list[dict[str, Any]] = [
    {},
    {"content-type": ""},
    {"content-type": "text/plain"},
    {"content-type": "application/json; charset=utf-8"},
    {"content-type": "APPLICATION/JSON"},
    {"content-type": "application/jsonx"},
    {"content-type": "application/problem+json"},
    {"content-length": "99999"},
    {"content-length": "-1"},
    {"content-length": "x"},
    {"authorization": "Bearer x"},
    {"authorization": "Pass x"},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": b"Pass \xff"},
    {"x-buyer-id": ""},
    {"x-buyer-id": "b" * 129},
    {"x-buyer-id": b"\xff\xfe"},
    {"x-buyer-id": b"a\x01b"},
    {"x-buyer-id": "ännï".encode()},
    {"x-request-id": "given"},
    {"x-request-id": "no good"},
    {"if-none-match": "*"},
]


async def test_headers(
    front: Front, raw: httpx.AsyncClient, typed: httpx.AsyncClient, shop: Shop, seen: Seen
) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    ticket = (await front.join("x", "ann")).json()["ticket"]
    body = b'{"sku":"A","units":1}'
    for changed in HEADERS:
        base: dict[str, Any] = {"x-buyer-id": "ann", **JSON} if "authorization" not in changed else {**JSON}
        if not changed:
            base = {"x-buyer-id": "ann"}
        sent: dict[str, Any] = {"content": body, "headers": {**base, **changed}}
        one, two = [await client.post("/v1/sales/x/tickets", **sent) for client in (raw, typed)]
        if one.status_code != 202:  # a buyer of its own: new for the first, held for the second
            same(one, two)
        else:
            assert two.status_code == 200
        for path in ("/v1/time", "/v1/sales/x", "/v1/sales/x/board", f"/v1/tickets/{ticket}"):
            one, two = [await client.get(path, headers=changed) for client in (raw, typed)]
            same(one, two)


async def test_paths(
    front: Front, raw: httpx.AsyncClient, typed: httpx.AsyncClient, shop: Shop, seen: Seen
) -> None:
    await shop.publish(opens_in_s=60)
    await seen()
    for path in (
        "/v1/sales/none",
        "/v1/sales/none/board",
        "/v1/tickets/none",
        "/v1/tickets/" + "A" * 5000,
        "/v1/tickets/%00",
        "/v1/tickets/%2F",
        "/v1/sales/%2e%2e/board",
        "/v1/sales/é/board",
        "/v1/sales/x%20/board",
        "/v1/sales/x?state=odd",
        "/v1/sales//board",
        "/v1/tickets/a/b",
        "/v1/sales/x/board/",
        "/v1/time/",
        "/v1/time?x=1",
    ):
        one, two = [await client.get(path) for client in (raw, typed)]
        same(one, two)
        sent: dict[str, Any] = {"content": b'{"sku":"A","units":1}', "headers": {**JSON, "x-buyer-id": "ann"}}
        one, two = [await client.post(path + "/tickets", **sent) for client in (raw, typed)]
        same(one, two)


async def test_states(
    front: Front, raw: httpx.AsyncClient, typed: httpx.AsyncClient, shop: Shop, seen: Seen
) -> None:
    """Every outcome of a join that stores nothing, and polls of every kind of ticket."""
    await shop.publish("early", line_opens_in_s=60, opens_in_s=70)
    await shop.publish("shut")
    await shop.publish("gone", units=1)
    await shop.publish("full", opens_in_s=60, line_max=1)
    await shop.publish("strict", doc={"pass": "required"})
    await shop.publish("few", doc={"audience": ["gold"]})
    await shop.publish("x")
    await seen("x")
    await shop.switch("shut", closed=1)
    await front.join("gone", "winner")
    await front.join("full", "first")
    tickets = [(await front.join("x", f"b{number}")).json()["ticket"] for number in range(3)]
    await shop.mark(
        "x", 1, b"r", version=2, payment={"channel": "card", "state": "ready", "kind": "qr", "url": "u"}
    )
    await shop.mark("x", 2, b"k", version=2)
    for sale in ("early", "shut", "gone", "full", "strict", "few"):
        sent: dict[str, Any] = {"content": b'{"sku":"A","units":1}', "headers": {**JSON, "x-buyer-id": "ann"}}
        one, two = [await client.post(f"/v1/sales/{sale}/tickets", **sent) for client in (raw, typed)]
        same(one, two)
        assert one.status_code != 202
    for ticket in tickets:
        for headers in ({}, {"x-buyer-id": "b0"}, {"x-buyer-id": "zed"}, {"authorization": "Bearer x"}):
            one, two = [await client.get(f"/v1/tickets/{ticket}", headers=headers) for client in (raw, typed)]
            same(one, two)


async def test_whatever_json_is_sent(
    front: Front, raw: httpx.AsyncClient, typed: httpx.AsyncClient, shop: Shop, seen: Seen
) -> None:
    await shop.publish(opens_in_s=600)
    await seen()
    await front.join("x", "ann")
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=70),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )
    wish = st.dictionaries(
        st.sampled_from(["sku", "units", "again", "extra"]),
        value | st.sampled_from(["A", 1, True]),
        max_size=4,
    )
    wishes: list[bytes] = []

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(wish | value)
    def collect(made: Any) -> None:
        wishes.append(json.dumps(made).encode())

    # Not in this loop: a door that has not looked for seconds says 503, and rightly.
    await asyncio.to_thread(collect)
    for body in wishes:
        sent: dict[str, Any] = {"content": body, "headers": {**JSON, "x-buyer-id": "ann"}}
        one, two = [await client.post("/v1/sales/x/tickets", **sent) for client in (raw, typed)]
        same(one, two)
        assert one.status_code < 500
