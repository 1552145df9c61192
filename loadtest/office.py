"""The operator's side of a load test: make a sale, open it at a given moment, close it, read the books.

Standard library only: under Locust gevent makes it cooperative, elsewhere it blocks. Nothing here imports app/: a load
test that shared code with the servers would share their mistakes.
"""

from __future__ import annotations

import json
import secrets
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DEADLINE_S = 20.0  # of one office call; the office shares two cores with a full peak
KNOWN_EVERYWHERE_S = 0.3  # what an operator does is live on every front door within 200 ms
SKU = "PH-128"


@dataclass(frozen=True)
class Sale:
    """The sale under test, as every load process must know it."""

    id: str
    sku: str
    units: int
    opens_s: float  # seconds of the epoch, on the sale clock
    freeze_s: float  # how long before the opening the draw's entries are fixed


def read_urls(path: Path) -> dict[str, str]:
    """What `fairdrop up` wrote: {front, office, worker, sandbox, redis, database, operator_key}."""
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


class OfficeError(Exception):
    """The office refused or did not answer; the message has the status and the body."""


class Office:
    """The office's HTTP API with an operator's key."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._key = key
        # A proxy in the environment is for the outside, never for a server under test.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(self._url + path, method=method)
        request.add_header("Authorization", f"Bearer {self._key}")
        data = None
        if method == "POST":
            request.add_header("Idempotency-Key", secrets.token_hex(12))
            request.add_header("Content-Type", "application/json")
            data = json.dumps(body or {}).encode()
        try:
            with self._opener.open(request, data, timeout=DEADLINE_S) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise OfficeError(f"{method} {path}: {error.code} {error.read()[:400]!r}") from error
        except OSError as error:
            raise OfficeError(f"{method} {path}: {error}") from error

    def hold_sale(self, *, units: int, opens_in_s: float, pay_within_s: int, **fields: Any) -> Sale:
        """Make and publish a sale whose line opens at once and which opens in so many seconds."""
        now = time.time()
        opens_s = now + opens_in_s
        freeze_s = 1 if opens_in_s > 3 else 0
        sale = Sale(f"load-{secrets.token_hex(4)}", SKU, units, opens_s, freeze_s)
        document: dict[str, Any] = {
            "id": sale.id,
            "title": "Load test",
            "line_opens_at": _instant(now),
            "opens_at": _instant(opens_s),
            "closes_at": _instant(now + 7_200),
            "draw_freeze_s": freeze_s,
            "pay_within_s": pay_within_s,
            "channels": ["sandbox"],
            "default_channel": "sandbox",
            "items": [
                {"sku": SKU, "title": "Phone", "price_minor": 499_900, "currency": "CNY", "units": units}
            ],
        }
        self._ask("POST", "/v1/admin/sales", document | fields)
        self._ask("POST", f"/v1/admin/sales/{sale.id}/publish")
        time.sleep(KNOWN_EVERYWHERE_S)
        return sale

    def close(self, sale: str) -> None:
        self._ask("POST", f"/v1/admin/sales/{sale}/close")

    def live(self, sale: str) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("GET", f"/v1/admin/sales/{sale}/live")
        return found

    def providers(self) -> list[dict[str, Any]]:
        """Suppliers and their breakers, with the last transitions."""
        found: list[dict[str, Any]] = self._ask("GET", "/v1/admin/providers")["data"]
        return found

    def audit(self, sale: str) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("GET", f"/v1/admin/sales/{sale}/audit")
        return found

    def orders(self, sale: str) -> list[dict[str, Any]]:
        """Every order of the sale, in all states."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            page = self._ask(
                "GET", f"/v1/admin/sales/{sale}/orders?limit=1000" + (f"&cursor={cursor}" if cursor else "")
            )
            found += page["data"]
            cursor = page["next_cursor"] or ""
            if not cursor:
                return found


def _instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
