"""One fork server for all failovers and restarts of a pytest process; stores with their replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.chaos.conftest import zygote
from tests.conftest import Stores
from tests.ha.postgres_pair import Pair

__all__ = ["zygote"]


@pytest.fixture
async def pair(stores: Stores) -> AsyncIterator[Pair]:
    pair = Pair(stores.home / "pair")
    try:
        await pair.start()
        yield pair
    finally:
        pair.close()
