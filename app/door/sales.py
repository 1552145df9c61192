"""What is on sale, where its line is, and its draw: public, cacheable, the same for everyone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.door.respond import door_of, headers_of, respond
from app.door.shapes import BoardOut, DrawOut, SaleOut, SalesOut, SaleWord, TimeOut
from app.draw import HASH_BYTES, entry_lines
from app.errors import DidNotHappen
from app.problems import JsonRoute, refusals, refuse
from app.purchase.accept import Answer, Door
from app.purchase.track import stale
from app.sale import public
from app.sale.view import ItemView, SaleView

router = APIRouter(route_class=JsonRoute, tags=["sales"])

ENTRIES_CHUNK = 4_096  # ticket hashes read and sent at once: 40 kB from Redis
CURSOR = "sales"

_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "as in If-None-Match"}}


@router.get("/v1/time", response_model=TimeOut, summary="The sale clock")
async def time(request: Request) -> Response:
    return respond(request, door_of(request).time())


@router.get(
    "/v1/sales",
    response_model=SalesOut,
    responses={**_NOT_MODIFIED, **refusals("invalid", "busy")},
    summary="Sales, by id",
)
async def sales(
    request: Request,
    state: Annotated[SaleWord | None, Query(description="only sales in this state")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[
        str | None, Query(max_length=512, description="`next_cursor` of the page before")
    ] = None,
) -> Response:
    door = door_of(request)
    if not door.snapshots.fresh:
        raise stale()
    after = ""
    if cursor is not None:
        payload = door.ring.cursor_read(CURSOR, cursor)
        if payload is None or len(payload) != 1:
            raise refuse(
                "invalid",
                "The cursor is not one of ours.",
                errors=[{"path": "query.cursor", "code": "cursor"}],
            )
        after = str(payload[0])
    now_ms = door.snapshots.now_ms()
    found = sorted(
        (
            view
            for view in door.snapshots
            if view.id > after and (state is None or view.state_at(now_ms) == state)
        ),
        key=lambda view: view.id,
    )
    page = found[:limit]
    more = len(found) > limit
    next_cursor = door.ring.cursor_sign(CURSOR, [page[-1].id]) if more else None
    document = public.document(
        {"data": [public.facts(view, view.state_at(now_ms)) for view in page], "next_cursor": next_cursor}
    )
    return respond(request, door.conditional(document, headers_of(request)))


@router.get(
    "/v1/sales/{sale}",
    response_model=SaleOut,
    responses={**_NOT_MODIFIED, **refusals("no_such_sale", "invalid", "busy")},
    summary="Public facts of a sale",
)
async def sale(request: Request, sale: str) -> Response:
    return respond(request, door_of(request).sale(sale, headers_of(request)))


@router.get(
    "/v1/sales/{sale}/board",
    response_model=BoardOut,
    responses={**_NOT_MODIFIED, **refusals("no_such_sale", "invalid", "busy")},
    summary="Where the line is",
)
async def board(request: Request, sale: str) -> Response:
    return respond(request, door_of(request).board(sale, headers_of(request)))


@router.get(
    "/v1/sales/{sale}/draw",
    response_model=DrawOut,
    responses={**_NOT_MODIFIED, **refusals("no_such_sale", "invalid", "busy")},
    summary="The draw: commitment, then all that is needed to recompute every rank",
)
async def draw(request: Request, sale: str) -> Response:
    door = door_of(request)
    view = door.view(sale)
    document = public.document(public.draw_document(view, door.snapshots.now_ms()))
    return respond(request, door.conditional(document, headers_of(request)))


@router.get(
    "/v1/sales/{sale}/draw/entries",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "one JSON object a line, by item and seq",
            "content": {"application/x-ndjson": {"schema": {"type": "string"}, "examples": {"lines": {"value": (
                '{"sku":"PH-128","seq":1,"ticket_hash":"3f9a0c11d2e45b6a7788"}\n'
            )}}}},
        },
        **refusals("no_such_sale", "no_such_item", "not_drawn_yet", "invalid", "busy"),
    },
    summary="The ticket hashes that are in the draw (NDJSON)",
)  # fmt: skip
async def entries(
    request: Request,
    sale: str,
    sku: Annotated[str | None, Query(max_length=64, description="one item only")] = None,
) -> Response:
    door = door_of(request)
    view = door.view(sale)
    items = list(view.order)
    if sku is not None:
        item = view.items.get(sku)
        if item is None:
            raise refuse("no_such_item")
        items = [item]
    if not public.entries_public(view, door.snapshots.now_ms()):
        raise refuse("not_drawn_yet")
    lines = _lines(door, view, items)
    first = await anext(lines, b"")  # Redis out of reach is a 503, not a document that breaks off
    response = StreamingResponse(_joined(first, lines), media_type="application/x-ndjson")
    response.headers["cache-control"] = "public, max-age=1"
    if request.scope.get("fairdrop.request_id") is None:
        response.raw_headers.extend(
            h for h in respond(request, Answer.of(200, (), b"")).raw_headers if h[0] == b"x-request-id"
        )
    return response


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


async def _lines(door: Door, view: SaleView, items: list[ItemView]) -> AsyncIterator[bytes]:
    for item in items:
        key = view.keys.drawn(item.sku)
        for start in range(0, item.drawn_n, ENTRIES_CHUNK):
            stop = min(item.drawn_n, start + ENTRIES_CHUNK)
            raw: bytes = await door.link.call("GETRANGE", key, start * HASH_BYTES, stop * HASH_BYTES - 1)
            if len(raw) != (stop - start) * HASH_BYTES:
                raise DidNotHappen("the entries of the draw cannot be read just now")
            yield b"".join(entry_lines(item.sku, raw, start + 1))
