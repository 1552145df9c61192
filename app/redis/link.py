"""One Redis connection for everything a process does.

`Link` multiplexes: calls are written in the order they are made and answered in that order, so thousands may
be under way on one connection and none waits for a pool. It never repeats a call whose fate is unknown
(redis-py does, and takes stock again): *did not happen* and *unknown* are different errors (`app.errors`),
and the scripts make a repeat safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from hiredis import ProtocolError, Reader, ReplyError, pack_command

from app.errors import CannotStart, DidNotHappen, Unknown
from app.redis.address import Address
from app.resources import scripts

log = logging.getLogger("fairdrop.redis")

REDIS_LEAST = 7  # script flags (#!lua) came with Redis 7.0
VALKEY_LEAST = 8
CALLS_MAX = 50_000  # calls under way on one connection; a stalled server must not eat our memory
BACKOFF_FIRST_S = 0.05  # before the second attempt to connect; doubles, with jitter
BACKOFF_MAX_S = 1.0  # a recovered Redis is found within about a second
WATCHED_BACKOFF_MAX_S = (
    0.3  # with sentinels: an election takes two seconds, of which none is to be added by us
)
CONNECT_DEADLINE_S = 2.0  # sentinels, TCP, TLS, AUTH and SCRIPT LOAD together
MOVED_LOOK_EVERY_S = 1.0  # between two questions to the sentinels while connected; three small packets
# The last three: something answers that is not Redis.
CANNOT_CONNECT = (OSError, TimeoutError, DidNotHappen, Unknown, ValueError, TypeError, KeyError)

Reply = Any  # what hiredis makes of RESP: int, bytes, None, or a list of those
Arg = str | bytes | int

# Refused before anything was done. A word that is not here, from a script, may come after a write: Unknown.
REFUSED_BEFORE = frozenset(
    {
        "NOSCRIPT",
        "READONLY",
        "LOADING",
        "CLUSTERDOWN",
        "OOM",
        "MISCONF",
        "MASTERDOWN",
        "NOREPLICAS",
        "BUSY",
        "MOVED",
        "ASK",
        "TRYAGAIN",
        "NOAUTH",
        "NOPERM",
        "CROSSSLOT",
        "EXECABORT",
    }
)
# This server will not serve us as it is; another may sit behind the same address after a reconnect.
RECONNECT_ON = frozenset({"READONLY", "LOADING", "MASTERDOWN"})


def pack(*commands: Sequence[Arg]) -> bytes:
    """Commands as RESP, one after the other."""
    return b"".join([pack_command(tuple(command)) for command in commands])  # type: ignore[arg-type]  # its stub says a 1-tuple


class Rejected(DidNotHappen):
    """The server answered with an error before doing anything. `code`: its first word."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = text.split(" ", 1)[0]


def failure_of(text: str, *, script: bool) -> Rejected | Unknown:
    """What an error reply means for the caller. One from inside a running script may follow a write."""
    if script and ("script:" in text or text.split(" ", 1)[0] not in REFUSED_BEFORE):
        return Unknown(text)
    return Rejected(text)


class _Call:
    """One call, or one pipeline, under way: `want` replies in a row belong to it."""

    __slots__ = ("future", "many", "replies", "script", "sent_at", "timer", "want")

    def __init__(
        self, future: asyncio.Future[Any], want: int, many: bool, script: bool, sent_at: float
    ) -> None:
        self.future = future
        self.want = want
        self.many = many
        self.script = script
        self.sent_at = sent_at
        self.replies: list[Any] = []
        self.timer: asyncio.TimerHandle | None = None


class _Wire(asyncio.Protocol):
    """One TCP connection: replies are matched to calls by order, which is all that RESP offers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.reader = Reader()
        self.calls: deque[_Call] = deque()
        self.out: list[bytes] = []
        self.unsent: list[_Call] = []
        self.transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()
        self.heard_at = loop.time()
        self.on_server_error: Callable[[str], None] | None = None
        self.silent_s = 0.0  # a shorter deadline of one call does not cost the others their connection

    # asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not a subclass

    def data_received(self, data: bytes) -> None:
        self.heard_at = self.loop.time()
        reader, calls = self.reader, self.calls
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not False:
                call = calls[0]
                if call.want > 1:
                    call.replies.append(reply)
                    if len(call.replies) < call.want:
                        continue
                    calls.popleft()
                    self._answer(call, call.replies)
                else:
                    calls.popleft()
                    self._answer(call, [reply] if call.many else reply)
        except (ProtocolError, IndexError):  # out of turn: nothing that follows can be trusted
            log.error("redis: protocol error, connection dropped")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        unsent = set(map(id, self.unsent))
        self.unsent.clear()
        self.out.clear()
        while self.calls:
            call = self.calls.popleft()
            if id(call) in unsent:
                self._fail(call, DidNotHappen("the connection to Redis was lost before the call was sent"))
            else:
                self._fail(call, Unknown("the connection to Redis was lost before the answer came"))
        self.lost.set()

    # calls
    def send(self, data: bytes, call: _Call, deadline_s: float) -> None:
        call.timer = self.loop.call_later(deadline_s, self._late, call)
        if not self.out:
            self.loop.call_soon(self._flush)  # one write for all calls of this turn of the loop
        self.out.append(data)
        self.unsent.append(call)
        self.calls.append(call)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def leave(self) -> None:
        """Write what is due, then close."""
        if self.transport is not None:
            self.transport.close()

    def _flush(self) -> None:
        if self.out and self.transport is not None and not self.transport.is_closing():
            data = self.out[0] if len(self.out) == 1 else b"".join(self.out)
            self.out.clear()
            self.unsent.clear()
            self.transport.write(data)

    def _answer(self, call: _Call, reply: Any) -> None:
        if call.timer is not None:
            call.timer.cancel()
        future = call.future
        if call.many:
            reply = [self._error(r, call) if isinstance(r, ReplyError) else r for r in reply]
        elif isinstance(reply, ReplyError):
            failure = self._error(reply, call)
            if not future.done():
                future.set_exception(failure)
            return
        if not future.done():
            future.set_result(reply)

    def _error(self, reply: ReplyError, call: _Call) -> Rejected | Unknown:
        failure = failure_of(str(reply), script=call.script)
        if self.on_server_error is not None and isinstance(failure, Rejected):
            self.on_server_error(failure.code)
        return failure

    def _fail(self, call: _Call, error: Exception) -> None:
        if call.timer is not None:
            call.timer.cancel()
        if not call.future.done():
            call.future.set_exception(error)

    def _late(self, call: _Call) -> None:
        call.timer = None
        if not call.future.done():
            call.future.set_exception(Unknown("Redis did not answer within the deadline"))
        if self.heard_at < call.sent_at <= self.loop.time() - self.silent_s:
            self.abort()  # TCP may never tell that the other side is gone


class Link:
    """One connection to Redis that comes back by itself; while it is away calls fail at once; none is sent twice.

    Errors of every call: DidNotHappen (not connected, or refused before any change: repeat when it heals),
    Unknown (sent and no answer, or a script failed midway: repeat only what is idempotent).
    """

    spread = False  # keys are on several servers: no command may name keys of two sales

    def __init__(
        self, url: str, *, deadline_s: float = 2.0, name: str = "fairdrop", calls_max: int = CALLS_MAX
    ) -> None:
        self.url = url
        self.name = name
        self.deadline_s = deadline_s
        self.calls_max = calls_max
        self.run_id = ""
        self.connected = False
        self.trouble = ""  # why it is not connected, for /readyz; never holds a password
        self._wire: _Wire | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._address = Address(url)

    @property
    def where(self) -> str:
        """The server, and the sentinels that named it, as words for people; no password."""
        return str(self._address)

    async def start(self) -> None:
        """Begin to connect, and wait until the first attempt succeeds or fails: see `connected`."""
        if self._keeper is None:
            tried = asyncio.Event()
            self._keeper = asyncio.create_task(self._keep(tried), name=f"redis link {self.name}")
            self._keeper.add_done_callback(keeper_ended)
            waiter = asyncio.create_task(tried.wait())
            await asyncio.wait([waiter, self._keeper], return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()

    async def close(self) -> None:
        """Drop the connection. Calls without an answer fail with Unknown."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])
        wire, self._wire, self.connected = self._wire, None, False
        if wire is not None:
            wire.abort()
            await wire.lost.wait()

    def send(
        self, args: Sequence[Arg], *, deadline_s: float | None = None, script: bool = False
    ) -> asyncio.Future[Reply]:
        """Send one command now; the future gets its reply or the failure. The hot path: no coroutine."""
        return self._send(pack(args), 1, False, script, deadline_s)

    async def call(self, *args: Arg, deadline_s: float | None = None) -> Reply:
        """One command and its reply. A blocking command belongs on a Link of its own: it holds up all others."""
        return await self.send(args, deadline_s=deadline_s)

    async def pipeline(
        self, commands: Sequence[Sequence[Arg]], *, deadline_s: float | None = None
    ) -> list[Reply]:
        """Several commands in one write; replies in order, errors as exceptions inside. Not a transaction."""
        if not commands:
            return []
        replies: list[Reply] = await self._send(pack(*commands), len(commands), True, False, deadline_s)
        return replies

    def at(self, key: str | bytes) -> Link:
        """The link to the server that holds this key: for calls that speak of the server itself."""
        return self

    def home_of(self, key: str | bytes) -> str:
        """The run_id of the server that holds this key, as the connection to it saw it."""
        return self.run_id

    async def is_elected(self, key: str | bytes) -> bool:
        """Whether those who elect primaries say just now that the server which holds this key is one.

        False: they say otherwise, or nothing, or it is a server of its own, of which nobody speaks.
        """
        try:
            return self.connected and await self._address.is_elected()
        except DidNotHappen:
            return False

    async def again(
        self,
        error: Rejected,
        args: Sequence[Arg],
        *,
        script: bool = False,
        home_at: int | None = None,
        deadline_s: float | None = None,
    ) -> Reply:
        """Make a call once more that was answered MOVED or ASK, at the node it names: see app.redis.cluster.

        home_at: where in args the run_id of the node stands. A server of its own has no other place: raises `error`.
        """
        raise error

    async def check_server(self) -> str:
        """The server's name and version as one sentence; CannotStart if it cannot hold a sale."""
        try:
            wire, info = await self._connect(load=False)
        except CANNOT_CONNECT as error:
            raise CannotStart(
                f"cannot reach Redis at {self._address} (FAIRDROP_REDIS_URL): {_reason(error)}"
            ) from error
        wire.abort()
        await wire.lost.wait()
        if "valkey_version" in info:
            name, version, least = "Valkey", info["valkey_version"], VALKEY_LEAST
        else:
            name, version, least = "Redis", info.get("redis_version", "0"), REDIS_LEAST
        if int(version.split(".")[0]) < least:
            raise CannotStart(f"{name} {version} at {self._address} is too old: {least} or newer is needed")
        if info.get("maxmemory", "0") != "0" and info.get("maxmemory_policy") != "noeviction":
            raise CannotStart(
                f"{name} at {self._address} evicts keys (maxmemory-policy {info.get('maxmemory_policy')}): "
                "a sale needs noeviction"
            )
        return f"{name} {version} at {self._address}"

    async def ask_once(self, *command: Arg) -> Reply:
        """One command over a connection that is made for it and then closed: `start` is not needed. OSError too."""
        wire, _ = await self._connect(load=False)
        try:
            loop = asyncio.get_running_loop()
            call = _Call(loop.create_future(), 1, False, False, loop.time())
            wire.send(pack(command), call, CONNECT_DEADLINE_S)
            return await call.future
        finally:
            wire.abort()
            await wire.lost.wait()

    def _send(
        self, data: bytes, want: int, many: bool, script: bool, deadline_s: float | None
    ) -> asyncio.Future[Reply]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        wire = self._wire
        # Between the loss of a connection and `_keep`, which hears of it a turn of the loop later, callers may come.
        if wire is None or not self.connected or wire.lost.is_set():
            future.set_exception(
                DidNotHappen(f"not connected to Redis{': ' if self.trouble else ''}{self.trouble}")
            )
        elif len(wire.calls) >= self.calls_max:
            future.set_exception(DidNotHappen(f"{self.calls_max} calls to Redis are under way"))
        else:
            wire.send(data, _Call(future, want, many, script, loop.time()), deadline_s or self.deadline_s)
        return future

    async def _keep(self, tried: asyncio.Event) -> None:
        """Connect, wait until the connection is lost, connect again, for ever."""
        backoff_s = BACKOFF_FIRST_S
        backoff_max_s = BACKOFF_MAX_S if self._address.sentinels is None else WATCHED_BACKOFF_MAX_S
        while True:
            try:
                wire, info = await self._connect(load=True)
            except CANNOT_CONNECT as error:
                trouble = _reason(error)
                if trouble != self.trouble:
                    log.warning("redis: cannot connect to %s: %s", self._address, trouble)
                self.trouble = trouble
            else:
                self._wire, self.run_id, self.trouble = wire, info["run_id"], ""
                self.connected = True
                backoff_s = BACKOFF_FIRST_S
                wire.on_server_error, wire.silent_s = self._server_error, self.deadline_s * 0.9
                tried.set()
                log.info("redis: connected to %s, run_id %s", self._address, self.run_id)
                if self._address.sentinels is not None and "min_slaves_good_slaves" not in info:
                    log.warning(
                        "redis: %s has no min-replicas-to-write: cut off from its replicas it goes on taking joins,"
                        " which a failover loses",
                        self._address,
                    )
                if self._address.sentinels is None:
                    await wire.lost.wait()
                else:
                    await self._until_lost_or_moved(wire)
                self._wire, self.connected = None, False
                self.trouble = "the connection was lost"
                log.warning("redis: connection to %s lost", self._address)
            tried.set()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, backoff_max_s)

    async def _until_lost_or_moved(self, wire: _Wire) -> None:
        """Ask the sentinels now and then: a primary that a failover left behind may live on, and serve us for ever."""
        while not wire.lost.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wire.lost.wait(), MOVED_LOOK_EVERY_S * random.uniform(0.8, 1.2))
                return
            with contextlib.suppress(DidNotHappen):  # no sentinel answers: the primary still may
                if await self._address.moved():
                    log.warning("redis: the sentinels name another primary than %s", self._address)
                    self.connected = False
                    wire.leave()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(wire.lost.wait(), self.deadline_s)
                    wire.abort()  # what is still unsent stays so
                    await wire.lost.wait()

    async def _connect(self, *, load: bool) -> tuple[_Wire, dict[str, str]]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            wire = await self._address.open(lambda: _Wire(loop))
            try:
                commands: list[Sequence[Arg]] = []
                if self._address.password:
                    user = (self._address.user,) if self._address.user else ()
                    commands.append(("AUTH", *user, self._address.password))
                if self._address.database:
                    commands.append(("SELECT", self._address.database))
                commands.append(("CLIENT", "SETNAME", self.name))
                if load:
                    commands += [("SCRIPT", "LOAD", text) for text in scripts().values()]
                commands += [("INFO", "memory"), ("INFO", "replication"), ("INFO", "server")]
                call = _Call(loop.create_future(), len(commands), True, False, loop.time())
                wire.send(pack(*commands), call, CONNECT_DEADLINE_S)
                replies = await call.future
                for reply in replies:
                    if isinstance(reply, Exception):
                        raise reply
                info: dict[str, str] = {}
                for line in b"\r\n".join(replies[-3:]).decode().splitlines():
                    key, colon, value = line.partition(":")
                    if colon:
                        info[key] = value
                if "run_id" not in info:
                    raise ValueError("what answers there is not Redis")
                if self._address.sentinels is not None and info.get("role") != "master":
                    raise ValueError("the server that the sentinels name is not a primary (yet)")
                return wire, info
            except BaseException:
                wire.abort()
                raise

    def _server_error(self, code: str) -> None:
        if code in RECONNECT_ON and self._wire is not None:
            self.trouble = code
            self.connected = False
            self._wire.leave()


def keeper_ended(keeper: asyncio.Task[None]) -> None:
    """Whoever keeps a connection, or a cluster's table, goes on until it is cancelled: all else is told loudly."""
    if not keeper.cancelled() and (error := keeper.exception()) is not None:
        log.critical("redis: the link will not come back, restart the process", exc_info=error)


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return error.strerror or "the name is not known"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # asyncio's own text hides the reason
    return str(error) or type(error).__name__
