"""A Postgres primary with a synchronous streaming replica on this machine, from the same binaries."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
from pathlib import Path
from urllib.parse import quote

import asyncpg
import psutil

from app.embedded import Postgres, make_folder, own
from app.ledger import migrate

STANDBY = "standby1"
REPLICATOR = "replicator"
PROMOTED_WITHIN_S = 30


class Standby(Postgres):
    """A copy of a running primary that follows it, until it is promoted."""

    def __init__(self, home: Path, primary: Postgres) -> None:
        super().__init__(home, primary.password, bin_dir=primary.bin_dir)
        self.primary = primary

    def _make_cluster(self) -> None:
        draft = self.home / "data.new"
        shutil.rmtree(draft, ignore_errors=True)
        at = f"host=127.0.0.1 port={self.primary.port} user={REPLICATOR} password={self.password}"
        self._run_once(
            "pg_basebackup", ["-D", str(draft), "-d", at, "--wal-method=stream", "--checkpoint=fast"]
        )
        with (draft / "postgresql.auto.conf").open("a") as conf:
            conf.write(
                f"primary_conninfo = '{at} application_name={STANDBY}'\nsynchronous_standby_names = ''\n"
            )
        (draft / "standby.signal").touch()
        own(draft, self.account())
        draft.rename(self.data)


class Pair:
    """`url` names both servers, the primary first. Also what tests/chaos/scenario.py wants of its stores."""

    def __init__(self, home: Path) -> None:
        make_folder(home)
        self.home = home
        self.primary = Postgres(home / "primary", secrets.token_urlsafe(12))
        self.standby = Standby(home / "standby", self.primary)

    async def start(self) -> None:
        self.primary.start()
        await self.as_admin(
            self.primary, f"CREATE ROLE {REPLICATOR} REPLICATION LOGIN PASSWORD '{self.primary.password}'"
        )
        self.standby.start()
        await self.as_admin(
            self.primary,
            f"ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 ({STANDBY})'",
            "SELECT pg_reload_conf()",
        )

    @property
    def postgres(self) -> Postgres:
        return self.primary

    def url_of(self, database: str) -> str:
        one = self.primary
        places = ",".join(f"127.0.0.1:{server.port}" for server in (one, self.standby))
        return f"postgresql://{one.role}:{quote(one.password, safe='')}@{places}/{database}"

    @property
    def url(self) -> str:
        return self.url_of(self.primary.database)

    def new_database(self) -> str:
        migrate.upgrade(self.url)
        return self.url

    def drop_database(self, _url: str) -> None:
        """It goes with its servers."""

    async def as_admin(self, server: Postgres, *statements: str) -> list[asyncpg.Record]:
        """Statements of the superuser on one of the two; the rows of the last."""
        password = (self.primary.home / "superuser.password").read_text().strip()
        connection = await asyncpg.connect(
            host="127.0.0.1", port=server.port, user="postgres", password=password, database=server.database
        )
        try:
            for statement in statements:
                rows = await connection.fetch(statement, timeout=PROMOTED_WITHIN_S + 5)
        finally:
            await connection.close()
        return list(rows)

    def signal(self, server: Postgres, sign: signal.Signals) -> None:
        """To the server and all processes that it has started."""
        postmaster = psutil.Process(server.pid)
        for process in (*postmaster.children(recursive=True), postmaster):
            with contextlib.suppress(psutil.NoSuchProcess):  # a session that has just ended
                process.send_signal(sign)

    async def promote(self) -> None:
        """What Patroni or an operator does once the primary is known to be gone."""
        promoted = await self.as_admin(
            self.standby, f"SELECT pg_promote(true, {PROMOTED_WITHIN_S}) AS promoted"
        )
        assert promoted[0]["promoted"]

    def discard(self) -> None:
        """End both; their folders stay."""
        for one in (self.standby, self.primary):
            one.discard()

    def close(self) -> None:
        """End both; nothing in them is needed any more."""
        self.discard()
        shutil.rmtree(self.home)
