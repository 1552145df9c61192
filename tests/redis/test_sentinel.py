"""Sentinels asked for the primary: which answer counts, and when a link goes elsewhere. Real ones: tests/ha."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import quote

import hiredis
import pytest

from app.embedded import Valkey
from app.errors import CannotStart, DidNotHappen
from app.redis import sentinel
from app.redis.address import Address
from app.redis.link import Link
from app.redis.sentinel import Sentinels
from tests.sockets import nobody

WITHIN_S = 60.0


class Fake:
    """A sentinel that says what it is told to say. `asked`: the commands that came."""

    def __init__(self, port: int, epoch: int = 1, host: str = "127.0.0.1") -> None:
        self.says = (host, port, epoch)
        self.service = "sales"
        self.mute = False
        self.raw: bytes | None = None
        self.asked: list[list[bytes]] = []
        self.tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> Fake:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        parser = hiredis.Reader()
        while data := await reader.read(65536):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                self.asked.append(command)
                if not self.mute:
                    writer.write(self.raw or self.answer(command))
        writer.close()

    def answer(self, command: list[bytes]) -> bytes:
        host, port, epoch = (str(one).encode() for one in self.says)
        if command[0] == b"AUTH":
            return b"+OK\r\n"
        if command[2].decode() != self.service:
            return (
                b"*-1\r\n"
                if command[1] == b"GET-MASTER-ADDR-BY-NAME"
                else b"-ERR No such master with that name\r\n"
            )
        if command[1] == b"GET-MASTER-ADDR-BY-NAME":
            words = [host, port]
        else:
            words = [b"name", command[2], b"ip", host, b"port", port, b"config-epoch", epoch]
        return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)

    async def close(self) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def fakes() -> AsyncIterator[Callable[..., Awaitable[Fake]]]:
    made: list[Fake] = []

    async def make(*args: Any) -> Fake:
        made.append(await Fake(*args).start())
        return made[-1]

    yield make
    for fake in made:
        await fake.close()


def among(*fakes: Fake, **options: Any) -> Sentinels:
    return Sentinels([("127.0.0.1", fake.port) for fake in fakes], "sales", **options)


async def test_the_newest_failover_counts(fakes: Any) -> None:
    """One of them was cut off, and still names the server of before."""
    sentinels = among(await fakes(1001, 3), await fakes(1002, 4), await fakes(1002, 4))
    for _ in range(5):
        assert (await sentinels.primary()).port == 1002


async def test_a_sentinel_that_is_silent_or_gone_delays_nobody(
    fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentinel, "ASK_WITHIN_S", 100.0)
    silent, gone = await fakes(1001, 9), await fakes(1001, 9)
    silent.mute = True
    await gone.close()
    good = [await fakes(1002, 4) for _ in range(3)]
    async with asyncio.timeout(WITHIN_S):  # less than the silent one is given
        assert (await among(silent, gone, *good).primary()).port == 1002


async def test_one_sentinel_is_enough_when_the_others_are_away(fakes: Any) -> None:
    silent, gone = await fakes(1001, 9), await fakes(1001, 9)
    silent.mute = True
    await gone.close()
    assert (await among(silent, gone, await fakes(1002, 4)).primary()).port == 1002


async def test_their_own_password_is_said_to_them(fakes: Any) -> None:
    fake = await fakes(1002)
    await among(fake, user="watcher", password="hush").primary()
    assert fake.asked[0] == [b"AUTH", b"watcher", b"hush"]


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"-NOAUTH Authentication required.\r\n", "NOAUTH"),
        (b"+PONG\r\n", "not a sentinel"),
        (b"HTTP/1.1 400 Bad\r\n", "not a sentinel"),
        (b"*0\r\n", "not a sentinel"),
    ],
)
async def test_what_is_no_answer_is_told(fakes: Any, raw: bytes, why: str) -> None:
    fake = await fakes(1002)
    fake.raw = raw
    with pytest.raises(DidNotHappen, match=why):
        await among(fake).primary()


async def test_an_unknown_service_is_told(fakes: Any) -> None:
    fake = await fakes(1002)
    fake.service = "other"
    with pytest.raises(DidNotHappen, match="No such master"):
        await among(fake).primary()


async def test_an_address_of_sentinels_is_read_in_full() -> None:
    address = Address(
        "redis+sentinel://we:a%40b@h1:1,h2,[::1]:3/sales/4?sentinel_password=x%2Fy&sentinel_user=z"
    )
    assert address.sentinels is not None
    assert address.sentinels.hosts == (("h1", 1), ("h2", 26379), ("::1", 3))
    assert (address.sentinels.service, address.user, address.password, address.database) == (
        "sales",
        "we",
        "a@b",
        4,
    )
    assert b"x/y" in address.sentinels._question
    assert "a@b" not in str(address)
    assert "x/y" not in str(address)


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://h:1", "redis+sentinel://h:1/", "redis+sentinel://h:x/sales", "redis+sentinel://h:1/sales/0/1",
        "redis+sentinel://h:1/sales/none", "redis+sentinel://h:99999/sales", "sentinel://h:1/sales", "redis://h1:1,h2:2/0",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_one_clear_sentence(url: str) -> None:
    with pytest.raises(CannotStart, match="Redis address"):
        Address(url)


@pytest.fixture
async def link(valkey: Valkey, redis_url: str, fakes: Any) -> AsyncIterator[tuple[Link, Fake]]:
    """A link that goes where one fake sentinel sends it; at first to the tests' own server."""
    fake = await fakes(valkey.port, 5)
    link = Link(
        f"redis+sentinel://:{quote(valkey.password)}@127.0.0.1:{fake.port}/sales", deadline_s=2.0, name="test"
    )
    yield link, fake
    await link.close()


async def until(reached: Callable[[], Any]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not reached():  # noqa: ASYNC110  what is waited for is another process
            await asyncio.sleep(0.01)


async def test_a_link_goes_to_the_server_that_is_named(link: tuple[Link, Fake], valkey: Valkey) -> None:
    await link[0].start()
    assert link[0].connected
    assert f"127.0.0.1:{valkey.port}" in await link[0].check_server()


async def test_a_link_leaves_a_living_server_that_is_the_primary_no_more(
    link: tuple[Link, Fake], unused_tcp_port: int
) -> None:
    """A failover behind our back: the server of before is cut off from the others, and not from us."""
    it, fake = link
    await it.start()
    fake.says = ("127.0.0.1", unused_tcp_port, 6)
    await until(lambda: not it.connected)
    with pytest.raises(DidNotHappen):
        await it.call("PING")


async def test_a_sentinel_that_missed_the_failover_moves_nobody_back(
    link: tuple[Link, Fake], unused_tcp_port: int
) -> None:
    it, fake = link
    await it.start()
    fake.says = ("127.0.0.1", unused_tcp_port, 4)
    asked = len(fake.asked)
    await until(lambda: len(fake.asked) >= asked + 4)  # two looks, each of two commands
    assert it.connected


async def test_sentinels_that_are_gone_take_no_link_down(link: tuple[Link, Fake]) -> None:
    it, fake = link
    await it.start()
    asked = len(fake.asked)
    fake.raw = b"-ERR gone\r\n"
    await until(lambda: len(fake.asked) >= asked + 4)
    assert it.connected
    assert await it.call("PING") == b"PONG"


async def test_a_primary_counts_as_elected_only_while_most_sentinels_name_it(
    fakes: Any, valkey: Valkey, unused_tcp_port: int
) -> None:
    """A sale is made anew in it without a wait: one sentinel that missed the next failover must not decide that."""
    three = [await fakes(valkey.port, 5) for _ in range(3)]
    places = ",".join(f"127.0.0.1:{fake.port}" for fake in three)
    link = Link(f"redis+sentinel://:{quote(valkey.password)}@{places}/sales", deadline_s=2.0, name="test")
    assert not await link.is_elected("k")  # not connected
    await link.start()
    try:
        assert await link.is_elected("k")
        for fake in three[:2]:
            fake.raw = b"-ERR gone\r\n"
        assert not await link.is_elected("k")  # only one of them speaks
        for fake in three:
            fake.raw, fake.says = None, ("127.0.0.1", unused_tcp_port, 6)
        assert not await link.is_elected("k")  # another is
    finally:
        await link.close()
    alone = Link(valkey.url, name="test")
    await alone.start()
    try:
        assert alone.connected
        assert not await alone.is_elected("k")  # a server of its own: nobody elects
    finally:
        await alone.close()


@pytest.fixture
def unused_tcp_port() -> Iterator[int]:
    with nobody() as port:
        yield port
