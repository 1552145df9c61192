"""The migrations and tables.py describe the same database, constraint by constraint."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from app.errors import CannotStart
from app.ledger import migrate
from app.ledger.engine import driver_url
from app.ledger.tables import metadata

CATALOGUE = """
SELECT 'column ' || c.relname || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
  || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END || ' ' || a.attidentity::text
  || coalesce(' default ' || pg_get_expr(d.adbin, d.adrelid), '') AS what
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE n.nspname = 'public' AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
  AND c.relname <> 'alembic_version'
UNION ALL
SELECT 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(k.oid)
FROM pg_constraint k JOIN pg_namespace n ON n.oid = k.connamespace
WHERE n.nspname = 'public' AND conrelid::regclass::text <> 'alembic_version'
UNION ALL
SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'
ORDER BY 1
"""


async def catalogue(url: str) -> list[str]:
    connection = await asyncpg.connect(url)
    try:
        return [row["what"] for row in await connection.fetch(CATALOGUE)]
    finally:
        await connection.close()


async def test_the_migrated_schema_is_that_of_tables_py(database_url: str, empty_database_url: str) -> None:
    engine = create_async_engine(driver_url(empty_database_url))
    async with engine.begin() as conn:
        await conn.run_sync(metadata.create_all)
    await engine.dispose()
    migrated, described = await catalogue(database_url), await catalogue(empty_database_url)
    assert [line for line in migrated if line not in described] == []
    assert [line for line in described if line not in migrated] == []


def test_an_empty_database_lacks_every_migration_and_an_upgraded_one_none(empty_database_url: str) -> None:
    assert migrate.pending(empty_database_url)[0].startswith("0001: ")
    migrate.upgrade(empty_database_url)
    assert migrate.pending(empty_database_url) == []
    migrate.upgrade(empty_database_url)  # again: nothing to do
    assert migrate.pending(empty_database_url) == []


async def test_upgrading_inside_a_running_loop_works_too(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url)
    assert migrate.pending(empty_database_url) == []


async def test_upgrades_at_once_make_one_schema(empty_database_url: str) -> None:
    await asyncio.gather(*(asyncio.to_thread(migrate.upgrade, empty_database_url) for _ in range(3)))
    assert migrate.pending(empty_database_url) == []


async def test_a_database_of_a_newer_release_is_refused_in_one_sentence(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE alembic_version SET version_num = 'of-tomorrow'")
    await connection.close()
    with pytest.raises(CannotStart, match="of-tomorrow"):
        migrate.upgrade(database_url)
    with pytest.raises(CannotStart, match="newer fairdrop"):
        migrate.pending(database_url)


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(CannotStart, match="cannot reach Postgres"):
        migrate.upgrade("postgresql://nobody:x@127.0.0.1:9/none")


@pytest.mark.parametrize("url", ["", "mysql://x", "postgresql://", "postgresql://u:p@h:port/x"])
def test_a_wrong_url_is_one_sentence(url: str) -> None:
    with pytest.raises(CannotStart, match="FAIRDROP_DATABASE_URL"):
        migrate.upgrade(url)
