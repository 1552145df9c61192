"""The outermost application of the front door: hot routes are answered here; everything else goes on to FastAPI.

Hot: join, poll, board, sale, time, and every CORS preflight. Each has a typed twin in app/door/ that calls the same
method of `Door`; a test holds both to the same answers. uvicorn and granian bring hot requests by an express lane each
(app/serving/wire.py, app/serving/rsgi_lane.py), any other server by ASGI: the same table, the same answers.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from functools import lru_cache, partial
from itertools import cycle
from typing import Any

import structlog

from app.errors import CannotStart, FairdropError, Refusal
from app.problems import body_of, headers_of, new_request_id, refusal_of, refuse, request_id_of
from app.purchase.accept import Answer, Door, Headers, Later, Tell, settled
from app.serving import rsgi
from app.serving.overload import retry_after_s
from app.settings import Settings

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]
# Takes headers, body and who is told if the answer is known later (None).
Hot = Callable[[Headers, bytes, Tell], Answer | Later | None]

PATHS_MAX = 1_024  # paths of sales whose answering is remembered
PREFLIGHT_MAX_AGE_S = 7_200  # Chrome's own cap

_EXPOSED = (b"access-control-expose-headers", b"ETag, Retry-After, X-Request-Id")
_VARY = (b"vary", b"Origin")
_ORIGIN = re.compile(
    r"\*|null|[a-z][a-z0-9+.-]*://[^/\s\"',]+"
)  # an app's pages may be at capacitor://localhost


class Origins:
    """CORS: which pages of other origins may call us. Headers are prebuilt for each allowed origin."""

    def __init__(self, allowed: list[str]) -> None:
        """CannotStart: one is no origin; no page would ever be allowed by it."""
        for origin in allowed:
            if not _ORIGIN.fullmatch(origin):
                raise CannotStart(
                    f"FAIRDROP_CORS_ORIGINS: {origin} is no origin; write https://shop.example (no path), several with "
                    "commas between them, or *"
                )
        self.any = "*" in allowed
        self._prebuilt = {
            origin.encode(): self._headers(origin.encode()) for origin in allowed if origin != "*"
        }

    @staticmethod
    def _headers(origin: bytes) -> list[Header]:
        return [(b"access-control-allow-origin", origin), _EXPOSED, _VARY]

    def headers(self, origin: bytes | None) -> list[Header]:
        """What a response to a page of this origin carries; nothing but Vary if it is not allowed."""
        if origin is None:
            return [_VARY]
        found = self._prebuilt.get(origin)
        if found is not None:
            return found
        return [(b"access-control-allow-origin", b"*"), _EXPOSED] if self.any else [_VARY]

    def preflight(self, origin: bytes) -> list[Header]:
        headers = list(self.headers(origin))
        if len(headers) > 1:
            headers += [
                (b"access-control-allow-methods", b"GET, POST, DELETE"),
                (
                    b"access-control-allow-headers",
                    b"Authorization, Content-Type, X-Request-Id, X-Buyer-Id, If-None-Match",
                ),
                (b"access-control-max-age", b"%d" % PREFLIGHT_MAX_AGE_S),
            ]
        return headers


def _problem(refusal: Refusal, request_id: bytes) -> Answer:
    """A refusal as an answer; the request id is in its body too, so it is chosen before."""
    return Answer.of(refusal.status, tuple(headers_of(refusal)), body_of(refusal, request_id))


def _too_many(draw: float) -> Refusal:
    return refuse("busy", "Too many are asking; repeat the same request.", retry_after_s=retry_after_s(draw))


def _crowded(draw: float, date: bytes) -> tuple[int, bytes]:
    """What is told to a crowd: size of the body without the request id, and a format for size, id, CORS, id."""
    answer = _problem(_too_many(draw), b"")
    body = answer.body.replace(b'"request_id":""', b'"request_id":"%b"')
    head = answer.head.lines + date
    return len(answer.body), b"%bcontent-length: %%d\r\nx-request-id: %%b\r\n%%b\r\n%b" % (head, body)


class HotRoutes:
    """The outermost ASGI application of the front door, and its express lane.

    typed: the FastAPI application behind it, which can also be run alone: every route is there.
    state: the state of both; `state.draining = True` (or `drain()`) makes /readyz say so and ends event streams.
    """

    def __init__(self, door: Door, typed: Any, settings: Settings, on_drain: Callable[[], None]) -> None:
        self.door = door
        self.typed = typed
        self.state = typed.state
        self._on_drain = on_drain
        self._origins = Origins(settings.cors_origins)
        self._cors = bool(settings.cors_origins)
        self._body_max = settings.body_max_bytes
        self._remembered = lru_cache(PATHS_MAX)(self._of_sale)
        self._tasks: set[asyncio.Future[Any]] = set()
        self._crowded: Iterator[tuple[int, bytes]] = iter(
            ()
        )  # what is told to a crowd in this second, in turn
        self._crowded_date = b""

    def drain(self) -> None:
        """Say that this process is about to stop: /readyz answers 503, event streams end, requests go on."""
        self.state.draining = True
        self._on_drain()

    # --- the table ---------------------------------------------------------------------------------------------------

    def hot(self, method: bytes, path: bytes) -> Hot | None:
        """What answers this request; None if it is not hot. path: decoded, without the query."""
        if method == b"GET" and path.startswith(b"/v1/tickets/"):  # of every ticket: not worth remembering
            token = path[12:]
            return partial(self._poll, token.decode("latin-1")) if token and b"/" not in token else None
        return self._remembered(method, path)

    def _of_sale(self, method: bytes, path: bytes) -> Hot | None:
        """The same where the path names no ticket: few paths, asked for over and over."""
        if method == b"GET":
            if path.startswith(b"/v1/sales/"):
                sale_id, slash, rest = path[10:].partition(b"/")
                if sale_id and rest == b"board":
                    return partial(self._board, sale_id.decode("latin-1"))
                if sale_id and not slash:
                    return partial(self._sale, sale_id.decode("latin-1"))
            elif path == b"/v1/time":
                return self._time
        elif method == b"POST" and path.startswith(b"/v1/sales/") and path.endswith(b"/tickets"):
            sale_id = path[10:-8]
            if sale_id and b"/" not in sale_id:
                return partial(self._join, sale_id.decode("latin-1"))
        return None

    def _join(self, sale_id: str, headers: Headers, body: bytes, tell: Tell) -> Later | None:
        wish = self.door.wish(headers, body)
        return self.door.join(sale_id, headers, wish.sku, wish.units, wish.again, tell)

    def _poll(self, token: str, headers: Headers, _body: bytes, _tell: Tell) -> Answer | Later:
        return self.door.poll(token, headers)

    def _board(self, sale_id: str, headers: Headers, _body: bytes, _tell: Tell) -> Answer:
        return self.door.board(sale_id, headers)

    def _sale(self, sale_id: str, headers: Headers, _body: bytes, _tell: Tell) -> Answer:
        return self.door.sale(sale_id, headers)

    def _time(self, _headers: Headers, _body: bytes, _tell: Tell) -> Answer:
        return self.door.time()

    # --- the express lane (app.serving.wire.Express) ---------------------------------------------------------------

    def finds(self, method: bytes, target: bytes) -> Hot | None:
        if b"?" in target or b"%" in target:
            return None
        return self.hot(method, target)

    def may_wait(self, data: bytes) -> bool:
        return data.startswith((b"POST /v1/sales/", b"GET /v1/tickets/"))

    def joins(self, data: bytes) -> bool:
        return data.startswith(b"POST /v1/sales/")

    def turned_away(self, data: bytes, date: bytes) -> bytes:
        """503 `busy` without a look at who asks; its `request_id` is new, and CORS as for any answer.

        All but the id is built once a second: in a crowd this is what a process does most.
        """
        self.door.counts["refused", "busy"] += 1
        if date is not self._crowded_date:
            self._crowded_date = date
            self._crowded = cycle([_crowded(draw / 4, date) for draw in range(4)])
        request_id = new_request_id()
        size, told = next(self._crowded)
        cors = self._cors_of(data) if self._cors else b""
        return told % (size + len(request_id), request_id, cors, request_id)

    def _cors_of(self, data: bytes) -> bytes:
        """Header lines for whoever sent this request."""
        head = data.partition(b"\r\n\r\n")[0].lower() + b"\r\n"
        at = head.find(b"\r\norigin:")
        origin = head[at + 9 : head.index(b"\r", at + 2)].strip() if at >= 0 else None
        return b"".join([b"%b: %b\r\n" % header for header in self._origins.headers(origin)])

    def too_many(self) -> Refusal:
        return _too_many(random.random())

    def ask(self, hot: Hot, headers: Headers, body: bytes, tell: Tell) -> None:
        given: Answer | Exception | Later | None
        try:
            given = hot(headers, body, tell)
        except Exception as error:  # noqa: BLE001 - told and logged by _refused
            given = error
        if given is not None:
            tell(given)

    def response(self, given: Any, headers: Headers, date: bytes, tell: Tell) -> bytes | None:
        if type(given) is Answer:
            return self._response(given, headers, date)
        if isinstance(given, Exception):
            return self._response(*self._refused(given, headers), date)
        self._wait(given, tell)
        return None

    def parts(self, given: Any, headers: Headers, tell: Tell) -> tuple[int, rsgi.Texts, bytes] | None:
        """The same as granian wants it (app.serving.rsgi_lane.Express)."""
        if type(given) is not Answer:
            if not isinstance(given, Exception):
                self._wait(given, tell)
                return None
            given, headers = self._refused(given, headers)
        head = given.head
        request_id = request_id_of(headers) if b"x-request-id" in headers else new_request_id()
        texts = [*head.texts, ("x-request-id", request_id.decode("ascii"))]
        if self._cors:
            cors = self._origins.headers(headers.get(b"origin"))
            texts += [(name.decode("latin-1"), value.decode("latin-1")) for name, value in cors]
        return head.status, texts, given.body

    def _wait(self, given: Later, tell: Tell) -> None:
        task = asyncio.ensure_future(given)
        self._tasks.add(task)  # asyncio keeps no hold of it
        task.add_done_callback(partial(self._known, tell))

    def _known(self, tell: Tell, task: asyncio.Future[Any]) -> None:
        """What was waited for is known: an answer, an error, something else to wait for, or that it will be told."""
        self._tasks.discard(task)
        if task.cancelled():
            tell(refuse("busy", "This process is stopping.", retry_after_s=1))
            return
        error = task.exception()
        if error is None:
            if task.result() is not None:
                tell(task.result())
        elif isinstance(error, Exception):
            tell(error)
        else:  # a signal of the interpreter
            raise error

    def _response(self, answer: Answer, headers: Headers, date: bytes) -> bytes:
        request_id = request_id_of(headers) if b"x-request-id" in headers else new_request_id()
        cors = b""
        if self._cors:
            cors = b"".join(
                [b"%b: %b\r\n" % header for header in self._origins.headers(headers.get(b"origin"))]
            )
        head, body = answer.head, answer.body
        if (
            head.status == 304
        ):  # its Content-Length would be that of the document that is not sent (RFC 9110, 8.6)
            return b"%b%bx-request-id: %b\r\n%b\r\n" % (head.lines, date, request_id, cors)
        return b"%b%bcontent-length: %d\r\nx-request-id: %b\r\n%b\r\n%b" % (
            head.lines, date, len(body), request_id, cors, body,
        )  # fmt: skip

    def _refused(self, error: Exception, headers: Headers) -> tuple[Answer, Headers]:
        """The answer, and the headers of a request that has the id which is in it."""
        refusal = self._told(error)
        request_id = request_id_of(headers)
        return _problem(refusal, request_id), {**headers, b"x-request-id": request_id}

    def _told(self, error: Exception) -> Refusal:
        """The refusal that a failure becomes; what should never happen is logged."""
        if not isinstance(error, FairdropError):
            log.error("hot_route_failed", exc_info=error)
        refusal = refusal_of(error)
        self.door.counts["refused", refusal.code] += 1
        return refusal

    # --- ASGI --------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.typed(scope, receive, send)
            return
        method: str = scope["method"]
        hot = self.hot(method.encode(), scope["path"].encode("latin-1", "replace"))
        if hot is None:
            if method == "OPTIONS" and self._cors:
                headers = dict(scope["headers"])
                if b"access-control-request-method" in headers and b"origin" in headers:
                    await self._preflight(send, headers)
                    return
            await self._fall_through(scope, receive, send)
            return
        headers = dict(scope["headers"])
        answer = await self._answer(hot, headers, self._body(headers, receive) if method == "POST" else None)
        if answer is not None:
            await self._send(send, headers, answer)

    async def _answer(
        self, hot: Hot, headers: dict[bytes, bytes], body: Awaitable[bytes | None] | None
    ) -> Answer | None:
        """The answer, whatever it is; None if the client has gone before its body was here."""
        try:
            raw = b"" if body is None else await body
            return None if raw is None else await settled(partial(hot, headers, raw))
        except Exception as error:  # noqa: BLE001 - told and logged by _told
            refusal = self._told(error)
            request_id = request_id_of(headers)
            headers[b"x-request-id"] = request_id
            return _problem(refusal, request_id)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body of a request; None if the client has gone. Refusal 413 `too_large`."""
        limit = self._body_max
        declared = headers.get(b"content-length")
        if declared is not None and (not declared.isdigit() or int(declared) > limit):
            raise refuse("too_large", f"The body is larger than {limit} bytes.")
        raw = b""
        more = True
        while more and len(raw) <= limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        if len(raw) > limit:
            raise refuse("too_large", f"The body is larger than {limit} bytes.")
        return raw

    async def _send(self, send: Send, headers: Headers, answer: Answer) -> None:
        head, body = answer.head, answer.body
        request_id = request_id_of(headers) if b"x-request-id" in headers else new_request_id()
        sent = [*head.headers, (b"x-request-id", request_id)]
        if head.status != 304:
            sent.append((b"content-length", b"%d" % len(body)))
        if self._cors:
            sent += self._origins.headers(headers.get(b"origin"))
        await send({"type": "http.response.start", "status": head.status, "headers": sent})
        await send({"type": "http.response.body", "body": body})

    async def _preflight(self, send: Send, headers: Headers) -> None:
        sent = self._origins.preflight(headers[b"origin"])
        sent.append((b"x-request-id", request_id_of(headers)))
        await send({"type": "http.response.start", "status": 204, "headers": sent})
        await send({"type": "http.response.body", "body": b""})

    async def _fall_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        request_id = request_id_of(headers)
        scope["fairdrop.request_id"] = request_id
        added = [(b"x-request-id", request_id)]
        if self._cors:
            added += self._origins.headers(headers.get(b"origin"))

        async def send_with(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        await self.typed(scope, receive, send_with)
