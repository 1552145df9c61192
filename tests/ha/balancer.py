"""A small reverse proxy, HTTP/1.1 only, to restart what is behind it.

It does what a careful balancer does, and no more: keep-alive connections to each server, given up when a server says
`Connection: close` or after `keep_s` of rest; a server that cannot be connected to is passed over, for the request has
not been sent; a request that *has* been sent is never sent again (nginx: `proxy_next_upstream error` without
`non_idempotent`; for a GET nginx would try the next server, this one does not). Every such loss is a 502, counted.

check_every_s: ask /readyz so often and send nothing to who does not say 200 (a Kubernetes Service, HAProxy, nginx
Plus); 0: no checks (nginx as everybody has it), a server that refuses connections is left alone for `FAIL_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field

FAIL_S = 1.0  # nginx: fail_timeout
CONNECT_S = 1.0
ANSWER_S = 10.0
BAD = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"


class Lost(Exception):
    """A request was sent and no whole answer came back."""


@dataclass
class Upstream:
    port: int
    ready: bool = True
    not_before: float = 0.0
    served: int = 0
    idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """A head and its body by Content-Length: nothing chunked goes through here."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line[15:])
    return head, await reader.readexactly(length) if length else b""


class Balancer:
    """One listening port for several front doors. `lost`: what became of requests that got no answer."""

    def __init__(self, ports: list[int], *, check_every_s: float, keep_s: float) -> None:
        self.upstreams = [Upstream(port) for port in ports]
        self.check_every_s = check_every_s
        self.keep_s = keep_s
        self.lost: Counter[str] = Counter()
        self._turn = 0
        self._server: asyncio.Server | None = None
        self._checks: asyncio.Task[None] | None = None
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.url = ""

    async def __aenter__(self) -> Balancer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        if self.check_every_s:
            self._checks = asyncio.create_task(self._check())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        if self._checks is not None:
            self._checks.cancel()
            await asyncio.wait([self._checks])
        for writer in self._clients.values():
            writer.close()
        for up in self.upstreams:
            for _, _, writer in up.idle:
                writer.close()
        if self._clients:
            await asyncio.wait(list(self._clients))

    async def _check(self) -> None:
        while True:
            for up in self.upstreams:
                up.ready = await self._says_ready(up)
            await asyncio.sleep(self.check_every_s)

    async def _says_ready(self, up: Upstream) -> bool:
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", up.port)
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: check\r\nConnection: close\r\n\r\n")
                line = await reader.readline()
                writer.close()
        except (OSError, TimeoutError):
            return False
        return b" 200 " in line

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = writer
        try:
            while True:
                head, body = await read_message(reader)
                writer.write(await self._forward(head + body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has gone
        finally:
            del self._clients[task]
            writer.close()

    async def _forward(self, request: bytes) -> bytes:
        """The answer of the next server that can be reached."""
        self._turn += 1
        now = time.monotonic()
        order = [self.upstreams[(self._turn + at) % len(self.upstreams)] for at in range(len(self.upstreams))]
        # Whoever is out is tried last, not never: an answer beats none.
        for up in sorted(order, key=lambda one: (not one.ready, one.not_before > now)):
            wire = await self._connection(up)
            if wire is not None:
                try:
                    return await self._exchange(up, *wire, request)
                except Lost as error:
                    self.lost[str(error)] += 1
                    return BAD
        self.lost["nobody could be connected to"] += 1
        return BAD

    async def _connection(self, up: Upstream) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        now = time.monotonic()
        while up.idle:
            since, reader, writer = up.idle.pop()
            if now - since < self.keep_s and not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        try:
            async with asyncio.timeout(CONNECT_S):
                return await asyncio.open_connection("127.0.0.1", up.port)
        except (OSError, TimeoutError):
            up.not_before = now + FAIL_S
            return None

    async def _exchange(
        self, up: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
    ) -> bytes:
        try:
            writer.write(request)
            async with asyncio.timeout(ANSWER_S):
                head, body = await read_message(reader)
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            with contextlib.suppress(OSError):
                writer.close()
            raise Lost(type(error).__name__) from error
        up.served += 1
        if b"\r\nconnection: close\r\n" in head.lower():
            writer.close()
        else:
            up.idle.append((time.monotonic(), reader, writer))
        return head + body
