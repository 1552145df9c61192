"""Who is turned away when more come than a process can answer: whoever would wait too long.

Below its limit a process reads what comes, as it comes, and this module costs it a timer. Beyond, its event loop has
whole crowds to serve in one turn: everybody waits for everybody, and nobody can even be told. So once turns stay long
the gate is up: requests that may be turned away queue here unread, a slice of them is served a turn, and while the
queue is longer than `wait_max_s` newcomers are told 503 at once, for a fraction of what an answer costs. First come,
first served: chance decides nothing. No I/O, and the clock is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

LONG_TURNS = 3  # long turns in a row put the gate up: one alone is a pause of the machine, not a crowd
SLICE_S = 0.005  # s of queued requests served in one turn of the loop: newcomers wait that long to be told
CROWD_MIN = 300  # fewer are no crowd, however slow the machine is just now: they wait, nobody is turned away
SMOOTH = 0.2  # weight of the latest turn in the speed of the queue
CALM_S = 1.0  # s in which nobody waited long, after which the gate comes down


class Gate(Generic[T]):
    """The queue in front of one process.

    turn_max_s: a longer turn of the event loop is a sign of a crowd. wait_max_s: who would wait longer is turned away,
    if crowd_min are queued. clock: monotonic seconds.
    """

    def __init__(
        self, turn_max_s: float, wait_max_s: float, clock: Callable[[], float], crowd_min: int = CROWD_MIN
    ) -> None:
        self.turn_max_s = turn_max_s
        self.wait_max_s = wait_max_s
        self.crowd_min = crowd_min
        self._clock = clock
        self.up = False
        self.turned_away = 0
        self._long_turns = 0
        self._crowded_at = 0.0  # when somebody last waited for longer than a slice
        self._each_s = 0.0  # what one in the queue takes, all that the process does in between included
        self._taken_at = 0.0  # when the last slice ended with somebody left in the queue; 0: nobody was
        self._queue: deque[tuple[float, T]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def turned(self, took_s: float) -> None:
        """Take note of how long a turn of the event loop took."""
        if self.up:
            if not self._queue and self._clock() - self._crowded_at > CALM_S:
                self.up = False
                self._long_turns = 0
            return
        self._long_turns = self._long_turns + 1 if took_s > self.turn_max_s else 0
        if self._long_turns >= LONG_TURNS:
            self.up = True
            self._crowded_at = self._clock()

    @property
    def wait_s(self) -> float:
        """How long a newcomer would wait: by the speed of the queue, and not less than the first has waited already."""
        if not self._queue:
            return 0.0
        return max(len(self._queue) * self._each_s, self._clock() - self._queue[0][0])

    @property
    def full(self) -> bool:
        return len(self._queue) >= self.crowd_min and self.wait_s > self.wait_max_s

    def put(self, entry: T) -> None:
        """Let one wait for its turn, whether there is room or not: what has begun is never turned away."""
        self._queue.append((self._clock(), entry))

    def take(self) -> Iterator[T]:
        """Those whose turn it is, until a slice of time has passed; at least one. The others stay."""
        now = began = self._clock()
        taken = 0
        while self._queue and now - began < SLICE_S:
            came_at, entry = self._queue.popleft()
            if now - came_at > 2 * SLICE_S:
                self._crowded_at = now
            taken += 1
            yield entry
            now = self._clock()
        if taken:
            each_s = (now - (self._taken_at or began)) / taken
            self._each_s += SMOOTH * (each_s - self._each_s)
        self._taken_at = now if self._queue else 0.0


def retry_after_s(draw: float) -> int:
    """Seconds that somebody who was turned away is asked to wait: 1 to 4, so that they do not come back together."""
    return 1 + int(draw * 4)
