"""`fairdrop up` as a child of the demo, on free ports and in a hurry."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.embedded import launch_command
from app.errors import CannotStart

START_WITHIN_S = 600.0  # `up` itself gives up earlier, and says why
STOP_WITHIN_S = 20.0

# The demo is in a hurry: a standby winner must hear of the unit well before PAY_WITHIN_S is over, and what a killed
# worker held is taken over in seconds.
HURRIED = {
    "FAIRDROP_POLL_MAX_MS": "2500",
    "FAIRDROP_EXPIRE_EVERY_MS": "200",
    "FAIRDROP_AUTOCLAIM_IDLE_MS": "2000",
    "FAIRDROP_LEASE_S": "6",
    "FAIRDROP_LINK_WAIT_MAX_S": "6",
    "FAIRDROP_DRAIN_S": "0",
}


@dataclass(frozen=True)
class Urls:
    front: str
    office: str
    worker: str
    sandbox: str
    operator_key: str
    redis: str
    database: str


class Servers:
    """`fairdrop up` as a child process on free ports, in a data directory of its own."""

    def __init__(
        self, data_dir: Path, front_workers: int = 1, environment: Mapping[str, str] = HURRIED
    ) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir / "demo-up.log"
        self._front_workers = front_workers
        self.supplier_ledger = data_dir / "supplier.jsonl"
        self._environment = {**environment, "FAIRDROP_SANDBOX_LEDGER": str(self.supplier_ledger)}
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> Urls:
        """Start everything and return where it answers. CannotStart: with the last words of `up`."""
        urls_path = self.data_dir / "urls.json"
        before_ns = urls_path.stat().st_mtime_ns if urls_path.exists() else 0
        process = self._spawn()
        deadline = time.monotonic() + START_WITHIN_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise CannotStart(f"`fairdrop up` ended: {self.last_words()}")
            if urls_path.exists() and urls_path.stat().st_mtime_ns != before_ns:
                found = json.loads(urls_path.read_text(encoding="utf-8"))
                return Urls(**{name: found[name] for name in Urls.__dataclass_fields__})
            await asyncio.sleep(0.05)
        raise CannotStart(f"`fairdrop up` did not answer within {START_WITHIN_S:.0f} s: {self.last_words()}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.supplier_ledger.unlink(missing_ok=True)  # of another run in the same directory
        command = [sys.executable, "-m", "app.cli", "up", "--data-dir", str(self.data_dir)]
        for name in ("front", "office", "worker", "sandbox"):
            command += [f"--{name}-port", "0"]
        command += ["--front-workers", str(self._front_workers)]
        with self.log_path.open("wb") as log:
            process = subprocess.Popen(
                launch_command(command, signal.SIGTERM),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self._environment,
                start_new_session=True,
            )
        self._process = process
        return process

    def last_words(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix("fairdrop: ") if lines else "it said nothing"

    def stop(self) -> None:
        """Stop everything cleanly; kill what has not ended in time."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def worker_pids(self) -> list[int]:
        """The processes of the worker among the descendants of our own `up` (Linux)."""
        if self._process is None:
            return []
        return [pid for pid, command in _descendants(self._process.pid) if "worker" in command[1:]]

    def kill_worker(self) -> int:
        """kill -9 the worker, as a crash would; `up` starts another. Returns its process id, 0: there was none."""
        for pid in self.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return pid
        return 0


def _descendants(root: int) -> Iterator[tuple[int, list[str]]]:
    """(process id, command line words) of every process below `root`."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in sorted(parents):
        above = parents[pid]
        while above not in (root, 0, 1) and above in parents:
            above = parents[above]
        if above == root:
            with contextlib.suppress(OSError):
                yield (
                    pid,
                    (Path("/proc") / str(pid) / "cmdline")
                    .read_bytes()
                    .decode("utf-8", "replace")
                    .split("\0"),
                )
