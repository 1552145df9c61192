"""20,000 buyers tap at the same moment for 500 units, through two front doors: 500 orders, not one more or less."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.demo.crowd import Answer, Wires
from app.demo.desk import Desk
from app.demo.servers import Servers
from app.errors import Unknown

BUYERS = 20_000
UNITS = 500
WITHIN_S = 60.0
CONNECTIONS = 800


async def tap(wires: Wires, path: str, buyer: str, gate: asyncio.Event) -> Answer:
    """One join, repeated unchanged as the contract allows, until it is answered."""
    await gate.wait()
    while True:
        try:
            answer = await wires.ask(
                "POST", path, f"X-Buyer-Id: {buyer}\r\n".encode(), b'{"sku":"PH-128","units":1}'
            )
        except Unknown:
            await asyncio.sleep(0.1)
            continue
        if answer.status == 404:  # published just now: live on every front door within 200 ms
            await asyncio.sleep(0.05)
            continue
        if answer.status not in (429, 503):
            return answer
        await asyncio.sleep(answer.retry_after_s or 1.0)


@pytest.mark.slow
@pytest.mark.serial
async def test_20000_taps_at_once_for_500_units_make_500_orders(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o711)  # the stores run as another account and must pass through
    servers = Servers(tmp_path, front_workers=2, environment={"FAIRDROP_DRAIN_S": "0"})
    try:
        urls = await servers.start()
        desk = Desk(urls.office, urls.operator_key)
        wires = Wires(urls.front, connections_max=CONNECTIONS, deadline_s=WITHIN_S)
        try:
            await hold(desk, wires)
        finally:
            wires.close()
            await desk.close()
    finally:
        await asyncio.to_thread(servers.stop)


async def hold(desk: Desk, wires: Wires) -> None:
    sale = f"rush-{secrets.token_hex(4)}"
    opens = datetime.now(UTC).isoformat()
    closes = datetime.fromtimestamp(time.time() + 3_600, UTC).isoformat()
    item = {"sku": "PH-128", "title": "Phone", "price_minor": 499_900, "currency": "CNY", "units": UNITS}
    await desk.post(
        "/v1/admin/sales",
        {"id": sale, "title": "Rush", "line_opens_at": opens, "opens_at": opens, "closes_at": closes}
        | {"standby": False, "items": [item]},
    )
    await desk.post(f"/v1/admin/sales/{sale}/publish")
    path = f"/v1/sales/{sale}"
    gate = asyncio.Event()
    taps = [
        asyncio.create_task(tap(wires, f"{path}/tickets", f"buyer-{number}", gate))
        for number in range(BUYERS)
    ]
    await asyncio.sleep(0)
    gate.set()
    async with asyncio.timeout(WITHIN_S):
        answers = await asyncio.gather(*taps)

    documents: list[dict[str, Any]] = [msgspec.json.decode(answer.body) for answer in answers]
    said = Counter(
        (answer.status, document["state"]) for answer, document in zip(answers, documents, strict=True)
    )
    winners = [number for number, document in enumerate(documents) if document["ticket"] is not None]
    losers = said[200, "sold_out"]
    assert len(winners) == UNITS, said
    assert losers == BUYERS - UNITS, said
    assert len({documents[number]["ticket_id"] for number in winners}) == UNITS

    # Every claim becomes an order, and only those.
    deadline = time.monotonic() + WITHIN_S
    while len(orders := await desk.orders(sale)) < UNITS:
        assert time.monotonic() < deadline, len(orders)
        await asyncio.sleep(0.1)
    assert {order["buyer_id"] for order in orders} == {f"buyer-{number}" for number in winners}
    assert len(orders) == UNITS
    while not (audit := await desk.get(f"/v1/admin/sales/{sale}/audit"))["ok"]:
        assert time.monotonic() < deadline, audit
        await asyncio.sleep(0.1)
