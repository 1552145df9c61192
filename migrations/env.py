"""For the `alembic` command of a developer (`alembic revision --autogenerate`); `fairdrop migrate` does not need it.

FAIRDROP_DATABASE_URL says which database to compare with.
"""

from __future__ import annotations

import asyncio
import os

from alembic import context
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from app.ledger.engine import driver_url
from app.ledger.tables import metadata


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()


async def main() -> None:
    engine = create_async_engine(driver_url(os.environ["FAIRDROP_DATABASE_URL"]))
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()


asyncio.run(main())
