"""A payment supplier's bad minutes in the middle of a sale: does anybody else notice?

    make outage                                            each fault for 60 s, some ten minutes
    make outage ARGS="--fault-s 10 --calm-s 5"             the short form, as the tests run it
    python -m loadtest.outage --faults lost --json         one fault, one JSON document

Starts servers of its own with two sandbox payment suppliers, keeps buyers joining at a steady rate (open loop: latency
counts from the intended moment), and lets the first supplier hang, flap, answer 500, take the money and not answer
(`lost`); in `all` both answer 500. Every link is paid at once, so an order that ends unpaid was lost. In `texts` the
first of two SMS suppliers answers 500, while buyers who left a number win in a second sale.

What it says: p50 and p99 of joins before, during and after each fault; trips of the breaker; how long after a trip the
other supplier was asked; how long after the fault everything was well again. Exit status 0: every promise was kept,
1: one was broken, 2: it could not start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from loadtest.generator import Result, open_loop
from loadtest.office import SKU, Office, Sale, read_urls
from loadtest.run import CHECKOUT, CannotStart, servers

FAULTS = ("hang", "flap", "error", "lost", "all", "texts")
FLAP_S = 3.0  # so long bad, so long well
SICK: dict[str, dict[str, float]] = {
    "hang": {"hang_rate": 1.0},
    "flap": {"error_rate": 1.0},
    "error": {"error_rate": 1.0},
    "lost": {"lost_rate": 1.0},
    "all": {"error_rate": 1.0},
    "texts": {"error_rate": 1.0},
}
SUPPLIERS = ("sandbox", "sandbox-2", "sandbox-sms", "sandbox-sms-2")
WELL = {"hang_rate": 0.0, "error_rate": 0.0, "lost_rate": 0.0}
REST_WITHIN_S = 90.0
LOOK_EVERY_S = 0.1
CONNECTIONS = 64
SAME_TRIP_MS = 100  # a breaker stays open longer than this


@dataclass
class Joins:
    """Joins of one phase, ms."""

    count: int
    failed: int  # anything but 200 and 202
    p50_ms: float
    p99_ms: float


@dataclass
class Struck:
    """One fault and what came of it. Times in s; None: it did not happen."""

    fault: str
    before: Joins
    during: Joins
    after: Joins
    trips: int = 0  # the first supplier's breaker opened
    trip_after_s: float | None = None  # from the fault to the first trip
    failover_s: list[float] = field(
        default_factory=list
    )  # from each trip from closed to the other supplier's next link
    orders: int = 0  # reserved during the fault
    link_p50_s: float | None = None  # reserved -> link, of those
    link_max_s: float | None = None
    slowed: str | None = None  # reason on the board
    extended: int = 0  # deadlines that were extended
    well_after_s: float | None = (
        None  # from the end of the fault: breakers closed, nobody waits for a link, not slowed
    )


@dataclass
class Report:
    """The whole campaign."""

    faults: list[Struck]
    promises: dict[str, bool]
    numbers: dict[str, Any]
    load_average: tuple[float, float, float]

    @property
    def kept(self) -> bool:
        return all(self.promises.values())


def post(url: str, document: object, *, buyer: str = "", headers: Mapping[str, str] | None = None) -> Any:
    told = {"Content-Type": "application/json", **({"X-Buyer-Id": buyer} if buyer else {}), **(headers or {})}
    return ask(urllib.request.Request(url, json.dumps(document).encode(), told, method="POST"))


def ask(request: str | urllib.request.Request, within_s: float = 10.0) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=within_s) as answer:
        return json.loads(answer.read())


@contextlib.contextmanager
def second_sandbox(secret: str, folder: Path) -> Iterator[str]:
    """The other supplier: one more sandbox process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"FAIRDROP_ENV": "development", "FAIRDROP_SANDBOX_SECRET": secret}
    command = [sys.executable, "-m", "app.cli", "sandbox", "--port", str(port)]
    with (folder / "sandbox-2.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=CHECKOUT, env=os.environ | told, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def environment(told: dict[str, str]) -> Iterator[None]:
    """What the servers inherit, and nothing afterwards."""
    before = dict(os.environ)
    os.environ.update(told)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def joins(sale: Sale, host: str, buyers: Iterator[int]) -> Iterator[bytes]:
    """A join each of another buyer, as raw requests."""
    body = json.dumps({"sku": SKU, "units": 1}).encode()
    for number in buyers:
        yield (
            f"POST /v1/sales/{sale.id}/tickets HTTP/1.1\r\nHost: {host}\r\nX-Buyer-Id: b{number}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body


def measured(result: Result) -> Joins:
    good = result.statuses[200] + result.statuses[202]
    failed = result.answers - good + result.statuses[0]
    return Joins(
        result.answers, failed, round(result.quantile_ms(0.5), 2), round(result.quantile_ms(0.99), 2)
    )


def note(seen: dict[int, str], trips: list[tuple[int, str]]) -> None:
    """Add the trips that are new: a report counts back from its own clock, so one trip may be told a few ms apart."""
    for at_ms, before in trips:
        if not any(abs(at_ms - other) < SAME_TRIP_MS for other in seen):
            seen[at_ms] = before


@dataclass
class Campaign:
    """One sale, its servers, and what is done to its suppliers."""

    options: argparse.Namespace
    urls: dict[str, str]
    second: str
    office: Office
    sale: Sale
    texted: Sale  # whose buyers have left a number
    pool: asyncpg.Pool
    buyers: Iterator[int]
    faults: list[Struck] = field(default_factory=list)

    async def join(self, seconds: float) -> Joins:
        front = urlsplit(self.urls["front"])
        host, port = front.hostname or "127.0.0.1", front.port or 80
        result = await open_loop(
            host, port, joins(self.sale, f"{host}:{port}", self.buyers),
            per_s=self.options.joins_per_s, connections=CONNECTIONS, seconds=seconds,
        )  # fmt: skip
        return measured(result)

    async def control(self, url: str, changes: object) -> None:
        await asyncio.to_thread(post, f"{url}/control", changes)

    async def make(self, fault: str, sick: bool) -> None:
        what = "sms" if fault == "texts" else "payments"
        for url in [self.urls["sandbox"]] + ([self.second] if fault == "all" else []):
            await self.control(url, {what: (SICK[fault] if sick else WELL) | {"hang_ms": 30_000}})

    async def flap(self, fault: str, seconds: float) -> None:
        """The fault, for so long."""
        ends = time.monotonic() + seconds
        sick = True
        while time.monotonic() < ends:
            await self.make(fault, sick)
            left = ends - time.monotonic()
            await asyncio.sleep(min(left, FLAP_S) if fault == "flap" else left)
            sick = not sick if fault == "flap" else True
        await self.make(fault, False)

    async def breakers(self) -> dict[str, dict[str, Any]]:
        found = await asyncio.to_thread(self.office.providers)
        return {one["name"]: one for one in found if one["name"] in SUPPLIERS}

    async def trips(self, fault: str, since_ms: int) -> list[tuple[int, str]]:
        """When the first supplier's breaker opened since then, and out of which state. History holds the last ten."""
        history = (await self.breakers())["sandbox-sms" if fault == "texts" else "sandbox"].get("history", [])
        return [(e["at_ms"], e["before"]) for e in history if e["after"] == "open" and e["at_ms"] >= since_ms]

    async def board(self) -> dict[str, Any]:
        url = f"{self.urls['front']}/v1/sales/{self.sale.id}/board"
        found: dict[str, Any] = await asyncio.to_thread(ask, url)
        return found

    async def waiting_for_links(self, ended: datetime) -> int:
        """Orders from before the end of the fault whose buyers cannot pay yet."""
        return int(
            await self.pool.fetchval(
                "SELECT count(*) FROM purchase_order o WHERE o.state = 'reserved' AND NOT EXISTS (SELECT FROM"
                " payment_attempt a WHERE a.order_no = o.order_no AND a.state IN ('sent', 'succeeded'))"
                " AND o.reserved_at <= $1",
                ended,
            )
        )

    async def ails(self, ended: datetime) -> str:
        """What is not as before the fault; empty: nothing."""
        found = [
            f"{name} {one['state']}"
            for name, one in (await self.breakers()).items()
            if one["state"] != "closed"
        ]
        if waiting := await self.waiting_for_links(ended):
            found.append(f"{waiting} wait for a link")
        if slowdown := (await self.board())["slowdown"]:
            found.append(f"slowed: {slowdown}")
        return ", ".join(found)

    async def strike(self, fault: str, before: Joins) -> Struck:
        o = self.options
        began = await self.pool.fetchval("SELECT now()")
        began_s = time.monotonic()
        seen: dict[int, str] = {}
        slowed: set[str] = set()

        async def watch() -> None:
            while True:
                note(seen, await self.trips(fault, int(began.timestamp() * 1000)))
                slowed.update(filter(None, [(await self.board())["slowdown"]]))
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        texting = asyncio.create_task(self.text()) if fault == "texts" else None
        try:
            during, _ = await asyncio.gather(self.join(o.fault_s), self.flap(fault, o.fault_s))
            ended = await self.pool.fetchval("SELECT now()")
            over = time.monotonic()
            after_task = asyncio.create_task(self.join(o.calm_s))
            well_after, ails = None, ""
            while time.monotonic() - over < o.well_within_s:
                ails = await self.ails(ended)
                if not ails:
                    well_after = round(time.monotonic() - over, 1)
                    break
                await asyncio.sleep(LOOK_EVERY_S)
            after = await after_task
            note(seen, await self.trips(fault, int(began.timestamp() * 1000)))
        finally:
            tasks = [task for task in (watching, texting) if task is not None]
            for task in tasks:
                task.cancel()
            ended_by = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended_by:
            if not isinstance(error, asyncio.CancelledError):
                raise RuntimeError("the campaign itself broke") from error
        struck = Struck(fault, before, during, after, well_after_s=well_after)
        struck.slowed = ", ".join(sorted(slowed)) or None
        struck.trips = len(seen)
        if seen:
            struck.trip_after_s = round(min(seen) / 1000 - began.timestamp(), 1)
        if fault != "all":
            found = [
                await self.failover(fault, at, ended)
                for at, state in sorted(seen.items())
                if state == "closed"
            ]
            struck.failover_s = [s for s in found if s is not None]
        await self.count(struck, began, ended)
        how = f"never well again: {ails}" if well_after is None else f"well again after {well_after} s"
        took = time.monotonic() - began_s
        print(f"  {fault}: {took:.0f} s, {struck.trips} trips, {how}", file=sys.stderr)
        return struck

    async def text(self) -> None:
        """Buyers with a number, until it is cancelled: each wins, pays, and is texted twice."""
        url, every_s = f"{self.urls['front']}/v1/sales/{self.texted.id}", 1 / self.options.texted_per_s
        for number in itertools.count():
            contact = {"phone": f"+86138{number:08}", "language": "zh-CN"}
            made = await asyncio.to_thread(post, f"{url}/pass", {"contact": contact}, buyer=f"t{number}")
            given = {"Authorization": f"Pass {made['pass']}"}
            await asyncio.to_thread(post, f"{url}/tickets", {"sku": SKU, "units": 1}, headers=given)
            await asyncio.sleep(every_s)

    async def failover(self, fault: str, trip_ms: int, until: datetime) -> float | None:
        """From a trip to the other supplier's next call for a link, or its next text; None: none before `until`."""
        table, other = ("sms", "sandbox-sms-2") if fault == "texts" else ("payment_attempt", "sandbox-2")
        found = await self.pool.fetchval(
            f"SELECT extract(epoch FROM min(sent_at))::float8 FROM {table} WHERE provider = $3"  # noqa: S608
            " AND sent_at >= to_timestamp($1::float8) AND sent_at <= $2",
            trip_ms / 1000, until, other,
        )  # fmt: skip
        return None if found is None else round(found - trip_ms / 1000, 3)

    async def count(self, struck: Struck, began: datetime, ended: datetime) -> None:
        waits = await self.pool.fetch(
            "SELECT extract(epoch FROM o.pay_by - make_interval(secs => o.pay_within_s + o.extended_s)"
            " - o.reserved_at)::float8 AS s FROM purchase_order o"
            " WHERE o.reserved_at BETWEEN $1 AND $2",
            began, ended,
        )  # fmt: skip
        struck.orders = len(waits)
        found = sorted(
            row["s"] for row in waits if row["s"] is not None
        )  # null: paid before its link was known
        if found:
            struck.link_p50_s = round(statistics.median(found), 3)
            struck.link_max_s = round(found[-1], 1)
        struck.extended = await self.pool.fetchval(
            "SELECT count(*) FROM deadline_extension WHERE at BETWEEN $1 AND now()", began
        )

    async def rest(self) -> bool:
        """The sale is closed and nothing is under way any more."""
        self.office.close(self.sale.id)
        self.office.close(self.texted.id)
        ends = time.monotonic() + REST_WITHIN_S
        while time.monotonic() < ends:
            open_ones = await self.pool.fetchval(
                "SELECT (SELECT count(*) FROM purchase_order WHERE state IN ('reserved', 'refunding'))"
                " + (SELECT count(*) FROM outbox WHERE state = 'due')"
                " + (SELECT count(*) FROM capture WHERE state IN ('due', 'refund_due'))"
            )
            if not open_ones:
                return True
            await asyncio.sleep(LOOK_EVERY_S)
        return False

    async def attempts(self) -> dict[str, int]:
        """How many attempts are in which state where, and why: `provider state code` -> count."""
        found = await self.pool.fetch(
            "SELECT concat_ws(' ', provider, state, code) AS what, count(*) FROM payment_attempt GROUP BY 1 ORDER BY 1"
        )
        return {row["what"]: row["count"] for row in found}

    async def texts(self) -> dict[str, int]:
        """How many texts went which way: `provider state` -> count."""
        found = await self.pool.fetch(
            "SELECT concat_ws(' ', provider, state) AS what, count(*) FROM sms GROUP BY 1 ORDER BY 1"
        )
        return {row["what"]: row["count"] for row in found}

    async def books(self) -> dict[str, Any]:
        """Both suppliers' own books against ours, at rest."""
        stats = [await asyncio.to_thread(ask, f"{url}/stats") for url in (self.urls["sandbox"], self.second)]
        ours = await self.pool.fetchrow(
            "SELECT (SELECT count(*) FROM purchase_order) AS orders,"
            " (SELECT count(*) FROM purchase_order WHERE state = 'paid') AS paid,"
            " (SELECT count(*) FROM purchase_order WHERE state NOT IN ('paid', 'reserved')) AS ended_unpaid,"
            " (SELECT coalesce(sum(amount_minor), 0) FROM purchase_order WHERE state = 'paid') AS paid_minor,"
            " (SELECT count(*) FROM (SELECT 1 FROM capture WHERE state = 'kept' GROUP BY order_no HAVING count(*) > 1)"
            " AS more) AS kept_twice,"
            " (SELECT count(*) FROM (SELECT 1 FROM capture GROUP BY order_no HAVING count(*) > 1) AS more)"
            " AS captured_twice"
        )
        return {
            **{name: int(value) for name, value in ours.items()},
            "captured_minor": sum(s.get("captured_minor", 0) for s in stats),
            "refunded_minor": sum(s.get("refunded_minor", 0) for s in stats),
            "links": [s.get("created", 0) for s in stats],
            "captured": [s.get("captured", 0) for s in stats],
        }

    async def run(self) -> Report:
        o = self.options
        for url in (self.urls["sandbox"], self.second):
            await self.control(url, {"auto_pay": {"share": 1.0, "delay_ms": 200, "jitter_ms": 300}})
        await self.join(2.0)  # connections, caches, the first orders
        before = await self.join(o.calm_s)
        for fault in o.faults:
            struck = await self.strike(fault, before)
            self.faults.append(struck)
            before = struck.after
        attempts = await self.attempts()
        rested = await self.rest()
        books = await self.books() | {"attempts": attempts, "texts": await self.texts()}
        audits = [await asyncio.to_thread(self.office.audit, sale.id) for sale in (self.sale, self.texted)]
        return self.judge(rested, books, audits)

    def judge(self, rested: bool, books: dict[str, Any], audits: Sequence[dict[str, Any]]) -> Report:
        o = self.options

        def steady(struck: Struck) -> bool:
            calm = max(struck.before.p99_ms, struck.after.p99_ms)
            return bool(struck.during.p99_ms <= calm * o.p99_times + o.p99_plus_ms)

        promises = {
            "no_join_failed": not any(p.failed for s in self.faults for p in (s.before, s.during, s.after)),
            "joins_as_fast": all(steady(struck) for struck in self.faults),
            "nobody_charged_twice": books["kept_twice"] == 0
            and books["captured_minor"] - books["refunded_minor"] == books["paid_minor"],
            "no_order_lost": rested and books["ended_unpaid"] == 0 and books["paid"] == books["orders"],
            "other_supplier_in_time": all(s <= o.failover_max_s for struck in self.faults for s in struck.failover_s),
            "well_again_by_itself": all(struck.well_after_s is not None for struck in self.faults),
            "audit_ok": all(audit["ok"] for audit in audits),
        }  # fmt: skip
        broken = [check for audit in audits for check in audit["checks"] if not check["ok"]]
        return Report(self.faults, promises, books | {"audit_broken": broken}, os.getloadavg())


@contextlib.asynccontextmanager
async def campaign(options: argparse.Namespace, folder: Path) -> AsyncIterator[Campaign]:
    """Servers, a sale that is open, and everything to look at them with. CannotStart: with its last words."""
    secret = secrets.token_urlsafe(32)
    with second_sandbox(secret, folder) as second:
        told = {
            "FAIRDROP_SANDBOX_SECRET": secret,
            "FAIRDROP_PAYMENT_ALSO": "sandbox-2",
            "FAIRDROP_SMS_ALSO": "sandbox-sms-2",
            "FAIRDROP_SANDBOX_2_URL": second,
            "FAIRDROP_PROVIDER_DEADLINE_S": str(options.deadline_s),
            "FAIRDROP_LINK_WAIT_MAX_S": str(max(2, int(options.fault_s / 3))),
        }
        with environment(told), servers(folder) as path:
            urls = read_urls(path)
            office = Office(urls["office"], urls["operator_key"])
            pay_within_s = max(20, int(options.fault_s / 2))
            texted = office.hold_sale(units=100_000, opens_in_s=1.0, pay_within_s=pay_within_s)
            sale = office.hold_sale(
                units=100_000, opens_in_s=1.0, pay_within_s=pay_within_s, rate_per_s=options.orders_per_s,
                line_max=1_000_000,
            )  # fmt: skip
            await asyncio.sleep(max(0.0, sale.opens_s - time.time()) + 0.2)
            async with asyncpg.create_pool(urls["database"], min_size=1, max_size=2) as pool:
                yield Campaign(options, urls, second, office, sale, texted, pool, iter(range(10_000_000)))


def table(report: Report) -> str:
    """The figures for people: one line a fault."""
    lines = [
        "| fault | p50 / p99 ms before | during | after | trips (first after s) | other supplier after s"
        " | orders, link p50 / max s | slowed | extended | well after s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for s in report.faults:
        over = f"{max(s.failover_s):.2f} (of {len(s.failover_s)})" if s.failover_s else "–"
        lines.append(
            f"| {s.fault} | {s.before.p50_ms} / {s.before.p99_ms} | {s.during.p50_ms} / {s.during.p99_ms}"
            f" | {s.after.p50_ms} / {s.after.p99_ms} | {s.trips} ({s.trip_after_s}) | {over}"
            f" | {s.orders}, {s.link_p50_s} / {s.link_max_s} | {s.slowed or '–'} | {s.extended} | {s.well_after_s} |"
        )
    lines += ["", *(f"{'kept' if ok else 'BROKEN':6} {name}" for name, ok in report.promises.items()), ""]
    lines.append(json.dumps(report.numbers) + f" · load average {report.load_average[0]:.1f}")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="in this order")
    parser.add_argument("--fault-s", type=float, default=60.0, help="seconds that each fault lasts")
    parser.add_argument("--calm-s", type=float, default=15.0, help="seconds measured before and after")
    parser.add_argument(
        "--well-within-s",
        type=float,
        default=60.0,
        help="seconds after a fault until all is well again, at most",
    )
    parser.add_argument("--joins-per-s", type=float, default=100.0, help="buyers who join, open loop")
    parser.add_argument("--orders-per-s", type=float, default=15.0, help="admission rate of the sale")
    parser.add_argument(
        "--texted-per-s", type=float, default=3.0, help="buyers who win and are texted twice, in `texts`"
    )
    parser.add_argument("--deadline-s", type=float, default=3.0, help="seconds of one call to a supplier")
    parser.add_argument("--p99-times", type=float, default=1.2, help="p99 of joins during a fault, at most")
    parser.add_argument("--p99-plus-ms", type=float, default=2.0, help="and so many ms more")
    parser.add_argument(
        "--failover-max-s", type=float, default=1.0, help="seconds from a trip to the other supplier, at most"
    )
    parser.add_argument("--json", action="store_true", help="nothing but one JSON document")
    return parser.parse_args(arguments)


async def run(options: argparse.Namespace) -> Report:
    """The campaign on servers of its own, which are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fairdrop-outage-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            folder.chmod(0o711)  # the stores run as another account and must pass through
        async with campaign(options, folder) as running:
            return await running.run()


def main() -> int:
    options = parse()
    try:
        report = asyncio.run(run(options))
    except CannotStart as error:
        print(f"outage: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(report) | {"kept": report.kept}) if options.json else table(report))
    return 0 if report.kept else 1


if __name__ == "__main__":
    sys.exit(main())
