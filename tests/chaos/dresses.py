"""What a process of ours can be dressed in after its fork, besides bugs: older scripts, a wrong clock."""

from __future__ import annotations

import importlib
import mmap
import os
import struct
import time
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

from app import resources

# Who asks datetime.now. Not everybody gets the other class: encoders would not know it in an annotation.
DATED = ("app.repair.bills", "app.purchase.paying.hook")
CLOCK = "FAIRDROP_TEST_CLOCK"  # the file that says how many s this process' wall clock is ahead


def older_scripts() -> None:
    """The scripts of the release before: the same law in another text, so under other names (sha) in Redis."""
    texts = resources.scripts()
    for name, text in texts.items():
        texts[name] = text.rstrip() + "\n-- of the release before\n"


def write_clock(file: Path, ahead_s: float) -> None:
    """Set the wall clock of the process that wears the file; also while it runs."""
    with file.open("r+b" if file.exists() else "w+b") as out:
        out.write(struct.pack("d", ahead_s))


def clock() -> None:
    """A wall clock that jumps: time.time, time.time_ns and datetime.now of this process, as it sees them.

    Monotonic clocks, and so deadlines, leases and the event loop, do not jump: the kernel's do not either.
    """
    with Path(os.environ[CLOCK]).open("rb") as file:
        page = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)

    def ahead_s() -> float:
        found: float = struct.unpack("d", page[:8])[0]
        return found

    real_time, real_ns = time.time, time.time_ns
    time.time = lambda: real_time() + ahead_s()
    time.time_ns = lambda: real_ns() + int(ahead_s() * 1e9)
    shifted = _shifted(ahead_s)
    for name in DATED:
        module = vars(importlib.import_module(name))
        assert module["datetime"] is datetime, name
        module["datetime"] = shifted


def _shifted(ahead_s: Callable[[], float]) -> type[datetime]:
    """A class whose `now` is shifted, and a plain datetime: encoders look at the exact type."""

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=ahead_s())

    return Shifted


DRESSES: dict[str, Callable[[], None]] = {"older_scripts": older_scripts, "clock": clock}
