"""One pool of connections to Postgres a process. `reserved` is told after COMMIT, so every session commits durably."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    InternalError,
    InvalidatePoolError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from app.errors import CannotStart
from app.ledger.servers import MARK, Servers, StandbyAway
from app.settings import Settings

STANDBY_WITHIN_S = 0.7  # shorter than the patience of the probes that ask
CONNECT_WITHIN_S = 5.0  # a healthy server answers in milliseconds; longer means that it is not there
POOL_WAIT_S = 5.0  # a caller that finds every connection busy is told so, instead of piling up
POSTGRES_LEAST = 15
# Who hung up or vanished in a transaction must not hold its rows: ours wait for Redis at most, never for a supplier.
IDLE_IN_TRANSACTION_MS = 20_000
ADDRESS_LIKE = (
    "FAIRDROP_DATABASE_URL must look like postgresql://user:password@host:port/name"
    " or postgresql://user:password@host:port,host:port/name"
)


def driver_url(database_url: str) -> URL:
    """`postgresql://…` as people and `urls.json` write it → what SQLAlchemy hands to asyncpg.

    libpq's `sslmode` becomes asyncpg's `ssl`; other parameters pass. Of several servers (`@host:port,host:port/`) the
    one that takes writes is meant. CannotStart: not a Postgres address.
    """
    if not database_url:
        raise CannotStart("FAIRDROP_DATABASE_URL is missing")
    scheme, rest = database_url.partition("://")[::2]
    if scheme not in ("postgres", "postgresql", "postgresql+asyncpg") or not rest:
        raise CannotStart(ADDRESS_LIKE)
    parts = urlsplit(f"postgresql+asyncpg://{rest}")
    query = [("ssl" if name == "sslmode" else name, value) for name, value in parse_qsl(parts.query)]
    userinfo, at, hosts = parts.netloc.rpartition("@")
    if "," in hosts:
        parts = parts._replace(netloc=userinfo + at)
        query += [
            ("host", host if host.rpartition(":")[2].isdigit() else f"{host}:5432")
            for host in hosts.split(",")
        ]
        if "target_session_attrs" not in dict(query):
            query.append(("target_session_attrs", "read-write"))
    try:
        return make_url(urlunsplit(parts._replace(query=urlencode(query))))
    except (ArgumentError, ValueError) as error:
        raise CannotStart(ADDRESS_LIKE) from error


# For one statement that is planned once, perhaps while its tables are empty, and runs ten times a second ever after.
INDEXES_ONLY = {"enable_seqscan": "off", "jit": "off"}


def create_engine(
    settings: Settings,
    *,
    name: str = "fairdrop",
    pool: int | None = None,
    planner: Mapping[str, str] = MappingProxyType({}),
) -> AsyncEngine:
    """An engine with at most `pool` (default `database_pool`) connections; nothing is connected yet.

    Every statement has `database_deadline_s`, on both sides: the server gives up too, so that a worker which
    vanished cannot hold rows. A connection that died while idle is replaced before it is used.
    """
    size = pool or settings.database_pool
    return _engine(
        driver_url(settings.database_url),
        size=size,
        deadline_s=settings.database_deadline_s,
        server_settings={"application_name": name, **planner},
    )


def _engine(url: URL, *, size: int, deadline_s: float, server_settings: Mapping[str, str]) -> AsyncEngine:
    servers = Servers(
        url,
        within_s=CONNECT_WITHIN_S,
        deadline_s=deadline_s,
        server_settings={
            "statement_timeout": str(int(deadline_s * 1000)),
            "lock_timeout": str(int(deadline_s * 1000)),
            "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
            "synchronous_commit": "on",
            "timezone": "UTC",
            **server_settings,
        },
    )
    engine = create_async_engine(
        url,
        pool_size=size,
        max_overflow=0,
        pool_timeout=POOL_WAIT_S,
        pool_recycle=1800,
        hide_parameters=True,  # buyers' ids, amounts and seals never stand in the text of an error, which is logged
        async_creator=servers.connect,
    )
    event.listen(engine.sync_engine, "checkout", _refuse_unusable)
    return engine


def _refuse_unusable(connection: Any, _record: object, _proxy: object) -> None:
    """Have the pool replace a connection whose other end is gone, or that somebody left in a transaction.

    asyncpg has been told both, so looking is free; SQLAlchemy's pre-ping costs three round trips, which was half of
    what an idle worker did.
    """
    session = connection.driver_connection
    if session.is_closed() or session.is_in_transaction():
        raise DisconnectionError("this connection was closed, or left in a transaction, while it was idle")


@asynccontextmanager
async def alone(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection on which each statement is a transaction of its own: one round trip instead of three.

    For looks and leases that are one statement; whatever must commit together takes `engine.begin()`.
    """
    async with engine.connect() as conn:
        yield await conn.execution_options(isolation_level="AUTOCOMMIT")


@asynccontextmanager
async def by_hand(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction that the driver begins and commits itself: its own statements (`driver`) run in it, and so do
    SQLAlchemy's. For the few that are so hot that what SQLAlchemy does around each, a fifth of a millisecond, shows.
    """
    async with alone(engine) as conn, (await driver(conn)).transaction():
        yield conn


async def driver(conn: AsyncConnection) -> Any:
    """asyncpg's own connection below this one (it has no type information)."""
    raw = (await conn.get_raw_connection()).driver_connection
    assert raw is not None  # a connection that is checked out has one
    return raw


async def ping(conn: AsyncConnection) -> None:
    """One round trip; raises what is wrong."""
    await conn.execute(text("SELECT 1"))


async def check_server(conn: AsyncConnection) -> str:
    """The server's version, as a word for people. CannotStart: it is too old."""
    number = int((await conn.execute(text("SHOW server_version_num"))).scalar_one())
    if number // 10_000 < POSTGRES_LEAST:
        raise CannotStart(f"Postgres {POSTGRES_LEAST} or newer is needed; this one is {number // 10_000}")
    return f"Postgres {number // 10_000}.{number % 10_000}"


async def durability(conn: AsyncConnection) -> str:
    """What a failover of Postgres keeps: "local" (this server's disk) or the names of synchronous standbys.

    StandbyAway: there are names, and nobody of them answers now. Ends the transaction.
    """
    names = str((await conn.execute(text("SHOW synchronous_standby_names"))).scalar_one())
    if names:
        try:
            async with asyncio.timeout(STANDBY_WITHIN_S):
                await conn.execute(text(MARK))
                await conn.commit()
        except TimeoutError:
            raise StandbyAway(names) from None
    return names or "local"


def sqlstate_of(error: BaseException) -> str | None:
    """Postgres' five-letter word for what went wrong, also behind SQLAlchemy's wrapping; None: not Postgres' answer."""
    for found in (
        error,
        getattr(error, "orig", None),
        getattr(getattr(error, "orig", None), "__cause__", None),
    ):
        state = getattr(found, "sqlstate", None)
        if isinstance(state, str):
            return state
    return None


def passes(error: BaseException) -> bool:
    """Whether the same statements may succeed later: no server, no connection, a deadlock, a deadline.

    After a lost connection the transaction may have been committed: repeat only what looks first.
    """
    state = sqlstate_of(error)
    if state is not None:
        # 08 connection, 40 rollback (deadlock, serialization), 53 resources, 55P03 lock deadline, 57 intervention,
        # 58 system, 25P03/25006 session ended or read-only: none says anything about the rows.
        return state[:2] in ("08", "25", "40", "53", "57", "58") or state == "55P03"
    inner = getattr(error, "orig", None)
    if isinstance(error, asyncpg.DataError) or isinstance(inner, asyncpg.DataError):
        return False  # the client could not encode a value; by class it is an InterfaceError too
    # InternalError without a word of Postgres is asyncpg's own: no server took writes, in the middle of a failover.
    return isinstance(
        error,
        (
            OSError,
            TimeoutError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
            PoolTimeout,
            InvalidatePoolError,
        ),
    ) or (
        isinstance(error, DBAPIError)
        and (
            error.connection_invalidated
            or isinstance(error, (InterfaceError, InternalError, OperationalError))
        )
    )
