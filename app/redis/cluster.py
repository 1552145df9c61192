"""A Redis Cluster as one Link: every call goes to the primary that serves its key's slot.

redis+cluster://[user:password@]host:port,host:port,…   some nodes, from which the others are learned; rediss+cluster://

One sale is one hash tag is one slot (app/keys.py), so a sale is as on a server of its own: its scripts, its order of
calls, its home are those of one node. A cluster spreads sales; it does not split one. While a node is away its sales
fail (DidNotHappen), the others go on. The table of slots is asked for again when a node is away, when a call was sent
to the wrong one, and now and then. MOVED and ASK say that nothing was done: the call is made once more, where it
belongs, with the home of *that* node: what is fenced stays fenced (docs/adr/0012).
"""

from __future__ import annotations

import asyncio
import binascii
import logging
import random
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from app.errors import CannotStart, DidNotHappen, Unknown
from app.redis.address import REDIS_PORT, place_of
from app.redis.link import (
    CALLS_MAX,
    CANNOT_CONNECT,
    CONNECT_DEADLINE_S,
    Arg,
    Link,
    Rejected,
    Reply,
    keeper_ended,
    pack,
)

log = logging.getLogger("fairdrop.redis")

SLOTS = 16_384
REFRESH_EVERY_S = 10.0  # between two looks at the table while all is well: a moved slot nobody calls is found
LOOK_EVERY_S = (
    0.1  # between two looks at the nodes; a lost one is noticed by its link, this is how soon we ask
)
AWAY_MAX_S = 0.4  # the longest pause between two looks at the table while a node is away
ELSEWHERE = frozenset({"MOVED", "ASK"})
STALE = frozenset({"MOVED", "CLUSTERDOWN", "READONLY", "MASTERDOWN"})  # the table may have changed
_AFTER_TWO = frozenset({"XINFO", "XGROUP", "OBJECT", "MEMORY"})  # COMMAND SUBCOMMAND key


def slot_of(key: str | bytes) -> int:
    """The slot of a key: CRC16 of its hash tag, or of the whole key (Redis Cluster specification)."""
    raw = key.encode() if isinstance(key, str) else key
    start = raw.find(b"{")
    if start >= 0:
        end = raw.find(b"}", start + 1)
        if end > start + 1:
            raw = raw[start + 1 : end]
    return binascii.crc_hqx(raw, 0) % SLOTS


def key_of(command: Sequence[Arg]) -> str | bytes | None:
    """The first key of a command as we use them; None: it has none."""
    name = command[0]
    if name in ("EVALSHA", "EVAL"):
        key: Arg | None = command[3] if int(command[2]) else None
    elif name in ("XREADGROUP", "XREAD"):
        key = command[command.index("STREAMS") + 1]
    elif name in _AFTER_TWO:
        key = command[2]
    elif name in ("TIME", "INFO", "PING", "SCRIPT", "MULTI", "EXEC", "CLUSTER", "CONFIG"):
        key = None
    else:
        key = command[1]
    return str(key) if isinstance(key, int) else key


def open_link(
    url: str, *, deadline_s: float = 2.0, name: str = "fairdrop", calls_max: int = CALLS_MAX
) -> Link:
    """The link for an address of whichever kind. CannotStart: it is none of ours."""
    kind = Cluster if urlsplit(url).scheme in ("redis+cluster", "rediss+cluster") else Link
    return kind(url, deadline_s=deadline_s, name=name, calls_max=calls_max)


class _Node(Link):
    """The link to one primary. It tells the cluster when a call came to the wrong node."""

    stale: asyncio.Event | None = None

    def _server_error(self, code: str) -> None:
        super()._server_error(code)
        if self.stale is not None and code in STALE:
            self.stale.set()


class Cluster(Link):
    """One Link for each primary of a Redis Cluster, chosen by the slot of the key.

    `run_id` is empty: a home is that of a node, see `home_of`. `connected`: to any node; `trouble` names those away.
    Errors as of Link. A pipeline may go to several nodes: the commands of a node that failed have its error in place
    of an answer, and only if no node answered is it raised.
    """

    spread = True

    def __init__(
        self, url: str, *, deadline_s: float = 2.0, name: str = "fairdrop", calls_max: int = CALLS_MAX
    ) -> None:
        # Not Link's own: there is no connection of the cluster's.
        self.url = url
        self.name = name
        self.deadline_s = deadline_s
        self.calls_max = calls_max
        self.run_id = ""
        try:
            parts = urlsplit(url)
            userinfo, _, hosts = parts.netloc.rpartition("@")
            user, _, password = userinfo.partition(":")
            if parts.path.strip("/") not in ("", "0"):
                raise ValueError("a cluster has one database")
            self._seeds = [place_of(one, REDIS_PORT) for one in hosts.split(",")]
        except ValueError as error:
            raise CannotStart(
                "the Redis address (FAIRDROP_REDIS_URL) is not a URL like"
                " redis+cluster://:password@host:6379,host:6379,host:6379"
            ) from error
        self._scheme = "rediss" if parts.scheme == "rediss+cluster" else "redis"
        secret = (
            f"{quote(unquote(user), safe='')}:{quote(unquote(password), safe='')}@"
            if user or password
            else ""
        )
        self._prefix = f"{self._scheme}://{secret}"
        self._nodes: dict[tuple[str, int], _Node] = {}  # the primaries
        self._others: list[tuple[str, int]] = []  # replicas: they know the table, too
        self._nobody = _Node("redis://127.0.0.1:1", deadline_s=deadline_s)  # never started
        self._nobody.trouble = "no node serves this slot"
        self._slots: list[_Node] = [self._nobody] * SLOTS
        self._stale = asyncio.Event()
        self._keeper = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._unreachable = "it has not been asked yet"

    # what the readers of a Link look at

    @property
    def where(self) -> str:
        """The primaries."""
        return ", ".join(f"{host}:{port}" for host, port in sorted(self._nodes)) or "a cluster"

    @property
    def connected(self) -> bool:  # type: ignore[override]  # of several: it cannot be set
        return any(node.connected for node in self._nodes.values())

    @property
    def trouble(self) -> str:  # type: ignore[override]
        if not self._nodes:
            return self._unreachable
        away = [
            f"{host}:{port} {node.trouble or 'not connected'}"
            for (host, port), node in self._nodes.items()
            if not node.connected
        ]
        if self._nobody in self._slots:
            away.append("some slots have no primary")
        return "; ".join(away)

    def at(self, key: str | bytes) -> Link:
        return self._slots[slot_of(key)]

    def home_of(self, key: str | bytes) -> str:
        return self._slots[slot_of(key)].run_id

    async def is_elected(self, key: str | bytes) -> bool:
        """Whether most primaries' tables have this key's slot on the node that we take it to be on."""
        slot, node, asked = slot_of(key), self.at(key), dict(self._nodes)
        tables = await asyncio.gather(
            *(one.call("CLUSTER", "SLOTS") for one in asked.values()), return_exceptions=True
        )
        agree = 0
        for place, table in zip(asked, tables, strict=True):
            if isinstance(table, BaseException):
                if not isinstance(table, DidNotHappen | Unknown):
                    raise table
                continue
            primary = next((row[2] for row in table if int(row[0]) <= slot <= int(row[1])), None)
            agree += primary is not None and asked.get(_node_of(primary, place)) is node
        return agree > len(asked) / 2

    # life

    async def start(self) -> None:
        """Begin to connect; returns when the table has been asked for once and each node has been tried."""
        if self._keeper is None:
            await self._refresh()
            self._keeper = asyncio.create_task(self._keep_table(), name=f"redis cluster {self.name}")
            self._keeper.add_done_callback(keeper_ended)

    async def close(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await asyncio.gather(*(node.close() for node in self._nodes.values()))
        self._nodes.clear()
        self._slots = [self._nobody] * SLOTS

    async def check_server(self) -> str:
        """As of a Link, by the first node that answers; CannotStart also if the nodes are no cluster."""
        refused: CannotStart | None = None
        for place in self._seeds:
            one = Link(self._url(place), deadline_s=self.deadline_s, name=self.name)
            try:
                said = await one.check_server()
                table = await one.ask_once("CLUSTER", "SLOTS")
            except CannotStart as error:
                refused = refused or error
                continue
            except Rejected as error:
                raise CannotStart(
                    f"{place[0]}:{place[1]} is not a node of a Redis Cluster: {error}"
                ) from error
            except CANNOT_CONNECT as error:
                refused = refused or CannotStart(f"{place[0]}:{place[1]} does not name its cluster: {error}")
                continue
            served = sum(int(row[1]) - int(row[0]) + 1 for row in table)
            if served < SLOTS:
                raise CannotStart(
                    f"the Redis Cluster at {place[0]}:{place[1]} serves only {served} of {SLOTS} slots"
                )
            return f"{said}, a cluster of {len({_node_of(row[2], place) for row in table})} primaries"
        assert refused is not None
        raise refused

    # calls

    def send(
        self, args: Sequence[Arg], *, deadline_s: float | None = None, script: bool = False
    ) -> asyncio.Future[Reply]:
        return self._of(args).send(args, deadline_s=deadline_s, script=script)

    async def call(self, *args: Arg, deadline_s: float | None = None) -> Reply:
        try:
            return await self.send(args, deadline_s=deadline_s)
        except Rejected as error:
            if error.code not in ELSEWHERE:
                raise
            return await self.again(error, args, deadline_s=deadline_s)

    async def again(
        self,
        error: Rejected,
        args: Sequence[Arg],
        *,
        script: bool = False,
        home_at: int | None = None,
        deadline_s: float | None = None,
    ) -> Reply:
        node = await self._follow(error)
        command = list(args)
        if home_at is not None:
            command[home_at] = node.run_id
        if error.code != "ASK":
            return await node.send(command, deadline_s=deadline_s, script=script)
        asking = node._send(pack(("ASKING",), command), 2, True, script, deadline_s)
        reply = (await asking)[1]
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def pipeline(
        self, commands: Sequence[Sequence[Arg]], *, deadline_s: float | None = None
    ) -> list[Reply]:
        """As of Link; a command without a key goes along with the next that has one. MULTI: all of it to one node."""
        if not commands:
            return []
        nodes = self._nodes_of(commands)
        if len(set(nodes)) == 1:
            replies = await nodes[0].pipeline(commands, deadline_s=deadline_s)
        else:
            places: dict[_Node, list[int]] = {}
            for at, node in enumerate(nodes):
                places.setdefault(node, []).append(at)
            answers = await asyncio.gather(
                *(
                    node.pipeline([commands[at] for at in ats], deadline_s=deadline_s)
                    for node, ats in places.items()
                ),
                return_exceptions=True,
            )
            replies = [None] * len(commands)
            failed: list[BaseException] = []
            for ats, answer in zip(places.values(), answers, strict=True):
                if isinstance(answer, BaseException):
                    if not isinstance(answer, DidNotHappen | Unknown):
                        raise answer
                    failed.append(answer)
                    answer = [answer] * len(ats)
                for at, reply in zip(ats, answer, strict=True):
                    replies[at] = reply
            if len(failed) == len(places):
                raise failed[0]
        if any(isinstance(reply, Rejected) and reply.code in ELSEWHERE for reply in replies):
            replies = await self._elsewhere(commands, replies, deadline_s)
        return replies

    # where

    def _of(self, command: Sequence[Arg]) -> Link:
        key = key_of(command)
        return self._any() if key is None else self.at(key)

    def _any(self) -> _Node:
        return next((node for node in self._nodes.values() if node.connected), self._nobody)

    def _nodes_of(self, commands: Sequence[Sequence[Arg]]) -> list[_Node]:
        found: list[_Node | None] = []
        for command in commands:
            key = key_of(command)
            found.append(None if key is None else self._slots[slot_of(key)])
        nodes: list[_Node] = []
        following = next((node for node in reversed(found) if node is not None), None) or self._any()
        for node in reversed(found):
            following = node or following
            nodes.append(following)
        nodes.reverse()
        return nodes

    async def _elsewhere(
        self, commands: Sequence[Sequence[Arg]], replies: list[Reply], deadline_s: float | None
    ) -> list[Reply]:
        """Make what came to the wrong node once more. A transaction as a whole: none of it was done (EXECABORT)."""
        wrong = {
            at: reply
            for at, reply in enumerate(replies)
            if isinstance(reply, Rejected) and reply.code in ELSEWHERE
        }
        if any(command[0] == "MULTI" for command in commands):
            first = next(iter(wrong.values()))
            if first.code == "MOVED":
                return await (await self._follow(first)).pipeline(commands, deadline_s=deadline_s)
            return replies  # in the middle of a migration: did not happen
        for at, error in wrong.items():
            try:
                replies[at] = await self.again(error, commands[at], deadline_s=deadline_s)
            except (DidNotHappen, Unknown) as failure:
                replies[at] = failure
        return replies

    async def _follow(self, error: Rejected) -> _Node:
        """The node that a MOVED or ASK names; a new one is connected to first."""
        _, slot, place = str(error).split(" ", 2)
        host, _, port = place.rpartition(":")
        if not host:
            host = next(iter(self._nodes), self._seeds[0])[0]
        known = (host.strip("[]"), int(port))
        node = self._nodes.get(known)
        if node is None:
            node = self._new(known)
        await node.start()
        if error.code == "MOVED":
            self._slots[int(slot)] = node
            self._stale.set()
        return node

    def _new(self, place: tuple[str, int]) -> _Node:
        node = _Node(self._url(place), deadline_s=self.deadline_s, name=self.name, calls_max=self.calls_max)
        node.stale = self._stale
        self._nodes[place] = node
        return node

    def _url(self, place: tuple[str, int]) -> str:
        host = f"[{place[0]}]" if ":" in place[0] else place[0]
        return f"{self._prefix}{host}:{place[1]}/0"

    # the table

    async def _keep_table(self) -> None:
        """Ask for the table when it is old or may be wrong; more often, with growing pauses, while a node is away."""
        asked_at, pause_s = time.monotonic(), LOOK_EVERY_S
        while True:
            await asyncio.sleep(LOOK_EVERY_S * random.uniform(0.8, 1.2))
            age_s = time.monotonic() - asked_at
            if self._stale.is_set():
                pause_s = LOOK_EVERY_S
            elif self.trouble:
                if age_s < pause_s:
                    continue
                pause_s = min(pause_s * 1.5, AWAY_MAX_S)
            else:
                pause_s = LOOK_EVERY_S
                if age_s < REFRESH_EVERY_S:
                    continue
            self._stale.clear()
            await self._refresh()
            asked_at = time.monotonic()

    async def _refresh(self) -> None:
        """Take over the table of the first node that tells it; nobody does: the old one stays."""
        nodes = [node for node in self._nodes.values() if node.connected]
        random.shuffle(nodes)
        for node in nodes:
            try:
                table = await node.call("CLUSTER", "SLOTS", deadline_s=CONNECT_DEADLINE_S)
                place = next(place for place, known in self._nodes.items() if known is node)
                await self._take(table, place)
                return
            except (*CANNOT_CONNECT, IndexError, AttributeError, StopIteration) as error:
                self._unreachable = str(error) or type(error).__name__
        for place in dict.fromkeys((*self._seeds, *self._others)):
            try:
                one = Link(self._url(place), deadline_s=self.deadline_s, name=self.name)
                await self._take(await one.ask_once("CLUSTER", "SLOTS"), place)
                return
            except (*CANNOT_CONNECT, IndexError, AttributeError) as error:
                said = f"{place[0]}:{place[1]}: {error or type(error).__name__}"
                if said != self._unreachable:
                    log.warning("redis: no table of the cluster's slots from %s", said)
                self._unreachable = said

    async def _take(self, table: list[Any], asked: tuple[str, int]) -> None:
        """Connect to the primaries that are new, route by the table, let the others go."""
        if not table:
            raise ValueError("the node knows of no slots")
        slots: list[_Node] = [self._nobody] * SLOTS
        primaries: set[tuple[str, int]] = set()
        others: list[tuple[str, int]] = []
        fresh: list[_Node] = []
        for first, last, primary, *replicas in table:
            place = _node_of(primary, asked)
            node = self._nodes.get(place)
            if node is None:
                node = self._new(place)
                fresh.append(node)
            primaries.add(place)
            others += [_node_of(replica, asked) for replica in replicas]
            slots[int(first) : int(last) + 1] = [node] * (int(last) + 1 - int(first))
        await asyncio.gather(*(node.start() for node in fresh))
        self._slots, self._others = slots, others
        for place in self._nodes.keys() - primaries:
            log.info("redis: %s:%s serves no slots any more", *place)
            task = asyncio.create_task(self._retire(self._nodes.pop(place)))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _retire(self, node: _Node) -> None:
        """Leave calls under way their time, then close."""
        try:
            await asyncio.sleep(self.deadline_s)
        finally:
            await node.close()


def _node_of(told: Sequence[Any], asked: tuple[str, int]) -> tuple[str, int]:
    """Host and port of a row of CLUSTER SLOTS; a node that does not know its own address is the one that was asked."""
    host = told[0].decode() if told[0] else ""
    return (host if host and host != "?" else asked[0]), int(told[1])
