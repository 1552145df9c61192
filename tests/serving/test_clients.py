"""Clients that are slow, silent, greedy or too many cost the others nothing: raw sockets against a front's protocol."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import pytest
import uvicorn

from app.serving import wire
from app.serving.server import drop_who_does_not_read, listen
from app.serving.wire import http_protocol, limit_of_connections
from app.settings import Settings
from tests.sockets import clients

POST = b"POST /hot HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
GET = b"GET /hot HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Shop:
    """/hot is answered by the lane, /big by ASGI with as much as the client will take."""

    answered: int = 0
    away: int = 0
    big_sent: int = 0
    ended: list[str] = field(default_factory=list)
    busy_s: float = 0.0  # what a hot answer costs
    held: list[Callable[[], None]] | None = None  # POST /hot is not answered before these are called

    def finds(self, _method: bytes, target: bytes) -> Any:
        return target if target == b"/hot" else None

    def may_wait(self, data: bytes) -> bool:
        return b" /hot " in data[:20]

    def joins(self, data: bytes) -> bool:
        return data.startswith(b"POST ")

    def turned_away(self, _head: bytes, date: bytes) -> bytes:
        self.away += 1
        return b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n%b\r\n" % date

    def ask(self, _hot: Any, _headers: Any, body: bytes, tell: Callable[[Any], None]) -> None:
        self.answered += 1
        until = time.perf_counter() + self.busy_s
        while time.perf_counter() < until:
            pass
        if self.held is not None and body:
            self.held.append(partial(tell, body))
        else:
            tell(body)

    def response(self, given: Any, _headers: Any, date: bytes, _tell: Callable[[Any], None]) -> bytes:
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n%b\r\n%b" % (len(given), date, given)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        chunk = b"x" * 65_536
        try:
            while True:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self.big_sent += len(chunk)
                message = asyncio.create_task(receive())
                done, _ = await asyncio.wait([message], timeout=0)
                if done and message.result()["type"] == "http.disconnect":
                    return
                message.cancel()
        finally:
            self.ended.append(scope["path"])


@dataclass
class Front:
    port: int
    shop: Shop
    server: uvicorn.Server

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)


@asynccontextmanager
async def serving(**changed: Any) -> AsyncIterator[Front]:
    settings = Settings(**changed)
    shop = Shop()
    config = uvicorn.Config(
        shop, http=http_protocol(settings, shop), ws="none", interface="asgi3", lifespan="off",
        log_config=None, access_log=False, timeout_graceful_shutdown=1, backlog=1_024,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # type: ignore[method-assign]
    listener = listen("127.0.0.1", 0, 1_024, what="test")
    drop_who_does_not_read(listener, settings.read_within_s)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield Front(listener.getsockname()[1], shop, server)
    finally:
        server.should_exit = True
        await task


async def until(true: Callable[[], Any], within_s: float = 180.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def ask(port: int, request: bytes = GET) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 180)
    finally:
        writer.close()


async def test_a_body_that_never_ends_is_disconnected() -> None:
    async with serving(body_within_s=0.4) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(POST + b"abc")
        before = time.monotonic()
        assert (await asyncio.wait_for(reader.read(), 180)).startswith(b"HTTP/1.1 408 ")
        assert 0.3 < time.monotonic() - before < Settings().body_within_s
        writer.close()
        assert front.shop.answered == 0


async def test_a_trickle_does_not_buy_more_time() -> None:
    async with serving(body_within_s=0.4, head_within_s=0.4) as front:
        for start, drop, told in (
            (POST, b"a", b"HTTP/1.1 408 "),
            (b"GET /hot HTTP/1.1\r\n", b"a: b\r\n", b""),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            writer.write(start)
            with suppress(ConnectionError):
                for _ in range(9):
                    writer.write(drop)
                    if reader.at_eof():
                        break
                    await asyncio.sleep(0.15)
                assert (await asyncio.wait_for(reader.read(), 180))[:13] == told
            writer.close()
            await until(lambda: front.connections == 0)
        assert front.shop.answered == 0


async def test_a_slow_but_honest_client_is_answered() -> None:
    async with serving(body_within_s=60.0, head_within_s=60.0) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        for part in (POST[:20], POST[20:], b"abcde", b"fghij"):
            writer.write(part)
            await asyncio.sleep(0.1)
        assert (await asyncio.wait_for(reader.readuntil(b"fghij"), 180)).startswith(b"HTTP/1.1 200 OK")
        writer.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
async def test_a_client_that_does_not_read_is_disconnected_and_its_answer_ends() -> None:
    async with serving(read_within_s=0.5) as front:
        with clients(front.port, 1, small=True, within_s=60) as (silent,):
            silent.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
            await until(lambda: front.shop.big_sent)
            await until(lambda: front.connections == 0)
            await until(lambda: front.shop.ended == ["/big"])
        assert front.shop.big_sent < 20_000_000  # what kernels buffer, and no more


async def test_one_connection_too_many_is_told_so_and_the_others_stay() -> None:
    async with serving(connections_max=20) as front:
        with clients(front.port, 20, small=True, within_s=60) as opened:
            await until(lambda: front.connections == 20)
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            writer.write(GET)
            said = await asyncio.wait_for(reader.read(), 180)
            assert said.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 2\r\nconnection: close\r\n" in said
            writer.close()
            assert front.connections == 20
            opened.pop().close()
            await until(lambda: front.connections == 19)
            assert (await ask(front.port)).startswith(b"HTTP/1.1 200 OK")
            assert front.shop.answered == 1


async def test_a_client_that_sends_far_ahead_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PIPELINE_MAX", 50)
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            writer.write(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" * 60)
            await writer.drain()
            while True:
                await asyncio.wait_for(reader.readexactly(65_536), 180)
        await until(lambda: front.connections == 0)
        await until(lambda: front.shop.ended)  # the answer under way has been told
        writer.close()


async def test_an_answer_under_way_ends_with_its_client_also_if_more_was_sent_after_it() -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        await asyncio.wait_for(reader.readexactly(65_536), 180)
        writer.transport.abort()
        await until(lambda: front.shop.ended == ["/big"])


def test_the_limit_of_open_files_limits_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = [(1_024, 4_096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _what: given[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _what, pair: given.append(pair))
    assert limit_of_connections(500) == 500
    assert limit_of_connections(20_000) == 4_096 - wire.FILES_KEPT
    assert given == [(1_024, 4_096), (4_096, 4_096)]
    assert limit_of_connections(2_000) == 2_000


@pytest.mark.serial
async def test_a_hundred_bad_clients_cost_the_others_nothing() -> None:
    """Slow heads, slow bodies, silent readers: the p99 of a client who behaves, with and without them."""

    async def p99_ms(front: Front) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        took = []
        for _ in range(300):
            before = time.perf_counter()
            writer.write(GET)
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 180)
            took.append(time.perf_counter() - before)
        writer.close()
        return sorted(took)[296] * 1_000

    async with serving() as front:
        alone = min([await p99_ms(front) for _ in range(3)])
        process = psutil.Process()
        memory = process.memory_info().rss
        with clients(front.port, 150, small=True, within_s=60) as opened:
            for number, one in enumerate(opened):
                one.sendall((b"GET /ho", POST + b"abc", b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")[number % 3])
            await until(lambda: front.shop.big_sent >= 50 * 65_536)
            sent = -1
            while sent != front.shop.big_sent:  # until the silent readers' buffers are full
                sent = front.shop.big_sent
                await asyncio.sleep(0.25)
            # What else runs on the machine spoils one or another, these clients would spoil all.
            crowded: list[float] = []
            while len(crowded) < 30 and (not crowded or crowded[-1] >= 3 * alone + 5):
                crowded.append(await p99_ms(front))
            grown = process.memory_info().rss - memory
        assert crowded[-1] < 3 * alone + 5, (alone, crowded)
        assert grown < 150 * 500_000


async def test_a_crowd_is_told_503_at_once_and_everyone_gets_one_answer() -> None:
    async with serving(overload_turn_ms=5, overload_wait_max_ms=30) as front:
        front.shop.busy_s = 0.004
        front.server.config.http.lane.gate.crowd_min = 8  # type: ignore[union-attr]
        readers = [await asyncio.open_connection("127.0.0.1", front.port) for _ in range(60)]
        statuses: list[bytes] = []

        async def keep_asking(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for _ in range(6):
                writer.write(POST + b"abcdefghij")
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 180)
                statuses.append(head[9:12])
                if head[9:12] == b"200":
                    assert await reader.readexactly(10) == b"abcdefghij"
                else:
                    assert b"retry-after: 1\r\n" in head
            writer.close()

        async with asyncio.TaskGroup() as group:
            for reader, writer in readers:
                group.create_task(keep_asking(reader, writer))
        assert len(statuses) == 360
        assert statuses.count(b"200") == front.shop.answered > 16
        assert statuses.count(b"503") == front.shop.away > 30


async def test_while_too_many_wait_for_redis_newcomers_are_told_so_and_the_others_are_served() -> None:
    async with serving(overload_turn_ms=60_000) as front:
        front.shop.held = held = []
        lane = front.server.config.http.lane  # type: ignore[union-attr]
        lane.gate.limit = 5
        lane.gate.crowd_min, lane.gate._per_s = 5, 0.0
        waiting = [asyncio.create_task(ask(front.port, POST + b"abcdefghij")) for _ in range(5)]
        await until(lambda: len(held) == 5)
        before = time.monotonic()
        assert b" 503 " in await ask(front.port, POST + b"abcdefghij")
        assert time.monotonic() - before < 30  # of the minute that a turn may last here
        assert b" 200 " in await ask(front.port)  # it waits for nothing
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(POST + b"abc")  # what comes in pieces has to be read
        await until(lambda: front.connections == 6)
        await asyncio.sleep(0.05)  # not a wait: it parts the packets
        writer.write(b"defghij")
        await until(lambda: len(held) == 6)
        assert front.shop.away == 1
        for answer in held:
            answer()
        assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 180)
        writer.close()
        assert all(b" 200 " in said for said in await asyncio.gather(*waiting))
        assert lane.gate.under_way == 0
        front.shop.held = None
        assert b" 200 " in await ask(front.port, POST + b"abcdefghij")


async def test_a_client_that_leaves_while_it_waits_is_not_counted_for_ever() -> None:
    async with serving() as front:
        front.shop.held = held = []
        gate = front.server.config.http.lane.gate  # type: ignore[union-attr]
        _, gone = await asyncio.open_connection("127.0.0.1", front.port)
        gone.write(POST + b"abcdefghij")
        await until(lambda: held)
        assert gate.under_way == 1
        gone.transport.abort()
        await until(lambda: front.connections == 0)
        held.pop()()
        assert gate.under_way == 0


@pytest.mark.parametrize(
    ("data", "whole", "last"),
    [
        (GET, True, False),
        (POST + b"abcdefghij", True, False),
        (POST.replace(b"Content-Length: 10", b"content-length:10 ") + b"abcdefghij", True, False),
        (POST + b"\r\n\r\nabcdef", True, False),
        (POST + b"abc", False, False),
        (POST + b"abcdefghijk", False, False),
        (GET + GET, False, False),
        (GET + GET[:20], False, False),
        (GET[:20], False, False),
        (b"", False, False),
        (b"nothing known\r\n\r\n", False, False),
        (GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), True, True),
        (GET.replace(b"1.1", b"1.0"), True, True),
        (GET.replace(b"\r\n\r\n", b"\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"), True, False),
        (GET.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n") + b"1\r\na\r\n", False, False),
    ],
)  # fmt: skip
def test_only_one_whole_request_is_refused_unread(data: bytes, whole: bool, last: bool) -> None:
    holds = wire.Whole()
    for _ in range(2):  # nothing stays in it
        assert holds(data) is whole
        assert not whole or holds.last is last
        assert holds(POST + b"abcdefghij")
        assert not holds.last
