"""The stores that `up` starts: real, private, durable, gone with their parent, and back after any crash."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
import redis as redis_sync

from app import embedded
from app.embedded import Account, Postgres, Valkey, account_for
from app.errors import CannotStart


def until(condition: Callable[[], bool], within_s: float = 180.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def own_valkey(home: Path) -> Iterator[Valkey]:
    valkey = Valkey(home / "valkey", "secret one")
    try:
        yield valkey
    finally:
        valkey.kill()


@pytest.fixture
def own_postgres(home: Path) -> Iterator[Postgres]:
    postgres = Postgres(home / "postgres", "it's a secret")
    try:
        yield postgres
    finally:
        postgres.discard()


def test_valkey_gives_back_no_memory_while_calls_wait_for_it(own_valkey: Valkey) -> None:
    """glibc trims the heap under its lock: freeing a long line held calls up for milliseconds."""
    own_valkey.start()
    environment = Path(
        f"/proc/{own_valkey.pid}/environ"
    ).read_text()  # glibc ends each setting with a zero byte
    found = {name: int(value) for name, value in re.findall(r"glibc\.malloc\.(\w+)=(\d+)", environment)}
    assert found["trim_threshold"] > 2**32
    assert found["mmap_threshold"] <= 2**25  # glibc refuses more without a word
    assert found["tcache_count"] <= 2**16 - 1  # and here, too


def test_valkey_keeps_every_acknowledged_write_through_kill_9(own_valkey: Valkey) -> None:
    own_valkey.start()
    port = own_valkey.port
    with contextlib.closing(redis_sync.Redis.from_url(own_valkey.url)) as client:
        for number in range(200):
            client.set(f"n{number}", number)
    own_valkey.restart(crash=True)
    assert own_valkey.port == port
    with contextlib.closing(redis_sync.Redis.from_url(own_valkey.url)) as client:
        assert client.dbsize() == 200
        wanted = [
            "appendonly",
            "appendfsync",
            "maxmemory-policy",
            "auto-aof-rewrite-percentage",
            "save",
            "bind",
            "stream-node-max-entries",
        ]
        assert client.config_get(*wanted) == {
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "auto-aof-rewrite-percentage": "0",
            "save": "",
            "bind": "127.0.0.1",
            "stream-node-max-entries": "32",
        }


def test_valkey_asks_for_its_password(own_valkey: Valkey) -> None:
    own_valkey.start()
    with (
        contextlib.closing(redis_sync.Redis(port=own_valkey.port)) as client,
        pytest.raises(redis_sync.AuthenticationError),
    ):
        client.ping()


async def _fetch(url: str, sql: str) -> object:
    connection = await asyncpg.connect(url, timeout=180)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


async def test_postgres_keeps_what_was_committed_through_kill_9(own_postgres: Postgres) -> None:
    own_postgres.start()
    connection = await asyncpg.connect(own_postgres.url, timeout=180)
    try:
        await connection.execute("CREATE TABLE kept (n int)")
        await connection.execute("INSERT INTO kept SELECT generate_series(1, 100)")
    finally:
        await connection.close()
    own_postgres.restart(crash=True)
    assert await _fetch(own_postgres.url, "SELECT count(*) FROM kept") == 100
    for name, value in {"fsync": "on", "synchronous_commit": "on", "server_encoding": "UTF8"}.items():
        assert await _fetch(own_postgres.url, f"SHOW {name}") == value
    assert await _fetch(own_postgres.url, "SHOW listen_addresses") == "127.0.0.1"
    assert not Path(f"/tmp/.s.PGSQL.{own_postgres.port}").exists(), "a socket that could go stale"


async def test_postgres_asks_for_its_password_and_the_role_is_no_superuser(own_postgres: Postgres) -> None:
    own_postgres.start()
    wrong = own_postgres.url.replace("it%27s", "wrong")
    assert wrong != own_postgres.url
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(wrong, timeout=180)
    assert (
        await _fetch(own_postgres.url, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
    )


async def test_a_lock_file_with_somebody_elses_process_number_does_not_prevent_the_start(
    own_postgres: Postgres,
) -> None:
    """After kill -9 and a reboot, the number in postmaster.pid may belong to any process of the same account."""
    own_postgres.start()
    own_postgres.kill()
    lock = own_postgres.data / "postmaster.pid"
    assert lock.exists()
    other = subprocess.Popen(
        embedded.launch_command(["/bin/sleep", "60"], signal.SIGKILL, own_postgres.account()), cwd="/"
    )
    try:
        lock.write_text("\n".join([str(other.pid), *lock.read_text().splitlines()[1:]]) + "\n")
        own_postgres.start()
    finally:
        other.kill()
        other.wait()
    assert await _fetch(own_postgres.url, "SELECT 1") == 1


def test_an_initdb_that_was_interrupted_is_done_again(own_postgres: Postgres) -> None:
    half = own_postgres.home / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    own_postgres.start()
    assert own_postgres.ready()


def test_data_of_another_postgres_release_are_refused_in_one_sentence(own_postgres: Postgres) -> None:
    own_postgres.prepare()
    (own_postgres.data / "PG_VERSION").write_text("12\n")
    with pytest.raises(CannotStart, match="was made by Postgres 12"):
        own_postgres.start()


def test_a_port_in_use_is_one_sentence(own_valkey: Valkey, home: Path) -> None:
    own_valkey.start()
    second = Valkey(home / "second", "x", own_valkey.port)
    with pytest.raises(CannotStart, match=r"Valkey ended at once: .*in use"):
        second.start()
    assert not second.running()


def test_a_free_port_that_was_taken_meanwhile_is_replaced(own_valkey: Valkey, home: Path) -> None:
    own_valkey.start()
    second = Valkey(home / "second", "x")
    second.prepare()
    second.port = own_valkey.port  # as if it had been taken between the look and the bind
    try:
        second.start()
        assert second.port != own_valkey.port
    finally:
        second.kill()


def test_no_server_anywhere_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "_wheel_folder", lambda package: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotStart, match=r"^no Valkey 8\+ or Redis 7\+ here: .*FAIRDROP_REDIS_URL$"):
        embedded.find_valkey()


def test_a_server_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64'\n")
    old.chmod(0o755)
    monkeypatch.setattr(embedded, "_wheel_folder", lambda package: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotStart, match=r"redis-server is redis 6\.2\.14"):
        embedded.find_valkey()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to drop")
def test_root_never_runs_a_store(own_valkey: Valkey, own_postgres: Postgres) -> None:
    for store in (own_valkey, own_postgres):
        store.start()
        status = Path(f"/proc/{store.pid}/status").read_text()
        effective = int(
            next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16
        )
        assert effective == 0, f"{store.name} has capabilities"
        if store.account().how == "become":
            assert psutil.Process(store.pid).uids().effective != 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to drop")
def test_as_root_the_least_account_that_reaches_the_files_is_taken(tmp_path: Path) -> None:
    program = Path("/bin/sh")
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    before = private.stat().st_mode
    assert account_for(private / "store", program).how == "map"
    assert private.stat().st_mode == before
    assert account_for(Path("/tmp/store"), program).how == "become"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to drop")
def test_files_follow_the_account_when_it_changes(home: Path) -> None:
    folder = home / "store" / "deep"
    folder.mkdir(parents=True)
    (folder / "file").write_text("x")
    embedded.own(home / "store", Account("become", 65534, 65534))
    assert {(folder / "file").stat().st_uid, folder.stat().st_uid, folder.parent.stat().st_uid} == {65534}
    embedded.own(home / "store", Account("map", 65534, 65534))
    assert {(folder / "file").stat().st_uid, folder.stat().st_uid, folder.parent.stat().st_uid} == {0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and /dev/shm are Linux")
@pytest.mark.parametrize("killed", [False, True])
def test_a_postgres_that_is_discarded_leaves_no_shared_memory(own_postgres: Postgres, killed: bool) -> None:
    """Prevents a machine on which no Postgres starts any more: Linux has 4,096 segments, and tests kill many."""

    def segments() -> set[str]:
        """Of the account that runs it; those in memory that a process has mapped, and System V's by their numbers."""
        lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        return {line.split()[1] for line in lines}

    own_postgres.start()
    mapped = Path(f"/proc/{own_postgres.pid}/maps").read_text()
    files = [Path(found) for found in re.findall(r"/dev/shm/PostgreSQL\.\d+", mapped)]
    number = (own_postgres.data / "postmaster.pid").read_text().splitlines()[6].split()[1]
    assert files and number in segments()
    if killed:
        own_postgres.kill()
    own_postgres.discard()
    assert not own_postgres.running()
    assert not [file for file in files if file.exists()]
    assert number not in segments()


PARENT = """
import sys, time
from pathlib import Path
from app.embedded import Postgres, Valkey
home = Path(sys.argv[1])
stores = [Valkey(home / "valkey", "one"), Postgres(home / "postgres", "two")]
for store in stores:
    store.start()
print(*[store.pid for store in stores], flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux")
def test_kill_9_of_the_parent_leaves_nothing_behind_and_the_next_start_works(home: Path) -> None:
    for _ in range(2):
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(home)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert parent.stdout
        with parent.stdout:
            pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        family = [child for pid in pids for child in (psutil.Process(pid), *psutil.Process(pid).children())]
        parent.kill()
        parent.wait()
        # straight on, without waiting: the next start has to cope with a predecessor that is still ending
    until(lambda: not any(process.is_running() for process in family))


@pytest.mark.stores_matrix
def test_redis_answers_a_script_on_every_server(redis_url: str) -> None:
    with contextlib.closing(redis_sync.Redis.from_url(redis_url)) as client:
        assert client.eval("#!lua\nreturn redis.call('TIME')[1]", 0)


@pytest.mark.stores_matrix
async def test_every_database_is_migrated_and_its_own(database_url: str) -> None:
    assert await _fetch(database_url, "SELECT count(*) FROM purchase_order") == 0


def test_a_secret_file_is_private_and_made_once(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    value = embedded.secret_in(path)
    assert embedded.secret_in(path) == value
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_server_on_path_is_called_by_its_own_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Debian's redis-server is a link to redis-check-rdb: called by that name it checks a file and ends."""
    program = tmp_path / "redis-check-rdb"
    program.write_text(
        "#!/bin/sh\n"
        'case "$0" in *redis-server) echo "Redis server v=7.0.15 sha=0";; *) echo "[info] 0 expired";; esac\n'
    )
    program.chmod(0o755)
    (tmp_path / "redis-server").symlink_to("redis-check-rdb")
    monkeypatch.setattr(embedded, "_wheel_folder", lambda package: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(
        embedded.shutil, "which", lambda name: {"redis-server": str(tmp_path / name)}.get(name)
    )
    assert embedded.find_valkey() == tmp_path / "redis-server"
