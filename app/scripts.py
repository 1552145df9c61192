"""One Redis connection for everything a process does, and the scripts of lua/ as typed calls.

`Link` multiplexes: calls are written in the order they are made and answered in that order, so thousands may
be under way on one connection and none waits for a pool. It never repeats a call whose fate is unknown
(redis-py does, and takes stock again): *did not happen* and *unknown* are different errors (`app.errors`),
and the scripts make a repeat safe.

`Scripts` binds each script of lua/ by declared names; the file's header is the contract and a test compares.
Expected refusals are values: one frozen struct for each first word of a reply.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast
from urllib.parse import unquote, urlsplit

import msgspec
from hiredis import ProtocolError, Reader, ReplyError, pack_command

from app.errors import CannotStart, DidNotHappen, Unknown
from app.keys import FORMAT, GROUP, SaleKeys, breaker_history_key, breaker_key, sms_limits
from app.resources import lua_dir

log = logging.getLogger("fairdrop.redis")

REDIS_LEAST = 7  # script flags (#!lua) came with Redis 7.0
VALKEY_LEAST = 8
CALLS_MAX = 50_000  # calls under way on one connection; a stalled server must not eat our memory
BACKOFF_FIRST_S = 0.05  # before the second attempt to connect; doubles, with jitter
BACKOFF_MAX_S = 1.0  # a recovered Redis is found within about a second
CONNECT_DEADLINE_S = 2.0  # TCP, TLS, AUTH and SCRIPT LOAD together
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
        self._address = _Address(url)

    async def start(self) -> None:
        """Begin to connect, and wait until the first attempt succeeds or fails: see `connected`."""
        if self._keeper is None:
            tried = asyncio.Event()
            self._keeper = asyncio.create_task(self._keep(tried), name=f"redis link {self.name}")
            self._keeper.add_done_callback(_kept)
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

    async def check_server(self) -> str:
        """The server's name and version as one sentence; CannotStart if it cannot hold a sale."""
        try:
            wire, info = await self._connect(load=False)
        except CANNOT_CONNECT as error:
            raise CannotStart(f"Redis at {self._address} does not answer: {_reason(error)}") from error
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

    def _send(
        self, data: bytes, want: int, many: bool, script: bool, deadline_s: float | None
    ) -> asyncio.Future[Reply]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        wire = self._wire
        if wire is None or not self.connected:
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
                await wire.lost.wait()
                self._wire, self.connected = None, False
                self.trouble = "the connection was lost"
                log.warning("redis: connection to %s lost", self._address)
            tried.set()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)

    async def _connect(self, *, load: bool) -> tuple[_Wire, dict[str, str]]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            wire = await self._address.open(loop)
            try:
                commands: list[Sequence[Arg]] = []
                if self._address.password:
                    user = (self._address.user,) if self._address.user else ()
                    commands.append(("AUTH", *user, self._address.password))
                if self._address.database:
                    commands.append(("SELECT", self._address.database))
                commands.append(("CLIENT", "SETNAME", self.name))
                if load:
                    commands += [("SCRIPT", "LOAD", script.text) for script in all_scripts()]
                commands += [("INFO", "memory"), ("INFO", "server")]
                call = _Call(loop.create_future(), len(commands), True, False, loop.time())
                wire.send(pack(*commands), call, CONNECT_DEADLINE_S)
                replies = await call.future
                for reply in replies:
                    if isinstance(reply, Exception):
                        raise reply
                info: dict[str, str] = {}
                for line in (replies[-2] + b"\r\n" + replies[-1]).decode().splitlines():
                    key, colon, value = line.partition(":")
                    if colon:
                        info[key] = value
                if "run_id" not in info:
                    raise ValueError("what answers there is not Redis")
                return wire, info
            except BaseException:
                wire.abort()
                raise

    def _server_error(self, code: str) -> None:
        if code in RECONNECT_ON and self._wire is not None:
            self.trouble = code
            self.connected = False
            self._wire.leave()


def _kept(keeper: asyncio.Task[None]) -> None:
    if not keeper.cancelled() and (error := keeper.exception()) is not None:
        log.critical("redis: the link will not come back, restart the process", exc_info=error)


class _Address:
    """Where Redis is: redis://, rediss:// (TLS) or unix://, with user, password and database number."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise CannotStart("the Redis address must begin with redis://, rediss:// or unix://")
        try:
            self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 6379
            self.user, self.password = unquote(parts.username or ""), unquote(parts.password or "")
            self.path = parts.path if parts.scheme == "unix" else ""
            self.database = int(parts.path.strip("/") or 0) if parts.scheme != "unix" else 0
        except ValueError as error:
            raise CannotStart("the Redis address is not a URL like redis://:password@host:6379/0") from error
        self.tls = parts.scheme == "rediss"

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"

    async def open(self, loop: asyncio.AbstractEventLoop) -> _Wire:
        if self.path:
            _, wire = await loop.create_unix_connection(lambda: _Wire(loop), self.path)
            return wire
        context = ssl.create_default_context() if self.tls else None
        _, wire = await loop.create_connection(lambda: _Wire(loop), self.host, self.port, ssl=context)
        return wire


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return error.strerror or "the name is not known"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # asyncio's own text hides the reason
    return str(error) or type(error).__name__


# --- what the scripts answer


class Answer(msgspec.Struct, frozen=True):
    """The reply of a script. Its first word is the class name in capitals (NotWaiting: NOT_WAITING)."""


class Gone(Answer, frozen=True):
    """Redis has no such sale (or item): closed, never zero."""


class Old(Answer, frozen=True):
    """Another epoch, or a Redis that is not the sale's home. Nothing changed; read the sale again."""


class Closed(Answer, frozen=True):
    """The sale is closed: nobody is served any more."""


class Early(Answer, frozen=True):
    """It is not yet time for this."""


class Paused(Answer, frozen=True):
    """Nobody is served while the sale or the item is paused."""


class WaitBeacon(Answer, frozen=True):
    """The draw waits for its beacon."""


class Busy(Answer, frozen=True):
    """Too many claims wait for Postgres."""


class Served(Answer, frozen=True):
    """Ranks up to `served` are served; `claimed` tickets got units in this call; `waiting` counts holes too."""

    served: int
    claimed: int
    units_left: int
    waiting: int


class Left(Answer, frozen=True):
    """The place in the line is given up."""


class NotWaiting(Answer, frozen=True):
    """The ticket does not wait: its effective state byte."""

    byte: bytes


class Released(Answer, frozen=True):
    """The units are back in stock, and `claimed` standby tickets got them at once."""

    units_left: int
    claimed: int


class Already(Answer, frozen=True):
    """It was done before. What it carries differs: see each script."""


class AlreadyByte(Answer, frozen=True):
    """Nothing was done (any more): the ticket's effective state byte."""

    byte: bytes


class AlreadyUnits(Answer, frozen=True):
    """This id was applied before; units left now."""

    units_left: int


class AlreadyAsked(Answer, frozen=True):
    """An ask is under way: leave or pay."""

    kind: str


class AlreadyValue(Answer, frozen=True):
    """A beacon is stored and stays."""

    value: str


class Taken(Answer, frozen=True):
    """units_retake: the units are the ticket's again, units left. rate_take: allowed, so many more at once."""

    left: int


class Wait(Answer, frozen=True):
    """Not now; allowed in `ms`."""

    ms: int


class Refused(Answer, frozen=True):
    """Late money gets no unit: state | waiting | stock."""

    reason: str


class Added(Answer, frozen=True):
    """The units are in stock; `claimed` standby tickets got some at once."""

    units_left: int
    claimed: int


class Short(Answer, frozen=True):
    """There are not so many unsold units to take away. Nothing changed."""

    units_left: int


class Marked(Answer, frozen=True):
    """The buyer is told this now."""


class MarkedEach(Answer, frozen=True):
    """For each ticket of the batch: 1 told and its entry gone, 0 left to ticket_mark."""

    done: str


class Stale(Answer, frozen=True):
    """A version at least as new is known."""

    version: int


class AlreadyReleased(Answer, frozen=True):
    """The ticket has ended; its state byte."""

    byte: bytes


class Not(Answer, frozen=True):
    """Not with a ticket in this (effective) state."""

    byte: bytes


class NotHome(Answer, frozen=True):
    """Another Redis than the one asked about is the sale's home."""

    home: str


class Asked(Answer, frozen=True):
    """The worker will read it."""


class Published(Answer, frozen=True):
    """The sale is in Redis."""


class Other(Answer, frozen=True):
    """The sale is in Redis with another epoch."""

    epoch: int


class Leftover(Answer, frozen=True):
    """Keys of this sale are left without its `sale`: rebuild, or clear them."""


class Fenced(Answer, frozen=True):
    """No script but a rebuild's changes this sale any more."""


class Rebuilt(Answer, frozen=True):
    """The sale is open again, in a new epoch."""


class Switched(Answer, frozen=True):
    """Live for every front door at its next look."""


class ClosedForGood(Answer, frozen=True):
    """A closed sale stays closed."""


class Put(Answer, frozen=True):
    """The beacon is stored."""


class Armed(Answer, frozen=True):
    """This Redis is the sale's home."""


class Behind(Answer, frozen=True):
    """Redis lost writes that Postgres knows of: rebuild."""

    pulse: int


class Pulsed(Answer, frozen=True):
    """The pulse is written; this value may go to Postgres."""

    pulse: int


class Advised(Answer, frozen=True):
    """What was advised holds until then, by Redis' clock."""

    until_ms: int


class Stands(Answer, frozen=True):
    """A supplier's breaker as it stands after one turn. Times are ms of its own clock, which never runs back.

    granted: permits given; probes among them have the serials up to `serial`. settled: for each result c(ounted),
    i(gnored) or l(ate). events: the transitions of this turn, JSON.
    """

    now_ms: int
    state: str
    mode: str
    generation: int
    since_ms: int
    until_ms: int
    openings: int
    calls: int
    failures: int
    slow: int
    granted: int
    serial: int
    settled: str
    last_error: str
    events: str


# --- answers for each buyer of a join


class Waits(msgspec.Struct, frozen=True, gc=False):
    """A new ticket that waits in the line."""

    seq: int


class Claimed(msgspec.Struct, frozen=True, gc=False):
    """A new ticket that has its units."""

    seq: int


class Has(msgspec.Struct, frozen=True, gc=False):
    """The buyer's newest ticket: live with the same body, or ended. `byte`: its effective state."""

    sku: bytes
    seq: int
    units: int
    byte: bytes


class Conflict(msgspec.Struct, frozen=True, gc=False):
    """The buyer has a live ticket for something else."""

    sku: bytes
    seq: int
    units: int
    byte: bytes


class Turned(msgspec.Struct, frozen=True, gc=False):
    """No ticket, nothing stored."""

    why: Literal["closed", "not_open_yet", "limit", "sold_out", "line_full", "busy"]


JoinAnswer = Waits | Claimed | Has | Conflict | Turned


class Joined(Answer, frozen=True):
    """One answer for each buyer, in their order; served and next_seq are as after the batch."""

    now_ms: int
    served: int
    next_seq: int
    answers: list[JoinAnswer]


_TURNED: dict[bytes, JoinAnswer] = {
    b"K": Turned("closed"),
    b"Y": Turned("not_open_yet"),
    b"L": Turned("limit"),
    b"S": Turned("sold_out"),
    b"F": Turned("line_full"),
    b"B": Turned("busy"),
}


def _joined(reply: list[Any]) -> Joined:
    answers: list[JoinAnswer] = []
    at, end = 4, len(reply)
    while at < end:
        word = reply[at]
        if word == b"W":
            answers.append(Waits(reply[at + 1]))
            at += 2
        elif word == b"C":
            answers.append(Claimed(reply[at + 1]))
            at += 2
        elif word == b"H":
            answers.append(Has(reply[at + 1], reply[at + 2], reply[at + 3], reply[at + 4]))
            at += 5
        elif word == b"X":
            answers.append(Conflict(reply[at + 1], reply[at + 2], reply[at + 3], reply[at + 4]))
            at += 5
        else:
            answers.append(_TURNED[word])
            at += 1
    return Joined(reply[1], reply[2], reply[3], answers)


# --- the scripts

A = TypeVar("A", bound=Answer)

_WORD = re.compile(r"(?<!^)(?=[A-Z])")
_PART = re.compile(r"^--@ part (\w+)$", re.MULTILINE)


def script_text(name: str) -> str:
    """The script as the server gets it: each line `--@ part NAME` replaced by lua/parts/NAME.lua."""
    folder = lua_dir()

    def part(found: re.Match[str]) -> str:
        return (folder / "parts" / f"{found[1]}.lua").read_text(encoding="utf-8").rstrip("\n")

    return _PART.sub(part, (folder / f"{name}.lua").read_text(encoding="utf-8"))


def _converter(kind: str) -> Callable[[Any], Any] | None:
    if kind == "str":
        return lambda value: value.decode()
    return int if kind == "int" else None


class Script(Generic[A]):
    """One file of lua/, its keys and arguments by the names in its header, and what it may answer.

    `words` gives the word of an answer whose class name is not the word (several scripts answer ALREADY with
    different things). A name that ends in `...` stands for the rest.
    """

    registry: ClassVar[dict[str, Script[Any]]] = {}

    def __init__(
        self,
        name: str,
        *,
        keys: str,
        args: str,
        answers: Sequence[type[A]],
        words: Mapping[str, type[A]] | None = None,
    ) -> None:
        self.name = name
        self.keys = tuple(keys.split())
        self.args = tuple(args.split())
        self.answers: dict[bytes, tuple[type[A], tuple[Callable[[Any], Any] | None, ...]]] = {}
        named = {_WORD.sub("_", answer.__name__).upper(): answer for answer in answers} | dict(words or {})
        for word, answer in named.items():
            kinds = [
                str(field.type if isinstance(field.type, str) else field.type.__name__)
                for field in _fields(answer)
            ]
            self.answers[word.encode()] = (answer, tuple(map(_converter, kinds)))
        Script.registry[name] = self

    @property
    def text(self) -> str:
        return _text(self.name)

    @property
    def sha(self) -> str:
        return _sha(self.name)

    def read(self, reply: list[Any]) -> A:
        """The typed answer. A word that the header does not have is a bug: KeyError."""
        answer, converters = self.answers[reply[0]]
        values = [
            value if make is None else make(value) for value, make in zip(reply[1:], converters, strict=True)
        ]
        return answer(*values)


def _fields(answer: type[Answer]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return () if answer is Joined else msgspec.structs.fields(answer)


@cache
def _text(name: str) -> str:
    return script_text(name)


@cache
def _sha(name: str) -> str:
    return hashlib.sha1(_text(name).encode(), usedforsecurity=False).hexdigest()


def all_scripts() -> list[Script[Any]]:
    """Every script, for SCRIPT LOAD."""
    return list(Script.registry.values())


SERVE_KEYS = "sale item stock outcome line orders"

LINE_JOIN: Script[Gone | Old | Joined] = Script(
    "line_join",
    keys=SERVE_KEYS + " buyers drawn others...",
    args="epoch home now_ms sku backlog_max n again hashes buyers...",
    answers=(Gone, Old, Joined),
)
LINE_LEAVE: Script[Gone | Old | Left | NotWaiting] = Script(
    "line_leave",
    keys="sale item outcome line left",
    args="epoch home now_ms seq",
    answers=(Gone, Old, Left, NotWaiting),
)
LINE_ADVANCE: Script[Gone | Old | Closed | Early | Paused | WaitBeacon | Busy | Served] = Script(
    "line_advance",
    keys=SERVE_KEYS,
    args="epoch home now_ms sku work_max backlog_max",
    answers=(Gone, Old, Closed, Early, Paused, WaitBeacon, Busy, Served),
)
UNITS_RELEASE: Script[Gone | Old | AlreadyByte | Released] = Script(
    "units_release",
    keys=SERVE_KEYS + " status",
    args="epoch home now_ms sku seq units version to_byte status_json work_max backlog_max",
    answers=(Gone, Old, Released),
    words={"ALREADY": AlreadyByte},
)
UNITS_RETAKE: Script[Gone | Old | Taken | AlreadyByte | Refused] = Script(
    "units_retake",
    keys="sale item stock outcome line status",
    args="epoch home now_ms sku seq units version",
    answers=(Gone, Old, Taken, Refused),
    words={"ALREADY": AlreadyByte},
)
STOCK_ADD: Script[Gone | Old | Added | AlreadyUnits | Short] = Script(
    "stock_add",
    keys=SERVE_KEYS,
    args="epoch home now_ms sku units id work_max backlog_max",
    answers=(Gone, Old, Added, Short),
    words={"ALREADY": AlreadyUnits},
)
TICKET_MARK: Script[Gone | Old | Marked | Stale | AlreadyReleased | Not] = Script(
    "ticket_mark",
    keys="sale item outcome status",
    args="epoch home now_ms sku seq version byte status_json keep_ask",
    answers=(Gone, Old, Marked, Stale, AlreadyReleased, Not),
)
CLAIMS_MARK: Script[Gone | Old | MarkedEach] = Script(
    "claims_mark",
    keys="sale outcome status orders",
    args="epoch home now_ms sku group before behind newest numbers r n tickets...",
    answers=(Gone, Old),
    words={"MARKED": MarkedEach},
)
ASK_PUT: Script[Gone | Old | Asked | AlreadyAsked | Not] = Script(
    "ask_put",
    keys="sale item outcome status asks",
    args="epoch home now_ms sku seq buyer_id kind arg channel repeat_ms",
    answers=(Gone, Old, Asked, Not),
    words={"ALREADY": AlreadyAsked},
)
SALE_PUBLISH: Script[Published | Already | Other | Leftover] = Script(
    "sale_publish",
    keys="sale stock buyers orders asks items...",
    args="epoch home now_ms sale_id seed_hash group n pairs...",
    answers=(Published, Already, Other, Leftover),
)
SALE_FENCE: Script[Gone | Fenced | Other] = Script(
    "sale_fence", keys="sale", args="epoch", answers=(Gone, Fenced, Other)
)
SALE_REBUILD: Script[Rebuilt | Already | Other] = Script(
    "sale_rebuild",
    keys="sale stock buyers orders asks items...",
    args="epoch home now_ms sale_id seed_hash group n pairs...",
    answers=(Rebuilt, Already, Other),
)
SALE_SWITCH: Script[Gone | Old | Switched | Stale | ClosedForGood] = Script(
    "sale_switch",
    keys="sale",
    args="epoch home now_ms version pairs...",
    answers=(Gone, Old, Switched, Stale, ClosedForGood),
)
ITEM_SWITCH: Script[Gone | Old | Switched | Already] = Script(
    "item_switch", keys="sale item", args="epoch home now_ms paused", answers=(Gone, Old, Switched, Already)
)
BEACON_PUT: Script[Gone | Old | Put | AlreadyValue | Early] = Script(
    "beacon_put",
    keys="sale",
    args="epoch home now_ms value",
    answers=(Gone, Old, Put, Early),
    words={"ALREADY": AlreadyValue},
)
SALE_REARM: Script[Gone | Old | Armed | Behind | NotHome] = Script(
    "sale_rearm",
    keys="sale",
    args="epoch old_home new_home pulse_at_least",
    answers=(Gone, Old, Armed, Behind),
    words={"NOT": NotHome},
)
SALE_PULSE: Script[Gone | Old | Pulsed] = Script(
    "sale_pulse", keys="sale", args="epoch home now_ms pulse", answers=(Gone, Old, Pulsed)
)
SALE_ADVISE: Script[Gone | Old | Advised] = Script(
    "sale_advise",
    keys="sale",
    args="epoch home now_ms slow_milli base_milli reason notices lease_ms",
    answers=(Gone, Old, Advised),
)
RATE_TAKE: Script[Taken | Wait] = Script(
    "rate_take", keys="rate", args="now_ms period_ms burst cost", answers=(Taken, Wait)
)
SMS_TAKE: Script[Taken | Wait] = Script(
    "sms_take",
    keys="minute hour day",
    args="now_ms minute_period minute_burst hour_period hour_burst day_period day_burst",
    answers=(Taken, Wait),
)
BREAKER: Script[Gone | Stands] = Script(
    "breaker",
    keys="breaker history",
    args="now_ms rules rand who history_max mode_first switch_to wanted n results...",
    answers=(Gone, Stands),
)

# `sale` fields that sale_publish needs; it sets fmt, home, seed_hash, tokens_micro, last_ms, opened itself.
SALE_FIELDS = frozenset(
    {
        "version",
        "line_opens_ms",
        "opens_ms",
        "closes_ms",
        "freeze_ms",
        "beacon_source",
        "beacon_wait_ms",
        "rate_milli",
        "burst",
        "limit",
        "line_max",
        "standby",
        "seed",
        "items",
        "doc",
    }
)
# Fields that sale_switch never touches: they are set once, or by the scripts.
FIXED_FIELDS = frozenset(
    {
        "fmt",
        "epoch",
        "home",
        "version",
        "tokens_micro",
        "last_ms",
        "opened",
        "seed",
        "seed_hash",
        "items",
        "beacon_value",
        "pulse",
        "slow_milli",
        "slow_base_milli",
        "slow_reason",
        "notices",
        "advice_until_ms",
    }
)


@lru_cache(maxsize=1024)
def sale_keys(sale: str) -> SaleKeys:
    return SaleKeys(sale)


class Scripts:
    """The scripts of lua/ as methods. Keywords have the names of the headers; home is the link's run_id.

    Every method: DidNotHappen (repeat when it heals), Unknown (the scripts are idempotent: make the same call again),
    Gone and Old as answers. `now_ms` 0 means the server's clock; tests pass a time.
    """

    def __init__(self, link: Link) -> None:
        self.link = link

    async def _run(self, script: Script[A], keys: Sequence[str], args: Sequence[Arg]) -> A:
        return script.read(await self._raw(script, keys, args))

    async def _raw(
        self,
        script: Script[Any],
        keys: Sequence[str],
        args: Sequence[Arg],
        deadline_s: float | None = None,
    ) -> list[Any]:
        command: list[Arg] = ["EVALSHA", script.sha, len(keys), *keys, *args]
        try:
            reply: list[Any] = await self.link.send(command, script=True, deadline_s=deadline_s)
        except Rejected as error:
            if error.code != "NOSCRIPT":
                raise
            await self.link.call("SCRIPT", "LOAD", script.text)
            # Once: it did not happen the first time.
            reply = await self.link.send(command, script=True, deadline_s=deadline_s)
        return reply

    async def line_join(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        skus: Sequence[str],
        buyers: Sequence[tuple[bytes, int, bool, bytes]],
        backlog_max: int,
        now_ms: int = 0,
    ) -> Gone | Old | Joined:
        """Give a batch of buyers of one item their places.

        buyers: (buyer_id, units >= 1, again, ticket hash of 10 bytes), at most 1000. skus: every item.
        """
        k = sale_keys(sale)
        keys = [k.sale, k.item(sku), k.stock, k.outcome(sku), k.line(sku), k.orders, k.buyers, k.drawn(sku)]
        others = [other for other in skus if other != sku]
        for other in others:
            keys.append(k.item(other))
            keys.append(k.outcome(other))
        ids, units, again, hashes = zip(*buyers, strict=True)
        args: list[Arg] = [
            epoch,
            self.link.run_id,
            now_ms,
            sku,
            backlog_max,
            len(ids),
            "".join(["1" if flag else "0" for flag in again]),
            b"".join(hashes),
            *ids,
            *units,
            *others,
        ]
        reply = await self._raw(LINE_JOIN, keys, args)
        return _joined(reply) if reply[0] == b"JOINED" else LINE_JOIN.read(reply)

    async def line_leave(
        self, *, sale: str, epoch: int, sku: str, seq: int, now_ms: int = 0
    ) -> Gone | Old | Left | NotWaiting:
        """Give up a place in the line, or change nothing."""
        k = sale_keys(sale)
        return await self._run(
            LINE_LEAVE,
            (k.sale, k.item(sku), k.outcome(sku), k.line(sku), k.left(sku)),
            (epoch, self.link.run_id, now_ms, seq),
        )

    async def line_advance(
        self, *, sale: str, epoch: int, sku: str, work_max: int, backlog_max: int, now_ms: int = 0
    ) -> Gone | Old | Closed | Early | Paused | WaitBeacon | Busy | Served:
        """Serve the next ranks of one line, as far as stock, rate, backlog and work allow."""
        return await self._run(
            LINE_ADVANCE,
            self._serve_keys(sale, sku),
            (epoch, self.link.run_id, now_ms, sku, work_max, backlog_max),
        )

    async def units_release(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        seq: int,
        units: int,
        version: int,
        to_byte: bytes,
        status_json: bytes | str,
        work_max: int,
        backlog_max: int,
        now_ms: int = 0,
    ) -> Gone | Old | AlreadyByte | Released:
        """Give a ticket's units back once, and serve standby with them; version: above the one told."""
        k = sale_keys(sale)
        return await self._run(
            UNITS_RELEASE,
            (*self._serve_keys(sale, sku), k.status),
            (
                epoch,
                self.link.run_id,
                now_ms,
                sku,
                seq,
                units,
                version,
                to_byte,
                status_json,
                work_max,
                backlog_max,
            ),
        )

    async def units_retake(
        self, *, sale: str, epoch: int, sku: str, seq: int, units: int, version: int, now_ms: int = 0
    ) -> Gone | Old | Taken | AlreadyByte | Refused:
        """Take the units of an ended ticket again for late money; version: of the row as read."""
        k = sale_keys(sale)
        return await self._run(
            UNITS_RETAKE,
            (k.sale, k.item(sku), k.stock, k.outcome(sku), k.line(sku), k.status),
            (epoch, self.link.run_id, now_ms, sku, seq, units, version),
        )

    async def stock_add(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        units: int,
        id: str,  # noqa: A002
        work_max: int,
        backlog_max: int,
        now_ms: int = 0,
    ) -> Gone | Old | Added | AlreadyUnits | Short:
        """Add units to an item (negative: take unsold ones away), once for each id."""
        return await self._run(
            STOCK_ADD,
            self._serve_keys(sale, sku),
            (epoch, self.link.run_id, now_ms, sku, units, id, work_max, backlog_max),
        )

    async def ticket_mark(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        seq: int,
        version: int,
        byte: bytes,
        status_json: bytes | str,
        keep_ask: bool = False,
        now_ms: int = 0,
    ) -> Gone | Old | Marked | Stale | AlreadyReleased | Not:
        """Tell a winner what the order's row says now, unless something newer was told."""
        k = sale_keys(sale)
        return await self._run(
            TICKET_MARK,
            (k.sale, k.item(sku), k.outcome(sku), k.status),
            (epoch, self.link.run_id, now_ms, sku, seq, version, byte, status_json, int(keep_ask)),
        )

    async def claims_mark(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        before: bytes,
        behind: bytes,
        tickets: Sequence[tuple[int, str, bytes]],
        newest: int,
        now_ms: int = 0,
    ) -> Gone | Old | MarkedEach:
        """Tell up to 1000 claimed tickets that their orders are written, and take their entries off the stream.

        tickets: (seq, order_no, entry id), seqs rising, order numbers of 24 characters; newest: which of them has the
        newest entry, from 0. A ticket is told before + order_no + behind.
        """
        k = sale_keys(sale)
        seqs, numbers, ids = zip(*tickets, strict=True)
        ends = [at for at in range(1, len(seqs)) if seqs[at] != seqs[at - 1] + 1]
        runs = [end - begin for begin, end in zip((0, *ends), (*ends, len(seqs)), strict=True)]
        return await self._run(
            CLAIMS_MARK,
            (k.sale, k.outcome(sku), k.status, k.orders),
            (
                *(epoch, self.link.run_id, now_ms, sku, GROUP, before, behind, newest + 1, "".join(numbers)),
                *(len(runs), len(seqs), *runs, *seqs, *ids),
            ),
        )

    async def ask_put(
        self,
        *,
        sale: str,
        epoch: int,
        sku: str,
        seq: int,
        buyer_id: bytes | str,
        kind: Literal["leave", "pay"],
        arg: str = "-",
        channel: str = "-",
        repeat_ms: int,
        now_ms: int = 0,
    ) -> Gone | Old | Asked | AlreadyAsked | Not:
        """Hand a buyer's wish to the worker, once while it is under way (repeat_ms)."""
        k = sale_keys(sale)
        return await self._run(
            ASK_PUT,
            (k.sale, k.item(sku), k.outcome(sku), k.status, k.asks),
            (
                epoch,
                self.link.run_id,
                now_ms,
                sku,
                seq,
                buyer_id,
                kind,
                arg or "-",
                channel or "-",
                repeat_ms,
            ),
        )

    async def sale_publish(
        self,
        *,
        sale: str,
        fields: Mapping[str, str | int | bytes],
        items: Sequence[tuple[str, int]],
        seed_hash: str,
        now_ms: int = 0,
    ) -> Published | Already | Other | Leftover:
        """Make a sale known to Redis, once. fields: `epoch` and SALE_FIELDS at least."""
        pairs: list[Arg] = []
        for sku, units in items:
            pairs += (sku, units)
        return await self._run(
            SALE_PUBLISH, *self._making(sale, fields, [sku for sku, _ in items], seed_hash, now_ms, pairs)
        )

    async def sale_fence(self, *, sale: str, epoch: int) -> Gone | Fenced | Other:
        """Shut a sale before it is rebuilt. epoch: the one that Postgres knows."""
        return await self._run(SALE_FENCE, (sale_keys(sale).sale,), (epoch,))

    async def sale_rebuild(
        self,
        *,
        sale: str,
        fields: Mapping[str, str | int | bytes],
        items: Sequence[tuple[str, int, int, str, bool]],
        seed_hash: str,
        now_ms: int = 0,
    ) -> Rebuilt | Already | Other:
        """Open a sale again. fields: as of sale_publish. items: (sku, units, first seq, starts, paused)."""
        pairs: list[Arg] = []
        for sku, units, first, starts, paused in items:
            pairs += (sku, units, first, starts, int(paused))
        return await self._run(
            SALE_REBUILD, *self._making(sale, fields, [item[0] for item in items], seed_hash, now_ms, pairs)
        )

    def _making(
        self,
        sale: str,
        fields: Mapping[str, str | int | bytes],
        skus: Sequence[str],
        seed_hash: str,
        now_ms: int,
        pairs: list[Arg],
    ) -> tuple[Sequence[str], Sequence[Arg]]:
        """Keys and arguments of the scripts that bring a sale into being."""
        missing = (SALE_FIELDS | {"epoch"}) - fields.keys()
        if missing:
            raise ValueError(f"a sale misses the fields {sorted(missing)}")
        k = sale_keys(sale)
        defaults: dict[str, str | int | bytes] = {
            "state_word": "scheduled", "paused": 0, "closed": 0, "beacon_value": "", "message": "", "pulse": 0
        }  # fmt: skip
        for field, value in (defaults | dict(fields)).items():
            pairs += (field, value)
        return (
            (k.sale, k.stock, k.buyers, k.orders, k.asks, *[k.item(sku) for sku in skus]),
            (str(fields["epoch"]), self.link.run_id, now_ms, sale, seed_hash, GROUP, len(skus), *pairs),
        )

    async def sale_switch(
        self,
        *,
        sale: str,
        epoch: int,
        version: int,
        changes: Mapping[str, str | int | bytes],
        now_ms: int = 0,
    ) -> Gone | Old | Switched | Stale | ClosedForGood:
        """Change a published sale, in the order of versions. changes: no FIXED_FIELDS."""
        fixed = FIXED_FIELDS & changes.keys()
        if fixed:
            raise ValueError(f"sale_switch: {sorted(fixed)} cannot be changed")
        pairs: list[Arg] = []
        for field, value in changes.items():
            pairs += (field, value)
        return await self._run(
            SALE_SWITCH, (sale_keys(sale).sale,), (epoch, self.link.run_id, now_ms, version, *pairs)
        )

    async def item_switch(
        self, *, sale: str, epoch: int, sku: str, paused: bool, now_ms: int = 0
    ) -> Gone | Old | Switched | Already:
        """Stop or start the admission of one item."""
        k = sale_keys(sale)
        return await self._run(
            ITEM_SWITCH, (k.sale, k.item(sku)), (epoch, self.link.run_id, now_ms, int(paused))
        )

    async def beacon_put(
        self, *, sale: str, epoch: int, value: str, now_ms: int = 0
    ) -> Gone | Old | Put | AlreadyValue | Early:
        """Store the public random value that completes the key of the draw, once, after the freeze."""
        if not value:
            raise ValueError("beacon_put: an empty value means that there is none")
        return await self._run(BEACON_PUT, (sale_keys(sale).sale,), (epoch, self.link.run_id, now_ms, value))

    async def sale_rearm(
        self, *, sale: str, epoch: int, old_home: str, new_home: str, pulse_at_least: int
    ) -> Gone | Old | Armed | Behind | NotHome:
        """Accept a Redis that restarted from its own log as the sale's home again."""
        return await self._run(
            SALE_REARM, (sale_keys(sale).sale,), (epoch, old_home, new_home, pulse_at_least)
        )

    async def sale_pulse(self, *, sale: str, epoch: int, pulse: int, now_ms: int = 0) -> Gone | Old | Pulsed:
        """Write the pulse; Postgres gets it afterwards."""
        return await self._run(SALE_PULSE, (sale_keys(sale).sale,), (epoch, self.link.run_id, now_ms, pulse))

    async def sale_advise(
        self,
        *,
        sale: str,
        epoch: int,
        slow_milli: int,
        base_milli: int,
        reason: str,
        notices: str,
        lease_ms: int,
        now_ms: int = 0,
    ) -> Gone | Old | Advised:
        """Slow admission down (-1: do not), say why, and what tickets say; for lease_ms, then it is over by itself."""
        return await self._run(
            SALE_ADVISE,
            (sale_keys(sale).sale,),
            (epoch, self.link.run_id, now_ms, slow_milli, base_milli, reason, notices, lease_ms),
        )

    async def rate_take(
        self, *, key: str, period_ms: int, burst: int, cost: int = 1, now_ms: int = 0
    ) -> Taken | Wait:
        """Allow one more each period_ms, `burst` at once. key: SaleKeys.rate(...)."""
        return await self._run(RATE_TAKE, (key,), (now_ms, period_ms, burst, cost))

    async def sms_take(
        self,
        *,
        number: str,
        minute_period: int,
        minute_burst: int,
        hour_period: int,
        hour_burst: int,
        day_period: int,
        day_burst: int,
        now_ms: int = 0,
    ) -> Taken | Wait:
        """Allow one more text to a number under all three limits, or count nothing. number: its index in hex."""
        args = (now_ms, minute_period, minute_burst, hour_period, hour_burst, day_period, day_burst)
        return await self._run(SMS_TAKE, sms_limits(number), args)

    async def breaker(
        self,
        *,
        name: str,
        rules: str,
        rand: float,
        who: str,
        history_max: int,
        mode_first: str = "auto",
        switch_to: str = "",
        wanted: int = 0,
        results: Sequence[tuple[int, int, int, str, str]] = (),
        now_ms: int = 0,
        deadline_s: float | None = None,
    ) -> Gone | Stands:
        """One turn of the breaker shared under `name`: learn `results`, obey `switch_to`, give `wanted` permits.

        results: (generation, serial, took_ms, s|f|i, error). mode_first '': only look, Gone if it is not there.
        Not idempotent, and harmless: a result sent twice is one call too many in the window, a permit that was given
        to nobody ends with its lease.
        """
        args: list[Arg] = [
            now_ms, rules, repr(rand), who, history_max, mode_first, switch_to, wanted, len(results),
        ]  # fmt: skip
        for result in results:
            args += result
        return BREAKER.read(
            await self._raw(BREAKER, (breaker_key(name), breaker_history_key(name)), args, deadline_s)
        )

    @staticmethod
    def _serve_keys(sale: str, sku: str) -> tuple[str, ...]:
        k = sale_keys(sale)
        return (k.sale, k.item(sku), k.stock, k.outcome(sku), k.line(sku), k.orders)


assert FORMAT == 1, "the scripts write format 1"
