"""The operator of the demo, and of tests: the office's HTTP API with a key."""

from __future__ import annotations

import secrets
from typing import Any

import httpx

from app.errors import FairdropError


class Desk:
    """The operator's side: the office's HTTP API with a key."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=15.0, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, path: str, **params: str | int) -> Any:
        answer = await self._http.get(path, params=params)
        return self._checked(answer)

    async def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = await self._http.post(
            path, json=body or {}, headers={"Idempotency-Key": secrets.token_hex(12)}
        )
        return self._checked(answer)

    @staticmethod
    def _checked(answer: httpx.Response) -> Any:
        if answer.status_code >= 400:
            raise FairdropError(
                f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text[:400]}"
            )
        return answer.json() if answer.content else None

    async def orders(self, sale: str) -> list[dict[str, Any]]:
        """Every order of the sale, in all states."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            params: dict[str, str | int] = {"limit": 1000}
            if cursor:
                params["cursor"] = cursor
            page = await self.get(f"/v1/admin/sales/{sale}/orders", **params)
            found += page["data"]
            cursor = page["next_cursor"] or ""
            if not cursor:
                return found
