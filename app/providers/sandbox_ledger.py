"""The sandbox's books as a file: one line for everything that happened, so that it outlives the process.

A real supplier does not forget money when a machine of theirs dies. The lines are those of a history (app/record.py):
the judge reads what the supplier did from the same file. A line is written before the request that made it is answered;
kill -9 loses nothing (the kernel has it), a power cut may.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from app.record import NOTHING, Supplier, encode

What = Literal["created", "captured", "declined", "closed", "refunded", "hook", "sms"]


class Ledger:
    """Appends to one file. `path` None: writes nowhere."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def read(self) -> list[Supplier]:
        """What is on record; a last line that was cut off by a crash is none."""
        if self._path is None or not self._path.exists():
            return []
        found = []
        for raw in self._path.read_bytes().splitlines(keepends=True):
            if raw.endswith(b"\n"):
                found.append(msgspec.json.decode(raw, type=Supplier))
        return found

    def note(self, op: What, *, keep: Any = None, **facts: Any) -> None:
        if self._path is None:
            return
        if self._file is None:
            if self._path.exists():  # a line that a crash cut off must not swallow the next
                whole = self._path.read_bytes()
                os.truncate(self._path, whole.rfind(b"\n") + 1)
            self._file = self._path.open("ab")
        kept = NOTHING if keep is None else msgspec.Raw(msgspec.json.encode(keep))
        self._file.write(encode(Supplier(at=time.time(), op=op, keep=kept, **facts)))
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
