"""`fairdrop demo`: a whole flash sale in front of the reader's eyes, on real stores, with a crowd that misbehaves.

It starts `fairdrop up` as a child on free ports, makes and publishes a sale through the office as an operator would,
lets the crowd in (crowd.py), and closes the books: what every buyer was told is compared with the orders that the
office shows, and the office's own audit is printed. Exit status 0: everything promised was kept. 1: something was not.
2: it could not start.

The one thing that differs from a real sale is the hurry: a buyer has seconds to pay, not minutes. Only an office in
development accepts such a sale.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from app.demo.books import Check, close_books, compare_money
from app.demo.crowd import Crowd, cast_crowd
from app.demo.desk import Desk
from app.demo.servers import Servers
from app.demo.view import View, print_report
from app.errors import CannotStart, FairdropError
from app.history.final import finish
from app.history.judge import judge
from app.history.report import report
from app.record import Recorder, Run, read

PAY_WITHIN_S = 6  # long enough for the slowest honest buyer of the crowd, short enough to see units come back
FREEZE_S = 1  # between the last early joiner and the opening
WAVES_S = 18.0  # after the opening: unpaid units come back and are sold again, some of them twice
SETTLE_WITHIN_S = 25.0  # after closing: the last deadlines, refunds and SMS
SKU = "PH-128"
# How the suppliers behave in this sale: calls fail now and then, each call-back comes twice and in any order, one in
# ten has a forged copy, and a link that has ended can still be paid (the money must go back).
MISBEHAVIOUR: dict[str, Any] = {
    "payments": {"error_rate": 0.03, "latency_ms": 5, "jitter_ms": 20},
    "sms": {"error_rate": 0.03},
    "hooks": {"copies": 2, "shuffle_ms": 200, "forge_rate": 0.1},
    "late_pay": True,
}
PRICE_MINOR = 499_900
CURRENCY = "CNY"


def sale_document(sale: str, units: int, opens_s: float, line_opens_s: float) -> dict[str, Any]:
    """The sale as an operator would write it. The two times are seconds of the epoch."""
    opens_at, line_opens_at = (datetime.fromtimestamp(seconds, UTC) for seconds in (opens_s, line_opens_s))
    return {
        "id": sale,
        "title": "Phone 2026, 128 GB (demo)",
        "line_opens_at": line_opens_at.isoformat(),
        "opens_at": opens_at.isoformat(),
        "closes_at": (opens_at + timedelta(hours=1)).isoformat(),
        "draw_freeze_s": FREEZE_S,
        "pay_within_s": PAY_WITHIN_S,
        "limit_per_buyer": 1,
        "rate_per_s": max(20, units // 4),  # the line is seen to move for some four seconds
        "standby": True,
        "channels": ["sandbox"],
        "default_channel": "sandbox",
        "items": [
            {
                "sku": SKU,
                "title": "Phone 2026, 128 GB",
                "price_minor": PRICE_MINOR,
                "currency": CURRENCY,
                "units": units,
            }
        ],
    }


async def hold_sale(
    servers: Servers, buyers: int, units: int, seed: int, kill_worker: bool, view: View
) -> dict[str, Any]:
    """Run the whole sale and return the result that `--json` prints."""
    began = time.monotonic()
    view.step("starting Valkey, Postgres, front, office, worker and the sandbox supplier")
    urls = await servers.start()
    desk = Desk(urls.office, urls.operator_key)
    sale = f"demo-{seed}-{secrets.token_hex(3)}"
    record = Recorder(servers.data_dir / "history.jsonl")
    record.add(Run(at=record.clock(), by="demo", sale=sale, seed=seed))
    people = cast_crowd(buyers, units, seed)
    crowd = Crowd(people, front=urls.front, sale=sale, sku=SKU, seed=seed, record=record)
    sandbox = Desk(urls.sandbox, "")
    try:
        await sandbox.post("/control", MISBEHAVIOUR | {"seed": seed})
        await crowd.set_clock()
        early_s = max(3.0, buyers / 1_000)
        line_opens_s = crowd.now_s() + 1.0
        opens_s = line_opens_s + early_s + FREEZE_S + 0.5
        view.step(f"draft of sale {sale}: {units} units, {buyers:,} buyers")
        await desk.post("/v1/admin/sales", sale_document(sale, units, opens_s, line_opens_s))
        await desk.post(f"/v1/admin/sales/{sale}/publish")
        view.step("published: the hash of the draw's seed is public, the line opens")
        view.crowd, view.opens_s = crowd, opens_s
        crowd.freeze_before(FREEZE_S + 0.1)
        async with watching(view):
            going = asyncio.create_task(crowd.run(opens_s, early_s), name="crowd")
            try:
                await _until(going, lambda: crowd.now_s() >= opens_s - FREEZE_S)
                view.step("freeze: everyone who joined so far is in the draw")
                await _until(going, lambda: crowd.now_s() >= opens_s)
                view.step("open: ranks are drawn, units are claimed, orders are written, links are sent")
                if kill_worker:
                    await _until(going, lambda: crowd.now_s() >= opens_s + 1.5)
                    view.step(f"kill -9 of the worker (process {servers.kill_worker()})")
                await _until(
                    going, lambda: crowd.counts["paid"] >= units or crowd.now_s() >= opens_s + WAVES_S
                )
                await desk.post(f"/v1/admin/sales/{sale}/close")
                view.step("closed: whoever still waits is told so, whoever holds a unit may finish")
                await asyncio.wait([going], timeout=SETTLE_WITHIN_S)
                view.step("settling: the last releases, refunds and SMS")
                await _settled(desk, sale)
                await asyncio.wait([going], timeout=SETTLE_WITHIN_S)  # to hear what has come of it
                if going.done():
                    await going  # raises what went wrong; whoever is still there is counted by the books
            finally:
                going.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await going
        view.step("audit")
        orders = await desk.orders(sale)
        supplier = await sandbox.get("/stats")
        audit = await desk.get(f"/v1/admin/sales/{sale}/audit")
        figures, checks = close_books(crowd.people, orders, units)
        checks += compare_money(orders, supplier)
        view.step("history: what every buyer was told, against both stores and the supplier's books")
        await finish(
            record,
            sale,
            redis_url=urls.redis,
            database_url=urls.database,
            supplier=servers.supplier_ledger,
            within_s=SETTLE_WITHIN_S,
        )
        record.close()
        checks += judged(servers.data_dir / "history.jsonl", view)
        return {
            **figures,
            "sms_sent": supplier.get("sms", 0),
            "seconds": round(time.monotonic() - began, 1),
            "audit": audit["checks"] + [check.__dict__ for check in checks],
        }
    finally:
        record.close()
        crowd.close()
        await desk.close()
        await sandbox.close()


def judged(history: Path, view: View) -> list[Check]:
    """The checks of app/history/judge.py; what is broken is told as a story on standard error."""
    lines = read(history)
    verdict = judge(lines)
    if not verdict.ok:
        view.console.print("\n".join(report(verdict, lines)), highlight=False, soft_wrap=True, markup=False)
    return [
        Check(f"history: {result.name}", result.ok, result.looked_at, result.looked_at - result.count)
        for result in verdict.results
        if result.looked_at
    ]


async def _until(people: asyncio.Task[None], reached: Callable[[], bool]) -> None:
    """Wait until something is so, or the crowd has gone home (or failed: then its error is raised)."""
    while not reached():
        if people.done():
            await people
            return
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def watching(view: View) -> AsyncIterator[None]:
    """Redraw the display while the sale runs."""

    async def watch() -> None:
        while True:
            view.redraw()
            await asyncio.sleep(0.25)

    task = asyncio.create_task(watch(), name="view")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _settled(desk: Desk, sale: str) -> None:
    """Wait until no order waits for money or refund and the audit agrees; if it never does, the audit will tell."""
    deadline = time.monotonic() + SETTLE_WITHIN_S
    while time.monotonic() < deadline:
        orders = await desk.orders(sale)
        audit = await desk.get(f"/v1/admin/sales/{sale}/audit")
        if audit["ok"] and not any(order["state"] in ("reserved", "refunding") for order in orders):
            return
        await asyncio.sleep(0.3)


def run_demo(
    buyers: int,
    units: int,
    seed: int,
    json_output: bool,
    data_dir: Path | None,
    front_workers: int,
    kill_worker: bool,
) -> int:
    """Exit status: 0 every promise was kept, 1 one was broken, 2 it could not start."""
    folder = data_dir or Path(tempfile.mkdtemp(prefix="fairdrop-demo-"))
    if data_dir is None and os.geteuid() == 0:
        folder.chmod(0o711)  # the stores run as another account and must pass through
    servers = Servers(folder, front_workers)
    try:
        with View(units) as view:
            try:
                result = _run(hold_sale(servers, buyers, units, seed, kill_worker, view))
            finally:
                view.step("stopping")
                servers.stop()
    except CannotStart as error:
        print(f"fairdrop demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BaseExceptionGroup as group:
        print(f"fairdrop demo: {_first(group)} (logs: {folder})", file=sys.stderr)
        data_dir = folder  # keep the evidence
        return 1
    except (FairdropError, TimeoutError, httpx.HTTPError) as error:
        print(f"fairdrop demo: {type(error).__name__}: {error} (logs: {folder})", file=sys.stderr)
        data_dir = folder
        return 1
    finally:
        if data_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    if json_output:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print_report(result)
    kept = not (result["oversold"] or result["duplicates"] or result["lost"]) and all(
        check["ok"] for check in result["audit"]
    )
    return 0 if kept else 1


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _run(work: Any) -> Any:
    if sys.platform == "win32":
        return asyncio.run(work)
    import uvloop

    return uvloop.run(work)
