"""The journal holds who did what, and shows what was done to it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from app.ledger import journal
from app.ledger.tables import journal as rows
from tests.office.conftest import Office, document


async def verify(office: Office) -> dict[str, Any]:
    found: dict[str, Any] = (await office.get("/v1/admin/journal/verify")).json()
    return found


async def test_every_change_is_in_it_with_who_and_why(office: Office) -> None:
    key = await office.key_of("operator")
    await office.post("/v1/admin/sales", document(), key=key, reason="the autumn drop")
    await office.change("drop", {"title": "Other"})
    await office.post("/v1/admin/sales/drop/publish", {"reason": "it is time"}, key=key)
    await office.post("/v1/admin/sales/drop/rate", {"rate_per_s": 2.5})
    await office.post("/v1/admin/providers/sandbox/breaker", {"mode": "forced_open"})
    await office.delete("/v1/admin/sales/none")
    page = (await office.get("/v1/admin/journal")).json()["data"]
    assert [(one["action"], one["role"], one["reason"]) for one in page] == [
        ("provider.breaker", "admin", None), ("sale.rate", "admin", None), ("sale.publish", "operator", "it is time"),
        ("sale.change", "admin", None), ("sale.create", "operator", "the autumn drop"), ("key.create", "admin", None),
    ]  # fmt: skip
    assert page[2]["actor"].startswith("a operator (key_")
    assert page[1]["detail"] == {"rate_per_s": "2.5"}
    of_sale = (await office.get("/v1/admin/journal", sale="drop")).json()["data"]
    assert {one["sale"] for one in of_sale} == {"drop"} and len(of_sale) == 4
    assert await verify(office) == {"ok": True, "rows": 6, "broken_at": None, "head": page[0]["hash"]}


async def test_pages_are_complete(office: Office) -> None:
    for at in range(5):
        await office.draft(f"d{at}")
    seen: list[int] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await office.get("/v1/admin/journal", limit=2, **cursor)).json()
        seen += [one["id"] for one in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert seen == [5, 4, 3, 2, 1]


async def test_entries_made_at_once_make_one_chain(office: Office) -> None:
    await asyncio.gather(*(office.draft(f"d{at}") for at in range(12)))
    assert (await verify(office))["rows"] == 12
    assert (await verify(office))["ok"]


TAMPERINGS = {
    "actor": "UPDATE journal SET actor = 'somebody else' WHERE id = 3",
    "role": "UPDATE journal SET role = 'viewer' WHERE id = 3",
    "action": "UPDATE journal SET action = 'nothing' WHERE id = 3",
    "sale": "UPDATE journal SET sale = NULL WHERE id = 3",
    "reason": "UPDATE journal SET reason = 'a better one' WHERE id = 3",
    "detail": "UPDATE journal SET detail = '{}' WHERE id = 3",
    "time": "UPDATE journal SET at = at + interval '1 microsecond' WHERE id = 3",
    "hash": "UPDATE journal SET hash = '\\x00' WHERE id = 3",
    "forerunner": "UPDATE journal SET prev_hash = '\\x00' WHERE id = 3",
    "removed": "DELETE FROM journal WHERE id = 3",
    "number": "UPDATE journal SET id = 99 WHERE id = 3",
}


@pytest.mark.parametrize("how", TAMPERINGS)
async def test_whatever_is_done_to_a_row_shows(office: Office, how: str) -> None:
    for at in range(5):
        await office.post("/v1/admin/sales", document(f"d{at}"), reason="true")
    assert (await verify(office))["ok"]
    head = (await verify(office))["head"]
    await office.sql("ALTER TABLE journal DISABLE TRIGGER USER")  # whoever owns the table can
    await office.sql(TAMPERINGS[how])
    found = await verify(office)
    assert (found["ok"], found["broken_at"], found["rows"]) == (False, 3, 2)
    assert found["head"] != head


async def test_a_chain_that_is_rewritten_ends_in_another_head(office: Office) -> None:
    """Whoever rewrites the whole tail gives it a valid chain: only a head noted elsewhere tells."""
    for at in range(3):
        await office.draft(f"d{at}")
    noted = (await verify(office))["head"]
    await office.sql("ALTER TABLE journal DISABLE TRIGGER USER")
    async with office.desk.engine.begin() as conn:
        await conn.execute(sa.delete(rows).where(rows.c.id >= 2))
        await journal.append(conn, actor="x", role="admin", action="sale.create", sale="d1")
    found = await verify(office)
    assert found["ok"] and found["head"] != noted
