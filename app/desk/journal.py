"""The journal: who did what, newest first, and whether the chain holds."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from app.desk.auth import Viewer
from app.desk.shapes import (
    LIMIT_DEFAULT,
    ChainOut,
    Cursor,
    EntryOut,
    Limit,
    Page,
    entry_out,
    listed,
    read_cursor,
)
from app.desk.wiring import TheDesk, reading
from app.ledger import journal
from app.problems import refusals
from app.sale.document import SALE_ID

router = APIRouter(tags=["journal"])
JOURNAL = "/v1/admin/journal"
READ = refusals("auth_missing", "invalid", "busy")


@router.get(JOURNAL, response_model=Page[EntryOut], responses=READ, summary="Who did what, newest first")
async def page(
    desk: TheDesk,
    operator: Viewer,
    sale: Annotated[str | None, Query(pattern=SALE_ID)] = None,
    limit: Limit = LIMIT_DEFAULT,
    cursor: Cursor = None,
) -> dict[str, Any]:
    behind = read_cursor(desk.ring, "journal", cursor)
    async with reading(desk) as conn:
        rows = await journal.page(
            conn, limit=limit, before=None if behind is None else int(behind[0]), sale=sale
        )
    return listed(desk.ring, "journal", limit, rows, entry_out, lambda row: [row.id])


@router.get(JOURNAL + "/verify", response_model=ChainOut, responses=READ, summary="Recompute the whole chain")
async def verify(desk: TheDesk, operator: Viewer) -> dict[str, Any]:
    async with reading(desk) as conn:
        chain = await journal.verify(conn)
    return {
        "ok": chain.broken_at is None,
        "rows": chain.rows,
        "broken_at": chain.broken_at,
        "head": chain.head.hex(),
    }
