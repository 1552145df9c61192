"""What the machine itself takes of a span of time, for tests that hold us to one: other tests may run beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from typing import Self

TICK_S = 0.01
# A thread of ours that computes lets another wait 5 ms for the interpreter: that is our time, and is not let off.
OURS_S = 0.01
ROUNDS_MAX = 4


class Pauses:
    """Inside `with`: `s` is by how much a thread that only sleeps was woken too late, added up."""

    def __init__(self) -> None:
        self.s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pauses", daemon=True)

    def _watch(self) -> None:
        while not self._over.is_set():
            before = time.monotonic()
            time.sleep(TICK_S)
            late_s = time.monotonic() - before - TICK_S
            if late_s > OURS_S:
                self.s += late_s

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


async def mostly_within(limit_s: float, happen: Callable[[], Awaitable[object]], times: int = 5) -> None:
    """AssertionError: the median of `times` is above the limit, without what the machine took, and is in each round.

    What else runs may spoil a round, a mistake of ours spoils all of them.
    """
    rounds = []
    with Pauses() as pauses:
        for _ in range(ROUNDS_MAX):
            took = []
            for _ in range(times):
                began_s, paused_s = time.monotonic(), pauses.s
                await happen()
                took.append(time.monotonic() - began_s - (pauses.s - paused_s))
            if sorted(took)[times // 2] < limit_s:
                return
            rounds.append([round(one_s, 3) for one_s in took])
    raise AssertionError(f"not within {limit_s} s: {rounds}")
