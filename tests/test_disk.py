"""The disk of the embedded stores fills up: joins are refused before, and what gives back runs to the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from app.disk import MB, Disk
from app.embedded import Valkey, find_valkey, make_folder
from app.errors import CannotStart

DISK_MB, MIN_MB, BALLAST_MB = 24, 8, 4


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = Path("/var/tmp" if os.path.isdir("/var/tmp") else "/tmp") / f"fairdrop-disk-{os.getpid()}"
    make_folder(folder)
    options = f"size={DISK_MB}m,mode=0711"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
    if done.returncode != 0:
        folder.rmdir()
        pytest.skip("only root may make a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def fill(folder: Path, *, leave_mb: float) -> None:
    """Take all the room but so much."""
    size = shutil.disk_usage(folder).free - int(leave_mb * MB)
    with (folder / "other").open("ab") as file:
        os.posix_fallocate(file.fileno(), file.tell(), size)


GIVES = "#!lua flags=allow-oom\nreturn redis.call('SET', KEYS[1], ARGV[1])"
TAKES = "#!lua\nreturn redis.call('SET', KEYS[1], ARGV[1])"


def joins_are_refused(client: redis.Redis) -> bool:
    """Whether a script that takes room is refused. One that gives back (allow-oom) never is."""
    assert client.eval(GIVES, 1, "k", "given back")
    try:
        client.eval(TAKES, 1, "k", "taken")
    except redis.OutOfMemoryError:
        return True
    return False


def test_the_door_is_shut_before_the_disk_is_full_and_the_ballast_brings_valkey_back(
    small_disk: Path,
) -> None:
    said: list[str] = []
    valkey = Valkey(small_disk / "valkey", "secret", server=find_valkey())
    disk = Disk(small_disk, valkey, min_mb=MIN_MB, ballast_mb=BALLAST_MB, say=said.append)
    valkey.start()
    try:
        with contextlib.closing(redis.Redis.from_url(valkey.url, retry=None)) as client:
            disk.look()
            assert disk.ballast.stat().st_size == BALLAST_MB * MB
            assert not disk.shut
            assert not joins_are_refused(client)

            fill(small_disk, leave_mb=MIN_MB - 1)
            disk.look()
            assert disk.shut
            assert joins_are_refused(client)
            assert "the door is shut" in said[-1]

            fill(small_disk, leave_mb=0)
            with pytest.raises((redis.ConnectionError, redis.ResponseError)):
                for number in range(100_000):
                    client.eval(
                        "#!lua flags=allow-oom\nreturn redis.call('SET', KEYS[1], ARGV[1])",
                        1,
                        f"k{number}",
                        "x" * 100,
                    )
            assert valkey.process is not None
            valkey.process.wait(180)  # appendfsync always: better no Redis than one that forgets

        disk.look()
        assert not disk.ballast.exists()
        valkey.start()
        with contextlib.closing(redis.Redis.from_url(valkey.url, retry=None)) as client:
            assert joins_are_refused(client), "the door stays shut through the restart"
            disk.look()
            assert disk.shut

            (small_disk / "other").unlink()
            disk.look()
            assert not disk.shut
            assert not joins_are_refused(client)
            assert disk.ballast.stat().st_size == BALLAST_MB * MB
            assert said[-1].endswith("the door is open again")
    finally:
        valkey.kill()


def test_without_a_threshold_nobody_looks(tmp_path: Path) -> None:
    valkey = Valkey(tmp_path / "valkey", "secret", server=find_valkey())
    disk = Disk(tmp_path / "is not there", valkey, min_mb=0, ballast_mb=64, say=pytest.fail)
    disk.look()
    assert not disk.shut


def test_a_server_that_cannot_write_its_log_says_so(small_disk: Path) -> None:
    """What `up` relies on: no half-working Valkey on a full disk."""
    fill(small_disk, leave_mb=0)
    valkey = Valkey(small_disk / "valkey", "secret", server=find_valkey())
    with pytest.raises((CannotStart, OSError)):
        valkey.start(within_s=5)
    valkey.kill()
