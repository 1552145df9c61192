"""The express lane on granian: hot requests go from callback to callback, without a task or a coroutine.

granian reads and writes HTTP in a thread of Rust and brings each request, and later its body, in a second thread that
holds Python's lock. There the head is looked at and the body asked for; the event loop is called once, when both are
known, and answers from whatever callback knows the answer. Anything else is a task of its own, by ASGI (rsgi.py): what
is not hot, a chunked or a large body. docs/adr/0008 has what each costs.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

from app.serving import rsgi
from app.serving.overload import Gate
from app.serving.patience import TOO_SLOW, Patience
from app.settings import Settings

Headers = Mapping[bytes, bytes]
Tell = Callable[[Any], None]
Hot = Callable[[Headers, bytes, Tell], Any]

_TOO_SLOW_HEADERS = [("content-type", "application/problem+json"), ("connection", "close")]
_CLOSE = ("connection", "close")


@runtime_checkable
class Express(Protocol):
    """An application's express lane, as in app/serving/wire.py; the answer in parts, not as bytes."""

    def hot(self, method: bytes, path: bytes) -> Hot | None:
        """What answers this request, or None. Called in granian's thread."""

    def ask(self, hot: Hot, headers: Headers, body: bytes, tell: Tell) -> None: ...
    def parts(self, given: Any, headers: Headers, tell: Tell) -> tuple[int, rsgi.Texts, bytes] | None:
        """Status, headers and body of the response, or None: `tell` will be called again."""

    def may_wait(self, data: bytes) -> bool: ...
    def joins(self, data: bytes) -> bool: ...
    def too_many(self) -> Exception:
        """What somebody of a crowd is told."""


class Call(Protocol):
    """One request as granian brings it."""

    scope: rsgi.Scope
    proto: rsgi.Exchange

    def done(self) -> None: ...
    def err(self, error: BaseException) -> None: ...


class Lane:
    """All requests of a process. `take` is granian's, in its thread; everything else is done in the event loop."""

    def __init__(
        self,
        app: rsgi.Application,
        express: Express | None,
        settings: Settings,
        gate: Gate | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.express = express
        self.gate = gate if express is not None else None
        self.draining = False  # about to stop: every answer is the last of its connection
        self._patient = Patience(app, settings.body_within_s)
        self._body_max = settings.body_max_bytes
        self._body_within_s = settings.body_within_s
        self._loop = loop
        self._context = contextvars.copy_context()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading: dict[
            Any, float
        ] = {}  # bodies that have not come yet, and since when they are waited for
        loop.call_later(self._body_within_s / 2, self._look)

    def take(self, call: Call) -> None:
        """A request has come. It must not raise: granian does not look."""
        try:
            if not self._is_taken(call):
                self._loop.call_soon_threadsafe(self._by_asgi, call, context=self._context)
        except Exception as error:  # noqa: BLE001 - granian logs it and answers 500
            call.err(error)

    def _is_taken(self, call: Call) -> bool:
        """Let a hot request go on by itself."""
        scope, express = call.scope, self.express
        if express is None:
            return False
        method = scope.method
        hot = express.hot(method.encode(), scope.path.encode("latin-1", "replace"))
        if hot is None:
            return False
        request = Request(self, express, hot, call)
        if method != "POST":
            self._loop.call_soon_threadsafe(request.ask, b"", context=self._context)
            return True
        length = request.headers.get(b"content-length", b"")
        if not length.isdigit() or len(length) > 9 or int(length) > self._body_max:
            return False
        body: Any = call.proto()
        self._reading[body] = time.monotonic()
        body.add_done_callback(request.read, context=self._context)
        return True

    def took(self, body: Any) -> None:
        """A body has come, or will never come."""
        del self._reading[body]

    def _look(self) -> None:
        """Give up bodies that have been on their way for too long. One timer for all: it costs a request nothing."""
        late = time.monotonic() - self._body_within_s
        for body, since in self._reading.copy().items():  # granian's thread goes on adding to it
            if since < late:
                body.cancel()  # and `read` is called
        self._loop.call_later(self._body_within_s / 2, self._look)

    def turns_away(self, scope: rsgi.Scope) -> bool:
        """What app.serving.wire asks before it reads: whether this request would wait too long."""
        gate, express = self.gate, self.express
        assert gate is not None
        assert express is not None
        if gate.up and not gate.reading:
            self._loop.call_soon(gate.turn_ended)
        head = f"{scope.method} {scope.path}".encode()
        if not (express.may_wait(head) if gate.late() else gate.full and express.joins(head)):
            return False
        gate.turn_away()
        return True

    def respond(self, exchange: rsgi.Exchange, status: int, headers: rsgi.Texts, body: bytes) -> None:
        if self.draining:
            headers = [*headers, _CLOSE]
        if status == 304:
            exchange.response_empty(status, headers)
        else:
            exchange.response_bytes(status, headers, body)

    def _by_asgi(self, call: Call) -> None:
        task = self._loop.create_task(rsgi.as_asgi(self._patient, call.scope, call.proto, self._is_draining))
        self._tasks.add(task)  # asyncio keeps no hold of it
        task.add_done_callback(partial(self._ended, call))

    def _is_draining(self) -> bool:
        return self.draining

    def _ended(self, call: Call, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            call.done()  # 500, if nothing was answered
        else:
            call.err(error)


class Request:
    """A hot request, until it is answered."""

    __slots__ = ("_call", "_express", "_hot", "_lane", "_open", "_under_way", "headers")

    def __init__(self, lane: Lane, express: Express, hot: Hot, call: Call) -> None:
        self._lane = lane
        self._express = express
        self._hot = hot
        self._call = call
        self._open = True  # not yet answered
        self._under_way = False  # the gate counts it
        self.headers = rsgi.headers_of(call.scope)

    def read(self, body: Any) -> None:
        """The body has come, or nothing more of it will."""
        self._lane.took(body)
        if body.cancelled():
            self._lane.respond(self._call.proto, 408, _TOO_SLOW_HEADERS, TOO_SLOW)
        elif body.exception() is None:
            self.ask(body.result())
        else:  # the client has gone
            self._call.done()

    def ask(self, body: bytes) -> None:
        gate = self._lane.gate
        if gate is not None and (gate.up or gate.full) and self._lane.turns_away(self._call.scope):
            self.told(self._express.too_many())
            return
        self._express.ask(self._hot, self.headers, body, self.told)
        if self._open and gate is not None:
            self._under_way = True
            gate.begin()

    def told(self, given: Any) -> None:
        """What the answer is made of is known: send it."""
        parts = self._express.parts(given, self.headers, self.told)
        if parts is None:
            return
        self._open = False
        if self._under_way:
            self._under_way = False
            assert self._lane.gate is not None
            self._lane.gate.end()
        self._lane.respond(self._call.proto, *parts)
