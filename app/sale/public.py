"""What the public sees of a sale: its facts, the board, the draw. Built when something changes, then only copied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from app import draw
from app.sale.snapshot import Snapshots
from app.sale.view import ItemView, SaleView

STATES = ("scheduled", "line_open", "open", "paused", "sold_out", "closed")


class Document(NamedTuple):
    """JSON with its validator. etag: quoted, strong."""

    body: bytes
    etag: bytes


def at(ms: int) -> str:
    """Milliseconds since 1970 as RFC 3339, UTC, with milliseconds."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def document(value: Any) -> Document:
    body = msgspec.json.encode(value)
    return Document(body, b'"%b"' % hashlib.blake2b(body, digest_size=9).hexdigest().encode())


def facts(view: SaleView, state: str) -> dict[str, Any]:
    """`GET /v1/sales/{sale}`."""
    doc = view.doc
    told = {item["sku"]: item for item in doc.get("items", ())}
    return {
        "id": view.id,
        "title": doc.get("title", view.id),
        "state": state,
        "line_opens_at": at(view.line_opens_ms),
        "opens_at": at(view.opens_ms),
        "closes_at": at(view.closes_ms),
        "limit_per_buyer": view.limit,
        "standby": view.standby,
        "pay_within_s": doc.get("pay_within_s"),
        "pass": doc.get("pass", "optional"),
        "challenge": doc.get("challenge", "none"),
        "audience": doc.get("audience"),
        "channels": doc.get("channels", []),
        "default_channel": doc.get("default_channel"),
        "message": view.message or None,
        "items": [_item(item, told.get(item.sku, {})) for item in view.order],
        "draw": commitment(view),
    }


def _item(item: ItemView, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "sku": item.sku,
        "title": told.get("title", item.sku),
        "price_minor": told.get("price_minor"),
        "currency": told.get("currency"),
        "units": item.total,
        "availability": item.availability,
    }


def commitment(view: SaleView) -> dict[str, Any]:
    """What is promised before the opening about the draw."""
    return {"freeze_at": at(view.freeze_ms), "beacon": view.beacon_source, "seed_hash": view.seed_hash}


def board(view: SaleView, state: str, poll_min_ms: int, poll_max_ms: int) -> dict[str, Any]:
    """`GET /v1/sales/{sale}/board`: where the line is. No clock in it, so that its ETag holds while nothing moves."""
    return {
        "sale": view.id,
        "state": state,
        "items": [
            {
                "sku": item.sku,
                "served": item.served,
                "line": item.waiting,
                "rate_per_s": None if item.p50_per_s is None else round(item.p50_per_s, 1),
                "sold_out": item.units_left <= 0,
                "availability": item.availability,
                "drawn": item.drawn,
            }
            for item in view.order
        ],
        "poll": {"min_ms": poll_min_ms, "max_ms": poll_max_ms},
        "message": view.message or None,
        "slowdown": view.advice or None,
    }


def draw_document(view: SaleView, now_ms: int) -> dict[str, Any]:
    """`GET /v1/sales/{sale}/draw`, from what was last seen (app/draw.py decides what may be told when)."""
    told = {
        "epoch": str(view.epoch),
        "freeze_ms": str(view.freeze_ms),
        "opens_ms": str(view.opens_ms),
        "seed_hash": view.seed_hash,
        "seed": view.seed,
        "beacon_source": view.beacon_source,
        "beacon_value": view.beacon_value,
    }
    items = {
        item.sku: {
            "early": str(item.drawn_n if item.drawn else item.early),
            "chain": item.chain,
            "drawn": "1" if item.drawn else "0",
            "drawn_key": item.drawn_key,
            "beacon_used": item.beacon_used,
        }
        for item in view.order
    }
    return {**draw.document(view.id, told, items, now_ms=now_ms), "freeze_at": at(view.freeze_ms)}


def entries_public(view: SaleView, now_ms: int) -> bool:
    """Whether the entries of the draw may be told: after the opening, with every draw that has anyone in it done."""
    return now_ms >= view.opens_ms and all(item.drawn or item.early == 0 for item in view.order)


class PublicDocuments:
    """The documents of all sales, each rebuilt only when its sale has changed."""

    def __init__(self, snapshots: Snapshots, poll_min_ms: int, poll_max_ms: int) -> None:
        self._snapshots = snapshots
        self._poll = (poll_min_ms, poll_max_ms)
        self._facts: dict[str, tuple[SaleView, int, str, Document]] = {}
        self._boards: dict[str, tuple[SaleView, int, str, Document]] = {}

    def facts(self, view: SaleView) -> Document:
        state = view.state_at(self._snapshots.now_ms())
        kept = self._facts.get(view.id)
        if kept is not None and kept[0] is view and kept[1] == view.changes and kept[2] == state:
            return kept[3]
        made = document(facts(view, state))
        self._facts[view.id] = (view, view.changes, state, made)
        return made

    def board(self, view: SaleView) -> Document:
        state = view.state_at(self._snapshots.now_ms())
        kept = self._boards.get(view.id)
        if kept is not None and kept[0] is view and kept[1] == view.changes and kept[2] == state:
            return kept[3]
        made = document(board(view, state, *self._poll))
        self._boards[view.id] = (view, view.changes, state, made)
        return made

    def forget(self, known: Iterable[str]) -> None:
        """Drop what belongs to sales that are gone."""
        kept = set(known)
        for documents in (self._facts, self._boards):
            for sale_id in [sale_id for sale_id in documents if sale_id not in kept]:
                del documents[sale_id]
