"""How many repeats a sick supplier may get: a budget, as Finagle's RetryBudget, so that trouble is never multiplied.

Each call earns a share of a repeat, each repeat costs a whole one; a trickle by time lets a quiet supplier be tried
again too, and what is saved has a limit. With a share of 0.2 a supplier that refuses everything sees at most 1.2 times
the calls, plus the trickle.
(Finagle: twitter.github.io/finagle/guide/Clients.html#retries; the same idea in gRPC's retryThrottling, gRFC A6.)
"""

from __future__ import annotations

import random
from collections.abc import Callable


class RetryBudget:
    """earned: repeats for each call, 0…1. per_s: repeats that come by themselves. saved_max: at once, at most."""

    __slots__ = ("_at_ms", "_clock", "_saved", "earned", "per_s", "saved_max")

    def __init__(self, earned: float, per_s: float, saved_max: float, clock_ms: Callable[[], int]) -> None:
        self.earned = earned
        self.per_s = per_s
        self.saved_max = saved_max
        self._clock = clock_ms
        self._saved = saved_max
        self._at_ms = clock_ms()

    def earn(self) -> None:
        """A call is made."""
        saved = self._saved + self.earned
        self._saved = saved if saved < self.saved_max else self.saved_max

    def spend(self) -> bool:
        """May one call be repeated? True: it is paid for."""
        now = self._clock()
        self._saved = min(self.saved_max, self._saved + (now - self._at_ms) * self.per_s / 1000)
        self._at_ms = now
        if self._saved < 1:
            return False
        self._saved -= 1
        return True

    @property
    def saved(self) -> float:
        return self._saved


def backoff_s(tries: int, first_s: float, rand: Callable[[], float] = random.random) -> float:
    """The wait before repeat number `tries` (1, 2, …): doubles, spread over its upper half."""
    return float(first_s * 2 ** (tries - 1) * (0.5 + rand() / 2))
