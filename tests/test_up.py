"""`fairdrop up`: all or nothing at the start, alive while it runs, nothing left at the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import psutil
import pytest

from app.children import answers
from app.embedded import Valkey
from tests.conftest import Stores
from tests.sockets import quiet_port

ROOT = Path(__file__).parents[1]
STARTS_WITHIN_S = 600.0  # on a machine that has much else to do
PORTS = ["--front-port", "0", "--office-port", "0", "--worker-port", "0", "--sandbox-port", "0"]

together = pytest.mark.xdist_group("up")  # one `up` for all of them, not one for each pytest process


def until(condition: Callable[[], Any], within_s: float = 180.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def readiness(url: str) -> tuple[int, str]:
    """/readyz, status and text; 0: no answer yet."""
    try:
        answer = httpx.get(url + "/readyz", timeout=60, trust_env=False)
    except httpx.TransportError:
        return 0, ""
    return answer.status_code, answer.text


class UpProcess:
    """`fairdrop up` as a child; its output goes to a file beside the data directory."""

    def __init__(self, data_dir: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self.log = data_dir.with_name(data_dir.name + ".log")
        command = [sys.executable, "-m", "app.cli", "up", "--data-dir", str(data_dir), *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **(env or {})}
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def urls(self, within_s: float = STARTS_WITHIN_S) -> dict[str, Any]:
        path = self.data_dir / "urls.json"
        deadline = time.monotonic() + within_s
        while not path.exists():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(180)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@contextlib.contextmanager
def up(data_dir: Path, *arguments: str, env: dict[str, str] | None = None) -> Iterator[UpProcess]:
    running = UpProcess(data_dir, *arguments, env=env)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            family = running.family()
            running.process.terminate()
            try:
                running.process.wait(180)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


def refused(data_dir: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    """The one sentence of an `up` that cannot start; nothing is left of it."""
    running = UpProcess(data_dir, *arguments, env=env)
    status = running.process.wait(180)
    said = running.said.strip()
    assert status == 2, said
    assert said.startswith("fairdrop: ") and "\n" not in said, said
    assert not (data_dir / "urls.json").exists()
    return said


@pytest.fixture(scope="module")
def shared(stores: Stores) -> Iterator[UpProcess]:
    """One `up` for the tests that leave it as they found it."""
    home = stores.home / f"up-{secrets.token_hex(4)}"
    home.mkdir()
    if os.geteuid() == 0:
        home.chmod(0o711)
    with up(home / "data", *PORTS, "--front-workers", "2", env={"FAIRDROP_BEHIND_NICE": "5"}) as running:
        running.urls()
        stores.keep_processes({running.process.pid})
        yield running
    shutil.rmtree(home, ignore_errors=True)


@together
def test_everything_answers_and_urls_json_is_complete_and_private(shared: UpProcess) -> None:
    urls = shared.urls()
    path = shared.data_dir / "urls.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert set(urls) == {"front", "office", "worker", "sandbox", "redis", "database", "operator_key", "pids"}
    for name in ("front", "office", "worker", "sandbox"):
        until(lambda name=name: answers(urls[name]))
    assert {"front-1", "front-2", "office", "worker", "sandbox", "valkey", "postgres", "up"} == set(
        urls["pids"]
    )
    assert all(psutil.pid_exists(pid) for pid in urls["pids"].values())
    priority = {name: psutil.Process(pid).nice() for name, pid in urls["pids"].items()}
    ours = priority["up"]
    behind = min(19, ours + 5)  # FAIRDROP_BEHIND_NICE, as by default: what buyers wait for goes first
    assert [priority[name] for name in ("front-1", "front-2", "valkey", "postgres")] == [ours] * 4
    assert [priority[name] for name in ("worker", "office", "sandbox")] == [behind] * 3
    for name in ("front", "office", "worker"):
        until(lambda name=name: readiness(urls[name])[0] == 200)


@together
def test_secrets_are_private(shared: UpProcess) -> None:
    for path in (shared.data_dir / "secrets").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    for name in ("secrets", "logs"):
        assert (shared.data_dir / name).stat().st_mode & 0o777 == 0o700


@together
def test_no_secret_is_in_a_command_line_or_a_log(shared: UpProcess) -> None:
    values = [path.read_text().strip() for path in (shared.data_dir / "secrets").iterdir()]
    assert len(values) >= 7
    lines = []
    for process in shared.family():
        with contextlib.suppress(psutil.NoSuchProcess):  # a session of Postgres that has just ended
            lines.append(" ".join(process.cmdline()))
    assert len(lines) >= 7
    texts = [path.read_text(errors="replace") for path in (shared.data_dir / "logs").iterdir()]
    for value in values:
        assert not any(value in text for text in [*lines, *texts, shared.said])


@together
def test_metrics_are_the_sum_of_all_front_processes(shared: UpProcess) -> None:
    url = shared.urls()["front"]
    assert "# TYPE" in httpx.get(url + "/metrics", timeout=60, trust_env=False).text
    folder = shared.data_dir / "metrics" / "front"
    pids = {int(found[1]) for path in folder.glob("*.db") if (found := re.search(r"_(\d+)\.db$", path.name))}
    urls = shared.urls()
    assert {urls["pids"]["front-1"], urls["pids"]["front-2"]} <= pids


@together
def test_a_second_up_on_the_same_directory_is_refused_and_harms_nothing(shared: UpProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "up", "--data-dir", str(shared.data_dir), *PORTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        f"another `fairdrop up` (process {shared.process.pid}) uses {shared.data_dir}"
    )
    until(lambda: answers(shared.urls()["front"], within_s=60))


@together
def test_a_head_that_is_too_large_is_431(shared: UpProcess) -> None:
    url = shared.urls()["front"]
    answer = httpx.get(url + "/healthz", headers={"X-Long": "x" * 20_000}, timeout=60, trust_env=False)
    assert (answer.status_code, answer.json()["code"]) == (431, "head_too_large")
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as wire:
        with contextlib.suppress(OSError):  # it may have been closed on us already
            for _ in range(64):
                wire.sendall(b"GET /healthz HTTP/1.1\r\n" if _ == 0 else b"x-more: " + b"x" * 4096 + b"\r\n")
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while more := wire.recv(65536):
                received += more
        assert received == b"" or received.startswith(b"HTTP/1.1 431 ")


@together
def test_whatever_dies_is_started_again_at_the_same_address(shared: UpProcess) -> None:
    before = shared.urls()
    for name in ("front-1", "office", "worker", "sandbox", "valkey", "postgres"):
        pid = before["pids"][name]
        os.kill(pid, signal.SIGKILL)
        until(lambda name=name, pid=pid: shared.urls()["pids"][name] != pid)
    for name in ("front-1", "worker", "Valkey"):  # not with a line that it logged an hour before
        assert f"{name} ended (killed by SIGKILL); starting it again" in shared.said
    after = shared.urls()
    assert {name: after[name] for name in after if name != "pids"} == {
        name: before[name] for name in before if name != "pids"
    }
    for name in ("front", "office", "worker", "sandbox"):
        until(lambda name=name: answers(after[name]))
    for name in ("front", "office", "worker"):
        until(lambda name=name: readiness(after[name])[0] == 200)


@together
def test_the_token_command_makes_a_jwt_of_this_installation(shared: UpProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "token", "buyer-7", "--data-dir", str(shared.data_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    secret = (shared.data_dir / "secrets" / "jwt_secret").read_text().strip()
    claims = jwt.decode(done.stdout.strip(), secret, algorithms=["HS256"])
    assert (claims["sub"], claims["exp"] - claims["iat"]) == ("buyer-7", 3600)


@together
def test_migrate_check_says_that_nothing_is_missing(shared: UpProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "migrate", "--check", "--data-dir", str(shared.data_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_sigterm_stops_everything_and_the_next_up_finds_its_data(folder: Path) -> None:
    with up(folder, *PORTS) as running:
        first = running.urls()
        family = running.family()
        assert len(family) >= 6
        assert running.end() == 0, running.said
        assert not [process for process in family if process.is_running()], running.said
        assert not (folder / "urls.json").exists()
    with up(folder, *PORTS) as running:
        second = running.urls()
        assert second["operator_key"] == first["operator_key"]
        assert running.end() == 0, running.said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux")
def test_kill_9_of_up_leaves_no_process_and_the_next_up_starts(folder: Path) -> None:
    with up(folder, *PORTS) as running:
        running.urls()
        family = running.family()
        running.process.kill()
        running.process.wait()
        (folder / "urls.json").unlink()  # stale: it would be taken for the next one's
        with up(folder, *PORTS) as following:  # at once, while the others are still ending
            following.urls()
            until(lambda: not any(process.is_running() for process in family))
            assert following.end() == 0, following.said


def test_ctrl_c_while_it_starts_leaves_nothing(folder: Path) -> None:
    with up(folder, *PORTS) as running:
        until(lambda: (folder / "up.lock").exists() and running.family())
        family = running.family()
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(180) in (0, 130), running.said
        until(lambda: not any(process.is_running() for process in family))
        assert not (folder / "urls.json").exists()


def test_a_port_in_use_is_one_sentence(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name in ("front", "office", "worker", "sandbox"):
            said = refused(folder, *PORTS, f"--{name}-port", port)
            assert (
                said
                == f"fairdrop: {name}: port {port} on 127.0.0.1 is in use; choose another with --{name}-port"
            )
    assert not (folder / "valkey").exists() and not (folder / "postgres").exists()


def test_a_data_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "up", "--data-dir", str(tmp_path / "file" / "data"), *PORTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"fairdrop: cannot write to the data directory .*: Not a directory; choose another with --data-dir\n",
        done.stderr,
    )


def test_a_read_only_data_directory_is_one_sentence(folder: Path) -> None:
    """Read-only as a mount is: that stops root too."""
    folder.mkdir()
    mount = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}"
    command = f"{mount} && exec {sys.executable} -m app.cli up --data-dir {folder} {' '.join(PORTS)}"
    probe = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount], capture_output=True
    )
    if probe.returncode != 0:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"fairdrop: cannot write to the data directory .*: Read-only file system; choose another with --data-dir\n",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:1", r"the Redis address \(FAIRDROP_REDIS_URL\) must begin with redis://.*"),
        ("redis://127.0.0.1:1/0", r"cannot reach Redis at 127\.0\.0\.1:1 .*"),
        ("redis://127.0.0.1:99999/0", r"the Redis address \(FAIRDROP_REDIS_URL\) is not a URL like .*"),
        ("redis+sentinel://127.0.0.1:1", r"the Redis address \(FAIRDROP_REDIS_URL\) is not a URL like .*"),
        ("redis+sentinel://127.0.0.1:1/x", r"cannot reach Redis at `x` of the sentinels 127\.0\.0\.1:1 .*"),
    ],
)
def test_a_wrong_redis_address_is_one_sentence(folder: Path, url: str, sentence: str) -> None:
    said = refused(folder, *PORTS, env={"FAIRDROP_REDIS_URL": url})
    assert re.fullmatch(f"fairdrop: {sentence}", said), said
    assert not (folder / "postgres").exists()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("mysql://x", r"FAIRDROP_DATABASE_URL must look like postgresql://.*"),
        ("postgresql://a:hush@127.0.0.1:1/x", r"cannot reach Postgres: .*"),
    ],
)
def test_a_wrong_database_address_is_one_sentence(folder: Path, url: str, sentence: str) -> None:
    said = refused(folder, *PORTS, env={"FAIRDROP_DATABASE_URL": url})
    assert re.fullmatch(f"fairdrop: {sentence}", said), said
    assert "hush" not in said
    assert not (folder / "valkey").exists()


def test_a_wrong_password_is_one_sentence(folder: Path, valkey: Valkey, database_url: str) -> None:
    said = refused(folder, *PORTS, env={"FAIRDROP_REDIS_URL": valkey.url.replace(valkey.password, "wrong")})
    assert "(FAIRDROP_REDIS_URL): WRONGPASS" in said
    wrong = re.sub(r":[^:@]*@", ":wrong@", database_url)
    said = refused(folder, *PORTS, env={"FAIRDROP_DATABASE_URL": wrong})
    assert "password authentication failed" in said


def test_an_old_redis_is_one_sentence(folder: Path) -> None:
    with old_redis() as port:
        said = refused(folder, *PORTS, env={"FAIRDROP_REDIS_URL": f"redis://127.0.0.1:{port}/0"})
    assert said == f"fairdrop: Redis 6.2.14 at 127.0.0.1:{port} is too old: 7 or newer is needed"


@contextlib.contextmanager
def old_redis() -> Iterator[int]:
    """Speaks as much RESP as a version check needs, and says that it is Redis 6.2."""
    info = b"# Server\r\nredis_version:6.2.14\r\nrun_id:0\r\n"

    def answer(command: bytes) -> bytes:
        if b"INFO" in command.upper():
            return b"$%d\r\n%b\r\n" % (len(info), info)
        if b"HELLO" in command.upper():
            return b"-ERR unknown command\r\n"
        return b"+OK\r\n"

    def serve(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                wire, _ = server.accept()
                with wire, contextlib.suppress(OSError):
                    wire.settimeout(10)
                    while data := wire.recv(65536):
                        commands = [part for part in data.split(b"*") if part.strip()]
                        wire.sendall(b"".join(answer(part) for part in commands))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_real_servers_are_used_where_urls_name_them(
    folder: Path, redis_url: str, empty_database_url: str
) -> None:
    env = {"FAIRDROP_REDIS_URL": redis_url, "FAIRDROP_DATABASE_URL": empty_database_url}
    with up(folder, *PORTS, env=env) as running:
        urls = running.urls()
        assert (urls["redis"], urls["database"]) == (redis_url, empty_database_url)
        assert not {"valkey", "postgres"} & set(urls["pids"])
        assert running.end() == 0, running.said


def test_granian_serves_the_front_too(folder: Path, redis_url: str, database_url: str) -> None:
    env = {"FAIRDROP_REDIS_URL": redis_url, "FAIRDROP_DATABASE_URL": database_url}
    with up(folder, *PORTS, "--server", "granian", "--front-workers", "2", env=env) as running:
        urls = running.urls()
        until(lambda: readiness(urls["front"])[0] == 200)
        assert running.end() == 0, running.said


def test_a_front_that_drains_serves_on_and_says_so(tmp_path: Path, redis_url: str) -> None:
    env = {
        **os.environ,
        "FAIRDROP_REDIS_URL": redis_url,
        "FAIRDROP_DRAIN_S": "10",
        "FAIRDROP_SIGNING_KEYS": "s" * 40,
        "FAIRDROP_PII_KEYS": "00" * 32,
        "FAIRDROP_JWT_SECRET": "j" * 40,
    }
    log = tmp_path / "front.log"
    with log.open("wb") as out:
        front = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "front", "--port", "0"],
            cwd=ROOT,
            env=env,
            stderr=out,
            stdout=out,
        )
    try:
        until(lambda: "http://" in log.read_text())
        found = re.search(r"http://[\d.:]+", log.read_text())
        assert found
        url = found[0]
        until(lambda: answers(url, within_s=60))
        front.terminate()
        until(lambda: "draining" in readiness(url)[1])
        assert answers(url, within_s=60)
        assert front.wait(180) == 0, log.read_text()
    finally:
        if front.poll() is None:
            front.kill()
            front.wait()


def test_a_front_of_several_processes_is_one_to_the_outside(tmp_path: Path, redis_url: str) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = {
        **os.environ,
        "TMPDIR": str(temporary),
        "FAIRDROP_REDIS_URL": redis_url,
        "FAIRDROP_DRAIN_S": "0",
        "FAIRDROP_SIGNING_KEYS": "s" * 40,
        "FAIRDROP_PII_KEYS": "00" * 32,
        "FAIRDROP_JWT_SECRET": "j" * 40,
    }
    log = tmp_path / "front.log"
    with log.open("wb") as out:
        front = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "front", "--port", "0", "--workers", "2"],
            cwd=ROOT,
            env=env,
            stderr=out,
            stdout=out,
        )
    try:
        until(lambda: "http://" in log.read_text())
        found = re.search(r"http://[\d.:]+\d", log.read_text())
        assert found
        url = found[0]
        until(lambda: answers(url, within_s=60))
        until(lambda: len(psutil.Process(front.pid).children()) == 2)
        first, second = psutil.Process(front.pid).children()
        first.kill()
        until(lambda: len([one for one in psutil.Process(front.pid).children() if one not in (first,)]) == 2)
        for _ in range(8):
            until(lambda: answers(url, within_s=60))
        front.terminate()
        assert front.wait(180) == 0, log.read_text()
        assert not second.is_running()
        assert not list(temporary.iterdir())  # the metrics of all processes have gone with them
    finally:
        if front.poll() is None:
            front.kill()
            front.wait()


def test_a_front_of_several_processes_runs_on_the_server_that_was_asked_for(
    tmp_path: Path, redis_url: str
) -> None:
    env = {
        **os.environ, "FAIRDROP_REDIS_URL": redis_url, "FAIRDROP_DRAIN_S": "0", "FAIRDROP_SIGNING_KEYS": "s" * 40,
        "FAIRDROP_PII_KEYS": "00" * 32, "FAIRDROP_JWT_SECRET": "j" * 40,
    }  # fmt: skip
    log, port = tmp_path / "front.log", quiet_port()
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "front",
        "--port",
        str(port),
        "--workers",
        "2",
        "--server",
        "granian",
    ]
    with log.open("wb") as out:
        front = subprocess.Popen(command, cwd=ROOT, env=env, stderr=out, stdout=out)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(url, within_s=60))
        said = {
            httpx.get(url + "/healthz", timeout=60, trust_env=False).headers.get("server") for _ in range(8)
        }
        assert said == {"granian"}, log.read_text()
        until(lambda: len(psutil.Process(front.pid).children()) == 2)
        front.terminate()
        assert front.wait(180) == 0, log.read_text()
    finally:
        if front.poll() is None:
            front.kill()
            front.wait()


@pytest.mark.parametrize("command", ["front", "office", "worker"])
def test_production_refuses_to_start_without_secrets(command: str, redis_url: str, database_url: str) -> None:
    env = {**os.environ, "FAIRDROP_REDIS_URL": redis_url, "FAIRDROP_DATABASE_URL": database_url}
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", command, "--port", "0"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert re.match(r"fairdrop: FAIRDROP_\w+ is missing", last), last
    assert "Traceback" not in done.stderr


def test_a_setting_that_is_no_number_is_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "front"],
        cwd=ROOT,
        env={**os.environ, "FAIRDROP_FRONT_PORT": "eighty"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"fairdrop: FAIRDROP_FRONT_PORT: Input should be a valid integer.*\n", done.stderr)


def test_rehearsing_against_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "rehearse", "--urls", str(tmp_path / "urls.json")],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and re.fullmatch(r"fairdrop rehearse: there is no file .*\n", done.stderr)


def test_a_worker_without_a_database_is_told_what_is_missing(redis_url: str) -> None:
    given = {name: value for name, value in os.environ.items() if not name.startswith("FAIRDROP_")}
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "worker"],
        cwd=ROOT,
        env=given
        | {"FAIRDROP_ENV": "development", "FAIRDROP_REDIS_URL": redis_url, "FAIRDROP_DATABAS_URL": "x"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    *before, last = done.stderr.splitlines()
    assert done.returncode == 2 and last == "fairdrop: FAIRDROP_DATABASE_URL is missing", done.stderr
    assert any("FAIRDROP_DATABAS_URL is no setting; FAIRDROP_DATABASE_URL?" in line for line in before)
