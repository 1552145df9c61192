"""`fairdrop demo`: a whole flash sale in front of the reader's eyes, on real stores, with a crowd that misbehaves.

It starts `fairdrop up` as a child on free ports, makes and publishes a sale through the office as an operator would,
lets the crowd of app/crowd.py in, and closes the books: what every buyer was told is compared with the orders that the
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
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import httpx
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from app.crowd import Buyer, Crowd, cast_crowd
from app.embedded import launch_command
from app.errors import CannotStart, FairdropError
from app.history.final import finish
from app.history.judge import judge
from app.history.report import report
from app.record import Recorder, Run, read

PAY_WITHIN_S = 6  # long enough for the slowest honest buyer of the crowd, short enough to see units come back
FREEZE_S = 1  # between the last early joiner and the opening
WAVES_S = 18.0  # after the opening: unpaid units come back and are sold again, some of them twice
SETTLE_WITHIN_S = 25.0  # after closing: the last deadlines, refunds and SMS
START_WITHIN_S = 90.0  # `up` makes a database cluster the first time
STOP_WITHIN_S = 20.0
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


# --- the servers -----------------------------------------------------------------------------------------------------


# The demo is in a hurry: a standby winner must hear of the unit well before PAY_WITHIN_S is over, and what a killed
# worker held is taken over in seconds.
HURRIED = {
    "FAIRDROP_POLL_MAX_MS": "2500",
    "FAIRDROP_EXPIRE_EVERY_MS": "200",
    "FAIRDROP_AUTOCLAIM_IDLE_MS": "2000",
    "FAIRDROP_LEASE_S": "6",
    "FAIRDROP_LINK_WAIT_MAX_S": "6",
    "FAIRDROP_DRAIN_S": "0",
}


@dataclass(frozen=True)
class Urls:
    front: str
    office: str
    worker: str
    sandbox: str
    operator_key: str
    redis: str
    database: str


class Servers:
    """`fairdrop up` as a child process on free ports, in a data directory of its own."""

    def __init__(
        self, data_dir: Path, front_workers: int = 1, environment: Mapping[str, str] = HURRIED
    ) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir / "demo-up.log"
        self._front_workers = front_workers
        self.supplier_ledger = data_dir / "supplier.jsonl"
        self._environment = {**environment, "FAIRDROP_SANDBOX_LEDGER": str(self.supplier_ledger)}
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> Urls:
        """Start everything and return where it answers. CannotStart: with the last words of `up`."""
        urls_path = self.data_dir / "urls.json"
        before_ns = urls_path.stat().st_mtime_ns if urls_path.exists() else 0
        process = self._spawn()
        deadline = time.monotonic() + START_WITHIN_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise CannotStart(f"`fairdrop up` ended: {self.last_words()}")
            if urls_path.exists() and urls_path.stat().st_mtime_ns != before_ns:
                found = json.loads(urls_path.read_text(encoding="utf-8"))
                return Urls(**{name: found[name] for name in Urls.__dataclass_fields__})
            await asyncio.sleep(0.05)
        raise CannotStart(f"`fairdrop up` did not answer within {START_WITHIN_S:.0f} s: {self.last_words()}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.supplier_ledger.unlink(missing_ok=True)  # of another run in the same directory
        command = [sys.executable, "-m", "app.cli", "up", "--data-dir", str(self.data_dir)]
        for name in ("front", "office", "worker", "sandbox"):
            command += [f"--{name}-port", "0"]
        command += ["--front-workers", str(self._front_workers)]
        with self.log_path.open("wb") as log:
            process = subprocess.Popen(
                launch_command(command, signal.SIGTERM),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self._environment,
                start_new_session=True,
            )
        self._process = process
        return process

    def last_words(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix("fairdrop: ") if lines else "it said nothing"

    def stop(self) -> None:
        """Stop everything cleanly; kill what has not ended in time."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def worker_pids(self) -> list[int]:
        """The processes of the worker among the descendants of our own `up` (Linux)."""
        if self._process is None:
            return []
        return [pid for pid, command in _descendants(self._process.pid) if "worker" in command[1:]]

    def kill_worker(self) -> int:
        """kill -9 the worker, as a crash would; `up` starts another. Returns its process id, 0: there was none."""
        for pid in self.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return pid
        return 0


def _descendants(root: int) -> Iterator[tuple[int, list[str]]]:
    """(process id, command line words) of every process below `root`."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in sorted(parents):
        above = parents[pid]
        while above not in (root, 0, 1) and above in parents:
            above = parents[above]
        if above == root:
            with contextlib.suppress(OSError):
                yield (
                    pid,
                    (Path("/proc") / str(pid) / "cmdline")
                    .read_bytes()
                    .decode("utf-8", "replace")
                    .split("\0"),
                )


# --- the operator ----------------------------------------------------------------------------------------------------


class Desk:
    """The operator's side: the office's HTTP API with a key."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=15.0, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, path: str, **params: str | int) -> Any:
        answer = await self._http.get(path, params=params)
        return self._checked(answer)

    async def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = await self._http.post(
            path, json=body or {}, headers={"Idempotency-Key": secrets.token_hex(12)}
        )
        return self._checked(answer)

    @staticmethod
    def _checked(answer: httpx.Response) -> Any:
        if answer.status_code >= 400:
            raise FairdropError(
                f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text[:400]}"
            )
        return answer.json() if answer.content else None

    async def orders(self, sale: str) -> list[dict[str, Any]]:
        """Every order of the sale, in all states."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            params: dict[str, str | int] = {"limit": 1000}
            if cursor:
                params["cursor"] = cursor
            page = await self.get(f"/v1/admin/sales/{sale}/orders", **params)
            found += page["data"]
            cursor = page["next_cursor"] or ""
            if not cursor:
                return found


# --- the books -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One thing that must hold, with both sides' numbers."""

    name: str
    ok: bool
    left: Any
    right: Any


KEEPS_UNIT = frozenset({"reserved", "paid", "refunding"})
EVER_WON = frozenset({"reserved", "paid", "expired", "refunded"})


def close_books(
    people: list[Buyer], orders: list[dict[str, Any]], units: int
) -> tuple[dict[str, int], list[Check]]:
    """Compare what the buyers were told with the orders that exist. Returns the figures and the checks."""
    of_buyer = Counter(order["buyer_id"] for order in orders)
    numbers = {order["order_no"]: order for order in orders}
    states = Counter(order["state"] for order in orders)
    kept = sum(order["units"] for order in orders if order["state"] in KEEPS_UNIT)
    lost = [buyer for buyer in people if was_promised(buyer) and not of_buyer[buyer.buyer_id]]
    foreign = [
        buyer
        for buyer in people
        if buyer.order_no is not None
        and (buyer.order_no not in numbers or numbers[buyer.order_no]["buyer_id"] != buyer.buyer_id)
    ]
    doubled = [buyer for buyer in people if len(buyer.ticket_ids) > 1 or of_buyer[buyer.buyer_id] > 1]
    told_paid = {buyer.buyer_id for buyer in people if buyer.state == "paid"}
    paid = {order["buyer_id"] for order in orders if order["state"] == "paid"}
    unended = [buyer for buyer in people if buyer.state == "waiting" or buyer.state == "claimed"]
    bent = Counter(buyer.bent for buyer in people if buyer.bent)
    figures = {
        "buyers": len(people),
        "units": units,
        "joined": sum(1 for buyer in people if buyer.ticket_ids),
        "claimed": len(orders),
        "reserved": len(orders),
        "paid": states["paid"],
        "expired": states["expired"],
        "released": states["expired"] + states["cancelled"] + states["refunded"],
        "standby_wins": sum(1 for buyer in people if buyer.was_standby and of_buyer[buyer.buyer_id]),
        "refunded": states["refunded"],
        "oversold": max(0, kept - units),
        "duplicates": len(doubled),
        "lost": len({buyer.buyer_id for buyer in (*lost, *foreign)}),
    }
    checks = [
        Check("units kept by orders never exceed the units on sale", kept <= units, kept, units),
        Check(
            "everyone who was promised a unit has an order",
            not lost and not foreign,
            len(lost) + len(foreign),
            0,
        ),
        Check("one ticket and one order a buyer, however often they tapped", not doubled, len(doubled), 0),
        Check("buyers who were told paid = paid orders", told_paid == paid, len(told_paid), len(paid)),
        Check("nobody is left without an answer", not unended, len(unended), 0),
        Check("what a buyer was told never went backwards", not bent, dict(bent) or 0, 0),
    ]
    return figures, checks


def compare_money(orders: list[dict[str, Any]], supplier: dict[str, Any]) -> list[Check]:
    """Compare the orders with the supplier's own sums: money that came, went back, and call-backs that were forged."""
    kept = supplier.get("captured_minor", 0) - supplier.get("refunded_minor", 0)
    sold = sum(order["amount_minor"] for order in orders if order["state"] == "paid")
    forged = supplier.get("forged_taken", 0)
    return [
        Check("the supplier's captures - refunds = the sum of paid orders", kept == sold, kept, sold),
        Check("forged call-backs that were believed", forged == 0, forged, 0),
    ]


def was_promised(buyer: Buyer) -> bool:
    """Told `reserved` (or what only follows it), or told `claimed` and nothing since."""
    return any(state in EVER_WON for state in buyer.states) or buyer.state == "claimed"


# --- what the reader sees --------------------------------------------------------------------------------------------


class View:
    """Progress on standard error: redrawn in place on a terminal, else one line for each step."""

    def __init__(self, units: int) -> None:
        self.console = Console(stderr=True)
        self._units = units
        self._began = time.monotonic()
        self._step = "starting"
        self._live: Live | None = None
        self.crowd: Crowd | None = None
        self.opens_s = 0.0
        self._live_document: dict[str, Any] = {}
        self._last = (0.0, 0, 0)
        self._rates = (0.0, 0.0)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(self._draw(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *reason: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, what: str) -> None:
        self._step = what
        if self._live is None:
            self.console.print(
                f"{time.monotonic() - self._began:5.1f} s  {what}", highlight=False, soft_wrap=True
            )
        else:
            self.redraw()

    def look(self, document: dict[str, Any]) -> None:
        self._live_document = document

    def redraw(self) -> None:
        if self._live is not None:
            self._live.update(self._draw())

    def _draw(self) -> Panel:
        title = f"fairdrop demo  {time.monotonic() - self._began:4.1f} s"
        rows: list[Any] = [Text(self._step, style="bold")]
        crowd = self.crowd
        if crowd is not None:
            now = time.monotonic()
            if now - self._last[0] >= 0.5:
                spent = now - self._last[0]
                self._rates = ((crowd.joins - self._last[1]) / spent, (crowd.polls - self._last[2]) / spent)
                self._last = (now, crowd.joins, crowd.polls)
            counts = crowd.counts
            paid = counts["paid"]
            bar = Table.grid(padding=(0, 1))
            for name, number, total, colour in (
                ("paid", paid, self._units, "green"),
                ("unit in hand", paid + counts["reserved"] + counts["claimed"], self._units, "yellow"),
                ("in line", counts["waiting"], len(crowd.people), "blue"),
            ):
                bar.add_row(
                    name,
                    ProgressBar(total=max(1, total), completed=number, width=44, complete_style=colour),
                    f"{number:,} of {total:,}",
                )
            rows.append(bar)
            if self.opens_s and (left := self.opens_s - crowd.now_s()) > 0:
                rows.append(Text(f"opens in {left:.1f} s", style="magenta"))
            ended = "  ".join(
                f"{state} {counts[state]:,}"
                for state in ("expired", "cancelled", "left", "refunded", "closed")
                if counts[state]
            )
            rows.append(
                Text(f"joins/s {self._rates[0]:,.0f}   polls/s {self._rates[1]:,.0f}   {ended}", style="dim")
            )
            rows += [Text(f"  {line}", style="dim") for line in crowd.news]
        return Panel(Group(*rows), title=title, border_style="cyan")


def print_report(result: dict[str, Any]) -> None:
    """The figures and the audit, as tables on standard output."""
    console = Console()
    figures = Table(title="One flash sale", show_header=False)
    for name, value in result.items():
        if name != "audit":
            figures.add_row(name, f"{value:,}")
    console.print(figures)
    audit = Table(title="Audit: both sides of every promise")
    for heading in ("what must hold", "left", "right", ""):
        audit.add_column(heading)
    for check in result["audit"]:
        audit.add_row(
            check["name"],
            _short(check["left"]),
            _short(check["right"]),
            "[green]ok" if check["ok"] else "[red]BROKEN",
        )
    console.print(audit)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# --- the sale --------------------------------------------------------------------------------------------------------


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
        async with watching(crowd, desk, sale, view):
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
                if going.done():
                    await going  # raises what went wrong; whoever is still there is counted by the books
            finally:
                going.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await going
        view.step("settling: the last releases, refunds and SMS")
        await _settled(desk, sale)
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
async def watching(crowd: Crowd, desk: Desk, sale: str, view: View) -> AsyncIterator[None]:
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


# --- the command -----------------------------------------------------------------------------------------------------


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
