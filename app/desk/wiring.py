"""What the routers of the office work with, made once by its lifespan and found through the application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.providers.routes import Routes
from app.sale.document import House
from app.sealing import SealingKey
from app.settings import Settings
from app.tokens import Keyring

if TYPE_CHECKING:
    from app.redis.link import Link
    from app.scripts import Scripts


class Turns:
    """One request at a time for each name: the others wait here, without holding a connection."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[name]
            if users == 1:
                del self._locks[name]
            else:
                self._locks[name] = (lock, users - 1)


@dataclass
class Desk:
    """Stores and keys of one office process."""

    settings: Settings
    engine: AsyncEngine
    link: Link
    scripts: Scripts
    ring: Keyring
    seal_keys: list[SealingKey]
    routes: Routes = field(default_factory=lambda: Routes({}, ()))
    turns: Turns = field(default_factory=Turns)
    draining: bool = False

    @property
    def house(self) -> House:
        return House(development=self.settings.development, channel=self.settings.payment_provider)


def desk_of(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


TheDesk = Annotated[Desk, Depends(desk_of)]


@asynccontextmanager
async def reading(desk: Desk) -> AsyncIterator[AsyncConnection]:
    """One connection for reading: everything in it is seen as of one moment."""
    async with desk.engine.connect() as conn:
        await conn.execution_options(isolation_level="REPEATABLE READ")
        async with conn.begin():
            yield conn
