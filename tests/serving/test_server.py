"""The HTTP edge of a process: ports, heads that never end, and a start that fails."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette

from app.errors import CannotStart
from app.serving.server import Lifespan, _Uvicorn, listen, listen_together, serve_uvicorn
from app.serving.wire import http_protocol
from app.settings import Settings


def test_several_sockets_share_a_port_with_each_other_and_with_nobody_else() -> None:
    wires = listen_together("127.0.0.1", 0, 16, 3, what="front")
    try:
        ports = {wire.getsockname()[1] for wire in wires}
        assert len(ports) == 1
        with pytest.raises(
            CannotStart, match=r"^front: port \d+ on 127\.0\.0\.1 is in use; choose another with -p$"
        ):
            listen_together("127.0.0.1", ports.pop(), 16, 3, what="front", option="-p")
    finally:
        for wire in wires:
            wire.close()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("192.0.2.1", 0)])
def test_an_address_that_is_not_ours_is_one_sentence(host: str, port: int) -> None:
    with pytest.raises(CannotStart, match=r"^office: "):
        listen(host, port, 1, what="office")


async def hello(
    scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    assert scope["type"] == "http"
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[int]:
    config = uvicorn.Config(
        hello, http=http_protocol(settings), ws="none", lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # type: ignore[method-assign]
    wire = listen("127.0.0.1", 0, 16, what="test")
    task = asyncio.create_task(server.serve(sockets=[wire]))
    try:
        yield wire.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def talk(port: int, *parts: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        writer.write_eof()
        return await asyncio.wait_for(reader.read(), 180)
    except ConnectionError:
        return b""
    finally:
        writer.close()


GET = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def test_a_head_within_the_limit_passes_with_a_body_beyond_it() -> None:
    async with serving(Settings(head_max_bytes=2_000)) as port:
        head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 9000\r\n\r\n"
        assert (await talk(port, head + b"x" * 9_000)).endswith(b"ok")
        assert (await talk(port, GET + b"a: " + b"x" * 1_500 + b"\r\nconnection: close\r\n\r\n")).endswith(
            b"ok"
        )


async def test_a_head_beyond_the_limit_is_431_also_one_that_never_ends() -> None:
    async with serving(Settings(head_max_bytes=2_000)) as port:
        assert (await talk(port, GET + b"a: " + b"x" * 2_500 + b"\r\n\r\n")).startswith(b"HTTP/1.1 431 ")
        endless = [GET, *(b"b: " + b"x" * 900 + b"\r\n" for _ in range(4))]
        said = await talk(port, *endless)
        assert said == b"" or said.startswith(b"HTTP/1.1 431 ")


async def test_the_second_request_of_a_connection_is_counted_anew() -> None:
    async with serving(Settings(head_max_bytes=2_000)) as port:
        one = GET + b"a: " + b"x" * 1_500 + b"\r\n"
        said = await talk(port, one + b"\r\n", one + b"connection: close\r\n\r\n")
        assert said.count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize("sent", [b"", GET])
async def test_a_client_that_never_finishes_its_head_is_disconnected(sent: bytes) -> None:
    async with serving(Settings(head_within_s=0.2)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        before = time.monotonic()
        assert await asyncio.wait_for(reader.read(), 180) == b""
        assert time.monotonic() - before < 5
        writer.close()


async def test_a_start_that_fails_keeps_its_sentence() -> None:
    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        raise CannotStart("the reason")
        yield

    wire = listen("127.0.0.1", 0, 1, what="test")
    try:
        with pytest.raises(CannotStart, match=r"^the reason$"):
            await serve_uvicorn(Starlette(lifespan=lifespan), Settings(), [wire], 0.0)
    finally:
        wire.close()


async def test_the_lifespan_runs_once_and_ends() -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def around(_app: Starlette) -> AsyncIterator[dict[str, int]]:
        seen.append("start")
        yield {"number": 7}
        seen.append("stop")

    config = uvicorn.Config(Starlette(lifespan=around), log_config=None)
    config.load()
    lifespan = Lifespan(config)
    await lifespan.startup()
    assert (seen, lifespan.state, lifespan.should_exit) == (["start"], {"number": 7}, False)
    await lifespan.shutdown()
    assert seen == ["start", "stop"]


async def test_whoever_is_in_the_kernels_queue_when_the_process_stops_is_answered() -> None:
    """Closing a listening socket resets the connections that it holds and nobody has accepted yet."""
    protocol = http_protocol(Settings())
    config = uvicorn.Config(
        hello, http=protocol, ws="none", interface="asgi3", lifespan="off", log_config=None
    )
    config.load()
    server = _Uvicorn(config, hello, protocol.lane, 0.0)
    server.lifespan = config.lifespan_class(config)
    wire = listen("127.0.0.1", 0, 16, what="test")
    await server.startup(sockets=[wire])
    clients = [socket.create_connection(wire.getsockname()) for _ in range(8)]
    for client in clients:
        client.sendall(GET + b"\r\n")
        client.setblocking(False)
    # In the same turn of the loop: not one of them has been accepted.
    stopping = asyncio.create_task(server.shutdown(sockets=[wire]))
    try:
        for client in clients:
            said = b""
            async with asyncio.timeout(180):
                while read := await asyncio.get_running_loop().sock_recv(client, 10_000):
                    said += read
            assert said.endswith(b"ok"), said
    finally:
        for client in clients:
            client.close()
        await stopping


def test_a_closed_port_answers_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    from app.children import answers

    assert not answers(f"http://127.0.0.1:{port}")
