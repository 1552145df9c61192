"""The two measures that every figure is held against, served by the same server as the front.

R1: an empty raw-ASGI POST, the limit of the server itself. R2: an empty FastAPI JSON route with a model, what an
ordinary application pays before it does anything.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")],
}
_BODY = {"type": "http.response.body", "body": b"{}"}


async def r1(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """Read the body, answer `{}`."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    while (await receive()).get("more_body"):
        pass
    await send(_START)
    await send(_BODY)


class Tap(BaseModel):
    sku: str
    units: int


r2 = FastAPI(openapi_url=None)


@r2.post("/r2")
async def tap(body: Tap) -> dict[str, str]:
    """Validate the body, answer `{}`."""
    return {}
