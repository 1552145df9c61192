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


async def as_asgi(
    app: Application, scope: Scope, exchange: Exchange, closing: Callable[[], bool] = lambda: False
) -> None:
    """Answer one request by ASGI. closing: whether its connection is to end behind the answer."""
    headers = [(name.encode(), value.encode()) for name, value in scope.headers.items()]
    pieces: AsyncIterator[bytes] | None = None
    missing = 0  # bytes of the body that are still to come, if the head says how many
    chunked = False
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            missing = int(value)
        chunked = chunked or name == b"transfer-encoding"
        if missing or chunked:
            pieces = pieces or aiter(exchange)
    begun = False  # the body has been read from the beginning
    start: Message = {}
    stream: Any = None

    async def receive() -> Message:
        nonlocal begun, pieces, missing
        if begun and pieces is None:
            await exchange.client_disconnect()
            return {"type": "http.disconnect"}
        begun = True
        # An empty piece is the end, or the client has gone. To ask once more, by anext(pieces, None), would be fatal
        # to the process: granian raises StopAsyncIteration at once, and CPython 3.11 takes that for an awaitable.
        piece = await anext(pieces) if pieces is not None else b""
        missing -= len(piece)
        if not piece:
            pieces = None
            if missing > 0:
                return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": bool(piece)}

    async def send(message: Message) -> None:
        nonlocal start, stream
        if message["type"] == "http.response.start":
            start = message
            return
        status, body = start["status"], message.get("body", b"")
        if stream is None:
            texts = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]]
            # granian hangs up on a body that was not read to its end: say so. Also with the refusal of a chunked
            # one: if that broke off, which looks like its end from here, granian hangs up as well.
            unread = pieces is not None or (chunked and status >= 400)
            if (unread or closing()) and ("connection", "close") not in texts:
                texts.append(("connection", "close"))
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
