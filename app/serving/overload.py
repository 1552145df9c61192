"""Who is turned away when more come than a process can answer: whoever would wait too long.

Two things make a request wait, and each has its measure. Redis and the work around it: so many requests may be under
way as are answered in `wait_max_s`, by the speed of the last moments. The event loop: once there is a crowd, or its
turns stay long, each turn reads for a slice of time only. Whoever comes on top is told 503 at once and unread, for a
part of what an answer costs; what is already there is answered in its order. Below its limit a process pays two
comparisons. No I/O; the clock is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LOOK_EVERY_S = 0.01  # s between two looks at how long the event loop takes to come round
LONG_TURNS = 3  # long turns in a row put the gate up: one alone is a pause of the machine, not a crowd
SLICE_S = 0.005  # s of reading in one turn while the gate is up: whoever comes next waits about twice that to be told
CROWD_MIN = 256  # fewer are no crowd, however slow the machine is just now; so many keep a process busy (BENCHMARKS.md)
PER_S_FIRST = 20_000.0  # answers a second, until it is known
SMOOTH_S = 0.1  # s over which the speed is averaged
CALM_S = 1.0  # s in which nobody was turned away, after which the gate comes down


class Gate:
    """The limit of one process.

    turn_max_s: a longer turn of the event loop is a sign of a crowd. wait_max_s: who would wait longer is turned away,
    if crowd_min are there already. clock: monotonic seconds.
    """

    def __init__(
        self, turn_max_s: float, wait_max_s: float, clock: Callable[[], float], crowd_min: int = CROWD_MIN
    ) -> None:
        self.turn_max_s = turn_max_s
        self.wait_max_s = wait_max_s
        self.crowd_min = crowd_min
        self._clock = clock
        self.up = False  # there is a crowd: each turn reads for a slice only
        self.under_way = 0  # requests that have been read and not yet answered
        self.limit = max(crowd_min, int(PER_S_FIRST * wait_max_s))  # of those
        self.turned_away = 0
        self._done = 0  # answers since the last look
        self._looked_at = clock()
        self._per_s = PER_S_FIRST
        self._long_turns = 0
        self._seen = 0  # of `turned_away`
        self._crowded_at = 0.0  # when somebody was last turned away, or a turn was last long
        self._reading_since: float | None = None  # the turn of the loop that is reading, while the gate is up
        self._read = 0  # in this turn

    def begin(self) -> None:
        """A request has been read and is not answered at once."""
        self.under_way += 1

    def end(self) -> None:
        """It has been answered."""
        self.under_way -= 1
        self._done += 1

    @property
    def full(self) -> bool:
        """Whether a newcomer would wait too long for those who are under way."""
        return self.under_way >= self.limit

    def late(self) -> bool:
        """Whether the loop has read for long enough in this turn; it counts who asks. `turn_ended` begins the next."""
        if not self.up:
            return False
        now = self._clock()
        if self._reading_since is None:
            self._reading_since, self._read = now, 0
        self._read += 1
        return self._read > self.crowd_min and now - self._reading_since > SLICE_S

    @property
    def reading(self) -> bool:
        """Whether `late` has been asked in this turn of the loop."""
        return self._reading_since is not None

    def turn_ended(self) -> None:
        self._reading_since = None

    def turn_away(self) -> None:
        """Somebody is turned away: then turns are kept short too, so that the next can be told soon."""
        self.turned_away += 1
        self.up = True

    def looked(self, late_s: float) -> None:
        """Take note, some hundred times a second, of how late the event loop came round."""
        now = self._clock()
        passed_s = now - self._looked_at
        self._looked_at = now
        if (
            passed_s > 0 and self.under_way + self._done >= self.crowd_min
        ):  # else it says how many came, not how fast
            weight = min(1.0, passed_s / SMOOTH_S)
            self._per_s += weight * (self._done / passed_s - self._per_s)
            self.limit = max(self.crowd_min, int(self._per_s * self.wait_max_s))
        self._done = 0
        long = late_s > self.turn_max_s
        if self.up:
            if long or self.turned_away != self._seen:
                self._seen = self.turned_away
                self._crowded_at = now
            elif now - self._crowded_at > CALM_S:
                self.up = False
                self._long_turns = 0
            return
        self._long_turns = self._long_turns + 1 if long else 0
        if self._long_turns >= LONG_TURNS:
            self.up = True
            self._crowded_at = now


def keep_looking(gate: Gate, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
    """Measure the turns of this loop for the gate, as long as it runs."""
    due = clock() + LOOK_EVERY_S

    def look() -> None:
        nonlocal due
        now = clock()
        gate.looked(now - due)
        due = now + LOOK_EVERY_S
        loop.call_later(LOOK_EVERY_S, look)

    loop.call_later(LOOK_EVERY_S, look)


def retry_after_s(draw: float) -> int:
    """Seconds that somebody who was turned away is asked to wait: 1 to 4, so that they do not come back together."""
    return 1 + int(draw * 4)
