"""A small HTTP load generator: closed loop for capacity, open loop for latency. One thread, one core, no client stack.

closed: `connections` connections, each sends its next request when the answer to the last has come. What comes out is
the most the server can do, and the price of one request in CPU time.
open:   requests leave at fixed moments whatever the server does; latency counts from the *intended* moment, so a server
that stalls cannot hide the requests it kept waiting (coordinated omission).

Plain sockets and epoll, no event loop: see BENCHMARKS.md for what a request costs it. Every answer is looked at: its
status, and that it is one whole answer and no more. `Result.saturated` and `Result.behind` say when it was the
generator that was measured.
"""

from __future__ import annotations

import asyncio
import select
import socket
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

SATURATED = 0.9  # share of a core above which it was the generator that was measured
LATE_S = 0.002  # a request that the generator comes to later than this is late
LATE_MAX = 0.03  # share of late ones above which the rate was not offered
TURN_S = 0.0002  # open loop: it looks at what is due and what has come about so often
BURST = 32  # open loop: sends before it looks at what has come
EVENTS_MAX = 256  # answers read in one turn
ANSWER_BYTES = 8_192  # read at once; a longer answer takes several reads
END_WITHIN_S = 60.0  # after the last request was due, for the answers that are still to come


@dataclass
class Result:
    """What came back. seconds is wall time from the first request to the last answer."""

    answers: int = 0
    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)  # 0: connection lost, or no whole answer
    by_status: dict[int, list[float]] = field(
        default_factory=dict
    )  # latencies in ms, from the intended moment
    in_time: Counter[int] = field(
        default_factory=Counter
    )  # open loop: answers that came before the last was due
    starved: int = 0  # open loop: requests that found no free connection when their time had come
    unsent: int = 0  # of those: not sent before the end
    due: int = 0  # open loop: requests whose time came
    late: int = 0  # of those: the generator came to them more than LATE_S after their time
    cpu_s: float = 0.0  # of this generator: near `seconds`, it was the generator that was measured
    bodies: dict[int, bytes] = field(default_factory=dict)  # the last one of each status

    @property
    def per_s(self) -> float:
        return self.answers / self.seconds if self.seconds else 0.0

    @property
    def saturated(self) -> bool:
        return self.cpu_s > SATURATED * self.seconds

    @property
    def behind(self) -> bool:
        """Whether too many requests left later than they were meant to: the rate was not offered."""
        return self.late > LATE_MAX * self.due

    @property
    def latencies_ms(self) -> list[float]:
        return [one for found in self.by_status.values() for one in found]

    def quantile_ms(self, q: float, *statuses: int) -> float:
        """Of the answers with these statuses; without any, of all."""
        taken = self.by_status
        ordered = sorted(one for status in statuses or taken for one in taken.get(status, ()))
        return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else 0.0


class _Line:
    """One connection, one request at a time."""

    __slots__ = ("began", "busy", "recv", "rest", "send", "socket")

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=END_WITHIN_S)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.send = self.socket.send
        self.recv = self.socket.recv
        self.rest = b""
        self.busy = False
        self.began = 0.0  # perf_counter(); open loop: the intended moment


class _Tally:
    """Answers of one status."""

    __slots__ = ("last", "waited_s")

    def __init__(self) -> None:
        self.waited_s: list[float] = []
        self.last = b""


def answer_bytes(data: bytes) -> int:
    """How long the answer is that begins here; 0: its head has not come whole.

    Answers must carry Content-Length (all of ours do) or have no body. ValueError: this is no answer.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return 0
    at = data.find(b"ontent-length:", 0, end)
    if at < 0:
        at = data.find(b"ontent-Length:", 0, end)
        if at < 0:
            return end + 4
    return end + 4 + int(data[at + 14 : data.find(b"\r", at)])


class _Run(ABC):
    def __init__(self, requests: Iterator[bytes], keep_bodies: bool) -> None:
        self.requests = requests
        self.result = Result()
        self.lines: dict[int, _Line] = {}
        self.epoll = select.epoll()
        self.keep_bodies = keep_bodies
        self.all_bodies: list[bytes] = []
        self.tallies: dict[bytes, _Tally] = {}  # by the first 12 bytes of an answer
        self.lost = 0
        self.sent_all = False  # open loop: the last request is due

    def connect(self, host: str, port: int, connections: int) -> None:
        for _ in range(connections):
            line = _Line(host, port)
            number = line.socket.fileno()
            self.lines[number] = line
            self.epoll.register(number, select.EPOLLIN)

    def close(self, line: _Line) -> None:
        """Closing takes a socket out of epoll."""
        if self.lines.pop(line.socket.fileno(), None) is not None:
            line.socket.close()

    def lose(self, line: _Line) -> None:
        """The connection has ended, or what came on it is not one answer."""
        self.lost += line.busy
        self.close(line)

    def send(self, line: _Line, request: bytes, began: float) -> None:
        """A request fits the buffer of its socket: nothing else is under way there."""
        line.began = began
        line.busy = True
        try:
            if line.send(request) == len(request):
                return
        except OSError:
            pass
        self.lose(line)

    def read(self, timeout_s: float) -> int:
        """Take what has come, waiting so long for the first; how many connections had something."""
        found = self.epoll.poll(timeout_s, EVENTS_MAX)
        now = time.perf_counter()  # all of it has come by now: what follows is this generator's own time
        lines, tallies = self.lines, self.tallies
        for number, _ in found:
            line = lines[number]
            try:
                data = line.recv(ANSWER_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data or not line.busy:
                self.lose(line)
                continue
            if line.rest:
                data = line.rest + data
                line.rest = b""
            try:
                size = answer_bytes(data)
                if len(data) < size or not size:
                    line.rest = data
                    continue
                if len(data) > size:
                    raise ValueError("more than was asked for")
                tally = tallies.get(data[:12]) or self._tally(data)
            except ValueError:
                self.lose(line)
                continue
            line.busy = False
            tally.waited_s.append(now - line.began)
            tally.last = data
            if self.keep_bodies:
                self.all_bodies.append(data[data.find(b"\r\n\r\n") + 4 :])
            self.next(line, now)
        return len(found)

    def _tally(self, data: bytes) -> _Tally:
        """Of a status that is seen for the first time. ValueError: this is no answer."""
        if not data.startswith(b"HTTP/1.1 "):
            raise ValueError(f"no answer: {data[:40]!r}")
        int(data[9:12])
        return self.tallies.setdefault(data[:12], _Tally())

    @abstractmethod
    def next(self, line: _Line, now: float) -> None:
        """This connection has had its answer: what it does now."""

    def counts(self) -> Counter[int]:
        """Answers so far, by status."""
        return Counter({int(first[9:]): len(tally.waited_s) for first, tally in self.tallies.items()})

    def finish(self, until: float) -> None:
        """Wait for the answers that are still to come. TimeoutError: they have not by then."""
        while self.lines:
            if time.perf_counter() > until:
                raise TimeoutError(f"{len(self.lines)} connections still wait for an answer")
            self.read(0.05)

    def drive(self, host: str, port: int, connections: int) -> None:
        """Connect, run, take the result. OSError: could not connect; TimeoutError: answers did not come."""
        result = self.result
        try:
            self.connect(host, port, connections)
            began, cpu = time.perf_counter(), time.thread_time()
            self.run()
            result.seconds = time.perf_counter() - began
            result.cpu_s = time.thread_time() - cpu
        finally:
            for line in list(self.lines.values()):
                self.close(line)
            self.epoll.close()
        result.statuses = self.counts()
        result.answers = result.statuses.total()
        if self.lost:
            result.statuses[0] = self.lost
        for first, tally in self.tallies.items():
            result.by_status[int(first[9:])] = [1000 * one for one in tally.waited_s]
            result.bodies[int(first[9:])] = tally.last.partition(b"\r\n\r\n")[2]

    @abstractmethod
    def run(self) -> None:
        """Send and read until all is sent and answered."""


class _Closed(_Run):
    def __init__(self, requests: Iterator[bytes], seconds: float, keep_bodies: bool) -> None:
        super().__init__(requests, keep_bodies)
        self.seconds = seconds
        self.until = 0.0

    def next(self, line: _Line, now: float) -> None:
        request = next(self.requests, None) if now < self.until else None
        if request is None:
            self.close(line)
        else:
            self.send(line, request, now)

    def run(self) -> None:
        now = time.perf_counter()
        self.until = now + self.seconds
        for line in list(self.lines.values()):
            self.next(line, now)
        self.finish(self.until + END_WITHIN_S)


class _Open(_Run):
    def __init__(self, requests: Iterator[bytes], per_s: float, seconds: float, give_up: bool) -> None:
        super().__init__(requests, False)
        self.per_s = per_s
        self.total = int(per_s * seconds)
        self.give_up = give_up
        self.idle: list[_Line] = []
        self.waiting: deque[tuple[bytes, float]] = deque()

    def next(self, line: _Line, now: float) -> None:
        if self.waiting:
            self.send(line, *self.waiting.popleft())
        elif self.sent_all:
            self.close(line)
        else:
            self.idle.append(line)

    def lose(self, line: _Line) -> None:
        super().lose(line)
        if line in self.idle:
            self.idle.remove(line)

    def run(self) -> None:
        self.idle = list(self.lines.values())
        result, clock, total, per_s = self.result, time.perf_counter, self.total, self.per_s
        began = clock()
        number = 0
        while number < total:
            wait_s = began + number / per_s - clock()
            if wait_s <= 0:
                number = self._send_due(began, number, min(total, number + BURST))
                self.read(0)
            elif not self.read(int(wait_s * 1000) / 1000):  # epoll knows whole milliseconds, and rounds up
                wait_s = began + number / per_s - clock()
                if 0 < wait_s < 0.001:
                    time.sleep(max(TURN_S, wait_s))
        result.due = number
        result.in_time = self.counts()
        if self.give_up:
            result.unsent = len(self.waiting)
            self.waiting.clear()
        self.sent_all = True
        for line in self.idle:
            self.close(line)
        self.finish(clock() + END_WITHIN_S)

    def _send_due(self, began: float, number: int, end: int) -> int:
        """Send what is due, of the requests up to `end`; returns the first that is not."""
        result, clock, per_s = self.result, time.perf_counter, self.per_s
        while number < end:
            intended = began + number / per_s
            now = clock()
            if intended > now:
                break
            request = next(self.requests, None)
            if request is None:
                raise ValueError(f"{number} requests are too few")
            number += 1
            if now - intended > LATE_S:
                result.late += 1
            if self.idle:
                self.send(self.idle.pop(), request, intended)
            else:
                result.starved += 1
                self.waiting.append((request, intended))
        return number


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
    run = _Closed(requests, seconds, keep_bodies)
    await asyncio.to_thread(run.drive, host, port, connections)
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
    be measured long after it has ended); `unsent` counts them. There must be enough requests for all the seconds.
    """
    run = _Open(requests, per_s, seconds, give_up)
    await asyncio.to_thread(run.drive, host, port, connections)
    return run.result
