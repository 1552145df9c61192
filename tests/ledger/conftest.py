from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.ledger.shop import Shop, open_shop


@pytest.fixture
async def shop(redis_url: str, database_url: str) -> AsyncIterator[Shop]:
    """Real stores and no sale yet: `await shop.publish(units)`."""
    async with open_shop(redis_url, database_url) as shop:
        yield shop
