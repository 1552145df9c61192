"""HTTP by hand: many requests at once (the pool of httpx is slow beyond a hundred), and bytes no client would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection, kept alive."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, raw: bytes) -> Reply:
        """Send these bytes and read one answer."""
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        self._writer.write(raw)
        head = await self._reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("connection") == "close":
            await self.close()
        return Reply(int(lines[0].split(" ")[1]), headers, body)

    async def request(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> Reply:
        head = [f"{method} {path} HTTP/1.1", "host: front"]
        head += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body is not None:
            head.append(f"content-length: {len(body)}")
        return await self.send("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + (body or b""))

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            await self._writer.wait_closed()
        self._reader = self._writer = None


async def crowd(url: str, raws: Sequence[bytes], connections: int = 64) -> list[Reply]:
    """Send all of these over so many connections, each as soon as the one before is answered. Replies in order."""
    replies: list[Reply | None] = [None] * len(raws)
    left = iter(range(len(raws)))

    async def work() -> None:
        wire = Wire(url)
        for at in left:
            replies[at] = await wire.send(raws[at])
        await wire.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(connections, len(raws))):
            group.create_task(work())
    return [reply for reply in replies if reply is not None]


def join_bytes(sale: str, buyer: str, sku: str = "A", units: int = 1) -> bytes:
    body = b'{"sku":"%b","units":%d}' % (sku.encode(), units)
    return (
        b"POST /v1/sales/%b/tickets HTTP/1.1\r\nhost: front\r\nx-buyer-id: %b\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (sale.encode(), buyer.encode(), len(body), body)
    )


def get_bytes(path: str) -> bytes:
    return b"GET %b HTTP/1.1\r\nhost: front\r\n\r\n" % path.encode()
