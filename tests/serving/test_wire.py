"""The express lane: hot requests are answered without ASGI, in their turn; nothing out of the ordinary enters it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from app.problems import CODES
from app.serving.server import listen
from app.serving.wire import Lane, http_protocol
from app.settings import Settings

BUILT = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n%b\r\n%b"


@dataclass
class Shop:
    """Answers /hot by the lane, everything else by ASGI; both say which way a request came. /hot/later waits."""

    held: list[Callable[[], None]] = field(default_factory=list)
    lane: int = 0

    def finds(self, method: bytes, target: bytes) -> Any:
        return (lambda _headers, body, _tell: (target, body)) if target.startswith(b"/hot") else None

    def ask(self, hot: Any, headers: Any, body: bytes, tell: Callable[[Any], None]) -> None:
        self.lane += 1
        target, body = hot(headers, body, tell)
        said = b"lane %b %b" % (target, body)
        if target == b"/hot/later":
            self.held.append(lambda: tell(said))
        else:
            tell(said)

    def response(self, given: Any, headers: Any, date: bytes, tell: Callable[[Any], None]) -> bytes:
        return BUILT % (len(given), date, given)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        said = b"asgi %b %b" % (scope["path"].encode(), body[:10])
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", b"%d" % len(said))],
            }
        )
        await send({"type": "http.response.body", "body": said})


@dataclass
class Open:
    port: int
    shop: Shop
    server: uvicorn.Server
    lane: Lane


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Open]:
    shop = Shop()
    limits = Settings(overload_wait_max_ms=0, **settings)  # clients and server share this loop
    protocol = http_protocol(limits, shop)
    config = uvicorn.Config(
        shop, http=protocol, ws="none", interface="asgi3", lifespan="off",
        log_config=None, access_log=False, timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # type: ignore[method-assign]
    wire = listen("127.0.0.1", 0, 16, what="test")
    task = asyncio.create_task(server.serve(sockets=[wire]))
    try:
        yield Open(wire.getsockname()[1], shop, server, protocol.lane)
    finally:
        server.should_exit = True
        await task


async def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 180
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def get(path: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join((b"GET %b HTTP/1.1" % path, b"Host: x", *headers, b"", b""))


async def answers(reader: asyncio.StreamReader, count: int) -> list[bytes]:
    """So many bodies, in the order in which they come."""
    bodies = []
    async with asyncio.timeout(180):
        for _ in range(count):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.lower().splitlines() if b"content-length" in line
            )
            bodies.append(await reader.readexactly(length))
    return bodies


async def test_requests_that_come_together_are_answered_in_their_order() -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get(b"/hot/later") + get(b"/cold/1") + get(b"/hot/2") + get(b"/cold/3"))
        await until(lambda: front.shop.held)
        with pytest.raises(TimeoutError):  # nothing overtakes the first
            await asyncio.wait_for(reader.readexactly(1), 0.2)
        front.shop.held.pop()()
        told = await answers(reader, 4)
        assert [body.split()[1] for body in told] == [b"/hot/later", b"/cold/1", b"/hot/2", b"/cold/3"]
        writer.write(get(b"/hot/5"))  # and the connection goes on as before
        assert await answers(reader, 1) == [b"lane /hot/5 "]
        writer.close()


async def test_a_hot_answer_at_once_lets_the_next_hot_request_of_the_same_packet_in() -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get(b"/hot/1") * 50)
        assert await answers(reader, 50) == [b"lane /hot/1 "] * 50
        assert front.shop.lane == 50
        writer.close()


@pytest.mark.parametrize("said", [b"keep-alive", b"Keep-Alive"])
async def test_a_browser_that_says_keep_alive_is_ordinary(said: bytes) -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get(b"/hot", b"Connection: " + said) * 2)
        assert await answers(reader, 2) == [b"lane /hot "] * 2
        writer.close()


async def test_a_body_may_come_in_pieces() -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        for part in (b"POST /hot HTTP/1.1\r\nHo", b"st: x\r\nContent-Length: 6\r\n\r\nab", b"cd", b"ef"):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)  # not a wait: it parts the packets
        assert await answers(reader, 1) == [b"lane /hot abcdef"]
        writer.close()


@pytest.mark.parametrize(
    "request_",
    [
        get(b"/hot", b"Connection: close"),
        get(b"/hot").replace(b"HTTP/1.1", b"HTTP/1.0"),
        b"POST /hot HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        b"POST /hot HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nab",
        b"POST /hot HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n" + b"x" * 3_000,
        get(b"/hot", b"Upgrade: websocket", b"Connection: Upgrade"),
    ],
    ids=["close", "1.0", "chunked", "expect", "large", "upgrade"],
)
async def test_what_is_out_of_the_ordinary_goes_the_ordinary_way(request_: bytes) -> None:
    async with serving(body_max_bytes=2_000) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(request_)
        async with asyncio.timeout(180):
            said = b""
            while b"asgi /hot" not in said:
                read = await reader.read(10_000)
                assert read, said
                said += read
        assert front.shop.lane == 0
        writer.close()


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize("cut", [0, 8, 200], ids=["at once", "body later", "body in two"])
async def test_who_asks_for_another_protocol_is_served_in_this_one(cut: int) -> None:
    """Java's HttpClient asks for HTTP/2 with its first request. The parser leaves its body to the other protocol."""
    first = b"POST /hot HTTP/1.1\r\nHost: x\r\n" + H2C + b"Content-Length: 6\r\n\r\nabcdef"
    sent = first + get(b"/cold/2", b"Upgrade: h2c", b"Connection: Upgrade") + get(b"/hot")
    cut = {0: 0, 8: len(first) - 6, 200: len(first) - 3}[cut]
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        if cut:
            writer.write(sent[:cut])
            await until(lambda: [one for one in front.server.server_state.connections if one._owed])  # type: ignore[union-attr]
        writer.write(sent[cut:])
        assert await answers(reader, 3) == [b"asgi /hot abcdef", b"asgi /cold/2 ", b"asgi /hot "]
        writer.close()


NO_HTTP = {
    "no HTTP": b"\x16\x03\x01 hello\r\n\r\n",
    "no length": b"POST /hot HTTP/1.1\r\nHost: x\r\nContent-Length: six\r\n\r\nabcdef",
    "a chunk that breaks off": b"POST /cold HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\nzz\r\n",
    "a chunked upgrade": b"POST /cold HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    + H2C
    + b"\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("case", NO_HTTP)
async def test_what_cannot_be_read_is_refused_with_a_problem_and_the_last_of_its_connection(
    case: str,
) -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(NO_HTTP[case])
        said = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        head, _, body = said.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"content-type: application/problem+json" in head
        assert b"connection: close" in head
        problem = json.loads(body)
        assert (problem["status"], problem["code"]) == (400, "malformed")
        assert problem["title"] == CODES["malformed"].title
        assert b"HTTP/1.1 200" not in said


@pytest.mark.parametrize("path", [b"/hot/later", b"/cold"])
async def test_a_refusal_never_stands_where_the_answer_to_an_earlier_request_belongs(path: bytes) -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get(path) + b"garbage\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), 60) in (b"", BUILT % (11, b"", b"asgi /cold "))
        writer.close()


async def test_a_body_that_does_not_come_in_time_is_told_so() -> None:
    async with serving(body_within_s=0.2) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(b"POST /hot HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nabc")
        said = await asyncio.wait_for(reader.read(), 60)
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in said
        writer.close()


async def test_a_process_that_stops_answers_what_is_hot_and_then_closes() -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get(b"/hot/later"))
        await until(lambda: front.shop.held)
        front.server.should_exit = True
        connection = next(iter(front.server.server_state.connections))
        await until(lambda: connection.lane.draining)  # type: ignore[union-attr]
        front.shop.held.pop()()
        said = await asyncio.wait_for(reader.read(), 180)
        assert said.startswith(b"HTTP/1.1 200 OK\r\nconnection: close\r\n")
        assert said.endswith(b"lane /hot/later ")
        writer.close()


@pytest.mark.parametrize("path", [b"/hot", b"/cold"])
async def test_a_process_that_drains_serves_on_and_says_that_each_answer_is_the_last(path: bytes) -> None:
    """A proxy then keeps no connection that is about to be closed under its next request."""
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get(path))
        assert len(await answers(reader, 1)) == 1
        front.lane.draining = True
        writer.write(get(path))
        said = await asyncio.wait_for(reader.read(), 180)
        assert said.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nconnection: close\r\n" in said
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET /hot HT"])
async def test_a_connection_made_just_before_the_stop_still_gets_its_answer(sent: bytes) -> None:
    async with serving() as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(sent)
        await until(lambda: front.server.server_state.connections)
        front.server.should_exit = True
        await until(lambda: front.lane.draining)
        writer.write(get(b"/hot")[len(sent) :])
        said = await asyncio.wait_for(reader.read(), 180)
        assert said.endswith(b"lane /hot ")
        writer.close()


async def test_a_connection_that_is_idle_after_a_hot_answer_is_closed() -> None:
    async with serving(keep_alive_s=0.2, head_within_s=0.1) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get(b"/hot"))
        await answers(reader, 1)
        before = time.monotonic()
        assert await asyncio.wait_for(reader.read(), 180) == b""
        assert time.monotonic() - before < Settings().keep_alive_s
        writer.close()


async def test_a_client_that_leaves_before_its_answer_harms_nobody() -> None:
    async with serving() as front:
        _, gone = await asyncio.open_connection("127.0.0.1", front.port)
        gone.write(get(b"/hot/later"))
        await until(lambda: front.shop.held)
        gone.transport.abort()
        await until(lambda: not front.server.server_state.connections)
        front.shop.held.pop()()
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get(b"/hot"))
        assert await answers(reader, 1) == [b"lane /hot "]
        writer.close()


async def test_a_client_that_does_not_read_leaves_the_lane() -> None:
    async with serving() as front:
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        body = b"x" * 1_900
        one = b"POST /hot HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        sent = 0
        with pytest.raises((TimeoutError, ConnectionError)):  # it may have sent too far ahead
            async with asyncio.timeout(3):
                while True:
                    writer.write(one * 20)
                    sent += 20
                    await writer.drain()
        assert (
            0 < front.shop.lane < sent
        )  # beyond the transport's high-water mark they wait for ASGI's flow control
        writer.transport.abort()
