"""The front door: what its hot routes do, whoever brings the request (app/door/hot.py, or the typed twins).

A join or poll comes back as an `Answer`, or as something to wait for. This module knows HTTP's statuses and headers;
claim.py and track.py do not.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any, assert_never

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from app.answers import (
    Claimed,
    Conflict,
    Gone,
    Has,
    JoinAnswer,
    Old,
    Taken,
    Turned,
    Wait,
    Waits,
)
from app.batcher import settle
from app.buyer.identity import Caller, Identity, KeysNeeded, missing
from app.errors import Refusal
from app.problems import body_refusal, is_json, refuse
from app.purchase.claim import Claims, Wish
from app.purchase.follow import EventStreams
from app.purchase.track import Tracker, stale
from app.redis.link import Link
from app.sale.public import Document, PublicDocuments, at
from app.sale.snapshot import Snapshots
from app.sale.view import ItemView, SaleView
from app.scripts import Scripts
from app.settings import Settings
from app.tokens import Keyring, Ticket

Headers = Mapping[bytes, bytes]

UNITS_MAX = 100  # as the limit per buyer in a sale's document: more can never be joined for
SKU_MAX = 64
HEADS_MAX = 1_024  # prebuilt response heads kept; boards and sales have an ETag each
LATENCY_BUCKETS_MS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)

_JSON = (b"content-type", b"application/json")
_NO_STORE = (b"cache-control", b"no-store")
_SECOND = (b"cache-control", b"public, max-age=1")


class Head(msgspec.Struct, frozen=True, eq=False):
    """Status and headers of a response, but for content-length, request id and CORS.

    lines: the same as they go over the wire, without the empty line. texts: the headers as granian wants them.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    lines: bytes
    texts: list[tuple[str, str]]


@lru_cache(HEADS_MAX)
def head_of(status: int, headers: tuple[tuple[bytes, bytes], ...]) -> Head:
    first = b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode())
    lines = first + b"".join([b"%b: %b\r\n" % header for header in headers])
    return Head(
        status, headers, lines, [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    )


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A response that is ready to send."""

    head: Head
    body: bytes

    @classmethod
    def of(cls, status: int, headers: tuple[tuple[bytes, bytes], ...], body: bytes) -> Answer:
        return cls(head_of(status, headers), body)


# What is not known yet: gives an Answer, None (then it is told), or again something to wait for.
Later = Awaitable[Any]
# Is told what is known later, once: an Answer, an error as a value (one buyer's of many), or something to wait for.
Tell = Callable[[Answer | Exception | Later], None]


async def settled(ask: Callable[[Tell], Answer | Later | None]) -> Answer:
    """Ask, and wait for the answer as long as it takes. Raises what it was refused with."""
    told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    given: Any = ask(partial(settle, told))
    while not isinstance(given, Answer):
        given = await (told if given is None else given)
    return given


TICKET_HEADERS = (_JSON, _NO_STORE)
_TICKET_HEAD = head_of(200, TICKET_HEADERS)
_NEW_TICKET_HEAD = head_of(202, TICKET_HEADERS)
_SOLD_OUT = Answer(_TICKET_HEAD, b'{"ticket":null,"state":"sold_out"}')


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
        streams: EventStreams,
        documents: PublicDocuments,
        link: Link,
        scripts: Scripts,
    ) -> None:
        self.settings = settings
        self.snapshots = snapshots
        self.ring = ring
        self.identity = identity
        self.tracker = tracker
        self.claims = Claims(settings, scripts, ring, snapshots, self._joined)
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
        return Answer(_TICKET_HEAD, b'{"now_ms":%d}' % self.snapshots.now_ms())

    def sale(self, sale_id: str, headers: Headers) -> Answer:
        return self.conditional(self.documents.facts(self.view(sale_id)), headers)

    def board(self, sale_id: str, headers: Headers) -> Answer:
        return self.conditional(self.documents.board(self.view(sale_id)), headers)

    @staticmethod
    def conditional(document: Document, headers: Headers) -> Answer:
        """The document, or 304 if the caller has it."""
        given = headers.get(b"if-none-match")
        if given is not None and (given == document.etag or _matches(given, document.etag)):
            return Answer(head_of(304, ((b"etag", document.etag), _SECOND)), b"")
        return Answer(head_of(200, (_JSON, (b"etag", document.etag), _SECOND)), document.body)

    # --- join --------------------------------------------------------------------------------------------------------

    def wish(self, headers: Headers, raw: bytes) -> Join:
        """The body of a join. Refusals as JsonRoute and JoinIn make them: 400, 415, 422."""
        if raw and not is_json(headers.get(b"content-type")):
            raise refuse("not_json")
        try:
            wish = _decode_join(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.counts["join", "unreadable"] += 1
            raise body_refusal(JoinIn, raw) from None
        if not 1 <= wish.units <= UNITS_MAX or not 1 <= len(wish.sku) <= SKU_MAX:
            self.counts["join", "unreadable"] += 1
            raise body_refusal(JoinIn, raw)
        return wish

    def join(
        self, sale_id: str, headers: Headers, sku: str, units: int, again: bool, tell: Tell
    ) -> Later | None:
        """202 a new ticket; 200 the newest one, or none when there is nothing to wait for. All else is refused.

        None: `tell` is told.
        """
        snapshots = self.snapshots
        view = snapshots.get(sale_id)
        if view is None or not snapshots.usable(view):
            view = self.view(sale_id)
        try:
            caller = self.identity.caller(headers, sale_id, snapshots.now_ms())
        except KeysNeeded:
            return self._join_with_keys(view, headers, sku, units, again, tell)
        self._place(view, caller, sku, units, again, tell)
        return None

    async def _join_with_keys(
        self, view: SaleView, headers: Headers, sku: str, units: int, again: bool, tell: Tell
    ) -> None:
        self._place(view, await self.caller(headers, view.id), sku, units, again, tell)

    def _place(
        self, view: SaleView, caller: Caller | None, sku: str, units: int, again: bool, tell: Tell
    ) -> None:
        """Ask for a place for somebody who is known by now."""
        if caller is None:
            raise missing()
        if caller.how != "pass":
            self.allowed(view, caller)
        item = view.items.get(sku)
        if item is None:
            raise refuse("no_such_item")
        self.claims.join(view, item, (caller.buyer_id, units, again, time.perf_counter()), tell)

    def _joined(
        self,
        view: SaleView,
        item: ItemView,
        wishes: Sequence[Wish],
        hashes: Sequence[bytes],
        replies: Sequence[JoinAnswer | Old | Gone],
    ) -> list[Answer | Refusal | Later]:
        """What a whole batch of buyers is told, each by the reply at the same place."""
        self._took(wishes)
        sign = self.ring.ticket_signer(view.id, view.epoch, item.position)
        claimed_form: Callable[[bytes, int, int, bytes], bytes] | None = None
        answers: list[Answer | Refusal | Later] = []
        waiting = claimed = sold_out = 0
        for (buyer_id, units, _, _), ticket_hash, reply in zip(wishes, hashes, replies, strict=True):
            if type(reply) is Claimed:
                claimed += 1
                claimed_form = claimed_form or self.tracker.claimed_form(view, item)
                token = sign(reply.seq, units, ticket_hash)
                answers.append(Answer(_NEW_TICKET_HEAD, claimed_form(token, reply.seq, units, ticket_hash)))
            elif type(reply) is Waits:
                waiting += 1
                token = sign(reply.seq, units, ticket_hash)
                ticket = Ticket(view.id, view.epoch, item.position, reply.seq, units, ticket_hash)
                body = self.tracker.told_joined(token.decode(), ticket, view, item)
                answers.append(Answer(_NEW_TICKET_HEAD, body))
            elif type(reply) is Turned and reply.why == "sold_out":
                sold_out += 1
                answers.append(_SOLD_OUT)
            else:
                answers.append(self._not_new(reply, view, buyer_id))
        self.counts["join", "waiting"] += waiting
        self.counts["join", "claimed"] += claimed
        self.counts["join", "sold_out"] += sold_out
        return answers

    def _took(self, wishes: Sequence[Wish]) -> None:
        """Count how long Redis took to accept a batch, in which who asked first comes first."""
        now = time.perf_counter()
        took_ms = [(now - asked) * 1000 for _, _, _, asked in wishes]
        self.join_ms_sum += sum(took_ms)
        longest, shortest = (bisect_left(LATENCY_BUCKETS_MS, took_ms[at]) for at in (0, -1))
        if longest == shortest:
            self.join_ms[longest] += len(took_ms)
        else:
            for one_ms in took_ms:
                self.join_ms[bisect_left(LATENCY_BUCKETS_MS, one_ms)] += 1

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

    def _not_new(
        self, reply: JoinAnswer | Old | Gone, view: SaleView, buyer_id: bytes
    ) -> Answer | Refusal | Later:
        """The answer to a join that gave no new ticket."""
        counts = self.counts
        match reply:
            case Has(sku, seq, units, _):
                counts["join", "held"] += 1
                return self._held(view, sku.decode(), seq, units, buyer_id)
            case Conflict(sku, seq, units, _):
                counts["join", "ticket_exists"] += 1
                item = view.items.get(sku.decode())
                if item is None:
                    return stale()
                token, _ = self.tracker.token_of(view, item, seq, units, buyer_id)
                return refuse("ticket_exists", extra={"ticket": token})
            case Turned(why):
                counts["join", why] += 1
                return self._turned(why, view)
            case Old() | Gone():
                counts["join", "old"] += 1
                return stale()
            case Waits() | Claimed():
                raise AssertionError("a new ticket is answered by _joined itself, and so is sold out")
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

    async def _held(self, view: SaleView, sku: str, seq: int, units: int, buyer_id: bytes) -> Answer:
        item = view.items.get(sku)
        if item is None:
            raise stale()  # a sku that this view does not know: a newer epoch than ours
        token, ticket = self.tracker.token_of(view, item, seq, units, buyer_id)
        told = await self.tracker.told(token, ticket, view, item, True)
        return Answer(_TICKET_HEAD, told.body)

    async def newest(self, sale_id: str, headers: Headers) -> Answer:
        """The caller's newest ticket of a sale; never joins. 404 `no_ticket`."""
        view = self.view(sale_id)
        caller = await self.caller(headers, sale_id)
        if caller is None:
            raise missing()
        found = await self.tracker.newest(view, caller.buyer_id)
        if found is None:
            raise refuse("no_ticket")
        return await self._held(view, *found, caller.buyer_id)

    # --- poll --------------------------------------------------------------------------------------------------------

    def poll(self, token: str, headers: Headers) -> Answer | Later:
        """The ticket. While it waits, neither Redis nor the caller's identity is looked at."""
        tracker = self.tracker
        ticket, view, item = tracker.find(token)
        if not self.snapshots.usable(view):
            raise stale()
        told = tracker.told_from_snapshot(token, ticket, view, item)
        if told is None:
            return self._poll_read(token, ticket, view, item, headers)
        self.counts["poll", "counted"] += 1
        return Answer(_TICKET_HEAD, told.body)

    async def _poll_read(
        self, token: str, ticket: Ticket, view: SaleView, item: ItemView, headers: Headers
    ) -> Answer:
        """The same, of a ticket whose turn is near or past: as Redis has it."""
        tracker = self.tracker
        seen = await tracker.seen(view, item.sku, ticket.seq)
        if seen is None:
            raise stale()
        mine = False
        if seen.status is not None or seen.ask:
            caller = await self.caller(headers, view.id)
            mine = caller is not None and tracker.owns(ticket, item, caller.buyer_id)
        told = tracker.told_from_redis(token, ticket, view, item, seen, mine)
        self.counts["poll", "read"] += 1
        return Answer(_TICKET_HEAD, told.body)


def _matches(given: bytes, etag: bytes) -> bool:
    """If-None-Match with a list, a weak validator or `*` (RFC 9110)."""
    return any(part.strip().removeprefix(b"W/") in (etag, b"*") for part in given.split(b","))
