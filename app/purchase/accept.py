"""The front door: one outermost ASGI function. Hot routes are answered here; everything else goes on to FastAPI.

Hot: join, poll, board, sale, time, and every CORS preflight. Each has a typed twin in app/door/ that calls the same
method of `Door`; a test holds both to the same answers. This module knows HTTP; claim.py and track.py do not.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple, assert_never

import msgspec
import structlog
from pydantic import BaseModel, ConfigDict, Field

from app.errors import FairdropError, Refusal
from app.identity import Caller, Identity, KeysNeeded, missing
from app.problems import (
    body_of,
    body_refusal,
    headers_of,
    is_json,
    new_request_id,
    refusal_of,
    refuse,
    request_id_of,
)
from app.purchase.claim import Claims, Reply
from app.purchase.track import Streams, Tracker, stale
from app.sale.public import Document, PublicDocuments, at
from app.sale.snapshot import ItemView, SaleView, Snapshots
from app.scripts import Claimed, Conflict, Gone, Has, Link, Old, Scripts, Taken, Turned, Wait, Waits
from app.settings import Settings
from app.tokens import Keyring, Ticket

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Mapping[bytes, bytes]

UNITS_MAX = 100  # as the limit per buyer in a sale's document: more can never be joined for
SKU_MAX = 64
PREFLIGHT_MAX_AGE_S = 7_200  # Chrome's own cap
LATENCY_BUCKETS_MS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)

_JSON = (b"content-type", b"application/json")
_NO_STORE = (b"cache-control", b"no-store")
_SECOND = (b"cache-control", b"public, max-age=1")
_EXPOSED = (b"access-control-expose-headers", b"ETag, Retry-After, X-Request-Id")
_VARY = (b"vary", b"Origin")
_NO_TICKET = b'{"ticket":null,"state":"sold_out"}'


class Answer(NamedTuple):
    """A response that is ready to send. headers: all but content-length, request id and CORS."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


_TICKET_HEADERS = (_JSON, _NO_STORE)


class Join(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a join as the hot path reads it; `JoinIn` is its typed twin."""

    sku: str
    units: int
    again: bool = False


class JoinIn(BaseModel):
    """Join the line of one item."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"sku": "PH-128", "units": 1}]}
    )

    sku: str = Field(
        min_length=1, max_length=SKU_MAX, description="one of the sale's items", examples=["PH-128"]
    )
    units: int = Field(ge=1, le=UNITS_MAX, description="at most the sale's limit", examples=[1])
    again: bool = Field(False, description="ask for a new ticket when the newest one has ended")


_decode_join = msgspec.json.Decoder(Join).decode


class Door:
    """What the routes of the front door do, without HTTP's transport. One for a process."""

    def __init__(
        self,
        settings: Settings,
        snapshots: Snapshots,
        ring: Keyring,
        identity: Identity,
        tracker: Tracker,
        claims: Claims,
        streams: Streams,
        documents: PublicDocuments,
        link: Link,
        scripts: Scripts,
    ) -> None:
        self.settings = settings
        self.snapshots = snapshots
        self.ring = ring
        self.identity = identity
        self.tracker = tracker
        self.claims = claims
        self.streams = streams
        self.link = link
        self.scripts = scripts
        self.documents = documents
        self.counts: dict[tuple[str, str], int] = defaultdict(int)  # (route, outcome) -> answers
        self.join_ms = [0] * (len(LATENCY_BUCKETS_MS) + 1)  # joins by how long Redis took to accept them
        self.join_ms_sum = 0.0

    # --- identity ----------------------------------------------------------------------------------------------------

    async def caller(self, headers: Headers, sale: str) -> Caller | None:
        try:
            return self.identity.caller(headers, sale, self.snapshots.now_ms())
        except KeysNeeded:
            return await self.identity.whoever(headers, sale, self.snapshots.now_ms())

    def view(self, sale_id: str) -> SaleView:
        """The sale as last seen. 404 `no_such_sale`; 503 `busy` while nothing recent is known."""
        view = self.snapshots.get(sale_id)
        if view is None:
            raise refuse("no_such_sale") if self.snapshots.known_absent(sale_id) else stale()
        if not self.snapshots.usable(view):
            raise stale()
        return view

    async def limited(self, view: SaleView, what: str, buyer_id: bytes, rate_per_min: int) -> None:
        """Return if the buyer may do this now; Refusal 429 `slow_down` otherwise."""
        who = hashlib.blake2b(buyer_id, digest_size=12).hexdigest()
        taken = await self.scripts.rate_take(
            key=view.keys.rate(what, who), period_ms=max(1, 60_000 // rate_per_min), burst=rate_per_min
        )
        match taken:
            case Taken():
                return
            case Wait(ms):
                raise refuse("slow_down", retry_after_s=max(1, math.ceil(ms / 1000)))
            case _:
                assert_never(taken)

    # --- public documents --------------------------------------------------------------------------------------------

    def time(self) -> Answer:
        return Answer(200, _TICKET_HEADERS, b'{"now_ms":%d}' % self.snapshots.now_ms())

    def sale(self, sale_id: str, headers: Headers) -> Answer:
        return self.conditional(self.documents.facts(self.view(sale_id)), headers)

    def board(self, sale_id: str, headers: Headers) -> Answer:
        return self.conditional(self.documents.board(self.view(sale_id)), headers)

    @staticmethod
    def conditional(document: Document, headers: Headers) -> Answer:
        """The document, or 304 if the caller has it."""
        given = headers.get(b"if-none-match")
        if given is not None and (given == document.etag or _matches(given, document.etag)):
            return Answer(304, ((b"etag", document.etag), _SECOND), b"")
        return Answer(200, (_JSON, (b"etag", document.etag), _SECOND), document.body)

    # --- join --------------------------------------------------------------------------------------------------------

    async def join(self, sale_id: str, headers: Headers, sku: str, units: int, again: bool) -> Answer:
        """202 a new ticket; 200 the newest one, or none when there is nothing to wait for. All else is refused."""
        snapshots = self.snapshots
        view = snapshots.get(sale_id)
        if view is None or not snapshots.usable(view):
            view = self.view(sale_id)
        try:
            caller = self.identity.caller(headers, sale_id, snapshots.now_ms())
        except KeysNeeded:
            caller = await self.caller(headers, sale_id)
        if caller is None:
            raise missing()
        if caller.how != "pass":
            self.allowed(view, caller)
        item = view.items.get(sku)
        if item is None:
            raise refuse("no_such_item")
        buyer_id = caller.buyer_id
        ticket_hash = self.ring.ticket_hash(sale_id, sku, buyer_id)
        began = time.perf_counter()
        reply = await self.claims.join(view, item, (buyer_id, units, again, ticket_hash))
        took_ms = (time.perf_counter() - began) * 1000
        self.join_ms[bisect_left(LATENCY_BUCKETS_MS, took_ms)] += 1
        self.join_ms_sum += took_ms
        if type(reply) is Waits or type(reply) is Claimed:
            tracker = self.tracker
            ticket = Ticket(sale_id, view.epoch, item.position, reply.seq, units, ticket_hash)
            token = self.ring.ticket_sign(ticket)
            if type(reply) is Waits:
                self.counts["join", "waiting"] += 1
                return Answer(202, _TICKET_HEADERS, tracker.told_joined(token, ticket, view, item).body)
            self.counts["join", "claimed"] += 1
            return Answer(202, _TICKET_HEADERS, tracker.told_claimed(token, ticket, view, item).body)
        return await self._not_new(reply, view, caller)

    def allowed(self, view: SaleView, caller: Caller) -> None:
        """Refusal 403: the sale wants a pass (`pass_required`) or other buyers (`audience`)."""
        doc = view.doc
        if doc.get("pass") == "required":
            raise refuse("pass_required")
        self.in_audience(view, caller)

    @staticmethod
    def in_audience(view: SaleView, caller: Caller) -> None:
        audience = view.doc.get("audience")
        if audience is None:
            return
        groups = caller.claims.get("groups")
        if not isinstance(groups, list) or not any(
            group in audience for group in groups if isinstance(group, str)
        ):
            raise refuse("audience")

    async def _not_new(self, reply: Reply, view: SaleView, caller: Caller) -> Answer:
        """The answer to a join that gave no new ticket."""
        counts = self.counts
        match reply:
            case Turned("sold_out"):
                counts["join", "sold_out"] += 1
                return Answer(200, _TICKET_HEADERS, _NO_TICKET)
            case Has(sku, seq, units, _):
                counts["join", "held"] += 1
                return await self._held(view, sku.decode(), seq, units, caller)
            case Conflict(sku, seq, units, _):
                counts["join", "ticket_exists"] += 1
                token, _ = self.tracker.token_of(
                    view, self._item(view, sku.decode()), seq, units, caller.buyer_id
                )
                raise refuse("ticket_exists", extra={"ticket": token})
            case Turned(why):
                counts["join", why] += 1
                raise self._turned(why, view)
            case Old() | Gone():
                counts["join", "old"] += 1
                raise stale()
            case Waits() | Claimed():
                raise AssertionError("a new ticket is answered by join itself")
            case _:
                assert_never(reply)

    @staticmethod
    def _turned(why: str, view: SaleView) -> Refusal:
        match why:
            case "limit":
                return refuse("limit_reached", f"At most {view.limit} for each buyer.")
            case "line_full":
                return refuse("line_full", retry_after_s=random.randint(5, 15))
            case "busy":
                wait_s = random.randint(2, 6)
                return refuse(
                    "busy", "Orders are being written; repeat the same request.", retry_after_s=wait_s
                )
            case "closed":
                return refuse("sale_closed")
            case "not_open_yet":
                return refuse("not_open_yet", extra={"line_opens_at": at(view.line_opens_ms)})
            case _:
                raise AssertionError(why)

    @staticmethod
    def _item(view: SaleView, sku: str) -> ItemView:
        item = view.items.get(sku)
        if item is None:
            raise stale()  # a sku that this view does not know: a newer epoch than ours
        return item

    async def _held(self, view: SaleView, sku: str, seq: int, units: int, caller: Caller) -> Answer:
        item = self._item(view, sku)
        token, ticket = self.tracker.token_of(view, item, seq, units, caller.buyer_id)
        told = await self.tracker.told(token, ticket, view, item, True)
        return Answer(200, _TICKET_HEADERS, told.body)

    async def newest(self, sale_id: str, headers: Headers) -> Answer:
        """The caller's newest ticket of a sale; never joins. 404 `no_ticket`."""
        view = self.view(sale_id)
        caller = await self.caller(headers, sale_id)
        if caller is None:
            raise missing()
        found = await self.tracker.newest(view, caller.buyer_id)
        if found is None:
            raise refuse("no_ticket")
        return await self._held(view, *found, caller)

    # --- poll --------------------------------------------------------------------------------------------------------

    async def poll(self, token: str, headers: Headers) -> Answer:
        """The ticket. While it waits, neither Redis nor the caller's identity is looked at."""
        tracker = self.tracker
        ticket, view, item = tracker.find(token)
        if not self.snapshots.usable(view):
            raise stale()
        told = tracker.told_from_snapshot(token, ticket, view, item)
        if told is None:
            seen = await tracker.seen(view, item.sku, ticket.seq)
            if seen is None:
                raise stale()
            mine = False
            if seen.status is not None or seen.ask:
                caller = await self.caller(headers, view.id)
                mine = caller is not None and tracker.owns(ticket, item, caller.buyer_id)
            told = tracker.told_from_redis(token, ticket, view, item, seen, mine)
            self.counts["poll", "read"] += 1
        else:
            self.counts["poll", "counted"] += 1
        return Answer(200, _TICKET_HEADERS, told.body)


def _matches(given: bytes, etag: bytes) -> bool:
    """If-None-Match with a list, a weak validator or `*` (RFC 9110)."""
    return any(part.strip().removeprefix(b"W/") in (etag, b"*") for part in given.split(b","))


class Origins:
    """CORS: which pages of other origins may call us. Headers are prebuilt for each allowed origin."""

    def __init__(self, allowed: list[str]) -> None:
        self.any = "*" in allowed
        self._prebuilt = {
            origin.encode(): self._headers(origin.encode()) for origin in allowed if origin != "*"
        }

    @staticmethod
    def _headers(origin: bytes) -> list[tuple[bytes, bytes]]:
        return [(b"access-control-allow-origin", origin), _EXPOSED, _VARY]

    def headers(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        """What a response to a page of this origin carries; nothing but Vary if it is not allowed."""
        found = self._prebuilt.get(origin)
        if found is not None:
            return found
        return [(b"access-control-allow-origin", b"*"), _EXPOSED] if self.any else [_VARY]

    def preflight(self, origin: bytes) -> list[tuple[bytes, bytes]]:
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


class Accept:
    """The outermost ASGI application of the front door.

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

    def drain(self) -> None:
        """Say that this process is about to stop: /readyz answers 503, event streams end, requests go on."""
        self.state.draining = True
        self._on_drain()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.typed(scope, receive, send)
            return
        path: str = scope["path"]
        method: str = scope["method"]
        try:
            if method == "GET":
                if path.startswith("/v1/tickets/"):
                    token = path[12:]
                    if token and "/" not in token:
                        headers = dict(scope["headers"])
                        answer = await self.door.poll(token, headers)
                        await self._send(send, headers, answer)
                        return
                elif path.startswith("/v1/sales/"):
                    sale_id, slash, rest = path[10:].partition("/")
                    if sale_id:
                        if rest == "board":
                            headers = dict(scope["headers"])
                            await self._send(send, headers, self.door.board(sale_id, headers))
                            return
                        if not slash:
                            headers = dict(scope["headers"])
                            await self._send(send, headers, self.door.sale(sale_id, headers))
                            return
                elif path == "/v1/time":
                    await self._send(send, dict(scope["headers"]), self.door.time())
                    return
            elif method == "POST":
                if path.startswith("/v1/sales/") and path.endswith("/tickets"):
                    sale_id = path[10:-8]
                    if sale_id and "/" not in sale_id:
                        headers = dict(scope["headers"])
                        wish = await self._wish(headers, receive)
                        if wish is None:
                            return
                        answer = await self.door.join(sale_id, headers, wish.sku, wish.units, wish.again)
                        await self._send(send, headers, answer)
                        return
            elif method == "OPTIONS":
                headers = dict(scope["headers"])
                if self._cors and b"access-control-request-method" in headers and b"origin" in headers:
                    await self._preflight(send, headers)
                    return
        except FairdropError as error:
            await self._refuse(send, dict(scope["headers"]), refusal_of(error))
            return
        except Exception as error:
            log.exception("hot_route_failed", path_kind=path.count("/"))
            await self._refuse(send, dict(scope["headers"]), refusal_of(error))
            return
        await self._fall_through(scope, receive, send)

    async def _wish(self, headers: Headers, receive: Receive) -> Join | None:
        """The body of a join; None if the client has gone. Refusals as JsonRoute and JoinIn make them."""
        limit = self._body_max
        declared = headers.get(b"content-length")
        if declared is not None and (not declared.isdigit() or int(declared) > limit):
            raise refuse("too_large", f"The body is larger than {limit} bytes.")
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        raw: bytes = message.get("body", b"")
        while message.get("more_body", False):
            if len(raw) > limit:
                break
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            raw += message.get("body", b"")
        if len(raw) > limit:
            raise refuse("too_large", f"The body is larger than {limit} bytes.")
        if raw and not is_json(headers.get(b"content-type")):
            raise refuse("not_json")
        try:
            wish = _decode_join(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.door.counts["join", "unreadable"] += 1
            raise body_refusal(JoinIn, raw) from None
        if not 1 <= wish.units <= UNITS_MAX or not 1 <= len(wish.sku) <= SKU_MAX:
            self.door.counts["join", "unreadable"] += 1
            raise body_refusal(JoinIn, raw)
        return wish

    async def _send(self, send: Send, headers: Headers, answer: Answer) -> None:
        status, fixed, body = answer
        request_id = request_id_of(headers) if b"x-request-id" in headers else new_request_id()
        sent = [*fixed, (b"content-length", b"%d" % len(body)), (b"x-request-id", request_id)]
        if self._cors:
            origin = headers.get(b"origin")
            sent += self._origins.headers(origin) if origin is not None else (_VARY,)
        await send({"type": "http.response.start", "status": status, "headers": sent})
        await send({"type": "http.response.body", "body": body})

    async def _refuse(self, send: Send, headers: Headers, refusal: Refusal) -> None:
        self.door.counts["refused", refusal.code] += 1
        request_id = request_id_of(headers)
        body = body_of(refusal, request_id)
        sent = [*headers_of(refusal), (b"content-length", b"%d" % len(body)), (b"x-request-id", request_id)]
        if self._cors:
            origin = headers.get(b"origin")
            sent += self._origins.headers(origin) if origin is not None else (_VARY,)
        await send({"type": "http.response.start", "status": refusal.status, "headers": sent})
        await send({"type": "http.response.body", "body": body})

    async def _preflight(self, send: Send, headers: Headers) -> None:
        sent = self._origins.preflight(headers[b"origin"])
        sent += [(b"content-length", b"0"), (b"x-request-id", request_id_of(headers))]
        await send({"type": "http.response.start", "status": 204, "headers": sent})
        await send({"type": "http.response.body", "body": b""})

    async def _fall_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        request_id = request_id_of(headers)
        scope["fairdrop.request_id"] = request_id
        added = [(b"x-request-id", request_id)]
        if self._cors:
            origin = headers.get(b"origin")
            added += self._origins.headers(origin) if origin is not None else [_VARY]

        async def send_with(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        await self.typed(scope, receive, send_with)
