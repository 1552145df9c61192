"""A buyer's ticket: join, poll, stream, leave, pay. Join and poll are typed twins of the raw hot routes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec
from fastapi import APIRouter, Request, Response

from app.answers import (
    AlreadyAsked,
    Asked,
    Gone,
    Left,
    Not,
    NotWaiting,
    Old,
)
from app.buyer.identity import Caller, missing
from app.door.address import address_of, networks
from app.door.respond import door_of, headers_of, respond
from app.door.shapes import NothingToWaitFor, PayIn, TicketOut
from app.problems import JsonRoute, refusals, refuse, request_id_of
from app.purchase.accept import TICKET_HEADERS, Answer, Door, JoinIn, settled
from app.purchase.follow import EventStreams, Follower
from app.purchase.track import Seen, Told, stale
from app.sale.view import ItemView, SaleView
from app.sealing import SealingKey, address_aad, payer_aad, seal
from app.tokens import Ticket

router = APIRouter(route_class=JsonRoute, tags=["tickets"])

ASK_REPEAT_MS = 15_000  # a leave or pay request that is younger is taken to be under way at the worker


@router.post(
    "/v1/sales/{sale}/tickets",
    status_code=202,
    response_model=TicketOut,
    responses={
        200: {"model": TicketOut | NothingToWaitFor, "description": "the newest ticket, or none: sold out"},
        **refusals(
            "malformed", "auth_missing", "auth_invalid", "not_open_yet", "pass_required", "audience", "no_such_sale",
            "no_such_item", "ticket_exists", "limit_reached", "sale_closed", "too_large", "not_json", "invalid",
            "line_full", "busy",
        ),
    },
    summary="Join the line of an item",
)  # fmt: skip
async def join(request: Request, sale: str, wish: JoinIn) -> Response:
    """May be repeated unchanged after a lost reply, 429 or 503: the same buyer gets the same ticket."""
    join = door_of(request).join
    return respond(
        request,
        await settled(lambda tell: join(sale, headers_of(request), wish.sku, wish.units, wish.again, tell)),
    )


@router.get(
    "/v1/sales/{sale}/ticket",
    response_model=TicketOut,
    responses=refusals("auth_missing", "auth_invalid", "no_such_sale", "no_ticket", "invalid", "busy"),
    summary="My newest ticket; never joins",
)
async def newest(request: Request, sale: str) -> Response:
    return respond(request, await door_of(request).newest(sale, headers_of(request)))


@router.get(
    "/v1/tickets/{ticket}",
    response_model=TicketOut,
    responses=refusals("auth_invalid", "no_such_ticket", "invalid", "busy"),
    summary="The ticket now",
)
async def poll(request: Request, ticket: str) -> Response:
    return respond(request, await settled(lambda _: door_of(request).poll(ticket, headers_of(request))))


# --- changing --------------------------------------------------------------------------------------------------------


async def _mine(
    door: Door, token: str, headers: dict[bytes, bytes]
) -> tuple[Ticket, SaleView, ItemView, Caller]:
    """The ticket, if it is the caller's. A foreign one is answered like a forged one: 404 `no_such_ticket`."""
    ticket, view, item = door.tracker.find(token)
    caller = await door.caller(headers, ticket.sale)
    if caller is None:
        raise missing()
    if not door.tracker.owns(ticket, item, caller.buyer_id):
        raise refuse("no_such_ticket")
    if not door.snapshots.usable(view) or ticket.epoch > view.epoch:
        raise stale()
    return ticket, view, item, caller


async def _seen(door: Door, view: SaleView, item: ItemView, ticket: Ticket) -> Seen:
    seen = await door.tracker.seen(view, item.sku, ticket.seq)
    if seen is None:
        raise stale()
    return seen


@router.delete(
    "/v1/tickets/{ticket}",
    response_model=TicketOut,
    responses={
        202: {"model": TicketOut, "description": "claimed or reserved: `leaving` until the release commits"},
        **refusals(
            "auth_missing", "auth_invalid", "no_such_ticket", "already_paid", "payment_unknown", "invalid", "slow_down",
            "busy",
        ),
    },
    summary="Leave",
)  # fmt: skip
async def leave(request: Request, ticket: str) -> Response:
    door, token = door_of(request), ticket
    mine, view, item, caller = await _mine(door, token, headers_of(request))
    await door.limited(view, "change", caller.buyer_id, door.settings.change_rate_per_min)
    told: Told | None
    if mine.epoch != view.epoch:
        told = door.tracker.told_from_snapshot(token, mine, view, item)
        assert told is not None  # another epoch needs no look
        return respond(request, Answer.of(200, TICKET_HEADERS, told.body))
    reply = await door.scripts.line_leave(sale=view.id, epoch=view.epoch, sku=item.sku, seq=mine.seq)
    match reply:
        case Old() | Gone():
            raise stale()
        case Left():
            item.left.add(mine.seq)  # at once here; other front doors read it within a tick
            door.counts["leave", "left"] += 1
            told = door.tracker.told_left(token, mine, view, item)
            return respond(request, Answer.of(200, TICKET_HEADERS, told.body))
        case NotWaiting(byte):
            if byte == b"p":
                raise refuse("already_paid")
            if byte in (b"c", b"r"):
                return await _ask_to_leave(request, door, token, mine, view, item, caller)
    seen = await _seen(door, view, item, mine)
    told = door.tracker.told_from_redis(token, mine, view, item, seen, True)
    return respond(request, Answer.of(200, TICKET_HEADERS, told.body))


async def _ask_to_leave(
    request: Request, door: Door, token: str, ticket: Ticket, view: SaleView, item: ItemView, caller: Caller
) -> Response:
    seen = await _seen(door, view, item, ticket)
    if seen.payment.state == "unknown":
        raise refuse("payment_unknown")
    asked = await door.scripts.ask_put(
        sale=view.id, epoch=view.epoch, sku=item.sku, seq=ticket.seq, buyer_id=caller.buyer_id, kind="leave",
        repeat_ms=ASK_REPEAT_MS,
    )  # fmt: skip
    match asked:
        case Old() | Gone():
            raise stale()
        case Not(byte) if byte == b"p":
            raise refuse("already_paid")
        case Asked() | AlreadyAsked():
            door.counts["leave", "asked"] += 1
        case Not():
            pass  # it has ended in the meantime
    seen = await _seen(door, view, item, ticket)
    told = door.tracker.told_from_redis(token, ticket, view, item, seen, True)
    return respond(request, Answer.of(202 if seen.byte in (b"c", b"r") else 200, TICKET_HEADERS, told.body))


@router.post(
    "/v1/tickets/{ticket}/payment",
    status_code=202,
    response_model=TicketOut,
    responses=refusals(
        "malformed", "auth_missing", "auth_invalid", "no_such_ticket", "not_payable", "payment_in_progress",
        "too_large", "not_json", "invalid", "unknown_channel", "return_url", "slow_down", "busy",
    ),
    summary="Ask for a payment link; it appears on the ticket",
)  # fmt: skip
async def pay(request: Request, ticket: str, wish: PayIn) -> Response:
    door, token = door_of(request), ticket
    mine, view, item, caller = await _mine(door, token, headers_of(request))
    await door.limited(view, "change", caller.buyer_id, door.settings.change_rate_per_min)
    if wish.channel not in view.doc.get("channels", ()):
        raise refuse("unknown_channel")
    if wish.return_url is not None:
        allowed = [*view.doc.get("return_urls", ())]
        if door.settings.public_url:
            allowed.append(door.settings.public_url)
        if not may_return_to(wish.return_url, allowed):
            raise refuse("return_url", errors=[{"path": "return_url", "code": "not_allowed"}])
    if mine.epoch != view.epoch:
        raise refuse("not_payable")
    seen = await _seen(door, view, item, mine)
    told = door.tracker.told_from_redis(token, mine, view, item, seen, True)
    leaving = seen.ask.startswith(b"leave|") or (seen.status is not None and seen.status.leaving)
    if seen.byte != b"r" or leaving:
        raise refuse("not_payable")
    payment = seen.payment
    under_way = seen.ask.split(b"|", 2)[2].decode() if seen.ask.startswith(b"pay|") else None
    if under_way is not None or payment.state == "starting":
        if (under_way or payment.channel) != wish.channel:
            raise refuse("payment_in_progress")
        return respond(request, Answer.of(202, TICKET_HEADERS, told.body))  # the same wish again
    if payment.state in ("unknown", "paid"):
        raise refuse("payment_in_progress")
    if payment.state == "ready" and payment.channel == wish.channel and not _over(payment.expires_at, door):
        return respond(request, Answer.of(202, TICKET_HEADERS, told.body))
    arg = _arg(wish, _sealed_payer(request, wish, view, caller), _sealed_address(request, view, caller))
    asked = await door.scripts.ask_put(
        sale=view.id, epoch=view.epoch, sku=item.sku, seq=mine.seq, buyer_id=caller.buyer_id, kind="pay",
        arg=arg, channel=wish.channel, repeat_ms=ASK_REPEAT_MS,
    )  # fmt: skip
    match asked:
        case Old() | Gone():
            raise stale()
        case Not():
            raise refuse("not_payable")
        case AlreadyAsked(kind) if kind == "leave":
            raise refuse("not_payable")
        case Asked() | AlreadyAsked():
            door.counts["pay", "asked"] += 1
    seen = await _seen(door, view, item, mine)
    told = door.tracker.told_from_redis(token, mine, view, item, seen, True)
    return respond(request, Answer.of(202, TICKET_HEADERS, told.body))


def _arg(wish: PayIn, payer: dict[str, str] | None, address: str | None) -> str:
    """What the worker gets: base64url of {channel, return_url, payer, address}."""
    told = {
        "channel": wish.channel,
        "return_url": wish.return_url,
        "payer": payer,
        "address": address,
    }
    return base64.urlsafe_b64encode(msgspec.json.encode(told)).decode().rstrip("=")


def _sealed_payer(request: Request, wish: PayIn, view: SaleView, caller: Caller) -> dict[str, str] | None:
    """Who pays, for the channels that must be told (WeChat Pay's JSAPI): `sealed` is base64 of their sealed JSON."""
    told = {} if wish.payer is None else wish.payer.model_dump(exclude_none=True)
    if not told:
        return None
    seal_keys: Sequence[SealingKey] = request.app.state.seal_keys
    sealed = seal(seal_keys, msgspec.json.encode(told), payer_aad(view.id, caller.buyer_id))
    return {"sealed": base64.b64encode(sealed).decode()}


def _sealed_address(request: Request, view: SaleView, caller: Caller) -> str | None:
    """Where the buyer pays from, for the suppliers that must be told (WeChat Pay's H5); base64 of the sealed text."""
    peer = request.client.host if request.client is not None else None
    trusted = networks(door_of(request).settings.trusted_proxies)
    found = address_of(peer, request.headers.getlist("x-forwarded-for"), trusted)
    if found is None:
        return None
    seal_keys: Sequence[SealingKey] = request.app.state.seal_keys
    return base64.b64encode(seal(seal_keys, found.encode(), address_aad(view.id, caller.buyer_id))).decode()


def _over(expires_at: str | None, door: Door) -> bool:
    if expires_at is None:
        return False
    return datetime.fromisoformat(expires_at).timestamp() * 1000 <= door.snapshots.now_ms()


def may_return_to(url: str, allowed: list[str]) -> bool:
    """Whether a payment may lead back to `url`: same scheme, host, port as an allowed address, and below its path."""
    if not url.isascii() or any(ord(c) <= 32 or c in '\\"<>`' for c in url):
        return False
    try:
        given = urlsplit(url)
        if given.scheme not in ("http", "https") or given.username is not None or given.password is not None:
            return False
        if "/.." in given.path or "%2e" in given.path.lower():
            return False
        for entry in allowed:
            rule = urlsplit(entry)
            if (given.scheme, given.hostname, given.port) != (rule.scheme, rule.hostname, rule.port):
                continue
            base = rule.path.rstrip("/")
            if given.path == rule.path or given.path == base or given.path.startswith(base + "/"):
                return True
    except ValueError:
        return False
    return False


# --- event stream ----------------------------------------------------------------------------------------------------


class TicketEvents(Response):
    """Server-Sent Events of one ticket. Ends when the client goes, the ticket ends, or the process drains."""

    media_type = "text/event-stream"

    def __init__(
        self, streams: EventStreams, follower: Follower, token: str, ticket: Ticket, mine: bool, first: Told
    ) -> None:
        super().__init__(b"", media_type=self.media_type)
        self._streams = streams
        self._follower = follower
        self._about = (token, ticket, mine, first)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        token, ticket, mine, first = self._about
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would collect events
        ]
        if scope.get("fairdrop.request_id") is None:
            headers.append((b"x-request-id", request_id_of(dict(scope["headers"]))))

        async def write(chunk: bytes) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            gone = asyncio.create_task(until_gone(), name="stream client")
            told = asyncio.create_task(
                self._streams.run(self._follower, token, ticket, mine, first, write), name="stream"
            )
            try:
                await asyncio.wait((gone, told), return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                told.cancel()
                results = await asyncio.gather(gone, told, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception):
                    raise result
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._streams.leave(self._follower)


@router.get(
    "/v1/tickets/{ticket}/events",
    response_class=Response,
    responses={
        200: {
            "description": "event `ticket` with the whole document at each change, otherwise as often as poll_after_ms",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "examples": {
                "stream": {"value": 'retry: 2500\n\nevent: ticket\ndata: {"state": "waiting"}\n\n'}
            }}},
        },
        204: {"description": "the ticket has ended: nothing more will come"},
        **refusals("auth_invalid", "no_such_ticket", "invalid", "busy"),
    },
    summary="The ticket as it changes (Server-Sent Events)",
)  # fmt: skip
async def events(request: Request, ticket: str) -> Response:
    door = door_of(request)
    headers = headers_of(request)
    found, view, item = door.tracker.find(ticket)
    caller = await door.caller(headers, found.sale)
    mine = caller is not None and door.tracker.owns(found, item, caller.buyer_id)
    told = await door.tracker.told(ticket, found, view, item, mine)
    if told.ended:
        return respond(request, Answer.of(204, ((b"cache-control", b"no-store"),), b""))
    follower = door.streams.enter()
    return TicketEvents(door.streams, follower, ticket, found, mine, told)
