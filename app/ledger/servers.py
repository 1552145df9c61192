"""Connecting to Postgres: whichever of several servers takes writes, and none that shows more than its standby has.

`synchronous_standby_names` promises that a COMMIT is answered only once a standby has it. Two things would break that
promise behind our back, and both are kept away here:

- A COMMIT whose wait is cancelled *is* committed on the primary alone, and everybody sees its rows. asyncpg cancels
  what passes its deadline or whose task is cancelled. A `Session` hangs up instead: the server then waits on, unseen.
- A primary that comes back shows what it had committed by itself. So a new connection is handed out only when a commit
  of its own has reached a standby, and with it all that was written before. The primary of before a failover never
  gets there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any

import asyncpg
from sqlalchemy.engine import URL

NEXT_AFTER_S = (
    0.5  # a server that has not answered by then is not waited for alone: the next one is tried beside it
)
CANCEL_NEVER_S = 3_600.0  # beyond every deadline of ours
# Written to the log and read by nobody; the smallest transaction whose COMMIT waits for a standby.
MARK = "SELECT pg_logical_emit_message(true, 'fairdrop', '')"


class StandbyAway(ConnectionError):
    """The server takes writes and its synchronous standby does not answer: a COMMIT would not come back."""

    def __init__(self, names: str) -> None:
        super().__init__(f"no synchronous standby of `{names}` answers: nothing can be committed")


# How the statements begin that asyncpg itself makes of a transaction.
_OF_TRANSACTIONS = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE")


class Session(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection that hangs up where nobody knows any more in which transaction it is.

    A BEGIN without an answer may have happened. asyncpg then believes that the connection is in a transaction, and
    SQLAlchemy puts it back into its pool: whoever took it next "committed" savepoints of what nobody ends.
    """

    standbys = ""  # its server's synchronous_standby_names
    commit_within_s = 15.0

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        if not query.startswith(_OF_TRANSACTIONS):
            return str(await super().execute(query, *args, timeout=timeout))
        try:
            if query == "COMMIT;" and self.standbys:
                return await self._commit()
            return str(await super().execute(query, *args, timeout=timeout))
        except asyncpg.PostgresError:
            if query.startswith("BEGIN"):  # the server is in no transaction, asyncpg believes that it is
                self.terminate()
            raise
        except BaseException:
            self.terminate()
            raise

    async def _commit(self) -> str:
        """Hangs up on a COMMIT without an answer, instead of cancelling it."""
        commit = asyncio.ensure_future(super().execute("COMMIT;", timeout=CANCEL_NEVER_S))
        try:
            answered, _ = await asyncio.wait([commit], timeout=self.commit_within_s)
        finally:
            if not commit.done():
                commit.add_done_callback(_ended)
                self.terminate()
        if not answered:
            raise TimeoutError("COMMIT was not answered: it may have happened")
        return str(commit.result())


def _ended(commit: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more; look, so that asyncio does not complain."""
    if not commit.cancelled():
        commit.exception()


class Servers:
    """The servers that one address names. The one that took writes last is asked first."""

    def __init__(
        self, url: URL, *, within_s: float, deadline_s: float, server_settings: Mapping[str, str]
    ) -> None:
        """within_s: of one attempt to connect. deadline_s: of every statement."""
        _, options = url.get_dialect()().create_connect_args(url)
        hosts, ports = options.pop("host", None), options.pop("port", None)
        if isinstance(hosts, list):
            self.places = list(zip(hosts, ports, strict=True))
        else:
            self.places = [(hosts, ports)]
        self._within_s = within_s
        self._options: dict[str, Any] = {
            **options,
            "command_timeout": deadline_s,
            "server_settings": dict(server_settings),
            "connection_class": type("Session", (Session,), {"commit_within_s": deadline_s}),
        }

    async def connect(self) -> Session:
        """A connection to the server that takes writes. OSError, TimeoutError, asyncpg's: the most telling."""
        todo = deque(self.places)
        waiting: dict[asyncio.Task[Session], tuple[Any, Any]] = {}
        failures: list[Exception] = []
        try:
            while todo or waiting:
                if todo:
                    place = todo.popleft()
                    waiting[asyncio.create_task(self._open(*place))] = place
                done, _ = await asyncio.wait(
                    waiting, timeout=NEXT_AFTER_S if todo else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    place = waiting.pop(task)
                    try:
                        session = task.result()
                    except Exception as error:  # noqa: BLE001 - the next server may be in better health
                        failures.append(error)
                    else:
                        self.places.sort(key=lambda one: one != place)
                        return session
        finally:
            for task in waiting:
                task.cancel()
            for ended in await asyncio.gather(*waiting, return_exceptions=True):
                if isinstance(ended, Session):
                    ended.terminate()
        silent = (OSError, TimeoutError, asyncpg.exceptions.TargetServerAttributeNotMatched)
        telling = [one for one in failures if isinstance(one, StandbyAway) or not isinstance(one, silent)]
        raise (telling or failures)[-1]

    async def _open(self, host: Any, port: Any) -> Session:
        session: Session = await asyncpg.connect(
            host=host, port=port, timeout=self._within_s, **self._options
        )
        names = ""
        try:
            async with asyncio.timeout(self._within_s):
                names = str(await session.fetchval("SHOW synchronous_standby_names"))
                if names:
                    await session.execute(MARK)
            session.standbys = names
        except TimeoutError:
            session.terminate()
            if not names:
                raise  # the server itself did not say a word
            raise StandbyAway(names) from None
        except BaseException:
            session.terminate()
            raise
        return session
