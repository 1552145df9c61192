"""A Redis with two replicas and three sentinels on this machine, from the same binary, each on a port of its own."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from pathlib import Path
from urllib.parse import quote

import redis as redis_sync

from app.embedded import Valkey, make_folder

SERVICE = "fairdrop"
DOWN_AFTER_MS = 1_000  # what deploy/sentinel.conf has
REPLICA_LAG_MAX_S = 5
IN_STEP_WITHIN_S = 180.0


class Sentinel(Valkey):
    """A sentinel. It keeps what it learns in its own configuration, which is therefore written once."""

    name = "Sentinel"

    def prepare(self) -> None:
        if not self.config_path.exists():
            super().prepare()

    def command(self) -> list[str]:
        return [*super().command(), "--sentinel"]


class Watched:
    """Six processes. `url` is the address for Fairdrop; `primary` is who it was when this was started."""

    def __init__(self, home: Path) -> None:
        make_folder(home)
        self.home = home
        self.password = secrets.token_urlsafe(12)
        self.servers = [
            Valkey(
                home / f"server{number}",
                self.password,
                settings={
                    "masterauth": f'"{self.password}"',
                    "min-replicas-to-write": "1",
                    "min-replicas-max-lag": str(REPLICA_LAG_MAX_S),
                    "repl-diskless-sync-delay": "0",
                    "repl-ping-replica-period": "1",
                },
            )
            for number in range(3)
        ]
        self.sentinels = [Sentinel(home / f"sentinel{number}", secrets_of(self)) for number in range(3)]

    @property
    def url(self) -> str:
        places = ",".join(f"127.0.0.1:{one.port}" for one in self.sentinels)
        password = quote(self.password, safe="")
        theirs = quote(self.sentinels[0].password, safe="")
        return f"redis+sentinel://:{password}@{places}/{SERVICE}?sentinel_password={theirs}"

    @property
    def primary(self) -> Valkey:
        return self.servers[0]

    def start(self) -> None:
        first, *replicas = self.servers
        first.start()
        for one in replicas:
            one.settings["replicaof"] = f"127.0.0.1 {first.port}"
            one.start()
        for one in self.sentinels:
            one.settings = {
                "bind": "127.0.0.1",
                "protected-mode": "yes",
                "logfile": '""',
                "sentinel monitor": f"{SERVICE} 127.0.0.1 {first.port} 2",
                "sentinel auth-pass": f'{SERVICE} "{self.password}"',
                "sentinel down-after-milliseconds": f"{SERVICE} {DOWN_AFTER_MS}",
                "sentinel failover-timeout": f"{SERVICE} 10000",
                "sentinel parallel-syncs": f"{SERVICE} 2",
            }
            one.start()
        self.until_in_step()

    def kill(self) -> None:
        for one in (*self.sentinels, *self.servers):
            one.kill()

    def close(self) -> None:
        """End them all; nothing in them is needed any more."""
        self.kill()
        shutil.rmtree(self.home)

    def role_of(self, server: Valkey) -> str:
        """`master` or `slave`, by what the server says of itself; empty: it says nothing now."""
        with contextlib.closing(self.client(server)) as client, contextlib.suppress(redis_sync.RedisError):
            return str(client.info("replication")["role"])
        return ""

    def ask_for_failover(self) -> None:
        """As an operator does before maintenance: the primary lives, and a replica takes over."""
        with contextlib.closing(self.client(self.sentinels[0])) as client:
            client.execute_command("SENTINEL", "FAILOVER", SERVICE)

    def client(self, server: Valkey) -> redis_sync.Redis:
        return redis_sync.Redis(port=server.port, password=server.password, decode_responses=True)

    def until_in_step(self) -> None:
        """Wait until both replicas follow and every sentinel knows all others, which a failover needs."""
        deadline = time.monotonic() + IN_STEP_WITHIN_S
        with contextlib.ExitStack() as stack:
            sentinels = [stack.enter_context(contextlib.closing(self.client(one))) for one in self.sentinels]
            primary = stack.enter_context(contextlib.closing(self.client(self.primary)))

            def in_step() -> bool:
                said = [one.execute_command("SENTINEL", "MASTER", SERVICE) for one in sentinels]
                said = [
                    one if isinstance(one, dict) else dict(zip(one[::2], one[1::2], strict=True))
                    for one in said
                ]
                good = primary.info("replication").get("min_slaves_good_slaves")
                return good == 2 and all(
                    int(one["num-slaves"]) == 2 and int(one["num-other-sentinels"]) == 2 for one in said
                )

            while not in_step():
                assert time.monotonic() < deadline, "the replicas and sentinels never came into step"
                time.sleep(0.05)


def secrets_of(watched: Watched) -> str:
    """The password of the sentinels: not that of Redis."""
    return f"s-{watched.password}"
