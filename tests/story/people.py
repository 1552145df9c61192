"""The people of the story: a shop's operator, its buyers, and what they can see. Each does only what the HTTP API lets
them do; nobody looks into a store."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

LOOKS_IN_A_ROW = 12  # two front doors share the port: the chance that one was never asked is 1 in 2,048

WITHIN_S = 180.0  # for anything that happens by itself: far more than it takes, a busy machine is no failure


async def until(look: Callable[[], Awaitable[T]], fine: Callable[[T], bool], within_s: float = WITHIN_S) -> T:
    """Look again and again until it is fine. AssertionError: with what was seen last."""
    deadline = time.monotonic() + within_s
    while True:
        seen = await look()
        if fine(seen):
            return seen
        assert time.monotonic() < deadline, f"not within {within_s} s; seen last: {seen}"
        await asyncio.sleep(0.05)


def instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


class Operator:
    """Somebody at the shop, with a key to the office."""

    def __init__(self, front: str, office: str, key: str) -> None:
        self.front = front
        self.http = httpx.AsyncClient(
            base_url=office, headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False
        )

    async def get(self, path: str, **params: Any) -> Any:
        answer = await self.http.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, path: str, body: Any = None) -> Any:
        answer = await self.http.post(
            path, json=body or {}, headers={"Idempotency-Key": secrets.token_hex(8)}
        )
        assert answer.status_code < 300, f"{path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    async def publishes_a_sale(self, *, units: int, opens_in_s: float, **terms: Any) -> str:
        """The line opens at once, the sale so many seconds later. Returns the sale's id."""
        now = time.time()
        sale = f"story-{secrets.token_hex(4)}"
        document: dict[str, Any] = {
            "id": sale,
            "title": "Phone 2026",
            "line_opens_at": instant(now),
            "opens_at": instant(now + opens_in_s),
            "closes_at": instant(now + 3_600),
            "draw_freeze_s": 0,
            "pay_within_s": 60,
            "channels": ["sandbox"],
            "default_channel": "sandbox",
            "items": [
                {
                    "sku": "PH-128",
                    "title": "Phone, 128 GB",
                    "price_minor": 499_900,
                    "currency": "CNY",
                    "units": units,
                }
            ],
        }
        await self.post("/v1/admin/sales", document | terms)
        await self.post(f"/v1/admin/sales/{sale}/publish")
        await self.is_known_everywhere(sale)
        return sale

    async def is_known_everywhere(self, sale: str) -> None:
        """What an operator does is live on every front door within 200 ms. Each look may reach another one."""
        known = 0
        while known < LOOKS_IN_A_ROW:
            async with httpx.AsyncClient(base_url=self.front, timeout=60, trust_env=False) as anyone:
                known = known + 1 if (await anyone.get(f"/v1/sales/{sale}")).status_code == 200 else 0
            await asyncio.sleep(0.01)

    async def opens(self, sale: str, in_s: float) -> None:
        """The opening may be moved until it has passed."""
        path = f"/v1/admin/sales/{sale}"
        while True:
            etag = (await self.http.get(path)).headers["ETag"]
            answer = await self.http.patch(
                path, json={"opens_at": instant(time.time() + in_s)}, headers={"If-Match": etag}
            )
            if answer.status_code == 200:
                return
            assert in_s < 60, answer.text
            in_s *= 3  # on a busy machine the minute may have passed on its way

    async def closes(self, sale: str) -> None:
        await self.post(f"/v1/admin/sales/{sale}/close")

    async def sees_orders(self, sale: str) -> list[dict[str, Any]]:
        orders: list[dict[str, Any]] = (await self.get(f"/v1/admin/sales/{sale}/orders"))["data"]
        return orders

    async def sees_events(self, sale: str, order_no: str | None = None) -> list[str]:
        """The types of what the shop was told about this sale (or one of its orders), in order."""
        types: list[str] = []
        after = ""
        while True:
            page = await self.get("/v1/admin/events", limit=1000, **({"after": after} if after else {}))
            for event in page["data"]:
                if event["data"].get("sale") == sale and (
                    order_no is None or event["data"].get("order_no") == order_no
                ):
                    types.append(event["type"])
            if not page["data"] or not page["next_cursor"] or page["next_cursor"] == after:
                return types
            after = page["next_cursor"]

    async def audits(self, sale: str) -> None:
        """Every invariant holds, now or in a moment: some hand-offs may still be on their way."""
        await until(lambda: self.get(f"/v1/admin/sales/{sale}/audit"), lambda audit: bool(audit["ok"]))


class Buyer:
    """Somebody with a phone, who knows the sale's address and nothing else."""

    def __init__(self, front: str, name: str, sale: str) -> None:
        self.name = f"{name}-{secrets.token_hex(3)}"
        self.sale = sale
        self.ticket = ""
        self.seen: list[str] = []
        self.http = httpx.AsyncClient(
            base_url=front,
            headers={"X-Buyer-Id": self.name},
            timeout=60,
            trust_env=False,
            follow_redirects=False,
        )

    async def gets_a_pass(self, phone: str | None = None) -> None:
        body = {"contact": {"phone": phone, "language": "zh"}} if phone else {}
        answer = await self.http.post(f"/v1/sales/{self.sale}/pass", json=body)
        assert answer.status_code == 201, answer.text
        del self.http.headers["X-Buyer-Id"]
        self.http.headers["Authorization"] = f"Pass {answer.json()['pass']}"

    async def taps(self, sku: str = "PH-128", units: int = 1, **more: Any) -> httpx.Response:
        answer = await self.http.post(
            f"/v1/sales/{self.sale}/tickets", json={"sku": sku, "units": units, **more}
        )
        if answer.status_code in (200, 202) and answer.json()["ticket"]:
            self.ticket = answer.json()["ticket"]
            self._note(answer.json())
        return answer

    async def looks(self) -> dict[str, Any]:
        answer = await self.http.get(f"/v1/tickets/{self.ticket}")
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        self._note(document)
        return document

    def _note(self, document: dict[str, Any]) -> None:
        if not self.seen or self.seen[-1] != document["state"]:
            self.seen.append(document["state"])

    async def is_told(self, state: str, within_s: float = WITHIN_S) -> dict[str, Any]:
        return await until(self.looks, lambda document: document["state"] == state, within_s)

    async def sees_the_payment_link(self) -> str:
        document = await until(
            self.looks, lambda seen: bool(seen["payment"]) and seen["payment"]["state"] == "ready"
        )
        url: str = document["payment"]["url"]
        assert url
        return url

    async def pays(self) -> None:
        """Opens the supplier's page and confirms. The supplier then calls the office back: nobody trusts the buyer."""
        url = await self.sees_the_payment_link()
        async with httpx.AsyncClient(timeout=60, trust_env=False) as browser:
            assert (await browser.get(url)).status_code == 200
            assert (await browser.post(f"{url}/pay")).status_code < 400

    async def leaves(self) -> httpx.Response:
        return await self.http.delete(f"/v1/tickets/{self.ticket}")
