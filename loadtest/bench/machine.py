"""What the machine is, which processes use how much of it, and who runs on which core (Linux)."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PACKAGES = ("uvicorn", "granian", "uvloop", "httptools", "hiredis", "fastapi", "redis", "asyncpg")


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Pinning:
    """Which cores the API has, and which everything else: stores, worker, generator.

    One front process has a core to itself. Several have one core each; on a machine that has no more cores than that,
    everything else runs on all of them (CPU for a request stays comparable, requests per second less so).
    """

    api: tuple[tuple[int, ...], ...]  # for each front process
    rest: tuple[int, ...]

    @classmethod
    def of(cls, fronts: int, available: Sequence[int]) -> Pinning:
        if len(available) < 2:
            return cls(tuple(tuple(available) for _ in range(fronts)), tuple(available))
        api = tuple((available[number % len(available)],) for number in range(fronts))
        free = tuple(core for core in available if (core,) not in api)
        return cls(api, free or tuple(available))

    def __str__(self) -> str:
        fronts = ", ".join(
            f"process {n} on core {'/'.join(map(str, one))}" for n, one in enumerate(self.api, 1)
        )
        return f"API: {fronts}; everything else on core {', '.join(map(str, self.rest))}"


@contextmanager
def on_cores(wanted: Iterable[int]) -> Iterator[None]:
    """Whatever is started inside inherits these cores, threads and all."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin(pids: Iterable[int], wanted: Iterable[int]) -> None:
    """Put running processes with all their threads on these cores."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), wanted)


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [pid, *(child.pid for child in root.children(recursive=True))]
    return []


def cpu_s(pids: Iterable[int]) -> float:
    """User and system time of these processes and of their children that have ended, in seconds.

    From schedstat where the kernel has it (nanoseconds), else from stat (ticks of 10 ms).
    """
    total = 0.0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own = (int(fields[11]) + int(fields[12])) * TICK_S
            ended = (int(fields[13]) + int(fields[14])) * TICK_S
            with suppress(OSError):
                exact = sum(
                    int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")
                )
                own = max(own - TICK_S, exact / 1e9)  # threads that have ended are only in stat
            total += own + ended
    return total


def cpu_by_role(pids: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """`cpu_s` of each role. `postgres`: its first process and all descendants as they are now, since it starts one for
    each connection, and one that is made in the middle of a measurement costs as much as the others."""
    return {role: cpu_s(family(own[0]) if role == "postgres" else own) for role, own in pids.items()}


def busy_s() -> float:
    """Time that all cores have been busy with anything, steal included, in seconds."""
    fields = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle, iowait = fields[3], fields[4]
    return (sum(fields) - idle - iowait) * TICK_S


def resident_bytes(pid: int) -> int:
    """Memory that only this process has, in bytes: what is shared with others is nobody's growth."""
    private = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            private += int(line.split()[1]) * 1024
    return private


def describe() -> dict[str, str]:
    """The machine and the versions that the figures belong to."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in cpuinfo if "model name" in line), platform.machine())
    return {
        "cpu": f"{os.cpu_count()} × {model}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: version(name) for name in PACKAGES},
        "generator": "our own" + (", ceilings checked with wrk" if shutil.which("wrk") else ""),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
