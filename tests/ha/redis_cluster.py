"""A Redis Cluster of six real servers: three primaries that share the slots, a replica of each; built by hand.

with RedisCluster(home) as cluster: …   .url .nodes .primary_of(key) .kill(node) .start(node) .move(slot, to)
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis as redis_sync

from app.embedded import Valkey, find_valkey, make_folder
from app.redis.cluster import SLOTS, slot_of
from tests.sockets import quiet_port

PRIMARIES = 3
NODE_TIMEOUT_MS = (
    2_500  # after which a silent node is suspected: a busy machine's is not. 15,000 is the default
)
READY_WITHIN_S = 180.0


class Node:
    """One server, and its id in the cluster."""

    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
        self.id = ""

    @property
    def port(self) -> int:
        return self.valkey.port

    def client(self) -> redis_sync.Redis:
        return redis_sync.Redis.from_url(self.valkey.url, socket_timeout=60)

    def ask(self, *command: Any) -> Any:
        with contextlib.closing(self.client()) as client:
            return client.execute_command(*command)


class RedisCluster:
    """Six servers under one folder; nothing of them outlives `close`."""

    def __init__(self, home: Path) -> None:
        self.password = secrets.token_urlsafe(12)
        make_folder(home)
        self.nodes: list[Node] = []
        for number in range(2 * PRIMARIES):
            settings = {
                "cluster-enabled": "yes",
                "cluster-port": str(quiet_port()),
                "cluster-node-timeout": str(NODE_TIMEOUT_MS),
                # One part of the slots without a primary must not stop the sales of the others.
                "cluster-require-full-coverage": "no",
                "cluster-replica-validity-factor": "0",
                "cluster-announce-ip": "127.0.0.1",
                "masterauth": self.password,
                "repl-diskless-sync-delay": "0",
                "repl-timeout": "5",
            }
            self.nodes.append(
                Node(Valkey(home / f"n{number}", self.password, server=find_valkey(), settings=settings))
            )

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"redis+cluster://:{quote(self.password, safe='')}@{hosts}"

    def __enter__(self) -> RedisCluster:
        try:
            for node in self.nodes:
                node.valkey.start()
                node.id = node.ask("CLUSTER", "MYID").decode()
            self._join()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for node in self.nodes:
            node.valkey.kill()

    def _join(self) -> None:
        """What `redis-cli --cluster create` does."""
        first = self.nodes[0]
        for number, node in enumerate(self.nodes):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < PRIMARIES:
                begin, end = SLOTS * number // PRIMARIES, SLOTS * (number + 1) // PRIMARIES - 1
                node.ask("CLUSTER", "ADDSLOTSRANGE", begin, end)
            if node is not first:
                first.ask("CLUSTER", "MEET", "127.0.0.1", node.port, node.valkey.settings["cluster-port"])
        ids = {node.id for node in self.nodes}
        self.until(lambda: all(ids <= self._known(node) for node in self.nodes), "everybody knows everybody")
        for number, node in enumerate(self.nodes[PRIMARIES:]):
            node.ask("CLUSTER", "REPLICATE", self.nodes[number].id)
        self.until(self.is_whole, "every primary has its replica")

    def until(self, reached: Callable[[], object], what: str, within_s: float = READY_WITHIN_S) -> None:
        deadline = time.monotonic() + within_s
        while not reached():
            assert time.monotonic() < deadline, f"never: {what}"
            time.sleep(0.05)

    @staticmethod
    def _known(node: Node) -> set[str]:
        return {line.split()[0] for line in _lines(node.ask("CLUSTER", "NODES"))}

    def is_whole(self) -> bool:
        """All slots have a primary, every primary a replica that is in step, and all servers see it so."""
        for node in self.nodes:
            if not node.valkey.running():
                return False
            if b"cluster_state:ok" not in node.ask("CLUSTER", "INFO"):
                return False
            replication = node.ask("INFO", "replication")
            if replication["role"] == "master" and (
                replication["connected_slaves"] < 1 or replication["slave0"]["state"] != "online"
            ):
                return False
            if replication["role"] == "slave" and replication["master_link_status"] != "up":
                return False
            flags = [line.split()[2] for line in _lines(node.ask("CLUSTER", "NODES"))]
            if any("fail" in flag or "handshake" in flag for flag in flags):
                return False
        return len(self.primaries()) == PRIMARIES

    def primaries(self) -> list[Node]:
        return [
            node
            for node in self.nodes
            if node.valkey.running() and node.ask("INFO", "replication")["role"] == "master"
        ]

    def primary_of(self, key: str, *, without: Node | None = None) -> Node:
        """The server that the cluster, as its live nodes but `without` see it, sends this key's commands to."""
        slot = slot_of(key)
        for asked in self.nodes:
            if asked is without or not asked.valkey.running():
                continue
            table = asked.ask("CLUSTER", "SLOTS")
            for first, last, primary, *_ in table:
                if first <= slot <= last:
                    return next(node for node in self.nodes if node.port == primary[1])
        raise AssertionError(f"nobody serves slot {slot}")

    # what is done to it

    def move(self, slot: int, to: Node) -> None:
        """Migrate one slot, live, as `redis-cli --cluster reshard` does it."""
        source = next(node for node in self.primaries() if self._serves(node, slot))
        to.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)
        while names := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.ask("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "AUTH", self.password, "KEYS", *names)
        for node in (to, source, *self.primaries()):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", to.id)

    @staticmethod
    def _serves(node: Node, slot: int) -> bool:
        for line in _lines(node.ask("CLUSTER", "NODES")):
            words = line.split()
            if "myself" in words[2]:
                for part in words[8:]:
                    if part.startswith("["):
                        continue
                    begin, _, end = part.partition("-")
                    if int(begin) <= slot <= int(end or begin):
                        return True
        return False


def _lines(told: bytes) -> list[str]:
    return told.decode().splitlines()
