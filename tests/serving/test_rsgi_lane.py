"""The express lane on granian: callbacks answer what is hot, ASGI the rest, and no client holds more than its share."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from app.serving import rsgi
from app.serving.overload import Gate
from app.serving.rsgi_lane import Lane
from app.serving.server import Granian, listen
from app.settings import Settings
from tests.sockets import clients


class Crowded(Exception):
    """Too many are asking."""


@dataclass
class Shop:
    """Answers /hot by the lane, everything else by ASGI; both say which way a request came. /hot/later waits."""

    held: list[Callable[[], None]] = field(default_factory=list)
    lane: int = 0
    ended: list[str] = field(default_factory=list)  # the last message of whom ASGI served
    big_sent: int = 0

    def hot(self, _method: bytes, path: bytes) -> Any:
        if path == b"/broken":
            raise ValueError("in granian's thread")
        return (lambda _headers, body, _tell: (path, body)) if path.startswith(b"/hot") else None

    def ask(self, hot: Any, headers: Any, body: bytes, tell: Callable[[Any], None]) -> None:
        self.lane += 1
        path, body = hot(headers, body, tell)
        said = b"lane %b %b" % (path, body)
        if path == b"/hot/later":
            self.held.append(lambda: tell(said))
        else:
            tell(said)

    def parts(self, given: Any, _headers: Any, _tell: Any) -> tuple[int, rsgi.Texts, bytes]:
        return (503, [], b"crowded") if isinstance(given, Crowded) else (200, [], given)

    def may_wait(self, data: bytes) -> bool:
        return data.startswith(b"GET /hot/poll")

    def joins(self, data: bytes) -> bool:
        return data.startswith(b"POST /hot")

    def too_many(self) -> Exception:
        return Crowded()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message: Any = {"more_body": True}
        body = b""
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        self.ended.append(message["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/big":
            gone = asyncio.ensure_future(receive())
            while not gone.done():
                if self.big_sent < 20_000_000:  # more than kernels buffer
                    self.big_sent += 1_000_000
                    await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})
                await asyncio.wait([gone], timeout=0.01)
            self.ended.append(gone.result()["type"])
            return
        await send(
            {"type": "http.response.body", "body": b"asgi %b %b" % (scope["path"].encode(), body[:10])}
        )


@dataclass
class Open:
    port: int
    shop: Shop
    lane: Lane
    server: Granian


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Open]:
    shop = Shop()
    wire = listen("127.0.0.1", 0, 16, what="test")
    port = wire.getsockname()[1]
    server = Granian(shop, Settings(overload_wait_max_ms=0, **settings), wire)
    serving = asyncio.create_task(server.serve())
    try:
        yield Open(port, shop, server.lane, server)
    finally:
        server.stop()
        await asyncio.wait_for(serving, 180)


async def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 180
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def get(path: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path


def post(path: bytes, body: bytes, *, length: int | None = None) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (
        path, len(body) if length is None else length, body,
    )  # fmt: skip


async def answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of the next response."""
    async with asyncio.timeout(180):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.splitlines() if b"content-length" in line)
        return head, await reader.readexactly(length)


async def ask(port: int, *requests: bytes) -> list[tuple[bytes, bytes]]:
    """The answers, one after the other on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    told = []
    for request in requests:
        writer.write(request)
        told.append(await answer(reader))
    writer.close()
    return told


async def test_hot_requests_take_the_lane_and_others_asgi() -> None:
    async with serving(body_max_bytes=2_000) as front:
        told = await ask(
            front.port,
            get(b"/hot?a=b"),
            post(b"/hot", b"abc"),
            get(b"/cold"),
            post(b"/cold", b"abc"),
            post(b"/hot", b"x" * 3_000),
            b"POST /hot HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /hot HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        )
    assert [body for _, body in told] == [
        b"lane /hot ", b"lane /hot abc", b"asgi /cold ", b"asgi /cold abc",
        b"asgi /hot xxxxxxxxxx", b"asgi /hot ", b"asgi /hot ab",
    ]  # fmt: skip
    assert not [head for head, _ in told if b"connection: close" in head]  # the next request may come
    assert front.shop.ended == ["http.request"] * 5


async def test_a_body_in_pieces_is_read_as_one() -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        whole = post(b"/hot", b"abcdef")
        for piece in (whole[:10], whole[10:-3], whole[-3:]):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)  # not a wait: it parts the packets
        assert (await answer(reader))[1] == b"lane /hot abcdef"
        writer.close()


@pytest.mark.parametrize("path", [b"/hot", b"/cold"])
async def test_a_process_that_drains_says_that_each_answer_is_the_last_of_its_connection(path: bytes) -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get(path))
        assert b"\r\nconnection: close\r\n" not in (await answer(reader))[0]
        front.lane.draining = True
        writer.write(get(path))
        assert b"\r\nconnection: close\r\n" in (await answer(reader))[0]
        assert await asyncio.wait_for(reader.read(), 180) == b""
        writer.close()


async def test_a_server_that_stops_answers_what_is_under_way() -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(post(b"/hot/later", b"abc"))
        await until(lambda: front.shop.held)
        front.server.stop()
        front.shop.held.pop()()
        assert (await answer(reader))[1] == b"lane /hot/later abc"
        writer.close()


@pytest.mark.parametrize("path", [b"/hot", b"/cold"])
async def test_a_body_that_does_not_come_in_time_is_408_and_the_end(path: bytes) -> None:
    async with serving(body_within_s=0.2) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(post(path, b"ab", length=10))
        head, body = await answer(reader)
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b'"too_slow"' in body
        assert await asyncio.wait_for(reader.read(), 180) == b""
        assert front.shop.lane == 0
        assert not front.lane._reading
        writer.close()


@pytest.mark.parametrize("path", [b"/hot", b"/cold"])
async def test_half_a_body_is_never_taken_for_a_whole_one(
    path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as front:
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(post(path, b"ab", length=10))
        if path == b"/hot":
            await until(lambda: front.lane._reading)
            writer.transport.abort()
            await until(lambda: not front.lane._reading)
        else:
            await until(lambda: front.lane._tasks)
            writer.transport.abort()
            await until(lambda: front.shop.ended == ["http.disconnect"])
        assert (await ask(front.port, get(b"/cold")))[0][1] == b"asgi /cold "
        assert front.shop.lane == 0
    assert not caplog.text


async def test_who_leaves_before_the_answer_harms_nobody_and_a_broken_request_neither() -> None:
    async with serving() as front:
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(post(b"/hot/later", b"abc"))
        await until(lambda: front.shop.held)
        writer.transport.abort()
        front.shop.held.pop()()
        [(broken, _), (_, body)] = await ask(front.port, get(b"/broken"), get(b"/hot"))
        assert broken.startswith(b"HTTP/1.1 500 ")
        assert body == b"lane /hot "


async def test_a_crowd_is_turned_away_and_nobody_else() -> None:
    async with serving() as front:
        gate = front.lane.gate = Gate(0.02, 0.025, time.perf_counter, 1)
        gate.limit = 1
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(post(b"/hot/later", b""))
        await until(lambda: gate.under_way == 1)
        [(refused, body), (_, polled)] = await ask(front.port, post(b"/hot", b""), get(b"/hot/poll"))
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert (body, polled, gate.turned_away) == (b"crowded", b"lane /hot/poll ", 1)
        front.shop.held.pop()()
        await answer(reader)
        assert gate.under_way == 0
        assert (await ask(front.port, post(b"/hot", b"a")))[0][1] == b"lane /hot a"
        writer.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
async def test_a_client_that_does_not_read_is_disconnected() -> None:
    async with serving(read_within_s=0.5) as front:
        with clients(front.port, 1, small=True) as (silent,):
            silent.sendall(get(b"/big"))
            await until(lambda: front.shop.ended == ["http.request", "http.disconnect"])
