"""A Redis Cluster behind the face of one Link: routing, slots that move, nodes that go."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from app.errors import CannotStart, DidNotHappen, Unknown
from app.keys import (
    ADVISOR,
    PROVIDER_ROUTES,
    PROVIDERS,
    SALES,
    SaleKeys,
    breaker_history_key,
    breaker_key,
    sms_limits,
)
from app.redis.cluster import Cluster, key_of, open_link, slot_of
from app.redis.link import Link
from app.scripts import Scripts
from app.work.streams import Streams
from tests.conftest import Stores
from tests.ha.redis_cluster import RedisCluster

NAMES = [f"s{number}" for number in range(60)]


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        ("123456789", 12_739),
        ("{123456789}:x", 12_739),
        ("a{123456789}", 12_739),
        (b"foo", 12_182),
    ],
)
def test_the_slot_of_a_key_is_that_of_the_specification(key: str | bytes, slot: int) -> None:
    """12739 is 0x31C3, the specification's own example of the CRC; `{}` is no tag."""
    assert slot_of(key) == slot


def test_all_keys_of_one_sale_are_in_one_slot_and_so_are_those_of_one_script() -> None:
    keys = SaleKeys("x")
    of_sale = [
        getattr(keys, name) for name in ("sale", "stock", "buyers", "orders", "asks", "status", "contact")
    ]
    of_sale += [make("A") for make in (keys.item, keys.line, keys.outcome, keys.drawn, keys.left)]
    of_sale.append(keys.rate("join", "b"))
    assert len({slot_of(key) for key in of_sale}) == 1
    assert len({slot_of(key) for key in sms_limits("a" * 32)}) == 1
    assert slot_of(breaker_key("p")) == slot_of(breaker_history_key("p"))


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("EVALSHA", "f" * 40, 2, "k1", "k2", "arg"), "k1"),
        (("EVALSHA", "f" * 40, 0, "arg"), None),
        (("XREADGROUP", "GROUP", "g", "c", "COUNT", 5, "BLOCK", 10, "STREAMS", "k1", ">"), "k1"),
        (("XINFO", "GROUPS", "k1"), "k1"),
        (("HGETALL", SALES), SALES),
        (("TIME",), None),
        (("SET", ADVISOR, "x", "NX"), ADVISOR),
        (("HSET", PROVIDERS, "p", "x"), PROVIDERS),
        (("HDEL", PROVIDER_ROUTES, "p"), PROVIDER_ROUTES),
        (("MULTI",), None),
    ],
)
def test_the_key_of_a_command_is_found(command: tuple[str | int, ...], key: str | None) -> None:
    assert key_of(command) == key


@pytest.mark.parametrize("url", ["redis+cluster://h:1,h:x", "redis+cluster://h:1/3"])
def test_a_bad_address_is_one_sentence(url: str) -> None:
    with pytest.raises(CannotStart, match="is not a URL like redis\\+cluster://"):
        open_link(url)


async def test_a_server_that_is_no_cluster_is_refused(redis_url: str) -> None:
    link = open_link(redis_url.replace("redis://", "redis+cluster://", 1).rpartition("/")[0])
    with pytest.raises(CannotStart, match="is not a node of a Redis Cluster"):
        await link.check_server()


@pytest.fixture(scope="module")
def cluster(stores: Stores) -> Iterator[RedisCluster]:
    with RedisCluster(stores.home / "cluster") as cluster:
        stores.keep_processes({node.valkey.pid for node in cluster.nodes})
        yield cluster


@pytest.fixture
async def link(cluster: RedisCluster) -> AsyncIterator[Cluster]:
    cluster.until(cluster.is_whole, "the cluster is whole again")
    for node in cluster.primaries():
        node.ask("FLUSHALL")
    link = open_link(cluster.url, deadline_s=20.0, name="test")
    assert isinstance(link, Cluster)
    await link.start()
    try:
        yield link
    finally:
        await link.close()


async def until(true: Callable[[], object], within_s: float = 180.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def spread(link: Link) -> dict[Link, str]:
    """A sale for each node."""
    found: dict[Link, str] = {}
    for name in NAMES:
        found.setdefault(link.at(SaleKeys(name).sale), name)
    return found


async def test_calls_go_where_their_keys_are_and_a_pipeline_comes_back_in_order(link: Cluster) -> None:
    assert link.connected
    assert link.trouble == ""
    assert "cluster of 3 primaries" in await link.check_server()
    keys = [SaleKeys(name).stock for name in NAMES]
    assert await link.pipeline([("HSET", key, "a", at) for at, key in enumerate(keys)]) == [1] * len(keys)
    clock, *found = await link.pipeline([("TIME",), *[("HGET", key, "a") for key in keys]])
    assert len(clock) == 2
    assert [int(value) for value in found] == list(range(len(keys)))
    assert await link.call("HGET", keys[7], "a") == b"7"
    assert len({link.home_of(key) for key in keys}) == 3


async def test_a_transaction_goes_to_one_node_as_a_whole(link: Cluster) -> None:
    key = SaleKeys("s1").orders
    answers = await link.pipeline([("MULTI",), ("XADD", key, "*", "a", 1), ("XLEN", key), ("EXEC",)])
    assert answers[-1][1] == 1


async def test_a_slot_that_has_moved_is_followed_once_with_the_home_of_its_new_node(
    link: Cluster, cluster: RedisCluster
) -> None:
    """MOVED to a script is replayed; the sale does not take the new node for its home, so nothing is done."""
    scripts = Scripts(link)
    key = SaleKeys("moved").sale
    old_home = link.home_of(key)
    fields = {"epoch": 1, "home": old_home, "pulse": 0, "last_ms": 0, "opens_ms": 0, "closes_ms": 1 << 50}
    await link.call("HSET", key, *[part for pair in fields.items() for part in pair])
    assert await answered(scripts) == "Pulsed"
    source = cluster.primary_of(key)
    target = next(node for node in cluster.primaries() if node is not source)
    cluster.move(slot_of(key), target)
    # Whichever table we have by now: one call, and it reaches the node that has the sale.
    assert await answered(scripts) == "Old"
    assert link.home_of(key) != old_home
    assert await link.call("HGET", key, "home") == old_home.encode()
    assert await link.is_elected(key)
    right = link._slots[slot_of(key)]
    link._slots[slot_of(key)] = link._nodes[
        "127.0.0.1", source.port
    ]  # an old table: most nodes say otherwise
    assert not await link.is_elected(key)
    link._slots[slot_of(key)] = right
    armed = await scripts.sale_rearm(
        sale="moved", epoch=1, old_home=old_home, new_home=link.home_of(key), pulse_at_least=1
    )
    assert type(armed).__name__ == "Armed"
    assert await answered(scripts) == "Pulsed"


async def answered(scripts: Scripts) -> str:
    return type(await scripts.sale_pulse(sale="moved", epoch=1, pulse=1)).__name__


async def test_a_slot_on_its_way_is_asked_for_at_its_new_node(link: Cluster, cluster: RedisCluster) -> None:
    key = SaleKeys("half").stock
    slot = slot_of(key)
    source = cluster.primary_of(key)
    target = next(node for node in cluster.primaries() if node is not source)
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
    try:
        assert await link.call("HSET", key, "a", 1) == 1  # not there yet: made where it will be (ASK)
        assert await link.call("HGET", key, "a") == b"1"
        assert await link.pipeline([("HGET", key, "a"), ("HLEN", key)]) == [b"1", 1]
        assert target.ask("CLUSTER", "COUNTKEYSINSLOT", slot) == 1
    finally:
        for node in (target, source, *cluster.primaries()):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", target.id)


async def test_while_a_node_is_away_the_others_serve_and_its_replica_is_found(
    link: Cluster, cluster: RedisCluster, stores: Stores
) -> None:
    sales = spread(link)
    assert len(sales) == 3
    victim = cluster.primary_of(SaleKeys("s0").sale)
    lost = link.at(SaleKeys("s0").sale)
    mine = {name: SaleKeys(name).stock for name in sales.values()}
    away = SaleKeys(sales[lost]).stock
    victim.valkey.process.send_signal(signal.SIGKILL)  # type: ignore[union-attr]
    await until(lambda: not lost.connected)
    answers = dict(zip(mine, await link.pipeline([("HLEN", key) for key in mine.values()]), strict=True))
    assert {name for name, answer in answers.items() if isinstance(answer, Exception)} == {sales[lost]}
    assert link.connected
    assert str(victim.port) in link.trouble
    with pytest.raises((DidNotHappen, Unknown)):
        await link.call("HSET", away, "a", 1)
    await until(lambda: link.at(away) is not lost and link.at(away).connected)
    assert link.trouble == ""
    assert await link.call("HSET", away, "a", 1) == 1
    victim.valkey.kill()
    victim.valkey.start()  # comes back as a replica
    stores.keep_processes({victim.valkey.pid})


async def test_streams_of_sales_in_different_slots_are_read(link: Cluster) -> None:
    """Two sales' streams in one command are CROSSSLOT, also on one node."""
    for name in NAMES[:6]:
        await link.call("XGROUP", "CREATE", SaleKeys(name).orders, "workers", "0", "MKSTREAM")
    streams = Streams(link, "me", lambda name: SaleKeys(name).orders)
    assert await streams.read(NAMES[:6], 10) == {}
    for name in NAMES[:3]:
        asked = asyncio.create_task(streams.read(NAMES[:6], 10, block_ms=5_000))
        await asyncio.sleep(0)
        await link.call("XADD", SaleKeys(name).orders, "*", "n", name)
        assert list(await asked) == [name]
    pending = await streams.own_pending(NAMES[:6], 100)
    assert [name for name, entries in pending.items() if entries] == NAMES[:3]
    assert "lost" not in await streams.read([*NAMES[:6], "lost"], 10)
    assert (
        await streams.read(["lost too"], 10) == {}
    )  # all there are: as on a single server, no trouble of Redis'


async def test_a_single_server_says_which_link_and_home_are_its_own(redis_url: str) -> None:
    link = open_link(redis_url)
    assert type(link) is Link
    await link.start()
    try:
        assert link.at("x") is link
        assert link.home_of("x") == link.run_id != ""
    finally:
        await link.close()
