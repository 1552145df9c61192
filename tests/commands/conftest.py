"""What the commands are tried against: a running office."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.office.conftest import Office, open_office, settings_for


@pytest.fixture
async def office(redis_url: str, database_url: str) -> AsyncIterator[Office]:
    running = await open_office(settings_for(redis_url, database_url))
    try:
        yield running
    finally:
        await running.close()
