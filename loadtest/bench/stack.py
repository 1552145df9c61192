"""What is measured, started on this machine: a store or a whole system, front doors of several kinds, and the peers.

`Shopfront` is the front door alone: Redis with appendfsync always and front processes; no worker, no Postgres. Sales
are published straight into Redis, as the office would. Everything listens on loopback and ends with the benchmark.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from app import keys
from app.answers import Published
from app.draw import seed_hash
from app.embedded import Valkey, free_port, make_folder
from app.keys import SaleKeys
from app.redis.link import Link
from app.scripts import Scripts
from app.tokens import Keyring
from loadtest.bench.machine import Pinning, cores, family, on_cores, pin
from loadtest.bench.requests import SKU, Joins
from loadtest.bench.rounds import RedisNumbers
from loadtest.run import CHECKOUT, STOP_WITHIN_S

FRONT = "app.cli"  # what is run as `front`
START_WITHIN_S = 30.0
SEED = bytes(range(32))
HOUR_MS = 3_600_000
FIRST_BUYER = 1_000_000_000  # ten digits, as the ids of a big shop have
BACKLOG_MAX = 100_000_000  # claims: the front alone is measured, nothing takes them out of the stream


@dataclass
class Server:
    """Processes that share one port and serve the same thing."""

    name: str
    port: int
    processes: list[subprocess.Popen[bytes]]

    @property
    def pids(self) -> list[int]:
        return [pid for process in self.processes for pid in family(process.pid)]

    async def answers(self, path: str = "/healthz") -> None:
        """Return when every process listens. RuntimeError: one ended, or did not within START_WITHIN_S."""
        deadline = time.monotonic() + START_WITHIN_S
        ask = f"GET {path} HTTP/1.1\r\nHost: fairdrop\r\nConnection: close\r\n\r\n".encode()
        good = 0
        while good < 3 * len(
            self.processes
        ):  # the kernel spreads connections: each has answered, most likely
            if any(process.poll() is not None for process in self.processes):
                raise RuntimeError(f"{self.name} ended with status {[p.returncode for p in self.processes]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not answer within {START_WITHIN_S:.0f} s")
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(ask)
                good += (await reader.readline()).startswith(b"HTTP/1.1 ")
                writer.close()
            except OSError:
                good = 0
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def spawn(
    name: str, command: Sequence[str], port: int, environment: Mapping[str, str], pinning: Pinning
) -> Server:
    """Start one process for each core set of the pinning."""
    processes = []
    for wanted in pinning.api:
        with on_cores(wanted):
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command], cwd=CHECKOUT, env=dict(environment), stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
            )  # fmt: skip
    return Server(name, port, processes)


async def redis_numbers(link: Link) -> RedisNumbers:
    """What Redis says of itself: INFO cpu, stats, commandstats."""
    fields: dict[str, str] = {}
    for part in await link.pipeline([["INFO", "cpu"], ["INFO", "stats"], ["INFO", "commandstats"]]):
        fields |= dict(line.split(":", 1) for line in bytes(part).decode().splitlines() if ":" in line)
    calls = fields.get("cmdstat_evalsha", "calls=0").split(",")[0].removeprefix("calls=")
    return RedisNumbers(
        cpu_s=float(fields["used_cpu_sys"]) + float(fields["used_cpu_user"]),
        commands=int(fields["total_commands_processed"]),
        scripts=int(calls),
    )


class Shopfront:
    """Redis, the front doors in front of it, and what office and worker would do to it. For `async with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signing_key = secrets.token_urlsafe(48)
        self.ring = Keyring([self.signing_key.encode()])
        self.valkey = Valkey(folder / "valkey", secrets.token_urlsafe(12), log_path=folder / "valkey.log")
        self.cores = cores()  # of the machine, before the generator goes to its own
        self.pinning = Pinning.of(1, self.cores)
        self.versions: dict[str, int] = {}
        self.servers: list[Server] = []
        self._buyers = FIRST_BUYER

    async def __aenter__(self) -> Self:
        os.sched_setaffinity(0, self.pinning.rest)
        self.valkey.start()
        self.link = Link(self.valkey.url, deadline_s=30, name="bench")
        await self.link.start()
        self.scripts = Scripts(self.link)
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self.servers:
            server.stop()
        await self.link.close()
        self.valkey.stop()
        os.sched_setaffinity(0, self.cores)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": str(CHECKOUT),
            "FAIRDROP_ENV": "development",
            "FAIRDROP_REDIS_URL": self.valkey.url,
            "FAIRDROP_DATA_DIR": str(self.folder),
            "FAIRDROP_SIGNING_KEYS": self.signing_key,
            "FAIRDROP_PII_KEYS": "11" * 32,
            "FAIRDROP_JWT_SECRET": secrets.token_urlsafe(48),
            "FAIRDROP_ORDERS_BACKLOG_MAX": str(BACKLOG_MAX),
            "FAIRDROP_DRAIN_S": "0",
            "FAIRDROP_LOG_LEVEL": "warning",
        }

    async def front(
        self, server: str = "uvicorn", workers: int = 1, module: str = FRONT, **settings: str
    ) -> Server:
        """A front door with so many processes. settings: FAIRDROP_* in lower case, without the prefix."""
        environment = self.environment | {
            f"FAIRDROP_{name.upper()}": value for name, value in settings.items()
        }
        port = free_port()
        command = [
            "-m",
            module,
            "front",
            "--port",
            str(port),
            "--server",
            server,
            "--workers",
            str(workers),
        ]
        alone = self.pinning
        found = spawn(f"front ({server} × {workers})", command, port, environment, alone)
        self.servers.append(found)
        await found.answers()
        if workers > 1:
            spread = Pinning.of(workers, self.cores)
            children = [pid for pid in found.pids if pid != found.processes[0].pid]
            for pid, wanted in zip(children, spread.api, strict=False):
                pin([pid], wanted)
        return found

    async def peer(
        self, app: str, server: str = "uvicorn", workers: int = 1, path: str = "/", **environment: str
    ) -> Server:
        """One of loadtest/peers on the same server program, with as many processes."""
        port = free_port()
        command = [
            "-m",
            "loadtest.peers.serve",
            f"loadtest.peers.{app}",
            "--port",
            str(port),
            "--server",
            server,
        ]
        told = self.environment | environment
        found = spawn(f"{app} ({server} × {workers})", command, port, told, Pinning.of(workers, self.cores))
        self.servers.append(found)
        await found.answers(path)
        return found

    def drop(self, server: Server) -> None:
        self.servers.remove(server)
        server.stop()

    async def numbers(self) -> RedisNumbers:
        """Redis' own books so far."""
        return await redis_numbers(self.link)

    async def publish(
        self,
        sale: str,
        *,
        units: int,
        opens_in_s: float = -1.0,
        standby: bool = False,
        rate_milli: int = -1,
        line_max: int = 100_000_000,
    ) -> Joins:
        """Publish a sale of one item; returns the supply of its buyers."""
        now_ms = int(time.time() * 1000)
        opens_ms = now_ms + int(opens_in_s * 1000)
        closes_ms = now_ms + 12 * HOUR_MS
        facts = {
            "title": "Phone, first batch",
            "items": [
                {"sku": SKU, "title": "Phone, 128 GB", "price_minor": 499_900, "currency": "CNY", "units": units}
            ],
            "limit": 1, "standby": standby, "pass": "required", "challenge": "none", "audience": None,
            "channels": ["sandbox"], "default_channel": "sandbox", "return_urls": [], "pay_within_s": 600,
            "beacon": "none", "draw_freeze_s": 0,
        }  # fmt: skip
        fields: dict[str, str | int | bytes] = {
            "epoch": 1, "version": 1, "line_opens_ms": now_ms - 2_000, "opens_ms": opens_ms, "closes_ms": closes_ms,
            "freeze_ms": opens_ms, "beacon_source": "none", "beacon_wait_ms": 0, "rate_milli": rate_milli,
            "burst": 1, "limit": 1, "line_max": line_max, "standby": int(standby), "seed": SEED.hex(), "items": SKU,
            "doc": json.dumps(facts), "state_word": "open",
        }  # fmt: skip
        answer = await self.scripts.sale_publish(
            sale=sale, fields=fields, items=[(SKU, units)], seed_hash=seed_hash(SEED)
        )
        if not isinstance(answer, Published):
            raise RuntimeError(f"sale {sale} was not published: {answer}")
        self.versions[sale] = 1
        await self._announce(sale)
        self._buyers += 200_000_000
        return Joins(self.ring, sale, closes_ms + HOUR_MS, self._buyers)

    async def switch(self, sale: str, **changes: str | int) -> None:
        """What an operator does to a sale."""
        self.versions[sale] += 1
        await self.scripts.sale_switch(sale=sale, epoch=1, version=self.versions[sale], changes=changes)
        await self._announce(sale)

    async def advance(self, sale: str) -> Any:
        """One tick of the admit loop."""
        return await self.scripts.line_advance(
            sale=sale, epoch=1, sku=SKU, work_max=1_000, backlog_max=BACKLOG_MAX
        )

    async def forget_orders(self, sale: str) -> None:
        """Empty the stream of claims: without a worker it would only grow."""
        of = SaleKeys(sale)
        replies = await self.link.pipeline(
            [("MULTI",), ("XTRIM", of.orders, "MAXLEN", 0), ("HSET", of.sale, "claims_open", 0), ("EXEC",)]
        )
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply

    async def _announce(self, sale: str) -> None:
        told = json.dumps({"version": self.versions[sale], "ended": False})
        await self.link.call("HSET", keys.SALES, sale, told)


def private_folder(path: Path) -> Path:
    """A folder that stores may use: started by root they run as another account and must pass through."""
    if os.geteuid() == 0:
        path.chmod(0o711)
    make_folder(path / "stores")
    return path / "stores"
