"""First figures: what a join, a poll and an order cost, held against the limits of the machine they run on.

    python -m loadtest.first_figures --rounds 5 --seconds 2 --write BENCHMARKS.md

Starts `fairdrop up` and, beside it, R1 (an empty raw-ASGI POST) and R2 (an empty FastAPI JSON route with a model) on
the same server program with the same number of processes. All are measured in turn, round after round, so that a
machine that gets slower is slower for all. With one front process it has a core to itself and everything else, the
generator included, has the other.

CPU time comes from /proc/PID/stat of each process (Linux). A round whose generator used more than 95 % of a core is
void and repeated. Each join is another buyer's; a round of joins ends early when its buyers are used up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from loadtest.generator import closed_loop
from loadtest.office import Office, Sale, read_urls
from loadtest.run import CHECKOUT, servers

VOID_TRIES = 3
ORDERS = 20_000  # claims that pile up for the confirm measurement
BODY = b'{"sku":"PH-128","units":1}'
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
MARKS = ("<!-- first figures: begin -->", "<!-- first figures: end -->")


# --- one measurement -------------------------------------------------------------------------------------------------


@dataclass
class Round:
    per_s: float
    cpu_us: float  # of the server processes, for each answer
    redis_us: float  # of Redis, for each answer
    p50_ms: float
    p99_ms: float
    refused: int  # answers that are not 2xx
    generator: float  # share of a core


@dataclass
class Subject:
    """Something to measure: where, which processes serve it, and requests that never run out before the round ends."""

    name: str
    port: int
    pids: Sequence[int]
    requests: Callable[[], Iterator[bytes]]
    rounds: dict[int, list[Round]] = field(default_factory=dict)


def cpu_s(pids: Sequence[int]) -> float:
    """User and system time of these processes (all their threads), in seconds."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total * TICK_S


class Bench:
    def __init__(self, seconds: float, redis_pid: int) -> None:
        self.seconds = seconds
        self.redis_pid = redis_pid

    def measure(self, subject: Subject, connections: int) -> None:
        """One round of this subject; a void one is repeated."""
        for _ in range(VOID_TRIES):
            front, redis = cpu_s(subject.pids), cpu_s([self.redis_pid])
            result, _ = asyncio.run(
                closed_loop(
                    "127.0.0.1",
                    subject.port,
                    subject.requests(),
                    connections=connections,
                    seconds=self.seconds,
                )
            )
            spent, redis_spent = cpu_s(subject.pids) - front, cpu_s([self.redis_pid]) - redis
            if not result.saturated:
                break
        answers = max(1, result.answers)
        subject.rounds.setdefault(connections, []).append(
            Round(
                per_s=result.per_s,
                cpu_us=spent / answers * 1e6,
                redis_us=redis_spent / answers * 1e6,
                p50_ms=result.quantile_ms(0.5),
                p99_ms=result.quantile_ms(0.99),
                refused=sum(count for status, count in result.statuses.items() if not 200 <= status < 300),
                generator=result.cpu_s / result.seconds,
            )
        )


# --- what is measured ------------------------------------------------------------------------------------------------


def request(method: str, path: str, headers: bytes = b"", body: bytes = b"") -> bytes:
    tail = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body) if body else b""
    return b"%b %b HTTP/1.1\r\nHost: fairdrop\r\n%b%b\r\n%b" % (
        method.encode(),
        path.encode(),
        headers,
        tail,
        body,
    )


def ask_all(port: int, requests: list[bytes], connections: int = 64) -> list[Any]:
    """Send each request once and return the JSON answers (in no order)."""
    result, bodies = asyncio.run(
        closed_loop("127.0.0.1", port, iter(requests), connections=connections, seconds=600, keep_bodies=True)
    )
    if any(status >= 400 or status == 0 for status in result.statuses):
        raise RuntimeError(f"{dict(result.statuses)}: {bodies[-1][:300]!r}")
    return [json.loads(body) for body in bodies]


def passes_for(sale: Sale, port: int, first: int, count: int) -> list[bytes]:
    """Join requests of so many buyers, each with a pass of their own."""
    path = f"/v1/sales/{sale.id}/pass"
    wanted = [
        request("POST", path, b"X-Buyer-Id: %d\r\n" % number, b"{}") for number in range(first, first + count)
    ]
    tickets = f"/v1/sales/{sale.id}/tickets"
    return [
        request("POST", tickets, f"Authorization: Pass {answer['pass']}\r\n".encode(), BODY)
        for answer in ask_all(port, wanted)
    ]


class Supply:
    """Requests that are each used once, over all rounds, at most `each` in one round."""

    def __init__(self, requests: list[bytes], each: int) -> None:
        self.requests = requests
        self.each = each
        self.used = 0

    def __call__(self) -> Iterator[bytes]:
        for _ in range(min(self.each, len(self.requests) - self.used)):
            self.used += 1
            yield self.requests[self.used - 1]


def family(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def front_pids(up: int) -> list[int]:
    """The processes that serve buyers: `fairdrop front` and whatever it forked."""
    pids: list[int] = []
    for process in family(up):
        if "front" in process.cmdline()[1:]:
            pids += [member.pid for member in family(process.pid) if member.pid not in pids]
    return pids


def pin(pids: Sequence[int], cores: set[int]) -> None:
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
            os.sched_setaffinity(int(task.name), cores)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def limit_server(name: str, workers: int, server: str) -> Iterator[tuple[int, list[int]]]:
    """R1 or R2 on the same server program as the front; yields its port and processes."""
    port = free_port()
    app = f"loadtest.peers.limits:{name}"
    if server == "granian":
        command = [
            sys.executable,
            "-m",
            "granian",
            "--interface",
            "asgi",
            "--port",
            str(port),
            "--workers",
            str(workers),
        ]
        command += ["--no-access-log", "--log-level", "warning", "--loop", "uvloop", app]
    else:
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(port), "--workers", str(workers)]
        command += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.DEVNULL)
    try:
        path = "/r2" if name == "r2" else "/"
        deadline = time.monotonic() + 20
        while True:
            try:
                ask = urllib.request.Request(
                    f"http://127.0.0.1:{port}{path}", BODY, {"Content-Type": "application/json"}
                )
                urllib.request.urlopen(ask, timeout=2).read()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield port, [member.pid for member in family(process.pid)]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


# --- orders ----------------------------------------------------------------------------------------------------------


async def orders_against_copy(
    urls: dict[str, str], worker: Sequence[int], sale: Sale, joins: list[bytes]
) -> dict[str, float]:
    """Orders/s of the worker from a full stream into Postgres, and rows/s of COPY into a table of the same make.

    The worker is stopped (SIGSTOP) while the claims pile up, then continued: what is timed is confirm alone.
    """
    host, port = "127.0.0.1", int(urls["front"].rsplit(":", 1)[1])
    database = await asyncpg.connect(urls["database"])
    count = "SELECT count(*) FROM purchase_order WHERE sale = $1"
    try:
        for pid in worker:
            os.kill(pid, signal.SIGSTOP)
        try:
            before = await database.fetchval(count, sale.id)
            result, _ = await closed_loop(host, port, iter(joins), connections=64, seconds=120)
            claims = result.statuses[202]
        finally:
            for pid in worker:
                os.kill(pid, signal.SIGCONT)
        began = time.perf_counter()
        spent = cpu_s(worker)
        while await database.fetchval(count, sale.id) - before < claims:
            if time.perf_counter() - began > 120:
                raise RuntimeError("the worker did not confirm all claims within 120 s")
            await asyncio.sleep(0.02)
        seconds = time.perf_counter() - began
        cpu = cpu_s(worker) - spent
        records = await database.fetch("SELECT * FROM purchase_order WHERE sale = $1", sale.id)
        columns, rows = list(records[0].keys()), [tuple(record) for record in records]
        await database.execute("CREATE TABLE copied (LIKE purchase_order INCLUDING ALL)")
        began = time.perf_counter()
        for at in range(0, len(rows), 1_000):
            await database.copy_records_to_table("copied", records=rows[at : at + 1_000], columns=columns)
        copied = len(rows) / (time.perf_counter() - began)
        await database.execute("DROP TABLE copied")
    finally:
        await database.close()
    return {
        "orders": claims,
        "per_s": claims / seconds,
        "worker_us": cpu / claims * 1e6,
        "copy_per_s": copied,
    }


# --- the table -------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 0) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def table(title: str, subjects: Sequence[Subject], connections: int) -> list[str]:
    r1 = statistics.median(round_.per_s for round_ in subjects[0].rounds[connections])
    r2 = statistics.median(round_.per_s for round_ in subjects[1].rounds[connections])
    lines = [
        f"**{title}, {connections} connections**",
        "",
        "| what | per second | of R1 | of R2 | server µs | Redis µs | p50 ms | p99 ms | generator |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for subject in subjects:
        rounds = subject.rounds[connections]
        middle = statistics.median(round_.per_s for round_ in rounds)
        refused = sum(round_.refused for round_ in rounds)
        lines.append(
            f"| {subject.name}{f' ({refused} refused)' if refused else ''} | {spread([r.per_s for r in rounds])} "
            f"| {middle / r1:.0%} | {middle / r2:.0%} | {spread([r.cpu_us for r in rounds])} "
            f"| {statistics.median(r.redis_us for r in rounds):.1f} "
            f"| {statistics.median(r.p50_ms for r in rounds):.1f} | {statistics.median(r.p99_ms for r in rounds):.1f} "
            f"| {max(r.generator for r in rounds):.0%} |"
        )
    return [*lines, ""]


def machine() -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    parts = ", ".join(
        f"{name} {version(name)}" for name in ("uvicorn", "granian", "uvloop", "httptools", "hiredis")
    )
    return f"{os.cpu_count()} cores ({model}), Linux {platform.release()}, CPython {platform.python_version()}, {parts}"


def figures(workers: int, options: argparse.Namespace, folder: Path) -> list[str]:
    """All rounds with so many front processes; returns lines of Markdown."""
    (folder / "data").mkdir(exist_ok=True)
    if os.geteuid() == 0:
        (folder / "data").chmod(0o711)
    with ExitStack() as stack:
        urls_path = stack.enter_context(
            servers(folder / "data", "--front-workers", str(workers), "--server", options.server)
        )
        urls = read_urls(urls_path)
        office = Office(urls["office"], urls["operator_key"])
        port = int(urls["front"].rsplit(":", 1)[1])
        up = next(p for p in psutil.Process().children() if "up" in p.cmdline())
        everyone = family(up.pid)
        redis_pid = next(p.pid for p in everyone if re.search("valkey|redis", p.name()))
        worker = [p.pid for p in everyone if "worker" in p.cmdline()[1:]]
        fronts = front_pids(up.pid)
        r1_port, r1_pids = stack.enter_context(limit_server("r1", workers, options.server))
        r2_port, r2_pids = stack.enter_context(limit_server("r2", workers, options.server))
        need = options.buyers * len(options.connections) * options.rounds

        common = {"rate_per_s": None, "line_max": 5_000_000}
        claims = office.hold_sale(
            units=5_000_000, opens_in_s=0, pay_within_s=86_400, default_channel=None, **common
        )
        waits = office.hold_sale(units=1, opens_in_s=0, pay_within_s=86_400, default_channel=None, **common)
        gone = office.hold_sale(
            units=1, opens_in_s=0, pay_within_s=86_400, default_channel=None, standby=False, **common
        )
        time.sleep(1.0)  # front doors see new sales within 200 ms
        print(f"{workers} front: {2 * need:,} passes …", file=sys.stderr, flush=True)
        first = 1_000_000
        for_claims = Supply(passes_for(claims, port, first, need + ORDERS), options.buyers)
        for_waits = Supply(passes_for(waits, port, first, need + 2_000), options.buyers)
        for_gone = passes_for(gone, port, first, 2_000)
        ask_all(port, for_gone[:1])  # takes the only unit
        ask_all(port, for_waits.requests[:1])
        sample = ask_all(port, for_waits.requests[1:2_000])
        for_waits.used = 2_000
        polls = [request("GET", f"/v1/tickets/{ticket['ticket']}") for ticket in sample]
        pass_line = for_claims.requests[0].split(b"\r\n")[2] + b"\r\n"
        same = request("POST", "/r2", pass_line, BODY)  # as many bytes as a join
        board = [request("GET", f"/v1/sales/{waits.id}/board")]
        subjects = [
            Subject("R1: empty raw-ASGI POST", r1_port, r1_pids, lambda: cycle([same])),
            Subject("R2: empty FastAPI POST with a model", r2_port, r2_pids, lambda: cycle([same])),
            Subject("join with a pass: a unit is claimed", port, fronts, for_claims),
            Subject("join with a pass: a place in the line", port, fronts, for_waits),
            Subject("join with a pass: sold out", port, fronts, lambda: cycle(for_gone[1:])),
            Subject("poll of a waiting ticket", port, fronts, lambda: cycle(polls)),
            Subject("board", port, fronts, lambda: cycle(board)),
        ]
        if workers == 1 and (os.cpu_count() or 1) >= 2:
            pin(fronts + r1_pids + r2_pids, {0})
            pin([p.pid for p in family(up.pid) if p.pid not in fronts] + [os.getpid()], {1})
        bench = Bench(options.seconds, redis_pid)
        for number in range(options.rounds):
            for connections in options.connections:
                for subject in subjects:
                    print(
                        f"round {number + 1}, {connections} connections: {subject.name}",
                        file=sys.stderr,
                        flush=True,
                    )
                    bench.measure(subject, connections)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        lines: list[str] = []
        title = f"{options.server}, {workers} front process{'es' if workers > 1 else ''}"
        for connections in options.connections:
            lines += table(title, subjects, connections)
        if workers == 1:
            pin([p.pid for p in family(up.pid)], set(range(os.cpu_count() or 1)))
            rest = for_claims.requests[for_claims.used :][:ORDERS]
            wait_for_backlog(office, claims)
            orders = asyncio.run(orders_against_copy(urls, worker, claims, rest))
            lines += [
                f"**Orders into Postgres** ({orders['orders']:,.0f} claims piled up, then the worker let go): "
                f"{orders['per_s']:,.0f} orders/s, {orders['worker_us']:.0f} µs of worker CPU each; raw binary COPY of "
                f"the same rows, 1,000 a transaction, same indexes: {orders['copy_per_s']:,.0f} rows/s "
                f"({orders['per_s'] / orders['copy_per_s']:.0%}).",
                "",
            ]
        office.close(claims.id)
        return lines


def wait_for_backlog(office: Office, sale: Sale) -> None:
    """Until the worker has written every claim so far."""
    for _ in range(600):
        live = office.live(sale.id)
        if not live.get("claimed"):
            return
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one round")
    parser.add_argument("--connections", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="front processes")
    parser.add_argument("--server", choices=("uvicorn", "granian"), default="uvicorn")
    parser.add_argument("--buyers", type=int, default=20_000, help="most buyers in one round of joins")
    parser.add_argument("--write", type=Path, help="put the tables between the marks of this file")
    options = parser.parse_args()
    lines = [f"Machine: {machine()}.", ""]
    command = f"python -m loadtest.first_figures {' '.join(sys.argv[1:])}"
    lines += [f"Command: `{command}`. Median (least–most) of {options.rounds} rounds.", ""]
    for workers in options.workers:
        with tempfile.TemporaryDirectory(prefix="fairdrop-figures-") as folder:
            if os.geteuid() == 0:
                Path(folder).chmod(0o711)
            lines += figures(workers, options, Path(folder))
    text = "\n".join(lines)
    print(text)
    if options.write:
        whole = options.write.read_text(encoding="utf-8")
        before, after = whole.partition(MARKS[0])[0], whole.partition(MARKS[1])[2]
        options.write.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
