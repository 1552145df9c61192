"""By the express lane or by ASGI: a hot request has the same answer."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from app.door.hot import Origins
from app.errors import CannotStart
from tests.front.conftest import Front, Shop

Seen = Callable[..., Awaitable[Any]]
TICKETS = "/v1/sales/x/tickets"
BODY = {"sku": "A", "units": 1}
ME = {"X-Buyer-Id": "b1"}

CASES: dict[str, dict[str, Any]] = {
    "joined before": {"method": "POST", "url": TICKETS, "json": BODY, "headers": ME},
    "another body": {"method": "POST", "url": TICKETS, "json": {"sku": "B", "units": 1}, "headers": ME},
    "nobody": {"method": "POST", "url": TICKETS, "json": BODY},
    "no body": {"method": "POST", "url": TICKETS, "headers": ME},
    "not JSON": {"method": "POST", "url": TICKETS, "content": b"{", "headers": ME},
    "too large": {"method": "POST", "url": TICKETS, "content": b"x" * 20_000, "headers": ME},
    "no such item": {"method": "POST", "url": TICKETS, "json": {"sku": "Z", "units": 1}, "headers": ME},
    "no such sale": {"method": "POST", "url": "/v1/sales/zz/tickets", "json": BODY, "headers": ME},
    "bad pass": {"method": "POST", "url": TICKETS, "json": BODY, "headers": {"Authorization": "Pass no"}},
    "sale": {"method": "GET", "url": "/v1/sales/x"},
    "board": {"method": "GET", "url": "/v1/sales/x/board"},
    "board, known": {"method": "GET", "url": "/v1/sales/x/board", "headers": {"If-None-Match": "*"}},
    "ticket": {"method": "GET", "url": "/v1/tickets/TICKET", "headers": ME},
    "ticket of somebody": {"method": "GET", "url": "/v1/tickets/TICKET"},
    "no such ticket": {"method": "GET", "url": "/v1/tickets/nonsense"},
    "named request": {"method": "GET", "url": "/v1/sales/x/board", "headers": {"X-Request-Id": "r-1"}},
    "with a query": {"method": "GET", "url": "/v1/sales/x/board?now=1"},
    "spelled otherwise": {"method": "GET", "url": "/v1/sales/%78/board"},
}

CHANGING = re.compile(
    rb'"(now_ms|poll_after_ms|request_id)":("[^"]*"|\d+|null)|"[^"]*repeat the same request[^"]*"'
)


def told(answer: httpx.Response) -> tuple[Any, ...]:
    headers = {name: value for name, value in answer.headers.items() if name not in ("connection", "date")}
    if (
        "etag" in headers
    ):  # of the board as it is now: the join may show in one answer and not yet in the other
        headers["etag"] = ""
    given = headers.pop("x-request-id")
    length = headers.pop("content-length", None)
    body = CHANGING.sub(b"", answer.content)
    mine = given if given == answer.request.headers.get("x-request-id") else ""
    return answer.status_code, headers, mine, (length is None), body


@pytest.mark.parametrize("case", CASES)
async def test_the_lane_and_asgi_say_the_same(front: Front, shop: Shop, seen: Seen, case: str) -> None:
    await shop.publish("x", units=5)
    await seen()
    joined = await front.join("x", "b1")
    assert joined.status_code == 202
    asked = {**CASES[case]}
    asked["url"] = asked["url"].replace("TICKET", joined.json()["ticket"])
    finds, found = front.app.finds, 0

    def counted(method: bytes, target: bytes) -> Any:
        nonlocal found
        hot = finds(method, target)
        found += hot is not None
        return hot

    front.app.finds = counted  # type: ignore[method-assign]
    by_lane = await front.http.request(**asked)
    assert found == (0 if "%" in asked["url"] or "?" in asked["url"] else 1)
    headers = {**asked.pop("headers", {}), "Connection": "close"}
    by_asgi = await front.http.request(**asked, headers=headers)
    assert told(by_lane) == told(by_asgi)


@pytest.mark.parametrize("bad", ['["https://shop.example"]', "shop.example", "https://shop.example/", ""])
def test_an_origin_that_no_page_has_stops_the_front(bad: str) -> None:
    with pytest.raises(CannotStart, match="is no origin"):
        Origins(["https://shop.example", bad])


def test_pages_of_a_shop_and_of_its_app_have_origins() -> None:
    for origin in (
        "https://shop.example",
        "http://localhost:3000",
        "http://[::1]:3000",
        "capacitor://localhost",
    ):
        allowed = Origins([origin]).headers(origin.encode())
        assert (b"access-control-allow-origin", origin.encode()) in allowed
