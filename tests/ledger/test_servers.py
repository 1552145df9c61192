"""Several servers in one address: the one that answers and takes writes is found. Replicas: tests/ha."""

from __future__ import annotations

import socket
import time
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from sqlalchemy import text

from app.errors import CannotStart
from app.ledger import engine as engines
from app.ledger import migrate
from app.ledger.engine import driver_url
from app.ledger.servers import NEXT_AFTER_S, Session
from app.settings import Settings
from tests.sockets import nobody


def among(database_url: str, *others: int) -> str:
    """The same database, named after servers on these ports."""
    parts = urlsplit(database_url)
    userinfo, _, last = parts.netloc.rpartition("@")
    places = ",".join([*(f"127.0.0.1:{port}" for port in others), last])
    return parts._replace(netloc=f"{userinfo}@{places}").geturl()


async def one(url: str) -> int:
    engine = engines.create_engine(Settings(database_url=url), pool=1)
    try:
        async with engine.connect() as conn:
            return int((await conn.execute(text("SELECT 1"))).scalar_one())
    finally:
        await engine.dispose()


async def test_a_server_that_is_gone_is_passed_over(database_url: str) -> None:
    with nobody() as port:
        assert await one(among(database_url, port)) == 1


async def test_a_server_that_is_silent_is_not_waited_for(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine is gone, or the network: nothing refuses."""
    monkeypatch.setattr(engines, "CONNECT_WITHIN_S", 60.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert await one(among(database_url, silent.getsockname()[1])) == 1
        assert time.monotonic() - began < engines.CONNECT_WITHIN_S - NEXT_AFTER_S


async def test_servers_none_of_which_takes_writes_are_an_outage(database_url: str) -> None:
    """In the middle of a failover: to take it for a claim that no statement can hold buried the claim."""
    database = urlsplit(database_url).path.removeprefix("/")
    with nobody() as port:
        assert await one(among(database_url, port)) == 1
        admin = await asyncpg.connect(database_url)
        await admin.execute(f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
        try:
            with pytest.raises(Exception, match="None of the hosts match") as told:
                await one(among(database_url, port))
        finally:
            await admin.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE")
            await admin.execute(f'ALTER DATABASE "{database}" RESET default_transaction_read_only')
            await admin.close()
    assert engines.passes(told.value)


async def test_why_no_server_will_do_is_told(database_url: str) -> None:
    with nobody() as port:
        wrong = among(database_url, port).replace(urlsplit(database_url).password or "", "wrong")
        with pytest.raises(Exception, match="password authentication failed"):
            await one(wrong)


def test_migrations_find_it_too(database_url: str) -> None:
    with nobody() as port:
        assert migrate.pending(among(database_url, port)) == []


def test_several_servers_are_read_in_full() -> None:
    url = driver_url("postgresql://we:a%40b@h1,h2:5433/shop?sslmode=require")
    _, options = url.get_dialect()().create_connect_args(url)
    assert options == {
        "host": ["h1", "h2"], "port": [5432, 5433], "user": "we", "password": "a@b", "database": "shop",
        "ssl": "require", "target_session_attrs": "read-write",
    }  # fmt: skip


def test_an_address_that_is_none_is_one_clear_sentence() -> None:
    with pytest.raises(CannotStart, match="FAIRDROP_DATABASE_URL must look like"):
        driver_url("postgresql://a:b@h1:x:y/shop")


async def test_a_server_that_falls_silent_behind_its_greeting_is_a_timeout(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut network: whoever asks tries again later; nothing is said about a standby that nobody knows of."""

    async def silent(*_: Any, **__: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(Session, "fetchval", silent)
    with pytest.raises(TimeoutError):
        await one(database_url)


@pytest.mark.parametrize("how", ["begin", "by_hand"])
@pytest.mark.parametrize("lost", ["BEGIN", "ROLLBACK"])
async def test_what_is_committed_after_a_lost_answer_is_committed(
    database_url: str, monkeypatch: pytest.MonkeyPatch, how: str, lost: str
) -> None:
    """The server did begin, or did not hear of the end: a campaign's cut networks. The next one to take the connection
    from the pool would write into a transaction that nobody ends, and buyers would be told of it."""
    real = asyncpg.Connection.execute
    losses = [lost]

    async def execute(self: Any, query: str, *args: Any, **more: Any) -> Any:
        if losses and query.startswith(losses[0]):
            losses.clear()
            if lost == "BEGIN":
                await real(self, query, *args, **more)
            raise TimeoutError
        return await real(self, query, *args, **more)

    engine = engines.create_engine(Settings(database_url=database_url), pool=1)
    async with engines.alone(engine) as conn:
        await engines.ping(conn)  # what SQLAlchemy asks of a new server goes before
    monkeypatch.setattr(asyncpg.Connection, "execute", execute)
    whole: Any = engine.begin if how == "begin" else lambda: engines.by_hand(engine)
    write = text(
        "INSERT INTO dead_letter (sale, stream, entry_id, entry, reason) VALUES ('s', :a, 'e', '{}', 'r')"
    )
    try:
        with pytest.raises((TimeoutError, ZeroDivisionError)):
            async with whole() as conn:
                await conn.execute(write, {"a": "lost"})
                raise ZeroDivisionError
        assert not losses
        async with whole() as conn:
            await conn.execute(write, {"a": "kept"})
        async with engines.alone(engine) as conn:
            await conn.execute(write, {"a": "alone"})
        other = engines.create_engine(Settings(database_url=database_url), pool=1)
        async with other.connect() as conn:
            rows = await conn.execute(text("SELECT stream FROM dead_letter ORDER BY stream"))
            assert list(rows.scalars()) == ["alone", "kept"]
        await other.dispose()
    finally:
        await engine.dispose()
