"""A cable between a process and what it talks to: it can be cut one way or both ways, without anybody being told.

A cut cable resets nothing: what is written into it stays in it, new connections are taken and get no answer (half-open,
as behind a router that has died). Healing delivers what was held, late, long after its sender has given up, or resets
the connections, as the dice want.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

CHUNK_BYTES = 65_536
Way = Literal["there", "back"]


class Cable:
    """One listening port for one server. `there`: towards the server; `back`: its answers."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._open: dict[Way, asyncio.Event] = {"there": asyncio.Event(), "back": asyncio.Event()}
        self._ends: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._server: asyncio.Server | None = None
        self.url = ""
        self.held = 0  # pieces that had to wait for healing
        self.heal("deliver")

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        account, at, _ = self._parts.netloc.rpartition("@")
        self.url = urlunsplit(self._parts._replace(netloc=f"{account}{at}127.0.0.1:{port}"))

    def cut(self, *ways: Way) -> None:
        for way in ways or ("there", "back"):
            self._open[way].clear()

    def heal(self, how: Literal["deliver", "reset"]) -> None:
        if how == "reset":
            for task, writers in self._ends.items():
                for writer in writers:
                    _reset(writer)
                task.cancel()
        for event in self._open.values():
            event.set()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        while self._ends:
            self.heal("reset")
            await asyncio.wait(list(self._ends), timeout=0.1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        ends = self._ends[task] = [writer]
        try:
            await self._wait("there")
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._parts.port)
            ends.append(up_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry("there", reader, up_writer))
                group.create_task(self._carry("back", up_reader, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            for one in ends:
                one.close()
            del self._ends[task]

    async def _wait(self, way: Way) -> None:
        if not self._open[way].is_set():
            self.held += 1
            await self._open[way].wait()

    async def _carry(self, way: Way, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Until the source says that nothing more comes, then tell the sink so."""
        while data := await source.read(CHUNK_BYTES):
            await self._wait(way)
            sink.write(data)
            await sink.drain()
        await self._wait(way)
        with contextlib.suppress(OSError, RuntimeError):
            sink.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side gets a RST."""
    wire = writer.get_extra_info("socket")
    if wire is not None:
        with contextlib.suppress(OSError):
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
