"""The sandbox supplier on a real socket in the test's own loop, and a place that takes its call-backs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.providers.sandbox import create_app
from app.providers.sandbox_state import Sandbox
from app.settings import Settings

SECRET = "a-secret-of-the-tests"


@contextlib.asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """`app` on a port of its own; its address."""
    # IPPROTO_TCP by name: asyncio sets TCP_NODELAY only on such sockets, and 40 ms an answer are too slow for tests.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, ws="none"
        )
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        task = asyncio.create_task(server._serve([listening]))
        try:
            async with asyncio.timeout(180):
                while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


class Shop:
    """The sandbox, ready to be told how to misbehave."""

    def __init__(self, url: str, state: Sandbox, http: httpx.AsyncClient) -> None:
        self.url, self.state, self.http = url, state, http

    async def control(self, **changes: Any) -> dict[str, Any]:
        reply = await self.http.post(f"{self.url}/control", json=changes)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    async def press(self, url: str, button: str = "pay") -> httpx.Response:
        """The buyer presses a button of the pay page."""
        return await self.http.post(f"{url}/{button}")

    async def stats(self) -> dict[str, Any]:
        return dict((await self.http.get(f"{self.url}/stats")).json())

    async def texts(self) -> list[dict[str, Any]]:
        return list((await self.http.get(f"{self.url}/sms?limit=1000")).json()["data"])


@contextlib.asynccontextmanager
async def sandbox() -> AsyncIterator[Shop]:
    app = create_app(Settings(env="development", sandbox_secret=SECRET))
    async with served(app) as url, httpx.AsyncClient(timeout=60, trust_env=False) as http:
        yield Shop(url, app.state.sandbox, http)


Take = Callable[[str, dict[str, str], bytes], Awaitable[tuple[int, bytes]]]  # provider, headers, body


@contextlib.asynccontextmanager
async def hook_listener(take: Take) -> AsyncIterator[str]:
    """A stand-in for the office's route `/v1/hooks/{provider}`; its base address (FAIRDROP_OFFICE_URL)."""

    async def hooks(request: Request) -> Response:
        status, body = await take(
            request.path_params["provider"], dict(request.headers), await request.body()
        )
        return Response(body, status)

    async with served(Starlette(routes=[Route("/v1/hooks/{provider}", hooks, methods=["POST"])])) as url:
        yield url


async def until(holds: Callable[[], Awaitable[Any] | Any], within_s: float = 180.0) -> Any:
    """What `holds` returns once that is true."""
    async with asyncio.timeout(within_s):
        while True:
            found = holds()
            if isinstance(found, Awaitable):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.02)
