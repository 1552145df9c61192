"""HTTP/1.1 as our processes speak it on uvicorn: limits of a client, and an express lane for hot requests.

A hot request is one that the application answers from its head and a small body alone. It takes no part of ASGI: no
scope, no task, no event, no two messages to send; its answer is one write. uvicorn's own parser and framing stay
(docs/adr/0008 has the numbers), and whatever is out of the ordinary goes its ordinary way: another version than
HTTP/1.1, `Connection: close`, `Expect`, a chunked or a large body, a request that arrives while another is being
answered, a client that does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.serving.overload import Gate, keep_looking
from app.serving.patience import TOO_SLOW
from app.settings import Settings

Headers = Mapping[bytes, bytes]  # names in lower case; of a repeated header the last one counts
Tell = Callable[[Any], None]  # takes what an answer is made of
Hot = Callable[[Headers, bytes, Tell], Any]  # answers a request from its headers and body

_NOT_HOT = frozenset((b"expect", b"transfer-encoding", b"upgrade"))
_KEPT = frozenset((None, b"keep-alive", b"Keep-Alive"))  # `Connection`: what it says anyway; browsers send it


@runtime_checkable
class Express(Protocol):
    """An application's express lane."""

    def finds(self, method: bytes, target: bytes) -> Hot | None:
        """What answers this request, or None: it is not hot."""

    def ask(self, hot: Hot, headers: Headers, body: bytes, tell: Tell) -> None:
        """Call `tell` with what the answer is made of, now or later, whatever happens."""

    def response(self, given: Any, headers: Headers, date: bytes, tell: Tell) -> bytes | None:
        """The response, or None: `tell` will be called again. headers: of the request. date: header lines to hold."""

    def may_wait(self, data: bytes) -> bool:
        """Whether what begins like this is a request that may be turned away (503) where too many come."""

    def joins(self, data: bytes) -> bool:
        """Whether it is one of those that wait for Redis."""

    def turned_away(self, data: bytes, date: bytes) -> bytes:
        """That response. data: the whole request."""


LINGER_S = 0.5  # s a refused client gets to read why
FRESH_S = 1.0  # s in which a new connection's first request is waited for when the process stops
FILES_KEPT = 128  # of the process' files, for stores, logs and listeners: not for connections
PIPELINE_MAX = (
    100  # requests that one client may send ahead of their answers, 1.5 KB each; more ends the connection
)

_BUSY = (
    b'{"type":"urn:fairdrop:problem:busy","title":"Busy","status":503,"code":"busy",'
    b'"detail":"This process has all the connections it takes; repeat the same request.","request_id":"","errors":[]}'
)
CROWDED_OUT = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nretry-after: 2\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(_BUSY), _BUSY)
)
TOO_LARGE = (
    b'{"type":"urn:fairdrop:problem:head_too_large","title":"Headers too large","status":431,"code":"head_too_large",'
    b'"detail":"Request line and headers are too large.","request_id":"","errors":[]}'
)
NOT_HTTP = (
    b'{"type":"urn:fairdrop:problem:malformed","title":"Malformed","status":400,"code":"malformed",'
    b'"detail":"This is no HTTP/1.1 request that can be read.","request_id":"","errors":[]}'
)


def _last(status: bytes, body: bytes) -> bytes:
    """A problem as the last response of a connection."""
    return (
        b"HTTP/1.1 %b\r\ncontent-type: application/problem+json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
        % (status, len(body), body)
    )


def _refuses(status: int, body: bytes) -> Any:
    """The same as an application, for a request whose turn is still to come."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


_head_too_large = _refuses(431, TOO_LARGE)
_not_http = _refuses(400, NOT_HTTP)


def limit_of_connections(wanted: int) -> int:
    """How many connections this process takes: fewer than wanted where the machine allows it fewer open files."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < wanted + FILES_KEPT:
        files = wanted + FILES_KEPT if most == resource.RLIM_INFINITY else min(wanted + FILES_KEPT, most)
        with contextlib.suppress(OSError, ValueError):  # then what is allowed has to do
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files - FILES_KEPT))


def gate_of(settings: Settings) -> Gate | None:
    """The gate of one process; None where nobody is to be turned away."""
    if settings.overload_wait_max_ms <= 0:
        return None
    return Gate(settings.overload_turn_ms / 1000, settings.overload_wait_max_ms / 1000, time.perf_counter)


class Whole:
    """Whether bytes are one whole request and nothing else; a process has one of them, for all its connections.

    The parser that reads requests says so; without headers to collect it takes 0.4 µs, less than a search by hand for
    the end, the length and whatever makes a request end elsewhere.
    """

    def __init__(self) -> None:
        self.last = False  # the connection ends behind the request
        self._parser = HttpRequestParser(self)
        self._begun = self._complete = 0

    def on_message_begin(self) -> None:
        self._begun += 1

    def on_message_complete(self) -> None:
        self._complete += 1
        self.last = not self._parser.should_keep_alive()

    def __call__(self, data: bytes) -> bool:
        self._begun = self._complete = 0
        with contextlib.suppress(HttpParserError, HttpParserUpgrade):
            self._parser.feed_data(data)
        whole = self._begun == self._complete == 1
        if self.last or not whole:  # something stays in it, or it takes no further request
            self._parser = HttpRequestParser(self)
        return whole


class Lane:
    """What all connections of a process share: limits, the application's hot requests, the gate in front of them."""

    def __init__(self, settings: Settings, express: Express | None) -> None:
        self.express = express
        self.head_max_bytes = settings.head_max_bytes
        self.head_within_s = settings.head_within_s
        self.body_max_bytes = settings.body_max_bytes
        self.body_within_s = settings.body_within_s
        self.keep_alive_s = settings.keep_alive_s
        self.look_every_s = min(self.head_within_s, self.body_within_s, self.keep_alive_s) / 2
        self.connections_max = limit_of_connections(settings.connections_max)
        self.draining = False  # about to stop: every answer is the last of its connection
        self.gate = gate_of(settings) if express is not None else None
        self.whole = Whole()
        self._watching: asyncio.AbstractEventLoop | None = None  # the loop whose turns are measured
        self._dates: tuple[Any, bytes] = (None, b"")

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measure the loop's turns for the gate, from the first connection on."""
        if self.gate is not None and self._watching is not loop:
            self._watching = loop
            keep_looking(self.gate, loop, time.perf_counter)

    def date_of(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """uvicorn's own headers (the date; a new list every second) as header lines."""
        if self._dates[0] is not headers:
            self._dates = (headers, b"".join([b"%b: %b\r\n" % header for header in headers]))
        return self._dates[1]


class Wire(HttpToolsProtocol):
    """One connection. Between requests and while a head arrives, `_in_head` is true and bytes are counted."""

    lane: Lane  # of the process

    _in_head = True
    _head_bytes = 0
    _heads = 0
    _watch: asyncio.TimerHandle | None = None
    # the express lane: what will answer the request that is arriving, its headers and body; whether one is being
    # answered; since when there has been none
    _hot: Hot | None = None
    _hot_headers: Headers
    _hot_body = b""
    _answering = False
    _idle_since: float | None = None
    _still = (0, True)  # (heads, in a head) as it has been since then, and since when
    _still_since = 0.0
    _running: RequestResponseCycle | None = None  # what ASGI answers now
    _refused = False  # it has had its last response: nothing more of it is read
    _under_way = False  # the gate counts a request of this client
    _owed = 0  # bytes of the body of a request for an upgrade that are still to come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._still_since = self.loop.time()
        if len(self.connections) > self.lane.connections_max:
            self._crowded_out()
            return
        self._watch = self.loop.call_later(self.lane.look_every_s, self._look)
        self.lane.watch(self.loop)

    def _crowded_out(self) -> None:
        """One connection too many: 503 without reading, then the end."""
        self._hang_up(CROWDED_OUT)

    def _hang_up(self, response: bytes) -> None:
        """Write a last response, read no more, and end the connection.

        Our side is shut first: closing with anything unread would reset the connection, and the response with it.
        """
        self.connections.discard(self)
        self._refused = True
        self.transport.write(response)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self.loop.call_later(LINGER_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)
        running = self._running
        if running is not None and not running.response_complete:
            # uvicorn tells the newest request only: an event stream with another sent after it would never end
            running.disconnected = True
            running.message_event.set()

    def _look(self) -> None:
        """Close a connection on which a head or a body has been arriving for too long, or none has ever begun.

        Also one that has been idle since a hot answer; after other answers uvicorn's own timer does that. One
        timer for all: it costs a request nothing.
        """
        now = self.loop.time()
        still = (self._heads, self._in_head)
        arriving = not self._in_head or self._head_bytes > 0 or self._heads == 0
        if still != self._still or not arriving or self.flow.read_paused:
            self._still, self._still_since = still, now
        elif now - self._still_since >= (
            self.lane.head_within_s if self._in_head else self.lane.body_within_s
        ):
            if self._in_head:
                self.transport.close()
            else:
                self._end(b"408 Request Timeout", TOO_SLOW)
            return
        idle_since = self._idle_since
        if idle_since is not None and now - idle_since >= self.lane.keep_alive_s:
            self.transport.close()
            return
        self._watch = self.loop.call_later(self.lane.look_every_s, self._look)

    def data_received(self, data: bytes) -> None:
        gate = self.lane.gate
        if gate is not None and (gate.up or gate.under_way >= gate.limit) and self._turn_away(gate, data):
            return
        if not self._refused:
            self._read(data)

    def _read(self, data: bytes) -> None:
        if self._owed:
            self._read_owed(data)
            return
        if self._in_head:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except HttpParserError:
            self._end(b"400 Bad Request", NOT_HTTP)
            return
        except HttpParserUpgrade as upgrade:
            # Nobody is upgraded here, so the request is one like any other (RFC 9110, 7.8). To the parser it ends
            # with its head; Java's HttpClient asks for HTTP/2 in this way with its first request, body and all.
            rest = data[upgrade.args[0] :]
            if rest and not self._refused and not self.transport.is_closing():
                self._read(rest)
            return
        if self._in_head and self._head_bytes > self.lane.head_max_bytes and not self.transport.is_closing():
            self._end(b"431 Request Header Fields Too Large", TOO_LARGE)

    def _read_owed(self, data: bytes) -> None:
        """The body that the parser did not read, and what is behind it."""
        body, rest = data[: self._owed], data[self._owed :]
        self._owed -= len(body)
        super().on_body(body)
        if not self._owed:
            self.on_message_complete()
            if rest:
                self._read(rest)

    def _end(self, status: bytes, body: bytes) -> None:
        """Refuse what is arriving and end the connection.

        Without a word if an earlier request still waits for its answer, or this one's has begun: what is written
        now would be taken for that.
        """
        cycle = self.cycle
        earlier = self._answering or bool(self.pipeline)
        if cycle is not None and not cycle.response_complete:
            earlier = earlier or self._in_head or cycle.response_started
        if earlier or self.transport.is_closing():
            self.transport.close()
            return
        if cycle is not None:
            cycle.disconnected = True  # the rest of its body will never come
            cycle.message_event.set()
        self._hang_up(_last(status, body))

    # the gate

    def _turn_away(self, gate: Gate, data: bytes) -> bool:
        """503 to one whole request, unread, if its sender would wait too long.

        False: it has to be read. It is of a kind that is never refused, there is room, or it is not one whole request.
        In a crowd a process does this more often than anything else, and what it costs is not there for those let in.
        """
        lane = self.lane
        express = lane.express
        assert express is not None
        if gate.under_way < gate.limit or not express.joins(data):
            if not gate.up:
                return False
            if not gate.reading:
                self.loop.call_soon(gate.turn_ended)
            if not (gate.late() and express.may_wait(data)):
                return False
        if (
            self._head_bytes
            or not self._in_head
            or self._answering
            or self._refused
            or self.flow.write_paused
        ):
            return False
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        if not lane.whole(data):
            return False
        gate.turn_away()
        self._heads += 1
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self._idle_since = self.loop.time()
        response = express.turned_away(data, lane.date_of(self.server_state.default_headers))
        self._write(response, last=lane.whole.last)
        return True

    def _write(self, response: bytes, *, last: bool = False) -> None:
        """Write a whole response; the connection ends with it if the client wants that, or the process drains."""
        if self.lane.draining and not self.pipeline:
            response = response.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
            last = True
        self.transport.write(response)
        if last:
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
        if self._head_bytes > self.lane.head_max_bytes:  # the count may hold body bytes: look exactly
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.lane.head_max_bytes:
                self.app = _head_too_large
                self._by_asgi()
                return
        express = self.lane.express
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
            headers.keys().isdisjoint(_NOT_HOT)
            and headers.get(b"connection") in _KEPT
            and (length is None or (len(length) < 10 and int(length) <= self.lane.body_max_bytes))
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
            and self.parser.should_keep_alive()  # without `Connection`: HTTP/1.1, and no older one
        )

    def _by_asgi(self) -> None:
        """Do what uvicorn does at the begin of a message, now that it is known to be needed."""
        if len(self.pipeline) >= PIPELINE_MAX:
            self.transport.abort()
            return
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        self.headers.extend(headers)
        self.expect_100_continue = any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in headers
        )
        if self.parser.should_upgrade():
            told = dict(headers)
            if b"transfer-encoding" in told:  # the parser, which alone could read it, does not
                self.app = _not_http
                self._refused = True
            else:
                self._owed = int(told.get(b"content-length", b"0"))
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._hot is None:
            super().on_body(body)
        else:
            self._hot_body += body

    def on_message_complete(self) -> None:
        if self._owed:
            return
        hot = self._hot
        if hot is None:
            super().on_message_complete()
        else:
            self._hot = None
            self._answering = True
            lane = self.lane
            assert lane.express is not None
            lane.express.ask(hot, self._hot_headers, self._hot_body, self._told)
            if self._answering and lane.gate is not None:
                self._under_way = True
                lane.gate.begin()
        self._in_head = True
        self._head_bytes = 0

    # what follows a hot request

    def _told(self, given: Any) -> None:
        """What the answer is made of is known: send it."""
        lane = self.lane
        assert lane.express is not None
        date = lane.date_of(self.server_state.default_headers)
        response = lane.express.response(given, self._hot_headers, date, self._told)
        if response is None:
            return
        self._answering = False
        if self._under_way:
            self._under_way = False
            assert lane.gate is not None
            lane.gate.end()
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return  # the client has gone
        self._write(response)
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
            self._running = cycle
            if self.lane.draining and not self.pipeline:
                cycle.keep_alive = False  # uvicorn says so in the response and closes behind it
            super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        """The process stops: close, behind the answer to what has begun.

        A connection that is new gets a moment for its first request: whoever made it believes that we serve. One
        that is idle is closed; a balancer that keeps none for as long as we drain has no request on its way.
        """
        self.lane.draining = True
        fresh_s = FRESH_S - (self.loop.time() - self._still_since) if self._heads == 0 else 0.0
        if self.cycle is not None and not self.cycle.response_complete:
            super().shutdown()
            return
        if self._answering or self._hot is not None or not self._in_head or self._head_bytes:
            return
        if fresh_s > 0:
            self.loop.call_later(fresh_s, self.shutdown)
        elif not self.transport.is_closing():
            super().shutdown()


def http_protocol(settings: Settings, express: Express | None = None) -> type[Wire]:
    """uvicorn's HTTP/1.1 with limits of its own: httptools has none.

    Size and time of a request's head, time of its body, requests sent ahead, connections; a gate for hot requests when
    more come than the process can answer (app/serving/overload.py). docs/limits.md lists them.
    """
    return type("Wire", (Wire,), {"lane": Lane(settings, express)})
