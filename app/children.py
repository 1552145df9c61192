"""Processes of ours that run as children of another: started with their end tied to the parent's, asked whether they
answer, started again when they die."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from app.embedded import ended_by_signal, launch_command, lines_since, open_log
from app.errors import CannotStart
from app.telemetry import forget_process

STOPS_WITHIN_S = 15.0  # beyond drain_s and close_within_s; then it is killed
NICE_MAX = 19  # the lowest priority there is
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0
HEALTHY_AFTER_S = 30.0  # a process that lived this long starts with a short pause again


class Runs(Protocol):
    """A child: a store or one of our processes."""

    name: str

    @property
    def pid(self) -> int: ...
    def running(self) -> bool: ...
    def prepare(self) -> None: ...
    def spawn(self) -> None: ...
    def ready(self) -> bool: ...
    def complaint(self) -> str: ...
    def kill(self) -> None: ...
    def stop(self, within_s: float = STOPS_WITHIN_S) -> None: ...


class Process:
    """One of our own processes: `python -m app.cli NAME`, which answers /healthz at `url`."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        url: str,
        log_path: Path | None,
        environment: Mapping[str, str],
        wire: socket.socket | None = None,
        metrics_dir: Path | None = None,
        nice: int = 0,
    ) -> None:
        """nice: how much below our own its CPU priority is."""
        self.name = name
        self.url = url
        self.log_path = log_path
        self.process: subprocess.Popen[bytes] | None = None
        self._arguments = arguments
        self._environment = dict(environment)
        self._wire = wire
        self._metrics_dir = metrics_dir
        self._nice = nice
        self._log_from = 0

    @property
    def pid(self) -> int:
        if self.process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self.process.pid

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def prepare(self) -> None:
        """Forget the gauges of the process that ended."""
        if self.process is not None and self._metrics_dir is not None:
            forget_process(self.process.pid, self._metrics_dir)

    def spawn(self) -> None:
        command = [sys.executable, "-m", "app.cli", *self._arguments]
        fds: tuple[int, ...] = ()
        if self._wire is not None:
            fds = (self._wire.fileno(),)
            command += ["--fd", str(fds[0])]
        with contextlib.ExitStack() as stack:
            log = None  # the parent's own output
            if self.log_path is not None:
                log = stack.enter_context(open_log(self.log_path))
                self._log_from = log.seek(0, os.SEEK_END)
            self.process = subprocess.Popen(
                launch_command(command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C in the terminal is for the parent, which stops things in order
            )
        if self._nice:
            ours = os.getpriority(os.PRIO_PROCESS, 0)
            # Still one thread: those that it starts inherit it.
            os.setpriority(os.PRIO_PROCESS, self.process.pid, min(NICE_MAX, ours + self._nice))

    def ready(self) -> bool:
        return answers(self.url)

    def complaint(self) -> str:
        """The signal that ended it, else its last line: the commands end with one sentence when they cannot start."""
        if signalled := ended_by_signal(self.process):
            return signalled
        if self.log_path is None:
            return f"status {self.process.returncode if self.process else '?'}"
        lines = lines_since(self.log_path, self._log_from)
        return lines[-1].strip() if lines else "it said nothing"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self, within_s: float = STOPS_WITHIN_S) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()


def answers(url: str, path: str = "/healthz", within_s: float = 1.0) -> bool:
    """Whether a GET is answered with 200 in time."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=within_s)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@dataclass
class Watched:
    """A child under supervision, and when it may be started again."""

    child: Runs
    started_at: float = field(default_factory=time.monotonic)
    pause_s: float = BACKOFF_FIRST_S
    due_at: float | None = None


def restart_if_due(one: Watched, say: Callable[[str], None]) -> bool:
    """Start a child that died, after its pause; the pause doubles while it keeps dying. True: it was started now."""
    now = time.monotonic()
    if one.child.running():
        return False
    if one.due_at is None:
        if now - one.started_at > HEALTHY_AFTER_S:
            one.pause_s = BACKOFF_FIRST_S
        one.due_at = now + one.pause_s
        say(f"{one.child.name} ended ({one.child.complaint()}); starting it again in {one.pause_s:.1f} s")
        one.pause_s = min(one.pause_s * 2, BACKOFF_MAX_S)
        return False
    if now < one.due_at:
        return False
    try:
        one.child.prepare()
        one.child.spawn()
    except (CannotStart, OSError) as error:
        say(f"{one.child.name} does not start: {error}; trying again in {one.pause_s:.1f} s")
        one.due_at = now + one.pause_s
        one.pause_s = min(one.pause_s * 2, BACKOFF_MAX_S)
        return False
    one.started_at, one.due_at = time.monotonic(), None
    return True
