"""A small HTTP load generator: closed loop for capacity, open loop for latency. One process, one core, no client stack.

closed: `connections` connections, each sends its next request when the answer to the last has come. What comes out is
the most the server can do, and the price of one request in CPU time.
open:   requests leave at fixed moments whatever the server does; latency counts from the *intended* moment, so a server
that stalls cannot hide the requests it kept waiting (coordinated omission).

On uvloop it costs 21 µs of CPU for a request and looks at every answer; wrk with a script that sends each buyer's own
pass costs 27–43 µs and does not, k6 117 µs. All our servers cost more, so they reach the end of a core first.
`Result.saturated` says when it was the generator that was measured.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

SAMPLES_MAX = 200_000  # latencies kept of one run
SATURATED = 0.9  # share of a core above which it was the generator that was measured


@dataclass
class Result:
    """What came back. seconds is wall time from the first request to the last answer."""

    answers: int = 0
    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    by_status: dict[int, list[float]] = field(
        default_factory=dict
    )  # latencies in ms, from the intended moment
    trips: dict[int, list[float]] = field(default_factory=dict)  # the same from the moment of sending
    samples: int = 0
    in_time: Counter[int] = field(
        default_factory=Counter
    )  # open loop: answers that came before the last was due
    starved: int = 0  # open loop: requests that found no free connection when their time had come
    unsent: int = 0  # of those: not sent before the end
    cpu_s: float = 0.0  # of this generator: near `seconds`, it was the generator that was measured
    bodies: dict[int, bytes] = field(default_factory=dict)  # the last one of each status

    @property
    def per_s(self) -> float:
        return self.answers / self.seconds if self.seconds else 0.0

    @property
    def saturated(self) -> bool:
        return self.cpu_s > SATURATED * self.seconds

    @property
    def latencies_ms(self) -> list[float]:
        return [one for found in self.by_status.values() for one in found]

    def quantile_ms(self, q: float, *statuses: int, trip: bool = False) -> float:
        """Of the answers with these statuses; without any, of all. trip: from the moment of sending."""
        taken = self.trips if trip else self.by_status
        ordered = sorted(one for status in statuses or taken for one in taken.get(status, ()))
        return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else 0.0


class _Line(asyncio.Protocol):
    """One connection, one request at a time. Answers must carry Content-Length (all of ours do) or be 204/304."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.rest = b""
        self.began = 0.0  # perf_counter(); open loop: the intended moment
        self.sent = 0.0
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not a subclass

    def send(self, request: bytes, began: float) -> None:
        self.began = began
        self.sent = time.perf_counter()
        self.busy = True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        data = self.rest + data if self.rest else data
        head = data.find(b"\r\n\r\n")
        if head < 0:
            self.rest = data
            return
        at = data.find(b"ontent-", 0, head)
        length = 0
        while at >= 0:
            if data[at + 7 : at + 14].lower() == b"length:":
                end = data.find(b"\r\n", at)
                length = int(data[at + 14 : end])
                break
            at = data.find(b"ontent-", at + 7, head)
        if len(data) < head + 4 + length:
            self.rest = data
            return
        self.rest = b""
        self.busy = False
        self.run.answered(self, int(data[9:12]), data[head + 4 :])

    def connection_lost(self, exc: Exception | None) -> None:
        self.run.lost(self)


class _Run:
    def __init__(self, requests: Iterator[bytes], keep_bodies: bool) -> None:
        self.requests = requests
        self.result = Result()
        self.loop = asyncio.get_running_loop()
        self.lines: list[_Line] = []
        self.until = 0.0
        self.keep_bodies = keep_bodies
        self.all_bodies: list[bytes] = []
        self.done = asyncio.Event()
        self.sent_all = False  # open loop: the last request is due

    def answered(self, line: _Line, status: int, body: bytes) -> None:
        result = self.result
        result.answers += 1
        result.statuses[status] += 1
        if not self.sent_all:
            result.in_time[status] += 1
        if result.samples < SAMPLES_MAX:
            result.samples += 1
            now = time.perf_counter()
            found = result.by_status.get(status)
            if found is None:
                found = result.by_status[status] = []
                result.trips[status] = []
            found.append((now - line.began) * 1000)
            result.trips[status].append((now - line.sent) * 1000)
        if self.keep_bodies:
            self.all_bodies.append(body)
        else:
            result.bodies[status] = body
        self.next(line)

    def next(self, line: _Line) -> None:
        raise NotImplementedError

    def lost(self, line: _Line) -> None:
        if line in self.lines:
            self.lines.remove(line)
            if line.busy:
                self.result.statuses[0] += 1
        if not self.lines:
            self.done.set()

    async def connect(self, host: str, port: int, connections: int) -> None:
        for _ in range(connections):
            _, line = await self.loop.create_connection(lambda: _Line(self), host, port)
            self.lines.append(line)


class _Closed(_Run):
    def next(self, line: _Line) -> None:
        now = time.perf_counter()
        request = next(self.requests, None) if now < self.until else None
        if request is None:
            line.transport.close()
        else:
            line.send(request, now)


class _Open(_Run):
    def __init__(self, requests: Iterator[bytes], keep_bodies: bool) -> None:
        super().__init__(requests, keep_bodies)
        self.idle: list[_Line] = []
        self.due: deque[tuple[bytes, float]] = deque()

    def next(self, line: _Line) -> None:
        if self.due:
            line.send(*self.due.popleft())
        elif self.sent_all:
            line.transport.close()
        else:
            self.idle.append(line)


async def closed_loop(
    host: str,
    port: int,
    requests: Iterator[bytes],
    *,
    connections: int,
    seconds: float,
    keep_bodies: bool = False,
) -> tuple[Result, list[bytes]]:
    """As many requests as come back in so many seconds (or until `requests` ends)."""
    run = _Closed(requests, keep_bodies)
    await run.connect(host, port, connections)
    began, cpu = time.perf_counter(), time.process_time()
    run.until = began + seconds
    for line in list(run.lines):
        run.next(line)
    async with asyncio.timeout(seconds + 30):
        await run.done.wait()
    run.result.seconds = time.perf_counter() - began
    run.result.cpu_s = time.process_time() - cpu
    return run.result, run.all_bodies


async def open_loop(
    host: str,
    port: int,
    requests: Iterator[bytes],
    *,
    per_s: float,
    connections: int,
    seconds: float,
    give_up: bool = False,
) -> Result:
    """One request every 1/per_s seconds; waiting for a free connection counts as latency.

    give_up: what has found no connection when the last request is due is not sent any more (overload would otherwise
    be measured long after it has ended); `unsent` counts them.
    """
    run = _Open(requests, False)
    await run.connect(host, port, connections)
    run.idle = list(run.lines)
    began, cpu = time.perf_counter(), time.process_time()
    for number in range(int(per_s * seconds)):
        intended = began + number / per_s
        wait_s = intended - time.perf_counter()
        if wait_s > 0.001:
            await asyncio.sleep(wait_s)
        elif number % 64 == 0:
            await asyncio.sleep(0)
        request = next(run.requests, None)
        if request is None:
            break
        if run.idle:
            run.idle.pop().send(request, intended)
        else:
            run.result.starved += 1
            run.due.append((request, intended))
    if give_up:
        run.result.unsent = len(run.due)
        run.due.clear()
    run.sent_all = True
    for line in run.idle:
        line.transport.close()
    async with asyncio.timeout(60):
        await run.done.wait()
    run.result.seconds = time.perf_counter() - began
    run.result.cpu_s = time.process_time() - cpu
    return run.result
