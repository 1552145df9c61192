"""The disk under the embedded stores: the door is shut before it is full, and a ballast gives room to come back.

With appendfsync always a Valkey that cannot write ends. So `up` looks at the disk once a second:

    below disk_min_mb     Valkey refuses whatever takes more room (maxmemory 1): joins get 503 with Retry-After, while
                          releases, statuses and acknowledgements go on, for their scripts may run when memory is full
    Valkey ended, full    the ballast, a file that holds nothing, is removed: Valkey loads its log and gives back; the
                          door stays shut, also through restarts, for it is in the configuration by then
    room again            the door opens, and the ballast is laid down anew

A Redis of your own has its own disk: watch it there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from app.embedded import Valkey

MB = 1 << 20
ANSWERS_WITHIN_S = 1.0  # for CONFIG SET; Valkey that does not answer is asked at the next look
SHUT = "1"  # bytes of maxmemory: everything that is refused when memory is full is refused


class Disk:
    """Watches the disk that holds `home`. Synchronous; `look` takes well under a millisecond when all is well."""

    def __init__(
        self, home: Path, valkey: Valkey, *, min_mb: int, ballast_mb: int, say: Callable[[str], None]
    ) -> None:
        """min_mb 0: nothing is watched. ballast_mb 0: there is no ballast."""
        self.ballast = home / "ballast"
        self.shut = False
        self._valkey = valkey
        self._open = valkey.settings.get("maxmemory", "0")
        self._min = min_mb * MB
        self._weight = ballast_mb * MB
        self._say = say
        self._untold = False  # the running Valkey does not know yet; one that starts reads it

    def look(self) -> None:
        """Shut or open the door, throw the ballast off or lay it down, as the room on the disk wants."""
        if not self._min:
            return
        free = shutil.disk_usage(self.ballast.parent).free
        if not self._valkey.running() and free < self._min and self.ballast.exists():
            self.ballast.unlink()
            self._say(f"Valkey ended and its disk is full: {self._weight // MB} MB of ballast were removed")
            free += self._weight
        was, missing = self.shut, 0 if self.ballast.exists() else self._weight
        self.shut = free < self._min + (missing if was else 0)
        if self.shut != was:
            self._valkey.settings["maxmemory"] = SHUT if self.shut else self._open
            self._untold = True
            word = "shut: joins get 503 until there is room" if self.shut else "open again"
            least = f"FAIRDROP_DISK_MIN_MB is {self._min // MB}"
            self._say(
                f"{free // MB} MB are left on the disk of {self.ballast.parent} ({least}): the door is {word}"
            )
        if self._untold and self._valkey.running():
            self._tell()
        if missing and free >= self._min + missing:
            self._lay_ballast()

    def _tell(self) -> None:
        import redis  # not at the top: of all that starts stores only `up` needs it

        client = redis.Redis.from_url(
            self._valkey.url,
            socket_timeout=ANSWERS_WITHIN_S,
            socket_connect_timeout=ANSWERS_WITHIN_S,
            retry=None,
        )
        with contextlib.closing(client), contextlib.suppress(redis.RedisError, OSError):
            client.config_set("maxmemory", SHUT if self.shut else self._open)
            self._untold = False

    def _lay_ballast(self) -> None:
        """Blocks of the disk that are really taken. No room after all: no ballast, and the next look tries again."""
        with self.ballast.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._weight)
            except OSError:
                self.ballast.unlink()
