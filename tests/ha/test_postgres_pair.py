"""A primary and its synchronous standby: what was shown is never lost, and the server that takes writes is found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.ledger import engine as engines
from app.ledger.servers import StandbyAway
from app.settings import Settings
from tests.ha.postgres_pair import Pair

DEADLINE_S = 1.5
WITHIN_S = 60.0


@pytest.fixture
async def database(pair: Pair) -> AsyncIterator[AsyncEngine]:
    engine = engines.create_engine(Settings(database_url=pair.url, database_deadline_s=DEADLINE_S))
    await put(engine, "CREATE TABLE seen (n int PRIMARY KEY)")
    yield engine
    await engine.dispose()


async def put(engine: AsyncEngine, statement: str) -> None:
    async with engine.begin() as conn:
        await conn.execute(text(statement))


async def test_nothing_is_shown_that_the_standby_lacks_and_the_standby_takes_over(
    pair: Pair, database: AsyncEngine
) -> None:
    """One long test: each pair of servers takes seconds to start."""
    await until_ready(database)
    assert await ready(database) == "FIRST 1 (standby1)"

    # The standby is gone: the COMMIT is not answered in time. A cancelled one would be there for all to see.
    pair.standby.kill()
    with pytest.raises(TimeoutError):
        await put(database, "INSERT INTO seen VALUES (1)")
    assert not await pair.as_admin(pair.primary, "SELECT * FROM seen")
    with pytest.raises(StandbyAway, match=r"no synchronous standby of `FIRST 1 \(standby1\)` answers"):
        await ready(database)

    # The primary restarts and shows by itself what its standby lacks: not to us.
    pair.primary.restart(crash=True)
    assert await pair.as_admin(pair.primary, "SELECT * FROM seen")
    with pytest.raises(StandbyAway):
        await ready(database)
    pair.standby.start()
    await until_ready(database)

    # The primary dies, the standby is promoted, and the old primary comes back: nobody goes there.
    await put(database, "INSERT INTO seen VALUES (2)")
    pair.primary.kill()
    await pair.promote()
    await until_ready(database)
    await put(database, "INSERT INTO seen VALUES (3)")
    pair.primary.start()
    await database.dispose()
    for _ in range(3):
        async with database.connect() as conn:
            found = list((await conn.execute(text("SELECT n FROM seen ORDER BY n"))).scalars())
            assert found == [1, 2, 3]
            await conn.invalidate()
    assert await ready(database) == "local"


async def ready(engine: AsyncEngine) -> str:
    async with engine.connect() as conn:
        return await engines.durability(conn)


async def until_ready(engine: AsyncEngine) -> None:
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                await ready(engine)
                return
            except Exception as error:
                if not engines.passes(error):
                    raise
            await asyncio.sleep(0.05)
