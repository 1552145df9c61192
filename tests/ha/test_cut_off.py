"""A primary of Redis that is cut off from its replicas stops taking joins, which a failover would lose."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from signal import SIGCONT, SIGSTOP

import pytest

from app.answers import Gone
from app.redis.link import Link, Rejected
from app.scripts import Scripts
from tests.conftest import Stores
from tests.ha.redis_watched import REPLICA_LAG_MAX_S, Watched

WITHIN_S = REPLICA_LAG_MAX_S + 20.0


@pytest.fixture
def watched(stores: Stores) -> Iterator[Watched]:
    watched = Watched(stores.home / "watched")
    try:
        watched.start()
        yield watched
    finally:
        watched.close()


@pytest.mark.long  # the replicas must be silent for REPLICA_LAG_MAX_S
async def test_a_primary_without_its_replicas_takes_no_joins_until_one_is_back(watched: Watched) -> None:
    link = Link(watched.url, deadline_s=5.0, name="test")
    await link.start()
    scripts = Scripts(link)
    replicas = watched.servers[1:]

    async def until(refused: bool) -> None:
        async with asyncio.timeout(WITHIN_S):
            while True:
                try:
                    assert await scripts.sale_pulse(sale="none", epoch=1, pulse=1) == Gone()
                    now = False
                except Rejected as error:
                    now = error.code == "NOREPLICAS"
                if now is refused:
                    return
                await asyncio.sleep(0.05)

    try:
        await until(refused=False)
        for one in replicas:
            os.kill(one.pid, SIGSTOP)
        await until(refused=True)
        assert link.connected  # it is the same server, and reads go on
        assert await link.call("PING") == b"PONG"
        os.kill(replicas[0].pid, SIGCONT)
        await until(refused=False)
    finally:
        for one in replicas:
            os.kill(one.pid, SIGCONT)
        await link.close()
