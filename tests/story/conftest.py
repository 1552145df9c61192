"""One running `fairdrop up` for all stories of a pytest process; every story holds a sale of its own.

FAIRDROP_TEST_REDIS_URL lets them play on another Redis than the embedded one: `python -m tests.ha.stories` plays them
on a Cluster.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from app.demo.servers import Servers, Urls
from tests.story.people import Buyer, Operator


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    folder: Path = tmp_path_factory.mktemp("story-up")
    if os.geteuid() == 0:
        # The stores run as another account and must pass through.
        for path in (folder, folder.parent, folder.parent.parent):
            path.chmod(0o711)
    hurried = {"FAIRDROP_EXPIRE_EVERY_MS": "100", "FAIRDROP_POLL_MAX_MS": "1000", "FAIRDROP_DRAIN_S": "0"}
    # Two fronts and a hundred phones share two processors with other tests: a busy machine turns nobody away here.
    hurried |= {
        "FAIRDROP_OVERLOAD_WAIT_MAX_MS": "0", "FAIRDROP_JOIN_WAIT_MAX_MS": "60000",
        "FAIRDROP_REDIS_DEADLINE_S": "30", "FAIRDROP_KEEP_ALIVE_S": "600",
    }  # fmt: skip
    if url := os.environ.get("FAIRDROP_TEST_REDIS_URL"):
        hurried["FAIRDROP_REDIS_URL"] = url
    servers = Servers(folder, front_workers=2, environment=hurried)
    try:
        yield asyncio.run(servers.start())
    finally:
        servers.stop()


@dataclass
class Town:
    """Where the story takes place: one shop with its operator, and buyers who come and go."""

    urls: Urls
    operator: Operator
    clients: list[httpx.AsyncClient]

    def buyer(self, name: str, sale: str) -> Buyer:
        buyer = Buyer(self.urls.front, name, sale)
        self.clients.append(buyer.http)
        return buyer


@pytest.fixture
async def town(running: Urls) -> AsyncIterator[Town]:
    operator = Operator(running.front, running.office, running.operator_key)
    clients = [operator.http]
    yield Town(running, operator, clients)
    for client in clients:
        await client.aclose()
