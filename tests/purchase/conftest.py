from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.ledger.shop import Shop, open_shop
from tests.providers.server import Shop as Sandbox
from tests.providers.server import sandbox
from tests.purchase.money import Money, money


@pytest.fixture
async def shop(redis_url: str, database_url: str) -> AsyncIterator[Shop]:
    """Real stores and no sale yet: `await shop.publish(units)`."""
    async with open_shop(redis_url, database_url) as shop:
        yield shop


@pytest.fixture
async def supplier() -> AsyncIterator[Sandbox]:
    """A sandbox supplier of its own."""
    async with sandbox() as supplier:
        yield supplier


@pytest.fixture
async def till(
    request: pytest.FixtureRequest, supplier: Sandbox, redis_url: str, database_url: str
) -> AsyncIterator[Money]:
    """Real stores, this supplier, and a sale of five units. `@hasty` gives a supplier's call one second."""
    async with money(supplier, redis_url, database_url, **getattr(request, "param", {})) as till:
        await till.publish()
        yield till
