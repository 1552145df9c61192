"""HTTP/1.1 as our processes speak it on uvicorn: limits of a request's head, and an express lane for hot requests.

A hot request is one that the application answers from its head and a small body alone. It takes no part of ASGI: no
scope, no task, no event, no two messages to send; its answer is one write. uvicorn's own parser and framing stay
(docs/adr/0006 has the numbers), and whatever is out of the ordinary goes its ordinary way: another version than
HTTP/1.1, `Connection: close`, `Expect`, a chunked or a large body, a request that arrives while another is being
answered, a client that does not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.settings import Settings

Headers = Mapping[bytes, bytes]  # names in lower case; of a repeated header the last one counts
Reply = Callable[[bytes], None]  # takes a whole response, once

_NOT_HOT = frozenset((b"connection", b"expect", b"transfer-encoding", b"upgrade"))


@runtime_checkable
class Express(Protocol):
    """An application's express lane."""

    def finds(self, method: bytes, target: bytes) -> Callable[[Headers, bytes], Any] | None:
        """What answers this request, or None: it is not hot."""

    def answer(
        self, hot: Callable[[Headers, bytes], Any], headers: Headers, body: bytes, date: bytes, reply: Reply
    ) -> None:
        """Call `reply` with the response, now or later, whatever happens. date: header lines that it must hold."""


TOO_LARGE = (
    b'{"type":"urn:fairdrop:problem:head_too_large","title":"Headers too large","status":431,"code":"head_too_large",'
    b'"detail":"Request line and headers are too large.","request_id":"","errors":[]}'
)


async def _head_too_large(_scope: Any, _receive: Any, send: Any) -> None:
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(TOO_LARGE)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 431, "headers": headers})
    await send({"type": "http.response.body", "body": TOO_LARGE})


def http_protocol(settings: Settings, express: Express | None = None) -> type[HttpToolsProtocol]:
    """uvicorn's HTTP/1.1 with a limit on the size and the time of a request's head; httptools itself has none."""
    head_max_bytes = settings.head_max_bytes
    head_within_s = settings.head_within_s
    body_max_bytes = settings.body_max_bytes
    keep_alive_s = settings.keep_alive_s
    dates: tuple[Any, bytes] = (None, b"")

    def date_of(headers: list[tuple[bytes, bytes]]) -> bytes:
        """uvicorn's own headers (the date; a new list every second) as header lines."""
        nonlocal dates
        if dates[0] is not headers:
            dates = (headers, b"".join([b"%b: %b\r\n" % header for header in headers]))
        return dates[1]

    class Wire(HttpToolsProtocol):
        """Between requests and while a head arrives, `_in_head` is true and bytes are counted."""

        _in_head = True
        _head_bytes = 0
        _heads = 0
        _watch: asyncio.TimerHandle | None = None
        # the express lane: what will answer the request that is arriving, its headers and body; whether one is being
        # answered; whether the connection ends with that answer; since when there has been none
        _hot: Callable[[Headers, bytes], Any] | None = None
        _hot_headers: Headers
        _hot_body = b""
        _answering = False
        _last = False
        _idle_since: float | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch = self.loop.call_later(head_within_s, self._look, -1)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._watch is not None:
                self._watch.cancel()
            super().connection_lost(exc)

        def _look(self, heads_before: int) -> None:
            """Close a connection that has been sending one head since the last look, or has sent none at all.

            Also one that has been idle since a hot answer; after other answers uvicorn's own timer does that.
            """
            unfinished = self._in_head and (self._head_bytes > 0 or self._heads == 0)
            if unfinished and (heads_before == self._heads or self._heads == 0):
                self.transport.close()
                return
            idle_since = self._idle_since
            if idle_since is not None and self.loop.time() - idle_since >= keep_alive_s:
                self.transport.close()
                return
            self._watch = self.loop.call_later(min(head_within_s, keep_alive_s), self._look, self._heads)

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > head_max_bytes and not self.transport.is_closing():
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
                    b"content-type: application/problem+json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
                    % (len(TOO_LARGE), TOO_LARGE)
                )
                self.transport.close()

        # what the parser calls, in this order

        def on_message_begin(self) -> None:
            self.url = b""
            self.headers = []

        def on_header(self, name: bytes, value: bytes) -> None:
            self.headers.append((name.lower(), value))

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._heads += 1
            self._idle_since = None
            if self._head_bytes > head_max_bytes:  # the count may hold body bytes: look exactly
                size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
                if size > head_max_bytes:
                    self.app = _head_too_large
                    self._by_asgi()
                    return
            if express is not None and not self._answering:
                hot = express.finds(self.parser.get_method(), self.url)
                if hot is not None and self._is_plain():
                    self._hot = hot
                    self._hot_body = b""
                    return
            self._by_asgi()

        def _is_plain(self) -> bool:
            """Whether the request is as ordinary as the lane wants it, and its turn has come."""
            self._hot_headers = headers = dict(self.headers)
            length = headers.get(b"content-length")
            return (
                _NOT_HOT.isdisjoint(headers)
                and (length is None or (len(length) < 10 and int(length) <= body_max_bytes))
                and (self.cycle is None or self.cycle.response_complete)
                and not self.flow.write_paused
                and self.parser.get_http_version() == "1.1"
            )

        def _by_asgi(self) -> None:
            """Do what uvicorn does at the begin of a message, now that it is known to be needed."""
            url, headers = self.url, self.headers
            super().on_message_begin()
            self.url = url
            self.headers.extend(headers)
            self.expect_100_continue = any(
                name == b"expect" and value.lower() == b"100-continue" for name, value in headers
            )
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self._hot is None:
                super().on_body(body)
            else:
                self._hot_body += body

        def on_message_complete(self) -> None:
            hot = self._hot
            if hot is None:
                super().on_message_complete()
            else:
                self._hot = None
                self._answering = True
                assert express is not None
                date = date_of(self.server_state.default_headers)
                express.answer(hot, self._hot_headers, self._hot_body, date, self._reply)
            self._in_head = True
            self._head_bytes = 0

        # what follows a hot request

        def _reply(self, response: bytes) -> None:
            self._answering = False
            self.server_state.total_requests += 1
            if self.transport.is_closing():
                return  # the client has gone
            if self._last:
                self.transport.write(response.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
                self.transport.close()
                return
            self.transport.write(response)
            if self.pipeline:
                self.flow.resume_reading()
                cycle, app = self.pipeline.pop()
                self._start_asgi_task(cycle, app)
            else:
                self._idle_since = self.loop.time()

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
            if self._answering:  # a second request came before the hot one was answered
                self.flow.pause_reading()
                self.pipeline.appendleft((cycle, app))
            else:
                super()._start_asgi_task(cycle, app)

        def shutdown(self) -> None:
            if self._answering or self._hot is not None:
                self._last = True
            else:
                super().shutdown()

    return Wire
