"""Which server is the primary: asked of the sentinels that watch it.

All are asked at once and a majority of answers is waited for, so that neither a dead nor a cut-off sentinel decides
or delays; of different answers the one of the highest config epoch counts, which is the newest failover that a
majority of sentinels has voted for. What a sentinel says is believed only after the server itself said `master`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from typing import Any, NamedTuple

from hiredis import HiredisError, Reader, ReplyError, pack_command

from app.errors import DidNotHappen

SENTINEL_PORT = 26379
ASK_WITHIN_S = 0.7  # a sentinel that is there answers in a millisecond; it does nothing but talk
READ_BYTES = 65_536
ANSWER_MAX = 1 << 20  # bytes; a sentinel describes a primary in about 1 kB


class Answer(NamedTuple):
    """What one sentinel says. config_epoch: of the failover that it knows, counting up."""

    config_epoch: int
    host: str
    port: int


class Sentinels:
    """The sentinels of one installation and the name of our primary among them. The password is theirs, not Redis'."""

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        service: str,
        *,
        user: str = "",
        password: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.hosts = tuple(hosts)
        self.service = service
        self._tls = tls
        asked: list[tuple[str, ...]] = []
        if password:
            asked.append(("AUTH", user, password) if user else ("AUTH", password))
        # The first knows of a failover that is still under way, the second has the epoch.
        asked.append(("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service))
        asked.append(("SENTINEL", "MASTER", service))
        self._question = b"".join(pack_command(command) for command in asked)  # type: ignore[arg-type]  # its stub says a 1-tuple
        self._want = len(asked)

    def __str__(self) -> str:
        return f"`{self.service}` of the sentinels {', '.join(f'{host}:{port}' for host, port in self.hosts)}"

    async def primary(self, *, by_most: bool = False) -> Answer:
        """Where the primary is. DidNotHappen: no sentinel (by_most: not most of them) answers and knows the name."""
        waiting = {asyncio.create_task(self._ask(host, port)) for host, port in self.hosts}
        enough = len(self.hosts) // 2 + 1
        answers: list[Answer] = []
        troubles: list[str] = []
        try:
            while waiting and len(answers) < enough:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    said = task.result()
                    answers.append(said) if isinstance(said, Answer) else troubles.append(said)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        if not answers:
            raise DidNotHappen(f"no sentinel names a primary: {troubles[0]}")
        if by_most and len(answers) < enough:
            raise DidNotHappen(f"only {len(answers)} of {len(self.hosts)} sentinels name a primary")
        return max(answers)

    async def _ask(self, host: str, port: int) -> Answer | str:
        """One sentinel's answer, or why there is none."""
        try:
            async with asyncio.timeout(ASK_WITHIN_S):
                reader, writer = await asyncio.open_connection(host, port, ssl=self._tls)
                try:
                    writer.write(self._question)
                    replies = await self._read(reader)
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
            for reply in replies:
                if isinstance(reply, ReplyError):
                    return f"{host}:{port} answers {reply}"
            address, facts = replies[-2:]
            if address is None:
                return f"{host}:{port} does not know `{self.service}`"
            known = dict(zip(facts[::2], facts[1::2], strict=True))
            return Answer(int(known.get(b"config-epoch", 0)), address[0].decode(), int(address[1]))
        except TimeoutError:
            return f"{host}:{port} does not answer in time"
        except OSError as error:
            return f"{host}:{port}: {error.strerror or error}"
        except (HiredisError, ValueError, TypeError, AttributeError, IndexError):
            return f"what answers at {host}:{port} is not a sentinel"

    async def _read(self, reader: asyncio.StreamReader) -> list[Any]:
        parser, size = Reader(), 0
        replies: list[Any] = []
        while len(replies) < self._want:
            data = await reader.read(READ_BYTES)
            size += len(data)
            if not data or size > ANSWER_MAX:
                raise ConnectionResetError("the connection was closed")
            parser.feed(data)
            while (reply := parser.gets()) is not False:
                replies.append(reply)
        return replies
