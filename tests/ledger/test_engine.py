from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.ledger import engine as engines
from app.settings import Settings


@pytest.fixture
async def engine(database_url: str) -> Any:
    engine = engines.create_engine(Settings(database_url=database_url), pool=1)
    yield engine
    await engine.dispose()


async def _backend(engine: Any) -> int:
    async with engine.connect() as conn:
        return int((await conn.execute(text("SELECT pg_backend_pid()"))).scalar_one())


async def test_a_connection_that_died_while_idle_is_replaced_before_it_is_used(
    engine: Any, database_url: str
) -> None:
    first = await _backend(engine)
    other = engines.create_engine(Settings(database_url=database_url), pool=1)
    async with other.connect() as conn:
        await conn.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": first})
    await other.dispose()
    assert await _backend(engine) != first


async def test_a_look_at_rest_costs_one_round_trip(engine: Any) -> None:
    """Workers look many times a second: BEGIN, COMMIT and a ping before each look were most of an idle worker's CPU."""
    said: list[str] = []  # asyncpg tells of all but prepared statements: of what surrounds the SELECT
    async with engines.alone(engine) as conn:
        wire = (await conn.get_raw_connection()).driver_connection
        wire.add_query_logger(lambda record: said.append(record.query))
        await conn.execute(text("SELECT 1"))
    said.clear()
    async with engines.alone(engine) as conn:
        await conn.execute(text("SELECT 1"))
    assert said == []


async def test_a_statement_alone_is_committed(engine: Any, database_url: str) -> None:
    async with engines.alone(engine) as conn:
        await conn.execute(text("CREATE TABLE kept AS SELECT 1 AS one"))
    other = engines.create_engine(Settings(database_url=database_url), pool=1)
    async with other.connect() as conn:
        assert (await conn.execute(text("SELECT one FROM kept"))).scalar_one() == 1
    await other.dispose()
    async with engine.connect() as conn:  # the connection is an ordinary one again
        assert not (await conn.get_raw_connection()).dbapi_connection.autocommit


async def test_the_text_of_an_error_holds_no_value_of_a_statement(engine: Any) -> None:
    """It is logged, and values are buyers."""
    with pytest.raises(DBAPIError) as told:
        async with engine.begin() as conn:
            await conn.execute(text("SELECT 1 FROM nothing_here WHERE buyer = :buyer"), {"buyer": "ann-4711"})
    assert "nothing_here" in str(told.value)
    assert "ann-4711" not in str(told.value)
