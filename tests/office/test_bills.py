"""Operators see every day's bill of every supplier, and what differs from the books."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import pytest

from app.ledger import bills
from app.providers.payment import BillLine
from tests.office.conftest import Office

BILLS = "/v1/admin/bills"
DAY = date(2026, 11, 11)


def line(number: int) -> BillLine:
    """Money that our books do not have."""
    return BillLine(
        kind="capture", provider_ref=f"ref-{number:03}", our_id=f"A{number}-1", order_no=f"A{number}", amount_minor=100,
        currency="CNY", at=datetime(2026, 11, 11, 12, tzinfo=UTC),
    )  # fmt: skip


async def read(office: Office, provider: str, day: date, lines: list[BillLine]) -> None:
    async with office.desk.engine.begin() as conn:
        await bills.want(conn, provider, day)
        held = await bills.lease(conn, [provider], 60, day)
        assert held is not None and await bills.store(conn, held, lines)
        await bills.compare(conn, provider, day)


async def shown(office: Office, **params: Any) -> list[dict[str, Any]]:
    answer = await office.get(BILLS, **params)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


async def test_days_are_listed_newest_first_with_what_differs(office: Office) -> None:
    await read(office, "sandbox", DAY, [line(n) for n in range(3)])
    await read(office, "stripe", DAY, [])
    await read(office, "sandbox", date(2026, 11, 12), [])
    async with office.desk.engine.begin() as conn:
        await bills.want(conn, "stripe", date(2026, 11, 10))
        held = await bills.lease(conn, ["stripe"], 60)
        assert held is not None
        await bills.later(conn, held, 60.0, "bill_not_ready")
    rows = await shown(office)
    assert [(row["day"], row["provider"], row["state"], row["differing"], row["code"]) for row in rows] == [
        ("2026-11-12", "sandbox", "read", 0, None),
        ("2026-11-11", "sandbox", "read", 3, None),
        ("2026-11-11", "stripe", "read", 0, None),
        ("2026-11-10", "stripe", "due", 0, "bill_not_ready"),
    ]
    assert rows[1]["differences"][0] == {
        "what": "capture", "kind": "missing_here", "ref": "ref-000", "our_id": "A0-1", "order_no": "A0",
        "ours_minor": None, "theirs_minor": 100, "currency": "CNY",
    }  # fmt: skip
    assert rows[1]["lines"] == 3 and rows[1]["read_at"].endswith("Z")
    assert rows[3]["lines"] is None and rows[3]["read_at"] is None
    assert [row["day"] for row in await shown(office, differing=True)] == ["2026-11-11", "2026-11-10"]
    assert {row["provider"] for row in await shown(office, provider="stripe")} == {"stripe"}


async def test_pages_are_complete(office: Office) -> None:
    for number in range(1, 4):
        for provider in ("sandbox", "stripe"):
            await read(office, provider, date(2026, 11, number), [])
    whole = [(row["day"], row["provider"]) for row in await shown(office)]
    seen: list[tuple[str, str]] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await office.get(BILLS, limit=1, **cursor)).json()
        seen += [(row["day"], row["provider"]) for row in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert seen == whole and len(seen) == 6


async def test_of_a_day_with_many_differences_the_first_are_shown_and_all_are_counted(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.desk.bills.DIFFERENCES_SHOWN_MAX", 4)
    await read(office, "sandbox", DAY, [line(n) for n in range(9)])
    (row,) = await shown(office)
    assert row["differing"] == 9
    assert [one["ref"] for one in row["differences"]] == ["ref-000", "ref-001", "ref-002", "ref-003"]
