"""A TCP proxy in front of Redis: it writes down the joins that reach it, and loses answers after they were made."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import urlsplit, urlunsplit

import hiredis

from app.record import Recorder, Wire
from app.scripts import LINE_JOIN

ARGV_BUYERS = 9  # of line_join: what stands before the buyers


class Proxy:
    """One listening port for one server. `lose` answers to joins are still to be lost, with their connections."""

    def __init__(self, redis_url: str, record: Recorder) -> None:
        self._parts = urlsplit(redis_url)
        self._record = record
        self.lose = 0
        self.lost = 0
        self._sha = LINE_JOIN.sha.encode()
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.url = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        password = f":{self._parts.password}@" if self._parts.password else ""
        self.url = urlunsplit(self._parts._replace(netloc=f"{password}127.0.0.1:{port}"))

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        while self._open:
            for writer in self._open.values():
                writer.close()
            await asyncio.wait(list(self._open), timeout=0.1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._parts.port)
            await self._carry(reader, writer, up_reader, up_writer)
        except OSError:
            writer.close()
        finally:
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            del self._open[task]

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        swallow = asyncio.Event()
        parser = hiredis.Reader()

        async def there() -> None:
            while data := await reader.read(65536):
                parser.feed(data)
                while (command := parser.gets()) is not False:
                    if self._is_join(command) and self.lose > 0:
                        self.lose -= 1
                        swallow.set()
                up_writer.write(data)
                await up_writer.drain()

        async def back() -> None:
            while data := await up_reader.read(65536):
                if swallow.is_set():  # it was executed, and nobody hears of it
                    self.lost += 1
                    return
                writer.write(data)
                await writer.drain()

        ways = [asyncio.create_task(there()), asyncio.create_task(back())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for one in (writer, up_writer):
                one.close()
            with contextlib.suppress(OSError):
                await up_writer.wait_closed()

    def _is_join(self, command: object) -> bool:
        if not isinstance(command, list) or len(command) < 3 or command[0].upper() != b"EVALSHA":
            return False
        if command[1] != self._sha:
            return False
        argv = command[3 + int(command[2]) :]
        count = int(argv[5])
        for buyer in argv[ARGV_BUYERS : ARGV_BUYERS + count]:
            self._record.add(Wire(at=self._record.clock(), op="line_join", buyer=buyer.decode()))
        return True
