"""granian's own interface (RSGI) for an ASGI application: what it does not answer itself goes on as ASGI.

granian builds an ASGI scope and carries each message across from Rust, which costs a hot request 10 µs (docs/adr/0008);
by its own interface one call reads the body and one call answers. Only headers of visible ASCII come across.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Protocol

Message = MutableMapping[str, Any]
Application = Callable[[Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Any]
Texts = list[tuple[str, str]]


class Scope(Protocol):
    """A request's head as granian tells it. path: without the query, percent-decoded; query_string: as it came."""

    http_version: str
    server: str
    client: str
    scheme: str
    method: str
    path: str
    query_string: str

    @property
    def headers(self) -> Any: ...


class Exchange(Protocol):
    """What reads a request's body and answers it."""

    async def __call__(self) -> bytes: ...
    def __aiter__(self) -> AsyncIterator[bytes]: ...
    async def client_disconnect(self) -> None: ...
    def response_empty(self, status: int, headers: Texts) -> None: ...
    def response_bytes(self, status: int, headers: Texts, body: bytes) -> None: ...
    def response_stream(self, status: int, headers: Texts) -> Any: ...


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """Names in lower case; of a repeated header the last one counts."""
    return {name.encode(): value.encode() for name, value in scope.headers.items()}


async def as_asgi(app: Application, scope: Scope, exchange: Exchange) -> None:
    """Answer one request by ASGI."""
    headers = [(name.encode(), value.encode()) for name, value in scope.headers.items()]
    pieces: AsyncIterator[bytes] | None = None
    if any(name in (b"content-length", b"transfer-encoding") for name, _ in headers):
        pieces = aiter(exchange)
    begun = False  # the body has been read from the beginning
    start: Message = {}
    stream: Any = None

    async def receive() -> Message:
        nonlocal begun, pieces
        if begun and pieces is None:
            await exchange.client_disconnect()
            return {"type": "http.disconnect"}
        begun = True
        piece = await anext(pieces, None) if pieces is not None else None
        if piece is None:
            pieces = None
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def send(message: Message) -> None:
        nonlocal start, stream
        if message["type"] == "http.response.start":
            start = message
            return
        status, body = start["status"], message.get("body", b"")
        if stream is None:
            texts = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]]
            if not message.get("more_body", False):
                if body:
                    exchange.response_bytes(status, texts, body)
                else:
                    exchange.response_empty(status, texts)
                return
            stream = exchange.response_stream(status, texts)
        if body:
            await stream.send_bytes(body)

    await app(
        {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": scope.http_version,
            "method": scope.method,
            "scheme": scope.scheme,
            "path": scope.path,
            "raw_path": scope.path.encode(),
            "query_string": scope.query_string.encode("latin-1"),
            "root_path": "",
            "headers": headers,
            "client": _address(scope.client),
            "server": _address(scope.server),
        },
        receive,
        send,
    )


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
