"""Link: one connection that never repeats what may have happened, and comes back by itself."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import redis.asyncio as redis_async

from app.answers import Gone, Taken
from app.errors import CannotStart, DidNotHappen, Unknown
from app.redis.link import Link, Rejected
from app.scripts import LINE_LEAVE, Scripts, all_scripts
from tests.sockets import nobody

WITHIN_S = 60.0


async def until(condition: Callable[[], Any], within_s: float = WITHIN_S) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  what is waited for is another process
            await asyncio.sleep(0.005)


@pytest.fixture
async def links(redis_url: str) -> AsyncIterator[Callable[..., Awaitable[Link]]]:
    made: list[Link] = []

    async def make(
        url: str = redis_url, *, deadline_s: float = 30.0, start: bool = True, **options: Any
    ) -> Link:
        link = Link(url, deadline_s=deadline_s, name="test", **options)
        made.append(link)
        if start:
            await link.start()
        return link

    yield make
    for link in made:
        await link.close()


class Proxy:
    """TCP between Link and server; `swallow` loses what the server answers, `deaf` what the client says."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.target = (parts.hostname or "", parts.port or 0)
        self.password = parts.password or ""
        self.swallow = self.deaf = self.refuse = False
        self.connections = 0
        self.sent = bytearray()
        self.writers: list[asyncio.StreamWriter] = []
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Proxy:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    @property
    def url(self) -> str:
        return f"redis://:{quote(self.password)}@127.0.0.1:{self.port}/0"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.close()
            return
        self.connections += 1
        back_reader, back_writer = await asyncio.open_connection(*self.target)
        self.writers += [writer, back_writer]

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    if not answers:
                        self.sent += data
                    if not (self.swallow if answers else self.deaf):
                        sink.write(data)
                        await sink.drain()
            sink.close()

        for task in (
            asyncio.create_task(pump(reader, back_writer, answers=False)),
            asyncio.create_task(pump(back_reader, writer, answers=True)),
        ):
            self.tasks.add(task)

    def cut(self) -> None:
        """Every connection is reset."""
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    async def close(self) -> None:
        self.cut()
        self.server.close()
        if self.tasks:
            await asyncio.wait(self.tasks)


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[Proxy]:
    proxy = await Proxy(redis_url).start()
    yield proxy
    await proxy.close()


async def test_a_link_knows_which_server_it_speaks_to(links: Any) -> None:
    link = await links()
    assert link.connected
    info = (await link.call("INFO", "server")).decode()
    assert f"run_id:{link.run_id}" in info
    assert "test" in (await link.call("CLIENT", "GETNAME")).decode()


async def test_every_script_is_loaded_on_connect(links: Any) -> None:
    link = await links()
    shas = [script.sha for script in all_scripts()]
    assert await link.call("SCRIPT", "EXISTS", *shas) == [1] * len(shas)


@pytest.mark.any_keys
async def test_five_thousand_calls_at_once_share_one_connection(links: Any) -> None:
    link = await links()
    replies = await asyncio.gather(*[link.call("INCR", "n") for _ in range(5_000)])
    assert replies == list(range(1, 5_001))
    clients = (await link.call("CLIENT", "LIST")).decode()
    assert clients.count("name=test") == 1


@pytest.mark.any_keys
async def test_a_pipeline_gives_replies_in_order_with_errors_inside(links: Any) -> None:
    link = await links()
    replies, other = await asyncio.gather(
        link.pipeline([("SET", "a", 1), ("HGET", "a", "x"), ("GET", "a"), ("LRANGE", "none", 0, -1)]),
        link.call("PING"),
    )
    assert replies[0] == b"OK"
    assert isinstance(replies[1], Rejected)
    assert replies[1].code == "WRONGTYPE"
    assert replies[2:] == [b"1", []]
    assert other == b"PONG"
    assert await link.pipeline([]) == []
    assert await link.pipeline([("PING",)]) == [b"PONG"]


@pytest.mark.any_keys
async def test_large_values_and_any_bytes_pass(links: Any) -> None:
    link = await links()
    value = bytes(range(256)) * 20_000
    assert await link.call("SET", "big", value) == b"OK"
    assert await link.call("GET", "big") == value


@pytest.mark.any_keys
async def test_a_lost_reply_is_unknown_and_the_call_is_not_sent_again(
    links: Any, proxy: Proxy, redis: Any
) -> None:
    link = await links(proxy.url)
    proxy.swallow = True
    call = asyncio.ensure_future(link.call("INCR", "n"))
    await until(lambda: proxy.sent.count(b"\r\nINCR\r\n"))
    while await redis.get("n") != b"1":  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    proxy.cut()
    with pytest.raises(Unknown):
        await call
    proxy.swallow = False
    await until(lambda: link.connected)
    assert await link.call("GET", "n") == b"1"
    assert proxy.sent.count(b"\r\nINCR\r\n") == 1


@pytest.mark.any_keys
async def test_a_silent_server_is_unknown_after_the_deadline_and_the_connection_is_given_up(
    links: Any, proxy: Proxy
) -> None:
    link = await links(proxy.url, deadline_s=0.1)
    await until(lambda: link.connected)  # a busy machine needs more than one try
    connections = proxy.connections
    proxy.deaf = True
    with pytest.raises(Unknown, match="deadline"):
        await link.call("INCR", "n")
    await until(lambda: not link.connected)
    proxy.deaf = False
    await until(lambda: link.connected)
    assert proxy.connections > connections
    assert proxy.sent.count(b"\r\nINCR\r\n") == 1
    while True:
        with contextlib.suppress(DidNotHappen, Unknown):  # 0.1 s is little on a busy machine
            assert await link.call("GET", "n", deadline_s=WITHIN_S) is None
            break
        await asyncio.sleep(0.05)


@pytest.mark.any_keys
async def test_a_slow_reply_does_not_answer_the_next_call(links: Any, redis: Any) -> None:
    link = await links()
    slow = asyncio.ensure_future(link.call("BLPOP", "nothing", 0, deadline_s=0.05))
    after = asyncio.ensure_future(link.call("ECHO", "mine"))
    with pytest.raises(Unknown):
        await slow
    await redis.rpush("nothing", "late")
    assert await after == b"mine"
    assert link.connected


@pytest.mark.any_keys
async def test_who_stops_waiting_does_not_shift_the_replies(links: Any) -> None:
    link = await links()
    first, second = (
        asyncio.ensure_future(link.call("ECHO", "a")),
        asyncio.ensure_future(link.call("ECHO", "b")),
    )
    await asyncio.sleep(0)
    first.cancel()
    assert await second == b"b"


async def test_without_a_server_a_call_did_not_happen(links: Any, unused_port: int) -> None:
    link = await links(f"redis://127.0.0.1:{unused_port}/0")
    assert not link.connected
    assert "refused" in link.trouble.lower()
    with pytest.raises(DidNotHappen, match="not connected"):
        await link.call("PING")
    with pytest.raises(DidNotHappen):
        await link.pipeline([("PING",)])


async def test_calls_that_never_left_did_not_happen(links: Any, proxy: Proxy) -> None:
    link = await links(proxy.url)
    future = link.send(("PING",))  # written at the end of this turn of the loop
    assert link._wire is not None
    link._wire.connection_lost(None)
    with pytest.raises(DidNotHappen):
        await future
    assert (
        link.connected
    )  # it hears of the loss in the next turn of the loop; whoever calls until then is told now
    late = link.send(("PING",))
    assert isinstance(late.exception(), DidNotHappen)


async def test_too_many_calls_under_way_did_not_happen(links: Any, proxy: Proxy) -> None:
    link = await links(proxy.url, calls_max=3)
    proxy.swallow = True
    waiting = [link.send(("PING",)) for _ in range(3)]
    with pytest.raises(DidNotHappen, match="under way"):
        await link.call("PING")
    proxy.cut()
    assert [type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)] == [Unknown] * 3


async def test_a_link_comes_back_when_the_server_does(links: Any, proxy: Proxy) -> None:
    link = await links(proxy.url)
    proxy.refuse = True
    proxy.cut()
    await until(lambda: not link.connected)
    with pytest.raises(DidNotHappen):
        await link.call("PING")
    proxy.refuse = False
    await until(lambda: link.connected)
    assert await link.call("PING") == b"PONG"


async def test_a_restarted_server_has_another_run_id_and_the_scripts(links: Any, valkey: Any) -> None:
    link = await links()
    before = link.run_id
    valkey.restart()  # in this thread: a store dies with the thread that forked it
    await until(lambda: link.connected and link.run_id != before)
    assert await Scripts(link).line_leave(sale="x", epoch=1, sku="A", seq=1) == Gone()


async def test_after_a_script_flush_the_script_is_loaded_again(links: Any) -> None:
    link = await links()
    scripts = Scripts(link)
    await link.call("SCRIPT", "FLUSH", "SYNC")
    replies = await asyncio.gather(
        *[scripts.line_leave(sale="x", epoch=1, sku="A", seq=1) for _ in range(50)]
    )
    assert replies == [Gone()] * 50
    assert await link.call("SCRIPT", "EXISTS", LINE_LEAVE.sha) == [1]


async def test_a_script_that_was_lost_takes_once(links: Any) -> None:
    link = await links()
    await link.call("SCRIPT", "FLUSH", "SYNC")
    key = "{sale:x}:rate:pass:ann"
    assert await Scripts(link).rate_take(key=key, period_ms=60_000, burst=5) == Taken(4)
    assert await Scripts(link).rate_take(key=key, period_ms=60_000, burst=5) == Taken(3)


async def test_a_replica_refuses_and_the_link_looks_for_the_primary(
    links: Any, redis: Any, unused_port: int
) -> None:
    link = await links()
    scripts = Scripts(link)
    await redis.execute_command("REPLICAOF", "127.0.0.1", unused_port)
    try:
        with pytest.raises(Rejected) as refused:
            await scripts.rate_take(key="{sale:x}:rate:pass:ann", period_ms=1_000, burst=5)
        assert refused.value.code == "READONLY"
        await until(lambda: not link.connected)
    finally:
        await redis.execute_command("REPLICAOF", "NO", "ONE")
    await until(lambda: link.connected)
    assert await scripts.rate_take(key="{sale:x}:rate:pass:ann", period_ms=1_000, burst=5) == Taken(4)


class Fake:
    """A server that speaks as told: for LOADING and for nonsense."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    async def start(self) -> str:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/0"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(self.answer * max(1, data.count(b"*")))
        writer.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"HTTP/1.1 400 Bad\r\n",
        b":1\r\n",
        b"$-1\r\n",
        b"$1\r\nx\r\n",
    ],
)
async def test_a_server_that_is_loading_or_none_at_all_is_not_connected(links: Any, answer: bytes) -> None:
    fake = Fake(answer)
    link = await links(await fake.start())
    assert not link.connected
    assert link.trouble
    with pytest.raises(DidNotHappen):
        await link.call("PING")
    with pytest.raises(CannotStart):
        await link.check_server()
    fake.server.close()


async def test_an_error_inside_a_script_is_unknown(links: Any) -> None:
    """It may have written before it failed."""
    link = await links()
    text = "#!lua\nredis.call('SET', KEYS[1], 1)\nredis.call('HGET', KEYS[1], 'x')"
    with pytest.raises(Unknown, match="WRONGTYPE"):
        await link.send(("EVAL", text, 1, "{sale:x}:rate:a:b"), script=True)


async def test_an_unknown_command_did_not_happen(links: Any) -> None:
    link = await links()
    with pytest.raises(Rejected) as refused:
        await link.call("NOSUCH")
    assert refused.value.code == "ERR"


async def test_a_closed_link_leaves_nothing_behind(links: Any, redis_url: str) -> None:
    link = await links()
    waiting = link.send(("BLPOP", "nothing", 5))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await link.close()
    with pytest.raises(Unknown):
        await waiting
    with pytest.raises(DidNotHappen):
        await link.call("PING")
    await link.close()
    client = redis_async.Redis.from_url(redis_url)
    while any(entry["name"] == "test" for entry in await client.client_list()):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    await client.aclose()
    assert not [task for task in asyncio.all_tasks() if "redis link" in task.get_name()]
    gc.collect()


async def test_the_server_is_named_in_one_sentence(links: Any) -> None:
    link = await links(start=False)
    assert (await link.check_server()).startswith(("Valkey ", "Redis "))


async def test_a_server_that_evicts_cannot_hold_a_sale(links: Any, redis: Any) -> None:
    await redis.config_set("maxmemory", "1gb")
    policy = (await redis.config_get("maxmemory-policy"))["maxmemory-policy"]
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(CannotStart, match="noeviction"):
            await (await links(start=False)).check_server()
    finally:
        await redis.config_set("maxmemory-policy", policy)
        await redis.config_set("maxmemory", 0)


async def test_a_wrong_password_is_told_and_never_shown(links: Any, redis_url: str) -> None:
    parts = urlsplit(redis_url)
    link = await links(f"redis://:wrong-secret@{parts.hostname}:{parts.port}/0")
    assert not link.connected
    assert "wrong-secret" not in link.trouble
    with pytest.raises(CannotStart) as refused:
        await link.check_server()
    assert "wrong-secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "", "redis://127.0.0.1:notaport/0", "redis://h:1/zero"]
)
def test_a_wrong_address_is_one_clear_sentence(url: str) -> None:
    with pytest.raises(CannotStart, match="Redis address"):
        Link(url)


@pytest.fixture
def unused_port() -> Iterator[int]:
    with nobody() as port:
        yield port
