"""Where Redis is: one server, or whichever server the sentinels name.

redis://[user:password@]host:port/0                  one server; rediss:// with TLS, unix:///path without a network
redis+sentinel://[user:password@]host:port,host:port,host:port/service[/0][?sentinel_password=…&sentinel_user=…]
                                                     the primary called `service`; rediss+sentinel:// with TLS, for both

User and password are those of Redis.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from app.errors import CannotStart
from app.redis.sentinel import SENTINEL_PORT, Sentinels

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
REDIS_PORT = 6379

P = TypeVar("P", bound=asyncio.BaseProtocol)


class Address:
    """A server, or a name that sentinels know. `str` holds no password.

    CannotStart: the URL is none of ours.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise CannotStart(
                "the Redis address (FAIRDROP_REDIS_URL) must begin with redis://, rediss://, unix://,"
                " redis+sentinel:// or redis+cluster://"
            )
        watched = parts.scheme.endswith("+sentinel")
        try:
            userinfo, _, hosts = parts.netloc.rpartition("@")
            user, _, password = userinfo.partition(":")
            self.user, self.password = unquote(user), unquote(password)
            self.path = parts.path if parts.scheme == "unix" else ""
            self.tls = parts.scheme.startswith("rediss")
            path = parts.path.strip("/").split("/") if not self.path else [""]
            service = unquote(path.pop(0)) if watched else ""
            self.database = int((path or [""])[0] or 0)
            if len(path) > 1 or (watched and not service):
                raise ValueError("no service")
            places = [
                place_of(host, SENTINEL_PORT if watched else REDIS_PORT)
                for host in (hosts.split(",") if watched else [hosts])
            ]
        except ValueError as error:
            raise CannotStart(
                "the Redis address (FAIRDROP_REDIS_URL) is not a URL like redis://:password@host:6379/0"
                " or redis+sentinel://:password@host:26379,host:26379,host:26379/service"
            ) from error
        self._config_epoch = 0
        self._tls = ssl.create_default_context() if self.tls else None
        self.host, self.port = places[0]
        self.sentinels: Sentinels | None = None
        if watched:
            options = parse_qs(parts.query)
            self.sentinels = Sentinels(
                places,
                service,
                user=options.get("sentinel_user", [""])[0],
                password=options.get("sentinel_password", [""])[0],
                tls=self._tls,
            )
            self.host, self.port = "", 0  # nobody knows yet

    def __str__(self) -> str:
        if self.sentinels is None:
            return self.path or f"{self.host}:{self.port}"
        return f"{self.host}:{self.port}, {self.sentinels}" if self.host else str(self.sentinels)

    async def open(self, make: Callable[[], P]) -> P:
        """A connection, nothing said on it yet. OSError; DidNotHappen: no sentinel knows where to."""
        loop = asyncio.get_running_loop()
        if self.path:
            _, wire = await loop.create_unix_connection(make, self.path)
            return wire
        if self.sentinels is not None:
            self._config_epoch, self.host, self.port = await self.sentinels.primary()
        _, wire = await loop.create_connection(make, self.host, self.port, ssl=self._tls)
        return wire

    async def is_elected(self) -> bool:
        """Whether most sentinels answer, and name the server that `open` went to last. DidNotHappen: too few answer."""
        if self.sentinels is None:
            return False  # nobody elects
        named = await self.sentinels.primary(by_most=True)
        return (named.host, named.port) == (self.host, self.port) and named.config_epoch >= self._config_epoch

    async def moved(self) -> bool:
        """Whether the sentinels name another server than `open` went to last. DidNotHappen: none of them answers."""
        if self.sentinels is None:
            return False
        named = await self.sentinels.primary()
        # Those that have not heard of the last failover yet name the server of before.
        return (named.host, named.port) != (self.host, self.port) and named.config_epoch >= self._config_epoch


def place_of(host: str, port: int) -> tuple[str, int]:
    """`host:port`, `host`, `[::1]:port`; empty: this machine. ValueError: it is none of these."""
    found = urlsplit(f"//{host}")
    return found.hostname or "127.0.0.1", found.port or port
