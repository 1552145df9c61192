"""A small installation of real processes for chaos: front, worker, office, sandbox, over stores of the tests.

Processes are forked from a warm server (tests/chaos/zygote.py), their listening sockets are ours: one that dies is
started again behind the same port, as `fairdrop up` does it, and connections wait in the kernel meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from app.children import answers
from app.errors import FairdropError
from app.serving.server import listen
from tests.chaos.points import POINTS, STRUCK, VARIABLE

ANSWERS_WITHIN_S = 180.0
ROLES = ("sandbox", "worker", "office", "front")

# In a hurry: what takes minutes in a sale takes a second here, and nothing waits longer than it must.
HURRIED = {
    "FAIRDROP_ENV": "development",
    "FAIRDROP_LOG_FORMAT": "json",
    "FAIRDROP_POLL_MIN_MS": "100",
    "FAIRDROP_POLL_MAX_MS": "400",
    "FAIRDROP_EXPIRE_EVERY_MS": "100",
    "FAIRDROP_RELAY_EVERY_MS": "50",
    "FAIRDROP_AUTOCLAIM_IDLE_MS": "600",
    "FAIRDROP_LEASE_S": "1.5",
    "FAIRDROP_LINK_WAIT_MAX_S": "2",
    "FAIRDROP_REDIS_DEADLINE_S": "1",
    "FAIRDROP_PROVIDER_DEADLINE_S": "1",
    "FAIRDROP_PAY_EXTENSION_S": "0",  # a busy machine looks like an outage, and the test would wait
    "FAIRDROP_PULSE_EVERY_S": "0.5",
    "FAIRDROP_RECONCILE_EVERY_S": "1",
    "FAIRDROP_DRAIN_S": "0",
    "FAIRDROP_SNAPSHOT_STALE_S": "2",
    "FAIRDROP_CHANGE_RATE_PER_MIN": "600",
    "FAIRDROP_PASS_RATE_PER_MIN": "600",
}


def _role_of(point: str) -> str:
    return POINTS[point.split(":")[0]].role


class Zygote:
    """Our end of the fork server. One for a pytest process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wire = ours
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.zygote", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            env={name: value for name, value in os.environ.items() if not name.startswith("FAIRDROP_")},
        )
        theirs.close()
        self._wire.settimeout(120)
        self._wire.recv(64)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(
        self, role: Role, environment: Mapping[str, str], plants: Sequence[str], fds: Sequence[int] = ()
    ) -> psutil.Process:
        order = {
            "role": role.role,
            "arguments": role.arguments,
            "environment": dict(environment),
            "plants": list(plants),
            "dresses": role.dresses,
            "log": str(role.log),
        }
        socket.send_fds(self._wire, [json.dumps(order).encode()], list(fds))
        pid: int = json.loads(self._wire.recv(4096))["pid"]
        return psutil.Process(pid)

    def close(self) -> None:
        self._wire.close()
        self._process.wait(30)


@dataclass
class Role:
    """One process, in whatever incarnation."""

    name: str
    role: str
    url: str
    log: Path
    wire: socket.socket | None
    environment: dict[str, str]
    arguments: list[str] = field(default_factory=list)
    dresses: list[str] = field(default_factory=list)
    process: psutil.Process | None = None
    wanted: bool = True  # to be started again when it dies

    def running(self) -> bool:
        return self.process is not None and self.process.is_running()


class System:
    """The processes and how to hurt them."""

    def __init__(
        self,
        zygote: Zygote,
        folder: Path,
        *,
        redis_url: str,
        database_url: str,
        plants: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        workers: int = 1,
        worker_name: str = "",
        chain: Sequence[str] = (),
    ) -> None:
        """chain: crash points, each to be struck once, in whatever order the sale reaches them: every incarnation of a
        process is armed with those of its role that are still to come."""
        self.folder = folder
        self.redis_url = redis_url
        self.database_url = database_url
        self.plants = plants
        self.ledger = folder / "supplier.jsonl"
        self.operator_key = secrets.token_urlsafe(24)
        self.roles: dict[str, Role] = {}
        self.deaths: list[str] = []
        self.chain = list(chain)
        self.reborn: dict[str, Callable[[], Awaitable[object]]] = {}  # done when a process is there again
        self.sandbox_secret = secrets.token_urlsafe(36)
        self._zygote = zygote
        self._sockets = {
            name: listen("127.0.0.1", 0, 512, what=name, option="--port")
            for name in ("front", "office", "sandbox")
        }
        self._ports = {name: wire.getsockname()[1] for name, wire in self._sockets.items()}
        base = {
            **HURRIED,
            "FAIRDROP_REDIS_URL": redis_url,
            "FAIRDROP_DATABASE_URL": database_url,
            "FAIRDROP_DATA_DIR": str(folder),
            "FAIRDROP_SIGNING_KEYS": secrets.token_urlsafe(36),
            "FAIRDROP_PII_KEYS": secrets.token_hex(32),
            "FAIRDROP_JWT_SECRET": secrets.token_urlsafe(36),
            "FAIRDROP_SANDBOX_SECRET": self.sandbox_secret,
            "FAIRDROP_OPERATOR_KEY": self.operator_key,
            "FAIRDROP_OFFICE_URL": self.url("office"),
            "FAIRDROP_SANDBOX_URL": self.url("sandbox"),
            "FAIRDROP_SANDBOX_PUBLIC_URL": self.url("sandbox"),
            "FAIRDROP_PUBLIC_URL": self.url("front"),
            "FAIRDROP_SANDBOX_LEDGER": str(self.ledger),
            **(environment or {}),
        }
        for name in ("sandbox", "office", "front"):
            self.roles[name] = Role(
                name, name, self.url(name), folder / f"{name}.log", self._sockets[name], dict(base)
            )
        for number in range(workers):
            name = "worker" if number == 0 else f"worker{number + 1}"
            told = {
                **base,
                "FAIRDROP_WORKER_NAME": worker_name or name,
                "FAIRDROP_PORT_FILE": str(folder / f"{name}.port"),
            }
            self.roles[name] = Role(name, "worker", "", folder / f"{name}.log", None, told, ["--port", "0"])

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    # --- life

    async def start(self, points: Mapping[str, str] | None = None) -> None:
        """Start everything; points: process → crash point of its first incarnation."""
        for role in self.roles.values():
            self.spawn(role.name, (points or {}).get(role.name))
        for name in self._ports:
            await self.answers(name)
        for role in self.roles.values():
            if role.role == "worker":
                await self._until(
                    lambda role=role: Path(role.environment["FAIRDROP_PORT_FILE"]).exists(), role.name
                )  # type: ignore[misc]

    def spawn(self, name: str, point: str | None = None) -> None:
        role = self.roles[name]
        if port_file := role.environment.get("FAIRDROP_PORT_FILE"):
            Path(port_file).unlink(missing_ok=True)  # of the incarnation before
        environment = {**role.environment, STRUCK: str(self.folder / "struck")}
        armed = [point] if point else [one for one in self.to_strike() if _role_of(one) == role.role]
        if armed:
            environment[VARIABLE] = ",".join(armed)
        fds = [role.wire.fileno()] if role.wire is not None else []
        role.process = self._zygote.fork(role, environment, self.plants, fds)

    def struck(self) -> list[str]:
        """The crash points that have been reached, in order."""
        file = self.folder / "struck"
        return file.read_text().split() if file.exists() else []

    def to_strike(self) -> list[str]:
        """What is left of the chain."""
        over = Counter(self.struck())
        left: list[str] = []
        for one in self.chain:
            name = one.split(":")[0]
            if over[name] > 0:
                over[name] -= 1
            else:
                left.append(one)
        return left

    async def answers(self, name: str) -> None:
        """Wait until it serves. AssertionError: with its last words."""
        deadline = time.monotonic() + ANSWERS_WITHIN_S
        while not await asyncio.to_thread(answers, self.url(name)):
            assert time.monotonic() < deadline, f"{name} does not answer: {self.last_words(name)}"
            await asyncio.sleep(0.02)

    async def back(self, within_s: float) -> bool:
        """Wait until every process serves again. False: some do not yet, after so long."""
        deadline = time.monotonic() + within_s
        for role in self.roles.values():
            while not await self._serves(role):
                if time.monotonic() > deadline:
                    return False
                await asyncio.sleep(0.02)
        return True

    async def _serves(self, role: Role) -> bool:
        if not role.running():
            return False
        url = role.url
        if role.role == "worker":
            port_file = Path(role.environment["FAIRDROP_PORT_FILE"])
            if not port_file.exists():
                return False
            url = f"http://127.0.0.1:{port_file.read_text().strip()}"
        return await asyncio.to_thread(answers, url)

    async def _until(self, reached: object, what: str) -> None:
        deadline = time.monotonic() + ANSWERS_WITHIN_S
        while not reached():  # type: ignore[operator]
            assert time.monotonic() < deadline, f"{what}: {self.last_words(what)}"
            await asyncio.sleep(0.02)

    def last_words(self, name: str) -> str:
        log = self.roles[name].log
        return log.read_text(errors="replace")[-1500:] if log.exists() else "it said nothing"

    async def keep_alive(self) -> None:
        """Start again whatever died, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                for role in self.roles.values():
                    if role.wanted and role.process is not None and not role.process.is_running():
                        self.deaths.append(role.name)
                        self.spawn(role.name)
                        if role.name in self.reborn:
                            group.create_task(self._greet(role.name))
                await asyncio.sleep(0.05)

    async def _greet(self, name: str) -> None:
        with contextlib.suppress(OSError, httpx.HTTPError, FairdropError):  # killed again: another greets it
            await self.reborn[name]()

    def close(self) -> None:
        """End everything at once; nothing here is needed any more."""
        for role in self.roles.values():
            role.wanted = False
            self.signal(role.name, signal.SIGKILL)
        for role in self.roles.values():
            if role.process is not None:
                with contextlib.suppress(psutil.Error):
                    role.process.wait(10)
        for wire in self._sockets.values():
            wire.close()

    # --- hurt

    def signal(self, name: str, sign: signal.Signals) -> None:
        process = self.roles[name].process
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sign)

    def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
