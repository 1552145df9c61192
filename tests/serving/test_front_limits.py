"""What strangers can claim of one front process: memory, and on granian connections and slow bodies too. No Redis."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import psutil
import pytest

from tests.sockets import clients, quiet_port

HONEST = 10_000  # connections that are kept, as a crowd in front of the minute does
HONEST_BYTES = 12_000  # of each at most: uvicorn's and uvloop's objects, and the parser's; measured: 7,300
HOSTILE = 400  # of each kind
HEAD_BYTES = 16_384 + HONEST_BYTES  # docs/limits.md
BODY_BYTES = 16_384 + HONEST_BYTES
SILENT = 5  # who ask for megabytes and read nothing
SILENT_BYTES = (
    800_000  # 64 KiB of answers, 256 KiB of requests with 1.5 KB around each, and the noise of so few
)

TIME = b"GET /v1/time HTTP/1.1\r\nHost: x\r\n\r\n"
LONG = TIME[:-2] + b"X-Long: " + b"x" * 8_000 + b"\r\n\r\n"  # some 32 of them in one read
HEAD = b"GET /v1/time HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 15_900  # never ends
BODY = (
    b"POST /v1/sales/x/tickets HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 16000\r\n\r\n"
    + b" " * 15_900  # never ends
)


@dataclass
class Front:
    port: int
    process: subprocess.Popen[bytes]

    @property
    def rss(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def connections(self) -> int:
        """Those that are open on both sides: the last answer's own may not be closed yet."""
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == self.port for one in found)


@contextmanager
def front(server: str, **settings: str) -> Iterator[Front]:
    port = quiet_port()
    environment = os.environ | {
        "FAIRDROP_ENV": "development", "FAIRDROP_REDIS_URL": "redis://127.0.0.1:1/0", "FAIRDROP_DRAIN_S": "0",
        "FAIRDROP_SIGNING_KEYS": "k" * 40, "FAIRDROP_PII_KEYS": "11" * 32, "FAIRDROP_LOG_LEVEL": "error",
        **{f"FAIRDROP_{name.upper()}": value for name, value in settings.items()},
    }  # fmt: skip
    command = [sys.executable, "-m", "app.cli", "front", "--port", str(port), "--server", server]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(port))
        yield Front(port, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(180)


def until(true: Callable[[], bool], within_s: float = 180.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 60)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), connect(port) as one:
        one.sendall(TIME)
        return one.recv(1_000).startswith(b"HTTP/1.1 200")
    return False


def settled(front: Front) -> int:
    """The process' memory once it no longer grows."""
    seen = [0, front.rss]
    while abs(seen[-1] - seen[-2]) > 200_000:
        time.sleep(0.25)
        seen.append(front.rss)
    return seen[-1]


def reached(front: Front, count: int) -> bool:
    return front.connections >= count


@pytest.fixture
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < HONEST + 1_000:
        pytest.skip("needs 11,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (HONEST + 1_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.serial
def test_ten_thousand_connections_cost_what_is_written_down(many_files: None) -> None:
    with front("uvicorn") as one:
        before = settled(one)

        def ask_once(opened: list[socket.socket]) -> None:
            for client in opened:
                client.sendall(TIME)
            for client in opened:
                assert client.recv(1_000).startswith(b"HTTP/1.1 200")

        with clients(one.port, HONEST) as opened:
            ask_once(opened)
            honest = (settled(one) - before) / HONEST
        until(lambda: one.connections < 100)
        with clients(
            one.port, HONEST // 5
        ) as opened:  # who comes later uses the memory of those who have gone
            ask_once(opened)
            again = (settled(one) - before) / HONEST
    assert honest < HONEST_BYTES
    assert again < honest + 1_000


@pytest.mark.serial
def test_what_hostile_clients_can_claim_is_bounded_and_written_down() -> None:
    """All at once, so that none uses the memory of another who has gone."""
    grown: dict[str, float] = {}
    with front("uvicorn") as one, contextlib.ExitStack() as all_open:
        before = settled(one)
        for name, sends in (("head", HEAD), ("body", BODY)):
            full = one.connections + HOSTILE
            opened = all_open.enter_context(clients(one.port, HOSTILE))
            for client in opened:
                client.sendall(sends)
            until(partial(reached, one, full))
            after = settled(one)
            grown[name] = (after - before) / HOSTILE
            before = after
        for client in all_open.enter_context(clients(one.port, SILENT, small=True)):
            client.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                for _ in range(200):
                    client.sendall(LONG * 50)
        with (
            clients(one.port, 1) as (greedy,),
            pytest.raises(ConnectionError),
        ):  # more at once than may be sent ahead
            for _ in range(2_000):
                greedy.sendall(TIME * 5_000)
        grown["silent"] = (settled(one) - before) / SILENT
        assert answers(one.port)  # and everyone else is served
    limits = {"head": HEAD_BYTES, "body": BODY_BYTES, "silent": SILENT_BYTES}
    assert {name: round(size) for name, size in grown.items() if size > limits[name]} == {}, grown


@pytest.mark.serial
def test_on_granian_too_a_body_has_to_come_in_time_and_connections_are_limited() -> None:
    with front("granian", body_within_s="0.3", connections_max="5") as one:
        with clients(one.port, 1) as (slow,):
            slow.sendall(BODY)
            assert slow.recv(1_000).startswith(b"HTTP/1.1 408")
        with clients(one.port, 6) as opened:
            for client in opened:
                client.sendall(TIME)
            for client in opened[:5]:
                assert client.recv(1_000).startswith(b"HTTP/1.1 200")
            opened[5].settimeout(0.3)
            with pytest.raises(TimeoutError):  # it waits in the kernel
                opened[5].recv(1_000)
            opened[0].close()
            opened[5].settimeout(60)
            assert opened[5].recv(1_000).startswith(b"HTTP/1.1 200")
