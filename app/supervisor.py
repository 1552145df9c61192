"""`fairdrop up`: every process of a small installation under one parent, on one machine.

The order is the point. First everything that can refuse without having done anything: the data directory and its
lock, the ports (kept open from then on, so that a child which is started again finds its port, and connections wait in
the kernel meanwhile), real servers named by URL. Only then stores, migrations, sandbox, worker, office, front.
urls.json is written when all have answered; whatever dies after that is started again, after a pause that grows while
it keeps dying.

    CannotStart, exit 2           one sentence, and nothing is left running
    SIGTERM or Ctrl-C, exit 0     front, office, worker, sandbox, then the stores; urls.json goes first

Everything here is synchronous and in the main thread: the kernel ends a child with the thread that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import IO

from app.children import (
    BACKOFF_FIRST_S,
    HEALTHY_AFTER_S,
    STOPS_WITHIN_S,
    Process,
    Runs,
    Watched,
    restart_if_due,
)
from app.data_dir import MADE_SECRETS, made_secrets, secrets_dir
from app.disk import Disk
from app.embedded import (
    Postgres,
    Valkey,
    find_postgres,
    find_valkey,
    make_folder,
    secret_in,
    write_private,
)
from app.errors import CannotStart
from app.redis.cluster import open_link
from app.serving.server import listen, listen_together
from app.settings import Settings
from app.telemetry import MULTIPROCESS_DIR, prepare_metrics

ANSWERS_WITHIN_S = 300.0  # only a process that hangs needs so long; one that has ended is seen at once
STILL_WAITING_S = 15.0  # on a busy machine: say what is waited for, each time so long
LOOK_EVERY_S = 0.1
DISK_EVERY_S = 1.0


class Stopped(Exception):
    """A signal asked for the end while things were being started."""


def lan_address() -> str:
    """This machine's address in the local network (nothing is sent: connecting a UDP socket only picks a route)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


class Up:
    """Everything that one `fairdrop up` runs."""

    def __init__(self, settings: Settings, *, lan: bool = False, out: IO[str] | None = None) -> None:
        self.settings = settings
        self.data_dir = settings.data_dir.absolute()
        self.lan = lan
        self.out = out if out is not None else sys.stdout
        self.urls: dict[str, object] = {}
        self._stores: list[Valkey | Postgres] = []
        self._processes: list[Process] = []
        self._wires: list[socket.socket] = []
        self._lock: IO[str] | None = None
        self._asked_to_stop = False

    # --- from outside

    def run(self) -> None:
        """Start, supervise until a signal, stop. CannotStart: one sentence, and nothing is left running."""
        before = {sig: signal.signal(sig, self._on_signal) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.start()
            self.supervise()
        except Stopped:
            pass
        finally:
            self.stop()
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def _on_signal(self, _sig: int, _frame: FrameType | None) -> None:
        self._asked_to_stop = True

    def _say(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()

    # --- starting

    def start(self) -> None:
        self._take_data_dir()
        self._open_ports()
        self._make_secrets()
        self._check_real_servers()
        redis_url, database_url = self._start_stores()
        self._migrate(database_url)
        self._start_processes(redis_url, database_url)
        self._write_urls(redis_url, database_url)
        self._announce()

    def _take_data_dir(self) -> None:
        """Make the directory and lock it. The lock goes with the process, also with one that is killed."""
        try:
            make_folder(self.data_dir)
            lock = (self.data_dir / "up.lock").open("a+", encoding="ascii")
        except OSError as error:
            raise CannotStart(
                f"cannot write to the data directory {self.data_dir}: {error.strerror}; choose another with --data-dir"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "?"
            lock.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise CannotStart(f"cannot lock {self.data_dir}: {error.strerror}") from error
            raise CannotStart(f"another `fairdrop up` (process {holder}) uses {self.data_dir}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        (self.data_dir / "urls.json").unlink(missing_ok=True)  # of an `up` that was killed
        for name in ("logs", "secrets"):
            folder = self.data_dir / name
            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)

    def _open_ports(self) -> None:
        """Bind every port before anything else is started; children inherit the sockets."""
        s = self.settings
        public, office = (s.front_host, s.office_host) if not self.lan else ("0.0.0.0", "0.0.0.0")
        sandbox = s.sandbox_host if not self.lan else "0.0.0.0"
        backlog = s.listen_backlog
        if s.server == "granian":
            # It binds by itself; the look tells us that it can, and fixes the port.
            with contextlib.closing(
                listen(public, s.front_port, 1, what="front", option="--front-port")
            ) as look:
                self.front_port = look.getsockname()[1]
            self._front_wires: list[socket.socket] = []
        else:
            self._front_wires = listen_together(
                public, s.front_port, backlog, s.front_workers, what="front", option="--front-port"
            )
            self._wires += self._front_wires
            self.front_port = self._front_wires[0].getsockname()[1]
        self._office_wire = listen(office, s.office_port, backlog, what="office", option="--office-port")
        self._wires.append(self._office_wire)
        self._sandbox_wire = listen(sandbox, s.sandbox_port, backlog, what="sandbox", option="--sandbox-port")
        self._wires.append(self._sandbox_wire)
        with contextlib.closing(
            listen(s.worker_host, s.worker_port, 1, what="worker", option="--worker-port")
        ) as look:
            self.worker_port: int = look.getsockname()[1]
        self.office_port: int = self._office_wire.getsockname()[1]
        self.sandbox_port: int = self._sandbox_wire.getsockname()[1]

    def _make_secrets(self) -> None:
        """Write the secrets that are neither set nor made yet; they stay, so tickets and contacts stay readable."""
        for name, make in MADE_SECRETS.items():
            file = secrets_dir(self.data_dir) / name
            if not getattr(self.settings, name).get_secret_value() and not file.is_file():
                write_private(file, make() + "\n")

    def _check_real_servers(self) -> None:
        if self.settings.redis_url:
            asyncio.run(open_link(self.settings.redis_url, name="check").check_server())
        if self.settings.database_url:
            from app.ledger import migrate

            migrate.pending(self.settings.database_url)  # connects, and checks the version

    def _start_stores(self) -> tuple[str, str]:
        """Start what no URL names. Returns the URLs of both."""
        stores: list[Valkey | Postgres] = []
        logs = self.data_dir / "logs"
        redis_url, database_url = self.settings.redis_url, self.settings.database_url
        if not redis_url:
            server = find_valkey()
            password = secret_in(secrets_dir(self.data_dir) / "redis_password")
            stores.append(
                Valkey(self.data_dir / "valkey", password, server=server, log_path=logs / "valkey.log")
            )
        if not database_url:
            bin_dir = find_postgres()
            password = secret_in(secrets_dir(self.data_dir) / "database_password")
            stores.append(
                Postgres(
                    self.data_dir / "postgres", password, bin_dir=bin_dir, log_path=logs / "postgres.log"
                )
            )
        for store in stores:
            self._stop_if_asked()
            self._stores.append(store)
            store.start()
            if isinstance(store, Valkey):
                redis_url = store.url
            else:
                database_url = store.url
        return redis_url, database_url

    def _migrate(self, database_url: str) -> None:
        self._stop_if_asked()
        from app.ledger import migrate

        migrate.upgrade(database_url)

    def _environment(self, redis_url: str, database_url: str) -> dict[str, str]:
        """What every child is told. What the user has set stays."""
        s = self.settings
        given = {name: value for name, value in os.environ.items() if name != MULTIPROCESS_DIR}
        made = made_secrets(self.data_dir)
        told = {
            "FAIRDROP_ENV": "development",
            "FAIRDROP_DATA_DIR": str(self.data_dir),
            "FAIRDROP_REDIS_URL": redis_url,
            "FAIRDROP_DATABASE_URL": database_url,
            "FAIRDROP_OFFICE_URL": s.office_url or f"http://127.0.0.1:{self.office_port}",
            "FAIRDROP_SANDBOX_URL": f"http://127.0.0.1:{self.sandbox_port}",
            "FAIRDROP_SANDBOX_PUBLIC_URL": s.sandbox_public_url or self._public_url(self.sandbox_port),
            "FAIRDROP_PUBLIC_URL": s.public_url or self._public_url(),
            "FAIRDROP_WORKER_HOST": s.worker_host,
            "FAIRDROP_WORKER_PORT": str(self.worker_port),
            "FAIRDROP_OFFICE_PORT": str(self.office_port),
            "FAIRDROP_FRONT_PORT": str(self.front_port),
            "FAIRDROP_SANDBOX_PORT": str(self.sandbox_port),
            "FAIRDROP_FRONT_WORKERS": "1",
            "FAIRDROP_SERVER": s.server,
            "FAIRDROP_LOG_LEVEL": s.log_level,
            # No load balancer looks at /readyz here; who stops `up` wants it to stop.
            "FAIRDROP_DRAIN_S": os.environ.get("FAIRDROP_DRAIN_S", "0"),
            "PYTHONUNBUFFERED": "1",
        }
        for name, file in made.items():
            if not getattr(s, name).get_secret_value():
                told[f"FAIRDROP_{name.upper()}_FILE"] = str(file)
        return {**given, **told}

    def _public_url(self, port: int | None = None) -> str:
        return f"http://{lan_address() if self.lan else '127.0.0.1'}:{port or self.front_port}"

    def _start_processes(self, redis_url: str, database_url: str) -> None:
        environment = self._environment(redis_url, database_url)
        logs = self.data_dir / "logs"

        def process(name: str, port: int, wire: socket.socket | None = None) -> Process:
            url, log_path = f"http://127.0.0.1:{port}", logs / f"{name}.log"
            return Process(name, [name], url, log_path, environment, wire, nice=self.settings.behind_nice)

        self._processes = [
            process("sandbox", self.sandbox_port, self._sandbox_wire),
            process("worker", self.worker_port),
            process("office", self.office_port, self._office_wire),
        ]
        count = self.settings.front_workers
        metrics_dir = self.data_dir / "metrics" / "front"
        if count > 1:
            prepare_metrics(metrics_dir)
            environment = {**environment, MULTIPROCESS_DIR: str(metrics_dir)}
        for number in range(count):
            name = "front" if count == 1 else f"front-{number + 1}"
            arguments = ["front"]
            if not self._front_wires:
                arguments += ["--host", "0.0.0.0" if self.lan else self.settings.front_host]
            self._processes.append(
                Process(
                    name,
                    arguments,
                    f"http://127.0.0.1:{self.front_port}",
                    logs / f"{name}.log",
                    environment,
                    self._front_wires[number] if self._front_wires else None,
                    metrics_dir if count > 1 else None,
                )
            )
        for one in self._processes:
            self._stop_if_asked()
            one.spawn()
        began = time.monotonic()
        deadline, say_at = began + ANSWERS_WITHIN_S, began + STILL_WAITING_S
        for one in self._processes:
            while not one.ready():
                self._stop_if_asked()
                if time.monotonic() > say_at:
                    self._say(f"{one.name} does not answer yet ({time.monotonic() - began:.0f} s); waiting")
                    say_at += STILL_WAITING_S
                for other in self._processes:
                    if not other.running():
                        raise CannotStart(f"{other.name} ended: {other.complaint()} (see {other.log_path})")
                if time.monotonic() > deadline:
                    raise CannotStart(
                        f"{one.name} did not answer within {ANSWERS_WITHIN_S:.0f} s (see {one.log_path})"
                    )
                time.sleep(0.05)

    def _stop_if_asked(self) -> None:
        if self._asked_to_stop:
            raise Stopped

    def _write_urls(self, redis_url: str, database_url: str) -> None:
        key = self.settings.operator_key.get_secret_value() or secret_in(
            secrets_dir(self.data_dir) / "operator_key"
        )
        self.urls = {
            "front": f"http://127.0.0.1:{self.front_port}",
            "office": f"http://127.0.0.1:{self.office_port}",
            "worker": f"http://127.0.0.1:{self.worker_port}",
            "sandbox": f"http://127.0.0.1:{self.sandbox_port}",
            "redis": redis_url,
            "database": database_url,
            "operator_key": key,
        }
        self._publish_urls()

    def _publish_urls(self) -> None:
        children: list[Runs] = [*self._stores, *self._processes]
        pids = {child.name.lower(): child.pid for child in children} | {"up": os.getpid()}
        document = {**self.urls, "pids": pids}
        write_private(self.data_dir / "urls.json", json.dumps(document, indent=2) + "\n")

    def _announce(self) -> None:
        lines = [
            f"front    {self._public_url()}",
            f"office   {self.urls['office']}",
            f"sandbox  {self.urls['sandbox']}",
        ]
        lines += [f"worker   {self.urls['worker']}", f"data     {self.data_dir} (urls.json, logs/, secrets/)"]
        self._say("\n".join(["Fairdrop is up.", *lines, "Ctrl-C stops it."]))

    # --- running

    def supervise(self) -> None:
        """Start again whatever dies, until a signal asks for the end."""
        watched = [Watched(child) for child in (*self._stores, *self._processes)]
        s = self.settings
        disks = [
            Disk(self.data_dir, store, min_mb=s.disk_min_mb, ballast_mb=s.ballast_mb, say=self._say)
            for store in self._stores
            if isinstance(store, Valkey)
        ]
        disk_due_at = 0.0
        while not self._asked_to_stop:
            if time.monotonic() >= disk_due_at:
                disk_due_at = time.monotonic() + DISK_EVERY_S
                for disk in disks:
                    disk.look()
            for one in watched:
                if restart_if_due(one, self._say):
                    self._publish_urls()
            time.sleep(LOOK_EVERY_S)

    # --- stopping

    def stop(self) -> None:
        """Stop everything, buyers' side first: nobody is served by half an installation. Safe to call at any time."""
        if self._lock is None:
            self._close_wires()
            return  # the directory is another `up`'s: its urls.json stays
        (self.data_dir / "urls.json").unlink(missing_ok=True)
        self._close_wires()  # nothing new is accepted; children still have their own copies until they end
        within_s = self.settings.drain_s + self.settings.close_within_s + STOPS_WITHIN_S
        fronts = [process for process in self._processes if process.name.startswith("front")]
        for process in fronts:
            if process.running() and process.process is not None:
                process.process.terminate()  # all at once, then wait for each
        by_name = {process.name: process for process in self._processes}
        for process in (
            *fronts,
            *(by_name[name] for name in ("office", "worker", "sandbox") if name in by_name),
        ):
            process.stop(within_s)
        for store in self._stores:
            store.stop()
        self._lock.close()
        self._lock = None

    def _close_wires(self) -> None:
        for wire in self._wires:
            wire.close()
        self._wires.clear()


def run_fronts(settings: Settings, host: str, port: int) -> None:
    """`fairdrop front` with several processes: open their sockets, run them, start again what dies, until SIGTERM.

    CannotStart: the port is in use, or a process ended before it answered.
    """
    stopping = False

    def on_signal(_sig: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    before = {sig: signal.signal(sig, on_signal) for sig in (signal.SIGTERM, signal.SIGINT)}
    count = settings.front_workers
    # What an option has said must reach the children too: they are given the environment, not the command line.
    environment = {**os.environ, "FAIRDROP_FRONT_WORKERS": "1", "FAIRDROP_SERVER": settings.server}
    wires: list[socket.socket] = []
    arguments = ["front", "--host", host]
    if settings.server == "granian":
        with contextlib.closing(listen(host, port, 1, what="front", option="--port")) as look:
            arguments += ["--port", str(look.getsockname()[1])]
    else:
        wires = listen_together(host, port, settings.listen_backlog, count, what="front", option="--port")
        sys.stderr.write(f"front: http://{host}:{wires[0].getsockname()[1]} ({count} processes)\n")
    given = os.environ.get(MULTIPROCESS_DIR)
    metrics_dir = Path(given or tempfile.mkdtemp(prefix="fairdrop-metrics-"))
    prepare_metrics(metrics_dir)
    environment[MULTIPROCESS_DIR] = str(metrics_dir)
    fronts = [
        Process(
            f"front-{number + 1}",
            arguments,
            "",
            None,
            environment,
            wires[number] if wires else None,
            metrics_dir,
        )
        for number in range(count)
    ]
    watched = [Watched(front) for front in fronts]
    try:
        for front in fronts:
            front.spawn()
        while not stopping:
            for one in watched:
                if not one.child.running() and time.monotonic() - one.started_at < HEALTHY_AFTER_S:
                    status = (
                        one.child.process.returncode
                        if isinstance(one.child, Process) and one.child.process
                        else 0
                    )
                    if (
                        status == 2 and one.pause_s == BACKOFF_FIRST_S
                    ):  # it has said why, on our standard error
                        raise CannotStart(f"{one.child.name} cannot start")
                restart_if_due(one, lambda text: print(text, file=sys.stderr))
            time.sleep(LOOK_EVERY_S)
    finally:
        for front in fronts:
            if front.process is not None and front.running():
                front.process.terminate()
        for front in fronts:
            front.stop(settings.drain_s + settings.close_within_s + STOPS_WITHIN_S)
        for wire in wires:
            wire.close()
        if not given:
            shutil.rmtree(metrics_dir, ignore_errors=True)
        for sig, handler in before.items():
            signal.signal(sig, handler)
