"""Brings the tables of a database up to this release. Migrations only expand: release N−1 runs on them too.

`upgrade` and `pending` are plain functions: call them from a process that has no event loop, or from a thread
(`asyncio.to_thread`). Each opens one connection and closes it; two at once wait for each other (an advisory lock).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.errors import CannotStart
from app.ledger import engine as engines
from app.ledger.tables import metadata
from app.resources import migrations_dir

LOCK = 0x46414952  # "FAIR": the advisory lock that lets one migration run at a time
WITHIN_S = 300.0  # a migration of a large table takes its time; one that waits for ever helps nobody

T = TypeVar("T")


def _scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(migrations_dir()))
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


def upgrade(database_url: str) -> None:
    """Run every migration that this database lacks, all in one transaction: after a crash it has none of them.

    CannotStart: the server cannot be reached, is too old, or its tables belong to a newer release.
    """
    scripts = _scripts()

    def work(connection: Connection) -> None:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        _refuse_unknown(connection, scripts)
        environment = EnvironmentContext(
            Config(),
            scripts,
            fn=lambda revision, _: scripts._upgrade_revs("head", revision),
        )
        with environment:
            environment.configure(
                connection=connection, target_metadata=metadata, transaction_per_migration=False
            )
            environment.run_migrations()

    _with_connection(database_url, work)


def pending(database_url: str) -> list[str]:
    """The migrations that this database lacks, oldest first, as `id: what it does`; empty: it is up to date."""
    scripts = _scripts()

    def work(connection: Connection) -> list[str]:
        current = _refuse_unknown(connection, scripts)
        missing = list(scripts.iterate_revisions("head", current or "base"))
        return [
            f"{found.revision}: {(found.doc or '').strip()}"
            for found in reversed(missing)
            if found.revision != current
        ]

    return _with_connection(database_url, work)


def _refuse_unknown(connection: Connection, scripts: ScriptDirectory) -> str | None:
    """The revision that the database has. CannotStart: this release does not know it."""
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None:
        try:
            scripts.get_revision(current)
        except CommandError as error:
            raise CannotStart(
                f"the database has migration {current}, which this release does not know: a newer fairdrop made it"
            ) from error
    return current


def _with_connection(database_url: str, work: Callable[[Connection], T]) -> T:
    """Run `work` in one transaction, on an event loop of its own; in a thread if this one already runs a loop."""

    async def run() -> T:
        engine = create_async_engine(
            engines.driver_url(database_url),
            poolclass=NullPool,
            connect_args={"timeout": engines.CONNECT_WITHIN_S, "command_timeout": WITHIN_S},
        )
        try:
            async with asyncio.timeout(WITHIN_S), engine.begin() as conn:
                await engines.check_server(conn)
                return await conn.run_sync(work)
        except (OSError, TimeoutError) as error:
            raise CannotStart(f"cannot reach Postgres: {error or 'no answer'}") from error
        except DBAPIError as error:
            raise CannotStart(f"Postgres refused: {error.orig}") from error
        finally:
            await engine.dispose()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="migrate") as pool:
        return pool.submit(lambda: asyncio.run(run())).result()
