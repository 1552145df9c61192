"""How long a client may take over a request's body where the server has no such limit of its own (granian)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Receive, Send], Awaitable[None]]

NO_BODY = frozenset(("GET", "HEAD", "OPTIONS"))
TOO_SLOW = (
    b'{"type":"urn:fairdrop:problem:too_slow","title":"Too slow","status":408,"code":"too_slow",'
    b'"detail":"The body did not come in time.","request_id":"","errors":[]}'
)
_HEADERS = [
    (b"content-type", b"application/problem+json"),
    (b"content-length", b"%d" % len(TOO_SLOW)),
    (b"connection", b"close"),
]


class Patience:
    """An application whose clients have `within_s` seconds to send a body. Later: 408, and the connection ends.

    To the application it looks as if the client had gone.
    """

    def __init__(self, app: Application, within_s: float) -> None:
        self._app = app
        self._within_s = within_s

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in NO_BODY:
            await self._app(scope, receive, send)
            return
        due = asyncio.get_running_loop().time() + self._within_s
        whole = late = begun = False

        async def receive_in_time() -> Message:
            nonlocal whole, late
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(due):
                    message = await receive()
            except TimeoutError:
                whole = late = True
                if not begun:
                    await send({"type": "http.response.start", "status": 408, "headers": _HEADERS})
                    await send({"type": "http.response.body", "body": TOO_SLOW})
                return {"type": "http.disconnect"}
            whole = not message.get("more_body", False)
            return message

        async def send_unless_late(message: Message) -> None:
            nonlocal begun
            if not late:
                begun = True
                await send(message)

        await self._app(scope, receive_in_time, send_unless_late)
